"""Several recipes in one file: a later one may use an earlier one's name as a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from surgery.errors import SurgeryError
from surgery.weights.recipe.compile import compile_document
from surgery.weights.recipe.schema import Recipe
from surgery.weights.recipe.text import Document, read_documents, scalar


def load_recipes(text_or_path: str | os.PathLike[str]) -> list[Recipe]:
    """The recipes of a YAML text or file, in an order in which they can be run: the last is the result.

    Every document has `method:` (ours) or `merge_method:` (mergekit's dialect). Raises `SurgeryError` naming the
    document, line and path of whatever is wrong; no model is read.
    """
    documents = read_documents(text_or_path)
    recipes = [compile_document(d) for d in documents]
    by_name: dict[str | None, Recipe] = {}
    for document, recipe in zip(documents, recipes, strict=True):
        if recipe.name in by_name:
            what = "has no 'name', like an earlier one" if recipe.name is None else f"repeats '{recipe.name}'"
            raise SurgeryError(f"{document.label} {what}.", hint="Name the stages; only the final one may be unnamed.")
        by_name[recipe.name] = recipe
    for recipe in recipes:
        recipe.needs = tuple(dict.fromkeys(m.path for m in recipe.models if m.path in by_name))
    return _in_order(recipes)


def recipe_from_source(source: Mapping[str, Any], label: str = "The recipe") -> Recipe:
    """A recipe from data instead of YAML text, with the same checks."""
    return compile_document(Document(dict(source), label, {}))


def recipe_from_command(
    method: str,
    models: Sequence[str],
    base: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> Recipe:
    """The recipe of `surgery merge --method METHOD --base BASE MODEL... --set density=0.2`, in our dialect.

    Values of `parameters` may be texts, read as YAML (`[0, 0.5, 1]` is a gradient). `weights` gives one weight for each
    model. `options` are further keys of a recipe (out_dtype, seed, vocab, ...); None leaves one out.
    """
    entries: list[dict[str, Any]] = [{"model": str(m)} for m in models]
    if weights is not None:
        if len(weights) != len(models):
            raise SurgeryError(f"There are {len(weights)} weights for {len(models)} models.", hint="Give one for each.")
        for entry, weight in zip(entries, weights, strict=True):
            entry["parameters"] = {"weight": weight}
    read = {word: scalar(v) if isinstance(v, str) else v for word, v in (parameters or {}).items()}
    source = {"method": method, "base": base, "models": entries, "parameters": read, **options}
    return recipe_from_source({k: v for k, v in source.items() if v is not None and v != {}}, "The command")


def _in_order(recipes: list[Recipe]) -> list[Recipe]:
    """Stages before those that need them, otherwise as written; the unnamed one last."""
    waiting = sorted(recipes, key=lambda r: r.name is None)
    done: list[Recipe] = []
    while waiting:
        names = {r.name for r in done}
        ready = next((r for r in waiting if set(r.needs) <= names), None)
        if ready is None:
            circle = ", ".join(f"'{r.name}' needs {' and '.join(map(repr, r.needs))}" for r in waiting[:5])
            raise SurgeryError(f"The stages need each other in a circle: {circle}.")
        waiting.remove(ready)
        done.append(ready)
    return done
