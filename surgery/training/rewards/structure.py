"""Rewards for the form of a completion: tags and patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from surgery.errors import SurgeryError
from surgery.training.rewards.base import REWARDS, text_of

_INSIDE = r"(?:(?!</?(?:think|answer)>).)*"  # no tag within a tag: a second block is not hidden in the first
THINK_ANSWER = rf"<think>{_INSIDE}</think>\s*<answer>{_INSIDE}</answer>"


def compiled(who: str, pattern: str) -> re.Pattern[str]:
    """The pattern, with `.` matching newlines. Raises `SurgeryError` when it is no regular expression."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise SurgeryError(f"Reward '{who}': {pattern!r} is no regular expression: {error}.") from None


@REWARDS.register("format")
@dataclass(frozen=True, kw_only=True)
class Format:
    """1 when the whole completion, but for space around it, matches `pattern`, else 0."""

    pattern: str = THINK_ANSWER

    def __post_init__(self) -> None:
        compiled("format", self.pattern)

    def __call__(self, completions: list[Any], **_: Any) -> list[float | None]:
        """One value per completion."""
        pattern = compiled("format", self.pattern)
        return [float(pattern.fullmatch(text_of(c).strip()) is not None) for c in completions]


@REWARDS.register("tag_count")
@dataclass(frozen=True, kw_only=True)
class TagCount:
    """The share of `tags` that are present exactly once: 0.25 for each of four."""

    tags: tuple[str, ...] = ("<think>", "</think>", "<answer>", "</answer>")

    def __post_init__(self) -> None:
        if not self.tags:
            raise SurgeryError("Reward 'tag_count' needs at least one tag.")

    def __call__(self, completions: list[Any], **_: Any) -> list[float | None]:
        """One value per completion."""
        return [sum(text_of(c).count(tag) == 1 for tag in self.tags) / len(self.tags) for c in completions]
