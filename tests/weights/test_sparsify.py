"""Masks: exactly k, the same for every chunking, and honest about equal magnitudes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.weights import sparsify
from surgery.weights.sparsify import EVERYTHING, NOTHING, Selection, apply_selection, random_bits, select

# Small whole numbers: most magnitudes are equal to some other, as in bfloat16 checkpoints.
tied = st.lists(st.integers(-3, 3), min_size=1, max_size=40).map(lambda v: torch.tensor(v, dtype=torch.float32))
shares = st.floats(0, 1)
PINNED_16 = [60629, 63630, 36844, 40813, 62162, 5393]
PINNED_32 = [1282374847, 2929440857, 499018208]
PINNED_KEY = 2989728047800744224
TIES = ("index", "all", "none", "random")


def stable_ranks(d: Tensor) -> np.ndarray:
    """Flat indices from the largest to the smallest magnitude, the lowest index first among equals."""
    return np.argsort(-d.abs().reshape(-1).numpy(), kind="stable")


@given(tied, st.integers(0, 45))
def test_index_selection_is_a_stable_sort(d: Tensor, k: int) -> None:
    mask = apply_selection(d, select(d.abs(), k))
    expected = np.zeros(d.numel(), bool)
    expected[stable_ranks(d)[:k]] = True
    np.testing.assert_array_equal(mask.numpy(), expected)


@given(tied, st.integers(1, 39), st.integers(0, 2**64 - 1))
def test_tie_rules_nest_and_count(d: Tensor, k: int, key: int) -> None:
    masks = {t: apply_selection(d, select(d.abs(), k, t), t, key) for t in TIES}
    assert masks["index"].sum() == masks["random"].sum() == min(k, d.numel())
    for exact in ("index", "random"):
        assert (masks["none"] <= masks[exact]).all() and (masks[exact] <= masks["all"]).all()
    if k < d.numel():  # what separates "all" from "none" is one magnitude
        assert d[masks["all"] & ~masks["none"]].abs().unique().numel() == 1


def test_random_ties_spread_evenly_and_follow_the_key() -> None:
    d = torch.ones(1000)
    for quota in (1, 10, 333, 999):
        mask = apply_selection(d, Selection(1.0, quota), "random", key=12345)
        assert mask.sum() == quota
        share = mask.reshape(10, 100).sum(dim=1)
        assert share.max() - share.min() <= 1
    first, second = (apply_selection(d, Selection(1.0, 10), "random", key) for key in (1, 2))
    assert not torch.equal(first, second)
    with pytest.raises(SurgeryError, match="key"):
        sparsify.magnitude(d, 0.5, "random")


def test_select_extremes() -> None:
    d = torch.tensor([0.0, 0.0, 1.0])
    assert select(d, 0) == select(d, -3) == NOTHING
    assert select(d, 3) == select(d, 9, "none") == EVERYTHING
    assert apply_selection(d, EVERYTHING).all() and not apply_selection(d, NOTHING).any()
    assert select(d, 2) == Selection(0.0, 1)
    assert select(torch.empty(0), 0) == NOTHING
    for bad in (math.nan, math.inf):
        with pytest.raises(SurgeryError, match="1 of 2 differences"):
            select(torch.tensor([1.0, bad]), 1)


@given(st.lists(tied, min_size=1, max_size=4), shares, st.sampled_from(["index", "all", "none"]))
def test_model_selection_is_one_selection_over_all_tensors(deltas: list[Tensor], density: float, ties: str) -> None:
    shares = sparsify.select_model(deltas, density, ties)  # type: ignore[arg-type]
    each = torch.cat([apply_selection(d, s) for d, s in zip(deltas, shares, strict=True)])
    assert torch.equal(each, sparsify.magnitude(torch.cat(deltas), density, ties))  # type: ignore[arg-type]


def test_kept_truncates_but_keeps_one() -> None:
    assert sparsify.kept(0.29, 100) == 28  # 0.29 * 100 is 28.999...
    assert sparsify.kept(0.2, 3) == 1 and sparsify.kept(0.0, 3) == 0 and sparsify.kept(0.5, 0) == 0
    assert sparsify.kept(1, 7) == 7
    for bad in (-0.1, 1.5, math.nan):
        with pytest.raises(SurgeryError, match="'density'"):
            sparsify.kept(bad, 10)


@given(tied, shares, shares, st.integers(0, 2**64 - 1))
def test_band_is_a_slice_of_the_order(d: Tensor, density: float, top: float, key: int) -> None:
    n = d.numel()
    wanted, removed = int(density * n), int(top * n)
    start = max(0, n - wanted - removed)  # as mergekit counts: ranks from the smallest
    expected = np.zeros(n, bool)
    expected[stable_ranks(d)[::-1][start : start + wanted]] = True
    np.testing.assert_array_equal(sparsify.band(d, density, top).numpy(), expected)
    assert sparsify.band(d, density, top, ties="random", key=key).sum() == wanted


def test_band_by_bottom() -> None:
    d = torch.arange(1.0, 11.0)
    assert sparsify.band(d, top=0.2, bottom=0.3).tolist() == [False] * 3 + [True] * 5 + [False] * 2
    assert not sparsify.band(d, top=0.7, bottom=0.5).any()
    for name in ("top", "bottom"):
        with pytest.raises(SurgeryError, match=f"'{name}'"):
            sparsify.band(d, **{"top": 0.1, "bottom": 0.1, name: 1.2})


def authors_breadcrumbs(d: Tensor, kept: float, top: float) -> Tensor:
    """The rule of the authors' code in our words: per row drop the largest, then keep the largest of the rest."""
    mask = torch.zeros_like(d, dtype=torch.bool)
    for i, row in enumerate(d.reshape(-1, d.shape[-1])):
        order = row.abs().argsort(descending=True)
        dropped = int(top * len(row))
        mask.reshape(-1, d.shape[-1])[i, order[dropped : dropped + int(kept * len(row))]] = True
    return mask


