"""The same patching sweeps as others do them, for `patching.py`: TransformerLens, nnsight, and plain hooks.

Every sweep patches clean activations into the corrupt run, one whole forward a cell, and gives the mean logit
difference at the last position: (layer, position) for the residual stream before a block, (layer, head) for heads over
all positions (key/value heads for k and v). Cells that are not asked for (`cells`) are NaN, and cost nothing: `timed`
runs a few and says what all would take.

TransformerLens 4.3 sweeps k and v of models with grouped key/value heads over their own heads; its every-type helper
pads those columns with zeros. nnsight has no notion of a head: it reads and writes columns of the projections.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

Cells = Sequence[tuple[int, int]]
COMPONENTS = ("z", "q", "k", "v")


# ---- what is measured


def gpt2(**smaller: int) -> transformers.GPT2LMHeadModel:
    """A random model of the size of GPT-2 small; `smaller` is for toys (n_layer, n_embd, n_head, vocab_size)."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = transformers.GPT2Config(**(shape | smaller))
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)


def llama(**smaller: int) -> transformers.LlamaForCausalLM:
    """A random Llama with grouped heads (8 layers of width 512); matrices times 3, so that heads differ in effect."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
        "tie_word_embeddings": False, "attn_implementation": "sdpa",
    }  # fmt: skip
    config = transformers.LlamaConfig(**(shape | smaller))
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
    return model


def pairs(vocab: int, n: int = 8, length: int = 24, first_difference: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Clean and corrupt ids (n, length), which differ at `first_difference` and six tokens on, and answers (n, 2)."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(0, vocab, (n, length), generator=generator)
    corrupt = clean.clone()
    for position in (first_difference, first_difference + 6):
        if position < length:
            corrupt[:, position] = torch.randint(0, vocab, (n,), generator=generator)
    return clean, corrupt, torch.randint(0, vocab, (n, 2), generator=generator)


def logit_difference(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean over the batch of logit[answer] - logit[other answer] at the last position, a scalar."""
    chosen = logits[:, -1].gather(1, answers)
    return (chosen[:, 0] - chosen[:, 1]).mean()


# ---- where things are


