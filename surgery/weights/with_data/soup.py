"""Greedy soup (Wortsman et al. 2022, arXiv:2203.05482): average while a held-out score does not fall."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from surgery.errors import SurgeryError
from surgery.weights.with_data.states import ModelLike, same_tensors, state_of, work_dtype

if TYPE_CHECKING:
    from surgery.checkpoint import Source

Score = Callable[[dict[str, Tensor]], float]
"""From a state dict to a number, larger is better."""


@dataclass(frozen=True)
class Taste:
    """One soup that was scored: the kept members and `candidate`."""

    candidate: int
    score: float
    kept: bool


@dataclass(frozen=True)
class Soup:
    """The members (indices into the inputs, in the order they went in), the scores, and the average of the members."""

    members: list[int]
    score: float
    scores: dict[int, float]
    """Every model's own score, where it was asked for."""
    tastes: list[Taste]
    state_dict: dict[str, Tensor]


def greedy_soup(
    models: Sequence[ModelLike | Source | str | Path], score: Score, *, order: Sequence[int] | None = None
) -> Soup:
    """Try the models in order of their own scores, best first; keep each whose soup scores no less (recipe 1).

    As in the paper a tie is kept (the authors' code drops it). `models` are modules, state dicts, checkpoints or their
    folders; folders are read one at a time, so memory holds one running sum, one model and one candidate. `score` gets
    a state dict (`loaded(model, state)` puts it into a model). `order`, indices into `models`, spares the first round
    of scores. Averages are float32, float64 if the models are; the result has the types of its first member.
    Raises `SurgeryError` for models that do not fit, a wrong order, and scores that are not numbers.
    """
    if not models:
        raise SurgeryError("There is no model to make a soup of.")
    scores: dict[int, float] = {}
    if order is None:
        scores = {i: _score(score, state_of(model), f"model {i}") for i, model in enumerate(models)}
        order = sorted(scores, key=lambda i: (-scores[i], i))
    elif not order or len(set(order)) != len(order) or not all(0 <= i < len(models) for i in order):
        raise SurgeryError(f"order must be different indices below {len(models)}, not {list(order)}.")
    start, *rest = order
    first = state_of(models[start])
    if start not in scores:
        scores[start] = _score(score, first, f"model {start}")
    best = scores[start]
    dtypes = {name: t.dtype for name, t in first.items()}
    total = {name: t.detach().to(work_dtype(t)) if t.is_floating_point() else t for name, t in first.items()}
    members, tastes = [start], []

    def mean(summed: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        return {n: (t / count).to(dtypes[n]) if t.is_floating_point() else t for n, t in summed.items()}

    for i in rest:
        state = state_of(models[i])
        same_tensors(first, state, f"model {start}", f"model {i}")
        candidate = {n: t + state[n].detach().to(t) if t.is_floating_point() else t for n, t in total.items()}
        value = _score(score, mean(candidate, len(members) + 1), f"the soup of models {[*members, i]}")
        tastes.append(Taste(i, value, kept=value >= best))
        if value >= best:
            members, total, best = [*members, i], candidate, value
    return Soup(members, best, scores, tastes, mean(total, len(members)))


def _score(score: Score, state: dict[str, Tensor], what: str) -> float:
    value = score(state)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise SurgeryError(f"The score of {what} is {value!r}, not a number.") from None
    if math.isnan(number):
        raise SurgeryError(f"The score of {what} is NaN.")
    return number
