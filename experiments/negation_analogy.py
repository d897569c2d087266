"""Does a task vector taken the other way round unlearn its task, and do analogies of vectors hold (arXiv:2212.04089)?

    python experiments/negation_analogy.py            # trains what it needs of three tiny families into the cache
    python experiments/negation_analogy.py --fast     # on the shipped family, a check that it runs

Negation: base - scale * d for vectors of skills that the base has. The scale is the largest that leaves the other
skills 95 % of their accuracy on validation examples. Control: random vectors whose tensors have the norms of d's, their
scale chosen by the same rule.

Analogy: A is to B as C is to D, d_D = d_C + (d_B - d_A), measured on D's test examples without any of D's training.
Two quadruples: how an answer is written (at once or step by step) by the length of the sum, and copying, reversing and
sorting. To mean anything the analogy has to beat its parts: d_B alone, d_C alone and their sum. Each candidate has its
scale chosen on validation examples of D.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from arena import SKILLS, Arena, in_processes, mean_interval, rounded, write
from build_zoo import build_family
from matplotlib.figure import Figure

from analysis.geometry import geometry
from analysis.plots import HATCHES
from surgery.tasks import TASKS, Example, Task
from surgery.weights.vector import TaskVector
from surgery.zoo import TINY

SIZES = {"validation": 64, "test": 128}
TARGETS = ("reverse", "sort", "copy")
SCALES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
RETAINED = 0.95
QUADRUPLES = {
    "form by length": ("direct_short", "chain_short", "direct_long", "chain_long"),
    "order by source": ("copy", "reverse", "sort", "descend"),
}
ANALOGY_SCALES = (0.5, 1.0, 1.5)


def _with_terms(task: str, terms: int) -> Callable[[Random], Example]:
    """The examples of a task on sums that have this many terms."""

    def make(rng: Random) -> Example:
        while True:
            one = TASKS[task].example(rng)
            if len(one.prompt) == 2 * terms + 2:
                return one

    return make


for _form in ("direct", "chain"):
    for _length, _terms in (("short", 3), ("long", 6)):
        _name = f"{_form}_{_length}"
        TASKS.register(_name)(Task(_name, f"{_terms} digits, {_form}", _with_terms(_form, _terms)))


def random_like(vector: TaskVector, arena: Arena, seed: int) -> TaskVector:
    """A random vector, each tensor as long as the vector's."""
    noisy, generator = copy.deepcopy(arena.base), torch.Generator().manual_seed(seed)
    state = noisy.state_dict()
    for name in vector.names:
        noise = torch.randn(state[name].shape, generator=generator)
        state[name] += noise * (vector.norm(name) / noise.norm())
    return TaskVector.between(arena.path("base"), noisy)


def score(arena: Arena, vector: TaskVector, scale: float, tasks: Sequence[str], part: str) -> dict[str, float]:
    """Accuracies of the base with scale * vector."""
    with vector.applied(arena.base, scale):
        return arena.accuracies(tasks, part)


def negate(arena: Arena, vector: TaskVector, target: str, scales: Sequence[float]) -> dict[str, Any]:
    """Target and the other skills at every scale, and the scale that the rule chooses on validation examples."""
    others = [s for s in SKILLS if s != target]
    curve: dict[str, list[float]] = {"target": [], "others": [], "likelihood": []}
    chosen, floor = 0.0, 0.0
    for scale in scales:
        with vector.applied(arena.base, -scale):
            kept = float(np.mean(list(arena.accuracies(others, "validation").values())))
            test = arena.accuracies([target, *others], "test")
            curve["likelihood"].append(arena.likelihoods([target], "test")[target])
        floor = floor or RETAINED * kept  # the first scale is 0
        if kept >= floor:
            chosen = scale
        curve["target"].append(test[target])
        curve["others"].append(float(np.mean([test[o] for o in others])))
    at = list(scales).index(chosen)
    return {**curve, "scale": chosen, "chosen": {name: values[at] for name, values in curve.items()},
            "before": {name: values[0] for name, values in curve.items()}}  # fmt: skip


def negation(folder: Path, seed: int, targets: Sequence[str], sizes: dict, scales: Sequence[float], controls: int):
    """One family: {target: {"vector": ..., "random": [...]}}."""
    arena, found = Arena(folder, sizes, seed), {}
    for target in targets:
        vector = TaskVector.between(arena.path("base"), arena.path(target))
        found[target] = {
            "vector": negate(arena, vector, target, scales),
            "random": [negate(arena, random_like(vector, arena, i), target, scales) for i in range(controls)],
            "norm": vector.norm(),
        }
    return found


