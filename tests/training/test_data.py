"""Rows to tokens: boundaries, masks and lengths; packing; transforms; what is refused."""

import json

import pytest
import torch
from tiny_runs import llama, tokenizer

from surgery.errors import SurgeryError
from surgery.models import prompt_ids
from surgery.tasks import TASKS, verify
from surgery.training.batch import Batch
from surgery.training.data import (
    ListRows,
    MixedRows,
    completion_ids,
    demonstrations,
    kept_out,
    pairs,
    rows_of,
    trained_on,
    transformed,
)
from surgery.training.objectives import SFT
from surgery.training.plan import plan
from surgery.training.policy import Policy
from surgery.training.recipe import make
from surgery.training.transforms import TRANSFORMS

ROWS = [{"prompt": "c ab=", "completion": "#ab"}, {"prompt": "q", "completion": "#abcabcabc"}]


def loss_and_gradients(model, batch, **settings):
    """SFT's, in float64."""
    model = model.double()
    model.zero_grad()
    loss = SFT().loss(Policy(model, **settings), batch).value
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- demonstrations


def test_only_the_completion_and_its_end_count():
    batch = demonstrations(ROWS, tokenizer())
    ids = tokenizer()("#ab", add_special_tokens=False)["input_ids"]
    assert batch.completion_ids[0, :4].tolist() == [*ids, tokenizer().eos_token_id]
    assert batch.mask.sum(1).tolist() == [4, 11] == batch.lengths.tolist()
    assert batch.prompt_ids[0][batch.prompt_mask[0]].tolist() == prompt_ids(tokenizer(), "c ab=")


