"""One order of tokens for several vocabularies: which row of which model becomes which row of the output.

Rules for tokens that a model lacks, as in mergekit 0.1.5: the base's row if the base has the token, else the mean of
the models that have it, else zeros; single tokens can be given another donor. Otherwise than there, an embedding that
is padded beyond its tokenizer keeps its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.checkpoint.vocabulary import Vocabulary
from surgery.errors import SurgeryError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Donor:
    """Where one token's row comes from: `model`'s row of the same token, of `token`, or of `token_id`; None: zeros.

    With `force` it replaces the rows of the models that have the token, too.
    """

    model: int | None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class RowPlan:
    """How to fill output rows [start, stop) of one model's aligned embedding; indices `out` count from `start`.

    `out`, `own`: rows copied from the model itself. `lent_out`, `lent_model`, `lent_row`: rows copied from others.
    `means`: (out, ((model, row), ...)), rows that are the mean of several. `zeros`: rows of zeros. `padding`: rows
    behind the last token that no model has; mergekit gives them the mean of the model's token rows.
    """

    out: Rows
    own: Rows
    lent_out: Rows
    lent_model: Rows
    lent_row: Rows
    means: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    zeros: Rows
    padding: Rows


@dataclass(frozen=True)
class Alignment:
    """`tokens[r]` is the string of output row r (None: padding), `rows[i][r]` its row in model i or -1."""

    tokens: tuple[str | None, ...]
    rows: tuple[Rows, ...]
    template: Vocabulary
    """The vocabulary whose files and settings the output tokenizer takes."""
    vocabularies: tuple[Vocabulary, ...]
    heights: tuple[int, ...]
    """Rows of each model's own embedding."""
    fills: Mapping[int, tuple[tuple[int, int], ...]] = field(repr=False)
    """For a row that some model lacks: the (model, row) pairs whose mean it gets; no pairs is zeros."""
    forced: frozenset[int] = frozenset()
    """Rows in which `fills` replaces also what the models have."""
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Rows of the output embedding."""
        return len(self.tokens)

    @property
    def ids(self) -> dict[str, int]:
        """The output's vocabulary."""
        return {t: r for r, t in enumerate(self.tokens) if t is not None}

    @property
    def same_tokenizer(self) -> bool:
        """The output's tokenizer is the template's, unchanged: its files can be copied."""
        known = self.template.tokens
        return all(known.get(t) == r for t, r in self.ids.items()) and len(self.ids) == len(
            [t for t, i in known.items() if i < self.size]
        )

    def identity(self, model: int) -> bool:
        """Whether a model's embedding can be used as it is."""
        whole = self.heights[model] == self.size and not self.forced
        return whole and bool(np.array_equal(self.rows[model], np.arange(self.size)))

    def plan(self, model: int, start: int = 0, stop: int | None = None) -> RowPlan:
        """Where rows [start, stop) of one model's aligned embedding come from; together they are complete."""
        stop = self.size if stop is None else min(stop, self.size)
        rows = self.rows[model][start:stop]
        forced = np.array([start + k in self.forced for k in range(len(rows))], dtype=bool)
        own = (rows >= 0) & ~forced
        lent, means, zeros, padding = [], [], [], []
        for k in np.flatnonzero(~own).tolist():
            parts = self.fills.get(start + k)
            if parts is None:
                padding.append(k)
            elif not parts:
                zeros.append(k)
            elif len(parts) == 1:
                lent.append((k, *parts[0]))
            else:
                means.append((k, parts))
        columns = np.array(lent, dtype=np.int64).reshape(-1, 3).T
        return RowPlan(
            np.flatnonzero(own), rows[own], columns[0], columns[1], columns[2], tuple(means), _array(zeros),
            _array(padding),
        )  # fmt: skip

    def config_changes(self, config: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
        """Entries of a model's config (written for `vocabulary`) that change: `vocab_size` and every `*_token_id`.

        For generation configs, too. Nested parts have dotted names ("text_config.vocab_size"), and there only a size
        that is the embedding's counts. Ids whose token the output lacks become None.
        """
        heights = {h for v, h in zip(self.vocabularies, self.heights, strict=True) if v is vocabulary}
        ids = self.ids
        changes: dict[str, Any] = {}

        def moved(old: Any) -> Any:
            if isinstance(old, list):
                return [m for m in map(moved, old) if m is not None]
            token = vocabulary.by_id.get(old) if type(old) is int else None
            return old if token is None else ids.get(token)

        def walk(part: Mapping[str, Any], prefix: str) -> None:
            for key, value in part.items():
                if isinstance(value, Mapping):
                    walk(value, f"{prefix}{key}.")
                elif key == "vocab_size" and value != self.size and (not prefix or value in heights):
                    changes[prefix + key] = self.size
                elif key.endswith("_token_id") and value is not None and moved(value) != value:
                    changes[prefix + key] = moved(value)

        walk(config, "")
        return changes


def align(
    vocabularies: Sequence[Vocabulary],
    mode: str | int | Vocabulary = "base",
    *,
    base: int | None = 0,
    rows: Sequence[int | None] | None = None,
    donors: Mapping[str, Donor | None] | None = None,
    pad_to_multiple_of: int | None = None,
) -> Alignment:
    """Bring vocabularies into one order.

    `mode`: "base" (the tokens of vocabulary `base`), "union" (those, then all others' in order), "intersection" (those
    of the base that all have, and its special ones), or the index of a vocabulary, or one of its own, whose tokens
    are taken. `base`: whose rows are lent first, None: nobody's. `rows`: rows of each model's embedding (default: its
    vocabulary's size). `donors`: per-token rules; tokens that the output lacks are added; None takes the default rule.
    Raises `SurgeryError` for a donor that lacks the token.
    """
    lead = mode if isinstance(mode, Vocabulary) else vocabularies[mode if isinstance(mode, int) else base or 0]
    heights = [
        v.size if n is None else n for v, n in zip(vocabularies, rows or [None] * len(vocabularies), strict=True)
    ]
    notes: list[str] = []
    height = next((h for v, h in zip(vocabularies, heights, strict=True) if v is lead), lead.size)
    tokens: list[str | None] = [lead.by_id.get(r) for r in range(height)]
    if lead.size > height:
        notes.append(f"{lead.size - height} token ids of {lead.folder} have no row and are left out.")
    if mode == "intersection":
        keep = _kept(lead)
        tokens = [t for t in tokens if t is not None and (t in keep or all(t in v.tokens for v in vocabularies))]
    elif isinstance(mode, str) and mode not in ("base", "union"):
        raise SurgeryError(f"There is no way '{mode}' to align vocabularies.", hint="base, union or intersection.")
    new: Iterable[str] = donors or ()
    if mode == "union":
        every = (t for v, h in zip(vocabularies, heights, strict=True) for r, t in sorted(v.by_id.items()) if r < h)
        new = [*every, *new]
    _append(tokens, new)
    if pad_to_multiple_of:
        tokens += [None] * (-len(tokens) % pad_to_multiple_of)
    table = tuple(_rows(tokens, v, h) for v, h in zip(vocabularies, heights, strict=True))
    fills, forced = _fills(tokens, table, vocabularies, heights, base, donors or {})
    return Alignment(tuple(tokens), table, lead, tuple(vocabularies), tuple(heights), fills, forced, tuple(notes))


def _append(tokens: list[str | None], new: Iterable[str]) -> None:
    """New tokens go behind the last one, into padding rows where there are any."""
    known = {t for t in tokens if t is not None}
    end = max((r for r, t in enumerate(tokens) if t is not None), default=-1) + 1
    for token in new:
        if token in known:
            continue
        known.add(token)
        tokens[end : end + 1] = [token]
        end += 1


def _kept(vocabulary: Vocabulary) -> frozenset[str]:
    """Tokens without which a tokenizer does not work."""
    unknown = vocabulary.raw["model"].get("unk_token")
    return vocabulary.special | ({unknown} if isinstance(unknown, str) else set())


def _rows(tokens: Sequence[str | None], vocabulary: Vocabulary, height: int) -> Rows:
    """A model's row for each output row; padding rows stay where they are in models that have padding there too."""
    rows = np.full(len(tokens), -1, dtype=np.int64)
    for r, token in enumerate(tokens):
        if token is None:
            if r < height and r not in vocabulary.by_id:
                rows[r] = r
        else:
            row = vocabulary.tokens.get(token, -1)
            rows[r] = row if row < height else -1
    return rows


def _fills(
    tokens: Sequence[str | None],
    table: Sequence[Rows],
    vocabularies: Sequence[Vocabulary],
    heights: Sequence[int],
    base: int | None,
    donors: Mapping[str, Donor | None],
) -> tuple[dict[int, tuple[tuple[int, int], ...]], frozenset[int]]:
    """What goes into rows that some model lacks, and the rows where that is forced on all."""
    fills: dict[int, tuple[tuple[int, int], ...]] = {}
    forced = set()
    stacked = np.stack(table)
    has_rule = np.array([t is not None and donors.get(t) is not None for t in tokens], dtype=bool)
    for r in np.flatnonzero((stacked < 0).any(axis=0) | has_rule).tolist():
        token, having = tokens[r], [(i, int(rows[r])) for i, rows in enumerate(table) if rows[r] >= 0]
        donor = donors.get(token) if token is not None else None
        if donor is not None:
            assert token is not None
            fills[r] = _donated(token, donor, vocabularies, heights)
            if donor.force:
                forced.add(r)
        elif base is not None and table[base][r] >= 0:
            fills[r] = ((base, int(table[base][r])),)
        elif having or token is not None:
            fills[r] = tuple(having)
    return fills, frozenset(forced)


def _donated(
    token: str, donor: Donor, vocabularies: Sequence[Vocabulary], heights: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    if donor.model is None:
        return ()
    vocabulary, wanted = vocabularies[donor.model], donor.token if donor.token is not None else token
    row = vocabulary.tokens.get(wanted, -1) if donor.token_id is None else donor.token_id
    if not 0 <= row < heights[donor.model]:
        what = f"token {wanted!r}" if donor.token_id is None else f"row {donor.token_id}"
        raise SurgeryError(
            f"The rule for the token {token!r} takes the {what} of {vocabulary.folder}, which has none.",
            hint="Look the token up in its tokenizer.json.",
        )
    return ((donor.model, row),)


def _array(values: list[int]) -> Rows:
    return np.array(values, dtype=np.int64)
