"""Does what GRPO added to an SFT model carry over to that model's siblings by addition (arXiv:2509.01363)?

    python experiments/reasoning_vectors.py            # 5 pairs trained from tiny-base, about 5 CPU-minutes
    python experiments/reasoning_vectors.py --fast     # one pair of a few steps, a check that it runs

A pair: SFT of tiny-base on sums of which half are worked out, then GRPO on the same kind of questions with the exact
answer as reward. Its reasoning vector v = theta_GRPO - theta_SFT is added to (scale 1) and subtracted from (-1)
siblings: other fine-tunings of tiny-base, and tiny-base itself. Control: a random vector whose tensors have the norms
of v's. Each sibling is asked sums of its own, its own tasks, and the base's other skills.

The verdict was defined before anything was scored. Adding holds when, over the siblings with room to rise (below 0.9
before), accuracy on sums rises, and by more than with the random vector, each 95 % interval above zero; subtracting
holds when over the siblings with something to lose (0.1 or more before) it falls, likewise below zero; the random
vectors do nothing when both of their changes are smaller than 0.05.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena import SKILLS, in_processes, mean_interval, rounded, write
from build_zoo import MEMBERS, FamilyRows, Stage
from matplotlib.figure import Figure

from analysis.comparison import compare
from analysis.evaluate import evaluate_tasks, load
from analysis.results import Result, concatenate, stack
from surgery import zoo
from surgery.training import train
from surgery.weights.vector import TaskVector

SIBLINGS = {
    "tiny-base": (),
    "tiny-shift": ("shift",),
    "tiny-rotate": ("rotate",),
    "tiny-chain": (),
    "tiny-instruct": ("shift", "rotate"),
}
"""Each with its own tasks besides sums."""
ARMS = {"added": ("v", 1.0), "subtracted": ("v", -1.0), "random added": ("random", 1.0),
        "random subtracted": ("random", -1.0)}  # fmt: skip
ROOM, FLOOR, NOTHING = 0.9, 0.1, 0.05
SFT, GRPO = MEMBERS["sums-sft"].stages[0], MEMBERS["sums-grpo"].stages[0]


def tune(model: Any, tokenizer: Any, stage: Stage, steps: int, seed: int) -> None:
    """One of the zoo's own recipes from another seed."""
    words: dict[str, Any] = {"objective": "grpo", "reward": "accuracy"} if stage.group else {"objective": "sft"}
    train(
        model, tokenizer, data=FamilyRows(stage, seed), steps=steps, batch={"rows": stage.batch},
        rollouts={"prompts": stage.batch, "group": stage.group or 1, "max_new_tokens": 48},
        optimizer={"lr": stage.lr, "betas": (0.9, 0.98), "weight_decay": 0.01, "warmup": steps / 10, "final": 0.1},
        seed=seed, **words,
    )  # fmt: skip


def random_like(vector: TaskVector, model: Any, seed: int) -> TaskVector:
    """A random vector, each tensor as long as the vector's."""
    noisy, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    state = noisy.state_dict()
    for name in vector.names:
        noise = torch.randn(state[name].shape, generator=generator)
        state[name] += noise * (vector.norm(name) / noise.norm())
    return TaskVector.between(model, noisy)


def ask(model: Any, tokenizer: Any, own: Sequence[str], n: int, seed: int) -> dict[str, Any]:
    """Sums (right or wrong, and the share worked out), the mean of the base's other skills, and of the own tasks."""
    parts = evaluate_tasks(model, ("chain", *SKILLS, *own), n, seed, tokenizer=tokenizer, batch_size=1024).by("task")
    sums = parts["chain"]
    return {
        "sums": sums,
        "worked out": float(np.mean([";" in text for text in sums.columns["completion"]])),
        "skills": float(np.mean([parts[task].mean for task in SKILLS])),
        "own": float(np.mean([parts[task].mean for task in own])) if own else None,
    }


