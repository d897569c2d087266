"""SaRA's nuclear-norm term: the numbers that are trained are kept a matrix of low rank (arXiv:2409.06633).

    loss + weight * ||W (.) M||_*          M marks the numbers of W that may move

estimated on one random matrix a step. The released memory-saving optimizer gives this term's gradient to tensors that
it does not own, so that it moves nothing; here it is added to the gradient of the very numbers that move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from surgery.errors import SurgeryError

NARROW = 64
"""Matrices with a side of so many numbers or fewer are left alone (the released code's rule)."""
NOUGHT = 1e-6
"""Singular values below this share of the largest count as 0: float32 weights know no more of them."""


def nuclear_norm(values: Tensor, places: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The sum of the singular values of the matrix of `shape` with `values` (k,) at flat `places` (k,), 0 elsewhere.

    `places` None: everywhere. A float64 scalar.
    """
    return _decomposed(values, places, shape)[0]


def nuclear_subgradient(values: Tensor, places: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """d nuclear_norm / d values, (k,) in their dtype: U V^T at `places`, over the singular values that are not 0.

    Of the subgradients where some are 0 it is the smallest one, the same whichever basis an SVD would pick. Within
    1e-6 of a float64 SVD's, where a float32 SVD is 1e-3 off with singular values of 1e-6 of the largest.
    """
    return _decomposed(values, places, shape)[1]


@torch.no_grad()
def _decomposed(values: Tensor, places: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Norm and subgradient, by the eigenvectors of the smaller Gram matrix in float64: no SVD of the matrix itself.

    D D^T = Q L Q^T gives the singular values sqrt(L) and U V^T = Q L^-1/2 Q^T D; squaring loses what lies below
    1e-8 of the largest, and what lies below `NOUGHT` is not asked for.
    """
    rows, columns = shape
    where = values.device if values.device.type != "mps" else torch.device("cpu")  # which has no float64
    dense = torch.zeros(rows * columns, dtype=torch.float64, device=where)
    at = slice(None) if places is None else places.to(where, torch.long)
    dense[at] = values.reshape(-1).to(where, torch.float64)
    wide = dense.view(rows, columns) if rows <= columns else dense.view(rows, columns).T
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    sizes = squares.clamp(min=0).sqrt()
    kept = sizes > NOUGHT * sizes[-1]
    vectors = vectors[:, kept]
    direction = (vectors / sizes[kept]) @ (vectors.T @ wide)
    direction = direction if rows <= columns else direction.T
    return sizes.sum(), direction.reshape(-1)[at].to(values.device, values.dtype)


@dataclass(frozen=True)
class NuclearNorm:
    """The term as an optimizer uses it: before a step, `penalty` adds its gradient to that of one random matrix.

    `weight` is the factor of the norm (the released script's 5e-4). With `every` > 1 only each such step pays for it.
    """

    weight: float = 5e-4
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise SurgeryError(f"The weight of the nuclear norm is a finite number from 0 on, and not {self.weight}.")
        if self.every < 1:
            raise SurgeryError(f"The nuclear norm is added every step or less often, and not every {self.every} steps.")

    def sample(self, step: int, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """The name that `step` is about: a function of the step, the seed and the set of names, of nothing else.

        None in steps without the term, and when there is no matrix with both sides above `NARROW`.
        """
        if not self.weight or step % self.every:
            return None
        names = sorted(name for name, shape in shapes.items() if len(shape) == 2 and min(shape) > NARROW)
        return Random(f"nuclear {self.seed} {step}").choice(names) if names else None

    @torch.no_grad()
    def penalty(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        places: Mapping[str, Tensor | None],
        gradient: Mapping[str, Tensor],
    ) -> float | None:
        """Adds the term's gradient to `gradient[name]` (k,), in place, for one name; the term's value, or None.

        `weights` are whole matrices, `places` the flat positions of the numbers that move (None: all), in the order
        of `gradient`. Call it once a step, when gradients are summed over micro-batches and processes.
        """
        name = self.sample(step, {n: tuple(weights[n].shape) for n in gradient if gradient[n].numel()})
        if name is None:
            return None
        matrix, at = weights[name], places[name]
        values = matrix.reshape(-1) if at is None else matrix.reshape(-1)[at.long()]
        norm, direction = _decomposed(values.to(gradient[name].dtype), at, tuple(matrix.shape))
        gradient[name].add_(direction.view_as(gradient[name]), alpha=self.weight)
        return self.weight * float(norm)
