"""The k best contexts of each latent, one a text, kept while text streams by: memory is latents x k x window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from analysis.features.reader import Read
from surgery.errors import SurgeryError

LIMIT = 2 << 30
"""Bytes that contexts may take."""


class Seen(NamedTuple):
    """The codes of a batch, one entry each."""

    latent: np.ndarray
    """Its place among the chosen ones."""
    row: np.ndarray
    """Row of the batch."""
    position: np.ndarray
    """Place among the text's tokens."""
    value: np.ndarray

    def only(self, keep: np.ndarray) -> Seen:
        """Those where `keep` is True."""
        return Seen(*(column[keep] for column in self))

    @classmethod
    def of(cls, read: Read, place: np.ndarray) -> Seen:
        """Of a batch, the latents whose `place` (latents,) is not -1."""
        layout = read.codes.layout
        token = layout.rows.cpu().numpy()
        position = read.batch.positions[read.kept].cpu().numpy()
        found = cls(place[layout.index.cpu().numpy()], read.texts.cpu().numpy()[token], position[token],
                    read.codes.values.float().cpu().numpy())  # fmt: skip
        return found.only(found.latent >= 0)


@dataclass
class Tokens:
    """The tokens of a batch, padded on the right: ids -1 beyond an end; whether each counts."""

    ids: np.ndarray
    kept: np.ndarray
    lengths: np.ndarray
    first: int
    """Number of the first text."""

    @classmethod
    def of(cls, read: Read, first: int) -> Tokens:
        batch = read.batch
        ids, kept = np.full(batch.ids.shape, -1), np.zeros(batch.ids.shape, dtype=bool)
        places = batch.positions[batch.mask].cpu().numpy()
        rows = batch.mask.nonzero()[:, 0].cpu().numpy()
        ids[rows, places] = batch.ids[batch.mask].cpu().numpy()
        kept[rows, places] = read.kept[batch.mask].cpu().numpy()
        return cls(ids, kept, batch.lengths.cpu().numpy(), first)


class Best:
    """Of each of `latents` latents the `k` contexts with the greatest scores, the earlier text first where equal.

    A context is `before` tokens, the token and `after` tokens: fewer only where the text is shorter.
    Raises `SurgeryError` for more than `LIMIT` bytes.
    """

    def __init__(self, latents: int, k: int, before: int, after: int) -> None:
        if k < 0 or before < 0 or after < 0:
            raise SurgeryError(f"Examples ({k}) and their tokens before ({before}) and after ({after}) are 0 or more.")
        width = before + 1 + after
        if (bytes_ := latents * k * (8 * width + 40)) > LIMIT:
            raise SurgeryError(f"{k} contexts of {width} tokens for each of {latents:,} latents are "
                               f"{bytes_ / 2**30:.1f} GiB.", hint="Choose latents, or shorter contexts.")  # fmt: skip
        self.k, self.before, self.width = k, before, width
        self.score = np.full((latents, k), -np.inf)
        self.value = np.zeros((latents, k), dtype=np.float32)
        self.text, self.position, self.start = (np.full((latents, k), -1, dtype=np.int64) for _ in range(3))
        self.ids = np.full((latents, k, width), -1, dtype=np.int32)
        self.activations = np.full((latents, k, width), np.nan, dtype=np.float32)

    def offer(self, seen: Seen, score: np.ndarray, tokens: Tokens) -> None:
        """Takes what is better than what there is, of a batch's codes; `seen` and `score` of the same codes."""
        if not self.k:
            return
        better = score > self.score[seen.latent, -1]
        found, score = seen.only(better), score[better]
        order = np.lexsort((found.position, -score, found.row, found.latent))  # the best of each text
        found, score = found.only(order), score[order]
        new = (np.diff(found.latent, prepend=-1) != 0) | (np.diff(found.row, prepend=-1) != 0)
        found, score = found.only(new), score[new]
        order = np.lexsort((found.row, -score, found.latent))  # the k best of each latent
        found, score = found.only(order), score[order]
        mine, begins, which = np.unique(found.latent, return_index=True, return_inverse=True)
        rank = np.arange(len(score)) - begins[which]
        first = rank < self.k
        found, score, rank, which = found.only(first), score[first], rank[first], which[first]
        if len(score):
            self._merge(mine, which, rank, found, score, seen, tokens)

    def _merge(
        self, mine: np.ndarray, which: np.ndarray, rank: np.ndarray, found: Seen, score: np.ndarray, seen: Seen,
        tokens: Tokens,
    ) -> None:  # fmt: skip
        start = np.clip(np.minimum(found.position - self.before, tokens.lengths[found.row] - self.width), 0, None)
        columns = start[:, None] + np.arange(self.width)
        inside = columns < tokens.lengths[found.row][:, None]
        place = found.row[:, None], np.minimum(columns, tokens.ids.shape[1] - 1)
        new = {
            "score": score, "value": found.value, "text": tokens.first + found.row, "position": found.position,
            "start": start, "ids": np.where(inside, tokens.ids[place], -1),
            "activations": np.where(inside & tokens.kept[place], _looked_up(found, columns, seen, tokens), np.nan),
        }  # fmt: skip
        scores = np.full((len(mine), self.k), -np.inf)
        scores[which, rank] = score
        both = np.concatenate([self.score[mine], scores], axis=1)
        order = np.argsort(-both, axis=1, kind="stable")[:, : self.k]
        for name, values in new.items():
            there = getattr(self, name)
            offered = np.zeros((len(mine), *there.shape[1:]), dtype=there.dtype)
            offered[which, rank] = values
            offered = np.concatenate([there[mine], offered], axis=1)
            chosen = offered[np.arange(len(mine))[:, None], order]
            if name == "score":
                chosen = np.take_along_axis(both, order, axis=1)
            there[mine] = chosen


def _looked_up(found: Seen, columns: np.ndarray, seen: Seen, tokens: Tokens) -> np.ndarray:
    """(contexts, width) activations of each context's latent; 0 where it is not active."""
    rows, wide = tokens.ids.shape
    keys = (seen.latent * rows + seen.row) * wide + seen.position
    order = np.argsort(keys)
    keys, values = keys[order], seen.value[order]
    wanted = ((found.latent * rows + found.row) * wide)[:, None] + columns
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((keys[at] == wanted) & (columns < wide), values[at], 0.0)


def lots(seed: int, text: np.ndarray, position: np.ndarray, latent: np.ndarray) -> np.ndarray:
    """A number from 0 to 1 for each code, by chance but for ever the same (splitmix64), whatever the batches are."""
    mixed = np.full(text.shape, seed, dtype=np.uint64)
    for part in (text, position, latent):
        mixed = mixed + np.uint64(0x9E3779B97F4A7C15) + part.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed.astype(np.float64) / 2.0**64
