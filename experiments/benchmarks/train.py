"""Training against TRL 1.16 and against bare loops over the same modules, in one run on one thread.

    python experiments/benchmarks/train.py           # needs the extra `peers`; half an hour
    python experiments/benchmarks/train.py --quick   # fewer steps, without memory: a look

A step is everything from one optimizer step to the next: prompts, generation, rewards, loss, backward, update. Arms
take turns (ours through the real `Trainer`, TRL through its real trainers, a bare loop), each from the same random
Llama in fp32, and a step is timed in CPU seconds of the process, so that a shared machine disturbs little; figures are
medians over all turns, each turn's first step left out. Every completion has full length, the end mark being out of
the model's vocabulary: all arms do the same work. The bare loop shares prompts, too: it reads each prompt once, repeats
the cache for the group, samples, and makes one forward and backward over prompts (once, keys and values with gradient)
and completions. Memory is the peak of one process that makes GRPO steps and nothing else.

Writes `results/train.json` and prints the tables of `README.md`.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from training_arms import GROUP, Shape, floor, ours, tokenizer, trainer_of, trl

HERE = Path(__file__).parent
ARMS: dict[str, Callable[..., list[float]]] = {"ours": ours, "trl": trl, "floor": floor}
STEPS: list[tuple[str, str, Shape, dict[str, float]]] = [
    ("GRPO, d=256, 12 + 32", "grpo", Shape(12, 32), {"trl": 0.85, "floor": 1.05}),
    ("GRPO, d=64, 12 + 16", "grpo", Shape(12, 16, d=64, layers=2, mlp=172, heads=4, kv_heads=4), {"trl": 0.55}),
    ("GRPO, d=256, 192 + 32", "grpo", Shape(192, 32), {"trl": 0.35}),
    ("SFT, d=256, 12 + 32", "sft", Shape(12, 32), {"floor": 1.03}),
]
"""What is timed, and the largest ratio to each other arm that was aimed at."""
PASSES = {(192, 32): 0.23, (64, 64): 0.60, (12, 32): 0.83}
"""Lengths, and what a sketch of the training pass alone gained by sharing prompts."""
SMOLLM2: dict[str, Any] = {
    "d": 576, "layers": 30, "mlp": 1536, "heads": 9, "kv_heads": 3, "vocabulary": 49152, "tied": True,
}  # fmt: skip
PIECE = 16
MEMORY = [(12, 32, 8, 0), (192, 32, 2, 0), (12, 32, 8, 1)]
"""Prompt, completion, prompts (of 8 completions each), gradient checkpointing."""


def steps_table(turns: int, steps: int) -> list[dict[str, Any]]:
    """Median CPU seconds of a step by arm, and ratios."""
    found = []
    for name, objective, shape, aims in STEPS:
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for _ in range(turns):
            for arm, run in ARMS.items():
                seconds[arm] += run(shape, steps + 1, objective)
        median = {arm: statistics.median(times) for arm, times in seconds.items()}
        row: dict[str, Any] = {"what": name, "seconds": median, "steps": turns * steps, "aims": aims}
        row["ratios"] = {arm: median["ours"] / median[arm] for arm in ("trl", "floor")}
        found.append(row)
        print(name, {k: round(v, 4) for k, v in median.items()}, row["ratios"], flush=True)
    return found


def passes_table(rounds: int) -> list[dict[str, Any]]:
    """Forward and backward of the policy on given rollouts, with a group's prompt once and with one for each row."""
    from surgery.training.batch import Batch
    from surgery.training.policy import Policy

    found = []
    for (prompt, new), sketch in PASSES.items():
        shape, rng = Shape(prompt, new), Random(0)
        model = shape.model()
        prompts = [[rng.randrange(200) for _ in range(prompt)] for _ in range(shape.prompts)]
        completions = [[rng.randrange(200) for _ in range(new)] for _ in range(shape.prompts * GROUP)]
        batch = Batch.of([p for p in prompts for _ in range(GROUP)], completions, group=GROUP)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(rounds + 1):
            for shared in seconds:
                began = time.process_time()
                Policy(model, share_prompts=shared)(batch).log_probs.mean().backward()
                if turn:
                    seconds[shared].append(time.process_time() - began)
        once, plain = (statistics.median(seconds[key]) for key in (True, False))
        found.append(
            {"prompt": prompt, "new": new, "shared": once, "plain": plain, "ratio": once / plain, "sketch": sketch}
        )
        print(found[-1], flush=True)
    return found


