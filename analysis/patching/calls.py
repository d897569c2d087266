"""The sweeps: `patch`, `ablate` and `knockout`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from analysis.metrics import Metric, as_metric
from analysis.patching.run import (
    BUDGET,
    By,
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
from surgery.activations.interventions import Call, eager, unwrapped
from surgery.activations.passes import run
from surgery.anatomy import Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, as_batch

Direction = Literal["denoising", "noising"]
Ablation = Literal["zero", "mean", "position_mean", "resample"]


def patch(
    model: Any,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    site: str = "resid_pre",
    *,
    direction: Direction = "denoising",
    by: By | None = None,
    layers: Sequence[int] | int | None = None,
    positions: Sequence[int] | int | None = None,
    parts: Sequence[int] | int | None = None,
    anchors: Mapping[str, tuple[Any, Any]] | None = None,
    tokenizer: Any = None,
    budget: int = BUDGET,
    reuse: bool = True,
    progress: Progress | None = None,
) -> Result:
    """The effect of every cell of one site, (example, layer[, position][, head]).

    `clean` and `corrupt` are prompts of equal length, pair by pair; of unequal ones `anchors` name the places that
    correspond: {name: (column in each clean prompt, column in each corrupt prompt)}, -1 the last token. `by` is
    "position" for sites of the stream, and "all" positions at once for heads and neurons, if not said (and no
    positions are chosen). `parts` are the heads (key-value heads for k and v) or neurons, all of them by default. With
    `reuse=False` every cell is one whole forward. Columns `clean`, `corrupt` and `span` hold the metric of both runs
    and its difference.

    Raises `SurgeryError` for unequal lengths without anchors, for a site, layer, head or position that does not exist,
    and for a metric of another number of examples.
    """
    if direction not in ("denoising", "noising"):
        raise SurgeryError(f"direction={direction!r}: expected 'denoising' or 'noising'.")
    model = unwrapped(model)
    good = as_batch(clean, tokenizer).to(model.device).right_padded()
    bad = as_batch(corrupt, tokenizer).to(model.device).right_padded()
    if len(good) != len(bad):
        raise SurgeryError(f"There are {len(good)} clean prompts and {len(bad)} corrupt ones: they come in pairs.")
    if anchors is None:
        good, bad = _aligned(good, bad)
    layers, parts = listed(layers, "layers"), listed(parts, "parts")
    base, source = (bad, good) if direction == "denoising" else (good, bad)
    sweep = Run(model, base, as_metric(metric), site, layers, parts, budget, reuse)
    site, pattern = sweep.site, Site(sweep.site).kind == "pattern"
    after: list[Tensor] = []

    def values(rows: slice, moved: tuple[Tensor, Tensor] | None = None) -> Source:
        value, seen = sweep.seen(source, rows, [site])
        after.append(value)
        moved = None if moved is None else (moved[0][rows], moved[1][rows])
        return lambda layer: _moved(seen[Site(site, layer)], moved, base, pattern)

    if anchors is None:
        first = _first_difference(good, bad)
        together = chosen_by(by, positions, "position" if sweep.parts is None else "all") == "all"
        places = everywhere(first, base.ids.shape[1]) if together else places_of(base, positions, first)
        effects, before = sweep(places, values, progress)
    else:
        if by == "all" or positions is not None or pattern:
            wrong = f"site='{site}'" if pattern else "by='all'" if by == "all" else "positions="
            raise SurgeryError(f"{wrong} can't be used with anchors: they are single tokens that correspond.")
        places, here, there = _anchored(anchors, base, source, direction)
        effects, before = torch.empty(0), torch.empty(0)
        for some in _apart(here):
            moved = (here[:, some], there[:, some])
            found, before = sweep([places[i] for i in some], lambda rows, m=moved: values(rows, m), progress)  # type: ignore[misc]
            effects = effects if len(effects) else found.new_zeros(*found.shape[:2], len(places), found.shape[3])
            effects[:, :, some] = found
    other = torch.cat(after)[: len(base)]
    corrupt_value, clean_value = (before, other) if direction == "denoising" else (other, before)
    columns = {"clean": clean_value, "corrupt": corrupt_value, "span": clean_value - corrupt_value}
    meta = {"kind": "patching", "direction": direction, "model": anatomy_of(model).name,
            "ratio_name": "recovery" if direction == "denoising" else "damage"}  # fmt: skip
    return sweep.result(effects, places, columns, meta, tokenizer)


def ablate(
    model: Any,
    prompts: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    site: str = "z",
    value: Ablation | float = "mean",
    *,
    reference: Any = None,
    by: By | None = None,
    layers: Sequence[int] | int | None = None,
    positions: Sequence[int] | int | None = None,
    parts: Sequence[int] | int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    budget: int = BUDGET,
    reuse: bool = True,
    progress: Progress | None = None,
) -> Result:
    """The effect of taking out every cell of one site, (example, layer[, position][, head]).

    | value | what takes a value's place |
    |---|---|
    | a number | that number; "zero" is 0 |
    | "mean" | its mean over the real tokens of the reference prompts |
    | "position_mean" | its mean over the reference prompts at the same position: they need one layout |
    | "resample" | the value in another of the reference prompts, drawn by `seed`, never the prompt's own |

    `reference` is the prompts themselves if not said. Of a head z is replaced, not what it writes: the output bias
    stays. Column `clean` holds the metric without ablation. Raises `SurgeryError` as `patch` does, and when the
    reference does not fit.
    """
    model = unwrapped(model)
    base = _trimmed(as_batch(prompts, tokenizer).to(model.device).right_padded())
    others = base if reference is None else _trimmed(as_batch(reference, tokenizer).to(model.device).right_padded())
    layers, parts = listed(layers, "layers"), listed(parts, "parts")
    sweep = Run(model, base, as_metric(metric), site, layers, parts, budget, reuse)
    places = everywhere(0) if chosen_by(by, positions, "all") == "all" else places_of(base, positions, 0)
    values = _ablated(model, base, others, sweep.site, value, seed)
    effects, before = sweep(places, values, progress)
    meta = {"kind": "ablation", "value": value, "seed": seed, "model": anatomy_of(model).name}
    return sweep.result(effects, places, {"clean": before}, meta, tokenizer)


def knockout(
    model: Any,
    prompts: Any,
    metric: Metric | Callable[[Tensor], Tensor],
    *,
    destination: Any = -1,
    source: Any,
    windows: Sequence[Sequence[int] | int] | None = None,
    heads: Sequence[int] | int | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Result:
    """The effect of cutting attention from `destination` to `source` tokens in some layers, (example, layers).

    Positions are numbers (negative ones from the last token) or one number an example. `windows` are sets of layers;
    by default all layers from l on, for every l. The scores are set to the least number of their type before the
    softmax (Geva et al. 2023, arXiv:2304.14767). Column `clean` holds the metric without the cut.
    """
    model, metric = unwrapped(model), as_metric(metric)
    base = _trimmed(as_batch(prompts, tokenizer).to(model.device).right_padded())
    anatomy = anatomy_of(model)
    metric = metric.to(model.device)
    metric.check(len(base), anatomy.embed.weight.shape[0])
    to, of = _columns(destination, base, "destination"), _columns(source, base, "source")
    if bool((wrong := of > to).any()):
        raise SurgeryError(f"The source of prompt {int(wrong.int().argmax())} comes after its destination: nothing is "
                           "there to cut.", hint="destination= is the token that looks.")  # fmt: skip
    if bool((wrong := to == 0).any()):
        raise SurgeryError(f"The first token of prompt {int(wrong.int().argmax())} sees itself alone: that can't be "
                           "cut.")  # fmt: skip
    if windows is None:
        windows = [range(first, anatomy.n_layers) for first in range(anatomy.n_layers)]
    cuts = [[window] if isinstance(window, int) else list(window) for window in windows]
    if not cuts or not all(cuts):
        raise SurgeryError("windows= are sets of layers, one at least with a layer in each.", hint="[[0, 1], [2, 3]]")
    anatomy.expand([Site("scores", layer) for window in cuts for layer in window])
    heads = listed(heads, "heads")
    anatomy.expand([Site("z", 0, head) for head in heads or ()])
    rows, chosen = torch.arange(len(base), device=to.device), slice(None) if heads is None else heads

    def cut(scores: Tensor, call: Call) -> Tensor:
        scores = scores.clone()
        part = scores[rows, :, to, of]
        part[:, chosen] = torch.finfo(scores.dtype).min
        scores[rows, :, to, of] = part
        return scores

    with eager(model):  # also the run without a cut: what is compared comes from one kernel
        logits, _ = run(model, base)
        assert logits is not None
        before, found = metric.of_logits(logits, base.last), []
        for i, window in enumerate(cuts):
            logits, _ = run(model, base, edits={f"scores.{layer}": cut for layer in window})
            assert logits is not None
            found.append(metric.of_logits(logits, base.last) - before)
            if progress is not None:
                progress(i + 1, len(cuts))
    axes: dict[str, Any] = {"example": list(range(len(base))), "layers": [_span(window) for window in cuts]}
    meta = {"kind": "knockout", "metric": metric.name, "model": anatomy.name, "centre": 0}
    values = torch.stack(found, 1).double().cpu().numpy()
    return Result(values, axes, f"effect on {metric.name}", {"clean": before.tolist()}, meta)


# ---- what takes the place of a value -------------------------------------------------------------------------------


def _ablated(
    model: Any, base: Batch, others: Batch, site: str, value: Ablation | float, seed: int
) -> Callable[[slice], Source]:
    if isinstance(value, (int, float)) or value == "zero":
        number = 0.0 if value == "zero" else float(value)
        anatomy = anatomy_of(model)
        return lambda rows: (
            lambda layer: torch.full((1, 1), number, device=model.device).view([1] * _rank(site, anatomy))
        )
    if value in ("mean", "position_mean"):
        means = _means(model, others, site, value == "position_mean")
        if value == "position_mean" and (long := others.ids.shape[1]) != (own := base.ids.shape[1]):
            raise SurgeryError(f"The reference prompts are {long} tokens long and the prompts {own}: a mean by "
                               "position needs one layout.", hint="Use value='mean'.")  # fmt: skip
        return lambda rows: lambda layer: means[layer]
    if value != "resample":
        raise SurgeryError(f"value={value!r}: expected 'zero', 'mean', 'position_mean', 'resample' or a number.")
    order = drawn_others(len(base), len(others), others is base, seed)
    drawn = others.select(order)
    if bool((drawn.lengths < base.lengths).any()):
        raise SurgeryError("A resampled prompt is shorter than the one that it stands in for.",
                           hint="Give reference prompts of the same length.")  # fmt: skip

    def values(rows: slice) -> Source:
        _, seen = run(model, drawn.select(rows), [site], stop=True)
        return lambda layer: _moved(seen[Site(site, layer)], None, base, Site(site).kind == "pattern")

    return values


def _rank(site: str, anatomy: Any) -> int:
    return 3 if Site(site).kind in ("stream", "neurons") else 4


def _means(model: Any, others: Batch, site: str, by_position: bool) -> list[Tensor]:
    """The mean of a site in every layer, with axes of one entry where it was taken."""
    anatomy = anatomy_of(model)
    if Site.parse(site).kind == "pattern":
        raise SurgeryError(f"'{site}' has no mean over tokens: it looks at others at each of them.",
                           hint="Ablate z, or cut attention with knockout.")  # fmt: skip
    _, seen = run(model, others, [site], stop=True)
    found = []
    for layer in range(anatomy.n_layers):
        value = seen[Site(site, layer)].float()
        weight = others.mask.view(*others.mask.shape, *[1] * (value.dim() - 2)).float()
        axes = 0 if by_position else (0, 1)
        found.append((value * weight).sum(axes, keepdim=True) / weight.sum(axes, keepdim=True).clamp(min=1))
    return found


def drawn_others(size: int, others: int, same: bool, seed: int) -> Tensor:
    """For each prompt one of the others; of the prompts themselves a permutation without fixed points."""
    generator = torch.Generator().manual_seed(seed)
    if not same:
        return torch.randint(others, (size,), generator=generator)
    if size < 2:
        raise SurgeryError("One prompt can't be resampled from itself.", hint="Pass reference prompts.")
    order = torch.randperm(size, generator=generator)  # one cycle through all: nobody stays in place
    drawn = torch.empty(size, dtype=torch.long)
    drawn[order] = order.roll(1)
    return drawn


def _moved(value: Tensor, moved: tuple[Tensor, Tensor] | None, base: Batch, pattern: bool = False) -> Tensor:
    """Values of the source on the base's columns: cut to its width, or each anchor put where it stands there."""
    width = base.ids.shape[1]
    if moved is None and pattern:
        return value if value.shape[2] == width else value[..., :width, :width]
    if moved is None:
        return value[:, :width]
    here, there = moved
    rows = torch.arange(len(value), device=value.device)[:, None]
    found = value.new_zeros(len(value), width, *value.shape[2:])
    found[rows, here] = value[rows, there]
    return found