def analogy(folder: Path, seed: int, quadruple: Sequence[str], sizes: dict, scales: Sequence[float]) -> dict[str, Any]:
    """One family: accuracy on D of the base, of D's own fine-tuning, and of candidates that never saw D."""
    arena = Arena(folder, sizes, seed)
    names = list(dict.fromkeys(quadruple))
    vectors = {n: TaskVector.between(arena.path("base"), arena.path(n)) for n in names}
    a, b, c, d = (vectors[n] for n in quadruple)
    target = quadruple[3]
    candidates = {"C + (B - A)": TaskVector.analogy(a, b, c), "B": b, "C": c, "B + C": b + c}
    lines: dict[str, Any] = {"base": {"accuracy": arena.accuracies([target], "test")[target]}}
    for name, vector in candidates.items():
        tried = {s: score(arena, vector, s, [target], "validation")[target] for s in scales}
        chosen = min(tried, key=lambda s: (-tried[s], abs(s - 1)))
        plain, tuned = (score(arena, vector, s, [target], "test")[target] for s in (1.0, chosen))
        lines[name] = {"accuracy": tuned, "scale": chosen, "accuracy at 1": plain}
    lines["D"] = {"accuracy": score(arena, d, 1.0, [target], "test")[target]}
    cosine = geometry(arena.path("base"), {"D": d, **candidates}, threads=1).cosine()[0]
    for i, name in enumerate(candidates, 1):
        lines[name]["cosine with D"] = float(np.ravel(cosine)[i])
    return lines


def negation_summary(families: Sequence[dict]) -> dict[str, Any]:
    """Each target over the families, and the mean of the targets: the vector and the random ones, at chosen scales."""

    def line(targets: Sequence[str]) -> dict[str, Any]:
        def over(value: Callable[[dict], float]) -> dict[str, Any]:
            return mean_interval([float(np.mean([value(family[t]) for t in targets])) for family in families])

        rows = [family[t] for family in families for t in targets]
        return {
            "before": over(lambda r: r["vector"]["before"]["target"]),
            "negated": over(lambda r: r["vector"]["chosen"]["target"]),
            "others before": over(lambda r: r["vector"]["before"]["others"]),
            "others": over(lambda r: r["vector"]["chosen"]["others"]),
            "random": over(lambda r: control(r, "target")),
            "negated - random": over(lambda r: r["vector"]["chosen"]["target"] - control(r, "target")),
            "likelihood, negated - random": over(
                lambda r: r["vector"]["chosen"]["likelihood"] - control(r, "likelihood")
            ),
            "scales": [r["vector"]["scale"] for r in rows],
            "random_scales": [c["scale"] for r in rows for c in r["random"]],
        }

    targets = list(families[0])
    return {"targets": {target: line([target]) for target in targets}, "mean": line(targets)}


def control(row: dict, what: str) -> float:
    """Mean over the random vectors at the scales that the rule chose for them."""
    return float(np.mean([r["chosen"][what] for r in row["random"]]))


def analogy_summary(families: Sequence[dict]) -> dict[str, Any]:
    """Over families: every candidate's accuracy, and the analogy against its parts on the same examples."""
    found: dict[str, Any] = {name: mean_interval([f[name]["accuracy"] for f in families]) for name in families[0]}
    ours = "C + (B - A)"
    parts = [name for name in families[0] if name not in ("D", ours)]
    found["differences"] = {
        f"{ours}, against {part}": mean_interval([f[ours]["accuracy"] - f[part]["accuracy"] for f in families])
        for part in parts
    }
    found["cosine with D"] = {
        name: mean_interval([f[name]["cosine with D"] for f in families]) for name in (ours, "B", "C", "B + C")
    }
    return found


