"""Rewards by the likeness of texts, and the hierarchical reward of actions that rests on it."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError
from surgery.training.rewards.base import REWARDS
from surgery.training.rewards.lengths import UNITS
from surgery.training.rewards.matching import Compared


def common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, with one big-integer operation a symbol (Hyyrö 2004)."""
    where: dict[Hashable, int] = {}
    for i, symbol in enumerate(a):
        where[symbol] = where.get(symbol, 0) | 1 << i
    full = state = (1 << len(a)) - 1
    for symbol in b:
        hits = state & where.get(symbol, 0)
        state = ((state + hits) | (state - hits)) & full
    return len(a) - state.bit_count()


def rouge_l(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """F1 of the longest common subsequence, in [0, 1]; 1 for two empty texts (ROUGE-L, Lin 2004)."""
    return 2 * common(a, b) / (len(a) + len(b)) if a or b else 1.0


def alike(a: str, b: str, unit: str = "words") -> float:
    """ROUGE-L F1 of two texts, compared by words or characters."""
    cut = UNITS.lookup(unit)
    return rouge_l(cut(a, ()), cut(b, ()))


@REWARDS.register("similarity")
@dataclass(frozen=True, kw_only=True)
class Similarity(Compared):
    """ROUGE-L F1 between the completion and the gold column, by `words` or `characters`."""

    unit: str = "words"

    def __post_init__(self) -> None:
        if UNITS.lookup(self.unit) is UNITS["tokens"]:
            raise SurgeryError("Reward 'similarity' compares words or characters, not tokens.")

    def value(self, text: str, gold: Any) -> float | None:
        """The reward of one completion."""
        return None if gold is None else alike(text, str(gold), self.unit)


def read_action(value: Any) -> dict[str, Any] | None:
    """An action: a mapping with `type`, itself or under `action`, or the first JSON object of a text."""
    if isinstance(value, str):
        start = value.find("{")
        try:
            value = json.JSONDecoder().raw_decode(value, start)[0] if start >= 0 else None
        except (ValueError, RecursionError):
            return None
    value = value.get("action", value) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) and isinstance(value.get("type"), str) else None


@REWARDS.register("hierarchical_action")
@dataclass(frozen=True, kw_only=True)
class HierarchicalAction(Compared):
    """`type_reward` for the right type of action; only then, for each attribute of the gold action, `present` when
    it is filled in, and `value_reward * ROUGE-L`, times `difficulty` for the attributes in `long`. 0 for no action.

    A likeness below `threshold` counts nothing. Shop-R1 (arXiv:2507.17842): the hierarchy is the paper's, the sizes
    of the parts are parameters. The paper adds `format` and the self-certainty of the rationale (`measured`).
    """

    type_reward: float = 0.3
    present: float = 0.1
    value_reward: float = 0.1
    difficulty: float = 10.0
    long: tuple[str, ...] = ("text",)
    threshold: float = 0.0

    def value(self, text: str, gold: Any) -> float | None:
        """The reward of one completion."""
        right, said = read_action(gold), read_action(text)
        if right is None:
            return None
        if said is None or said["type"] != right["type"]:
            return 0.0
        return self.type_reward + sum(
            self._attribute(name, str(said.get(name) or ""), str(wanted))
            for name, wanted in right.items()
            if name != "type" and wanted not in (None, "")
        )

    def _attribute(self, name: str, said: str, wanted: str) -> float:
        likeness = alike(said, wanted)
        factor = self.difficulty if name in self.long else 1.0
        return self.present * bool(said.strip()) + self.value_reward * factor * likeness * (likeness >= self.threshold)
