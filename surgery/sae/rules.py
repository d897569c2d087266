"""What makes a dictionary sparse: one class each, by the name of its architecture.

| name | codes | beside the squared error |
|---|---|---|
| standard | ReLU(h) | l1 x sum of f times the decoder's norms |
| gated | 1[gate > 0] ReLU(magnitude), two readings of one encoder | l1 on ReLU(gate), and x rebuilt from it |
| jumprelu | h where h > theta, theta learned | l0 x number of codes, through a rectangle of width `bandwidth` |
| topk | the k largest of a row | what dead latents leave unexplained |
| batchtopk | the k x rows largest of a batch; afterwards all above a running threshold | the same |
| matryoshka | as batchtopk | and the error of the first `widths` latents alone |

h = E (x - c) + b. Coefficients of penalties go up from 0 over `warmup` steps, where a rule has one. The first three are
dense in training: until they are sparse, most latents are in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.sae.codes import Codes, Pick, decode, encode
from surgery.sae.sparsity import Dead, above, batch_top_k, settings, top_k

if TYPE_CHECKING:
    from surgery.sae.dictionary import Dictionary

RULES: Registry[type[Rule]] = Registry("rule for a dictionary")


class Trained(NamedTuple):
    """What a rule makes of a batch in training."""

    output: Tensor
    """(rows, d_out) the reconstruction."""
    fired: Tensor
    """(latents,) rows in which each latent was used."""
    terms: dict[str, Tensor]
    """What is added to the squared error, by name; scalars."""


class Rule:
    """How codes come about. Fields are its settings; `warm` (0 to 1) is how far penalties have gone up."""

    warmup: ClassVar[int] = 0

    def extras(self, latents: int) -> dict[str, nn.Parameter | Tensor]:
        """Parameters, and buffers, of its own."""
        return {}

    def check(self, latents: int) -> None:
        """Raises `SurgeryError` for settings that do not fit."""

    def train(self, of: Dictionary, x: Tensor, target: Tensor, dead: Tensor | None, warm: float) -> Trained:
        """One pass in training; `dead` (latents,) marks latents that have not been used for long."""
        raise NotImplementedError

    def pick(self, of: Dictionary) -> Pick:
        """How codes are chosen after training."""
        raise NotImplementedError

    def values(self, of: Dictionary, codes: Codes) -> Codes:
        """The codes, of those that `pick` chose: themselves where they are h."""
        return codes

    def settle(self, of: Dictionary) -> None:
        """Behind each step of the optimizer: what parameters may not become."""

    def finish(self, of: Dictionary, x: Tensor) -> None:
        """Behind the last step, with its rows: what only the finished dictionary tells."""

    def fold(self, of: Dictionary, norms: float) -> None:
        """The decoder's norms have been multiplied by `norms`, and h is as before."""


def squared(error: Tensor) -> Tensor:
    """The mean over rows of the sum over dimensions of the square."""
    return error.square().sum(-1).mean()


# ---- dense in training


@RULES.register("standard")
@dataclass(frozen=True)
class Standard(Rule):
    """ReLU and an L1 penalty (arXiv:2309.08600), weighted by the decoder's norms, which then need no constraint."""

    l1: float = 1.0
    warmup: int = 0  # type: ignore[misc]

    def train(self, of: Dictionary, x: Tensor, target: Tensor, dead: Tensor | None, warm: float) -> Trained:
        f = of.pre(x).relu()
        penalty = self.l1 * warm * (f * of.norms()).sum(-1).mean()
        return Trained(of.decoded(f, x), (f.detach() > 0).sum(0), {"l1": penalty})

    def pick(self, of: Dictionary) -> Pick:
        return settings(above, of.latents, threshold=of.bias.new_zeros(()))