def picture(families: Sequence[dict], scales: Sequence[float], analogies: dict[str, dict]) -> Figure:
    """Accuracy by scale of negation, the target in black and the others grey; bars for the analogies."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    rows = [row for family in families for row in family.values()]
    chance = [control for row in rows for control in row["random"]]
    lines = {
        "target, negated vector": ("target", [r["vector"] for r in rows], "k-o", "black"),
        "other skills, negated vector": ("others", [r["vector"] for r in rows], "k--s", "white"),
        "target, random vector": ("target", chance, "-o", "0.6"),
        "other skills, random vector": ("others", chance, "--s", "white"),
    }
    for label, (what, curves, style, face) in lines.items():
        mean = np.mean([c[what] for c in curves], axis=0)
        grey = {} if "negated" in label else {"color": "0.6"}
        left.plot(scales, mean, style, label=label, markerfacecolor=face, markersize=5, **grey)
    left.set(xlabel="scale of what is subtracted", ylabel="accuracy", ylim=(0, 1.3), title="Negation")
    left.legend(frameon=False, fontsize="small", loc="upper right", ncols=2)
    names = ["base", "C", "B", "B + C", "C + (B - A)", "D"]
    width = 0.8 / len(analogies)
    for i, (quadruple, found) in enumerate(analogies.items()):
        a, b, c, d = QUADRUPLES.get(quadruple, ("A", "B", "C", "D"))
        places = np.arange(len(names)) + (i - (len(analogies) - 1) / 2) * width
        means = [found[n]["mean"] for n in names]
        label = f"{a} : {b} = {c} : {d}".replace("_", " ")
        right.bar(places, means, width, hatch=HATCHES[i], color="white" if i else "0.7", edgecolor="black", label=label)
        if found["base"]["low"] is not None:
            spread = [[max(0, found[n]["mean"] - found[n]["low"]) for n in names],
                      [max(0, found[n]["high"] - found[n]["mean"]) for n in names]]  # fmt: skip
            right.errorbar(places, means, spread, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
    right.set_xticks(range(len(names)), ["base", "d of C", "d of B", "d of\nB + C", "d of\nC + (B - A)", "d of D"])
    right.set(ylim=(0, 1.4), ylabel="accuracy on D", title="Analogy")
    right.legend(frameon=False, fontsize="small", loc="upper left")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def markdown(summary: dict[str, Any]) -> str:
    """Negation by target, and the analogies with the candidates they have to beat."""

    def of(m: dict[str, Any]) -> str:
        ends = [m["mean"]] if m["low"] is None else [m["mean"], m["low"], m["high"]]
        mean, *interval = [f"{round(end, 2) + 0.0:.2f}" for end in ends]  # no "-0.00"
        return mean + (f" [{', '.join(interval)}]" if interval else "")

    heads = ["vector of", "target before", "target negated", "other skills before", "other skills negated", "scales",
             "target, random vector", "scales, random"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for target, row in {**summary["negation"]["targets"], "mean": summary["negation"]["mean"]}.items():
        cells = [target, *(of(row[k]) for k in ("before", "negated", "others before", "others")), spread(row["scales"])]
        lines.append("| " + " | ".join([*cells, of(row["random"]), spread(row["random_scales"])]) + " |")
    candidates = ["base", "C", "B", "B + C", "C + (B - A)", "D"]
    lines += ["", "| A : B = C : D | " + " | ".join(candidates) + " | analogy - B | cosine with D: analogy, B |"]
    lines.append("|---" * (len(candidates) + 3) + "|")
    for name, found in summary["analogy"].items():
        cosine = found["cosine with D"]
        cells = [*(of(found[c]) for c in candidates), of(found["differences"]["C + (B - A), against B"])]
        cells.append(f"{cosine['C + (B - A)']['mean']:.2f}, {cosine['B']['mean']:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(scales: Sequence[float]) -> str:
    """Lowest to highest."""
    return f"{min(scales):g} to {max(scales):g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="families, trained where missing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="few examples on the shipped family: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    targets: tuple[str, ...]
    scales: tuple[float, ...]
    if options.fast:
        targets, sizes, scales, controls, workers = ("chain",), {"validation": 8, "test": 16}, (0.0, 1.0), 1, 1
        # An analogy between a pair and itself gives D back: the arithmetic, checked.
        families, quadruples = {0: TINY}, {"identity": ("shift", "chain", "shift", "chain")}
    else:
        targets, sizes, scales, controls, workers = TARGETS, SIZES, SCALES, 1, options.workers
        quadruples = QUADRUPLES
        needed = dict.fromkeys([*targets, *(task for q in quadruples.values() for task in q)])
        built = {seed: build_family(None, list(needed), seed, workers=workers) for seed in options.seeds}
        families = {seed: members["tiny-base"].parent for seed, members in built.items()}
    negated = in_processes(
        negation, [(folder, seed, targets, sizes, scales, controls) for seed, folder in families.items()], workers
    )
    jobs = [(folder, seed, q, sizes, ANALOGY_SCALES if not options.fast else (1.0,))
            for q in quadruples.values() for seed, folder in families.items()]  # fmt: skip
    rows = in_processes(analogy, jobs, workers)
    each = {name: rows[i * len(families) : (i + 1) * len(families)] for i, name in enumerate(quadruples)}
    found = {"negation": negation_summary(negated), "analogy": {n: analogy_summary(r) for n, r in each.items()}}
    report = {"sizes": sizes, "scales": list(scales), "retained": RETAINED, "quadruples": quadruples,
              "summary": found, "negation": negated, "analogy": each}  # fmt: skip
    path = write(options.out, "negation_analogy", report, picture(negated, scales, found["analogy"]), began)
    print(markdown(rounded(found)))
    print(path)


if __name__ == "__main__":
    main()
