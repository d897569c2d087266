"""Does CorDA's start let a LoRA forget less (kpm) or learn faster (ipm)? (arXiv:2406.05223)

    python experiments/corda_modes.py            # 5 seeds and the sweeps
    python experiments/corda_modes.py --fast     # one seed of a few steps, a check that it runs

Adapters of rank 4 on all projections of tiny-base, trained as `one_task.py` says; scale 1, equal numbers to train.
Covariances are of 256 rows: of the base's skills (what is to be kept), or of the task itself.

Forgetting, at equal accuracy on the task (a run ends where it gets there; rates by what was kept there, 0 for runs that
never get there): a plain LoRA; kpm with covariances of the skills; two controls, kpm with the identity for a covariance
(the smallest components of W itself) and kpm with covariances of the task (the wrong text).
Speed, over the first 20 steps (rates by the area under the curve of the accuracy): a plain LoRA; ipm with covariances
of the task; two controls, ipm with the identity (PiSSA's start, arXiv:2404.02948) and with covariances of the skills.

The verdict was defined before anything was scored. kpm: in part when what is kept, minus LoRA's, is above 0 with its
95 % interval over seeds and the accuracies on the task differ by at most 0.05; held when it is above both controls too.
ipm: in part when its area, minus LoRA's, is above 0 with its interval; held when it is above both controls too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena import SKILLS, mean_interval, one_thread, rounded, write
from matplotlib.figure import Figure
from one_task import (
    EQUAL,
    EVERY,
    RATES,
    TASK,
    above,
    against,
    best,
    kept_there,
    learn,
    scores,
    start,
    sweep,
    told,
)

from surgery.tuning.decomposed import corda, projections
from surgery.tuning.projections import sizes

RANK, SAMPLES = 4, 256
MOST, FIRST = 40, 20
KEEP = [{"task": task, "share": 1 / len(SKILLS)} for task in SKILLS]
ARMS: dict[str, dict[str, dict[str, Any] | None]] = {
    "forgetting": {
        "LoRA": None,
        "kpm": {"mode": "kpm", "data": KEEP},
        "kpm, identity": {"mode": "kpm"},
        "kpm, wrong text": {"mode": "kpm", "data": {"task": TASK}},
    },
    "speed": {
        "LoRA": None,
        "ipm": {"mode": "ipm", "data": {"task": TASK}},
        "ipm, identity": {"mode": "ipm"},
        "ipm, wrong text": {"mode": "ipm", "data": KEEP},
    },
}
SCORES = {"forgetting": kept_there, "speed": lambda run: float(run["area"])}
MEASURES = {"forgetting": "kept", "speed": "area"}


def trained(claim: str, arm: str, rate: float, seed: int, steps: int, n: int) -> dict[str, Any]:
    """One run of an arm."""
    (model, tokenizer), words = start(), ARMS[claim][arm]
    tuning: Any = None
    if words is None:
        tuning = {"lora": {"rank": RANK, "seed": seed}}
    elif "data" in words:
        tuning = {"corda": {"rank": RANK, "samples": SAMPLES, **words}}
    else:  # no text stands for the identity: the adapter is put on here
        seen = {name: torch.eye(sizes(module)[1]) for name, module in projections(model).items()}
        model = corda(model, seen, rank=RANK, **words)
    return learn(model, tokenizer, rate, seed, steps, n, tuning, stop=claim == "forgetting")


def summarised(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], rates: Mapping[str, Any]) -> dict:
    """By claim and arm what was measured, and the claim's arm against the others."""
    found: dict[str, Any] = {}
    for claim, arms in runs.items():
        rows = {}
        for arm, each in arms.items():
            early = [run["curve"][min(5, len(run["curve"]) - 1)] for run in each]
            rows[arm] = {
                "rate": rates[claim][arm], "target": mean_interval([r["target"] for r in each]),
                "kept": mean_interval([r["kept"] for r in each]), "area": mean_interval([r["area"] for r in each]),
                "early": mean_interval(early), "reached": sum(r["at"] is not None for r in each),
                "at": float(np.mean([r["at"] if r["at"] is not None else MOST for r in each])), "runs": len(each),
            }  # fmt: skip
        ours = list(arms)[1]
        differences = {arm: against(arms[ours], each, MEASURES[claim]) for arm, each in arms.items() if arm != ours}
        apart = abs(rows[ours]["target"]["mean"] - rows["LoRA"]["target"]["mean"])
        found[claim] = {"arms": rows, "differences": differences,
                        "verdict": verdict(differences, apart if claim == "forgetting" else 0.0)}  # fmt: skip
    return found


