"""Tied and untied heads: inputs of a merge get the same tensors, so that no head is lost or written in vain.

A tied checkpoint has no head of its own, even where its files store one: transformers ignores that on load. When all
inputs are tied, so is the output; when some are not, the tied ones lend their embedding as a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery import anatomy
from surgery.checkpoint.adapter import tied_pair
from surgery.checkpoint.companions import companion_folder
from surgery.checkpoint.reader import Source

if TYPE_CHECKING:
    from torch import Tensor


def with_like_heads(sources: Sequence[Source]) -> list[Source]:
    """The sources, all with a head tensor or all without one."""
    heads = [None if tied_pair(source) else anatomy.output_head(source.tensors) for source in sources]
    name = next((head for head in heads if head), None)
    if name is None:
        return [_without_head(source) for source in sources]
    out: list[Source] = []
    for source, head in zip(sources, heads, strict=True):
        embedding = anatomy.input_embedding(source.tensors)
        lends = head is None and embedding is not None and tied_pair(source) is not None
        out.append(_Reheaded(source, name, embedding) if lends else source)
    return out


def head_is_copied(source: Source) -> bool:
    """Whether `with_like_heads` made the source's head from its embedding."""
    return isinstance(source, _Reheaded) and source.embedding is not None


def _without_head(source: Source) -> Source:
    stored = anatomy.output_head(source.tensors) if tied_pair(source) else None
    return source if stored is None else _Reheaded(source, stored, None)


class _Reheaded:
    """A source whose head is its embedding, or is left out."""

    def __init__(self, source: Source, head: str, embedding: str | None) -> None:
        self._source, self._head, self.embedding = source, head, embedding
        self.path, self.config = companion_folder(source), source.config
        self.tensors = {name: info for name, info in source.tensors.items() if name != head}
        if embedding is not None:
            self.tensors[head] = replace(source.tensors[embedding], name=head)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """As `Source.read`."""
        own = self.embedding if name == self._head and self.embedding is not None else name
        return self._source.read(own, start, stop)
