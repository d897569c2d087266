"""Fits of linear probes, all layers at once: arrays in, directions and intercepts out.

| kind              | what is fitted                                                       | options      |
|-------------------|----------------------------------------------------------------------|--------------|
| `logistic`        | L2-regularised (multinomial) logistic regression, by scikit-learn    | `Cs`         |
| `mean_difference` | the vector between class means, cut at their midpoint                |              |
| `lda`             | linear discriminants with a shrunk within-class covariance           | `shrinkage`  |
| `ridge`           | ridge regression on a number, alpha by exact leave-one-out errors    | `alphas`     |

A fit takes x (layer, examples, d) in float64 and y (examples,): class numbers, or numbers for `ridge`. Every class
weighs the same, however many examples it has. All but `mean_difference` work on standardised features (by the mean and
spread of the examples that are fitted) and hand back directions for the features as they are.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from surgery.errors import SurgeryError
from surgery.registry import Registry

CS = tuple(10.0**k for k in range(-4, 2))
ALPHAS = tuple(10.0 ** (k / 2) for k in range(-2, 13))
BLOCK = 2**25
"""Numbers that the layers of one call may hold (256 MB)."""

Splits = Callable[[], Sequence[tuple[np.ndarray, np.ndarray]]]
"""Gives pairs of train and test indices of the examples that are fitted, for options that are chosen by testing."""


class Fit(NamedTuple):
    """A linear function of the features: x @ directions.T + intercepts, by layer."""

    directions: np.ndarray
    """(layer, rows, d). One row for two classes (above 0 is the second) and for numbers; else one a class."""
    intercepts: np.ndarray
    """(layer, rows)."""
    chosen: np.ndarray
    """(layer,) C, shrinkage or alpha; NaN where there is nothing to choose."""


KINDS: Registry[Callable[..., Fit]] = Registry("kind of probe")


def fit(kind: str, x: np.ndarray, y: np.ndarray, splits: Splits, /, **options: Any) -> Fit:
    """The probe `kind` fitted to x (examples, layer, d), some layers at a time for the memory.

    Raises `SurgeryError` for an unknown kind or option.
    """
    one = KINDS.lookup(kind)
    known = [p.name for p in inspect.signature(one).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := [name for name in options if name not in known]:
        raise SurgeryError(f"A {kind} probe has no option '{unknown[0]}'.",
                           hint=f"It takes {', '.join(known)}." if known else "It has none.")  # fmt: skip
    n, layers, d = x.shape
    step = max(1, BLOCK // (3 * n * d + min(n, d) * (d + n)))
    parts = [
        one(x[:, i : i + step].astype(np.float64).transpose(1, 0, 2), y, splits, **options)
        for i in range(0, layers, step)
    ]
    return Fit(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def decide(x: np.ndarray, directions: np.ndarray, intercepts: np.ndarray) -> np.ndarray:
    """Values (examples, layer, rows) of the linear functions at x (examples, layer, d)."""
    layers = zip(directions, intercepts, strict=True)
    return np.stack([x[:, i].astype(np.float64) @ w.T + b for i, (w, b) in enumerate(layers)], axis=1)


# ---- standardising


def standardise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (..., examples, d) with mean 0 and spread 1, its mean and its spread (..., d); constant features become 0."""
    mean, spread = x.mean(-2), x.std(-2)
    constant = spread <= 1e-12 * np.abs(x).max(-2)
    spread = np.where(constant, 1.0, spread)
    scaled = (x - mean[..., None, :]) / spread[..., None, :]
    scaled.swapaxes(-1, -2)[constant] = 0.0
    return scaled, mean, spread


