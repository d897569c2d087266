"""`Dictionary`: latents of a model's activations, whatever makes them sparse (rules.py).

    f = rule(E (x - c) + b),   y = f D + b_dec (+ S x)

    dictionary = Dictionary(576, 4096, TopK(k=32))
    codes = dictionary.codes(x)                # (row, latent, value)
    y = dictionary(x)

| what | how |
|---|---|
| autoencoder | d_out is d_in; c is b_dec |
| transcoder | from one place to another: `d_out`, `centered=False`; with `skip` also S x |
| crosscoder of several models | `models=2`: x holds their activations side by side, (rows, models x d) |
| difference autoencoder | an autoencoder of x_tuned - x_base |

A latent's norm is that of its row of D; of a crosscoder the sum of the norms of its parts (arXiv:2504.02922).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.sae.codes import Codes, decode, encode
from surgery.sae.rules import Rule, TopK, Trained


class Dictionary(nn.Module):
    """E (latents, d_in), b (latents,), D (latents, d_out), b_dec (d_out,) and what the rule has of its own.

    Decoder rows begin at random with the same norm, 0.1 unless said otherwise; the encoder begins as the decoder where
    both are of one width (of a crosscoder: every model's part of the same random rows).
    """

    def __init__(
        self,
        d_in: int,
        latents: int,
        rule: Rule | None = None,
        *,
        d_out: int | None = None,
        models: int = 1,
        centered: bool = True,
        skip: bool = False,
        norm: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rule = rule or TopK()
        self.d_in, self.latents, self.models = d_in, latents, models
        self.d_out = d_in if d_out is None else d_out
        self.rule.check(latents)
        if d_in % models or self.d_out % models:
            raise SurgeryError(f"{models} models side by side do not fit into a width of {d_in}.")
        if centered and self.d_out != d_in:
            raise SurgeryError("Only what is rebuilt can be centred by its own bias.", hint="Pass centered=False.")
        generator = torch.Generator().manual_seed(seed)
        rows = torch.rand(latents, self.d_out // models, generator=generator) * 2 - 1
        rows = norm * rows / rows.norm(dim=1, keepdim=True)
        self.decoder = nn.Parameter(rows.repeat(1, models))
        same = self.d_out == d_in
        other = torch.rand(latents, d_in, generator=generator) * 2 - 1
        self.encoder = nn.Parameter(
            self.decoder.detach().clone() if same else norm * other / other.norm(dim=1)[:, None]
        )
        self.bias = nn.Parameter(torch.zeros(latents))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.skip = nn.Parameter(torch.zeros(self.d_out, d_in)) if skip else None
        self.is_centered = centered
        for name, value in self.rule.extras(latents).items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def extra(self, name: str) -> Tensor:
        """A parameter or buffer of the rule."""
        return getattr(self, name)

    @property
    def centered(self) -> Tensor | None:
        """What is subtracted from x."""
        return self.b_dec if self.is_centered else None

    def norms(self) -> Tensor:
        """(latents,) of the decoder's rows."""
        return self.decoder.view(self.latents, self.models, -1).norm(dim=-1).sum(1)

    def pre(self, x: Tensor) -> Tensor:
        """(rows, latents) E (x - c) + b, dense."""
        return nn.functional.linear(x if self.centered is None else x - self.centered, self.encoder, self.bias)

    def decoded(self, f: Tensor, x: Tensor, *, frozen: bool = False) -> Tensor:
        """(rows, d_out) of dense codes (rows, latents); a `frozen` decoder and its bias learn nothing from it."""
        decoder, bias = (self.decoder.detach(), self.b_dec.detach()) if frozen else (self.decoder, self.b_dec)
        return self._skipped(f @ decoder + bias, x)

    def from_codes(self, codes: Codes, x: Tensor) -> Tensor:
        """(rows, d_out) of sparse codes."""
        return self._skipped(decode(codes, self.decoder, self.b_dec), x)

    def codes(self, x: Tensor) -> Codes:
        """The codes of activations (rows, d_in), as the rule chooses them after training."""
        self.check(x)
        (found, *_) = encode(x, self.encoder, self.bias, self.centered, self.rule.pick(self))
        return self.rule.values(self, found)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_out) rebuilt from (..., d_in)."""
        rows = x.reshape(-1, x.shape[-1])
        return self.from_codes(self.codes(rows), rows).view(*x.shape[:-1], self.d_out)

    def trained(self, x: Tensor, target: Tensor | None = None, *, dead: Tensor | None = None, warm: float = 1.0
                ) -> Trained:  # fmt: skip
        """A pass in training: output, use of latents, and the terms beside the squared error."""
        self.check(x)
        return self.rule.train(self, x, x if target is None else target, dead, warm)

    @torch.no_grad()
    def fold(self, scale: float, target: float | None = None) -> Dictionary:
        """Takes in that it was trained on `scale` x, to rebuild `target` y: afterwards it reads and gives x and y.

        h is the same, E <- scale E; what is rebuilt is divided by its factor. A rule that weighs h by the decoder's
        norms meets smaller norms then, and its thresholds are divided likewise: the same latents are chosen.
        """
        target = scale if target is None else target
        self.encoder.mul_(scale)
        self.decoder.div_(target)
        self.b_dec.div_(target)
        if self.skip is not None:
            self.skip.mul_(scale / target)
        self.rule.fold(self, 1 / target)
        return self

    def check(self, x: Tensor) -> None:
        """Raises `SurgeryError` for activations of another width, and where they are not (rows, d_in)."""
        if x.ndim != 2:
            raise SurgeryError(f"Codes are those of rows (rows, {self.d_in}), found a shape of {tuple(x.shape)}.",
                               hint="Flatten them: activations.flatten(0, -2).")  # fmt: skip
        if x.shape[-1] != self.d_in:
            raise SurgeryError(f"The dictionary reads activations of {self.d_in} numbers, found {x.shape[-1]}.",
                               hint="It belongs to another site or model.")  # fmt: skip

    def _skipped(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.skip is None else y + x @ self.skip.T

    def __repr__(self) -> str:
        about: dict[str, Any] = {"d_out": self.d_out} if self.d_out != self.d_in else {}
        about |= {"models": self.models} if self.models > 1 else {}
        more = "".join(f", {k}={v}" for k, v in about.items())
        return f"Dictionary({self.d_in}, {self.latents}, {self.rule}{more})"
