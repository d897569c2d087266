"""Experimental: a member whose tokenizer is another one altogether, beside models that share theirs.

The members agree on text, not on tokens. After every token of the reference the row's response is spelled out, split
anew by the foreign tokenizer and read: what the foreign cache holds is cropped to what both splits have in common, the
rest is fed. Its next-token logits count for the reference's tokens of the same bytes ("Ġthe" and "▁the" are both
" the"); tokens that only one side has stay unknown, and an ensemble says what becomes of them.

What this can't do: a foreign model that is asked in the middle of a word splits the word as if it ended there; while
the response ends inside a character the foreign model has no opinion; the reference's special tokens are not read.
Rows have different splits, so every row is a forward pass of its own, and each step splits the whole response again:
for small batches and responses of some hundred tokens.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from surgery.decoding import CausalDecoder, CausalState, end_tokens
from surgery.errors import SurgeryError
from surgery.logits.vocabulary import PROBES, VocabularyMap, mapped, matched

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHORS = ("", "\n", ".", "a")
_PROBES = (*PROBES, "a", " a", "ab", "a b", "1", "11", " 1+1")


@dataclass
class ForeignRow:
    """One response: the reference's tokens, and what of it the foreign cache holds behind the prompt."""

    cache: CausalState
    first: Tensor
    """(own,) the foreign model's logits after the prompt."""
    tokens: list[int]
    read: list[int]
    logits: Tensor | None
    """(own,) those after `read`; None where tokens were forgotten since."""

    def copy(self) -> ForeignRow:
        """The same, with a cache of its own."""
        one = torch.zeros(1, dtype=torch.long, device=self.first.device)
        return ForeignRow(self.cache.select(one), self.first, [*self.tokens], [*self.read], self.logits)


class ForeignState:
    """The rows, each with a cache of its own."""

    def __init__(self, rows: list[ForeignRow]) -> None:
        self.rows = rows

    @property
    def positions(self) -> Int[Tensor, " row"]:
        """The next position of each row, counted in the foreign tokens that were read."""
        return torch.cat([row.cache.positions for row in self.rows])

    def repeat(self, times: int) -> ForeignState:
        """Every row `times` times, copies side by side."""
        return ForeignState([row.copy() for row in self.rows for _ in range(times)])

    def select(self, rows: Int[Tensor, " kept"]) -> ForeignState:
        """The given rows, in the given order; a row may be named more than once."""
        return ForeignState([self.rows[i].copy() for i in rows.tolist()])

    def crop(self, count: int) -> None:
        """Forgets the last `count` of the reference's tokens of every row, in place."""
        for row in self.rows if count else ():
            del row.tokens[max(0, len(row.tokens) - count) :]
            row.logits = None


