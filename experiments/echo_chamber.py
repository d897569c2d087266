"""Does RL settle on one of the formats that pretraining mixed, with pass@1 up and pass@k not (arXiv:2504.07912)?

    python experiments/echo_chamber.py            # two pretraining mixtures, five GRPO runs each
    python experiments/echo_chamber.py --fast     # a few steps, a check that it runs

tiny-base goes on with pretraining on sums answered in three formats: at once (`#6`), by running totals (`8;6;#6`) or
worked out (`3+5=8;8-2=6;#6`). Two mixtures, in which totals or work is the more frequent. From each base GRPO runs with
several seeds on the exact answer alone; what every completion looks like is counted on the way (a reward of weight 0).

Held, of a mixture: (1) all seeds end in one and the same format, its share above 0.9 by the interval's lower end, and
no format began above 0.6; (2) pass@1 rises, the interval above 0; (3) pass@k at the largest k rises by no more than
0.02, the interval's upper end. Answers are digits: k guesses hit with 1 - 0.9^k.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from arena import in_processes, mean_interval, rounded, write
from matplotlib.figure import Figure

from analysis.evaluate import evaluate
from analysis.passk import pass_at_k
from surgery import zoo
from surgery.tasks import make_task
from surgery.training import train
from surgery.training.run import open_model

FORMATS = {"direct": r"#\d", "totals": r"(\d;)+#\d", "worked": r"(\d[+-]\d=\d;)+#\d"}
MIXTURES = {
    "more totals": {"direct": 0.25, "totals": 0.5, "worked": 0.25},
    "more work": {"direct": 0.25, "totals": 0.25, "worked": 0.5},
}
TERMS = [4, 6]
PRETRAIN = {"steps": 150, "rows": 64, "lr": 5e-4}
GRPO = {"steps": 40, "prompts": 16, "group": 8, "lr": 1e-4}
TEST = {"prompts": 48, "samples": 64}
KS: tuple[int, ...] = (1, 4, 16, 64)
BETAS = (0.9, 0.98)


def form(completion: str) -> str:
    """Which of the formats a completion has, or "other"."""
    return next((name for name, pattern in FORMATS.items() if re.fullmatch(pattern, completion)), "other")


def written_as(name: str) -> Callable[..., list[float]]:
    """1 where a completion has the format: as a reward of weight 0 it counts."""
    return lambda completions, **_: [float(form(text) == name) for text in completions]


class Pretraining:
    """Sums without end, each answered in a format drawn by its share; row i is a function of (seed, i)."""

    size = float("inf")
    columns = {"prompt", "completion", "answer", "task"}

    def __init__(self, shares: Mapping[str, float], seed: int) -> None:
        self.shares, self.seed, self.task = dict(shares), seed, make_task("chain", terms=TERMS)

    def row(self, index: int) -> dict[str, Any]:
        """One sum, its worked-out answer cut down to the format."""
        rng = Random(f"{self.seed}/format/{index}")
        (name,) = rng.choices(list(self.shares), list(self.shares.values()))
        row = self.task.row(self.seed, index)
        if name == "direct":
            row["completion"] = "#" + row["answer"]
        elif name == "totals":
            row["completion"] = re.sub(r"\d[+-]\d=", "", row["completion"])
        return row


def pretrained(folder: Path, name: str, settings: Mapping[str, Any]) -> Path:
    """tiny-base after more pretraining on a mixture."""
    model, tokenizer = open_model(zoo.get("tiny-base"))
    train(model, tokenizer, objective="sft", data=Pretraining(MIXTURES[name], 7), steps=settings["steps"],
          batch={"rows": settings["rows"]},
          optimizer={"lr": settings["lr"], "betas": BETAS, "warmup": 0.05, "final": 0.1})  # fmt: skip
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


def measured(model: Any, tokenizer: Any, size: Mapping[str, int], ks: Sequence[int]) -> dict[str, Any]:
    """pass@k, share and accuracy of every format, over samples at temperature 1 of the same held-out prompts."""
    rows = [e.row("chain") for e in make_task("chain", terms=TERMS).examples(size["prompts"], 12345)]
    found = evaluate(model, rows, tokenizer=tokenizer, samples=size["samples"], max_new_tokens=40, batch_size=512)
    forms = np.array([[form(text) for text in texts] for texts in found.columns["completion"]])
    shares = {name: float((forms == name).mean()) for name in FORMATS}
    right = {name: float(found.values[forms == name].mean()) for name in FORMATS if (forms == name).any()}
    passed = pass_at_k(found, list(ks)).values.mean(axis=0)
    return {"shares": shares, "accuracy": right, "pass": {str(k): float(p) for k, p in zip(ks, passed, strict=True)}}


def before(folder: Path, size: Mapping[str, int], ks: Sequence[int]) -> dict[str, Any]:
    """The base, measured."""
    return measured(*open_model(folder), size, ks)


def reinforced(
    folder: Path, seed: int, settings: Mapping[str, Any], size: Mapping[str, int], ks: Sequence[int]
) -> dict[str, Any]:
    """One GRPO run: shares and accuracy of its samples step by step, and the measures of its end."""
    model, tokenizer = open_model(folder)
    counted = {name: (written_as(name), 0.0) for name in FORMATS}
    run = train(
        model, tokenizer, objective="grpo", data={"task": "chain", "terms": TERMS}, seed=seed, steps=settings["steps"],
        reward={"accuracy": 1.0, **counted},
        rollouts={"prompts": settings["prompts"], "group": settings["group"], "max_new_tokens": 40},
        optimizer={"lr": settings["lr"], "betas": BETAS, "warmup": 0.05, "shape": "constant"},
    )  # fmt: skip
    curves = {name: [round(m[f"reward/{name}"], 3) for m in run.metrics] for name in ("accuracy", *FORMATS)}
    return {"seed": seed, "curves": curves, **measured(model, tokenizer, size, ks)}


def summarised(base: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Before, after with intervals over seeds, and the verdict of the docstring in its three parts."""
    last = list(base["pass"])[-1]
    winners = [max(run["shares"], key=run["shares"].get) for run in runs]
    winner = max(set(winners), key=winners.count)
    after = {name: mean_interval([run["shares"][name] for run in runs]) for name in FORMATS}
    gain = {k: mean_interval([run["pass"][k] - base["pass"][k] for run in runs]) for k in base["pass"]}
    low, high = after[winner]["low"], gain[last]["high"]
    return {
        "before": base,
        "shares": after,
        "pass": {k: mean_interval([run["pass"][k] for run in runs]) for k in base["pass"]},
        "gain": gain,
        "winner": winner,
        "one format": bool(
            len(set(winners)) == 1 and low is not None and low > 0.9 and max(base["shares"].values()) <= 0.6
        ),
        "pass@1 up": bool(gain["1"]["low"] is not None and gain["1"]["low"] > 0),
        "pass@k not up": bool(high is not None and high <= 0.02),
    }


