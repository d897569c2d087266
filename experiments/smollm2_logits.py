"""A real model's fine-tunings at the output: interpolated, amplified, mixed, contrasted, borrowed by a larger model.

    SURGERY_DATA=... python experiments/smollm2_logits.py     # the two fine-tunings are kept in the cache
    python experiments/smollm2_logits.py --fast               # tiny-base, tiny-chain, tiny-shift: a check that it runs

SmolLM2-135M-Instruct and two short fine-tunings of it (`RECIPES`, by `finetune_smollm2.py`), read in float32, asked in
the chat template. Without the model or the data the script says so and ends.

* base + beta (tuned - base) in log-probabilities, and base + beta (tuned - base) in weights: mean log-probability of
  held-out reference solutions, and greedy accuracy. For a given text the former is concave in beta (a log-linear
  family), so that one peak is no finding; where it lies is.
* base + a (first - base) + b (second - base), in both spaces.
* Which tokens of the solutions carry the difference, and texts sampled from tuned - base (CGE's scores and filter, no
  beams) behind prompts that say nothing of the fine-tuning: how many of them have its form?
* A larger model with the same distribution: neurons split in two, layers inserted that add nothing, rows of vocabulary
  that stand for no token. Borrowing must give the fine-tuning itself. That is a check of the path, not a claim: no
  larger model of this tokenizer could be had.

Held: (1) both fine-tunings' solutions are likelier at some beta above 1 than at 1 (one: in part); (2) half of each
raises both sets above the base's, with their intervals; (3) more texts of the contrast than of the tuned model have
the form behind an empty turn: the interval of the difference is above 0, for both fine-tunings; (4) at beta 3, far
beyond what was trained, log-probabilities hold better than weights: the same, for both.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena import one_thread, rounded, write
from finetune_smollm2 import cached
from matplotlib.figure import Figure
from upscaled import borrowed, count, upscaled

from analysis.evaluate import accuracy, answer_log_likelihood
from analysis.resampling import bootstrap
from analysis.results import Result
from surgery.decoding import Sampling
from surgery.errors import SurgeryError
from surgery.logits import Ensemble, generate, log_likelihood, member, rules
from surgery.logits.combine import combine, normalised
from surgery.models import encoded_prompts, load
from surgery.tasks import TASKS, Example, gsm8k, same_number, svamp
from surgery.weights.vector import TaskVector
from surgery.zoo import get

RECIPES = {
    "gsm8k": {"data": "gsm8k", "steps": 40, "size": 8, "lr": 5e-5, "seed": 0, "longest": 160},
    "svamp": {"data": "svamp", "steps": 24, "size": 8, "lr": 5e-5, "seed": 0, "longest": 120},
}
BETAS = (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
MIXES = ((1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0), (1.0, 1.0))
"""Weights of the first and the second fine-tuning."""
REQUESTS = (
    "Write a short poem about the sea.", "What do you know about bread?", "Give me a reason to like winter.",
    "Translate 'good morning' into French.", "Tell me a story.", "Who wrote Hamlet?", "Describe a garden.", "Hello!",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A base, two fine-tunings of it, and what they are asked."""

    base: Path
    tuned: Mapping[str, Path]
    problems: Mapping[str, list[Example]]
    """Held out, by fine-tuning."""
    correct: Callable[[str, Example], bool]
    asked: str
    """The problems that are answered, not only scored."""
    longest: int
    bare: str
    """Text of a request that says nothing."""
    requests: Sequence[str]
    mark: Mapping[str, str]
    """What texts of a fine-tuning's form have."""
    chat: bool


