"""Rollouts: what is drawn, from what, and that nothing else depends on it."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.decoding import LocalGenerator, Sampling, draw, truncate, uniforms
from surgery.decoding.sampling import HEAD, _mix
from surgery.errors import SurgeryError

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [5, 6, 7]]
SEEDS = [11, 12, 13, 2**70]


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


@pytest.fixture
def ending(model):
    """The same, with so many end tokens that most completions are short."""
    model.generation_config.eos_token_id = list(range(20, 28))
    return model


def counted(generator):
    """The rows of every call of the generator's decoder, recorded as it works."""
    calls = {"prefill": [], "step": []}
    for name, rows in calls.items():
        inner = getattr(generator.decoder, name)

        def outer(first, *rest, inner=inner, rows=rows):
            rows.append(len(first))
            return inner(first, *rest)

        setattr(generator.decoder, name, outer)
    return calls


# ---- a model


def test_greedy_completions_are_those_of_generate(ending, tokenizer):
    prompts = [*PROMPTS, *([i, i] for i in range(5, 15))]
    rollouts = LocalGenerator(ending, tokenizer, Sampling(16, temperature=0))(prompts, 2, range(14))
    assert any(not r.truncated for r in rollouts) and any(r.truncated for r in rollouts)
    ends = [*ending.generation_config.eos_token_id, tokenizer.eos_token_id]
    for i, prompt in enumerate(prompts):
        more = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 3, "eos_token_id": ends}
        alone = ending.generate(torch.tensor([prompt]), **more)[0, len(prompt) :].tolist()
        for rollout in rollouts[2 * i : 2 * i + 2]:
            assert rollout.completion_ids == alone and rollout.prompt_ids == prompt
            assert rollout.truncated == (alone[-1] not in ends)
            told = alone if rollout.truncated else alone[:-1]  # the end token is no text, whatever else it is
            assert rollout.text == tokenizer.decode(told, skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_the_teacher_forced_ones(ending, tokenizer, temperature):
    sampling = Sampling(12, temperature=temperature, top_p=0.8, top_k=20, min_p=0.01)
    for rollout in LocalGenerator(ending, tokenizer, sampling)(PROMPTS, 3, SEEDS):
        logits = ending(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0, :-1]
        whole = (logits / (temperature or 1)).log_softmax(-1)[len(rollout.prompt_ids) - 1 :]
        expected = whole.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.log_probs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 256])
def test_a_row_does_not_depend_on_the_others(ending, tokenizer, batch_size):
    """Not on the batch, its size, the padding, identical prompts, or rows that left; nor on the size of its group."""
    sampling = Sampling(20, batch_size=batch_size)
    rollouts = LocalGenerator(ending, tokenizer, sampling)(PROMPTS, 4, SEEDS)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = LocalGenerator(ending, tokenizer, dataclasses.replace(sampling, batch_size=64))([prompt], 3, [seed])
        assert [r.completion_ids for r in alone] == [r.completion_ids for r in rollouts[4 * i : 4 * i + 3]]
    assert len({tuple(r.completion_ids) for r in rollouts}) > 12


def test_a_longer_limit_only_continues(ending, tokenizer):
    short, long = (LocalGenerator(ending, tokenizer, Sampling(n))(PROMPTS, 3, SEEDS) for n in (5, 15))
    assert all(b.completion_ids[:5] == a.completion_ids for a, b in zip(short, long, strict=True))


def test_a_prompt_is_read_once_for_its_group_and_for_its_copies(model, tokenizer):
    generator = LocalGenerator(model, tokenizer, Sampling(4))
    calls = counted(generator)
    generator(PROMPTS, 6, SEEDS)
    assert calls == {"prefill": [3], "step": [24] * 3}


def test_prompts_of_similar_length_are_read_together(model, tokenizer):
    generator = LocalGenerator(model, tokenizer, Sampling(1, batch_size=2))
    shapes, inner = [], generator.decoder.prefill
    generator.decoder.prefill = lambda ids, mask: shapes.append(tuple(ids.shape)) or inner(ids, mask)
    prompts = [[5], [6] * 20, [7] * 2, [8] * 19]
    assert [r.prompt_ids for r in generator(prompts, 1, SEEDS)] == prompts
    assert shapes == [(2, 20), (2, 2)]


