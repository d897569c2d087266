"""Do sparse deltas add up with less interference than dense ones, and does a sibling's mask do as well as one's own?

    python experiments/sparse_deltas.py            # a sweep on one seed, then five seeds
    python experiments/sparse_deltas.py --fast     # a few steps, a check that it runs

Composable fine-tuning (LT-SFT, arXiv:2110.07560): a task and a language are learned apart from one base, as sparse
differences, and added up. The "language" here is a cipher: tiny-base's skills copy, reverse and sort, with every letter
of the answer replaced by the next. The task is rotate, answered plainly, with a quarter of the base's skills as every
fine-tuning of the family has them. The sum is asked to rotate in the cipher, which neither of the two does.

Arms, all on the same examples and over the same tensors (projections and embedding, no norms), at 1 % and 5 %: full
fine-tuning; its K largest differences, trimmed after training; LT-SFT, the same K numbers trained again from the base
(by its own rule: the dense run is its first phase); K random numbers; LIFT's; and the K numbers that a sibling's full
fine-tuning moved most: same task, other examples, other seed. K is the same number in every arm. Every arm's learning
rate for either fine-tuning is the best of three by the log-likelihood of that fine-tuning's own held-out answers, and
the scale of the sum the best of four in the cipher, both on a seed that is not reported. Deltas are those of
`surgery.weights.deltas.file`; in the sweep and after, a number that moved outside its mask stops the run.

Known beforehand, from trials on seeds that are not reported: that strings in letters which tiny-base does not know are
not learned in 150 steps and the cipher is; that a dense sum rotates in the cipher in 0.3 to 0.5 of the cases, and one
pair of LT-SFT at 5 % in 0.7; that rates of 1e-3 and below are too low for 5 % and less.

Fixed before anything was scored, by the sum at scale 1, differences paired over seeds and questions:
* less interference, at either density: LT-SFT - full is above 0 with its interval, and the sum loses no more of the
  cipher's own skills (the interval of the difference of losses reaches 0 or lies below). The first alone: in part.
* LT-SFT over each of trimmed, random and LIFT at the same K: above 0 with its interval.
* a sibling's mask transfers: it is above random with its interval, and below LT-SFT by less than 0.05 (lower end of the
  interval). The first alone: in part.

Asked afterwards: the rates that fit best are large for sparse arms, and large differences add up badly. So the arms
whose own held-out answers become as likely as full fine-tuning's (to 0.005 nats a token, in the sweep) were run again,
at the smallest rates that do it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from arena import in_processes, mean_interval, rounded, write
from long_sums import base, difference, told, verdict
from matplotlib.figure import Figure

from analysis.evaluate import answer_log_likelihood, evaluate
from analysis.results import Result
from surgery.tasks import TASKS
from surgery.tasks.characters import LETTERS
from surgery.training import train
from surgery.tuning import Selection, select
from surgery.tuning.selection import targets
from surgery.weights.deltas.algebra import overlap
from surgery.weights.deltas.file import SparseDelta

DENSITIES = (0.01, 0.05)
MODULES = ("attention", "mlp", "embedding")
METHODS = ("LT-SFT", "trimmed", "random", "LIFT", "sibling")
ARMS = {"full": ("full", 1.0)} | {f"{m} {d:.0%}": (m, d) for d in DENSITIES for m in METHODS}
NEXT = str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0])
SKILLS = ("copy", "reverse", "sort")
MIXES = {
    "cipher": {"facts": 0.0625, **dict.fromkeys((f"{s}*" for s in SKILLS), 0.3125)},
    "task": {**dict.fromkeys(("facts", *SKILLS), 0.0625), "rotate": 0.75},
}
"""Shares of the tasks; those with a star are answered in the cipher."""
SETTINGS: dict[str, Any] = {
    "steps": {"cipher": 80, "task": 50}, "rows": 32, "test": 200, "sweep": 50,
    "rates": {"full": (5e-4, 1e-3, 2e-3), "sparse": (3e-3, 1e-2, 3e-2)}, "scales": (0.6, 0.8, 1.0, 1.25),
}  # fmt: skip
LONGEST, ALLOWED, NEAR = 16, -0.05, 0.005


class Rows:
    """Endless rows of a mix: each a pure function of (seed, index)."""

    size = float("inf")
    columns = {"prompt", "completion", "answer", "task"}

    def __init__(self, kind: str, seed: int) -> None:
        self.mix, self.seed = MIXES[kind], f"{kind}/{seed}"

    def row(self, index: int) -> dict[str, Any]:
        """Row `index`."""
        rng = Random(f"{self.seed}/{index}")
        (name,) = rng.choices(list(self.mix), list(self.mix.values()))
        task = name.removesuffix("*")
        row = TASKS[task].example(rng).row(task)
        return ciphered(row) if name.endswith("*") else row


def ciphered(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same question, its answer in the cipher."""
    return {**row, "completion": row["completion"].translate(NEXT), "answer": row["answer"].translate(NEXT)}


