"""How one parameter varies over a model: a constant, a gradient over layers, or a choice by tensor name."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.weights.recipe.contract import Leaf, Parameter
from surgery.weights.recipe.field import Field


@dataclass(frozen=True)
class Case:
    """`points` for the tensors whose name contains `filter` (None: for all): one is a constant, more a gradient."""

    filter: str | None
    points: tuple[Leaf, ...]

    def matches(self, tensor: str) -> bool:
        """Whether this case speaks for the tensor of that name."""
        return self.filter is None or self.filter in tensor

    def at(self, t: float) -> Leaf:
        """The value at t in [0, 1]: numbers are interpolated piecewise linearly, other things are steps."""
        place = t * (len(self.points) - 1)
        i = int(place)
        first = self.points[i]
        if isinstance(first, bool | str) or i + 1 >= len(self.points):
            return first
        fraction = place - i
        value = (1 - fraction) * first + fraction * self.points[i + 1]  # type: ignore[operator]
        return round(value) if all(isinstance(p, int) for p in self.points) else value


@dataclass(frozen=True)
class Value:
    """A parameter as a recipe gives it: the first case that matches the tensor's name counts."""

    cases: tuple[Case, ...]

    @classmethod
    def constant(cls, value: Leaf) -> Value:
        """The same value for every tensor."""
        return cls((Case(None, (value,)),))

    def at(self, tensor: str, t: float = 0.0) -> Leaf | None:
        """The value for a tensor at relative depth `t` (layer / (layers - 1) in its slice); None if no filter fits."""
        for case in self.cases:
            if case.matches(tensor):
                return case.at(t)
        return None

    @property
    def filters(self) -> tuple[str, ...]:
        """The name parts that this value distinguishes."""
        return tuple(c.filter for c in self.cases if c.filter is not None)


def parse_value(field: Field, parameter: Parameter) -> Value:
    """A number, a gradient [a, b, ...], a {filter, value}, or a list of those. Raises `SurgeryError`."""
    if isinstance(field.value, dict):
        return Value((_case(field, parameter),))
    if not isinstance(field.value, list):
        return Value((Case(None, (parameter.leaf(field),)),))
    members = field.items()
    if any(isinstance(m.value, dict) for m in members):
        return Value(tuple(_case(m, parameter) for m in members))
    return Value((Case(None, _points(members, parameter)),))


def _case(field: Field, parameter: Parameter) -> Case:
    field.mapping(("filter", "value"))
    if "value" not in field.value:
        raise field.error("has no 'value'")
    value = field["value"]
    members = value.items() if isinstance(value.value, list) else [value]
    pattern = field.get("filter")
    text = None if pattern is None else pattern.text()
    return Case(None if text == "*" else text, _points(members, parameter))


def _points(members: list[Field], parameter: Parameter) -> tuple[Leaf, ...]:
    points = []
    for member in members:
        if isinstance(member.value, dict | list):
            raise member.error("must be a single value: filters and gradients do not nest deeper")
        points.append(parameter.leaf(member))
    return tuple(points)
