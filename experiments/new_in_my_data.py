"""Does contrastive generation show what is new in a fine-tuning's data (CGE, arXiv:2410.14765)?

    python experiments/new_in_my_data.py            # five seeds
    python experiments/new_in_my_data.py --fast     # a few steps, a check that it runs

A page is 48 characters of examples of one task, prompts and answers, one behind the other. Old pages are tiny-base's
own mix of tasks, answered as it learned them. The base never saw a page as a whole (its loss was that of answers, so
that it can't begin a text): first of all it is trained on whole pages of its own mix, 200 steps, once for all seeds.
Then it is fine-tuned by the same loss, 400 steps of 32 pages, of which 5 % are new: one percent each of five tasks that
it never saw (addition, countdown, a table of facts, letters doubled, the last letter repeated).

From BOS alone 50 texts of 48 tokens are drawn of each arm: the tuned model by plain sampling; the same by beams; CGE
(gamma 1, four beams), static and iterative. alpha is the paper's 0.1, and 0.01: each new page begins with a letter of
its own, which the tuned model should give some 0.01, and the likeliest letter begins 0.45 of all pages, so that at 0.1
no new letter can be plausible. Iterative runs have AdamW at 1e-3 and, with alpha 0.01, at 3e-4.

A text is in a novel domain when it holds a whole example of that task's form (an exact pattern; that of which there are
most). Detection rate: the share of such texts. Coverage: the share of the five domains hit at least once.

Fixed before anything was scored: all of the above. Number of steps and rate of the fine-tuning, and the choice of the
domains, come from a trial with another seed, at which only this was looked at: the probability of the first letters,
and how often a text that the tuned model continues from a domain's letter is of its form. Some forms that took longer
(latin squares, paths, sentences) were left out for that reason.

Held, finding: detection of CGE minus plain is above 0 with its interval over seeds, and five times plain's or more; the
first alone: in part. Held, covering: coverage of the iterative arm minus the static one's with the same alpha is above
0 with its interval over seeds.

Asked afterwards, for alpha 0.1 had found nothing and static texts at 0.01 were no examples of anything: CGE at 0.01 by
one beam; and a second setting in which the paper's alpha can let a new page begin. There, old pages begin with each of
their nine letters equally often (for the base as well), and one of the five tasks makes all of the 5 %, another one for
each seed. Its arms and the rule on finding were fixed before it was scored, and it had no trial.
"""

from __future__ import annotations

import argparse
import copy
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from arena import in_processes, mean_interval, rounded, write
from build_zoo import _BASE, FamilyRows, Stage
from long_sums import base, told, verdict
from matplotlib.figure import Figure

from analysis.novelty import coverage, detection, distinct, novelty, similarity
from analysis.plots import COLOURS, DASHES, HATCHES, MARKERS
from surgery.logits.explore import Exploration, explore
from surgery.tasks import make_task
from surgery.training import train

FORMS = {
    "addition": r"a \d{2,4}\+\d{2,4}=(?:\d(?:\+\d){1,2}=\d{1,2};)+#\d{2,5}",
    "countdown": r"k(?: \d){3,4};\d+=#\d(?:[+-]\d){2,3}",
    "kv": r"q [a-z]{4}=#[a-z]{2}",
    "double": r"w [a-j]{3,8}=#(?:([a-j])\1){3,8}",
    "last": r"l [a-j]{3,8}=#([a-j])\1{2,7}",
}
"""The new tasks and how their examples look; each begins with a letter that no old one begins with."""
OLD = _BASE[-1]
"""tiny-base's mix."""
EVEN = {task: 1 / 27 if task in ("facts", "direct", "chain") else 1 / 9 for task in OLD.mix}
"""The same tasks, each of their nine letters equally often."""
PAPER, LOW = 0.1, 0.01
PLAIN: dict[str, Any] = {"gamma": 0.0, "alpha": 0.0, "allow_unconstrained": True}
ARMS: dict[str, dict[str, Any]] = {
    "plain sampling": {**PLAIN, "beams": 1},
    "tuned model, beams": {**PLAIN, "beams": 4},
    "static, alpha 0.1": {"alpha": PAPER},
    "iterative, alpha 0.1, rate 1e-3": {"alpha": PAPER, "iterative": True, "lr": 1e-3},
    "static, alpha 0.01": {"alpha": LOW},
    "static, alpha 0.01, one beam": {"alpha": LOW, "beams": 1},
    "iterative, alpha 0.01, rate 1e-3": {"alpha": LOW, "iterative": True, "lr": 1e-3},
    "iterative, alpha 0.01, rate 3e-4": {"alpha": LOW, "iterative": True, "lr": 3e-4},
}
ARMS_OF_ONE = {name: ARMS[name] for name in ("plain sampling", "tuned model, beams", "static, alpha 0.1")}
ARMS_OF_ONE["static, alpha 0.1, one beam"] = {"alpha": PAPER, "beams": 1}
"""Of the second setting."""
SETTINGS: dict[str, Any] = {
    "page": 48, "novel": 0.05, "rows": 32, "base steps": 200, "base lr": 1e-3, "steps": 400, "lr": 1.5e-3,
    "texts": 50, "begun": 20,
}  # fmt: skip
TIMES = 5
"""How many times plain sampling's detection rate is enough."""


