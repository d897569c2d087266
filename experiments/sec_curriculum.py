"""Does a curriculum that follows the advantages (SEC) beat a random one on the hardest level?

    python experiments/sec_curriculum.py            # 5 seeds, about 12 CPU-minutes
    python experiments/sec_curriculum.py --fast     # two steps, a check that it runs

Levels are the lengths of sums: 3, 5, 7, 8 and 9 digits. tiny-base was trained on 3 to 6: the first two are soon solved
and then teach nothing, 9 digits are hardly ever solved at first. Two arms with the same GRPO, steps and rollouts: SEC
(arXiv:2505.14970; rate 0.5, temperature 0.4) and levels drawn uniformly. Scored on held-out sums of each level.

Defined before anything was scored: the claim holds when accuracy on 9 digits after the last step, SEC minus random, is
above 0 with its 95 % interval over seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from arena import in_processes, mean_interval, rounded, write
from matplotlib.figure import Figure

from analysis.evaluate import evaluate_tasks
from surgery.tasks import make_task
from surgery.training import train
from surgery.training.run import open_model

LEVELS = (3, 5, 7, 8, 9)
CATEGORIES = {f"{k} digits": {"task": "chain", "terms": k} for k in LEVELS}
ARMS = {
    "SEC": {"sec": {"rate": 0.5, "temperature": 0.4, "categories": CATEGORIES}},
    "random": {"random": {"categories": CATEGORIES}},
}
PROMPTS, GROUP, LR, NEW = 16, 8, 1e-4, 58


def run(arm: str, seed: int, steps: int, n: int) -> dict[str, Any]:
    """One arm: accuracy by level at the end, on the hardest on the way, and which levels were drawn."""
    model, tokenizer = open_model("tiny-base")
    drawn: list[dict[str, int]] = []

    def level(completions: list[str], answer: list[str], difficulty: list[float], **_: Any) -> list[float]:
        counts = dict.fromkeys(map(str, LEVELS), 0)
        for terms in difficulty:
            counts[str(int(terms))] += 1
        drawn.append(counts)
        return [float(c.rpartition("#")[2].strip() == a) for c, a in zip(completions, answer, strict=True)]

    done = train(
        model,
        tokenizer,
        objective={"grpo": {"beta": 0.0}},
        data={"task": "chain"},
        curriculum=ARMS[arm],
        reward={"level": level},
        steps=steps,
        rollouts={"prompts": PROMPTS, "group": GROUP, "max_new_tokens": NEW},
        optimizer={"lr": LR, "shape": "constant", "warmup": 0.05},
        evaluate={"every": max(1, steps // 6), "n": n // 2, "data": {"task": "chain", "terms": LEVELS[-1]},
                  "max_new_tokens": NEW},
        seed=300 + seed,
    )  # fmt: skip
    tasks = [make_task("chain", terms=k) for k in LEVELS]
    accuracy = {}
    for k, task in zip(LEVELS, tasks, strict=True):
        accuracy[str(k)] = float(evaluate_tasks(model, [task], n, 950, tokenizer=tokenizer).mean)
    hardest = {m["step"]: m["eval/accuracy"] for m in done.metrics if "eval/accuracy" in m}
    return {"accuracy": accuracy, "hardest": hardest, "drawn": drawn}


def summarised(seeds: Mapping[int, dict[str, dict]]) -> dict[str, Any]:
    """Accuracy by level and arm, paired differences, shares of the levels drawn."""
    levels = [str(k) for k in LEVELS]
    arms = {}
    for arm in ARMS:
        rows = [seeds[s][arm] for s in seeds]
        shares = np.array([[[step[k] for k in levels] for step in row["drawn"]] for row in rows], dtype=float)
        arms[arm] = {
            "accuracy": {k: mean_interval([row["accuracy"][k] for row in rows]) for k in levels},
            "mean": mean_interval([float(np.mean(list(row["accuracy"].values()))) for row in rows]),
            "hardest": {s: mean_interval([r["hardest"][s] for r in rows])["mean"] for s in rows[0]["hardest"]},
            "drawn": (shares.mean((0, 1)) / shares.mean((0, 1)).sum()).tolist(),
        }
    difference = {
        k: mean_interval([seeds[s]["SEC"]["accuracy"][k] - seeds[s]["random"]["accuracy"][k] for s in seeds])
        for k in levels
    }
    return {"arms": arms, "SEC - random": difference, "held": bool((difference[levels[-1]]["low"] or 0) > 0)}


def markdown(summary: Mapping[str, Any]) -> str:
    """Accuracy by level."""
    levels = [str(k) for k in LEVELS]
    lines = [
        "| curriculum | " + " | ".join(f"{k} digits" for k in levels) + " | drawn |",
        "|---" * (len(levels) + 2) + "|",
    ]
    for arm, row in summary["arms"].items():
        drawn = ", ".join(f"{share:.2f}" for share in row["drawn"])
        lines.append(f"| {arm} | " + " | ".join(told(row["accuracy"][k]) for k in levels) + f" | {drawn} |")
    lines.append("| SEC - random | " + " | ".join(told(summary["SEC - random"][k], "+") for k in levels) + " | |")
    return "\n".join(lines)


def told(m: Mapping[str, Any], sign: str = "") -> str:
    """A mean with its interval."""
    low = "" if m["low"] is None else f" [{m['low']:{sign}.2f}, {m['high']:{sign}.2f}]"
    return f"{m['mean']:{sign}.2f}{low}"


def picture(summary: Mapping[str, Any]) -> Figure:
    """The hardest level over the run, and what was drawn."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (arm, row), style in zip(summary["arms"].items(), ("k-o", "k--s"), strict=True):
        left.plot([int(s) for s in row["hardest"]], list(row["hardest"].values()), style, label=arm)
    left.set(xlabel="optimizer step", ylabel=f"accuracy, {LEVELS[-1]} digits", ylim=(0, 1))
    left.legend(frameon=False)
    for i, (arm, row) in enumerate(summary["arms"].items()):
        at = np.arange(len(LEVELS)) + 0.4 * i
        right.bar(at, row["drawn"], 0.4, color="0.3" if arm == "SEC" else "white", edgecolor="black", label=arm)
    right.set_xticks(np.arange(len(LEVELS)) + 0.2, [str(k) for k in LEVELS])
    right.set(xlabel="digits", ylabel="share of the questions drawn")
    right.legend(frameon=False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """Every level can be drawn, and both arms drew as many questions."""
    first = next(iter(report["seeds"].values()))
    total = [sum(sum(step.values()) for step in first[arm]["drawn"]) for arm in ARMS]
    assert total[0] == total[1] > 0
    assert abs(sum(report["summary"]["arms"]["SEC"]["drawn"]) - 1) < 1e-3


def seed_of_both(seed: int, steps: int, n: int) -> dict[str, Any]:
    """Both arms with one seed."""
    return {arm: run(arm, seed, steps, n) for arm in ARMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each arm")
    parser.add_argument("--fast", action="store_true", help="one seed and two steps")
    options = parser.parse_args()
    began = time.perf_counter()
    steps, n, seeds = (2, 8, [0]) if options.fast else (options.steps, 200, options.seeds)
    found = in_processes(seed_of_both, [(seed, steps, n) for seed in seeds], options.workers)
    each = dict(zip(seeds, found, strict=True))
    summary = summarised(each)
    print(markdown(rounded(summary)))
    report = {"summary": summary, "seeds": each, "steps": steps, "lr": LR}
    print(write(options.out, "sec_curriculum", report, picture(summary), began))


if __name__ == "__main__":
    main()
