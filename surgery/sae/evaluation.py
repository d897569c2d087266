"""A dictionary on held-out text: what it rebuilds (metrics.py), and what the models lose with it (spliced.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from surgery.sae.activations import Stream
from surgery.sae.dictionary import Dictionary
from surgery.sae.metrics import Quality, measure
from surgery.sae.spliced import Loss, loss_recovered
from surgery.sae.text import counted

ABLATIONS = ("zero", "mean")


@dataclass(frozen=True, eq=False)
class Measured:
    """A dictionary on held-out text: what it rebuilds, and what the model loses with it."""

    quality: Quality
    losses: dict[str, list[Loss]]
    """By ablation, one of each model that it stands in."""

    def to_dict(self) -> dict[str, Any]:
        """The numbers, without the density of each latent."""
        return self.quality.to_dict() | {
            f"with {ablation} ablation": [loss.to_dict() for loss in losses] for ablation, losses in self.losses.items()
        }


def measured(
    dictionary: Dictionary,
    models: list[Any],
    batches: list[Any],
    site: str,
    target: str | None = None,
    *,
    difference: bool = False,
    loss: bool = True,
    tokenizer: Any = None,
    keep: Any = counted,
    longest: float = 0.0,
) -> Measured:
    """A dictionary on text: `measure`, and with `loss` what each model loses, by both ablations."""
    sites = list(dict.fromkeys([site, target or site]))
    rows = list(Stream(models, sites, batches, keep, tokenizer, difference, longest))
    targets = None if target is None else [each[target] for each in rows]
    quality = measure(dictionary, [each[site] for each in rows], targets)
    losses = {}
    if loss:
        both = Stream(models, sites, batches, keep, tokenizer, difference, longest)
        losses = {how: loss_recovered(both, dictionary, site, target, ablation=how) for how in ABLATIONS}
    return Measured(quality, losses)


def plain(value: Any) -> Any:
    """As JSON: numbers that are none are null."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
