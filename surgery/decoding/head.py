"""The seam in a model between hidden states and logits: logits are made only where somebody reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient inside; afterwards, also after an exception, every module's mode is as it was.

    Evaluation mode also switches gradient checkpointing off, and `use_cache` is an argument of every call here: no
    setting of the model has to be touched.
    """
    training = [module for model in models for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def backbone_and_head(model: nn.Module) -> tuple[nn.Module, Head] | None:
    """The decoder stack, whose `last_hidden_state` the head turns into logits; None when the model has no such seam.

    LoRA layers stay active (they live inside the stack). The head includes bias, logit scale and soft cap. The split is
    believed only after `head(backbone(x)) == model(x).logits` (float32: 1e-4 of the largest logit) on three tokens,
    there with hidden states so large that a soft cap can't hide.
    """
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel

    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel) or prompt_learning(model) or isinstance(inner, FSDPModule):
        return None  # virtual tokens, and parameters gathered for the call, come with the outermost module alone
    backbone, output = inner.get_decoder(), inner.get_output_embeddings()
    if backbone is inner or output is None:
        return None
    head = _head(output, inner.config.get_text_config(decoder=True))
    return (backbone, head) if _same_logits(model, backbone, head) else None


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def prompt_learning(model: Any) -> bool:
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def _head(output: nn.Module, config: Any) -> Head:
    """The output embedding with the scale and the soft cap that the config names."""
    scale = (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    if scale == 1.0 and cap is None:
        return output

    def head(hidden: Tensor) -> Tensor:
        logits = output(hidden) * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head


def _same_logits(model: Any, backbone: nn.Module, head: Head) -> bool:
    parameter = next(model.parameters())
    ids = torch.arange(1, 4, device=parameter.device)[None] % model.config.get_text_config(decoder=True).vocab_size
    largest = 100.0

    def enlarge(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * (100 / largest)
        return output

    hook = backbone.register_forward_hook(enlarge)
    try:
        with undisturbed(model):
            largest = model(ids, use_cache=False).logits.abs().max().item()
            expected = model(ids, use_cache=False).logits.float()
            found = head(backbone(ids, use_cache=False).last_hidden_state).float()
    except (AttributeError, TypeError, RuntimeError, ValueError, ZeroDivisionError):
        return False  # whatever a family does otherwise: its own forward is used
    finally:
        hook.remove()
    tolerance = 1e-4 if parameter.dtype == torch.float32 else 2e-2
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * expected.abs().max())
