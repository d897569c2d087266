"""What a model reads and how it is loaded: the common ground of everything that asks it something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called with (examples done, examples in all) after each batch."""
Prompt = str | Sequence[Mapping[str, Any]]
"""Text, or the messages of a chat."""


def load(spec: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, a hub name or `base+adapter`, in evaluation mode.

    Raises `SurgeryError` for what is no model or has no tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from surgery.checkpoint.adapter import AdaptedCheckpoint
    from surgery.checkpoint.reader import locate, open_checkpoint

    source = open_checkpoint(spec) if "+" in str(spec) else None
    adapted = isinstance(source, AdaptedCheckpoint)
    folder = source.base.path if isinstance(source, AdaptedCheckpoint) else locate(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if source is not None and adapted:
            config = AutoConfig.from_pretrained(folder)
            config.update(source.config)
            state = {name: source.read(name) for name in source.tensors}
            kind = config.dtype if dtype == "auto" else dtype
            no_folder: Any = None
            model = AutoModelForCausalLM.from_pretrained(no_folder, config=config, state_dict=state, dtype=kind)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        told = str(error).strip().partition("\n")[0]
        raise SurgeryError(f"{spec} can't be loaded as a language model with its tokenizer: {told}") from error
    return model.eval(), tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool = False) -> list[int]:
    """The prompt's tokens as the model expects them: inside the chat template, or with the tokenizer's own first
    tokens.

    Messages are always put into the template. A tokenizer that adds an end mark to whatever it reads would end the
    prompt: the mark is taken off. Raises `SurgeryError` when there is no template.
    """
    if chat or not isinstance(prompt, str):
        if not getattr(tokenizer, "chat_template", None):
            raise SurgeryError("This tokenizer has no chat template.", hint="Evaluate it without chat.")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
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


def by_length(rows: Sequence[Sequence[int]], size: int, progress: Progress | None = None) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
        if progress:
            progress(min(start + size, len(order)), len(order))


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


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the bars of transformers meanwhile; its setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
