"""From a recipe to the parts of a run, every mistake refused before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery import zoo
from surgery.checkpoint.reader import open_checkpoint
from surgery.errors import SurgeryError
from surgery.training import objectives
from surgery.training.curriculum import CURRICULA, Curriculum
from surgery.training.data import Rows, rows_of
from surgery.training.named import made
from surgery.training.objectives import Objective
from surgery.training.recipe import Recipe
from surgery.training.rewards import Rewards, build_rewards
from surgery.training.sources import COLUMNS, SOURCES, Dataset, Source, Together
from surgery.tuning.plan import Corda, Fixed, Lora, Sparse, Tuning, parse

HELD_OUT = 7_919
"""Added to the seed for rows of the training task that training never sees."""


@dataclass
class Plan:
    """The parts of a run."""

    objective: Objective
    source: Source
    rows: dict[str, Rows]
    """By kind; "main" is what `data` says."""
    curricula: dict[str, Curriculum]
    rewards: Rewards | None
    evaluation: Rows | None
    tuning: Tuning | None = None

    @property
    def selecting(self) -> Sparse | Fixed | None:
        """The tuning, where it is a selection of the model's own numbers."""
        return self.tuning if isinstance(self.tuning, Sparse | Fixed) else None


def plan(recipe: Recipe) -> Plan:
    """The parts that a recipe names. Raises `SurgeryError` for whatever could not work."""
    objective = objectives.parse(recipe.objective)
    kinds = objective.kind.split("+")
    source = _source(recipe, kinds)
    if recipe.data is None:
        raise SurgeryError("The recipe has no data.", hint="data: {task: chain}")
    rows = {"main": rows_of(located(recipe.data, recipe.folder), recipe.seed)}
    if recipe.demonstrations is not None:
        rows["demonstrations"] = rows_of(located(recipe.demonstrations, recipe.folder), recipe.seed + 1)
    curricula = {kind: made(CURRICULA, recipe.curriculum if kind == "main" else "shuffled") for kind in rows}
    for kind, curriculum in curricula.items():
        curriculum.start(rows[kind], recipe.seed)
        rows[kind] = getattr(curriculum, "rows", rows[kind])  # one with categories may have data of its own
    rewards = build_rewards(recipe.reward, folder=recipe.folder) if recipe.reward is not None else None
    settings: dict[str, Any] = {
        "group": recipe.rollouts.group,
        "source": source,
        "columns": rows["main"].columns,
        "components": None if rewards is None else tuple(rewards.functions),
        "recipe": recipe,
    }
    objective.check(settings)
    source.check(settings)
    _check(recipe, kinds, source, rows, rewards)
    evaluation = None
    if recipe.evaluate.every:
        evaluation = rows_of(located(recipe.evaluate.data or recipe.data, recipe.folder), recipe.seed + HELD_OUT)
    return Plan(objective, source, rows, curricula, rewards, evaluation, _tuning(recipe))


def _tuning(recipe: Recipe) -> Tuning | None:
    """What `tuning` says, held against the rest of the recipe."""
    tuning = parse(recipe.tuning)
    if tuning is None:
        return None
    if recipe.trainable is not None:
        raise SurgeryError("Both `tuning` and `trainable` say what moves.",
                           hint="Keep one of them; with tuning, `modules` and `frozen` narrow it down.")  # fmt: skip
    if recipe.parallel == "fsdp2" and not isinstance(tuning, Lora | Corda):
        raise SurgeryError("Selections are of whole parameters, and FSDP2 cuts them up.", hint="Use parallel: ddp.")
    if isinstance(tuning, Sparse) and isinstance(tuning.sibling, str | Path):
        open_checkpoint(zoo.resolved(str(tuning.sibling)))  # refuses what is no model
    if isinstance(tuning, Corda) and tuning.data is not None:
        tuning = replace(tuning, data=rows_of(located(tuning.data, recipe.folder), recipe.seed))
    return tuning


def located(written: Any, folder: Path) -> Any:
    """What `data` says, its files looked up beside the recipe first."""
    if isinstance(written, list):
        return [located(entry, folder) for entry in written]
    if isinstance(written, str) and Path(written).suffix and (folder / written).is_file():
        return str(folder / written)
    if isinstance(written, Mapping) and "file" in written:
        return {**written, "file": located(str(written["file"]), folder)}
    return written


def _source(recipe: Recipe, kinds: list[str]) -> Source:
    """The recipe's source, completed by plain ones for kinds that it does not give."""
    parts: list[Source] = [] if recipe.source is None else [made(SOURCES, recipe.source)]
    given = [kind for part in parts for kind in part.gives]
    for kind in kinds:
        if kind not in given:
            parts.append(SOURCES["on_policy"]() if kind == "rollouts" else Dataset(kind))
    unread = [kind for kind in given if kind not in kinds]
    if unread:
        raise SurgeryError(
            f"The source gives {unread[0]}, and the objective reads {' and '.join(kinds)} only.",
            hint="Add an objective that reads them, or choose another source.",
        )
    return parts[0] if len(parts) == 1 else Together(parts)


def _check(recipe: Recipe, kinds: list[str], source: Source, rows: dict[str, Rows], rewards: Rewards | None) -> None:
    parts = source.parts if isinstance(source, Together) else [source]
    for part in parts:
        kind = part.draws
        from_rows = rows.get(kind, rows["main"])
        for column in part.columns():
            if column not in from_rows.columns:
                known = ", ".join(sorted(from_rows.columns))
                name = next((n for n, cls in SOURCES.items() if cls is type(part)), type(part).__name__)
                raise SurgeryError(
                    f"The data have no column '{column}', which the source '{name}' reads.", hint=f"Columns: {known}."
                )
        need = recipe.rollouts.prompts if kind == "rollouts" else recipe.batch.rows
        if from_rows.size < need and from_rows.size != math.inf:
            raise SurgeryError(
                f"The data have {int(from_rows.size)} rows, and one batch takes {need}.",
                hint=f"Lower {'rollouts.prompts' if kind == 'rollouts' else 'batch.rows'}.",
            )
    if "rollouts" in kinds or any(part.samples for part in parts):
        if rewards is None:
            raise SurgeryError("The recipe draws rollouts and has no reward.", hint="reward: accuracy")
        rewards.check_columns(rows["main"].columns)
        if recipe.parallel == "fsdp2":
            raise SurgeryError(
                "Rollouts under FSDP2 would gather every layer at every token, in step on all processes.",
                hint="Use parallel: ddp for objectives that sample; fsdp2 trains on demonstrations and pairs.",
            )
        if recipe.rollouts.prompts < recipe.batch.minibatches:
            raise SurgeryError(
                f"{recipe.rollouts.prompts} groups can't be cut into {recipe.batch.minibatches} minibatches."
            )


__all__ = ["COLUMNS", "Plan", "made", "plan"]
