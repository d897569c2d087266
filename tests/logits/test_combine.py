"""The arithmetic of an ensemble against NumPy, and what infinities may do to it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.decoding.sampling import HEAD
from surgery.errors import SurgeryError
from surgery.logits.combine import FLOOR, Filter, combine, normalised, nucleus, plausible, top_k

INF = float("inf")


def random(*shape, seed=0, scale=3.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=4), st.integers(0, 2**16))
def test_scores_are_the_weighted_sum(weights, seed):
    parts = [random(2, 7, seed=seed + i) for i in range(len(weights))]
    expected = sum(w * p.double().numpy() for w, p in zip(weights, parts, strict=True))
    assert np.allclose(combine(parts, weights).numpy(), expected, atol=1e-4)


def test_log_probs_and_raw_logits_give_one_distribution():
    raw = [random(3, 9, seed=i) + 5 * i for i in range(3)]
    weights = [1.0, 0.7, -0.7]
    one, other = (normalised(combine(p, weights)) for p in (raw, [r.log_softmax(-1) for r in raw]))
    assert torch.allclose(one, other, atol=1e-5)


def test_each_place_sums_to_one():
    scores = normalised(combine([random(4, 11, seed=i) for i in range(3)], [1.0, 2.0, -2.0]))
    assert torch.allclose(scores.exp().sum(-1), torch.ones(4), atol=1e-6)


@pytest.mark.parametrize("weight", [1.0, -1.0, 0.0])
def test_infinities_of_a_member_never_become_nan(weight):
    base, other = random(2, 6), random(2, 6, seed=1)
    other[:, 2] = -INF
    scores = combine([base, other], [1.0, weight])
    assert torch.isfinite(scores).all()
    assert torch.allclose(scores[:, 2], base[:, 2] + weight * FLOOR)


def test_what_the_base_forbids_is_forbidden_whatever_others_say():
    base, other = random(2, 6), random(2, 6, seed=1)
    base[:, 1] = other[:, 1] = -INF
    scores = combine([base, other, other], [1.0, 1.0, -1.0])
    assert (scores[:, 1] == -INF).all() and torch.isfinite(scores[:, [0, 2, 3, 4, 5]]).all()
    assert not normalised(scores).isnan().any()


def test_tokens_that_a_member_lacks():
    base, other = random(2, 5), random(2, 5, seed=1)
    known = torch.tensor([True, True, False, True, True])
    masked = combine([base, other], [1.0, -1.0], 0, [None, known], "mask")
    alone = combine([base, other], [1.0, -1.0], 0, [None, known], "zero_reward")
    assert (masked[:, 2] == -INF).all() and torch.equal(alone[:, 2], base[:, 2])
    assert torch.equal(masked[:, known], alone[:, known])


def test_the_plausible_tokens_are_those_of_the_paper():
    values = random(50, 13)
    p = np.exp(values.numpy())
    expected = p >= 0.1 * p.max(-1, keepdims=True)
    assert (plausible(values, 0.1).numpy() == expected).all()
    assert plausible(values, 0).all() and (plausible(values, 1).sum(-1) == 1).all()


def test_the_base_has_no_floor():
    """Small weights and high temperatures make much of what a sharp base finds unlikely: it stays what it is."""
    base, other = torch.full((1, 1000), -100.0), random(1, 1000)
    base[0, 0], base[0, 1] = 0.0, -INF
    for weight in (0.1, 0.0, -0.1):
        scores = combine([base, other], [weight, 0.01])
        assert scores[0, 1] == -INF
        assert torch.allclose(scores[0, 2:], weight * base[0, 2:] + 0.01 * other[0, 2:], atol=1e-5)


def test_a_nucleus_is_the_smallest_set_that_holds_p():
    values = random(50, 13)
    for row, kept in zip(values.exp().numpy(), nucleus(values, 0.7).numpy(), strict=True):
        assert row[kept].sum() >= 0.7 - 1e-6 and row[kept].sum() - row[kept].min() < 0.7
        assert row[kept].min() >= row[~kept].max(initial=0)
    assert nucleus(values, 1.0).all()


@pytest.mark.parametrize("size", [5, HEAD, 3 * HEAD])
def test_a_nucleus_is_that_of_a_stable_sort(size):
    """With ties (as bfloat16 has them), flat rows beside peaked ones, and each row as it is alone."""
    values = torch.stack([(scale * random(size, seed=scale)).bfloat16().float() for scale in range(4)]).log_softmax(-1)
    for p in (0.01, 0.5, 0.9, 0.999):
        ordered, order = values.softmax(-1).sort(dim=-1, descending=True, stable=True)
        expected = torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, ordered.cumsum(-1) - ordered < p)
        assert torch.equal(nucleus(values, p), expected)
        assert torch.equal(torch.cat([nucleus(row[None], p) for row in values]), expected)


def test_top_k_keeps_k():
    assert (top_k(random(20, 13), 4).sum(-1) == 4).all() and top_k(random(2, 3), 9).all()


def test_a_filter_forbids_or_leaves_the_base_alone():
    base, scores = random(1, 6), random(1, 6, seed=3)
    out = ~plausible(base, 0.3)
    masked = Filter("plausible", 0.3).apply(scores, base, base)
    alone = Filter("plausible", 0.3, mode="zero_reward").apply(scores, base, base)
    assert (masked[out] == -INF).all() and torch.equal(alone[out], base[out])
    assert torch.equal(masked[~out], scores[~out]) and torch.equal(alone[~out], scores[~out])


@pytest.mark.parametrize("rule,value", [("plausible", -0.1), ("plausible", 1.1), ("nucleus", 0), ("top_k", 0),
                                        ("nucleus", math.nan), ("likely", 1)])  # fmt: skip
def test_a_filter_that_makes_no_sense_is_refused(rule, value):
    with pytest.raises(SurgeryError):
        Filter(rule, value)


def test_the_mode_of_a_filter_is_one_of_two():
    with pytest.raises(SurgeryError, match="zero_reward"):
        Filter("nucleus", 0.9, mode="drop")
