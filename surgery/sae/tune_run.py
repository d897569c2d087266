"""`run`: every arm of a recipe trained and scored, with what of the source's lead each recovers.

    found = run(recipe, score, out="runs/tuning")      # score(model, tokenizer, rows) -> one number a row
    found.recovered("source")                          # a fraction for each seed

    recovered = (accuracy - accuracy of the target) / (accuracy of the source - accuracy of the target)

Arms are paired: with one seed they meet the same texts in the same order. Sites and learning rates are chosen for each
arm by itself, on validation rows and on seeds that are not reported.

out/recipe.json                the recipe              out/result.json    all numbers
out/runs/NAME.json             one run each: what a run that was stopped need not do again
out/adapters/ARM/seed-0        each LoRA: `target+out/adapters/ARM/seed-0` is a model
out/dictionaries/seed-0/WHOSE/SITE
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.sae import formats
from surgery.sae.activations import Shuffled, Stream
from surgery.sae.dictionary import Dictionary
from surgery.sae.metrics import measure
from surgery.sae.recipe import rule_of
from surgery.sae.source import opened
from surgery.sae.text import Text, counted, text_rows
from surgery.sae.text import check as check_rows
from surgery.sae.train import Entry, Settings, fit
from surgery.sae.tune import tune
from surgery.sae.tune_arms import ARMS, Bench, check_shapes, shuffled_source
from surgery.sae.tune_files import Runs
from surgery.sae.tune_recipe import Recipe, check
from surgery.training.data import ListRows, Row, Rows

Score = Callable[[Any, Any, Sequence[Row]], Sequence[float]]
"""1 for each row (model, tokenizer, rows) that is answered rightly, else 0."""
OnRun = Callable[[int, int, str], None]
"""(done, of so many, name) behind each run."""
MEASURED = 16
"""Batches of text that a dictionary is measured on."""


@dataclass
class Outcome:
    """What came of each arm."""

    target: list[float]
    """Of each test row, before."""
    source: list[float]
    arms: dict[str, dict[int, list[float]]]
    """By arm and seed."""
    chosen: dict[str, dict[str, Any]]
    """By arm: its site (None: it has none) and learning rate."""
    sweep: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By arm, what was tried: site, lr and accuracy on validation rows."""
    dictionaries: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of the first reported seed, on the target's activations: by whose it is and its site."""

    def accuracy(self, arm: str) -> list[float]:
        """Of each seed."""
        return [_mean(values) for values in self.arms[arm].values()]

    def recovered(self, arm: str) -> list[float]:
        """Of each seed. Raises `SurgeryError` where source and target are equally good."""
        low, high = _mean(self.target), _mean(self.source)
        if low == high:
            raise SurgeryError(f"Source and target answer {low:.1%} of the rows: there is nothing to recover.",
                               hint="Evaluate on what the source is better at.")  # fmt: skip
        return [(value - low) / (high - low) for value in self.accuracy(arm)]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {"target": self.target, "source": self.source, "arms": self.arms, "chosen": self.chosen,
                "sweep": self.sweep, "dictionaries": self.dictionaries}  # fmt: skip


def check_texts(recipe: Recipe) -> None:
    """Raises `SurgeryError` for texts that are not there, or can't be read as the recipe says."""
    dictionary = recipe.reading.model_copy(update={"positions": recipe.dictionary.positions})
    for data, readings in ((recipe.data, (recipe.reading, dictionary)), (recipe.trigger, (dictionary,))):
        if data is not None:
            rows = text_rows(data, recipe.folder)
            for reading in readings:
                check_rows(rows, reading)


