"""Compositions inside transformers' `generate`: the same tokens as surgery's own, float32, alone and padded."""

import math

import pytest
import torch
from llamas import PROMPTS, llama, recomputed, tokenizer, widened

from surgery.decoding import Sampling
from surgery.errors import SurgeryError
from surgery.logits import generate, member, rules
from surgery.logits.hooks import EnsembleLogitsProcessor, as_generate
from surgery.models import untouched

NEW = 16
GREEDY = Sampling(NEW, temperature=0.0)
WIDTH = max(map(len, PROMPTS))
IDS = torch.tensor([[0] * (WIDTH - len(p)) + p for p in PROMPTS])
MASK = (IDS > 0).long()


@pytest.fixture(scope="module")
def large():
    return member(llama(8, hidden=32, layers=3), tokenizer(), name="large")


@pytest.fixture(scope="module")
def tuned():
    return member(llama(2), tokenizer(), name="tuned")


@pytest.fixture(scope="module")
def small():
    return member(llama(3), tokenizer(), name="small")


@pytest.fixture(scope="module")
def composed(large, tuned, small):
    return large + 1.0 * (tuned - small)


def cut(rows, ends=(2,)):
    """Rows of tokens up to the first end."""
    found = []
    for row in rows.tolist():
        at = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        found.append(row[: at + 1])
    return found


def own(ensemble, prompts=PROMPTS, **more):
    return [one.completion_ids for one in generate(ensemble, prompts, sampling=GREEDY, **more)]


def hooked(ensemble, way, ids=IDS, mask=MASK, **more):
    """The base's model generates, with the ensemble as its loop or as its processor."""
    model = ensemble.base.model
    if way == "loop":
        more["custom_generate"] = as_generate(ensemble)
    else:
        more["logits_processor"] = [EnsembleLogitsProcessor(ensemble, model, more.pop("told", None))]
    words = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False} | more
    return model.generate(ids, **words)


WAYS = pytest.mark.parametrize("way", ["loop", "processor"])


@WAYS
def test_greedy_tokens_are_those_of_surgery(composed, way):
    expected = own(composed)
    assert expected == [recomputed([(m.model, w, p) for m, w in composed.terms], NEW) for p in PROMPTS]
    assert any(row[-1] == 2 for row in expected) and any(len(row) == NEW for row in expected)
    with untouched(*composed.models):
        assert cut(hooked(composed, way)[:, WIDTH:]) == expected
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        ids = torch.tensor([prompt])
        assert cut(hooked(composed, way, ids, torch.ones_like(ids))[:, len(prompt) :]) == [tokens]


@WAYS
def test_every_kind_of_composition(large, tuned, small, way):
    """A filter, another layer of the base, another prompt of the base, a chat template, a padded embedding, weights."""
    chatty = member(tuned.base.model, tokenizer(chat=True), prompt="chat", name="chatty")
    wide = member(widened(large.base.model, 7), tokenizer(), name="wide")
    for ensemble in (
        rules.contrastive(large, small, 0.2),
        rules.dola(large, [0, 1]),
        rules.guidance(large, 1.7),
        large + 0.7 * (chatty - small),
        wide + 0.7 * (tuned - small),
        2.0 * large,
        (tuned - 0.5 * small + large).based_on(large),
    ):
        assert cut(hooked(ensemble, way)[:, WIDTH:]) == own(ensemble), str(ensemble)


@pytest.mark.parametrize("told", [None, MASK], ids=["padding inferred", "mask"])
def test_beams_of_the_processor_are_those_of_surgery(composed, told):
    with untouched(*composed.models):
        found = hooked(composed, "processor", num_beams=3, num_return_sequences=2, told=told)
    expected = own(composed, beams=3, group=2)
    assert cut(found[:, WIDTH:]) == expected and expected[::2] != own(composed)


def test_guidance_is_that_of_transformers(large):
    model = large.base.model
    expected = model.generate(IDS, attention_mask=MASK, guidance_scale=1.7, max_new_tokens=NEW, do_sample=False)
    ours = own(rules.guidance(large, 1.7))
    assert cut(expected[:, WIDTH:]) == ours and ours != own(large)
    negative = torch.tensor([[4, 5, 6]] * len(PROMPTS))
    expected = model.generate(
        IDS, attention_mask=MASK, guidance_scale=1.7, negative_prompt_ids=negative, max_new_tokens=NEW, do_sample=False
    )
    ours = own(rules.guidance(large, 1.7, unconditioned=lambda prompt: [4, 5, 6]))
    assert cut(expected[:, WIDTH:]) == ours


def test_sampling_draws_the_same_in_both_ways(composed):
    words = {"do_sample": True, "temperature": 1.5, "top_k": 12, "num_return_sequences": 3, "max_new_tokens": 8}
    found = []
    for way in ("loop", "processor"):
        torch.manual_seed(3)
        found.append(hooked(composed, way, return_dict_in_generate=True, output_scores=True, **words))
    loop, processor = found
    assert torch.equal(loop.sequences, processor.sequences)
    assert len({tuple(row) for row in loop.sequences[:3].tolist()}) > 1
    for a, b in zip(loop.scores, processor.scores, strict=True):
        torch.testing.assert_close(a.log_softmax(-1), b.log_softmax(-1), atol=1e-5, rtol=1e-5)
        assert ((a > -torch.inf).sum(1) == 12).all()


