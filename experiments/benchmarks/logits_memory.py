"""What decoding with three members holds: the largest tensor that is made, and memory at the peak.

The peak is the kernel's (VmHWM) of a process of its own, reset after a short decoding has loaded and allocated what the
first call does, less what is resident then; freed memory goes back at once (`MALLOC_MMAP_THRESHOLD_`).
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from logits_models import REAL, TINY, Case, case, ids_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from surgery.decoding import Sampling
from surgery.logits import generate

MB = 1 << 20
SHAPES = {TINY: (8, 64, 16), REAL: (8, 256, 32)}
"""Prompts, tokens of each, new tokens."""


class Largest(TorchDispatchMode):
    """Notes the shape of the largest tensor that an operation makes (views of what it is given don't count)."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = ()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.numel() > self.numbers:
                if made.untyped_storage().data_ptr() in given:
                    continue
                self.numbers, self.shape = made.numel(), tuple(made.shape)
        return out


def largest(work: Callable[[], Any]) -> tuple[int, ...]:
    """The shape of the largest tensor made."""
    with Largest() as seen:
        work()
    return seen.shape


def memory(name: str) -> dict[str, Any]:
    """`measured(name)` in a process of its own."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"memory of {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(subject: Case) -> dict[str, Any]:
    """MB of weights, of caches by arithmetic, at the peak above the loaded models; and the largest tensor made."""
    rows, length, new = SHAPES[subject.name]
    ids = ids_of(subject, rows, length)
    sampling = Sampling(new, temperature=0.0, batch_size=rows)
    generate(subject.ensemble, ids[:1], sampling=Sampling(2, temperature=0.0))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    resident = _status("VmRSS")
    generate(subject.ensemble, ids, sampling=sampling)
    peak = _status("VmHWM") - resident
    made = largest(lambda: generate(subject.ensemble, ids, sampling=Sampling(2, temperature=0.0, batch_size=rows)))
    models = subject.ensemble.models
    weights = sum({p.data_ptr(): p.numel() * p.element_size() for m in models for p in m.parameters()}.values())
    caches = sum(rows * (length + new) * per_token(model) for model in models)
    whole = rows * length * subject.ensemble.vocabulary * 4
    return {
        "models": subject.name, "rows": rows, "prompt": length, "new": new, "weights": weights / MB,
        "caches": caches / MB, "peak": peak, "logits_of_all": whole / MB, "largest": made,
    }  # fmt: skip


def per_token(model: Any) -> int:
    """Bytes of keys and values a token."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * next(model.parameters()).element_size()


def _status(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measured(case(sys.argv[1]))))
