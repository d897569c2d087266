"""Inside the claim about a real model tuned in four ways."""

import sys

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.tuning import select

EXPERIMENT = "smollm2_tuning"


def test_without_the_data_it_says_so(experiment, monkeypatch, capsys, tmp_path):
    def missing(*_):
        raise SurgeryError("SVAMP is missing.")

    monkeypatch.setattr(experiment, "svamp", missing)
    monkeypatch.setattr(sys, "argv", ["smollm2_tuning.py", "--out", str(tmp_path / "out")])
    experiment.main()
    assert "Nothing was run: SVAMP is missing." in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def found(experiment, lift=0.0, texts=(0.1, 0.1), peak=400.0, seconds=1.0):
    """Results in which LIFT is apart from full fine-tuning by what is given; LoRA and HFT are the same as it."""

    def values(shift):
        each = {"target": [shift[0] + 0.01 * i for i in range(8)], "right": [0.0, 1.0]}
        return each | {name: [by + 0.01 * i for i in range(8)] for name, by in zip("ab", shift[1:], strict=True)}

    arms = {"base": (-2.0, 0.2, 0.2), **dict.fromkeys(experiment.ARMS, (0.0, 0.0, 0.0)), "LIFT": (lift, *texts)}
    cost = {arm: {"seconds": [1.0, 1.0], "peak": [1000.0]} for arm in experiment.ARMS}
    cost["LIFT"] = {"seconds": [seconds, seconds], "peak": [peak]}
    sweep = {a: [{"lr": "1", "validation": -2.0}, {"lr": "2", "validation": -1.0}] for a in experiment.ARMS}
    return {"values": {arm: values(shift) for arm, shift in arms.items()}, "cost": cost, "sweep": sweep,
            "moving": dict.fromkeys(experiment.ARMS, 5)}  # fmt: skip


@pytest.mark.parametrize("more, verdict", [
    ({}, "held"), ({"lift": -0.04}, "held"), ({"lift": -0.06}, "did not hold"), ({"texts": (0.1, 0.0)}, "in part"),
    ({"texts": (-0.1, -0.1)}, "did not hold"),
])  # fmt: skip
def test_verdicts_follow_the_rule(experiment, more, verdict):
    summary = experiment.summarised(found(experiment, **more))
    assert summary["verdicts"]["LIFT against full"] == summary["verdicts"]["LIFT against LoRA"] == verdict
    assert summary["verdicts"]["HFT against full"] == "did not hold", "it is the same in every text"
    assert summary["arms"]["LIFT"]["lr"] == "2", "the rate with the likelier validation problems"


@pytest.mark.parametrize("more, so", [
    ({}, (True, True, True)), ({"peak": 501.0}, (False, True, True)), ({"peak": 1001.0}, (False, False, True)),
    ({"seconds": 1.06}, (True, True, False)),
])  # fmt: skip
def test_what_a_step_may_cost(experiment, more, so):
    summary = experiment.summarised(found(experiment, **more))
    assert tuple(summary["cost"].values()) == (*so, False) and summary["verdicts"]["cost"] == "in part"
    assert summary["arms"]["LIFT"]["times full"] == more.get("seconds", 1.0)


def test_passages_are_spread_over_the_text(experiment):
    model, tokenizer = experiment.open_model("tiny-base")
    text = "abcd" * 200
    told = experiment.passages(model, tokenizer, text, 4)
    width = min(256, model.config.max_position_embeddings)
    ids = torch.tensor([tokenizer(text[200:], add_special_tokens=False)["input_ids"][:width]])
    with torch.no_grad():
        alone = -float(model(input_ids=ids, labels=ids).loss)
    assert len(told) == 4 and list(told.labels) == [0, 200, 400, 600]
    assert told.values[1] == pytest.approx(alone, abs=1e-5)


@pytest.mark.real
def test_smollm2_at_its_size(experiment):
    """The numbers that move, and one step that moves those of LIFT alone."""
    model, tokenizer = experiment.open_model("smollm2")
    moves = {arm: experiment.moving(arm, model) for arm in experiment.ARMS}
    assert moves["full"] == 134_515_008 and moves["LIFT"] == pytest.approx(0.05 * 106_168_320, abs=210)
    assert moves["LoRA"] == 17 * 305_280 and 0.4 < moves["HFT"] / moves["full"] < 0.7
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = select(model, "lift", density=experiment.DENSITY, rank=32)
    words = {"objective": "sft", "steps": 1, "batch": {"rows": 1}, "chat": True, "optimizer": {"lr": 1e-3}}
    rows = [{"prompt": "What is 3 + 4?", "completion": "3 + 4 = 7\n#### 7"}]
    experiment.train(model, tokenizer, data=rows, tuning=chosen, **words)
    masks, moved = chosen.masks(), 0
    for name, p in model.named_parameters():
        apart = p.detach() != before[name]
        moved += int(apart.sum())
        assert not bool((apart & ~masks[name]).any() if name in masks else apart.any()), name
    assert moved > 0.9 * chosen.count
