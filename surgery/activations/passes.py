"""One forward pass over prompts, with values kept and changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from surgery.activations.interventions import Captured, Edit, capture, detach, edit, unwrapped
from surgery.anatomy import Site, anatomy_of
from surgery.anatomy.points import attach
from surgery.models import Batch, as_batch, untouched


class _Stopped(Exception):
    """Raised behind the last site that is wanted."""


def run(
    model: Any,
    prompts: Batch | Any,
    sites: Iterable[str | Site] | str = (),
    *,
    edits: Mapping[str | Site, Edit] | None = None,
    stop: bool = False,
    tokenizer: Any = None,
) -> tuple[Tensor | None, Captured]:
    """Logits (batch, pos, vocab) and the values of `sites`, in evaluation mode and without gradients.

    `stop` ends the pass behind the last of the sites: the layers above cost nothing, and the logits are None. The
    model's modes and flags are as before afterwards, also after an exception.
    """
    model = unwrapped(model)
    batch = as_batch(prompts, tokenizer).to(model.device)
    anatomy = anatomy_of(model)
    wanted = anatomy.expand(sites)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(edit(model, edits or {}))
        seen = stack.enter_context(capture(model, wanted))
        if stop:
            # The block behind the last site is not entered; of the last block itself the whole is run.
            entered = [-1 if s.name == "embed" else anatomy.n_layers - 1 if s.layer is None else
                       s.layer - (s.name == "resid_pre") for s in wanted]  # fmt: skip
            first = max(entered, default=-1) + 1
            if first < anatomy.n_layers:
                stack.callback(detach, attach(anatomy, Site("resid_pre", first), _stop))
            else:
                stack.callback(anatomy.head.register_forward_pre_hook(_stop).remove)
        try:
            logits = model(**batch.inputs(model), use_cache=False).logits
        except _Stopped:
            logits = None
    return logits, seen


def _stop(*value: Any) -> None:
    raise _Stopped
