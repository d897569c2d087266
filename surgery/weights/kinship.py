"""Do the models of a merge stem from one initialisation? A look at a few rows of a few matrices, before the work.

Differences between models that were never one mean nothing, and no result tells. `ancestry.py` measures the whole;
this costs some milliseconds whatever the size.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

from surgery.weights.ancestry import MAX_RATIO, MIN_COSINE
from surgery.weights.plan import Part, Plan

if TYPE_CHECKING:
    from torch import Tensor

MATRICES, NUMBERS = 16, 1 << 14
"""How many matrices are looked at, and how many numbers in the middle of each."""


def strangers(ready: Plan) -> list[str]:
    """A warning for every input that is far from the base, or from the first input where there is no base."""
    jobs = [job for job in ready.jobs if job.merge and len(job.parts) > 1 and len(job.out.shape) > 1 and job.out.numel]
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for job in jobs[:: math.ceil(len(jobs) / MATRICES) or 1]:
        rows = min(job.out.rows, max(1, NUMBERS // job.out.cols))
        start = (job.out.rows - rows) // 2

        def read(part: Part, start: int = start, stop: int = start + rows) -> Tensor:
            return ready.sources[part.source].read(part.name, start, stop).flatten().double()

        lead, *others = job.parts
        ours = read(lead)
        for part in others:
            if part.source != lead.source and (distance := _distance(ours, read(part))) is not None:
                found.setdefault((lead.source, part.source), []).append(distance)
    warnings = []
    for (lead_number, number), distances in found.items():
        ratio, cosine = (median(column) for column in zip(*distances, strict=True))
        if ratio > MAX_RATIO or cosine < MIN_COSINE:
            what = "the base " if ready.recipe.base is not None else ""
            warnings.append(
                f"{ready.refs[number]} and {what}{ready.refs[lead_number]} hardly stem from one model: in a sample of "
                f"the weights their distance is {ratio:.2g} of the norm (median), their cosine {cosine:.2g}. "
                f"Such a merge seldom works. {'Is it the right base?' if what else 'Are they the right models?'}"
            )
    return warnings


def _distance(a: Tensor, b: Tensor) -> tuple[float, float] | None:
    """||b - a|| / ||a|| and the cosine; None for zeros, and for NaN and infinity, which the merge will find."""
    aa, bb, ab = float(a.dot(a)), float(b.dot(b)), float(a.dot(b))
    if not (math.isfinite(aa + bb) and aa and bb):
        return None
    return float((b - a).norm()) / math.sqrt(aa), ab / math.sqrt(aa * bb)
