"""The numbers behind a compatibility check: does a model stem from this base, and what will be left of an update?

Each is one streaming pass, a block of rows at a time: float32 arithmetic, float64 sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from surgery.checkpoint.header import TensorInfo, torch_dtype
from surgery.checkpoint.reader import Source
from surgery.weights.findings import Finding, Level, listed
from surgery.weights.progress import Progress, Tally

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 18
MAX_RATIO, MIN_COSINE = 0.5, 0.9
"""Beyond these medians of ||d||/||B|| and cos(F, B) a model is hardly a fine-tuning of that base."""
UNRELATED = 0.5
"""Below this median cosine it is another initialisation: random matrices have a cosine of about 0."""
MAX_LOSS = 0.3
"""Share of the update's norm that rounding may take before a warning."""


class Vector(Protocol):
    """What deltas are read from, in float32: a task vector, for instance."""

    @property
    def tensors(self) -> dict[str, TensorInfo]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor: ...


def comparable(base: Source, *others: Source) -> list[str]:
    """Names of the floating point tensors that all inputs hold in the same shape."""

    def same(info: TensorInfo, other: TensorInfo | None) -> bool:
        return other is not None and info.is_float and other.is_float and other.shape == info.shape and info.numel > 0

    return [n for n, info in base.tensors.items() if all(same(info, o.tensors.get(n)) for o in others)]


