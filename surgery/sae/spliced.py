"""What a model loses when a dictionary's reconstructions stand in for its activations: CE and KL recovered.

    CE recovered = (CE_ablated - CE_dictionary) / (CE_ablated - CE)      KL recovered = 1 - KL_dictionary / KL_ablated

The ablation is part of the number: with zeros in place of the activations the loss is far higher than with their mean,
and so is what counts as recovered. Both are given. Tokens that do not count (the first, padding, sinks by the stream's
`longest`) are left as they are, and predictions at them are not looked at.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.activations import edit
from surgery.activations.interventions import unwrapped
from surgery.errors import SurgeryError
from surgery.models import Batch, as_batch, untouched
from surgery.sae.activations import Rows, Stream, without_sinks
from surgery.sae.dictionary import Dictionary

ABLATIONS = ("zero", "mean")


@dataclass(frozen=True)
class Loss:
    """Of one model, over the tokens that count; nats a token."""

    ablation: str
    """What stands in for the activations in the worst case: "zero" or "mean"."""
    tokens: int
    ce: float
    """Of the model as it is."""
    ce_dictionary: float
    ce_ablated: float
    kl_dictionary: float
    """Of the spliced model's predictions from the model's."""
    kl_ablated: float

    @property
    def ce_recovered(self) -> float:
        """1: nothing is lost; 0: as bad as the ablation. NaN where the ablation loses nothing."""
        lost = self.ce_ablated - self.ce
        return (self.ce_ablated - self.ce_dictionary) / lost if lost else math.nan

    @property
    def kl_recovered(self) -> float:
        """The same of KL, which is 0 for the model itself."""
        return 1 - self.kl_dictionary / self.kl_ablated if self.kl_ablated else math.nan

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        return vars(self) | {"ce_recovered": self.ce_recovered, "kl_recovered": self.kl_recovered}


def loss_recovered(
    stream: Stream,
    dictionary: Dictionary,
    site: str | None = None,
    target: str | None = None,
    *,
    ablation: str = "zero",
) -> list[Loss]:
    """One `Loss` for each model of `stream`, whose `site` the dictionary reads, and whose `target` it gives.

    A difference dictionary's output is added to the first model's activations and stands in the second model: there is
    one `Loss`, of that one. `ablation="mean"` takes the mean of what is rebuilt over the stream's tokens, which is read
    twice then. Raises `SurgeryError` for streams without a prediction to score.
    """
    return losses_recovered(stream, {"": dictionary}, site, target, ablations=(ablation,))[""][ablation]


def losses_recovered(
    stream: Stream,
    dictionaries: Mapping[str, Dictionary],
    site: str | None = None,
    target: str | None = None,
    *,
    ablations: Sequence[str] | str = ABLATIONS,
) -> dict[str, dict[str, list[Loss]]]:
    """The same of several dictionaries at one place, by name and ablation.

    However many they are, a model is run once as it is and once for each ablation; each dictionary adds its own pass.
    """
    site = site or stream.names[0]
    target = target or site
    ablations = (ablations,) if isinstance(ablations, str) else ablations
    for ablation in ablations:
        if ablation not in ABLATIONS:
            raise SurgeryError(f"There is no ablation '{ablation}'.", hint="zero, or mean.")
    sites = list(dict.fromkeys([site, target]))
    mean = _mean(stream, sites, target) if "mean" in ablations else []
    sums = {which: _Sums() for which in ([1] if stream.difference else range(len(stream.models)))}
    for batch, kept, rows in _read(stream, sites):
        scored = kept & _followed(batch)
        if not bool(scored.any()):
            continue
        with torch.no_grad():
            parts = {name: _parts(stream, each, rows[site], rows[target]) for name, each in dictionaries.items()}
        for which, own in sums.items():
            there = rows[target].chunk(len(stream.models), dim=1)[which]
            stand_ins = {("dictionary", name): outputs[which] for name, outputs in parts.items()}
            for how in ablations:
                stand_ins["ablation", how] = mean[which].expand_as(there) if how == "mean" else torch.zeros_like(there)
            own.add(stream.models[which], target, batch, kept, scored, stand_ins)
    if not all(own.tokens for own in sums.values()):
        raise SurgeryError("No token that counts is followed by another: there is no prediction to score.")
    return {name: {how: [own.loss(name, how) for own in sums.values()] for how in ablations} for name in dictionaries}


def _parts(stream: Stream, dictionary: Dictionary, x: Tensor, y: Tensor) -> dict[int, Tensor]:
    """By model, what stands in for its rows. `x` and `y` hold the models side by side."""
    many = len(stream.models)
    if stream.difference:
        base, tuned = x.chunk(2, dim=1)
        return {1: y.chunk(2, dim=1)[0] + dictionary(tuned - base)}
    output = dictionary(x)
    return dict(enumerate(output.chunk(many, dim=1)))


def _read(stream: Stream, sites: list[str]) -> Iterator[tuple[Batch, Tensor, Rows]]:
    """Every batch, which of its tokens count, and their rows of all models side by side: of a difference too."""
    longest = stream.longest
    wanted = Stream(stream.models, sites, [], stream.keep, longest=0.0 if stream.difference else longest)
    for number, thing in enumerate(stream.batches):
        batch = as_batch(thing, stream.tokenizer)
        kept, rows = wanted.seen(batch, number)
        if stream.difference and longest and bool(kept.any()):  # sinks are those of what the dictionary reads
            apart = {name: tuned - base for name, both in rows.items() for base, tuned in [both.chunk(2, dim=1)]}
            near, _ = without_sinks(kept, apart, longest)
            kept, rows = near, {name: both[near[kept].to(both.device)] for name, both in rows.items()}
        yield batch, kept, rows


def _mean(stream: Stream, sites: list[str], target: str) -> list[Tensor]:
    """Of each model, the mean of the target's rows."""
    total: Tensor | None = None
    count = 0
    for _, _, rows in _read(stream, sites):
        added = rows[target].double().sum(0)
        total, count = added if total is None else total + added, count + len(rows[target])
    if total is None or not count:
        raise SurgeryError("There are no activations to take the mean of.")
    return [part.float() for part in (total / count).chunk(len(stream.models))]


