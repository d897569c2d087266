"""One call for models, folders and whatever generates: greedy and sampled, whatever the batching."""

import json

import numpy as np
import pytest
import torch

from analysis.evaluate import evaluate, evaluate_tasks, generate, labels_of, load, respond
from analysis.rows import file_rows, stated_answer, task_rows
from analysis.scores import plot, score
from surgery.decoding import CausalDecoder, Rollout, Sampling
from surgery.errors import SurgeryError
from surgery.tasks import TASKS
from surgery.zoo import get


@pytest.fixture(scope="module")
def tiny():
    return load(get("tiny-chain"))


@pytest.fixture(scope="module")
def sampled(tiny):
    """Scores of 8 samples a prompt, drawn so hot that some go wrong."""
    model, tokenizer = tiny
    return score(model, task_rows(["chain", "copy"], n=20), tokenizer=tokenizer, samples=8, temperature=1.6,
                 pass_at=[1, 4, 8], majority=True, likelihood=True)  # fmt: skip


class Parrot:
    """A generator that is no model: it says the same of every prompt."""

    def __init__(self, text):
        self.text, self.calls = text, []

    def __call__(self, prompts, group, seeds):
        self.calls.append((len(prompts), group, list(seeds)))
        return [Rollout(list(p), [5], [0.0], False, self.text) for p in prompts for _ in range(group)]


def test_greedy_decoding_is_that_of_transformers(tiny):
    model, tokenizer = tiny
    prompts = [e.prompt for name in ("chain", "sort", "shift") for e in TASKS[name].examples(6, seed=4)]
    for prompt, found in zip(prompts, generate(model, tokenizer, prompts, max_new_tokens=30), strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, do_sample=False, max_new_tokens=30, pad_token_id=tokenizer.pad_token_id)
        assert found == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_folder_a_model_a_decoder_and_a_generator_are_asked_alike(tiny):
    model, tokenizer = tiny
    rows = task_rows(["chain", "reverse"], n=12)
    found = evaluate(get("tiny-chain"), rows)
    again = evaluate(model, rows, tokenizer=tokenizer, batch_size=5)
    composed = evaluate(CausalDecoder(model), rows, tokenizer=tokenizer)
    assert found.columns == again.columns == composed.columns
    plain = evaluate_tasks(model, ["chain", "reverse"], 12, tokenizer=tokenizer)
    np.testing.assert_array_equal(found.values, plain.values)
    parrot = Parrot(rows[0]["completion"])
    said = evaluate(parrot, rows, tokenizer=tokenizer, samples=3, seed=2, batch_size=6)
    assert said.values.shape == (24, 3) and said.values[0].all() and said.mean.max() < 0.5
    assert all(size == 2 and group == 3 for size, group, _ in parrot.calls)
    assert sorted(s for *_, seeds in parrot.calls for s in seeds) == [(2 << 32) + i for i in range(24)]
    with pytest.raises(SurgeryError, match="tokenizer="):
        evaluate(model, rows)


def test_samples_depend_on_seed_and_row_only(tiny):
    model, tokenizer = tiny
    rows = task_rows(["chain"], n=9)
    settings = {"tokenizer": tokenizer, "samples": 3, "temperature": 1.5}
    found = evaluate(model, rows, seed=1, **settings)
    assert found.columns == evaluate(model, rows, seed=1, batch_size=4, **settings).columns
    assert found.columns["completion"] != evaluate(model, rows, seed=2, **settings).columns["completion"]
    assert found.columns["completion"][:4] == evaluate(model, rows[:4], seed=1, **settings).columns["completion"]
    assert len({text for texts in found.columns["completion"] for text in texts}) > 9
    assert found.meta["temperature"] == 1.5 and found.columns["difficulty"] == [row["difficulty"] for row in rows]


def test_rows_whose_answer_can_not_be_read_are_left_out(tiny):
    _, tokenizer = tiny
    rows = [{"prompt": "m 1+1=", "answer": answer, "task": "gsm8k"} for answer in ("2", "none", "3")]
    found = evaluate(Parrot("#### 2"), rows, tokenizer=tokenizer)
    assert found.values.tolist() == [1, 0] and found.columns["row"] == [0, 2] and found.meta["unread"] == 1
    with pytest.raises(SurgeryError, match="No row has an answer"):
        evaluate(Parrot(""), rows[1:2], tokenizer=tokenizer)
    with pytest.raises(SurgeryError, match="No rows"):
        evaluate(Parrot(""), [], tokenizer=tokenizer)


def test_truncated_completions_are_counted(tiny):
    model, tokenizer = tiny
    rows = task_rows(["chain"], n=4)
    assert evaluate(model, rows, tokenizer=tokenizer, max_new_tokens=2).columns["truncated"] == [1.0] * 4
    assert evaluate(model, rows, tokenizer=tokenizer).columns["truncated"] == [0.0] * 4


