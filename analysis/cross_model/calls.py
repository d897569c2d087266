"""Patching across the models of a pair: `cmap` by groups, `transplant` by cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from analysis.cross_model.groups import effects_of, group_of
from analysis.metrics import Metric, as_metric
from analysis.patching.resumed import column_of, components
from analysis.patching.run import (
    BUDGET,
    Place,
    Progress,
    Run,
    Source,
    chosen_by,
    everywhere,
    listed,
    places_of,
)
from analysis.results import Result
from surgery.activations.interventions import unwrapped
from surgery.activations.passes import run
from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.anatomy.model import width
from surgery.errors import SurgeryError
from surgery.models import Batch, Pair, as_batch

Direction = Literal["tuned_to_base", "base_to_tuned"]
Groups = Mapping[str, Sequence[str | Site] | str]


def cmap(
    pair: Pair,
    prompts: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    groups: Groups | str = "z",
    *,
    sources: str = "outputs",
    direction: Direction = "tuned_to_base",
    positions: Any = None,
    random: int = 10,
    seed: int = 0,
    tokenizer: Any = None,
    budget: int = BUDGET,
    progress: Progress | None = None,
) -> Result:
    """The effect of writing each group of components from one model into the other, (example, group, draw).

    `groups` are sites by name: {"A": ["z.3.2", "z.4.0@-1"]}; one site's name is a sweep over its cells, see
    `transplant`. `positions` (of sites that name none): a number, one a prompt, or either of them by group; negative
    ones count from the last token. Without any, outputs are written at all positions, inputs at the last.
    The first draw is the group itself, the others are random groups: as many components of the same kinds, drawn from
    all of the model's by `seed` without replacement, at the same positions. `random=0` leaves that axis out.
    Under inputs a head of z stands for its q, k and v; with grouped queries k and v are those that its group shares.
    `budget` is how many bytes to take beside the models. Columns: `source`, `target`, `span` = source - target.

    Raises `SurgeryError` for models of different shape, tokens that one of them has not, unknown components and
    positions, and a metric for another number of examples.
    """
    if isinstance(groups, str):
        if sources != "outputs" or positions is not None:
            raise SurgeryError(f"The sweep over '{groups}' writes outputs, at all positions at once.",
                               hint="Name groups of components, or see transplant(..., by='position').")  # fmt: skip
        return transplant(pair, prompts, metric, groups, direction=direction, tokenizer=tokenizer, budget=budget,
                          progress=progress)  # fmt: skip
    source, target, batch, metric = _ready(pair, prompts, metric, direction, tokenizer)
    anatomy, generator = anatomy_of(target), torch.Generator().manual_seed(seed)
    named = _named(anatomy, groups)
    drawn = {name: [sites, *(_random(anatomy, sites, generator) for _ in range(random))]
             for name, sites in named.items()}  # fmt: skip
    chosen = []
    for name, draws in drawn.items():
        place = positions.get(name) if isinstance(positions, Mapping) else positions
        chosen += [group_of(anatomy, batch, sites, name, place, sources) for sites in draws]
    if isinstance(positions, Mapping) and (unknown := [name for name in positions if name not in named]):
        raise SurgeryError(f"positions= names a group '{unknown[0]}' that there is not.", hint=", ".join(named))
    effects, before, after = effects_of(source, target, batch, metric, chosen, budget, progress)
    axes: dict[str, Any] = {"example": list(range(len(batch))), "group": list(named)}
    values = effects.double().cpu().unflatten(1, (len(named), random + 1))
    if random:
        axes["draw"] = ["group", *(f"random {i + 1}" for i in range(random))]
    columns = {"source": after, "target": before, "span": after - before}
    told = {name: [[str(site) for site in sites] for sites in draws] for name, draws in drawn.items()}
    meta = {"kind": "cmap", "direction": direction, "sources": sources, "metric": metric.name, "model": anatomy.name,
            "groups": told, "seed": seed, "centre": 0, "ratio_name": "recovery"}  # fmt: skip
    return Result((values if random else values[..., 0]).numpy(), axes, f"effect on {metric.name}",
                  {name: column.double().cpu().tolist() for name, column in columns.items()}, meta)  # fmt: skip


def transplant(
    pair: Pair,
    prompts: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    site: str = "resid_pre",
    *,
    direction: Direction = "tuned_to_base",
    by: Literal["position", "all"] | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    parts: Sequence[int] | None = None,
    anchors: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    budget: int = BUDGET,
    reuse: bool = True,
    progress: Progress | None = None,
) -> Result:
    """The effect of writing every cell of one site from one model into the other, (example, layer[, position][, head]).

    `resid_pre` by position is the activations' counterpart of exchanging weights layer by layer: with `by="all"` it
    tells from which layer on one model's stream is enough for the other. The arguments are those of
    `analysis.patching.patch`; `anchors` name positions, each a number or one a prompt. Columns as in `cmap`.
    """
    source, target, batch, metric = _ready(pair, prompts, metric, direction, tokenizer)
    sweep = Run(target, batch, metric, site, listed(layers, "layers"), listed(parts, "parts"), budget, reuse)
    by = chosen_by(by, positions, "position" if sweep.parts is None else "all")
    if anchors is not None:
        found = {name: column_of(place, batch, f"anchor '{name}'") for name, place in anchors.items()}
        places = [Place(name, int(column.min()), column) for name, column in found.items()]
    else:
        places = everywhere(0) if by == "all" else places_of(batch, positions, 0)

    def values(rows: slice) -> Source:
        _, seen = run(source, batch.select(rows), [site], stop=True)
        return lambda layer: seen[Site(sweep.site, layer)].to(batch.ids.device)

    effects, before = sweep(places, values, progress)
    after = Run(source, batch, metric, "z", None, None, budget, True).whole(batch).to(before.device)
    columns = {"source": after, "target": before, "span": after - before}
    meta = {
        "kind": "cmap",
        "direction": direction,
        "sources": "outputs",
        "model": anatomy_of(target).name,
        "ratio_name": "recovery",
    }
    return sweep.result(effects, places, columns, meta, tokenizer)


# ---- what is given -------------------------------------------------------------------------------------------------


def _ready(
    pair: Pair, prompts: Any, metric: Any, direction: Direction, tokenizer: Any
) -> tuple[Any, Any, Batch, Metric]:
    """Source, target, right-padded prompts on the target's device and the metric, once all of them fit together."""
    if direction not in ("tuned_to_base", "base_to_tuned"):
        raise SurgeryError(f"direction={direction!r}: expected 'tuned_to_base' or 'base_to_tuned'.")
    base, tuned = unwrapped(pair.base), unwrapped(pair.tuned)
    source, target = (tuned, base) if direction == "tuned_to_base" else (base, tuned)
    sizes = {"n_layers": "layers", "n_heads": "heads", "n_kv_heads": "key-value heads", "d_head": "numbers a head",
             "d_model": "numbers in the stream"}  # fmt: skip
    for name, what in sizes.items():
        of_base, of_tuned = getattr(anatomy_of(base), name), getattr(anatomy_of(tuned), name)
        if of_base != of_tuned:
            raise SurgeryError(f"The base has {of_base} {what}, the tuned model {of_tuned}: activations of one can't "
                               "stand in the other.")  # fmt: skip
    plain = isinstance(prompts, (Batch, Tensor)) or (isinstance(prompts, Mapping) and "input_ids" in prompts)
    batch = as_batch(prompts, tokenizer) if plain or tokenizer is not None else pair.encode(prompts)
    metric = as_metric(metric)
    metric.check(len(batch))
    wanted = [t for t in (metric.tokens, metric.columns.get("answer")) if t is not None]
    for who, model in (("base", base), ("tuned model", tuned)):
        anatomy = anatomy_of(model)
        if (most := int(batch.ids[batch.mask].max())) >= (known := anatomy.embed.weight.shape[0]):
            raise SurgeryError(f"The prompts hold token {most}, and the {who} knows {known}.")
        for tokens in wanted:
            if (most := int(tokens.max())) >= (known := width(anatomy.head, output=True)):
                raise SurgeryError(f"The metric asks for token {most}, and the {who} has {known} logits.")
    return source, target, batch.to(target.device).right_padded(), metric.to(target.device)


def _named(anatomy: Anatomy, groups: Groups) -> dict[str, list[Site]]:
    """The components of every group. Raises `SurgeryError` for groups without any."""
    if not groups:
        raise SurgeryError("No groups of components were named.")
    found = {}
    for name, sites in groups.items():
        found[str(name)] = components(anatomy, sites)
        if not found[str(name)]:
            raise SurgeryError(f"Group '{name}' has no components.")
    return found


def _random(anatomy: Anatomy, sites: Sequence[Site], generator: torch.Generator) -> list[Site]:
    """As many components of the same kinds at the same positions, each at most once."""
    found = []
    for (name, single, position), count in Counter((s.name, s.head is not None, s.position) for s in sites).items():
        heads = (anatomy.heads_of(name) or 1) if single else 1
        for i in sorted(torch.randperm(anatomy.n_layers * heads, generator=generator)[:count].tolist()):
            found.append(Site(name, i // heads, i % heads if single else None, position))
    return found
