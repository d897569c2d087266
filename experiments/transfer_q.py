"""Does Transfer Q* beat best of n, and decoding by the SFT model's own values, at equal KL (arXiv:2405.20495)?

    python experiments/transfer_q.py            # three comparisons, five seeds
    python experiments/transfer_q.py --fast     # a few prompts, a check that it runs

| comparison | SFT model | aligned model | reward | look-ahead |
|---|---|---|---|---|
| sums | tiny-sums-sft | tiny-sums-grpo | 1 for the exact answer | greedy, as in the released code |
| strings | tiny-base | tiny-rotate | share of letters in their place | greedy |
| strings, sampled | the same | the same | the same | the mean of 4 samples |

Transfer Q* draws a token from the SFT model's best 10 by softmax(log p + Q / alpha), Q the reward of what the aligned
model writes behind it; controlled decoding is the same with the SFT model itself behind it. Five alphas; every seed has
its own 24 prompts, two completions each. All look-aheads go to the end of the answer.

The KL to the SFT model is measured. Of Transfer Q* and controlled decoding it is the sum of KL(policy || SFT) over the
tokens drawn, which with sampled look-aheads is an upper bound. Of best of n it follows from how often the SFT model
gets each reward (256 samples a prompt of sums, 1024 of strings): sum b log(b / p) over the values of the reward, p the
chance of one sample and b that of the best of n. Beside it stands the bound that papers plot, log n - (n - 1) / n.

At every alpha whose KL best of n reaches (n up to 64, or 256 for strings) the reward is compared with best of n's at
that KL, linear between two n; likewise with controlled decoding's, linear between its alphas and from the SFT model at
KL 0. What lies beyond the other's last point is compared with that point if it has the reward already, at less KL, and
left out if not. A seed's difference is the mean over alphas.

Known beforehand, by algebra: of a reward that is 0 or 1, best of n has the least KL of all policies that are right as
often on the prompt. Only how the KL is shared out over prompts is left to be better at. And the base rates of both
tasks: SFT models get a reward of 0.57 and 0.17, aligned ones of 0.98 and 0.99 (24 other prompts).

Looked at afterwards: the same difference to the best that any policy can do at that KL, p exp(r / t) normalised prompt
by prompt, over many t, out of the same samples as best of n.

Fixed before anything was scored: all but that. Held: the difference is above 0 with its interval over seeds, in
each of the comparisons; in some of them: in part.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arena import in_processes, mean_interval, rounded, write
from long_sums import told, verdict
from matplotlib.figure import Figure

from analysis.evaluate import load, respond
from analysis.style import bare, legend_below
from surgery import zoo
from surgery.decoding import Sampling
from surgery.logits.search import TransferQ
from surgery.models import encoded_prompts
from surgery.tasks import make_task
from surgery.tasks.base import marked_answer

COMPARISONS: dict[str, dict[str, Any]] = {
    "sums": {"task": "chain", "options": {"terms": [3, 4]}, "sft": "tiny-sums-sft", "aligned": "tiny-sums-grpo",
             "reward": "exact", "samples": 1, "ahead": 0.0, "pool": 256, "most": 64, "new": 22},
    "strings": {"task": "rotate", "options": {"length": [4, 6]}, "sft": "tiny-base", "aligned": "tiny-rotate",
                "reward": "share", "samples": 1, "ahead": 0.0, "pool": 1024, "most": 256, "new": 10},
    "strings, sampled": {"task": "rotate", "options": {"length": [4, 6]}, "sft": "tiny-base", "aligned": "tiny-rotate",
                         "reward": "share", "samples": 4, "ahead": 1.0, "pool": 1024, "most": 256, "new": 10},
}  # fmt: skip
ALPHAS = [2.0, 1.0, 0.5, 0.25, 0.125]
SETTINGS: dict[str, Any] = {"prompts": 24, "group": 2, "k": 10}
WAYS = ("Transfer Q*", "controlled")
TEMPERATURES = np.geomspace(8.0, 0.03, 20).tolist()
"""Of the best policies."""
OTHERS = {"best of n": "best of n", "bound": "best of n, by the bound", "controlled": "controlled decoding"}


def exact(text: str, answer: str) -> float:
    """1 for the exact answer."""
    return float(marked_answer(text) == answer)


def share(text: str, answer: str) -> float:
    """Share of letters in their place, of the longer of answer and what was asked for."""
    said = marked_answer(text) or ""
    return sum(a == b for a, b in zip(said, answer, strict=False)) / max(len(said), len(answer))


REWARDS: dict[str, Callable[[str, str], float]] = {"exact": exact, "share": share}


def run(
    name: str, seed: int, settings: Mapping[str, Any], alphas: Sequence[float], pool: int | None = None
) -> dict[str, Any]:
    """One seed of one comparison: (KL, reward, tokens) of both ways by alpha, and best of n by n."""
    what = COMPARISONS[name]
    (sft, tokenizer), (aligned, _) = (load(zoo.get(what[one])) for one in ("sft", "aligned"))
    task = make_task(what["task"], **what["options"])
    rows = [example.row(what["task"]) for example in task.examples(settings["prompts"], 7000 + seed)]
    answers, rate = {row["prompt"]: row["answer"] for row in rows}, REWARDS[what["reward"]]
    prompts = encoded_prompts(tokenizer, [row["prompt"] for row in rows])

    def reward(asked: list[str], texts: list[str]) -> list[float]:
        return [rate(text, answers[prompt]) for prompt, text in zip(asked, texts, strict=True)]

    found: dict[str, Any] = {}
    for way, behind in zip(WAYS, (aligned, sft), strict=True):
        found[way] = []
        for alpha in alphas:
            decoder = TransferQ(
                sft, behind, reward, tokenizer, alpha=alpha, k=settings["k"], lookahead=what["new"],
                samples=what["samples"], ahead=what["ahead"], max_new_tokens=what["new"], batch_size=1024,
            )  # fmt: skip
            drawn = decoder.decode(prompts, settings["group"], [(seed << 32) + i for i in range(len(prompts))])
            asked = [row["prompt"] for row in rows for _ in range(settings["group"])]
            rewards = reward(asked, [one.text for one in drawn.rollouts])
            tokens = (drawn.sft_tokens + drawn.aligned_tokens) / len(rewards)
            kl = float(np.mean([sum(each) for each in drawn.kl]))
            found[way].append({"alpha": alpha, "kl": kl, "reward": float(np.mean(rewards)), "tokens": tokens})
    groups = respond(sft, prompts, tokenizer, Sampling(what["new"], batch_size=2048), pool or what["pool"], seed)
    values = [[rate(one.text, row["answer"]) for one in group] for group, row in zip(groups, rows, strict=True)]
    length = float(np.mean([len(one.completion_ids) for group in groups for one in group]))
    found["frontier"] = [tilted(values, t) for t in TEMPERATURES]
    ns = [2**i for i in range(what["most"].bit_length())]
    found["best of n"] = [{"n": n, "tokens": n * length, **best_of(values, n)} for n in ns]
    return found


def best_of(values: Sequence[Sequence[float]], n: int) -> dict[str, float]:
    """Mean reward and KL of the best of n, out of samples of each prompt; the bound on the KL."""
    kls, rewards = [], []
    for each in values:
        levels, counts = np.unique(each, return_counts=True)
        p = counts / counts.sum()
        up_to = np.cumsum(p)
        b = up_to**n - np.concatenate([[0.0], up_to[:-1]]) ** n
        with np.errstate(divide="ignore", invalid="ignore"):
            kls.append(np.where(b > 0, b * np.log(b / p), 0.0).sum())
        rewards.append((b * levels).sum())
    bound = float(np.log(n) - (n - 1) / n)
    return {"kl": float(np.mean(kls)), "bound": bound, "reward": float(np.mean(rewards))}


def tilted(values: Sequence[Sequence[float]], temperature: float) -> dict[str, float]:
    """Mean reward and KL of p exp(reward / temperature), which no policy of that KL exceeds."""
    kls, rewards = [], []
    for each in values:
        levels, counts = np.unique(each, return_counts=True)
        p = counts / counts.sum()
        b = p * np.exp((levels - levels.max()) / temperature)
        b /= b.sum()
        kls.append((b * np.log(np.maximum(b / p, 1e-300))).sum())
        rewards.append((b * levels).sum())
    return {"kl": float(np.mean(kls)), "reward": float(np.mean(rewards))}


def at_equal_kl(found: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """By alpha: Transfer Q*'s reward minus that of each other way at its KL; None where that is not known."""
    best, start = found["best of n"], found["best of n"][0]["reward"]
    own = sorted([(0.0, start), *((point["kl"], point["reward"]) for point in found["controlled"])])
    lines = {
        "best of n": [(point["kl"], point["reward"]) for point in best],
        "bound": [(point["bound"], point["reward"]) for point in best],
        "controlled": own,
        "frontier": [(0.0, start), *((point["kl"], point["reward"]) for point in found["frontier"])],
    }
    differences: dict[str, list[float | None]] = {}
    for other, line in lines.items():
        x, y = zip(*line, strict=True)
        differences[other] = [
            None if point["kl"] > max(x) and point["reward"] > y[-1] else point["reward"] - np.interp(point["kl"], x, y)
            for point in found["Transfer Q*"]
        ]
    return differences