def run(
    recipe: Recipe,
    score: Score,
    *,
    out: str | Path | None = None,
    force: bool = False,
    models: tuple[Any, Any, Any] | None = None,
    on_run: OnRun | None = None,
) -> Outcome:
    """Every arm of the recipe, its choices first. `models` (target, source, tokenizer) stand in for those named.

    With `out`, that folder gets the adapters, the dictionaries and result.json; begun before by the same recipe, it is
    gone on with, and `force` begins anew. Raises `SurgeryError` in a sentence for whatever is wrong.
    """
    check(recipe)
    check_texts(recipe)
    out = out or recipe.output
    runs = Runs(None if out is None else Path(out))
    runs.check(recipe, force)
    if models is None:
        (target, source), tokenizer = opened([recipe.target, recipe.source], "auto")
    else:
        target, source, tokenizer = models
    if "shuffled" in recipe.arms:
        check_shapes(target, source)
    runs.begin(recipe, force)
    test, validation = held_out(recipe)
    scored = {name: list(map(float, score(model, tokenizer, test)))
              for name, model in {"target": target, "source": source}.items()}  # fmt: skip
    lab = Lab(recipe, runs, target, source, tokenizer, {"test": test, "validation": validation}, score)
    wanted = [(arm, choice, seed) for seed in recipe.sweep.seeds for arm in recipe.arms
              for choice in recipe.choices(arm) if len(recipe.choices(arm)) > 1]  # fmt: skip
    total = len(wanted) + len(recipe.arms) * len(recipe.seeds)
    tried: dict[tuple[str, tuple[str, float]], list[float]] = {}
    for done, (arm, choice, seed) in enumerate(wanted, 1):
        tried.setdefault((arm, choice), []).append(_mean(lab.run(arm, choice, seed, "validation")))
        _tell(on_run, done, total, f"{arm}, choosing")
    best = {arm: _best(arm, recipe, tried) for arm in recipe.arms}
    arms: dict[str, dict[int, list[float]]] = {arm: {} for arm in recipe.arms}
    dictionaries: dict[str, dict[str, float]] = {}
    for number, (seed, arm) in enumerate(((s, a) for s in recipe.seeds for a in recipe.arms), 1):
        arms[arm][seed] = lab.run(arm, best[arm], seed, "test")
        if number == len(recipe.arms):  # before the first seed's dictionaries make room for the next one's
            dictionaries = lab.measured()
        _tell(on_run, len(wanted) + number, total, f"{arm}, seed {seed}")
    found = Outcome(
        scored["target"], scored["source"], arms,
        {arm: {"site": best[arm][0] if ARMS[arm].site else None, "lr": best[arm][1]} for arm in recipe.arms},
        {arm: [{"site": site, "lr": lr, "accuracy": _mean(tried[arm, (site, lr)])}
               for site, lr in recipe.choices(arm) if (arm, (site, lr)) in tried] for arm in recipe.arms},
        dictionaries,
    )  # fmt: skip
    runs.finish(found.to_dict())
    return found


def _best(arm: str, recipe: Recipe, tried: Mapping[Any, Sequence[float]]) -> tuple[str, float]:
    """The choice of the highest accuracy; of equal ones the smallest learning rate."""
    choices = recipe.choices(arm)
    return max(choices, key=lambda c: (_mean(tried[arm, c]), -c[1])) if len(choices) > 1 else choices[0]


def _tell(on_run: OnRun | None, done: int, total: int, name: str) -> None:
    if on_run is not None:
        on_run(done, total, name)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---- models and rows


