"""Decoding from several models whose logits are added: the policy of a small module and a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from surgery.decoding import CausalDecoder, State
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass
class SummedState:
    """What each model remembers of the same rows."""

    parts: list[Any]

    def repeat(self, times: int) -> SummedState:
        """Every row `times` times, copies side by side."""
        return SummedState([part.repeat(times) for part in self.parts])

    def select(self, rows: Int[Tensor, " kept"]) -> SummedState:
        """The given rows, in the given order; a row may be named more than once."""
        return SummedState([part.select(rows) for part in self.parts])


class SummedDecoder:
    """Decodes from softmax(sum of the models' logits), each model with a cache of its own (UniR, Kim et al. 2025,
    arXiv:2505.19075, equation 5). Raises `SurgeryError` as `CausalDecoder` does, and for different vocabularies."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        check_vocabularies(models)
        self.parts = [CausalDecoder(model) for model in models]
        self.models = tuple(models)
        self.context: int | None = min((p.context for p in self.parts if p.context is not None), default=None)

    @property
    def room(self) -> int:
        """How many columns a cache keeps free for tokens to come."""
        return self.parts[0].room

    @room.setter
    def room(self, columns: int) -> None:
        for part in self.parts:
            part.room = columns

    def prefill(
        self, ids: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"]
    ) -> tuple[Float[Tensor, "row vocab"], SummedState]:
        """Reads left-padded prompts; the sum of logits after the last token."""
        return _sum([part.prefill(ids, mask) for part in self.parts])

    def step(self, tokens: Int[Tensor, " row"], state: SummedState) -> tuple[Float[Tensor, "row vocab"], SummedState]:
        """Reads one token a row; the sum of logits of the next."""
        return _sum([part.step(tokens, s) for part, s in zip(self.parts, state.parts, strict=True)])


def _sum(found: Sequence[tuple[Tensor, State]]) -> tuple[Tensor, SummedState]:
    total = found[0][0].float()
    for logits, _ in found[1:]:
        total = total + logits.float()
    return total, SummedState([state for _, state in found])


def check_vocabularies(models: Sequence[nn.Module]) -> None:
    """Raises `SurgeryError` when the models' logits can't be added."""
    sizes = [_vocabulary(model) for model in models]
    if len({size for size in sizes if size}) > 1:
        raise SurgeryError(
            f"Logits of vocabularies of {' and '.join(map(str, sizes))} tokens can't be added.",
            hint="The model and its backbones must share one tokenizer and one size of vocabulary.",
        )


def _vocabulary(model: Any) -> int | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return None if head is None or not hasattr(head, "weight") else head.weight.shape[0]
