"""Places in a recipe, and the ranges of their values: what a search may change."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.errors import SurgeryError
from surgery.registry import nearest

Recipe = dict[str, Any]
Space = Mapping[str, tuple | list]
"""(low, high), (low, high, "log") or (low, high, step) for a number, whole where both ends are; a list of choices."""


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A copy of `recipe` with `values` at their places, `{"models[0].parameters.weight": 0.7}`."""
    changed = copy.deepcopy(recipe)
    for place, value in values.items():
        *parents, last = _steps(place)
        node: Any = changed
        for step in parents:
            node = node[step]
        node[last] = value
    return changed


def places(recipe: Any, at: str = "") -> Iterator[str]:
    """Every place of a recipe that holds a value: `merge_method`, `models[0].parameters.weight`, ..."""
    if isinstance(recipe, dict):
        for key, value in recipe.items():
            yield from places(value, f"{at}.{key}" if at else str(key))
    elif isinstance(recipe, list):
        for i, value in enumerate(recipe):
            yield from places(value, f"{at}[{i}]")
    else:
        yield at


def _steps(place: str) -> list[str | int]:
    """`models[0].parameters.weight` -> ["models", 0, "parameters", "weight"]."""
    return [int(index) if index else key for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", place)]


def value_at(recipe: Recipe, place: str) -> Any:
    """What stands at a dotted place of a recipe, e.g. "models[0].parameters.weight"."""
    node: Any = recipe
    for step in _steps(place):
        node = node[step]
    return node


def check_space(recipe: Recipe, space: Space) -> None:
    """Raises `SurgeryError` for places that the recipe has no value at and for ranges that are none."""
    if not space:
        raise SurgeryError("The space is empty: name at least one place of the recipe.")
    valid = list(places(recipe))
    for place, values in space.items():
        if place not in valid:
            raise SurgeryError(f"The recipe has no value at '{place}'.", hint=nearest(place, valid))
        ranged = isinstance(values, tuple) and len(values) in (2, 3) and all(map(_is_number, values[:2]))
        if not ranged and not (isinstance(values, list) and values):
            raise SurgeryError(
                f"'{place}' can't be searched over {values!r}.",
                hint="A range is (low, high), (low, high, 'log') or (low, high, step); choices are a list.",
            )
        if ranged:
            low, high, *how = values
            if not low < high:
                raise SurgeryError(f"'{place}': low must be below high, not {low} and {high}.")
            if how == ["log"] and not low > 0:
                raise SurgeryError(f"'{place}': a log range starts above 0, not at {low}.")
            if how and how != ["log"] and not (_is_number(how[0]) and how[0] > 0):
                raise SurgeryError(f"'{place}': the third value is 'log' or a step above 0, not {how[0]!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(values: tuple) -> bool:
    return all(isinstance(v, int) for v in values if v != "log")


def inside(value: Any, values: tuple | list) -> bool:
    """Whether the space holds the recipe's own value."""
    if isinstance(values, list):
        return value in values
    low, high, *how = values
    on_grid = not how or how == ["log"] or math.isclose((value - low) / how[0] % 1, 0, abs_tol=1e-9)
    return _is_number(value) and low <= value <= high and on_grid and (isinstance(value, int) or not _is_whole(values))


def distribution(place: str, values: tuple | list, optuna: Any) -> Any:
    """optuna's form of a range (low, high[, ...]) or of a list of choices."""
    if isinstance(values, list):
        return optuna.distributions.CategoricalDistribution(values)
    low, high, *how = values
    log = how == ["log"]
    step = how[0] if how and not log else None
    if _is_whole(values):
        return optuna.distributions.IntDistribution(low, high, log=log, step=step or 1)
    return optuna.distributions.FloatDistribution(low, high, log=log, step=step)
