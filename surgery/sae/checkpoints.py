"""What a run of dictionaries leaves on disk on the way, and how it goes on from there bit for bit.

out/checkpoint-000100/state.json               step, scales, where the text and the log are
out/checkpoint-000100/NAME.safetensors         weights, moments and use of a dictionary
out/checkpoint-000100/buffer.safetensors       the activations that the next batches are drawn from

A checkpoint is whole or absent. A full disk costs the one that was being written: the one before stays.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from surgery.checkpoint.disk import reason, renamed
from surgery.errors import SurgeryError
from surgery.sae.recipe import Recipe
from surgery.sae.source import Source
from surgery.sae.train import AHEAD, Fitting
from surgery.training.distributed import World
from surgery.training.log import finite, read_metrics
from surgery.training.recipe import as_words
from surgery.training.signs import TrainingWarning
from surgery.training.state import same_recipe

VERSION = 1


class Checkpoints:
    """The folder of a run, or nothing where it has none."""

    def __init__(self, out: Path | None, recipe: Recipe, world: World) -> None:
        self.out, self.recipe, self.world = out, recipe, world
        self.file: TextIO | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file is not None:
            self.file.close()

    def begin(self, resume: bool, fitting: Fitting, source: Source) -> None:
        """Claims the folder; with `resume` takes up its last checkpoint, if it has one.

        Raises `SurgeryError` where that is of another recipe, or of a newer format.
        """
        if self.out is None:
            return
        words = as_words(self.recipe)
        last = self._last() if resume else None
        position = 0
        if last is not None:
            position = self._restore(last, words, fitting, source)
        self.world.wait()  # all have read what is there
        self.world.together(lambda: self._claim(words, position) if self.world.main else None)

    def note(self, line: Mapping[str, float]) -> None:
        """A line of metrics.jsonl."""
        if self.file is not None:
            self.file.write(json.dumps({key: finite(value) for key, value in line.items()}) + "\n")
            self.file.flush()

    def save(self, fitting: Fitting, source: Source) -> None:
        """A checkpoint of this step. A full disk loses this one only, with a warning."""
        if self.out is None:
            return
        tensors, numbers = fitting.state()  # all processes take part
        if self.world.main:
            self._save(fitting.step, tensors, numbers, source)
        self.world.wait()

    def finished(self) -> list[dict[str, float]]:
        """All lines of the run, whose checkpoints go."""
        assert self.out is not None and self.file is not None
        self.file.flush()
        for old in self._found():
            shutil.rmtree(old, ignore_errors=True)
        return read_metrics(self.out)

    def _save(
        self, step: int, tensors: Mapping[str, dict[str, Tensor]], numbers: dict[str, Any], source: Source
    ) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        assert self.out is not None and self.file is not None
        buffer, read = source.shuffled.state()
        temporary = self.out / f".checkpoint.{os.getpid()}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, mine in {**tensors, "buffer": buffer}.items():
                save_file({k: v.cpu().contiguous() for k, v in mine.items()}, temporary / f"{name}.safetensors")
            position = os.fstat(self.file.fileno()).st_size
            state = {"version": VERSION, "numbers": numbers, "read": read, "done": source.done, "log": position}
            (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
            renamed(temporary, self.out / f"checkpoint-{step:06d}")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            warnings.warn(f"No checkpoint at step {step} ({reason(error)}); the last good one stays.", TrainingWarning,
                          stacklevel=2)  # fmt: skip
            return
        for old in self._found()[: -self.recipe.checkpoint.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _restore(self, folder: Path, words: Mapping[str, Any], fitting: Fitting, source: Source) -> int:
        """Takes up a checkpoint; where metrics.jsonl was."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        assert self.out is not None
        try:
            before = json.loads((self.out / "recipe.json").read_text(encoding="utf-8"))
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if state["version"] > VERSION:
                raise SurgeryError(f"{folder} is of version {state['version']}; this program reads {VERSION}.",
                                   hint="A newer model-surgery wrote it: update, or begin anew.")  # fmt: skip
            remark = same_recipe(before, words)
            if remark and self.world.main:
                warnings.warn(remark, TrainingWarning, stacklevel=2)
            names = [*fitting.entries, AHEAD, "buffer"]
            tensors = {name: load_file(folder / f"{name}.safetensors") for name in names}
            source.shuffled.restore(tensors.pop("buffer"), state["read"])
            source.done = state["done"]
            fitting.restore(tensors, state["numbers"])
            if remark and fitting.step >= self.recipe.steps:  # its last step was none: nothing was finished by it
                raise SurgeryError(f"The run is at step {fitting.step:,}, and {self.recipe.steps:,} are asked for.",
                                   hint="As many steps as at its beginning, or more than were done.")  # fmt: skip
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise SurgeryError(f"{folder} can't be read: {error}.",
                               hint="Remove it: --resume goes on from the one before.") from None  # fmt: skip
        position: int = state["log"]
        return position

    def _claim(self, words: Mapping[str, Any], position: int) -> None:
        """The folder with its recipe, the log as long as it was, and nothing of an interrupted write."""
        assert self.out is not None
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SurgeryError(f"The folder {self.out} can't be made ({reason(error)}).",
                               hint="Choose another one: --out DIR.") from None  # fmt: skip
        for left in (*self.out.glob(".checkpoint.*"), *self.out.glob(".dictionaries.*")):
            shutil.rmtree(left, ignore_errors=True)
        (self.out / "recipe.json").write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")
        self.file = (self.out / "metrics.jsonl").open("a", encoding="utf-8")
        self.file.truncate(min(position, os.fstat(self.file.fileno()).st_size))

    def _found(self) -> list[Path]:
        """Checkpoints, the oldest first."""
        assert self.out is not None
        found = (path for path in self.out.glob("checkpoint-*") if (path / "state.json").is_file())
        return sorted(found, key=lambda path: (len(path.name), path.name))  # steps of seven digits behind those of six

    def _last(self) -> Path | None:
        found = self._found()
        return found[-1] if found else None
