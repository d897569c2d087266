"""What the benchmark of dictionaries compares: training steps of one dictionary on given rows, each way as it is made.

| arm | rules | a step is |
|---|---|---|
| ours | topk, batchtopk | that of `surgery.sae.train.fit` |
| dense loop | topk, batchtopk | plain torch: dense codes, fused Adam, and the same extras |
| SAELens | topk, batchtopk | its `SAETrainer.step` |
| sparsify | topk | its `SparseCoder`, and its trainer's projections and use of latents; Adam fused, gradients clipped |
| dictionary_learning | batchtopk | its `BatchTopKTrainer.update` |

All clip gradients to 1.0, keep count of which latents are used, and choose as if decoder rows had norm 1: by weighing
(ours, dense loop, SAELens) or by projecting them (the others). This file runs in two environments, ours and that of
the peers, whose pins exclude each other:

    python sae_arms.py serve ROWS K                      # steps, asked for line by line
    python sae_arms.py memory ARM RULE LATENTS ROWS K    # MiB at the peak of a step above the weights
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

OURS, DENSE, SAELENS, SPARSIFY, LEARNING = "ours", "dense loop", "SAELens", "sparsify", "dictionary_learning"
RULES: dict[str, tuple[str, ...]] = {
    "topk": (OURS, DENSE, SAELENS, SPARSIFY), "batchtopk": (OURS, DENSE, SAELENS, LEARNING),
}  # fmt: skip
PACKAGES = {SAELENS: ("sae_lens", "sae-lens"), SPARSIFY: ("sparsify", "eai-sparsify"),
            LEARNING: ("dictionary_learning", "dictionary-learning")}  # fmt: skip
LR, STEPS = 3e-4, 100_000
Step = Callable[[Tensor], float]
"""A training step on rows; its loss."""


# ---- arms


def ours(rule: str, d: int, latents: int, k: int) -> Step:
    from surgery.sae.dictionary import Dictionary
    from surgery.sae.rules import BatchTopK, TopK
    from surgery.sae.train import Entry, Settings, _begun, _step

    made = TopK(k=k) if rule == "topk" else BatchTopK(k=float(k))
    entry = Entry("site", Dictionary(d, latents, made), Settings(lr=LR))
    optimizer = _begun(entry)

    def step(x: Tensor) -> float:
        return _step("it", entry, optimizer, {"site": x}, len(entry.log), STEPS)["loss"]

    return step


def dense(rule: str, d: int, latents: int, k: int) -> Step:
    rows = torch.rand(latents, d, generator=torch.Generator().manual_seed(0)) * 2 - 1  # it begins as ours
    decoder = nn.Parameter(0.1 * rows / rows.norm(dim=1, keepdim=True))
    encoder, bias = nn.Parameter(decoder.detach().clone()), nn.Parameter(torch.zeros(latents))
    b_dec = nn.Parameter(torch.zeros(d))
    parameters = [encoder, bias, decoder, b_dec]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    unused = torch.zeros(latents, dtype=torch.long)

    def step(x: Tensor) -> float:
        h = nn.functional.linear(x - b_dec, encoder, bias)
        scores = h.detach() * decoder.detach().norm(dim=1)
        if rule == "topk":
            index = scores.topk(k, dim=1, sorted=False).indices
            f = torch.zeros_like(h).scatter(1, index, h.gather(1, index).relu())
        else:
            index = scores.view(-1).topk(k * len(x), sorted=False).indices
            f = torch.zeros_like(h).view(-1).scatter(0, index, h.view(-1)[index].relu()).view_as(h)
        loss = (f @ decoder + b_dec - x).square().sum(1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        unused.copy_(torch.where((f.detach() > 0).any(0), 0, unused + len(x)))
        return float(loss.detach())

    return step


def saelens(rule: str, d: int, latents: int, k: int) -> Step:
    import sae_lens as s
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kind, config = {
        "topk": (s.TopKTrainingSAE, s.TopKTrainingSAEConfig),
        "batchtopk": (s.BatchTopKTrainingSAE, s.BatchTopKTrainingSAEConfig),
    }[rule]
    settings = SAETrainerConfig(
        total_training_samples=STEPS * 4096, train_batch_size_samples=4096, lr=LR, lr_end=LR, device="cpu"
    )
    trainer = SAETrainer(settings, kind(config(d_in=d, d_sae=latents, k=k)), iter([]))

    def step(x: Tensor) -> float:
        found = trainer.step(x)
        trainer.n_training_steps += 1
        return float(found.loss.detach())

    return step


def sparsify(rule: str, d: int, latents: int, k: int) -> Step:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(d, SparseCoderConfig(num_latents=latents, k=k))
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR, fused=True)
    unused, fired = torch.zeros(latents, dtype=torch.long), torch.zeros(latents, dtype=torch.bool)

    def step(x: Tensor) -> float:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=unused > 10_000_000)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        unused.add_(len(x))
        unused[fired] = 0
        fired.zero_()
        return float(out.fvu.detach())

    return step


def learning(rule: str, d: int, latents: int, k: int) -> Step:
    if "nnsight" not in sys.modules:  # imported there for models
        stub: Any = types.ModuleType("nnsight")
        stub.LanguageModel = object
        sys.modules["nnsight"] = stub
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    trainer = BatchTopKTrainer(STEPS, d, latents, k, layer=0, lm_name="x", device="cpu", lr=LR, warmup_steps=0)
    done = 0

    def step(x: Tensor) -> float:
        nonlocal done
        loss = trainer.update(done, x)
        done += 1
        return loss

    return step


ARMS: dict[str, Callable[[str, int, int, int], Step]] = {
    OURS: ours, DENSE: dense, SAELENS: saelens, SPARSIFY: sparsify, LEARNING: learning,
}  # fmt: skip


# ---- in a process of its own


def versions() -> dict[str, str]:
    """Of the peers that are there."""
    return {arm: importlib.metadata.version(name) for arm, (module, name) in PACKAGES.items()
            if importlib.util.find_spec(module)}  # fmt: skip


def serve(rows: Tensor, k: int) -> None:
    """Answers lines: {"make": [arm, rule, latents]}, {"step": [arm, number of the batch]}, in JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    made: dict[str, Step] = {}

    def answer(found: Any) -> None:
        print(json.dumps(found), file=answers, flush=True)

    answer(versions())
    for line in sys.stdin:
        ((what, words),) = json.loads(line).items()
        if what == "make":
            made[words[0]] = ARMS[words[0]](words[1], rows.shape[2], words[2], k)
            answer(None)
        elif what == "step":
            x, began = rows[words[1] % len(rows)], process_time()
            made[words[0]](x)
            answer(process_time() - began)


