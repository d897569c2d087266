"""SaRA: small numbers under one threshold; those that have grown stop, and nobody joins later."""

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.models import load
from surgery.tuning import Selection, SparseAdamW, select
from surgery.tuning.selection import Round

torch.set_num_threads(1)


@pytest.fixture
def model():
    return load("tiny-base")[0]


def ids(seed=0):
    return torch.randint(3, 40, (4, 16), generator=torch.Generator().manual_seed(seed))


def train(model, chosen, steps=5, lr=1e-2):
    optimizer = SparseAdamW(model, chosen, lr=lr)
    for step in range(steps):
        model(ids(step), labels=ids(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.release()


def test_the_threshold_is_one_for_all_tensors(model):
    chosen = select(model, "sara", threshold=2e-2)
    for name, mask in chosen.masks().items():
        assert torch.equal(mask, model.get_parameter(name).detach().abs() < 2e-2)
    assert len(chosen.places) == 28 and 0 < chosen.density < 1


def test_a_budget_finds_the_threshold(model):
    chosen = select(model, "sara", density=0.1)
    weights = torch.cat([model.get_parameter(n).detach().abs().flatten() for n in chosen.places])
    assert chosen.total == 442_368 and chosen.count == 44_237
    assert chosen.notes["threshold"] == pytest.approx(float(weights.kthvalue(44_237).values), rel=1e-5)
    again = select(model, "sara", threshold=chosen.notes["threshold"])  # with those that tie with the largest
    assert again.overlap(chosen) == 1 and again.count == int((weights <= weights.kthvalue(44_237).values).sum())


def test_before_the_first_step_and_after_a_new_selection_the_model_is_what_it_was(model):
    """The released optimizer scatters |P| for P: its first forward pass sees small weights with their signs lost."""
    with torch.no_grad():
        before = model(ids()).logits
    optimizer = SparseAdamW(model, select(model, "sara", threshold=0.05))
    assert torch.equal(model(ids()).logits, before)
    optimizer.reselect(select(model, "sara", threshold=0.03), keep=False)
    assert torch.equal(model(ids()).logits, before)


@pytest.mark.parametrize("words", [{"threshold": 2e-2}, {"density": 0.1}])
def test_the_next_selection_is_those_of_the_first_that_are_still_small(model, words):
    """The released memory-saving variant draws from all small numbers instead of the intersection."""
    first = select(model, "sara", **words)
    train(model, first)
    with torch.no_grad():  # someone outside the first selection becomes small
        name = next(n for n in first if not first.masks()[n].flatten()[0])
        model.get_parameter(name).view(-1)[0] = 0
    second = select(model, "sara", turn=Round(1, first), **words)
    limit = words.get("threshold") or first.notes["threshold"]
    for name, mask in first.masks().items():
        now = second.masks().get(name, torch.zeros_like(mask))
        assert torch.equal(now, mask & (model.get_parameter(name).detach().abs() < limit))
    assert 0 < second.count < first.count and second.overlap(first) == 1
    third = select(model, "sara", turn=Round(2, second), **words)
    assert third.count == second.count


def test_what_does_not_fit_gets_a_sentence(model):
    for words in ({}, {"threshold": 1e-3, "density": 0.1}, {"threshold": 0.0}, {"threshold": -1.0}):
        with pytest.raises(SurgeryError, match="either a threshold above 0 or a budget"):
            select(model, "sara", **words)
    with pytest.raises(SurgeryError, match="'sara' chose nothing"):
        select(model, "sara", threshold=1e-12)
    other = Selection({"model.layers.0.mlp.up_proj.weight": None}, {"model.layers.0.mlp.up_proj.weight": (256, 96)})
    with pytest.raises(SurgeryError, match=r"before \(''\) knows no threshold"):
        select(model, "sara", density=0.1, turn=Round(1, other))