class ForeignDecoder:
    """A `Decoder` that reads prompts in its own tokens, and responses and logits in the reference's.

    `map` is what an ensemble has to know: which of the reference's tokens have a say (`known`), which end a response.
    `reference_rows`: columns of the reference's logits. Raises `SurgeryError` as `CausalDecoder` does, for tokenizers
    whose tokens don't spell the text that they were made of, and where no token of one is a token of the other.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        reference: PreTrainedTokenizerBase,
        reference_rows: int,
        *,
        name: str = "the foreign member",
        reference_name: str = "the reference",
    ) -> None:
        self.decoder = CausalDecoder(model, whole=True)
        self.models, self.context, self.name = self.decoder.models, self.decoder.context, name
        self.tokenizer = tokenizer
        self._spelled = token_bytes(reference)
        spelled = token_bytes(tokenizer)
        _anchor(reference, self._spelled, reference_name)
        self._anchor = _anchor(tokenizer, spelled, name)
        size, rows = min(reference_rows, len(self._spelled)), _width(model)
        columns = matched(_ids_of(self._spelled, reference), _ids_of(spelled, tokenizer), size, rows)
        if not (columns >= 0).any():
            raise SurgeryError(f"No token of {name} spells the same as one of {reference_name}.")
        words, end = (reference.get_vocab(), tokenizer.get_vocab()), reference.eos_token_id
        ends = sorted(e for e in end_tokens(tokenizer, [model]) if 0 <= e < rows)
        self._map: VocabularyMap = mapped(
            columns, np.arange(size), words, rows, tokenizer, end if end is not None and end < size else None, ends,
            (reference_name, name),
        )  # fmt: skip
        self.map = VocabularyMap(name, size, size, known=self._map.known, ends=self._map.ends, notes=self._map.notes)

    @property
    def room(self) -> int:
        """How many columns a cache keeps free for tokens to come."""
        return self.decoder.room

    @room.setter
    def room(self, columns: int) -> None:
        self.decoder.room = columns

    def prefill_rows(self, prompts: Sequence[Sequence[int]]) -> tuple[Float[Tensor, "row vocab"], ForeignState]:
        """Reads prompts in the foreign model's own tokens; the logits of the reference's tokens, -inf if unknown."""
        device, rows = next(self.models[0].parameters()).device, []
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=device)
            logits, cache = self.decoder.prefill(ids, torch.ones_like(ids))
            rows.append(ForeignRow(cache, logits[0], [], [], logits[0]))
        return self._map.outputs(torch.stack([row.first for row in rows])), ForeignState(rows)

    def prefill(
        self, ids: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"]
    ) -> tuple[Float[Tensor, "row vocab"], ForeignState]:
        """As `prefill_rows`, the prompts left-padded."""
        return self.prefill_rows([row[there].tolist() for row, there in zip(ids, mask.bool(), strict=True)])

    def step(self, tokens: Int[Tensor, " row"], state: ForeignState) -> tuple[Float[Tensor, "row vocab"], ForeignState]:
        """Reads one of the reference's tokens a row; the logits of the next."""
        return self.read(tokens.unsqueeze(1), state)[:, -1], state

    def read(
        self, ids: Int[Tensor, "row pos"], state: ForeignState, keep: int | None = None
    ) -> Float[Tensor, "row keep vocab"]:
        """Reads several of the reference's tokens a row, one after the other, and changes `state`.

        Raises `SurgeryError` for a row that no longer fits into the foreign model's context.
        """
        told = []
        for row, tokens in zip(state.rows, ids.tolist(), strict=True):
            each = []
            for token in tokens:
                row.tokens.append(token)
                each.append(self._after(row))
            told.append(torch.stack(each))
        found = torch.stack(told)
        return found if keep is None else found[:, -keep:]

    def _after(self, row: ForeignRow) -> Float[Tensor, " vocab"]:
        """The logits behind the row's response, its cache brought up to it."""
        text, whole = spell(row.tokens, self._spelled)
        wanted = self._split(text)
        if not wanted:
            self._forget(row, 0)
            row.logits = row.first
        elif wanted != row.read or row.logits is None:
            same = next((k for k, (a, b) in enumerate(zip(wanted, row.read, strict=False)) if a != b), None)
            self._forget(row, min(len(wanted) - 1 if same is None else same, len(row.read), len(wanted) - 1))
            rest = wanted[len(row.read) :]
            if self.context is not None and (length := row.cache.length + len(rest)) > self.context:
                raise SurgeryError(
                    f"{self.name} needs {length} of its own tokens for a prompt and its response so far; its context "
                    f"is {self.context}.",
                    hint="Shorten the prompts or lower max_new_tokens: its tokens are not the reference's.",
                )
            fed = torch.tensor([rest], device=row.first.device)
            row.logits, row.read = self.decoder.read(fed, row.cache, keep=1)[0, -1], wanted
        assert row.logits is not None
        told = self._map.outputs(row.logits)
        return told if whole else torch.where(told == -torch.inf, told, 0.0)

    @staticmethod
    def _forget(row: ForeignRow, kept: int) -> None:
        row.cache.crop(len(row.read) - kept)
        row.read = row.read[:kept]

    def _split(self, text: str) -> list[int]:
        """The foreign tokens of a text that goes on from a prompt: no space or mark is put before it."""
        return _behind(self.tokenizer, self._anchor, text) if text else []


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """By id the bytes that each token writes; None for special tokens and for ids that are none.

    Told by the tokenizer's own decoder: byte-level (Radford et al. 2019), pieces with "▁" for a space and <0x..> for
    a byte (Kudo & Richardson 2018), or tokens that are what they say.
    """
    words, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    found: list[bytes | None] = [None] * (max(words.values(), default=-1) + 1)
    told = _told_by_decoder(tokenizer)
    for token, i in words.items():
        if i not in special:
            found[i] = token.encode() if i in added else told(token)
    return found


