"""One pass whose activations have gradients: what the attribution of nodes and of edges is made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from analysis.metrics import Metric
from surgery.activations.interventions import capture, edit
from surgery.anatomy import Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, as_batch, untouched

Direction = Literal["denoising", "noising"]
Rule = Literal["midpoint", "left", "right"]
_SHIFTS = {"midpoint": 0.5, "left": 0.0, "right": 1.0}


def one_of(name: str, given: Any, known: Sequence[str]) -> None:
    """Raises `SurgeryError` when an option is none of those there are."""
    if given not in known:
        raise SurgeryError(f"{name}={given!r}: expected {', '.join(map(repr, known[:-1]))} or {known[-1]!r}.")


def points_of(rule: Rule, steps: int) -> list[float]:
    """Where on the way from corrupt (0) to clean (1) gradients are taken: (k + shift) / steps for k = 0..steps-1.

    "left" begins at corrupt and never reaches clean, "right" the other way round; "midpoint" errs least. Raises
    `SurgeryError` for another rule, and for fewer steps than one.
    """
    one_of("rule", rule, get_args(Rule))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise SurgeryError(f"steps={steps!r}: integrated gradients need a whole number of steps, 1 at least.")
    return [(k + _SHIFTS[rule]) / steps for k in range(steps)]


def at_a_time(metric: Metric, size: int, examples: int) -> int:
    """How many examples run together: a plain function may know them by their rows, and sees them all."""
    return examples if not metric.divisible else max(1, min(size, examples))


def between(corrupt: Tensor, clean: Tensor, at: float) -> Tensor:
    """A point on the straight way from corrupt (0) to clean (1)."""
    return corrupt + at * (clean - corrupt)


def pairs(clean: Any, corrupt: Any, tokenizer: Any, device: Any) -> tuple[Batch, Batch]:
    """Both prompts of every pair as batches of one width, padded on the right: a token's column is its position.

    Raises `SurgeryError` when they don't come in pairs, or naming the first pair of unequal length.
    """
    good, bad = (as_batch(batch, tokenizer).to(device).right_padded() for batch in (clean, corrupt))
    if len(good) != len(bad):
        raise SurgeryError(f"There are {len(good)} clean prompts and {len(bad)} corrupt ones: they come in pairs.")
    if bool((differ := good.lengths != bad.lengths).any()):
        pair = int(differ.int().argmax())
        raise SurgeryError(
            f"Pair {pair}: the clean prompt is {int(good.lengths[pair])} tokens long, the corrupt one "
            f"{int(bad.lengths[pair])}; position by position they don't correspond.",
            hint="Attribution compares activations position by position: make the prompts of a pair equally long.",
        )
    width = int(good.lengths.max())
    return Batch(good.ids[:, :width], good.mask[:, :width]), Batch(bad.ids[:, :width], bad.mask[:, :width])


@dataclass
class Passed:
    """What one pass left."""

    values: Tensor
    """(batch,) the metric."""
    seen: dict[Site, Tensor]
    """Values of the sites that were asked for, outside of any graph."""
    gradients: dict[Site, Tensor] = field(default_factory=dict)
    """d metric / d site, of each example its own metric; of the shape of the site."""
    live: dict[Site, Tensor] = field(default_factory=dict)
    """With `retain`: the values whose gradients were taken, in the graph."""


def passed(
    model: Any,
    batch: Batch,
    metric: Metric,
    sites: Iterable[Site] = (),
    gradients: Iterable[Site] = (),
    *,
    edits: Mapping[Site, Tensor] | None = None,
    functions: Mapping[Site, Callable[[Tensor], Tensor | None]] | None = None,
    retain: bool = False,
) -> Passed:
    """One forward, and one backward when gradients are asked for; examples don't mix, so all come from one sum.

    `edits` put tensors in the place of sites: the graph begins there (else at the embedding), so that gradients are
    those of sites above; `functions` change values on the way. The model's parameters take no part. Raises
    `SurgeryError` for a metric without gradient, and for gradients that are not finite.
    """
    anatomy, sites, wanted = anatomy_of(model), list(sites), list(gradients)
    changes: dict[Any, Any] = dict(functions or {})
    with ExitStack() as stack:
        stack.enter_context(untouched(model, gradients=bool(wanted)))
        if edits:
            leaves: dict[Any, Any] = {s: v.detach().requires_grad_(bool(wanted)) for s, v in edits.items()}
            stack.enter_context(edit(model, leaves))
        elif wanted:
            stack.enter_context(edit(model, {"embed": lambda value: value.detach().requires_grad_()}))
        stack.enter_context(edit(model, changes))
        live = stack.enter_context(capture(model, [*wanted, Site("final")], grad=bool(wanted)))
        seen = stack.enter_context(capture(model, sites))
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        short = {"logits_to_keep": 1} if keeps and metric.needs != "all" else {}  # the metric reads the last norm
        logits = model(**batch.inputs(model), use_cache=False, **short).logits
        if metric.needs == "all":
            values = metric.of_logits(logits, batch.last)
        else:
            rows = torch.arange(len(batch), device=batch.last.device)
            values = metric.of_final(live[Site("final")][rows, batch.last][None], anatomy)[0]
        found = Passed(values.detach(), {site: seen[site] for site in sites})
        if wanted:
            found.live = {site: live[site] for site in wanted}
            found.gradients = dict(zip(wanted, _gradients(metric, values, found.live, retain), strict=True))
    if not retain:
        found.live = {}
    return found


def _gradients(metric: Metric, values: Tensor, live: Mapping[Site, Tensor], retain: bool) -> list[Tensor]:
    if not values.requires_grad:
        raise SurgeryError(
            f"The metric '{metric.name}' has no gradient: a small change of the logits does not change it, or it "
            "leaves torch on the way.",
            hint="Take one that is smooth in the logits: logit_diff, log_prob, prob or kl.",
        )
    tensors = list(live.values())
    raw = torch.autograd.grad(values.sum(), tensors, allow_unused=True, retain_graph=retain)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, raw, strict=True)]
    for site, gradient in zip(live, gradients, strict=True):
        if not bool(gradient.isfinite().all()):
            raise SurgeryError(f"The gradient of '{metric.name}' at '{site}' is not finite.",
                               hint="Try float32, or a metric that does not reach infinity.")  # fmt: skip
    return gradients