def questions(name: str, n: int, seed: int) -> list[dict[str, Any]]:
    """`n` held-out rows of a task; with a star, in the cipher."""
    task = name.removesuffix("*")
    rows = [e.row(task) for e in TASKS[task].examples(min(n, 100) if task == "facts" else n, seed)]
    return [ciphered(row) for row in rows] if name.endswith("*") else rows


def asked(model: Any, tokenizer: Any, names: Sequence[str], n: int, seed: int = 990) -> dict[str, Result]:
    """Right answers to `n` questions of every task."""
    rows = {name: questions(name, n, seed) for name in names}
    every = [row for each in rows.values() for row in each]
    found = evaluate(model, every, tokenizer=tokenizer, max_new_tokens=LONGEST, batch_size=512)
    parts = iter(np.split(found.values, np.cumsum([len(each) for each in rows.values()])[:-1]))
    return {name: Result.of(next(parts), [row["prompt"] for row in each]) for name, each in rows.items()}


def average(found: Mapping[str, Result], names: Sequence[str]) -> float:
    """Mean accuracy on several tasks."""
    return float(np.mean([found[name].mean for name in names]))


CIPHER = tuple(f"{skill}*" for skill in SKILLS)


@cache
def start() -> tuple[Any, Any, int]:
    """tiny-base, its tokenizer, and how many numbers are up for selection."""
    model, tokenizer = base()
    return model, tokenizer, sum(t.parameter.numel() for t in targets(model, MODULES))


def tuned(kind: str, seed: int, rate: float, chosen: Any, settings: Mapping[str, Any]) -> Any:
    """One fine-tuning of tiny-base but for norms: of everything, a selection, or what a recipe says under `tuning:`."""
    model, tokenizer, _ = start()
    model, steps = copy.deepcopy(model), settings["steps"][kind]
    train(
        model, tokenizer, objective="sft", data=Rows(kind, seed), seed=seed, steps=steps, tuning=chosen,
        frozen=["*norm*"], batch={"rows": settings["rows"]},
        optimizer={"lr": rate, "betas": (0.9, 0.98), "warmup": 0.1, "final": 0.1},
    )  # fmt: skip
    return model


def selection(method: str, density: float, seed: int, dense: Any, sibling: Any) -> Selection:
    """Which K numbers an arm trains; `dense` and `sibling` are full fine-tunings of the same task."""
    model, _, total = start()
    words: dict[str, Any] = {
        "LT-SFT": {"method": "delta", "sibling": dense}, "sibling": {"method": "delta", "sibling": sibling},
        "trimmed": {"method": "delta", "sibling": dense}, "random": {"method": "random", "seed": seed},
        "LIFT": {"method": "lift", "rank": 8},
    }[method]  # fmt: skip
    return select(model, words.pop("method"), count=round(density * total), modules=MODULES, **words)


