"""What a user gets wrong with members, sums, prompts and texts is told in a sentence, and nothing is done silently."""

import copy
import math

import numpy as np
import pytest
import torch
from llamas import PROMPTS, llama, tokenizer, widened
from torch import nn

from surgery.decoding import LocalGenerator, Sampling
from surgery.errors import SurgeryError
from surgery.logits import Ensemble, generate, log_likelihood, member, perplexity, rules, stream
from surgery.logits.hooks import EnsembleLogitsProcessor, as_generate

GREEDY = Sampling(8, temperature=0.0)
CHAT = [{"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def a():
    return member(llama(1, hidden=32, layers=3), tokenizer(), name="a")


@pytest.fixture(scope="module")
def b():
    return member(llama(2), tokenizer(), name="b")


def tokens(model, prompts=PROMPTS, **more):
    return [g.completion_ids for g in generate(model, prompts, sampling=GREEDY, **more)]


# ---- filters and bases


def test_a_filter_looks_at_the_member_that_is_named(a, b):
    """By name, by model, as a member: never at the base because the name was not understood."""
    expected = tokens((a + b).filtered("top_k", 1, on=b))
    assert expected == tokens(b) and expected != tokens(a)
    for named in ("b", b.base, b.base.model):
        assert tokens((a + b).filtered("top_k", 1, on=named)) == expected
        assert (a + b).based_on(named).base is b.base
    assert tokens((a + b).filtered("top_k", 1, on="base")) == tokens((a + b).filtered("top_k", 1)) == tokens(a)
    assert tokens(a.filtered("top_k", 1, on=b)) == expected  # one that is in no term is read along
    for wrong in ("c", llama(9), 3):
        with pytest.raises(SurgeryError, match="No members of this ensemble"):
            (a + b).filtered("top_k", 1, on=wrong)
        with pytest.raises(SurgeryError, match="No members of this ensemble"):
            (a + b).based_on(wrong)
    with pytest.raises(SurgeryError, match="2 members of this ensemble are 'b'"):
        (b + member(llama(3), tokenizer(), name="b")).filtered("top_k", 1, on="b")


def test_one_filter_does_not_replace_another(a, b):
    with pytest.raises(SurgeryError, match="already \\(plausible\\)"):
        rules.contrastive(a, b).filtered("nucleus", 0.9)


@pytest.mark.parametrize("rule, value", [
    ("plausible", None), ("nucleus", None), ("top_k", None), ("top_k", 2.5), ("top_k", "2"), ("top_k", math.inf),
    ("nucleus", 0), ("nucleus", math.nan), ("plausible", 1.1), ("likely", 0.5),
])  # fmt: skip
def test_a_filter_needs_a_value_in_its_range(a, rule, value):
    with pytest.raises(SurgeryError, match=rule):
        a.filtered(rule, value)


def test_a_broken_member_is_not_filtered_away(a):
    """The filter looks at a member whose logits are no numbers; its reward is not silently zero."""
    broken = llama(2)
    with torch.no_grad():
        broken.lm_head.weight[4] = math.nan
    bad = member(broken, tokenizer(), name="broken")
    for found in (
        rules.eft(a, bad, member(llama(3), tokenizer()), filter_p=0.9, filter_on="tuned"),
        a.filtered("plausible", 0.1, on=bad, mode="zero_reward"), a.filtered("plausible", 0.1, on=bad),
    ):  # fmt: skip
        with pytest.raises(SurgeryError, match="'broken' are not numbers"):
            generate(found, PROMPTS, sampling=GREEDY)


def test_sums_of_many(a, b):
    assert str(sum([a, b, a])) == "2*a + b"
    assert str(np.float64(0.5) * a) == "0.5*a"
    for wrong in ([], [(a, 1.0)]):
        with pytest.raises(SurgeryError):
            Ensemble(wrong)
    with pytest.raises(SurgeryError, match="'zero'"):
        a.where_missing("zero")


# ---- members


@pytest.mark.parametrize("more", [
    {"layer": "2"}, {"layer": True}, {"layer": []}, {"layer": 1.5}, {"prompt": "Q: {}"}, {"token_map": [1]},
])  # fmt: skip
def test_members_that_can_not_be(more):
    with pytest.raises(SurgeryError, match=next(iter(more))):
        member(llama(1), tokenizer(), **more)
    with pytest.raises(SurgeryError, match="tokenizer of"):
        member(llama(1), "tokenizer")


def test_a_member_is_named_briefly(tmp_path):
    llama(1).save_pretrained(tmp_path / "tuned")
    tokenizer().save_pretrained(tmp_path / "tuned")
    loaded = member(tmp_path / "tuned")
    assert str(loaded) == "tuned" == str(member(loaded.base.model, loaded.base.tokenizer))
    assert len(repr(loaded.base)) < 120


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    """transformers makes an empty tokenizer of it, which reads every text as nothing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=45, n_embd=8, n_layer=1, n_head=1, n_positions=16)).save_pretrained(tmp_path)
    with pytest.raises(SurgeryError, match="no tokenizer files"):
        member(tmp_path)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(SurgeryError, match="LlamaModel, which says no next token"):
        generate(member(llama(1).model, tokenizer(), name="x"), PROMPTS)


def test_adapters_have_layers_too():
    """The lens reads through PEFT's wrapper; a model that keeps an adapter's settings without the wrapper decodes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(llama(1), config).eval()
    merged = member(copy.deepcopy(wrapped).merge_and_unload(), tokenizer())
    tuned, bare = member(wrapped, tokenizer(), name="tuned"), wrapped.get_base_model()
    assert tokens(rules.dola(tuned, [0])) == tokens(rules.dola(merged, [0])) != tokens(tuned)
    bare.peft_config = wrapped.peft_config
    assert tokens(member(bare, tokenizer())) == tokens(tuned)


# ---- prompts


@pytest.mark.parametrize("prompt, told", [
    (None, "can't read None"), (5.0, "can't read"), ([5.0, 6.0], "can't read"), (["ab"], "can't read"),
    ([5, 45], "Token 45"), ([5, -1], "Token -1"), (np.array([5.5]), "can't read"), (CHAT, "no chat template"),
])  # fmt: skip
def test_what_is_no_prompt(a, b, prompt, told):
    with pytest.raises(SurgeryError, match=told):
        generate(a + b, [prompt], sampling=GREEDY)
    with pytest.raises(SurgeryError, match=told):
        next(stream(a + b, prompt, sampling=GREEDY))
    with pytest.raises(SurgeryError, match=told):
        log_likelihood(a + b, [prompt], ["ab"])


@pytest.mark.parametrize("prompts", [torch.tensor(PROMPTS[:1]), np.array(PROMPTS[:1]), (x for x in PROMPTS[:1]),
                                     [torch.tensor(PROMPTS[0])]])  # fmt: skip
def test_ids_come_in_any_sequence(a, prompts):
    assert tokens(a, prompts) == tokens(a, PROMPTS[:1])


@pytest.mark.parametrize("prompts", ["ab", {"input_ids": [[5]]}, tokenizer()(["ab"]), CHAT, [5, 6], 5])
def test_prompts_come_in_a_list(a, prompts):
    with pytest.raises(SurgeryError, match="in a list"):
        generate(a, prompts)
    with pytest.raises(SurgeryError, match="in a list"):
        log_likelihood(a, prompts, ["ab"])


def test_ids_that_one_member_has_not(a):
    """Padding of a member's embedding is no token; a prompt's function may give what the member lacks."""
    wide = member(widened(llama(2), 19), tokenizer(), name="wide")
    for found in (a + wide, wide + a):
        with pytest.raises(SurgeryError, match="Token 50"):
            tokens(found, [[5, 50]])
    with pytest.raises(SurgeryError, match="Token 64 in a prompt of 'wide'"):
        tokens(member(wide.base.model, tokenizer(), name="wide", prompt=lambda ids: [64]))
    with pytest.raises(SurgeryError, match="'a' can't read None"):
        tokens(member(a.base.model, tokenizer(), name="a", prompt=lambda ids: None))


@pytest.mark.parametrize("messages", [[{"user": "ab"}], [{"role": "user", "content": [5]}]])
def test_messages_that_can_not_be_read(messages):
    strict = copy.deepcopy(tokenizer())
    strict.chat_template = "{% for m in messages %}{{ m['content'] + ';' }}{% endfor %}"
    for style, told in (("given", "chat template can't take"), ("plain", "finds none")):
        with pytest.raises(SurgeryError, match=f"'x'.*{told}"):
            generate(member(llama(1), strict, name="x", prompt=style), [messages], sampling=GREEDY)


def test_messages_in_parts_are_their_text(a):
    plain = member(a.base.model, tokenizer(), prompt="plain")
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert tokens(plain, [parts]) == tokens(a, ["ab"])


# ---- calls


@pytest.mark.parametrize("more", [{"group": 0}, {"group": 1.5}, {"beams": "4"}, {"sampling": {"temperature": 1}}])
def test_arguments_of_the_wrong_kind(a, more):
    with pytest.raises(SurgeryError, match=f"(?i){next(iter(more))}"):
        generate(a, PROMPTS, **more)


def test_what_decodes(a, b):
    """Names the thing that is no model; a generator's own settings are not silently kept."""
    for wrong in (None, 5, [a, b]):
        with pytest.raises(SurgeryError, match=type(wrong).__name__):
            generate(wrong, PROMPTS)
    own = LocalGenerator(a, tokenizer(), GREEDY)
    assert [g.completion_ids for g in generate(own, PROMPTS)] == tokens(a)
    for more in ({"sampling": GREEDY}, {"beams": 2}):
        with pytest.raises(SurgeryError, match="its own settings"):
            generate(own, PROMPTS, **more)


def test_nnsight_models_are_taken_where_models_are(a):
    pytest.importorskip("nnsight")
    from surgery.interop import to_nnsight

    assert tokens(to_nnsight(a.base.model), tokenizer=tokenizer()) == tokens(a)


def test_between_pieces_of_a_stream_nothing_is_changed(a, b):
    """Two streams that take turns, and one that is left: modes and gradients are the caller's."""
    model = llama(4).train()
    one, two = (stream(member(model, tokenizer()), p, sampling=GREEDY) for p in PROMPTS[:2])
    try:
        for _ in range(2):
            next(one), next(two)
            assert torch.is_grad_enabled() and all(module.training for module in model.modules())
        one.close()
        two.close()
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    with pytest.raises(SurgeryError, match="NoneType"):
        stream(None, "ab")  # told when it is called


def test_rules_take_members(a, b):
    model = a.base.model
    for wrong in (
        lambda: rules.eft("a", b, b), lambda: rules.contrastive(model, b), lambda: rules.proxy_tuning(a, model, b),
        lambda: rules.dexperts(a, b, "b"), lambda: rules.mixture(a, [model], a), lambda: rules.unir(a, {"x": model}),
        lambda: rules.cge(a, model), lambda: rules.guidance(model, 2.0), lambda: rules.product([a, model]),
        lambda: rules.dola(model, 0), lambda: rules.dola(a, 0, base=model), lambda: rules.layers(model, {0: 1.0}),
    ):  # fmt: skip
        with pytest.raises(SurgeryError, match="as `member` gives them"):
            wrong()
    for wrong in (
        lambda: rules.product([]), lambda: rules.dola(a, []), lambda: rules.dola(a, "low"),
        lambda: rules.mixture(a, [b, b, b], a, 0.5), lambda: rules.contrastive(a, b, temperature=0),
    ):  # fmt: skip
        with pytest.raises(SurgeryError):
            wrong()


def test_one_or_more_modules(a, b):
    c = member(llama(3), tokenizer(), name="c")
    assert str(rules.mixture(a, b, c, 0.3)) == str(rules.mixture(a, [b], c, [0.3])) == "a + 0.3*b - 0.3*c"
    assert str(rules.mixture(a, [b, c], a, 0.25)) == "0.25*b + 0.75*c"
    assert str(rules.unir(a, {"x": b, "y": (c, 0.5)}, 0.25)) == "a + 0.25*b + 0.5*c"
    assert str(rules.contrastive(a, b, temperature=0.5)) == "a - 2*b"


def test_an_amateur_at_a_temperature(a, b):
    """log softmax(l_e) - log softmax(l_a / T), by hand."""
    found = rules.contrastive(a, b, temperature=0.5)
    scores, _ = found.prefill(torch.tensor([PROMPTS[0]]), torch.ones(1, 3))
    with torch.no_grad():
        expert, amateur = (m.base.model(torch.tensor([PROMPTS[0]])).logits[0, -1] for m in (a, b))
    by_hand = expert.log_softmax(-1) - (amateur / 0.5).log_softmax(-1)
    by_hand[expert < expert.max() + math.log(0.1)] = -math.inf
    assert torch.allclose(scores[0].softmax(-1), by_hand.softmax(-1), atol=1e-6)


# ---- given texts, and transformers' generate


@pytest.mark.parametrize("responses, told", [
    ("a", "in a list"), ([5], "in a list"), ([[45]], "Token 45 in response 0"), ([[-1]], "Token -1"),
    ([None], "text or"), ([[1.5]], "text or"),
])  # fmt: skip
def test_what_is_no_response(a, responses, told):
    with pytest.raises(SurgeryError, match=told):
        log_likelihood(a, ["b"], responses)


def test_scores_of_what_was_generated(a, b):
    """A completion that ended is scored as it is, end mark and all: no second one is put behind it."""
    drawn = generate(a + b, PROMPTS, sampling=Sampling(40), seed=3)
    assert any(g.ended == "eos" for g in drawn)
    scored = log_likelihood(a + b, [g.prompt_ids for g in drawn], [g.completion_ids for g in drawn])
    for g, s in zip(drawn, scored, strict=True):
        assert s.ids == (g.completion_ids if g.ended == "eos" else [*g.completion_ids, 2])
        assert np.allclose(s.log_probs[: len(g.log_probs)], g.log_probs, atol=1e-4)


def test_an_empty_prompt_is_a_token_to_begin_with(a, b):
    """In scores as in generation, and where only one member's prompt is empty."""
    found = rules.guidance(a, 1.5, unconditioned=lambda prompt: "")
    for ensemble, prompt in ((a + b, ""), (a + b, []), (found, "ab")):
        (g,) = generate(ensemble, [prompt], sampling=Sampling(9), seed=2)
        (s,) = log_likelihood(ensemble, [prompt], [g.completion_ids], end=False)
        assert np.allclose(s.log_probs, g.log_probs, atol=1e-4)
    assert tokens(a, [""]) == tokens(a, [[1]])


def test_guidance_of_a_sum_is_that_of_each_member(a, b):
    from llamas import recomputed

    found = tokens(rules.guidance(a + 0.5 * b, 1.5))
    terms = ((a, 1.0), (b, 0.5))
    expected = [
        recomputed(
            [*((m.base.model, 1.5 * w, p) for m, w in terms), *((m.base.model, -0.5 * w, p[-1:]) for m, w in terms)], 8
        )
        for p in PROMPTS
    ]
    assert found == expected
    for wrong in (lambda: rules.layers(a + b, {0: 1.0}), lambda: rules.layers(a, [0.5])):
        with pytest.raises(SurgeryError, match="of one model"):
            wrong()


def test_a_filter_is_seen(a, b):
    assert repr(rules.contrastive(a, b)) == "<Ensemble a - b, plausible 0.1 on a (mask)>"
    assert repr((a + b).filtered("nucleus", 0.9, on="scores", mode="zero_reward")).endswith("on scores (zero_reward)>")


def test_texts_are_scored_by_what_is_a_model(a, tmp_path):
    a.base.model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    (expected,), (found,) = (log_likelihood(m, [PROMPTS[0]], [[7, 8]]) for m in (a, tmp_path))
    assert np.allclose(found.log_probs, expected.log_probs, atol=1e-6)
    with pytest.raises(SurgeryError, match="Linear"):
        log_likelihood(nn.Linear(2, 2), ["a"], ["b"])
    with pytest.raises(SurgeryError, match="batch_size is 0"):
        log_likelihood(a, ["a"], ["b"], batch_size=0)
    with pytest.raises(SurgeryError, match="no texts"):
        perplexity([])


def test_hooks_take_ensembles(a):
    for wrong in (lambda: as_generate(a.base.model), lambda: EnsembleLogitsProcessor(a.base.model, a)):
        with pytest.raises(SurgeryError, match="LlamaForCausalLM is no ensemble"):
            wrong()
