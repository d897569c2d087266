"""`train`: from words or objects to a trained model, in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.training.recipe import Recipe, make

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from surgery.training.plan import Plan

OnStep = Callable[[int, dict[str, float]], None]


@dataclass
class Run:
    """A finished run."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metrics: list[dict[str, float]]
    """One dictionary a step; before them that of step 0, where the untrained model was evaluated."""
    out: Path | None = None
    """The folder, when there is one."""

    @property
    def last(self) -> dict[str, float]:
        """Metrics of the last step."""
        return self.metrics[-1]

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """The steps with an evaluation, each with its `step`, accuracy, nll, ...; the first is before training."""
        named = [{k.removeprefix("eval/"): v for k, v in m.items() if k == "step" or k.startswith("eval/")}
                 for m in self.metrics]  # fmt: skip
        return [each for each in named if len(each) > 1]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a step."""
        import pandas as pd

        return pd.DataFrame(self.metrics)

    def plot(self) -> Figure:
        """The curves of the run."""
        from surgery.training.curves import curves

        return curves(self.metrics)


def train(
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    generator: Any = None,
    on_step: OnStep | None = None,
    parts: Plan | None = None,
    **words: Any,
) -> Run:
    """Trains `model` (a folder, a name of the zoo or hub, or an object, in place) by a recipe or by its words.

    `train("tiny-base", objective=0.7 * GRPO() + 0.3 * SFT(), data="chain", reward="accuracy", steps=20)`. A model in
    memory comes with its tokenizer. With `out`, that folder gets the result, the logs, curves.png and the checkpoints
    that `resume` starts from. `on_step(step, metrics)` is called after each step (a `Panel` shows them live); a
    KeyboardInterrupt that it raises ends the run with a checkpoint of that step. `parts` is the recipe's plan, where
    that is made already. Raises `SurgeryError` in a sentence for whatever is wrong, before a model is loaded where
    possible.
    """
    from surgery.training import checkpoints
    from surgery.training.adapting import adapted, delta, last_selection, ticket
    from surgery.training.engine import Trainer
    from surgery.training.log import check_trackers, read_metrics
    from surgery.training.plan import plan
    from surgery.tuning.plan import Corda, Fixed, Lora, Lottery

    if recipe is None:
        recipe = make(words)
    elif words:
        recipe = recipe.model_copy(update=dict(make({**recipe.model_dump(), **words})))
    if isinstance(model, str | Path) or model is None:
        recipe = recipe.model_copy(update={"model": model or recipe.model})
    if recipe.model is None and model is None:
        raise SurgeryError("No model to train.", hint="model: tiny-base")
    out = out or recipe.output
    folder = None if out is None else Path(out)
    parts = parts or plan(recipe)
    check_trackers(recipe.trackers, folder)
    if folder is not None:
        check_folder(folder, resume)
    if model is None or isinstance(model, str | Path):
        model, loaded = open_model(recipe.model)
        tokenizer = tokenizer or loaded
    if tokenizer is None:
        raise SurgeryError("A model in memory is trained with its tokenizer: pass tokenizer=.")
    if isinstance(parts.tuning, Lora | Corda):
        model = adapted(parts.tuning, model, tokenizer, recipe)
    names = recipe.backbone if isinstance(recipe.backbone, list) else [recipe.backbone] if recipe.backbone else []
    backbones = [open_model(b)[0] if isinstance(b, str | Path) else b for b in names]
    metrics: list[dict[str, float]] = []

    def note(step: int, found: dict[str, float]) -> None:
        metrics.append({"step": step, **found})
        try:
            if on_step:
                on_step(step, found)
        except KeyboardInterrupt:  # between two steps, where all is whole
            if folder is not None:
                checkpoints.save(trainer)
            raise

    if isinstance(parts.tuning, Lottery):
        again = last_selection(folder) if folder is not None and resume else None
        chosen = again or ticket(
            parts.tuning, recipe, model, tokenizer, backbones=backbones, generator=generator, on_step=on_step
        )
        parts.tuning = Fixed(chosen)
    trainer = Trainer(
        recipe, model, tokenizer, out=folder, backbones=backbones, generator=generator, parts=parts,
        on_step=note,
    )  # fmt: skip
    trainer.run(resume=resume)
    if folder is not None and trainer.world.main:
        from surgery.training.curves import curves

        metrics = read_metrics(folder)
        curves(metrics, title=recipe.name).savefig(folder / "curves.png", dpi=110)
        if parts.selecting is not None and isinstance(recipe.model, str | Path):
            delta(recipe.model, model, trainer.moving, folder / "delta.safetensors")
    return Run(model, tokenizer, metrics, folder)


def check_folder(out: Path, resume: bool) -> None:
    """Raises `SurgeryError` when a new run would write over another one, or a finished one is to go on."""
    finished, begun = (out / "model").exists(), (out / "metrics.jsonl").exists()
    if resume and finished and not list(out.glob("checkpoint-*")):
        raise SurgeryError(f"The run in {out} is finished.", hint="For a new one choose another folder.")
    if not resume and (begun or finished):
        raise SurgeryError(f"{out} holds a run already.", hint="Go on with it by --resume, or choose another folder.")


def open_model(name: str | Path) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a folder, a name in the zoo, or a hub name.

    Raises `SurgeryError` for what can't be loaded, and for weights that are cut off or not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from surgery import zoo
    from surgery.checkpoint.reader import open_checkpoint

    folder = zoo.resolved(str(name))
    open_checkpoint(folder)  # refuses files that are cut off, in a sentence
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise SurgeryError(f"The model '{name}' can't be loaded: {str(error).splitlines()[0]}") from error
    for tensor, values in model.named_parameters():
        if not values.isfinite().all():  # training would blame the rows for it
            raise SurgeryError(
                f"The tensor '{tensor}' of {name} holds NaN or infinite numbers.",
                hint="Take the checkpoint from before it broke, or fetch it again.",
            )
    return model, tokenizer
