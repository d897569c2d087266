"""One model as a member of an ensemble: what it reads of a prompt, and which of its layers speaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from surgery.decoding import CausalDecoder
from surgery.decoding.adapter import Adapter, check_adapter, speaking
from surgery.decoding.head import unwrapped
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

    model: nn.Module = field(repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)
    prompt: Style = "given"
    name: str = ""
    layer: int | tuple[int, ...] | None = None
    """An index: norm and head on the stream after that block. Several: of these, at each step, the one that differs
    most from the last (DoLa's premature layer)."""
    token_map: Mapping[Any, Any] = field(default_factory=dict)
    """Reference token -> own token, where strings alone don't tell."""
    foreign: bool = False
    """Its tokenizer splits text otherwise than the base's: it follows the text (see `foreign`, experimental)."""
    adapter: Adapter = None
    """Of a model with PEFT adapters: which one it speaks with."""
    decoders: dict[bool, CausalDecoder] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not (self.prompt in ("given", "plain", "chat") or callable(self.prompt)):
            raise SurgeryError(f"A member's prompt is 'given', 'plain', 'chat' or a function, not {self.prompt!r}.",
                               hint="A template is a function: prompt=lambda text: f'Q: {text} A:'.")  # fmt: skip
        layers = self.layer if isinstance(self.layer, tuple) else (0 if self.layer is None else self.layer,)
        if not layers or any(isinstance(one, bool) or not isinstance(one, int) for one in layers):
            raise SurgeryError(f"The layer of '{self.name}' is {self.layer!r}: expected an index, or several.")
        if self.tokenizer is not None and not hasattr(self.tokenizer, "get_vocab"):
            raise SurgeryError(f"The tokenizer of '{self.name}' is a {type(self.tokenizer).__name__}.",
                               hint="surgery.models.load gives (model, tokenizer).")  # fmt: skip
        check_adapter(self.model, self.adapter, self.name)
        if not isinstance(self.token_map, Mapping):
            raise SurgeryError(f"token_map of '{self.name}' is a {type(self.token_map).__name__}: expected "
                               "{token of the base: token of the member}.")  # fmt: skip

    @property
    def key(self) -> tuple[Any, ...]:
        """Members with equal keys say the same: they share a term."""
        return *self.voice, self.prompt, self.layer

    @property
    def voice(self) -> tuple[Any, ...]:
        """Members with equal voices share forward passes."""
        return id(self.model), self.adapter

    def speaking(self) -> AbstractContextManager[None]:
        """Inside, the model speaks with this member's adapter."""
        return speaking(self.model, self.adapter)

    def decoder(self, *, whole: bool = False) -> CausalDecoder:
        """What decodes from the model, made once: making it tries the model out."""
        inner = unwrapped(self.model)
        if hasattr(inner, "can_generate") and not inner.can_generate() and not hasattr(inner, "lm_head"):
            raise SurgeryError(f"'{self.name}' is a {type(inner).__name__}, which says no next token.",
                               hint="Load it as a causal language model (AutoModelForCausalLM).")  # fmt: skip
        if whole not in self.decoders:
            with self.speaking():
                self.decoders[whole] = CausalDecoder(self.model, whole=whole)
        return self.decoders[whole]

    def read(self, prompt: Prompt, reference: PreTrainedTokenizerBase | None) -> list[int]:
        """The member's own token ids of a prompt; ids are those of the `reference` tokenizer.

        Raises `SurgeryError` where a text needs a tokenizer or a chat template that is not there, for messages that
        the template can't take, and for what is no prompt.
        """
        if callable(self.prompt):
            prompt = self.prompt(prompt)
        if is_ids(prompt):
            ids: list[int] = [index(t) for t in prompt]  # type: ignore[arg-type]
            if callable(self.prompt) or (self.prompt in ("given", "plain") and not self.foreign):
                return ids
            prompt = self._text(ids, reference)
        if not isinstance(prompt, str) and not _is_chat(prompt):
            raise SurgeryError(f"Member '{self.name}' can't read {_shown(prompt)}.",
                               hint="A prompt is a text, the messages of a chat or token ids.")  # fmt: skip
        if self.tokenizer is None:
            raise SurgeryError(f"Member '{self.name}' reads texts with a tokenizer, and has none.",
                               hint="member(model, tokenizer), or prompts as token ids.")  # fmt: skip
        if self.prompt == "plain" and not isinstance(prompt, str):
            prompt = "\n".join(self._content(turn) for turn in prompt)  # type: ignore[arg-type]
        try:
            return encoded_prompts(self.tokenizer, [prompt], chat=self.prompt == "chat")[0]
        except SurgeryError as error:
            raise SurgeryError(f"Member '{self.name}': {error.problem}",
                               hint='member(..., prompt="plain") reads the text of messages.') from error  # fmt: skip
        except Exception as error:  # whatever a template trips over
            if isinstance(prompt, str) and self.prompt != "chat":
                raise
            raise SurgeryError(f"Member '{self.name}': its chat template can't take {_shown(prompt)}: {error}",
                               hint='Messages are [{"role": "user", "content": "..."}].') from error  # fmt: skip

    def _content(self, turn: Mapping[str, Any]) -> str:
        """The text of one message, which may come in parts."""
        said = turn.get("content")
        parts = said if isinstance(said, list) else [{"text": said}]
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise SurgeryError(f"Member '{self.name}' reads the text of messages, and finds none in {_shown(turn)}.")
        return "".join(texts)  # type: ignore[arg-type]

    def _text(self, ids: list[int], reference: PreTrainedTokenizerBase | None) -> str:
        tokenizer = reference or self.tokenizer
        if tokenizer is None:
            raise SurgeryError(f"Member '{self.name}' puts texts in its chat template: token ids have none.")
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def is_ids(prompt: Any) -> bool:
    """Whether a prompt is token ids (none are some, too), and not a text or messages."""
    if isinstance(prompt, (str, Mapping)) or not isinstance(prompt, Iterable):
        return False
    return all(isinstance(part, int) or _is_whole(part) for part in prompt)


def listed(prompts: Any, what: str = "Prompts") -> list[Any]:
    """`prompts` as a list. Raises `SurgeryError` for one that is in no list, and for a tokenizer's output."""
    alone = isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable)
    found = [] if alone else list(prompts)
    if alone or any(isinstance(one, (int, Mapping)) for one in found):
        raise SurgeryError(f"{what} come in a list, and this is one alone: {_shown(prompts)}.",
                           hint="Wrap it: [...]. Token ids come without padding.")  # fmt: skip
    return found


def _is_whole(part: Any) -> bool:
    """Whether this is one whole number of a tensor or an array."""
    try:
        return hasattr(part, "item") and isinstance(index(part), int)
    except TypeError:
        return False


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and all(isinstance(turn, Mapping) for turn in prompt)


def _shown(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 80 else f"{text[:77]}..."
