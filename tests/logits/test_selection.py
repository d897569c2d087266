"""Votes, best of n and clusters: what they choose among the samples of one prompt."""

import math
from itertools import combinations
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.passk import majority_at_k, pass_at_k
from analysis.results import Result
from surgery.decoding import Rollout
from surgery.errors import SurgeryError
from surgery.logits.search.clusters import (
    Cluster,
    by_answer,
    by_key,
    by_vectors,
    cosine_distances,
    edit_distances,
    medoid,
    ranked,
)
from surgery.logits.search.selection import (
    SELECTORS,
    WEIGHTS,
    Sample,
    best_of_n,
    majority,
    samples,
    weighted_vote,
)
from surgery.tasks.base import marked_answer

SAID = st.lists(st.sampled_from(["3", "4", "5", None]), min_size=1, max_size=7)


def said(answers, seed=0, scores=None):
    """Samples with these answers, no two of the same log-probability."""
    rng = Random(seed)
    return [
        Sample(f"{i}#{a}", a, tuple(-rng.random() for _ in range(3)), None if scores is None else scores[i])
        for i, a in enumerate(answers)
    ]


def correct(answers):
    values = np.array([[float(a == "4") for a in answers]])
    return Result(values, {"example": [0], "sample": range(len(answers))}, "accuracy")


# ---- samples


def test_samples_of_rollouts_and_of_texts():
    rollouts = [Rollout([1], [2, 3], [-0.5, -0.25], False, "1+2=3;#3"), Rollout([1], [2], [-1.0], True, "no")]
    drawn = samples(rollouts, marked_answer, scores=[1, 0])
    assert [s.answer for s in drawn] == ["3", None] and [s.score for s in drawn] == [1.0, 0.0]
    assert drawn[0].log_prob == -0.75
    texts = samples([r.text for r in rollouts], marked_answer, log_probs=[r.log_probs for r in rollouts], scores=[1, 0])
    assert texts == drawn
    with pytest.raises(SurgeryError, match="2 completions, but 1 entries of scores"):
        samples(rollouts, marked_answer, scores=[1])


# ---- invariants


@given(SAID)
def test_majority_of_one_is_mean_accuracy(answers):
    right = np.mean([majority([s]).answer == "4" for s in said(answers)])
    assert right == pytest.approx(majority_at_k(correct(answers), [answers], [1]).values[0, 0], abs=1e-12)
    assert right == pytest.approx(np.mean([a == "4" for a in answers]), abs=1e-12)


