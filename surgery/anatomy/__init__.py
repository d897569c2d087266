"""Where things are in a transformer: in its tensors' names, and in the running model.

| file        | what is there                                                                              |
|-------------|--------------------------------------------------------------------------------------------|
| names.py    | layers, stacks and kinds read from tensor names alone: no table of architectures           |
| sites.py    | the names of places in a forward pass (`resid_pre.3`, `z.3.2`, `blocks.3.attn.hook_z`)     |
| families.py | where modules are, as data a family, and how they are found in a family that is not listed |
| points.py   | how a site's value is read from a module's input or output, and written back               |
| model.py    | `anatomy_of(model)`: all of it for one model, checked against what the model really does   |
"""

from surgery.anatomy.model import Anatomy, anatomy_of
from surgery.anatomy.names import (
    GROUPS,
    KINDS,
    group_of,
    input_embedding,
    kind_of,
    layer_of,
    main_stack,
    num_layers,
    output_head,
    stack_of,
    stacks,
    with_layer,
)
from surgery.anatomy.sites import SITES, Site

__all__ = [
    "GROUPS", "KINDS", "SITES", "Anatomy", "Site", "anatomy_of", "group_of", "input_embedding", "kind_of", "layer_of",
    "main_stack", "num_layers", "output_head", "stack_of", "stacks", "with_layer",
]  # fmt: skip
