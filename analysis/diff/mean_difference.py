"""What fine-tuning writes into the stream whatever the text: the mean difference as tokens, and as a steering vector.

    lens = difference_lens(pair, unrelated_texts)     # mean of x_tuned - x_base at the first positions, layer L // 2
    lens.words(), lens.plot()                         # the tokens it promotes and suppresses
    with steer(pair.tuned, lens.steering(), 4.0): ...  # of surgery.activations.steering

Minder et al. 2025, "Narrow Finetuning Leaves Clearly Readable Traces in Activation Differences" (arXiv:2510.13900): on
the first tokens of unrelated text a narrow fine-tuning adds much the same vector, whose tokens tell what it was about.
`difference_pca` asks for the further directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from analysis.diff.lens import read, word
from analysis.diff.measures import Clouds, Scope, sampled, stream, stream_layers
from analysis.diff.per_token import Hit, Texts
from analysis.prompts import Progress, by_length
from analysis.similarity import Principal, principal
from surgery.activations import run
from surgery.activations.interventions import unwrapped
from surgery.anatomy import Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Pair, encode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Head = Literal["base", "tuned"]


@dataclass(frozen=True, eq=False)
class DifferenceLens:
    """The mean difference at each of the first positions, at one site."""

    site: str
    vectors: Tensor
    """(position, d_model) float32: the mean over texts of x_tuned - x_base."""
    counts: np.ndarray
    """(position,) texts that are long enough."""
    norms: np.ndarray
    """(position,) mean of ||x_tuned - x_base||."""
    base_norms: np.ndarray
    """(position,) mean of ||x_base||."""
    constant: np.ndarray
    """(position,) ||mean||² / mean ||.||²: the share of the difference that is the same on every text.

    1 where all of it is; about 1 / texts where the differences have nothing in common."""
    logits: dict[str, Tensor]
    """(position, vocab) by head, "base" and "tuned": the vectors behind that model's last norm and unembedding."""
    tokenizer: Any = None

    def words(self, k: int = 10, head: Head = "tuned") -> list[dict[str, Any]]:
        """The k tokens that each position's vector promotes and suppresses most, with softmax probabilities."""
        found = []
        for position, logits in enumerate(self.logits[head]):
            probs = logits.softmax(-1)
            pairs = {}
            for name, best in (("promoted", logits.topk(k)), ("suppressed", (-logits).topk(k))):
                pairs[name] = [(word(self.tokenizer, int(t)), float(probs[t])) for t in best.indices]
            found.append({"position": position, **pairs})
        return found

    def vector(self, position: int | None = None) -> Tensor:
        """(d_model,) the steering vector: of one position, or the mean over the positions."""
        return self.vectors.mean(0) if position is None else self.vectors[position]

    def steering(self, position: int | None = None) -> dict[str | Site, Tensor]:
        """Its site and vector, as `surgery.activations.steering.steer` takes them."""
        return {self.site: self.vector(position)}

    def plot(self, k: int = 6, title: str = "") -> Figure:
        """The tokens promoted, by position, read with either model's head."""
        from analysis.diff.figures import token_map

        panels = {}
        for name in self.logits:
            rows = [row["promoted"] for row in self.words(k, name)]  # type: ignore[arg-type]
            panels[f"{name} head"] = (
                [[w for w, _ in row] for row in rows],
                np.array([[p for _, p in row] for row in rows]),
            )
        sides = [f"{i} ({share:.0%} constant)" for i, share in enumerate(self.constant)]
        return token_map(panels, sides, range(1, k + 1), row_label="position", column_label="tokens promoted, by rank",
                         title=title or f"mean difference at {self.site}, {int(self.counts.max())} texts")  # fmt: skip


