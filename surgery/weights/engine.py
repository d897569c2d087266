"""Jobs carried out: their streams opened, merged by the method, rounded once, checked and handed on, on all cores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint.header import torch_dtype
from surgery.checkpoint.provenance import Checksum
from surgery.errors import SurgeryError
from surgery.weights.kernels import merged
from surgery.weights.methods import METHODS
from surgery.weights.plan import Job, Plan, job_bytes
from surgery.weights.rounding import round_to
from surgery.weights.sparsify import derive_key
from surgery.weights.streams import Streams, Workspace, in_parallel
from surgery.weights.survey import model_cuts

MEMORY = 2_000_000_000
"""Bytes of scratch that methods which need whole tensors may take together (one tensor may always)."""


class Engine:
    """Runs jobs: opens their streams, merges, rounds, reports, and hands rows to `emit(job, first row, rows)`."""

    def __init__(self, ready: Plan, *, device: str, rounding: str, emit: Callable[[Job, int, Tensor], None]) -> None:
        self.plan, self.device, self.rounding, self.emit = ready, device, rounding, emit
        self.method = METHODS.lookup(ready.recipe.method)
        self.selections: dict[str, Any] = {}
        self._budget = _Budget(MEMORY)

    def survey(self, threads: int) -> None:
        """Where a threshold is for the whole model, finds it: passes over all tensors before the first is merged."""
        if any(job.parameters.get("scope") == "model" for job in self.plan.jobs):
            self.selections = model_cuts(
                self.plan.jobs, lambda job, work: self._streams(job, work, {}), threads=threads, device=self.device
            )

    def run(self, jobs: list[Job], threads: int, finished: Callable[[Job, dict[str, Any]], None]) -> None:
        """All `jobs` on `threads` threads, largest first; `finished` gets each job's report."""

        def work(job: Job, workspace: Workspace) -> None:
            with self._budget.hold(job_bytes(self.method.name, job)):
                finished(job, self._merge(job, workspace) if job.merge else self._copy(job))

        in_parallel(sorted(jobs, key=lambda j: -j.out.nbytes), work, threads=threads, device=self.device)

    def _streams(self, job: Job, work: Workspace, sums: dict[int, Checksum]) -> Streams:
        def reader(part: Any) -> Callable[[int, int], Tensor]:
            source = self.plan.sources[part.source]
            return lambda start, stop: source.read(part.name, start, stop)

        def check(i: int, rows: Tensor) -> None:
            if i in sums:
                sums[i].update(rows)

        return Streams(
            job.out.name,
            job.out.shape,
            [reader(part) for part in job.inputs],
            reader(job.base) if job.base else None,
            work,
            labels=[str(self.plan.refs[part.source]) for part in job.parts],
            nonfinite=self.plan.recipe.nonfinite,
            check=check,
        )

    def _merge(self, job: Job, work: Workspace) -> dict[str, Any]:
        first = -1 if job.base else 0
        sums = {i: Checksum() for i in range(first, len(job.inputs))}
        streams = self._streams(job, work, sums)
        parameters = dict(job.parameters)
        recipe, dtype = self.plan.recipe, torch_dtype(job.out.dtype)
        if "keys" in self.method.hidden and (self.method.random or parameters.get("ties") == "random"):
            parameters["keys"] = [
                derive_key(recipe.seed, self.method.name, i, job.out.name) for i in range(len(job.inputs))
            ]
        if "depth" in self.method.hidden:
            parameters["depth"] = job.depth
        if job.out.name in self.selections:
            parameters["selections"] = self.selections[job.out.name]
        key = derive_key(recipe.seed, "round", job.out.name) if self.rounding == "stochastic" else None
        moved = lost = 0.0
        for start, rows in merged(self.method, streams, parameters, double=job.double):
            if key is None:
                stored = work.take("stored", rows.numel(), dtype).copy_(rows)
            else:
                stored = round_to(rows, dtype, key, start * job.out.cols)
            _check_range(stored, job)
            self.emit(job, start, stored)
            if job.base is not None:
                again = work.take("again", rows.numel(), rows.dtype)
                if dtype != rows.dtype:
                    lost += float(torch.linalg.vector_norm(again.copy_(stored).sub_(rows))) ** 2
                stop = start + (rows.numel() // job.out.cols if job.out.cols else job.out.rows)
                base = self.plan.sources[job.base.source].read(job.base.name, start, stop).reshape(-1)
                moved += float(torch.linalg.vector_norm(again.copy_(base).sub_(rows))) ** 2
        report: dict[str, Any] = {"checksums": [sums[i].hexdigest() for i in sorted(sums)]} | streams.report
        if streams.replaced:
            report["nonfinite_replaced"] = streams.replaced
        if job.base is not None:
            report["update"] = moved**0.5
            if moved > 0:
                report["rounding_loss"] = (lost / moved) ** 0.5
        return report

    def _copy(self, job: Job) -> dict[str, Any]:
        """Copies the tensor; where several inputs have it (whole numbers), they must agree in every bit."""
        dtype, step = torch_dtype(job.out.dtype), max(1, (1 << 22) // max(1, job.out.cols))
        lead, *others = job.parts
        checksum = Checksum()
        for start in range(0, job.out.rows if job.out.nbytes else 0, step):
            rows = self.plan.sources[lead.source].read(lead.name, start, start + step)
            checksum.update(rows)
            for part in others:
                if not torch.equal(rows, self.plan.sources[part.source].read(part.name, start, start + step)):
                    raise SurgeryError(
                        f"Tensor '{job.out.name}' holds whole numbers that differ between "
                        f"{self.plan.refs[lead.source]} and {self.plan.refs[part.source]}: they can't be averaged.",
                        hint="Leave it out of the merge (exclude: ...), so that the base's is copied.",
                    )
            stored = rows.to(dtype).reshape(-1)
            _check_range(stored, job)
            self.emit(job, start, stored)
        return {"copied": True, "checksums": [checksum.hexdigest()] * len(job.parts)}


def _check_range(stored: Tensor, job: Job) -> None:
    """Raises `SurgeryError` when numbers do not fit into float16, whose largest is 65,504."""
    if stored.dtype == torch.float16 and (beyond := int(stored.isinf().sum())):
        raise SurgeryError(
            f"Tensor '{job.out.name}': {beyond:,} values or more are too large for float16 (65,504 at most).",
            hint="Write bfloat16 or float32 (out_dtype).",
        )


class _Budget:
    """Lets workers in as long as their scratch fits; one is always let in."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.free = limit, 0, threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Within: `size` bytes are taken from the budget."""
        with self.free:
            self.free.wait_for(lambda: self.used == 0 or self.used + size <= self.limit)
            self.used += size
        try:
            yield
        finally:
            with self.free:
                self.used -= size
                self.free.notify_all()
