"""Pictures of dictionaries; curves of their training are those of any run (surgery/training/curves.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = -6.0
"""log10 of the share that stands for none."""


def densities(density: Mapping[str, Tensor]) -> Figure:
    """How often latents are used: histograms of log10 of the share of rows, one dictionary above the other."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 1.5 * len(density) + 0.9), layout="constrained")
    axes = figure.subplots(len(density), 1, sharex=True, squeeze=False)[:, 0]
    edges = np.linspace(LEAST, 0, 49)
    for axis, (name, shares) in zip(axes, density.items(), strict=True):
        used = shares[shares > 0].double().log10().clamp(min=LEAST).cpu().numpy()
        axis.hist(used, bins=edges, color="0.75", edgecolor="black", linewidth=0.4)
        axis.set_title(f"{name}: {len(used):,} of {len(shares):,} latents used", fontsize="small", loc="left")
        axis.set_ylabel("latents", fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize="x-small")
    axes[-1].set_xlabel("log10 of the share of rows that use a latent", fontsize="small")
    return figure
