"""LoRA through PEFT, and CorDA: a LoRA that begins as what given text uses most of the weights, or least.

    C = sum_t x_t x_t^T / T           over the T tokens that a layer reads; padding is none
    C <- C + d mean(diag C) I         d = 0.01, doubled until ||C C^-1 - I||_F < 0.05
    U S V^T = svd(W C),   V~^T = V^T C^-1,   so that W = U S V~^T
    B = U_r (S_r / s)^1/2,   A = (S_r / s)^1/2 V~_r^T,   W_res = W - s B A,   s = alpha / r

(CorDA, arXiv:2406.05223.) "ipm" trains the r largest components: it learns the text's task faster. "kpm" trains the r
smallest: it spares what the text shows, so the text is what is to be kept. W_res is frozen; the model begins as it was.

    seen = covariances(model, batches)
    tuned = corda(model, seen, rank=8)            # an ordinary PEFT model, on changed base weights
    ... train ...
    export(tuned, "adapter")                      # a plain LoRA of rank 16 for the original weights

The scale of C cancels in B A, yet it moves size from A to B. The released code divides a sample by |max(x)|, whose sign
and outliers decide the scale; here C is divided by the mean of its diagonal instead.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from surgery.checkpoint import CheckpointWriter, TensorInfo
from surgery.errors import SurgeryError
from surgery.interop import unwrap
from surgery.tuning.inputs import covariances
from surgery.tuning.projections import matrix, projections, sizes, transposed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = [
    "changes_base", "corda", "covariances", "damped", "decompose", "export", "lora", "lora_rank_for", "lora_size",
    "merged", "projections",
]  # fmt: skip

DAMPING, INVERSE_ERROR = 0.01, 0.05
"""Where the damping of a covariance begins, and how far C C^-1 may be from the identity."""


# ---- the decomposition


def damped(covariance: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor, float]:
    """C + d mean(diag C) I, its inverse, and d: doubled until ||C C^-1 - I||_F < 0.05.

    Raises `SurgeryError` for a matrix that is 0 or not finite.
    """
    mean = float(covariance.diagonal().mean())
    if not (0 < mean < float("inf")) or not bool(covariance.isfinite().all()):
        raise SurgeryError("A covariance is 0 or not finite: its layer has read nothing.",
                           hint="Give text that reaches it, or leave the layer out.")  # fmt: skip
    identity = torch.eye(len(covariance), device=covariance.device, dtype=covariance.dtype)
    while True:
        fixed = covariance + damping * mean * identity
        inverse, singular = torch.linalg.inv_ex(fixed)
        if not int(singular) and float(torch.dist(fixed @ inverse, identity)) < INVERSE_ERROR:
            return fixed, inverse, damping
        damping *= 2


def decompose(
    weight: Tensor, covariance: Tensor, inverse: Tensor, rank: int, mode: str = "ipm", scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of `weight` (out, in), where scale B A is the part to train (see the head of the file).

    `covariance` and `inverse` as `damped` gives them.
    """
    left, values, right = torch.linalg.svd(weight @ covariance, full_matrices=False)
    kept = slice(0, rank) if mode == "ipm" else slice(len(values) - rank, None)
    roots = (values[kept] / scale).sqrt()
    return roots[:, None] * (right[kept] @ inverse), left[:, kept] * roots


# ---- models with adapters


def lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float | None = None,
    modules: Iterable[str] | None = None,
    seed: int = 0,
    dropout: float = 0.0,
) -> PeftModel:
    """A PEFT LoRA (arXiv:2106.09685) on all projections of attention and MLPs, or those of `modules`; A from `seed`.

    `alpha` None: the rank, so that s = 1. `dropout`: of what A reads, in training. PEFT puts its layers into the model
    itself. Raises `SurgeryError` for names that are no projections, and for a model that has adapters already.
    """
    return _adapted(model, projections(model, modules), rank, _alpha(rank, alpha), seed, dropout)


