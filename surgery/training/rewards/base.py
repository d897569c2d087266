"""What a reward is, how one is called, and what happens when it answers nonsense.

A reward is any callable `reward(prompts, completions, **columns) -> list[float | None]`: one value per completion,
in order; None means "I do not score this row". Prompts and completions are strings, or lists of chat messages when
the row's prompt is one. The keyword arguments are those of TRL (`completion_ids`, `trainer_state`, `log_extra`,
`log_metric`, every data column as a list) and `step`, `truncated`; a function gets those its signature names, or all
of them when it takes `**kwargs`. A callable with the attribute `group = True` sees one group at a time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import SimpleNamespace
from typing import Any, Protocol

from surgery.errors import SurgeryError
from surgery.registry import Registry

Reward = Callable[..., list[float | None]]
Row = Mapping[str, Any]

REWARDS: Registry[Callable[..., Reward]] = Registry("reward")
"""Factories by name: keyword parameters with defaults in, a reward out."""

_PROVIDED = {
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "step",
    "truncated",
}
_NOT_COLUMNS = {"prompt", "completion", "completion_ids"}
"""TRL hands these over under other names, or not at all."""


class Completed(Protocol):
    """What a reward needs of a rollout."""

    @property
    def text(self) -> str:
        """The completion, special tokens skipped."""
        ...

    @property
    def completion_ids(self) -> list[int]:
        """Token ids of the completion, the EOS included."""
        ...

    @property
    def truncated(self) -> bool:
        """Whether no EOS came within the limit."""
        ...


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


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or the content of the last message of a chat."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def rows_of(prompts: Sequence[Any], columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The data rows back from a reward's arguments: each with its prompt and the columns that hold a value a row."""
    n = len(prompts)
    lists = {k: v for k, v in columns.items() if isinstance(v, list | tuple) and len(v) == n}
    return [{"prompt": prompts[i], **{k: v[i] for k, v in lists.items()}} for i in range(n)]


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
    names = dict.fromkeys(name for row in rows for name in row if name not in _NOT_COLUMNS | _PROVIDED)
    return {name: [row.get(name) for row in rows] for name in names}


def _shown(prompt: Any, completion: Any) -> str:
    prompt, completion = text_of(prompt), text_of(completion)
    return f"prompt {prompt[-60:]!r}, completion {completion[:120]!r}"


@dataclass(frozen=True)
class Call:
    """One reward function under its name, with the arguments it takes."""

    name: str
    reward: Reward

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the function, by name. Raises `SurgeryError` when it can't be called with keywords alone."""
        found = inspect.signature(self.reward).parameters
        if bad := [p.name for p in found.values() if p.kind is p.POSITIONAL_ONLY]:
            raise SurgeryError(f"Reward '{self.name}' takes '{bad[0]}' by position only: arguments come by keyword.")
        return found

    @property
    def needs(self) -> tuple[str, ...]:
        """Columns that the rows must have: declared as `columns`, or parameters without a default."""
        declared = getattr(self.reward, "columns", None)
        if declared is not None:
            return tuple(declared)
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        required = [p.name for p in self.parameters.values() if p.default is p.empty and p.kind not in kinds]
        return tuple(name for name in required if name not in _PROVIDED)

    def check(self, columns: Collection[str]) -> None:
        """Raises `SurgeryError` when a column that the function needs is not among `columns`."""
        if missing := [name for name in self.needs if name not in columns]:
            raise SurgeryError(
                f"Reward '{self.name}' needs the column '{missing[0]}'; the rows have {', '.join(sorted(columns))}.",
                hint="Add the column to the data, or name another one in the reward's parameters.",
            )

    def __call__(self, arguments: Mapping[str, Any]) -> list[float | None]:
        """One checked value per completion. Raises `SurgeryError` naming the function and the row."""
        self.check({"prompt", *(k for k in arguments if k not in _PROVIDED)})
        taken = self.parameters
        everything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        chosen = {k: v for k, v in arguments.items() if everything or k in taken}
        try:
            values = self.reward(**chosen)
        except Exception as error:
            raise self._raised(chosen, arguments, error) from error
        return self._checked(values, arguments)

    def _raised(self, chosen: Mapping[str, Any], arguments: Mapping[str, Any], error: Exception) -> SurgeryError:
        """The error with the first row on which the function fails alone, or else the first row of the batch."""
        prompts, completions = arguments["prompts"], arguments["completions"]
        per_row = {k for k, v in chosen.items() if isinstance(v, list) and len(v) == len(prompts)}
        culprit = None
        for i in range(len(prompts)):
            try:
                self.reward(**{k: [v[i]] if k in per_row else v for k, v in chosen.items()})
            except Exception as again:
                if type(again) is type(error):
                    culprit = i
                    break
        where = f"row {culprit}" if culprit is not None else f"a batch of {len(prompts)}, whose first row is"
        row = _shown(prompts[culprit or 0], completions[culprit or 0])
        what = error.problem if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
        hint = error.hint if isinstance(error, SurgeryError) else "`--debug` shows where in the function."
        return SurgeryError(f"Reward '{self.name}' failed on {where} ({row}): {what}", hint=hint)

    def _checked(self, values: Any, arguments: Mapping[str, Any]) -> list[float | None]:
        prompts, completions = arguments["prompts"], arguments["completions"]
        if inspect.isawaitable(values):
            if inspect.iscoroutine(values):
                values.close()
            raise SurgeryError(f"Reward '{self.name}' is asynchronous: return the list of values itself.")
        if hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, list | tuple):
            raise SurgeryError(
                f"Reward '{self.name}' returned {type(values).__name__} ({str(values)[:60]!r}) for {len(completions)} "
                f"completions, the first with {_shown(prompts[0], completions[0])}: expected a list.",
                hint="Return one number, or None, per completion.",
            )
        if len(values) != len(completions):
            last = min(len(values), len(completions) - 1)
            raise SurgeryError(
                f"Reward '{self.name}' returned {len(values)} values for {len(completions)} completions (row {last}: "
                f"{_shown(prompts[last], completions[last])}).",
                hint="Return one number, or None, per completion, in the same order.",
            )
        return [self._number(v, i, prompts[i], completions[i]) for i, v in enumerate(values)]

    def _number(self, value: Any, i: int, prompt: Any, completion: Any) -> float | None:
        if value is None:
            return None
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, Real) and math.isfinite(value):
            return float(value)
        said = str(value) if isinstance(value, Real) else f"{type(value).__name__} {str(value)[:60]!r}"
        raise SurgeryError(
            f"Reward '{self.name}' returned {said} for row {i} ({_shown(prompt, completion)}): "
            "expected a finite number or None.",
            hint="None says that a row is not scored.",
        )


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
            **_columns(spread),
        }
        extra: dict[str, list[Any]] = {}
        metrics: dict[str, list[float]] = {}
        shared = {
            "step": step,
            "trainer_state": SimpleNamespace(global_step=step),
            "log_extra": lambda column, values: extra.setdefault(column, []).extend(values),
            "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
        }
        components = {}
        for name, call in self._calls.items():
            size = group if getattr(call.reward, "group", False) else n
            parts = ({k: v[i : i + size] for k, v in per_row.items()} for i in range(0, n, size))
            components[name] = [value for part in parts for value in call({**part, **shared})]
        means = {name: math.fsum(values) / len(values) for name, values in metrics.items()}
        return Scored(total(components, self.weights), components, extra, means)

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
