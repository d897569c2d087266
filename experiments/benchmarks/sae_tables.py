"""The tables of the benchmark of dictionaries, the verdicts on its aims, and the section of README.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sae_arms import DENSE, OURS, PACKAGES, SAELENS, SPARSIFY

FASTER: dict[tuple[str, int], dict[str, float]] = {
    ("topk", 8192): {SAELENS: 4.0, SPARSIFY: 1.3}, ("batchtopk", 8192): {SAELENS: 4.0},
    ("topk", 2048): {SAELENS: 2.0, DENSE: 1.0}, ("batchtopk", 2048): {SAELENS: 2.0, DENSE: 1.0},
}  # fmt: skip
"""By rule and latents, how many times another arm's rows a second ours are to be."""
AIMS = {"memory": 0.25, "reading": 1.1, "second": 1.1}
"""Peak above the weights of SAELens's; reading of the bare forward; a second dictionary of its own training."""
NAMES = {"topk": "TopK", "batchtopk": "BatchTopK"}
Row = Mapping[str, Any]


def met(reached: bool) -> str:
    return "met" if reached else "not met"


def spread(found: Row, digits: int = 1) -> str:
    """A ratio, and between what it was."""
    low, high = found["range"]
    return f"{found['ratio']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines)).replace(
        " --- ", "---"
    )


def steps_table(rows: Sequence[Row]) -> str:
    """Every arm by rule and size, with what was aimed at; then the floor."""
    lines = []
    for row in rows:
        aims = FASTER.get((row["rule"], row["latents"]), {})
        for arm, each in row["arms"].items():
            aim = aims.get(arm)
            verdict = "" if aim is None else f"at least {aim:g}: {met(each['slower']['ratio'] >= aim)}"
            lines.append([
                f"{NAMES[row['rule']]}, {row['latents']:,}", arm, f"{each['seconds']:.3f}",
                f"{each['rows_per_s']:,.0f}", "" if arm == OURS else spread(each["slower"]), verdict,
            ])  # fmt: skip
    heads = ["rule, latents", "arm", "s a step", "rows a second", "ours is so many times as fast", "aim"]
    return f"{table(heads, lines)}\n\n{floor_table(rows)}"


def floor_table(rows: Sequence[Row]) -> str:
    """Ours over the dense product of rows and encoder."""
    lines = [
        [f"{NAMES[row['rule']]}, {row['latents']:,}", f"{row['arms'][OURS]['seconds']:.3f}",
         f"{row['floor']['flops_per_s'] / 1e9:.0f}", f"{row['floor']['seconds']:.3f}", f"{row['floor']['times']:.2f}"]
        for row in rows
    ]  # fmt: skip
    heads = ["rule, latents", "s a step", "GFLOP/s of matrix products", "floor, s", "times the floor"]
    return table(heads, lines)


def memory_table(rows: Sequence[Row]) -> str:
    """MiB above the weights, and ours as a share of SAELens's."""
    arms = list(dict.fromkeys(arm for row in rows for arm in row["peak"]))
    lines = []
    for row in rows:
        peak, share = row["peak"], ""
        if SAELENS in peak:
            share = f"{peak[OURS] / peak[SAELENS]:.2f}"
            if row["latents"] == 8192:
                share += f", at most {AIMS['memory']}: {met(peak[OURS] <= AIMS['memory'] * peak[SAELENS])}"
        numbers = [f"{peak[arm]:.0f}" if arm in peak else "" for arm in arms]
        lines.append([f"{NAMES[row['rule']]}, {row['latents']:,}", *numbers, share])
    return table(["peak above the weights, MiB", *arms, "ours of SAELens's"], lines)


