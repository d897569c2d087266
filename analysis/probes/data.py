"""What a probe is given, checked: features, labels, folds, and the labels of its control task."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from surgery.errors import SurgeryError

Folds = list[tuple[np.ndarray, np.ndarray]]


class Labels(NamedTuple):
    """Labels as numbers."""

    codes: np.ndarray
    """(examples,) places in `classes`; the numbers themselves where there are none."""
    classes: list[Any]
    """The different labels in order; empty for numbers."""


def as_features(features: Any) -> tuple[np.ndarray, list[Any]]:
    """Features (examples, layer, d) in float32 or float64, and what the layers are called.

    From an array or tensor of that shape, or a dictionary layer -> (examples, d). Raises `SurgeryError` for other
    shapes, and with the name of the first layer that holds NaN or infinity.
    """
    if isinstance(features, Mapping):
        layers, parts = list(features), [_array(part) for part in features.values()]
        for layer, part in zip(layers, parts, strict=True):
            if part.ndim != 2 or part.shape != parts[0].shape:
                raise SurgeryError(f"Features of layer {layer} have shape {part.shape}, and those of layer {layers[0]} "
                                   f"{parts[0].shape}: expected (examples, d), the same in each.")  # fmt: skip
        if not parts:
            raise SurgeryError("There are no layers to probe.")
        array = np.stack(parts, axis=1)
    else:
        array = _array(features)
        layers = list(range(array.shape[1] if array.ndim > 1 else 0))
    if array.ndim != 3 or not array.size:
        raise SurgeryError(f"Features have shape {array.shape}: expected (examples, layer, d).",
                           hint="Of a single layer: features[:, None], or {layer: features}.")  # fmt: skip
    for i, layer in enumerate(layers):
        bad = ~np.isfinite(array[:, i]).all(axis=1)
        if bad.any():
            raise SurgeryError(f"Features of layer {layer} are NaN or infinite in {int(bad.sum())} of {len(bad)} "
                               f"examples, first in example {int(bad.argmax())}.")  # fmt: skip
    return array, layers


def as_labels(labels: Any, examples: int, *, numeric: bool) -> Labels:
    """Labels as class numbers, or as numbers. Raises `SurgeryError` for a wrong length or nothing to tell apart."""
    plain = listed(labels, examples, "labels")
    if numeric:
        try:
            numbers = np.array(plain, dtype=np.float64)
        except (TypeError, ValueError):
            raise SurgeryError("A ridge probe predicts numbers, and the labels are none.",
                               hint="For classes: kind='logistic', 'lda' or 'mean_difference'.") from None  # fmt: skip
        if numbers.ndim != 1 or not np.isfinite(numbers).all():
            raise SurgeryError("Labels of a ridge probe must be finite numbers, one an example.")
        if np.ptp(numbers) == 0:
            raise SurgeryError(f"All labels are {plain[0]}: there is nothing to predict.")
        return Labels(numbers, [])
    try:
        classes = sorted(set(plain))
    except TypeError:
        raise SurgeryError("Labels of a probe must be of one kind: texts, whole numbers, or true and false.") from None
    if len(classes) < 2:
        raise SurgeryError(f"All labels are {classes[0]!r}: a probe needs at least two classes.")
    place = {label: i for i, label in enumerate(classes)}
    return Labels(np.array([place[label] for label in plain]), classes)


def listed(values: Any, examples: int, what: str) -> list[Any]:
    """A plain list with one entry an example."""
    plain = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(plain) != examples:
        raise SurgeryError(f"There are {len(plain)} {what} for {examples} examples.")
    return plain


def folds_of(labels: Labels, groups: Sequence[Any] | None, folds: int, seed: int) -> Folds:
    """Train and test indices of each fold, every example tested once; a group is wholly in one fold.

    Classes are spread evenly over the folds, and shuffled by `seed`. Raises `SurgeryError` when there are fewer
    examples, examples of a class or groups than folds, or a class is missing from the training part of a fold.
    """
    from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

    n, counts = len(labels.codes), np.bincount(labels.codes) if labels.classes else np.array([])
    if folds < 2:
        raise SurgeryError(f"folds={folds}: held-out accuracy needs at least 2 folds.")
    if n < folds:
        raise SurgeryError(
            f"{n} examples can't be split into {folds} folds.", hint="Give more examples, or fewer folds."
        )
    if groups is None:
        if len(counts) and counts.min() < folds:
            rare = labels.classes[int(counts.argmin())]
            raise SurgeryError(f"Class {rare!r} has {counts.min()} examples, fewer than the {folds} folds.",
                               hint="Give more examples of it, or fewer folds.")  # fmt: skip
        kind: Any = StratifiedKFold if labels.classes else KFold
        splits = kind(folds, shuffle=True, random_state=seed).split(np.zeros(n), labels.codes)
    else:
        places = _places(listed(groups, n, "groups"))
        if places.max() + 1 < folds:
            raise SurgeryError(f"{places.max() + 1} groups can't be split into {folds} folds: a group is never cut.",
                               hint=f"Give more groups, or folds={places.max() + 1}.")  # fmt: skip
        kind = StratifiedGroupKFold if labels.classes else GroupKFold
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of small classes: see below
            splits = list(kind(folds, shuffle=True, random_state=seed).split(np.zeros(n), labels.codes, places))
    found = [(np.asarray(train), np.asarray(test)) for train, test in splits]
    for i, (train, test) in enumerate(found):
        missing = set(range(len(labels.classes))) - set(labels.codes[train].tolist() if labels.classes else [])
        if missing or not len(test):
            what = f"no example of class {labels.classes[min(missing)]!r} to train on" if missing else "nothing to test"
            raise SurgeryError(f"Fold {i} has {what}: the groups are too few, or a class is in one group only.",
                               hint="Give more groups, or fewer folds.")  # fmt: skip
    return found


def inner_folds(labels: Labels, groups: Sequence[Any] | None, seed: int, most: int = 3) -> Folds:
    """Folds of the examples that are fitted, for choosing C: up to 3, those left out that lack a class to train on."""
    for folds in range(most, 1, -1):
        try:
            return folds_of(labels, groups, folds, seed)
        except SurgeryError:
            continue
    raise SurgeryError("There are too few examples or groups of a class to choose C by cross-validation.",
                       hint="Give more, or a single C: Cs=[0.01].")  # fmt: skip


def control_labels(types: Sequence[Any], labels: Labels, folds: Folds, rng: np.random.Generator) -> Labels:
    """A label for each type, drawn from the frequencies of the task's labels, and so for each example of the type.

    Drawn again until every class is in the training part of every fold. Raises `SurgeryError` when 100 draws were not
    enough: there are too few types for the number of classes.
    """
    places = _places(listed(types, len(labels.codes), "types"))
    for _ in range(100):
        drawn = rng.choice(labels.codes, size=places.max() + 1)[places]
        kinds = [np.unique(drawn[train]) for train, _ in folds]
        if all(len(found) == len(labels.classes) if labels.classes else len(found) > 1 for found in kinds):
            return Labels(drawn, labels.classes)
    kinds_wanted = f"{len(labels.classes)} classes" if labels.classes else "different numbers"
    raise SurgeryError(f"{places.max() + 1} types are too few for a control task with {kinds_wanted}.",
                       hint="A type is what occurs again and again: the token, or the prompt.")  # fmt: skip


def seen_types(types: Sequence[Any], folds: Folds) -> float:
    """Share of examples whose type is in the training part of their fold: of others a control can only be guessed."""
    places = _places(list(types))
    return float(np.concatenate([np.isin(places[test], places[train]) for train, test in folds]).mean())


def _places(entries: Sequence[Any]) -> np.ndarray:
    """Each entry as the place of its first occurrence among the different ones."""
    first = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    return np.array([first[entry] for entry in entries])


def _array(values: Any) -> np.ndarray:
    """As NumPy has it, half precision made single."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values if values.dtype.itemsize > 2 else values.float()).numpy()
    array = np.asarray(values)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)
