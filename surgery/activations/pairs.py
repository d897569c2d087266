"""Two models whose blocks can stand in for each other: what decomposing, scaling and patching across them need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn

from surgery.activations.interventions import unwrapped
from surgery.anatomy import Anatomy, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Pair

Granularity = Literal["block", "sublayer"]
_CALLED_WITH = ("rope_parameters", "sliding_window", "layer_types", "alibi")
"""Settings by which a model makes what its blocks are called with: positions and masks."""


def pair_of(pair: Pair | tuple[Any, Any] | Any, tokenizer: Any = None) -> Pair:
    """A `Pair`, (base, tuned), or a PEFT model alone, which is a pair with its own base, as plain models.

    (base, tuned) where PEFT has put the adapter into the base itself is understood too. Raises `SurgeryError` when the
    blocks of one can't stand in for the other's: another architecture, dtype, device, rotation or window.
    """
    from surgery.interop import has_adapters, without_adapters

    first, second, others = pair, pair, None
    if isinstance(pair, Pair):
        first, second, tokenizer, others = pair.base, pair.tuned, tokenizer or pair.tokenizer, pair.tuned_tokenizer
    elif isinstance(pair, tuple) and len(pair) == 2:
        first, second = pair
    elif not has_adapters(pair):
        raise SurgeryError(
            f"A pair of models is needed, and this is one {type(pair).__name__}.",
            hint="Give (base, tuned), Pair.load(base, tuned), or a PEFT model with its adapter.",
        )
    base, tuned = unwrapped(first), unwrapped(second)
    if base is tuned and has_adapters(second):
        base = without_adapters(second)
    both = Pair(base, tuned, tokenizer, others)
    _check(base, tuned)
    return both


def _check(base: Any, tuned: Any) -> None:
    one, other = anatomy_of(base), anatomy_of(tuned)
    first, second = type(one.blocks[0]), type(other.blocks[0])
    if first.__name__ != second.__name__:
        raise SurgeryError(f"The base has blocks of {first.__name__}, the tuned model of {second.__name__}: "
                           "pairs need the same architecture.")  # fmt: skip
    mine, theirs = base.config.get_text_config(), tuned.config.get_text_config()
    for name in _CALLED_WITH:
        if getattr(mine, name, None) != getattr(theirs, name, None):
            raise SurgeryError(f"The base has {name} {getattr(mine, name, None)}, the tuned model "
                               f"{getattr(theirs, name, None)}: their blocks read positions differently.")  # fmt: skip
    for what in ("dtype", "device"):
        here, there = (getattr(next(a.blocks[0].parameters()), what) for a in (one, other))
        if here != there:
            raise SurgeryError(f"The base is in {what} {here}, the tuned model in {there}.",
                               hint=f"Load both alike: Pair.load(base, tuned, {what}=...).")  # fmt: skip


def check_granularity(granularity: str) -> None:
    """Raises `SurgeryError` for what is no granularity."""
    if granularity not in get_args(Granularity):
        raise SurgeryError(f"granularity={granularity!r}: expected 'block' or 'sublayer'.")


def equal_layers(base: Anatomy, tuned: Anatomy) -> set[int]:
    """Layers whose weights and buffers are equal byte by byte: fine-tuning contributes nothing there."""
    return {l for l in range(tuned.n_layers) if _equal(base.blocks[l], tuned.blocks[l])}


def _equal(one: nn.Module, other: nn.Module) -> bool:
    if one is other:
        return True
    tensors, others = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (one, other))
    if tensors.keys() != others.keys():
        return False
    pairs = [(t, others[name]) for name, t in tensors.items()]
    if any(a.shape != b.shape or a.dtype != b.dtype or a.device != b.device for a, b in pairs):
        return False
    pairs = [(a, b) for a, b in pairs if a.data_ptr() != b.data_ptr() or a.stride() != b.stride()]
    # A few numbers of every tensor tell different layers apart at no cost; only equal ones are read whole.
    samples = all(torch.equal(a.flatten()[:64], b.flatten()[:64]) for a, b in pairs)
    return samples and all(torch.equal(a, b) for a, b in pairs)


@contextmanager
def same_attention(pair: Pair) -> Iterator[None]:
    """The base attends by the tuned model's implementation meanwhile: masks are made for one implementation."""
    base: Any = pair.base
    tuned: Any = pair.tuned
    before, wanted = base.config._attn_implementation, tuned.config._attn_implementation
    if before == wanted:
        yield
        return
    base.set_attn_implementation(wanted)
    try:
        yield
    finally:
        base.set_attn_implementation(before)
