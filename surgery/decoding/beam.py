"""Beam search and beam sampling over any decoder, in the order of operations of transformers' `_beam_search` (5.24).

A step: log-probabilities of every running beam (when sampling: divided by the temperature, then truncated, not
normalised again), added to the beam's score; of a prompt's `beams * vocab` candidates the best
`max(2, 1 + len(ends)) * beams`, or as many drawn without replacement; of those, ended ones among the first `beams` are
finished hypotheses, scored by sum / length ** length_penalty, and the best `beams` that go on run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from surgery.decoding.causal import Decoder
from surgery.decoding.loop import Stopped
from surgery.decoding.sampling import Sampling, truncate, uniforms
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

DEAD = -torch.inf
"""Score of a candidate that is none: the copies of a prompt before its first token, forbidden tokens."""


@dataclass(frozen=True)
class Beams:
    """How a generator searches: see `beam_search`. What it returns of a prompt are its best hypotheses."""

    number: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One continuation of one prompt."""

    tokens: list[int]
    """With the end-of-sequence token if there is one."""
    log_probs: list[float]
    """Nats, one a token, as a `Rollout` has them: before truncation, at the temperature when sampling."""
    score: float
    """What hypotheses are ranked by: the sum of the (tempered) log-probabilities / length ** length_penalty; without
    `normalise` that of the logits."""
    ended: bool
    """An end-of-sequence token or a stop string came; otherwise the search did."""


class NotFiniteError(SurgeryError):
    """A prompt's logits are NaN, or forbid every token; `state` is the decoder's, as it was when it gave them."""

    def __init__(self, prompt: int, token: int, state: Any) -> None:
        super().__init__(f"The decoder's logits for prompt {prompt} are not finite at new token {token}.")
        self.prompt, self.token, self.state = prompt, token, state


@dataclass
class _Running:
    """What goes on: prompts in the first dimension, their beams, best first, in the second."""

    prompts: Tensor
    scores: Float[Tensor, "prompt beam"]
    tokens: Int[Tensor, "prompt beam pos"]
    log_probs: Float[Tensor, "prompt beam pos"]

    def pick(self, beams: Tensor) -> _Running:
        """The named beams of each prompt (prompt, kept)."""
        long = beams.unsqueeze(2).expand(-1, -1, self.tokens.shape[2])
        scores, tokens, log_probs = self.scores.gather(1, beams), self.tokens.gather(1, long), self.log_probs
        return _Running(self.prompts, scores, tokens, log_probs.gather(1, long))

    def keep(self, rows: Tensor) -> _Running:
        """The named prompts."""
        return _Running(self.prompts[rows], self.scores[rows], self.tokens[rows], self.log_probs[rows])


