"""A real model tuned in four ways at one budget of steps: all of it, 5 % of its numbers (LIFT), half of its tensors
(HFT), or a LoRA as large as the 5 %. What is learned, what is forgotten, what a step costs.

    SURGERY_DATA=... python experiments/smollm2_tuning.py     # fine-tunings are kept in the cache
    python experiments/smollm2_tuning.py --fast               # tiny-base on sums: a check that it runs

SmolLM2-135M-Instruct in float32, SFT on short problems of SVAMP in the chat template, the same rows in the same order
for all. LIFT (arXiv:2506.00772): 5 % of every projection, the largest after reduction to rank 32, chosen once. HFT
(arXiv:2404.18466): half of the tensors of every category in every layer, drawn once, embedding and last norm
trained, as there. LoRA: on the projections that LIFT chooses from, of the rank nearest to as many numbers. Every arm is
trained at three learning rates, `RATES` times its own factor: 1 where whole tensors move, 10 for LIFT and LoRA (the
third was added when validation was best at the second for all of them); the one whose model finds validation problems
likeliest is reported. One fine-tuning each: intervals are over problems and passages, and say nothing of other seeds.

* target: mean log-probability of held-out SVAMP solutions (nats a token), and greedy answers that are right
* forgetting: the same of GSM8K's solutions, and of passages of Shakespeare's plays, which no arm trains on
* cost: a process for each arm and round takes the run's first steps. CPU seconds from the second step on; the peak of
  anonymous memory in those steps, above what the loaded model holds

VERDICTS, written before anything was scored. An arm does as well as another on the target when the 95 % interval of the
paired difference in log-probability is above -0.05. LIFT against full fine-tuning, LIFT against LoRA, and HFT against
full fine-tuning are each: held, when it does as well and both other texts are likelier than under the other arm (the
paired intervals above 0); in part, when it does as well and one of them is; else did not hold. Cost, held when all of
these are so and in part when some are: LIFT's memory is at most half of full fine-tuning's, and at most LoRA's; LIFT's
step takes at most 1.05 of full fine-tuning's CPU seconds; HFT's at most 0.85.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena import one_thread, rounded, write
from smollm2_tuning_told import markdown, picture

from analysis.comparison import compare
from analysis.evaluate import accuracy, answer_log_likelihood, untouched
from analysis.results import Result
from surgery.errors import SurgeryError
from surgery.models import encoded_prompts
from surgery.tasks import TASKS, Example, gsm8k, same_number, svamp
from surgery.training import train
from surgery.training.run import open_model
from surgery.tuning import select
from surgery.tuning.decomposed import lora_rank_for, lora_size, merged
from surgery.zoo import cache_dir

ARMS = ("full", "LIFT", "HFT", "LoRA")
RATES = (3e-5, 1e-4, 3e-4)
FACTORS = {"full": 1.0, "LIFT": 10.0, "HFT": 1.0, "LoRA": 10.0}
DENSITY, MARGIN = 0.05, 0.05
COMPARED = (("LIFT", "full"), ("LIFT", "LoRA"), ("HFT", "full"))
WIDTH = 256
"""Tokens of a passage."""


@dataclass(frozen=True)
class Setting:
    """A base, what it learns, and what it is asked before and after."""

    model: str
    data: str
    rows: list[dict[str, Any]]
    validation: list[Example]
    held_out: list[Example]
    answered: int
    """How many of them are answered, not only scored."""
    longest: int
    correct: Callable[[str, Example], bool]
    others: Mapping[str, list[Example] | str]
    """Other texts: problems with solutions, or plain text to cut into passages."""
    passages: int
    chat: bool
    steps: int
    timed: tuple[int, int]
    """Rounds of processes, and steps of each that count."""


def real(tokenizer: Any) -> Setting:
    """SmolLM2 on SVAMP. Raises `SurgeryError` without the data."""
    problems = svamp("train")
    learned = [e for e in problems[:-32] if length(tokenizer, e) <= 88]
    path = Path(os.environ.get("SURGERY_DATA", "")) / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        raise SurgeryError("Shakespeare's plays are missing.", hint="SURGERY_DATA holds tinyshakespeare/input.txt.")
    others: dict[str, list[Example] | str] = {"gsm8k": gsm8k("test", 20), "shakespeare": path.read_text("utf-8")}
    return Setting("smollm2", "svamp", [e.row("svamp") for e in learned], problems[-32:], svamp("test", 60), 40, 32,
                   same_number, others, 12, chat=True, steps=16, timed=(1, 3))  # fmt: skip


def tiny() -> Setting:
    """The same shapes in seconds."""
    task = TASKS.lookup("chain")
    drawn = task.examples(90, 1)
    words = " ".join(e.prompt + e.response for e in TASKS.lookup("copy").examples(60, 1))
    return Setting("tiny-base", "chain", [e.row("chain") for e in drawn[:64]], drawn[64:76], drawn[76:], 8, 36,
                   task.correct, {"reverse": TASKS.lookup("reverse").examples(12, 1), "strings": words}, 4,
                   chat=False, steps=4, timed=(1, 1))  # fmt: skip


def setting(fast: bool) -> Setting:
    """What is run."""
    if fast:
        return tiny()
    svamp("train", 1)  # without the data nothing need be loaded
    return real(open_model("smollm2")[1])


def length(tokenizer: Any, example: Example) -> int:
    """Tokens of a problem with its solution."""
    (prompt,) = encoded_prompts(tokenizer, [example.prompt], True)
    return len(prompt) + len(tokenizer(example.response, add_special_tokens=False)["input_ids"]) + 1


# ---- the arms


def tuning(arm: str, model: Any) -> Any:
    """What a recipe says under `tuning:`."""
    if arm == "full":
        return None
    if arm == "HFT":
        return {"half": {"level": "category", "seed": 0}}
    if arm == "LIFT":
        return {"lift": {"density": DENSITY, "rank": 32}}
    return {"lora": {"rank": lora_rank_for(model, select(model, "random", density=DENSITY).count)}}


def moving(arm: str, model: Any) -> int:
    """How many numbers the arm trains."""
    if arm == "LoRA":
        return lora_size(model, tuning(arm, model)["lora"]["rank"])
    if arm == "HFT":
        return select(model, "half", level="category", seed=0).count
    return select(model, "random", density=DENSITY).count if arm == "LIFT" else sum(
        p.numel() for p in model.parameters()
    )  # fmt: skip


def words(one: Setting, arm: str, rate: float, steps: int, model: Any) -> dict[str, Any]:
    """The recipe of an arm, of which `steps` are made."""
    return {
        "data": one.rows, "objective": "sft", "steps": steps, "batch": {"rows": 8}, "chat": one.chat, "seed": 0,
        "optimizer": {"lr": rate * FACTORS[arm], "betas": (0.9, 0.98), "warmup": 3, "final": 0.1},
        "tuning": tuning(arm, model),
    }  # fmt: skip


def tuned(one: Setting, arm: str, rate: float, cache: Path) -> Path:
    """The folder of a fine-tuning with `training.json` of how it went, trained when it is not there."""
    model, tokenizer = open_model(one.model)
    recipe = words(one, arm, rate, one.steps, model)
    name = hashlib.sha256(json.dumps([one.model, recipe], sort_keys=True).encode()).hexdigest()[:8]
    folder = cache / f"{one.model}-{one.data}-{arm.lower()}-{name}"
    if folder.is_dir():
        return folder
    began, losses = time.process_time(), []
    run = train(model, tokenizer, on_step=lambda step, found: losses.append(found["loss"]), **recipe)
    last = merged(run.model) if arm == "LoRA" else run.model  # type: ignore[arg-type]
    asked, answers = [e.prompt for e in one.validation], [e.response for e in one.validation]
    likely = answer_log_likelihood(last, tokenizer, asked, answers, chat=one.chat)
    said = {"arm": arm, "lr": f"{rate * FACTORS[arm]:g}", "losses": losses, "cpu_seconds": time.process_time() - began,
            "validation": float(likely.mean)}  # fmt: skip
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    last.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "training.json").write_text(json.dumps(said) + "\n", encoding="utf-8")
    os.replace(temporary, folder)
    print(f"{arm} at {said['lr']}: loss {losses[0]:.3f} to {losses[-1]:.3f}, validation {said['validation']:.3f}, "
          f"{said['cpu_seconds']:.0f} s", flush=True)  # fmt: skip
    return folder


# ---- what a model says


def scored(one: Setting, place: str | Path) -> dict[str, Result]:
    """Log-probabilities of the held-out problems and of each other text, and right answers."""
    model, tokenizer = open_model(place)
    found = {"target": likelihood(one, model, tokenizer, one.held_out)}
    for name, other in one.others.items():
        if isinstance(other, str):
            found[name] = passages(model, tokenizer, other, one.passages)
        else:
            found[name] = likelihood(one, model, tokenizer, other)
    found["right"] = accuracy(model, tokenizer, one.held_out[: one.answered], one.correct, chat=one.chat,
                              batch_size=40, max_new_tokens=one.longest)  # fmt: skip
    print(Path(place).name, {k: round(float(v.mean), 3) for k, v in found.items()}, flush=True)
    return found


def likelihood(one: Setting, model: Any, tokenizer: Any, examples: Sequence[Example]) -> Result:
    """Of solutions, nats a token."""
    asked, answers = [e.prompt for e in examples], [e.response for e in examples]
    return answer_log_likelihood(model, tokenizer, asked, answers, chat=one.chat)


@torch.no_grad()
def passages(model: Any, tokenizer: Any, text: str, n: int) -> Result:
    """Mean log-probability of the tokens of `n` passages, spread evenly over a text."""
    width = min(WIDTH, model.config.max_position_embeddings)
    starts = [len(text) * i // n for i in range(n)]
    cut = [tokenizer(text[at : at + 8 * width], add_special_tokens=False)["input_ids"][:width] for at in starts]
    values = []
    with untouched(model):
        for ids in cut:
            row = torch.tensor([ids])
            logits = model(input_ids=row).logits[0, :-1].float()
            values.append(-float(torch.nn.functional.cross_entropy(logits, row[0, 1:])))
    return Result.of(values, starts)


# ---- what a step costs


def cost(arm: str, fast: bool) -> dict[str, Any]:
    """`measured` in a process of its own; freed memory goes back at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--cost", arm, *(["--fast"] if fast else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"The cost of {arm} could not be measured:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(one: Setting, arm: str) -> dict[str, Any]:
    """CPU seconds of each step but the first, and MB of anonymous memory at the peak, above the loaded model."""
    import peft  # noqa: F401 - every arm begins with the same modules
    import scipy.linalg  # noqa: F401

    model, tokenizer = open_model(one.model)
    recipe = words(one, arm, RATES[0], 1 + one.timed[1], model)
    ctypes.CDLL(None).malloc_trim(0)
    before, seconds, last = status("RssAnon"), [], [0.0]

    def after(step: int, found: Mapping[str, float]) -> None:
        now = time.process_time()
        if step == 1:  # with the choice of the numbers, and what is allocated once
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        else:
            seconds.append(now - last[0])
        last[0] = time.process_time()

    train(model, tokenizer, on_step=after, **recipe)
    peak = status("VmHWM") - status("RssFile") - before
    return {"seconds": seconds, "peak": peak, "weights": before}


