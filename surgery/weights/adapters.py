"""Vectors as LoRA adapters, out and in: what PEFT writes is read, what is written PEFT loads.

`export_lora` writes `base + s B A` with s = 1 for the matrices of linear layers and embeddings. Combinations of
adapters never become dense: their factors are put side by side (exact, PEFT's `cat`), and recompressed by an SVD of
their small inner matrix (PEFT's `svd`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.anatomy import input_embedding, kind_of, output_head
from surgery.checkpoint import CheckpointWriter, Source, TensorInfo
from surgery.checkpoint.adapter import AdaptedCheckpoint, tied_pair
from surgery.checkpoint.header import dtype_code, torch_dtype
from surgery.checkpoint.reader import SINGLE
from surgery.errors import SurgeryError
from surgery.weights.expression import Difference, Expression, Shapes
from surgery.weights.low_rank import Factors, factorise, is_matrix, product
from surgery.weights.progress import Progress, Tally
from surgery.weights.sources import Anchor, View, flat, same_heads
from surgery.weights.streams import Workspace, in_parallel

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose attention and MLP matrices lie as (in, out)."""
PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class Adapted(Expression):
    """The change that an adapter makes to its base: s B A, in float32, multiplied when it is read."""

    difference: Difference
    adapted: AdaptedCheckpoint
    name: str

    @property
    def shapes(self) -> Shapes:  # type: ignore[override]
        return self.difference.shapes

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        target = self.adapted.adapter.targets.get(name)
        if target is None or not target.additive or target.left is None or target.right is None:
            return None
        return target.scale * target.left.float(), target.right.float()

    def flat(self, name: str, start: int, stop: int) -> Tensor:
        known = self.factors(name)
        if known is None or len(self.shapes[name]) != 2:
            return self.difference.flat(name, start, stop)
        return product(*known, start, stop)

    def anchors(self) -> tuple[Anchor, ...]:
        return self.difference.anchors()

    def key(self) -> Any:
        return self.difference.key()

    def __str__(self) -> str:
        return self.name


def adapter_expression(base: Source, folder: Path) -> Expression:
    """What the adapter in `folder` changes in `base`. Raises `SurgeryError` when it does not fit it."""
    adapted = AdaptedCheckpoint(base, folder)
    anchor = Anchor.of(base)
    plain, changed = same_heads(base, adapted)
    touched = [n for n in changed.tensors if n in adapted.adapter.targets or n not in base.tensors]
    shapes = {}
    for name in touched:
        before, after = plain.tensors[name].shape, changed.tensors[name].shape
        if before != after:
            raise SurgeryError(
                f"{folder} resizes '{name}' from {list(before)} to {list(after)}: that is no difference.",
                hint=f"Use the adapted model as an input of a merge: {base.path}+{folder}.",
            )
        shapes[name] = after
    anchor = Anchor(anchor.name, anchor.header, None, plain)
    return Adapted(Difference(plain, changed, (anchor.name, folder.name), shapes, anchor), adapted, folder.name)


@dataclass(frozen=True)
class ExportedLora:
    """What `export_lora` wrote: rank and captured energy per matrix, tensors kept whole and tensors left out."""

    out: Path
    ranks: dict[str, int]
    captured: dict[str, float]
    norms: dict[str, float] = field(repr=False)
    whole: list[str]
    left_out: list[str]
    parameters: int

    @property
    def energy(self) -> float:
        """The share of the squared norm of all exported matrices that is kept."""
        total = math.fsum(n * n for n in self.norms.values())
        kept = math.fsum(self.captured[name] * n * n for name, n in self.norms.items())
        return kept / total if total else 1.0


def export_lora(
    expression: Expression,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    dtype: str = "float32",
    whole: bool = True,
    seed: int = 0,
    threads: int = 2,
    force: bool = False,
    progress: Progress | None = None,
) -> ExportedLora:
    """Writes a PEFT LoRA folder whose merge gives base + U S V^T.

    `rank`: the same for all; `energy`: per matrix the smallest that keeps this share of its squared norm; `budget`:
    numbers in A and B of all matrices together, spent where they capture most. With none of them the vector must be
    made of adapters, and is kept exactly. Norms and other one-dimensional weights, and an embedding to which the head
    is tied (see `_tie`), go into `modules_to_save` when `whole`; biases of linear layers, fused experts and whatever
    PEFT has no place for are reported as left out.
    Raises `SurgeryError` when nothing is left to write. `progress` counts four bytes for a number of a matrix.
    """
    if sum(x is not None for x in (rank, energy, budget)) > 1:
        raise SurgeryError("Give one of rank, energy and budget.")
    base = _base(expression)
    tie = _tie(expression, base)
    shared = tie[:1] if tie else ()
    matrices = [n for n, s in expression.shapes.items() if is_matrix(s) and n.endswith(".weight") and n not in shared]
    factors = _factors(expression, matrices, rank, energy, budget, seed, threads, progress)
    factors = {name: factors[name] for name in matrices if name in factors and factors[name].norm > 0}
    others = [n for n in expression.shapes if n not in matrices]
    saved = [n for n in others if whole and base is not None and (n in shared or _is_saved(n, expression.shapes))]
    saved = [n for n in saved if _moves(expression, n)]
    left_out = [n for n in others if n not in saved and _moves(expression, n)]
    if not factors:
        raise SurgeryError(f"No matrix of {expression} changes: there is nothing to make a LoRA of.")
    kind = "" if base is None else str(base.config.get("model_type"))
    code = dtype_code(dtype)
    tensors: dict[str, Tensor] = {}
    for name, found in factors.items():
        tensors |= _lora(name, found, kind in CONV1D)
    for name in saved:
        assert base is not None
        numel = math.prod(expression.shapes[name])
        stored = flat(base, name, 0, numel)
        tensors[PREFIX + name] = (stored.float() + expression.flat(name, 0, numel)).view(expression.shapes[name])
    head = tie[1] if tie and tie[0] in saved else None
    if tie and head:
        tensors[PREFIX + head] = tensors[PREFIX + tie[0]]  # PEFT looks for both
    tensors = {n: t.to(torch_dtype(code)).contiguous() for n, t in tensors.items()}
    ranks = {name: found.rank for name, found in factors.items()}
    config = _config(ranks, [*saved, head] if head else saved, kind, base) | {"ensure_weight_tying": bool(head)}
    infos = [TensorInfo(name, code, tuple(t.shape)) for name, t in tensors.items()]
    with CheckpointWriter(out, infos, shard_size=1 << 60, force=force) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.add_file("adapter_config.json", json.dumps(config, indent=2) + "\n")
        (writer.folder / SINGLE).rename(writer.folder / "adapter_model.safetensors")
    captured = {name: found.captured for name, found in factors.items()}
    norms = {name: found.norm for name, found in factors.items()}
    numbers = sum(r * sum(expression.shapes[n]) for n, r in ranks.items())
    return ExportedLora(Path(out), ranks, captured, norms, saved, left_out, numbers)


