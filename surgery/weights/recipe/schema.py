"""The normal form of a recipe, which both dialects compile to and which the engine reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from surgery.weights.recipe.contract import Leaf
from surgery.weights.recipe.values import Value

Parameters = dict[str, Value]
Resolved = Leaf | list[Leaf]


@dataclass(frozen=True)
class ModelRef:
    """A model as a recipe names it: a folder or hub name, perhaps at a revision, perhaps with a LoRA on top."""

    path: str
    lora: str | None = None
    revision: str | None = None
    lora_revision: str | None = None

    def __str__(self) -> str:
        """`path@revision+lora@revision`, as it is written in a recipe."""
        text = self.path + (f"@{self.revision}" if self.revision else "")
        if self.lora:
            text += f"+{self.lora}" + (f"@{self.lora_revision}" if self.lora_revision else "")
        return text

    @property
    def spec(self) -> str:
        """`path+lora` for `open_checkpoint`, which takes the revision apart from it."""
        return self.path if self.lora is None else f"{self.path}+{self.lora}"

    @property
    def identity(self) -> tuple[str, ...]:
        """Equal for two spellings of the same folder."""
        lora = os.path.realpath(self.lora) if self.lora else ""
        return os.path.realpath(self.path), self.revision or "", lora, self.lora_revision or ""


@dataclass
class Input:
    """One model of a slice; `layers` (a, b) takes its layers a .. b-1, None all of them."""

    model: ModelRef
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass
class Slice:
    """A stretch of output layers made from the same stretch of every input.

    `inputs` are what the method combines, in order; `base` is the model that differences are taken from, if any.
    """

    inputs: list[Input]
    base: Input | None = None
    parameters: Parameters = field(default_factory=dict)

    @property
    def depth(self) -> int | None:
        """How many layers it makes; None when it makes all layers of its models."""
        layers = self.inputs[0].layers
        return None if layers is None else layers[1] - layers[0]


@dataclass
class Module:
    """One part of a multi-modal model ("text_decoder", "vision_tower"); other models have a single one, "default"."""

    slices: list[Slice]
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class TokenRule:
    """Where the row of one token comes from: a model's row of that token, another token's row, or zeros.

    `kind` "model": the row of the same token in `model`; "token": that of `token` or `token_id` in `model`; "zero".
    With `force` the row replaces also those of the models that have the token.
    """

    kind: Literal["default", "model", "token", "zero"] = "default"
    model: ModelRef | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerRule:
    """The output's tokenizer: of the base, the union or intersection of all, or of `model`."""

    source: Literal["base", "union", "intersection", "model"]
    model: ModelRef | None = None
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass
class Recipe:
    """A merge, said completely: everything is checked, defaults of the dialect are filled in, names are ours.

    `dtype` is the arithmetic's, `out_dtype` the storage's ("base": as the base, or the first model, has it).
    `defaults` are the values a dialect gives where the recipe says nothing; the method's own come after them.
    `needs` names the stages of the same file whose results are used as models. `notes` tell the user what was read
    but has no effect, or is done differently. `source` is the recipe as written, for the provenance record.
    """

    method: str
    modules: dict[str, Module]
    base: ModelRef | None = None
    name: str | None = None
    parameters: Parameters = field(default_factory=dict)
    defaults: Parameters = field(default_factory=dict)
    dtype: Literal["float32", "float64"] = "float32"
    out_dtype: str = "base"
    tokenizer: TokenizerRule | None = None
    chat_template: str | None = None
    dialect: Literal["surgery", "mergekit"] = "surgery"
    seed: int = 0
    missing: Literal["error", "base", "skip"] = "error"
    nonfinite: Literal["error", "base"] = "error"
    shard_size: str = "5GB"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def slices(self) -> list[Slice]:
        """The slices of all modules, in order."""
        return [s for module in self.modules.values() for s in module.slices]

    @property
    def vocab(self) -> str:
        """What to do when vocabularies differ: "error", or the tokenizer's source."""
        return "error" if self.tokenizer is None else self.tokenizer.source

    @property
    def models(self) -> list[ModelRef]:
        """Every model named anywhere, once each, the base first."""
        refs = [self.base] if self.base else []
        for piece in self.slices:
            refs += [i.model for i in ([piece.base] if piece.base else []) + piece.inputs]
        if self.tokenizer:
            refs += [self.tokenizer.model] if self.tokenizer.model else []
            refs += [rule.model for rule in self.tokenizer.tokens.values() if rule.model]
        return list({ref.identity: ref for ref in reversed(refs)}.values())[::-1]

    def merges(self, tensor: str) -> bool:
        """Whether the tensor takes part: it contains one of `include` (if any) and none of `exclude`."""
        return (not self.include or any(p in tensor for p in self.include)) and not any(
            p in tensor for p in self.exclude
        )

    def with_models(self, change: Callable[[ModelRef], ModelRef]) -> Recipe:
        """A copy in which `change` has been applied to every model."""

        def one(item: Input | None) -> Input | None:
            return None if item is None else replace(item, model=change(item.model))

        modules = {
            name: replace(
                module,
                slices=[
                    replace(s, inputs=[replace(i, model=change(i.model)) for i in s.inputs], base=one(s.base))
                    for s in module.slices
                ],
            )
            for name, module in self.modules.items()
        }
        tokenizer = self.tokenizer
        if tokenizer is not None:
            tokens = {
                token: replace(rule, model=change(rule.model)) if rule.model else rule
                for token, rule in tokenizer.tokens.items()
            }
            tokenizer = replace(tokenizer, tokens=tokens, model=change(tokenizer.model) if tokenizer.model else None)
        return replace(self, modules=modules, tokenizer=tokenizer, base=change(self.base) if self.base else None)

    def with_stages(self, folders: Mapping[str, str]) -> Recipe:
        """A copy in which names of stages are replaced by the folders that hold their results."""
        return self.with_models(lambda ref: replace(ref, path=folders.get(ref.path, ref.path)))


