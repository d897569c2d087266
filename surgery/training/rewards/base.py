"""What a reward is, how one is called, and what happens when it answers nonsense.

A reward is any callable `reward(prompts, completions, **columns) -> list[float | None]`: one value per completion,
in order; None means "I do not score this row". Prompts and completions are strings, or lists of chat messages when
the row's prompt is one. The keyword arguments are those of TRL (`completion_ids`, `trainer_state`, `log_extra`,
`log_metric`, every data column as a list) and `truncated`, `step`, `group_size`; a function gets those its signature
names, or all of them when it takes `**kwargs`. A callable with the attribute `group = True` sees one group at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from surgery.registry import Registry

Reward = Callable[..., list[float | None]]
Row = Mapping[str, Any]

REWARDS: Registry[Callable[..., Reward]] = Registry("reward")
"""Factories by name: keyword parameters with defaults in, a reward out."""

PROVIDED = {
    "prompts", "completions", "completion_ids", "truncated",
    "group_size", "step", "trainer_state", "log_extra", "log_metric",
}  # fmt: skip
"""Keyword arguments that are not data columns."""


class Completed(Protocol):
    """What a reward needs of a rollout."""

    @property
    def text(self) -> str:
        """The completion, special tokens skipped."""
        ...

    @property
    def completion_ids(self) -> list[int]:
        """Token ids of the completion, the EOS included."""
        ...

    @property
    def truncated(self) -> bool:
        """Whether no EOS came within the limit."""
        ...


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or the content of the last message of a chat."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def rows_of(prompts: Sequence[Any], columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The data rows back from a reward's arguments: each with its prompt and the columns that hold a value a row."""
    n = len(prompts)
    lists = {k: v for k, v in columns.items() if isinstance(v, list | tuple) and len(v) == n}
    return [{"prompt": prompts[i], **{k: v[i] for k, v in lists.items()}} for i in range(n)]