def beam_search(
    decoder: Decoder,
    logits: Float[Tensor, "prompt vocab"],
    state: Any,
    *,
    beams: int,
    max_new_tokens: int,
    ends: Collection[int],
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    returned: int = 1,
    stopped: Stopped | None = None,
    normalise: bool = True,
) -> Iterator[tuple[int, list[Hypothesis]]]:
    """Yields (prompt, its `returned` best hypotheses, best first) as prompts are done.

    `logits` and `state` come from the decoder's `prefill`, one row a prompt; run it inside `undisturbed`, as `decode`.
    `sampling` None or at temperature 0 is beam search; otherwise candidates are drawn, with its temperature, top-k,
    top-p and min-p (which leave at least 1 + len(ends) tokens a beam) and noise from each prompt's seed alone.
    Without `normalise` the logits themselves are added up, for a composition its scores: a beam ahead in them stays
    ahead, even where a token was the only one allowed. `early_stopping` as in transformers: True ends with `beams`
    finished hypotheses, False when the best running beam is worse than all of them at its present length, "never" when
    it is at its best length. There are fewer hypotheses when filters leave fewer. Stopped by Ctrl-C, it yields what
    there is, running beams included, and KeyboardInterrupt goes on. Raises `SurgeryError` for numbers out of range,
    missing seeds and logits that are not finite.
    """
    drawing = sampling if sampling is not None and sampling.temperature > 0 else None
    _check(len(logits), beams, max_new_tokens, returned, early_stopping, drawing, seeds)
    least = max(2, 1 + len(set(ends)))
    width = least * beams
    device, vocab = logits.device, logits.shape[1]
    noise = None
    if drawing is not None and seeds is not None:
        noise = torch.from_numpy(uniforms(seeds, width, max_new_tokens)).to(device)
    is_end = torch.zeros(vocab, dtype=torch.bool, device=device)
    is_end[[token for token in ends if token < vocab]] = True
    empty = logits.new_empty(len(logits), 1, 0, dtype=torch.float32)
    running = _Running(torch.arange(len(logits), device=device), empty.sum(2), empty.long(), empty)
    finished: list[list[Hypothesis]] = [[] for _ in range(len(logits))]
    try:
        for t in range(max_new_tokens):
            log_probs = logits.float().log_softmax(-1)
            added = warped(log_probs if normalise else logits.float(), drawing, least)
            scores = added.view(*running.scores.shape, vocab) + running.scores.unsqueeze(2)
            if (wrong := ~torch.isfinite(scores.amax((1, 2)))).any():
                raise NotFiniteError(int(running.prompts[wrong][0]), t, state)
            values, index = _candidates(
                scores.flatten(1), width, None if noise is None else noise[running.prompts, :, t]
            )
            parents, tokens = index // vocab, index % vocab
            rows = parents + torch.arange(len(parents), device=device).unsqueeze(1) * running.scores.shape[1]
            told = _told(log_probs, rows, tokens, drawing)
            grown = running.pick(parents)
            grown = _Running(
                running.prompts,
                values,
                torch.cat((grown.tokens, tokens.unsqueeze(2)), 2),
                torch.cat((grown.log_probs, told.unsqueeze(2)), 2),
            )
            ended = is_end[tokens]
            if stopped is not None:
                ended = ended | stopped(grown.tokens.flatten(0, 1), (~ended).flatten()).view_as(ended)
            last = t + 1 == max_new_tokens
            _finish(finished, grown, ended, ended | last, beams, length_penalty)
            if last:
                break
            alive, best = values.masked_fill(ended, DEAD).topk(min(beams, values.shape[1]))
            running, rows = grown.pick(best), rows.gather(1, best)
            running.scores = alive
            going = _going(finished, running, t + 1, max_new_tokens, beams, length_penalty, early_stopping)
            done, left = running.prompts[~going].tolist(), going.nonzero().squeeze(1)
            running, rows = running.keep(left), rows[left].flatten()
            yield from ((prompt, finished[prompt][:returned]) for prompt in done)
            if not len(rows):
                return
            if not torch.equal(rows, torch.arange(len(logits), device=device)):  # choosing copies the cache
                state = state.select(rows)
            logits, state = decoder.step(running.tokens[:, :, -1].flatten(), state)
    except KeyboardInterrupt:
        none = torch.zeros_like(running.scores, dtype=torch.bool)
        _finish(finished, running, none, ~none, beams, length_penalty)
        yield from ((prompt, finished[prompt][:returned]) for prompt in running.prompts.tolist())
        raise
    yield from ((prompt, finished[prompt][:returned]) for prompt in running.prompts.tolist())


