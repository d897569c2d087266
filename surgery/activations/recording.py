"""A forward pass recorded so that it can be taken up again at any layer and from any position on.

What is kept of a pass over (batch, pos) prompts: the stream before every block, what every block was called with, keys
and values of all tokens, and what attention adds. A causal model computes the rest anew only where a change reaches:
nothing below the layer, nothing left of the position. `surgery.activations.resume` does that.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.activations.interventions import Captured, capture, unwrapped
from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.anatomy.points import arguments, first_tensor
from surgery.errors import SurgeryError
from surgery.models import Batch, as_batch, cache_name, untouched

WHOLE = "Sweep with reuse=False: one whole forward a cell."
_CACHE = object()
"""Marks the cache among what a block was called with."""


@dataclass
class Recording:
    """One pass over `batch`. Lists have an entry a layer; tensors are (batch, pos, d_model) if nothing else is said."""

    model: Any
    anatomy: Anatomy
    batch: Batch
    stream: list[Tensor] = field(default_factory=list)
    """What enters each block, and at the end what leaves the last: L + 1 entries."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """What else each block was called with, by the names of its parameters."""
    keys: list[Tensor] = field(default_factory=list)
    """(batch, kv_head, pos, d_head) as they enter the scores: rotated."""
    values: list[Tensor] = field(default_factory=list)
    attn_out: list[Tensor] = field(default_factory=list)
    offset: list[Tensor | None] = field(default_factory=list)
    """What the attention module returns beyond attn_out: the stream itself in families that add it there."""
    returns: int = 2
    """How many things the attention module returns."""
    final: Tensor | None = None
    """Output of the last norm."""
    seen: Captured = field(default_factory=lambda: Captured([]))
    """Further sites that were asked for."""

    @property
    def last(self) -> Tensor:
        """(batch,) the column of each row's last real token: where the answer is read."""
        return self.batch.last

    def logits(self) -> Tensor:
        """(batch, pos, vocab) of the whole pass."""
        assert self.final is not None
        return self.anatomy.logits(self.final)


class _Cache:
    """Stands in for a cache in a block that is called by itself: `update` says what attention attends to."""

    def __init__(self, update: Any) -> None:
        self._update = update

    def update(self, keys: Tensor, values: Tensor, layer: int, *more: Any, **words: Any) -> tuple[Tensor, Tensor]:
        return self._update(keys, values)

    def get_seq_length(self, *layer: Any) -> int:
        return 0


def record(
    model: Any, prompts: Batch | Any, sites: Iterable[str | Site] | str = (), *, tokenizer: Any = None
) -> Recording:
    """Records one pass over prompts, padded on the right if at all; `sites` are kept in `seen` besides.

    Raises `SurgeryError` for left padding, and for models whose attention keeps no keys and values.
    """
    from transformers import DynamicCache

    model = unwrapped(model)
    batch = as_batch(prompts, tokenizer).to(model.device)
    if batch.padded and bool((batch.first != 0).any()):
        raise SurgeryError("Prompts padded on the left can't be taken up from a position on.",
                           hint="Pad on the right: encode(tokenizer, prompts, side='right').")  # fmt: skip
    anatomy = anatomy_of(model)
    found = Recording(model, anatomy, batch)
    name = cache_name(model)
    if name is None:
        raise SurgeryError(f"{type(model).__name__} takes no cache: its passes can't be resumed.", hint=WHOLE)
    cache = DynamicCache()  # without a config every layer keeps all tokens: masks, not caches, make windows
    raw: list[Tensor] = []

    def enter(block: Any, args: Any, kwargs: Any) -> None:
        call = arguments(block, args, kwargs)
        found.stream.append(call.pop(next(iter(call))))
        found.calls.append({n: _CACHE if v is cache else v for n, v in call.items()})

    def attended(module: Any, args: Any, output: Any) -> None:
        found.returns = len(output) if isinstance(output, (tuple, list)) else 1
        raw.append(first_tensor(output))

    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        found.seen = stack.enter_context(capture(model, sites))
        own = stack.enter_context(capture(model, ["attn_out", "final"]))
        for layer, block in enumerate(anatomy.blocks):
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(anatomy.attention(layer).register_forward_hook(attended).remove)
        ends = stack.enter_context(capture(model, [Site("resid_post", anatomy.n_layers - 1)], clone=False))
        model(**batch.inputs(model), **{name: cache}, use_cache=True, logits_to_keep=1)
    if len(cache.layers) != anatomy.n_layers or not any(_CACHE in c.values() for c in found.calls):
        kind = type(model).__name__
        raise SurgeryError(f"{kind} keeps no keys and values of every layer: its passes can't be resumed.", hint=WHOLE)
    found.stream.append(ends[Site("resid_post", anatomy.n_layers - 1)])
    kept: list[Any] = list(cache.layers)
    found.keys, found.values = [layer.keys for layer in kept], [layer.values for layer in kept]
    found.attn_out = [own[Site("attn_out", layer)] for layer in range(anatomy.n_layers)]
    found.final = own["final"]
    for layer, returned in enumerate(raw):
        plain = anatomy.family.attention_norm is not None or torch.equal(returned, found.attn_out[layer])
        found.offset.append(None if plain else returned - found.attn_out[layer])
    return found
