"""Budgets: how many numbers, who competes for them, and the exact choice among scores that tie."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from surgery.errors import SurgeryError
from surgery.tuning import select
from surgery.tuning.selection import Budget, Selection, budget
from surgery.tuning.selection.budget import choose, top_places

torch.set_num_threads(1)


def plain(scores, k):
    """The k highest of several tensors by a stable sort: of equal scores the first in order."""
    everything = [(-float(v), n, i) for n, (_, t) in enumerate(scores) for i, v in enumerate(t.flatten().tolist())]
    best = sorted(everything)[:k]
    return {name: sorted(i for _, m, i in best if m == n) for n, (name, _) in enumerate(scores)}


def lists(places):
    return {name: found.tolist() for name, found in places.items()}


few_values = st.lists(st.integers(-2, 2), min_size=1, max_size=40).map(lambda v: torch.tensor(v, dtype=torch.float32))


@given(few_values, st.data())
@settings(max_examples=60, deadline=None)
def test_the_highest_are_taken_and_of_equal_ones_the_first(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    assert top_places(scores, k).tolist() == plain([("w", scores)], k)["w"]


@given(st.lists(few_values, min_size=1, max_size=6), st.data())
@settings(max_examples=100, deadline=None)
def test_a_global_choice_with_few_candidates_in_memory_is_the_choice_among_all(tensors, data):
    """Whatever the order in which the tensors come, and however many numbers tie."""
    scores = [(f"w{i}", t) for i, t in enumerate(tensors)]
    k = data.draw(st.integers(1, sum(t.numel() for t in tensors)))
    order = data.draw(st.permutations(scores))
    shapes = {name: tuple(t.shape) for name, t in scores}
    found = choose(iter(order), shapes, Budget(count=k, scope="global"))
    expected = {name: places for name, places in plain(scores, k).items() if places}
    assert lists(found) == expected and list(found) == list(expected)


def test_a_global_choice_equals_one_topk_and_holds_few_candidates(monkeypatch):
    g = torch.Generator().manual_seed(0)
    scores = {f"w{i}": torch.randn(30, 40, generator=g) for i in range(12)}
    held = []
    best = budget._best
    monkeypatch.setattr(budget, "_best", lambda kept, k: held.append(sum(len(p[0]) for p in kept)) or best(kept, k))
    found = choose(iter(scores.items()), dict.fromkeys(scores, (30, 40)), Budget(count=100, scope="global"))
    everything = torch.cat([t.flatten() for t in scores.values()])
    expected = everything.topk(100).indices.sort().values
    got = torch.cat([found[n].long() + 1200 * i for i, n in enumerate(scores) if n in found])
    assert torch.equal(got, expected) and max(held) <= 3 * 100
    constant = {n: torch.zeros(30, 40) for n in scores}  # everything ties
    held.clear()
    found = choose(iter(constant.items()), dict.fromkeys(scores, (30, 40)), Budget(count=100, scope="global"))
    assert lists(found) == {"w0": list(range(100))} and max(held) <= 3 * 100


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_counts_and_global_densities_are_met_exactly(sizes, data):
    shapes = {f"w{i}": shape for i, shape in enumerate(sizes)}
    total = sum(m * n for m, n in sizes)
    count = data.draw(st.integers(1, total))
    scope = data.draw(st.sampled_from(["tensor", "row", "global"]))
    shares = Budget(count=count, scope=scope).shares(shapes)
    assert sum(shares.values()) == count
    assert all(abs(shares[n] - count * m * k / total) < 1 for n, (m, k) in shapes.items())
    scores = [(n, torch.rand(shape)) for n, shape in shapes.items()]
    assert sum(map(len, choose(iter(scores), shapes, Budget(count=count, scope=scope)).values())) == count
    density = data.draw(st.floats(0.5 / total, 1))
    if math.floor(density * total + 0.5):
        assert sum(Budget(density, scope="global").shares(shapes).values()) == math.floor(density * total + 0.5)


def test_a_global_density_counts_all_numbers_not_each_tensor():
    """0.1 % of 50 tensors of 100 numbers is 5 numbers, though of every single tensor it would be none."""
    shapes = {f"w{i}": (10, 10) for i in range(50)}
    assert sum(Budget(0.001, scope="global").shares(shapes).values()) == 5
    with pytest.raises(SurgeryError, match="selects nothing of 5,000 numbers"):
        Budget(0.001).shares(shapes)


def test_a_loras_size_is_that_of_every_matrix_and_never_more_than_all():
    shapes = {"q": (8, 20), "small": (2, 3), "experts": (4, 8, 20)}
    assert Budget(lora_rank=2).shares(shapes) == {"q": 56, "small": 6, "experts": 4 * 56}


def test_rows_share_alike_and_the_first_get_what_is_left_over():
    scores = torch.tensor([[1.0, 5, 3], [2, 2, 2], [9, 8, 7]])
    found = choose(iter([("w", scores)]), {"w": (3, 3)}, Budget(count=5, scope="row"))
    assert found["w"].tolist() == [1, 2, 3, 4, 6]


def test_rows_of_a_weight_kept_the_other_way_round_are_its_columns():
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    for count in (8, 9):
        straight = choose(iter([("w", scores.T)]), {"w": (4, 6)}, Budget(count=count, scope="row"))["w"].long()
        turned = choose(iter([("w", scores)]), {"w": (6, 4)}, Budget(count=count, scope="row"), {"w"})["w"].long()
        expected = Selection({"w": straight}, {"w": (4, 6)}).masks()["w"].T
        assert torch.equal(Selection({"w": turned}, {"w": (6, 4)}).masks()["w"], expected)
        assert bool((turned[1:] > turned[:-1]).all())


def test_positions_are_of_32_bits_until_a_tensor_needs_more():
    from surgery.tuning.selection.places import narrow

    flat = torch.tensor([0, 2**31])
    assert narrow(flat[:1], 2**31 - 1).dtype == torch.int32
    assert narrow(flat, 2**31 + 1).dtype == torch.int64 and narrow(flat, 2**31 + 1).tolist() == [0, 2**31]


@pytest.mark.parametrize(
    "words, problem",
    [
        ({"density": 0}, "A density of 0 selects nothing or more than all"),
        ({"density": 5}, "A density of 5 selects nothing or more than all"),
        ({"density": -0.1}, "selects nothing or more than all"),
        ({"density": float("nan")}, "selects nothing or more than all"),
        ({"count": 0}, "A budget of count 0 can't be met"),
        ({"count": 2.5}, "A budget of count 2.5 can't be met"),
        ({"lora_rank": 0}, "A budget of lora_rank 0 can't be met"),
        ({"count": 10**9}, "more than the 400 that there are"),
        ({"density": 1e-9}, "selects nothing of"),
        ({"density": 1e-9, "scope": "global"}, "selects nothing of"),
        ({"density": 0.1, "count": 5}, "One budget is needed, and density and count are given"),
        ({"density": 0.1, "scope": "layer"}, "There is no scope 'layer'"),
        ({}, "needs a budget"),
    ],
)
def test_budgets_that_cannot_be_met_get_a_sentence(words, problem):
    with pytest.raises(SurgeryError, match=problem):
        select(Attention(), "magnitude", **words)


class Attention(nn.Module):
    """One projection with the name of one."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(20, 20, bias=False)})


def test_scores_that_are_not_numbers_are_refused():
    model = Attention()
    with torch.no_grad():
        model.attn["q_proj"].weight[0, 0] = float("nan")
    for method in ("magnitude", "snip"):
        more = {"batches": [torch.ones(20)], "loss": lambda x: model.attn["q_proj"](x).nan_to_num().sum()}
        with pytest.raises(SurgeryError, match="Scores of 'attn.q_proj.weight' are NaN"):
            select(model, method, density=0.5, scope="global", **(more if method == "snip" else {}))
    with pytest.raises(SurgeryError, match="'attn.q_proj.weight' holds numbers that are not finite"):
        select(model, "lift", density=0.5)
