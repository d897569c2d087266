"""Several models read the same response in step: one forward pass a model and token, whatever it is asked for.

A `Reader` is one model with all that is read of it: several prompts of the same row (views, in one batch) and several
of its layers (lenses, of one pass).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.anatomy import Site, anatomy_of
from surgery.anatomy.points import attach
from surgery.decoding import CausalState, end_tokens
from surgery.decoding.head import unwrapped
from surgery.errors import SurgeryError
from surgery.logits.foreign import ForeignDecoder
from surgery.logits.members import Member, Prompt, is_ids
from surgery.logits.vocabulary import VocabularyMap, align

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded = tuple[tuple[tuple[int, ...], ...], ...]
"""What one prompt is to every reader and view: their own token ids."""


@dataclass
class EnsembleState:
    """What every reader remembers of the same rows, and what every member said last."""

    parts: list[CausalState]
    views: list[int]
    rows: int
    log_probs: list[Tensor] = field(default_factory=list)
    """By member: (row, pos, vocab) float32 after the latest tokens; of a member alone they are not normalised."""

    def repeat(self, times: int) -> EnsembleState:
        """Every row `times` times, copies side by side."""
        device = self.parts[0].positions.device
        return self.select(torch.arange(self.rows, device=device).repeat_interleave(times))

    def select(self, rows: Tensor) -> EnsembleState:
        """The given rows, in the given order; a row may be named more than once."""
        parts = []
        for part, views in zip(self.parts, self.views, strict=True):
            index = torch.cat([rows + view * self.rows for view in range(views)]) if views > 1 else rows
            parts.append(part.select(index.to(part.positions.device)))
        return EnsembleState(parts, self.views, len(rows), [one[rows.to(one.device)] for one in self.log_probs])

    def crop(self, count: int) -> None:
        """Forgets the last `count` tokens of every row, in place."""
        for part in self.parts:
            part.crop(count)


class Reader:
    """One model (with one of its adapters) and the members that are read of it; `index`: their places among all."""

    def __init__(self, members: Sequence[Member], index: Sequence[int], whole: bool) -> None:
        self.members, self.index = list(members), list(index)
        self.styles = list(dict.fromkeys(member.prompt for member in members))
        self.foreign = members[0].foreign
        self.decoder: Any = None if self.foreign else members[0].decoder(whole=whole)
        self.map: VocabularyMap | None = None
        if self.foreign and (len(self.styles) > 1 or any(m.layer is not None for m in members)):
            raise SurgeryError(f"The foreign member '{members[0].name}' reads one prompt, by its last layer.")
        layers = {layer for member in members for layer in _layers(member)}
        self.anatomy = anatomy_of(unwrapped(members[0].model)) if layers else None
        if self.anatomy is not None and (wrong := [l for l in layers if not 0 <= l < self.anatomy.n_layers]):
            raise SurgeryError(f"Member '{members[0].name}' has no layer {wrong[0]}; its layers are 0 to "
                               f"{self.anatomy.n_layers - 1}.")  # fmt: skip
        self.layers = sorted(layers)

    @property
    def rows_of_weights(self) -> int:
        """Rows of the embedding: the length of a row of logits."""
        head: Any = self.members[0].model.get_output_embeddings()  # type: ignore[operator]
        weight = getattr(head, "weight", None)
        return int(self.members[0].model.config.get_text_config().vocab_size if weight is None else weight.shape[0])  # type: ignore[union-attr, operator]

    @property
    def known(self) -> Tensor | None:
        """(vocab,) which tokens of the common vocabulary this model has; None: all."""
        return None if self.map is None else self.map.known

    @property
    def ends(self) -> set[int]:
        """Tokens of the common vocabulary that end this model's responses."""
        return set() if self.map is None else set(self.map.ends)

    def encode(self, prompt: Prompt, reference: PreTrainedTokenizerBase | None) -> tuple[tuple[int, ...], ...]:
        """The prompt's ids for each view, in this model's vocabulary. Raises `SurgeryError` for ids that it lacks."""
        found = []
        for style in self.styles:
            member = next(m for m in self.members if m.prompt == style)
            ids = member.read(prompt, reference)
            if self.map is not None and not self.foreign:
                common = is_ids(prompt) and style in ("given", "plain")
                within(ids, self.map.size if common else self.map.rows, f"a prompt of '{member.name}'")
                ids = self.map.feed(torch.tensor(ids)).tolist() if common and ids else ids
            found.append(tuple(ids))
        return tuple(found)

    def prefill(self, rows: Sequence[tuple[tuple[int, ...], ...]]) -> tuple[list[Tensor], CausalState]:
        """Reads rows, each with its prompt by view; by member (row, 1, vocab) of this model's own logits."""
        flat = [row[view] for view in range(len(self.styles)) for row in rows]
        width = max(map(len, flat))
        device = next(self.members[0].model.parameters()).device
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in flat], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in flat], device=device)
        with self.members[0].speaking(), self._seen(1) as seen:
            logits, state = self.decoder.prefill(ids, mask)
            return self._told(logits[:, None], seen), state

    def read(self, tokens: Tensor, state: CausalState) -> list[Tensor]:
        """Reads (row, pos) tokens of the reference vocabulary; by member (row, pos, vocab) of its own logits."""
        ids = tokens if self.map is None else self.map.feed(tokens)
        ids = ids.to(state.positions.device)
        if len(self.styles) > 1:
            ids = ids.repeat(len(self.styles), 1)
        with self.members[0].speaking(), self._seen(tokens.shape[1]) as seen:
            logits = self.decoder.read(ids, state)
            return self._told(logits, seen)

    @contextmanager
    def _seen(self, keep: int) -> Iterator[dict[int, Tensor]]:
        """The last `keep` states of the stream behind each layer that a lens looks at."""
        seen: dict[int, Tensor] = {}
        handles: list[Any] = []
        try:
            for layer in self.layers:
                assert self.anatomy is not None

                def visit(stream: Tensor, layer: int = layer) -> None:
                    seen[layer] = stream[:, -keep:]

                handles += attach(self.anatomy, Site("resid_post", layer), visit)
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _told(self, logits: Tensor, seen: dict[int, Tensor]) -> list[Tensor]:
        """By member, the rows of its view and what its layer says."""
        views = dict(zip(self.styles, logits.chunk(len(self.styles)), strict=True))
        lenses: dict[int, dict[Any, Tensor]] = {}
        for layer, stream in seen.items():
            assert self.anatomy is not None
            told = self.anatomy.logits(self.anatomy.final_norm(stream))
            lenses[layer] = dict(zip(self.styles, told.chunk(len(self.styles)), strict=True))
        out = []
        for member in self.members:
            last = views[member.prompt]
            if member.layer is None:
                out.append(last)
            elif isinstance(member.layer, int):
                out.append(lenses[member.layer][member.prompt])
            else:
                out.append(premature(last, [lenses[layer][member.prompt] for layer in member.layer]))
        return out

    def values(self, logits: Tensor) -> Tensor:
        """(row, pos, vocab) float32 logits over the common vocabulary."""
        values = logits.float()
        return values if self.map is None else self.map.outputs(values)


