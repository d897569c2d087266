"""Is a skill that fine-tuning took away still there (the study of wrappers, Jain et al., arXiv:2311.12786)?

    python experiments/wrapper_study.py            # two learning rates, five seeds
    python experiments/wrapper_study.py --fast     # a few steps, a check that it runs

tiny-base sorts: `s dbca=` is answered `#abcd`. SFT on such prompts, answered by a copy (`#dbca`), goes on until 0.95 of
validation strings are copied; asked every 10 steps. Two learning rates, about one and two orders of magnitude below the
1.5e-3 of pre-training: 1e-4 ("small") and 1e-5 ("very small"). The control never sorted: another base, trained by the
recipe of tiny-base but with the prompts of sorting (`s`) and of descending order (`d`) answered by a copy throughout.
It answers `s` as the tuned models do, and the rest as tiny-base does. There is one of it, and five seeds of what
follows; strings have 4 to 6 letters of which the first isn't the least, so that both answers differ from the start.

* Probe: linear (LDA, cross-validated) on the stream behind each layer at `#`, for the first letter of the sorted
  string, four letters equally often. The layer is the one at which tiny-base is read best (the last of several).
  Besides, a control task: a random letter for each first letter of the string.
* Prune: the 1 to 30 neurons (of 1024) with the largest gradient times weight for the loss of sorting, against as many
  random ones. Of either the best of all numbers tried counts.
* Revival: steps of SFT on sorted answers to an accuracy of 0.9, asked every 10 steps; runs that do not reach it are
  censored at 100. The control starts from its own copies.

Fixed before these three were scored: all of the above. In a trial (one seed) only the steps that copies take were
looked at.

Held, each at one learning rate. Probe: accuracy minus the control's is above 0 with its interval over seeds and
prompts. Prune: accuracy at sorting is at least 0.5, and its difference from random pruning above 0 with its interval
(less than 0.5: in part). Revival: the median number of steps is at most a third of the control's (or of the step at
which that is censored), and the chance to be there sooner above 1/2 with its interval (only this: in part).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from arena import in_processes, mean_interval, one_thread, rounded, write
from build_zoo import BOS, CHARACTERS, EOS, LARGE, MEMBERS, PAD, FamilyRows, character_tokenizer
from long_sums import ADAM, difference, told, verdict
from matplotlib.figure import Figure

from analysis.evaluate import evaluate
from analysis.probes import probe_model
from analysis.pruning import lessons, neuron_scores, pruned, random_order, worst
from analysis.results import Result, stack
from analysis.revival import Revival, revival
from surgery import zoo
from surgery.tasks import make_task
from surgery.training import train
from surgery.training.data import ListRows
from surgery.training.run import open_model

RATES = {"small": 1e-4, "very small": 1e-5}
NEVER = ("sort", "descend")
"""Tasks whose prompts the control saw answered by copies only."""
SETTINGS: dict[str, Any] = {
    "pre-training": [200, 1200], "strings": 1000, "rows": 16, "steps": 400, "every": 10, "enough": 0.95,
    "validation": 50, "test": 100, "probe": 60, "scored": 100, "pruned": [0, 1, 3, 5, 10, 15, 20, 30],
    "revival lr": 1e-4, "revival steps": 100, "revival test": 50, "target": 0.9,
}  # fmt: skip
LETTERS = "abcd"
"""First letters of sorted strings that the probe tells apart."""
LONGEST = 8


# ---- strings


def strings(seed: int) -> Iterator[dict[str, Any]]:
    """Endless different strings to be sorted, of which the first letter isn't the least."""
    known, task = set(), make_task("sort", length=[4, 6])
    for batch in range(1000):
        for example in task.examples(500, 1000 * seed + batch):
            row = example.row("sort")
            if row["prompt"] not in known and row["prompt"][2] > row["answer"][0]:
                known.add(row["prompt"])
                yield row