def status(what: str) -> float:
    """MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def costs(one: Setting, fast: bool) -> dict[str, Any]:
    """Arms in turn, several rounds; seconds in the order of steps."""
    found: dict[str, Any] = {arm: {"seconds": [], "peak": []} for arm in ARMS}
    for _ in range(one.timed[0]):
        for arm in ARMS:
            row = cost(arm, fast)
            found[arm]["seconds"] += row["seconds"]
            found[arm]["peak"].append(row["peak"])
            print(f"{arm}: {row}", flush=True)
    return found


# ---- all of it


def run(one: Setting, cache: Path, fast: bool) -> dict[str, Any]:
    """Everything that the tables tell, by example where an interval is wanted."""
    found: dict[str, Any] = {"cost": costs(one, fast)}
    base = open_model(one.model)[0]
    found["moving"] = {arm: moving(arm, base) for arm in ARMS}
    del base
    places = {arm: [tuned(one, arm, rate, cache) for rate in RATES] for arm in ARMS}
    found["sweep"] = {arm: [json.loads((p / "training.json").read_text("utf-8")) for p in each]
                      for arm, each in places.items()}  # fmt: skip
    results = {"base": scored(one, one.model)}
    for arm in ARMS:
        best = max(range(len(RATES)), key=lambda i: found["sweep"][arm][i]["validation"])
        results[arm] = scored(one, places[arm][best])
    found["values"] = {arm: {k: r.values.tolist() for k, r in each.items()} for arm, each in results.items()}
    return found


def summarised(found: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers of the tables, and the verdicts of the docstring."""
    values = found["values"]
    texts = [k for k in values["base"] if k not in ("target", "right")]

    def over(ours: str, theirs: str, what: str) -> dict[str, float]:
        test = compare(Result.of(values[ours][what]), Result.of(values[theirs][what]))
        return {"mean": test.difference, "low": test.low, "high": test.high}

    arms: dict[str, Any] = {"base": {"scores": {k: float(np.mean(v)) for k, v in values["base"].items()}}}
    for arm in ARMS:
        chosen = max(found["sweep"][arm], key=lambda one: one["validation"])
        times, full = found["cost"][arm]["seconds"], found["cost"]["full"]["seconds"]
        ratios = [a / b for a, b in zip(times, full, strict=True)]
        arms[arm] = {
            "lr": chosen["lr"], "moving": found["moving"][arm],
            "scores": {k: float(np.mean(v)) for k, v in values[arm].items()},
            "over base": {k: over(arm, "base", k) for k in values[arm]},
            "seconds": statistics.median(times), "times full": statistics.median(ratios),
            "range": [min(ratios), max(ratios)], "peak": statistics.median(found["cost"][arm]["peak"]),
        }  # fmt: skip
    pairs: dict[str, Any] = {}
    for ours, theirs in COMPARED:
        each = {what: over(ours, theirs, what) for what in ("target", *texts)}
        kept = [each[t]["low"] > 0 for t in texts]
        well = each["target"]["low"] > -MARGIN
        verdict = "held" if well and all(kept) else "in part" if well and any(kept) else "did not hold"
        pairs[f"{ours} against {theirs}"] = {"differences": each, "verdict": verdict}
    cheap = {
        "LIFT's memory at most half of full": arms["LIFT"]["peak"] <= 0.5 * arms["full"]["peak"],
        "LIFT's memory at most LoRA's": arms["LIFT"]["peak"] <= arms["LoRA"]["peak"],
        "LIFT's step at most 1.05 of full": arms["LIFT"]["times full"] <= 1.05,
        "HFT's step at most 0.85 of full": arms["HFT"]["times full"] <= 0.85,
    }
    verdicts = {name: pair["verdict"] for name, pair in pairs.items()}
    verdicts["cost"] = "held" if all(cheap.values()) else "in part" if any(cheap.values()) else "did not hold"
    return {"arms": arms, "pairs": pairs, "cost": cheap, "sweep": {
        arm: [{"lr": s["lr"], "validation": s["validation"]} for s in found["sweep"][arm]] for arm in ARMS
    }, "texts": texts, "n": {k: len(v) for k, v in values["base"].items()}, "verdicts": verdicts}  # fmt: skip


