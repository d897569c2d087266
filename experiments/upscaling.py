"""Can a large base borrow the fine-tuning of a small one at its outputs (emulated fine-tuning, arXiv:2310.12962)?

    python experiments/upscaling.py            # five fine-tunings of each task and size
    python experiments/upscaling.py --fast     # one of two steps on few questions, a check that it runs

large + beta * (tuned - small): tiny-base (447,552 parameters) with fine-tunings of tiny-small-base (163,072) on sums,
shifted, rotated and descending strings, each by the zoo's recipe (60 steps) with five seeds. Fine-tunings of tiny-base
itself with the same data are shown as the ceiling, and the other direction, small + (large tuned - large), as a
control. Greedy answers to 192 held-out questions of the task, and of 64 each copied, reversed and sorted (skills).

Where the large base knows more: questions whose right response is at least e times as likely under the large base as
under the small one, of each task; counted where there are 20 or more.

Mixtures: large + l * (tuned_1 - small) + (1 - l) * (tuned_2 - small), l = 0, 0.1, ... 1, for three pairs of tasks. With
u and v the accuracies on the two tasks, each as a share of the way from one end to the other, u + v - 1 says how far a
point lies beyond the straight line between the ends (below 0: the line dominates it). Beside it: both rewards in full.

Filters: where a token lies outside of the nucleus (0.9 or 0.99) of the large base, the reward counts nothing
(conservative decoding); nuclei of the tuned model and of the composition for comparison.

Known from a trial on the zoo's pair and one seed (0) of each task, 64 questions: sums are at 1.00 from beta 0.25 to 3,
skills fall from 2 on, descending strings are best at 1; and for mixtures, of the same pairs, that sums and shift lie
beyond the line and rotate and descend near it. That is why beta goes to 4. The seeds below were not seen.

Held, by intervals over seeds and questions: (1) at beta 1 the large base with the difference is above the large base,
on every task; (2) where the large base knows more, it is above the small tuned model, on every task counted; (3) the
curve of mean accuracy over beta has no valley deeper than 0.02, and its peak is above both ends of the grid, on every
task; (4) for every pair no mean of u + v - 1 is below -0.02 and u rises, v falls along l (valleys up to 0.02); (5)
amplification: 1.5 is above 1, mean over tasks; (6) the filter: at beta 2, the base's nucleus of 0.9, skills are above
those without it and the task's accuracy is no more than 0.02 lower; and they are above the best skills that any beta
has without a filter at the same accuracy (less 0.01; where none has it, at the nearest), means over tasks; (7)
knowledge stays in the base: on sums scaling down is below scaling up. Some of several: in part.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from arena import in_processes, mean_interval, rounded, write
from build_zoo import tuned_on
from logit_arena import KEPT, answered, bare, fine_tuned, questions
from long_sums import difference, told
from matplotlib.figure import Figure
from tuning_contribution import above, told_of

from analysis.evaluate import answer_log_likelihood
from analysis.plots import MARKERS
from analysis.results import Result
from surgery.logits import Ensemble, member, rules
from surgery.models import load

LARGE, SMALL = "tiny-base", "tiny-small-base"
TASKS = {"chain": "sums", "shift": "shift", "rotate": "rotate", "descend": "descend"}
PAIRS = (("chain", "shift"), ("shift", "rotate"), ("rotate", "descend"))
FILTERS = {"base 0.9": (0.9, "base"), "base 0.99": (0.99, "base"), "tuned 0.9": (0.9, "tuned"),
           "scores 0.9": (0.9, "scores")}  # fmt: skip
PRIMARY = "base 0.9"
SETTINGS: dict[str, Any] = {
    "steps": 60, "rows": 64, "test": 192, "betas": (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0),
    "filtered": (1.0, 2.0, 3.0), "lambdas": tuple(i / 10 for i in range(11)),
}  # fmt: skip
FAST = {**SETTINGS, "steps": 2, "rows": 4, "test": 6, "betas": (0.0, 1.0, 2.0), "filtered": (2.0,),
        "lambdas": (0.0, 0.5, 1.0)}  # fmt: skip
MARGIN, LEAST, VALLEY = 1.0, 20, 0.02
Scores = dict[str, Result]


# ---- measuring


def asked(settings: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Held-out questions of every task, and of the skills."""
    return {task: questions([task], settings["test"]) for task in TASKS} | {"skills": questions(KEPT, settings["test"])}


