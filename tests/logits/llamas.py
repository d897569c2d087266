"""Random tiny models with strong opinions, which share one tokenizer, and prompts for them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

WORDS = [*"abcdefghijklmnopqrstuvwxyz0123456789+-=;# "]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [20], [30, 31]]
"""Of different lengths: a batch of them is padded."""


@lru_cache
def tokenizer(chat: bool = False) -> Any:
    """45 tokens: <pad>, <bos>, <eos> and characters; with a chat template when asked."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<bos>", "<eos>", *WORDS]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), "isolated")
    words.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    if chat:
        found.chat_template = (
            "{% for m in messages %}<bos>{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}#{% endif %}"
        )
    return found


def llama(seed: int = 0, *, hidden: int = 16, layers: int = 2, vocab: int = 45, **more: Any) -> Any:
    """A random Llama with two heads whose next-token distributions are far from flat."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    words = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.4,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**words | more)).eval()


def widened(model: Any, rows: int) -> Any:
    """The same model with an embedding padded by `rows` rows that would win every draw."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**model.config.to_dict() | {"vocab_size": model.config.vocab_size + rows})
    wide = LlamaForCausalLM(config).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.full((rows, state[name].shape[1]), 3.0)])
    wide.load_state_dict(state)
    return wide


@torch.no_grad()
def recomputed(terms: list[tuple[Any, float, list[int]]], new: int, ends: tuple[int, ...] = (2,)) -> list[int]:
    """Greedy tokens of sum_m w_m * logits_m, each model reading its whole prompt anew at every step."""
    ids: list[int] = []
    for _ in range(new):
        total = sum(w * model(torch.tensor([prompt + ids])).logits[0, -1].float() for model, w, prompt in terms)
        ids.append(int(total.argmax()))
        if ids[-1] in ends:
            break
    return ids
