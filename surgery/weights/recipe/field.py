"""A place in a document, which knows its path: reading checked values, and saying what is wrong where."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from surgery.errors import SurgeryError
from surgery.weights.recipe.text import Document, Steps


class Field:
    """A place in a document: its value, its path, and how to say what is wrong there."""

    def __init__(self, value: Any, document: Document, path: Steps = ()) -> None:
        self.value = value
        self.document = document
        self.path = path

    @property
    def name(self) -> str:
        """The path as a user would write it: `models[1].parameters.density`."""
        out = ""
        for step in self.path:
            out += f"[{step}]" if isinstance(step, int) else f".{step}" if out else step
        return out or "the document"

    def error(self, problem: str, hint: str | None = None) -> SurgeryError:
        """The error "<recipe>, line n: <path> <problem>." """
        path = self.path
        while path and path not in self.document.lines:
            path = path[:-1]
        line = f", line {self.document.lines[path]}" if path in self.document.lines else ""
        return SurgeryError(f"{self.document.label}{line}: {self.name} {problem}.", hint=hint)

    def __getitem__(self, key: str | int) -> Field:
        return Field(self.value[key], self.document, (*self.path, key))

    def get(self, key: str) -> Field | None:
        """The field under `key`, or None when it is absent or empty (`null`)."""
        return self[key] if self.value.get(key) is not None else None

    def mapping(self, allowed: tuple[str, ...] | None = None) -> Field:
        """Itself, once it is known to be a mapping with string keys, all of them `allowed`."""
        if not isinstance(self.value, dict):
            raise self.error(f"must be a mapping, not {_kind(self.value)}")
        for key in self.value:
            if not isinstance(key, str):
                raise self.error(f"has the key {key!r}, which YAML does not read as a word", "Put the key in quotes.")
            if allowed is not None and key not in allowed:
                raise self[key].error("is not known here", nearest_of(key, allowed))
        return self

    def items(self) -> list[Field]:
        """The members of a non-empty list."""
        if not isinstance(self.value, list):
            raise self.error(f"must be a list, not {_kind(self.value)}")
        if not self.value:
            raise self.error("is an empty list")
        return [self[i] for i in range(len(self.value))]

    def text(self, choices: tuple[str, ...] | None = None) -> str:
        """A non-empty word, one of `choices` if there are any."""
        if not isinstance(self.value, str) or not self.value.strip() or "\0" in self.value:
            raise self.error(f"must be a word, not {_kind(self.value)}")
        if choices is not None and self.value not in choices:
            raise self.error(f"is '{self.value}'", nearest_of(self.value, choices))
        return self.value

    def number(self) -> float:
        """A finite number. `1e-5`, which YAML 1.1 reads as a word, counts as one."""
        value = self.value
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError
            number = float(value)
            # nan, infinity and text such as "1_000" are no numbers in a recipe
            if number - number != 0 or (isinstance(value, str) and "_" in value):
                raise ValueError
        except (ValueError, OverflowError):
            raise self.error(f"must be a finite number, not {_kind(value)}") from None
        return number

    def integer(self) -> int:
        """A whole number."""
        number = self.number()
        if number != int(number):
            raise self.error(f"must be a whole number, not {self.value}")
        return int(self.value) if isinstance(self.value, int) else int(number)

    def truth(self) -> bool:
        """True or false, in the spellings that YAML and mergekit take."""
        if isinstance(self.value, bool):
            return self.value
        word = str(self.value).lower()
        if isinstance(self.value, int | str) and word in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            return word in ("1", "true", "yes", "on")
        raise self.error(f"must be true or false, not {_kind(self.value)}")


def nearest_of(name: str, valid: tuple[str, ...]) -> str:
    """A hint for a mistyped word: the closest valid ones, or all of them."""
    close = get_close_matches(name, list(valid), n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "Valid here: " + ", ".join(sorted(valid)) + "."


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
