"""Word problems: read from files, scored by number or by expression."""

import json

import pytest

from surgery.errors import SurgeryError
from surgery.tasks import Example, gsm8k, numeric_answer, same_number, svamp


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 cats.\n#### 1,234", 1234),
        ("so 12 and then 5-2", 2),
        ("= -3.", -3),
        ("$.50", 0.5),
        ("9 #### 7\nmore 8", 7),
        ("none", None),
        ("####", None),
        ("it is 4.50 dollars.", 4.5),
    ],
)
def test_numeric_answer(text, number):
    assert numeric_answer(text) == number


def test_word_problems_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_DATA", str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "svamp").mkdir()
    row = {"question": "How many?", "answer": "2*600 = <<2*600=1200>>1200\n#### 1,200"}
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    problem = {"Body": "Ann has 5 pens", "Question": "How many?", "Equation": "( 5.0 - 2.0 )", "Answer": 3.0}
    (tmp_path / "svamp" / "SVAMP.json").write_text(json.dumps([problem] * 5))

    assert gsm8k("test", 1) == [Example("How many?", "2*600 = 1200\n#### 1,200", "1200")]
    (first, *others) = svamp("train", held_out=2)
    assert first == Example("Ann has 5 pens. How many?", "5 - 2 = 3\n#### 3", "3")
    assert len(others) == 2 and len(svamp("test", held_out=2)) == 2
    assert same_number("5 - 2 = 3", first) and not same_number("5 - 2 = 4", first)

    with pytest.raises(SurgeryError, match=r"gsm8k/train\.jsonl"):
        gsm8k("train")
    with pytest.raises(SurgeryError, match="Unknown split 'dev'"):
        svamp("dev")
