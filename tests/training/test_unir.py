"""A small module and a frozen backbone: one policy whose logits are their sum, in training and in sampling."""

import copy

import pytest
import torch
from tiny_runs import llama, many_letters, same, tokenizer, weights

from surgery.decoding import LocalGenerator, Sampling
from surgery.errors import SurgeryError
from surgery.training import train
from surgery.training.batch import Batch
from surgery.training.objectives import GRPO
from surgery.training.policy import Policy

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [20]]
COMPLETIONS = [[13, 14, 2], [15], [16, 17, 18, 19, 2]]


def module():
    return llama(1)


def backbone():
    return llama(2, hidden=32, layers=1, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)


def expected(models, prompt, completion, temperature):
    """log softmax(sum of logits / T) of the completion's tokens, by the models' own forward."""
    ids = torch.tensor([prompt + completion])
    logits = sum(model(ids, use_cache=False).logits for model in models)[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_of_the_sum_of_logits(temperature):
    models = module(), backbone(), llama(3)
    batch = Batch.of(PROMPTS, COMPLETIONS, temperature=temperature)
    found = Policy(models[0], models[1:])(batch, entropy=True)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        wanted = expected(models, prompt, completion, temperature)
        assert torch.allclose(found.log_probs[i, : len(completion)], wanted, atol=2e-5)
    ids = torch.tensor([PROMPTS[1]])
    first = (sum(model(ids).logits for model in models)[0, -1] / temperature).softmax(-1)
    assert torch.allclose(found.entropy[1, 0], torch.distributions.Categorical(first).entropy(), atol=1e-5)


def test_only_the_module_has_gradients_and_they_are_those_of_the_sum():
    small, big = module(), backbone()
    policy = Policy(small, [big])
    policy(Batch.of(PROMPTS, COMPLETIONS)).log_probs.sum().backward()
    found = {name: p.grad.clone() for name, p in small.named_parameters()}
    assert all(p.grad is None for p in big.parameters())
    small.zero_grad()
    sum(expected([small, big], p, c, 1.0).sum() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)).backward()
    assert all(torch.allclose(found[name], p.grad, rtol=1e-3, atol=1e-4) for name, p in small.named_parameters())


def test_a_module_without_logits_leaves_the_backbone_its_distribution():
    silent = llama(1, tie_word_embeddings=False)
    torch.nn.init.zeros_(silent.lm_head.weight)
    batch, big = Batch.of(PROMPTS, COMPLETIONS), backbone()
    assert torch.equal(Policy(silent, [big])(batch).log_probs, Policy(big)(batch).log_probs)
    sampling = Sampling(max_new_tokens=12)
    summed, alone = (
        LocalGenerator(Policy(*models).decoder(), tokenizer(), sampling)(PROMPTS, 3, [1, 2, 3])
        for models in ((silent, [big]), (big,))
    )
    assert [r.completion_ids for r in summed] == [r.completion_ids for r in alone]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_the_teacher_forced_ones(temperature):
    """Left padding, groups, rows that end early and leave, a cache that grows: in every model of the sum."""
    policy = Policy(module(), [backbone()])
    sampling = Sampling(max_new_tokens=70, temperature=temperature)
    rollouts = LocalGenerator(policy.decoder(), tokenizer(), sampling)(PROMPTS, 4, [1, 2, 3])
    lengths = {len(r.completion_ids) for r in rollouts}
    assert len(lengths) > 3
    batch = Batch.of([r.prompt_ids for r in rollouts], [r.completion_ids for r in rollouts], group=4,
                     temperature=temperature)  # fmt: skip
    with torch.no_grad():
        found = policy(batch).log_probs
    for i, rollout in enumerate(rollouts):
        assert torch.allclose(found[i, : len(rollout.log_probs)], torch.tensor(rollout.log_probs), atol=1e-4)


def test_greedy_takes_the_best_token_of_the_sum():
    models = module(), backbone()
    (rollout,) = LocalGenerator(Policy(models[0], models[1:]).decoder(), tokenizer(), Sampling(6, temperature=0))(
        [PROMPTS[0]], 1, [0]
    )
    ids = list(PROMPTS[0])
    for token in rollout.completion_ids:
        logits = sum(model(torch.tensor([ids])).logits[0, -1] for model in models)
        assert token == int(logits.argmax())
        ids.append(token)


def test_training_moves_the_module_alone_and_saves_it_alone(tmp_path):
    from transformers import AutoModelForCausalLM

    small, big = module(), backbone()
    before, frozen = weights(small), copy.deepcopy(big)
    run = train(
        small, tokenizer(), objective=GRPO(beta=0.1), backbone=[big], reward=many_letters, steps=3, out=tmp_path / "a",
        data=[{"prompt": f"c {c}="} for c in "abcd"], rollouts={"prompts": 4, "group": 4, "max_new_tokens": 6},
        optimizer={"lr": 1e-2, "shape": "constant"}, batch={"minibatches": 2},
    )  # fmt: skip
    assert same(weights(big), weights(frozen)) and not same(before, weights(small))
    assert run.metrics[0]["kl"] == pytest.approx(0.0, abs=1e-6) and run.last["kl"] > 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    assert same(weights(saved), weights(small))


def test_the_reference_is_the_sum_as_it_was():
    small, big = module(), backbone()
    policy, batch = Policy(small, [big]), Batch.of(PROMPTS, COMPLETIONS)
    reference = policy.snapshot()
    before = policy(batch).log_probs.detach()
    with torch.no_grad():
        small.lm_head.weight.mul_(2.0)
    assert torch.equal(reference(batch).log_probs, before)
    assert not torch.allclose(policy(batch).log_probs, before)


def test_vocabularies_must_fit():
    with pytest.raises(SurgeryError, match="vocabularies of 45 and 48 tokens can't be added"):
        Policy(module(), [llama(2, vocab_size=48)])
