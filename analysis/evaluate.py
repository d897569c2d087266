"""How good is a model? Exact-answer accuracy by greedy generation, and the likelihood of given answers.

A model that is looked at is not changed: training mode, cache settings and generation config are as before, also after
an exception.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.results import Result, concatenate
from surgery.errors import SurgeryError
from surgery.tasks import TASKS, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called with (examples done, examples in all) after each batch."""


@contextmanager
def untouched(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and cache inside; afterwards the model's modes and settings are as they were."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    use_cache = getattr(model.config, "use_cache", None)
    try:
        model.eval()
        if use_cache is not None:
            model.config.use_cache = True
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training
        if use_cache is not None:
            model.config.use_cache = use_cache


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    correct: Callable[[str, Example], bool],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    chat: bool = False,
    name: str = "accuracy",
    progress: Progress | None = None,
) -> Result:
    """1 where `correct(completion, example)`, else 0, in the order of `examples`; the completions are a column.

    Greedy decoding in left-padded batches of similar length. `chat` wraps each prompt in the tokenizer's chat template.
    """
    completions = generate(
        model,
        tokenizer,
        [e.prompt for e in examples],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        chat=chat,
        progress=progress,
    )
    values = [float(correct(text, e)) for text, e in zip(completions, examples, strict=True)]
    return Result.of(values, [e.prompt for e in examples], name=name, columns={"completion": completions})


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    chat: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """The greedy completion of each prompt, without special tokens, in the order of `prompts`."""
    from transformers import GenerationConfig

    rows = [prompt_ids(tokenizer, prompt, chat) for prompt in prompts]
    pad = _pad(tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=_stops(model, tokenizer),
    )
    completions = [""] * len(rows)
    run: Any = model.generate
    with untouched(model):
        for batch in _batches(rows, batch_size, progress):
            ids, mask = left_padded([rows[i] for i in batch], pad, model.device)
            out = run(ids, attention_mask=mask, generation_config=settings)
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                completions[i] = text
    return completions


def answer_log_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    batch_size: int = 8,
    chat: bool = False,
    name: str = "log-likelihood",
    progress: Progress | None = None,
) -> Result:
    """Mean log-probability (nats a token) of each response and its end mark after its prompt; `tokens` is a column.

    Prompt and response are tokenised apart, as in generation. Raises `SurgeryError` when the lists differ in length.
    """
    import torch

    if len(prompts) != len(responses):
        raise SurgeryError(f"{len(prompts)} prompts, but {len(responses)} responses.")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answers = [tokenizer(r, add_special_tokens=False)["input_ids"] + end for r in responses]
    rows = [prompt_ids(tokenizer, p, chat) + a for p, a in zip(prompts, answers, strict=True)]
    pad, accepts = _pad(tokenizer), inspect.signature(model.forward).parameters
    values = np.zeros(len(rows))
    with untouched(model):
        for batch in _batches(rows, batch_size, progress):
            ids, mask = left_padded([rows[i] for i in batch], pad, model.device)
            keep = max(len(answers[i]) for i in batch) + 1  # the responses are the last columns: no other logits needed
            more: dict[str, Any] = {"logits_to_keep": keep} if "logits_to_keep" in accepts else {}
            if "position_ids" in accepts:
                more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, **more).logits[:, -keep:-1].float()
            target = ids[:, 1 - keep :]
            taken = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            for row, i in zip(taken, batch, strict=True):
                values[i] = row[-len(answers[i]) :].mean().item()
    return Result.of(values, prompts, name=name, columns={"tokens": [len(a) for a in answers]})


def perplexity(likelihood: Result) -> float:
    """exp of the mean negative log-probability over all response tokens of an `answer_log_likelihood`."""
    tokens = np.array(likelihood.columns["tokens"])
    return float(np.exp(-(likelihood.values * tokens).sum() / tokens.sum()))


def evaluate_tasks(
    model: PreTrainedModel | str | Path,
    tasks: Sequence[str | Task] = ("facts", "chain", "copy", "reverse", "sort"),
    n: int = 100,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 128,
) -> Result:
    """Accuracy of a tiny model on `n` fresh examples of each task, one after the other; `task` is a column.

    `model` is a folder or a model (then with its tokenizer). Prompts of "facts" are few (200): `n` is cut to 100 there.
    """
    if isinstance(model, (str, Path)):
        model, tokenizer = load(model)
    if tokenizer is None:
        raise SurgeryError("A model in memory is evaluated with its tokenizer: pass tokenizer=.")
    parts, names = [], []
    for task in [TASKS.lookup(t) if isinstance(t, str) else t for t in tasks]:
        examples = task.examples(min(n, 100) if task.name == "facts" else n, seed)
        parts.append(accuracy(model, tokenizer, examples, task.correct, batch_size=batch_size, max_new_tokens=48))
        names.append(task.name)
    return concatenate(parts, task=names)


def load(folder: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder (or hub name), in evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    """The prompt's tokens as the model expects them: inside the chat template, or with the tokenizer's own first
    tokens.

    A tokenizer that adds an end mark to whatever it reads would end the prompt: the mark is taken off.
    """
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise SurgeryError("This tokenizer has no chat template.", hint="Evaluate it without chat.")
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def left_padded(rows: Sequence[list[int]], pad: int, device: Any = None) -> tuple[Any, Any]:
    """Rows of different length as one (batch, pos) tensor padded on the left, and its attention mask."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


def _batches(rows: Sequence[list[int]], size: int, progress: Progress | None) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
        if progress:
            progress(min(start + size, len(order)), len(order))


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token will do where the mask is 0."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def _stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Every end mark that the model's generation config or the tokenizer names."""
    config = getattr(model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    stops = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    return sorted(stops) or None
