"""Can demonstrations inside RL teach what RL alone never finds: ReLIFT and Prefix-RFT where plain GRPO gets no signal?

    python experiments/no_signal.py            # 5 seeds, about 15 CPU-minutes
    python experiments/no_signal.py --fast     # five steps, a check that it runs

Two tasks that tiny-base never gets right, so that every advantage is 0; only a completion equal to the demonstration
is rewarded. "sums": 8 digits, the whole working right (it was trained on 3 to 6). "double": each letter twice, behind
a letter that it has never seen. All arms draw from the same prompts and take as many optimizer steps (imitation
included) at one learning rate: Dr.GRPO alone; ReLIFT (arXiv:2506.07527), which imitates demonstrations of questions
that every rollout failed, once there are 32; Prefix-RFT (arXiv:2507.01679), where one rollout of each group continues
the beginning of a demonstration. SFT on as many demonstrations as ReLIFT used is shown beside them.

A first run (on "double" alone, with the paper's entropy bonus of 0.001 in ReLIFT) ended at 0.00 for both methods.
Where every advantage is 0 the bonus is all the gradient there is, and Adam makes full steps of it however small it
is: it undid what imitation taught. ReLIFT is therefore shown with and without the bonus. And Prefix-RFT had nothing
to continue from: the base ends its answer before the last letter. That is why "sums" was added, where a prefix leaves
steps that the base can do.

Defined before this run was scored: the premise holds when GRPO's mean reward over the run is below 0.02; an arm's
claim holds on a task when its accuracy on held-out questions minus GRPO's is above 0 with its 95 % interval over
seeds.
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

from analysis.evaluate import evaluate_tasks, generate
from surgery.tasks import make_task
from surgery.training import train
from surgery.training.run import open_model

TASKS: dict[str, dict[str, Any]] = {
    "sums": {"task": "chain", "terms": 8},
    "double": {"task": "double", "length": [3, 6]},
}
LONGEST = {"sums": 52, "double": 16}
ARMS = ("grpo", "relift", "relift, no bonus", "prefix_rft", "sft")
SHOWN = {"grpo": "Dr.GRPO", "relift": "ReLIFT", "relift, no bonus": "ReLIFT without its entropy bonus",
         "prefix_rft": "Prefix-RFT", "sft": "SFT, ReLIFT's demonstrations"}  # fmt: skip
LR, PROMPTS, GROUP, BUFFER = 2e-4, 8, 8, 32
PLAIN = {"dr_grpo": {"clip_low": 0.2, "clip_high": 0.2}}


def relift(entropy: float) -> dict[str, Any]:
    """The paper's loss (no deviation, no clip, a constant divisor) and its buffer."""
    loss = {"dr_grpo": {"clip_low": 1.0, "clip_high": 1e9, "entropy": entropy}}
    return {"objective": [loss, "sft"], "source": {"relift": {"size": BUFFER, "metric": "whole"}}}


WORDS: dict[str, dict[str, Any]] = {
    "grpo": {"objective": PLAIN},
    "relift": relift(0.001),
    "relift, no bonus": relift(0.0),
    "prefix_rft": {"objective": PLAIN, "source": {"prefix": {}}},
}


def whole(completions: list[str], solution: list[str], **_: Any) -> list[float]:
    """1 where the completion is the demonstration, character for character."""
    return [float(c == right) for c, right in zip(completions, solution, strict=True)]


class Rows:
    """A task's rows, with the demonstration in a column that rewards get."""

    size = float("inf")

    def __init__(self, task: str, seed: int) -> None:
        words = dict(TASKS[task])
        self.task, self.seed = make_task(words.pop("task"), **words), seed
        self.columns = {"prompt", "completion", "solution"}

    def row(self, index: int) -> dict[str, Any]:
        """Row `index` of the stream."""
        row = self.task.row(self.seed, index)
        return {**row, "solution": row["completion"]}


