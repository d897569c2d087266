"""What moves in a run, and the optimizer over it: parameters by their names, or the numbers of a selection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.training.distributed import World
from surgery.training.policy import Policy
from surgery.training.recipe import Recipe
from surgery.tuning import Selection, SparseAdamW
from surgery.tuning.plan import Fixed, Sparse
from surgery.tuning.selection import Round


class Moving:
    """Which parameters of `policy` train, and their optimizers by name (`Update.optimizer`)."""

    def __init__(self, recipe: Recipe, policy: Policy, tuning: Sparse | Fixed | None) -> None:
        self.recipe, self.policy, self.tuning = recipe, policy, tuning
        self.optimizers: dict[str, torch.optim.Optimizer | Joined] = {}
        self.selection: Selection | None = None
        self.turn = 0
        """How many selections have been made."""
        self.at = -1
        """The step before which the last one was made."""

    def begin(self) -> None:
        """Parameters that fit `trainable` and none of `frozen` require gradients, or those of a given selection."""
        model = self.policy.model
        for name, p in model.named_parameters():
            p.requires_grad_(self.recipe.moves(name, p.requires_grad))
        if isinstance(self.tuning, Fixed):
            self.adopt(self.tuning.selection, 0)
        elif self.tuning is None and not any(p.requires_grad for p in model.parameters()):
            raise SurgeryError("No parameter of the model may move.", hint="Look at `trainable` and `frozen`.")

    def due(self, step: int) -> bool:
        """Whether a selection is to be made before this step."""
        if not isinstance(self.tuning, Sparse) or step == self.at:
            return False
        return self.selection is None or bool(self.tuning.refresh and step % self.tuning.refresh == 0)

    def select(
        self, step: int, batches: Callable[[int], Sequence[Any]], loss: Callable[[Any], Tensor], world: World
    ) -> None:
        """Makes the selection before this step; `batches(n)` gives what `n` updates will be made of."""
        assert isinstance(self.tuning, Sparse)
        model, asks = self.policy.model, set(self.tuning.selector.needs) - {"sibling"}
        turn = Round(self.turn, self.selection)
        found = self.tuning.choose(model, turn, batches=batches(self.tuning.batches) if asks else None, loss=loss)
        frozen = [n for n in found if not self.recipe.moves(n)]
        if frozen:
            kept = {n: p for n, p in found.places.items() if n not in frozen}
            found = replace(found, places=kept, shapes={n: found.shapes[n] for n in kept})
        self.adopt(world.gather(found)[0], step)  # the same everywhere, whatever rounding does

    def adopt(self, selection: Selection, step: int) -> None:
        """From now on the numbers of `selection` move; moments live on where the selector says so."""
        selection.check(self.policy.model)
        self.selection, self.turn, self.at = selection, self.turn + 1, step
        keep = isinstance(self.tuning, Sparse) and self.tuning.selector.keeps
        for name in list(self.optimizers):
            if keep and (sparse := sparse_part(self.optimizers[name])) is not None and not selection.whole:
                sparse.reselect(selection)
            else:
                self.forget(name)
        if selection.whole:
            for name, p in self.policy.model.named_parameters():
                p.requires_grad_(name in selection)

    def forget(self, *names: str) -> None:
        """Ends optimizers (all of them without names) with what they have put into the model."""
        for name in names or tuple(self.optimizers):
            sparse = sparse_part(self.optimizers.pop(name))
            if sparse is not None:
                sparse.release()

    def release(self) -> None:
        """Takes the hooks of all optimizers off the model."""
        for sparse in map(sparse_part, self.optimizers.values()):
            if sparse is not None:
                sparse.release()

    def optimizer(self, name: str) -> torch.optim.Optimizer | Joined:
        """AdamW with moments of its own for each name; of several the one that was asked for last gets gradients."""
        if name not in self.optimizers:
            self.optimizers[name] = self._made()
        for other in self.optimizers.values():
            sparse = sparse_part(other)
            if sparse is not None:
                sparse.listening = other is self.optimizers[name]
        return self.optimizers[name]

    def _made(self) -> torch.optim.Optimizer | Joined:
        settings = self.recipe.optimizer
        if self.selection is None or self.selection.whole:
            return adamw(self.policy.moving(), self.recipe)
        assert self.tuning is not None
        penalty = self.tuning.penalty
        sparse = SparseAdamW(
            self.policy.model, self.selection, settings.lr, settings.betas, settings.eps, settings.weight_decay,
            ages=self.tuning.ages, penalty=None if penalty is None else penalty.penalty, reduce=False, blocks=True,
        )  # fmt: skip
        beside = list(self.policy.extras.parameters())
        return Joined([sparse, adamw(beside, self.recipe)]) if beside else sparse


class Joined:
    """Several optimizers that step as one: chosen numbers of the model, and all of what is trained beside it."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all parts, one after the other."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One of each."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of each."""
        for part in self.parts:
            part.zero_grad(set_to_none)


def parts_of(optimizer: torch.optim.Optimizer | Joined) -> list[torch.optim.Optimizer]:
    """The torch optimizers in it."""
    return optimizer.parts if isinstance(optimizer, Joined) else [optimizer]


def sparse_part(optimizer: torch.optim.Optimizer | Joined) -> SparseAdamW | None:
    """The one over chosen numbers, where there is one."""
    return next((part for part in parts_of(optimizer) if isinstance(part, SparseAdamW)), None)


def trained_by(optimizer: torch.optim.Optimizer | Joined) -> list[Tensor]:
    """Its parameters; of chosen numbers the vector that stands for them, with its gradient."""
    sparse = sparse_part(optimizer)
    if sparse is not None:
        sparse.settle()
    return [p for group in optimizer.param_groups for p in group["params"]]


def adamw(moving: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over parameters; matrices decay, vectors (norms, biases) do not."""
    settings, moving = recipe.optimizer, list(moving)
    groups: list[Mapping[str, Any]] = [
        {"params": [p for p in moving if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in moving if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [dict(g) for g in groups if g["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=recipe.parallel != "fsdp2",
    )
