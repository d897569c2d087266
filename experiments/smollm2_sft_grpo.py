"""SFT, then GRPO, of a real model by the engine: SmolLM2-135M-Instruct on two cores.

    SURGERY_DATA=... python experiments/smollm2_sft_grpo.py --models DIR

SFT on SVAMP teaches the form of an answer (an equation, `#### number`); GRPO goes on from there with short stories of
one sum or difference, rewarded for the right number alone. Both stages and what the scores come from are kept in DIR:
a run that was stopped goes on from its last checkpoint. The verdict is `verdict`, and was written before the run.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from arena import one_thread, rounded, write

from analysis.comparison import compare
from analysis.evaluate import accuracy, answer_log_likelihood, load
from analysis.results import Result
from surgery.tasks import TASKS, Example, svamp
from surgery.tasks.base import task
from surgery.tasks.word_problems import same_number_as_row
from surgery.training import train
from surgery.training.log import read_metrics
from surgery.zoo import get

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn")
THINGS = ("apples", "books", "coins", "pens", "stickers", "marbles")
STORIES = (
    ("+", "{n} has {a} {o} and gets {b} more. How many {o} does {n} have now?"),
    ("+", "{n} has {a} {o}. {m} has {b} {o}. How many {o} do they have together?"),
    ("+", "There were {a} {o} in the box. {n} puts {b} more {o} into it. How many {o} are in the box now?"),
    ("-", "{n} had {a} {o} and gave {b} of them to {m}. How many {o} does {n} have left?"),
    ("-", "{n} had {a} {o} and lost {b} of them. How many {o} are left?"),
    ("-", "{n} has {a} {o}. {m} has {b} {o}. How many more {o} does {n} have than {m}?"),
)
STAGES = ("base", "SFT", "GRPO")


@task("stories", "a short story of one sum or difference of numbers up to 20", same_number_as_row)
def story(rng: Random) -> Example:
    """One story; its response has the form that SFT on SVAMP teaches."""
    sign, text = rng.choice(STORIES)
    b, a = sorted(rng.sample(range(2, 21), 2))
    n, m = rng.sample(NAMES, 2)
    answer = a + b if sign == "+" else a - b
    prompt = text.format(n=n, m=m, o=rng.choice(THINGS), a=a, b=b)
    return Example(prompt, f"{a} {sign} {b} = {answer}\n#### {answer}", str(answer), category=sign)


@dataclass(frozen=True)
class Settings:
    """Of one run: words of the recipe of each stage, and what its models are scored on."""

    model: str
    sft: dict[str, Any]
    grpo: dict[str, Any]
    held_out: Mapping[str, int]
    """Examples by data set: the first one's is that of SFT, the last one's that of GRPO."""
    chat: bool = True
    precision: str = "float32"
    max_new_tokens: int = 32

    def demonstrations(self) -> list[dict[str, Any]]:
        """What SFT learns."""
        name = next(iter(self.held_out))
        return [e.row(name) for e in (svamp("train") if name == "svamp" else TASKS.lookup(name).examples(64))]

    def examples(self, name: str) -> list[Example]:
        """The held-out examples of a data set; of a generated one, none that training draws."""
        count = self.held_out[name]
        if name == "svamp":
            return svamp("test", count)
        seen = {TASKS.lookup(name).row(seed, i)["prompt"] for seed in (0, 1) for i in range(2000)}
        return [e for e in TASKS.lookup(name).examples(2 * count, 1000) if e.prompt not in seen][:count]


FULL = Settings(
    model="smollm2",
    sft={
        "objective": "sft",
        "steps": 40,
        "batch": {"rows": 8},
        "optimizer": {"lr": 5e-5, "betas": (0.9, 0.98), "warmup": 5, "final": 0.1},
        "checkpoint": {"every": 10, "keep": 1},
    },
    grpo={
        "data": {"task": "stories"},
        "objective": {"grpo": {"beta": 0.0}},
        "reward": "accuracy",
        "steps": 120,
        "rollouts": {"prompts": 4, "group": 8, "max_new_tokens": 32},
        "optimizer": {"lr": 2e-5, "betas": (0.9, 0.98), "warmup": 4, "shape": "constant"},
        "checkpoint": {"every": 10, "keep": 1},
    },
    held_out={"svamp": 100, "stories": 120},
    precision="bfloat16",
)
SHORT = {"steps": 2, "batch": {}, "optimizer": {}, "checkpoint": {}}
FAST = Settings(
    model="tiny-base",
    sft=FULL.sft | SHORT,
    grpo=FULL.grpo | SHORT | {"data": {"task": "chain"}, "rollouts": {"prompts": 4, "group": 4, "max_new_tokens": 36}},
    held_out={"chain": 12},
    chat=False,
    max_new_tokens=36,
)


def trained(settings: Settings, words: Mapping[str, Any], start: Path, out: Path, seed: int) -> dict[str, Any]:
    """One stage, from the model in `start` to the one in `out`/model; an interrupted one goes on. How it went."""
    note = out / "stage.json"
    if not note.exists():
        if not (out / "model").exists():
            common: dict[str, Any] = {"chat": settings.chat, "precision": settings.precision, "seed": seed}
            train(str(start), out=out, resume=True, on_step=progress(out.name), **common, **words)
        # the peak of this process: of this stage and those before it
        note.write_text(json.dumps({"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
    return {**json.loads(note.read_text()), **curve(read_metrics(out))}
    return {**json.loads(note.read_text()), **curve(read_metrics(out))}


def progress(name: str) -> Callable[[int, dict[str, float]], None]:
    """Prints a line a step."""
    keys = ("loss", "reward", "zero_variance", "grad_norm", "seconds/generation", "seconds/update", "seconds")
    return lambda step, found: print(name, step, *(f"{k} {found[k]:.3g}" for k in keys if k in found), flush=True)


def curve(metrics: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The columns of a run's log that tell how it went."""
    keys = ("loss", "reward", "entropy", "length", "truncated", "zero_variance", "grad_norm", "seconds",
            "seconds/generation", "seconds/update", "tokens_per_second")  # fmt: skip
    return {key: [m[key] for m in metrics] for key in keys if all(key in m for m in metrics)}


