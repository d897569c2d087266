"""Loading, looking without touching, prompts as padded batches, and pairs that fit together."""

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint, tiny_tokenizer, words
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from surgery.errors import SurgeryError
from surgery.models import Batch, Pair, as_batch, encode, encoded_prompts, load, untouched
from surgery.zoo import get

torch.set_num_threads(1)
ROWS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, n_positions=32)).eval()


def opt():
    torch.manual_seed(0)
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(vocab_size=40, ffn_dim=32, max_position_embeddings=32, **size)).eval()


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(n_layer=2, n_head=2, hidden_size=16, vocab_size=40)).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(tiny_checkpoint(tmp_path_factory.mktemp("llama") / "base"))


@pytest.fixture
def tokenizer(llama):
    return llama[1]


# ---- loading


def test_a_name_of_the_zoo_is_its_folder(tmp_path, monkeypatch):
    model, tokenizer = load("tiny-base")
    other = load(get("tiny-base"))[0].state_dict()
    assert all(t.equal(other[n]) for n, t in model.state_dict().items()) and len(tokenizer) and not model.training
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "tiny-base")  # what exists goes before the zoo
    assert load("tiny-base")[0].config.hidden_size == 16


def test_dtype_and_device():
    model = load("tiny-base", dtype="bfloat16", device="meta")[0]
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}
    with pytest.raises(SurgeryError, match="no dtype 'float13'"):
        load("tiny-base", dtype="float13")
    with pytest.raises(SurgeryError, match="device 'cuda:97' can't be used"):
        load("tiny-base", device="cuda:97")
    with pytest.raises(SurgeryError, match="no file or folder 'tiny-bas'"):
        load("tiny-bas")


# ---- looking without touching


def state(model):
    return ([m.training for m in model.modules()], [(p.requires_grad, p.grad) for p in model.parameters()],
            model.config.use_cache, model.config._attn_implementation)  # fmt: skip


def disturbed(model):
    """Mixed modes, a frozen parameter, a gradient that waits for its optimizer, a cache that is off."""
    model.train()
    model.transformer.h[1].eval()
    model.transformer.wpe.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("gradients", [False, True])
def test_everything_is_as_it_was_after_an_exception(gradients):
    first, second = disturbed(gpt2()), disturbed(gpt2())
    before, values = [state(m) for m in (first, second)], [p.clone() for p in first.parameters()]
    grad = first.lm_head.weight.grad
    with pytest.raises(RuntimeError, match="stop"), untouched(first, second, gradients=gradients):
        for model in (first, second):
            assert not any(m.training for m in model.modules()) and model.config.use_cache
            assert not any(p.requires_grad for p in model.parameters())
            model.set_attn_implementation("eager")
            model.lm_head.weight.grad = torch.zeros_like(grad)
        assert torch.is_grad_enabled() == gradients
        raise RuntimeError("stop")
    for model, was in zip((first, second), before, strict=True):
        now = state(model)
        assert now[0] == was[0] and now[2:] == was[2:]
        assert [g for g, _ in now[1]] == [g for g, _ in was[1]]
        assert all(a is b for (_, a), (_, b) in zip(now[1], was[1], strict=True))
    assert torch.equal(grad, torch.ones_like(grad)) and torch.is_grad_enabled()
    assert all(p.equal(v) for p, v in zip(first.parameters(), values, strict=True))


def test_gradients_flow_through_activations_only_even_in_a_callers_inference_mode():
    model = gpt2()
    for outside in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with outside(), untouched(model, gradients=True):
            embedded = model.transformer.wte(torch.tensor(ROWS[1])[None]).requires_grad_()
            model(inputs_embeds=embedded).logits.sum().backward()
            assert embedded.grad.abs().sum() > 0
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_what_comes_out_can_be_used_in_autograd():
    model = gpt2()
    with untouched(model):
        logits = model(torch.tensor(ROWS[1])[None]).logits
    assert not logits.requires_grad and not logits.is_inference()
    scale = torch.ones((), requires_grad=True)
    (logits * scale).pow(2).sum().backward()
    assert scale.grad > 0


