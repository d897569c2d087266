"""Masked thought: the demonstration is learned while parts of it are hidden from the model's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.models import pad_id
from surgery.training.batch import Batch
from surgery.training.objectives.base import Loss, register
from surgery.training.objectives.sft import SFT
from surgery.training.policy import Scores
from surgery.training.schedules import Linear, Number

if TYPE_CHECKING:
    from surgery.training.context import Context

TOKENS = ("pad", "new", "random")
HIDDEN, INSTEAD = "masked_thought/hidden_below", "masked_thought/instead"


@register("masked_thought")
@dataclass(frozen=True)
class MaskedThought(SFT):
    """SFT in which each completion token is replaced in the *input* with probability `mask_rate`; the prompt never is
    (Chen et al. 2024, "Masked Thought", arXiv:2403.02178).

    All completion tokens stay targets. The rate rises from 0 to 0.4 over the first two thirds of the run (the paper's
    for GSM8K; 0.2 for MetaMath); at 0 this is SFT, bit for bit. What is hidden follows from (seed, draw, row, token).
    """

    mask_rate: Number = Linear(0.0, 0.4, over=2 / 3)
    token: str | int = "pad"
    """What stands in for a hidden token: the padding token (whose embedding many models never train), `new` (one that
    the tokenizer never writes: a spare row of the embedding), `random` (any token, another each time), or an id."""
    drop_attention: bool = False
    """Nothing attends to hidden tokens either."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """A token of the known kinds."""
        if isinstance(self.token, str) and self.token not in TOKENS:
            raise SurgeryError(
                f"masked_thought: `token` is {self.token!r}.", hint=f"Expected {', '.join(TOKENS)} or a token's id."
            )

    def prepare(self, batch: Batch, context: Context) -> None:
        """A number in [0, 1) for every input token, hidden when the rate is above it, and what then stands there."""
        noise, instead = torch.ones(batch.completion_ids.shape), torch.zeros_like(batch.completion_ids)
        model: Any = context.policy.model
        vocabulary = model.get_input_embeddings().num_embeddings
        for i, length in enumerate(batch.lengths.tolist()):
            generator = torch.Generator().manual_seed(context.seed("masked_thought", i))
            noise[i, :length] = torch.rand(length, generator=generator)
            if self.token == "random":
                instead[i, :length] = torch.randint(vocabulary, (length,), generator=generator)
        if self.token != "random":
            instead += self._token(context.tokenizer, vocabulary)
        batch[HIDDEN], batch[INSTEAD] = noise, instead

    def loss(self, policy: Callable[..., Scores], batch: Batch) -> Loss:
        """SFT's loss on the masked inputs; the rate is that of the step."""
        hidden = batch[HIDDEN] < self.at(self.mask_rate, batch)
        metrics = {"masked": ((hidden * batch.attended).sum(), float(batch.lengths.sum()))}
        if hidden.any():
            inputs: Tensor = torch.where(hidden, batch[INSTEAD], batch.completion_ids)
            batch = replace(batch, inputs=inputs, unseen=hidden if self.drop_attention else None)
        found = super().loss(policy, batch)
        return Loss(found.value, {**found.metrics, **metrics})

    def _token(self, tokenizer: Any, vocabulary: int) -> int:
        named = {"pad": pad_id(tokenizer), "new": len(tokenizer)}
        token = named[self.token] if isinstance(self.token, str) else self.token
        if not 0 <= token < vocabulary:
            raise SurgeryError(
                f"masked_thought: token {self.token!r} is {token}, and the model's embedding has {vocabulary} rows.",
                hint="Use token: pad, or model.resize_token_embeddings first.",
            )
        return token
