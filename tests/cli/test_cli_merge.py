"""`surgery merge` and its plan: happy paths, what goes to which stream, and what is imported."""

import json
import subprocess
import sys

import pytest

from surgery.cli import main
from tests.helpers import load_state, same_bits, tiny_family

IMPORTS = """
import sys
from surgery.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "pandas", "matplotlib", "huggingface_hub"} & sys.modules.keys()
print(code, *sorted(heavy), file=sys.stderr)
"""


@pytest.fixture
def family(tmp_path):
    base, tuned = tiny_family(tmp_path, dtype="bfloat16")
    return [str(base), *map(str, tuned)]


def imported(*arguments):
    """Exit code and heavy modules after a command in a process of its own."""
    run = subprocess.run([sys.executable, "-c", IMPORTS, *arguments], capture_output=True, text=True, timeout=120)
    code, *heavy = run.stderr.splitlines()[-1].split()
    return int(code), heavy


def test_a_method_and_models_make_the_folder_that_the_recipe_makes(family, tmp_path, capsys):
    base, *tuned = family
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"method: ties\nbase: {base}\nmodels: [{tuned[0]}, {tuned[1]}]\nparameters: {{density: 0.3}}\n")
    assert main(["merge", str(recipe), "-o", str(tmp_path / "a"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert (
        main(["merge", "--method", "ties", "--base", base, *tuned, "--set", "density=0.3", "-o", str(tmp_path / "b")])
        == 0
    )
    out = capsys.readouterr().out
    assert "Merged by ties" in out and str(tmp_path / "b") in out
    assert same_bits(load_state(tmp_path / "a"), load_state(tmp_path / "b"))


def test_weights_are_given_to_the_models_in_order(family, tmp_path):
    base, *tuned = family
    argv = ["merge", "--method", "task_arithmetic", "--base", base, *tuned, "--weight", "1", "--weight", "0"]
    assert main([*argv, "-o", str(tmp_path / "a"), "--quiet"]) == 0
    assert same_bits(load_state(tmp_path / "a"), load_state(tuned[0]))


def test_the_plan_needs_no_torch_and_writes_nothing(family, tmp_path):
    argv = ["merge", "--method", "breadcrumbs", "--base", *family, "--plan", "-o", str(tmp_path / "out")]
    assert imported(*argv) == (0, [])
    assert not (tmp_path / "out").exists()


def test_a_merge_needs_torch_but_nothing_else_that_is_heavy(family, tmp_path):
    code, heavy = imported("merge", "--method", "ties", "--base", *family, "-o", str(tmp_path / "out"))
    assert code == 0 and heavy == ["torch"]


def test_json_is_all_there_is_on_stdout(family, tmp_path, capsys):
    argv = ["merge", "--method", "linear", *family[1:], "--json"]
    assert main([*argv, "--plan"]) == 0
    assert json.loads(capsys.readouterr().out)["merged"] == len(load_state(family[0]))
    assert main([*argv, "-o", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "out")
