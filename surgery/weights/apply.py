"""base + scale * vector, written as a checkpoint: streamed, checked, rounded once, with a report for every tensor."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from surgery.anatomy import output_head
from surgery.checkpoint import CheckpointWriter, Source, TensorInfo
from surgery.checkpoint.adapter import tied_pair
from surgery.checkpoint.companions import model_card, write_companions
from surgery.checkpoint.header import dtype_code, torch_dtype
from surgery.checkpoint.provenance import Checksum, Provenance, header_hash
from surgery.checkpoint.writer import check_target
from surgery.errors import SurgeryError
from surgery.weights.ancestry import MAX_RATIO, MIN_COSINE, ancestry
from surgery.weights.expression import Expression
from surgery.weights.progress import Progress, Tally
from surgery.weights.rounding import round_to
from surgery.weights.sources import View, flat, label, ranges, row_blocks
from surgery.weights.sparsify import derive_key
from surgery.weights.streams import Workspace, in_parallel

Rounding = Literal["nearest", "stochastic"]


@dataclass
class TensorReport:
    """What happened to one tensor: `action` is "copied", "changed" or "restored" (the tuned model's own bits).

    `update` is ||X - B|| of the wanted X, `ratio` that over ||B||, `rounding_loss` ||round(X) - X|| / ||X - B||.
    """

    action: str
    update: float = 0.0
    ratio: float = 0.0
    rounding_loss: float = 0.0


@dataclass
class Applied:
    """The outcome of `apply`: where it is, what each tensor went through, and what the reader should know."""

    out: Path
    tensors: dict[str, TensorReport] = field(repr=False)
    warnings: list[str]
    seconds: float = 0.0
    nbytes: int = 0

    @property
    def rounding_loss(self) -> float:
        """||round(X) - X|| / ||X - B|| over all tensors."""
        wanted = math.fsum(r.update**2 for r in self.tensors.values())
        lost = math.fsum((r.rounding_loss * r.update) ** 2 for r in self.tensors.values())
        return math.sqrt(lost / wanted) if wanted else 0.0


def apply(
    expression: Expression,
    base: Source,
    out: str | Path,
    *,
    scale: float = 1.0,
    dtype: str | None = None,
    transfer: bool | Literal["anyway"] = False,
    rounding: Rounding = "nearest",
    seed: int = 0,
    threads: int = 2,
    shard_size: int | str = "5GB",
    force: bool = False,
    progress: Progress | None = None,
) -> Applied:
    """Writes `base + scale * expression` into the folder `out`, loadable like `base`.

    Arithmetic is float32 (float64 on float64 bases); the result is rounded once, to `dtype` or the base's own types.
    A plain difference put back at scale 1 on its own base restores the tuned model, bit for bit and in its types.
    `rounding="stochastic"` is unbiased, from `seed`. The base must be the vector's, by checksum of every touched
    tensor; `transfer=True` allows another one of the same shapes and, as far as it can be told, the same ancestry
    ("anyway": without that). Raises `SurgeryError` where one of these does not hold, and when `out` exists.
    `progress` counts the bytes that are written.
    """
    began = time.perf_counter()
    out = Path(out).expanduser()
    if not math.isfinite(scale):
        raise SurgeryError(f"The scale is {scale}; a finite number is needed.")
    if rounding not in ("nearest", "stochastic"):
        raise SurgeryError(f"rounding is '{rounding}'; it can be 'nearest' or 'stochastic'.")
    check_target(out, force=force)
    if out.exists() and out.resolve() in {Path(s.path).resolve() for s in _sources(expression, base)}:
        raise SurgeryError(f"The output {out} is one of the inputs.", hint="Choose another name.")
    warnings: list[str] = []
    base, changes = _with_head(base, expression, warnings)
    expected = _expected(expression, base, bool(transfer))
    if transfer:
        _check_ancestry(expression, base, transfer == "anyway", warnings)
    else:
        expression = expression.over(lambda leaf: leaf.bound(base, trusted=True))  # compared on the way
    restores = scale == 1 and not transfer
    infos = [_declared(info, expression, dtype, restores) for info in base.tensors.values()]
    reports: dict[str, TensorReport] = {}
    tally = Tally(progress, sum(info.nbytes for info in infos))
    with CheckpointWriter(out, infos, shard_size=shard_size, force=force) as writer:

        def work(name: str, _: Workspace) -> None:
            job = _Job(base, expression, writer, name, expected.get(name))
            if name not in expression.shapes:
                reports[name] = job.copy()
            elif restores and expression.exact(name) is not None:
                reports[name] = job.restore()
            else:
                reports[name] = job.change(scale, rounding, derive_key(seed, "rounding", name))
            tally.add(name, writer.tensors[name].nbytes)

        in_parallel(sorted(base.tensors, key=lambda n: -base.tensors[n].numel), work, threads=threads)
        reports = {name: reports[name] for name in base.tensors}
        applied = Applied(out, reports, warnings, nbytes=writer.nbytes)
        if transfer and (ratios := [r.ratio for r in reports.values() if r.action == "changed"]):
            far = median(ratios)
            if far > MAX_RATIO:
                warnings.append(f"The vector is as long as {far:.2g} of the base (median): far for a fine-tuning.")
        record = _provenance(expression, base, applied, {"scale": scale, "rounding": rounding, "transfer": transfer})
        record.seed = seed if rounding == "stochastic" else None
        own = base.inner if isinstance(base, View) else base
        card = model_card(record, out.name, own)
        write_companions(writer, own, config_changes=changes, card=card, provenance=record)
    applied.seconds = time.perf_counter() - began
    return applied


@dataclass
class _Job:
    """One tensor on its way from the base to the output."""

    base: Source
    expression: Expression
    writer: CheckpointWriter
    name: str
    expected: str | None

    @property
    def info(self) -> TensorInfo:
        return self.base.tensors[self.name]

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.writer.tensors[self.name].dtype)

    def blocks(self) -> Any:
        """(first row, flat start, base numbers) of every block of rows; the base's checksum is checked on the way."""
        seen = Checksum()
        if self.info.numel == 0:
            self.writer.write(self.name, torch.empty(self.info.shape, dtype=self.dtype))
            return
        for row, start, stop in row_blocks(self.info.shape):
            numbers = flat(self.base, self.name, start, stop)
            if self.expected is not None:
                seen.update(numbers)
            yield row, start, numbers
        if self.expected is not None and seen.hexdigest() != self.expected:
            raise SurgeryError(
                f"{self.base.path} is not the base of {self.expression}: tensor '{self.name}' has other numbers.",
                hint="Name the vector's own base; if you mean this one, allow it: --transfer, in Python transfer=True.",
            )

    def copy(self) -> TensorReport:
        for row, _, numbers in self.blocks():
            self.writer.write(self.name, numbers.to(self.dtype), row)
        return TensorReport("copied")

    def restore(self) -> TensorReport:
        for row, start, numbers in self.blocks():
            tuned = self.expression.restored(self.name, start, start + numbers.numel(), numbers)
            if not self.expression.sound and not bool(torch.isfinite(tuned.sum(dtype=torch.float32))):
                self.expression.refuse(self.name, tuned)
            self.writer.write(self.name, tuned.to(self.dtype), row)
        return TensorReport("restored")

    def change(self, scale: float, rounding: Rounding, key: int) -> TensorReport:
        work = torch.float64 if self.info.dtype == "F64" else torch.float32
        length = wanted = lost = 0.0
        for row, start, numbers in self.blocks():
            rounded = torch.empty(numbers.numel(), dtype=self.dtype)
            for a, b in ranges(numbers.numel()):
                before = numbers[a:b].to(work)
                after = self.expression.flat(self.name, start + a, start + b).to(work).mul_(scale).add_(before)
                rounded[a:b] = round_to(after, self.dtype, key if rounding == "stochastic" else None, start + a)
                lost += _square(rounded[a:b].to(work) - after)
                wanted += _square(after.sub_(before))
                length += _square(before)
            if not math.isfinite(wanted) or (not math.isfinite(lost)):
                raise SurgeryError(
                    f"{self.base.path} plus {self.expression}: tensor '{self.name}' gets values that are NaN or "
                    f"beyond {self.dtype}.",
                    hint="Look at the base and at the scale; bfloat16 and float32 reach further than float16.",
                )
            self.writer.write(self.name, rounded, row)
        wanted, lost, length = math.sqrt(wanted), math.sqrt(lost), math.sqrt(length)
        return TensorReport("changed", wanted, wanted / length if length else 0.0, lost / wanted if wanted else 0.0)


def _square(numbers: Tensor) -> float:
    return float(numbers.dot(numbers))


def _declared(info: TensorInfo, expression: Expression, dtype: str | None, restores: bool) -> TensorInfo:
    """A tensor of the output: `dtype` for floats if given, else the tuned model's when restored, else the base's."""
    code = info.dtype
    if info.is_float and dtype is not None:
        code = dtype_code(dtype)
        if not TensorInfo("", code, ()).is_float:
            raise SurgeryError(f"Weights can't be written as {dtype}.", hint="Use float32, bfloat16 or float16.")
    elif restores and info.name in expression.shapes:
        code = expression.exact(info.name) or code
    return TensorInfo(info.name, code, info.shape)


def _sources(expression: Expression, base: Source) -> list[Source]:
    found = [base, *(a.source for a in expression.anchors() if a.source is not None)]
    pending = [expression]
    while pending:
        part = pending.pop()
        pending += part.parts()
        found += [s for s in (getattr(part, "tuned", None), getattr(part, "file", None)) if s is not None]
    return found


def _with_head(base: Source, expression: Expression, warnings: list[str]) -> tuple[Source, dict[str, Any]]:
    """The base with its head as the vector needs it: a matrix of its own if the vector moves it, else as it is."""
    pair = tied_pair(base)
    if pair is None:
        return base, {}
    embedding, head = pair
    moved = output_head(expression.shapes)
    if moved is None:
        return View(base, {head}, {}), {}
    warnings.append(f"The vector has a '{moved}' of its own, so the output no longer ties it to '{embedding}'.")
    key = "tie_word_embeddings"
    nested = [f"{k}.{key}" for k, v in base.config.items() if isinstance(v, dict) and key in v]
    return View(base, {head}, {moved: embedding}), dict.fromkeys([key, *nested], False)


def _expected(expression: Expression, base: Source, transfer: bool) -> dict[str, str]:
    """The checksums that the base's tensors must have; checks names and shapes at once."""
    for name, shape in expression.shapes.items():
        info = base.tensors.get(name)
        if info is None or info.shape != shape or not info.is_float:
            found = "has no such tensor" if info is None else f"has {info.dtype} {list(info.shape)}"
            raise SurgeryError(
                f"{expression} does not fit {base.path}: for '{name}' {list(shape)} it {found}.",
                hint="A vector can be applied to models of the same architecture and vocabulary only.",
            )
    if transfer:
        return {}
    anchors = expression.anchors()
    if not anchors:
        raise SurgeryError(
            f"It is not known which base {expression} was taken from.",
            hint="If you are sure that it fits this one, allow it: --transfer, in Python transfer=True.",
        )
    inner = base.inner if isinstance(base, View) else base
    header = header_hash(inner)
    wanted: dict[str, str] = {}
    for anchor in anchors:
        if anchor.header != header:
            raise SurgeryError(
                f"{base.path} is not the base of {expression}: its tensors differ from those of {anchor.name}.",
                hint="Name the vector's own base; if you mean this one, allow it: --transfer, in Python transfer=True.",
            )
        if anchor.source is not None and Path(anchor.source.path) == Path(base.path) and anchor.known is None:
            continue
        for name in expression.shapes:
            sum_ = anchor.checksum(name)
            if sum_ is not None and wanted.setdefault(name, sum_) != sum_:
                raise SurgeryError(
                    f"{expression} mixes differences from different bases: see tensor '{name}'.",
                    hint="If you mean it, allow it: --transfer, in Python transfer=True.",
                )
    return wanted


def _check_ancestry(expression: Expression, base: Source, anyway: bool, warnings: list[str]) -> None:
    """Refuses a transfer to a model that was not fine-tuned from the same start, as far as the bases are at hand."""
    known = [a for a in expression.anchors() if a.source is not None]
    if not known:
        warnings.append("The vector's own base is not at hand, so a common ancestry could not be checked.")
    for anchor in known:
        assert anchor.source is not None
        found = ancestry(anchor.source, base, sample=1 << 16)
        if not (found.median_ratio <= MAX_RATIO and found.median_cosine >= MIN_COSINE):
            problem = (
                f"{label(base)} and the vector's base {anchor.name} do not stem from one initialisation: median "
                f"cosine {found.median_cosine:.3f}, median distance {found.median_ratio:.2f} of the norm."
            )
            if not anyway:
                hint = "A vector means nothing there; --transfer-anyway adds it still, in Python transfer='anyway'."
                raise SurgeryError(problem, hint=hint)
            warnings.append(problem)


def _provenance(expression: Expression, base: Source, applied: Applied, parameters: dict[str, Any]) -> Provenance:
    tensors = {name: asdict(report) for name, report in applied.tensors.items()}
    record = Provenance("apply", parameters={"vector": str(expression)} | parameters, tensors=tensors)
    record.add_input(base.path, "base", base.inner if isinstance(base, View) else base)
    for anchor in expression.anchors():
        record.inputs.append({"name": anchor.name, "role": "vector's base", "header": anchor.header})
    record.totals = {
        "tensors changed": sum(r.action != "copied" for r in applied.tensors.values()),
        "rounding loss": applied.rounding_loss,
        "warnings": applied.warnings,
    }
    return record