def margins(settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """By task: log p of each right response under the large base minus under the small one, nats."""
    found = {}
    for task, rows in asked(settings).items():
        sums = []
        for name in (LARGE, SMALL):
            texts = [row["prompt"] for row in rows], [row["completion"] for row in rows]
            result = answer_log_likelihood(*load(name), *texts, batch_size=256)
            sums.append(result.values * np.array(result.columns["tokens"]))
        found[task] = sums[0] - sums[1]
    return found


def measured(seed: int, settings: Mapping[str, Any]) -> dict[str, Scores]:
    """Everything of one seed: by "task/what", answers to the task's questions and to those of the skills."""
    rows, tokenizer = asked(settings), load(LARGE)[1]
    large, small = (member(*load(name), name=name) for name in (LARGE, SMALL))
    tuned = {}
    for task in TASKS:
        (stage,) = tuned_on(task).stages
        stages = [replace(stage, steps=settings["steps"], batch=settings["rows"])]
        tuned[task] = {
            size: member(fine_tuned(base, stages, seed), tokenizer, name=f"{size} {task}")
            for size, base in (("large", LARGE), ("small", SMALL))
        }
    found: dict[str, Scores] = {}

    def score(name: str, composed: Ensemble, *parts: str) -> None:
        found[name] = {part: answered(composed, tokenizer, rows[part]) for part in parts}

    for task, own in tuned.items():
        both = (task, "skills")
        score(f"{task}/large", large, *both)
        score(f"{task}/small", small, *both)
        score(f"{task}/large tuned", own["large"], *both)
        score(f"{task}/small tuned", own["small"], *both)
        score(f"{task}/down", rules.eft(small, own["large"], large), *both)
        for beta in settings["betas"]:
            score(f"{task}/beta {beta:g}", rules.eft(large, own["small"], small, beta), *both)
        for name, (p, on) in FILTERS.items():
            for beta in settings["filtered"]:
                composed = rules.eft(large, own["small"], small, beta, filter_p=p, filter_on=on)
                score(f"{task}/{name}, beta {beta:g}", composed, *both)
    for pair in PAIRS:
        rewards = [tuned[task]["small"] for task in pair]
        for share in settings["lambdas"]:
            score(f"{'+'.join(pair)}/{share:g}", rules.mixture(large, rewards, small, share), *pair)
        score(f"{'+'.join(pair)}/both in full", rules.mixture(large, rewards, small, (1.0, 1.0)), *pair, "skills")
    return found


# ---- what came out


def valley(curve: Sequence[float]) -> float:
    """How deep the deepest point lies below the lower of the highest points on its two sides; 0 with one peak."""
    depths = [min(max(curve[: i + 1]), max(curve[i:])) - value for i, value in enumerate(curve)]
    return float(max(depths))


def of_betas(runs: Mapping[int, Mapping[str, Scores]], task: str, betas: Sequence[float]) -> dict[str, Any]:
    """The sweep of one task: means, the valley of their curve, how far the peak is above both ends."""
    curves = [[float(run[f"{task}/beta {beta:g}"][task].mean) for beta in betas] for run in runs.values()]
    skills = [[float(run[f"{task}/beta {beta:g}"]["skills"].mean) for beta in betas] for run in runs.values()]
    mean = np.mean(curves, 0)
    peak = int(mean.argmax())
    return {
        "target": [mean_interval(list(values)) for values in zip(*curves, strict=True)],
        "skills": [mean_interval(list(values)) for values in zip(*skills, strict=True)],
        "valley": valley(mean.tolist()), "peak": betas[peak],
        "over the first": mean_interval([curve[peak] - curve[0] for curve in curves]),
        "over the last": mean_interval([curve[peak] - curve[-1] for curve in curves]),
    }  # fmt: skip


def of_shares(
    runs: Mapping[int, Mapping[str, Scores]], pair: tuple[str, str], shares: Sequence[float]
) -> dict[str, Any]:
    """The mixtures of two rewards: accuracies, and how far beyond the line between the ends."""
    name = "+".join(pair)
    first, second = (
        [[float(run[f"{name}/{s:g}"][task].mean) for s in shares] for run in runs.values()] for task in pair
    )
    beyond = []
    for x, y in zip(first, second, strict=True):
        ways = (x[-1] - x[0], y[0] - y[-1])
        beyond.append([
            (a - x[0]) / ways[0] + (b - y[-1]) / ways[1] - 1 if all(ways) else 0.0 for a, b in zip(x, y, strict=True)
        ])  # fmt: skip
    mean = np.mean(first, 0).tolist(), np.mean(second, 0).tolist()
    full = {task: mean_interval([float(r[f"{name}/both in full"][task].mean) for r in runs.values()])
            for task in (*pair, "skills")}  # fmt: skip
    return {
        "first": [mean_interval(list(v)) for v in zip(*first, strict=True)],
        "second": [mean_interval(list(v)) for v in zip(*second, strict=True)],
        "beyond": [mean_interval(list(v)) for v in zip(*beyond, strict=True)],
        "both in full": full,
        "ordered": fall(mean[0]) <= VALLEY and fall(mean[1][::-1]) <= VALLEY,
    }  # fmt: skip


def fall(curve: Sequence[float]) -> float:
    """How far a curve that should rise falls below what it had."""
    return float(np.max(np.maximum.accumulate(curve) - np.array(curve)))


def frontier(points: Sequence[tuple[float, float]], least: float) -> float:
    """The best second number of points whose first is at least `least`; where none is, that of the nearest to it."""
    reached = [second for first, second in points if first >= least]
    return max(reached) if reached else max(points)[1]


def of_filters(runs: Mapping[int, Mapping[str, Scores]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Means over tasks: the filter against none at the same beta, and against any beta of the same accuracy."""

    def pair(run: Mapping[str, Scores], task: str, what: str) -> tuple[float, float]:
        scores = run[f"{task}/{what}"]
        return float(scores[task].mean), float(scores["skills"].mean)

    found: dict[str, Any] = {}
    for beta in settings["filtered"]:
        for name in FILTERS:
            gains, costs, beyond, points = [], [], [], []
            for run in runs.values():
                plain = {t: [pair(run, t, f"beta {b:g}") for b in settings["betas"]] for t in TASKS}
                with_it = {t: pair(run, t, f"{name}, beta {beta:g}") for t in TASKS}
                without = {t: pair(run, t, f"beta {beta:g}") for t in TASKS}
                gains.append(np.mean([with_it[t][1] - without[t][1] for t in TASKS]))
                costs.append(np.mean([with_it[t][0] - without[t][0] for t in TASKS]))
                beyond.append(np.mean([with_it[t][1] - frontier(plain[t], with_it[t][0] - 0.01) for t in TASKS]))
                points.append([np.mean([with_it[t][i] for t in TASKS]) for i in (0, 1)])
            found[f"{name}, beta {beta:g}"] = {
                "target": mean_interval([float(p[0]) for p in points]),
                "skills": mean_interval([float(p[1]) for p in points]),
                "skills gained": mean_interval([float(g) for g in gains]),
                "target gained": mean_interval([float(c) for c in costs]),
                "over any beta": mean_interval([float(b) for b in beyond]),
            }
    return found


def summarised(
    runs: Mapping[int, Mapping[str, Scores]], known: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All tables, and the verdicts of the docstring."""

    def against(ours: str, theirs: str, part: str, keep: np.ndarray | None = None) -> dict[str, Any]:
        pick = (lambda r: r) if keep is None else (lambda r: r.where(keep))
        sides = [{seed: pick(run[name][part]) for seed, run in runs.items()} for name in (ours, theirs)]
        return difference(*sides)

    tasks: dict[str, Any] = {}
    for task in TASKS:
        up = f"{task}/beta 1"
        more = known[task] >= MARGIN
        one: dict[str, Any] = {
            what: {part: mean_interval([float(run[f"{task}/{what}"][part].mean) for run in runs.values()])
                   for part in (task, "skills")}
            for what in ("large", "small tuned", "beta 1", "large tuned", "down")
        }  # fmt: skip
        one["up - large"] = against(up, f"{task}/large", task)
        one["up - small tuned"] = against(up, f"{task}/small tuned", task)
        one["up - down"] = against(up, f"{task}/down", task)
        one["1.5 - 1"] = against(f"{task}/beta 1.5", up, task) if 1.5 in settings["betas"] else None
        one["knows more"] = {
            "share": float(more.mean()), "margin": float(known[task].mean()),
            **{side: against(up, f"{task}/small tuned", task, keep) if keep.sum() >= LEAST else None
               for side, keep in (("more", more), ("rest", ~more))},
        }  # fmt: skip
        tasks[task] = one
    betas = {task: of_betas(runs, task, settings["betas"]) for task in TASKS}
    mixtures = {"+".join(pair): of_shares(runs, pair, settings["lambdas"]) for pair in PAIRS}
    filters = of_filters(runs, settings)
    amplified = None
    if 1.5 in settings["betas"]:
        by_seed = [[run[f"{t}/beta 1.5"][t].mean - run[f"{t}/beta 1"][t].mean for t in TASKS] for run in runs.values()]
        amplified = mean_interval([float(np.mean(each)) for each in by_seed])
    primary = filters[f"{PRIMARY}, beta 2"]
    alone = None if len(runs) == 1 else True
    counted = [one["knows more"]["more"] for one in tasks.values() if one["knows more"]["more"] is not None]
    parts = {
        "above the large base": [above(one["up - large"], 0) for one in tasks.values()],
        "above the small tuned model": [above(found, 0) for found in counted] or [None],
        "single-peaked": [
            alone and one["valley"] <= VALLEY and above(one["over the first"], 0) and above(one["over the last"], 0)
            for one in betas.values()
        ],
        "frontier": [
            alone and one["ordered"] and min(b["mean"] for b in one["beyond"][1:-1]) >= -VALLEY
            for one in mixtures.values()
        ],
        "amplification": [None if amplified is None else above(amplified, 0)],
        "filter": [
            alone and above(primary["skills gained"], 0) and primary["target gained"]["mean"] >= -0.02,
            above(primary["over any beta"], 0),
        ],
        "knowledge stays in the base": [above(tasks["chain"]["up - down"], 0)],
    }  # fmt: skip
    return {"tasks": tasks, "betas": betas, "mixtures": mixtures, "filters": filters, "1.5 - 1": amplified,
            "grid": list(settings["betas"]), "shares": list(settings["lambdas"]),
            "verdicts": {claim: told_of(passed) for claim, passed in parts.items()}}  # fmt: skip


# ---- telling


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def heads(*cells: str) -> list[str]:
    return ["", row(*cells), "|---" * len(cells) + "|"]


def markdown(summary: Mapping[str, Any]) -> str:
    """Up-scaling, where the large base knows more, beta, mixtures, filters."""
    lines = heads("task", "large base", "small tuned", "up: large + (tuned - small)", "large tuned", "down",
                  "up - large base", "up - small tuned", "skills: small tuned, up, large tuned")[1:]  # fmt: skip
    for task, one in summary["tasks"].items():
        what = ("large", "small tuned", "beta 1", "large tuned", "down")
        skills = ", ".join(f"{one[w]['skills']['mean']:.2f}" for w in ("small tuned", "beta 1", "large tuned"))
        lines.append(row(TASKS[task], *(told(one[w][task]) for w in what), told(one["up - large"], sign="+"),
                         told(one["up - small tuned"], sign="+"), skills))  # fmt: skip
    lines += heads("task", "the large base is surer by, nats a response", "share where it knows more",
                   "up - small tuned there", "elsewhere")  # fmt: skip
    for task, one in summary["tasks"].items():
        found = one["knows more"]
        sides = ["too few" if found[s] is None else told(found[s], sign="+") for s in ("more", "rest")]
        lines.append(row(TASKS[task], f"{found['margin']:+.1f}", f"{found['share']:.2f}", *sides))
    lines += heads(
        "beta", *(f"{TASKS[t]}" for t in summary["betas"]), *(f"skills, {TASKS[t]}" for t in summary["betas"])
    )
    for i, beta in enumerate(summary["grid"]):
        lines.append(
            row(f"{beta:g}", *(told(one[key][i]) for key in ("target", "skills") for one in summary["betas"].values()))
        )
    lines += heads("lambda", *(f"{TASKS[a]}, {TASKS[b]}: accuracies, beyond the line" for a, b in PAIRS))
    for i, share in enumerate(summary["shares"]):
        cells = [f"{one['first'][i]['mean']:.2f}, {one['second'][i]['mean']:.2f}, {told(one['beyond'][i], sign='+')}"
                 for one in summary["mixtures"].values()]  # fmt: skip
        lines.append(row(f"{share:g}", *cells))
    cells = [f"{one['both in full'][a]['mean']:.2f}, {one['both in full'][b]['mean']:.2f}"
             for (a, b), one in zip(PAIRS, summary["mixtures"].values(), strict=True)]  # fmt: skip
    lines.append(row("both in full", *cells))
    lines += heads(
        "nucleus of", "target", "skills", "skills - without", "target - without", "skills - best of any beta"
    )
    for name, one in summary["filters"].items():
        signed = (told(one[k], sign="+") for k in ("skills gained", "target gained", "over any beta"))
        lines.append(row(name, told(one["target"]), told(one["skills"]), *signed))
    return "\n".join(lines)


def picture(summary: Mapping[str, Any]) -> Figure:
    """Bars by task, the sweep over beta, mixtures, filters."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    (bars, betas), (mixed, filters) = figure.subplots(2, 2)
    shown = {"large": ("large base", "white", ""), "small tuned": ("small tuned", "0.75", ""),
             "beta 1": ("large + (tuned - small)", "0.25", ""), "large tuned": ("large tuned", "white", "//"),
             "down": ("small + (large tuned - large)", "white", "..")}  # fmt: skip
    for j, (what, (label, colour, hatch)) in enumerate(shown.items()):
        for i, (task, one) in enumerate(summary["tasks"].items()):
            found, at = one[what][task], i + (j - 2) * 0.16
            bars.bar(at, found["mean"], 0.16, color=colour, hatch=hatch, edgecolor="black", label=None if i else label)
            if found["low"] is not None:
                bars.vlines(at, max(found["low"], 0), min(found["high"], 1), color="black", lw=1)
    bars.set_xticks(range(len(TASKS)), TASKS.values())
    bars.set(ylabel="accuracy", ylim=(0, 1.5), title="scaled up and down, beta 1")
    bars.legend(frameon=False, fontsize="small", ncols=2, loc="upper left")
    for i, (task, one) in enumerate(summary["betas"].items()):
        style = f"{('-', '--', ':', '-.')[i]}{MARKERS[i]}"
        for key, colour in (("target", "black"), ("skills", "0.6")):
            betas.plot(summary["grid"], [f["mean"] for f in one[key]], style, color=colour, lw=1.2, markersize=5,
                       label=TASKS[task] if key == "target" else None)  # fmt: skip
    betas.set(xlabel="beta", ylabel="accuracy", ylim=(-0.03, 1.35), title="black: the task; grey: skills")
    betas.legend(frameon=False, fontsize="small", ncols=4, loc="upper center")
    for i, (pair, one) in enumerate(zip(PAIRS, summary["mixtures"].values(), strict=True)):
        x, y = ([f["mean"] for f in one[key]] for key in ("first", "second"))
        label = f"{TASKS[pair[0]]}, {TASKS[pair[1]]}"
        mixed.plot(x, y, f"k-{MARKERS[i]}", lw=1.2, markersize=5, markerfacecolor="white", label=label)
        mixed.plot([x[0], x[-1]], [y[0], y[-1]], ":", color="0.5", lw=1)
        full = one["both in full"]
        mixed.plot(full[pair[0]]["mean"], full[pair[1]]["mean"], f"k{MARKERS[i]}", markersize=9)
    mixed.set(xlabel="accuracy on the first task", ylabel="on the second", xlim=(-0.04, 1.06), ylim=(-0.04, 1.3),
              title="mixtures of two rewards; filled: both in full")  # fmt: skip
    mixed.legend(frameon=False, fontsize="small", ncols=3, loc="upper center")
    none = [[np.mean([one[key][i]["mean"] for one in summary["betas"].values()]) for i in range(len(summary["grid"]))]
            for key in ("target", "skills")]  # fmt: skip
    filters.plot(*none, "k-o", lw=1.2, markersize=4, label="no filter, by beta")
    for beta, x, y in zip(summary["grid"], *none, strict=True):
        if beta >= 1:
            filters.annotate(f"{beta:g}", (x, y), xytext=(6, -4), textcoords="offset points", fontsize="small")
    for i, name in enumerate(FILTERS):
        points = [one for key, one in summary["filters"].items() if key.startswith(f"{name}, ")]
        x, y = ([p[k]["mean"] for p in points] for k in ("target", "skills"))
        filters.plot(x, y, f"{('-', '--', ':', '-.')[i]}{MARKERS[i + 1]}", color="0.45", markersize=6,
                     markerfacecolor="white", label=f"nucleus: {name}")  # fmt: skip
    filters.set(xlabel="accuracy on the task, mean of four", ylabel="skills", title="filters at beta 1, 2, 3")
    filters.legend(frameon=False, fontsize="small", loc="lower left")
    bare(bars, betas, mixed, filters)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: beta 0 is the large base, and hardly tuned models say what their bases say."""
    summary = report["summary"]
    for task, one in summary["betas"].items():
        assert one["target"][0]["mean"] == summary["tasks"][task]["large"][task]["mean"]
    assert set(summary["verdicts"].values()) == {"not asked"}, summary["verdicts"]
    assert len(summary["filters"]) == len(FILTERS) and len(summary["mixtures"]) == len(PAIRS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="two steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    seeds, workers = ([0], 1) if options.fast else (options.seeds, options.workers)
    settings = FAST if options.fast else SETTINGS
    runs = dict(zip(seeds, in_processes(measured, [(seed, settings) for seed in seeds], workers), strict=True))
    summary = summarised(runs, margins(settings), settings)
    report = {"settings": settings, "seeds": seeds, "summary": summary}
    path = write(options.out, "upscaling", report, picture(summary), began)
    print(markdown(rounded(summary)))
    print(summary["verdicts"], path, sep="\n")


if __name__ == "__main__":
    main()
