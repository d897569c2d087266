"""Recipes: both dialects to one normal form, and a sentence for everything that can be wrong in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from surgery.errors import SurgeryError
from surgery.weights.recipe import (
    ModelRef,
    TokenRule,
    Value,
    load_recipes,
    recipe_from_command,
    recipe_from_source,
    relative_depth,
    resolve,
    signature_of,
    signatures,
)
from surgery.weights.recipe.mergekit import METHODS as MERGEKIT_METHODS

TIES = """
models:
  - model: ./math
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: ./code@v2
    parameters:
      density: 0.5
      weight:
        - filter: mlp
          value: [0, 1]
        - value: 0
merge_method: ties
base_model: ./base
parameters:
  normalize: true
  int8_mask: true
  lambda: 0.5
dtype: bfloat16
"""

LINEAR = """
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 3}}
"""


def one(text: str):
    (recipe,) = load_recipes(text)
    return recipe


def fail(text: str) -> str:
    with pytest.raises(SurgeryError) as caught:
        load_recipes(text)
    return str(caught.value)


def params(recipe):
    return signature_of(recipe.method).parameters


# --- mergekit's dialect -------------------------------------------------------------------------------------------


def test_mergekit_ties_in_our_words():
    recipe = one(TIES)
    (piece,) = recipe.slices
    assert recipe.method == "ties" and recipe.dialect == "mergekit"
    assert [i.model for i in piece.inputs] == [ModelRef("./math"), ModelRef("./code", revision="v2")]
    assert piece.base is not None and piece.base.model == recipe.base == ModelRef("./base")
    assert (recipe.dtype, recipe.out_dtype) == ("float32", "bfloat16")
    assert any("int8_mask has no effect" in n for n in recipe.notes) and any("float32" in n for n in recipe.notes)

    at = resolve(recipe, params(recipe), piece, "model.layers.3.mlp.up_proj.weight", t=0.25)
    assert at == {
        "weight": [1.0, 0.25],
        "density": [0.85, 0.5],
        "scale": 0.5,
        "normalize": "weights",
        "rescale": "none",
    }
    outside = resolve(recipe, params(recipe), piece, "lm_head.weight")
    assert outside["weight"] == [1.0, 0.0] and outside["density"] == [1.0, 0.5]


def test_mergekit_defaults_are_its_own():
    text = "merge_method: {}\nbase_model: b\nmodels: [{{model: a, parameters: {{weight: 1}}}}]"
    want = {
        "ties": {"density": [1.0], "normalize": "weights", "rescale": "none"},
        "dare_ties": {"density": [1.0], "normalize": "none", "rescale": "l1"},
        "breadcrumbs": {"density": [1.0], "normalize": "none", "rescale": "none", "top": [0.01]},
        "della": {"density": [1.0], "normalize": "weights", "rescale": "l1", "epsilon": [0.15]},
    }
    for method, values in want.items():
        recipe = one(text.format(method))
        got = resolve(recipe, params(recipe), recipe.slices[0], "x")
        assert got == {"weight": [1.0], "scale": 1.0, **values}, method


def test_every_mergekit_method_exists_here_with_its_parameters():
    from surgery.weights.methods import METHODS

    for word, contract in MERGEKIT_METHODS.items():
        ours = METHODS.lookup(contract.method)
        for name, parameter in contract.parameters.items():
            if parameter.name is None:
                continue
            assert parameter.name in ours.params, f"{word}.{name}: {contract.method} has no {parameter.name}"
            assert parameter.per_input == ours.params[parameter.name].per_input, f"{word}.{name}"


def test_signatures_read_from_source_equal_the_registry():
    from surgery.weights.methods import METHODS

    read = signatures()
    assert set(read) == set(METHODS)
    for name, method in METHODS.items():
        contract = read[name]
        assert contract.inputs == method.inputs
        assert contract.base == {True: "required", False: "ignored"}.get(method.needs_base, "optional"), name
        assert set(contract.parameters) == set(method.params), name
        for word, param in method.params.items():
            mine = contract.parameters[word]
            assert (mine.type, mine.per_input, mine.choices, mine.required) == (
                param.type, param.per_input, tuple(param.choices), param.required,
            ), f"{name}.{word}"  # fmt: skip
            assert mine.required or mine.default == param.default, f"{name}.{word}"


def test_dtype_of_mergekit_is_storage_too_and_out_dtype_wins():
    assert one(LINEAR).out_dtype == "base"
    assert one(LINEAR + "dtype: torch.float16").out_dtype == "float16"
    both = one(LINEAR + "dtype: float32\nout_dtype: bfloat16")
    assert (both.dtype, both.out_dtype) == ("float32", "bfloat16")


def test_mergekit_linear_counts_an_unlisted_base_among_the_models():
    recipe = one(LINEAR + "base_model: c\nparameters: {weight: 2}")
    assert [i.model.path for i in recipe.slices[0].inputs] == ["a", "b", "c"]
    assert resolve(recipe, params(recipe), recipe.slices[0], "x")["weight"] == [1.0, 3.0, 2.0]
    assert "no 'weight' for c" in fail(LINEAR + "base_model: c")


def test_a_listed_base_is_not_an_input():
    recipe = one("merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.3}")
    assert [i.model.path for i in recipe.slices[0].inputs] == ["b"]
    assert recipe.slices[0].base.model.path == "a"


def test_slices_keep_their_layers():
    recipe = one(
        """
        slices:
          - sources:
              - {model: a, layer_range: [0, 24]}
          - sources:
              - {model: b, layer_range: [20, 40], parameters: {scale: 0.5}}
            parameters: {scale: 2}
        merge_method: passthrough
        """
    )
    first, second = recipe.slices
    assert (first.depth, second.depth) == (24, 20) and second.inputs[0].layers == (20, 40)
    assert resolve(recipe, params(recipe), first, "x") == {}
    assert resolve(recipe, params(recipe), second, "x") == {"scale": [0.5]}


def test_modules():
    recipe = one(
        """
        merge_method: linear
        parameters: {weight: 1}
        modules:
          text_decoder:
            parameters: {weight: 2}
            models: [{model: a}, {model: b, parameters: {weight: 3}}]
          vision_tower:
            slices: [{sources: [{model: a, layer_range: [0, 2]}]}]
        """
    )
    text, vision = recipe.modules["text_decoder"].slices[0], recipe.modules["vision_tower"].slices[0]
    assert resolve(recipe, params(recipe), text, "x")["weight"] == [2.0, 3.0]
    assert resolve(recipe, params(recipe), vision, "x")["weight"] == [1.0]


def test_parameters_without_effect_are_noted_not_lost():
    recipe = one(LINEAR + "parameters: {density: 0.3, normalize: false}")
    assert any("density has no effect" in n for n in recipe.notes)
    inside = one(TIES.replace("weight: 1.0", "weight: 1.0\n      lambda: 3"))
    assert any("models[0].parameters.lambda has no effect" in n for n in inside.notes)
    assert resolve(inside, params(inside), inside.slices[0], "x")["scale"] == 0.5


def test_numbers_that_yaml_reads_as_words():
    recipe = one("merge_method: ram\nbase_model: b\nmodels: [{model: a}]\nparameters: {epsilon: 1e-4}")
    assert recipe.parameters["epsilon"].at("x") == 1e-4


def test_tokenizer():
    recipe = one(
        LINEAR
        + """
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    <|a|>: {source: b, force: true}
    <|b|>: {source: {kind: zero}}
    <|c|>: {source: {kind: model_token, model: a, token: x}}
    <|d|>:
