"""Log-probabilities and gradients of the policy: padding, shared prompts, packing and chunks change nothing."""

import pytest
import torch
from tiny_runs import llama
from torch import nn

from surgery.training import policy as module
from surgery.training.batch import Batch
from surgery.training.policy import Policy, token_log_probs, without_dropout


def family(name, seed=0):
    """A random model of two layers and 40 tokens."""
    import transformers as t

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 8,
             "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    gemma = sizes | {"sliding_window": 64, "query_pre_attn_scalar": 8}
    narrow = {"sliding_window": 4}
    configs = {
        "llama": lambda: t.LlamaConfig(**sizes),
        "llama-tied": lambda: t.LlamaConfig(**sizes, tie_word_embeddings=True),
        "qwen2": lambda: t.Qwen2Config(**sizes),
        "gpt2": lambda: t.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64,
                                     initializer_range=0.3, eos_token_id=2, bos_token_id=1),
        "gpt-neox": lambda: t.GPTNeoXConfig(**sizes),
        "mistral": lambda: t.MistralConfig(**sizes | {"sliding_window": 64}),
        "mistral-narrow": lambda: t.MistralConfig(**sizes | narrow),
        "gemma2": lambda: t.Gemma2Config(**gemma, final_logit_softcapping=3.0, attn_logit_softcapping=5.0),
        "gemma3": lambda: t.Gemma3TextConfig(**gemma),
        "gemma3-narrow": lambda: t.Gemma3TextConfig(**gemma | narrow),
    }  # fmt: skip
    torch.manual_seed(seed)
    config = configs[name]()
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager" if name == "gemma2" else "sdpa")
    for parameter in model.parameters():  # biases and norms count too
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


FAMILIES = ["llama", "llama-tied", "qwen2", "gpt2", "gpt-neox", "mistral", "mistral-narrow", "gemma2", "gemma3",
            "gemma3-narrow"]  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
COMPLETIONS = [[3, 4, 5, 2], [6], [7, 8, 2], [9, 2], [10, 11, 12, 13], [2], [14, 15, 16, 17, 18, 2]]


def grouped(group=2):
    """Three prompts of different lengths, two ragged completions each."""
    return Batch.of([p for p in PROMPTS for _ in range(group)], COMPLETIONS[: 3 * group], group=group, pad=0)


def gradients(policy, batch, **asks):
    """Log-probabilities, and the gradient of a sum in which every token counts differently."""
    policy.zero_grad()
    scores = policy(batch, **asks)
    weight = torch.arange(1.0, 1 + scores.log_probs.numel()).view_as(scores.log_probs).sin()
    (scores.log_probs * weight).sum().backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return scores.log_probs.detach(), found


def by_hand(model, batch):
    """(rows, completion) log-probabilities, each row alone, without padding."""
    found = torch.zeros(batch.mask.shape, dtype=next(model.parameters()).dtype)
    for i in range(len(batch)):
        prompt = batch.prompt_ids[i][batch.prompt_mask[i]]
        completion = batch.completion_ids[i, : batch.lengths[i]]
        logits = model(torch.cat([prompt, completion])[None], use_cache=False).logits[0] / batch.temperature
        log = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found[i, : len(completion)] = log.gather(1, completion[:, None])[:, 0]
    return found.detach()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("share", [False, True], ids=["plain", "shared"])
