"""What training dictionaries costs: time and memory of a step, against SAELens, sparsify and dictionary_learning.

    python experiments/benchmarks/sae.py --peers OTHER/bin/python    # quiet machine; 8 minutes
    python experiments/benchmarks/sae.py                             # without the peers
    python experiments/benchmarks/sae.py --fast                      # very small, one round: a check that it runs
    python experiments/benchmarks/sae.py --only steps                # some of the sections, nothing written
    python experiments/benchmarks/sae.py --tables                    # the section of README.md of the stored run

The peers' pins and ours exclude each other: OTHER is an environment with sae-lens 6.54.12, eai-sparsify 1.3.3 and
dictionary-learning 0.1.0, and their arms run there, on the same rows. One thread; CPU seconds of the process of each
arm; every arm has a dictionary of its own and makes one step in each round, in turn; ratios are medians of the rounds'.

* steps: training steps on rows that are there already, d_in 256, batches of 4,096 rows, k 32, with 2,048 and 8,192
  latents; gradients clipped, use of latents counted, choice as with decoder rows of norm 1. Beside them the *floor*:
  the dense product of rows and encoder at the rate of this machine's matrix products
* shapes: the same with 256 to 1,024 latents against the dense loop: where sparse codes begin to pay
* memory: the peak of a step above the weights, each arm in a process of its own
* stream: reading activations against the model's own forward, and a second dictionary on the same stream

Writes `results/sae.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from sae_arms import DENSE, OURS, RULES, Worker, memory
from sae_stream import MODELS, ratio, stream
from sae_tables import LINES, section
from safetensors.torch import save_file

import surgery
from surgery.errors import SurgeryError
from surgery.sae.metrics import Planted

HERE = Path(__file__).parent
D, BATCH, K, LATENTS, BATCHES = 256, 4096, 32, (2048, 8192), 4
FEW = (256, 512, 1024)
SQUARE = 2048
"""Width of the matrices whose product tells the rate of the machine."""
Row = dict[str, Any]


def inputs(folder: Path, fast: bool) -> Path:
    """Rows of planted directions, in a file that every process reads."""
    d, batch = (32, 256) if fast else (D, BATCH)
    planted = Planted(d=d, n=4 * d, rate=0.03, noise=0.01)
    rows = torch.stack([planted.rows(batch, seed)[0] for seed in range(BATCHES)])
    save_file({"rows": rows}, folder / "rows.safetensors")
    return folder / "rows.safetensors"


class Pool:
    """Our process and that of the peers, and who runs what."""

    def __init__(self, file: Path, k: int, peers: str | None) -> None:
        self.file, self.k = file, k
        self.python = {OURS: sys.executable, DENSE: sys.executable}
        self.own = Worker(sys.executable, file, k)
        self.workers = dict.fromkeys(self.python, self.own)
        self.versions: dict[str, str] = {}
        if peers is None:
            print("No environment of the peers (--peers): they are left out.")
            return
        other = Worker(peers, file, k)
        self.versions = other.versions
        self.workers |= dict.fromkeys(other.versions, other)
        self.python |= dict.fromkeys(other.versions, peers)
        for arm in {arm for arms in RULES.values() for arm in arms} - self.workers.keys():
            print(f"{arm} is not installed there: left out.")

    def arms(self, rule: str) -> list[str]:
        return [arm for arm in RULES[rule] if arm in self.workers]

    def close(self) -> None:
        for worker in set(self.workers.values()):
            worker.close()


def rate(width: int) -> float:
    """Floating-point operations a second of a product of two square matrices, the best of five."""
    one, other, found = torch.rand(width, width), torch.rand(width, width), []
    for _ in range(5):
        began = time.process_time()
        torch.mm(one, other)
        found.append(time.process_time() - began)
    return 2 * width**3 / min(found)


def steps(
    pool: Pool, rule: str, latents: int, rows: tuple[int, int], rounds: int, square: int, arms: Sequence[str]
) -> Row:
    """CPU seconds of a step of every arm, ratios to ours, and the floor."""
    for arm in arms:
        pool.workers[arm].make(arm, rule, latents)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm in arms:
            took = pool.workers[arm].step(arm, turn)
            if turn:  # the first allocates, and one of the peers looks for a median
                seconds[arm].append(took)
    per_s = rate(square)
    floor = 2 * rows[0] * rows[1] * latents / per_s
    each: dict[str, Row] = {
        arm: {"seconds": statistics.median(took), "rows_per_s": rows[0] / statistics.median(took),
              "slower": ratio(took, seconds[OURS])}
        for arm, took in seconds.items()
    }  # fmt: skip
    return {"rule": rule, "latents": latents, "rounds": rounds, "arms": each,
            "floor": {"flops_per_s": per_s, "seconds": floor, "times": each[OURS]["seconds"] / floor}}  # fmt: skip


def peaks(pool: Pool, rule: str, latents: int) -> Row:
    """MiB of a step of every arm above the weights."""
    found = {arm: memory(pool.python[arm], arm, rule, latents, pool.file, pool.k) for arm in pool.arms(rule)}
    return {"rule": rule, "latents": latents, "peak": found}


def streams(fast: bool) -> list[Row]:
    """Of every model that is there."""
    found = []
    for name in list(MODELS)[:1] if fast else MODELS:
        try:
            found.append(stream(name, fast))
        except SurgeryError as error:
            print(f"The stream of {name} is left out: {error}")
    return found


def run(sections: Sequence[str], fast: bool, peers: str | None) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Every section, printed as it comes; and the versions of the peers."""
    sizes, k = ((64,), 4) if fast else (LATENTS, K)
    results: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = inputs(Path(folder), fast)
        pool = Pool(file, k, peers)
        shape = (256, 32) if fast else (BATCH, D)
        cases = [(rule, latents) for latents in sizes for rule in RULES]
        for name in sections:
            if name == "steps":
                rounds = {latents: 1 if fast else 11 if latents < 8192 else 9 for latents in sizes}
                square = 64 if fast else SQUARE
                results[name] = [steps(pool, *c, shape, rounds[c[1]], square, pool.arms(c[0])) for c in cases]
            elif name == "shapes":
                small = [(rule, latents) for rule in RULES for latents in ((32,) if fast else FEW)]
                results[name] = [steps(pool, *c, shape, 1 if fast else 9, 64, (OURS, DENSE)) for c in small]
            elif name == "memory":
                results[name] = [peaks(pool, *case) for case in (cases[:1] if fast else cases)]
            else:
                results[name] = streams(fast)
            print(f"{LINES[name](results[name])}\n", flush=True)
        pool.close()
    return results, pool.versions


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="the Python of an environment with the three packages")
    parser.add_argument("--fast", action="store_true", help="very small, one round; nothing is written")
    parser.add_argument("--only", nargs="+", choices=list(LINES), help="sections; nothing is written")
    parser.add_argument("--tables", action="store_true", help="print the section of README.md of the stored run")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "sae.json")
    args = parser.parse_args(arguments)
    if args.tables:
        print(section(json.loads(args.json.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    load_before, began = os.getloadavg()[0], time.perf_counter()
    results, versions = run(args.only or list(LINES), args.fast, args.peers)
    report = {
        "threads": 1, "results": results, "peers": versions, "cores": os.cpu_count(),
        "load_average": {"before": load_before, "after": os.getloadavg()[0]}, "seconds": time.perf_counter() - began,
        "surgery": surgery.__version__, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    print(f"{report['seconds']:.0f} s; load {load_before:.2f} before, {os.getloadavg()[0]:.2f} after")
    if not (args.fast or args.only):
        args.json.parent.mkdir(exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