# ---- prompts that belong together ----------------------------------------------------------------------------------


def _aligned(clean: Batch, corrupt: Batch) -> tuple[Batch, Batch]:
    """Both to one width. Raises `SurgeryError` naming the first pair of unequal length."""
    if bool((differ := clean.lengths != corrupt.lengths).any()):
        pair = int(differ.int().argmax())
        raise SurgeryError(
            f"Pair {pair}: the clean prompt is {int(clean.lengths[pair])} tokens long, the corrupt one "
            f"{int(corrupt.lengths[pair])}; position by position they don't correspond.",
            hint="Make them equally long, or name places that correspond: anchors={'name': (clean, corrupt)}.",
        )
    return _trimmed(clean), _trimmed(corrupt)


def _trimmed(batch: Batch) -> Batch:
    """Without columns at the end that no prompt reaches."""
    width = int(batch.lengths.max())
    return batch if width == batch.ids.shape[1] else Batch(batch.ids[:, :width], batch.mask[:, :width])


def _first_difference(clean: Batch, corrupt: Batch) -> Tensor:
    """(batch,) the first column in which each pair differs: to the left of it no change has an effect."""
    differs = (clean.ids != corrupt.ids) & clean.mask
    return torch.where(differs.any(1), differs.int().argmax(1), clean.ids.shape[1])


