"""One model, several PEFT adapters: which of them a forward pass goes through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from surgery.errors import SurgeryError

Adapter = str | Literal[False] | None
"""The name of one; False, none of them, which is the base; None, as the model stands."""


def check_adapter(model: Any, adapter: Adapter, name: str) -> None:
    """Raises `SurgeryError` for an adapter that the model, called `name`, has not."""
    if adapter is None:
        return
    if adapter is True or not (adapter is False or isinstance(adapter, str)):
        raise SurgeryError(f"The adapter of '{name}' is {adapter!r}: expected its name, False for none of them, or "
                           "None for what is active.")  # fmt: skip
    known = list(getattr(model, "peft_config", {}))
    if not known:
        raise SurgeryError(f"'{name}' has no adapters: it is a {type(model).__name__}.",
                           hint="peft.PeftModel.from_pretrained(model, folder, adapter_name=...).")  # fmt: skip
    if adapter is not False and adapter not in known:
        raise SurgeryError(f"'{name}' has no adapter '{adapter}'.", hint=f"It has: {', '.join(known)}.")


@contextmanager
def speaking(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Inside, the model speaks with that adapter alone; afterwards, also after an exception, as it did before.

    PEFT's own `set_adapter` and `disable_adapter` change which parameters take a gradient; this changes nothing but
    what every layer goes through. Raises `SurgeryError` where adapters are merged into the weights.
    """
    if adapter is None:
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = [one for one in model.modules() if isinstance(one, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if any(layer.merged_adapters for layer in layers):
        raise SurgeryError("An adapter is merged into the weights: the model can't speak with another, or without.",
                           hint="model.unmerge_adapter() takes it out.")  # fmt: skip
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = adapter is False
            if adapter is not False:
                own = (
                    layer._adapters if isinstance(layer, AuxiliaryTrainingWrapper) else layer._get_available_adapters()
                )
                layer._active_adapter = [adapter] if adapter in own else []
        yield
    finally:
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled
