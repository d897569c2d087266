"""What fine-tuning made likelier: log p_tuned - log p_base of tokens that may come, and of texts that are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from surgery.decoding import undisturbed
from surgery.errors import SurgeryError
from surgery.logits.combine import FLOOR, plausible
from surgery.logits.ensemble import Ensemble, member
from surgery.logits.members import Member, Prompt
from surgery.logits.score import log_likelihood
from surgery.models import Batch, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Model = nn.Module | str | Path | Ensemble
"""A model, what `surgery.models.load` takes, or a member."""


@dataclass(frozen=True)
class Contrasted:
    """A text and what two models say of it. Every list has an entry a token."""

    text: str
    ids: list[int]
    """Of the tuned model's vocabulary, without the token or prompt that it begins behind."""
    tokens: list[str]
    tuned: list[float]
    """log p_tuned, nats."""
    contrast: list[float]
    """log p_tuned - log p_base, nats: how much likelier fine-tuning made the token."""
    score: float | None = None
    """Of a generated text: the mean over its tokens of what it was drawn by, log p_tuned - gamma log p_base."""
    loss: float | None = None
    """Of a generated text that the base learned afterwards: the base's loss before, nats a token."""

    @property
    def novelty(self) -> float:
        """Mean contrast of a token."""
        return math.fsum(self.contrast) / len(self.contrast)


@dataclass(frozen=True)
class TokenContrast:
    """A token that may come next, and what both models give it."""

    token: str
    id: int
    contrast: float
    tuned: float
    base: float


def contrast_tokens(
    base: Model,
    tuned: Model,
    prompts: Sequence[Prompt],
    *,
    k: int = 10,
    alpha: float = 0.1,
    lost: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[TokenContrast]]:
    """After each prompt, the `k` next tokens whose log p_tuned - log p_base is largest; with `lost`, smallest.

    Only tokens count that are plausible for the tuned model (with `lost`, for the base): p >= alpha * max p. With alpha
    0 all do, and the largest ratios are those of tokens that both models find impossible.
    """
    if k < 1 or not prompts:
        raise SurgeryError(f"{k} tokens after {len(prompts)} prompts: at least one of each is needed.")
    if not 0 <= alpha <= 1:
        raise SurgeryError(f"alpha is {alpha}; expected a number from 0 to 1.")
    pair = difference(base, tuned, tokenizer)
    found = []
    with undisturbed(*pair.models):
        for prompt in prompts:
            _, state = pair.prefill_encoded([pair.encode(prompt)])
            told, before = (values[0, -1] for values in state.log_probs)
            kept = plausible(before if lost else told, alpha).nonzero()[:, 0]
            gaps = (told.clamp(min=FLOOR) - before.clamp(min=FLOOR))[kept]
            order = gaps.sort(descending=not lost, stable=True).indices[:k]
            ids = kept[order].tolist()
            columns = (readable(pair.tokenizer, ids), ids, *(v.tolist() for v in (gaps[order], told[ids], before[ids])))
            found.append([TokenContrast(*row) for row in zip(*columns, strict=True)])
    return found


def contrast_texts(
    base: Model,
    tuned: Model,
    texts: Sequence[str | Sequence[int]],
    *,
    prompts: Sequence[Prompt] | None = None,
    start: str | int | Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
) -> list[Contrasted]:
    """Given texts (or their token ids) token by token, behind their prompts or behind `start` (the tokenizer's BOS).

    Raises `SurgeryError` for texts of no tokens or longer than a context, and where there is nothing to begin with.
    """
    pair = difference(base, tuned, tokenizer)
    if prompts is None:
        prompts = [first_ids(pair.tokenizer, start)] * len(texts)
    return told(pair, prompts, texts, batch_size)


def told(
    pair: Ensemble, prompts: Sequence[Prompt], texts: Sequence[str | Sequence[int]], batch_size: int
) -> list[Contrasted]:
    """The same for a difference that is made already."""
    after, before = (pair.name_of(one) for one in pair.members)
    found = []
    for one in log_likelihood(pair, prompts, texts, end=False, batch_size=batch_size):
        values = one.members[after]
        gaps = [max(a, FLOOR) - max(b, FLOOR) for a, b in zip(values, one.members[before], strict=True)]
        found.append(
            Contrasted(text_of(pair.tokenizer, one.ids), one.ids, readable(pair.tokenizer, one.ids), values, gaps)
        )
    return found


def difference(base: Model, tuned: Model, tokenizer: PreTrainedTokenizerBase | None = None) -> Ensemble:
    """tuned - base. Raises `SurgeryError` when they are one model."""
    after, before = (alone(one, tokenizer, name) for one, name in ((tuned, "tuned"), (base, "base")))
    if after.key == before.key:
        raise SurgeryError("The base and the tuned model are one and the same: nothing is new.",
                           hint="Pass two models.")  # fmt: skip
    if after.foreign or before.foreign:
        raise SurgeryError("Tokens are compared one by one: models with another tokenizer (foreign) can't be.")
    if after.tokenizer is None:
        raise SurgeryError("Texts are read with a tokenizer: pass tokenizer=.")
    return Ensemble([(after, 1.0), (before, -1.0)])


def alone(thing: Model, tokenizer: PreTrainedTokenizerBase | None, name: str) -> Member:
    """A model as a member, or the member that an ensemble is."""
    if not isinstance(thing, Ensemble):
        return member(thing, tokenizer, name=str(thing) if isinstance(thing, str | Path) else name).base
    if len(thing.terms) != 1:
        raise SurgeryError(f"'{thing}' is not one model: what is new is seen between two.")
    return thing.base if thing.base.name else replace(thing.base, name=name)


def first_ids(tokenizer: PreTrainedTokenizerBase, start: str | int | Sequence[int] | None) -> list[int]:
    """What a text begins behind: the tokenizer's BOS, a token, or a text or tokens of the user's.

    Raises `SurgeryError` where the tokenizer has no BOS and nothing is given.
    """
    if start is None:
        start = tokenizer.bos_token_id
    if start is None:
        raise SurgeryError("This tokenizer has no BOS token, from which texts begin.",
                           hint='Say what they begin with: start="<|endoftext|>", a text, or token ids.')  # fmt: skip
    ids = [start] if isinstance(start, int) else prompt_ids(tokenizer, start) if isinstance(start, str) else list(start)
    if not ids or not all(0 <= i < len(tokenizer) for i in ids):
        raise SurgeryError(f"start is {start!r}: that is no token of this tokenizer to begin with.")
    return ids


def readable(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Each token as it reads, with the space that a word begins with."""
    return Batch.of([list(ids)]).tokens(tokenizer)[0] if ids else []


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The tokens as a text, special ones included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
