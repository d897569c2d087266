"""Many processes: who does which rows, and how parts come together. One process is the plain case, without collectives.

`parallel: ddp` or `fsdp2` in the recipe, started by `torchrun --nproc_per_node N -m surgery.cli train RECIPE` or
`accelerate launch`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError

T = TypeVar("T")


@dataclass
class World:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    accelerator: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, items: Iterable[T], group: int = 1) -> list[T]:
        """This process's block of the items, whole groups, as even as can be."""
        items = list(items)
        groups = -(-len(items) // group)
        return items[groups * self.rank // self.size * group : groups * (self.rank + 1) // self.size * group]

    def gather(self, thing: T) -> list[T]:
        """Every process's thing, by rank, on every process."""
        if self.size == 1:
            return [thing]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, thing)
        return found

    def summed(self, values: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """(sum, count) pairs added up over all processes."""
        parts = self.gather(values)
        names = dict.fromkeys(name for part in parts for name in part)
        return {n: tuple(sum(p.get(n, (0.0, 0.0))[i] for p in parts) for i in (0, 1)) for n in names}  # type: ignore[misc]

    def wait(self) -> None:
        """Until everybody is here."""
        if self.size > 1:
            torch.distributed.barrier()


def start(parallel: str, precision: str = "float32", trackers: list[str] | None = None, folder: Any = None) -> World:
    """The process's place, with accelerate's device and process group. Raises `SurgeryError` when they don't fit."""
    from accelerate import Accelerator

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if parallel == "none" and processes > 1:
        raise SurgeryError(
            f"{processes} processes were started, and the recipe says `parallel: none`.",
            hint="Set parallel: ddp or fsdp2, or start one process.",
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if precision == "bfloat16" else "no",
        log_with=trackers or None,
        project_dir=folder,
    )
    return World(accelerator.process_index, accelerator.num_processes, accelerator.device, accelerator)


def wrapped(policy: nn.Module, parallel: str, world: World) -> nn.Module:
    """The policy as the engine calls it: itself, in DDP, or sharded in place by FSDP2."""
    if parallel == "ddp" and world.size > 1:
        from torch.nn.parallel import DistributedDataParallel

        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(policy, device_ids=ids, broadcast_buffers=False)
    return policy


@contextmanager
def without_sync(module: nn.Module, off: bool) -> Iterator[None]:
    """Gradients stay local inside, when `off`: all but the last micro-batch of an update."""
    if off and hasattr(module, "no_sync"):
        with module.no_sync():
            yield
    else:
        yield


def norm(parameters: list[Tensor], limit: float) -> float:
    """Clips gradients to `limit` (0: not at all) in place; the norm before that."""
    total = nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
    return float(total.full_tensor() if hasattr(total, "full_tensor") else total)