"""
    )
    rule = recipe.tokenizer
    assert recipe.vocab == "union" and rule.pad_to_multiple_of == 64
    assert rule.tokens == {
        "<|a|>": TokenRule("model", ModelRef("b"), force=True),
        "<|b|>": TokenRule("zero"),
        "<|c|>": TokenRule("token", ModelRef("a"), token="x"),
        "<|d|>": TokenRule(),
    }
    assert one(LINEAR + "tokenizer_source: base").vocab == "base"
    path = one(LINEAR + "tokenizer_source: ./tok")
    assert path.vocab == "model" and path.tokenizer.model == ModelRef("./tok") and ModelRef("./tok") in path.models
    assert one(LINEAR).vocab == "error"


@pytest.mark.skipif("MERGEKIT_EXAMPLES" not in os.environ, reason="MERGEKIT_EXAMPLES names no folder")
def test_mergekits_own_examples_parse():
    files = sorted(Path(os.environ["MERGEKIT_EXAMPLES"]).glob("*.y*ml"))
    assert files
    for file in files:
        for recipe in load_recipes(file):
            assert recipe.slices and recipe.dialect == "mergekit"


# --- our dialect --------------------------------------------------------------------------------------------------


def test_our_dialect_with_our_defaults():
    recipe = one(
        """
        method: breadcrumbs
        base: ./base
        models: [./math, {model: ./code, parameters: {weight: 0.4}}]
        parameters: {density: 0.2, scope: row}
        out_dtype: bfloat16
        seed: 7
        missing: skip
        nonfinite: base
        vocab: union
        shard_size: 500MB
        exclude: [lm_head, norm]
        """
    )
    default = signature_of("breadcrumbs").parameters["weight"].default
    got = resolve(recipe, params(recipe), recipe.slices[0], "x")
    assert got == {"weight": [default, 0.4], "density": [0.2, 0.2], "scope": "row"}
    assert (recipe.seed, recipe.missing, recipe.nonfinite, recipe.vocab) == (7, "skip", "base", "union")
    assert recipe.defaults == {} and recipe.shard_size == "500MB"
    assert recipe.merges("layers.0.mlp.weight") and not recipe.merges("lm_head.weight")


def test_command_and_document_say_the_same():
    command = recipe_from_command(
        "ties", ["a", "b"], base="c", parameters={"density": "[0.1, 0.3]", "scale": 0.5}, weights=[1, 2], seed=3
    )
    document = one(
        """
        method: ties
        base: c
        models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 2}}]
        parameters: {density: [0.1, 0.3], scale: 0.5}
        seed: 3
        """
    )
    assert command == document
    assert recipe_from_source(document.source) == document


def test_slices_in_our_words():
    recipe = one(
        """
        method: task_arithmetic
        base: b
        slices:
          - inputs: [{model: a, layers: [0, 4]}, {model: b, layers: [0, 4]}]
            parameters: {weight: [0, 1]}
        """
    )
    piece = recipe.slices[0]
    assert piece.base.layers == (0, 4) and [i.model.path for i in piece.inputs] == ["a"]
    assert resolve(recipe, params(recipe), piece, "x", relative_depth(1, 4))["weight"] == [pytest.approx(1 / 3)]


def test_filters_see_the_name_in_each_input():
    recipe = one(
        """
        method: linear
        slices:
          - inputs:
              - {model: a, layers: [0, 1]}
              - {model: b, layers: [5, 6], parameters: {weight: [{filter: layers.5., value: 9}]}}
        """
    )
    names = ["layers.0.w", "layers.5.w"]
    assert resolve(recipe, params(recipe), recipe.slices[0], names[0], 1.0, names)["weight"] == [1.0, 9.0]


def test_values():
    recipe = one("method: linear\nmodels: [a]\nparameters: {weight: [1, 11, 1], normalize: [true, false]}")
    weight, normalize = recipe.parameters["weight"], recipe.parameters["normalize"]
    assert [weight.at("x", t) for t in (0, 0.25, 0.5, 0.75, 1)] == [1, 6, 11, 6, 1]
    assert [normalize.at("x", t) for t in (0, 0.99, 1)] == [True, True, False]
    assert relative_depth(0, 1) == 1 and relative_depth(0, 5) == 0 and relative_depth(4, 5) == 1
    assert Value(()).at("x") is None


# --- stages -------------------------------------------------------------------------------------------------------


def test_stages_come_in_an_order_that_can_be_run():
    recipes = load_recipes(
        """
