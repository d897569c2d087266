"""What parameters each merge method has, read from the source of `surgery/weights/methods` without importing torch.

A method's signature is its schema; importing the signatures costs over a second (torch), parsing them a few
milliseconds, and planning must be instant. Once the methods are imported anyway, the registry itself is asked, so that
methods registered by a user's code are known too. A test holds the two readings equal.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from surgery.errors import SurgeryError
from surgery.registry import nearest
from surgery.weights.recipe.contract import Contract, Parameter

_METHODS_MODULE = "surgery.weights.methods"
_BASE: dict[Any, Literal["required", "optional", "ignored"]] = {True: "required", False: "ignored"}
_TYPES: dict[str, type] = {"float": float, "int": int, "bool": bool, "str": str}


def signature_of(name: str) -> Contract:
    """The signature of the method registered as `name`. Raises `SurgeryError` with the nearest names."""
    known = signatures()
    if name in known:
        return known[name]
    registry = getattr(sys.modules.get(_METHODS_MODULE), "METHODS", {})
    if name in registry:
        return _from_registry(name, registry[name])
    raise SurgeryError(f"There is no merge method '{name}'.", hint=nearest(name, [*known, *registry]))


@cache
def signatures() -> dict[str, Contract]:
    """All methods of the package by name."""
    folder = Path(__file__).parents[1]
    found = {}
    trees = [ast.parse(path.read_bytes()) for path in sorted((folder / "methods").glob("*.py"))]
    aliases = {
        target.id: statement.value
        for tree in [*trees, *(ast.parse(p.read_bytes()) for p in (folder / "sparsify.py",) if p.exists())]
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    for tree in trees:
        for function in tree.body:
            if isinstance(function, ast.FunctionDef):
                for name, needs_base, inputs in _registrations(function):
                    found[name] = Contract(
                        name, _BASE.get(needs_base, "optional"), inputs, _parameters(function, aliases)
                    )
    return found


def _registrations(function: ast.FunctionDef) -> Iterator[tuple[str, bool | str, tuple[int, int | None]]]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", None) == "method":
            options = {
                k.arg: ast.literal_eval(k.value) for k in decorator.keywords if k.arg in ("needs_base", "inputs")
            }
            yield ast.literal_eval(decorator.args[0]), options.get("needs_base", True), options.get("inputs", (1, None))


def _parameters(function: ast.FunctionDef, aliases: dict[str, ast.expr]) -> dict[str, Parameter]:
    out = {}
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if ast.unparse(argument.annotation or ast.Constant(None)).startswith("Hidden["):  # the engine's, not a recipe's
            continue
        kind, per_input, choices, optional = _annotation(argument.annotation, aliases)
        out[argument.arg] = Parameter(
            argument.arg,
            kind,
            required=default is None,
            default=None if default is None else ast.literal_eval(default),
            per_input=per_input,
            choices=choices,
            optional=optional,
        )
    return out


def _annotation(node: ast.expr | None, aliases: dict[str, ast.expr]) -> tuple[type, bool, tuple[str, ...], bool]:
    """(type, per input, choices, may be None) of float, PerInput[float], Literal[...], X | None an alias of these."""
    if isinstance(node, ast.Name):
        if node.id in _TYPES:
            return _TYPES[node.id], False, (), False
        return _annotation(aliases.get(node.id), aliases)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _annotation(ast.parse(node.value, mode="eval").body, aliases)
    if isinstance(node, ast.BinOp):
        kind, per_input, choices, _ = _annotation(node.left, aliases)
        return kind, per_input, choices, True
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        if node.value.id == "PerInput":
            kind, _, choices, optional = _annotation(node.slice, aliases)
            return kind, True, choices, optional
        if node.value.id == "Literal":
            choices = ast.literal_eval(node.slice)
            return str, False, choices if isinstance(choices, tuple) else (choices,), False
    raise TypeError(f"unreadable annotation of a merge method: {ast.unparse(node) if node else 'none'}")


def _from_registry(name: str, method: Any) -> Contract:
    """The same from a registered Method object."""
    parameters = {}
    for word, param in method.params.items():
        choices = tuple(param.choices or ())
        kind = param.type if param.type in _TYPES.values() else str
        if get_origin(param.type) is Literal:
            choices = choices or get_args(param.type)
        required = bool(getattr(param, "required", False))
        parameters[word] = Parameter(
            word, kind, required, None if required else param.default, bool(param.per_input), choices
        )
    return Contract(name, _BASE.get(method.needs_base, "optional"), tuple(method.inputs), parameters)
