"""Does GRPO forget less than SFT over a sequence of tasks, at equal accuracy on each (arXiv:2507.05386)?

    python experiments/forgetting.py            # 5 seeds from tiny-base, about 5 CPU-minutes
    python experiments/forgetting.py --fast     # one seed of a few steps, a check that it runs

tiny-base learns sums (worked out), then to swap a string's ends, then sums of more terms than it ever saw, each until
0.9 of 64 validation questions are right (asked every 4 steps), so that the arms are compared at equal accuracy on what
they learn; nothing is replayed. In the base each is the rarer way to answer, where GRPO finds it by sampling (on a
seed that is not reported it found the first two, but not descend or unique in 120 steps). Three arms on the same
questions: GRPO with the exact answer as reward; SFT on right demonstrations at the zoo's rate; SFT at GRPO's rate.
After each stage every task, and the base's other skills, are asked: a[i, j], FM and AA of `analysis.forgetting`.

The verdict was defined before anything was scored: the claim (FM of SFT far below 0, of GRPO about 0, at equal accuracy
on the task just learned) holds against an arm of SFT when all of these are true, and in part when only the first is:
FM of GRPO minus that of SFT is above zero with its 95 % interval; FM of SFT is below -0.1; FM of GRPO is above -0.05;
the accuracies on the tasks just learned differ by at most 0.05.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from arena import SKILLS, in_processes, mean_interval, rounded, write
from matplotlib.figure import Figure

from analysis.comparison import compare
from analysis.evaluate import evaluate_tasks, load
from analysis.forgetting import Forgetting, forgetting
from analysis.results import stack
from surgery import zoo
from surgery.tasks import TASKS, make_task
from surgery.training import train

SEQUENCE = ("chain", "swap", "long")
TASKS.register("long")(replace(make_task("chain", terms=[7, 8]), name="long"))
ARMS: dict[str, dict[str, Any]] = {
    "GRPO": {"objective": "grpo", "reward": "accuracy", "lr": 1e-4},
    "SFT": {"objective": "sft", "lr": 3e-4},
    "SFT, GRPO's rate": {"objective": "sft", "lr": 1e-4},
}
ENOUGH, EVERY, MOST = 0.9, 4, 120
MUCH, LITTLE, EQUAL = -0.1, -0.05, 0.05


class Enough(Exception):
    """The stage has reached its accuracy."""


def learn(model: Any, tokenizer: Any, arm: str, task: str, seed: int, most: int, n: int) -> int:
    """Trains in place until the task is right often enough; the steps it took."""
    words = dict(ARMS[arm])
    taken = 0

    def on_step(step: int, found: Mapping[str, float]) -> None:
        nonlocal taken
        taken = step
        if step and found.get("eval/accuracy", 0.0) >= ENOUGH:
            raise Enough

    with suppress(Enough):
        train(
            model, tokenizer, data={"task": task}, steps=most, batch={"rows": 64},
            rollouts={"prompts": 16, "group": 8, "max_new_tokens": 48},
            optimizer={"lr": words.pop("lr"), "betas": (0.9, 0.98), "weight_decay": 0.01, "warmup": 4,
                       "shape": "constant"},
            evaluate={"every": EVERY, "n": n}, seed=seed, on_step=on_step, **words,
        )  # fmt: skip
    return taken


def sequence(arm: str, seed: int, tasks: Sequence[str], most: int, n: int) -> tuple[Forgetting, list[int]]:
    """One arm, one seed: what every stage did to every task, and the steps that each stage took."""
    model, tokenizer = load(zoo.get("tiny-base"))
    asked = (*SEQUENCE, *SKILLS)

    def measure() -> Any:
        return evaluate_tasks(model, asked, n, 900, tokenizer=tokenizer, batch_size=1024)

    stages, steps = {"before": measure()}, []
    for i, task in enumerate(tasks):
        # Every arm meets the same stream of questions.
        steps.append(learn(model, tokenizer, arm, task, 100 * (seed + 1) + i, most, min(64, n)))
        stages[task] = measure()
    return forgetting(stages), steps


def learned(one: Forgetting) -> float:
    """Mean accuracy on the tasks just learned, a[j, j]."""
    at = [one.matrix[one.stages.index(task), one.tasks.index(task)] for task in one.trained]
    return float(np.mean(at))


def summarised(runs: Mapping[str, Mapping[int, Forgetting]], steps: Mapping[str, Mapping[int, list[int]]]) -> dict:
    """By arm: FM, AA, a[j, j], the other skills, the mean matrix; and GRPO against each SFT."""
    arms = {
        arm: {
            "FM": mean_interval([float(r.lost.mean) for r in each.values()]),
            "AA": mean_interval([float(r.final.mean) for r in each.values()]),
            "learned": mean_interval([learned(r) for r in each.values()]),
            "others": mean_interval([float(r.kept.mean) for r in each.values()]),
            "matrix": np.mean([r.matrix for r in each.values()], axis=0).tolist(),
            "steps": np.mean(list(steps[arm].values()), axis=0).tolist(),
        }
        for arm, each in runs.items()
    }
    first = next(iter(runs["GRPO"].values()))
    found: dict[str, Any] = {"stages": first.stages, "tasks": first.tasks, "arms": arms, "differences": {}}
    for arm, each in runs.items():
        if arm == "GRPO":
            continue
        ours = stack({seed: r.lost for seed, r in runs["GRPO"].items()}, "seed")
        d = {
            "FM": compare(ours, stack({seed: r.lost for seed, r in each.items()}, "seed")).to_dict(),
            "learned": mean_interval([learned(runs["GRPO"][s]) - learned(each[s]) for s in each]),
            "others": mean_interval([float(runs["GRPO"][s].kept.mean - each[s].kept.mean) for s in each]),
        }
        found["differences"][f"GRPO - {arm}"] = {**d, "verdict": verdict(d, arms["GRPO"], arms[arm])}
    return found


def verdict(difference: Mapping[str, Any], grpo: Mapping[str, Any], sft: Mapping[str, Any]) -> str:
    """As defined above."""
    if difference["FM"]["low"] <= 0:
        return "did not hold"
    much, little = sft["FM"]["mean"] < MUCH, grpo["FM"]["mean"] > LITTLE
    return "held" if much and little and abs(difference["learned"]["mean"]) <= EQUAL else "in part"


def markdown(summary: Mapping[str, Any]) -> str:
    """FM and the rest by arm, the differences, and what each task came to after each stage."""

    def of(m: Mapping[str, Any], form: str = ".2f") -> str:
        ends = "" if m["low"] is None else f" [{m['low']:{form}}, {m['high']:{form}}]"
        return f"{m.get('mean', m.get('difference')):{form}}{ends}"

    lines = ["| arm | steps a stage | a[j, j] | FM | AA | change of the other skills |", "|---|---|---|---|---|---|"]
    for arm, row in summary["arms"].items():
        steps = ", ".join(f"{s:.0f}" for s in row["steps"])
        cells = [steps, of(row["learned"]), of(row["FM"], "+.2f"), of(row["AA"]), of(row["others"], "+.2f")]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", "| difference | FM | a[j, j] | other skills | the claim |", "|---|---|---|---|---|"]
    for name, d in summary["differences"].items():
        cells = [of(d["FM"], "+.2f"), of(d["learned"], "+.2f"), of(d["others"], "+.2f"), d["verdict"]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any]) -> Figure:
    """The mean matrix a[i, j] of every arm."""
    arms = summary["arms"]
    figure = Figure(figsize=(4.1 * len(arms), 3.1), layout="constrained")
    for axis, (arm, row) in zip(figure.subplots(1, len(arms)), arms.items(), strict=True):
        values = np.array(row["matrix"])
        axis.imshow(values, cmap="Greys", vmin=0, vmax=2.2, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            own = summary["stages"][i] == summary["tasks"][j]
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, weight="bold" if own else "normal")
        axis.set_xticks(range(len(summary["tasks"])), summary["tasks"], rotation=40, ha="right")
        axis.set_yticks(range(len(summary["stages"])), summary["stages"])
        axis.set(title=f"{arm}: FM {row['FM']['mean']:+.2f}", xlabel="asked")
    figure.axes[0].set_ylabel("after training on")
    return figure


def check(report: Mapping[str, Any]) -> None:
    """What a fast run must show: every arm, and a matrix of stages by tasks."""
    assert set(report["summary"]["arms"]) == set(ARMS)
    for row in report["summary"]["arms"].values():
        assert np.shape(row["matrix"]) == (len(report["summary"]["stages"]), len(SEQUENCE) + len(SKILLS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=1, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="few steps and examples: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    fast = (options.seeds[:1], SEQUENCE[:2], 1, 8)
    seeds, tasks, most, n = fast if options.fast else (options.seeds, SEQUENCE, MOST, 64)
    jobs = [(arm, seed, tasks, most, n) for seed in seeds for arm in ARMS]
    results = in_processes(sequence, jobs, options.workers)
    runs: dict[str, dict[int, Forgetting]] = {arm: {} for arm in ARMS}
    steps: dict[str, dict[int, list[int]]] = {arm: {} for arm in ARMS}
    for (arm, seed, *_), (one, taken) in zip(jobs, results, strict=True):
        runs[arm][seed], steps[arm][seed] = one, taken
    summary = summarised(runs, steps)
    each = {arm: {seed: {"matrix": r.matrix.tolist(), "steps": steps[arm][seed]} for seed, r in by.items()}
            for arm, by in runs.items()}  # fmt: skip
    report = {"n": n, "sequence": tasks, "arms": ARMS, "enough": ENOUGH, "summary": summary, "runs": each}
    path = write(options.out, "forgetting", report, picture(summary), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
