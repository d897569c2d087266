"""One result class for the house: per-example values with labels; mean, interval, test, frame, figure on top."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from analysis import result_files
from analysis.resampling import Z95 as Z95
from analysis.resampling import bootstrap, sign_flip, wilson
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

REDUCTIONS: Mapping[str, Callable[..., np.ndarray]] = {"mean": np.mean, "sum": np.sum, "max": np.max, "min": np.min}


class Interval(NamedTuple):
    """A confidence interval; arrays when the result has more axes than examples."""

    low: np.ndarray
    high: np.ndarray


class PairedTest(NamedTuple):
    """A two-sided sign-flip test of "the mean difference is zero" over the same examples."""

    difference: np.ndarray
    """Mean of (this - other)."""
    p_value: np.ndarray
    """Share of sign flips whose mean is at least as far from zero, the observed one counted."""
    n: int
    """Number of pairs."""


class MeanTest(NamedTuple):
    """A two-sided sign-flip test of "the mean is zero", a cell at a time."""

    mean: np.ndarray
    """What was observed."""
    p_value: np.ndarray
    """Share of sign flips whose mean is at least as far from zero, the observed one counted."""
    n: int
    """Number of examples."""


@dataclass(frozen=True)
class Result:
    """What was measured, one value an example: nothing is averaged before it must be.

    `values` has shape (examples, ...); `axes` names each dimension and gives its labels, the examples first.
    `columns` holds more about each example (its task, the completion), `meta` about the run. Both must be plain JSON.
    Two entries of `meta` are read here: "ticks" (how a figure writes the labels of an axis, `{"position": tokens}`)
    and "ratio_of" (the column whose mean the values were divided by, see `normalized`).
    Raises `SurgeryError` when labels and values do not fit.
    """

    values: np.ndarray
    axes: Mapping[str, Sequence[Any]]
    name: str = "value"
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", np.asarray(self.values, dtype=np.float64))
        object.__setattr__(self, "axes", {name: list(map(_label, labels)) for name, labels in self.axes.items()})
        object.__setattr__(self, "columns", {name: list(column) for name, column in self.columns.items()})
        shape = tuple(len(labels) for labels in self.axes.values())
        if self.values.ndim == 0 or self.values.shape != shape:
            raise SurgeryError(f"Result '{self.name}': values have shape {self.values.shape}, its labels {shape}.")
        for name, column in self.columns.items():
            if len(column) != len(self):
                raise SurgeryError(
                    f"Result '{self.name}': column '{name}' has {len(column)} entries, expected {len(self)}."
                )
        if (by := self.meta.get("ratio_of")) is not None and by not in self.columns:
            raise SurgeryError(f"Result '{self.name}' is a ratio over column '{by}', which it has not.")

    @classmethod
    def of(cls, values: Iterable[float], labels: Iterable[Any] | None = None, **more: Any) -> Result:
        """One number an example; without labels the examples are numbered."""
        values = list(values)
        return cls(np.array(values), {"example": range(len(values)) if labels is None else list(labels)}, **more)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def labels(self) -> Sequence[Any]:
        """What the examples are called."""
        return next(iter(self.axes.values()))

    @property
    def binary(self) -> bool:
        """Whether every value is 0 or 1: a share of successes, not a mean of measurements."""
        return self._ratio is None and bool(np.isin(self.values, (0.0, 1.0)).all())

    @property
    def _ratio(self) -> np.ndarray | None:
        """Of a ratio of means: the column below the line, over its mean (the values are over it already)."""
        if "ratio_of" not in self.meta:
            return None
        column = np.asarray(self.columns[self.meta["ratio_of"]], dtype=np.float64)
        return column / column.mean()

    # ---- parts

    def where(self, keep: Sequence[bool] | np.ndarray) -> Result:
        """The examples for which `keep` is true. A ratio of means becomes the ratio over these examples."""
        return self._take(0, np.flatnonzero(np.asarray(keep)).tolist())

    def select(self, axis: str, which: Any) -> Result:
        """Some entries of an axis: a label (a further axis goes away), a list of labels in its order, or a slice.

        A slice counts places (`slice(-1, None)` is the last one); so do whole numbers where the labels are no numbers.
        Raises `SurgeryError` when there is no such axis or label.
        """
        if axis not in self.axes:
            raise SurgeryError(f"Result '{self.name}' has no axis '{axis}'.", hint=f"Its axes: {', '.join(self.axes)}.")
        place, labels = list(self.axes).index(axis), list(self.axes[axis])
        if isinstance(which, slice):
            return self._take(place, list(range(len(labels))[which]))
        many = isinstance(which, list | range | np.ndarray) or (isinstance(which, tuple) and which not in labels)
        by_place = not any(isinstance(label, int | float) for label in labels)
        index = []
        for entry in map(_label, which if many else [which]):
            if entry in labels:
                index.append(labels.index(entry))
            elif by_place and isinstance(entry, int) and -len(labels) <= entry < len(labels):
                index.append(range(len(labels))[entry])
            else:
                known = ", ".join(map(repr, labels[:12])) + (", ..." if len(labels) > 12 else "")
                raise SurgeryError(f"Axis '{axis}' of result '{self.name}' has no {entry!r}.", hint=f"It has: {known}.")
        found = self._take(place, index)
        return found if many or place == 0 else found.reduce(axis)

    def _take(self, place: int, index: list[int]) -> Result:
        """Entries of the axis at `place`, with all that belongs to them."""
        axis = list(self.axes)[place]
        axes = {**self.axes, axis: [self.axes[axis][i] for i in index]}
        values, columns, meta = self.values.take(index, axis=place), self.columns, dict(self.meta)
        if axis in (ticks := meta.get("ticks", {})):
            meta["ticks"] = {**ticks, axis: [ticks[axis][i] for i in index]}
        if place == 0:
            columns = {name: [column[i] for i in index] for name, column in self.columns.items()}
            if "ratio_of" in meta and index:
                by = meta.pop("ratio_of")
                above = values * np.mean(self.columns[by])
                return Result(above, axes, self.name, columns, meta).normalized(by, name=self.name)
        return Result(values, axes, self.name, columns, meta)

    def by(self, column: str) -> dict[Any, Result]:
        """The examples grouped by a column, in the order in which its entries first occur."""
        entries = self.columns[column]
        return {entry: self.where([e == entry for e in entries]) for entry in dict.fromkeys(entries)}

    def over(self, axis: str) -> Result:
        """The mean over one of the further axes (samples, seeds), still one value an example."""
        return self.reduce(axis)

    def reduce(self, axis: str, how: str = "mean") -> Result:
        """The mean, sum, max or min over one of the further axes, still one value an example."""
        if axis not in list(self.axes)[1:]:
            raise SurgeryError(f"Result '{self.name}' has no axis '{axis}' to average: {', '.join(self.axes)}.")
        if how not in REDUCTIONS:
            raise SurgeryError(f"Axes are not reduced by '{how}'.", hint=f"Choose from {', '.join(REDUCTIONS)}.")
        values = REDUCTIONS[how](self.values, axis=list(self.axes).index(axis))
        axes = {name: labels for name, labels in self.axes.items() if name != axis}
        return Result(values, axes, self.name, self.columns, self.meta)

    # ---- ratios

    def normalized(self, by: str = "span", *, name: str | None = None, tolerance: float = 1e-5) -> Result:
        """Ratio of batch means: the values over the mean of column `by` (of the span: LD_clean - LD_corrupt).

        The mean over any examples is mean(values) / mean(column) exactly. Interval and standard error count what the
        column varies: both are resampled together, and the delta method is used. A mean of the column within a few
        standard errors of zero shows as an interval that is very wide. Raises `SurgeryError` when the mean is below
        `tolerance` times the size of what was measured (values, column, columns "clean" and "corrupt", "source" and
        "target"). Without `name` the ratio is called what the meta entry "ratio_name" says.
        """
        if "ratio_of" in self.meta:
            raise SurgeryError(f"Result '{self.name}' is a ratio already, over '{self.meta['ratio_of']}'.")
        column = self._numbers(by)
        ends = ("source", "target") if "source" in self.columns else ("clean", "corrupt")
        baselines = (self.columns[name] for name in ends if name in self.columns)
        size = max(map(_size, (self.values, column, *baselines)))
        middle, what = float(column.mean()), " - ".join(ends) if by == "span" else by
        if abs(middle) <= tolerance * size:
            raise SurgeryError(
                f"Result '{self.name}': baselines coincide: mean {what} is {middle:.1g} at a size of {size:.2g}.",
                hint=f"Take examples on which {' and '.join(ends)} differ, or report the values without normalising.",
            )
        meta = {**self.meta, "ratio_of": by}
        name = name or self.meta.get("ratio_name") or f"{self.name} / mean {by}"
        return Result(self.values / middle, self.axes, name, self.columns, meta)

    def per_example_ratio(self, by: str = "span", *, name: str | None = None) -> Result:
        """Each value over its own example's column: infinite where that is 0, NaN for 0 / 0. See `normalized` first.

        One example with equal baselines makes the mean infinite; the ratio of means does not mind it.
        """
        below = self._numbers(by).reshape(-1, *[1] * (self.values.ndim - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            values = self.values / below
        meta = {k: v for k, v in self.meta.items() if k != "ratio_of"}
        return Result(values, self.axes, name or f"{self.name} / {by}", self.columns, meta)

    def _numbers(self, column: str) -> np.ndarray:
        """A column as numbers. Raises `SurgeryError` when there is none, or it holds anything else."""
        if column not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise SurgeryError(f"Result '{self.name}' has no column '{column}'.", hint=f"Its columns: {known}.")
        try:
            numbers = np.asarray(self.columns[column], dtype=np.float64)
        except (TypeError, ValueError):
            numbers = np.array([np.nan])
        if numbers.shape != (len(self),) or not numbers.size or not np.isfinite(numbers).all():
            raise SurgeryError(f"Result '{self.name}': column '{column}' must hold one finite number an example.")
        return numbers

    # ---- reductions over the examples

    @property
    def mean(self) -> np.ndarray:
        """Mean over the examples."""
        with np.errstate(invalid="ignore"):  # per-example ratios: inf - inf
            return self.values.mean(axis=0)

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of the mean: sd / sqrt(n) with the n - 1 variance; NaN for one example.

        Of a ratio of means by the delta method: that of values - mean * column / mean(column).
        """
        if len(self) < 2:
            return np.full(self.values.shape[1:], np.nan)[()]
        values, below = self.values, self._ratio
        if below is not None:
            values = values - np.multiply.outer(below, self.mean)
        with np.errstate(invalid="ignore"):
            return values.std(axis=0, ddof=1) / np.sqrt(len(self))

    def interval(self, *, resamples: int = 2000, seed: int = 0) -> Interval:
        """95 % interval of the mean: Wilson's for zeros and ones (Wilson 1927), percentile bootstrap otherwise."""
        if self.binary:
            return Interval(*wilson(self.mean, len(self)))
        return Interval(*bootstrap(self.values, self._ratio, resamples=resamples, seed=seed))

    def test(self, *, permutations: int = 10_000, seed: int = 0) -> MeanTest:
        """Is the mean different from zero? Sign-flip permutation test a cell, seeded; exact for a few examples.

        It holds for values that are as often above zero as below when there is no effect. p-values are not corrected
        for the number of cells: a sweep of 100 cells has some five below 0.05 by chance.
        """
        return MeanTest(self.mean, sign_flip(self.values, permutations=permutations, seed=seed), len(self))

    def paired_test(self, other: Result, *, permutations: int = 10_000, seed: int = 0) -> PairedTest:
        """Is this result's mean different from `other`'s on the same examples? `test` of the differences.

        Raises `SurgeryError` when the two were not measured on the same examples.
        """
        if self.axes != other.axes:
            raise SurgeryError(
                f"Results '{self.name}' and '{other.name}' have different examples: they can't be paired."
            )
        with np.errstate(invalid="ignore"):
            difference = Result(self.values - other.values, self.axes)
        return PairedTest(*difference.test(permutations=permutations, seed=seed))

    def top(self, k: int = 10, *, largest: bool = True, absolute: bool = False) -> list[tuple[Any, ...]]:
        """The k cells with the greatest (or least) mean, or mean size: (label on each further axis, ..., mean).

        Cells without a mean (NaN) are left out. Raises `SurgeryError` when there is one value an example.
        """
        if self.values.ndim < 2:
            raise SurgeryError(f"Result '{self.name}' has one value an example: there are no cells to rank.")
        mean, labels = self.mean, list(self.axes.values())[1:]
        key = np.abs(mean) if absolute else mean
        order = np.argsort(-key if largest else key, axis=None, kind="stable")
        cells = [np.unravel_index(i, mean.shape) for i in order if not np.isnan(mean.flat[i])][:k]
        return [(*(names[i] for names, i in zip(labels, cell, strict=True)), float(mean[cell])) for cell in cells]

    # ---- out

    def summary(self) -> dict[str, Any]:
        """Name, n, mean, standard error and interval as plain JSON."""
        low, high = self.interval()
        plain = {"mean": self.mean, "standard_error": self.standard_error, "low": low, "high": high}
        return {"name": self.name, "n": len(self), **{k: np.round(v, 6).tolist() for k, v in plain.items()}}

    def table(self, by: str) -> list[dict[str, Any]]:
        """The summary of each group of a column, as plain JSON. Raises `SurgeryError` when there is no such column."""
        if by not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise SurgeryError(f"Result '{self.name}' has no column '{by}'.", hint=f"Its columns: {known}.")
        return [{by: entry, **group.summary()} for entry, group in self.by(by).items()]

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        if self.values.ndim > 1:
            return f"{self.name}: {' x '.join(f'{len(v)} {k}' for k, v in self.axes.items())}"
        low, high = self.interval()
        return f"{self.name} {self.mean:.3f} [{low:.3f}, {high:.3f}] n={len(self)}"

    def to_dataframe(self) -> pd.DataFrame:
        """One row a value: a column for each axis, each of `columns`, and the value under the result's name."""
        import pandas as pd

        index = pd.MultiIndex.from_product(list(self.axes.values()), names=list(self.axes))
        frame = pd.DataFrame({self.name: self.values.reshape(-1)}, index=index).reset_index()
        each = self.values.size // max(len(self), 1)
        for position, (name, column) in enumerate(self.columns.items(), start=1):
            frame.insert(position, name, [entry for entry in column for _ in range(each)])
        return frame

    def plot(self, by: str | None = None, *, title: str = "") -> Figure:
        """Means with 95 % intervals: points (one a group of column `by`), a line over one more axis; over two a map of
        the means, over three a map a panel."""
        from analysis.result_figures import draw

        return draw(self, by, title)

    def save(self, path: str | Path) -> Path:
        """Write `path`.safetensors (the values) and `path`.json (all else); returns the JSON's path."""
        text = {"name": self.name, "axes": self.axes, "columns": self.columns, "meta": self.meta}
        return result_files.write(path, self.values, text)

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote. Raises `SurgeryError` when a file is missing or is not a result."""
        values, text = result_files.read(path)
        return cls(values, **text)


def concatenate(results: Sequence[Result], **column: Sequence[Any]) -> Result:
    """Results one after the other; `task=["copy", "sort"]` adds a column that tells them apart."""
    if not results:
        raise SurgeryError("No results to put together.")
    first = results[0]
    by = _alike([r.meta.get("ratio_of") for r in results])
    columns: dict[str, list[Any]] = {}
    for name in [c for c in first.columns if all(c in r.columns for r in results)]:
        columns[name] = [entry for r in results for entry in r.columns[name]]
    for name, entries in column.items():
        columns[name] = [entry for entry, r in zip(entries, results, strict=True) for _ in range(len(r))]
    example = next(iter(first.axes))
    axes = {**first.axes, example: [label for r in results for label in r.labels]}
    if by is None:
        return Result(np.concatenate([r.values for r in results]), axes, first.name, columns, first.meta)
    values = np.concatenate([r.values * np.mean(r.columns[by]) for r in results])
    meta = {name: entry for name, entry in first.meta.items() if name != "ratio_of"}
    return Result(values, axes, first.name, columns, meta).normalized(by, name=first.name)


def stack(results: Mapping[Any, Result], axis: str) -> Result:
    """Results on the same examples side by side: a last axis (seeds, stages, models) labelled by the keys.

    Columns on which they agree stay; of others (completions) each example keeps the list. Raises `SurgeryError` when
    the examples differ.
    """
    if not results:
        raise SurgeryError("No results to put together.")
    labels, (first, *others) = list(results), list(results.values())
    for label, other in zip(labels[1:], others, strict=True):
        if other.axes != first.axes:
            raise SurgeryError(f"Results '{labels[0]}' and '{label}' have different examples: they don't stack.")
    columns: dict[str, list[Any]] = {}
    for name in [c for c in first.columns if all(c in r.columns for r in others)]:
        alike = all(r.columns[name] == first.columns[name] for r in others)
        every = [list(entries) for entries in zip(*(r.columns[name] for r in results.values()), strict=True)]
        columns[name] = list(first.columns[name]) if alike else every
    by = _alike([r.meta.get("ratio_of") for r in results.values()])
    if by is not None and any(r.columns[by] != first.columns[by] for r in others):
        raise SurgeryError(f"Results '{labels[0]}', '{labels[-1]}' are ratios over different '{by}': they don't stack.",
                           hint="Stack what was measured, or compare the ratios one by one.")  # fmt: skip
    values = np.stack([r.values for r in results.values()], axis=-1)
    return Result(values, {**first.axes, axis: labels}, first.name, columns, first.meta)


def _alike(ratios: list[str | None]) -> str | None:
    """The column that all are ratios over. Raises `SurgeryError` when some are not."""
    if any(by != ratios[0] for by in ratios):
        raise SurgeryError("Ratios and what is not one (or over another column) can't be put together.")
    return ratios[0]


def _size(numbers: Any) -> float:
    """Mean size of the finite ones; 0 for what are no numbers (a column "clean" may hold the prompts)."""
    try:
        sizes = np.abs(np.asarray(numbers, dtype=np.float64))
    except (TypeError, ValueError):
        return 0.0
    return float(np.nan_to_num(sizes, nan=0.0, posinf=0.0).mean())


def _label(entry: Any) -> Any:
    """A label as it comes back from a file: NumPy's scalars are Python's, and what was a tuple is one again."""
    if isinstance(entry, np.generic):
        return entry.item()
    return tuple(entry) if isinstance(entry, list) else entry
