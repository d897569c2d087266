"""Speculation says what plain decoding says: token for token when greedy, in law when sampling, whatever drafts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from llamas import PROMPTS, llama, tokenizer, widened
from scipy.stats import chi2
from torch import nn

from surgery.decoding import Sampling, undisturbed
from surgery.errors import SurgeryError
from surgery.logits import Ensemble, Member, generate, member, rules, speculate
from surgery.logits.speculative import LONGEST, _Speculator, accepted, drawn, probabilities, residual

TINY = ["m 123+456=", "m 17+25=", "c 12345=", "s bca:", "r abcd=", "q Who", "1"]
NEW = 16
GREEDY = Sampling(NEW, temperature=0.0)


def near(model, size, seed=1):
    """A copy with noise of `size` times each tensor's spread: it mostly agrees."""
    twin = llama(0, **{k: getattr(model.config, k) for k in ("hidden_size", "num_hidden_layers")})
    twin.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.add_(size * weight.std() * torch.randn(weight.shape, generator=generator))
    return twin


@pytest.fixture(scope="module")
def large():
    return member(llama(1, hidden_size=32), tokenizer(), name="large")


@pytest.fixture(scope="module")
def tuned(large):
    return member(near(large.base.model, 0.05), tokenizer(), name="tuned")


@pytest.fixture(scope="module")
def small():
    return member(llama(2), tokenizer(), name="small")


def assert_same(ensemble, plain, found):
    """The same tokens; where they part, a near tie: the two best within 1e-4 nats (blocks round otherwise)."""
    for one, other in zip(plain, found, strict=True):
        a, b = one.completion_ids, other.completion_ids
        parts = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if parts is not None:
            ids = torch.tensor([[*one.prompt_ids, *a[:parts]]])
            with undisturbed(*ensemble.models):
                best = ensemble.prefill(ids, torch.ones_like(ids))[0].log_softmax(-1).topk(2).values[0]
            assert best[0] - best[1] < 1e-4, (a, b, parts)
            continue
        assert (a, one.text, one.ended) == (b, other.text, other.ended)
        assert np.allclose(one.log_probs, other.log_probs, atol=2e-4)  # nats; float32 in other blocks
        assert one.members.keys() == other.members.keys()
        for name, values in one.members.items():
            assert np.allclose(values, other.members[name], atol=5e-4), name


def check(ensemble, draft, prompts=PROMPTS, sampling=GREEDY, **more):
    plain = generate(ensemble, prompts, sampling=sampling, members=True)
    found = speculate(ensemble, prompts, draft=draft, sampling=sampling, members=True, **more)
    assert_same(ensemble, plain, found)
    assert found.report.tokens == [len(one.completion_ids) for one in found]
    return found


@pytest.fixture(scope="module")
def family():
    return [member(name) for name in ("tiny-base", "tiny-small-chain", "tiny-small-base")]


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_greedy_is_plain_greedy_on_the_tiny_family(k, family):
    large, tuned, small = family
    twin = member(tuned.base.model, tuned.base.tokenizer, prompt=lambda prompt: prompt, name="no member")
    ensemble = large + (tuned - small)
    plain = generate(ensemble, TINY, sampling=GREEDY, members=True)
    for draft, adaptive in ((tuned, False), (tuned, True), (small, True), (twin, k > 2)):
        found = speculate(ensemble, TINY, draft=draft, sampling=GREEDY, members=True, k=k, adaptive=adaptive)
        assert_same(ensemble, plain, found)
        assert 0 < found.report.accept_rate < 1


def test_greedy_is_plain_greedy_for_all_kinds_of_compositions(large, tuned, small):
    eft, greedy = large + (tuned - small), Sampling(10, temperature=0.0)
    wide = member(widened(small.base.model, 3), tokenizer(), name="wide")
    asked = member(large.base.model, tokenizer(), prompt=lambda ids: [9, *ids[-1:]], name="asked")
    strange = member(llama(5, vocab=40), letters(), foreign=True, name="strange")
    for ensemble, drafts in (
        (large + 0.3 * (tuned - small), (tuned, large)), (eft.filtered("plausible", 0.1, on=tuned), (tuned, wide)),
        (eft.filtered("nucleus", 0.5, mode="zero_reward"), (small,)), (rules.contrastive(large, small), (large, asked)),
        (rules.dola(large, [0]), (large, tuned)), (rules.guidance(large, 1.5), (large, asked, tuned)),
        (large + 0.5 * wide, (wide, asked)), (large + asked, (asked, large)), (large, (asked, small)),
        ((large + 0.3 * strange).where_missing("zero_reward"), (tuned, strange)), (large, (strange,)),
    ):  # fmt: skip
        plain = generate(ensemble, PROMPTS[:2], sampling=greedy, members=True)
        for draft in drafts:
            found = speculate(ensemble, PROMPTS[:2], draft=draft, sampling=greedy, members=True, k=3)
            assert_same(ensemble, plain, found)


