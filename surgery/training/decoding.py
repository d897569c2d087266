"""Decoding step by step: prompts in, then the logits of one more token at a time, for any causal language model.

`Decoder` is what sampling needs of a policy; `CausalDecoder` is that for a `transformers` model with a key-value cache.
Nothing here draws a token: see `rollouts`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.models import cache_name

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Head = Callable[[Tensor], Tensor]
ROOM = 64
"""Columns kept free for tokens to come when a cache (or mask) grows."""


class State(Protocol):
    """What a decoder remembers of the rows that it has read. `step` changes it; `repeat` and `select` copy."""

    def repeat(self, times: int) -> State:
        """Every row `times` times, copies side by side."""

    def select(self, rows: Int[Tensor, " kept"]) -> State:
        """The given rows, in the given order; a row may be named more than once."""


class Decoder(Protocol):
    """Anything that says which token may come next. Optional: `models`, what `undisturbed` looks after; `context`."""

    def prefill(
        self, ids: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"]
    ) -> tuple[Float[Tensor, "row vocab"], Any]:
        """Reads left-padded prompts; the logits of the next token and the state after the prompt."""

    def step(self, tokens: Int[Tensor, " row"], state: Any) -> tuple[Float[Tensor, "row vocab"], Any]:
        """Reads one more token a row; the logits of the next and the new state (the old one is spent)."""


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

    inner = _unwrapped(model)
    if not isinstance(inner, PreTrainedModel) or _prompt_learning(model) or isinstance(inner, FSDPModule):
        return None  # virtual tokens, and parameters gathered for the call, come with the outermost module alone
    backbone, output = inner.get_decoder(), inner.get_output_embeddings()
    if backbone is inner or output is None:
        return None
    head = _head(output, inner.config.get_text_config(decoder=True))
    return (backbone, head) if _same_logits(model, backbone, head) else None


def _unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _prompt_learning(model: Any) -> bool:
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


class CausalState:
    """Cache, columns read, the mask (None when no row is padded) and each row's next position."""

    def __init__(self, cache: Any, mask: Bool[Tensor, "row pos"] | None, length: int, positions: Tensor) -> None:
        self.cache, self.mask, self.length, self.positions = cache, mask, length, positions

    def repeat(self, times: int) -> CausalState:
        """Every row `times` times, copies side by side."""
        rows = torch.arange(len(self.positions), device=self.positions.device)
        return self.select(rows.repeat_interleave(times))

    def select(self, rows: Int[Tensor, " kept"]) -> CausalState:
        """The given rows, in the given order; a row may be named more than once."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(rows)
        mask = None if self.mask is None else self.mask[rows]
        return CausalState(cache, mask, self.length, self.positions[rows])


class CausalDecoder:
    """Decodes with any `transformers` causal language model that has a standard key-value cache.

    `room` is how many columns a cache keeps free for tokens to come; a generator sets it to what it needs. Raises
    `SurgeryError` for models that remember in another way (state spaces, linear attention, encoder-decoders) and for
    adapters that put virtual tokens before the prompt.
    """

    def __init__(self, model: nn.Module, room: int = ROOM) -> None:
        inner = _unwrapped(model)
        self._config = inner.config.get_text_config(decoder=True)
        standard = cache_name(inner) is not None and standard_cache(self._config)
        if not standard or inner.config.is_encoder_decoder or _prompt_learning(model):
            raise SurgeryError(
                f"{type(inner).__name__} can't be decoded row by row here: it has no standard key-value cache, or an "
                "adapter puts virtual tokens before the prompt.",
                hint="Rollouts need a causal language model with full or sliding attention; of adapters, LoRA works.",
            )
        self.models = (model,)
        self.context: int | None = getattr(self._config, "max_position_embeddings", None)
        split = backbone_and_head(model)
        self._backbone: Any = split[0] if split else model
        self._head: Head | None = split[1] if split else None
        reader = self._backbone if split else inner
        accepted = inspect.signature(reader.forward).parameters
        self._cache_name = cache_name(reader) or "past_key_values"
        self._takes_positions = "position_ids" in accepted
        self._more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.room = room
        self._wide = False
        self._wide = self._takes_wide_masks()

    def prefill(
        self, ids: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"]
    ) -> tuple[Float[Tensor, "row vocab"], CausalState]:
        """Reads left-padded prompts; the logits after the last token."""
        mask = mask.bool()
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        state = CausalState(
            _cache(self._config, self.room), None if bool(mask.all()) else mask, ids.shape[1], positions[:, -1] + 1
        )
        return self._run(ids, positions, state), state

    def step(self, tokens: Int[Tensor, " row"], state: CausalState) -> tuple[Float[Tensor, "row vocab"], CausalState]:
        """Reads one token a row; the logits of the next."""
        positions = state.positions
        state.length += 1
        state.positions = positions + 1
        if state.mask is not None and state.mask.shape[1] < state.length:
            state.mask = nn.functional.pad(state.mask, (0, ROOM), value=True)
        return self._run(tokens.unsqueeze(1), positions.unsqueeze(1), state), state

    def _run(self, ids: Tensor, positions: Tensor, state: CausalState) -> Tensor:
        more: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
        more[self._cache_name] = state.cache
        mask = None if state.mask is None else state.mask[:, : state.length]
        if self._wide and mask is not None and ids.shape[1] == 1:
            mask = mask[:, None, None]
        out: Any = self._backbone(input_ids=ids, attention_mask=mask, use_cache=True, **more, **self._more)
        return out.logits[:, -1] if self._head is None else self._head(out.last_hidden_state[:, -1])

    def _takes_wide_masks(self) -> bool:
        """Whether one token's mask may be (row, 1, 1, key), which need not be built anew each step: tried out."""
        sliding = any(type(layer) is not roomy_layer() for layer in _cache(self._config).layers)
        if sliding or self._config._attn_implementation != "sdpa":
            return False
        device = next(self.models[0].parameters()).device
        ids = torch.tensor([[0, 1, 2], [1, 2, 3]], device=device) % self._config.vocab_size
        logits = []
        with undisturbed(*self.models):
            for self._wide in (False, True):
                try:
                    logits.append(self.step(ids[:, 0], self.prefill(ids, ids > 0)[1])[0])
                except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                    return False
        usual, wide = logits
        return bool((usual - wide).abs().max() <= 1e-3 * usual.abs().max())


