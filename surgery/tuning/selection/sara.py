"""SaRA (arXiv:2409.06633): the smallest weights learn, and those that have grown stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError
from surgery.tuning.selection.base import SELECTORS, Round, Selector
from surgery.tuning.selection.budget import Budget, choose
from surgery.tuning.selection.evidence import Evidence
from surgery.tuning.selection.places import Places, narrow
from surgery.tuning.selection.targets import Target


@SELECTORS.register("sara")
@dataclass(frozen=True)
class Sara(Selector):
    """abs(W) < threshold, one threshold for all tensors; a budget instead of a `threshold` finds it.

    Selected again, those of the selection before that are still below it go on and the others stop (the paper's
    progressive adjustment; the released memory-saving variant draws from all small weights instead). The script's
    threshold is 2e-3, which suits its model: the usual share is 10 to 20 % of the numbers.
    """

    threshold: float | None = None

    scope = "global"
    budgeted = "optional"
    keeps = False

    def pick(self, targets: Sequence[Target], budget: Budget, evidence: Evidence, turn: Round) -> Mapping[str, Places]:
        if (self.threshold is None) is not budget.given or (self.threshold is not None and self.threshold <= 0):
            raise SurgeryError("SaRA takes either a threshold above 0 or a budget.",
                               hint="threshold=2e-3, or density=0.1.")  # fmt: skip
        if turn.before is not None:
            before, limit = turn.before, self.threshold or turn.before.notes.get("threshold")
            if limit is None:
                raise SurgeryError(f"The selection before ('{before.method}') knows no threshold of SaRA's.",
                                   hint="Go on from a selection that SaRA made, or give a threshold.")  # fmt: skip
            found = {}
            for target in (t for t in targets if t.name in before):
                places = before.flat(target.name).to(target.parameter.device)
                still = places[target.weight.view(-1)[places].abs() < limit]
                if len(still):
                    found[target.name] = narrow(still, target.parameter.numel())
            return found
        if self.threshold is not None:
            below = {t.name: (t.weight.abs() < self.threshold).view(-1).nonzero().view(-1) for t in targets}
            return {t.name: narrow(below[t.name], t.parameter.numel()) for t in targets if len(below[t.name])}
        return choose(((t.name, -t.weight.abs()) for t in targets), {t.name: t.shape for t in targets}, budget)

    def notes(self, targets: Sequence[Target], places: Mapping[str, Places], turn: Round) -> dict[str, Any]:
        """The threshold that a budget found: just above the largest weight within it."""
        if self.threshold is not None or turn.before is not None:
            return {} if turn.before is None else dict(turn.before.notes)
        largest = [t.weight.view(-1)[places[t.name].long()].abs().max() for t in targets if t.name in places]  # type: ignore[union-attr]
        return {"threshold": float(max(largest)) * (1 + 1e-6)}
