"""A real family from end to end: vectors taken out of fine-tunings of SmolLM2, looked at, put back, merged, scored.

    SURGERY_DATA=... python experiments/finetune_smollm2.py --out DIR     # makes DIR/base, DIR/gsm8k and DIR/svamp
    SURGERY_DATA=... python experiments/smollm2_merges.py DIR
    python experiments/smollm2_merges.py --fast                           # the same steps on the tiny family

Vectors are stored without loss and put back (every bit is compared), and their geometry is measured. The stored vectors
are added and applied; four merges are made from recipes in mergekit's dialect. Every model is loaded by transformers,
writes a few texts, and is scored on held-out problems: mean log-probability of the reference solutions (nats a token)
and greedy accuracy. The recipes were written before anything was scored; nothing is tuned.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from arena import in_processes, rounded, write
from matplotlib.figure import Figure

from analysis.evaluate import accuracy, answer_log_likelihood, generate, load
from analysis.geometry import geometry
from analysis.plots import HATCHES
from analysis.results import Result
from surgery.checkpoint import open_checkpoint
from surgery.tasks import TASKS, Example, gsm8k, same_number, svamp
from surgery.weights.merge import merge
from surgery.weights.vector import TaskVector
from surgery.zoo import TINY

RECIPES = {
    "breadcrumbs": """
models:
  - model: {a}
    parameters: {{weight: 0.5, density: 0.9, gamma: 0.01}}
  - model: {b}
    parameters: {{weight: 0.5, density: 0.9, gamma: 0.01}}
merge_method: breadcrumbs
base_model: {base}
dtype: float32
out_dtype: bfloat16
""",
    "ties": """
models:
  - model: {a}
    parameters: {{weight: 0.5, density: 0.5}}
  - model: {b}
    parameters: {{weight: 0.5, density: 0.5}}
merge_method: ties
base_model: {base}
parameters: {{normalize: true}}
dtype: float32
out_dtype: bfloat16
""",
    "dare_ties": """
models:
  - model: {a}
    parameters: {{weight: 0.5, density: 0.5}}
  - model: {b}
    parameters: {{weight: 0.5, density: 0.5}}
merge_method: dare_ties
base_model: {base}
dtype: float32
out_dtype: bfloat16
""",
    "slerp": """
models:
  - model: {a}
  - model: {b}
merge_method: slerp
base_model: {a}
parameters: {{t: 0.5}}
dtype: float32
out_dtype: bfloat16
""",
}
PROMPTS = (
    "What is the capital of France?",
    "Tom has 3 boxes with 4 pens each. He gives 5 pens away. How many are left?",
)


@dataclass(frozen=True)
class Problems:
    """Held-out examples: all for the likelihood, the first `generated` for accuracy within `longest` new tokens."""

    examples: list[Example]
    correct: Callable[[str, Example], bool]
    generated: int
    longest: int
    chat: bool = True


def problems(fast: bool) -> dict[str, Problems]:
    """What the models are scored on, under the names of the fine-tunings."""
    if fast:
        return {name: Problems(TASKS[name].examples(16, 5), TASKS[name].correct, 8, 36, False)
                for name in ("chain", "shift")}  # fmt: skip
    return {
        "gsm8k": Problems(gsm8k("test", 60), same_number, 40, 128),
        "svamp": Problems(svamp("test", 100), same_number, 80, 64),
    }


def extract(base: Path, tuned: Path, work: Path) -> dict[str, Any]:
    """Stores tuned - base without loss, puts it back on the base, and compares with the tuned model bit by bit."""
    saved = TaskVector.between(base, tuned).save(work / f"{tuned.name}.safetensors", "lossless", force=True)
    restored = work / f".{tuned.name}-restored"
    applied = TaskVector.load(saved.path).apply(base, restored, force=True)
    before, after = open_checkpoint(tuned), open_checkpoint(restored)
    same = before.tensors.keys() == after.tensors.keys() and all(
        before.read(name).equal(after.read(name)) for name in before.tensors
    )
    shutil.rmtree(restored)
    model = sum(info.nbytes for info in before.tensors.values())
    return {"bytes": saved.nbytes, "of_model": saved.nbytes / model, "seconds": saved.seconds,
            "apply_seconds": applied.seconds, "restored_exactly": same}  # fmt: skip


def build(base: Path, members: Sequence[Path], work: Path) -> dict[str, dict[str, Any]]:
    """The combined and the merged models, as folders of `work`: {name: what the report keeps}."""
    first, second = (TaskVector.load(work / f"{m.name}.safetensors", base) for m in members)
    made: dict[str, dict[str, Any]] = {}
    applied = (first + second).apply(base, work / "sum", force=True)
    made["sum"] = {"vectors": f"{members[0].name} + {members[1].name}", "seconds": applied.seconds,
                   "rounding_loss": applied.rounding_loss, "notes": applied.warnings}  # fmt: skip
    for name, text in RECIPES.items():
        recipe = work / f"{name}.yml"
        recipe.write_text(text.format(a=members[0], b=members[1], base=base).lstrip(), encoding="utf-8")
        merged = merge(recipe, work / name, force=True)
        shown = text.format(a=members[0].name, b=members[1].name, base=base.name).strip()
        made[name] = {"recipe": shown, "seconds": merged.seconds, "rounding_loss": merged.rounding_loss,
                      "notes": merged.notes}  # fmt: skip
    return made


class _Heard(logging.Handler):
    """Keeps what transformers warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.words.append(record.getMessage())