def test_the_attention_of_a_part_is_put_back_by_itself():
    model = torch.nn.Linear(2, 2)
    model.config = config = Gemma3Config()
    config._attn_implementation = {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}
    with untouched(model):
        config._attn_implementation = "flash_attention_2"
        assert config.text_config._attn_implementation == "flash_attention_2"
    parts = (config, config.text_config, config.vision_config)
    assert [part._attn_implementation for part in parts] == ["sdpa", "eager", "sdpa"]


def test_a_module_without_a_config():
    model = torch.nn.Linear(2, 2).train()
    with untouched(model):
        assert not model.training
    assert model.training


# ---- batches


def test_right_and_left_padding(tokenizer):
    right, left = encode(tokenizer, ROWS), encode(tokenizer, ROWS, side="left")
    for batch, first, last in ((right, [0, 0, 0], [2, 4, 0]), (left, [2, 0, 4], [4, 4, 4])):
        assert batch.lengths.tolist() == [3, 5, 1] and batch.first.tolist() == first and batch.last.tolist() == last
        assert [batch.ids[i, batch.mask[i]].tolist() for i in range(3)] == ROWS
        assert batch.padded and len(batch) == 3 and batch.ids.dtype == torch.long and batch.mask.dtype == torch.bool
    assert right.positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [0] * 5]
    assert left.positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0] * 5]
    assert right.ids[2, 1:].tolist() == [3] * 4  # <pad>
    assert not encode(tokenizer, ROWS[:1]).padded


def test_what_is_real_is_said_by_the_mask_not_by_the_token(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.pad_token = tokenizer.eos_token
    batch = encode(tokenizer, [[5, 6, 1], [5, 6, 7, 8]])  # the first ends with eos, which pads too
    assert batch.ids[0].tolist() == [5, 6, 1, 1] and batch.lengths.tolist() == [3, 4] and batch.last.tolist() == [2, 3]
    tokenizer.pad_token = tokenizer.eos_token = None
    assert encode(tokenizer, [[5, 6], [7]]).ids.tolist() == [[5, 6], [7, 0]]


@pytest.mark.parametrize("make", [gpt2, opt, bloom])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_logits_are_those_of_single_prompts(make, side):
    model, batch = make(), encode(None, ROWS, side=side)
    with untouched(model):
        padded = model(**batch.inputs(model)).logits
        for i, row in enumerate(ROWS):
            alone = model(**encode(None, [row]).inputs(model)).logits[0]
            torch.testing.assert_close(padded[i, batch.mask[i]], alone, rtol=0, atol=1e-5)


def test_positions_matter_to_gpt2_and_are_passed_only_where_they_do():
    model, left = gpt2(), encode(None, ROWS, side="left")
    assert set(left.inputs(model)) == {"input_ids", "attention_mask", "position_ids"}
    assert set(left.inputs(bloom())) == set(encode(None, ROWS).inputs(model)) == {"input_ids", "attention_mask"}
    assert set(encode(None, ROWS[:1]).inputs(model)) == {"input_ids"}
    with untouched(model):
        right = model(**left.inputs(model)).logits
        wrong = model(left.ids, attention_mask=left.mask.long()).logits
    assert (right - wrong)[left.mask].abs().max() > 1e-3


def test_positions_reach_a_model_inside_an_adapter():
    peft = pytest.importorskip("peft")
    model, left = gpt2(), encode(None, ROWS, side="left")
    with untouched(model):
        plain = model(**left.inputs(model)).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True))
    with untouched(adapted):  # an adapter begins as nothing
        torch.testing.assert_close(adapted(**left.inputs(adapted)).logits, plain, rtol=0, atol=1e-6)


def test_texts_chats_and_ids_in_one_list(tokenizer):
    chat = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}]
    batch = encode(tokenizer, ["w1 w2", chat, [9, 9], torch.tensor([8]), np.array([7, 7]), (6, 6)])
    rows = [ids[: int(n)].tolist() for ids, n in zip(batch.ids, batch.lengths, strict=True)]
    assert rows == [[5, 6], [7, 8, 9], [9, 9], [8], [7, 7], [6, 6]]
    assert encode(tokenizer, ["w1"], chat=True).ids.tolist() == [[5]]
    assert encode(tokenizer, ["w1 w2 w3", "w4"], max_length=2).ids.tolist() == [[6, 7], [8, 3]]  # the last tokens


