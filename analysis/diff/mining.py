"""Which tokens did fine-tuning raise everywhere? Those most often among the top K of logits_tuned - logits_base.

"Diff Mining: Logit Differences Reveal Finetuning Objectives" (ICLR 2026 workshop), its counting form: no internals, any
text; a narrow fine-tuning raises the tokens of its own subject on unrelated text too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from analysis.diff.lens import word
from analysis.diff.measures import Collector, Scope, stream
from analysis.diff.per_token import Texts
from analysis.prompts import Progress
from surgery.errors import SurgeryError
from surgery.models import Pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Ranks(Collector):
    """How often each token of the vocabulary is among the k most raised, and the k most lowered, logits."""

    reads = "logits"

    def __init__(self, scope: Scope, k: int) -> None:
        super().__init__(scope)
        self.k = k
        self.raised = self.lowered = np.zeros(0, dtype=np.int64)

    def see(self, places: np.ndarray, tuned: Tensor, base: Tensor, layer: int) -> None:
        change = tuned - base
        vocabulary = change.shape[-1]
        if self.k > vocabulary:
            raise SurgeryError(f"k is {self.k}, and the vocabulary has {vocabulary} tokens.")
        if not self.raised.size:
            self.raised, self.lowered = np.zeros((2, vocabulary), dtype=np.int64)
        for counts, signed in ((self.raised, change), (self.lowered, -change)):
            best = signed.topk(self.k)
            counts += np.bincount(best.indices[best.values > 0].cpu().numpy(), minlength=vocabulary)


@dataclass(frozen=True, eq=False)
class Mined:
    """How often each token's logit was among those most raised, and most lowered."""

    raised: np.ndarray
    """(vocab,) number of places."""
    lowered: np.ndarray
    places: int
    """Number of tokens read."""
    k: int
    tokenizer: Any = None

    def top(self, n: int = 20, *, lowered: bool = False) -> list[tuple[str, int, float]]:
        """(token, its id, share of places) of the n most frequent; tokens that never occur are left out."""
        counts = self.lowered if lowered else self.raised
        order = [int(i) for i in np.argsort(-counts, kind="stable")[:n] if counts[i]]
        return [(word(self.tokenizer, i), i, float(counts[i] / self.places)) for i in order]

    def plot(self, n: int = 15, title: str = "") -> Figure:
        """The most frequent tokens of both kinds, as bars."""
        from analysis.diff.figures import ranked

        sides = {"raised": self.top(n), "lowered": self.top(n, lowered=True)}
        bars = {f"{side} most": [(text, share) for text, _, share in top] for side, top in sides.items()}
        return ranked(bars, unit=f"share of {self.places} places in the top {self.k}",
                      title=title or "logits of the tuned model minus the base's")  # fmt: skip


def diff_mining(
    pair: Pair, texts: Any, k: int = 10, *, max_tokens: int = 1024, batch_size: int = 8,
    progress: Progress | None = None,
) -> Mined:  # fmt: skip
    """Counts, over all tokens of the texts, the k most raised and the k most lowered logits of the next token.

    A logit that does not move counts as neither. Raises `SurgeryError` when k exceeds the vocabulary.
    """
    if k < 1:
        raise SurgeryError(f"k is at least 1, and not {k}.")
    found = Texts.of(pair, texts, max_tokens)
    seen = Ranks(Scope(found, (), np.zeros(0, dtype=np.int64)), k)
    stream(pair, found, [seen], batch_size=batch_size, progress=progress)
    return Mined(seen.raised, seen.lowered, found.total, k, pair.tokenizer)
