"""Latents that are active at given tokens and not elsewhere: the score of reasoning features.

    found = tag_scores(reader, prompts, ["<think>", "</think>"])
    found.to_dataframe().head(), found.score.top(5), found.exclusive

Reasoning features are told by tags like these (SAE-tuning, arXiv:2506.09967): score = mean f at tags - mean f
elsewhere. AUROC says the same of ranks, and does not mind that some latents are large. The counting rule of that paper
is not in its released code; ours is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from analysis.features.reader import Reader
from analysis.features.words import spelling
from analysis.results import Result
from surgery.errors import SurgeryError
from surgery.models import Batch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Tags = str | Sequence[str] | Sequence[int] | int | Callable[[Batch], Tensor]
"""Strings, positions (from either end), or a function of a batch that gives (batch, pos) bool."""


@dataclass(frozen=True, eq=False)
class TagScores:
    """What `tag_scores` finds."""

    score: Result
    """(example, latent) of each text with tags: mean f at its tags less mean f elsewhere."""
    auroc: np.ndarray
    """(chosen,) of all tokens of all texts, tags against others, ties half."""
    at: np.ndarray
    """(chosen,) share of tag tokens at which a latent is active."""
    outside: np.ndarray
    """(chosen,) the same of all others."""
    tags: int
    """Tokens of tags."""
    tokens: int
    """All tokens that count."""

    @property
    def latents(self) -> list[int]:
        """The latents that were scored."""
        return list(self.score.axes["latent"])

    @property
    def exclusive(self) -> list[int]:
        """Latents that are active at some tag and at no other token of all texts, the most often active first."""
        found = np.flatnonzero((self.at > 0) & (self.outside == 0))
        return [self.latents[i] for i in found[np.argsort(-self.at[found], kind="stable")]]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a latent, the greatest score first, with the score's interval over texts."""
        import pandas as pd

        low, high = self.score.interval()
        alone = set(self.exclusive)
        columns = {"score": self.score.mean, "low": low, "high": high, "auroc": self.auroc, "at tags": self.at,
                   "elsewhere": self.outside, "exclusive": [j in alone for j in self.latents]}  # fmt: skip
        frame = pd.DataFrame(columns, index=pd.Index(self.latents, name="latent"))
        return frame.sort_values("score", ascending=False, kind="stable")

    def plot(self, label: int = 6, title: str = "") -> Figure:
        """How often each latent is active at tags and elsewhere; those that are exclusive apart, the best numbered."""
        from analysis.style import blank, legend_below

        figure, axis = blank(5.4, 4.4, title or f"{self.tags} tokens of tags against {self.tokens - self.tags} others")
        used = (self.at > 0) | (self.outside > 0)
        alone = (self.at > 0) & (self.outside == 0)
        floor = 0.5 / max(1, self.tokens - self.tags)
        for here, marker, face, name in ((used & ~alone, "o", "none", "others"), (alone, "D", "black", "exclusive")):
            axis.scatter(np.maximum(self.outside[here], floor), self.at[here], s=20, marker=marker, facecolor=face,
                         edgecolor="black", linewidth=0.7, label=f"{name} ({int(here.sum())})")  # fmt: skip
        order = np.argsort(-self.score.mean, kind="stable")[:label]
        for rank, i in enumerate(order):
            axis.annotate(str(self.latents[i]), (max(self.outside[i], floor), self.at[i]), fontsize="small",
                          xytext=(6, 4 - 9 * (rank % 2)), textcoords="offset points")  # fmt: skip
        axis.set(xscale="log", xlabel="share of other tokens (far left: none)", ylabel="share of tag tokens",
                 ylim=(-0.03, 1.05))  # fmt: skip
        axis.spines[["top", "right"]].set_visible(False)
        legend_below(figure)
        return figure


