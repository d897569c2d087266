"""What some selections look at besides the weights: gradients, inputs of the projections, a fine-tuned sibling.

Everything is gathered one tensor at a time, and the model is afterwards as it was, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.tuning.selection.targets import Target

Loss = Callable[[Any], Tensor]
"""The scalar loss of one batch."""


@dataclass
class Evidence:
    """By name of the parameter; empty where nobody asked.

    `gradients` are sums over batches of the loss's gradient, `squares` of its square, `movement` of -g W along the way
    of plain gradient descent. `inputs` are the norms ||X_j||_2 of each input of a projection over all tokens.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    movement: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    sibling: Callable[[str], Tensor] | None = None


def gathered(
    model: nn.Module,
    targets: Sequence[Target],
    needs: Iterable[str],
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    sibling: Any = None,
    lr: float = 1e-3,
) -> Evidence:
    """The evidence that a selector `needs`. `loss` is by default `model(**batch).loss`.

    `lr` is the step of the gradient descent that movement is taken along. Raises `SurgeryError` when data or the
    sibling are missing, and for gradients that are not finite.
    """
    needs = set(needs)
    found = Evidence()
    data = needs & {"gradients", "squares", "movement", "inputs"}
    batches = list(batches) if data and batches is not None else []
    if data and not batches:
        what = ", ".join(sorted(needs - {"sibling"}))
        raise SurgeryError(f"This selection looks at {what}, and there are no data for it.",
                           hint="Pass batches=..., dictionaries that the model takes, with labels.")  # fmt: skip
    loss = loss or _own_loss(model)
    if needs & {"gradients", "squares", "movement"}:
        _backward(model, targets, batches, loss, needs, found, lr)
    if "inputs" in needs:
        _forward(model, targets, batches, loss, found)
    if "sibling" in needs:
        if sibling is None:
            raise SurgeryError("This selection looks at a fine-tuned sibling of the model, and none is named.",
                               hint="sibling: a folder, a name of the zoo, or a model of the same shape.")  # fmt: skip
        found.sibling = _reader(sibling)
    return found


def _own_loss(model: nn.Module) -> Loss:
    def loss(batch: Any) -> Tensor:
        if not isinstance(batch, Mapping):
            raise SurgeryError(f"A batch is a {type(batch).__name__}, and the model takes dictionaries.",
                               hint="Tokenize texts, with labels, or pass loss=, a function of a batch.")  # fmt: skip
        found = getattr(model(**batch), "loss", None)
        if found is None:
            raise SurgeryError("The model gives no loss for these batches.",
                               hint="Put labels into them, or pass loss=, a function of a batch.")  # fmt: skip
        return found

    return loss


@contextmanager
def _gradients_of(
    model: nn.Module, targets: Sequence[Target], take: Callable[[Target], Callable[[Tensor], None]]
) -> Iterator[None]:
    """Only the targets have gradients inside, which go to their `take`; all flags, gradients and hooks are kept.

    Hooks that gradients go to besides (an optimizer's that trains the model) rest meanwhile.
    """
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = {id(t.parameter) for t in targets}
    from surgery.tuning.slices import resting as unseen

    handles, resting = [], []
    try:
        for p, _, _ in flags:
            p.requires_grad_(id(p) in wanted)
            p.grad = None
        for target in targets:
            hooks = getattr(target.parameter, "_post_accumulate_grad_hooks", None)
            if hooks:
                resting.append((hooks, dict(hooks)))
                hooks.clear()
            handles.append(target.parameter.register_post_accumulate_grad_hook(take(target)))
        with unseen():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for hooks, held in resting:
            hooks.update(held)
        for p, flag, gradient in flags:
            p.requires_grad_(flag)
            p.grad = gradient


def _backward(
    model: nn.Module, targets: Sequence[Target], batches: Sequence[Any], loss: Loss, needs: set[str], found: Evidence,
    lr: float,
) -> None:  # fmt: skip
    kept = {}
    if "movement" in needs:
        kept = {t.name: t.parameter.detach().clone() for t in targets}

    def take(target: Target) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:  # a dense gradient lives for one tensor only
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if not bool(gradient.isfinite().all()):
                raise SurgeryError(f"The gradient of '{target.name}' is not finite.",
                                   hint="A row of the data is broken, or the model is.")  # fmt: skip
            gradient = gradient.float()
            for name, value in (("gradients", lambda: gradient), ("squares", gradient.square),
                                ("movement", lambda: -gradient * target.weight)):  # fmt: skip
                if name in needs:
                    sums = getattr(found, name)
                    sums[target.name] = sums[target.name] + value() if target.name in sums else value().clone()
            if "movement" in needs:
                with torch.no_grad():
                    parameter.sub_(gradient.to(parameter.dtype), alpha=lr)

        return hook

    try:
        with _gradients_of(model, targets, take), torch.enable_grad():
            for batch in batches:
                value = loss(batch)
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                    raise SurgeryError("The loss of a batch is no number that depends on the weights up for selection.")
                value.backward()
    finally:
        with torch.no_grad():
            for target in targets:
                if target.name in kept:
                    target.parameter.copy_(kept[target.name])
    for name in needs & {"gradients", "squares", "movement"}:
        sums = getattr(found, name)
        for target in targets:  # what the loss does not reach has no gradient
            sums.setdefault(target.name, torch.zeros(target.shape, device=target.parameter.device))


def _forward(model: nn.Module, targets: Sequence[Target], batches: Iterable[Any], loss: Loss, found: Evidence) -> None:
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not args or not args[0].is_floating_point():
                return
            here = args[0].detach().reshape(-1, args[0].shape[-1]).float().square().sum(0)
            sums[name] = sums[name] + here if name in sums else here

        return hook

    handles = []
    try:
        for target in targets:
            owner = model.get_submodule(target.name.rpartition(".")[0])
            handles.append(owner.register_forward_pre_hook(watch(target.name)))
        with torch.no_grad():
            for batch in batches:
                loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    found.inputs = {name: value.sqrt() for name, value in sums.items()}


def _reader(sibling: Any) -> Callable[[str], Tensor]:
    """A function that reads one tensor of a sibling: a model, a folder, or a name of the zoo."""
    read: Callable[[str], Tensor]
    if isinstance(sibling, str | Path):
        from surgery import zoo
        from surgery.checkpoint import open_checkpoint

        source = open_checkpoint(zoo.resolved(str(sibling)))
        names, read = set(source.tensors), source.read
    else:
        state = sibling.state_dict() if isinstance(sibling, nn.Module) else dict(sibling)
        names, read = set(state), lambda name: state[name].detach()

    def one(name: str) -> Tensor:
        if name not in names:
            raise SurgeryError(f"The sibling has no tensor '{name}': it is of another family.")
        return read(name)

    return one