@given(SAID, st.data())
def test_best_of_n_by_an_oracle_is_pass_at_n(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    drawn = said(answers, scores=[float(a == "4") for a in answers])
    found = np.mean([best_of_n(subset).answer == "4" for subset in combinations(drawn, k)])
    assert found == pytest.approx(pass_at_k(correct(answers), [k]).values[0, 0], abs=1e-12)


@pytest.mark.parametrize("choose", [majority, weighted_vote, best_of_n, lambda s: weighted_vote(s, "mean")])
@given(answers=SAID, seed=st.integers(0, 5))
def test_the_order_of_samples_does_not_matter(choose, answers, seed):
    rng = Random(seed)
    drawn = said(answers, seed, [rng.randint(0, 2) for _ in answers])
    other = rng.sample(drawn, len(drawn))
    first, second = choose(drawn), choose(other)
    assert first.answer == second.answer and first.support == second.support
    if first.sample is not None:
        assert drawn[first.sample] == other[second.sample]


@given(SAID)
def test_a_vote_of_equal_weights_is_the_majority(answers):
    drawn = said(answers, scores=[0.5] * len(answers))
    assert weighted_vote(drawn).answer == majority(drawn).answer == weighted_vote(drawn, lambda s: 2.0).answer


# ---- what is chosen


def test_ties_go_to_the_larger_summed_log_probability_then_to_the_first():
    a, b, c = (Sample(x, x, (p,)) for x, p in (("a", -1.0), ("b", -0.5), ("c", -0.5)))
    assert majority([a, b, c]).answer == "b" and majority([a, c, b]).answer == "c"
    assert majority([a, a, b]).answer == "a"
    assert majority([b, Sample("b!", "b", (-2.0,)), c, Sample("c!", "c", (-1.9,))]).answer == "c"
    assert best_of_n([a, b, c], lambda s: 1.0).sample == 1


def test_the_most_probable_sample_stands_for_the_answer():
    drawn = [Sample("x", "4", (-3.0,)), Sample("y", "4", (-1.0,)), Sample("z", "5", (-0.1,))]
    choice = majority(drawn)
    assert choice == ("4", 1, {"4": 2.0, "5": 1.0})


def test_weights():
    sample = Sample("t", "4", (-0.5, -1.5), 0.25)
    found = {name: weigh(sample) for name, weigh in WEIGHTS.items()}
    assert found == {"one": 1.0, "reward": 0.25, "mean": math.exp(-1.0), "least": math.exp(-1.5)}
    with pytest.raises(SurgeryError, match="no log-probabilities"):
        WEIGHTS["mean"](Sample("t", "4"))
    with pytest.raises(SurgeryError, match="no score"):
        weighted_vote([Sample("t", "4", (-1.0,))])


def test_a_weighted_vote_may_overrule_the_majority():
    drawn = said(["3", "3", "4"], scores=[0.1, 0.2, 0.9])
    assert majority(drawn).answer == "3"
    assert weighted_vote(drawn) == ("4", 2, {"3": pytest.approx(0.3), "4": 0.9})


def test_what_can_not_vote_or_be_chosen():
    silent = [Sample("a", None, (-1.0,), 3.0), Sample("b", None, (-2.0,), 4.0)]
    assert majority(silent) == (None, None, {})
    assert best_of_n(silent).sample == 1
    with pytest.raises(SurgeryError, match=r"weight -0\.5"):
        weighted_vote(said(["3"], scores=[-0.5]))
    with pytest.raises(SurgeryError, match="score of sample 1 is not a number"):
        best_of_n(said(["3", "4"], scores=[0.0, math.nan]))
    for choose in SELECTORS.values():
        with pytest.raises(SurgeryError, match="no sample"):
            choose([])
    with pytest.raises(SurgeryError, match="Did you mean 'reward'"):
        weighted_vote(said(["3"]), "rewards")


# ---- clusters


@settings(max_examples=50)
@given(SAID)
def test_clusters_by_answer_rank_as_the_vote(answers):
    drawn = said(answers, scores=[0.5 + i for i in range(len(answers))])
    best = ranked(by_answer(drawn), drawn, "reward")
    choice = weighted_vote(drawn)
    assert [c.key for c in best[:1]] == [choice.answer][: len(best)]
    assert sorted(i for c in best for i in c.members) == [i for i, a in enumerate(answers) if a is not None]


def test_clusters_by_what_programs_do():
    drawn = [Sample(text, None) for text in ("x+x", "2*x", "x**2", "x+", "2*x*1")]

    def trace(sample):
        try:
            return tuple(eval(sample.text, {"x": x}) for x in (1, 2, 3))
        except SyntaxError:
            return None

    groups = by_key(drawn, trace)
    assert [(g.members, g.key) for g in groups] == [((0, 1, 4), (2, 4, 6)), ((2,), (1, 4, 9))]
    best = ranked(groups[::-1], drawn)[0]
    assert best.members == (0, 1, 4)
    assert drawn[medoid(best, edit_distances(drawn))].text == "2*x"


def test_clusters_by_vectors():
    angles = np.radians([0, 10, 20, 90, 95, 200])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1) * np.arange(1, 7)[:, None]
    close = math.cos(math.radians(25))
    assert {c.members for c in by_vectors(vectors, close)} == {(0, 1, 2), (3, 4), (5,)}
    assert len(by_vectors(vectors, 1.0)) == 6 and len(by_vectors(vectors, -1.0)) == 1
    assert medoid(Cluster((0, 1, 2)), cosine_distances(vectors)) == 1
    assert by_vectors(vectors[:1]) == [Cluster((0,))]
    doubled = np.concatenate([vectors, vectors])
    assert {c.members for c in by_vectors(doubled, 1.0 - 1e-12)} == {(i, i + 6) for i in range(6)}


def test_vectors_that_have_no_cosine():
    with pytest.raises(SurgeryError, match="Vector 1 is 0"):
        by_vectors(np.array([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(SurgeryError, match="all finite"):
        by_vectors(np.array([[1.0, np.nan]]))
    with pytest.raises(SurgeryError, match="expected a cosine"):
        by_vectors(np.eye(2), 1.5)
    with pytest.raises(SurgeryError, match="no medoid"):
        medoid(Cluster(()), np.eye(2))


def test_edit_distances_are_symmetric_and_0_for_equal_texts():
    distances = edit_distances([Sample(t, None) for t in ("abcd", "bcde", "abcd", "xyz")])
    assert np.array_equal(distances, distances.T) and np.all(np.diag(distances) == 0)
    assert distances[0, 2] == 0 and distances[0, 3] == 1 and 0 < distances[0, 1] < 0.5
