"""Identities that any correct composition keeps, in float32, alone and in a batch padded on the left."""

import math

import pytest
import torch
from llamas import PROMPTS, llama, recomputed, tokenizer, widened

from surgery.decoding import LocalGenerator, Sampling
from surgery.logits import Ensemble, generate, log_likelihood, member, rules
from surgery.logits.combine import combine
from surgery.models import untouched

NEW = 24
GREEDY = Sampling(NEW, temperature=0.0)


def one(seed, **more):
    return member(llama(seed, **more), tokenizer(), name=f"m{seed}")


@pytest.fixture(scope="module")
def large():
    return one(1, hidden=32, layers=3)


@pytest.fixture(scope="module")
def tuned():
    return one(2)


@pytest.fixture(scope="module")
def small():
    return one(3)


def tokens(model, sampling=GREEDY, prompts=PROMPTS, seed=0, **more):
    return [g.completion_ids for g in generate(model, prompts, sampling=sampling, seed=seed, **more)]


def of_model(model, prompts=PROMPTS, ends=(2,)):
    """By the model's own forward, a prompt at a time."""
    return [recomputed([(model.base.model, 1.0, list(p))], NEW, ends) for p in prompts]


def test_1_of_equal_bases_the_tuned_model_is_left(large, tuned, small):
    same = rules.eft(small, tuned, small, 1.0)
    assert tokens(same) == of_model(tuned) and len(same.readers) == 1
    assert tokens(rules.eft(large, tuned, small, 0.0)) == of_model(large)


@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_1_holds_too_when_all_three_are_run(small, tuned, beta):
    """With two copies of the base, which nobody knows to be one, the sum is computed: tokens agree all the same."""
    copy = member(llama(3), tokenizer(), name="copy")
    found = rules.eft(copy, tuned, small, 1.0)
    assert len(found.readers) == 3 and tokens(found) == of_model(tuned)
    assert tokens(rules.eft(copy, small, small, beta)) == of_model(small)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 3.0])
def test_2_a_tuned_model_that_is_its_base_adds_nothing(large, small, beta):
    again = member(llama(3), tokenizer(), name="again")
    assert tokens(rules.eft(large, again, small, beta)) == of_model(large)


def test_3_log_probs_or_raw_logits(large, tuned, small):
    found = large + 1.3 * (tuned - small)
    for prompt, ids in zip(PROMPTS, tokens(found), strict=True):
        terms = [(large, 1.0), (tuned, 1.3), (small, -1.3)]
        assert ids == recomputed([(m.base.model, w, prompt) for m, w in terms], NEW)  # sums raw logits


def test_4_a_mixture_of_one_reward_twice_is_eft(large, tuned, small):
    again = member(llama(2), tokenizer(), name="again")
    for weight in (0.0, 0.3, 1.0):
        assert tokens(rules.mixture(large, [tuned, again], small, weight)) == tokens(rules.eft(large, tuned, small))
    assert len(rules.mixture(large, [tuned, again], small).readers) == 4  # the small base is run once


def test_5_a_module_without_logits_leaves_the_backbone(large):
    silent = llama(9)
    with torch.no_grad():
        silent.lm_head.weight.zero_()
    assert tokens(rules.unir(large, [member(silent, tokenizer())], 1.0)) == of_model(large)


def test_6_contrastive_with_alpha_one_is_the_expert(large, small):
    assert tokens(rules.contrastive(large, small, 1.0)) == of_model(large)
    assert tokens(rules.contrastive(large, small, 1.0, beta=0.5)) == of_model(large)


def test_7_cge_without_contrast_is_plain_sampling(tuned, small):
    sampling = Sampling(NEW, temperature=1.0)
    plain = LocalGenerator(tuned.base.model, tokenizer(), sampling)
    drawn = [r.completion_ids for r in plain(PROMPTS, 3, [(5 << 32) + i for i in range(len(PROMPTS))])]
    found = rules.cge(tuned, small, 0.0, 0.0, allow_unconstrained=True)
    assert tokens(found, sampling, seed=5, group=3) == drawn


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.7])
def test_8_scaled_contributions_decode_through_the_same_call(alpha):
    from surgery.activations.scaling import scaled
    from surgery.models import Pair

    base, tuned = llama(4), llama(4)
    with torch.no_grad():
        for parameter in tuned.model.layers.parameters():
            parameter.add_(0.05)
    pair = Pair(base, tuned, tokenizer())
    with scaled(pair, alpha) as model:
        found = tokens(model, tokenizer=tokenizer())
        assert found == [recomputed([(model, 1.0, p)], NEW) for p in PROMPTS]
    if alpha == 1:
        assert found == of_model(member(tuned, tokenizer()))
    with scaled(Pair(base, llama(4), tokenizer()), alpha) as model:
        assert tokens(model, tokenizer=tokenizer()) == of_model(member(base, tokenizer()))


