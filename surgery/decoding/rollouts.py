"""Rollouts: completions drawn from a policy, with the log-probability of every token at the moment it was drawn.

A row's noise is a pure function of (seed of its prompt, index in its group, token index): what is drawn does not depend
on which other rows are in the batch, on the batch size, on rows that ended earlier or on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from surgery.decoding.beam import Beams, Hypothesis, NotFiniteError, beam_search
from surgery.decoding.cache import ROOM
from surgery.decoding.causal import CausalDecoder, Decoder
from surgery.decoding.head import undisturbed
from surgery.decoding.loop import Watch, decode
from surgery.decoding.sampling import Sampling, uniforms
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Ended = Literal["eos", "stop", "length"]
"""By an end-of-sequence token, a stop string, or because it was long enough."""


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
    """Draws completions from a model in memory (or from any `Decoder`), which is left exactly as it was found.

    With `beams` a prompt's group are its best hypotheses, best first.
    """

    def __init__(
        self,
        policy: nn.Module | Decoder,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        beams: Beams | None = None,
    ) -> None:
        self.decoder: Any = CausalDecoder(policy) if isinstance(policy, nn.Module) else policy
        if hasattr(self.decoder, "room"):
            self.decoder.room = min(sampling.max_new_tokens, ROOM)
        self.tokenizer, self.sampling, self.beams = tokenizer, sampling, beams
        self._models: tuple[Any, ...] = tuple(getattr(self.decoder, "models", ()))
        own = getattr(self.decoder, "ends", None)
        self._ends = end_tokens(tokenizer, self._models if own is None else ()) | set(own or ())
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
        done = dict(self.draw(prompts, group, seeds))
        return [done[row] for row in range(len(prompts) * group)]

    def draw(self, prompts: Sequence[Any], group: int, seeds: Sequence[int]) -> Iterator[tuple[int, Rollout]]:
        """The same as (place, rollout) pairs, in the order in which they end.

        What is wrong with one row is raised when the other rows of its batch have ended.
        """
        rows = [self._readable(i, prompt) for i, prompt in enumerate(prompts)]
        if self.beams is not None:
            with undisturbed(*self._models):
                yield from self._search(rows, group, seeds, self.beams)
            return
        noise = torch.from_numpy(uniforms(seeds, group, self.sampling.max_new_tokens)).flatten(0, 1)
        with undisturbed(*self._models):
            for unique, members in self._blocks(rows, group):
                logits, state = self._prefill(unique)
                for start in range(0, len(members), self.sampling.batch_size):
                    part = members[start : start + self.sampling.batch_size]
                    places, drawn = [at for at, _ in part], [row for _, row in part]
                    begun = logits, state
                    if places != list(range(len(unique))) or len(part) < len(members):  # choosing copies the cache
                        index = torch.tensor(places, device=self._device)
                        begun = logits[index], state.select(index)
                    noises = noise[drawn].to(self._device)
                    stopped, watch = self._stopped if self._stop else None, self._watch(drawn)
                    failed: SurgeryError | None = None
                    for row, ended in decode(self.decoder, *begun, noises, self.sampling, self._ends, stopped, watch):
                        prompt = drawn[row] // group
                        try:
                            made = self._rollout(drawn[row], prompt, rows[prompt], *ended)
                        except SurgeryError as error:  # told when the others of this batch have ended
                            failed = failed or error
                        else:
                            yield drawn[row], made
                    if failed is not None:
                        raise failed

    def _search(
        self, rows: Sequence[Any], group: int, seeds: Sequence[int], beams: Beams
    ) -> Iterator[tuple[int, Rollout]]:
        for unique, members in self._blocks(rows, 1, beams.number):
            logits, state = self._prefill(unique)
            index = torch.tensor([at for at, _ in members], device=self._device)
            prompts = [prompt for _, prompt in members]
            search = beam_search(
                self.decoder, logits[index], state.select(index), beams=beams.number, ends=self._ends,
                max_new_tokens=self.sampling.max_new_tokens, length_penalty=beams.length_penalty,
                early_stopping=beams.early_stopping, sampling=self.sampling, seeds=[seeds[i] for i in prompts],
                returned=group, stopped=self._stopped if self._stop else None,
            )  # fmt: skip
            try:
                for place, found in search:
                    first = prompts[place] * group
                    self._check_number(prompts[place], found, group)
                    for row, one in enumerate(found, first):
                        yield row, self._rollout(row, prompts[place], rows[prompts[place]], one.tokens, one.log_probs)
            except NotFiniteError as error:
                raise SurgeryError(self._why(prompts[error.prompt], error.token, error.state)) from error

    def _check_number(self, prompt: int, found: Sequence[Hypothesis], group: int) -> None:
        whole = all(one.ended or len(one.tokens) == self.sampling.max_new_tokens for one in found)
        if len(found) < group and whole:  # not interrupted
            raise SurgeryError(
                f"Prompt {prompt} has {len(found)} completions that are not forbidden; a group is {group}.",
                hint="Ask for a smaller group.",
            )

    # What a generator of another kind of prompt does otherwise: `logits.generate`.

    def _readable(self, index: int, prompt: Sequence[int]) -> Any:
        """The prompt that the model reads; refused when the completion can't fit behind it."""
        prompt = list(prompt) or [self._start(index, self.tokenizer)]
        self._check_room(index, len(prompt), getattr(self.decoder, "context", None))
        return tuple(prompt)

    def _length(self, row: Any) -> int:
        return len(row)

    def _prefill(self, rows: list[Any]) -> tuple[Tensor, Any]:
        """Logits after the prompts, and the decoder's state."""
        return self.decoder.prefill(*_left_padded(rows, min(self._ends, default=0), self._device))

    def _watch(self, rows: list[int]) -> Watch | None:
        """What is to be called at each draw of these rows."""
        return None

    def _rollout(self, row: int, index: int, prompt: Any, ids: list[int], log_probs: list[float]) -> Rollout:
        if not math.isfinite(sum(log_probs)):
            raise SurgeryError(self._why(index, int(np.isfinite(log_probs).argmin())))
        ended, text = self._ended(ids)
        return Rollout(list(prompt), ids, log_probs, ended == "length", text)

    def _why(self, index: int, at: int, state: Any = None) -> str:
        """What to say of a prompt's logits that are not finite; `state` is that behind them, where it is at hand."""
        return f"The policy's logits for prompt {index} are not finite at completion token {at}."

    # ---- what all do

    @staticmethod
    def _start(index: int, tokenizer: PreTrainedTokenizerBase | None) -> int:
        """What an empty prompt is: one token to begin with."""
        known = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
        start = next((token for token in known if token is not None), None)
        if start is None:
            raise SurgeryError(f"Prompt {index} is empty, and the tokenizer has no token to begin with.")
        return start

    def _check_room(self, index: int, length: int, context: int | None, whose: str = "the context") -> None:
        new = self.sampling.max_new_tokens
        if context is not None and length + new > context:
            raise SurgeryError(
                f"Prompt {index} has {length} tokens, and {new} new ones don't fit into {whose} of {context}.",
                hint="Shorten the prompts or lower max_new_tokens.",
            )

    def _ended(self, ids: list[int]) -> tuple[Ended, str]:
        """How a completion ended, and its text, cut before the first stop string."""
        ends = bool(ids) and ids[-1] in self._ends
        text = self._text(ids[:-1] if ends else ids)
        cuts = [cut for cut in (text.find(stop) for stop in self._stop) if cut >= 0]
        return ("eos" if ends else "stop" if cuts else "length"), text[: min(cuts)] if cuts else text

    @property
    def _device(self) -> torch.device:
        parameter = next((p for model in self._models for p in model.parameters()), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def _blocks(
        self, rows: Sequence[Any], group: int, width: int = 1
    ) -> Iterator[tuple[list[Any], list[tuple[int, int]]]]:
        """Different prompts of similar length, longest first, and their rows as (prompt in the block, row).

        A block has at most `batch_size` rows, each counted `width` times, or one prompt.
        """
        same: dict[Any, list[int]] = {}
        for i, prompt in enumerate(rows):
            same.setdefault(prompt, []).extend(range(i * group, (i + 1) * group))
        unique: list[Any] = []
        members: list[tuple[int, int]] = []
        for ids, copies in sorted(same.items(), key=lambda item: -self._length(item[0])):
            if unique and (len(members) + len(copies)) * width > self.sampling.batch_size:
                yield unique, members
                unique, members = [], []
            members.extend((len(unique), row) for row in copies)
            unique.append(ids)
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


def _left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def end_tokens(tokenizer: PreTrainedTokenizerBase | None, models: Sequence[Any]) -> set[int]:
    """Every end-of-sequence token that the tokenizer or a model's generation config names."""
    named: set[Any] = {getattr(tokenizer, "eos_token_id", None)}
    for model in models:
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        named |= set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return named - {None}
