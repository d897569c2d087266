"""Which five per cent learn most, and which forget least: LIFT's, or others of the same number (arXiv:2506.00772)?

    python experiments/lift_masks.py            # 5 seeds from tiny-base
    python experiments/lift_masks.py --fast     # one seed of a few steps, a check that it runs

The target is three string tasks at once (shift, descend, rotate; 32 demonstrations a step, 40 steps), where no arm is
soon at 1.00; the source is what tiny-base can do, facts, copy, reverse and sort. Every mask has 5 % of each projection,
drawn once: LIFT's largest numbers after rank reduction, LIFT's smallest (what the authors' released scripts train: they
name no direction), the largest and smallest numbers as they are, random ones, and those of the largest gradient on the
first four batches. Besides, full fine-tuning, and a LoRA (scale 1) of the rank that has as many numbers as the masks.

On a seed that is not reported every arm has a sweep over three rates: the one with the most target accuracy over the
run (validation questions, asked every 4 steps) is its "quick" rate, and the one that keeps the most of the source when
0.75 of the validation questions are right is its "gentle" one, among the rates that get there (the quick rate where
none does). LIFT's rank is chosen among 4, 8, 16 and 32 by the same accuracy at the middle rate, before that.
Target: test accuracy after all steps, at the quick rates. Retention: accuracy on the source where 0.75 is reached (a
run that does not get there is asked at its end), at the gentle rates.

The verdicts were defined before anything was scored. Differences are paired over seeds, with 95 % intervals; above and
below mean that the interval is on that side of 0. LIFT's largest on the target: "held" when above magnitude's largest
and smallest and random, "in part" when above one of them and below none, else "did not hold". The direction is told as
it is. Retention, against LoRA and against full: "held" when above, with target accuracies there that differ by at most
0.05; "the other way round" when below with equal ones; else "no clear difference", or "not at equal accuracy".

Asked afterwards, since LIFT at its gentle rate hardly got there in 40 steps and full and LoRA had no rate as slow: LIFT
and random masks at their gentle rates, full and LoRA at half of theirs, all for as many as 80 steps, ended at 0.75.
It is told, and no part of the verdicts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from arena import SKILLS, STRING, in_processes, mean_interval, rounded, write
from matplotlib.figure import Figure

from analysis.evaluate import evaluate, load, task_rows
from analysis.plots import HATCHES
from surgery import zoo
from surgery.training import train
from surgery.tuning import select
from surgery.tuning.decomposed import lora_rank_for, lora_size

TARGET = ("shift", "descend", "rotate")
DENSITY = 0.05
MASKS: dict[str, dict[str, Any]] = {
    "LIFT, largest": {"lift": {}},
    "LIFT, smallest": {"lift": {"direction": "smallest"}},
    "magnitude, largest": {"magnitude": {}},
    "magnitude, smallest": {"magnitude": {"direction": "smallest"}},
    "random": {"random": {}},
    "gradient": {"gradient": {"batches": 4}},
}
ARMS = (*MASKS, "full", "LoRA")
LIFT, OTHERS = "LIFT, largest", ("magnitude, largest", "magnitude, smallest", "random")
RATES: dict[str, tuple[float, ...]] = dict.fromkeys((*MASKS, "LoRA"), (3e-3, 6e-3, 1.2e-2))
RATES["full"] = (3e-4, 6e-4, 1.2e-3)
RANKS: tuple[int, ...] = (4, 8, 16, 32)
SWEPT = (60,)
"""LIFT's ranks, and the seed of the sweeps."""
ENOUGH, EVERY, ROWS, STEPS, EQUAL = 0.75, 4, 32, 40, 0.05
AFTERWARDS = {LIFT: 1.0, "random": 1.0, "full": 0.5, "LoRA": 0.5}
"""The arms that run on until they get there, and at what share of their gentle rates."""


class Enough(Exception):
    """The run has reached its accuracy, and is to end there."""


@cache
def base() -> tuple[Any, Any]:
    """tiny-base and its tokenizer."""
    return load(zoo.get("tiny-base"))


@cache
def budget() -> tuple[int, int]:
    """How many numbers a mask has, and the rank of the LoRA that is nearest to it."""
    count = select(base()[0], "random", density=DENSITY).count
    return count, lora_rank_for(base()[0], count)


