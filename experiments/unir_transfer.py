"""Does a UniR module guide a larger frozen backbone, and do two modules add (arXiv:2505.19075)?

    python experiments/unir_transfer.py            # five seeds, 15 CPU minutes
    python experiments/unir_transfer.py --fast     # two steps a module, a check that it runs

A module is tiny-small-base (163,072 parameters), trained by GRPO on the sum of its logits and a frozen backbone's,
rewarded for the right answer; no KL, the loss averaged over all tokens, as in the released code. Strings that are
rotated or have their ends swapped: the backbone in training is tiny-small-base too, 40 steps; the module is then
attached to tiny-base (447,552) and to a larger base, trained here by the zoo's recipe (128 wide, 6 layers, 1,193,216).
Sums: 30 steps with tiny-base, attached to the larger one. 16 prompts x 8 rollouts.

A module starts as a model, not as nothing: base and untrained module together are another model than the base. In the
arm "subtracted" the initial module is taken out again, in training and afterwards (backbone + module - initial), so
that step 0 is the backbone. In training it is one more frozen backbone, a copy with its head negated. Looked at beside
it: subtracted afterwards only, from a module that was trained without.

Scored: greedy answers to held-out questions of the task, and to strings copied, reversed and sorted (skills).

Known from a trial (seed 0, one rate, 3e-4, the loss averaged by completion): the modules learn within the steps; the
task `shift` is hardly ever rewarded and was left out; subtracted afterwards only, modules did harm. Neither `swap`, nor
the larger base, nor the joint modules of these two tasks were seen before.

Held, by intervals over seeds and questions: (1) the reward of the last 10 steps minus the first 10 is above 0 for every
task and arm, and every backbone is the same bit for bit; (2) backbone + module is above the backbone, and above the
backbone with the untrained module, for every task and backbone that training had not; (3) on a set of both tasks on
strings, both modules (weight 1 each) are above each alone, on both of these backbones; (4) on sums with tiny-base,
UniR is no more than 0.05 below as many steps of GRPO on all of tiny-base (447,552 parameters, at the zoo's 1e-4); (5)
two modules add better with the initial one subtracted: above plain UniR on the same set. For some only: in part.

In a first run the larger base had half of the recipe's second stage; it reversed half of the strings only, no module
brought sums out of it, and the verdict on transfer was "in part". Since then it has the whole recipe; nothing else was
changed. How often a backbone's own samples are right (8 a question, temperature 1) is shown since: what there is to
bring out.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from arena import in_processes, mean_interval, rounded, write
from build_zoo import LARGE, MEMBERS, Stage
from logit_arena import KEPT, answered, bare, longest, questions, trained
from long_sums import difference, told
from matplotlib.figure import Figure
from tuning_contribution import above, told_of

from analysis.evaluate import evaluate
from analysis.plots import HATCHES, MARKERS
from analysis.results import Result
from surgery.logits import Ensemble, member, rules
from surgery.models import load

MODULE, BASE, LARGER = "tiny-small-base", "tiny-base", "larger base"
ROUTES = {"rotate": (MODULE, (BASE, LARGER)), "swap": (MODULE, (BASE, LARGER)), "chain": (BASE, (LARGER,))}
"""By task: the backbone in training, and those that the module is attached to afterwards."""
STRINGS = ("rotate", "swap")
SHOWN = {"rotate": "rotate", "swap": "swap", "chain": "sums"}
ARMS = ("UniR", "subtracted")
RATE, FULL_RATE = 3e-4, 1e-4
SETTINGS = {"steps": {"rotate": 40, "swap": 40, "chain": 30}, "prompts": 16, "group": 8, "test": 192, "facts": 200,
            "mix": 1200}  # fmt: skip
FAST = {"steps": {"rotate": 2, "swap": 2, "chain": 2}, "prompts": 4, "group": 4, "test": 12, "facts": 1, "mix": 1}
Scores = dict[str, Result]


def larger_base(folder: Path, settings: Mapping[str, Any]) -> Path:
    """A base of more than twice the parameters, by the zoo's recipe."""
    from transformers import LlamaForCausalLM

    (small, tokenizer), shape = load(BASE), {"hidden_size": 128, "num_hidden_layers": 6, "intermediate_size": 344}
    config: Any = copy.deepcopy(small.config)
    for name, value in {**LARGE, **shape, "head_dim": 32}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    for seed, (stage, steps) in enumerate(zip(MEMBERS["base"].stages, ("facts", "mix"), strict=True)):
        trained(model, tokenizer, replace(stage, steps=settings[steps]), seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def negated(model: Any) -> Any:
    """A copy whose logits have the other sign."""
    other = copy.deepcopy(model)
    other.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach().clone())
    other.config.tie_word_embeddings = False
    return other


