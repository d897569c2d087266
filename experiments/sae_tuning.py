"""Does SAE-tuning recover what RL gave a model, and by the source's dictionary (arXiv:2506.09967)?

    python experiments/sae_tuning.py            # 5 seeds, about 18 CPU-minutes
    python experiments/sae_tuning.py --fast     # one seed of a few steps, a check that it runs

Target T is tiny-sums-sft, which works a sum out or answers at once; source S is tiny-sums-grpo, made of T by GRPO. A
LoRA is trained on T while S's dictionary stands in for the residual stream, with T itself as teacher: as published, on
questions with their answers alone, no step worked out, in both stages. The published settings but for size: TopK of 16
out of 512, texts one by one (they are shorter than the model's context), 40 steps of 32 texts, a LoRA of rank 8 and
the published alpha / rank of 4. Ten arms (surgery/sae/tune_arms.py) meet the same texts. Site and learning rate of
every arm are chosen on 2 seeds and 100 questions that are not reported: the best of 2 x 3, of arms without a site the
best of 3.

Scored: greedy answers to 200 held-out sums, none of which is in a text. Recovered is the share of S's lead over T.
Intervals: bootstrap over seeds and questions, paired.

The verdict was defined before anything was scored. It holds when the arm "source" is better than T and than all of
"own", "shuffled", "random" and "noise", each with the interval of the difference above 0; in part when it is better
than T alone; else it did not hold. Besides: whether it is better than plain SFT on the same texts, and what our
variants (S as the teacher; labels) come to.

Transplant: the LoRA of T, as it is, added to two siblings of T that were never tuned on sums. It holds when what it
gains there is above 0 with its interval, and not below half of what training on the sibling itself gains. The same of
distillation, as a change that is known to do something.

Asked afterwards, since the arm "source" fell below T, and no part of the verdicts: T minus that LoRA, and the same
comparison on texts with the steps worked out, of fewer arms (2 x 2 choices).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from arena import one_thread, rounded, write
from long_sums import difference, told
from matplotlib.figure import Figure

from analysis.evaluate import evaluate
from analysis.plots import HATCHES
from analysis.results import Result
from surgery import zoo
from surgery.models import load
from surgery.sae.tune_files import Runs
from surgery.sae.tune_recipe import Recipe, make
from surgery.sae.tune_run import Lab, Outcome, held_out, opened, run
from surgery.weights.vector import TaskVector

RECIPE: dict[str, Any] = {
    "target": "tiny-sums-sft", "source": "tiny-sums-grpo", "data": {"task": "direct"},
    "reading": {"packing": False, "positions": "completion", "batch": 32, "context": 64},
    "site": ["resid_post.1", "resid_post.2"],
    "dictionary": {"latents": 512, "rule": {"topk": {"k": 16}}, "steps": 200, "rows": 512, "buffer": 8192},
    "tuning": {"rank": 8, "alpha": 32.0, "lr": [1e-4, 3e-4, 1e-3], "steps": 40, "rows": 32},
    "seeds": [0, 1, 2, 3, 4], "sweep": {"seeds": [100, 101], "n": 100},
    "evaluate": {"data": {"task": "chain"}, "n": 200, "max_new_tokens": 48},
}  # fmt: skip
WORKED: dict[str, Any] = RECIPE | {
    "data": {"task": "chain"}, "arms": ["source", "own", "noise", "sft", "unchanged"],
    "tuning": RECIPE["tuning"] | {"lr": [1e-4, 1e-3]},
}  # fmt: skip
FAST = {"site": "resid_post.1", "seeds": [0], "sweep": {"seeds": [100], "n": 8}}
CONTROLS = ("own", "shuffled", "random", "noise")
SIBLINGS = ("tiny-base", "tiny-shift")
MOVED = ("source", "distillation")
"""The arms whose LoRA is transplanted."""
HALF = 0.5


def recipe(words: Mapping[str, Any], fast: bool, seeds: list[int]) -> Recipe:
    """A comparison's recipe."""
    if not fast:
        return make({**words, "seeds": seeds})
    small = {"dictionary": {**words["dictionary"], "steps": 2, "latents": 64},
             "evaluate": words["evaluate"] | {"n": 8},
             "tuning": {**words["tuning"], "steps": 1, "rows": 4, "lr": [1e-4, 1e-3]}}  # fmt: skip
    return make({**words, **FAST, **small})


