"""Asking in other letters: what is encoded comes back, and the model is asked and answers in them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.conjugate import TRANSFORMS, Conjugated, Transform, conjugate
from analysis.evaluate import evaluate, generate, load
from surgery.decoding import LocalGenerator, Rollout, Sampling
from surgery.errors import SurgeryError
from surgery.tasks import TASKS

DOMAINS = {
    "rot13": st.text(),
    "reverse": st.text(),
    "leetspeak": st.text(st.characters(exclude_characters="431057")),
    "pig_latin": st.text(st.characters(exclude_characters="-")),
}


@pytest.fixture(scope="module")
def tiny():
    return load("tiny-base")


@pytest.mark.parametrize("name", TRANSFORMS)
def test_decoding_undoes_encoding_where_it_is_said_to(name):
    @settings(deadline=None, max_examples=150)
    @given(DOMAINS[name])
    def back(text):
        assert TRANSFORMS[name].exact(text)

    back()
    words = "The quick brown Fox; my hmm, yes: apple strings & crème brûlée 698!"
    assert TRANSFORMS[name].exact(words) and TRANSFORMS[name].encode(words) != words


def test_transforms_write_what_they_say():
    said = {name: one.encode("My stone axes, yes") for name, one in TRANSFORMS.items()}
    assert said == {
        "rot13": "Zl fgbar nkrf, lrf",
        "reverse": "sey ,sexa enots yM",
        "leetspeak": "My 570n3 4x35, y35",
        "pig_latin": "y-May one-stay axes-ay, es-yay",
    }
    assert not TRANSFORMS["leetspeak"].exact("room 101") and not TRANSFORMS["pig_latin"].exact("a one-way street")


class Parrot:
    """A generator that says what it was asked, from the first "=" on."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def __call__(self, prompts, group, seeds):
        self.asked += [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
        texts = [text for text in self.asked[-len(prompts) :] for _ in range(group)]
        return [Rollout([1], [2], [-1.0], False, text) for text in texts]


def test_prompts_are_encoded_and_answers_decoded(tiny):
    tokenizer = tiny[1]
    parrot = Parrot(tokenizer)
    asked = conjugate(parrot, "reverse", tokenizer=tokenizer)
    ids = tokenizer(["r abc=", "c de="])["input_ids"]
    drawn = asked(ids, 2, [0, 1])
    assert parrot.asked == ["=cba r", "=ed c"]
    assert [one.text for one in drawn] == ["r abc="] * 2 + ["c de="] * 2
    assert drawn[0].log_probs == [-1.0] and asked.asked("xyz") == "zyx"
    one_way = conjugate(Parrot(tokenizer), str.upper, tokenizer=tokenizer)
    assert one_way.asked(ids[0]) == "R ABC="


def test_without_a_change_it_is_the_model_itself(tiny):
    model, tokenizer = tiny
    prompts = [e.prompt for name in ("facts", "reverse") for e in TASKS[name].examples(6)]
    same = conjugate(model, lambda text: text, tokenizer=tokenizer, sampling=Sampling(12, temperature=0.0))
    assert generate(same, tokenizer, prompts) == generate(model, tokenizer, prompts, max_new_tokens=12)
    sampling = Sampling(12, temperature=1.0)
    rows = [e.row("copy") for e in TASKS["copy"].examples(4)]
    drawn = [
        evaluate(m, rows, tokenizer=tokenizer, samples=3, seed=5).columns["completion"]
        for m in (conjugate(model, Transform(str, str), tokenizer=tokenizer, sampling=sampling),
                  LocalGenerator(model, tokenizer, sampling))
    ]  # fmt: skip
    assert drawn[0] == drawn[1]


def test_a_task_that_knows_no_letters_is_as_easy_in_others(tiny):
    model, tokenizer = tiny
    other = str.maketrans("abcdefghij", "jihgfedcba")
    rows = [e.row("copy") for e in TASKS["copy"].examples(30)]
    asked = conjugate(
        model, lambda p: p[:2] + p[2:].translate(other), lambda a: a.translate(other), tokenizer=tokenizer
    )
    found = evaluate(asked, rows, tokenizer=tokenizer)
    assert found.mean >= 0.95 and asked.asked(rows[0]["prompt"])[2:] != rows[0]["prompt"][2:]
    blind = conjugate(model, lambda p: p[:2] + p[2:].translate(other), tokenizer=tokenizer)  # answers stay encoded
    assert evaluate(blind, rows, tokenizer=tokenizer).mean < 0.2


def test_chats_are_encoded_before_their_template():
    model, tokenizer = load("tiny-instruct")
    parrot = Parrot(tokenizer)
    asked = conjugate(parrot, "reverse", tokenizer=tokenizer, chat=True)
    asked(tokenizer(["c abc="])["input_ids"], 1, [0])
    wanted = tokenizer.apply_chat_template(
        [{"role": "user", "content": "=cba c"}], add_generation_prompt=True, tokenize=False
    )
    plain = tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert parrot.asked == [tokenizer.decode(plain, skip_special_tokens=True)]


def test_wrong_input_is_a_sentence(tiny):
    model, tokenizer = tiny
    with pytest.raises(SurgeryError, match="There is no transform 'rot12'") as error:
        conjugate(model, "rot12", tokenizer=tokenizer)
    assert "rot13" in str(error.value.hint)
    with pytest.raises(SurgeryError, match="leave decode out"):
        conjugate(model, "rot13", str, tokenizer=tokenizer)
    with pytest.raises(SurgeryError, match="leave sampling out"):
        conjugate(Parrot(tokenizer), "rot13", tokenizer=tokenizer, sampling=Sampling())
    asked = conjugate(model, lambda text: None, tokenizer=tokenizer)
    assert isinstance(asked, Conjugated)
    with pytest.raises(SurgeryError, match="encode gave NoneType for 'c ab='"):
        asked(tokenizer(["c ab="])["input_ids"], 1, [0])
