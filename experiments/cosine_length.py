"""Does the cosine reward bound the length of completions at equal accuracy (arXiv:2502.03373)?

    python experiments/cosine_length.py            # three rewards, five GRPO runs each
    python experiments/cosine_length.py --fast     # a few steps, a check that it runs

tiny-base first learns to ramble: sums of 3 or 4 digits are worked out with every step written once, twice or three
times, which does not change the answer; 64 tokens are the limit. From there GRPO with the accuracy alone, with the
cosine reward (a right answer is worth 1 when short and 0.5 at the limit, a wrong one -1 and -0.5) and, for contrast,
with the accuracy and up to 0.5 for length. Scored on held-out sums at temperature 1: mean length, and accuracy.

Held: the cosine reward's final length is below that of accuracy alone, and its accuracy is not more than 0.03 lower,
both by the ends of intervals over seeds. That the start leaves room is shown by the pay for length: it has to grow.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from arena import in_processes, mean_interval, rounded, write
from long_sums import ADAM, base, told
from matplotlib.figure import Figure

from analysis.evaluate import evaluate
from surgery.tasks import make_task
from surgery.training import train
from surgery.training.run import open_model

LIMIT, TERMS, TIMES = 64, [3, 4], (1, 2, 3)


def longer(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """The share of the limit that a completion takes."""
    return [len(ids) / LIMIT for ids in completion_ids]


REWARDS: dict[str, Any] = {
    "accuracy": {"accuracy": 1.0},
    "cosine": {"cosine_length": {"max_len": LIMIT}},
    "accuracy + pay for length": {"accuracy": 1.0, "longer": (longer, 0.5)},
}
RAMBLE = {"steps": 100, "rows": 64, "lr": 5e-4}
GRPO = {"steps": 30, "prompts": 12, "group": 8, "lr": 2e-4}
TEST = {"prompts": 100, "samples": 4}


class Rambling:
    """Worked-out sums without end, each step repeated at random; row i is a function of (seed, i)."""

    size = float("inf")
    columns = {"prompt", "completion", "answer", "task"}

    def __init__(self, seed: int) -> None:
        self.seed, self.task = seed, make_task("chain", terms=TERMS)

    def row(self, index: int) -> dict[str, Any]:
        """One sum."""
        rng, row = Random(f"{self.seed}/times/{index}"), self.task.row(self.seed, index)
        *steps, answer = row["completion"].split(";")
        row["completion"] = "".join(f"{step};" * rng.choice(TIMES) for step in steps) + answer
        return row


def rambler(folder: Path, settings: Mapping[str, Any]) -> Path:
    """tiny-base that writes its steps once or more."""
    model, tokenizer = base()
    train(model, tokenizer, objective="sft", data=Rambling(7), steps=settings["steps"],
          batch={"rows": settings["rows"]}, optimizer={"lr": settings["lr"], "final": 0.1, **ADAM})  # fmt: skip
    model.save_pretrained(folder / "rambler")
    tokenizer.save_pretrained(folder / "rambler")
    return folder / "rambler"


def measured(model: Any, tokenizer: Any, size: Mapping[str, int]) -> dict[str, float]:
    """Length in characters and accuracy of samples at temperature 1."""
    rows = [e.row("chain") for e in make_task("chain", terms=TERMS).examples(size["prompts"], 12345)]
    found = evaluate(model, rows, tokenizer=tokenizer, samples=size["samples"], max_new_tokens=LIMIT, batch_size=512)
    lengths = [len(text) for texts in found.columns["completion"] for text in texts]
    return {"accuracy": float(found.values.mean()), "length": float(np.mean(lengths)),
            "longest of 20": float(np.quantile(lengths, 0.95)),
            "cut off": float(np.mean(found.columns["truncated"]))}  # fmt: skip


def start(folder: Path, size: Mapping[str, int]) -> dict[str, float]:
    """The rambler, measured."""
    return measured(*open_model(folder), size)


def reinforced(
    folder: Path, reward: str, seed: int, settings: Mapping[str, Any], size: Mapping[str, int]
) -> dict[str, Any]:
    """One GRPO run: length of its samples step by step, and the measures of its end."""
    model, tokenizer = open_model(folder)
    run = train(
        model, tokenizer, objective="grpo", data={"task": "chain", "terms": TERMS}, seed=seed, steps=settings["steps"],
        reward=REWARDS[reward],
        rollouts={"prompts": settings["prompts"], "group": settings["group"], "max_new_tokens": LIMIT},
        optimizer={"lr": settings["lr"], "shape": "constant", **ADAM},
    )  # fmt: skip
    return {"lengths": [round(m["length"], 2) for m in run.metrics], **measured(model, tokenizer, size)}


def summarised(before: Mapping[str, float], runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Every arm, against accuracy alone on the same seeds, and the verdict."""
    arms: dict[str, Any] = {}
    for name, each in runs.items():
        arms[name] = {what: mean_interval([run[what] for run in each]) for what in before}
        for what in ("length", "accuracy"):
            pairs = zip(each, runs["accuracy"], strict=True)
            arms[name][f"{what}, difference"] = mean_interval([a[what] - b[what] for a, b in pairs])
    length, right = arms["cosine"]["length, difference"], arms["cosine"]["accuracy, difference"]
    sure = length["low"] is not None
    shorter, equal = sure and length["high"] < 0, sure and right["low"] > -0.03
    verdict = "held" if shorter and equal else "in part" if shorter else "did not hold" if sure else "not asked"
    return {"before": dict(before), "arms": arms, "verdict": verdict}


