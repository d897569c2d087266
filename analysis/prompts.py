"""What the functions that ask a model something take: prompts, how far they are, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Progress", "Prompt", "by_length"]

Progress = Callable[[int, int], None]
"""Called with (examples done, examples in all) after each batch."""
Prompt = str | Sequence[Mapping[str, Any]]
"""Text, or the messages of a chat."""


def by_length(rows: Sequence[Sequence[int]], size: int, progress: Progress | None = None) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
        if progress:
            progress(min(start + size, len(order)), len(order))
