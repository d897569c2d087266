"""Prompts as tokens: rows of ids, and rows of different length in one padded tensor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["left", "right"]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, chat: bool = False) -> list[int]:
    """The tokens of one prompt: see `encoded_prompts`."""
    return encoded_prompts(tokenizer, [prompt], chat)[0]


def encoded_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    chat: bool = False,
    *,
    special: bool = True,
    template: PreTrainedTokenizerBase | None = None,
) -> list[list[int]]:
    """The prompts' tokens: a list of messages (or any text, with `chat`) in the chat template, else with the
    tokenizer's own first tokens (unless `special` is False). An end mark that the tokenizer adds is taken off.

    `template` is the tokenizer whose chat template is used, where that is another. Raises `SurgeryError` without one.
    """
    turns = [chat or not isinstance(prompt, str) for prompt in prompts]
    texts = [prompt for prompt, turn in zip(prompts, turns, strict=True) if not turn]
    chats = [_turns(template or tokenizer, prompt) for prompt, turn in zip(prompts, turns, strict=True) if turn]
    plain = tokenized(tokenizer, texts, special=special)
    end = tokenizer.eos_token_id
    if special and any(len(ids) > 1 and ids[-1] == end for ids in plain) and _ends(tokenizer):
        plain = [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in plain]
    each, told = iter(plain), iter(tokenized(tokenizer, chats, special=False))
    return [next(told if turn else each) for turn in turns]


def _ends(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts an end mark after a text: one that the text itself ends with is not taken off."""
    ids = tokenized(tokenizer, ["a"], special=True)[0]
    return len(ids) > 1 and ids[-1] == tokenizer.eos_token_id


def _turns(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise SurgeryError("This tokenizer has no chat template.", hint="Set chat: false, or give plain prompts.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """All texts in one call: a call costs more than a text."""
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=special, verbose=False)  # contexts are checked where they count
    return [list(ids) for ids in found["input_ids"]]


def pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Any token will do where nothing is attended to."""
    known = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    return next((t for t in known if t is not None), 0)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens of different length in one tensor. What is real is said by the mask, never by the token.

    Raises `SurgeryError` for shapes that don't agree, a row without tokens, and real tokens with gaps between them.
    """

    ids: Tensor
    """(batch, pos) int64."""
    mask: Tensor
    """(batch, pos) bool: True on real tokens, one run in each row."""

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.mask.shape:
            raise SurgeryError(f"Token ids and mask are (batch, pos) both, and not {tuple(self.ids.shape)} and "
                               f"{tuple(self.mask.shape)}.", hint="One prompt is a batch of one: [ids].")  # fmt: skip
        if self.ids.is_floating_point() or self.ids.dtype == torch.bool:
            raise SurgeryError(f"Token ids are whole numbers, and these are {self.ids.dtype}.")
        if not len(self.ids):
            raise SurgeryError("No prompts.")
        object.__setattr__(self, "ids", self.ids.long())
        object.__setattr__(self, "mask", self.mask.to(self.ids.device).bool())
        counts = self.lengths.tolist()
        if 0 in counts:
            raise SurgeryError(f"Prompt {counts.index(0)} has no tokens.")
        gaps = (self.last - self.first + 1 != self.lengths).tolist()
        if True in gaps:
            raise SurgeryError(f"The mask of prompt {gaps.index(True)} has gaps: real tokens are one run.")

    @classmethod
    def of(cls, ids: Tensor | Sequence[Sequence[int]], mask: Tensor | Sequence[Sequence[int]] | None = None) -> Batch:
        """From token ids (batch, pos) and their attention mask; without a mask all tokens are real."""
        try:
            tokens = torch.as_tensor(ids)
        except (TypeError, ValueError):
            raise SurgeryError("Rows of different length need padding.", hint="encode(tokenizer, rows)") from None
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        return cls(tokens, real)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """(batch,) number of real tokens."""
        return self.mask.sum(1)

    @property
    def first(self) -> Tensor:
        """(batch,) index of the first real token."""
        return self.mask.int().argmax(1)

    @property
    def last(self) -> Tensor:
        """(batch,) index of the last real token."""
        return self.mask.shape[1] - 1 - self.mask.flip(1).int().argmax(1)

    @property
    def positions(self) -> Tensor:
        """(batch, pos) int64: 0 at the first real token of each row, and on padding."""
        return (torch.arange(self.ids.shape[1], device=self.ids.device) - self.first[:, None]) * self.mask

    @property
    def padded(self) -> bool:
        """Whether any token is not real."""
        return not bool(self.mask.all())

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Arguments for `model(**...)`, on its device: the mask where there is padding, positions where that is left.

        GPT-2, for one, counts positions from the left edge, padding and all, unless it is told them; a model whose
        forward takes no positions finds them from the mask, or has none.
        """
        there = self.to(next((p.device for p in model.parameters()), self.ids.device))
        inside: Any = getattr(model, "get_base_model", None)  # an adapter's own forward doesn't say what it passes on
        reader = inside() if callable(inside) else model
        found = {"input_ids": there.ids}
        if there.padded:
            found["attention_mask"] = there.mask.long()
            if bool((there.first > 0).any()) and "position_ids" in inspect.signature(reader.forward).parameters:
                found["position_ids"] = there.positions
        return found

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
        """The real tokens of each row as they read, with the space that a word begins with."""
        texts = {i: _readable(tokenizer, i) for i in set(self.ids[self.mask].tolist())}
        rows = zip(self.ids.tolist(), self.first.tolist(), self.last.tolist(), strict=True)
        return [[texts[i] for i in ids[start : end + 1]] for ids, start, end in rows]

    def to(self, device: str | torch.device) -> Batch:
        """The same on another device."""
        return self if self.ids.device == torch.device(device) else Batch(self.ids.to(device), self.mask.to(device))

    def right_padded(self) -> Batch:
        """The same rows with their padding on the right: there a token's column is its position."""
        if not bool((self.first > 0).any()):
            return self
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        moved = (columns + self.first[:, None]).clamp(max=len(columns) - 1)
        return Batch(self.ids.gather(1, moved), columns < self.lengths[:, None])

    def select(self, rows: int | slice | Sequence[int] | Tensor) -> Batch:
        """Some of the rows, in this order; as wide as before, so that positions keep their index."""
        index: Any = [rows] if isinstance(rows, int) else rows
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.ids.device)
            index = index if index.dtype == torch.bool else index.long()
        return Batch(self.ids[index], self.mask[index])


def encode(
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Any],
    *,
    side: Side = "right",
    chat: bool = False,
    max_length: int | None = None,
    add_special_tokens: bool = True,
) -> Batch:
    """Prompts as a padded batch: texts, chats (lists of messages) or lists of token ids, which need no tokenizer.

    `side` is where the padding goes; `chat` puts texts in the chat template; `max_length` keeps the last tokens.
    Raises `SurgeryError` when there is no prompt, when one has no tokens, and for one that is not in a list.
    """
    return padded(rows_of_ids(tokenizer, prompts, chat, add_special_tokens), pad_id(tokenizer), side, max_length)


