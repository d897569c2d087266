"""Decoding step by step against transformers' own generation, family by family."""

import pytest
import torch

from surgery.decoding import CausalDecoder, backbone_and_head, undisturbed
from surgery.errors import SurgeryError

SIZE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.5,
}  # fmt: skip
GROUPED = SIZE | {"num_key_value_heads": 2}
SLIDING = GROUPED | {"sliding_window": 6}
GEMMA = SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
SHORT = {"vocab_size": 50, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.5}
FAMILIES = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "mistral": SLIDING,
    "gemma2": GEMMA | {"final_logit_softcapping": 5.0},
    "gemma3_text": GEMMA,
    "gpt2": SHORT | {"n_embd": 32, "n_positions": 64},
    "gpt_neox": SIZE,
    "opt": SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.5},
    "bloom": SHORT | {"hidden_size": 32},
    "phi": SIZE,
    "falcon": SIZE,
    "olmo2": GROUPED,
    "mixtral": GROUPED | {"num_local_experts": 4},
    "granite": GROUPED | {"logits_scaling": 3.0},
    "cohere": GROUPED | {"logit_scale": 0.3},
}
IDS = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] * 7 + [1] * 2])


def tiny(family, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family] | more)).eval()


def greedy(decoder, ids, mask, count, drop=None):
    """(row, count) greedy tokens; rows `drop` names leave after the fifth."""
    with undisturbed(*decoder.models):
        logits, state = decoder.prefill(ids, mask)
        tokens = [logits.argmax(-1)]
        for t in range(count - 1):
            if t == 4 and drop is not None:
                state, tokens = state.select(drop), [token[drop] for token in tokens]
            logits, state = decoder.step(tokens[-1], state)
            tokens.append(logits.argmax(-1))
    return torch.stack(tokens, 1)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_is_that_of_generate(family, padded):
    model = tiny(family)
    ids, mask = (IDS * MASK, MASK) if padded else (IDS, torch.ones_like(IDS))
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=14, pad_token_id=0)[:, 9:]
    decoder = CausalDecoder(model, room=3)  # less than what comes: the cache grows several times
    assert decoder._head is not None, "the stack is called, and the head on the last position alone"
    assert decoder._wide == (family not in ("mistral", "gemma2", "gemma3_text", "bloom"))
    assert torch.equal(greedy(decoder, ids, mask, 14), expected)
    assert torch.equal(greedy(decoder, ids, mask, 14, drop=torch.tensor([2, 0])), expected[[2, 0]])


def test_eager_attention_and_biased_positions():
    for model in (tiny("llama", attn_implementation="eager"), tiny("falcon", alibi=True)):
        expected = model.generate(IDS * MASK, attention_mask=MASK, do_sample=False, max_new_tokens=8, pad_token_id=0)
        decoder = CausalDecoder(model)
        assert not decoder._wide and torch.equal(greedy(decoder, IDS * MASK, MASK, 8), expected[:, 9:])


def test_without_a_seam_the_whole_model_is_called(monkeypatch):
    model = tiny("llama")
    expected = greedy(CausalDecoder(model), IDS * MASK, MASK, 8)
    monkeypatch.setattr("surgery.decoding.head._same_logits", lambda *_: False)
    slow = CausalDecoder(model)
    assert slow._head is None and torch.equal(greedy(slow, IDS * MASK, MASK, 8), expected)


def test_states_are_copies_of_their_own():
    decoder = CausalDecoder(tiny("mistral"))
    with undisturbed(*decoder.models):
        logits, state = decoder.prefill(IDS * MASK, MASK)
        twice, once = state.repeat(2), state.select(torch.tensor([1]))
        token = logits.argmax(-1)
        for _ in range(8):  # going on in one does not reach the others
            decoder.step(token.repeat_interleave(2), twice)
        alone, _ = decoder.step(token[1:2], once)
        all_rows, _ = decoder.step(token, state)
    torch.testing.assert_close(alone, all_rows[1:2])
    assert twice.length == 17 and state.length == once.length == 10


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_who_looks_on_or_steers_gets_tensors_that_meet_gradients(family):
    """Inference mode is for models that nobody looks into; going in and out of it changes nothing."""
    model = tiny(family)
    decoder, seen = CausalDecoder(model, room=2), []
    block = model.model.layers[1]
    expected = greedy(CausalDecoder(model), IDS, torch.ones_like(IDS), 9)
    with undisturbed(model):
        logits, state = decoder.prefill(IDS, torch.ones_like(IDS))
        tokens = [logits.argmax(-1)]
        for t in range(8):
            hooks = []
            if t % 3 == 1:
                hooks = [block.register_forward_hook(lambda m, i, out: seen.append(first(out)))]
            logits, state = decoder.step(tokens[-1], state)
            for hook in hooks:
                hook.remove()
            tokens.append(logits.argmax(-1))
            assert not logits.is_inference()
    assert torch.equal(torch.stack(tokens, 1), expected)
    probe = torch.ones(32, requires_grad=True)
    (sum(seen) * probe).sum().backward()
    assert len(seen) == 3 and probe.grad.abs().sum() > 0
    logits, state = decoder.prefill(IDS, torch.ones_like(IDS))
    assert logits.requires_grad, "with gradients nothing is cut"


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_and_head_give_the_logits(family):
    model = tiny(family, tie_word_embeddings=family == "qwen2")
    backbone, head = backbone_and_head(model)
    with torch.no_grad():
        torch.testing.assert_close(head(backbone(IDS).last_hidden_state), model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not backbone._forward_hooks


def test_a_split_is_believed_only_when_the_logits_agree():
    """A soft cap that no config names: hardly visible in small logits, and noticed all the same."""
    model = tiny("llama", initializer_range=0.02)
    assert backbone_and_head(model) is not None
    model.forward = capped(model.forward)
    assert backbone_and_head(model) is None


def capped(forward):
    def run(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 1000 * torch.tanh(out.logits / 1000)
        return out

    return run


@pytest.mark.peers
def test_lora_stays_active_and_prompt_tuning_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny("llama"), peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    backbone, head = backbone_and_head(model)
    with torch.no_grad():
        logits = head(backbone(IDS).last_hidden_state)
        torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert not torch.allclose(logits, model(IDS).logits, atol=0.1)
    expected = model.generate(input_ids=IDS, do_sample=False, max_new_tokens=6, pad_token_id=0)[:, 9:]
    assert torch.equal(greedy(CausalDecoder(model), IDS, torch.ones_like(IDS), 6), expected)

    prompted = peft.get_peft_model(tiny("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert backbone_and_head(prompted) is None
    with pytest.raises(SurgeryError, match="virtual tokens"):
        CausalDecoder(prompted)


@pytest.mark.parametrize("family", ["mamba", "t5", "recurrent_gemma"])
def test_models_without_a_standard_cache_are_refused(family):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    size = SIZE | {"num_hidden_layers": 3, "d_ff": 32, "d_kv": 8, "num_heads": 2, "lru_width": 32}
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    with pytest.raises(SurgeryError, match="no standard key-value cache"):
        CausalDecoder(auto.from_config(AutoConfig.for_model(family, **size)))


def test_the_model_is_left_as_it_was_found():
    model = tiny("llama")
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model.model.layers[0].eval()  # a mode of its own
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), undisturbed(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    tokens = greedy(CausalDecoder(model), IDS * MASK, MASK, 6)
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing and not model.config.use_cache and torch.is_grad_enabled()
    assert torch.equal(tokens, greedy(CausalDecoder(tiny("llama")), IDS * MASK, MASK, 6))
