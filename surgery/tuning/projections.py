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

    Raises `SurgeryError` for a name that none has, half of a fused projection, quantised weights, and a model with
    adapters.
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
        wanted = [modules] if isinstance(modules, str) else list(modules)
        for word in wanted:
            if word not in found and not any(word in (kind, GROUPS[kind]) for kind in kinds.values()):
                raise _unknown(model, word, kinds)
        found = {n: m for n, m in found.items() if {n, kinds[n], GROUPS[kinds[n]]} & set(wanted)}
    if not found:
        raise SurgeryError(f"{type(model).__name__} has no linear layers of attention or MLPs to adapt.")
    for name, module in found.items():
        if not _weight(module).is_floating_point():
            raise SurgeryError(f"'{name}' is quantised ({_weight(module).dtype}): there are no weights to decompose.",
                               hint="Load the model without quantisation.")  # fmt: skip
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
    rows, columns = _weight(module).shape
    return (columns, rows) if transposed(module) else (rows, columns)


def matrix(module: nn.Module) -> Tensor:
    """(out, in) float32."""
    weight = _weight(module).detach().float()
    return weight.T if transposed(module) else weight
