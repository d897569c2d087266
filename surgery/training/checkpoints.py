"""What a run leaves on disk, and how it goes on from there bit for bit: safetensors and JSON, each folder whole or not.

out/recipe.json        the recipe                 out/memory.json      bytes it was estimated to take
out/metrics.jsonl      one line a step            out/rollouts.jsonl   one line a rollout
out/checkpoint-000100  all that resuming needs    out/model            the result, as transformers writes it

A folder is written under a name that begins with a dot, brought to the disk (fsync) and renamed: whenever the process
dies, each folder is whole or absent. What was left over is cleared away at the next start.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.checkpoint.disk import reason, renamed
from surgery.errors import SurgeryError
from surgery.training import distributed
from surgery.training.moving import parts_of, sparse_part
from surgery.training.policy import Policy
from surgery.training.recipe import as_words
from surgery.training.state import drawn_as_tensors, random_state, same_recipe, set_random_state, undrawn
from surgery.tuning import Selection

if TYPE_CHECKING:
    from surgery.training.engine import Trainer


CHOSEN = "chosen"
"""Stands for the numbers of a selection among the names of parameters."""


def begin(trainer: Trainer) -> None:
    """Claims the output folder. Raises `SurgeryError` when it holds a run already."""
    out = trainer.out
    assert out is not None
    if (out / "metrics.jsonl").exists() or (out / "model").exists() or _found(out):
        raise SurgeryError(f"{out} holds a run already.", hint="Go on with it by --resume, or choose another folder.")
    trainer.world.wait()  # everybody has looked
    if trainer.world.main:
        _claim(trainer, out)
    trainer.world.wait()


def _claim(trainer: Trainer, out: Path) -> None:
    """The folder with its recipe, and without what an interrupted write left there."""
    out.mkdir(parents=True, exist_ok=True)
    for left in (*out.glob(".checkpoint.*"), *out.glob(".model.*")):
        shutil.rmtree(left, ignore_errors=True)
    for name, words in (("memory.json", trainer.memory.to_dict()), ("recipe.json", as_words(trainer.recipe))):
        temporary = out / f".{name}"
        temporary.write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, out / name)


def save(trainer: Trainer) -> None:
    """A checkpoint of this step. A full disk loses this one only: the one before stays, and the run goes on.

    Raises `SurgeryError` when a row or a plug-in's state holds what JSON can't.
    """
    assert trainer.out is not None
    with torch.no_grad():
        problem = _written(trainer, trainer.out / f"checkpoint-{trainer.step:06d}", _files(trainer))
    if problem:
        trainer.log.warn(f"No checkpoint at step {trainer.step} ({problem}); the last good one stays.")
    elif trainer.world.main:
        for old in _found(trainer.out)[: -trainer.recipe.checkpoint.keep]:
            shutil.rmtree(old, ignore_errors=True)
    trainer.world.wait()


def _files(trainer: Trainer) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Names of the files and what writes them, one in memory at a time; all processes take part in gathering."""
    noted = [
        ("policy", lambda: _tensors(trainer.policy)),
        ("optimizers", lambda: _moments(trainer)),
        ("reference", lambda: _tensors(trainer.reference) if trainer.reference is not None else {}),
        ("initial", lambda: _own(trainer.initial or {})),
    ]
    for name, gathered in noted:
        tensors = gathered()
        if tensors or name == "optimizers":
            yield f"{name}.safetensors", lambda path, tensors=tensors: _save(tensors, path)  # type: ignore[misc]
    if trainer.moving.selection is not None:
        yield "selection.safetensors", lambda path: trainer.moving.selection.save(path)  # type: ignore[union-attr]
    tensors, drawn = drawn_as_tensors(trainer.drawn if trainer.pieces else [])
    yield "drawn.safetensors", lambda path: _save(_own(tensors), path)
    state = {
        "step": trainer.step,
        "iteration": trainer.context.iteration,
        "drawn": drawn,
        "pieces": [[p.update, p.rows] for p in trainer.pieces],
        "source": trainer.parts.source.state_dict(),
        "curricula": {k: c.state_dict() for k, c in trainer.context.curricula.items()},
        "rewards": trainer.parts.rewards.state_dict() if trainer.parts.rewards else {},
        "noted": trainer.context.noted,
        "moving": {"turn": trainer.moving.turn, "at": trainer.moving.at},
        "random": trainer.world.gather(random_state()),
        "log": trainer.log.position(),
    }
    yield "state.json", lambda path: _save_json(state, path)