def scored(settings: Settings, folder: Path, kept: Path, label: str) -> dict[str, dict[str, Result]]:
    """{data set: {accuracy, log-likelihood, right operation}} of a model on held-out examples, from `kept` if there."""
    found: dict[str, dict[str, Result]] = {}
    model: Any = None
    for name in settings.held_out:
        examples = settings.examples(name)
        both = [e.prompt for e in examples], [e.response for e in examples]
        for kind in ("accuracy", "log-likelihood"):
            path = kept / f"{label}-{name}-{kind}"
            if not path.with_suffix(".json").exists():
                if model is None:
                    model, tokenizer = load(folder, dtype="float32")
                with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16"):
                    if kind == "accuracy":
                        result = accuracy(model, tokenizer, examples, TASKS.lookup(name).correct, batch_size=60,
                                          chat=settings.chat, max_new_tokens=settings.max_new_tokens)  # fmt: skip
                    else:
                        result = answer_log_likelihood(model, tokenizer, *both, chat=settings.chat, batch_size=20)
                result.save(path)
                print(f"{label} on {name}: {result}", flush=True)
            found.setdefault(name, {})[kind] = Result.load(path)
        written = found[name]["accuracy"].columns["completion"]
        same = [float(set_up(text) == set_up(e.response)) for text, e in zip(written, examples, strict=True)]
        found[name]["right operation"] = Result.of(same, both[0])
    return found


def summary(scores: Mapping[str, Mapping[str, Mapping[str, Result]]]) -> dict[str, Any]:
    """Every score with its interval, what each stage changed (paired over examples), and the verdict."""
    found: dict[str, Any] = {"scores": {}, "changes": {}}
    for name, kinds in scores["base"].items():
        for kind in kinds:
            each = {stage: scores[stage][name][kind] for stage in STAGES}
            found["scores"][f"{name}, {kind}"] = {
                stage: {"mean": float(r.mean), **{k: float(v) for k, v in r.interval()._asdict().items()}, "n": len(r)}
                for stage, r in each.items()
            }
            found["changes"][f"{name}, {kind}"] = {
                later: compare(each[later], each[earlier]).to_dict() for earlier, later in pairwise(STAGES)
            }
    return found | {"verdict": verdict(found["changes"])}


def set_up(text: str) -> list[str]:
    """The operation before the first equals sign; a sum of two in any order."""
    words = text.partition("=")[0].split()
    return sorted(words) if words[1:2] == ["+"] and len(words) == 3 else words


