"""What SAE-tuning is compared with: one function an arm, all of them trained by `surgery.sae.tune.tune`.

| arm | stands in at the site | teacher | asks |
|---|---|---|---|
| source | dictionary of the source | the target | SAE-tuning as published |
| own | dictionary of the target | the target | does the source matter, or any dictionary of such activations? |
| shuffled | dictionary of the shuffled source | the target | does what the source has learned matter? |
| random | dictionary with random directions | the target | does the dictionary need to know anything? |
| noise | noise as long as the source dictionary's error | the target | is it the error's size alone? |
| source_teacher | dictionary of the source | the source | what if the source is asked too? (ours) |
| labels | dictionary of the source | labels | what if the answers are learned behind it? (ours) |
| distillation | nothing | the source | what can be had from the source at all |
| sft | nothing | labels | plain fine-tuning on the same texts |
| unchanged | nothing, and nothing is trained | | where all begin |

The shuffled source is the target plus the source's change with the numbers of each tensor permuted: its activations
are as near to the target's, its change as large and in the same tensors, and nothing is learned in it. (Shuffled
weights or rows of the dictionary would rebuild nothing: that is the random arm again.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.registry import Registry
from surgery.sae.dictionary import Dictionary
from surgery.sae.stand_in import Noise, Stand


class Setup(NamedTuple):
    """What `tune` is told."""

    dictionary: Dictionary | Stand | None = None
    teacher: Any = "self"
    labels: float = 0.0


@dataclass(frozen=True)
class Bench:
    """What arms are made of: both models, and the dictionaries of one seed and site, trained when asked for."""

    source: nn.Module
    seed: int
    dictionary: Callable[[str], Dictionary]
    """Of "source", "target" or "shuffled"."""


@dataclass(frozen=True)
class Arm:
    """One way to train: whether something stands in at a site, and whether anything is trained."""

    make: Callable[[Bench], Setup | None]
    site: bool
    trained: bool

    @property
    def what(self) -> str:
        """In one line."""
        return (self.make.__doc__ or "").split("\n")[0].rstrip(".")


ARMS: Registry[Arm] = Registry("arm")


def arm(
    name: str, *, site: bool = True, trained: bool = True
) -> Callable[[Callable[[Bench], Setup | None]], Callable[..., Any]]:
    """Files a function under `name`."""

    def add(make: Callable[[Bench], Setup | None]) -> Callable[[Bench], Setup | None]:
        ARMS.register(name)(Arm(make, site, trained))
        return make

    return add


@arm("source")
def source(bench: Bench) -> Setup:
    """SAE-tuning as published: the source's dictionary, the target as its own teacher."""
    return Setup(bench.dictionary("source"))


@arm("own")
def own(bench: Bench) -> Setup:
    """The target's own dictionary."""
    return Setup(bench.dictionary("target"))


@arm("shuffled")
def shuffled(bench: Bench) -> Setup:
    """A dictionary of the source with its change shuffled."""
    return Setup(bench.dictionary("shuffled"))


@arm("random")
def random(bench: Bench) -> Setup:
    """A dictionary of random directions, with the norms of the source's."""
    return Setup(untrained(bench.dictionary("source"), bench.seed))


@arm("noise")
def noise(bench: Bench) -> Setup:
    """Noise as long as the error of the source's dictionary."""
    return Setup(Noise(bench.dictionary("source"), bench.seed))


@arm("source_teacher")
def source_teacher(bench: Bench) -> Setup:
    """The source's dictionary, and the source as teacher."""
    return Setup(bench.dictionary("source"), bench.source)


@arm("labels")
def labels(bench: Bench) -> Setup:
    """The source's dictionary, and the labels."""
    return Setup(bench.dictionary("source"), labels=1.0)


@arm("distillation", site=False)
def distillation(bench: Bench) -> Setup:
    """The source as teacher, without a dictionary."""
    return Setup(teacher=bench.source)


@arm("sft", site=False)
def sft(bench: Bench) -> Setup:
    """Plain fine-tuning on the labels."""
    return Setup(labels=1.0)


@arm("unchanged", site=False, trained=False)
def unchanged(bench: Bench) -> None:
    """The target as it is."""


def untrained(dictionary: Dictionary, seed: int) -> Dictionary:
    """The same rule, biases and norms of rows, and directions drawn at random: the encoder's are the decoder's."""
    found = copy.deepcopy(dictionary)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(found.decoder.shape, generator=generator).to(found.decoder)
    rows /= rows.norm(dim=1, keepdim=True)
    with torch.no_grad():
        for weight in (found.decoder, found.encoder):
            weight.copy_(weight.norm(dim=1, keepdim=True) * rows)
    return found


@torch.no_grad()
def shuffled_source(target: nn.Module, source: nn.Module, seed: int) -> nn.Module:
    """A copy of the target plus what the source has over it, the numbers of each tensor permuted.

    Raises `SurgeryError` where the two have not the same tensors.
    """
    check_shapes(target, source)
    found = copy.deepcopy(target)
    there = dict(source.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in found.named_parameters():
        change = (there[name].to(parameter.device).float() - parameter.float()).flatten()
        order = torch.randperm(len(change), generator=generator).to(change.device)
        parameter.add_(change[order].view_as(parameter).to(parameter.dtype))
    return found


def check_shapes(target: nn.Module, source: nn.Module) -> None:
    """Raises `SurgeryError` where the source has other tensors than the target: no change between them is known."""
    there = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name not in there or there[name].shape != parameter.shape:
            raise SurgeryError(f"The source's change can't be shuffled: it has no '{name}' like the target's.",
                               hint="Leave out the arm 'shuffled', or take a source of the same shapes.")  # fmt: skip