def test_log_probs_are_those_of_each_row_alone(name, share):
    model, batch = family(name), grouped()
    batch.temperature = 0.7
    found = Policy(model, share_prompts=share)(batch).log_probs
    torch.testing.assert_close(found, by_hand(model, batch), rtol=0, atol=1e-5)
    assert (found[~batch.attended] == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_no_log_prob(name):
    model, batch = family(name), grouped()
    alone = [Policy(model)(batch.select([i])).log_probs[0] for i in range(len(batch))]
    wide = Batch(
        nn.functional.pad(batch.prompt_ids, (7, 0)), nn.functional.pad(batch.prompt_mask, (7, 0)),
        nn.functional.pad(batch.completion_ids, (0, 5)), batch.lengths, nn.functional.pad(batch.mask, (0, 5)),
        batch.rows, batch.group,
    )  # fmt: skip
    for share in (False, True):
        found = Policy(model, share_prompts=share)(wide).log_probs
        for i, row in enumerate(alone):
            torch.testing.assert_close(found[i, : len(row)], row, rtol=1e-6, atol=2e-6)


def near(found, expected, tolerance):
    """Log-probabilities and gradients: differences as shares of the largest number in a tensor."""
    (log_probs, gradient), (expected_log_probs, expected_gradient) = found, expected
    largest = max(float(g.abs().max()) for g in expected_gradient.values())
    torch.testing.assert_close(log_probs, expected_log_probs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance * largest)


# transformers computes RMS norms, rotations and eager softmax in float32, whatever the parameters
PRECISE = {"gpt2": 1e-13, "gpt-neox": 2e-8}


@pytest.mark.parametrize("name", FAMILIES)
def test_shared_prompts_give_the_gradients_of_the_plain_pass(name, monkeypatch):
    model, batch, calls = family(name), grouped(), []
    usual = Policy._shared
    monkeypatch.setattr(Policy, "_shared", lambda *args: calls.append(1) or usual(*args))
    near(gradients(Policy(model), batch), gradients(Policy(model, share_prompts=False), batch), 1e-5)
    assert len(calls) == (0 if "narrow" in name else 1)
    if name != "gemma2":  # its eager softmax is in float32, where the mask of float64 is -inf: NaN in padding
        model.double()
        tolerance = PRECISE.get(name, 5e-7)
        near(gradients(Policy(model), batch), gradients(Policy(model, share_prompts=False), batch), tolerance)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-narrow", "gemma3"])
def test_packing_gives_the_gradients_of_the_plain_pass(name):
    model, batch = family(name).double(), grouped()
    batch.group = 1
    near(gradients(Policy(model, packing=12), batch), gradients(Policy(model), batch), PRECISE.get(name, 5e-7))


def test_a_token_before_its_row_is_not_seen_when_packed():
    model = family("llama")
    batch = Batch.of(PROMPTS, [[3, 4], [5, 6], [7]])
    other = Batch.of([[20, 21, 22, 23, 24], *PROMPTS[1:]], [[25, 26], [5, 6], [7]])
    one, two = Policy(model, packing=64)(batch).log_probs, Policy(model, packing=64)(other).log_probs
    assert not torch.equal(one[0], two[0])
    assert torch.equal(one[1:], two[1:])


def test_checkpointing_falls_back_to_the_plain_pass(monkeypatch):
    model, batch = family("gpt2").double(), grouped()
    expected = gradients(Policy(model), batch)
    monkeypatch.setattr(Policy, "_shared", lambda *_: pytest.fail("shares a cache under gradient checkpointing"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with without_dropout(model):
        near(gradients(Policy(model), batch), expected, 1e-13)


@pytest.mark.parametrize("entropy", [False, True])
def test_chunks_of_the_head_change_nothing(entropy, monkeypatch):
    model, batch = family("gpt2").double(), grouped()
    expected = gradients(Policy(model), batch, entropy=entropy)
    monkeypatch.setattr(module, "LOGITS", 40 * 8)
    near(gradients(Policy(model), batch, entropy=entropy), expected, 1e-13)
    with torch.no_grad():
        torch.testing.assert_close(Policy(model)(batch).log_probs, expected[0], rtol=0, atol=1e-13)


def test_logits_of_a_large_vocabulary_are_never_whole(monkeypatch):
    """The largest tensor that the head makes holds a chunk, forward and backward; what is kept holds none of it."""
    monkeypatch.setattr(module, "LOGITS", 1 << 12)
    head, states = nn.Linear(8, 512, bias=False), torch.randn(100, 8, requires_grad=True)
    seen, kept = [], []
    head.register_forward_hook(lambda _, __, out: seen.append(out.numel()))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        log_probs, _ = token_log_probs([states], [head], torch.randint(512, (100,)))
    assert max(kept) <= states.numel()
    log_probs.sum().backward()
    assert max(seen) <= 1 << 12 and sum(seen) > 2 * 100 * 512 - 1
    assert states.grad.abs().sum() > 0


def test_entropy_values_and_hidden_states():
    model, batch = llama(), grouped()
    policy = Policy(model)
    policy.extras["value"] = nn.Linear(16, 1)
    scores = policy(batch, entropy=True, hidden=True, values=True)
    logits = model.lm_head(scores.hidden)
    log = logits.log_softmax(-1)
    there = batch.attended
    torch.testing.assert_close(scores.entropy[there], -(log.exp() * log).sum(-1)[there])
    torch.testing.assert_close(scores.values[there], policy.extras["value"](scores.hidden)[..., 0][there])
    expected = log.gather(-1, batch.completion_ids[..., None])[..., 0]
    torch.testing.assert_close(scores.log_probs[there], expected[there])


def test_the_reference_is_a_copy_of_this_object():
    model = llama()
    model.lm_head.weight.data += 1.0  # edited in memory: no file knows
    policy = Policy(model)
    reference, batch = policy.snapshot(), grouped()
    before = policy(batch).log_probs
    assert torch.equal(reference(batch).log_probs, before)
    model.lm_head.weight.data.mul_(-0.5)
    assert torch.equal(reference(batch).log_probs, before) and not torch.equal(policy(batch).log_probs, before)
    assert not any(p.requires_grad for p in reference.parameters())


def test_backbones_add_logits_and_stay_frozen():
    small, large, batch = llama(1), llama(2, layers=3), grouped()
    policy = Policy(small, [large])
    log_probs, found = gradients(policy, batch)
    ids = torch.cat([batch.prompt_ids[0], batch.completion_ids[0]])[None]
    log = (small(ids).logits + large(ids).logits)[0].log_softmax(-1)[4:]
    expected = log[: len(log) - 1].gather(1, batch.completion_ids[0][:, None])[:, 0] * batch.attended[0]
    torch.testing.assert_close(log_probs[0], expected, rtol=1e-5, atol=1e-5)
    assert found and all(name.startswith("model.") for name in found)


def test_a_model_that_remembers_otherwise_shares_no_prompts():
    """State spaces ignore a cache of keys and values: sharing one would leave the prompt out without a word."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4))
    batch = Batch.of([[5, 6, 7]] * 2, [[3, 4, 5], [6, 2]], group=2)
    torch.testing.assert_close(Policy(model)(batch).log_probs, by_hand(model, batch), rtol=0, atol=1e-5)


def test_dropout_is_off_and_comes_back():
    model = family("gpt2")
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert max(rates) > 0
    policy, batch = Policy(model), grouped()
    with without_dropout(model):
        assert model.training
        assert torch.equal(policy(batch).log_probs, policy(batch).log_probs)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == rates and not model.training
    model.train()
    assert not torch.equal(policy(batch).log_probs, policy(batch).log_probs)


def test_half_precision_gives_float32():
    model, batch = llama().bfloat16(), grouped()
    found = Policy(model)(batch).log_probs
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, Policy(llama())(batch).log_probs, rtol=0.1, atol=0.3)
