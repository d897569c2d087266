"""What stands around a run where `tuning:` says more than which numbers move: adapters put on, tickets drawn."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.errors import SurgeryError
from surgery.training.data import demonstrations, rows_of
from surgery.training.recipe import Recipe
from surgery.tuning import Selection, select
from surgery.tuning.plan import Corda, Lora, Lottery
from surgery.tuning.selection import Round

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from surgery.training.moving import Moving

BATCH = 8
"""Rows of calibration text read at a time."""


def adapted(
    tuning: Lora | Corda, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe
) -> PreTrainedModel:
    """The model with a LoRA on it, plain or with CorDA's start; PEFT puts its layers into the model itself."""
    from surgery.tuning.decomposed import corda, covariances, lora

    if isinstance(tuning, Lora):
        return lora(model, rank=tuning.rank, alpha=tuning.alpha, modules=tuning.modules, seed=tuning.seed)  # type: ignore[return-value]
    rows = rows_of(tuning.data if tuning.data is not None else recipe.data, recipe.seed)
    wanted = int(min(tuning.samples, rows.size))
    texts = [rows.row(i) for i in range(wanted)]
    if any("completion" not in row for row in texts):
        raise SurgeryError("CorDA reads prompts with completions, and these data have no column 'completion'.",
                           hint="Name others: tuning: {corda: {data: ...}}.")  # fmt: skip
    found = [demonstrations(texts[i : i + BATCH], tokenizer, chat=recipe.chat) for i in range(0, wanted, BATCH)]
    ids = [torch.cat([b.prompt_ids, b.completion_ids], 1) for b in found]
    masks = [torch.cat([b.prompt_mask, b.attended], 1).long() for b in found]
    batches = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]
    seen = covariances(model, batches, tuning.modules)
    return corda(model, seen, rank=tuning.rank, mode=tuning.mode, alpha=tuning.alpha)  # type: ignore[return-value]


def ticket(
    tuning: Lottery, recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **more: Any
) -> Selection:
    """LT-SFT's selection (arXiv:2110.07560): the numbers that moved most in a run of everything.

    The model is afterwards where the last, sparse run begins: after one round as it was. `more` is for `Trainer`.
    """
    from surgery.training.engine import Trainer

    chosen: Selection | None = None
    for number in range(tuning.rounds):
        if chosen is not None:  # the run of the round before
            sparse = recipe.model_copy(update={"tuning": chosen})
            Trainer(sparse, model, tokenizer, **more).run()
        start = copy.deepcopy(model.state_dict())
        Trainer(recipe.model_copy(update={"tuning": None}), model, tokenizer, **more).run()
        moved = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(start)
        chosen = select(
            model, "delta", density=tuning.density * (number + 1) / tuning.rounds, sibling=moved,
            modules=tuning.modules, turn=Round(number, chosen),
        )  # fmt: skip
    assert chosen is not None
    return chosen


def delta(base: str | Path, model: PreTrainedModel, moving: Moving, path: Path) -> None:
    """Writes what sparse tuning moved beside the model, as a sparse delta of its base (surgery.weights.deltas.file)."""
    from surgery import zoo
    from surgery.weights.deltas.file import SparseDelta

    assert moving.selection is not None
    about = {"selections": moving.turn, "chosen last": moving.selection.count}
    found = SparseDelta.between(zoo.resolved(str(base)), model, method=moving.selection.method, parameters=about)
    replace(found, definition=f"{path.parent.name} - {Path(base).name}").save(path)


def last_selection(out: Path) -> Selection | None:
    """What the last checkpoint of a run goes on with; None without one."""
    found = sorted(out.glob("checkpoint-*/selection.safetensors"))
    return Selection.load(found[-1]) if found else None
