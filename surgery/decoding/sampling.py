"""How a token is drawn from logits: temperature, truncation, and noise that depends on nothing but its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


HEAD = 1024
"""Tokens of a vocabulary among which a nucleus is looked for first: sorting 150 000 costs more than a small model."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Order: temperature, then top-k, top-p and min-p, each on what the one before left.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. A completion ends with an end-of-sequence
    token or when its text contains a string of `stop`. `batch_size` is the number of rows decoded at a time.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    batch_size: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, right, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
        ):
            if not right:
                raise SurgeryError(f"sampling: {name} is {getattr(self, name)!r}; expected {expected}.")


def uniforms(seeds: Sequence[int], group: int, count: int) -> np.ndarray:
    """(prompt, group, count) float32 in [0, 1): a pure function of (seed, index in the group, position).

    SplitMix64's mixing (Steele, Lea & Flood 2014, doi 10.1145/2660193.2660195) in a chain over the three numbers.
    """
    seed = np.array([s % 2**64 for s in seeds], dtype=np.uint64)[:, None, None]
    row = _mix(_mix(seed) + np.arange(group, dtype=np.uint64)[:, None])
    bits = _mix(row + np.arange(count, dtype=np.uint64))
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(logits: Float[Tensor, "row vocab"], uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF of its uniform number, and the token's log-probability before truncation.

    Logits that are not finite give some token and a log-probability that is not finite.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        token = logits.argmax(-1, keepdim=True)
        log_probs = logits.log_softmax(-1)
    else:
        log_probs = (logits if sampling.temperature == 1 else logits / sampling.temperature).log_softmax(-1)
        cumulative = truncate(log_probs.exp(), sampling).cumsum(-1)
        # u <= 1 - 2^-24, so u * total stays below the total in float32: the token has a probability (NaN apart).
        target = uniform.unsqueeze(1) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)
    return token.squeeze(1), log_probs.gather(1, token).squeeze(1)


def truncate(probs: Float[Tensor, "row vocab"], sampling: Sampling) -> Float[Tensor, "row vocab"]:
    """Probabilities with what top-k, top-p and min-p leave out at 0 (not normalised again); the best token stays."""
    if 0 < sampling.top_k < probs.shape[1]:
        probs = probs.where(probs >= probs.topk(sampling.top_k).values[:, -1:], 0.0)
    if sampling.top_p < 1:
        probs = probs.where(nucleus(probs, sampling.top_p * probs.sum(-1, keepdim=True)), 0.0)
    if sampling.min_p > 0:
        probs = probs.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs


def nucleus(probs: Float[Tensor, "*row vocab"], mass: Float[Tensor, "*row 1"]) -> Bool[Tensor, "*row vocab"]:
    """The likeliest tokens, as few as hold `mass` together (Holtzman et al. 2020, arXiv:1904.09751); NaN: none.

    Of equally likely ones the first come first. A whole vocabulary is sorted only of rows whose `HEAD` don't hold it.
    """
    best = probs.topk(min(HEAD, probs.shape[-1])).values
    count, least, held = _needed(best, mass)
    flat = (held < mass).squeeze(-1)
    if best.shape[-1] < probs.shape[-1] and bool(flat.any()):
        count[flat], least[flat], _ = _needed(probs[flat].sort(dim=-1, descending=True).values, mass[flat])
    kept = probs >= least
    if bool((kept.sum(-1, keepdim=True) <= count).all()):  # none as likely as the last one is too many
        return kept
    above, ties = probs > least, probs == least
    return above | (ties & (ties.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def _needed(ordered: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(*row, 1) each: how many of the likeliest (*row, rank) hold `mass`, the last one's probability, and what all
    hold."""
    cumulative = ordered.cumsum(-1)
    count = (cumulative - ordered < mass).sum(-1, keepdim=True).clamp_(min=1)
    return count, ordered.gather(-1, count - 1), cumulative[..., -1:]