def verdict(differences: Mapping[str, Any], apart: float) -> str:
    """As defined above."""
    if not above(differences["LoRA"]) or apart > EQUAL:
        return "did not hold"
    return "held" if all(map(above, differences.values())) else "in part"


def markdown(summary: Mapping[str, Any]) -> str:
    """A table a claim."""
    kpm, ipm = summary["forgetting"], summary["speed"]
    lines = [
        "| forgetting | rate | steps | got there | the task | kept | kpm minus this |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, row in kpm["arms"].items():
        less = kpm["differences"].get(arm)
        cells = [f"{row['rate']:g}", f"{row['at']:.0f}", f"{row['reached']} of {row['runs']}", told(row["target"]),
                 told(row["kept"]), told(less, "+") if less else ""]  # fmt: skip
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += [f"\nkpm forgets less: {kpm['verdict']}.\n"]
    lines += ["| speed | rate | area | after 10 steps | ipm minus this (area) |", "|---|---|---|---|---|"]
    for arm, row in ipm["arms"].items():
        more = ipm["differences"].get(arm)
        cells = [f"{row['rate']:g}", told(row["area"]), told(row["early"]), told(more, "+") if more else ""]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += [f"\nipm learns faster: {ipm['verdict']}."]
    return "\n".join(lines)


def picture(summary: Mapping[str, Any], runs: Mapping[str, Any], swept: Mapping[str, Any]) -> Figure:
    """What was kept, by seed; the curves; what the sweeps gave by rate."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    looks = [("-", "0.6"), ("-", "black"), ("--", "black"), (":", "black")]
    for i, (arm, each) in enumerate(runs["forgetting"].items()):
        jitter = np.linspace(-0.12, 0.12, len(each)) if len(each) > 1 else [0.0]
        left.plot(i + np.array(jitter), [r["kept"] for r in each], "o", color="0.6", ms=4)
        left.plot([i - 0.25, i + 0.25], 2 * [summary["forgetting"]["arms"][arm]["kept"]["mean"]], color="black")
    left.set_xticks(range(len(ARMS["forgetting"])), [arm.replace(", ", ",\n") for arm in ARMS["forgetting"]])
    left.set(ylabel="accuracy on facts, copy, reverse, sort", title="kept, once the task is learned")
    for (arm, each), (line, color) in zip(runs["speed"].items(), looks, strict=True):
        mean = np.mean([r["curve"] for r in each], axis=0)
        label = f"{arm} ({summary['speed']['arms'][arm]['rate']:g})"
        middle.plot(EVERY * np.arange(len(mean)), mean, line, color=color, label=label)
    middle.set(xlabel="step", ylabel="accuracy on the task", title="learning, each at its own rate")
    for (arm, by), (line, color) in zip(swept["speed"].items(), looks, strict=True):
        right.plot([float(rate) for rate in by], list(by.values()), line, color=color, marker="o", ms=3, label=arm)
    right.set(xscale="log", xlabel="learning rate", ylabel="area under the curve", title="the sweep for speed")
    for axis in (middle, right):
        axis.legend(frameon=False, fontsize=8)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: no start changes the model, so that all arms begin with one loss; every arm has its rate."""
    for claim, arms in report["runs"].items():
        first = [each[0]["loss"] for each in arms.values()]
        assert max(first) - min(first) < 1e-3, first
        for arm, row in report["summary"][claim]["arms"].items():
            assert f"{row['rate']:g}" in report["swept"][claim][arm]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of data and LoRA's start")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--fast", action="store_true", help="few steps and questions: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    one_thread()
    seeds, rates, n, steps = options.seeds, RATES, 100, {"forgetting": MOST, "speed": FIRST}
    if options.fast:
        seeds, rates, n, steps = seeds[:1], RATES[2:3], 8, {"forgetting": 2, "speed": 2}
    runs: dict[str, Any] = {}
    swept: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for claim, arms in ARMS.items():

        def one(arm: str, rate: float, seed: int, claim: str = claim) -> dict[str, Any]:
            return trained(claim, arm, rate, seed, steps[claim], n)

        found = sweep(one, arms, rates)
        swept[claim] = scores(found, SCORES[claim])
        print(claim, rounded(swept[claim]), file=sys.stderr)
        own[claim] = {arm: best(found[arm], SCORES[claim]) for arm in arms}
        runs[claim] = {arm: [one(arm, own[claim][arm], seed) for seed in seeds] for arm in arms}
    summary = summarised(runs, own)
    report = {"n": n, "rank": RANK, "seeds": seeds, "summary": summary, "swept": swept, "runs": runs}
    path = write(options.out, "corda_modes", report, picture(summary, runs, swept), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
