"""Rewards for tool calls: ToolRL is `{tool_format: 1, tool_call: 1}`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.training.rewards.base import REWARDS, rows_of, text_of
from surgery.training.rewards.lengths import ramp

Calls = list[dict[str, Any]]


def section(text: str, opening: str, closing: str) -> str | None:
    """What stands between the first `opening` and the next `closing` (an empty one is the end of the text)."""
    _, start, rest = text.partition(opening) if opening else ("", True, text)
    inside, end, _ = rest.partition(closing) if closing else (rest, True, "")
    return inside.strip() if start and end else None


def parse_calls(value: Any) -> Calls | None:
    """Tool calls as `{"name", "parameters"}`: from a list, a JSON list, or JSON objects one a line.

    `arguments` is read as `parameters`. None when the value is no list of calls.
    """
    if isinstance(value, str):
        try:
            whole = value.strip()
            value = json.loads(whole) if whole.startswith("[") else [json.loads(line) for line in whole.splitlines()]
        except (ValueError, RecursionError):
            return None
    calls = []
    for call in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        parameters = call.get("parameters", call.get("arguments", {}))
        if not isinstance(parameters, dict):
            return None
        calls.append({"name": call["name"], "parameters": parameters})
    return calls


def jaccard(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Multiset Jaccard: 1 for equal lists (also two empty ones), 0 when one is empty."""
    if not a and not b:
        return 1.0
    left, right = Counter(a), Counter(b)
    return (left & right).total() / (left | right).total()


def _equal(a: Sequence[Any], b: Sequence[Any]) -> float:
    return float(a == b)


def _graded(gold: Calls, said: Calls, alike: Callable[[Sequence[Any], Sequence[Any]], float]) -> float:
    """Names, then per gold call the best unused call of its name: parameter names and values. Greedy in gold order."""
    score, most = alike([c["name"] for c in gold], [c["name"] for c in said]), 1.0
    unused = list(said)
    for call in gold:
        right = call["parameters"]
        most += 1 + len(right)
        best, best_call = 0.0, None
        for other in unused:
            given = other["parameters"]
            if other["name"] == call["name"]:
                values = sum(k in given and given[k] == v for k, v in right.items())
                here = alike(list(right), list(given)) + values
                if here > best:
                    best, best_call = here, other
        if best_call is not None:
            unused = [c for c in unused if c is not best_call]
            score += best
    return score / most


def _fine(gold: Calls, said: Calls) -> float:
    return _graded(gold, said, jaccard)


def _strict(gold: Calls, said: Calls) -> float:
    return _graded(gold, said, _equal)


def _intermediate(gold: Calls, said: Calls) -> float:
    names = jaccard([c["name"] for c in gold], [c["name"] for c in said])
    unused, found = list(said), 0
    for call in gold:
        if call in unused:
            unused.remove(call)
            found += 1
    return (names + found) / (1 + len(gold))


GRANULARITIES: Registry[Callable[[Calls, Calls], float]] = Registry("granularity")
"""(gold calls, predicted calls) -> share of the attainable score, in [0, 1], when the two are not equal."""
GRANULARITIES.register("fine")(_fine)
GRANULARITIES.register("strict")(_strict)
GRANULARITIES.register("intermediate")(_intermediate)
GRANULARITIES.register("coarse")(lambda gold, said: 0.0)


def tool_call_score(gold: Calls, said: Calls, granularity: str = "fine") -> float:
    """How far the predicted calls are the gold ones, in [0, 1]. Exact equality of the lists is 1."""
    return 1.0 if gold == said else GRANULARITIES.lookup(granularity)(gold, said)


@dataclass(frozen=True, kw_only=True)
class _Tools:
    """Where calls are written and which column holds the right ones (calls, JSON, or a text with a call block)."""

    gold: str = "answer"
    opening: str = "<tool_call>"
    closing: str = "</tool_call>"
    scale: float = 1.0
    start_scale: float = 1.0
    steps: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the data must have."""
        return (self.gold,)

    def gold_calls(self, row: dict[str, Any]) -> Calls | None:
        """The right calls of a row; empty when none is due, None when they can't be read."""
        value = row.get(self.gold)
        if isinstance(value, str):
            block = section(value, self.opening, self.closing)
            if block is None and not value.lstrip().startswith(("[", "{")):
                return []
            value = value if block is None else block
        return None if value is None else parse_calls(value)


@REWARDS.register("tool_call")
@dataclass(frozen=True, kw_only=True)
class ToolCall(_Tools):
    """`scale * (2 s - 1)` with s = `tool_call_score` in [0, 1]; -scale without a readable call block; 0 when the gold
    answer has no call; None when it can't be read.

    fine: s = (J(names) + sum over gold calls of max over unused predicted calls of that name [J(parameter names) +
    number of equal values]) / (1 + sum over gold calls of (1 + number of parameters)), J multiset Jaccard.
    strict: J is equality. intermediate: a call counts 1 or 0. coarse: equality of the lists or nothing.
    `scale` goes from `start_scale` to its value in `steps` steps (theirs: 2 to 3 in 150).
    ToolRL (Qian et al. 2025, arXiv:2504.13958), section 3.3 and the ablations of section 5.
    """

    granularity: str = "fine"
    scale: float = 3.0
    start_scale: float = 2.0

    def __post_init__(self) -> None:
        GRANULARITIES.lookup(self.granularity)

    def __call__(self, prompts: list[Any], completions: list[Any], step: int = 0, **columns: Any) -> list[float | None]:
        """One value in [-scale, scale] per completion."""
        scale = ramp(step, self.start_scale, self.scale, self.steps)
        found: list[float | None] = []
        for text, row in zip(map(text_of, completions), rows_of(prompts, columns), strict=True):
            gold, block = self.gold_calls(row), section(text, self.opening, self.closing)
            said = None if block is None else parse_calls(block)
            score = 0.0 if said is None or not gold else tool_call_score(gold, said, self.granularity)
            found.append(None if gold is None else scale * (2 * score - 1) if gold else 0.0)
        return found


@REWARDS.register("tool_format")
@dataclass(frozen=True, kw_only=True)
class ToolFormat(_Tools):
    """`scale` when the completion is a thought and then a call block (or `<response>` when no call is due), else 0.

    ToolRL (arXiv:2504.13958), section 3.3. `think: false` leaves the thought out.
    """

    think: bool = True

    def __post_init__(self) -> None:
        if not self.opening or not self.closing:
            raise SurgeryError("Reward 'tool_format' needs an opening and a closing tag.")

    def __call__(self, prompts: list[Any], completions: list[Any], step: int = 0, **columns: Any) -> list[float | None]:
        """One value in [0, scale] per completion."""
        scale = ramp(step, self.start_scale, self.scale, self.steps)
        thought = r"<think>((?!</?think>).)*</think>\s*" if self.think else ""
        found: list[float | None] = []
        for text, row in zip(map(text_of, completions), rows_of(prompts, columns), strict=True):
            gold = self.gold_calls(row)
            opening, closing = (self.opening, self.closing) if gold else ("<response>", "</response>")
            pattern = f"{thought}{re.escape(opening)}.*{re.escape(closing)}"
            good = re.fullmatch(pattern, text.strip(), re.DOTALL) is not None
            once = text.count(opening) == 1 and text.count(closing) == 1
            found.append(None if gold is None else scale * (good and once))
        return found
