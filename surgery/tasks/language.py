"""Text of a small probabilistic context-free grammar whose verbs agree with their nouns, however far apart."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from random import Random
from typing import Any

from surgery.errors import SurgeryError
from surgery.tasks.base import Example, bounds, counted, task

GRAMMAR: dict[str, list[tuple[float, str]]] = {
    "S": [(0.5, "NPS VPS"), (0.5, "NPP VPP")],
    "NPS": [(0.6, "the NS"), (0.2, "the ADJ NS"), (0.2, "the NS that REL_S")],
    "NPP": [(0.6, "the NP"), (0.2, "the ADJ NP"), (0.2, "the NP that REL_P")],
    "NP_ANY": [(0.5, "NPS"), (0.5, "NPP")],
    "REL_S": [(0.5, "VPS"), (0.25, "NPS VTS"), (0.25, "NPP VTP")],
    "REL_P": [(0.5, "VPP"), (0.25, "NPS VTS"), (0.25, "NPP VTP")],
    "VPS": [(0.5, "VIS"), (0.5, "VTS NP_ANY")],
    "VPP": [(0.5, "VIP"), (0.5, "VTP NP_ANY")],
    "NS": [(1, "cat"), (1, "dog"), (1, "bird"), (1, "child")],
    "NP": [(1, "cats"), (1, "dogs"), (1, "birds"), (1, "children")],
    "ADJ": [(1, "old"), (1, "red"), (1, "small")],
    "VIS": [(1, "sleeps"), (1, "sings"), (1, "runs")],
    "VIP": [(1, "sleep"), (1, "sing"), (1, "run")],
    "VTS": [(1, "sees"), (1, "likes"), (1, "follows")],
    "VTP": [(1, "see"), (1, "like"), (1, "follow")],
}
"""Symbols and their rules with weights; what is no symbol is a word. Not left-recursive, as `recognised` needs."""


def sampled(rng: Random, symbol: str = "S") -> list[str]:
    """Words of one derivation."""
    if symbol not in GRAMMAR:
        return [symbol]
    rules = GRAMMAR[symbol]
    rule = rng.choices([r for _, r in rules], [w for w, _ in rules])[0]
    return [word for part in rule.split() for word in sampled(rng, part)]


def recognised(words: list[str], symbol: str = "S") -> bool:
    """Whether the grammar derives `words` from `symbol`."""

    @cache
    def ends(symbol: str, start: int) -> frozenset[int]:
        """Where a derivation of `symbol` that begins at `start` may end."""
        if symbol not in GRAMMAR:
            return frozenset({start + 1} if start < len(words) and words[start] == symbol else ())
        found = set[int]()
        for _, rule in GRAMMAR[symbol]:
            reached = {start}
            for part in rule.split():
                reached = {end for at in reached for end in ends(part, at)}
            found |= reached
        return frozenset(found)

    return len(words) in ends(symbol, 0)


LONGEST = 60
"""Words of a sentence; longer ones are neither drawn nor accepted."""


def completes(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether the row's first words and the completion up to a final `;` are a sentence: any sentence counts."""
    text, end, rest = f"{row['begun']}{completion}".partition(";")
    words = text.split()
    return bool(end) and not rest.strip() and len(words) <= LONGEST and recognised(words)


@task("pcfg", "a sentence of a small grammar with agreement, to be finished", completes)
def pcfg(rng: Random, *, shown: float = 0.5, deepest: int = 3) -> Example:
    """The prompt shows a share `shown` of the words, two at least; the difficulty counts `that`, up to `deepest`."""
    if isinstance(shown, bool) or not isinstance(shown, int | float) or not 0 <= shown < 1:
        raise SurgeryError(f"Option 'shown' is {shown!r}, expected a share from 0 to below 1.")
    bounds("deepest", deepest, 0, 20)
    words = sampled(rng)
    while words.count("that") > deepest or len(words) > LONGEST:
        words = sampled(rng)
    cut = min(len(words) - 1, max(2, int(shown * len(words))))
    begun, rest, depth = " ".join(words[:cut]), " ".join(["", *words[cut:]]) + ";", words.count("that")
    label = counted(depth, "relative clause")
    return Example(f"t {begun}", rest, " ".join(words), depth, label, {"begun": begun})
