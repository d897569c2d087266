"""The claim about SAE-tuning: its verdicts are those that were defined, and its arms are paired."""

EXPERIMENT = "sae_tuning"


def found(low):
    return {"mean": low + 1, "low": low, "high": low + 2}


def test_verdicts_are_what_was_defined(experiment):
    yes, no = found(0.1), found(-0.1)
    controls = dict.fromkeys(experiment.CONTROLS, yes)
    assert experiment.verdict({"T": yes, **controls}) == "held"
    assert experiment.verdict({"T": yes, **controls, "noise": no}) == "in part"
    assert experiment.verdict({"T": no, **controls}) == "did not hold"
    gains = {"transplanted": yes, "trained there": {**yes, "mean": 2.1}}
    assert experiment.transplant_verdict([gains, gains]) == "held"
    assert experiment.transplant_verdict([gains, {**gains, "trained there": {**yes, "mean": 2.3}}]) == "in part"
    assert experiment.transplant_verdict([{**gains, "transplanted": no}] * 2) == "did not hold"


def test_what_is_recovered_is_a_share_of_the_lead_and_paired(experiment):
    from surgery.sae.tune_run import Outcome

    target, source = [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]
    arms = {"source": {0: [1.0, 1.0, 0.0, 0.0], 1: [1.0, 1.0, 0.0, 0.0]}, "own": {0: source, 1: source}}
    chosen = {arm: {"site": "resid_post.1", "lr": 1e-4} for arm in arms}
    arms_told = experiment.compared(Outcome(target, source, arms, chosen))
    assert arms_told["source"]["recovered"]["mean"] == 0.5 and arms_told["own"]["recovered"]["mean"] == 1.0
    assert arms_told["own"]["against source"]["mean"] == -0.25 and arms_told["source"]["against source"]["high"] == 0.0


def test_both_recipes_are_whole(experiment):
    for words in (experiment.RECIPE, experiment.WORKED):
        full, fast = (experiment.recipe(words, quick, [0, 1]) for quick in (False, True))
        assert full.seeds == [0, 1] and fast.seeds == [0] and fast.tuning.steps == 1 < full.tuning.steps
        assert not set(full.sweep.seeds) & set(experiment.RECIPE["seeds"])
    assert {"source", *experiment.CONTROLS} <= set(experiment.recipe(experiment.RECIPE, False, [0]).arms)
