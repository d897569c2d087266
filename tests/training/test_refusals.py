"""Whatever is wrong gets a sentence, before a step where that is possible; what is only odd runs."""

import copy
import math

import pytest
import torch
from tiny_runs import demonstrations, llama, many_letters, tokenizer, weights

from surgery import zoo
from surgery.errors import SurgeryError
from surgery.models import load
from surgery.training import train
from surgery.training.run import open_model

SFT = {"objective": "sft", "data": demonstrations(), "batch": {"rows": 4}, "steps": 2, "optimizer": {"lr": 1e-2}}
GRPO = SFT | {"objective": "grpo", "reward": many_letters, "rollouts": {"prompts": 2, "group": 2, "max_new_tokens": 4}}


def refused(said, words, model=None, **more):
    """Raises a sentence with `said`, and no parameter has moved."""
    model = model or llama()
    before = weights(model)
    with pytest.raises(SurgeryError, match=said):
        train(model, more.pop("tokenizer", tokenizer()), **words | more)
    assert all((p == before[name]).all() for name, p in model.named_parameters())


def returns(value):
    """A reward that returns the same always."""

    def reward(prompts, completions, **columns):
        if isinstance(value, Exception):
            raise value
        return value(completions) if callable(value) else value

    return reward


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (ValueError("no such judge"), "no such judge"),
        (lambda c: [math.nan] * len(c), "nan"),
        (lambda c: [math.inf] * len(c), "inf"),
        (lambda c: [1.0] * (len(c) - 1), "value"),
        (lambda c: ["good"] * len(c), "good"),
        (3.0, "3.0|float|list"),
    ],
    ids=["raises", "nan", "inf", "too few", "texts", "one number"],
)
def test_rewards_that_go_wrong(value, said):
    refused(said, GRPO, reward=returns(value))


def test_prompts_and_rows_beyond_the_context():
    short = {"max_position_embeddings": 8}
    refused(r"tokens.*context of 8", GRPO, llama(**short))
    refused(r"A row of \d+ tokens, with prompt 'c abc?='.*context of 8", SFT, llama(**short))
    run = train(llama(**short), tokenizer(), **SFT | {"batch": {"rows": 4, "max_length": 9}})
    assert math.isfinite(run.last["loss"])  # the last token is predicted, and not read


def test_tokenizers_without_an_end_or_padding():
    words = copy.deepcopy(tokenizer())
    words.pad_token = None
    assert math.isfinite(train(llama(), words, **SFT).last["loss"])
    words.eos_token = None
    refused("no end-of-sequence token", SFT, tokenizer=words)


def test_data_smaller_than_a_batch():
    refused("12 rows, and one batch takes 13", SFT, batch={"rows": 13})
    refused("12 rows, and one batch takes 13", GRPO, rollouts={"prompts": 13, "group": 2})


def test_missing_columns_and_groups_of_one():
    refused("no column 'completion'", SFT, data=[{"prompt": "a"}] * 12)
    refused("no column 'chosen'", SFT, objective="dpo")
    refused("A group of 1", GRPO, rollouts={"prompts": 2, "group": 1})
    refused("has no rows|is empty", SFT, data=[])


def test_empty_completions_are_learned():
    rows = [{"prompt": "c a=", "completion": ""}] * 8
    run = train(llama(), tokenizer(), **SFT | {"data": rows, "steps": 5})
    losses = [line["loss"] for line in run.metrics]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore")
def test_groups_of_equal_rewards_move_nothing():
    model = llama()
    before = weights(model)
    run = train(model, tokenizer(), **GRPO | {"objective": "dapo", "reward": returns(lambda c: [0.3] * len(c))})
    assert run.last["zero_variance"] == 1.0 and run.last["grad_norm"] == 0.0
    assert all((p == before[name]).all() for name, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore")
def test_rewards_of_none_move_nothing():
    model = llama()
    before = weights(model)
    train(model, tokenizer(), **GRPO | {"objective": "dapo", "reward": returns(lambda c: [None] * len(c))})
    assert all((p == before[name]).all() for name, p in model.named_parameters())


def test_a_model_without_its_tokenizer():
    with pytest.raises(SurgeryError, match="trained with its tokenizer"):
        train(llama(), **SFT)


def test_a_broken_weight_is_named_before_the_first_step(tmp_path):
    model, words = open_model("tiny-base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(SurgeryError, match="'model.layers.1.mlp.up_proj.weight' of .* holds NaN"):
        train(tmp_path, objective="sft", data="chain", steps=1)


def test_a_file_that_is_cut_off_is_a_sentence(tmp_path):
    folder = zoo.get("tiny-base", tmp_path / "broken")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500_000])
    for opened in (open_model, load):
        with pytest.raises(SurgeryError, match="is cut off: .* 500,000 found"):
            opened(folder)
