"""Probes of all layers as they come out of `analysis.probes`: directions, held-out scores, figures, files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis import plots
from analysis.probes.data import as_features, as_labels, listed
from analysis.probes.fits import decide, log_probabilities
from analysis.probes.scores import Scores
from analysis.result_files import _files, _plain, _write
from analysis.results import Result
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROBABILITIES = ("logistic", "lda")
"""Kinds whose values are log-odds."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Probes of all layers, each fitted to all examples, and what fits to parts of them said of the others."""

    kind: str
    layers: list[Any]
    classes: list[Any]
    """Labels in order; empty for numbers."""
    directions: np.ndarray
    """(layer, rows, d) in the features as they are. One row for two classes (towards the second) and for numbers; else
    one a class, which sum to zero."""
    intercepts: np.ndarray
    """(layer, rows)."""
    chosen: np.ndarray
    """(layer,) the C, shrinkage or alpha that was chosen; NaN where there is none."""
    fold_directions: np.ndarray
    """(fold, layer, rows, d) of the fits without a fold."""
    fold_intercepts: np.ndarray
    """(fold, layer, rows)."""
    held_out: Scores
    """What the fit without an example says of it."""
    control: Result | None = None
    """`score` of the control task, on the same examples and folds. `meta["seen"]` is the share of examples whose type
    also occurs in what was fitted: the others can only be guessed."""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What was probed for."""
        return self.held_out.name

    @property
    def accuracy(self) -> Result:
        """Held-out class-balanced accuracy, (example, layer): see `Scores`."""
        return self.held_out.accuracy

    @property
    def auc(self) -> Result:
        """Held-out area under the ROC curve, (example, layer)."""
        return self.held_out.auc

    @property
    def correct(self) -> Result:
        """Whether each example was right when held out, (example, layer)."""
        return self.held_out.correct

    @property
    def r2(self) -> Result:
        """Held-out R² of numbers, (example, layer)."""
        return self.held_out.r2

    @property
    def score(self) -> Result:
        """Class-balanced accuracy, or R² of numbers."""
        return self.held_out.score

    @property
    def baseline(self) -> Result:
        """The score of always saying the most frequent class (or the mean)."""
        return self.held_out.baseline

    @property
    def selectivity(self) -> Result:
        """Score minus that of the control task (Hewitt & Liang 2019). Raises without one."""
        if self.control is None:
            raise SurgeryError(
                f"Probe '{self.name}' has no control task.", hint="Pass control=: the type of each example."
            )
        score = self.score
        return Result(score.values - self.control.values, score.axes, "selectivity", score.columns, self.control.meta)

    # ---- on other activations

    def values(self, features: Any) -> np.ndarray:
        """(examples, layer, rows): the linear functions at features (examples, layer, d)."""
        return decide(self._fitting(features), self.directions, self.intercepts)

    def predict(self, features: Any) -> np.ndarray:
        """(examples, layer): the predicted labels, or numbers."""
        return self._scores(self.values(features), np.zeros(0), np.zeros(0, int)).predicted

    def probabilities(self, features: Any) -> np.ndarray:
        """(examples, layer, classes), in the order of `classes`. Raises for kinds that have none."""
        if self.kind not in PROBABILITIES:
            raise SurgeryError(f"A {self.kind} probe has no probabilities.", hint="See .values, or kind='logistic'.")
        return np.exp(log_probabilities(self.values(features)))

    def transfer(self, features: Any, labels: Any = None) -> Scores:
        """The same probes on other activations: those of another model, or other prompts.

        Without labels, or with the probe's own, the examples are taken to be the same in the same order (as read by
        another model): each is judged by the fit that did not see it, so that no prompt is trained and tested on. Other
        labels are of other examples, which the fit to all judges. Raises when they don't fit, or name an unknown class.
        """
        x = self._fitting(features)
        own = self.held_out.codes
        codes = own if labels is None else self._codes(listed(labels, len(x), "labels"))
        if labels is None and len(codes) != len(x):
            raise SurgeryError(
                f"There are {len(x)} examples, and the probe has {len(codes)}.", hint="Pass their labels."
            )
        if not np.array_equal(codes, own):
            return self._scores(decide(x, self.directions, self.intercepts), codes, np.zeros(len(x), int))
        folds = self.held_out.folds
        values = np.empty((len(x), *self.intercepts.shape))
        for i, (w, b) in enumerate(zip(self.fold_directions, self.fold_intercepts, strict=True)):
            values[folds == i] = decide(x[folds == i], w, b)
        return self._scores(values, codes, folds, self.held_out.columns if labels is None else None)

    def cosine(self, other: Probe) -> np.ndarray:
        """(layer, rows): cosine of the directions of two probes. Raises when layers, classes or widths differ."""
        if (self.layers, self.classes) != (
            other.layers,
            other.classes,
        ) or self.directions.shape != other.directions.shape:
            raise SurgeryError("Directions are compared of probes with the same layers, classes and width.")
        lengths = np.linalg.norm(self.directions, axis=-1) * np.linalg.norm(other.directions, axis=-1)
        dots = (self.directions * other.directions).sum(-1)
        return np.divide(dots, lengths, out=np.full_like(dots, np.nan), where=lengths > 0).clip(-1, 1)

    def _fitting(self, features: Any) -> np.ndarray:
        x, _ = as_features(features)
        if x.shape[1:] != (expected := (len(self.layers), self.directions.shape[-1])):
            raise SurgeryError(f"Features have (layers, width) {x.shape[1:]}, and the probe {expected}.")
        return x

    def _codes(self, labels: list[Any]) -> np.ndarray:
        if not self.classes:
            return as_labels(labels, len(labels), numeric=True).codes
        if unknown := [label for label in labels if label not in self.classes]:
            raise SurgeryError(f"The probe knows no class {unknown[0]!r}.",
                               hint="Its classes: " + ", ".join(map(repr, self.classes)) + ".")  # fmt: skip
        return np.array([self.classes.index(label) for label in labels])

    def _scores(
        self,
        values: np.ndarray,
        codes: np.ndarray,
        folds: np.ndarray,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Scores:
        own = self.held_out
        most = np.bincount(own.codes).argmax() if self.classes else own.codes.mean()
        reference = own.reference if folds is own.folds else np.full(len(codes), most)
        return Scores(values, codes, self.classes, self.layers, folds, reference, own.axis, own.name, columns or {})

    # ---- out

    def plot(self, *, title: str = "") -> Figure:
        """The score by layer with 95 % intervals, its control task and the majority baseline; heads as a map."""
        axis, score = self.held_out.axis, self.score
        grid = [str(layer).split(".") for layer in self.layers]
        if axis == "head" and all(len(place) == 2 for place in grid):
            rows, columns = (list(dict.fromkeys(place[i] for place in grid)) for i in (0, 1))
            values = np.full((len(rows), len(columns)), np.nan)
            for (row, column), mean in zip(grid, score.mean, strict=True):
                values[rows.index(row), columns.index(column)] = mean
            return plots.heat_map(
                values, rows, columns, title=title or self.name, unit=score.name, column_label="head", form=".2f"
            )
        series = {self.name: (score.mean, *score.interval())}
        if self.control is not None:
            series["control task"] = (self.control.mean, *self.control.interval())
        name = "majority" if self.classes else "mean"
        return by_layer(series, self.layers, axis, score.name, title, {name: float(self.baseline.mean)})

    def save(self, path: str | Path) -> Path:
        """Write `path`.safetensors and `path`.json (and `path`-control for a control task); returns the JSON's path."""
        from safetensors.numpy import save

        numbers, words = _files(path)
        words.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(self, name) for name in ARRAYS} | {
            name: getattr(self.held_out, name) for name in SCORES
        }
        text = {"kind": self.kind, "layers": self.layers, "classes": self.classes, "meta": self.meta,
                "axis": self.held_out.axis, "name": self.name, "columns": self.held_out.columns,
                "control": self.control is not None}  # fmt: skip
        _write(numbers, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
        _write(words, json.dumps(text, indent=1, default=_plain).encode())
        if self.control is not None:
            self.control.save(words.with_name(words.stem + "-control"))
        return words

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read what `save` wrote. Raises `SurgeryError` when a file is missing or is no probe."""
        from safetensors.numpy import load_file

        numbers, words = _files(path)
        try:
            text, arrays = json.loads(words.read_text(encoding="utf-8")), load_file(numbers)
            control = Result.load(words.with_name(words.stem + "-control")) if text["control"] else None
            scores = {name: arrays[name] for name in SCORES}
            held_out = Scores(**scores, classes=text["classes"], layers=text["layers"], axis=text["axis"],
                              name=text["name"], columns=text["columns"])  # fmt: skip
            parts = {name: arrays[name] for name in ARRAYS}
            return cls(text["kind"], text["layers"], text["classes"], **parts, held_out=held_out, control=control,
                       meta=text["meta"])  # fmt: skip
        except FileNotFoundError as error:
            raise SurgeryError(f"No probe at {path}: {error.filename or error} is missing.") from None
        except SurgeryError:
            raise
        except Exception as error:
            raise SurgeryError(f"{path} is not a saved probe: {error}") from error


ARRAYS = ("directions", "intercepts", "chosen", "fold_directions", "fold_intercepts")
SCORES = ("values", "codes", "folds", "reference")
"""What of a probe, and of its held-out scores, is numbers."""


def by_layer(
    series: Mapping[str, Any],
    layers: Sequence[Any],
    axis: str,
    measure: str,
    title: str,
    references: Mapping[str, float],
) -> Figure:
    """Curves (mean, low, high) over layers, which keep their names where these are no numbers; none exceeds 1."""
    numbered = all(isinstance(layer, int) for layer in layers)
    places = list(layers) if numbered else list(range(len(layers)))
    series = {name: (mean, low, np.minimum(high, 1)) for name, (mean, low, high) in series.items()}
    figure = plots.curves(places, series, x_label=axis, y_label=measure, title=title, references=references)
    if not numbered:
        figure.axes[0].set_xticks(places, [str(layer) for layer in layers], rotation=30 if len(layers) > 6 else 0)
    return figure
