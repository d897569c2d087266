"""Solutions as steps, and what rates a step: a function of texts, or the contrast of a tuned model with its base."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import nn

from surgery.decoding import Decoder, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a solution."""

    tokens: tuple[int, ...]
    """With its delimiter, or the end-of-sequence token."""
    log_probs: tuple[float, ...]
    """Under the policy, at the sampling temperature."""
    read: tuple[tuple[float, ...], ...]
    """Under each of the scorer's readers, at temperature 1."""
    score: float


@dataclass(frozen=True, slots=True)
class Path:
    """A solution as far as it has come: a node of the tree with all that lies above it."""

    prompt: int
    """Its number."""
    prompt_ids: tuple[int, ...]
    steps: tuple[Step, ...] = ()
    text: str = ""
    """Without special tokens, cut before the first stop string."""
    ended: bool = False
    """By an end-of-sequence token or a stop string."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of all steps."""
        return tuple(token for step in self.steps for token in step.tokens)

    @property
    def scores(self) -> tuple[float, ...]:
        """Of each step."""
        return tuple(step.score for step in self.steps)

    def rollout(self) -> Rollout:
        """The same as a rollout."""
        log_probs = [p for step in self.steps for p in step.log_probs]
        return Rollout(list(self.prompt_ids), list(self.tokens), log_probs, not self.ended, self.text)


class Scorer(Protocol):
    """Rates the last step of each path, best between 0 and 1, which is what T_b = 0.2 is for.

    Optional: `readers`, models or decoders that read along; their log-probabilities are in `Step.read`.
    """

    def __call__(self, paths: Sequence[Path]) -> Sequence[float]:
        """One finite number a path."""


@dataclass(frozen=True, slots=True)
class Tree:
    """What one prompt's search has found."""

    solutions: tuple[Path, ...]
    """As many as the budget, in the order in which they were complete; some may have run out of tokens or depth."""
    nodes: tuple[int, ...]
    """How many steps were written at each depth."""
    tokens: int
    """Of all steps, also of those that have no children."""

    @property
    def rollouts(self) -> list[Rollout]:
        """The solutions as rollouts."""
        return [path.rollout() for path in self.solutions]

    @property
    def last_scores(self) -> list[float]:
        """Of the last step of each solution: what its vote weighs."""
        return [path.scores[-1] for path in self.solutions]


class ContrastScorer:
    """A step is as good as it is more probable under the tuned model than under its base: no reward is trained.

    sigmoid of the step's mean log p_tuned - log p_base a token, which lies in (0, 1) as a process reward does: the
    chance that tuned and not base wrote its average token, when both might have.
    """

    def __init__(self, tuned: nn.Module | Decoder, base: nn.Module | Decoder) -> None:
        self.readers = (tuned, base)

    def __call__(self, paths: Sequence[Path]) -> list[float]:
        """Of the last step of each path."""
        read = [np.array(path.steps[-1].read) for path in paths]
        return [_sigmoid(float((tuned - base).mean())) for tuned, base in read]


def contrast_scorer(tuned: nn.Module | Decoder, base: nn.Module | Decoder) -> ContrastScorer:
    """A process scorer out of a fine-tuning and its base: see `ContrastScorer`."""
    return ContrastScorer(tuned, base)


def text_scorer(
    score: Callable[[list[str]], Sequence[float]], tokenizer: PreTrainedTokenizerBase
) -> Callable[[Sequence[Path]], Sequence[float]]:
    """A process scorer out of a function of texts, which are prompt and solution so far.

    The function reads its texts anew each time.
    """

    def rate(paths: Sequence[Path]) -> Sequence[float]:
        return score([str(tokenizer.decode(list(p.prompt_ids), skip_special_tokens=True)) + p.text for p in paths])

    return rate


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
