"""The tables of the benchmark of sparse tuning, the verdicts on its aims, and the section of README.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuning_arms import FULL, FUSED, HFT, HOOKS, LORA, OURS

AIMS = {"phase": 0.45, "whole": 1.0, "half": 0.85, "memory": 0.1, "bytes": 13.0, "refresh": 2.0, "file": 8.1}
"""Optimizer phase and step of AdamW's; HFT's step of AdamW's; peak at 32 tokens of AdamW's; bytes of state and index a
trained number; LIFT's mask in steps of 1,024 tokens; bytes a number in a delta's file."""
Row = Mapping[str, Any]


def verdict(value: float, aim: float) -> str:
    return "met" if value <= aim else "not met"


def spread(found: Row) -> str:
    """A ratio, and between what it was."""
    low, high = found["range"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines)).replace(
        " --- ", "---"
    )


def steps_table(rows: Sequence[Row]) -> str:
    """A table for each shape of batch, milliseconds; then what the aims ask."""
    found = []
    for row in rows:
        heads = [f"ms, {row['tokens']}", "forward", "backward", "gathering", "update", "phase of AdamW",
                 "phase of fused", "step", "step of AdamW", "step of fused"]  # fmt: skip
        lines = []
        for name, arm in row["arms"].items():
            cells = [f"{1000 * arm[p]:.1f}" for p in ("forward", "backward", "gathering", "update")]
            cells += [f"{arm[f'phase of {other}']['ratio']:.2f}" for other in (FULL, FUSED)]
            cells += [f"{1000 * arm['whole']:.1f}", *(spread(arm[f"whole of {other}"]) for other in (FULL, FUSED))]
            lines.append([name, *cells])
        found.append(table(heads, lines))
    return "\n\n".join([*found, aims_table(rows)])


def aims_table(rows: Sequence[Row]) -> str:
    """Ours against what was aimed at, with AdamW as torch makes it and with its fused one."""
    asked = (
        ("optimizer phase, by hooks", HOOKS, "phase", "phase"), ("optimizer phase, by blocks", OURS, "phase", "phase"),
        ("whole step, by hooks", HOOKS, "whole", "whole"), ("whole step, by blocks", OURS, "whole", "whole"),
        ("whole step, HFT", HFT, "whole", "half"),
    )  # fmt: skip
    lines = []
    for row in rows:
        for label, arm, part, aim in asked:
            ratios = [row["arms"][arm][f"{part} of {other}"] for other in (FULL, FUSED)]
            cells = [cell for r in ratios for cell in (spread(r), verdict(r["ratio"], AIMS[aim]))]
            lines.append([row["tokens"], label, f"{AIMS[aim]:.2f}", *cells])
    return table(["a step of", "of AdamW's", "at most", "AdamW", "", "AdamW, fused", ""], lines)


def floor_table(rows: Sequence[Row]) -> str:
    """The optimizer phase over the bytes that it has to move."""
    lines = []
    for row in rows:
        floor, arm = row["floor"], row["arms"][HOOKS]
        lines.append([
            row["tokens"], f"{1000 * arm['phase']:.1f}", f"{sum(floor['bytes'].values()) / 1e6:.0f}",
            f"{floor['bytes_per_s'] / 1e9:.1f}", f"{1000 * floor['seconds']:.1f}", f"{floor['times']:.1f}",
            f"{1000 * arm['backward']:.1f}", f"{1000 * arm['backward without hooks']:.1f}",
        ])  # fmt: skip
    heads = ["a step of", "phase, ms", "MB to move", "GB/s of copying", "floor, ms", "times the floor", "backward, ms",
             "without hooks, ms"]  # fmt: skip
    return table(heads, lines)


def memory_table(rows: Sequence[Row]) -> str:
    """MiB above the weights by shape of batch, and as a share of AdamW's."""
    arms = list(rows[0]["peak"])
    lines = [
        [name, *(f"{row['peak'][name]:.0f} ({row['peak'][name] / row['peak'][FULL]:.2f})" for row in rows)]
        for name in arms
    ]
    found = table(["peak above the weights, MiB (of AdamW's)", *(row["tokens"] for row in rows)], lines)
    peak = rows[0]["peak"]
    aims = [f"of AdamW's at most {AIMS['memory']:.1f}: {peak[OURS] / peak[FULL]:.3f}, "
            f"{verdict(peak[OURS] / peak[FULL], AIMS['memory'])}"]  # fmt: skip
    if LORA in peak:
        aims.append(f"no more than LoRA's: {peak[OURS]:.1f} against {peak[LORA]:.1f} MiB, "
                    f"{verdict(peak[OURS], peak[LORA])}")  # fmt: skip
    return f"{found}\n\nLIFT's mask at {rows[0]['tokens']}, {'; '.join(aims)}."


def state_table(rows: Sequence[Row]) -> str:
    """Bytes for each trained number."""
    lines = []
    for name, arm in rows[0]["arms"].items():
        both = arm["state"] + arm["index"]
        mine = name.startswith((OURS, HOOKS))
        lines.append([name, f"{arm['trained']:,}", f"{arm['state']:.1f}", f"{arm['index']:.1f}", f"{both:.1f}",
                      verdict(round(both, 4), AIMS["bytes"]) if mine else ""])  # fmt: skip
    heads = ["arm", "numbers trained", "state, bytes each", "index", "both", f"at most {AIMS['bytes']:.0f}"]
    return table(heads, lines)