def letters():
    """The words of `tokenizer()` in another order, as a tokenizer that splits by characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<end>", *reversed(tokenizer_words())]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")


def tokenizer_words():
    return [*"abcdefghijklmnopqrstuvwxyz0123456789+="]


def test_texts_and_chats_are_read_by_each_in_its_own_way():
    base, chat = llama(1), near(llama(1), 0.05)
    large = member(base, tokenizer(chat=True), prompt="plain", name="large")
    tuned = member(chat, tokenizer(chat=True), prompt="chat", name="tuned")
    for draft in (large, tuned, member(llama(4), tokenizer(chat=True), prompt="chat", name="other")):
        check(large + 0.5 * tuned, draft, ["abc", "1+1="])
        check(large + 0.5 * tuned, draft, [[{"role": "user", "content": "ab"}]])


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_sliding_windows_are_cropped_exactly(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {
        "vocab_size": 45, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "max_position_embeddings": 96,
        "sliding_window": 6, "initializer_range": 0.5, "tie_word_embeddings": False, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    if family == "gemma3_text":
        size["layer_types"] = ["sliding_attention", "full_attention"]
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **size)).eval())
    twin = AutoModelForCausalLM.from_config(made[0].config).eval()
    twin.load_state_dict({k: v * 1.02 for k, v in made[0].state_dict().items()})
    large, small, tuned = (member(m, tokenizer(), name=n) for m, n in ((made[0], "l"), (made[1], "s"), (twin, "t")))
    for ensemble in (large, large + 0.2 * (tuned - small)):
        found = check(ensemble, tuned)
        assert 0 < found.report.accept_rate < 1
        check(ensemble, small)
    ids = torch.tensor([PROMPTS[1]])
    alone = made[0].generate(ids, do_sample=False, max_new_tokens=NEW, eos_token_id=2)[0, ids.shape[1] :].tolist()
    assert speculate(large, [PROMPTS[1]], draft=tuned, sampling=GREEDY)[0].completion_ids == alone


def test_caches_after_a_crop_are_those_of_the_text_read_anew(large, tuned, small):
    ensemble = large + (tuned - small)
    run = _Speculator(ensemble, tuned, Sampling(20, temperature=1.0), False, 4, True)
    told = []
    keep = run._round

    def rounds(index, row, k):
        drafted, kept = keep(index, row, k)
        read = row.ids[:-1]
        for reader, state in zip(run.readers, row.parts, strict=True):
            assert state.length == int(state.positions) == len(PROMPTS[1]) + len(read)
            fresh = reader.prefill([((*PROMPTS[1], *read),)])[1]
            for have, want in zip(state.cache.layers, fresh.cache.layers, strict=True):
                torch.testing.assert_close(have.keys, want.keys, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(have.values, want.values, atol=1e-5, rtol=1e-4)
        told.append((drafted, kept))
        return drafted, kept

    run._round = rounds
    with undisturbed(*run._models):
        run.complete(0, run._readable(0, PROMPTS[1]), 3)
    assert any(kept < drafted for drafted, kept in told) and any(kept == drafted for drafted, kept in told)


def test_the_draft_as_its_own_target_is_always_right_and_draws_what_plain_decoding_draws(large):
    for sampling in (GREEDY, Sampling(NEW), Sampling(NEW, temperature=0.7, top_p=0.8), Sampling(NEW, top_k=5)):
        found = check(large, large, sampling=sampling)
        assert found.report.accept_rate == 1 and found.report.accepted == found.report.drafted


def test_calls_are_what_rounds_need_and_drafts_grow_and_shrink(large, tuned, small):
    prompt, sampling = PROMPTS[1], Sampling(40, temperature=1.0)
    found = speculate(large + (tuned - small), [prompt], draft=tuned, sampling=sampling, k=3, seed=1)
    report = found.report
    (drafted,), (kept,) = report.drafted, report.accepted
    assert report.calls["large"] == report.calls["small"] == 1 + report.rounds
    whole = sum(d == a for d, a in zip(drafted, kept, strict=True))
    ended = found[0].ended == "eos" and drafted[-1] == kept[-1] and 1 + sum(kept) + len(kept) > report.tokens[0]
    assert report.calls["tuned"] == 1 + sum(drafted) + whole - ended  # a row more where all was kept
    k, told, full = 3, 1, 0
    for d, a in zip(drafted, kept, strict=True):
        assert a <= d <= min(k, 40 - told - 1)
        full += d == min(k, 40 - told - 1)  # but for a drafted end, which is the last that is drafted
        k, told = min(k + 2, LONGEST) if d == a else max(k - 1, 1), told + a + 1
    assert full > 0.7 * report.rounds and len(set(drafted)) > 2
    assert report.accept_rate == sum(kept) / (sum(kept) + report.rounds - whole)
    assert report.mean_accepted == sum(kept) / report.rounds
    assert report.tokens_per_round == (report.tokens[0] - 1) / report.rounds
    assert report.summary()["tokens_per_s"] == sum(report.tokens) / sum(report.seconds)
    fixed = speculate(large + (tuned - small), [prompt], draft=tuned, sampling=sampling, k=3, adaptive=False).report
    assert {3} <= set(fixed.drafted[0]) <= {0, 1, 2, 3} and "tokens in" in str(fixed)


def test_a_draft_outside_is_one_more_reader_that_reads_every_token_once(large, small):
    found = speculate(large, [PROMPTS[1]], draft=small, sampling=Sampling(20, temperature=1.0), seed=2)
    report = found.report
    assert report.calls["large"] == 1 + report.rounds
    assert report.calls["small"] == 1 + sum(map(sum, report.drafted))
    assert report.calls.keys() == {"large", "small"}
    twin = member(small.base.model, tokenizer(), name="large")
    assert "large (draft)" in speculate(large, [[5]], draft=twin, sampling=GREEDY).report.calls


@pytest.mark.parametrize("new", [1, 2, 3, 7])
def test_lengths_are_exact_and_noise_is_a_function_of_place(large, tuned, small, new):
    ensemble, sampling = large + (tuned - small), Sampling(new, temperature=1.3)
    found = speculate(ensemble, PROMPTS * 3, draft=tuned, sampling=sampling, seed=5)
    assert all(len(one.completion_ids) == new or one.ended == "eos" for one in found)
    assert any(one.ended == "length" and one.truncated for one in found)
    assert all(count < new for row in found.report.drafted for count in row)
    part = speculate(ensemble, (PROMPTS * 3)[:5], draft=tuned, sampling=sampling, seed=5)
    assert [one.completion_ids for one in part] == [one.completion_ids for one in found[:5]]
    other = speculate(ensemble, PROMPTS * 3, draft=tuned, sampling=sampling, seed=6)
    assert [one.completion_ids for one in other] != [one.completion_ids for one in found]


def test_ends_and_stop_strings_inside_a_block_end_the_text_there(large, tuned, small):
    ensemble = large + (tuned - small)
    plain = generate(ensemble, PROMPTS, sampling=GREEDY)
    for at in (3, 4, 5, 6, 7):
        stop = plain[1].text[at : at + 2]
        found = check(ensemble, tuned, sampling=Sampling(NEW, temperature=0.0, stop=(stop,)), k=8)
        assert found[1].ended == "stop" and stop not in found[1].text
    ended = 0
    for seed in range(3):
        found = speculate(ensemble, PROMPTS, draft=large, sampling=Sampling(40), seed=seed, k=6)
        for one in found:
            assert 2 not in one.completion_ids[:-1]
            assert (one.ended == "eos") == (one.completion_ids[-1] == 2)
            ended += one.ended == "eos"
    assert ended > 1


def test_context_limits_count_for_members_and_draft(large):
    short = member(llama(2, max_position_embeddings=20), tokenizer(), name="short")
    long = [5] * 15
    for ensemble, draft in ((large, short), (large + short, large)):
        with pytest.raises(SurgeryError, match="don't fit into the context of 'short'"):
            speculate(ensemble, [[5], long], draft=draft, sampling=Sampling(6, temperature=0.0))
        check(ensemble, draft, [[5], long], Sampling(5, temperature=0.0), k=9)  # to the last column


def test_what_is_no_draft_is_refused_in_a_sentence(large, tuned, small):
    for draft in (tuned - small, 2 * tuned, tuned.filtered("top_k", 3), llama(1)):
        with pytest.raises(SurgeryError, match="A draft is one model"):
            speculate(large, [[5]], draft=draft, sampling=GREEDY)
    with pytest.raises(SurgeryError, match="What judges drafts is an ensemble"):
        speculate(large.base.model, [[5]], draft=tuned)
    for k in (0, 1.5, True):
        with pytest.raises(SurgeryError, match="drafts have 1 token or more"):
            speculate(large, [[5]], draft=tuned, k=k)
    broken = member(llama(6), tokenizer(), name="broken")
    with torch.no_grad():
        broken.base.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(SurgeryError, match="'broken' are not numbers"):
        speculate(large + broken, [[5]], draft=large, sampling=GREEDY)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(20, temperature=1.5, stop=("ab", "7"))])
def test_it_shows_tokens_as_rounds_bring_them(large, tuned, small, sampling):
    seen = []
    found = speculate(
        large + (tuned - small), PROMPTS, draft=tuned, sampling=sampling, seed=2, members=True,
        show=lambda place, piece: seen.append((place, piece)),
    )  # fmt: skip
    assert [place for place, _ in seen] == [i for i, one in enumerate(found) for _ in one.completion_ids]
    for i, one in enumerate(found):
        pieces = [piece for place, piece in seen if place == i]
        assert "".join(piece.text for piece in pieces) == one.text
        assert [piece.token for piece in pieces] == one.completion_ids
        assert [piece.log_prob for piece in pieces] == one.log_probs
        assert [piece.members["small"] for piece in pieces] == one.members["small"]
        assert [piece.ended for piece in pieces] == [None] * (len(pieces) - 1) + [one.ended]


def test_interrupted_it_returns_what_is_there(large, tuned, small, monkeypatch):
    from surgery.logits.lockstep import Reader

    whole = speculate(large + (tuned - small), PROMPTS, draft=tuned, sampling=GREEDY)
    calls, read = [], Reader.read

    def stopping(self, tokens, state):
        calls.append(tokens.shape)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return read(self, tokens, state)

    monkeypatch.setattr(Reader, "read", stopping)
    seen = []
    found = speculate(
        large + (tuned - small), PROMPTS, draft=tuned, sampling=GREEDY, members=True, progress=lambda *n: seen.append(n)
    )
    at = next(i for i, one in enumerate(found) if one.ended == "interrupted")
    assert len(found) == len(PROMPTS) and seen == [(i + 1, len(PROMPTS)) for i in range(at)]
    assert [one.completion_ids for one in found[:at]] == [one.completion_ids for one in whole[:at]]
    ids = found[at].completion_ids
    assert ids and ids == whole[at].completion_ids[: len(ids)] and len(ids) == len(found[at].members["large"])
    assert [one.completion_ids for one in found[at + 1 :]] == [[]] * (len(PROMPTS) - at - 1)
    assert sum(found.report.tokens) == sum(len(one.completion_ids) for one in found)


def test_models_are_left_as_they_were(large, tuned, small):
    models = [one.base.model for one in (large, tuned, small)]
    for model in models:
        model.train()
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    speculate(large - small, [[5, 6]], draft=tuned, sampling=GREEDY)
    for model, state in zip(models, before, strict=True):
        assert model.training and all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        assert not model._forward_hooks
        model.eval()


# ---- the law


def counted(tokens, size):
    return np.bincount(np.asarray(tokens), minlength=size).astype(float)


def p_value(counts, law):
    """Chi-square of counts (cell, outcome) against the law of each cell; outcomes expected less than 5 times meet."""
    statistic, freedom = 0.0, 0
    for seen, p in zip(counts, law, strict=True):
        expected = seen.sum() * p
        if expected.max() < 5:
            continue
        if seen[p == 0].any():
            return 0.0
        rare = expected < 5
        pairs = [*zip(seen[~rare], expected[~rare], strict=True)]
        if expected[rare].sum() >= 5:
            pairs.append((seen[rare].sum(), expected[rare].sum()))
        statistic += sum((s - e) ** 2 / e for s, e in pairs) + 0.0
        freedom += len(pairs) - 1
    return float(chi2.sf(statistic, freedom))


def test_kept_and_mended_tokens_have_the_law_of_the_target():
    """100,000 blocks of three at once: every token that a block gives, behind every one before it."""
    rows, k, size = 100_000, 3, 6
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(k, size, generator=generator).mul(1.5).softmax(-1)
    p = torch.randn(k + 1, size, generator=generator).mul(1.5).softmax(-1)
    p[1, 2] = 0  # what the target forbids and the draft says
    p, q[0, 3] = p / p.sum(-1, keepdim=True), 0  # what the draft never says
    q = q / q.sum(-1, keepdim=True)
    noise = torch.rand(rows, 2 * k + 1, 2, generator=generator)[..., 0]
    drafts = torch.stack([drawn(q[i].expand(rows, -1), noise[:, i]) for i in range(k)], 1)
    count = accepted(p[:k].expand(rows, -1, -1), q.expand(rows, -1, -1), drafts, noise[:, k : 2 * k])
    for i in range(k):
        there = count >= i  # token i is the block's own: kept, or mended here
        mended = drawn(residual(p[i : i + 1], q[i : i + 1]).expand(rows, -1), noise[:, 2 * k])
        tokens = torch.where(count > i, drafts[:, i], mended)[there]
        assert p_value([counted(tokens, size)], p[i : i + 1].numpy()) > 1e-3
        assert p_value([counted(drafts[there, i], size)], (p[i : i + 1] + 1e-9).numpy()) < 1e-6  # it could have failed
    least = torch.minimum(p[:k], q).sum(-1)  # Leviathan et al., theorem 3.5: the chance that a draft is kept
    for i in range(k):
        judged = count >= i
        assert float((count[judged] > i).float().mean()) == pytest.approx(float(least[i]), abs=0.01)


def test_nothing_is_left_of_equal_laws_but_the_law_itself():
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    assert torch.equal(residual(p, p), p)
    assert residual(p, torch.tensor([[0.25, 0.75], [0.25, 0.75]])).tolist() == [[0.25, 0.0], [0.25, 0.75]]
    assert accepted(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([1]), torch.zeros(1)).item() == 0  # u = 0, p = 0
    scores = torch.tensor([[0.0, 2.0, 1.0, -math.inf]])
    assert probabilities(scores, GREEDY).tolist() == [[0, 1, 0, 0]]
    assert probabilities(scores, Sampling(top_k=2)).sum().item() == pytest.approx(1)


class Table(nn.Module):
    """Says next tokens by (how many tokens it has read) mod 2 and the last one: logits (2, vocab, vocab)."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.config = SimpleNamespace()

    def get_output_embeddings(self):
        return SimpleNamespace(weight=torch.empty(self.logits.shape[1], 1))


