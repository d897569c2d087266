"""What the experiments on the tiny family share: models that are scored on examples kept apart, and intervals.

An `Arena` is a base, fine-tunings of it and, for every task, validation and test examples with different prompts.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from analysis.evaluate import accuracy, answer_log_likelihood, load
from surgery.tasks import TASKS, Example
from surgery.weights.with_data import loaded

SKILLS = ("facts", "copy", "reverse", "sort")
"""What the base can do and no fine-tuning is for."""
STRING, SUM = 16, 36
"""New tokens that the longest right answers need: of tasks on strings, and of sums worked out."""
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom."""


class Arena:
    """The models of a folder with `tiny-base` and `tiny-<task>`, and `sizes` = {part: examples a task}.

    Parts are disjoint, and do not depend on which tasks are asked for.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], seed: int = 0) -> None:
        self.folder, self.sizes, self.seed = Path(folder), dict(sizes), seed
        self.base, self.tokenizer = load(self.folder / "tiny-base")
        self._examples: dict[str, dict[str, list[Example]]] = {}

    def path(self, name: str) -> str:
        """Folder of the base ("base") or of the fine-tuning on a task."""
        return str(self.folder / f"tiny-{name}")

    def examples(self, task: str, part: str) -> list[Example]:
        """The examples of one part; there are only 200 facts, which are shared out in proportion."""
        if task not in self._examples:
            total = sum(self.sizes.values())
            drawn = TASKS.lookup(task).examples(min(150, total) if task == "facts" else total, 1000 + self.seed)
            self._examples[task] = parts = {}
            share = len(drawn) / total
            for name, size in self.sizes.items():
                count = int(size * share)
                parts[name], drawn = drawn[:count], drawn[count:]
        return self._examples[task][part]

    @contextmanager
    def model(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[Any]:
        """The base, or the base's architecture with other weights for a while."""
        if weights is None:
            yield self.base
        else:
            with loaded(self.base, weights) as model:
                yield model

    def accuracies(
        self, tasks: Sequence[str], part: str, weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """Share of right greedy answers of each task. Tasks with answers of one length are generated in one batch."""
        found: dict[str, float] = {}
        with self.model(weights) as model:
            for longest in sorted({longest_answer(t) for t in tasks}):
                group = [t for t in tasks if longest_answer(t) == longest]
                examples = [(t, e) for t in group for e in self.examples(t, part)]
                right = accuracy(
                    model, self.tokenizer, [e for _, e in examples], TASKS[group[0]].correct,
                    batch_size=1024, max_new_tokens=longest,
                ).values  # fmt: skip
                for task in group:
                    found[task] = float(right[[t == task for t, _ in examples]].mean())
        return {t: found[t] for t in tasks}

    def likelihoods(
        self, tasks: Sequence[str], part: str, weights: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """Mean log-probability (nats a token) of the right responses of each task."""
        found = {}
        with self.model(weights) as model:
            for task in tasks:
                examples = self.examples(task, part)
                prompts, responses = [e.prompt for e in examples], [e.response for e in examples]
                values = answer_log_likelihood(model, self.tokenizer, prompts, responses, batch_size=256).values
                found[task] = float(values.mean())
        return found


def longest_answer(task: str) -> int:
    """New tokens that an answer may take."""
    return SUM if task.startswith(("chain", "direct")) else STRING


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % t interval of independent values (none for one value)."""
    x = np.asarray(values, dtype=float)
    if len(x) < 2:
        return {"mean": float(x.mean()), "low": None, "high": None, "n": len(x)}
    half = T95[min(len(x) - 2, len(T95) - 1)] * x.std(ddof=1) / len(x) ** 0.5
    return {"mean": float(x.mean()), "low": float(x.mean() - half), "high": float(x.mean() + half), "n": len(x)}


def one_thread() -> None:
    """How every worker starts."""
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def in_processes(work: Callable[..., Any], jobs: Sequence[tuple], workers: int) -> list[Any]:
    """`work(*job)` for each job in order; with one worker in this process."""
    if workers == 1 or len(jobs) == 1:
        one_thread()
        return [work(*job) for job in jobs]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=one_thread) as pool:
        return [future.result() for future in [pool.submit(work, *job) for job in jobs]]


def rounded(thing: Any, digits: int = 4) -> Any:
    """Floats of nested lists and dictionaries with `digits` decimals: what is kept in a repository stays small."""
    if isinstance(thing, Mapping):
        return {str(k): rounded(v, digits) for k, v in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [rounded(v, digits) for v in thing]
    return round(thing, digits) if isinstance(thing, float) else thing


def write(out: Path, name: str, report: Mapping[str, Any], figure: Any, began: float) -> Path:
    """`out`/`name`.json with the seconds taken, and the picture beside it."""
    out.mkdir(parents=True, exist_ok=True)
    words = json.dumps(rounded({**report, "seconds": time.perf_counter() - began}), indent=1)
    (out / f"{name}.json").write_text(words + "\n", encoding="utf-8")
    figure.savefig(out / f"{name}.png", dpi=100)
    with Image.open(out / f"{name}.png") as image:  # 64 colours are enough, in a third of the bytes
        small = image.convert("RGB").quantize(64)
    small.save(out / f"{name}.png", optimize=True)
    return out / f"{name}.json"
