"""A number (or one a layer) for every token of texts: its mean, where it is greatest, the text coloured by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from analysis.results import Result
from surgery.activations.interventions import unwrapped
from surgery.errors import SurgeryError
from surgery.models import Batch, Pair, encode

if TYPE_CHECKING:
    from analysis.html import Html


class Hit(NamedTuple):
    """One token with its value."""

    value: float
    text: int
    position: int
    token: str
    context: str
    """The tokens up to it."""


@dataclass(frozen=True, eq=False)
class Texts:
    """Rows of token ids, and the place of each token when all rows are laid end to end."""

    rows: list[list[int]]
    tokenizer: Any = None

    @classmethod
    def of(cls, pair: Pair, texts: Any, max_tokens: int) -> Texts:
        """The first `max_tokens` tokens of each text, or fewer where a model's context ends before.

        `texts` is a `Batch`, or a list of texts, chats or lists of token ids. Raises `SurgeryError` when there is none,
        when one has no tokens, and when the two tokenizers read one differently.
        """
        if max_tokens < 1:
            raise SurgeryError(f"max_tokens is at least 1, and not {max_tokens}.")
        if isinstance(texts, Batch):
            rows = [row[real].tolist() for row, real in zip(texts.ids, texts.mask, strict=True)]
        else:
            rows = pair.rows(texts)
        configs = [unwrapped(model).config.get_text_config() for model in (pair.base, pair.tuned)]
        contexts = [getattr(config, "max_position_embeddings", None) for config in configs]
        longest = min([max_tokens, *(c for c in contexts if c)])
        if [] in rows:
            raise SurgeryError(f"Text {rows.index([])} has no tokens.")
        return cls([row[:longest] for row in rows], pair.tokenizer)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(texts,) number of tokens."""
        return np.array([len(row) for row in self.rows])

    @cached_property
    def starts(self) -> np.ndarray:
        """(texts,) place of each first token."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def total(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum())

    def places(self, texts: Iterable[int]) -> np.ndarray:
        """The places of all tokens of some texts, one text after the other."""
        return np.concatenate([np.arange(self.starts[i], self.starts[i] + self.lengths[i]) for i in texts])

    def words(self, text: int) -> list[str]:
        """The tokens of one text as they read; by number where there is no tokenizer."""
        row = self.rows[text]
        return [f"<{i}>" for i in row] if self.tokenizer is None else encode(None, [row]).tokens(self.tokenizer)[0]

    def hit(self, place: int, value: float, context: int = 8) -> Hit:
        """The token at a place, with a value and the `context` tokens before it."""
        text = int(np.searchsorted(self.starts, place, side="right")) - 1
        position, words = int(place - self.starts[text]), self.words(text)
        return Hit(value, text, position, words[position], "".join(words[max(0, position - context) : position + 1]))


@dataclass(frozen=True, eq=False)
class PerToken:
    """What was measured at every token. `result` has its mean with an interval, `html` the texts coloured by it."""

    name: str
    values: np.ndarray
    """(tokens,) or (tokens, layer), text after text."""
    texts: Texts
    layers: Sequence[int] | None = None
    """What the second axis counts; None where there is one value a token."""

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def result(self) -> Result:
        """(example,) or (example, layer), whose mean is that over all tokens: texts count by their length.

        Each value is a text's sum over the mean number of tokens; the interval resamples whole texts.
        """
        columns = {"tokens": self.texts.lengths.tolist()}
        return Result(self._sums, self._axes, self.name, columns).normalized("tokens", name=self.name, tolerance=0.0)

    @cached_property
    def per_text(self) -> Result:
        """(example,) or (example, layer): each text's mean over its tokens; in the mean all texts count alike."""
        lengths = self.texts.lengths
        values = self._sums / lengths.reshape(-1, *[1] * (self._sums.ndim - 1))
        return Result(values, self._axes, self.name, {"tokens": lengths.tolist()})

    @cached_property
    def _sums(self) -> np.ndarray:
        return np.add.reduceat(self.values.astype(np.float64), self.texts.starts, axis=0)

    @property
    def _axes(self) -> dict[str, Any]:
        layers = {} if self.layers is None else {"layer": self.layers}
        return {"example": range(len(self.texts)), **layers}

    def of(self, text: int, layer: int | None = None) -> np.ndarray:
        """(pos,) the values of one text."""
        start = self.texts.starts[text]
        return self._column(layer)[start : start + self.texts.lengths[text]]

    def top(self, k: int = 10, *, layer: int | None = None, context: int = 8) -> list[Hit]:
        """The k tokens with the greatest values, each with the `context` tokens before it."""
        values = self._column(layer)
        order = np.argsort(-values, kind="stable")[:k]
        return [self.texts.hit(int(place), float(values[place]), context) for place in order]

    def html(self, which: int | Sequence[int] = 8, *, layer: int | None = None, title: str = "") -> Html:
        """Texts coloured by value: those named, or the `which` with the greatest mean."""
        from analysis.html import coloured_many

        means = [float(self.of(i, layer).mean()) for i in range(len(self.texts))]
        chosen = np.argsort(np.negative(means), kind="stable")[:which].tolist() if isinstance(which, int) else which
        texts = [(self.texts.words(i), self.of(i, layer).tolist(), self.texts.rows[i]) for i in chosen]
        captions = [f"text {i}, mean {means[i]:.3g}" for i in chosen]
        where = "" if self.layers is None else f", layer {layer}"
        return coloured_many(texts, title=title or self.name + where, captions=captions, unit=self.name)

    def _column(self, layer: int | None) -> np.ndarray:
        """(tokens,). Raises `SurgeryError` when no layer is named and there are several, or the named one is none."""
        if self.layers is None:
            return self.values
        if layer is None or layer not in self.layers:
            wrong = "none is named" if layer is None else f"not {layer}"
            raise SurgeryError(f"'{self.name}' has a value for each layer of {list(self.layers)}, and {wrong}.",
                               hint="Pass layer=.")  # fmt: skip
        return self.values.take(list(self.layers).index(layer), axis=1)
