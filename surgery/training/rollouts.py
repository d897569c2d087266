"""Rollouts: completions drawn from a policy, with the log-probability of every token at the moment it was drawn.

A row's noise is a pure function of (seed of its prompt, index in its group, token index): what is drawn does not depend
on which other rows are in the batch, on the batch size, on rows that ended earlier or on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.training.decoding import ROOM, CausalDecoder, Decoder, undisturbed

if TYPE_CHECKING:
    from jaxtyping import Float
    from transformers import PreTrainedTokenizerBase


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


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of one prompt."""

    prompt_ids: list[int]
    """As read by the model: an empty prompt is one beginning-of-sequence token."""
    completion_ids: list[int]
    """With the end-of-sequence token if one was drawn; with every token up to the one that completed a stop string."""
    log_probs: list[float]
    """Nats, one a completion token: log softmax(logits / temperature) of the whole vocabulary (temperature 1 when
    greedy)."""
    truncated: bool
    """Neither an end-of-sequence token nor a stop string came within `max_new_tokens`."""
    text: str
    """The completion without special tokens, cut before the first stop string."""


class Generator(Protocol):
    """Draws `group` completions of every prompt; a served model can stand in for a local one."""

    def __call__(self, prompts: Sequence[Sequence[int]], group: int, seeds: Sequence[int]) -> list[Rollout]:
        """len(prompts) * group rollouts, groups contiguous; row g of prompt i depends on (seeds[i], g) only."""


