"""Parameters that move as a whole, by what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgery.tuning.selection.base import SELECTORS, Round, Selector
from surgery.tuning.selection.budget import Budget
from surgery.tuning.selection.evidence import Evidence
from surgery.tuning.selection.places import Places
from surgery.tuning.selection.targets import Target

_EVERYTHING = ("attention", "mlp", "router", "norm", "embedding", "head", "other")


class _Roles(Selector):
    modules = _EVERYTHING
    matrices = False
    budgeted = "never"

    def wants(self, target: Target) -> bool:
        raise NotImplementedError

    def pick(self, targets: Sequence[Target], budget: Budget, evidence: Evidence, turn: Round) -> Mapping[str, Places]:
        return {t.name: None for t in targets if self.wants(t)}


@SELECTORS.register("all")
@dataclass(frozen=True)
class All(_Roles):
    """All numbers of `modules` (usually every parameter): full fine-tuning, said as a selection."""

    def wants(self, target: Target) -> bool:
        return True


@SELECTORS.register("bias")
@dataclass(frozen=True)
class Bias(_Roles):
    """Biases alone (BitFit, arXiv:2106.10199), those of norms too."""

    def wants(self, target: Target) -> bool:
        return target.name.endswith("bias")


@SELECTORS.register("norm")
@dataclass(frozen=True)
class Norm(_Roles):
    """The scales and shifts of norms alone (arXiv:2312.11420)."""

    def wants(self, target: Target) -> bool:
        return target.kind == "norm"
