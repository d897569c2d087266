"""The words of the two dialects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.errors import SurgeryError
from surgery.weights.recipe.contract import Contract
from surgery.weights.recipe.field import Field, nearest_of
from surgery.weights.recipe.mergekit import METHODS
from surgery.weights.recipe.signatures import signature_of


@dataclass(frozen=True)
class Dialect:
    """The words of a dialect."""

    name: Literal["surgery", "mergekit"]
    method: str
    base: str
    inputs: str  # of a slice
    layers: str
    document: tuple[str, ...]
    slice: tuple[str, ...]

    def contract(self, method: Field) -> Contract:
        """The contract of the method named at this place. Raises `SurgeryError` with the nearest names."""
        word = method.text()
        if self.name == "mergekit":
            if word not in METHODS:
                raise method.error(
                    f"is '{word}', which is no merge method of mergekit", nearest_of(word, tuple(METHODS))
                )
            return METHODS[word]
        try:
            return signature_of(word)
        except SurgeryError as unknown:
            raise method.error(f"is '{word}', no merge method", unknown.hint) from None


_COMMON = ("name", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer", "chat_template")

MERGEKIT = Dialect(
    "mergekit", "merge_method", "base_model", "sources", "layer_range",
    document=(*_COMMON, "merge_method", "base_model", "tokenizer_source"),
    slice=("sources", "parameters", "base_model", "residual_weight"),
)  # fmt: skip

OURS = Dialect(
    "surgery", "method", "base", "inputs", "layers",
    document=(
        *_COMMON, "method", "base", "vocab", "seed", "missing", "nonfinite", "shard_size", "include", "exclude",
    ),
    slice=("inputs", "parameters", "base"),
)  # fmt: skip
