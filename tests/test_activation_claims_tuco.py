"""Inside the claims about TuCo and the real model from the inside."""

import sys
from random import Random

import numpy as np
import pytest


@pytest.mark.parametrize("experiment", ["smollm2_activations"], indirect=True)
def test_without_the_data_it_says_so(experiment, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SURGERY_DATA", str(tmp_path))
    with pytest.raises(experiment.SurgeryError, match="tinyshakespeare is missing"):
        experiment.shakespeare(None, [4], Random(0))
    monkeypatch.setattr(experiment, "get", lambda name: tmp_path)
    monkeypatch.setattr(sys, "argv", ["smollm2_activations.py", "--out", str(tmp_path / "out")])
    experiment.main()
    assert capsys.readouterr().out.startswith("Nothing was run: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("experiment", ["smollm2_activations"], indirect=True)
def test_pieces_are_as_long_as_asked(experiment, monkeypatch, tmp_path):
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("to be or not " * 500)
    monkeypatch.setenv("SURGERY_DATA", str(tmp_path))
    words = {"to": 1, "be": 2, "or": 3, "not": 4}
    read = lambda text, add_special_tokens: {"input_ids": [words.get(w, 0) for w in text.split()]}  # noqa: E731
    found = experiment.shakespeare(read, [2, 3, 2], Random(0))
    assert [len(ids) for ids in found] == [2, 3, 2]
    assert all(0 not in ids for ids in found), "a piece begins with a whole word"


@pytest.mark.parametrize("experiment", ["tuning_contribution"], indirect=True)
def test_what_rises(experiment):
    assert experiment.rises([0.1, 0.4, 1.0, 1.0]) and not experiment.rises([0.1, 0.4, 0.3, 1.0])
    assert not experiment.rises([1.0, 1.0])
    assert experiment.spearman([0, 1, 2], [0.1, 0.5, 0.7]) == pytest.approx(1)
    assert experiment.spearman([0, 1, 2], [0.7, 0.5, 0.1]) == pytest.approx(-1)
    assert experiment.spearman([0, 1, 2], [1, 1, 1]) == 0
    assert experiment.spearman([0, 1, 2], [0, 1, 1]) == pytest.approx(np.sqrt(3) / 2)
    told = experiment.told_of
    assert [told([True, True]), told([True, False]), told([False])] == ["held", "in part", "did not hold"]
    assert told([None, True]) == "not asked"
