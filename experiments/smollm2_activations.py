"""A real model from the inside: SmolLM2-135M-Instruct, and what a few steps of SFT on SVAMP change in its activations.

    SURGERY_DATA=... python experiments/smollm2_activations.py     # the fine-tuning is kept in the cache
    python experiments/smollm2_activations.py --fast               # tiny-base and tiny-chain, a check that it runs

The fine-tuning is 24 steps of 8 problems in the chat template (`RECIPE`, by `finetune_smollm2.py`); both models are
read in float32. Without the model or the data the script says so and ends.

* TuCo of held-out problems in the template, of tinyshakespeare (plain, and as a user's turn in the template) cut to the
  same numbers of tokens, of other requests in the template, and of the problems without it.
* Patching: "When Mary and John went to the store, John gave a drink to" -> " Mary"; corrupt: "Mary gave". 16 pairs,
  every name and thing one token. Stream by position and heads (z, all positions) into the corrupt run, both models.
  CPU seconds of each sweep, and what one forward a cell would take: measured on a few cells, extrapolated to all.
* Diff: KL(tuned || base) of next tokens and the relative norm of the difference by layer, on the problems and on plain
  tinyshakespeare. The template's own tokens, the same in all problems, are left out.

Held: (1) the AUC of TuCo of problems over plain tinyshakespeare is above 0.5 with its interval, and over both other
sets in the template (one of the two: in part); (2) fine-tuning on sums leaves the circuit where it was: the recovery
maps of both models correlate by 0.9 or more over cells, heads and stream (one of them: in part); (3) KL a token is
higher on problems than on tinyshakespeare: the interval of the difference is above 0.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from arena import one_thread, rounded, write
from finetune_smollm2 import cached
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from analysis.diff import diff
from analysis.diff.per_token import PerToken
from analysis.metrics import answer_tokens, logit_diff
from analysis.patching import patch
from analysis.similarity import auc
from analysis.style import SIGNED
from analysis.tuco import tuco
from surgery.errors import SurgeryError
from surgery.models import Pair, encoded_prompts, load
from surgery.tasks import TASKS, svamp
from surgery.zoo import get

RECIPE = {"data": "svamp", "steps": 24, "size": 8, "lr": 5e-5, "seed": 0, "longest": 120}
SITES = {"resid_pre": "stream by position", "z": "heads, all positions"}
NAMES = (("Mary", "John"), ("Tom", "James"), ("Sarah", "David"), ("Anna", "Peter"), ("Kate", "Paul"),
         ("Jack", "Emma"), ("Mark", "Laura"), ("Simon", "Alice"))  # fmt: skip
PLACES = ("store", "park", "school", "office")
THINGS = ("drink", "book", "ball", "ring")
ABOUT = ("the sea", "bread", "a good friend", "winter", "the moon", "gardens", "music", "trains")
REQUESTS = (
    "Write a short poem about {}.", "What do you know about {}? Tell me in two sentences.",
    "Give me three reasons to like {}.", 'Translate "I like {}" into French.', "Tell me a story that begins with {}.",
)  # fmt: skip
CONTRASTS = ("Shakespeare", "Shakespeare in the template", "requests in the template", "problems, plain")
"""What `problems` are compared with. The first is the claim's; of the last nothing is claimed."""


@dataclass(frozen=True)
class Prompts:
    """What both models read: sets for TuCo and diff as token ids, and pairs for patching with their two answers."""

    sets: dict[str, list[list[int]]]
    frame: int
    """Tokens at the beginning that all problems share."""
    clean: list[list[int]]
    corrupt: list[list[int]]
    answers: list[list[int]]
    labels: list[str]
    """The position axis: a token, or what stands there."""


# ---- models and prompts


