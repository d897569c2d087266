"""Contrastive exploration: scores and steps by hand, models left as they were, words for bad input."""

import copy
import itertools

import pytest
import torch
from llamas import llama, tokenizer, widened
from torch import nn

from surgery.decoding import Sampling
from surgery.errors import SurgeryError
from surgery.logits import generate, member
from surgery.logits.contrasts import contrast_texts, contrast_tokens
from surgery.logits.explore import OPTIMIZERS, Exploration, explore

BOS = 1


@pytest.fixture(scope="module")
def pair():
    return llama(1), llama(2)


def found_by(pair, **words):
    options = {"n": 5, "length": 8, "tokenizer": tokenizer(), "seed": 3}
    return explore(*pair, **{**options, **words})


@torch.no_grad()
def log_probs(model, ids):
    """(pos, vocab) of what comes after each token, computed anew."""
    return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def by_hand(model, text):
    table = log_probs(model, [BOS, *text.ids])
    return [float(table[i, token]) for i, token in enumerate(text.ids)]


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before, flags):
    now = model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == [(flag, None) for flag in flags]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("words", [{}, {"beams": 1}, {"iterative": True, "lr": 1e-3}])
def test_contrast_and_scores_are_those_of_the_models(pair, words):
    base, tuned = pair
    found = found_by(pair, gamma=0.5, **words)
    assert len(found.texts) == 5 and found.start == [BOS] and not found.interrupted
    for one in found.texts:
        assert len(one.ids) == len(one.tokens) == 8, "end tokens don't end a text"
        assert "".join(one.tokens) == one.text
        told, before = by_hand(tuned, one), by_hand(base, one)
        assert one.tuned == pytest.approx(told, abs=1e-4)
        assert one.contrast == pytest.approx([a - b for a, b in zip(told, before, strict=True)], abs=1e-4)
        assert one.novelty == pytest.approx(sum(one.contrast) / 8)
        then = -sum(before) / 8 if one.loss is None else one.loss
        assert one.score == pytest.approx(sum(told) / 8 + 0.5 * then, abs=1e-4)
    assert (found.losses == []) == ("iterative" not in words)


def test_every_token_is_plausible_for_the_tuned_model(pair):
    for one in found_by(pair, alpha=0.3, n=8).texts:
        table = log_probs(pair[1], [BOS, *one.ids])[:-1]
        chosen = table[torch.arange(8), one.ids]
        assert (chosen >= table.amax(-1) + torch.tensor(0.3).log() - 1e-4).all()


def test_beams_are_ranked_by_contrast_and_not_by_log_probability(pair):
    """One beam more than there are plausible sequences finds the best sum of scores of all; temperature 0."""
    base, tuned = pair
    found = found_by(pair, n=1, length=3, beams=64, temperature=0.0, alpha=0.4).texts[0]
    sums = {}
    for ids in itertools.product(range(45), repeat=1):
        sums |= extended(base, tuned, list(ids), 3)
    best = max(sums, key=lambda ids: sums[ids])
    assert len(sums) < 64 and tuple(found.ids) == best
    assert found.score * 3 == pytest.approx(sums[best], abs=1e-4)


def extended(base, tuned, ids, length):
    """Sum of contrasts of every plausible sequence that begins with `ids`."""
    table, before = (log_probs(model, [BOS, *ids]) for model in (tuned, base))
    last = len(ids) - 1
    if table[last, ids[-1]] < table[last].max() + torch.tensor(0.4).log():
        return {}
    if len(ids) == length:
        return {tuple(ids): sum(float(table[i, t] - before[i, t]) for i, t in enumerate(ids))}
    return {k: v for t in range(45) for k, v in extended(base, tuned, [*ids, t], length).items()}


def test_without_contrast_and_filter_it_is_plain_sampling_of_the_tuned_model(pair):
    options = {"beams": 1, "gamma": 0.0, "alpha": 0.0, "allow_unconstrained": True, "ends": True, "n": 40, "length": 20}
    found = found_by(pair, **options)
    plain = generate(member(pair[1], tokenizer()), [[BOS]] * 40, sampling=Sampling(20), seed=3)
    assert [one.ids for one in found.texts] == [one.completion_ids for one in plain]
    assert any(one.ids[-1] == 2 and len(one.ids) < 20 for one in found.texts), "here they end"


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_depends_on_its_seed_and_number_and_not_on_the_batch(pair, beams):
    many = found_by(pair, beams=beams)
    for size in (1, 7):
        assert [one.ids for one in found_by(pair, beams=beams, batch_size=size).texts] == [t.ids for t in many.texts]
    assert [one.ids for one in found_by(pair, beams=beams, n=3).texts] == [t.ids for t in many.texts[:3]]
    other = [one.ids for one in found_by(pair, beams=beams, seed=4).texts]
    assert other != [one.ids for one in many.texts] and len({tuple(ids) for ids in other}) > 1


