"""`surgery tune`: what would move, before anything does."""

import json

import pytest

from surgery.cli import main
from surgery.models import load
from surgery.tuning import Selection, select
from surgery.tuning.plan import NAMES, parse
from surgery.weights.deltas.file import SparseDelta


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


def test_select_tells_what_share_of_the_model_moves(capsys, tmp_path):
    code, found, _ = told(
        capsys, "tune", "select", "tiny-base", "-o", str(tmp_path / "half.safetensors"), "--tuning", "half"
    )
    shares = {kind: share for kind, share in found["by_kind"].items() if kind in {*"qkvo"}}
    assert code == 0 and sum(shares.values()) == pytest.approx(2)  # two of q, k, v, o in every layer


def test_a_recipe_takes_the_file_of_a_selection_and_only_that_models(capsys, tmp_path):
    file = str(tmp_path / "lift.safetensors")
    assert told(capsys, "tune", "select", "tiny-base", "-o", file)[0] == 0
    code, found, _ = told(capsys, "tune", "show", "sft", "--model", "tiny-base", "--set", f"tuning={file}")
    assert code == 0 and found["arms"][0]["numbers"] == 22_124
    code, _, said = told(capsys, "tune", "show", "sft", "--model", "tiny-small-base", "--set", f"tuning={file}")
    assert code == 2 and "of another model" in said
    words = ("--set", f"tuning={file}", "--set", "steps=1", "--set", "evaluate.every=0", "-o", str(tmp_path / "run"))
    assert told(capsys, "train", "sft", *words)[0] == 0
    moved = SparseDelta.load(tmp_path / "run" / "delta.safetensors")
    assert 0 < moved.count <= 22_124


def test_a_threshold_is_counted_on_the_weights(capsys):
    code, found, _ = told(capsys, "tune", "show", "sft", "--set", "tuning={sara: {threshold: 0.02}}")
    assert code == 0 and found["arms"][0]["numbers"] == select(load("tiny-base")[0], "sara", threshold=0.02).count


def test_list_shows_every_tuning_and_the_options_it_takes(capsys):
    code, found, _ = told(capsys, "tune", "list")
    assert code == 0 and {row["name"] for row in found} == set(NAMES) and all(row["what"] for row in found)
    for row in found:
        required = {"delta": {"sibling": "tiny-chain"}, "sara": {"threshold": 1.0}}.get(row["name"], {})
        usual = {word: how[1] for word, how in row["options"].items() if how[1] and word != "modules"}
        parse({row["name"]: {**usual, **required}})  # what is listed is what is taken


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["select", "tiny-base", "-o", "x.safetensors", "--tuning", "fisher"], "there are none here"),
        (["select", "tiny-base", "-o", "x.safetensors", "--tuning", "{lift: {density: 7}}"], "density of 7"),
        (["select", "tiny-base", "-o", "x.safetensors", "--tuning", "lora"], "none of the model's own numbers"),
        (["select", "tiny-base", "-o", "x.safetensors", "--tuning", "{lift: {density"], "is not YAML"),
        (["select", "tiny-base", "-o", "x.txt"], "ends in .safetensors"),
        (["select", "tiny-base", "-o", "none/x.safetensors"], "There is no folder none"),
        (["show", "sft", "--set", "tuning={lift: {density"], "is not YAML"),
        (["show", "sft", "--set", "tuning={lift: {density: much}}"], "takes a number for density"),
        (["show", "sft", "--set", "tuning={lift: {density: 1e-9}}"], "selects nothing"),
        (["show", "sft", "--set", "tuning={lift: 0.05}"], "takes options by name"),
        (["show", "sft", "--set", "tuning={lift: {direction: up}}"], "largest, smallest"),
        (["show", "sft", "--set", "tuning={lift: {refresh: -1}}"], "'refresh' is 0 or more"),
        (["show", "sft", "--set", "tuning={fisher: {batches: 0}}"], "'batches' is 1 or more"),
        (["show", "sft", "--set", "tuning={delta: {sibling: nowhere}}"], "nowhere"),
        (["show", "sft", "--set", "tuning={corda: {data: no.jsonl}}"], "no data file no.jsonl"),
        (["show", "sft", "--set", "tuning={lora: {rank: 0}}"], "'rank' is 1 or more"),
        (["show", "sft", "--set", "tuning={lora: {rank: 1.5}}"], "takes a whole number for rank"),
        (["show", "sft", "--set", "tuning={lora: {alpha: 0}}"], "alpha of a LoRA is above 0"),
        (["show", "sft", "--set", "tuning={corda: {mode: up}}"], "ipm, kpm"),
        (["show", "sft", "--set", "tuning=sara"], "needs a budget or a threshold"),
        (["show", "sft", "--set", "tuning={sara: {density: 0.1, nuclear: -1}}"], "nuclear norm"),
        (["show", "sft", "--set", "tuning=none.safetensors"], "none.safetensors"),
        (["list", "lifft"], "Did you mean 'lift'"),
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
