"""Rewards from the words of a recipe, checked by signature before anything is loaded.

reward: accuracy
reward: [accuracy, format]
reward: {accuracy: 1.0, cosine_length: {weight: 0.5, max_len: 100}}
reward: {long: {reward: cosine_length, max_len: 500}, short: {reward: cosine_length, max_len: 50}}
reward: {my_rewards.py:polite: {weight: 0.2, threshold: 3}}
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial, update_wrapper
from numbers import Real
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.registry import Registry, T, nearest
from surgery.training.rewards.base import REWARDS, Reward
from surgery.training.rewards.call import signature_of
from surgery.training.rewards.score import Rewards

_FOLDER: ContextVar[Path] = ContextVar("folder of the recipe", default=Path())
"""Where `file.py:function` is looked up: rewards that name others (a judge, an executor) are built inside."""

Spec = Mapping[str, Any] | Sequence[Any] | str | Callable[..., Any] | Rewards


def build_rewards(spec: Spec, *, folder: str | Path | None = None) -> Rewards:
    """The rewards that `spec` names; `file.py:function` is looked up in `folder`, that of the recipe.

    Raises `SurgeryError` for a name or parameter that does not exist, a value of the wrong type, a missing file.
    """
    if isinstance(spec, Rewards):
        return spec
    if folder is not None:
        token = _FOLDER.set(Path(folder))
        try:
            return build_rewards(spec)
        finally:
            _FOLDER.reset(token)
    functions: dict[str, tuple[Reward, float]] = {}
    for label, entry in _entries(spec):
        reward, weight, parameters = _parts(label, entry)
        if label in functions:
            raise SurgeryError(f"Reward '{label}' is given twice.", hint="Give one of them a label of its own.")
        functions[label] = make_reward(reward, parameters), weight
    return Rewards(functions)


def make_reward(name: str | Reward, parameters: Mapping[str, Any] | None = None) -> Reward:
    """One reward: by registered name, by `module:function` or `file.py:function`, or a callable as it is.

    A registered factory or a class is called with the parameters; those of a plain function are bound to it.
    Raises `SurgeryError` as `build_rewards` does.
    """
    parameters = dict(parameters or {})
    if callable(name):
        return _bound(getattr(name, "__name__", "reward"), name, parameters)
    if ":" in name:
        return _bound(name, imported(name), parameters)
    factory = REWARDS.lookup(name)
    return _made(name, factory, parameters)


def imported(path: str) -> Callable[..., Any]:
    """What `module:function` or `file.py:function` names. Raises `SurgeryError` when it is not there."""
    where, _, attribute = path.rpartition(":")
    try:
        if where.endswith(".py"):
            file = _FOLDER.get() / Path(where).expanduser()
            if not file.is_file():
                raise SurgeryError(f"'{path}': there is no file {file}.")
            module_name = f"rewards in {file.resolve()}"
            module_spec = importlib.util.spec_from_file_location(module_name, file)
            assert module_spec is not None and module_spec.loader is not None
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[module_name] = module  # dataclasses of the file look their module up
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except SurgeryError:
        raise
    except Exception as error:
        hint = "A file of yours is named with its ending: file.py:function." if isinstance(error, ImportError) else None
        raise SurgeryError(f"'{path}' could not be imported: {type(error).__name__}: {error}", hint=hint) from error
    thing = getattr(module, attribute, None)
    if not callable(thing):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise SurgeryError(f"'{path}': {where} has no function '{attribute}'.", hint=nearest(attribute, names))
    return thing


def found(registry: Registry[T], name: str) -> T:
    """The thing registered as `name`, or what `module:function` or `file.py:function` names."""
    if ":" in name:
        return imported(name)  # type: ignore[return-value]
    return registry.lookup(name)


def check_parameters(who: str, function: Callable[..., Any], parameters: Mapping[str, Any]) -> None:
    """Raises `SurgeryError` unless `function` names these parameters and, where it annotates them, the values have the
    types of its defaults."""
    known = signature_of(who, function)
    named = [p.name for p in known.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for name, value in parameters.items():
        if name not in named:  # not even with **kwargs, which would swallow a misspelt parameter
            raise SurgeryError(f"{who} has no parameter '{name}'.", hint=nearest(name, [*named, "weight"]))
        if wrong := _wrong_type(known[name], value):
            raise SurgeryError(f"{who}: {name} must be {wrong}, not {value!r}.")


def _wrong_type(parameter: inspect.Parameter, value: Any) -> str | None:
    """What the value of an annotated parameter should be, in words, when it is not; its default shows the type."""
    default, annotation = parameter.default, str(parameter.annotation)
    if parameter.annotation is parameter.empty or "Any" in annotation or (value is None and "None" in annotation):
        return None
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return None if whole else "a whole number"
    if isinstance(default, float):
        return None if isinstance(value, Real) and not isinstance(value, bool) else "a number"
    if isinstance(default, str):
        return None if isinstance(value, str) else "a text"
    if isinstance(default, tuple):
        return None if isinstance(value, list | tuple) else "a list"
    return None


def _entries(spec: Any) -> list[tuple[str, Any]]:
    """(label, entry) of every form a spec can take."""
    if isinstance(spec, Mapping):
        return [(str(label), entry) for label, entry in spec.items()]
    if isinstance(spec, str):
        return [(spec, None)]
    if callable(spec):
        return [(getattr(spec, "__name__", type(spec).__name__), spec)]
    if isinstance(spec, Sequence):
        return [pair for item in spec for pair in _entries(item)]
    raise SurgeryError(
        f"Rewards are given by name, as a list, or as a table of weights, not as {spec!r}.",
        hint="For example `reward: {accuracy: 1.0, format: 0.5}`.",
    )


def _parts(label: str, entry: Any) -> tuple[str | Reward, Any, dict[str, Any]]:
    """The name (or callable), weight and parameters of an entry: None, a weight, a callable, a pair or a table."""
    if isinstance(entry, Mapping):
        rest = dict(entry)
        return rest.pop("reward", label), rest.pop("weight", 1.0), rest
    if isinstance(entry, tuple) and len(entry) == 2 and callable(entry[0]):
        return entry[0], entry[1], {}
    if callable(entry):
        return entry, 1.0, {}
    if entry is None or isinstance(entry, Real):
        return label, 1.0 if entry is None else entry, {}
    raise SurgeryError(f"Reward '{label}' takes a weight or a table of parameters, not {entry!r}.")


def _made(name: str, factory: Callable[..., Any], parameters: Mapping[str, Any]) -> Reward:
    check_parameters(f"Reward '{name}'", factory, parameters)
    try:
        return factory(**parameters)
    except SurgeryError:
        raise
    except Exception as error:
        raise SurgeryError(f"Reward '{name}' could not be made: {type(error).__name__}: {error}") from error


def _bound(name: str, thing: Callable[..., Any], parameters: Mapping[str, Any]) -> Reward:
    if inspect.isclass(thing):
        return _made(name, thing, parameters)
    check_parameters(f"Reward '{name}'", thing, parameters)
    if not parameters:
        return thing
    # keeps the attributes of the function (`group`, `columns`), which partial drops; not its unbound signature
    bound = update_wrapper(partial(thing, **parameters), thing)
    del bound.__wrapped__
    return bound
