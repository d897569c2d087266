"""Rewards made of other rewards and of numbers that were measured: residuals, running rescaling, columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.training.rewards.base import REWARDS, rows_of, text_of
from surgery.training.rewards.build import build_rewards
from surgery.training.rewards.lengths import units
from surgery.training.rewards.score import Rewards

Vector = NDArray[np.float64]


@REWARDS.register("measured")
@dataclass(frozen=True, kw_only=True)
class Measured:
    """The number in a column, as it is: what a generator measured on each rollout (such as `self_certainty`), or
    scores that came with the data."""

    column: str = "self_certainty"

    @property
    def columns(self) -> tuple[str, ...]:
        """The column that is read; a rollout may bring it, so that the data need not have it."""
        return ()

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        """One value per completion."""
        if self.column not in columns:
            raise SurgeryError(f"Neither the rows nor the rollouts have the column '{self.column}'.")
        return list(columns[self.column])


def self_certainty(log_probs: NDArray[np.floating[Any]]) -> float:
    """Mean over tokens of KL(uniform || p), in nats, of `log_probs` (tokens, vocabulary); 0 for no tokens.

    Kang et al. 2025 (arXiv:2502.18581); the rationale's reward in Shop-R1 (arXiv:2507.17842).
    """
    if not len(log_probs):
        return 0.0
    return float(-np.log(log_probs.shape[1]) - log_probs.astype(np.float64).mean())


# ---- residuals ----------------------------------------------------------------------------------------------------


def ridge(train: list[Sequence[Any]], rewards: Vector, held: list[Sequence[Any]], strength: float) -> Vector:
    """Predictions on `held` of a ridge regression with an unpenalised intercept; numbers are standardised on `train`
    and everything else is one indicator a level."""
    left, right = [], []
    for column, other in zip(zip(*train, strict=True), zip(*held, strict=True), strict=True):
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in (*column, *other)):
            z, z_held = np.array(column, float), np.array(other, float)
            mean, scale = z.mean(), z.std() or 1.0
            left.append((z - mean)[:, None] / scale)
            right.append((z_held - mean)[:, None] / scale)
        else:
            levels = sorted({str(v) for v in column})
            left.append(np.array([[float(str(v) == level) for level in levels] for v in column]))
            right.append(np.array([[float(str(v) == level) for level in levels] for v in other]))
    x, x_held = np.hstack(left), np.hstack(right)
    centre, mean_reward = x.mean(0), rewards.mean()
    x = x - centre
    # a pseudo-inverse, so that strength 0 is least squares even where confounders are collinear
    weights = np.linalg.pinv(x.T @ x + strength * np.eye(x.shape[1])) @ x.T @ (rewards - mean_reward)
    return mean_reward + (x_held - centre) @ weights


def fixed_effects(train: list[Sequence[Any]], rewards: Vector, held: list[Sequence[Any]], strength: float) -> Vector:
    """The mean reward of the `train` rows with the same confounders; the mean of all where there are none."""
    cells: dict[tuple[Any, ...], list[float]] = {}
    for key, reward in zip(train, rewards, strict=True):
        cells.setdefault(tuple(map(str, key)), []).append(float(reward))
    overall = float(rewards.mean())
    return np.array([float(np.mean(cells.get(tuple(map(str, key)), [overall]))) for key in held])


FITS: Registry[Callable[[list[Sequence[Any]], Vector, list[Sequence[Any]], float], Vector]] = Registry("fit")
FITS.register("ridge")(ridge)
FITS.register("fixed_effects")(fixed_effects)


@dataclass(kw_only=True)
class _Wrapper:
    """`of` is the reward that is wrapped, in the words of a recipe."""

    of: Any = "accuracy"
    inner: Rewards = field(init=False, repr=False)
    whole_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.inner = build_rewards(self.of)


@REWARDS.register("residual")
@dataclass(kw_only=True)
class Residual(_Wrapper):
    """`R - g(z)`: the reward without what the confounders `on` explain of it.

    `on` lists columns and `length` (in tokens). g is fitted by `fit` (`ridge` with `strength`, or `fixed_effects`:
    the mean of each combination) on the other of `folds` folds of the batch, cut by prompt when there are enough.
    A fold that leaves nothing to fit on keeps its rewards. After DeconfoundLM (Reber et al. 2025); the form is ours.
    """

    on: tuple[str, ...] = ("length",)
    fit: str = "ridge"
    strength: float = 1.0
    folds: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        FITS.lookup(self.fit)
        if not self.on:
            raise SurgeryError("Reward 'residual' needs a confounder: `on: [length]`.")
        if self.folds < 2 or self.strength < 0:
            raise SurgeryError("Reward 'residual' needs at least 2 folds and a strength that is not negative.")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the data must have."""
        return (*self.inner.columns, *(name for name in self.on if name != "length"))

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """One value per completion; None where the wrapped reward is."""
        found = self.inner(prompts, completions, completion_ids=completion_ids, **columns)
        rows: list[dict[str, Any]] = rows_of(prompts, columns)
        if "length" in self.on:
            for row, unit in zip(rows, units("tokens", completions, completion_ids), strict=True):
                row["length"] = len(unit)
        scored = [i for i, r in enumerate(found) if r is not None]
        z = [[row[name] for name in self.on] for row in rows]
        fold, fit = self._folds(prompts, scored), FITS.lookup(self.fit)
        residual = list(found)
        for k in range(self.folds):
            held = [i for i in scored if fold[i] == k]
            train = [i for i in scored if fold[i] != k]
            if held and train:
                rewards = np.array([found[i] for i in train], float)
                explained = fit([z[i] for i in train], rewards, [z[i] for i in held], self.strength)
                for i, g in zip(held, explained, strict=True):
                    residual[i] = float(found[i] or 0.0) - float(g)
        return residual

    def _folds(self, prompts: list[Any], scored: list[int]) -> dict[int, int]:
        """A fold a scored row. Rows of one prompt share a fold when there are as many prompts as folds."""
        names = {name: i for i, name in enumerate(dict.fromkeys(str(prompts[i]) for i in scored))}
        if len(names) >= self.folds:
            return {i: names[str(prompts[i])] % self.folds for i in scored}
        return {i: place % self.folds for place, i in enumerate(scored)}


