"""The demonstration: a vector's life on the embedded tiny family, with scores, figures and a report to read."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from analysis.geometry import Geometry
    from analysis.results import Result

Progress = Callable[[str, int, int], None]
"""Called with (what was just done, steps done, steps in all)."""

MERGES: dict[str, dict[str, float]] = {
    "task_arithmetic": {"weight": 0.8},
    "ties": {"density": 0.3, "scale": 1.2},
    "breadcrumbs": {"weight": 0.8, "density": 0.5},
}
"""The methods shown and their parameters, in our words."""
TUNED = ("chain", "shift", "rotate")
"""The fine-tunings that are merged."""
KEPT_SKILLS = ("facts", "sort")
"""What the base can do already, and should not forget."""


@dataclass
class Demo:
    """What `demo` made: scores per model and task, and where everything is."""

    out: Path
    results: dict[str, Result] = field(repr=False)
    """Per model: one value an example, the task as a column."""
    geometry: Geometry = field(repr=False)
    vector_bytes: dict[str, int]
    seconds: float

    @property
    def accuracies(self) -> dict[str, dict[str, float]]:
        """Share of right answers per model and task."""
        return {model: {task: float(part.mean) for task, part in result.by("task").items()}
                for model, result in self.results.items()}  # fmt: skip

    @property
    def report(self) -> Path:
        """The Markdown page."""
        return self.out / "report.md"

    def figure(self, name: str) -> Path:
        """One of "accuracy", "heat map", "cosine", "conflict"."""
        return self.out / "figures" / f"{name.replace(' ', '_')}.png"

    def told(self) -> list[str]:
        """What was found, in a few lines for a terminal."""
        mean = {model: sum(row.values()) / len(row) for model, row in self.accuracies.items()}
        width = max(map(len, mean))
        lines = [*self.geometry.summary(), "", "Right answers, mean over all tasks:"]
        lines += [f"  {model:<{width}}  {share:4.0%}" for model, share in mean.items()]
        return [*lines, "", f"Report: {self.report}", f"Figures: {self.out / 'figures'}",
                f"Done in {self.seconds:.0f} s."]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return {
            "out": str(self.out),
            "report": str(self.report),
            "figures": [str(self.figure(name)) for name in ("accuracy", "heat map", "cosine", "conflict")],
            "accuracies": self.accuracies,
            "merges": MERGES,
            "vector_bytes": self.vector_bytes,
            "geometry": self.geometry.to_dict(),
            "seconds": round(self.seconds, 2),
        }


def demo(
    out: str | Path = "surgery-demo", *, n: int = 100, force: bool = False, progress: Progress | None = None
) -> Demo:
    """Vectors of the tiny family extracted, inspected and merged by three methods, and every model scored.

    Writes vectors, merged models, figures, `report.md` and `report.json` into the folder `out`; `n` examples of each
    task are asked (at most 100 where a task has few). Takes some seconds on a CPU. Raises `SurgeryError` when `out`
    exists, unless `force` and it holds an earlier demo.
    """
    from analysis.evaluate import evaluate_tasks
    from analysis.geometry import geometry
    from surgery import zoo
    from surgery.models import no_bars
    from surgery.weights.merge import merge
    from surgery.weights.recipe import recipe_from_command
    from surgery.weights.vector import TaskVector

    began, out = time.perf_counter(), Path(out).expanduser()
    base = str(zoo.get("tiny-base"))
    skills = list(TUNED)
    tuned = {skill: str(zoo.get(f"tiny-{skill}")) for skill in skills}
    steps = _Steps(2 * len(skills) + 2 * len(MERGES) + 3, progress)
    with _folder(out, force) as folder, no_bars():
        sizes = {}
        for skill, path in tuned.items():
            vector = TaskVector.between(base, path)
            sizes[skill] = vector.save(folder / "vectors" / f"{skill}.safetensors", "lossless").nbytes
            steps.done(f"vector of {skill}")
        found = geometry(base, tuned)
        found.save(folder / "geometry")
        steps.done("geometry")
        models = {"base": base, **tuned}
        for method, parameters in MERGES.items():
            target = folder / "merged" / method
            merge(recipe_from_command(method, list(tuned.values()), base, parameters), target)
            models[f"merged: {method}"] = str(target)
            steps.done(f"merged by {method}")
        tasks, results = [*KEPT_SKILLS, *skills], {}
        for model, path in models.items():
            results[model] = evaluate_tasks(path, tasks, n=n)
            steps.done(f"scored {model}")
        made = Demo(folder, results, found, sizes, 0.0)
        _draw(made, skills[0])
        steps.done("figures")
        made.out, made.seconds = out, time.perf_counter() - began
        (folder / "report.json").write_text(json.dumps(made.to_dict(), indent=1), encoding="utf-8")
        (folder / "report.md").write_text(_page(made, skills), encoding="utf-8")
    return made


def _draw(made: Demo, skill: str) -> None:
    import numpy as np

    from analysis import plots

    scores = made.accuracies
    tasks = list(next(iter(scores.values())))
    grid = 100 * np.array([[row[task] for task in tasks] for row in scores.values()])
    figure = plots.heat_map(grid, list(scores), tasks, title="Right answers", unit="% right", row_label="model",
                            column_label="task", form=".0f")  # fmt: skip
    plots.save(figure, made.figure("accuracy"))
    plots.save(made.geometry.plot("heat map", vector=skill), made.figure("heat map"))
    for kind in ("cosine", "conflict"):
        plots.save(made.geometry.plot(kind), made.figure(kind))


def _page(made: Demo, skills: list[str]) -> str:
    """The report, to be read beside the figures."""
    scores = made.accuracies
    tasks = list(next(iter(scores.values())))
    examples = {task: len(part) for task, part in next(iter(made.results.values())).by("task").items()}
    rows = {model: [f"{row[task]:.0%}" for task in tasks] for model, row in scores.items()}
    members, stored = " ".join(f"tiny-{skill}" for skill in skills), made.vector_bytes
    methods = {method: ", ".join(f"{k} {v:g}" for k, v in given.items()) for method, given in MERGES.items()}
    return f"""# A vector's life