def scored(model: Any, tokenizer: Any, rows: Any) -> Any:
    """1 where the greedy answer is right."""
    return evaluate(model, rows, tokenizer=tokenizer, max_new_tokens=48, batch_size=256).values


def finished(words: Recipe, out: Path) -> Outcome:
    """All arms; what is in the folder already is not done again."""
    (out / "result.json").unlink(missing_ok=True)  # it would be refused as finished
    return run(words, scored, out=out, on_run=lambda done, of, name: print(f"{done} of {of}: {name}", flush=True))


def results(found: Outcome) -> dict[str, dict[int, Result]]:
    """By arm and seed, as results that can be paired."""
    return {arm: {seed: Result.of(v) for seed, v in by.items()} for arm, by in found.arms.items()}


# ---- transplant


def transplants(words: Recipe, out: Path) -> dict[str, dict[str, dict[int, Result]]]:
    """By sibling and kind: before, the source itself, and by arm transplanted and trained there, of each seed."""
    (target, source), tokenizer = opened([words.target, words.source], "auto")
    test, validation = held_out(words)
    chosen = {arm: _choice(out, arm) for arm in MOVED}
    found: dict[str, dict[str, dict[int, Result]]] = {}
    for name in SIBLINGS:
        sibling, _ = load(name)
        lab = Lab(words, Runs(out), sibling, source, tokenizer, {"test": test, "validation": validation}, scored)
        before = Result.of(scored(sibling, tokenizer, test))
        found[name] = {"before": dict.fromkeys(words.seeds, before)}
        for arm in MOVED:
            moved, there = {}, {}
            for seed in words.seeds:
                adapter = out / "adapters" / arm / f"seed-{seed}"
                model = copy.deepcopy(sibling)
                TaskVector.from_adapter(zoo.get(words.target), adapter).unbound().apply_to(model)
                moved[seed] = Result.of(scored(model, tokenizer, test))
                there[seed] = Result.of(scored(lab.trained(arm, *chosen[arm], seed), tokenizer, test))
            found[name] |= {f"{arm}, transplanted": moved, f"{arm}, trained there": there}
    return found


def negated(words: Recipe, out: Path) -> dict[int, Result]:
    """T minus the LoRA of "source", of each seed."""
    [target], tokenizer = opened([words.target], "auto")
    test, _ = held_out(words)
    found = {}
    for seed in words.seeds:
        adapter = out / "adapters" / "source" / f"seed-{seed}"
        with TaskVector.from_adapter(zoo.get(words.target), adapter).applied(target, scale=-1):
            found[seed] = Result.of(scored(target, tokenizer, test))
    return found


def _choice(out: Path, arm: str) -> tuple[str, float]:
    chosen = json.loads((out / "result.json").read_text())["chosen"][arm]
    return chosen["site"] or "resid_post.1", chosen["lr"]


# ---- what is told


def compared(found: Outcome) -> dict[str, Any]:
    """By arm: what was chosen, accuracy, share recovered, and "source" against it."""
    each = results(found)
    target = dict.fromkeys(each["source"], Result.of(found.target))
    lead = float(np.mean(found.source) - np.mean(found.target))
    return {
        arm: {
            "site": found.chosen[arm]["site"], "lr": f"{found.chosen[arm]['lr']:g}",
            "accuracy": [float(r.values.mean()) for r in by.values()],
            "recovered": scaled(difference(by, target), 1 / lead), "against source": difference(each["source"], by),
        } for arm, by in each.items()
    }  # fmt: skip


