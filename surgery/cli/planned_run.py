"""What `surgery train` says before it begins, from headers and recipes alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.cli import frame, models
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from rich.table import Table

    from surgery.training.memory import Memory
    from surgery.training.plan import Plan
    from surgery.training.recipe import Recipe


@dataclass
class Ready:
    """A run whose parts are there and whose model is known, but not loaded."""

    parts: Plan
    samples: bool
    """Whether it draws rollouts."""
    told: dict[str, Any]
    """What will run, word by word."""
    memory: Memory
    notes: list[str]

    def table(self) -> Table:
        """The same for people."""
        from rich.table import Table

        table = Table(title=f"Recipe: {self.told['recipe']}", show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in self.told.items():
            if name != "recipe" and value:
                table.add_row(name, self.memory.render() if name == "memory" else value)
        return table


def ready(recipe: Recipe, folder: Path, *, resume: bool, only: bool) -> Ready:
    """Checks everything that can be checked without loading a model, and says what will run.

    `only`: nothing will run, so that the output may exist. Raises `SurgeryError` for whatever could not work.
    """
    from surgery.training.log import check_trackers
    from surgery.training.plan import plan
    from surgery.training.run import check_folder

    if recipe.model is None:
        raise SurgeryError("The recipe names no model.", hint="Add --model MODEL, for example --model tiny-base.")
    parts = plan(recipe)
    check_trackers(recipe.trackers, folder)
    if not only:
        check_folder(folder, resume)
    samples = parts.rewards is not None and ("rollouts" in parts.source.gives or _samples(parts.source))
    notes = _going_on(recipe, folder) if resume else []
    _check_names(recipe)
    model = sized(recipe.model, parts)  # the first that needs transformers: by now nothing is known to be wrong
    trainable = _trainable(recipe, parts, model)
    memory = _memory(recipe, parts, model)
    told = {
        "recipe": recipe.name,
        "objective": written(parts.objective),
        "source": written(parts.source),
        "data": _data(recipe, parts),
        "curriculum": "" if recipe.curriculum == "shuffled" else written(parts.curricula["main"]),
        "reward": _rewards(parts) if samples else "",
        "model": str(recipe.model),
        "backbone": _short(recipe.backbone) if recipe.backbone else "",
        "tuning": tuned(parts),
        "trainable": trainable,
        "updates": _updates(recipe, samples),
        "evaluation": f"greedy, {recipe.evaluate.n} rows every {recipe.evaluate.every} steps"
        if parts.evaluation
        else "",
        "memory": memory.to_dict(),
        "output": f"{folder}" + (" (going on)" if resume else ""),
    }
    return Ready(parts, samples, told, memory, notes)


def _samples(source: Any) -> bool:
    return bool(getattr(source, "samples", False)) or any(_samples(part) for part in getattr(source, "parts", ()))


def written(thing: Any) -> str:
    """`grpo (beta 0.04)`: a part by its name, with its numbers, and what else is not as usual."""
    from surgery.training.curriculum import CURRICULA
    from surgery.training.objectives import OBJECTIVES
    from surgery.training.sources import SOURCES
    from surgery.tuning.plan import NAMES

    if (parts := getattr(thing, "parts", None)) is not None:
        many = [part if isinstance(part, tuple) else (1.0, part) for part in parts]
        return " + ".join((f"{weight} * " if weight != 1.0 else "") + written(part) for weight, part in many)
    known: dict[str, Any] = {**OBJECTIVES, **SOURCES, **CURRICULA, **NAMES}
    name = next((n for n, kind in known.items() if kind is type(thing)), type(thing).__name__)
    told = []
    for f in fields(thing) if is_dataclass(thing) else ():
        value, usual = getattr(thing, f.name), f.default is not MISSING and getattr(thing, f.name) == f.default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if f.init and not f.name.startswith("_") and (number or (not usual and f.default is not MISSING)):
            told.append(f"{f.name} {value:g}" if number else f"{f.name} {value}")
    return name + (f" ({', '.join(told)})" if told else "")


def _data(recipe: Recipe, parts: Plan) -> str:
    """`chain: rows without end, columns answer, prompt, ...`, for each kind of rows."""
    texts = []
    for kind, rows in parts.rows.items():
        wanted = recipe.data if kind == "main" else recipe.demonstrations
        many = "rows without end" if rows.size == math.inf else frame.count(int(rows.size), "row")
        texts.append(f"{'' if kind == 'main' else kind + ': '}{_short(wanted)}: {many}, columns "
                     f"{', '.join(sorted(rows.columns))}")  # fmt: skip
    return "\n".join(texts)


def _rewards(parts: Plan) -> str:
    assert parts.rewards is not None
    weights = parts.rewards.weights
    return " + ".join(name if weight == 1.0 else f"{weight:g} * {name}" for name, weight in weights.items())


def _check_names(recipe: Recipe) -> None:
    """Raises `SurgeryError` when no tensor of the checkpoint fits `trainable` and `frozen`."""
    from surgery.checkpoint import open_checkpoint

    names = open_checkpoint(models.model(str(recipe.model))).tensors
    if not any(recipe.moves(name) for name in names):
        raise SurgeryError(
            "No parameter of the model may move.",
            hint=f"`trainable` and `frozen` are patterns over names like {next(iter(names))}.",
        )


def _trainable(recipe: Recipe, parts: Plan, model: Any) -> str:
    """How many numbers move."""
    from surgery.training.memory import moves

    moving = moves(recipe, parts.tuning, model).numbers
    all_ = sum(p.numel() for p in model.parameters())
    told = f"{moving:,} of {all_:,} numbers"
    if parts.tuning is None:
        names = [n for n, _ in model.named_parameters() if recipe.moves(n)]
        return told + ("" if moving == all_ else f", in {frame.count(len(names), 'tensor')}")
    return told + (" beside the model's" if hasattr(parts.tuning, "rank") else "") + f" ({moving / all_:.2%})"


def tuned(parts: Plan) -> str:
    """`lift (rank 32), density 0.05 of each tensor, anew every 100 steps`."""
    tuning: Any = parts.tuning
    if hasattr(tuning, "selection"):
        return f"a selection made before ({tuning.selection.method})"
    if not hasattr(tuning, "selector"):
        return "" if tuning is None else written(tuning)
    budget, told = tuning.budget, [written(tuning.selector)]
    told += [f"{name} {getattr(budget, name):g}" for name in ("density", "count", "lora_rank") if getattr(budget, name)]
    told += [f"of each {budget.scope}" if budget.scope != "global" else "of all tensors together"] * budget.given
    told += [f"anew every {frame.count(tuning.refresh, 'step')}"] * bool(tuning.refresh)
    return ", ".join(told)


def empty(name: Any) -> Any:
    """The model without numbers: names and shapes. Raises `SurgeryError` for what can't be loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from surgery.checkpoint.reader import locate

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(locate(models.model(str(name))))).float()
    except (OSError, ValueError) as error:
        raise SurgeryError(f"The model '{name}' can't be loaded: {str(error).splitlines()[0]}") from error