def test_a_group_larger_than_the_batch_is_read_once_too(model, tokenizer):
    generator = LocalGenerator(model, tokenizer, Sampling(2, batch_size=4))
    calls = counted(generator)
    generator(PROMPTS[:2], 10, [0, 1])
    assert calls == {"prefill": [1, 1], "step": [4, 4, 2, 4, 4, 2]}


def test_ended_rows_leave_and_the_last_one_ends_the_loop(ending, tokenizer):
    generator = LocalGenerator(ending, tokenizer, Sampling(50))
    calls = counted(generator)
    lengths = [len(r.completion_ids) for r in generator(PROMPTS, 8, SEEDS)]
    assert max(lengths) < 50 and len(calls["step"]) == max(lengths) - 1
    assert sum(calls["step"]) < 1.4 * sum(n - 1 for n in lengths) < 0.6 * 32 * len(calls["step"])


def test_no_mode_or_setting_of_the_model_changes(ending, tokenizer):
    ending.train()
    ending.model.norm.eval()
    ending.config.use_cache = False
    ending.gradient_checkpointing_enable()
    before = [m.training for m in ending.modules()], ending.generation_config.to_dict(), torch.get_rng_state()
    generator = LocalGenerator(ending, tokenizer, Sampling(6))
    drawn = generator(PROMPTS, 2, SEEDS)
    hook = ending.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generator(PROMPTS, 2, SEEDS)
    hook.remove()
    assert [m.training for m in ending.modules()] == before[0]
    assert ending.generation_config.to_dict() == before[1] and torch.equal(torch.get_rng_state(), before[2])
    assert not ending.config.use_cache and ending.model.layers[0].gradient_checkpointing
    assert all(p.grad is None and not p.is_inference() for p in ending.parameters())
    assert drawn == LocalGenerator(ending.eval(), tokenizer, Sampling(6))(PROMPTS, 2, SEEDS)


def test_bfloat16(model, tokenizer):
    rollouts = LocalGenerator(model.bfloat16(), tokenizer, Sampling(8))(PROMPTS, 2, SEEDS)
    assert all(np.isfinite(r.log_probs).all() and len(r.log_probs) == len(r.completion_ids) for r in rollouts)


def test_an_empty_prompt_begins_with_a_token(model, tokenizer):
    assert LocalGenerator(model, tokenizer, Sampling(3))([[]], 1, [0])[0].prompt_ids == [tokenizer.bos_token_id]


def test_bad_input_gets_a_sentence(model, tokenizer):
    generator = LocalGenerator(model, tokenizer, Sampling(10))
    assert len(generator([[5] * 54], 1, [0])) == 1
    with pytest.raises(SurgeryError, match=r"Prompt 1 has 55 tokens, and 10 new ones .* 64"):
        generator([[5], [5] * 55], 2, [0, 1])
    with pytest.raises(SurgeryError, match="2 prompts, but 1 seeds"):
        generator([[5], [5]], 2, [0])
    with pytest.raises(SurgeryError, match="group of 0"):
        generator([[5]], 0, [0])
    assert generator([], 2, []) == []
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    with pytest.raises(SurgeryError, match="prompt 1 are not finite at completion token 0"):
        LocalGenerator(model, tokenizer, Sampling(3, top_p=0.9))([[5], [9]], 2, [0, 1])


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": 2}]
    + [{"max_new_tokens": 0}, {"batch_size": 0}, {"stop": ("",)}],
)
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(SurgeryError, match=f"{next(iter(wrong))} is"):
        Sampling(**wrong)


# ---- a script: any decoder will do


class Script:
    """A decoder whose row says what it was told: the prompt's first token is the row of `texts`."""

    def __init__(self, scripts, vocabulary):
        self.scripts, self.vocabulary = scripts, vocabulary

    def prefill(self, ids, mask):
        return self._say(ids[:, -1], 0), ScriptState(ids[:, -1], 0)

    def step(self, tokens, state):
        state.at += 1
        return self._say(state.rows, state.at), state

    def _say(self, rows, at):
        tokens = [self.scripts[r][at] if at < len(self.scripts[r]) else 0 for r in rows.tolist()]
        return torch.nn.functional.one_hot(torch.tensor(tokens), self.vocabulary) * 100.0


