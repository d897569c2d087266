"""One call of a reward function: the arguments that it takes, and a sentence for every answer that is none."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

from surgery.errors import SurgeryError
from surgery.training.rewards.base import PROVIDED, Reward, text_of


def _shown(prompt: Any, completion: Any) -> str:
    prompt, completion = text_of(prompt), text_of(completion)
    return f"prompt {prompt[-60:]!r}, completion {completion[:120]!r}"


def signature_of(who: str, function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable. Raises `SurgeryError` when Python can't tell them, as for some built-ins."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise SurgeryError(f"{who} doesn't tell its parameters.", hint="Wrap it in a function of your own.") from None


@dataclass(frozen=True)
class Call:
    """One reward function under its name, with the arguments it takes."""

    name: str
    reward: Reward

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the function, by name. Raises `SurgeryError` when it can't be called with keywords alone."""
        found = signature_of(f"Reward '{self.name}'", self.reward)
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
        return tuple(name for name in required if name not in PROVIDED)

    def check(self, columns: Collection[str]) -> None:
        """Raises `SurgeryError` when a column that the function needs is not among `columns`."""
        if missing := [name for name in self.needs if name not in columns]:
            raise SurgeryError(
                f"Reward '{self.name}' needs the column '{missing[0]}'; the rows have {', '.join(sorted(columns))}.",
                hint="Add the column to the data, or name another one in the reward's parameters.",
            )

    def __call__(self, arguments: Mapping[str, Any]) -> list[float | None]:
        """One checked value per completion. Raises `SurgeryError` naming the function and the row."""
        self.check({"prompt", *(k for k in arguments if k not in PROVIDED)})
        taken = self.parameters
        everything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        bound = self.reward.keywords if isinstance(self.reward, partial) else {}  # a column must not override them
        chosen = {k: v for k, v in arguments.items() if (everything or k in taken) and k not in bound}
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
