"""The same tensors to mergekit (and PEFT, for its form of TIES) and to us, live; needs the extra `peers`."""

from __future__ import annotations

import pytest
import torch
from make_golden import CASES, SHAPES, chosen, family, mergekit
from torch import Tensor

from surgery.weights import sparsify
from surgery.weights.methods import METHODS

pytest.importorskip("mergekit")
pytestmark = pytest.mark.peers


@pytest.mark.parametrize("shape", [*SHAPES.values(), (3, 5, 7), (40, 64)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_mergekit(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    if len(shape) == 3 and case.ours.startswith("della"):
        pytest.skip("mergekit ranks along dimension 1, we along the last")
    tuned, base = chosen(case, *family(shape, seed=2))
    expected, masks = mergekit(case, tuned, base)

    def drawn(probability: Tensor | float, shape: object, key: int, offset: int = 0) -> Tensor:
        return masks[key]

    monkeypatch.setattr(sparsify, "bernoulli", drawn)
    ours = METHODS[case.ours]
    keys = {"keys": list(range(len(tuned)))} if ours.random else {}
    merged = ours.function(tuned, base, **case.params, **keys)
    assert (merged - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("shape", [(6, 9), (11,)], ids=str)
def test_della_draws_with_our_keep_probabilities(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    (tuned, *_), base = family(shape, seed=3)
    asked = []
    draw = torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda p: asked.append(p) or draw(p))
    mergekit(CASES["della"]._replace(their_params={"weight": 1.0, "density": 0.4, "epsilon": 0.2}), [tuned], base)
    torch.testing.assert_close(asked[0].reshape(shape), sparsify.row_rank(tuned - base, 0.4, 0.2))


@pytest.mark.parametrize("election", ["total", "frequency"])
def test_equals_peft_ties(election: str) -> None:
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    tuned, base = family((30, 20), seed=4)
    weight = [0.5, 1.2, 0.8]
    deltas = [f - base for f in tuned]
    expected = merge_utils.ties(deltas, torch.tensor(weight), density=0.3, majority_sign_method=election)
    params = {"weight": weight, "density": 0.3, "normalize": "count"}
    params["election"] = "unweighted" if election == "total" else "frequency"
    merged = METHODS["ties"].function(tuned, base, **params) - base
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