def stream_table(rows: Sequence[Row]) -> str:
    """Reading against the bare forward; a second dictionary."""
    lines, more = [], []
    for row in rows:
        s = row["seconds"]
        lines.append([
            f"{row['model']}, {row['site']}", f"{row['tokens']:,}", f"{1000 * s['forward']:.0f}",
            f"{1000 * s['reading']:.0f}", spread(row["reading"], 2), met(row["reading"]["ratio"] <= AIMS["reading"]),
        ])  # fmt: skip
        more.append([
            row["model"], f"{row['latents']:,}", f"{s['one, reading']:.2f}", f"{s['two, reading']:.2f}",
            f"{row['passes']['one']} and {row['passes']['two']}", f"{s['alone, fitting']:.2f}",
            f"{s['two, fitting'] - s['one, fitting']:.2f}", spread(row["second"], 2),
            met(row["second"]["ratio"] <= AIMS["second"] and row["passes"]["one"] == row["passes"]["two"]),
        ])  # fmt: skip
    first = table(["model, site", "tokens a pass", "bare forward, ms", "reading, ms", "times",
                   f"at most {AIMS['reading']}"], lines)  # fmt: skip
    second = table(
        ["model", "latents", "reading for one, s", "for two, s", "passes", "training alone, s",
         "as the second, s", "times", f"at most {AIMS['second']}"], more,
    )  # fmt: skip
    return f"{first}\n\n{second}"


def shapes_table(rows: Sequence[Row]) -> str:
    """Ours against the dense loop."""
    lines = [
        [f"{NAMES[row['rule']]}, {row['latents']:,}", f"{row['arms'][OURS]['seconds']:.3f}",
         f"{row['arms'][DENSE]['seconds']:.3f}", spread(row["arms"][DENSE]["slower"], 2)]
        for row in rows
    ]  # fmt: skip
    return table(["rule, latents", "ours, s a step", "dense loop", "ours is so many times as fast"], lines)


LINES: dict[str, Callable[[Sequence[Row]], str]] = {
    "steps": steps_table, "shapes": shapes_table, "memory": memory_table, "stream": stream_table,
}  # fmt: skip


def section(report: Mapping[str, Any]) -> str:
    """The section of README.md: what was run, the tables, and what they show."""
    results, peers = report["results"], report["peers"]
    rounds = ", ".join(str(row["rounds"]) for row in results["steps"])
    left_out = [arm for arm in PACKAGES if arm not in peers]
    theirs = ", ".join(f"{arm} {peers[arm]}" for arm in PACKAGES if arm in peers) or "no peer"
    found = [
        "## Dictionaries: SAELens, sparsify, dictionary_learning",
        "    python experiments/benchmarks/sae.py --peers OTHER/bin/python     # an environment with the three",
        "A training step on rows that are there already: d_in 256, 4,096 rows a batch, k 32, float32; gradients "
        "clipped to 1.0, use of latents counted, latents chosen as if decoder rows had norm 1. One thread, CPU "
        "seconds, every arm one step a round in turn on the same rows; "
        f"medians of {rounds} rounds, with the spread in brackets. Against {theirs}, each as it trains by itself, in "
        "an environment of its own; sparsify with torch's fused Adam and with clipping, which its trainer does not "
        "have. The dense loop is plain torch with the same extras and fused Adam."
        + (f" Left out, since not at hand: {', '.join(left_out)}." if left_out else ""),
        steps_table(results["steps"]),
        told_steps(results["steps"]),
        "The same with fewer latents, where sparse codes have less to save:",
        shapes_table(results["shapes"]),
        "Memory of a step above the weights: state, gradients, activations.",
        memory_table(results["memory"]),
        "From the model to the dictionary: reading activations against the bare forward of a copy that is cut off "
        "behind that site; and fits of 16 steps of one dictionary and of two on the same stream, against the second's "
        "on rows that are there (BatchTopK, as many rows a step as tokens a pass but the first of each text).",
        stream_table(results["stream"]),
        f"The run took {report['seconds'] / 60:.0f} minutes; load {report['load_average']['before']:.1f} before it.",
    ]
    return "\n\n".join(found)


def told_steps(rows: Sequence[Row]) -> str:
    """What the tables of steps show, in words that follow from the numbers."""
    largest = max(row["latents"] for row in rows)
    parts = []
    for row in rows:
        others = [f"{each['slower']['ratio']:.1f} times as fast as {arm}" for arm, each in row["arms"].items()
                  if arm != OURS]  # fmt: skip
        if row["latents"] == largest:
            parts.append(f"{NAMES[row['rule']]} {', '.join(others)}")
    times = ", ".join(f"{row['floor']['times']:.1f}" for row in rows)
    return (
        f"With {largest:,} latents ours is, for {'; for '.join(parts)}. Of the dense products only that of rows and "
        f"encoder is left; whole steps take {times} times its floor."
    )
