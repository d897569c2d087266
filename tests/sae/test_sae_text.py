"""Texts as sequences: which tokens count, what is held out, and that the order is that of the seed."""

from itertools import islice

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.models import Batch, load
from surgery.sae.text import Reading, Text, counted
from surgery.training.data import ListRows, rows_of


@pytest.fixture(scope="module")
def tokenizer():
    return load("tiny-base")[1]


ROWS = [{"prompt": f"m {i}+{i}=", "completion": f"#{2 * i}"} for i in range(5)] * 20


def texts(rows=ROWS, tokenizer=None, seed=0, **reading):
    return Text(ListRows(rows), tokenizer, Reading(**{"context": 16, "batch": 4} | reading), seed)


def kept(batch):
    """The tokens that count, row by row."""
    return [ids[which].tolist() for ids, which in zip(batch.ids, counted(batch), strict=True)]


def test_texts_are_laid_end_to_end_and_cut(tokenizer):
    text = texts(tokenizer=tokenizer, skip=0)
    sequences = [ids[m] for b in text.first(100) for ids, m in zip(b.ids, b.mask, strict=True)]
    whole = torch.cat(sequences).tolist()
    expected = []
    for row in ROWS:
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        expected += [*tokenizer(row["prompt"])["input_ids"], *answer, tokenizer.eos_token_id]
    assert whole == expected[: len(whole)] and len(expected) - len(whole) < 16
    assert all(len(ids) == 16 for ids in sequences[:-1])


def test_completions_alone_count_if_asked(tokenizer):
    text = texts(tokenizer=tokenizer, positions="completion", packing=False, skip=0)
    (batch, *_) = text.first(4)
    for row, tokens in zip(ROWS, kept(batch), strict=False):
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        assert tokens == [*answer, tokenizer.eos_token_id]


def test_the_last_token_alone_counts_if_asked(tokenizer):
    (batch, *_) = texts(tokenizer=tokenizer, positions="last", packing=False).first(4)
    assert kept(batch) == [[tokenizer.eos_token_id]] * 4


def test_first_tokens_and_padding_do_not_count(tokenizer):
    (batch, *_) = texts([{"text": "abc"}, {"text": "abcdefgh"}] * 20, tokenizer, packing=False, skip=2).first(2)
    assert not bool(counted(batch)[:, :2].any()) and not bool((counted(batch) & ~batch.mask).any())
    assert counted(batch).sum(1).tolist() == [int(n) - 2 for n in batch.lengths]


def test_what_is_held_out_is_never_read(tokenizer):
    rows = [{"text": "abcdefghij"[i % 7 :] + "klmnopqrst"[: i % 5] + str(i)} for i in range(60)]
    text = texts(rows, tokenizer, packing=False, held_out=5)
    out = {tuple(ids[m].tolist()) for b in text.held_out(100) for ids, m in zip(b.ids, b.mask, strict=True)}
    read = {tuple(ids[m].tolist()) for b in islice(text, 40) for ids, m in zip(b.ids, b.mask, strict=True)}
    assert len(out) == 12 and len(read) == 48 and not out & read


def test_the_order_is_of_the_seed_and_anew_in_each_round(tokenizer):
    def order(seed):
        return [b.ids[:, 1:4].tolist() for b in islice(texts(tokenizer=tokenizer, seed=seed), 40)]

    assert order(0) == order(0) and order(0) != order(1)
    one = texts([{"text": f"abc{i}"} for i in range(9)], tokenizer, packing=False, batch=1, held_out=99)
    found = [tuple(b.ids[0].tolist()) for b in islice(one, 18)]
    assert sorted(found[:9]) == sorted(found[9:]) and found[:9] != found[9:]


def test_tasks_have_no_end(tokenizer):
    text = Text(rows_of("chain", 3), tokenizer, Reading(context=16, batch=2), 0)
    again = Text(rows_of("chain", 3), tokenizer, Reading(context=16, batch=2), 0)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(islice(text, 30), again, strict=False))


def test_a_file_of_plain_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join("abc def" for _ in range(1500)))
    rows = rows_of({"file": str(tmp_path / "a.txt")})
    assert rows.size == 3 and rows.columns == {"text"}
    assert sum(len(rows.row(i)["text"]) for i in range(3)) == 1500 * 8 - 1


@pytest.mark.parametrize(
    ("rows", "reading", "told"),
    [
        ([{"question": "x"}], {}, "neither a column 'text' nor a column 'prompt'"),
        ([{"text": "x"}], {"positions": "completion"}, "needs data with prompts and completions"),
        ([{"text": "x"}], {"positions": "last"}, "read one by one"),
    ],
)
def test_data_that_do_not_fit_are_told(rows, reading, told, tokenizer):
    with pytest.raises(SurgeryError, match=told):
        texts(rows, tokenizer, **reading)


def test_too_little_text_is_told(tokenizer):
    with pytest.raises(SurgeryError, match="fewer than 20 sequences"):
        texts([{"text": "abc"}], tokenizer).held_out(4)
    with pytest.raises(SurgeryError, match="make no sequence"):
        next(iter(texts([{"text": "a"}], tokenizer, packing=False, held_out=2, context=2).first(0)))
    with pytest.raises(SurgeryError, match="do not say which tokens count"):
        counted(Batch.of([[1, 2]]))
