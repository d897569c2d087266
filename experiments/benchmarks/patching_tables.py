"""The tables that `patching.py` prints, made from its JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

SPEED = 0.8
"""The share of the floor's speed that was aimed at."""


def markdown(results: dict[str, Any]) -> str:
    """All tables whose results are there."""
    return "\n\n".join(table(results[name]) for name, table in TABLES.items() if name in results)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _met(value: float, aim: float | None) -> str:
    """An aim and whether it was reached."""
    return "" if aim is None else f"{aim:g}: {'met' if value >= aim else 'missed'}"


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _sweep(row: dict[str, Any]) -> str:
    return row["site"] + (", no prefix" if not row["first"] else "")


def sweeps(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds; ratios to the bridge with the aims; the floor; equality."""
    peers = ("bridge", "bridge, no_grad", "nnsight", "hooks")
    names = ("bridge", "bridge, no_grad", "nnsight", "plain hooks")
    seconds = [[r["model"], _sweep(r), r["cells"], *(_seconds(r["seconds"][p]) for p in ("ours", "floor", *peers)),
                "all" if r["measured"] == r["cells"] else r["measured"]]
               for r in rows]  # fmt: skip
    ratios = []
    for r in rows:
        times = [r["times_faster"][p] for p in peers]
        ratios.append(
            [r["model"], _sweep(r), f"{times[0]:.1f}", _met(times[0], r["aim"]), f"{times[1]:.1f}",
             _met(times[1], r["aim"]), f"{times[2]:.1f}", f"{times[3]:.1f}", f"{r['share_of_floor']:.2f}",
             _met(r["share_of_floor"], SPEED), *(f"{r['bridge_over_floor'][p]:.1f}" for p in peers[:2])]
        )  # fmt: skip
    limits = {"hooks": 1e-6, "bridge, no_grad": 5e-6}
    equal = []
    for r in rows:
        equal.append([r["model"], _sweep(r), f"{r['scale']:.2g}"])
        for peer, limit in limits.items():
            equal[-1] += [f"{r['apart'][peer]:.0e}", "met" if r["apart"][peer] <= limit else "missed"]
    return "\n\n".join(
        [
            "CPU seconds of a sweep:",
            _table(["model", "sweep", "cells", "ours", "floor", *names, "cells run by peers"], seconds),
            "Times faster than each peer, and the share of the floor's speed:",
            _table(["model", "sweep", "bridge / ours", "aim", "bridge, no_grad / ours", "aim", "nnsight / ours",
                    "hooks / ours", "floor / ours", "aim", "bridge / floor", "bridge, no_grad / floor"], ratios),
            "Largest difference from the peers on the cells that they ran:",
            _table(["model", "sweep", "largest value", "hooks", "1e-6", "bridge", "5e-6"], equal),
        ]
    )  # fmt: skip


def precision(rows: Sequence[dict[str, Any]]) -> str:
    """Ours against hooks in three precisions, beside the hooks' own rounding."""
    lines = []
    for r in rows:
        apart, rounding = r["apart"], r["rounding"]
        lines.append(
            [r["model"], r["site"], f"{r['scale']:.2g}", f"{apart['float64']:.0e}", f"{apart['float32']:.0e}",
             f"{rounding['float32']:.0e}", "met" if apart["float32"] <= 1e-6 else "missed", f"{apart['bfloat16']:.0e}",
             f"{rounding['bfloat16']:.0e}", "met" if apart["bfloat16"] <= 2e-2 else "missed"]
        )  # fmt: skip
    head = ["model", "site", "largest value", "float64", "float32", "hooks' rounding", "1e-6", "bfloat16",
            "hooks' rounding", "2e-2"]  # fmt: skip
    return "Difference from one forward a cell in the same precision:\n\n" + _table(head, lines)


def padded(rows: Sequence[dict[str, Any]]) -> str:
    """Effects of a padded batch against single prompts, beside the rounding of plain forwards."""
    lines = [[r["model"], r["site"], f"{r['scale']:.2g}", f"{r['apart']:.0e}", f"{r['rounding']:.0e}",
              "met" if r["apart"] <= 1e-5 else "missed"] for r in rows]  # fmt: skip
    head = ["model", "site", "largest effect", "difference", "of plain forwards", "1e-5"]
    return "A padded batch against its prompts one by one:\n\n" + _table(head, lines)


def costs(rows: Sequence[dict[str, Any]]) -> str:
    """Forwards and seconds against the loop."""
    lines = []
    for r in rows:
        loop = _seconds(r["loop_seconds"]) + (" (run)" if r["loop_run"] else "")
        lines.append([r["model"], r["what"], f"{r['forwards']:.1f}", f"{r['in_forwards']:.1f}", _seconds(r["seconds"]),
                      f"{r['loop_forwards']:.0f}", loop, f"{r['times_faster']:.1f}"])  # fmt: skip
    head = ["model", "what", "forwards, counted", "forwards, by time", "ours, s", "loop, forwards", "loop, s", "times"]
    return "Cost in forwards of the 8 prompts:\n\n" + _table(head, lines)


def memory(found: dict[str, list[dict[str, Any]]]) -> str:
    """MB held and at the peak."""
    captures = [[r["arm"], f"{r['held']:.0f}", f"{r['peak']:.0f}"] for r in found["capture"]]
    budgets = [[r["site"], r["budget"], f"{r['peak']:.0f}", "met" if r["peak"] <= r["budget"] else "missed",
                f"{r['usual']:.0f}"] for r in found["budget"]]  # fmt: skip
    return "\n\n".join(
        [
            "Captures, MB above the model:", _table(["arm", "held", "peak"], captures),
            "Sweeps with a budget, MB above the model:",
            _table(["site", "budget", "peak", "kept", "peak, usual allocator"], budgets),
        ]
    )  # fmt: skip


TABLES: dict[str, Callable[[Any], str]] = {
    "sweeps": sweeps,
    "precision": precision,
    "padded": padded,
    "costs": costs,
    "memory": memory,
}
