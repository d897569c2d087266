"""Every reward against values worked out by hand, and at its edges."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.tasks import TASKS
from surgery.training.rewards import REWARDS, build_rewards, self_certainty
from surgery.training.rewards.execution import Results, agreement, evaluate
from surgery.training.rewards.lengths import ramp
from surgery.training.rewards.matching import box, matched, overlap, triples
from surgery.training.rewards.similarity import common, rouge_l
from surgery.training.rewards.tools import jaccard, parse_calls, section, tool_call_score
from surgery.training.rewards.wrapped import fixed_effects, ridge


class Said:
    truncated = False

    def __init__(self, text, length=None, **columns):
        self.text, self.columns = text, columns
        self.completion_ids = list(range(len(text) if length is None else length))


def scores(spec, said, row=None, *, group=None, step=0):
    said = [one if isinstance(one, Said) else Said(one) for one in said]
    rows = [{"prompt": "q", **(row or {})}] * len(said) if not isinstance(row, list) else row
    return build_rewards(spec).score(rows, said, step=step, group=group or len(said)).total


def one(spec, text, row=None, **more):
    return scores(spec, [text], row, **more)[0]


EXACT = {"verifier": "exact"}
ANSWER = {"answer": "7"}


def test_the_docstring_lists_every_reward():
    from surgery.training import rewards

    listed = [line.split("|")[1].strip() for line in rewards.__doc__.splitlines() if line.startswith("| ")]
    assert sorted(listed[1:]) == sorted(REWARDS)


def test_every_reward_has_defaults_and_lives_through_an_empty_completion():
    row = {"prompt": "q", "answer": "7", "task": "copy", "database": "", "self_certainty": 0.5}
    for name in REWARDS:
        scored = build_rewards(name).score([row], [Said(""), Said("")], group=2)
        assert len(scored.total) == 2, name


# ---- length -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "length", "value"),
    [("#7", 0, 1.0), ("#7", 50, 0.75), ("#7", 100, 0.5), ("#7", 400, 0.5),
     ("#8", 0, -1.0), ("#8", 50, -0.75), ("#8", 100, -0.5), ("#8", 400, -0.5),
     ("#7", 25, 0.75 + 0.25 * math.cos(math.pi / 4)), ("", 1, -0.75 - 0.25 * math.cos(math.pi / 100))],
)  # fmt: skip
def test_cosine_length(text, length, value):
    got = one({"cosine_length": {**EXACT, "max_len": 100}}, Said(text, length), ANSWER)
    assert got == pytest.approx(value, abs=1e-12)


def test_cosine_length_counts_what_it_is_told_and_skips_unreadable_gold():
    assert one({"cosine_length": {**EXACT, "max_len": 4, "unit": "characters"}}, Said("#7", 99), ANSWER) == 0.75
    assert one({"cosine_length": {**EXACT, "max_len": 4, "unit": "words"}}, "a b #7 c", {"answer": "7 c"}) == 0.5
    assert one({"cosine_length": EXACT}, "#7", {"answer": None}) is None
    with pytest.raises(SurgeryError, match="need completion_ids"):
        build_rewards({"soft_overlong": {}}).functions["soft_overlong"](completions=["a"])


def test_kimi_length_per_group():
    spec = {"kimi_length": EXACT}
    group = [Said("#7", 10), Said("#7", 20), Said("#8", 10), Said("#8", 30), Said("#7", 30)]
    assert scores(spec, group, ANSWER) == [0.5, 0, 0, -0.5, -0.5]
    assert scores(spec, [Said("#7", 5), Said("#8", 5)], ANSWER) == [0, 0]  # max = min
    assert scores(spec, group, {"answer": None}) == [None] * 5
    two = [Said("#7", 1), Said("#7", 2), Said("#7", 100), Said("#7", 200)]
    assert scores(spec, two, ANSWER, group=2) == [0.5, -0.5, 0.5, -0.5]  # another prompt's lengths don't matter


@pytest.mark.parametrize(("length", "value"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (999, -1)])
def test_soft_overlong(length, value):
    assert one({"soft_overlong": {"max_len": 100, "cache": 20}}, Said("", length)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("", 0), ("a b", 0), ("a a a a", -0.5), ("A a a a", -0.5), ("a b c a b c", -0.25), ("a " * 12, -0.9)],
)
def test_repetition(text, value):
    assert one("repetition", text) == pytest.approx(value)
    assert one({"repetition": {"max_penalty": -2.0}}, text) == pytest.approx(2 * value)


def test_repetition_by_character_and_bad_parameters():
    assert one({"repetition": {"n": 1, "unit": "characters"}}, "aabb") == -0.5
    for spec, message in [
        ({"repetition": {"max_penalty": 1.0}}, "0 or negative"),
        ({"repetition": {"n": 0}}, "n must be at least 1"),
        ({"cosine_length": {"max_len": 0}}, "max_len must be at least 1"),
        ({"cosine_length": {"unit": "token"}}, "no unit of length 'token'"),
        ({"soft_overlong": {"cache": 0}}, "cache must be"),
        ({"soft_overlong": {"max_len": 10, "cache": 20}}, "max_len must be at least 20"),
    ]:
        with pytest.raises(SurgeryError, match=message):
            build_rewards(spec)


def test_think_length():
    assert one({"think_length": {"max_len": 4}}, "<think>a b c</think> d e f") == 0.75
    assert one({"think_length": {"max_len": 2}}, "<think>a b c</think>") == 1
    assert one("think_length", "a b c</think>") == one("think_length", "<think>a") == one("think_length", "") == 0
    ramped = {"think_length": {"start_len": 2, "max_len": 4, "steps": 10}}
    assert [one(ramped, "<think>a</think>", step=s) for s in (0, 5, 10, 99)] == pytest.approx([0.5, 1 / 3, 0.25, 0.25])


def test_ramp():
    assert [ramp(s, 2, 3, 150) for s in (0, 75, 150, 900)] == [2, 2.5, 3, 3]
    assert ramp(0, 2, 3, 0) == 3


# ---- tools --------------------------------------------------------------------------------------------------------

GOLD = [{"name": "add", "parameters": {"a": 1, "b": 2}}, {"name": "say", "parameters": {}}]


def call(name, **parameters):
    return {"name": name, "parameters": parameters}


@pytest.mark.parametrize(
    ("said", "fine", "strict", "intermediate"),
    [
        (GOLD, 1, 1, 1),
        (GOLD[::-1], 1, 4 / 5, 1),  # names as multisets agree, as lists they don't
        ([], 0, 0, 0),
        ([call("add", a=1, b=2)], (1 / 2 + 1 + 2) / 5, 3 / 5, (1 / 2 + 1) / 3),
        ([call("add", a=1, c=2)], (1 / 2 + 1 / 3 + 1) / 5, 1 / 5, (1 / 2) / 3),
        ([call("add", a=1, b=3), call("say")], (1 + 1 + 1 + 1) / 5, 4 / 5, (1 + 1) / 3),
        ([call("add"), call("add", a=1, b=2)], (1 / 3 + 3) / 5, 3 / 5, (1 / 3 + 1) / 3),  # the better one is taken
        ([call("other", a=1, b=2)], 0, 0, 0),
        ([*GOLD, call("say")], (2 / 3 + 3 + 1) / 5, 4 / 5, (2 / 3 + 2) / 3),
    ],
)
def test_tool_call_score(said, fine, strict, intermediate):
    assert tool_call_score(GOLD, said) == pytest.approx(fine)
    assert tool_call_score(GOLD, said, "strict") == pytest.approx(strict)
    assert tool_call_score(GOLD, said, "intermediate") == pytest.approx(intermediate)
    assert tool_call_score(GOLD, said, "coarse") == (said == GOLD)


def test_a_predicted_call_is_used_once():
    twice = [call("f", x=1), call("f", x=1)]
    assert tool_call_score(twice, [call("f", x=1)]) == pytest.approx((1 / 2 + 2) / 5)


def block(calls):
    return "<tool_call>\n" + "\n".join(json.dumps(c) for c in calls) + "\n</tool_call>"


def test_tool_call_reward():
    row = {"answer": json.dumps(GOLD)}
    assert one("tool_call", f"<think>so</think>\n{block(GOLD)}", row) == 3
    assert one("tool_call", block(GOLD[:1]), row) == pytest.approx(6 * 0.7 - 3)
    for bad in ("", "no call", "<tool_call>", "<tool_call>{</tool_call>", "<tool_call>[1]</tool_call>", block([])):
        assert one("tool_call", bad, row) == -3
    assert one({"tool_call": {"scale": 1.0}}, "", row) == -1
    assert one({"tool_call": {"granularity": "coarse"}}, block(GOLD[:1]), row) == -3
    assert [one({"tool_call": {"steps": 150}}, "", row, step=s) for s in (0, 75, 300)] == [-2, -2.5, -3]
    assert one("tool_call", block(GOLD), {"answer": []}) == 0
    assert one("tool_call", block(GOLD), {"answer": "just talk"}) == 0
    assert one("tool_call", block(GOLD), {"answer": None}) is None
    assert one("tool_call", block(GOLD), {"answer": "[1, 2"}) is None
    assert one("tool_call", block(GOLD), {"answer": block(GOLD)}) == 3
    with pytest.raises(SurgeryError, match="no granularity 'finer'.*\n.*'fine'"):
        build_rewards({"tool_call": {"granularity": "finer"}})


def test_tool_format():
    row = {"answer": GOLD}
    good = f"<think>so</think>\n{block(GOLD)}"
    assert one("tool_format", good, row) == 1
    assert one("tool_format", block(GOLD), row) == 0
    assert one({"tool_format": {"think": False}}, block(GOLD), row) == 1
    assert one("tool_format", good + block(GOLD), row) == 0
    assert one("tool_format", "<think>so</think><response>hi</response>", {"answer": []}) == 1
    assert one("tool_format", good, {"answer": []}) == 0
    assert one("tool_format", good, {"answer": None}) is None
    assert [one({"tool_format": {"start_scale": 2.0, "steps": 150}}, good, row, step=s) for s in (0, 150)] == [2, 1]


def test_parse_calls():
    assert parse_calls('{"name": "f", "arguments": {"x": 1}}') == [call("f", x=1)]
    assert parse_calls('{"name": "f"}\n{"name": "g"}') == [call("f"), call("g")]
    assert parse_calls('[{"name": "f", "parameters": {}}]') == [call("f")]
    for bad in ("{", "3", '{"name": 3}', '{"name": "f", "parameters": [1]}', [None], "[" * 100_000):
        assert parse_calls(bad) is None
    assert section("a<b>c</b>d", "<b>", "</b>") == "c"
    assert section("a#c", "#", "") == "c"
    assert section("abc", "", "") == "abc"
    assert section("a<b>c", "<b>", "</b>") is None


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")))
def test_jaccard(a, b):
    assert 0 <= jaccard(a, b) == jaccard(b, a) <= 1
    assert (jaccard(a, b) == 1) == (sorted(a) == sorted(b))


# ---- triples, boxes, numbers --------------------------------------------------------------------------------------

TRIPLES = [["3", "color", "red"], ["1", "size", "small"]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(3, color, red), (1, size, small)", 10),
        ("(1, size, small) (3, Color, 'RED')", 10),
        ("(3, color, red)", 5 - 1),  # one too few
        ("(3, color, blue), (1, size, small)", 6.5),
        ("(3, shape, red), (1, size, small)", 5.5),
        ("(3, color, red), (1, size, small), (7, a, b)", 9),
        ("(3, color, red), (3, color, red)", 4),  # the second one matches nothing that is left
        ("(3, color, blue), (3, color, red)", 4),  # the better match wins whatever the order
        ("", -2),
        ("<think>(9, a, b)</think><answer>(3, color, red), (1, size, small)</answer>", 10),
    ],
)
def test_triples(text, value):
    assert one("triples", text, {"answer": TRIPLES}) == value
    assert one("triples", text, {"answer": "(3, color, red), (1, size, small)"}) == value


def test_triples_without_gold():
    assert one("triples", "(1, a, b)", {"answer": ""}) is None
    assert one("triples", "(1, a, b)", {"answer": [["1", "a"]]}) is None
    assert matched(triples(TRIPLES), []) == ([0, 0, 0], 0)
    assert one({"triples": {"penalty": 2.0}}, "", {"answer": TRIPLES}) == -4


@pytest.mark.parametrize(
    ("text", "gold", "value"),
    [
        ("[2, 6]", [4, 8], 2 / 6), ("4-8", "[4, 8]", 1), ("[0, 1]", [4, 8], 0), ("", [4, 8], 0), ("[8, 4]", [4, 8], 0),
        ("[0,0,2,2]", [1, 1, 3, 3], 1 / 7), ("so 9: [0,0,2,2]", [0, 0, 2, 2], 1), ("[3, 3]", [3, 3], 1),
        ("[1, 2]", None, None), ("[1, 2]", "what", None), ("[1, 2]", [2, 1], None), ("1", [1, 2], 0),
    ],
)  # fmt: skip
def test_iou(text, gold, value):
    assert one("iou", text, {"answer": gold}) == (value if value is None else pytest.approx(value))


def test_iou_times_confidence():
    spec = {"iou": {"confidence": True}}
    assert one(spec, "[2, 6] confidence: 0.5", {"answer": [2, 6]}) == 0.5
    assert one(spec, "confidence 0.5 [-2, 6]", {"answer": [-2, 6]}) == 0.5
    assert one(spec, "[2, 6]", {"answer": [2, 6]}) == 0
    assert one(spec, "[2, 6] confidence 80", {"answer": [2, 6]}) == 0


@given(*[st.tuples(st.integers(-5, 5), st.integers(0, 5), st.integers(-5, 5), st.integers(1, 5))] * 2)
def test_overlap_is_symmetric_and_bounded(a, b):
    a, b = ([x, y, x + w, y + h] for x, w, y, h in (a, b))
    assert box(a) == a
    assert 0 <= overlap(a, b) == overlap(b, a) <= 1
    assert overlap(a, a) == 1


@pytest.mark.parametrize(
    ("text", "gold", "parameters", "value"),
    [
        ("7", 7, {}, 1), ("7.1", 7, {}, 0), ("7.1", "7", {"tolerance": 0.2}, 1), ("9", 7, {"scale": 4.0}, 0.5),
        ("99", 7, {"scale": 4.0}, 0), ("none", 7, {"scale": 4.0}, 0), ("7", "none", {}, None), ("", 7, {}, 0),
    ],
)  # fmt: skip
def test_numeric(text, gold, parameters, value):
    got = one({"numeric": parameters}, text, {"answer": gold})
    assert got == (value if value is None else pytest.approx(value))


# ---- likeness -----------------------------------------------------------------------------------------------------


def slow_common(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_the_bit_parallel_subsequence_is_the_longest(a, b):
    assert common(a, b) == slow_common(a, b)


def test_similarity():
    assert rouge_l("", "") == 1
    assert one("similarity", "the cat sat", {"answer": "The cat ran"}) == pytest.approx(2 / 3)
    assert one({"similarity": {"unit": "characters"}}, "ab", {"answer": "abcd"}) == pytest.approx(4 / 6)
    assert one("similarity", "", {"answer": "a"}) == 0
    assert one("similarity", "a", {"answer": None}) is None
    with pytest.raises(SurgeryError, match="words or characters"):
        build_rewards({"similarity": {"unit": "tokens"}})


ACTION = {"type": "type_and_submit", "name": "search", "text": "red shoes"}


@pytest.mark.parametrize(
    ("action", "value"),
    [
        (ACTION, 0.3 + (0.1 + 0.1) + (0.1 + 0.1 * 10)),
        ({**ACTION, "text": "red hat"}, 0.3 + 0.2 + 0.1 + 0.5),
        ({**ACTION, "text": ""}, 0.3 + 0.2),
        ({"type": "type_and_submit"}, 0.3),
        ({"type": "click", "name": "search"}, 0),
    ],
)
def test_hierarchical_action(action, value):
    row = {"answer": ACTION}
    for text in (json.dumps(action), "I think " + json.dumps({"rationale": "r", "action": action}) + " ok"):
        assert one("hierarchical_action", text, row) == pytest.approx(value)


def test_hierarchical_action_edges():
    row = {"answer": json.dumps(ACTION)}
    for bad in ("", "{", "[1]", '{"type": 3}', '{"action": 1}'):
        assert one("hierarchical_action", bad, row) == 0
    assert one("hierarchical_action", "{}", {"answer": "none"}) is None
    strict = {"hierarchical_action": {"threshold": 0.75}}
    assert one(strict, json.dumps({**ACTION, "text": "red hat"}), row) == pytest.approx(0.3 + 0.2 + 0.1)


# ---- comparisons and wrappers -------------------------------------------------------------------------------------


def test_win_rate():
    assert scores({"win_rate": {"judge": "shorter"}}, ["a", "bbb", "cc", "dd"]) == pytest.approx([1, 0, 1 / 3, 1 / 3])
    assert scores({"win_rate": {"judge": "shorter"}}, ["a", "bb", "ccc", "dddd"], group=2) == [1, 0, 1, 0]
    assert scores("win_rate", ["a b", "c", "a"], {"answer": "a b"}) == [1, 0, 0.5]
    assert one({"win_rate": {"judge": "shorter"}}, "a") is None
    unsure = {"win_rate": {"judge": lambda one, other, row: None if "x" in one + other else 0.5}}
    assert scores(unsure, ["a", "b", "x"]) == [0.5, 0.5, None]
    with pytest.raises(SurgeryError, match="judge answered 3"):
        scores({"win_rate": {"judge": lambda *_: 3}}, ["a", "b"])
    with pytest.raises(SurgeryError, match="no judge 'short'"):
        build_rewards({"win_rate": {"judge": "short"}})


def test_a_judge_from_the_recipes_folder(tmp_path):
    (tmp_path / "judges.py").write_text("def later(one, other, row):\n    return one > other\n")
    rewards = build_rewards({"win_rate": {"judge": "judges.py:later"}}, folder=tmp_path)
    assert rewards.score([{"prompt": "q"}], [Said("a"), Said("b")], group=2).total == [0, 1]


def test_measured_reads_what_a_rollout_brings():
    said = [Said("a", self_certainty=0.5), Said("b", self_certainty=None)]
    assert scores("measured", said) == [0.5, None]
    with pytest.raises(SurgeryError, match="column 'self_certainty'"):
        scores("measured", ["a"])


def test_self_certainty():
    assert self_certainty(np.log(np.full((3, 4), 0.25))) == pytest.approx(0)
    p = np.array([[0.5, 0.5], [0.9, 0.1]])
    by_hand = np.mean([(0.5 * np.log(0.5 / row)).sum() for row in p])
    assert self_certainty(np.log(p)) == pytest.approx(by_hand)
    assert self_certainty(np.zeros((0, 4))) == 0


def given_rewards(values):
    return lambda completions, **_: list(values)


def test_ridge_and_fixed_effects_by_hand():
    train, held = [[0], [1], [2], [3]], [[4]]
    rewards = np.array([1.0, 3.0, 5.0, 7.0])
    assert ridge(train, rewards, held, 0.0) == pytest.approx([9])
    scale = np.std([0, 1, 2, 3])
    shrunk = 4 + (4 - 1.5) / scale * (2 * scale * 4 / (4 + 1))  # x'x = 4 for a standardised column
    assert ridge(train, rewards, held, 1.0) == pytest.approx([shrunk])
    letters = [["a"], ["a"], ["b"]]
    assert fixed_effects(letters, np.array([1.0, 3.0, 7.0]), [["a"], ["b"], ["z"]], 0) == pytest.approx([2, 7, 11 / 3])
    assert ridge(letters, np.array([1.0, 3.0, 7.0]), [["a"], ["b"]], 0.0) == pytest.approx([2, 7])
    assert ridge([[1], [1]], np.array([2.0, 4.0]), [[5]], 1.0) == pytest.approx([3])  # a constant column


def test_residual_takes_out_what_length_explains():
    lengths = [10, 20, 30, 40, 50, 60]
    said = [Said("x", n) for n in lengths]
    rows = [{"prompt": str(i % 2)} for i in range(6)]
    linear = {"residual": {"of": given_rewards([n / 10 for n in lengths]), "strength": 0.0}}
    assert scores(linear, said, rows, group=1) == pytest.approx([0] * 6, abs=1e-9)
    some = {"residual": {"of": given_rewards([1, None, 3, 4, 5, 6]), "strength": 0.0}}
    assert scores(some, said, rows, group=1)[1] is None
    assert one({"residual": {"of": given_rewards([5.0])}}, "x") == 5  # nothing to fit on
    by_column = {"residual": {"of": given_rewards([1, 2, 9, 10]), "on": ["kind"], "fit": "fixed_effects"}}
    rows = [{"prompt": str(i), "kind": "ab"[i // 2]} for i in range(4)]
    assert scores(by_column, ["x"] * 4, rows, group=1) == [-1, 1, -1, 1]


def test_residual_is_cross_fitted():
    base = [1.0, 2.0, 3.0, 4.0]
    rows = [{"prompt": p} for p in "aabb"]
    said = [Said("x", n) for n in (1, 2, 3, 5)]

    def residuals(values):
        return scores({"residual": {"of": given_rewards(values)}}, said, rows, group=2)

    moved = residuals([1.0, 2.0, 3.0, 104.0])
    assert moved[3] - residuals(base)[3] == pytest.approx(100)  # its own reward is not in its own fit
    assert moved[2] == pytest.approx(residuals(base)[2])  # nor is one of the same prompt


def test_residual_of_a_group_reward_and_its_columns():
    spec = {"residual": {"of": {"kimi_length": EXACT}, "on": ["length", "kind"]}}
    assert build_rewards(spec).needs == {"residual": ("answer", "kind")}
    alone = {"residual": {"of": {"kimi_length": EXACT}, "fit": "fixed_effects"}}
    said = [Said("#7", n) for n in (1, 2, 100, 200)]
    rows = [{"prompt": p, "answer": "7"} for p in "ab"]
    assert scores(alone, said, rows, group=2) == [0.5, -0.5, 0.5, -0.5]  # the groups of 2 reached the inner reward
    for bad in ({"on": []}, {"folds": 1}, {"fit": "magic"}, {"of": "magic"}):
        with pytest.raises(SurgeryError):
            build_rewards({"residual": bad})


def test_quantile_rescale():
    values = [0.0, 0.25, 0.5, 0.75, 1.0]
    spec = {"quantile_rescale": {"of": given_rewards(values), "low": 0.25, "high": 0.75, "eps": 0.0}}
    assert scores(spec, list("abcde")) == pytest.approx([0, 0, 0.5, 1, 1])
    constant = {"quantile_rescale": {"of": given_rewards([0.3, 0.3])}}
    assert scores(constant, ["a", "b"]) == pytest.approx([0, 0])
    nothing = {"quantile_rescale": {"of": given_rewards([None, None])}}
    assert scores(nothing, ["a", "b"]) == [None, None]
    mixed = {"quantile_rescale": {"of": given_rewards([0.0, 1.0]), "low": 0.0, "high": 1.0, "eps": 0.0, "exact": 0.5}}
    assert scores(mixed, ["7", "8"], ANSWER) == [0.5, 0.5]


def test_quantile_rescale_runs_and_resumes():
    def rewards():
        inner = {"of": lambda completions, **_: [float(c) for c in completions], "momentum": 0.5}
        return build_rewards({"quantile_rescale": {**inner, "low": 0.0, "high": 1.0, "eps": 0.0}})

    def batch(rewards, *texts):
        return rewards.score([{"prompt": "q"}], [Said(t) for t in texts], group=len(texts)).total

    first = rewards()
    assert batch(first, "0", "1") == [0, 1]
    state = json.loads(json.dumps(first.state_dict()))
    later = batch(first, "1", "3")  # bounds (0 + 1) / 2 and (1 + 3) / 2
    assert later == pytest.approx([1 / 3, 1])
    second = rewards()
    second.load_state_dict(state)
    assert batch(second, "1", "3") == later
    for bad in ({"momentum": 2.0}, {"low": 0.9, "high": 0.1}, {"exact": -1.0}):
        with pytest.raises(SurgeryError):
            build_rewards({"quantile_rescale": bad})


# ---- execution ----------------------------------------------------------------------------------------------------

DATABASE = "CREATE TABLE t (a INT, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'z');"


@pytest.mark.parametrize(
    ("query", "gold", "value"),
    [
        ("SELECT a FROM t;", "SELECT a FROM t", 1),
        ("```sql\nSELECT a FROM t\n```", "SELECT a FROM t", 1),
        ("SELECT a FROM t ORDER BY a DESC", "SELECT a FROM t", 1),
        ("SELECT a FROM t ORDER BY a DESC", "SELECT a FROM t ORDER BY a", 1 / 5),
        ("SELECT a FROM t ORDER BY a DESC", "SELECT a FROM (SELECT a FROM t ORDER BY a)", 1),
        ("SELECT a FROM t WHERE a < 3", "SELECT a FROM t", 2 / 3),
        ("SELECT b FROM t", "SELECT a FROM t", 0),
        ("SELECT a FROM t WHERE a > 9", "SELECT a FROM t WHERE a > 8", 1),
        ("SELECT nothing FROM t", "SELECT a FROM t", 0),
        ("DROP TABLE t", "SELECT a FROM t", 0),
        ("", "SELECT a FROM t", 0),
        ("SELECT a FROM t", "SELECT nothing FROM t", None),
        ("SELECT a FROM t", None, None),
        ("WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT sum(n) FROM r", "SELECT a FROM t", 0),
    ],
)
def test_sql(query, gold, value):
    got = one("execution", query, {"answer": gold, "database": DATABASE})
    assert got == (value if value is None else pytest.approx(value))


def test_sql_on_both_databases_of_a_row():
    row = {"answer": "SELECT max(a) FROM t", "database": DATABASE}
    row["second_database"] = DATABASE + "INSERT INTO t VALUES (9, 'w');"
    assert one("execution", "SELECT max(a) FROM t", row) == 1
    assert one("execution", "SELECT 3", row) == pytest.approx(1 / 3)  # right by coincidence on the first
    with pytest.raises(SurgeryError, match="needs the column 'database'"):
        one("execution", "SELECT 3", {"answer": "SELECT 3"})


def test_expression():
    row = {"answer": "2*x + 1", "cases": [{"x": 0}, {"x": 1}, {"x": 2}]}
    spec = {"execution": {"executor": "expression"}}
    assert one(spec, "x + x + 1", row) == 1
    assert one(spec, "1 + x", row) == pytest.approx(1 / 5)
    for bad in ("y", "__import__('os')", "x / 0", "", "x +", "'a' * 9", "(lambda: 1)()", "(" * 5000):
        assert one(spec, bad, row) == 0
    marked = {"execution": {"executor": "expression", "opening": "#"}}
    assert one(marked, "so #1 + 2*3", {"answer": "#7"}) is None  # the gold column holds the program itself
    assert one(marked, "so #1 + 2*3", {"answer": "7"}) == 1
    with pytest.raises(ValueError, match="not arithmetic"):
        import ast

        evaluate(ast.parse("[1]", mode="eval"), {})


def test_agreement():
    assert agreement(Results(()), Results(())) == 1
    assert agreement(Results(((1,), (1,))), Results(((1,),))) == 0.5
    with pytest.raises(SurgeryError, match="no executor 'sqll'"):
        build_rewards({"execution": {"executor": "sqll"}})


# ---- the tasks of the house ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "spec"), [("tools", "tool_call"), ("sql", "execution")])
def test_the_demonstrations_of_a_task_earn_its_reward(task, spec):
    if task not in TASKS:
        pytest.skip(f"no task {task}")
    row = TASKS[task].row(0, 0)
    top = {"tool_call": 3, "execution": 1}[spec]
    assert one(spec, row["completion"], row) == top
    assert one("accuracy", row["completion"], row) == 1
