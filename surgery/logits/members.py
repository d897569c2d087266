"""One model as a member of an ensemble: what it reads of a prompt, and which of its layers speaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from surgery.decoding import CausalDecoder
from surgery.errors import SurgeryError
from surgery.models import encoded_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""A text, the messages of a chat, or token ids."""
Style = Literal["given", "plain", "chat"] | Callable[[Any], Any]
"""given: texts as they are, chats in the member's own template. plain: chats as the text of their messages.
chat: texts as a user's message. A function of the prompt: what it returns (text, messages or ids) is read."""


@dataclass(frozen=True, eq=False)
class Member:
    """A model, how it is prompted and, for a logit lens, the layer or bucket of layers whose stream is read."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None = None
    prompt: Style = "given"
    name: str = ""
    layer: int | tuple[int, ...] | None = None
    """An index: norm and head on the stream after that block. Several: of these, at each step, the one that differs
    most from the last (DoLa's premature layer)."""
    token_map: Mapping[Any, Any] = field(default_factory=dict)
    """Reference token -> own token, where strings alone don't tell."""
    foreign: bool = False
    """Its tokenizer splits text otherwise than the base's: it follows the text (see `foreign`, experimental)."""
    decoders: dict[bool, CausalDecoder] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not (self.prompt in ("given", "plain", "chat") or callable(self.prompt)):
            raise SurgeryError(f"A member's prompt is 'given', 'plain', 'chat' or a function, not {self.prompt!r}.")

    @property
    def key(self) -> tuple[Any, ...]:
        """Members with equal keys say the same: they share a term."""
        return id(self.model), self.prompt, self.layer

    def decoder(self, *, whole: bool = False) -> CausalDecoder:
        """What decodes from the model, made once: making it tries the model out."""
        if whole not in self.decoders:
            self.decoders[whole] = CausalDecoder(self.model, whole=whole)
        return self.decoders[whole]

    def read(self, prompt: Prompt, reference: PreTrainedTokenizerBase | None) -> list[int]:
        """The member's own token ids of a prompt; ids are those of the `reference` tokenizer.

        Raises `SurgeryError` where a text needs a tokenizer or a chat template that is not there.
        """
        if callable(self.prompt):
            prompt = self.prompt(prompt)
        if is_ids(prompt):
            ids: list[int] = [int(t) for t in prompt]  # type: ignore[arg-type]
            if callable(self.prompt) or (self.prompt in ("given", "plain") and not self.foreign):
                return ids
            prompt = self._text(ids, reference)
        if self.tokenizer is None:
            raise SurgeryError(f"Member '{self.name}' reads texts with a tokenizer, and has none.",
                               hint="member(model, tokenizer), or prompts as token ids.")  # fmt: skip
        if self.prompt == "plain" and not isinstance(prompt, str):
            prompt = "\n".join(str(turn["content"]) for turn in prompt)  # type: ignore[index]
        try:
            return encoded_prompts(self.tokenizer, [prompt], chat=self.prompt == "chat")[0]
        except SurgeryError as error:
            raise SurgeryError(f"Member '{self.name}': {error.problem}",
                               hint='member(..., prompt="plain") reads the text of messages.') from error  # fmt: skip

    def _text(self, ids: list[int], reference: PreTrainedTokenizerBase | None) -> str:
        tokenizer = reference or self.tokenizer
        if tokenizer is None:
            raise SurgeryError(f"Member '{self.name}' puts texts in its chat template: token ids have none.")
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def is_ids(prompt: Any) -> bool:
    """Whether a prompt is token ids, and not a text or messages."""
    if isinstance(prompt, (str, Mapping)):
        return False
    return all(isinstance(part, int) or hasattr(part, "item") for part in prompt)