def _base(expression: Expression) -> Source | None:
    return next((a.source for a in expression.anchors() if a.source is not None), None)


def _moves(expression: Expression, name: str) -> bool:
    numel = math.prod(expression.shapes[name])
    return bool(numel) and bool(expression.flat(name, 0, numel).any())


def _is_saved(name: str, shapes: Mapping[str, Any]) -> bool:
    """PEFT saves modules whole, so all of a module's tensors: those of norms, with a weight of one dimension."""
    module, _, leaf = name.rpartition(".")
    return leaf in ("weight", "bias") and kind_of(name) == "norm" and len(shapes.get(f"{module}.weight", ())) == 1


def _factors(
    expression: Expression,
    names: list[str],
    rank: int | None,
    energy: float | None,
    budget: int | None,
    seed: int,
    threads: int,
    progress: Progress | None,
) -> dict[str, Factors]:
    """The truncated SVD of every matrix; those that do not move come with norm 0."""
    limit = rank
    per_rank = sum(sum(expression.shapes[n]) for n in names)
    if budget is not None:
        if budget < min((sum(expression.shapes[n]) for n in names), default=1):
            raise SurgeryError(f"A budget of {budget:,} numbers is not enough for one matrix of rank 1.")
        limit = max(4, 2 * budget // max(1, per_rank))
    found: dict[str, Factors] = {}
    tally = Tally(progress, 4 * sum(math.prod(expression.shapes[n]) for n in names))

    def work(name: str, _: Workspace) -> None:
        if limit is None and energy is None and expression.factors(name) is None:
            raise SurgeryError(
                f"'{name}' of {expression} is not known to be of low rank.", hint="Give a rank, an energy or a budget."
            )
        found[name] = factorise(expression, name, rank=limit, energy=energy, seed=seed)
        tally.add(name, 4 * math.prod(expression.shapes[name]))

    in_parallel(names, work, threads=threads)
    found = {name: found[name] for name in names}
    return found if budget is None else _spend(found, expression.shapes, budget)


def _spend(found: dict[str, Factors], shapes: Shapes, budget: int) -> dict[str, Factors]:
    """Ranks such that the numbers of A and B stay within `budget`: most energy for each number first."""
    steps = [
        (float(value) ** 2 / sum(shapes[name]), -i, name)
        for name, factors in found.items()
        for i, value in enumerate(factors.values)
        if value > 0
    ]
    ranks: dict[str, int] = {}
    for _, _, name in sorted(steps, reverse=True):
        if budget >= sum(shapes[name]):
            budget -= sum(shapes[name])
            ranks[name] = ranks.get(name, 0) + 1
    return {name: found[name].first(rank) for name, rank in ranks.items()}


def _lora(name: str, found: Factors, conv1d: bool) -> dict[str, Tensor]:
    """The two matrices under PEFT's names, the singular values shared out evenly: s B A = U S V^T with s = 1."""
    module = name.removesuffix(".weight")
    roots = found.values.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    left, right = found.left / roots, found.right * roots[:, None]
    if kind_of(name) == "embedding":
        return {f"{PREFIX}{module}.lora_embedding_A": left.T, f"{PREFIX}{module}.lora_embedding_B": right.T}
    if conv1d and kind_of(name) != "head":
        left, right = right.T, left.T
    return {f"{PREFIX}{module}.lora_A.weight": right, f"{PREFIX}{module}.lora_B.weight": left}


def _tie(expression: Expression, base: Source | None) -> tuple[str, str] | None:
    """The names of embedding and head where one change is that of both: in a tie that the vector does not take apart.

    PEFT (0.21) has no low-rank form for it: on the embedding alone it leaves the head as it was, and on both
    (`ensure_weight_tying`) merging adds the change twice to the weight that they share. Where the base is not at hand
    nothing is known of a tie, and one is supposed.
    """
    embedding = input_embedding(expression.shapes)
    if embedding is None or output_head(expression.shapes) is not None:
        return None
    return (embedding, "") if base is None else tied_pair(base)


def _config(ranks: dict[str, int], saved: list[str], kind: str, base: Source | None) -> dict[str, Any]:
    modules = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
    common = max(set(modules.values()), key=list(modules.values()).count)
    odd = {re.escape(module): rank for module, rank in modules.items() if rank != common}
    inner = base.inner if isinstance(base, View) else base
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if inner is None else str(inner.path),
        "r": common,
        "lora_alpha": common,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": list(modules),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}) or None,
        "fan_in_fan_out": kind in CONV1D,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }
