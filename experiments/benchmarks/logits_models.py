"""The models of `logits.py`: the tiny family; SmolLM2-135M-Instruct, two fine-tunings and a smaller pair of it.

No smaller model has SmolLM2's tokenizer, so one is made: 20 of its 30 layers, those in the middle left out, which learn
to say what the whole model says of its own answers to SVAMP's problems (KL of next tokens, `CUT`); and a fine-tuning of
that on SVAMP's solutions (`TUNED`). Some ten CPU minutes, once: the models stay in the cache. (Its first six layers and
its last two, taught on the solutions, spoke no sentence: of their drafts three in ten were kept.)
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from finetune_smollm2 import batches, cached, finetune, rows

from surgery.decoding import Sampling
from surgery.logits import Ensemble, generate, member
from surgery.models import load
from surgery.tasks import TASKS, svamp
from surgery.zoo import cache_dir, get

TINY, REAL = "tiny family", "SmolLM2-135M"
FINE_TUNINGS: tuple[dict[str, Any], ...] = (
    {"data": "gsm8k", "steps": 40, "size": 8, "lr": 5e-5, "seed": 0, "longest": 160},
    {"data": "svamp", "steps": 24, "size": 8, "lr": 5e-5, "seed": 0, "longest": 120},
)
CUT: dict[str, Any] = {
    "layers": [*range(10), *range(20, 30)], "prompts": 320, "new": 48, "steps": 80, "size": 8, "lr": 2e-4, "seed": 0,
}  # fmt: skip
TUNED: dict[str, Any] = {"steps": 24, "size": 8, "lr": 5e-5, "seed": 0}


@dataclass
class Case:
    """Three models of one tokenizer, an ensemble of them, which of them drafts, and prompts that it answers."""

    name: str
    three: list[Ensemble]
    ensemble: Ensemble
    draft: Ensemble
    prompts: list[Any]

    @property
    def large(self) -> Ensemble:
        return self.three[0]

    @property
    def label(self) -> str:
        return f"{self.name}: {self.ensemble}"


def case(name: str, *, ends: bool = False, drafts: bool = False, dtype: str = "bfloat16") -> Case:
    """The tiny family, or SmolLM2 with its two fine-tunings; with `drafts`, with its small pair.

    Without `ends` no model has an end-of-sequence token: texts are as long as they may. Raises `SurgeryError` where
    models or data are missing.
    """
    names = ("large", "tuned", "small") if name == TINY or drafts else ("base", "gsm8k", "svamp")
    if name == TINY:
        folders: list[Any] = ["tiny-base", "tiny-small-chain", "tiny-small-base"]
        prompts: list[Any] = [e.prompt for e in TASKS["chain"].examples(24, 7)]
        dtype = "float32"
    else:
        folders = [get("smollm2"), *((pair()[::-1]) if drafts else map(cached, FINE_TUNINGS))]
        count = 10 if drafts else 4  # the pair gives short answers
        prompts = [[{"role": "user", "content": e.prompt}] for e in svamp("test", count)] if ends else []
    models = [load(folder, dtype) for folder in folders]
    tokenizer = models[0][1]
    if not ends:
        tokenizer.eos_token = None
    three = [
        member(endless(model) if not ends else model, tokenizer, name=word)
        for (model, _), word in zip(models, names, strict=True)
    ]
    large, tuned, small = three
    equals = names[0] == "base"
    return Case(name, three, large + (0.5 if equals else 1.0) * (tuned - small), large if equals else tuned, prompts)


def endless(model: Any) -> Any:
    """The model, which no token ends."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def ids_of(subject: Case, rows: int, length: int) -> list[list[int]]:
    """Random prompts, the same every time."""
    generator = torch.Generator().manual_seed(1)
    top = min(subject.ensemble.vocabulary, 40_000)
    return torch.randint(top // 8, top, (rows, length), generator=generator).tolist()


def pair() -> tuple[Path, Path]:
    """Folders of the small base and its fine-tuning, made when they are not in the cache."""
    name = hashlib.sha256(json.dumps([CUT, TUNED], sort_keys=True).encode()).hexdigest()[:8]
    small, tuned = (cache_dir() / f"smollm2-cut{part}-{name}" for part in ("", "-svamp"))
    if not (small.is_dir() and tuned.is_dir()):
        teacher, tokenizer = load(get("smollm2"))
        began = time.process_time()
        model, data = cut(teacher, CUT["layers"]), answers(teacher, tokenizer)
        losses = distil(teacher, model, data, CUT["steps"], CUT["size"], CUT["lr"], CUT["seed"])
        save(model, tokenizer, small, {"recipe": CUT, "kl": losses, "cpu_seconds": time.process_time() - began})
        began = time.process_time()
        losses = finetune(model, rows(tokenizer, svamp("train"), 120), name=tuned.name, **TUNED)
        save(model, tokenizer, tuned, {"recipe": TUNED, "losses": losses, "cpu_seconds": time.process_time() - began})
    return small, tuned


def answers(model: Any, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) ids: what the model says to SVAMP's problems at temperature 1."""
    prompts = [[{"role": "user", "content": e.prompt}] for e in svamp("train", CUT["prompts"])]
    found = generate(member(model, tokenizer), prompts, sampling=Sampling(CUT["new"], batch_size=40))
    return [(one.prompt_ids, one.completion_ids) for one in found]


def cut(model: Any, layers: list[int]) -> Any:
    """A copy with some of the layers."""
    small = copy.deepcopy(model)
    small.model.layers = nn.ModuleList(small.model.layers[i] for i in layers)
    small.config.num_hidden_layers = len(layers)
    for i, layer in enumerate(small.model.layers):
        layer.self_attn.layer_idx = i
    return small


def distil(teacher: Any, model: Any, data: list, steps: int, size: int, lr: float, seed: int) -> list[float]:
    """AdamW on a float32 copy of the weights against KL(teacher || model) of responses; warm-up, then down to 0."""
    weights = list(model.parameters())
    masters = [p.detach().float() for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    losses = []
    model.train()
    for step, batch in enumerate(batches(data, steps, size, Random(seed))):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        loss = divergence(teacher, model, batch)
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        losses.append(loss.item())
        if (step + 1) % 10 == 0:
            print(f"cut: step {step + 1}, KL {sum(losses[-10:]) / 10:.3f}", flush=True)
    model.eval()
    return losses


def divergence(teacher: Any, model: Any, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean KL(teacher || model), nats a response token."""
    width = max(len(p) + len(r) for p, r in batch)
    ids = torch.tensor([[*p, *r] + [0] * (width - len(p) - len(r)) for p, r in batch])
    mask = torch.tensor([[1] * (len(p) + len(r)) + [0] * (width - len(p) - len(r)) for p, r in batch])
    told = torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, r) in enumerate(batch):
        told[i, len(p) - 1 : len(p) + len(r) - 1] = True

    def log_probs(one: Any) -> torch.Tensor:
        hidden = one.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[told]
        return one.get_output_embeddings()(hidden).float().log_softmax(-1)

    with torch.no_grad():
        wanted = log_probs(teacher)
    return (wanted.exp() * (wanted - log_probs(model))).sum(-1).mean()


def save(model: Any, tokenizer: Any, folder: Path, said: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "training.json").write_text(json.dumps(said) + "\n", encoding="utf-8")
    os.replace(temporary, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*pair(), sep="\n")
