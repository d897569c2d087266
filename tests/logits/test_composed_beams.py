"""`generate(beams=...)`: the best hypotheses of a composition."""

import math

import pytest
import torch
from llamas import PROMPTS, llama, tokenizer

from surgery.decoding import Beams, LocalGenerator, Sampling, beam_search, undisturbed
from surgery.errors import SurgeryError
from surgery.logits import generate, log_likelihood, member
from surgery.models import untouched

GREEDY = Sampling(10, temperature=0.0)


@pytest.fixture(scope="module")
def composed():
    large, tuned, small = (member(llama(seed), tokenizer(), name=f"m{seed}") for seed in (1, 2, 3))
    return large + 0.7 * (tuned - small)


def test_beams_of_one_member_are_those_of_transformers():
    model = llama(1)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    expected = model.generate(
        ids, attention_mask=(ids > 0).long(), num_beams=4, do_sample=False, max_new_tokens=10, length_penalty=0.5,
        num_return_sequences=2,
    )[:, width:].tolist()  # fmt: skip
    beams = Beams(4, length_penalty=0.5)
    for batch_size in (256, 8, 1):  # in one batch, two prompts at a time, prompt by prompt
        sampling = Sampling(10, temperature=0.0, batch_size=batch_size)
        found = generate(model, PROMPTS, sampling=sampling, group=2, beams=beams, tokenizer=tokenizer())
        assert [one.completion_ids for one in found] == [row[: (row + [2]).index(2) + 1] for row in expected]
    alone = LocalGenerator(model, tokenizer(), GREEDY, beams)(PROMPTS, 2, range(4))
    assert [one.completion_ids for one in alone] == [one.completion_ids for one in found]


def test_a_composition_is_searched_and_its_members_are_told(composed):
    with untouched(*composed.models):
        found = generate(composed, PROMPTS, sampling=GREEDY, group=2, beams=3, members=True)
    greedy = generate(composed, PROMPTS, sampling=GREEDY)
    with undisturbed(*composed.models):
        begun = composed.prefill_encoded([composed.encode(prompt) for prompt in PROMPTS])
        searched = dict(beam_search(composed, *begun, beams=3, max_new_tokens=10, ends=composed.ends, returned=2))
    assert [one.completion_ids for one in found] == [h.tokens for i in range(4) for h in searched[i]]
    scored = log_likelihood(composed, [p for p in PROMPTS for _ in "12"], [g.completion_ids for g in found], end=False)
    for one, told in zip(found, scored, strict=True):
        assert one.log_probs == pytest.approx(told.log_probs, abs=1e-5)
        assert list(one.members) == ["m1", "m2", "m3"]
        for name, values in one.members.items():
            assert values == pytest.approx(told.members[name], abs=1e-5)
    assert [one.ended for one in found] == [("eos" if one.completion_ids[-1] == 2 else "length") for one in found]

    def total(one):
        return math.fsum(one.log_probs) / len(one.log_probs)

    assert all(total(a) >= total(b) for a, b in zip(found[::2], found[1::2], strict=True)), "best first"
    assert any(total(a) > total(b) + 1e-3 for a, b in zip(found[::2], greedy, strict=True))


def test_drawn_beams_depend_on_the_seed_alone(composed):
    hot = Sampling(10, temperature=2.0, top_k=20)
    whole = generate(composed, PROMPTS, sampling=hot, beams=3, seed=5)
    first = generate(composed, PROMPTS[:2], sampling=hot, beams=3, seed=5)
    assert [one.completion_ids for one in whole[:2]] == [one.completion_ids for one in first]
    other = generate(composed, PROMPTS, sampling=hot, beams=3, seed=6)
    assert [one.completion_ids for one in whole] != [one.completion_ids for one in other]


def test_a_stop_string_ends_a_beam(composed):
    free = generate(composed, PROMPTS, sampling=GREEDY, beams=3)
    stop = free[0].text[3]
    found = generate(composed, PROMPTS, sampling=Sampling(10, temperature=0.0, stop=(stop,)), beams=3)
    assert all(stop not in one.text for one in found) and any(one.ended == "stop" for one in found)


def test_what_can_not_be_is_told(composed):
    with pytest.raises(SurgeryError, match="beams is 0"):
        generate(composed, PROMPTS, sampling=GREEDY, beams=0)
    with pytest.raises(SurgeryError, match="returned is 4; expected between 1 and the 3 beams"):
        generate(composed, PROMPTS, sampling=GREEDY, beams=3, group=4)
    with pytest.raises(SurgeryError, match="draws whole completions"):
        generate(lambda prompts, group, seeds: [], PROMPTS, sampling=GREEDY, beams=3)
    certain = composed.filtered("top_k", 1)
    with pytest.raises(SurgeryError, match="Prompt 0 has 1 completions that are not forbidden; a group is 2"):
        generate(certain, PROMPTS[2:3], sampling=Sampling(1, temperature=0.0), beams=2, group=2)


def test_a_member_that_says_nan_is_named():
    bad = llama(2)
    with torch.no_grad():
        bad.lm_head.weight[:] = math.nan
    broken = member(llama(1), tokenizer(), name="good") + 1.0 * member(bad, tokenizer(), name="bad")
    with pytest.raises(SurgeryError, match=r"logits of 'bad' are not numbers \(prompt [0-3], completion token 0\)"):
        generate(broken, PROMPTS, sampling=GREEDY, beams=2)
