"""What `patching.py` says of memory: each figure from a process of its own, the peak above the loaded model.

The peak is the kernel's (VmHWM), reset after a small pass has loaded and allocated what the first call does, less what
is resident then. The C library gives freed memory back at once (`MALLOC_MMAP_THRESHOLD_`), so that what is measured was
in use; for sweeps the peak with its usual settings, under which it keeps some for later, stands beside it. A vocabulary
of 1000 keeps logits small: what is measured are activations.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import patching_peers as peers
import torch
from torch import Tensor

MB = 1 << 20
CAPTURED = 64, 128
"""Prompts and tokens of a capture: 24 MB a layer of the stream of GPT-2 small."""
SWEPT = 32, 64
BUDGETS = 64, 256, 1024
"""MB."""
ARMS = ("ours, one layer", "ours, all layers", "TransformerLens, one layer", "TransformerLens, all layers")


def memory() -> dict[str, list[dict[str, Any]]]:
    """MB held and at the peak, for captures and for sweeps with a budget."""
    captures = [{"arm": arm, **_measured("capture", arm)} for arm in ARMS]
    sweeps: list[dict[str, Any]] = []
    for site, budget in [("resid_pre", BUDGETS[0]), *(("z", budget) for budget in BUDGETS)]:
        usual = _measured("sweep", site, str(budget), back=False)["peak"]
        sweeps.append({"site": site, "budget": budget, **_measured("sweep", site, str(budget)), "usual": usual})
    return {"capture": captures, "budget": sweeps}


def _measured(*arguments: str, back: bool = True) -> dict[str, float]:
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if back else {})
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def capture_case(arm: str, size: tuple[int, int] = CAPTURED, **smaller: int) -> dict[str, float]:
    """resid_post of the middle layer, or of all layers, kept from one forward."""
    model = peers.gpt2(**{"vocab_size": 1000, **smaller})
    layer = model.config.n_layer // 2
    one = arm.endswith("one layer")
    ids = peers.pairs(1000, *size)[0]
    if arm.startswith("ours"):
        from surgery.activations import capture

        def work(ids: Tensor) -> Iterable[Tensor]:
            with torch.no_grad(), capture(model, [f"resid_post.{layer}" if one else "resid_post"]) as seen:
                model(ids, use_cache=False)
            return list(seen.values())
    else:
        from surgery.interop import to_transformer_lens

        bridge: Any = to_transformer_lens(model)
        del model

        def wanted(name: str) -> bool:
            return name == f"blocks.{layer}.hook_resid_post" if one else name.endswith("hook_resid_post")

        def work(ids: Tensor) -> Iterable[Tensor]:
            with torch.no_grad():
                _, cache = bridge.run_with_cache(ids, names_filter=wanted)
            return list(cache.values())

    return peak(lambda: work(ids), lambda: work(ids[:1, :8]))


def sweep_case(site: str, budget: int, size: tuple[int, int] = SWEPT, **smaller: int) -> dict[str, float]:
    """A sweep that would take more than the largest budget if it could."""
    from analysis.metrics import logit_diff
    from analysis.patching import patch

    model = peers.gpt2(**{"n_layer": 6, "n_embd": 256, "n_head": 8, "vocab_size": 1000, **smaller})
    clean, corrupt, answers = peers.pairs(1000, *size)
    options: dict[str, Any] = {"positions": [5, 6]} if site == "resid_pre" else {}

    def work(rows: int) -> Iterable[Tensor]:
        metric = logit_diff(answers[:rows])
        patch(model, clean[:rows], corrupt[:rows], metric, site, budget=budget * MB, **options)
        return []

    return peak(lambda: work(len(clean)), lambda: work(1))


def peak(work: Callable[[], Iterable[Tensor]], before: Callable[[], Any]) -> dict[str, float]:
    """MB resident above what was there before `work`, at most, and MB of what it hands back."""
    before()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    resident = _status("VmRSS")
    kept = work()
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return {"held": sum(held.values()) / MB, "peak": _status("VmHWM") - resident}


def _status(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, *what = sys.argv[1:]
    print(json.dumps(capture_case(what[0]) if kind == "capture" else sweep_case(what[0], int(what[1]))))
