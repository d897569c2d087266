"""The linear layers that adapters go on: found by what they do, named in full, never by a part of a name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from surgery.anatomy.names import group_of
from surgery.errors import SurgeryError
from surgery.interop import has_adapters
from surgery.tuning.selection.targets import LINEAR, named


def projections(model: nn.Module, modules: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """The linear layers of attention and MLPs by name; of them those that `modules` names: groups, kinds, full names.

    Experts that are one tensor are no linear layers. Raises `SurgeryError` for a name that none has, for half of a
    fused projection, and for a model with adapters.
    """
    from transformers.pytorch_utils import Conv1D

    if has_adapters(model):
        raise SurgeryError("This model has adapters already.", hint="Merge them first: merged(model).")
    linear = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    linear = {n: m for n, m in linear.items() if group_of(n) in LINEAR}
    words = LINEAR if modules is None else (modules,) if isinstance(modules, str) else tuple(modules)
    wanted = {n for word in words for n in named(f"{word}.weight" if f"{word}.weight" in linear else word, linear)}
    if not wanted:
        raise SurgeryError(f"{type(model).__name__} has no linear layers of attention or MLPs to adapt.")
    return {n.removesuffix(".weight"): m for n, m in linear.items() if n in wanted}


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
