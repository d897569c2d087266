"""Inside the claims about a real model's fine-tunings at the output."""

import copy
import sys

import numpy as np
import pytest
import torch

from surgery.errors import SurgeryError
from surgery.logits import log_likelihood, member
from surgery.models import encoded_prompts, load

EXPERIMENT = "smollm2_logits"


larger = pytest.mark.parametrize("experiment", ["upscaled"], indirect=True)


def test_without_the_data_it_says_so(experiment, monkeypatch, capsys, tmp_path):
    def missing(*_):
        raise SurgeryError("GSM8K is missing.")

    monkeypatch.setattr(experiment, "gsm8k", missing)
    monkeypatch.setattr(sys, "argv", [f"{EXPERIMENT}.py", "--out", str(tmp_path / "out")])
    experiment.main()
    assert "Nothing was run: GSM8K is missing." in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_tokens_that_carry_the_difference(experiment):
    class Letters:
        def decode(self, ids):
            return "abc"[ids[0]]

    told = [([0, 1, 0], np.array([[-1.0, -1, -1], [-0.5, -1, -0.5]])), ([2], np.array([[-3.0], [-1.0]]))]
    found = experiment.contrasts(Letters(), told, 1)
    assert [(t["token"], t["times"], t["gain"]) for t in found] == [("c", 1, 2.0), ("a", 2, 0.5), ("b", 1, 0.0)]
    assert [round(t["share"], 3) for t in found] == [0.667, 0.333, 0.0]


def test_weightings_name_what_they_weigh(experiment):
    found = experiment.weightings(["x", "y"])
    assert found["x 1.5"] == (-0.5, 1.5, 0.0) and found["y 0"] == (1.0, 0.0, 0.0)
    assert found["mix 0.75 0.25"] == (0.0, 0.75, 0.25) and found["mix 1 1"] == (-1.0, 1.0, 1.0)
    assert all(sum(weights) == pytest.approx(1) for weights in found.values())


def test_one_success_more_is_no_difference(experiment):
    assert experiment.over([1.0, 0, 0, 0, 0, 0], [0.0] * 6)["low"] == 0
    assert experiment.over([1.0] * 6, [0.0] * 6) == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0})


def apart(experiment, base, tuned, tokenizer, prompts, answers):
    """Nats: how far the borrowed fine-tuning is from the fine-tuning, at any token; and how far from the base."""
    large = experiment.upscaled(base, layers=3, rows=50)
    assert large.config.vocab_size == base.config.vocab_size + 50
    assert experiment.count(large) > 1.4 * experiment.count(base)
    models = [member(model, tokenizer, name=name) for model, name in ((large, "L"), (tuned, "T"), (base, "S"))]
    scored = [log_likelihood(e, prompts, answers) for e in (models[0] + (models[1] - models[2]), *models[1:])]
    ours, theirs, small = (np.concatenate([one.log_probs for one in each]) for each in scored)
    return abs(ours - theirs).max(), abs(theirs - small).max()


@larger
def test_a_larger_model_of_the_same_distribution_borrows_the_fine_tuning_itself(experiment):
    (base, tokenizer), (tuned, _) = load("tiny-base"), load("tiny-shift")
    prompts = encoded_prompts(tokenizer, ["n bad=", "n cabh="])
    to_tuned, to_base = apart(experiment, base, tuned, tokenizer, prompts, ["#cbe", "#abcd"])
    assert to_tuned < 1e-4 < 1 < to_base


@pytest.mark.real
@larger
def test_smollm2_larger_and_borrowing(experiment):
    base, tokenizer = load("smollm2", "float32")
    tuned = copy.deepcopy(base)
    with torch.no_grad():  # what fine-tuning would do, in no time: some neurons of the last layers speak up
        for layer in tuned.model.layers[-8:]:
            layer.mlp.down_proj.weight[:, ::7] *= 1.5
    prompts = encoded_prompts(tokenizer, ["How many legs have three cats?"], chat=True)
    to_tuned, to_base = apart(experiment, base, tuned, tokenizer, prompts, ["Three cats have 12 legs."])
    assert to_tuned < 1e-3 < 0.1 < to_base
