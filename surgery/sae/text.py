"""Texts for dictionaries: as sequences of tokens, in batches, some of them held out.

    text = Text(rows_of({"file": "plays.txt"}), tokenizer, Reading(context=128))
    stream = Stream(model, ["resid_post.2"], text, keep=counted)

Texts are laid end to end with an end mark between them and cut into sequences of `context` tokens, or read one by one
and padded. A row is a `text`, or a `prompt` with its `completion`. Read to the end they are read again, in another
order; the order is a function of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.models import Batch, encoded_prompts, pad_id, tokenized
from surgery.training.data import Row, Rows, encoded_completions
from surgery.training.recipe import Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sequenced = tuple[list[int], list[bool]]
"""Tokens, and which of them count."""
AT_ONCE = 256
"""Rows that are tokenised in one call."""


class Reading(Part):
    """How texts are read."""

    context: int = Field(256, ge=2, description="tokens of a sequence; of a text that is read by itself the first ones")
    packing: bool = Field(True, description="texts end to end, cut into sequences; else one by one, padded")
    batch: int = Field(16, ge=1, description="sequences in one pass of the model")
    positions: Literal["all", "completion", "last"] = Field("all", description="tokens that count")
    skip: int = Field(1, ge=0, description="first tokens of a sequence that do not count: activations there are sinks")
    longest: float = Field(10.0, ge=0, description="rows so many times as long as the median are sinks too (0: none)")
    chat: bool = Field(False, description="prompts go into the chat template")
    held_out: int = Field(20, ge=2, description="of every so many sequences one is kept for evaluation; of several "
                          "data mixed, of every so many rows of a file")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Counted(Batch):
    """A batch that says which tokens count."""

    counts: Tensor
    """(batch, pos) bool; False on padding."""


def counted(batch: Batch) -> Tensor:
    """The tokens that count, for a `Stream`."""
    if not isinstance(batch, Counted):
        raise SurgeryError("These batches do not say which tokens count.", hint="keep=real_tokens(1)")
    return batch.counts


class Text:
    """Batches of sequences without end, each of them in its turn; `held_out()` are others.

    Rows of known number are tokenised when first needed, all of them. Raises `SurgeryError` for rows that are neither
    text nor prompt, and where no sequence comes about.
    """

    def __init__(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, reading: Reading, seed: int = 0) -> None:
        self.rows, self.tokenizer, self.reading, self.seed = rows, tokenizer, reading, seed
        self.columns = ("text",) if "text" in rows.columns else ("prompt", "completion")
        check(rows, reading)
        self._known: list[Sequenced] | None = None

    def __iter__(self) -> Iterator[Counted]:
        source = self._forever()
        while group := list(islice(source, self.reading.batch)):
            yield self._batch(group)

    def held_out(self, sequences: int) -> list[Counted]:
        """The first so many sequences of those that are never trained on (fewer where there are fewer)."""
        found = list(islice((s for n, s in self._sequences() if self._kept_out(n)), sequences))
        if not found:
            raise SurgeryError(f"The texts make fewer than {self.reading.held_out} sequences: none is left to "
                               "evaluate on.", hint="Give more text, or a smaller context or held_out.")  # fmt: skip
        size = self.reading.batch
        return [self._batch(found[i : i + size]) for i in range(0, len(found), size)]

    def first(self, sequences: int) -> list[Counted]:
        """The first so many sequences, held out or not."""
        found = [sequence for _, sequence in islice(self._sequences(), sequences)]
        if not found:
            raise SurgeryError("The texts make no sequence to read.", hint="Give more text, or a smaller context.")
        size = self.reading.batch
        return [self._batch(found[i : i + size]) for i in range(0, len(found), size)]

    def _kept_out(self, number: int) -> bool:
        return number % self.reading.held_out == self.reading.held_out - 1

    def _forever(self) -> Iterator[Sequenced]:
        """Sequences to train on: of endless rows as they come, of others again and again, shuffled each time."""
        if self.rows.size == math.inf:
            yield from (s for n, s in self._sequences() if not self._kept_out(n))
            return
        mine = [s for n, s in self._sequences() if not self._kept_out(n)]
        if not mine:
            raise SurgeryError("The texts make no sequence to read.", hint="Give more text, or a smaller context.")
        for epoch in count():
            order = list(range(len(mine)))
            Random(f"{self.seed}/text/{epoch}").shuffle(order)
            yield from (mine[i] for i in order)

    def _sequences(self) -> Iterator[tuple[int, Sequenced]]:
        """Every sequence with its number, always the same."""
        if self.rows.size == math.inf:
            return enumerate(self._cut(self._documents()))
        if self._known is None:
            self._known = list(self._cut(self._documents()))
        return enumerate(self._known)

    def _documents(self) -> Iterator[Sequenced]:
        """Each row's tokens, and which of them count by `positions`."""
        numbers = count() if self.rows.size == math.inf else range(int(self.rows.size))
        source = iter(numbers)
        while group := [self.rows.row(n) for n in islice(source, AT_ONCE)]:
            yield from self._tokens(group)

    def _tokens(self, rows: Sequence[Row]) -> Iterator[Sequenced]:
        of, reading = self.tokenizer, self.reading
        if self.columns == ("text",):
            for ids in tokenized(of, [str(row["text"]) for row in rows], special=True):
                yield ids, [True] * len(ids)
            return
        prompts = encoded_prompts(of, [row["prompt"] for row in rows], reading.chat)
        answers = encoded_completions(of, [str(row.get("completion", "")) for row in rows])
        for prompt, answer in zip(prompts, answers, strict=True):
            yield [*prompt, *answer], [reading.positions != "completion"] * len(prompt) + [True] * len(answer)

    def _cut(self, documents: Iterator[Sequenced]) -> Iterator[Sequenced]:
        width = self.reading.context
        if not self.reading.packing:
            yield from ((ids[:width], counts[:width]) for ids, counts in documents if ids)
            return
        end = self.tokenizer.eos_token_id
        ids: list[int] = []
        counts: list[bool] = []
        for more, which in documents:
            ids, counts = [*ids, *more], [*counts, *which]
            if end is not None and ids and ids[-1] != end:
                ids.append(end)
                counts.append(False)
            starts = range(0, len(ids) - width + 1, width)
            yield from ((ids[i : i + width], counts[i : i + width]) for i in starts)
            ids, counts = ids[len(starts) * width :], counts[len(starts) * width :]
        if len(ids) > 1:
            yield ids, counts

    def _batch(self, group: Sequence[Sequenced]) -> Counted:
        width = max(len(ids) for ids, _ in group)
        ids = torch.full((len(group), width), pad_id(self.tokenizer))
        mask, counts = (torch.zeros(len(group), width, dtype=torch.bool) for _ in range(2))
        for row, (tokens, which) in enumerate(group):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), True
            counts[row, : len(tokens)] = torch.tensor(which)
        counts[:, : self.reading.skip] = False
        if self.reading.positions == "last":
            last = torch.tensor([len(tokens) - 1 for tokens, _ in group])
            counts &= torch.arange(width) == last[:, None]
        return Counted(ids, mask, counts)


def check(rows: Rows, reading: Reading) -> None:
    """Raises `SurgeryError` for rows that can't be read like this, whatever is in them."""
    if not {"text", "prompt"} & rows.columns:
        raise SurgeryError("The data have neither a column 'text' nor a column 'prompt'.",
                           hint=f"Columns: {', '.join(sorted(rows.columns))}.")  # fmt: skip
    if reading.positions == "completion" and not {"prompt", "completion"} <= rows.columns:
        raise SurgeryError("`positions: completion` needs data with prompts and completions.")
    if reading.positions == "last" and reading.packing:
        raise SurgeryError("`positions: last` is of texts that are read one by one.", hint="Set packing: false.")


def text_rows(written: Any, folder: Any, seed: int = 0) -> Rows:
    """The rows that a recipe's `data` names, files looked up beside it first.

    Raises `SurgeryError` for what is not there.
    """
    from surgery.training.data import rows_of
    from surgery.training.plan import located

    return rows_of(located(written, folder), seed)
