"""The audit of rewards: what it counts, and what it shows."""

import json

import pytest

from surgery.errors import SurgeryError
from surgery.training.rewards import audit, audit_log

ROW = {"prompt": "3+4=", "answer": "7"}
REWARDS = {"accuracy": {"verifier": "exact"}, "soft_overlong": {"weight": 0.5, "max_len": 8, "cache": 4}}


def rollout(step, group, completion, a, b, **more):
    total = None if a is None else a + b
    return {
        "step": step, "group": group, "prompt": f"q{group}", "completion": completion,
        "completion_ids": [0] * len(completion), "reward": total, "rewards": {"a": a, "b": b},
        "advantage": 0.0, "truncated": False, **more,
    }  # fmt: skip


LOG = [
    rollout(0, 0, "x", 1.0, 1.0), rollout(0, 0, "xx", 0.0, 1.0),
    rollout(0, 1, "xxx", 1.0, 1.0), rollout(0, 1, "xxxx", 1.0, 1.0, truncated=True),
    rollout(1, 0, "x", None, 2.0), rollout(1, 0, "xxxxx", None, 0.0),
]  # fmt: skip


def test_hand_made_completions():
    found = audit(REWARDS, ["#7", "#8", "", "#7       "], ROW)
    assert [line.values for line in found.lines] == [
        {"accuracy": 1, "soft_overlong": 0, "total": 1},
        {"accuracy": 0, "soft_overlong": 0, "total": 0},
        {"accuracy": 0, "soft_overlong": 0, "total": 0},
        {"accuracy": 1, "soft_overlong": -1, "total": 0.5},
    ]
    assert [line.length for line in found.lines] == [2, 2, 0, 9]
    assert found.groups == 1
    text = found.render()
    assert "#8" in text and "0.5" in text and "4 completions in 1 groups" in text
    json.dumps(found.to_dict())


def test_a_row_each_and_a_tokenizer():
    def tokenizer(text, add_special_tokens):
        return {"input_ids": text.split()}

    rows = [ROW, {"prompt": "1+1=", "answer": "2"}]
    found = audit(REWARDS, ["so #7", "#7"], rows, tokenizer=tokenizer)
    assert [line.values["accuracy"] for line in found.lines] == [1, 0]
    assert [line.length for line in found.lines] == [2, 1]
    assert found.groups == 2
    assert found.components["accuracy"].constant_groups is None


def test_the_statistics_of_a_log():
    found = audit_log(LOG)
    a, b, total = (found.components[name] for name in ("a", "b", "total"))
    assert (a.scored, a.mean, a.least, a.most) == (4, 0.75, 0, 1)
    assert a.constant_groups == 0.5  # the group that it did not score is not counted
    assert b.constant_groups == pytest.approx(2 / 3)
    assert total.scored == 4
    assert a.std == pytest.approx(0.75**0.5 / 2)
    assert a.correlations["b"] is None  # b is constant where both are there
    assert a.correlations["total"] == pytest.approx(1)
    by_hand = -4 / (80 / 3) ** 0.5  # of (1, 2, 3, 4, 1, 5) with (1, 1, 1, 1, 2, 0)
    assert b.correlations["length"] == pytest.approx(by_hand)
    assert found.truncated == pytest.approx(1 / 6)
    assert found.groups == 3
    assert [line.completion for line in b.top][:1] == ["x"]
    assert b.top[0].values["b"] == 2
    assert b.bottom[0].completion == "xxxxx"
    assert a.bottom[0].completion == "xx"
    assert len(a.top) == 4


def test_a_long_log_is_shown_by_its_ends():
    long = [rollout(i, 0, f"[bold]text{i}" + "y" * 300, float(i), -float(i)) for i in range(30)]
    text = audit_log(long, examples=4).render(examples=2)
    assert "a: highest" in text and "b: lowest" in text
    assert "[bold]text29" in text and "[bold]text0" in text
    assert "[bold]text15" not in text
    assert "-1" in text  # a against b


def test_logs_on_disk(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in LOG) + '{"step": 3, "gro')
    assert len(audit_log(file).lines) == len(audit_log(tmp_path).lines) == 6
    (tmp_path / "broken.jsonl").write_text('{"step"\n{}\n')
    with pytest.raises(SurgeryError, match="broken.jsonl, line 1: no JSON"):
        audit_log(tmp_path / "broken.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SurgeryError, match="no rollouts in .*empty"):
        audit_log(tmp_path / "empty.jsonl")
    with pytest.raises(SurgeryError, match="no rollout log at"):
        audit_log(tmp_path / "missing.jsonl")
    with pytest.raises(SurgeryError, match="no rollouts in the log"):
        audit_log([])
    with pytest.raises(SurgeryError, match="Row 1 of the rollout log is no rollout: KeyError 'completion'"):
        audit_log([LOG[0], {"prompt": "q"}])


def test_chat_prompts_and_given_lengths():
    row = rollout(0, 0, "x", 1.0, 1.0, length=9) | {"prompt": [{"role": "user", "content": "hello"}]}
    row.pop("completion_ids")
    line = audit_log([row]).lines[0]
    assert (line.prompt, line.length) == ("hello", 9)
