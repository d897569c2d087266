"""Is the circuit that tracks entities the base's own, and is it that what fine-tuning improves (arXiv:2402.14811)?

    python experiments/entity_tracking.py            # the zoo's pair, five draws of prompts
    python experiments/entity_tracking.py --fast     # a few prompts, a check that it runs

tiny-boxes-base says in which box an entity was put (`b c in p;a in u;where c=` has the answer `#p`) and not where it
was moved to; tiny-boxes is its fine-tuning on moves. Asked for each draw of prompts:

* A circuit of up to nine heads is found in the *base* by path patching, on prompts without moves: A leads to the logits
  at the last token, B to A by queries at the last token, C to A by values at any token. Faithfulness: the accuracy of
  the circuit alone over that of the whole model (mean ablation by position of all other heads), in the base and in the
  tuned model, beside ten random circuits of its size.
* CMAP: on prompts with two moves, of which the asked entity made one, the tuned model's z of the circuit's heads is
  written into the base. Recovery of its accuracy by group, beside ten random groups of the same size.
* What the groups of the last token carry: z of the whole group is taken from a counterfactual prompt. `value`: the same
  places, other boxes (target: the box there); `place`: the asked entity stands at another place, among other boxes
  (target: the box at that place *here*). And which heads at the last token DCM chooses for each.

Held: (1) the circuit's faithfulness in the tuned model is above every random circuit's in all draws, and above 0.5 on
average; (2) the recovery of the whole circuit is above 0.5, with its interval above the random groups'; (3) by `value`
and `place` the group that does best differs (the paper: value fetchers carry values, transmitters positions).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from arena import mean_interval, one_thread, rounded, write
from matplotlib.figure import Figure

from analysis.circuits import Circuit, Step, discover, faithfulness
from analysis.component_masks import Desideratum, learn_mask
from analysis.cross_model import cmap
from analysis.metrics import accuracy, answer_tokens, prob
from analysis.plots import HATCHES
from surgery.activations import run
from surgery.models import Pair, encode
from surgery.tasks.tracking import BOXES, ENTITIES

STEPS = [
    Step("A", top=3),
    Step("B", top=3, receivers="A", component="q"),
    Step("C", top=3, receivers="A", component="v", position="all"),
]
FACTS, DRAWS, PROMPTS = 3, 10, 256


def story(rng: Random, moves: int = 0) -> dict[str, Any]:
    """Entities in boxes, some moved; with moves the asked entity made the last one but for its order at random."""
    names, free = rng.sample(ENTITIES, FACTS), rng.sample(BOXES, len(BOXES))
    boxes = [free.pop() for _ in names]
    asked = rng.randrange(FACTS)
    facts = [f"{n} in {b};" for n, b in zip(names, boxes, strict=True)]
    last = dict(zip(names, boxes, strict=True))
    moved = [asked, *rng.sample([i for i in range(FACTS) if i != asked], max(0, moves - 1))][:moves]
    rng.shuffle(moved)
    for i in moved:
        last[names[i]] = free.pop()
        facts.append(f"{names[i]} to {last[names[i]]};")
    return {
        "names": names,
        "boxes": boxes,
        "asked": asked,
        "prompt": text(facts, names[asked]),
        "answer": last[names[asked]],
    }


def text(facts: list[str], asked: str) -> str:
    """A prompt up to the token that the answer follows."""
    return "b " + "".join(facts) + f"where {asked}=#"


def without_moves(names: list[str], boxes: list[str], asked: int) -> str:
    """The prompt of a story in which nothing moves."""
    return text([f"{n} in {b};" for n, b in zip(names, boxes, strict=True)], names[asked])


def other_label(rng: Random, row: Mapping[str, Any]) -> str:
    """The path-patching counterfactual: another story altogether."""
    return str(story(rng)["prompt"])


def desiderata(rows: list[dict[str, Any]], rng: Random, tokenizer: Any) -> dict[str, Desideratum]:
    """`value` and `place`: counterfactual prompts, and the token that should come out."""
    found = {}
    for name in ("value", "place"):
        prompts, others, targets = [], [], []
        for row in rows:
            boxes = rng.sample([b for b in BOXES if b not in row["boxes"]], FACTS)
            place = row["asked"]
            names = list(row["names"])
            if name == "place":
                place = rng.choice([i for i in range(FACTS) if i != row["asked"]])
                names[row["asked"]], names[place] = names[place], names[row["asked"]]
            prompts.append(row["prompt"])
            others.append(without_moves(names, boxes, place))
            targets.append(boxes[place] if name == "value" else row["boxes"][place])
        target = answer_tokens(tokenizer, targets)
        found[name] = Desideratum(name, encode(tokenizer, prompts), encode(tokenizer, others), target)
    return found


def carried(model: Any, circuit: Circuit, group: str, wanted: Desideratum) -> float:
    """Accuracy on a desideratum when z of all heads of a group at the last token is the counterfactual's."""
    sites = [f"z.{h.layer}.{h.head}@-1" for h in circuit.groups[group].heads]
    if not sites:
        return 0.0
    _, seen = run(model, wanted.counterfactuals, sites)
    logits, _ = run(model, wanted.prompts, edits={site: seen[site] for site in sites})
    assert logits is not None
    return float((logits[:, -1].argmax(-1) == wanted.target).float().mean())


