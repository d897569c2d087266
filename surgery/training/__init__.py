"""Training engines: one loop for supervised fine-tuning, preference learning and reinforcement learning.

    from surgery.training import train
    run = train("tiny-base", objective="grpo", data={"task": "chain"}, reward="accuracy", steps=40)

| to add | write | file of the examples |
|---|---|---|
| an objective (token loss) | a dataclass with `of_scores` | `objectives/` |
| an advantage | a function of rewards and group size | `advantages.py` |
| a source of batches (sampler, buffer) | a dataclass with `draw` | `sources/` |
| a transform of rows | a function of row and generator | `transforms.py` |
| a curriculum | a dataclass with `next` and `update` | `curriculum.py` |
| a reward | a function of prompts and completions | `rewards/` |
| a schedule | a function of the step | `schedules.py` |

None of them needs a change of the loop in `engine.py`. A recipe (`recipe.py`, YAML in `recipes/`) names them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.training.engine import Trainer as Trainer
    from surgery.training.recipe import Recipe as Recipe
    from surgery.training.recipe import load as load
    from surgery.training.run import Run as Run
    from surgery.training.run import train as train

_HOMES = {"Trainer": "engine", "Recipe": "recipe", "load": "recipe", "Run": "run", "train": "run"}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'surgery.training' has no attribute '{name}'")
    return getattr(import_module(f"surgery.training.{_HOMES[name]}"), name)
