"""How good is a model? One call for a model, a folder, or anything that generates; greedy, or over many samples.

    found = evaluate("merged", task_rows(["chain", "copy"], n=200))           # (examples,), greedy
    found = evaluate(model, rows, tokenizer=tokenizer, samples=16, seed=0)    # (examples, sample), at temperature 1
    found.by("task"), found.table("difficulty"), found.plot("category"), pass_at_k(found, [1, 4, 16])

A model that is looked at is not changed: training mode, cache settings and generation config are as before, also after
an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.likelihood import answer_log_likelihood, perplexity
from analysis.prompts import Progress, Prompt, by_length
from analysis.results import Result, concatenate
from analysis.rows import stated_answer, task_rows
from surgery.errors import SurgeryError
from surgery.models import encoded_prompts, load, prompt_ids, untouched
from surgery.tasks import TASKS, Example, Task, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from surgery.decoding import Decoder, Generator, Rollout

__all__ = [
    "accuracy", "answer_log_likelihood", "evaluate", "evaluate_tasks", "generate", "labels_of", "load", "perplexity",
    "prompt_ids", "respond", "stated_answer", "task_rows", "untouched",
]  # fmt: skip

LONGEST = 256
"""New tokens where nothing else is asked for, as far as the model's context goes."""
COLUMNS = ("task", "category", "difficulty", "answer")
"""What a result keeps of its rows, besides whatever other columns are labels."""


def evaluate(
    model: PreTrainedModel | Decoder | Generator | str | Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    batch_size: int = 128,
    chat: bool = False,
    name: str = "accuracy",
    progress: Progress | None = None,
) -> Result:
    """1 where the verifier of a row's task accepts the completion, else 0, in the order of `rows`.

    Greedy without `samples`; with it (examples, sample), drawn at `temperature`: row i's noise depends on `seed`, i and
    the sample only. Columns: the row's labels (`labels_of`), `row` (its index), completion, and `truncated`, the share
    of completions that did not end by themselves. Rows whose answer can't be parsed are left out, and counted in
    `meta`. Of a composition the members read the prompts in their own ways; `chat` is for one model.

    A `Generator` samples by its own settings (`temperature`, `max_new_tokens` are not used). Raises `SurgeryError` when
    the tokenizer is missing, no row is left, or a prompt does not fit into the context.
    """
    from surgery.decoding import Sampling

    if isinstance(model, (str, Path)):
        model, tokenizer = load(model)
    group = 1 if samples is None else samples
    prompts = [row["prompt"] for row in rows]
    # The members of a composition read a prompt each in their own way.
    encoded = prompts if _is_composed(model) and not chat else encoded_prompts(_needed(model, tokenizer), prompts, chat)
    longest = max_new_tokens or _room(model, encoded)
    sampling = Sampling(longest, 0.0 if samples is None else temperature, batch_size=batch_size)
    drawn = respond(model, encoded, _needed(model, tokenizer), sampling, group, seed, progress)
    right = [[verify(one.text, row) for one in group_] for row, group_ in zip(rows, drawn, strict=True)]
    known = [i for i, verdicts in enumerate(right) if None not in verdicts]
    if not known:
        raise SurgeryError("No row has an answer that its verifier can read." if rows else "No rows to evaluate.")
    texts = [[one.text for one in drawn[i]] for i in known]
    columns: dict[str, list[Any]] = {c: [rows[i].get(c) for i in known] for c in labels_of(rows)}
    columns["row"] = known
    columns["completion"] = [text[0] for text in texts] if samples is None else texts
    columns["truncated"] = [float(np.mean([one.truncated for one in drawn[i]])) for i in known]
    values = np.array([right[i] for i in known], dtype=float)
    axes: dict[str, Sequence[Any]] = {"example": [prompts[i] for i in known], "sample": range(group)}
    meta = {"samples": samples, "temperature": sampling.temperature, "seed": seed, "unread": len(rows) - len(known)}
    if samples is None:
        return Result.of(values[:, 0], axes["example"], name=name, columns=columns, meta=meta)
    return Result(values, axes, name, columns, meta)


