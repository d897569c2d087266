"""The same difference, tuned - base, in weights, in the residual stream and at the logits: what does each do?

    python experiments/three_spaces.py            # five fine-tunings of each of five kinds
    python experiments/three_spaces.py --fast     # a few steps and questions, a check that it runs

Weights: base + alpha * (tuned - base). Stream: every block's output is base's + alpha * (tuned's - base's) of the same
input, between the tuned model's embeddings and head (Nuti et al., ICML 2025). Logits: log p_base + alpha * (log p_tuned
- log p_base), normalised. alpha = 0, 0.25, ... 1.5. At 1 all three are the tuned model, at 0 weights and logits are the
base; the stream is not, for the embeddings stay tuned.

Four kinds of fine-tuning of tiny-base, five seeds each: on sums by the zoo's recipe (60 steps of SFT, a quarter of them
other skills, rate 3e-4), sums of which half are worked out, the same and then GRPO (40 steps), and a hard one: 60 steps
on worked-out sums of 4 to 6 digits alone at 1e-3, after which other skills are known to suffer.

Scored: greedy answers to 128 held-out sums (target) and 126 strings copied, reversed and sorted (skills); and the
KL divergence of what is composed from the base, and from the tuned model: nats a response to a sum, on one response
each that it samples itself, exact at every token. Matched strength: the alpha up to 1 at which the KL from the base is
half of the tuned model's, accuracies in between by straight lines.

Known beforehand: from an earlier trial with another family and one seed of the hard kind, that logits at 0.5 were above
weights at 0.5 in sums of 6 digits and sorting; from the experiment on TuCo, that in the stream of the first kind 0.1 is
enough for all sums.

Expected: (1) the three differ: at 0.5 the KL from the base differs for all three pairs of spaces, with the interval
over seeds, in every kind (some pairs: in part); (2) in the order stream, logits, weights, from most to least, in the
means of every kind (of some: in part); (3) logits at 0.5 dominate weights at 0.5, of the hard kind: target and skills
are each no more than 0.02 below with the interval, and one is above 0 with it (only one is above 0 with it: in part);
(4) so they do at equal KL; (5) beyond the tuned model logits keep more: at 1.5 skills are above those of weights, and
above those of the stream, mean over the four kinds, with the interval.

Added after a first run, in which at 0.5 all three did all sums and kept all skills, so that nothing could dominate: a
fifth kind, 60 steps on rotated strings alone at 1e-3, its target rotated strings. It is asked (3) and (4) only, by the
same rule, in verdicts of its own. The differences at 1.5 were looked at after that run too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena import in_processes, mean_interval, rounded, write
from build_zoo import MEMBERS, Stage, tuned_on
from logit_arena import KEPT, answered, bare, longest, questions, trained
from long_sums import told
from matplotlib.figure import Figure
from torch import Tensor
from tuning_contribution import above, told_of

from analysis.evaluate import prompt_ids, respond
from analysis.plots import MARKERS
from surgery.activations.decomposition import scaled
from surgery.decoding import Sampling
from surgery.logits import member
from surgery.models import Pair, load
from surgery.weights.live import ModelSource
from surgery.weights.vector import TaskVector

SPACES = ("weights", "stream", "logits")
KINDS = {"sums": "SFT on sums", "half": "SFT, half worked out", "grpo": "the same, then GRPO", "hard": "hard SFT",
         "rotate": "hard SFT, rotate"}  # fmt: skip
FIRST = ("sums", "half", "grpo", "hard")
"""The kinds that were there from the beginning."""
HARD = Stage({"chain": 1.0}, 60, 64, 1e-3, options={"chain": {"terms": [4, 6]}})
ROTATE = Stage({"rotate": 1.0}, 60, 64, 1e-3)
SETTINGS: dict[str, Any] = {"alphas": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5), "steps": None, "test": 128}
FAST: dict[str, Any] = {"alphas": (0.0, 0.5, 1.0, 1.5), "steps": 2, "test": 6}
"""`steps`: of every stage, in place of its own."""


def fine_tunings(seed: int, steps: int | None) -> Iterator[tuple[str, Pair]]:
    """Every kind, one after the other; GRPO goes on from the second."""
    stages = {"sums": tuned_on("chain").stages[0], "half": MEMBERS["sums-sft"].stages[0],
              "grpo": MEMBERS["sums-grpo"].stages[0], "hard": HARD, "rotate": ROTATE}  # fmt: skip
    model: Any = None
    for kind, stage in stages.items():
        (base, tokenizer), (fresh, _) = load("tiny-base"), load("tiny-base")
        if kind == "grpo":
            fresh.load_state_dict(model.state_dict())
        model = fresh
        if steps is not None:
            stage = replace(stage, steps=steps, batch=4, group=min(stage.group, 4))
        trained(model, tokenizer, stage, seed)
        yield kind, Pair(base, model, tokenizer)


@contextmanager
def composed(pair: Pair, space: str, alpha: float) -> Iterator[Any]:
    """base + alpha * (tuned - base) in one space, as something that decodes."""
    if space == "weights":
        model, _ = load("tiny-base")
        vector = TaskVector.between(ModelSource(pair.base), ModelSource(pair.tuned))
        vector.apply_to(model, alpha)
        yield model
    elif space == "stream":
        with scaled(pair, alpha) as model:
            yield model
    else:
        base, tuned = (member(m, pair.tokenizer, name=n) for m, n in ((pair.base, "base"), (pair.tuned, "tuned")))
        yield base + alpha * (tuned - base)


@torch.no_grad()
def log_probs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(row, pos, vocab) of the next token."""
    return model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)


