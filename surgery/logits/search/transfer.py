"""Transfer Q*: decoding by a reward, its value of a token taken from where an aligned model would go
(Chakraborty et al. 2024, arXiv:2405.20495).

For each of the SFT model's k best tokens z the aligned model rho writes on, a reward rates what came out, and the next
token is drawn from softmax(log p_SFT(z) + Q(z) / alpha) over the k:

| transfer | Q of a token | when |
|---|---|---|
| direct | mean reward of rho's continuations | rho is aligned with this reward |
| indirect | the same, re-weighted by exp((r - r_BL) / beta) | rho is aligned with another reward r_BL |

With the SFT model as rho it is decoding by the SFT model's own values (controlled decoding); with `lookahead` 0 the
reward reads the unfinished text (as ARGS does).

The paper's released code differs from its text, and this follows the text where they do: there the aligned model's own
logits stand in for p_SFT, the best token is always taken (here `temperature=0`), 1/alpha is 1 and k is 10; it looks
ahead greedily (here `ahead=0`) for 20 tokens, or 5 if indirect; and its indirect Q is exp((r - r_BL) / 2) r, not
normalised (here `released`). There every token reads everything again; here a prompt is read once by each model, and
the k branches start from their prefix in the decoder's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from surgery.decoding import Decoder, Rollout, Sampling, decode, draw, end_tokens, undisturbed, uniforms
from surgery.errors import SurgeryError
from surgery.logits.search.forwards import Counted, begun, check_room, left_padded

if TYPE_CHECKING:
    from jaxtyping import Float
    from transformers import PreTrainedTokenizerBase

Reward = Callable[[list[str], list[str]], Sequence[float | None]]
"""(prompts, completions) -> one finite number each; both without special tokens. A completion may be unfinished."""
Reweighted = Callable[[Tensor, Tensor, float], Tensor]
"""(rewards, baseline rewards, beta) -> Q: the last dimension, the continuations of a token, is averaged over."""


def normalised(
    rewards: Float[Tensor, "*token sample"], baseline: Float[Tensor, "*token sample"], beta: float
) -> Float[Tensor, "*token"]:
    """sum w r / sum w with w = exp((r - r_BL) / beta): the mean under rho_BL exp((r - r_BL) / beta), given the token.

    Of one continuation it is its reward, whatever the baseline.
    """
    return (((rewards - baseline) / beta).softmax(-1) * rewards).sum(-1)


def released(
    rewards: Float[Tensor, "*token sample"], baseline: Float[Tensor, "*token sample"], beta: float
) -> Float[Tensor, "*token"]:
    """mean w r: the released code's, which has beta = 2. What it leaves out, the mean of w, depends on the token."""
    return (((rewards - baseline) / beta).exp() * rewards).mean(-1)


@dataclass(frozen=True)
class Indirect:
    """The aligned model is aligned with `baseline` and not with the reward asked for."""

    baseline: Reward
    beta: float = 1.0
    estimate: Reweighted = normalised

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise SurgeryError(f"Indirect transfer: beta is {self.beta}; expected a number above 0.")


@dataclass(frozen=True)
class Transferred:
    """Completions by Transfer Q*, groups contiguous, and what they took."""

    rollouts: list[Rollout]
    """Their `log_probs` are those of the policy that drew them, given its look-aheads (at 1 when greedy)."""
    kl: list[list[float]]
    """At each token: KL(policy || p_SFT) in nats over the whole vocabulary. Summed over a completion and averaged over
    completions it is KL(policy || SFT) of sequences when look-aheads are greedy. Sampled look-aheads make the policy a
    mixture, of which this is an upper bound."""
    reward_calls: int
    """Texts that the reward has read (and the baseline reward, if there is one)."""
    sft_tokens: int
    """Tokens that the SFT model has read; 0 when it is the aligned model."""
    aligned_tokens: int
    """Tokens that the aligned model has read."""