def _written(trainer: Trainer, folder: Path, files: Iterator[tuple[str, Callable[[Path], None]]]) -> str | None:
    """Writes the files into `folder` by way of a temporary one; what went wrong with the disk, if something did."""
    from safetensors import SafetensorError

    temporary = folder.parent / f".checkpoint.{os.getpid()}"
    problem: str | None = None
    if trainer.world.main:
        shutil.rmtree(temporary, ignore_errors=True)
    for name, write in files:  # to the end even when the disk is full: others are waiting
        if trainer.world.main and problem is None:
            try:
                temporary.mkdir(parents=True, exist_ok=True)
                write(temporary / name)
            except (OSError, SafetensorError) as error:
                problem = reason(error)
    if trainer.world.main and problem is None:
        try:
            renamed(temporary, folder)
        except OSError as error:
            problem = reason(error)
    if trainer.world.main and problem is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    return trainer.world.gather(problem)[0]


def load(trainer: Trainer) -> None:
    """Goes back to the last checkpoint of the run's folder (to the beginning when it has none).

    Raises `SurgeryError` when the run is finished, when its recipe was another (apart from its steps and from what
    does not change a result), and when the model is another.
    """
    out = trainer.out
    if out is None:
        raise SurgeryError("Resuming needs the folder of the run.", hint="Pass -o DIR.")
    found = _found(out)
    if not found and (out / "model").exists():
        raise SurgeryError(f"The run in {out} is finished: {out / 'model'} is its result.", hint="Choose another -o.")
    if found:
        _same_run(trainer, out)
    trainer.world.wait()
    if trainer.world.main:
        _claim(trainer, out)
        if not found:
            trainer.log.truncate({})
    trainer.world.wait()
    if found:
        with torch.no_grad():
            _restored(trainer, found[-1])


def _same_run(trainer: Trainer, out: Path) -> None:
    try:
        before = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SurgeryError(f"{out / 'recipe.json'} can't be read, so nothing says what to go on with.") from error
    remark = same_recipe(before, as_words(trainer.recipe))
    if remark:
        trainer.log.warn(remark)


def _restored(trainer: Trainer, folder: Path) -> None:
    from safetensors.torch import load_file

    from surgery.training.engine import Piece

    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["step"] >= trainer.recipe.steps and (trainer.out / "model").exists():  # type: ignore[operator]
        raise SurgeryError(f"{folder} is at step {state['step']} already.", hint="Raise `steps` to train on.")
    _restore(trainer.policy, load_file(folder / "policy.safetensors"), folder)
    if trainer.reference is not None:
        _restore(trainer.reference, load_file(folder / "reference.safetensors"), folder)
    if trainer.initial is not None:
        trainer.initial = load_file(folder / "initial.safetensors")
    if (chosen := folder / "selection.safetensors").is_file():
        trainer.moving.adopt(Selection.load(chosen), 0)
        trainer.moving.turn, trainer.moving.at = state["moving"]["turn"], state["moving"]["at"]
    _restore_moments(trainer, load_file(folder / "optimizers.safetensors"))
    trainer.step = trainer.context.step = state["step"]
    trainer.context.iteration = state["iteration"]
    trainer.context.noted = state["noted"]
    trainer.drawn = undrawn(load_file(folder / "drawn.safetensors"), state["drawn"])
    trainer.pieces = [Piece(update, rows) for update, rows in state["pieces"]]
    trainer.parts.source.load_state_dict(state["source"])
    for name, curriculum in trainer.context.curricula.items():
        curriculum.load_state_dict(state["curricula"][name])
    if trainer.parts.rewards:
        trainer.parts.rewards.load_state_dict(state["rewards"])
    if trainer.world.main:
        trainer.log.truncate(state["log"])
    set_random_state(state["random"][trainer.world.rank % len(state["random"])])


