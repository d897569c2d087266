"""Rows as tensors: padding, first end marks, selection, and denominators of the whole update."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import tokenizer

from surgery.errors import SurgeryError
from surgery.models import pad_id
from surgery.training.batch import Batch
from surgery.training.data import completion_ids, demonstrations, pairs

ids = st.lists(st.integers(3, 40), max_size=6)


@st.composite
def batches(draw):
    """Groups of ragged rows, with a column a row and a column a token."""
    group, groups = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    prompts = [p for p in draw(st.lists(ids.filter(bool), min_size=groups, max_size=groups)) for _ in range(group)]
    n = group * groups
    completions = draw(st.lists(ids.map(lambda c: [*c, 2]), min_size=n, max_size=n))
    batch = Batch.of(prompts, completions, pad=2, group=group, rows=[{"i": i} for i in range(n)])
    batch["reward"] = torch.arange(float(n))
    batch["old_log_probs"] = torch.rand(batch.mask.shape) * batch.mask
    return batch, prompts, completions


@given(batches())
def test_tokens_come_back(made):
    """Also where the end mark is the padding: lengths say where a row ends, not ids."""
    batch, prompts, completions = made
    for i in range(len(batch)):
        assert batch.prompt_ids[i][batch.prompt_mask[i]].tolist() == prompts[i]
        assert batch.completion_ids[i, : batch.lengths[i]].tolist() == completions[i]
        assert batch.mask[i].sum() == batch.attended[i].sum() == len(completions[i])
    assert batch.total_tokens == sum(map(len, completions)) and batch.total_rows == len(batch)


@given(batches(), st.randoms())
def test_a_selection_holds_its_rows_and_no_more_padding_than_it_needs(made, random):
    batch, prompts, completions = made
    index = random.sample(range(len(batch)), random.randint(1, len(batch)))
    part = batch.select(index)
    assert [row["i"] for row in part.rows] == index == part["reward"].long().tolist()
    assert part.prompt_ids.shape[1] == max(len(prompts[i]) for i in index)
    assert part.completion_ids.shape[1] == part.mask.shape[1] == max(len(completions[i]) for i in index)
    for i, j in enumerate(index):
        assert part.completion_ids[i, : part.lengths[i]].tolist() == completions[j]
        width = part.mask.shape[1]
        assert torch.equal(part["old_log_probs"][i], batch["old_log_probs"][j, :width])
    assert (part.total_rows, part.total_tokens) == (batch.total_rows, batch.total_tokens)
    whole = all(
        index[k : k + batch.group] == list(range(index[k], index[k] + batch.group)) and index[k] % batch.group == 0
        for k in range(0, len(index), batch.group)
    )
    assert part.group == (batch.group if whole else 1)


@given(batches(), st.integers(1, 9))
def test_chunks_are_the_batch(made, rows):
    batch, _, _ = made
    chunks = batch.chunks(rows)
    assert [row["i"] for chunk in chunks for row in chunk.rows] == list(range(len(batch)))
    assert all(len(chunk) <= rows for chunk in chunks)
    assert rows < batch.group or all(chunk.group == batch.group for chunk in chunks)
    assert sum(float(chunk.mask.sum()) for chunk in chunks) == batch.total_tokens
    assert all(chunk.total_tokens == batch.total_tokens for chunk in chunks)


def test_an_empty_completion_is_its_end_mark():
    batch = demonstrations([{"prompt": "c a=", "completion": ""}], tokenizer())
    assert batch.completion_ids.tolist() == [[2]] and batch.mask.tolist() == [[1.0]]


def test_an_empty_prompt_is_the_beginning():
    batch = demonstrations([{"prompt": "", "completion": "ab"}], tokenizer())
    assert batch.prompt_ids.tolist() == [[tokenizer().bos_token_id]]


def test_the_end_mark_may_be_the_padding():
    import copy

    words = copy.deepcopy(tokenizer())
    words.pad_token = words.eos_token
    assert pad_id(words) == words.eos_token_id
    batch = demonstrations([{"prompt": "c", "completion": "abcd"}, {"prompt": "c", "completion": "a"}], words)
    assert batch.lengths.tolist() == [5, 2] and batch.mask.sum(1).tolist() == [5, 2]
    words.pad_token = None
    assert pad_id(words) == words.eos_token_id


def test_a_tokenizer_without_an_end_mark_is_told():
    import copy

    words = copy.deepcopy(tokenizer())
    words.eos_token = None
    with pytest.raises(SurgeryError, match="no end-of-sequence token"):
        completion_ids(words, "ab")


def test_pairs_are_neighbours_with_one_prompt():
    rows = [
        {"prompt": "c a=", "chosen": "#a", "rejected": "#bcd"},
        {"prompt": "c b=", "chosen": "", "rejected": "x"},
    ]
    batch = pairs(rows, tokenizer())
    assert (batch.kind, batch.group, len(batch)) == ("pairs", 2, 4)
    assert torch.equal(batch.prompt_ids[0], batch.prompt_ids[1])
    assert [row["completion"] for row in batch.rows] == ["#a", "#bcd", "", "x"]


def test_rows_are_cut_from_their_end():
    batch = demonstrations([{"prompt": "abcdef", "completion": "123456"}], tokenizer(), max_length=8)
    assert batch.prompt_ids.shape[1] == 6 and batch.mask.tolist() == [[1, 1]]
    batch = demonstrations([{"prompt": "abcdefgh", "completion": "123456"}], tokenizer(), max_length=4)
    assert batch.prompt_ids.shape[1] == 4 and batch.mask.tolist() == [[0]]  # all prompt: nothing to learn


def test_weights_become_a_column():
    rows = [{"prompt": "c", "completion": "a", "weight": 0.5}, {"prompt": "c", "completion": "b"}]
    assert demonstrations(rows, tokenizer())["weight"].tolist() == [0.5, 1.0]
