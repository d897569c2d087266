"""Does half fine-tuning forget less at equal accuracy, and does resetting half recover the source (arXiv:2404.18466)?

    python experiments/half_tuning.py            # 5 seeds from tiny-base, about 10 CPU-minutes
    python experiments/half_tuning.py --fast     # one seed of a few steps, a check that it runs

Forgetting. tiny-base learns to swap, shift and rotate strings, one after the other, each until 0.9 of 64 validation
questions are right (asked every 2 steps), so that arms are compared at equal accuracy on what they learn. In the base
each is the rarer way to answer; nothing is replayed. Arms: full fine-tuning, and half of the tensors by category, by
layer or of the whole model, a fresh half for every task. Asked after every task: all three, and the base's skills.
`kept` is the mean change of all that is not being trained, up to the end: of the four skills since the base, of the
first two tasks since they were learned. Every arm has two rates out of three, chosen on seeds that are not reported
among those that reach 0.9 in all rounds: its "quick" one takes the fewest steps, its "gentle" one keeps the most.
Full at its gentle rate is the control: less change in general.

Half-reset. Full fine-tuning on swap, and on shift, for 40 steps at the quick rate, then theta0 + M (theta - theta0), M
half of the tensors. For comparison half of the numbers of each tensor at random, and half of the whole change.
Recovered is the share of the skills' loss that is made good, held the share of the task's gain that is left, each a
ratio of means over tasks and masks.

Verdicts, defined before anything was scored. Forgetting: "held" when `kept` of the half minus that of full is above 0
with its 95 % interval, at the quick rates and at the gentle ones, and the accuracies on the tasks just learned differ
by at most 0.05; "in part" when that is so at one of the two; "the other way round" when it is below 0 with its interval
at both. Reset: "held" when the lower ends of both shares are above 0.5, "in part" when they are above 0.

Asked afterwards, since the gentle rates came out at the lower end of those tried: full at half of its gentle rate
("lower"). It is told, and no part of the verdicts.

The time of a step (CPU seconds in this process, full and half in turns) is told and not judged: at this size most of a
step is overhead.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena import SKILLS, in_processes, mean_interval, rounded, write
from matplotlib.figure import Figure

from analysis.evaluate import evaluate_tasks, load
from analysis.forgetting import Forgetting, forgetting
from analysis.plots import HATCHES
from surgery import zoo
from surgery.training import train
from surgery.tuning import select
from surgery.weights.with_data import loaded

SEQUENCE: tuple[str, ...] = ("swap", "shift", "rotate")
LEVELS = ("category", "layer", "model")
ARMS: dict[str, str | None] = {"full": None, **{f"half by {level}": level for level in LEVELS}}
RATES: tuple[float, ...] = (1.5e-4, 4e-4, 1e-3)
SWEPT: tuple[int, ...] = (50, 51)
"""The rates of the sweep, and its seeds."""
ENOUGH, EVERY, MOST, LONGEST, ROWS = 0.9, 2, 120, 16, 32
EQUAL, HALF = 0.05, 0.5
RESET_STEPS, DRAWS = 40, 2
"""Steps of the fine-tuning that is reset, and masks drawn of each kind."""
RESETS = (*(f"half by {level}" for level in LEVELS), "half of the numbers", "half of the change")


class Enough(Exception):
    """The round has reached its accuracy."""


def halved(level: str | None, seed: int) -> dict[str, Any] | None:
    """What stands under `tuning:`."""
    return {"half": {"level": level, "seed": seed}} if level else None


def tune(
    model: Any, tokenizer: Any, task: str, level: str | None, rate: float, seed: int, steps: int, n: int = 0
) -> int:
    """Trains in place, until the task is right often enough where `n` questions are asked; the steps it took."""
    taken = 0

    def on_step(step: int, found: Mapping[str, float]) -> None:
        nonlocal taken
        taken = step
        if step and found.get("eval/accuracy", 0.0) >= ENOUGH:
            raise Enough

    with suppress(Enough):
        train(
            model, tokenizer, data={"task": task}, objective="sft", steps=steps, batch={"rows": ROWS},
            tuning=halved(level, seed), rollouts={"max_new_tokens": LONGEST},
            optimizer={"lr": rate, "betas": (0.9, 0.98), "warmup": 4, "shape": "constant"},
            evaluate={"every": EVERY if n else 0, "n": max(1, n)}, seed=seed, on_step=on_step,
        )  # fmt: skip
    return taken


# ---- forgetting over rounds


def sequence(arm: str, rate: float, seed: int, tasks: Sequence[str], most: int, n: int) -> tuple[Forgetting, list[int]]:
    """One arm, one seed: what every round did to every task, and the steps that each took."""
    model, tokenizer = load(zoo.get("tiny-base"))
    test = 901 if seed in SWEPT else 900

    def measure() -> Any:
        return evaluate_tasks(model, (*tasks, *SKILLS), n, test, tokenizer=tokenizer, batch_size=1024)

    stages, steps = {"before": measure()}, []
    for i, task in enumerate(tasks):  # every arm meets the same stream of questions
        steps.append(tune(model, tokenizer, task, ARMS[arm], rate, 100 * (seed + 1) + i, most, min(64, n)))
        stages[task] = measure()
    return forgetting(stages), steps


def numbers(run: tuple[Forgetting, list[int]]) -> dict[str, Any]:
    """Of one run: `kept` and its two parts, the mean accuracy on tasks just learned, steps, the matrix."""
    one, steps = run
    learned = [one.matrix[one.stages.index(task), one.tasks.index(task)] for task in one.trained]
    skills, earlier = float(one.kept.mean), float(one.lost.mean)
    parts = len(SKILLS), len(one.trained) - 1
    kept = (parts[0] * skills + parts[1] * earlier) / sum(parts)
    return {"kept": kept, "skills": skills, "earlier": earlier, "learned": float(np.mean(learned)),
            "steps": list(steps), "matrix": one.matrix.tolist()}  # fmt: skip


def rates(swept: Mapping[float, Sequence[Mapping[str, Any]]], most: int) -> dict[str, float]:
    """The quick and the gentle rate of an arm: of those that reach the accuracy, or of all where none does."""
    done = [rate for rate, runs in swept.items() if all(max(run["steps"]) < most for run in runs)] or list(swept)
    steps = {rate: sum(sum(run["steps"]) for run in swept[rate]) for rate in done}
    kept = {rate: float(np.mean([run["kept"] for run in swept[rate]])) for rate in done}
    return {"quick": min(done, key=lambda r: (steps[r], r)), "gentle": max(done, key=lambda r: (kept[r], -r))}


def paired(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], what: str) -> dict[str, Any]:
    """The mean difference over seeds, with its interval."""
    return mean_interval([a[what] - b[what] for a, b in zip(ours, theirs, strict=True)])


def forgotten(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], chosen: Mapping[str, Any]) -> dict:
    """By arm and rate, every half against full at the same kind of rate, and the verdict on each level."""
    arms = {
        f"{arm}, {pace}": {"rate": f"{chosen[arm][pace]:g}"}
        | {"steps": np.mean([r["steps"] for r in each], axis=0).tolist()}
        | {what: mean_interval([r[what] for r in each]) for what in ("learned", "kept", "skills", "earlier")}
        for arm, by in runs.items() for pace, each in by.items()
    }  # fmt: skip
    differences, verdicts = {}, {}
    for arm in list(ARMS)[1:]:
        for pace, other in (("quick", "quick"), ("gentle", "gentle"), ("quick", "gentle"), ("gentle", "lower")):
            differences[f"{arm}, {pace} - full, {other}"] = {
                what: paired(runs[arm][pace], runs["full"][other], what)
                for what in ("kept", "skills", "earlier", "learned")
            }
        verdicts[arm] = verdict([differences[f"{arm}, {pace} - full, {pace}"] for pace in ("quick", "gentle")])
    return {"arms": arms, "differences": differences, "verdicts": verdicts}


def verdict(pairs: Sequence[Mapping[str, Any]]) -> str:
    """As defined above, of the differences at the quick and the gentle rates."""
    if pairs[0]["kept"]["low"] is None:
        return "not tested (one seed)"
    equal = [abs(d["learned"]["mean"]) <= EQUAL for d in pairs]
    more = sum(d["kept"]["low"] > 0 and e for d, e in zip(pairs, equal, strict=True))
    if all(d["kept"]["high"] < 0 for d in pairs):
        return "the other way round"
    return ("did not hold", "in part", "held")[more]


# ---- half of a finished model, reset


def resets(base: Any, tuned: Any, seed: int) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Kind and weights theta0 + M (theta - theta0), some masks of each kind."""
    start, end = dict(base.named_parameters()), dict(tuned.named_parameters())
    yield "half of the change", {name: start[name].lerp(end[name], 0.5) for name in start}
    for draw in range(DRAWS):
        number = 1000 * seed + draw
        for level in LEVELS:
            chosen = select(base, "half", level=level, seed=number)
            yield f"half by {level}", {name: (end if name in chosen else start)[name] for name in start}
        masks = select(base, "random", density=0.5, seed=number).masks()  # of the layers' matrices
        yield (
            "half of the numbers",
            {name: torch.where(masks[name], end[name], start[name]) if name in masks else end[name] for name in start},
        )


