"""What the experiments on few demonstrations share: sums longer than tiny-base was trained on, and paired arms.

tiny-base works out sums of 3 to 6 digits. Here they have 7 or 8: some two hundred demonstrations are worth a good part
of the held-out sums and not all of them, which leaves something to gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.comparison import compare
from analysis.evaluate import evaluate
from analysis.results import Result, stack
from surgery import zoo
from surgery.tasks import make_task
from surgery.training.data import ListRows
from surgery.training.run import open_model

TERMS = [7, 8]
TESTED = 500
LONGEST = 50
"""New tokens; the longest right answer has 45."""
ADAM = {"betas": (0.9, 0.98), "warmup": 0.05}


def base() -> tuple[Any, Any]:
    """tiny-base and its tokenizer."""
    model, tokenizer = open_model(zoo.get("tiny-base"))
    return model, tokenizer


def demonstrations(n: int, seed: int, terms: Sequence[int] = TERMS) -> ListRows:
    """`n` different sums, worked out; none of them is a test sum."""
    asked = {row["prompt"] for row in test_rows(TESTED, terms)}
    task = make_task("chain", terms=terms)
    return ListRows([e.row("chain") for e in task.examples(n + 20, 100 + seed) if e.prompt not in asked][:n])


def test_rows(n: int, terms: Sequence[int] = TERMS) -> list[dict[str, Any]]:
    """The first `n` of the `TESTED` test sums, the same for every arm and seed."""
    return [e.row("chain") for e in make_task("chain", terms=terms).examples(TESTED, 99)[:n]]


def scored(model: Any, tokenizer: Any, n: int, terms: Sequence[int] = TERMS) -> Result:
    """1 where the greedy answer of a test sum is right."""
    found = evaluate(model, test_rows(n, terms), tokenizer=tokenizer, max_new_tokens=LONGEST, batch_size=256)
    return Result.of(found.values, found.labels)


def difference(ours: Mapping[int, Result], theirs: Mapping[int, Result]) -> dict[str, Any]:
    """Mean of ours - theirs over the same seeds and test sums, with the interval of a bootstrap over both."""
    found = compare(stack(ours, "seed"), stack(theirs, "seed"))
    many = len(ours) > 1
    return {"mean": found.difference, "low": found.low if many else None, "high": found.high if many else None,
            "n": len(ours)}  # fmt: skip


def told(found: Mapping[str, Any], digits: int = 2, sign: str = "") -> str:
    """Mean and interval; the mean alone for one run."""
    ends = [found["mean"]] if found["low"] is None else [found["mean"], found["low"], found["high"]]
    mean, *rest = [f"{round(end, digits) + 0.0:{sign}.{digits}f}" for end in ends]  # no "-0.00"
    return mean + (f" [{', '.join(rest)}]" if rest else "")


def verdict(found: Mapping[str, Any]) -> str:
    """Of a difference that is claimed to be above 0."""
    if found["low"] is None:
        return "not asked"
    return "held" if found["low"] > 0 else "the other way round" if found["high"] < 0 else "no clear difference"