class LocalGenerator:
    """Draws completions from a model in memory (or from any `Decoder`), which is left exactly as it was found."""

    def __init__(self, policy: nn.Module | Decoder, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> None:
        self.decoder: Any = CausalDecoder(policy) if isinstance(policy, nn.Module) else policy
        if hasattr(self.decoder, "room"):
            self.decoder.room = min(sampling.max_new_tokens, ROOM)
        self.tokenizer, self.sampling = tokenizer, sampling
        self._models: tuple[Any, ...] = tuple(getattr(self.decoder, "models", ()))
        self._ends = _end_tokens(tokenizer, self._models)
        special = {
            str(token.content): index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._ends |= {special[text] for text in sampling.stop if text in special}
        self._stop = tuple(text for text in sampling.stop if text not in special)

    def __call__(self, prompts: Sequence[Sequence[int]], group: int, seeds: Sequence[int]) -> list[Rollout]:
        """`group` rollouts of each prompt (token ids), groups contiguous.

        Raises `SurgeryError` for a prompt that leaves no room in the model's context, and for logits that are not
        finite.
        """
        if len(prompts) != len(seeds):
            raise SurgeryError(f"{len(prompts)} prompts, but {len(seeds)} seeds: one seed a prompt.")
        if group < 1:
            raise SurgeryError(f"A group of {group} rollouts; expected at least 1.")
        rows = [self._readable(i, list(prompt)) for i, prompt in enumerate(prompts)]
        noise = torch.from_numpy(uniforms(seeds, group, self.sampling.max_new_tokens)).flatten(0, 1)
        done: dict[int, Rollout] = {}
        with undisturbed(*self._models):
            for unique, members in self._blocks(rows, group):
                ids, mask = _left_padded(unique, min(self._ends, default=0), self._device)
                logits, state = self.decoder.prefill(ids, mask)
                for start in range(0, len(members), self.sampling.batch_size):
                    part = members[start : start + self.sampling.batch_size]
                    index = torch.tensor([at for at, _ in part], device=self._device)
                    drawn = [row for _, row in part]
                    for row, ended in self._decode(logits[index], state.select(index), noise[drawn].to(self._device)):
                        done[drawn[row]] = self._rollout(drawn[row] // group, rows[drawn[row] // group], *ended)
        return [done[row] for row in range(len(rows) * group)]

    @property
    def _device(self) -> torch.device:
        parameter = next((p for model in self._models for p in model.parameters()), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def _readable(self, index: int, prompt: list[int]) -> list[int]:
        """The prompt that the model reads; refused when the completion can't fit behind it."""
        if not prompt:
            start = self.tokenizer.bos_token_id
            start = self.tokenizer.eos_token_id if start is None else start
            if start is None:
                raise SurgeryError(f"Prompt {index} is empty, and the tokenizer has no token to begin with.")
            prompt = [start]
        context, new = getattr(self.decoder, "context", None), self.sampling.max_new_tokens
        if context is not None and len(prompt) + new > context:
            raise SurgeryError(
                f"Prompt {index} has {len(prompt)} tokens, and {new} new ones don't fit into the context of {context}.",
                hint="Shorten the prompts or lower max_new_tokens.",
            )
        return prompt

    def _blocks(self, rows: list[list[int]], group: int) -> Iterator[tuple[list[list[int]], list[tuple[int, int]]]]:
        """Different prompts of similar length, longest first, and their rows as (prompt in the block, row).

        A block has at most `batch_size` rows, or one prompt.
        """
        same: dict[tuple[int, ...], list[int]] = {}
        for i, prompt in enumerate(rows):
            same.setdefault(tuple(prompt), []).extend(range(i * group, (i + 1) * group))
        unique: list[list[int]] = []
        members: list[tuple[int, int]] = []
        for ids, copies in sorted(same.items(), key=lambda item: -len(item[0])):
            if unique and len(members) + len(copies) > self.sampling.batch_size:
                yield unique, members
                unique, members = [], []
            members.extend((len(unique), row) for row in copies)
            unique.append(list(ids))
        if unique:
            yield unique, members

    def _decode(self, logits: Tensor, state: Any, noise: Tensor) -> Iterator[tuple[int, tuple[list[int], list[float]]]]:
        """Draws until every row has ended; yields (row, (its tokens, their log-probabilities)) as rows leave."""
        steps = self.sampling.max_new_tokens
        is_end = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        is_end[[token for token in self._ends if token < logits.shape[1]]] = True
        rows = torch.arange(len(logits), device=logits.device)
        alive, lengths = torch.ones_like(rows, dtype=torch.bool), torch.zeros_like(rows)
        tokens, log_probs = torch.empty_like(noise, dtype=torch.long), torch.empty_like(noise)
        for t in range(steps):
            tokens[:, t], log_probs[:, t] = drawn, _ = draw(logits, noise[:, t], self.sampling)
            lengths += alive
            alive &= ~is_end[drawn]
            if self._stop:
                alive &= ~self._stopped(tokens[:, : t + 1], alive)
            left = int(alive.sum())
            if left == 0 or t + 1 == steps:
                break
            if left <= LEAVE * len(alive):
                yield from _leave(rows[~alive], tokens[~alive], log_probs[~alive], lengths[~alive])
                kept = alive.nonzero().squeeze(1)
                state = state.select(kept)
                rows, alive, lengths, noise = rows[kept], alive[kept], lengths[kept], noise[kept]
                tokens, log_probs, drawn = tokens[kept], log_probs[kept], drawn[kept]
            logits, state = self.decoder.step(drawn, state)
        yield from _leave(rows, tokens, log_probs, lengths)

    def _stopped(self, tokens: Tensor, alive: Tensor) -> Tensor:
        """Which rows' text holds a stop string, as seen in the last tokens."""
        # A token adds at least one byte, special ones apart: 8 more are read for those and for a cut character.
        tail = tokens[:, -(max(len(text.encode()) for text in self._stop) + 8) :].tolist()
        hits = [
            going and any(text in self._text(row) for text in self._stop)
            for row, going in zip(tail, alive.tolist(), strict=True)
        ]
        return torch.tensor(hits, device=tokens.device)

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _rollout(self, index: int, prompt: list[int], ids: list[int], log_probs: list[float]) -> Rollout:
        if not math.isfinite(sum(log_probs)):
            at = int(np.isfinite(log_probs).argmin())
            raise SurgeryError(f"The policy's logits for prompt {index} are not finite at completion token {at}.")
        ends = ids[-1] in self._ends
        text = self._text(ids[:-1] if ends else ids)
        cuts = [cut for cut in (text.find(stop) for stop in self._stop) if cut >= 0]
        return Rollout(prompt, ids, log_probs, not ends and not cuts, text[: min(cuts)] if cuts else text)


LEAVE = 0.75
"""Ended rows leave the batch once at most this share goes on: leaving costs a copy of the cache."""


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
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.where(before < sampling.top_p * ordered.sum(-1, keepdim=True), 0.0)
        probs = torch.zeros_like(probs).scatter(1, order, ordered)
    if sampling.min_p > 0:
        probs = probs.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs


def _leave(*columns: Tensor) -> Iterator[tuple[int, tuple[list[int], list[float]]]]:
    for row, tokens, log_probs, length in zip(*(column.tolist() for column in columns), strict=True):
        yield row, (tokens[:length], log_probs[:length])


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _end_tokens(tokenizer: PreTrainedTokenizerBase, models: Sequence[Any]) -> set[int]:
    """Every end-of-sequence token that the tokenizer or a model's generation config names."""
    named = {tokenizer.eos_token_id}
    for model in models:
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        named |= set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return named - {None}