def measured(pair: Pair, seed: int, n: int, draws: int) -> dict[str, Any]:
    """Everything for one draw of prompts."""
    rng, tokenizer = Random(f"entity/{seed}"), pair.tokenizer
    rows = [story(rng) for _ in range(n)]
    prompts = encode(tokenizer, [row["prompt"] for row in rows])
    others = encode(tokenizer, [other_label(rng, row) for row in rows])
    reference = encode(tokenizer, [story(rng)["prompt"] for _ in range(n)])
    answers = answer_tokens(tokenizer, [row["answer"] for row in rows])
    circuit = discover(pair.base, prompts, others, prob(answers), STEPS).circuit
    found: dict[str, Any] = {"circuit": {k: [str(h) for h in g.heads] for k, g in circuit.groups.items()}}
    for name, model in (("base", pair.base), ("tuned", pair.tuned)):
        alone = faithfulness(model, prompts, circuit, accuracy(answers), draws=draws, reference=reference, seed=seed)
        model_, own, random = alone.table()
        found[name] = {"accuracy": model_["mean"], "circuit": own["mean"], "faithfulness": own["faithfulness"],
                       "random": random["faithfulness"],
                       "random max": float(np.max(alone.random_ratio.mean))}  # fmt: skip
    moved = [story(rng, moves=2) for _ in range(n)]
    metric = accuracy(answer_tokens(tokenizer, [row["answer"] for row in moved]))
    groups = {k: [f"z.{h.layer}.{h.head}" for h in g.heads] for k, g in circuit.groups.items() if g.heads}
    groups["circuit"] = sorted({site for sites in groups.values() for site in sites})
    where = {k: -1 for k in groups if k in ("A", "B")}
    told = cmap(pair, encode(tokenizer, [row["prompt"] for row in moved]), metric, groups, positions=where or None,
                random=draws, seed=seed)  # fmt: skip
    recovery = told.normalized()
    low, high = recovery.interval(seed=seed)
    found["cmap"] = {
        group: {"recovery": float(recovery.mean[i, 0]), "low": float(low[i, 0]), "high": float(high[i, 0]),
                "random": float(recovery.mean[i, 1:].mean()), "random max": float(recovery.mean[i, 1:].max()),
                "heads": len(groups[group])}
        for i, group in enumerate(recovery.axes["group"])
    }  # fmt: skip
    found["gap"] = {"base": float(np.mean(told.columns["target"])), "tuned": float(np.mean(told.columns["source"]))}
    wanted = desiderata(rows, rng, tokenizer)
    found["carried"] = {
        name: {group: carried(pair.tuned, circuit, group, each) for group in ("A", "B")}
        for name, each in wanted.items()
    }
    found["dcm"] = {}
    for name, each in wanted.items():
        mask = learn_mask(pair.tuned, each, components="z", position=-1)
        score = mask.evaluate(each).mean
        found["dcm"][name] = {"heads": [str(c) for c in mask.components], "accuracy": float(score)}
    return found


