"""Do Model Breadcrumbs stand more tasks than task arithmetic, with a scale that is chosen once (arXiv:2312.06795)?

    python experiments/merging_tradeoff.py            # trains three tiny families into the cache, then merges
    python experiments/merging_tradeoff.py --fast     # on the shipped family, a check that it runs

Merges k = 1..6 fine-tunings of the tiny base in several orders. Each method's scale is chosen on validation examples
of the first one and the first two tasks, and kept as tasks are added; densities are the methods' published defaults.
Measured on other examples: accuracy on the merged tasks, each divided by that of its own fine-tuning, and what is left
of the base's skills. Also a sweep of the scale with all tasks merged, and the scale that validation on all tasks would
have chosen. Families (seeds of base, fine-tunings and examples) are the independent units of the intervals.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from arena import SKILLS, Arena, in_processes, mean_interval, rounded, write
from build_zoo import build_family
from matplotlib.figure import Figure

from analysis.plots import COLOURS, DASHES, MARKERS
from surgery.weights.merge import merge_in_memory
from surgery.zoo import TINY

TASKS: tuple[str, ...] = ("chain", "shift", "descend", "unique", "swap", "rotate")
METHODS: dict[str, dict[str, Any]] = {
    "task arithmetic": {"method": "task_arithmetic"},
    "TIES": {"method": "ties", "density": 0.2},
    "DARE-TIES": {"method": "dare_ties", "density": 0.1},
    "breadcrumbs": {"method": "breadcrumbs", "weight": 1.0, "density": 0.15, "top": 0.006},
    "breadcrumbs by row": {"method": "breadcrumbs", "weight": 1.0, "density": 0.15, "top": 0.006, "scope": "row"},
}
"""By row is the authors' code, by tensor mergekit's and our default."""
SCALES: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
SIZES = {"validation": 64, "test": 128}


class Trial(Arena):
    """Merges of one family, and their accuracy over that of the single fine-tunings."""

    def __init__(self, folder: Path, sizes: dict[str, int], seed: int) -> None:
        super().__init__(folder, sizes, seed)
        self._single: dict[tuple[str, str], float] = {}
        self._before: dict[str, float] = {}

    def single(self, task: str, part: str) -> float:
        """Accuracy of the fine-tuning on its own task."""
        if (task, part) not in self._single:
            recipe = {"method": "passthrough", "models": [self.path(task)]}
            weights = merge_in_memory(recipe, threads=1)
            self._single[task, part] = self.accuracies([task], part, weights)[task]
        return self._single[task, part]

    def merged(self, method: str, tasks: Sequence[str], scale: float) -> dict:
        """The weights of base + scale * what `method` makes of the tasks' vectors."""
        parameters = {**METHODS[method], "scale": scale}
        recipe = {"method": parameters.pop("method"), "base": self.path("base"),
                  "models": [self.path(t) for t in tasks], "parameters": parameters, "seed": self.seed}  # fmt: skip
        return merge_in_memory(recipe, threads=1)

    def normalised(self, weights: dict | None, tasks: Sequence[str], part: str) -> float:
        """Mean over the tasks of accuracy / accuracy of the task's own fine-tuning."""
        found = self.accuracies(tasks, part, weights)
        return float(np.mean([found[t] / self.single(t, part) for t in tasks]))

    def skills(self, weights: dict | None) -> float:
        """Mean test accuracy on the base's skills over that of the base."""
        self._before = self._before or self.accuracies(SKILLS, "test")
        found = self.accuracies(SKILLS, "test", weights)
        return float(np.mean([found[s] / self._before[s] for s in SKILLS]))


def best(scores: dict[float, float]) -> float:
    """The scale of the highest score; of equals the smallest."""
    return min(scores, key=lambda scale: (-scores[scale], scale))


def one_order(folder: Path, seed: int, order: Sequence[str], sizes: dict, scales: Sequence[float]) -> dict:
    """One family, tasks added in one order: {method: chosen scale, validation, tasks and skills by k}."""
    trial, found = Trial(folder, sizes, seed), {}
    for method in METHODS:
        scores = {}
        for scale in scales:
            parts = [(order[:k], trial.merged(method, order[:k], scale)) for k in (1, 2)]
            scores[scale] = float(np.mean([trial.normalised(w, part, "validation") for part, w in parts]))
        kept = best(scores)
        merges = [trial.merged(method, order[:k], kept) for k in range(1, len(order) + 1)]
        found[method] = {
            "scale": kept,
            "validation": scores,
            "tasks": [trial.normalised(w, order[:k], "test") for k, w in enumerate(merges, 1)],
            "skills": [trial.skills(w) for w in merges],
        }
    base = [trial.normalised(None, order[:k], "test") for k in range(1, len(order) + 1)]
    return {"seed": seed, "order": list(order), "base": base, "methods": found}


