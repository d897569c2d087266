"""Requests to be turned into tool calls, as JSON lines in a `<tool_call>` block (ToolRL, arXiv:2504.13958)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from surgery.tasks.base import Example, Size, counted, draw, task

Call = dict[str, Any]
"""`{"name": tool, "parameters": {parameter: value}}`"""

_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Kyoto", "Quito", "Dakar", "Turin")
_PEOPLE = ("Ada", "Bo", "Chen", "Dina", "Emil", "Fay")
_WORDS = ("milk", "the report", "a taxi", "lunch", "the meeting", "flowers")

TOOLS: dict[str, tuple[dict[str, Sequence[Any]], str]] = {
    "weather": ({"city": _CITIES, "days": range(2, 8)}, "tell me the weather in {city} for the next {days} days"),
    "remind": ({"what": _WORDS, "hour": range(6, 23)}, "remind me of {what} at {hour} o'clock"),
    "message": ({"to": _PEOPLE, "text": _WORDS}, "write to {to} about {text}"),
    "convert": ({"amount": range(5, 500), "source": ("EUR", "USD", "JPY"), "target": ("GBP", "CHF", "INR")},
                "convert {amount} {source} to {target}"),
    "book": ({"city": _CITIES, "nights": range(2, 10), "breakfast": (True, False)},
             "book a room in {city} for {nights} nights {breakfast}"),
    "add": ({"a": range(100), "b": range(100)}, "add {a} and {b}"),
}  # fmt: skip
"""Tools: the values that each parameter may have, and a sentence that asks for a call."""


def written(calls: list[Call]) -> str:
    """The block that makes `calls`, one JSON object a line."""
    return "\n".join(["<tool_call>", *map(json.dumps, calls), "</tool_call>"])


def parsed(completion: str) -> list[Call] | None:
    """The calls of the only `<tool_call>` block, or None when there is none, or more, or one call isn't well formed."""
    blocks = _BLOCK.findall(completion)
    if len(blocks) != 1:
        return None
    try:
        calls = [json.loads(line) for line in blocks[0].splitlines() if line.strip()]
    except (ValueError, RecursionError):
        return None
    proper = all(
        isinstance(c, dict) and c.keys() == {"name", "parameters"} and isinstance(c["parameters"], dict) for c in calls
    )
    return calls if proper else None


def called(completion: str, row: Mapping[str, Any]) -> bool:
    """Whether the completion makes the row's calls, in their order, with equal values of the same type."""
    calls = parsed(completion)
    return calls is not None and json.dumps(calls, sort_keys=True) == json.dumps(row["calls"], sort_keys=True)


@task("tools", "a request in words, to be turned into tool calls in JSON", called)
def tools(rng: Random, *, calls: Size = (1, 3), offered: Size = 4) -> Example:
    """`offered` tools are described, `calls` calls of some of them are asked for; the column `calls` holds these."""
    n, count = draw(rng, "calls", calls, 1, 6), draw(rng, "offered", offered, 1, len(TOOLS))
    names = rng.sample(sorted(TOOLS), count)
    gold, asked = list[Call](), list[str]()
    for _ in range(n):
        name = rng.choice(names)
        values, sentence = TOOLS[name]
        parameters = {key: rng.choice(choices) for key, choices in values.items()}
        spoken = {k: ("with breakfast" if v else "without breakfast") if v is True or v is False else v
                  for k, v in parameters.items()}  # fmt: skip
        gold.append({"name": name, "parameters": parameters})
        asked.append(sentence.format(**spoken))
    described = "\n".join(f"{name}({', '.join(TOOLS[name][0])})" for name in names)
    request = ", then ".join(asked)
    prompt = (
        f"Tools:\n{described}\nAnswer with one JSON object a line, "
        f'{{"name": ..., "parameters": {{...}}}}, between <tool_call> and </tool_call>.\n'
        f"Request: {request[0].upper()}{request[1:]}.\n"
    )
    response = written(gold)
    return Example(prompt, response, json.dumps(gold), n, counted(n, "call"), {"calls": gold})
