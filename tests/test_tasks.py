"""The tasks: exact answers, the same from the same seed; word problems read and scored."""

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.tasks import TASKS, Example, gsm8k, numeric_answer, same_number, svamp

BY_HAND = {
    "copy": ("c bacb=", "bacb"),
    "reverse": ("r bacb=", "bcab"),
    "sort": ("s bacb=", "abbc"),
    "shift": ("n bajb=", "cbac"),
    "descend": ("d bacb=", "cbba"),
    "unique": ("u bacb=", "bac"),
    "swap": ("x bacd=", "dacb"),
    "rotate": ("o bacd=", "acdb"),
    "double": ("w bac=", "bbaacc"),
    "last": ("l bac=", "ccc"),
}


@given(name=st.sampled_from(sorted(TASKS)), seed=st.integers(0, 10_000))
def test_the_response_is_right_and_anything_else_is_wrong(name, seed):
    task = TASKS[name]
    one = task.example(Random(seed))
    assert one == task.example(Random(seed))
    assert task.correct(one.response, one)
    assert not task.correct(one.response + "a", one)
    assert not task.correct(one.response.replace("#", ""), one)
    assert len("<" + one.prompt + one.response) < 64


def test_string_tasks_against_answers_by_hand():
    class Fixed(Random):
        """Draws the letters of one string."""

        def __init__(self, text):
            super().__init__(0)
            self.text = list(text)

        def randint(self, low, high):
            return len(self.text)

        def choice(self, letters):
            return self.text.pop(0)

    for name, (prompt, answer) in BY_HAND.items():
        one = TASKS[name].example(Fixed(prompt[2:-1]))
        assert (one.prompt, one.answer) == (prompt, answer)


@given(seed=st.integers(0, 10_000))
def test_chain_steps_follow_from_each_other(seed):
    one = TASKS["chain"].example(Random(seed))
    total = eval(one.prompt[2:-1]) % 10
    assert one.answer == str(total)
    *steps, last = one.response.split(";")
    assert last == f"#{total}"
    for step in steps:
        question, result = step.split("=")
        assert str(eval(question) % 10) == result


def test_prompts_tell_the_tasks_apart():
    letters = {name: TASKS[name].example(Random(0)).prompt[0] for name in TASKS}
    assert letters.pop("direct") == letters.pop("chain") == letters["facts"]
    assert len(set(letters.values())) == len(letters)


def test_examples_are_different_and_repeatable():
    some = TASKS["facts"].examples(100, seed=3)
    assert len({e.prompt for e in some}) == 100
    assert some == TASKS["facts"].examples(100, seed=3) != TASKS["facts"].examples(100, seed=4)
    with pytest.raises(SurgeryError, match="has only about 200 prompts"):
        TASKS["facts"].examples(201)
    with pytest.raises(SurgeryError, match="Did you mean 'reverse'"):
        TASKS.lookup("revers")


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