class TableState:
    def __init__(self, length):
        self.length, self.positions = length, torch.tensor([length])

    def crop(self, count):
        self.length -= count


class TableDecoder:
    """A `Table` as a decoder, a look-up a token."""

    context, room = None, 1

    def __init__(self, model):
        self.model, self.models = model, (model,)

    def prefill(self, ids, mask):
        state = TableState(ids.shape[1] - 1)
        return self.read(ids[:, -1:], state)[:, -1], state

    def read(self, ids, state):
        parity = (state.length + torch.arange(ids.shape[1])) % 2
        state.length += ids.shape[1]
        return self.model.logits[parity, ids]


def table(seed, like=None, size=12):
    noise = 1.5 * torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed))
    logits = noise if like is None else like + 0.8 * noise
    logits[..., 2] = -math.inf  # the end never comes
    model = Table(logits)
    one = Member(model, None if seed else WORDS, name=str(seed), decoders={True: TableDecoder(model)})
    return Ensemble([(one, 1.0)]), logits.double().log_softmax(-1)


WORDS = SimpleNamespace(
    bos_token_id=1, eos_token_id=2, added_tokens_decoder={}, decode=lambda ids, **_: "",
    get_vocab=lambda: {str(i): i for i in range(12)}, special_tokens_map={},
)  # fmt: skip


