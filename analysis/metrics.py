"""What is measured of a model's answer: one value an example, read at the last real token.

| metric | value | logits it needs |
|---|---|---|
| `logit_diff(answers)` | logit[y] - logit[y'] | the two of each example |
| `answer_logit(answer)` | logit[y] | one of each example |
| `log_prob(answer)`, `prob(answer)` | log p[y], p[y] | all of the last token |
| `relative_prob(answer, reference)` | (p[y] - p_ref[y]) / p_ref[y], of path patching | all of the last token |
| `kl(reference)` | KL(p_ref \\|\\| p) in nats | all of the last token |
| `accuracy(answer)` | 1 where the likeliest token is y | all of the last token |
| any function of logits (batch, pos, vocab) | (batch,) | all |

A metric says what it needs, so that sweeps compute no more: two rows of the unembedding instead of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgery.anatomy import Anatomy

Needs = Literal["answers", "last", "all"]


@dataclass(frozen=True)
class Metric:
    """A function of logits, and which of them it needs.

    `function(logits, **columns)` gives (..., batch) for logits (..., batch, answers) or (..., batch, vocab), with any
    number of leading axes; with `needs="all"` it gets (batch, pos, vocab).
    """

    name: str
    function: Callable[..., Tensor]
    needs: Needs = "last"
    tokens: Tensor | None = None
    """(batch, answers) the tokens whose logits are needed."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Further arguments with an entry an example."""

    def select(self, rows: Any) -> Metric:
        """The metric of some of the examples."""
        tokens = None if self.tokens is None else self.tokens[rows]
        return replace(self, tokens=tokens, columns={name: column[rows] for name, column in self.columns.items()})

    @property
    def divisible(self) -> bool:
        """Whether some examples can be measured by themselves: a plain function may know them by their rows."""
        return self.tokens is not None or bool(self.columns)

    def to(self, device: Any) -> Metric:
        """The same with its columns on another device."""
        tokens = None if self.tokens is None else self.tokens.to(device)
        return replace(self, tokens=tokens, columns={name: column.to(device) for name, column in self.columns.items()})

    def check(self, batch: int, vocabulary: int | None = None) -> None:
        """Raises `SurgeryError` when it is made for another number of examples, or for tokens that a model has not."""
        columns = [*self.columns.values(), *([] if self.tokens is None else [self.tokens])]
        if wrong := [len(column) for column in columns if len(column) != batch]:
            raise SurgeryError(f"The metric '{self.name}' is made for {wrong[0]} examples, and there are {batch}.")
        answers = [t for t in (self.tokens, self.columns.get("answer")) if t is not None]
        if vocabulary is not None and (most := max((int(t.max()) for t in answers), default=0)) >= vocabulary:
            raise SurgeryError(f"The answer {most} is no token: the model knows 0 to {vocabulary - 1}.")

    def of_logits(self, logits: Tensor, last: Tensor) -> Tensor:
        """(batch,) from the logits (batch, pos, vocab) of a whole pass; `last` is each row's last real token."""
        if self.needs == "all":
            return self.value(logits)
        here = logits[torch.arange(len(logits), device=logits.device), last]
        return self.value(here if self.tokens is None else here.gather(-1, self.tokens))

    def of_final(self, final: Tensor, anatomy: Anatomy) -> Tensor:
        """(groups, batch) from the last norm's output at the last token, (groups, batch, d_model)."""
        if self.tokens is None or not _plain_head(anatomy):
            logits = anatomy.logits(final)
            if self.tokens is not None:
                logits = logits.gather(-1, self.tokens.expand(*logits.shape[:-1], -1))
            return self.value(logits)
        rows = anatomy.head.weight[self.tokens]  # (batch, answers, d_model)
        logits = torch.einsum("gbd,bad->gba", final, rows)
        if anatomy.head.bias is not None:
            logits = logits + anatomy.head.bias[self.tokens]
        return self.value(anatomy.capped(logits))

    def value(self, logits: Tensor) -> Tensor:
        """The function's value in float32, at least. Raises `SurgeryError` when it is not one number an example."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        found = self.function(logits, **self.columns)
        expected = logits.shape[:1] if self.needs == "all" else logits.shape[:-1]
        if not isinstance(found, Tensor) or found.shape != expected:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise SurgeryError(f"The metric '{self.name}' gave {got}, and one value an example, {tuple(expected)}, is "
                               "needed: reduce over examples last.")  # fmt: skip
        return found


def _plain_head(anatomy: Anatomy) -> bool:
    """Whether single rows of the unembedding can be used by themselves."""
    return type(anatomy.head) is torch.nn.Linear and not anatomy.head._forward_hooks


def logit_diff(answers: Any) -> Metric:
    """logit[y] - logit[y'], `answers` (batch, 2): the clean answer and the corrupt one."""
    tokens = _tokens(answers)
    if tokens.dim() != 2 or tokens.shape[1] != 2:
        shape = tuple(tokens.shape)
        raise SurgeryError(f"A logit difference needs two answers an example, (batch, 2), and not {shape}.")
    return Metric("logit_diff", lambda logits: logits[..., 0] - logits[..., 1], "answers", tokens)


def answer_logit(answer: Any) -> Metric:
    """logit[y], `answer` (batch,)."""
    return Metric("answer_logit", lambda logits: logits[..., 0], "answers", _tokens(answer).reshape(-1, 1))


def log_prob(answer: Any) -> Metric:
    """log p[y] in nats, `answer` (batch,)."""
    return Metric("log_prob", lambda logits, answer: _taken(logits.log_softmax(-1), answer), "last",
                  columns={"answer": _tokens(answer).reshape(-1)})  # fmt: skip


def prob(answer: Any) -> Metric:
    """p[y], `answer` (batch,)."""
    return Metric("prob", lambda logits, answer: _taken(logits.softmax(-1), answer), "last",
                  columns={"answer": _tokens(answer).reshape(-1)})  # fmt: skip


def relative_prob(answer: Any, reference: Tensor) -> Metric:
    """(p[y] - p_ref[y]) / p_ref[y], `reference` (batch,) the probabilities of a run that is compared with."""

    def score(logits: Tensor, answer: Tensor, reference: Tensor) -> Tensor:
        return _taken(logits.softmax(-1), answer) / reference - 1

    columns = {"answer": _tokens(answer).reshape(-1), "reference": reference.detach().float()}
    return Metric("relative_prob", score, "last", columns=columns)


def kl(reference: Tensor) -> Metric:
    """KL(p_ref || p) in nats at the last token, `reference` (batch, vocab) logits; never NaN from infinite logits."""

    def divergence(logits: Tensor, reference: Tensor) -> Tensor:
        p, log_q = reference.exp(), logits.log_softmax(-1)
        return torch.where(p > 0, p * (reference - log_q), p.new_zeros(())).sum(-1)

    return Metric("kl", divergence, "last", columns={"reference": reference.detach().float().log_softmax(-1)})


def accuracy(answer: Any) -> Metric:
    """1 where the likeliest token is y, else 0, `answer` (batch,)."""
    return Metric("accuracy", lambda logits, answer: (logits.argmax(-1) == answer).float(), "last",
                  columns={"answer": _tokens(answer).reshape(-1)})  # fmt: skip


def as_metric(thing: Metric | Callable[[Tensor], Tensor]) -> Metric:
    """A metric as it is; a plain function of logits (batch, pos, vocab) as a metric that needs them all."""
    if isinstance(thing, Metric):
        return thing
    if not callable(thing):
        raise SurgeryError(f"A metric is a function of logits, and {type(thing).__name__} is none.",
                           hint="For instance logit_diff(answers) of analysis.metrics.")  # fmt: skip
    return Metric(getattr(thing, "__name__", "metric"), thing, "all")


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[str | Sequence[str]], *, first: bool = False
) -> Tensor:
    """The token of each answer, (batch,) or (batch, answers); spaces count, as in " Paris".

    Raises `SurgeryError` for an answer of several tokens, unless their first is what is wanted.
    """

    def one(text: str) -> int:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 and not (first and ids):
            raise SurgeryError(f"The answer {text!r} is {len(ids)} tokens, and one is read at the last position.",
                               hint="Choose answers of one token, or pass first=True to take the first.")  # fmt: skip
        return int(ids[0])

    return torch.tensor([one(a) if isinstance(a, str) else [one(part) for part in a] for a in answers])


def _tokens(answer: Any) -> Tensor:
    hint = "answer_tokens(tokenizer, texts) makes them of texts."
    try:
        tokens = torch.as_tensor(answer)
    except (TypeError, ValueError):
        problem = "Answers are token ids, and these are no numbers, or not in rows of one length."
        raise SurgeryError(problem, hint=hint) from None
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise SurgeryError(f"Answers are token ids, and these are {tokens.dtype}.", hint=hint)
    if tokens.numel() and int(tokens.min()) < 0:
        raise SurgeryError(f"Answers are token ids, and {int(tokens.min())} is none.", hint=hint)
    return tokens.long()


def _taken(values: Tensor, answer: Tensor) -> Tensor:
    index = answer.expand(values.shape[:-1])[..., None]
    return values.gather(-1, index)[..., 0]
