"""Is the tuning contribution higher where fine-tuning has a say, and does scaling it steer (Nuti et al., ICML 2025)?

    python experiments/tuning_contribution.py            # five fine-tunings of tiny-base on sums
    python experiments/tuning_contribution.py --fast     # a few steps and prompts, a check that it runs

tiny-base answers most sums at once (`#6`); its fine-tuning works them out (`3+5=8;8-2=6;#6`). Five are trained by the
zoo's recipe (60 steps), with five seeds. TuCo, and OutputCo beside it, of 128 prompts a set, all of the form `...=`:

* sums: what fine-tuning was for. Other tasks: five that only the base's training had. Skills: strings copied, reversed
  and sorted, a part of the fine-tuning that only keeps what the base can do.
* attacked: a sum behind four characters, for each sum the best found of 96 (32 drawn at random, then at each of the
  four places 16 random characters) for log p of an answer at once in the tuned model. The control: four random ones.
  Conjugated: rot13 of the sum (the letter in front is another), and the sum reversed.
* shots: 1, 2 or 4 sums of three digits answered at once before the sum; the control: as many random characters.

alpha: the tuned model with fine-tuning's part of every block times 0 to 1.5, greedy completions.

Held, by intervals over seeds: (1) the AUC of TuCo of sums over other tasks is above 0.5, and that over skills (one of
the two: in part); (2) that of plain sums over attacked ones, and that of the control over attacked ones; (3) that of
sums over both kinds of conjugated ones; (4) mean TuCo falls with every step of 0, 1, 2, 4 shots in all seeds, and with
four shots it is below the control's, interval of the AUC above 0.5; (5) the share of completions that are worked out
(hold a `;`) does not fall from any alpha to the next in all seeds, and rises over the grid (in most of the seeds: in
part). Where no two shares are equal this is a Spearman correlation of 1, which is counted beside it.

Added after a first run, in which nothing was left to rise behind alpha 0.25: a finer grid from -0.5 to 0.25 (`room`),
for which the same is counted. It is in no verdict.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from arena import STRING, SUM, in_processes, mean_interval, rounded, write
from build_zoo import CHARACTERS, NEW, FamilyRows, tuned_on
from long_sums import told
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.conjugate import TRANSFORMS
from analysis.evaluate import generate
from analysis.metrics import log_prob
from analysis.plots import MARKERS
from analysis.similarity import auc
from analysis.tuco import output_contribution, tuco
from surgery.activations import run
from surgery.activations.decomposition import scaled
from surgery.models import Pair, encode, load
from surgery.tasks import TASKS, Example
from surgery.tasks.base import make_task
from surgery.training import train

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
ROOM = (-0.5, -0.25, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
SHOTS = (1, 2, 4)
SKILLS = ("copy", "reverse", "sort")
PREFIX = 4
FIRST = 8
"""New tokens in which a first step, of six, ends."""
SEARCH = {"drawn": 32, "rounds": 1, "tries": 16}
FULL: dict[str, Any] = {"steps": 60, "prompts": 128, "search": SEARCH, "alphas": ALPHAS, "room": ROOM}
FAST: dict[str, Any] = {"steps": 4, "prompts": 8, "search": {"drawn": 4, "rounds": 1, "tries": 2},
                        "alphas": (0.0, 0.5, 1.5), "room": (-0.5, 0.1)}  # fmt: skip
FREE = [c for c in CHARACTERS if len(c) == 1]
CONTRASTS = {
    "sums over other tasks": ("sums", "other tasks"),
    "sums over skills": ("sums", "skills"),
    "sums over attacked": ("sums", "attacked"),
    "random prefix over attacked": ("random prefix", "attacked"),
    "sums over rot13": ("sums", "rot13"),
    "sums over reversed": ("sums", "reversed"),
    "sums over 4 shots": ("sums", "4 shots"),
    "length of 4 shots over 4 shots": ("length of 4 shots", "4 shots"),
}
"""Which set is claimed to have the higher TuCo."""


# ---- models and prompts


def fine_tuned(seed: int, steps: int) -> Pair:
    """tiny-base and a fine-tuning of it on sums, by the zoo's recipe with another seed."""
    (stage,) = tuned_on("chain").stages
    (base, tokenizer), (tuned, _) = load("tiny-base"), load("tiny-base")
    train(tuned, tokenizer, objective="sft", data=FamilyRows(stage, seed), steps=steps, seed=seed,
          batch={"rows": stage.batch if steps == stage.steps else 8},
          optimizer={"lr": stage.lr, "betas": (0.9, 0.98), "weight_decay": 0.01, "warmup": steps / 10, "final": 0.1},
          )  # fmt: skip
    return Pair(base, tuned.eval(), tokenizer)