def tag_scores(reader: Reader, texts: Any, tags: Tags, latents: Sequence[int] | None = None) -> TagScores:
    """One pass over texts: every latent at the tokens of `tags` against all others that count.

    A string may be several tokens, or parts of them: all tokens that have a part in it are tags. A text without a tag
    has no score, and counts for AUROC and for what is exclusive. Memory is the codes of all texts, and texts x latents.
    Raises `SurgeryError` for a tag that never occurs, latents that the dictionary has not, and without text.
    """
    chosen = reader.chosen(latents)
    place, n = reader.at(chosen), len(chosen)
    occurrences: dict[Any, int] = {}
    scores, numbers, columns, values, marks = [], [], [], [], []
    many = tagged = first = 0
    for read in reader.read(texts):
        at_tag = _marked(reader, read.batch, tags, occurrences)[read.kept].cpu()
        text, layout = read.texts.cpu(), read.codes.layout
        column = place[layout.index.cpu()]
        here = column >= 0
        token, column = layout.rows.cpu()[here], column[here]
        f = read.codes.values.cpu().double()[here]
        means = []
        for side in (at_tag, ~at_tag):
            tokens = torch.bincount(text[side], minlength=len(read.batch))
            mine = side[token]
            flat = text[token[mine]] * n + column[mine]
            total = torch.zeros(len(read.batch) * n, dtype=torch.float64).index_add_(0, flat, f[mine])
            means.append(total.view(-1, n) / tokens[:, None])
        known = (means[0] - means[1]).isfinite().all(1)
        scores.append((means[0] - means[1])[known].numpy())
        numbers += (first + known.nonzero().view(-1)).tolist()
        columns.append(column.numpy())
        values.append(f.numpy())
        marks.append(at_tag[token].numpy())
        many, tagged, first = many + len(at_tag), tagged + int(at_tag.sum()), first + len(read.batch)
    for tag, count in occurrences.items():
        if not count:
            raise SurgeryError(f"The tag {tag!r} occurs in none of these {first} texts.",
                               hint="At the first token of a text it does not count.")  # fmt: skip
    if not tagged or tagged == many:
        raise SurgeryError(f"{tagged} of {many} tokens are tags: there must be tags and others.")
    where, value, mark = (np.concatenate(part) for part in (columns, values, marks))
    score = np.concatenate(scores)
    if not len(score):
        raise SurgeryError("No text has tokens of tags and others.")
    result = Result(score, {"example": numbers, "latent": chosen}, "f at tags - elsewhere", meta={"site": reader.site})
    counts = [np.bincount(where[mark == side], minlength=n) for side in (True, False)]
    area = auroc(where, value, mark, n, tagged, many - tagged)
    return TagScores(result, area, counts[0] / tagged, counts[1] / (many - tagged), tagged, many)


def _marked(reader: Reader, batch: Batch, tags: Tags, occurrences: dict[Any, int]) -> Tensor:
    """(batch, pos) the tokens of tags; counts how many of them each tag has among those that count."""
    kept = reader.keep(batch)
    if callable(tags):
        found = tags(batch).bool() & batch.mask
        occurrences["of the function"] = occurrences.get("of the function", 0) + int((found & kept).sum())
        return found
    found = torch.zeros_like(batch.mask)
    for tag in [tags] if isinstance(tags, (str, int)) else tags:
        mine = torch.zeros_like(batch.mask)
        if isinstance(tag, str):
            for row, real in enumerate(batch.mask):
                mine[row, real] = torch.tensor(spelling(reader.tokenizer, batch.ids[row, real].tolist(), tag),
                                               device=mine.device)  # fmt: skip
        else:
            wanted = batch.lengths[:, None] + tag if tag < 0 else tag
            mine = (batch.positions == wanted) & batch.mask
        occurrences[tag] = occurrences.get(tag, 0) + int((mine & kept).sum())
        found |= mine
    return found


def auroc(column: np.ndarray, value: np.ndarray, mark: np.ndarray, n: int, upper: int, lower: int) -> np.ndarray:
    """(n,) the probability that one of `upper` marked tokens has a greater value than one of `lower` others, ties half.

    Values above 0 are given one by one with their column (of n); all others are 0.
    """
    order = np.lexsort((value, column))
    column, value, mark = column[order], value[order], mark[order].astype(np.float64)
    new = (np.diff(column, prepend=-1) != 0) | (np.diff(value, prepend=np.nan) != 0)  # a new value of a column
    group = np.cumsum(new) - 1
    ups, downs = (np.bincount(group, weights) if len(group) else np.zeros(0) for weights in (mark, 1 - mark))
    of = column[new]
    zeros_up = upper - np.bincount(of, ups, minlength=n)
    zeros_down = lower - np.bincount(of, downs, minlength=n)
    before = np.cumsum(downs) - downs
    begins = np.flatnonzero(np.diff(of, prepend=-1) != 0)
    below = before - np.repeat(before[begins], np.diff([*begins, len(of)])) if len(of) else before
    won = np.bincount(of, ups * (below + downs / 2 + zeros_down[of]), minlength=n) + zeros_up * zeros_down / 2
    return won / (upper * lower)
