"""Learning a mask: `learn_mask`, and the `Mask` that comes out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from analysis.component_masks.gates import GATES
from analysis.component_masks.parts import Desideratum as Desideratum
from analysis.component_masks.parts import Part, Place, Sample, directions_of, lowest_of, pairs_of, parts_of, samples_of
from analysis.metrics import answer_logit
from analysis.results import Result
from surgery.activations.interventions import unwrapped
from surgery.anatomy import Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEMORY = 1 << 31
"""Bytes of passes and counterfactual values that are kept between steps; what is beyond is computed each time."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A learned mask, and how it was found."""

    parts: Sequence[Part]
    values: np.ndarray
    """(components,) w of each, before rounding."""
    history: Mapping[str, Result]
    """"loss" (seed, lambda, step), "accuracy" in validation (example, lambda, check), "size" (seed, lambda, check)."""
    test: Mapping[str, Result] = field(default_factory=dict)
    """By desideratum: 1 where the target comes out on test examples with the selected components patched."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    model: Any = field(default=None, repr=False)
    """What `evaluate` runs if no other model is given; not saved."""

    @property
    def weights(self) -> dict[str, float]:
        """w of each component by its name."""
        labels = [label for part in self.parts for label in part.labels]
        return dict(zip(labels, self.values.tolist(), strict=True))

    @property
    def components(self) -> list[str]:
        """The selected ones: w rounds to 0."""
        return [label for label, w in self.weights.items() if round(w) == 0]

    def evaluate(
        self, desideratum: Desideratum, model: Any = None, *, tokenizer: Any = None, batch_size: int = 32
    ) -> Result:
        """1 for each example where the target is the likeliest token with all selected components patched.

        Column `unpatched` has the same for the plain run. Raises `SurgeryError` as `learn_mask` does.
        """
        model = self.model if model is None else model
        if model is None:
            raise SurgeryError("A mask from a file has no model to evaluate.", hint="Pass it: evaluate(data, model).")
        model = unwrapped(model)
        anatomy_of(model).expand([part.site for part in self.parts])
        pairs = pairs_of(model, desideratum, [part.place for part in self.parts], tokenizer)
        rows = torch.arange(len(pairs[0]))
        with untouched(model):
            return _accuracy(desideratum.name, samples_of(model, pairs, rows, batch_size), rows, self.parts,
                             torch.tensor(self.values).float().round())  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Write `path`.safetensors (all numbers) and `path`.json (all else); returns the JSON's path."""
        from safetensors.numpy import save_file

        stem = _stem(path)
        stem.parent.mkdir(parents=True, exist_ok=True)
        tensors, parts = {"values": np.ascontiguousarray(self.values)}, []
        for i, part in enumerate(self.parts):
            parts.append({"site": str(part.site), "place": part.place, "size": part.size, "heads": part.heads})
            if part.basis is not None:
                tensors[f"basis.{i}"] = np.ascontiguousarray(part.basis.float().cpu().numpy())
        text: dict[str, Any] = {"parts": parts, "meta": self.meta, "history": {}, "test": {}}
        for kind, results in (("history", self.history), ("test", self.test)):
            for name, result in results.items():
                tensors[f"{kind}.{name}"] = np.ascontiguousarray(result.values)
                text[kind][name] = {k: getattr(result, k) for k in ("axes", "name", "columns", "meta")}
        waiting = [stem.with_name(f".{stem.name}.{suffix}") for suffix in ("safetensors", "json")]
        save_file(tensors, waiting[0])
        waiting[1].write_text(json.dumps(text, indent=1), encoding="utf-8")
        for file in waiting:  # whole or not at all
            os.replace(file, file.with_name(file.name[1:]))
        return waiting[1].with_name(waiting[1].name[1:])

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Mask:
        """Read what `save` wrote. Raises `SurgeryError` when a file is missing or is not a mask."""
        from safetensors.torch import load_file

        stem = _stem(path)
        try:
            text = json.loads(stem.with_name(f"{stem.name}.json").read_text(encoding="utf-8"))
            tensors = load_file(stem.with_name(f"{stem.name}.safetensors"))
            parts = [
                Part(Site.parse(part["site"]), part["place"], part["size"], part["heads"] and tuple(part["heads"]),
                     tensors.get(f"basis.{i}"))
                for i, part in enumerate(text["parts"])
            ]  # fmt: skip
            history, test = (
                {name: Result(tensors[f"{kind}.{name}"].numpy(), **told) for name, told in text[kind].items()}
                for kind in ("history", "test")
            )
            return cls(parts, tensors["values"].numpy(), history, test, text["meta"], model)
        except FileNotFoundError as error:
            raise SurgeryError(f"No mask at {path}: {error.filename or error} is missing.") from None
        except Exception as error:
            raise SurgeryError(f"{path} is not a saved mask: {error}") from error

    def plot(self, title: str | None = None) -> Figure:
        """How far each component is patched (1 - w): by layer and head, or how many are selected if they are many."""
        from analysis.component_masks.figure import mask as draw

        return draw(self.parts, self.values, title)

    def __str__(self) -> str:
        chosen = self.components
        return f"{len(chosen)} of {len(self.values)} components selected: {', '.join(chosen[:12]) or 'none'}"


