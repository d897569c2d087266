"""What a task is: a generator of examples, an exact verifier, and the registry that knows both by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any

from surgery.errors import SurgeryError
from surgery.registry import Registry, nearest

Make = Callable[..., "Example"]
"""`make(rng, **options)` draws one example; its keyword-only parameters are the options of the task."""
Verifier = Callable[[str, Mapping[str, Any]], bool | None]
"""`verify(completion, row)`: right, wrong, or None when the row's answer can't be parsed."""
Size = int | Sequence[int]
"""An option that is a number, or [lowest, highest] of which each example draws one."""


@dataclass(frozen=True)
class Example:
    """One question: what the model reads, what a fine-tuning would have it write, and the answer that counts.

    Examples are equal when prompt, response and answer are: labels and columns only describe them.
    """

    prompt: str
    response: str
    answer: str
    difficulty: float | None = field(default=None, compare=False)
    """Larger is harder; comparable within one task."""
    category: str | None = field(default=None, compare=False)
    """What a curriculum chooses among, such as "4 terms"."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What verifiers, rewards and analyses read besides; plain JSON values."""

    def row(self, task_name: str) -> dict[str, Any]:
        """The example as a row of training data: `completion` is the response, the category by default the task."""
        return {
            **self.columns,
            "prompt": self.prompt,
            "completion": self.response,
            "answer": self.answer,
            "task": task_name,
            "category": self.category or task_name,
            "difficulty": self.difficulty,
        }


def marked_answer(completion: str) -> str | None:
    """What follows the last `#`, or None when the completion has no answer."""
    return completion.rpartition("#")[2].strip() if "#" in completion else None


def marked(completion: str, row: Mapping[str, Any]) -> bool:
    """The default verifier: the text after the last `#` is the row's answer, character for character."""
    return marked_answer(completion) == row["answer"]


@dataclass(frozen=True)
class Task:
    """A family of examples drawn from a seed, and the verifier of completions."""

    name: str
    summary: str
    make: Make
    verify: Verifier = marked
    needs: str = ""
    """A package or data set that is not always there; drawing an example without it raises `SurgeryError`."""

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

    def row(self, seed: int, index: int) -> dict[str, Any]:
        """Row `index` of the endless stream of `seed`: a pure function, so that rows can be drawn in any order."""
        return self.make(Random(f"{self.name}:{seed}:{index}")).row(self.name)

    def correct(self, completion: str, example: Example) -> bool:
        """Whether the verifier accepts `completion` as an answer to `example`."""
        return self.verify(completion, example.row(self.name)) is True

    @property
    def options(self) -> dict[str, Any]:
        """Options by name with their defaults. A task that takes any option has `...` for a name."""
        found = dict[str, Any]()
        for name, p in inspect.signature(self.make).parameters.items():
            if p.kind is p.KEYWORD_ONLY:
                found[name] = p.default
            elif p.kind is p.VAR_KEYWORD:
                found["..."] = None
        return found

    def with_options(self, **options: Any) -> Task:
        """The same task, its generator set otherwise. Raises `SurgeryError` for an unknown option or a bad value."""
        valid = self.options
        for name in options:
            if name not in valid and "..." not in valid:
                hint = nearest(name, valid) if valid else "It has no options."
                raise SurgeryError(f"Task '{self.name}' has no option '{name}'.", hint=hint)
        changed = replace(self, make=partial(self.make, **options))
        if options:
            try:
                changed.make(Random(0))  # a bad value is found here rather than in the middle of a run
            except SurgeryError as error:
                raise SurgeryError(f"Task '{self.name}': {error.problem}", hint=error.hint) from error
        return changed


class Tasks(Registry[Task]):
    """Tasks by name, and families of tasks by the word before a colon: `reasoning_gym:chain_sum`."""

    def __init__(self) -> None:
        super().__init__("task")
        self.families: dict[str, Callable[[str], Task]] = {}

    def lookup(self, name: str) -> Task:
        """The task called `name`. Raises `SurgeryError` with the nearest valid names."""
        family, colon, member = name.partition(":")
        return self.families[family](member) if colon and family in self.families else super().lookup(name)


TASKS = Tasks()


def task(name: str, summary: str, verify: Verifier = marked, *, needs: str = "") -> Callable[[Make], Make]:
    """Decorator that files a generator in `TASKS`; its keyword-only parameters become the task's options."""

    def add(make: Make) -> Make:
        TASKS.register(name)(Task(name, summary, make, verify, needs))
        return make

    return add


def make_task(name: str, **options: Any) -> Task:
    """The task called `name` with its generator's options: `make_task("chain", terms=[4, 6])`.

    Raises `SurgeryError` with the nearest valid names for an unknown task or option, and for values out of bounds.
    """
    return TASKS.lookup(name).with_options(**options)


def verify(completion: str, row: Mapping[str, Any]) -> bool | None:
    """Whether `completion` answers `row`, by the verifier of the row's task; None when the answer can't be parsed.

    Verifiers read the row's answer and columns, never its prompt: templates may have changed that.
    """
    if "task" not in row:
        raise SurgeryError("A row without the column 'task' can't be verified.", hint="Name the task: row['task'].")
    checker = TASKS.lookup(row["task"]).verify
    try:
        return checker(completion, row)
    except KeyError as missing:
        raise SurgeryError(f"A row of task '{row['task']}' lacks the column {missing}.") from missing


def bounds(option: str, value: Size, least: int, most: int) -> tuple[int, int]:
    """Lowest and highest of a `Size`. Raises `SurgeryError` when it is none, or not within `least` and `most`."""
    pair = [value, value] if isinstance(value, int) else value
    whole = isinstance(pair, Sequence) and len(pair) == 2 and all(type(v) is int for v in pair)
    if not whole or not least <= pair[0] <= pair[1] <= most:
        wanted = f"a whole number from {least} to {most}, or [lowest, highest]"
        raise SurgeryError(f"Option '{option}' is {value!r}, expected {wanted}.")
    return pair[0], pair[1]


def draw(rng: Random, option: str, value: Size, least: int, most: int) -> int:
    """One number of a `Size`, each equally likely. Raises `SurgeryError` as `bounds` does."""
    return rng.randint(*bounds(option, value, least, most))


def counted(n: int, noun: str) -> str:
    """ "1 carry" and "2 carries", "3 terms": the label of a category."""
    plural = noun[:-1] + "ies" if noun.endswith(("ry", "ty")) else noun + "s"
    return f"{n} {noun if n == 1 else plural}"
