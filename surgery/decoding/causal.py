"""Decoding step by step: prompts in, then the logits of one more token at a time, for any causal language model.

`Decoder` is what sampling needs of a policy; `CausalDecoder` is that for a `transformers` model with a key-value cache.
Nothing here draws a token: see `sampling`.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from surgery.decoding.cache import ROOM, roomy_cache, roomy_layer, standard_cache
from surgery.decoding.head import Head, backbone_and_head, prompt_learning, undisturbed, unwrapped
from surgery.errors import SurgeryError
from surgery.models import cache_name

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


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

    def crop(self, count: int) -> None:
        """Forgets the last `count` tokens of every row, in place; only of a decoder that keeps all (`whole`)."""
        if count:
            self.cache.crop(-count)
            self.length, self.positions = self.length - count, self.positions - count


class CausalDecoder:
    """Decodes with any `transformers` causal language model that has a standard key-value cache.

    `room` is how many columns a cache keeps free for tokens to come; a generator sets it to what it needs. With `whole`
    states can be cropped (layers of sliding attention then keep all keys and values). Raises `SurgeryError` for models
    that remember in another way (state spaces, linear attention, encoder-decoders), and for adapters
    that put virtual tokens before the prompt.
    """

    def __init__(self, model: nn.Module, room: int = ROOM, *, whole: bool = False) -> None:
        inner = unwrapped(model)
        self._config = inner.config.get_text_config(decoder=True)
        standard = cache_name(inner) is not None and standard_cache(self._config)
        if not standard or inner.config.is_encoder_decoder or prompt_learning(model):
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
        self._keeps = "logits_to_keep" in accepted
        self.room, self.whole = room, whole
        self._hooks: list[Any] = []
        self._wide = False
        self._wide = self._takes_wide_masks()

    def prefill(
        self, ids: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"]
    ) -> tuple[Float[Tensor, "row vocab"], CausalState]:
        """Reads left-padded prompts; the logits after the last token."""
        self._hooks = [hooks for module in self._backbone.modules() for hooks in _hooks_of(module)]
        mask = mask.bool()
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        cache = roomy_cache(self._config, self.room, whole=self.whole)
        state = CausalState(cache, None if bool(mask.all()) else mask, ids.shape[1], positions[:, -1] + 1)
        return self._run(ids, positions, state)[:, -1], state

    def step(self, tokens: Int[Tensor, " row"], state: CausalState) -> tuple[Float[Tensor, "row vocab"], CausalState]:
        """Reads one token a row; the logits of the next."""
        return self.read(tokens.unsqueeze(1), state)[:, -1], state

    def read(
        self, ids: Int[Tensor, "row pos"], state: CausalState, keep: int | None = None
    ) -> Float[Tensor, "row keep vocab"]:
        """Reads several tokens a row, all of them real, and changes `state`; the logits after the last `keep` (all)."""
        count = ids.shape[1]
        positions = state.positions[:, None]
        if count > 1:
            positions = positions + torch.arange(count, device=ids.device)
        state.length += count
        state.positions = state.positions + count
        if state.mask is not None and state.mask.shape[1] < state.length:
            state.mask = nn.functional.pad(state.mask, (0, max(ROOM, count)), value=True)
        return self._run(ids, positions, state, count if keep is None else keep)

    def _run(self, ids: Tensor, positions: Tensor, state: CausalState, keep: int = 1) -> Tensor:
        more: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
        more[self._cache_name] = state.cache
        if self._keeps:
            more["logits_to_keep"] = keep
        mask = None if state.mask is None else state.mask[:, : state.length]
        if self._wide and mask is not None and ids.shape[1] == 1:
            mask = mask[:, None, None]
        if self._head is None:
            return self._backbone(input_ids=ids, attention_mask=mask, use_cache=True, **more).logits[:, -keep:]
        # Operations cost less in inference mode. What comes out of it can't meet a gradient: it stays in the stack,
        # unless somebody looks on.
        alone = not torch.is_grad_enabled() and not any(self._hooks)
        with torch.inference_mode() if alone else nullcontext():
            out: Any = self._backbone(input_ids=ids, attention_mask=mask, use_cache=True, **more)
        return self._head(out.last_hidden_state[:, -keep:])

    def _takes_wide_masks(self) -> bool:
        """Whether one token's mask may be (row, 1, 1, key), which need not be built anew each step: tried out."""
        sliding = any(type(layer) is not roomy_layer() for layer in roomy_cache(self._config).layers)
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


def _hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """What is empty as long as nobody looks on: forward hooks, and a forward of the instance's own."""
    return module._forward_hooks, module._forward_pre_hooks, "forward" in vars(module)