class ParameterLike(Protocol):
    """What `resolve` asks of an entry of a method's schema."""

    @property
    def per_input(self) -> bool: ...


def relative_depth(layer: int, layers: int) -> float:
    """The `t` of gradients: position of a layer in its slice, in [0, 1]; a one-layer slice is at 1."""
    return layer / (layers - 1) if layers > 1 else 1.0


def resolve(
    recipe: Recipe,
    parameters: Mapping[str, ParameterLike],
    piece: Slice,
    tensor: str,
    t: float = 0.0,
    input_names: Sequence[str] | None = None,
) -> dict[str, Resolved]:
    """The keyword arguments of the method for one tensor; `parameters` is its schema (`METHODS.lookup(name).params`).

    Input in slice goes before slice, module, top level and the dialect's defaults; a value whose filters don't match
    is passed over. Per-input parameters come as a list in the order of `piece.inputs`, filtered by `input_names` (the
    tensor's name in each input, where a slice renumbers layers). What nobody sets is left out: the method's default
    holds.
    `t` is `relative_depth` of the layer, 0 for tensors outside the layers.
    """
    module = next((m for m in recipe.modules.values() if any(s is piece for s in m.slices)), None)
    shared = [piece.parameters, module.parameters if module else {}, recipe.parameters, recipe.defaults]
    names = input_names or [tensor] * len(piece.inputs)
    out: dict[str, Resolved] = {}
    for word, parameter in parameters.items():
        if not parameter.per_input:
            value = _first(shared, word, tensor, t)
            if value is not None:
                out[word] = value
            continue
        values = [
            _first([item.parameters, *shared], word, name, t) for item, name in zip(piece.inputs, names, strict=True)
        ]
        if any(v is not None for v in values):
            default = getattr(parameter, "default", None)
            out[word] = [default if v is None else v for v in values]  # type: ignore[misc]
    return out


def _first(scopes: Iterable[Parameters], word: str, tensor: str, t: float) -> Leaf | None:
    for scope in scopes:
        value = scope[word].at(tensor, t) if word in scope else None
        if value is not None:
            return value
    return None
