"""Rollouts: what is drawn, from what, and that nothing else depends on it."""

import dataclasses

import pytest
import torch
from helpers import tiny_checkpoint

from surgery.training.rollouts import LocalGenerator, Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("rollouts") / "model", seed=3)


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder):
    """A tiny Llama with strong opinions: weights ten times as large as usual."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)
    return model.eval()


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [5, 6, 7]]
SEEDS = [11, 12, 13, 14]


def test_greedy_completions_are_those_of_generate(model, tokenizer):
    rollouts = LocalGenerator(model, tokenizer, Sampling(16, temperature=0))(PROMPTS, 2, SEEDS)
    for i, prompt in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16, pad_token_id=3)
        for rollout in rollouts[2 * i : 2 * i + 2]:
            assert rollout.completion_ids == alone[0, len(prompt) :].tolist()


def test_log_probs_are_the_teacher_forced_ones_of_the_sampling_temperature(model, tokenizer):
    sampling = Sampling(12, temperature=0.7, top_p=0.8, top_k=20)
    for rollout in LocalGenerator(model, tokenizer, sampling)(PROMPTS, 3, SEEDS):
        logits = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0, :-1] / 0.7
        taken = logits.log_softmax(-1)[len(rollout.prompt_ids) - 1 :]
        expected = taken.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.log_probs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 256])
def test_a_row_does_not_depend_on_the_others(model, tokenizer, batch_size):
    sampling = Sampling(20, batch_size=batch_size)
    rollouts = LocalGenerator(model, tokenizer, sampling)(PROMPTS, 4, SEEDS)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = LocalGenerator(model, tokenizer, dataclasses.replace(sampling, batch_size=64))([prompt], 4, [seed])
        assert [r.completion_ids for r in alone] == [r.completion_ids for r in rollouts[4 * i : 4 * i + 4]]
