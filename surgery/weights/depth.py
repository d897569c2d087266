"""What a config says of layers: how many there are, and of which kind each is."""

from __future__ import annotations

from typing import Any

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What families call the number of layers in their configs."""
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
"""What says something of each layer: sliding or full attention, dense or sparse."""


def layers_in_config(config: dict[str, Any], origins: list[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    """The changes to what `config` says of layers, when each is that of another config and number (`origins`)."""

    def text(whole: dict[str, Any]) -> tuple[str, dict[str, Any]]:  # multi-modal models say it in a part of theirs
        inner = whole.get("text_config")
        if isinstance(inner, dict) and not any(k in whole for k in LAYER_COUNTS):
            return "text_config.", inner
        return "", whole

    place, own = text(config)
    wanted: dict[str, Any] = {k: len(origins) for k in LAYER_COUNTS if k in own} or {LAYER_COUNTS[0]: len(origins)}
    for key in LAYER_LISTS:
        lists: list[Any] = [text(each)[1].get(key) for each, _ in origins]
        if isinstance(own.get(key), list) and all(isinstance(kinds, list) and kinds for kinds in lists):
            wanted[key] = [kinds[i % len(kinds)] for kinds, (_, i) in zip(lists, origins, strict=True)]
    return {place + k: v for k, v in wanted.items() if own.get(k) != v}
