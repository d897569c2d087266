"""Does a crosscoder find what only the tuned model has, and does latent scaling tell it from what only looks so?
(arXiv:2504.02922)

    python experiments/crosscoder_artefacts.py            # 6 seeds
    python experiments/crosscoder_artefacts.py --fast     # one seed of a few steps, a check that it runs

A pair with planted features: rows of the base and of the tuned model, 32 dimensions each, are sums of the same features
with the same sizes (0.5 to 1, each on in 3 % of the rows), written in unit directions, and a little noise.

    24 shared     the same direction in both          8 faint    the same direction, in the base 0.25 to 0.4 as long
     6 base only                                      8 turned   another direction in the tuned model, cosine 0.6
     8 tuned only                                     4 moved    another direction, cosine 0

None but the tuned-only ones are the tuned model's alone. A faint one has a relative norm of 0.8 to 0.875. Faint ones
provoke shrinkage, turned and moved ones decoupling: two latents, one of each model, for what one latent could write
into both. Where the base's direction is orthogonal (moved), latent scaling can't see it: it looks along the tuned one.

Crosscoders of 128 latents, L1 and BatchTopK, from the same start over the same 2000 batches of 256 rows. k is the
true mean number of features. In a sweep on a seed that is not reported BatchTopK takes the learning rate (of 2) with
the lower FVU; L1 the penalty and rate (5 x 2) with the lowest FVU among those whose L0 is within 15 % of BatchTopK's,
or the nearest L0 where there is none. (A first range ended at 2 with an L0 of 3.4; it was widened when two seeds had
been seen.) As L1 then rebuilds less, it is also trained with the pair of settings whose FVU is nearest to BatchTopK's,
at a larger L0. Everything is read on 16,384 other rows.

A latent is a feature's whose sizes its codes correlate with most, if above 0.5, else nobody's. It looks tuned only when
its relative norm is above 0.9 and at least 20 rows use it; it passes when both nu are at most 0.2, too. Right is one of
a tuned-only feature, all others are artefacts. Precision is the share of right ones among latents, recall that of
tuned-only features with such a latent. Control: the same on a pair that is no fine-tuning, the tuned model being the
base with noise of its own.

THE VERDICTS, defined before anything was scored, intervals of 95 % over seeds:
* found, for each crosscoder: "held" when recall and precision of those that pass are both at least 0.8 on average with
  intervals above 0.5; "in part" when only one of them is; else "did not hold".
* told apart, for each crosscoder: the AUROC, among latents that look tuned only, of the larger |nu| for artefacts
  against right ones, in seeds that have both. "held" when it is at least 0.9 on average and its interval above 0.5; "in
  part" when only the latter; "no artefacts to tell" when fewer than 3 seeds have both; else "did not hold".
* BatchTopK makes fewer: artefacts by norm alone, paired, against L1 at equal L0. "held" when the interval of L1 minus
  BatchTopK is above 0, "the other way round" when below, else "no clear difference".

Asked afterwards, since of BatchTopK's latents none was an artefact in the first seeds: the same with twice the k, which
a user who does not know the true one may take. It is told, and no part of the verdicts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena import mean_interval, one_thread, rounded, write
from matplotlib.figure import Figure
from torch import Tensor

from analysis.features import latent_scaling
from surgery.sae.dictionary import Dictionary
from surgery.sae.metrics import measure
from surgery.sae.rules import BatchTopK, Standard
from surgery.sae.train import Entry, Settings, fit

KINDS = {"shared": 24, "base only": 6, "tuned only": 8, "faint": 8, "turned": 8, "moved": 4}
OURS, NOBODY = "tuned only", "nobody's"
D, RATE, LOW, NOISE = 32, 0.03, 0.5, 0.05
LATENTS, BATCH, STEPS, TEST = 128, 256, 2000, 16_384
EQUAL_L0, EQUAL_FVU, BATCH_TOP_K, TWICE = ARMS = ("L1, equal L0", "L1, equal FVU", "BatchTopK", "BatchTopK, twice k")
PENALTIES, SWEPT = (0.7, 1.0, 2.0, 4.0, 6.0), 60
RATES: tuple[float, ...] = (3e-3, 1e-2)
LOOKS, PASSES, SAME, ROWS, NEAR = 0.9, 0.2, 0.5, 20, 0.15


@dataclass(frozen=True)
class Pair:
    """Rows of two models with the same features; `tuned=False`: the second is the base too, with its own noise."""

    seed: int = 0
    tuned: bool = True

    @property
    def kinds(self) -> list[str]:
        """Of each feature."""
        return [kind for kind, many in KINDS.items() for _ in range(many)]

    def directions(self) -> tuple[Tensor, Tensor]:
        """(features, d) in the base, and in the tuned model."""
        generator = torch.Generator().manual_seed(self.seed)
        n, kinds = len(self.kinds), np.array(self.kinds)

        def unit(rows: Tensor) -> Tensor:
            return rows / rows.norm(dim=1, keepdim=True)

        base = unit(torch.randn(n, D, generator=generator))
        other = torch.randn(n, D, generator=generator)
        other = unit(other - (other * base).sum(1, keepdim=True) * base)  # orthogonal to each one's own direction
        lengths = 0.25 + 0.15 * torch.rand(n, 1, generator=generator)

        def of(kind: str) -> Tensor:
            return torch.from_numpy(kinds == kind)[:, None]

        tuned = torch.where(of("turned"), 0.6 * base + 0.8 * other, base)
        tuned = torch.where(of("moved"), other, torch.where(of("base only"), 0.0, tuned))
        base = torch.where(of("faint"), lengths * base, torch.where(of(OURS), 0.0, base))
        return base, tuned if self.tuned else base

    def rows(self, count: int, number: int) -> tuple[Tensor, Tensor]:
        """(count, 2 d) rows, base and tuned side by side, and (count, features) sizes."""
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        n = len(self.kinds)
        on = torch.rand(count, n, generator=generator) < RATE
        sizes = on * (LOW + (1 - LOW) * torch.rand(count, n, generator=generator))
        noise = NOISE * torch.randn(count, 2 * D, generator=generator)
        return torch.cat([sizes @ rows for rows in self.directions()], 1) + noise, sizes

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """New rows without end."""
        number = 0
        while True:
            number += 1
            yield {"x": self.rows(BATCH, number)[0]}

    def test(self) -> tuple[Tensor, Tensor]:
        """Rows that nothing was trained on."""
        return self.rows(TEST, (1 << 20) - 1)


def entry(arm: str, value: float, rate: float, seed: int) -> Entry:
    """One crosscoder before its training."""
    rule = BatchTopK(k=value) if arm.startswith(BATCH_TOP_K) else Standard(l1=value, warmup=STEPS // 5)
    made = Dictionary(2 * D, LATENTS, rule, models=2, seed=seed)
    return Entry("x", made, Settings(lr=rate, warmup=20, shape="linear", final=0.05, dead_after=100 * BATCH))


def swept(rates: Sequence[float], steps: int) -> dict[str, Any]:
    """What each arm is trained with, and what was tried."""
    pair, k = Pair(SWEPT), RATE * sum(KINDS.values())
    tried = {BATCH_TOP_K: [(k, rate) for rate in rates], "L1": [(p, rate) for p in PENALTIES for rate in rates]}
    entries = {(arm, *pick): entry(arm, *pick, SWEPT) for arm, picks in tried.items() for pick in picks}
    fit({str(key): one for key, one in entries.items()}, pair.batches(), steps=steps)
    test = pair.test()[0]
    found = {key: measure(one.dictionary, [test]) for key, one in entries.items()}
    best = min((key for key in found if key[0] == BATCH_TOP_K), key=lambda key: found[key].fvu)
    apart = {key: abs(found[key].l0 / found[best].l0 - 1) for key in found if key[0] == "L1"}
    near = [key for key in apart if apart[key] <= NEAR]
    chosen = {
        EQUAL_L0: min(near, key=lambda key: found[key].fvu) if near else min(apart, key=lambda key: apart[key]),
        EQUAL_FVU: min(apart, key=lambda key: abs(found[key].fvu - found[best].fvu)), BATCH_TOP_K: best,
    }  # fmt: skip
    return {arm: {"value": key[1], "rate": key[2]} for arm, key in chosen.items()} | {
        TWICE: {"value": 2 * best[1], "rate": best[2]},
        "tried": {f"{key[0]} {key[1]:g}, {key[2]:g}": {"l0": q.l0, "fvu": q.fvu} for key, q in found.items()},
    }


# ---- whose latents are


def owners(codes: Tensor, sizes: Tensor) -> Tensor:
    """(latents,) the feature whose sizes (rows, features) the codes (rows, latents) correlate with most, or -1."""
    a, b = (each - each.mean(0) for each in (codes.double(), sizes.double()))
    correlation = a.T @ b / (a.norm(dim=0)[:, None] * b.norm(dim=0)).clamp(min=1e-12)
    best = correlation.max(1)
    return torch.where(best.values > SAME, best.indices, -1)


def auroc(high: Tensor, low: Tensor) -> float | None:
    """The share of pairs in which the one of `high` is larger, equal ones half; None without pairs."""
    if not len(high) or not len(low):
        return None
    return float(((high[:, None] > low).double() + 0.5 * (high[:, None] == low)).mean())


def scored(dictionary: Dictionary, pair: Pair) -> dict[str, Any]:
    """Precision and recall by norm alone and with scaling, artefacts by kind, AUROC, and every latent that looks so."""
    x, sizes = pair.test()
    scaling = latent_scaling(dictionary, x.split(4096))
    with torch.no_grad():
        mine = owners(torch.cat([dictionary.codes(part).dense() for part in x.split(4096)]), sizes)
    kinds = [*pair.kinds, NOBODY]  # -1 is the last
    kind = [kinds[int(i)] for i in mine]
    looks = (scaling.norm > LOOKS) & (scaling.rows >= ROWS)
    nu = torch.maximum(scaling.error.abs(), scaling.reconstruction.abs())
    right = torch.tensor([k == OURS for k in kind]) & pair.tuned
    quality = measure(dictionary, x.split(4096))
    found: dict[str, Any] = {"l0": quality.l0, "fvu": quality.fvu, "used": int((scaling.rows >= ROWS).sum())}
    for name, chosen in (("norm", looks), ("scaling", looks & (nu <= PASSES))):
        which = chosen.nonzero().view(-1).tolist()
        found[name] = {
            "latents": len(which), "artefacts": int((chosen & ~right).sum()),
            "precision": float(right[chosen].double().mean()) if which else None,
            "recall": len({int(mine[j]) for j in which if right[j]}) / KINDS[OURS],
            "kinds": {k: sum(kind[j] == k for j in which) for k in (*KINDS, NOBODY)},
        }  # fmt: skip
    scores = {"both": nu, "error": scaling.error.abs(), "reconstruction": scaling.reconstruction.abs()}
    found["auroc"] = {name: auroc(score[looks & ~right], score[looks & right]) for name, score in scores.items()}
    found["latents"] = [
        [kind[j], *(float(s[j]) for s in (scaling.norm, scaling.error, scaling.reconstruction))]
        for j in looks.nonzero().view(-1).tolist()
    ]
    return found


def one_seed(chosen: Mapping[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """By arm, on the pair and on the one that is no fine-tuning."""
    found: dict[str, Any] = {arm: {} for arm in ARMS}
    for name, pair in (("pair", Pair(seed)), ("control", Pair(seed, tuned=False))):
        entries = {arm: entry(arm, chosen[arm]["value"], chosen[arm]["rate"], seed) for arm in ARMS}
        fit(entries, pair.batches(), steps=steps)
        for arm, one in entries.items():
            found[arm][name] = scored(one.dictionary, pair)
    return found


# ---- what is told


def interval(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and interval of those that there are."""
    there = [v for v in values if v is not None]
    return mean_interval(there) if there else {"mean": None, "low": None, "high": None, "n": 0}


