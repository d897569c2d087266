"""Are planted directions found, by each of the six rules, and not by what has never seen them? (arXiv:2309.08600)

    python experiments/planted_directions.py            # 5 seeds, two kinds of data
    python experiments/planted_directions.py --fast     # one seed of a few steps, a check that it runs

Rows in 32 dimensions are sums of a few of 64 unit directions, of sizes from 0.5 to 1, and a little noise. "Even": each
is on in 3 % of the rows, by itself. "Nested", which is harder: 32 of them are on in 1 % to 8 % of the rows, and each of
the others only where its own one of these is, in half of the cases; a dictionary may then write both as one latent
(absorption). Dictionaries have 128 latents and take 1000 steps of 256 new rows. A seed is of the directions, of the
rows and of the start.

Recall is the share of planted directions with a cosine above 0.9 to some row of the decoder, MMCS the mean of the
largest cosines (both are asked every 100 steps), precision the share of latents in use (on 4096 other rows) with a
cosine above 0.9 to some planted direction. Every rule's penalty (or k) and learning rate are chosen by MMCS in a sweep
of 3 x 2 on a seed that is not reported, for each kind of data (ranges by a look at another one): what a rule can do
when its settings fit.

Three controls: the dictionary as it starts; the same one trained with the same settings on Gaussian rows of the same
mean and covariance, in which no direction is planted; the principal components of the rows, with both signs.

THE VERDICT, defined before anything was scored, for each rule and kind of data: "held" when the recall is at least 0.9
on average and the 95 % intervals over seeds of its paired differences from all three controls lie above 0; "in part"
when only the latter is so; else "did not hold".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena import mean_interval, one_thread, rounded, write
from matplotlib.figure import Figure
from torch import Tensor

from surgery.sae.dictionary import Dictionary
from surgery.sae.metrics import Planted, max_cosines, measure, recovered
from surgery.sae.rules import RULES
from surgery.sae.train import Entry, Settings, fit

LATENTS, BATCH, STEPS, EVERY, AT = 128, 256, 1000, 100, 0.9
GRID: dict[str, tuple[str, tuple[float, ...]]] = {
    "standard": ("l1", (1.0, 2.0, 4.0)),
    "gated": ("l1", (1.0, 2.0, 4.0)),
    "jumprelu": ("l0", (0.3, 1.0, 3.0)),
    "topk": ("k", (1, 2, 3)),
    "batchtopk": ("k", (1.0, 2.0, 3.0)),
    "matryoshka": ("k", (1.0, 2.0, 3.0)),
}
FIXED: dict[str, dict[str, Any]] = {
    "standard": {"warmup": 200},
    "gated": {"warmup": 200},
    "jumprelu": {"threshold": 0.5, "bandwidth": 1.0, "warmup": 200},
    "matryoshka": {"widths": (LATENTS // 4, LATENTS // 2)},
}
RATES: tuple[float, ...] = (3e-3, 1e-2)
SWEPT = 60
"""The learning rates, and the seed, of the sweeps."""
TOLD = ("recall", "mmcs", "precision", "used", "fvu", "l0", "shrinkage")
CONTROLS = ("as it starts", "Gaussian rows", "principal components")


@dataclass(frozen=True)
class Nested(Planted):
    """Half of the directions are on at rates from `rate` down to `rare`, the others only where their own one is."""

    noise: float = 0.05
    rate: float = 0.08
    rare: float = 0.01
    share: float = 0.5
    """In how many of these rows."""

    def rows(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(count, d) rows and the (count, n) sizes that they are made of."""
        generator = torch.Generator().manual_seed((self.seed << 20) + seed)
        half = self.n // 2
        rates = torch.logspace(np.log10(self.rate), np.log10(self.rare), half)
        first = torch.rand(count, half, generator=generator) < rates
        second = first & (torch.rand(count, half, generator=generator) < self.share)
        sizes = self.low + (1 - self.low) * torch.rand(count, self.n, generator=generator)
        sizes = sizes * torch.cat([first, second], 1)
        return sizes @ self.directions + self.noise * torch.randn(count, self.d, generator=generator), sizes


WORLDS: dict[str, Any] = {"even": partial(Planted, noise=0.05), "nested": Nested}


def batches(world: Planted) -> Iterator[dict[str, Tensor]]:
    """New rows without end."""
    number = 0
    while True:
        number += 1
        yield {"x": world.rows(BATCH, number)[0]}


def gaussian(world: Planted) -> Iterator[dict[str, Tensor]]:
    """Rows of the same mean and covariance, and no directions."""
    rows = world.rows(1 << 15, 0)[0].double()
    factor = torch.linalg.cholesky(rows.T.cov()).float()
    mean, generator = rows.mean(0).float(), torch.Generator().manual_seed(world.seed)
    while True:
        yield {"x": mean + torch.randn(BATCH, world.d, generator=generator) @ factor.T}


def entry(rule: str, coefficient: float, rate: float, seed: int) -> Entry:
    """One dictionary before its training."""
    words = {GRID[rule][0]: coefficient, **FIXED.get(rule, {})}
    made = Dictionary(Planted().d, LATENTS, RULES.lookup(rule)(**words), seed=seed)
    return Entry("x", made, Settings(lr=rate, warmup=20, shape="linear", final=0.05, dead_after=100 * BATCH))


def curves(entries: Mapping[str, Entry], rows: Iterator[dict[str, Tensor]], true: Tensor, steps: int, every: int
           ) -> dict[str, list[dict[str, float]]]:  # fmt: skip
    """Trains them; recall and MMCS at the start and every `every` steps."""
    found = {name: [recovered(true, one.dictionary.decoder.detach(), AT)] for name, one in entries.items()}

    def ask(step: int, lines: Mapping[str, dict[str, float]]) -> None:
        if step % every == 0:
            for name, one in entries.items():
                found[name].append(recovered(true, one.dictionary.decoder.detach(), AT))

    fit(entries, rows, steps=steps, on_step=ask)
    return found


def swept(world: str, rates: Sequence[float], steps: int, seed: int = SWEPT) -> dict[str, dict[str, Any]]:
    """Each rule's settings with the largest MMCS at the end, and what all of them had."""
    data = WORLDS[world](seed=seed)
    best = {}
    for rule, (_, values) in GRID.items():
        entries = {f"{value:g}, {rate:g}": entry(rule, value, rate, seed) for value in values for rate in rates}
        ends = {name: each[-1] for name, each in curves(entries, batches(data), data.directions, steps, steps).items()}
        chosen = max(ends, key=lambda name: ends[name]["mmcs"])
        value, rate = (float(part) for part in chosen.split(", "))
        best[rule] = {"value": int(value) if rule == "topk" else value, "rate": rate,
                      "tried": {name: each["mmcs"] for name, each in ends.items()}}  # fmt: skip
    return best


def one_seed(
    world: str, settings: Mapping[str, Mapping[str, Any]], seed: int, steps: int, every: int
) -> dict[str, Any]:
    """By rule: the curve, what held-out rows say, and the recall of the controls."""
    data = WORLDS[world](seed=seed)
    true = data.directions
    ours = {rule: entry(rule, s["value"], s["rate"], seed) for rule, s in settings.items()}
    control = {rule: entry(rule, s["value"], s["rate"], seed) for rule, s in settings.items()}
    found = curves(ours, batches(data), true, steps, every)
    other = curves(control, gaussian(data), true, steps, every)
    test = data.rows(4096, (1 << 20) - 1)[0]
    axes = torch.linalg.eigh(test.double().T.cov()).eigenvectors.T.float()
    principal = recovered(true, torch.cat([axes, -axes]), AT)
    report = {}
    for rule, one in ours.items():
        decoder, quality = one.dictionary.decoder.detach(), measure(one.dictionary, [test])
        used, nearest = quality.density > 0, max_cosines(decoder, true)
        halves = max_cosines(true, decoder).view(2, -1) > AT
        report[rule] = {
            "curve": found[rule], **found[rule][-1],
            "precision": float((nearest[used] > AT).double().mean()) if bool(used.any()) else 0.0,
            "used": float(used.double().mean()), "fvu": quality.fvu, "l0": quality.l0,
            "shrinkage": quality.shrinkage, "halves": halves.double().mean(1).tolist(),
            "controls": dict(zip(CONTROLS, (found[rule][0], other[rule][-1], principal), strict=True)),
        }  # fmt: skip
    return report


# ---- what is told


def verdict(recall: Mapping[str, Any], over: Sequence[Mapping[str, Any]]) -> str:
    """As defined above."""
    if any(d["low"] is None or d["low"] <= 0 for d in over):
        return "did not hold"
    return "held" if recall["mean"] >= 0.9 else "in part"


def summarised(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Means and intervals by kind of data and rule, differences from the controls, verdicts."""
    summary: dict[str, Any] = {}
    for world, seeds in runs.items():
        for rule in GRID:
            each = [run[rule] for run in seeds]
            row: dict[str, Any] = {what: mean_interval([e[what] for e in each]) for what in TOLD}
            row["halves"] = np.mean([e["halves"] for e in each], axis=0).tolist()
            row["controls"] = {c: {what: float(np.mean([e["controls"][c][what] for e in each]))
                                   for what in ("recall", "mmcs")} for c in CONTROLS}  # fmt: skip
            row["over"] = {c: {what: mean_interval([e[what] - e["controls"][c][what] for e in each])
                               for what in ("recall", "mmcs")} for c in CONTROLS}  # fmt: skip
            row["curve"] = np.mean([[point["recall"] for point in e["curve"]] for e in each], axis=0).tolist()
            row["verdict"] = verdict(row["recall"], [d["recall"] for d in row["over"].values()])
            chosen = settings[world][rule]
            row["settings"] = f"{GRID[rule][0]} {chosen['value']:g}, rate {chosen['rate']:g}"
            summary.setdefault(world, {})[rule] = row
    return summary


def markdown(summary: Mapping[str, Any]) -> str:
    """A table for each kind of data."""

    def of(m: Mapping[str, Any], form: str = ".2f") -> str:
        ends = "" if m["low"] is None else f" [{m['low']:{form}}, {m['high']:{form}}]"
        return f"{m['mean']:{form}}{ends}"

    head = "settings | recall | MMCS | precision | L0 | FVU | controls' largest recall, MMCS | MMCS over Gaussian rows"
    lines: list[str] = []
    for world, rules in summary.items():
        lines += [*([""] if lines else []), f"| {world} | {head} | verdict |", "|---" * 10 + "|"]
        for rule, f in rules.items():
            lines.append("| " + " | ".join([
                rule, f["settings"], of(f["recall"]), of(f["mmcs"]), f"{f['precision']['mean']:.2f}",
                f"{f['l0']['mean']:.1f}", f"{f['fvu']['mean']:.2f}",
                ", ".join(f"{max(c[what] for c in f['controls'].values()):.2f}" for what in ("recall", "mmcs")),
                of(f["over"]["Gaussian rows"]["mmcs"], "+.2f"), f["verdict"],
            ]) + " |")  # fmt: skip
    halves = ", ".join(f"{rule} {f['halves'][0]:.2f} and {f['halves'][1]:.2f}" for rule, f in summary["nested"].items())
    return "\n".join([*lines, "", f"Recall of those that the others hang on, and of the others: {halves}."])


MARKS = dict(zip(GRID, ("o", "s", "^", "D", "v", "P"), strict=True))


def picture(summary: Mapping[str, Any], every: int) -> Figure:
    """Recall against steps, one panel for each kind of data."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (world, rules) in zip(axes, summary.items(), strict=True):
        for i, (rule, f) in enumerate(rules.items()):
            at = every * np.arange(len(f["curve"]))
            axis.plot(at, f["curve"], color="black", lw=1, ls=("-", "--", ":")[i % 3], marker=MARKS[rule], ms=5,
                      mfc="white" if i % 2 else "0.5", label=rule)  # fmt: skip
        worst = [max(f["controls"][c]["recall"] for f in rules.values()) for c in CONTROLS]
        axis.axhline(max(worst), color="0.6", lw=4, zorder=0, label="the best control")
        axis.set(xlabel=f"steps of {BATCH} rows", title=f"Planted directions, {world}", ylim=(-0.03, 1.03))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel=f"recall (cosine above {AT})")
    axes[1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def check(report: Mapping[str, Any]) -> None:
    """What any run must show: every rule in both kinds of data, and controls that find next to nothing."""
    assert set(report["summary"]) == set(WORLDS)
    for rules in report["summary"].values():
        assert list(rules) == list(GRID)
        for found in rules.values():
            assert max(c["recall"] for c in found["controls"].values()) < 0.2
            assert found["mmcs"]["mean"] <= 1 + 1e-4 and found["verdict"] in ("held", "in part", "did not hold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--fast", action="store_true", help="few steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    one_thread()
    seeds, rates, steps, every = options.seeds, RATES, STEPS, EVERY
    if options.fast:
        seeds, rates, steps, every = seeds[:1], RATES[:1], 20, 10
    settings = {world: swept(world, rates, steps) for world in WORLDS}
    print(settings, flush=True)
    runs: dict[str, list[dict[str, Any]]] = {}
    for world in WORLDS:
        for seed in seeds:
            runs.setdefault(world, []).append(one_seed(world, settings[world], seed, steps, every))
            last = {rule: (round(f["recall"], 2), round(f["mmcs"], 2)) for rule, f in runs[world][-1].items()}
            print(world, seed, last, f"{time.perf_counter() - began:.0f} s", flush=True)
    summary = summarised(runs, settings)
    slim = {world: [{rule: {k: v for k, v in f.items() if k != "curve"} for rule, f in run.items()} for run in each]
            for world, each in runs.items()}  # fmt: skip
    report = {"steps": steps, "every": every, "settings": settings, "summary": summary, "runs": slim}
    path = write(options.out, "planted_directions", report, picture(summary, every), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
