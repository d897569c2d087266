"""What path patching is asked for: senders, receivers, and the places where the one speaks and the other reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.paths.passes import Sender
from analysis.positions import Position, columns_of
from surgery.anatomy import Anatomy, Site
from surgery.errors import SurgeryError
from surgery.models import Batch


@dataclass(frozen=True)
class Places:
    """Columns (batch, count) of the tokens that play a part."""

    columns: Tensor
    """Where senders speak in the base run."""
    heard: Tensor
    """Where they speak in the other run."""
    sent: Tensor
    """False where a column is padding: nothing is sent from it."""
    arrives: Tensor
    """Where receivers are written to."""
    held: bool
    """Whether receivers read what is recorded at all other tokens."""

    def select(self, rows: slice) -> Places:
        """The places of some of the examples."""
        return Places(self.columns[rows], self.heard[rows], self.sent[rows], self.arrives[rows], self.held)

    @property
    def start(self) -> int:
        """The first column that a receiver is written to; any where none is."""
        return int((self.columns[self.arrives] if bool(self.arrives.any()) else self.columns).min())


def receivers_of(wanted: str | Sequence[str | Site], anatomy: Anatomy) -> dict[Site, list[int]] | None:
    """Heads by site and layer; None for the logits."""
    if wanted == "logits":
        return None
    found: dict[Site, list[int]] = {}
    for site in anatomy.expand(_list(wanted)):
        if site.name not in ("q", "k", "v"):
            raise SurgeryError(f"'{site}' is no receiver.", hint="Receivers are 'logits', or heads by what they read: "
                               "q.9.6, k.9.6, v.9.6.")  # fmt: skip
        heads = found.setdefault(site.whole, [])
        count = anatomy.heads_of(site.name) or 0
        heads += [h for h in (range(count) if site.head is None else [site.head]) if h not in heads]
        _no_position(site, "receiver_position")
    if not found:
        raise SurgeryError("There are no receivers.", hint="'logits', or heads by what they read: ['q.9.6'].")
    return dict(sorted(found.items(), key=lambda item: item[0].layer or 0))


def senders_of(wanted: str | Sequence[str | Site], anatomy: Anatomy) -> list[Sender]:
    """The heads that send, (layer, head). Raises `SurgeryError` for what is none."""
    found: dict[Sender, None] = {}
    for site in anatomy.expand(_list(wanted)):
        if site.name != "z":
            raise SurgeryError(f"'{site}' is no sender: heads send what they write.", hint="z.3.2, z.3, or z for all.")
        _no_position(site, "position")
        heads = range(anatomy.n_heads) if site.head is None else [site.head]
        found |= {(site.layer or 0, head): None for head in heads}
    if not found:
        raise SurgeryError("There are no senders.", hint="z for all heads, or a list: ['z.3.2'].")
    return list(found)


def _list(wanted: str | Sequence[str | Site]) -> list[str | Site]:
    return [wanted] if isinstance(wanted, str | Site) else list(wanted)


def _no_position(site: Site, where: str) -> None:
    if site.position is not None:
        raise SurgeryError(f"'{site}' names a position.", hint=f"Pass {where}={site.position}.")


def places_of(
    base: Batch,
    source: Batch,
    position: Position | None,
    source_position: Position | None,
    receiver_position: Position | None,
    receivers: dict[Site, list[int]] | None,
    every: bool,
) -> Places:
    """Where things are sent and where they arrive; `every`: logits count at all tokens, and not only at the last.

    Raises `SurgeryError` for positions that a prompt has not or that don't correspond, and when nothing can arrive.
    """
    last = base.last[:, None]
    if position is None:
        if source_position is not None:
            raise SurgeryError("source_position belongs to a position, and senders speak at all of them.")
        _same_lengths(base, source)
        width = int(base.lengths.max())
        differs = ((base.ids[:, :width] != source.ids[:, :width]) & base.mask[:, :width]).any(0)
        start = int(differs.int().argmax()) if bool(differs.any()) else width - 1
        columns = torch.arange(start, width, device=base.ids.device).expand(len(base), -1)
        heard, sent = columns, base.mask[:, start:width]
    else:
        columns = columns_of(position, base, "position")[:, None]
        if source_position is None and _from_start(position):
            _same_lengths(base, source)
        there = position if source_position is None else source_position
        heard = columns_of(there, source, "position in the other run")[:, None]
        sent = torch.ones_like(columns, dtype=torch.bool)
    if receivers is None:
        if receiver_position is not None:
            raise SurgeryError("The logits are read at the last token: receiver_position belongs to heads.")
        if every:
            return Places(columns, heard, sent, sent, held=False)
        here = (columns == last) & sent
        if not bool(here.any()):
            raise SurgeryError("Nothing that is sent can arrive: the logits are read at the last token, and senders "
                               "speak at others.", hint="position=-1, or heads as receivers.")  # fmt: skip
        heard = heard.gather(1, here.int().argmax(1, keepdim=True))
        here = here.any(1, keepdim=True)  # in other rows nothing is sent from the last token
        return Places(last, heard, here, here, held=False)
    arrives = sent
    if receiver_position is not None:
        arrives = sent & (columns == columns_of(receiver_position, base, "receiver_position")[:, None])
    if not bool(arrives.any()):
        raise SurgeryError("Nothing that is sent can arrive: without attention a token's stream is its own, and "
                           "receivers read at other positions than senders speak at.",
                           hint="Leave receiver_position out, or let both be the same.")  # fmt: skip
    return Places(columns, heard, sent, arrives, held=receiver_position is None)


def _from_start(position: Position) -> bool:
    """Whether places are counted from the first token, and so mean the same in prompts of one length only."""
    return not callable(position) and bool((torch.as_tensor(position) >= 0).any())


def _same_lengths(base: Batch, source: Batch) -> None:
    if bool((differ := base.lengths != source.lengths).any()):
        pair = int(differ.int().argmax())
        raise SurgeryError(
            f"The prompts of pair {pair} are {int(base.lengths[pair])} and {int(source.lengths[pair])} tokens long; "
            "position by position they don't correspond.",
            hint="Count from the end (position=-1), or say where it is in the other run: source_position.",
        )
