"""Circuits of heads: found backwards from the answer, kept as files, and measured by what they do alone.

    found = discover(model, prompts, counterfactuals, prob(answers), entity_tracking(), positions=positions)
    found.circuit.save("circuit.json")
    faithfulness(model, prompts, found.circuit, accuracy(answers), reference=others, positions=positions)

| function | question | value |
|---|---|---|
| `discover` | which heads lead to the answer, and which to those? | path patching, group by group |
| `evaluate_circuit` | what does the circuit do alone? | F(C): all other heads, and its own elsewhere, ablated |
| `faithfulness` | does it do what the model does? | F(C) / F(M), and that of random circuits of its size |
| `completeness` | is something missing? | \\|F(M \\ K) - F(C \\ K)\\| for random parts K and whole groups |
| `minimality` | is something superfluous? | F(C \\ K) / F(C \\ K \\ v) - 1 for each head v |

Wang et al. 2022 (arXiv:2211.00593) for the criteria; Prakash et al. 2024 (arXiv:2402.14811) for their form here: a head
counts at its group's position (per example, if need be) and is ablated at all others. F is the mean of any metric over
the prompts. What heads are replaced by is in `analysis.circuits.ablation`: `ablation="mean"` per position over
`reference` prompts (the prompts themselves by default), "resample", "counterfactual" or "zero".

Many circuits are measured for the price of few: what agrees with a recorded run is not computed again
(`analysis.circuits.passes`). Exact, within rounding, against one whole forward a circuit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor

from analysis.circuits.discovery import Discovery, Step, discover, entity_tracking
from analysis.circuits.edges import EdgeCircuit
from analysis.circuits.groups import Circuit, Group, Head, Recall
from analysis.circuits.minimality import Minimality, minimality
from analysis.circuits.passes import Setting, Settings, Variant
from analysis.metrics import Metric
from analysis.results import Result
from surgery.errors import SurgeryError

__all__ = [
    "Circuit", "Completeness", "Discovery", "EdgeCircuit", "Faithfulness", "Group", "Head", "Minimality", "Recall",
    "Step", "completeness", "discover", "entity_tracking", "evaluate_circuit", "faithfulness", "minimality",
    "random_circuit",
]  # fmt: skip

Floor = Literal["zero", "ablated"]


def evaluate_circuit(
    model: Any, prompts: Any, circuit: Circuit, metric: Metric | Callable[[Tensor], Tensor], **setting: Unpack[Settings]
) -> Result:
    """F(C): the metric (example,) when only the circuit's heads speak, each at its position.

    Columns `model` and `ablated` hold the metric of the whole model, and of the model without any head. Settings (see
    `circuit_passes.Settings`): `ablation="mean"`, `reference` prompts, `positions` that groups name, `align` for
    prompts of unequal length, `seed`, `tokenizer`, `budget` in bytes, `progress`. Raises `SurgeryError` for heads that
    the model has not, positions that nothing explains or a prompt has not, and prompts that do not correspond.
    """
    given = Setting.of(model, prompts, metric, setting)
    values, told = given.values([given.variant(circuit), Variant(True), Variant(False)])
    own, whole, none = values.double().cpu().numpy().T
    columns = {"model": whole.tolist(), "ablated": none.tolist()}
    return _result(own, {}, f"{given.metric.name} of the circuit", columns, {**told, "kind": "circuit"})


@dataclass(frozen=True)
class Faithfulness:
    """What a circuit does alone, beside the whole model and random circuits of its size."""

    circuit: Result
    """(example,) with columns `model` and `ablated`."""
    random: Result
    """(example, draw) of random circuits, with the same columns."""
    ratio: Result
    """(example,) whose mean is the faithfulness, with an interval that counts what the model's own metric varies."""
    random_ratio: Result
    """(example, draw) the same of the random circuits."""

    def table(self) -> list[dict[str, Any]]:
        """Model, circuit and random circuits, plain JSON: the metric and the share of the model's."""
        draws, shares = self.random.mean, self.random_ratio.mean
        model = Result.of(self.circuit.columns["model"], name="model")
        return [
            {"run": "model", **_told(model), "faithfulness": 1.0},
            {"run": "circuit", **_told(self.circuit), "faithfulness": float(self.ratio.mean)},
            {"run": "random", "mean": float(draws.mean()), "low": float(draws.min()), "high": float(draws.max()),
             "faithfulness": float(shares.mean())},
        ]  # fmt: skip


