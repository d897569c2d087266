"""The character tasks: exact answers, the same from the same seed."""

import hashlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.tasks import TASKS, make_task

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

NAMES = ["facts", "direct", "chain", *BY_HAND]


@given(name=st.sampled_from(sorted(NAMES)), seed=st.integers(0, 10_000))
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
    letters = {name: TASKS[name].example(Random(0)).prompt[0] for name in NAMES}
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


def test_the_streams_are_what_stored_experiments_drew():
    drawn = [(e.prompt, e.response, e.answer) for name in NAMES for e in TASKS[name].examples(100, seed=7)]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == "3e260b8c7a6ab1da"


def test_options_and_labels():
    chain = make_task("chain", terms=[4, 5])
    assert {(e.category, e.difficulty) for e in chain.examples(40)} == {("4 terms", 4), ("5 terms", 5)}
    assert {len(e.answer) for e in make_task("copy", length=6).examples(20)} == {6}
    assert chain.options == {"terms": [4, 5]} and TASKS["chain"].options == {"terms": (3, 6)}
    with pytest.raises(SurgeryError, match="no option 'term'.\nDid you mean 'terms'"):
        make_task("chain", term=4)
    for wrong in (1, "4", [4], [5, 4], 4.0, True, [2, 3, 4], None):
        with pytest.raises(SurgeryError, match="Option 'terms' is .*expected a whole number from 2"):
            make_task("chain", terms=wrong)
