"""Key-value caches with room for tokens to come, and which models have nothing else to remember."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

ROOM = 64
"""Columns kept free for tokens to come when a cache (or mask) grows."""


def roomy_cache(config: Any, room: int = ROOM, *, whole: bool = False) -> Any:
    """transformers' own cache for `config`, its growing layers replaced by ones that write in place.

    With `whole` layers of sliding attention keep every token too, so that the cache can be cropped to any length.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=config)
    kept: dict[Any, Any] = {DynamicLayer: roomy_layer()} | (
        {DynamicSlidingWindowLayer: _whole_layer()} if whole else {}
    )
    cache.layers = [kept[type(layer)](room) if type(layer) in kept else layer for layer in cache.layers]
    return cache


def standard_cache(config: Any) -> bool:
    """Whether every layer remembers keys and values and nothing else."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    return all(type(layer) in (roomy_layer(), DynamicSlidingWindowLayer) for layer in roomy_cache(config).layers)


@lru_cache
def roomy_layer() -> type:
    """The cache layer that has room for tokens to come, made here because transformers is imported only when used."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """Keys and values are the start of larger tensors: a step writes one column instead of copying all of them."""

        buffers: tuple[Tensor, Tensor]
        length = 0

        def __init__(self, room: int = ROOM) -> None:
            super().__init__()
            self.room = room

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            new, start, self.length = (key_states, value_states), self.length, self.length + key_states.shape[-2]
            if start == 0:
                self.is_initialized, self.buffers = True, new
            else:
                old = self.buffers[0]  # one made in inference mode can't be written to outside of it
                if self.length > old.shape[-2] or (old.is_inference() and not torch.is_inference_mode_enabled()):
                    self._move(start, None)
                for buffer, states in zip(self.buffers, new, strict=True):
                    buffer[:, :, start : self.length] = states
            self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
            return self.keys, self.values

        def get_seq_length(self) -> int:
            return self.length

        def crop(self, tokens_to_remove: int) -> None:
            self.length -= abs(tokens_to_remove)  # what lies behind is written over
            if self.is_initialized:
                self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)

        def batch_select_indices(self, indices: Tensor) -> None:
            if self.length:
                self._move(self.length, indices)

        def _move(self, length: int, rows: Tensor | None) -> None:
            """Into larger buffers, all rows or the given ones."""
            moved = []
            for old in self.buffers:
                count, heads, _, size = old.shape
                columns = max(length, self.length) + max(self.room, length // 4)
                shape = (count if rows is None else len(rows), heads, columns, size)
                with torch.inference_mode(False):
                    new = old.new_empty(shape)
                if rows is None:
                    new[:, :, :length] = old[:, :, :length]
                else:
                    torch.index_select(old[:, :, :length], 0, rows, out=new[:, :, :length])
                moved.append(new)
            self.buffers = (moved[0], moved[1])
            self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    return RoomyLayer


@lru_cache
def _whole_layer() -> type:
    """For sliding attention: the mask hides what the window has left behind."""

    class WholeLayer(roomy_layer()):  # type: ignore[misc]
        """A sliding layer's keys and values, none forgotten."""

        is_sliding = True

    return WholeLayer
