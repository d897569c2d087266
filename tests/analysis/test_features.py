"""Latents of a pair: whose they are, and the artefacts that scaling tells from it."""

import pytest
import torch

from analysis.features import KINDS, latent_scaling, relative_norms
from surgery.errors import SurgeryError
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import Standard

D = 6


def crosscoder(base, tuned):
    """Latent j reads direction j of the tuned model, and writes `base[j]` and `tuned[j]` times it into each."""
    n = len(base)
    found = Dictionary(2 * D, n, Standard(), models=2)
    with torch.no_grad():
        directions = torch.eye(D)[:n]
        found.encoder.copy_(torch.cat([torch.zeros(n, D), directions], 1))
        found.decoder.copy_(
            torch.cat([torch.tensor(base)[:, None] * directions, torch.tensor(tuned)[:, None] * directions], 1)
        )
    return found


def activations(base, n=500):
    """Base activations `base[j]` times the tuned ones in direction j."""
    sizes = torch.rand(n, len(base), generator=torch.Generator().manual_seed(0))
    sizes = sizes * (torch.rand(n, len(base), generator=torch.Generator().manual_seed(1)) < 0.4)
    tuned = sizes @ torch.eye(D)[: len(base)]
    return torch.cat([tuned * torch.tensor([*base, *[0.0] * (D - len(base))]), tuned], 1)


def test_relative_norms():
    found = relative_norms(crosscoder([1.0, 1.0, 0.0, 0.5], [0.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 1.0, 0.75]))


def test_scaling_is_the_least_squares_factor():
    dictionary, x = crosscoder([0.3, 0.0, 0.7], [1.0, 1.0, 0.5]), activations([0.3, 0.9, 0.4])
    found = latent_scaling(dictionary, x.split(70))
    f = dictionary.codes(x).dense().double()
    made = dictionary(x).detach().double()
    for j in range(3):
        d = dictionary.decoder[j, D:].detach().double()
        at = (f[:, j] > 0).nonzero().view(-1)
        design = (f[at, j, None] * d).reshape(-1, 1)

        def beta(y):
            return float(torch.linalg.lstsq(design, y[at].reshape(-1, 1).detach()).solution)  # noqa: B023

        left = x.double() - made
        own = f[:, j, None] * d
        assert float(found.error[j]) == pytest.approx(beta(left[:, :D]) / beta(left[:, D:] + own), abs=1e-6)
        assert float(found.reconstruction[j]) == pytest.approx(beta(made[:, :D]) / beta(made[:, D:]), abs=1e-6)
        assert int(found.rows[j]) == len(at)


def test_artefacts_are_told_from_what_is_new():
    """Three latents whose norms all say tuned only: one truly is; one the base has too, and the penalty shrank it away;
    one the base has by another latent."""
    base = [0.0, 1.0, 1.0]
    dictionary = crosscoder([0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0])
    with torch.no_grad():
        dictionary.encoder[3] = 0
        dictionary.encoder[3, 2] = 1.0  # the base's direction 2 has a latent of its own
        dictionary.decoder[3] = 0
        dictionary.decoder[3, 2] = 1.0
    found = latent_scaling(dictionary, [activations(base)])
    assert found.norm[:3].tolist() == [1, 1, 1] and float(found.norm[3]) == 0
    torch.testing.assert_close(found.error[:3], torch.tensor([0.0, 1, 0], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        found.reconstruction[:3], torch.tensor([0.0, 0, 1], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert found.tuned_only().tolist() == [0]
    table = found.to_dataframe()
    assert table["kind"].tolist() == ["tuned only"] * 3 + ["base only"] and set(table["kind"]) <= set(KINDS)
    assert len(found.plot().axes) == 2


def test_a_latent_that_is_never_used_has_no_factor():
    dictionary = crosscoder([1.0, 1.0], [1.0, 1.0])
    with torch.no_grad():
        dictionary.bias[1] = -10
    found = latent_scaling(dictionary, [activations([1.0, 1.0])])
    assert int(found.rows[1]) == 0 and bool(found.error[1].isnan()) and bool(found.reconstruction[1].isnan())


def test_what_is_no_pair_is_refused():
    with pytest.raises(SurgeryError, match="crosscoder of two models"):
        latent_scaling(Dictionary(4, 8, Standard()), [])
    with pytest.raises(SurgeryError, match="No latent is used"):
        latent_scaling(crosscoder([1.0], [1.0]), [])