def blocks(sources: Sequence[Vector], name: str, sample: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of every source, about `CHUNK` numbers at a time; with `sample`, evenly spread runs of rows."""
    info = sources[0].tensors[name]
    step = max(1, CHUNK // max(1, info.cols))
    starts, length = range(0, info.rows, step), step
    if sample is not None and info.numel > sample:
        length = max(1, sample // 16 // max(1, info.cols))
        starts = range(0, info.rows, max(length, math.ceil(info.rows / 16)))
    for start in starts:
        yield tuple(s.read(name, start, min(start + length, info.rows)) for s in sources)


def _each_tensor(names: Sequence[str], measure: Callable[[str], Any], threads: int) -> dict[str, Any]:
    """`measure(name)` for every name, one tensor a thread."""
    from surgery.weights.streams import in_parallel

    found: dict[str, Any] = {}
    in_parallel(names, lambda name, _: found.__setitem__(name, measure(name)), threads=threads)
    return found


def _bad_numbers(who: str, bad: dict[str, int]) -> Finding:
    detail = f"{who}: {sum(bad.values()):,} NaN or infinite numbers in {len(bad)} tensors: "
    detail += listed(f"{n} ({count:,})" for n, count in bad.items()) + "."
    return Finding("fail", "numbers", detail, "Training diverged or the file is damaged: take another checkpoint.",
                   tuple(sorted(bad)))  # fmt: skip


@dataclass
class Ancestry:
    """How far a model is from its base, per tensor: `ratio` = ||F-B||/||B||, `cosine` = cos(F, B).

    `median_ratio` and `median_cosine` are over matrices, and `far` names those beyond the limits: the weights of norms
    stay near 1 in any model, and biases may start at 0. `nonfinite` counts NaN and Inf.
    """

    label: str
    ratio: dict[str, float]
    cosine: dict[str, float]
    nonfinite: dict[str, int]
    median_ratio: float
    median_cosine: float
    far: tuple[str, ...]

    def findings(self) -> list[Finding]:
        found = [_bad_numbers(self.label, self.nonfinite)] if self.nonfinite else []
        if not self.ratio:
            return found or [Finding("fail", "ancestry", f"{self.label} and the base have no tensor to compare.")]
        distance = f"median ||F-B||/||B|| = {self.median_ratio:.3g}, median cosine = {self.median_cosine:.4f}"
        if self.median_cosine < UNRELATED:
            detail = f"{self.label} is no fine-tuning of this base, but another initialisation: {distance}."
            hint = "Name the model that it was fine-tuned from."
            return [*found, Finding("fail", "ancestry", detail, hint, self.far)]
        if self.median_ratio > MAX_RATIO or self.median_cosine < MIN_COSINE:
            detail = f"{self.label} is far from the base for a fine-tuning: {distance}."
            return [*found, Finding("warn", "ancestry", detail, "Is it the right base?", self.far)]
        if max(self.ratio.values()) == 0:
            detail = f"{self.label} equals the base in every number: there is no difference to work with."
            return [*found, Finding("warn", "ancestry", detail, "Name a fine-tuning.")]
        if self.far:
            detail = f"{self.label}: {len(self.far)} tensors are far from the base's: {listed(self.far)}."
            found.append(Finding("warn", "ancestry", detail, "They may have been initialised anew.", self.far))
        return [*found, Finding("pass", "ancestry", f"{self.label} is a fine-tuning of the base: {distance}.")]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: the infinite ratio of a tensor that is zero in the base becomes null."""
        return asdict(self) | {"ratio": {n: r if math.isfinite(r) else None for n, r in self.ratio.items()}}


def ancestry(base: Source, tuned: Source, *, sample: int | None = None, threads: int = 2,
             progress: Progress | None = None) -> Ancestry:  # fmt: skip
    """Whether `tuned` stems from `base`: per-tensor ||F-B||/||B|| and cos(F, B), and NaN or Inf in either.

    Streams both once in float32 with float64 sums; with `sample`, about that many numbers per tensor. `progress`
    counts the bytes of `tuned`.
    """
    names = comparable(base, tuned)
    tally = Tally(progress, sum(tuned.tensors[n].nbytes for n in names))

    def measure(name: str) -> tuple[float, float, int]:
        bb = ff = bf = dd = 0.0
        bad = 0
        for b, f in blocks((base, tuned), name, sample):
            b, f = b.flatten().float(), f.flatten().float()
            d = f - b
            sums = [x.dot(y).item() for x, y in ((b, b), (f, f), (b, f), (d, d))]
            if not math.isfinite(sum(sums)):
                bad += int((~d.isfinite()).sum())
                b, f, d = (x.double().nan_to_num(0, 0, 0) for x in (b, f, d))
                sums = [x.dot(y).item() for x, y in ((b, b), (f, f), (b, f), (d, d))]
            bb, ff, bf, dd = bb + sums[0], ff + sums[1], bf + sums[2], dd + sums[3]
        ratio = math.sqrt(dd / bb) if bb else (math.inf if dd else 0.0)
        cosine = bf / math.sqrt(bb * ff) if bb and ff else float(bb == ff)
        tally.add(name, tuned.tensors[name].nbytes)
        return ratio, cosine, bad

    found = _each_tensor(names, measure, threads)
    matrices = [n for n in names if len(base.tensors[n].shape) > 1] or names
    ratio, cosine = ({n: found[n][i] for n in names} for i in (0, 1))
    return Ancestry(
        label=tuned.path.name,
        ratio=ratio,
        cosine=cosine,
        nonfinite={n: found[n][2] for n in names if found[n][2]},
        median_ratio=median(ratio[n] for n in matrices) if names else math.nan,
        median_cosine=median(cosine[n] for n in matrices) if names else math.nan,
        far=tuple(n for n in matrices if ratio[n] > MAX_RATIO or cosine[n] < MIN_COSINE),
    )


@dataclass
class Sanity:
    """What a vector holds, and what of it is left in a target of a given type.

    `norm` is ||d|| per tensor, `zeros` the share of exact zeros, `nonfinite` the tensors with NaN or Inf.
    `rounding` is ||round(T+d) - (T+d)||/||d|| and `vanished` the share of non-zero d that leave T as it is, both for
    the whole vector (None without a target).
    """

    norm: dict[str, float]
    zeros: float
    nonfinite: dict[str, int]
    rounding: float | None = None
    vanished: float | None = None

    def findings(self) -> list[Finding]:
        found = [_bad_numbers("The vector", self.nonfinite)] if self.nonfinite else []
        total = math.sqrt(math.fsum(n * n for n in self.norm.values()))
        detail = f"norm {total:.4g}, {self.zeros:.1%} exact zeros"
        if total == 0:
            return [*found, Finding("warn", "vector", f"The vector is zero everywhere ({len(self.norm)} tensors).")]
        found.append(Finding("pass", "vector", f"{detail}."))
        if self.rounding is not None:
            lost = f"Rounding to the target's type loses {self.rounding:.1%} of the update's norm; "
            lost += f"{self.vanished:.1%} of the changed numbers stay as they were."
            hint = "Write float32, or round stochastically."
            level: Level = "warn" if self.rounding > MAX_LOSS else "pass"
            found.append(Finding(level, "rounding", lost, hint if level == "warn" else None))
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sanity(vector: Vector, target: Source | None = None, *, dtype: str | None = None, scale: float = 1.0,
           threads: int = 2) -> Sanity:  # fmt: skip
    """Looks through a vector before `scale` times it is added to `target`, stored as `dtype` (its own type).

    One streaming pass. Tensors that the target lacks are left to `compare`.
    """

    infos = vector.tensors

    def measure(name: str) -> tuple[float, int, int, float, int, float]:
        dd = loss = wanted = 0.0
        zeros = bad = vanished = 0
        goal = target.tensors.get(name) if target is not None else None
        fits = goal is not None and goal.is_float and goal.shape == infos[name].shape
        sources = (vector, target) if fits and target is not None else (vector,)
        for d, *t in blocks(sources, name):
            d = d.float()
            square = d.flatten().dot(d.flatten()).item()
            if not math.isfinite(square):
                finite = d.isfinite()
                bad += d.numel() - int(finite.sum())
                d = d.where(finite, d.new_zeros(()))
                square = d.double().square().sum().item()
            dd += square
            zeros += d.numel() - int(d.count_nonzero())
            if fits and goal is not None:
                before, d = t[0].float(), d * scale
                x = before + d
                rounded = x.to(torch_dtype(dtype or goal.dtype)).float()
                vanished += int(((rounded == before) & (d != 0)).sum())
                loss += (rounded - x).double().square().sum().item()
                wanted += square * scale * scale
        return dd, zeros, bad, loss, vanished, wanted

    names = [n for n, info in infos.items() if info.numel]
    found = _each_tensor(names, measure, threads)
    numel = sum(infos[n].numel for n in names)
    zeros, lost, vanished, wanted = (math.fsum(found[n][i] for n in names) for i in (1, 3, 4, 5))
    return Sanity(
        norm={n: math.sqrt(found[n][0]) for n in names},
        zeros=zeros / numel if numel else 0.0,
        nonfinite={n: found[n][2] for n in names if found[n][2]},
        rounding=math.sqrt(lost / wanted) if wanted else None,
        vanished=vanished / max(1, numel - zeros) if wanted else None,
    )
