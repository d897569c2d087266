"""Figures of what fine-tuning changed: panels by layer, tokens in cells, tokens along two directions, ranked tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.diff.per_token import PerToken
from analysis.results import Result
from analysis.style import COLOURS, HATCHES, INK, MARKERS, bare, blank, tick
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from analysis.diff.mean_difference import DifferencePCA


def panels(found: Mapping[str, PerToken | Result], title: str = "") -> Figure:
    """One panel a measure, up to three side by side: how one value a token is spread, or the mean by layer."""
    by_token = {n: one for n, one in found.items() if isinstance(one, PerToken) and one.layers is None}
    by_layer = {n: one for n, one in found.items() if n not in by_token}
    spread = [n for n, one in by_token.items() if not np.isin(one.values, (0, 1)).all()]
    told = [f"{one.name} {float(one.result.mean):.3f}" for n, one in by_token.items() if n not in spread]
    if not spread and told:  # nothing but shares: one number each
        spread, told = list(by_token), []
    shown = [*spread, *by_layer]
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure, grid = blank(
        3.3 * across + 0.4, 2.7 * down + 0.5, "\n".join([title, *told]) if told else title, across, down
    )
    axes: list[Axes] = list(np.ravel(grid))
    for axis, name in zip(axes, shown, strict=False):
        one = found[name]
        if name in by_token and isinstance(one, PerToken):
            _spread(axis, one)
        else:
            _by_layer(axis, one.result if isinstance(one, PerToken) else one)
    for spare in axes[len(shown) :]:
        spare.remove()
    return figure


def _spread(axis: Axes, one: PerToken) -> None:
    """How many tokens have more than a value: one curve, values on a log scale from the smallest that counts."""
    values = np.sort(one.values[np.isfinite(one.values)])
    mean = float(one.result.mean)
    lowest = max(values[-1] * 1e-6, 1e-9) if values.size else 1e-9
    axis.step(np.maximum(values, lowest), 1 - np.arange(len(values)) / len(values), where="post", color="black", lw=1.3)
    axis.set_xscale("log")
    axis.axvline(max(mean, lowest), color="0.35", linestyle="--", linewidth=1)
    axis.text(0.03, 0.05, f"dashed: mean {mean:.3g}", transform=axis.transAxes, fontsize="small", color="0.25")
    axis.set(xlabel=one.name, ylabel="share of tokens above", ylim=(0, 1.03))
    bare(axis)


def _by_layer(axis: Axes, result: Result) -> None:
    """Mean and interval by layer; no interval where all texts make one value."""
    layers, mean = list(result.axes["layer"]), result.mean
    spread = None
    if len(result) > 1:
        low, high = result.interval()
        spread = np.clip([mean - low, high - mean], 0, None)
    axis.errorbar(layers, mean, spread, fmt="ko-", capsize=2.5, markersize=4, linewidth=1.2)
    if np.nanmin(mean) >= 0 and np.nanmin(mean) < 0.5 * np.nanmax(mean):
        axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.set(xlabel="layer", ylabel=result.name)
    bare(axis)


def token_map(
    panels: Mapping[str, tuple[Sequence[Sequence[str]], Any]], rows: Sequence[Any], columns: Sequence[Any], *,
    row_label: str, column_label: str, title: str = "",
) -> Figure:  # fmt: skip
    """Tokens in cells, dark where they are probable: a panel each of (words, probabilities), rows by columns."""
    longest = max([4, *(len(tick(w, 12)) for words, _ in panels.values() for row in words for w in row)])
    cell = 0.25 + 0.085 * longest
    wide, high = 1.2 + cell * len(columns), max(2.4, 1.2 + 0.3 * len(rows))
    figure, grid = blank(wide * len(panels) + 0.8, high, title, columns=len(panels))
    axes: list[Axes] = list(np.ravel(grid))
    for axis, (name, (words, probs)) in zip(axes, panels.items(), strict=True):
        values = np.asarray(probs, dtype=float)
        image = axis.imshow(values, aspect="auto", cmap=INK, vmin=0, vmax=1)
        for (i, j), p in np.ndenumerate(values):
            axis.text(j, i, tick(words[i][j], 12), ha="center", va="center", fontsize=7.5,
                      color="white" if p > 0.6 else "black")  # fmt: skip
        names = [tick(c, 12) for c in columns]
        axis.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 5 else 0, fontsize="small",
                        ha="right" if max(map(len, names)) > 5 else "center", rotation_mode="anchor")  # fmt: skip
        axis.set_yticks(range(len(rows)), [str(r) for r in rows] if axis is axes[0] else [], fontsize="small")
        axis.set(xlabel=column_label, ylabel=row_label if axis is axes[0] else "")
        axis.set_title(name, fontsize="small")
    figure.colorbar(image, ax=axes, label="probability", aspect=20, fraction=0.3 / wide, pad=0.01)
    return figure


def ranked(sides: Mapping[str, Sequence[tuple[str, float]]], *, unit: str, title: str = "") -> Figure:
    """Tokens with a number each as horizontal bars, the first on top; a panel a side."""
    count = max([1, *map(len, sides.values())])
    figure, grid = blank(3.2 * len(sides) + 0.4, 1.2 + 0.22 * count, title, columns=len(sides))
    for i, (axis, (name, bars)) in enumerate(zip(np.ravel(grid), sides.items(), strict=True)):
        hatch = HATCHES[i % len(HATCHES)]
        axis.barh(range(len(bars)), [v for _, v in bars], hatch=hatch, color="white" if hatch else "0.55",
                  edgecolor="black", linewidth=0.6)  # fmt: skip
        axis.set_yticks(range(len(bars)), [tick(repr(w) if not w.strip() else w, 16) for w, _ in bars])
        axis.set_ylim(count - 0.4, -0.6)
        axis.set(xlabel=unit, title=name if bars else f"{name}: none")
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def components(found: DifferencePCA, title: str = "") -> Figure:
    """Left the sampled tokens along the first two directions, first tokens of texts apart; right shares of variance."""
    scores = found.scores
    if scores.shape[1] < 2:
        raise SurgeryError("Tokens are drawn along two directions, and there is one.", hint="Ask for k of 2 or more.")
    first = np.isin(found.sample, found.texts.starts)
    figure, (left, right) = blank(8.2, 3.9, title or f"differences at {found.site}, {len(scores)} tokens", columns=2)
    for i, (name, mine) in enumerate((("first tokens", first), ("other tokens", ~first))):
        if mine.any():
            style: dict[str, Any] = {"marker": MARKERS[i], "edgecolors": COLOURS[i], "linewidths": 0.7, "alpha": 0.75}
            style |= {"s": 9, "facecolors": COLOURS[i]} if i else {"s": 26, "facecolors": "none"}
            left.scatter(scores[mine, 0], scores[mine, 1], label=name, **style)
    for line in (left.axhline, left.axvline):
        line(0, color="0.8", linewidth=0.7, zorder=0)
    left.legend(frameon=False, fontsize="small")
    share = found.directions.explained.numpy()
    left.set(xlabel=f"component 0 ({share[0]:.0%})", ylabel=f"component 1 ({share[1]:.0%})")
    left.spines[["top", "right"]].set_visible(False)
    right.bar(range(len(share)), share, color="0.55", edgecolor="black", linewidth=0.6)
    right.set(xlabel="component", ylabel="share of variance", ylim=(0, 1.02))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    bare(right)
    return figure
