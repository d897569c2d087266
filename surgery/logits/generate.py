"""Completions from a composition: many prompts at once, or one as a stream of pieces.

    from surgery.decoding import Sampling

    found = generate(large + (tuned - small), ["How tall is it?"], sampling=Sampling(64, temperature=0.7), group=4)
    found[0].text, found[0].log_probs, found[0].members["large"]
    for piece in stream(ensemble, "How tall is it?"):
        print(piece.text, end="", flush=True)

Anything that decodes is taken: an ensemble, a model, a model whose fine-tuning is scaled, a generator that asks in
other letters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from surgery.decoding import Beams, LocalGenerator, Rollout, Sampling, draw, undisturbed, uniforms
from surgery.errors import SurgeryError
from surgery.logits.ensemble import Ensemble, member
from surgery.logits.lockstep import Encoded, EnsembleState
from surgery.logits.members import Prompt, is_ids, listed
from surgery.logits.score import begun, score_encoded
from surgery.models import encoded_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEDY = Sampling(256, temperature=0.0, batch_size=32)
Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""
Each = Callable[[int, "Generation"], None]
"""Called with (place, completion) as soon as it has ended: what is done survives an error in a later one."""


@dataclass(frozen=True, slots=True)
class Generation(Rollout):
    """One completion under a composition."""

    ended: Literal["eos", "stop", "length", "interrupted"] = "length"
    members: dict[str, list[float]] = field(default_factory=dict)
    """What each member gave each token, nats; where it was asked for."""


@dataclass(frozen=True)
class Piece:
    """A token of a stream, and the text that it completes: none while a character or a stop string is cut in two."""

    text: str
    token: int | None
    log_prob: float
    members: dict[str, float]
    ended: Literal["eos", "stop", "length"] | None = None


def generate(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling | None = None,
    group: int = 1,
    seed: int = 0,
    beams: Beams | int | None = None,
    members: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
    each: Each | None = None,
) -> list[Generation]:
    """`group` completions of each prompt, groups contiguous.

    Greedy by default, as far as contexts go and for 256 tokens at most; otherwise as a `surgery.decoding.Sampling`
    says. `prompts`: texts, lists of messages or token ids. A row's noise depends on `seed`, its prompt's place and its
    place in the group only. Log-probabilities are the composition's at the temperature (1 when greedy), normalised over
    its vocabulary after its filter and before truncation; with `members` also each member's own, at temperature 1. With
    `beams` (how many, or a `surgery.decoding.Beams` with a length penalty) a prompt's group are the best of them, best
    first; at a temperature above 0 they are drawn. Ctrl-C ends it early: what is there is returned, `ended`
    "interrupted"; an error leaves what `each` was given, which may be a dict's `__setitem__`. `tokenizer` is for a
    model that is no ensemble and no name.

    Raises `SurgeryError` for prompts that don't fit into a member's context, naming it, and for scores that are not
    finite.
    """
    prompts = listed(prompts)
    if not isinstance(group, int) or group < 1:
        raise SurgeryError(f"A group of {group!r} completions; expected 1 or more.")
    if isinstance(beams, int):
        beams = Beams(int(beams))
    for what, given, kind in (("sampling", sampling, Sampling), ("beams", beams, Beams)):
        if given is not None and not isinstance(given, kind):
            raise SurgeryError(f"{what} is {given!r}.", hint=f"surgery.decoding.{kind.__name__}(...).")
    run: Any = _generator(model, prompts, tokenizer, sampling, members, beams)
    if beams is not None and not isinstance(run, LocalGenerator):
        raise SurgeryError("Beams need models to decode from; this draws whole completions.")
    if run is model and (sampling is not None or beams is not None):
        raise SurgeryError("A generator draws by its own settings: leave sampling and beams out.")
    seeds = [(seed << 32) + i for i in range(len(prompts))]
    done: dict[int, Generation] = {}
    if not isinstance(run, LocalGenerator):  # one that draws by itself, of token ids
        done = {i: _told(one) for i, one in enumerate(run(_ids(prompts, tokenizer), group, seeds))}
        if each is not None:
            for row, found in done.items():
                each(row, found)
    else:
        prompts = list(prompts) if isinstance(run, Composed) else _ids(prompts, tokenizer)
        try:
            for row, one in run.draw(prompts, group, seeds):
                done[row] = one if isinstance(one, Generation) else _told(one)
                if each is not None:
                    each(row, done[row])
                if progress is not None:
                    progress(len(done), len(prompts) * group)
        except KeyboardInterrupt:
            pass
    unread = Generation([], [], [], True, "", "interrupted")
    return [done.get(row, unread) for row in range(len(prompts) * group)]


def stream(
    model: Any,
    prompt: Prompt,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    index: int = 0,
    sample: int = 0,
    members: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[Piece]:
    """The completion of one prompt, token by token: the texts joined are the text that `generate` gives.

    `index` is the prompt's place among those that `generate` is given, and `sample` the place in its group. With
    `members` each piece says what every member
    gave its token. Between pieces the models' modes and torch's gradients are as they were. Raises as `generate` does.
    """
    run = _generator(model, [prompt], tokenizer, sampling, members)
    if not isinstance(run, Composed):
        raise SurgeryError("A stream needs models to decode from; this draws whole completions.")
    return run.stream(prompt, (seed << 32) + index, sample)


def room(ensemble: Ensemble, prompts: Sequence[Prompt], most: int = 256) -> int:
    """How many new tokens fit behind the longest of the prompts into every member's context; from 1 to `most`."""
    free = [most]
    for row in map(ensemble.encode, prompts):
        for reader, views in zip(ensemble.readers, row, strict=True):
            if reader.decoder.context is not None:
                free.append(reader.decoder.context - max(map(len, views)))
    return max(1, min(free))


