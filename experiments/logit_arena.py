"""What the experiments on logits share: fine-tunings by the zoo's recipes with other seeds, and who answers what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arena import STRING, SUM
from build_zoo import FamilyRows, Stage
from matplotlib.axes import Axes

from analysis.evaluate import evaluate, task_rows
from analysis.results import Result
from surgery.models import load
from surgery.training import train

KEPT = ("copy", "reverse", "sort")
"""What no fine-tuning here is for."""
HELD_OUT = 77
"""Seed of the questions that are scored: the same for every model and seed of training."""


def trained(model: Any, tokenizer: Any, stage: Stage, seed: int, **words: Any) -> list[float]:
    """Trains `model` in place by a stage of the zoo, with another seed; the rewards by step, where it has any.

    `words` are further ones of `train`, or others in place of the recipe's.
    """
    how: dict[str, Any] = {"objective": "grpo", "reward": "accuracy"} if stage.group else {"objective": "sft"}
    run = train(
        model, tokenizer, data=FamilyRows(stage, seed), steps=stage.steps, seed=seed, batch={"rows": stage.batch},
        rollouts={"prompts": stage.batch, "group": stage.group or 1, "max_new_tokens": longest(stage.mix)},
        optimizer={"lr": stage.lr, "betas": (0.9, 0.98), "weight_decay": 0.01, "final": 0.1,
                   "warmup": min(50, stage.steps / 10)},
        **{**how, **words},
    )  # fmt: skip
    model.eval()
    return [m["reward"] for m in run.metrics if "reward" in m]


def fine_tuned(start: str, stages: Sequence[Stage], seed: int) -> Any:
    """A new fine-tuning of a model of the zoo."""
    model, tokenizer = load(start)
    for stage in stages:
        trained(model, tokenizer, stage, seed)
    return model


def questions(tasks: Sequence[str], n: int) -> list[dict[str, Any]]:
    """`n` held-out questions, as many of each task as of any other."""
    return [row for task in tasks for row in task_rows([task], n // len(tasks), HELD_OUT)]


def longest(tasks: Sequence[str] | Mapping[str, Any]) -> int:
    """New tokens that answers need."""
    return SUM if {"chain", "direct"} & set(tasks) else STRING


def answered(decoder: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> Result:
    """1 where the greedy answer is right."""
    new = longest([row["task"] for row in rows])
    found = evaluate(decoder, rows, tokenizer=tokenizer, max_new_tokens=new, batch_size=256)
    return Result.of(found.values, found.labels)


def bare(*axes: Axes) -> None:
    """Without the frame's upper and right side."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
