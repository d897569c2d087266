"""Activation patching: which layer, position, head or neuron carries the behaviour?

    found = patch(model, clean, corrupt, logit_diff(answers), site="resid_pre", tokenizer=tokenizer)
    found.normalized().plot()                       # recovery by layer and position, the ratio of batch means
    patch(model, clean, corrupt, metric, "z")       # by head, over all positions
    ablate(model, prompts, metric, "z", "mean", reference=others)
    knockout(model, prompts, metric, destination=-1, source=5)

| direction | the run that is changed | what is written into it | `normalized()` |
|---|---|---|---|
| denoising | corrupt | activations of the clean run | 0 nothing, 1 full recovery |
| noising | clean | activations of the corrupt run | 0 nothing, -1 full damage |

Values are effects, the metric with the change minus the metric without, one for each example and cell. Cells are exact:
what a change does not reach is taken from the unchanged run, everything else is computed by the model's own modules
(equal to one whole forward a cell within 1e-6 of the logits' scale on the same attention kernel; tests compare). Inside
of `edit`, or with other hooks in the blocks, every cell is one whole forward.

Files: calls.py (the three sweeps), run.py (batches and rows that fit the memory), cells.py (what a change makes of a
recorded pass), resumed.py (a pass taken up with many changes at once, differentiable: for masks and pairs).
"""

from analysis.patching.calls import Ablation, By, Direction, ablate, knockout, patch
from analysis.patching.run import BUDGET, Progress

__all__ = ["BUDGET", "Ablation", "By", "Direction", "Progress", "ablate", "knockout", "patch"]
