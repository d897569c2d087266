"""Beam search against transformers' own, beam sampling against the law it has."""

from collections import Counter
from itertools import combinations, permutations

import pytest
import torch
from test_causal import IDS, MASK, tiny

from surgery.decoding import CausalDecoder, Sampling, beam_search, undisturbed, uniforms
from surgery.decoding.beam import warped, without_replacement
from surgery.errors import SurgeryError

ENDS = [5, 11, 14, 23, 26, 31, 42, 47]
DRAWN = Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.01)


class Table:
    """A decoder whose next token depends on the last one alone: logits (last token, next token)."""

    def __init__(self, table):
        self.table = table

    def prefill(self, ids, mask):
        return self.table[ids[:, -1]], Rows(ids)

    def step(self, tokens, state):
        return self.table[tokens], Rows(torch.cat((state.ids, tokens[:, None]), 1))


class Rows:
    def __init__(self, ids):
        self.ids = ids

    def select(self, rows):
        return Rows(self.ids[rows])


def searched(decoder, ids=IDS * MASK, mask=MASK, ends=ENDS, new=12, **options):
    with undisturbed(*getattr(decoder, "models", ())):
        options = {"beams": 4, "max_new_tokens": new, "ends": ends} | options
        return [found for _, found in sorted(beam_search(decoder, *decoder.prefill(ids, mask), **options))]


