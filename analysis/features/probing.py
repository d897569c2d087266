"""k-sparse probing: how well do k latents alone tell labels, and how much of that is choice?

    codes, raw = pooled(reader, texts)                    # a row a text; or a row a token: reader.read
    found = sparse_probe(codes, labels, raw, ks=(1, 2, 5, 20))
    found.correct.select("k", 5), found.raw, found.chosen[1], found.plot()

Of the latents the k whose mean differs most between the classes are chosen on the examples that are fitted, and a
logistic probe of them alone is measured on those held out (Gurnee et al. 2023, arXiv:2305.01610; SAEBench,
arXiv:2503.09532). It stands between two others: k latents drawn by chance, and a probe of all raw activations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.features.reader import Reader
from analysis.results import Result
from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.sae.codes import Codes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pool = Literal["mean", "max", "last"]
SELECTIONS: Registry[Callable[..., np.ndarray]] = Registry("way to choose latents")


@dataclass(frozen=True, eq=False)
class SparseProbe:
    """What `sparse_probe` finds; every example was held out once."""

    correct: Result
    """(example, latents, k): 1 where the probe is right, of latents "chosen" and of those drawn "at random"."""
    raw: Result | None
    """(example,) the same of a probe on all raw activations."""
    majority: float
    """Accuracy of the most frequent label."""
    chosen: dict[int, list[list[int]]]
    """By k, of each fold: the chosen latents, the best first."""

    @property
    def accuracy(self) -> np.ndarray:
        """(2, k) mean of `correct`."""
        return self.correct.mean

    def stable(self, k: int) -> list[tuple[int, int]]:
        """(latent, folds that chose it), the most often chosen first."""
        latents, counts = np.unique(np.concatenate(self.chosen[k]), return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [(int(latents[i]), int(counts[i])) for i in order]

    def plot(self, title: str = "") -> Figure:
        """Held-out accuracy by k with 95 % intervals, its control, and the levels of raw activations and majority."""
        from analysis.plots import curves

        ks = self.correct.axes["k"]
        series: dict[str, Any] = {}
        for which in self.correct.axes["latents"]:
            one = self.correct.select("latents", which)
            series[f"latents {which}"] = (one.mean, *one.interval())
        levels = {"majority": self.majority}
        if self.raw is not None:
            levels["all raw activations"] = float(self.raw.mean)
        figure = curves(list(range(len(ks))), series, x_label="latents that the probe reads", references=levels,
                        y_label="held-out accuracy", title=title or "k-sparse probing")  # fmt: skip
        figure.axes[0].set_xticks(range(len(ks)), [str(k) for k in ks])
        return figure


def sparse_probe(
    codes: Codes | np.ndarray | Any,
    labels: Sequence[Any],
    raw: Any = None,
    *,
    ks: Sequence[int] = (1, 2, 5, 20),
    select: str = "mean_difference",
    folds: int = 5,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
) -> SparseProbe:
    """Probes on k latents, each example predicted by a probe that neither chose nor was fitted with it.

    `codes` (examples, latents) are sparse codes, a SciPy matrix or an array; `raw` (examples, d) the activations.
    `select` is "mean_difference" (of the classes' means, the greatest of any class against the rest) or "l1" (by an
    L1-regularised logistic probe). `groups` (the text of each token) are never split between folds. Features have mean
    0 and spread 1 on the examples fitted; probes are L2-regularised with C = 1, classes weigh the same.
    Raises `SurgeryError` for labels that are one class or do not fit, fewer of a class than folds, and k beyond the
    latents.
    """
    matrix, y, names = _checked(codes, labels, ks, folds)
    pick = SELECTIONS.lookup(select)
    x = None if raw is None else np.asarray(raw, dtype=np.float64)
    if x is not None and (x.ndim != 2 or len(x) != len(y)):
        raise SurgeryError(f"Raw activations are (examples, d): found {x.shape} of {len(y)} examples.")
    rng = np.random.default_rng(seed)
    right, plain = np.zeros((len(y), 2, len(ks))), np.zeros(len(y))
    chosen: dict[int, list[list[int]]] = {int(k): [] for k in ks}
    used = np.flatnonzero(np.diff(matrix.indptr))
    for fit, test in _splits(y, folds, groups, seed):
        if len(set(y[fit].tolist())) < 2:
            raise SurgeryError("All examples of a label are in one group, so that without it there is none to fit on.",
                               hint="Give more groups of each label, or lower folds=.")  # fmt: skip
        part = matrix[:, fit]
        for i, k in enumerate(ks):
            best = pick(part, y[fit], int(k))
            chosen[int(k)].append(best.tolist())
            drawn = rng.choice(used, size=min(int(k), len(used)), replace=False)
            for j, latents in enumerate((best, drawn)):
                dense = matrix[latents].toarray().T
                right[test, j, i] = _predicted(dense[fit], y[fit], dense[test]) == y[test]
        if x is not None:
            plain[test] = _predicted(x[fit], y[fit], x[test]) == y[test]
    axes: dict[str, Any] = {"example": range(len(y)), "latents": ["chosen", "at random"], "k": [int(k) for k in ks]}
    columns = {"label": [names[c] for c in y]}
    correct = Result(right, axes, "held-out accuracy", columns, {"select": select, "folds": folds, "seed": seed})
    level = float(np.bincount(y).max() / len(y))
    reference = None if x is None else Result.of(plain, name="held-out accuracy, raw", columns=columns)
    return SparseProbe(correct, reference, level, chosen)


def pooled(reader: Reader, texts: Any, pool: Pool = "mean") -> tuple[Any, np.ndarray]:
    """A row a text: codes (texts, latents) as a SciPy matrix, and raw activations (texts, d_in).

    The mean or the maximum over the tokens that count, or the last of them. Raises `SurgeryError` for a text without
    such a token.
    """
    from scipy.sparse import coo_matrix, vstack

    if pool not in ("mean", "max", "last"):
        raise SurgeryError(f"Texts are not pooled by {pool!r}.", hint="'mean', 'max' or 'last'.")
    parts, raw = [], []
    for read in reader.read(texts):
        text, layout = read.texts.cpu().numpy(), read.codes.layout
        counts = np.bincount(text, minlength=len(read.batch))
        if not counts.all():
            raise SurgeryError("A text has no token that counts: the first of each is left out.",
                               hint="Leave texts of one token out, or Reader(..., keep=real_tokens(0)).")  # fmt: skip
        starts = np.cumsum(counts) - counts
        x = read.rows.cpu().double().numpy()
        raw.append({"mean": lambda: np.add.reduceat(x, starts) / counts[:, None],  # noqa: B023
                    "max": lambda: np.maximum.reduceat(x, starts),  # noqa: B023
                    "last": lambda: x[starts + counts - 1]}[pool]())  # noqa: B023  # fmt: skip
        token, latent = layout.rows.cpu().numpy(), layout.index.cpu().numpy()
        value = read.codes.values.cpu().double().numpy()
        shape = (len(counts), reader.dictionary.latents)
        if pool == "last":
            ends = np.isin(token, starts + counts - 1)
            token, latent, value = token[ends], latent[ends], value[ends]
        if pool == "max":
            order = np.lexsort((-value, latent, text[token]))
            token, latent, value = token[order], latent[order], value[order]
            new = (np.diff(text[token], prepend=-1) != 0) | (np.diff(latent, prepend=-1) != 0)
            token, latent, value = token[new], latent[new], value[new]
        elif pool == "mean":
            value = value / counts[text[token]]
        parts.append(coo_matrix((value, (text[token], latent)), shape=shape))
    return vstack(parts, format="csr"), np.concatenate(raw)


def _checked(codes: Any, labels: Sequence[Any], ks: Sequence[int], folds: int) -> tuple[Any, np.ndarray, list[Any]]:
    """(latents, examples) CSR, class numbers and class names."""
    from scipy.sparse import csr_matrix, issparse

    if isinstance(codes, Codes):
        layout = codes.layout
        index = (layout.rows.cpu().numpy(), layout.index.cpu().numpy())
        codes = csr_matrix((codes.values.detach().cpu().double().numpy(), index), shape=(len(layout), layout.latents))
    if isinstance(codes, tuple):
        raise SurgeryError("Codes are one matrix, found several things.", hint="codes, raw = pooled(reader, texts)")
    matrix = csr_matrix(codes if issparse(codes) else np.asarray(codes, dtype=np.float64))
    matrix.eliminate_zeros()
    if matrix.shape[0] != len(labels):
        raise SurgeryError(f"There are {matrix.shape[0]} rows of codes and {len(labels)} labels.")
    names = sorted(set(labels), key=str)
    y = np.array([names.index(label) for label in labels], dtype=np.int64)
    if len(names) < 2:
        raise SurgeryError("All labels are the same: there is nothing to tell apart.")
    if (few := np.bincount(y).min()) < folds or folds < 2:
        raise SurgeryError(f"{folds} folds need as many examples of each label, at least 2: "
                           f"{names[int(np.bincount(y).argmin())]!r} has {few}.", hint="Lower folds=.")  # fmt: skip
    if not matrix.nnz:
        raise SurgeryError("No latent is active in any example.")
    if not ks or not all(1 <= k <= matrix.shape[1] for k in ks):
        raise SurgeryError(f"k is from 1 to the {matrix.shape[1]} latents, and not {list(ks)}.")
    return csr_matrix(matrix.T), y, names


def _splits(y: np.ndarray, folds: int, groups: Any, seed: int) -> Any:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if groups is None:
        return StratifiedKFold(folds, shuffle=True, random_state=seed).split(y[:, None], y)
    if len(groups) != len(y):
        raise SurgeryError(f"There are {len(groups)} groups and {len(y)} examples.")
    if len(set(groups)) < folds:
        raise SurgeryError(f"{folds} folds need as many groups, and there are {len(set(groups))}.")
    return StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(y[:, None], y, list(groups))


def _predicted(fit: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, spread = fit.mean(0), fit.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    model = LogisticRegression(max_iter=2000, class_weight="balanced")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((fit - mean) / spread, y)
    return model.predict((test - mean) / spread)


@SELECTIONS.register("mean_difference")
def mean_difference(matrix: Any, y: np.ndarray, k: int) -> np.ndarray:
    """The k latents of (latents, examples) whose mean in one class is farthest from that in the others."""
    apart = np.zeros(matrix.shape[0])
    for c in range(int(y.max()) + 1):
        inside, others = matrix[:, y == c].mean(1), matrix[:, y != c].mean(1)
        apart = np.maximum(apart, np.abs(np.asarray(inside - others)).reshape(-1))
    return np.argsort(-apart, kind="stable")[:k]


@SELECTIONS.register("l1")
def l1(matrix: Any, y: np.ndarray, k: int) -> np.ndarray:
    """The k greatest coefficients, on codes of spread 1, of the first logistic probe on a path of growing C that has k.

    Where the path ends before, those that there are, and the latents that differ most in their mean behind them.
    """
    from scipy.sparse import diags
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    square, mean = (np.asarray(m.mean(1)).reshape(-1) for m in (matrix.multiply(matrix), matrix))
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    scaled = (diags(np.divide(1, spread, out=np.zeros_like(spread), where=spread > 0)) @ matrix).T.tocsr()
    size = np.zeros(matrix.shape[0])
    for C in 10.0 ** np.arange(-3, 2.01, 0.5):
        sizes = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            for c in range(int(y.max()) + 1) if y.max() > 1 else [1]:
                model = LogisticRegression(l1_ratio=1.0, solver="liblinear", C=C, class_weight="balanced",
                                           random_state=0)  # fmt: skip
                sizes.append(np.abs(model.fit(scaled, y == c).coef_[0]))
        size = np.max(sizes, axis=0)
        if (size > 0).sum() >= k:
            break
    best = [int(j) for j in np.argsort(-size, kind="stable")[:k] if size[j] > 0]
    rest = (int(j) for j in mean_difference(matrix, y, matrix.shape[0]) if j not in best)
    return np.array([*best, *rest][:k])
