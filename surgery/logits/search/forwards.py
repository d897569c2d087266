"""What a search makes a model read, counted as it happens; prompts into a batch; several models that read one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.decoding import CausalDecoder, Decoder
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Counted:
    """A decoder that counts the tokens it is given: prompts without padding, and every row of every step.

    Rows that have ended and are still in the batch count too, for they are computed.
    """

    def __init__(self, policy: nn.Module | Decoder) -> None:
        self.decoder: Any = CausalDecoder(policy) if isinstance(policy, nn.Module) else policy
        self.tokens = 0
        self.models: tuple[Any, ...] = tuple(getattr(self.decoder, "models", ()))
        self.context: int | None = getattr(self.decoder, "context", None)

    def prefill(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """Reads left-padded prompts."""
        self.tokens += int(mask.sum())
        return self.decoder.prefill(ids, mask)

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads one more token a row."""
        self.tokens += len(tokens)
        return self.decoder.step(tokens, state)

    @property
    def parameters(self) -> int:
        """Of its models together, each counted once."""
        return sum({id(p): p.numel() for model in self.models for p in model.parameters()}.values())

    @property
    def device(self) -> torch.device:
        """Where its models are."""
        parameter = next((p for model in self.models for p in model.parameters()), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def same(self, other: Counted) -> bool:
        """Whether both would compute the same: one decoder, or plain decoders of one model."""
        plain = isinstance(self.decoder, CausalDecoder) and isinstance(other.decoder, CausalDecoder)
        return self.decoder is other.decoder or (plain and self.models[0] is other.models[0])


@dataclass
class ChorusState:
    """The states of several decoders that read the same rows."""

    parts: list[Any]
    logits: list[Tensor]
    """Of the next token, decoder by decoder."""

    def repeat(self, times: int) -> ChorusState:
        """Every row `times` times, copies side by side."""
        rows = torch.arange(len(self.logits[0]), device=self.logits[0].device)
        return self.select(rows.repeat_interleave(times))

    def select(self, rows: Tensor) -> ChorusState:
        """The given rows, in the given order; a row may be named more than once."""
        return ChorusState([part.select(rows) for part in self.parts], [each[rows] for each in self.logits])


class Chorus:
    """Decoders that read the same tokens, each once however often it is named; the first one's logits are drawn from.

    What the others think of a text comes along with it, and no prefix is read again.
    """

    def __init__(self, decoders: Sequence[nn.Module | Decoder]) -> None:
        self.different: list[Counted] = []
        self._at: list[int] = []
        for decoder in decoders:
            one = Counted(decoder)
            at = next((i for i, other in enumerate(self.different) if one.same(other)), len(self.different))
            self.different += [one] if at == len(self.different) else []
            self._at.append(at)
        self.models = tuple({id(m): m for one in self.different for m in one.models}.values())
        contexts = [one.context for one in self.different if one.context is not None]
        self.context = min(contexts, default=None)
        self.device = self.different[0].device

    def prefill(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ChorusState]:
        """Reads left-padded prompts."""
        return self._together([one.prefill(ids, mask) for one in self.different])

    def step(self, tokens: Tensor, state: ChorusState) -> tuple[Tensor, ChorusState]:
        """Reads one more token a row."""
        return self._together([one.step(tokens, part) for one, part in zip(self.different, state.parts, strict=True)])

    def said(self, tokens: Tensor, state: ChorusState) -> list[list[float]]:
        """By decoder as named, after the first: log-probabilities of the tokens that come next."""
        found = []
        for at in self._at[1:]:
            log_probs = state.logits[at].float().log_softmax(-1)
            found.append(log_probs.gather(1, tokens[:, None])[:, 0].tolist())
        return found

    @property
    def spent(self) -> int:
        """Tokens read times parameters, over the different decoders."""
        return sum(one.tokens * one.parameters for one in self.different)

    @staticmethod
    def _together(found: list[tuple[Tensor, Any]]) -> tuple[Tensor, ChorusState]:
        logits = [each for each, _ in found]
        return logits[0], ChorusState([part for _, part in found], logits)


def begun(prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompts as they are read: an empty one is a token to begin with. Raises `SurgeryError` when there is none."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty and start is None:
        raise SurgeryError(f"Prompt {empty[0]} is empty, and the tokenizer has no token to begin with.")
    return [list(prompt) or [start] for prompt in prompts]


def check_room(prompts: Sequence[Sequence[int]], new: int, context: int | None) -> None:
    """Raises `SurgeryError` when `new` tokens don't fit behind a prompt."""
    for i, prompt in enumerate(prompts):
        if context is not None and len(prompt) + new > context:
            raise SurgeryError(
                f"Prompt {i} has {len(prompt)} tokens, and {new} new ones don't fit into the context of {context}.",
                hint="Shorten the prompts or lower max_new_tokens.",
            )


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, pos) ids and mask."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