@RULES.register("gated")
@dataclass(frozen=True)
class Gated(Rule):
    """Whether and how much read apart (arXiv:2404.16014): magnitude = exp(r) E (x - c) + b_mag, gate = E (x - c) + b.

    The reconstruction from the gate goes through the decoder, which learns from it (SAELens), or not: `frozen` (paper).
    """

    l1: float = 1.0
    frozen: bool = False
    warmup: int = 0  # type: ignore[misc]

    def extras(self, latents: int) -> dict[str, nn.Parameter | Tensor]:
        return {"r_mag": nn.Parameter(torch.zeros(latents)), "b_mag": nn.Parameter(torch.zeros(latents))}

    def train(self, of: Dictionary, x: Tensor, target: Tensor, dead: Tensor | None, warm: float) -> Trained:
        gate = of.pre(x)
        f = (gate > 0) * self._magnitude(of, gate)
        open_ = gate.relu()
        penalty = self.l1 * warm * (open_ * of.norms()).sum(-1).mean()
        by_gate = squared(of.decoded(open_, x, frozen=self.frozen) - target)
        return Trained(of.decoded(f, x), (f.detach() > 0).sum(0), {"l1": penalty, "by the gate": by_gate})

    def pick(self, of: Dictionary) -> Pick:
        def choose(pre: Any, rows: int) -> Any:
            def both(part: slice) -> Tensor:
                gate = pre(part)
                return gate * (self._magnitude(of, gate) > 0)

            return above(both, rows, of.latents, of.bias.new_zeros(()))

        return Pick(choose)

    def values(self, of: Dictionary, codes: Codes) -> Codes:
        """Magnitudes in place of gates."""
        index = codes.layout.index
        read = (codes.values - of.bias[index]) * of.extra("r_mag").exp()[index]
        return Codes(read + of.extra("b_mag")[index], codes.layout)

    def _magnitude(self, of: Dictionary, gate: Tensor) -> Tensor:
        return ((gate - of.bias) * of.extra("r_mag").exp() + of.extra("b_mag")).relu()


