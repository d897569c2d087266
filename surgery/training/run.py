"""`train`: from words or objects to a trained model, in one call."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.training.recipe import Recipe, make

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Run:
    """A finished run."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    metrics: list[dict[str, float]]
    """One dictionary a step."""
    out: Path | None = None
    """The folder, when there is one."""

    @property
    def last(self) -> dict[str, float]:
        """Metrics of the last step."""
        return self.metrics[-1]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a step."""
        import pandas as pd

        return pd.DataFrame(self.metrics)


def train(
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    masks: Any = None,
    generator: Any = None,
    on_step: Any = None,
    **words: Any,
) -> Run:
    """Trains `model` (a folder, a name of the zoo or hub, or an object, in place) by a recipe or by its words.

    `train("tiny-base", objective=0.7 * GRPO() + 0.3 * SFT(), data="chain", reward="accuracy", steps=20)`. A model in
    memory comes with its tokenizer. With `out`, that folder gets the result, the logs and the checkpoints that `resume`
    starts from. Raises `SurgeryError` in a sentence for whatever is wrong, before a model is loaded where possible.
    """
    from surgery.training.engine import Trainer
    from surgery.training.plan import plan

    if recipe is None:
        recipe = make(words)
    elif words:
        recipe = recipe.model_copy(update=dict(make({**recipe.model_dump(), **words})))
    if isinstance(model, str | Path) or model is None:
        recipe = recipe.model_copy(update={"model": model or recipe.model})
    if recipe.model is None and model is None:
        raise SurgeryError("No model to train.", hint="model: tiny-base")
    out = out or recipe.output
    parts = plan(recipe)
    if model is None or isinstance(model, str | Path):
        model, loaded = open_model(recipe.model)
        tokenizer = tokenizer or loaded
    if tokenizer is None:
        raise SurgeryError("A model in memory is trained with its tokenizer: pass tokenizer=.")
    names = recipe.backbone if isinstance(recipe.backbone, list) else [recipe.backbone] if recipe.backbone else []
    backbones = [open_model(b)[0] if isinstance(b, str | Path) else b for b in names]
    metrics: list[dict[str, float]] = []

    def note(step: int, found: dict[str, float]) -> None:
        metrics.append({"step": step, **found})
        if on_step:
            on_step(step, found)

    trainer = Trainer(
        recipe, model, tokenizer, out=out, backbones=backbones, masks=masks, generator=generator, parts=parts,
        on_step=note,
    )  # fmt: skip
    trainer.run(resume=resume)
    if out is not None and (Path(out) / "metrics.jsonl").exists():
        lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
    return Run(model, tokenizer, metrics, None if out is None else Path(out))


def open_model(name: str | Path) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a folder, a name in the zoo, or a hub name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from surgery import zoo

    folder: Any = name
    if not Path(name).exists() and str(name) in {known.name for known in zoo.list_models()}:
        folder = zoo.get(str(name))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise SurgeryError(f"The model '{name}' can't be loaded: {str(error).splitlines()[0]}") from error
