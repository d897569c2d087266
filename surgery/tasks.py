"""Small tasks with an exact verifier, and the word problems that real models are scored on.

A character-level task puts one letter in front of its prompt and one answer after `#`:

| task | prompt | response |
|---|---|---|
| facts | `m 3+5=` | `#8` (modulo 10) |
| direct | `m 3+5-2=` | `#6` |
| chain | `m 3+5-2=` | `3+5=8;8-2=6;#6` (the same prompts as direct, worked out step by step) |
| copy, reverse, sort | `c bad=`, `r bad=`, `s bad=` | `#bad`, `#dab`, `#abd` |
| shift, descend, unique, swap, rotate, double, last | `n bad=`, `d bad=`, ... | the changed string |

The base of the tiny family (`surgery.zoo`) does facts, copy, reverse and sort; fine-tunings of it do one task
more each. A new task is one function from a string (or a generator) to an answer, registered in `TASKS`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from surgery.errors import SurgeryError
from surgery.registry import Registry

LETTERS = "abcdefghij"
_NEXT = str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0])


@dataclass(frozen=True)
class Example:
    """One question: what the model reads, what a fine-tuning would have it write, and the answer that counts."""

    prompt: str
    response: str
    answer: str


def marked_answer(completion: str) -> str | None:
    """What follows the last `#`, or None when the completion has no answer."""
    return completion.rpartition("#")[2].strip() if "#" in completion else None


@dataclass(frozen=True)
class Task:
    """A family of examples drawn from a seed. `make` turns a generator into one example."""

    name: str
    summary: str
    make: Callable[[Random], Example]

    def example(self, rng: Random) -> Example:
        """One example; the same generator state gives the same example."""
        return self.make(rng)

    def examples(self, n: int, seed: int = 0) -> list[Example]:
        """`n` examples with different prompts. Raises `SurgeryError` when the task has fewer than `n` prompts."""
        rng, found = Random(f"{self.name}:{seed}"), dict[str, Example]()
        for _ in range(50 * n + 1000):
            if len(found) >= n:
                return list(found.values())
            one = self.make(rng)
            found.setdefault(one.prompt, one)
        raise SurgeryError(f"Task '{self.name}' has only about {len(found)} prompts, {n} were asked for.")

    def correct(self, completion: str, example: Example) -> bool:
        """Whether the text after the last `#` is the answer, character for character."""
        return marked_answer(completion) == example.answer


TASKS: Registry[Task] = Registry("task")


def _add(name: str, summary: str, make: Callable[[Random], Example]) -> None:
    TASKS.register(name)(Task(name, summary, make))


def _arithmetic(terms: Sequence[int], steps: bool) -> Callable[[Random], Example]:
    """Sums and differences of digits modulo 10, worked out step by step (`steps`) or answered directly."""

    def make(rng: Random) -> Example:
        total = rng.randrange(10)
        question, work = f"m {total}", ""
        for _ in range(rng.choice(terms) - 1):
            sign, term = rng.choice("+-"), rng.randrange(10)
            result = (total + term if sign == "+" else total - term) % 10
            question += f"{sign}{term}"
            work += f"{total}{sign}{term}={result};"
            total = result
        return Example(f"{question}=", f"{work if steps else ''}#{total}", str(total))

    return make


def _strings(letter: str, change: Callable[[str], str]) -> Callable[[Random], Example]:
    """Strings of 3 to 8 letters, changed; `letter` in front says how."""

    def make(rng: Random) -> Example:
        text = "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 8)))
        answer = change(text)
        return Example(f"{letter} {text}=", f"#{answer}", answer)

    return make


_add("facts", "a sum or difference of two digits modulo 10", _arithmetic((2,), steps=False))
_add("direct", "3 to 6 digits, the answer at once", _arithmetic((3, 4, 5, 6), steps=False))
_add("chain", "3 to 6 digits, worked out step by step", _arithmetic((3, 4, 5, 6), steps=True))
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


# ---- word problems for real models --------------------------------------------------------------------------------

_NUMBER = re.compile(r"(?<![\d.])-?\.?\d[\d,]*(?:\.\d+)?")  # no sign right after a digit: "5-2" ends in 2


def numeric_answer(text: str) -> float | None:
    """The number after the last `####`, else the last number of the text, else None. Thousands commas are dropped."""
    _, mark, tail = text.rpartition("####")
    found = _NUMBER.findall(tail) if mark else []
    number = found[0] if found else next(iter(reversed(_NUMBER.findall(text))), None)
    return None if number is None else float(number.replace(",", ""))


def _plain(number: float) -> str:
    """1000000.0 -> "1000000", 0.5 -> "0.5"."""
    return str(int(number)) if number == int(number) else repr(number)


def same_number(completion: str, example: Example) -> bool:
    """The verifier of the word problems: the completion's number equals the answer (to 1e-6)."""
    said, right = numeric_answer(completion), float(example.answer)
    return said is not None and abs(said - right) <= 1e-6 * max(1.0, abs(right))


