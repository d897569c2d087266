"""One training step three ways, for `train.py`: our `Trainer`, TRL's trainers, and bare loops over the same modules.

Each arm starts from the same random Llama and gives the CPU seconds of its steps, the first left out.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from surgery.training.engine import Trainer
from surgery.training.recipe import make

GROUP, LR = 8, 1e-4
LETTERS = [chr(0x100 + i) for i in range(200)]


@dataclass(frozen=True)
class Shape:
    """A Llama and the length of what it reads and writes."""

    prompt: int
    new: int
    d: int = 256
    layers: int = 4
    mlp: int = 688
    heads: int = 8
    kv_heads: int = 8
    vocabulary: int = 200
    tied: bool = False
    prompts: int = 8

    def model(self) -> LlamaForCausalLM:
        """Random weights, the same each time."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.d, num_hidden_layers=self.layers, intermediate_size=self.mlp,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, max_position_embeddings=1024,
            bos_token_id=None, eos_token_id=self.vocabulary, pad_token_id=0, tie_word_embeddings=self.tied,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def rows(self, n: int = 64) -> list[dict[str, str]]:
        """Random texts of these lengths in tokens, the end mark counted."""
        rng = Random(0)

        def text(length: int) -> str:
            return "".join(rng.choices(LETTERS[1:-1], k=length))

        return [{"prompt": text(self.prompt), "completion": text(self.new - 1)} for _ in range(n)]


def tokenizer(shape: Shape, objective: str = "grpo") -> PreTrainedTokenizerFast:
    """A token a letter. The end mark is the last token; for rollouts the first one that the model does not have."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    size = shape.vocabulary + (objective == "grpo")
    names = [LETTERS[i] if i < len(LETTERS) else f"<{i}>" for i in range(size - 1)] + ["<end>"]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token=names[0])


def variety(completions: list[str], **_: Any) -> list[float | None]:
    """The reward of all arms: different letters, by length."""
    return [len(set(c)) / max(1, len(c)) for c in completions]


# ---- arms: each gives the CPU seconds of its steps


def ours(shape: Shape, steps: int, objective: str = "grpo", **words: Any) -> list[float]:
    """Our trainer."""
    clock: list[float] = []
    trainer_of(shape, steps, objective, lambda *_: clock.append(time.process_time()), **words).run()
    return differences(clock)


def trainer_of(
    shape: Shape, steps: int, objective: str, on_step: Any = None, beta: float = 0.0, **words: Any
) -> Trainer:
    """With GRPO as TRL has it: lr constant, clip 1."""
    grpo = {"objective": {"grpo": {"beta": beta}}, "reward": variety} if objective == "grpo" else {"objective": "sft"}
    batch = {"rows": shape.prompts * GROUP, **words.pop("batch", {})}
    recipe = make({
        **grpo, "data": shape.rows(), "steps": steps, "batch": batch,
        "rollouts": {"prompts": shape.prompts, "group": GROUP, "max_new_tokens": shape.new},
        "optimizer": {"lr": LR, "shape": "constant"}, **words,
    })  # fmt: skip
    return Trainer(recipe, shape.model(), tokenizer(shape, objective), on_step=on_step)


def trl(shape: Shape, steps: int, objective: str = "grpo", checkpointing: bool = False) -> list[float]:
    """TRL's trainer with the same settings, generating by transformers."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    disable_progress_bars()
    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder, "use_cpu": True, "bf16": False, "gradient_checkpointing": checkpointing,
            "report_to": "none", "per_device_train_batch_size": shape.prompts * GROUP, "max_steps": steps,
            "learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
            "save_strategy": "no", "logging_steps": steps, "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip
        args: Any
        made: Any
        model, words = shape.model(), tokenizer(shape, objective)
        if objective == "grpo":
            args = GRPOConfig(
                num_generations=GROUP, max_completion_length=shape.new, beta=0.0, loss_type="grpo",
                temperature=1.0, top_p=1.0, top_k=0, **common,
            )  # fmt: skip
            made = GRPOTrainer(
                model, variety, args, Dataset.from_list(shape.rows()), processing_class=words, callbacks=[Clock()]
            )
        else:
            args = SFTConfig(completion_only_loss=True, max_length=None, **common)
            made = SFTTrainer(
                model, args, train_dataset=Dataset.from_list(shape.rows()), processing_class=words,
                callbacks=[Clock()],
            )  # fmt: skip
        made.remove_callback(PrinterCallback)
        made.train()
    return differences(clock)


def floor(shape: Shape, steps: int, objective: str = "grpo") -> list[float]:
    """The bare loop."""
    model, words, rows = shape.model(), tokenizer(shape, objective), shape.rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    order, clock = Random(0), []
    prompts = torch.tensor([words(row["prompt"])["input_ids"] for row in rows])
    demonstrations = torch.tensor(
        [words(r["prompt"] + r["completion"])["input_ids"] + [words.eos_token_id] for r in rows]
    )
    for _ in range(steps):
        if objective == "grpo":
            loss = bare_grpo(model, words, prompts[order.sample(range(len(rows)), shape.prompts)], shape.new)
        else:
            ids = demonstrations[order.sample(range(len(rows)), shape.prompts * GROUP)]
            states = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[:, shape.prompt - 1 :]
            loss = cross_entropy(model.lm_head(states).flatten(0, 1), ids[:, shape.prompt :].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.append(time.process_time())
    return differences(clock)


def bare_grpo(model: Any, words: Any, prompts: torch.Tensor, new: int) -> torch.Tensor:
    """Generation with shared prompts, and the loss with shared prompts."""
    drawn = []
    with torch.no_grad():
        cache = DynamicCache()
        logits = model(prompts, past_key_values=cache, logits_to_keep=1).logits.repeat_interleave(GROUP, 0)
        cache.batch_repeat_interleave(GROUP)
        for t in range(new):
            drawn.append(logits[:, -1].softmax(-1).multinomial(1))
            if t + 1 < new:
                logits = model(drawn[-1], past_key_values=cache).logits
    completions = torch.cat(drawn, 1)
    rewards = torch.tensor(variety(words.batch_decode(completions))).view(-1, GROUP)
    advantages = ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    cache = DynamicCache()
    first = model.model(prompts, past_key_values=cache).last_hidden_state[:, -1:].repeat_interleave(GROUP, 0)
    cache.batch_repeat_interleave(GROUP)
    rest = model.model(completions[:, :-1], past_key_values=cache).last_hidden_state
    logits = model.lm_head(torch.cat([first, rest], 1))
    log_probs = -cross_entropy(logits.flatten(0, 1), completions.flatten(), reduction="none").view_as(completions)
    return -((log_probs - log_probs.detach()).exp() * advantages).mean()


def differences(clock: list[float]) -> list[float]:
    return [b - a for a, b in zip(clock, clock[1:], strict=False)]