def delta(model: Any, chosen: Selection | None, trim: bool = False) -> SparseDelta:
    """What moved, in mode "add". Raises AssertionError when something outside did, unless to `trim` that."""
    found = SparseDelta.between(start()[0], model, only=chosen)
    assert trim or "outside" not in found.parameters, "numbers outside the mask moved"
    return found.added()


class Family:
    """All fine-tunings of one seed, made as they are asked for; `rates` by arm and kind."""

    def __init__(self, seed: int, settings: Mapping[str, Any], rates: dict[str, dict[str, float]]) -> None:
        self.seed, self.settings, self.rates = seed, settings, rates
        self._dense: dict[tuple[str, int], Any] = {}

    def dense(self, kind: str, seed: int) -> Any:
        """Full fine-tuning."""
        if (kind, seed) not in self._dense:
            self._dense[kind, seed] = tuned(kind, seed, self.rates["full"][kind], None, self.settings)
        return self._dense[kind, seed]

    def chosen(self, arm: str, kind: str) -> Selection:
        """The numbers of a sparse arm."""
        method, density = ARMS[arm]
        other = self.dense(kind, 1000 + self.seed) if method == "sibling" else None
        number = 2 * self.seed + (kind == "task")  # the two fine-tunings' random masks are drawn apart
        return selection(method, density, number, self.dense(kind, self.seed), other)

    def delta(self, arm: str, kind: str) -> SparseDelta:
        """What an arm's fine-tuning moved."""
        if arm == "full":
            return delta(self.dense(kind, self.seed), None)
        chosen = self.chosen(arm, kind)
        if ARMS[arm][0] == "trimmed":
            return delta(self.dense(kind, self.seed), chosen, trim=True)
        return delta(tuned(kind, self.seed, self.rates[arm][kind], chosen, self.settings), chosen)


