"""A dictionary of named things (methods, objectives, rules) that answers a wrong name with the nearest right ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TypeVar

from surgery.errors import SurgeryError

T = TypeVar("T")


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a mistyped `name`: the closest of the `valid` names, or all of them when none is close."""
    valid = sorted(valid)
    close = get_close_matches(name, valid, n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "Valid names: " + ", ".join(valid) + "."


class Registry(dict[str, T]):
    """Things of one kind by name: `@registry.register("ties")` adds, `registry.lookup("ties")` finds.

    `kind` is the word used in messages ("merge method").
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files its argument under `name`; a second use of one name is a programming error."""

        def add(thing: T) -> T:
            if name in self:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self[name] = thing
            return thing

        return add

    def lookup(self, name: str) -> T:
        """The thing called `name`. Raises `SurgeryError` with the nearest valid names."""
        try:
            return self[name]
        except KeyError:
            raise SurgeryError(f"There is no {self.kind} '{name}'.", hint=nearest(name, self)) from None
