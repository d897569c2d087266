"""What tests of the engine share: models of two layers, a character tokenizer, a few rows."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TIMES = ("seconds", "tokens_per_second")
"""Metrics that differ from run to run."""


@lru_cache
def tokenizer() -> Any:
    """45 tokens: <pad>, <bos>, <eos> and characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<bos>", "<eos>", *"0123456789+-=;#abcdefghijklmnopqrstuvwxyz "]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def llama(seed: int = 0, *, hidden: int = 16, layers: int = 2, **more: Any) -> Any:
    """A random Llama with two heads of `hidden / 2`, from `seed`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    words = {
        "vocab_size": 45, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**words | more))


def demonstrations(count: int = 12) -> list[dict[str, Any]]:
    """Rows with completions of different lengths."""
    return [{"prompt": f"c {'abc'[: i % 3 + 1]}=", "completion": f"#{'ab' * (i % 4 + 1)}"} for i in range(count)]


def pairs(count: int = 12) -> list[dict[str, Any]]:
    """Rows with a better and a worse completion."""
    return [
        {"prompt": f"c {'abc'[: i % 3 + 1]}=", "chosen": "#" + "ab" * (i % 3 + 1), "rejected": "#b"}
        for i in range(count)
    ]


def many_letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that random models get in different amounts: the share of letters before m."""
    return [sum("a" <= c < "m" for c in text) / max(1, len(text)) for text in completions]


def metrics(folder: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