def verdict(changes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Each stage held when what it trains rose with an interval above 0: SFT the first data set's log-likelihood and
    accuracy (in part: one of the two), GRPO the last one's accuracy (in part: it rose within the interval)."""
    names = list(dict.fromkeys(place.partition(", ")[0] for place in changes))
    sft = [changes[f"{names[0]}, {kind}"]["SFT"]["low"] > 0 for kind in ("log-likelihood", "accuracy")]
    grpo = changes[f"{names[-1]}, accuracy"]["GRPO"]
    return {
        "SFT": "held" if all(sft) else "in part" if any(sft) else "did not hold",
        "GRPO": "held" if grpo["low"] > 0 else "in part" if grpo["difference"] > 0 else "did not hold",
    }


def markdown(found: Mapping[str, Any]) -> str:
    """Scores by stage, and what each stage changed."""

    def of(m: Mapping[str, Any], mean: str, sign: str = "") -> str:
        return "{:{s}.2f} [{:{s}.2f}, {:{s}.2f}]".format(m[mean], m["low"], m["high"], s=sign)

    lines = ["| held out | base | after SFT | after GRPO | SFT changes | GRPO changes |", "|---" * 6 + "|"]
    for place, stages in found["scores"].items():
        changes = found["changes"][place]
        cells = [*(of(stages[s], "mean") for s in STAGES), *(of(changes[s], "difference", "+") for s in STAGES[1:])]
        lines.append(f"| {place}, n = {stages['base']['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(report: Mapping[str, Any]) -> Figure:
    """Loss of SFT, reward of GRPO, and the accuracy of the three models."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.2, 1.2])
    loss = report["sft"]["loss"]
    left.plot(range(1, len(loss) + 1), loss, "k-", linewidth=1)
    left.set(xlabel="step", ylabel="loss, nats a token", title="SFT", ylim=(0, None))
    reward = np.asarray(report["grpo"]["reward"])
    steps = np.arange(1, len(reward) + 1)
    width = min(8, len(reward))
    middle.plot(steps, reward, "o", color="0.6", markersize=4, label="one step")
    mean = np.convolve(reward, np.ones(width) / width, "valid")
    middle.plot(steps[width - 1 :], mean, "k-", label=f"mean of {width} steps")
    middle.set(xlabel="step", ylabel="share of right rollouts", title="GRPO", ylim=(0, 1.15))
    middle.legend(frameon=False, fontsize="small", loc="upper left", ncols=2)
    places = [p for p in report["summary"]["scores"] if p.endswith("accuracy")]
    for i, (place, hatch) in enumerate(zip(places, ("", "///"), strict=False)):
        at = np.arange(len(STAGES)) + (i - (len(places) - 1) / 2) * 0.4
        rows = [report["summary"]["scores"][place][s] for s in STAGES]
        mean = np.array([r["mean"] for r in rows])
        spread = [mean - [r["low"] for r in rows], [r["high"] for r in rows] - mean]
        right.bar(at, mean, 0.38, hatch=hatch, color="0.8" if i else "white", edgecolor="black",
                  label=f"{place.partition(',')[0]}, n = {rows[0]['n']}")  # fmt: skip
        right.errorbar(at, mean, np.maximum(spread, 0), fmt="none", ecolor="black", capsize=3)
    right.set_xticks(range(len(STAGES)), ["base", "after SFT", "after GRPO"])
    right.set(ylim=(0, 1.15), ylabel="accuracy, held out (95 %)", title="Greedy answers")
    right.legend(frameon=False, fontsize="small", loc="upper left")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def run(settings: Settings, folder: Path, seed: int) -> dict[str, Any]:
    """Both stages and the scores of the three models, kept in `folder`."""
    kept = folder / "scores"
    kept.mkdir(parents=True, exist_ok=True)
    stages, places = {}, {"base": Path(get(settings.model))}
    for name, start, words in (("sft", "base", settings.sft), ("grpo", "SFT", settings.grpo)):
        words = {"data": settings.demonstrations(), **words}
        stages[name] = trained(settings, words, places[start], folder / name, seed)
        places[name.upper()] = folder / name / "model"
    scores = {label: scored(settings, place, kept, label) for label, place in places.items()}
    said = {"recipes": repr(settings), "seed": seed, "threads": torch.get_num_threads()}
    return {"settings": said, **stages, "summary": summary(scores)}


def check(report: Mapping[str, Any]) -> None:
    """What a fast run must show: both stages ran, and their models were scored on the same examples."""
    assert len(report["sft"]["loss"]) == len(report["grpo"]["reward"]) == FAST.grpo["steps"]
    stages = report["summary"]["scores"]["chain, log-likelihood"]
    assert stages["SFT"]["mean"] != stages["base"]["mean"] and stages["SFT"]["n"] == FAST.held_out["chain"]
    assert set(report["summary"]["verdict"]) == {"SFT", "GRPO"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of the stages, outside the repository (3 GB)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--fast", action="store_true", help="two steps of each on tiny-base: shows that it runs")
    options, began = parser.parse_args(), time.perf_counter()
    if not options.fast and options.models is None:
        parser.error("--models DIR is needed: the stages are kept there, and gone on with")
    one_thread()
    with tempfile.TemporaryDirectory() as temporary:
        report = run(FAST if options.fast else FULL, options.models or Path(temporary), options.seed)
    path = write(options.out, "smollm2_sft_grpo", report, picture(report), began)
    print(markdown(rounded(report["summary"])))
    print(report["summary"]["verdict"], path, sep="\n")


if __name__ == "__main__":
    main()
