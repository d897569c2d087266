"""What a sequence of trainings does to the tasks before: the matrix a[i, j] of accuracy on task j after stage i.

    found = forgetting({"before": r0, "chain": r1, "shift": r2})     # each r from `evaluate_tasks` on the same examples
    found.final.mean, found.lost.mean                                # AA and FM
    found.plot()

Final average AA = mean_j a[T, j] and forgetting FM = mean_{j<T} (a[T, j] - a[j, j]), over the tasks trained on; FM is
the "backward transfer" of Lopez-Paz & Ranzato 2017 (arXiv:1706.08840), negative where something was forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.results import Result, stack
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def forgetting(stages: Mapping[str, Result]) -> Forgetting:
    """The forgetting of a sequence: results by the task trained on, in order, each on the same examples of all tasks.

    A first stage whose name is no task is the model before training. Raises `SurgeryError` when examples differ, or
    a later stage is not one of the tasks asked.
    """
    return Forgetting(stack(stages, "stage"))


@dataclass(frozen=True)
class Forgetting:
    """Accuracy of every example after every stage, (examples, stage), with a column `task`; sums are made from it."""

    result: Result

    def __post_init__(self) -> None:
        name, axes = self.result.name, list(self.result.axes)
        if len(axes) != 2 or axes[1] != "stage" or "task" not in self.result.columns:
            raise SurgeryError(f"Result '{name}' has axes {', '.join(axes)}: expected examples, stage; a column task.")
        unknown = [stage for i, stage in enumerate(self.stages) if i and stage not in self.tasks]
        if unknown or not self.trained:
            told = f"stage '{unknown[0]}' is not among them" if unknown else "no stage is one of them"
            hint = "Name each stage by the task it trains on, and ask that task at every stage."
            raise SurgeryError(f"The tasks asked are {', '.join(self.tasks)}; {told}.", hint=hint)

    @property
    def stages(self) -> list[str]:
        """What was trained on, in order; the first may be the model before."""
        return [str(stage) for stage in self.result.axes["stage"]]

    @property
    def tasks(self) -> list[str]:
        """What was asked, in the order in which it was asked."""
        return list(dict.fromkeys(self.result.columns["task"]))

    @property
    def trained(self) -> list[str]:
        """The tasks that a stage trains on, in order."""
        return [stage for stage in self.stages if stage in self.tasks]

    @cached_property
    def matrix(self) -> np.ndarray:
        """a[i, j] (stages, tasks): mean accuracy on task j after stage i."""
        parts = self.result.by("task")
        return np.stack([parts[task].mean for task in self.tasks], axis=1)

    @property
    def final(self) -> Result:
        """After the last stage, the examples of all tasks trained on; the mean is AA."""
        return self._last(dict.fromkeys(self.trained), "final average")

    @property
    def lost(self) -> Result:
        """What the examples of earlier tasks lost (< 0) since their own stage; the mean is FM."""
        return self._last({task: task for task in self.trained[:-1]}, "forgetting")

    @property
    def kept(self) -> Result:
        """How the tasks never trained on changed since the first stage."""
        others = [task for task in self.tasks if task not in self.trained]
        return self._last(dict.fromkeys(others, self.stages[0]), "change of other tasks")

    def summary(self) -> dict[str, Any]:
        """Matrix, AA, FM and the change of other tasks with intervals, as plain JSON."""
        parts = {"final_average": self.final, "forgetting": self.lost, "others": self.kept}
        told = {word: part.summary() if len(part) else None for word, part in parts.items()}
        return {"stages": self.stages, "tasks": self.tasks, "matrix": np.round(self.matrix, 6).tolist(), **told}

    def plot(self) -> Figure:
        """The matrix as a map, the cells of a[j, j] framed."""
        from matplotlib.patches import Rectangle

        from analysis.plots import heat_map

        title = f"final average {self.final.mean:.2f}"
        title += f", forgetting {self.lost.mean:+.2f}" if len(self.lost) else ""
        figure = heat_map(
            self.matrix, self.stages, self.tasks, title=title, unit=self.result.name, row_label="after training on",
            column_label="asked", form=".2f",
        )  # fmt: skip
        axis = figure.axes[0]
        axis.images[0].set_clim(0, 1)
        for task in self.trained:
            corner = self.tasks.index(task) - 0.47, self.stages.index(task) - 0.47
            axis.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="black", linewidth=1.8))
        return figure

    def _last(self, since: Mapping[str, str | None], name: str) -> Result:
        """The last stage minus the stage `since[task]` (None: minus nothing), for the examples of those tasks.

        Tasks count alike, however many examples each has: values are weighted so that their mean is that of the tasks.
        """
        asked = self.result.columns["task"]
        part = self.result.where([task in since for task in asked])
        asked = part.columns["task"]
        column = {stage: i for i, stage in enumerate(self.stages)}
        values = part.values[:, -1].copy()
        for row, task in enumerate(asked):
            start = since[task]
            values[row] -= 0.0 if start is None else part.values[row, column[start]]
            weight = len(part) / (len(since) * asked.count(task))
            values[row] *= weight
        return Result.of(values, part.labels, name=name, columns={"task": asked}, meta=part.meta)
