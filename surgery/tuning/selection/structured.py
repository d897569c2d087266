"""S2FT (arXiv:2412.06289): rows and columns that belong together, so that what learns is a dense slice.

A channel of an MLP is a row of gate and up and a column of down; a head is rows of v and columns of o. The paper
permutes them to the front and trains that block; here their numbers are kept instead (slices.py computes the gradients
of these rows and columns alone), and no weight changes its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.tuning.selection.base import SELECTORS, Round, Selector
from surgery.tuning.selection.budget import Budget
from surgery.tuning.selection.evidence import Evidence
from surgery.tuning.selection.places import Places, Slice
from surgery.tuning.selection.scores import directed, generator
from surgery.tuning.selection.targets import Target

By = Literal["random", "largest", "smallest"]
_READERS, _WRITERS = ("gate", "up", "v"), ("down", "o")


@SELECTORS.register("s2ft")
@dataclass(frozen=True)
class Structured(Selector):
    """MLP channels and attention heads; `by` is how they are chosen: at random, or by the norm of their weights.

    The budget says how many numbers that are, as nearly as whole channels and heads allow; each layer has its share of
    it, MLP and attention alike. Usual `modules` are o and down; with v, gate and up the coupled rows learn too. Query
    heads that share keys and values go together where v learns.
    """

    by: By = "random"
    seed: int = 0

    modules = ("o", "down")

    def pick(self, targets: Sequence[Target], budget: Budget, evidence: Evidence, turn: Round) -> Mapping[str, Places]:
        if self.by not in ("random", "largest", "smallest"):
            raise SurgeryError(f"S2FT does not choose by '{self.by}'.", hint="random, largest or smallest.")
        if budget.scope != "tensor":
            raise SurgeryError(f"S2FT chooses within layers, not of scope '{budget.scope}'.")
        wrong = next((t for t in targets if t.kind not in (*_READERS, *_WRITERS) or len(t.shape) != 2), None)
        if wrong is not None:
            raise SurgeryError(
                f"'{wrong.name}' ({wrong.kind}) has no rows or columns that are heads or channels by themselves.",
                hint="modules: o, down, v, gate, up.",
            )
        shares = budget.shares({t.name: t.shape for t in targets})
        found: dict[str, Places] = {}
        for part in (("gate", "up", "down"), ("v", "o")):
            for layer in sorted({t.layer for t in targets if t.kind in part and t.layer is not None}):
                mine = [t for t in targets if t.layer == layer and t.kind in part]
                found |= self._one(mine, sum(shares[t.name] for t in mine), layer)
        return found

    def _one(self, targets: list[Target], count: int, layer: int) -> dict[str, Places]:
        """Units of one layer's MLP or attention: the same numbers for every target."""
        width = self._unit(targets)
        units = math.gcd(*(self._side(t) for t in targets)) // width
        each = sum(t.parameter.numel() for t in targets) / units
        kept = min(units, max(1, round(count / each)))
        order = self._order(targets, units, width, layer)
        chosen = order[:kept].sort().values
        found: dict[str, Places] = {}
        for target in targets:
            repeat = self._side(target) // (units * width)  # o has several query heads for one head of v
            heads = (chosen[:, None] * repeat + torch.arange(repeat)).flatten()
            index = (heads[:, None] * width + torch.arange(width)).flatten().to(torch.int32)
            found[target.name] = Slice(self._dim(target), index.to(target.parameter.device))
        return found

    def _unit(self, targets: list[Target]) -> int:
        """Numbers in a row or column that go together: one for channels, the head's size for heads."""
        return targets[0].d_head if targets[0].kind in ("v", "o") else 1

    def _order(self, targets: list[Target], units: int, width: int, layer: int) -> Tensor:
        if self.by == "random":
            return torch.randperm(units, generator=generator(self.seed, f"{targets[0].kind in ('v', 'o')} {layer}"))
        norms = torch.zeros(units)
        for target in targets:
            squares = target.weight.square().sum(1 - self._dim(target)).cpu()
            norms += squares.view(units, -1).sum(1)
        return directed(norms, "largest" if self.by == "largest" else "smallest").argsort(descending=True, stable=True)

    def _dim(self, target: Target) -> int:
        return int((target.kind in _WRITERS) != target.transposed)

    def _side(self, target: Target) -> int:
        return target.shape[self._dim(target)]
