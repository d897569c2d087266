"""Every packaged recipe: complete, true to what is registered, and ten steps on the tiny model."""

import copy
import math

import pytest

from surgery.errors import SurgeryError
from surgery.training import train
from surgery.training.curriculum import CURRICULA
from surgery.training.objectives import OBJECTIVES, name_of, parse
from surgery.training.plan import plan
from surgery.training.recipe import PACKAGED, load
from surgery.training.run import open_model
from surgery.training.sources import SOURCES

NAMES = sorted(file.stem for file in PACKAGED.glob("*.yaml"))
SMALL = ["steps=10", "evaluate.every=0", "batch.rows=8", "rollouts.prompts=4", "rollouts.batch_size=64"]
SMALLER = {
    "dapo": ["source.dynamic.max_draws=2"],
    "expert_iteration": ["source.expert_iteration.prompts=8", "rollouts.group=4"],
    "prefix_rft": ["rollouts.group=4"],
    "relift": ["source.relift.size=4", "rollouts.group=4"],
    "rft": ["source.rft.prompts=8", "rollouts.group=4"],
    "rif": ["source.pass_rate_band.pool=8"],
    "star": ["source.star.prompts=16", "source.star.first=4"],
}


@pytest.fixture(scope="module")
def tiny():
    return open_model("tiny-base")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is_and_plans(name):
    recipe = load(name)
    assert recipe.name == name and recipe.about and recipe.model
    assert recipe.paper or name == "mixture"
    plan(recipe)


def test_every_objective_source_and_learning_curriculum_has_a_recipe():
    recipes = [load(name) for name in NAMES]
    objectives = {name_of(term) for recipe in recipes for _, term in parse(recipe.objective).terms()}
    sources = {next(iter(r.source)) if isinstance(r.source, dict) else r.source for r in recipes}
    curricula = {next(iter(r.curriculum)) if isinstance(r.curriculum, dict) else r.curriculum for r in recipes}
    assert set(OBJECTIVES) <= objectives
    assert set(SOURCES) - {"dataset", "on_policy"} <= sources  # these two are what an objective gets by default
    assert set(CURRICULA) - {"in_order", "random"} <= curricula  # without anything to set


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_of_every_recipe(name, tiny):
    recipe = load(name, SMALL + SMALLER.get(name, []))
    model = copy.deepcopy(tiny[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run = train(model, tiny[1], recipe=recipe)
    assert len(run.metrics) == 10
    for line in run.metrics:
        assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
    assert any(line["grad_norm"] > 0 for line in run.metrics)
    assert any((before[key] != value).any() for key, value in model.state_dict().items())


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(SurgeryError, match="neither as a file nor by name") as error:
        load("gropo")
    assert "grpo" in str(error.value)
