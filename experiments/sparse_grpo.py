"""Do a few per cent of the weights suffice for GRPO, which of them, and how sparse is GRPO's own update?

    python experiments/sparse_grpo.py            # a sweep on one seed, then five seeds
    python experiments/sparse_grpo.py --fast     # a few steps, a check that it runs

From tiny-sums-sft, which works out half of its sums, GRPO (arXiv:2402.03300) on sums of 3 or 4 digits, rewarded for the
exact answer. Arms on the same questions, at 1 % and 5 % of the projections' numbers: those that LIFT chooses
(arXiv:2506.00772), random ones, the largest, those that a sibling's GRPO moved most (tiny-sums-grpo: same task, longer
sums, other questions and seed), and a LoRA of equal size (5 %: rank 3; 1 %: rank 1 of attention and down); and
everything. Each arm's learning rate is the best of three by greedy accuracy on validation questions (of equals the
higher reward over the last quarter of the steps), on a seed that is not reported. In every sparse run every number
outside the mask is compared with the start, bit for bit, and in LoRA's all weights: a difference stops the run.

It is claimed of large models that RL by itself moves a small part of the weights, 5 to 30 % beyond what bfloat16 can
tell apart, and more sparsely than SFT (arXiv:2505.11711). Here of each full run: the share of numbers that differ after
both are rounded to bfloat16, and, which no learning rate decides, the share of the squared update that its largest 5 %
hold (of normally distributed changes 0.28), beside SFT on worked-out answers with the same rate, steps and rows.

Known beforehand, from one run on a seed that is not reported (sums of 3 to 5 digits, 64 answers a step): GRPO on
everything at 1e-4 learns the task in about 20 steps, and after 30 of them 90 % of its numbers differ in bfloat16.

Fixed before anything was scored; differences are paired over seeds and held-out sums, or over seeds:
* 5 % (1 %) suffices, of each way to choose: accuracy less that of everything has a lower end above -0.05.
* LIFT and the sibling's mask, over random, and LIFT over the largest and over LoRA: above 0 with the interval.
* LIFT keeps more of the base's other skills than everything: above 0 with the interval.
* GRPO's own update is sparse: the mean share that moves in bfloat16 is at most 0.3; and it is sparser than SFT's: GRPO
  - SFT of that share is below 0 with its interval, and of the squared update in the largest 5 % above 0. One alone of
  the latter two: in part.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena import SKILLS, in_processes, mean_interval, rounded, write
from long_sums import difference, told, verdict
from matplotlib.figure import Figure

from analysis.evaluate import evaluate, evaluate_tasks
from analysis.plots import DASHES, MARKERS
from analysis.results import Result
from surgery import zoo
from surgery.tasks import make_task
from surgery.training import train
from surgery.training.run import open_model
from surgery.tuning import Selection, select
from surgery.tuning.selection import targets

DENSITIES = (0.01, 0.05)
METHODS = ("LIFT", "random", "largest", "sibling", "LoRA")
ARMS = {"full": ("full", 1.0)} | {f"{m} {d:.0%}": (m, d) for d in DENSITIES for m in METHODS}
LORA: dict[float, dict[str, Any]] = {0.01: {"rank": 1, "modules": ("attention", "down")}, 0.05: {"rank": 3}}
TERMS = [3, 4]
SETTINGS: dict[str, Any] = {
    "steps": 16, "prompts": 8, "group": 6, "test": 200, "skills": 50, "validation": 100,
    "rates": {"full": (5e-5, 1e-4, 3e-4), "sparse": (1e-3, 3e-3, 1e-2)},
}  # fmt: skip
LONGEST, ALLOWED, SPARSE = 26, -0.05, 0.3


@cache
def start() -> tuple[Any, Any, int]:
    """tiny-sums-sft, its tokenizer, and how many numbers are in its projections."""
    model, tokenizer = open_model(zoo.get("tiny-sums-sft"))
    return model, tokenizer, sum(t.parameter.numel() for t in targets(model))


def tuning(arm: str, seed: int) -> Any:
    """What the arm trains: a selection, a LoRA in a recipe's words, or None for everything."""
    method, density = ARMS[arm]
    if method in ("full", "LoRA"):
        return None if method == "full" else {"lora": {**LORA[density], "seed": seed}}
    model, _, total = start()
    methods: dict[str, dict[str, Any]] = {
        "LIFT": {"method": "lift", "rank": 8}, "random": {"method": "random", "seed": seed},
        "largest": {"method": "magnitude"}, "sibling": {"method": "delta", "sibling": "tiny-sums-grpo"},
    }  # fmt: skip
    words = methods[method]
    return select(model, words.pop("method"), count=round(density * total), **words)


