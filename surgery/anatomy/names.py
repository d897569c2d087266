"""Where things are in a transformer, read from tensor names alone: no table of architectures, any family.

A numbered list of layers is a *stack*, called by what stands before the number (`model.layers`, `encoder.block`,
`vision_tower.encoder.layers`); what a tensor does is its *kind*, and kinds fall into a few *groups*:

| group     | kinds                                                                            |
|-----------|----------------------------------------------------------------------------------|
| attention | q, k, v, o; qkv where several of q, k and v are one tensor                       |
| mlp       | gate, up, down; gate_up where both are one tensor; the experts of mixtures too   |
| router    | router (which expert, or whether the shared one)                                 |
| norm      | norm                                                                             |
| embedding | embedding (tokens, positions, patches)                                           |
| head      | head (language model head, classifiers)                                          |
| other     | other: whatever is none of these (state space mixers, poolers, buffers, ...)     |
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from surgery.errors import SurgeryError

GROUPS = {
    "q": "attention", "k": "attention", "v": "attention", "qkv": "attention", "o": "attention",
    "gate": "mlp", "up": "mlp", "gate_up": "mlp", "down": "mlp",
    "router": "router", "norm": "norm", "embedding": "embedding", "head": "head", "other": "other",
}  # fmt: skip
"""The group of every kind."""
KINDS = tuple(GROUPS)

# The first number after one of these words: an expert or the sub-layer of a T5 block comes later in the name.
_LAYER = re.compile(r"(?:^|\.)(?:\w+_)?(?:layers?|h|(?:res)?blocks?|layer_groups)\.([0-9]{1,9})(?=\.|$)")
_TOWER = re.compile(r"vision|visual|vit|image|audio|speech|encoder|mtp", re.I)
_PARAMETER = re.compile(r"\.(weight|bias|gamma|beta|weight_g|weight_v)$")

# Kinds by the end of the module's path in lower case; the first rule that fits wins.
_ANYWHERE = [
    ("norm", r"\w*(norm|layrnorm)\w*|ln(_\w+|\d*)"),
    ("other", r"inv_freq|\w*rotary\w*|relative_attention_bias"),
    ("router", r"\w*router\w*(\.\w+)?|gate(\.(wg|e_score_correction_bias))?|\w*expert_gate"),
    ("head", r"embed_out|lm_head(\.\w+)*"),
    ("embedding", r"\w*(embed(?!ded)|tok_emb|pos_emb)\w*(\.\w+)*|wte|wpe|shared|cls_token|position_ids"),
]
_ATTENTION = [
    ("qkv", r"\w*(qkv|query_key_value|c_attn)\w*|in_proj\w*|\w*kv_(a|b)_proj\w*|kv_proj"),
    ("q", r"w?q|q_proj|q_lin|query\w*|to_q|q_[ab]_proj"),
    ("k", r"w?k|k_proj|k_lin|key\w*|to_k"),
    ("v", r"w?v|v_proj|v_lin|value\w*|to_v"),
    ("o", r"w?o|o_proj|out_proj|out_lin|output|dense|c_proj|proj|to_out(\.0)?"),
]
_MLP = [
    ("gate_up", r"gate_(and_)?up\w*|mlp\.wi"),
    ("gate", r"gate_proj\w*|w1|wi_0"),
    ("up", r"up_proj\w*|w3|wi|wi_1|c_fc|fc_?1|fc_in|lin(ear)?_?1|dense_h_to_4h|intermediate\.dense|ffn"),
    ("down", r"down_proj\w*|w2|wo|c_proj|fc_?2|fc_out|lin(ear)?_?2|dense_4h_to_h|output\.dense|ffn_output"),
]
_OUTSIDE = [("head", r"(score|scores|output|qa_outputs|fc|heads?|\w+_head|classifier|cls)(\.\w+)*")]


def _compile(rules: list[tuple[str, str]]) -> list[tuple[str, re.Pattern[str]]]:
    return [(kind, re.compile(rf"(?:^|\.)(?:{pattern})$")) for kind, pattern in rules]


_ANYWHERE_RULES, _ATTENTION_RULES, _MLP_RULES, _OUTSIDE_RULES = map(_compile, (_ANYWHERE, _ATTENTION, _MLP, _OUTSIDE))


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to, counted within its stack; None outside layers.

    `model.layers.3.self_attn.q_proj.weight` -> 3, `encoder.block.2.layer.0.SelfAttention.q.weight` -> 2.
    """
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def stack_of(name: str) -> str | None:
    """The stack a tensor belongs to: `model.layers` of `model.layers.3.mlp.up_proj.weight`; None outside layers."""
    match = _LAYER.search(name)
    return name[: match.start(1) - 1] if match else None


def with_layer(name: str, layer: int) -> str:
    """`name` in another layer: `h.3.attn.c_attn.weight`, 7 -> `h.7.attn.c_attn.weight`.

    Raises `SurgeryError` when the tensor is in no layer.
    """
    match = _LAYER.search(name)
    if match is None:
        raise SurgeryError(f"Tensor '{name}' is in no layer, so it can't be moved to layer {layer}.")
    return f"{name[: match.start(1)]}{layer}{name[match.end(1) :]}"


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Every stack and its number of layers (the highest number plus one), in order of first appearance."""
    found: dict[str, int] = {}
    for name in names:
        match = _LAYER.search(name)
        if match:
            stack = name[: match.start(1) - 1]
            found[stack] = max(found.get(stack, 0), int(match[1]) + 1)
    return found


def main_stack(names: Iterable[str]) -> str | None:
    """The stack that makes the text: the longest that is no vision, audio or encoder tower; None without layers."""
    found = stacks(names)
    return max(found, key=lambda stack: (not _TOWER.search(stack), found[stack]), default=None)


def num_layers(names: Iterable[str]) -> int:
    """Layers of the main stack; 0 without layers."""
    found = stacks(names)
    main = main_stack(f"{stack}.{count - 1}" for stack, count in found.items())
    return found[main] if main is not None else 0


@lru_cache(maxsize=1 << 16)
def kind_of(name: str) -> str:
    """What a tensor does, one of `KINDS`: `model.layers.3.self_attn.q_proj.weight` -> "q"."""
    path = _PARAMETER.sub("", name).lower()
    inside = _LAYER.search(name) is not None
    rules = list(_ANYWHERE_RULES)
    if inside or "attn" in path or "attention" in path:
        rules += _ATTENTION_RULES if "attn" in path or "attention" in path else _MLP_RULES
    if not inside:
        rules += _OUTSIDE_RULES
    return next((kind for kind, pattern in rules if pattern.search(path)), "other")


def group_of(name: str) -> str:
    """The group of a tensor's kind: attention, mlp, router, norm, embedding, head or other."""
    return GROUPS[kind_of(name)]


def input_embedding(names: Iterable[str]) -> str | None:
    """The name of the token embedding, None when there is none."""
    pattern = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|shared|tok_embeddings)\.weight$")
    return min((n for n in names if pattern.search(n)), key=lambda n: (bool(_TOWER.search(n)), len(n)), default=None)


def output_head(names: Iterable[str]) -> str | None:
    """The name of the language model head, None when there is none (it may be tied to the embedding)."""
    pattern = re.compile(r"(^|\.)(lm_head|embed_out|cls\.predictions\.decoder)\.weight$|^output\.weight$")
    return min((n for n in names if pattern.search(n)), key=len, default=None)
