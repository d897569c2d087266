"""References to models: `path@revision+lora@revision`, or the same spelled out as a mapping."""

from __future__ import annotations

import os

from surgery.weights.recipe.field import Field
from surgery.weights.recipe.schema import ModelRef


def model_ref(field: Field) -> ModelRef:
    """The model named at `field`. A text that is an existing path is taken whole, whatever signs are in it."""
    if isinstance(field.value, dict):
        field.mapping(("model", "lora", "override_architecture"))
        if field.get("model") is None:
            raise field.error("has no 'model'")
        path, revision = _path(field["model"])
        lora, lora_revision = _path(field["lora"]) if field.get("lora") else (None, None)
        return ModelRef(path, lora, revision, lora_revision)
    text = field.text()
    if os.path.exists(text):
        return ModelRef(text)
    parts = text.split("+")
    if len(parts) > 2:
        raise field.error(f"is {text!r}: one '+' joins a model and a LoRA, and no more")
    path, revision = _split(field, parts[0])
    lora, lora_revision = _split(field, parts[1]) if len(parts) == 2 else (None, None)
    return ModelRef(path, lora, revision, lora_revision)


def _path(field: Field) -> tuple[str, str | None]:
    """A {path, revision} mapping or a text."""
    if not isinstance(field.value, dict):
        text = field.text()
        return (text, None) if os.path.exists(text) else _split(field, text)
    field.mapping(("path", "revision"))
    if field.get("path") is None:
        raise field.error("has no 'path'")
    revision = field.get("revision")
    return field["path"].text(), revision.text() if revision else None


def _split(field: Field, text: str) -> tuple[str, str | None]:
    path, *revision = text.split("@")
    if not path.strip() or len(revision) > 1 or revision == [""]:
        raise field.error(f"is {field.value!r}, which is not 'path', 'path@revision' or 'path+lora'")
    return path, revision[0] if revision else None
