"""Where modules are in each family, as data; and how they are found in a family that is not listed.

Paths of `Family` above the line count from the model, those below from a block. A family that differs from Llama in two
paths is two words; to add one, add a row, and `tests/activations/test_anatomy_model.py` checks it against the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from surgery.anatomy.names import kind_of
from surgery.errors import SurgeryError


@dataclass(frozen=True)
class Family:
    """Module paths of one family; None for what it has not."""

    stack: str = "model.layers"
    final_norm: str = "model.norm"
    # in a block
    attention: str = "self_attn"
    input_norm: str | None = "input_layernorm"
    q: str | None = "self_attn.q_proj"
    k: str | None = "self_attn.k_proj"
    v: str | None = "self_attn.v_proj"
    qkv: str | None = None
    """Where q, k and v are one projection; `layout` says how its output falls apart."""
    layout: str | None = None
    """"concat": all q, all k, all v; "grouped": for each key-value head its queries, its key and its value."""
    out: str = "self_attn.o_proj"
    attention_norm: str | None = None
    """A norm behind the output projection, before its sum with the stream."""
    mlp: str | None = "mlp"
    """None where the MLP's projections are children of the block itself."""
    mlp_norm: str | None = "post_attention_layernorm"
    gate: str | None = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    gate_up: str | None = None
    """Gate and up as one projection, the gate first."""
    down: str | None = "mlp.down_proj"
    mlp_out_norm: str | None = None
    parallel: bool = False
    """Attention and MLP read the same stream: there is no resid_mid."""


LLAMA = Family()
_PLAIN = Family(gate=None)
_MIXTURE = Family(gate=None, up=None, down=None)
_GEMMA = Family(
    attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
_GPT2 = Family(
    stack="transformer.h", final_norm="transformer.ln_f", attention="attn", input_norm="ln_1",
    q=None, k=None, v=None, qkv="attn.c_attn", layout="concat", out="attn.c_proj", mlp_norm="ln_2", gate=None,
    up="mlp.c_fc", down="mlp.c_proj",
)  # fmt: skip
_GPTJ = Family(
    stack="transformer.h", final_norm="transformer.ln_f", attention="attn", input_norm="ln_1",
    q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", out="attn.out_proj", mlp_norm="ln_1", gate=None,
    up="mlp.fc_in", down="mlp.fc_out", parallel=True,
)  # fmt: skip
_NEOX = Family(
    stack="gpt_neox.layers", final_norm="gpt_neox.final_layer_norm",
    attention="attention", q=None, k=None, v=None, qkv="attention.query_key_value", layout="grouped",
    out="attention.dense", gate=None, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
)  # fmt: skip
_BLOOM = Family(
    stack="transformer.h", final_norm="transformer.ln_f",
    attention="self_attention", q=None, k=None, v=None, qkv="self_attention.query_key_value", layout="grouped",
    out="self_attention.dense", gate=None, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
)  # fmt: skip
_OPT = Family(
    stack="model.decoder.layers", final_norm="model.decoder.final_layer_norm",
    input_norm="self_attn_layer_norm", out="self_attn.out_proj", mlp=None, mlp_norm="final_layer_norm", gate=None,
    up="fc1", down="fc2",
)  # fmt: skip
_PHI = replace(
    _PLAIN, final_norm="model.final_layernorm", out="self_attn.dense", mlp_norm="input_layernorm", up="mlp.fc1",
    down="mlp.fc2", parallel=True,
)  # fmt: skip
_PHI3 = Family(q=None, k=None, v=None, qkv="self_attn.qkv_proj", layout="concat", gate=None, up=None,
               gate_up="mlp.gate_up_proj")  # fmt: skip


def _falcon(config: Any) -> Family:
    """Three generations of one name: multi-query and parallel, grouped with two norms, and sequential with alibi."""
    parallel = bool(config.new_decoder_architecture or config.parallel_attn)
    norm, mlp_norm = "input_layernorm", "input_layernorm" if parallel else "post_attention_layernorm"
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn != 1:
        norm, mlp_norm = "ln_attn", "ln_mlp"
    return replace(_BLOOM, parallel=parallel, input_norm=norm, mlp_norm=mlp_norm)


FAMILIES: dict[str, Family | Callable[[Any], Family]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "granite", "ministral"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _MIXTURE),
    "gpt2": _GPT2, "gptj": _GPTJ, "opt": _OPT, "phi": _PHI, "phi3": _PHI3, "bloom": _BLOOM, "falcon": _falcon,
    "gpt_neox": lambda config: replace(_NEOX, parallel=bool(config.use_parallel_residual)),
    "olmo2": Family(input_norm=None, attention_norm="post_attention_layernorm", mlp_norm=None,
                    mlp_out_norm="post_feedforward_layernorm"),
}  # fmt: skip
"""By `config.model_type`."""


