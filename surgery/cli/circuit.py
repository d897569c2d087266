"""`surgery circuit find | test`: which heads work together, and do they suffice?"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import frame, prompts
from surgery.cli.frame import Force, command, new_app, option
from surgery.cli.prompts import Clean, Corrupt, First, MetricName, Number, Seed, Suffix, Task, Workers
from surgery.errors import SurgeryError

app = new_app(help="Find the heads, or the edges between them, that carry a behaviour; test whether they suffice.")

Model = Annotated[str, typer.Argument(help="A folder, base+adapter, a hub name, or a name of the zoo.")]
Plot = Annotated[Path | None, option("Draw the circuit.", metavar="FILE.png")]


@command(app, "find")
def find(
    model: Model,
    clean: Clean = None,
    corrupt: Corrupt = None,
    task: Task = None,
    n: Number = 64,
    seed: Seed = 0,
    suffix: Suffix = "",
    first_token: First = False,
    metric: MetricName = "prob",
    step: Annotated[
        list[str] | None,
        option(
            "A group of heads by path patching: NAME:TOP leads to the logits, NAME:TOP:TO:q|k|v[:POSITION] to the "
            "heads of an earlier one; repeatable.",
            default="A:5",
        ),
    ] = None,  # fmt: skip
    edges: Annotated[int | None, option("Instead: the best N edges by integrated gradients (EAP-IG).", min=1)] = None,
    threads: Workers = None,
    out: Annotated[Path | None, option("The circuit as a file.", "--out", "-o", metavar="FILE.json")] = None,
    plot: Plot = None,
    force: Force = False,
) -> None:
    """Find a circuit: heads backwards from the answer by path patching, or edges by attribution.

    \b
    Examples:
    surgery circuit find tiny-boxes --task boxes --suffix '#' --step A:4 --step B:4:A:q --step C:4:A:v:all -o c.json
    surgery circuit find MODEL --clean pairs.jsonl --metric logit_diff --edges 100 -o edges.json --plot edges.png
    """
    began = time.perf_counter()
    prompts.checked_outputs(out, plot, force)
    if edges is not None and step:
        raise SurgeryError("--edges and --step are two ways to find a circuit: choose one.")
    good, bad = prompts.pairs(clean, corrupt, task, n, seed)

    from analysis.circuits import EdgeCircuit, discover
    from analysis.plots import save

    loaded, tokenizer, batches = _ready(model, good, bad, suffix, threads)
    steps = [_step(text) for text in step or ["A:5"]]
    measured, remarks = prompts.metric(metric, loaded, tokenizer, batches, good, bad, first_token)
    found: Any
    with frame.progress("Searching") as advance:
        if edges is not None:
            from analysis.edges import eap

            scores = eap(loaded, batches[0], batches[1], measured, method="eap-ig-inputs", progress=advance)
            found = EdgeCircuit(scores.circuit(n=min(edges, scores.graph.n_edges)), scores.graph, f"{model}: {metric}")
        else:
            found = discover(loaded, batches[0], batches[1], measured, steps,
                             score="relative" if metric == "prob" else "difference", note=f"{model}: {metric}",
                             progress=advance).circuit  # fmt: skip
    written = []
    if out is not None:
        written.append(found.save(out))
    if plot is not None:
        written.append(save(found.plot(), plot))
    told = {"model": model, "metric": metric, "n": len(good), **_told(found), "written": list(map(str, written)),
            "seconds": round(time.perf_counter() - began, 2)}  # fmt: skip
    frame.notes(remarks)
    frame.result(told, *_lines(found), _closing(told))


@command(app, "test")
def test(
    model: Model,
    circuit: Annotated[Path, typer.Argument(help="What `circuit find` wrote.", metavar="FILE.json")],
    clean: Clean = None,
    corrupt: Corrupt = None,
    task: Task = None,
    n: Number = 64,
    seed: Seed = 1,
    suffix: Suffix = "",
    first_token: First = False,
    metric: MetricName = "logit_diff",
    draws: Annotated[int, option("Random circuits of its size to compare with.", min=1)] = 10,
    complete: Annotated[bool, option("Completeness too: is something missing?", "--complete")] = False,
    threads: Workers = None,
) -> None:
    """Say how much of the behaviour a circuit keeps by itself, beside random circuits of its size.

    Other heads say what they say in the corrupt prompts; of circuits of edges, all other edges carry the corrupt run.

    \b
    Examples:
    surgery circuit test tiny-boxes c.json --task boxes --suffix '#'
    surgery circuit test MODEL edges.json --clean pairs.jsonl
    """
    began = time.perf_counter()
    good, bad = prompts.pairs(clean, corrupt, task, n, seed)
    by_edges = "edges" in _read(circuit)

    from analysis.circuits import Circuit, EdgeCircuit, completeness, faithfulness

    known: Any = EdgeCircuit.load(circuit) if by_edges else Circuit.load(circuit)
    loaded, tokenizer, batches = _ready(model, good, bad, suffix, threads)
    measured, remarks = prompts.metric(metric, loaded, tokenizer, batches, good, bad, first_token)
    told: dict[str, Any] = {"model": model, "circuit": str(circuit), "metric": metric, "n": len(good)}
    if by_edges:
        told["runs"] = _edge_runs(loaded, batches, measured, known, draws, seed)
    else:
        setting: Any = {"ablation": "counterfactual", "reference": batches[1], "seed": seed}
        with frame.progress("Measuring") as advance:
            alone = faithfulness(loaded, batches[0], known, measured, draws=draws, floor="ablated", progress=advance,
                                 **setting)  # fmt: skip
        told["runs"] = alone.table()
        if complete:
            with frame.progress("Measuring") as advance:
                found = completeness(loaded, batches[0], known, measured, progress=advance, **setting)
            told["completeness"] = found.scores
    if complete and by_edges:
        raise SurgeryError("Completeness is measured of circuits of heads, and this is one of edges.")
    told["seconds"] = round(time.perf_counter() - began, 2)
    frame.notes(remarks)
    shown = [] if frame.STATE.json or frame.STATE.quiet else [_table(told)]
    frame.result(told, *shown, f"{frame.count(len(good), 'prompt')} in {frame.seconds(told['seconds'])}.")


def _ready(model: str, good: list[Any], bad: list[Any], suffix: str, threads: int | None) -> tuple[Any, Any, list[Any]]:
    import torch

    from surgery.models import encode, load, no_bars

    if threads is not None:
        torch.set_num_threads(threads)
    with no_bars():
        loaded, tokenizer = load(model)
    return loaded, tokenizer, [encode(tokenizer, [row["prompt"] + suffix for row in part]) for part in (good, bad)]


def _step(text: str) -> Any:
    """NAME:TOP[:TO:COMPONENT[:POSITION]]"""
    from analysis.circuits import Step

    words = text.split(":")
    try:
        if len(words) not in (2, 4, 5):
            raise ValueError
        position: int | str = -1 if len(words) < 5 else words[4] if words[4] == "all" else int(words[4])
        to, by = (words[2], words[3]) if len(words) > 2 else ("logits", "")
        return Step(words[0], int(words[1]), to, by, position)
    except ValueError:
        hint = "A:4 leads to the logits; B:4:A:q to the queries of A; C:3:A:v:all from every token."
        raise SurgeryError(f"--step '{text}' is not understood.", hint=hint) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "`surgery circuit find ... -o FILE.json` writes one."
        raise SurgeryError(f"There is no circuit at {path}.", hint=hint) from None
    except (ValueError, OSError) as error:
        raise SurgeryError(f"{path} is not a circuit: {error}.") from error
    if not isinstance(found, dict):
        raise SurgeryError(f"{path} is not a circuit.")
    return found


def _told(found: Any) -> dict[str, Any]:
    if hasattr(found, "groups"):
        return {"groups": {name: [str(head) for head in group.heads] for name, group in found.groups.items()}}
    return {"edges": [list(edge) for edge in found.edges]}


def _lines(found: Any) -> list[str]:
    if hasattr(found, "groups"):
        lines = []
        for name, group in found.groups.items():
            scores = group.scores or [None] * len(group.heads)
            heads = [f"z.{h}" + ("" if s is None else f" ({s:+.3f})") for h, s in zip(group.heads, scores, strict=True)]
            leads = f"{name}, to {group.to or 'logits'}" + (f" by {group.by}" if group.by else "")
            lines.append(f"{leads}: {', '.join(heads) or 'none'}")
        return lines
    best = sorted(found.edges, key=lambda edge: -abs(edge[2]))[:10]
    return [f"{len(found)} edges; the strongest:", *(f"  {u} -> {v} ({score:+.3f})" for u, v, score in best)]


def _closing(told: dict[str, Any]) -> str:
    closing = f"Done in {frame.seconds(told['seconds'])}."
    return closing + (" Written: " + ", ".join(told["written"]) if told["written"] else "")


def _edge_runs(model: Any, batches: list[Any], metric: Any, known: Any, draws: int, seed: int) -> list[dict[str, Any]]:
    """The whole model, the circuit, and as many edges drawn at random."""
    from random import Random

    from analysis.edges import evaluate_edges

    graph = known.graph
    every = [(graph.writers[u], graph.readers[v]) for v, u in zip(*graph.exists.nonzero(), strict=True)]
    rng = Random(seed)
    circuits = {"circuit": [edge[:2] for edge in known.edges]}
    circuits |= {f"random {i}": rng.sample(every, len(known)) for i in range(draws)}
    found = evaluate_edges(model, batches[0], batches[1], metric, circuits)
    clean, corrupt = (sum(found.columns[name]) / len(found) for name in ("clean", "corrupt"))
    if abs(clean - corrupt) < 1e-6 * max(abs(clean), abs(corrupt), 1e-30):
        raise SurgeryError(
            f"Faithfulness is not defined here: {metric.name} is {clean:.3g} with and without corruption."
        )
    means = found.mean.tolist()
    share = [(mean - corrupt) / (clean - corrupt) for mean in means]
    drawn, drawn_share = sum(means[1:]) / draws, sum(share[1:]) / draws
    return [
        {"run": "model", "mean": clean, "faithfulness": 1.0},
        {"run": "circuit", "mean": means[0], "faithfulness": share[0]},
        {"run": "random", "mean": drawn, "faithfulness": drawn_share},
    ]


def _table(told: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(caption="faithfulness: 0 is the corrupt run's metric, 1 the whole model's")
    for word in ("run", told["metric"], "faithfulness"):
        table.add_column(word, justify="left" if word == "run" else "right")
    for row in told["runs"]:
        spread = f" [{row['low']:.3g}, {row['high']:.3g}]" if "low" in row else ""
        table.add_row(row["run"], f"{row['mean']:.3g}{spread}", f"{row['faithfulness']:.3f}")
    for part, score in told.get("completeness", {}).items():
        table.add_row(f"without {part}", "", f"off by {score:.3g}")
    return table