def _anchored(
    anchors: Mapping[str, tuple[Any, Any]], base: Batch, source: Batch, direction: Direction
) -> tuple[list[Place], Tensor, Tensor]:
    """The places of anchors, and (batch, anchor) their columns in the run that is changed and in the other."""
    if not anchors:
        raise SurgeryError("No anchors were named.")
    here, there = [], []
    for name, pair in anchors.items():
        if not isinstance(pair, int) and (not isinstance(pair, (tuple, list)) or len(pair) != 2):
            raise SurgeryError(f"The anchor '{name}' is {pair!r}: a place in the clean prompts and one in the corrupt "
                               "ones are expected.", hint="Each is a number, or one for each prompt.")  # fmt: skip
        clean, corrupt = (pair, pair) if isinstance(pair, int) else pair
        of_base, of_source = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
        here.append(_columns(of_base, base, f"anchor '{name}'"))
        there.append(_columns(of_source, source, f"anchor '{name}'"))
    places = [Place(name, int(column.min()), column) for name, column in zip(anchors, here, strict=True)]
    return places, torch.stack(here, 1), torch.stack(there, 1)


def _apart(here: Tensor) -> list[list[int]]:
    """Anchors in as few groups as may be, so that no two of a group stand at one token of any prompt."""
    groups: list[list[int]] = []
    for anchor in range(here.shape[1]):
        free = (g for g in groups if not bool((here[:, g] == here[:, anchor, None]).any()))
        group = next(free, None)
        groups.append([anchor]) if group is None else group.append(anchor)
    return groups


