"""Which token of one member of an ensemble is which token of the ensemble's reference, its base member.

Members of one family differ in small things: rows that pad the embedding, tokens added for chats, another order of ids,
another token that ends a response. Tokens are told apart by their strings, never by position, and two tokenizers are
believed to split text alike only after they did. A whole ensemble speaks the reference's tokens: `outputs` brings a
member's logits into their order, `feed` says them in the member's ids.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from surgery.checkpoint.vocabulary import Vocabulary, difference
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int64]
TokenMap = Mapping[str | int, str | int | None]
LEAST = 0.9
"""Share of the reference's tokens that a member has to know."""
PROBES = (
    "The quick brown fox can't jump over 12345 lazy dogs.",
    "m 17+25=42",
    "def f(x):\n    return x**2 + 1  # naïve",
    "“Größe” — 日本語 🙂",
    "two  spaces,\ta tab\n\nand lines",
)
"""Texts that two tokenizers have to split into the same strings."""
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """A member's tokens in the order of the reference's `size` tokens; None stands for the identity, which is free."""

    name: str
    size: int
    """Tokens of the reference that can be reached: V."""
    rows: int
    """Columns of the member's logits: V_m."""
    columns: Int[Tensor, " vocab"] | None = None
    """Which column of the member's logits is each token's (0 where there is none); None: the first V."""
    known: Bool[Tensor, " vocab"] | None = None
    """Which tokens the member has; None: all."""
    inputs: Int[Tensor, " vocab"] | None = None
    """The member's id to feed for each token; None: the same. A token that it lacks is read as its unknown one."""
    end: tuple[int, tuple[int, ...]] | None = None
    """Where a member has several ends for one: (the reference's end, the columns whose probabilities it sums)."""
    ends: tuple[int, ...] = ()
    """The reference's tokens that stand for an end of the member's, in order."""
    notes: tuple[str, ...] = ()
    """What is not as in the reference, in sentences."""

    @property
    def share(self) -> float:
        """Share of the V tokens that the member knows."""
        return 1.0 if self.known is None else float(self.known.float().mean())

    def outputs(self, logits: Float[Tensor, "*rows own"], fill: float = float("-inf")) -> Float[Tensor, "*rows vocab"]:
        """A member's logits (or log-probabilities) in the reference's order, `fill` where the member lacks a token.

        A view where the order is the same. Normalise afterwards: padding is cut off here. Raises `SurgeryError` for
        logits of another width than the map is for.
        """
        if logits.shape[-1] != self.rows:
            raise SurgeryError(f"{self.name} gives logits of {logits.shape[-1]} columns; {self.rows} were expected.")
        if self.columns is None:
            found = logits[..., : self.size]
        else:
            found = logits.index_select(-1, self.columns.to(logits.device))
        if self.end is not None:
            token, columns = self.end
            found = found.clone()
            found[..., token] = logits[..., list(columns)].float().logsumexp(-1).to(logits.dtype)
        return found if self.known is None else found.masked_fill(~self.known.to(logits.device), fill)

    def feed(self, ids: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
        """Tokens of the reference in the member's ids."""
        return ids if self.inputs is None else self.inputs.to(ids.device)[ids]

    def to(self, device: torch.device | str) -> VocabularyMap:
        """The map with its tensors on `device`, so that `outputs` and `feed` need not move them at every step."""
        columns, known, inputs = (None if t is None else t.to(device) for t in (self.columns, self.known, self.inputs))
        return replace(self, columns=columns, known=known, inputs=inputs)


def align(
    reference: PreTrainedTokenizerBase | None,
    reference_rows: int,
    member: PreTrainedTokenizerBase | None,
    member_rows: int,
    *,
    token_map: TokenMap | None = None,
    ends: Sequence[int] = (),
    least: float = LEAST,
    probes: Sequence[str] = PROBES,
    name: str = "the member",
    reference_name: str = "the reference",
) -> VocabularyMap:
    """How a member's tokens correspond to the reference's; `rows` are the columns of each one's logits.

    V is the reference tokenizer's size (one more than its largest id), at most `reference_rows`: what lies behind pads
    the embedding and can't be reached. Tokens with the same string correspond. A token with which the member ends
    (its tokenizer's end-of-sequence token, and `ends`, those of its generation config) and which the reference lacks
    counts as the reference's end; where the reference's end is unknown to the member, the member's own counts for it.
    Everything else that only one side has is left out of the member's say (`known`). `token_map` ({the reference's
    token: the member's}, strings or ids; None: none) comes before these rules. Without a tokenizer on one side the ids
    are taken to be the same. Tokenizers that are one object are not compared; neither are splits without `probes`.

    Raises `SurgeryError` when the member knows less than `least` of the reference's tokens, when a probe is split
    otherwise, for sizes that differ where a tokenizer is missing, and for entries of `token_map` that don't exist.
    """
    words = None if reference is None else reference.get_vocab()
    own = words if member is reference else None if member is None else member.get_vocab()
    size = min(reference_rows, reference_rows if words is None else max(words.values(), default=-1) + 1)
    names = (reference_name, name)
    if words is None or own is None:
        if reference_rows != member_rows:
            raise SurgeryError(
                f"{reference_name} has {reference_rows} rows and {name} {member_rows}, and there is no tokenizer to "
                f"tell which are the same tokens.",
                hint="Pass the tokenizers of both, or models of the same size of vocabulary.",
            )
        columns = np.arange(size)
    else:
        columns = matched(words, own, size, member_rows)
    pairs = _pairs(token_map or {}, words, own, (size, member_rows), names)
    inputs = columns.copy()
    columns[np.isin(columns, [j for j in pairs.values() if j is not None])] = -1
    for r, j in pairs.items():
        columns[r] = -1 if j is None else j
        inputs[r] = inputs[r] if j is None else j
    if words is not None and own is not None:
        _refuse_strangers(columns, (reference, member), (words, own), member_rows, least, names)
        if member is not reference:
            _refuse_other_splits(reference, member, probes, names)
    mine = [] if member is None else [member.eos_token_id]
    mine = [j for j in dict.fromkeys([*mine, *ends]) if j is not None and 0 <= j < member_rows]
    target = None if reference is None else reference.eos_token_id
    if target is not None and (target >= size or target in pairs):
        target = None
    return mapped(columns, inputs, (words, own), member_rows, member, target, mine, names, pairs.values())


def matched(reference: Mapping[Any, int], member: Mapping[Any, int], size: int, rows: int) -> Ids:
    """(size,) The member's id of each of the reference's tokens, -1 where it has none below `rows`."""
    columns = np.full(size, -1, dtype=np.int64)
    for token, r in reference.items():
        if r < size and (j := member.get(token, -1)) < rows:
            columns[r] = j
    return columns


def mapped(
    columns: Ids,
    inputs: Ids,
    words: tuple[Mapping[str, int] | None, Mapping[str, int] | None],
    rows: int,
    member: PreTrainedTokenizerBase | None,
    end: int | None,
    ends: Sequence[int],
    names: tuple[str, str],
    given: Collection[int | None] = (),
) -> VocabularyMap:
    """The map of `columns` and `inputs` (-1: unknown), the member's `ends` put where the reference can say them.

    `end`: the reference's end-of-sequence token, None where it has none or the caller has decided what it stands for.
    `given`: tokens of the member of which the caller has decided what they are.
    """
    size, notes = len(columns), _notes(columns, words, rows, names)
    said = set(columns[np.isin(columns, list(ends))].tolist())
    strangers = [j for j in ends if j not in said]
    sums: tuple[int, ...] = ()
    if end is not None:
        sums = (
            (int(columns[end]), *strangers)
            if columns[end] >= 0
            else tuple(strangers or [j for j in ends if j not in given][:1])
        )
    if end is not None and sums and (strangers or columns[end] < 0):
        columns[columns == sums[0]] = -1
        columns[end] = sums[0]
        inputs[end] = strangers[0] if strangers else sums[0]
        told = _told([j for j in sums if j in ends], words[1])
        notes.append(f"{told}, with which {names[1]} ends, counts as {_told([end], words[0])} of {names[0]}.")
    elif strangers:
        notes.append(f"{_told(strangers, words[1])}, with which {names[1]} ends, stands for no token of {names[0]}.")
    stands_in = [getattr(member, f"{role}_token_id", None) for role in ("unk", "pad", "eos")]
    stand_in = next((j for j in stands_in if j is not None and j < rows), 0)
    if lacks := int((inputs < 0).sum()):
        notes.append(f"{names[1]} reads {lacks} tokens that it lacks as {_told([stand_in], words[1])}.")
    known, same = columns >= 0, np.arange(size)
    ending = np.isin(columns, list(ends)) | ((same == end) & bool(set(sums) & set(ends)))
    fits = size <= rows and bool((columns == same)[known].all())
    inputs = np.where(inputs < 0, stand_in, inputs)
    return VocabularyMap(
        name=names[1],
        size=size,
        rows=rows,
        columns=None if fits else torch.from_numpy(columns.clip(min=0)),
        known=None if known.all() else torch.from_numpy(known),
        inputs=None if (inputs == same).all() else torch.from_numpy(inputs),
        end=(end, sums) if end is not None and len(sums) > 1 else None,
        ends=tuple(np.flatnonzero(ending).tolist()),
        notes=tuple(notes),
    )


def _pairs(
    token_map: TokenMap,
    words: Mapping[str, int] | None,
    own: Mapping[str, int] | None,
    heights: tuple[int, int],
    names: tuple[str, str],
) -> dict[int, int | None]:
    """The user's map as {the reference's id: the member's id or None}."""
    pairs: dict[int, int | None] = {}
    for token, other in token_map.items():
        r = _id(token, words, heights[0], names[0])
        j = None if other is None else _id(other, own, heights[1], names[1])
        if r in pairs or (j is not None and j in pairs.values()):
            raise SurgeryError(f"token_map names {token!r} or {other!r} twice.",
                               hint="One token of the member for one of the reference.")  # fmt: skip
        pairs[r] = j
    return pairs


def _id(token: str | int, words: Mapping[str, int] | None, height: int, name: str) -> int:
    found = (words or {}).get(token, -1) if isinstance(token, str) else token
    if not 0 <= found < height:
        raise SurgeryError(
            f"token_map: {name} has no token {token!r}"
            + ("." if words is not None or not isinstance(token, str) else ", for it has no tokenizer."),
            hint="Give {the reference's token: the member's token}, as strings of their tokenizers or as ids.",
        )
    return found


def _refuse_strangers(
    columns: Ids,
    tokenizers: tuple[Any, Any],
    words: tuple[Mapping[str, int], Mapping[str, int]],
    rows: int,
    least: float,
    names: tuple[str, str],
) -> None:
    total, shared = len({r for r in words[0].values() if r < len(columns)}), int((columns >= 0).sum())
    if shared >= least * total:
        return
    roles = [{k: v for k, v in t.special_tokens_map.items() if isinstance(v, str)} for t in tokenizers]
    first, second = (
        Vocabulary(Path(name), dict(sorted(w.items(), key=lambda item: item[1])), {}, r, "", {"model": {}})
        for name, w, r in zip(names, words, roles, strict=True)
    )
    raise SurgeryError(
        f"{names[1]} ({rows} rows) knows {shared} of {total} tokens of {names[0]}, {100 * shared / total:.1f} %; at "
        f"least {100 * least:g} % are needed.\n{difference(first, second)}",
        hint="Members of one ensemble read the same tokens: take a model with the reference's tokenizer, or name the "
        "tokens that correspond (token_map). member(..., foreign=True) follows another tokenizer by its text.",
    )


def _refuse_other_splits(reference: Any, member: Any, probes: Sequence[str], names: tuple[str, str]) -> None:
    for text in probes:
        first, second = (
            t.convert_ids_to_tokens(t(text, add_special_tokens=False)["input_ids"]) for t in (reference, member)
        )
        if first != second:
            at = next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), -1)
            at = min(len(first), len(second)) if at < 0 else at
            raise SurgeryError(
                f"{names[0]} and {names[1]} split {text!r} differently: from token {at} on "
                f"{first[at : at + _SHOWN]} and {second[at : at + _SHOWN]}.",
                hint="The response's tokens would not be those that the member would read: take a model with the "
                "reference's tokenizer, or one that follows the text: member(..., foreign=True).",
            )


