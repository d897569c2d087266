"""Does GRPO after SFT shorten right answers at equal accuracy, the two-stage recipe of arXiv:2507.08267?

    python experiments/sft_then_grpo.py            # 5 seeds from tiny-base, about 4 CPU-minutes
    python experiments/sft_then_grpo.py --fast     # one seed of a few steps, a check that it runs

Stage 1: SFT of tiny-base on sums worked out wordily, each step written twice with probability 1/2 (what a checking
thought is in a long trace). Stage 2, from there: GRPO with the recipe's rewards, an answer in its form, the cosine of
the length (right 1 to 0.1, wrong -1 to -0.1) and the length inside the group. Control: GRPO from the same model with
the exact answer as its only reward. Answers are drawn at temperature 1, four to a question, and greedily besides.

The verdict was defined before anything was scored: it holds when the right answers to questions that both models
answer right at least once become shorter, the 95 % interval over seeds below zero, and accuracy does not fall: the
lower end of the interval of its change is above -0.05. It holds in part when only the first is true.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from arena import SKILLS, in_processes, mean_interval, rounded, write
from matplotlib.figure import Figure

from analysis.comparison import compare
from analysis.evaluate import evaluate, evaluate_tasks, load
from analysis.results import Result, stack
from surgery import zoo
from surgery.tasks import make_task
from surgery.training import train

TASK = make_task("chain", terms=[3, 4])
LONGEST = 48
REWARDS = {
    "length": {
        "format": {"pattern": r"[^#]*#\d"},
        "cosine_length": {"min_wrong": -1.0, "max_wrong": -0.1, "min_correct": 0.1, "max_len": LONGEST},
        "kimi_length": {},
    },
    "accuracy alone": "accuracy",
}  # fmt: skip
STEPS, ALLOWED = (60, 24), -0.05


class Wordy:
    """Sums worked out, each step once or twice: row i from (seed, i) alone."""

    size = float("inf")
    columns = {"prompt", "completion", "answer", "task"}

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`."""
        row, rng = TASK.row(self.seed, index), Random(f"{self.seed}/wordy/{index}")
        *steps, answer = row["completion"].split(";")
        return row | {"completion": "".join(f"{step};" * rng.choice((1, 2)) for step in steps) + answer}


def tune(model: Any, tokenizer: Any, steps: int, seed: int, lr: float, **words: Any) -> None:
    """In place, with the schedule that all runs share."""
    train(
        model, tokenizer, data=Wordy(seed), steps=steps, batch={"rows": 64},
        rollouts={"prompts": 16, "group": 8, "max_new_tokens": LONGEST},
        optimizer={"lr": lr, "betas": (0.9, 0.98), "weight_decay": 0.01, "warmup": steps / 10, "final": 0.1},
        seed=seed, **words,
    )  # fmt: skip


def ask(model: Any, tokenizer: Any, n: int) -> dict[str, Any]:
    """Sampled accuracy and each question's mean length of right answers (NaN: none), greedy accuracy, other skills."""
    rows = [TASK.row(990, i) for i in range(n)]
    drawn = evaluate(model, rows, tokenizer=tokenizer, samples=4, max_new_tokens=LONGEST, batch_size=512)
    lengths = np.array([[len(text) for text in texts] for texts in drawn.columns["completion"]], dtype=float)
    right = drawn.values > 0
    with np.errstate(invalid="ignore"):
        each = np.where(right, lengths, 0).sum(1) / right.sum(1)
    greedy = evaluate(model, rows, tokenizer=tokenizer, max_new_tokens=LONGEST, batch_size=512)
    skills = evaluate_tasks(model, SKILLS, n, 991, tokenizer=tokenizer, batch_size=1024)
    return {
        "accuracy": Result.of(drawn.values.mean(1), [str(i) for i in range(n)]),
        "lengths": each,
        "all lengths": float(lengths.mean()),
        "greedy": float(greedy.mean),
        "greedy length": float(np.mean([float(len(t)) for t, v in zip(greedy.columns["completion"], greedy.values,
                                                                      strict=True) if v] or [np.nan])),
        "skills": float(np.mean([part.mean for part in skills.by("task").values()])),
        "text": drawn.columns["completion"][0][0],
    }  # fmt: skip


def stages(seed: int, steps: tuple[int, int], n: int) -> dict[str, dict[str, Any]]:
    """One seed: after SFT, and after each kind of GRPO from there."""
    model, tokenizer = load(zoo.get("tiny-base"))
    tune(model, tokenizer, steps[0], 3000 + seed, 5e-4, objective="sft")
    found = {"SFT": ask(model, tokenizer, n)}
    for name, reward in REWARDS.items():
        policy = copy.deepcopy(model)
        tune(policy, tokenizer, steps[1], 4000 + seed, 1e-4, objective="grpo", reward=reward)
        found[f"then GRPO, {name}"] = ask(policy, tokenizer, n)
    return found


