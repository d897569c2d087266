"""The algebra of models, what a member reads, how often a model runs, and what is refused."""

import math

import pytest
import torch
from llamas import PROMPTS, llama, recomputed, tokenizer, widened

from surgery.decoding import Sampling
from surgery.errors import SurgeryError
from surgery.logits import generate, log_likelihood, member, perplexity, rules, stream
from surgery.logits.lockstep import premature

GREEDY = Sampling(12, temperature=0.0)


@pytest.fixture(scope="module")
def a():
    return member(llama(1, hidden=32, layers=3), tokenizer(), name="a")


@pytest.fixture(scope="module")
def b():
    return member(llama(2), tokenizer(), name="b")


@pytest.fixture(scope="module")
def c():
    return member(llama(3), tokenizer(), name="c")


def tokens(model, prompts=PROMPTS, **more):
    return [g.completion_ids for g in generate(model, prompts, sampling=GREEDY, **more)]


class Calls:
    """Counts the forward passes of a model, and the columns of logits that each makes."""

    def __init__(self, model):
        self.rows, self.widths = [], []
        self.hooks = [
            model.model.register_forward_hook(lambda m, i, out: self.rows.append(out.last_hidden_state.shape[:2])),
            model.lm_head.register_forward_hook(lambda m, i, out: self.widths.append(out.shape[1])),
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def test_equal_terms_meet(a, b, c):
    assert str(a + 2 * (b - c)) == "a + 2*b - 2*c"
    assert str(a + (b - a)) == "b" and str(-(a - b) / 2) == "-0.5*a + 0.5*b"
    assert str(a + 0 * (b - c)) == "a"
    assert (a + b).weights == [1.0, 1.0] and (b - c + a).base is b.base
    assert (b - c + a).based_on(a).base is a.base


def test_sums_that_make_no_sense(a, b):
    for wrong in (lambda: a + 1, lambda: a * b, lambda: 2 - a, lambda: a / b, lambda: a * True):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(SurgeryError, match="finite"):
        _ = a + math.inf * b
    with pytest.raises(SurgeryError, match="finite"):
        _ = math.nan * a
    with pytest.raises(ZeroDivisionError):
        _ = a / 0
    with pytest.raises(SurgeryError, match="Nothing is left"):
        generate(a - a, PROMPTS)
    with pytest.raises(SurgeryError, match="one filter|an ensemble has one"):
        _ = a.filtered("top_k", 3) + b.filtered("top_k", 3)
    with pytest.raises(SurgeryError, match="no member"):
        (a + b).based_on(member(llama(7), tokenizer(), name="x"))


def test_every_model_runs_once_a_token_and_makes_one_row_of_logits(a, b):
    plain = member(a.base.model, tokenizer(), name="plain", prompt=lambda ids: ids[-1:])
    found = a + 0.5 * (b - plain)
    assert len(found.readers) == 2  # made beforehand: this tries the models out
    with Calls(a.base.model) as calls:
        drawn = generate(found, [PROMPTS[0]], sampling=Sampling(8, temperature=0.0))[0].completion_ids
    assert calls.rows[0] == (2, 3)  # both prompts of the model in one batch
    assert calls.rows[1:] == [(2, 1)] * (len(calls.rows) - 1) and len(calls.rows) <= len(drawn)
    assert set(calls.widths) == {1}  # never a prompt's worth of logits
    assert drawn == recomputed(
        [(a.base.model, 1.0, PROMPTS[0]), (b.base.model, 0.5, PROMPTS[0]), (a.base.model, -0.5, PROMPTS[0][-1:])], 8
    )


def test_members_read_prompts_in_their_own_ways():
    chat = member(llama(1), tokenizer(chat=True), name="chat", prompt="chat")
    plain = member(llama(2), tokenizer(), name="plain", prompt="plain")
    found = plain + chat
    text = "2+3="
    (g,) = generate(found, [text], sampling=GREEDY)
    ids = tokenizer()(text)["input_ids"]
    templated = tokenizer()(f"<bos>{text};#")["input_ids"]
    assert templated[0] == 1 and templated[-1] == tokenizer().convert_tokens_to_ids("#")
    expected = recomputed([(plain.base.model, 1.0, ids), (chat.base.model, 1.0, templated)], 12)
    assert g.completion_ids == expected and g.prompt_ids == ids
    for prompt in ([{"role": "user", "content": text}], ids):  # messages; ids of the base
        assert generate(found, [prompt], sampling=GREEDY)[0].completion_ids == expected
    with pytest.raises(SurgeryError, match="plain.*no chat template"):
        generate(member(llama(2), tokenizer(), name="plain"), [[{"role": "user", "content": text}]])


def test_other_ids_for_the_same_strings():
    """A member whose tokenizer numbers the same characters otherwise reads and says its own ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizer().get_vocab()
    order = torch.randperm(42, generator=torch.Generator().manual_seed(0)) + 3
    other = {t: i if i < 3 else int(order[i - 3]) for t, i in words.items()}
    inner = Tokenizer(models.WordLevel(other, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), "isolated")
    inner.decoder = decoders.Fuse()
    moved = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    base, tuned = llama(1), llama(2)
    shuffled = llama(2)
    index = torch.tensor([*range(3), *order.tolist()])
    with torch.no_grad():
        for name in ("model.embed_tokens", "lm_head"):
            mine, theirs = shuffled.get_submodule(name).weight, tuned.get_submodule(name).weight
            mine[index] = theirs.clone()
    one = member(base, tokenizer(), name="base")
    expected = tokens(one + member(tuned, tokenizer(), name="tuned"))
    assert tokens(one + member(shuffled, moved, name="tuned")) == expected


def test_vocabularies_that_differ_are_refused(a):
    with pytest.raises(SurgeryError, match="no tokenizer"):
        generate(a + member(llama(5, vocab=60), name="big"), PROMPTS)


def test_lenses_share_the_models_pass(a):
    model = a.base.model
    lens = member(model, tokenizer(), name="a", layer=1)
    found = a - lens
    with Calls(model) as calls:
        drawn = generate(found, PROMPTS, sampling=Sampling(4, temperature=0.0))
    assert len(found.readers) == 1 and len(calls.rows) <= 4 + 12  # 12: the model is tried out once
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        early = model.lm_head(model.model.norm(out.hidden_states[2][:, -1])).log_softmax(-1)
        best = (out.logits[:, -1].log_softmax(-1) - early).argmax()
    assert drawn[1].completion_ids[0] == int(best)
    with pytest.raises(SurgeryError, match="no layer 9"):
        generate(a - member(model, tokenizer(), name="a", layer=9), PROMPTS)


def test_the_premature_layer_is_the_farthest():
    last = torch.tensor([[[4.0, 0.0, 0.0]], [[0.0, 4.0, 0.0]]])
    near, far = last + 0.1, -last
    assert torch.equal(premature(last, [near, far]), far)
    assert torch.equal(
        premature(last, [last, near + torch.tensor([1.0, 0, 0])])[1], near[1] + torch.tensor([1.0, 0, 0])
    )


def test_dola_of_a_bucket_contrasts_with_one_layer_at_a_time(a):
    found = rules.dola(a, [0, 1], 0.1)
    assert len(found.readers) == 1 and tokens(found) != tokens(a)
    assert tokens(rules.dola(a, [1], 0.1)) == tokens(rules.dola(a, 1, 0.1))
    other = member(llama(8, hidden=32, layers=3), tokenizer(), name="source")
    assert len(rules.dola(a, 1, base=other).readers) == 2


@pytest.mark.parametrize("build", [
    lambda a, b, c: rules.dexperts(a, b, c), lambda a, b, c: rules.dexperts(a, b, c, top_k=3),
    lambda a, b, c: rules.product([a, b, c]), lambda a, b, c: rules.layers(a, {0: 0.2, 1: 0.3}),
    lambda a, b, c: rules.unir(a, [b, c], [0.5, 0.25]), lambda a, b, c: rules.unir(a, {"x": (b, 0.5)}),
    lambda a, b, c: rules.contrastive(a, b, beta=0.5), lambda a, b, c: rules.eft(a, b, c, 2.0, filter_p=0.8),
    lambda a, b, c: rules.eft(a, b, c, filter_p=0.8, filter_on="scores", mode="mask"),
])  # fmt: skip
def test_rules_decode_and_score_what_they_decode(build, a, b, c):
    found = build(a, b, c)
    for g in generate(found, PROMPTS, sampling=Sampling(8), seed=1):
        assert all(map(math.isfinite, g.log_probs))
        (scored,) = log_likelihood(found, [g.prompt_ids], [g.completion_ids], end=False)
        assert torch.allclose(torch.tensor(scored.log_probs), torch.tensor(g.log_probs), atol=1e-4)


def test_dexperts_keeps_to_what_the_base_finds_likely(a, b, c):
    for g in generate(rules.dexperts(a, b, c, top_k=2), PROMPTS, sampling=Sampling(6)):
        ids = g.prompt_ids + g.completion_ids
        logits = a.base.model(torch.tensor([ids])).logits[0]
        for at in range(len(g.prompt_ids), len(ids)):
            assert ids[at] in logits[at - 1].topk(2).indices


def test_rules_refuse_what_they_are_not_for(a, b):
    for wrong in (lambda: rules.cge(a, b, alpha=0), lambda: rules.product([a, b], [0.7, 0.7]),
                  lambda: rules.mixture(a, [b], a, [0.5, 0.5]), lambda: rules.unir(a, [b], [1.0, 2.0]),
                  lambda: rules.eft(a, b, a, filter_p=0.9, filter_on="tall"), lambda: rules.RULES.lookup("efft"),
                  lambda: generate(rules.guidance(a, 2.0), ["text"])):  # fmt: skip
        with pytest.raises(SurgeryError):
            wrong()


# ---- generating


def test_a_stream_is_what_generate_gives(a, b):
    for sampling in (GREEDY, Sampling(12), Sampling(12, temperature=0.7, stop=("ab", "7"))):
        (whole,) = generate(a + b, [PROMPTS[1]], sampling=sampling, seed=4, members=True)
        pieces = list(stream(a + b, PROMPTS[1], sampling=sampling, seed=4))
        assert "".join(p.text for p in pieces) == whole.text
        assert [p.token for p in pieces] == whole.completion_ids
        assert pieces[-1].ended == whole.ended
        assert torch.allclose(torch.tensor([p.log_prob for p in pieces]), torch.tensor(whole.log_probs), atol=1e-5)
        assert torch.allclose(
            torch.tensor([p.members["b"] for p in pieces]), torch.tensor(whole.members["b"]), atol=1e-5
        )


def test_each_of_a_group_can_be_streamed(a, b):
    sampling = Sampling(12, temperature=2.0)
    group = generate(a + b, PROMPTS[:2], sampling=sampling, group=3, seed=4)[3:]
    for sample, one in enumerate(group):
        pieces = stream(a + b, PROMPTS[1], sampling=sampling, seed=4, index=1, sample=sample)
        assert [p.token for p in pieces] == one.completion_ids
    assert len({tuple(one.completion_ids) for one in group}) == 3


def test_members_scores_are_each_models_own(a, b):
    (g,) = generate(a + 0.5 * b, [PROMPTS[1]], sampling=Sampling(6), members=True)
    ids = torch.tensor([g.prompt_ids + g.completion_ids])
    for one in (a, b):
        logits = one.base.model(ids).logits[0, len(g.prompt_ids) - 1 : -1].log_softmax(-1)
        own = logits.gather(1, torch.tensor(g.completion_ids)[:, None])[:, 0]
        assert torch.allclose(own, torch.tensor(g.members[one.base.name]), atol=1e-4)


def test_the_first_end_of_any_member_ends():
    first, second = llama(1), llama(2)
    second.generation_config.eos_token_id = [2, 30]
    found = member(first, tokenizer(), name="x") + member(second, tokenizer(), name="y")
    assert found.ends == {2, 30}
    for g in generate(found, PROMPTS, sampling=Sampling(40), group=4):
        assert not {2, 30} & set(g.completion_ids[:-1])
        assert (g.ended == "eos") == (g.completion_ids[-1] in (2, 30))


def test_ctrl_c_leaves_what_is_there(a, b):
    found = a + b
    expected = tokens(found)
    step, left = found.step, [5]

    def interrupted(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(*args)

    found.step = interrupted
    drawn = generate(found, PROMPTS, sampling=GREEDY, members=True)
    assert len(drawn) == len(PROMPTS)
    for g, whole in zip(drawn, expected, strict=True):
        assert g.completion_ids == whole[:6] and len(g.log_probs) == len(g.completion_ids)
        assert len(g.members["a"]) == len(g.completion_ids)
        assert g.ended == ("interrupted" if len(whole) > 6 else "eos")


def test_a_prompt_that_does_not_fit_names_the_member(a):
    short = member(llama(2, max_position_embeddings=16), tokenizer(), name="short")
    with pytest.raises(SurgeryError, match="'short' of 16"):
        generate(a + short, [list(range(3, 18))], sampling=GREEDY)
    with pytest.raises(SurgeryError, match="'short'.*16"):
        log_likelihood(a + short, ["abcdefgh"], ["abcdefghijk"])


def test_logits_that_are_no_numbers_name_the_member(a):
    broken = llama(2)
    with torch.no_grad():
        broken.lm_head.weight[4] = math.nan
    found = a + member(broken, tokenizer(), name="broken")
    with pytest.raises(SurgeryError, match="'broken'"):
        generate(found, PROMPTS, sampling=GREEDY)
    with pytest.raises(SurgeryError, match="'broken'"):
        log_likelihood(found, ["ab"], ["cd"])
    with pytest.raises(SurgeryError, match="'broken'"):
        list(stream(found, "ab", sampling=GREEDY))


@pytest.mark.parametrize("prompt", ["ab", [5, 6], [{"role": "user", "content": "ab"}]])
def test_one_prompt_that_is_in_no_list(a, prompt):
    with pytest.raises(SurgeryError, match="Wrap it|in a list"):
        generate(a, prompt)


def test_a_model_without_a_cache_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=45, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(SurgeryError, match="key-value cache"):
        generate(member(MambaForCausalLM(config), tokenizer(), name="mamba"), PROMPTS)


def test_bfloat16_members_are_combined_in_float32(a, b):
    import copy

    half = member(copy.deepcopy(a.base.model).bfloat16(), tokenizer(), name="half")
    (g,) = generate(half + b, [PROMPTS[0]], sampling=GREEDY)
    scores, state = (half + b).prefill(torch.tensor([PROMPTS[0]]), torch.ones(1, 3))
    assert scores.dtype == torch.float32 and all(one.dtype == torch.float32 for one in state.log_probs)
    assert all(map(math.isfinite, g.log_probs))


def test_padding_of_one_member_is_no_token_of_the_sum(a):
    wide = member(widened(llama(2), 19), tokenizer(), name="wide")
    assert (wide + a).vocabulary == 45 and (a + wide).vocabulary == 45


# ---- given texts


def test_given_texts_are_scored_as_by_whole_forwards(a, b):
    texts = [("ab", "cdef"), ("", "xyz"), ("12345", "6")]
    prompts = [[1, *tokenizer()(p)["input_ids"]] for p, _ in texts]
    found = a + 0.7 * b
    scored = log_likelihood(found, prompts, [r for _, r in texts], batch_size=2)
    for prompt, (_, response), s in zip(prompts, texts, scored, strict=True):
        ids = [*tokenizer()(response)["input_ids"], 2]
        assert s.ids == ids
        logits = [m.base.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] for m in (a, b)]
        total = (logits[0] + 0.7 * logits[1]).log_softmax(-1)
        expected = total.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(s.log_probs), expected, atol=1e-4)
    count = sum(len(s.ids) for s in scored)
    assert math.isclose(perplexity(scored), math.exp(-sum(sum(s.log_probs) for s in scored) / count), rel_tol=1e-9)


def test_blocks_of_places_change_nothing(a, b, monkeypatch):
    prompts, responses = PROMPTS, [list(range(5, 5 + n)) for n in (9, 1, 4, 17)]
    whole = log_likelihood(a + b, prompts, responses)
    monkeypatch.setattr("surgery.logits.score.POSITIONS", 4)
    for one, other in zip(whole, log_likelihood(a + b, prompts, responses), strict=True):
        assert torch.allclose(torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-5)


def test_texts_that_a_filter_leaves_out_are_impossible(a):
    (scored,) = log_likelihood(a.filtered("top_k", 1), [PROMPTS[0]], [[7, 8, 9]])
    assert -math.inf in scored.log_probs and perplexity([scored]) == math.inf


def test_bad_texts_get_a_sentence(a):
    for prompts, responses in (([[5]], []), ([[5]], [""]), (["", "a"], ["a"])):
        with pytest.raises(SurgeryError):
            log_likelihood(a, prompts, responses, end=False)


def test_a_foreign_member_follows_the_text(a):
    """With the same tokenizer under another object, following the text is reading the tokens."""
    from copy import deepcopy

    expected = tokens(a + member(llama(2), tokenizer(), name="b"))
    foreign = member(llama(2), deepcopy(tokenizer()), name="b", foreign=True)
    assert tokens(a + foreign) == expected
    with pytest.raises(SurgeryError, match="follows a base"):
        generate(foreign, PROMPTS, sampling=GREEDY)


def test_by_default_as_far_as_contexts_go(a):
    silent = llama(2, max_position_embeddings=20)
    with torch.no_grad():
        silent.lm_head.weight[2] = -40 * silent.model.norm.weight  # hardly ever ends
    drawn = generate(member(silent, tokenizer()), [PROMPTS[0], PROMPTS[1]])
    assert max(len(g.completion_ids) for g in drawn) <= 13 and all(g.completion_ids for g in drawn)
    assert "".join(p.text for p in stream(member(silent, tokenizer()), PROMPTS[1])) == drawn[1].text
