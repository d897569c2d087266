"""The space of activations: capture and change them, in one model or with the other of a pair.

| file             | what is there                                                                              |
|------------------|--------------------------------------------------------------------------------------------|
| interventions.py | `capture` and `edit` at the sites of `surgery.anatomy`                                     |
| passes.py        | `run`: one pass over prompts, with values kept and changed, ended early where that is enough |
| recording.py     | a pass recorded so that it can be taken up again at any layer and position                 |
| resume.py        | taking it up again: only what a change reaches is computed                                 |
| steering.py      | steering vectors and directional ablation                                                  |
| pairs.py         | two models whose blocks can stand in for each other; a PEFT model as such a pair           |
| decomposition.py | what pre-training and fine-tuning contribute to each block                                 |
| scaling.py       | the tuned model with the latter times a factor, in forward passes and generation           |
"""

from surgery.activations.interventions import Call, Captured, capture, edit
from surgery.activations.passes import run

__all__ = ["Call", "Captured", "capture", "edit", "run"]
