"""HFT (arXiv:2404.18466): half of the tensors learn, the other half remembers, and every round draws anew."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from torch import nn

from surgery.anatomy.names import GROUPS, group_of, stack_of
from surgery.errors import SurgeryError
from surgery.tuning.selection.base import SELECTORS, Round, Selector
from surgery.tuning.selection.budget import Budget
from surgery.tuning.selection.evidence import Evidence
from surgery.tuning.selection.places import Places
from surgery.tuning.selection.targets import Target, targets

Level = Literal["category", "layer", "model"]
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_PART = re.compile(r"[._](weight|bias|gamma|beta)$")


@SELECTORS.register("half")
@dataclass(frozen=True)
class Half(Selector):
    """Whole tensors, `ratio` of them, drawn by `seed` and the round.

    | level | what is drawn |
    |---|---|
    | category | in every layer: 2 of q, k, v, o; 1 or 2 of gate, up, down (of every expert); half of the norms |
    | layer | whole layers of each stack |
    | model | any tensors of the layers |

    Of an odd number the ceiling or the floor is taken, whichever keeps the share so far closest to the ratio, so that
    MLPs alternate between one and two of three; the paper takes two in half of the layers and one in the others. What
    is in no layer (embedding, head, last norm) is `outside`: "train" as in the paper, or "freeze". The paper reports
    that ratios from 0.4 to 0.6 do about as well, and categories better than layers, layers better than any tensors.
    `balance` counts tensors (the paper) or "elements", which tells GQA's small k and v from q and o.
    Weight and bias of one projection are one member, and so is a fused projection.
    """

    level: Level = "category"
    ratio: float = 0.5
    seed: int = 0
    outside: Literal["train", "freeze"] = "train"
    balance: Literal["tensors", "elements"] = "tensors"

    modules = tuple(dict.fromkeys(GROUPS.values()))
    matrices = False
    budgeted = "never"
    keeps = False

    def pick(self, targets: Sequence[Target], budget: Budget, evidence: Evidence, turn: Round) -> Mapping[str, Places]:
        for value, known, what in ((self.level, ("category", "layer", "model"), "level"),
                                   (self.outside, ("train", "freeze"), "value of outside"),
                                   (self.balance, ("tensors", "elements"), "balance")):  # fmt: skip
            if value not in known:
                raise SurgeryError(f"HFT has no {what} '{value}'.", hint=", ".join(known) + ".")
        if not 0 < self.ratio < 1:
            raise SurgeryError(f"A ratio of {self.ratio:g} leaves nothing to draw.", hint="It is between 0 and 1.")
        inside = [t for t in targets if t.layer is not None]
        chosen = {t.name for t in targets if t.layer is None and self.outside == "train"}
        draw = _Draw(self.ratio, Random(f"{self.seed} {turn.number}"), self.balance == "elements")
        for group in _together(inside, {"category": _category, "layer": stack, "model": lambda t: 0}[self.level]):
            member = {"category": _projection, "layer": lambda t: t.layer, "model": _projection}[self.level]
            chosen |= draw(_together(group, member))
        return {t.name: None for t in targets if t.name in chosen}


def select_half(model: nn.Module, level: Level = "category", seed: int = 0, ratio: float = 0.5) -> set[str]:
    """Names of the parameters that train; a pure function of the model's names, and of the seed."""
    found = targets(model, Half.modules, matrices=False)
    return set(Half(level, ratio, seed).pick(found, Budget(), Evidence(), Round()))


class _Draw:
    """Draws from one group of members after another, and keeps count."""

    def __init__(self, ratio: float, random: Random, elements: bool) -> None:
        self.ratio, self.random, self.elements = ratio, random, elements
        self.moving = self.seen = 0

    def __call__(self, members: list[list[Target]]) -> set[str]:
        sizes = [sum(t.parameter.numel() for t in m) if self.elements else 1 for m in members]
        order = list(range(len(members)))
        self.random.shuffle(order)
        self.seen += sum(sizes)
        taken: list[int] = []
        if self.elements:
            for i in order:
                if self._distance(self.moving + sizes[i]) < self._distance(self.moving):
                    taken.append(i)
                    self.moving += sizes[i]
        else:
            exact = self.ratio * len(members)
            count = min((math.floor(exact), math.ceil(exact)), key=lambda k: self._distance(self.moving + k))
            taken = order[:count]
            self.moving += count
        return {t.name for i in taken for t in members[i]}

    def _distance(self, moving: int) -> float:
        return abs(moving - self.ratio * self.seen)


def _together(targets: Iterable[Target], key: object) -> list[list[Target]]:
    """Targets with the same key, in order of first appearance."""
    groups: dict[Hashable, list[Target]] = {}
    for target in targets:
        groups.setdefault(key(target), []).append(target)  # type: ignore[operator]
    return list(groups.values())


def stack(target: Target) -> Hashable:
    """The list of layers that it is in."""
    return stack_of(target.name)


def _category(target: Target) -> Hashable:
    expert = _EXPERT.search(target.name)
    return stack(target), target.layer, group_of(target.name), expert and expert[1]


def _projection(target: Target) -> Hashable:
    return _PART.sub("", target.name)
