"""Token-coloured text as self-contained HTML: no script, no network, and nothing of a token is ever read as markup.

A token's background says its value; a negative one is underlined as well, so that the page reads in black and white.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.colors import Colormap, to_hex
from matplotlib.figure import Figure

from analysis.style import INK, SIGNED, shown
from surgery.errors import SurgeryError

TEXT = "font-family:ui-monospace,monospace;line-height:1.75;overflow-wrap:anywhere"
WORDS = "font-family:system-ui,sans-serif;font-size:0.9em"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a saved page may do: show itself. Scripts and requests are refused by the browser as well."""


@dataclass(frozen=True)
class Html:
    """A piece of a page: shows itself in a notebook, saves itself as a file that needs nothing else."""

    body: str
    title: str = ""

    def _repr_html_(self) -> str:
        return self.body

    @property
    def document(self) -> str:
        """The whole page."""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_said(self.title)}</title>\n</head>\n"
            f'<body style="max-width:70em;margin:1em auto;padding:0 1em;color:#111;background:#fff">\n{self.body}\n'
            "</body>\n</html>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Write the page as `path`, making its folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.document, encoding="utf-8")
        return path


def coloured(
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    centre: float | None = None,
    title: str = "",
    caption: str = "",
    limits: tuple[float, float] | None = None,
    ids: Sequence[int] | None = None,
    unit: str = "value",
) -> Html:
    """One text, each token (strings) on a background that says its value; its number, id and value on hovering.

    `centre` is the value of white on a scale from red to blue with equal limits on both sides; without one the scale
    runs from white to dark. `limits` are the values at the ends (else those of the values). NaN is no value: a dotted
    line, no colour. Raises `SurgeryError` when tokens and values differ in number.
    """
    texts = [(tokens, values)] if ids is None else [(tokens, values, ids)]
    return coloured_many(texts, centre=centre, title=title, captions=[caption], limits=limits, unit=unit)


def coloured_many(
    texts: Iterable[tuple[Sequence[str], Sequence[float]] | tuple[Sequence[str], Sequence[float], Sequence[int]]],
    *,
    centre: float | None = None,
    title: str = "",
    captions: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    unit: str = "value",
) -> Html:
    """Several texts, (tokens, values) or (tokens, values, ids), one under the other on one scale. As `coloured`."""
    texts = list(texts)
    captions = [""] * len(texts) if captions is None else list(captions)
    if len(captions) != len(texts):
        raise SurgeryError(f"There are {len(texts)} texts and {len(captions)} captions.")
    arrays = [np.asarray(values, dtype=float) for _, values, *_ in texts]
    for (tokens, _, *more), array in zip(texts, arrays, strict=True):
        if array.shape != (len(tokens),):
            raise SurgeryError(f"Each token needs one value: {len(tokens)} tokens, values of shape {array.shape}.")
        if more and len(more[0]) != len(tokens):
            raise SurgeryError(f"Each token needs one id: {len(tokens)} tokens, {len(more[0])} ids.")
    scale = _Scale.of(np.concatenate([np.empty(0), *arrays]), centre, limits)
    parts = [f'<h3 style="{WORDS};margin:0.6em 0">{_said(title)}</h3>'] if title else []
    for (tokens, _, *more), array, caption in zip(texts, arrays, captions, strict=True):
        ids = more[0] if more else [None] * len(tokens)
        spans = [_span(i, *token, scale, unit) for i, token in enumerate(zip(tokens, array, ids, strict=True))]
        if caption:
            parts.append(f'<p style="{WORDS};margin:0.8em 0 0.2em">{_said(caption)}</p>')
        parts.append(f'<div style="{TEXT};color:#111;background:#fff">{"".join(spans)}</div>')
    parts.append(scale.legend(unit))
    return Html(f"<div>{''.join(parts)}</div>", title)