class ScriptState:
    def __init__(self, rows, at):
        self.rows, self.at = rows, at

    def repeat(self, times):
        return ScriptState(self.rows.repeat_interleave(times), self.at)

    def select(self, rows):
        return ScriptState(self.rows[rows], self.at)


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token a byte (three for the sign of the euro), and the special tokens <end> and <turn>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    return tokenizer


def say(tokenizer, texts, **sampling):
    scripts = [tokenizer(text)["input_ids"] for text in texts]
    generator = LocalGenerator(Script(scripts, len(tokenizer)), tokenizer, Sampling(40, temperature=0, **sampling))
    return generator([[i] for i in range(len(texts))], 1, [0] * len(texts))


def test_a_row_that_fails_leaves_the_others_of_its_batch(byte_tokenizer):
    """Row 1 is no number: rows that end before it and behind it are drawn before it is told; the next batch is not."""

    class Broken(Script):
        def _say(self, rows, at):
            return super()._say(rows, at).masked_fill((rows == 1)[:, None], torch.nan)

    end = byte_tokenizer.convert_tokens_to_ids("<end>")
    decoder = Broken([[5, end], [5], [5, 6, 7, 8, end], [5, end]], len(byte_tokenizer))
    draws = LocalGenerator(decoder, byte_tokenizer, Sampling(6, stop=("<end>",), batch_size=3)).draw(
        [[0], [1], [2], [3]], 1, range(4)
    )
    with pytest.raises(SurgeryError, match="prompt 1 are not finite at completion token 0"):
        found = {}
        for row, one in draws:
            found[row] = one.completion_ids
    assert found == {0: [5, end], 2: [5, 6, 7, 8, end]}


def test_stop_strings_cut_the_text_and_keep_the_tokens_that_completed_them(byte_tokenizer):
    texts = ["no\n\nmore", "ab€€cd", "x<turn>\n<turn>\nyes", "€" * 13, "one<end>", "\n\n", "a<turn>b"]
    found = say(byte_tokenizer, texts, stop=("\n\n", "€€", "<turn>!"))
    assert [r.text for r in found] == ["no", "ab", "x", "", "one", "", "ab" + "!" * 37]
    kept = ["no\n\n", "ab€€", "x<turn>\n<turn>\n", "€€", "one<end>", "\n\n", "a<turn>b" + "!" * 37]
    assert [byte_tokenizer.decode(r.completion_ids) for r in found] == kept
    assert [r.truncated for r in found] == [False] * 6 + [True]


def test_a_special_token_as_a_stop_string_ends_like_an_end_token(byte_tokenizer):
    (found,) = say(byte_tokenizer, ["a<turn>b"], stop="<turn>")
    assert found.text == "a" and not found.truncated and len(found.completion_ids) == 2


def test_a_completion_that_ends_at_once_holds_the_end_token(byte_tokenizer):
    (found,) = say(byte_tokenizer, ["<end>"])
    assert found.completion_ids == [byte_tokenizer.eos_token_id] and found.text == "" and not found.truncated


def test_without_an_end_token_every_completion_runs_to_the_limit(byte_tokenizer):
    plain = type(byte_tokenizer)(tokenizer_object=byte_tokenizer.backend_tokenizer)
    assert [len(r.completion_ids) for r in say(plain, ["ab<end>", "c"])] == [40, 40]
    with pytest.raises(SurgeryError, match="Prompt 0 is empty"):
        LocalGenerator(Script([[1]], 300), plain, Sampling(1))([[]], 1, [0])


# ---- drawing


