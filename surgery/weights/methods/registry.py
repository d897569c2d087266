"""How a merge method becomes known: `@method(...)` reads the parameters out of the function's signature."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.registry import Registry, nearest

T = TypeVar("T")
P = ParamSpec("P")

Unit = Literal["element", "row", "tensor"]
"""What a method may be called on: any slice; any block of rows of dimension 0 (a 1-D tensor is one row and is never
split); or whole tensors only."""

NeedsBase = bool | Literal["optional"]

_PER_INPUT, _HIDDEN = "per input", "hidden"
PerInput = Annotated[T | Sequence[T], _PER_INPUT]
"""A parameter with one value for each input, or one for all."""
Hidden = Annotated[T, _HIDDEN]
"""A parameter that the engine fills in and a recipe can't name: `keys`, `offset`, `depth`, `selections`."""

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Param:
    """One parameter of a method: what a recipe may write."""

    type: type
    """float, int, bool or str."""
    default: Any
    """`REQUIRED` when there is none; None when the method works it out."""
    per_input: bool
    """May differ between the inputs."""
    choices: tuple[str, ...] = ()
    """The valid words, where only some are."""

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


@dataclass(frozen=True)
class Method:
    """A merge method and everything a recipe, a help page or an engine needs to know about it."""

    name: str
    function: Callable[..., Tensor]
    """function(tuned, base, **parameters) -> merged tensor; checked and promoted to float32, see `method`."""
    needs_base: NeedsBase
    """"optional": with a base, the method works on differences from it. False: a base is not looked at."""
    unit: Unit
    inputs: tuple[int, int | None]
    """Fewest and most inputs, the base not counted; None is no limit."""
    params: dict[str, Param]
    hidden: frozenset[str]
    """Names of the parameters that only the engine passes."""
    random: bool
    """Needs `keys`, one 64-bit integer for each input (see `sparsify.derive_key`)."""
    paper: str
    summary: str
    unit_if: Mapping[tuple[str, Any], Unit] = field(default_factory=dict)

    def unit_for(self, params: Mapping[str, Any]) -> Unit:
        """The unit under these parameters: `dare_linear` works on slices, but with rescale="l1" on whole tensors."""
        for (name, value), unit in self.unit_if.items():
            if name in self.params and params.get(name, self.params[name].default) == value:
                return unit
        return self.unit


METHODS: Registry[Method] = Registry("merge method")


def method(
    name: str,
    *,
    unit: Unit,
    needs_base: NeedsBase,
    inputs: tuple[int, int | None] = (1, None),
    paper: str = "",
    unit_if: Mapping[tuple[str, Any], Unit] | None = None,
) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Register a function (tuned, base, *, parameters) -> tensor as the merge method `name`.

    The registered and returned function checks its inputs (their number, shapes, a missing base, unknown parameters
    and words: `SurgeryError`) and promotes them to float32, or to float64 if any of them is.
    `unit_if={("rescale", "l1"): "tensor"}` gives a parameter value its own unit.
    """

    def register(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        params, hidden = _schema(function)

        @functools.wraps(function)
        def checked(tuned: Sequence[Tensor], base: Tensor | None = None, **given: Any) -> Tensor:
            _check_parameters(known, given)
            tuned, base = _check_tensors(known, tuned, base)
            return function(tuned, base, **given)  # type: ignore[arg-type]

        known = Method(
            name=name,
            function=checked,
            needs_base=needs_base,
            unit=unit,
            inputs=inputs,
            params=params,
            hidden=hidden,
            random=inspect.signature(function).parameters.get("keys", _NO_KEYS).default is REQUIRED,
            paper=paper,
            summary=(inspect.getdoc(function) or "").partition("\n")[0],
            unit_if=unit_if or {},
        )
        METHODS.register(name)(known)
        return checked  # type: ignore[return-value]

    return register


_NO_KEYS = inspect.Parameter("keys", inspect.Parameter.KEYWORD_ONLY, default=None)


def per_input(value: PerInput[T], n: int, name: str) -> list[T]:
    """`value` as a list of `n`, one for each input. Raises `SurgeryError` when it is a list of another length."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * n
    if len(values) != n:
        raise SurgeryError(
            f"'{name}' has {len(values)} values for {n} inputs.", hint="Give one value for each input, or one for all."
        )
    return values


def _schema(function: Callable[..., Any]) -> tuple[dict[str, Param], frozenset[str]]:
    """The recipe parameters and the hidden names, read from the keyword-only arguments."""
    hints = get_type_hints(function, include_extras=True)
    params, hidden = {}, set()
    for name, argument in inspect.signature(function).parameters.items():
        if argument.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint, marks = hints[name], set()
        if get_origin(hint) is Annotated:
            hint, *extra = get_args(hint)
            marks = set(extra)
        if _HIDDEN in marks:
            hidden.add(name)
            continue
        options = [hint]
        while any(get_origin(o) in (Union, types.UnionType, Annotated) for o in options):
            flat: list[Any] = []
            for o in options:
                if get_origin(o) is Annotated:
                    marks.update(get_args(o)[1:])
                    flat.append(get_args(o)[0])
                else:
                    flat.extend(get_args(o) if get_origin(o) in (Union, types.UnionType) else [o])
            options = flat
        kind = next(o for o in options if o is not type(None) and get_origin(o) is not Sequence)
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        params[name] = Param(str if choices else kind, argument.default, _PER_INPUT in marks, choices)
    return params, frozenset(hidden)


def _check_parameters(known: Method, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in known.hidden:
            continue
        if name not in known.params:
            raise SurgeryError(f"'{known.name}' has no parameter '{name}'.", hint=nearest(name, known.params))
        choices = known.params[name].choices
        if choices and value not in choices:
            raise SurgeryError(f"'{name}' of '{known.name}' is {value!r}.", hint=nearest(str(value), choices))
    for name, param in known.params.items():
        if param.required and name not in given:
            raise SurgeryError(f"'{known.name}' needs the parameter '{name}'.")


def _check_tensors(known: Method, tuned: Sequence[Tensor], base: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    fewest, most = known.inputs
    if len(tuned) < fewest or (most is not None and len(tuned) > most):
        wanted = str(fewest) if fewest == most else f"at least {fewest}" if most is None else f"{fewest} to {most}"
        raise SurgeryError(f"'{known.name}' takes {wanted} tuned model(s) besides the base, found {len(tuned)}.")
    if known.needs_base is True and base is None:
        raise SurgeryError(f"'{known.name}' works on differences from a base: none was given.", hint="Name a base.")
    every = [*tuned] if base is None else [*tuned, base]
    if len({t.shape for t in every}) > 1:
        shapes = ", ".join(str(list(t.shape)) for t in every)
        raise SurgeryError(f"'{known.name}' got tensors of different shapes: {shapes}.")
    if not all(t.is_floating_point() for t in every):
        raise SurgeryError(f"'{known.name}' got a tensor that is not floating point.", hint="Copy integers unmerged.")
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in every) else torch.float32
    return [t.to(dtype) for t in tuned], None if base is None else base.to(dtype)
