"""From a document of either dialect to the normal form."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal, cast

from surgery.weights.recipe.checks import check_inputs, check_values
from surgery.weights.recipe.dialects import MERGEKIT, OURS, Dialect
from surgery.weights.recipe.field import Field, nearest_of
from surgery.weights.recipe.mergekit import WORDS
from surgery.weights.recipe.outputs import dtypes, shard_size, tokenizer_rule
from surgery.weights.recipe.references import model_ref
from surgery.weights.recipe.schema import Input, ModelRef, Module, Parameters, Recipe, Slice
from surgery.weights.recipe.text import Document
from surgery.weights.recipe.values import Value, parse_value


def compile_document(document: Document) -> Recipe:
    """The recipe of one document. Raises `SurgeryError` naming the document, the line and the path."""
    return _Compiler(Field(document.data, document)).recipe()


class _Compiler:
    """Holds what the parts of one document share: its dialect, its method's contract, the notes."""

    def __init__(self, root: Field) -> None:
        self.root = root.mapping()
        self.dialect = _dialect_of(root)
        self.contract = self.dialect.contract(root[self.dialect.method])
        self.notes: list[str] = []
        self._check_keys()

    def recipe(self) -> Recipe:
        root, words = self.root, self.dialect
        base_field = root.get(words.base)
        base = model_ref(base_field) if base_field else None
        parameters = self.parameters(root)
        dtype, out_dtype, notes = dtypes(root, words)
        self.notes += notes
        recipe = Recipe(
            method=self.contract.method,
            modules=self.modules(base),
            base=base,
            name=_stage_name(root),
            parameters=parameters,
            defaults=self.defaults(),
            dtype=dtype,
            out_dtype=out_dtype,
            tokenizer=tokenizer_rule(root, words),
            chat_template=_chat_template(root),
            dialect=words.name,
            source=root.value,
        )
        if words is OURS:
            _own_options(recipe, root)
        check_values(recipe, self.contract, root)
        recipe.notes = list(dict.fromkeys(self.notes))
        return recipe

    def defaults(self) -> Parameters:
        """The dialect's defaults, which our methods would not take by themselves."""
        out: Parameters = {name: Value.constant(value) for name, value in self.contract.fixed.items()}
        if self.dialect is MERGEKIT:
            for parameter in self.contract.parameters.values():
                if parameter.name and parameter.default is not None:
                    default = parameter.default
                    out[parameter.name] = Value.constant(parameter.convert(default) if parameter.convert else default)
        return out

    def modules(self, base: ModelRef | None) -> dict[str, Module]:
        root = self.root
        given = [word for word in ("models", "slices", "modules") if root.get(word)]
        if len(given) != 1:
            found = "none of them" if not given else " and ".join(given)
            raise root.error(f"must have exactly one of 'models', 'slices' and 'modules', and has {found}")
        if given == ["modules"]:
            modules = root["modules"].mapping()
            if not modules.value:
                raise modules.error("is empty")
            return {name: self.module(modules[name], base) for name in modules.value}
        return {"default": Module(self.slices(root, base))}

    def module(self, field: Field, base: ModelRef | None) -> Module:
        field.mapping(("models", "slices", "parameters"))
        if bool(field.get("models")) == bool(field.get("slices")):
            raise field.error("must have either 'models' or 'slices'")
        return Module(self.slices(field, base), self.parameters(field))

    def slices(self, field: Field, base: ModelRef | None) -> list[Slice]:
        if models := field.get("models"):
            inputs = [self.input(item, "models") for item in models.items()]
            return [self.slice(models, inputs, base, {})]
        out = []
        for item in field["slices"].items():
            item.mapping(self.dialect.slice)
            sources = item.get(self.dialect.inputs)
            if sources is None:
                raise item.error(f"has no '{self.dialect.inputs}'")
            own_base = item.get(self.dialect.base)
            if item.get("residual_weight"):
                self.notes.append(f"{item['residual_weight'].name} has no effect (mergekit reads it and does nothing).")
            inputs = [self.input(source, "slices") for source in sources.items()]
            out.append(self.slice(sources, inputs, model_ref(own_base) if own_base else base, self.parameters(item)))
        return out

    def input(self, field: Field, form: Literal["models", "slices"]) -> Input:
        layers_word = self.dialect.layers
        if isinstance(field.value, str):
            if form == "slices":
                raise field.error(f"must say which layers: {{model: {field.value}, {layers_word}: [0, 12]}}")
            return Input(model_ref(field))
        field.mapping(("model", "parameters") + ((layers_word,) if form == "slices" else ()))
        model = field.get("model")
        if model is None:
            raise field.error("has no 'model'")
        layers = field.get(layers_word) if form == "slices" else None
        if form == "slices" and layers is None:
            raise field.error(f"has no '{layers_word}'")
        return Input(model_ref(model), _layers(layers) if layers else None, self.parameters(field, of_input=True))

    def slice(self, field: Field, listed: list[Input], base: ModelRef | None, parameters: Parameters) -> Slice:
        """Tell the base from the inputs, as the method's contract wants it, and check their number and layers."""
        if base is None and self.contract.base == "required":
            raise self.root.error(f"has no '{self.dialect.base}', and {self.contract.method} needs one to differ from",
                                  f"Add '{self.dialect.base}: <folder>'.")  # fmt: skip
        seen: dict[tuple[str, ...], int] = {}
        for i, item in enumerate(listed):
            if item.model.identity in seen:
                raise field[i].error(f"is the same model as {field[seen[item.model.identity]].name} ({item.model})")
            seen[item.model.identity] = i
        inputs, base_input = listed, None
        if base is not None and self.contract.base != "ignored":
            inputs = [i for i in listed if i.model.identity != base.identity]
            base_input = next((i for i in listed if i.model.identity == base.identity), None)
            if base_input is None and listed[0].layers is not None:
                raise field.error(f"doesn't list the base {base}, so that its layers are not known",
                                  f"Add {{model: {base}, {self.dialect.layers}: [a, b]}} for it.")  # fmt: skip
            base_input = base_input or Input(base)
            if any(p.per_input for p in self.contract.parameters.values()) and base_input.parameters:
                self.notes.append(f"The parameters given to the base {base} have no effect.")
        elif base and self.dialect is MERGEKIT and listed[0].layers is None and base.identity not in seen:
            inputs = [*listed, Input(base)]  # mergekit counts it among the models then
            self.notes.append(f"{self.contract.method} averages the base {base} too, as mergekit does.")
        result = Slice(inputs, base_input, parameters)
        check_inputs(result, self.contract, self.root[self.dialect.method].value, field)
        return result

    def parameters(self, parent: Field, of_input: bool = False) -> Parameters:
        """The `parameters` mapping under `parent`, in our words. Words without effect leave a note."""
        field = parent.get("parameters")
        if field is None:
            return {}
        known = self.contract.parameters
        mergekit = self.dialect is MERGEKIT
        for word in field.mapping().value:
            ours = WORDS[word].name if word in WORDS and not mergekit else None
            if word not in known and ours in known:
                raise field[word].error("is mergekit's word", f"Here it is called '{ours}'.")
        field.mapping(tuple(dict.fromkeys([*known, *(WORDS if mergekit else ())])))
        out: Parameters = {}
        for word in field.value:
            item = field[word]
            parameter = known.get(word) or WORDS[word]
            if item.value is None:
                if mergekit or not parameter.optional:
                    raise item.error("is empty")
                continue
            value = parse_value(item, parameter)
            if word not in known:
                self.notes.append(f"{item.name} has no effect: {self.root[self.dialect.method].value} has no {word}.")
            elif parameter.name is None:
                if any(point for case in value.cases for point in case.points):
                    self.notes.append(f"{item.name} has no effect on the result.")
            elif of_input and not parameter.per_input:
                if not mergekit:
                    raise item.error("is one value for the whole merge", "Move it to the top-level 'parameters'.")
                self.notes.append(f"{item.name} has no effect: {word} is one value for the whole merge.")
            else:
                out[parameter.name] = value
        return out

    def _check_keys(self) -> None:
        for key in self.root.value:
            if key in self.dialect.document:
                continue
            here = self.root[key]
            if key in self.contract.parameters or key in WORDS:
                raise here.error("is not known here", f"'{key}' belongs under 'parameters'.")
            raise here.error("is not known here", nearest_of(key, self.dialect.document))


