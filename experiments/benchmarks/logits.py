"""What decoding from several models costs: against transformers, the members' own decoding, recomputing, speculation.

    SURGERY_DATA=... python experiments/benchmarks/logits.py             # about eight minutes on a quiet machine
    python experiments/benchmarks/logits.py --fast                       # the tiny family alone, a check that it runs
    python experiments/benchmarks/logits.py --only single memory         # some of the sections, nothing written
    python experiments/benchmarks/logits.py --tables                     # the tables of the stored run

The tiny family (447,552 and 163,072 parameters, float32, a context of 128) as large + tuned - small, and
SmolLM2-135M-Instruct in bfloat16, a vocabulary of 49,152, with two fine-tunings of it as base + 0.5 gsm8k - 0.5 svamp;
for speculation also as the large model of a smaller pair cut out of it (`logits_models.py`). One thread; CPU seconds of
the process; arms in turn, so that a slow minute of the machine hits all; a ratio is the median of the rounds' ratios,
with the least and the largest. But for speculation no token ends a text: all are equally long.

* single: one member by `generate`, and `model.generate` of transformers, greedy, 24 tokens and 64 (48) new ones
* three: three members, over the sum of each one's own decoding in the same round; the share of the time that combining
  log-probabilities takes
* recompute: the same three read the whole prefix anew at every step, all rows of logits made, as released code does it;
  of the larger models nine steps at lengths that are spread evenly are timed, and the others lie between
* speculation: batch 1, real prompts, greedy: plain decoding of the composition, speculative, the large model alone, and
  the floor: the large model reads the same text in one block behind the prompt. Prompts are part of all of them
* memory: the peak above the loaded models, beside the caches by arithmetic, and the largest tensor made

Without SmolLM2 or the data its rows are left out, and the script says so. Writes `results/logits.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from logits_memory import memory
from logits_models import REAL, TINY, Case, case, ids_of

import surgery
from surgery.decoding import CausalDecoder, Sampling, undisturbed
from surgery.errors import SurgeryError
from surgery.logits import Ensemble, generate, speculate

HERE = Path(__file__).parent
PROMPT = 24
AIMS = {"single": 1.0, "three": 1.10, "combination": 0.05, "speculation": 1.5, "acceptance": 0.7}
"""At least transformers' tokens/s; at most so many times the members' sum; at most that share; at least so many times
plain EFT where at least that share of the judged drafts is kept."""
BLOCKS = {"k = 5, adaptive": (5, True), "k = 3": (3, False)}
"""How many tokens are drafted, and whether that number moves."""
Row = dict[str, Any]


def in_turn(arms: dict[str, Callable[[], Any]], rounds: int, warm: bool = True) -> dict[str, list[float]]:
    """CPU seconds of every arm in every round; with `warm` after a round that does not count."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for round_ in range(rounds + warm):
        for arm, run in arms.items():
            began = time.process_time()
            run()
            if round_ or not warm:
                seconds[arm].append(time.process_time() - began)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> Row:
    """The median over rounds of one arm's seconds over another's, and between what."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    return {"ratio": statistics.median(each), "range": [min(each), max(each)]}


def greedy(new: int, rows: int = 1) -> Sampling:
    return Sampling(new, temperature=0.0, batch_size=rows)


# ---- sections


def single(subject: Case, rows: int, new: int, rounds: int) -> Row:
    """One member against `model.generate`."""
    ids, model = ids_of(subject, rows, PROMPT), subject.large.base.model
    tensor = torch.tensor(ids)

    def theirs() -> list[list[int]]:
        out = model.generate(  # type: ignore[operator]
            tensor, attention_mask=torch.ones_like(tensor), do_sample=False, max_new_tokens=new
        )
        return out[:, PROMPT:].tolist()

    def ours() -> list[list[int]]:
        return [one.completion_ids for one in generate(subject.large, ids, sampling=greedy(new, rows))]

    same = ours() == theirs()
    seconds = in_turn({"ours": ours, "transformers": theirs}, rounds)
    return {
        "models": subject.name, "rows": rows, "new": new, "seconds": seconds, "same_tokens": same,
        "tokens_per_s": {arm: rows * new / statistics.median(each) for arm, each in seconds.items()},
        **ratio(seconds["transformers"], seconds["ours"]),
    }  # fmt: skip


def three(subject: Case, rows: int, new: int, rounds: int) -> Row:
    """Three members against the sum of their own decoding, and the share of combining."""
    ids, sampling = ids_of(subject, rows, PROMPT), greedy(new, rows)
    arms: dict[str, Callable[[], Any]] = {"three": partial(generate, subject.ensemble, ids, sampling=sampling)}
    arms |= {one.base.name: partial(generate, one, ids, sampling=sampling) for one in subject.three}
    seconds = in_turn(arms, rounds)
    with combining() as spent:
        began = time.process_time()
        arms["three"]()
        share = sum(spent) / (time.process_time() - began)
    alone = [sum(each) for each in zip(*(seconds[one.base.name] for one in subject.three), strict=True)]
    return {
        "models": subject.name, "rows": rows, "new": new, "seconds": seconds, **ratio(seconds["three"], alone),
        "tokens_per_s": rows * new / statistics.median(seconds["three"]), "vocabulary": subject.ensemble.vocabulary,
        "combination": share,
    }  # fmt: skip


@contextmanager
def combining() -> Iterator[list[float]]:
    """Collects the CPU seconds between the members' logits and the composition's scores."""
    spent: list[float] = []
    scores = Ensemble._scores

    def timed(*args: Any, **words: Any) -> Any:
        began = time.process_time()
        found = scores(*args, **words)
        spent.append(time.process_time() - began)
        return found

    Ensemble._scores = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Ensemble._scores = scores  # type: ignore[method-assign]


def recompute(subject: Case, new: int, rounds: int, points: int | None) -> Row:
    """Cached decoding against reading the prefix anew, at batch 1; `points` steps timed, or all."""
    ids = ids_of(subject, 1, PROMPT)
    where = range(new) if points is None else sorted({round(i * (new - 1) / (points - 1)) for i in range(points)})
    generate(subject.ensemble, ids, sampling=greedy(2))  # warms up
    cached, anew, same = [], [], []
    for _ in range(rounds):
        began = time.process_time()
        text = ids[0] + generate(subject.ensemble, ids, sampling=greedy(new))[0].completion_ids
        cached.append(time.process_time() - began)
        steps = []
        for t in where:
            began = time.process_time()
            token = step_anew(subject.ensemble, text[: PROMPT + t])
            steps.append(time.process_time() - began)
            same.append(token == text[PROMPT + t])
        anew.append(between(list(where), steps, new))
    return {
        "models": subject.name, "new": new, "timed_steps": len(where), "seconds": {"cached": cached, "anew": anew},
        **ratio(anew, cached), "same_tokens": sum(same) / len(same),
    }  # fmt: skip


@torch.no_grad()
def step_anew(ensemble: Ensemble, ids: list[int]) -> int:
    """The next greedy token of a sum of whole forward passes."""
    scores: Any = 0.0
    for one, weight in ensemble.terms:
        logits = one.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        scores = scores + weight * logits.float().log_softmax(-1)
    return int(scores.argmax())


def between(where: Sequence[int], steps: Sequence[float], new: int) -> float:
    """The sum over all steps, those that were not timed on straight lines between those that were."""
    total = 0.0
    for t in range(new):
        right = next(i for i, place in enumerate(where) if place >= t)
        left = right if where[right] == t else right - 1
        share = 0.0 if left == right else (t - where[left]) / (where[right] - where[left])
        total += steps[left] + share * (steps[right] - steps[left])
    return total


def speculation(subject: Case, new: int, rounds: int) -> Row:
    """Speculation at batch 1 against plain decoding, the large model alone, and its reading rate."""
    prompts, sampling = subject.prompts, greedy(new)
    reports: dict[str, Any] = {}
    texts: dict[str, list[list[int]]] = {}

    def note(arm: str, found: Any) -> None:
        texts[arm] = [one.completion_ids for one in found]
        if hasattr(found, "report"):
            reports[arm] = found.report.summary()

    def plain(arm: str, ensemble: Ensemble) -> None:
        note(arm, generate(ensemble, prompts, sampling=sampling))

    def drafted(arm: str, k: int, adaptive: bool) -> None:
        note(arm, speculate(subject.ensemble, prompts, draft=subject.draft, sampling=sampling, k=k, adaptive=adaptive))

    arms: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain("plain", subject.ensemble), "large alone": lambda: plain("large alone", subject.large),
    }  # fmt: skip
    arms |= {arm: partial(drafted, arm, *how) for arm, how in BLOCKS.items()}
    arms["floor"] = lambda: read(subject.large, prompts, texts["plain"])
    speculate(subject.ensemble, prompts[:1], draft=subject.draft, sampling=greedy(2))  # warms up, as `plain` does
    generate(subject.ensemble, prompts[:1], sampling=greedy(2))
    seconds = in_turn(arms, rounds, warm=False)
    tokens = {arm: sum(map(len, ids)) for arm, ids in texts.items()} | {"floor": sum(map(len, texts["plain"]))}
    each = {arm: [value / tokens[arm] for value in seconds[arm]] for arm in arms}
    return {
        "models": subject.label, "draft": str(subject.draft), "prompts": len(prompts), "new": new, "seconds": seconds,
        "tokens": tokens, "seconds_per_token": {arm: statistics.median(values) for arm, values in each.items()},
        "times_plain": {arm: ratio(each["plain"], each[arm]) for arm in arms},
        "times_large": {arm: ratio(each["large alone"], each[arm]) for arm in arms},
        "same_tokens": {arm: agreement(texts["plain"], texts[arm]) for arm in BLOCKS}, "reports": reports,
    }  # fmt: skip


def read(large: Ensemble, prompts: Sequence[Any], texts: Sequence[list[int]]) -> None:
    """The large model reads each prompt, then its completion in one block."""
    decoder: CausalDecoder = large.base.decoder()
    with undisturbed(*large.models):
        for prompt, text in zip(prompts, texts, strict=True):
            ids = torch.tensor([large.encode(prompt)[0][0]])
            _, state = decoder.prefill(ids, torch.ones_like(ids))
            decoder.read(torch.tensor([text]), state)


def agreement(one: Sequence[list[int]], other: Sequence[list[int]]) -> float:
    """Share of the first's tokens before the texts part."""
    same = 0
    for a, b in zip(one, other, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same / sum(map(len, one))


# ---- the run


def plans(real: bool, fast: bool) -> dict[str, list[Callable[[Case], Row]]]:
    """By section, what is measured on a family."""
    rounds = 1 if fast else 3 if real else 7
    new = 8 if fast else 48 if real else 64
    return {
        "single": [partial(single, rows=rows, new=new, rounds=rounds) for rows in (1, 8)],
        "three": [partial(three, rows=rows, new=24 if real else new, rounds=rounds) for rows in (1, 8)],
        "recompute": [
            partial(recompute, new=length, rounds=1 if real else rounds, points=9 if real else None)
            for length in ((new,) if fast else (64, 256) if real else (64, 96))
        ],
        "speculation": [partial(speculation, new=24 if real else 32, rounds=min(rounds, 2 if real else 5))],
        "memory": [lambda subject: memory(subject.name)],
    }


def run(sections: Sequence[str], names: Sequence[str], fast: bool) -> dict[str, list[Row]]:
    """Every section on every family; what can't be had is left out in a sentence."""
    results: dict[str, list[Row]] = {}
    made = lru_cache(maxsize=1)(case)  # one family in memory at a time
    for name in names:
        for section in sections:
            speculating = section == "speculation"
            for drafts in (False, True) if speculating and name == REAL else (False,):
                try:
                    subject = made(name, ends=speculating, drafts=drafts)
                except SurgeryError as error:
                    print(f"{section} of {name} is left out: {error}")
                    continue
                for plan in plans(name == REAL, fast)[section]:
                    results.setdefault(section, []).append(plan(subject))
                    print(LINES[section](results[section][-1]), flush=True)
    return results


# ---- tables


def verdict(value: float, aim: float, least: bool) -> str:
    return "met" if (value >= aim if least else value <= aim) else "not met"


def spread(found: Row, digits: int = 2) -> str:
    """A ratio, and between what it was."""
    low, high = found["range"]
    return f"{found['ratio']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def single_line(row: Row) -> str:
    speed = row["tokens_per_s"]
    return (
        f"| {row['models']} | {row['rows']} | {speed['ours']:.1f} | {speed['transformers']:.1f} | {spread(row)} | "
        f"{verdict(row['ratio'], AIMS['single'], True)} |"
    )


def three_line(row: Row) -> str:
    return (
        f"| {row['models']} | {row['rows']} | {row['tokens_per_s']:.1f} | {spread(row)} | "
        f"{verdict(row['ratio'], AIMS['three'], False)} | {row['vocabulary']:,} | {100 * row['combination']:.1f} % | "
        f"{verdict(row['combination'], AIMS['combination'], False)} |"
    )


def recompute_line(row: Row) -> str:
    cached, anew = (statistics.median(row["seconds"][arm]) for arm in ("cached", "anew"))
    return (
        f"| {row['models']} | {row['new']} | {cached:.2f} | {anew:.2f} | {spread(row, 1)} | "
        f"{row['timed_steps']} of {row['new']} |"
    )


def speculation_line(row: Row) -> str:
    lines = []
    for arm, seconds in row["seconds_per_token"].items():
        report, times = row["reports"].get(arm), row["times_plain"][arm]
        cells = ["", "", "", ""]
        if report:
            counts = report["accept_rate"] >= AIMS["acceptance"]
            cells = [f"{100 * report['accept_rate']:.0f} %", f"{report['tokens_per_round']:.2f}",
                     verdict(times["ratio"], AIMS["speculation"], True) if counts else "",
                     f"{100 * row['same_tokens'][arm]:.0f} %"]  # fmt: skip
        lines.append(
            f"| {row['models']} | {arm} | {1000 * seconds:.2f} | {spread(times)} | "
            f"{row['times_large'][arm]['ratio']:.2f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def memory_line(row: Row) -> str:
    made = " x ".join(map(str, row["largest"]))
    return (
        f"| {row['models']} | {row['rows']} x {row['prompt']} + {row['new']} | {row['weights']:.0f} | "
        f"{row['caches']:.0f} | {row['peak']:.0f} | {made} | {row['logits_of_all']:.0f} |"
    )


LINES: dict[str, Callable[[Row], str]] = {
    "single": single_line, "three": three_line, "recompute": recompute_line, "speculation": speculation_line,
    "memory": memory_line,
}  # fmt: skip
HEADS = {
    "single": ["models", "batch", "ours, tokens/s", "transformers", "times as fast", "at least 1"],
    "three": ["models", "batch", "tokens/s", "three / sum", "at most 1.10", "vocabulary", "combining", "at most 5 %"],
    "recompute": ["models", "new tokens", "cached, s", "recomputed, s", "times faster", "steps timed"],
    "speculation": ["models", "arm", "ms a token", "times plain", "times large alone", "drafts kept",
                    "tokens a round", "1.5 if 70 % kept", "tokens as plain"],
    "memory": ["models", "prompts + new", "weights, MB", "caches, MB", "peak above the weights, MB", "largest tensor",
               "logits of all positions, MB"],
}  # fmt: skip


def tables(results: dict[str, list[Row]]) -> str:
    """Markdown, a table a section."""
    found = []
    for section, rows in results.items():
        head = HEADS[section]
        found.append("\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(LINES[section], rows)]))
    return "\n\n".join(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs everything and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="the tiny family, one round, few tokens")
    parser.add_argument("--only", nargs="+", choices=list(LINES), help="sections; nothing is written")
    parser.add_argument("--models", nargs="+", choices=[TINY, REAL], help="families; nothing is written")
    parser.add_argument("--tables", action="store_true", help="print the tables of the stored run")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "logits.json")
    args = parser.parse_args(arguments)
    if args.tables:
        print(tables(json.loads(args.json.read_text(encoding="utf-8"))["results"]))
        return
    torch.set_num_threads(1)
    load_before, began = os.getloadavg()[0], time.perf_counter()
    results = run(args.only or list(LINES), args.models or ([TINY] if args.fast else [TINY, REAL]), args.fast)
    print("\n" + tables(results))
    report = {
        "threads": 1, "aims": AIMS, "results": results, "cores": os.cpu_count(),
        "load_average": {"before": load_before, "after": os.getloadavg()[0]}, "seconds": time.perf_counter() - began,
        "surgery": surgery.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    print(f"\n{report['seconds']:.0f} s; load {load_before:.2f} before, {os.getloadavg()[0]:.2f} after")
    if not (args.fast or args.only or args.models):
        args.json.parent.mkdir(exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
