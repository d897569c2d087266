"""Inside the claims about differences at the logits."""

import copy

import numpy as np
import pytest
import torch

from surgery.models import Pair, load


@pytest.mark.parametrize("experiment", ["upscaling"], indirect=True)
def test_what_has_one_peak(experiment):
    assert experiment.valley([0.1, 0.5, 0.5, 0.9, 0.2]) == 0
    assert experiment.valley([0.1, 0.2, 0.3]) == experiment.valley([0.3, 0.2, 0.1]) == 0
    assert experiment.valley([0.1, 0.8, 0.5, 0.7, 0.2]) == pytest.approx(0.2), "0.5 lies 0.2 below the lower peak"
    assert experiment.fall([0.0, 0.4, 0.4, 1.0]) == 0
    assert experiment.fall([0.0, 0.4, 0.1, 1.0]) == pytest.approx(0.3)
    points = [(0.2, 1.0), (0.9, 0.7), (1.0, 0.4)]
    assert [experiment.frontier(points, least) for least in (0.1, 0.5, 0.95, 1.1)] == [1.0, 0.7, 0.4, 0.4]


@pytest.mark.parametrize("experiment", ["upscaling"], indirect=True)
def test_mixtures_are_held_against_the_line_between_their_ends(experiment):
    Result = experiment.Result

    def run(*points):
        scores = {}
        for share, (a, b) in zip((0, 0.5, 1), points, strict=True):
            answers = {"chain": [1] * a + [0] * (10 - a), "shift": [1] * b + [0] * (10 - b)}
            scores[f"chain+shift/{share:g}"] = {task: Result.of(values) for task, values in answers.items()}
        full = {part: Result.of([1.0]) for part in ("chain", "shift", "skills")}
        return scores | {"chain+shift/both in full": full}

    ask = lambda *points: experiment.of_shares({0: run(*points)}, ("chain", "shift"), (0, 0.5, 1))  # noqa: E731
    beyond = lambda found: [round(one["mean"], 6) for one in found["beyond"]]  # noqa: E731
    assert beyond(ask((0, 10), (5, 5), (10, 0))) == [0, 0, 0]
    assert beyond(ask((2, 10), (10, 10), (10, 0))) == [0, 1, 0], "both skills at once: a whole line beyond"
    assert beyond(ask((2, 10), (2, 5), (10, 0))) == [0, -0.5, 0]
    assert ask((2, 10), (2, 5), (10, 0))["ordered"] and not ask((2, 10), (0, 5), (10, 0))["ordered"]


@pytest.mark.parametrize("experiment", ["upscaling"], indirect=True)
def test_the_large_base_knows_sums(experiment):
    known = experiment.margins({"test": 9})
    assert (known["chain"] > 1).all(), "tiny-base knows the facts, tiny-small-base does not"
    assert known["chain"].mean() > known["rotate"].mean() + 1


@pytest.mark.parametrize("experiment", ["unir_transfer"], indirect=True)
def test_a_negated_module_cancels_itself(experiment):
    model, _ = load("tiny-small-base")
    before = copy.deepcopy(model.state_dict())
    other = experiment.negated(model)
    ids = torch.tensor([[1, 5, 9, 20]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, -other(ids).logits)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("experiment", ["three_spaces"], indirect=True)
def test_the_three_spaces_meet_at_the_tuned_model_and_part_elsewhere(experiment):
    base, tokenizer = load("tiny-base")
    tuned, _ = load("tiny-chain")
    pair, prompts = Pair(base, tuned, tokenizer), [[1, 17, 5, 13, 6, 15], [1, 17, 9, 13, 3, 14, 4, 15]]
    before = [copy.deepcopy(model.state_dict()) for model in (base, tuned)]
    ask = {space: {a: experiment.divergences(pair, space, a, prompts, 0, 36) for a in (0.0, 0.5, 1.0)}
           for space in experiment.SPACES}  # fmt: skip
    for found in ask.values():
        assert found[1.0]["KL from tuned"] == pytest.approx(0, abs=1e-4)
        assert found[1.0]["KL from base"] == pytest.approx(ask["weights"][1.0]["KL from base"], abs=1e-3)
        assert 0 < found[0.5]["KL from base"] < found[1.0]["KL from base"]
    for space in ("weights", "logits"):
        assert ask[space][0.0]["KL from base"] == pytest.approx(0, abs=1e-4)
    assert ask["stream"][0.0]["KL from base"] > 1e-3, "between tuned embeddings and head"
    assert len({round(found[0.5]["KL from base"], 6) for found in ask.values()}) == 3
    for kept, model in zip(before, (base, tuned), strict=True):
        assert all(torch.equal(kept[name], p) for name, p in model.state_dict().items())


@pytest.mark.parametrize("experiment", ["three_spaces"], indirect=True)
def test_strengths_are_matched_on_straight_lines_up_to_the_tuned_model(experiment):
    line = [{"KL from base": kl, "target": t, "skills": s} for kl, t, s in ((0, 0.2, 1), (4, 1, 0.6), (10, 1, 0))]
    found = experiment.at_level([0.0, 1.0, 1.5], line, 2)
    assert found == {"target": pytest.approx(0.6), "skills": pytest.approx(0.8), "alpha": pytest.approx(0.5)}
    assert experiment.at_level([0.0, 1.0, 1.5], line, 6) is None, "beyond the tuned model"
    assert experiment.at_level([0.0, 1.0], [{**line[1]}, {**line[2]}], 2) is None, "begins above"


@pytest.mark.parametrize("experiment", ["three_spaces"], indirect=True)
def test_what_dominates(experiment):
    said = lambda target, skills: experiment.of_domination(  # noqa: E731
        {key: {"mean": np.mean(ends), "low": ends[0], "high": ends[1]} for key, ends in
         (("target", target), ("skills", skills))}
    )  # fmt: skip
    assert said((0.1, 0.2), (-0.01, 0.01)) == "held" == said((0.1, 0.2), (0.1, 0.2))
    assert said((0.1, 0.2), (-0.2, -0.1)) == "in part"
    assert said((-0.01, 0.01), (-0.01, 0.01)) == "no clear difference"
    assert said((-0.01, 0.01), (-0.2, -0.1)) == "the other way round"
    assert experiment.of_domination(None) == "not asked"
