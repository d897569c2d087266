"""The least work of a patching sweep in multiply-adds: what `patching.py` divides by a trunk's rate to get a floor.

Counted are the products with weights and those of attention, as far as a change reaches: suffix only, blocks above
only, a head's cell from the middle of its block, in the last block keys and values of all tokens but the query and the
MLP of the answer's alone, and two rows of the unembedding; besides them both recorded runs, cut in the same way. A cell
that can't change anything (nothing differs up to there, or in layer 0 at the token itself) costs nothing. Norms,
activations, rotations and copies are in the rate: it is what the model's own trunk reaches on a well-filled batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Work:
    """Multiply-adds of the parts of a block of GPT-2 or Llama: for one token if nothing else is said."""

    layers: int
    heads: int
    kv_heads: int
    d_head: int
    d_model: int
    mlp: int
    """All of the MLP."""

    @classmethod
    def of(cls, config: Any) -> Work:
        """From a configuration."""
        d, heads = config.hidden_size, config.num_attention_heads
        gated = config.model_type == "llama"
        mlp = 3 * d * config.intermediate_size if gated else 2 * d * (config.n_inner or 4 * d)
        kv_heads = getattr(config, "num_key_value_heads", heads)
        return cls(config.num_hidden_layers, heads, kv_heads, d // heads, d, mlp)

    @property
    def query(self) -> int:
        """The query projection; the output projection is as large."""
        return self.d_model * self.heads * self.d_head

    @property
    def keys_values(self) -> int:
        """Both projections."""
        return 2 * self.d_model * self.kv_heads * self.d_head

    def attention(self, start: int, length: int, heads: int | None = None) -> int:
        """Scores and mixing of the tokens from `start` on, each of which sees itself and all before it."""
        seen = (length - start) * (start + 1 + length) // 2
        return 2 * (self.heads if heads is None else heads) * self.d_head * seen

    def block(self, start: int, length: int) -> int:
        """A block on the tokens from `start` on."""
        token = 2 * self.query + self.keys_values + self.mlp
        return (length - start) * token + self.attention(start, length)

    def last_block(self, start: int, length: int) -> int:
        """The last block: all keys and values, and the rest for the last token."""
        one = 2 * self.query + self.mlp + self.attention(length - 1, length)
        return (length - start) * self.keys_values + one

    def above(self, layer: int, start: int, length: int) -> int:
        """Everything from the stream before block `layer` to the two logits of the answers."""
        inside = max(0, self.layers - 1 - layer) * self.block(start, length)
        return inside + (self.last_block(start, length) if layer < self.layers else 0) + 2 * self.d_model

    def trunk(self, length: int) -> int:
        """A whole forward without unembedding."""
        return self.layers * self.block(0, length)


def least(work: Work, clean: Tensor, corrupt: Tensor, site: str) -> int:
    """Multiply-adds of `patch(model, clean, corrupt, logit_diff(answers), site)` at least, for prompts (batch, pos)."""
    rows, length = clean.shape
    total = 2 * rows * work.above(0, 0, length)
    differs = clean != corrupt
    for row in differs.tolist():
        if True in row:
            first = row.index(True)
            total += _residual(work, row, first) if site == "resid_pre" else _heads(work, site, first, length)
    return total


def _residual(work: Work, differs: list[bool], first: int) -> int:
    """The cells of one example, by layer and position."""
    length, total = len(differs), 0
    for position in range(first, length):
        layers = range(0 if differs[position] else 1, work.layers)
        total += sum(work.above(layer, position, length) for layer in layers)
    return total


def _heads(work: Work, site: str, first: int, length: int) -> int:
    """The cells of one example, by layer and head (key-value head), all positions from `first` on at once."""
    together = work.heads // work.kv_heads if site in ("k", "v") else 1
    total = 0
    for layer in range(work.layers):
        start = first if layer < work.layers - 1 else length - 1
        cell = (length - start) * (together * work.d_head * work.d_model + work.mlp)
        if site != "z":
            cell += work.attention(start, length, together)
        total += work.heads // together * (cell + work.above(layer + 1, first, length))
    return total
