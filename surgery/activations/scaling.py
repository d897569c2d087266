"""The tuned model with what fine-tuning contributes to each block times a factor, in forward passes and generation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from surgery.activations.interventions import detach
from surgery.activations.pairs import Granularity, check_granularity, equal_layers, pair_of, same_attention
from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.anatomy.points import attach, first_tensor
from surgery.errors import SurgeryError
from surgery.models import Pair

Alpha = float | Sequence[float] | Mapping[int, float]
_SCALED: WeakSet[Any] = WeakSet()
"""Models that are scaled at this moment."""


@contextmanager
def scaled(
    pair: Pair | tuple[Any, Any] | Any,
    alpha: Alpha,
    *,
    layers: Sequence[int] | None = None,
    granularity: Granularity = "block",
) -> Iterator[Any]:
    """Inside, the tuned model's stream is x_{l+1} = x_l + PTC_l + alpha * FTC_l (Nuti et al. 2025, definition 5.1).

    A block's output is (1 - alpha) * base block + alpha * tuned block, of the same input: alpha = 1 is the tuned model
    bit for bit, 0 the base's blocks between the tuned model's embeddings and head. `alpha` is one number, one a layer,
    or a mapping of layers; with `layers` only these are scaled. With `granularity="sublayer"` (an extension) attention
    and MLP are mixed one after the other. Gives the tuned model, hooked; anything that runs that model is scaled.

    Generation works as always, on any cache of transformers that keeps keys and values: both models' are kept, of the
    same mixed stream, in one cache (the base's in layers behind the tuned model's), so that beams, cropping and several
    caches at a time need no care. A cache filled outside can't be continued inside.
    Raises `SurgeryError` for models that don't fit together or are in training mode, and for a wrong alpha or layer.
    """
    both = pair_of(pair)
    check_granularity(granularity)
    tuned, base = anatomy_of(both.tuned), anatomy_of(both.base)  # type: ignore[arg-type]
    factors = _factors(alpha, layers, tuned.n_layers)
    for name, model in (("tuned", both.tuned), ("base", both.base)):
        if model.training:
            raise SurgeryError(f"The {name} model is in training mode.", hint="Call its eval() first.")
    if both.tuned in _SCALED:
        raise SurgeryError("This model is scaled already: contexts of `scaled` don't nest.",
                           hint="One factor a layer: alpha=[...].")  # fmt: skip
    wanted = {layer: factor for layer, factor in factors.items() if factor != 1}
    if wanted:
        equal = equal_layers(base, tuned)
        wanted = {layer: factor for layer, factor in wanted.items() if layer not in equal}
    with ExitStack() as stack:
        if wanted:
            _SCALED.add(both.tuned)
            stack.callback(_SCALED.discard, both.tuned)
            stack.enter_context(same_attention(both))
            first = tuned.blocks[0].register_forward_pre_hook(
                _both_caches(tuned.n_layers, set(wanted)), with_kwargs=True
            )
            stack.callback(first.remove)
        for layer, factor in wanted.items():
            halves = granularity == "sublayer" and not tuned.parallel  # parallel sublayers mix as the block does
            hooks = _mixing_halves if halves else _mixing
            stack.callback(detach, hooks(tuned, base, layer, factor))
        yield both.tuned


def _factors(alpha: Alpha, layers: Sequence[int] | None, count: int) -> dict[int, float]:
    """The factor of each layer."""
    every = list(range(count)) if layers is None else list(layers)
    if isinstance(alpha, Mapping):
        found = {layer: alpha[layer] for layer in alpha if layer in every or layers is None}
    elif isinstance(alpha, (int, float)):
        found = dict.fromkeys(every, alpha)
    else:
        numbers = alpha.tolist() if isinstance(alpha, Tensor) else list(alpha)
        numbers = numbers if isinstance(numbers, list) else [numbers] * len(every)
        if len(numbers) != len(every):
            raise SurgeryError(f"There are {len(numbers)} values of alpha and {len(every)} layers.")
        found = dict(zip(every, numbers, strict=True))
    if wrong := [layer for layer in [*every, *found] if not 0 <= layer < count]:
        raise SurgeryError(f"There is no layer {wrong[0]}; layers are 0 to {count - 1}.")
    if infinite := [factor for factor in found.values() if not abs(factor) < float("inf")]:
        raise SurgeryError(f"alpha is a finite number, and not {infinite[0]}.")
    return {layer: float(factor) for layer, factor in found.items()}


def mixed(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) * base + alpha * tuned, in float32 at least, rounded once."""
    if base.dtype in (torch.float32, torch.float64):
        return torch.lerp(base, tuned, alpha)
    return torch.lerp(base.float(), tuned.float(), alpha).to(base.dtype)