def test_the_loss_is_the_cross_entropy_of_the_completion_alone():
    model = llama().double()
    found, _ = loss_and_gradients(model, demonstrations(ROWS, tokenizer()))
    total = count = 0
    for row in ROWS:
        prompt, completion = prompt_ids(tokenizer(), row["prompt"]), completion_ids(tokenizer(), row["completion"])
        labels = torch.tensor([-100] * len(prompt) + completion)
        logits = model(torch.tensor([prompt + completion])).logits[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += len(completion)
    assert found == pytest.approx(float(total.detach()) / count, rel=1e-12)


def test_of_a_mixture_rows_of_files_can_be_kept_out():
    lists = [ListRows([{"text": f"{name}{i}"} for i in range(n)]) for name, n in (("a", 10), ("b", 7), ("c", 2))]
    lists.append(ListRows([{"text": "d0", "prompt": "x"}]))
    mixed, other = MixedRows(lists, [1.0, 1.0, 0.3, 0.3], 0), MixedRows(lists, [1.0, 1.0, 0.3, 0.3], 1)
    rest, taken = trained_on(mixed, 3), kept_out(mixed, other, 3)
    for part, numbers in ((0, [2, 5, 8]), (1, [2, 5]), (2, [1])):
        assert [row["text"][1:] for row in map(taken.parts[part].row, range(len(numbers)))] == list(map(str, numbers))
        assert taken.parts[part].size == len(numbers)
        others = [int(rest.parts[part].row(i)["text"][1:]) for i in range(int(rest.parts[part].size))]
        assert sorted(others + numbers) == list(range(len(lists[part].rows)))
    assert len(taken.parts) == 3 and taken.shares == [1.0, 1.0, 0.3] and taken.seed == 1, "of one row none is taken"
    assert taken.columns == rest.columns == {"text"}
    drawn = [{part.row(i)["text"] for i in range(500)} for part in (rest, taken)]
    assert len(drawn[0]) == 14 and len(drawn[1]) == 6 and not drawn[0] & drawn[1]
    assert trained_on(lists[0], 3) is lists[0] and kept_out(lists[0], lists[1], 3) is lists[1]
    with pytest.raises(SurgeryError, match="single row: none is left"):
        kept_out(*[MixedRows(lists[3:], [1.0], 0)] * 2, 20)


def test_what_has_no_end_is_of_another_seed_where_it_is_kept_out():
    words = [{"task": "chain"}, {"task": "copy"}]
    mine, others = rows_of(words, 0), rows_of(words, 1)
    found = kept_out(mine, others, 3)
    assert [found.row(i) for i in range(9)] == [others.row(i) for i in range(9)]
    assert [trained_on(mine, 3).row(i) for i in range(9)] == [mine.row(i) for i in range(9)]


def test_prompt_and_completion_are_tokenised_apart():
    """A tokenizer that merges `a` and `b`: the merge must not reach over the boundary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "a": 1, "b": 2, "ab": 3, "c": 4}
    merging = Tokenizer(models.BPE(vocab=words, merges=[("a", "b")]))
    merging.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    merging = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<eos>")
    assert merging("cab")["input_ids"] == [4, 3]
    batch = demonstrations([{"prompt": "ca", "completion": "b"}], merging)
    assert batch.prompt_ids.tolist() == [[4, 1]] and batch.completion_ids.tolist() == [[2, 0]]


def test_max_length_keeps_the_start():
    whole, cut = demonstrations(ROWS, tokenizer()), demonstrations(ROWS, tokenizer(), max_length=9)
    lengths = whole.prompt_mask.sum(1)
    assert (cut.prompt_mask.sum(1) + cut.lengths).tolist() == [min(9, int(n)) for n in lengths + whole.lengths]
    assert torch.equal(cut.completion_ids[1, : cut.lengths[1]], whole.completion_ids[1, : cut.lengths[1]])
    assert cut.mask.sum(1).tolist() == cut.lengths.tolist()


@pytest.mark.parametrize("packing", [0, 64])
def test_a_row_whose_prompt_is_too_long_is_harmless(packing):
    long = {"prompt": "c " + "ab" * 20 + "=", "completion": "#b"}
    one = demonstrations(ROWS, tokenizer(), max_length=16)
    two = demonstrations([*ROWS, long], tokenizer(), max_length=16)
    assert two.mask[2].sum() == 0 and two.total_tokens == one.total_tokens
    loss, gradients = loss_and_gradients(llama(), one, packing=packing)
    same, others = loss_and_gradients(llama(), two, packing=packing)
    assert same == pytest.approx(loss, rel=1e-12)
    assert all(torch.allclose(gradients[k], others[k], atol=1e-12) for k in gradients)
    alone, nothing = loss_and_gradients(llama(), demonstrations([long], tokenizer(), max_length=16), packing=packing)
    assert alone == 0.0 and not any(g.any() for g in nothing.values())


def test_pairs_stand_next_to_each_other():
    batch = pairs([{"prompt": "c a=", "chosen": "#a", "rejected": "#bb"}] * 2, tokenizer())
    assert (batch.kind, batch.group, batch.lengths.tolist()) == ("pairs", 2, [3, 4, 3, 4])


def test_an_empty_prompt_begins_with_the_first_token():
    batch = demonstrations([{"prompt": "", "completion": "a"}], tokenizer())
    assert int(batch.prompt_mask.sum()) >= 1


# ---- packing


def gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=45,
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            initializer_range=0.2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )  # fmt: skip
    )


def qwen2(seed=0):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=45,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
        )  # fmt: skip
    )


@pytest.mark.parametrize("family", [llama, gpt2, qwen2])
@pytest.mark.parametrize("size", [24, 40, 1])
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(family, size):
    batch = Batch.of(
        [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16], [17]],
        [[20, 21, 2], [22, 23, 24, 25, 2], [26], [27, 28, 29, 2], [2]],
        kind="demonstrations",
    )
    model = family().double().eval()
    apart, together = (Policy(model, packing=packing)(batch).log_probs.detach() for packing in (0, size))
    assert torch.allclose(apart, together, atol=1e-12)
    loss, gradients = loss_and_gradients(model, batch)
    same, others = loss_and_gradients(model, batch, packing=size)
    assert same == pytest.approx(loss, rel=1e-12)
    assert gradients.keys() == others.keys()
    assert all(torch.allclose(gradients[k], others[k], atol=1e-12) for k in gradients)


def test_rows_in_one_pack_do_not_see_each_other():
    model = llama().eval()
    one = Batch.of([[5, 6], [7]], [[8, 9], [10, 2]])
    other = Batch.of([[30, 31], [7]], [[32, 33], [10, 2]])
    first, second = (Policy(model, packing=32)(batch).log_probs for batch in (one, other))
    assert torch.equal(first[1], second[1]) and not torch.allclose(first[0], second[0])


# ---- data sets and transforms


def test_corrupt_makes_pairs_whose_rejected_side_is_wrong():
    rows = rows_of({"task": "chain", "transform": "corrupt"}, seed=3)
    for i in range(50):
        row = rows.row(i)
        assert row["chosen"] == row["completion"] != row["rejected"]
        assert verify(row["chosen"], row) is True and verify(row["rejected"], row) is False
        assert len(row["chosen"]) == len(row["rejected"])
        assert sum(a != b for a, b in zip(row["chosen"], row["rejected"], strict=True)) == 1
    assert rows.row(7) == rows_of({"task": "chain", "transform": "corrupt"}, seed=3).row(7) != rows.row(8)
    assert {"chosen", "rejected"} <= rows.columns


def test_corrupt_without_a_task_changes_letters_and_keeps_case():
    rows = transformed(ListRows([{"prompt": "p", "completion": "Ab-1"}]), {"corrupt": {"changes": 3}})
    wrong = rows.row(0)["rejected"]
    assert wrong[0].isupper() and wrong[1].islower() and wrong[2] == "-" and wrong[3].isdigit() and wrong != "Ab-1"
    assert not any(a == b for a, b in zip(wrong, "Ab1", strict=False) if a != "-")


def test_transforms_in_a_row():
    words = [{"template": {"rationale": "{completion}", "completion": "#{answer}"}}, "corrupt"]
    row = rows_of({"task": "chain", "transform": words}).row(0)
    assert row["chosen"] == f"#{row['answer']}" and row["rationale"].endswith(row["chosen"])


def test_a_band_filters_a_file_and_not_a_stream(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": str(i), "pass_rate": i / 4} for i in range(5)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    band = {"band": {"column": "pass_rate", "low": 0.2, "high": 0.8}}
    assert [row["prompt"] for row in rows_of({"file": str(file), "transform": band}).rows] == ["1", "2", "3"]
    with pytest.raises(SurgeryError, match="exactly one"):
        rows_of({"task": "chain", "transform": {"band": {"column": "difficulty", "low": 99}}})
    with pytest.raises(SurgeryError, match="has no rows"):
        rows_of({"file": str(file), "transform": {"band": {"column": "pass_rate", "low": 99}}})


def test_a_transform_of_ones_own():
    TRANSFORMS.register("twice")(lambda: lambda row, rng: [row, {**row, "prompt": row["prompt"] + "!"}])
    try:
        rows = transformed(ListRows([{"prompt": "a"}, {"prompt": "b"}]), "twice")
    finally:
        del TRANSFORMS["twice"]
    assert [row["prompt"] for row in rows.rows] == ["a", "a!", "b", "b!"]
    plain = transformed(ListRows([{"prompt": "a"}]), lambda row, rng: {**row, "n": rng.random()})
    assert plain.row(0)["n"] == plain.row(0)["n"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"task": "chain", "transform": "corupt"}, "no transform 'corupt'"),
        ({"task": "chain", "transform": {"corrupt": {"change": 2}}}, "no parameter 'change'"),
        ({"task": "chain", "transform": {"corrupt": {"changes": 0}}}, "changes is 0"),
        ({"task": "chain", "transform": {"band": {}}}, "needs the parameter 'column'"),
        ({"task": "chain", "transform": {"template": {"prompt": "{question}"}}}, "needs column 'question'"),
        ({"task": "chian"}, "chian"),
        ({"task": "chain", "term": 3}, "no option 'term'"),
        ({"tsk": "chain"}, "expected one"),
        ({"file": "nowhere.jsonl"}, "no data file"),
        ([], "empty"),
        ([{"prompt": "a", "completion": "b"}], "1 rows, and one batch takes 8"),
        ([{"prompt": "a"}] * 8, "no column 'completion', which the source 'dataset' reads"),
    ],
)
def test_refused_before_a_model_is_loaded(data, message):
    with pytest.raises(SurgeryError) as error:
        plan(make({"model": "/nowhere", "data": data, "objective": "sft"}))
    assert message in str(error.value)


def test_dpo_needs_pairs():
    with pytest.raises(SurgeryError, match="no column 'chosen'"):
        plan(make({"model": "/nowhere", "data": "chain", "objective": "dpo"}))


def test_rows_of_a_task_in_a_list_are_rows_and_names_of_tasks_are_tasks():
    listed = [TASKS.lookup("chain").row(0, i) for i in range(3)]
    assert "task" in listed[0]
    assert rows_of(listed).rows == listed
    drawn = {rows_of(["chain", "copy"]).row(i)["task"] for i in range(20)}
    assert drawn == {"chain", "copy"}
