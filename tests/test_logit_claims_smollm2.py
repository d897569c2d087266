"""The claims about a real model's fine-tunings at the output run from end to end; the table of claims quotes them."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from surgery.errors import SurgeryError
from surgery.logits import log_likelihood, member
from surgery.models import encoded_prompts, load

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
RESULTS = EXPERIMENTS / "results"
README = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
NAME = "smollm2_logits"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def script(request, monkeypatch):
    """A script as a module; its neighbours are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    modules = set(sys.modules)
    yield __import__(request.param)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXPERIMENTS)):
            del sys.modules[name]


claims = pytest.mark.parametrize("script", [NAME], indirect=True)
larger = pytest.mark.parametrize("script", ["upscaled"], indirect=True)


@claims
def test_the_readme_quotes_the_stored_results(script):
    report = json.loads((RESULTS / f"{NAME}.json").read_text())
    lines = [line for line in script.markdown(report["summary"]).splitlines() if line]
    assert len(lines) == 9 + 8 + 4 + 6
    assert [line for line in lines if line not in README.splitlines()] == []
    assert f"results/{NAME}.png" in README and f"experiments/{NAME}.py" in README
    assert (RESULTS / f"{NAME}.json").stat().st_size < 100_000
    assert (RESULTS / f"{NAME}.png").stat().st_size < 100_000
    script.check(report)


@claims
def test_it_runs(script, tmp_path):
    command = [sys.executable, str(EXPERIMENTS / f"{NAME}.py"), "--fast", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SURGERY_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / f"{NAME}.json").read_text())
    stored = json.loads((RESULTS / f"{NAME}.json").read_text())
    assert report.keys() == stored.keys()
    assert script.markdown(report["summary"]) in run.stdout
    assert (tmp_path / f"{NAME}.png").read_bytes().startswith(b"\x89PNG")
    script.check(report)


@claims
def test_without_the_data_it_says_so(script, monkeypatch, capsys, tmp_path):
    def missing(*_):
        raise SurgeryError("GSM8K is missing.")

    monkeypatch.setattr(script, "gsm8k", missing)
    monkeypatch.setattr(sys, "argv", [f"{NAME}.py", "--out", str(tmp_path / "out")])
    script.main()
    assert "Nothing was run: GSM8K is missing." in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@claims
def test_the_tokens_that_carry_the_difference(script):
    class Letters:
        def decode(self, ids):
            return "abc"[ids[0]]

    told = [([0, 1, 0], np.array([[-1.0, -1, -1], [-0.5, -1, -0.5]])), ([2], np.array([[-3.0], [-1.0]]))]
    found = script.contrasts(Letters(), told, 1)
    assert [(t["token"], t["times"], t["gain"]) for t in found] == [("c", 1, 2.0), ("a", 2, 0.5), ("b", 1, 0.0)]
    assert [round(t["share"], 3) for t in found] == [0.667, 0.333, 0.0]


@claims
def test_weightings_name_what_they_weigh(script):
    found = script.weightings(["x", "y"])
    assert found["x 1.5"] == (-0.5, 1.5, 0.0) and found["y 0"] == (1.0, 0.0, 0.0)
    assert found["mix 0.75 0.25"] == (0.0, 0.75, 0.25) and found["mix 1 1"] == (-1.0, 1.0, 1.0)
    assert all(sum(weights) == pytest.approx(1) for weights in found.values())


@claims
def test_one_success_more_is_no_difference(script):
    assert script.over([1.0, 0, 0, 0, 0, 0], [0.0] * 6)["low"] == 0
    assert script.over([1.0] * 6, [0.0] * 6) == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0})


def apart(script, base, tuned, tokenizer, prompts, answers):
    """Nats: how far the borrowed fine-tuning is from the fine-tuning, at any token; and how far from the base."""
    large = script.upscaled(base, layers=3, rows=50)
    assert large.config.vocab_size == base.config.vocab_size + 50
    assert script.count(large) > 1.4 * script.count(base)
    models = [member(model, tokenizer, name=name) for model, name in ((large, "L"), (tuned, "T"), (base, "S"))]
    scored = [log_likelihood(e, prompts, answers) for e in (models[0] + (models[1] - models[2]), *models[1:])]
    ours, theirs, small = (np.concatenate([one.log_probs for one in each]) for each in scored)
    return abs(ours - theirs).max(), abs(theirs - small).max()


@larger
def test_a_larger_model_of_the_same_distribution_borrows_the_fine_tuning_itself(script):
    (base, tokenizer), (tuned, _) = load("tiny-base"), load("tiny-shift")
    prompts = encoded_prompts(tokenizer, ["n bad=", "n cabh="])
    to_tuned, to_base = apart(script, base, tuned, tokenizer, prompts, ["#cbe", "#abcd"])
    assert to_tuned < 1e-4 < 1 < to_base


@pytest.mark.real
@larger
def test_smollm2_larger_and_borrowing(script):
    base, tokenizer = load("smollm2", "float32")
    tuned = copy.deepcopy(base)
    with torch.no_grad():  # what fine-tuning would do, in no time: some neurons of the last layers speak up
        for layer in tuned.model.layers[-8:]:
            layer.mlp.down_proj.weight[:, ::7] *= 1.5
    prompts = encoded_prompts(tokenizer, ["How many legs have three cats?"], chat=True)
    to_tuned, to_base = apart(script, base, tuned, tokenizer, prompts, ["Three cats have 12 legs."])
    assert to_tuned < 1e-3 < 0.1 < to_base