def measure(folder: Path, fast: bool) -> dict[str, Any]:
    """One model: warnings when loaded, texts, and per-example scores on every data set."""
    heard, logger = _Heard(), logging.getLogger("transformers")
    logger.addHandler(heard)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, tokenizer = load(folder)
    logger.removeHandler(heard)
    data = problems(fast)
    prompts = [p.examples[0].prompt for p in data.values()] + ([] if fast else list(PROMPTS))
    chat = not fast
    texts = generate(model, tokenizer, prompts, chat=chat, max_new_tokens=64)
    found: dict[str, Any] = {
        "warnings": heard.words + [str(w.message) for w in caught],
        "samples": [{"prompt": p, "completion": t} for p, t in zip(prompts, texts, strict=True)],
        "values": {},
    }
    for name, part in data.items():
        asked, answers = [e.prompt for e in part.examples], [e.response for e in part.examples]
        likely = answer_log_likelihood(model, tokenizer, asked, answers, chat=part.chat, batch_size=8)
        right = accuracy(model, tokenizer, part.examples[: part.generated], part.correct, chat=part.chat,
                         batch_size=20, max_new_tokens=part.longest)  # fmt: skip
        found["values"][name] = {"likelihood": likely.values.tolist(), "accuracy": right.values.tolist()}
    scores = {n: {k: round(float(np.mean(v)), 3) for k, v in kinds.items()} for n, kinds in found["values"].items()}
    print(f"{folder.name}: {scores}", flush=True)
    return found


def scores(measured: dict[str, dict], base: str) -> dict[str, dict]:
    """Mean, interval and paired test against the base: {model: {data set: {kind: ...}}}."""
    table: dict[str, dict] = {}
    for model, found in measured.items():
        table[model] = {}
        for data, kinds in found["values"].items():
            table[model][data] = {}
            for kind, values in kinds.items():
                mine, reference = Result.of(values), Result.of(measured[base]["values"][data][kind])
                low, high = (round(float(end), 4) + 0.0 for end in mine.interval())  # no "-0.00"
                line = {"mean": float(mine.mean), "low": low, "high": high, "n": len(mine)}
                if model != base:
                    test = mine.paired_test(reference)
                    line |= {"against_base": float(test.difference), "p_value": float(test.p_value)}
                table[model][data][kind] = line
    return table


def markdown(table: dict[str, dict]) -> str:
    """Models in rows."""
    data = list(next(iter(table.values())))
    heads = [f"{d}, {kind}" for d in data for kind in ("log-likelihood", "accuracy")]
    lines = ["| model | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for model, row in table.items():
        cells = []
        for d in data:
            likely, right = row[d]["likelihood"], row[d]["accuracy"]
            cells += [f"{likely['mean']:.3f}", f"{right['mean']:.2f} [{right['low']:.2f}, {right['high']:.2f}]"]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(table: dict[str, dict]) -> Figure:
    """Log-likelihood and accuracy of every model on both data sets."""
    figure = Figure(figsize=(10.5, 4), layout="constrained")
    names, data = list(table), list(next(iter(table.values())))
    for axis, kind, label in zip(
        figure.subplots(1, 2, sharey=True), ("likelihood", "accuracy"),
        ("log-probability of reference solutions, nats a token", "greedy accuracy"), strict=True,
    ):  # fmt: skip
        for i, d in enumerate(data):
            rows = [table[n][d][kind] for n in names]
            mean = np.array([r["mean"] for r in rows])
            spread = [mean - [r["low"] for r in rows], np.array([r["high"] for r in rows]) - mean]
            places = np.arange(len(names)) + 0.4 * (i - 0.5)
            face = "0.75" if i == 0 else "white"
            axis.barh(places, mean, 0.38, xerr=np.clip(spread, 0, None), color=face, hatch=HATCHES[i],
                      edgecolor="black", error_kw={"linewidth": 0.8, "capsize": 2}, label=f"held-out {d}")  # fmt: skip
        axis.set_yticks(range(len(names)), names)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path, nargs="?", help="folder with base, gsm8k and svamp")
    parser.add_argument("--work", type=Path, help="folder for vectors and merged models (default: FAMILY/merges)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="processes that score (one torch thread each)")
    parser.add_argument("--fast", action="store_true", help="the tiny family and few examples: shows that it runs")
    options = parser.parse_args()
    if not options.fast and options.family is None:
        parser.error("name the folder that finetune_smollm2.py wrote")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        if options.fast:
            base, members, workers = TINY / "tiny-base", [TINY / "tiny-chain", TINY / "tiny-shift"], 1
            work = options.work or Path(temporary)
        else:
            base, members = options.family / "base", [options.family / name for name in ("gsm8k", "svamp")]
            work, workers = options.work or options.family / "merges", options.workers
        work.mkdir(parents=True, exist_ok=True)
        vectors = {member.name: extract(base, member, work) for member in members}
        stored = {m.name: TaskVector.load(work / f"{m.name}.safetensors", base) for m in members}
        look = geometry(base, stored).to_dict()
        made = build(base, members, work)
        folders = [base, *members, *(work / name for name in made)]
        measured = dict(
            zip((f.name for f in folders),
                in_processes(measure, [(f, options.fast) for f in folders], workers), strict=True)
        )  # fmt: skip
    table = scores(measured, base.name)
    look = {key: look[key] for key in ("summary", "vectors", "pairs", "family")}
    report = {"vectors": vectors, "geometry": look, "made": made, "scores": table,
              "models": {n: {k: m[k] for k in ("warnings", "samples")} for n, m in measured.items()}}  # fmt: skip
    path = write(options.out, "smollm2_merges", report, picture(table), began)
    print(*look["summary"], sep="\n")
    print(markdown(rounded(table)))
    print(path)


if __name__ == "__main__":
    main()
