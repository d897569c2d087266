"""What the tests start with torchrun: `sparse_script.py FOLDER`, each run of `RUNS` once, its weights in FOLDER.

One process alone takes whole batches, two take halves of them: the results are held against each other.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.errors import SurgeryError
from surgery.tuning import SparseAdamW, select, without_reducer

STEPS, ROWS = 4, 8
SETTINGS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "clip": 0.5}  # a large eps: no steps of full size by rounding
RUNS: dict[str, dict[str, Any]] = {
    "reducer": {"method": "lift"},
    "rests": {"method": "lift", "rests": True},
    "accumulated": {"method": "lift", "accumulate": 2},
    "accumulated_rests": {"method": "lift", "accumulate": 2, "rests": True},
    "slices": {"method": "s2ft", "wrap": False},
    "half": {"method": "half", "rests": True},
    "reselected": {"method": "lift", "rests": True, "again": "magnitude"},
}


def llama() -> Any:
    """The same random weights everywhere."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, tie_word_embeddings=True)
    )  # fmt: skip


def chosen(model: Any, method: str) -> Any:
    """About 5 % of its numbers, or half of its tensors."""
    return select(model, method, **({} if method == "half" else {"density": 0.05}))


def rows() -> torch.Tensor:
    """All batches, one after the other."""
    return torch.randint(0, 40, (2 * STEPS * ROWS, 9), generator=torch.Generator().manual_seed(0))


class Counted:
    """Notes the bytes of what is reduced by calls from Python, and of what DDP's own reducer sends (`sent`)."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.sent: list[int] = []
        self._real = torch.distributed.all_reduce

    def __call__(self, tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
        self.sizes.append(tensor.numel() * tensor.element_size())
        return self._real(tensor, *args, **more)

    def hook(self, world, bucket):  # annotations that are strings are no annotations to DDP
        """DDP's usual averaging, and a note of it."""
        buffer = bucket.buffer()
        self.sent.append(buffer.numel() * buffer.element_size())
        work = self._real(buffer.div_(world), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])


def run(
    method: str, *, wrap: bool = True, rests: bool = False, accumulate: int = 1, again: str | None = None
) -> dict[str, Any]:
    """A user's loop with accelerate; what came of it."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = llama()
    optimizer = SparseAdamW(model, chosen(model, method), **SETTINGS)
    plain, world = model, accelerator.num_processes
    loader = DataLoader(list(rows()), batch_size=ROWS // world // accumulate)
    prepared, loader = accelerator.prepare(optimizer, loader)
    model = accelerator.prepare(model) if wrap else model
    wrapped = model is not plain
    counted = Counted()
    if wrapped:
        model.register_comm_hook(world, counted.hook)
    if rests and wrapped:
        without_reducer(model)
    real, torch.distributed.all_reduce = torch.distributed.all_reduce, counted
    held = 0
    try:
        for i, batch in enumerate(loader):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=batch, labels=batch).loss)
                held = max(held, sum(p.grad.numel() for p in plain.parameters() if p.grad is not None))
                prepared.step()
                prepared.zero_grad()
            if again and i == STEPS:
                optimizer.reselect(chosen(plain, again))
    finally:
        torch.distributed.all_reduce = real
    return {"weights": {n: p.detach().clone() for n, p in plain.named_parameters()}, "reduced": counted.sizes,
            "sent": counted.sent, "count": optimizer.selection.count, "wrapped": wrapped, "dense": held}  # fmt: skip


def sharded() -> list[str]:
    """What a model cut up by FSDP2 is told: by the optimizer, by a selection of numbers, by one of whole parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = llama()
    selection = chosen(model, "lift")
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    told = []
    for make in (
        lambda: SparseAdamW(model, selection),
        lambda: chosen(model, "random"),
        lambda: chosen(model, "half"),
    ):
        try:
            make()
            told.append("")
        except SurgeryError as error:
            told.append(str(error))
    return told


def main(folder: Path) -> None:
    """Every run, and what FSDP2 is told."""
    rank = int(os.environ.get("RANK", "0"))
    facts = {}
    for name, words in RUNS.items():
        found = run(**words)
        save_file({n: w.contiguous() for n, w in found.pop("weights").items()}, folder / f"{name}-{rank}.safetensors")
        facts[name] = found
    if "RANK" in os.environ:
        facts["sharded"] = sharded()
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
