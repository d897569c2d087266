"""A dictionary as plain tensors, and what may be done to them without changing what it computes.

Each of these is exact in real numbers, and rounds every number of the result once or twice:

| | E | b | D | b_dec | threshold |
|---|---|---|---|---|---|
| norms folded (n: of D's rows) | n E | n b | D / n | | of x n: the same for all latents; of h: as it is |
| centre put into the bias | | b - E b_dec | | | |
| reads s x (g: of each model) for x | g E | b - E g mean | D / g | b_dec / g + mean | of h: as it is |

A scale of the activations moves the decoder's norms, and with them what a choice by norm compares: where it is not the
same for all, the norms are folded first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import Rule, TopK


@dataclass(frozen=True)
class Parts:
    """E (latents, d_in), b (latents,), D (latents, d_out), b_dec (d_out,), S (d_out, d_in), and what the rule has."""

    rule: Rule
    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    b_dec: Tensor
    skip: Tensor | None = None
    centered: bool = True
    models: int = 1
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, dictionary: Dictionary) -> Parts:
        """The tensors of a dictionary, on the CPU, as they are."""

        def plain(tensor: Tensor) -> Tensor:
            return tensor.detach().cpu()

        extras = {name: plain(dictionary.extra(name)) for name in dictionary.rule.extras(1)}
        skip = None if dictionary.skip is None else plain(dictionary.skip)
        return cls(
            dictionary.rule,
            plain(dictionary.encoder),
            plain(dictionary.bias),
            plain(dictionary.decoder),
            plain(dictionary.b_dec),
            skip,
            dictionary.is_centered,
            dictionary.models,
            extras,
        )

    def dictionary(self, where: Any = "The dictionary") -> Dictionary:
        """A dictionary with tensors of its own: float32, or float64 where one of them is. `where` is for messages."""
        main = {"encoder": self.encoder, "bias": self.bias, "decoder": self.decoder, "b_dec": self.b_dec}
        main |= {} if self.skip is None else {"skip": self.skip}
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in main.values()) else torch.float32
        (latents, d_in), d_out = self.encoder.shape, self.decoder.shape[1]
        try:
            with torch.device("meta"):
                found = Dictionary(d_in, latents, self.rule, d_out=d_out, models=self.models, centered=self.centered,
                                   skip=self.skip is not None)  # fmt: skip
        except SurgeryError as error:
            raise SurgeryError(f"{where}: {error.problem}", hint=error.hint) from None
        types = {name: value.dtype if value.dtype == torch.float64 else dtype for name, value in found.named_buffers()}
        state = {
            name: torch.empty(value.shape, dtype=types.get(name, dtype)).copy_(value)
            for name, value in (main | dict(self.extras)).items()
        }
        found.load_state_dict(state, assign=True)
        return found

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        return self.decoder.shape[1]

    def folded(self) -> Parts:
        """The same with norms of 1, where the rule goes by norms; a latent without a direction gets no encoder."""
        if not isinstance(self.rule, TopK) or not self.rule.by_norm:
            return self
        return replace(self.weighed(self.norms()), rule=replace(self.rule, by_norm=False))

    def weighed(self, weights: Tensor) -> Parts:
        """The same with codes times `weights` (latents,), which are not below 0, and the decoder divided by them.

        For rules that have nothing of their own for each latent.
        """
        rows = self.decoder / torch.where(weights > 0, weights, 1)[:, None]
        return replace(self, encoder=self.encoder * weights[:, None], bias=self.bias * weights, decoder=rows)

    def recentered(self, centered: bool) -> Parts:
        """The same that subtracts b_dec from what it reads, or does not. Widths must be equal where it does."""
        if self.centered == centered:
            return self
        moved = self.encoder @ self.b_dec
        return replace(self._raised(moved if centered else -moved), centered=centered)

    def scaled(self, scale: Tensor, mean: Tensor | None = None, *, tiny: float = 0.0) -> Parts:
        """Reads x where this one reads scale (x - mean), and gives back what this one gives / (scale + tiny) + mean.

        `scale` () or (models,), `mean` (d_in,). For autoencoders and crosscoders.
        """
        mine = self if scale.numel() == 1 and mean is None else self.folded().recentered(False)
        wide = scale.view(-1, 1).expand(-1, self.d_in // scale.numel()).reshape(-1)
        encoder = mine.encoder * wide
        extras = dict(mine.extras)
        if isinstance(mine.rule, TopK) and mine.rule.by_norm and "threshold" in extras:
            extras["threshold"] = extras["threshold"] / scale.view(-1)[0]  # of h times norms, which are smaller now
        b_dec = mine.b_dec / (wide + tiny)
        found = replace(mine, encoder=encoder, decoder=mine.decoder / (wide + tiny), b_dec=b_dec, extras=extras)
        return found if mean is None else replace(found._raised(-(encoder @ mean)), b_dec=b_dec + mean)

    def _raised(self, by: Tensor) -> Parts:
        """With E (x - c) larger by `by` (latents,)."""
        extras = dict(self.extras)
        if "b_mag" in extras:
            extras["b_mag"] = extras["b_mag"] + extras["r_mag"].exp() * by
        return replace(self, bias=self.bias + by, extras=extras)

    def norms_are_one(self) -> bool:
        return bool((self.norms() - 1).abs().max() < 1e-4)

    def norms(self) -> Tensor:
        """(latents,) of the decoder's rows; of a crosscoder the sum of those of its parts."""
        parts = self.decoder.view(len(self.decoder), self.models, -1)
        norms = torch.linalg.vector_norm(parts, dim=-1, dtype=torch.float64).sum(1)
        return norms.to(self.decoder.dtype)
