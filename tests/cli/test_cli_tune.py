"""`surgery tune`: what would move, before anything does."""

import json

import pytest

from surgery.cli import main
from surgery.tuning import Selection


def told(capsys, *words):
    """Exit code, what was printed as JSON (or None), and what was said."""
    code = main(["--json", *words])
    found = capsys.readouterr()
    return code, json.loads(found.out) if found.out.strip() else None, found.err


def test_show_sets_a_tuning_beside_all_numbers_and_a_lora(capsys):
    code, found, _ = told(
        capsys, "tune", "show", "sft", "--model", "tiny-base", "--set", "tuning={lift: {density: 0.05}}"
    )
    assert code == 0
    lift, full, lora = found["arms"]
    assert lift["numbers"] == 22_124 and full["numbers"] == found["parameters"] == 447_552
    assert abs(lora["numbers"] - lift["numbers"]) < 7_296 / 2  # half a rank
    assert lift["moments"] == 8 * 22_124 and lift["places"] == 4 * 22_124
    assert lift["gradients"] == 4 * (22_124 + 96 * 256)  # and one dense tensor, the largest that is chosen from
    assert full["gradients"] == 4 * 447_552 and full["moments"] >= 8 * 447_552
    assert lift["peak"] < full["peak"] and lora["adapter"] == 4 * lora["numbers"]


def test_show_without_a_tuning_shows_the_recipe_as_it_is(capsys):
    code, found, _ = told(capsys, "tune", "show", "sft", "--model", "tiny-base")
    assert code == 0 and [arm["numbers"] for arm in found["arms"]] == [447_552]


def test_select_writes_places_that_a_run_can_take(capsys, tmp_path):
    out = tmp_path / "lift.safetensors"
    code, found, _ = told(capsys, "tune", "select", "tiny-base", "-o", str(out), "--tuning", "{lift: {rank: 8}}")
    assert code == 0 and found["numbers"] == 22_124 and set(found["by_kind"]) == set("qkvo") | {"gate", "up", "down"}
    assert Selection.load(out).count == 22_124
    code, _, said = told(capsys, "tune", "select", "tiny-base", "-o", str(out))
    assert code == 2 and "exists" in said and "--force" in said
    code, found, _ = told(capsys, "tune", "select", "tiny-base", "-o", str(out), "--tuning", "half", "--force")
    assert code == 0 and Selection.load(out).count == found["numbers"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["select", "tiny-base", "-o", "x.safetensors", "--tuning", "fisher"], "there are no data"),
        (["select", "tiny-base", "-o", "x.safetensors", "--tuning", "{lift: {density: 7}}"], "density of 7"),
        (["select", "tiny-base", "-o", "x.safetensors", "--tuning", "lora"], "none of the model's own numbers"),
        (["show", "sft", "--set", "tuning=lifft", "--model", "tiny-base"], "Did you mean 'lift'"),
        (["show", "sft", "--set", "tuning=lift", "--model", "nothing-here"], "nothing-here"),
        (["show", "sft", "--set", "tuning={lift: {modules: [qkv]}}", "--model", "tiny-base"], "qkv"),
    ],
)
def test_what_is_wrong_gets_a_sentence(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = told(capsys, "tune", *words)
    assert code == 2 and said in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())
