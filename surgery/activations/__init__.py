"""The space of activations: capture and change them, in one model or with the other of a pair.

| file             | what is there                                                                              |
|------------------|--------------------------------------------------------------------------------------------|
| interventions.py | `capture` and `edit` at the sites of `surgery.anatomy`                                     |
| passes.py        | `run`: one pass over prompts, with values kept and changed, ended early where that is enough |
| recording.py     | a pass recorded so that it can be taken up again at any layer and position                 |
| resume.py        | taking it up again: only what a change reaches is computed                                 |
| steering.py      | steering vectors and directional ablation                                                  |
| decomposition.py | what pre-training and fine-tuning contribute to each block; scaling the latter             |
"""

from surgery.activations.interventions import Call, Captured, capture, edit
from surgery.activations.passes import run

__all__ = ["Call", "Captured", "capture", "edit", "run"]
