"""S2FT (arXiv:2412.06289): rows and columns that belong together, so that what learns is a dense slice.

A channel of an MLP is a row of gate and up and a column of down; a head is rows of v and columns of o. The paper
permutes them to the front and trains that block; here their numbers are kept instead (slices.py computes the gradients
of these rows and columns alone), and no weight changes its place.

| the released code | here |
|---|---|
| draws at random, over all layers together | the same; by norms, and layer by layer too |
| draws heads of v apart from those of o, channels of up apart from those of down | together: a head, a channel |
| never trains gate; its scripts train o (5.2 %) and down (2 %) | o and down, unless `modules` says more |
| leaves attention alone under grouped queries (down at 3 %): its permutation can't do them | they go together |
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surgery.anatomy.names import stack_of
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

    The budget says how many numbers that are, as nearly as whole channels and heads allow: what heads round off is made
    good by channels. Of scope "global" those of all layers compete; of scope "tensor" every layer has its share, and
    what is less than a head is left to the next layer. Usual `modules` are o and down; with v, gate and up the coupled
    rows learn too. Query heads that share keys and values go together where v learns.
    """

    by: By = "random"
    seed: int = 0

    scope = "global"
    modules = ("o", "down")

    def pick(self, targets: Sequence[Target], budget: Budget, evidence: Evidence, turn: Round) -> Mapping[str, Places]:
        if self.by not in ("random", "largest", "smallest"):
            raise SurgeryError(f"S2FT does not choose by '{self.by}'.", hint="random, largest or smallest.")
        if budget.scope == "row":
            raise SurgeryError(
                "S2FT chooses whole rows and columns: there is no scope 'row'.", hint="global or tensor."
            )
        wrong = next((t for t in targets if t.kind not in (*_READERS, *_WRITERS) or len(t.shape) != 2), None)
        if wrong is not None:
            raise SurgeryError(
                f"'{wrong.name}' ({wrong.kind}) has no rows or columns that are heads or channels by themselves.",
                hint="modules: o, down, v, gate, up.",
            )
        shares = budget.shares({t.name: t.shape for t in targets})
        found: dict[str, Places] = {}
        rest = 0
        for part in (("v", "o"), ("gate", "up", "down")):
            blocks = [_Block(mine) for mine in _coupled(t for t in targets if t.kind in part)]
            wanted = [sum(shares[t.name] for t in block.targets) for block in blocks]
            total = sum(wanted) + rest
            scores = [block.scores(self.by, self.seed) for block in blocks]
            kept = _all_together(blocks, scores, total) if budget.scope == "global" else _each(blocks, wanted, total)
            rest = total - sum(number * block.each for number, block in zip(kept, blocks, strict=True))
            for block, mine, number in zip(blocks, scores, kept, strict=True):
                if number:
                    best = mine.argsort(descending=True, stable=True)[:number]
                    found |= block.slices(best.sort().values)
        return found


class _Block:
    """Weights whose channels, or heads, are the same: one MLP, or one attention, or what of it is up for selection."""

    def __init__(self, targets: list[Target]) -> None:
        self.targets = targets
        self.width = targets[0].d_head if targets[0].kind in ("v", "o") else 1
        sides = [_side(t) for t in targets]
        odd = next((t for t, side in zip(targets, sides, strict=True) if side % self.width), None)
        if odd is not None:
            raise SurgeryError(f"'{odd.name}' ({list(odd.shape)}) does not divide into heads of {self.width}.")
        self.units = math.gcd(*sides) // self.width
        self.each = sum(t.parameter.numel() for t in targets) // self.units
        """Numbers of one unit."""

    def scores(self, by: By, seed: int) -> Tensor:
        """(units,) the highest are wanted."""
        if by == "random" or self.targets[0].parameter.is_meta:  # of shapes alone it can be told how many, not which
            return torch.rand(self.units, generator=generator(seed, self.targets[0].name), dtype=torch.float64)
        norms = torch.zeros(self.units)
        for target in self.targets:
            squares = target.weight.square().sum(1 - _dim(target)).cpu()
            norms += squares.view(self.units, -1).sum(1)
        return directed(norms, by)

    def slices(self, units: Tensor) -> dict[str, Places]:
        """What units (ascending) are in each weight."""
        found: dict[str, Places] = {}
        for target in self.targets:
            repeat = _side(target) // (self.units * self.width)  # o has several query heads for one head of v
            heads = (units[:, None] * repeat + torch.arange(repeat)).flatten()
            index = (heads[:, None] * self.width + torch.arange(self.width)).flatten().to(torch.int32)
            found[target.name] = Slice(_dim(target), index.to(target.parameter.device))
        return found


def _coupled(targets: Iterable[Target]) -> list[list[Target]]:
    """Targets of one layer together; by module where a layer has several of a kind (experts, cross-attention)."""
    layers: dict[Hashable, list[Target]] = {}
    for target in targets:
        layers.setdefault((stack_of(target.name), target.layer), []).append(target)
    found: dict[Hashable, list[Target]] = {}
    for key, mine in layers.items():
        several = max(Counter(t.kind for t in mine).values()) > 1
        for target in mine:
            found.setdefault((key, target.name.rsplit(".", 2)[0] if several else ""), []).append(target)
    return list(found.values())


def _all_together(blocks: Sequence[_Block], scores: Sequence[Tensor], wanted: int) -> list[int]:
    """How many units of each block, where the best of all blocks are taken up to the number that is wanted."""
    if not blocks:
        return []
    block = torch.cat([torch.full((b.units,), i) for i, b in enumerate(blocks)])
    sizes = torch.tensor([b.each for b in blocks])[block]
    order = torch.cat(list(scores)).argsort(descending=True, stable=True)
    taken = order[sizes[order].cumsum(0) - sizes[order] / 2 <= wanted]
    return torch.bincount(block[taken], minlength=len(blocks)).tolist()


def _each(blocks: Sequence[_Block], wanted: Sequence[int], total: int) -> list[int]:
    """How many units of each block, each by its own share of the total; what is rounded off is left to the next."""
    found, owed = [], 0.0
    for block, share in zip(blocks, wanted, strict=True):
        owed += share * total / max(1, sum(wanted))
        found.append(min(block.units, max(0, math.floor(owed / block.each + 0.5))))
        owed -= found[-1] * block.each
    return found


def _dim(target: Target) -> int:
    """The dimension along which its units lie."""
    return int((target.kind in _WRITERS) != target.transposed)


def _side(target: Target) -> int:
    return target.shape[_dim(target)]
