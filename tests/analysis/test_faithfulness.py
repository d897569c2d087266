"""Early answers and corrupted steps against plain forward passes; areas by hand; what can't be asked is told."""

from random import Random

import numpy as np
import pytest
import torch
from activations.families import build
from helpers import tiny_tokenizer, words
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from analysis.chains import ChainFormat, Corrupted, first_line, split_after, wrong_number
from analysis.evaluate import generate, load
from analysis.faithfulness import (
    area_over,
    area_under,
    corrupted_steps,
    curve,
    early_answering,
    per_row,
    written_chains,
)
from analysis.results import Result
from surgery.errors import SurgeryError
from surgery.tasks import make_task
from surgery.zoo import get

DIGITS = ChainFormat(split_after(";"), "#", tuple("0123456789"))
ROWS = [e.row("chain") for e in make_task("chain", terms=[3, 6]).examples(12, 7)]


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)
    return load(get("tiny-chain"))


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    """A tokenizer of words for the random models."""
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("words"), words(60)))


def next_digits(model, tokenizer, text):
    """Log-probabilities among the ten digits after a text, by one plain forward pass."""
    digits = tokenizer(list("0123456789"), add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
    return logits[[d for (d,) in digits]].log_softmax(-1)


def carried(steps, at, rng):
    """Another digit as the result of a step, and the rest worked out from it."""
    found, result = list(steps), str((int(steps[at][-2]) + rng.randint(1, 9)) % 10)
    found[at] = f"{steps[at][:-2]}{result};"
    for i in range(at + 1, len(steps)):
        value = eval(f"{result}{steps[i][1:3]}") % 10
        found[i], result = f"{result}{steps[i][1:3]}={value};", str(value)
    return Corrupted(found, result)


def test_early_answers_are_those_of_plain_forward_passes(tiny):
    model, tokenizer = tiny
    found = early_answering(model, ROWS, DIGITS, tokenizer=tokenizer, batch_size=5)
    columns = found.same.columns
    assert len(found.same) == sum(len(r["completion"].split(";")) for r in ROWS)
    for case, (row, step) in enumerate(zip(columns["row"], columns["step"], strict=True)):
        chain = ROWS[row]["completion"].partition("#")[0]
        cut = "".join(part + ";" for part in chain.split(";")[:step])
        p, q = (next_digits(model, tokenizer, ROWS[row]["prompt"] + text + "#") for text in (chain, cut))
        assert columns["chain"][case] == cut and columns["kept"][case] == step / chain.count(";")
        assert columns["said"][case] == str(q.argmax().item()) and columns["whole"][case] == str(p.argmax().item())
        assert found.same.values[case] == float(p.argmax() == q.argmax())
        assert found.divergence.values[case] == pytest.approx((p.exp() * (p - q)).sum().item(), abs=2e-4)
    assert columns["answer"] == [ROWS[row]["answer"] for row in columns["row"]]
    assert found.follows is None
    ends = found.same.where([kept == 1 for kept in columns["kept"]])
    assert ends.mean == 1 and found.divergence.where([k == 1 for k in columns["kept"]]).mean == 0
    assert found.same.mean < 0.9, "this model reads its chains"


def test_answers_follow_a_mistake_from_which_the_rest_is_worked_out(tiny):
    model, tokenizer = tiny
    found = corrupted_steps(model, ROWS, DIGITS, carried, tokenizer=tokenizer, rest="given", seed=3)
    assert found.follows.mean > 0.8 and found.same.mean < 0.2
    for case, (row, step, text) in enumerate(
        zip(*(found.same.columns[c] for c in ("row", "step", "chain")), strict=True)
    ):
        steps = DIGITS.steps_of(ROWS[row]["completion"].partition("#")[0], row)
        wrong = carried(steps, step, Random(f"3:{row}:{step}"))
        assert text == "".join(wrong.steps) and found.same.columns["implied"][case] == wrong.answer
        p, q = (next_digits(model, tokenizer, ROWS[row]["prompt"] + t + "#") for t in ("".join(steps), text))
        assert found.divergence.values[case] == pytest.approx((p.exp() * (p - q)).sum().item(), abs=2e-4)
        assert found.follows.values[case] == float(str(q.argmax().item()) == wrong.answer)


def test_a_mistake_depends_on_its_row_and_step_only(tiny):
    ours, more = ({"tokenizer": tiny[1], "rest": "given", "seed": s} for s in (1, 2))
    every = corrupted_steps(tiny[0], ROWS[:4], DIGITS, carried, **ours)
    first = corrupted_steps(tiny[0], ROWS[:2], DIGITS, carried, **ours)
    assert every.same.columns["chain"][: len(first.same)] == first.same.columns["chain"]
    assert (
        corrupted_steps(tiny[0], ROWS[:4], DIGITS, carried, **more).same.columns["chain"] != every.same.columns["chain"]
    )


def test_after_a_mistake_the_model_goes_on_by_itself(tiny):
    model, tokenizer = tiny
    found = corrupted_steps(model, ROWS[:5], DIGITS, tokenizer=tokenizer)
    assert found.follows is None, "a changed digit alone implies no answer"
    columns = found.same.columns
    wrong, prompts = [], []
    for row, step in zip(columns["row"], columns["step"], strict=True):
        steps = DIGITS.steps_of(ROWS[row]["completion"].partition("#")[0], row)
        wrong.append("".join(wrong_number(steps, step, Random(f"0:{row}:{step}")).steps[: step + 1]))
        prompts.append(ROWS[row]["prompt"] + wrong[-1])  # one character is one token: the same as prompt and rest apart
    rest = generate(model, tokenizer, prompts, max_new_tokens=40)
    assert columns["chain"] == [w + text.partition("#")[0] for w, text in zip(wrong, rest, strict=True)]


def test_what_a_model_writes_itself_begins_with_its_opening(tiny):
    model, tokenizer = tiny
    chains = written_chains(model, ROWS, DIGITS, tokenizer=tokenizer, opening=lambda row: row["completion"][:4])
    assert chains == [row["completion"].partition("#")[0] for row in ROWS], "it can do these sums"
    assert chains == written_chains(model, ROWS, DIGITS, tokenizer=tokenizer, batch_size=1)
    own = early_answering(model, ROWS, DIGITS, tokenizer=tokenizer, chains=chains)
    assert np.array_equal(own.same.values, early_answering(model, ROWS, DIGITS, tokenizer=tokenizer).same.values)


def test_greedy_text_and_choices_agree_where_answers_are_digits(tiny):
    model, tokenizer = tiny
    free = early_answering(model, ROWS, ChainFormat(split_after(";"), max_answer_tokens=3), tokenizer=tokenizer)
    chosen = early_answering(model, ROWS, DIGITS, tokenizer=tokenizer)
    assert free.same.columns["said"] == chosen.same.columns["said"]
    inside = np.abs(free.divergence.values - chosen.divergence.values)
    assert np.median(inside) < 0.05 < np.median(free.divergence.values), "nearly all of the probability is on digits"


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gpt_neox", "bloom"])
def test_padding_changes_nothing_in_any_family(family, worded):
    model, rng = build(family), Random(0)
    texts = [[f"w{rng.randint(4, 59)}" for _ in range(n)] for n in (9, 4, 12, 2, 7)]
    rows = [{"prompt": f"w{20 + i}", "completion": " ".join(text) + " w5 w6"} for i, text in enumerate(texts)]
    for choices in (None, ("w10", "w11", "w12")):
        form = ChainFormat(split_after(r" "), marker="w5", choices=choices, max_answer_tokens=3, max_chain_tokens=3)
        for measure in (early_answering, corrupted_steps):
            one, many = (measure(model, rows, form, tokenizer=worded, batch_size=size) for size in (1, 50))
            assert one.same.columns == many.same.columns
            assert one.divergence.values == pytest.approx(many.divergence.values, abs=1e-5)
            assert one.divergence.mean > 1e-3


def test_a_model_that_does_not_read_has_no_area_over_its_curve(worded):
    model = build("gpt2")
    for parameter in model.parameters():
        parameter.data.zero_()
    rows = [{"prompt": "w9", "completion": "w30 ; w31 ; w32 ; w5 w6"}]
    form = ChainFormat(split_after("; "), marker="w5", choices=("w10", "w11"), max_chain_tokens=8)
    found = early_answering(model, rows, form, tokenizer=worded)
    assert area_over(found.same).values.tolist() == [0.0] and found.divergence.values.tolist() == [0.0] * 4
    wrong = corrupted_steps(
        model, rows, form, lambda s, at, rng: Corrupted([*s[:at], "w40 ; "], "w11"), tokenizer=worded
    )
    assert wrong.same.mean == 1 and wrong.follows.mean == 0


def test_chats_are_put_into_the_template(worded):
    model = build("llama_gqa")
    form = ChainFormat(split_after("; "), marker="w5", choices=("w10", "w11"))
    row = {"prompt": "w7 w8", "completion": "w30 ; w31 ; w5 w10"}
    said = {**row, "prompt": [{"role": "user", "content": "w7 w8"}]}
    chat, plain = (early_answering(model, [row], form, tokenizer=worded, chat=c) for c in (True, False))
    assert np.array_equal(
        chat.divergence.values, early_answering(model, [said], form, tokenizer=worded).divergence.values
    )
    assert worded.apply_chat_template(said["prompt"], tokenize=False).split() == ["w7", "w8"]
    assert chat.divergence.values == pytest.approx(plain.divergence.values, abs=1e-6), "a template that adds nothing"


def cases(*rows):
    """A long result of several rows, each the values at 0/n, 1/n, ..."""
    places = [(i, k, k / (len(row) - 1)) for i, row in enumerate(rows) for k in range(len(row))]
    columns = {
        "row": [p[0] for p in places],
        "kept": [p[2] for p in places],
        "steps": [len(rows[p[0]]) - 1 for p in places],
    }
    return Result([v for row in rows for v in row], {"case": range(len(places))}, "same answer", columns)


def test_areas_by_hand():
    found = cases([0, 0, 1], [0, 1], [1, 1, 1, 1], [0, 1, 0, 1])
    assert area_over(found).values == pytest.approx([0.75, 0.5, 0, 0.5])
    assert area_under(found).values == pytest.approx([0.25, 0.5, 1, 0.5])
    line = curve(found)
    assert line.axes["kept"] == [0, 1 / 3, 0.5, 2 / 3, 1]
    assert line.values[0] == pytest.approx([0, 0, 0, 1 / 3, 1]) and line.values[1] == pytest.approx(line.axes["kept"])
    assert line.columns["steps"] == [2, 1, 3, 3]
    assert per_row(found).values == pytest.approx([1 / 3, 0.5, 1, 0.5])
    backwards = found.select("case", list(range(len(found)))[::-1])
    assert sorted(area_over(backwards).values) == pytest.approx([0, 0.5, 0.5, 0.75])


def test_a_curve_needs_both_ends(tiny):
    wrong = corrupted_steps(tiny[0], ROWS[:2], DIGITS, tokenizer=tiny[1])
    with pytest.raises(SurgeryError, match="Row 0 has no answer after nothing or after all of its chain"):
        area_over(wrong.same)


@given(st.text(alphabet="ab;.\n ", max_size=30), st.sampled_from([";", r"[;\n]\s*|[.!?]\s+", r"\s*", "a+"]))
def test_steps_together_are_the_chain(text, pattern):
    steps = split_after(pattern)(text)
    assert "".join(steps) == text and all(steps)


def test_sentences_and_marks():
    form = ChainFormat(marker="####")
    chain = form.chain_of("It costs 3.5 each. So 2 cost 7!\nThe answer is 7.\n#### 7")
    assert form.steps_of(chain, 0) == ["It costs 3.5 each. ", "So 2 cost 7!\n", "The answer is 7.\n"]
    assert form.chain_of("no mark") == "no mark" and first_line("\n 7 \nmore") == "7"


@given(st.integers(0, 10**6), st.integers(0, 999))
def test_a_wrong_number_is_another_one_of_the_same_length(number, seed):
    steps = ["1+1=2;", f"then 5 or {number} pieces;", "7;"]
    found = wrong_number(steps, 1, Random(seed))
    changed = found.steps[1].removeprefix("then 5 or ").removesuffix(" pieces;")
    assert sum(a != b for a, b in zip(changed, str(number), strict=True)) == 1
    assert str(int(changed)) == changed and found.answer is None
    assert [found.steps[0], found.steps[2]] == [steps[0], steps[2]]


def test_steps_without_a_number_are_left_out_and_counted(tiny):
    rows = [{"prompt": "m 1+2+3=", "completion": "a;1+2=3;b;#6"}]
    found = corrupted_steps(tiny[0], rows, DIGITS, tokenizer=tiny[1])
    assert found.same.columns["step"] == [1] and found.same.meta["uncorrupted"] == 2
    assert found.same.columns["kept"] == [1 / 3] and found.same.columns["steps"] == [3]


def test_a_model_is_as_it_was(tiny):
    model, tokenizer = tiny
    model.train()
    modes, wanted = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    corrupted_steps(model, ROWS[:2], DIGITS, tokenizer=tokenizer)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        early_answering(model, ROWS[:2], DIGITS, tokenizer=tokenizer, progress=stop)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()


def test_what_can_not_be_asked_is_told(tiny):
    model, asked = tiny[0], {"tokenizer": tiny[1]}

    def refuses(match, rows=ROWS[:2], form=DIGITS, call=early_answering, **more):
        with pytest.raises(SurgeryError, match=match):
            call(model, rows, form, **asked, **more)

    refuses("No rows", [])
    refuses("Row 1 has no chain of thought", [ROWS[0], {**ROWS[1], "completion": "#5"}])
    refuses("Row 1 needs a prompt, and a completion", [ROWS[0], {"prompt": "m 1+1="}])
    refuses("1 chains and 2 rows", chains=["1+1=2;"])
    refuses("together are not its chain", form=ChainFormat(lambda chain: chain.split(";")))
    refuses("Row 1 with its chain has 30. tokens, and the model's context 128", chains=["1;", "1+1=2;" * 48 + "1;"])
    refuses("2 tokens", form=ChainFormat(split_after(";"), choices=("1", "12")))
    refuses("expected 'own'", call=corrupted_steps, rest="mine")
    refuses("No step of any chain", call=corrupted_steps, corrupt=lambda *_: None)
    for wrong in (lambda s, at, rng: Corrupted(s), lambda s, at, rng: Corrupted(["x;", *s[1:]])):
        refuses("Row 0: the corruption of step", call=corrupted_steps, corrupt=wrong)
    for words_, match in ({"marker": ""}, "marker is empty"), ({"choices": ("1", " 1")}, "two or more different"):
        with pytest.raises(SurgeryError, match=match):
            ChainFormat(**words_)
