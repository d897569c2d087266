"""What a model reads and how it is loaded: the common ground of everything that asks it something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.training.data import pad_id, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Progress", "Prompt", "by_length", "left_padded", "load", "no_bars", "pad_id", "prompt_ids", "untouched"]

Progress = Callable[[int, int], None]
"""Called with (examples done, examples in all) after each batch."""
Prompt = str | Sequence[Mapping[str, Any]]
"""Text, or the messages of a chat."""


def located(spec: str | Path) -> Path:
    """The folder of a model (of its base, for `base+adapter`). Raises `SurgeryError` when that is no model."""
    from surgery.checkpoint.reader import locate

    text = str(spec)
    base, plus, adapter = ("", "", text) if Path(text).exists() else text.rpartition("+")
    if plus:
        locate(adapter)
    folder = locate(base if plus else adapter)
    if not (folder / "config.json").is_file():
        raise SurgeryError(f"{folder} is not a model: it holds no config.json.",
                           hint="Give the folder of a whole model, or BASE+ADAPTER.")  # fmt: skip
    return folder


def load(spec: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, a hub name or `base+adapter`, in evaluation mode.

    Raises `SurgeryError` for what is no model or has no tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from surgery.checkpoint.adapter import AdaptedCheckpoint
    from surgery.checkpoint.reader import open_checkpoint

    folder = located(spec)
    source = open_checkpoint(spec)  # which refuses files that are cut off, in a sentence
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if isinstance(source, AdaptedCheckpoint):
            config = AutoConfig.from_pretrained(folder)
            config.update(source.config)
            kind = config.dtype if dtype == "auto" else dtype
            model = AutoModelForCausalLM.from_config(config, dtype=kind)
            missing, unknown = model.load_state_dict({n: source.read(n) for n in source.tensors}, strict=False)
            if unknown or set(missing) - set(model.all_tied_weights_keys):
                raise ValueError(f"its tensors are not the model's ({', '.join([*unknown, *missing][:3])}).")
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        told = str(error).strip().partition("\n")[0]
        raise SurgeryError(f"{spec} can't be loaded as a language model with its tokenizer: {told}") from error
    return model.eval(), tokenizer


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