def shakespeare(tokenizer: Any, lengths: Sequence[int], rng: Random) -> list[list[int]]:
    """Pieces of tinyshakespeare, of so many tokens each, from anywhere. Raises `SurgeryError` without the data."""
    file = Path(os.environ.get("SURGERY_DATA", "")) / "tinyshakespeare" / "input.txt"
    if not os.environ.get("SURGERY_DATA") or not file.is_file():
        raise SurgeryError("tinyshakespeare is missing.", hint="Set SURGERY_DATA to a folder with tinyshakespeare/.")
    text, found = file.read_text(encoding="utf-8"), []
    for length in lengths:
        at = rng.randrange(len(text) - 12 * length)
        start = text.index(" ", at) + 1  # a word begins
        found.append(tokenizer(text[start : start + 12 * length], add_special_tokens=False)["input_ids"][:length])
    return found


def real_prompts(tokenizer: Any, n: int) -> Prompts:
    """`n` prompts a set, and 16 pairs of sentences on who gets what."""
    rng = Random("smollm2")
    plain = [e.prompt for e in svamp("test", n)]
    problems = encoded_prompts(tokenizer, plain, chat=True)
    alone = encoded_prompts(tokenizer, plain)
    requests = [r.format(a) for r in REQUESTS for a in ABOUT]
    spoken = shakespeare(tokenizer, [len(ids) for ids in alone], rng)
    sets = {
        "problems": problems,
        "Shakespeare": shakespeare(tokenizer, [len(ids) for ids in problems], rng),
        "Shakespeare in the template": encoded_prompts(tokenizer, [tokenizer.decode(s) for s in spoken], chat=True),
        "requests in the template": encoded_prompts(tokenizer, rng.sample(requests, min(n, len(requests))), chat=True),
        "problems, plain": alone,
    }
    shared = [ids[: min(map(len, problems))] for ids in problems]
    frame = next(i for i, column in enumerate(zip(*shared, strict=True)) if len(set(column)) > 1)
    clean, corrupt, answers = [], [], []
    for i in range(16):
        other, subject = NAMES[i // 2]
        first, second = (other, subject) if i % 2 else (subject, other)
        text = f"When {first} and {second} went to the {PLACES[i % 4]}, {{}} gave a {THINGS[i // 4]} to"
        clean.append(tokenizer(text.format(subject))["input_ids"])
        corrupt.append(tokenizer(text.format(other))["input_ids"])
        answers.append(answer_tokens(tokenizer, [f" {other}", f" {subject}"]).tolist())
    widths = {len(ids) for ids in [*clean, *corrupt]}
    if len(widths) > 1:
        raise SurgeryError(f"The sentences have {sorted(widths)} tokens: a name or thing is more than one token.")
    words = ["When", "name", "and", "name", "went", "to", "the", "place", ",", "giver", "gave", "a", "thing", "to"]
    labels = [*[""] * (widths.pop() - len(words)), *words]
    return Prompts(sets, frame, clean, corrupt, answers, labels)


def tiny_prompts(tokenizer: Any, n: int) -> Prompts:
    """The same shapes for the tiny family: sums, strings, and pairs of sums that begin with different digits."""
    sums, strings, longer = (
        encoded_prompts(tokenizer, [e.prompt for e in TASKS.lookup(t).examples(n)]) for t in ("chain", "shift", "copy")
    )
    sets = dict(zip(("problems", *CONTRASTS), (sums, strings, longer, strings, sums), strict=True))
    pairs = [(str(i), str((i + 3) % 10)) for i in range(4)]
    clean, corrupt = (encoded_prompts(tokenizer, [f"m {p[side]}+5-2=" for p in pairs]) for side in (0, 1))
    answers = [answer_tokens(tokenizer, list(p)).tolist() for p in pairs]
    return Prompts(sets, 3, clean, corrupt, answers, ["<bos>", *"m", "_", "digit", *"+5-2="])


# ---- measuring


def contributions(pair: Pair, prompts: Prompts) -> dict[str, Any]:
    """TuCo of every prompt by set, and AUCs of problems over the other sets."""
    values = {name: tuco(pair, ids, batch_size=8).value for name, ids in prompts.sets.items()}
    found: dict[str, Any] = {"values": {name: one.values.tolist() for name, one in values.items()}, "sets": {}}
    for name, one in values.items():
        length = float(np.mean([len(ids) for ids in prompts.sets[name]]))
        found["sets"][name] = {**span(one), "tokens": length, "n": len(one)}
        if name != "problems":
            area = auc(values["problems"].values, one.values)
            found["sets"][name]["auc"] = {"value": float(area.value), "low": float(area.low), "high": float(area.high)}
    return found


def span(result: Any) -> dict[str, float]:
    """Mean and interval of a result over examples."""
    low, high = result.interval()
    return {"mean": float(result.mean), "low": float(low), "high": float(high)}


def swept(model: Any, prompts: Prompts) -> dict[str, Any]:
    """Recovery by layer and position, and by layer and head, with the CPU seconds that it took."""
    metric = logit_diff(prompts.answers)
    first = next(i for i, (a, b) in enumerate(zip(prompts.clean[0], prompts.corrupt[0], strict=True)) if a != b)
    places = list(range(first, len(prompts.clean[0])))
    found: dict[str, Any] = {"labels": [prompts.labels[i] for i in places]}
    for site in SITES:
        words: dict[str, Any] = {"site": site, **({"positions": places} if site == "resid_pre" else {})}
        began = time.process_time()
        effects = patch(model, prompts.clean, prompts.corrupt, metric, **words)
        seconds = time.process_time() - began
        middle, few = len(effects.axes["layer"]) // 2, 3
        part: dict[str, Any] = {"positions": places[:few]} if site == "resid_pre" else {"parts": list(range(few))}
        began = time.process_time()
        whole = patch(model, prompts.clean, prompts.corrupt, metric, site=site, layers=[middle], reuse=False, **part)
        each = (time.process_time() - began) / (whole.mean.size + 2)  # and the two runs that are not changed
        recovery = effects.normalized()
        found[site] = {
            "recovery": recovery.mean.tolist(),
            "cells": recovery.mean.size,
            "seconds": seconds,
            "whole": {"cells": whole.mean.size, "seconds": each, "extrapolated": each * recovery.mean.size,
                      "apart": float(abs(whole.values[:, 0] - effects.values[:, middle, :few]).max())},
        }  # fmt: skip
        columns = {name: np.asarray(effects.columns[name]) for name in ("clean", "corrupt")}
        found["logit diff"] = {name: float(column.mean()) for name, column in columns.items()}
        found["right"] = float((columns["clean"] > 0).mean())
    return found


def compared(pair: Pair, prompts: Prompts) -> dict[str, Any]:
    """KL a token and relative norms by layer on problems and plain tinyshakespeare, means by text."""
    found: dict[str, Any] = {}
    means: dict[str, np.ndarray] = {}
    for name in ("problems", "Shakespeare"):
        seen = diff(pair, prompts.sets[name], measures=["kl", "norms"], batch_size=4)
        kl, norms = seen["kl"], seen["relative norms"]
        assert isinstance(kl, PerToken) and isinstance(norms, PerToken) and norms.layers is not None
        skip = prompts.frame if name == "problems" else 0
        means[name] = np.array([kl.of(i)[skip:].mean() for i in range(len(kl.texts))])
        by_layer = [float(np.mean([norms.of(i, l)[skip:].mean() for i in range(len(kl.texts))])) for l in norms.layers]
        found[name] = {"kl": float(means[name].mean()), "relative norms": by_layer}
    low, high = differs(means["problems"], means["Shakespeare"])
    found["difference"] = {"mean": found["problems"]["kl"] - found["Shakespeare"]["kl"], "low": low, "high": high}
    return found


def differs(ours: np.ndarray, theirs: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of mean(ours) - mean(theirs), of independent texts."""
    rng = np.random.default_rng(0)
    drawn = [rng.choice(x, (resamples, len(x))).mean(1) for x in (ours, theirs)]
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    return float(low), float(high)


def alike(found: Mapping[str, Any]) -> dict[str, float]:
    """Correlation of both models' recovery over all cells, by site."""
    both = found["base"], found["tuned"]
    return {site: float(np.corrcoef([np.ravel(one[site]["recovery"]) for one in both])[0, 1]) for site in SITES}


def summarised(
    contributed: Mapping[str, Any], patched: Mapping[str, Any], changed: Mapping[str, Any]
) -> dict[str, Any]:
    """All numbers of the tables, and the verdicts of the docstring."""
    sets, correlation = contributed["sets"], alike(patched)
    above = [sets[name]["auc"]["low"] > 0.5 for name in CONTRASTS[:3]]
    parts = {"TuCo": (above[0], above[1] and above[2]), "circuit": [r >= 0.9 for r in correlation.values()],
             "KL": [changed["difference"]["low"] > 0]}  # fmt: skip
    verdicts = {k: "held" if all(v) else "in part" if any(v) else "did not hold" for k, v in parts.items()}
    kept = {m: {k: v for k, v in one.items() if k not in SITES} for m, one in patched.items()}
    for model, one in patched.items():
        for site in SITES:
            kept[model][site] = {k: v for k, v in one[site].items() if k != "recovery"} | {"top": top(one, site)}
    return {"TuCo": sets, "patching": kept, "correlation": correlation, "diff": changed, "verdicts": verdicts}


def top(found: Mapping[str, Any], site: str) -> list[tuple[str, float]]:
    """The three cells that recover the most, by name: layer.head, or layer and token."""
    recovery = np.array(found[site]["recovery"])
    cells = [np.unravel_index(i, recovery.shape) for i in np.argsort(-recovery, axis=None)[:3]]
    names = [f"{l}.{c}" if site == "z" else f"{l} {found['labels'][c]}" for l, c in cells]
    return [(name, float(recovery[cell])) for name, cell in zip(names, cells, strict=True)]


# ---- telling


def markdown(summary: Mapping[str, Any]) -> str:
    """TuCo by set, the sweeps, and what diff finds."""
    lines = ["| prompts | n | tokens | TuCo | AUC of problems over them |", "|---" * 5 + "|"]
    for name, found in summary["TuCo"].items():
        area = "{value:.2f} [{low:.2f}, {high:.2f}]".format(**found["auc"]) if "auc" in found else ""
        lines.append(f"| {name} | {found['n']} | {found['tokens']:.0f} | {interval(found, 3)} | {area} |")
    heads = ["model", "logit difference, clean", "corrupt", "sweep", "cells", "recover the most", "CPU seconds",
             "one forward a cell (extrapolated)"]  # fmt: skip
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for model, found in summary["patching"].items():
        ends = [f"{found['logit diff'][end]:.2f}" for end in ("clean", "corrupt")]
        for site, what in SITES.items():
            one = found[site]
            most = ", ".join(f"{name} ({value:.2f})" for name, value in one["top"])
            cells = [model, *ends, what, str(one["cells"]), most, f"{one['seconds']:.0f}",
                     f"{one['whole']['extrapolated']:.0f}"]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    changed = summary["diff"]
    lines += [
        "",
        "| text | KL a token, nats | relative norm, first layer | middle | last |",
        "|---" * 5 + "|",
    ]
    for name in ("problems", "Shakespeare"):
        norms = changed[name]["relative norms"]
        parts = " | ".join(f"{norms[i]:.3f}" for i in (0, len(norms) // 2, -1))
        lines.append(f"| {name} | {changed[name]['kl']:.3f} | {parts} |")
    lines.append(f"| difference | {interval(changed['difference'], 3, '+')} | | | |")
    return "\n".join(lines)


def interval(found: Mapping[str, float], digits: int, sign: str = "") -> str:
    return "{mean:{f}} [{low:{f}}, {high:{f}}]".format(**found, f=f"{sign}.{digits}f")


def picture(report: Mapping[str, Any]) -> Figure:
    """Recovery by position and by head of both models, TuCo of every prompt, and norms by layer."""
    figure = Figure(figsize=(12.5, 8), layout="constrained")
    grid = figure.subplots(2, 4, width_ratios=[1, 1, 1.25, 1.25])
    for row, model in enumerate(("base", "tuned")):
        found = report["patching"][model]
        for column, (site, what) in enumerate(SITES.items()):
            axis, values = grid[row, column], np.array(found[site]["recovery"])
            largest = max(np.abs(report["patching"][m][site]["recovery"]).max() for m in ("base", "tuned"))
            image = recovery_map(axis, values, float(largest))
            labels = found["labels"] if site == "resid_pre" else list(map(str, range(values.shape[1])))
            axis.set_xticks(range(values.shape[1]), labels, rotation=45 if site == "resid_pre" else 0)
            axis.set(title=f"{model}: {what}", xlabel="position" if site == "resid_pre" else "head", ylabel="layer")
            axis.yaxis.set_major_locator(MaxNLocator(integer=True))
            figure.colorbar(image, ax=axis, label="recovery (hatched: negative)", aspect=30)
    for axis in grid[:, 2:].ravel():
        axis.remove()
    upper, lower = (figure.add_subplot(grid[row, 2].get_gridspec()[row, 2:]) for row in (0, 1))
    for i, values in enumerate(report["TuCo"].values()):
        upper.boxplot([values], positions=[i], widths=0.5, whis=(5, 95), showfliers=False, manage_ticks=False,
                      medianprops={"color": "black", "linewidth": 2})  # fmt: skip
        sideways = np.random.default_rng(i).uniform(-0.18, 0.18, len(values))
        upper.scatter(i + sideways, values, s=8, color="0.5", zorder=0)
    upper.set_xticks(range(len(report["TuCo"])), [n.replace(" in the", "\nin the") for n in report["TuCo"]], fontsize=8)
    upper.set(ylabel="TuCo", title="tuning contribution, every prompt", ylim=(0, None))
    for name, style in (("problems", "ko-"), ("Shakespeare", "ks--")):
        lower.plot(report["summary"]["diff"][name]["relative norms"], style, label=name, markersize=4,
                   markerfacecolor="black" if name == "problems" else "white")  # fmt: skip
    lower.set(xlabel="layer", ylabel="||difference|| / ||base||", title="what fine-tuning changed", ylim=(0, None))
    lower.legend(frameon=False)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def recovery_map(axis: Axes, values: np.ndarray, limit: float) -> Any:
    """White at 0, dark at the limit, negative cells hatched."""
    image = axis.imshow(values, aspect="auto", cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
    for row, column in np.argwhere(values < -0.08 * limit):
        axis.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor="0.9", linewidth=0)
        )
    return image


def check(report: Mapping[str, Any]) -> None:
    """A fast run: sums use fine-tuning more than strings do, whole forwards agree, and the stream recovers all."""
    assert report["summary"]["TuCo"]["Shakespeare"]["auc"]["value"] > 0.9
    for found in report["summary"]["patching"].values():
        assert found["logit diff"]["clean"] > found["logit diff"]["corrupt"]
        assert all(found[site]["whole"]["apart"] < 1e-4 for site in SITES)
    for found in report["patching"].values():
        assert abs(np.array(found["resid_pre"]["recovery"])[0, 0] - 1) < 1e-4, "the place where they differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=24, help="prompts a set (40 at most)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--fast", action="store_true", help="the tiny pair: shows that it runs")
    options, began = parser.parse_args(), time.perf_counter()
    one_thread()
    try:
        if options.fast:
            pair, trained = Pair.load("tiny-base", "tiny-chain"), {}
            prompts = tiny_prompts(pair.tokenizer, 8)
        else:
            prompts = real_prompts(load(get("smollm2"))[1], min(options.n, len(REQUESTS) * len(ABOUT)))
            folder = cached(RECIPE)
            pair = Pair.load(get("smollm2"), folder, dtype="float32")
            trained = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    except SurgeryError as error:
        print(f"Nothing was run: {error}")
        return
    contributed = contributions(pair, prompts)
    print({name: rounded(found["mean"]) for name, found in contributed["sets"].items()}, flush=True)
    patched = {name: swept(model, prompts) for name, model in (("base", pair.base), ("tuned", pair.tuned))}
    summary = summarised(contributed, patched, compared(pair, prompts))
    report = {"training": trained, "summary": summary, "TuCo": contributed["values"], "patching": patched}
    path = write(options.out, "smollm2_activations", report, picture(report), began)
    print(markdown(rounded(summary)))
    print(summary["correlation"], summary["verdicts"], path, sep="\n")


if __name__ == "__main__":
    main()
