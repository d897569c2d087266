"""Every parameter of every tensor as mergekit 0.1.5 resolves it: stored answers, and live where mergekit is installed.

`python tests/weights/test_recipe_parity.py` (with mergekit) writes the stored answers anew.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from surgery.errors import SurgeryError
from surgery.weights.recipe import recipe_from_source, resolve
from surgery.weights.recipe.mergekit import METHODS

GOLDEN = Path(__file__).parent / "golden" / "recipes.json"
LAYERS = 4
NAMES = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.{}.mlp.up_proj.weight", "layers.{}.q_proj.weight"]


def random_recipe(seed: int) -> dict[str, Any]:
    """A recipe of mergekit's dialect with filters and gradients on every level."""
    rng = random.Random(seed)

    def number() -> float:
        return round(rng.uniform(0.1, 0.9), 3)

    def value() -> Any:
        kind = rng.random()
        if kind < 0.4:
            return number()
        if kind < 0.7:
            return [number() for _ in range(rng.randint(1, 4))]
        cases: list[dict[str, Any]] = [
            {"filter": f, "value": rng.choice([number(), [number(), number(), number()]])}
            for f in rng.sample(["mlp", "layers.1.", "q_proj"], rng.randint(1, 2))
        ]
        return cases + ([rng.choice([{"value": number()}, {"filter": "*", "value": number()}])] * (rng.random() < 0.8))

    def parameters(words: list[str]) -> dict[str, Any]:
        return {word: value() for word in words if rng.random() < 0.6}

    known = ["ties", "dare_ties", "breadcrumbs", "linear", "task_arithmetic", "slerp", "multislerp", "nuslerp"]
    method = rng.choice(known)
    models = ["a"] if method == "slerp" else ["a", "b"]
    words = {"linear": ["weight"], "multislerp": ["weight"], "nuslerp": ["weight"], "slerp": []}.get(
        method, ["weight", "density"] + ["gamma"] * (method == "breadcrumbs")
    )
    shared = ["t"] if method == "slerp" else []
    top = {**({"t": value()} if shared else {"weight": value()}), **parameters(words[1:])}
    if method in ("ties", "dare_ties"):
        top |= {"lambda": value(), "rescale": rng.random() < 0.5, "normalize": rng.random() < 0.5}
    recipe: dict[str, Any] = {"merge_method": method, "base_model": "base", "parameters": top}
    if rng.random() < 0.5:
        recipe["models"] = [{"model": m, "parameters": parameters(words)} for m in models]
        return recipe
    recipe["slices"] = [
        {
            "sources": [
                *({"model": m, "layer_range": ends, "parameters": parameters(words)} for m in models),
                {"model": "base", "layer_range": ends},
            ],
            "parameters": parameters(words + shared),
        }
        for ends in ([0, 3], [3, 4])
    ]
    return recipe


def points(recipe: dict[str, Any]) -> list[tuple[int, str, float]]:
    """(slice, tensor, t) to ask for."""
    ends = [s["sources"][0]["layer_range"] for s in recipe["slices"]] if "slices" in recipe else [[0, LAYERS]]
    asked = []
    for k, (first, end) in enumerate(ends):
        for layer in range(first, end):
            depth = (layer - first) / (end - first - 1) if end - first > 1 else 1.0
            asked += [(k, name.format(layer), depth if "{" in name else 0.0) for name in NAMES]
    return list(dict.fromkeys(asked))


def ours(source: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Our values at all points in mergekit's words; None when the recipe is refused for a missing value."""
    contract = METHODS[source["merge_method"]]
    try:
        recipe = recipe_from_source(source)
    except SurgeryError as error:
        assert "has no" in error.problem, error
        return None
    schema = {p.name: p for p in contract.parameters.values() if p.name}
    words = {p.name: word for word, p in contract.parameters.items() if p.name}
    return [
        {words[n]: v for n, v in resolve(recipe, schema, recipe.slices[k], tensor, t).items()}
        for k, tensor, t in points(source)
    ]


def theirs(source: dict[str, Any]) -> list[dict[str, Any]] | None:
    """mergekit's values at all points, in our values (`normalize: weights` for true); None when one is missing."""
    from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration, OutputSliceDefinition
    from mergekit.merge_methods import get
    from mergekit.parameter_resolver import resolve_parameters

    config = MergeConfiguration.model_validate(source)
    slices = config.slices
    if config.models:
        listed = [(m.model, m.parameters) for m in config.models] + [(config.base_model, None)]
        sources = [InputSliceDefinition(model=m, layer_range=(0, LAYERS), parameters=p) for m, p in listed]
        slices = [OutputSliceDefinition(sources=sources)]
    contract, out = METHODS[source["merge_method"]], []
    for k, tensor, t in points(source):
        reader = ConfigReader(config=config, t=t).for_out_slice(slices[k])
        models = [s.model for s in slices[k].sources]
        try:
            shared, per_input = resolve_parameters(
                get(config.merge_method).spec,
                tensor_name=tensor,
                inputs=dict.fromkeys(models, tensor),
                sources=reader.parameter_sources,
                base_model=config.base_model,
                t=t,
            )
        except RuntimeError as error:
            assert "Missing required parameter" in str(error)
            return None
        values = {}
        for word, parameter in contract.parameters.items():
            convert = parameter.convert or (lambda v: v)
            if parameter.name is not None and parameter.per_input:
                values[word] = [convert(per_input[m][word]) for m in models if word in per_input[m]]
            elif parameter.name is not None:
                values[word] = convert(shared[word])
        out.append(values)
    return out


@pytest.mark.parametrize("seed", range(12))
def test_stored_answers_of_mergekit(seed):
    assert ours(random_recipe(seed)) == json.loads(GOLDEN.read_text())[seed]


@pytest.mark.peers
def test_live_answers_of_mergekit():
    pytest.importorskip("mergekit")
    for seed in range(300):
        source = random_recipe(seed)
        assert ours(source) == theirs(source), source


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(theirs(random_recipe(seed))) for seed in range(12))
    GOLDEN.write_text(f"[\n{lines}\n]\n")