@RULES.register("jumprelu")
@dataclass(frozen=True)
class JumpRelu(Rule):
    """A learned threshold for each latent, and a penalty on the number of codes (arXiv:2407.14435).

    d f / d theta = -theta / bandwidth and d L0 / d theta = -1 / bandwidth where |h - theta| < bandwidth / 2.
    """

    l0: float = 1.0
    threshold: float = 0.01
    bandwidth: float = 0.05
    warmup: int = 0  # type: ignore[misc]

    def extras(self, latents: int) -> dict[str, nn.Parameter | Tensor]:
        return {"threshold": nn.Parameter(torch.full((latents,), self.threshold))}

    def train(self, of: Dictionary, x: Tensor, target: Tensor, dead: Tensor | None, warm: float) -> Trained:
        h, threshold = of.pre(x), of.extra("threshold")
        f = _Jump.apply(h, threshold, self.bandwidth)
        count = _Step.apply(h, threshold, self.bandwidth).sum(-1).mean()
        return Trained(of.decoded(f, x), (f.detach() > 0).sum(0), {"l0 penalty": self.l0 * warm * count})

    def pick(self, of: Dictionary) -> Pick:
        return settings(above, of.latents, threshold=of.extra("threshold").detach())

    @torch.no_grad()
    def settle(self, of: Dictionary) -> None:
        of.extra("threshold").clamp_(min=0)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return h * (h > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, threshold = ctx.saved_tensors
        near = (h - threshold).abs() < ctx.bandwidth / 2
        return gradients[0] * (h > threshold), -(threshold / ctx.bandwidth) * (near * gradients[0]).sum(0), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, threshold = ctx.saved_tensors
        near = (h - threshold).abs() < ctx.bandwidth / 2
        return None, -(near * gradients[0]).sum(0) / ctx.bandwidth, None


# ---- sparse from end to end


@RULES.register("topk")
@dataclass(frozen=True)
class TopK(Rule):
    """The k largest of each row (arXiv:2406.04093). `by_norm`: of h times the decoder's norms, as with unit norms.

    `aux`: weight of the error that the d_out / 2 strongest dead latents leave of what is unexplained, scaled down where
    there are fewer of them. (Their sum is taken without the decoder's bias, as in the paper.)
    """

    k: int = 32
    by_norm: bool = True
    aux: float = 1.0

    def check(self, latents: int) -> None:
        if not 0 < self.k <= latents:
            raise SurgeryError(f"A row can't use {self.k:g} of {latents:,} latents.",
                               hint=f"k is more than 0 and at most {latents:,}.")  # fmt: skip

    def train(self, of: Dictionary, x: Tensor, target: Tensor, dead: Tensor | None, warm: float) -> Trained:
        many = 0 if dead is None or not self.aux else int(dead.sum())
        half = max(1, of.d_out // 2)
        aside = Dead(dead, min(half, many)) if many and dead is not None else None
        pick = self.chosen(of, aside)
        main, *rest = encode(x, of.encoder, of.bias, of.centered, pick)
        output = of.from_codes(main, x)
        terms = {}
        if rest:
            left = (target - output).detach()
            terms["aux"] = self.aux * min(1.0, many / half) * squared(decode(rest[0], of.decoder) - left)
        return Trained(output, main.layout.fired, terms | self.more(of, main, x, target, pick.scale))

    def chosen(self, of: Dictionary, aside: Dead | None) -> Pick:
        """How codes are chosen in training."""
        return settings(top_k, of.latents, k=self.k, scale=self.scale(of), dead=aside)

    def more(self, of: Dictionary, codes: Codes, x: Tensor, target: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
        """More terms; `scale` is what the choice weighed by."""
        return {}

    def scale(self, of: Dictionary) -> Tensor | None:
        """What pre-activations are weighed by for the choice."""
        return of.norms().detach() if self.by_norm else None

    def pick(self, of: Dictionary) -> Pick:
        return self.chosen(of, None)


@RULES.register("batchtopk")
@dataclass(frozen=True)
class BatchTopK(TopK):
    """k codes a row on average (arXiv:2412.06410); afterwards all above the smallest value that is kept.

    In training that is a running mean by `rate`, in float64. It lags while values grow, and from its beginning at 0 by
    some hundreds of steps: a dictionary of released code that was trained briefly has many times k codes. Here the
    last step's rows are coded once more by the finished weights, and the threshold is the smallest value of theirs.
    """

    k: float = 32.0  # type: ignore[assignment]
    rate: float = 0.01

    def extras(self, latents: int) -> dict[str, nn.Parameter | Tensor]:
        return {"threshold": torch.zeros((), dtype=torch.float64)}

    def chosen(self, of: Dictionary, aside: Dead | None) -> Pick:
        return settings(batch_top_k, of.latents, k=self.k, scale=self.scale(of), dead=aside)

    @torch.no_grad()
    def more(self, of: Dictionary, codes: Codes, x: Tensor, target: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
        if len(codes.values):
            of.extra("threshold").lerp_(_least(codes, scale), self.rate)
        return {}

    @torch.no_grad()
    def finish(self, of: Dictionary, x: Tensor) -> None:
        codes, *_ = encode(x, of.encoder, of.bias, of.centered, self.chosen(of, None))
        if len(codes.values):
            of.extra("threshold").copy_(_least(codes, self.scale(of)))

    def pick(self, of: Dictionary) -> Pick:
        return settings(above, of.latents, threshold=of.extra("threshold").to(of.bias.dtype), scale=self.scale(of))

    @torch.no_grad()
    def fold(self, of: Dictionary, norms: float) -> None:
        if self.by_norm:
            of.extra("threshold").mul_(norms)


def _least(codes: Codes, scale: Tensor | None) -> Tensor:
    """The smallest value of codes, weighed as for the choice."""
    weighed = codes.values if scale is None else codes.values * scale[codes.layout.index]
    return weighed.min().double()


@RULES.register("matryoshka")
@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """BatchTopK whose first `widths` latents have to do by themselves too (arXiv:2503.17547)."""

    widths: tuple[int, ...] = ()

    def check(self, latents: int) -> None:
        super().check(latents)
        if list(self.widths) != sorted({w for w in self.widths if 0 < w < latents}):
            raise SurgeryError(f"Widths grow, and are below the {latents:,} latents: found {list(self.widths)}.")

    def more(self, of: Dictionary, codes: Codes, x: Tensor, target: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
        super().more(of, codes, x, target, scale)
        return {
            f"the first {width}": squared(of.from_codes(codes.only(codes.layout.index < width), x) - target)
            for width in self.widths
        }
