"""Rewards for the length of a completion and for repetition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.training.rewards.base import REWARDS, text_of
from surgery.training.rewards.correctness import Verified

UNITS: Registry[Callable[[str, Sequence[int]], Sequence[Any]]] = Registry("unit of length")
"""A completion's text and ids cut into the units that are counted."""
UNITS.register("tokens")(lambda text, ids: ids)
UNITS.register("characters")(lambda text, ids: text)
UNITS.register("words")(lambda text, ids: text.lower().split())


def units(unit: str, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None) -> list[Sequence[Any]]:
    """Each completion as tokens (the EOS included), characters or words.

    Raises `SurgeryError` when tokens are asked for and the ids are not given.
    """
    cut = UNITS.lookup(unit)
    if completion_ids is None:
        if unit == "tokens":
            raise SurgeryError("Lengths in tokens need completion_ids.", hint="Count `unit: characters` or `words`.")
        completion_ids = [[]] * len(completions)
    return [cut(text_of(c), ids) for c, ids in zip(completions, completion_ids, strict=True)]


def ramp(step: int, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 to `end` at `steps`, in a straight line, and `end` from then on."""
    return end if steps < 1 else start + (end - start) * min(1.0, step / steps)


def _at_least(name: str, parameter: str, value: float, least: float) -> None:
    if value < least:
        raise SurgeryError(f"Reward '{name}': {parameter} must be at least {least}, not {value}.")


def cosine(length: float, max_len: float, start: float, end: float) -> float:
    """From `start` at length 0 to `end` at `max_len` and beyond, along half a cosine."""
    progress = min(1.0, length / max_len)
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))


@REWARDS.register("cosine_length")
@dataclass(frozen=True, kw_only=True)
class CosineLength(Verified):
    """Right: from `max_correct` when short to `min_correct` at `max_len`. Wrong: from `min_wrong` to `max_wrong`.

    So a short right answer is best and a short wrong one worst. Yeo et al. 2025 (arXiv:2502.03373), with the defaults
    of open-r1.
    """

    min_wrong: float = -1.0
    max_wrong: float = -0.5
    min_correct: float = 0.5
    max_correct: float = 1.0
    max_len: int = 1000
    unit: str = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        UNITS.lookup(self.unit)
        _at_least("cosine_length", "max_len", self.max_len, 1)

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """One value per completion; None where the gold answer can't be read."""
        ends = {True: (self.max_correct, self.min_correct), False: (self.min_wrong, self.max_wrong)}
        lengths = map(len, units(self.unit, completions, completion_ids))
        right = self.correct(prompts, completions, columns)
        return [None if r is None else cosine(n, self.max_len, *ends[r]) for r, n in zip(right, lengths, strict=True)]


@REWARDS.register("kimi_length")
@dataclass(frozen=True, kw_only=True)
class KimiLength(Verified):
    """Within a group: `x = 1/2 - (len - min) / (max - min)`; right x, wrong min(0, x), all 0 when max = min.

    Kimi k1.5 (arXiv:2501.12599), section 2.3.3.
    """

    unit: str = "tokens"
    group: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        UNITS.lookup(self.unit)

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """One value per completion of one group."""
        lengths = [len(u) for u in units(self.unit, completions, completion_ids)]
        least, most = min(lengths), max(lengths)
        x = [0.5 - (n - least) / (most - least) if most > least else 0.0 for n in lengths]
        right = self.correct(prompts, completions, columns)
        return [None if r is None else v if r else min(0.0, v) for r, v in zip(right, x, strict=True)]


@REWARDS.register("soft_overlong")
@dataclass(frozen=True, kw_only=True)
class SoftOverlong:
    """0 up to `max_len - cache` tokens, then linearly down to -1 at `max_len`, and -1 beyond.

    DAPO (Yu et al. 2025, arXiv:2503.14476), equation 13.
    """

    max_len: int = 512
    cache: int = 128

    def __post_init__(self) -> None:
        _at_least("soft_overlong", "cache", self.cache, 1)
        _at_least("soft_overlong", "max_len", self.max_len, self.cache)

    def __call__(self, completions: list[Any], completion_ids: Any = None, **_: Any) -> list[float | None]:
        """One value in [-1, 0] per completion."""
        lengths = map(len, units("tokens", completions, completion_ids))
        return [min(0.0, max(-1.0, (self.max_len - self.cache - n) / self.cache)) for n in lengths]


@REWARDS.register("repetition")
@dataclass(frozen=True, kw_only=True)
class Repetition:
    """`max_penalty * (1 - different n-grams / all n-grams)`; 0 for a completion shorter than `n`.

    Yeo et al. 2025 (arXiv:2502.03373). n-grams of lower-case words as in open-r1, or of tokens as in TRL.
    """

    n: int = 3
    max_penalty: float = -1.0
    unit: str = "words"

    def __post_init__(self) -> None:
        UNITS.lookup(self.unit)
        _at_least("repetition", "n", self.n, 1)
        if self.max_penalty > 0:
            raise SurgeryError(f"Reward 'repetition': max_penalty must be 0 or negative, not {self.max_penalty}.")

    def _penalty(self, parts: Sequence[Any]) -> float:
        grams = [tuple(parts[i : i + self.n]) for i in range(len(parts) - self.n + 1)]
        repeated = len(grams) - len(set(grams))
        return self.max_penalty * repeated / len(grams) if repeated else 0.0

    def __call__(self, completions: list[Any], completion_ids: Any = None, **_: Any) -> list[float | None]:
        """One value of at most 0 per completion."""
        return [self._penalty(parts) for parts in units(self.unit, completions, completion_ids)]


@REWARDS.register("think_length")
@dataclass(frozen=True, kw_only=True)
class ThinkLength:
    """Words between `<think>` and `</think>` over `max_len`, at most 1; 0 without the tags.

    ToolRL's length ablation (arXiv:2504.13958), which its authors found to harm small models. With `steps`, the
    length that earns 1 goes from `start_len` to `max_len` in so many steps (theirs: 384 to 640 in 105).
    """

    max_len: int = 512
    start_len: int = 384
    steps: int = 0

    def __post_init__(self) -> None:
        _at_least("think_length", "max_len", self.max_len, 1)
        _at_least("think_length", "start_len", self.start_len, 1)

    def __call__(self, completions: list[Any], step: int = 0, **_: Any) -> list[float | None]:
        """One value in [0, 1] per completion."""
        full = ramp(step, self.start_len, self.max_len, self.steps)
        found = []
        for text in map(text_of, completions):
            inside, end, _rest = text.rpartition("<think>")[2].partition("</think>")
            found.append(min(1.0, len(inside.split()) / full) if end and "<think>" in text else 0.0)
        return list(found)