def sweep(seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every arm's rates and scale, on one seed: {"rates": arm -> kind, "scales", "scores": arm -> kind -> rate}."""
    model, tokenizer, _ = start()
    family = Family(seed, settings, {})
    scores: dict[str, dict[str, dict[str, float]]] = {}
    scales: dict[str, float] = {}
    rows = {"cipher": [r for n in CIPHER for r in questions(n, settings["sweep"], 980)],
            "task": questions("rotate", 3 * settings["sweep"], 980)}  # fmt: skip
    for arm, (method, _) in ARMS.items():
        family.rates[arm], deltas = {}, {}
        for kind in MIXES:
            if method == "trimmed":
                deltas[kind] = family.delta(arm, kind)
                continue
            chosen = None if arm == "full" else family.chosen(arm, kind)
            found = {}
            for rate in settings["rates"]["full" if arm == "full" else "sparse"]:
                one = tuned(kind, seed, rate, chosen, settings)
                found[rate] = float(answer_log_likelihood(one, tokenizer, [r["prompt"] for r in rows[kind]],
                    [r["completion"] for r in rows[kind]], batch_size=256).mean), delta(one, chosen), one  # fmt: skip
            best = max(found, key=lambda rate: found[rate][0])
            family.rates[arm][kind], deltas[kind] = best, found[best][1]
            if arm == "full":
                family._dense[kind, seed] = found[best][2]
            scores.setdefault(arm, {})[kind] = {str(rate): value for rate, (value, *_) in found.items()}
        total = SparseDelta.compose(list(deltas.values()))
        right = {}
        for scale in settings["scales"]:
            with total.applied(model, scale):
                right[scale] = float(asked(model, tokenizer, ["rotate*"], 2 * settings["sweep"], 980)["rotate*"].mean)
        scales[arm] = max(right, key=lambda s: (right[s], -abs(s - 1)))
    return {"seed": seed, "rates": family.rates, "scales": scales, "scores": scores}


def summed(family: Family, arm: str, scale: float = 1.0) -> dict[str, Any]:
    """An arm's two fine-tunings: each alone, added up, and how far they meet."""
    model, tokenizer, _ = start()
    n, one = family.settings["test"], dict[str, Any]()
    deltas = {kind: family.delta(arm, kind) for kind in MIXES}
    with deltas["cipher"].applied(model):
        right = asked(model, tokenizer, [*CIPHER, "rotate*"], n // 2)
        one["cipher alone"], one["rotate in cipher, cipher alone"] = average(right, CIPHER), average(right, ["rotate*"])
    with deltas["task"].applied(model):
        one["task alone"] = average(asked(model, tokenizer, ["rotate"], n // 2), ["rotate"])
    total = SparseDelta.compose(list(deltas.values()))
    with total.applied(model):
        right = asked(model, tokenizer, [*CIPHER, "facts"], n // 2)
        one["cipher in the sum"], one["facts in the sum"] = average(right, CIPHER), average(right, ["facts"])
        one["both"] = one["both, scaled"] = asked(model, tokenizer, ["rotate*"], n)["rotate*"]
    one["lost"] = one["cipher alone"] - one["cipher in the sum"]
    if scale != 1:
        with total.applied(model, scale):
            one["both, scaled"] = asked(model, tokenizer, ["rotate*"], n)["rotate*"]
    meeting = overlap(list(deltas.values())).pairs[0, 1]
    return one | {"overlap": meeting.overlap, "chance": meeting.chance, "agreement": meeting.agreement,
                  "count": [d.count for d in deltas.values()]}  # fmt: skip


def added(seed: int, settings: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """One seed: every arm."""
    family = Family(seed, settings, found["rates"])
    return {arm: summed(family, arm, found["scales"][arm]) for arm in ARMS}


def gentle(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of the sparse arms that fit both as well as full fine-tuning does: the smallest rates that do."""
    best = {kind: max(each.values()) for kind, each in found["scores"]["full"].items()}
    rates: dict[str, dict[str, float]] = {}
    for arm, kinds in found["scores"].items():
        enough = {k: [float(r) for r, v in each.items() if v > best[k] - NEAR] for k, each in kinds.items()}
        if arm != "full" and all(enough.values()):
            rates[arm] = {kind: min(each) for kind, each in enough.items()}
    return rates


def afterwards(seed: int, settings: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """One seed: full fine-tuning, and the arms of `gentle` at its rates."""
    rates = {"full": found["rates"]["full"], **gentle(found)}
    family = Family(seed, settings, rates)
    return {arm: summed(family, arm) for arm in rates}


PLAIN = ("cipher alone", "task alone", "rotate in cipher, cipher alone", "cipher in the sum", "facts in the sum",
         "lost", "overlap", "chance", "agreement")  # fmt: skip


def summarised(runs: Mapping[int, Mapping[str, Any]], found: Mapping[str, Any]) -> dict[str, Any]:
    """Arms, differences and verdicts."""

    def values(arm: str, what: str) -> list[float]:
        return [float(getattr(run[arm][what], "mean", run[arm][what])) for run in runs.values()]

    def less(ours: str, theirs: str, what: str = "both") -> dict[str, Any]:
        return difference({s: r[ours][what] for s, r in runs.items()}, {s: r[theirs][what] for s, r in runs.items()})

    arms = {}
    for arm in ARMS:
        counts = np.mean([run[arm]["count"] for run in runs.values()], axis=0)
        rates = found["rates"].get(arm) or found["rates"]["full"]
        arms[arm] = {what: mean_interval(values(arm, what)) for what in ("both", "both, scaled", *PLAIN)}
        arms[arm] |= {"scale": found["scales"][arm], "rates": rates, "moved": counts.tolist()}
    pairs: dict[str, Any] = {}
    for d in DENSITIES:
        name = f"LT-SFT {d:.0%}"
        for other in ("full", *(f"{m} {d:.0%}" for m in METHODS[1:4])):
            pairs[f"{name} - {other}"] = {"both": less(name, other), "scaled": less(name, other, "both, scaled")}
        lost = [a - b for a, b in zip(values(name, "lost"), values("full", "lost"), strict=True)]
        pairs[f"{name} - full"]["lost"] = mean_interval(lost)
        for other in (f"random {d:.0%}", name):
            pair = {"both": less(f"sibling {d:.0%}", other), "scaled": less(f"sibling {d:.0%}", other, "both, scaled")}
            pairs[f"sibling {d:.0%} - {other}"] = pair
    verdicts = {}
    for d in DENSITIES:
        own = {name: verdict(pair["both"]) for name, pair in pairs.items()}
        first, lost = own[f"LT-SFT {d:.0%} - full"], pairs[f"LT-SFT {d:.0%} - full"]["lost"]
        more = first == "held" and lost["low"] > 0
        verdicts[f"less interference than full, {d:.0%}"] = "in part" if more else first
        for other in METHODS[1:4]:
            verdicts[f"LT-SFT over {other}, {d:.0%}"] = own[f"LT-SFT {d:.0%} - {other} {d:.0%}"]
        first = own[f"sibling {d:.0%} - random {d:.0%}"]
        near = pairs[f"sibling {d:.0%} - LT-SFT {d:.0%}"]["both"]["low"]
        far = first == "held" and near <= ALLOWED
        verdicts[f"a sibling's mask transfers, {d:.0%}"] = "in part" if far else first
    return {"arms": arms, "differences": pairs, "verdicts": verdicts}


def told_afterwards(runs: Mapping[int, Mapping[str, Any]], found: Mapping[str, Any]) -> dict[str, Any]:
    """The arms at gentler rates, and their sums against full fine-tuning's."""
    rates, summary = gentle(found), {}
    for arm in rates:
        ours, full = ({s: run[name]["both"] for s, run in runs.items()} for name in (arm, "full"))
        values = {w: [float(getattr(r[arm][w], "mean", r[arm][w])) for r in runs.values()] for w in ("both", *PLAIN)}
        summary[arm] = {w: mean_interval(each) for w, each in values.items()}
        summary[arm] |= {"rates": rates[arm], "more": difference(ours, full)}
    return summary


def markdown(summary: Mapping[str, Any]) -> str:
    """Arms; differences; verdicts."""
    heads = ["arm", "task alone", "cipher alone", "rotate in cipher: the sum", "at a chosen scale", "cipher in the sum",
             "facts in the sum", "overlap", "by chance", "signs agree"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm, one in summary["arms"].items():
        cells = [arm, told(one["task alone"]), told(one["cipher alone"]), told(one["both"])]
        cells += [f"{told(one['both, scaled'])} at {one['scale']:g}", told(one["cipher in the sum"])]
        cells += [f"{one['facts in the sum']['mean']:.2f}", *(f"{one[w]['mean']:.2f}" for w in PLAIN[-3:])]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| difference | rotate in cipher | at chosen scales | loss of the cipher |", "|---|---|---|---|"]
    for name, pair in summary["differences"].items():
        lost = told(pair["lost"], sign="+") if "lost" in pair else ""
        lines.append(f"| {name} | {told(pair['both'], sign='+')} | {told(pair['scaled'], sign='+')} | {lost} |")
    lines += ["", "| claim | verdict |", "|---|---|", *(f"| {c} | {said} |" for c, said in summary["verdicts"].items())]
    heads = ["afterwards, at rates", "task alone", "cipher alone", "rotate in cipher: the sum", "less full's",
             "cipher in the sum", "facts in the sum"]  # fmt: skip
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm, one in summary["afterwards"].items():
        cells = [f"{arm}, {one['rates']['cipher']:g} and {one['rates']['task']:g}", told(one["task alone"])]
        cells += [told(one["cipher alone"]), told(one["both"]), told(one["more"], sign="+")]
        cells += [told(one["cipher in the sum"]), told(one["facts in the sum"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any], runs: Mapping[int, Mapping[str, Any]]) -> Figure:
    """The sum's answers by arm; what the cipher keeps; where deltas meet."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=[1.3, 1, 1])
    arms = summary["arms"]
    places = [i + 0.5 * (i > 0) + 0.5 * (i > len(METHODS)) for i in range(len(arms))]
    for y, (arm, one) in zip(places, arms.items(), strict=True):
        face = "0.55" if arm == "full" else "0.8" if arm.startswith("LT") else "white"
        left.barh(y, one["both"]["mean"], 0.75, color=face, edgecolor="black")
        if one["both"]["low"] is not None:
            left.hlines(y, *np.clip([one["both"]["low"], one["both"]["high"]], 0, 1), color="black", lw=1)
        left.plot([float(run[arm]["both"].mean) for run in runs.values()], [y] * len(runs), ".", color="0.3", ms=4)
        ends = [one["cipher in the sum"]["mean"], one["cipher alone"]["mean"]]
        middle.plot(ends, [y, y], "-", color="0.6", lw=1.5)
        middle.plot(ends[1], y, "o", color="white", mec="black", label=None if y else "alone")
        middle.plot(ends[0], y, "o", color="black", label=None if y else "in the sum")
        right.plot(one["overlap"]["mean"], y, "s", color="black", label=None if y else "common numbers")
        right.plot(one["chance"]["mean"], y, "|", color="black", ms=12, label=None if y else "common by chance")
        right.plot(one["agreement"]["mean"], y, "D", color="white", mec="black", label=None if y else "signs agree")
    left.set_yticks(places, list(arms))
    left.invert_yaxis()
    left.set(title="sum rotates in the cipher", xlabel="accuracy (dots: seeds)", xlim=(0, 1))
    middle.set(title="the cipher's own skills", xlabel="accuracy", xlim=(-0.04, 1.04))
    right.set(title="where the two deltas meet", xlabel="share", xlim=(-0.04, 1.04))
    for axis in (middle, right):
        axis.grid(axis="y", color="0.92")
        axis.legend(frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3,
                    columnspacing=0.8, handletextpad=0.2)  # fmt: skip
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def plain(runs: Mapping[int, Mapping[str, Any]]) -> dict[int, Any]:
    """Results as their means."""
    return {s: {arm: {k: float(v.mean) if isinstance(v, Result) else v for k, v in one.items()}
                for arm, one in run.items()} for s, run in runs.items()}  # fmt: skip


def check(report: Mapping[str, Any]) -> None:
    """A fast run: every arm, K numbers moved at most, and a random pair that meets by chance only."""
    arms = report["summary"]["arms"]
    assert set(arms) == set(ARMS)
    for arm, one in arms.items():
        most = ARMS[arm][1] * start()[2] + 1
        assert 0 < max(one["moved"]) <= most, (arm, one["moved"], most)
    assert abs(arms["random 5%"]["overlap"]["mean"] - arms["random 5%"]["chance"]["mean"]) < 0.02
    assert arms["LIFT 5%"]["overlap"]["mean"] > 0.8  # of one base: one mask, but for numbers that did not move


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15], help="of examples and order")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=1, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="a few steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    settings, seeds, workers = SETTINGS, options.seeds, options.workers
    if options.fast:
        settings = {**SETTINGS, "steps": dict.fromkeys(MIXES, 2), "rows": 4, "test": 8, "sweep": 3,
                    "scales": (0.8, 1.0), "rates": {"full": (1e-3,), "sparse": (1e-3,)}}  # fmt: skip
        seeds, workers = [0], 1
    (found,) = in_processes(sweep, [(1, settings)], 1)
    runs = dict(zip(seeds, in_processes(added, [(s, settings, found) for s in seeds], workers), strict=True))
    again = dict(zip(seeds, in_processes(afterwards, [(s, settings, found) for s in seeds], workers), strict=True))
    summary = {**summarised(runs, found), "afterwards": told_afterwards(again, found)}
    report = {"settings": settings, "seeds": seeds, "sweep": found, "summary": summary, "runs": plain(runs),
              "afterwards": plain(again)}  # fmt: skip
    path = write(options.out, "sparse_deltas", report, picture(summary, runs), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
