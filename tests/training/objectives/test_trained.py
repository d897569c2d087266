"""Objectives in the real engine: they find a bandit's good arm, and frozen entries keep their bits."""

import copy
import math

import pytest
import torch
from small import llama, text, tokenizer

from surgery.training import train
from surgery.training.objectives import OBJECTIVES
from surgery.tuning import Selection

pytestmark = pytest.mark.filterwarnings("ignore::surgery.training.log.TrainingWarning")
ROWS = [
    {"prompt": text(1, i), "completion": text(2, i), "chosen": text(3, i), "rejected": text(4, i)} for i in range(16)
]


def share_of_a(prompts, completions, **_):
    """A reward that random models get in different amounts."""
    return [c.count("a") + 0.1 * len(c) for c in completions]


# two tokens, one right: solved within 200 steps by every policy gradient
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "rloo", "ppo"])
def test_a_bandit_is_solved_in_60_steps(name):
    """One prompt, a vocabulary of two: a pays, b (the end mark) does not."""
    model, words = llama(layers=1, vocabulary=2, dtype=torch.float32, seed=3), tokenizer("ab", pad=None, eos="b")

    def good():
        with torch.no_grad():
            return float(model(torch.tensor([[0]])).logits[0, -1].softmax(-1)[0])

    with torch.no_grad():  # the good arm is drawn one time in five
        state = model.model(torch.tensor([[0]])).last_hidden_state[0, -1]
        model.lm_head.weight[0] = model.lm_head.weight[1] - math.log(4) * state / state.norm() ** 2
    assert good() == pytest.approx(0.2, abs=1e-4)
    run = train(
        model, words, objective={name: {"beta": 0.01} if name == "grpo" else {}}, data=[{"prompt": "a"}],
        reward=lambda prompts, completions, **_: [float(c == "a") for c in completions], steps=60,
        rollouts={"prompts": 1, "group": 8, "max_new_tokens": 1}, optimizer={"lr": 0.01, "shape": "constant"},
        batch={"epochs": 2} if name == "ppo" else {},
    )  # fmt: skip
    assert good() > 0.95
    assert run.metrics[0]["reward"] < 0.7
    assert name != "ppo" or "explained_variance" in run.metrics[0]


# selections compose with every objective
@pytest.mark.parametrize("name", OBJECTIVES)
def test_frozen_entries_keep_their_bits(name):
    """Under weight decay and AdamW's momentum, with every objective; the value head beside the model is free."""
    model = llama(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(p.shape, generator=generator) < 0.1 for n, p in model.named_parameters() if p.dim() > 1}
    train(
        model, tokenizer(), objective=name, data=ROWS, reward=share_of_a, steps=3, tuning=Selection.of_masks(masks),
        frozen=["*norm*"], batch={"rows": 4}, rollouts={"prompts": 2, "group": 4, "max_new_tokens": 5},
        optimizer={"lr": 0.01, "weight_decay": 0.1, "shape": "constant"},
    )  # fmt: skip
    for key, value in model.state_dict().items():
        free = masks.get(key, torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(value[~free], before[key][~free]), key
    moving = [key for key in masks if not torch.equal(model.state_dict()[key], before[key])]
    assert len(moving) > len(masks) / 2


# the reference is the object that was given, not what its name would load
def test_the_engines_reference_is_the_edited_model():
    from surgery.training.engine import Trainer
    from surgery.training.recipe import make

    model = llama(dtype=torch.float32)
    model.config._name_or_path = "somewhere/else"
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 1.0
    edited = copy.deepcopy(model.state_dict())
    for objective, wanted in ({"grpo": {"beta": 0.04}}, True), ({"grpo": {"beta": 0}}, False), ("ppo", True):
        recipe = make({"objective": objective, "data": ROWS, "reward": share_of_a, "rollouts": {"max_new_tokens": 3}})
        reference = Trainer(recipe, model, tokenizer()).reference
        assert (reference is not None) is wanted
        if reference is not None:
            assert all(torch.equal(v, edited[k]) for k, v in reference.model.state_dict().items())


def test_masked_thought_from_0_begins_as_sft():
    """The first step, at rate 0, is SFT's to the bit; later ones aren't."""
    found = []
    for objective in ({"masked_thought": {"mask_rate": {"linear": {"end": 1.0}}}}, "sft"):
        model, steps = llama(dtype=torch.float32), []
        train(
            model, tokenizer(), objective=objective, data=ROWS, steps=3, batch={"rows": 4},
            optimizer={"lr": 0.01}, on_step=lambda _, found, steps=steps: steps.append(found),
        )  # fmt: skip
        found.append(steps)
    masked, plain = found
    assert masked[0]["masked"] == 0.0 < masked[1]["masked"] and "masked" not in plain[0]
    assert masked[0]["loss"] == plain[0]["loss"] and masked[0]["grad_norm"] == plain[0]["grad_norm"]
    assert masked[2]["loss"] != plain[2]["loss"]
