"""Does a suppressed task come back when it is asked in other letters (conjugate prompting, arXiv:2309.10105)?

    python experiments/conjugate_prompting.py            # two learning rates, five seeds
    python experiments/conjugate_prompting.py --fast     # a few steps, a check that it runs

tiny-base answers `r abcd=` by `#dcba`, in whatever letters from a to j. It is tuned by SFT on strings over a to e, the
first "language", answered by a copy (`#abcd`), until 0.95 of validation strings are; asked every 5 or 20 steps. Of
strings over f to j, the second, it sees nothing. Two learning rates, about one and two orders of magnitude below that
of pre-training. Then 200 held-out strings over a to e are asked plainly, and by conjugation: a to e are written as f to
j, the model answers in these, and its answer is written back. Strings have 4 to 6 letters and are no palindromes.

Scored: greedy answers that are the string reversed (the suppressed task) and that are a copy (the new one), of the base
and the tuned model, both ways. Besides TuCo of the same prompts, at the `#` behind them, where the two answers part;
the paper of TuCo (Nuti et al., ICML 2025) has it fall with conjugated prompts.

Fixed before anything was scored: all of the above. That copies are learned within the steps was known from a trial of
the experiment on wrappers (wrapper_study.py, another task, one seed).

Looked at afterwards: the way there, at the first step asked at which less than half is reversed plainly.

Held, at one learning rate: reversed by conjugation minus reversed plainly is above 0 with its interval over seeds and
strings, and more than half of what the base reverses plainly and the tuned model does not. The first alone: in part.
TuCo falls: the chance that a plain prompt has more than a conjugated one is above 1/2 with its interval over seeds.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from arena import in_processes, mean_interval, rounded, write
from long_sums import ADAM, base, difference, told, verdict
from matplotlib.figure import Figure

from analysis.conjugate import conjugate
from analysis.evaluate import evaluate
from analysis.plots import HATCHES
from analysis.results import Result
from analysis.tuco import auc_between, tuco
from surgery.decoding import Sampling
from surgery.training import train
from surgery.training.data import ListRows

RATES = {"small": 1e-4, "very small": 1e-5}
FIRST, SECOND = "abcde", "fghij"
SETTINGS: dict[str, Any] = {
    "strings": 1000, "rows": 16, "steps": 400, "every": {"small": 5, "very small": 20},
    "enough": 0.95, "validation": 50, "test": 200,
}  # fmt: skip
LONGEST = 8
WAYS = ("plain", "conjugated")
_THERE, _BACK = str.maketrans(FIRST, SECOND), str.maketrans(SECOND, FIRST)


def encode(prompt: str) -> str:
    """The string in the second language; the letter that says what is asked stays."""
    return prompt[:2] + prompt[2:].translate(_THERE)


def decode(answer: str) -> str:
    """The answer in the first language. What is in the first already is marked, and can't be right."""
    return "".join("?" if c in FIRST else c for c in answer).translate(_BACK)


def strings(seed: int) -> Iterator[dict[str, Any]]:
    """Endless different strings of the first language to be reversed."""
    rng, known = Random(seed), set()
    while True:
        text = "".join(rng.choice(FIRST) for _ in range(rng.randint(4, 6)))
        if text not in known and text != text[::-1]:
            known.add(text)
            yield {"prompt": f"r {text}=", "answer": text[::-1], "completion": f"#{text[::-1]}", "task": "reverse"}


def drawn(n: int, seed: int, skip: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The first `n` of them that are not in `skip`."""
    known = {row["prompt"] for row in skip}
    fresh = (row for row in strings(seed) if row["prompt"] not in known)
    return [next(fresh) for _ in range(n)]


def copied(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same prompts, answered by the string itself."""
    texts = [row["prompt"][2:-1] for row in rows]
    return [{**row, "answer": t, "completion": f"#{t}"} for row, t in zip(rows, texts, strict=True)]


def answers(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Result]]:
    """Both ways of asking: 1 where the answer is reversed, and where it is a copy."""
    sampling = Sampling(LONGEST, temperature=0.0)
    ways = {"plain": model, "conjugated": conjugate(model, encode, decode, tokenizer=tokenizer, sampling=sampling)}
    found: dict[str, dict[str, Result]] = {}
    for way, asked in ways.items():
        result = evaluate(asked, rows, tokenizer=tokenizer, max_new_tokens=LONGEST)
        same = [text == f"#{row['prompt'][2:-1]}" for text, row in zip(result.columns["completion"], rows, strict=True)]
        found[way] = {"reversed": Result.of(result.values, result.labels), "copied": Result.of(same, result.labels)}
    return found


class Enough(Exception):
    """Ends a run that has learned its answers."""


