"""Loading models and tokenizers, and looking at them without touching."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery import zoo
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def located(spec: str | Path) -> Path:
    """The folder of a model (of its base, for `base+adapter`). Raises `SurgeryError` when that is no model."""
    from surgery.checkpoint.reader import locate

    text = zoo.resolved(str(spec))
    base, plus, adapter = ("", "", text) if Path(text).exists() else text.rpartition("+")
    if plus:
        locate(adapter)
    folder = locate(base if plus else adapter)
    if not (folder / "config.json").is_file():
        raise SurgeryError(f"{folder} is not a model: it holds no config.json.",
                           hint="Give the folder of a whole model, or BASE+ADAPTER.")  # fmt: skip
    return folder


def load(
    spec: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, a hub name, `base+adapter` or a name of the zoo, in evaluation mode.

    Raises `SurgeryError` for what is no model or has no tokenizer, and for a dtype or device that can't be used.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from surgery.checkpoint.adapter import AdaptedCheckpoint
    from surgery.checkpoint.reader import open_checkpoint

    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise SurgeryError(f"There is no dtype '{dtype}'.", hint="auto, float32, bfloat16 or float16.")
    folder = located(spec)
    source = open_checkpoint(zoo.resolved(str(spec)))  # which refuses files that are cut off, in a sentence
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without its files
            raise ValueError("there are no tokenizer files.")
        if isinstance(source, AdaptedCheckpoint):
            config = AutoConfig.from_pretrained(folder)
            config.update(source.config)
            kind = config.dtype if dtype == "auto" else dtype
            model = AutoModelForCausalLM.from_config(config, dtype=kind)
            missing, unknown = model.load_state_dict({n: source.read(n) for n in source.tensors}, strict=False)
            if unknown or set(missing) - set(model.all_tied_weights_keys):
                raise ValueError(f"its tensors are not the model's ({', '.join([*unknown, *missing][:3])}).")
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        told = str(error).strip().partition("\n")[0]
        raise SurgeryError(f"{spec} can't be loaded as a language model with its tokenizer: {told}") from error
    try:
        return model.eval().to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        told = str(error).partition("\n")[0]
        raise SurgeryError(f"The device '{device}' can't be used: {told}") from error


def cache_name(module: nn.Module) -> str | None:
    """What a model's forward calls its key-value cache: `cache` from transformers 5.24 on, else `past_key_values`."""
    accepted = inspect.signature(module.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in accepted), None)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the bars of transformers meanwhile; its setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def untouched(model: nn.Module, *models: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode and cache inside; afterwards the models' modes and settings are as they were.

    Nothing is recorded for autograd, and what comes out can be used in autograd later; with `gradients` activations
    are recorded, and parameters count as constants. Put back, also after an exception: training modes, `requires_grad`,
    `.grad`, the configs' `use_cache` and attention implementation.
    """
    with ExitStack() as stack:
        for one in (model, *models):
            stack.enter_context(_as_it_was(one))
        stack.enter_context(torch.inference_mode(False))  # a caller's inference mode would win over `gradients`
        stack.enter_context(torch.set_grad_enabled(gradients))
        yield


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    kept = ("use_cache", "_attn_implementation_internal")
    settings = [(c, {k: vars(c)[k] for k in kept if k in vars(c)}) for c in _configs(model)]
    try:
        model.eval()
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None  # set aside: a backward pass inside could add to it in place
        for config, before in settings:
            if before.get("use_cache") is not None:
                config.use_cache = True
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wanted, gradient in parameters:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        for config, before in settings:
            vars(config).update(before)  # not by attribute: setting a config's attention sets that of its parts too


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration in a model, once: modules share them, and that of an image model has parts."""
    waiting = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "__dict__")]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
            waiting += [part for part in parts if part is not None]
    return list(found.values())
