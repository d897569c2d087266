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

from surgery.decoding.cache import ROOM
from surgery.decoding.causal import CausalDecoder, Decoder
from surgery.decoding.head import undisturbed
from surgery.decoding.loop import decode
from surgery.decoding.sampling import Sampling, uniforms
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        self._ends = end_tokens(tokenizer, self._models)
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
                    begun = logits[index], state.select(index)
                    for row, ended in decode(
                        self.decoder, *begun, noise[drawn].to(self._device), self.sampling, self._ends, self._stopped
                    ):
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

    def _stopped(self, tokens: Tensor, alive: Tensor) -> Tensor:
        """Which rows' text holds a stop string, as seen in the last tokens."""
        if not self._stop:
            return torch.zeros_like(alive)
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


def _left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def end_tokens(tokenizer: PreTrainedTokenizerBase, models: Sequence[Any]) -> set[int]:
    """Every end-of-sequence token that the tokenizer or a model's generation config names."""
    named = {tokenizer.eos_token_id}
    for model in models:
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        named |= set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return named - {None}