def learn_mask(
    model: Any,
    desiderata: Desideratum | Sequence[Desideratum],
    *,
    components: Sequence[str | Site] | str = "z",
    position: Place = -1,
    directions: int | None = None,
    gate: str = "linear",
    lr: float = 0.1,
    l1: float = 0.01,
    path: Sequence[float] | None = None,
    epochs: int = 2,
    batch_size: int = 32,
    split: tuple[float, float, float] = (0.5, 0.25, 0.25),
    validation: Desideratum | Sequence[Desideratum] | None = None,
    check: int = 4,
    seed: int = 20,
    tokenizer: Any = None,
    memory: int = MEMORY,
) -> Mask:
    """The mask whose selected components, patched, give the targets most often; `l1` is what each of them costs.

    `components` are sites: "z" (heads), "mlp_post" (neurons), "resid_pre", "attn_out", "mlp_out" (one a layer), parts
    of them ("z.3", "z.3.2@-1"). Those that name no position stand at `position`: a number, an anchor of the desiderata,
    or None, all positions. With `directions=k` the components of each site are the first k singular directions of its
    value differences on training examples. `gate` is one of `GATES`; `l1` is lambda, `path` several of them, each
    learned from the start. Examples are divided by `split` into training, validation and test, shuffled by `seed`; with
    `validation` given, all `desiderata` are for training and none is held out for a test.
    Every `check` steps, and at the end, the rounded mask is tried on the validation examples: of all masks the most
    accurate is chosen, the one with more components of those that are equal, the first of those.

    Raises `SurgeryError` for pairs of unequal length where all positions are masked, positions out of range, unknown
    components, gates and tokens, and for too few examples. The model is left as it was.
    """
    made = GATES.lookup(gate)
    wanted, held = _listed(desiderata), None if validation is None else _listed(validation)
    penalties = list([l1] if path is None else path)
    for name, number in (("epochs", epochs), ("batch_size", batch_size), ("check", check), ("path", len(penalties))):
        if number < 1:
            raise SurgeryError(f"{name}: at least 1 is needed, and not {number}.")
    model = unwrapped(model)
    anatomy = anatomy_of(model)
    generator = torch.Generator().manual_seed(seed)
    parts = parts_of(anatomy, components, position)
    places = [part.place for part in parts]

    def sampled(some: Sequence[Desideratum], shares: tuple[float, ...]) -> list[list[tuple[Tensor, list[Sample]]]]:
        """By desideratum and share: rows, and the same in batches."""
        found = []
        for one in some:
            pairs = pairs_of(model, one, places, tokenizer)
            rows = _divided(one.name, len(pairs[0]), shares, generator)
            found.append([(part, samples_of(model, pairs, part, batch_size)) for part in rows])
        return found

    divided = sampled(wanted, split if held is None else (1.0,))
    train = [shares[0][1] for shares in divided]
    checked = [shares[1] for shares in divided] if held is None else [s[0] for s in sampled(held, (1.0,))]
    tested = [shares[2] for shares in divided] if held is None and split[2] else []
    with untouched(model, gradients=True):
        if directions is not None:
            samples = [sample for batches in train for sample in batches]
            parts = directions_of(anatomy, components, position, directions, samples)
        left = memory
        for batches in (*train, *(samples for _, samples in checked)):
            for sample in batches:
                left -= sample.keep(parts, left)
        search = _Search(parts, checked)
        losses = [_fit(search, made, train, penalty, lr, epochs, check, seed) for penalty in penalties]
        test = {one.name: _accuracy(one.name, samples, rows, parts, search.best.round())
                for one, (rows, samples) in zip(wanted, tested, strict=False)}  # fmt: skip
    meta = {"kind": "dcm", "model": anatomy.name, "desiderata": [one.name for one in wanted], "gate": gate, "lr": lr,
            "lambda": penalties[search.chosen[0]], "check": search.chosen[1], "epochs": epochs, "seed": seed,
            "batch_size": batch_size, "position": position, "directions": directions,
            "cost": _cost(anatomy.n_layers, parts, train)}  # fmt: skip
    names = [one.name for one in (wanted if held is None else held)]
    return Mask(parts, search.best.numpy(), search.history(losses, penalties, names, seed), test, meta, model)


def _listed(desiderata: Desideratum | Sequence[Desideratum]) -> list[Desideratum]:
    found = [desiderata] if isinstance(desiderata, Desideratum) else list(desiderata)
    names = [one.name for one in found]
    if not found or len(set(names)) < len(names):
        raise SurgeryError("No desideratum." if not found else f"Desiderata need different names: {', '.join(names)}.")
    return found


def _divided(name: str, count: int, shares: Sequence[float], generator: torch.Generator) -> list[Tensor]:
    """Shuffled rows in shares: the first ones rounded down, the last what is left."""
    if min(shares) < 0 or 0 in shares[:2] or abs(sum(shares) - 1) > 1e-6:
        raise SurgeryError(f"split={tuple(shares)}: expected shares of training, validation and test that make 1; only "
                           "the last may be 0.")  # fmt: skip
    order = torch.randperm(count, generator=generator)
    ends = [int(sum(shares[: i + 1]) * count + 1e-9) for i in range(len(shares) - 1)] + [count]
    found = [order[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    for share, rows, what in zip(shares, found, ("training", "validation", "a test"), strict=False):
        if share and not len(rows):
            raise SurgeryError(f"Desideratum '{name}' has {count} examples: too few to divide by {tuple(shares)}, "
                               f"none is left for {what}.")  # fmt: skip
    return found


# ---- learning ------------------------------------------------------------------------------------------------------


class _Search:
    """The checks of all masks, and the best of them."""

    def __init__(self, parts: Sequence[Part], checked: Sequence[tuple[Tensor, list[Sample]]]) -> None:
        self.parts, self.checked = parts, checked
        self.size = sum(part.size for part in parts)
        self.best = torch.ones(self.size)
        self.chosen = (0, 0)
        self.records: list[list[tuple[int, list[Tensor]]]] = []
        """By lambda and check: components selected, and for each desideratum who is right."""
        self._key = (-1.0, -1)

    def check(self, w: Tensor) -> None:
        """Tries the rounded mask on all validation examples."""
        hard = w.round()
        right = [torch.cat([s.correct(self.parts, [hard])[0] for s in samples]).cpu() for _, samples in self.checked]
        selected = int((hard == 0).sum())
        self.records[-1].append((selected, right))
        key = (sum(r.double().mean().item() for r in right) / len(right), selected)
        if key > self._key:
            self._key, self.best = key, w.detach().cpu().clone()
            self.chosen = len(self.records) - 1, len(self.records[-1]) - 1

    def history(
        self, losses: Sequence[Sequence[float]], penalties: Sequence[float], names: Sequence[str], seed: int
    ) -> dict[str, Result]:
        """Loss, validation accuracy and size, for each lambda."""
        steps, checks = range(len(losses[0])), range(len(self.records[0]))
        labels = [f"{name} {row}" if len(names) > 1 else row
                  for name, (rows, _) in zip(names, self.checked, strict=True) for row in rows.tolist()]  # fmt: skip
        of = [name for name, (rows, _) in zip(names, self.checked, strict=True) for _ in rows]
        right = np.array([[torch.cat(r).numpy() for _, r in checks] for checks in self.records])
        size = np.array([[selected for selected, _ in checks] for checks in self.records])
        by: dict[str, Any] = {"lambda": list(penalties)}
        once = {"seed": [seed], **by}
        return {
            "loss": Result(np.array([losses]), {**once, "step": steps}, "loss"),
            "accuracy": Result(right.transpose(2, 0, 1), {"example": labels, **by, "check": checks}, "accuracy",
                               {"desideratum": of}),
            "size": Result(size[None], {**once, "check": checks}, "selected components"),
        }  # fmt: skip


def _fit(
    search: _Search,
    gate: Any,
    train: Sequence[Sequence[Sample]],
    penalty: float,
    lr: float,
    epochs: int,
    check: int,
    seed: int,
) -> list[float]:
    """Learns one mask, checking it on the way; returns the loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.full((search.size,), gate.start).requires_grad_()
    optimizer = torch.optim.Adam([number], lr=lr)
    steps, losses = max(map(len, train)), []
    search.records.append([])
    for step in range(epochs * steps):
        with torch.no_grad():
            gate.project(number)
        optimizer.zero_grad()
        w = gate.drawn(number, generator)
        loss = penalty * gate.penalty(number)
        for samples in train:
            sample = samples[step % steps % len(samples)]
            anatomy = anatomy_of(sample.model)
            logit = answer_logit(sample.target).of_final(sample.final(search.parts, w)[None], anatomy)
            loss = loss - logit.mean().to(loss)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % check == check - 1 or step == epochs * steps - 1:
            search.check(gate.kept(number.detach()))
    return losses


def _cost(layers: int, parts: Sequence[Part], train: Sequence[Sequence[Sample]]) -> float:
    """The share of a whole forward's layers and tokens that a step runs."""
    samples = [sample for batches in train for sample in batches]
    columns = sum(sample.batch.ids.shape[1] - sample.start for sample in samples)
    return (layers - lowest_of(parts)) / layers * columns / sum(sample.batch.ids.shape[1] for sample in samples)


def _accuracy(name: str, samples: Sequence[Sample], rows: Tensor, parts: Sequence[Part], hard: Tensor) -> Result:
    """Right or wrong by example, with the mask and (column `unpatched`) without."""
    right, plain = torch.cat([s.correct(parts, [hard, torch.ones_like(hard)]) for s in samples], 1)
    return Result.of(right.tolist(), rows.tolist(), name=f"accuracy, {name}", columns={"unpatched": plain.tolist()})


def _stem(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