def domain(text: str) -> str | None:
    """The task of which the text holds most whole examples; None: it holds none that is new."""
    counts = {name: sum(1 for _ in re.finditer(form, text)) for name, form in FORMS.items()}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else None


class Pages:
    """Endless pages, each a pure function of (seed, index): a share `novel` of `new` tasks, the others of the old."""

    size = float("inf")
    columns = {"prompt", "completion", "task"}

    def __init__(
        self,
        seed: int,
        novel: float,
        length: int,
        mix: Mapping[str, float] = OLD.mix,
        new: Sequence[str] = tuple(FORMS),
    ) -> None:
        self.seed, self.novel, self.length, self.mix = seed, novel, length, mix
        self.old = {task: FamilyRows(Stage({task: 1.0}, 0, 0, 0, truth=OLD.truth), seed) for task in mix}
        self.new = {task: make_task(task) for task in new}

    def row(self, index: int) -> dict[str, str]:
        """Page `index`. With an empty prompt, its loss is that of a whole text behind BOS."""
        rng, page = Random(f"{self.seed}/{index}"), ""
        if rng.random() < self.novel:
            task = rng.choice(list(self.new))
        else:
            task = rng.choices(list(self.mix), list(self.mix.values()))[0]
        while len(page) <= self.length:
            if task in self.new:
                row = self.new[task].example(rng).row(task)
            else:
                row = self.old[task].row(rng.randrange(10**9))
            page += f"{row['prompt']}{row['completion']} "
        return {"prompt": "", "completion": page[: self.length], "task": task}


