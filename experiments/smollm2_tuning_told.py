"""The tables and the picture of `smollm2_tuning.py`, from its summary alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def signed(found: Mapping[str, float]) -> str:
    return "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**found)


def markdown(summary: Mapping[str, Any]) -> str:
    """Scores, what parts the arms, costs, and the sweep."""
    texts, n = summary["texts"], summary["n"]
    heads = ["arm", "numbers that move", "rate", f"target, n = {n['target']}", f"right, n = {n['right']}",
             *(f"{t}, n = {n[t]}" for t in texts)]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm, found in summary["arms"].items():
        scores = found["scores"]
        cells = ["", ""] if arm == "base" else [f"{found['moving']:,}", found["lr"]]
        cells += [f"{scores['target']:.3f}", f"{scores['right']:.2f}"]
        for text in texts:
            change = "" if arm == "base" else f" ({signed(found['over base'][text])})"
            cells.append(f"{scores[text]:.3f}{change}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    heads = ["paired differences, nats a token", "target", *texts, "verdict"]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, pair in summary["pairs"].items():
        cells = [signed(pair["differences"][what]) for what in ("target", *texts)]
        lines.append(f"| {name} | " + " | ".join([*cells, pair["verdict"]]) + " |")
    heads = ["a step", "peak above the weights, MB", "of full", "CPU seconds", "of full", "validation by rate"]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm in list(summary["arms"])[1:]:
        found, full = summary["arms"][arm], summary["arms"]["full"]
        low, high = found["range"]
        sweep = ", ".join(f"{s['lr']}: {s['validation']:.3f}" for s in summary["sweep"][arm])
        lines.append(
            f"| {arm} | {found['peak']:.0f} | {found['peak'] / full['peak']:.2f} | {found['seconds']:.2f} | "
            f"{found['times full']:.2f} ({low:.2f} to {high:.2f}) | {sweep} |"
        )
    return "\n".join(lines)


def picture(summary: Mapping[str, Any]) -> Figure:
    """Target against each other text, and what a step costs."""
    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    texts = summary["texts"]
    *axes, last = figure.subplots(1, len(texts) + 1)
    marks = {"base": "x", "full": "s", "LIFT": "o", "HFT": "^", "LoRA": "D"}
    for axis, text in zip(axes, texts, strict=True):
        for arm, found in summary["arms"].items():
            x, y = found["scores"]["target"], found["scores"][text]
            if arm == "base":
                axis.axhline(y, color="0.6", linestyle="--", linewidth=1)
                continue
            change = found["over base"]
            errors = [[[max(0, change[k]["mean"] - change[k]["low"])], [max(0, change[k]["high"] - change[k]["mean"])]]
                      for k in ("target", text)]  # fmt: skip
            axis.errorbar(x, y, errors[1], errors[0], fmt="k" + marks[arm], capsize=2, elinewidth=0.7, markersize=7,
                          markerfacecolor="black" if arm == "LIFT" else "white")  # fmt: skip
            side = -1 if arm == "HFT" else 1
            axis.annotate(arm, (x, y), xytext=(7 * side, 5), textcoords="offset points", fontsize="small",
                          ha="right" if side < 0 else "left")  # fmt: skip
        axis.set(xlabel=f"held-out solutions, nats a token (base {summary['arms']['base']['scores']['target']:.2f})",
                 ylabel="log-probability, nats a token", title=f"{text} (dashed: base)")  # fmt: skip
        axis.locator_params(axis="x", nbins=5)
    arms, full = list(summary["arms"])[1:], summary["arms"]["full"]
    at = np.arange(len(arms))
    memory = [summary["arms"][arm]["peak"] / full["peak"] for arm in arms]
    seconds = [summary["arms"][arm]["times full"] for arm in arms]
    for shift, heights, colour, label in ((-0.2, memory, "0.75", "peak memory above the weights"),
                                          (0.2, seconds, "white", "CPU seconds")):  # fmt: skip
        last.bar(at + shift, heights, 0.4, color=colour, edgecolor="black", label=label)
        for x, height in zip(at + shift, heights, strict=True):
            last.annotate(f"{height:.2f}", (x, height), ha="center", va="bottom", fontsize="x-small")
    last.set_xticks(at, arms)
    last.set(ylabel="of full fine-tuning's", title="a training step", ylim=(0, 1.45 * last.dataLim.y1))
    last.legend(frameon=False, fontsize="small", loc="upper right")
    for axis in (*axes, last):
        axis.spines[["top", "right"]].set_visible(False)
    return figure
