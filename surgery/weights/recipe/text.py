"""YAML text into plain data with line numbers: size, depth, aliases, tags and double keys are checked first."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from surgery.errors import SurgeryError

MAX_BYTES = 1_000_000
MAX_NODES = 50_000  # after aliases are expanded
MAX_DEPTH = 40

# libyaml where PyYAML was built with it: ten times faster, the same language
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN = (str, int, float, bool, type(None))
Steps = tuple[str | int, ...]


@dataclass
class Document:
    """One YAML document: its data (dicts, lists, scalars), its name in messages, and the line of every path in it."""

    data: Any
    label: str
    lines: dict[Steps, int]


def read_documents(text_or_path: str | os.PathLike[str]) -> list[Document]:
    """All documents of a YAML text or file. A `Path`, or a one-line string without ": ", is taken for a file.

    Raises `SurgeryError` for anything that is not plain data of a sensible size.
    """
    text, label = _text_of(text_or_path)
    _check_events(text, label)
    documents: list[Document] = []
    loader = _LOADER(text)
    try:
        while loader.check_node():
            number = len(documents) + 1
            node = loader.get_node()
            lines = _lines_of(node, label)
            data = loader.construct_document(node)
            documents.append(Document(data, label if number == 1 else f"{label}, document {number}", lines))
    except (yaml.YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as problem:
        raise _not_yaml(problem, label) from None
    finally:
        loader.dispose()
    if len(documents) > 1:
        documents[0].label = f"{label}, document 1"
    for document in documents:
        _check_plain(document.data, document.label)
    documents = [d for d in documents if d.data is not None]
    if not documents:
        raise SurgeryError(f"{label} is empty.", hint="A recipe names a method and its models.")
    return documents


def scalar(text: str) -> Any:
    """What YAML makes of one value written on a command line: `0.2` a number, `[0, 1]` a list, `index` a word."""
    return read_documents("value: " + text)[0].data["value"]


def _text_of(text_or_path: str | os.PathLike[str]) -> tuple[str, str]:
    if isinstance(text_or_path, str):
        one_line = "\n" not in text_or_path and len(text_or_path) < 4096 and text_or_path.strip() != ""
        is_file = one_line and (":" not in text_or_path or os.path.isfile(text_or_path))
        if not is_file:
            if len(text_or_path) > MAX_BYTES:
                raise SurgeryError(f"The recipe has {len(text_or_path)} characters; at most {MAX_BYTES} are read.")
            return text_or_path, "The recipe"
    path = Path(text_or_path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise SurgeryError(
            f"The recipe file {str(path)!r} can't be read: {reason}.", hint="Give the path of a YAML file."
        ) from None
    if len(raw) > MAX_BYTES:
        raise SurgeryError(f"{path} is larger than {MAX_BYTES} bytes: this is not a recipe.")
    try:
        return raw.decode("utf-8-sig"), str(path)
    except UnicodeDecodeError:
        raise SurgeryError(f"{path} is not UTF-8 text.", hint="A recipe is a YAML file.") from None


def _check_events(text: str, label: str) -> None:
    """Walk the parser's events, which cost no memory, so that a bomb is refused before it is built."""
    anchored: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # (anchor, nodes so far) of each collection we are in
    total = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            size = 0
            if isinstance(event, yaml.DocumentStartEvent):
                anchored.clear()
            if isinstance(event, yaml.AliasEvent):
                if event.anchor not in anchored:
                    raise _refused(event, label, f"the alias '*{event.anchor}' has no finished anchor before it")
                size = anchored[event.anchor]
            elif isinstance(event, yaml.NodeEvent):
                tag = getattr(event, "tag", None)
                if tag not in (None, "!"):
                    raise _refused(event, label, f"the tag '{tag}' is not allowed: a recipe is plain data")
                if isinstance(event, yaml.CollectionStartEvent):
                    open_.append((event.anchor, 1))
                    if len(open_) > MAX_DEPTH:
                        raise _refused(event, label, f"nested deeper than {MAX_DEPTH} levels")
                else:
                    size = 1
                    if event.anchor is not None:
                        anchored[event.anchor] = 1
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, size = open_.pop()
                if anchor is not None:
                    anchored[anchor] = size
            if size and open_:
                anchor, so_far = open_[-1]
                open_[-1] = (anchor, so_far + size)
            total += size if isinstance(event, yaml.AliasEvent) else 1
            if total > MAX_NODES:
                raise _refused(event, label, f"more than {MAX_NODES} values, aliases included")
    except (yaml.YAMLError, ValueError) as problem:
        raise _not_yaml(problem, label) from None


def _lines_of(root: yaml.Node, label: str) -> dict[Steps, int]:
    """The line of every path; a key written twice in one mapping is refused (YAML would silently take the last)."""
    lines: dict[Steps, int] = {}
    stack: list[tuple[yaml.Node, Steps]] = [(root, ())]
    while stack:
        node, path = stack.pop()
        lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            stack += [(child, (*path, i)) for i, child in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, child in node.value:
                word = key.value if isinstance(key, yaml.ScalarNode) else None
                if word is None:
                    raise _refused(key, label, "a key must be a word")
                if word in seen and word != "<<":
                    raise _refused(key, label, f"the key '{word}' is written twice in one mapping")
                seen.add(word)
                lines.setdefault((*path, word), key.start_mark.line + 1)
                stack.append((child, (*path, word)))
    return lines


def _check_plain(root: Any, label: str) -> None:
    stack = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            stack += value
        elif not isinstance(value, _PLAIN):
            raise SurgeryError(
                f"{label}: the value {str(value)!r} was read as a {type(value).__name__}.",
                hint="Put it in quotes if it is a name.",
            )


def _refused(thing: Any, label: str, why: str) -> SurgeryError:
    return SurgeryError(f"{label}, line {thing.start_mark.line + 1}: {why}.")


def _not_yaml(problem: Exception, label: str) -> SurgeryError:
    mark = getattr(problem, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark is not None else ""
    what = getattr(problem, "problem", None) or str(problem).splitlines()[0] if str(problem) else "unreadable"
    return SurgeryError(f"{label}{where}: this is not YAML: {what}.")