def divergences(
    pair: Pair, space: str, alpha: float, prompts: Sequence[Sequence[int]], seed: int, new: int
) -> dict[str, float]:
    """KL from the base and from the tuned model, nats a response, on responses that the composition samples."""
    sampling = Sampling(new, 1.0, batch_size=256)
    with composed(pair, space, alpha) as what:
        drawn = [one for (one,) in respond(what, prompts, pair.tokenizer, sampling, seed=seed)]
        rows = [[*one.prompt_ids, *one.completion_ids] for one in drawn]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        own = None if space == "logits" else log_probs(what, ids, mask)
    base, tuned = log_probs(pair.base, ids, mask), log_probs(pair.tuned, ids, mask)
    if own is None:
        own = (base + alpha * (tuned - base)).log_softmax(-1)
    predicts = torch.zeros_like(mask, dtype=torch.bool)
    for i, one in enumerate(drawn):
        predicts[i, len(one.prompt_ids) - 1 : len(rows[i]) - 1] = True
    found = {}
    for name, other in (("base", base), ("tuned", tuned)):
        at_each = (own.exp() * (own - other)).sum(-1) * predicts
        found[f"KL from {name}"] = float(at_each.sum(1).mean())
    return found


def measured(seed: int, settings: Mapping[str, Any]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Kind -> space -> a line of numbers an alpha, for the fine-tunings of one seed."""
    skills = questions(KEPT, settings["test"])
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for kind, pair in fine_tunings(seed, settings["steps"]):
        task = "rotate" if kind == "rotate" else "chain"
        target = questions([task], settings["test"])
        prompts = [prompt_ids(pair.tokenizer, row["prompt"]) for row in target]
        found[kind] = {space: [] for space in SPACES}
        known: dict[tuple[float, bool], dict[str, float]] = {}
        for space in SPACES:
            for alpha in settings["alphas"]:
                same = (alpha, alpha == 0 and space == "stream")  # at 1 all are the tuned model, at 0 two are the base
                if alpha not in (0, 1) or same not in known:
                    with composed(pair, space, alpha) as what:
                        one = {
                            "target": float(answered(what, pair.tokenizer, target).mean),
                            "skills": float(answered(what, pair.tokenizer, skills).mean),
                        }
                    known[same] = {**one, **divergences(pair, space, alpha, prompts, seed, longest([task]))}
                found[kind][space].append(known[same])
    return found


# ---- what came out


def at_level(alphas: Sequence[float], line: Sequence[Mapping[str, float]], level: float) -> dict[str, float] | None:
    """Accuracies where the KL from the base first reaches `level`, up to alpha 1; None where it begins above."""
    for i in range(len(alphas) - 1):
        low, high = line[i], line[i + 1]
        if alphas[i + 1] <= 1 and low["KL from base"] <= level <= high["KL from base"]:
            width = high["KL from base"] - low["KL from base"]
            share = (level - low["KL from base"]) / width if width else 0.0
            mixed = {key: low[key] + share * (high[key] - low[key]) for key in ("target", "skills")}
            return {**mixed, "alpha": alphas[i] + share * (alphas[i + 1] - alphas[i])}
    return None


def matched(runs: Sequence[Mapping[str, Any]], kind: str, alphas: Sequence[float]) -> dict[str, Any]:
    """At half the tuned model's KL from the base: every space, and logits - weights over the seeds that have both."""
    points: dict[str, list[dict[str, float] | None]] = {space: [] for space in SPACES}
    for run in runs:
        level = run[kind]["weights"][alphas.index(1.0)]["KL from base"] / 2
        for space in SPACES:
            points[space].append(at_level(alphas, run[kind][space], level))
    found: dict[str, Any] = {}
    for space, each in points.items():
        there = [one for one in each if one is not None]
        found[space] = {key: mean_interval([p[key] for p in there]) for key in there[0]} if there else None
    both = [(a, b) for a, b in zip(points["logits"], points["weights"], strict=True) if a is not None and b is not None]
    found["logits - weights"] = {
        key: mean_interval([a[key] - b[key] for a, b in both]) for key in ("target", "skills")
    } if both else None  # fmt: skip
    return found


def dominates(target: Mapping[str, Any], skills: Mapping[str, Any]) -> bool | None:
    """Whether no difference is more than 0.02 below 0 with its interval, and one is above 0 with it."""
    if target["low"] is None:
        return None
    return min(target["low"], skills["low"]) > -0.02 and max(target["low"], skills["low"]) > 0


def of_domination(difference: Mapping[str, Any] | None) -> str:
    """The verdict on one pair of differences."""
    if difference is None or (found := dominates(difference["target"], difference["skills"])) is None:
        return "not asked"
    better = [one for one in difference.values() if one["low"] > 0]
    worse = [one for one in difference.values() if one["high"] < 0]
    return "held" if found else "in part" if better else "the other way round" if worse else "no clear difference"


def summarised(runs: Sequence[Mapping[str, Any]], alphas: Sequence[float]) -> dict[str, Any]:
    """Means over seeds at every alpha, differences at 0.5, at equal KL and at 1.5, the verdicts of the docstring."""
    half, last = list(alphas).index(0.5), list(alphas).index(1.5)
    keys = ("target", "skills", "KL from base", "KL from tuned")

    def values(kind: str, space: str, at: int, key: str) -> np.ndarray:
        return np.array([run[kind][space][at][key] for run in runs])

    def minus(kind: str, spaces: tuple[str, str], at: int, key: str) -> dict[str, Any]:
        return mean_interval(list(values(kind, spaces[0], at, key) - values(kind, spaces[1], at, key)))

    kinds: dict[str, Any] = {}
    for kind in KINDS:
        curves = {
            space: [{key: mean_interval(list(values(kind, space, i, key))) for key in keys} for i in range(len(alphas))]
            for space in SPACES
        }
        ours = ("logits", "weights")
        one: dict[str, Any] = {
            "curves": curves,
            "at half": {key: minus(kind, ours, half, key) for key in ("target", "skills")},
            "at 1.5": {key: minus(kind, ours, last, key) for key in ("target", "skills")},
            "KL at half": {f"{a} - {b}": minus(kind, (a, b), half, "KL from base") for a, b in combinations(SPACES, 2)},
            "matched": matched(runs, kind, list(alphas)),
        }
        means = [curves[space][half]["KL from base"]["mean"] for space in ("stream", "logits", "weights")]
        one["in order"] = means[0] > means[1] > means[2]
        one["dominates"] = {"at half": of_domination(one["at half"]),
                            "at equal KL": of_domination(one["matched"]["logits - weights"])}  # fmt: skip
        kinds[kind] = one
    beyond = {
        f"logits - {other}": mean_interval(list(np.mean(
            [values(kind, "logits", last, "skills") - values(kind, other, last, "skills") for kind in FIRST], 0
        )))
        for other in ("weights", "stream")
    }  # fmt: skip
    alone = None if len(runs) == 1 else True
    pairs = [f"{a} - {b}" for a, b in combinations(SPACES, 2)]
    verdicts = {
        "they differ": told_of([
            alone and all(_apart(kinds[kind]["KL at half"][pair]) for kind in FIRST) for pair in pairs
        ]),
        "stream, logits, weights": told_of([alone and kinds[kind]["in order"] for kind in FIRST]),
        "logits dominate at half": kinds["hard"]["dominates"]["at half"],
        "logits dominate at equal KL": kinds["hard"]["dominates"]["at equal KL"],
        "the same, rotate": kinds["rotate"]["dominates"]["at half"],
        "the same at equal KL, rotate": kinds["rotate"]["dominates"]["at equal KL"],
        "beyond, logits keep more": told_of([above(found, 0) for found in beyond.values()]),
    }  # fmt: skip
    return {"alphas": list(alphas), "kinds": kinds, "skills at 1.5": beyond, "verdicts": verdicts}


def _apart(found: Mapping[str, Any]) -> bool:
    return found["low"] > 0 or found["high"] < 0


def markdown(summary: Mapping[str, Any]) -> str:
    """Target and skills by alpha, KL, and the two ways of matching."""
    alphas = summary["alphas"]
    cells = ["fine-tuning", "space", *(f"{alpha:g}" for alpha in alphas)]
    lines = ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
    for kind, one in summary["kinds"].items():
        for space, line in one["curves"].items():
            both = [f"{at['target']['mean']:.2f}, {at['skills']['mean']:.2f}" for at in line]
            lines.append("| " + " | ".join([KINDS[kind], space, *both]) + " |")
    lines += ["", "| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
    for kind, one in summary["kinds"].items():
        for space, line in one["curves"].items():
            both = [
                ", ".join(f"{round(at[key]['mean'], 1) + 0.0:.1f}" for key in ("KL from base", "KL from tuned"))
                for at in line
            ]
            lines.append("| " + " | ".join([KINDS[kind], space, *both]) + " |")
    cells = ["fine-tuning", "matched by", "target: logits - weights", "skills: logits - weights", "verdict",
             "target, skills: weights", "stream", "logits"]  # fmt: skip
    lines += ["", "| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
    half = alphas.index(0.5)
    for kind, one in summary["kinds"].items():
        plain = {space: one["curves"][space][half] for space in SPACES}
        for label, key, found, points in (
            ("alpha 0.5", "at half", one["at half"], plain),
            ("equal KL", "at equal KL", one["matched"]["logits - weights"], one["matched"]),
            ("alpha 1.5", "at 1.5", one["at 1.5"], {space: one["curves"][space][-1] for space in SPACES}),
        ):
            signed = ["", ""] if found is None else [told(found[key], sign="+") for key in ("target", "skills")]
            shown = [_point(points[space], label == "equal KL") for space in SPACES]
            lines.append("| " + " | ".join([KINDS[kind], label, *signed, one["dominates"].get(key, ""), *shown]) + " |")
    return "\n".join(lines)


def _point(found: Mapping[str, Any] | None, with_alpha: bool) -> str:
    if found is None:
        return "begins above"
    text = f"{found['target']['mean']:.2f}, {found['skills']['mean']:.2f}"
    return text + (f" (alpha {found['alpha']['mean']:.2f})" if with_alpha else "")


def picture(summary: Mapping[str, Any]) -> Figure:
    """For every kind: the way from the base to the tuned model and beyond, and KL from the base on it."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    axes = figure.subplots(2, len(KINDS), squeeze=False)
    alphas = summary["alphas"]
    styles = {"weights": ("k-", MARKERS[0]), "stream": ("k:", MARKERS[1]), "logits": ("k--", MARKERS[2])}
    for j, (kind, one) in enumerate(summary["kinds"].items()):
        above_, below = axes[0, j], axes[1, j]
        for space, (dash, marker) in styles.items():
            line = one["curves"][space]
            x, y = ([at[key]["mean"] for at in line] for key in ("target", "skills"))
            above_.plot(x, y, dash + marker, lw=1.2, markersize=5, markerfacecolor="white", label=space)
            i = alphas.index(0.5)
            above_.plot(x[i], y[i], "k" + marker, markersize=7)
            kl = [at["KL from base"] for at in line]
            half = [0.0 if k["low"] is None else k["high"] - k["mean"] for k in kl]
            below.errorbar(alphas, [k["mean"] for k in kl], half, fmt=dash + marker, lw=1.2, markersize=5, capsize=2,
                           elinewidth=0.8, markerfacecolor="white", label=space)  # fmt: skip
        above_.set(title=KINDS[kind], xlabel="target (filled: alpha 0.5)", xlim=(-0.04, 1.06), ylim=(-0.03, 1.04))
        below.set(xlabel="alpha")
        below.axvline(1, color="0.8", lw=0.8, zorder=0)
    axes[0, 0].set_ylabel("skills kept")
    axes[1, 0].set_ylabel("KL from the base, nats a response")
    axes[0, 0].legend(frameon=False, fontsize="small", loc="lower left")
    for axis in axes[0, 1:]:
        axis.set_yticklabels([])
    bare(*axes.flat)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: the three meet at alpha 1, two of them at 0, where they are the base."""
    summary = report["summary"]
    assert set(summary["verdicts"].values()) == {"not asked"}, summary["verdicts"]
    for one in summary["kinds"].values():
        lines, last = one["curves"], summary["alphas"].index(1.0)
        assert lines["weights"][last] == lines["stream"][last] == lines["logits"][last]
        assert lines["weights"][0] == lines["logits"][0]
        assert abs(lines["weights"][0]["KL from base"]["mean"]) < 1e-4
        assert abs(lines["logits"][last]["KL from tuned"]["mean"]) < 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="two steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    seeds, workers = ([0], 1) if options.fast else (options.seeds, options.workers)
    settings = FAST if options.fast else SETTINGS
    runs = in_processes(measured, [(seed, settings) for seed in seeds], workers)
    summary = summarised(runs, settings["alphas"])
    report = {"settings": settings, "seeds": seeds, "summary": summary}
    path = write(options.out, "three_spaces", report, picture(summary), began)
    print(markdown(rounded(summary)))
    print(summary["verdicts"], summary["skills at 1.5"], path, sep="\n")


if __name__ == "__main__":
    main()