class TransferQ:
    """Decoding with Transfer Q*; a `Generator`.

    `alpha` is the weight of the KL to the SFT model: small follows the reward. `lookahead` bounds the tokens of a
    continuation, of which a token has `samples`, drawn at temperature `ahead`; `temperature` is that of the choice
    among the k. Completions end with an end-of-sequence token, or one of the token ids `ends`. Noise depends on the
    prompt's seed, the place in its group, the token and the continuation.
    Raises `SurgeryError` for settings out of bounds, prompts that leave no room, models whose vocabularies differ, and
    rewards that are not finite numbers.
    """

    def __init__(
        self,
        sft: nn.Module | Decoder,
        aligned: nn.Module | Decoder,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase,
        *,
        alpha: float,
        k: int = 10,
        lookahead: int = 32,
        samples: int = 1,
        indirect: Indirect | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        ahead: float = 1.0,
        ends: Sequence[int] = (),
        batch_size: int = 256,
    ) -> None:
        for name, right, value in (
            ("alpha", alpha > 0, alpha),
            ("k", k >= 1, k),
            ("lookahead", lookahead >= 0, lookahead),
            ("samples", samples >= 1, samples),
        ):
            if not right:
                raise SurgeryError(f"Transfer Q*: {name} is {value}, which is too small.")
        if samples > 1 and ahead == 0:
            raise SurgeryError(f"Transfer Q*: {samples} greedy continuations of a token are all the same.",
                               hint="Set samples=1, or ahead above 0.")  # fmt: skip
        if samples == 1 and indirect is not None and indirect.estimate is normalised:
            raise SurgeryError("Transfer Q*: a normalised re-weighting of one continuation changes nothing.",
                               hint="Set samples to 2 or more, or take the released estimate.")  # fmt: skip
        self.sft, self.aligned = Counted(sft), Counted(aligned)
        self.alone = self.sft.same(self.aligned)
        self.models = tuple({id(m): m for m in (*self.sft.models, *self.aligned.models)}.values())
        self.reward, self.tokenizer, self.indirect = reward, tokenizer, indirect
        self.alpha, self.k, self.lookahead, self.samples = alpha, k, lookahead, samples
        self.choice = Sampling(max_new_tokens, temperature, batch_size=batch_size)
        self.ahead = Sampling(max(1, lookahead), ahead)
        self.ends = end_tokens(tokenizer, self.models) | set(ends)

    def __call__(self, prompts: Sequence[Sequence[int]], group: int, seeds: Sequence[int]) -> list[Rollout]:
        """`group` completions of each prompt (token ids), groups contiguous."""
        return self.decode(prompts, group, seeds).rollouts

    def decode(self, prompts: Sequence[Sequence[int]], group: int, seeds: Sequence[int]) -> Transferred:
        """The same with what it took. A batch has at most `batch_size` branches with their continuations, or those of
        one prompt."""
        if group < 1 or len(prompts) != len(seeds):
            raise SurgeryError(f"Transfer Q*: {len(prompts)} prompts in groups of {group} and {len(seeds)} seeds; "
                               "expected groups of at least 1 and one seed a prompt.")  # fmt: skip
        rows = begun(prompts, self.tokenizer)
        contexts = [c for c in (self.sft.context, self.aligned.context) if c is not None]
        check_room(rows, self.choice.max_new_tokens, min(contexts, default=None))
        before = self.sft.tokens, self.aligned.tokens
        each = max(1, self.choice.batch_size // (group * self.k * self.samples))
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        calls = 0
        found: dict[int, list[tuple[Rollout, list[float]]]] = {}
        with undisturbed(*self.models):
            for start in range(0, len(order), each):
                block = order[start : start + each]
                run = _Run(self, [rows[i] for i in block], group, [seeds[i] for i in block])
                run.decode()
                calls += run.calls
                found |= {i: run.finished(place) for place, i in enumerate(block)}
        flat = [one for i in range(len(rows)) for one in found[i]]
        return Transferred([rollout for rollout, _ in flat], [kl for _, kl in flat], calls,
                           self.sft.tokens - before[0], self.aligned.tokens - before[1])  # fmt: skip


def transfer_q(
    sft: nn.Module | Decoder,
    aligned: nn.Module | Decoder,
    reward: Reward,
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    alpha: float,
    group: int = 1,
    seed: int = 0,
    **settings: Any,
) -> Transferred:
    """Completions of prompts (token ids) by Transfer Q*, in one call; `settings` are those of `TransferQ`."""
    decoder = TransferQ(sft, aligned, reward, tokenizer, alpha=alpha, **settings)
    return decoder.decode(prompts, group, [(seed << 32) + i for i in range(len(prompts))])


class _Run:
    """One batch: rows are prompts times their group; each drawn token is a round of branches."""

    def __init__(self, settings: TransferQ, prompts: list[list[int]], group: int, seeds: Sequence[int]) -> None:
        self.to, self.prompts, self.group, self.seeds = settings, prompts, group, seeds
        texts = [str(t) for t in settings.tokenizer.batch_decode(prompts, skip_special_tokens=True)]
        self.texts = [text for text in texts for _ in range(group)]
        count = len(prompts) * group
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.log_probs: list[list[float]] = [[] for _ in range(count)]
        self.kl: list[list[float]] = [[] for _ in range(count)]
        self.calls = 0

    def decode(self) -> None:
        to, new = self.to, self.to.choice.max_new_tokens
        ids, mask = left_padded(self.prompts, min(to.ends, default=0), to.aligned.device)
        seen, state = to.aligned.prefill(ids, mask)
        logits, own = (seen, None) if to.alone else to.sft.prefill(ids, mask)
        if logits.shape != seen.shape:
            raise SurgeryError(f"The SFT model has {logits.shape[1]} tokens and the aligned model {seen.shape[1]}.",
                               hint="Both must have one vocabulary.")  # fmt: skip
        if self.group > 1:
            state, own = state.repeat(self.group), None if own is None else own.repeat(self.group)
            logits = logits.repeat_interleave(self.group, 0)
        noise = torch.from_numpy(uniforms(self.seeds, self.group, new)).flatten(0, 1).to(logits.device)
        rows = list(range(len(logits)))
        for t in range(new):
            log_probs = logits.float().log_softmax(-1)
            top = log_probs.topk(min(to.k, logits.shape[1])).indices
            seen, branches = to.aligned.step(top.flatten(), state.repeat(top.shape[1]))
            values = self._values(rows, top, seen, branches, t).to(logits.device)
            scores = torch.full_like(log_probs, -math.inf)
            scores.scatter_(1, top, log_probs.gather(1, top) + values / to.alpha)
            drawn, chance = draw(scores, noise[rows, t], to.choice)
            for row, token, p, kl in zip(
                rows, drawn.tolist(), chance.tolist(), self._kl(scores, log_probs), strict=True
            ):
                self.tokens[row].append(token)
                self.log_probs[row].append(p)
                self.kl[row].append(kl)
            going = [place for place, token in enumerate(drawn.tolist()) if token not in to.ends]
            if not going or t + 1 == new:
                return
            kept = torch.tensor(going, device=logits.device)
            chosen = (kept * top.shape[1]) + (top[kept] == drawn[kept, None]).int().argmax(1)
            state = branches.select(chosen)
            if own is None:
                logits = seen[chosen]
            else:
                logits, own = to.sft.step(drawn[kept], own.select(kept) if len(going) < len(rows) else own)
            rows = [rows[place] for place in going]

    def finished(self, prompt: int) -> list[tuple[Rollout, list[float]]]:
        """The group of one prompt, each with its KL by token."""
        found = []
        for row in range(prompt * self.group, (prompt + 1) * self.group):
            tokens = self.tokens[row]
            open_end = tokens[-1] not in self.to.ends
            rollout = Rollout(self.prompts[prompt], tokens, self.log_probs[row], open_end, self._texts([tokens])[0])
            found.append((rollout, self.kl[row]))
        return found

    def _values(self, rows: list[int], top: Tensor, seen: Tensor, branches: Any, t: int) -> Tensor:
        """(row, k): Q of each row's best tokens."""
        to, k = self.to, top.shape[1]
        written = [
            [*self.tokens[row], token] for row, tokens in zip(rows, top.tolist(), strict=True) for token in tokens
        ]
        asked = [row for row in rows for _ in range(k)]
        over = [tokens[-1] in to.ends for tokens in written]
        length = min(to.lookahead, to.choice.max_new_tokens - t - 1)
        on = [] if length == 0 else [branch for branch, o in enumerate(over) if not o]
        texts = [[tokens] for tokens in written]
        if on:
            index = torch.tensor(on, device=seen.device).repeat_interleave(to.samples)
            sampling = Sampling(length, to.ahead.temperature)
            noise = torch.from_numpy(self._ahead(asked, on, k, t, length)).to(seen.device)
            going = [branch for branch in on for _ in range(to.samples)]
            for branch in on:
                texts[branch] = []
            ahead = dict(decode(to.aligned, seen[index], branches.select(index), noise, sampling, to.ends))
            for place, branch in enumerate(going):
                texts[branch].append(written[branch] + ahead[place][0])
        flat = self._texts([ids for each in texts for ids in each])
        prompts = [self.texts[row] for row, each in zip(asked, texts, strict=True) for _ in each]
        rewards = self._spread(self._rated(to.reward, prompts, flat), texts)
        if to.indirect is None:
            values = rewards.mean(-1)
        else:
            baseline = self._spread(self._rated(to.indirect.baseline, prompts, flat), texts)
            values = to.indirect.estimate(rewards, baseline, to.indirect.beta)
        return values.view(len(rows), k).float()

    def _ahead(self, asked: list[int], on: list[int], k: int, t: int, length: int) -> np.ndarray:
        """(continuation, token) noise of this round: a function of seed, place in the group, token, branch, sample."""
        to = self.to
        seeds = [seed + (t + 1) * 0x9E3779B97F4A7C15 for seed in self.seeds]
        noise = uniforms(seeds, self.group * k * to.samples, length).reshape(-1, k, to.samples, length)
        return np.concatenate([noise[asked[branch], branch % k] for branch in on])

    def _spread(self, rewards: list[float], texts: list[list[Any]]) -> Tensor:
        """(branch, sample): what has one text only has its reward for every sample."""
        values, at = [], 0
        for each in texts:
            values.append((rewards[at : at + len(each)] * self.to.samples)[: self.to.samples])
            at += len(each)
        return torch.tensor(values, dtype=torch.float64)

    def _rated(self, reward: Reward, prompts: list[str], completions: list[str]) -> list[float]:
        found = list(reward(prompts, completions))
        self.calls += len(completions)
        if len(found) != len(completions) or not all(r is not None and math.isfinite(r) for r in found):
            raise SurgeryError(f"The reward gave {len(found)} values for {len(completions)} completions, of which some "
                               "may not be finite; expected one finite number each.")  # fmt: skip
        return [float(r) for r in found if r is not None]

    def _kl(self, scores: Tensor, log_probs: Tensor) -> list[float]:
        """KL(policy || SFT) of each row's next token."""
        if self.to.choice.temperature == 0:
            return (-log_probs.gather(1, scores.argmax(-1, keepdim=True))[:, 0]).tolist()
        own = (scores / self.to.choice.temperature).log_softmax(-1)
        each = torch.where(own > -math.inf, own.exp() * (own - log_probs), 0.0)
        return each.sum(-1).tolist()

    def _texts(self, rows: list[list[int]]) -> list[str]:
        cut = [ids[:-1] if ids[-1] in self.to.ends else ids for ids in rows]
        return [str(text) for text in self.to.tokenizer.batch_decode(cut, skip_special_tokens=True)]
