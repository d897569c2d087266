"""What sampling and search buy for what they cost: accuracy over compute, for votes, best of n and trees.

    curves = sample_curves(rollouts, correct, answers, [1, 2, 4, 8, 16], parameters=447_552)
    curves["REBASE"] = tree_curve({8: eight, 16: sixteen}, right_of, parameters=3 * 447_552)
    at_compute(curves, [1e7, 1e8]), figure(curves)

Compute is tokens times parameters: of every token that a model reads or draws, the parameters of that model; twice that
are its floating-point operations, attention apart. A prompt is read once, whatever is drawn behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from analysis.passk import majority_at_k, pass_at_k
from analysis.results import Result
from analysis.style import COLOURS, DASHES, MARKERS, bare, blank, legend_below
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from surgery.decoding import Rollout
    from surgery.logits.search import Tree

SUBSETS = 200
"""Subsets of the samples that a weighted vote is averaged over, where there are more."""


class Curve(NamedTuple):
    """How often one way is right, and what it takes: both (example, k), k the samples or the width of a tree."""

    right: Result
    compute: Result
    """Tokens times parameters."""


def sample_curves(
    rollouts: Sequence[Sequence[Rollout]],
    correct: Result,
    answers: Sequence[Sequence[Hashable | None]],
    ks: Sequence[int],
    *,
    parameters: int,
    weights: Sequence[Sequence[float]] | None = None,
    scores: Sequence[Sequence[float]] | None = None,
    scoring: int = 0,
    seed: int = 0,
) -> dict[str, Curve]:
    """pass@k, majority, and where they are given the vote by `weights` and the best by `scores`, of k samples.

    `correct` (example, sample) and `answers` are of the `rollouts`, n a prompt. Accuracies are expectations over all
    k-subsets (of the weighted vote over `SUBSETS` of them at least). `scoring` are the parameters of what scores: it
    reads every token too. Raises `SurgeryError` when shapes differ or a k is not in 1..n.
    """
    found = {"pass@k": pass_at_k(correct, ks), "majority": majority_at_k(correct, answers, ks)}
    if [len(group) for group in rollouts] != [correct.values.shape[1]] * len(correct):
        raise SurgeryError(f"Rollouts are needed for {len(correct)} prompts of {correct.values.shape[1]} samples each.")
    if weights is not None:
        found["weighted vote"] = weighted_at_k(correct, answers, weights, ks, seed=seed)
    if scores is not None:
        found["best of k"] = best_at_k(correct, scores, ks)
    prompt = np.array([len(group[0].prompt_ids) for group in rollouts])
    drawn = np.array([np.mean([len(one.completion_ids) for one in group]) for group in rollouts])
    tokens = prompt[:, None] + drawn[:, None] * np.asarray(ks)
    scored = {"weighted vote", "best of k"}
    return {
        name: Curve(right, _compute(right, tokens * (parameters + (scoring if name in scored else 0))))
        for name, right in found.items()
    }


def tree_curve(
    trees: Mapping[int, Sequence[Tree]],
    right: Callable[[int, Tree], bool],
    *,
    parameters: int,
    labels: Sequence[Any] | None = None,
) -> Curve:
    """REBASE's: `trees` are one a prompt by width, `right(example, tree)` says whether what the tree chooses is right.

    `parameters` are those of all models that read along.
    """
    ks = list(trees)
    counts = {len(each) for each in trees.values()}
    if len(counts) != 1:
        raise SurgeryError("Trees of every width are needed for the same prompts.")
    (n,) = counts
    values = np.array([[float(right(i, trees[k][i])) for k in ks] for i in range(n)])
    tokens = np.array([[len(trees[k][i].solutions[0].prompt_ids) + trees[k][i].tokens for k in ks] for i in range(n)])
    result = Result(values, {"example": list(range(n)) if labels is None else list(labels), "k": ks}, "REBASE")
    return Curve(result, _compute(result, tokens * float(parameters)))


def _compute(right: Result, values: np.ndarray) -> Result:
    return Result(values, right.axes, "tokens x parameters", right.columns)


def weighted_at_k(
    correct: Result,
    answers: Sequence[Sequence[Hashable | None]],
    weights: Sequence[Sequence[float]],
    ks: Sequence[int],
    *,
    seed: int = 0,
) -> Result:
    """Chance that the answer with the largest sum of weights among k samples is right (example, k).

    Exact where there are at most `SUBSETS` subsets, else the mean over as many drawn ones. Answers with equal sums
    share the vote.
    """
    n = correct.values.shape[1]
    _check(correct, weights, ks, "weights")
    rng = np.random.default_rng(seed)
    values = np.empty((len(correct), len(ks)))
    for column, k in enumerate(ks):
        if comb(n, k) <= SUBSETS:
            subsets = [np.array(subset) for subset in combinations(range(n), k)]
        else:
            subsets = [rng.permutation(n)[:k] for _ in range(SUBSETS)]
        for i, (said, heavy) in enumerate(zip(answers, weights, strict=True)):
            values[i, column] = np.mean([_vote(said, heavy, correct.values[i], subset) for subset in subsets])
    return Result(values, {**_first(correct), "k": list(ks)}, "weighted vote", correct.columns, correct.meta)


def _vote(said: Sequence[Hashable | None], weights: Sequence[float], right: np.ndarray, subset: np.ndarray) -> float:
    """Share of the winners that are right."""
    sums: dict[Hashable, float] = {}
    good: dict[Hashable, float] = {}
    for s in subset:
        if (answer := said[s]) is not None:
            sums[answer] = sums.get(answer, 0.0) + weights[s]
            good[answer] = right[s]
    if not sums:
        return 0.0
    top = max(sums.values())
    winners = [answer for answer, weight in sums.items() if np.isclose(weight, top, rtol=1e-12, atol=0)]
    return float(np.mean([good[answer] for answer in winners]))


def best_at_k(correct: Result, scores: Sequence[Sequence[float]], ks: Sequence[int]) -> Result:
    """Chance that the sample with the largest score among k is right (example, k), exactly; equal scores share it."""
    _check(correct, scores, ks, "scores")
    n = correct.values.shape[1]
    values = np.zeros((len(correct), len(ks)))
    for i, (right, given) in enumerate(zip(correct.values, scores, strict=True)):
        levels, counts = np.unique(np.asarray(given, dtype=float), return_counts=True)
        below = np.concatenate([[0], np.cumsum(counts)])
        means = [right[np.asarray(given) == level].mean() for level in levels]
        for column, k in enumerate(ks):
            ways = [comb(int(below[j + 1]), k) - comb(int(below[j]), k) for j in range(len(levels))]
            values[i, column] = sum(w / comb(n, k) * m for w, m in zip(ways, means, strict=True))
    return Result(values, {**_first(correct), "k": list(ks)}, "best of k", correct.columns, correct.meta)


def _check(correct: Result, given: Sequence[Sequence[float]], ks: Sequence[int], name: str) -> None:
    n = correct.values.shape[1]
    if [len(row) for row in given] != [n] * len(correct) or not np.isfinite(np.asarray(given, dtype=float)).all():
        raise SurgeryError(f"Finite {name} are needed for {len(correct)} prompts of {n} samples each.")
    if wrong := [k for k in ks if not 1 <= k <= n]:
        raise SurgeryError(f"k = {wrong[0]} needs that many samples a prompt: there are {n}.")


def _first(correct: Result) -> dict[str, Any]:
    return {next(iter(correct.axes)): correct.labels}


def at_compute(curves: Mapping[str, Curve], budgets: Sequence[float]) -> dict[str, Result]:
    """What each curve reaches at equal mean compute: (example, budget), between two k linear in log compute.

    NaN where a budget is less than the curve's least compute, or more than its largest: nothing is extrapolated.
    """
    found = {}
    for name, (right, compute) in curves.items():
        spent = np.log(compute.mean)
        order = np.argsort(spent)
        places = np.log(np.asarray(budgets, dtype=float))
        values = np.array([np.interp(places, spent[order], row[order], np.nan, np.nan) for row in right.values])
        axes = {next(iter(right.axes)): right.labels, "compute": list(budgets)}
        found[name] = Result(values, axes, name, right.columns)
    return found


def figure(curves: Mapping[str, Curve], *, title: str = "", floor: float | None = None) -> Figure:
    """Accuracy (with 95 % intervals over examples) over compute, a line for each way and a point for each k.

    `floor` draws a line, say greedy decoding.
    """
    drawn, axis = blank(6.8, 4.2, title)
    for i, (name, (right, compute)) in enumerate(curves.items()):
        low, high = right.interval()
        x, y = compute.mean, right.mean
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}
        style |= {"color": COLOURS[i % len(COLOURS)], "markersize": 5, "linewidth": 1.3, "capsize": 2.5}
        style |= {"markerfacecolor": "white"} if i % 2 else {}
        ks = right.axes["k"]
        label = f"{name}, k = {ks[0]}" + (f" to {ks[-1]}" if len(ks) > 1 else "")
        axis.errorbar(x, y, np.clip([y - low, high - y], 0, None), elinewidth=0.7, label=label, **style)
    if floor is not None:
        axis.axhline(floor, color="0.35", linewidth=0.9, linestyle=(0, (1, 2)))
    axis.set_xscale("log")
    axis.set(xlabel="compute: tokens x parameters", ylabel="accuracy")
    bare(axis)
    legend_below(drawn)
    return drawn
