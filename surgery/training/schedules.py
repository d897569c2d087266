"""Schedules: pure functions from the step to a value. Any number of an objective or of the optimizer may be one.

| name | value at step s of S | keys |
|---|---|---|
| constant | value | value |
| linear | from `start` to `end` over the first `over` of the run, then `end` | start, end, over |
| cosine | the same along half a cosine | start, end, over |
| steps | the value of the last boundary passed | values: {step: value} |

In a recipe: `mask_rate: {linear: {start: 0, end: 0.4, over: 0.66}}`. The learning rate's are in `learning_rate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import SurgeryError
from surgery.registry import Registry

SCHEDULES: Registry[Callable[..., Schedule]] = Registry("schedule")


@dataclass(frozen=True)
class Schedule:
    """A value that depends on the step; `steps` (of the whole run) is filled in by the engine."""

    def at(self, step: int, steps: int) -> float:
        """The value in `step` (from 0) of a run of `steps`."""
        raise NotImplementedError


Number = float | Schedule
"""A parameter that may be a schedule."""


def value(number: Number, step: int, steps: int) -> float:
    """The parameter's value at a step."""
    return number.at(step, steps) if isinstance(number, Schedule) else float(number)


@SCHEDULES.register("constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """The same value always."""

    value: float = 1.0

    def at(self, step: int, steps: int) -> float:
        """`value`."""
        return self.value


@SCHEDULES.register("linear")
@dataclass(frozen=True)
class Linear(Schedule):
    """From `start` to `end` along a line over the first `over` of the run."""

    start: float = 0.0
    end: float = 1.0
    over: float = 1.0

    def at(self, step: int, steps: int) -> float:
        """Linear in the step until `over * steps`."""
        return self.start + (self.end - self.start) * _share(step, steps, self.over)


@SCHEDULES.register("cosine")
@dataclass(frozen=True)
class Cosine(Schedule):
    """From `start` to `end` along half a cosine over the first `over` of the run."""

    start: float = 1.0
    end: float = 0.0
    over: float = 1.0

    def at(self, step: int, steps: int) -> float:
        """Slow at both ends."""
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * _share(step, steps, self.over)))


@SCHEDULES.register("steps")
@dataclass(frozen=True)
class Steps(Schedule):
    """The value of the last boundary passed: `values: {0: 1.0, 100: 0.5}`."""

    values: Mapping[int, float] = field(default_factory=lambda: {0: 1.0})

    def at(self, step: int, steps: int) -> float:
        """Piecewise constant."""
        passed = [int(at) for at in self.values if int(at) <= step]
        return float(self.values[max(passed)]) if passed else 0.0


def _share(step: int, steps: int, over: float) -> float:
    return min(1.0, step / max(1.0, over * steps))


def parse(written: Any) -> Number:
    """A number, or a schedule as a recipe writes it: `{linear: {start: 0, end: 1}}`."""
    if isinstance(written, Mapping):
        if len(written) != 1:
            raise SurgeryError(
                f"A schedule has one name, found {sorted(written)}.", hint="{linear: {start: 0, end: 1}}"
            )
        ((name, keys),) = written.items()
        try:
            return SCHEDULES.lookup(name)(**(keys or {}))
        except TypeError as error:
            raise SurgeryError(f"Schedule '{name}': {error}.") from None
    return written


def learning_rate(step: int, steps: int, *, shape: str = "cosine", warmup: float = 0.0, final: float = 0.0) -> float:
    """The factor of the peak learning rate in `step` (from 0): linear warm-up, then constant, linear or cosine decay.

    `warmup` below 1 is a share of the run, else a number of steps; the decay ends at `final` of the peak.
    """
    ahead = warmup * steps if warmup < 1 else warmup
    rise = min(1.0, (step + 1) / ahead) if ahead > 0 else 1.0
    passed = min(1.0, max(0.0, step - ahead) / max(1.0, steps - ahead))
    shapes = {"constant": 1.0, "linear": 1 - passed, "cosine": 0.5 * (1 + math.cos(math.pi * passed))}
    if shape not in shapes:
        raise SurgeryError(f"Unknown learning rate shape '{shape}': expected one of {', '.join(shapes)}.")
    return rise * (shapes[shape] if shape == "constant" else final + (1 - final) * shapes[shape])
