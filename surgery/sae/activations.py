"""Activations for dictionaries: read at any sites, of one model or of several on the same tokens, and shuffled.

    stream = Stream([base, tuned], ["resid_post.2"], batches)     # rows of 2 x d_model: a crosscoder's
    for rows in Shuffled(stream, size=65_536, batch=4096, seed=0):
        dictionary.trained(rows["resid_post.2"])

A forward pass ends behind the deepest site: what lies above it, the head with its vocabulary first of all, is never
computed. Rows of all sites are of the same tokens in the same order, shuffled alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from surgery.activations.interventions import capture, unwrapped
from surgery.anatomy import Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, as_batch, untouched
from surgery.training.distributed import World

Rows = dict[str, Tensor]
"""By site: (tokens, width) float32."""
Keep = Callable[[Batch], Tensor]
"""Which tokens of a batch count: (batch, pos) bool."""


def real_tokens(skip: int = 1) -> Keep:
    """All real tokens but the first `skip` of each row: activations there are sinks, many times as large as others."""

    def keep(batch: Batch) -> Tensor:
        return batch.mask & (batch.positions >= skip)

    return keep


def last_tokens(batch: Batch) -> Tensor:
    """The last real token of each row."""
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return columns == batch.last[:, None]


@dataclass(eq=False)
class Stream:
    """Iterates over batches of tokens, and gives the activations of the tokens that `keep` keeps.

    `models` read the same tokens, and their activations stand side by side; with `difference` there is the second's
    less the first's instead. With `longest`, rows more than so many times as long as the median of their batch are left
    out, at all sites: sinks inside a text, few and huge. `batches` is whatever `surgery.models.as_batch` takes. Of many
    processes (`world`, by accelerate) each reads every so manieth batch, and all get the rows of all, in the order of
    one process. Raises `SurgeryError` for sites that a model lacks, models of different widths, and activations that
    are not finite, by batch and token.
    """

    models: Any
    sites: Sequence[str]
    batches: Iterable[Any]
    keep: Keep = field(default_factory=real_tokens)
    tokenizer: Any = None
    difference: bool = False
    longest: float = 0.0
    world: World = field(default_factory=World)
    begin: int = 0
    """Batches that are passed over at the start."""

    def __post_init__(self) -> None:
        self.models = list(self.models) if isinstance(self.models, Sequence | nn.ModuleList) else [self.models]
        if isinstance(self.sites, str):
            self.sites = [self.sites]
        each = [anatomy_of(unwrapped(model)).expand(self.sites) for model in self.models]
        if any(sites != each[0] for sites in each[1:]):
            raise SurgeryError("The models do not have the same sites.", hint="Pairs need the same architecture.")
        self.names = [str(site) for site in each[0]]
        if self.difference and len(self.models) != 2:
            raise SurgeryError(f"A difference is of two models, and there are {len(self.models)}.")

    def __iter__(self) -> Iterator[Rows]:
        numbered = enumerate(islice(self.batches, self.begin, None), self.begin)
        while group := list(islice(numbered, self.world.size)):
            yield from (rows for rows in self.world.together(partial(self._mine, group)) if rows is not None)

    def after(self, batches: int) -> Stream:
        """The same without its first so many batches."""
        return replace(self, begin=self.begin + batches)

    def _mine(self, group: Sequence[tuple[int, Any]]) -> Rows | None:
        """The rows of this process's batch of a group; None where the text has ended."""
        if self.world.rank >= len(group):
            return None
        number, thing = group[self.world.rank]
        return self.read(as_batch(thing, self.tokenizer), number)

    def read(self, batch: Batch, number: int = 0) -> Rows:
        """The rows of one batch."""
        return self.seen(batch, number)[1]

    @torch.no_grad()
    def seen(self, batch: Batch, number: int = 0) -> tuple[Tensor, Rows]:
        """Which tokens of a batch count, (batch, pos), and their rows."""
        kept = self.keep(batch)
        parts = [_seen(model, self.names, batch) for model in self.models]
        found = {}
        for name in self.names:
            values = [part[name][kept.to(part[name].device)].flatten(1).float() for part in parts]
            if len({value.shape[1] for value in values}) > 1:
                raise SurgeryError(f"'{name}' has widths of {[value.shape[1] for value in values]} in these models.",
                                   hint="What reads several models at once needs one width: take a model and its "
                                   "fine-tuning.")  # fmt: skip
            values = [value.to(values[0].device) for value in values]
            rows = values[1] - values[0] if self.difference else torch.cat(values, 1) if len(values) > 1 else values[0]
            # A sum is read far faster than every element is asked; one that overflows by itself is no fault.
            if not bool(rows.sum().isfinite()) and not bool(rows.isfinite().all()):
                token = int((~rows.isfinite()).any(1).nonzero()[0])
                place = kept.nonzero()[token].tolist()
                raise SurgeryError(
                    f"Activations at '{name}' are not finite: batch {number}, row {place[0]}, token {place[1]}.",
                    hint="Look at that text, or at the model's precision.",
                )
            found[name] = rows
        return without_sinks(kept, found, self.longest) if self.longest and bool(kept.any()) else (kept, found)