def drawn(n: int, seed: int, skip: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The first `n` of them that are not in `skip`."""
    known = {row["prompt"] for row in skip}
    fresh = (row for row in strings(seed) if row["prompt"] not in known)
    return [next(fresh) for _ in range(n)]


def copied(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same prompts with the string itself as the answer."""
    texts = [row["prompt"][2:-1] for row in rows]
    return [{**row, "answer": t, "completion": f"#{t}"} for row, t in zip(rows, texts, strict=True)]


def read_rows(each: int) -> list[dict[str, Any]]:
    """`each` strings of every first letter, the same for all models and used for nothing else but the probe."""
    found: dict[str, list[dict[str, Any]]] = {letter: [] for letter in LETTERS}
    for row in strings(7):
        part = found.get(row["answer"][0])
        if part is not None and len(part) < each:
            part.append(row)
        if all(len(part) == each for part in found.values()):
            break
    return [row for part in found.values() for row in part]


# ---- models


class NeverSorted(FamilyRows):
    """A stage of tiny-base's training in which nothing is sorted."""

    def row(self, index: int) -> dict:
        """Row `index`: its answer is a copy where tiny-base's would be sorted."""
        row = super().row(index)
        return {**row, "completion": f"#{row['prompt'][2:-1]}"} if row["task"] in NEVER else row


def control(folder: Path, steps: Sequence[int], seed: int = 1) -> None:
    """Trains the control into a folder, where there is none yet."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").exists():
        return
    one_thread()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS), pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, dtype="float32", **LARGE
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    model, tokenizer = LlamaForCausalLM(config), character_tokenizer()
    for i, (stage, most) in enumerate(zip(MEMBERS["base"].stages, steps, strict=True)):
        shorter = replace(stage, steps=most)
        train(
            model, tokenizer, objective="sft", data=NeverSorted(shorter, 1000 * seed + i), steps=most, seed=i,
            batch={"rows": stage.batch},
            optimizer={"lr": stage.lr, "betas": (0.9, 0.98), "weight_decay": 0.01, "warmup": min(50, most / 10),
                       "final": 0.1},
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Enough(Exception):
    """Ends a run that has learned its answers."""


def hidden(lr: float, rows: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], seed: int,
           settings: Mapping[str, Any]) -> tuple[Any, Any, int]:  # fmt: skip
    """tiny-base, trained to copy what it sorted; its tokenizer; the steps taken."""
    model, tokenizer = open_model(zoo.get("tiny-base"))
    taken = 0

    def on_step(step: int, found: Mapping[str, float]) -> None:
        nonlocal taken
        taken = step
        if step and found.get("eval/accuracy", 0.0) >= settings["enough"]:
            raise Enough

    with suppress(Enough):
        train(
            model, tokenizer, objective="sft", data=ListRows(copied(rows)), seed=seed, steps=settings["steps"],
            batch={"rows": settings["rows"]}, optimizer={"lr": lr, "shape": "constant", **ADAM, "warmup": 4},
            evaluate={"every": settings["every"], "data": ListRows(copied(held_out)), "n": len(held_out),
                      "max_new_tokens": LONGEST},
            on_step=on_step,
        )  # fmt: skip
    return model, tokenizer, taken


# ---- measures


def answers(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Result]:
    """1 where the greedy answer is sorted, and where it is a copy."""
    found = evaluate(model, rows, tokenizer=tokenizer, max_new_tokens=LONGEST)
    same = [text == row["completion"] for text, row in zip(found.columns["completion"], copied(rows), strict=True)]
    return {"sorted": Result.of(found.values, found.labels), "copied": Result.of(same, found.labels)}


def readable(model: Any, tokenizer: Any, each: int) -> dict[str, Result]:
    """Whether each layer's probe reads the first letter of the sorted string, (prompt, layer), and a control task."""
    rows = read_rows(each)
    found = probe_model(
        model, [row["prompt"] + "#" for row in rows], [row["answer"][0] for row in rows], tokenizer=tokenizer,
        kind="lda", control=[row["prompt"][2] for row in rows],
    )  # fmt: skip
    assert found.control is not None
    axes = {"example": range(len(rows)), "layer": found.layers}
    return {"probe": Result(found.accuracy.values, axes), "control task": Result(found.control.values, axes)}


def curves(model: Any, tokenizer: Any, seed: int, rows: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]],
           counts: Sequence[int]) -> dict[str, dict[str, Result]]:  # fmt: skip
    """Both answers, (example, pruned), with so many neurons pruned: the worst for sorting, or random ones."""
    scores = neuron_scores(model, lessons(tokenizer, rows))
    found = {}
    for kind, order in {"worst": worst(scores), "random": random_order(scores, seed)}.items():
        by_count: dict[str, dict[int, Result]] = {"sorted": {}, "copied": {}}
        for k in counts:
            with pruned(model, order[:k]) as less:
                for answer, result in answers(less, tokenizer, test).items():
                    by_count[answer][k] = result
        found[kind] = {answer: stack(each, "pruned") for answer, each in by_count.items()}
    return found


