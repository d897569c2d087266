"""Names of models on the command line: a folder, a hub name, `base+adapter`, or a model of the zoo."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.weights.recipe import ModelRef, Recipe


def model(spec: str) -> str:
    """`spec` with names of the zoo replaced by folders, where no such path exists."""
    if os.path.exists(spec):
        return spec
    base, plus, adapter = spec.partition("+")
    return _zoo(base) + plus + adapter


def in_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the same done to all its models, but for those that are stages of its file."""

    def change(ref: ModelRef) -> ModelRef:
        return ref if ref.path in recipe.needs or ref.revision else replace(ref, path=_zoo(ref.path))

    return recipe.with_models(change)


def _zoo(name: str) -> str:
    if os.path.exists(os.path.expanduser(name)) or os.sep in name or "/" in name:
        return name
    from surgery import zoo

    return str(zoo.get(name)) if any(known.name == name for known in zoo.list_models()) else name
