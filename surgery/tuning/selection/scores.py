"""Selections by a score of every number; each is one equation.

| name | score | looks at |
|---|---|---|
| lift | abs(W'), W' of rank r nearest to W | weights |
| magnitude | abs(W) | weights |
| random | uniform | nothing |
| gradient | abs(sum g) | gradients |
| snip | abs(W sum g) | gradients |
| fisher | sum g^2 | gradients |
| movement | -sum g W | gradients, along a few steps |
| wanda | abs(W_ij) norm(X_j) | inputs |
| delta | abs(W1 - W) | a fine-tuned sibling |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.tuning.selection.base import SELECTORS, Round, Scored
from surgery.tuning.selection.budget import Budget, choose
from surgery.tuning.selection.evidence import Evidence
from surgery.tuning.selection.places import Places
from surgery.tuning.selection.principal import nearest_of_rank
from surgery.tuning.selection.targets import Target

Direction = Literal["largest", "smallest"]


def directed(scores: Tensor, direction: Direction) -> Tensor:
    """Scores whose highest are those wanted."""
    if direction not in ("largest", "smallest"):
        raise SurgeryError(f"There is no direction '{direction}'.", hint="largest or smallest.")
    return scores if direction == "largest" else -scores


@SELECTORS.register("lift")
@dataclass(frozen=True)
class Lift(Scored):
    """The largest numbers of each matrix after rank reduction (LIFT, arXiv:2506.00772).

    `rank` is that of the approximation (the authors' scripts: 16 to 128), no budget. Per matrix and exact. The released
    scripts pass a mask type without the word "largest" and so train the K smallest: `direction="smallest"` is that.
    """

    rank: int = 32
    direction: Direction = "largest"

    def score(self, target: Target, evidence: Evidence) -> Tensor:
        if self.rank < 1:
            raise SurgeryError(f"LIFT approximates by a rank of 1 or more, found {self.rank}.")
        if not bool(target.weight.isfinite().all()):
            raise SurgeryError(f"'{target.name}' holds numbers that are not finite.", hint="Look at the checkpoint.")
        return directed(nearest_of_rank(target.weight, self.rank).abs(), self.direction)


@SELECTORS.register("magnitude")
@dataclass(frozen=True)
class Magnitude(Scored):
    """The largest numbers (Super-Tuning, arXiv:2607.09287, reports it as its best without data), or the smallest."""

    direction: Direction = "largest"

    def score(self, target: Target, evidence: Evidence) -> Tensor:
        return directed(target.weight.abs(), self.direction)


@SELECTORS.register("random")
@dataclass(frozen=True)
class Random(Scored):
    """Any numbers, by `seed` and the tensor's name, whatever the other tensors (SHiRA's usual, arXiv:2406.13175)."""

    seed: int = 0

    def score(self, target: Target, evidence: Evidence) -> Tensor:
        return torch.rand(target.shape, generator=generator(self.seed, target.name)).to(target.parameter.device)


@SELECTORS.register("gradient")
@dataclass(frozen=True)
class Gradient(Scored):
    """The largest gradients of the summed loss."""

    needs = ("gradients",)

    def score(self, target: Target, evidence: Evidence) -> Tensor:
        return evidence.gradients[target.name].abs()


@SELECTORS.register("snip")
@dataclass(frozen=True)
class Snip(Scored):
    """The largest first-order effect on the loss of setting a number to zero (SNIP, arXiv:1810.02340)."""

    needs = ("gradients",)

    def score(self, target: Target, evidence: Evidence) -> Tensor:
        return (evidence.gradients[target.name] * target.weight).abs()


@SELECTORS.register("fisher")
@dataclass(frozen=True)
class Fisher(Scored):
    """The largest diagonal of the empirical Fisher matrix, the square taken batch by batch (FISH, arXiv:2111.09839).

    The paper squares example by example: pass batches of one row for that.
    """

    needs = ("squares",)

    def score(self, target: Target, evidence: Evidence) -> Tensor:
        return evidence.squares[target.name]


@SELECTORS.register("movement")
@dataclass(frozen=True)
class Movement(Scored):
    """The numbers that move away from zero most, along gradient descent of step `lr` on the batches (arXiv:2005.07683).

    The model is as before afterwards.
    """

    lr: float = 1e-3

    needs = ("movement",)

    def score(self, target: Target, evidence: Evidence) -> Tensor:
        return evidence.movement[target.name]


@SELECTORS.register("wanda")
@dataclass(frozen=True)
class Wanda(Scored):
    """The largest products of a number and the norm of its input (Wanda, arXiv:2306.11695); of each row, as there."""

    needs = ("inputs",)
    scope = "row"

    def score(self, target: Target, evidence: Evidence) -> Tensor:
        if len(target.shape) != 2:
            raise SurgeryError(f"Experts in one tensor ('{target.name}') have each their own inputs, unknown here.",
                               hint="Leave them out by `modules`.")  # fmt: skip
        norms = evidence.inputs.get(target.name)
        if norms is None or norms.shape[0] != target.shape[0 if target.transposed else -1]:
            raise SurgeryError(f"The inputs of '{target.name}' are not known: the data do not reach it.",
                               hint="Leave it out by `modules`.")  # fmt: skip
        return target.weight.abs() * (norms[:, None] if target.transposed else norms)


@SELECTORS.register("delta")
@dataclass(frozen=True)
class Delta(Scored):
    """The numbers that a fine-tuned sibling changed most: LT-SFT's ticket (arXiv:2110.07560), of all tensors together.

    The sibling may be this model after full fine-tuning (LT-SFT), or another checkpoint of its family. Selected again,
    it grows: what was chosen before stays chosen.
    """

    needs = ("sibling",)
    scope = "global"

    def score(self, target: Target, evidence: Evidence) -> Tensor:
        assert evidence.sibling is not None
        other = evidence.sibling(target.name)
        if tuple(other.shape) != target.shape:
            raise SurgeryError(
                f"The sibling's '{target.name}' is {list(other.shape)}, the model's {list(target.shape)}."
            )
        return (other.to(target.parameter.device).float() - target.weight).abs()

    def pick(self, targets: Sequence[Target], budget: Budget, evidence: Evidence, turn: Round) -> Mapping[str, Places]:
        def scores() -> Iterator[tuple[str, Tensor]]:
            for target in targets:
                found = self.score(target, evidence)
                if turn.before is not None:
                    found.view(-1)[turn.before.flat(target.name).to(found.device)] = torch.inf
                yield target.name, found

        return choose(scores(), {t.name: t.shape for t in targets}, budget)


def generator(seed: int, name: str) -> torch.Generator:
    """One for each seed and name, the same on every machine and whatever else is drawn."""
    import hashlib

    digest = hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