def _columns(position: Any, batch: Batch, what: str) -> Tensor:
    """(batch,) the column of a position in each row; negative ones count from the last token."""
    try:
        column = torch.as_tensor(position, device=batch.ids.device).long()
    except (TypeError, ValueError, RuntimeError):
        raise SurgeryError(f"The {what} is {position!r}, and a number is expected, or one for each prompt.") from None
    if column.dim() > 1 or (column.dim() and len(column) != len(batch)):
        raise SurgeryError(f"The {what} is one number, or one for each of the {len(batch)} prompts, and not "
                           f"{len(column)}.")  # fmt: skip
    column = column.expand(len(batch))
    column = torch.where(column < 0, batch.lengths + column, column)
    if bool((wrong := (column < 0) | (column >= batch.lengths)).any()):
        row = int(wrong.int().argmax())
        given = int(torch.as_tensor(position).expand(len(batch))[row])
        raise SurgeryError(f"The {what} of prompt {row} is {given}, and it has {int(batch.lengths[row])} tokens.")
    return column


def _span(window: Sequence[int]) -> str:
    chosen = list(window)
    if chosen == list(range(chosen[0], chosen[-1] + 1)) and len(chosen) > 1:
        return f"{chosen[0]}-{chosen[-1]}"
    return ",".join(map(str, chosen))
