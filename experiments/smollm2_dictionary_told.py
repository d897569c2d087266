"""The tables and the picture of `smollm2_dictionary.py`, from what it found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.features import KINDS


def plain(text: str) -> str:
    """As it can stand in a table."""
    return text.replace("\n", "\\n").replace("|", "\\|").replace("`", "'").strip()


def markdown(summary: Mapping[str, Any]) -> str:
    """Metrics, losses, latents that changed, whose the crosscoder's are, verdicts."""

    def row(*cells: Any) -> str:
        return "| " + " | ".join(str(cell) for cell in cells) + " |"

    first, second = summary["held out"]
    lines = [row("held-out activations", f"FVU, {first}", f"FVU, {second}", "FVU", "L0", "dead", "shrinkage"),
             "|---" * 7 + "|"]  # fmt: skip
    for name, q in summary["quality"].items():
        lines.append(row(name, *(f"{q[kind]['fvu']:.3f}" for kind in (first, second, "both")), f"{q['both']['l0']:.1f}",
                         f"{q['both']['dead']:.2f}", f"{q['both']['shrinkage']:.3f}"))  # fmt: skip
    lines += ["", row("in place of the activations", "CE", "CE recovered, zero", "CE recovered, mean", "KL",
                      "KL recovered, zero", "KL recovered, mean"), "|---" * 7 + "|"]  # fmt: skip
    own = summary["loss"]["dictionary"]
    lines.append(row("nothing", f"{own['zero']['ce']:.2f}", "1", "1", "0", "1", "1"))
    for name, each in summary["loss"].items():
        recovered = {what: [f"{each[how][f'{what}_recovered']:.3f}" for how in ("zero", "mean")]
                     for what in ("ce", "kl")}  # fmt: skip
        lines.append(row(name, f"{each['zero']['ce_dictionary']:.2f}", *recovered["ce"],
                         f"{each['zero']['kl_dictionary']:.2f}", *recovered["kl"]))  # fmt: skip
    for how in ("zero", "mean"):
        lines.append(row(f"ablation: {how}", f"{own[how]['ce_ablated']:.2f}", "", "", f"{own[how]['kl_ablated']:.2f}",
                         "", ""))  # fmt: skip
    found = summary["features"]
    lines += ["", row("after the fine-tuning", "latents that fire more", "less", "a text's change", "overlap of codes",
                      "length of the difference over the activation's"), "|---" * 6 + "|"]  # fmt: skip
    for kind in (first, second):
        lines.append(row(kind, found["changed"][kind]["more"], found["changed"][kind]["less"],
                         f"{found['amount'][kind]:.3f}", f"{found['overlap'][kind]:.3f}",
                         f"{summary['moved'][kind]:.3f}"))  # fmt: skip
    lines += ["", row("latent", f"rate on {first}, base", "tuned", "difference", f"{second}, base", "tuned",
                      "most active at the last token of"), "|---" * 7 + "|"]  # fmt: skip
    for f in found["most"]:
        (a, b), (c, d) = f["rates"][first], f["rates"][second]
        lines.append(row(f["latent"], f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f} [{f['low']:+.4f}, {f['high']:+.4f}]",
                         f"{c:.4f}", f"{d:.4f}", " / ".join(f"`{plain(text)}`" for text in f["on"][:3])))  # fmt: skip
    cross = summary["crosscoder"]
    lines += ["", row("latents of the crosscoder", *KINDS, "look tuned only", "shrinkage", "decoupling", "pass"),
              "|---" * (5 + len(KINDS)) + "|",
              row(f"{cross['used']} in use", *cross["kinds"].values(), cross["looks"], cross["shrinkage"],
                  cross["decoupling"], cross["passes"]), "", row("claim", "verdict"), "|---|---|"]  # fmt: skip
    return "\n".join(lines + [row(claim, told) for claim, told in summary["verdicts"].items()])


def picture(found: Mapping[str, Any]) -> Figure:
    """Densities of the dictionary, firing rates in both models, relative norms of the crosscoder."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    density = np.array(found["density"])
    left.hist(np.log10(density[density > 0]), bins=40, color="0.75", edgecolor="black", linewidth=0.4)
    left.set(xlabel="log10 of the share of held-out tokens", ylabel="latents", title="How often latents fire")
    rates, sure = np.array(found["features"]["rates"]), np.zeros(len(density), dtype=bool)
    sure[found["features"]["sure"]] = True
    low = max(1e-4, rates[rates > 0].min())
    rates = np.maximum(rates, low / 2)
    middle.scatter(*rates[:, ~sure], s=8, color="white", edgecolor="0.6", linewidth=0.5, label="others")
    middle.scatter(*rates[:, sure], s=18, color="black", marker="s", label="changed")
    middle.plot([low / 2, 1], [low / 2, 1], color="0.7", lw=0.8, zorder=0)
    first = next(iter(found["held out"]))
    middle.set(xscale="log", yscale="log", xlabel="base (far left: never)", ylabel="tuned", title=f"Rates on {first}")
    middle.legend(frameon=False, fontsize="small")
    right.hist(found["crosscoder"]["norms"], bins=np.linspace(0, 1, 41), color="0.75", edgecolor="black", lw=0.4)
    right.set(xlabel="relative norm: 0 base only, 1 tuned only", ylabel="latents", yscale="log",
              title="Latents of the crosscoder")  # fmt: skip
    for edge in (0.1, 0.9):
        right.axvline(edge, color="black", linestyle=":", lw=0.8)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure
