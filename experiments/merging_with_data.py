"""Does data help to merge? Fisher, RegMean, AdaMerging and greedy soup against plain averages and task arithmetic.

    python experiments/merging_with_data.py           # on the embedded tiny family, 5 to 8 minutes on one core
    python experiments/merging_with_data.py --fast    # a check that it runs, under a minute
    python experiments/merging_with_data.py --family DIR --out DIR

Every merge of three of the family's fine-tunings is scored on their tasks and on the skills of the base that no
fine-tuning was trained on. What each method may see (a column of the result): nothing; texts (256 examples a task, as
its fine-tuning had them); inputs only (256 prompts a task, answered by its fine-tuning); or a held-out score (64
examples a task). Prompts for these and for the figures are different. RegMean 1.0, which shrinks nothing off the
diagonal, has a ridge of 1e-4 (of the mean of the diagonal): the first layer reads fewer different tokens than it has
inputs, and nothing else decides the rest. Writes merging_with_data.json and merging_with_data.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from analysis.evaluate import accuracy, generate, load, prompt_ids
from analysis.results import Result, concatenate
from surgery.tasks import TASKS, Example
from surgery.weights.merge import merge_in_memory
from surgery.weights.with_data import (
    adamerging,
    fisher_diagonal,
    fisher_merge,
    greedy_soup,
    input_grams,
    loaded,
    regmean_merge,
    state_of,
    tune,
)
from surgery.weights.with_data.space import with_values
from surgery.zoo import TINY

TUNED = ("chain", "rotate", "shift")
SKILLS = ("facts", "copy", "reverse", "sort")
SIZES = {"calibration": 256, "held_out": 64, "test": 200}
State = dict[str, Tensor]
Merged = tuple[State, dict]
"""Weights, and what the method settled on."""


class Family:
    """A base, fine-tunings of it, and disjoint examples of every task."""

    def __init__(self, folder: Path, sizes: dict[str, int]) -> None:
        self.folder = folder
        self.base, self.tokenizer = load(folder / "tiny-base")
        self.tuned = {name: load(folder / f"tiny-{name}")[0] for name in TUNED}
        self.examples: dict[str, dict[str, list[Example]]] = {part: {} for part in sizes}
        for name in (*self.tuned, *SKILLS):
            # There are only 200 facts.
            total = 150 if name == "facts" else sum(sizes.values())
            drawn = TASKS.lookup(name).examples(total, seed=11)
            for part, size in sizes.items():
                count = size * total // sum(sizes.values())
                self.examples[part][name], drawn = drawn[:count], drawn[count:]

    def score(self, state: State, part: str, tasks: Sequence[str]) -> Result:
        """Whether the model with weights `state` answers each example of `tasks` rightly; `task` is a column."""
        found = []
        with loaded(self.base, state) as model:
            for name in tasks:
                examples, correct = self.examples[part][name], TASKS[name].correct
                found.append(accuracy(model, self.tokenizer, examples, correct, batch_size=256, max_new_tokens=48))
        return concatenate(found, task=list(tasks))

    def held_out(self, state: State) -> float:
        """What the methods that may choose, choose by: mean accuracy on the held-out examples of the tasks."""
        return float(self.score(state, "held_out", list(self.tuned)).mean)

    def batches(self, name: str, *, answers: str, size: int = 32) -> list[dict[str, Tensor]]:
        """Calibration texts of a task, of which responses count; `answers`: the "right" ones or the model's "own"."""
        examples = self.examples["calibration"][name]
        responses = [e.response for e in examples]
        if answers == "own":
            prompts = [e.prompt for e in examples]
            responses = generate(self.tuned[name], self.tokenizer, prompts, batch_size=256, max_new_tokens=48)
        rows = []
        for example, response in zip(examples, responses, strict=True):
            prompt = prompt_ids(self.tokenizer, example.prompt, chat=False)
            answer = self.tokenizer(response, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
            rows.append((prompt, answer))
        return [self._batch(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _batch(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        width = max(len(p) + len(a) for p, a in rows)
        batch = {"input_ids": torch.full((len(rows), width), self.tokenizer.pad_token_id)}
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            batch["input_ids"][i, :end] = torch.tensor(prompt + answer)
            batch["attention_mask"][i, :end] = 1
            batch["labels"][i, len(prompt) : end] = torch.tensor(answer)
        return batch


def arithmetic(family: Family) -> dict:
    """The recipe of base + scale * sum_i weight_i (tuned_i - base), scale and weights 1."""
    models = [{"model": str(family.folder / f"tiny-{name}"), "parameters": {"weight": 1.0}} for name in family.tuned]
    base = str(family.folder / "tiny-base")
    return {"method": "task_arithmetic", "base": base, "models": models, "parameters": {"scale": 1.0}}


def merges(family: Family, fast: bool) -> dict[str, tuple[str, Callable[[], Merged]]]:
    """Every method: what it sees, and how to run it."""
    tuned, names = list(family.tuned.values()), list(family.tuned)
    right = {name: family.batches(name, answers="right") for name in names}
    own = [family.batches(name, answers="own") for name in names]
    steps, trials = (10, 4) if fast else (300, 30)
    recipe = arithmetic(family)

    def fisher(labels) -> Merged:
        found = [fisher_diagonal(family.tuned[n], right[n], labels=labels) for n in names]
        return fisher_merge(tuned, found), {}

    def regmean(off_diagonal: float, ridge: float = 0.0) -> Merged:
        grams = [input_grams(family.tuned[n], right[n]) for n in names]
        return regmean_merge(tuned, grams, off_diagonal=off_diagonal, ridge=ridge), {"off_diagonal": off_diagonal}

    def ada(per) -> Merged:
        found = adamerging(family.base, tuned, own, per=per, lr=1e-2, steps=steps)
        learnt = {group: [round(x, 3) for x in lam.tolist()] for group, lam in found.coefficients.items()}
        return found.state_dict, {"coefficients": learnt, "entropy": [found.history[0], found.history[-1]]}

    def soup() -> Merged:
        found = greedy_soup(tuned, family.held_out)
        return found.state_dict, {"members": [names[i] for i in found.members], "held_out": found.score}

    def scaled(scale: float) -> Merged:
        return merge_in_memory(with_values(recipe, {"parameters.scale": scale})), {"scale": scale}

    def searched(*places: str) -> Merged:
        found = tune(recipe, dict.fromkeys(places, (0.0, 1.0)), family.held_out, trials=trials)
        return merge_in_memory(found.best_recipe), {"found": found.best_parameters, "held_out": found.best_score}

    weights = [f"models[{i}].parameters.weight" for i in range(len(names))]
    return {
        "uniform soup": ("nothing", lambda: scaled(1 / len(names))),
        "task arithmetic 0.3": ("nothing", lambda: scaled(0.3)),
        "task arithmetic 0.5": ("nothing", lambda: scaled(0.5)),
        "Fisher, sampled": ("texts", lambda: fisher("sampled")),
        "Fisher, given": ("texts", lambda: fisher("given")),
        "RegMean 0.9": ("texts", lambda: regmean(0.9)),
        "RegMean 1.0": ("texts", lambda: regmean(1.0, ridge=1e-4)),
        "AdaMerging, task": ("inputs", lambda: ada("task")),
        "AdaMerging, layer": ("inputs", lambda: ada("layer")),
        "greedy soup": ("held-out score", soup),
        "arithmetic, scale tuned": ("held-out score", lambda: searched("parameters.scale")),
        "arithmetic, weights tuned": ("held-out score", lambda: searched(*weights)),
    }


def measure(family: Family, state: State, sees: str) -> tuple[Result, dict]:
    """Answers on the test prompts of the tasks, and one line of the report."""
    tasks, skills = (family.score(state, "test", names) for names in (list(family.tuned), SKILLS))
    means = {name: float(part.mean) for name, part in {**tasks.by("task"), **skills.by("task")}.items()}
    low, high = map(float, tasks.interval())
    line = {"sees": sees, "accuracy": means, "tasks": float(tasks.mean), "interval": [low, high]}
    return tasks, {**line, "skills": sum(means[name] for name in SKILLS) / len(SKILLS)}


def run(family: Family, fast: bool) -> dict[str, dict]:
    """All models and merges: {name: line}; each merge is tested against the uniform soup on the same prompts."""
    lines = {"base": measure(family, state_of(family.base), "nothing")[1]}
    for name, model in family.tuned.items():
        lines[f"tuned on {name}"] = measure(family, state_of(model), "nothing")[1]
    uniform: Result | None = None
    for name, (sees, merge) in merges(family, fast).items():
        start = time.perf_counter()
        state, details = merge()
        seconds = round(time.perf_counter() - start, 2)
        result, line = measure(family, state, sees)
        uniform = uniform or result
        test = result.paired_test(uniform)
        line["against_uniform"] = {"difference": float(test.difference), "p_value": float(test.p_value)}
        lines[name] = {**line, "seconds": seconds, **details}
        print(f"{name:26s} tasks {line['tasks']:.3f}, skills {line['skills']:.3f}", flush=True)
    return lines


def markdown(results: dict[str, dict]) -> str:
    """Models in rows, tasks in columns, as Markdown."""
    tasks = list(results["base"]["accuracy"])
    heads = ["model", "sees", *tasks, "tasks", "95 %", "p", "skills", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, r in results.items():
        cells = [name, r["sees"], *(f"{r['accuracy'][t]:.2f}" for t in tasks), f"{r['tasks']:.3f}"]
        cells.append("{:.3f} to {:.3f}".format(*r["interval"]))
        cells.append(f"{r['against_uniform']['p_value']:.4f}" if "against_uniform" in r else "")
        lines.append("| " + " | ".join([*cells, f"{r['skills']:.3f}", str(r.get("seconds", ""))]) + " |")
    return "\n".join(lines)


def figure(results: dict[str, dict]):
    """Bars of mean accuracy on the tasks with 95 % intervals, crosses on the base's skills; hatched by what is seen."""
    from matplotlib.figure import Figure

    hatches = {"nothing": "", "texts": "//", "inputs": "..", "held-out score": "xx"}
    merged = {n: r for n, r in results.items() if n != "base" and not n.startswith("tuned on")}
    chart = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = chart.add_subplot()
    for sees, hatch in hatches.items():
        mine = [(i, r["tasks"]) for i, r in enumerate(merged.values()) if r["sees"] == sees]
        at, heights = zip(*mine, strict=True)
        axes.barh(at, heights, color="0.85", edgecolor="black", hatch=hatch, label=f"tasks; sees {sees}")
    for i, r in enumerate(merged.values()):
        axes.plot(r["interval"], [i, i], color="black", linewidth=1)
    skills = [r["skills"] for r in merged.values()]
    axes.plot(skills, range(len(merged)), "kx", label="skills of the base")
    axes.axvline(results["base"]["tasks"], color="black", linestyle=":", label="tasks, base")
    experts = [r["accuracy"][n.removeprefix("tuned on ")] for n, r in results.items() if n.startswith("tuned on")]
    axes.axvline(sum(experts) / len(experts), color="black", linestyle="--", label="tasks, each by its own fine-tuning")
    axes.set_yticks(range(len(merged)), list(merged))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.03)
    axes.set_xlabel("accuracy on test prompts")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return chart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", type=Path, default=TINY, help="folder with tiny-base, -chain, -rotate and -shift")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--fast", action="store_true", help="few examples and steps: only shows that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {part: n // 8 for part, n in SIZES.items()} if options.fast else SIZES
    start = time.perf_counter()
    results = run(Family(options.family, sizes), options.fast)
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"sizes": sizes, "seconds": round(time.perf_counter() - start), "results": results}
    (options.out / "merging_with_data.json").write_text(json.dumps(report, indent=1) + "\n")
    figure(results).savefig(options.out / "merging_with_data.png", dpi=120)
    print(markdown(results))
    print(f"{report['seconds']} s; {options.out / 'merging_with_data.json'}")


if __name__ == "__main__":
    main()
