"""Forgetting over a task sequence, against numbers worked out by hand."""

import numpy as np
import pytest

from analysis.forgetting import Forgetting, forgetting
from analysis.results import Result, stack
from surgery.errors import SurgeryError


def stage(**tasks) -> Result:
    """Accuracy per example, by task."""
    values = [v for part in tasks.values() for v in part]
    names = [name for name, part in tasks.items() for _ in part]
    return Result.of(values, name="accuracy", columns={"task": names, "completion": [str(v) for v in values]})


STAGES = {
    "before": stage(copy=[1, 1, 1, 1], chain=[0, 0], sort=[0, 0, 0, 0]),
    "chain": stage(copy=[1, 1, 1, 0], chain=[1, 1], sort=[0, 0, 0, 0]),
    "sort": stage(copy=[1, 0, 0, 0], chain=[1, 0], sort=[1, 1, 1, 0]),
}


def test_matrix_final_average_and_forgetting():
    found = forgetting(STAGES)
    np.testing.assert_allclose(found.matrix, [[1, 0, 0], [0.75, 1, 0], [0.25, 0.5, 0.75]])
    assert found.trained == ["chain", "sort"] and found.tasks == ["copy", "chain", "sort"]
    assert found.final.mean == pytest.approx((0.5 + 0.75) / 2)  # tasks count alike, though chain has fewer examples
    assert found.lost.mean == pytest.approx(-0.5) and len(found.lost) == 2
    assert found.kept.mean == pytest.approx(-0.75)
    told = found.summary()
    assert told["forgetting"]["mean"] == -0.5 and told["matrix"][2] == [0.25, 0.5, 0.75]


def test_order_of_asking_does_not_matter_and_one_stage_forgets_nothing():
    part = {"sort": STAGES["sort"].where([t != "copy" for t in STAGES["sort"].columns["task"]])}
    found = forgetting(part)
    assert found.trained == ["sort"] and len(found.lost) == 0 and found.summary()["forgetting"] is None
    assert found.plot().axes


def test_it_can_be_saved_and_looked_at_again(tmp_path):
    found = forgetting(STAGES)
    found.result.save(tmp_path / "sequence")
    again = Forgetting(Result.load(tmp_path / "sequence"))
    np.testing.assert_array_equal(again.matrix, found.matrix)
    figure = again.plot()
    assert len(figure.axes[0].patches) == 2 and "forgetting -0.50" in figure.get_suptitle()


def test_wrong_sequences_are_refused():
    with pytest.raises(SurgeryError, match="stage 'rotate' is not among them"):
        forgetting({**STAGES, "rotate": STAGES["sort"]})
    with pytest.raises(SurgeryError, match="no stage is one of them"):
        forgetting({"before": STAGES["before"]})
    with pytest.raises(SurgeryError, match="different examples"):
        forgetting({"before": STAGES["before"], "chain": stage(chain=[1])})
    with pytest.raises(SurgeryError, match="a column task"):
        Forgetting(Result.of([1.0]))


def test_results_stack_side_by_side():
    stacked = stack({3: STAGES["before"], 5: STAGES["sort"]}, "seed")
    assert stacked.axes["seed"] == [3, 5] and stacked.values.shape == (10, 2)
    assert stacked.columns["task"] == STAGES["sort"].columns["task"]
    assert stacked.columns["completion"][1] == ["1", "0"]
    assert stacked.over("seed").values[1] == 0.5
    with pytest.raises(SurgeryError, match="no axis 'layer'"):
        stacked.over("layer")
    with pytest.raises(SurgeryError, match="No results"):
        stack({}, "seed")
    assert [row["task"] for row in STAGES["sort"].table("task")] == ["copy", "chain", "sort"]
    with pytest.raises(SurgeryError, match="no column 'level'"):
        STAGES["sort"].table("level")