def interval(found: Mapping[str, Any], digits: int = 2) -> str:
    """Mean and interval; the mean alone for one run."""
    ends = [found["mean"]] if found["low"] is None else [found["mean"], found["low"], found["high"]]
    mean, *rest = [f"{round(end, digits) + 0.0:.{digits}f}" for end in ends]
    return mean + (f" [{', '.join(rest)}]" if rest else "")


def markdown(summary: Mapping[str, Any]) -> str:
    """A line a mixture before and after: shares of formats, their accuracy before, pass@k."""
    ks = list(next(iter(summary.values()))["before"]["pass"])
    heads = ["mixture", "", *FORMATS, *(f"pass@{k}" for k in ks), "one format", "pass@1 up", "pass@k not up"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, found in summary.items():
        base = found["before"]
        old = [f"{base['shares'][f]:.2f} (right: {base['accuracy'].get(f, 0):.2f})" for f in FORMATS]
        lines.append(
            "| " + " | ".join([name, "before", *old, *(f"{p:.2f}" for p in base["pass"].values())]) + " | | | |"
        )
        new = [interval(found["shares"][f]) for f in FORMATS] + [interval(p) for p in found["pass"].values()]
        verdict = ["yes" if found[part] else "no" for part in heads[-3:]]
        lines.append("| " + " | ".join([name, "after", *new, *verdict]) + " |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any], runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Shares of the formats in the samples, step by step, every run; and pass@k before and after."""
    figure = Figure(figsize=(4 * (len(summary) + 1), 3.6), layout="constrained")
    axes = figure.subplots(1, len(summary) + 1)
    styles = {"direct": ("0.6", "-"), "totals": ("black", "--"), "worked": ("black", "-")}
    for axis, (name, each) in zip(axes, runs.items(), strict=False):
        for form_, (colour, line) in styles.items():
            for i, run in enumerate(each):
                shares = run["curves"][form_]
                axis.plot(range(len(shares)), shares, line, color=colour, lw=0.9, label=None if i else form_)
        axis.set(title=f"base: {name}", xlabel="GRPO step", ylabel="share of the samples", ylim=(0, 1.02))
        axis.legend(frameon=False, loc="center right")
    marks = ["o", "s", "^", "v"]
    for mark, (name, found) in zip(marks, summary.items(), strict=False):
        ks = [int(k) for k in found["pass"]]
        axes[-1].plot(ks, list(found["before"]["pass"].values()), "--" + mark, color="0.5", mfc="white",
                      label=f"{name}, before")  # fmt: skip
        after = [p["mean"] for p in found["pass"].values()]
        axes[-1].plot(ks, after, "-" + mark, color="black", label=f"{name}, after")
    axes[-1].plot(ks, [1 - 0.9**k for k in ks], ":", color="0.5", label="guessing")
    axes[-1].set_xscale("log", base=2)
    axes[-1].set(xlabel="k", ylabel="pass@k", title="held-out sums", ylim=(0, 1.02))
    axes[-1].set_xticks(ks, [str(k) for k in ks])
    axes[-1].legend(frameon=False, fontsize="small", loc="lower right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: shares are shares, and pass@k does not fall with k."""
    for found in report["summary"].values():
        assert 0 < sum(found["before"]["shares"].values()) <= 1 + 1e-6
        values = list(found["before"]["pass"].values())
        assert values == sorted(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the GRPO runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="a few steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    first, settings, size, ks, mixtures, workers = PRETRAIN, GRPO, TEST, KS, list(MIXTURES), options.workers
    seeds = options.seeds
    if options.fast:
        first, settings = {**PRETRAIN, "steps": 2, "rows": 8}, {**GRPO, "steps": 2, "prompts": 2, "group": 4}
        size, ks, mixtures, seeds, workers = {"prompts": 8, "samples": 4}, (1, 4), mixtures[:1], [0], 1
    with tempfile.TemporaryDirectory() as temporary:
        folders = in_processes(pretrained, [(Path(temporary), name, first) for name in mixtures], workers)
        bases = in_processes(before, [(folder, size, ks) for folder in folders], workers)
        found = in_processes(reinforced, [(f, seed, settings, size, ks) for f in folders for seed in seeds], workers)
    runs = {name: found[i * len(seeds) : (i + 1) * len(seeds)] for i, name in enumerate(mixtures)}
    summary = {name: summarised(base, runs[name]) for name, base in zip(mixtures, bases, strict=True)}
    report = {
        "mixtures": MIXTURES,
        "pretraining": first,
        "grpo": settings,
        "test": size,
        "summary": summary,
        "runs": runs,
    }
    path = write(options.out, "echo_chamber", report, picture(summary, runs), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
