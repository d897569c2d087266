"""Many processes: who does which rows, and how parts come together. One process is the plain case, without collectives.

    torchrun --nproc_per_node 4 -m surgery.cli train RECIPE -o DIR --set parallel=ddp
    accelerate launch --num_processes 4 -m surgery.cli train RECIPE -o DIR --set parallel=fsdp2

| `parallel` | parameters, gradients, moments | trains on | result |
|---|---|---|---|
| none | one process | everything | |
| ddp | whole on every process; gradients are summed once an update | everything | as one process, to float rounding |
| fsdp2 | every layer cut up over the processes (torch's `fully_shard`) | demonstrations and pairs | the same |

Every process draws the same rows and holds the same batches; rollouts, rewards and passes are shared out by rows in
whole groups, and a row's noise is its own, so rollouts are word for word those of one process.

What FSDP2 can't do here: sample. Decoding would gather every layer for every token, in step on all processes, though
rows end at different times; a recipe with rollouts is refused, evaluation gives likelihoods and no accuracy. Masks are
refused too: a sharded parameter has no entries to name. After the run the model in memory stays in shards; `out/model`
holds it whole. Each process loads the whole model once, in main memory, before it is cut up.

Both were run with CPU processes (gloo); the GPU path (nccl, device chosen by accelerate from LOCAL_RANK) is the same
code and was not run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery import anatomy
from surgery.errors import SurgeryError

T = TypeVar("T")
BUCKET = 1 << 23
"""Numbers in one message of gradients."""


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

    def together(self, work: Callable[[], T]) -> list[T]:
        """Every process's result of `work`, by rank. What goes wrong on one is raised on all: nobody waits for ever."""
        if self.size == 1:
            return [work()]
        found: T | None = None
        problem: Exception | None = None
        try:
            found = work()
        except Exception as error:
            problem = error
        told = problem if problem is None or isinstance(problem, SurgeryError) else _told(self.rank, problem)
        parts = self.gather((found, told))
        if problem is not None:
            raise problem
        for _, told in parts:
            if told is not None:
                raise told
        return [part for part, _ in parts]  # type: ignore[misc]

    def summed(self, values: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        """(sum, count) pairs added up over all processes."""
        if self.size == 1:
            return values
        parts = self.gather(values)
        names = dict.fromkeys(name for part in parts for name in part)
        return {n: tuple(sum(p.get(n, (0.0, 0.0))[i] for p in parts) for i in (0, 1)) for n in names}  # type: ignore[misc]

    def wait(self) -> None:
        """Until everybody is here."""
        if self.size > 1:
            torch.distributed.barrier()


def start(parallel: str, trackers: list[str] | None = None, folder: Any = None) -> World:
    """The process's place, with accelerate's device and process group. Raises `SurgeryError` when they don't fit."""
    from accelerate import Accelerator

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if parallel == "none" and processes > 1:
        raise SurgeryError(
            f"{processes} processes were started, and the recipe says `parallel: none`.",
            hint="Set parallel: ddp or fsdp2, or start one process.",
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), log_with=trackers or None, project_dir=folder
    )  # arithmetic in bfloat16 is the engine's: accelerate allows one precision a process
    return World(accelerator.process_index, accelerator.num_processes, accelerator.device, accelerator)


# ---- gradients


def alike(module: nn.Module, world: World) -> None:
    """Parameters and buffers of the first process, on all of them."""
    if world.size > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            torch.distributed.broadcast(tensor.detach(), 0)


def add_gradients(parameters: Iterable[Tensor], world: World) -> None:
    """Each gradient becomes the sum over all processes, a bucket at a time; one that nobody has stays None.

    Once an update, behind the last micro-batch: whatever passes an objective makes, the sum is exact.
    """
    moving = list(parameters)
    if world.size == 1 or not moving:
        return
    has = torch.tensor([float(p.grad is not None) for p in moving], device=world.device)
    torch.distributed.all_reduce(has)
    for bucket in _buckets([p for p, anyone in zip(moving, has.tolist(), strict=True) if anyone]):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        torch.distributed.all_reduce(flat)
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view_as(p).clone()


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, about `BUCKET` numbers together."""
    bucket: list[Tensor] = []
    for p in parameters:
        if bucket and (p.dtype != bucket[0].dtype or sum(b.numel() for b in bucket) + p.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


def norm(parameters: list[Tensor], limit: float) -> float:
    """Clips gradients to `limit` (0: not at all) in place; the norm before that."""
    total = nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
    return float(whole(total))


# ---- shards


def shard(policy: nn.Module, world: World, *, half: bool) -> None:
    """Cuts the parameters of a policy up over all processes, layer by layer; the rest of it is the last piece.

    With `half`, layers are gathered and computed in bfloat16, and gradients summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    kinds = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    for member in (policy.model, *policy.backbones):  # type: ignore[misc]
        for layer in layers(member):
            fully_shard(layer, mesh=mesh, mp_policy=kinds)
    fully_shard(policy, mesh=mesh, mp_policy=kinds, reshard_after_forward=True)


def layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of any family: the entries of its main stack."""
    stack = anatomy.main_stack(name for name, _ in model.named_parameters())
    return [] if stack is None else list(model.get_submodule(stack).children())


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece, sharded or not. All processes take part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, which every process holds whole, on the parameter's device and cut up as the parameter is."""
    if not hasattr(parameter, "device_mesh"):
        return value.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def _told(rank: int, problem: Exception) -> SurgeryError:
    return SurgeryError(f"Process {rank} failed: {type(problem).__name__}: {problem}")