@pytest.mark.parametrize("shape", [(7, 40), (40,), (2, 3, 40)], ids=str)
def test_band_by_rows_is_the_authors_rule(shape: tuple[int, ...]) -> None:
    d = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sparsify.band(d, 0.2, 0.1, scope="row"), authors_breadcrumbs(d, 0.2, 0.1))
    assert sparsify.band(d.sum(), 0.2, 0.1, scope="row").all()  # a scalar stays


@given(st.integers(0, 2**64 - 1), st.integers(0, 100), st.integers(0, 100), st.sampled_from([16, 32]))
def test_random_bits_do_not_depend_on_chunks(key: int, a: int, size: int, width: int) -> None:
    whole = random_bits(a + size, key, width=width)  # type: ignore[arg-type]
    np.testing.assert_array_equal(random_bits(size, key, a, width), whole[a:])  # type: ignore[arg-type]


def test_random_bits_are_pinned() -> None:
    """A recipe gives the same model for ever: these numbers must not change."""
    assert random_bits(6, key=2024).tolist() == PINNED_16
    assert random_bits(3, key=2024, offset=5, width=32).tolist() == PINNED_32
    words = random_bits(6, key=1234567, width=32).view("<u8").tolist()  # SplitMix64's well-known first outputs
    assert words == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert sparsify.derive_key(0, "dare_ties", "model-a", "lm_head.weight") == PINNED_KEY


def test_keys_differ_by_every_part() -> None:
    keys = {sparsify.derive_key(*parts) for parts in [(0, "a", "bc"), (0, "ab", "c"), (1, "a", "bc"), ("0", "a", "bc")]}
    assert len(keys) == 4 and all(0 <= k < 2**64 for k in keys)


@pytest.mark.parametrize("density", [0.001, 0.009, 0.1, 0.5, 0.97])
def test_bernoulli_keeps_its_share(density: float) -> None:
    n = 200_000
    mask = sparsify.bernoulli(density, (400, n // 400), key=7)
    spread = math.sqrt(density * (1 - density) / n)
    assert abs(mask.float().mean().item() - density) < 5 * spread
    by_column = mask.float().mean(dim=0)  # no pattern by place
    assert (by_column - density).abs().max() < 6 * math.sqrt(density * (1 - density) / 400) + 2 / 400
    parts = [sparsify.bernoulli(density, (m,), 7, offset) for offset, m in ((0, 777), (777, n - 777))]
    assert torch.equal(torch.cat(parts), mask.reshape(-1))


def test_bernoulli_extremes() -> None:
    assert sparsify.bernoulli(1.0, (50, 3), 1).all() and not sparsify.bernoulli(0.0, (50, 3), 1).any()
    assert sparsify.bernoulli(0.5, (), 1).shape == ()
    with pytest.raises(SurgeryError, match="'density'"):
        sparsify.bernoulli(1.01, (3,), 1)


def test_row_rank() -> None:
    d = torch.tensor([[3.0, -1.0, 2.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.7, 0.3, 0.5], [0.3, 0.5, 0.7]])
    torch.testing.assert_close(sparsify.row_rank(d, 0.5, 0.2), expected)
    assert torch.equal(sparsify.row_rank(torch.ones(4, 1), 0.25, 0.2), torch.full((4, 1), 0.25))  # not 0 / 0
    assert not sparsify.row_rank(d, 0.0, 0.2).any() and (sparsify.row_rank(d, 1.0, 0.2) == 1).all()
    for density, epsilon in ((0.1, 0.1), (0.9, 0.2), (0.5, -0.1)):
        with pytest.raises(SurgeryError, match="epsilon"):
            sparsify.row_rank(d, density, epsilon)


def test_variance_counts_only_what_varies() -> None:
    deltas = [torch.tensor([1.0, 5.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, -5.0, 2.0, 0.0, 0.0])]
    # Three elements vary; two thirds of them are the second and the last.
    assert sparsify.variance(deltas, 0.67).tolist() == [False, True, False, False, True]
    assert sparsify.variance(deltas, 1.0).all() and not sparsify.variance(deltas, 0.1).any()
