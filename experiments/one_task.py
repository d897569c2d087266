"""What the experiments on sparse tuning share: tiny-base learns one task, and is asked at equal accuracy what it kept.

The task is `shift` (each letter replaced by the next one): the rarer of two ways to answer in the base, and near enough
to its other strings that these are lost on the way. An update is on 32 fresh demonstrations; after every second or
fourth of them the task is asked of 64 validation questions (`curve`; `area` is its mean), and at the first `ENOUGH` of
them (step `at`) the test questions of the task (`target`) and of the base's skills facts, copy, reverse and sort
(`kept`). A run that never gets there is asked at its end. `loss` is that of the first batch, before anything has moved.

Every arm has the rate that did best in a sweep of equal size, on seeds and questions that are not reported; of equals
the smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from arena import SKILLS, STRING, mean_interval

from analysis.evaluate import evaluate, task_rows
from surgery import zoo
from surgery.training import train
from surgery.training.run import open_model

TASK, ENOUGH, EVERY, ROWS = "shift", 0.9, 2, 32
RATES: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SWEPT = (90, 91)
"""Seeds of the sweep."""
EQUAL = 0.05
"""Test accuracies on the task that differ by no more are called equal."""


def start() -> tuple[Any, Any]:
    """tiny-base and its tokenizer."""
    model, tokenizer = open_model(zoo.get("tiny-base"))
    return model, tokenizer


def accuracies(model: Any, tokenizer: Any, n: int, seed: int) -> dict[str, float]:
    """On `n` questions of the task and of every skill (facts are few: at most 100)."""
    rows = task_rows([TASK, *SKILLS[1:]], n, seed) + task_rows([SKILLS[0]], min(n, 100), seed)
    found = evaluate(model, rows, tokenizer=tokenizer, max_new_tokens=STRING, batch_size=1024)
    tasks = np.array(found.columns["task"])
    return {task: float(found.values[tasks == task].mean()) for task in (TASK, *SKILLS)}


class Enough(Exception):
    """The run has shown what was asked of it."""


def learn(
    model: Any,
    tokenizer: Any,
    rate: float,
    seed: int,
    steps: int,
    n: int,
    tuning: Any = None,
    *,
    stop: bool = False,
    every: int = EVERY,
) -> dict[str, Any]:
    """One run of `steps` in place, or until it gets there (`stop`): what the head of this file names."""
    test = 901 if seed in SWEPT else 900
    curve: list[float] = []
    found: dict[str, Any] = {"at": None}

    def ask() -> None:
        each = accuracies(model, tokenizer, n, test)
        found.update(target=each.pop(TASK), kept=float(np.mean(list(each.values()))), skills=each)

    def on_step(step: int, metrics: Mapping[str, float]) -> None:
        if step == 1:
            found["loss"] = metrics["loss"]
        if "eval/accuracy" not in metrics:
            return
        curve.append(metrics["eval/accuracy"])
        if found["at"] is None and step and curve[-1] >= ENOUGH:
            found["at"] = step
            ask()
            if stop:
                raise Enough

    with suppress(Enough):
        train(
            model, tokenizer, data={"task": TASK}, objective="sft", steps=steps, batch={"rows": ROWS}, tuning=tuning,
            optimizer={"lr": rate, "betas": (0.9, 0.98), "warmup": 4, "shape": "constant"}, seed=seed,
            evaluate={"every": every, "n": min(64, n)}, rollouts={"max_new_tokens": STRING}, on_step=on_step,
        )  # fmt: skip
    if found["at"] is None:
        ask()
    return {**found, "curve": curve, "area": float(np.mean(curve[1:]))}


Run = Mapping[str, Any]


def sweep(
    run: Callable[..., dict[str, Any]], arms: Iterable[str], rates: Sequence[float], *size: int
) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """`run(arm, rate, seed, *size)` for every rate and seed of the sweep."""
    return {arm: {rate: [run(arm, rate, seed, *size) for seed in SWEPT] for rate in rates} for arm in arms}


def best(swept: Mapping[float, Sequence[Run]], score: Callable[[Run], float]) -> float:
    """The rate whose runs have the highest mean score."""
    return max(sorted(swept), key=lambda rate: float(np.mean([score(run) for run in swept[rate]])))


def kept_there(run: Run) -> float:
    """What a run kept when it got there; 0 for one that did not."""
    return float(run["kept"]) if run["at"] is not None else 0.0


def scores(
    swept: Mapping[str, Mapping[float, Sequence[Run]]], score: Callable[[Run], float]
) -> dict[str, dict[str, float]]:
    """What is stored of a sweep: the mean score by arm and rate."""
    return {arm: {f"{rate:g}": float(np.mean([score(r) for r in runs])) for rate, runs in by.items()}
            for arm, by in swept.items()}  # fmt: skip


def against(ours: Sequence[Run], theirs: Sequence[Run], what: str) -> dict[str, Any]:
    """Mean of ours - theirs, paired over seeds, with its interval."""
    return mean_interval([a[what] - b[what] for a, b in zip(ours, theirs, strict=True)])


def above(found: Mapping[str, Any]) -> bool:
    """Whether a difference is above 0 with its interval."""
    return found["low"] is not None and found["low"] > 0


def below(found: Mapping[str, Any]) -> bool:
    """Whether a difference is below 0 with its interval."""
    return found["high"] is not None and found["high"] < 0


def told(found: Mapping[str, Any], sign: str = "", digits: int = 2) -> str:
    """Mean and interval; the mean alone for one run."""
    ends = [found["mean"]] if found["low"] is None else [found["mean"], found["low"], found["high"]]
    mean, *rest = [f"{round(end, digits) + 0.0:{sign}.{digits}f}" for end in ends]  # no "-0.00"
    return mean + (f" [{', '.join(rest)}]" if rest else "")
