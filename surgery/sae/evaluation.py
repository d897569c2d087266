"""Dictionaries on held-out text: what they rebuild (metrics.py), and what the models lose with them (spliced.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.sae.activations import Stream
from surgery.sae.dictionary import Dictionary
from surgery.sae.metrics import Quality, measure
from surgery.sae.spliced import Loss, losses_recovered
from surgery.sae.text import counted


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
    dictionaries: Mapping[str, Dictionary],
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
) -> dict[str, Measured]:
    """Dictionaries of one place on text, by name: `measure`, and with `loss` what each model loses, by both ablations.

    The models read the text for all of them together (`losses_recovered`).
    """
    sites = list(dict.fromkeys([site, target or site]))
    stream = Stream(models, sites, batches, keep, tokenizer, difference, longest)
    rows = list(stream)
    targets = None if target is None else [each[target] for each in rows]
    quality = {name: measure(one, [each[site] for each in rows], targets) for name, one in dictionaries.items()}
    losses = losses_recovered(stream, dictionaries, site, target) if loss else {name: {} for name in dictionaries}
    return {name: Measured(quality[name], losses[name]) for name in dictionaries}


def plain(value: Any) -> Any:
    """As JSON: numbers that are none are null."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
