"""The loop that draws token after token from a decoder; rows leave when they have ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from surgery.decoding.causal import Decoder
from surgery.decoding.sampling import Sampling, draw

LEAVE = 0.75
"""Ended rows leave the batch once at most this share goes on: leaving costs a copy of the cache."""
Stopped = Callable[[Tensor, Tensor], Tensor]
"""(tokens so far (row, pos), which rows still go on (row,)) -> which rows' text holds a stop string (row,)."""
Watch = Callable[[Tensor, Tensor, Tensor, Any], None]
"""Called after each draw with (number of each row, whether it still went on, its token, the state of its logits)."""


def decode(
    decoder: Decoder,
    logits: Tensor,
    state: Any,
    noise: Tensor,
    sampling: Sampling,
    ends: Collection[int],
    stopped: Stopped | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[int, tuple[list[int], list[float]]]]:
    """Draws until every row has ended; yields (row, (its tokens, their log-probabilities)) as rows leave.

    `logits` (row, vocab) and `state` come from the decoder's `prefill`; `noise` is (row, new tokens) in [0, 1). Stopped
    by Ctrl-C it yields every row as far as it came before KeyboardInterrupt goes on.
    """
    is_end = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    is_end[[token for token in ends if token < logits.shape[1]]] = True
    rows = torch.arange(len(logits), device=logits.device)
    alive, lengths = torch.ones_like(rows, dtype=torch.bool), torch.zeros_like(rows)
    tokens, log_probs = torch.empty_like(noise, dtype=torch.long), torch.empty_like(noise)
    try:
        for t in range(noise.shape[1]):
            tokens[:, t], log_probs[:, t] = drawn, _ = draw(logits, noise[:, t], sampling)
            lengths += alive
            if watch is not None:
                watch(rows, alive, drawn, state)
            alive &= ~is_end[drawn]
            if stopped is not None:
                alive &= ~stopped(tokens[:, : t + 1], alive)
            left = int(alive.sum())
            if left == 0 or t + 1 == noise.shape[1]:
                break
            if left <= LEAVE * len(alive):
                yield from _leave(rows[~alive], tokens[~alive], log_probs[~alive], lengths[~alive])
                kept = alive.nonzero().squeeze(1)
                state = state.select(kept)
                rows, alive, lengths, noise = rows[kept], alive[kept], lengths[kept], noise[kept]
                tokens, log_probs, drawn = tokens[kept], log_probs[kept], drawn[kept]
            logits, state = decoder.step(drawn, state)
    except KeyboardInterrupt:
        yield from _leave(rows, tokens, log_probs, lengths)
        raise
    yield from _leave(rows, tokens, log_probs, lengths)


def _leave(*columns: Tensor) -> Iterator[tuple[int, tuple[list[int], list[float]]]]:
    for row, tokens, log_probs, length in zip(*(column.tolist() for column in columns), strict=True):
        yield row, (tokens[:length], log_probs[:length])
