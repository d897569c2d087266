"""One result class for the house: per-example values with labels; mean, interval, test, frame, figure on top."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Z95 = 1.959963984540054


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


@dataclass(frozen=True)
class Result:
    """What was measured, one value an example: nothing is averaged before it must be.

    `values` has shape (examples, ...); `axes` names each dimension and gives its labels, the examples first.
    `columns` holds more about each example (its task, the completion), `meta` about the run. Both must be plain JSON.
    Raises `SurgeryError` when labels and values do not fit.
    """

    values: np.ndarray
    axes: Mapping[str, Sequence[Any]]
    name: str = "value"
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", np.asarray(self.values, dtype=np.float64))
        object.__setattr__(self, "axes", {name: list(labels) for name, labels in self.axes.items()})
        object.__setattr__(self, "columns", {name: list(column) for name, column in self.columns.items()})
        shape = tuple(len(labels) for labels in self.axes.values())
        if self.values.ndim == 0 or self.values.shape != shape:
            raise SurgeryError(f"Result '{self.name}': values have shape {self.values.shape}, its labels {shape}.")
        for name, column in self.columns.items():
            if len(column) != len(self):
                raise SurgeryError(
                    f"Result '{self.name}': column '{name}' has {len(column)} entries, expected {len(self)}."
                )

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
        return bool(np.isin(self.values, (0.0, 1.0)).all())

    # ---- parts

    def where(self, keep: Sequence[bool] | np.ndarray) -> Result:
        """The examples for which `keep` is true."""
        index = np.flatnonzero(np.asarray(keep)).tolist()
        first, *others = self.axes
        axes = {first: [self.labels[i] for i in index], **{name: self.axes[name] for name in others}}
        columns = {name: [column[i] for i in index] for name, column in self.columns.items()}
        return Result(self.values[index], axes, self.name, columns, self.meta)

    def by(self, column: str) -> dict[Any, Result]:
        """The examples grouped by a column, in the order in which its entries first occur."""
        entries = self.columns[column]
        return {entry: self.where([e == entry for e in entries]) for entry in dict.fromkeys(entries)}

    def over(self, axis: str) -> Result:
        """The mean over one of the further axes (samples, seeds), still one value an example."""
        if axis not in list(self.axes)[1:]:
            raise SurgeryError(f"Result '{self.name}' has no axis '{axis}' to average: {', '.join(self.axes)}.")
        values = self.values.mean(axis=list(self.axes).index(axis))
        axes = {name: labels for name, labels in self.axes.items() if name != axis}
        return Result(values, axes, self.name, self.columns, self.meta)

    # ---- reductions over the examples

    @property
    def mean(self) -> np.ndarray:
        """Mean over the examples."""
        return self.values.mean(axis=0)

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of the mean: sd / sqrt(n) with the n - 1 variance; NaN for one example."""
        if len(self) < 2:
            return np.full(self.values.shape[1:], np.nan)[()]
        return self.values.std(axis=0, ddof=1) / np.sqrt(len(self))

    def interval(self, *, resamples: int = 2000, seed: int = 0) -> Interval:
        """95 % interval of the mean: Wilson's for zeros and ones (Wilson 1927), percentile bootstrap otherwise."""
        n = len(self)
        if self.binary:
            p, z2 = self.mean, Z95**2
            middle = (p + z2 / (2 * n)) / (1 + z2 / n)
            half = Z95 / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
            return Interval(middle - half, middle + half)
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
        means = np.tensordot(counts / n, self.values, axes=1)
        return Interval(*np.quantile(means, (0.025, 0.975), axis=0))

    def paired_test(self, other: Result, *, permutations: int = 10_000, seed: int = 0) -> PairedTest:
        """Is this result's mean different from `other`'s on the same examples? Sign-flip permutation test, seeded.

        Raises `SurgeryError` when the two were not measured on the same examples.
        """
        if self.axes != other.axes:
            raise SurgeryError(
                f"Results '{self.name}' and '{other.name}' have different examples: they can't be paired."
            )
        difference = self.values - other.values
        n, observed, rng = len(self), difference.mean(axis=0), np.random.default_rng(seed)
        # A hair of slack: equal means that were added up in another order count as equal.
        limit = np.abs(observed) * (1 - 1e-9) - 1e-15
        far: Any = 0
        for start in range(0, permutations, 1000):  # in blocks, for the memory
            signs = rng.integers(0, 2, size=(min(1000, permutations - start), n), dtype=np.int8) * 2.0 - 1.0
            far = far + (np.abs(np.tensordot(signs / n, difference, axes=1)) >= limit).sum(axis=0)
        return PairedTest(observed, (1 + far) / (1 + permutations), n)

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

    def plot(self, by: str | None = None) -> Figure:
        """Means with 95 % intervals: points (one a group of column `by`), a line over one more axis, a map over two."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axis = figure.subplots()
        if self.values.ndim == 3:
            _, (row, rows), (column, columns) = self.axes.items()
            image = axis.imshow(self.mean, aspect="auto", cmap="cividis")
            axis.set(xlabel=column, ylabel=row)
            axis.set_xticks(range(len(columns)), [str(c) for c in columns])
            axis.set_yticks(range(len(rows)), [str(r) for r in rows])
            figure.colorbar(image, label=self.name)
            return figure
        if self.values.ndim > 3:
            raise SurgeryError(f"Result '{self.name}' has {self.values.ndim} axes; a figure shows at most 3.")
        if self.values.ndim == 2:
            ticks, mean, (low, high) = list(self.axes.values())[1], self.mean, self.interval()
            axis.set_xlabel(list(self.axes)[1])
        else:
            groups = self.by(by) if by else {self.name: self}
            ticks, mean = list(groups), np.array([g.mean for g in groups.values()])
            low, high = np.array([g.interval() for g in groups.values()]).T
        spread = np.clip([mean - low, high - mean], 0, None)
        axis.errorbar(range(len(ticks)), mean, spread, fmt="ko" if self.values.ndim == 1 else "ko-", capsize=3)
        axis.set_xticks(range(len(ticks)), [str(t) for t in ticks], rotation=30 if len(ticks) > 6 else 0)
        axis.set_ylabel(self.name)
        return figure

    def save(self, path: str | Path) -> Path:
        """Write `path`.safetensors (the values) and `path`.json (all else); returns the JSON's path."""
        from safetensors.numpy import save

        values, words = _files(path)
        words.parent.mkdir(parents=True, exist_ok=True)
        text = {"name": self.name, "axes": self.axes, "columns": self.columns, "meta": self.meta}
        _write(values, save({"values": np.ascontiguousarray(self.values)}))
        _write(words, json.dumps(text, indent=1, default=_plain).encode())
        return words

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote. Raises `SurgeryError` when a file is missing or is not a result."""
        from safetensors.numpy import load_file

        values, words = _files(path)
        try:
            text = json.loads(words.read_text(encoding="utf-8"))
            return cls(load_file(values)["values"], text["axes"], text["name"], text["columns"], text["meta"])
        except FileNotFoundError as error:
            raise SurgeryError(f"No result at {path}: {error.filename or error} is missing.") from None
        except SurgeryError:
            raise
        except Exception as error:
            raise SurgeryError(f"{path} is not a saved result: {error}") from error


def concatenate(results: Sequence[Result], **column: Sequence[Any]) -> Result:
    """Results one after the other; `task=["copy", "sort"]` adds a column that tells them apart."""
    if not results:
        raise SurgeryError("No results to put together.")
    first = results[0]
    columns: dict[str, list[Any]] = {}
    for name in [c for c in first.columns if all(c in r.columns for r in results)]:
        columns[name] = [entry for r in results for entry in r.columns[name]]
    for name, entries in column.items():
        columns[name] = [entry for entry, r in zip(entries, results, strict=True) for _ in range(len(r))]
    example = next(iter(first.axes))
    axes = {**first.axes, example: [label for r in results for label in r.labels]}
    return Result(np.concatenate([r.values for r in results]), axes, first.name, columns, first.meta)


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
    values = np.stack([r.values for r in results.values()], axis=-1)
    return Result(values, {**first.axes, axis: labels}, first.name, columns, first.meta)


def _files(path: str | Path) -> tuple[Path, Path]:
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    return stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _plain(thing: Any) -> Any:
    """NumPy scalars and arrays, paths: as JSON would have them."""
    convert: Callable[[], Any] | None = getattr(thing, "tolist", None)
    return convert() if convert else str(thing)
