"""Names on the command line: models (a folder, a hub name, `base+adapter`, a model of the zoo) and vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.weights.recipe import ModelRef, Recipe
    from surgery.weights.vector import TaskVector

VECTORS = ("task vector", "sparse delta")
"""The kinds of files that hold a vector, as their metadata say it."""


def model(spec: str) -> str:
    """`spec` with names of the zoo replaced by folders, where no such path exists."""
    from surgery import zoo

    return zoo.resolved(spec)


def in_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the same done to all its models, but for those that are stages of its file."""

    def change(ref: ModelRef) -> ModelRef:
        return ref if ref.path in recipe.needs or ref.revision else replace(ref, path=model(ref.path))

    return recipe.with_models(change)


def is_vector(spec: str) -> bool:
    """Whether `spec` was written by `surgery vector extract` or `combine`, or is a sparse delta."""
    from surgery.checkpoint import Checkpoint, open_checkpoint, read_header

    path = Path(spec).expanduser()
    if not path.exists() or (path / "adapter_config.json").is_file():
        return False
    source = open_checkpoint(path)
    file = next((info.file for info in source.tensors.values()), None) if isinstance(source, Checkpoint) else None
    return file is not None and read_header(file).metadata.get("kind") in VECTORS


def vector(spec: str, base: str | None = None, *, numbers: bool = True) -> TaskVector:
    """A stored vector; or, with `base`, what a fine-tuned model or a LoRA adapter changes in it.

    `numbers`: the vector will be read as numbers, for which the lossless form needs its base.
    """
    from surgery.weights.vector import TaskVector

    if is_vector(spec):
        stored = TaskVector.load(spec, None if base is None else model(base))
        if numbers and base is None and any(stored.expression.exact(name) for name in stored.names):
            raise SurgeryError(f"{spec} is lossless: it can be read only beside its base.", hint="Add --base BASE.")
        return stored
    if base is None:
        raise SurgeryError(f"{spec} is a model, not a stored vector.",
                           hint="Name the model that it was fine-tuned from: --base BASE.")  # fmt: skip
    if (Path(spec).expanduser() / "adapter_config.json").is_file():
        return TaskVector.from_adapter(model(base), Path(spec).expanduser())
    return TaskVector.between(model(base), model(spec))


def named(texts: Sequence[str], hint: str) -> dict[str, str]:
    """`NAME=PATH` texts as a dictionary. Raises `SurgeryError` for another form, with `hint`, and for a name twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not name.strip() or not path or set(name) & set("'\""):
            raise SurgeryError(f"'{text}' is not NAME=PATH.", hint=hint)
        if name in found:
            raise SurgeryError(f"'{name}' is given twice.")
        found[name] = path
    return found


def labels(specs: Sequence[str]) -> list[str]:
    """A short name for each: the last part of its path, with a number where two are the same."""
    short = [Path(spec).name.removesuffix(".safetensors") or spec for spec in specs]
    return [name if short.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(short)]
