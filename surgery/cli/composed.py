"""Compositions on the command line: models by name, a formula of them, how they are asked, scaled and filtered.

`--expr "large + 1.0*(tuned - small)" --model large=DIR --model tuned=DIR --model small=DIR`. A name that `--model` does
not give stands for itself: a name of the zoo or, in quotation marks, whatever is a model elsewhere on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery import formula as formulas
from surgery.cli import models
from surgery.cli.frame import option
from surgery.errors import SurgeryError
from surgery.registry import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgery.logits import Ensemble

_MODELS = "Models and formulas of them"
Model = Annotated[
    str | None,
    typer.Argument(help="A folder, base+adapter, a hub name, or a name of the zoo; or a formula, as for --expr."),
]
Expr = Annotated[
    str | None,
    option("Log-probabilities of models, summed: 'large + 1.0*(tuned - small)'.", panel=_MODELS, metavar="FORMULA"),
]
Named = Annotated[
    list[str] | None,
    option("What a name in formulas stands for; repeatable.", "--model", "-m", panel=_MODELS, metavar="NAME=MODEL"),
]
Chat = Annotated[bool, option("Ask every model in its chat template.", "--chat", panel=_MODELS)]
ChatFor = Annotated[
    list[str] | None, option("Only this one, and the others in plain text; repeatable.", panel=_MODELS, metavar="NAME")
]
TokenFilter = Annotated[
    str | None,
    option("Which tokens may come: plausible=0.1@NAME, nucleus=0.9@NAME, top_k=50@NAME; with :zero_reward behind it "
           "the others keep the first model's probability. @scores looks at the formula, no @ at the first model.",
           panel=_MODELS, metavar="RULE=X[@NAME]"),
]  # fmt: skip
Scaled = Annotated[
    list[str] | None,
    option("What NAME adds over BASE in every layer, times a number; repeatable.", panel=_MODELS,
           metavar="NAME=BASE:X"),
]  # fmt: skip
Missing = Annotated[
    Literal["mask", "zero_reward"],
    option("Tokens that a model has not: never, or as the first model has them.", panel=_MODELS),
]
Foreign = Annotated[
    list[str] | None,
    option("NAME splits text in its own way: experimental, and slow; repeatable.", panel=_MODELS, metavar="NAME"),
]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], option("Type of their numbers.", panel=_MODELS)]
Device = Annotated[str, option("Where they run: cpu, cuda, ...", panel=_MODELS)]


DRAWN = "How it is drawn"
MaxNewTokens = Annotated[
    int | None, option("Longest completion.", panel=DRAWN, min=1, default="256, as far as contexts go")
]
BatchSize = Annotated[int, option("Completions at a time.", panel=DRAWN, min=1)]

_SIGNS = set(" +*()'\"")
"""What formulas have and names of models have not."""
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Composition:
    """A formula, or a single model, and what each of its names stands for."""

    text: str
    """As it was typed."""
    models: dict[str, str]
    single: bool = False


@dataclass(frozen=True)
class Settings:
    """How models are asked and changed: the options of this module but for the formula."""

    chat: bool = False
    chat_for: Sequence[str] = ()
    scaled: Sequence[str] = ()
    dtype: str = "auto"
    device: str = "cpu"
    filter: str | None = None
    missing: Literal["mask", "zero_reward"] = "mask"
    foreign: Sequence[str] = ()
    draft: str | None = None
    """Another model to load, which drafts; it may be one of the formula's."""
    factors: dict[str, tuple[str, float]] = field(init=False)
    """Of scaled models: the base and the factor."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", dict(map(_factor, self.scaled)))
        if self.chat and self.chat_for:
            raise SurgeryError("--chat asks every model in its chat template, --chat-for some: choose one.")


def composition(model: str | None, expr: str | None, named: dict[str, str]) -> Composition:
    """What the argument MODEL or --expr asks for. Raises `SurgeryError` for both, neither, and names of no models."""
    if (model is None) == (expr is None):
        raise SurgeryError("Name one model, or a formula of models: --expr." if model is None else
                           "A model and a formula are two: name one of them.",
                           hint="As in --expr 'large + 1.0*(tuned - small)' --model large=DIR ...")  # fmt: skip
    if expr is None and model is not None and not _is_formula(model, named):
        spec = named.get(model, model)
        return Composition(model, {model if model in named else models.labels([spec])[0]: spec}, single=True)
    text = expr if expr is not None else str(model)
    names = formulas.names_in(text)
    known = {**named, **{name: name for name in names if name not in named and _stands(name)}}
    formulas.names_in(text, {**dict.fromkeys(_zoo()), **known})
    return Composition(text, {name: known.get(name, name) for name in names})


def checked(compositions: Sequence[Composition], named: dict[str, str], settings: Settings) -> None:
    """Raises `SurgeryError` for options that speak of names that no formula has, before anything is loaded."""
    used = list(dict.fromkeys(name for each in compositions for name in each.models))
    bases = [base for base, _ in settings.factors.values()]
    for name in named:
        if name not in [*used, *bases, settings.draft]:
            raise SurgeryError(f"--model gives '{name}', which no formula uses.", hint=nearest(name, used))
    asked: list[tuple[str, Any]] = [("--chat-for", name) for name in settings.chat_for]
    asked += [("--scaled", name) for name in settings.factors] + [("--foreign", name) for name in settings.foreign]
    if settings.filter is not None:
        from surgery.logits import Filter

        rule, value, on, mode = _filter(settings.filter)
        Filter(rule, value, mode=mode)
        asked += [("--filter", on)] if on not in (None, "scores") else []
    for word, name in asked:
        if name not in [*used, settings.draft]:
            raise SurgeryError(f"{word} speaks of '{name}', which no formula uses.", hint=nearest(name, used))


@contextmanager
def opened(
    asked: Composition, named: dict[str, str], settings: Settings
) -> Iterator[tuple[Ensemble, dict[str, Ensemble]]]:
    """The models loaded (each once) and put together, and each by its name.

    What is scaled is so until the end of the context.
    """
    from surgery.activations.scaling import scaled
    from surgery.logits import member
    from surgery.models import Pair, load, located, no_bars

    loaded: dict[str, tuple[Any, Any]] = {}

    def got(spec: str, key: str) -> tuple[Any, Any]:
        if key not in loaded:
            with no_bars():
                loaded[key] = load(spec, settings.dtype, settings.device)
        return loaded[key]

    wanted = dict(asked.models)
    if settings.draft is not None:
        wanted.setdefault(settings.draft, named.get(settings.draft, settings.draft))
    for spec in [*wanted.values(), *(named.get(base, base) for base, _ in settings.factors.values())]:
        located(spec)  # before anything is loaded
    with ExitStack() as stack:
        members = {}
        for name, spec in wanted.items():
            if name in settings.factors:
                base, factor = settings.factors[name]
                model, tokenizer = got(spec, f"{name}, scaled")
                origin = named.get(base, base)
                pair = Pair(got(origin, origin)[0], model, tokenizer)
                stack.enter_context(scaled(pair, factor))
            else:
                model, tokenizer = got(spec, spec)
            chat = settings.chat or name in settings.chat_for
            if chat and not getattr(tokenizer, "chat_template", None):
                raise SurgeryError(f"'{name}' has no chat template.",
                                   hint="Leave --chat out, or name those that have one: --chat-for NAME.")  # fmt: skip
            templated = getattr(tokenizer, "chat_template", None) and not settings.chat_for
            style: Any = "chat" if chat else "given" if templated else "plain"
            members[name] = member(model, tokenizer, prompt=style, name=name, foreign=name in settings.foreign)
        found = members[next(iter(asked.models))] if asked.single else formulas.evaluate(asked.text, members)
        if settings.filter is not None:
            rule, value, on, mode = _filter(settings.filter)
            found = found.filtered(rule, value, on=members.get(on, on) if on else None, mode=mode)
        yield found.where_missing(settings.missing), members


@contextmanager
def evaluated(
    asked: Composition, named: dict[str, str], settings: Settings
) -> Iterator[tuple[Any, PreTrainedTokenizerBase, bool]]:
    """(model or composition, its tokenizer, whether its prompts are put into its chat template).

    A single model of which nothing else is asked is itself.
    """
    from surgery.models import load, no_bars

    more = (settings.chat_for, settings.factors, settings.filter, settings.foreign)
    if asked.single and not any(more):
        with no_bars():
            model, tokenizer = load(next(iter(asked.models.values())), settings.dtype, settings.device)
        yield model, tokenizer, settings.chat
    else:
        with opened(asked, named, settings) as (ensemble, _):
            yield ensemble, ensemble.tokenizer, False


def labels(compositions: Sequence[Composition]) -> list[str]:
    """A short name for each, with a number where two are the same."""
    short = [next(iter(each.models)) if each.single else each.text for each in compositions]
    return [name if short.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(short)]


# ---- words -------------------------------------------------------------------------------------------------------


def _is_formula(text: str, named: dict[str, str]) -> bool:
    """Whether an argument that may be a model is a formula."""
    if text in named or _stands(text):
        return False
    try:
        return set(formulas.names_in(text)) <= set(named) or bool(set(text) & _SIGNS)
    except SurgeryError:
        return bool(set(text) & _SIGNS)


def _stands(name: str) -> bool:
    """Whether a name is a model by itself, or may be one of the hub."""
    if models.model(name) != name or Path(name).expanduser().exists() or _HUB.fullmatch(name):
        return True
    base, plus, _ = name.partition("+")
    return bool(plus) and _stands(base)


def _zoo() -> list[str]:
    from surgery import zoo

    return [one.name for one in zoo.list_models()]


def _factor(text: str) -> tuple[str, tuple[str, float]]:
    name, equals, rest = text.partition("=")
    base, colon, number = rest.rpartition(":")
    try:
        if not (equals and colon and name and base):
            raise ValueError
        return name, (base, float(number))
    except ValueError:
        raise SurgeryError(f"--scaled {text} is not NAME=BASE:X.", hint="As in --scaled tuned=small:0.5.") from None


def _filter(text: str) -> tuple[str, float, str | None, Any]:
    """(rule, value, member or None, mode) of `plausible=0.1@NAME:mode`."""
    head, colon, mode = text.rpartition(":")
    if not colon or mode not in ("mask", "zero_reward"):
        head, mode = text, "mask"
    rule, equals, rest = head.partition("=")
    value, at, on = rest.partition("@")
    try:
        if not equals or (at and not on):
            raise ValueError
        return rule, float(value), on or None, mode
    except ValueError:
        hint = "As in --filter plausible=0.1@tuned, or nucleus=0.9@large:zero_reward."
        raise SurgeryError(f"--filter {text} is not RULE=X@NAME.", hint=hint) from None