def summarised(
    found: Outcome,
    moved: Mapping[str, Mapping[str, Mapping[int, Result]]],
    minus: Mapping[int, Result],
    worked: Outcome,
) -> dict[str, Any]:
    """All arms and differences; the verdicts."""
    arms, lead = compared(found), float(np.mean(found.source) - np.mean(found.target))
    asked = {"T": arms["source"]["recovered"], **{name: arms[name]["against source"] for name in CONTROLS}}
    transplant = {name: _transplant(by) for name, by in moved.items()}
    beats = [name for name, d in asked.items() if d["low"] is not None and d["low"] > 0]
    back = difference(minus, dict.fromkeys(minus, Result.of(found.target)))
    return {
        "T": float(np.mean(found.target)), "S": float(np.mean(found.source)), "arms": arms,
        "verdict": verdict(asked), "beats": beats, "dictionaries": found.dictionaries, "transplant": transplant,
        "verdict of the transplant": {arm: transplant_verdict([t[arm] for t in transplant.values()]) for arm in MOVED},
        "minus": {"accuracy": float(np.mean([r.values.mean() for r in minus.values()])),
                  "recovered": scaled(back, 1 / lead)},
        "worked out": compared(worked),
    }  # fmt: skip


def _transplant(by: Mapping[str, Mapping[int, Result]]) -> dict[str, Any]:
    found: dict[str, Any] = {"before": float(next(iter(by["before"].values())).values.mean())}
    for arm in MOVED:
        kinds = {kind: difference(by[f"{arm}, {kind}"], by["before"]) for kind in ("transplanted", "trained there")}
        found[arm] = kinds
    return found


