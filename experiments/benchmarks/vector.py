"""Lossless vectors against copying the checkpoint, in one run.

    python experiments/benchmarks/vector.py                     # 0.5 B parameters, 3, 12 and 30 % changed, 5 rounds
    python experiments/benchmarks/vector.py --scale 0.3 --shares 0.12

Takes the base of the family of merge.py and fine-tunings of it in which that share of the numbers moved, on a RAM disk.
In turn: `cp -r` of the checkpoint, `save` of the lossless vector, `apply` of it, each in a process of its own. Reports
processor seconds (user + system) and wall seconds of the work, as medians over rounds, and what they are of copying.
Start-up of Python and torch, and the collector's first walk over what they made, are left out of save and apply.
Writes `results/vector.json` and prints the table. What `apply` wrote is compared with the fine-tuning once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from merge import make_family

import surgery
from surgery.checkpoint import CheckpointWriter, open_checkpoint

HERE = Path(__file__).parent
STEPS = ("copy", "save", "apply")
WORK = """
import gc, json, resource, sys, time
from surgery.weights import apply, vector_file
from surgery.weights.vector import TaskVector
step, base, tuned, vector, out, threads = sys.argv[1:]
gc.collect()
began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
if step == "save":
    TaskVector.between(base, tuned).save(vector, "lossless", threads=int(threads))
else:
    TaskVector.load(vector).apply(base, out, threads=int(threads))
after = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"wall": time.perf_counter() - began, "user": after.ru_utime - before.ru_utime,
                  "system": after.ru_stime - before.ru_stime}))
"""


def make_tuned(folder: Path, share: float) -> Path:
    """A fine-tuning in which about `share` of the base's numbers have those of `ft0`."""
    base, full = open_checkpoint(folder / "base"), open_checkpoint(folder / "ft0")
    generator = torch.Generator().manual_seed(1)
    out = folder / f"tuned{share:g}"
    with CheckpointWriter(out, base.tensors.values(), shard_size="300MB") as writer:
        for name, info in base.tensors.items():
            moved = torch.rand(info.shape, generator=generator) < share
            writer.write(name, torch.where(moved, full.read(name), base.read(name)))
        writer.add_file("config.json", folder / "base" / "config.json")
    return out


def run(step: str, base: Path, tuned: Path, vector: Path, out: Path, threads: int) -> dict[str, float]:
    """Seconds of one step: `wall`, `user`, `system`, and `cpu`, the sum of the last two."""
    if step == "copy":
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(["cp", "-r", tuned, out], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = {"wall": time.perf_counter() - began, "user": after.ru_utime - before.ru_utime,
                 "system": after.ru_stime - before.ru_stime}  # fmt: skip
    else:
        command = [sys.executable, "-c", WORK, step, *map(str, (base, tuned, vector, out, threads))]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found | {"cpu": found["user"] + found["system"]}


def measure(folder: Path, share: float, rounds: int, threads: int) -> dict[str, Any]:
    """One row: medians of every step, and save and apply over copy."""
    base, tuned, vector, out = folder / "base", make_tuned(folder, share), folder / "v.safetensors", folder / "out"
    found: dict[str, list[dict[str, float]]] = {step: [] for step in STEPS}
    for i in range(rounds):  # in turn, so that a slow minute of the machine hits all of them
        for step in STEPS:
            if step == "save":
                vector.unlink(missing_ok=True)
            found[step].append(run(step, base, tuned, vector, out, threads))
            if step == "apply" and i == 0:
                compare(out, tuned)
            shutil.rmtree(out, ignore_errors=True)
    row: dict[str, Any] = {"share": share, "bytes": sum(f.stat().st_size for f in tuned.glob("*.safetensors")),
                           "vector_bytes": vector.stat().st_size}  # fmt: skip
    for step, runs in found.items():
        row[step] = {what: statistics.median(r[what] for r in runs) for what in runs[0]}
        row[step]["all"] = runs
    for what in ("cpu", "wall"):
        row[f"{what}_over_copy"] = {step: row[step][what] / row["copy"][what] for step in STEPS[1:]}
    shutil.rmtree(tuned)
    return row


def compare(out: Path, tuned: Path) -> None:
    """Stops unless two checkpoints are equal bit for bit."""
    a, b = open_checkpoint(out), open_checkpoint(tuned)
    unequal = [n for n in b.tensors if not a.read(n).view(torch.int16).equal(b.read(n).view(torch.int16))]
    if unequal or a.tensors.keys() != b.tensors.keys():
        sys.exit(f"What was applied is not the fine-tuning: {unequal[:3]}")


def line(row: dict[str, Any]) -> str:
    """One row of the Markdown table: CPU seconds, ratios of them, and ratios of wall time."""
    cells = [f"{row['share']:.0%}", f"{row['vector_bytes'] / row['bytes']:.0%}"]
    cells += [f"{row[step]['cpu']:.2f}" for step in STEPS]
    cells += [f"{row[f'{what}_over_copy'][step]:.2f}" for what in ("cpu", "wall") for step in STEPS[1:]]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| changed | vector / model | copy, CPU s | save, CPU s | apply, CPU s | save / copy | apply / copy "
    "| save / copy, wall | apply / copy, wall |\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="size of the family: 1 is 0.5 B parameters")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.03, 0.12, 0.30], help="shares that changed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm") if Path("/dev/shm").is_dir() else None)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "vector.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="vector-benchmark-") as name:
        folder = Path(name)
        make_family(folder, args.scale)
        shutil.rmtree(folder / "ft1")
        rows = []
        print(HEAD, flush=True)
        for share in args.shares:
            rows.append(measure(folder, share, args.rounds, args.threads))
            print(line(rows[-1]), flush=True)
    report = {
        "parameters": rows[0]["bytes"] // 2, "threads": args.threads, "rounds": args.rounds, "rows": rows,
        "surgery": surgery.__version__, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
