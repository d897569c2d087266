"""TransformerLens bridges, nnsight models, PEFT and parallel wrappers: in by `unwrap`, out by `to_transformer_lens` and
`to_nnsight`. Each library is imported when it is asked for, and nothing here needs a network.

    model = unwrap(bridge)                       # the plain transformers model, sharing the bridge's weights
    bridge = to_transformer_lens(model, tok)     # on a copy: a bridge rebuilds the model that it is given
    traced = to_nnsight(model)                   # sharing the weights; `with traced.trace(ids): ...`
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.models import untouched

if TYPE_CHECKING:
    from nnsight import NNsight
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]
_WRAPPED = "_original_component."
"""What a bridge puts into the names of the parameters that it has taken over."""
_SPLITS = {"split_qkv_matrix": ("q", "k", "v"), "split_gate_up_matrix": ("gate", "in")}
"""Bridge components that compute with copies of one fused matrix: the method that cuts it, and the copies."""
_PLAIN: WeakKeyDictionary[nn.Module, PreTrainedModel] = WeakKeyDictionary()
_BASES: WeakKeyDictionary[nn.Module, PreTrainedModel] = WeakKeyDictionary()


def unwrap(thing: Any) -> PreTrainedModel:
    """The plain transformers model in `thing`, sharing its weights.

    A transformers model is returned as it is. TransformerLens bridges: a model of the original class on the same
    parameters, the same object at every call; refused in compatibility mode and with processed weights, whose folded
    norms give another residual stream. nnsight: the module that is wrapped. PEFT: the model with the adapter's layers
    inside and active; a site of such a model is the sum of base and adapter, while `q_proj.weight` is the base's alone
    (`q_proj.base_layer` too). Data parallel and compiled models: the module inside.
    Raises `SurgeryError` for everything else, naming its type.
    """
    from transformers import PreTrainedModel

    if isinstance(thing, PreTrainedModel):
        return _plain(thing) if _has_bridges(thing) else thing
    for kind in type(thing).__mro__:
        inside = _DOORS.get((kind.__module__.partition(".")[0], kind.__name__))
        if inside is not None:
            return unwrap(inside(thing))
    raise SurgeryError(
        f"{type(thing).__module__}.{type(thing).__qualname__} is no model that can be looked into.",
        hint="Give a transformers model (surgery.models.load makes one of a folder or a name), a TransformerLens "
        "bridge, an nnsight model or a PEFT model.",
    )


def to_transformer_lens(model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> TransformerBridge:
    """A TransformerLens bridge on a copy of the model (raw weights, eager attention, so that all of its hooks fire).

    The model (anything that `unwrap` takes) stays as it is, without a share in the bridge's weights. Works offline.
    Raises `SurgeryError` when TransformerLens is missing, knows no such architecture, or its bridge computes other
    logits than the model does.
    """
    try:
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    except ImportError as error:
        raise _missing("TransformerLens", "transformer-lens") from error
    model = unwrap(model)
    twin = _twin(model, share=False)
    twin.set_attn_implementation("eager")
    try:
        with torch.random.fork_rng(devices=[]):  # building it draws weights that it throws away
            bridge = build_bridge_from_module(
                twin, type(model).__name__, hf_config=twin.config, tokenizer=copy.deepcopy(tokenizer)
            )
    except Exception as error:  # whatever its adapters trip over: KeyError, RuntimeError, ...
        told = str(error).strip().partition("\n")[0]
        raise SurgeryError(f"TransformerLens can't make a bridge of {type(model).__name__}: {told[:200]}") from error
    _same_logits(model, bridge)
    return bridge


def to_nnsight(model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> NNsight:
    """An nnsight model that shares the weights, in modules of its own (nnsight replaces `forward` in each).

    With a tokenizer it takes text (`TransformersModel`), without one token ids (`NNsight`). Works offline.
    Raises `SurgeryError` when nnsight is missing.
    """
    try:
        import nnsight
    except ImportError as error:
        raise _missing("nnsight", "nnsight") from error
    twin = _twin(unwrap(model), share=True)
    if tokenizer is None:
        return nnsight.NNsight(twin)
    return nnsight.TransformersModel(twin, tokenizer=copy.deepcopy(tokenizer), task="text-generation")


def has_adapters(thing: Any) -> bool:
    """Whether PEFT has put layers of its own into the model."""
    return isinstance(thing, nn.Module) and any(_inside_adapter(module) is not None for module in thing.modules())


def without_adapters(model: Any) -> PreTrainedModel:
    """The base of a PEFT model: the same parameters in modules of its own, without the adapter's layers.

    The same object at every call, and the PEFT model stays as it is. Raises `SurgeryError` when the base's own numbers
    were changed: by an adapter that is merged, or that trains biases.
    """
    inner = unwrap(model)
    for config in getattr(inner, "peft_config", {}).values():
        if getattr(config, "bias", "none") != "none":
            raise SurgeryError(f"The adapter trains the base's biases (bias='{config.bias}'): the base is not in it.",
                               hint="Load the base by itself, and give (base, tuned).")  # fmt: skip
    if any(getattr(module, "merged", False) for module in inner.modules() if _inside_adapter(module) is not None):
        raise SurgeryError("The adapter is merged into the weights: the base is not there any more.",
                           hint="Call unmerge_adapter(), or load the base and give (base, tuned).")  # fmt: skip
    found = _BASES.get(inner)
    mine = {id(tensor) for tensor in _tensors(inner).values()}
    if found is None or any(id(tensor) not in mine for tensor in _tensors(found).values()):
        found = _twin(inner, share=True)
        while adapted := [(n, m) for n, m in found.named_modules() if _inside_adapter(m) is not None]:
            found.set_submodule(adapted[0][0], _inside_adapter(adapted[0][1]))
        _BASES[inner] = found
    return found.train(inner.training)


def _inside_adapter(module: nn.Module) -> Any:
    """The base's own module in a layer of PEFT's; None in any other module."""
    if not type(module).__module__.startswith("peft."):
        return None
    return getattr(module, "base_layer", None) or getattr(module, "original_module", None)


def _missing(library: str, package: str) -> SurgeryError:
    return SurgeryError(f"{library} is not installed.", hint=f"pip install {package}, or the extra `peers`.")


# ---- doors


def _from_bridge(bridge: Any) -> nn.Module:
    if bridge.compatibility_mode or bridge._weights_processed:
        raise SurgeryError(
            "This TransformerLens bridge is in compatibility mode: layer norms are folded into the weights and the "
            "residual stream is centred, so that its activations are not the model's.",
            hint="Make the bridge anew and leave out enable_compatibility_mode().",
        )
    return bridge.original_model


def _from_nnsight(envoy: Any) -> Any:
    if any(parameter.is_meta for parameter in envoy._module.parameters()):
        raise SurgeryError(
            "This nnsight model has no weights yet.", hint="Call its dispatch(), or make it with dispatch=True."
        )
    return envoy._module


def _from_peft(model: Any) -> Any:
    for name, config in model.peft_config.items():
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            raise SurgeryError(
                f"The adapter '{name}' ({config.peft_type.value}) works on the prompt, outside the layers: the model "
                "inside is the base alone.",
                hint="Adapters that add layers (LoRA and its relatives) are taken; or give the base itself.",
            )
    return model.base_model.model if hasattr(model.base_model, "model") else model.base_model


_DOORS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("transformer_lens", "TransformerBridge"): _from_bridge,
    ("nnsight", "Envoy"): _from_nnsight,
    ("peft", "PeftModel"): _from_peft,
    ("peft", "PeftMixedModel"): _from_peft,
    ("torch", "DistributedDataParallel"): lambda wrapper: wrapper.module,
    ("torch", "DataParallel"): lambda wrapper: wrapper.module,
    ("torch", "OptimizedModule"): lambda wrapper: wrapper._orig_mod,
}
"""Library and class of a wrapper, and how to get what is inside."""


# ---- a bridge's model, made plain again


def _has_bridges(model: nn.Module) -> bool:
    """Whether TransformerLens has put its components into the model."""
    return any(type(module).__module__.startswith("transformer_lens.") for module in model.modules())


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and config, in modules of its own, on the parameters and buffers of a bridge's model.

    Made once for each; made anew when parameters were replaced (by a move to another device or dtype).
    """
    from accelerate import init_empty_weights

    if any(getattr(module, "compatibility_mode", False) for module in model.modules()):
        raise SurgeryError(
            "This model is inside a TransformerLens bridge in compatibility mode, which has folded its norms.",
            hint="Load the model anew; to_transformer_lens makes a bridge of a copy.",
        )
    _check_split(model)
    held = _tensors(model)
    plain = _PLAIN.get(model)
    if plain is None or any(held.get(name, tensor) is not tensor for name, tensor in _tensors(plain).items()):
        with init_empty_weights(include_buffers=False):
            plain = type(model)(copy.deepcopy(model.config))
        lost = [name for name, tensor in _tensors(plain).items() if tensor.is_meta and name not in held]
        if lost:
            raise SurgeryError(
                f"TransformerLens has moved the parameter '{lost[0]}' of {type(model).__name__} to where it can't be "
                "found.",
                hint="Give the transformers model that the bridge was made of; to_transformer_lens leaves it whole.",
            )
        for module_name, module in plain.named_modules():
            for table in (module._parameters, module._buffers):
                for leaf, tensor in table.items():
                    name = f"{module_name}.{leaf}" if module_name else leaf
                    if tensor is not None and name in held:
                        table[leaf] = held[name]
        plain.generation_config = model.generation_config
        _PLAIN[model] = plain
    return plain.train(model.training)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name they have, the bridge's additions to the names taken out."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found |= dict(model.named_buffers(remove_duplicate=False))
    return {name.replace(_WRAPPED, ""): tensor for name, tensor in found.items()}


