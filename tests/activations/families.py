"""Tiny random causal LMs of every family, and pairs of prompts for them: `from activations.families import build`.

Three blocks, width 32, four heads (two key/value heads where they are grouped), 60 tokens, 64 positions. Weights are
drawn anew so that scores, patterns and updates are of order one and every bias and norm weight says something: what a
test compares is far above rounding. Token 0 is the padding; no model stops by itself in generation.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCAB = 60
POSITIONS = 64
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
GPT_LIKE: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS}
FALCON_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def _config(kind: str, *shared: dict[str, Any], **own: Any) -> transformers.PreTrainedConfig:
    """The configuration class `<kind>Config`; what is named later goes before what is shared."""
    arguments: dict[str, Any] = functools.reduce(lambda a, b: a | b, shared, {})
    return getattr(transformers, f"{kind}Config")(**(TOKENS | arguments | own))


def _llama(kind: str, **own: Any) -> transformers.PreTrainedConfig:
    return _config(kind, LLAMA_LIKE, **own)


def _neox(parallel: bool) -> transformers.PreTrainedConfig:
    own = {"intermediate_size": 64, "use_parallel_residual": parallel, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    shared = {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}
    return _config("GPTNeoX", shared, own)


CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "gpt2": lambda: _config("GPT2", GPT_LIKE, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": lambda: _neox(parallel=True),
    "gpt_neox_sequential": lambda: _neox(parallel=False),
    "gptj": lambda: _config("GPTJ", GPT_LIKE, rotary_dim=4),
    "opt": lambda: _config("OPT", LLAMA_LIKE, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
    "llama": lambda: _llama("Llama", num_key_value_heads=4),
    "llama_gqa": lambda: _llama("Llama"),
    "mistral": lambda: _llama("Mistral", sliding_window=4),
    "qwen2": lambda: _llama("Qwen2"),
    "qwen3": lambda: _llama("Qwen3", head_dim=8),
    "gemma2": lambda: _llama(
        "Gemma2",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3_text": lambda: _llama(
        "Gemma3Text",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "phi": lambda: _llama("Phi", num_key_value_heads=4),
    "phi3": lambda: _llama("Phi3", original_max_position_embeddings=POSITIONS),
    "falcon": lambda: _config("Falcon", FALCON_LIKE, multi_query=True, parallel_attn=True),
    "falcon_new": lambda: _config("Falcon", FALCON_LIKE, new_decoder_architecture=True, num_kv_heads=2),
    "falcon_alibi": lambda: _config(
        "Falcon", FALCON_LIKE, alibi=True, parallel_attn=False, multi_query=False, bias=True
    ),
    "bloom": lambda: _config("Bloom", vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4),
    "olmo2": lambda: _llama("Olmo2"),
    "mixtral": lambda: _llama("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen2_moe": lambda: _llama("Qwen2Moe", shared_expert_intermediate_size=24, **EXPERTS),
    "qwen3_moe": lambda: _llama("Qwen3Moe", head_dim=8, **EXPERTS),
}
"""The configuration of every family."""

PARALLEL = frozenset({"gpt_neox", "gptj", "phi", "falcon", "falcon_new"})
"""Families whose attention and MLP read the same stream: they have no `resid_mid`."""

EAGER_ONLY = frozenset({"gemma2", "bloom"})
"""Families that transformers runs with eager attention only."""


def build(name: str, attn: str = "sdpa", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh model of a family (tests may change it), in eval mode; the same weights for the same seed.

    Families of `EAGER_ONLY` are eager whatever `attn` says. Eager and sdpa agree, but for falcon_alibi: there the eager
    attention of transformers 5.24 adds the bias twice (0.2 apart in logits of order one).
    """
    attn = "eager" if name in EAGER_ONLY else attn
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attn)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:  # order one in, order one out; embeddings are of order 1/6
                parameter.copy_(noise / math.sqrt(32))
            else:  # biases lie around 0, norm weights around 1 (Gemma's around 0: it adds the 1 itself)
                parameter.add_(noise, alpha=0.2)
    return model.to(dtype).eval()


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {name: functools.partial(build, name) for name in CONFIGS}
"""A builder for every family: `FAMILIES["gpt2"]()`, `FAMILIES["gpt2"](attn="eager")`."""


def tuned(model: PreTrainedModel, seed: int = 1, size: float = 0.05) -> PreTrainedModel:
    """A deep copy with noise of standard deviation `size` on every matrix: a fine-tuning of the model."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=size)
    return other


def prompts(
    n: int = 4, length: int = 9, vocab: int = VOCAB, first_difference: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean ids and corrupt ids (n, length), and answers (n, 2): the clean answer, the corrupt one, always two tokens.

    Rows agree before `first_difference` and differ there; the last position agrees, as a question's last token does.
    """
    generator = torch.Generator().manual_seed(seed)

    def other_than(token: Tensor) -> Tensor:
        """A token that is neither the given one nor special (0, 1)."""
        step = torch.randint(1, vocab - 2, token.shape, generator=generator)
        return 2 + (token - 2 + step) % (vocab - 2)

    clean = torch.randint(2, vocab, (n, length), generator=generator)
    corrupt = clean.clone()
    corrupt[:, first_difference] = other_than(clean[:, first_difference])
    if length - first_difference > 3:  # one more, so that several positions carry the difference
        corrupt[:, first_difference + 2] = other_than(clean[:, first_difference + 2])
    answer = torch.randint(2, vocab, (n,), generator=generator)
    return clean, corrupt, torch.stack([answer, other_than(answer)], dim=1)