def faithfulness(
    model: Any,
    prompts: Any,
    circuit: Circuit,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    draws: int = 10,
    floor: Floor = "zero",
    **setting: Unpack[Settings],
) -> Faithfulness:
    """F(C) / F(M), and the same of `draws` random circuits (settings as `evaluate_circuit`).

    With `floor="ablated"` both are counted from the model without any head, (F(C) - F(0)) / (F(M) - F(0)): right for
    metrics that have no zero of their own, such as a logit difference. Random circuits have as many heads in each group
    as the circuit, drawn without replacement among all heads of a position. Raises `SurgeryError` as
    `evaluate_circuit` does, and when the baselines coincide.
    """
    if floor not in ("zero", "ablated"):
        raise SurgeryError(f"floor={floor!r}: expected 'zero' or 'ablated'.")
    if draws < 1:
        raise SurgeryError(f"draws={draws}: at least one random circuit is needed.")
    given = Setting.of(model, prompts, metric, setting)
    own = given.variant(circuit)
    others = [given.variant(random_circuit(circuit, given.anatomy, given.seed + i)) for i in range(draws)]
    values, told = given.values([own, Variant(True), Variant(False), *others])
    numbers = values.double().cpu().numpy()
    mine, whole, none, drawn = numbers[:, 0], numbers[:, 1], numbers[:, 2], numbers[:, 3:]
    bottom = none if floor == "ablated" else np.zeros_like(none)
    columns = {"model": whole.tolist(), "ablated": none.tolist(), "span": (whole - bottom).tolist()}
    meta = {**told, "kind": "faithfulness", "floor": floor}
    seeds = {"draw": [given.seed + i for i in range(draws)]}
    name = f"{given.metric.name} of the circuit"
    if abs((whole - bottom).mean()) <= 1e-5 * max(np.abs(numbers).mean(), 1e-30):
        what = "of the whole model is 0" if floor == "zero" else "is the same with all heads as without any"
        raise SurgeryError(f"Faithfulness is not defined here: {given.metric.name} {what}.",
                           hint="Take prompts that the model answers.")  # fmt: skip
    return Faithfulness(
        _result(mine, {}, name, columns, meta),
        _result(drawn, seeds, f"{name}, random", columns, meta),
        _result(mine - bottom, {}, name, columns, meta).normalized("span", name="faithfulness"),
        _result(drawn - bottom[:, None], seeds, name, columns, meta).normalized("span", name="faithfulness, random"),
    )


def random_circuit(circuit: Circuit, anatomy: Any, seed: int) -> Circuit:
    """A circuit of as many heads in each group, drawn without replacement among all heads of a position.

    Raises `SurgeryError` when the groups of a position have more heads than the model.
    """
    generator = torch.Generator().manual_seed(seed)
    every = anatomy.n_layers * anatomy.n_heads
    left: dict[int | str, list[int]] = {}
    found = {}
    for name, group in circuit.groups.items():
        order = left.setdefault(group.position, torch.randperm(every, generator=generator).tolist())
        if len(order) < len(group.heads):
            raise SurgeryError(f"The groups at {group.position!r} have more heads than the model, {every}.")
        drawn = sorted(divmod(order.pop(), anatomy.n_heads) for _ in group.heads)
        found[name] = Group([Head(*head) for head in drawn], group.position, group.to, group.by)
    return Circuit(found, f"random, seed {seed}")


@dataclass(frozen=True)
class Completeness:
    """What model and circuit do without parts K of the circuit: groups as a whole, and random halves."""

    model: Result
    """(example, part) F(M \\ K)."""
    circuit: Result
    """(example, part) F(C \\ K)."""

    @property
    def difference(self) -> Result:
        """(example, part) F(M \\ K) - F(C \\ K): an interval without 0 says that something is missing."""
        values = self.model.values - self.circuit.values
        return Result(values, self.model.axes, "incompleteness", meta={**self.model.meta, "centre": 0})

    @property
    def scores(self) -> dict[str, float]:
        """|F(M \\ K) - F(C \\ K)| of every part."""
        return dict(zip(self.model.axes["part"], np.abs(self.difference.mean).tolist(), strict=True))

    @property
    def random(self) -> tuple[float, float]:
        """Mean and standard deviation of the scores of random parts."""
        drawn = [score for part, score in self.scores.items() if part.startswith("random ")]
        return float(np.mean(drawn)), float(np.std(drawn))


def completeness(
    model: Any,
    prompts: Any,
    circuit: Circuit,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    subsets: int = 20,
    **setting: Unpack[Settings],
) -> Completeness:
    """F(M \\ K) and F(C \\ K) for every group K, and for `subsets` random K (settings as `evaluate_circuit`).

    Each head of the circuit is in a random K with probability 1/2. M \\ K is the whole model with K ablated at its
    positions and nowhere else; C \\ K the circuit without K. Raises `SurgeryError` as `evaluate_circuit` does.
    """
    given = Setting.of(model, prompts, metric, setting)
    whole = given.variant(circuit)
    spots = sorted(whole.heads, key=str)
    parts = {name: circuit.only(name).spots for name in circuit.groups}
    generator = torch.Generator().manual_seed(given.seed)
    for i in range(subsets):
        chosen = (torch.rand(len(spots), generator=generator) < 0.5).tolist()
        parts[f"random {i}"] = frozenset(spot for spot, out in zip(spots, chosen, strict=True) if out)
    variants = [*(Variant(True, part) for part in parts.values()),
                *(Variant(False, whole.heads - part) for part in parts.values())]  # fmt: skip
    values, told = given.values(variants, against=whole)
    numbers, axes, meta = values.double().cpu().numpy(), {"part": list(parts)}, {**told, "kind": "completeness"}
    return Completeness(
        _result(numbers[:, : len(parts)], axes, f"{given.metric.name} of the model without the part", {}, meta),
        _result(numbers[:, len(parts) :], axes, f"{given.metric.name} of the circuit without the part", {}, meta),
    )


def _result(
    values: np.ndarray, axes: Mapping[str, Any], name: str, columns: Mapping[str, Any], meta: Mapping[str, Any]
) -> Result:
    return Result(values, {"example": range(len(values)), **axes}, name, columns, meta)


def _told(result: Result) -> dict[str, float]:
    low, high = result.interval()
    return {"mean": float(result.mean), "low": float(low), "high": float(high)}