def labels_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns by which rows can be grouped: those of `COLUMNS`, and others with a word or number in every row."""
    plain = (str, int, float, bool, type(None))
    shared = [c for c in (rows[0] if rows else ()) if all(c in row and isinstance(row[c], plain) for row in rows)]
    return [*COLUMNS, *(c for c in shared if c not in (*COLUMNS, "prompt", "completion"))]


def respond(
    model: PreTrainedModel | Decoder | Generator,
    prompts: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Any,
    group: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[list[Rollout]]:
    """`group` rollouts of each prompt (token ids), in the order of `prompts`; a `Generator` is used as it is.

    A composition of models takes texts and messages too.
    """
    from surgery.decoding import LocalGenerator
    from surgery.logits.generate import Composed

    run: Any = model
    if _is_local(model):
        run = Composed(model, sampling) if _is_composed(model) else LocalGenerator(model, tokenizer, sampling)  # type: ignore[arg-type]
    found: list[list[Rollout]] = [[] for _ in prompts]
    for batch in by_length(prompts, max(1, sampling.batch_size // group), progress):
        # Seeds of two evaluations share no number, whatever their prompts.
        drawn = run([prompts[i] for i in batch], group, [(seed << 32) + i for i in batch])
        for at, i in enumerate(batch):
            found[i] = drawn[at * group : (at + 1) * group]
    return found


def accuracy(
    model: PreTrainedModel | Decoder | Generator,
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
    prompts = [e.prompt for e in examples]
    completions = generate(
        model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens, chat=chat, progress=progress
    )
    values = [float(correct(text, e)) for text, e in zip(completions, examples, strict=True)]
    return Result.of(values, prompts, name=name, columns={"completion": completions})


def generate(
    model: PreTrainedModel | Decoder | Generator,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    chat: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """The greedy completion of each prompt, without special tokens, in the order of `prompts`."""
    from surgery.decoding import Sampling

    encoded = encoded_prompts(tokenizer, prompts, chat)
    sampling = Sampling(max_new_tokens, temperature=0.0, batch_size=batch_size)
    return [one.text for (one,) in respond(model, encoded, tokenizer, sampling, progress=progress)]


def evaluate_tasks(
    model: PreTrainedModel | Decoder | Generator | str | Path,
    tasks: Sequence[str | Task] = ("facts", "chain", "copy", "reverse", "sort"),
    n: int = 100,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 128,
) -> Result:
    """Accuracy of a tiny model on `n` fresh examples of each task, one after the other; `task` is a column.

    `model` is a folder, or a model or generator with its tokenizer. Prompts of "facts" are few (200): `n` is cut to 100
    there.
    """
    if isinstance(model, (str, Path)):
        model, tokenizer = load(model)
    tokenizer = _needed(model, tokenizer)
    parts, names = [], []
    for task in [TASKS.lookup(t) if isinstance(t, str) else t for t in tasks]:
        examples = task.examples(min(n, 100) if task.name == "facts" else n, seed)
        parts.append(accuracy(model, tokenizer, examples, task.correct, batch_size=batch_size, max_new_tokens=48))
        names.append(task.name)
    return concatenate(parts, task=names)


def _needed(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None and _is_composed(model):  # which brings its own
        tokenizer = model.tokenizer
    if tokenizer is None:
        raise SurgeryError("A model in memory is evaluated with its tokenizer: pass tokenizer=.")
    return tokenizer


def _is_local(model: Any) -> bool:
    """A model or a `Decoder`, which are decoded here; anything else generates by itself."""
    from torch import nn

    return isinstance(model, nn.Module) or hasattr(model, "prefill")


def _is_composed(model: Any) -> bool:
    return hasattr(model, "prefill_encoded")


def _room(model: Any, prompts: Sequence[Any]) -> int:
    """New tokens that the longest prompt leaves room for, at most `LONGEST`."""
    if _is_composed(model):
        from surgery.logits.generate import room

        return room(model, prompts, LONGEST)
    config = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None) or getattr(model, "context", None)
    return LONGEST if context is None else max(1, min(LONGEST, context - max(map(len, prompts), default=0)))