def _back(w: np.ndarray, b: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The linear function w z + b of z = (x - mean) / spread as one of x; rows on the axis before the last."""
    w = w / spread[..., None, :]
    return w, b - (w * mean[..., None, :]).sum(-1)


def _rows(w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One function a class: of two the second minus the first, of more each minus their mean (which says the same)."""
    if w.shape[-2] == 2:
        return w[..., 1:, :] - w[..., :1, :], b[..., 1:] - b[..., :1]
    return w - w.mean(-2, keepdims=True), b - b.mean(-1, keepdims=True)


def _class_means(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(layer, classes, d)."""
    return np.stack([x[:, y == c].mean(1) for c in range(int(y.max()) + 1)], axis=1)


# ---- closed forms


@KINDS.register("mean_difference")
def mean_difference(x: np.ndarray, y: np.ndarray, splits: Splits) -> Fit:
    """The vector from the mean of the first class to that of the second, in the features as they are: the vector that
    steers. The threshold is the midpoint; of several classes the nearest mean wins (Marks & Tegmark 2023,
    arXiv:2310.06824, without their whitening, which is `lda`)."""
    means = _class_means(x, y)
    w, b = _rows(means, -(means**2).sum(-1) / 2)
    return Fit(w, b, np.full(len(x), np.nan))


@KINDS.register("lda")
def lda(x: np.ndarray, y: np.ndarray, splits: Splits, *, shrinkage: float | str = "ledoit_wolf") -> Fit:
    """Linear discriminant analysis (Fisher 1936) with equal priors and the mean of the classes' covariances, shrunk:
    S = (1 - a) S + a tr(S) / d. `shrinkage` is a, or "ledoit_wolf" for their estimate by layer (2004, JMVA 88)."""
    if not (shrinkage == "ledoit_wolf" or (isinstance(shrinkage, int | float) and 0 <= shrinkage <= 1)):
        raise SurgeryError(f"shrinkage={shrinkage!r}: expected a number from 0 to 1, or 'ledoit_wolf'.")
    z, mean, spread = standardise(x)
    means = _class_means(z, y)
    counts = np.bincount(y)
    n, d = z.shape[1:]
    within = (z - means[:, y]) * np.sqrt(n / (len(counts) * counts))[y][:, None]  # S = within' within / n
    values, vectors = _eigen(within)
    values = values / n
    size = (within**2).sum((1, 2)) / (n * d)
    a = ledoit_wolf(within, (values**2).sum(1)) if isinstance(shrinkage, str) else np.full(len(z), float(shrinkage))
    floor = a * size
    scale = (1 - a)[:, None] * values + floor[:, None]
    tiny = 1e-13 * np.maximum(values.max(1), size)
    inverse = np.where(scale > tiny[:, None], 1 / np.maximum(scale, 1e-300), 0.0)  # of a singular S the pseudo-inverse
    outside = np.where(floor > tiny, 1 / np.maximum(floor, 1e-300), 0.0)
    along = means @ vectors
    rest = means - along @ vectors.swapaxes(1, 2)
    w = outside[:, None, None] * rest + (along * inverse[:, None, :]) @ vectors.swapaxes(1, 2)
    w, b = _rows(w, -(w * means).sum(-1) / 2)
    return Fit(*_back(w, b, mean, spread), a)


def ledoit_wolf(x: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Ledoit and Wolf's (2004) share a of the identity for centred x (layer, n, d); `square` is ||x'x / n||²."""
    n, d = x.shape[1:]
    norms = (x**2).sum(2)
    size = norms.sum(1) / (n * d)
    spread = (norms**2).sum(1) / n**2 - square / n  # how much the estimate of the covariance varies
    far = square - d * size**2  # how far it is from the identity
    return np.where(spread > 0, np.minimum(spread, far) / np.maximum(far, 1e-300), 0.0).clip(0, 1)


def _eigen(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (layer, r) and vectors (layer, d, r) of x'x, r the smaller of examples and d; null vectors are 0."""
    n, d = x.shape[1:]
    if d <= n:
        values, vectors = np.linalg.eigh(x.swapaxes(1, 2) @ x)
        return values.clip(0), vectors
    values, u = np.linalg.eigh(x @ x.swapaxes(1, 2))
    values = np.where(values > 1e-13 * values.max(1, keepdims=True), values, 0.0)
    return values, x.swapaxes(1, 2) @ (u / np.sqrt(np.where(values > 0, values, np.inf))[:, None, :])


@KINDS.register("ridge")
def ridge(x: np.ndarray, y: np.ndarray, splits: Splits, *, alphas: Sequence[float] = ALPHAS) -> Fit:
    """Ridge regression ||y - xw - b||² + alpha ||w||² (Hoerl & Kennard 1970), alpha by `leave_one_out` by layer."""
    _positive("alphas", alphas)
    z, mean, spread = standardise(x)
    errors, values, u, g = _ridge(z, y, alphas)
    alpha = np.array(alphas, dtype=np.float64)[(errors**2).mean(2).argmin(1)]
    w = (z.swapaxes(1, 2) @ (u @ (g / (values + alpha[:, None]))[:, :, None])).swapaxes(1, 2)
    return Fit(*_back(w, np.full((len(z), 1), y.mean()), mean, spread), alpha)


def leave_one_out(x: np.ndarray, y: np.ndarray, alphas: Sequence[float]) -> np.ndarray:
    """Errors (layer, alpha, examples) of ridge regressions at the example that each was fitted without, exactly.

    One eigendecomposition of the smaller Gram matrix serves all alphas: e_i = (y_i - f_i) / (1 - h_ii), with the fit f
    to all examples and the hat matrix h (intercept included). x (layer, examples, d) is centred, not scaled.
    """
    return _ridge(x - x.mean(1, keepdims=True), y, alphas)[0]


def _ridge(z: np.ndarray, y: np.ndarray, alphas: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Leave-one-out errors, eigenvalues (layer, r), left vectors u (layer, n, r) of centred z, and u'y."""
    n, d = z.shape[1:]
    centred = y - y.mean()
    if n <= d:
        values, u = np.linalg.eigh(z @ z.swapaxes(1, 2))
        values = values.clip(0)
    else:
        values, vectors = np.linalg.eigh(z.swapaxes(1, 2) @ z)
        values = np.where(values > 1e-13 * values.max(1, keepdims=True), values, 0.0)
        u = z @ (vectors / np.sqrt(np.where(values > 0, values, np.inf))[:, None, :])
    g = centred @ u
    errors = np.empty((len(z), len(alphas), n))
    for i, alpha in enumerate(alphas):
        kept = values / (values + alpha)
        left = centred - (u @ (kept * g)[:, :, None])[:, :, 0]
        hat = 1 / n + (u**2 @ kept[:, :, None])[:, :, 0]
        errors[:, i] = left / (1 - hat)
    return errors, values, u, g


# ---- logistic regression


@KINDS.register("logistic")
def logistic(x: np.ndarray, y: np.ndarray, splits: Splits, *, Cs: Sequence[float] = CS) -> Fit:
    """min over w, b of C sum_i s_i loss_i + ||w||² / 2 with weights s_i that make the classes equal, by scikit-learn.

    C is the one with the least class-balanced log-loss on the held-out parts of `splits`, in each layer by itself, with
    features standardised on the other parts; of equals the smallest. A single C is taken as it is.
    """
    _positive("Cs", Cs)
    grid = sorted(map(float, Cs))
    held = splits() if len(grid) > 1 else []
    parts = []
    for layer in x:
        C = grid[0] if len(grid) == 1 else grid[int(np.argmin(_held_out_loss(layer, y, grid, held)))]
        z, mean, spread = standardise(layer)
        (found,) = _path(z, y, [C], tol=1e-9)
        parts.append((*_back(*found, mean, spread), np.array(C)))
    return Fit(*(np.stack(part) for part in zip(*parts, strict=True)))


def _held_out_loss(
    x: np.ndarray, y: np.ndarray, grid: list[float], held: Sequence[tuple[np.ndarray, ...]]
) -> np.ndarray:
    """(C,) class-balanced log-loss in nats over the held-out examples."""
    losses, tested = np.zeros((len(grid), len(y))), np.zeros(len(y), dtype=bool)
    for train, test in held:
        z, mean, spread = standardise(x[train])
        for i, found in enumerate(_path(z, y[train], grid, tol=1e-5)):
            w, b = _back(*found, mean, spread)
            losses[i, test] = -log_probabilities(x[test] @ w.T + b)[np.arange(len(test)), y[test]]
        tested[test] = True
    seen = [tested & (y == c) for c in range(int(y.max()) + 1)]
    return np.mean([losses[:, part].mean(1) for part in seen if part.any()], axis=0)


def _path(z: np.ndarray, y: np.ndarray, grid: Sequence[float], tol: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(directions, intercepts) for growing C, each begun where the last one ended.

    With fewer examples than features the solution lies in the span of the examples: it is sought there, in coordinates
    on an orthonormal basis, in which the penalty is the same.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    n, d = z.shape
    basis = np.linalg.qr(z.T)[0] if n < d else None
    z = z if basis is None else z @ basis
    few = y.max() == 1 and z.shape[1] <= 128  # a Newton step costs d³, and there are few of them
    model = LogisticRegression(solver="newton-cholesky" if few else "lbfgs", class_weight="balanced", tol=tol,
                               max_iter=20_000, warm_start=True)  # fmt: skip
    for C in grid:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # lbfgs stops short of a tolerance near rounding
            model.set_params(C=C).fit(z, y)
        w, b = model.coef_, model.intercept_
        yield (w.copy() if basis is None else w @ basis.T), b.copy()


def log_probabilities(values: np.ndarray) -> np.ndarray:
    """Log-probabilities (..., classes) of a linear function's values: one row (..., 1) for two classes, or one each."""
    if values.shape[-1] == 1:
        values = np.concatenate([np.zeros_like(values), values], axis=-1)
    return values - np.logaddexp.reduce(values, axis=-1, keepdims=True)


def _positive(name: str, numbers: Sequence[float]) -> None:
    if not len(numbers) or not all(np.isfinite(n) and n > 0 for n in numbers):
        raise SurgeryError(f"{name} must be finite numbers above 0: found {list(numbers)}.")