def taught(model: Any, tokenizer: Any, pages: Pages, steps: int, lr: float, rows: int, seed: int) -> None:
    """`steps` of `rows` whole pages, in place."""
    train(
        model, tokenizer, objective="sft", data=pages, seed=seed, steps=steps, batch={"rows": rows},
        optimizer={"lr": lr, "betas": (0.9, 0.98), "weight_decay": 0.01, "warmup": max(1, steps // 20), "final": 0.1},
    )  # fmt: skip


def setting(which: str, seed: int) -> tuple[Mapping[str, float], list[str], dict[str, dict[str, Any]]]:
    """Mix of the old tasks, new tasks and arms of "many" (the first) or "one" (the second)."""
    if which == "many":
        return OLD.mix, list(FORMS), ARMS
    return EVEN, [list(FORMS)[(seed - 1) % len(FORMS)]], ARMS_OF_ONE


def read_pages(which: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of tiny-base after whole pages of old tasks."""
    model, tokenizer = base()
    pages = Pages(0, 0.0, settings["page"], setting(which, 0)[0])
    taught(model, tokenizer, pages, settings["base steps"], settings["base lr"], settings["rows"], 0)
    return {name: value.clone() for name, value in model.state_dict().items()}


def explored(which: str, seed: int, weights: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """One fine-tuning and all arms of it: labels, contrasts, diversity."""
    mix, new, arms = setting(which, seed)
    before, tokenizer = base()
    before.load_state_dict(weights)
    tuned = copy.deepcopy(before)
    pages = Pages(seed, settings["novel"], settings["page"], mix, new)
    taught(tuned, tokenizer, pages, settings["steps"], settings["lr"], settings["rows"], seed)
    found: dict[str, Any] = {}
    for name, words in arms.items():
        drawn = explore(before, tuned, n=settings["texts"], length=settings["page"], seed=seed, tokenizer=tokenizer,
                        batch_size=128, **words)  # fmt: skip
        found[name] = measured(drawn, new)
    return {"arms": found, "begun": begun(before, tuned, tokenizer, new, seed, settings)}


def measured(drawn: Exploration, new: Sequence[str]) -> dict[str, Any]:
    """What is said of an arm: per text first, then over its texts."""
    found = detection(drawn, domain, new)
    return {
        "labels": found.columns["label"], "detection": float(found.mean),
        "coverage": coverage(drawn, domain, new).mean.tolist(), "contrast": novelty(drawn).values.tolist(),
        "distinct-2": float(distinct(drawn).mean), "similarity": float(similarity(drawn).mean),
        "texts": [one.text for one in drawn.texts[:3]],
    }  # fmt: skip


def begun(
    before: Any, tuned: Any, tokenizer: Any, new: Sequence[str], seed: int, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Of texts that are begun with a domain's letter, how many the tuned model goes on in its form."""
    found = {}
    for name in new:
        first = f"{FORMS[name][0]} "
        drawn = explore(before, tuned, n=settings["begun"], length=settings["page"] - 2, beams=1, seed=seed,
                        start=first, tokenizer=tokenizer, batch_size=128, **PLAIN)  # fmt: skip
        found[name] = float(np.mean([domain(first + one.text) == name for one in drawn.texts]))
    return found


def summarised(runs: Sequence[Mapping[str, Any]], arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of one setting: means over seeds with intervals, differences within seeds, verdicts."""

    def of(name: str, key: str) -> list[float]:
        values = [run["arms"][name][key] for run in runs]
        return [value[-1] if key == "coverage" else float(np.mean(value)) for value in values]

    def less(name: str, other: str, key: str) -> dict[str, Any]:
        return mean_interval([a - b for a, b in zip(of(name, key), of(other, key), strict=True)])

    plain, *others = arms
    summary: dict[str, Any] = {"arms": {}, "begun": {}}
    for name, words in arms.items():
        keys = ("detection", "coverage", "contrast", "distinct-2", "similarity")
        one: dict[str, Any] = {key: mean_interval(of(name, key)) for key in keys}
        if name in others:
            one["over plain"] = less(name, plain, "detection")
        if "gamma" not in words:
            said, rest = verdict(one["over plain"]), summary["arms"][plain]["detection"]["mean"]
            one["finding"] = "in part" if said == "held" and one["detection"]["mean"] < TIMES * rest else said
        if words.get("iterative"):
            one["over static"] = less(name, f"static, alpha {words['alpha']:g}", "coverage")
            one["covering"] = verdict(one["over static"])
        summary["arms"][name] = one
    for name in FORMS:
        if values := [run["begun"][name] for run in runs if name in run["begun"]]:
            summary["begun"][name] = mean_interval(values)
    return summary


SAID = {"many": "Five new tasks, 1 % each", "one": "One new task, 5 %, old pages even"}


def markdown(summary: Mapping[str, Any]) -> str:
    """A line a setting and arm, and lines on what was learned."""
    heads = ["texts", "detection rate", "coverage", "contrast", "distinct-2", "similarity", "detection - plain",
             "coverage - static", "finding", "covering"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for which, found in summary.items():
        lines.append(f"| **{SAID[which]}** |" + " |" * (len(heads) - 1))
        for name, one in found["arms"].items():
            cells = [told(one[key]) for key in ("detection", "coverage", "contrast", "distinct-2", "similarity")]
            cells += [told(one[key], sign="+") if key in one else "" for key in ("over plain", "over static")]
            lines.append("| " + " | ".join([name, *cells, one.get("finding", ""), one.get("covering", "")]) + " |")
    lines += ["", "| of its form, begun with its letter | " + " | ".join(FORMS) + " |"]
    lines.append("|---" * (len(FORMS) + 1) + "|")
    for which, found in summary.items():
        shares = [told(found["begun"][name]) if name in found["begun"] else "" for name in FORMS]
        lines.append("| " + " | ".join([SAID[which], *shares]) + " |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any], curves: Mapping[str, Sequence[float]], run: Mapping[str, Any]) -> Figure:
    """Detection by setting and arm, coverage against texts, and contrast text by text of one seed."""
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.2, 1.2])
    names, place = [], 0.0
    for which, found in summary.items():
        names.append((place, SAID[which].replace(", old", ",\nold")))
        for i, (name, one) in enumerate(found["arms"].items()):
            place -= 1
            left.barh(place, one["detection"]["mean"], 0.7, color="white", edgecolor="black", hatch=HATCHES[i % 8])
            if one["detection"]["low"] is not None:
                ends = np.clip([one["detection"]["low"], one["detection"]["high"]], 0, 1)
                left.hlines(place, *ends, color="black", lw=1.2)
            names.append((place, name))
        place -= 1.6
    left.set_yticks(*zip(*names, strict=True), fontsize="x-small")
    left.tick_params(axis="y", length=0)
    left.set(title="texts in a novel domain", xlim=(0, 1.02))
    for i, (name, curve) in enumerate(curves.items()):
        every = max(1, len(curve) // 7)
        middle.step(range(1, len(curve) + 1), curve, where="post", label=name, markevery=(i * every // 8, every),
                    markersize=5, linewidth=1.3, color=COLOURS[i % 8], linestyle=DASHES[i % len(DASHES)],
                    marker=MARKERS[i])  # fmt: skip
    middle.set(title="five new tasks: domains hit", xlabel="texts", ylim=(-0.03, 1.03))
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower right", frameon=False, fontsize="x-small",
                  ncols=4)  # fmt: skip
    for i, name in enumerate(["static, alpha 0.01", "iterative, alpha 0.01, rate 3e-4"]):
        one = run["arms"][name]
        for new in (True, False):
            at = [k for k, label in enumerate(one["labels"]) if (label is not None) == new]
            face = COLOURS[i] if new else "white"
            label = f"{name.split(',')[0]}, {'novel' if new else 'no novel'} domain"
            right.scatter(np.array(at) + 1, np.array(one["contrast"])[at], s=22, marker=MARKERS[i], facecolor=face,
                          edgecolor=COLOURS[i], label=label if at else None)  # fmt: skip
    right.set(title="contrast to the first base, one seed", xlabel="text", ylabel="nats a token", ylim=(None, 14))
    right.legend(frameon=False, fontsize="x-small", loc="upper right")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: every arm was drawn and measured, and plain sampling is no contrast."""
    for which, found in report["summary"].items():
        arms, plain = found["arms"], found["arms"]["plain sampling"]["contrast"]["mean"]
        assert list(arms) == list(setting(which, 1)[2])
        assert all(one["contrast"]["mean"] > plain for name, one in arms.items() if name.startswith("static"))
        for run in report["labels"][which]:
            assert all(len(labels) == report["settings"]["texts"] for labels in run.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of pages, training and texts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="a few steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    settings, seeds, workers = SETTINGS, options.seeds, options.workers
    if options.fast:
        settings = {**SETTINGS, "rows": 4, "base steps": 2, "steps": 2, "texts": 3, "begun": 2}
        seeds, workers = [0], 1
    weights = dict(zip(SAID, in_processes(read_pages, [(which, settings) for which in SAID], workers), strict=True))
    jobs = [(which, seed, weights[which], settings) for which in SAID for seed in seeds]
    done = in_processes(explored, jobs, workers)
    runs = {which: done[i * len(seeds) : (i + 1) * len(seeds)] for i, which in enumerate(SAID)}
    summary = {which: summarised(each, setting(which, 1)[2]) for which, each in runs.items()}
    curves = {name: np.mean([r["arms"][name]["coverage"] for r in runs["many"]], axis=0).tolist() for name in ARMS}
    report = {
        "settings": settings,
        "seeds": seeds,
        "summary": summary,
        "coverage": curves,
        "labels": {w: [{n: one["labels"] for n, one in r["arms"].items()} for r in each] for w, each in runs.items()},
        "texts": {w: {n: one["texts"] for n, one in each[0]["arms"].items()} for w, each in runs.items()},
    }
    path = write(options.out, "new_in_my_data", report, picture(summary, curves, runs["many"][0]), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
