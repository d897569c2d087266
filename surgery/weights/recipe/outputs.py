"""What a recipe says about the output: number types, tokenizer, shard size."""

from __future__ import annotations

import re
from typing import Any, Literal, cast

from surgery.weights.recipe.dialects import MERGEKIT, Dialect
from surgery.weights.recipe.field import Field
from surgery.weights.recipe.references import model_ref
from surgery.weights.recipe.schema import TokenizerRule, TokenRule

_STORED = ("float16", "bfloat16", "float32", "float64")
_SOURCES = ("base", "union", "intersection")


def dtypes(root: Field, dialect: Dialect) -> tuple[Literal["float32", "float64"], str, list[str]]:
    """(arithmetic, storage, notes). In mergekit's dialect `dtype` without `out_dtype` decides the storage too."""
    said = _dtype(root.get("dtype"), _STORED)
    stored = _dtype(root.get("out_dtype"), (*_STORED, "base"))
    notes = []
    if dialect is MERGEKIT:
        stored = stored or said
        if said in ("float16", "bfloat16"):
            notes.append(f"dtype {said}: arithmetic is in float32 here; the result is rounded once, to {stored}.")
            said = "float32"
    elif said in ("float16", "bfloat16"):
        raise root["dtype"].error(f"is {said}, but arithmetic is in float32 or float64",
                                  f"For the stored type say 'out_dtype: {said}'.")  # fmt: skip
    return cast(Any, said or "float32"), stored or "base", notes


def tokenizer_rule(root: Field, dialect: Dialect) -> TokenizerRule | None:
    """The rule of `tokenizer`, mergekit's `tokenizer_source` or our `vocab`; None when vocabularies must be equal."""
    named = [word for word in ("tokenizer", "tokenizer_source", "vocab") if root.get(word)]
    if len(named) > 1:
        raise root[named[1]].error(f"says again what '{named[0]}' says", "Keep one of them.")
    if not named:
        return None
    field = root[named[0]]
    if named[0] == "vocab":
        word = field.text(("error", *_SOURCES))
        return None if word == "error" else TokenizerRule(cast(Any, word))
    if not (isinstance(field.value, dict) and named[0] == "tokenizer"):
        return _source(field, dialect, {}, None)
    field.mapping(("source", "tokens", "pad_to_multiple_of"))
    tokens = field.get("tokens")
    rules = {} if tokens is None else {t: _token_rule(tokens[t]) for t in tokens.mapping().value}
    multiple = field.get("pad_to_multiple_of")
    if multiple is not None and not 1 <= multiple.integer() <= 65536:
        raise multiple.error(f"is {multiple.value}; it must be between 1 and 65536")
    pad = multiple.integer() if multiple else None
    source = field.get("source")
    return TokenizerRule("union", None, rules, pad) if source is None else _source(source, dialect, rules, pad)


def shard_size(field: Field) -> str:
    """A size such as "5GB" or a number of bytes."""
    text = str(field.value)
    if isinstance(field.value, bool) or not re.fullmatch(r"[1-9]\d{0,15} ?([KMGT]i?B|B)?", text, re.IGNORECASE):
        raise field.error(f"is {text!r}; a size is written like '5GB' or '500MB'")
    return text


def _source(field: Field, dialect: Dialect, tokens: dict[str, TokenRule], pad: int | None) -> TokenizerRule:
    words = _SOURCES[:2] if dialect is MERGEKIT else _SOURCES
    if field.value in words:
        return TokenizerRule(cast(Any, field.value), None, tokens, pad)
    return TokenizerRule("model", model_ref(field), tokens, pad)


def _token_rule(field: Field) -> TokenRule:
    """One entry of `tokens`: {source: model | {kind: zero} | {kind: model_token, model, token | token_id}, force}."""
    if field.value is None:
        return TokenRule()
    field.mapping(("source", "force"))
    force_field, source = field.get("force"), field.get("source")
    force = force_field.truth() if force_field else False
    if source is None:
        if force:
            raise field.error("is forced, but has no 'source'")
        return TokenRule()
    if not (isinstance(source.value, dict) and "kind" in source.value):
        return TokenRule("model", model_ref(source), force=force)
    source.mapping(("kind", "model", "token", "token_id"))
    if source["kind"].text(("zero", "model_token")) == "zero":
        return TokenRule("zero", force=force)
    model, token, token_id = (source.get(word) for word in ("model", "token", "token_id"))
    if model is None:
        raise source.error("has no 'model'")
    if (token is None) == (token_id is None):
        raise source.error("must have either 'token' or 'token_id'")
    if token_id is not None and token_id.integer() < 0:
        raise token_id.error("is negative")
    return TokenRule(
        "token", model_ref(model), token.text() if token else None, token_id.integer() if token_id else None, force
    )


def _dtype(field: Field | None, known: tuple[str, ...]) -> str | None:
    if field is None:
        return None
    text = field.text().removeprefix("torch.")
    return Field(text, field.document, field.path).text(known)
