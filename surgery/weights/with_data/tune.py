"""Search the numbers of a recipe for the best score: any black-box optimiser over any recipe."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.errors import SurgeryError
from surgery.registry import nearest
from surgery.weights.with_data.space import Recipe, Space, check_space, distribution, inside, value_at, with_values

if TYPE_CHECKING:
    import pandas

Sampler = Literal["tpe", "cmaes", "random"]


@dataclass(frozen=True)
class Trial:
    """One recipe that was tried. `score` is None where it failed, and `error` then says why."""

    number: int
    parameters: dict[str, Any]
    score: float | None
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Tuning:
    """The best numbers, the recipe with them in place, and every trial."""

    best_parameters: dict[str, Any]
    best_score: float
    best_recipe: Recipe
    trials: list[Trial]

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a trial, one column a parameter."""
        import pandas as pd

        return pd.DataFrame([asdict(t) | t.parameters for t in self.trials]).drop(columns="parameters")


def tune(
    recipe: Recipe | str | Path,
    space: Space,
    score: Callable[[Any], float],
    *,
    trials: int = 50,
    seed: int = 0,
    sampler: Sampler = "tpe",
    direction: Literal["maximize", "minimize"] = "maximize",
    merge: Callable[[Recipe], Any] | None = None,
    journal: str | Path | None = None,
    progress: Callable[[Trial], None] | None = None,
) -> Tuning:
    """Search `space` for the recipe whose merged model scores best; `score(merge(recipe))` is asked `trials` times.

        tune("ties.yaml", {"parameters.density": (0.05, 1.0), "models[0].parameters.weight": (0.1, 2.0, "log")}, score)

    `space` maps places in the recipe (a dict, or a YAML file) to ranges (tuples) or choices (lists). Each place must
    have a value in the recipe; these values are the first trial where the space holds them. `merge` makes a model of a
    recipe, by default `surgery.weights.merge.merge_in_memory`. A trial that raises, or scores NaN, is recorded and the
    search goes on. `journal`, a file of JSON lines, keeps each trial as soon as it is done: the same call again goes on
    where it stopped, with the result of a run that never stopped. The same seed gives the same trials.
    Raises `SurgeryError` for unknown places, wrong ranges, a journal of another search, and when all trials fail.
    """
    optuna = _optuna(sampler)
    recipe = _read(recipe)
    _check(space, trials, sampler, direction)
    check_space(recipe, space)
    make = merge or _merge_in_memory()
    distributions = {place: distribution(place, values, optuna) for place, values in space.items()}
    search = {"recipe": recipe, "space": dict(space), "seed": seed, "sampler": sampler, "direction": direction}
    done = _Journal(journal, search)
    table: list[Trial] = []
    with _quiet(optuna):
        study = optuna.create_study(direction=direction, sampler=_sampler(sampler, seed, optuna))
        written = {place: value_at(recipe, place) for place in space}
        if all(inside(written[place], values) for place, values in space.items()):
            study.enqueue_trial(written)
        for number in range(trials):
            asked = study.ask(distributions)
            trial = done.find(number, asked.params)
            if trial is None:
                trial = _try(number, asked.params, recipe, make, score)
                done.add(trial)
                if progress:
                    progress(trial)
            table.append(trial)
            if trial.score is None:
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(asked, trial.score)
    good = [t for t in table if t.score is not None]
    if not good:
        raise SurgeryError(f"All {trials} trials failed; the last one: {table[-1].error}")
    sign = 1 if direction == "maximize" else -1
    best = max(good, key=lambda t: sign * (t.score or 0.0))
    assert best.score is not None
    return Tuning(best.parameters, best.score, with_values(recipe, best.parameters), table)


def _try(
    number: int, values: dict[str, Any], recipe: Recipe, merge: Callable[[Recipe], Any], score: Callable[[Any], float]
) -> Trial:
    start = time.perf_counter()
    value, error = None, None
    try:
        value = float(score(merge(with_values(recipe, values))))
        if not math.isfinite(value):
            value, error = None, f"the score is {value}"
    except Exception as problem:  # one recipe that can't be merged or scored must not end the search
        error = f"{type(problem).__name__}: {problem}"
    return Trial(number, dict(values), value, error, round(time.perf_counter() - start, 3))


def _read(recipe: Recipe | str | Path) -> Recipe:
    if not isinstance(recipe, dict):
        import yaml

        try:
            recipe = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise SurgeryError(f"The recipe can't be read: {error}") from error
    if not isinstance(recipe, dict):
        raise SurgeryError(f"A recipe is a mapping, not {type(recipe).__name__}.")
    return copy.deepcopy(recipe)


def _check(space: Space, trials: int, sampler: str, direction: str) -> None:
    """Everything that can be wrong before the first trial."""
    if trials < 1:
        raise SurgeryError(f"trials must be at least 1, not {trials}.")
    if direction not in ("maximize", "minimize"):
        raise SurgeryError(f"Unknown direction '{direction}': expected 'maximize' or 'minimize'.")
    if sampler == "cmaes" and (len(space) < 2 or any(isinstance(v, list) for v in space.values())):
        raise SurgeryError("CMA-ES searches two or more numbers, and no choices.", hint="Use sampler='tpe'.")


def _sampler(name: str, seed: int, optuna: Any) -> Any:
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.CmaEsSampler(seed=seed) if name == "cmaes" else optuna.samplers.RandomSampler(seed=seed)


def _optuna(sampler: str) -> Any:
    if sampler not in ("tpe", "cmaes", "random"):
        raise SurgeryError(f"Unknown sampler '{sampler}'.", hint=nearest(sampler, ("tpe", "cmaes", "random")))
    try:
        import optuna

        if sampler == "cmaes":
            import cmaes  # noqa: F401
    except ImportError as error:
        missing = f"Tuning with {sampler} needs the package '{error.name}'."
        raise SurgeryError(missing, hint="pip install model-surgery[tune]") from error
    return optuna


def _merge_in_memory() -> Callable[[Recipe], Any]:
    from surgery.weights.merge import merge_in_memory

    return merge_in_memory


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Optuna's log shows warnings only; its level is as before afterwards."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


class _Journal:
    """Trials on disk: a first line that says which search they belong to, then one line each."""

    def __init__(self, path: str | Path | None, search: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.trials: list[Trial] = []
        if self.path is None:
            return
        header = json.dumps(search, sort_keys=True, default=str)
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.write_text(header + "\n", encoding="utf-8")
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines[0].rstrip("\n") != header:
            raise SurgeryError(
                f"{self.path} is the journal of another search (recipe, space, seed, sampler or direction differ).",
                hint="Give another journal, or delete this one.",
            )
        whole = [line for line in lines if line.endswith("\n")]
        try:
            self.trials = [Trial(**json.loads(line)) for line in whole[1:]]
        except (TypeError, ValueError) as error:
            raise SurgeryError(f"{self.path} is no journal of trials: {error}") from error
        if len(whole) < len(lines):  # a last line that was cut off by the end of its run
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            temporary.write_text("".join(whole), encoding="utf-8")
            os.replace(temporary, self.path)

    def find(self, number: int, parameters: dict[str, Any]) -> Trial | None:
        """The trial if it is already done."""
        if number >= len(self.trials):
            return None
        trial = self.trials[number]
        if trial.number != number or trial.parameters != parameters:
            raise SurgeryError(
                f"{self.path}: trial {number} was of other numbers ({trial.parameters}) than this search asks for.",
                hint="Another version of optuna may have written it: start with a new journal.",
            )
        return trial

    def add(self, trial: Trial) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(trial)) + "\n")