def module(task: str, subtracted: bool, seed: int, settings: Mapping[str, Any]) -> tuple[Any, list[float], bool]:
    """A trained module, the rewards by step, and whether its backbones stayed the same bit for bit."""
    (model, tokenizer), backbone = load(MODULE), load(ROUTES[task][0])[0]
    frozen = [backbone, negated(model)] if subtracted else [backbone]
    before = copy.deepcopy(frozen)
    stage = Stage({task: 1.0}, settings["steps"][task], settings["prompts"], RATE, group=settings["group"])
    rewards = trained(model, tokenizer, stage, seed, objective={"bnpo": {"beta": 0.0}}, backbone=frozen)
    same = all(
        torch.equal(p, q)
        for one, other in zip(before, frozen, strict=True)
        for p, q in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
    return model, rewards, same


def asked(settings: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Held-out questions of every task, and of the skills."""
    found = {task: questions([task], settings["test"]) for task in ROUTES}
    return {**found, "skills": questions(KEPT, settings["test"])}


def untrained(larger: Path, settings: Mapping[str, Any]) -> dict[str, Scores]:
    """By backbone: alone, and with the untrained module; every task and skill."""
    rows, (initial, tokenizer) = asked(settings), load(MODULE)
    plain, found = member(initial, tokenizer), {}
    for name in (MODULE, BASE, LARGER):
        backbone = plain if name == MODULE else member(*load(larger if name == LARGER else name))
        for label, one in ((name, backbone), (f"{name} + untrained", rules.unir(backbone, plain))):
            found[label] = {task: answered(one, tokenizer, some) for task, some in rows.items()}
        found[name]["facts"] = answered(backbone, tokenizer, questions(["facts"], min(100, settings["test"])))
        for task in ROUTES:
            drawn = evaluate(backbone, rows[task], tokenizer=tokenizer, samples=8, max_new_tokens=longest([task]),
                             batch_size=512)  # fmt: skip
            found[name][f"{task}, sampled"] = Result.of(drawn.values.mean(1), drawn.labels)
    return found


def measured(seed: int, larger: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The modules of one seed, on every backbone: by "task/arm/backbone", "both/arm/backbone" and "full"."""
    rows, (initial, tokenizer) = asked(settings), load(MODULE)
    start = member(initial, tokenizer, name="initial")
    backbones = {MODULE: start, BASE: member(*load(BASE)), LARGER: member(*load(larger))}
    scores: dict[str, Scores] = {}

    def score(name: str, composed: Ensemble, *tasks: str) -> None:
        scores[name] = {task: answered(composed, tokenizer, rows[task]) for task in (*tasks, "skills")}

    rewards: dict[str, list[float]] = {}
    modules: dict[tuple[str, str], Ensemble] = {}
    same = True
    for task, (own, others) in ROUTES.items():
        wanted = STRINGS if task in STRINGS else (task,)
        for arm in ARMS:
            model, rewards[f"{task}/{arm}"], kept = module(task, arm == "subtracted", seed, settings)
            same, modules[task, arm] = same and kept, member(model, tokenizer, name=f"{task} {arm}")
            for name in (own, *others):
                composed = rules.unir(backbones[name], modules[task, arm])
                score(f"{task}/{arm}/{name}", composed - start if arm == "subtracted" else composed, *wanted)
                if arm == "UniR":
                    score(f"{task}/subtracted afterwards/{name}", composed - start, *wanted)
    for arm in ARMS:
        for name in ROUTES[STRINGS[0]][1]:
            composed = rules.unir(backbones[name], [modules[task, arm] for task in STRINGS])
            score(f"both/{arm}/{name}", composed - 2.0 * start if arm == "subtracted" else composed, *STRINGS)
    full, _ = load(BASE)
    stage = Stage({"chain": 1.0}, settings["steps"]["chain"], settings["prompts"], FULL_RATE, group=settings["group"])
    rewards["chain/full"] = trained(full, tokenizer, stage, seed, objective={"bnpo": {"beta": 0.0}})
    score("full", member(full, tokenizer, name="full"), "chain")
    return {"scores": scores, "rewards": rewards, "same": same}


# ---- what came out


def joined(scores: Scores) -> Result:
    """Both tasks on strings as one set."""
    first, second = (scores[task] for task in STRINGS)
    return Result.of([*first.values, *second.values], [*first.labels, *second.labels])


def summarised(runs: Mapping[int, Mapping[str, Any]], start: Mapping[str, Scores]) -> dict[str, Any]:
    """Accuracies with intervals over seeds, differences over seeds and questions, the verdicts of the docstring."""

    def mean(name: str, task: str) -> dict[str, Any]:
        return mean_interval([float(run["scores"][name][task].mean) for run in runs.values()])

    def against(name: str, other: str, pick: Callable[[Scores], Result]) -> dict[str, Any]:
        ours = {seed: pick(run["scores"][name]) for seed, run in runs.items()}
        theirs = {seed: pick((start | run["scores"])[other]) for seed, run in runs.items()}
        return difference(ours, theirs)

    routes: dict[str, Any] = {}
    for task, (own, others) in ROUTES.items():
        for name in (own, *others):
            one: dict[str, Any] = {"trained with": own, "seen in training": name == own}
            for label, key in (("alone", name), ("untrained", f"{name} + untrained")):
                one[label] = {"task": float(start[key][task].mean), "skills": float(start[key]["skills"].mean)}
            one["sampled"] = float(start[name][f"{task}, sampled"].mean)
            for arm in (*ARMS, "subtracted afterwards"):
                key = f"{task}/{arm}/{name}"
                one[arm] = {"task": mean(key, task), "skills": mean(key, "skills")}
            key = f"{task}/UniR/{name}"
            one["gain"] = against(key, name, lambda s, task=task: s[task])  # type: ignore[misc]
            one["over untrained"] = against(key, f"{name} + untrained", lambda s, task=task: s[task])  # type: ignore[misc]
            one["subtracted - UniR"] = against(f"{task}/subtracted/{name}", key, lambda s, task=task: s[task])  # type: ignore[misc]
            routes[f"{SHOWN[task]}, {name}"] = one
    joint: dict[str, Any] = {}
    for name in ROUTES[STRINGS[0]][1]:
        for arm in ARMS:
            both = f"both/{arm}/{name}"
            joint[f"{name}, {arm}"] = {
                **{f"{task} alone": _mean_of([joined(r["scores"][f"{task}/{arm}/{name}"]) for r in runs.values()])
                   for task in STRINGS},
                "both": _mean_of([joined(r["scores"][both]) for r in runs.values()]),
                **{f"both, {task}": mean(both, task) for task in STRINGS},
                "skills": mean(both, "skills"),
                **{f"over {task}": against(both, f"{task}/{arm}/{name}", joined) for task in STRINGS},
            }  # fmt: skip
        joint[f"{name}, subtracted"]["over UniR"] = against(f"both/subtracted/{name}", f"both/UniR/{name}", joined)
    curves = {
        name: [
            mean_interval(list(step))["mean"] for step in zip(*(r["rewards"][name] for r in runs.values()), strict=True)
        ]
        for name in next(iter(runs.values()))["rewards"]
    }
    rises = {
        name: mean_interval([_mean(r["rewards"][name][-10:]) - _mean(r["rewards"][name][:10]) for r in runs.values()])
        for name in curves
    }
    full = {
        "accuracy": mean("full", "chain"), "skills": mean("full", "skills"),
        "UniR - full": against(f"chain/UniR/{BASE}", "full", lambda s: s["chain"]),
    }  # fmt: skip
    same = all(run["same"] for run in runs.values())
    parts = {
        "trains": [above(rises[f"{task}/{arm}"], 0) for task in ROUTES for arm in ARMS],
        "transfers": [
            above(one[key], 0) for one in routes.values() if not one["seen in training"]
            for key in ("gain", "over untrained")
        ],
        "modules add": [
            above(joint[f"{name}, UniR"][f"over {task}"], 0) for name in ROUTES[STRINGS[0]][1] for task in STRINGS
        ],
        "fewer parameters": [above(full["UniR - full"], -0.05)],
        "subtracted modules add better": [
            above(joint[f"{name}, subtracted"]["over UniR"], 0) for name in ROUTES[STRINGS[0]][1]
        ],
    }  # fmt: skip
    verdicts = {claim: told_of(passed) for claim, passed in parts.items()}
    if not same:
        verdicts["trains"] = "did not hold"
    return {"routes": routes, "joint": joint, "curves": curves, "rises": rises, "full": full,
            "backbones the same": same, "verdicts": verdicts}  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_of(results: Sequence[Result]) -> dict[str, Any]:
    return mean_interval([float(one.mean) for one in results])


def markdown(summary: Mapping[str, Any]) -> str:
    """Modules on backbones, two modules at once, all parameters against a module's."""
    heads = ["task, backbone", "trained with", "alone", "alone, sampled", "with the untrained module", "UniR",
             "over untrained", "initial subtracted", "subtracted afterwards",
             "skills: alone, UniR, subtracted"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, one in summary["routes"].items():
        skills = f"{one['alone']['skills']:.2f}, " + ", ".join(f"{one[arm]['skills']['mean']:.2f}" for arm in ARMS)
        plain = [f"{value:.2f}" for value in (one["alone"]["task"], one["sampled"], one["untrained"]["task"])]
        cells = [name, one["trained with"], *plain, told(one["UniR"]["task"]), told(one["over untrained"], sign="+"),
                 told(one["subtracted"]["task"]), told(one["subtracted afterwards"]["task"]), skills]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    heads = ["two modules on", *(f"{task} module alone" for task in STRINGS), "both",
             *(f"both, on {task}" for task in STRINGS), *(f"both - {task}" for task in STRINGS), "skills"]  # fmt: skip
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, one in summary["joint"].items():
        keys = [*(f"{task} alone" for task in STRINGS), "both", *(f"both, {task}" for task in STRINGS)]
        cells = [name, *(told(one[k]) for k in keys), *(told(one[f"over {t}"], sign="+") for t in STRINGS),
                 told(one["skills"])]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    full, own = summary["full"], summary["routes"][f"sums, {BASE}"]
    lines += ["", "| trained on sums | parameters | accuracy | skills |", "|---|---|---|---|"]
    lines.append(f"| a module, {BASE} frozen | 163,072 | {told(own['UniR']['task'])} | {told(own['UniR']['skills'])} |")
    lines.append(f"| all of {BASE} | 447,552 | {told(full['accuracy'])} | {told(full['skills'])} |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any]) -> Figure:
    """Rewards, transfer, two modules."""
    figure = Figure(figsize=(12, 3.7), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.7, 1.1])
    for i, task in enumerate(ROUTES):
        for arm, dash in zip(ARMS, ("-", "--"), strict=True):
            curve = summary["curves"][f"{task}/{arm}"]
            left.plot(range(1, len(curve) + 1), curve, f"k{dash}{MARKERS[i]}", markevery=8, markersize=5, lw=1,
                      markerfacecolor="white" if arm == "subtracted" else "black",
                      label=SHOWN[task] + (", subtracted" if arm == "subtracted" else ""))  # fmt: skip
    left.set(xlabel="step", ylabel="reward of rollouts", ylim=(-0.03, 1.55), title="training")
    left.set_yticks([0, 0.25, 0.5, 0.75, 1])
    left.legend(frameon=False, fontsize="small", loc="upper left", ncols=2)
    shown = {"alone": ("alone", "white", ""), "untrained": ("+ untrained module", "white", HATCHES[2]),
             "UniR": ("+ module (UniR)", "0.35", ""), "subtracted": ("+ module - initial", "0.75", "")}  # fmt: skip
    routes = {name: one for name, one in summary["routes"].items() if not one["seen in training"]}
    for j, (key, (label, colour, hatch)) in enumerate(shown.items()):
        for i, one in enumerate(routes.values()):
            _bar(middle, i + (j - 1.5) * 0.2, one[key]["task"], 0.2, colour, hatch, None if i else label)
    middle.set_xticks(range(len(routes)), [_short(name) for name in routes], fontsize="small")
    middle.set(ylabel="accuracy", ylim=(0, 1.45), title="on backbones that training had not")
    middle.set_yticks([0, 0.25, 0.5, 0.75, 1])
    middle.legend(frameon=False, fontsize="small", loc="upper center", ncols=2)
    shown = {"rotate alone": ("rotate module", "white", ""), "swap alone": ("swap module", "white", HATCHES[2]),
             "both": ("both", "0.35", "")}  # fmt: skip
    for j, (key, (label, colour, hatch)) in enumerate(shown.items()):
        for i, one in enumerate(summary["joint"].values()):
            _bar(right, i + (j - 1) * 0.27, one[key], 0.27, colour, hatch, None if i else label)
    right.set_xticks(range(len(summary["joint"])), [_short(n) for n in summary["joint"]], fontsize="small")
    right.set(ylim=(0, 1.45), title="both tasks on strings")
    right.set_yticks([0, 0.25, 0.5, 0.75, 1])
    right.legend(frameon=False, fontsize="small", loc="upper center", ncols=2)
    bare(left, middle, right)
    return figure


def _short(name: str) -> str:
    return name.replace("tiny-base", "base").replace(LARGER, "larger").replace(", ", "\n")


def _bar(axis: Any, at: float, found: Any, width: float, colour: str, hatch: str, label: str | None) -> None:
    mean = found["mean"] if isinstance(found, Mapping) else found
    axis.bar(at, mean, width, color=colour, hatch=hatch, edgecolor="black", label=label)
    if isinstance(found, Mapping) and found["low"] is not None:
        axis.vlines(at, max(found["low"], 0), min(found["high"], 1), color="black", lw=1)


def check(report: Mapping[str, Any]) -> None:
    """A fast run: no backbone moved, every composition was asked, and a base without training knows nothing."""
    summary = report["summary"]
    assert summary["backbones the same"] and set(summary["verdicts"].values()) == {"not asked"}
    assert len(summary["routes"]) == 8 and len(summary["joint"]) == 4
    assert all(one["alone"]["task"] == 0 for name, one in summary["routes"].items() if LARGER in name)
    assert {len(curve) for curve in summary["curves"].values()} == {2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="processes (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="two steps: shows that it runs")
    options = parser.parse_args()
    began = time.perf_counter()
    seeds, workers = ([0], 1) if options.fast else (options.seeds, options.workers)
    settings = FAST if options.fast else SETTINGS
    with TemporaryDirectory() as folder:
        (larger,) = in_processes(larger_base, [(Path(folder), settings)], 1)
        start = untrained(larger, settings)
        runs = dict(zip(seeds, in_processes(measured, [(s, larger, settings) for s in seeds], workers), strict=True))
    summary = summarised(runs, start)
    bases = {name: {task: float(r.mean) for task, r in scores.items()} for name, scores in start.items()}
    by_seed = {s: {name: {t: float(r.mean) for t, r in one.items()} for name, one in run["scores"].items()}
               for s, run in runs.items()}  # fmt: skip
    report = {"settings": settings, "seeds": seeds, "summary": summary, "untrained": bases, "by seed": by_seed}
    path = write(options.out, "unir_transfer", report, picture(summary), began)
    print(markdown(rounded(summary)))
    print(summary["verdicts"], path, sep="\n")


if __name__ == "__main__":
    main()