def test_logits_are_the_compositions_and_processors_act_on_them(composed):
    out = hooked(composed, "loop", return_dict_in_generate=True, output_logits=True, bad_words_ids=[[10]])
    assert out.scores is None and len(out.logits) == out.sequences.shape[1] - WIDTH
    (told,) = generate(composed, PROMPTS[:1], sampling=Sampling(1, temperature=0.0))
    first = out.logits[0][0].log_softmax(-1)
    assert first.max().item() == pytest.approx(told.log_probs[0], abs=1e-5)
    assert any(10 in row for row in own(composed)) and not (out.sequences[:, WIDTH:] == 10).any()


@WAYS
def test_stopping_criteria_are_honoured(composed, way):
    from transformers import StoppingCriteria, StopStringCriteria

    class Third(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.full((len(ids),), ids.shape[1] == WIDTH + 3)

    assert hooked(composed, way, stopping_criteria=[Third()]).shape[1] == WIDTH + 3
    expected = own(composed)[1]
    stop = tokenizer().decode(expected[4])
    end = min(i for i, token in enumerate(expected) if token == expected[4]) + 1
    ids = torch.tensor([PROMPTS[1]])
    found = hooked(
        composed, way, ids, torch.ones_like(ids), stopping_criteria=[StopStringCriteria(tokenizer(), [stop])]
    )
    assert found[0, len(PROMPTS[1]) :].tolist() == expected[:end]


@WAYS
def test_a_streamer_gets_every_token(composed, way, capsys):
    from transformers import TextStreamer

    ids = torch.tensor([PROMPTS[1]])
    streamer = TextStreamer(tokenizer(), skip_prompt=True, skip_special_tokens=True)
    found = hooked(composed, way, ids, torch.ones_like(ids), streamer=streamer)
    told = capsys.readouterr().out
    assert told.rstrip("\n") == tokenizer().decode(found[0, len(PROMPTS[1]) :], skip_special_tokens=True)
    assert len(told) > 5


def test_the_other_members_read_every_token_once(composed, small):
    """Under beams too: a prompt a row of the batch, then one token a beam."""
    read = []
    handle = small.base.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        hooked(composed, "processor", num_beams=3, max_new_tokens=5)
    finally:
        handle.remove()
    assert read == [(4, WIDTH)] + [(12, 1)] * 4


def test_assisted_generation_takes_tokens_back(composed, large, small):
    """What comes after the prompt is no part of it, for members with a prompt of their own, when it is read again."""
    ids = torch.tensor([PROMPTS[1]])
    for ensemble in (composed, rules.guidance(large, 1.7)):
        found = hooked(ensemble, "processor", ids, torch.ones_like(ids), assistant_model=small.base.model)
        assert cut(found[:, len(PROMPTS[1]) :]) == own(ensemble)[1:2]


def test_a_processor_that_is_used_again_begins_anew(composed):
    model = composed.base.model
    processor = EnsembleLogitsProcessor(composed, model)
    for at in (1, 3, 1):
        ids = torch.tensor([PROMPTS[at]])
        found = model.generate(ids, logits_processor=[processor], max_new_tokens=NEW, do_sample=False)
        assert cut(found[:, len(PROMPTS[at]) :]) == own(composed)[at : at + 1]


def test_what_can_not_be_is_told(composed, large, tuned, small):
    ids = torch.tensor([PROMPTS[1]])
    ones = torch.ones_like(ids)
    with pytest.raises(SurgeryError, match="row by row, and num_beams is 3") as refused:
        hooked(composed, "loop", num_beams=3)
    assert "EnsembleLogitsProcessor" in refused.value.hint
    with pytest.raises(SurgeryError, match="is not that of 'large', the base of this ensemble"):
        tuned.base.model.generate(ids, custom_generate=as_generate(composed), max_new_tokens=2)
    with pytest.raises(SurgeryError, match="is not that of 'large', the base of this ensemble"):
        EnsembleLogitsProcessor(composed, tuned.base.model)
    with pytest.raises(SurgeryError, match="no attentions or hidden states"):
        hooked(composed, "loop", return_dict_in_generate=True, output_hidden_states=True)
    with pytest.raises(SurgeryError, match="inputs_embeds are the base's alone"):
        large.base.model.generate(
            inputs_embeds=torch.zeros(1, 3, 32), custom_generate=as_generate(composed), max_new_tokens=2
        )
    chatty = member(large.base.model, tokenizer(chat=True), prompt="chat", name="chatty")
    with pytest.raises(SurgeryError, match="'chatty' does not say what its model says of these token ids"):
        EnsembleLogitsProcessor(chatty + small, large.base.model)
    with pytest.raises(SurgeryError, match=r"The mask is for prompts of shape \(4, 7\), and these are \(1, 7\)"):
        hooked(composed, "processor", ids, ones, told=MASK)
    short = member(llama(4, max_position_embeddings=12), tokenizer(), name="short")
    for way in ("loop", "processor"):
        with pytest.raises(SurgeryError, match="don't fit into the context of 'short', 12"):
            hooked(large + short, way, ids, ones, min_new_tokens=NEW)
    broken = llama(5)
    with torch.no_grad():
        broken.lm_head.weight[:] = math.nan
    for way in ("loop", "processor"):
        with pytest.raises(SurgeryError, match="The logits of 'broken' are not numbers"):
            hooked(large + member(broken, tokenizer(), name="broken"), way, ids, ones)
