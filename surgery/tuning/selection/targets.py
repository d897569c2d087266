"""Which parameters are up for selection, found by what they do (surgery.anatomy), never by substring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgery.anatomy.names import GROUPS, group_of, kind_of, layer_of
from surgery.errors import SurgeryError
from surgery.registry import nearest

LINEAR = ("attention", "mlp")
"""All projections of the layers: what LIFT and LoRA train."""
_FUSED = {"q": ("qkv",), "k": ("qkv",), "v": ("qkv",), "gate": ("gate_up",), "up": ("gate_up",)}


@dataclass(frozen=True, eq=False)
class Target:
    """One parameter."""

    name: str
    parameter: nn.Parameter
    transposed: bool = False
    """GPT-2's Conv1D keeps (in, out) where others keep (out, in)."""
    d_head: int = 1
    """The size of the model's heads."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def kind(self) -> str:
        """What it does: q, down, norm, ... (surgery.anatomy)."""
        return kind_of(self.name)

    @property
    def layer(self) -> int | None:
        """Its layer; None outside layers."""
        return layer_of(self.name)

    @property
    def weight(self) -> Tensor:
        """Its numbers in float32 (float64 as they are), without gradient."""
        found = self.parameter.detach()
        return found if found.dtype.itemsize == 8 else found.float()


def targets(model: nn.Module, modules: Sequence[str] | None = None, *, matrices: bool = True) -> list[Target]:
    """The parameters of `modules`: groups or kinds of surgery.anatomy.names, or names of parameters; tied ones once.

    The default is `LINEAR`. `matrices`: only those of two dimensions and more, and no biases (those of experts have
    two). Raises `SurgeryError` for words that name nothing, for halves of fused projections, and for quantised weights.
    """
    words = LINEAR if modules is None else (modules,) if isinstance(modules, str) else tuple(modules)
    parameters = dict(model.named_parameters())
    wanted = {name for word in words for name in named(word, parameters)}
    found = []
    for name, parameter in parameters.items():
        if name not in wanted or (matrices and (parameter.dim() < 2 or name.endswith("bias"))):
            continue
        if not parameter.is_floating_point():
            raise SurgeryError(f"'{name}' is quantised ({parameter.dtype}): its numbers can't move by themselves.",
                               hint="Load the model unquantised, or train a LoRA beside it.")  # fmt: skip
        owner = model.get_submodule(name.rpartition(".")[0])
        found.append(Target(name, parameter, type(owner).__name__ == "Conv1D", _head(model)))
    if not found:
        raise SurgeryError(f"Nothing in {type(model).__name__} is {' or '.join(words)}.", hint=_words(parameters))
    return found


def named(word: str, parameters: Iterable[str]) -> list[str]:
    """The parameters that one word names. Raises `SurgeryError` for one that names nothing, or half of a fused one."""
    names = list(parameters)
    if word in names:
        return [word]
    if word in set(GROUPS.values()) and word not in GROUPS:
        return [n for n in names if group_of(n) == word]
    found = [n for n in names if kind_of(n) == word or group_of(n) == word]
    if found:
        return found
    fused = [n for n in names if kind_of(n) in _FUSED.get(word, ())]
    if fused:
        raise SurgeryError(
            f"There is no projection '{word}' of its own: it is part of '{fused[0]}'.",
            hint=f"Ask for '{kind_of(fused[0])}', which moves it with the others, or for all of attention or mlp.",
        )
    if word in GROUPS:
        return []
    if "." in word:
        raise SurgeryError(f"The model has no parameter '{word}'.", hint=nearest(word, names))
    raise SurgeryError(f"'{word}' is neither a kind or group of modules nor a parameter.",
                       hint=nearest(word, {*GROUPS, *GROUPS.values()}))  # fmt: skip


def _head(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 1)


def _words(parameters: Iterable[str]) -> str:
    return "There are: " + ", ".join(sorted({kind_of(name) for name in parameters})) + "."