def sized(name: Any, parts: Plan) -> Any:
    """The model without numbers, or with them where only they tell how many of them move."""
    if not getattr(parts.tuning, "reads", False):
        return empty(name)
    from surgery.models import no_bars
    from surgery.training.run import open_model

    with no_bars():
        return open_model(name)[0]


def tokenizer_of(name: Any) -> Any:
    """The tokenizer of a model. Raises `SurgeryError` for what can't be loaded."""
    from transformers import AutoTokenizer

    from surgery.checkpoint.reader import locate

    try:
        return AutoTokenizer.from_pretrained(locate(models.model(str(name))))
    except (OSError, ValueError) as error:
        raise SurgeryError(f"The model '{name}' can't be loaded: {str(error).splitlines()[0]}") from error


def _memory(recipe: Recipe, parts: Plan, model: Any) -> Memory:
    """Of one process, from models without numbers and from the lengths of the first rows."""
    from surgery.training.memory import estimate, lengths

    backbones = recipe.backbone if isinstance(recipe.backbone, list) else [recipe.backbone] if recipe.backbone else []
    frozen = [empty(name) for name in backbones]
    tokenizer = tokenizer_of(recipe.model)
    prompt, completion = lengths(recipe, parts, tokenizer)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return estimate(recipe, model, parts, prompt=prompt, completion=completion, backbones=frozen, processes=processes)


def _updates(recipe: Recipe, samples: bool) -> str:
    batch, rollouts = recipe.batch, recipe.rollouts
    if samples:
        what = (f"{rollouts.prompts} prompts x {rollouts.group} completions of at most "
                f"{frame.count(rollouts.max_new_tokens, 'token')}")  # fmt: skip
        passes = batch.epochs * batch.minibatches
        what += f", {passes} updates from each batch" if passes > 1 else ""
    else:
        what = frame.count(batch.rows, "row")
    what += f", in passes of {batch.micro_batch}" if batch.micro_batch else ""
    lr = f"{recipe.optimizer.shape} learning rate {recipe.optimizer.lr:g}"
    return f"{frame.count(recipe.steps, 'step')} of {what}; {lr}; seed {recipe.seed}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "; ".join(_short(v) for v in value[:4]) + ("; ..." if len(value) > 4 else "")
    return str(value)


def _going_on(recipe: Recipe, folder: Path) -> list[str]:
    """What there is to say about where a resumed run begins. Raises `SurgeryError` if its recipe is another one."""
    from surgery.training.recipe import as_words
    from surgery.training.state import same_recipe

    if not last_checkpoint(folder):
        return [f"{folder} has no checkpoint: the run begins at its first step."]
    file = folder / "recipe.json"
    if file.is_file():
        same_recipe(json.loads(file.read_text(encoding="utf-8")), as_words(recipe))  # the engine tells its remark
    return []


def last_checkpoint(folder: Path) -> int:
    """The step that --resume would go on from; 0 without a checkpoint."""
    steps = [int(path.parent.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*/state.json")]
    return max(steps, default=0)