def _notes(
    columns: Ids,
    words: tuple[Mapping[str, int] | None, Mapping[str, int] | None],
    rows: int,
    names: tuple[str, str],
) -> list[str]:
    """What differs, the ends apart."""
    notes, (theirs, own) = [], words
    length = len(columns) if own is None else max(own.values(), default=-1) + 1
    if rows > length:
        notes.append(f"{names[1]} has {rows} rows for {length} tokens: the {rows - length} behind them are left out.")
    known = columns >= 0
    if theirs is None or own is None:
        return notes
    if moved := int((columns != np.arange(len(columns)))[known].sum()):
        notes.append(f"{names[1]} has {_count(moved)} of {names[0]} under another id.")
    if lacking := sorted({r for r in theirs.values() if r < len(known) and not known[r]}):
        notes.append(f"{names[1]} lacks {_count(len(lacking))} of {names[0]}: {_told(lacking, theirs)}.")
    used = set(columns[known].tolist())
    if extra := sorted(set(own.values()) - used):
        notes.append(f"{names[1]} has {_count(len(extra))} that {names[0]} lacks: {_told(extra, own)}.")
    return notes


def _count(number: int) -> str:
    return "1 token" if number == 1 else f"{number} tokens"


def _told(ids: Sequence[int], words: Mapping[str, int] | None) -> str:
    """The first tokens, quoted."""
    shown = {i: str(i) for i in ids[:_SHOWN]}
    shown |= {i: repr(t) for t, i in (words or {}).items() if i in shown}
    return ", ".join(shown.values()) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")
