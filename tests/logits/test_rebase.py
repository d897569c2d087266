"""REBASE: how the budget is shared, that cached trees are what recomputing gives, and that good steps are followed."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.decoding import LocalGenerator, Sampling
from surgery.errors import SurgeryError
from surgery.logits.search.forwards import Chorus, Counted
from surgery.logits.search.rebase import Rebase, shares
from surgery.logits.search.selection import samples, weighted_vote
from surgery.logits.search.steps import contrast_scorer, text_scorer
from surgery.models import encoded_prompts, load
from surgery.tasks import make_task
from surgery.tasks.base import marked_answer

SUMS = Sampling(48)


@pytest.fixture(scope="module")
def zoo():
    torch.set_num_threads(1)
    names = ("tiny-base", "tiny-chain", "tiny-small-base", "tiny-small-chain", "tiny-sums-sft", "tiny-sums-grpo")
    return {name: load(name)[0] for name in names} | {"tokenizer": load("tiny-base")[1]}


def rows(n, seed=5, terms=(3, 5)):
    return [example.row("chain") for example in make_task("chain", terms=terms).examples(n, seed)]


def encoded(zoo, asked):
    return encoded_prompts(zoo["tokenizer"], [row["prompt"] for row in asked])


def evenly(paths):
    return [0.5] * len(paths)


# ---- the budget


@pytest.mark.parametrize(
    ("scores", "budget", "balance", "expected"),
    [
        ([0.5, 0.5, 0.5, 0.5], 16, 0.2, [4, 4, 4, 4]),
        ([0.5, 0.5, 0.5], 16, 0.2, [6, 5, 5]),  # ceil(16/3), ceil(10/2), ceil(5/1)
        ([0.1, 0.9], 4, 0.2, [0, 4]),  # ceil(4 * 0.982)
        ([0.1, 0.9], 4, 1.0, [1, 3]),
        ([0.2, 0.4, 0.3], 8, 0.2, [1, 5, 2]),  # ceil(8 * 0.506), ceil(3 * 0.622), the rest: see below
        ([0.0, 1000.0], 3, 0.2, [0, 3]),
        ([-5.0], 7, 0.2, [7]),
    ],
)
def test_shares_as_in_the_released_code(scores, budget, balance, expected):
    assert shares(scores, budget, balance) == expected


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=12), st.integers(1, 64), st.floats(0.05, 5))
def test_shares_give_the_whole_budget_to_the_best(scores, budget, balance):
    found = shares(scores, budget, balance)
    assert sum(found) == budget and min(found) >= 0
    p = np.exp((np.array(scores) - max(scores)) / balance)
    assert found[int(np.argmax(scores))] == math.ceil(round(budget * p.max() / p.sum(), 9))
    for i, a in enumerate(scores):
        for j, b in enumerate(scores):
            assert a <= b or found[i] + 1 >= found[j]


def test_the_budget_falls_by_complete_solutions(zoo):
    asked = rows(6)
    search = Rebase(zoo["tiny-sums-sft"], zoo["tokenizer"], evenly, delimiter=";", sampling=SUMS)
    for tree in search.search(encoded(zoo, asked), 8, range(6)):
        assert len(tree.solutions) == 8 and tree.nodes[0] == 8
        ended = Counter(len(path.steps) for path in tree.solutions)
        assert list(tree.nodes) == [8 - sum(n for d, n in ended.items() if d <= level)
                                    for level in range(max(ended))]  # fmt: skip


# ---- the same as without a memory


def test_every_path_has_the_probabilities_of_reading_it_anew(zoo):
    """Policy at its temperature, readers at 1, through selects and batches of different lengths; atol 1e-4."""
    policy, tuned, base = (zoo[name] for name in ("tiny-sums-sft", "tiny-chain", "tiny-base"))
    sampling = Sampling(40, temperature=0.8, batch_size=12)
    search = Rebase(policy, zoo["tokenizer"], contrast_scorer(tuned, base), delimiter=";", sampling=sampling)
    trees = search.search(encoded(zoo, rows(4)), 6, [3, 4, 5, 6])
    assert {len(step.tokens) for tree in trees for path in tree.solutions for step in path.steps} >= {3, 6}
    for path in (path for tree in trees for path in tree.solutions):
        tokens, at = torch.tensor(path.tokens), 0
        whole = torch.tensor([[*path.prompt_ids, *path.tokens]])
        expected = []
        for model, temperature in ((policy, 0.8), (tuned, 1.0), (base, 1.0)):
            with torch.no_grad():
                logits = model(whole).logits[0, len(path.prompt_ids) - 1 : -1]
            expected.append((logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0])
        for step in path.steps:
            span = slice(at, at + len(step.tokens))
            for found, model in zip((step.log_probs, *step.read), expected, strict=True):
                torch.testing.assert_close(torch.tensor(found), model[span], atol=1e-4, rtol=0)
            score = torch.sigmoid((expected[1][span] - expected[2][span]).mean())
            assert step.score == pytest.approx(float(score), abs=1e-4)
            at = span.stop
        assert zoo["tokenizer"].decode(path.tokens, skip_special_tokens=True) == path.text


def test_one_greedy_solution_is_the_greedy_completion(zoo):
    prompts = encoded(zoo, rows(8))
    sampling = Sampling(48, temperature=0.0)
    search = Rebase(zoo["tiny-chain"], zoo["tokenizer"], evenly, delimiter=";", sampling=sampling)
    greedy = LocalGenerator(zoo["tiny-chain"], zoo["tokenizer"], sampling)(prompts, 1, range(8))
    found = search(prompts, 1, range(8))
    assert [r.completion_ids for r in found] == [r.completion_ids for r in greedy]
    assert [(r.text, r.truncated) for r in found] == [(r.text, r.truncated) for r in greedy]


def test_a_sum_of_models_is_searched_as_one_model_is(zoo):
    from surgery.logits import member

    large, tuned, small = (member(zoo[name]) for name in ("tiny-base", "tiny-small-chain", "tiny-small-base"))
    ensemble, prompts, sampling = large + 1.0 * (tuned - small), encoded(zoo, rows(3)), Sampling(48, temperature=0.0)
    search = Rebase(ensemble, zoo["tokenizer"], evenly, delimiter=";", sampling=sampling)
    greedy = LocalGenerator(ensemble, zoo["tokenizer"], sampling)(prompts, 1, range(3))
    assert [r.text for r in search(prompts, 2, range(3))] == [r.text for r in greedy for _ in range(2)]
    assert all(";" in r.text for r in greedy) and Counted(ensemble).parameters == 447_552 + 2 * 163_072


@pytest.mark.parametrize("batch_size", [4, 9, 256])
def test_a_tree_does_not_depend_on_the_others(zoo, batch_size):
    prompts = encoded(zoo, rows(5))
    scorer = contrast_scorer(zoo["tiny-chain"], zoo["tiny-base"])

    def grown(prompts, seeds, size):
        sampling = Sampling(48, batch_size=size)
        return Rebase(zoo["tiny-sums-sft"], zoo["tokenizer"], scorer, delimiter=";", sampling=sampling).search(
            prompts, 4, seeds
        )

    together = grown(prompts, range(5), batch_size)
    for i, prompt in enumerate(prompts):
        (alone,) = grown([prompt], [i], 64)
        assert [p.tokens for p in alone.solutions] == [p.tokens for p in together[i].solutions]
        assert alone.nodes == together[i].nodes
    assert len({p.tokens for tree in together for p in tree.solutions}) > 8


def test_no_prefix_is_read_twice(zoo):
    """The prompt once, then every token that has a successor once for each model, a model named twice included."""
    policy, base = zoo["tiny-sums-grpo"], zoo["tiny-base"]
    scorer = contrast_scorer(policy, base)
    search = Rebase(policy, zoo["tokenizer"], scorer, delimiter=";", sampling=SUMS)
    (prompt,) = encoded(zoo, rows(1, terms=4))
    (tree,) = search.search([prompt], 8, [0])
    assert len(search.decoders.different) == 2
    written = {path.tokens[:n] for path in tree.solutions for n in range(1, len(path.tokens))}
    for one in search.decoders.different:
        # Equal solutions are written apart, so there may be more; abandoned nodes are read to their ends.
        assert len(prompt) + len(written) <= one.tokens <= len(prompt) + 7 * sum(tree.nodes)
    assert len(written) < tree.tokens < sum(one.tokens for one in search.decoders.different)
    assert search.decoders.spent == sum(one.tokens for one in search.decoders.different) * 447_552


# ---- what it is for


def test_steps_that_score_well_are_followed(zoo):
    """By a scorer that knows the way a vote is right more often than among as many plain samples, even weighted."""
    asked = rows(24, seed=9, terms=6)
    prompts, way = encoded(zoo, asked), {row["prompt"]: row["completion"] for row in asked}

    def rate(texts):
        split = [text.partition("=") for text in texts]
        return [float(way[f"{asked}{sign}"].startswith(work)) for asked, sign, work in split]

    sampling = Sampling(48, temperature=2.0)
    policy, tokenizer = zoo["tiny-chain"], zoo["tokenizer"]
    search = Rebase(policy, tokenizer, text_scorer(rate, tokenizer), delimiter=";", sampling=sampling)
    trees = search.search(prompts, 8, range(24))
    plain = LocalGenerator(policy, tokenizer, sampling)(prompts, 8, range(24))
    right = {"rebase": 0, "plain": 0}
    for i, (row, tree) in enumerate(zip(asked, trees, strict=True)):
        group = plain[8 * i : 8 * i + 8]
        scores = rate([row["prompt"] + rollout.text for rollout in group])
        for name, rollouts, weights in (("rebase", tree.rollouts, tree.last_scores), ("plain", group, scores)):
            right[name] += weighted_vote(samples(rollouts, marked_answer, scores=weights)).answer == row["answer"]
    assert right["rebase"] >= 18 and right["plain"] <= 12


def test_contrast_prefers_the_tuned_model_s_form(zoo):
    """Of direct and worked-out beginnings the contrast with tiny-chain scores the worked-out ones higher."""
    scorer = contrast_scorer(zoo["tiny-sums-grpo"], zoo["tiny-sums-sft"])
    search = Rebase(zoo["tiny-sums-sft"], zoo["tokenizer"], scorer, delimiter=";", sampling=SUMS, depth=1)
    paths = [p for tree in search.search(encoded(zoo, rows(10)), 8, range(10)) for p in tree.solutions]
    worked = [p.scores[0] for p in paths if p.text.endswith(";")]
    direct = [p.scores[0] for p in paths if p.text.startswith("#")]
    assert len(worked) > 10 and len(direct) > 10
    assert np.mean(worked) > 0.5 > np.mean(direct)


def test_stop_strings_limits_and_steps_without_a_delimiter(zoo):
    prompts = encoded(zoo, rows(3))
    base = zoo["tiny-sums-grpo"], zoo["tokenizer"], evenly
    for path in Rebase(*base, delimiter=";", sampling=Sampling(48, stop=("#",)))(prompts, 4, range(3)):
        assert not path.truncated and path.text[-1:] in ("", ";") and "#" not in path.text
    for path in Rebase(*base, delimiter=";", sampling=Sampling(9))(prompts, 4, range(3)):
        assert path.truncated == (path.completion_ids[-1] != 2) and len(path.completion_ids) in (3, 9)
    prompts = encoded(zoo, rows(3, terms=6))
    short = Rebase(*base, delimiter="no such text", sampling=SUMS, step_tokens=5, depth=3).search(prompts, 4, range(3))
    assert {len(s.tokens) for tree in short for path in tree.solutions for s in path.steps} == {5}
    assert all(len(path.steps) == 3 and not path.ended for tree in short for path in tree.solutions)


def test_models_are_left_as_they_were(zoo):
    model = zoo["tiny-sums-sft"]
    model.train()
    try:
        search = Rebase(model, zoo["tokenizer"], lambda paths: [math.nan] * len(paths), delimiter=";", sampling=SUMS)
        with pytest.raises(SurgeryError, match="one finite number a step"):
            search(encoded(zoo, rows(1)), 2, [0])
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert all(p.grad is None for p in model.parameters())


def test_wrong_input(zoo):
    model, tokenizer = zoo["tiny-base"], zoo["tokenizer"]
    for wrong in ({"balance": 0.0}, {"delimiter": ""}, {"step_tokens": 0}, {"depth": 256}):
        with pytest.raises(SurgeryError, match="REBASE"):
            Rebase(model, tokenizer, evenly, **wrong)
    search = Rebase(model, tokenizer, evenly, sampling=Sampling(48))
    with pytest.raises(SurgeryError, match="one seed a prompt"):
        search([[3]], 2, [])
    with pytest.raises(SurgeryError, match="don't fit into the context"):
        search([[3] * search.decoders.context], 2, [0])
    with pytest.raises(SurgeryError, match="1 steps"):
        Rebase(model, tokenizer, lambda paths: [], sampling=Sampling(2))([[3]], 1, [0])


def test_a_chorus_reads_each_model_once(zoo):
    one, other = zoo["tiny-base"], zoo["tiny-chain"]
    chorus = Chorus([one, other, one])
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    with torch.no_grad():
        logits, state = chorus.prefill(ids, torch.tensor([[1, 1, 1], [0, 1, 1]]))
        tokens = torch.tensor([4, 5])
        said = chorus.said(tokens, state)
        expected = one(ids[1:, 1:]).logits[0, -1].log_softmax(-1)[5]
        assert said[1][1] == pytest.approx(float(expected), abs=1e-5)
        chorus.step(tokens, state.repeat(1))
    assert len(said) == 2 and said[0] != said[1]
    assert [counted.tokens for counted in chorus.different] == [7, 7]
    assert Counted(one).parameters == 447_552
    assert torch.equal(logits, state.logits[0])
