"""Memory that a training step takes above the weights, each arm in a process of its own.

What counts is anonymous memory: at the peak of two steps, once the state is there, less what is held when the model
and all modules are loaded and one step without an optimizer has allocated what the first call does. State, masks,
adapters, gradients and activations are in it, weights are not. Freed memory goes back at once.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tuning_arms import ARMS, Shape, chosen_of


def memory(shape: Shape, arm: str, rows: int, length: int, lift: Path | None) -> dict[str, Any]:
    """`measured` in a process of its own."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    words = json.dumps([shape.__dict__, arm, rows, length, None if lift is None else str(lift)])
    done = subprocess.run([sys.executable, __file__, words], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"memory of {arm} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(shape: Shape, arm: str, rows: int, length: int, lift: Path | None) -> dict[str, Any]:
    """MiB of the weights, and at the peak of a step above them."""
    import scipy.linalg  # noqa: F401 - all arms begin with the same modules

    if importlib.util.find_spec("peft"):
        import peft  # noqa: F401
    little, ids = Shape(1, 64, 176, 4, 100), shape.ids(rows, length)
    ARMS[arm](little, lift).step(little.ids(1, 4))
    weights = sum(p.numel() * p.element_size() for p in shape.model().parameters())
    bare = shape.model()
    torch.autograd.grad(bare(input_ids=ids, labels=ids).loss, bare.parameters())
    del bare
    chosen_of.cache_clear()
    trim()
    before = status("RssAnon")
    one = ARMS[arm](shape, lift)
    chosen_of.cache_clear()
    one.step(ids)
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    for _ in range(2):
        one.step(ids)
    peak = status("VmHWM") - status("RssFile") - before - weights / 2**20
    return {"weights": weights / 2**20, "peak": peak, "model": before}


def trim() -> None:
    """Gives back what is not used."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def status(what: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    fields, name, rows, length, lift = json.loads(sys.argv[1])
    print(json.dumps(measured(Shape(**fields), name, rows, length, None if lift is None else Path(lift))))
