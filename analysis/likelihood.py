"""How likely a model finds given answers: log-likelihood per response, and the perplexity of all of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.prompts import Progress, Prompt, by_length
from analysis.results import Result
from surgery.errors import SurgeryError
from surgery.models import encode, encoded_prompts, untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from surgery.logits import Ensemble


def answer_log_likelihood(
    model: PreTrainedModel | Ensemble,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    batch_size: int = 8,
    chat: bool = False,
    name: str = "log-likelihood",
    progress: Progress | None = None,
) -> Result:
    """Mean log-probability (nats a token) of each response and its end mark after its prompt; `tokens` is a column.

    Of a model, or of a composition of models, whose members read the prompts in their own ways (`chat` is for one
    model). Prompt and response are tokenised apart, as in generation. Raises `SurgeryError` when the lists differ in
    length.
    """
    import torch

    if len(prompts) != len(responses):
        raise SurgeryError(f"{len(prompts)} prompts, but {len(responses)} responses.")
    if not isinstance(model, torch.nn.Module):
        from surgery.logits import log_likelihood

        asked: Any = encoded_prompts(tokenizer, prompts, chat) if chat else prompts
        scored = log_likelihood(model, asked, responses, batch_size=batch_size, progress=progress)
        means = [float(np.mean(one.log_probs)) for one in scored]
        return Result.of(means, prompts, name=name, columns={"tokens": [len(one.ids) for one in scored]})
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answers = [tokenizer(r, add_special_tokens=False)["input_ids"] + end for r in responses]
    rows = [p + a for p, a in zip(encoded_prompts(tokenizer, prompts, chat), answers, strict=True)]
    accepts = inspect.signature(model.forward).parameters
    values = np.zeros(len(rows))
    with untouched(model):
        for batch in by_length(rows, batch_size, progress):
            inputs = encode(tokenizer, [rows[i] for i in batch], side="left").inputs(model)
            keep = max(len(answers[i]) for i in batch) + 1  # the responses are the last columns: no other logits needed
            more: dict[str, Any] = {"logits_to_keep": keep} if "logits_to_keep" in accepts else {}
            logits = model(**inputs, **more).logits[:, -keep:-1].float()
            target = inputs["input_ids"][:, 1 - keep :]
            # Flat: over any other axis than the last torch adds up a large vocabulary less exactly (1e-4 nats a token).
            taken = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            for row, i in zip(taken.view_as(target), batch, strict=True):
                values[i] = row[-len(answers[i]) :].mean().item()
    return Result.of(values, prompts, name=name, columns={"tokens": [len(a) for a in answers]})


def perplexity(likelihood: Result) -> float:
    """exp of the mean negative log-probability over all response tokens of an `answer_log_likelihood`."""
    tokens = np.array(likelihood.columns["tokens"])
    return float(np.exp(-(likelihood.values * tokens).sum() / tokens.sum()))
