"""One of several completions of a prompt: majority vote, weighted vote, best of n. Pure functions, nothing is drawn.

drawn = samples(rollouts, marked_answer, scores=rewards)      # rollouts of one prompt
majority(drawn).answer, weighted_vote(drawn, "mean").sample, best_of_n(drawn).answer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from surgery.decoding import Rollout
from surgery.errors import SurgeryError
from surgery.registry import Registry


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of the prompt, what it answers, and what it is worth."""

    text: str
    answer: Hashable | None
    """None: it has no answer, and does not vote."""
    log_probs: tuple[float, ...] = ()
    """Nats, one a token."""
    score: float | None = None
    """Of a reward or a verifier."""

    @property
    def log_prob(self) -> float:
        """Of the whole completion; 0 when tokens have none."""
        return math.fsum(self.log_probs)


class Choice(NamedTuple):
    """What was chosen among the samples of one prompt."""

    answer: Hashable | None
    """None when no sample has an answer."""
    sample: int | None
    """Number of the sample that stands for it: of the chosen answer the most probable one, then the first."""
    support: dict[Hashable, float]
    """What speaks for each answer, in the order in which they were first seen."""


Weight = Callable[[Sample], float]
"""What a sample counts for in a vote: 0 or more."""
Selector = Callable[..., Choice]
"""(samples of one prompt, ...) -> the chosen one."""

WEIGHTS: Registry[Weight] = Registry("weight of a vote")
SELECTORS: Registry[Selector] = Registry("selector")


def samples(
    completions: Sequence[Rollout] | Sequence[str],
    answer: Callable[[str], Hashable | None],
    *,
    log_probs: Sequence[Sequence[float]] | None = None,
    scores: Sequence[float] | None = None,
) -> list[Sample]:
    """Completions of one prompt with their answers: rollouts (which bring their log-probabilities), or texts.

    Raises `SurgeryError` when `log_probs` or `scores` are not one a completion.
    """
    for name, given in (("log_probs", log_probs), ("scores", scores)):
        if given is not None and len(given) != len(completions):
            raise SurgeryError(f"{len(completions)} completions, but {len(given)} entries of {name}.")
    found = []
    for i, completion in enumerate(completions):
        rollout = completion if isinstance(completion, Rollout) else None
        text = str(completion) if rollout is None else rollout.text
        each = tuple(log_probs[i]) if log_probs is not None else tuple(rollout.log_probs) if rollout else ()
        found.append(Sample(text, answer(text), each, None if scores is None else float(scores[i])))
    return found


@WEIGHTS.register("one")
def one(sample: Sample) -> float:
    """Every sample alike."""
    return 1.0


@WEIGHTS.register("reward")
def reward(sample: Sample) -> float:
    """The sample's score."""
    if sample.score is None:
        raise SurgeryError("A sample has no score.", hint="Give `scores`, or weigh by 'mean', 'least' or 'one'.")
    return sample.score


@WEIGHTS.register("mean")
def mean(sample: Sample) -> float:
    """exp(mean token log-probability), the normalised probability of arXiv:2203.11171.

    A sum of logarithms would count against an answer that is given often: a vote adds probabilities.
    """
    return math.exp(sample.log_prob / len(_tokens(sample)))


@WEIGHTS.register("least")
def least(sample: Sample) -> float:
    """The probability of the least probable token."""
    return math.exp(min(_tokens(sample)))


def _tokens(sample: Sample) -> tuple[float, ...]:
    if not sample.log_probs:
        raise SurgeryError("A sample has no log-probabilities.", hint="Take rollouts, or give `log_probs`.")
    return sample.log_probs


@SELECTORS.register("majority")
def majority(found: Sequence[Sample]) -> Choice:
    """Self-consistency (Wang et al. 2022, arXiv:2203.11171): the answer that most samples give.

    Of answers with equally many votes the one whose samples have the largest summed log-probability, then the first.
    """
    return weighted_vote(found, "one")


@SELECTORS.register("weighted_vote")
def weighted_vote(found: Sequence[Sample], weight: str | Weight = "reward") -> Choice:
    """The answer with the largest sum of weights over its samples; ties as in `majority`.

    `weight` is a name of `WEIGHTS` or a function. Raises `SurgeryError` for weights below 0 or not finite (of
    log-probabilities, say), with which an answer would lose by being given more often.
    """
    _some(found)
    weigh = WEIGHTS.lookup(weight) if isinstance(weight, str) else weight
    groups: dict[Hashable, list[Sample]] = {}
    for sample in found:
        if sample.answer is not None:
            groups.setdefault(sample.answer, []).append(sample)
    support = {}
    for answer, group in groups.items():
        weights = [weigh(sample) for sample in group]
        if wrong := [w for w in weights if not (math.isfinite(w) and w >= 0)]:
            raise SurgeryError(f"A vote of weight {wrong[0]}; expected a finite number of 0 or more.",
                               hint="Probabilities instead of their logarithms, or best_of_n.")  # fmt: skip
        support[answer] = math.fsum(weights)
    if not groups:
        return Choice(None, None, {})
    chosen = max(groups, key=lambda a: (support[a], math.fsum(s.log_prob for s in groups[a])))  # max keeps the first
    members = [i for i, sample in enumerate(found) if sample.answer == chosen]
    return Choice(chosen, max(members, key=lambda i: found[i].log_prob), support)


@SELECTORS.register("best_of_n")
def best_of_n(found: Sequence[Sample], score: str | Weight = "reward") -> Choice:
    """The sample with the largest score, whatever the others say; ties by log-probability, then the first.

    Scores may have any sign. Raises `SurgeryError` for one that is not a number.
    """
    _some(found)
    rate = WEIGHTS.lookup(score) if isinstance(score, str) else score
    scores = [rate(sample) for sample in found]
    if any(math.isnan(s) for s in scores):
        raise SurgeryError(f"The score of sample {[math.isnan(s) for s in scores].index(True)} is not a number.")
    best = max(range(len(found)), key=lambda i: (scores[i], found[i].log_prob))
    support: dict[Hashable, float] = {}
    for sample, value in zip(found, scores, strict=True):
        if sample.answer is not None:
            support[sample.answer] = max(value, support.get(sample.answer, -math.inf))
    return Choice(found[best].answer, best, support)


def _some(found: Sequence[Sample]) -> None:
    if not found:
        raise SurgeryError("There is no sample to choose from.")
