"""What sparse tuning costs: time, memory, masks and files, against AdamW, PEFT's adapters and LIFT's own optimizer.

    python experiments/benchmarks/tuning.py                       # quiet machine; needs the extra `peers`
    python experiments/benchmarks/tuning.py --lift FOLDER         # with LIFT's published optimizer: a clone of its code
    python experiments/benchmarks/tuning.py --fast                # a very small model, one round: a check that it runs
    python experiments/benchmarks/tuning.py --only memory delta   # some of the sections, nothing written
    python experiments/benchmarks/tuning.py --tables              # the section of README.md of the stored run

A Llama of 4 layers, width 768 and inner width 2,112 (28,901,376 numbers in linear layers, 29.7 million in all),
random, float32; 5 % of the linear layers' numbers move (1,445,068), and adapters are as large. One thread; CPU seconds
of the process; every arm has a model of its own and makes one step in each round, in turn, so that a slow minute of the
machine hits all; a ratio is the median of the rounds' ratios, with the least and the largest.

* steps: 32 tokens, and 1,024 as 8 rows of 128 and as one row. *Update* is everything after the backward pass; the
  *optimizer phase* adds what it takes to gather gradients: by hooks on the parameters that is timed by itself; by
  blocks of rows, the usual way, it is the backward pass minus that of the same model without an optimizer. Beside it
  the *floor*: the bytes that the phase has to move at the rate at which this machine copies memory
* memory: the peak of a step above the weights, each arm in a process of its own
* state: bytes of state and of index for each number that is trained
* mask: choosing LIFT's mask anew and moving the state to it, against a training step and against a full SVD
* delta: the file of what moved, and whether it applies and reverts bit for bit

All adapters, HFT and masked AdamW use torch's fused AdamW. Writes `results/tuning.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tuning_arms import ARMS, DENSITY, FULL, HOOKS, OURS, RANK, Arm, Shape, Timed, at_hand, chosen_of, deaf, parts
from tuning_memory import memory
from tuning_tables import LINES, section

import surgery
from surgery.tuning import Selection, select
from surgery.tuning.selection.principal import nearest_of_rank
from surgery.weights.deltas.file import SparseDelta

HERE = Path(__file__).parent
SMALL = Shape(layers=2, width=64, inner=176, heads=4, vocabulary=100)
SHORT = "32 tokens"
BATCHES = {SHORT: (1, 32), "1,024 tokens as 8 x 128": (8, 128), "1,024 tokens as one row": (1, 1024)}
LINE = 64
"""Bytes that a processor moves at a time."""
Row = dict[str, Any]


def ratio(over: Sequence[float], under: Sequence[float]) -> Row:
    """The median over rounds of one arm's seconds over another's, and between what."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    return {"ratio": statistics.median(each), "range": [min(each), max(each)]}


# ---- sections


def steps(shape: Shape, tokens: str, rounds: int, lift: Path | None) -> Row:
    """Every arm's step by its parts, and ratios to AdamW over all weights, torch's default and fused."""
    rows, length = BATCHES[tokens]
    ids = shape.ids(rows, length)
    arms = {name: ARMS[name](shape, lift) for name in at_hand(lift)}
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in arms}
    for round_ in range(rounds + 1):
        for name, arm in arms.items():
            took = parts(arm, ids)
            if name == HOOKS:
                took["backward without hooks"] = plain = deaf(arm, ids)
            elif name == OURS:
                took["gathering"] = took["backward"] - plain  # which comes before it, in the same round
            took["whole"] = took["forward"] + took["backward"] + took["update"]
            took["phase"] = took["gathering"] + took["update"]
            for part, spent in took.items() if round_ else ():  # the first round allocates
                seconds[name].setdefault(part, []).append(spent)
    found: Row = {"tokens": tokens, "rounds": rounds, "arms": {}}
    for name, each in seconds.items():
        row: Row = {part: statistics.median(values) for part, values in each.items()}
        for other in [n for n in (FULL, f"{FULL}, fused") if n in seconds]:
            row[f"phase of {other}"] = ratio(each["phase"], seconds[other]["phase"])
            row[f"whole of {other}"] = ratio(each["whole"], seconds[other]["whole"])
        found["arms"][name] = row
    moved = to_move(chosen_of(shape), arms[HOOKS])
    rate = copying(32 * chosen_of(shape).count)  # far more than caches hold
    phase = found["arms"][HOOKS]["phase"]
    floor = sum(moved.values()) / rate
    found["floor"] = {"bytes": moved, "bytes_per_s": rate, "seconds": floor, "times": phase / floor}
    return found


