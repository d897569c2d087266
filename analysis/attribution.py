"""Attribution patching: the effect of patching every node at once, to first order.

    found = attribute(model, clean, corrupt, logit_diff(answers), tokenizer=tokenizer)
    found["resid_pre"].normalized().plot()               # by layer and position, comparable with `patch`
    attribute(model, clean, corrupt, metric, "z", by="all")["z"].top(5, absolute=True)

For a node a of the run that is patched, A(a) = <a' - a, dm/da>, a' being its value in the other run: what the metric
would change by if it were linear (Nanda 2023; Syed et al. 2023, arXiv:2310.10348). Two forwards and one backward give
all nodes of all sites. Where the metric saturates the gradient at one point misleads; `steps` takes its mean along a
straight way between the runs instead (integrated gradients, Sundararajan et al. 2017, arXiv:1703.01365):

| path | what moves from corrupt to clean | forwards and backwards |
|---|---|---|
| "inputs" | the embeddings, once for all nodes | steps |
| "activations" | a site in one layer, all else as in the patched run | steps for each layer of each site |

Along "activations" attributions of one site and layer add up to the effect of patching it whole, as steps grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from analysis.edges.gradients import Direction, Passed, Rule, at_a_time, between, one_of, pairs, passed, points_of
from analysis.metrics import Metric, as_metric
from analysis.patching.run import places_of, tokens_at
from analysis.results import Result
from surgery.activations.interventions import unwrapped
from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch

DEFAULT = ("resid_pre", "attn_out", "mlp_out", "z")
By = Literal["position", "all"]
Path = Literal["inputs", "activations"]
_EMBED = Site("embed")


def attribute(
    model: Any,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    sites: str | Sequence[str | Site] = DEFAULT,
    *,
    direction: Direction = "denoising",
    by: By = "position",
    steps: int | None = None,
    path: Path = "activations",
    rule: Rule = "midpoint",
    tokenizer: Any = None,
    batch_size: int = 16,
) -> dict[str, Result]:
    """The first-order effect of patching every node, by site: (example, layer[, position][, head]).

    "denoising" patches clean values into the corrupt run (and takes the gradient there), "noising" corrupt ones into
    the clean run. `by="all"` sums over positions. Axes and columns are those of `patch`; heads are key-value heads for
    k and v, neurons for mlp_pre and mlp_post; of patterns and scores the position is that of the query. Sites are
    names, with or without a layer. Without `steps` gradients are those at the patched run, else means along `path`.

    `batch_size` examples run together; with a plain function as metric, all.

    Raises `SurgeryError` for unequal lengths, a site that does not exist or names single heads or positions, and a
    metric without gradient.
    """
    for name, given, known in (("direction", direction, Direction), ("by", by, By), ("path", path, Path)):
        one_of(name, given, get_args(known))
    if batch_size < 1:
        raise SurgeryError(f"batch_size is at least 1, and not {batch_size}.")
    model = unwrapped(model)
    anatomy = anatomy_of(model)
    wanted = _whole(anatomy, sites)
    good, bad = pairs(clean, corrupt, tokenizer, model.device)
    metric = as_metric(metric).to(model.device)
    metric.check(len(good))
    points = [] if steps is None else points_of(rule, steps)
    scores: dict[Site, list[Tensor]] = {site: [] for site in wanted}
    measured: list[tuple[Tensor, Tensor]] = []
    size = at_a_time(metric, batch_size, len(good))
    for begin in range(0, len(good), size):
        rows = slice(begin, begin + size)
        part = _Pair(model, good.select(rows), bad.select(rows), metric.select(rows), wanted, direction)
        for site, score in part.attributions(points, path):
            scores[site].append(score.sum(1) if by == "all" else score)
        measured.append((part.clean.values, part.corrupt.values))
    clean_value, corrupt_value = (torch.cat(values).double() for values in zip(*measured, strict=True))
    columns = {"clean": clean_value, "corrupt": corrupt_value, "span": clean_value - corrupt_value}
    meta = {"kind": "attribution", "direction": direction, "model": anatomy.name, "metric": metric.name, "centre": 0}
    if steps is not None:
        meta |= {"steps": steps, "path": path, "rule": rule}
    base = bad if direction == "denoising" else good
    named = {name: [site for site in wanted if site.name == name] for name in dict.fromkeys(s.name for s in wanted)}
    return {
        name: _result([torch.cat(scores[s]) for s in own], own, columns, {**meta, "site": name}, base, by, tokenizer)
        for name, own in named.items()
    }


def _whole(anatomy: Anatomy, sites: str | Sequence[str | Site]) -> list[Site]:
    found = anatomy.expand(sites)
    for site in found:
        if site.head is not None or site.position is not None:
            raise SurgeryError(f"Attribution gives all heads and positions of a site at once, and '{site}' names some.",
                               hint=f"Ask for '{site.whole}' and take `select` of the result.")  # fmt: skip
    if not found:
        raise SurgeryError("No sites to attribute to.", hint="For instance sites=('resid_pre', 'z').")
    return found


class _Pair:
    """Some pairs of prompts: both runs, and what gradients make of their difference."""

    def __init__(
        self, model: Any, good: Batch, bad: Batch, metric: Metric, sites: list[Site], direction: Direction
    ) -> None:
        self.model, self.metric, self.sites = model, metric, sites
        self.denoising = direction == "denoising"
        self.base, self.source = (bad, good) if self.denoising else (good, bad)
        self._means: dict[Site, Tensor] = {}

    @property
    def clean(self) -> Passed:
        """The clean run."""
        return self.far if self.denoising else self.near

    @property
    def corrupt(self) -> Passed:
        """The corrupt run."""
        return self.near if self.denoising else self.far

    def attributions(self, points: list[float], path: Path) -> Iterator[tuple[Site, Tensor]]:
        """Each site with (batch, pos[, head])."""
        kept = [*self.sites, *([_EMBED] if points and path == "inputs" and _EMBED not in self.sites else [])]
        self.far = passed(self.model, self.source, self.metric, kept)
        self.near = passed(self.model, self.base, self.metric, kept, [] if points else self.sites)
        for site in self.sites:
            pattern = site.kind == "pattern"
            score = self._difference(site)
            score = score * (self._mean_gradient(site, points, path) if points else self.near.gradients[site]).float()
            if pattern:
                yield site, score.sum(-1).transpose(1, 2)  # over keys; (batch, query, head)
            else:
                yield site, score if site.kind == "neurons" else score.sum(-1)

    def _difference(self, site: Site) -> Tensor:
        far, near = self.far.seen[site].float(), self.near.seen[site].float()
        if site.kind != "pattern":
            return far - near
        return torch.where(far == near, 0, far - near)  # masked scores are -inf, or the least number, in both

    def _mean_gradient(self, site: Site, points: list[float], path: Path) -> Tensor:
        if path == "inputs":
            if not self._means:
                self._means = self._along(_EMBED, points, self.sites)
            return self._means[site]
        return self._along(site, points, [site])[site]

    def _along(self, moved: Site, points: list[float], sites: list[Site]) -> dict[Site, Tensor]:
        """Mean gradients at `sites` while `moved` goes from corrupt to clean in the run that is patched."""
        sums: dict[Site, Tensor] = {}
        for at in points:
            edits = {moved: between(self.corrupt.seen[moved], self.clean.seen[moved], at)}
            found = passed(self.model, self.base, self.metric, (), sites, edits=edits).gradients
            sums = {site: gradient.float() + sums.get(site, 0) for site, gradient in found.items()}
        return {site: total / len(points) for site, total in sums.items()}


def _result(
    scores: list[Tensor],
    sites: list[Site],
    columns: dict[str, Tensor],
    meta: dict[str, Any],
    base: Batch,
    by: By,
    tokenizer: Any,
) -> Result:
    values = torch.stack(scores, 1)  # (example, layer[, position][, part])
    axes: dict[str, Any] = {"example": range(len(base)), "layer": [site.layer for site in sites]}
    if sites[0].layer is None:
        values = values[:, 0]
        del axes["layer"]
    if by == "position":
        places = places_of(base, None, 0)
        axes["position"] = [place.label for place in places]
        if tokenizer is not None:
            meta["ticks"] = {"position": tokens_at(base, places, tokenizer)}
    if sites[0].kind != "stream":
        part = {"neurons": "neuron"}.get(sites[0].kind, "kv_head" if sites[0].name in ("k", "v") else "head")
        axes[part] = range(values.shape[-1])
    numbers = {name: column.cpu().tolist() for name, column in columns.items()}
    return Result(values.double().cpu().numpy(), axes, f"attributed effect on {meta['metric']}", numbers, meta)