def reset(seed: int, rate: float, tasks: Sequence[str], steps: int, n: int) -> dict[str, dict[str, Any]]:
    """One seed: {model or kind of reset: {"target", "source"}}, means over tasks and masks."""
    base, tokenizer = load(zoo.get("tiny-base"))
    found: dict[str, dict[str, list[float]]] = {}

    def ask(kind: str, model: Any, task: str) -> None:
        parts = evaluate_tasks(model, (task, *SKILLS), n, 900, tokenizer=tokenizer, batch_size=1024).by("task")
        row = found.setdefault(kind, {"target": [], "source": []})
        row["target"].append(float(parts[task].mean))
        row["source"].append(float(np.mean([parts[skill].mean for skill in SKILLS])))

    for i, task in enumerate(tasks):
        tuned = copy.deepcopy(base)
        tune(tuned, tokenizer, task, None, rate, 500 * (seed + 1) + i, steps)
        ask("base", base, task)
        ask("tuned", tuned, task)
        for kind, weights in resets(base, tuned, 10 * seed + i):
            with torch.no_grad(), loaded(base, weights) as model:
                ask(kind, model, task)
    return {kind: {what: float(np.mean(each)) for what, each in row.items()} for kind, row in found.items()}


def recovered(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """By kind: accuracies, the two shares, the verdict."""

    def share(run: Mapping[str, Mapping[str, float]], kind: str, what: str) -> float:
        """How far `kind` is from the tuned model (source) or from the base (target) towards the other."""
        start, end = ("tuned", "base") if what == "source" else ("base", "tuned")
        return (run[kind][what] - run[start][what]) / ((run[end][what] - run[start][what]) or 1.0)

    found: dict[str, Any] = {}
    for kind in ("base", "tuned", *RESETS):
        row: dict[str, Any] = {what: mean_interval([run[kind][what] for run in runs]) for what in ("target", "source")}
        if kind in RESETS:
            row |= {"recovered": mean_interval([share(run, kind, "source") for run in runs]),
                    "held": mean_interval([share(run, kind, "target") for run in runs])}  # fmt: skip
            row["verdict"] = judged([row["recovered"]["low"], row["held"]["low"]])
        found[kind] = row
    return found


def judged(lows: Sequence[float | None]) -> str:
    """As defined above, from the lower ends of the two shares."""
    ends = [low for low in lows if low is not None]
    if len(ends) < len(lows):
        return "not tested (one seed)"
    return "held" if min(ends) > HALF else "in part" if min(ends) > 0 else "did not hold"


# ---- the time of a step


def timed(steps: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds a step of full and half fine-tuning in turns, in this process."""
    model, tokenizer = load(zoo.get("tiny-base"))
    found: dict[str, list[float]] = {"full": [], "half by category": []}
    for repeat in range(repeats):
        for arm, each in found.items():
            tuned = copy.deepcopy(model)
            began = time.process_time()
            tune(tuned, tokenizer, SEQUENCE[0], ARMS[arm], 1e-4, 700 + repeat, steps)
            each.append((time.process_time() - began) / steps)
    return found


# ---- what is told


def markdown(summary: Mapping[str, Any]) -> str:
    """The arms, the differences, the resets."""

    def of(m: Mapping[str, Any], form: str = ".2f") -> str:
        ends = "" if m["low"] is None else f" [{m['low']:{form}}, {m['high']:{form}}]"
        return f"{m['mean']:{form}}{ends}"

    def row(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [row("arm", "rate", "steps a round", "accuracy just learned", "kept", "skills", "earlier tasks")]
    lines.append("|---" * 7 + "|")
    for arm, f in summary["forgetting"]["arms"].items():
        steps = ", ".join(f"{s:.0f}" for s in f["steps"])
        lines.append(row(arm, f["rate"], steps, of(f["learned"]),
                         *(of(f[w], "+.2f") for w in ("kept", "skills", "earlier"))))  # fmt: skip
    lines += ["", row("difference", "kept", "skills", "earlier tasks", "just learned"), "|---" * 5 + "|"]
    for name, d in summary["forgetting"]["differences"].items():
        lines.append(row(name, *(of(d[w], "+.2f") for w in ("kept", "skills", "earlier", "learned"))))
    lines += ["", row("forgets less than full", "the claim"), "|---|---|"]
    lines += [row(arm, told) for arm, told in summary["forgetting"]["verdicts"].items()]
    lines += ["", row("reset", "target", "source", "of the target's gain held", "of the source's loss recovered",
                      "the claim"), "|---" * 6 + "|"]  # fmt: skip
    for kind, f in summary["reset"].items():
        shares = [of(f[w]) if w in f else "" for w in ("held", "recovered")]
        lines.append(row(kind, of(f["target"]), of(f["source"]), *shares, f.get("verdict", "")))
    return "\n".join(lines)


def picture(summary: Mapping[str, Any]) -> Figure:
    """What every arm kept at its two rates; target and source of the resets."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    for i, arm in enumerate(ARMS):
        for j, pace in enumerate(("quick", "gentle")):
            kept = summary["forgetting"]["arms"][f"{arm}, {pace}"]["kept"]
            at = i + 0.38 * (j - 0.5)
            left.bar(at, kept["mean"], 0.36, color="0.75" if j else "white", edgecolor="black",
                     hatch=HATCHES[0 if j else 1], label=f"{pace} rate" if i == 0 else None)  # fmt: skip
            if kept["low"] is not None:
                left.vlines(at, kept["low"], kept["high"], color="black", lw=1.4)
    left.axhline(0, color="black", lw=0.8)
    left.set_xticks(range(len(ARMS)), [arm.replace(" by ", "\nby ") for arm in ARMS])
    left.set(ylabel="change of accuracy on all that is not trained", title="Kept, at equal accuracy on what is learned")
    left.legend(frameon=False, loc="lower right")
    marks = dict(zip(("base", "tuned", *RESETS), "P*os^Dv", strict=True))
    for kind, mark in marks.items():
        x, y = summary["reset"][kind]["target"], summary["reset"][kind]["source"]
        filled = kind in ("base", "tuned")
        right.plot(x["mean"], y["mean"], mark, color="black" if filled else "white", markeredgecolor="black",
                   markersize=10, linestyle="none", label=kind, zorder=3)  # fmt: skip
        if x["low"] is not None:
            right.hlines(y["mean"], x["low"], x["high"], color="0.4", lw=1)
            right.vlines(x["mean"], y["low"], y["high"], color="0.4", lw=1)
    right.set(xlabel="accuracy on the task", ylabel="accuracy on the base's skills", xlim=(-0.05, 1.05),
              ylim=(0, 1.05), title="Half of a finished fine-tuning, reset")  # fmt: skip
    right.legend(frameon=False, loc="lower left")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """What a fast run must show: every arm at two rates, every reset, and a base that is nobody's fine-tuning."""
    found = report["summary"]
    assert set(found["forgetting"]["arms"]) == {"full, lower"} | {
        f"{arm}, {pace}" for arm in ARMS for pace in ("quick", "gentle")
    }
    assert set(found["reset"]) == {"base", "tuned", *RESETS}
    assert found["reset"]["base"]["source"]["mean"] > 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=1, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="few steps and examples: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    seeds, swept, tried, most, n = options.seeds, SWEPT, RATES, MOST, 64
    tasks, steps, timing = SEQUENCE, RESET_STEPS, (10, 5)
    if options.fast:
        seeds, swept, tried, most, n = seeds[:1], SWEPT[:1], RATES[1:2], 2, 8
        tasks, steps, timing = SEQUENCE[::2], 2, (1, 1)
    jobs = [(arm, rate, seed, tasks, most, n) for arm in ARMS for rate in tried for seed in swept]
    done = dict(zip(jobs, map(numbers, in_processes(sequence, jobs, options.workers)), strict=True))
    sweep = {arm: {rate: [done[arm, rate, seed, tasks, most, n] for seed in swept] for rate in tried} for arm in ARMS}
    chosen = {arm: rates(by, most) for arm, by in sweep.items()}
    chosen["full"]["lower"] = chosen["full"]["gentle"] / 2
    wanted = [(arm, rate, seed, tasks, most, n) for arm in ARMS for rate in set(chosen[arm].values()) for seed in seeds]
    done |= dict(zip(wanted, map(numbers, in_processes(sequence, wanted, options.workers)), strict=True))
    runs = {arm: {pace: [done[arm, rate, seed, tasks, most, n] for seed in seeds] for pace, rate in chosen[arm].items()}
            for arm in ARMS}  # fmt: skip
    put_back = in_processes(
        reset, [(seed, chosen["full"]["quick"], tasks[:2], steps, n) for seed in seeds], options.workers
    )
    seconds = timed(*timing)
    summary = {
        "forgetting": forgotten(runs, chosen),
        "reset": recovered(put_back),
        "half over full, CPU seconds a step": float(np.median(np.divide(seconds["half by category"], seconds["full"]))),
    }
    report = {
        "n": n, "rows": ROWS, "sequence": tasks, "enough": ENOUGH, "most": most,
        "rates": [f"{rate:g}" for rate in tried],
        "chosen": {arm: {pace: f"{rate:g}" for pace, rate in by.items()} for arm, by in chosen.items()},
        "sweep": {arm: {f"{rate:g}": [{k: r[k] for k in ("kept", "learned", "steps")} for r in each]
                        for rate, each in by.items()} for arm, by in sweep.items()},
        "summary": summary, "runs": runs, "resets": put_back, "seconds a step": seconds,
    }  # fmt: skip
    path = write(options.out, "half_tuning", report, picture(summary), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