def difference_lens(
    pair: Pair,
    texts: Any,
    layer: int | None = None,
    positions: int = 5,
    *,
    site: str = "resid_post",
    batch_size: int = 32,
    progress: Progress | None = None,
) -> DifferenceLens:
    """The mean of x_tuned - x_base over texts, at the first `positions` tokens behind `layer` (L // 2).

    Only those tokens are read, and both models stop behind the layer. Raises `SurgeryError` for a layer that is none
    and when no text has so many tokens.
    """
    read_texts = Texts.of(pair, texts, positions)
    if read_texts.lengths.max() < positions:
        raise SurgeryError(f"No text has {positions} tokens: the longest has {read_texts.lengths.max()}.",
                           hint="Give longer texts, or fewer positions.")  # fmt: skip
    base, tuned = unwrapped(pair.base), unwrapped(pair.tuned)
    where = f"{site}.{_layer(pair, layer)}"
    stream_layers(pair, where)
    width = anatomy_of(base).d_model
    total, norms = torch.zeros(positions, width, dtype=torch.float64), torch.zeros(3, positions, dtype=torch.float64)
    for rows in by_length(read_texts.rows, batch_size, progress):
        batch = encode(None, [read_texts.rows[i] for i in rows])
        before, after = (run(model, batch, [where], stop=True)[1][where].cpu().double() for model in (base, tuned))
        real = batch.mask[..., None]
        change = (after - before).where(real, 0.0)
        reach = change.shape[1]
        total[:reach] += change.sum(0)
        sizes = change.norm(dim=-1), change.square().sum(-1), before.where(real, 0.0).norm(dim=-1)
        norms[:, :reach] += torch.stack([size.sum(0) for size in sizes])
    counts = (read_texts.lengths[:, None] > np.arange(positions)).sum(0)
    mean = total / torch.from_numpy(counts)[:, None]
    size, square, before_size = (norms / torch.from_numpy(counts)).numpy()
    share = mean.square().sum(-1).numpy() / np.maximum(square, np.finfo(float).tiny)
    vectors = mean.float()
    logits = {name: read(model, vectors).cpu() for name, model in (("base", base), ("tuned", tuned))}
    return DifferenceLens(where, vectors, counts, size, before_size, share, logits, pair.tokenizer)


def _layer(pair: Pair, layer: int | None) -> int:
    layers = anatomy_of(unwrapped(pair.base)).n_layers
    if layer is None:
        return layers // 2
    if not -layers <= layer < layers:
        raise SurgeryError(f"There is no layer {layer}; layers are 0 to {layers - 1}.")
    return layer % layers


@dataclass(frozen=True, eq=False)
class DifferencePCA:
    """The directions in which activations moved, and where each sampled token lies along them."""

    site: str
    directions: Principal
    """components (k, d_model), variance, explained, mean: see `analysis.similarity.principal`."""
    scores: np.ndarray
    """(token, k) of x_tuned - x_base - mean."""
    texts: Texts
    sample: np.ndarray
    """(token,) their places in the texts."""

    def top(self, component: int = 0, k: int = 10, *, largest: bool = True, context: int = 8) -> list[Hit]:
        """The k tokens that lie furthest along a component (or, not `largest`, furthest to its other side)."""
        scores = self.scores[:, component]
        order = np.argsort(-scores if largest else scores, kind="stable")[:k]
        return [self.texts.hit(int(self.sample[i]), float(scores[i]), context) for i in order]

    def words(self, pair: Pair, component: int = 0, k: int = 10) -> dict[str, list[str]]:
        """The tokens that a component and its negative promote, by the logit lens of the tuned model."""
        vector = self.directions.components[component].float()
        best = [read(pair.tuned, sign * vector).topk(k).indices.tolist() for sign in (1, -1)]
        return {side: [word(pair.tokenizer, t) for t in ids] for side, ids in zip("+-", best, strict=True)}

    def plot(self, title: str = "") -> Figure:
        """Tokens along the first two components, marked by the first token of a text; shares of variance."""
        from analysis.diff.figures import components

        return components(self, title)


def difference_pca(
    pair: Pair,
    texts: Any,
    layer: int | None = None,
    k: int = 10,
    *,
    site: str = "resid_post",
    centre: bool = True,
    max_tokens: int = 1024,
    sample: int = 4096,
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> DifferencePCA:
    """Principal directions of x_tuned - x_base at `layer` (L // 2) over `sample` tokens of the texts, drawn by `seed`.

    Without `centre` the mean difference counts as a direction too. Raises `SurgeryError` when there are fewer tokens
    than components.
    """
    where = f"{site}.{_layer(pair, layer)}"
    found = Texts.of(pair, texts, max_tokens)
    places = sampled(found, sample, seed)
    clouds = Clouds(Scope(found, stream_layers(pair, where), places))
    stream(pair, found, [clouds], site=where, layers=clouds.scope.layers, batch_size=batch_size, progress=progress)
    change = (clouds.tuned[0] - clouds.base[0]).double()
    directions = principal(change, k, centre=centre)
    scores = (change - directions.mean) @ directions.components.T
    return DifferencePCA(where, directions, scores.numpy(), found, places)