def test_special_tokens_and_an_end_mark_that_the_text_has(tmp_path):
    from tokenizers.processors import TemplateProcessing

    def made(template):
        tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, words(40)))
        special = [("<s>", 0), ("</s>", 1)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
        return tokenizer

    both = made("<s> $A </s>")
    assert both("w1")["input_ids"] == [0, 5, 1] and encode(both, ["w1"]).ids.tolist() == [[0, 5]]
    assert encode(both, ["w1"], add_special_tokens=False).ids.tolist() == [[5]]
    assert encoded_prompts(made("<s> $A"), ["w1 </s>", "w1"]) == [[0, 5, 1], [0, 5]]


def test_tokens_read_as_they_are(tokenizer):
    assert encode(tokenizer, ["w1 w2 w3", "w4"], side="left").tokens(tokenizer) == [["w1", "w2", "w3"], ["w4"]]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_tokens_keep_the_space_before_a_word(kind):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    mark = "Ġ" if kind == "bytes" else "▁"
    tool = Tokenizer(models.BPE({"a": 0, f"{mark}b": 1, "Ã": 2, "©": 3, mark: 4, "b": 5}, [(mark, "b")]))
    tool.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if kind == "bytes" else None
    tool.decoder = decoders.ByteLevel() if kind == "bytes" else decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tool)
    assert Batch.of([[0, 1, 4, 99]]).tokens(tokenizer) == [["a", " b", " ", "<99>"]]


def test_select_and_as_batch(tokenizer):
    batch = encode(tokenizer, ROWS, side="left")
    assert batch.select(1).ids.tolist() == [ROWS[1]] and len(batch.select(slice(1, 3))) == 2
    for index in ([2, 0], torch.tensor([2, 0]), torch.tensor([True, False, True])):
        assert sorted(batch.select(index).lengths.tolist()) == [1, 3] and batch.select(index).ids.shape[1] == 5
    assert batch.select([2, 0]).last.tolist() == [4, 4] and batch.to("cpu") is batch
    assert as_batch(batch) is batch and as_batch(torch.tensor([[5, 6]])).ids.tolist() == [[5, 6]]
    assert as_batch(["w1"], tokenizer).ids.tolist() == [[5]] and as_batch(ROWS).lengths.tolist() == [3, 5, 1]
    told = as_batch(tokenizer(["w1 w2", "w3"], padding=True, return_tensors="pt"))
    assert told.lengths.tolist() == [2, 1]
    assert Batch.of([[1, 2]], [[0, 1]]).positions.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda t: encode(t, []), "No prompts"),
        (lambda t: encode(t, [5, 6]), r"one prompt of token ids.\nWrap it"),
        (lambda t: encode(t, torch.tensor([5, 6])), r"one prompt of token ids.\nWrap it"),
        (lambda t: encode(t, "w1"), "this is one prompt"),
        (lambda t: encode(t, [{"role": "user", "content": "w1"}]), "one prompt of messages"),
        (lambda t: encode(t, ["w1", 5.0]), "Prompt 1 is no text"),
        (lambda t: encode(t, ["w1", [5, "w2"]]), "Prompt 1 is no text"),
        (lambda t: encode(t, ["w1", ""]), "Prompt 1 has no tokens"),
        (lambda t: encode(t, [[], []]), "Prompt 0 has no tokens"),
        (lambda t: encode(None, ["w1"]), "pass tokenizer="),
        (lambda t: encode(t, ["w1"], side="middle"), "left or right, and not 'middle'"),
        (lambda t: encode(t, ["w1"], max_length=0), "at least 1"),
        (lambda t: as_batch(torch.tensor([5, 6])), r"\(batch, pos\)"),
        (lambda t: as_batch(torch.rand(2, 3)), "whole numbers"),
        (lambda t: Batch.of([[5], [6, 7]]), "need padding"),
        (lambda t: Batch.of([[5, 6]], [[1]]), r"not \(1, 2\) and \(1, 1\)"),
        (lambda t: Batch.of([[5, 6], [5, 6]], [[1, 1], [0, 0]]), "Prompt 1 has no tokens"),
        (lambda t: Batch.of([[5, 6, 7], [5, 6, 7]], [[1, 1, 0], [1, 0, 1]]), "mask of prompt 1 has gaps"),
        (lambda t: encode(t, ROWS).select([]), "No prompts"),
    ],
)
def test_what_is_no_batch_is_a_sentence(tokenizer, wrong, told):
    with pytest.raises(SurgeryError, match=told):
        wrong(tokenizer)


