"""What a method asks of a recipe: its parameters, its base, how many models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from surgery.weights.recipe.field import Field

Leaf = float | int | bool | str

# closed ranges by our parameter words; a word that is not here may be any number
RANGES: dict[str, tuple[float, float]] = {
    "density": (0, 1),
    "top": (0, 1),
    "bottom": (0, 1),
    "topk": (0, 1),
    "epsilon": (0, float("inf")),
    "max_iter": (1, 100_000),
    "tol": (0, float("inf")),
}


@dataclass(frozen=True)
class Parameter:
    """One entry of a method's schema, as a recipe needs it: `name` is our word, `type` float, int, bool or str.

    `convert` turns a foreign dialect's value into ours; `name` None means accepted, but without effect.
    """

    name: str | None
    type: type
    required: bool = False
    default: Any = None
    per_input: bool = False
    choices: tuple[str, ...] = ()
    convert: Callable[[Any], Any] | None = None
    optional: bool = False  # may be null

    def leaf(self, field: Field) -> Leaf:
        """The checked scalar at `field`."""
        value: Leaf
        if self.type is bool:
            value = field.truth()
        elif self.type is int:
            value = field.integer()
        elif self.type is float:
            value = field.number()
        else:
            value = field.text(self.choices or None)
        low, high = RANGES.get(self.name or "", (float("-inf"), float("inf")))
        if self.type in (int, float) and not low <= float(value) <= high:
            room = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
            raise field.error(f"is {value:g}; it must be {room}")
        return self.convert(value) if self.convert else value


@dataclass(frozen=True)
class Contract:
    """What the method registered as `method` asks for: its base, how many other models (fewest, most), its parameters.

    `parameters` are keyed by the dialect's words. `fixed` holds arguments that make ours equal the dialect's method.
    """

    method: str
    base: Literal["required", "optional", "ignored"]
    inputs: tuple[int, int | None]
    parameters: dict[str, Parameter]
    fixed: dict[str, Any] = field(default_factory=dict)
