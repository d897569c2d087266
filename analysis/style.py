"""What figures and pages share: marks that differ without colour, and how a token is written so that it can be seen."""

from __future__ import annotations

import unicodedata
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

MARKERS = "osD^vP*Xd<>"
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "***"]
GREYS = ["0.15", "0.55", "0.8", "0.35", "0.68", "0.9", "0.25", "0.6"]
COLOURS = ["#003f5c", "#d1495b", "#66a182", "#8d6a9f", "#b07d12", "#00798c", "#5c4742", "#808080"]
"""Of different lightness, so that they stay apart when printed in grey."""

INK = LinearSegmentedColormap.from_list("ink", ["white", "0.2"])
"""Dark is much. Stops short of black, so that a map of equal values is no black block."""
SIGNED = LinearSegmentedColormap.from_list("signed", ["#9c1c2e", "#e08a7e", "white", "#6fa3cf", "#123f73"], N=257)
"""Red below, white at and blue above the centre; both ends are equally dark in grey: the sign needs a second mark."""

MAX_CELLS = 30
"""Rows and columns up to which the cells of a map carry their numbers."""
UNSEEN = {"\n": "↵", "\t": "⇥", " ": "·", "\r": "␍"}


def shown(token: str) -> str:
    """A token with its white space visible; what has no look of its own (control and format characters) as its code."""
    return "".join(UNSEEN.get(c) or (c if _seen(c) else _code(c)) for c in token)


def _seen(character: str) -> bool:
    return unicodedata.category(character)[0] != "C" and (character == " " or not character.isspace())


def _code(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def tick(label: Any, longest: int = 24) -> str:
    """A label for a figure: white space visible at the ends, cut when long, and never read as mathematics."""
    text = str(label)
    text = shown(text) if text != text.strip() or not text.isprintable() else text
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return text.replace("$", r"\$")


def blank(width: float, height: float, title: str, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """A figure that belongs to no window, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure, axes


def bare(axis: Axes) -> None:
    """Only the two lines that carry a scale, and a faint grid behind the data."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.9", linewidth=0.7)
    axis.set_axisbelow(True)


def legend_below(figure: Figure) -> None:
    """One legend under the axes, where it takes nothing from their width."""
    labels = figure.axes[0].get_legend_handles_labels()[1]
    longest = max(map(len, labels)) + 7
    columns = max(1, min(len(labels), int(12 * figure.get_figwidth() / longest)))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
