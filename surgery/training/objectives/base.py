"""What an objective is: a loss on batches of one kind, with denominators of the whole update; objectives add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.registry import Registry, nearest
from surgery.training import schedules
from surgery.training.batch import Batch
from surgery.training.policy import Policy, Scores
from surgery.training.schedules import Number

if TYPE_CHECKING:
    from surgery.training.context import Context

OBJECTIVES: Registry[type[Objective]] = Registry("objective")
register = OBJECTIVES.register


@dataclass
class Loss:
    """A micro-batch's share of the update's loss (shares add up to it), and what to report."""

    value: Tensor
    metrics: Mapping[str, tuple[Tensor | float, float]] = field(default_factory=dict)
    """Each quantity as (sum, count), so that micro-batches and processes can be put together exactly."""


@dataclass(frozen=True)
class Objective:
    """A loss on batches of one kind. A subclass is a frozen dataclass whose fields are the recipe's parameters.

    The engine calls `prepare` once for what a source gave (advantages, reference log-probabilities: nothing here needs
    a gradient), cuts it into updates and micro-batches, and sums `loss` over these. `0.7 * GRPO() + 0.3 * SFT()` is an
    objective too.
    """

    @property
    def kind(self) -> str:
        """The batches it reads: "rollouts", "demonstrations" or "pairs"."""
        return "rollouts"

    @property
    def asks(self) -> dict[str, bool]:
        """What the policy's pass must give beyond log-probabilities: entropy, hidden, values."""
        return {}

    @property
    def uses_reference(self) -> bool:
        """Whether a frozen copy of the model at the start is wanted; without a need none is made."""
        return False

    whole_groups = False
    """Whether a micro-batch must hold whole groups (pairs)."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises `SurgeryError` for an impossible combination, before a model is loaded.

        `settings` holds group, source, columns (those of the data, None when unknown).
        """

    def modules(self, policy: Policy) -> dict[str, nn.Module]:
        """Modules that are trained beside the model and thrown away at the end: a value head."""
        return {}

    def prepare(self, batch: Batch, context: Context) -> None:
        """Adds columns to a whole batch of its kind, once, before the first update made of it."""

    def loss(self, policy: Callable[..., Scores], batch: Batch) -> Loss:
        """The share of the update's loss that a micro-batch has."""
        return self.of_scores(policy(batch, **self.asks), batch)

    def of_scores(self, scores: Scores, batch: Batch) -> Loss:
        """The same from the pass's result, for objectives that need one ordinary pass."""
        raise NotImplementedError

    def terms(self) -> Iterator[tuple[Number, Objective]]:
        """Weighted parts: itself alone, unless it is a sum."""
        yield 1.0, self

    def __add__(self, other: Objective) -> Objective:
        return Sum((*self.terms(), *other.terms()))

    def __mul__(self, weight: Number) -> Objective:
        return Sum(tuple((_product(weight, w), term) for w, term in self.terms()))

    __rmul__ = __mul__

    def at(self, number: Number, batch: Batch) -> float:
        """A parameter's value in the batch's step."""
        return schedules.value(number, batch.step, batch.steps)