def tuning(arm: str, rank: int, seed: int) -> dict[str, Any] | None:
    """What stands under `tuning:`."""
    if arm == "full":
        return None
    if arm == "LoRA":
        return {"lora": {"rank": budget()[1], "seed": seed}}
    ((name, words),) = MASKS[arm].items()
    own = {"lift": {"rank": rank}, "random": {"seed": seed}}.get(name, {})
    return {name: {"density": DENSITY, **words, **own}}


def accuracies(model: Any, tokenizer: Any, n: int, seed: int) -> dict[str, float]:
    """Mean accuracy on `n` questions of every task of the target, and of every skill of the source."""
    rows = task_rows([*TARGET, *SKILLS], n, seed)
    found = evaluate(model, rows, tokenizer=tokenizer, max_new_tokens=STRING, batch_size=1024)
    own = np.isin(found.columns["task"], TARGET)
    return {"target": float(found.values[own].mean()), "source": float(found.values[~own].mean())}


def learn(arm: str, rate: float, rank: int, seed: int, steps: int, n: int, ends: bool = False) -> dict[str, Any]:
    """One run: the validation `curve`, its mean `area`, test accuracies `there` (`at` that step) and at the `end`.

    `ends`: the run is over where it gets there.
    """
    model, tokenizer = load(zoo.get("tiny-base"))
    test = 901 if seed in SWEPT else 900
    curve: list[float] = []
    found: dict[str, Any] = {"at": None}

    def on_step(step: int, metrics: Mapping[str, float]) -> None:
        if "eval/accuracy" not in metrics:
            return
        curve.append(metrics["eval/accuracy"])
        if found["at"] is None and step and curve[-1] >= ENOUGH:
            found.update(at=step, there=accuracies(model, tokenizer, n, test))
            if ends:
                raise Enough

    with suppress(Enough):
        train(
            model, tokenizer, data=[{"task": task} for task in TARGET], objective="sft", steps=steps, seed=seed,
            batch={"rows": ROWS}, tuning=tuning(arm, rank, seed), rollouts={"max_new_tokens": STRING}, on_step=on_step,
            optimizer={"lr": rate, "betas": (0.9, 0.98), "warmup": 4, "shape": "constant"},
            evaluate={"every": EVERY, "n": min(96, 3 * n)},
        )  # fmt: skip
    asked = found["at"] is not None and (ends or found["at"] == steps)
    end = found["there"] if asked else accuracies(model, tokenizer, n, test)
    return {"there": end, **found, "end": end, "curve": curve, "area": float(np.mean(curve[1:]))}


# ---- what the sweeps choose