def to_move(chosen: Selection, arm: Arm) -> dict[str, int]:
    """Bytes that the optimizer phase has to move: lines with chosen numbers, and all of the state."""
    places = [chosen.flat(name) for name in chosen]
    lines = sum(int((flat // (LINE // 4)).unique().numel()) for flat in places)
    count = chosen.count
    return {
        "gradients' lines, read": lines * LINE, "weights' lines, read and written": 2 * lines * LINE,
        "moments, read and written": 16 * count, "gathered gradients, written and read": 8 * count,
        "places, read twice": 8 * count,
    }  # fmt: skip


def copying(numbers: int) -> float:
    """Bytes a second, read and written, of copying so many float32."""
    source, target = torch.rand(numbers), torch.rand(numbers)
    times = []
    for _ in range(5):
        began = time.process_time()
        target.copy_(source)
        times.append(time.process_time() - began)
    return 8 * numbers / statistics.median(times)


def peaks(shape: Shape, tokens: str, names: Sequence[str], lift: Path | None) -> Row:
    """Peak memory of a step above the weights, MiB, by arm."""
    found = {}
    for name in names:
        found[name] = memory(shape, name, *BATCHES[tokens], lift)["peak"]
        print(f"  {tokens}: {name} {found[name]:.1f} MiB", flush=True)
    return {"tokens": tokens, "peak": found}


def state(shape: Shape, lift: Path | None) -> Row:
    """Bytes for each trained number: of state, of index; of ours also after the mask has moved."""
    ids, found = shape.ids(1, 32), {}
    for name in at_hand(lift):
        arm = ARMS[name](shape, lift)
        arm.step(ids)
        found[name] = {"trained": arm.trained, **arm.bytes()}
        if name == OURS:
            assert isinstance(arm.optimizer, Timed)
            arm.optimizer.reselect(chosen_of(shape))
            arm.step(ids)
            found[f"{name}, moved"] = {"trained": arm.trained, **arm.bytes()}
    return {"arms": found}


def mask(shape: Shape, rounds: int, lift: Path | None) -> Row:
    """CPU seconds of choosing LIFT's mask and moving the state, of steps, and of a full SVD of every matrix."""
    arm = ARMS[OURS](shape, None)
    batches = {tokens: shape.ids(*how) for tokens, how in BATCHES.items()}
    chosen = chosen_of(shape)
    arm.step(batches[SHORT])
    assert isinstance(arm.optimizer, Timed)
    optimizer = arm.optimizer
    jobs: dict[str, Callable[[], Any]] = {
        "choosing": lambda: select(arm.model, "lift", density=DENSITY, rank=min(RANK, shape.width // 2)),
        "moving the state": lambda: optimizer.reselect(chosen),
    }
    jobs |= {f"step, {tokens}": partial(arm.step, ids) for tokens, ids in batches.items()}
    seconds: dict[str, list[float]] = {job: [] for job in jobs}
    for _ in range(rounds):
        for job, work in jobs.items():
            began = time.process_time()
            work()
            seconds[job].append(time.process_time() - began)
    weights = [arm.model.get_parameter(name).detach() for name in chosen]
    began = time.process_time()
    layer = weights[: len(weights) // shape.layers]
    agree = [nearest(weight, min(RANK, shape.width // 2)) for weight in layer]
    took = {job: statistics.median(values) for job, values in seconds.items()}
    took["full SVD"] = (time.process_time() - began - sum(each["gram"] for each in agree)) * shape.layers
    refresh = took["choosing"] + took["moving the state"]
    return {
        "seconds": took, "refresh": refresh, "agree": min(each["agree"] for each in agree), "rounds": rounds,
        "of step": {t: refresh / took[f"step, {t}"] for t in BATCHES}, "of svd": refresh / took["full SVD"],
    }  # fmt: skip


def nearest(weight: torch.Tensor, rank: int) -> dict[str, float]:
    """Share of the mask by the Gram matrix that the full SVD's has too; the CPU seconds of the former."""
    began = time.process_time()
    gram = nearest_of_rank(weight, rank).abs().flatten()
    count = int(DENSITY * weight.numel())
    ours = gram.topk(count).indices
    spent = time.process_time() - began
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    full = ((left[:, :rank] * values[:rank]) @ right[:rank]).abs().flatten().topk(count).indices
    return {"agree": float(torch.isin(ours, full).float().mean()), "gram": spent}


def delta(shape: Shape, lift: Path | None) -> Row:
    """The file of what three steps moved: bytes for each number, seconds, and whether bits come back."""
    base, arm = shape.model(), ARMS[OURS](shape, None)
    for _ in range(3):
        arm.step(shape.ids(1, 32))
    seconds: dict[str, float] = {}

    def timed(what: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = work()
        seconds[what] = time.process_time() - began
        return found

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "delta.safetensors"
        found = timed("finding", lambda: SparseDelta.between(base, arm.model))
        timed("saving", lambda: found.save(file))
        size = file.stat().st_size
        again = timed("loading", lambda: SparseDelta.load(file))
        other = copy.deepcopy(base)
        undo = timed("applying", lambda: again.apply_to(other))
        applied = alike(other, arm.model)
        timed("reverting", undo)
        reverted = alike(other, base)
    dense = sum(p.numel() * p.element_size() for p in base.parameters())
    return {"numbers": found.count, "bytes": size, "bytes_per_number": size / found.count, "dense": dense,
            "applied": applied, "reverted": reverted, "seconds": seconds}  # fmt: skip


def alike(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether all parameters are the same bits."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32)) for a, b in pairs)


# ---- the run


def run(sections: Sequence[str], fast: bool, lift: Path | None) -> dict[str, list[Row]]:
    """Every section, printed as it comes."""
    shape = SMALL if fast else Shape()
    names = [FULL, HOOKS, OURS] if fast else at_hand(lift)
    plans: dict[str, list[Callable[[], Row]]] = {
        "steps": [
            partial(steps, shape, tokens, 1 if fast else 15 if tokens == SHORT else 7, lift)
            for tokens in ([SHORT] if fast else BATCHES)
        ],
        "memory": [partial(peaks, shape, tokens, names, lift) for tokens in ([SHORT] if fast else BATCHES)],
        "state": [partial(state, shape, lift)],
        "mask": [partial(mask, shape, 1 if fast else 5, lift)],
        "delta": [partial(delta, shape, lift)],
    }
    results: dict[str, list[Row]] = {}
    for name in sections:
        for plan in plans[name]:
            results.setdefault(name, []).append(plan())
        print(f"{LINES[name](results[name])}\n", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lift", type=Path, help="folder with LIFT's sparseAdam.py, or a clone of its repository")
    parser.add_argument("--fast", action="store_true", help="a very small model, one round; nothing is written")
    parser.add_argument("--only", nargs="+", choices=list(LINES), help="sections; nothing is written")
    parser.add_argument("--tables", action="store_true", help="print the section of README.md of the stored run")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "tuning.json")
    args = parser.parse_args(arguments)
    if args.tables:
        print(section(json.loads(args.json.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    load_before, began = os.getloadavg()[0], time.perf_counter()
    results = run(args.only or list(LINES), args.fast, args.lift)
    report = {
        "threads": 1, "results": results, "lift": args.lift is not None, "cores": os.cpu_count(),
        "load_average": {"before": load_before, "after": os.getloadavg()[0]}, "seconds": time.perf_counter() - began,
        "surgery": surgery.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    print(f"{report['seconds']:.0f} s; load {load_before:.2f} before, {os.getloadavg()[0]:.2f} after")
    if not (args.fast or args.only):
        args.json.parent.mkdir(exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
