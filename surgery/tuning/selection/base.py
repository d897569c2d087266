"""What a selector is. To add one: a frozen dataclass with `score` or `pick`, one `@SELECTORS.register("name")`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from surgery.registry import Registry
from surgery.tuning.selection.budget import Budget, Scope, choose
from surgery.tuning.selection.evidence import Evidence
from surgery.tuning.selection.places import Places, Selection
from surgery.tuning.selection.targets import LINEAR, Target


@dataclass(frozen=True)
class Round:
    """Which selection of a run this is: its number, from 0 on, and the one before it."""

    number: int = 0
    before: Selection | None = None


class Selector:
    """How numbers are chosen. Class variables say what it needs and what is usual for it."""

    needs: ClassVar[tuple[str, ...]] = ()
    """What of `Evidence` it looks at."""
    scope: ClassVar[Scope] = "tensor"
    """Who competes, where the budget does not say."""
    modules: ClassVar[tuple[str, ...]] = LINEAR
    """The modules up for selection, where nobody says otherwise."""
    matrices: ClassVar[bool] = True
    """Whether only matrices are."""
    budgeted: ClassVar[str] = "needed"
    """Whether it takes a budget: "needed", "optional" or "never"."""
    keeps: ClassVar[bool] = True
    """Whether moments of numbers that stay selected live on when the selection moves."""

    def pick(self, targets: Sequence[Target], budget: Budget, evidence: Evidence, turn: Round) -> Mapping[str, Places]:
        """The places of each parameter; parameters without any are left out."""
        raise NotImplementedError

    def notes(self, targets: Sequence[Target], places: Mapping[str, Places], turn: Round) -> dict[str, Any]:
        """What the next round has to know, as JSON."""
        return {}


class Scored(Selector):
    """A selector that gives every number a score, of which the highest are chosen within the budget."""

    def score(self, target: Target, evidence: Evidence) -> Tensor:
        """Scores in the shape of the parameter, float32."""
        raise NotImplementedError

    def pick(self, targets: Sequence[Target], budget: Budget, evidence: Evidence, turn: Round) -> Mapping[str, Places]:
        shapes = {t.name: t.shape for t in targets}
        transposed = {t.name for t in targets if t.transposed}
        return choose(((t.name, self.score(t, evidence)) for t in targets), shapes, budget, transposed)


SELECTORS: Registry[type[Selector]] = Registry("selection")