def test_uniform_numbers_are_those_of_their_row_and_place():
    block = uniforms(SEEDS, 6, 50)
    assert block.shape == (4, 6, 50) and block.dtype == np.float32
    assert np.array_equal(uniforms([SEEDS[2]], 3, 20)[0], block[2, :3, :20])
    assert len(np.unique(block)) > 1190
    many = uniforms(range(50), 20, 100)
    assert many.min() >= 0 and many.max() < 1
    assert abs(many.mean() - 0.5) < 0.005 and abs(many.var() - 1 / 12) < 0.002
    for axis in range(3):
        first, second = np.moveaxis(many, axis, 0)[:-1], np.moveaxis(many, axis, 0)[1:]
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, top_k=4), Sampling(top_p=0.6, min_p=0.1)])
def test_tokens_come_as_often_as_their_probability(sampling):
    logits = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 1.0, 0.0, 1.9])
    count = 10_000
    even = (torch.arange(count) + 0.5) / count
    tokens, log_probs = draw(logits.expand(count, -1), even, sampling)
    whole = (logits / sampling.temperature).softmax(-1)
    expected = truncate(whole[None], sampling)[0]
    expected = expected / expected.sum()
    found = Counter(tokens.tolist())
    assert all(abs(found[i] - count * expected[i].item()) <= 1.01 for i in range(7))
    torch.testing.assert_close(log_probs, whole.log()[tokens])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(2, 60), st.floats(0.05, 5), st.integers(0, 10), st.floats(0.05, 1),
    st.floats(0, 0.5),
)  # fmt: skip
def test_truncation_is_that_of_transformers(seed, size, temperature, top_k, top_p, min_p):
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(5, size, generator=generator) / temperature
    kept = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    kept = TopPLogitsWarper(top_p)(None, kept) if top_p < 1 else kept
    kept = MinPLogitsWarper(min_p)(None, kept) if min_p else kept
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    before = logits.softmax(-1)
    probs = truncate(before, sampling)
    assert torch.equal(probs > 0, (kept > -torch.inf) & (before > 0))  # float32 has no probability below e^-103
    for extreme in (0.0, 1 - 2**-24):  # what is drawn was not cut, at the ends of the interval either
        tokens, _ = draw(logits * temperature, torch.full((5,), extreme), sampling)
        assert (probs.gather(1, tokens[:, None]) > 0).all()


@pytest.mark.parametrize("size", [7, HEAD, 3 * HEAD])
@pytest.mark.parametrize("top_k", [0, 5, 2 * HEAD])
def test_top_p_is_that_of_a_whole_sort(size, top_k):
    """With ties (as bfloat16 has them), flat rows beside peaked ones, rows of equals, and each row as it is alone."""
    generator = torch.Generator().manual_seed(size + top_k)
    rows = [scale * torch.randn(size, generator=generator) for scale in (0, 0.01, 1, 3, 10)]
    probs = torch.stack([*(row.bfloat16().float() for row in rows), *rows]).softmax(-1)
    left = truncate(probs, Sampling(top_k=top_k))
    for top_p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 1e-9):
        ordered, order = left.sort(dim=-1, descending=True, stable=True)
        whole = ordered.cumsum(-1) - ordered < top_p * left.sum(-1, keepdim=True)
        expected = torch.zeros_like(left).scatter(1, order, ordered.where(whole, 0.0))
        sampling = Sampling(top_k=top_k, top_p=top_p)
        assert torch.equal(truncate(probs, sampling), expected)
        assert torch.equal(torch.cat([truncate(row[None], sampling) for row in probs]), expected)


def test_only_rows_that_are_flat_are_sorted_whole(monkeypatch):
    size, sizes = 3 * HEAD, []
    probs = torch.stack([torch.zeros(size), torch.arange(size).float()]).softmax(-1)
    sort = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, *a, **k: sizes.append(self.shape) or sort(self, *a, **k))
    assert (truncate(probs, Sampling(top_p=0.5)) > 0).sum(1).tolist() == [size // 2, 1] and sizes == [(1, size)]


def test_logits_that_are_not_finite_crash_nothing():
    logits = torch.tensor([[torch.nan] * 4, [0.0, torch.inf, 0, 0], [0.0, -torch.inf, 0, 0]])
    for sampling in (Sampling(), Sampling(temperature=0), Sampling(top_k=2, top_p=0.5, min_p=0.1)):
        tokens, log_probs = draw(logits, torch.tensor([0.9, 0.9, 0.9]), sampling)
        assert log_probs.isfinite().tolist() == [False, False, True] and (tokens < 4).all()


def test_the_numbers_of_a_seed_stay_the_same():
    """Recorded runs can be repeated only while this holds. The mixing is SplitMix64's: its first two numbers."""
    assert _mix(np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    numbers = (uniforms([0, 7], 1, 3) * 2**24).astype(int).tolist()
    assert numbers == [[[2327157, 4332975, 9644222]], [[10223943, 1679045, 4909740]]]