def check(report: Mapping[str, Any]) -> None:
    """What must be so of any run."""
    summary = report["summary"]
    for arm in ARMS:
        found = summary["arms"][arm]
        assert found["over base"]["target"]["mean"] > 0, f"{arm} learns"
        assert found["lr"] in [f"{rate * FACTORS[arm]:g}" for rate in RATES]
        assert found["peak"] > 0 and found["seconds"] > 0
    moves = {arm: summary["arms"][arm]["moving"] for arm in ARMS}
    assert moves["full"] > moves["HFT"] > moves["LIFT"] and 0.8 < moves["LoRA"] / moves["LIFT"] < 1.25
    assert set(summary["verdicts"].values()) <= {"held", "in part", "did not hold"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--fast", action="store_true", help="tiny-base: shows that it runs")
    parser.add_argument("--cost", choices=ARMS, help=argparse.SUPPRESS)
    options, began = parser.parse_args(), time.perf_counter()
    one_thread()
    if options.cost:
        print(json.dumps(measured(setting(options.fast), options.cost)))
        return
    try:
        one = setting(options.fast)
    except SurgeryError as error:
        print(f"Nothing was run: {error}")
        return
    kept = Path(tempfile.mkdtemp()) if options.fast else cache_dir()
    try:
        found = run(one, kept, options.fast)
    finally:
        if options.fast:
            shutil.rmtree(kept)
    summary = rounded(summarised(found))
    path = write(options.out, "smollm2_tuning", {"summary": summary, **found}, picture(summary), began)
    print(markdown(summary))
    print(summary["verdicts"], path, sep="\n")


if __name__ == "__main__":
    main()