def held_out(recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """Rows of different prompts for the test, and others for validation.

    Raises `SurgeryError` for rows without prompt and answer, or fewer than are asked for.
    """
    settings = recipe.evaluate
    rows = text_rows(settings.data or recipe.data, recipe.folder, settings.seed)
    if not {"prompt", "answer"} <= rows.columns:
        raise SurgeryError("Rows to evaluate on have a prompt and an answer, and these have "
                           f"{', '.join(sorted(rows.columns))}.", hint="evaluate: {data: {task: chain}}")  # fmt: skip
    wanted = settings.n + recipe.sweep.n
    numbers = count() if rows.size == float("inf") else range(int(rows.size))
    different: dict[Any, Row] = {}
    for number in islice(numbers, 50 * wanted):
        row = rows.row(number)
        different.setdefault(str(row["prompt"]), row)
        if len(different) == wanted:
            found = list(different.values())
            return found[: settings.n], found[settings.n :]
    raise SurgeryError(f"{wanted:,} rows with different prompts are asked for, and there are {len(different):,}.",
                       hint="Lower evaluate.n or sweep.n.")  # fmt: skip


class Apart:
    """Endless rows without some prompts: where one of those would stand, a later row does."""

    size = float("inf")

    def __init__(self, rows: Rows, prompts: set[str]) -> None:
        self.rows, self.prompts, self.columns = rows, prompts, rows.columns

    def row(self, index: int) -> Row:
        """Row `index`, or the first behind it, in steps, whose prompt may be seen."""
        for number in range(index, index + 1000 * (1 << 32), 1 << 32):
            row = self.rows.row(number)
            if str(row.get("prompt")) not in self.prompts:
                return row
        raise SurgeryError("Nearly all rows of the data are kept for evaluation.", hint="Lower evaluate.n.")


def apart(rows: Rows, prompts: set[str]) -> Rows:
    """`rows` without those whose prompt is asked in the evaluation."""
    if rows.size == float("inf"):
        return Apart(rows, prompts)
    each = (rows.row(i) for i in range(int(rows.size)))
    return ListRows([row for row in each if str(row.get("prompt")) not in prompts], "Beside what is evaluated the data")


# ---- one run


class Lab:
    """Trains single runs; dictionaries are made when an arm asks, once a seed, all sites over one stream."""

    def __init__(
        self, recipe: Recipe, runs: Runs, target: Any, source: Any, tokenizer: Any,
        rows: Mapping[str, Sequence[Row]], score: Score,
    ) -> None:  # fmt: skip
        self.recipe, self.runs, self.target, self.source = recipe, runs, target, source
        self.tokenizer, self.rows, self.score = tokenizer, rows, score
        self._made: dict[tuple[str, int], dict[str, Dictionary]] = {}

    def run(self, arm: str, choice: tuple[str, float], seed: int, part: str) -> list[float]:
        """The scores of one run on a part of the rows: trained, or as it was kept."""
        site, lr = choice
        name = f"{part}-{arm}-seed{seed}" + (f"-{site}" if ARMS[arm].site else "") + f"-{lr!r}"
        known = self.runs.known(name)
        if known is not None:
            return known
        keep = self.runs.adapter(arm, seed) if part == "test" else None
        model = self.trained(arm, site, lr, seed, keep)
        values = list(map(float, self.score(model, self.tokenizer, self.rows[part])))
        self.runs.keep(name, values)
        return values

    def trained(self, arm: str, site: str, lr: float, seed: int, keep: Path | None = None) -> Any:
        """The model that one arm makes; its LoRA is written to `keep`."""
        from surgery.tuning.decomposed import export

        bench = Bench(self.source, seed, lambda whose: self.dictionaries(whose, seed)[site])
        setup = ARMS[arm].make(bench)
        if setup is None:
            return self.target
        words = self.recipe.tuning
        found = tune(
            copy.deepcopy(self.target), setup.dictionary, site, self.text(self.recipe.data, seed, batch=words.rows),
            teacher=setup.teacher, labels=setup.labels, gradient=words.gradient, adapter=words.adapter, lr=lr,
            steps=words.steps, clip=words.clip, seed=seed, gradient_checkpointing=words.gradient_checkpointing,
            keep=True,
        )  # fmt: skip
        if keep is not None:
            shutil.rmtree(keep, ignore_errors=True)
            keep.parent.mkdir(parents=True, exist_ok=True)
            export(found, keep)
        return found.merge_and_unload()

    def text(self, data: Any, seed: int, **reading: Any) -> Text:
        """Batches of sequences, none of them of a row that is evaluated; `reading` goes before the recipe's."""
        asked = {str(row["prompt"]) for part in self.rows.values() for row in part}
        found = apart(text_rows(data, self.recipe.folder, seed), asked)
        return Text(found, self.tokenizer, self.recipe.reading.model_copy(update=reading), seed)

    def dictionaries(self, whose: str, seed: int) -> dict[str, Dictionary]:
        """By site, of "source", "target" or "shuffled": stage one."""
        if (whose, seed) not in self._made:
            self._made = {key: made for key, made in self._made.items() if key[1] == seed}  # one seed at a time
            folder = self.runs.dictionaries(whose, seed)
            sites = self.recipe.sites
            if folder is not None and all((folder / site).is_dir() for site in sites):
                self._made[whose, seed] = {site: formats.load(folder / site)[0] for site in sites}
            else:
                self._made[whose, seed] = self._fitted(whose, seed)
                for site in sites if folder is not None else ():
                    formats.save(self._made[whose, seed][site], folder / site, "surgery", force=True)  # type: ignore[operator]
        return self._made[whose, seed]

    def _fitted(self, whose: str, seed: int) -> dict[str, Dictionary]:
        settings = self.recipe.dictionary
        model = {"source": lambda: self.source, "target": lambda: self.target,
                 "shuffled": lambda: shuffled_source(self.target, self.source, seed)}[whose]()  # fmt: skip
        if settings.start is None:
            width = model.get_input_embeddings().weight.shape[1]
            rule = rule_of(settings.rule)
            start = {site: Dictionary(width, settings.latents, rule, seed=seed) for site in self.recipe.sites}
        else:
            path = settings.start if settings.start.is_absolute() else self.recipe.folder / settings.start
            start = {site: formats.load(path)[0] for site in self.recipe.sites}
        learning = Settings(
            lr=settings.lr, warmup=settings.warmup, shape=settings.shape, dead_after=100 * settings.rows,
            normalise=settings.start is None,
        )  # fmt: skip
        entries = {site: Entry(site, dictionary, learning) for site, dictionary in start.items()}
        if settings.steps:
            text = self.text(self.recipe.trigger or self.recipe.data, seed, positions=settings.positions)
            stream = Stream(model, self.recipe.sites, text, keep=counted,
                            longest=self.recipe.reading.longest)  # fmt: skip
            rows = Shuffled(stream, size=settings.buffer, batch=settings.rows, seed=seed)
            fit(entries, rows, steps=settings.steps)
        return {site: entry.dictionary.requires_grad_(False) for site, entry in entries.items()}

    def measured(self) -> dict[str, dict[str, float]]:
        """How well the dictionaries of the first seed rebuild what the target has: what the arms differ by."""
        needs = {"source": {"source", "random", "noise", "source_teacher", "labels"}, "target": {"own"},
                 "shuffled": {"shuffled"}}  # fmt: skip
        seed, found = self.recipe.seeds[0], {}
        text = islice(self.text(self.recipe.data, seed, positions=self.recipe.dictionary.positions), MEASURED)
        stream = Stream(self.target, self.recipe.sites, text, keep=counted, longest=self.recipe.reading.longest)
        rows = list(stream)
        for whose in (w for w, arms in needs.items() if arms & set(self.recipe.arms)):
            for site, dictionary in self.dictionaries(whose, seed).items():
                quality = measure(dictionary, (each[site] for each in rows))
                found[f"{whose}, {site}"] = {"fvu": quality.fvu, "l0": quality.l0, "dead": quality.dead}
        return found
