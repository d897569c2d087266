"""Every generated task: verifiers accept the right and refuse the wrong, rows are a pure function, labels are there."""

import json
import subprocess
import sys

import pytest

from surgery.errors import SurgeryError
from surgery.tasks import TASKS, Example, Task, make_task, marked_answer, task, verify
from surgery.tasks.grids import is_latin, shortest
from surgery.tasks.language import recognised
from surgery.tasks.logic import models
from surgery.tasks.numbers import evaluate
from surgery.tasks.tools import parsed, written

TINY = ["addition", "countdown", "boxes", "kv", "latin", "path", "sat", "pcfg"]
ALL = [*TINY, "tools", "sql", "chain", "copy"]
VOCABULARY = set("0123456789+-=;#abcdefghijklmnopqrstuvwxyz ")
OTHERWISE = [
    ("addition", {"digits": 5, "carries": [2, 4]}),
    ("countdown", {"numbers": 5, "operators": "+-*/", "largest": 25}),
    ("boxes", {"entities": 8, "moves": 8, "corrupt": "question"}),
    ("kv", {"facts": 20, "table": 3, "zipf": 1.0}),
    ("latin", {"blanks": 10, "blocks": True}),
    ("path", {"size": [3, 6], "steps": [5, 9]}),
    ("sat", {"variables": [2, 5], "clauses": [8, 20], "width": 3}),
    ("pcfg", {"shown": 0.2, "deepest": 1}),
    ("tools", {"calls": 4, "offered": 6}),
    ("sql", {"people": 5, "kinds": ["group", "join"]}),
]


def rows(name, n=200, **options):
    one = make_task(name, **options)
    return [one.row(3, i) for i in range(n)]


