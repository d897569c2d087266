"""Does hiding parts of the demonstrations teach more than plain SFT on the same few (Masked Thought, arXiv:2403.02178)?

    python experiments/masked_thought_vs_sft.py            # five sets of demonstrations, three arms
    python experiments/masked_thought_vs_sft.py --fast     # a few steps, a check that it runs

tiny-base sees 100 worked-out sums of 7 or 8 digits for 24 epochs: by SFT, and with completion tokens of the input
replaced by the padding token, ever more of them up to a rate p: 0.4 and 0.2 are the paper's. Everything else is equal:
demonstrations, order, steps, learning rate. Scored: greedy accuracy on held-out sums, and the loss of the last steps.

Held: for one of the two rates the difference in accuracy to SFT, paired over seeds and sums, is above 0 with its
interval, and its training loss is higher.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arena import in_processes, mean_interval, rounded, write
from long_sums import ADAM, base, demonstrations, difference, scored, told, verdict
from matplotlib.figure import Figure

from analysis.plots import HATCHES
from analysis.results import Result
from surgery.training import train

RATES = {"SFT": 0.0, "p = 0.2": 0.2, "p = 0.4": 0.4}
SETTINGS = {"demonstrations": 100, "rows": 16, "steps": 150, "lr": 3e-4}
TEST = 200


def trained(arm: str, seed: int, settings: Mapping[str, Any], test: int) -> dict[str, Any]:
    """One run: which test sums came right, and the loss step by step."""
    model, tokenizer = base()
    rate = {"linear": {"start": 0.0, "end": RATES[arm], "over": 0.66}}
    run = train(
        model, tokenizer, data=demonstrations(settings["demonstrations"], seed), seed=seed, steps=settings["steps"],
        objective={"masked_thought": {"mask_rate": rate}} if RATES[arm] else "sft",
        batch={"rows": settings["rows"]}, optimizer={"lr": settings["lr"], "final": 0.1, **ADAM},
    )  # fmt: skip
    return {"right": scored(model, tokenizer, test), "loss": [m["loss"] for m in run.metrics]}


def summarised(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Accuracy and last loss of every arm, and against SFT."""
    right: dict[str, dict[int, Result]] = {arm: {s: r["right"] for s, r in each.items()} for arm, each in runs.items()}
    last = {arm: [float(np.mean(r["loss"][-10:])) for r in each.values()] for arm, each in runs.items()}
    summary: dict[str, Any] = {}
    for arm, each in right.items():
        found = summary[arm] = {
            "accuracy": mean_interval([float(r.values.mean()) for r in each.values()]),
            "loss": mean_interval(last[arm]),
        }
        if RATES[arm]:
            found["gain"] = difference(each, right["SFT"])
            found["more loss"] = mean_interval([a - b for a, b in zip(last[arm], last["SFT"], strict=True)])
            found["verdict"] = verdict(found["gain"])
    return summary


def markdown(summary: Mapping[str, Any]) -> str:
    """A line an arm."""
    heads = ["", "held-out accuracy", "against SFT", "training loss, last 10 steps", "verdict"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm, found in summary.items():
        gain = told(found["gain"], sign="+") if "gain" in found else ""
        cells = [arm, told(found["accuracy"]), gain, told(found["loss"], 3), found.get("verdict", "")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any], losses: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Bars of accuracy, and the loss along the run."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
    for i, (arm, found) in enumerate(summary.items()):
        left.bar(i, found["accuracy"]["mean"], color="0.7" if i == 0 else "white", edgecolor="black", hatch=HATCHES[i])
        if found["accuracy"]["low"] is not None:
            ends = [found["accuracy"]["low"], found["accuracy"]["high"]]
            left.vlines(i, *np.clip(ends, 0, 1), color="black", lw=1)
        line = np.mean(losses[arm], axis=0)
        right.plot(line, ("-", "--", ":")[i], color="0.5" if i == 0 else "black", label=arm)
    left.set_xticks(range(len(summary)), list(summary))
    left.set(ylabel="accuracy on held-out sums", ylim=(0, 1))
    right.set(xlabel="step", ylabel="training loss (nats a token)", yscale="log")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: with nothing hidden at step 0 the arms begin alike."""
    first = {round(each[0][0], 4) for each in report["losses"].values()}
    assert len(first) == 1, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of demonstrations and order")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="a few steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    settings, test, seeds, workers = SETTINGS, TEST, options.seeds, options.workers
    if options.fast:
        settings, test, seeds, workers = {**SETTINGS, "steps": 3, "rows": 4}, 8, [0], 1
    jobs = [(arm, seed, settings, test) for seed in seeds for arm in RATES]
    found = dict(zip([job[:2] for job in jobs], in_processes(trained, jobs, workers), strict=True))
    runs = {arm: {seed: found[arm, seed] for seed in seeds} for arm in RATES}
    summary = summarised(runs)
    losses = {arm: [r["loss"] for r in each.values()] for arm, each in runs.items()}
    report = {"settings": settings, "test": test, "seeds": seeds, "summary": summary, "losses": losses}
    path = write(options.out, "masked_thought_vs_sft", report, picture(summary, losses), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
