"""`surgery merge`: recipes and methods, plans, zoo names, and every bad input that reaches the command line."""

import json
import os

import pytest
import torch

from surgery.cli import main
from tests.cli.refusal import refused
from tests.helpers import load_state, read_json, same_bits, save_checkpoint, tiny_family, write_json


@pytest.fixture
def family(tmp_path):
    base, tuned = tiny_family(tmp_path, dtype="bfloat16")
    return [str(base), *map(str, tuned)]


def test_a_method_and_models_make_what_the_recipe_makes(family, tmp_path, capsys):
    base, *tuned = family
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"method: ties\nbase: {base}\nmodels: [{tuned[0]}, {tuned[1]}]\nparameters: {{density: 0.3}}\n")
    assert main(["merge", str(recipe), "-o", str(tmp_path / "a"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    argv = ["merge", "--method", "ties", "--base", base, *tuned, "--set", "density=0.3"]
    assert main([*argv, "-o", str(tmp_path / "b"), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "Merged by ties" in out and str(tmp_path / "b") in out
    assert same_bits(load_state(tmp_path / "a"), load_state(tmp_path / "b"))


def test_weights_are_given_to_the_models_in_order(family, tmp_path):
    base, *tuned = family
    argv = ["merge", "--method", "task_arithmetic", "--base", base, *tuned, "--weight", "1", "--weight", "0"]
    assert main([*argv, "-o", str(tmp_path / "a"), "--quiet"]) == 0
    assert same_bits(load_state(tmp_path / "a"), load_state(tuned[0]))


def test_options_stand_over_what_the_recipe_says(family, tmp_path):
    recipe = tmp_path / "r.yml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {family[1]}, parameters: {{weight: 1}}}}]\n")
    assert main(["merge", str(recipe), "-o", str(tmp_path / "a"), "--out-dtype", "float32", "--quiet"]) == 0
    assert {t.dtype for t in load_state(tmp_path / "a").values()} == {torch.float32}


def test_stages_run_in_one_command_and_are_told_in_the_plan(family, tmp_path, capsys):
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"name: first\nmethod: linear\nmodels: [{family[1]}, {family[2]}]\n---\n"
        f"method: task_arithmetic\nbase: {family[0]}\nmodels: [first]\n"
    )
    assert main(["merge", str(recipe), "--plan"]) == 0
    assert "result of first" in capsys.readouterr().out
    assert main(["merge", str(recipe), "-o", str(tmp_path / "a"), "--quiet"]) == 0
    assert load_state(tmp_path / "a").keys() == load_state(family[0]).keys()


def test_names_of_the_zoo_stand_for_models_also_in_recipes(tmp_path, capsys):
    recipe = tmp_path / "r.yml"
    recipe.write_text("method: ties\nbase: tiny-base\nmodels: [tiny-chain, tiny-shift]\n")
    assert main(["merge", str(recipe), "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["base"].endswith("tiny-base") and len(plan["models"]) == 3


def test_a_folder_goes_before_a_model_of_the_zoo(family, tmp_path, monkeypatch, capsys):
    os.rename(family[0], tmp_path / "tiny-base")
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "--method", "linear", "tiny-base", family[1], "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == ["tiny-base", family[1]]


def test_the_plan_says_what_is_read_and_written_and_writes_nothing(family, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["merge", "--method", "breadcrumbs", "--base", *family, "--plan", "-o", str(out)]
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("breadcrumbs", "read", "written", "BF16", "memory", "disk"))
    assert not out.exists()
    assert main([*argv, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes_written"] * 3 == plan["bytes_read"] and plan["memory"] > 0


def test_json_is_all_there_is_on_stdout(family, tmp_path, capsys):
    argv = ["merge", "--method", "linear", *family[1:], "-o", str(tmp_path / "out"), "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["nothing.yml"], "no recipe"),
        (["."], "is a folder"),
        (["a.yml", "b.yml"], "One recipe"),
        (["a.yml", "--base", "x"], "--base goes with --method"),
        (["--method", "tie", "x"], "Did you mean 'ties'"),
        (["--method", "ties", "x", "--set", "densty=1"], "densty"),
        (["--method", "ties", "x", "--set", "density"], "NAME=VALUE"),
        (["--method", "linear", "no-such-model", "-o", "out"], "no-such-model"),
    ],
)
def test_what_can_not_be_meant(argv, told, capsys):
    assert told in refused(["merge", *argv], capsys)


def test_an_output_is_needed_and_is_never_overwritten(family, tmp_path, capsys):
    argv = ["merge", "--method", "linear", *family[1:]]
    assert "-o DIR" in refused(argv, capsys)
    (tmp_path / "out").mkdir()
    assert "--force" in refused([*argv, "-o", tmp_path / "out"], capsys)
    assert "input" in refused([*argv, "-o", family[1], "--force"], capsys)
    assert main([*argv, "-o", str(tmp_path / "out"), "--force", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("method: [", "line"),
        ("method: !!python/object/apply:os.system [echo]\nmodels: [a]", "tag"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nmethod: linear\nmodels: [a]", ""),
        ("models: [a, b]", "merge method"),
        ("method: ties\nbase: B\nmodels: [A]\nparameters: {density: 1.5}", "density"),
        ("method: ties\nbase: B\nmodels: [A]\nparameters: {densty: 0.5}", "density"),
        ("method: linear\nmodels: [A, A]", "same model"),
        ("method: linear\nmodels: [A, B]\nvocabulary: base", "vocab"),
    ],
)
def test_recipes_that_are_wrong(text, told, tmp_path, capsys):
    (tmp_path / "r.yml").write_text(text)
    assert told in refused(["merge", tmp_path / "r.yml", "-o", tmp_path / "out"], capsys)


def _truncated(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _long_header(model):
    (model / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def _nan(model):
    state = load_state(model)
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_checkpoint(model, state)


def _other_shape(model):
    state = load_state(model)
    state["model.norm.weight"] = torch.ones(3)
    save_checkpoint(model, state)


def _lacking(model):
    state = load_state(model)
    del state["model.norm.weight"]
    save_checkpoint(model, state)


def _other_names(model):
    save_checkpoint(model, {"x." + name: tensor for name, tensor in load_state(model).items()})


def _quantised(model):
    write_json(model / "config.json", read_json(model / "config.json") | {"quantization_config": {"quant_method": "x"}})


def _pickled(model):
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def _escaping_index(model):
    names = list(load_state(model))
    (model / "model.safetensors").unlink()
    write_json(model / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "../../x.safetensors")})


def _empty(model):
    for file in model.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_truncated, "model.safetensors"), (_long_header, "model.safetensors"), (_nan, "NaN"),
        (_other_shape, "model.norm.weight"), (_lacking, "model.norm.weight"), (_other_names, "no tensor"),
        (_quantised, "quant"), (_pickled, "allow-pickle"), (_escaping_index, "../../x.safetensors"),
        (_empty, "not a checkpoint"),
    ],
)  # fmt: skip
def test_models_that_are_wrong(harm, told, family, tmp_path, capsys):
    harm(tmp_path / "tuned1")
    argv = ["merge", "--method", "task_arithmetic", "--base", *family, "-o", tmp_path / "out"]
    assert told in refused(argv, capsys)
    assert not (tmp_path / "out").exists()