def real(n: int) -> Family:
    """SmolLM2; `n` problems of the second data set, half as many of the first."""
    data = {"gsm8k": gsm8k("test", n // 2), "svamp": svamp("test", n)}
    tuned = {name: cached(recipe) for name, recipe in RECIPES.items()}
    return Family(get("smollm2"), tuned, data, same_number, "svamp", 64, "", REQUESTS, dict.fromkeys(tuned, "####"),
                  chat=True)  # fmt: skip


def tiny() -> Family:
    """The same shapes in seconds. The form of sums is to be worked out; of shifted letters there is none to be seen."""
    task = TASKS.lookup("chain")
    data = {name: TASKS.lookup(name).examples(12, 1) for name in ("chain", "shift")}
    words = [e.prompt for e in TASKS.lookup("copy").examples(8, 1)]
    tuned = {name: get(f"tiny-{name}") for name in data}
    return Family(
        get("tiny-base"), tuned, data, task.correct, "chain", 36, "", words, {"chain": ";", "shift": "#"}, False
    )


# ---- likelihood


def likelihoods(
    ensemble: Ensemble,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[str],
    weightings: Mapping[str, Sequence[float]],
) -> tuple[dict[str, list[float]], list[tuple[list[int], np.ndarray]]]:
    """Mean log-probability (nats a token) of each response under every weighting of the members, read once.

    And what each member gave each token: (ids, (member, pos)) by response.
    """
    found: dict[str, list[float]] = {name: [] for name in weightings}
    told = []
    end = [ensemble.tokenizer.eos_token_id]
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            ids = ensemble.tokenizer(response, add_special_tokens=False)["input_ids"] + end
            _, state = ensemble.prefill_encoded([ensemble.encode(list(prompt))])
            first = [one[0, -1:] for one in state.log_probs]
            ensemble.read(torch.tensor([ids[:-1]]), state)
            members = [torch.cat([a, b[0]]) for a, b in zip(first, state.log_probs, strict=True)]
            target = torch.tensor(ids)[:, None]
            for name, weights in weightings.items():
                first_positive = next(i for i, weight in enumerate(weights) if weight > 0)  # the composition's base
                scores = normalised(combine(members, weights, first_positive))
                found[name].append(float(scores.gather(1, target).mean()))
            told.append((ids, torch.stack([one.gather(1, target)[:, 0] for one in members]).numpy()))
    return found, told


def weightings(names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """By name, the weights of (base, first, second): betas of each fine-tuning, and mixtures."""
    found: dict[str, tuple[float, ...]] = {}
    for i, name in enumerate(names):
        for beta in BETAS:
            found[f"{name} {beta:g}"] = (1 - beta, *(beta if j == i else 0.0 for j in range(len(names))))
    return found | {f"mix {a:g} {b:g}": (1 - a - b, a, b) for a, b in MIXES}


def in_weights(family: Family) -> dict[str, dict[str, list[float]]]:
    """The same by vectors: {weighting: {data: values}}; a fine-tuning alone is only read on its own data."""
    vectors = {name: TaskVector.between(family.base, folder) for name, folder in family.tuned.items()}
    model, tokenizer = load(family.base, "float32")
    first, second = vectors
    jobs = {f"{n} {b:g}": (b * v, [n]) for n, v in vectors.items() for b in BETAS if b}
    jobs |= {f"mix {a:g} {b:g}": (a * vectors[first] + b * vectors[second], [first, second]) for a, b in MIXES if a * b}
    found: dict[str, dict[str, list[float]]] = {}
    for name, (vector, data) in jobs.items():
        with vector.applied(model):
            for d in data:
                asked, answers = zip(*((e.prompt, e.response) for e in family.problems[d]), strict=True)
                likely = answer_log_likelihood(model, tokenizer, asked, answers, chat=family.chat, batch_size=4)
                found.setdefault(name, {})[d] = likely.values.tolist()
        print(f"weights, {name}: { ({d: round(float(np.mean(v)), 3) for d, v in found[name].items()}) }", flush=True)
    return found


# ---- contrast


def contrasts(tokenizer: Any, told: Sequence[tuple[list[int], np.ndarray]], at: int) -> list[dict[str, Any]]:
    """The tokens of the solutions that carry the most of log p_tuned - log p_base, member `at` being the tuned one."""
    gains: dict[int, list[float]] = {}
    for ids, values in told:
        for token, gain in zip(ids, values[at] - values[0], strict=True):
            gains.setdefault(token, []).append(float(gain))
    total = sum(map(sum, gains.values()))
    best = sorted(gains, key=lambda token: -sum(gains[token]))[:6]
    return [{"token": tokenizer.decode([t]), "times": len(gains[t]), "gain": float(np.mean(gains[t])),
             "share": sum(gains[t]) / total} for t in best]  # fmt: skip


def explored(family: Family, members: Mapping[str, Ensemble], samples: int) -> dict[str, Any]:
    """Texts of the base, a tuned model and their contrast behind prompts of no task: which have the form?"""
    base, tokenizer = members["base"], members["base"].tokenizer
    bare, *requests = encoded_prompts(tokenizer, [family.bare, *family.requests], family.chat)
    asked = {"an empty turn": [bare] * len(requests), "other requests": requests}
    sampling = Sampling(48 if family.chat else 36, temperature=1.0, batch_size=64)
    found: dict[str, Any] = {}
    for name in family.tuned:
        who = {"base": base, "tuned": members[name], "contrast": rules.cge(members[name], base)}
        for kind, prompts in asked.items():
            texts = {w: [one.text for one in generate(e, prompts, sampling=sampling, group=samples, seed=1)]
                     for w, e in who.items()}  # fmt: skip
            marked = {w: [float(family.mark[name] in text) for text in each] for w, each in texts.items()}
            found.setdefault(name, {})[kind] = {
                "n": len(prompts) * samples, **{w: span(values) for w, values in marked.items()},
                "more": over(marked["contrast"], marked["tuned"]),
                "examples": texts["contrast"][:: 2 * samples][:3],
            }  # fmt: skip
    return found


# ---- all of it


def measured(family: Family, samples: int) -> dict[str, Any]:
    """Everything that the tables tell, by example where an interval is wanted."""
    names = list(family.tuned)
    members = {"base": member(family.base, dtype="float32", name="base")}
    members |= {n: member(folder, dtype="float32", name=n) for n, folder in family.tuned.items()}
    tokenizer = members["base"].tokenizer
    prompts = {d: encoded_prompts(tokenizer, [e.prompt for e in p], family.chat) for d, p in family.problems.items()}
    everybody = members["base"] + members[names[0]] + members[names[1]]
    ways, logits, tokens = weightings(names), {}, {}
    for data, problems in family.problems.items():
        values, told = likelihoods(everybody, prompts[data], [e.response for e in problems], ways)
        logits[data] = values
        tokens[data] = contrasts(tokenizer, told, 1 + names.index(data))
        print(f"logits, {data}: { ({w: round(float(np.mean(v)), 3) for w, v in values.items()}) }", flush=True)
    proof = checked(members, names, prompts, family, logits)
    right = {}
    for beta in BETAS:
        ensemble = rules.eft(members["base"], members[family.asked], members["base"], beta)
        right[f"{beta:g}"] = accuracy(
            ensemble, tokenizer, family.problems[family.asked][:40], family.correct, chat=family.chat,
            batch_size=40, max_new_tokens=family.longest,
        ).values.tolist()  # fmt: skip
        print(f"beta {beta:g}: {np.mean(right[f'{beta:g}']):.3f} right", flush=True)
    found = explored(family, members, samples)
    small = members["base"].base.model
    large = member(upscaled(small), tokenizer, name="large")
    larger: dict[str, Any] = {"parameters": {"small": count(small), "large": count(large.base.model)}}
    for name, problems in family.problems.items():
        answers = [e.response for e in problems[:6]]
        larger[name] = borrowed(large, members[name], members["base"], prompts[name][:6], answers)
    print(larger, flush=True)
    return {"logits": logits, "weights": in_weights(family), "accuracy": right, "tokens": tokens,
            "explored": found, "borrowed": larger, "check": proof}  # fmt: skip


def checked(
    members: Mapping[str, Ensemble], names: Sequence[str], prompts: Mapping[str, Any], family: Family, logits: Any
) -> float:
    """How far the sweep, which reads the members once, is from `log_likelihood` of a composition: nats a token."""
    apart = []
    for name in names:
        ensemble = rules.eft(members["base"], members[name], members["base"], 1.5)
        scored = log_likelihood(ensemble, prompts[name][:3], [e.response for e in family.problems[name][:3]])
        apart += [abs(float(np.mean(one.log_probs)) - v)
                  for one, v in zip(scored, logits[name][f"{name} 1.5"][:3], strict=True)]  # fmt: skip
    return max(apart)


def span(values: Any) -> dict[str, float]:
    result = Result.of(values)
    low, high = result.interval()
    return {"mean": float(result.mean), "low": round(float(low), 6) + 0.0, "high": float(high)}  # no -0.00


def over(ours: Any, theirs: Any) -> dict[str, float]:
    """The mean of paired differences; its interval by bootstrap also where they are all 0 and 1."""
    apart = np.subtract(ours, theirs)
    low, high = bootstrap(apart, None, resamples=2000, seed=0)
    return {"mean": float(apart.mean()), "low": float(low), "high": float(high)}


def summarised(found: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers of the tables, and the verdicts of the docstring."""
    names = list(found["logits"])
    first, second = names
    sweep: dict[str, Any] = {}
    for name in names:
        ours, base = found["logits"][name], found["logits"][name][f"{name} 0"]
        for beta in BETAS:
            key = f"{name} {beta:g}"
            theirs = found["weights"][key][name] if beta else base
            sweep[key] = {"logits": span(ours[key]), "weights": span(theirs),
                          "difference": over(ours[key], theirs)}  # fmt: skip
    peaks: dict[str, dict[str, Any]] = {}
    for name in names:
        best = max((b for b in BETAS if b > 1), key=lambda b: sweep[f"{name} {b:g}"]["logits"]["mean"])
        peaks[name] = {"beta": best, "over 1": over(*(found["logits"][name][f"{name} {b:g}"] for b in (best, 1.0)))}
    mixes: dict[str, Any] = {}
    for a, b in MIXES:
        key = f"mix {a:g} {b:g}"
        alone = {(1.0, 0.0): f"{first} 1", (0.0, 1.0): f"{second} 1"}.get((a, b))
        mixes[key] = {}
        for data in names:
            ours = found["logits"][data][key]
            theirs = found["weights"][key][data] if alone is None else ours
            mixes[key][data] = {"logits": span(ours), "weights": span(theirs),
                                "over base": over(ours, found["logits"][data][f"{data} 0"])}  # fmt: skip
    parts = {
        "amplified": [p["over 1"]["low"] > 0 for p in peaks.values()],
        "mixed": [mixes["mix 0.5 0.5"][data]["over base"]["low"] > 0 for data in names],
        "form": [one["an empty turn"]["more"]["low"] > 0 for one in found["explored"].values()],
        "extrapolated": [sweep[f"{name} 3"]["difference"]["low"] > 0 for name in names],
    }
    verdicts = {k: "held" if all(v) else "in part" if any(v) else "did not hold" for k, v in parts.items()}
    right = {beta: span(values) for beta, values in found["accuracy"].items()}
    rest = {key: found[key] for key in ("tokens", "explored", "borrowed", "check")}
    return {"sweep": sweep, "peaks": peaks, "mixes": mixes, "accuracy": right, **rest, "verdicts": verdicts}


# ---- telling


def markdown(summary: Mapping[str, Any]) -> str:
    """The sweep, the mixtures, the tokens, and the form found."""
    names = list(summary["peaks"])
    asked = next(n for n in names if n in ("svamp", "chain"))
    both = [(name, space) for name in names for space in ("logits", "weights")]
    heads = ["beta", *(f"{name}, {space}" for name, space in both), f"{asked}, right (logits)"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for beta in (f"{b:g}" for b in BETAS):
        cells = [
            f"{summary['sweep'][f'{n} {beta}'][space]['mean']:.3f}" for n in names for space in ("logits", "weights")
        ]
        lines.append("| " + " | ".join([beta, *cells, interval(summary["accuracy"][beta], 2)]) + " |")
    heads = [
        f"{names[0]}, {names[1]}",
        *(f"{n}'s solutions, {space}" for n in names for space in ("logits", "weights")),
    ]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for key, found in summary["mixes"].items():
        cells = [f"{found[name][space]['mean']:.3f}" for name, space in both]
        lines.append("| " + " | ".join([", ".join(key.split()[1:]), *cells]) + " |")
    lines += ["", "| fine-tuning | tokens that carry the most: times, nats each, share of the whole |", "|---|---|"]
    for name, tokens in summary["tokens"].items():
        told = ", ".join(f"`{shown(t['token'])}` {t['times']} x {t['gain']:+.2f} ({t['share']:.2f})" for t in tokens)
        lines.append(f"| {name} | {told} |")
    heads = ["fine-tuning", "behind", "n", "base", "tuned", "contrast", "contrast - tuned"]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, kinds in summary["explored"].items():
        for kind, found in kinds.items():
            cells = [f"{found[w]['mean']:.2f}" for w in ("base", "tuned", "contrast")]
            lines.append(
                "| " + " | ".join([name, kind, str(found["n"]), *cells, interval(found["more"], 2, "+")]) + " |"
            )
    return "\n".join(lines)


def shown(token: str) -> str:
    """A token in a table's cell."""
    return token.replace("\n", "↵").replace(" ", "·").replace("|", r"\|")


def interval(found: Mapping[str, float], digits: int, sign: str = "") -> str:
    return "{mean:{f}} [{low:{f}}, {high:{f}}]".format(**found, f=f"{sign}.{digits}f")


def picture(summary: Mapping[str, Any]) -> Figure:
    """Likelihood over beta in both spaces, and both data sets' likelihood over mixtures."""
    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    names = list(summary["peaks"])
    *axes, last = figure.subplots(1, 3)
    styles = {"logits": ("ko-", "black"), "weights": ("ks--", "white")}
    for axis, name in zip(axes, names, strict=True):
        for space, (line, face) in styles.items():
            rows = [summary["sweep"][f"{name} {b:g}"][space] for b in BETAS]
            mean = np.array([r["mean"] for r in rows])
            spread = [mean - [r["low"] for r in rows], np.array([r["high"] for r in rows]) - mean]
            axis.errorbar(BETAS, mean, np.clip(spread, 0, None), fmt=line, markerfacecolor=face, capsize=2.5,
                          markersize=5, elinewidth=0.8, label=f"in {space}")  # fmt: skip
        axis.set(
            xlabel="beta", ylabel="log-probability of solutions, nats a token", title=f"base + beta ({name} - base)"
        )
    for space, (line, face) in styles.items():
        x, y = ([found[n][space]["mean"] for found in summary["mixes"].values()] for n in names)
        last.plot(x[:-1], y[:-1], line, markerfacecolor=face, markersize=5, label=f"in {space}")
        last.plot(x[-1], y[-1], line[:2], markerfacecolor=face, markersize=9)
        last.annotate("sum", (x[-1], y[-1]), xytext=(7, -10), textcoords="offset points", fontsize="small")
    base = [summary["sweep"][f"{n} 0"]["logits"]["mean"] for n in names]
    last.plot(*base, "kx", markersize=7)
    last.annotate("base", base, xytext=(7, -3), textcoords="offset points", fontsize="small")
    last.set(xlabel=f"{names[0]}'s solutions, nats a token", ylabel=f"{names[1]}'s solutions", title="mixtures")
    for axis in (*axes, last):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="best", fontsize="small")
    return figure


def check(report: Mapping[str, Any]) -> None:
    """A fast run: what must be so is so, and the form is found."""
    summary = report["summary"]
    assert summary["check"] < 1e-4, "members read once and composed are the composition"
    for name in summary["peaks"]:
        assert summary["borrowed"][name]["micronats apart"] < 1000
        assert summary["borrowed"][name]["same"] == summary["borrowed"][name]["texts"]
        assert abs(summary["sweep"][f"{name} 1"]["difference"]["mean"]) < 1e-4, "at 1 both spaces are the tuned model"
    assert summary["borrowed"]["parameters"]["large"] > 1.3 * summary["borrowed"]["parameters"]["small"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=60, help="held-out problems of SVAMP; half as many of GSM8K")
    parser.add_argument("--samples", type=int, default=4, help="texts for each of eight prompts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--fast", action="store_true", help="the tiny family: shows that it runs")
    options, began = parser.parse_args(), time.perf_counter()
    one_thread()
    try:
        family = tiny() if options.fast else real(options.n)
    except SurgeryError as error:
        print(f"Nothing was run: {error}")
        return
    trained = {n: json.loads((folder / "training.json").read_text(encoding="utf-8"))
               for n, folder in family.tuned.items() if not options.fast}  # fmt: skip
    found = measured(family, 1 if options.fast else options.samples)
    summary = rounded(summarised(found))
    kept = {key: found[key] for key in ("logits", "weights", "accuracy")}
    path = write(
        options.out, "smollm2_logits", {"training": trained, "summary": summary, **kept}, picture(summary), began
    )
    print(markdown(summary))
    print(summary["verdicts"], path, sep="\n")


if __name__ == "__main__":
    main()