def without_sinks(kept: Tensor, found: Rows, longest: float) -> tuple[Tensor, Rows]:
    """The same without tokens whose row is that many times as long as the median, at any site."""
    lengths = [rows.norm(dim=1) for rows in found.values()]
    near = torch.stack([each <= longest * each.median() for each in lengths]).all(0)
    return kept.masked_scatter(kept, near.to(kept.device)), {name: rows[near] for name, rows in found.items()}


class _Enough(Exception):
    """What lies above is of no use."""


def _seen(model: Any, sites: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """(batch, pos, ...) of every site, from a pass that ends behind the deepest."""
    model = unwrapped(model)
    with untouched(model), capture(model, sites, clone=False) as seen, _ending(model, sites), suppress(_Enough):
        model(**batch.inputs(model), use_cache=False)
    return {name: seen[name] for name in sites}


@contextmanager
def _ending(model: Any, sites: Sequence[str]) -> Iterator[None]:
    """Inside, a pass ends with the block of the deepest site; sites outside of blocks need all of it."""
    layers = [Site.parse(site).layer for site in sites]
    if any(layer is None for layer in layers):
        yield
        return
    deepest = max(layer for layer in layers if layer is not None)

    def enough(*_: Any) -> None:
        raise _Enough

    handle = anatomy_of(model).blocks[deepest].register_forward_hook(enough)  # behind the hooks that keep its output
    try:
        yield
    finally:
        handle.remove()


class Shuffled:
    """Batches of rows in random order, from a buffer of `size` rows that is always full while the stream lasts.

    Every batch is drawn at random from the whole buffer, without replacement, and its places are filled with the
    stream's next rows; at the end the rest is drawn. One copy of the buffer, `size` x width x 4 bytes a site. The order
    is a function of the seed and the stream. With `drop_last` a last batch that is smaller is left out. Between two
    batches `state()` is all that it holds: another one that takes it up with `restore` goes on with the same batches.
    """

    def __init__(self, stream: Iterable[Rows], *, size: int, batch: int, seed: int = 0, drop_last: bool = True) -> None:
        if batch < 1 or size < batch:
            raise SurgeryError(f"A buffer of {size:,} rows can't give batches of {batch:,}.", hint="Raise its size.")
        self.stream, self.size, self.batch, self.drop_last = stream, size, batch, drop_last
        self.seed = seed
        self._empty()

    def _empty(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.buffer: Rows = {}
        self.filled = self.read = 0
        self.pending: Rows = {}
        """Rows that were read and have no place in the buffer yet."""
        self._restored = False

    def __iter__(self) -> Iterator[Rows]:
        if not self._restored:
            self._empty()
        self._restored = False
        for rows in self._from_here():
            self.pending = rows
            while len(next(iter(self.pending.values()))):
                self._fill()
                if self.filled == self.size:
                    yield self._drawn()
        while self.filled >= self.batch or (self.filled and not self.drop_last):
            yield self._drawn()

    def state(self) -> tuple[dict[str, Tensor], int]:
        """Tensors, and how many items of the stream have been read."""
        held = {f"buffer.{name}": value[: self.filled] for name, value in self.buffer.items()}
        held |= {f"pending.{name}": value for name, value in self.pending.items()}
        return held | {"generator": self.generator.get_state()}, self.read

    def restore(self, tensors: Mapping[str, Tensor], read: int) -> None:
        """Takes up a state: the next iteration goes on from there."""
        self._empty()
        self.generator.set_state(tensors["generator"])
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "pending":
                self.pending[name] = value
            elif kind == "buffer":
                self.filled = len(value)
                self.buffer[name] = value.new_empty(self.size, value.shape[1])
                self.buffer[name][: self.filled] = value
        self.read, self._restored = read, True

    def _from_here(self) -> Iterator[Rows]:
        """What was read and not placed, then the rest of the stream."""
        if self.pending:
            yield self.pending
        rest = self.stream.after(self.read) if isinstance(self.stream, Stream) else islice(self.stream, self.read, None)
        for rows in rest:
            self.read += 1
            yield rows

    def _fill(self) -> None:
        """As many of the pending rows as there is room for."""
        if not self.buffer:
            self.buffer = {name: value.new_empty(self.size, value.shape[1]) for name, value in self.pending.items()}
        room = self.size - self.filled
        many = min(room, len(next(iter(self.pending.values()))))
        for name, value in self.pending.items():
            self.buffer[name][self.filled : self.filled + many] = value[:many]
        self.filled += many
        self.pending = {name: value[many:] for name, value in self.pending.items()}

    def _drawn(self) -> Rows:
        """Random rows of those that are there, whose places the last ones then take: the end of the buffer is free."""
        filled, many = self.filled, min(self.batch, self.filled)
        chosen = torch.randperm(filled, generator=self.generator)[:many]
        found = {name: value[chosen] for name, value in self.buffer.items()}
        free = torch.zeros(filled, dtype=torch.bool)
        free[chosen] = True
        holes = free[: filled - many].nonzero().view(-1)
        moved = (~free[filled - many :]).nonzero().view(-1) + filled - many
        for value in self.buffer.values():
            value[holes] = value[moved]
        self.filled -= many
        return found
