"""Families of transformers that have no row in `surgery.anatomy.families`: they are found by their structure."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from activations.families import LLAMA_LIKE, POSITIONS, VOCAB
from transformers import PreTrainedModel

SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}
UNLISTED: dict[str, dict[str, Any]] = {
    "stablelm": {}, "cohere": {}, "olmo": {}, "olmo3": {}, "starcoder2": {}, "glm4": {"head_dim": 8}, "nemotron": {},
    "persimmon": {}, "exaone4": {}, "nanochat": {}, "bitnet": {}, "diffllama": {}, "biogpt": {},
    "gpt_oss": EXPERTS | {"num_local_experts": 4},
    "llama4_text": EXPERTS | {"num_local_experts": 4},
    "glm4_moe": EXPERTS | {"n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 3, "ffn_dim": 64},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": POSITIONS},
}  # fmt: skip
"""What their configuration needs beside, or in place of, Llama's."""
OWN = ("xglm", "mpt")


def build_unlisted(name: str) -> PreTrainedModel:
    """A fresh model with three blocks, width 32 and four heads, drawn as those of `families` are."""
    shared = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS} if name in OWN else LLAMA_LIKE
    return drawn(transformers.AutoConfig.for_model(name, **shared, **SPECIAL, **UNLISTED[name]))


def drawn(config: Any) -> PreTrainedModel:
    """A model of any configuration, with weights that make every norm and bias count."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / math.sqrt(32)) if parameter.dim() > 1 else parameter.add_(noise, alpha=0.2)
    return model