# ---- hooks ---------------------------------------------------------------------------------------------------------


def _mixing(tuned: Anatomy, base: Anatomy, layer: int, alpha: float) -> list[Any]:
    other = base.blocks[layer]

    def leave(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        new = mixed(_called(other, args, kwargs, tuned.n_layers), first_tensor(output), alpha)
        return (new, *output[1:]) if isinstance(output, (tuple, list)) else new

    return [tuned.blocks[layer].register_forward_hook(leave, with_kwargs=True)]


def _mixing_halves(tuned: Anatomy, base: Anatomy, layer: int, alpha: float) -> list[Any]:
    """The base's block runs once, when the tuned model's attention is done: from there both go on from the mixture."""
    block, other, site = tuned.blocks[layer], base.blocks[layer], Site("attn_out", layer)
    call: list[Any] = []
    ends: list[Tensor] = []

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
        call[:] = [args, kwargs]

    def attended(mine: Tensor) -> Tensor:
        made: list[Tensor] = []

        def mix(theirs: Tensor) -> Tensor:
            made.append(mixed(theirs, mine, alpha))
            return made[0]

        handles = attach(base, site, mix)
        try:
            ends[:] = [_called(other, call[0], call[1], tuned.n_layers)]
        finally:
            detach(handles)
        return made[0]

    def leave(block: nn.Module, args: Any, output: Any) -> Any:
        new = mixed(ends.pop(), first_tensor(output), alpha)
        return (new, *output[1:]) if isinstance(output, (tuple, list)) else new

    return [
        block.register_forward_pre_hook(enter, with_kwargs=True),
        *attach(tuned, site, attended),
        block.register_forward_hook(leave),
    ]


def _called(block: nn.Module, args: Any, kwargs: Any, offset: int) -> Tensor:
    """The base's block, called as the tuned model's was, with its own part of the cache."""
    cache = _cache_of(args, kwargs)
    if cache is not None:
        own = _Behind(cache, offset)
        args = tuple(own if value is cache else value for value in args)
        kwargs = {name: own if value is cache else value for name, value in kwargs.items()}
    return first_tensor(block(*args, **kwargs))


# ---- two models' keys and values in one cache ----------------------------------------------------------------------


class _Behind:
    """A cache as the base's blocks see it: its layers lie behind those of the tuned model."""

    def __init__(self, cache: Any, offset: int) -> None:
        self._cache, self._offset = cache, offset

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *more: Any, **words: Any) -> tuple[Tensor, Tensor]:
        return self._cache.update(keys, values, layer_idx + self._offset, *more, **words)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._cache.get_seq_length(layer_idx + self._offset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _cache_of(args: Any, kwargs: Any) -> Any:
    """What a block was given that keeps keys and values, by whatever name."""
    return next((v for v in [*kwargs.values(), *args] if hasattr(v, "get_seq_length")), None)


def _both_caches(count: int, wanted: set[int]) -> Any:
    """Before the first block: an empty cache gets layers for the base, a filled one must have them, filled alike."""

    def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
        cache = _cache_of(args, kwargs)
        if cache is None:
            return
        if getattr(cache, "layers", None) is None or getattr(cache, "offloading", False):
            raise SurgeryError(f"A {type(cache).__name__} that is offloaded, or has no layers, can't be shared by two "
                               "models.", hint="Generate with the usual cache.")  # fmt: skip
        if int(cache.get_seq_length()) == 0 and len(cache.layers) <= count:
            _extend(cache, count, wanted)
        lengths = [(cache.get_seq_length(l), cache.get_seq_length(l + count)) for l in wanted]
        if any(int(mine) != int(theirs) for mine, theirs in lengths):
            raise SurgeryError(
                "This cache holds tokens of which the base's keys and values are not known: it was filled outside of "
                "`scaled`, with other layers, or in a pass that was broken off.",
                hint="Start with a new cache, or run the prompt inside of the context.",
            )

    return enter


def _extend(cache: Any, count: int, wanted: set[int]) -> None:
    """Layers of the same kinds for the base; where it needs none, one that stays empty."""
    from transformers.cache_utils import DynamicLayer

    while cache.layer_class_to_replicate is not None and len(cache.layers) < count:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) != count:
        raise SurgeryError(f"The cache has {len(cache.layers)} layers, the model {count}: they can't be told apart.")
    for layer in range(count):
        mine = cache.layers[layer]
        if layer in wanted:
            cache.layers.append(copy.deepcopy(mine))
        else:
            empty: Any = DynamicLayer()
            empty.is_sliding = getattr(mine, "is_sliding", False)  # masks are made by the first layer of each kind
            cache.layers.append(empty)