def test_the_copy_of_the_base_takes_one_step_a_text(pair):
    """Losses are those of a copy that is trained here, by torch's AdamW on the whole text behind BOS."""
    found = found_by(pair, iterative=True, lr=1e-2)
    assert found.texts[0].ids == found_by(pair).texts[0].ids, "nothing is learned before the first text"
    assert [one.ids for one in found.texts[1:]] != [one.ids for one in found_by(pair).texts[1:]]
    twin = copy.deepcopy(pair[0])
    optimizer = torch.optim.AdamW(twin.parameters(), 1e-2, weight_decay=0.0)
    for one in found.texts:
        row = torch.tensor([[BOS, *one.ids]])
        loss = twin(row, labels=row).loss
        assert one.loss == pytest.approx(loss.item(), abs=1e-4)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()


def test_what_was_learned_is_new_no_more(pair):
    base, tuned = pair
    still = found_by((base, tuned), n=30, temperature=0.5).texts
    found = found_by((base, tuned), n=30, temperature=0.5, iterative=True, lr=1e-2)
    assert len({tuple(one.ids) for one in found.texts}) > len({tuple(one.ids) for one in still})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(pair, name):
    found = found_by(pair, n=2, iterative=True, optimizer=name, lr=1e-2, temperature=0.0, alpha=1.0, length=6)
    assert found.texts[0].ids == found.texts[1].ids, "alpha 1 is the tuned model's greedy text"
    assert found.losses[1] < found.losses[0]
    assert found.settings["optimizer"] == name and found.settings["iterative"]


@pytest.mark.parametrize("iterative", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_models_are_left_as_they_were(iterative, fails):
    base, tuned = llama(1).train(), llama(2)
    for parameter in itertools.islice(base.parameters(), 3):
        parameter.requires_grad_(False)
    models = {model: (state_of(model), [p.requires_grad for p in model.parameters()]) for model in (base, tuned)}

    def progress(done, total):
        assert total == 4
        if fails:
            raise RuntimeError("stop")

    words = {"n": 4, "iterative": iterative, "lr": 1e-2, "progress": progress}
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            found_by((base, tuned), **words)
    else:
        found_by((base, tuned), **words)
    for model, (before, flags) in models.items():
        unchanged(model, before, flags)
    assert all(m.training for m in base.modules()) and not any(m.training for m in tuned.modules())


@pytest.mark.parametrize("iterative", [False, True])
def test_stopped_it_keeps_what_is_there(pair, iterative):
    whole = found_by(pair, iterative=iterative, batch_size=4)
    calls = itertools.count()

    def tire(*_):
        if next(calls) == 30:
            raise KeyboardInterrupt

    tired = copy.deepcopy(pair[1])
    tired.model.register_forward_pre_hook(tire)
    found = found_by((pair[0], tired), iterative=iterative, batch_size=4)
    assert found.interrupted and 0 < len(found.texts) < 5
    for got, all_of_it in zip(found.texts, whole.texts, strict=False):
        assert got.ids == all_of_it.ids or len(got.ids) < 8


def test_it_is_saved_and_read_again(pair, tmp_path):
    found = found_by(pair, n=2, iterative=True, lr=1e-3)
    assert Exploration.load(found.save(tmp_path / "new" / "found.json")) == found
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        with pytest.raises(SurgeryError, match="no exploration"):
            Exploration.load(tmp_path / name)


def test_rows_behind_the_vocabulary_change_nothing(pair):
    base, tuned = pair
    plain = found_by(pair, iterative=True, lr=1e-2)
    padded = found_by((widened(base, 7), tuned), iterative=True, lr=1e-2)
    assert [one.ids for one in padded.texts] == [one.ids for one in plain.texts]
    assert padded.losses == pytest.approx(plain.losses, abs=1e-4)


def test_texts_may_begin_elsewhere(pair):
    assert found_by(pair, start="ab").start == tokenizer()("ab")["input_ids"]
    found = found_by(pair, start=[9, 10], iterative=True, lr=1e-3)
    assert found.start == [9, 10]
    one = found.texts[0]
    table = log_probs(pair[0], [9, 10, *one.ids])
    assert one.loss == pytest.approx(-sum(float(table[i + 1, t]) for i, t in enumerate(one.ids)) / 8, abs=1e-4)


def test_length_is_what_fits(pair):
    found = found_by(pair, n=1, length=None)
    assert found.settings["length"] == len(found.texts[0].ids) == 95


def test_half_precision_learns_in_float32(pair):
    halves = tuple(copy.deepcopy(model).bfloat16() for model in pair)
    found = found_by(halves, n=3, iterative=True, lr=1e-6, temperature=0.0, alpha=1.0)
    assert found.losses[2] < found.losses[1] < found.losses[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"alpha": 0.0}, "With alpha 0"),
        ({"alpha": 1.5}, "plausible is 1.5"),
        ({"n": 0}, "n is 0"),
        ({"beams": 0}, "beams is 0"),
        ({"length": 0}, "length is 0"),
        ({"length": 96}, "Texts of 96 tokens behind 1 don't fit"),
        ({"temperature": 0.0}, "all 5 texts are the same"),
        ({"iterative": True, "lr": 0.0}, "lr is 0.0"),
        ({"iterative": True, "lr": 1e30}, "After 1 steps"),
        ({"iterative": True, "optimizer": "adam"}, "no optimizer 'adam'"),
        ({"start": []}, "start is"),
        ({"start": 99}, "start is 99"),
        ({"tokenizer": None}, "pass tokenizer="),
        ({"gamma": float("nan")}, "nan"),
    ],
)
def test_bad_input_gets_a_sentence(pair, words, said):
    with pytest.raises(SurgeryError, match=said):
        found_by(pair, **words)


