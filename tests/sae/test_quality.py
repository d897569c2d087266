"""Metrics of dictionaries: one pass whatever the batches, edge cases, and planted directions."""

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.sae.dictionary import Dictionary
from surgery.sae.metrics import Planted, max_cosines, measure, recovered
from surgery.sae.rules import TopK


def rows(n=300, d=10, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 50  # far from 0


def test_one_number_whatever_the_batches():
    dictionary, x = Dictionary(10, 40, TopK(k=4)), rows()
    with torch.no_grad():
        output = dictionary(x).double()
    expected = float((output - x).square().sum() / (x.double() - x.double().mean(0)).square().sum())
    for size in (300, 7, 1):
        found = measure(dictionary, x.split(size))
        assert found.rows == 300 and found.fvu == pytest.approx(expected, rel=1e-6)
        assert found.explained == pytest.approx(1 - expected, rel=1e-6)
        codes = dictionary.codes(x).dense() > 0
        assert found.l0 == pytest.approx(float(codes.sum(1).double().mean()))
        torch.testing.assert_close(found.density, codes.double().mean(0))
        assert found.dead == pytest.approx(float((~codes.any(0)).double().mean()))
        assert found.shrinkage == pytest.approx(float((output.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-6)
    assert set(found.to_dict()) == {"rows", "fvu", "l0", "cosine", "shrinkage", "dead"}


def test_a_mean_over_batches_would_be_another_number():
    dictionary, x = Dictionary(10, 40, TopK(k=4)), rows()
    batches = x.sort(0).values.split(30)  # batches that differ
    alone = torch.tensor([measure(dictionary, [b]).fvu for b in batches]).mean()
    assert abs(float(alone) - measure(dictionary, batches).fvu) > 1


def test_constant_activations():
    dictionary = Dictionary(4, 8, TopK(k=2))
    with torch.no_grad():
        dictionary.b_dec.fill_(3.0)
    assert measure(dictionary, [torch.full((5, 4), 3.0)]).fvu == 0
    assert measure(dictionary, [torch.full((5, 4), 4.0)]).fvu == 1
    with pytest.raises(SurgeryError, match="no activations"):
        measure(dictionary, [])


def test_rows_of_nothing_have_no_direction():
    dictionary, x = Dictionary(10, 40, TopK(k=4)), rows()
    with_nothing = measure(dictionary, [x, torch.zeros(100, 10)])
    assert with_nothing.shrinkage == pytest.approx(measure(dictionary, [x]).shrinkage) and with_nothing.rows == 400


def test_directions_that_are_found():
    planted = Planted(d=16, n=20)
    assert recovered(planted.directions, planted.directions.flip(0) * 3) == pytest.approx({"mmcs": 1, "recall": 1})
    assert recovered(planted.directions, -planted.directions)["recall"] == 0
    half = recovered(planted.directions, planted.directions[:10])
    assert half["recall"] == 0.5 and 0.5 < half["mmcs"] < 1
    assert max_cosines(planted.directions, planted.directions).shape == (20,)


def test_planted_rows_are_sums_of_their_directions():
    planted = Planted(noise=0.0)
    x, sizes = planted.rows(500, seed=1)
    torch.testing.assert_close(x, sizes @ planted.directions)
    assert float((sizes > 0).double().mean()) == pytest.approx(planted.rate, rel=0.1)
    on = sizes[sizes > 0]
    assert float(on.min()) >= 0.5 and float(on.max()) <= 1
    assert not torch.equal(x, planted.rows(500, seed=2)[0]) and torch.equal(x, planted.rows(500, seed=1)[0])


def test_batches_without_rows_count_for_nothing():
    dictionary, x = Dictionary(10, 40, TopK(k=4)), rows()
    assert measure(dictionary, [x[:0], x, x[:0]]).to_dict() == measure(dictionary, [x]).to_dict()
    with pytest.raises(SurgeryError, match="no activations"):
        measure(dictionary, [x[:0]])
