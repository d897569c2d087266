"""Which latents of one dictionary fine-tuning made, lost or changed: it reads base and tuned model on the same tokens.

    found = changed(dictionary, base, tuned, texts, "resid_post.2", tokenizer)
    found.to_dataframe(), found.rates([3, 17]).interval(), found.plot()

The dictionary may be trained on either model or on both. What it has no latent for it can't show: of what is new in the
tuned model a dictionary of the base sees little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from analysis.features.kinds import EDGES
from analysis.features.reader import Reader
from analysis.results import Result
from surgery.errors import SurgeryError
from surgery.sae.activations import Keep, Stream, real_tokens
from surgery.sae.codes import Codes
from surgery.sae.dictionary import Dictionary

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FATES = ("lost", "weaker", "shared", "stronger", "made")
"""By the tuned model's share of the sum of both rates, between `EDGES`."""
LIMIT = 2 << 30
"""Bytes that sums by text may take."""
What = Literal["rate", "mean"]


@dataclass(frozen=True, eq=False)
class Changed:
    """Each latent in both models, text by text."""

    latents: list[int]
    active: np.ndarray
    """(2, texts, chosen) tokens at which a latent is active, of base and tuned."""
    sums: np.ndarray
    """(2, texts, chosen) sums of its activations."""
    both: np.ndarray
    """(chosen,) tokens at which it is active in both."""
    tokens: np.ndarray
    """(texts,) tokens that count."""
    site: str = ""

    def _columns(self, latents: Sequence[int] | None) -> list[int]:
        if wrong := [j for j in latents or () if j not in self.latents]:
            raise SurgeryError(f"Latent {wrong[0]} was not looked at.", hint="Name it: changed(..., latents=[...]).")
        return list(range(len(self.latents))) if latents is None else [self.latents.index(j) for j in latents]

    def difference(self, latents: Sequence[int] | None = None, what: What = "rate") -> Result:
        """Tuned less base, (example, latent): of the share of tokens at which a latent is active ("rate"), or of its
        mean activation over all tokens ("mean"). The mean is that over all tokens, the interval resamples texts."""
        return self._result(latents, what, lambda of: of[1] - of[0], "tuned - base")

    def rates(self, latents: Sequence[int] | None = None, model: Literal["base", "tuned"] = "tuned",
              what: What = "rate") -> Result:  # fmt: skip
        """The same of one model, (example, latent)."""
        return self._result(latents, what, lambda of: of[("base", "tuned").index(model)], model)

    def _result(self, latents: Sequence[int] | None, what: What, take: Any, whose: str) -> Result:
        columns = self._columns(latents)
        values = take({"rate": self.active, "mean": self.sums}[what][:, :, columns].astype(np.float64))
        axes: dict[str, Any] = {"example": range(len(values)), "latent": [self.latents[i] for i in columns]}
        name = f"{'firing rate' if what == 'rate' else 'mean activation'}, {whose}"
        found = Result(values, axes, name, {"tokens": self.tokens.tolist()}, {"site": self.site, "centre": 0})
        return found.normalized("tokens", name=name, tolerance=0.0)

    @property
    def fates(self) -> list[str]:
        """What became of each latent (`FATES`); "unsure" where the interval of the difference holds 0 though it looks
        made, lost or changed; "" where it is active in neither."""
        rates = self.active.sum(1) / self.tokens.sum()
        with np.errstate(invalid="ignore"):
            share = rates[1] / rates.sum(0)
        low, high = self.difference().interval()
        found = []
        for each, below, above in zip(share, low, high, strict=True):
            fate = FATES[int(np.digitize(each, EDGES))] if np.isfinite(each) else ""
            found.append("unsure" if fate not in ("", "shared") and below <= 0 <= above else fate)
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """One row a latent: firing rates and their difference with its interval, means, overlap, fate.

        `overlap` is the share of its tokens, of either model, at which it is active in both.
        """
        import pandas as pd

        rates, means = (v.sum(1) / self.tokens.sum() for v in (self.active, self.sums))
        low, high = self.difference().interval()
        either = self.active.sum((0, 1)) - self.both
        with np.errstate(invalid="ignore"):
            overlap = self.both / either
        columns = {"base": rates[0], "tuned": rates[1], "difference": rates[1] - rates[0], "low": low, "high": high,
                   "mean base": means[0], "mean tuned": means[1], "overlap": overlap, "fate": self.fates}  # fmt: skip
        return pd.DataFrame(columns, index=pd.Index(self.latents, name="latent"))

    def top(self, k: int = 10) -> list[int]:
        """The k latents whose firing rate changed most against the width of the interval; none whose interval holds 0
        before one whose does not."""
        found = self.difference()
        low, high = found.interval()
        sure = np.abs(found.mean) / np.maximum(high - low, 1e-12)
        sure = np.where((low <= 0) & (high >= 0), sure - 1e12, sure)
        return [self.latents[i] for i in np.argsort(-sure, kind="stable")[:k]]

    def plot(self, title: str = "") -> Figure:
        """Firing rates in base and tuned model, a marker for each fate; what is active in one alone on the axis."""
        from analysis.style import COLOURS, MARKERS, blank, legend_below

        rates, fates = self.active.sum(1) / self.tokens.sum(), np.array(self.fates)
        figure, axis = blank(5.2, 5.0, title or f"firing rates at {self.site}")
        floor = 0.5 / self.tokens.sum()
        axis.plot([floor, 1], [floor, 1], color="0.7", linewidth=0.8, zorder=0)
        for i, fate in enumerate([*FATES, "unsure"]):
            here = fates == fate
            if here.any():
                colour = "0.6" if fate == "unsure" else COLOURS[i]
                axis.scatter(*np.maximum(rates[:, here], floor), s=22, marker=MARKERS[i], edgecolor=colour,
                             facecolor="none" if i % 2 else colour, linewidth=0.9, alpha=0.8,
                             label=f"{fate} ({int(here.sum())})")  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel="base (far left: never)", ylabel="tuned (bottom: never)")
        axis.spines[["top", "right"]].set_visible(False)
        legend_below(figure)
        return figure