def summarised(runs: Mapping[int, Mapping[str, dict]]) -> dict[str, Any]:
    """By model, and each GRPO against the SFT that it started from."""
    names = list(next(iter(runs.values())))
    numbers = {"accuracy": lambda f: float(f["accuracy"].mean), "length": lambda f: float(np.nanmean(f["lengths"])),
               "greedy": lambda f: f["greedy"], "greedy length": lambda f: f["greedy length"],
               "skills": lambda f: f["skills"]}  # fmt: skip
    models = {
        name: {what: mean_interval([of(run[name]) for run in runs.values()]) for what, of in numbers.items()}
        for name in names
    }

    def accuracies(name: str) -> Result:
        return stack({seed: run[name]["accuracy"] for seed, run in runs.items()}, "seed")

    changes = {}
    for name in names[1:]:
        # Both means are over the questions that both models answer right: NaN where one doesn't.
        pairs = [np.array([run[name]["lengths"], run["SFT"]["lengths"]]) for run in runs.values()]
        means = [p[:, ~np.isnan(p).any(0)].mean(1) for p in pairs]
        d = {
            "accuracy": compare(accuracies(name), accuracies("SFT")).to_dict(),
            "length": mean_interval([float(after - before) for after, before in means]),
            "length in proportion": mean_interval([float(after / before - 1) for after, before in means]),
        }
        changes[name] = {**d, "verdict": verdict(d)}
    return {"models": models, "changes": changes}


def verdict(change: Mapping[str, Any]) -> str:
    """As defined above (a single seed has no interval: its mean counts)."""
    shorter = change["length"]["high"] if change["length"]["high"] is not None else change["length"]["mean"]
    if not shorter < 0:
        return "did not hold"
    return "held" if change["accuracy"]["low"] > ALLOWED else "in part"


def markdown(summary: Mapping[str, Any]) -> str:
    """Accuracy and length by model, and the changes since SFT."""

    def of(m: Mapping[str, Any], form: str = ".2f") -> str:
        ends = "" if m["low"] is None else f" [{m['low']:{form}}, {m['high']:{form}}]"
        return f"{m.get('mean', m.get('difference')):{form}}{ends}"

    lines = ["| model | accuracy, sampled | characters of a right answer | greedy accuracy | other skills |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, row in summary["models"].items():
        cells = [of(row["accuracy"]), of(row["length"], ".1f"), of(row["greedy"]), of(row["skills"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| change since SFT | accuracy | length, same questions | in proportion | the claim |",
              "|---|---|---|---|---|"]  # fmt: skip
    for name, d in summary["changes"].items():
        cells = [of(d["accuracy"], "+.2f"), of(d["length"], "+.1f"), of(d["length in proportion"], "+.0%")]
        lines.append(f"| {name} | " + " | ".join([*cells, d["verdict"]]) + " |")
    return "\n".join(lines)


def picture(runs: Mapping[int, Mapping[str, dict]]) -> Figure:
    """Accuracy against the length of right answers, one arrow a seed from SFT to what GRPO made of it."""
    figure = Figure(figsize=(6.2, 4), layout="constrained")
    axis = figure.subplots()
    looks = {"SFT": ("o", "white"), "then GRPO, length": ("s", "black"), "then GRPO, accuracy alone": ("^", "0.6")}
    for name, (marker, color) in looks.items():
        points = [(np.nanmean(run[name]["lengths"]), run[name]["accuracy"].mean) for run in runs.values()]
        for (x, y), run in zip(points, runs.values(), strict=True):
            start = np.nanmean(run["SFT"]["lengths"]), run["SFT"]["accuracy"].mean
            axis.plot([start[0], x], [start[1], y], color="0.75", linewidth=0.8, zorder=1)
        axis.scatter(*zip(*points, strict=True), marker=marker, color=color, edgecolor="black", label=name, zorder=2)
    axis.set(xlabel="characters of a right answer", ylabel="accuracy, sampled", title="GRPO after SFT, by its reward")
    axis.set_xlim(left=0)
    axis.legend(frameon=False, fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """What a fast run must show: three models, and demonstrations of unequal length."""
    assert set(report["summary"]["models"]) == {"SFT", *(f"then GRPO, {name}" for name in REWARDS)}
    rows = [Wordy(0).row(i) for i in range(20)]
    assert all(TASK.verify(row["completion"], row) for row in rows)
    assert len({len(row["completion"]) - len(TASK.row(0, i)["completion"]) for i, row in enumerate(rows)}) > 1


def plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of one model of one seed, what is kept."""
    told: Sequence[str] = ("all lengths", "greedy", "greedy length", "skills", "text")
    return {"accuracy": float(found["accuracy"].mean), "length": float(np.nanmean(found["lengths"])),
            **{k: found[k] for k in told}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=1, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="few steps and examples: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    seeds, steps, n = (options.seeds[:1], (4, 1), 24) if options.fast else (options.seeds, STEPS, 96)
    found = in_processes(stages, [(seed, steps, n) for seed in seeds], options.workers)
    runs = dict(zip(seeds, found, strict=True))
    summary = summarised(runs)
    each = {seed: {name: plain(one) for name, one in run.items()} for seed, run in runs.items()}
    report = {"n": n, "steps": steps, "rewards": REWARDS, "summary": summary, "runs": each}
    path = write(options.out, "sft_then_grpo", report, picture(runs), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