def spell(tokens: Sequence[int], spelled: Sequence[bytes | None]) -> tuple[str, bool]:
    """The text of tokens, and whether it ends with a whole character; the bytes of one that is begun are left out."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    written = b"".join(spelled[t] or b"" for t in tokens if t < len(spelled))
    return decoder.decode(written), not decoder.getstate()[0]


def _told_by_decoder(tokenizer: Any) -> Callable[[str], bytes]:
    inner = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(inner, "decoder", None)
    kind = "▁" if inner is None else "" if decoder is None else str(json.loads(decoder.__getstate__()))
    if "ByteLevel" in kind:
        table = _byte_characters()
        return lambda token: b"".join(table[c] if c in table else c.encode() for c in token)
    if "▁" in kind:
        return lambda token: bytes.fromhex(m[1]) if (m := _BYTE.fullmatch(token)) else token.replace("▁", " ").encode()
    return str.encode


def _byte_characters() -> dict[str, bytes]:
    """GPT-2's characters for the 256 bytes: visible ones of Latin-1 as they are, the others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): bytes([b]) for b in visible} | {chr(256 + i): bytes([b]) for i, b in enumerate(hidden)}


def _ids_of(spelled: Sequence[bytes | None], tokenizer: Any) -> dict[bytes, int]:
    """The token of some bytes; of several one that text is split into, which a single byte's (<0x41>) is last."""
    ids: dict[bytes, int] = {}
    single = {i for token, i in tokenizer.get_vocab().items() if _BYTE.fullmatch(token)}
    for i in sorted(range(len(spelled)), key=lambda i: (i in single, i)):
        if written := spelled[i]:
            ids.setdefault(written, i)
    return ids


def _anchor(tokenizer: Any, spelled: Sequence[bytes | None], name: str) -> str:
    """What to put before a text so that the tokens behind spell the text and nothing else (no space in front)."""
    failed = ("", "")
    for anchor in _ANCHORS:
        for text in _PROBES:
            ids = _behind(tokenizer, anchor, text)
            if tokenizer.unk_token_id in ids:
                continue
            written = b"".join(spelled[i] or b"" for i in ids)
            if written != text.encode():
                failed = (text, written.decode(errors="replace"))
                break
        else:
            return anchor
    raise SurgeryError(
        f"The tokens of {name} don't spell the text they are made of: {failed[0]!r} became {failed[1]!r}.",
        hint="A tokenizer that changes case, spaces or accents can't be followed through another one's text.",
    )


def _behind(tokenizer: Any, anchor: str, text: str) -> list[int]:
    """The tokens of `text` behind `anchor`, whose own are cut off; those of `text` alone where the two run together."""
    ids: list[int] = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
    own: list[int] = tokenizer(anchor, add_special_tokens=False)["input_ids"] if anchor else []
    return ids[len(own) :] if ids[: len(own)] == own else tokenizer(text, add_special_tokens=False)["input_ids"]


def _width(model: Any) -> int:
    """Columns of the model's logits."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return int(model.config.get_text_config().vocab_size if weight is None else weight.shape[0])
