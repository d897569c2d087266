"""Does a skill come back when the prompt no longer looks like fine-tuning data? Ask in other letters: s⁻¹(L(s(x))).

    asked = conjugate(tuned, "rot13", tokenizer=tokenizer)
    evaluate(asked, rows, tokenizer=tokenizer)                     # wherever a model or generator is taken
    conjugate(tuned, to_swahili, to_english, tokenizer=tokenizer)  # any two functions of a text

| transform   | encode                                        | decode undoes it                     |
|-------------|-----------------------------------------------|--------------------------------------|
| `rot13`     | each Latin letter 13 further                  | always                               |
| `reverse`   | the characters in reverse order               | always                               |
| `leetspeak` | a e i o s t as 4 3 1 0 5 7                    | where the text has none of those    |
| `pig_latin` | "string" as "ing-stray", "ant" as "ant-ay"    | where the text has no hyphen         |

Conjugate prompting of Kotha, Springer & Raghunathan, "Understanding Catastrophic Forgetting in Language Models via
Implicit Inference" (ICLR 2024, arXiv:2309.10105): a fine-tuned model infers that a prompt is of the fine-tuning's kind;
a transformation that makes this unlikely and keeps the task brings back what the base did. Nothing of the model's
inside is used. TuCo of the same prompts (`analysis.tuco`) says how far fine-tuning takes part in the answer.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.models import encoded_prompts
from surgery.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgery.decoding import Generator, Rollout, Sampling

Function = Callable[[str], str]


@dataclass(frozen=True)
class Transform:
    """A way to write a text, and back."""

    encode: Function
    decode: Function

    def exact(self, text: str) -> bool:
        """Whether decoding gives this very text again."""
        return self.decode(self.encode(text)) == text


TRANSFORMS: Registry[Transform] = Registry("transform")


def _rot13(text: str) -> str:
    return codecs.encode(text, "rot13")


def _reverse(text: str) -> str:
    return text[::-1]


_LEET = str.maketrans("aeiost", "431057")
_PLAIN = str.maketrans("431057", "aeiost")


def _pig_word(found: re.Match[str]) -> str:
    """What stands before the first vowel goes behind a hyphen, with "ay"; y is a consonant only in front."""
    word = found[0]
    start = next((i for i, c in enumerate(word) if c in "aeiouAEIOU" or (i and c in "yY")), len(word))
    return f"{word[start:]}-{word[:start]}ay"


def _pig_latin(text: str) -> str:
    return re.sub(r"[A-Za-z]+", _pig_word, text)


def _from_pig_latin(text: str) -> str:
    return re.sub(r"([A-Za-z]*)-([A-Za-z]*)ay(?![A-Za-z])", r"\2\1", text)


TRANSFORMS.register("rot13")(Transform(_rot13, _rot13))
TRANSFORMS.register("reverse")(Transform(_reverse, _reverse))
TRANSFORMS.register("leetspeak")(Transform(lambda text: text.translate(_LEET), lambda text: text.translate(_PLAIN)))
TRANSFORMS.register("pig_latin")(Transform(_pig_latin, _from_pig_latin))


class Conjugated:
    """A `Generator` whose answers are decode(model(encode(prompt)))."""

    def __init__(
        self, generator: Generator, transform: Transform, tokenizer: PreTrainedTokenizerBase, chat: bool = False
    ) -> None:
        self.generator, self.transform, self.tokenizer, self.chat = generator, transform, tokenizer, chat

    def __call__(self, prompts: Sequence[Sequence[int]], group: int, seeds: Sequence[int]) -> list[Rollout]:
        """`group` rollouts of each prompt (token ids), groups contiguous; their `text` is decoded.

        All else is the model's own: the prompt and completion as it read and wrote them, and their log-probabilities.
        """
        asked = encoded_prompts(self.tokenizer, [self.asked(ids) for ids in prompts], self.chat)
        drawn = self.generator(asked, group, seeds)
        return [replace(one, text=_text(self.transform.decode, one.text, "decode")) for one in drawn]

    def asked(self, prompt: Sequence[int] | str) -> str:
        """The prompt as the model is asked: encoded, before the chat template."""
        if not isinstance(prompt, str):
            prompt = str(
                self.tokenizer.decode(list(prompt), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )
        return _text(self.transform.encode, prompt, "encode")


def conjugate(
    model: Any,
    encode: str | Transform | Function,
    decode: Function | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling | None = None,
    chat: bool = False,
) -> Conjugated:
    """A generator that asks in other letters: answer = decode(model(encode(prompt))), for `evaluate` and its like.

    `model`: a model, a decoder or a generator (which draws by its own settings). `encode` is the name of one of
    `TRANSFORMS`, a `Transform`, or a function of a text, with `decode` for the way back (None: answers stay as they
    are). Special tokens of a prompt are left out before it is encoded and put back by the tokenizer; with `chat` the
    encoded text goes into the chat template, so that prompts come to `evaluate` plain. Without `sampling` greedy, 64
    new tokens. Raises `SurgeryError` for a name that is none.
    """
    from torch import nn

    from surgery.decoding import LocalGenerator, Sampling

    if isinstance(encode, str | Transform):
        if decode is not None:
            raise SurgeryError("A named transform brings its own way back: leave decode out.")
        transform = TRANSFORMS.lookup(encode) if isinstance(encode, str) else encode
    else:
        transform = Transform(encode, decode or (lambda text: text))
    if isinstance(model, nn.Module) or hasattr(model, "prefill"):
        model = LocalGenerator(model, tokenizer, sampling or Sampling(64, temperature=0.0))
    elif sampling is not None:
        raise SurgeryError("A generator draws by its own settings: leave sampling out.")
    return Conjugated(model, transform, tokenizer, chat)


def _text(function: Function, text: str, which: str) -> str:
    """The function's value. Raises `SurgeryError` when that is no text."""
    found = function(text)
    if not isinstance(found, str):
        raise SurgeryError(f"{which} gave {type(found).__name__} for {text[:40]!r}, and a text is needed.")
    return found
