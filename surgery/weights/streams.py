"""One tensor of several inputs, walked through in chunks: the common ground of every fast pass over weights.

A chunk is a block of whole rows of about 512 K numbers: it stays in the processor's cache while every step of a merge
is done on it, in float32, in scratch memory that is taken once per worker. The physical limit of a merge is reading
the inputs and writing the output; everything here exists to come near it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from surgery.errors import SurgeryError

CHUNK = 1 << 19
"""Numbers in a chunk: 2 MB of float32. Half of it and twice of it were both some 6 % slower on two cores."""
SAMPLE, SAMPLE_PLACES = 1 << 16, 16
"""Numbers in a sample of a tensor, and the places that they are taken from."""

Reader = Callable[[int, int], Tensor]
"""Rows `start:stop` of one tensor of one input, in the storage type."""


class Workspace:
    """Scratch memory of one worker: named buffers, taken once and handed out again for every chunk."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._buffers: dict[tuple[Any, torch.dtype], Tensor] = {}
        self._host: dict[Any, np.ndarray] = {}

    def take(self, key: Any, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A flat buffer of `numel` numbers with undefined content, the same memory for the same `key`."""
        buffer = self._buffers.get((key, dtype))
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[key, dtype] = torch.empty(max(numel, 1024), dtype=dtype, device=self.device)
        return buffer[:numel]

    def host(self, key: Any, numel: int, dtype: Any = np.uint32) -> np.ndarray:
        """The same in the processor's memory, whatever the device: for what numpy does better."""
        if key not in self._host or len(self._host[key]) < numel:
            self._host[key] = np.empty(max(numel, 1024), dtype)
        return self._host[key][:numel]


class Streams:
    """One tensor of all inputs: `rows` rows of `cols` numbers, read chunk by chunk as float32.

    The first walk counts what is not finite: `nonfinite="error"` then raises with the tensor's name and the count,
    `"base"` puts the base's numbers there. `check` is called once with every chunk of every input in storage form
    (input number or -1 for the base, rows), for checksums.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        tuned: Sequence[Reader],
        base: Reader | None,
        work: Workspace,
        *,
        labels: Sequence[str] = (),
        nonfinite: Literal["error", "base"] = "error",
        check: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.name, self.shape, self.work = name, shape, work
        self.rows = shape[0] if shape else 1
        self.numel = 1
        for size in shape:
            self.numel *= size
        self.cols = self.numel // self.rows if self.rows else 0
        self.has_base, self.inputs = base is not None, len(tuned)
        self._readers = ([base] if base is not None else []) + list(tuned)
        self._labels = list(labels) or [f"input {i}" for i in range(len(self._readers))]
        self._nonfinite, self._check = nonfinite, check
        self._seen = 0  # rows already checked
        self.replaced = 0  # numbers that were not finite and were taken from the base
        self.report: dict[str, Any] = {}

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Row ranges that cover the tensor, in order; none when it is empty, whatever its rows."""
        if not self.numel:
            return
        step = max(1, CHUNK // max(1, self.cols))
        for start in range(0, self.rows, step):
            yield start, min(self.rows, start + step)

    def load(self, start: int, stop: int) -> list[Tensor]:
        """Rows `start:stop` of the base (if any) and of every tuned input: flat float32 scratch, free to be changed."""
        count = (stop - start) * self.cols
        loaded: list[Tensor] = []
        first = start >= self._seen
        for i, reader in enumerate(self._readers):
            rows = reader(start, stop)
            if first and self._check is not None:
                self._check(i - self.has_base, rows)
            numbers = self.work.take(("input", i), count)
            numbers.copy_(rows.reshape(-1))
            # A sum is cheap, and tells; later walks trust the first.
            if (first or self.replaced) and not math.isfinite(float(numbers.sum())):
                self._mend(i, numbers, loaded, first)
            loaded.append(numbers)
        if first:
            self._seen = stop
        return loaded

    def deltas(self, start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
        """The base's rows and every tuned input's difference from them, flat float32 scratch."""
        base, *tuned = self.load(start, stop)
        for numbers in tuned:
            numbers.sub_(base)
        return base, tuned

    def sample(self) -> list[Tensor] | None:
        """Some 64 K of every tuned input's differences, from all over the tensor; None when it is not much larger."""
        rows = max(1, SAMPLE // SAMPLE_PLACES // max(1, self.cols))
        if not self.has_base or self.rows * self.cols < 16 * SAMPLE or self.rows < 2 * rows * SAMPLE_PLACES:
            return None
        starts = [i * self.rows // SAMPLE_PLACES for i in range(SAMPLE_PLACES)]
        base, *tuned = (
            torch.cat([reader(start, start + rows).reshape(-1) for start in starts]).to(self.work.device, torch.float32)
            for reader in self._readers
        )
        return [torch.nan_to_num(numbers.sub_(base)) for numbers in tuned]

    def whole(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
        """All rows of every tuned input and of the base in `dtype`: for methods that need the tensor in one piece."""
        loaded: list[Tensor] = []
        for i, reader in enumerate(self._readers):
            rows = reader(0, self.rows)
            if self._check is not None and self._seen == 0:
                self._check(i - self.has_base, rows)
            numbers = rows.reshape(self.shape).to(self.work.device, dtype, copy=True)
            if not math.isfinite(float(numbers.sum())):
                self._mend(i, numbers.view(-1), [t.view(-1) for t in loaded], self._seen == 0)
            loaded.append(numbers)
        self._seen = self.rows
        return (loaded[1:], loaded[0]) if self.has_base else (loaded, None)

    def _mend(self, i: int, numbers: Tensor, loaded: list[Tensor], first: bool) -> None:
        bad = ~torch.isfinite(numbers)
        count = int(bad.sum())
        if count == 0:
            return  # finite numbers with an infinite sum
        if self._nonfinite == "error" or not self.has_base or i == 0:
            if self._nonfinite == "error":
                count = sum(int((~torch.isfinite(self._readers[i](a, b))).sum()) for a, b in self.chunks())
            raise SurgeryError(
                f"{self._labels[i]}: tensor '{self.name}' has {count:,} values that are NaN or infinite.",
                hint="Repair that checkpoint, or take the base's values there (nonfinite: base).",
            )
        numbers[bad] = loaded[0][bad]
        if first:
            self.replaced += count


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Within: every torch operation on one thread, since the work is spread over tensors instead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_parallel(
    jobs: Sequence[Any], work: Callable[[Any, Workspace], None], *, threads: int, device: torch.device | str = "cpu"
) -> None:
    """Runs `work(job, workspace)` for all `jobs` on `threads` threads, in the given order; the first error is raised.

    Each thread keeps one `Workspace`. Give the largest jobs first: the last to finish then waits least.
    """
    mine = threading.local()
    stopped = threading.Event()

    def run(job: Any) -> None:
        if stopped.is_set():
            return
        if not hasattr(mine, "workspace"):
            mine.workspace = Workspace(device)
        try:
            with torch.inference_mode():
                work(job, mine.workspace)
        except BaseException:
            stopped.set()
            raise

    with one_torch_thread(), ThreadPoolExecutor(max(1, threads)) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C: let the workers stop before the writer cleans up
            stopped.set()
            raise
        finally:
            for future in futures:
                future.cancel()
    for future in futures:
        if not future.cancelled() and (error := future.exception()) is not None:
            raise error
