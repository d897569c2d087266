"""A random two-layer Llama, its tokenizer, batches of every kind, and a context without an engine."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from surgery.training import data
from surgery.training.batch import Batch
from surgery.training.objectives import Objective
from surgery.training.policy import Policy

LETTERS = "abcdefgh"
PAD, EOS = len(LETTERS), len(LETTERS) + 1
VOCABULARY = len(LETTERS) + 3
"""Letters, padding, end mark, and one row of the embedding that the tokenizer doesn't use."""


def llama(*, layers: int = 2, d: int = 16, vocabulary: int = VOCABULARY, seed: int = 0, dtype=torch.float64, **more):
    """A Llama with weights large enough for opinions, and float64 throughout (its own norms go through float32)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=d, intermediate_size=2 * d, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
        pad_token_id=None, eos_token_id=min(EOS, vocabulary - 1), bos_token_id=None, **more,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, torch.nn.RMSNorm(d, eps=config.rms_norm_eps))
    return model.to(dtype)


def tokenizer(letters: str = LETTERS, pad: str | None = "<pad>", eos: str = "</s>"):
    """One token a letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*letters, *([pad] if pad else []), *([] if eos in letters else [eos])]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, eos_token=eos)


class Desk:
    """What `prepare` asks of the engine, in a few lines."""

    def __init__(self, policy: Policy, reference: Policy | None = None) -> None:
        self.policy, self.reference, self.tokenizer = policy, reference, tokenizer()
        self.noted: dict[str, float] = {}
        self.passes = 0

    def seed(self, name: str, index: int = 0) -> int:
        return int.from_bytes(hashlib.blake2b(f"{name}/{index}".encode(), digest_size=7).digest(), "little")

    def encode(self, rows: list[dict[str, Any]], kind: str = "demonstrations") -> Batch:
        return (data.pairs if kind == "pairs" else data.demonstrations)(rows, self.tokenizer)

    def scores(self, batch: Batch, policy: Policy | None = None, **asks: bool) -> dict[str, Tensor]:
        self.passes += 1
        with torch.no_grad():
            return {k: v for k, v in vars((policy or self.policy)(batch, **asks)).items() if v is not None}

    def reference_log_probs(self, batch: Batch) -> Tensor:
        assert self.reference is not None
        return self.scores(batch, self.reference)["log_probs"]


def text(*key: int, at_least: int = 1, at_most: int = 6) -> str:
    """Letters that follow from the key."""
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    length = int(torch.randint(at_least, at_most + 1, (), generator=generator))
    return "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (length,), generator=generator).tolist())


def batch_of(kind: str = "rollouts", *, rows: int = 8, group: int = 4, seed: int = 0, equal: int = 0) -> Batch:
    """Ragged rows of a kind, with rewards for rollouts; completions of `equal` tokens when it is given."""
    lengths = {"at_least": equal, "at_most": equal} if equal else {}
    if kind == "rollouts":
        generator = torch.Generator().manual_seed(seed)
        prompts = [[LETTERS.index(c) for c in text(seed, i // group)] for i in range(rows)]
        answers = [[LETTERS.index(c) for c in text(seed, 99, i, **lengths)] for i in range(rows)]
        answers = answers if equal else [a[:-1] + [EOS] if i % 3 else a for i, a in enumerate(answers)]
        batch = Batch.of(prompts, answers, pad=PAD, group=group, max_new_tokens=6)
        batch["reward"] = torch.rand(rows, generator=generator, dtype=torch.float64).round(decimals=2)
        batch["truncated"] = torch.tensor([a[-1] != EOS for a in answers])
        return batch
    table = [{"prompt": text(seed, i), "completion": text(seed, 7, i, **lengths)} for i in range(rows)]
    if kind == "pairs":
        told = {"chosen": 8, "rejected": 9, "rationale": 10}
        table = [
            {"prompt": text(seed, i)} | {k: text(seed, v, i, **lengths) for k, v in told.items()} for i in range(rows)
        ]
    return (data.pairs if kind == "pairs" else data.demonstrations)(table, tokenizer()).with_totals()


def prepared(objective: Objective, *, batch: Batch | None = None, seed: int = 0, step: int = 50, **model: Any):
    """(policy, batch, desk): the policy has moved a little from the reference and from where the batch was drawn."""
    policy = Policy(llama(seed=seed, **model))
    policy.extras.update(objective.modules(policy))
    for p in policy.extras.parameters():
        torch.nn.init.normal_(p, std=0.3)
    desk = Desk(policy, policy.snapshot() if objective.uses_reference else None)
    batch = batch_of(objective.kind, seed=seed) if batch is None else batch
    batch.step, batch.steps = step, 100
    moved(policy, 0.02, seed + 1)
    if batch.kind == "rollouts":
        batch["old_log_probs"] = desk.scores(batch)["log_probs"]
    objective.prepare(batch, desk)  # type: ignore[arg-type]
    moved(policy, 0.03, seed + 2)
    return policy, batch.with_totals(), desk


def moved(policy: Policy, size: float, seed: int) -> None:
    """Adds noise to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p += size * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def gradient(objective: Objective, policy: Policy, *batches: Batch) -> Tensor:
    """All parameters' gradients of the summed losses, as one vector."""
    policy.zero_grad()
    for batch in batches:
        objective.loss(policy, batch).value.backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.parameters()])
