"""What is kept of a comparison's runs, so that one that was stopped goes on: see `surgery.sae.tune_run`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.sae.tune_recipe import Recipe
from surgery.training.recipe import as_words
from surgery.training.state import same_recipe


class Runs:
    """What is kept of runs, in a folder or nowhere."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def check(self, recipe: Recipe, force: bool = False) -> None:
        """Raises `SurgeryError` for a folder that is finished, of another recipe, or (with `force` too) of no runs."""
        if self.folder is None or not self.folder.exists():
            return
        file = self.folder / "recipe.json"
        if not (file.is_file() and (self.folder / "runs").is_dir()):
            raise SurgeryError(f"{self.folder} exists, and is no folder of such runs.", hint="Choose another folder.")
        if not force and any((self.folder / "runs").iterdir()):  # else nothing came of it
            same_recipe(json.loads(file.read_text(encoding="utf-8")), _words(recipe), free=())
            if (self.folder / "result.json").is_file():
                raise SurgeryError(f"{self.folder} is finished.", hint="Choose another folder, or pass --force.")

    def begin(self, recipe: Recipe, force: bool = False) -> None:
        """A folder to write to: one that was begun is gone on with, or with `force` emptied."""
        if self.folder is None:
            return
        self.check(recipe, force)
        if self.folder.exists() and force:
            shutil.rmtree(self.folder)
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        _write(self.folder / "recipe.json", _words(recipe))

    def known(self, name: str) -> list[float] | None:
        """The scores of a run that was made before."""
        file = None if self.folder is None else self.folder / "runs" / f"{name}.json"
        return None if file is None or not file.is_file() else json.loads(file.read_text(encoding="utf-8"))

    def keep(self, name: str, values: list[float]) -> None:
        """The scores of a run."""
        if self.folder is not None:
            _write(self.folder / "runs" / f"{name}.json", values)

    def adapter(self, arm: str, seed: int) -> Path | None:
        """Where an adapter goes."""
        return None if self.folder is None else self.folder / "adapters" / arm / f"seed-{seed}"

    def dictionaries(self, whose: str, seed: int) -> Path | None:
        """Where dictionaries go."""
        return None if self.folder is None else self.folder / "dictionaries" / f"seed-{seed}" / whose

    def finish(self, found: Mapping[str, Any]) -> None:
        """The result, last."""
        if self.folder is not None:
            _write(self.folder / "result.json", found)


def _words(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON, without where it goes."""
    return {key: value for key, value in as_words(recipe).items() if key != "output"}


def _write(file: Path, words: Any) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)
