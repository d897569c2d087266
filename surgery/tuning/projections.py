"""The linear layers that adapters go on: found by what they do, named in full, never by a part of a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.anatomy import GROUPS, kind_of
from surgery.errors import SurgeryError
from surgery.interop import has_adapters
from surgery.registry import nearest

PARTS = ("attention", "mlp")
"""The groups whose projections get a LoRA."""
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Projections that are several in one."""


def projections(model: nn.Module, modules: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """The linear layers of attention and MLPs by name; of them those that `modules` names: groups, kinds, full names.

    Experts that are one tensor are no linear layers. Raises `SurgeryError` for a name that none has, for half of a
    fused projection, and for a model with adapters.
    """
    from transformers.pytorch_utils import Conv1D

    if has_adapters(model):
        raise SurgeryError("This model has adapters already.", hint="Merge them first: merged(model).")
    found: dict[str, nn.Module] = {}
    kinds: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = kind_of(f"{name}.weight")
        if isinstance(module, (nn.Linear, Conv1D)) and GROUPS[kind] in PARTS:
            found[name], kinds[name] = module, kind
    if modules is not None:
        wanted = [w.removesuffix(".weight") for w in ([modules] if isinstance(modules, str) else modules)]
        for word in wanted:
            if word not in found and not any(word in (kind, GROUPS[kind]) for kind in kinds.values()):
                raise _unknown(model, word, kinds)
        found = {n: m for n, m in found.items() if {n, kinds[n], GROUPS[kinds[n]]} & set(wanted)}
    if not found:
        raise SurgeryError(f"{type(model).__name__} has no linear layers of attention or MLPs to adapt.")
    return found


def _unknown(model: nn.Module, word: str, kinds: Mapping[str, str]) -> SurgeryError:
    fused = next((kind for kind, parts in FUSED.items() if word in parts and kind in kinds.values()), None)
    if fused:
        return SurgeryError(f"'{word}' is a part of the fused projection '{fused}' in {type(model).__name__}.",
                            hint=f"Name '{fused}', which is adapted as a whole.")  # fmt: skip
    known = {*kinds.values(), *(GROUPS[kind] for kind in kinds.values()), *kinds}
    return SurgeryError(f"{type(model).__name__} has no projection '{word}'.", hint=nearest(word, known))


def _weight(module: nn.Module) -> Tensor:
    weight: Any = module.weight
    return weight


def transposed(module: nn.Module) -> bool:
    """Whether the weight lies as (in, out): GPT-2's."""
    return not isinstance(module, nn.Linear)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Numbers that a projection gives, and reads."""
    if isinstance(module, nn.Linear):  # whose weights may be packed
        return module.out_features, module.in_features
    rows, columns = _weight(module).shape
    return columns, rows


def matrix(module: nn.Module) -> Tensor:
    """(out, in) float32. Raises `SurgeryError` for quantised weights."""
    weight = _weight(module).detach()
    if not weight.is_floating_point():
        raise SurgeryError(f"Weights of a projection are quantised ({weight.dtype}): they can't be decomposed.",
                           hint="Load the model without quantisation, or train a plain LoRA.")  # fmt: skip
    return weight.float().T if transposed(module) else weight.float()
