"""Parts of a recipe by name: `name`, `{name: {parameter: value}}`, or the object itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from surgery.errors import SurgeryError
from surgery.registry import Registry, nearest


def made(registry: Registry[Any], written: Any) -> Any:
    """What a recipe writes as `name` or `{name: {parameter: value}}`, or an object as it is.

    Raises `SurgeryError` for a name or a parameter that does not exist, and for a missing one.
    """
    if not isinstance(written, str | Mapping):
        return written
    if isinstance(written, str):
        written = {written: {}}
    if len(written) != 1:
        raise SurgeryError(f"One {registry.kind} is expected, found {', '.join(map(str, written)) or 'none'}.")
    ((name, keys),) = written.items()
    factory = registry.lookup(name)
    parameters = inspect.signature(factory).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in keys or {}:
        if key not in parameters and not free:
            raise SurgeryError(f"The {registry.kind} '{name}' has no parameter '{key}'.", hint=nearest(key, parameters))
    for key, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD
        if not optional and key not in (keys or {}):
            raise SurgeryError(f"The {registry.kind} '{name}' needs the parameter '{key}'.")
    return factory(**(keys or {}))
