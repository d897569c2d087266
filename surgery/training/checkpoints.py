"""What a run leaves on disk, and how it goes on from there bit for bit: safetensors and JSON, each folder whole or not.

out/recipe.json        the recipe
out/metrics.jsonl      one line a step            out/rollouts.jsonl   one line a rollout
out/checkpoint-000100  all that resuming needs    out/model            the result, as transformers writes it
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.training.batch import Batch
from surgery.training.policy import Policy
from surgery.training.recipe import Recipe, as_words
from surgery.training.sources import Update

if TYPE_CHECKING:
    from surgery.training.engine import Trainer

SCALARS = ("group", "kind", "temperature", "max_new_tokens", "step", "steps", "total_rows", "total_tokens", "rows")
TENSORS = ("prompt_ids", "prompt_mask", "completion_ids", "lengths", "mask", "inputs")


def adamw(policy: Policy, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; matrices decay, vectors (norms, biases) do not."""
    settings = recipe.optimizer
    moving = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in moving if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in moving if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=recipe.parallel != "fsdp2",
    )


def begin(trainer: Trainer) -> None:
    """Claims the output folder. Raises `SurgeryError` when it holds a run already."""
    out = trainer.out
    assert out is not None
    if trainer.world.main:
        if (out / "metrics.jsonl").exists() or (out / "model").exists():
            raise SurgeryError(
                f"{out} holds a run already.", hint="Go on with it by --resume, or choose another folder."
            )
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.json").write_text(json.dumps(as_words(trainer.recipe), indent=1) + "\n", encoding="utf-8")
    trainer.world.wait()


def save(trainer: Trainer) -> None:
    """A checkpoint of this step. A full disk loses this one only: the one before stays."""
    from safetensors.torch import save_file

    if not trainer.world.main:
        trainer.world.wait()
        return
    assert trainer.out is not None
    folder = trainer.out / f"checkpoint-{trainer.step:06d}"
    temporary = trainer.out / f".checkpoint.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(_untied(trainer.policy), temporary / "policy.safetensors")
        save_file(_moments(trainer), temporary / "optimizers.safetensors")
        if trainer.initial is not None:
            save_file(_own(trainer.initial), temporary / "initial.safetensors")
        if trainer.reference is not None:
            save_file(_untied(trainer.reference), temporary / "reference.safetensors")
        tensors, words = _drawn(trainer.drawn)
        save_file(tensors, temporary / "drawn.safetensors")
        state = {
            "step": trainer.step,
            "iteration": trainer.context.iteration,
            "drawn": words,
            "pieces": [[p.update, p.rows] for p in trainer.pieces],
            "source": trainer.parts.source.state_dict(),
            "curricula": {k: c.state_dict() for k, c in trainer.context.curricula.items()},
            "rewards": trainer.parts.rewards.state_dict() if trainer.parts.rewards else {},
            "noted": trainer.context.noted,
            "random": _random(),
            "log": trainer.log.position(),
        }
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        trainer.log.warn(f"No checkpoint at step {trainer.step} ({error.strerror}); the last good one stays.")
    else:
        for old in _found(trainer.out)[: -trainer.recipe.checkpoint.keep]:
            shutil.rmtree(old, ignore_errors=True)
    trainer.world.wait()


def load(trainer: Trainer) -> None:
    """Goes back to the last checkpoint of the run's folder (to the beginning when it has none)."""
    from safetensors.torch import load_file

    if trainer.out is None:
        raise SurgeryError("Resuming needs the folder of the run.", hint="Pass -o DIR.")
    found = _found(trainer.out)
    if not found:
        trainer.log.truncate({})
        if trainer.world.main:
            trainer.out.mkdir(parents=True, exist_ok=True)
        return
    folder = found[-1]
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    _restore(trainer.policy, load_file(folder / "policy.safetensors"))
    if trainer.reference is not None:
        _restore(trainer.reference, load_file(folder / "reference.safetensors"))
    if trainer.initial is not None:
        trainer.initial = load_file(folder / "initial.safetensors")
    _restore_moments(trainer, load_file(folder / "optimizers.safetensors"))
    trainer.step = trainer.context.step = state["step"]
    trainer.context.iteration = state["iteration"]
    trainer.context.noted = state["noted"]
    from surgery.training.engine import Piece

    trainer.drawn = _undrawn(load_file(folder / "drawn.safetensors"), state["drawn"])
    trainer.pieces = [Piece(update, rows) for update, rows in state["pieces"]]
    trainer.parts.source.load_state_dict(state["source"])
    for name, curriculum in trainer.context.curricula.items():
        curriculum.load_state_dict(state["curricula"][name])
    if trainer.parts.rewards:
        trainer.parts.rewards.load_state_dict(state["rewards"])
    trainer.log.truncate(state["log"])
    _set_random(state["random"])


