"""Which components carry a kind of information? Desiderata-based component masking (DCM).

    swapped = Desideratum("object", prompts, counterfactuals, target)
    mask = learn_mask(model, swapped, components="z", tokenizer=tokenizer)     # heads at the last token
    mask.components                                                            # ["z.9.2@-1", ...]: where w rounds to 0
    mask.evaluate(held_out).mean                                               # accuracy with all of them patched

A mask w in [0, 1] is learned for frozen components c: 1 keeps the value, 0 takes the counterfactual prompt's,

    value_c <- w_c * value_c + (1 - w_c) * value_c(counterfactual)
    loss = - mean over examples of logit[target] + lambda * sum over components of (1 - w_c)

summed over desiderata where there are several (Davies et al. 2023, arXiv:2307.03637; as done by Prakash et al., ICLR
2024, arXiv:2402.14811). `value_c` is that of the run under way: what lower components have changed is in it. A
component is selected when w rounds to 0, and torch rounds 0.5 to 0: a tie is selected. That none is selected is a
result too: the target does not depend on them, or it comes out anyhow.

Files: learn.py (`learn_mask`, `Mask`), parts.py (components, and `Desideratum`), gates.py (kinds of mask), figure.py.
"""

from analysis.component_masks.gates import GATES
from analysis.component_masks.learn import Mask, learn_mask
from analysis.component_masks.parts import Desideratum

__all__ = ["GATES", "Desideratum", "Mask", "learn_mask"]