def test_scores_hold_together(sampled):
    results = sampled.results
    assert list(results) == ["accuracy", "pass@1", "pass@4", "pass@8", "maj@1", "maj@4", "maj@8", "log-likelihood"]
    np.testing.assert_allclose(results["pass@1"].values, results["accuracy"].values)
    assert 0.2 < results["accuracy"].mean < 0.9
    assert results["accuracy"].mean < results["maj@8"].mean <= results["pass@8"].mean
    groups = sampled.by("difficulty")
    assert list(groups) == sorted(groups) and sum(len(part.accuracy) for part in groups.values()) == 40
    told = json.loads(json.dumps(sampled.summary("task")))
    assert [group["task"] for group in told["by"]["groups"]] == ["chain", "copy"]
    assert 1 < told["perplexity"] < 1.1 and told["pass@4"]["low"] < told["pass@4"]["mean"]
    with pytest.raises(SurgeryError, match="no column 'colour'"):
        sampled.by("colour")


def test_scores_are_compared_in_pairs_saved_and_drawn(sampled, tmp_path):
    from analysis.results import Result

    same = sampled.against(sampled)
    assert set(same) == set(sampled.results) and all(c.p_value == 1 for c in same.values())
    assert [path.name for path in sampled.save(tmp_path)] == [
        "accuracy.json", "pass_at.json", "majority.json", "likelihood.json"]  # fmt: skip
    np.testing.assert_array_equal(Result.load(tmp_path / "pass_at").values, sampled.pass_at.values)
    axis = plot({"a": sampled, "b": sampled}).axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "4", "8"]
    assert axis.get_legend_handles_labels()[1] == ["a: pass@k", "a: maj@k", "b: pass@k", "b: maj@k"]


def test_what_can_not_be_scored_is_told_before_anything_is_generated(tiny):
    rows, refuse = task_rows(["copy"], n=2), Parrot("")
    for settings, told in (
        ({"majority": True}, "several samples"),
        ({"samples": 2, "pass_at": [4]}, "pass@4 can't be told from 2"),
        ({"pass_at": [0, 2]}, "pass@0"),
        ({"likelihood": True}, "Parrot has no likelihood"),
    ):
        with pytest.raises(SurgeryError, match=told):
            score(refuse, rows, tokenizer=tiny[1], **settings)
    with pytest.raises(SurgeryError, match="Row 0 has no completion"):
        score(refuse, [{**rows[0], "completion": ""}], tokenizer=tiny[1], likelihood=True)
    assert not refuse.calls


def test_rows_from_tasks_and_files(tmp_path):
    rows = task_rows(["copy", "sort"], n=3, seed=5)
    assert [row["task"] for row in rows] == ["copy"] * 3 + ["sort"] * 3
    assert rows == task_rows(["copy", "sort"], n=3, seed=5) != task_rows(["copy", "sort"], n=3, seed=6)
    assert labels_of([{"prompt": "p", "task": "copy", "carries": 1, "table": [1]}])[-1] == "carries"
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "m 1+1=", "a": 2}\n\n{"q": "m 1+2=", "a": 3}\n')
    found = file_rows(file, "facts", prompt="{q}", answer="{a}", n=1)
    assert [(row["prompt"], row["answer"], row["task"]) for row in found] == [("m 1+1=", "2", "facts")]
    with pytest.raises(SurgeryError, match="no column 'prompt'; it has q, a"):
        file_rows(file, "facts")
    with pytest.raises(SurgeryError, match="nothing says how its answer is checked"):
        file_rows(file, prompt="{q}", answer="{a}")
    with pytest.raises(SurgeryError, match="no task 'fact'"):
        file_rows(file, "fact", prompt="{q}", answer="{a}")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3+5=8;8-2=6;#6", "6"), ("so it is\n#### 1,200", "1200.0"), ("about 7 of 12", "12.0"), ("", None), ("#", None),
        (r"thus \boxed{x+1}. 3", "x+1"), ("<answer> 4 </answer> or 5", "4"), ("blue", "blue"),
    ],
)  # fmt: skip
def test_the_answer_that_a_completion_states(text, answer):
    assert stated_answer(text) == answer


def test_respond_keeps_the_order_of_prompts(tiny):
    model, tokenizer = tiny
    prompts = [tokenizer(e.prompt)["input_ids"] for e in TASKS["copy"].examples(7)]
    found = respond(model, prompts, tokenizer, Sampling(12, temperature=1.0, batch_size=4), group=2)
    assert [[one.prompt_ids for one in group] for group in found] == [[p, p] for p in prompts]
