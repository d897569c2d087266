"""Patching sweeps against TransformerLens, nnsight and plain hooks, and against their floor, in one run on one thread.

    python experiments/benchmarks/patching.py             # needs the extra `peers` and a quiet machine; 10 minutes
    python experiments/benchmarks/patching.py --full      # peers run whole sweeps; hours
    python experiments/benchmarks/patching.py --quick     # toys only, seconds: a look
    python experiments/benchmarks/patching.py --tables    # prints the stored results again

8 pairs of 24 tokens, fp32, random weights; the pairs differ at positions 5 and 11 (with "no prefix": 0 and 6). Sweeps
are resid_pre by position and heads (z, q, k, v) over all positions, denoising, of the difference of two logits. Times
are CPU seconds of the process. Arms take turns:

* ours: `patch(...)`, the whole call: both runs recorded, all cells, per example
* TransformerLens: its `get_act_patch_*` on a bridge as a user gets it, who has torch record gradients unless he says
  otherwise; and under `torch.no_grad()`
* nnsight, and plain torch hooks: one forward a cell, without gradients
* trunk: the model's blocks on 42 prompts of 24 tokens. Its multiply-adds a second are the rate that turns the least
  work of a sweep (`patching_floor.py`) into the floor's seconds

Peers' sweeps of the larger models are extrapolated from a few cells, each of which is the same forward. On the cells
that were run all arms are compared. `patching_memory.py` has memory, `patching_costs.py` what is learned from gradients
and paths. Writes `results/patching.json` and prints the tables of `README.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import patching_peers as peers
import torch
from patching_floor import Work, least
from patching_tables import TABLES, markdown
from torch import Tensor

from analysis.metrics import logit_diff
from analysis.patching import patch
from surgery.interop import to_nnsight, to_transformer_lens
from surgery.models import Batch

HERE = Path(__file__).parent
LENGTH = 24
TOKENS = 1008
"""Of the batch that the rate is taken from."""
MODELS: dict[str, Callable[[], Any]] = {
    "GPT-2 small": peers.gpt2,
    "Llama 8x512": peers.llama,
    "toy GPT-2": partial(peers.gpt2, n_layer=3, n_embd=64, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0),
    "toy Llama": partial(
        peers.llama, vocab_size=1000, hidden_size=64, intermediate_size=172, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    ),
}  # fmt: skip
AIMS = {"GPT-2 small": 8.0, "Llama 8x512": 8.5, "toy GPT-2": 7.0, "toy Llama": 7.0}
"""How many times faster than the bridge the residual sweep was to be; without a common prefix `NO_PREFIX` times."""
NO_PREFIX, HEADS = 5.5, 3.5
"""... and head sweeps."""


class Case(NamedTuple):
    """One sweep of one model."""

    model: str
    site: str
    first: int = 5
    """Where the prompts first differ."""

    @property
    def aim(self) -> float | None:
        """Times faster than the bridge; None where nothing was aimed at."""
        if self.site != "resid_pre":
            return HEADS
        return AIMS[self.model] if self.first else None if self.model.startswith("toy") else NO_PREFIX


COMPARED = ("hooks", "bridge, no_grad")
"""Whose values are held against ours: the others' are the same, bit for bit."""
SWEEPS = [("resid_pre", 5), ("resid_pre", 0), ("z", 5), ("q", 5), ("k", 5), ("v", 5)]


class Subject:
    """A model, and the same as the peers have it."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, MODELS[name]()
        self.work = Work.of(self.model.config)
        self.bridge, self.traced = to_transformer_lens(self.model), to_nnsight(self.model)
        self.trunk = self.model.transformer if self.model.config.model_type == "gpt2" else self.model.model
        self.ids = peers.pairs(self.model.config.vocab_size, TOKENS // LENGTH, LENGTH)[0]
        self.rate()

    def rate(self) -> float:
        """Multiply-adds a second of the trunk on a well-filled batch."""
        with torch.no_grad():
            seconds, _ = timed(lambda: self.trunk(self.ids, use_cache=False))
        return len(self.ids) * self.work.trunk(LENGTH) / seconds

    def pairs(self, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Clean, corrupt, answers."""
        return peers.pairs(self.model.config.vocab_size, length=LENGTH, first_difference=first)

    def arms(self, site: str) -> dict[str, tuple[Callable[..., Tensor], Any]]:
        """The peers' sweeps of a site, and what each runs."""
        kinds = ("hooks", "nnsight", "bridge")
        if site == "resid_pre":
            hooks, nnsight, bridge = (getattr(peers, f"{kind}_resid_sweep") for kind in kinds)
        else:
            hooks, nnsight, bridge = (partial(getattr(peers, f"{kind}_head_sweep"), component=site) for kind in kinds)
        return {
            "bridge": (partial(bridge, gradients=True), self.bridge), "bridge, no_grad": (bridge, self.bridge),
            "nnsight": (nnsight, self.traced), "hooks": (hooks, self.model),
        }  # fmt: skip


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds and what came out."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


