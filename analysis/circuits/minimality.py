"""Which heads of a circuit are superfluous: each one's worth, once those that could stand in for it are gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import ceil, inf
from typing import Any, Unpack

import numpy as np
from torch import Tensor

from analysis.circuits.groups import Circuit, Head, Spot
from analysis.circuits.passes import Setting, Settings, Variant
from analysis.metrics import Metric
from analysis.results import Result
from surgery.errors import SurgeryError

Member = tuple[str, Head]
"""A head and its group."""


@dataclass(frozen=True)
class Minimality:
    """What every head v of a circuit adds when the part K of its group is gone."""

    circuit: Circuit
    """The heads whose score reaches the threshold."""
    before: Result
    """(example, head) F(C \\ K)."""
    after: Result
    """(example, head) F(C \\ (K and v))."""
    scores: Mapping[Member, float]
    """before / after - 1; infinite where nothing is left without v, 0 where nothing is left with it."""
    removed: Mapping[Member, tuple[Head, ...]]
    """K of each head."""


def minimality(
    model: Any,
    prompts: Any,
    circuit: Circuit,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    share: float = 0.3,
    threshold: float = 0.01,
    **setting: Unpack[Settings],
) -> Minimality:
    """The circuit without superfluous heads, by the rule of Prakash et al. 2024 (settings as `evaluate_circuit`).

    For a head v of a group of n, the others u are ranked by what v's removal costs once u is gone,
    F(C \\ u) - F(C \\ {u, v}); K are the first ceil(`share` n) of them that cost anything. v stays when
    F(C \\ K) / F(C \\ (K and v)) - 1 >= `threshold`. All pairs of a group are measured, n (n - 1) / 2; heads are judged
    one by one, each against the whole circuit. The metric must not be negative (accuracy, a probability). Raises
    `SurgeryError` when it is, and as `evaluate_circuit` does.
    """
    if not 0 <= share <= 1:
        raise SurgeryError(f"share={share}: the part of a group that is removed is between 0 and 1.")
    given = Setting.of(model, prompts, metric, setting)
    whole = given.variant(circuit)
    if not whole.heads:
        raise SurgeryError("The circuit has no heads.")
    gone: dict[frozenset[Spot], None] = {}
    members = [(name, head, Spot(*head, group.position)) for name, group in circuit.groups.items()
               for head in group.heads]  # fmt: skip
    for name in circuit.groups:
        mine = [spot for group, _, spot in members if group == name]
        gone |= dict.fromkeys(map(frozenset, [*((spot,) for spot in mine), *combinations(mine, 2)]))
    values, told = given.values([Variant(False, whole.heads - out) for out in gone], against=whole)
    mean = dict(zip(gone, values.double().mean(0).tolist(), strict=True))
    if min(mean.values()) < 0:
        raise SurgeryError(f"Minimality divides by the metric, and '{given.metric.name}' is negative here.",
                           hint="Take accuracy, or the probability of the answer.")  # fmt: skip
    least = 1e-6 * max(mean.values())  # what rounding makes
    removed: dict[Member, tuple[Head, ...]] = {}
    last: list[frozenset[Spot]] = []
    for name, head, spot in members:
        others = [(mean[frozenset([u])] - mean[frozenset([u, spot])], other, u)
                  for group, other, u in members if group == name and u != spot]  # fmt: skip
        others = sorted((one for one in others if one[0] > least), key=lambda one: -one[0])
        chosen = others[: ceil(share * len(circuit.groups[name].heads))]
        removed[name, head] = tuple(other for _, other, _ in chosen)
        part = frozenset(u for _, _, u in chosen)
        last += [part, part | {spot}]
    again, more = given.values([Variant(False, whole.heads - out) for out in last], against=whole)
    numbers = again.double().cpu().numpy()
    before, after = numbers[:, ::2], numbers[:, 1::2]
    scores = {member: _score(b, a) for member, b, a in zip(removed, before.mean(0), after.mean(0), strict=True)}
    cost = {key: told["cost"][key] + more["cost"][key] for key in told["cost"]}
    meta = {**told, "kind": "minimality", "share": share, "threshold": threshold, "cost": cost}
    axes = {"example": range(len(numbers)), "head": [f"{name} {head}" for name, head in removed]}
    left = {name: group.keep([h for h in group.heads if scores[name, h] >= threshold])
            for name, group in circuit.groups.items()}  # fmt: skip
    kind = given.metric.name
    return Minimality(
        Circuit(left, circuit.note), Result(before, axes, f"{kind} with the head", meta=meta),
        Result(after, axes, f"{kind} without the head", meta=meta), scores, removed,
    )  # fmt: skip


def _score(before: np.floating, after: np.floating) -> float:
    if after > 0:
        return float(before / after - 1)
    return inf if before > 0 else 0.0
