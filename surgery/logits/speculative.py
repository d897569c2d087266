"""Speculative decoding of a composition: a small member drafts, the others read what it drafted in one pass.

    found = speculate(large + (tuned - small), prompts, draft=tuned)
    found[0].text, found.report.tokens_per_round

A round: the draft says k tokens, a step each; every other member reads them in one block; with p the composition and q
the draft, both behind temperature and truncation, draft i is kept with probability min(1, p_i(y)/q_i(y)); in the place
of the first that is not, a token is drawn from max(p_i - q_i, 0); behind k kept ones comes one from p. What was read
too far is cropped from the caches. The law is that of plain decoding (Leviathan et al. 2023, arXiv:2211.17192, theorem
3.5; Chen et al. 2023, arXiv:2302.01318); greedy decoding is the case of one-hot p and q, and gives the plain tokens up
to the rounding of blocks. That the draft is a term of what it drafts for is EFT's (Mitchell et al. 2023,
arXiv:2310.12962, section 4.3): its rows of the block are there already.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.decoding import CausalState, Sampling, truncate, undisturbed, uniforms
from surgery.errors import SurgeryError
from surgery.logits.ensemble import Ensemble
from surgery.logits.generate import GREEDY, Composed, Each, Generation, Piece, Progress
from surgery.logits.lockstep import Encoded, EnsembleState, Reader, readers_of
from surgery.logits.members import Member, Prompt

Show = Callable[[int, Piece], None]
"""Called with (the prompt's place, a token and its text), a round's tokens one after the other."""
LONGEST = 32
"""Tokens beyond which no draft grows."""
DRAFT, JUDGE, MEND = range(3)
"""Streams of noise: what drafts (and tokens behind a block that was kept whole) are drawn with, whether they are kept,
what comes in their place. A draft that is the composition itself so draws what plain decoding draws."""


@dataclass
class Report:
    """How speculation went. By prompt first; the rest is made of that."""

    drafted: list[list[int]] = field(default_factory=list)
    """By prompt and round: how many tokens were drafted."""
    accepted: list[list[int]] = field(default_factory=list)
    """By prompt and round: how many of them were kept."""
    tokens: list[int] = field(default_factory=list)
    """By prompt: new tokens."""
    seconds: list[float] = field(default_factory=list)
    """By prompt: wall time, reading the prompt included."""
    calls: dict[str, int] = field(default_factory=dict)
    """By member: forward passes of its model, prompts included."""

    @property
    def rounds(self) -> int:
        return sum(map(len, self.drafted))

    @property
    def accept_rate(self) -> float:
        """Share of the drafted tokens that were judged (all up to the first rejected one) which were kept."""
        pairs = [p for row in zip(self.drafted, self.accepted, strict=True) for p in zip(*row, strict=True)]
        kept, rejected = sum(a for _, a in pairs), sum(a < d for d, a in pairs)
        return kept / (kept + rejected) if pairs and kept + rejected else math.nan

    @property
    def mean_accepted(self) -> float:
        """Drafted tokens kept a round."""
        return sum(map(sum, self.accepted)) / self.rounds if self.rounds else math.nan

    @property
    def tokens_per_round(self) -> float:
        """New tokens a round; the first of each prompt comes with reading the prompt, and is left out."""
        later = sum(max(count - 1, 0) for count in self.tokens)
        return later / self.rounds if self.rounds else math.nan

    @property
    def tokens_per_s(self) -> float:
        return sum(self.tokens) / sum(self.seconds) if sum(self.seconds) else math.nan

    def summary(self) -> dict[str, float | int | dict[str, int]]:
        """The numbers over all prompts."""
        return {
            "tokens": sum(self.tokens), "rounds": self.rounds, "accept_rate": self.accept_rate,
            "mean_accepted": self.mean_accepted, "tokens_per_round": self.tokens_per_round,
            "drafted": sum(map(sum, self.drafted)), "calls": dict(self.calls), "seconds": sum(self.seconds),
            "tokens_per_s": self.tokens_per_s,
        }  # fmt: skip

    def __str__(self) -> str:
        calls = ", ".join(f"{name} {count}" for name, count in self.calls.items())
        return (
            f"{sum(self.tokens)} tokens in {self.rounds} rounds, {self.tokens_per_round:.2f} a round; "
            f"{100 * self.accept_rate:.0f} % of judged drafts kept; {self.tokens_per_s:.1f} tokens/s; calls: {calls}"
        )


class Speculation(list[Generation]):
    """The completions, one a prompt, and `report` of how it went."""

    def __init__(self, found: Sequence[Generation], report: Report) -> None:
        super().__init__(found)
        self.report = report


def speculate(
    ensemble: Ensemble,
    prompts: Sequence[Prompt],
    *,
    draft: Ensemble,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    k: int = 5,
    adaptive: bool = True,
    members: bool = False,
    progress: Progress | None = None,
    each: Each | None = None,
    show: Show | None = None,
) -> Speculation:
    """One completion of each prompt as `generate` has it, drafted by `draft` (one member), judged by the ensemble.

    Prompts are decoded one by one, whatever `sampling.batch_size` says: rows of a batch would keep different numbers of
    tokens, and blocks cost least at one row. `draft` need not be a member of the ensemble: if it is (the same model and
    kind of prompt), its own log-probabilities are those of the draft and it reads nothing twice. `k` tokens are drafted
    a round; with `adaptive` two more after a round that was kept whole and one less after another, each prompt
    beginning with `k`. `show` is given the tokens as rounds bring them. Noise depends on `seed`, the prompt's place and
    the token's only. Sliding attention keeps all keys and values here, so that it can be cropped.

    Raises `SurgeryError` for a draft that is no single plain member, for `k` below 1, and as `generate` does.
    """
    run = _Speculator(ensemble, draft, sampling, members, k, adaptive, show)
    rows = [run._readable(i, prompt) for i, prompt in enumerate(prompts)]
    found: list[Generation] = []
    try:
        with undisturbed(*run._models):
            for i, row in enumerate(rows):
                found.append(run.complete(i, row, (seed << 32) + i))
                if found[-1].ended == "interrupted":
                    break
                if each is not None:
                    each(i, found[-1])
                if progress is not None:
                    progress(i + 1, len(rows))
    except KeyboardInterrupt:
        pass
    unread = [Generation([], [], [], True, "", "interrupted")] * (len(rows) - len(found))
    return Speculation([*found, *unread], run.report)


def probabilities(scores: Tensor, sampling: Sampling) -> Tensor:
    """(row, vocab) what a token is drawn from: temperature, truncation, normalised; one-hot when greedy."""
    if sampling.temperature == 0:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
    probs = (scores if sampling.temperature == 1 else scores / sampling.temperature).softmax(-1)
    kept = truncate(probs, sampling)
    return kept if kept is probs else kept / kept.sum(-1, keepdim=True)


def drawn(probs: Tensor, uniform: Tensor) -> Tensor:
    """(row,) one token a row of (row, vocab), by inverse CDF of its number in [0, 1), as `decoding.draw` does."""
    cumulative = probs.cumsum(-1)
    target = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=probs.shape[-1] - 1).squeeze(-1)


def accepted(p: Tensor, q: Tensor, drafts: Tensor, uniform: Tensor) -> Tensor:
    """(...) how many drafts (..., k) are kept: all before the first with u >= p(y)/q(y). p, q: (..., k, vocab)."""
    index = drafts.unsqueeze(-1)
    kept = uniform * q.gather(-1, index).squeeze(-1) < p.gather(-1, index).squeeze(-1)  # u = 0 keeps nothing of p = 0
    return kept.long().cumprod(-1).sum(-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(row, vocab) what a rejected draft is mended with: max(p - q, 0), or p where rounding left nothing of it."""
    left = (p - q).clamp(min=0)
    return left.where(left.sum(-1, keepdim=True) > 0, p)


@dataclass
class _Row:
    """One prompt on its way."""

    noise: Tensor
    """(stream, new tokens) in [0, 1)."""
    ids: list[int]
    """The completion so far, with `log_probs`."""
    log_probs: list[float]
    parts: list[CausalState] = field(default_factory=list)
    """By reader of the ensemble: the prompt and the completion read, but for its last token."""
    drafting: Any = None
    """The draft's state; one of `parts` when it is a member."""
    unread: list[int] = field(default_factory=list)
    """What of the completion the draft has not read."""


class _Speculator(Composed):
    """Completes prompts one by one, in rounds of draft and verdict."""

    def __init__(
        self, ensemble: Ensemble, draft: Ensemble, sampling: Sampling, members: bool, k: int, adaptive: bool,
        show: Show | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(ensemble, Ensemble):
            raise SurgeryError(f"What judges drafts is an ensemble, and not a {type(ensemble).__name__}.",
                               hint="speculate(member(model), prompts, draft=member(small)).")  # fmt: skip
        if not isinstance(draft, Ensemble) or len(draft.terms) != 1 or draft.weights != [1.0] or draft.filter:
            raise SurgeryError(f"A draft is one model as `member` gives it, and not '{draft}'.",
                               hint="speculate(large + (tuned - small), prompts, draft=tuned).")  # fmt: skip
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise SurgeryError(f"k is {k!r}: drafts have 1 token or more.")
        super().__init__(ensemble.croppable(), sampling, members)
        self.k, self.adaptive, self.report, self.show = k, adaptive, Report(), show
        self.readers, drafter = list(self.decoder.readers), draft.members[0]
        place = next((i for i, one in enumerate(self.decoder.members) if one.key == drafter.key), None)
        self.shared = place is not None
        if place is not None:
            self.at = next(i for i, reader in enumerate(self.readers) if place in reader.index)
            self.which = self.readers[self.at].index.index(place)
        else:
            self.at, self.which = len(self.readers), 0
            self.readers.append(_beside(self.decoder.base, drafter))
            self.readers[-1].decoder.room = self.readers[0].decoder.room
            self._models = (*self._models, drafter.model)
        self.names = [[self._name(i, one) for one in reader.members] for i, reader in enumerate(self.readers)]
        self.report.calls |= {name: 0 for names in self.names for name in names}

    def _name(self, at: int, member: Member) -> str:
        if at < len(self.decoder.readers):
            return self.decoder.name_of(member)
        return f"{member.name} (draft)" if member.name in self._names else member.name

    def _readable(self, index: int, prompt: Prompt) -> Encoded:
        row = super()._readable(index, prompt)
        if self.shared:
            return row
        reader = self.readers[self.at]
        member = reader.members[0]
        (ids,) = reader.encode(prompt, self.decoder.base.tokenizer)
        ids = ids or (self._start(index, member.tokenizer),)
        self._check_room(index, len(ids), reader.decoder.context, f"the context of '{member.name}'")
        return (*row, (ids,))

    def complete(self, index: int, row: Encoded, seed: int) -> Generation:
        """The completion of one prompt."""
        began = time.perf_counter()
        drafted: list[int] = []
        kept: list[int] = []
        ids: list[int] = []
        log_probs: list[float] = []
        self.report.drafted.append(drafted)
        self.report.accepted.append(kept)
        noise = torch.from_numpy(uniforms([seed], 3, self.sampling.max_new_tokens))[0].to(self._device)
        k = self.k
        try:
            going = self._begin(index, row, _Row(noise, ids, log_probs))
            shown = self._show(index, ids, log_probs, 0, 0)
            while len(ids) < self.sampling.max_new_tokens and not self._over(ids):
                before = len(ids)
                count, right = self._round(index, going, k)
                drafted.append(count)
                kept.append(right)
                shown = self._show(index, ids, log_probs, before, shown)
                if self.adaptive:
                    k = min(k + 2, max(LONGEST, self.k)) if right == count else max(k - 1, 1)
        except KeyboardInterrupt:  # `_rollout` sees that it is too short
            del drafted[len(kept) :]
        self.report.tokens.append(len(ids))
        self.report.seconds.append(time.perf_counter() - began)
        return self._rollout(index, index, row, ids, log_probs)

    def _begin(self, index: int, prompt: Encoded, row: _Row) -> _Row:
        """Everybody reads the prompt, behind which the composition draws the first token."""
        scores, state = self._prefill([prompt])
        row.parts = state.parts
        row.drafting = row.parts[self.at] if self.shared else self.readers[self.at].prefill([prompt[self.at]])[1]
        for reader in range(len(self.readers)):
            self._count(reader)
        token = drawn(probabilities(scores, self.sampling), row.noise[DRAFT, :1])
        self._tell(index, row, [int(token)], scores, state.log_probs)
        row.unread = row.ids[-1:]
        return row

    def _round(self, index: int, row: _Row, k: int) -> tuple[int, int]:
        """Drafts at most `k` tokens, judges them, adds what is kept and one more; how many were drafted, and kept."""
        start, last = len(row.ids), row.ids[-1]
        drafts, q, mine = self._draft(row, min(k, self.sampling.max_new_tokens - start - 1))
        k, device = len(drafts), row.noise.device
        block = torch.tensor([[last, *drafts]], device=device)
        told = [mine if i == self.at else self._read(i, block, part) for i, part in enumerate(row.parts)]
        n, state = 0, EnsembleState([], [], 1)
        if k:
            scores = self.decoder._scores([[rows[:, :k] for rows in one] for one in told], state)[0]
            p = probabilities(scores, self.sampling)
            n = int(accepted(p, torch.cat(q), block[0, 1:], row.noise[JUDGE, start : start + k]))
            token = residual(p[n : n + 1], q[n]) if n < k else None
            new = drafts[:n] if token is None else [*drafts[:n], int(drawn(token, row.noise[MEND, start + n, None]))]
            self._tell(index, row, new, scores, state.log_probs)
        if n == k and not (k and self._over(row.ids)):
            if self.shared:  # the draft's own row behind its last token, which nothing needed until now
                told[self.at] = self._read(self.at, block[:, -1:], row.drafting)
            scores = self.decoder._scores([[rows[:, -1:] for rows in one] for one in told], state)[0]
            token = drawn(probabilities(scores, self.sampling), row.noise[DRAFT, start + k, None])
            self._tell(index, row, [int(token)], scores, state.log_probs)
        for i, part in enumerate(row.parts):
            if i != self.at:
                part.crop(k - n)
        if n < k:
            row.drafting.crop(k - 1 - n)
            row.unread = row.ids[-1:]
        else:
            row.unread = row.ids[-1:] if self.shared else [*row.unread, row.ids[-1]]
        return k, n

    def _draft(self, row: _Row, k: int) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """At most `k` tokens, the laws they were drawn from, and by member of the draft's model (1, k, own) logits.

        Nothing comes behind a token that ends the response.
        """
        reader = self.readers[self.at]
        drafts: list[int] = []
        laws: list[Tensor] = []
        told: list[list[Tensor]] = []
        while len(drafts) < k and not (drafts and self._over(row.ids, drafts)):
            told.append(self._read(self.at, torch.tensor([row.unread], device=row.noise.device), row.drafting))
            scores = reader.values(told[-1][self.which][:, -1]).to(row.noise.device)
            laws.append(probabilities(scores, self.sampling))
            place = len(row.ids) + len(drafts)
            drafts.append(int(drawn(laws[-1], row.noise[DRAFT, place, None])))
            row.unread = drafts[-1:]
        return drafts, laws, [torch.cat(rows, 1) for rows in zip(*told, strict=True)]

    def _read(self, at: int, tokens: Tensor, state: CausalState) -> list[Tensor]:
        self._count(at)
        return self.readers[at].read(tokens, state)

    def _count(self, at: int) -> None:
        for name in self.names[at]:
            self.report.calls[name] += 1

    def _tell(self, index: int, row: _Row, new: list[int], scores: Tensor, log_probs: list[Tensor]) -> None:
        """Adds tokens, of which (pos, vocab) scores and by member (1, pos, vocab) log-probabilities tell."""
        if not new:
            return
        scores, ids = scores[: len(new)], torch.tensor(new, device=scores.device)[:, None]
        if self.sampling.temperature not in (0, 1):
            scores = scores / self.sampling.temperature
        values = (scores.gather(1, ids)[:, 0] - scores.logsumexp(1)).tolist()
        if not math.isfinite(sum(values)):
            at = next(i for i, value in enumerate(values) if not math.isfinite(value))
            raise SurgeryError(self._why(index, len(row.ids) + at, EnsembleState([], [], 1, log_probs)))
        row.ids += new
        row.log_probs += values
        if self.members:
            by_member = [one[0, : len(new)].log_softmax(-1).gather(1, ids.to(one.device)) for one in log_probs]
            self._said.setdefault(index, []).extend(torch.cat(by_member, 1).tolist())

    def _show(self, index: int, ids: list[int], log_probs: list[float], before: int, shown: int) -> int:
        """Hands out the tokens behind the first `before`, of whose text `shown` characters are out; returns how many
        are then."""
        if self.show is None:
            return shown
        for at in range(before, len(ids)):
            told = self._said[index][at] if self.members else []
            piece = self._piece(ids[: at + 1], log_probs[at], told, shown)
            shown += len(piece.text)
            self.show(index, piece)
        return shown

    def _over(self, *parts: list[int]) -> bool:
        """Whether the last token ends the response that the parts are together."""
        if parts[-1][-1] in self._ends:
            return True
        if not self._stop:
            return False
        return bool(self._stopped(torch.tensor([sum(parts, [])]), torch.ones(1, dtype=torch.bool)))


def _beside(base: Member, drafter: Member) -> Reader:
    """A reader of the draft alone, in the vocabulary of the base."""
    known, _ = readers_of([base, drafter], 0, True)
    found = next(reader for reader in known if 1 in reader.index)
    if len(found.members) == 1:
        return found
    alone = Reader([drafter], [0], True)  # of the base's model, asked otherwise
    alone.map = found.map
    return alone
