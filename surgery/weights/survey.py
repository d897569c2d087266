"""One threshold for a whole model: the magnitudes of all tensors ranked together, in streamed passes.

TIES as its authors wrote it trims the flattened model. The histograms of `selection.py` add up over tensors, so the
global rank costs two passes and 1 MB; a third one counts the elements equal to the threshold in every tensor, which
share out the quota in the order of the tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.weights.plan import Job
from surgery.weights.selection import HIGH, Cut, Low, count_high, count_low, cut, locate
from surgery.weights.sparsify import kept
from surgery.weights.streams import Streams, Workspace, in_parallel

Open = Callable[[Job, Workspace], Streams]


def model_cuts(jobs: Sequence[Job], open_streams: Open, *, threads: int, device: str = "cpu") -> dict[str, list[Cut]]:
    """Per output tensor the cuts of every input, of one threshold over the whole model for each input.

    Raises `SurgeryError` when the density or the number of inputs differ from tensor to tensor.
    """
    jobs = [job for job in jobs if job.merge]
    settings = {(len(job.inputs), str(job.parameters.get("density", 0.2)), job.parameters.get("ties")) for job in jobs}
    if len(settings) > 1:
        raise SurgeryError("scope: model needs one density for the whole model.", hint="Use scope: tensor.")
    inputs, ties = len(jobs[0].inputs), jobs[0].parameters.get("ties", "index")
    if ties == "random":
        raise SurgeryError("ties: random is not defined for scope: model.", hint="Use index, all or none.")
    density = jobs[0].parameters.get("density", 0.2)
    densities = density if isinstance(density, list) else [density] * inputs
    lock = threading.Lock()

    def walk(job: Job, work: Workspace) -> Iterator[list[Tensor]]:
        streams = open_streams(job, work)
        return (streams.deltas(start, stop)[1] for start, stop in streams.chunks())

    high = [np.zeros(HIGH, np.int64) for _ in range(inputs)]

    def first(job: Job, work: Workspace) -> None:
        mine = [np.zeros(HIGH, np.int64) for _ in range(inputs)]
        for chunk in walk(job, work):
            count_high(chunk, mine, work)
        with lock:
            for total, part in zip(high, mine, strict=True):
                total += part

    in_parallel(jobs, first, threads=threads, device=device)
    numel = sum(job.out.numel for job in jobs)
    places = [locate(h, kept(p, numel)) for h, p in zip(high, densities, strict=True)]
    lows = [Low(place) for place in places]

    def second(job: Job, work: Workspace) -> None:
        mine = [[Low(place)] for place in places]
        for chunk in walk(job, work):
            count_low(chunk, mine, work)
        with lock:
            for low, [part] in zip(lows, mine, strict=True):
                low.merge(part)

    in_parallel(jobs, second, threads=threads, device=device)
    whole = [cut(low, ties) for low in lows]
    equal: dict[str, list[int]] = {}

    def third(job: Job, work: Workspace) -> None:
        counts = [0] * inputs
        for chunk in walk(job, work):
            for i, (d, c) in enumerate(zip(chunk, whole, strict=True)):
                counts[i] += int(torch.count_nonzero(d.abs() == c.threshold))
        equal[job.out.name] = counts

    in_parallel(jobs, third, threads=threads, device=device)
    left = [c.quota for c in whole]
    shares: dict[str, list[Cut]] = {}
    for job in jobs:
        shares[job.out.name] = []
        for i, c in enumerate(whole):
            share = min(left[i], equal[job.out.name][i])
            left[i] -= share
            shares[job.out.name].append(replace(c, quota=share, equal=equal[job.out.name][i]))
    return shares
