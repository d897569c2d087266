"""Path patching: what does a head tell a later head, or the logits, directly?

    path_patch(model, clean, corrupt, prob(answers), tokenizer=tokenizer)          # every head to the logits
    path_patch(model, clean, corrupt, metric, receivers=["q.9.6", "q.10.0"])       # to two heads by their queries
    path_patch(model, clean, corrupt, metric, receivers=["v.8"], position=-3)      # from the third last token

Three passes a sender (Wang et al. 2022, arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969):

1. z of all heads in both runs;
2. the base run with every head's z frozen, the sender's set to that of the other run: what the receivers read (q, k or
   v) is recorded. MLPs and norms compute anew, so that a direct path may lead through MLPs but through no other head;
   with `through_mlps=False` MLPs are frozen too, and the path is the edge alone;
3. the base run with the receivers' recorded q, k or v written in. The metric of this run is the answer. The logits
   as a receiver need no third pass.

Noising: the clean run is the base, and the sender says what it says in the corrupt run; denoising: the other way round.

Passes of the second kind have no attention: tokens do not interact, and a sender at one position costs the MLPs above
it one token. The third is the recorded base run, taken up at the first receiver and the first position that is written
to. Exact: equal to three whole forwards a sender within 1e-6 of the logits' scale. `meta["cost"]` has the price in
forwards (multiplications with weights over those of one forward of all prompts) beside that of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from analysis.metrics import Metric, as_metric
from analysis.paths.branches import Cost, measured, sizes, unchanged
from analysis.paths.ends import Places, places_of, receivers_of, senders_of
from analysis.paths.passes import Frozen, Sender, readings, received, to_logits
from analysis.positions import Position
from analysis.results import Result
from surgery.activations.interventions import unwrapped
from surgery.activations.passes import run
from surgery.activations.recording import Recording, record
from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, as_batch, untouched

Direction = Literal["denoising", "noising"]
Progress = Callable[[int, int], None]
"""Called with (cells done, cells in all): a cell is one sender in one example."""
BUDGET = 1 << 30
"""Bytes that the passes may take beside the model."""


def path_patch(
    model: Any,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    receivers: str | Sequence[str | Site] = "logits",
    senders: str | Sequence[str | Site] = "z",
    position: Position | None = -1,
    source_position: Position | None = None,
    receiver_position: Position | None = None,
    through_mlps: bool = True,
    direction: Direction = "noising",
    tokenizer: Any = None,
    budget: int = BUDGET,
    progress: Progress | None = None,
) -> Result:
    """The effect of every sender through the receivers together, (example, layer, head).

    `receivers` are "logits", or heads by what they read: "q.9.6", "k.5.1" (a key-value head), "v.8" (all heads of a
    layer). `senders` are all heads, or those of a list of z sites; then axes are (example, sender). Senders speak at
    `position`: a number (-1 the last token), one number an example, a function of the batch, or None for all tokens
    at once. In the other run they are heard at the same position, or at `source_position` where that is elsewhere.
    What receivers read is written in at all tokens, or only at `receiver_position`, in the third pass.

    Values are effects: the metric with the path patched minus that of the base run. A sender that comes after all
    receivers has none. Columns `clean`, `corrupt` and `span` hold the metric of both runs and its difference.
    Raises `SurgeryError` for unpaired prompts, unequal lengths where positions need to correspond, a head or position
    out of range, and when nothing that is sent can arrive.
    """
    if direction not in ("denoising", "noising"):
        raise SurgeryError(f"direction={direction!r}: expected 'denoising' or 'noising'.")
    model = unwrapped(model)
    anatomy = anatomy_of(model)
    good = as_batch(clean, tokenizer).to(model.device).right_padded()
    bad = as_batch(corrupt, tokenizer).to(model.device).right_padded()
    if len(good) != len(bad):
        raise SurgeryError(f"There are {len(good)} clean prompts and {len(bad)} corrupt ones: they come in pairs.")
    base, source = (good, bad) if direction == "noising" else (bad, good)
    metric = as_metric(metric).to(model.device)
    metric.check(len(base))
    to = receivers_of(receivers, anatomy)
    heads = senders_of(senders, anatomy)
    below = anatomy.n_layers if to is None else max(site.layer or 0 for site in to)
    live = sorted((sender for sender in heads if sender[0] < below), key=lambda sender: sender[0])
    if not live:
        raise SurgeryError(f"No sender comes before the receivers: they are in layer {below} at most, and senders in "
                           f"layer {min(heads)[0]} or later.", hint="A head reaches later layers only.")  # fmt: skip
    places = places_of(base, source, position, source_position, receiver_position, to, metric.needs == "all")
    cost = Cost(anatomy, base.ids.numel())
    task = _Task(model, anatomy, metric, base, source, to, through_mlps, places, cost)
    with untouched(model):
        found, at_base, at_source = task.sweep(live, budget, progress)
    effects = found.new_zeros(len(base), len(heads))
    effects[:, [heads.index(sender) for sender in live]] = found - at_base[:, None]
    effects[~places.arrives.any(1)] = 0  # and not rounding
    clean_value, corrupt_value = (at_base, at_source) if direction == "noising" else (at_source, at_base)
    columns = {"clean": clean_value, "corrupt": corrupt_value, "span": clean_value - corrupt_value}
    axes: dict[str, Any] = {"example": list(range(len(base)))}
    if senders == "z":
        axes |= {"layer": list(range(anatomy.n_layers)), "head": list(range(anatomy.n_heads))}
        effects = effects.unflatten(1, (anatomy.n_layers, anatomy.n_heads))
    else:
        axes["sender"] = [f"z.{layer}.{head}" for layer, head in heads]
    meta = {
        "kind": "path patching", "direction": direction, "metric": metric.name, "model": anatomy.name, "centre": 0,
        "receivers": "logits" if to is None else [f"{site}.{head}" for site, many in to.items() for head in many],
        "position": position if isinstance(position, int | None) else "of each example", "through_mlps": through_mlps,
        "cost": {"forwards": round(cost.forwards(), 3), "loop": 2 + len(live) * (1 if to is None else 2)},
    }  # fmt: skip
    numbers = {name: column.tolist() for name, column in columns.items()}
    return Result(effects.double().cpu().numpy(), axes, f"effect on {metric.name}", numbers, meta)


@dataclass
class _Task:
    """The prompts and what is asked of them."""

    model: Any
    anatomy: Anatomy
    metric: Metric
    base: Batch
    source: Batch
    receivers: dict[Site, list[int]] | None
    through_mlps: bool
    places: Places
    cost: Cost

    def select(self, rows: slice) -> _Task:
        """The same of some of the examples."""
        return replace(self, metric=self.metric.select(rows), base=self.base.select(rows),
                       source=self.source.select(rows), places=self.places.select(rows))  # fmt: skip

    def sweep(self, senders: Sequence[Sender], budget: int, progress: Progress | None) -> tuple[Tensor, Tensor, Tensor]:
        """The metric of every sender (example, sender), of the base run and of the other (example,)."""
        anatomy, width = self.anatomy, self.base.ids.shape[1]
        behind = 0 if self.receivers is None else width - self.places.start
        longest, heads = max(width, self.source.ids.shape[1]), anatomy.n_heads * anatomy.d_head
        size, step = sizes(self.model, anatomy, len(self.base), longest, 2 * heads,
                           max(behind, self.places.columns.shape[1]), self.metric.needs == "all", budget)  # fmt: skip
        found, done = [], 0
        for begin in range(0, len(self.base), size):
            part = self.select(slice(begin, begin + size))
            recording, at_source, frozen = part.first()
            values = []
            for i in range(0, len(senders), step):
                values.append(part.second(frozen, senders[i : i + step]).T)
                done += values[-1].numel()
                if progress is not None:
                    progress(done, len(senders) * len(self.base))
            found.append((torch.cat(values, 1), unchanged(recording, part.metric), at_source))
        every, base, source = (torch.cat(parts) for parts in zip(*found, strict=True))
        return every, base, source

    def first(self) -> tuple[Recording, Tensor, Frozen]:
        """Both runs: the base recorded, the metric of the other, and what the heads say differently there."""
        layers = range(self.anatomy.n_layers)
        recording = record(self.model, self.base, [Site("z"), *(self.receivers or ())])
        every = self.metric.needs == "all"
        logits, seen = run(self.model, self.source, ["z", "final@-1"], stop=not every)
        value = (self.metric.of_logits(logits, self.source.last) if logits is not None
                 else self.metric.of_final(seen["final@-1"][None], self.anatomy)[0])  # fmt: skip
        self.cost.blocks(layers, self.base.ids.numel() + self.source.ids.numel())
        places, difference = self.places, {}
        rows = torch.arange(len(self.base), device=places.columns.device)[:, None]
        for layer in layers:
            other = seen[f"z.{layer}"][rows, places.heard] - recording.seen[f"z.{layer}"][rows, places.columns]
            difference[layer] = other * places.sent[..., None, None]
        return recording, value, Frozen(recording, places.columns, difference, self.through_mlps, self.cost)

    def second(self, frozen: Frozen, senders: Sequence[Sender]) -> Tensor:
        """The second and third pass, (senders, batch): the metric of each sender."""
        recording, columns, every = frozen.recording, self.places.columns, self.metric.needs == "all"
        self.cost.made += len(senders) * (self.base.ids.numel() if every else len(self.base)) * self.cost.head
        if self.receivers is None:
            rows = to_logits(frozen, senders)
            if every:  # the columns in the stream of all tokens
                stream = recording.stream[-1].repeat(len(senders), 1, 1)
                at = columns.repeat(len(senders), 1)
                stream[torch.arange(len(stream), device=at.device)[:, None], at] = rows
                return measured(recording, self.metric, stream, 0)
            return measured(recording, self.metric, rows[:, 0], 0)
        found = readings(frozen, senders, self.receivers)
        places, start = self.places, self.places.start
        rows = received(frozen, senders, found, places.arrives, start, held=places.held, whole=every)
        return measured(recording, self.metric, rows, start)