def finish(trainer: Trainer) -> None:
    """The trained model and its tokenizer in out/model; checkpoints of the run go."""
    out, model = trainer.out, trainer.policy.model
    assert out is not None
    if trainer.world.main:
        temporary = out / f".model.{os.getpid()}"
        model.save_pretrained(temporary)  # type: ignore[operator]
        trainer.tokenizer.save_pretrained(temporary)
        shutil.rmtree(out / "model", ignore_errors=True)
        os.replace(temporary, out / "model")
        for old in _found(out):
            shutil.rmtree(old, ignore_errors=True)
    trainer.world.wait()


def _found(out: Path) -> list[Path]:
    return sorted(path for path in out.glob("checkpoint-*") if (path / "state.json").is_file())


# ---- parts of the state as tensors and JSON


def _own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory: tied ones once each."""
    return {name: value.detach().clone().contiguous().cpu() for name, value in state.items()}


def _untied(policy: Policy) -> dict[str, Tensor]:
    """Parameters (tied ones once) and buffers of the model and of what is trained beside it."""
    parts = dict(policy.model.named_parameters(prefix="model")) | dict(policy.extras.named_parameters(prefix="extras"))
    return _own(parts | dict(policy.model.named_buffers(prefix="buffer")))


def _restore(policy: Policy, saved: dict[str, Tensor]) -> None:
    with torch.no_grad():
        parts = dict(policy.model.named_parameters(prefix="model")) | dict(
            policy.extras.named_parameters(prefix="extras")
        )
        for name, value in (parts | dict(policy.model.named_buffers(prefix="buffer"))).items():
            value.copy_(saved[name])


def _moments(trainer: Trainer) -> dict[str, Tensor]:
    """Optimizer state by optimizer and parameter name."""
    names = {id(p): name for name, p in trainer.policy.named_parameters()}
    found = {}
    for which, optimizer in trainer.optimizers.items():
        found[f"{which}//"] = torch.zeros(0)  # that it exists, whether it has moved or not
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                found[f"{which}/{names[id(parameter)]}/{key}"] = torch.as_tensor(value)
    return _own(found)


def _restore_moments(trainer: Trainer, saved: dict[str, Tensor]) -> None:
    parameters = dict(trainer.policy.named_parameters())
    trainer.optimizers.clear()
    for key, value in saved.items():
        which, name, part = key.split("/")
        optimizer = trainer._optimizer(which)
        if name:
            place = value if part == "step" else value.to(parameters[name].device)
            optimizer.state[parameters[name]][part] = place


def _drawn(updates: list[Update]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Half-used batches: tensors by "update/kind/name", all else as JSON."""
    tensors: dict[str, Tensor] = {}
    words: list[dict[str, Any]] = []
    for i, update in enumerate(updates):
        entry: dict[str, Any] = {"optimizer": update.optimizer, "fresh": update.fresh, "batches": {}}
        for kind, batch in update.batches.items():
            entry["batches"][kind] = {name: getattr(batch, name) for name in SCALARS}
            parts = {name: getattr(batch, name) for name in TENSORS if getattr(batch, name) is not None}
            parts |= {f"columns.{name}": value for name, value in batch.columns.items()}
            tensors |= {f"{i}|{kind}|{name}": value for name, value in parts.items()}
        words.append(entry)
    return _own(tensors), words


def _undrawn(tensors: dict[str, Tensor], words: list[dict[str, Any]]) -> list[Update]:
    updates = []
    for i, entry in enumerate(words):
        batches = {}
        for kind, scalars in entry["batches"].items():
            mine = {k.split("|", 2)[2]: v for k, v in tensors.items() if k.startswith(f"{i}|{kind}|")}
            columns = {k.removeprefix("columns."): v for k, v in mine.items() if k.startswith("columns.")}
            parts: dict[str, Any] = {k: v for k, v in mine.items() if not k.startswith("columns.")}
            batches[kind] = Batch(**parts, **scalars, columns=columns)
        updates.append(Update(batches, entry["optimizer"], entry["fresh"]))
    return updates


def _random() -> dict[str, Any]:
    """States of the global generators: nothing here draws from them, a plug-in or a dropout may."""
    version, keys, *rest = np.random.get_state()  # type: ignore[misc]
    devices = []
    if torch.cuda.is_available():
        devices = [state.tolist() for state in torch.cuda.get_rng_state_all()]
    return {
        "python": random.getstate(),
        "numpy": [version, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "devices": devices,
    }


def _set_random(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["devices"]:
        torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in state["devices"]])
