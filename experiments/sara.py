"""Are the smallest weights the ones to train (SaRA, arXiv:2409.06633)?

    python experiments/sara.py            # 5 seeds and the sweeps
    python experiments/sara.py --fast     # one seed of a few steps, a check that it runs

A fixed 15 % of the numbers in tiny-base's attention and MLPs, chosen among all tensors together, learn a task for 40
steps as `one_task.py` says: the smallest, the largest, and random ones (others with each seed). Then what SaRA has
besides, on the smallest: at half of the run those that have grown above the threshold stop (progressive); the nuclear
norm of what is trained is added to the loss, by the released script's weight (5e-4) and by twenty times that; and all
of it with the script's weight, SaRA as published. Every arm has the rate with the highest mean of task and kept skills
at the end of its runs in the sweep.

Scored at the end of a run: accuracy on the task and on the base's skills, and what was kept when 0.9 of the task was
right. Of the change D = W - W0 of each matrix the effective rank (e to the entropy of its singular values as shares)
and the nuclear norm, and the nuclear norm of the trained numbers as a matrix, on which the term acts, against its
value before; means over matrices.

The verdict was defined before anything was scored. Smallest: against another choice it is better when the skills kept
at the end, minus the other's, are above 0 with their 95 % interval over seeds, and the task, minus the other's, is not
below -0.05 on the mean; held when better than the largest and than random, in part when better than one. Progressive:
held when task or kept is above that without it with its interval, and neither is below it with its. Nuclear norm: held
when by one of the two weights the effective rank of D is below that without it, with its interval, at a task within
0.05.
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
from arena import mean_interval, one_thread, rounded, write
from matplotlib.figure import Figure
from one_task import EQUAL, above, accuracies, against, below, best, learn, scores, start, sweep, told

from surgery.tuning import select
from surgery.tuning.nuclear import nuclear_norm

DENSITY, STEPS = 0.15, 40
SMALL: dict[str, Any] = {"density": DENSITY, "scope": "global"}
ARMS: dict[str, dict[str, Any]] = {
    "smallest": {"sara": SMALL},
    "largest": {"magnitude": SMALL},
    "random": {"random": SMALL},
    "progressive": {"sara": {**SMALL, "refresh": STEPS // 2}},
    "nuclear 5e-4": {"sara": {**SMALL, "nuclear": 5e-4}},
    "nuclear 1e-2": {"sara": {**SMALL, "nuclear": 1e-2}},
    "SaRA": {"sara": {**SMALL, "refresh": STEPS // 2, "nuclear": 5e-4}},
}
RATES: tuple[float, ...] = (4e-4, 6e-4, 1e-3)
NUCLEAR = ("nuclear 5e-4", "nuclear 1e-2")


def score(run: Mapping[str, Any]) -> float:
    """What the sweep looks for: the task and what was kept."""
    return (run["end"] + run["end kept"]) / 2


def effective_rank(delta: torch.Tensor) -> float:
    """e to the entropy of the singular values, as shares of their sum (Roy & Vetterli 2007); 0 for a zero matrix."""
    values = torch.linalg.svdvals(delta.double())
    shares = values[values > 0] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum())) if len(shares) else 0.0


def trained(arm: str, rate: float, seed: int, steps: int, n: int) -> dict[str, Any]:
    """One run of an arm, with what it did to the weights."""
    model, tokenizer = start()
    ((name, words),) = ARMS[arm].items()
    tuning = {name: {**words, **({"seed": seed} if name == "random" else {})}}
    own = {k: v for k, v in tuning[name].items() if k not in ("refresh", "nuclear")}
    chosen = select(model, name, **own)
    before = {name: model.get_parameter(name).detach().clone() for name in chosen}
    run = learn(model, tokenizer, rate, seed, steps, n, tuning, every=4)
    skills = accuracies(model, tokenizer, n, 901 if seed >= 90 else 900)
    run |= {"end": skills.pop("shift"), "end kept": float(np.mean(list(skills.values())))}
    run["there"] = run["kept"]
    norms, ranks, ratios = [], [], []
    moved = 0
    for tensor, old in before.items():
        new, shape, at = model.get_parameter(tensor).detach(), tuple(old.shape), chosen.flat(tensor)
        delta = new - old
        moved += int((delta != 0).sum())
        ranks.append(effective_rank(delta))
        norms.append(float(nuclear_norm(delta.flatten(), None, shape)))
        held = [float(nuclear_norm(w.flatten()[at], at, shape)) for w in (new, old)]
        ratios.append(held[0] / held[1])
    return {**run, "moved": moved, "rank": float(np.mean(ranks)), "norm": float(np.mean(norms)),
            "trained norm": float(np.mean(ratios))}  # fmt: skip


MEASURES = ("end", "end kept", "there", "area", "rank", "norm", "trained norm")


def summarised(runs: Mapping[str, Sequence[Mapping[str, Any]]], rates: Mapping[str, float]) -> dict[str, Any]:
    """What every arm came to, the smallest against the others, and the verdicts."""
    arms = {arm: {m: mean_interval([run[m] for run in each]) for m in MEASURES}
            | {"rate": rates[arm], "moved": float(np.mean([run["moved"] for run in each])),
               "at": float(np.mean([run["at"] or STEPS for run in each]))} for arm, each in runs.items()}  # fmt: skip
    small = runs["smallest"]
    differences = {
        arm: {m: against(each, small, m) for m in MEASURES} for arm, each in runs.items() if arm != "smallest"
    }
    return {"arms": arms, "differences": differences, "verdicts": verdicts(differences)}


def verdicts(differences: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """As defined above; differences are the other arm minus the smallest."""
    words = ("did not hold", "in part", "held")
    better = [below(differences[arm]["end kept"]) and differences[arm]["end"]["mean"] <= EQUAL
              for arm in ("largest", "random")]  # fmt: skip
    two = [differences["progressive"][m] for m in ("end", "end kept")]
    low = [below(differences[arm]["rank"]) and abs(differences[arm]["end"]["mean"]) <= EQUAL for arm in NUCLEAR]
    return {
        "the smallest keep more": words[sum(better)],
        "progressive": "held" if any(map(above, two)) and not any(map(below, two)) else "did not hold",
        "nuclear norm lowers the rank": "held" if any(low) else "did not hold",
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """A line an arm, its differences to the smallest, and the verdicts."""
    heads = ["trained", "rate", "moved", "the task", "kept", "kept at 0.9", "area", "rank of D", "norm of D",
             "norm of what is trained"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    digits = {"rank": 1, "norm": 2}
    for arm, row in summary["arms"].items():
        cells = [f"{row['rate']:g}", f"{row['moved']:,.0f}", *(told(row[m], digits=digits.get(m, 2)) for m in MEASURES)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", "| minus the smallest | " + " | ".join(heads[3:]) + " |", "|---" * (len(heads) - 2) + "|"]
    for arm, row in summary["differences"].items():
        cells = [told(row[m], "+", digits.get(m, 2)) for m in MEASURES]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", *(f"* {claim}: {word}" for claim, word in summary["verdicts"].items())]
    return "\n".join(lines)


def picture(summary: Mapping[str, Any], runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Task against kept skills, by seed; the rank of the change, and the norm of what is trained, by arm."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    marks = ("o", "s", "^", "D", "v", "P", "*")
    for (arm, each), mark in zip(runs.items(), marks, strict=True):
        face = "black" if arm == "smallest" else "0.6" if arm in ("largest", "random") else "white"
        left.plot(
            [r["end"] for r in each], [r["end kept"] for r in each], mark, color="black", mfc=face, label=arm, ms=6
        )
    left.set(xlabel="the task", ylabel="kept", title=f"accuracies after {STEPS} steps")
    left.legend(frameon=False, fontsize=8)
    titles = {
        "rank": "effective rank of W - W0",
        "trained norm": "nuclear norm of what is trained,\nas share of its start",
    }
    for axis, measure in ((middle, "rank"), (right, "trained norm")):
        for i, (arm, row) in enumerate(summary["arms"].items()):
            axis.plot([r[measure] for r in runs[arm]], [i] * len(runs[arm]), "o", color="0.6", ms=4)
            axis.plot(2 * [row[measure]["mean"]], [i - 0.3, i + 0.3], color="black")
        axis.set_yticks(range(len(runs)), list(runs) if axis is middle else [""] * len(runs))
        axis.invert_yaxis()
        axis.set(title=titles[measure])
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: all begin as one model, none moves more than its budget, and each choice moves something."""
    runs = report["runs"]
    first = [each[0]["loss"] for each in runs.values()]
    assert max(first) - min(first) < 1e-6, first
    assert all(0 < run["moved"] <= report["budget"] for each in runs.values() for run in each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the data")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--fast", action="store_true", help="few steps and questions: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    one_thread()
    seeds, rates, n, steps = options.seeds, RATES, 100, STEPS
    if options.fast:
        seeds, rates, n, steps = seeds[:1], RATES[1:2], 8, 2
    found = sweep(trained, ARMS, rates, steps, n)
    swept = scores(found, score)
    print(rounded(swept), file=sys.stderr)
    own = {arm: best(found[arm], score) for arm in ARMS}
    runs = {arm: [trained(arm, own[arm], seed, steps, n) for seed in seeds] for arm in ARMS}
    summary = summarised(runs, own)
    budget = select(start()[0], "sara", **SMALL).count
    report = {"n": n, "budget": budget, "seeds": seeds, "summary": summary, "swept": swept, "runs": runs}
    path = write(options.out, "sara", report, picture(summary, runs), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
