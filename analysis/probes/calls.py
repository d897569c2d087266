"""Linear probes: what can be read from the activations of each layer, by how much more than a memory could, and whether
what reads it in one model reads it in another.

    found = probe_model(model, prompts, labels, tokenizer=tokenizer, groups=templates, control=tokens)
    found.accuracy.mean, found.selectivity.interval(), found.plot()
    both = probe_transfer(pair, prompts, labels)          # trained on base or tuned, tested on base and tuned
    both.score.mean, both.cosine, both.plot()

`probe` does the same with features from anywhere. That a label can be read does not say that the model uses it: for
that, patch or ablate the direction.

| file             | holds                                                                             |
|------------------|-----------------------------------------------------------------------------------|
| probes.py        | the calls: `probe`, `probe_model`, `probe_transfer`; `features_of` a model         |
| probe_result.py  | `Probe`: directions, scores, transfer to other activations, figure, files          |
| probe_scores.py  | `Scores`: accuracy, AUC, R², each with one value an example                        |
| probe_fits.py    | the kinds of probe: logistic, mean_difference, lda, ridge                          |
| probe_data.py    | features, labels and folds, checked; the labels of a control task                  |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from analysis.probes.data import (
    Folds,
    Labels,
    as_features,
    as_labels,
    control_labels,
    folds_of,
    inner_folds,
    listed,
    seen_types,
)
from analysis.probes.fits import Fit, decide, fit
from analysis.probes.result import Probe as Probe
from analysis.probes.result import by_layer
from analysis.probes.scores import Scores
from analysis.results import Result
from surgery.activations import run
from surgery.activations.interventions import unwrapped
from surgery.anatomy import Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, Pair, as_batch, encode

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def probe(
    features: Any,
    labels: Any,
    *,
    groups: Sequence[Any] | None = None,
    kind: str = "logistic",
    folds: int = 5,
    seed: int = 0,
    control: Sequence[Any] | None = None,
    control_draws: int = 1,
    name: str = "probe",
    axis: str = "layer",
    columns: Mapping[str, Sequence[Any]] | None = None,
    **options: Any,
) -> Probe:
    """Linear probes of `labels` in features (examples, layer, d), or layer -> (examples, d); all layers by themselves.

    `kind` is logistic, mean_difference or lda for classes, ridge for numbers; `options` are those of the kind (Cs,
    shrinkage, alphas: see probe_fits.py). Measured on `folds` held-out parts; standardising and the choice of C, alpha
    or shrinkage see only what is fitted. `groups`: examples that share a template must not be on both sides; those of
    one group stay together, also when C is chosen.

    `control` is the type of each example: what the input says of it without its context, as the token that it stands
    on, or its prompt. Each type is given a random label (from the frequencies of the task's own), the same wherever it
    occurs, and the probe is fitted to these on the same folds (Hewitt & Liang 2019, arXiv:1909.03368). A probe that can
    do that has memorised types; selectivity is its score minus this one. Labels are drawn by type because drawn by
    example nothing could be memorised, and the control would be at chance however strong the probe; for the same reason
    types must occur more than once (`control.meta["seen"]`). `control_draws` averages several drawings.

    Raises `SurgeryError` for features that are NaN (with the layer), labels of another length or all the same, and
    fewer examples, examples of a class, or groups than folds.
    """
    if control_draws < 1:
        raise SurgeryError(f"control_draws={control_draws}: a control task needs at least one drawing.")
    x, layers = as_features(features)
    known = as_labels(labels, len(x), numeric=kind == "ridge")
    groups = None if groups is None else listed(groups, len(x), "groups")
    types = None if control is None else listed(control, len(x), "types")
    splits = folds_of(known, groups, folds, seed)
    fits = [_fitted(kind, x, known, groups, train, seed, options) for train, _ in splits]
    held_out = _held_out(fits, x, known, splits, layers, axis, name, columns or {})
    whole = _fitted(kind, x, known, groups, np.arange(len(x)), seed, options)
    tested = None
    if types is not None:
        rng, values = np.random.default_rng(seed), []
        for _ in range(control_draws):
            drawn = control_labels(types, known, splits, rng)
            of_types = [_fitted(kind, x, drawn, groups, train, seed, options) for train, _ in splits]
            values.append(_held_out(of_types, x, drawn, splits, layers, axis, name, {}).score.values)
        score = held_out.score
        about = {"seen": seen_types(types, splits), "draws": control_draws, "probe": name}
        tested = Result(np.mean(values, axis=0), score.axes, f"{score.name} of the control task",
                        {**score.columns, "type": types}, about)  # fmt: skip
    meta = {"folds": folds, "seed": seed, "grouped": groups is not None, "options": options}
    return Probe(kind, layers, known.classes, *whole, np.stack([f.directions for f in fits]),
                 np.stack([f.intercepts for f in fits]), held_out, tested, meta)  # fmt: skip


def _fitted(
    kind: str,
    x: np.ndarray,
    labels: Labels,
    groups: list[Any] | None,
    train: np.ndarray,
    seed: int,
    options: dict[str, Any],
) -> Fit:
    """A fit to some of the examples."""
    part = Labels(labels.codes[train], labels.classes)
    among = None if groups is None else [groups[i] for i in train]
    return fit(kind, x[train], part.codes, lambda: inner_folds(part, among, seed), **options)


def _held_out(
    fits: Sequence[Fit], x: np.ndarray, labels: Labels, splits: Folds, layers: list[Any], axis: str, name: str,
    columns: Mapping[str, Sequence[Any]],
) -> Scores:  # fmt: skip
    """Every example by the fit that did not see it."""
    values = np.empty((len(x), *fits[0].intercepts.shape))
    fold, reference = np.empty(len(x), dtype=int), np.empty(len(x), dtype=labels.codes.dtype)
    for i, (found, (train, test)) in enumerate(zip(fits, splits, strict=True)):
        values[test], fold[test] = decide(x[test], found.directions, found.intercepts), i
        codes = labels.codes[train]
        reference[test] = np.bincount(codes).argmax() if labels.classes else codes.mean()
    return Scores(values, labels.codes, labels.classes, layers, fold, reference, axis, name, columns)


# ---- models


def features_of(
    model: Any,
    prompts: Any,
    *,
    tokenizer: Any = None,
    site: str | Site = "resid_post",
    position: int | Sequence[int] = -1,
    layers: Sequence[int] | None = None,
    heads: bool = False,
    batch_size: int = 32,
) -> dict[Any, np.ndarray]:
    """Activations (examples, d) of a model at one token of each prompt, by layer; by "layer.head" with `heads`.

    `position` counts real tokens, from 0 or back from -1, one for all prompts or one each. Sites of heads (q, k, v, z)
    have all heads side by side unless `heads`. In float32 (float64 of a float64 model); the model is left as it was.
    Raises `SurgeryError` for a site that has no tokens (pattern) or no heads, and a prompt without that position.
    """
    model = unwrapped(model)
    place = Site.parse(site)
    position = place.position if place.position is not None else position
    if place.kind == "pattern":
        raise SurgeryError(
            f"'{place.name}' has no features of a token.", hint="Take the stream, z, q, k, v or mlp_post."
        )
    if heads and place.kind != "heads":
        raise SurgeryError(f"'{place.name}' is not divided into heads.", hint="Heads have z, q, k and v.")
    wanted = [place] if layers is None else [Site.parse(str(place.at(layer))) for layer in layers]
    whole = [replace(s, position=None) for s in anatomy_of(model).expand(wanted)]
    batch = as_batch(prompts, tokenizer)
    rows = [ids[real].tolist() for ids, real in zip(batch.ids, batch.mask, strict=True)]
    at = [position] * len(rows) if isinstance(position, int) else listed(position, len(rows), "positions")
    for i, (row, p) in enumerate(zip(rows, at, strict=True)):
        if not -len(row) <= p < len(row):
            raise SurgeryError(f"Prompt {i} has {len(row)} tokens: there is no position {p} in it.")
    if batch_size < 1:
        raise SurgeryError(f"batch_size is at least 1, and not {batch_size}.")
    parts: dict[Any, list[np.ndarray]] = {}
    for start in range(0, len(rows), batch_size):
        here = slice(start, start + batch_size)
        for s, value in _at(model, rows[here], at[here], whole):
            kept = (value if value.dtype == torch.float64 else value.float()).cpu().numpy()
            layer = s.name if s.layer is None else s.layer
            if not heads or s.head is not None:
                name = layer if not heads else f"{layer}.{s.head}"
                parts.setdefault(name, []).append(kept.reshape(len(kept), -1))
            else:
                for head in range(kept.shape[1]):
                    parts.setdefault(f"{layer}.{head}", []).append(kept[:, head])
    return {name: np.concatenate(found) for name, found in parts.items()}


def _at(model: Any, rows: list[list[int]], at: Sequence[int], sites: list[Site]) -> Iterator[tuple[Site, Tensor]]:
    """Values of the sites at one position of each row, (rows, ...); all rows' is kept of the pass if it is the same."""
    same = at[0] if len(set(at)) == 1 else None
    wanted = [replace(site, position=same) for site in sites]
    _, seen = run(model, encode(None, rows), wanted, stop=True)
    index = torch.tensor([position % len(row) for position, row in zip(at, rows, strict=True)])
    for site, placed in zip(sites, wanted, strict=True):
        value = seen[placed]
        yield site, value if same is not None else value[torch.arange(len(rows)), index]


def probe_model(
    model: Any,
    prompts: Any,
    labels: Any,
    *,
    tokenizer: Any = None,
    site: str | Site = "resid_post",
    position: int | Sequence[int] = -1,
    layers: Sequence[int] | None = None,
    heads: bool = False,
    batch_size: int = 32,
    **more: Any,
) -> Probe:
    """`probe` of a model's activations at one token of each prompt: see `features_of`, and `probe` for `more`.

    With `heads` every head of every layer is probed by itself. The model is left as it was.
    """
    found = features_of(model, prompts, tokenizer=tokenizer, site=site, position=position, layers=layers, heads=heads,
                        batch_size=batch_size)  # fmt: skip
    return probe(found, labels, **_told(prompts, site, heads) | more)


@dataclass(frozen=True, eq=False)
class Transfer:
    """Probes of a base and of its fine-tuning, each tested on both."""

    score: Result
    """(example, trained on, tested on, layer): class-balanced accuracy, or R²; every example held out throughout."""
    auc: Result | None
    """The same for the AUC, which asks for the direction alone and not for the threshold; None for numbers."""
    cosine: np.ndarray
    """(layer, rows): of the two models' directions."""
    base: Probe
    tuned: Probe

    def plot(self, *, title: str = "") -> Figure:
        """Four curves over layers: trained on either, tested on either."""
        mean, (low, high) = self.score.mean, self.score.interval()
        series = {f"{a} to {b}": (mean[i, j], low[i, j], high[i, j])
                  for i, a in enumerate(MODELS) for j, b in enumerate(MODELS)}  # fmt: skip
        probe, name = self.base, "majority" if self.base.classes else "mean"
        return by_layer(series, probe.layers, probe.held_out.axis, probe.score.name, title or "Trained on, tested on",
                        {name: float(probe.baseline.mean)})  # fmt: skip


MODELS = ("base", "tuned")


def probe_transfer(
    pair: Pair,
    prompts: Any,
    labels: Any,
    *,
    site: str | Site = "resid_post",
    position: int | Sequence[int] = -1,
    layers: Sequence[int] | None = None,
    heads: bool = False,
    batch_size: int = 32,
    **more: Any,
) -> Transfer:
    """Is what can be read in the base still read by the same directions after fine-tuning, and the other way round?

    Probes of both models on the same tokens and folds; each fold's probe is tested on the fold's prompts in both
    models, so that no prompt is trained and tested on. `more` as in `probe`; a control task is done for each model.
    Raises `SurgeryError` as `probe` and `Pair.encode` do. Both models are left as they were.
    """
    batch = prompts if isinstance(prompts, Batch) else pair.encode(prompts)
    features = [
        features_of(model, batch, site=site, position=position, layers=layers, heads=heads, batch_size=batch_size)
        for model in (pair.base, pair.tuned)
    ]
    base, tuned = (probe(x, labels, **_told(prompts, site, heads) | more) for x in features)
    table = [[a.transfer(x) for x in features] for a in (base, tuned)]

    def whole(measure: str) -> Result:
        cells = [[getattr(scores, measure) for scores in row] for row in table]
        first = cells[0][0]
        (example, examples), (axis, names) = first.axes.items()
        axes = {example: examples, "trained on": MODELS, "tested on": MODELS, axis: names}
        values = np.stack([np.stack([cell.values for cell in row], axis=1) for row in cells], axis=1)
        return Result(values, axes, first.name, first.columns, first.meta)

    return Transfer(whole("score"), whole("auc") if base.classes else None, base.cosine(tuned), base, tuned)


def _told(prompts: Any, site: str | Site, heads: bool) -> dict[str, Any]:
    """What a probe says of where its features come from."""
    texts = isinstance(prompts, list | tuple) and all(isinstance(p, str) for p in prompts)
    return {
        "name": f"probe of {site}",
        "axis": "head" if heads else "layer",
        "columns": {"prompt": prompts} if texts else {},
    }