# ---- sweeps


def sweep_row(subject: Subject, case: Case, rounds: int, cells: int | None) -> dict[str, Any]:
    """One sweep by all arms: median seconds, the floor, and how far apart the values are.

    Peers run all cells in every round, or `cells` of them, once: then the medians are over cells.
    """
    data = clean, corrupt, answers = subject.pairs(case.first)
    metric, arms = logit_diff(answers), subject.arms(case.site)
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *arms)}
    rates, tables = [], {}
    for turn in range(rounds):
        rates.append(subject.rate())
        took, found = timed(lambda: patch(subject.model, clean, corrupt, metric, case.site))
        seconds["ours"].append(took)
        rates.append(subject.rate())
        for name, (run, model) in arms.items():
            if cells is None:
                run(model, *data, cells=[(0, 0)])  # first calls compile and allocate
                took, tables[name] = timed(partial(run, model, *data))
            elif not turn:
                took = peers.timed(run, model, *data, measure=cells).total
                if name in COMPARED:
                    chosen = spread(found.values.shape[1:], case.first if case.site == "resid_pre" else 0, cells)
                    tables[name] = run(model, *data, cells=chosen)
            else:
                continue
            seconds[name].append(took)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    multiply_adds = least(subject.work, clean, corrupt, case.site)
    median["floor"] = multiply_adds / statistics.median(rates)
    values = torch.tensor(found.values.mean(0) + sum(found.columns["corrupt"]) / len(clean))
    apart = {name: (tables[name] - values).abs().nan_to_num().max().item() for name in COMPARED}
    bridges = ("bridge", "bridge, no_grad")
    return {
        **case._asdict(), "cells": values.numel(), "rounds": rounds, "measured": cells or values.numel(),
        "seconds": median,
        "spread": {name: max(times) / min(times) for name, times in seconds.items()},
        "multiply_adds": multiply_adds, "rate": statistics.median(rates), "aim": case.aim,
        "times_faster": {name: median[name] / median["ours"] for name in arms},
        "met": {name: None if case.aim is None else median[name] / median["ours"] >= case.aim for name in bridges},
        "share_of_floor": median["floor"] / median["ours"],
        "bridge_over_floor": {name: median[name] / median["floor"] for name in bridges},
        "apart": apart, "scale": values.abs().max().item(),
    }  # fmt: skip