def sweep(folder: Path, seed: int, tasks: Sequence[str], sizes: dict, scales: Sequence[float]) -> dict:
    """One family, all tasks merged at every scale; `retuned` is the scale that validation on all tasks chooses."""
    trial, found = Trial(folder, sizes, seed), {}
    for method in METHODS:
        validation, test = {}, {}
        for scale in scales:
            weights = trial.merged(method, tasks, scale)
            validation[scale] = trial.normalised(weights, tasks, "validation")
            test[scale] = trial.normalised(weights, tasks, "test")
        kept = best(validation)
        found[method] = {"tasks": list(test.values()), "retuned": {"scale": kept, "tasks": test[kept]}}
    return {"seed": seed, "methods": found}


def by_family(rows: Sequence[dict], value) -> list[float]:
    """Means over the orders of a family: one number a family."""
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    return [float(np.mean([value(row) for row in rows if row["seed"] == seed])) for seed in seeds]


def summary(rows: Sequence[dict], sweeps: Sequence[dict]) -> dict:
    """Means and intervals over families: by k, paired differences from breadcrumbs, and the cost of not re-tuning."""
    count = len(rows[0]["order"])
    table: dict[str, Any] = {
        method: {
            what: [mean_interval(by_family(rows, lambda r: r["methods"][method][what][k])) for k in range(count)]  # noqa: B023
            for what in ("tasks", "skills")
        } | {"scales": sorted(r["methods"][method]["scale"] for r in rows),
             "retuned": mean_interval([s["methods"][method]["retuned"]["tasks"] for s in sweeps]),
             "retuned_scales": [s["methods"][method]["retuned"]["scale"] for s in sweeps]}
        for method in METHODS
    }  # fmt: skip
    pairs = [(method, "task arithmetic") for method in METHODS if method != "task arithmetic"]
    pairs += [(method, "TIES") for method in METHODS if method.startswith("breadcrumbs")]
    differences = {
        f"{one} - {other}": [
            mean_interval(
                by_family(rows, lambda r: r["methods"][one]["tasks"][k] - r["methods"][other]["tasks"][k])  # noqa: B023
            )
            for k in range(count)
        ]
        for one, other in pairs
    }
    verdicts = {m: verdict(differences[f"{m} - task arithmetic"]) for m in METHODS if m.startswith("breadcrumbs")}
    return {"methods": table, "differences": differences, "verdicts": verdicts}


def verdict(differences: Sequence[dict]) -> str:
    """Fixed before any number was seen: better with all tasks merged, interval above 0, and more so than with two."""
    last, two = differences[-1], differences[1]
    if last["low"] is None:
        return "not tested (one family)"
    if last["low"] > 0 and last["mean"] > two["mean"]:
        return "held"
    return "did not hold: worse" if last["high"] < 0 else "did not hold: no clear difference"