def ragged(rounds: int) -> dict[str, float]:
    """Generation of up to 64 tokens, each of which may be the last (one in 16): ended rows leave, or stay."""
    from surgery.decoding import LocalGenerator, Sampling, loop

    shape = Shape(12, 64)
    model = shape.model()
    model.generation_config.eos_token_id = [*range(shape.vocabulary // 16), shape.vocabulary]
    draw = LocalGenerator(model, tokenizer(shape), Sampling(max_new_tokens=64))
    rng = Random(0)
    prompts = [[rng.randrange(200) for _ in range(12)] for _ in range(shape.prompts)]
    seconds: dict[float, list[float]] = {loop.LEAVE: [], -1.0: []}
    drawn, usual = [], loop.LEAVE
    try:
        for turn in range(rounds + 1):
            for share in seconds:
                loop.LEAVE = share
                began = time.process_time()
                drawn = draw(prompts, GROUP, range(turn * shape.prompts, (turn + 1) * shape.prompts))
                if turn:
                    seconds[share].append(time.process_time() - began)
    finally:
        loop.LEAVE = usual
    leaving, staying = (statistics.median(times) for times in seconds.values())
    length = statistics.mean(len(r.completion_ids) for r in drawn)
    return {"leaving": leaving, "staying": staying, "ratio": leaving / staying, "mean_length": length}


def reference_passes() -> dict[str, float]:
    """Rows through the reference policy for each rollout, over four updates made of two batches of rollouts."""
    found = {}
    for beta in (0.0, 0.04):
        shape, rows = Shape(12, 8, d=32, layers=1, mlp=32, heads=2, kv_heads=2), list[int]()
        trainer = trainer_of(shape, 4, "grpo", beta=beta, batch={"epochs": 2})
        if trainer.reference is not None:
            trainer.reference.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(len(args[0])))
        trainer.run()
        found[f"beta {beta}"] = sum(rows) / (2 * shape.prompts * GROUP)
    return found


# ---- memory, each arm in a process of its own


def memory_table() -> list[dict[str, Any]]:
    """Peak resident memory of two GRPO steps, MB: ours, ours in passes of `PIECE` rows, TRL's; and before a step."""
    found = []
    for case in MEMORY:
        row: dict[str, Any] = dict(zip(("prompt", "new", "prompts", "gradient_checkpointing"), case, strict=True))
        for arm in ("ours", "pieces", "trl"):
            command = [sys.executable, __file__, "--memory", arm, *map(str, case)]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            row[arm] = json.loads(told)
        row["ratio"] = row["ours"]["peak"] / row["trl"]["peak"]
        row["ratio_pieces"] = row["pieces"]["peak"] / row["trl"]["peak"]
        above = {arm: row[arm]["peak"] - row[arm]["model"] for arm in ("ours", "trl")}
        row["ratio_above_model"] = above["ours"] / above["trl"]
        found.append(row)
        print(row, flush=True)
    return found


def measure_memory(arm: str, prompt: int, new: int, prompts: int, checkpointing: int) -> None:
    """In a process of its own: prints MB with the model made, and at the peak of two steps."""
    import trl as _  # noqa: F401  both arms begin with the same modules

    shape = Shape(prompt, new, prompts=prompts, **SMOLLM2)
    tokenizer(shape)
    kept = shape.model()
    before = resident("VmRSS")
    del kept
    if arm != "trl":
        batch = {"micro_batch": PIECE} if arm == "pieces" else {}
        ours(shape, 2, gradient_checkpointing=bool(checkpointing), batch=batch)
    else:
        trl(shape, 2, checkpointing=bool(checkpointing))
    print(json.dumps({"model": before, "peak": resident("VmHWM")}))


def resident(what: str) -> float:
    """MB, from /proc (a child's ru_maxrss begins at its parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Everything, or one arm's memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, without memory")
    parser.add_argument("--only", nargs="*", help="of steps, passes, ragged, reference, memory: the others as before")
    parser.add_argument("--memory", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.memory:
        arm, *numbers = options.memory
        return measure_memory(arm, *map(int, numbers))
    turns, steps, rounds = (1, 3, 3) if options.quick else (2, 3, 5)
    parts: dict[str, Callable[[], Any]] = {
        "reference": reference_passes,
        "ragged": partial(ragged, rounds),
        "passes": partial(passes_table, rounds),
        "steps": partial(steps_table, turns, steps),
        "memory": memory_table,
    }
    path = HERE / "results" / "train.json"
    results = json.loads(path.read_text()) if path.exists() and options.only else {}
    results |= {"machine": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    for name, part in parts.items():
        if name in (options.only or parts) and not (options.quick and name == "memory"):
            print(f"-- {name}")
            results[name] = part()
            if isinstance(results[name], dict):
                print(results[name], flush=True)
    if not options.quick:
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