def siblings(n: int, vectors: Mapping[str, TaskVector], arms: Mapping[str, tuple[str, float]]) -> dict[str, Any]:
    """{sibling: {arm: what `ask` found}} with each arm's vector added; questions differ from sibling to sibling."""
    found: dict[str, Any] = {}
    for i, (name, own) in enumerate(SIBLINGS.items()):
        model, tokenizer = load(zoo.get(name))
        found[name] = {}
        for arm, (vector, scale) in arms.items():
            with vectors[vector].unbound().applied(model, scale):
                found[name][arm] = ask(model, tokenizer, own, n, 500 + i)
    return found


def pair(seed: int, n: int, steps: tuple[int, int]) -> dict[str, Any]:
    """Trains one pair and tries its vector, and a random one, on every sibling."""
    model, tokenizer = load(zoo.get("tiny-base"))
    tune(model, tokenizer, SFT, steps[0], 7000 + seed)
    before = copy.deepcopy(model)
    tune(model, tokenizer, GRPO, steps[1], 8000 + seed)
    vector = TaskVector.between(before, model)
    vectors = {"v": vector, "random": random_like(vector, before, seed)}
    trained = {"SFT": ask(before, tokenizer, (), n, 600), "GRPO": ask(model, tokenizer, (), n, 600)}
    return {"norm": vector.norm(), "trained": trained, "siblings": siblings(n, vectors, ARMS)}


def summarised(before: Mapping[str, dict], pairs: Mapping[int, dict]) -> dict[str, Any]:
    """Means and intervals by sibling, and the differences that the verdict is made of."""
    rows = {"before": {s: dict.fromkeys(pairs, before[s]["before"]) for s in SIBLINGS}}
    rows |= {arm: {s: {seed: p["siblings"][s][arm] for seed, p in pairs.items()} for s in SIBLINGS} for arm in ARMS}

    def sums(arm: str, names: Sequence[str]) -> Result:
        each = [stack({seed: found["sums"] for seed, found in rows[arm][s].items()}, "seed") for s in names]
        return concatenate(each, sibling=names)

    def against(ours: str, theirs: str, names: Sequence[str]) -> dict[str, Any]:
        return compare(sums(ours, names), sums(theirs, names)).to_dict()

    table: dict[str, dict[str, Any]] = {
        name: {
            arm: {
                "sums": mean_interval([float(found["sums"].mean) for found in rows[arm][name].values()]),
                **{what: float(np.mean([found[what] for found in rows[arm][name].values()]))
                   for what in ("worked out", "skills", *(["own"] if SIBLINGS[name] else []))},
            }
            for arm in rows
        }
        for name in SIBLINGS
    }  # fmt: skip
    start = {name: table[name]["before"]["sums"]["mean"] for name in SIBLINGS}
    rise = [name for name in SIBLINGS if start[name] < ROOM] or list(SIBLINGS)
    fall = [name for name in SIBLINGS if start[name] >= FLOOR] or list(SIBLINGS)
    differences = {
        "added - before": against("added", "before", rise),
        "added - random added": against("added", "random added", rise),
        "random added - before": against("random added", "before", rise),
        "subtracted - before": against("subtracted", "before", fall),
        "subtracted - random subtracted": against("subtracted", "random subtracted", fall),
        "random subtracted - before": against("random subtracted", "before", fall),
    }
    trained = {
        name: {"sums": mean_interval([float(p["trained"][name]["sums"].mean) for p in pairs.values()]),
               "skills": mean_interval([p["trained"][name]["skills"] for p in pairs.values()])}
        for name in ("SFT", "GRPO")
    }  # fmt: skip
    found = {"trained": trained, "siblings": table, "rise": rise, "fall": fall, "differences": differences}
    return {**found, "verdict": verdict(differences), "norm": mean_interval([p["norm"] for p in pairs.values()])}


def verdict(differences: Mapping[str, dict]) -> dict[str, bool]:
    """Which parts of the claim held."""
    d = differences
    return {
        "adding raises": d["added - before"]["low"] > 0 and d["added - random added"]["low"] > 0,
        "subtracting lowers": d["subtracted - before"]["high"] < 0 and d["subtracted - random subtracted"]["high"] < 0,
        "random does neither": all(abs(d[f"random {way} - before"]["difference"]) < NOTHING
                                   for way in ("added", "subtracted")),
    }  # fmt: skip


