"""Whatever the text, the recipe parser gives recipes or a SurgeryError, and nothing else."""

from __future__ import annotations

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import SurgeryError
from surgery.weights.recipe import Recipe, load_recipes, recipe_from_source, resolve, signature_of

VOCABULARY = """
method merge_method base base_model models slices modules parameters model lora path revision sources inputs layers
layer_range weight density t scale lambda normalize filter value tokenizer tokens source kind zero model_token force
dtype out_dtype float32 ties linear slerp breadcrumbs della passthrough name seed include vocab union chat_template
shard_size residual_weight tokenizer_source pad_to_multiple_of a b *
"""
WORDS = VOCABULARY.split()
SIGNS = [*"{}[]:-,&*!|>'\"#%@?\n\t \x00", "---", "\n- ", ": ", "&a", "*a", "<<: ", "1e5"]
scalars = st.one_of(
    st.sampled_from(WORDS), st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400)
)
data = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(WORDS), scalars), inner, max_size=5)
    ),
    max_leaves=25,
)


def parses_or_says(text: str) -> None:
    try:
        recipes = load_recipes(text)
    except SurgeryError as error:
        assert error.problem.strip()
        return
    assert recipes and all(isinstance(r, Recipe) for r in recipes)


@settings(max_examples=400, deadline=None)
@given(st.text(max_size=200))
def test_any_text(text):
    parses_or_says(text)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from([*"{}[]:-,&*!|>'\"#%@?\n\t \x00", "---", "\n- ", ": ", "&a", "*a", "<<: ", "1e5", *WORDS]))
)
def test_yaml_like_text(parts):
    parses_or_says("".join(parts))


@settings(max_examples=400, deadline=None)
@given(data)
def test_any_plain_data(value):
    try:
        text = yaml.safe_dump(value)
    except (yaml.YAMLError, ValueError):
        return
    parses_or_says(text)


def _recipes(value):
    """Documents that are nearly right, so that the fuzz reaches past the first check."""
    words = st.sampled_from(["weight", "density", "t", "scale", "normalize", "epsilon"])
    params = st.dictionaries(words, value, max_size=3)
    ref = st.sampled_from(["a", "b", "c", "d+e", "f@g"])
    source = st.fixed_dictionaries(
        {"model": ref},
        optional={"parameters": params, "layers": value, "layer_range": st.lists(st.integers(-1, 4), max_size=3)},
    )
    sources = st.lists(source, max_size=3)
    piece = st.fixed_dictionaries({}, optional={"sources": sources, "inputs": sources, "parameters": params})
    parts = {
        "base": ref,
        "base_model": ref,
        "models": sources,
        "slices": st.lists(piece, max_size=2),
        "parameters": params,
    }
    parts |= dict.fromkeys(("dtype", "tokenizer", "chat_template", "seed", "name", "modules", "include"), value)
    methods = st.sampled_from(["ties", "linear", "slerp", "della", "passthrough", "breadcrumbs", "nuslerp"])
    return st.one_of(st.fixed_dictionaries({w: methods}, optional=parts) for w in ("method", "merge_method"))


@settings(max_examples=600, deadline=None)
@given(_recipes(data | st.floats(0, 1)))
def test_nearly_right_documents(source):
    try:
        recipe = recipe_from_source(source)
    except SurgeryError:
        return
    schema = signature_of(recipe.method).parameters
    for piece in recipe.slices:
        for word, value in resolve(recipe, schema, piece, "model.layers.0.mlp.weight", 0.5).items():
            if schema[word].per_input:
                assert len(value) == len(piece.inputs)
