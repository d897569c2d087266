"""A base model and its fine-tuning, which fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.models.batch import Batch, Side, pad_id, padded, rows_of_ids
from surgery.models.loading import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Pair:
    """A base model and its fine-tuning. Vocabularies may differ in size; layers, heads and widths may not.

    Raises `SurgeryError` for models that don't fit together.
    """

    base: nn.Module
    tuned: nn.Module
    tokenizer: PreTrainedTokenizerBase
    tuned_tokenizer: PreTrainedTokenizerBase | None = None
    """Where the fine-tuning brings its own: `encode` then checks that both read a prompt alike."""

    def __post_init__(self) -> None:
        base, tuned = _shape(self.base), _shape(self.tuned)
        for name in (n for n in base if n in tuned):
            if base[name] != tuned[name]:
                raise SurgeryError(f"The base has {name} {base[name]}, the tuned model {tuned[name]}: "
                                   "pairs need the same architecture.")  # fmt: skip

    @classmethod
    def load(
        cls,
        base: str | Path,
        tuned: str | Path,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "cpu",
    ) -> Pair:
        """Both by what `load` takes: Pair.load("base", "base+adapter")."""
        (first, tokenizer), (second, other) = load(base, dtype, device), load(tuned, dtype, device)
        return cls(first, second, tokenizer, other)

    def encode(
        self,
        prompts: Sequence[Any],
        *,
        side: Side = "right",
        chat: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> Batch:
        """As `encode` of the module, for both models; chats are written with the tuned model's template if it has one.

        Raises `SurgeryError` with both token lists for the first prompt that the two tokenizers read differently.
        """
        rows = self.rows(prompts, chat=chat, add_special_tokens=add_special_tokens)
        return padded(rows, pad_id(self.tokenizer), side, max_length)

    def rows(self, prompts: Sequence[Any], *, chat: bool = False, add_special_tokens: bool = True) -> list[list[int]]:
        """The token ids of each prompt, unpadded. As `encode`."""
        own = self.tuned_tokenizer
        template = own if getattr(own, "chat_template", None) else self.tokenizer
        rows = rows_of_ids(self.tokenizer, prompts, chat, add_special_tokens, template)
        if own is not None:
            others = rows_of_ids(own, prompts, chat, add_special_tokens, template)
            for i, (mine, other) in enumerate(zip(rows, others, strict=True)):
                if mine != other:
                    raise SurgeryError(
                        f"The tokenizers disagree on prompt {i}: base {_told(mine)}, tuned {_told(other)}.",
                        hint="Pass token ids, or leave add_special_tokens or the chat template out.",
                    )
        return rows


def _told(ids: Sequence[int]) -> str:
    return f"[{', '.join(map(str, ids[:40]))}{', ...' if len(ids) > 40 else ''}]"


def _shape(model: nn.Module) -> dict[str, Any]:
    """What two models of a pair share, by the words of a message; nothing is known of a model without a config."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return {}
    config = config.get_text_config()
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    shared = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    each = getattr(config, "head_dim", None)
    if each is None and isinstance(heads, int) and isinstance(width, int):
        each = width // heads
    found = {"layers": getattr(config, "num_hidden_layers", None), "hidden size": width, "heads": heads,
             "key-value heads": shared, "head dimension": each}  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}