@dataclass(frozen=True)
class Sum(Objective):
    """A weighted sum: parts that read the same kind of batch share one pass of the policy."""

    parts: tuple[tuple[Number, Objective], ...] = ()

    @property
    def kind(self) -> str:
        """Kinds of all parts, joined by +."""
        return "+".join(dict.fromkeys(term.kind for _, term in self.parts))

    @property
    def asks(self) -> dict[str, bool]:
        """What any part asks for."""
        return {name: True for _, term in self.parts for name, wanted in term.asks.items() if wanted}

    @property
    def uses_reference(self) -> bool:
        """Whether any part does."""
        return any(term.uses_reference for _, term in self.parts)

    @property
    def whole_groups(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(term.whole_groups for _, term in self.parts)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Every part's check."""
        for _, term in self.parts:
            term.check(settings)

    def modules(self, policy: Policy) -> dict[str, nn.Module]:
        """Those of all parts; parts that name the same one share it."""
        return {name: m for _, term in self.parts for name, m in term.modules(policy).items()}

    def prepare(self, batch: Batch, context: Context) -> None:
        """Every part that reads batches of this kind."""
        for _, term in self.parts:
            if term.kind == batch.kind:
                term.prepare(batch, context)

    def loss(self, policy: Callable[..., Scores], batch: Batch) -> Loss:
        """Weighted losses of the parts that read batches of this kind."""
        mine = [(w, term) for w, term in self.parts if term.kind == batch.kind]
        once = _Once(policy, {name: True for _, term in mine for name, wanted in term.asks.items() if wanted})
        losses = [(self.at(w, batch), term.loss(once, batch)) for w, term in mine]
        metrics: dict[str, tuple[Tensor | float, float]] = {}
        for (_, term), (_, loss) in zip(mine, losses, strict=True):
            many = len(self.parts) > 1
            metrics |= {f"{name_of(term)}/{k}" if many and k in metrics else k: v for k, v in loss.metrics.items()}
        return Loss(sum((w * loss.value for w, loss in losses), torch.zeros(())), metrics)

    def terms(self) -> Iterator[tuple[Number, Objective]]:
        """The parts."""
        yield from self.parts


class _Once:
    """A policy whose plain pass over one batch is made once and shared."""

    def __init__(self, policy: Callable[..., Scores], asks: Mapping[str, bool]) -> None:
        self._policy, self._asks = policy, dict(asks)
        self._batch: Batch | None = None
        self._scores: Scores | None = None

    def __call__(self, batch: Batch, **asks: bool) -> Scores:
        more = {name: True for name, wanted in asks.items() if wanted and not self._asks.get(name)}
        if self._scores is None or batch is not self._batch or more:
            self._asks |= more
            self._batch, self._scores = batch, self._policy(batch, **self._asks)
        return self._scores

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


@dataclass(frozen=True)
class _Product(schedules.Schedule):
    one: Number
    other: Number

    def at(self, step: int, steps: int) -> float:
        return schedules.value(self.one, step, steps) * schedules.value(self.other, step, steps)


def _product(one: Number, other: Number) -> Number:
    if isinstance(one, schedules.Schedule) or isinstance(other, schedules.Schedule):
        return _Product(one, other)
    return one * other


def name_of(objective: Objective) -> str:
    """The name it is registered under."""
    return next((name for name, cls in OBJECTIVES.items() if cls is type(objective)), type(objective).__name__)


def parse(written: Any) -> Objective:
    """An objective as a recipe writes it: `grpo`, `{grpo: {beta: 0.04}}`, or a list of such with `weight`.

    Raises `SurgeryError` for unknown names and parameters.
    """
    if isinstance(written, Objective):
        return written
    if isinstance(written, list):
        if not written:
            raise SurgeryError("The objective is an empty list.", hint="objective: grpo")
        parts = []
        for entry in written:
            entry = {entry: {}} if isinstance(entry, str) else dict(entry)
            weight = schedules.parse(entry.pop("weight", 1.0))
            parts.append(weight * parse(entry))
        return Sum(tuple(term for part in parts for term in part.terms()))
    if isinstance(written, str):
        return OBJECTIVES.lookup(written)()
    if not isinstance(written, Mapping) or len(written) != 1:
        raise SurgeryError(f"An objective is a name, {{name: {{...}}}} or a list of these; found {written!r}.")
    ((name, keys),) = written.items()
    kind = OBJECTIVES.lookup(name)
    known = [f.name for f in fields(kind)]
    for key in keys or {}:
        if key not in known:
            raise SurgeryError(f"Objective '{name}' has no parameter '{key}'.", hint=nearest(key, known))
    return kind(**{key: _fitting(kind, name, key, value) for key, value in (keys or {}).items()})


def _fitting(kind: type[Objective], name: str, key: str, value: Any) -> Any:
    """A parameter as its annotation wants it (YAML reads 3e-4 as a text); a schedule where it says `Number`."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    wanted = get_type_hints(kind)[key]
    if isinstance(value, Mapping) and wanted == Number:
        value = schedules.parse(value)
    try:
        return TypeAdapter(wanted, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise SurgeryError(f"Objective '{name}': `{key}` is {value!r}.", hint=f"{problem}.") from None
