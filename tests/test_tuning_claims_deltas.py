"""Inside the claim about adding sparse deltas."""

import pytest
import torch

EXPERIMENT = "sparse_deltas"


def test_the_arm_called_lt_sft_is_the_lottery_of_recipes(experiment):
    """At one learning rate for both phases: the same numbers, trained to the same bits."""
    settings = {"steps": {"task": 2, "cipher": 2}, "rows": 4}
    dense = experiment.tuned("task", 3, 1e-3, None, settings)
    chosen = experiment.selection("LT-SFT", 0.01, 3, dense, None)
    ours = experiment.tuned("task", 3, 1e-3, chosen, settings)
    density = chosen.count / experiment.start()[2]
    words = {"lottery": {"density": density, "modules": experiment.MODULES}}
    drawn = experiment.tuned("task", 3, 1e-3, words, settings)
    moved = 0
    for before, one, other in zip(*(m.parameters() for m in (experiment.start()[0], ours, drawn)), strict=True):
        assert torch.equal(one, other)
        moved += int((one != before).sum())
    assert 0.9 * chosen.count < moved <= chosen.count


def test_the_cipher_changes_answers_only(experiment):
    row = {"prompt": "c ajb=", "completion": "#ajb", "answer": "ajb", "task": "copy"}
    assert experiment.ciphered(row) == {**row, "completion": "#bac", "answer": "bac"}
    rows = experiment.Rows("cipher", 0)
    assert rows.row(5) == rows.row(5) != rows.row(6)
    plain, changed = (experiment.questions(name, 50, 990) for name in ("rotate", "rotate*"))
    assert [r["prompt"] for r in plain] == [r["prompt"] for r in changed]
    assert all(a["answer"] != b["answer"] for a, b in zip(plain, changed, strict=True))


@pytest.mark.parametrize(
    ("both", "lost", "said"), [((0.3, 0.1), -0.1, "held"), ((0.3, 0.1), 0.2, "in part"), ((-0.1, -0.3), 0.0, "other")]
)
def test_the_verdict_follows_its_rule(experiment, both, lost, said):
    """From made-up runs in which LT-SFT at 5 % differs from all others by `both`, and loses `lost` more."""
    from analysis.results import Result

    runs = {}
    for seed, offset in enumerate(both * 2):
        run = {}
        for arm in experiment.ARMS:
            mine = arm == "LT-SFT 5%"
            values = [0.5 + (offset if mine else 0.0)] * 4
            run[arm] = {**dict.fromkeys(experiment.PLAIN, 0.5), "both": Result.of(values, "abcd"), "count": [1, 1]}
            run[arm] |= {"both, scaled": run[arm]["both"], "lost": 0.1 + (lost + 0.01 * seed if mine else 0.0)}
        runs[seed] = run
    found = {"rates": {"full": {}}, "scales": dict.fromkeys(experiment.ARMS, 1.0)}
    verdicts = experiment.summarised(runs, found)["verdicts"]
    assert said in verdicts["less interference than full, 5%"]
    assert verdicts["less interference than full, 1%"] == "no clear difference"
    assert verdicts["a sibling's mask transfers, 1%"] == "no clear difference"


def test_asked_afterwards_are_arms_that_fit_as_well_at_their_smallest_rates(experiment):
    from analysis.results import Result

    both = {"cipher": {"0.003": -0.05, "0.01": -0.02}, "task": {"0.003": -0.3, "0.01": -0.004}}
    scores = {
        "full": {kind: {"0.001": -0.048} for kind in both},
        "LT-SFT 5%": both,
        "random 5%": {**both, "cipher": {"0.003": -0.2, "0.01": -0.06}},
    }
    found = {"scores": scores}
    assert experiment.gentle(found) == {"LT-SFT 5%": {"cipher": 0.003, "task": 0.01}}
    one = dict.fromkeys(experiment.PLAIN, 0.5)
    runs = {s: {"full": {**one, "both": Result.of([0, 0, 1, 1], "abcd")},
                "LT-SFT 5%": {**one, "both": Result.of([1, 1, 1, 1], "abcd")}} for s in (1, 2)}  # fmt: skip
    told = experiment.told_afterwards(runs, found)["LT-SFT 5%"]
    assert told["both"]["mean"] == 1 and told["more"]["mean"] == 0.5