def chosen(swept: Mapping[float, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """The quick and the gentle rate of an arm; of equals the smaller."""
    area = {rate: float(np.mean([run["area"] for run in runs])) for rate, runs in swept.items()}
    quick = max(sorted(area), key=lambda rate: area[rate])
    kept = {rate: float(np.mean([run["there"]["source"] for run in runs])) for rate, runs in swept.items()
            if all(run["at"] is not None for run in runs)}  # fmt: skip
    return {"quick": quick, "gentle": max(sorted(kept), key=lambda rate: kept[rate]) if kept else quick}


def paired(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], when: str, what: str) -> dict:
    """The mean difference over seeds, with its interval."""
    return mean_interval([a[when][what] - b[when][what] for a, b in zip(ours, theirs, strict=True)])


def continued(runs: Mapping[str, Sequence[Mapping[str, Any]]], rates: Mapping[str, float]) -> dict[str, Any]:
    """What was asked afterwards: by arm, and LIFT's largest against it."""
    found: dict[str, Any] = {}
    for arm, each in runs.items():
        found[arm] = {
            "rate": f"{rates[arm]:g}",
            "got there": [sum(r["at"] is not None for r in each), len(each)],
            "steps": float(np.mean([r["at"] or 2 * STEPS for r in each])),
            **{f"{what} there": mean_interval([r["there"][what] for r in each]) for what in ("target", "source")},
        }
        if arm != LIFT:
            found[arm]["difference"] = paired(runs[LIFT], each, "there", "source")
    return found


def summarised(
    runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], rates: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """By arm; LIFT against the others on the target and on the source; the verdicts."""
    arms = {}
    for arm, by in runs.items():
        quick, gentle = by["quick"], by["gentle"]
        arms[arm] = {
            "rates": rates[arm],
            "target": mean_interval([r["end"]["target"] for r in quick]),
            "source": mean_interval([r["end"]["source"] for r in quick]),
            "got there": [sum(r["at"] is not None for r in gentle), len(gentle)],
            "steps": float(np.mean([r["at"] or STEPS for r in gentle])),
            "target there": mean_interval([r["there"]["target"] for r in gentle]),
            "source there": mean_interval([r["there"]["source"] for r in gentle]),
        }
    target = {arm: paired(runs[LIFT]["quick"], runs[arm]["quick"], "end", "target") for arm in ARMS if arm != LIFT}
    retention = {
        arm: {what: paired(runs[LIFT]["gentle"], runs[arm]["gentle"], "there", what) for what in ("source", "target")}
        for arm in ARMS if arm != LIFT
    }  # fmt: skip
    verdicts = {
        "LIFT's largest learn more than magnitude's and random ones": on_target([target[arm] for arm in OTHERS]),
        "largest or smallest": {1: "the largest learn more", -1: "the smallest learn more"}.get(
            side(target["LIFT, smallest"]), "no clear difference"
        ),
        **{f"LIFT's largest keep more than {arm}": on_source(retention[arm]) for arm in ("LoRA", "full")},
    }
    return {"arms": arms, "target": target, "retention": retention, "verdicts": verdicts}


def side(difference: Mapping[str, Any]) -> int:
    """1 above 0, -1 below, 0 neither (or a single seed)."""
    if difference["low"] is None:
        return 0
    return int(difference["low"] > 0) - int(difference["high"] < 0)


def on_target(differences: Sequence[Mapping[str, Any]]) -> str:
    """As defined above."""
    sides = [side(d) for d in differences]
    if min(sides) == 1:
        return "held"
    return "in part" if max(sides) == 1 and min(sides) == 0 else "did not hold"


def on_source(found: Mapping[str, Mapping[str, Any]]) -> str:
    """As defined above."""
    if abs(found["target"]["mean"]) > EQUAL:
        return "not at equal accuracy"
    return {1: "held", -1: "the other way round"}.get(side(found["source"]), "no clear difference")


# ---- what is told


def markdown(summary: Mapping[str, Any]) -> str:
    """The arms, the differences, the verdicts."""

    def of(m: Mapping[str, Any], form: str = ".2f") -> str:
        ends = "" if m["low"] is None else f" [{m['low']:{form}}, {m['high']:{form}}]"
        return f"{m['mean']:{form}}{ends}"

    def row(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [row("arm", "rates", "target at the end", "source at the end", f"got to {ENOUGH}", "steps", "target there",
                 "source there"), "|---" * 8 + "|"]  # fmt: skip
    for arm, f in summary["arms"].items():
        lines.append(row(
            arm, f"{f['rates']['quick']:g}, {f['rates']['gentle']:g}", of(f["target"]), of(f["source"]),
            "{} of {}".format(*f["got there"]), f"{f['steps']:.0f}", of(f["target there"]), of(f["source there"]),
        ))  # fmt: skip
    lines += ["", row(f"{LIFT} minus", "target at the end", "source there", "target there"), "|---" * 4 + "|"]
    for arm, d in summary["target"].items():
        kept = summary["retention"][arm]
        lines.append(row(arm, of(d, "+.2f"), of(kept["source"], "+.2f"), of(kept["target"], "+.2f")))
    lines += ["", row("asked afterwards", "rate", f"got to {ENOUGH}", "steps", "target there", "source there",
                      f"{LIFT} minus it"), "|---" * 7 + "|"]  # fmt: skip
    for arm, f in summary["afterwards"].items():
        less = of(f["difference"], "+.2f") if "difference" in f else ""
        lines.append(row(arm, f["rate"], "{} of {}".format(*f["got there"]), f"{f['steps']:.0f}",
                         of(f["target there"]), of(f["source there"]), less))  # fmt: skip
    lines += ["", row("claim", "verdict"), "|---|---|"]
    lines += [row(claim, told) for claim, told in summary["verdicts"].items()]
    return "\n".join(lines)


def picture(summary: Mapping[str, Any]) -> Figure:
    """Bars: what each arm learned in equal steps, and what it kept of the source at equal accuracy."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for i, (arm, found) in enumerate(summary["arms"].items()):
        for axis, what in ((left, "target"), (right, "source there")):
            m = found[what]
            axis.barh(i, m["mean"], color="0.8" if arm in MASKS else "white", edgecolor="black",
                      hatch=HATCHES[1 if arm == LIFT else 0])  # fmt: skip
            if m["low"] is not None:
                axis.hlines(i, *np.clip([m["low"], m["high"]], 0, 1), color="black", lw=1.6)
        if found["got there"][0] < found["got there"][1]:
            right.text(0.02, i, "{} of {} got there".format(*found["got there"]), va="center", fontsize="small",
                       bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
    left.set_yticks(range(len(ARMS)), list(summary["arms"]))
    left.invert_yaxis()
    left.set(xlabel="accuracy", xlim=(0, 1), title="Target, after equal steps")
    right.set(xlabel="accuracy", xlim=(0, 1), title=f"Source, where {ENOUGH} of the target is reached")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """What a fast run must show: every arm, and budgets that are equal but for what a whole rank rounds off."""
    assert set(report["summary"]["arms"]) == set(ARMS)
    count, of_lora = report["numbers"]
    assert abs(count - of_lora) < 0.1 * count
    assert report["rank"] in RANKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=1, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="few steps and examples: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    seeds, swept, tried, ranks, size = options.seeds, SWEPT, RATES, RANKS, (STEPS, 32)
    if options.fast:
        seeds, swept, ranks, size = seeds[:1], SWEPT[:1], RANKS[1:2], (EVERY, 4)
        tried = {arm: each[1:2] for arm, each in RATES.items()}
    done: dict[tuple, dict[str, Any]] = {}

    def run(jobs: Sequence[tuple]) -> None:
        jobs = [job for job in dict.fromkeys(jobs) if job not in done]
        done.update(zip(jobs, in_processes(learn, jobs, options.workers), strict=True))

    middle = tried[LIFT][len(tried[LIFT]) // 2]
    run([(LIFT, middle, rank, seed, *size) for rank in ranks for seed in swept])
    by_rank = {rank: float(np.mean([done[LIFT, middle, rank, seed, *size]["area"] for seed in swept]))
               for rank in ranks}  # fmt: skip
    rank = max(sorted(by_rank), key=lambda r: by_rank[r])
    run([(arm, rate, rank, seed, *size) for arm in ARMS for rate in tried[arm] for seed in swept])
    sweep = {arm: {rate: [done[arm, rate, rank, seed, *size] for seed in swept] for rate in tried[arm]} for arm in ARMS}
    rates = {arm: chosen(each) for arm, each in sweep.items()}
    run([(arm, rate, rank, seed, *size) for arm in ARMS for rate in rates[arm].values() for seed in seeds])
    runs = {arm: {pace: [done[arm, rate, rank, seed, *size] for seed in seeds] for pace, rate in rates[arm].items()}
            for arm in ARMS}  # fmt: skip
    slower = {arm: share * rates[arm]["gentle"] for arm, share in AFTERWARDS.items()}
    longer = {arm: [(arm, rate, rank, seed, 2 * size[0], size[1], True) for seed in seeds]
              for arm, rate in slower.items()}  # fmt: skip
    run([job for jobs in longer.values() for job in jobs])
    on = {arm: [done[job] for job in jobs] for arm, jobs in longer.items()}
    summary = summarised(runs, rates) | {"afterwards": continued(on, slower)}
    count, lora_rank = budget()
    report = {
        "steps": size[0], "n": size[1], "numbers": [count, lora_size(base()[0], lora_rank)], "rank": rank,
        "area by rank": {str(r): area for r, area in by_rank.items()}, "lora rank": lora_rank,
        "sweep": {arm: {f"{rate:g}": [{"area": r["area"], "at": r["at"], "there": r["there"]} for r in each]
                        for rate, each in by.items()} for arm, by in sweep.items()},
        "summary": summary, "runs": runs, "afterwards": on,
    }  # fmt: skip
    path = write(options.out, "lift_masks", report, picture(summary), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