class Composed(LocalGenerator):
    """Draws completions from an ensemble, whose members read a prompt each in their own way."""

    decoder: Ensemble

    def __init__(
        self, ensemble: Ensemble, sampling: Sampling, members: bool = False, beams: Beams | None = None
    ) -> None:
        super().__init__(ensemble, ensemble.tokenizer, sampling, beams)
        self.members = members
        self._names = [ensemble.name_of(one) for one in ensemble.members]
        self._said: dict[int, list[list[float]]] = {}
        self._failed: str | None = None

    def _readable(self, index: int, prompt: Prompt) -> Encoded:
        row = begun(self.decoder, index, prompt)
        for reader, views in zip(self.decoder.readers, row, strict=True):
            for ids in views:
                self._check_room(index, len(ids), reader.decoder.context, f"the context of '{reader.members[0].name}'")
        return row

    def _length(self, row: Encoded) -> int:
        return max(len(ids) for views in row for ids in views)

    def _prefill(self, rows: list[Encoded]) -> tuple[Tensor, Any]:
        return self.decoder.prefill_encoded(rows)

    def _watch(self, rows: list[int]) -> Callable[[Tensor, Tensor, Tensor, Any], None]:
        def watch(lines: Tensor, alive: Tensor, tokens: Tensor, state: EnsembleState) -> None:
            self._failed = self._failed or self.decoder.failing(state)
            if self.members:
                told = said(state, tokens)
                for line, going, values in zip(lines.tolist(), alive.tolist(), told, strict=True):
                    if going:
                        self._said.setdefault(rows[line], []).append(values)

        return watch

    def _rollout(self, row: int, index: int, prompt: Encoded, ids: list[int], log_probs: list[float]) -> Generation:
        if not math.isfinite(sum(log_probs)):
            raise SurgeryError(self._why(index, int(np.isfinite(log_probs).argmin())))
        ended, text = self._ended(ids)
        short = ended == "length" and len(ids) < self.sampling.max_new_tokens
        values = self._said.pop(row, [])
        by_member = dict(zip(self._names, map(list, zip(*values, strict=True)), strict=True)) if values else {}
        if self.members and self.beams is not None and ids:  # a search has no draws to watch
            by_member = score_encoded(self.decoder, [prompt], [ids])[0].members
        own = prompt[self._base_reader][0]
        how = "interrupted" if short else ended
        return Generation(list(own), ids, log_probs, ended == "length", text, how, by_member)

    @property
    def _base_reader(self) -> int:
        base = self.decoder.base
        return next(i for i, r in enumerate(self.decoder.readers) if any(m.key == base.key for m in r.members))

    def _why(self, index: int, at: int, state: EnsembleState | None = None) -> str:
        where = f"(prompt {index}, completion token {at})"
        failed = self._failed if state is None else self.decoder.failing(state)
        if failed is not None:
            return f"The logits of '{failed}' are not numbers {where}."
        return f"All tokens are forbidden {where}: by the base's own logits, or by what members lack."

    def stream(self, prompt: Prompt, seed: int, sample: int = 0) -> Iterator[Piece]:
        """One completion, a piece a token."""
        row = self._readable(0, prompt)
        noises = uniforms([seed], sample + 1, self.sampling.max_new_tokens)[0, sample:]
        noise = torch.from_numpy(noises).to(self._device)
        ids: list[int] = []
        shown = 0
        with undisturbed(*self._models):
            scores, state = self._prefill([row])
        for t in range(self.sampling.max_new_tokens):
            with undisturbed(*self._models):
                token, log_prob = draw(scores, noise[:, t], self.sampling)
                if not math.isfinite(float(log_prob)):
                    self._failed = self.decoder.failing(state)
                    raise SurgeryError(self._why(0, t))
                ids.append(int(token))
                piece = self._piece(ids, float(log_prob), said(state, token)[0] if self.members else [], shown)
                shown += len(piece.text)
            # Outside: two streams that take turns would restore each other's modes.
            yield piece
            if piece.ended is not None:
                return
            with undisturbed(*self._models):
                scores, state = self.decoder.step(token, state)

    def _piece(self, ids: list[int], log_prob: float, told: list[float], shown: int) -> Piece:
        """The last of the tokens so far, of whose text `shown` characters are out; what the members `told` of it."""
        ended, text = self._ended(ids)
        over = ended != "length" or len(ids) == self.sampling.max_new_tokens
        sure = text if over else _settled(text, self._stop)
        by_member = dict(zip(self._names, told, strict=True)) if told else {}
        return Piece(sure[shown:], ids[-1], log_prob, by_member, ended if over else None)