def wrongs(name, row):
    """Completions that can't be right: with no answer, with half of one, with more than one."""
    said = row["completion"]
    yield from ("", "#", "#" * 500, "#" + "(" * 500, "maybe", "\x00", "\ud800", "#²", said[: len(said) // 2])
    if name in ("tools", "sql"):
        yield from (said[2:], said.replace(" ", " -", 1) if name == "tools" else f"{said} LIMIT 0")
    else:
        yield from (said + "q", said + said[-1], said.replace("#", "") if "#" in said else "the")


@pytest.mark.parametrize(("name", "options"), [*((n, {}) for n in ALL), *OTHERWISE])
def test_verifiers_accept_the_right_and_refuse_the_wrong(name, options):
    for row in rows(name, **options):
        row = json.loads(json.dumps(row))  # as it comes out of a file
        assert verify(row["completion"], row) is True
        for wrong in wrongs(name, row):
            assert verify(wrong, row) is False, wrong


@pytest.mark.parametrize("name", ALL)
def test_rows_are_a_pure_function_of_seed_and_index(name):
    one = TASKS[name]
    backwards = [one.row(1, i) for i in reversed(range(20))]
    assert backwards[::-1] == [one.row(1, i) for i in range(20)]
    assert one.row(1, 7) != one.row(2, 7)
    assert one.examples(15, seed=1) == one.examples(15, seed=1) != one.examples(15, seed=2)


@pytest.mark.parametrize("name", ALL)
def test_rows_are_labelled(name):
    some = rows(name)
    assert all(isinstance(row["difficulty"], int | float) and row["task"] == name for row in some)
    assert 1 < len({row["category"] for row in some}) <= 13 or name == "sat"
    assert len({row["difficulty"] for row in some}) > 1


@pytest.mark.parametrize("name", TINY)
def test_text_is_in_the_characters_of_the_tiny_family_and_short(name):
    for row in rows(name):
        assert set(row["prompt"] + row["completion"]) <= VOCABULARY
        assert len(row["prompt"]) <= 60 and len(row["prompt"] + row["completion"]) < 126


def test_letters_in_front_tell_the_tasks_apart():
    letters = [row["prompt"][:2] for name in [*TINY, "facts", "copy", "double"] for row in rows(name, 1)]
    assert len(set(letters)) == len(letters)


def test_addition_is_worked_out_rightly():
    for row in rows("addition", digits=[1, 6]):
        first, second = row["prompt"][2:-1].split("+")
        assert row["answer"] == str(int(first) + int(second))
        *columns, _ = row["completion"].split(";")
        totals = [(sum(map(int, c.split("=")[0].split("+"))), int(c.split("=")[1])) for c in columns]
        assert all(total == said for total, said in totals) and len(columns) == row["digits"]
        assert sum(total > 9 for total, _ in totals) == row["carries"]
    assert {row["carries"] for row in rows("addition", 40, digits=[2, 4], carries=3)} == {3}
    with pytest.raises(SurgeryError, match="asks for 4 carries in 3 digits"):
        make_task("addition", digits=3, carries=4)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1+2*3", 7), ("(1+2)*3", 9), ("8/3/2", "4/3"), (" 7 - 9 ", -2), ("((5))", 5), ("2-3-4", -5)],
)
def test_expressions(text, value):
    assert str(evaluate(text)[0]) == str(value)


@pytest.mark.parametrize(
    "text",
    ["", "1+", "+1", "1 2", "(1", "1)", "()", "1/0", "4/(2-2)", "2**3", "9//2", "__import__('os')", "1e5", "1.5", "a",
     "٣+1", "(" * 21 + "1" + ")" * 21, "1+" * 200 + "1", "9" * 50, "1;2", "lambda:1"],
)  # fmt: skip
def test_what_is_no_expression_has_no_value(text):
    assert evaluate(text) is None


def test_countdown_wants_each_number_once():
    row = {"task": "countdown", "numbers": [2, 3, 3], "target": 8, "answer": "2+3+3"}
    assert verify("3+2=5, #3+2+3", row) is True
    for wrong in ("#8", "#2+3", "#2*3+2", "#3+3+3-1", "#2+3+3+0", "2+3+3"):
        assert verify(wrong, row) is False
    with pytest.raises(SurgeryError, match="No target was found"):
        make_task("countdown", operators="-", numbers=10, largest=2)


@pytest.mark.parametrize("corrupt", ["box", "question"])
def test_boxes_follow_from_the_prompt_and_so_do_their_corruptions(corrupt):
    def where(prompt):
        *facts, question = prompt[2:-1].split(";")
        at = {fact[0]: fact[-1] for fact in facts}
        return at[question[-1]], at

    for row in rows("boxes", corrupt=corrupt):
        answer, at = where(row["prompt"])
        assert answer == row["answer"] and at == dict(zip(row["entities"], row["boxes"], strict=True))
        assert len(set(at.values())) == len(at)
        assert where(row["corrupt_prompt"])[0] == row["corrupt_answer"] != answer
        assert sum(a != b for a, b in zip(row["prompt"], row["corrupt_prompt"], strict=True)) == 1
    moved = [row["moved"] for row in rows("boxes", moves=2)]
    assert set(moved) == {0, 1, 2}


def test_facts_stay_what_they_are():
    table = {row["prompt"]: row["answer"] for row in rows("kv", 500)}
    again = {row["prompt"]: row["answer"] for row in rows("kv", 500, facts=400)}
    common = set(table) & set(again)
    assert common and all(table[k] == again[k] for k in common)
    assert len(TASKS["kv"].examples(200)) == 200
    ranks = [row["rank"] for row in rows("kv", 400, zipf=1.5)]
    assert sum(rank < 20 for rank in ranks) > 300


def test_squares_have_one_solution_and_any_would_do():
    for row in rows("latin", 30, blanks=8):
        blank = [i for i, cell in enumerate("".join(row["givens"])) if cell == "0"]
        assert len(blank) == 8 and is_latin(row["answer"].split(";"), False)
    row = {"task": "latin", "givens": ["0000"] * 4, "blocks": False}
    assert verify("#1234;2341;3412;4123", row) is True
    assert verify("#1234;2341;3412;4123", row | {"blocks": True}) is False
    assert verify("#1234;1234;1234;1234", row) is False
    assert verify("#1234;2341;3412;4123", row | {"givens": ["2000", *["0000"] * 3]}) is False


def test_paths_as_short_count_and_others_do_not():
    grid = ["soo", "oxo", "ooe"]
    row = {"task": "path", "grid": grid, "answer": shortest(grid)}
    assert row["answer"] == "ddrr"
    assert verify("#rrdd", row) is True
    for wrong in ("#ddr", "#drdr", "#lddrr", "#ddrrrl", "#dddd", "#"):
        assert verify(wrong, row) is False
    assert shortest(["sx", "xe"]) is None


def test_formulas_are_what_a_solver_says():
    solvers = pytest.importorskip("pysat.solvers", reason="python-sat is not installed")
    found = rows("sat", variables=[2, 6], clauses=[3, 20])
    for row in found:
        with solvers.Solver(bootstrap_with=row["clauses"]) as solver:
            assert solver.solve() == row["satisfiable"] == (row["answer"] != "no")
    assert 60 < sum(row["satisfiable"] for row in found) < 140
    row = {"task": "sat", "variables": 2, "clauses": [[1, 2], [-1, 2]], "answer": "ab"}
    assert verify("#-ab", row) is True and verify("#a-b", row) is False and verify("#no", row) is False
    assert len(list(models([[1, 2]], 2))) == 3


def test_satquest():
    pytest.importorskip("satquest", reason="satquest is not installed")
    for problem in ("SATDP", "SATSP", "MaxSAT", "MCS", "MUS"):
        for row in rows("satquest", 40, problem=problem):
            assert verify(f"so it is {row['completion']}", json.loads(json.dumps(row))) is True
            assert verify("", row) is False and verify(row["completion"] + "0", row) is False
    with pytest.raises(SurgeryError, match="'problem' is 'SAT', expected one of SATDP"):
        make_task("satquest", problem="SAT")


def test_sentences():
    assert recognised(["the", "cats", "that", "the", "dog", "sees", "sleep"])
    for wrong in ("the cats sleeps", "the cat that the dogs sees sleeps", "cat sleeps", "the cat sees", ""):
        assert not recognised(wrong.split())
    row = {"task": "pcfg", "begun": "the dog that"}
    assert verify(" runs sleeps;", row) is True and verify(" run sleeps;", row) is False
    assert verify(" runs sleeps", row) is False and verify(" runs sleeps; the", row) is False
    assert verify(" sees the cat that" * 30 + " runs sleeps;", row) is False


def test_tool_calls_are_compared_by_value():
    calls = [{"name": "add", "parameters": {"a": 1, "b": 2}}, {"name": "weather", "parameters": {"city": "Oslo"}}]
    row = {"task": "tools", "calls": calls}
    swapped = written(calls).replace('"a": 1, "b": 2', '"b": 2, "a": 1')
    assert parsed(swapped) == calls and verify("<think>so</think>\n" + swapped, row) is True
    for wrong in (
        written(calls[::-1]),
        written(calls[:1]),
        written(calls).replace("1", '"1"'),
        written(calls).replace("parameters", "arguments"),
        written(calls) + written(calls),
        written(calls).replace("</tool_call>", ""),
        "<tool_call>\n[1, 2]\n</tool_call>",
        "<tool_call>\n" + "[" * 100_000 + "\n</tool_call>",
    ):
        assert verify(wrong, row) is False


def test_wrong_names_options_and_rows_get_a_sentence():
    with pytest.raises(SurgeryError, match="no task 'adition'.\nDid you mean 'addition'"):
        make_task("adition")
    with pytest.raises(SurgeryError, match="'addition' has no option 'digit'.\nDid you mean 'digits'"):
        make_task("addition", digit=3)
    with pytest.raises(SurgeryError, match="no option 'x'.\nIt has no options"):
        Task("plain", "", lambda rng: Example("", "", "")).with_options(x=1)
    for name, options in (
        ("boxes", {"corrupt": "both"}),
        ("countdown", {"operators": "+^"}),
        ("pcfg", {"shown": 1.0}),
        ("sql", {"kinds": "join"}),
        ("sat", {"width": 5, "variables": 3}),
        ("path", {"size": 2, "steps": 9}),
        ("kv", {"zipf": "x"}),
    ):
        with pytest.raises(SurgeryError, match=f"Task '{name}': "):
            make_task(name, **options)
    with pytest.raises(SurgeryError, match="without the column 'task'"):
        verify("#1", {"answer": "1"})
    with pytest.raises(SurgeryError, match="'countdown' lacks the column 'target'"):
        verify("#1", {"task": "countdown", "numbers": [1]})


def test_a_new_task_is_one_function():
    try:

        @task("parity", "whether a number is odd", verify=lambda text, row: marked_answer(text) == str(row["n"] % 2))
        def parity(rng, *, largest=9):
            n = rng.randint(0, largest)
            return Example(f"z {n}=", f"#{n % 2}", str(n % 2), columns={"n": n})

        row = make_task("parity", largest=3).row(0, 0)
        assert row["n"] <= 3 and row["category"] == "parity" and verify(row["completion"], row) is True
        assert TASKS["parity"].correct("#2", Example("z 1=", "#1", "1", columns={"n": 1})) is False
    finally:
        TASKS.pop("parity", None)


def test_importing_the_tasks_imports_nothing_heavy():
    code = (
        "import sys, surgery.tasks; print({'torch', 'sympy', 'datasets', 'reasoning_gym', 'pysat'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
