"""The reward of completions that are only compared: the share of a group that each one beats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.training.rewards.base import REWARDS, Row, rows_of, text_of
from surgery.training.rewards.build import found
from surgery.training.rewards.similarity import alike

Judge = Callable[[str, str, Row], float | bool | None]
JUDGES: Registry[Judge] = Registry("judge")
"""(one completion, another, row) -> whether, or how surely in [0, 1], the first is better; None for no verdict."""


@JUDGES.register("closer")
def closer(one: str, other: str, row: Row) -> bool:
    """The completion more like the row's answer, by ROUGE-L, wins."""
    return alike(one, str(row.get("answer"))) > alike(other, str(row.get("answer")))


@JUDGES.register("shorter")
def shorter(one: str, other: str, row: Row) -> bool:
    """The completion with fewer characters wins."""
    return len(one) < len(other)


@REWARDS.register("win_rate")
@dataclass(kw_only=True)
class WinRate:
    """Within a group, the mean over the others of 1[judge prefers this one]; None for a completion without rivals.

    `judge` is a name in `JUDGES`, a function, or `module:function` / `file.py:function` called as
    `judge(one, other, row)`. Both orders of a pair are asked, which averages out a preference for the first.
    Think-RM (Hong et al. 2025, arXiv:2505.16265).
    """

    judge: Any = "closer"
    verdict: Judge = field(init=False, repr=False)
    group: ClassVar[bool] = True

    def __post_init__(self) -> None:
        named = str(self.judge)
        self.verdict = self.judge if callable(self.judge) else found(JUDGES, named)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the data must have."""
        return ("answer",) if self.verdict is closer else ()

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """One value in [0, 1] per completion of one group."""
        texts, rows = [text_of(c) for c in completions], rows_of(prompts, columns)
        rates: list[float | None] = []
        for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
            verdicts = [self.verdict(text, other, row) for j, other in enumerate(texts) if j != i]
            wins = [float(v) for v in verdicts if v is not None]
            if bad := [w for w in wins if not 0 <= w <= 1]:
                raise SurgeryError(f"The judge answered {bad[0]}, expected true, false or a number from 0 to 1.")
            rates.append(sum(wins) / len(wins) if wins else None)
        return rates