def _cache(config: Any, room: int = ROOM) -> Any:
    """transformers' own cache for `config`, its growing layers replaced by ones that write in place."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=config)
    cache.layers = [roomy_layer()(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def standard_cache(config: Any) -> bool:
    """Whether every layer remembers keys and values and nothing else."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    return all(type(layer) in (roomy_layer(), DynamicSlidingWindowLayer) for layer in _cache(config).layers)


@lru_cache
def roomy_layer() -> type:
    """The cache layer that has room for tokens to come, made here because transformers is imported only when used."""
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """Keys and values are the start of larger tensors: a step writes one column instead of copying all of them."""

        buffers: tuple[Tensor, Tensor]
        length = 0

        def __init__(self, room: int = ROOM) -> None:
            super().__init__()
            self.room = room

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            new, start, self.length = (key_states, value_states), self.length, self.length + key_states.shape[-2]
            if start == 0:
                self.is_initialized, self.buffers = True, new
            else:
                if self.length > self.buffers[0].shape[-2]:
                    self._move(start, None)
                for buffer, states in zip(self.buffers, new, strict=True):
                    buffer[:, :, start : self.length] = states
            self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
            return self.keys, self.values

        def get_seq_length(self) -> int:
            return self.length

        def batch_select_indices(self, indices: Tensor) -> None:
            if self.length:
                self._move(self.length, indices)

        def _move(self, length: int, rows: Tensor | None) -> None:
            """Into larger buffers, all rows or the given ones."""
            moved = []
            for old in self.buffers:
                count, heads, _, size = old.shape
                shape = (count if rows is None else len(rows), heads, length + max(self.room, length // 4), size)
                new = old.new_empty(shape)
                if rows is None:
                    new[:, :, :length] = old[:, :, :length]
                else:
                    torch.index_select(old[:, :, :length], 0, rows, out=new[:, :, :length])
                moved.append(new)
            self.buffers = (moved[0], moved[1])
            self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    return RoomyLayer
