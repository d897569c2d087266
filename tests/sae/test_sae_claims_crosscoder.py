"""Inside the claims about a crosscoder's artefacts."""

import pytest
import torch

EXPERIMENT = "crosscoder_artefacts"


def test_the_pair_is_what_it_says(experiment):
    pair = experiment.Pair(2)
    base, tuned = pair.directions()
    kinds = pair.kinds
    lengths, cosines = base.norm(dim=1), torch.cosine_similarity(base, tuned, dim=1)
    for i, kind in enumerate(kinds):
        assert float(tuned[i].norm()) == pytest.approx(0 if kind == "base only" else 1, abs=1e-5)
        if kind == "tuned only":
            assert lengths[i] == 0
        elif kind == "faint":
            assert 0.25 <= lengths[i] <= 0.4 and cosines[i] == pytest.approx(1, abs=1e-5)
        elif kind != "base only":
            expected = {"shared": 1.0, "turned": 0.6, "moved": 0.0}[kind]
            assert lengths[i] == pytest.approx(1, abs=1e-5) and cosines[i] == pytest.approx(expected, abs=1e-5)
    x, sizes = pair.rows(4000, 1)
    left = x - torch.cat([sizes @ base, sizes @ tuned], 1)
    assert float(left.std()) == pytest.approx(experiment.NOISE, rel=0.02)
    assert float((sizes > 0).double().mean()) == pytest.approx(experiment.RATE, rel=0.05)
    same = experiment.Pair(2, tuned=False).rows(4000, 1)[0]
    assert float((same[:, : experiment.D] - same[:, experiment.D :]).std()) == pytest.approx(
        2**0.5 * experiment.NOISE, rel=0.02
    )


def exact(experiment, pair):
    """A crosscoder whose latents are the features, but for one faint feature that it has shrunk."""
    base, tuned = pair.directions()
    made = experiment.Dictionary(2 * experiment.D, len(pair.kinds), experiment.Standard(l1=0.0), models=2)
    with torch.no_grad():
        made.decoder.copy_(torch.cat([base, tuned], 1))
        faint = pair.kinds.index("faint")
        made.decoder[faint, : experiment.D] = 0  # shrunk
        made.encoder.copy_(torch.linalg.pinv(torch.cat([base, tuned], 1).double()).T.float())
        made.bias.fill_(-0.3)
    return made


def test_scores_of_a_crosscoder_that_is_known(experiment, monkeypatch):
    monkeypatch.setattr(experiment, "NOISE", 0.0)
    pair = experiment.Pair(4)
    made = exact(experiment, pair)
    x, sizes = pair.test()
    found = experiment.owners(made.codes(x).dense(), sizes)
    assert float((found == torch.arange(len(sizes[0]))).double().mean()) > 0.9
    told = experiment.scored(made, pair)
    kinds = told["norm"]["kinds"]
    assert kinds["tuned only"] == 8 and kinds["faint"] == 1 and kinds["shared"] == kinds["base only"] == 0
    assert told["norm"]["recall"] == kinds["tuned only"] / 8
    assert told["norm"]["artefacts"] == told["norm"]["latents"] - kinds["tuned only"]
    shrunk = [one for one in told["latents"] if one[0] == "faint"]
    assert shrunk[0][2] > 0.2, "what the base has is left, and latent scaling sees it"
    assert told["scaling"]["kinds"]["faint"] == 0 and told["auroc"]["error"] > 0.8


def test_owners_and_auroc(experiment):
    sizes = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 0]])
    codes = torch.tensor([[0.0, 5, 1], [0, 9, 1], [3, 0, 1], [0, 0, 1]])
    assert experiment.owners(codes, sizes).tolist() == [1, 0, -1]
    assert experiment.auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == pytest.approx(0.875)
    assert experiment.auroc(torch.tensor([]), torch.tensor([1.0])) is None


def arm(recall=(0.95, 0.8), precision=(0.95, 0.8), auroc=(0.95, 0.8), n=5):
    return {"scaling": {"recall": dict(zip(("mean", "low"), recall, strict=True)),
                        "precision": dict(zip(("mean", "low"), precision, strict=True))},
            "auroc": {"both": {"mean": auroc[0], "low": auroc[1], "n": n}}}  # fmt: skip


@pytest.mark.parametrize("one, fewer, told", [
    (arm(), (1.0, 2.0), ("held", "held", "held")),
    (arm(recall=(0.7, 0.6)), (-0.1, 2.0), ("in part", "held", "no clear difference")),
    (arm(recall=(0.7, 0.6), precision=(0.9, 0.4)), (-2.0, -1.0), ("did not hold", "held", "the other way round")),
    (arm(auroc=(0.8, 0.6)), (None, None), ("held", "in part", "no clear difference")),
    (arm(auroc=(0.8, 0.4)), (1.0, 2.0), ("held", "did not hold", "held")),
    (arm(n=2), (1.0, 2.0), ("held", "no artefacts to tell", "held")),
])  # fmt: skip
def test_verdicts_follow_the_rule(experiment, one, fewer, told):
    found = experiment.verdicts({"L1": one}, {"low": fewer[0], "high": fewer[1]})
    assert tuple(found.values()) == told