A tiny language model (`tiny-base`, {made.geometry.sums["numel"].sum():,.0f} numbers) was fine-tuned on \
{len(skills)} tasks, one at a time. Here the differences are taken out, looked at, and put together into one model.

## What fine-tuning changed

{_list(made.geometry.summary())}

![Change by layer and module](figures/heat_map.png)
![Cosines of the vectors](figures/cosine.png)
![Sign conflicts by layer](figures/conflict.png)

Stored without loss: {", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in stored.items())}. These models were \
trained in float32, so nearly every number moved; vectors of bfloat16 models are far smaller.

## One model of {len(skills)}

Merged by {"; ".join(f"{method} ({given})" for method, given in methods.items())}. Right answers, greedy decoding, \
{min(examples.values())} examples a task; `{"`, `".join(KEPT_SKILLS)}` are what the base could do before:

{_table(["model", *tasks], rows)}

![Right answers by model and task](figures/accuracy.png)

Each fine-tuning learned one new task; the merged models were not trained any further. Which method and which \
numbers are best depends on the vectors: these were chosen by hand, and `surgery.weights.with_data.tune` finds them by \
score.

## By hand

```
surgery vector inspect tiny-base {members}
surgery vector extract tiny-base tiny-{skills[0]} -o {skills[0]}.safetensors
surgery vector apply {skills[0]}.safetensors tiny-base -o half-a-{skills[0]} --scale 0.5
surgery merge --method ties --base tiny-base {members} --set density=0.3 --set scale=1.2 -o merged
```
"""


def _list(lines: list[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _table(head: list[str], rows: Mapping[str, list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([name, *cells] for name, cells in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class _Steps:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.count, self.progress = total, 0, progress

    def done(self, what: str) -> None:
        self.count += 1
        if self.progress is not None:
            self.progress(what, self.count, self.total)


@contextmanager
def _folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end; with `force` an earlier demo there makes room."""
    from surgery.checkpoint.writer import check_target

    check_target(out, force=force)
    if out.exists() and not (out / "report.json").is_file():
        raise SurgeryError(f"{out} holds no earlier demo, and is not replaced.", hint="Choose another folder.")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        for name in ("vectors", "merged", "figures"):
            (folder / name).mkdir()
        yield folder
        folder.chmod(0o755)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
