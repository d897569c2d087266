"""Which latents of a crosscoder fine-tuning made, lost or shared, and whether that is so or only looks so.

A crosscoder of (base, tuned) writes each latent j into both models, by D_j^base and D_j^tuned. Their norms say whose it
is: 0 the base's alone, 1/2 both's, 1 the tuned model's alone. Under an L1 penalty a norm may be 0 though the model has
the direction (complete shrinkage), or has it by other latents (decoupling); latent scaling tells (arXiv:2504.02922):

    beta_j(y) = argmin_b sum_i || y_i - b f_ij d_j ||^2 = sum_i f_ij <y_i, d_j> / (|| d_j ||^2 sum_i f_ij^2)
    nu_j = beta_j(y of the base) / beta_j(y of the tuned model),     d_j = D_j^tuned

with y what the dictionary leaves unexplained (the tuned model's own f_ij d_j put back: high nu is shrinkage), and y the
reconstruction (high nu is decoupling). Of a latent that is the tuned model's alone both are about 0. Everything is
summed at the codes alone: memory is a few numbers a latent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.sae.dictionary import Dictionary

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

EDGES = (0.1, 0.4, 0.6, 0.9)
"""Below the first a latent is the base's alone, between the middle ones shared, above the last the tuned model's."""
KINDS = ("base only", "mostly base", "shared", "mostly tuned", "tuned only")


def _parts(dictionary: Dictionary) -> tuple[Tensor, Tensor]:
    """(latents, d) decoder rows of base and tuned model."""
    if dictionary.models != 2:
        raise SurgeryError(f"Differences are of a crosscoder of two models, and this one has {dictionary.models}.",
                           hint="Dictionary(..., models=2) on a Stream of [base, tuned].")  # fmt: skip
    base, tuned = dictionary.decoder.detach().chunk(2, dim=1)
    return base.contiguous(), tuned.contiguous()


def relative_norms(dictionary: Dictionary) -> Tensor:
    """(latents,) 1/2 (1 + (|D^tuned| - |D^base|) / max): 0 base only, 1/2 shared, 1 tuned only; NaN of no decoder."""
    base, tuned = (rows.norm(dim=1) for rows in _parts(dictionary))
    return 0.5 * (1 + (tuned - base) / torch.maximum(tuned, base))


@dataclass(frozen=True, eq=False)
class Scaling:
    """What `latent_scaling` finds, (latents,) each; NaN for a latent that no row uses."""

    norm: Tensor
    """`relative_norms`."""
    rows: Tensor
    """How many rows use it."""
    error: Tensor
    """nu of what is left unexplained: high is shrinkage."""
    reconstruction: Tensor
    """nu of the reconstruction: high is decoupling."""
    cosine: Tensor
    """Between its two decoder rows; NaN where one is 0."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row a latent, with its kind by norm (`KINDS`)."""
        import pandas as pd

        columns = {name: value.double().numpy() for name, value in vars(self).items()}
        kinds = np.digitize(columns["norm"], EDGES)
        told = [KINDS[k] if np.isfinite(n) else "" for k, n in zip(kinds, columns["norm"], strict=True)]
        return pd.DataFrame(columns | {"kind": told}).rename_axis("latent").astype({"rows": int})

    def tuned_only(self, at_most: float = 0.2) -> Tensor:
        """Numbers of the latents that are the tuned model's alone by their norm and by both nu."""
        found = (self.norm > EDGES[-1]) & (self.error.abs() <= at_most) & (self.reconstruction.abs() <= at_most)
        return found.nonzero().view(-1)

    def plot(self) -> Figure:
        """Relative norms of all latents (left), and both nu of those that lean to the tuned model (right)."""
        from analysis.style import blank

        figure, (left, right) = blank(9, 3.8, "", columns=2)
        used = (self.rows > 0) & self.norm.isfinite()
        left.hist(self.norm[used].numpy(), bins=np.linspace(0, 1, 41), color="0.7", edgecolor="black", linewidth=0.4)
        left.set(xlabel="relative norm: 0 base only, 1 tuned only", ylabel="latents", yscale="log")
        for edge in EDGES:
            left.axvline(edge, color="black", linestyle=":", linewidth=0.8)
        mostly = used & (self.norm > EDGES[2]) & (self.norm <= EDGES[3])
        only = used & (self.norm > EDGES[3])
        for here, name, marker, face in ((mostly, KINDS[3], "o", "white"), (only, KINDS[4], "D", "black")):
            points = self.error[here].numpy(), self.reconstruction[here].numpy()
            right.scatter(*points, s=18, marker=marker, facecolor=face, edgecolor="black", linewidth=0.7,
                          label=f"{name} ({int(here.sum())})")  # fmt: skip
        for line in (right.axhline, right.axvline):
            line(0, color="0.8", zorder=0)
        right.set(xlabel="nu of what is left (high: shrinkage)", ylabel="nu of the reconstruction\n(high: decoupling)")
        right.locator_params(nbins=5)
        if not bool((mostly | only).any()):
            right.set(xlim=(-0.1, 1.1), ylim=(-0.1, 1.1))
            right.text(0.5, 0.5, "no latent leans to the tuned model", ha="center", color="0.3")
        right.legend(frameon=False, fontsize="small", title="by norm", title_fontsize="small")
        return figure


@torch.no_grad()
def latent_scaling(dictionary: Dictionary, batches: Iterable[Tensor]) -> Scaling:
    """One pass over `batches` of rows (n, 2 d), base and tuned side by side; sums in float64.

    Raises `SurgeryError` for a dictionary that is no crosscoder of two models, and without rows.
    """
    base, tuned = _parts(dictionary)
    squares = torch.zeros(dictionary.latents, dtype=torch.float64, device=base.device)
    rows = torch.zeros(dictionary.latents, dtype=torch.long, device=base.device)
    sums = {(model, kind): squares.clone() for model in (0, 1) for kind in ("error", "reconstruction")}
    for x in batches:
        codes = dictionary.codes(x)
        values, layout = codes.values.double(), codes.layout
        output = dictionary.from_codes(codes, x)
        squares.index_add_(0, layout.index, values.square())
        rows += layout.fired
        for model in (0, 1):
            made, seen = (t.chunk(2, dim=1)[model].contiguous() for t in (output, x))
            for kind, y in (("error", seen - made), ("reconstruction", made)):
                sums[model, kind].index_add_(0, layout.index, values * layout.products(y, tuned).double())
    if not int(rows.sum()):
        raise SurgeryError("No latent is used by these activations, or there are none.")
    length = tuned.double().square().sum(1)
    beta = {key: total / (squares * length) for key, total in sums.items()}  # 0 / 0 is NaN: never used
    error = beta[0, "error"] / (beta[1, "error"] + 1)  # with the tuned model's own part put back
    cosine = torch.nn.functional.cosine_similarity(base, tuned, dim=1, eps=0.0)
    found = (relative_norms(dictionary), rows, error, beta[0, "reconstruction"] / beta[1, "reconstruction"], cosine)
    return Scaling(*(each.cpu() for each in found))