class Worker:
    """Arms in another process of another environment."""

    def __init__(self, python: str, rows: Path, k: int) -> None:
        command = [python, __file__, "serve", str(rows), str(k)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, env=environment())  # fmt: skip
        self.versions: dict[str, str] = self._answer()

    def make(self, arm: str, rule: str, latents: int) -> None:
        """A dictionary that has learned nothing."""
        self._ask({"make": [arm, rule, latents]})

    def step(self, arm: str, number: int) -> float:
        """CPU seconds of a training step on that batch."""
        return self._ask({"step": [arm, number]})

    def _ask(self, what: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("The process of the peers ended: run sae_arms.py by hand to see why.")
        return json.loads(line)

    def close(self) -> None:
        """Ends it."""
        self.process.communicate()


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"} | more


def memory(python: str, arm: str, rule: str, latents: int, rows: Path, k: int) -> float:
    """MiB at the peak of a step above the weights, in a process of its own; freed memory goes back at once."""
    command = [python, __file__, "memory", arm, rule, str(latents), str(rows), str(k)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(MALLOC_MMAP_THRESHOLD_="65536"))
    if done.returncode:
        sys.exit(f"memory of {arm} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak(arm: str, rule: str, latents: int, rows: Tensor, k: int) -> float:
    """State, gradients and activations: anonymous memory at the peak of the second and third step, less what is held
    when all modules are loaded, a small dictionary has made a step, and the weights are there."""
    small = ARMS[arm](rule, 16, 64, 4)
    for _ in range(2):
        small(rows[0, :64, :16].contiguous())
    del small
    step = ARMS[arm](rule, rows.shape[2], latents, k)
    trim()
    before = status("RssAnon")
    step(rows[0])
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    for x in rows[1:3]:
        step(x)
    return status("VmHWM") - status("RssFile") - before


def trim() -> None:
    """Gives back what is not used."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def status(what: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    what, *words, file, k = arguments
    rows = load_file(file)["rows"]
    if what == "serve":
        serve(rows, int(k))
    else:
        arm, rule, latents = words
        print(json.dumps(peak(arm, rule, int(latents), rows, int(k))))


if __name__ == "__main__":
    main(sys.argv[1:])