def spread(shape: Sequence[int], first: int, count: int) -> list[tuple[int, int]]:
    """Cells of a (layer, column) table from column `first` on, each in another layer and column if there are enough."""
    layers, columns = shape[0], shape[1] - first
    found = []
    for i in range(count):
        column = (i * 7 + 1) % columns if i else 0
        found.append(((2 * i + 1) * layers // (2 * count) if i else 0, first + column))
    return list(dict.fromkeys(found))


def sweeps(subjects: Sequence[Subject], full: bool, quick: bool) -> list[dict[str, Any]]:
    """All sweeps. Toys run whole, a few times; of the larger models peers run a few cells."""
    found = []
    for subject in subjects:
        toy = subject.name.startswith("toy")
        rounds = 1 if quick or full else {"GPT-2 small": 1, "Llama 8x512": 3}.get(subject.name, 5)
        for site, first in SWEEPS:
            case = Case(subject.name, site, first)
            found.append(sweep_row(subject, case, rounds, None if full or toy else 3))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


# ---- equality in other precisions, and beyond equal lengths


def precision(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """Ours against one forward a cell by hooks in float64, float32 and bfloat16, on some cells of some sites.

    `rounding` is how far the hooks' own float32 and bfloat16 values are from those in float64 (float32).
    """
    found = []
    for subject in subjects:
        clean, corrupt, answers = subject.pairs(5)
        ours: dict[str, dict[str, Tensor]] = {}
        hooks: dict[str, dict[str, Tensor]] = {}
        sites = ("resid_pre", "z", "k")
        for name, dtype in (("float64", torch.float64), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            model = subject.model if dtype == torch.float32 else copy.deepcopy(subject.model).to(dtype)
            ours[name], hooks[name] = {}, {}
            for site in sites:
                run, _ = subject.arms(site)["hooks"]
                heads = subject.work.kv_heads if site == "k" else subject.work.heads
                columns = LENGTH if site == "resid_pre" else heads
                cells = spread((subject.work.layers, columns), 5 if site == "resid_pre" else 0, 3)
                table = run(model, clean, corrupt, answers, cells=cells)
                hooks[name][site] = torch.stack([table[cell] for cell in cells])
                ours[name][site] = _values(model, clean, corrupt, answers, site, cells)
        for site in sites:
            apart = {name: _apart(ours[name][site], hooks[name][site]) for name in ours}
            rounding = {"float32": _apart(hooks["float32"][site], hooks["float64"][site]),
                        "bfloat16": _apart(hooks["bfloat16"][site], hooks["float32"][site])}  # fmt: skip
            scale = hooks["float64"][site].abs().max().item()
            found.append({"model": subject.name, "site": site, "apart": apart, "rounding": rounding, "scale": scale})
    return found


def _values(
    model: Any, clean: Tensor, corrupt: Tensor, answers: Tensor, site: str, cells: Sequence[tuple[int, int]]
) -> Tensor:
    """Some cells of ours: the mean metric, as the peers have it."""
    layers, columns = (sorted(set(numbers)) for numbers in zip(*cells, strict=True))
    some: dict[str, Any] = {"positions": columns} if site == "resid_pre" else {"parts": columns}
    found = patch(model, clean, corrupt, logit_diff(answers), site, layers=layers, **some)
    before = sum(found.columns["corrupt"]) / len(clean)
    table = torch.tensor(found.values.mean(0) + before)
    return torch.stack([table[layers.index(layer), columns.index(column)] for layer, column in cells])


def _apart(some: Tensor, others: Tensor) -> float:
    return (some.double() - others.double()).abs().max().item()


def padded(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """A batch of prompts of unequal length against the same prompts one by one: the largest difference of an effect.

    `rounding` is the same difference in the metric of plain forwards of the model, padded together and alone.
    """
    found = []
    for subject in subjects:
        clean, corrupt, answers = subject.pairs(5)
        lengths = [LENGTH - 3 * (row % 4) for row in range(len(clean))]
        mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
        batches = [Batch(ids.masked_fill(~mask, 0), mask) for ids in (clean, corrupt)]

        def plain(batch: Batch, answers: Tensor, model: Any = subject.model) -> Tensor:
            with torch.no_grad():
                return logit_diff(answers).of_logits(model(**batch.inputs(model)).logits, batch.last)

        whole = plain(batches[1], answers)
        sites: dict[str, dict[str, Any]] = {"resid_pre": {"positions": [5, 11, -1]}, "z": {}, "k": {}}
        for site, options in sites.items():
            together = patch(subject.model, batches[0], batches[1], logit_diff(answers), site, **options).values
            apart = rounding = 0.0
            for row, length in enumerate(lengths):
                one = [ids[row : row + 1, :length] for ids in (clean, corrupt)]
                own = answers[row : row + 1]
                alone = patch(subject.model, one[0], one[1], logit_diff(own), site, **options).values[0]
                apart = max(apart, float(abs(alone - together[row]).max()))
                rounding = max(rounding, _apart(plain(Batch.of(one[1]), own), whole[row : row + 1]))
            scale = float(abs(together).max())
            found.append({"model": subject.name, "site": site, "apart": apart, "rounding": rounding, "scale": scale})
    return found


# ---- all together


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the sections and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="whole sweeps of the peers, too")
    parser.add_argument("--quick", action="store_true", help="toys only, one round, without memory")
    parser.add_argument("--tables", action="store_true", help="run nothing, print what is stored")
    parser.add_argument("--only", nargs="*", choices=list(TABLES), help="some sections: the others as before")
    parser.add_argument("--output", type=Path, help="where results go; with --quick nowhere if not said")
    options = parser.parse_args(arguments)
    path = options.output or HERE / "results" / "patching.json"
    if options.tables:
        results = json.loads(path.read_text())
        print(markdown(results))
        return results
    from patching_costs import costs
    from patching_memory import memory

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    names = [name for name in MODELS if name.startswith("toy") or not options.quick]
    wanted = options.only or [name for name in TABLES if not (options.quick and name == "memory")]
    subjects = [Subject(name) for name in names] if set(wanted) - {"memory"} else []
    larger = [subject for subject in subjects if options.quick or not subject.name.startswith("toy")]
    sections: dict[str, Callable[[], Any]] = {
        "sweeps": partial(sweeps, subjects, options.full, options.quick),
        "precision": partial(precision, larger),
        "padded": partial(padded, [subject for subject in subjects if subject.name != "GPT-2 small"]),
        "costs": lambda: costs({subject.name: subject.model for subject in larger}),
        "memory": memory,
    }
    results = json.loads(path.read_text()) if path.exists() and options.only else {}
    results |= {"machine": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    for name in wanted:
        results[name] = sections[name]()
    print(markdown(results))
    if options.output or not options.quick:
        path.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
