"""What the benchmark of sparse tuning compares: ways to train one small Llama, each with a model of its own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from time import process_time
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from surgery.tuning import Selection, SparseAdamW, select
from surgery.tuning.decomposed import lora, lora_rank_for, projections
from surgery.tuning.selection import Slice

DENSITY, RANK, LR = 0.05, 32, 1e-4


@dataclass(frozen=True)
class Shape:
    """Of the model: 4 layers of width 768 and inner width 2,112 have 28,901,376 numbers in linear layers."""

    layers: int = 4
    width: int = 768
    inner: int = 2112
    heads: int = 12
    vocabulary: int = 1000

    def model(self) -> Any:
        """Random weights, the same each time."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            tie_word_embeddings=True, max_position_embeddings=2048, use_cache=False,
        )).train()  # fmt: skip

    def ids(self, rows: int, length: int) -> Tensor:
        """The same text each time."""
        return torch.randint(0, self.vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


@dataclass(eq=False)
class Arm:
    """A model and what moves it: `backward` and `update` make a step."""

    model: Any
    optimizer: torch.optim.Optimizer
    trained: int
    """How many numbers it trains."""
    index: Sequence[Tensor] = ()
    """Tensors that say which."""
    masks: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """What dense gradients are multiplied by."""

    def loss(self, ids: Tensor) -> Tensor:
        """Next-token cross-entropy."""
        return self.model(input_ids=ids, labels=ids).loss

    def update(self) -> None:
        """Everything after the backward pass."""
        for parameter, mask in self.masks.items():
            assert parameter.grad is not None
            parameter.grad *= mask
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, ids: Tensor) -> None:
        """All of it."""
        self.loss(ids).backward()
        self.update()

    def _index(self) -> list[Tensor]:
        if not isinstance(self.optimizer, Timed):
            return list(self.index)
        places = [bank.places for bank in self.optimizer.banks]
        parts = [p.index if isinstance(p, Slice) else p for p in self.optimizer.selection.places.values()]
        return list({t.data_ptr(): t for t in [*places, *parts] if t is not None}.values())

    def bytes(self) -> dict[str, float]:
        """Of state and of index, for each number that is trained; after a step."""
        states = [v for k, state in self.optimizer.state.items() if isinstance(k, Tensor) for v in state.values()]
        held = [t for t in states if isinstance(t, Tensor) and t.numel() > 1 and not _is_index(t)]
        index = [*self._index(), *(t for t in states if isinstance(t, Tensor) and t.numel() > 1 and _is_index(t))]
        return {"state": _bytes(held) / self.trained, "index": _bytes(index) / self.trained}


def _is_index(tensor: Tensor) -> bool:
    return not tensor.is_floating_point()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ---- the arms


def whole(shape: Shape, fused: bool | None, lift: Path | None = None) -> Arm:
    """AdamW over all weights."""
    model = shape.model()
    return Arm(model, adamw(model.parameters(), fused), sum(p.numel() for p in model.parameters()))


def adamw(parameters: Iterable[nn.Parameter], fused: bool | None = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=LR, weight_decay=0.0, fused=fused)


def masked(shape: Shape, lift: Path | None = None) -> Arm:
    """LT-SFT's way: dense AdamW, gradients multiplied by a boolean mask; here the same mask as ours."""
    model = shape.model()
    chosen = chosen_of(shape)
    frozen(model, chosen)
    masks = {model.get_parameter(name): mask for name, mask in chosen.masks().items()}
    return Arm(model, adamw(masks), chosen.count, list(masks.values()), masks)


def ours(shape: Shape, lift: Path | None = None, blocks: bool = True) -> Arm:
    """`SparseAdamW` on LIFT's mask: gradients by blocks of rows in the backward pass, or by hooks on the parameters."""
    model = shape.model()
    return sparse(model, chosen_of(shape), blocks)


def slices(shape: Shape, lift: Path | None = None) -> Arm:
    """`SparseAdamW` on S2FT's heads and channels, as many numbers."""
    model = shape.model()
    return sparse(model, select(model, "s2ft", count=chosen_of(shape).count))


class Timed(SparseAdamW):
    """`SparseAdamW` that knows how long its hooks took to gather chosen gradients."""

    spent = 0.0

    def _gather(self, *args: Any) -> None:
        began = process_time()
        super()._gather(*args)
        self.spent += process_time() - began


def sparse(model: Any, chosen: Selection, blocks: bool = True) -> Arm:
    return Arm(model, Timed(model, chosen, lr=LR, blocks=blocks), chosen.count)


def half(shape: Shape, lift: Path | None = None) -> Arm:
    """HFT by categories: AdamW, fused, over half of the tensors; the others ask for no gradients."""
    model = shape.model()
    chosen = select(model, "half", level="category", seed=0)
    frozen(model, chosen)
    return Arm(model, adamw(model.get_parameter(name) for name in chosen), chosen.count)