def _dialect_of(root: Field) -> Dialect:
    words = [d for d in (MERGEKIT, OURS) if d.method in root.value]
    if len(words) == 2:
        raise root.error("has both 'method' and 'merge_method'",
                         "'merge_method' is mergekit's dialect, 'method' is ours: keep one.")  # fmt: skip
    if words:
        return words[0]
    for key in root.value:
        if close := get_close_matches(key, ["merge_method", "method"], n=1, cutoff=0.75):
            raise root[key].error("is not known here", f"Did you mean '{close[0]}'?")
    raise root.error("names no merge method", "Add 'method: ties' (ours) or 'merge_method: ties' (mergekit's dialect).")


def _layers(field: Field) -> tuple[int, int]:
    members = field.items()
    if len(members) != 2:
        raise field.error(f"must be two numbers [first, end), not {len(members)}")
    first, end = (m.integer() for m in members)
    if not 0 <= first < end:
        raise field.error(f"is [{first}, {end}): it must run forward from a layer that is not negative")
    return first, end


def _stage_name(root: Field) -> str | None:
    field = root.get("name")
    if field is None:
        return None
    name = field.text()
    if any(c in name for c in "/\\+@\n") or name in (".", ".."):
        raise field.error(f"is {name!r}: a stage's name, being a folder's and a model's, can't hold / \\ + @")
    return name


def _chat_template(root: Field) -> str | None:
    field = root.get("chat_template")
    if field is None:
        return None
    text = field.text()
    known = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")
    if text not in known and "{" not in text:
        raise field.error(f"is {text!r}, neither a template's name nor Jinja text", nearest_of(text, known))
    return text


def _own_options(recipe: Recipe, root: Field) -> None:
    if field := root.get("seed"):
        recipe.seed = field.integer()
    if field := root.get("missing"):
        recipe.missing = cast(Any, field.text(("error", "base", "skip")))
    if field := root.get("nonfinite"):
        recipe.nonfinite = cast(Any, field.text(("error", "base")))
    if field := root.get("shard_size"):
        recipe.shard_size = shard_size(field)
    for word in ("include", "exclude"):
        if field := root.get(word):
            patterns = [field] if isinstance(field.value, str) else field.items()
            setattr(recipe, word, tuple(p.text() for p in patterns))