def run(task: str, arm: str, seed: int, steps: int, n: int, demonstrations: int = 0) -> dict[str, Any]:
    """One arm from tiny-base: its rewards by step, and accuracies on held-out questions and on old skills."""
    model, tokenizer = open_model("tiny-base")
    shared: dict[str, Any] = {"data": Rows(task, 100 + seed), "seed": 100 + seed,
                              "optimizer": {"lr": LR, "shape": "constant"}}  # fmt: skip
    if arm == "sft":
        rounds = max(1, demonstrations // BUFFER)
        done = train(model, tokenizer, objective="sft", steps=rounds, batch={"rows": BUFFER}, **shared)
    else:
        rollouts = {"prompts": PROMPTS, "group": GROUP, "max_new_tokens": LONGEST[task]}
        done = train(model, tokenizer, reward={"whole": whole}, steps=steps, rollouts=rollouts, **WORDS[arm], **shared)
    rows = [m for m in done.metrics if m["step"] > 0]
    asked = [Rows(task, 900).row(i) for i in range(n)]
    drawn = generate(model, tokenizer, [row["prompt"] for row in asked], max_new_tokens=LONGEST[task])
    skills = evaluate_tasks(model, ("copy", "reverse", "sort"), n, 900, tokenizer=tokenizer)
    imitated = sum("nll" in m for m in rows) * BUFFER if arm.startswith("relift") else demonstrations
    return {
        "accuracy": float(np.mean([text == row["solution"] for text, row in zip(drawn, asked, strict=True)])),
        "skills": float(skills.mean),
        "rewards": [m.get("reward", float("nan")) for m in rows],
        "demonstrations": imitated,
    }


def seed_of_all(task: str, seed: int, steps: int, n: int) -> dict[str, Any]:
    """Every arm with one seed; SFT last, on as many demonstrations as ReLIFT took."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        found[arm] = run(task, arm, seed, steps, n, found["relift"]["demonstrations"] if arm == "sft" else 0)
    return found


def summarised(seeds: Mapping[str, Mapping[int, dict]]) -> dict[str, Any]:
    """By task: means over seeds, paired differences to GRPO, the verdict."""
    return {task: _task(found) for task, found in seeds.items()}


def _task(seeds: Mapping[int, dict]) -> dict[str, Any]:
    arms = {}
    for arm in ARMS:
        # a step of imitation has no reward: the curve is over the steps that have
        rewards = [[r for r in seeds[s][arm]["rewards"] if r == r] for s in seeds if arm != "sft"]
        shortest = min(map(len, rewards), default=0)
        arms[arm] = {
            "accuracy": mean_interval([seeds[s][arm]["accuracy"] for s in seeds]),
            "skills": mean_interval([seeds[s][arm]["skills"] for s in seeds]),
            "minus GRPO": mean_interval([seeds[s][arm]["accuracy"] - seeds[s]["grpo"]["accuracy"] for s in seeds]),
            "demonstrations": mean_interval([seeds[s][arm]["demonstrations"] for s in seeds])["mean"],
            "reward": float(np.mean([np.mean(r) for r in rewards])) if shortest else None,
            "curve": np.mean([r[:shortest] for r in rewards], 0).tolist() if shortest else [],
        }
    held = {a: bool((arms[a]["minus GRPO"]["low"] or 0) > 0) for a in ("relift", "relift, no bonus", "prefix_rft")}
    return {"arms": arms, "verdict": {"premise": bool(arms["grpo"]["reward"] < 0.02), **held}}


def markdown(summary: Mapping[str, Any]) -> str:
    """Accuracy by task and arm."""
    lines = [
        "| task | arm | accuracy | minus Dr.GRPO | old skills | demonstrations imitated | mean reward |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, found in summary.items():
        for arm, row in found["arms"].items():
            reward = "" if row["reward"] is None else f"{row['reward']:.3f}"
            cells = [told(row["accuracy"]), told(row["minus GRPO"], "+"), told(row["skills"])]
            lines.append("| " + " | ".join([task, SHOWN[arm], *cells, f"{row['demonstrations']:.0f}", reward]) + " |")
    return "\n".join(lines)


def told(m: Mapping[str, Any], sign: str = "") -> str:
    """A mean with its interval."""
    low = "" if m["low"] is None else f" [{m['low']:{sign}.2f}, {m['high']:{sign}.2f}]"
    return f"{m['mean']:{sign}.2f}{low}"


def picture(summary: Mapping[str, Any]) -> Figure:
    """Reward over the steps that sample, and accuracies at the end."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    for arm, style in zip(("grpo", "relift, no bonus", "prefix_rft"), ("k:", "k-", "k--"), strict=True):
        curve = summary["sums"]["arms"][arm]["curve"]
        left.plot(range(1, len(curve) + 1), curve, style, label=SHOWN[arm])
    left.set(xlabel="step that samples", ylabel="share of right rollouts", title="sums of 8 digits")
    left.legend(frameon=False)
    for (task, found), (mark, shift) in zip(summary.items(), (("ko", -0.1), ("ks", 0.1)), strict=False):
        for i, arm in enumerate(ARMS):
            m = found["arms"][arm]["accuracy"]
            spread = [[m["mean"] - m["low"]], [m["high"] - m["mean"]]] if m["low"] is not None else None
            right.errorbar(
                [i + shift], [m["mean"]], spread, fmt=mark, capsize=3, label=task if i == 0 else None,
                markerfacecolor="black" if task == "sums" else "white",
            )  # fmt: skip
    right.set_xticks(range(len(ARMS)), ["Dr.GRPO", "ReLIFT", "no bonus", "Prefix-RFT", "SFT"])
    right.set(ylim=(-0.05, 1.05), ylabel="held-out accuracy", title="after the last step")
    right.legend(frameon=False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """Plain RL gets no reward at all, and ReLIFT has imitated what it failed."""
    for found in report["summary"].values():
        assert found["arms"]["grpo"]["reward"] < 0.05 and found["arms"]["relift"]["demonstrations"] > 0
        assert set(found["arms"]) == set(ARMS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of the arms that sample")
    parser.add_argument("--fast", action="store_true", help="one seed and five steps")
    options = parser.parse_args()
    began = time.perf_counter()
    steps, n, seeds = (5, 16, [0]) if options.fast else (options.steps, 200, options.seeds)
    jobs = [(task, seed, steps, n) for task in TASKS for seed in seeds]
    found = iter(in_processes(seed_of_all, jobs, options.workers))
    each = {task: {seed: next(found) for seed in seeds} for task in TASKS}
    summary = summarised(each)
    print(markdown(rounded(summary)))
    report = {"summary": summary, "seeds": each, "steps": steps, "lr": LR}
    print(write(options.out, "no_signal", report, picture(summary), began))


if __name__ == "__main__":
    main()
