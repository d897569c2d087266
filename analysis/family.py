"""A base and what was made of it, one tensor at a time: the common ground of everything that compares many models.

A member of a family is a fine-tuned model (a source) or a vector (anything with `shapes` and `read`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.checkpoint import Source, open_checkpoint
from surgery.errors import SurgeryError
from surgery.weights.streams import CHUNK, Workspace

BLOCK = 4096
"""Numbers that are summed in float32 before float64 takes over: errors stay below 1e-7 of the norms."""

Reader = Callable[[int, int], Tensor]
"""Rows `start:stop` of one tensor."""


@dataclass
class Family:
    """One tensor: its base and vectors. A reader gives the tuned weights, or the delta itself where `is_delta`."""

    name: str
    rows: int
    cols: int
    dtype: str
    base: Reader
    vectors: Sequence[Reader | None]
    is_delta: Sequence[bool]

    def delta(self, vector: int, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of one vector, float32; zeros where it lacks the tensor."""
        read = self.vectors[vector]
        if read is None:
            return torch.zeros(stop - start, self.cols)
        rows = read(start, stop).float()
        return rows if self.is_delta[vector] else rows - self.base(start, stop).float()

    def chunks(self, work: Workspace) -> Iterator[tuple[Tensor, int]]:
        """Float32 scratch, row 0 the base and row i+1 vector i, and how many of its numbers are real.

        The width is padded with zeros to whole blocks. Rows longer than a chunk are cut, so that memory is bounded.
        """
        height = len(self.vectors) + 1
        scratch = work.take("numbers", height * CHUNK).view(height, CHUNK)
        step = max(1, CHUNK // max(1, self.cols))
        for start in range(0, self.rows, step):
            stop = min(self.rows, start + step)
            readers = [self.base, *self.vectors]
            pieces = [None if read is None else read(start, stop).reshape(-1) for read in readers]
            for first in range(0, (stop - start) * self.cols, CHUNK):
                real = min(CHUNK, (stop - start) * self.cols - first)
                numbers = scratch[:, : -(-real // BLOCK) * BLOCK]
                numbers[:, real:] = 0
                for i, piece in enumerate(pieces):
                    row = numbers[i, :real]
                    if piece is None:
                        row.zero_()
                        continue
                    row.copy_(piece[first : first + real])
                    if i and not self.is_delta[i - 1]:
                        row.sub_(numbers[0, :real])
                yield numbers, real


def labelled(tuned: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """Members by label, paths opened; members of a list are called by the last part of their path."""
    if isinstance(tuned, (str, Path)):
        tuned = [tuned]
    if not tuned:
        raise SurgeryError("No fine-tuned models or vectors were given.")
    if isinstance(tuned, Mapping):
        return {label: t if hasattr(t, "read") else open_checkpoint(t) for label, t in tuned.items()}
    opened = [t if hasattr(t, "read") else open_checkpoint(t) for t in tuned]
    labels = [t.path.name if hasattr(t, "path") else str(t) for t in opened]
    return {label if labels.count(label) == 1 else f"{label} ({i})": t
            for i, (label, t) in enumerate(zip(labels, opened, strict=True))}  # fmt: skip


def _shape(vector: Any, name: str) -> tuple[int, ...] | None:
    if hasattr(vector, "shapes"):
        return vector.shapes.get(name)
    info = vector.tensors.get(name)
    return info.shape if info is not None and info.is_float else None


def shared(base: Source, vectors: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """The base's floating point tensors that some vector has, and what each vector lacks of them.

    Raises `SurgeryError` for all shapes that differ, or when nothing is shared.
    """
    floats = [n for n, info in base.tensors.items() if info.is_float and info.numel]
    unequal = [f"{label}: {n} {list(shape)}, base {list(base.tensors[n].shape)}" for label, v in vectors.items()
               for n in floats if (shape := _shape(v, n)) is not None and shape != base.tensors[n].shape]  # fmt: skip
    if unequal:
        raise SurgeryError(f"{len(unequal)} tensors differ in shape: {'; '.join(unequal[:8])}.",
                           hint="Compare the models with `surgery vector check`.")  # fmt: skip
    names = [n for n in floats if any(_shape(v, n) is not None for v in vectors.values())]
    if not names:
        raise SurgeryError(f"{base.path} and the vectors have no tensor in common.")
    missing = {label: [n for n in names if _shape(v, n) is None] for label, v in vectors.items()}
    return names, {label: lacking for label, lacking in missing.items() if lacking}


def family_of(base: Source, name: str, vectors: Sequence[Any]) -> Family:
    """One tensor of a base and of all members."""
    info = base.tensors[name]
    readers = [partial(v.read, name) if _shape(v, name) is not None else None for v in vectors]
    deltas = [hasattr(v, "shapes") for v in vectors]
    return Family(name, info.rows, info.cols, info.dtype, partial(base.read, name), readers, deltas)


def refuse_nonfinite(labels: Sequence[str], counts: Mapping[str, list[int]]) -> None:
    """Raises `SurgeryError` if there are any: `counts` has one number per tensor and label."""
    bad = [f"{label}: {name} ({row[i]:,})" for i, label in enumerate(labels) for name, row in counts.items() if row[i]]
    if bad:
        more = f"; and {len(bad) - 8} more" if len(bad) > 8 else ""
        problem = f"NaN or infinite numbers in {len(bad)} tensors: {'; '.join(bad[:8])}{more}."
        raise SurgeryError(problem, hint="Repair that checkpoint, or leave it out.")