def law(log_probs, weights, sampling, plausible=None):
    """The composition behind the sampler, in numpy: weights, filter, temperature, top-k, top-p, min-p."""
    scores = sum(w * one.numpy().clip(min=-50) for w, one in zip(weights, log_probs, strict=True))
    scores = np.where(np.isfinite(log_probs[0].numpy()), scores, -np.inf)
    if plausible is not None:
        seen = log_probs[1].numpy()
        scores = np.where(seen >= seen.max(-1, keepdims=True) + math.log(plausible), scores, -np.inf)
    found = np.exp((scores - scores.max(-1, keepdims=True)) / sampling.temperature)
    found /= found.sum(-1, keepdims=True)
    if sampling.top_k:
        found *= found >= np.sort(found, -1)[..., -sampling.top_k, None]
    order = np.argsort(-found, -1)
    ordered = np.take_along_axis(found / found.sum(-1, keepdims=True), order, -1)
    keep = np.zeros_like(found, dtype=bool)
    np.put_along_axis(keep, order, ordered.cumsum(-1) - ordered < sampling.top_p, -1)
    found *= keep
    found *= found >= sampling.min_p * found.max(-1, keepdims=True)
    return found / found.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "sampling, plausible, adaptive, inside",
    [
        (Sampling(20_000, temperature=0.7, top_p=0.8), None, False, True),
        (Sampling(20_000, temperature=1.5, top_k=5, min_p=0.1), 0.05, True, False),
    ],
    ids=["temperature and top-p", "filter, top-k and min-p; draft outside"],
)
def test_sampling_has_the_law_of_the_composition(sampling, plausible, adaptive, inside):
    """A chain of 20,000 tokens: how often each token follows each, against large + tuned - small in closed form."""
    large, lp_large = table(0)
    tuned, lp_tuned = table(1, like=large.base.model.logits.detach())
    small, lp_small = table(2)
    ensemble = large + 0.7 * (tuned - 0.5 * small)
    if plausible is not None:
        ensemble = ensemble.filtered("plausible", plausible, on=tuned)
    draft = tuned if inside else table(3, like=large.base.model.logits.detach())[0]
    found = speculate(ensemble, [[5]], draft=draft, sampling=sampling, adaptive=adaptive, k=2, seed=11)
    ids = [5, *found[0].completion_ids]
    assert len(ids) == 20_001 and 0.3 < found.report.accept_rate < 0.95
    counts = np.zeros((2, 12, 12))
    np.add.at(counts, (np.arange(20_000) % 2, ids[:-1], ids[1:]), 1)
    expected = law((lp_large, lp_tuned, lp_small), (1, 0.7, -0.35), sampling, plausible)
    assert p_value(counts.reshape(24, 12), expected.reshape(24, 12)) > 1e-3
    only = law((lp_large, lp_tuned, lp_small), (1, 0.7, -0.15), sampling, plausible)
    assert p_value(counts.reshape(24, 12), only.reshape(24, 12)) < 1e-3  # a weight that is off by 0.2 is noticed