def family_of(model: Any) -> Family:
    """The row of a model, or what `by_structure` finds. Raises `SurgeryError` when it is no decoder of known shape."""
    row = FAMILIES.get(model.config.model_type)
    if row is None:
        return by_structure(model)
    return row(model.config) if callable(row) else row


def by_structure(model: Any) -> Family:
    """The family of a model whose type is not listed: names tell the projections, one forward pass tells the norms.

    What a norm is for can't be told from its name (`post_attention_layernorm` stands before the MLP in Llama, behind
    attention in Gemma 2): its input and output are compared with those of attention, MLP and block. Projections of q, k
    and v in one are taken as "concat" when they can't be told apart: the check of `anatomy_of` refuses wrong guesses.
    """
    config = model.config.get_text_config()
    stacks = {n: m for n, m in model.named_modules() if type(m).__name__ == "ModuleList"}
    fitting = [n for n, m in stacks.items() if len(m) == config.num_hidden_layers and "layer" in _last(n) + "layer"]
    if not fitting or model.get_output_embeddings() is None:
        raise _unknown(model, "no list of as many layers as its config says, or no language model head")
    stack = min(fitting, key=lambda n: (n.count("."), n))
    block = stacks[stack][0]
    found: dict[str, str] = {}
    for path, module in block.named_modules():
        if path and hasattr(module, "weight") and module.weight is not None and module.weight.dim() == 2:
            found.setdefault(kind_of(f"layers.0.{path}.weight"), path)
    if "o" not in found or not ({"q", "k", "v"} <= set(found) or ("qkv" in found and "q" not in found)):
        raise _unknown(model, "no attention with projections of q, k and v and of its output in its first block")
    attention = found["o"].rpartition(".")[0]
    mlp = next((n for n, _ in block.named_children() if n in ("mlp", "feed_forward", "ffn", "block_sparse_moe")), None)
    dense = {k: p for k, p in found.items() if mlp is None or p.startswith(f"{mlp}.")}
    if any(_last(n) == "experts" for n, _ in stacks[stack].named_modules()):  # the first blocks may have none
        dense = {}
    roles = _norms(model, block, attention, found["o"], mlp, dense)
    return Family(
        stack=stack, final_norm=_final_norm(model, stack), attention=attention, q=found.get("q"), k=found.get("k"),
        v=found.get("v"), qkv=None if "q" in found else found.get("qkv"), layout=None if "q" in found else "concat",
        out=found["o"], mlp=mlp, gate=dense.get("gate"), up=dense.get("up"), gate_up=dense.get("gate_up"),
        down=dense.get("down"), **roles,
    )  # fmt: skip


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _final_norm(model: Any, stack: str) -> str:
    parent = stack.rpartition(".")[0]
    siblings = model.get_submodule(parent).named_children()
    norms = [n for n, _ in siblings if kind_of(f"{n}.weight") == "norm" and "embed" not in n]
    if not norms:
        raise _unknown(model, f"no norm beside '{stack}'")
    return f"{parent}.{norms[-1]}" if parent else norms[-1]


def _norms(model: Any, block: Any, attention: str, out: str, mlp: str | None, dense: dict[str, str]) -> dict[str, Any]:
    """What the norms of the first block are for, from one forward pass over four tokens."""
    import torch

    norms = [n for n, m in block.named_children() if kind_of(f"layers.0.{n}.weight") == "norm"]
    reads, writes = mlp or dense["up"], mlp or dense["down"]
    watched = {"": block, out: block.get_submodule(out), reads: block.get_submodule(reads)}
    watched |= {n: block.get_submodule(n) for n in [*norms, attention, writes]}
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            first = output[0] if isinstance(output, (tuple, list)) else output
            inputs[name], outputs[name] = given.detach().clone().flatten(), first.detach().clone().flatten()

        return hook

    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in watched.items()]
    try:
        with torch.no_grad():
            model(torch.arange(1, 5, device=model.device)[None] % model.config.get_text_config().vocab_size)
    finally:
        for handle in handles:
            handle.remove()

    def same(a: Any, b: Any) -> bool:
        return a.shape == b.shape and torch.equal(a, b)

    def first(fits: Callable[[str], bool]) -> str | None:
        return next((n for n in norms if fits(n)), None)

    return {
        "input_norm": first(lambda n: same(inputs[n], inputs[""]) and same(outputs[n], inputs[attention])),
        "attention_norm": first(lambda n: same(inputs[n], outputs[out])),
        "mlp_norm": first(lambda n: same(outputs[n], inputs[reads])),
        "mlp_out_norm": first(lambda n: same(inputs[n], outputs[writes])),
        "parallel": any(same(outputs[n], inputs[reads]) and same(inputs[n], inputs[""]) for n in norms),
    }


def _unknown(model: Any, why: str) -> SurgeryError:
    return SurgeryError(
        f"{type(model).__name__} is not a decoder whose parts can be found: {why}.",
        hint="Causal language models of transformers are understood; a family can be added in anatomy/families.py.",
    )
