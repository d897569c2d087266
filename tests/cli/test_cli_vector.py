"""`surgery vector`: extract, apply, combine, inspect, check, export-lora; and `surgery demo`."""

import inspect
import json

import pytest
import torch

from surgery.cli import main
from surgery.cli.vector import FORM_OPTIONS
from tests.cli.refusal import refused
from tests.helpers import load_state, same_bits, save_checkpoint, tiny_checkpoint, tiny_config, tiny_family


@pytest.fixture
def family(tmp_path):
    base, tuned = tiny_family(tmp_path, dtype="bfloat16")
    return [str(base), *map(str, tuned)]


@pytest.fixture
def vectors(family, tmp_path):
    """One vector for each tuned model, in float32."""
    out = []
    for i, tuned in enumerate(family[1:]):
        out.append(str(tmp_path / f"v{i}.safetensors"))
        assert main(["vector", "extract", family[0], tuned, "-o", out[-1], "--form", "float32", "--quiet"]) == 0
    return out


def close(a, b, tolerance=1e-6):
    return a.keys() == b.keys() and all(torch.allclose(a[n].float(), b[n].float(), atol=tolerance) for n in a)


def test_extract_and_apply_give_the_tuned_model_back_bit_for_bit(family, tmp_path, capsys):
    base, tuned, _ = family
    vector, out = str(tmp_path / "v.safetensors"), str(tmp_path / "out")
    assert main(["vector", "extract", base, tuned, "-o", vector, "--json"]) == 0
    saved = json.loads(capsys.readouterr().out)
    assert saved["form"] == "lossless" and saved["out"] == vector and 0 < saved["changed"] <= saved["numbers"]
    assert main(["vector", "apply", vector, base, "-o", out]) == 0
    assert out in capsys.readouterr().out
    assert same_bits(load_state(out), load_state(tuned))


@pytest.mark.parametrize("form", FORM_OPTIONS)
def test_every_form_can_be_written_and_applied(form, family, tmp_path):
    vector, out = str(tmp_path / "v.safetensors"), str(tmp_path / "out")
    assert main(["vector", "extract", *family[:2], "-o", vector, "--form", form, "--quiet"]) == 0
    assert main(["vector", "apply", vector, family[0], "-o", out, "--scale", "0.5", "--quiet"]) == 0
    assert load_state(out).keys() == load_state(family[0]).keys()


def test_the_options_of_forms_are_those_of_the_library():
    from surgery.weights.formats import FORMS

    known = {name: tuple(inspect.signature(form).parameters) for name, form in FORMS.items()}
    assert {name: tuple(sorted(words)) for name, words in known.items()} == {
        name: tuple(sorted(words)) for name, words in FORM_OPTIONS.items()
    }


def test_filters_leave_the_rest_of_the_base_alone(family, tmp_path):
    out = str(tmp_path / "out")
    assert (
        main(["vector", "apply", family[1], family[0], "-o", out, "--only", "mlp", "--without", "layers.0", "--quiet"])
        == 0
    )
    base, tuned, made = load_state(family[0]), load_state(family[1]), load_state(out)
    for name, tensor in made.items():
        assert torch.equal(tensor, (tuned if "mlp" in name and "layers.0" not in name else base)[name])


