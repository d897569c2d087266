"""Everything at once: which latents to look at, and what there is to say of each.

    found = overview(Reader(crosscoder, [base, tuned], "resid_post.2", tokenizer), texts, top=10)
    found = overview([Reader(dictionary, model, site, tokenizer) for model in (base, tuned)], texts)
    found.rows(), found.plot(), found.page(), found.latents

| what is given | how latents are ranked for "tuned" and "base" |
|---|---|
| a crosscoder of two models | by relative norm; those that pass both nu first |
| two readers of one dictionary, of base and tuned | by how sure the change of the firing rate is |
| anything else | only by use: the sum of activations |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.features.changes import Changed, changed
from analysis.features.examples import Examples, examples
from analysis.features.kinds import Scaling, latent_scaling
from analysis.features.page import Sides, facts_of, feature_page
from analysis.features.reader import NAMES, Reader
from analysis.features.words import promoted
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.html import Html

Show = Literal["tuned", "base", "used"]


@dataclass(frozen=True, eq=False)
class Overview:
    """What `overview` finds."""

    reader: Reader
    latents: list[int]
    """Those that are shown, in their order."""
    sets: dict[str, Examples]
    """Their examples; by model where one dictionary read both."""
    scaling: Scaling | None = None
    changes: Changed | None = None
    tokens: dict[int, Sides] = field(default_factory=dict)
    """What each promotes and suppresses, at sites of the stream."""

    @property
    def kinds(self) -> dict[str, int]:
        """How many latents there are of each kind, or fate."""
        if self.scaling is not None:
            column: Any = self.scaling.to_dataframe()["kind"]
        elif self.changes is not None:
            column = self.changes.to_dataframe()["fate"]
        else:
            return {}
        return {str(name): int(count) for name, count in column.value_counts().items() if name}

    def rows(self) -> list[dict[str, Any]]:
        """One a latent: its numbers, by the names of the page."""
        facts = facts_of(self.reader.dictionary, self.sets, self.scaling, self.changes, None)
        return [{"latent": j} | facts(j) for j in self.latents]

    def to_dict(self, k: int = 5) -> dict[str, Any]:
        """All of it as plain JSON, with `k` examples of each latent."""
        told = []
        for row in self.rows():
            j = row["latent"]
            row["examples"] = [
                ({"model": name} if name else {}) | {key: value for key, value in each.items() if key != "latent"}
                for name, found in self.sets.items()
                for each in found.to_dataframe().query(f"latent == {j} and rank < {k}").to_dict("records")
            ]
            if j in self.tokens:
                row["promotes"], row["suppresses"] = self.tokens[j]
            told.append(row)
        one = next(iter(self.sets.values()))
        counts = {"site": self.reader.site, "texts": one.texts, "tokens": one.tokens}
        return counts | {"kinds": self.kinds, "latents": told}

    def plot(self) -> Figure:
        """Of a pair how its latents lie between base and tuned; else histograms of those that are shown."""
        if self.scaling is not None:
            return self.scaling.plot()
        if self.changes is not None:
            return self.changes.plot()
        return next(iter(self.sets.values())).plot(self.latents[:9])

    def page(self, title: str = "Features", k: int = 6) -> Html:
        """The page of features."""
        return feature_page(self.reader.dictionary, self.sets if len(self.sets) > 1 else next(iter(self.sets.values())),
                            latents=self.latents, scaling=self.scaling, changes=self.changes, tokens=self.tokens, k=k,
                            title=title)  # fmt: skip


def overview(
    reader: Reader | Sequence[Reader],
    texts: Sequence[Any],
    latents: Sequence[int] | None = None,
    *,
    top: int = 10,
    show: Show | None = None,
    k: int = 8,
    random: int = 0,
    seed: int = 0,
) -> Overview:
    """The `latents` named, or the `top` of one kind, each with `k` examples: two passes over the texts.

    `show` is "tuned", "base" or "used"; "tuned" where there is a pair and "used" otherwise. `random` more examples of
    each are drawn by `seed`. Raises `SurgeryError` for a kind where there is no pair, for readers that don't belong
    together, and as `examples` does.
    """
    readers = [reader] if isinstance(reader, Reader) else list(reader)
    first = readers[-1]
    if len(readers) > 2 or any((r.dictionary, r.site) != (first.dictionary, first.site) for r in readers):
        raise SurgeryError("Two readers are of one dictionary at one site: the base's and the tuned model's.")
    texts = list(texts)
    scaling = changes = None
    if first.dictionary.models == 2:
        scaling = latent_scaling(first.dictionary, first.rows(texts))
    elif len(readers) == 2:
        base, tuned = (r.models[0] for r in readers)
        changes = changed(first.dictionary, base, tuned, texts, first.site, first.tokenizer, keep=first.keep,
                          batch_size=first.batch_size, max_tokens=first.max_tokens)  # fmt: skip
    paired = scaling is not None or changes is not None
    show = show or ("tuned" if paired else "used")
    if show not in ("tuned", "base", "used") or (show != "used" and not paired):
        raise SurgeryError(f"There are no latents of kind {show!r} to show.",
                           hint="'tuned' and 'base' need a pair; 'used' is of any dictionary.")  # fmt: skip
    if latents is not None:
        chosen = first.chosen(list(latents))
    elif show == "used":
        every = examples(first, texts, k=0)
        chosen = [int(j) for j in np.argsort(-every.sums, kind="stable")[:top] if every.fired[j]]
    elif scaling is not None:
        chosen = _leaning(scaling, show, top)
    else:
        assert changes is not None
        chosen = _turned(changes, show, top)
    if not chosen:
        raise SurgeryError(f"No latent leans to the {show} model on these texts.", hint="show='used' shows others.")
    names = NAMES if len(readers) == 2 else ("",)
    sets = {name: examples(r, texts, chosen, k=k, random=random, seed=seed)
            for name, r in zip(names, readers, strict=True)}  # fmt: skip
    return Overview(first, chosen, sets, scaling, changes, _tokens(first, chosen, show))


def _leaning(scaling: Scaling, show: Show, top: int) -> list[int]:
    """By relative norm, from 1 down or from 0 up; those whose norms and nu say tuned only first."""
    norm, used = scaling.norm.double().numpy(), (scaling.rows > 0).numpy()
    far = norm if show == "tuned" else 1 - norm
    far = np.where(used & np.isfinite(far), far, -1.0)
    if show == "tuned":
        far[scaling.tuned_only().numpy()] += 1
    return [int(j) for j in np.argsort(-far, kind="stable")[:top] if far[j] > 0.5]


def _turned(changes: Changed, show: Show, top: int) -> list[int]:
    """By how sure the change of the firing rate is, up or down."""
    mean = dict(zip(changes.latents, changes.difference().mean.tolist(), strict=True))
    sign = 1 if show == "tuned" else -1
    return [j for j in changes.top(len(changes.latents)) if sign * mean[j] > 0][:top]


def _tokens(reader: Reader, chosen: list[int], show: Show) -> dict[int, Sides]:
    """Nothing where the decoder does not write to the stream."""
    model = reader.model("base" if show == "base" and len(reader.models) == 2 else -1)
    rows = reader.decoder("base" if show == "base" and len(reader.models) == 2 else -1)[chosen]
    if rows.shape[1] != model.config.get_text_config().hidden_size or reader.tokenizer is None:
        return {}
    return dict(zip(chosen, promoted(model, rows, tokenizer=reader.tokenizer), strict=True))