def markdown(summary: Mapping[str, Any]) -> str:
    """A line for the start and each reward."""
    heads = ["reward", "length", "95 % are below", "cut off", "accuracy", "length, against accuracy alone",
             "accuracy, against it"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    old = summary["before"]
    cells = [f"{old['length']:.1f}", f"{old['longest of 20']:.0f}", f"{old['cut off']:.2f}", f"{old['accuracy']:.2f}"]
    lines.append("| " + " | ".join(["before", *cells, "", ""]) + " |")
    for name, found in summary["arms"].items():
        cells = [told(found["length"], 1), f"{found['longest of 20']['mean']:.0f}", f"{found['cut off']['mean']:.2f}"]
        cells.append(told(found["accuracy"]))
        if name != "accuracy":
            cells += [told(found["length, difference"], 1, "+"), told(found["accuracy, difference"], 2, "+")]
        lines.append("| " + " | ".join([name, *cells, *[""] * (6 - len(cells))]) + " |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any], runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Length of the samples step by step, every run; final length and accuracy."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    styles = dict(zip(runs, [("0.55", "-"), ("black", "-"), ("black", ":")], strict=True))
    for (name, each), mark in zip(runs.items(), "osv", strict=True):
        colour, line = styles[name]
        for i, run in enumerate(each):
            left.plot(run["lengths"], line, color=colour, lw=1, label=None if i else name)
        points = [(run["length"], run["accuracy"]) for run in each]
        right.plot(*zip(*points, strict=True), mark, color=colour, mfc="white" if line == ":" else colour, label=name)
    left.axhline(LIMIT, color="0.8", lw=0.8)
    right.plot(summary["before"]["length"], summary["before"]["accuracy"], "kx", label="before")
    left.set(xlabel="GRPO step", ylabel="mean length of the samples (tokens)", ylim=(0, LIMIT + 2))
    right.set(xlabel="final length (characters)", ylabel="accuracy", xlim=(0, LIMIT + 2), ylim=(0, 1.03))
    left.legend(frameon=False, fontsize="small", loc="lower left")
    right.legend(frameon=False, fontsize="small", loc="lower left")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: the first samples of a seed do not depend on the reward, and no length passes the limit."""
    assert len({each[0]["lengths"][0] for each in report["runs"].values()}) == 1
    assert all(0 < n <= LIMIT for each in report["runs"].values() for run in each for n in run["lengths"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the GRPO runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="a few steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    first, settings, size, seeds, workers = RAMBLE, GRPO, TEST, options.seeds, options.workers
    if options.fast:
        first, settings = {**RAMBLE, "steps": 2, "rows": 8}, {**GRPO, "steps": 2, "prompts": 2, "group": 4}
        size, seeds, workers = {"prompts": 8, "samples": 2}, [0], 1
    with tempfile.TemporaryDirectory() as temporary:
        (folder,) = in_processes(rambler, [(Path(temporary), first)], 1)
        (before,) = in_processes(start, [(folder, size)], 1)
        print("before:", {what: round(value, 2) for what, value in before.items()}, flush=True)
        jobs = [(folder, reward, seed, settings, size) for seed in seeds for reward in REWARDS]
        found = dict(zip([job[1:3] for job in jobs], in_processes(reinforced, jobs, workers), strict=True))
    runs = {reward: [found[reward, seed] for seed in seeds] for reward in REWARDS}
    summary = summarised(before, runs)
    report = {"ramble": first, "grpo": settings, "test": size, "seeds": seeds, "summary": summary, "runs": runs}
    path = write(options.out, "cosine_length", report, picture(summary, runs), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