# ---- running rescaling --------------------------------------------------------------------------------------------


@REWARDS.register("quantile_rescale")
@dataclass(kw_only=True)
class QuantileRescale(_Wrapper):
    """`clip((s - q_low) / (q_high - q_low + eps), 0, 1)` with running quantiles of the wrapped reward s.

    The quantiles of each batch enter with weight `1 - momentum` before they are used; the first batch sets them.
    `exact` mixes in whether the completion equals the `gold` column: `(1 - exact) s' + exact 1[equal]`.
    Ours, after the idea of ARMed (similarities crowd into a narrow range, which GRPO's group can't tell apart).
    """

    of: Any = "similarity"
    low: float = 0.1
    high: float = 0.9
    momentum: float = 0.9
    eps: float = 1e-6
    exact: float = 0.0
    gold: str = "answer"
    bounds: tuple[float, float] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = (("momentum", self.momentum), ("exact", self.exact), ("low", self.low), ("high", self.high))
        for name, value in shares:
            if not 0 <= value <= 1:
                raise SurgeryError(f"Reward 'quantile_rescale': {name} must be between 0 and 1, not {value}.")
        if self.low >= self.high:
            raise SurgeryError("Reward 'quantile_rescale': low must be below high.")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the data must have."""
        return (*self.inner.columns, *((self.gold,) if self.exact else ()))

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """One value in [0, 1] per completion; None where the wrapped reward is."""
        raw = self.inner(prompts, completions, **columns)
        if scored := [r for r in raw if r is not None]:
            now = np.quantile(np.array(scored), [self.low, self.high])
            old = now if self.bounds is None else np.array(self.bounds)
            low, high = old * self.momentum + now * (1 - self.momentum)
            self.bounds = float(low), float(high)
        rows = rows_of(prompts, columns)
        equal = [
            text_of(c).strip() == str(row.get(self.gold)).strip() for c, row in zip(completions, rows, strict=True)
        ]
        return [
            None if r is None else (1 - self.exact) * self._rescaled(r) + self.exact * e
            for r, e in zip(raw, equal, strict=True)
        ]

    def _rescaled(self, value: float) -> float:
        assert self.bounds is not None
        low, high = self.bounds
        return min(1.0, max(0.0, (value - low) / (high - low + self.eps)))

    def state_dict(self) -> dict[str, Any]:
        """The running quantiles and the state of the wrapped reward."""
        return {"bounds": self.bounds, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.bounds = tuple(state["bounds"]) if state["bounds"] else None
        self.inner.load_state_dict(state["inner"])