def trained(arm: str, seed: int, rate: float, settings: Mapping[str, Any], objective: str = "grpo") -> Any:
    """A run of an arm, after which nothing outside its mask has moved."""
    base, tokenizer, _ = start()
    chosen, rows = tuning(arm, seed), settings["prompts"] * settings["group"]
    words: dict[str, Any] = {"objective": "grpo", "reward": "accuracy"} if objective == "grpo" else {"objective": "sft"}
    run = train(
        copy.deepcopy(base), tokenizer, data={"task": "chain", "terms": TERMS}, seed=seed, steps=settings["steps"],
        tuning=chosen, batch={"rows": rows},
        rollouts={"prompts": settings["prompts"], "group": settings["group"], "max_new_tokens": LONGEST},
        optimizer={"lr": rate, "betas": (0.9, 0.98), "warmup": 0.1, "shape": "constant"}, **words,
    )  # fmt: skip
    if chosen is not None:
        assert moved_outside(run.model, chosen) == 0, f"{arm}: numbers outside the mask moved"
    return run


def moved_outside(model: Any, chosen: Selection | Mapping[str, Any]) -> int:
    """How many numbers that may not move did; of a model with a LoRA, any of its own."""
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): p for name, p in model.named_parameters()
    }
    masks = chosen.masks() if isinstance(chosen, Selection) else {}
    total = 0
    for name, before in start()[0].named_parameters():
        differs = after[name].detach().view(torch.int32) != before.detach().view(torch.int32)
        total += int((differs & ~masks[name] if name in masks else differs).sum())
    return total


def update(model: Any) -> dict[str, float]:
    """How sparse a full run's change is: share moved at all, in bfloat16, and what the largest 5 % hold."""
    pairs = [(p.detach(), before.detach()) for p, before in
             zip(model.parameters(), start()[0].parameters(), strict=True)]  # fmt: skip
    after, before = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    squares = (after - before).double().square().sort(descending=True).values
    return {
        "moved": float((after != before).float().mean()),
        "bfloat16": float((after.bfloat16() != before.bfloat16()).float().mean()),
        "largest 5%": float(squares[: round(0.05 * len(squares))].sum() / squares.sum()),
    }


def sums(model: Any, n: int, seed: int) -> Result:
    """Greedy answers to `n` held-out sums."""
    rows = [e.row("chain") for e in make_task("chain", terms=TERMS).examples(n, seed)]
    found = evaluate(model, rows, tokenizer=start()[1], max_new_tokens=LONGEST, batch_size=512)
    return Result.of(found.values, found.labels)


def skills(model: Any, n: int) -> float:
    """Mean accuracy on what the base can do besides."""
    found = evaluate_tasks(model, SKILLS, n, 991, tokenizer=start()[1], batch_size=1024)
    return float(np.mean([part.mean for part in found.by("task").values()]))


