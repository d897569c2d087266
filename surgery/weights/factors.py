"""A factor for every tensor: by layer, by part of the name, or along a gradient over the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from surgery.anatomy import layer_of, num_layers
from surgery.errors import SurgeryError

PerLayer = Mapping[int, float] | Sequence[float] | Callable[[int], float]


def tensor_factors(
    names: Sequence[str],
    per_layer: PerLayer | None = None,
    per_module: Mapping[str, float] | None = None,
    gradient: Sequence[float] | None = None,
) -> tuple[dict[str, float], str]:
    """The factor of every tensor, those given multiplied, and a word on them for formulas; see `TaskVector.scaled`."""
    count = num_layers(names)
    factors = dict.fromkeys(names, 1.0)
    notes = []
    if per_layer is not None:
        notes.append("per_layer")
        if isinstance(per_layer, Sequence) and len(per_layer) != count:
            raise SurgeryError(f"per_layer has {len(per_layer)} factors, and the vector has {count} layers.")
        for name in factors:
            if (layer := layer_of(name)) is not None:
                factors[name] *= float(per_layer(layer) if callable(per_layer) else _at(per_layer, layer))
    if per_module is not None:
        notes.append(", ".join(f"{key}: {value:g}" for key, value in per_module.items()))
        for key in per_module:
            if key != "*" and not any(key in name for name in factors):
                raise SurgeryError(f"No tensor has '{key}' in its name.", hint=examples(names))
        for name in factors:
            factors[name] *= next((float(v) for k, v in per_module.items() if k == "*" or k in name), 1.0)
    if gradient is not None:
        notes.append(f"gradient {list(gradient)}")
        for name in factors:
            factors[name] *= _gradient(gradient, layer_of(name), count)
    return factors, "; ".join(notes)


def examples(names: Sequence[str]) -> str:
    """A hint that shows what names look like."""
    return "Names look like " + ", ".join(f"'{n}'" for n in names[:3]) + "."


def _at(table: Mapping[int, float] | Sequence[float], layer: int) -> float:
    """The factor of a layer; 1 where the table says nothing."""
    if isinstance(table, Mapping):
        return table.get(layer, 1.0)
    return table[layer] if layer < len(table) else 1.0


def _gradient(values: Sequence[float], layer: int | None, layers: int) -> float:
    """Piecewise linear through `values` at t = layer / (layers - 1); t = 0 outside layers, 1 in the only layer."""
    if not values:
        raise SurgeryError("A gradient needs at least one value.")
    t = 0.0 if layer is None else 1.0 if layers <= 1 else min(1.0, layer / (layers - 1))
    place = t * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return float(values[low] + (place - low) * (values[high] - values[low]))