def test_models_without_a_beginning_and_one_model_twice(pair):
    nameless = copy.deepcopy(tokenizer())
    nameless.bos_token = None
    with pytest.raises(SurgeryError, match="no BOS"):
        found_by(pair, tokenizer=nameless)
    assert found_by(pair, tokenizer=nameless, start="a", n=1).start == [3]
    with pytest.raises(SurgeryError, match="one and the same"):
        found_by((pair[0], pair[0]))
    with pytest.raises(SurgeryError, match="another tokenizer"):
        found_by((member(pair[0], tokenizer(), foreign=True), pair[1]))
    with pytest.raises(SurgeryError, match="is not one model"):
        found_by((pair[0], member(pair[0]) + member(pair[1])))


def test_next_tokens_by_contrast(pair):
    base, tuned = pair
    after, before = (log_probs(model, [5, 6, 7])[-1] for model in (tuned, base))
    gaps = after - before
    for lost in (False, True):
        (found,) = contrast_tokens(base, tuned, [[5, 6, 7]], k=45, alpha=0.2, lost=lost, tokenizer=tokenizer())
        seen = before if lost else after
        kept = [i for i in range(45) if seen[i] >= seen.max() + torch.tensor(0.2).log()]
        assert [one.id for one in found] == sorted(kept, key=lambda i: float(gaps[i]) * (1 if lost else -1))
        for one in found:
            told = one.contrast, one.tuned, one.base
            assert told == pytest.approx([float(v[one.id]) for v in (gaps, after, before)], abs=1e-4)
            assert one.token == tokenizer().decode([one.id])
    assert [len(one) for one in contrast_tokens(base, tuned, ["ab", "c"], k=2, alpha=0, tokenizer=tokenizer())] == [
        2,
        2,
    ]
    for words in ({"k": 0}, {"alpha": 2.0}, {"prompts": []}):
        with pytest.raises(SurgeryError):
            contrast_tokens(base, tuned, **{"prompts": ["a"], "tokenizer": tokenizer(), **words})


def test_given_texts_by_contrast(pair):
    base, tuned = pair
    found = contrast_texts(base, tuned, ["abc", "1+1"], tokenizer=tokenizer())
    assert [one.text for one in found] == ["abc", "1+1"]
    behind = contrast_texts(base, tuned, ["bc"], prompts=[[BOS, 3]], tokenizer=tokenizer())
    assert behind[0].contrast == pytest.approx(found[0].contrast[1:], abs=1e-4)
    for one in found:
        told, before = by_hand(tuned, one), by_hand(base, one)
        assert one.contrast == pytest.approx([a - b for a, b in zip(told, before, strict=True)], abs=1e-4)
        assert one.score is None and one.loss is None
