"""Rewards together: called, weighted, added up."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import SimpleNamespace
from typing import Any

from surgery.errors import SurgeryError
from surgery.training.rewards.base import PROVIDED, Completed, Reward, Row
from surgery.training.rewards.call import Call

_NOT_COLUMNS = {"prompt", "completion", "completion_ids"}
"""TRL hands these over under other names, or not at all."""


@dataclass(frozen=True)
class Scored:
    """Rewards of one batch: the weighted `total` and every unweighted component, one value per rollout.

    `extra` are columns that reward functions logged with `log_extra`; `metrics` the scalars of `log_metric`,
    averaged over calls.
    """

    total: list[float | None]
    components: dict[str, list[float | None]]
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def total(components: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]) -> list[float | None]:
    """Weighted sum per row over the components that scored it; None where none did."""
    found: list[float | None] = []
    for values in zip(*components.values(), strict=True):
        scored = [weights[k] * v for k, v in zip(components, values, strict=True) if v is not None]
        found.append(math.fsum(scored) if scored else None)
    return found


def _spread(rows: Sequence[Row], n: int, group: int) -> list[Row]:
    """Rows, one a rollout: as given, or each repeated `group` times."""
    if len(rows) * group == n:
        return [row for row in rows for _ in range(group)]
    if len(rows) != n:
        raise SurgeryError(f"{n} rollouts in groups of {group} don't fit {len(rows)} rows.")
    return list(rows)


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row if name not in _NOT_COLUMNS | PROVIDED)
    return {name: [row.get(name) for row in rows] for name in names}


class Rewards:
    """Named, weighted rewards that score rollouts together: `Rewards({"accuracy": (function, 1.0)})`."""

    def __init__(self, functions: Mapping[str, tuple[Reward, float]]) -> None:
        if not functions:
            raise SurgeryError("No reward is given.", hint="For example `reward: accuracy`.")
        for name, (reward, weight) in functions.items():
            if not callable(reward):
                raise SurgeryError(f"Reward '{name}' is not callable: {type(reward).__name__}.")
            if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
                raise SurgeryError(f"The weight of reward '{name}' must be a finite number, not {weight!r}.")
        self.functions = {name: reward for name, (reward, _) in functions.items()}
        self.weights = {name: float(weight) for name, (_, weight) in functions.items()}
        self._calls = {name: Call(name, reward) for name, reward in self.functions.items()}
        self.needs = {name: call.needs for name, call in self._calls.items()}
        """Columns that each reward can't do without."""

    def check_columns(self, columns: Collection[str]) -> None:
        """Raises `SurgeryError` when the data lack a column that a reward needs."""
        for call in self._calls.values():
            call.check({"prompt", *columns})

    def score(self, rows: Sequence[Row], rollouts: Sequence[Completed], step: int = 0, group: int = 1) -> Scored:
        """Score `rollouts` (groups contiguous) of `rows`, one row a rollout or one a group.

        A rollout may carry `columns` of its own, such as a confidence that its generator measured.
        Raises `SurgeryError` when a function raises, or returns anything but a finite number or None a completion.
        """
        n = len(rollouts)
        if group < 1 or n % group:
            raise SurgeryError(f"{n} rollouts can't be cut into groups of {group}.")
        spread = _spread(rows, n, group)
        if not n:
            return Scored([], {name: [] for name in self.functions})
        prompts = [row["prompt"] for row in spread]
        per_row: dict[str, list[Any]] = {
            "prompts": prompts,
            "completions": [
                r.text if isinstance(p, str) else [{"role": "assistant", "content": r.text}]
                for p, r in zip(prompts, rollouts, strict=True)
            ],
            "completion_ids": [list(r.completion_ids) for r in rollouts],
            "truncated": [bool(r.truncated) for r in rollouts],
            **_columns([{**row, **getattr(r, "columns", {})} for row, r in zip(spread, rollouts, strict=True)]),
        }
        extra: dict[str, list[Any]] = {}
        metrics: dict[str, list[float]] = {}
        shared = {
            "group_size": group,
            "step": step,
            "trainer_state": SimpleNamespace(global_step=step),
            "log_extra": lambda column, values: extra.setdefault(column, []).extend(values),
            "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
        }
        components = self._components({**per_row, **shared})
        means = {name: math.fsum(values) / len(values) for name, values in metrics.items()}
        return Scored(total(components, self.weights), components, extra, means)

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """The weighted total: rewards together are a reward, which another one can wrap."""
        arguments = {"prompts": prompts, "completions": completions, **columns}
        return total(self._components(arguments), self.weights)

    @property
    def whole_batch(self) -> bool:
        """Whether a value depends on other prompts of the batch or on earlier ones (a fit, running quantiles).

        Processes that share a batch must then each score all of it, or what a row earns depends on their number.
        """
        return any(getattr(f, "whole_batch", hasattr(f, "state_dict")) for f in self.functions.values())

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that any of the rewards needs."""
        return tuple(dict.fromkeys(column for needed in self.needs.values() for column in needed))

    def _components(self, arguments: Mapping[str, Any]) -> dict[str, list[float | None]]:
        """Every reward's values; a reward of groups is called once a group."""
        n = len(arguments["completions"])
        per_row = {k for k, v in arguments.items() if isinstance(v, list) and len(v) == n}
        found: dict[str, list[float | None]] = {}
        for name, call in self._calls.items():
            size = arguments.get("group_size", n) if getattr(call.reward, "group", False) else n
            found[name] = []
            for i in range(0, n, size):
                part = {k: v[i : i + size] if k in per_row else v for k, v in arguments.items()}
                found[name] += call(part)
        return found

    def state_dict(self) -> dict[str, Any]:
        """States of the rewards that have one, by name: plain JSON values."""
        return {k: f.state_dict() for k, f in self.functions.items() if hasattr(f, "state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave. Raises `SurgeryError` when the rewards are not the ones that were saved."""
        mine = {k for k, f in self.functions.items() if hasattr(f, "load_state_dict")}
        if mine != set(state):
            raise SurgeryError(f"The saved rewards with a state are {sorted(state)}, the recipe's are {sorted(mine)}.")
        for name, saved in state.items():
            self.functions[name].load_state_dict(saved)  # type: ignore[attr-defined]