def said(state: EnsembleState, tokens: Tensor) -> list[list[float]]:
    """By row, what each member gave the row's token: log-probabilities in nats."""
    values = [one[:, -1].log_softmax(-1).gather(1, tokens[:, None]) for one in state.log_probs]
    return torch.cat(values, 1).tolist()


def _settled(text: str, stops: Sequence[str]) -> str:
    """The text as far as no later token can change or cut it."""
    text = text.rstrip("\ufffd")  # a character of which bytes are missing
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                text = text[:-length]
                break
    return text


def _generator(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase | None,
    sampling: Sampling | None,
    members: bool,
    beams: Beams | None = None,
) -> LocalGenerator | Any:
    modules = hasattr(model, "named_parameters")  # models, and what wraps one
    if modules or isinstance(model, (str, Path)) or not (callable(model) or _decodes(model)):
        model = member(model, tokenizer)
    if isinstance(model, Ensemble):
        return Composed(model, sampling or replace(GREEDY, max_new_tokens=room(model, prompts)), members, beams)
    if members:
        raise SurgeryError("Only the members of an ensemble can be told apart: members=True needs one.")
    if _decodes(model):
        return LocalGenerator(model, _needed(tokenizer), sampling or GREEDY, beams)
    return model


def _decodes(model: Any) -> bool:
    return hasattr(model, "prefill")


def _told(one: Rollout) -> Generation:
    how: Any = "length" if one.truncated else "eos"
    return Generation(one.prompt_ids, one.completion_ids, one.log_probs, one.truncated, one.text, how)


def _ids(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    texts = [prompt for prompt in prompts if not is_ids(prompt)]
    found = iter(encoded_prompts(_needed(tokenizer), texts) if texts else [])
    return [list(prompt) if is_ids(prompt) else next(found) for prompt in prompts]  # type: ignore[arg-type]


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise SurgeryError("What is no ensemble of models comes with its tokenizer: pass tokenizer=.")
    return tokenizer