def picture(found: dict, sweeps: Sequence[dict], scales: Sequence[float], base: Sequence[float]) -> Figure:
    """Tasks and skills by k at the kept scale, paired differences with intervals, and all tasks by scale."""
    figure = Figure(figsize=(9.5, 7), layout="constrained")
    (tasks, paired), (skills, swept) = figure.subplots(2, 2)
    ks = np.arange(1, len(base) + 1)
    for i, (method, row) in enumerate(found["methods"].items()):
        style: dict[str, Any] = {"marker": MARKERS[i], "color": COLOURS[i], "linestyle": DASHES[i], "markersize": 5,
                                 "markerfacecolor": "white" if i % 2 else COLOURS[i]}  # fmt: skip
        tasks.plot(ks, [m["mean"] for m in row["tasks"]], label=method, **style)
        skills.plot(ks, [m["mean"] for m in row["skills"]], **style)
        curve = np.mean([s["methods"][method]["tasks"] for s in sweeps], axis=0)
        swept.plot(scales, curve, **style)
        kept = float(np.median(row["scales"]))
        swept.plot(kept, np.interp(kept, scales, curve), marker="o", markersize=11, color=COLOURS[i], fillstyle="none")
        if difference := found["differences"].get(f"{method} - task arithmetic"):
            mean = [m["mean"] for m in difference]
            ends = [(m["mean"] if m["low"] is None else m["low"], m["mean"] if m["high"] is None else m["high"])
                    for m in difference]  # fmt: skip
            spread = [[m - low for m, (low, _) in zip(mean, ends, strict=True)],
                      [high - m for m, (_, high) in zip(mean, ends, strict=True)]]  # fmt: skip
            paired.errorbar(ks + 0.1 * (i - 2.5), mean, spread, capsize=2, elinewidth=0.8, **style)
    tasks.plot(ks, base, color="0.5", linewidth=1, linestyle=":", label="base, not merged")
    paired.axhline(0, color=COLOURS[0], linewidth=1)
    tasks.set(xlabel="tasks merged", ylabel="accuracy / own fine-tuning's", title="Merged tasks, scale kept from k ≤ 2")
    paired.set(xlabel="tasks merged", ylabel="difference", title="Less task arithmetic's, 95 % over families")
    skills.set(xlabel="tasks merged", ylabel="accuracy / base's", title="The base's other skills")
    swept.set(xlabel="scale (ring: median kept)", xscale="log", ylabel="accuracy / own fine-tuning's",
              title=f"All {len(base)} tasks, by scale")  # fmt: skip
    swept.set_xticks([0.2, 0.5, 1, 2, 4], ["0.2", "0.5", "1", "2", "4"])
    swept.minorticks_off()
    for axis in (tasks, skills, swept):
        axis.set_ylim(0, 1.05)
    for axis in (tasks, paired, skills, swept):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9", linewidth=0.7)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def markdown(found: dict) -> str:
    """Methods in rows, number of tasks in columns."""
    count = len(next(iter(found["methods"].values()))["tasks"])
    lines = ["| method | scales kept | " + " | ".join(f"k={k}" for k in range(1, count + 1)) + " | skills | re-tuned |"]
    lines.append("|---" * (count + 4) + "|")
    for method, row in found["methods"].items():
        cells = [method, f"{row['scales'][0]:g} to {row['scales'][-1]:g}", *(f"{m['mean']:.2f}" for m in row["tasks"])]
        lines.append(
            "| " + " | ".join([*cells, f"{row['skills'][-1]['mean']:.2f}", f"{row['retuned']['mean']:.2f}"]) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="families, trained where missing")
    parser.add_argument("--orders", type=int, default=2, help="orders of the tasks in each family")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="few examples on the shipped family: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    tasks: tuple[str, ...]
    if options.fast:
        tasks, sizes, scales, workers, count = ("shift", "rotate"), {"validation": 8, "test": 16}, SCALES[4::3], 1, 1
        families = {0: TINY}
    else:
        tasks, sizes, scales, workers, count = TASKS, SIZES, SCALES, options.workers, options.orders
        built = {seed: build_family(None, tasks, seed, workers=workers) for seed in options.seeds}
        families = {seed: members["tiny-base"].parent for seed, members in built.items()}
    jobs = []
    for seed, folder in families.items():
        rng = Random(seed)
        jobs += [(folder, seed, rng.sample(tasks, len(tasks)), sizes, scales) for _ in range(count)]
    rows = in_processes(one_order, jobs, workers)
    sweeps = in_processes(sweep, [(folder, seed, tasks, sizes, scales) for seed, folder in families.items()], workers)
    found = summary(rows, sweeps)
    base = [float(np.mean([row["base"][k] for row in rows])) for k in range(len(tasks))]
    report = {"tasks": list(tasks), "sizes": sizes, "scales": list(scales), "parameters": METHODS, "base": base,
              "summary": found, "orders": rows, "sweeps": sweeps}  # fmt: skip
    path = write(options.out, "merging_tradeoff", report, picture(found, sweeps, scales, base), began)
    print(markdown(rounded(found)))
    for ours, said in found["verdicts"].items():
        print(f"{ours} over task arithmetic as tasks grow: {said}")
    print(path)


if __name__ == "__main__":
    main()
