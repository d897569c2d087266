"""Branches of a recorded pass: changes in several layers at once, each branch computed from its first change on.

`analysis.patching.cells` changes one place a cell; a branch changes many (what a receiver reads, the heads outside a
circuit), and what the lower ones do reaches the upper ones. Branches join the pass at their layer and run on together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analysis.metrics import Metric
from surgery.activations.interventions import detach
from surgery.activations.recording import Recording
from surgery.activations.resume import at_last, block, last_token, portions
from surgery.anatomy import Anatomy, Site
from surgery.anatomy.points import attach


class Cost:
    """Multiplications with weights, counted while they are made, in forwards over the same prompts.

    The weights of a mixture's experts count whole, scores and patterns not at all.
    """

    def __init__(self, anatomy: Anatomy, tokens: int) -> None:
        self.attention = [weights_of(anatomy.attention(layer)) for layer in range(anatomy.n_layers)]
        whole = [weights_of(block) for block in anatomy.blocks]
        self.mlp = [block - part for block, part in zip(whole, self.attention, strict=True)]
        self.head = anatomy.head.weight.numel()
        self.forward = tokens * (sum(whole) + self.head)
        self.made = 0

    def blocks(self, layers: range, tokens: int) -> None:
        """Whole blocks on so many tokens."""
        self.made += tokens * sum(self.attention[layer] + self.mlp[layer] for layer in layers)

    def forwards(self) -> float:
        return self.made / self.forward


def weights_of(module: Any) -> int:
    """Numbers in a module's matrices."""
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


@dataclass
class Part:
    """Which rows and columns the value of a site is of, while a block runs: rows are branch * batch + example."""

    branches: range
    columns: Tensor
    """(batch, count) the columns of the recorded pass, for each example."""


Change = Callable[[Tensor, Part], Tensor]
"""A site's value (rows, count, head, d_head) and what it is of -> the new value."""


def grown(
    recording: Recording,
    joining: Mapping[int, int],
    start: int,
    changes: Mapping[Site, Change],
    cost: Cost,
    *,
    whole: bool,
) -> Tensor:
    """What the last block hands on, (branches * batch, d_model) at the last token.

    `joining` says how many branches leave the recorded pass at each layer; they are numbered in the order of layers.
    Nothing changes before column `start`. `whole`: (branches * batch, pos - start, d_model), all tokens.
    """
    layers, width = recording.anatomy.n_layers, recording.batch.ids.shape[1]
    size, rows = len(recording.batch), recording.stream[0][:0, start:]
    every = torch.arange(start, width, device=rows.device).expand(size, -1)
    for layer in range(min(joining), layers):
        if joining.get(layer):
            cost.blocks(range(layer, layers), joining[layer] * every.numel())
            rows = torch.cat([rows, recording.stream[layer][:, start:].repeat(joining[layer], 1, 1)])
        now, found = Part(range(0), every), []
        ends = layer == layers - 1 and not whole
        with ExitStack() as stack:
            for site, change in changes.items():
                if site.layer == layer:
                    stack.callback(detach, attach(recording.anatomy, site, _bound(recording, change, now)))
            for some in portions(recording, rows):
                now.branches = range(now.branches.stop, now.branches.stop + len(some) // size)
                found.append((last_token if ends else block)(recording, layer, some, start))
        rows = torch.cat(found)
    return rows


def _bound(recording: Recording, change: Change, now: Part) -> Callable[[Tensor], Tensor]:
    def visit(value: Tensor) -> Tensor:
        if value.shape[1] == now.columns.shape[1]:
            return change(value, now)
        return change(value, Part(now.branches, recording.last[:, None]))  # the last block's query at the last token

    return visit


def measured(recording: Recording, metric: Metric, rows: Tensor, start: int) -> Tensor:
    """(branches, batch) the metric behind what the last block hands on.

    `rows` is (branches * batch, d_model) at the last token, or for metrics that need all logits
    (branches * batch, pos - start, d_model).
    """
    anatomy, size = recording.anatomy, len(recording.batch)
    final = anatomy.final_norm(rows).unflatten(0, (-1, size))
    if metric.needs != "all":
        return metric.of_final(final, anatomy)
    before = recording.logits()[:, :start]
    return torch.stack([metric.value(torch.cat([before, anatomy.logits(branch)], 1)) for branch in final])


def unchanged(recording: Recording, metric: Metric) -> Tensor:
    """(batch,) the metric of the recorded pass itself."""
    stream = recording.stream[-1]
    return measured(recording, metric, stream if metric.needs == "all" else at_last(recording, stream, 0), 0)[0]


def sizes(
    model: Any, anatomy: Anatomy, examples: int, width: int, kept: int, run: int, every: bool, budget: int
) -> tuple[int, int]:
    """Examples that are recorded at a time, and branches (of all of them) that run at a time, within a budget.

    `kept` numbers a token and layer are held beside the stream, keys and values; branches run `run` tokens each;
    `every`: logits of all tokens are needed, and not only of the last.
    """
    number, vocab = next(model.parameters()).element_size(), anatomy.head.weight.shape[0]
    held = anatomy.n_layers * width * (2 * anatomy.d_model + 2 * anatomy.n_kv_heads * anatomy.d_head + kept)
    held += vocab * width * every
    mlp = 4 * anatomy.d_model if anatomy.family.down is None else anatomy.d_mlp()
    row = run * (6 * anatomy.d_model + 2 * mlp + 4 * anatomy.n_heads * anatomy.d_head)
    row += vocab * (run if every else 1)
    size = max(1, min(examples, int(budget / 2 / (held * number))))
    return size, max(1, int(budget / 2 / (row * size * number)))
