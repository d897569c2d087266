"""Advantages: exact zeros, unscored rows, the identities between them, and generalised advantages by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.training.advantages import ADVANTAGES, generalised, group_deviation, whitened

NAN = float("nan")
RELATIVE = [name for name in ADVANTAGES if name != "plain"]
rewards = st.lists(st.floats(-3, 3, allow_subnormal=False).map(lambda x: round(x, 3)), min_size=4, max_size=4)


def of(name, *values, group=4):
    return ADVANTAGES[name](torch.tensor(values, dtype=torch.float64), group)


def test_group_of_four_by_hand():
    mean, std = 0.25, 0.5
    assert of("group_normalised", 1, 0, 0, 0).tolist() == pytest.approx(
        [(1 - mean) / (std + 1e-4), *[-mean / (std + 1e-4)] * 3]
    )
    assert of("group_centred", 1, 0, 0, 0).tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert of("leave_one_out", 1, 0, 0, 0).tolist() == pytest.approx([1, *[-1 / 3] * 3])
    assert of("plain", 1, 0, 0, NAN).tolist() == [1, 0, 0, 0]
    batch = of("batch_normalised", 1, 0, 0, 1, group=2)
    assert batch.tolist() == pytest.approx([x / (math.sqrt(4 * 0.25 / 3) + 1e-4) for x in (0.5, -0.5, -0.5, 0.5)])


# convention 5: equal rewards give exactly 0, though their mean in floating point is not them
@pytest.mark.parametrize("name", RELATIVE)
@given(value=st.floats(-1e6, 1e6), group=st.integers(2, 9))
@settings(max_examples=50, deadline=None)
def test_equal_rewards_give_exactly_zero(name, value, group):
    assert torch.equal(of(name, *[value] * group, group=group), torch.zeros(group))
    assert float(group_deviation(torch.full((group,), value), group)) == 0.0


# convention 6: a row that nothing scored is not in its group's statistics and gets 0
@pytest.mark.parametrize("name", RELATIVE)
@given(values=rewards)
@settings(max_examples=50, deadline=None)
def test_unscored_rows_are_not_there(name, values):
    with_gap = of(name, values[0], NAN, *values[1:], NAN, group=6)
    assert with_gap[[1, 5]].tolist() == [0, 0]
    assert with_gap[[0, 2, 3, 4]].tolist() == pytest.approx(of(name, *values).tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_nothing_scored_is_zero_everywhere(name):
    assert torch.equal(of(name, *[NAN] * 4), torch.zeros(4))
    assert of(name, NAN, 1, NAN, NAN).isfinite().all()


@pytest.mark.parametrize("name", RELATIVE)
@given(values=rewards, shift=st.floats(-100, 100))
@settings(max_examples=50, deadline=None)
def test_a_shift_of_all_rewards_changes_nothing(name, values, shift):
    shifted = of(name, *(v + shift for v in values))
    assert shifted.tolist() == pytest.approx(of(name, *values).tolist(), abs=1e-4)


@given(values=rewards)
@settings(max_examples=50, deadline=None)
def test_leave_one_out_is_the_centred_one_times_g_over_g_minus_1(values):
    others = [values[i] - sum(values[:i] + values[i + 1 :]) / 3 for i in range(4)]
    assert of("leave_one_out", *values).tolist() == pytest.approx(others, abs=1e-6)
    torch.testing.assert_close(of("leave_one_out", *values), of("group_centred", *values) * 4 / 3)


@pytest.mark.parametrize("p", [1 / 8, 0.5, 7 / 8])
def test_mean_size_with_binary_rewards(p):
    """2 sqrt(p (1 - p)) when divided by the (population) deviation, 2 p (1 - p) without."""
    values = [1.0] * int(8 * p) + [0.0] * (8 - int(8 * p))
    assert float(of("group_centred", *values, group=8).abs().mean()) == pytest.approx(2 * p * (1 - p))
    population = math.sqrt(7 / 8)
    size = float(of("group_normalised", *values, group=8).abs().mean())
    assert size == pytest.approx(2 * math.sqrt(p * (1 - p)) * population, rel=1e-3)


@pytest.mark.parametrize("name", ADVANTAGES)
@given(
    values=st.lists(st.floats(-3, 3).map(lambda x: round(x, 3)), min_size=8, max_size=8), swap=st.permutations(range(4))
)
@settings(max_examples=30, deadline=None)
def test_order_of_groups_and_of_rows_in_them_changes_nothing(name, values, swap):
    order = [4 + i for i in swap] + list(swap)
    moved = of(name, *(values[i] for i in order))
    assert moved.tolist() == pytest.approx(of(name, *values)[order].tolist(), abs=1e-6)


# ---- over tokens


def by_definition(rewards, values, gamma, lam):
    """Sum over k of (gamma lambda)^k delta_{t+k} of one row."""
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@given(
    masks=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_generalised_advantages_are_their_definition_over_masked_tokens(masks, gamma, lam, seed):
    """Tokens without loss, at the end or in the middle, are as if they weren't there."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(masks), 6, generator=generator, dtype=torch.float64)
    mask = torch.tensor(masks).double()
    advantages, returns = generalised(rewards, values, mask, gamma=gamma, lam=lam)
    for i, there in enumerate(mask.bool()):
        expected = by_definition(rewards[i][there].tolist(), values[i][there].tolist(), gamma, lam)
        assert advantages[i][there].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[i][there].tolist() == pytest.approx((advantages + values)[i][there].tolist(), abs=1e-12)
        assert not advantages[i][~there].any() and not returns[i][~there].any()


def test_terminal_reward_without_discount_is_every_tokens_return():
    rewards, mask = torch.zeros(1, 4), torch.tensor([[1.0, 1, 1, 0]])
    rewards[0, 2] = 1.0
    advantages, returns = generalised(rewards, torch.tensor([[0.2, 0.5, 0.9, 7.0]]), mask, gamma=1.0, lam=1.0)
    assert returns[0].tolist() == pytest.approx([1, 1, 1, 0])
    assert advantages[0].tolist() == pytest.approx([0.8, 0.5, 0.1, 0])


def test_whitening_counts_masked_tokens_only():
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    values = torch.tensor([[1.0, 2, 50], [6, -70, 9]])
    found = whitened(values, mask)
    there = found[mask > 0]
    assert float(there.mean()) == pytest.approx(0, abs=1e-6) and float(there.std()) == pytest.approx(1, abs=1e-6)
    assert not found[mask == 0].any()
    assert torch.equal(whitened(torch.full((2, 3), 0.1), mask), torch.zeros(2, 3))
    assert whitened(values, torch.zeros(2, 3)).isfinite().all()
