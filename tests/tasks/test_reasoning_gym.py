"""Tasks of reasoning-gym: posed and scored by it, the same from the same seed; a sentence when it is missing."""

import json
import sys

import pytest

from surgery.errors import SurgeryError
from surgery.tasks import make_task, verify

NAMES = [
    "chain_sum",
    "gsm_symbolic",
    "knights_knaves",
    "letter_counting",
    "leg_counting",
    "spell_backward",
    "word_ladder",
]


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_right_and_others_wrong(gym, name):
    one = make_task(f"reasoning_gym:{name}")
    for i in range(8):
        row = json.loads(json.dumps(one.row(5, i)))
        assert verify(row["completion"], row) is True
        assert verify(f"<think>9 9</think><answer>{row['completion']}</answer>", row) is True
        assert verify("", row) is False and verify("a cat", row) is False
        assert row["task"] == f"reasoning_gym:{name}" and row["category"] == name
    assert one.row(5, 3) == one.row(5, 3) != one.row(6, 3)


def test_options_reach_the_data_set(gym):
    one = make_task("reasoning_gym:chain_sum", min_terms=4, max_terms=4, min_digits=1, max_digits=1)
    row = one.row(0, 0)
    assert row["difficulty"] == 5 and row["knobs"]["min_terms"] == 4
    question = row["prompt"].partition(":")[2].partition("=")[0]
    assert len(question.replace("-", "+").split("+")) == 4
    with pytest.raises(SurgeryError, match="no option 'min_term'.\nDid you mean 'min_terms'"):
        make_task("reasoning_gym:chain_sum", min_term=4)
    with pytest.raises(SurgeryError, match="refuses the options of 'chain_sum'"):
        make_task("reasoning_gym:chain_sum", min_terms=4, max_terms=2)
    with pytest.raises(SurgeryError, match="no data set 'chain_sums'.\nDid you mean 'chain_sum'"):
        make_task("reasoning_gym:chain_sums")


def test_a_task_without_one_answer_has_no_demonstration(gym):
    row = make_task("reasoning_gym:propositional_logic").row(0, 0)
    assert row["completion"] == row["answer"] == "" and verify("", row) is False


def test_without_the_package_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SurgeryError, match="need the package reasoning-gym") as error:
        make_task("reasoning_gym:chain_sum")
    assert "pip install --no-deps reasoning-gym" in error.value.hint
