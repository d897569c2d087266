"""A larger Llama with the distribution of a smaller one: what is borrowed from a pair by it is known exactly.

EFT with a large model L and a pair (T, S) gives T itself when L says what S says. So every step of the path (two sizes,
two widths, two depths, padded rows of vocabulary, caches in step) can be held against a plain fine-tuning.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.decoding import Sampling
from surgery.logits import Ensemble, generate, log_likelihood, rules


def upscaled(model: Any, *, layers: int = 10, rows: int = 128, seed: int = 0) -> Any:
    """A larger Llama that says the same: every neuron twice and half as loud, `layers` more that add nothing.

    Its vocabulary has `rows` more rows of noise behind the tokens, as padded checkpoints have.
    """
    config = copy.deepcopy(model.config)
    config.intermediate_size *= 2
    config.num_hidden_layers += layers
    config.vocab_size += rows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        large = type(model)(config).to(model.dtype).eval()
    old, new = model.model.layers, large.model.layers
    places = torch.linspace(0, len(new) - 1, len(old)).round().long().tolist()
    with torch.no_grad():
        for layer in new:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for place, layer in zip(places, old, strict=True):
            new[place].load_state_dict({name: _wider(name, weight) for name, weight in layer.state_dict().items()})
        large.model.norm.load_state_dict(model.model.norm.state_dict())
        for ours, theirs in ((large.get_input_embeddings(), model.get_input_embeddings()),
                             (large.get_output_embeddings(), model.get_output_embeddings())):  # fmt: skip
            ours.weight[: theirs.weight.shape[0]] = theirs.weight
    return large


def _wider(name: str, weight: Tensor) -> Tensor:
    if "gate_proj" in name or "up_proj" in name:
        return torch.cat([weight, weight])
    return torch.cat([weight, weight], 1) / 2 if "down_proj" in name else weight


def borrowed(
    large: Ensemble, tuned: Ensemble, small: Ensemble, prompts: Sequence[Sequence[int]], answers: Sequence[str]
) -> dict[str, Any]:
    """How far large + (tuned - small) is from tuned, the large model saying what the small one says.

    By token of given answers, in millionths of a nat, and in greedy texts of at most 32 tokens.
    """
    both = rules.eft(large, tuned, small), tuned
    ours, theirs = (np.concatenate([one.log_probs for one in log_likelihood(e, prompts, answers)]) for e in both)
    texts = [[o.completion_ids for o in generate(e, prompts, sampling=Sampling(32, temperature=0.0))] for e in both]
    same = sum(a == b for a, b in zip(*texts, strict=True))
    return {"scored": len(ours), "micronats apart": 1e6 * float(abs(ours - theirs).max()), "texts": len(prompts),
            "same": same, "tokens": sum(map(len, texts[0]))}  # fmt: skip


def count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())
