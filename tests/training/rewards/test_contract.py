"""How rewards are built, called, added up, and what is said when one misbehaves."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from surgery.errors import SurgeryError
from surgery.training.rewards import Rewards, build_rewards, make_reward


@dataclass
class Said:
    text: str
    completion_ids: list[int] = field(default_factory=list)
    truncated: bool = False

    def __post_init__(self):
        self.completion_ids = self.completion_ids or [ord(c) for c in self.text]


ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
SAID = [Said("#2"), Said("#3"), Said("#4"), Said("#4")]
EXACT = {"accuracy": {"verifier": "exact"}}


def score(function, rows=ROWS, said=SAID, group=2, **more):
    return Rewards({"mine": (function, 1.0)}).score(rows, said, group=group, **more)


# ---- scoring ------------------------------------------------------------------------------------------------------


def test_rows_are_one_a_group_or_one_a_rollout():
    rewards = build_rewards(EXACT)
    repeated = [ROWS[0], ROWS[0], ROWS[1], ROWS[1]]
    assert rewards.score(ROWS, SAID, group=2).total == [1, 0, 1, 1]
    assert rewards.score(repeated, SAID, group=2).total == [1, 0, 1, 1]
    with pytest.raises(SurgeryError, match="4 rollouts in groups of 2 don't fit 3 rows"):
        rewards.score(repeated[:3], SAID, group=2)
    with pytest.raises(SurgeryError, match="groups of 3"):
        rewards.score(ROWS, SAID, group=3)


def test_weighted_sum_and_unweighted_components():
    rewards = Rewards({"a": (lambda completions: [1, 2, 3, 4], 2.0), "b": (lambda completions: [1, 1, 0, 0], -0.5)})
    scored = rewards.score(ROWS, SAID, group=2)
    assert scored.total == [1.5, 3.5, 6, 8]
    assert scored.components == {"a": [1, 2, 3, 4], "b": [1, 1, 0, 0]}


def test_none_is_left_out_of_the_sum_and_all_none_is_none():
    rewards = Rewards(
        {
            "a": (lambda completions: [None, None, 1, 1], 1.0),
            "b": (lambda completions: [None, 5, None, 5], 2.0),
        }
    )
    assert rewards.score(ROWS, SAID, group=2).total == [None, 10, 1, 11]


def test_no_rollouts_no_rewards():
    assert build_rewards(EXACT).score([], [], group=2).total == []


def test_a_trl_function_runs_unchanged_and_sees_what_trl_gives():
    seen = {}

    def reward_func(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
        seen.update(kwargs, prompts=prompts, ids=completion_ids, at=trainer_state.global_step)
        right = [float(a in c) for c, a in zip(completions, answer, strict=True)]
        log_extra("extracted", [c[1:] for c in completions])
        log_metric("share", sum(right) / len(right))
        return right

    scored = score(reward_func, step=7)
    assert scored.total == [1, 0, 1, 1]
    assert scored.extra == {"extracted": ["2", "3", "4", "4"]}
    assert scored.metrics == {"share": 0.75}
    assert seen["prompts"] == ["1+1=", "1+1=", "2+2=", "2+2="]
    assert seen["ids"][1] == [ord("#"), ord("3")]
    assert seen["at"] == seen["step"] == 7
    assert "prompt" not in seen and "completion" not in seen


def test_chat_rows_get_chat_completions():
    rows = [{"prompt": [{"role": "user", "content": "1+1="}], "answer": "2"}]
    seen = []

    def reward(completions):
        seen.extend(completions)
        return [0.0] * len(completions)

    score(reward, rows, SAID[:2])
    assert seen == [[{"role": "assistant", "content": "#2"}], [{"role": "assistant", "content": "#3"}]]
    assert build_rewards(EXACT).score(rows, SAID[:2], group=2).total == [1, 0]


def test_only_the_named_arguments_are_passed_and_a_missing_column_is_named():
    assert score(lambda completions, answer, step: [step] * len(answer), step=3).total == [3] * 4
    assert score(lambda completions, missing=None: [float(missing is None)] * len(completions)).total == [1] * 4

    def reward(completions, solution):
        return [0.0] * len(completions)

    with pytest.raises(SurgeryError, match="'mine' needs the column 'solution'; the rows have answer, prompt"):
        score(reward)
    with pytest.raises(SurgeryError, match="needs the column 'solution'"):
        Rewards({"mine": (reward, 1.0)}).check_columns(["answer"])
    with pytest.raises(SurgeryError, match="'accuracy' needs the column 'task'"):
        build_rewards("accuracy").check_columns(["prompt", "answer"])
    build_rewards("accuracy").check_columns(["task"])


def test_columns_that_only_some_rows_have_are_none_elsewhere():
    rows = [{"prompt": "a"}, {"prompt": "b", "hint": "x"}]
    seen = {}
    score(lambda completions, hint: seen.update(hint=hint) or [0.0] * 4, rows)
    assert seen["hint"] == [None, None, "x", "x"]


def test_group_rewards_see_one_group_at_a_time():
    def longest(completions, **_):
        top = max(map(len, completions))
        return [float(len(c) == top) for c in completions]

    said = [Said("a"), Said("bb"), Said("c" * 9), Said("d" * 8)]
    assert score(longest, said=said).total == [0, 0, 1, 0]
    longest.group = True
    assert score(longest, said=said).total == [0, 1, 1, 0]


def test_state_is_saved_by_name():
    class Counting:
        def __init__(self):
            self.calls = 0

        def __call__(self, completions):
            self.calls += 1
            return [float(self.calls)] * len(completions)

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    first, second = Rewards({"n": (Counting(), 1.0)}), Rewards({"n": (Counting(), 1.0)})
    first.score(ROWS, SAID, group=2)
    second.load_state_dict(first.state_dict())
    assert second.score(ROWS, SAID, group=2).total == [2] * 4
    with pytest.raises(SurgeryError, match=r"\['n'\], the recipe's are \[\]"):
        build_rewards(EXACT).load_state_dict(first.state_dict())


# ---- bad answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([0, 0, float("nan"), 0], r"'mine' returned nan for row 2 .*'2\+2=', completion '#4'.*finite number or None"),
        ([0, float("inf"), 0, 0], r"returned inf for row 1 .*'1\+1=', completion '#3'"),
        ([0, 0, 0], "returned 3 values for 4 completions .row 3: prompt '2.2=', completion '#4'"),
        ([0] * 5, "returned 5 values for 4"),
        ([0, "good", 0, 0], "returned str 'good' for row 1"),
        ([[0], 0, 0, 0], "returned list .* for row 0"),
        ("good", "returned str .'good'. for 4 completions, the first with prompt '1.1='.*expected a list"),
        (None, "returned NoneType"),
        (1.0, "returned float"),
        ({"a": 1}, "returned dict"),
        (np.array(1.0), "returned float"),
        (np.array([0, np.nan, 0, 0]), "returned nan for row 1"),
    ],
)
def test_bad_answers_name_the_function_and_the_row(returned, message):
    with pytest.raises(SurgeryError, match=message):
        score(lambda completions: returned)


def test_numbers_of_any_make_are_taken():
    mixed = [True, 1, np.float32(0.5), np.bool_(False)]
    assert score(lambda completions: mixed).total == [1, 1, 0.5, 0]
    assert score(lambda completions: np.arange(4.0)).total == [0, 1, 2, 3]
    assert score(lambda completions: (0, 1, None, 2)).total == [0, 1, None, 2]


def test_a_reward_that_raises_names_the_row_that_it_fails_on():
    def reward(completions):
        return [1 / (c != "#4") for c in completions]

    with pytest.raises(SurgeryError, match=r"'mine' failed on row 2 \(prompt '2\+2=', completion '#4'\): ZeroDiv"):
        score(reward)

    def whole(completions):
        if len(completions) > 1:
            raise ValueError("too many")
        return [0.0]

    with pytest.raises(SurgeryError, match="batch of 4, whose first row is .*'#2'.*ValueError: too many") as caught:
        score(whole)
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_asynchronous_reward_is_refused():
    async def reward(completions):
        return [0.0] * len(completions)

    with pytest.raises(SurgeryError, match="asynchronous"):
        score(reward)


# ---- building -----------------------------------------------------------------------------------------------------


def test_every_form_of_a_spec():
    assert build_rewards("format").weights == {"format": 1}
    assert build_rewards(["format", {"tag_count": 0.5}]).weights == {"format": 1, "tag_count": 0.5}
    rewards = build_rewards({"format": {"weight": 2, "pattern": "#."}, "tag_count": None})
    assert rewards.weights == {"format": 2, "tag_count": 1}
    assert rewards.score(ROWS, SAID, group=2).components["format"] == [1] * 4
    both = build_rewards({"a": {"reward": "format", "pattern": "#2"}, "b": {"reward": "format", "pattern": "#4"}})
    assert both.score(ROWS, SAID, group=2).components == {"a": [1, 0, 0, 0], "b": [0, 0, 1, 1]}
    mine = lambda completions: [1.0] * len(completions)  # noqa: E731
    assert build_rewards({"mine": (mine, 0.25)}).score(ROWS, SAID, group=2).total == [0.25] * 4
    assert build_rewards({"mine": mine}).weights == {"mine": 1}
    assert build_rewards(rewards) is rewards


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("acuracy", "no reward 'acuracy'"),
        ({"accuracy": {"golds": "x"}}, "no parameter 'golds'"),
        ({"accuracy": {"verifier": "tusk"}}, "no verifier 'tusk'"),
        ({"accuracy": {"gold": 3}}, "gold must be a text"),
        ({"accuracy": {"weight": "much"}}, "weight of reward 'accuracy' must be a finite number"),
        ({"accuracy": float("nan")}, "weight of reward 'accuracy'"),
        ({"accuracy": True}, "weight of reward 'accuracy'"),
        ({"accuracy": "yes"}, "takes a weight or a table"),
        ({"format": {"pattern": "("}}, "no regular expression"),
        ({"tag_count": {"tags": []}}, "at least one tag"),
        ({"tag_count": {"tags": "<think>"}}, "tags must be a list"),
        (["format", "format"], "given twice"),
        ({}, "No reward"),
        ([], "No reward"),
        (3, "given by name"),
        (None, "given by name"),
        ("no_such_module:f", "could not be imported: ModuleNotFoundError"),
        ("missing.py:f", "there is no file"),
    ],
)
def test_a_wrong_spec_is_a_sentence(spec, message):
    with pytest.raises(SurgeryError, match=message):
        build_rewards(spec)


def test_rewards_from_the_users_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def polite(completions, threshold=1, **kwargs):\n"
        "    return [float(len(c) > threshold) for c in completions]\n"
        "class Bonus:\n"
        "    group = True\n"
        "    def __init__(self, size=1.0):\n"
        "        self.size = size\n"
        "    def __call__(self, completions, **kwargs):\n"
        "        return [self.size / len(completions)] * len(completions)\n"
    )
    rewards = build_rewards({"mine.py:polite": {"weight": 2.0, "threshold": 2}}, folder=tmp_path)
    assert rewards.score(ROWS, SAID, group=2).total == [0] * 4
    assert build_rewards("mine.py:polite", folder=tmp_path).score(ROWS, SAID, group=2).total == [1] * 4
    bonus = build_rewards({"mine.py:Bonus": {"size": 3.0}}, folder=tmp_path)
    assert bonus.score(ROWS, SAID, group=2).total == [1.5] * 4
    with pytest.raises(SurgeryError, match="no function 'polight'.*\n.*'polite'"):
        build_rewards("mine.py:polight", folder=tmp_path)
    with pytest.raises(SurgeryError, match="no parameter 'treshold'"):  # though the function takes **kwargs
        build_rewards({"mine.py:polite": {"treshold": 2}}, folder=tmp_path)
    with pytest.raises(SurgeryError, match="no parameter 'sise'"):
        build_rewards({"mine.py:Bonus": {"sise": 3.0}}, folder=tmp_path)
    (tmp_path / "record.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Record:\n    size: float\n"
        "    def __call__(self, completions, **kwargs):\n        return [self.size] * len(completions)\n"
    )
    record = build_rewards({"record.py:Record": {"size": 2.0}}, folder=tmp_path)
    assert record.score(ROWS, SAID, group=2).total == [2] * 4
    with pytest.raises(SurgeryError, match="could not be made: TypeError: .*'size'"):
        build_rewards("record.py:Record", folder=tmp_path)
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(SurgeryError, match="SyntaxError"):
        build_rewards("broken.py:f", folder=tmp_path)


def test_a_function_of_a_module_keeps_its_declarations():
    assert make_reward("math:sqrt")(4) == 2

    def reward(completions, scale=1.0):
        return [scale] * len(completions)

    reward.group = True
    bound = make_reward(reward, {"scale": 2.0})
    assert bound.group is True
    assert score(bound).total == [2.0] * 4
    with_column = [{**row, "scale": 9.0} for row in ROWS]
    assert score(bound, with_column).total == [2.0] * 4


def test_only_annotated_parameters_have_a_type():
    def reward(completions, loose=1, firm: int = 1, maybe: int | None = 1):
        return [loose] * len(completions)

    assert score(make_reward(reward, {"loose": 0.5, "maybe": None})).total == [0.5] * 4
    with pytest.raises(SurgeryError, match="firm must be a whole number, not 0.5"):
        make_reward(reward, {"firm": 0.5})


def test_a_callable_without_a_signature_is_refused():
    with pytest.raises(SurgeryError, match="doesn't tell its parameters"):
        build_rewards("builtins:max")


def test_rewards_that_look_beyond_a_group_say_so():
    assert not build_rewards(["accuracy", {"kimi_length": 1}]).whole_batch
    assert build_rewards(["accuracy", {"residual": 1}]).whole_batch
    assert build_rewards("quantile_rescale").whole_batch


def test_positional_only_rewards_are_refused():
    def reward(completions, /):
        return []

    with pytest.raises(SurgeryError, match="by position only"):
        Rewards({"mine": (reward, 1.0)})


# ---- accuracy and form --------------------------------------------------------------------------------------------


def one(spec, text, **row):
    return build_rewards(spec).score([{"prompt": "q", **row}], [Said(text)], group=1).total[0]


@pytest.mark.parametrize(
    ("verifier", "text", "answer", "value"),
    [
        ("exact", "so #ab", "ab", 1), ("exact", " ab ", "ab", 1), ("exact", "#", "ab", 0), ("exact", "", "ab", 0),
        ("exact", "#ab", None, None), ("exact", "7", 7, 1),
        ("numeric", "it is 1,000.", "1000", 1), ("numeric", "none", "3", 0), ("numeric", "3", "three", None),
        ("numeric", "2 and 3", 3, 1), ("numeric", "", 3, 0),
    ],
)  # fmt: skip
def test_accuracy(verifier, text, answer, value):
    assert one({"accuracy": {"verifier": verifier}}, text, answer=answer) == value


def test_accuracy_reads_the_gold_column_it_is_told():
    assert one({"accuracy": {"verifier": "exact", "gold": "solution"}}, "#2", solution="2", answer="3") == 1


def test_accuracy_by_the_rows_task():
    assert one("accuracy", "#bad", task="copy", answer="bad") == 1
    assert one("accuracy", "#dab", task="copy", answer="bad") == 0


def test_accuracy_by_math_verify():
    pytest.importorskip("math_verify")
    spec = {"accuracy": {"verifier": "math"}}
    assert one(spec, r"The answer is $\frac{1}{2}$", answer="0.5") == 1
    assert one(spec, "it is 2", answer="3") == 0
    assert one(spec, "", answer="3") == 0
    assert one(spec, "3", answer="") is None
    assert one(spec, "3", answer=None) is None
    assert one(spec, "it is 2", answer=r"2\pi") == 0  # the gold answer is read as a whole
    assert one(spec, r"$2\pi$", answer=r"2\pi") == 1
    assert one({"partial": {"verifier": "math"}}, "it is 2", answer=3) == 0.1
    assert one({"partial": {"verifier": "math"}}, "", answer=3) == 0


@pytest.mark.parametrize(
    ("text", "verifier", "value"),
    [("#2", "exact", 1), ("#3", "exact", 0.1), ("#", "exact", 0), ("", "exact", 0), ("2", "numeric", 1),
     ("3", "numeric", 0.1), ("what", "numeric", 0)],
)  # fmt: skip
def test_partial_credit(text, verifier, value):
    assert one({"partial": {"verifier": verifier}}, text, answer="2") == value
    assert one({"partial": {"verifier": verifier}}, text, answer=None) is None


@pytest.mark.parametrize(
    ("text", "full", "tags"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1),
        (" <think>\na\n</think>\n<answer>\nb\n</answer>\n", 1, 1),
        ("<think>a</think><answer>b</answer> and more", 0, 1),
        ("<think>a<think>a</think><answer>b</answer>", 0, 0.75),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0, 0.5),
        ("<think>a", 0, 0.25),
        ("", 0, 0),
    ],
)
def test_format_and_tag_count(text, full, tags):
    assert one("format", text) == full
    assert one("tag_count", text) == tags


# ---- beside TRL ---------------------------------------------------------------------------------------------------


@pytest.mark.peers
def test_trls_own_rewards_run_unchanged_and_agree():
    trl = pytest.importorskip("trl.rewards")
    chat = [{"role": "user", "content": "1+1="}]
    think = "<think>one and one</think> so "
    pairs = {
        "overlong": trl.get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4),
        "soft_overlong": {"max_len": 8, "cache": 4},
        "repeated": trl.get_repetition_penalty_reward(ngram_size=2, max_penalty=-0.5),
        "repetition": {"n": 2, "max_penalty": -0.5, "unit": "tokens"},
    }
    for prompt in ("1+1=", chat):
        rows = [{"prompt": prompt, "solution": "$2$", "answer": "2"}]
        said = [Said("xxyxxyzxxyz"[:n]) for n in range(1, 12)]
        found = build_rewards(pairs).score(rows, said, group=len(said)).components
        assert found["overlong"] == pytest.approx(found["soft_overlong"])
        assert found["repeated"] == pytest.approx(found["repetition"])
    cosine = {"cosine_length": {"verifier": "math", "max_len": 100}, "theirs": trl.get_cosine_scaled_reward(100)}
    said = [Said(text, [0] * n) for text in (r"\boxed{2}", r"\boxed{3}") for n in (1, 30, 100, 200)]
    found = build_rewards(cosine).score(rows, said, group=8).components
    assert found["theirs"] == pytest.approx(found["cosine_length"])
    said = [Said(think + r"$\boxed{2}$"), Said(think + r"$\boxed{3}$"), Said("two")]
    spec = {"accuracy": {"verifier": "math"}, "theirs": trl.accuracy_reward, "format": trl.think_format_reward}
    found = build_rewards(spec).score(rows, said, group=3).components
    assert found["theirs"] == found["accuracy"] == [1, 0, 0]
    assert found["format"] == [1, 1, 0]
