"""How much memory a run will take, before its first step: exact for what is stored, rough for what passes through.

| part | bytes |
|---|---|
| weights, reference, backbones, initial | sum over tensors, tied ones once |
| gradients | of the parameters that move; of a selection 4 bytes a number, and one dense tensor, the largest |
| moments | two of AdamW's for each of them, and a step count of 4 bytes a tensor |
| places | of a selection, 4 bytes for each number that does not move with its whole tensor |
| adapter | a LoRA's A and B |
| activations | tokens of a micro-batch x layers x (10 d_model + 4 d_ff) numbers |
| logits | 3 x completion tokens x vocabulary in float32, at most 3 x `policy.LOGITS` |
| cache | rows decoded at a time x (prompt + new tokens) x layers x 2 x key-value heads x head size |

Activations are what a Llama layer with fused attention keeps for the backward pass (measured: 3-5 % more; a GPT-2 layer
keeps 1.4 times that); with gradient checkpointing d_model numbers a layer, and one layer whole. Logits come three
times: themselves, their softmax, their gradient. The cache is there while rollouts are drawn, activations and logits
while weights are updated: the peak has the larger.
Under `fsdp2` what is stored is divided by the number of processes, rows are so under `ddp` too. Left out: torch itself,
the data, and the copy of the model that the reference is made from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from surgery.training import policy
from surgery.training.recipe import Recipe
from surgery.tuning.plan import Corda, Lora, Lottery, Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgery.training.plan import Plan

SAMPLE = 8
"""Rows of the data that are looked at for their lengths."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one process, by part."""

    weights: int
    gradients: int
    moments: int
    places: int = 0
    adapter: int = 0
    reference: int = 0
    backbones: int = 0
    initial: int = 0
    activations: int = 0
    logits: int = 0
    cache: int = 0

    @property
    def peak(self) -> int:
        """Of a step: what is stored, and the larger of sampling and updating."""
        passing = ("activations", "logits", "cache")
        stored = sum(size for name, size in asdict(self).items() if name not in passing)
        return stored + max(self.activations + self.logits, self.cache)

    def to_dict(self) -> dict[str, int]:
        """By name, the peak at the end."""
        return asdict(self) | {"peak": self.peak}

    def render(self) -> str:
        """One line: `about 12.3 MB: weights 1.8 MB, gradients 1.8 MB, ...`."""
        parts = [f"{name} {size_told(size)}" for name, size in asdict(self).items() if size]
        return f"about {size_told(self.peak)}: {', '.join(parts)}"


def estimate(
    recipe: Recipe,
    model: nn.Module,
    parts: Plan | None = None,
    *,
    prompt: int = 64,
    completion: int = 64,
    backbones: Iterable[nn.Module] = (),
    processes: int = 1,
) -> Memory:
    """What a run of `recipe` on `model` takes on each of `processes`; a model on the meta device will do.

    `prompt` and `completion` are tokens of the longest rows (`lengths` measures them); where rollouts are drawn,
    `rollouts.max_new_tokens` stands for `completion`.
    """
    from surgery.training.plan import plan as planned

    parts = parts or planned(recipe)
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    shards = processes if recipe.parallel == "fsdp2" else 1
    weights = _bytes((*model.parameters(), *model.buffers()))
    moved = moves(recipe, parts.tuning, model)
    batch, drawn = recipe.batch, recipe.rollouts
    kinds = parts.objective.kind.split("+")
    draws = "rollouts" in kinds or getattr(parts.source, "samples", False)
    rows = {kind: batch.rows * (2 if kind == "pairs" else 1) for kind in kinds}
    if "rollouts" in rows:
        rows["rollouts"] = math.ceil(drawn.prompts / batch.minibatches) * drawn.group
    largest = math.ceil(max(rows.values()) / processes)
    largest = min(batch.micro_batch, largest) if batch.micro_batch else largest
    completion = drawn.max_new_tokens if draws else completion
    item = next(model.parameters()).element_size() if recipe.precision == "float32" else 2
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    layer, layers = 10 * width + 4 * inner, config.num_hidden_layers
    kept = layers * width + layer if recipe.gradient_checkpointing else layers * layer
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    decoded = min(drawn.batch_size, math.ceil(drawn.prompts / processes) * drawn.group)
    return Memory(
        weights=weights // shards,
        gradients=moved.gradients // shards,
        moments=(moved.moments + 4 * moved.tensors * shards) // shards,
        places=moved.places,
        adapter=moved.adapter,
        reference=weights // shards if parts.objective.uses_reference else 0,
        backbones=sum(_bytes((*b.parameters(), *b.buffers())) for b in backbones) // shards,
        initial=weights if getattr(parts.source, "restarts", False) else 0,
        activations=largest * (prompt + completion) * kept * item,
        logits=3 * 4 * min(largest * completion * config.vocab_size, policy.LOGITS),
        cache=decoded * (prompt + completion) * layers * 2 * heads * head * item if draws else 0,
    )


@dataclass(frozen=True)
class Moved:
    """What moves: how many numbers, and the bytes beside the weights."""

    numbers: int
    gradients: int
    moments: int
    places: int = 0
    adapter: int = 0
    tensors: int = 0
    """Of which each has a step count."""


def moves(recipe: Recipe, tuning: Tuning | None, model: nn.Module) -> Moved:
    """What a run moves, from shapes; a model on the meta device will do, but for a threshold (SaRA's)."""
    if isinstance(tuning, Lora | Corda) and not hasattr(model, "peft_config"):
        from surgery.tuning.decomposed import lora_size, projections

        count, tensors = lora_size(model, tuning.rank, tuning.modules), 2 * len(projections(model, tuning.modules))
        return Moved(count, 4 * count, 8 * count, adapter=4 * count, tensors=tensors)
    parameters = {n: p for n, p in model.named_parameters() if recipe.moves(n, p.requires_grad)}
    if tuning is None or isinstance(tuning, Lora | Corda | Lottery):  # a lottery's first run moves everything
        trained = _bytes(parameters.values())
        return Moved(sum(p.numel() for p in parameters.values()), trained, 2 * trained, tensors=len(parameters))
    found = tuning.expected(model)
    return Moved(found.moving, 4 * (found.moving + found.largest), 8 * found.moving, 4 * found.placed)


def lengths(recipe: Recipe, parts: Plan, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The longest prompt and the longest completion, in tokens, of the first `SAMPLE` rows."""
    from surgery.models import prompt_ids
    from surgery.training.data import completion_ids

    rows = [r.row(i) for r in parts.rows.values() for i in range(int(min(SAMPLE, r.size)))]
    prompts = [len(prompt_ids(tokenizer, row["prompt"], recipe.chat)) for row in rows]
    texts = [str(row[key]) for row in rows for key in ("completion", "chosen", "rejected") if key in row]
    longest = max((len(completion_ids(tokenizer, text)) for text in texts), default=0)
    if recipe.batch.max_length:
        return min(max(prompts), recipe.batch.max_length), min(longest, recipe.batch.max_length)
    return max(prompts), longest


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def size_told(count: int) -> str:
    """1_790_000 -> "1.79 MB"."""
    power = min(4, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
