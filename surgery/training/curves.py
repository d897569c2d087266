"""The curves of a run, as small multiples that read in black and white too.

curves("runs/grpo").savefig("grpo.png")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from surgery.training.rewards.audit import Audit

Metrics = Sequence[Mapping[str, float]]

PANELS: list[tuple[str, tuple[str, ...]]] = [
    ("accuracy, held out", ("eval/accuracy",)),
    ("-log likelihood, nats a token", ("nll", "eval/nll")),
    ("reward", ("reward", "reward/*")),
    ("loss", ("loss", "loss/*")),
    ("unexplained variance", ("fvu", "fvu/*")),
    ("codes a row", ("l0", "l0/*")),
    ("share of latents dead", ("dead", "dead/*")),
    ("gradient norm", ("grad_norm", "grad_norm/*")),
    ("completion length, tokens", ("length",)),
    ("entropy, nats a token", ("entropy",)),
    ("KL to the reference, nats a token", ("kl",)),
    ("share of completions or groups", ("truncated", "zero_variance", "clipped")),
]
"""Title and metrics of each panel; those without any numbers are left out."""

WORDS = {"eval/accuracy": "accuracy", "eval/nll": "-log p held out", "nll": "-log p", "reward": "total",
         "zero_variance": "groups of equal rewards", "clipped": "tokens clipped"}  # fmt: skip
INKS = ["black", "0.35", "0.55", "0.15", "0.45", "0.65"]
DASHES: list[Any] = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))]
MARKERS = "os^Dv*"
COLUMNS = 3
FEW = 30
"""Points up to which each has its mark."""


def curves(run: str | Path | Metrics, *, title: str = "") -> Figure:
    """A figure of a run's folder or of its metrics: accuracy, reward and its components, loss, gradient norm, ...

    Thin lines are steps, thick ones a running mean over a twentieth of the run. Raises `SurgeryError` for a folder
    without metrics and for a run without a step.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if isinstance(run, str | Path):
        from surgery.training.log import read_metrics

        title, run = title or Path(run).name, read_metrics(run)
    if not run:
        raise SurgeryError("The run has no steps yet: there is nothing to draw.")
    panels = [(what, found) for what, patterns in PANELS if (found := series(run, patterns))]
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(3.6 * min(COLUMNS, len(panels)), 2.3 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    axes = figure.subplots(rows, min(COLUMNS, len(panels)), squeeze=False).flatten()
    last = max(line["step"] for line in run)
    for axis, (what, found) in zip(axes, panels, strict=False):
        for i, (name, points) in enumerate(found.items()):
            _line(axis, points, name, i, alone=len(found) == 1)
        axis.set_title(what, fontsize="small", loc="left")
        axis.set_xlim(0, last * 1.02 or 1)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.tick_params(labelsize="x-small")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9", linewidth=0.7)
        if what.startswith(("share", "accuracy")):
            axis.set_ylim(-0.03, 1.03)
        if len(found) > 1:
            axis.legend(fontsize="x-small", handlelength=3, framealpha=0.8, edgecolor="none")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(panels) - min(COLUMNS, len(panels))) : len(panels)]:
        axis.set_xlabel("step", fontsize="x-small")
    return figure


def rewards_figure(audit: Audit) -> Figure:
    """A column for each reward: its mean by step (of one step: its histogram), and its values by completion length.

    The band is two standard errors wide on either side; lower titles say Pearson's r with the length. Raises
    `SurgeryError` where no reward gave a value.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = [(name, c) for name, c in audit.components.items() if c.scored]
    if not shown:
        raise SurgeryError("No reward gave any completion a value: there is nothing to draw.")
    figure = Figure(figsize=(max(4.0, 3.2 * len(shown)), 5.0), layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    rng = np.random.default_rng(0)
    for (name, component), (above, below) in zip(shown, axes.T, strict=True):
        scored = [line for line in audit.lines if line.values.get(name) is not None]
        values = np.array([line.values[name] for line in scored], dtype=float)
        steps = np.array([line.step for line in scored])
        at = np.unique(steps)
        if len(at) > 1:
            parts = [values[steps == s] for s in at]
            means = np.array([part.mean() for part in parts])
            error = 2 * np.array([part.std() / len(part) ** 0.5 for part in parts])
            above.fill_between(at, means - error, means + error, color="0.85")
            above.plot(at, means, "k.-", markersize=3, linewidth=1.2)
        else:
            above.hist(values, bins=20, color="0.6", edgecolor="black", linewidth=0.5)
        below_it = "step" if len(at) > 1 else f"{name} in step {at[0]}: number of completions"
        above.set_xlabel(below_it, fontsize="x-small")
        above.set_title(name, fontsize="small", loc="left")
        spread = 0.02 * np.ptp(values)  # equal values side by side, not on top of each other
        lengths = np.array([line.length for line in scored]) + rng.uniform(-0.3, 0.3, len(scored))
        below.plot(lengths, values + rng.uniform(-spread, spread, len(scored)), "k.", markersize=3, alpha=0.25)
        r = component.correlations.get("length")
        below.set_title("by length" + ("" if r is None else f", r = {r:.2f}"), fontsize="small", loc="left")
        below.set_xlabel("completion length, tokens", fontsize="x-small")
        for axis, whole in ((above, len(at) > 1), (below, True)):
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=whole))
            axis.tick_params(labelsize="x-small")
            axis.spines[["top", "right"]].set_visible(False)
    return figure


def series(run: Metrics, patterns: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """(step, value) points by name of the metrics that fit `patterns` and have finite values; a lone part is dropped.

    A reward of one component is that component: it is not drawn twice.
    """
    names = dict.fromkeys(name for line in run for name in line)
    fitting = [n for p in patterns for n in names if n == p or (p.endswith("*") and n.startswith(p[:-1]))]
    points = {n: [(line["step"], line[n]) for line in run if n in line and math.isfinite(line[n])] for n in fitting}
    found = {WORDS.get(n, (n.partition("/")[2] or n).replace("_", " ")): each for n, each in points.items() if each}
    if len(found) == 2 and "total" in found and len({tuple(each) for each in found.values()}) == 1:
        found.pop("total")
    return found


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Running means over `window` values around each, fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = window // 2
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in ends]


def _line(axis: Axes, points: list[tuple[float, float]], name: str, i: int, *, alone: bool) -> None:
    steps, values = [p[0] for p in points], [p[1] for p in points]
    style: dict[str, Any] = {"color": INKS[i % len(INKS)], "linestyle": DASHES[i % len(DASHES)], "label": name}
    if len(points) <= FEW:
        axis.plot(steps, values, marker=MARKERS[i % len(MARKERS)], markersize=3, linewidth=1.2, **style)
        return
    if alone:
        axis.plot(steps, values, color="0.75", linewidth=0.6)
    axis.plot(steps, smooth(values, len(points) // 20), linewidth=1.5, **style)
