"""Inside the claims about sparse tuning under GRPO."""

import copy

import pytest
import torch

EXPERIMENT = "sparse_grpo"


def test_a_number_that_moved_outside_its_mask_is_seen(experiment):
    chosen = experiment.tuning("random 1%", 0)
    model = copy.deepcopy(experiment.start()[0])
    weight = model.get_parameter(next(iter(chosen)))
    inside = chosen.flat(next(iter(chosen)))[0]
    outside = next(i for i in range(weight.numel()) if i not in set(chosen.flat(next(iter(chosen))).tolist()))
    with torch.no_grad():
        weight.view(-1)[inside] += 1
        assert experiment.moved_outside(model, chosen) == 0
        weight.view(-1)[outside] += 1e-3
        model.get_parameter("model.norm.weight")[0] += 1e-3
    assert experiment.moved_outside(model, chosen) == 2


def test_how_sparse_an_update_is(experiment):
    """All numbers by the same: 5 % of the square in 5 %. One number alone: everything."""
    model = copy.deepcopy(experiment.start()[0])
    with torch.no_grad():
        weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        weight[0, 0] += 1
    one = experiment.update(model)
    assert one["largest 5%"] == pytest.approx(1, abs=1e-12)
    assert one["moved"] == one["bfloat16"] == pytest.approx(1 / sum(p.numel() for p in model.parameters()), rel=1e-3)
    with torch.no_grad():
        for p, before in zip(model.parameters(), experiment.start()[0].parameters(), strict=True):
            p.copy_(before + 1)
    even = experiment.update(model)
    assert even["largest 5%"] == pytest.approx(0.05, abs=1e-4) and even["moved"] == 1


def test_the_verdicts_follow_their_rules(experiment):
    pair = {"accuracy": {"mean": 0.0, "low": -0.04, "high": 0.04}, "skills": {"mean": 0.1, "low": 0.05, "high": 0.2}}
    worse = {"accuracy": {"mean": -0.3, "low": -0.4, "high": -0.2}, "skills": pair["skills"]}
    pairs = {"LIFT 1% - full": worse, "LIFT 5% - full": pair, "LIFT 5% - LoRA 5%": worse, "LIFT 5% - random 5%": pair}
    share = {"mean": 0.9, "low": 0.8, "high": 1.0}
    more = {"bfloat16": {"low": -0.2, "high": -0.1}, "largest 5%": {"low": -0.1, "high": 0.1}}
    found = experiment.verdicts(pairs, {"GRPO": {"bfloat16": share}, "GRPO - SFT": more})
    assert found == {
        "LIFT 1% suffices": "did not hold", "LIFT 5% suffices": "held", "LIFT 5% over LoRA 5%": "the other way round",
        "LIFT 5% over random 5%": "no clear difference", "LIFT 1% keeps more skills than full": "held",
        "LIFT 5% keeps more skills than full": "held", "GRPO's update is sparse": "did not hold",
        "and sparser than SFT's": "in part",
    }  # fmt: skip
