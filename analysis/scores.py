"""Everything that one evaluation tells about a model, and two models held against each other on the same rows.

base, tuned = (score(folder, rows, samples=16, pass_at=[1, 4, 16]) for folder in ("base", "tuned"))
tuned.summary("category"), tuned.against(base)["accuracy"], plot({"tuned": tuned, "base": base})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.comparison import Comparison, compare
from analysis.evaluate import evaluate, labels_of
from analysis.likelihood import answer_log_likelihood, perplexity
from analysis.passk import majority_at_k, pass_at_k
from analysis.prompts import Progress
from analysis.results import Result
from analysis.rows import stated_answer
from surgery.errors import SurgeryError
from surgery.models import load

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Scores:
    """The results of one model, each with one value (or line of values) a row; what was not asked for is None."""

    accuracy: Result
    """Right or wrong, averaged over the samples of a row."""
    pass_at: Result | None = None
    majority: Result | None = None
    likelihood: Result | None = None

    @property
    def results(self) -> dict[str, Result]:
        """What there is, by name; pass@k and maj@k one k at a time."""
        found = {"accuracy": self.accuracy}
        for each in (self.pass_at, self.majority):
            for i, k in enumerate(each.axes["k"] if each is not None else ()):
                name = f"{each.name[:-1]}{k}"  # type: ignore[union-attr]
                found[name] = Result.of(each.values[:, i], each.labels, name=name, columns=each.columns)  # type: ignore[union-attr]
        return found | ({} if self.likelihood is None else {"log-likelihood": self.likelihood})

    @property
    def perplexity(self) -> float | None:
        """Of all right answers together."""
        return None if self.likelihood is None else perplexity(self.likelihood)

    def by(self, column: str) -> dict[Any, Scores]:
        """The same for each group of rows; numbers in their order, words as they first occur."""
        if column not in self.accuracy.columns:
            raise SurgeryError(f"There is no column '{column}'.", hint=f"Columns: {', '.join(self.accuracy.columns)}.")
        groups = list(dict.fromkeys(self.accuracy.columns[column]))
        if all(isinstance(group, (int, float)) for group in groups):
            groups.sort()
        parts = [r and r.by(column) for r in (self.accuracy, self.pass_at, self.majority, self.likelihood)]
        return {group: Scores(*(part and part[group] for part in parts)) for group in groups}  # type: ignore[arg-type]

    def against(self, other: Scores) -> dict[str, Comparison]:
        """Paired differences (this - other) of everything that both have."""
        theirs = other.results
        return {name: compare(mine, theirs[name]) for name, mine in self.results.items() if name in theirs}

    def summary(self, by: str | None = None) -> dict[str, Any]:
        """n, each result with its interval, perplexity, the share of truncated completions, and the same by group."""
        told: dict[str, Any] = {"n": len(self.accuracy)}
        told |= {name: result.summary() for name, result in self.results.items()}
        if self.perplexity is not None:
            told["perplexity"] = round(self.perplexity, 6)
        told["truncated"] = round(float(np.mean(self.accuracy.columns["truncated"])), 6)
        if by is not None:
            told["by"] = {"column": by, "groups": [{by: g, **part.summary()} for g, part in self.by(by).items()]}
        return told

    def save(self, folder: str | Path) -> list[Path]:
        """Writes every result into `folder` (accuracy.json, pass_at.json, ...), to be read by `Result.load`."""
        parts = {"accuracy": self.accuracy, "pass_at": self.pass_at, "majority": self.majority,
                 "likelihood": self.likelihood}  # fmt: skip
        return [result.save(Path(folder) / name) for name, result in parts.items() if result is not None]


def score(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    samples: int | None = None,
    pass_at: Sequence[int] = (),
    majority: bool = False,
    likelihood: bool = False,
    chat: bool = False,
    batch_size: int = 128,
    progress: Progress | None = None,
    **settings: Any,
) -> Scores:
    """Accuracy of `model` (as `analysis.evaluate.evaluate` takes it, with `settings`), and what else is asked for.

    `pass_at` are the k of pass@k, and of maj@k with `majority` (else maj@samples); without `samples` the largest k are
    drawn. `likelihood` is that of each row's `completion`, which needs a model or a composition of models. Raises
    `SurgeryError` for a k that is not in 1..samples and for rows without completion, before anything is generated.
    """
    ks = sorted(set(pass_at))
    samples = samples or (ks[-1] if ks else None)
    if majority and samples is None:
        raise SurgeryError("A majority vote needs several samples a prompt.", hint="Add --samples 16.")
    if samples is not None and (wrong := [k for k in ks if not 1 <= k <= samples]):
        raise SurgeryError(f"pass@{wrong[0]} can't be told from {samples} samples a prompt.",
                           hint=f"Draw more samples, or choose k from 1 to {samples}.")  # fmt: skip
    if likelihood and (bad := [i for i, row in enumerate(rows) if not row.get("completion")]):
        raise SurgeryError(f"Row {bad[0]} has no completion whose likelihood could be measured.")
    if isinstance(model, (str, Path)):
        model, tokenizer = load(model)
    if likelihood and not (hasattr(model, "forward") or hasattr(model, "prefill_encoded")):
        raise SurgeryError(f"A {type(model).__name__} has no likelihood of given answers.", hint="Leave it out.")
    total = len(rows) * (2 if likelihood else 1)
    ahead: Progress | None = progress and (lambda done, _: progress(done, total))
    found = evaluate(model, rows, tokenizer=tokenizer, samples=samples, chat=chat, batch_size=batch_size,
                     progress=ahead, **settings)  # fmt: skip
    passed = pass_at_k(found, ks) if ks else None
    voted = None
    if majority:
        said = [[stated_answer(text) for text in texts] for texts in found.columns["completion"]]
        voted = majority_at_k(found, said, ks or [len(found.axes["sample"])])
    likely = None
    if likelihood:
        kept = [rows[i] for i in found.columns["row"]]
        behind: Progress | None = progress and (lambda done, _: progress(len(rows) + done, total))
        likely = answer_log_likelihood(model, tokenizer, [row["prompt"] for row in kept],
                                       [row["completion"] for row in kept], chat=chat, progress=behind)  # fmt: skip
        shared = {name: found.columns[name] for name in labels_of(rows)}
        likely = Result(likely.values, likely.axes, likely.name, {**likely.columns, **shared})
    return Scores(found if samples is None else found.over("sample"), passed, voted, likely)


def plot(scores: Mapping[str, Scores], by: str = "task") -> Figure:
    """Models side by side: pass@k and maj@k over k where they were measured, else accuracy by a column."""
    from analysis.plots import curves, intervals

    first = next(iter(scores.values()))
    if first.pass_at is not None and len(first.pass_at.axes["k"]) > 1:
        ks = first.pass_at.axes["k"]
        several = len(scores) > 1
        series = {
            f"{label}: {result.name}" if several else result.name: (result.mean, *result.interval())
            for label, each in scores.items()
            for result in (each.pass_at, each.majority)
            if result is not None
        }
        figure = curves(ks, series, x_label="samples k", y_label="share of problems", log_x=True,
                        title="" if several else f"{next(iter(scores))}, n = {len(first.accuracy)}")  # fmt: skip
        axis = figure.axes[0]
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.set_xticks([], minor=True)
        return figure
    groups = list(first.by(by))
    series = {}
    for label, each in scores.items():
        parts = [part.accuracy for part in each.by(by).values()]
        ends = np.array([part.interval() for part in parts], dtype=float)
        series[label] = (np.array([part.mean for part in parts]), ends[:, 0], ends[:, 1])
    return intervals(series, groups, y_label="accuracy", group_label=by)
