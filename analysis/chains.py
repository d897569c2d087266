"""How chains of thought are written: their steps, how an answer is forced after them, mistakes in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from surgery.errors import SurgeryError

_LAST_NUMBER = re.compile(r"\d+(?=\D*$)")


def split_after(pattern: str) -> Callable[[str], list[str]]:
    """A function that cuts a text behind every match: the parts together are the text, the last may have no match."""
    known = re.compile(pattern)

    def split(text: str) -> list[str]:
        ends = [0, *(m.end() for m in known.finditer(text) if m.end() > m.start()), len(text)]
        return [text[a:b] for a, b in zip(ends, ends[1:], strict=False) if b > a]

    return split


def first_line(text: str) -> str:
    """The first line with anything on it."""
    return text.strip().partition("\n")[0].strip()


@dataclass(frozen=True)
class ChainFormat:
    """How chains of thought and answers are written. Raises `SurgeryError` for what can't be asked for."""

    split: Callable[[str], Sequence[str]] = split_after(r"[;\n]\s*|[.!?]\s+")
    """A chain as its steps, which together are the chain."""
    marker: str = "#"
    """What forces an answer: it follows the chain. Without a space at its end, for most tokenizers."""
    choices: tuple[str, ...] | None = None
    """The answers that are possible, a token each (with its leading space, where it has one): the likeliest is the
    answer, and probabilities are among them. Without choices greedy text is read, and all tokens count."""
    read: Callable[[str], str] = first_line
    """The answer in the text that follows the marker."""
    max_answer_tokens: int = 16
    max_chain_tokens: int = 64
    """Of a chain, or the rest of one, that the model writes itself."""

    def __post_init__(self) -> None:
        if not self.marker:
            raise SurgeryError("An answer is forced by a text, and the marker is empty.", hint="marker='#'")
        if self.choices is not None and len({choice.strip() for choice in self.choices}) < max(2, len(self.choices)):
            raise SurgeryError(f"Choices are two or more different answers, and not {self.choices!r}.")

    def chain_of(self, completion: str) -> str:
        """What stands before the last marker; all of it where there is none."""
        return completion.rpartition(self.marker)[0] if self.marker in completion else completion

    def steps_of(self, chain: str, row: int) -> list[str]:
        """The steps of the chain of a row. Raises `SurgeryError` when there is none, or a part got lost."""
        steps = list(self.split(chain))
        if not steps:
            raise SurgeryError(f"Row {row} has no chain of thought.", hint="Leave the row out, or give chains=.")
        if "".join(steps) != chain:
            raise SurgeryError(f"Row {row}: its {len(steps)} steps together are not its chain {chain!r}.",
                               hint="A split keeps every character: see split_after.")  # fmt: skip
        return steps


@dataclass(frozen=True)
class Corrupted:
    """A chain with a mistake: all of its steps, and the answer to which they lead (None: nobody can say)."""

    steps: Sequence[str]
    answer: str | None = None


Corrupt = Callable[[list[str], int, Random], Corrupted | None]
"""`corrupt(steps, at, rng)`: the chain with a mistake in step `at`; None where none can be made there."""


def wrong_number(steps: list[str], at: int, rng: Random) -> Corrupted | None:
    """One digit of the step's last number is another; the other steps stay, so that no answer is implied."""
    found = _LAST_NUMBER.search(steps[at])
    if found is None:
        return None
    digits = list(found[0])
    place = rng.randrange(len(digits))
    first = int(place == 0 and len(digits) > 1)  # a number of several digits does not begin with 0
    digits[place] = rng.choice([d for d in "0123456789"[first:] if d != digits[place]])
    wrong = steps[at][: found.start()] + "".join(digits) + steps[at][found.end() :]
    return Corrupted([*steps[:at], wrong, *steps[at + 1 :]])


def changed(steps: list[str], at: int, corrupt: Corrupt, rng: Random, row: int) -> Corrupted | None:
    """What `corrupt` makes of the chain of a row. Raises `SurgeryError` when that is no mistake in step `at`."""
    wrong = corrupt(list(steps), at, rng)
    if wrong is None:
        return None
    found = list(wrong.steps)
    if found[:at] != steps[:at] or found[at : at + 1] in ([], steps[at : at + 1]):
        raise SurgeryError(f"Row {row}: the corruption of step {at} changed an earlier step, or not this one.",
                           hint="A corruption returns all steps, the first changed one being step `at`.")  # fmt: skip
    return Corrupted(found, wrong.answer)