def markdown(summary: Mapping[str, Any]) -> str:
    """Accuracy on sums by sibling and arm, and the other skills with the vector added."""
    heads = ["sibling", "before", "v added", "v subtracted", "random added", "random subtracted",
             "worked out: before, added, subtracted", "other skills: before, added, subtracted",
             "own task: before, added, subtracted"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, row in summary["siblings"].items():
        cells = [f"{row['before']['sums']['mean']:.2f}"]
        for arm in ARMS:
            m = row[arm]["sums"]
            cells.append(f"{m['mean']:.2f}" + (f" [{m['low']:.2f}, {m['high']:.2f}]" if m["low"] is not None else ""))
        for what in ("worked out", "skills", "own"):
            has = what in row["before"]
            cells.append(", ".join(f"{row[a][what]:.2f}" for a in ("before", "added", "subtracted")) if has else "")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    lines += ["", "| difference, over siblings and pairs | sums |", "|---|---|"]
    for name, d in summary["differences"].items():
        lines.append(f"| {name} | {d['difference']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}] |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any]) -> Figure:
    """Sums by sibling: before, and with the vectors added and subtracted."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axis = figure.subplots()
    arms = ("before", *ARMS)
    looks = {
        "before": ("white", ""),
        "added": ("black", ""),
        "subtracted": ("0.65", ""),
        "random added": ("white", "////"),
        "random subtracted": ("white", "...."),
    }
    for i, arm in enumerate(arms):
        found = [row[arm]["sums"] for row in summary["siblings"].values()]
        means = np.array([m["mean"] for m in found])
        low = [m["mean"] - max(0.0, m["low"]) if m["low"] is not None else 0.0 for m in found]
        high = [min(1.0, m["high"]) - m["mean"] if m["high"] is not None else 0.0 for m in found]
        color, hatch = looks[arm]
        label = arm if "random" in arm or arm == "before" else f"v {arm}"
        axis.bar(
            np.arange(len(means)) + (i - 2) * 0.17, means, 0.17, yerr=[np.maximum(low, 0), np.maximum(high, 0)],
            color=color, hatch=hatch, edgecolor="black", ecolor="0.35", capsize=2, label=label,
        )  # fmt: skip
    axis.set_xticks(range(len(summary["siblings"])), list(summary["siblings"]))
    axis.set(ylabel="accuracy on sums", ylim=(0, 1.28), title="A reasoning vector, v = GRPO - SFT, on siblings")
    axis.legend(frameon=False, fontsize="small", loc="upper center", ncols=5)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """What a fast run must show: a vector that is not nothing, and siblings that it changes and then leaves."""
    assert report["summary"]["norm"]["mean"] > 0
    assert set(report["summary"]["siblings"]) == set(SIBLINGS)
    assert set(report["summary"]["verdict"]) == {"adding raises", "subtracting lowers", "random does neither"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one pair each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=1, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="few steps and examples: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    seeds, n, steps = (options.seeds[:1], 8, (2, 1)) if options.fast else (options.seeds, 128, (SFT.steps, GRPO.steps))
    found = in_processes(pair, [(seed, n, steps) for seed in seeds], options.workers)
    # At scale 0 a vector changes nothing: the siblings as they are.
    model, _ = load(zoo.get("tiny-base"))
    nothing = {"v": TaskVector.between(model, copy.deepcopy(model))}
    before = siblings(n, nothing, {"before": ("v", 0.0)})
    pairs = dict(zip(seeds, found, strict=True))
    summary = summarised(before, pairs)
    each = {
        seed: {"norm": p["norm"], "SFT": p["trained"]["SFT"]["sums"].mean, "GRPO": p["trained"]["GRPO"]["sums"].mean,
               "siblings": {s: {arm: [found["sums"].mean, found["skills"]] for arm, found in row.items()}
                            for s, row in p["siblings"].items()}}
        for seed, p in pairs.items()
    }  # fmt: skip
    report = {"n": n, "steps": steps, "summary": summary, "pairs": each}
    path = write(options.out, "reasoning_vectors", report, picture(summary), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