def sweep(arm: str, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arm at every rate: validation accuracy, last reward, and of the full run how sparse it is."""
    found = {}
    for rate in settings["rates"]["full" if arm == "full" else "sparse"]:
        run = trained(arm, seed, rate, settings)
        rewards = [m["reward"] for m in run.metrics]
        found[rate] = {"accuracy": float(sums(run.model, settings["validation"], 980).mean),
                       "reward": float(np.mean(rewards[-max(1, len(rewards) // 4) :]))}  # fmt: skip
        if arm == "full":
            found[rate] |= update(run.model)
    best = max(found, key=lambda rate: (found[rate]["accuracy"], found[rate]["reward"]))
    return {"rate": best, "found": found}


def measured(arm: str, seed: int, rate: float, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One run: rewards, held-out sums, skills; of the full one its update, and SFT's at the same rate."""
    run = trained(arm, seed, rate, settings)
    one: dict[str, Any] = {
        "reward": [round(m["reward"], 4) for m in run.metrics], "accuracy": sums(run.model, settings["test"], 990),
        "skills": skills(run.model, settings["skills"]),
        "trained": sum(p.numel() for n, p in run.model.named_parameters() if "lora_" in n)
        if ARMS[arm][0] == "LoRA" else round(ARMS[arm][1] * start()[2]),
    }  # fmt: skip
    if arm == "full":
        one["trained"] = sum(p.numel() for p in run.model.parameters())
        one["update"] = update(run.model)
        one["SFT"] = update(trained("full", seed, rate, settings, "sft").model)
    return one


def untuned(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The start."""
    return {"accuracy": float(sums(start()[0], settings["test"], 990).mean),
            "skills": skills(start()[0], settings["skills"])}  # fmt: skip


def summarised(runs: Mapping[int, Mapping[str, Any]], before: Mapping[str, Any], swept: Mapping[str, Any]) -> dict:
    """Arms, differences, the update, verdicts."""
    arms = {}
    for arm in ARMS:
        each = [run[arm] for run in runs.values()]
        quarter = max(1, len(each[0]["reward"]) // 4)
        arms[arm] = {
            "rate": swept[arm]["rate"], "trained": each[0]["trained"],
            "accuracy": mean_interval([float(one["accuracy"].mean) for one in each]),
            "reward": mean_interval([float(np.mean(one["reward"])) for one in each]),
            "last reward": mean_interval([float(np.mean(one["reward"][-quarter:])) for one in each]),
            "skills": mean_interval([one["skills"] for one in each]),
        }  # fmt: skip

    def less(ours: str, theirs: str) -> dict[str, Any]:
        accuracy = difference({s: r[ours]["accuracy"] for s, r in runs.items()},
                              {s: r[theirs]["accuracy"] for s, r in runs.items()})  # fmt: skip
        rest = {
            what: mean_interval([float(np.mean(r[ours][what]) - np.mean(r[theirs][what])) for r in runs.values()])
            for what in ("reward", "skills")
        }
        return {"accuracy": accuracy, **rest}

    pairs = {f"{arm} - full": less(arm, "full") for arm in ARMS if arm != "full"}
    for d in DENSITIES:
        for ours, theirs in (("LIFT", "random"), ("LIFT", "largest"), ("LIFT", "LoRA"), ("sibling", "random")):
            pairs[f"{ours} {d:.0%} - {theirs} {d:.0%}"] = less(f"{ours} {d:.0%}", f"{theirs} {d:.0%}")
    updates = {
        name: {what: mean_interval([run["full"][key][what] for run in runs.values()]) for what in each}
        for key, name in (("update", "GRPO"), ("SFT", "SFT"))
        for each in [next(iter(runs.values()))["full"][key]]
    }
    more = {what: mean_interval([run["full"]["update"][what] - run["full"]["SFT"][what] for run in runs.values()])
            for what in ("bfloat16", "largest 5%")}  # fmt: skip
    found = {"before": before, "arms": arms, "differences": pairs, "updates": {**updates, "GRPO - SFT": more}}
    return found | {"verdicts": verdicts(pairs, found["updates"])}


def verdicts(pairs: Mapping[str, Any], updates: Mapping[str, Any]) -> dict[str, str]:
    """As fixed above."""
    found = {}
    for name, pair in pairs.items():
        low = pair["accuracy"]["low"]
        if name.endswith("- full"):
            said = "not asked" if low is None else "held" if low > ALLOWED else "did not hold"
            found[f"{name.removesuffix(' - full')} suffices"] = said
        else:
            found[name.replace(" - ", " over ")] = verdict(pair["accuracy"])
    for d in DENSITIES:
        found[f"LIFT {d:.0%} keeps more skills than full"] = verdict(pairs[f"LIFT {d:.0%} - full"]["skills"])
    share, more = updates["GRPO"]["bfloat16"], updates["GRPO - SFT"]
    asked = share["low"] is not None
    found["GRPO's update is sparse"] = (
        "not asked" if not asked else "held" if share["mean"] <= SPARSE else "did not hold"
    )
    fewer = asked and more["bfloat16"]["high"] < 0
    held = asked and more["largest 5%"]["low"] > 0
    found["and sparser than SFT's"] = (
        "not asked" if not asked else ("did not hold", "in part", "held")[int(fewer) + int(held)]
    )
    return found


def markdown(summary: Mapping[str, Any]) -> str:
    """Arms; differences; updates; verdicts."""
    heads = ["arm", "numbers trained", "rate", "accuracy", "mean reward", "reward, last quarter", "skills"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    before = summary["before"]
    lines.append(f"| start |  |  | {before['accuracy']:.2f} |  |  | {before['skills']:.2f} |")
    for arm, one in summary["arms"].items():
        cells = [arm, f"{one['trained']:,}", f"{one['rate']:g}"]
        cells += [told(one[what]) for what in ("accuracy", "reward", "last reward", "skills")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| difference | accuracy | mean reward | skills |", "|---|---|---|---|"]
    for name, pair in summary["differences"].items():
        cells = [told(pair[what], sign="+") for what in ("accuracy", "reward", "skills")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| full update | numbers that differ in bfloat16 | of its square in the largest 5 % |",
        "|---|---|---|",
    ]
    for name, one in summary["updates"].items():
        sign = "+" if " - " in name else ""
        lines.append(f"| {name} | {told(one['bfloat16'], 3, sign)} | {told(one['largest 5%'], 3, sign)} |")
    lines += ["", "| claim | verdict |", "|---|---|", *(f"| {c} | {said} |" for c, said in summary["verdicts"].items())]
    return "\n".join(lines)


def picture(summary: Mapping[str, Any], runs: Mapping[int, Mapping[str, Any]]) -> Figure:
    """Rewards along the run at both densities; accuracy and skills at the end."""
    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1.25, 1.25, 1, 1])

    def curve(arm: str) -> np.ndarray:
        lines = np.array([run[arm]["reward"] for run in runs.values()]).mean(0)
        return np.convolve(np.pad(lines, 1, "edge"), np.ones(3) / 3, "valid")  # of three steps

    for axis, density in zip(axes, DENSITIES, strict=False):
        for i, arm in enumerate(["full", *(f"{m} {density:.0%}" for m in METHODS)]):
            line = curve(arm)
            style: dict[str, Any] = {"linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
            axis.plot(range(1, len(line) + 1), line, color="0.55" if arm == "full" else "black", markevery=(i, 6), ms=5,
                      lw=2.5 if arm == "full" else 1, mfc="white", label=arm.split()[0], **style)  # fmt: skip
        axis.set(title=f"reward, {density:.0%} of the numbers", xlabel="step")
    axes[1].sharey(axes[0])
    axes[0].set_ylabel("mean of three steps and the seeds")
    axes[1].legend(frameon=False, fontsize="small", loc="lower right")
    arms = list(summary["arms"])
    places = [i + 0.5 * (i > 0) + 0.5 * (i > len(METHODS)) for i in range(len(arms))]
    for axis, what, title in ((axes[2], "accuracy", "held-out sums"), (axes[3], "skills", "other skills")):
        for y, arm in zip(places, arms, strict=True):
            one = summary["arms"][arm][what]
            axis.barh(y, one["mean"], 0.75, color="0.6" if arm == "full" else "white", edgecolor="black")
            if one["low"] is not None:
                axis.hlines(y, *np.clip([one["low"], one["high"]], 0, 1), color="black", lw=1)
        axis.axvline(summary["before"][what], color="black", lw=1, ls=":")
        axis.set(title=title, xlabel="accuracy (dotted: start)", xlim=(0, 1.02))
        axis.set_yticks(places, arms if what == "accuracy" else [""] * len(arms))
        axis.invert_yaxis()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: every arm began from one start, and budgets are equal."""
    summary = report["summary"]
    assert set(summary["arms"]) == set(ARMS)
    for d in DENSITIES:
        sizes = [summary["arms"][f"{m} {d:.0%}"]["trained"] for m in METHODS]
        assert max(sizes) - min(sizes) < 0.02 * max(sizes), sizes
    for one in report["runs"].values():
        assert len({run["reward"][0] for run in one.values()}) == 1  # the first answers are drawn before any step
    assert 0 < summary["updates"]["GRPO"]["bfloat16"]["mean"] <= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15], help="of questions and samples")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=1, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="a few steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    settings, seeds, workers = SETTINGS, options.seeds, options.workers
    if options.fast:
        settings = {**SETTINGS, "steps": 2, "prompts": 2, "group": 2, "test": 8, "skills": 4, "validation": 4,
                    "rates": {"full": (1e-4,), "sparse": (1e-3,)}}  # fmt: skip
        seeds, workers = [0], 1
    swept = dict(zip(ARMS, in_processes(sweep, [(arm, 90, settings) for arm in ARMS], workers), strict=True))
    jobs: Sequence[tuple] = [(arm, seed, swept[arm]["rate"], settings) for seed in seeds for arm in ARMS]
    found = {job[:2]: one for job, one in zip(jobs, in_processes(measured, jobs, workers), strict=True)}
    runs = {seed: {arm: found[arm, seed] for arm in ARMS} for seed in seeds}
    summary = summarised(runs, untuned(settings), swept)
    each = {s: {arm: {**one, "accuracy": float(one["accuracy"].mean)} for arm, one in run.items()}
            for s, run in runs.items()}  # fmt: skip
    report = {"settings": settings, "seeds": seeds, "sweep": swept, "summary": summary, "runs": each}
    path = write(options.out, "sparse_grpo", report, picture(summary, runs), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
