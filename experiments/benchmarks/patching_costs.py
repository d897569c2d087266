"""What `patching.py` says of paths, edges and masks: their cost in forwards of the same prompts, and the loop's.

A forward is the model's own on all prompts, logits of all tokens included, as a loop over edges would run it. Forwards
are counted by multiplications with matrices (a backward that needs no gradient of weights is about one more), and
measured in CPU seconds. The loop's seconds are its number of forwards times a forward's, but for masks, whose plain
loop is run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import patching_peers as peers
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from analysis.component_masks import Desideratum, Mask, learn_mask
from analysis.edges import eap
from analysis.metrics import logit_diff
from analysis.paths import path_patch
from surgery.activations import edit, run
from surgery.anatomy import anatomy_of

STEPS = 5
"""Of integrated gradients."""
EPOCHS = 8
"""Of masks: as many steps, of one batch."""


def costs(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each method and model."""
    found = []
    for name, model in models.items():
        forward = Forward(model)
        for rows in (paths(forward), edges(forward), masks(forward)):
            found += [{"model": name, **row} for row in rows]
    return found


class Forward:
    """A model with 8 pairs of prompts, and what one forward of 8 prompts costs."""

    def __init__(self, model: Any) -> None:
        self.model, self.anatomy = model, anatomy_of(model)
        self.clean, self.corrupt, self.answers = peers.pairs(model.config.vocab_size)
        self.multiply_adds, self.seconds, _ = measured(self.plain)

    def plain(self) -> Tensor:
        """All logits."""
        with torch.no_grad():
            return self.model(self.clean, use_cache=False).logits

    def row(
        self, what: str, work: Callable[[], Any], loop: Callable[[Any], float], seconds: float | None = None
    ) -> dict[str, Any]:
        """The cost of `work`, beside a loop of `loop(result)` forwards (which took `seconds`, if it was run)."""
        multiply_adds, mine, result = measured(work)
        forwards = loop(result)
        theirs = forwards * self.seconds if seconds is None else seconds
        return {
            "what": what, "forwards": multiply_adds / self.multiply_adds, "in_forwards": mine / self.seconds,
            "seconds": mine, "loop_forwards": forwards, "loop_seconds": theirs, "loop_run": seconds is not None,
            "times_faster": theirs / mine,
        }  # fmt: skip


def measured(work: Callable[[], Any]) -> tuple[int, float, Any]:
    """Multiply-adds with matrices, counted in a first run, and CPU seconds of a second."""
    with FlopCounterMode(display=False) as counter:
        work()
    began = time.process_time()
    found = work()
    return counter.get_total_flops() // 2, time.process_time() - began, found


def paths(forward: Forward) -> list[dict[str, Any]]:
    """Path patching of every head to the logits, and to the heads of one later layer by their values."""
    model, data, metric = forward.model, (forward.clean, forward.corrupt), logit_diff(forward.answers)
    layer = 2 * forward.anatomy.n_layers // 3
    found = []
    for what, receivers in (("heads to logits", "logits"), (f"heads to the values of layer {layer}", [f"v.{layer}"])):
        for position, where in ((-1, "last token"), (None, "all tokens")):
            if receivers != "logits" and position is not None:
                continue

            def work(receivers: Any = receivers, position: Any = position) -> Any:
                return path_patch(model, *data, metric, receivers=receivers, position=position)

            name = f"path patching, {what}, {where}"
            found.append(forward.row(name, work, lambda result: result.meta["cost"]["loop"]))
    return found


def edges(forward: Forward) -> list[dict[str, Any]]:
    """EAP and EAP-IG over inputs; the loop patches one edge at a time."""
    metric, found = logit_diff(forward.answers), []
    for method in ("eap", "eap-ig-inputs"):

        def work(method: str = method) -> Any:
            return eap(forward.model, forward.clean, forward.corrupt, metric, method=method, steps=STEPS)

        name = "EAP, all edges" if method == "eap" else f"EAP-IG, {STEPS} steps, all edges"
        found.append(forward.row(name, work, lambda scores: scores.graph.n_edges + 1))
    return found


def masks(forward: Forward) -> list[dict[str, Any]]:
    """A mask of all heads at the last token, learned by `learn_mask` and by a plain loop: the same mask."""
    model, target = forward.model, forward.answers[:, 0]
    swapped = Desideratum("swapped", forward.clean, forward.corrupt, target)

    def ours() -> Mask:
        return learn_mask(model, swapped, validation=swapped, epochs=EPOCHS, batch_size=len(target), check=EPOCHS)

    multiply_adds, seconds, by_loop = measured(lambda: plain_mask(forward, target))
    learned: list[Mask] = []

    def loop(mask: Mask) -> float:
        learned.append(mask)
        return multiply_adds / forward.multiply_adds

    row = forward.row(f"DCM, {EPOCHS} steps, heads at the last token", ours, loop, seconds)
    row["apart"] = _apart(learned[0].history["loss"].values.ravel(), by_loop)
    return [row]


def plain_mask(forward: Forward, target: Tensor, lr: float = 0.1, l1: float = 0.01) -> list[float]:
    """The loop of the authors: forwards of both prompts a step, whole, and the masked heads mixed by hooks.

    Returns the loss of every step; at the end the rounded mask is tried once, as ours is.
    """
    model, layers = forward.model, range(forward.anatomy.n_layers)
    mask = torch.ones(forward.anatomy.n_layers, forward.anatomy.n_heads, requires_grad=True)
    optimizer, losses = torch.optim.Adam([mask], lr=lr), []

    def logits(w: Tensor) -> Tensor:
        with torch.no_grad():
            _, other = run(model, forward.corrupt, ["z"])

        def mixed(layer: int) -> Callable[[Tensor], Tensor]:
            def change(z: Tensor) -> Tensor:
                share = w[layer][:, None]
                new = share * z[:, -1] + (1 - share) * other[f"z.{layer}"][:, -1]
                return torch.cat([z[:, :-1], new[:, None]], 1)

            return change

        with edit(model, {f"z.{layer}": mixed(layer) for layer in layers}):
            return model(forward.clean, use_cache=False).logits[:, -1]

    for _ in range(EPOCHS):
        with torch.no_grad():
            mask.clamp_(0, 1)
        optimizer.zero_grad()
        loss = l1 * (1 - mask).sum() - logits(mask).gather(1, target[:, None]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        logits(mask.clamp(0, 1).round())
    return losses


def _apart(ours: Any, theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours.tolist(), theirs, strict=True))
