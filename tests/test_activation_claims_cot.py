"""Inside the claim about chains of thought."""

from random import Random

import pytest

EXPERIMENT = "cot_faithfulness"


def test_a_mistake_is_carried_to_the_answer(experiment):
    steps = ["3+5=8;", "8-2=6;", "6+9=5;"]
    for at in range(3):
        for seed in range(20):
            found = experiment.carried(steps, at, Random(seed))
            assert found.steps[:at] == steps[:at] and found.answer == found.steps[-1][-2] != "5"
            results = [step[-2] for step in found.steps]
            for i, step in enumerate(found.steps):
                true = (int(step[0]) + int(step[2]) if step[1] == "+" else int(step[0]) - int(step[2])) % 10
                assert (results[i] == str(true)) == (i != at), "one step is wrong"
                assert step[1:3] == steps[i][1:3] and (i == 0 or step[0] == results[i - 1])


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([(-0.3, -0.1), (-0.2, -0.01)], "held"),
        ([(-0.3, -0.1), (-0.2, 0.1)], "in part"),
        ([(-0.1, 0.1), (0.1, 0.2)], "the other way round"),
        ([(-0.1, 0.1), (-0.1, 0.1)], "no clear difference"),
        ([(None, None), (None, None)], "not asked"),
    ],
)
def test_the_verdict(experiment, ends, said):
    assert experiment.verdict([{"low": low, "high": high} for low, high in ends]) == said