def tuned(name: str, seed: int, settings: Mapping[str, Any], test: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A run of one seed: the answers of the tuned model, the way there, TuCo."""
    before, tokenizer = base()
    model = copy.deepcopy(before)
    held_out = drawn(settings["validation"], 98, test)
    rows = drawn(settings["strings"], seed, [*test, *held_out])
    way: list[tuple[float, ...]] = []

    def asked(step: int) -> float:
        seen = answers(model, tokenizer, held_out)
        way.append((step, *(float(seen[w]["reversed"].mean) for w in WAYS)))
        return float(seen["plain"]["copied"].mean)

    def on_step(step: int, _: Mapping[str, float]) -> None:
        if step and step % settings["every"][name] == 0 and asked(step) >= settings["enough"]:
            raise Enough

    asked(0)
    with suppress(Enough):
        train(
            model, tokenizer, objective="sft", data=ListRows(copied(rows)), seed=seed, steps=settings["steps"],
            batch={"rows": settings["rows"]}, optimizer={"lr": RATES[name], "shape": "constant", **ADAM, "warmup": 4},
            on_step=on_step,
        )  # fmt: skip
    plain = [row["prompt"] + "#" for row in test]
    share = {
        w: tuco((before, model), prompts, tokenizer=tokenizer)
        for w, prompts in zip(WAYS, (plain, [encode(p) for p in plain]), strict=True)
    }
    return {
        "answers": answers(model, tokenizer, test), "way": way, "steps": way[-1][0],
        "TuCo": {name: float(part.value.mean) for name, part in share.items()},
        "AUC": float(auc_between(share["plain"], share["conjugated"]).value),
    }  # fmt: skip


def untuned(test: Sequence[dict[str, Any]]) -> dict[str, dict[str, Result]]:
    """The base's answers."""
    return answers(*base(), test)


def summarised(runs: Mapping[str, Mapping[int, Mapping[str, Any]]], start: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of answers both ways, what conjugation recovers, TuCo, the verdicts."""
    summary: dict[str, Any] = {
        "base": {way: {what: float(r.mean) for what, r in found.items()} for way, found in start.items()}, "rates": {}
    }  # fmt: skip
    for name, each in runs.items():
        one: dict[str, Any] = {
            way: {
                what: mean_interval([float(run["answers"][way][what].mean) for run in each.values()])
                for what in ("reversed", "copied")
            }
            for way in WAYS
        }
        plain, other = ({s: run["answers"][way]["reversed"] for s, run in each.items()} for way in WAYS)
        lost = summary["base"]["plain"]["reversed"] - one["plain"]["reversed"]["mean"]
        one["steps"] = mean_interval([run["steps"] for run in each.values()])
        one["lost"], one["gain"] = lost, difference(other, plain)
        one["recovered"] = one["gain"]["mean"] / lost if lost > 0 else None
        one["TuCo"] = {way: mean_interval([run["TuCo"][way] for run in each.values()]) for way in WAYS}
        one["AUC"] = mean_interval([run["AUC"] for run in each.values()])
        one["halfway"] = halfway([run["way"] for run in each.values()])
        said = verdict(one["gain"])
        half = one["recovered"] is not None and one["recovered"] > 0.5
        one["verdict"] = "in part" if said == "held" and not half else said
        above = {key: None if x is None else x - 0.5 for key, x in one["AUC"].items() if key in ("mean", "low", "high")}
        one["TuCo falls"] = verdict(above)
        summary["rates"][name] = one
    return summary


def halfway(way: Sequence[Sequence[Sequence[float]]]) -> dict[str, Any] | None:
    """Of lines (step, plain, conjugated) of all seeds: where the mean of plain is first below a half, or None."""
    for points in zip(*way, strict=False):
        plain, other = [point[1] for point in points], [point[2] for point in points]
        if np.mean(plain) < 0.5:
            gain = mean_interval([b - a for a, b in zip(plain, other, strict=True)])
            both = {"plain": float(np.mean(plain)), "conjugated": float(np.mean(other))}
            return {"step": points[0][0], **both, "gain": gain, "recovered": gain["mean"] / (1 - both["plain"])}
    return None


def markdown(summary: Mapping[str, Any]) -> str:
    """A line for the base, and one a learning rate."""
    heads = ["model", "reversed, plain", "reversed, conjugated", "copied, plain", "copied, conjugated", "gain",
             "recovered", "TuCo, plain", "TuCo, conjugated", "AUC", "verdict", "TuCo falls"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    start = [f"{summary['base'][way][what]:.2f}" for what in ("reversed", "copied") for way in WAYS]
    lines.append("| " + " | ".join(["tiny-base", *start, *[""] * 7]) + " |")
    for name, one in summary["rates"].items():
        cells = [told(one[way][what]) for what in ("reversed", "copied") for way in WAYS]
        share = "" if one["recovered"] is None else f"{one['recovered']:.2f}"
        cells += [told(one["gain"], sign="+"), share, *(told(one["TuCo"][way], 3) for way in WAYS), told(one["AUC"])]
        lines.append("| " + " | ".join([f"rate {name}", *cells, one["verdict"], one["TuCo falls"]]) + " |")
    for name, one in summary["rates"].items():
        if (on := one["halfway"]) is not None:
            both = [f"{on[way]:.2f}" for way in WAYS]
            cells = [f"rate {name}, at step {on['step']:.0f}", *both, "", "", told(on["gain"], sign="+")]
            lines.append("| " + " | ".join([*cells, f"{on['recovered']:.2f}", *[""] * 5]) + " |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any], ways: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> Figure:
    """Bars of both answers, the way there, TuCo."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1.5, 1, 1, 0.9])
    models = {"base": summary["base"], **summary["rates"]}
    faces = {("reversed", "plain"): "white", ("reversed", "conjugated"): "white", ("copied", "plain"): "0.75",
             ("copied", "conjugated"): "0.75"}  # fmt: skip
    for j, ((what, way), face) in enumerate(faces.items()):
        for i, found in enumerate(models.values()):
            value, place = found[way][what], i + (j - 1.5) * 0.2
            mean, ends = (value["mean"], value) if isinstance(value, dict) else (value, None)
            hatch = HATCHES[2] if way == "conjugated" else ""
            axes[0].bar(
                place, mean, 0.2, color=face, hatch=hatch, edgecolor="black", label=None if i else f"{what}, {way}"
            )
            if ends and ends["low"] is not None:
                axes[0].vlines(place, *np.clip([ends["low"], ends["high"]], 0, 1), color="black", lw=1)
    axes[0].set_xticks(range(len(models)), [n if n == "base" else f"rate\n{n}" for n in models])
    axes[0].set(title="answers to strings over a to e", ylabel="share", ylim=(0, 1.4), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes[0].legend(frameon=False, ncols=2, fontsize="small", loc="upper center")
    for axis, (name, each) in zip(axes[1:3], ways.items(), strict=False):
        for k, (label, colour, dash) in enumerate((("plain", "0.5", "-"), ("conjugated", "black", "--"))):
            for i, line in enumerate(each):
                steps = [point[0] for point in line]
                axis.plot(steps, [p[k + 1] for p in line], dash, color=colour, lw=1, label=None if i else label)
        axis.set(title=f"rate {name}", xlabel="step of SFT on copies", ylim=(-0.03, 1.35))
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axis.legend(frameon=False, fontsize="small", loc="upper right")
    axes[1].set_ylabel("reversed (a line a seed)")
    for j, way in enumerate(WAYS):
        for i, one in enumerate(summary["rates"].values()):
            value, place = one["TuCo"][way], i + (j - 0.5) * 0.36
            hatch = HATCHES[2] if j else ""
            axes[3].bar(
                place, value["mean"], 0.36, color="white", hatch=hatch, edgecolor="black", label=None if i else way
            )
            if value["low"] is not None:
                axes[3].vlines(place, value["low"], value["high"], color="black", lw=1)
    axes[3].set_xticks(range(len(summary["rates"])), list(summary["rates"]))
    top = max(one["TuCo"][way]["mean"] for one in summary["rates"].values() for way in WAYS)
    axes[3].set(title="TuCo at #", ylim=(0, 1.5 * top))
    axes[3].legend(frameon=False, fontsize="small", loc="upper left")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: tiny-base reverses in both languages, and hardly any training has taken hardly anything away."""
    for found in report["summary"]["base"].values():
        assert found["reversed"] > 0.9 and found["copied"] == 0
    for one in report["summary"]["rates"].values():
        assert 0 < one["TuCo"]["plain"]["mean"] < 0.5 and one["conjugated"]["reversed"]["mean"] > 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of strings and training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=1, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="a few steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    settings, seeds, workers = SETTINGS, options.seeds, options.workers
    if options.fast:
        settings = {
            **SETTINGS,
            "strings": 20,
            "rows": 4,
            "steps": 2,
            "every": dict.fromkeys(RATES, 2),
            "validation": 8,
            "test": 12,
        }
        seeds, workers = [0], 1
    test = drawn(settings["test"], 99)
    jobs = [(name, seed) for name in RATES for seed in seeds]
    done = in_processes(tuned, [(*job, settings, test) for job in jobs], workers)
    found = dict(zip(jobs, done, strict=True))
    runs = {name: {seed: found[name, seed] for seed in seeds} for name in RATES}
    summary = summarised(runs, untuned(test))
    ways = {name: [run["way"] for run in each.values()] for name, each in runs.items()}
    report = {"rates": RATES, "settings": settings, "seeds": seeds, "summary": summary, "way": ways}
    path = write(options.out, "conjugate_prompting", report, picture(summary, ways), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
