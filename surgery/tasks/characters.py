"""Tasks in the 45 characters of the tiny family (`surgery.zoo`): digits, `+-=;#`, letters and the space.

A letter in front of the prompt says what is asked; the answer follows `#`. The base of the family does facts, copy,
reverse and sort; fine-tunings of it do one task more each.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from surgery.tasks.base import TASKS, Example, Make, Size, Task, counted, draw

LETTERS = "abcdefghij"
_NEXT = str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0])


def _arithmetic(digits: Size, steps: bool) -> Make:
    """Sums and differences of digits modulo 10, worked out step by step (`steps`) or answered directly."""

    def make(rng: Random, *, terms: Size = digits) -> Example:
        total = rng.randrange(10)
        question, work, count = f"m {total}", "", draw(rng, "terms", terms, 2, 40)
        for _ in range(count - 1):
            sign, term = rng.choice("+-"), rng.randrange(10)
            result = (total + term if sign == "+" else total - term) % 10
            question += f"{sign}{term}"
            work += f"{total}{sign}{term}={result};"
            total = result
        response = f"{work if steps else ''}#{total}"
        return Example(f"{question}=", response, str(total), count, counted(count, "term"))

    return make


def _strings(letter: str, change: Callable[[str], str]) -> Make:
    """Strings of letters, changed; `letter` in front says how."""

    def make(rng: Random, *, length: Size = (3, 8)) -> Example:
        text = "".join(rng.choice(LETTERS) for _ in range(draw(rng, "length", length, 2, 100)))
        answer = change(text)
        return Example(f"{letter} {text}=", f"#{answer}", answer, len(text), counted(len(text), "letter"))

    return make


def _add(name: str, summary: str, make: Make) -> None:
    TASKS.register(name)(Task(name, summary, make))


_add("facts", "a sum or difference of two digits modulo 10", _arithmetic(2, steps=False))
_add("direct", "3 to 6 digits, the answer at once", _arithmetic((3, 6), steps=False))
_add("chain", "3 to 6 digits, worked out step by step", _arithmetic((3, 6), steps=True))
_add("copy", "the same string", _strings("c", str))
_add("reverse", "the string backwards", _strings("r", lambda s: s[::-1]))
_add("sort", "the letters in order", _strings("s", lambda s: "".join(sorted(s))))
_add("shift", "each letter replaced by the next (j by a)", _strings("n", lambda s: s.translate(_NEXT)))
_add("descend", "the letters in descending order", _strings("d", lambda s: "".join(sorted(s, reverse=True))))
_add("unique", "each letter once, where it first occurs", _strings("u", lambda s: "".join(dict.fromkeys(s))))
_add("swap", "first and last letter exchanged", _strings("x", lambda s: s[-1] + s[1:-1] + s[0]))
_add("rotate", "the first letter moved to the end", _strings("o", lambda s: s[1:] + s[0]))
_add("double", "each letter twice", _strings("w", lambda s: "".join(c + c for c in s)))
_add("last", "the last letter, as often as the string is long", _strings("l", lambda s: s[-1] * len(s)))
