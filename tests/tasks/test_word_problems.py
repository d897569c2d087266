"""Word problems: read from files, scored by number or by expression."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from surgery.errors import SurgeryError
from surgery.tasks import Example, gsm8k, make_task, numeric_answer, same_number, svamp, verify


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 cats.\n#### 1,234", 1234),
        ("so 12 and then 5-2", 2),
        ("= -3.", -3),
        ("$.50", 0.5),
        ("9 #### 7\nmore 8", 7),
        ("none", None),
        ("####", None),
        ("it is 4.50 dollars.", 4.5),
    ],
)
def test_numeric_answer(text, number):
    assert numeric_answer(text) == number


def test_word_problems_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_DATA", str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "svamp").mkdir()
    row = {"question": "How many?", "answer": "2*600 = <<2*600=1200>>1200\n#### 1,200"}
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    problem = {"Body": "Ann has 5 pens", "Question": "How many?", "Equation": "( 5.0 - 2.0 )", "Answer": 3.0}
    (tmp_path / "svamp" / "SVAMP.json").write_text(json.dumps([problem] * 5))

    assert gsm8k("test", 1) == [Example("How many?", "2*600 = 1200\n#### 1,200", "1200")]
    (first, *others) = svamp("train", held_out=2)
    assert first == Example("Ann has 5 pens. How many?", "5 - 2 = 3\n#### 3", "3")
    assert len(others) == 2 and len(svamp("test", held_out=2)) == 2
    assert same_number("5 - 2 = 3", first) and not same_number("5 - 2 = 4", first)

    with pytest.raises(SurgeryError, match=r"gsm8k/train\.jsonl"):
        gsm8k("train")
    with pytest.raises(SurgeryError, match="Unknown split 'dev'"):
        svamp("dev")


DATA = ("gsm8k", "svamp", "math")


@pytest.fixture
def folder(tmp_path):
    """Three small data sets in a folder as SURGERY_DATA names it."""
    for name in DATA:
        (tmp_path / name).mkdir()
    solved = [{"question": f"{i}?", "answer": f"<<{i}+1={i + 1}>>so\n#### {i + 1}"} for i in range(30)]
    (tmp_path / "gsm8k" / "train.jsonl").write_text("\n".join(map(json.dumps, solved)))
    posed = [{"Body": f"{i} pens.", "Question": "?", "Equation": f"( {i}.0 + 1.0 )", "Answer": i + 1.0,
              "Type": "Addition"} for i in range(330)]  # fmt: skip
    (tmp_path / "svamp" / "SVAMP.json").write_text(json.dumps(posed))
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    hard = [{"problem": f"{i}?", "answer": f"\\frac{{{i}}}{{7}}", "level": "Level 3"} for i in range(30)]
    parquet.write_table(pyarrow.Table.from_pylist(hard), tmp_path / "math" / "train.parquet")
    return tmp_path


@pytest.mark.parametrize("name", DATA)
def test_tasks_draw_problems_and_verify_rows(name, folder, monkeypatch):
    if name == "math":
        pytest.importorskip("math_verify", reason="math-verify is not installed")
    monkeypatch.setenv("SURGERY_DATA", str(folder))
    one = make_task(name)
    assert make_task(name, path=str(folder / name)).row(0, 3) == one.row(0, 3)
    for i in range(30):
        row = one.row(0, i)
        assert row["task"] == name and row["difficulty"] in (1, 3)
        assert verify(row["completion"], row) is True
        assert verify("", row) is False and verify("It is 123456.", row) is False
    assert len({one.row(0, i)["prompt"] for i in range(30)}) > 10


def test_expressions_are_compared_by_value():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    row = {"task": "math", "answer": "\\frac{1}{2}"}
    for right in ("so it is $0.5$", "\\boxed{\\frac{2}{4}}", "The answer is $\\frac12$."):
        assert verify(right, row) is True
    assert verify("\\boxed{\\frac{2}{3}}", row) is False
    assert verify("anything", row | {"answer": ""}) is None
    assert verify("12", {"task": "gsm8k", "answer": "none"}) is None


def test_expressions_are_compared_in_other_threads_too():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(verify, "\\boxed{0.5}", {"task": "math", "answer": "\\frac{1}{2}"}).result() is True


def test_missing_packages_and_files_get_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(SurgeryError) as error:
        verify("1", {"task": "math", "answer": "1"})
    assert error.value.hint == "`pip install math-verify`"
    with pytest.raises(SurgeryError, match="There is no file .*nowhere"):
        gsm8k("test", path=tmp_path / "nowhere")
    (tmp_path / "test.jsonl").write_text("{")
    with pytest.raises(SurgeryError, match=r"test\.jsonl can't be read"):
        gsm8k("test", path=tmp_path)
    with pytest.raises(SurgeryError, match="'svamp' has no option 'spit'.\nDid you mean 'split'"):
        make_task("svamp", spit="train")