def test_combine_computes_the_formula(family, vectors, tmp_path, capsys):
    a, b = vectors
    ways = [["a - 0.5*b", f"a={a}", f"b={b}"], ["--add", a, "--add", f"{b}:-0.5"],
            [" -(b/2 - a)", f"a={family[1]}", f"b={b}", "--base", family[0]]]  # fmt: skip
    made = []
    for i, way in enumerate(ways):
        made.append(tmp_path / f"c{i}.safetensors")
        assert main(["vector", "combine", *way, "-o", str(made[-1])]) == 0
        assert str(made[-1]) in capsys.readouterr().out
    x, y = load_state(a), load_state(b)
    wanted = {name: x[name] - 0.5 * y[name] for name in x}
    assert all(close(load_state(file), wanted) for file in made)
    analogy = ["--analogy", a, b, a, "-o", str(tmp_path / "d.safetensors")]
    assert main(["vector", "combine", *analogy, "--quiet"]) == 0
    assert close(load_state(tmp_path / "d.safetensors"), y)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "in one way"),
        (["a + b", "a=A"], "no vector 'b', at character 5 of the formula:\n  a + b\n      ^\n"),
        (["a * a", "a=A"], "can't be multiplied by a vector"),
        (["a + 1", "a=A"], "A number can't be added to a vector"),
        (["2 * 3"], "comes to a number"),
        (["a / 0", "a=A"], "zero"),
        (["a", "a=A", "c=A"], "'c'"),
        (["a", "A"], "NAME=PATH"),
        (["__import__('os').system('x')"], "operator is missing"),
        (["a.save('x')", "a=A"], "can't hold '.'"),
        (["a +", "a=A"], "formula ends"),
    ],
)
def test_formulas_that_are_wrong(words, told, vectors, tmp_path, capsys):
    words = [word.replace("=A", f"={vectors[0]}") for word in words]
    assert told in refused(["vector", "combine", *words, "-o", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


def test_inspect_tells_measures_and_draws(family, vectors, tmp_path, capsys):
    figures = tmp_path / "figures"
    assert main(["vector", "inspect", *family, "--by", "layer", "--plot", str(figures), "--spectra"]) == 0
    told = capsys.readouterr().out
    assert "tuned0" in told and "Task vectors by layer" in told
    drawn = {file.name for file in figures.iterdir()}
    assert drawn == {
        "ulps.png",
        "cosine.png",
        "conflict.png",
        "spectrum.png",
        "heat_map_tuned0.png",
        "heat_map_tuned1.png",
    }
    assert main(["vector", "inspect", *vectors, "--base", family[0], "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert main(["vector", "inspect", *family, "--json"]) == 0
    models = json.loads(capsys.readouterr().out)
    assert stored["labels"] == ["v0", "v1"] and stored["module"]
    norms = [[row["l2"] for row in found["vectors"]] for found in (stored, models)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_check_answers_by_its_exit_code(family, tmp_path, capsys):
    assert main(["vector", "check", *family]) == 0
    assert "compatible" in capsys.readouterr().out
    stranger = tiny_checkpoint(tmp_path / "stranger", seed=99, dtype="bfloat16")
    assert main(["vector", "check", family[0], str(stranger), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert main(["vector", "check", family[0], str(stranger), "--quiet"]) == 1
    assert capsys.readouterr() == ("", "")


def test_export_lora_says_how_much_is_kept_and_is_read_back(family, tmp_path, capsys):
    lora = str(tmp_path / "lora")
    assert main(["vector", "export-lora", family[1], family[0], "-o", lora, "--rank", "4", "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["energy"] < 1
    assert main(["vector", "extract", family[0], lora, "-o", str(tmp_path / "v.safetensors"), "--form", "float32"]) == 0


def test_a_wrong_base_is_refused_and_a_transfer_must_be_asked_for(family, tmp_path, capsys):
    vector, out = tmp_path / "v.safetensors", tmp_path / "out"
    assert main(["vector", "extract", *family[:2], "-o", str(vector), "--quiet"]) == 0
    assert "--transfer" in refused(["vector", "apply", vector, family[2], "-o", out], capsys)
    assert "--vector-base" in refused(["vector", "apply", vector, family[2], "-o", out, "--transfer"], capsys)
    for argv in (["combine", "a", f"a={vector}", "-o", out], ["inspect", vector]):  # read beside another base: nonsense
        assert "is not the base" in refused(["vector", *argv, "--base", family[2]], capsys)
    argv = ["vector", "apply", vector, family[2], "-o", out, "--transfer", "--vector-base", family[0]]
    assert main([*map(str, argv), "--quiet"]) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["extract", "BASE", "BASE", "-o", "OUT"], "same"),
        (["extract", "BASE", "missing", "-o", "OUT"], "missing"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--density", "0.5"], "lossless"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--form", "topk", "--density", "1.5"], "density"),
        (["extract", "BASE", "TUNED", "-o", "OUT", "--only", "nowhere"], "nowhere"),
        (["extract", "BASE", "TUNED", "-o", "TUNED"], "--force"),
        (["apply", "TUNED", "BASE", "-o", "OUT", "--scale", "nan"], "scale"),
        (["combine", "a", "a=TUNED", "-o", "OUT"], "--base"),
        (["inspect", "BASE"], "Only the base"),
        (["inspect", "BASE", "TUNED", "--density", "0"], "density"),
        (["export-lora", "TUNED", "BASE", "-o", "OUT", "--rank", "0"], "rank"),
    ],
)
def test_what_can_not_be_done(words, told, family, tmp_path, capsys):
    places = {"BASE": family[0], "TUNED": family[1], "OUT": str(tmp_path / "out.safetensors")}
    assert told in refused(["vector", *(places.get(word, word) for word in words)], capsys)
    assert not (tmp_path / "out.safetensors").exists()


def test_demo_shows_everything_and_replaces_only_itself(tmp_path, capsys):
    from analysis.report import MERGES, demo

    out = tmp_path / "demo"
    made = demo(out, n=20)
    assert made.report.is_file() and "| merged: ties |" in made.report.read_text()
    written = json.loads((out / "report.json").read_text())
    assert all((out / "figures" / figure.rpartition("/")[2]).stat().st_size > 5_000 for figure in written["figures"])
    assert set(MERGES) == {path.name for path in (out / "merged").iterdir()}
    scores = written["accuracies"]
    new = [task for task in scores["base"] if task in scores]  # those that a member was tuned on
    mean = {model: sum(row[task] for task in new) / len(new) for model, row in scores.items()}
    assert len(new) >= 3 and all(mean[f"merged: {method}"] > mean["base"] + 0.3 for method in MERGES)
    assert "exists" in refused(["demo", "-o", out], capsys)
    (tmp_path / "mine").mkdir()
    assert "no earlier demo" in refused(["demo", "-o", tmp_path / "mine", "--force"], capsys)
    assert demo(out, n=2, force=True).out == out


def test_the_next_step_is_told_in_the_words_of_the_command(family, tmp_path, capsys):
    vector = str(tmp_path / "v.safetensors")
    other = str(tiny_checkpoint(tmp_path / "other", seed=5, dtype="bfloat16"))
    assert main(["vector", "extract", *family[:2], "-o", vector, "--quiet"]) == 0
    assert main(["vector", "apply", vector, other, "-o", str(tmp_path / "out")]) == 2
    assert "--transfer, in Python transfer=True" in capsys.readouterr().err
    assert main(["vector", "combine", "2*v", f"v={vector}", "-o", str(tmp_path / "w.safetensors")]) == 2
    assert "--base BASE" in capsys.readouterr().err


def test_tensors_of_one_model_only_can_be_left_out(family, tmp_path, capsys):
    state = load_state(family[1])
    gone = sorted(state)[3]
    lacking = str(save_checkpoint(tmp_path / "lacking", {n: t for n, t in state.items() if n != gone}, tiny_config()))
    command = ["vector", "extract", family[0], lacking, "-o", str(tmp_path / "v.safetensors"), "--quiet"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert gone in told and "--missing skip" in told
    assert main([*command, "--missing", "skip"]) == 0
