"""`Reader`: a dictionary, the models and the site that it reads. Texts go in, codes and activations come out.

    Reader(dictionary, model, "resid_post.2", tokenizer)                        # of one model
    Reader(crosscoder, [base, tuned], "resid_post.2", tokenizer)
    Reader(dictionary, [base, tuned], "resid_post.2", tokenizer, difference=True)    # of x_tuned - x_base

Texts are a list of texts (or of lists of token ids), or batches as `surgery.models.as_batch` takes them. Which tokens
count says `keep`: all but the first of each text, whose activations are sinks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.activations.interventions import unwrapped
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, as_batch, encoded_prompts, pad_id
from surgery.models.batch import padded
from surgery.sae.activations import Keep, Stream, real_tokens
from surgery.sae.codes import Codes
from surgery.sae.dictionary import Dictionary

NAMES = ("base", "tuned")
"""What the models of a pair are called."""
Which = int | str
"""One of the models: its number, or of a pair base or tuned."""


class Read(NamedTuple):
    """A batch of texts as a dictionary reads it."""

    batch: Batch
    kept: Tensor
    """(batch, pos) bool: the tokens that count."""
    rows: Tensor
    """(tokens, d_in) the activations of the kept tokens, in their order."""
    codes: Codes
    """Of these rows."""

    @property
    def texts(self) -> Tensor:
        """(tokens,) the row of the batch that each kept token is in."""
        return self.kept.nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class Reader:
    """A dictionary in its place. The models are only looked at.

    `target` is the site that a transcoder writes to, else the site itself. Raises `SurgeryError` for models that are
    too few or too many for the dictionary, a site that is not one whole value, and (when reading) another width.
    """

    dictionary: Dictionary
    models: Any
    site: str
    tokenizer: Any = None
    difference: bool = False
    target: str | None = None
    keep: Keep = field(default_factory=real_tokens)
    batch_size: int = 16
    max_tokens: int = 1024
    """Longer texts are cut; a model's context is never exceeded."""

    def __post_init__(self) -> None:
        several = isinstance(self.models, Sequence | nn.ModuleList)
        object.__setattr__(self, "models", [unwrapped(m) for m in (self.models if several else [self.models])])
        wanted, given = 2 if self.difference else self.dictionary.models, len(self.models)
        if self.difference and self.dictionary.models > 1:
            raise SurgeryError("A crosscoder reads activations, and no differences.", hint="Leave difference= out.")
        if given != wanted:
            what = "A dictionary of differences" if self.difference else "This dictionary"
            hint = "Models come in a list: [base, tuned]."
            if wanted == 1:
                hint = "One Reader a model; difference=True where it was trained on x_tuned - x_base."
            raise SurgeryError(f"{what} reads {wanted} model{'s' if wanted > 1 else ''}, and {given} "
                               f"{'are' if given > 1 else 'is'} given.", hint=hint)  # fmt: skip
        for name in ("site", "target"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, self._one(getattr(self, name)))

    def _one(self, name: str) -> str:
        (found, *more) = anatomy_of(self.models[0]).expand([name])
        if more:
            raise SurgeryError(f"'{name}' is in several layers, and a dictionary reads one.", hint=f"'{found}'")
        if found.position is not None or found.kind == "pattern":
            raise SurgeryError(f"A dictionary reads every token of a stream, of heads or of neurons, not '{name}'.")
        return str(found)

    @property
    def writes(self) -> str:
        """The site that the decoder writes to."""
        return self.target or self.site

    def model(self, which: Which = -1) -> Any:
        """One of the models: base, tuned, or by number; the last one by itself."""
        return self.models[self._number(which)]

    def decoder(self, which: Which = -1) -> Tensor:
        """(latents, d) what each latent writes into one of the models: of a crosscoder that model's own part.

        Of a dictionary of differences x_tuned - x_base: into the base the opposite.
        """
        number, rows = self._number(which), self.dictionary.decoder.detach()
        if self.difference:
            return rows if number else -rows
        return rows.chunk(self.dictionary.models, dim=1)[number]

    def _number(self, which: Which) -> int:
        names = NAMES if len(self.models) == 2 else ()
        known = {name: i for i, name in enumerate(names)} | {i: i for i in range(len(self.models))} | {
            -1: len(self.models) - 1}  # fmt: skip
        if which not in known:
            said = " or ".join(map(repr, names or range(len(self.models))))
            raise SurgeryError(f"There is no model {which!r} here.", hint=f"Say {said}.")
        return known[which]

    def chosen(self, latents: Sequence[int] | int | None) -> list[int]:
        """Latents by number, each once; all for None. Raises `SurgeryError` for one that the dictionary has not."""
        if latents is None:
            return list(range(self.dictionary.latents))
        found = list(dict.fromkeys(int(j) for j in listed(latents)))
        if wrong := [j for j in found if not 0 <= j < self.dictionary.latents]:
            raise SurgeryError(f"The dictionary has no latent {wrong[0]}.",
                               hint=f"Its latents are 0 to {self.dictionary.latents - 1}.")  # fmt: skip
        if not found:
            raise SurgeryError("No latents are named.")
        return found

    def at(self, latents: Sequence[int]) -> Tensor:
        """(latents of the dictionary,) the place of each in `latents`, -1 for others."""
        place = torch.full((self.dictionary.latents,), -1)
        place[torch.tensor(latents)] = torch.arange(len(latents))
        return place

    # ---- reading

    def batches(self, texts: Any) -> Iterator[Batch]:
        """Batches of tokens. Raises `SurgeryError` without any text, and for texts without a tokenizer."""
        empty = True
        for batch in self._batches(texts):
            empty = False
            yield batch
        if empty:
            raise SurgeryError("There is no text to read.")

    def _batches(self, texts: Any) -> Iterator[Batch]:
        if isinstance(texts, str):
            raise SurgeryError("Texts come in a list, and this is one text.", hint="Wrap it: [text].")
        if isinstance(texts, Batch):
            yield texts
            return
        source = iter(texts)
        contexts = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in self.models]
        longest = min([self.max_tokens, *(c for c in contexts if c)])
        for first in source:
            if not _is_text(first):
                yield as_batch(first, self.tokenizer)
                continue
            group = [first, *islice(source, self.batch_size - 1)]
            if any(isinstance(text, str) for text in group) and self.tokenizer is None:
                raise SurgeryError("Texts are read with a tokenizer: pass tokenizer= to the Reader.")
            rows = [encoded_prompts(self.tokenizer, [t])[0] if isinstance(t, str) else list(t) for t in group]
            if [] in rows:
                raise SurgeryError(f"Text {rows.index([])} of a batch has no tokens: {group[rows.index([])]!r}.")
            yield padded([row[:longest] for row in rows], pad_id(self.tokenizer), "right", None)

    @torch.no_grad()
    def read(self, texts: Any) -> Iterator[Read]:
        """Every batch with the activations and the codes of its kept tokens, of the dictionary's device and type."""
        stream = Stream(self.models, [self.site], [], self.keep)
        like = self.dictionary.bias
        for number, batch in enumerate(self.batches(texts)):
            kept = self.keep(batch)
            rows = stream.read(batch, number)[self.site].to(like)
            if self.difference:
                base, tuned = rows.chunk(2, dim=1)
                rows = tuned - base
            yield Read(batch, kept, rows, self.dictionary.codes(rows))

    def rows(self, texts: Any) -> Iterator[Tensor]:
        """The activations alone, (tokens, d_in) a batch: what `latent_scaling` and `measure` take."""
        return (read.rows for read in self.read(texts))

    def whole(self, prompts: Any) -> Read:
        """Prompts as one batch, read. Raises `SurgeryError` when no token of them counts."""
        found = list(replace(self, batch_size=1 << 30).read(prompts))
        if len(found) > 1:
            raise SurgeryError("These prompts are several batches, and one is needed.", hint="Pass a list of texts.")
        return found[0]


def _is_text(thing: Any) -> bool:
    """A text, or the token ids of one: not yet a batch."""
    return isinstance(thing, str) or (isinstance(thing, list) and all(isinstance(i, int) for i in thing))


def listed(things: Any) -> list[Any]:
    """One number, of any library, or several, as a list."""
    return [things] if isinstance(things, Integral) else list(things)
