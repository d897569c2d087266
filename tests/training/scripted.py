"""What tests of sources share: an engine around a small model, and a generator that says what a test wants."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from tiny_runs import llama, tokenizer

from surgery.decoding import Rollout
from surgery.training.data import completion_ids
from surgery.training.engine import Trainer
from surgery.training.recipe import make


class Scripted:
    """`say(prompt text, index in the group)` is the completion; every call is noted."""

    def __init__(self, say: Callable[[str, int], str]) -> None:
        self.say = say
        self.asked: list[str] = []

    def __call__(self, prompts: Sequence[Sequence[int]], group: int, seeds: Sequence[int]) -> list[Rollout]:
        found = []
        for ids in prompts:
            prompt = tokenizer().decode(ids, skip_special_tokens=True)
            self.asked.append(prompt)
            for g in range(group):
                text = self.say(prompt, g)
                said = completion_ids(tokenizer(), text)
                found.append(Rollout(list(ids), said, [-1.0] * len(said), False, text))
        return found


def right(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 for the answer of the row."""
    return [float(text.strip() == a) for text, a in zip(completions, answer, strict=True)]


def shape(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """1 for whatever begins with a mark."""
    return [float(text.startswith("#")) for text in completions]


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Prompts c a=, c b=, ..., whose answers repeat the letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"[:count]
    return [{"prompt": f"c {c}=", "completion": f"#{c}{c}", "answer": f"#{c}{c}"} for c in letters]


def trainer(generator: Any = None, **words: Any) -> Trainer:
    """An engine around a random two-layer Llama; rewards `right`, 4 prompts in groups of 2."""
    shared: dict[str, Any] = {
        "data": rows(), "reward": {"right": {"reward": right}}, "curriculum": "in_order", "batch": {"rows": 4},
        "rollouts": {"prompts": 4, "group": 2, "max_new_tokens": 8}, "steps": 20, "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(make({**shared, **words}), llama(), tokenizer(), generator=generator)


def draw(engine: Trainer) -> list[Any]:
    """The next updates, as the engine would ask for them."""
    updates = engine.parts.source.draw(engine.context)
    engine.context.iteration += 1
    return updates