# ---- peers and real models


@pytest.mark.parametrize("k", [3, 5])
def test_with_beta_0_it_is_transformers_assisted_generation(k):
    from surgery.models import load

    (target, words), (assistant, _) = load("tiny-base"), load("tiny-small-chain")
    settings = assistant.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = k, "constant"
    settings.assistant_confidence_threshold = 0.0
    large, tuned = member(target, words, name="large"), member(assistant, words, name="tuned")
    small = member("tiny-small-base")
    calls = []
    hook = target.register_forward_hook(lambda *_: calls.append(1))
    theirs = ours = tokens = 0
    for prompt in TINY:
        ids = words(prompt, return_tensors="pt")
        calls.clear()
        out = target.generate(**ids, assistant_model=assistant, do_sample=False, max_new_tokens=NEW)
        expected = out[0, ids["input_ids"].shape[1] :].tolist()
        found = speculate(
            rules.eft(large, tuned, small, beta=0.0), [prompt], draft=tuned, sampling=GREEDY, k=k, adaptive=False
        )
        assert found[0].completion_ids == expected
        theirs, ours, tokens = theirs + len(calls), ours + found.report.calls["large"], tokens + len(expected)
    hook.remove()
    # Theirs reads the prompt together with the first draft: one call less a prompt. Ours gains on drafts that end.
    assert ours <= theirs + len(TINY) and ours < tokens


@pytest.mark.real
def test_greedy_is_plain_greedy_on_a_real_model():
    import copy

    from surgery.models import load

    model, words = load("smollm2", "float32")
    tuned, small = copy.deepcopy(model), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.dim() > 1:
                weight.add_(0.05 * weight.std() * torch.randn(weight.shape, generator=generator))
    small.model.layers = small.model.layers[:8]
    small.config.num_hidden_layers = 8
    large, tuned, small = (member(m, words, name=n) for m, n in ((model, "large"), (tuned, "tuned"), (small, "small")))
    ensemble = large + 0.3 * (tuned - small)
    prompts = [[{"role": "user", "content": "Name three animals."}], "The capital of France is"]
    found = check(ensemble, tuned, prompts, Sampling(16, temperature=0.0))
    assert found.report.accept_rate > 0.3