def lora_size(model: nn.Module, rank: int, modules: Iterable[str] | None = None) -> int:
    """How many numbers A and B of such a LoRA have: r (in + out) for each projection."""
    return rank * sum(sum(sizes(module)) for module in projections(model, modules).values())


def lora_rank_for(model: nn.Module, count: int, modules: Iterable[str] | None = None) -> int:
    """The rank whose LoRA is nearest to `count` numbers. Raises `SurgeryError` when rank 1 is twice as large."""
    one = lora_size(model, 1, modules)
    if 2 * count < one:
        raise SurgeryError(f"A LoRA of rank 1 has {one:,} numbers, and {count:,} were asked for.",
                           hint="Adapt fewer modules.")  # fmt: skip
    return max(1, round(count / one))


def corda(
    model: PreTrainedModel,
    covariances: Mapping[str, Tensor],
    *,
    rank: int,
    mode: Literal["ipm", "kpm"] = "ipm",
    alpha: float | None = None,
) -> PeftModel:
    """A PEFT LoRA whose start is taken out of the base weights; the model's output is what it was.

    `covariances` (of `covariances`) says which modules. The model's own weights become W_res, rounded to their dtype;
    `export` gives back an adapter of the original ones. `alpha` None: the rank, so that s = 1 (the released code).
    Raises `SurgeryError` for another mode, a rank that a matrix has not, and covariances of another model, before
    anything is changed.
    """
    if mode not in ("ipm", "kpm"):
        raise SurgeryError(f"There is no mode '{mode}'.", hint="ipm trains the largest components, kpm the smallest.")
    alpha = _alpha(rank, alpha)
    chosen = projections(model, list(covariances))
    if len({id(module.weight) for module in chosen.values()}) < len(chosen):
        raise SurgeryError(f"Projections of {type(model).__name__} share a weight: each would take its own part out.",
                           hint="Leave all but one of them out, with modules=.")  # fmt: skip
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    inverted: tuple[Tensor, Tensor, Tensor] | None = None
    for name, module in chosen.items():
        given, (gives, reads) = covariances[name], sizes(module)
        if given.shape != (reads, reads):
            raise SurgeryError(f"The covariance of '{name}' is {tuple(given.shape)}, and the layer reads {reads}.",
                               hint="Take covariances of this very model.")  # fmt: skip
        if not 1 <= rank <= min(gives, reads):
            raise SurgeryError(f"'{name}' ({gives} x {reads}) has no {rank} components.",
                               hint=f"Give a rank from 1 to {min(gives, reads)}.")  # fmt: skip
        weight = matrix(module)
        if inverted is None or inverted[0] is not given:
            inverted = (given, *_inverted(name, given, weight.device))
        starts[name] = decompose(weight, *inverted[1:], rank, mode, alpha / rank)
    tuned = _adapted(model, chosen, rank, alpha, seed=0)
    own_config: Any = tuned.peft_config["default"]
    own_config.init_lora_weights = "corda"  # a file of A and B alone says that it fits no other base
    with torch.no_grad():
        for name, layer in _layers(tuned).items():
            for part, value in zip("AB", starts.pop(name), strict=True):
                own = getattr(layer, f"lora_{part}")["default"].weight
                own.copy_(value)
                layer.register_buffer(f"start_{part}", own.detach().clone(), persistent=False)
            base = layer.get_base_layer()
            rest = matrix(base) - layer.scaling["default"] * (layer.start_B.float() @ layer.start_A.float())
            base.weight.copy_(rest.T if transposed(base) else rest)
    return tuned


