"""What several samples of each prompt are worth: pass@k and maj@k, both in expectation over all k-subsets of n samples.

| estimate | of a prompt with n samples | paper |
|---|---|---|
| pass@k | the chance that k samples hold a right one: 1 - C(n-c, k) / C(n, k) with c right ones | arXiv:2107.03374 |
| maj@k | the chance that the answer which most of k samples give is right | arXiv:2203.11171 |

Both are exact: nothing is drawn, so equal samples give equal numbers. Values stay per prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction
from math import comb

import numpy as np

from analysis.results import Result
from surgery.errors import SurgeryError


def pass_at_k(correct: Result, ks: Sequence[int]) -> Result:
    """pass@k of each prompt (examples, k), from right (1) and wrong (0) samples (examples, sample).

    Chen et al. 2021, arXiv:2107.03374, equation 1, as the product of 1 - k/i over i = n-c+1..n, which does not
    overflow. Raises `SurgeryError` when a k is not in 1..n, or values are not 0 and 1.
    """
    n = _samples(correct, ks)
    right = correct.values.sum(axis=1)
    drawn = np.arange(1, n + 1)
    values = np.empty((len(correct), len(ks)))
    for column, k in enumerate(ks):
        factors = np.where(drawn > (n - right)[:, None], np.clip(1 - k / drawn, 0, None), 1.0)
        values[:, column] = 1 - factors.prod(axis=1)
    return _over_k(correct, values, ks, "pass@k")


def majority_at_k(correct: Result, answers: Sequence[Sequence[Hashable | None]], ks: Sequence[int]) -> Result:
    """maj@k of each prompt (examples, k): is the most frequent of k answers right?

    Wang et al. 2022, arXiv:2203.11171. `answers[i][s]` is what sample s of prompt i says; a sample without an answer
    (None) does not vote. Among answers with equally many votes the first seen wins: over all orders of the samples
    each of them is first equally often. Raises `SurgeryError` when shapes differ or a k is not in 1..n.
    """
    n = _samples(correct, ks)
    if [len(row) for row in answers] != [n] * len(correct):
        raise SurgeryError(f"Answers are needed for {len(correct)} prompts of {n} samples each.")
    values = [[_majority(said, right, k) for k in ks] for said, right in zip(answers, correct.values, strict=True)]
    return _over_k(correct, np.array(values), ks, "maj@k")


def _majority(said: Sequence[Hashable | None], right: np.ndarray, k: int) -> float:
    """Share of the k-subsets in which a right answer wins, counted by how often each answer is in the subset."""
    votes = Counter(answer for answer in said if answer is not None)
    good = {answer for answer, is_right in zip(said, right, strict=True) if is_right and answer is not None}
    silent, total = len(said) - votes.total(), Fraction(0)
    for winner in good:
        others = [count for answer, count in votes.items() if answer != winner]
        for most in range(1, min(votes[winner], k) + 1):
            # ways[t, s]: choices of s samples that are not the winner's, in which t answers draw level and none leads.
            ways = np.zeros((k // most, k - most + 1), dtype=object)  # whole numbers of any size
            ways[0, : silent + 1] = [comb(silent, s) for s in range(min(silent, k - most) + 1)]
            for count in others:
                ways = _with_answer(ways, count, most)
            total += comb(votes[winner], most) * sum(Fraction(w, level + 1) for level, w in enumerate(ways[:, -1]))
    return float(total / comb(len(said), k))


def _with_answer(ways: np.ndarray, count: int, most: int) -> np.ndarray:
    """`ways` after one more answer, given by `count` samples, of which at most `most` are chosen."""
    size = ways.shape[1]
    out = np.zeros_like(ways)
    for chosen in range(min(count, most, size - 1) + 1):
        moved = comb(count, chosen) * ways[:, : size - chosen]
        if chosen < most:
            out[:, chosen:] += moved
        else:
            out[1:, chosen:] += moved[:-1]
    return out


def _samples(correct: Result, ks: Sequence[int]) -> int:
    """How many samples a prompt has."""
    if correct.values.ndim != 2:
        raise SurgeryError(f"Result '{correct.name}' has one value a prompt: several samples of each are needed.")
    if not correct.binary:
        raise SurgeryError(f"Result '{correct.name}' has values other than 0 and 1: right or wrong is needed.")
    n = correct.values.shape[1]
    if wrong := [k for k in ks if not 1 <= k <= n]:
        raise SurgeryError(f"k = {wrong[0]} needs that many samples a prompt: there are {n}.",
                           hint=f"Draw more samples, or choose k from 1 to {n}.")  # fmt: skip
    return n


def _over_k(correct: Result, values: np.ndarray, ks: Sequence[int], name: str) -> Result:
    first = next(iter(correct.axes))
    return Result(values, {first: correct.labels, "k": list(ks)}, name, correct.columns, correct.meta)
