"""What a latent does in a model: taken out, set or added, and what a metric makes of it.

    ablate_latents(reader, prompts, metric, [12, 40])             # exact: a forward pass a latent
    attribute_latents(reader, prompts, metric).top(10)            # all of them, to first order: one backward pass
    steer_latents(reader, prompts, metric, [12], [0, 2, 4])       # f_12 times the decoder's row added, so much of it
    with edit(tuned, {reader.writes: latent_edit(reader, 12, add=4.0)}): tuned.generate(...)

A latent with activation f and decoder row D is changed to f' by adding (f' - f) D to the site: what the dictionary
does not explain stays where it is. (Marks et al. 2024, arXiv:2403.19647, keep the error likewise.) f is that of the
unchanged models; of a crosscoder D is the model's own part. Only tokens that the reader keeps are changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.edges.gradients import at_a_time, passed
from analysis.features.reader import Read, Reader, Which, listed
from analysis.metrics import Metric, as_metric
from analysis.results import Result
from surgery.activations.interventions import Call
from surgery.anatomy import Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import as_batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Latents = Sequence[int | Sequence[int]] | int
"""Latents one by one; several in a list of their own are changed together."""


def ablate_latents(
    reader: Reader, prompts: Any, metric: Metric | Callable[[Tensor], Tensor], latents: Latents, *, of: Which = -1
) -> Result:
    """The metric without a latent less the metric as it is, (example, latent); exact.

    `of` is the model that is changed and measured: the last one, or base or tuned of a pair. Column `unchanged` has
    the metric as it is. Raises `SurgeryError` for latents that the dictionary has not, and prompts of which no token
    counts.
    """
    found = _changed(reader, prompts, metric, latents, [lambda f: -f], of)
    return found.result("ablation", [None])


def steer_latents(
    reader: Reader, prompts: Any, metric: Metric | Callable[[Tensor], Tensor], latents: Latents,
    amounts: Sequence[float], *, how: str = "add", of: Which = -1,
) -> Result:  # fmt: skip
    """The change of the metric by amount, (example, latent, amount): "add" c to f at every kept token, or "set" f to c.

    Otherwise as `ablate_latents`, which is "set" to 0 alone.
    """
    changes: dict[str, Callable[[float], Callable[[Tensor], Tensor]]] = {
        "add": lambda c: lambda f: torch.full_like(f, c),
        "set": lambda c: lambda f: c - f,
    }
    if how not in changes:
        raise SurgeryError(f"Latents are not steered by {how!r}.", hint="'add' an amount, or 'set' them to one.")
    if not len(amounts):
        raise SurgeryError("No amounts to steer by.", hint="For instance [0, 2, 4].")
    found = _changed(reader, prompts, metric, latents, [changes[how](float(c)) for c in amounts], of)
    return found.result(f"steering ({how})", [float(c) for c in amounts])


class _Effects(NamedTuple):
    values: np.ndarray
    """(example, latent, change)."""
    unchanged: list[float]
    latents: list[Any]
    metric: Metric
    reader: Reader

    def result(self, kind: str, amounts: list[Any]) -> Result:
        axes: dict[str, Any] = {"example": range(len(self.values)), "latent": self.latents}
        values = self.values
        if amounts == [None]:
            values = values[..., 0]
        else:
            axes["amount"] = amounts
        meta = {"kind": kind, "site": self.reader.writes, "metric": self.metric.name, "centre": 0}
        return Result(values, axes, f"effect on {self.metric.name}", {"unchanged": self.unchanged}, meta)


def _changed(
    reader: Reader, prompts: Any, metric: Any, latents: Latents, changes: Sequence[Callable[[Tensor], Tensor]],
    of: Which,
) -> _Effects:  # fmt: skip
    """Every change of every latent: f -> what is added to it."""
    groups = [tuple(reader.chosen(group)) for group in _listed(latents)]
    model, decoder, site = reader.model(of), reader.decoder(of), Site.parse(reader.writes)
    values, before = [], []
    metric = as_metric(metric)
    for read, mine in _parts(reader, prompts, metric):
        unchanged = passed(model, read.batch, mine).values
        found = unchanged.new_zeros(len(unchanged), len(groups), len(changes))
        dense = read.codes.dense() if len(groups) > 4 else None
        for i, group in enumerate(groups):
            f = _activations(read, group) if dense is None else dense[:, list(group)]
            for j, change in enumerate(changes):
                added = change(f)
                if bool(added.any()):
                    shift = _spread(read, added @ decoder[list(group)])
                    new = passed(model, read.batch, mine, functions={site: _adding(shift)}).values
                    found[:, i, j] = new - unchanged
        values.append(found.double().cpu().numpy())
        before += unchanged.double().cpu().tolist()
    labels = [group[0] if len(group) == 1 else group for group in groups]
    return _Effects(np.concatenate(values), before, labels, metric, reader)


def _listed(latents: Latents) -> list[Any]:
    found = listed(latents)
    if not found:
        raise SurgeryError("No latents are named.")
    return found


def _parts(reader: Reader, prompts: Any, metric: Metric) -> Iterator[tuple[Read, Metric]]:
    """The prompts as the dictionary reads them, some at a time, each with its part of the metric."""
    batch = _one_batch(reader, prompts)
    metric = metric.to(batch.ids.device)
    metric.check(len(batch), anatomy_of(reader.models[0]).head.weight.shape[0])
    size = at_a_time(metric, reader.batch_size, len(batch))
    for begin in range(0, len(batch), size):
        rows = slice(begin, begin + size)
        read = reader.whole(batch.select(rows))
        if not len(read.rows):
            raise SurgeryError("No token of these prompts counts: the first of each is left out.",
                               hint="Give longer prompts, or Reader(..., keep=real_tokens(0)).")  # fmt: skip
        yield read, metric.select(rows)


def _one_batch(reader: Reader, prompts: Any) -> Any:
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], str) and reader.tokenizer is None:
        raise SurgeryError("Prompts are read with a tokenizer: pass tokenizer= to the Reader.")
    return as_batch(prompts, reader.tokenizer).to(reader.models[0].device).right_padded()


def _activations(read: Read, latents: Sequence[int]) -> Tensor:
    """(tokens, len(latents)) f of some latents, without all the others."""
    layout, values = read.codes.layout, read.codes.values
    found = values.new_zeros(len(layout), len(latents))
    for i, latent in enumerate(latents):
        here = layout.index == latent
        found[layout.rows[here], i] = values[here]
    return found


def _spread(read: Read, rows: Tensor) -> Tensor:
    """(batch, pos, d) of rows of the kept tokens; 0 elsewhere."""
    found = rows.new_zeros(*read.kept.shape, rows.shape[-1])
    found[read.kept.to(rows.device)] = rows
    return found


def _adding(shift: Tensor) -> Callable[[Tensor], Tensor]:
    def change(value: Tensor) -> Tensor:
        return value + shift.to(value.device).view(value.shape)

    return change


# ---- to first order


def attribute_latents(
    reader: Reader, prompts: Any, metric: Metric | Callable[[Tensor], Tensor], latents: Sequence[int] | None = None,
    *, of: Which = -1,
) -> Result:  # fmt: skip
    """What `ablate_latents` would find if the metric were linear, of all latents at once: -sum over tokens of f g.D.

    (example, latent), g the metric's gradient at the site: one forward and one backward pass. Attribution patching of
    features (arXiv:2403.19647, its first-order form). Raises `SurgeryError` also for a metric without gradient.
    """
    chosen = reader.chosen(latents)
    place = reader.at(chosen)
    model, decoder, site = reader.model(of), reader.decoder(of).contiguous(), Site.parse(reader.writes)
    values, before = [], []
    metric = as_metric(metric)
    for read, mine in _parts(reader, prompts, metric):
        found = passed(model, read.batch, mine, gradients=[site])
        gradient = found.gradients[site].flatten(2)[read.kept].to(decoder.device, decoder.dtype)
        codes, layout = read.codes, read.codes.layout
        each = -(codes.values * layout.products(gradient, decoder)).double()
        column = place.to(layout.index.device)[layout.index]
        row = read.texts.to(column.device)[layout.rows]
        here = column >= 0
        sums = each.new_zeros(len(read.batch) * len(chosen))
        sums.index_add_(0, row[here] * len(chosen) + column[here], each[here])
        values.append(sums.view(-1, len(chosen)).cpu().numpy())
        before += found.values.double().cpu().tolist()
    meta = {"kind": "attribution", "site": reader.writes, "metric": metric.name, "centre": 0}
    axes: dict[str, Any] = {"example": range(len(before)), "latent": chosen}
    return Result(np.concatenate(values), axes, f"effect on {metric.name}", {"unchanged": before}, meta)


# ---- in any pass


def latent_edit(
    reader: Reader, latent: int, *, add: float | None = None, set: float | None = None, of: Which = -1, skip: int = 1
) -> Callable[[Tensor, Call], Tensor]:
    """A change for `surgery.activations.edit`, in generation too: at every token but the first `skip`.

    `add` puts that much of the decoder's row in, `set` brings the latent to a value (0 takes it out). Raises
    `SurgeryError` when neither or both are given, and for `set` where the codes are not of this model's site alone.
    """
    (latent,) = reader.chosen(latent)
    if (add is None) == (set is None):
        raise SurgeryError("A latent is changed by add= or by set=, one of them.")
    if set is not None and (len(reader.models) > 1 or reader.target not in (None, reader.site)):
        raise SurgeryError("What a latent is at needs more than this model's site: it can't be set on the way.",
                           hint="Use add=, or steer_latents(..., how='set') on given prompts.")  # fmt: skip
    dictionary, row = reader.dictionary, reader.decoder(of)[latent]

    def change(value: Tensor, call: Call) -> Tensor:
        flat = value.flatten(2).to(row.device)
        moved = (call.positions >= skip).to(row.device)[..., None]
        if add is not None:
            new = flat + add * moved * row
        else:
            assert set is not None
            with torch.no_grad():
                codes = dictionary.codes(flat.reshape(-1, flat.shape[-1]).to(row))
            here = codes.layout.index == latent
            f = row.new_zeros(len(codes.layout)).index_put((codes.layout.rows[here],), codes.values[here])
            new = flat + (set - f).view(*flat.shape[:2], 1) * moved * row
        return new.view(value.shape)

    return change


# ---- figures


def effect_figure(found: Result | Mapping[str, Result], k: int = 12, title: str = "") -> Figure:
    """The k latents whose effect is greatest, each with its 95 % interval; of steering a curve a latent, by amount.

    Several results ({"first order": ..., "exact": ...}) stand side by side for latents that all have; the first one
    says which are greatest. Raises `SurgeryError` when they have no latent in common.
    """
    from analysis.plots import curves, intervals

    each = {"effect": found} if isinstance(found, Result) else dict(found)
    first, *others = each.values()
    common = [j for j in first.axes["latent"] if all(j in other.axes["latent"] for other in others)]
    if not common:
        raise SurgeryError("These results have no latent in common.")
    size = np.abs(first.select("latent", common).mean).reshape(len(common), -1).max(1)
    shown = [common[i] for i in np.argsort(-size, kind="stable")[:k]]
    if "amount" in first.axes:
        lines = {f"latent {j}": (one.mean, *one.interval()) for j in shown for one in [first.select("latent", j)]}
        return curves(first.axes["amount"], lines, x_label="amount", y_label=first.name, title=title,
                      references={"as it is": 0.0})  # fmt: skip
    parts = {name: one.select("latent", shown) for name, one in each.items()}
    series = {name: (one.mean, *one.interval()) for name, one in parts.items()}
    labels = [str(j) if isinstance(j, int) else "+".join(map(str, j)) for j in shown]
    figure = intervals(series, labels, y_label=first.name, group_label="latent", title=title)
    (axis,) = figure.axes
    ends = np.concatenate([np.concatenate([low, high]) for _, low, high in series.values()])
    low, high = min(0.0, float(ends.min())), max(0.0, float(ends.max()))
    axis.set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
    axis.axhline(0, color="0.4", linewidth=0.8, zorder=0)
    if len(series) == 1:
        figure.legends[0].remove()
    return figure