@dataclass(frozen=True)
class Places:
    """Blocks of GPT-2 or Llama, and for each component its module and the columns of a head there."""

    blocks: Any
    n_heads: int
    n_kv_heads: int
    d_head: int
    fused: bool

    @classmethod
    def of(cls, model: Any, config: Any) -> Places:
        """`model` is a transformers model or an nnsight model of it: both have the same paths."""
        fused = config.model_type == "gpt2"
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", heads)
        blocks = model.transformer.h if fused else model.model.layers
        return cls(blocks, heads, kv_heads, config.hidden_size // heads, fused)

    def heads(self, component: str) -> int:
        """How many heads the component has."""
        return self.n_kv_heads if component in "kv" else self.n_heads

    def module(self, layer: int, component: str) -> Any:
        """The output projection for z (its input is patched), the projection of q, k or v (its output is)."""
        block = self.blocks[layer]
        if self.fused:
            return block.attn.c_proj if component == "z" else block.attn.c_attn
        return getattr(block.self_attn, {"z": "o_proj", "q": "q_proj", "k": "k_proj", "v": "v_proj"}[component])

    def columns(self, head: int, component: str) -> slice:
        """The head's columns."""
        start = head * self.d_head
        if self.fused and component != "z":
            start += "qkv".index(component) * self.n_heads * self.d_head
        return slice(start, start + self.d_head)


def _fill(shape: tuple[int, int], cells: Cells | None, value: Callable[[int, int], float]) -> Tensor:
    """The table of a sweep, cell by cell; NaN where there is none."""
    table = torch.full(shape, float("nan"), dtype=torch.float64)
    for row, column in _all(shape) if cells is None else cells:
        table[row, column] = value(row, column)
    return table


def _all(shape: tuple[int, int]) -> Cells:
    return [(row, column) for row in range(shape[0]) for column in range(shape[1])]


# ---- TransformerLens


def _bridge_sweep(
    bridge: Any, clean: Tensor, corrupt: Tensor, answers: Tensor, name: str, columns: int, cells: Cells | None,
    gradients: bool,
) -> Tensor:  # fmt: skip
    import pandas as pd
    from transformer_lens import patching
    from transformer_lens.utilities import get_act_name

    shape = (bridge.cfg.n_layers, columns)
    wanted = {get_act_name(name, layer) for layer in range(shape[0])}
    metric = partial(logit_difference, answers=answers)
    with torch.set_grad_enabled(gradients), _no_bars(patching):
        _, cache = bridge.run_with_cache(clean, names_filter=lambda hook: hook in wanted)
        if cells is None:
            sweep = {
                "resid_pre": patching.get_act_patch_resid_pre, "z": patching.get_act_patch_attn_head_out_all_pos,
                "q": patching.get_act_patch_attn_head_q_all_pos, "k": patching.get_act_patch_attn_head_k_all_pos,
                "v": patching.get_act_patch_attn_head_v_all_pos,
            }[name]  # fmt: skip
            return sweep(bridge, corrupt, cache, metric)
        table = torch.full(shape, float("nan"))
        if cells:
            setter = patching.layer_pos_patch_setter if name == "resid_pre" else patching.layer_head_vector_patch_setter
            frame = pd.DataFrame(list(cells), columns=["layer", "column"])
            values = patching.generic_activation_patch(bridge, corrupt, cache, metric, setter, name, index_df=frame)
            table[tuple(torch.tensor(list(cells)).T)] = values
        return table


@contextmanager
def _no_bars(patching: Any) -> Iterator[None]:
    """Without the progress bar that every sweep of TransformerLens draws."""
    kept = patching.tqdm
    patching.tqdm = lambda rows, *_, **__: rows
    try:
        yield
    finally:
        patching.tqdm = kept


def bridge_resid_sweep(
    bridge: Any, clean: Tensor, corrupt: Tensor, answers: Tensor, cells: Cells | None = None, gradients: bool = False
) -> Tensor:
    """resid_pre by `get_act_patch_resid_pre` on a TransformerLens bridge (raw weights): (layer, position).

    With `gradients` torch records for autograd, as it does unless told otherwise, if the bridge's parameters want it.
    """
    return _bridge_sweep(bridge, clean, corrupt, answers, "resid_pre", corrupt.shape[1], cells, gradients)


def bridge_head_sweep(
    bridge: Any, clean: Tensor, corrupt: Tensor, answers: Tensor, component: str = "z", cells: Cells | None = None,
    gradients: bool = False,
) -> Tensor:  # fmt: skip
    """Heads by `get_act_patch_attn_head_out_all_pos` (`_q_`, `_k_`, `_v_`) on a bridge; columns are its own heads."""
    kv_heads = bridge.cfg.n_key_value_heads or bridge.cfg.n_heads
    columns = kv_heads if component in "kv" else bridge.cfg.n_heads
    return _bridge_sweep(bridge, clean, corrupt, answers, component, columns, cells, gradients)


# ---- nnsight


def nnsight_resid_sweep(
    traced: Any, clean: Tensor, corrupt: Tensor, answers: Tensor, cells: Cells | None = None
) -> Tensor:
    """resid_pre by one trace a cell: (layer, position). `traced` is `nnsight.NNsight(model)`."""
    blocks = Places.of(traced, traced._module.config).blocks
    with torch.no_grad():
        kept = []
        with traced.trace(clean, use_cache=False):
            for block in blocks:
                kept.append(block.input.clone().save())

        def value(layer: int, position: int) -> float:
            block, source = blocks[layer], kept[layer]
            with traced.trace(corrupt, use_cache=False):
                stream = block.input.clone()
                stream[:, position] = source[:, position]
                block.input = stream
                logits = traced.output.logits.save()
            return float(logit_difference(logits, answers))

        return _fill((len(blocks), corrupt.shape[1]), cells, value)


def nnsight_head_sweep(
    traced: Any, clean: Tensor, corrupt: Tensor, answers: Tensor, component: str = "z", cells: Cells | None = None
) -> Tensor:
    """Heads by one trace a cell, as columns of the projections: (layer, head), key/value heads for k and v."""
    places = Places.of(traced, traced._module.config)
    modules = [places.module(layer, component) for layer in range(len(places.blocks))]
    with torch.no_grad():
        kept = []
        with traced.trace(clean, use_cache=False):
            for module in modules:
                kept.append((module.input if component == "z" else module.output).clone().save())

        def value(layer: int, head: int) -> float:
            module, source, columns = modules[layer], kept[layer], places.columns(head, component)
            with traced.trace(corrupt, use_cache=False):
                whole = (module.input if component == "z" else module.output).clone()
                whole[..., columns] = source[..., columns]
                if component == "z":
                    module.input = whole
                else:
                    module.output = whole
                logits = traced.output.logits.save()
            return float(logit_difference(logits, answers))

        return _fill((len(modules), places.heads(component)), cells, value)


# ---- plain hooks: the baseline


@contextmanager
def _hooked(module: nn.Module, edit: Callable[[Tensor], Tensor | None], output: bool) -> Iterator[None]:
    """Calls `edit` on the module's first input, or on its output; what it returns takes the place."""

    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        new = edit(arguments[0] if arguments else keywords["hidden_states"])
        if new is None:
            return None
        return ((new, *arguments[1:]), keywords) if arguments else (arguments, keywords | {"hidden_states": new})

    if output:
        handle = module.register_forward_hook(lambda _, __, result: edit(result))
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _hooks_sweep(
    model: Any, clean: Tensor, corrupt: Tensor, answers: Tensor, modules: Sequence[Any], output: bool,
    where: Callable[[int], tuple[Any, ...]], columns: int, cells: Cells | None,
) -> Tensor:  # fmt: skip
    """One forward a cell: the clean values of `module[where(column)]` are written in the corrupt run."""
    with torch.inference_mode():
        kept: list[Tensor] = []
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(_hooked(module, lambda x: kept.append(x.clone()), output))
            model(clean, use_cache=False)

        def value(layer: int, column: int) -> float:
            def edit(current: Tensor) -> Tensor:
                new = current.clone()
                new[where(column)] = kept[layer][where(column)]
                return new

            with _hooked(modules[layer], edit, output):
                return float(logit_difference(model(corrupt, use_cache=False).logits, answers))

        return _fill((len(modules), columns), cells, value)


def hooks_resid_sweep(
    model: Any, clean: Tensor, corrupt: Tensor, answers: Tensor, cells: Cells | None = None
) -> Tensor:
    """resid_pre by torch hooks on the transformers model: (layer, position)."""
    blocks = list(Places.of(model, model.config).blocks)
    return _hooks_sweep(
        model, clean, corrupt, answers, blocks, False, lambda position: (slice(None), position), corrupt.shape[1], cells
    )


def hooks_head_sweep(
    model: Any, clean: Tensor, corrupt: Tensor, answers: Tensor, component: str = "z", cells: Cells | None = None
) -> Tensor:
    """Heads by torch hooks on the projections: (layer, head), key/value heads for k and v."""
    places = Places.of(model, model.config)
    modules = [places.module(layer, component) for layer in range(len(places.blocks))]
    return _hooks_sweep(
        model, clean, corrupt, answers, modules, component != "z",
        lambda head: (..., places.columns(head, component)), places.heads(component), cells,
    )  # fmt: skip


# ---- time


class Timing(NamedTuple):
    """CPU seconds of a sweep, from a few of its cells: every cell is the same forward."""

    clean_run: float
    """The clean run and what is kept of it."""
    cell: float
    """One cell, the median."""
    cells: int
    """How many there are."""
    measured: int
    """How many were run."""

    @property
    def total(self) -> float:
        """The whole sweep, extrapolated."""
        return self.clean_run + self.cells * self.cell


def timed(
    sweep: Callable[..., Tensor], model: Any, clean: Tensor, corrupt: Tensor, answers: Tensor, *, measure: int = 4,
    **options: Any,
) -> Timing:  # fmt: skip
    """CPU seconds of `sweep(model, ...)`, from runs without cells and `measure` runs of one cell, spread over all.

    One cell is run before, unmeasured: first calls compile and allocate.
    """

    def seconds(cells: Cells) -> tuple[float, Tensor]:
        began = time.process_time()
        table = sweep(model, clean, corrupt, answers, cells=cells, **options)
        return time.process_time() - began, table

    _, table = seconds([(0, 0)])
    shape = (table.shape[0], table.shape[1])
    everything = _all(shape)
    chosen = [everything[(2 * i + 1) * len(everything) // (2 * measure)] for i in range(measure)]
    clean_run = sorted(seconds([])[0] for _ in range(3))[1]
    single = sorted(seconds([cell])[0] for cell in chosen)
    cell = (single[(measure - 1) // 2] + single[measure // 2]) / 2 - clean_run
    return Timing(clean_run, cell, len(everything), measure)
