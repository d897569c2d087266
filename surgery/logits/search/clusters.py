"""Solutions that say the same: clusters by answer, by what they do, or by vectors; the best cluster's medoid stands
for it.

    groups = by_key(drawn, lambda sample: run(sample.text))     # programs that compute the same on given inputs
    best = ranked(groups, drawn, weight="mean")[0]
    drawn[medoid(best, edit_distances(drawn))]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from surgery.errors import SurgeryError
from surgery.logits.search.selection import WEIGHTS, Sample, Weight

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, slots=True)
class Cluster:
    """Samples of one prompt that belong together, by their numbers."""

    members: tuple[int, ...]
    key: Hashable | None = None
    """What they share; None when vectors brought them together."""


def by_key(found: Sequence[Sample], key: Callable[[Sample], Hashable | None]) -> list[Cluster]:
    """Samples with equal keys, in the order first seen; those with the key None (it did not run) are in no cluster.

    The key may be an executed trace, as AlphaCode clusters programs by what they print (Li et al. 2022,
    arXiv:2203.07814).
    """
    groups: dict[Hashable, list[int]] = {}
    for i, sample in enumerate(found):
        if (k := key(sample)) is not None:
            groups.setdefault(k, []).append(i)
    return [Cluster(tuple(members), k) for k, members in groups.items()]


def by_answer(found: Sequence[Sample]) -> list[Cluster]:
    """Samples with the same answer."""
    return by_key(found, lambda sample: sample.answer)


def by_vectors(
    vectors: Float[np.ndarray, "sample size"],
    threshold: float = 0.9,
    *,
    linkage: Literal["average", "complete", "single"] = "average",
) -> list[Cluster]:
    """Agglomerative clusters of the caller's embeddings: merged while their cosine is at least `threshold`.

    The cosine of two clusters is the mean (`average`), least (`complete`) or largest (`single`) over their pairs.
    Raises `SurgeryError` for vectors that are not finite or of length 0, and a threshold that is no cosine.
    """
    if not -1 <= threshold <= 1:
        raise SurgeryError(f"The threshold is {threshold}; expected a cosine, -1 to 1.")
    distances = cosine_distances(vectors)
    if len(distances) < 2:
        return [Cluster((0,))] * len(distances)
    from sklearn.cluster import AgglomerativeClustering

    above = np.nextafter(1 - threshold, np.inf)  # scikit-learn merges below its threshold, not at it
    model = AgglomerativeClustering(None, metric="precomputed", linkage=linkage, distance_threshold=above)
    groups: dict[int, list[int]] = {}
    for i, label in enumerate(model.fit(distances).labels_.tolist()):
        groups.setdefault(label, []).append(i)
    return [Cluster(tuple(members)) for members in groups.values()]


def ranked(clusters: Sequence[Cluster], found: Sequence[Sample], weight: str | Weight = "one") -> list[Cluster]:
    """Best first, by size times mean weight (the sum of weights); ties by summed log-probability, then as given.

    Of clusters by answer the first is that of `weighted_vote`.
    """
    weigh = WEIGHTS.lookup(weight) if isinstance(weight, str) else weight
    worth = [math.fsum(weigh(found[i]) for i in cluster.members) for cluster in clusters]
    likely = [math.fsum(found[i].log_prob for i in cluster.members) for cluster in clusters]
    return [clusters[c] for c in sorted(range(len(clusters)), key=lambda c: (-worth[c], -likely[c]))]


def medoid(cluster: Cluster, distances: Float[np.ndarray, "sample sample"]) -> int:
    """The member with the least sum of distances to the others, then the first: its number among all samples."""
    members = list(cluster.members)
    if not members:
        raise SurgeryError("A cluster without members has no medoid.")
    sums = np.asarray(distances)[np.ix_(members, members)].sum(axis=1)
    return members[int(np.flatnonzero(np.isclose(sums, sums.min(), rtol=1e-12, atol=1e-12))[0])]


def cosine_distances(vectors: Float[np.ndarray, "sample size"]) -> Float[np.ndarray, "sample sample"]:
    """1 - cosine of every pair. Raises `SurgeryError` for vectors that are not finite or of length 0."""
    rows = np.asarray(vectors, dtype=np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise SurgeryError(f"Vectors have the shape {rows.shape}; expected (sample, size), all finite.")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if (norms == 0).any():
        raise SurgeryError(f"Vector {int(np.flatnonzero(norms == 0)[0])} is 0: it has no direction.")
    rows = rows / norms
    distances = 1 - rows @ rows.T
    np.fill_diagonal(distances, 0.0)
    return np.clip(distances, 0.0, 2.0)


def edit_distances(found: Sequence[Sample]) -> Float[np.ndarray, "sample sample"]:
    """1 - similarity of every pair of texts: the share of characters in matching blocks, for want of vectors.

    Symmetric: the mean of both directions of difflib's ratio.
    """
    from difflib import SequenceMatcher

    texts = [sample.text for sample in found]
    ratio = np.ones((len(texts), len(texts)))
    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            if i != j and a != b:
                ratio[i, j] = SequenceMatcher(None, a, b, autojunk=False).ratio()
    return 1 - (ratio + ratio.T) / 2