def summarised(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """By comparison: the curves, the differences at equal KL by alpha and over them, the verdicts."""
    summary: dict[str, Any] = {"comparisons": {}}
    for name, each in runs.items():
        one: dict[str, Any] = {"alphas": []}
        differences = [at_equal_kl(found) for found in each]
        for i, point in enumerate(each[0]["Transfer Q*"]):
            line: dict[str, Any] = {"alpha": point["alpha"]}
            for way in WAYS:
                line[way] = {what: mean_interval([found[way][i][what] for found in each])
                             for what in ("kl", "reward", "tokens")}  # fmt: skip
            for other in OTHERS:
                values = [v for v in (found[other][i] for found in differences) if v is not None]
                line[f"over {other}"] = mean_interval(values) if values else None
            one["alphas"].append(line)
        for curve in ("best of n", "frontier"):
            one[curve] = [
                {
                    key: value if key == "n" else float(np.mean([found[curve][i][key] for found in each]))
                    for key, value in point.items()
                }
                for i, point in enumerate(each[0][curve])
            ]
        one["over"] = {}
        for other in [*OTHERS, "frontier"]:
            means = [[v for v in found[other] if v is not None] for found in differences]
            over = mean_interval([float(np.mean(v)) for v in means if v]) if any(means) else None
            one["over"][other] = over
            if other in OTHERS:
                one[f"verdict over {other}"] = "not reached" if over is None else verdict(over)
        summary["comparisons"][name] = one
    for other in OTHERS:
        said = [one[f"verdict over {other}"] for one in summary["comparisons"].values()]
        held = [v == "held" for v in said]
        summary[f"verdict over {other}"] = "held" if all(held) else "in part" if any(held) else "did not hold"
    return summary


def markdown(summary: Mapping[str, Any]) -> str:
    """A line a comparison and alpha, then one a comparison with what is claimed."""
    heads = ["comparison", "alpha", "KL", "reward", "over best of n", "over best of n, by the bound",
             "over controlled decoding", "controlled: KL", "controlled: reward", "tokens read an answer"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, one in summary["comparisons"].items():
        for line in one["alphas"]:
            ours, theirs = (line[way] for way in WAYS)
            over = [line[f"over {other}"] for other in OTHERS]
            cells = [name, f"{line['alpha']:g}", told(ours["kl"]), told(ours["reward"])]
            cells += ["" if cell is None else told(cell, sign="+") for cell in over]
            cells += [told(theirs["kl"]), told(theirs["reward"]), f"{ours['tokens']['mean']:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    heads = ["at equal KL, Transfer Q* over", *OTHERS.values(), "the best of all policies"]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, one in summary["comparisons"].items():
        cells = [name]
        for other in OTHERS:
            over, said = one["over"][other], one[f"verdict over {other}"]
            cells.append(said if over is None else f"{told(over, 3, '+')}: {said}")
        cells.append("" if one["over"]["frontier"] is None else told(one["over"]["frontier"], 3, "+"))
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("| " + " | ".join(["all", *(summary[f"verdict over {other}"] for other in OTHERS), ""]) + " |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any]) -> Figure:
    """Reward over KL, a panel a comparison."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, len(summary["comparisons"]), sharey=True)
    for axis, (name, one) in zip(panels, summary["comparisons"].items(), strict=True):
        lines = {
            "Transfer Q*": ([line["Transfer Q*"] for line in one["alphas"]], "o", "-", "black", "black"),
            "controlled decoding": ([line["controlled"] for line in one["alphas"]], "s", "--", "0.45", "white"),
            "best of n": (one["best of n"], "x", "-.", "#b0413e", None),
            "best of n, by the bound": (one["best of n"], "+", ":", "#b0413e", None),
            "best of all policies": (one["frontier"], "", "-", "0.75", None),
        }
        for label, (points, marker, dash, colour, face) in lines.items():
            key = "bound" if "bound" in label else "kl"
            x, y = ([middle(point[what]) for point in points] for what in (key, "reward"))
            axis.plot(x, y, marker=marker, linestyle=dash, color=colour, markerfacecolor=face, lw=1.3, ms=5,
                      label=label if axis is panels[0] else None, zorder=1 if not marker else 2)  # fmt: skip
        reached = [middle(point["kl"]) for points, *_ in lines.values() for point in points]
        axis.set(title=name, xlabel="KL to the SFT model, nats", xlim=(-0.02 * max(reached), 1.1 * max(reached)))
        axis.set_ylim(0.15, 1.03)
        bare(axis)
    panels[0].set_ylabel("reward")
    legend_below(figure)
    return figure


def middle(value: Any) -> float:
    """A number, or the mean that comes with an interval."""
    return float(value["mean"] if isinstance(value, Mapping) else value)


def check(report: Mapping[str, Any]) -> None:
    """A fast run: the smallest alpha has a larger KL and reward than the largest one; the KL stays below the bound."""
    for one in report["summary"]["comparisons"].values():
        weak, strong = one["alphas"][0]["Transfer Q*"], one["alphas"][-1]["Transfer Q*"]
        assert strong["kl"]["mean"] > weak["kl"]["mean"] > 0
        assert strong["reward"]["mean"] > max(0.5, weak["reward"]["mean"] - 0.01)
        assert all(point["kl"] <= point["bound"] + 1e-9 for point in one["best of n"])
        assert one["best of n"][0]["kl"] == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of prompts and sampling")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=1, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="a few prompts: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    settings, seeds, workers, alphas, pool = SETTINGS, options.seeds, options.workers, ALPHAS, None
    if options.fast:
        settings, seeds, workers = {**SETTINGS, "prompts": 3, "group": 1, "k": 4}, [0], 1
        alphas, pool = [ALPHAS[0], ALPHAS[-1]], 32
    jobs = [(name, seed) for name in COMPARISONS for seed in seeds]
    done = dict(zip(jobs, in_processes(run, [(*job, settings, alphas, pool) for job in jobs], workers), strict=True))
    summary = summarised({name: [done[name, seed] for seed in seeds] for name in COMPARISONS})
    report = {"comparisons": COMPARISONS, "settings": settings, "seeds": seeds, "summary": summary}
    path = write(options.out, "transfer_q", report, picture(summary), began)
    print(markdown(rounded(summary)))
    print(path)


if __name__ == "__main__":
    main()
