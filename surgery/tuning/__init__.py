"""Sparse tuning: fine-tune a few per cent of a model's own weights, in place, with an optimizer as small as they are.

    from surgery.tuning import SparseAdamW, select
    chosen = select(model, "lift", density=0.05)       # which numbers may move
    optimizer = SparseAdamW(model, chosen, lr=2e-4)     # a torch optimizer: use it in any loop, or in Trainer and TRL

In a recipe of `surgery train` the same words stand under `tuning:`.

| to look for | file |
|---|---|
| how numbers are chosen: LIFT, HFT, SaRA, magnitude, Fisher, Wanda, a sibling's delta, ... | `selection/` |
| AdamW over chosen numbers | `optimizer.py` |
| weight gradients of chosen rows and columns alone | `slices.py` |
| LoRA, and CorDA's initialisation of it | `decomposed.py`; what layers read: `inputs.py` |
| SaRA's nuclear-norm term | `nuclear.py` |
| what a recipe says under `tuning:`, and the memory it takes | `plan.py` |

What came of it as a small file: `surgery.weights.deltas`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.tuning.optimizer import SparseAdamW as SparseAdamW
    from surgery.tuning.optimizer import without_reducer as without_reducer
    from surgery.tuning.selection import SELECTORS as SELECTORS
    from surgery.tuning.selection import Selection as Selection
    from surgery.tuning.selection import select as select

_HOMES = {
    "SparseAdamW": "optimizer", "without_reducer": "optimizer", "SELECTORS": "selection", "Selection": "selection",
    "select": "selection",
}  # fmt: skip
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'surgery.tuning' has no attribute '{name}'")
    return getattr(import_module(f"surgery.tuning.{_HOMES[name]}"), name)
