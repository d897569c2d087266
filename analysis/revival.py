"""How soon does training bring a skill back? Steps to a target accuracy, on copies, against a model that never had it.

"Reverse fine-tuning" of Jain et al. (ICLR 2024, arXiv:2311.12786): a skill that fine-tuning hid comes back in far fewer
steps, and at smaller learning rates, than one that has to be learnt.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.results import Result
from analysis.similarity import Auc, auc
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Revival:
    """Accuracy of every run along its training."""

    runs: Result
    """(run, step); columns model, lr, seed."""
    target: float

    @property
    def steps(self) -> list[int | None]:
        """The first evaluated step of each run at which it has reached the target; None when it never did."""
        reached = self.runs.values >= self.target
        at = self.runs.axes["step"]
        return [at[int(row.argmax())] if row.any() else None for row in reached]

    @property
    def last(self) -> int:
        """The step at which runs that have not reached the target are censored."""
        return int(self.runs.axes["step"][-1])

    def of(self, model: str, lr: float | None = None) -> list[int | None]:
        """`steps` of one model's runs, at one learning rate or at all."""
        columns = self.runs.columns
        found = [
            step
            for step, name, rate in zip(self.steps, columns["model"], columns["lr"], strict=True)
            if name == model and lr in (None, rate)
        ]
        if not found:
            raise SurgeryError(f"There are no runs of '{model}'" + ("." if lr is None else f" at {lr:g}."),
                               hint=f"Models: {', '.join(dict.fromkeys(columns['model']))}.")  # fmt: skip
        return found

    def summary(self) -> list[dict[str, Any]]:
        """One row a model and learning rate: runs, how many reached the target, the median of their steps, accuracies.

        The median counts censored runs as longer than all; it is None ("more than `censored_at`") when it is one of
        them.
        """
        rows, columns = [], self.runs.columns
        for name, lr in dict.fromkeys(zip(columns["model"], columns["lr"], strict=True)):
            mine = [m == name and r == lr for m, r in zip(columns["model"], columns["lr"], strict=True)]
            steps, part = self.of(name, lr), self.runs.where(mine)
            ordered = sorted(np.inf if s is None else s for s in steps)
            median = float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
            rows.append({
                "model": name, "lr": lr, "runs": len(steps), "reached": sum(s is not None for s in steps),
                "median_steps": median if np.isfinite(median) else None, "censored_at": self.last,
                "before": float(part.values[:, 0].mean()), "after": float(part.values[:, -1].mean()),
            })  # fmt: skip
        return rows

    def sooner(self, model: str, control: str, lr: float | None = None) -> Auc:
        """Probability that a run of `model` reaches the target before one of `control`, ties half, with its interval.

        A censored run is later than all that reached it; two censored ones tie.
        """
        late, soon = ([np.inf if s is None else float(s) for s in self.of(name, lr)] for name in (control, model))
        return auc(late, soon)

    def plot(self, title: str = "") -> Figure:
        """Accuracy by step, a panel a learning rate: a thin line a run, a thick one the mean of a model's runs."""
        from analysis.style import COLOURS, DASHES, MARKERS, bare, blank, legend_below

        columns, at = self.runs.columns, self.runs.axes["step"]
        rates, names = list(dict.fromkeys(columns["lr"])), list(dict.fromkeys(columns["model"]))
        figure, grid = blank(3.4 * len(rates) + 0.6, 3.4, title, columns=len(rates))
        for panel, (axis, lr) in enumerate(zip(np.ravel(grid), rates, strict=True)):
            for i, name in enumerate(names):
                mine = [m == name and r == lr for m, r in zip(columns["model"], columns["lr"], strict=True)]
                values = self.runs.values[mine]
                style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
                for row in values if len(values) > 1 else ():
                    axis.plot(at, row, linewidth=0.6, alpha=0.55, **style)
                style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 4, "markevery": max(1, len(at) // 8)}
                style |= {"markerfacecolor": "white"} if i % 2 else {}
                axis.plot(at, values.mean(0), linewidth=1.8, label=None if panel else name, **style)
            axis.axhline(self.target, color="0.4", linewidth=0.9, linestyle=(0, (1, 2)))
            axis.set(title=f"learning rate {lr:g}", xlabel="step", ylim=(-0.03, 1.03))
            axis.title.set_fontsize("small")
            bare(axis)
        np.ravel(grid)[0].set_ylabel(f"accuracy (dotted: target {self.target:g})")
        legend_below(figure)
        return figure


def revival(
    models: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    test_rows: Sequence[Mapping[str, Any]],
    *,
    lrs: Sequence[float],
    steps: int,
    target: float = 0.9,
    every: int = 10,
    seeds: Sequence[int] = (0,),
    batch_rows: int = 32,
    max_new_tokens: int = 64,
    **recipe: Any,
) -> Revival:
    """Trains copies of each model on `rows` (prompt, completion) by SFT, and asks `test_rows` every so many steps.

    `models` by name: the one whose skill is hidden, and the control that never had it; a model, or a function of the
    seed that gives one (another control for every seed). A run is one model, learning rate and seed; the models given
    stay as they are. `recipe` holds further words of `surgery.training.train`. Accuracy is of greedy answers, before
    training and at steps `every`, 2 `every`, ..., `steps`: that is how finely steps are counted.
    Raises `SurgeryError` when there is nothing to run, and whatever `train` does.
    """
    from torch import nn

    from surgery.training import train
    from surgery.training.data import ListRows

    if not models or not lrs or not seeds:
        raise SurgeryError("A revival needs at least one model, learning rate and seed.")
    if not 0 < target <= 1:
        raise SurgeryError(f"The target is an accuracy above 0 and at most 1, and not {target}.")
    settings = {
        "objective": "sft", "data": ListRows(rows), "steps": steps, "batch": {"rows": batch_rows},
        "evaluate": {"every": every, "data": ListRows(test_rows), "n": len(test_rows),
                     "max_new_tokens": max_new_tokens},
    }  # fmt: skip
    labels: list[tuple[str, float, int]] = []
    values: list[list[float]] = []
    at: list[int] = []
    for name, source in models.items():
        for seed in seeds:
            start = source if isinstance(source, nn.Module) else source(seed)
            for lr in lrs:
                optimizer = {"shape": "constant", **recipe.get("optimizer", {}), "lr": lr}
                words = {**settings, **recipe, "optimizer": optimizer, "seed": seed}
                run = train(copy.deepcopy(start), tokenizer, **words)
                if any("accuracy" not in each for each in run.evaluations):
                    raise SurgeryError("The test rows have no answer that can be checked.",
                                       hint="Each needs `prompt`, `answer` and `task`.")  # fmt: skip
                at = [int(each["step"]) for each in run.evaluations]
                values.append([each["accuracy"] for each in run.evaluations])
                labels.append((name, float(lr), seed))
    columns = dict(zip(("model", "lr", "seed"), map(list, zip(*labels, strict=True)), strict=True))
    axes: dict[str, Sequence[Any]] = {"run": [f"{n}, lr {lr:g}, seed {s}" for n, lr, s in labels], "step": at}
    return Revival(Result(np.array(values), axes, "accuracy", columns), target)