def studied(seed: int, folder: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that is measured of one seed, by learning rate."""
    test = drawn(settings["test"], 99)
    held_out = drawn(settings["validation"], 98, test)
    rows = drawn(settings["strings"], seed, [*test, *held_out])
    found: dict[str, Any] = {"tuned": {}}
    models: dict[str, Any] = {}
    for name, lr in RATES.items():
        model, tokenizer, steps = hidden(lr, rows, held_out, seed, settings)
        models[name] = model
        found["tuned"][name] = {
            "steps": steps, **readable(model, tokenizer, settings["probe"]),
            "prune": curves(model, tokenizer, seed, rows[: settings["scored"]], test, settings["pruned"]),
        }  # fmt: skip
    models["never sorted"], tokenizer = open_model(folder)
    found["revival"] = revival(
        models, tokenizer, rows, test[: settings["revival test"]], lrs=[settings["revival lr"]],
        steps=settings["revival steps"], target=settings["target"], every=settings["every"], seeds=[seed],
        batch_rows=settings["rows"], max_new_tokens=LONGEST, optimizer={**ADAM, "warmup": 4},
    )  # fmt: skip
    return found


def compared(folder: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """tiny-base and the control, as they are."""
    test, found = drawn(settings["test"], 99), {}
    places: dict[str, str | Path] = {"base": zoo.get("tiny-base"), "never sorted": folder}
    for name, place in places.items():
        model, tokenizer = open_model(place)
        found[name] = {**readable(model, tokenizer, settings["probe"]), **answers(model, tokenizer, test)}
    return found


# ---- what comes out


def layer_of(result: Result, layer: int) -> Result:
    """The examples at one layer."""
    return Result.of(result.values[:, layer], result.labels)


def best_of(curve: Result) -> Result:
    """With the number of neurons, at least one, that leaves the highest mean."""
    means = curve.values.mean(0)
    return Result.of(curve.values[:, 1 + int(means[1:].argmax())], range(len(curve)))


def joined(parts: Sequence[Revival]) -> Revival:
    """The runs of all seeds as one."""
    runs = [part.runs for part in parts]
    columns = {name: [x for run in runs for x in run.columns[name]] for name in runs[0].columns}
    labels = [label for run in runs for label in run.labels]
    axes = {"run": labels, "step": runs[0].axes["step"]}
    return Revival(Result(np.concatenate([run.values for run in runs]), axes, "accuracy", columns), parts[0].target)


def summarised(runs: Mapping[int, Mapping[str, Any]], references: Mapping[str, Any]) -> dict[str, Any]:
    """The three questions at each learning rate, and what the base and the control do."""
    of_base = references["base"]["probe"].mean
    layer = int(np.flatnonzero(of_base == of_base.max())[-1])
    again = joined([run["revival"] for run in runs.values()])
    rows = {row["model"]: row for row in again.summary()}
    summary: dict[str, Any] = {"layer": layer, "rates": {}, "references": {}}
    for name, found in references.items():
        words = {what: float(found[what].mean) for what in ("sorted", "copied")}
        words |= {what: found[what].mean.tolist() for what in ("probe", "control task")}
        summary["references"][name] = words
    summary["never sorted"] = rows["never sorted"]
    for name in RATES:
        tuned = {seed: run["tuned"][name] for seed, run in runs.items()}
        read = {seed: layer_of(t["probe"], layer) for seed, t in tuned.items()}
        never = layer_of(references["never sorted"]["probe"], layer)
        at_best = {
            kind: {s: best_of(t["prune"][kind]["sorted"]) for s, t in tuned.items()} for kind in ("worst", "random")
        }
        sooner = again.sooner(name, "never sorted")
        one: dict[str, Any] = {
            "steps": mean_interval([t["steps"] for t in tuned.values()]),
            "probe": mean_interval([float(r.mean) for r in read.values()]),
            "control task": mean_interval([float(t["control task"].mean[layer]) for t in tuned.values()]),
            "probe - never": difference(read, dict.fromkeys(read, never)),
            "layers": np.mean([t["probe"].mean for t in tuned.values()], axis=0).tolist(),
            "pruned": {kind: mean_interval([float(r.mean) for r in each.values()]) for kind, each in at_best.items()},
            "worst - random": difference(at_best["worst"], at_best["random"]),
            "curves": {
                f"{answer}, {kind}": np.mean([t["prune"][kind][answer].mean for t in tuned.values()], axis=0).tolist()
                for answer in ("sorted", "copied") for kind in ("worst", "random")
            },
            "revival": {
                **rows[name], "sooner": float(sooner.value), "low": float(sooner.low), "high": float(sooner.high),
            },
        }  # fmt: skip
        one["verdicts"] = {
            "probe": verdict(one["probe - never"]), "prune": of_pruning(one),
            "revival": of_revival(one["revival"], summary["never sorted"]),
        }  # fmt: skip
        summary["rates"][name] = one
    return summary


def of_pruning(found: Mapping[str, Any]) -> str:
    """As defined above."""
    said = verdict(found["worst - random"])
    return "in part" if said == "held" and found["pruned"]["worst"]["mean"] < 0.5 else said


def of_revival(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """As defined above."""
    if ours["runs"] < 2:
        return "not asked"
    if ours["low"] <= 0.5:
        return "the other way round" if ours["high"] < 0.5 else "no clear difference"
    steps, censored = ours["median_steps"], theirs["median_steps"] or theirs["censored_at"]
    return "held" if steps is not None and 3 * steps <= censored else "in part"


def steps_told(row: Mapping[str, Any]) -> str:
    """The median number of steps, or that it is censored."""
    return f"over {row['censored_at']}" if row["median_steps"] is None else f"{row['median_steps']:.0f}"


def markdown(summary: Mapping[str, Any]) -> str:
    """A line a question and learning rate."""
    lines = ["| question | rate | tuned | against | difference or chance to be sooner | verdict |", "|---" * 6 + "|"]
    never, layer = summary["references"]["never sorted"], summary["layer"]
    for name, one in summary["rates"].items():
        cells = [told(one["probe"]), f"{never['probe'][layer]:.2f}", told(one["probe - never"], sign="+")]
        lines.append("| " + " | ".join(["probe", name, *cells, one["verdicts"]["probe"]]) + " |")
    for name, one in summary["rates"].items():
        cells = [*(told(one["pruned"][kind]) for kind in ("worst", "random")), told(one["worst - random"], sign="+")]
        lines.append("| " + " | ".join(["prune", name, *cells, one["verdicts"]["prune"]]) + " |")
    for name, one in summary["rates"].items():
        ours, theirs = one["revival"], summary["never sorted"]
        cells = [steps_told(ours), steps_told(theirs), f"{ours['sooner']:.2f} [{ours['low']:.2f}, {ours['high']:.2f}]"]
        lines.append("| " + " | ".join(["revival", name, *cells, one["verdicts"]["revival"]]) + " |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any], counts: Sequence[int], again: Revival) -> Figure:
    """What is read by layer, what pruning brings back, what training does."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    read, prune, revive = figure.subplots(1, 3)
    styles = {"small": ("black", "-", "o"), "very small": ("black", "--", "s"), "never sorted": ("0.45", ":", "^")}
    base = summary["references"]["base"]["probe"]
    read.plot(range(len(base)), base, "-", color="0.7", marker="x", label="tiny-base")
    for name, (colour, dash, marker) in styles.items():
        label = f"rate {name}" if name in RATES else name
        look: dict[str, Any] = {"color": colour, "linestyle": dash, "marker": marker, "markerfacecolor": "white"}
        values = summary["rates"][name]["layers"] if name in RATES else summary["references"][name]["probe"]
        read.plot(range(len(values)), values, label=label, **look)
        part = again.runs.where([m == name for m in again.runs.columns["model"]]).values
        revive.plot(again.runs.axes["step"], part.mean(0), label=label, **look)
        revive.fill_between(again.runs.axes["step"], part.min(0), part.max(0), color=colour, alpha=0.12, lw=0)
        if name in RATES:
            lines = summary["rates"][name]["curves"]
            prune.plot(counts, lines["sorted, worst"], label=f"sorted, {label}", **look)
            prune.plot(counts, lines["copied, worst"], label=f"copied, {label}", **{**look, "color": "0.6"})
            prune.plot(counts, lines["sorted, random"], dash, color="black", lw=0.7, label=f"sorted, {label}, random")
    read.axhline(1 / len(LETTERS), color="0.8", lw=0.8, zorder=0)
    read.set(title="first sorted letter, read at #", xlabel="behind layer", ylabel="accuracy", ylim=(0, 1.03))
    read.set_xticks(range(len(base)))
    prune.set(
        title="answers with the worst neurons pruned", xlabel="neurons pruned", ylabel="share", ylim=(-0.03, 1.75)
    )
    prune.set_yticks([0, 0.25, 0.5, 0.75, 1])
    revive.axhline(again.target, color="0.8", lw=0.8, zorder=0)
    revive.set(title="SFT to sort again (band: all seeds)", xlabel="step", ylabel="sorted", ylim=(-0.03, 1.4))
    revive.set_yticks([0, 0.25, 0.5, 0.75, 1])
    for axis, place in ((read, "lower right"), (prune, "upper center"), (revive, "upper right")):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small", loc=place, ncols=1)
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: tiny-base sorts and can be read, with no neuron pruned both orders are the same model."""
    base = report["summary"]["references"]["base"]
    assert base["sorted"] > 0.9 and base["copied"] == 0 and max(base["probe"]) > 0.5, base
    for one in report["summary"]["rates"].values():
        for answer in ("sorted", "copied"):
            assert one["curves"][f"{answer}, worst"][0] == one["curves"][f"{answer}, random"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of strings and training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--control", type=Path, help="folder that keeps the control for another run")
    parser.add_argument("--workers", type=int, default=1, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="a few steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    settings, seeds, workers = SETTINGS, options.seeds, options.workers
    if options.fast:
        small = {"pre-training": [2, 2], "strings": 30, "rows": 4, "steps": 2, "every": 1, "validation": 8, "test": 10}
        small |= {
            "probe": 12,
            "scored": 8,
            "pruned": [0, 2],
            "revival steps": 2,
            "revival test": 8,
        }
        settings, seeds, workers = {**SETTINGS, **small}, [0], 1
    with TemporaryDirectory() as temporary:
        folder = options.control or Path(temporary) / "control"
        control(folder, settings["pre-training"])
        runs = in_processes(studied, [(seed, str(folder), settings) for seed in seeds], workers)
        references = compared(str(folder), settings)
    summary = summarised(dict(zip(seeds, runs, strict=True)), references)
    again = joined([run["revival"] for run in runs])
    report = {
        "rates": RATES, "settings": settings, "seeds": seeds, "summary": summary,
        "revival": {"step": again.runs.axes["step"], "steps": again.steps, **again.runs.columns,
                    "accuracy": again.runs.values.tolist()},
    }  # fmt: skip
    path = write(options.out, "wrapper_study", report, picture(summary, settings["pruned"], again), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