def warped(log_probs: Float[Tensor, "row vocab"], sampling: Sampling | None, least: int) -> Float[Tensor, "row vocab"]:
    """Divided by the temperature; what top-k, top-p and min-p leave out is -inf, of which `least` tokens are spared.

    Logits that are not normalised stay so.
    """
    if sampling is None:
        return log_probs
    if sampling.temperature != 1:
        log_probs = log_probs / sampling.temperature
    if not (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
        return log_probs
    sparing = replace(sampling, top_k=max(sampling.top_k, least) if sampling.top_k else 0)
    kept = truncate(log_probs.softmax(-1), sparing) > 0
    kept.scatter_(1, log_probs.topk(min(least, log_probs.shape[1])).indices, True)
    return log_probs.masked_fill(~kept, DEAD)


def without_replacement(
    scores: Float[Tensor, "row choice"], noise: Float[Tensor, "row count"]
) -> tuple[Float[Tensor, "row count"], Int[Tensor, "row count"]]:
    """`count` different choices of each row and their scores, drawn one after the other with softmax(scores) of what is
    left, by inverse CDF of the numbers of `noise` (in [0, 1)).

    The law is that of `torch.multinomial` without replacement and of the largest scores + Gumbel noise, with `count`
    numbers instead of one a choice, and none of them depends on the size of the vocabulary. A row with fewer choices
    that are not -inf ends in choices of score -inf.
    """
    left, values, choices = scores.clone(), [], []
    for uniform in noise.unbind(1):
        cumulative = left.softmax(-1).nan_to_num(0.0).cumsum(-1)
        target = uniform.unsqueeze(1) * cumulative[:, -1:]
        choice = torch.searchsorted(cumulative, target, right=True).clamp_(max=scores.shape[1] - 1)
        values.append(left.gather(1, choice))
        choices.append(choice)
        left.scatter_(1, choice, DEAD)
    return torch.cat(values, 1), torch.cat(choices, 1)


def _candidates(scores: Tensor, width: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """(prompt, candidate) scores, best first, and places in `scores`."""
    width = min(width, scores.shape[1])
    if noise is None:
        best = scores.topk(width)
        return best.values, best.indices
    values, index = without_replacement(scores, noise[:, :width])
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


def _told(log_probs: Tensor, rows: Tensor, tokens: Tensor, sampling: Sampling | None) -> Tensor:
    """Log-probabilities of the candidates' tokens for a reader: of the whole vocabulary, at the temperature."""
    found = log_probs[rows, tokens]
    if sampling is None or sampling.temperature == 1:
        return found
    return found / sampling.temperature - (log_probs / sampling.temperature).logsumexp(-1)[rows]


def _finish(
    finished: list[list[Hypothesis]], grown: _Running, ended: Tensor, done: Tensor, beams: int, length_penalty: float
) -> None:
    """Adds the candidates among the first `beams` that are done; each prompt keeps its best `beams`."""
    new = done[:, :beams] & (grown.scores[:, :beams] > DEAD)
    length = grown.tokens.shape[2]
    scores = (grown.scores / max(length, 1) ** length_penalty).tolist()
    prompts = grown.prompts.tolist()
    for row, beam in new.nonzero().tolist():
        told = (grown.tokens[row, beam].tolist(), grown.log_probs[row, beam].tolist())
        best = finished[prompts[row]]
        best.append(Hypothesis(*told, scores[row][beam], bool(ended[row, beam])))
        best.sort(key=lambda hypothesis: -hypothesis.score)
        del best[beams:]


def _going(
    finished: list[list[Hypothesis]],
    running: _Running,
    length: int,
    longest: int,
    beams: int,
    length_penalty: float,
    early_stopping: bool | str,
) -> Tensor:
    """Which prompts' best running beam can still better the worst of `beams` finished hypotheses."""
    if early_stopping == "never" and length_penalty > 0:
        length = longest
    best = (running.scores[:, 0] / length**length_penalty).tolist()
    known = [finished[prompt] for prompt in running.prompts.tolist()]
    worst = [found[-1].score if len(found) == beams else DEAD for found in known]
    full = [early_stopping is True and len(found) == beams for found in known]
    going = [hope > known and not done for hope, known, done in zip(best, worst, full, strict=True)]
    return torch.tensor(going, device=running.scores.device)


def _check(
    prompts: int,
    beams: int,
    max_new_tokens: int,
    returned: int,
    early_stopping: bool | str,
    drawing: Sampling | None,
    seeds: Sequence[int] | None,
) -> None:
    for name, value, right, expected in (
        ("beams", beams, beams >= 1, "at least 1"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("returned", returned, 1 <= returned <= beams, f"between 1 and the {beams} beams"),
        ("early_stopping", early_stopping, early_stopping in (True, False, "never"), 'True, False or "never"'),
    ):
        if not right:
            raise SurgeryError(f"beam search: {name} is {value!r}; expected {expected}.")
    if drawing is not None and (seeds is None or len(seeds) != prompts):
        found = "none" if seeds is None else f"{len(seeds)} seeds for {prompts} prompts"
        raise SurgeryError(f"Beam sampling needs one seed a prompt; found {found}.")