def finish(trainer: Trainer) -> None:
    """The trained model and its tokenizer in out/model; then the run's checkpoints go.

    Raises `SurgeryError` when the disk is full: the checkpoints stay, to go on from when there is room.
    """
    from safetensors import SafetensorError

    out, model = trainer.out, trainer.policy.model
    assert out is not None
    state: dict[str, Any] = {}
    if trainer.recipe.parallel == "fsdp2" and trainer.world.size > 1:
        once = {
            id(p): distributed.whole(p.detach()).cpu() for p in (*model.parameters(), *model.buffers())
        }  # tied ones too
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        state["state_dict"] = {name: once[id(p)] for name, p in named if name in model.state_dict()}
    problem: str | None = None
    if trainer.world.main:
        temporary = out / f".model.{os.getpid()}"
        try:
            _save_model(model, temporary, state)
            trainer.tokenizer.save_pretrained(temporary)
            shutil.rmtree(out / "model", ignore_errors=True)
            renamed(temporary, out / "model")
        except (OSError, SafetensorError, SurgeryError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            problem = reason(error)
        else:
            for old in _found(out):
                shutil.rmtree(old, ignore_errors=True)
    problem = trainer.world.gather(problem)[0]
    if problem:
        kept = _found(out)
        raise SurgeryError(
            f"The trained model could not be written to {out / 'model'} ({problem}).",
            hint=f"{kept[-1]} is kept: make room and run again with --resume."
            if kept
            else "Make room and train again; with checkpoint.every set, most of the work would be kept.",
        )


def _save_model(model: Any, folder: Path, state: dict[str, Any]) -> None:
    """As transformers or PEFT write it; an adapter that began as part of the weights (CorDA) for the original ones."""
    if hasattr(model, "peft_config"):
        from surgery.tuning.decomposed import changes_base, export

        if changes_base(model):
            export(model, folder)
            return
    model.save_pretrained(folder, **state)


def _found(out: Path) -> list[Path]:
    """Checkpoints, the oldest first."""
    found = [path for path in out.glob("checkpoint-*") if (path / "state.json").is_file()]
    return sorted(found, key=lambda path: (len(path.name), path.name))  # steps of seven digits behind those of six


# ---- files


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


def _save_json(state: dict[str, Any], path: Path) -> None:
    try:
        path.write_text(json.dumps(state), encoding="utf-8")
    except TypeError as error:
        raise SurgeryError(
            f"The state of the run can't be written as JSON ({error}).",
            hint="Columns of the data and states of plug-ins are texts, numbers, lists and dictionaries of these.",
        ) from error


# ---- parameters and moments by name, whole


def _own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU that share no memory."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def _named(policy: Policy) -> dict[str, Tensor]:
    """Parameters (tied ones once) and buffers of the model and of what is trained beside it."""
    parts = dict(policy.model.named_parameters(prefix="model")) | dict(policy.extras.named_parameters(prefix="extras"))
    return parts | dict(policy.model.named_buffers(prefix="buffer"))


def _tensors(policy: Policy) -> dict[str, Tensor]:
    return {name: distributed.whole(value.detach()).cpu().contiguous() for name, value in _named(policy).items()}


def _restore(policy: Policy, saved: dict[str, Tensor], folder: Path) -> None:
    parts = _named(policy)
    for name in sorted(parts.keys() ^ saved.keys()):
        raise SurgeryError(f"{folder} and the model differ in the tensor '{name}'.", hint="Is it the model of the run?")
    for name, value in parts.items():
        if value.shape != saved[name].shape:
            raise SurgeryError(f"{folder}: '{name}' is {tuple(saved[name].shape)}, the model's {tuple(value.shape)}.")
        value.copy_(distributed.like(saved[name], value))


def _moments(trainer: Trainer) -> dict[str, Tensor]:
    """Optimizer state as "optimizer/parameter/moment"; the parameter of a selection is called `CHOSEN`."""
    names = {id(p): name for name, p in trainer.policy.named_parameters()}
    found = {}
    for which, optimizer in trainer.moving.optimizers.items():
        found[f"{which}//"] = torch.zeros(0)  # that it exists, whether it has moved or not
        for part in parts_of(optimizer):
            for parameter in (p for group in part.param_groups for p in group["params"]):
                for key, value in part.state.get(parameter, {}).items():
                    name = names.get(id(parameter), CHOSEN)
                    found[f"{which}/{name}/{key}"] = distributed.whole(torch.as_tensor(value))
    return _own(found)


def _restore_moments(trainer: Trainer, saved: dict[str, Tensor]) -> None:
    trainer.moving.forget()
    for key, value in saved.items():
        which, name, part = key.split("/")
        optimizer = trainer.moving.optimizer(which)
        if not name:
            continue
        sparse = sparse_part(optimizer)
        if name == CHOSEN and sparse is not None:
            sparse.state[sparse.flat][part] = value.tolist() if part == "births" else value.to(sparse.flat.device)
            continue
        moved = trainer.policy.get_parameter(name)
        state = parts_of(optimizer)[-1].state
        state[moved][part] = value if part == "step" else distributed.like(value, moved)