def as_batch(thing: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> Batch:
    """A batch as it is, token ids (batch, pos), what a tokenizer returned, or anything that `encode` takes."""
    if isinstance(thing, Batch):
        return thing
    if isinstance(thing, Tensor):
        return Batch.of(thing)
    if isinstance(thing, Mapping) and "input_ids" in thing:
        return Batch.of(thing["input_ids"], thing.get("attention_mask"))
    return encode(tokenizer, thing)


def rows_of_ids(
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Any],
    chat: bool,
    special: bool,
    template: PreTrainedTokenizerBase | None = None,
) -> list[list[int]]:
    """The token ids of each prompt, of whatever kind it is."""
    if isinstance(prompts, (str, Mapping)):
        raise SurgeryError("Prompts come in a list, and this is one prompt.", hint="Wrap it: [prompt].")
    listed: list[Any] = [
        p.tolist() if hasattr(p, "tolist") else p if isinstance(p, (str, Mapping)) else _list(p) for p in prompts
    ]
    if not listed:
        raise SurgeryError("No prompts.")
    if all(isinstance(p, (int, Mapping)) for p in listed):
        kind = "token ids" if isinstance(listed[0], int) else "messages"
        raise SurgeryError(f"Prompts come in a list, and this is one prompt of {kind}.", hint="Wrap it: [prompt].")
    given = [isinstance(p, list) and all(isinstance(t, int) for t in p) for p in listed]
    for i, prompt in enumerate(listed):
        messages = isinstance(prompt, list) and all(isinstance(m, Mapping) for m in prompt)
        if not (given[i] or messages or isinstance(prompt, str)):
            raise SurgeryError(f"Prompt {i} is no text, no list of messages and no list of token ids.")
    texts = [p for p, is_ids in zip(listed, given, strict=True) if not is_ids]
    if texts and tokenizer is None:
        raise SurgeryError("Texts are read with a tokenizer: pass tokenizer=.")
    found = iter(encoded_prompts(tokenizer, texts, chat, special=special, template=template) if tokenizer else [])
    return [list(p) if is_ids else next(found) for p, is_ids in zip(listed, given, strict=True)]


def _list(prompt: Any) -> Any:
    """A prompt's parts as plain things: token ids may be numbers of NumPy or torch."""
    parts = list(prompt) if isinstance(prompt, Sequence) else prompt
    return [p.item() if hasattr(p, "item") else p for p in parts] if isinstance(parts, list) else parts


def padded(rows: Sequence[list[int]], pad: int, side: Side, max_length: int | None) -> Batch:
    """Rows of ids in one batch, `pad` on one side; of longer ones the last `max_length` tokens."""
    if side not in ("left", "right"):
        raise SurgeryError(f"Padding goes left or right, and not '{side}'.")
    if max_length is not None and max_length < 1:
        raise SurgeryError(f"max_length is at least 1, and not {max_length}.")
    if max_length is not None:
        rows = [row[-max_length:] for row in rows]
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        there = slice(len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, there], mask[i, there] = torch.tensor(row, dtype=torch.long), True
    return Batch(ids, mask)


def _readable(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    raw = tokenizer.convert_ids_to_tokens(token)
    if raw is None:  # rows of an embedding that no token uses
        return f"<{token}>"
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    spaced = str(raw).startswith(("Ġ", "▁")) and not text.startswith(" ")  # decoding strips it from a first word
    return " " + text if spaced else text
