"""A circuit found backwards: heads that tell the answer, heads that tell those, and so on, by path patching."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from analysis.circuits.groups import EVERYWHERE, Circuit, Group, Head
from analysis.metrics import Metric
from analysis.paths.path_patching import BUDGET, Progress, path_patch
from analysis.positions import Position, found
from analysis.results import Result
from surgery.activations.interventions import unwrapped
from surgery.anatomy import Anatomy, anatomy_of
from surgery.errors import SurgeryError

Score = Literal["relative", "difference"]


@dataclass(frozen=True)
class Step:
    """One group: the `top` heads that lead to the receivers, an earlier step's group or the logits."""

    group: str
    top: int
    receivers: str = "logits"
    component: str = ""
    """By which of q, k and v the receivers read it; nothing for the logits."""
    position: int | str = -1
    """Where its heads speak, and are read: a number, a name that `positions=` explains, or "all"."""
    strongest: int | None = None
    """How many of the receivers' group receive: those with the strongest scores; all by default."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise SurgeryError(f"Step '{self.group}' takes {self.top} heads: at least one is needed.")
        if (self.receivers == "logits") != (self.component == ""):
            raise SurgeryError(f"Step '{self.group}' leads to '{self.receivers}' by '{self.component}': the logits "
                               "take no component, a group is read by q, k or v.")  # fmt: skip
        if self.component not in ("", "q", "k", "v"):
            raise SurgeryError(f"Step '{self.group}': there is no component '{self.component}'.", hint="q, k or v.")


def entity_tracking(
    top: tuple[int, int, int, int] = (58, 10, 25, 5),
    receivers: tuple[int, int, int] = (20, 5, 10),
    label: int = -3,
    earlier: int | str = "previous query label",
) -> list[Step]:
    """The steps of Prakash et al. 2024, with the numbers of Llama-7B (before minimality) if not said.

    A fetches the value (last token, to the logits), B transmits the position (last token, to A by q), C detects it (at
    the label asked about, `label`, to B by v), D reads the structure (at that label's `earlier` place, to C by v).
    """
    a, b, c, d = top
    return [
        Step("A", a),
        Step("B", b, "A", "q", strongest=receivers[0]),
        Step("C", c, "B", "v", label, receivers[1]),
        Step("D", d, "C", "v", earlier, receivers[2]),
    ]


class Discovery(NamedTuple):
    """A circuit, and the score of every head in each step, (example, layer, head)."""

    circuit: Circuit
    scores: dict[str, Result]


def discover(
    model: Any,
    prompts: Any,
    counterfactuals: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    steps: Sequence[Step],
    *,
    score: Score = "relative",
    positions: Mapping[str, Position] | None = None,
    source_positions: Mapping[str, Position] | None = None,
    through_mlps: bool = True,
    note: str = "",
    tokenizer: Any = None,
    budget: int = BUDGET,
    progress: Progress | None = None,
) -> Discovery:
    """The groups of `steps`, each by path patching from all heads to the group before it.

    Heads say what they say in the counterfactual; a head's score is the mean over examples of (m_patched - m) / m
    (`score="relative"`, for a probability), or of m_patched - m ("difference"). The most negative are taken, at most
    `top`, and none that is not negative. Receivers are written to where the step's heads speak. A head that is in two
    groups at one position stays in the one found last. `positions` explains names; `source_positions` says where a
    name is in the counterfactuals, where that is elsewhere.

    Raises `SurgeryError` as `path_patch` does, for steps that lead nowhere, and for a relative score over a metric that
    is 0 in some example.
    """
    model = unwrapped(model)
    anatomy = anatomy_of(model)
    if score not in ("relative", "difference"):
        raise SurgeryError(f"score={score!r}: expected 'relative' or 'difference'.")
    _check(steps)
    groups: dict[str, Group] = {}
    scores: dict[str, Result] = {}
    for step in steps:
        where = _place(step, positions)
        there = None
        if source_positions is not None and step.position in source_positions:
            there = found(step.position, source_positions, f"Step '{step.group}'")
        to = "logits" if step.receivers == "logits" else _receivers(groups[step.receivers], step, anatomy)
        effects = path_patch(
            model, prompts, counterfactuals, metric, receivers=to, position=where, source_position=there,
            receiver_position=None if to == "logits" else where, through_mlps=through_mlps, tokenizer=tokenizer,
            budget=budget, progress=progress,
        )  # fmt: skip
        scores[step.group] = scored = _scored(effects, score, step)
        heads = [(Head(layer, head), value) for layer, head, value in scored.top(step.top, largest=False) if value < 0]
        groups[step.group] = Group([head for head, _ in heads], step.position, step.receivers, step.component,
                                   [value for _, value in heads])  # fmt: skip
    return Discovery(Circuit(_apart(groups), note), scores)


def _check(steps: Sequence[Step]) -> None:
    known: set[str] = set()
    for step in steps:
        if step.group in known or step.group == "logits":
            raise SurgeryError(f"There are two groups '{step.group}'.")
        if step.receivers != "logits" and step.receivers not in known:
            raise SurgeryError(f"Step '{step.group}' leads to '{step.receivers}', which no earlier step finds.",
                               hint=f"Found before it: {', '.join(['logits', *sorted(known)])}.")  # fmt: skip
        known.add(step.group)
    if not steps:
        raise SurgeryError("There are no steps.", hint="Step('A', top=20) finds what leads to the logits.")


def _place(step: Step, positions: Mapping[str, Position] | None) -> Position | None:
    if step.position == EVERYWHERE:
        return None
    return found(step.position, positions, f"Step '{step.group}'")


def _receivers(group: Group, step: Step, anatomy: Anatomy) -> list[str]:
    """The heads that receive, by what they read: of keys and values the key-value heads."""
    if not group.heads:
        raise SurgeryError(f"Nothing leads to '{step.receivers}': no head there lowers the metric.",
                           hint="Take other counterfactuals, or a metric that is high on the prompts.")  # fmt: skip
    strongest = group.heads[: step.strongest]
    if all(head.layer == 0 for head in strongest):
        problem = f"Nothing leads to '{step.receivers}': its heads are in layer 0, and no head comes before."
        raise SurgeryError(problem, hint=f"Leave out step '{step.group}', or let more of its heads receive.")
    share = 1 if step.component == "q" else anatomy.group
    return list(dict.fromkeys(f"{step.component}.{head.layer}.{head.head // share}" for head in strongest))


def _scored(effects: Result, score: Score, step: Step) -> Result:
    meta = {**effects.meta, "step": step.group, "score": score}
    if score == "difference":
        return Result(effects.values, effects.axes, effects.name, effects.columns, meta)
    clean = np.asarray(effects.columns["clean"], dtype=np.float64)
    if (clean == 0).any():
        raise SurgeryError(f"The metric is 0 on prompt {int(np.argmax(clean == 0))}: there is no score relative to it.",
                           hint="Take a probability, or score='difference'.")  # fmt: skip
    return Result(
        effects.values / clean[:, None, None], effects.axes, f"relative {effects.name}", effects.columns, meta
    )


def _apart(groups: Mapping[str, Group]) -> dict[str, Group]:
    """A head in two groups at one position stays in the one found last."""
    names = list(groups)
    return {
        name: group.keep(
            set(group.heads)
            - {h for later in names[i + 1 :] if groups[later].position == group.position for h in groups[later].heads}
        )
        for i, (name, group) in enumerate(groups.items())
    }