# ---- pairs


def test_a_pair_of_the_zoo_reads_prompts_once():
    pair = Pair.load("tiny-base", "tiny-chain")
    batch = pair.encode(["m 1+1=", "m 2+2=3"], side="left")
    assert batch.ids.equal(encode(pair.tokenizer, ["m 1+1=", "m 2+2=3"], side="left").ids)
    assert not pair.base.lm_head.weight.equal(pair.tuned.lm_head.weight)


def test_an_adapter_on_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_checkpoint(tmp_path / "base")
    model = load(base)[0]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    pair = Pair.load(base, f"{base}+{tmp_path / 'adapter'}")
    batch = pair.encode(["w1 w2", "w3"])
    with untouched(pair.base, pair.tuned, adapted):
        tuned, expected = (m(**batch.inputs(m)).logits[batch.mask] for m in (pair.tuned, adapted.eval()))
        torch.testing.assert_close(tuned, expected, rtol=0, atol=1e-5)
        assert (tuned - pair.base(**batch.inputs(pair.base)).logits[batch.mask]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"layers": 3}, "layers 2, the tuned model 3"),
        ({"hidden": 32}, "hidden size 16, the tuned model 32"),
        ({"num_attention_heads": 4}, "heads 2, the tuned model 4"),
        ({"num_key_value_heads": 2}, "key-value heads 1, the tuned model 2"),
        ({"head_dim": 4}, "head dimension 8, the tuned model 4"),
    ],
)
def test_pairs_need_the_same_architecture(llama, changed, told):
    from helpers import tiny_config
    from transformers import AutoConfig, AutoModelForCausalLM

    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config(**changed)))
    with pytest.raises(SurgeryError, match=f"{told}: pairs need the same architecture"):
        Pair(llama[0], other, llama[1])


def test_gpt2_has_its_own_words_for_the_same_things(llama):
    Pair(gpt2(), gpt2(), llama[1])
    with pytest.raises(
        SurgeryError, match="key-value heads 1, the tuned model 2"
    ):  # 2 layers, 2 heads, width 16 as well
        Pair(llama[0], gpt2(), llama[1])


def test_tokenizers_are_compared_by_the_prompt(tmp_path, llama):
    swapped = words(40)
    swapped[10], swapped[11] = swapped[11], swapped[10]
    pair = Pair.load(tiny_checkpoint(tmp_path / "a"), tiny_checkpoint(tmp_path / "b", tokens=[*swapped, "more"]))
    assert pair.encode(["w1 w2", "w3"]).ids.tolist() == [[5, 6], [7, 3]]  # vocabularies of 40 and 41
    with pytest.raises(SurgeryError, match=r"disagree on prompt 1: base \[5, 10\], tuned \[5, 11\]"):
        pair.encode(["w1", "w1 w6", "w6"])
    assert pair.encode([[10], [11]]).ids.tolist() == [[10], [11]]


def test_chats_are_written_with_the_template_of_the_tuned_model(llama, tmp_path):
    plain = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "plain", words(40), chat_template=None))
    pair = Pair(llama[0], llama[0], plain, llama[1])
    assert pair.encode(["w1"], chat=True).ids.tolist() == [[5]]
    with pytest.raises(SurgeryError, match="no chat template"):
        Pair(llama[0], llama[0], plain).encode(["w1"], chat=True)