def summarised(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means and intervals over the draws, and what held."""
    each = list(runs.values())

    def over(*path: str) -> dict[str, Any]:
        values = []
        for one in each:
            for key in path:
                one = one[key]
            values.append(float(one))  # type: ignore[arg-type]
        return mean_interval(values)

    summary: dict[str, Any] = {
        "faithfulness": {name: {k: over(name, k) for k in ("accuracy", "faithfulness", "random", "random max")}
                         for name in ("base", "tuned")},
        "cmap": {group: {k: over("cmap", group, k) for k in ("recovery", "random", "random max")}
                 for group in each[0]["cmap"]},
        "gap": {name: over("gap", name) for name in ("base", "tuned")},
        "carried": {name: {group: over("carried", name, group) for group in ("A", "B")} for name in ("value", "place")},
        "dcm": {name: over("dcm", name, "accuracy") for name in ("value", "place")},
    }  # fmt: skip
    tuned = summary["faithfulness"]["tuned"]
    explains = all(one["tuned"]["faithfulness"] > one["tuned"]["random max"] for one in each)
    recovers = all(one["cmap"]["circuit"]["low"] > one["cmap"]["circuit"]["random"] for one in each)
    best = {name: max(groups, key=lambda g: groups[g]["mean"]) for name, groups in summary["carried"].items()}
    summary["held"] = {
        "the base's circuit explains the tuned model": explains and tuned["faithfulness"]["mean"] > 0.5,
        "its heads recover the gap, random ones do not": recovers
        and summary["cmap"]["circuit"]["recovery"]["mean"] > 0.5,
        "groups carry different things": best["value"] != best["place"],
    }
    return summary


def told(interval: Mapping[str, Any]) -> str:
    """A mean with its interval."""
    if interval["low"] is None:
        return f"{interval['mean']:.2f}"
    return f"{interval['mean']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def markdown(summary: Mapping[str, Any]) -> str:
    """A line a question."""
    lines = ["| | circuit | random, mean | random, best |", "|---|---|---|---|"]
    for name, found in summary["faithfulness"].items():
        cells = [told(found[key]) for key in ("faithfulness", "random", "random max")]
        lines.append(f"| faithfulness in the {name} model (accuracy {told(found['accuracy'])}) | {' | '.join(cells)} |")
    for group, found in summary["cmap"].items():
        lines.append(f"| CMAP, {group}: recovery | {told(found['recovery'])} | {told(found['random'])} | "
                     f"{told(found['random max'])} |")  # fmt: skip
    for name, groups in summary["carried"].items():
        lines.append(f"| carries the {name}: A, B; DCM's choice | {told(groups['A'])}, {told(groups['B'])}; "
                     f"{told(summary['dcm'][name])} | | |")  # fmt: skip
    return "\n".join(lines)


def published() -> str:
    """What the paper found in models of 7 B parameters, for the same questions."""
    told_ = json.loads((Path(__file__).parent / "published" / "entity_tracking.json").read_text(encoding="utf-8"))
    lines = ["| published, 7 B | model | circuit | random | faithfulness |", "|---|---|---|---|---|"]
    for name in ("Llama", "Vicuna", "Goat", "FLoat"):
        row = told_["faithfulness"][name]
        lines.append(f"| {name} | {row['full']} | {row['circuit']} | {row['random']} | {row['faithfulness']} |")
    for name in ("Goat", "FLoat"):
        base, tuned = told_["cmap"]["base"], told_["cmap"]["tuned"]
        recovery = {k: round((v - base) / (tuned - base), 2) for k, v in told_["cmap"][name].items()}
        lines.append(
            f"| CMAP from {name} into Llama: recovery | " + " | ".join(f"{k} {v}" for k, v in recovery.items())
        )
        lines[-1] = lines[-1].replace(" | D", ", D") + " |"
    return "\n".join(lines)


def picture(summary: Mapping[str, Any]) -> Figure:
    """Faithfulness and recovery beside random heads."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, key, label, part in ((left, "faithfulness", "faithfulness", "faithfulness"),
                                   (right, "recovery", "recovery of the accuracy gap", "cmap")):  # fmt: skip
        names = list(summary[part])
        for i, (word, kind) in enumerate((("circuit's heads", key), ("random heads, mean", "random"))):
            values = [summary[part][name][kind] for name in names]
            places = np.arange(len(names)) + (i - 0.5) * 0.36
            axis.bar(places, [v["mean"] for v in values], 0.34, label=word, color="0.6" if i == 0 else "white",
                     edgecolor="black", hatch="" if i == 0 else HATCHES[1])  # fmt: skip
            for place, value in zip(places, values, strict=True):
                if value["low"] is not None:
                    axis.vlines(place, value["low"], value["high"], color="black", lw=1)
        axis.axhline(0, color="black", lw=0.6)
        axis.set_xticks(range(len(names)), names)
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize="small")
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: the circuit is not empty, and CMAP's source is the better model."""
    (run_,) = report["runs"].values()
    assert run_["circuit"]["A"] and set(run_["cmap"]) >= {"circuit"}, run_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of prompts and random heads")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--fast", action="store_true", help="a few prompts: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    one_thread()
    seeds, n, draws = (options.seeds, PROMPTS, DRAWS) if not options.fast else ([0], 48, 2)
    pair = Pair.load("tiny-boxes-base", "tiny-boxes")
    runs = {str(seed): measured(pair, seed, n, draws) for seed in seeds}
    summary = summarised(runs)
    report = {"prompts": n, "draws": draws, "seeds": seeds, "summary": summary, "runs": runs}
    path = write(options.out, "entity_tracking", report, picture(summary), began)
    if options.fast:
        check(report)
    print(markdown(rounded(summary)))
    print(published())
    print({name: "held" if value else "did not hold" for name, value in summary["held"].items()})
    print(f"written: {path}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