def adapter(shape: Shape, kind: str, lift: Path | None = None) -> Arm:
    """PEFT's LoRA, SHiRA (both of the rank nearest to as many numbers) or Super-Tuning, AdamW fused."""
    import peft

    model = shape.model()
    rank = lora_rank_for(model, chosen_of(shape).count)
    names = list(projections(model))
    if kind == "lora":
        tuned: Any = lora(model, rank=rank)
    elif kind == "shira":
        config = peft.ShiraConfig(r=rank, mask_type="random", random_seed=0, target_modules=names)
        tuned = peft.get_peft_model(model, config)
    else:
        tuned = peft.get_peft_model(model, peft.SupertuningConfig(sparsity=1 - DENSITY, target_modules=names))
    moving = [p for p in tuned.parameters() if p.requires_grad]
    return Arm(tuned, adamw(moving), sum(p.numel() for p in moving), _indices(tuned))


def _indices(tuned: nn.Module) -> list[Tensor]:
    """The integer tensors that PEFT's layers keep beside their values."""
    found: dict[int, Tensor] = {}
    for module in tuned.modules():
        for name, held in vars(module).items():
            if "indices" in name and hasattr(held, "items"):
                found |= {id(t): t for _, t in held.items() if isinstance(t, Tensor)}
        for buffer in module.buffers(recurse=False):
            if _is_index(buffer) and buffer.numel() > 1:
                found[id(buffer)] = buffer
    return list({t.data_ptr(): t for t in found.values()}.values())


def published(shape: Shape, lift: Path | None = None) -> Arm:
    """LIFT's own optimizer on the same mask as ours; `lift` is a folder with its `sparseAdam.py`.

    Its masks of type "lift" ask for CUDA, so that it is made with random ones, which are then replaced. A step is the
    same code for all its sparse types.
    """
    assert lift is not None
    model, chosen = shape.model(), chosen_of(shape)
    frozen(model, chosen)
    weights = {name: model.get_parameter(name) for name in chosen}
    group = {"params": list(weights.values()), "rank": 1, "filter_rank": RANK, "update_proj_gap": 10**9}
    optimizer = imported(lift).SparseAdamW(
        [group], lr=LR, betas=(0.9, 0.999), mask_type="random_sparse", no_deprecation_warning=True
    )
    masks = chosen.masks()
    for name, weight in weights.items():
        optimizer.state[weight]["mask"] = masks[name]
    return Arm(model, optimizer, chosen.count)


def imported(folder: Path) -> ModuleType:
    """`sparseAdam.py` of `folder`, or of its `src`."""
    file = next((f for f in (folder / "sparseAdam.py", folder / "src" / "sparseAdam.py") if f.is_file()), None)
    if file is None:
        sys.exit(f"There is no sparseAdam.py in {folder}.")
    spec = importlib.util.spec_from_file_location("lift_published", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def frozen(model: nn.Module, chosen: Selection) -> None:
    """Gradients only of what is chosen."""
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)


@lru_cache(maxsize=1)
def chosen_of(shape: Shape) -> Selection:
    """LIFT's mask of the model; made once."""
    return select(shape.model(), "lift", density=DENSITY, rank=min(RANK, shape.width // 2))


def _with(make: Callable[..., Arm], **more: Any) -> Callable[[Shape, Path | None], Arm]:
    return lambda shape, lift: make(shape, lift=lift, **more)


ARMS: dict[str, Callable[[Shape, Path | None], Arm]] = {
    "AdamW": _with(whole, fused=None),
    "AdamW, fused": _with(whole, fused=True),
    "masked AdamW": _with(masked),
    "LIFT, published": _with(published),
    "SHiRA": _with(adapter, kind="shira"),
    "Super-Tuning": _with(adapter, kind="super"),
    "LoRA": _with(adapter, kind="lora"),
    "ours, by hooks": _with(ours, blocks=False),
    "ours, LIFT's mask": _with(ours),
    "ours, HFT": _with(half),
    "ours, S2FT": _with(slices),
}
FULL, FUSED, LORA, LIFT = "AdamW", "AdamW, fused", "LoRA", "LIFT, published"
OURS, HOOKS, HFT = "ours, LIFT's mask", "ours, by hooks", "ours, HFT"
PEFTS = ("SHiRA", "Super-Tuning", LORA)


def at_hand(lift: Path | None) -> list[str]:
    """The arms that can be made here."""
    missing = () if importlib.util.find_spec("peft") else PEFTS
    return [name for name in ARMS if name not in missing and (name != LIFT or lift is not None)]


# ---- a step by its parts


def parts(arm: Arm, ids: Tensor) -> dict[str, float]:
    """CPU seconds of one step: forward, backward, of which gathering in hooks, and the update."""
    if isinstance(arm.optimizer, Timed):
        arm.optimizer.spent = 0.0
    began = process_time()
    loss = arm.loss(ids)
    middle = process_time()
    loss.backward()
    done = process_time()
    arm.update()
    end = process_time()
    spent = getattr(arm.optimizer, "spent", 0.0)
    return {"forward": middle - began, "backward": done - middle, "gathering": spent, "update": end - done}


def deaf(arm: Arm, ids: Tensor) -> float:
    """CPU seconds of a backward pass whose gradients nobody gathers."""
    assert isinstance(arm.optimizer, Timed)
    arm.optimizer.listening = False
    loss = arm.loss(ids)
    began = process_time()
    loss.backward()
    spent = process_time() - began
    for p in arm.model.parameters():
        p.grad = None
    arm.optimizer.listening = True
    return spent