def _inverted(name: str, covariance: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The damped covariance in units of its mean diagonal, and its inverse."""
    try:
        return damped((covariance / covariance.diagonal().mean()).to(device))[:2]
    except SurgeryError as error:
        raise SurgeryError(f"'{name}': {error.problem}", hint=error.hint) from None


def _alpha(rank: int, alpha: float | None) -> float:
    if rank < 1:
        raise SurgeryError(f"A LoRA has a rank of 1 or more, and not {rank}.")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise SurgeryError(f"alpha is above 0, and not {alpha}.")
    return rank if alpha is None else alpha


def _adapted(
    model: PreTrainedModel, chosen: Mapping[str, nn.Module], rank: int, alpha: float, seed: int, dropout: float = 0.0
) -> PeftModel:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SurgeryError("PEFT is not installed.", hint="pip install peft, or the extra `peers`.") from error
    options: dict[str, Any] = {
        "target_modules": "|".join(map(re.escape, chosen)),  # matched in full: nothing else ends alike
        "fan_in_fan_out": all(map(transposed, chosen.values())),
        "lora_alpha": alpha,
    }
    config = LoraConfig(r=rank, lora_dropout=dropout, bias="none", task_type="CAUSAL_LM", **options)
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # of transformers, about a name that PEFT asks it by
            warnings.simplefilter("ignore", FutureWarning)
            tuned: Any = get_peft_model(model, config)
    return tuned


def _layers(tuned: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers by the names that the modules have in the model itself."""
    inner: Any = unwrap(tuned)
    return {name: module for name, module in inner.named_modules() if hasattr(module, "lora_A")}


def changes_base(tuned: nn.Module) -> bool:
    """Whether the base weights inside are no longer the original ones: what `export` is needed for (CorDA)."""
    return any(hasattr(module, "start_A") for module in tuned.modules())


# ---- what came of it


def merged(tuned: PeftModel) -> PreTrainedModel:
    """An ordinary model with the adapter in its weights; `tuned` stays as it is. Raises `SurgeryError` for NaN."""
    try:
        inner: Any = copy.deepcopy(tuned)
        return inner.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise SurgeryError(f"The adapter can't be merged: {error}") from error


def export(tuned: PeftModel, out: str | Path, *, force: bool = False) -> Path:
    """Writes the folder of a plain LoRA for the ORIGINAL weights: they and this adapter are the trained model.

    For CorDA s (B A - B_0 A_0) in the rank 2 r, [A; A_0] and [B, -B_0]; a plain LoRA as it is. PEFT reads it, and
    `TaskVector.from_adapter`. In float32 the sum is the trained model to rounding; on a base of narrower numbers
    W_res was rounded once. Raises `SurgeryError` for what such an adapter can't hold, and when `out` exists.
    """
    layers = _layers(tuned)
    config = _config(tuned, layers)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if hasattr(layer, "start_A"):
            a, b = torch.cat([a, layer.start_A]), torch.cat([b, -layer.start_B], 1)
        for part, value in (("A", a), ("B", b)):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = value.detach().float().cpu().contiguous()
    infos = [TensorInfo(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    with CheckpointWriter(out, infos, shard_size=1 << 60, force=force) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
        writer.add_file("adapter_config.json", json.dumps(config, indent=2) + "\n")
        (writer.folder / "model.safetensors").rename(writer.folder / "adapter_model.safetensors")
    return Path(out)


def _config(tuned: PeftModel, layers: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's config as PEFT reads it."""
    known: dict[str, Any] = getattr(tuned, "peft_config", {})
    config = known.get("default")
    if len(known) != 1 or config is None or not layers:
        raise SurgeryError(f"One LoRA named 'default' can be exported; this model has {', '.join(known) or 'none'}.")
    more = [n for n in ("use_dora", "modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern")
            if getattr(config, n, None)]  # fmt: skip
    if more or config.bias != "none":
        raise SurgeryError(f"This adapter is more than a plain LoRA ({', '.join(more) or 'bias'}).",
                           hint="save_pretrained writes it, if the base's weights are the original ones.")  # fmt: skip
    scale = next(iter(layers.values())).scaling["default"]
    rank = config.r * (2 if changes_base(tuned) else 1)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": config.base_model_name_or_path,
        "r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0, "bias": "none", "target_modules": list(layers),
        "fan_in_fan_out": config.fan_in_fan_out, "use_rslora": False, "use_dora": False, "init_lora_weights": True,
        "inference_mode": True,
    }  # fmt: skip