def above(m: Mapping[str, Any], mean: float, low: float) -> bool:
    """Whether an average is at least `mean`, and its interval above `low`."""
    return m["low"] is not None and m["mean"] >= mean and m["low"] > low


def verdicts(arms: Mapping[str, Mapping[str, Any]], fewer: Mapping[str, Any]) -> dict[str, str]:
    """As defined above."""
    found = {}
    for arm, f in arms.items():
        well = [above(f["scaling"][what], 0.8, 0.5) for what in ("recall", "precision")]
        found[f"{arm}: tuned-only features are found"] = ("did not hold", "in part", "held")[sum(well)]
    for arm, f in arms.items():
        told = "held" if above(f["auroc"]["both"], 0.9, 0.5) else "in part" if above(f["auroc"]["both"], 0, 0.5) \
            else "did not hold"  # fmt: skip
        enough = f["auroc"]["both"]["n"] >= 3
        found[f"{arm}: latent scaling tells artefacts"] = told if enough else "no artefacts to tell"
    side = 0 if fewer["low"] is None else int(fewer["low"] > 0) - int(fewer["high"] < 0)
    found["BatchTopK makes fewer artefacts than L1 of equal L0"] = {1: "held", -1: "the other way round"}.get(
        side, "no clear difference"
    )
    return found


def summarised(runs: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Means and intervals by arm, differences, verdicts."""
    arms: dict[str, Any] = {}
    for arm in ARMS:
        each, control = [run[arm]["pair"] for run in runs], [run[arm]["control"] for run in runs]
        told = "k" if arm.startswith(BATCH_TOP_K) else "l1"
        arms[arm] = {
            "settings": f"{told} {chosen[arm]['value']:g}, rate {chosen[arm]['rate']:g}",
            **{what: float(np.mean([e[what] for e in each])) for what in ("l0", "fvu", "used")},
            **{how: {what: interval([e[how][what] for e in each])
                     for what in ("precision", "recall", "artefacts", "latents")}
               | {"kinds": {k: float(np.mean([e[how]["kinds"][k] for e in each])) for k in (*KINDS, NOBODY)}}
               for how in ("norm", "scaling")},
            "auroc": {what: interval([e["auroc"][what] for e in each]) for what in ("both", "error", "reconstruction")},
            "control": {how: float(np.mean([c[how]["latents"] for c in control])) for how in ("norm", "scaling")},
        }  # fmt: skip

    def less(arm: str, how: str) -> dict[str, Any]:
        return interval([run[arm]["pair"][how]["artefacts"] - run[BATCH_TOP_K]["pair"][how]["artefacts"]
                         for run in runs])  # fmt: skip

    fewer = {arm: {how: less(arm, how) for how in ("norm", "scaling")} for arm in ARMS if arm != BATCH_TOP_K}
    return {
        "arms": arms,
        "fewer": fewer,
        "verdicts": verdicts({arm: arms[arm] for arm in ARMS[:3]}, fewer[EQUAL_L0]["norm"]),
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """How many are found and right, whose the others are, AUROC, verdicts."""

    def of(m: Mapping[str, Any], form: str = ".2f") -> str:
        if m["mean"] is None:
            return "none"
        ends = "" if m["low"] is None else f" [{m['low']:{form}}, {m['high']:{form}}]"
        return f"{m['mean']:{form}}{ends}"

    def row(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    ways = {"norm": "norm alone", "scaling": "norm and scaling"}
    lines = [row("crosscoder", "settings", "L0", "FVU", "tuned only by", "latents", "artefacts", "precision", "recall",
                 "control: latents"), "|---" * 10 + "|"]  # fmt: skip
    for arm, f in summary["arms"].items():
        for how, told in ways.items():
            lines.append(row(
                arm, f["settings"], f"{f['l0']:.2f}", f"{f['fvu']:.3f}", told, f"{f[how]['latents']['mean']:.1f}",
                of(f[how]["artefacts"], ".1f"), of(f[how]["precision"]), of(f[how]["recall"]),
                f"{f['control'][how]:.1f}",
            ))  # fmt: skip
    planted = [f"{k} ({n})" for k, n in KINDS.items()]
    lines += ["", row("latents a seed that are of", *planted, NOBODY), "|---" * 8 + "|"]
    for arm, f in summary["arms"].items():
        lines += [row(f"{arm}, {told}", *(f"{f[how]['kinds'][k]:.1f}" for k in (*KINDS, NOBODY)))
                  for how, told in ways.items()]  # fmt: skip
    lines += ["", row("AUROC of artefacts", "larger nu", "nu of what is left", "nu of the reconstruction")]
    lines.append("|---" * 4 + "|")
    lines += [row(arm, *(of(f["auroc"][what]) for what in ("both", "error", "reconstruction")))
              for arm, f in summary["arms"].items()]  # fmt: skip
    less = {arm: " and ".join(f"{of(each[how], '+.1f')} by {told}" for how, told in ways.items())
            for arm, each in summary["fewer"].items()}  # fmt: skip
    fewer = "; ".join(f"{arm}, {told}" for arm, told in less.items())
    lines += ["", f"Artefacts less those of BatchTopK: {fewer}.", "", row("claim", "verdict"), "|---|---|"]
    return "\n".join(lines + [row(claim, told) for claim, told in summary["verdicts"].items()])


def picture(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Both nu of the latents that look tuned only, of all seeds, by whose they are."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 4, sharex=True, sharey=True)
    marks = {OURS: ("o", "black"), "faint": ("s", "0.75"), "turned": ("^", "0.75"), "moved": ("D", "0.75"),
             "shared": ("P", "white"), "base only": ("v", "white"), NOBODY: ("X", "white")}  # fmt: skip
    for axis, arm in zip(axes, ARMS, strict=True):
        found = [one for run in runs for one in run[arm]["pair"]["latents"]]
        axis.axhspan(-PASSES, PASSES, xmin=0, xmax=1, color="0.93", zorder=0)
        axis.axvspan(-PASSES, PASSES, color="0.93", zorder=0)
        for kind, (mark, colour) in marks.items():
            points = np.clip(np.array([one[2:] for one in found if one[0] == kind]).reshape(-1, 2), -0.5, 1.5)
            axis.scatter(points[:, 0], points[:, 1], marker=mark, s=26, color=colour, edgecolor="black", linewidth=0.6,
                         label=kind)  # fmt: skip
        axis.set(xlabel="nu of what is left", title=arm)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="nu of the reconstruction")
    axes[-1].legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), title="feature")
    figure.suptitle(
        "Latents that look tuned only, of all seeds; those pass that lie where the grey bands cross", size="medium"
    )
    return figure


def check(report: Mapping[str, Any]) -> None:
    """What any run must show: what passes is among what looks so, and in shares of 1."""
    arms = report["summary"]["arms"]
    assert list(arms) == list(ARMS) and len(report["summary"]["verdicts"]) == 7
    for found in arms.values():
        assert found["scaling"]["latents"]["mean"] <= found["norm"]["latents"]["mean"]
        assert found["scaling"]["recall"]["mean"] <= found["norm"]["recall"]["mean"] <= 1
        assert found["control"]["scaling"] <= found["control"]["norm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--fast", action="store_true", help="few steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    one_thread()
    seeds, rates, steps = options.seeds, RATES, STEPS
    if options.fast:
        seeds, rates, steps = seeds[:1], RATES[:1], 60
    chosen = swept(rates, steps)
    print(chosen, flush=True)
    runs = []
    for seed in seeds:
        runs.append(one_seed(chosen, seed, steps))
        told = {arm: {how: [runs[-1][arm]["pair"][how][w] for w in ("latents", "artefacts", "recall")]
                      for how in ("norm", "scaling")} for arm in ARMS}  # fmt: skip
        print(seed, told, f"{time.perf_counter() - began:.0f} s", flush=True)
    summary = summarised(runs, chosen)
    figure = picture(runs)
    report = {"steps": steps, "settings": chosen, "summary": summary, "runs": runs}
    path = write(options.out, "crosscoder_artefacts", report, figure, began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
