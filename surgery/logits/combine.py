"""The arithmetic of an ensemble: log-probabilities in, unnormalised scores out; and token filters.

    s(v) = sum_m w_m log p_m(v),     p(v) = softmax(s)(v)

Everything is float32 and pure. A token that the base forbids (-inf) is forbidden; another member's log-probability is
no lower than `FLOOR`, so that infinities never meet: -inf - (-inf) would be NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from surgery.decoding import sampling
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

FLOOR = -50.0
"""Nats. e^-50 is far below what a float32 softmax resolves."""
Missing = Literal["mask", "zero_reward"]
"""What becomes of a token that some member does not know: forbidden, or scored by the base alone."""
Mode = Literal["mask", "zero_reward"]
"""What becomes of a token that a filter leaves out: forbidden, or scored by the base alone (its reward is 0)."""


def combine(
    log_probs: Sequence[Float[Tensor, "*row vocab"]],
    weights: Sequence[float],
    base: int = 0,
    known: Sequence[Bool[Tensor, " vocab"] | None] | None = None,
    missing: Missing = "mask",
) -> Float[Tensor, "*row vocab"]:
    """sum_m w_m log p_m(v), in the order of the members; -inf where member `base` forbids a token.

    `known[m]` says which tokens member m has (None: all); `missing` what becomes of the others. With log-probabilities
    or raw logits the distribution is the same: they differ by a constant of each member.
    """
    total = torch.zeros_like(log_probs[base])
    for m, (values, weight) in enumerate(zip(log_probs, weights, strict=True)):
        # What the base forbids is put right below: nothing else of it has to be lifted.
        total.add_(values if m == base else values.clamp(min=FLOOR), alpha=weight)
    lacking = [~one for one in known or () if one is not None]
    if lacking:
        absent = torch.stack(lacking).any(0)
        alone = weights[base] * log_probs[base] if missing == "zero_reward" else total.new_tensor(-torch.inf)
        total = torch.where(absent, alone, total)
    return total.masked_fill_(log_probs[base] == -torch.inf, -torch.inf)


def normalised(scores: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row vocab"]:
    """log p(v) = s(v) - log sum_u exp s(u): the sequence score is the sum of these."""
    return scores.log_softmax(-1)


# ---- which tokens may come -----------------------------------------------------------------------------------------


def plausible(log_probs: Float[Tensor, "*row vocab"], alpha: float) -> Bool[Tensor, "*row vocab"]:
    """p(v) >= alpha * max p: the plausible tokens of contrastive decoding (Li et al. 2023, arXiv:2210.15097, eq. 2)."""
    if alpha == 0:
        return torch.ones_like(log_probs, dtype=torch.bool)
    return log_probs >= log_probs.amax(-1, keepdim=True) + math.log(alpha)


def nucleus(log_probs: Float[Tensor, "*row vocab"], p: float) -> Bool[Tensor, "*row vocab"]:
    """The likeliest tokens, as few as hold probability `p` together; of equally likely ones the first."""
    if p >= 1:
        return torch.ones_like(log_probs, dtype=torch.bool)
    probs = log_probs.softmax(-1)
    return sampling.nucleus(probs, torch.full_like(probs[..., :1], p))


def top_k(log_probs: Float[Tensor, "*row vocab"], k: int) -> Bool[Tensor, "*row vocab"]:
    """The `k` likeliest tokens, and those as likely as the last of them."""
    least = log_probs.topk(min(int(k), log_probs.shape[-1]), -1).values[..., -1:]
    return log_probs >= least


FILTERS: dict[str, Callable[[Tensor, Any], Tensor]] = {"plausible": plausible, "nucleus": nucleus, "top_k": top_k}
_RANGES = {"plausible": (0, 1, "from 0 to 1"), "nucleus": (0, 1, "above 0 and at most 1"),
           "top_k": (1, 2**31, "of tokens, 1 or more")}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Filter:
    """One rule for which tokens may come, looking at one member, at the base, or at the composition itself.

    Raises `SurgeryError` for a rule that is none, and for a value out of its range.
    """

    rule: str
    value: float
    on: Any = None
    """A member (or an ensemble of it alone, or its name there); "scores", the composition; None or "base": the base.
    A member that is in no term yet is read along with weight 0."""
    mode: Mode = "mask"

    def __post_init__(self) -> None:
        if self.rule not in FILTERS:
            raise SurgeryError(f"There is no filter '{self.rule}'.", hint=f"Filters: {', '.join(FILTERS)}.")
        if self.mode not in ("mask", "zero_reward"):
            raise SurgeryError(f"A filter's mode is 'mask' or 'zero_reward', and not {self.mode!r}.")
        low, high, expected = _RANGES[self.rule]
        right = isinstance(self.value, (int, float)) and low <= self.value <= high
        if not right or (self.value == 0 if self.rule == "nucleus" else self.rule == "top_k" and self.value % 1):
            raise SurgeryError(f"{self.rule} is {self.value!r}; expected a number {expected}.")

    def kept(self, log_probs: Tensor) -> Tensor:
        """(*row, vocab) bool: which tokens stay; never none, of numbers."""
        return FILTERS[self.rule](log_probs, self.value)

    def apply(self, scores: Tensor, seen: Tensor, base: Tensor) -> Tensor:
        """`scores` with what `seen` (log-probabilities) leaves out forbidden, or replaced by `base` (w * log p).

        Where `seen` is no number the scores are none either: a broken member shows.
        """
        out = base if self.mode == "zero_reward" else scores.new_tensor(-torch.inf)
        return torch.where(self.kept(seen), scores, out).masked_fill_(seen.isnan(), torch.nan)