def within(ids: Sequence[int], count: int, what: str) -> None:
    """Raises `SurgeryError` for token ids that are not among `count` tokens: `what` they are in."""
    if ids and not 0 <= min(ids) <= max(ids) < count:
        wrong = next(i for i in ids if not 0 <= i < count)
        raise SurgeryError(f"Token {wrong} in {what} is none of the {count} tokens that there are.",
                           hint="Token ids are those of the base's tokenizer (or of what a prompt's function "
                           "returns, the member's own).")  # fmt: skip


def premature(last: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """(..., vocab) at each place the candidates' logits that are farthest from `last` by Jensen-Shannon divergence.

    DoLa (Chuang et al. 2024, arXiv:2309.03883, equation 3).
    """
    p = last.float().log_softmax(-1)
    spread = []
    for candidate in candidates:
        q = candidate.float().log_softmax(-1)
        middle = torch.logaddexp(p, q) - math.log(2)
        spread.append(0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)))
    chosen = torch.stack(spread).argmax(0)
    stacked = torch.stack(list(candidates))
    index = chosen[None, ..., None].expand(1, *stacked.shape[1:])
    return stacked.gather(0, index)[0]


def readers_of(members: Sequence[Member], base: int, whole: bool) -> tuple[list[Reader], int]:
    """One reader a model and adapter, and the size of the common vocabulary, which is that of the base."""
    groups: dict[Any, list[int]] = {}
    for at, member in enumerate(members):
        groups.setdefault(member.voice, []).append(at)
    readers = [Reader([members[i] for i in index], index, whole) for index in groups.values()]
    main = next(reader for reader in readers if base in reader.index)
    reference, height = members[base].tokenizer, main.rows_of_weights
    maps = []
    for reader in readers:
        one, rows = reader.members[0], reader.rows_of_weights
        own, main_name = f"'{one.name}'", f"'{members[base].name}'"
        if not reader.foreign:
            ends = sorted(end_tokens(None, [one.model]))
            maps.append(
                align(reference, height, one.tokenizer, rows, token_map=one.token_map, ends=ends, name=own,
                      reference_name=main_name)
            )  # fmt: skip
            continue
        if reader is main or one.tokenizer is None or reference is None:
            raise SurgeryError(f"The foreign member {own} follows a base, and both need tokenizers.")
        with one.speaking():
            reader.decoder = ForeignDecoder(
                one.model, one.tokenizer, reference, height, name=own, reference_name=main_name
            )
        maps.append(reader.decoder.map)
    for reader, found in zip(readers, maps, strict=True):
        reader.map = found.to(next(reader.members[0].model.parameters()).device)
    return readers, maps[readers.index(main)].size


def _layers(member: Member) -> tuple[int, ...]:
    return () if member.layer is None else (member.layer,) if isinstance(member.layer, int) else tuple(member.layer)