def test_9_cached_equals_recomputed_and_padded_equals_alone(large, tuned, small):
    found = large + (tuned - small)
    together = generate(found, PROMPTS, sampling=GREEDY)
    for prompt, batched in zip(PROMPTS, together, strict=True):
        (alone,) = generate(found, [prompt], sampling=GREEDY)
        assert alone.completion_ids == batched.completion_ids
        assert torch.allclose(torch.tensor(alone.log_probs), torch.tensor(batched.log_probs), atol=2e-5)


def test_9_blocks_equal_single_steps(large, tuned, small):
    found = (large + (tuned - small)).croppable()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    block = torch.tensor([[13, 14, 15, 16, 17], [18, 19, 20, 21, 22]])
    with untouched(*found.models):
        _, state = found.prefill(ids, torch.ones_like(ids))
        rows = found.read(block, state)
        state.crop(5)
        for at in range(5):
            step, state = found.step(block[:, at], state)
            assert torch.allclose(step.log_softmax(-1), rows[:, at].log_softmax(-1), atol=1e-4)


@pytest.mark.parametrize("padded", [0, 1, 2])
def test_11_rows_that_pad_a_vocabulary_change_nothing(padded, large, tuned, small):
    models = [large, tuned, small]
    expected = tokens(models[0] + (models[1] - models[2]))
    models[padded] = member(widened(models[padded].base.model, 47), tokenizer(), name="wide")
    assert tokens(models[0] + (models[1] - models[2])) == expected


def test_12_tokens_that_a_member_forbids_give_no_nan(large, tuned, small):
    class Muted(torch.nn.Module):
        def forward(self, hidden):
            logits = self.head(hidden)
            logits[..., 7:12] = -math.inf
            return logits

    muted = llama(3)
    head, muted.lm_head = muted.lm_head, Muted()
    muted.lm_head.head, muted.lm_head.weight = head, head.weight
    quiet = member(muted, tokenizer(), name="muted")
    for found in (large + (tuned - quiet), large + (quiet - tuned), quiet + (tuned - small)):
        for g in generate(found, PROMPTS, sampling=Sampling(NEW)):
            assert all(map(math.isfinite, g.log_probs))
    forbidden = set(range(7, 12))
    for ids in tokens(quiet + (tuned - small), Sampling(NEW), group=8):  # the base forbids
        assert not forbidden & set(ids)


def test_13_each_place_sums_to_one_and_sequences_add_up(large, tuned, small):
    found = (large + 2.0 * (tuned - small)).filtered("nucleus", 0.9, mode="zero_reward")
    drawn = generate(found, PROMPTS, sampling=Sampling(NEW), seed=3)
    scored = log_likelihood(found, PROMPTS, [g.completion_ids for g in drawn], end=False)
    for g, s in zip(drawn, scored, strict=True):
        assert math.isclose(sum(g.log_probs), sum(s.log_probs), abs_tol=1e-3)
    with untouched(*found.models):
        ids = torch.tensor([PROMPTS[0]])
        scores, _ = found.prefill(ids, torch.ones_like(ids))
    assert torch.allclose(scores.log_softmax(-1).exp().sum(-1), torch.ones(1), atol=1e-6)


def test_proxy_tuning_is_its_formula_for_64_steps(large, tuned, small):
    found = rules.proxy_tuning(large, tuned, small, 0.8)
    drawn = generate(found, [PROMPTS[0]], sampling=Sampling(64, temperature=0.0))[0].completion_ids
    models = [(large.base.model, 1.0), (tuned.base.model, 0.8), (small.base.model, -0.8)]
    assert drawn == recomputed([(m, w, PROMPTS[0]) for m, w in models], 64)


def test_guidance_is_the_one_of_transformers(large):
    model = large.base.model
    ours = rules.guidance(large, 1.7)
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                                guidance_scale=1.7, pad_token_id=0)  # fmt: skip
        assert tokens(ours, prompts=[prompt]) == [theirs[0, len(prompt) :].tolist()]
    assert len(ours.readers) == 1  # one model, read with two prompts in one pass


def test_the_models_are_left_as_they_were(large, tuned, small):
    before = [{k: v.clone() for k, v in m.base.model.state_dict().items()} for m in (large, tuned, small)]
    large.base.model.train()
    try:
        generate(large + (tuned - small), PROMPTS, sampling=GREEDY, members=True)
        assert large.base.model.training and not tuned.base.model.training
    finally:
        large.base.model.eval()
    for m, state in zip((large, tuned, small), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in m.base.model.state_dict().items())
        assert not any(module._forward_hooks for module in m.base.model.modules())


def test_the_sum_is_what_the_members_say(large, tuned, small):
    found = Ensemble([(large.base, 1.0), (tuned.base, 0.5), (small.base, -0.5)])
    with untouched(*found.models):
        ids = torch.tensor([PROMPTS[1]])
        scores, state = found.prefill(ids, torch.ones_like(ids))
        own = [m.model(ids).logits[:, -1].log_softmax(-1) for m in found.members]
    assert torch.allclose(scores, combine(own, found.weights), atol=2e-5)
    for mine, theirs in zip(state.log_probs, own, strict=True):
        assert torch.allclose(mine[:, -1], theirs, atol=1e-5)