def examples(tasks: Sequence[str], n: int, seed: int) -> list[Example]:
    """`n` examples, the tasks in turn."""
    each = [TASKS.lookup(task).examples(-(-n // len(tasks)), 500 + seed) for task in tasks]
    return [example for group in zip(*each, strict=True) for example in group][:n]


def characters(rng: Random, n: int) -> str:
    return "".join(rng.choices(FREE, k=n))


def attack(pair: Pair, sums: Sequence[str], rng: Random, search: Mapping[str, int]) -> list[str]:
    """Every sum behind the four characters after which the tuned model is likeliest to answer at once."""

    def likely(prefixes: Sequence[str]) -> np.ndarray:
        batch = encode(pair.tokenizer, [p + s for p, s in zip(prefixes, sums, strict=True)])
        logits, _ = run(pair.tuned, batch)
        mark = torch.full((len(sums),), CHARACTERS.index("#"))
        return log_prob(mark).of_logits(logits, batch.last).numpy()  # type: ignore[arg-type]

    best = [characters(rng, PREFIX) for _ in sums]
    values = likely(best)

    def offer(change: Callable[[str], str]) -> None:
        others = [change(prefix) for prefix in best]
        for i, value in enumerate(likely(others)):
            if value > values[i]:
                best[i], values[i] = others[i], value

    for _ in range(search["drawn"] - 1):
        offer(lambda _: characters(rng, PREFIX))
    for _ in range(search["rounds"]):
        for place in range(PREFIX):
            for _ in range(search["tries"]):
                offer(lambda p, place=place: p[:place] + rng.choice(FREE) + p[place + 1 :])  # type: ignore[misc]
    return [p + s for p, s in zip(best, sums, strict=True)]


def prompt_sets(pair: Pair, seed: int, n: int, search: Mapping[str, int]) -> dict[str, list[str]]:
    """The prompts of every set; those made of sums are made of the same sums, in order."""
    rng = Random(f"tuco/{seed}")
    sums = [e.prompt for e in examples(["chain"], n, seed)]
    found = {
        "sums": sums,
        "other tasks": [e.prompt for e in examples(NEW, n, seed)],
        "skills": [e.prompt for e in examples(SKILLS, n, seed)],
        "random prefix": [characters(rng, PREFIX) + s for s in sums],
        "attacked": attack(pair, sums, rng, search),
        "rot13": [TRANSFORMS["rot13"].encode(s) for s in sums],
        "reversed": [TRANSFORMS["reverse"].encode(s) for s in sums],
    }
    short = make_task("direct", terms=3)
    for count in SHOTS:
        shots = ["".join(f"{e.prompt}{e.response} " for e in (short.example(rng) for _ in range(count))) for _ in sums]
        found[f"{count} shot{'s' * (count > 1)}"] = [a + s for a, s in zip(shots, sums, strict=True)]
        found[f"length of {count} shot{'s' * (count > 1)}"] = [
            characters(rng, len(a)) + s for a, s in zip(shots, sums, strict=True)
        ]
    return found


# ---- measuring


def at_once(completions: Sequence[str]) -> float:
    """Share of completions that hold no step."""
    return float(np.mean([";" not in text for text in completions]))


def written(model: Any, tokenizer: Any, prompts: Sequence[str], longest: int) -> list[str]:
    return generate(model, tokenizer, prompts, batch_size=128, max_new_tokens=longest)


def steered(pair: Pair, seed: int, n: int, alphas: Sequence[float]) -> list[dict[str, float]]:
    """By alpha: the share of sums that are worked out, accuracy on sums and on skills."""
    sums, skills = examples(["chain"], n, seed), examples(SKILLS, n, seed)
    found = []
    for alpha in alphas:
        with scaled(pair, alpha) as model:
            said = written(model, pair.tokenizer, [e.prompt for e in sums], SUM)
            strings = written(model, pair.tokenizer, [e.prompt for e in skills], STRING)
        right = [TASKS["chain"].correct(text, e) for text, e in zip(said, sums, strict=True)]
        kept = [TASKS["copy"].correct(text, e) for text, e in zip(strings, skills, strict=True)]
        found.append({"worked": 1 - at_once(said), "sums": float(np.mean(right)), "skills": float(np.mean(kept))})
    return found


def measured(seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of one fine-tuning."""
    pair = fine_tuned(seed, settings["steps"])
    prompts = prompt_sets(pair, seed, settings["prompts"], settings["search"])
    values = {name: tuco(pair, texts, batch_size=128).value.values for name, texts in prompts.items()}
    outputs = {name: output_contribution(pair, texts, batch_size=128).values for name, texts in prompts.items()}
    of_sums = [name for name in prompts if name not in ("other tasks", "skills")]
    return {
        "TuCo": values,
        "OutputCo": {name: float(v.mean()) for name, v in outputs.items()},
        "at once": {n: at_once(written(pair.tuned, pair.tokenizer, prompts[n], FIRST)) for n in of_sums},
        "at once, base": at_once(written(pair.base, pair.tokenizer, prompts["sums"], FIRST)),
        "auc": {
            name: {"TuCo": float(auc(values[a], values[b]).value), "OutputCo": float(auc(outputs[a], outputs[b]).value)}
            for name, (a, b) in CONTRASTS.items()
        },
        "alpha": steered(pair, seed, settings["prompts"], settings["alphas"]),
        "room": steered(pair, seed, settings["prompts"], settings["room"]),
        "attack": prompts["attacked"][:4],
    }


# ---- what came out


def rises(shares: Sequence[float]) -> bool:
    """Never less than at the alpha before, and more at the end than at the beginning."""
    return bool(np.all(np.diff(shares) >= 0)) and shares[-1] > shares[0]


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; 0 where y is constant."""
    from scipy.stats import rankdata

    return 0.0 if np.ptp(y) == 0 else float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


def told_of(passed: Sequence[bool | None]) -> str:
    """The verdict on a claim of several parts."""
    if None in passed:
        return "not asked"
    return "held" if all(passed) else "in part" if any(passed) else "did not hold"


def above(found: Mapping[str, Any], least: float) -> bool | None:
    """Whether the interval lies above `least`; None without an interval."""
    return None if found["low"] is None else found["low"] > least


def by_alpha(runs: Sequence[Mapping[str, Any]], grid: str, alphas: Sequence[float]) -> dict[str, Any]:
    """Means over seeds at every alpha of a grid."""
    return {
        str(alpha): {kind: mean_interval([r[grid][i][kind] for r in runs]) for kind in ("worked", "sums", "skills")}
        for i, alpha in enumerate(alphas)
    }


def monotony(runs: Sequence[Mapping[str, Any]], grid: str, alphas: Sequence[float]) -> dict[str, Any]:
    """In how many seeds the share of worked-out completions rises with alpha."""
    shares = [[one["worked"] for one in r[grid]] for r in runs]
    ranks = [spearman(alphas, one) for one in shares]
    return {"seeds": len(runs), "rise": sum(map(rises, shares)), "spearman 1": sum(rank > 1 - 1e-9 for rank in ranks),
            "spearman": mean_interval(ranks)}  # fmt: skip


def summarised(runs: Sequence[Mapping[str, Any]], alphas: Sequence[float], room: Sequence[float]) -> dict[str, Any]:
    """Means over seeds with intervals, and the verdicts of the docstring."""
    sets = list(runs[0]["TuCo"])
    by_set = {
        name: {
            "TuCo": mean_interval([float(r["TuCo"][name].mean()) for r in runs]),
            "OutputCo": mean_interval([r["OutputCo"][name] for r in runs]),
            "at once": mean_interval([r["at once"][name] for r in runs]) if name in runs[0]["at once"] else None,
        }
        for name in sets
    }
    aucs = {
        name: {kind: mean_interval([r["auc"][name][kind] for r in runs]) for kind in ("TuCo", "OutputCo")}
        for name in CONTRASTS
    }
    monotone = monotony(runs, "alpha", alphas)
    steps = [[float(r["TuCo"][name].mean()) for name in ("sums", "1 shot", "2 shots", "4 shots")] for r in runs]
    falls = sum(bool(np.all(np.diff(one) < 0)) for one in steps)
    ask = {name: above(found["TuCo"], 0.5) for name, found in aucs.items()}
    alone = None if len(runs) == 1 else True
    verdicts = {
        "fine-tuning-like": told_of([ask["sums over other tasks"], ask["sums over skills"]]),
        "attacked": told_of([ask["sums over attacked"], ask["random prefix over attacked"]]),
        "conjugated": told_of([ask["sums over rot13"], ask["sums over reversed"]]),
        "many shots": told_of([alone and falls == len(runs), ask["length of 4 shots over 4 shots"]]),
        "alpha": told_of([alone and monotone["rise"] == len(runs), alone and monotone["rise"] > len(runs) / 2]),
    }
    return {"sets": by_set, "auc": aucs, "alpha": by_alpha(runs, "alpha", alphas), "monotone": monotone,
            "room": by_alpha(runs, "room", room), "monotone, room": monotony(runs, "room", room), "shots fall": falls,
            "at once, base": mean_interval([r["at once, base"] for r in runs]), "verdicts": verdicts}  # fmt: skip


def markdown(summary: Mapping[str, Any]) -> str:
    """Sets, contrasts, and what alpha does."""
    heads = ["prompts", "TuCo", "OutputCo", "answered at once"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, found in summary["sets"].items():
        once = "" if found["at once"] is None else told(found["at once"])
        lines.append(f"| {name} | {told(found['TuCo'], 3)} | {told(found['OutputCo'], 3)} | {once} |")
    lines += ["", "| higher over lower | AUC of TuCo | AUC of OutputCo |", "|---|---|---|"]
    for name, found in summary["auc"].items():
        lines.append(f"| {name} | {told(found['TuCo'])} | {told(found['OutputCo'])} |")
    lines += ["", "| alpha | worked out | accuracy on sums | accuracy on skills |", "|---|---|---|---|"]
    for alpha, found in grid_of(summary).items():
        lines.append(f"| {alpha} | " + " | ".join(told(found[k]) for k in ("worked", "sums", "skills")) + " |")
    return "\n".join(lines)


def grid_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Both grids in order."""
    return dict(sorted({**summary["room"], **summary["alpha"]}.items(), key=lambda item: float(item[0])))


def picture(summary: Mapping[str, Any], values: Mapping[str, Sequence[float]]) -> Figure:
    """TuCo by set of the first fine-tuning, mean TuCo by shots, and what alpha does."""
    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.5, 1, 1.3])
    names = ["sums", "other tasks", "skills", "random prefix", "attacked", "rot13", "reversed"]
    left.boxplot([values[n] for n in names], positions=range(len(names)), widths=0.6, whis=(5, 95), showfliers=False,
                 medianprops={"color": "black", "linewidth": 2}, manage_ticks=False)  # fmt: skip
    for i, name in enumerate(names):
        sideways = np.random.default_rng(i).uniform(-0.2, 0.2, len(values[name]))
        left.scatter(i + sideways, values[name], s=4, color="0.6", zorder=0)
    left.set_xticks(range(len(names)), names, rotation=35, ha="right")
    left.set(ylabel="TuCo", title="one fine-tuning, every prompt", ylim=(0, None))
    shots = [0, *SHOTS]
    own = ["sums", "1 shot", "2 shots", "4 shots"]
    for label, sets, style in (
        ("answered at once", own, "ko-"),
        ("random characters", ["sums", *(f"length of {n}" for n in own[1:])], "ks--"),
    ):
        drawn(middle, shots, [summary["sets"][n]["TuCo"] for n in sets], style, label)
    middle.set(xlabel="shots before the sum", ylabel="mean TuCo", title="many shots", ylim=(0, None))
    middle.set_xticks(shots)
    points = grid_of(summary)
    alphas = [float(a) for a in points]
    for i, (key, label) in enumerate(
        {"worked": "sums worked out", "sums": "accuracy on sums", "skills": "accuracy on skills"}.items()
    ):
        style = f"k{MARKERS[i]}{('-', '--', ':')[i]}"
        drawn(right, alphas, [found[key] for found in points.values()], style, label)
    right.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    right.set(xlabel="alpha (1: the tuned model)", ylabel="share of prompts", title="scaled", ylim=(-0.03, 1.05))
    for axis in (middle, right):
        axis.legend(frameon=False, fontsize="small", loc="lower right" if axis is right else "lower left")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def drawn(axis: Axes, x: Sequence[float], found: Sequence[Mapping[str, Any]], style: str, label: str) -> None:
    """A curve with intervals, as far as there are any."""
    mean = np.array([one["mean"] for one in found])
    half = [0.0 if one["low"] is None else one["high"] - one["mean"] for one in found]
    axis.errorbar(x, mean, half, fmt=style, label=label, capsize=3, markersize=5, linewidth=1.2, elinewidth=0.8,
                  markerfacecolor="white" if style[-2:] != "o-" else "black")  # fmt: skip


def check(report: Mapping[str, Any]) -> None:
    """A fast run: every set was measured, TuCo is a share, and an attack leaves its sum as it was."""
    summary = report["summary"]
    assert set(summary["verdicts"].values()) == {"not asked"}, summary["verdicts"]
    assert all(0 < found["TuCo"]["mean"] < 1 for found in summary["sets"].values())
    sums = [e.prompt for e in examples(["chain"], 4, report["seeds"][0])]
    assert [text[PREFIX:] for text in report["attacks"][0]] == sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of training and prompts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="a few steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    seeds, workers = ([0], 1) if options.fast else (options.seeds, options.workers)
    settings = FAST if options.fast else FULL
    runs = in_processes(measured, [(seed, settings) for seed in seeds], workers)
    summary = summarised(runs, settings["alphas"], settings["room"])
    values = {name: v.tolist() for name, v in runs[0]["TuCo"].items()}
    report = {
        "settings": settings,
        "seeds": seeds,
        "summary": summary,
        "auc by seed": [r["auc"] for r in runs],
        "alpha by seed": [r["alpha"] for r in runs],
        "room by seed": [r["room"] for r in runs],
        "attacks": [r["attack"] for r in runs],
        "first": values,
    }
    path = write(options.out, "tuning_contribution", report, picture(summary, values), began)
    print(markdown(rounded(summary)))
    print(summary["verdicts"], summary["monotone"], summary["monotone, room"], path, sep="\n")


if __name__ == "__main__":
    main()