def page(title: str, *parts: Html | Figure | str, figures: Literal["svg", "png"] = "svg") -> Html:
    """Pieces, figures and paragraphs (plain strings) one under the other as one self-contained page.

    Figures are images within the page. Raises `SurgeryError` for a part that is none of these.
    """
    body = [f'<h2 style="{WORDS};font-size:1.3em">{_said(title)}</h2>']
    for part in parts:
        if isinstance(part, Html):
            body.append(part.body)
        elif isinstance(part, Figure):
            body.append(_image(part, figures))
        elif isinstance(part, str):
            body.append(f'<p style="{WORDS}">{_said(part)}</p>')
        else:
            raise SurgeryError(f"A page takes Html, matplotlib figures and strings, not {type(part).__name__}.")
    return Html("\n".join(body), title)


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "") -> Html:
    """Rows under their heads; floats with three digits, columns of numbers to the right.

    Raises `SurgeryError` for a row of another length.
    """
    rows = list(rows)
    if wrong := [row for row in rows if len(row) != len(heads)]:
        raise SurgeryError(f"A row has {len(wrong[0])} cells under {len(heads)} heads: {list(wrong[0])!r}.")
    numbers = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(heads))]
    looks = [
        "text-align:right" if number else "text-align:left;font-family:ui-monospace,monospace" for number in numbers
    ]
    cell = "padding:0.15em 0.8em;border-bottom:1px solid #ccc"
    parts = [f'<h3 style="{WORDS};margin:0.6em 0">{_said(title)}</h3>'] if title else []
    parts.append(f'<table style="{WORDS};border-collapse:collapse;color:#111"><tr>')
    for head, number in zip(heads, numbers, strict=True):
        parts.append(f'<th style="{cell};text-align:{"right" if number else "left"}">{_said(head)}</th>')
    for row in rows:
        parts.append("</tr><tr>")
        texts = [f"{entry:.3g}" if isinstance(entry, float) else str(entry) for entry in row]
        parts += [f'<td style="{cell};{look}">{_said(text)}</td>' for text, look in zip(texts, looks, strict=True)]
    return Html("".join([*parts, "</tr></table>"]), title)


@dataclass(frozen=True)
class _Scale:
    """Values to colours, from `low` to `high`."""

    low: float
    high: float
    colours: Colormap
    centre: float | None

    @classmethod
    def of(cls, values: np.ndarray, centre: float | None, limits: tuple[float, float] | None) -> _Scale:
        """The scale of all values together."""
        finite = values[np.isfinite(values)]
        if limits is not None:
            low, high = map(float, limits)
            if not low < high:
                raise SurgeryError(f"Limits must rise, found {low:g} and {high:g}.")
        elif finite.size:
            low, high = float(finite.min()), float(finite.max())
        else:
            low, high = 0.0, 1.0
        if centre is None:
            if limits is None and 0 <= low < 0.5 * high:
                low = 0.0
            return cls(low, high if high > low else low + 1.0, INK, None)
        reach = max(abs(low - centre), abs(high - centre)) or 1.0
        return cls(centre - reach, centre + reach, SIGNED, centre)

    def colour(self, value: float) -> str:
        """Background of a value, beyond the limits that of the limit."""
        return to_hex(self.colours(float(np.clip((value - self.low) / (self.high - self.low), 0, 1))))

    def legend(self, unit: str) -> str:
        """A bar from the lowest to the highest value, in colours that need no image."""
        stops = ",".join(self.colour(self.low + i / 8 * (self.high - self.low)) for i in range(9))
        ends = [f"{self.low:.3g}", f"{self.high:.3g}"]
        middle = f" (white: {self.centre:.3g})" if self.centre is not None else ""
        below = f"; <u>underlined</u>: {'below white' if self.centre else 'negative'}"
        below = below if self.low < (self.centre or 0) else ""
        return (
            f'<div style="{WORDS};color:#111;margin:0.8em 0">{_said(unit)}{middle} {ends[0]} '
            f'<span style="display:inline-block;width:12em;height:0.9em;vertical-align:middle;border:1px solid #888;'
            f'background:linear-gradient(to right,{stops})"></span> {ends[1]}{below}</div>'
        )


def _span(place: int, token: str, value: float, number: Any, scale: _Scale, unit: str) -> str:
    """One token. A line break is seen and made; white space is seen and may be broken after."""
    said = f"{place}: {shown(token)!r}" + (f", id {int(number)}" if number is not None else "")
    said += f", {unit} {value:.4g}" if not np.isnan(value) else f", no {unit}"
    if np.isnan(value):
        style = "border-bottom:1px dotted #888"
    else:
        background = scale.colour(value)
        style = f"background:{background};color:{_ink(background)}" + (
            ";text-decoration:underline" if value < 0 else ""
        )
    text = escape(shown(token)) or "∅"
    return f'<span style="{style}" title="{_said(said)}">{text.replace("↵", "↵<br>")}</span><wbr>'


def _said(text: str) -> str:
    """Words of a caller as a page may hold them: no markup, spaces as they are, hidden characters by their code."""
    return "\n".join(escape(" ".join(map(shown, line.split(" ")))) for line in text.split("\n"))


def _ink(background: str) -> str:
    """Black or white, whichever stands out more (relative luminance of WCAG 2)."""
    light = _luminance(background)
    return "#000" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "#fff"


def _luminance(colour: str) -> float:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _image(figure: Figure, kind: str) -> str:
    """A figure as an image within the page; SVG as an image, so that its names clash with no other figure's."""
    from matplotlib import rc_context

    buffer, mime = io.BytesIO(), "image/svg+xml" if kind == "svg" else "image/png"
    with rc_context({"svg.hashsalt": "figure"}):
        figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    suptitle = figure.get_suptitle()
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img style="max-width:100%" alt="{_said(suptitle or "figure")}" src="data:{mime};base64,{data}"></p>'
