"""Where latents are active: the texts with the greatest activations, and some by chance, in one pass over text.

    found = examples(reader, texts, k=10, random=10)
    found.table()                          # of every latent: how often, how much
    found.html(17), found.rich(17), found.plot(17), found.to_dataframe()

The strongest examples show what a latent is surest of, those drawn by chance what it mostly is active on: an account of
a latent ought to hold for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.features.best import Best, Seen, Tokens, lots
from analysis.features.reader import Reader
from analysis.features.words import spelled, token_text, token_texts
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.text import Text

    from analysis.html import Html

Kind = Literal["top", "random"]
OCTAVE = 4
"""Bins of a histogram in a factor of 2."""
LOWEST, HIGHEST = -12 * OCTAVE, 14 * OCTAVE
"""The first and the last bin, as powers of 2 ** (1 / OCTAVE): what lies beyond is in them."""
EDGES = 2.0 ** (np.arange(LOWEST, HIGHEST + 1) / OCTAVE)
"""Edges of the bins."""


@dataclass(frozen=True, eq=False)
class Example:
    """A latent in a text: where it is most active (or a token by chance), and the tokens around."""

    latent: int
    kind: Kind
    value: float
    """Its activation at the token."""
    quantile: float
    """The share of its active tokens with a lower activation, by the histogram."""
    text: int
    """Number of the text."""
    position: int
    """Of the token among those of the text."""
    ids: list[int]
    """The tokens of the context."""
    activations: np.ndarray
    """Of each of them; NaN for tokens that do not count."""
    peak: int
    """Place of the token in the context."""


@dataclass(frozen=True, eq=False)
class Examples:
    """What `examples` finds."""

    latents: list[int]
    tokens: int
    """How many tokens were read and count."""
    texts: int
    fired: np.ndarray
    """(chosen,) tokens at which each latent is active."""
    sums: np.ndarray
    """(chosen,) sum of its activations."""
    largest: np.ndarray
    """(chosen,) the greatest."""
    histogram: np.ndarray
    """(chosen, bins) active tokens by activation, between `EDGES`."""
    best: dict[Kind, Best]
    site: str = ""
    tokenizer: Any = None

    def _place(self, latent: int) -> int:
        if latent not in self.latents:
            raise SurgeryError(f"Examples of latent {latent} were not looked for.",
                               hint="Name it: examples(reader, texts, [...]).")  # fmt: skip
        return self.latents.index(latent)

    def of(self, latent: int, kind: Kind = "top") -> list[Example]:
        """Its examples, the most active first; those by chance in the same order."""
        at, best = self._place(latent), self.best[kind]
        places = [i for i in range(best.k) if np.isfinite(best.score[at, i])]
        places.sort(key=lambda i: -best.value[at, i])
        return [self._example(latent, at, i, kind) for i in places]

    def _example(self, latent: int, at: int, i: int, kind: Kind) -> Example:
        best = self.best[kind]
        value, real = float(best.value[at, i]), best.ids[at, i] >= 0
        counts = self.histogram[at]
        bin_ = int(_bins(np.array([value]))[0])
        below = (counts[:bin_].sum() + counts[bin_] / 2) / max(1, counts.sum())
        return Example(latent, kind, value, float(below), int(best.text[at, i]), int(best.position[at, i]),
                       best.ids[at, i][real].tolist(), best.activations[at, i][real],
                       int(best.position[at, i] - best.start[at, i]))  # fmt: skip

    def table(self) -> pd.DataFrame:
        """One row a latent: the share of tokens at which it is active, its mean there, and its greatest activation."""
        import pandas as pd

        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self.sums / self.fired
        columns = {"rate": self.fired / self.tokens, "mean": mean, "max": self.largest, "tokens": self.fired}
        return pd.DataFrame(columns, index=pd.Index(self.latents, name="latent"))

    def to_dataframe(self) -> pd.DataFrame:
        """One row an example: latent, kind, rank, activation, quantile, text, position, token, context."""
        import pandas as pd

        names = ["latent", "kind", "rank", "activation", "quantile", "text", "position", "token", "context"]
        rows = [
            (latent, kind, rank, e.value, e.quantile, e.text, e.position, self._word(e.ids[e.peak]), self._text(e.ids))
            for latent in self.latents for kind in self.best for rank, e in enumerate(self.of(latent, kind))
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=names)

    def _word(self, token: int) -> str:
        return token_text(self.tokenizer, token)

    def _text(self, ids: Sequence[int]) -> str:
        return spelled(self.tokenizer, ids)

    # ---- looks

    def html(self, latents: int | Sequence[int], *, k: int | None = None, title: str = "") -> Html:
        """Examples of latents as coloured text, dark where a latent is active, on one scale a latent."""
        from analysis.html import Html, coloured_many

        parts = []
        for latent in [latents] if isinstance(latents, int) else latents:
            found = [e for kind in self.best for e in self.of(latent, kind)[:k]]
            if not found:
                parts.append(Html(f"<p>latent {latent}: active in none of {self.texts} texts.</p>"))
                continue
            texts = [(token_texts(self.tokenizer, e.ids), e.activations.tolist(), e.ids) for e in found]
            top = float(self.largest[self._place(latent)])
            parts.append(coloured_many(texts, title=title or f"latent {latent}", captions=[_caption(e) for e in found],
                                       limits=(0.0, top), unit="activation"))  # fmt: skip
        return Html("".join(part.body for part in parts), title)

    def rich(self, latent: int, *, k: int | None = None, kind: Kind = "top") -> Text:
        """Examples for a terminal, one a line: underlined where it is active, on grey by how much, «most» at the token.

        Without colours the marks at the token stay.
        """
        from rich.text import Text

        from analysis.style import shown

        top = float(self.largest[self._place(latent)]) or 1.0
        lines = []
        for example in self.of(latent, kind)[:k]:
            line = Text(f"{example.value:8.3g}  ")
            words = token_texts(self.tokenizer, example.ids)
            for i, (word, value) in enumerate(zip(words, example.activations, strict=True)):
                text = shown(word)
                line.append(f"«{text}»" if i == example.peak else text, style=_style(float(value) / top))
            lines.append(line)
        return Text("\n").join(lines or [Text("   active in no text")])

    def plot(self, latents: int | Sequence[int] | None = None, title: str = "") -> Figure:
        """Histograms of the activations of some latents; of none: how often all of them are active."""
        return _rates(self, title) if latents is None else _histograms(
            self, [latents] if isinstance(latents, int) else list(latents), title
        )  # fmt: skip


def examples(
    reader: Reader,
    texts: Any,
    latents: Sequence[int] | int | None = None,
    *,
    k: int = 10,
    random: int = 0,
    before: int = 24,
    after: int = 8,
    seed: int = 0,
) -> Examples:
    """One pass over texts: of each latent (all of them for None) the `k` with its greatest activations.

    One example a text, and of texts that are the same token by token only the first is an example (it counts every
    time). `random` more are drawn, each active token of different texts with the same chance, by `seed`. Contexts are
    `before` + 1 + `after` tokens. Memory is latents x (k + random) x context. Raises `SurgeryError` for latents that
    the dictionary has not, without text, where no token counts, and when contexts would take too much memory.
    """
    chosen = reader.chosen(latents)
    n = len(chosen)
    best: dict[Kind, Best] = {"top": Best(n, k, before, after)}
    if random:
        best["random"] = Best(n, random, before, after)
    place = reader.at(chosen).numpy()
    fired, sums, largest = np.zeros(n, dtype=np.int64), np.zeros(n), np.zeros(n)
    histogram = np.zeros((n, HIGHEST - LOWEST), dtype=np.int32)
    known: set[int] = set()
    tokens_read = first = 0
    for read in reader.read(texts):
        seen, tokens = Seen.of(read, place), Tokens.of(read, first)
        fired += np.bincount(seen.latent, minlength=n)
        sums += np.bincount(seen.latent, seen.value, minlength=n)
        np.maximum.at(largest, seen.latent, seen.value)
        np.add.at(histogram, (seen.latent, _bins(seen.value)), 1)
        seen = seen.only(_fresh(tokens, known)[seen.row])
        best["top"].offer(seen, seen.value.astype(np.float64), tokens)
        if random:
            drawn = lots(seed, first + seen.row, seen.position, np.array(chosen)[seen.latent])
            best["random"].offer(seen, drawn, tokens)
        tokens_read += len(read.rows)
        first += len(read.batch)
    if not tokens_read:
        raise SurgeryError("No token of these texts counts: the first of each is left out.", hint="Give longer texts.")
    return Examples(chosen, tokens_read, first, fired, sums, largest, histogram, best, reader.site, reader.tokenizer)


def _fresh(tokens: Tokens, known: set[int]) -> np.ndarray:
    """(batch,) whether each text is none of those before."""
    found = np.ones(len(tokens.ids), dtype=bool)
    for row, ids in enumerate(tokens.ids):
        key = hash(ids[: tokens.lengths[row]].tobytes())
        found[row] = key not in known
        known.add(key)
    return found


def _bins(values: np.ndarray) -> np.ndarray:
    """The bin of each activation."""
    with np.errstate(divide="ignore"):
        power = np.floor(OCTAVE * np.log2(values.astype(np.float64)))
    return np.clip(power, LOWEST, HIGHEST - 1).astype(np.int64) - LOWEST


def _caption(example: Example) -> str:
    where = f"text {example.text}, token {example.position}: {example.value:.3g}"
    return where if example.kind == "top" else f"{where} (by chance, above {example.quantile:.0%} of its active tokens)"


def _style(share: float) -> Any:
    """Grey from white to dark by a share of the greatest activation; none where it is not active."""
    from rich.color import Color
    from rich.style import Style

    if not share > 0:
        return Style()
    grey = int(235 - 175 * min(1.0, share))
    ink = 0 if grey > 128 else 255
    return Style(underline=True, bgcolor=Color.from_rgb(grey, grey, grey), color=Color.from_rgb(ink, ink, ink))


# ---- figures


def _rates(found: Examples, title: str) -> Figure:
    from analysis.style import bare, blank

    figure, axis = blank(5.6, 3.4, title or f"how often latents at {found.site} are active")
    rates = found.fired[found.fired > 0] / found.tokens
    axis.hist(np.log10(rates), bins=30, color="0.7", edgecolor="black", linewidth=0.5)
    dead = int((found.fired == 0).sum())
    axis.set(xlabel="log10 of the share of tokens", ylabel=f"latents ({dead} of {len(found.latents)} are never active)")
    bare(axis)
    return figure


def _histograms(found: Examples, latents: list[int], title: str) -> Figure:
    from analysis.style import bare, blank

    wide = min(3, len(latents))
    high = -(-len(latents) // wide)
    figure, grid = blank(0.4 + 3.2 * wide, 0.4 + 2.3 * high, title, columns=wide, rows=high)
    axes = np.ravel(grid)
    for axis, latent in zip(axes, latents, strict=False):
        counts = found.histogram[found._place(latent)]
        there = np.flatnonzero(counts)
        axis.set_title(f"latent {latent}: {int(counts.sum())} of {found.tokens} tokens", fontsize="small")
        if there.size:
            part = slice(there[0], there[-1] + 1)
            axis.stairs(counts[part], EDGES[part.start : part.stop + 1], fill=True, color="0.7", edgecolor="black",
                        linewidth=0.8)  # fmt: skip
            edges = EDGES[[part.start, (part.start + part.stop) // 2, part.stop]]
            axis.set_xscale("log", base=2)
            axis.set_xticks(np.unique(edges), [f"{edge:.3g}" for edge in np.unique(edges)])
            axis.minorticks_off()
        axis.set(xlabel="activation", ylabel="tokens")
        bare(axis)
    for axis in axes[len(latents) :]:
        axis.set_axis_off()
    return figure