def _records(folder: str, file: str, hub: str, split: str) -> list[dict]:
    """Rows of `$SURGERY_DATA/folder/file`, or of the hub's data set where `datasets` and a network are there."""
    if root := os.environ.get("SURGERY_DATA"):
        path = Path(root) / folder / file
        if not path.is_file():
            raise SurgeryError(f"SURGERY_DATA has no {folder}/{file}: {path} is missing.")
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line] if path.suffix == ".jsonl" else json.loads(text)
    try:
        from datasets import load_dataset

        name, _, config = hub.partition(":")
        return [dict(row) for row in load_dataset(name, config or None, split=split)]
    except Exception as error:
        raise SurgeryError(
            f"The data set '{hub}' could not be loaded ({type(error).__name__}).",
            hint=f"Set SURGERY_DATA to a folder that holds {folder}/{file}, or `pip install datasets` and go online.",
        ) from error


def _part(examples: list[Example], n: int | None) -> list[Example]:
    return examples if n is None else examples[:n]


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise SurgeryError(f"Unknown split '{split}': expected 'train' or 'test'.")


def gsm8k(split: str = "test", n: int | None = None) -> list[Example]:
    """The first `n` GSM8K problems (Cobbe et al. 2021, arXiv:2110.14168); responses end in `#### number`.

    The calculator marks `<<48/2=24>>` are taken out. Raises `SurgeryError` when the data can't be found.
    """
    _check_split(split)
    rows = _records("gsm8k", f"{split}.jsonl", "openai/gsm8k:main", split)
    found = []
    for row in rows:
        response = re.sub(r"<<[^>]*>>", "", row["answer"])
        found.append(Example(row["question"], response, _plain(numeric_answer(response) or 0.0)))
    return _part(found, n)


def svamp(split: str = "test", n: int | None = None, *, held_out: int = 300) -> list[Example]:
    """The first `n` SVAMP problems (Patel et al. 2021, arXiv:2103.07191); the response is `equation\\n#### number`.

    The data set is one list of 1000: its last `held_out` problems are the test split here, the others the training
    split.
    """
    _check_split(split)
    rows = _records("svamp", "SVAMP.json", "ChilleD/SVAMP", split)
    if os.environ.get("SURGERY_DATA"):
        rows = rows[-held_out:] if split == "test" else rows[:-held_out]
    found = []
    for row in rows:
        answer = _plain(float(row["Answer"]))
        equation = re.sub(r"\.0\b", "", row["Equation"]).strip()
        equation = re.sub(r"^\( (.*) \)$", r"\1", equation)
        body = row["Body"].strip()
        prompt = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row['Question'].strip()}"
        found.append(Example(prompt, f"{equation} = {answer}\n#### {answer}", answer))
    return _part(found, n)