def changed(
    dictionary: Dictionary,
    base: Any,
    tuned: Any,
    texts: Any,
    site: str,
    tokenizer: Any = None,
    *,
    latents: Sequence[int] | None = None,
    keep: Keep | None = None,
    batch_size: int = 16,
    max_tokens: int = 1024,
) -> Changed:
    """One pass of both models over the same texts: when is each latent active in either, and how much.

    Of longer texts the first `max_tokens` are read. Memory is texts x latents. Raises `SurgeryError` for a crosscoder
    (its decoder's norms say more: `latent_scaling`), for a site or width that does not fit, without text, and where the
    sums would take too much memory.
    """
    if dictionary.models > 1:
        raise SurgeryError("A crosscoder reads both models at once, and has one activation for both.",
                           hint="latent_scaling(crosscoder, reader.rows(texts)) tells whose they are.")  # fmt: skip
    reader = Reader(dictionary, [base, tuned], site, tokenizer, difference=True, keep=keep or real_tokens(),
                    batch_size=batch_size, max_tokens=max_tokens)  # fmt: skip
    chosen = reader.chosen(latents)
    place = reader.at(chosen)
    stream = Stream(reader.models, [reader.site], [], reader.keep)
    active, sums, tokens, taken = [], [], [], 0
    both = np.zeros(len(chosen), dtype=np.int64)
    for number, batch in enumerate(reader.batches(texts)):
        kept = reader.keep(batch)
        taken += 16 * len(batch) * len(chosen)
        if taken > LIMIT:
            raise SurgeryError(f"Sums of {len(chosen):,} latents for every text take more than {LIMIT >> 30} GiB.",
                               hint="Choose latents=, or give fewer, longer texts.")  # fmt: skip
        rows = stream.read(batch, number)[reader.site].to(dictionary.bias)
        with torch.no_grad():
            codes = [dictionary.codes(part.contiguous()) for part in rows.chunk(2, dim=1)]
        text = kept.nonzero()[:, 0].cpu()
        counted = [_by_text(c, text, place, len(batch), len(chosen)) for c in codes]
        active.append(np.stack([count for count, _ in counted]))
        sums.append(np.stack([total for _, total in counted]))
        tokens.append(kept.sum(1).cpu().numpy())
        keys = [(c.layout.rows * dictionary.latents + c.layout.index).cpu().numpy() for c in codes]
        shared = place.numpy()[np.intersect1d(keys[0], keys[1], assume_unique=True) % dictionary.latents]
        both += np.bincount(shared[shared >= 0], minlength=len(chosen))
    if not sum(int(t.sum()) for t in tokens):
        raise SurgeryError("No token of these texts counts: the first of each is left out.", hint="Give longer texts.")
    return Changed(chosen, np.concatenate(active, 1), np.concatenate(sums, 1), both, np.concatenate(tokens),
                   reader.site)  # fmt: skip


def _by_text(codes: Codes, text: Tensor, place: Tensor, texts: int, chosen: int) -> tuple[np.ndarray, np.ndarray]:
    """(texts, chosen) how many codes, and their sum."""
    layout = codes.layout
    column = place[layout.index.cpu()]
    here = column >= 0
    flat = (text[layout.rows.cpu()] * chosen + column)[here]
    count = torch.bincount(flat, minlength=texts * chosen).view(texts, chosen)
    total = torch.zeros(texts * chosen, dtype=torch.float64).index_add_(0, flat, codes.values.cpu().double()[here])
    return count.to(torch.int32).numpy(), total.view(texts, chosen).float().numpy()
