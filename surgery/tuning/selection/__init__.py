"""Selections: from weights (and gradients, inputs, siblings) to the numbers that may move.

    chosen = select(model, "lift", density=0.05)
    chosen = select(model, "fisher", lora_rank=8, scope="global", batches=batches)
    chosen = select(model, "half", level="category", seed=0)

| family | names | file |
|---|---|---|
| a score of every number | lift, magnitude, random, gradient, snip, fisher, movement, wanda, delta | scores.py |
| small weights, re-selected as they grow | sara | sara.py |
| half of the tensors | half | half.py |
| rows and columns that belong together | s2ft | structured.py |
| parameters by what they do | bias, norm, all | roles.py |

A selector is a frozen dataclass in one of these files; its fields are its options, in Python, in recipes and at the
command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from surgery.errors import SurgeryError
from surgery.registry import nearest
from surgery.tuning.selection import half, roles, sara, scores, structured  # noqa: F401 - they register selectors
from surgery.tuning.selection.base import SELECTORS, Round, Scored, Selector
from surgery.tuning.selection.budget import Budget, Scope
from surgery.tuning.selection.evidence import Evidence, Loss, gathered
from surgery.tuning.selection.places import Places, Selection, Slice
from surgery.tuning.selection.targets import Target, targets

__all__ = ["SELECTORS", "Budget", "Evidence", "Places", "Round", "Scored", "Selection", "Selector", "Slice", "Target",
           "choose_by", "select", "targets"]  # fmt: skip


def select(
    model: nn.Module,
    method: str = "lift",
    *,
    density: float | None = None,
    count: int | None = None,
    lora_rank: int | None = None,
    scope: Scope | None = None,
    modules: Sequence[str] | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    sibling: Any = None,
    turn: Round | None = None,
    **options: Any,
) -> Selection:
    """The numbers of `model` that `method` (of `SELECTORS`) chooses within a budget; the model is only looked at.

    A budget is `density`, `count` or `lora_rank` (`Budget`); `scope` says who competes for it. `modules` are groups or
    kinds of surgery.anatomy ("attention", "mlp", "q", "down", "embedding", ...) or names of parameters. Selections by
    gradients or inputs need `batches`, dictionaries that the model takes (or anything that `loss` takes), "delta" a
    `sibling`. `turn` is for selections that move (half, sara). `options` are the selector's own. Raises `SurgeryError`
    in a sentence for whatever does not fit.
    """
    kind = SELECTORS.lookup(method)
    try:
        selector = kind(**options)
    except TypeError:
        wrong = next((name for name in options if name not in getattr(kind, "__dataclass_fields__", {})), "")
        raise SurgeryError(f"The selection '{method}' has no option '{wrong}'.",
                           hint=nearest(wrong, getattr(kind, "__dataclass_fields__", {}))) from None  # fmt: skip
    budget = Budget(density, count, lora_rank, scope or kind.scope)
    return choose_by(selector, model, budget, modules=modules, batches=batches, loss=loss, sibling=sibling, turn=turn)


def choose_by(
    selector: Selector,
    model: nn.Module,
    budget: Budget,
    *,
    modules: Sequence[str] | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    sibling: Any = None,
    turn: Round | None = None,
) -> Selection:
    """`select` by a selector and a budget that are made already."""
    name = next((n for n, kind in SELECTORS.items() if type(selector) is kind), type(selector).__name__)
    if selector.budgeted == "needed" and not budget.given:
        raise SurgeryError(f"The selection '{name}' needs a budget.", hint="density=0.05, count=10000 or lora_rank=8.")
    if selector.budgeted == "never" and budget.given:
        raise SurgeryError(f"The selection '{name}' takes no budget: it says itself what moves.")
    found = targets(model, modules or selector.modules, matrices=selector.matrices)
    cut = next((t.name for t in found if hasattr(t.parameter, "device_mesh")), None)
    if cut is not None and selector.budgeted != "never":
        raise SurgeryError(f"'{cut}' is cut up over processes (FSDP2): it has no entries to name.",
                           hint="Select before sharding, or choose whole parameters (half, norm).")  # fmt: skip
    evidence = gathered(model, found, selector.needs, batches=batches, loss=loss, sibling=sibling,
                        lr=getattr(selector, "lr", 1e-3))  # fmt: skip
    turn = turn or Round()
    places = dict(selector.pick(found, budget, evidence, turn))
    order = {t.name: t.shape for t in found}
    places = {n: places[n] for n in order if n in places}
    if not places:
        raise SurgeryError(
            f"The selection '{name}' chose nothing.",
            hint="Raise the budget, or widen `modules`." if budget.given else None,
        )
    total = sum(t.parameter.numel() for t in found)
    notes = selector.notes(found, places, turn)
    return Selection(places, {n: order[n] for n in places}, name, total, notes)