def mask_table(rows: Sequence[Row]) -> str:
    """The refresh against steps and a full SVD."""
    (row,) = rows
    took, lines = row["seconds"], []
    for tokens, times in row["of step"].items():
        aim = verdict(times, AIMS["refresh"]) if tokens.startswith("1,024") else ""
        lines.append([f"a step of {tokens}", f"{took[f'step, {tokens}']:.2f}", f"{times:.2f}", aim])
    lines.append(["a full SVD of every matrix", f"{took['full SVD']:.2f}", f"{row['of svd']:.2f}", ""])
    heads = ["against", "s", f"refresh ({row['refresh']:.2f} s), times", f"at most {AIMS['refresh']:.0f}"]
    note = (
        f"Choosing {took['choosing']:.2f} s, moving the state {took['moving the state']:.3f} s. Of the chosen numbers "
        f"{100 * row['agree']:.2f} % are also the full SVD's (the worst matrix of a layer)."
    )
    return f"{table(heads, lines)}\n\n{note}"


def delta_table(rows: Sequence[Row]) -> str:
    """The file, and what came of it."""
    (row,) = rows
    bits = ["bit for bit" if row[what] else "NOT the same bits" for what in ("applied", "reverted")]
    seconds = ", ".join(f"{what} {1000 * took:.0f} ms" for what, took in row["seconds"].items())
    lines = [[f"{row['numbers']:,}", f"{row['bytes'] / 1e6:.2f}", f"{row['dense'] / 1e6:.0f}",
              f"{row['bytes_per_number']:.3f}", verdict(row["bytes_per_number"], AIMS["file"]), *bits]]  # fmt: skip
    heads = ["numbers", "file, MB", "model, MB", "bytes a number", f"at most {AIMS['file']}", "applied", "reverted"]
    return f"{table(heads, lines)}\n\nCPU time: {seconds}."


LINES: dict[str, Callable[[Sequence[Row]], str]] = {
    "steps": lambda rows: f"{steps_table(rows)}\n\n{floor_table(rows)}", "memory": memory_table, "state": state_table,
    "mask": mask_table, "delta": delta_table,
}  # fmt: skip


def section(report: Mapping[str, Any]) -> str:
    """The section of README.md: what was run, the tables, and what they show."""
    results = report["results"]
    rounds = ", ".join(str(row["rounds"]) for row in results["steps"])
    theirs = (
        "LIFT's published optimizer was timed from its own file, which is no part of this repository."
        if report["lift"]
        else "LIFT's published optimizer was not at hand: not timed."
    )
    found = [
        "## Sparse tuning: AdamW, PEFT, and LIFT's own optimizer",
        "    python experiments/benchmarks/tuning.py --lift FOLDER     # a clone of LIFT's code, or no such row",
        "A Llama of 4 layers, width 768 and inner width 2,112 (28,901,376 numbers in linear layers), random, float32, "
        "5 % of which move; adapters are as large. One thread, CPU seconds, every arm one step a round in turn; "
        f"medians of {rounds} rounds, with the spread in brackets. The phase is everything after the backward pass and "
        "what hooks take during it to gather gradients. SHiRA, Super-Tuning, LoRA, HFT and masked AdamW (LT-SFT's way) "
        f"use torch's fused AdamW. {theirs}",
        steps_table(results["steps"]),
        told_steps(results["steps"]),
        "The optimizer phase over its floor, the bytes that it has to move (cache lines of gradients and weights that "
        "hold a chosen number, moments, gathered gradients, places) at the rate at which the machine copies memory; "
        "and the backward pass with hooks and without:",
        floor_table(results["steps"]),
        "Memory of a step above the weights: state, masks, adapters, gradients, activations.",
        memory_table(results["memory"]),
        told_memory(results["memory"]),
        state_table(results["state"]),
        "LIFT's mask chosen anew (the Gram matrix's top eigenvectors; no SVD) with the moments moved to it:",
        mask_table(results["mask"]),
        "What moved in three steps as a sparse delta:",
        delta_table(results["delta"]),
        f"The run took {report['seconds'] / 60:.0f} minutes; load {report['load_average']['before']:.1f} before it.",
    ]
    return "\n\n".join(found)


def told_steps(rows: Sequence[Row]) -> str:
    """What the tables of steps show, in words that follow from the numbers."""
    hooks, ours, more = rows[0]["arms"][HOOKS], rows[0]["arms"][OURS], []
    for row in rows[1:]:
        more.append(f"{row['arms'][OURS][f'whole of {FUSED}']['ratio']:.2f} of fused AdamW's ({row['tokens']})")
    told = (
        f"At {rows[0]['tokens']} the optimizer phase of LIFT's mask takes, by hooks, "
        f"{hooks[f'phase of {FULL}']['ratio']:.2f} of torch's default AdamW's and "
        f"{hooks[f'phase of {FUSED}']['ratio']:.2f} of the fused one's; by blocks of rows it is a difference of two "
        "backward passes, within the noise at 1,024 tokens. The whole step takes "
        f"{ours[f'whole of {FULL}']['ratio']:.2f} and {ours[f'whole of {FUSED}']['ratio']:.2f} of theirs."
    )
    if more:
        told += (
            f" At 1,024 tokens forward and backward are most of a step, and it takes {' and '.join(more)}: "
            "unstructured sparsity saves memory, not time."
        )
    half = [f"{100 * (1 - row['arms'][HFT][f'whole of {FUSED}']['ratio']):.0f} % ({row['tokens']})" for row in rows]
    return f"{told} HFT skips the gradient products of its frozen half: {', '.join(half)} less than fused AdamW."


def told_memory(rows: Sequence[Row]) -> str:
    """What grows with tokens."""
    peaks = ", ".join(f"{row['peak'][OURS]:.0f} MiB at {row['tokens']}" for row in rows)
    shares = ", ".join(f"{row['peak'][OURS] / row['peak'][FULL]:.2f}" for row in rows)
    return (
        f"State and gradients do not grow with the batch, activations do, and at 1,024 tokens they dominate: {peaks}, "
        f"{shares} of AdamW's."
    )