def scaled(found: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A mean and its interval times a number."""
    return {k: v * factor if k in ("mean", "low", "high") and v is not None else v for k, v in found.items()}


def verdict(asked: Mapping[str, Mapping[str, Any]]) -> str:
    """As defined above, of the differences between "source" and what it is asked to beat."""
    if asked["T"]["low"] is None:
        return "not tested (one seed)"
    better = {name: d["low"] > 0 for name, d in asked.items()}
    return "held" if all(better.values()) else "in part" if better["T"] else "did not hold"


def transplant_verdict(each: list[Mapping[str, Any]]) -> str:
    """As defined above, over the siblings."""
    if any(t["transplanted"]["low"] is None for t in each):
        return "not tested (one seed)"
    good = [
        t["transplanted"]["low"] > 0 and t["transplanted"]["mean"] >= HALF * t["trained there"]["mean"] for t in each
    ]
    return "held" if all(good) else "in part" if any(good) else "did not hold"


def markdown(summary: Mapping[str, Any]) -> str:
    """A line an arm, on both kinds of texts; a line a sibling."""
    lines = [*_arm_lines(summary["arms"], "answers alone")]
    ends = f"T answers {summary['T']:.3f} of the questions, S {summary['S']:.3f}"
    lines += ["", f"{ends}. The claim: {summary['verdict']}.", "", *_arm_lines(summary["worked out"], "worked out")]
    back = summary["minus"]
    lines += ["", f"T minus the LoRA of \"source\" (answers alone): accuracy {back['accuracy']:.3f}, "
                  f"recovered {told(back['recovered'])}."]  # fmt: skip
    lines += ["", "| sibling | before | arm | gain of T's LoRA, transplanted | gain when trained there |",
              "|---|---|---|---|---|"]  # fmt: skip
    for name, t in summary["transplant"].items():
        for arm in MOVED:
            cells = [told(t[arm][kind], 3, "+") for kind in ("transplanted", "trained there")]
            lines.append(f"| {name} | {t['before']:.3f} | {arm} | " + " | ".join(cells) + " |")
    told_verdicts = "; ".join(f"{arm}: {v}" for arm, v in summary["verdict of the transplant"].items())
    return "\n".join([*lines, "", f"The transplant, {told_verdicts}."])


def _arm_lines(arms: Mapping[str, Any], texts: str) -> list[str]:
    lines = [f"| texts: {texts} | site, learning rate | accuracy | share of S's lead recovered | \"source\" minus it |",
             "|---|---|---|---|---|"]  # fmt: skip
    for arm, f in arms.items():
        how = "" if arm == "unchanged" else ", ".join(filter(None, [f["site"], f["lr"]]))
        against = "" if arm == "source" else told(f["against source"], 3, "+")
        lines.append(f"| {arm} | {how} | {np.mean(f['accuracy']):.3f} | {told(f['recovered'])} | {against} |")
    return lines


def picture(summary: Mapping[str, Any]) -> Figure:
    """What each arm recovers, one dot a seed; and the transplants."""
    figure = Figure(figsize=(9.4, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    lead = summary["S"] - summary["T"]
    for i, (_, f) in enumerate(summary["arms"].items()):
        r = f["recovered"]
        look = {"color": "0.6" if i == 0 else "white", "edgecolor": "black", "zorder": 2}
        left.barh(i, r["mean"], hatch="///" if f["site"] is None else "", **look)
        if r["low"] is not None:
            left.hlines(i, r["low"], r["high"], color="black", lw=1.2, zorder=3)
        left.plot([(a - summary["T"]) / lead for a in f["accuracy"]], [i] * len(f["accuracy"]), "k|", ms=9, zorder=4)
    left.set_yticks(range(len(summary["arms"])), list(summary["arms"]))
    left.invert_yaxis()
    left.axvline(0, color="black", lw=0.8)
    left.axvline(1, color="black", lw=0.8, ls=":")
    left.set(xlabel="share of S's lead recovered (0: T, 1: S)", title="Hatched: nothing stands in at a site")
    place, names = 0, []
    for name, t in summary["transplant"].items():
        for arm in MOVED:
            for j, kind in enumerate(("transplanted", "trained there")):
                d = t[arm][kind]
                right.barh(place, d["mean"], color=("0.6", "white")[j], edgecolor="black", hatch=HATCHES[j], zorder=2,
                           label=kind if place < 2 else None)  # fmt: skip
                if d["low"] is not None:
                    right.hlines(place, d["low"], d["high"], color="black", lw=1.2, zorder=3)
                names.append(f"{arm}, {name}" if j == 0 else "")
                place += 1
    right.set_yticks(range(place), names)
    right.invert_yaxis()
    right.axvline(0, color="black", lw=0.8)
    right.set(xlabel="gain in accuracy on a sibling", title="T's LoRA added to siblings")
    right.legend(frameon=False, fontsize="small")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: all arms, T unchanged, and a source that is better."""
    found = report["summary"]
    assert {"source", "sft", "distillation", "unchanged", *CONTROLS} <= set(found["arms"])
    assert found["arms"]["unchanged"]["recovered"]["mean"] == 0 and found["S"] > found["T"]
    assert set(found["transplant"]) == set(SIBLINGS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=RECIPE["seeds"], help="of dictionaries, texts and LoRA")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--runs", type=Path, help="folder for single runs: one that was stopped goes on from there")
    parser.add_argument("--fast", action="store_true", help="few steps and questions: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        kept = options.runs or Path(folder)
        words = recipe(RECIPE, options.fast, options.seeds)
        found = finished(words, kept / "answers alone")
        moved, minus = transplants(words, kept / "answers alone"), negated(words, kept / "answers alone")
        worked = finished(recipe(WORKED, options.fast, options.seeds), kept / "worked out")
    summary = summarised(found, moved, minus, worked)
    report = {"recipe": FAST if options.fast else RECIPE, "n": words.evaluate.n, "summary": summary,
              "sweep": {"answers alone": found.sweep, "worked out": worked.sweep}}  # fmt: skip
    path = write(options.out, "sae_tuning", report, picture(summary), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