def _check_split(model: nn.Module) -> None:
    """A bridge computes with copies of fused q, k, v: refuse when they were changed and the fused matrix was not."""
    with torch.random.fork_rng(devices=[]):  # the copies are made in layers that draw weights first
        for name, module in model.named_modules():
            for method, parts in _SPLITS.items():
                split = getattr(module, method, None)
                if split is None or not type(module).__module__.startswith("transformer_lens."):
                    continue
                for part, fresh in zip(parts, split(module.original_component), strict=True):
                    if not torch.equal(getattr(module, part).weight, fresh.weight):
                        raise SurgeryError(
                            f"'{part}' of {name.replace(_WRAPPED, '')} was changed in the bridge, which keeps a copy "
                            "there; the fused matrix of the model does not know.",
                            hint="Change the model first, then call to_transformer_lens.",
                        )


# ---- copies


def _twin(model: PreTrainedModel, *, share: bool) -> PreTrainedModel:
    """A copy of the modules without their hooks: on the same parameters and buffers (`share`), or on copies of them."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        memo |= {id(vars(module)[name]): OrderedDict() for name in _HOOKS}
        traced = [value for value in vars(module).values() if type(value).__module__.startswith("nnsight.")]
        memo |= {id(value): () for value in traced}  # left out: they point at the modules of the original
    if share:
        memo |= {id(t): t for t in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, memo)
    for module, original in zip(twin.modules(), model.modules(), strict=True):
        for name, value in vars(original).items():
            if type(value).__module__.startswith("nnsight."):
                del module.__dict__[name]
    return twin


def _same_logits(model: PreTrainedModel, bridge: Any) -> None:
    """A short forward through both. Raises `SurgeryError` when the bridge is another model."""
    config: Any = model.config.get_text_config()
    ids = torch.arange(min(8, config.vocab_size), device=model.device)[None]
    with untouched(model, bridge):
        ours, theirs = model(ids).logits.float(), bridge(ids).float()
    scale, off = float(ours.abs().max()), float((ours - theirs).abs().max())
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not off <= tolerance * scale:
        raise SurgeryError(
            f"The bridge that TransformerLens makes of {type(model).__name__} computes other logits: {off:.3g} apart, "
            f"where the largest is {scale:.3g}.",
            hint="Use to_nnsight for this family.",
        )
