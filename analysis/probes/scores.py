"""How good a probe is on examples that it was not fitted on: every measure keeps one value an example.

Balanced accuracy, AUC and R² are no plain means over examples, yet each can be written as one: the measure plus what
the example adds to it (its influence, in the delta method). The mean of the values is the measure exactly, their
standard error is that of the measure (DeLong's, for the AUC), and two probes on the same examples can be paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.results import Result
from analysis.similarity import placements
from surgery.errors import SurgeryError


@dataclass(frozen=True, eq=False)
class Scores:
    """Values of a probe at examples, and their labels."""

    values: np.ndarray
    """(examples, layer, rows): of two classes above 0 for the second; of numbers the predicted number."""
    codes: np.ndarray
    """(examples,) the right class, as a place in `classes`, or the right number."""
    classes: list[Any]
    """Empty for numbers."""
    layers: list[Any]
    folds: np.ndarray
    """(examples,) which fit gave the value: only examples of one fit are ranked among each other for the AUC."""
    reference: np.ndarray
    """(examples,) the answer without a look: the most frequent class, or the mean, of what was fitted."""
    axis: str = "layer"
    name: str = "probe"
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    # ---- what it says

    @property
    def codes_predicted(self) -> np.ndarray:
        """(examples, layer) places in `classes`, or numbers."""
        if not self.classes:
            return self.values[..., 0]
        return (self.values[..., 0] > 0).astype(int) if len(self.classes) == 2 else self.values.argmax(-1)

    @property
    def predicted(self) -> np.ndarray:
        """(examples, layer) labels, or numbers."""
        if not self.classes:
            return self.values[..., 0]
        labels = np.empty(len(self.classes), dtype=object)
        labels[:] = self.classes
        return labels[self.codes_predicted]

    # ---- how good that is

    @property
    def correct(self) -> Result:
        """1 where the predicted class is the right one, else 0; its mean is the plain accuracy."""
        self._classes("correct")
        return self._result(self.codes_predicted == self.codes[:, None], "plain accuracy")

    @property
    def accuracy(self) -> Result:
        """Class-balanced accuracy: the mean over the classes of the share of their examples that are right."""
        self._classes("accuracy")
        return self._result(
            balanced(self.codes_predicted == self.codes[:, None], self.codes), "class-balanced accuracy"
        )

    @property
    def auc(self) -> Result:
        """Area under the ROC curve; of several classes the mean of each against the rest. Ties count half.

        Only examples that one fit scored are compared, so that fits of different scale do no harm. NaN where no fold
        holds a class and another.
        """
        self._classes("auc")
        if len(self.classes) == 2:
            return self._result(auc_values(self.values[..., 0], self.codes == 1, self.folds), "AUC")
        odds = against_the_rest(self.values)
        each = [auc_values(odds[..., c], self.codes == c, self.folds) for c in range(len(self.classes))]
        return self._result(np.mean(each, axis=0), "AUC (mean of one against the rest)")

    @property
    def r2(self) -> Result:
        """R² = 1 - sum (y - predicted)² / sum (y - mean)², with the mean of the examples that were fitted."""
        if self.classes:
            raise SurgeryError("A probe for classes has no R².", hint="See .accuracy and .auc, or use kind='ridge'.")
        left = (self.codes[:, None] - self.values[..., 0]) ** 2
        spread = ((self.codes - self.reference) ** 2)[:, None]
        share = left.mean(0) / spread.mean()
        return self._result(1 - share - (left - share * spread) / spread.mean(), "R²")

    @property
    def score(self) -> Result:
        """Class-balanced accuracy, or R² of numbers."""
        return self.accuracy if self.classes else self.r2

    @property
    def baseline(self) -> Result:
        """The same measure for the answer without a look: (examples,). `meta["plain"]` is its plain accuracy."""
        if not self.classes:
            return Result.of(np.zeros(len(self.codes)), name="R² of the mean", columns=self._columns())
        right = self.reference == self.codes
        values = balanced(right[:, None], self.codes)[:, 0]
        return Result.of(values, name="majority", columns=self._columns(), meta={"plain": float(right.mean())})

    # ----

    def _classes(self, what: str) -> None:
        if not self.classes:
            raise SurgeryError(f"A ridge probe predicts numbers and has no .{what}.", hint="See .r2.")

    def _columns(self) -> dict[str, list[Any]]:
        labels = [self.classes[c] for c in self.codes] if self.classes else self.codes.tolist()
        return {**{k: list(v) for k, v in self.columns.items()}, "label": labels, "fold": self.folds.tolist()}

    def _result(self, values: np.ndarray, what: str) -> Result:
        axes = {"example": range(len(values)), self.axis: self.layers}
        return Result(values, axes, what, self._columns(), {"probe": self.name})


def balanced(right: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """One value an example, whose mean is the class-balanced accuracy: right (examples, ...), codes (examples,)."""
    right = right.astype(np.float64)
    there, place, counts = np.unique(codes, return_inverse=True, return_counts=True)
    recall = np.stack([right[place == i].mean(0) for i in range(len(there))])
    weight = (len(codes) / (len(there) * counts))[place].reshape(-1, *[1] * (right.ndim - 1))
    return recall.mean(0) + weight * (right - recall[place])


def auc_values(values: np.ndarray, positive: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """One value an example, whose mean is the AUC over all pairs within a fold: values (examples, ...)."""
    won, pairs = np.zeros(values.shape), np.zeros((len(values), *[1] * (values.ndim - 1)))
    for fold in np.unique(folds):
        upper, lower = np.flatnonzero((folds == fold) & positive), np.flatnonzero((folds == fold) & ~positive)
        if len(upper) and len(lower):
            pairs[upper], pairs[lower] = len(lower), len(upper)
            for index, share in zip((upper, lower), placements(values[upper], values[lower]), strict=True):
                won[index] = share * pairs[index]
    total = pairs.sum() / 2
    if not total:
        return np.full(values.shape, np.nan)
    area = won.sum(0) / (2 * total)
    return area + len(values) * (won - area * pairs) / total


def against_the_rest(values: np.ndarray) -> np.ndarray:
    """Log-odds of each class (..., classes): in the order of its probability, without that being rounded to 0 or 1."""
    others = [np.logaddexp.reduce(np.delete(values, c, axis=-1), axis=-1) for c in range(values.shape[-1])]
    return values - np.stack(others, axis=-1)