def generated(model, ends=ENDS, new=12, beams=4, **options):
    """transformers' `beams` best continuations of each prompt and their scores."""
    out = model.generate(
        IDS * MASK, attention_mask=MASK, max_new_tokens=new, num_beams=beams, num_return_sequences=beams,
        eos_token_id=ends or None, pad_token_id=0, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    rows = [row[9 : 9 + length] for row, length in zip(out.sequences.tolist(), lengths, strict=True)]
    return [rows[i : i + beams] for i in range(0, len(rows), beams)], out.sequences_scores.view(-1, beams)


def assert_same(ours, theirs):
    tokens, scores = theirs
    assert [[hypothesis.tokens for hypothesis in found] for found in ours] == tokens
    torch.testing.assert_close(torch.tensor([[h.score for h in found] for found in ours]), scores, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gpt2", "bloom", "mixtral"])
def test_beam_search_is_that_of_transformers(family):
    model = tiny(family)
    decoder = CausalDecoder(model, room=3)
    lengths = set()
    for options in (
        {}, {"length_penalty": 2.0}, {"length_penalty": -1.0}, {"early_stopping": True},
        {"early_stopping": "never"}, {"early_stopping": "never", "length_penalty": 0.0}, {"ends": [23]}, {"ends": []},
    ):  # fmt: skip
        ours = searched(decoder, returned=4, **options)
        assert_same(ours, generated(model, do_sample=False, **options))
        ends = options.get("ends", ENDS)
        for h in (h for found in ours for h in found):
            lengths.add(len(h.tokens))
            assert h.ended == (h.tokens[-1] in ends) and len(h.log_probs) == len(h.tokens)
            mean = sum(h.log_probs) / len(h.tokens) ** options.get("length_penalty", 1)
            assert mean == pytest.approx(h.score, rel=1e-6, abs=1e-5)
    assert len(lengths) > 2, "hypotheses end at several lengths"


def test_beam_sampling_is_that_of_transformers_given_the_same_draws(monkeypatch):
    """With our draws in the place of `torch.multinomial` the rest has to agree: warpers, scores, order, bookkeeping."""
    model, seeds, step = tiny("llama"), [3, 1, 4], iter(range(12))
    noise = torch.from_numpy(uniforms(seeds, 4 * (1 + len(ENDS)), 12))

    def multinomial(probs, num_samples):
        return without_replacement(probs.log(), noise[:, :, next(step)])[1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        expected = generated(model, do_sample=True, temperature=1.3, top_k=20, top_p=0.9, min_p=0.01)
    ours = searched(CausalDecoder(model), sampling=DRAWN, seeds=seeds, returned=4)
    assert_same(ours, expected)
    assert len({len(h.tokens) for found in ours for h in found}) > 2


def test_a_prompt_alone_gives_what_it_gives_in_a_batch():
    decoder, hot = CausalDecoder(tiny("qwen2")), Sampling(temperature=3.0)
    together = searched(decoder, sampling=hot, seeds=[3, 1, 4], returned=2)
    for row, seed in enumerate([3, 1, 4]):
        alone = slice(row, row + 1), slice(int((MASK[row] == 0).sum()), None)
        (found,) = searched(decoder, IDS[alone], MASK[alone], sampling=hot, seeds=[seed], returned=2)
        assert [h.tokens for h in found] == [h.tokens for h in together[row]]
    again = searched(decoder, sampling=hot, seeds=[4, 1, 3], returned=2)
    assert [h.tokens for h in again[1]] == [h.tokens for h in together[1]]
    assert [h.tokens for h in again[0]] != [h.tokens for h in together[0]], "another seed"


def test_the_warpers_are_those_of_transformers():
    from transformers.generation import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = (3 * torch.randn(200, 40, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    for sampling in (DRAWN, Sampling(top_k=2), Sampling(top_p=0.3), Sampling(min_p=0.9), Sampling(temperature=0.5)):
        expected = TemperatureLogitsWarper(sampling.temperature)(None, scores)
        for warper in (
            sampling.top_k and TopKLogitsWarper(sampling.top_k, min_tokens_to_keep=4),
            sampling.top_p < 1 and TopPLogitsWarper(sampling.top_p, min_tokens_to_keep=4),
            sampling.min_p and MinPLogitsWarper(sampling.min_p, min_tokens_to_keep=4),
        ):
            expected = warper(None, expected) if warper else expected
        assert torch.equal(warped(scores, sampling, 4), expected)
    assert torch.equal(warped(scores, None, 4), scores)


def test_draws_without_replacement_follow_the_law():
    """Ordered pairs of 5 choices, one of them impossible: chi-square of 40,000 draws, 11 degrees of freedom."""
    p = torch.tensor([0.5, 0.25, 0.0, 0.15, 0.1])
    noise = torch.from_numpy(uniforms(range(40_000), 2, 1))[:, :, 0]
    values, pairs = without_replacement(p.log().expand(len(noise), -1), noise)
    assert torch.equal(values, p.log()[pairs])
    count = Counter(map(tuple, pairs.tolist()))
    expected = {(i, j): p[i] * p[j] / (1 - p[i]) for i, j in permutations([0, 1, 3, 4], 2)}
    assert set(count) <= set(expected)
    chi = sum(float((count[pair] - len(noise) * q) ** 2 / (len(noise) * q)) for pair, q in expected.items())
    assert chi < 31.26  # the 99.9 % point

    values, _ = without_replacement(p.log()[None], noise[:1].repeat(1, 3))
    assert values.isfinite().sum() == 4 and values[0, 4:].isneginf().all(), "no fifth to draw, and no NaN"


def test_beam_sampling_follows_the_law_that_enumeration_gives():
    """Two beams, two tokens, vocabulary of 6: every way to draw 4 of 6 and then 4 of 12, worked out in float64."""
    table = 0.5 * torch.randn(6, 6, generator=torch.Generator().manual_seed(5))
    log_p = table.double().log_softmax(-1)
    law = Counter()
    for first, weight in drawn_sets(log_p[0], 4):
        beams = sorted(first, key=lambda token: -log_p[0, token])[:2]
        scores = torch.cat([log_p[0, beam] + log_p[beam] for beam in beams])
        for second, more in drawn_sets(scores, 4):
            best = max(second, key=lambda index: scores[index])
            law[beams[best // 6], best % 6] += weight * more
    assert sum(law.values()) == pytest.approx(1)

    count, total = Counter(), 20_000
    for start in range(0, total, 2000):
        ids = torch.zeros(2000, 1, dtype=torch.long)
        for found in searched(
            Table(table), ids, ids + 1, (), 2, beams=2, sampling=Sampling(), seeds=range(start, start + 2000)
        ):
            count[tuple(found[0].tokens)] += 1
    cells = [pair for pair, q in law.items() if q * total >= 5]
    assert len(cells) > 8 and sum(count[pair] for pair in count if pair not in cells) < 0.005 * total
    chi = sum((count[pair] - total * law[pair]) ** 2 / (total * law[pair]) for pair in cells)
    assert chi < torch.distributions.Chi2(len(cells)).mean + 4 * (2 * len(cells)) ** 0.5


def drawn_sets(scores, count):
    """(set of `count` choices, its probability when drawn one after the other without replacement)."""
    p = scores.softmax(-1).tolist()
    for chosen in combinations(range(len(p)), count):
        weight = 0.0
        for order in permutations(chosen):
            left, product = 1.0, 1.0
            for choice in order:
                product, left = product * p[choice] / left, left - p[choice]
            weight += product
        yield chosen, weight


def test_forbidden_tokens_leave_fewer_hypotheses_and_none_of_them():
    table = torch.zeros(8, 8)
    table[:, 3:] = -torch.inf
    table[2, :2] = -torch.inf  # after 2 comes 2
    one = torch.ones(1, 1, dtype=torch.long)
    for options in ({}, {"sampling": Sampling(), "seeds": [0]}):
        (found,) = searched(Table(table), one, one, [2], 1, beams=5, returned=5, **options)
        assert sorted(h.tokens for h in found) == [[0], [1], [2]]
        (found,) = searched(Table(table), one, one, [1, 2], 3, beams=3, returned=3, length_penalty=0.0, **options)
        assert {tuple(h.tokens) for h in found[:2]} == {(1,), (2,)} and found[2].tokens[0] == 0
        assert all(h.ended and max(h.tokens) < 3 and h.score > -10 for h in found)
    with pytest.raises(SurgeryError, match=r"logits for prompt 0 .* at new token 1"):
        table[0] = -torch.inf
        searched(Table(table), one, one, [], 3)
    with pytest.raises(SurgeryError, match="not finite"):
        searched(Table(torch.full((8, 8), torch.nan)), one, one, [], 3)


def test_stop_strings_end_a_hypothesis():
    """`stopped` sees the candidates' tokens; what it stops is finished as an end token would."""
    model = tiny("llama")
    ours = searched(
        CausalDecoder(model), ends=[23], returned=4, stopped=lambda tokens, alive: alive & (tokens[:, -1] == 42)
    )
    theirs = searched(CausalDecoder(model), ends=[23, 42], returned=4)
    assert [[h.tokens for h in found] for found in ours] == [[h.tokens for h in found] for found in theirs]
    assert any(h.ended and h.tokens[-1] == 42 for found in ours for h in found)


def test_interrupted_it_yields_what_there_is():
    class Interrupted(Table):
        def step(self, tokens, state):
            if state.ids.shape[1] == 4:
                raise KeyboardInterrupt
            return super().step(tokens, state)

    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(2, 1, dtype=torch.long)
    whole = searched(Table(table), ids, ids + 1, [], 4, beams=2, returned=2)
    found, search = (
        [],
        beam_search(
            (decoder := Interrupted(table)), *decoder.prefill(ids, ids), beams=2, max_new_tokens=9, ends=[], returned=2
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        for _, hypotheses in search:
            found.append(hypotheses)
    assert found == whole and not found[0][0].ended


def test_bad_numbers_are_named():
    for options, words in (
        ({"beams": 0}, "beams is 0"),
        ({"new": 0}, "max_new_tokens is 0"),
        ({"returned": 5}, "between 1 and the 4 beams"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"sampling": DRAWN}, "one seed a prompt; found none"),
        ({"sampling": DRAWN, "seeds": [1]}, "found 1 seeds for 3 prompts"),
    ):
        with pytest.raises(SurgeryError, match=words):
            searched(Table(torch.zeros(50, 50)), **options)


def test_logits_that_are_not_normalised_are_added_up_as_they_are():
    """The best sum over all sequences of three tokens; log-probabilities would choose another one."""
    torch.manual_seed(3)
    table = torch.randn(6, 6) * 2
    table[:, 4:] = -torch.inf  # what is forbidden does not count
    ids, mask = torch.tensor([[0], [3]]), torch.ones(2, 1)
    options = {"beams": 64, "ends": (), "new": 3, "returned": 3}
    ours = searched(Table(table), ids, mask, normalise=False, **options)
    usual = searched(Table(table), ids, mask, **options)
    for first, found in zip((0, 3), ours, strict=True):
        sums = {
            (a, b, c): float(table[first, a] + table[a, b] + table[b, c])
            for a in range(4) for b in range(4) for c in range(4)
        }  # fmt: skip
        assert [3 * one.score for one in found] == pytest.approx(sorted(sums.values())[-1:-4:-1], abs=1e-5)
        assert [3 * one.score for one in found] == pytest.approx([sums[tuple(one.tokens)] for one in found], abs=1e-5)
        chosen = table.log_softmax(-1)
        for one in found:
            line = [first, *one.tokens]
            expected = [float(chosen[a, b]) for a, b in zip(line, line[1:], strict=False)]
            assert one.log_probs == pytest.approx(expected, abs=1e-5)
    assert [h[0].tokens for h in ours] != [h[0].tokens for h in usual]