def _followed(batch: Batch) -> Tensor:
    """(batch, pos) whether the next token is real."""
    found = torch.zeros_like(batch.mask)
    found[:, :-1] = batch.mask[:, 1:]
    return found


class _Sums:
    """Sums over batches of one model, by what stands in: ("dictionary", name) or ("ablation", name)."""

    def __init__(self) -> None:
        self.tokens, self.clean = 0, 0.0
        self.ce: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.kl: defaultdict[tuple[str, str], float] = defaultdict(float)

    @torch.no_grad()
    def add(
        self, model: Any, target: str, batch: Batch, kept: Tensor, scored: Tensor,
        stand_ins: Mapping[tuple[str, str], Tensor],
    ) -> None:  # fmt: skip
        """The model as it is, then with each of the stand-ins in the places of `kept`."""
        model = unwrapped(model)
        right = batch.ids.roll(-1, 1)[scored].cpu()[:, None]

        def log_probs(stand_in: Tensor | None = None) -> Tensor:
            def put(values: Tensor) -> Tensor:
                changed = values.clone()
                assert stand_in is not None
                changed[kept.to(values.device)] = stand_in.view(-1, *values.shape[2:]).to(values)
                return changed

            with untouched(model), edit(model, {} if stand_in is None else {target: put}):
                logits = model(**batch.inputs(model), use_cache=False).logits
            return logits[scored.to(logits.device)].float().log_softmax(-1).cpu()

        clean = log_probs()
        self.tokens += len(right)
        self.clean -= float(clean.gather(1, right).double().sum())
        for key, stand_in in stand_ins.items():
            found = log_probs(stand_in)
            self.ce[key] -= float(found.gather(1, right).double().sum())
            self.kl[key] += float((clean.exp() * (clean - found)).double().sum())

    def loss(self, name: str, ablation: str) -> Loss:
        """The means."""
        both, n = (("dictionary", name), ("ablation", ablation)), self.tokens
        ce, kl = ([sums[key] / n for key in both] for sums in (self.ce, self.kl))
        return Loss(ablation, n, self.clean / n, *ce, *kl)
