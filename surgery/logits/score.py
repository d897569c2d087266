"""How likely a composition finds given texts: log-probability a token, and the perplexity of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.decoding import LocalGenerator, undisturbed
from surgery.errors import SurgeryError
from surgery.logits.ensemble import Ensemble, member
from surgery.logits.lockstep import Encoded, EnsembleState, within
from surgery.logits.members import Prompt, is_ids, listed
from surgery.models import tokenized

POSITIONS = 128
"""Places at which the members' logits are there at a time: memory is this times the vocabulary, whatever the texts."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One response under a composition. Every list has a number a token, in nats."""

    ids: list[int]
    """Of the common vocabulary; with the end mark, where it was asked for."""
    log_probs: list[float]
    """The composition's, normalised after its filter; -inf where that leaves a token out."""
    members: dict[str, list[float]] = field(default_factory=dict)
    """Each member's own."""


def log_likelihood(
    ensemble: Ensemble | nn.Module | str | Path,
    prompts: Sequence[Prompt],
    responses: Sequence[str | Sequence[int]],
    *,
    end: bool = True,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Scored]:
    """Log-probabilities of each response (a text or token ids) after its prompt, with the base's end mark (`end`).

    log p(y_t) = s(y_t) - logsumexp(s): their sum is the log-probability of the response under the composition as it
    decodes. Every member reads the prompt in its own way, and the same response. Token ids that end with the end mark
    get no second one. Raises `SurgeryError` when the lists differ in length, for responses of no tokens or with others
    than the base's, and for texts longer than a member's context, naming it. An empty prompt is one token to begin
    with, as in `generate`.
    """
    prompts, responses = listed(prompts), listed(responses, "Responses")
    if len(prompts) != len(responses):
        raise SurgeryError(f"{len(prompts)} prompts, but {len(responses)} responses.")
    if batch_size < 1:
        raise SurgeryError(f"batch_size is {batch_size}; expected 1 or more.")
    if not isinstance(ensemble, Ensemble):
        ensemble = member(ensemble)
    rows = [begun(ensemble, i, prompt) for i, prompt in enumerate(prompts)]
    answers = _answers(ensemble, responses, end)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        if not answer:
            raise SurgeryError(f"Response {i} has no tokens.")
        within(answer, ensemble.vocabulary, f"response {i}")
        for reader, views in zip(ensemble.readers, row, strict=True):
            context, length = reader.decoder.context, max(map(len, views)) + len(answer)
            if context is not None and length > context:
                raise SurgeryError(f"Text {i} has {length} tokens for '{reader.members[0].name}', whose context is "
                                   f"{context}.", hint="Shorten it.")  # fmt: skip
    order = sorted(range(len(rows)), key=lambda i: -len(answers[i]))
    found: dict[int, Scored] = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        with undisturbed(*ensemble.models):
            told = score_encoded(ensemble, [rows[i] for i in part], [answers[i] for i in part])
        found |= dict(zip(part, told, strict=True))
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return [found[i] for i in range(len(rows))]


def perplexity(scored: Sequence[Scored]) -> float:
    """exp of the mean negative log-probability over all tokens of all texts. Raises `SurgeryError` for no texts."""
    values = [value for one in scored for value in one.log_probs]
    if not values:
        raise SurgeryError("There are no texts, whose perplexity could be told.")
    return math.exp(-math.fsum(values) / len(values)) if math.isfinite(sum(values)) else math.inf


def begun(ensemble: Ensemble, index: int, prompt: Prompt) -> Encoded:
    """What every reader reads of a prompt: of an empty one, its tokenizer's first token. Raises without such a one."""
    return tuple(
        tuple(ids or (LocalGenerator._start(index, reader.members[0].tokenizer),) for ids in views)
        for reader, views in zip(ensemble.readers, ensemble.encode(prompt), strict=True)
    )


def _answers(ensemble: Ensemble, responses: Sequence[str | Sequence[int]], end: bool) -> list[list[int]]:
    texts = [one for one in responses if isinstance(one, str)]
    told = iter(tokenized(ensemble.tokenizer, texts, special=False) if texts else [])
    mark = ensemble.base.tokenizer.eos_token_id if end and ensemble.base.tokenizer is not None else None
    last = [] if mark is None else [int(mark)]
    if not all(isinstance(one, str) or is_ids(one) for one in responses):
        raise SurgeryError("A response is a text or token ids.")
    found = [next(told) if isinstance(one, str) else [int(i) for i in one] for one in responses]
    return [ids if not isinstance(one, str) and ids[-1:] == last else [*ids, *last]
            for one, ids in zip(responses, found, strict=True)]  # fmt: skip


def score_encoded(ensemble: Ensemble, rows: Sequence[Any], answers: Sequence[list[int]]) -> list[Scored]:
    """The same of prompts that `Ensemble.encode` made, in one batch."""
    scores, state = ensemble.prefill_encoded(rows)
    longest = max(map(len, answers))
    ids = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers], device=scores.device)
    values = [_taken(scores[:, None], state, ids[:, :1])]
    step = max(1, POSITIONS // len(rows))
    for start in range(0, longest - 1, step):
        stop = min(start + step, longest - 1)
        values.append(_taken(ensemble.read(ids[:, start:stop], state), state, ids[:, start + 1 : stop + 1]))
    table = torch.cat(values, 2).tolist()  # [composition, member, ...][row][token]
    names = [ensemble.name_of(one) for one in ensemble.members]
    found = []
    for i, answer in enumerate(answers):
        own = [part[i][: len(answer)] for part in table]
        if any(math.isnan(value) for value in own[0]):
            which = next((n for n, values in zip(names, own[1:], strict=True) if any(map(math.isnan, values))), None)
            raise SurgeryError(f"The logits of '{which}' are not numbers." if which else
                               "The composition forbids every token at some place.")  # fmt: skip
        found.append(Scored(answer, own[0], dict(zip(names, own[1:], strict=True))))
    return found


def _taken(scores: Tensor, state: EnsembleState, ids: Tensor) -> Tensor:
    """([composition, member, ...], row, pos) log-probabilities of `ids`."""
    told = [scores, *state.log_probs]
    return torch.stack([one.log_softmax(-1).gather(2, ids[..., None])[..., 0] for one in told])