merge_method: linear
models: [{model: second}, {model: d}]
parameters: {weight: 1}
---
name: second
merge_method: linear
models: [{model: first}, {model: c}]
parameters: {weight: 1}
---
name: first
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
"""
    )
    assert [r.name for r in recipes] == ["first", "second", None]
    assert [r.needs for r in recipes] == [(), ("first",), ("second",)]
    ready = recipes[1].with_stages({"first": "/out/first"})
    assert [m.path for m in ready.models] == ["/out/first", "c"] and recipes[1].models[0].path == "first"


def test_stages_that_can_not_be_run():
    stage = "name: {}\nmethod: linear\nmodels: [{}]\n---\n"
    assert "circle" in fail(stage.format("a", "b") + stage.format("b", "a"))
    assert "circle" in fail(stage.format("a", "a"))
    assert "repeats 'a'" in fail(stage.format("a", "x") + stage.format("a", "y"))
    assert "no 'name'" in fail("method: linear\nmodels: [x]\n---\nmethod: linear\nmodels: [y]")
    assert "document 2" in fail(stage.format("a", "x") + "method: linear\nmodels: [y]\nbsae: z")
    assert "can't hold" in fail(stage.format("../a", "x"))


# --- what is wrong is said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TIES.replace("density: 0.5", "densty: 0.5"), ["models[1].parameters.densty", "line 9", "'density'"]),
        (TIES.replace("normalize", "normalise"), ["parameters.normalise", "'normalize'"]),
        (TIES.replace("lambda", "lamda"), ["parameters.lamda", "'lambda'"]),
        (TIES.replace("merge_method", "merge_metod"), ["merge_metod", "'merge_method'"]),
        (TIES.replace("merge_method: ties", "merge_method: tise"), ["merge_method is 'tise'", "'ties'"]),
        (TIES.replace("base_model", "base_modle"), ["base_modle", "'base_model'"]),
        (TIES.replace("filter: mlp", "fliter: mlp"), ["weight[0].fliter", "'filter'"]),
        (TIES.replace("density: 0.5", "density: 1.5"), ["models[1].parameters.density is 1.5", "between 0 and 1"]),
        (TIES.replace("0.7, 0.1", "0.7, -0.1"), ["density[2] is -0.1"]),
        (TIES.replace("density: 0.5", "density: yes"), ["must be a finite number, not True"]),
        (TIES.replace("density: 0.5", "density: .nan"), ["must be a finite number"]),
        (TIES.replace("density: 0.5", "density: []"), ["empty list"]),
        (TIES.replace("density: 0.5", "density: {value: {value: 1}}"), ["nest"]),
        (TIES.replace("      weight: 1.0\n", ""), ["no 'weight' for ./math"]),
        (TIES.replace("base_model: ./base", ""), ["no 'base_model'"]),
        (TIES.replace("./code@v2", "./math/"), ["models[1] is the same model as models[0]"]),
        (TIES.replace("./code@v2", "a+b+c"), ["one '+'"]),
        (TIES.replace("./code@v2", "a@b@c"), ["which is not 'path'"]),
        (TIES.replace("  - model: ./math", "  - weight: 1\n  - model: ./math"), ["models[0].weight is not known"]),
        (TIES.replace("dtype: bfloat16", "dtype: float8"), ["dtype is 'float8'"]),
        (TIES + "normalize: true", ["'normalize' belongs under 'parameters'"]),
        (TIES + "slices: [1]", ["exactly one of", "models and slices"]),
        (TIES + "method: ties", ["both 'method' and 'merge_method'"]),
        (TIES + "tokenizer: union\ntokenizer_source: base", ["says again"]),
        (TIES + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}", ["'token' or 'token_id'"]),
        (TIES + "chat_template: chatlm", ["'chatml'"]),
        (LINEAR.replace("weight: 3", "weight: -1"), ["sum to 0"]),
        ("merge_method: linear\nmodels: [{model: a}]", ["no 'weight' for a"]),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: c}]\nparameters: {t: 0}", ["2 models", "1"]),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]", ["has no 't'"]),
        ("merge_method: model_stock\nbase_model: a\nmodels: [{model: b}]", ["1 model", "at least 2"]),
        ("method: linear\nmodels: [a]\nparameters: {lambda: 1}", ["parameters.lambda"]),
        ("method: task_arithmetic\nbase: b\nmodels: [a]\nparameters: {lambda: 1}", ["Here it is called 'scale'"]),
        ("method: linear\nmodels: [{model: a, parameters: {normalize: true}}]", ["one value for the whole merge"]),
        ("method: linear\nmodels: [a]\ndtype: bfloat16", ["out_dtype: bfloat16"]),
        ("method: linear\nmodels: [a]\nmissing: skp", ["'skip'"]),
        ("method: linear\nmodels: [a]\nshard_size: five", ["5GB"]),
        ("method: linear\nmodels: [a, b]\nparameters: {weight: 0}", ["sum to 0"]),
        ("method: linear\nmodels: []", ["models is an empty list"]),
        ("method: linear\nslices: [{inputs: [{model: a, layers: [4, 2]}]}]", ["slices[0].inputs[0].layers", "forward"]),
        ("method: linear\nslices: [{inputs: [{model: a, layers: [0, 2, 3]}]}]", ["two numbers"]),
        ("method: linear\nslices: [{inputs: [{model: a, layers: [0, 1.5]}]}]", ["whole number"]),
        ("method: linear\nslices: [{inputs: [{model: a}]}]", ["no 'layers'"]),
        (
            "method: linear\nslices: [{inputs: [{model: a, layers: [0, 2]}, {model: b, layers: [0, 3]}]}]",
            ["different numbers of layers", "a [0, 2], b [0, 3]"],
        ),
        ("method: ties\nbase: b\nslices: [{inputs: [{model: a, layers: [0, 2]}]}]", ["doesn't list the base b"]),
        (
            "merge_method: della\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1, density: 0.9}}]",
            ["density 0.9", "epsilon 0.15"],
        ),
        ("models: [a]", ["names no merge method"]),
        ("- method: linear", ["must be a mapping, not a list"]),
        ("just: text: here", ["not YAML"]),
        ("method: linear\nmethod: ties\nmodels: [a]", ["'method' is written twice"]),
        ("method: linear\nmodels: [2001-01-01]", ["date", "quotes"]),
        ("method: linear\nmodels: [3]", ["must be"]),
        ("? [a]\n: b", ["key must be a word"]),
        ("method: linear\nmodels: [a]\ntrue: 1", ["the key True"]),
        ("x: !!python/object/apply:os.system ['ls']", ["tag", "not allowed"]),
        ("x: !!binary aGk=", ["tag", "not allowed"]),
        ("a: &a [1]\nb: *c", ["alias"]),
        ("a: &a [*a]", ["alias"]),
        ("a: " + "[" * 60, ["deeper"]),
        ("", ["empty"]),
        ("# nothing\n---\n---\n", ["empty"]),
        ("no-such-recipe.yml", ["can't be read"]),
    ],
)
def test_a_wrong_recipe_gets_a_sentence(text, said):
    message = fail(text)
    for part in said:
        assert part in message, message


def test_bombs_are_refused_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "more than" in fail("\n".join(lines))
    assert "at most" in fail("#" + "x" * 2_000_000 + "\n")


def test_files(tmp_path):
    file = tmp_path / "recipe.yml"
    file.write_text(TIES.replace("density: 0.5", "densty: 0.5"))
    assert "recipe.yml, line 9" in fail(str(file))
    file.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in fail(str(file))
    with pytest.raises(SurgeryError, match="can't be read"):
        load_recipes(tmp_path)
    big = tmp_path / "big.yml"
    big.write_bytes(b"#" * 1_000_001)
    with pytest.raises(SurgeryError, match="larger"):
        load_recipes(big)


def test_an_existing_folder_may_hold_signs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b@c").mkdir()
    recipe = one("method: linear\nmodels: ['a+b@c', 'd+e@f']")
    assert [i.model for i in recipe.slices[0].inputs] == [ModelRef("a+b@c"), ModelRef("d", "e", None, "f")]
    assert str(recipe.slices[0].inputs[1].model) == "d+e@f"


def test_reading_a_recipe_imports_no_torch():
    code = (
        "import sys; from surgery.weights.recipe import load_recipes;"
        "load_recipes('method: ties\\nbase: b\\nmodels: [a]');"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
