"""`SparseAdamW`: AdamW over chosen numbers of a model, with a state as small as they are.

    W[i] <- W[i] - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)       for chosen i only

| kept for each number | bytes |
|---|---|
| m and v, float32 | 8 |
| its place (nothing where a parameter moves whole) | 4 |
| when it was selected, once selections have moved | 1 |
| its float32 value, where weights are narrower | 4 |
| its gradient, from backward to step | 4 |

Gradients are gathered while the backward pass runs: a dense one lives for one tensor only. All numbers that are not
chosen keep their bits: no decay, no rounding. What is chosen for one run is one vector, whatever the tensors.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.errors import SurgeryError
from surgery.tuning.banks import Bank, banks_of, on, read, same, shared, used
from surgery.tuning.selection.places import Selection, Slice
from surgery.tuning.slices import is_projection, scattered_gradients, slice_gradients

PIECE = 1 << 16
"""Numbers updated at a time on a CPU: what is read twice then stays in its cache."""
_OF_MODEL: WeakKeyDictionary[nn.Module, WeakSet[SparseAdamW]] = WeakKeyDictionary()
Penalty = Callable[..., Any]
"""Adds to the gradient before a step: (step, weights, places, gradient), each by parameter."""


class SparseAdamW(Optimizer):
    """AdamW over the numbers of `selection`; a `torch.optim.Optimizer` for any loop, Trainer and TRL included.

    Its one parameter stands for the vector of all chosen numbers: gradients to look at, to clip and to scale are
    `optimizer.flat.grad` (float32, gathered; `p.grad` stays None). They add up over backward passes until a step; after
    it they begin anew, also where a loop zeroes the model's gradients and not the optimizer's (Trainer). Parameters
    that are not chosen stop requiring gradients; `release` gives them back.

    `clip` limits the norm of the gathered gradient: pass it where the loop clips `model.parameters()`, which have no
    gradients. `ages`: bias correction counts the steps of each number since it was selected ("entry"), or those of the
    optimizer ("optimizer": LIFT's released code, where a number selected late begins with lr (1 - b1) / sqrt(1 - b2),
    0.45 lr for its betas and 3.2 lr for AdamW's). `penalty` is called before each step and may add to the gradient.
    `blocks`: gradients of projections are made a block of rows at a time, of S2FT's slices these alone, so that no
    dense gradient is ever there; usual in one process, since DDP's reducer would wait for the dense ones. With several
    processes the gathered gradients are averaged before a step, as DDP would (`reduce=False` where the caller does
    that); DDP's own reducer would move dense zeros: see `without_reducer`. Raises `SurgeryError` for selections that
    do not fit, sharded parameters, and gradients that are not finite (under a `GradScaler` such a step is left out, on
    all processes).
    """

    _step_supports_amp_scaling = True  # a GradScaler hands its scale over, and leaves it to `step` what to leave out

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clip: float | None = None,
        ages: str = "entry",
        penalty: Penalty | None = None,
        reduce: bool = True,
        blocks: bool | None = None,
    ) -> None:
        if ages not in ("entry", "optimizer"):
            raise SurgeryError(f"Ages are counted by entry or by optimizer, not by '{ages}'.")
        self.model = getattr(model, "module", model) if hasattr(model, "require_backward_grad_sync") else model
        self.clip, self.ages, self.penalty, self.reduce = clip, ages, penalty, reduce
        self.blocks = not _several() if blocks is None else blocks
        self.listening = True
        """Whether gradients are gathered: of several optimizers of one model only one does, at first the last made."""
        self._spent = False
        self.selection = selection
        self._flags = [(p, p.requires_grad) for p in self.model.parameters()]
        self._handles: list[Any] = []
        self._gathered: Tensor | None = None
        self.banks = banks_of(self.model, selection)
        for other in _OF_MODEL.setdefault(self.model, WeakSet()):
            other.listening = False
        _OF_MODEL[self.model].add(self)
        self.flat = self._stand_in()
        super().__init__([self.flat], {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._listen()

    # ---- what is chosen

    def _stand_in(self) -> nn.Parameter:
        """A parameter in the shape of all chosen numbers that takes no memory: the numbers live in the model."""
        first = self.banks[0].parameter
        return nn.Parameter(torch.zeros(1, device=first.device).expand(self.banks[-1].stop))

    def _listen(self) -> None:
        """Gradients flow to the chosen parameters alone, and are gathered as they come."""
        for p in self.model.parameters():
            p.requires_grad_(False)
            p.grad = None
        uses = Counter(id(p) for _, p in self.model.named_parameters(remove_duplicate=False))
        for bank in self.banks:
            owner = self.model.get_submodule(bank.name.rpartition(".")[0])
            inside = self.blocks and is_projection(owner) and uses[id(bank.parameter)] == 1
            if inside and isinstance(bank.part, Slice):
                self._handles += slice_gradients(owner, bank.part, partial(self._take, bank), self._listens)
            elif inside and bank.places is not None and bank.parameter.dim() == 2:
                self._handles += scattered_gradients(owner, bank.places, partial(self._take, bank), self._listens)
            bank.parameter.requires_grad_(True)
            self._handles.append(bank.parameter.register_post_accumulate_grad_hook(partial(self._gather, bank)))

    def _listens(self) -> bool:
        return self.listening

    def release(self) -> None:
        """Takes the hooks off the model, and lets its parameters require gradients as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for p, flag in self._flags:
            p.requires_grad_(flag)

    @torch.no_grad()
    def reselect(self, selection: Selection, *, keep: bool = True) -> None:
        """Moves to another selection: moments live on where old and new meet (`keep`), and are zero elsewhere.

        Numbers that leave the selection keep the values they have reached.
        """
        old, state = {bank.name: bank for bank in self.banks}, dict(self.state.get(self.flat, {}))
        banks = banks_of(self.model, selection)
        self.selection, self.banks, self._gathered = selection, banks, None
        flags, self._flags = self._flags, []
        self.release()
        self._flags = flags
        self._replace_stand_in()
        self._listen()
        if not state:
            return
        device = banks[0].parameter.device
        moved: dict[str, Any] = {"step": state["step"]}
        for key in ("exp_avg", "exp_avg_sq"):
            moved[key] = torch.zeros(banks[-1].stop, device=device)
        births = [*state.get("births", [0]), int(state["step"])]
        born = torch.full((banks[-1].stop,), len(births) - 1, dtype=torch.int16, device=device)
        for bank in banks:
            if keep and bank.name in old:
                here, there = shared(old[bank.name], bank)
                for key in ("exp_avg", "exp_avg_sq"):
                    moved[key][there] = state[key][here]
                born[there] = state["born"][here].to(born.dtype) if "born" in state else 0
        moved["births"], moved["born"] = used(births, born)
        self.state[self.flat] = moved
        if "master" in state:
            moved["master"] = self._values()
            for bank in banks:
                if bank.name in old:
                    here, there = shared(old[bank.name], bank)
                    moved["master"][there] = state["master"][here]

    def _replace_stand_in(self) -> None:
        before = self.flat
        self.flat = self._stand_in()
        self.state.pop(before, None)
        self.param_groups[0]["params"] = [self.flat]

    # ---- gradients

    def _gather(self, bank: Bank, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or not self.listening:
            return
        self._begin()
        parameter.grad = None
        flat = gradient.reshape(-1)
        if bank.places is None:
            self._take(bank, flat)
        elif bank.fresh and flat.dtype == torch.float32:
            bank.to(flat.device)
            torch.index_select(flat, 0, bank.places, out=self._slot(bank, flat.device))
            bank.fresh = False
        else:
            bank.to(flat.device)
            self._take(bank, flat.index_select(0, bank.places))

    @torch.no_grad()
    def _take(self, bank: Bank, values: Tensor) -> None:
        """Gradients of one bank: written where they are the first since `zero_grad`, else added."""
        if not self.listening:
            return
        self._begin()
        slot = self._slot(bank, values.device)
        if bank.fresh:
            slot.copy_(values)
        else:
            slot.add_(values)
        bank.fresh = False

    def _begin(self) -> None:
        """The first gradients after a step do not add to those that it took."""
        if self._spent:
            for bank in self.banks:
                bank.fresh = True
            self._spent = False

    def _slot(self, bank: Bank, device: torch.device) -> Tensor:
        if self._gathered is None or self._gathered.device != device:
            self._gathered = torch.empty(self.banks[-1].stop, device=device)
            if self.flat.device != device:  # the model has moved
                state = self.state.get(self.flat, {})
                self._replace_stand_in()
                if state:
                    self.state[self.flat] = on(state, device)
        if self.flat.grad is None:
            self.flat.grad = self._gathered
        return self._gathered[bank.start : bank.stop]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gathered gradients. Their memory goes back: the next ones fill it layer by layer."""
        self.flat.grad = self._gathered = None
        self._spent = False
        for bank in self.banks:
            bank.fresh = True

    def gradient_of(self, name: str) -> Tensor | None:
        """The gathered gradient of one parameter's chosen numbers, a view; None before a backward pass."""
        bank = next(b for b in self.banks if b.name == name)
        return None if self.flat.grad is None or bank.fresh else self.flat.grad[bank.start : bank.stop]

    def settle(self) -> None:
        """Makes the gathered gradient whole: zero where the loss did not reach. `step` does it; so must who sums it."""
        for bank in self.banks:
            if bank.fresh and self.flat.grad is not None:
                self.flat.grad[bank.start : bank.stop] = 0
            bank.fresh = False

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. Nothing has moved when it raises `SurgeryError`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.flat.grad is None:
            return loss
        self.settle()
        gradient, self._spent = self.flat.grad, True
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            gradient /= scale
        if self.reduce and _several():
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()
        if hasattr(self, "found_inf") and not bool(gradient.sum().isfinite()):
            return loss  # the scaler lowers its scale
        self._check(gradient)
        state = self._state()
        if self.penalty is not None:
            spans = {bank.name: slice(bank.start, bank.stop) for bank in self.banks}
            weights = {bank.name: bank.parameter.detach() for bank in self.banks}
            places = {bank.name: bank.places for bank in self.banks}
            self.penalty(int(state["step"]), weights, places, {n: gradient[s] for n, s in spans.items()})
        if self.clip:
            gradient *= torch.clamp(self.clip / (gradient.norm() + 1e-6), max=1.0)
        state["step"] += 1
        for start, stop, banks in self._pieces():
            change = self._change(state, gradient, start, stop)
            for bank in banks:
                self._move(state, bank, max(start, bank.start), min(stop, bank.stop), change, start)
        return loss

    def _check(self, gradient: Tensor) -> None:
        if bool(gradient.sum().isfinite()):  # a sum is cheap, and tells
            return
        for bank in self.banks:
            if not bool(gradient[bank.start : bank.stop].isfinite().all()):
                raise SurgeryError(f"The gradient of '{bank.name}' is not finite; nothing was moved.",
                                   hint="Lower the learning rate, clip, or look at the batch.")  # fmt: skip

    def _state(self) -> dict[str, Any]:
        state = self.state[self.flat]
        if not state:
            zeros = partial(torch.zeros, self.banks[-1].stop, device=self.banks[0].parameter.device)
            state.update(step=torch.tensor(0.0), exp_avg=zeros(), exp_avg_sq=zeros())
            if any(bank.parameter.dtype.itemsize < 4 for bank in self.banks):
                state["master"] = self._values()
        return state

    def _values(self) -> Tensor:
        """The chosen numbers in float32."""
        return torch.cat([read(bank.flat, bank.places).float() for bank in self.banks])

    def _pieces(self) -> Iterator[tuple[int, int, list[Bank]]]:
        """Spans of the vector that are updated together: all of it on an accelerator, pieces of one bank on a CPU."""
        if self.flat.device.type != "cpu":
            yield 0, self.banks[-1].stop, self.banks
            return
        for bank in self.banks:
            for start in range(bank.start, bank.stop, PIECE):
                yield start, min(start + PIECE, bank.stop), [bank]

    def _change(self, state: dict[str, Any], gradient: Tensor, start: int, stop: int) -> Tensor:
        """Adam's step for a span, the moments updated."""
        group = self.param_groups[0]
        b1, b2 = group["betas"]
        g, m, v = (t[start:stop] for t in (gradient, state["exp_avg"], state["exp_avg_sq"]))
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        step = int(state["step"])
        if "born" not in state or self.ages == "optimizer":
            scale, root = -group["lr"] / (1 - b1**step), (1 - b2**step) ** 0.5
            return v.sqrt().div_(root).add_(group["eps"]).reciprocal_().mul_(m).mul_(scale)
        born = state["born"][start:stop].int()
        spans = [max(1, step - at) for at in state["births"]]
        scales = g.new_tensor([-group["lr"] / (1 - b1**n) for n in spans])[born]
        roots = g.new_tensor([(1 - b2**n) ** 0.5 for n in spans])[born]
        return v.sqrt().div_(roots).add_(group["eps"]).reciprocal_().mul_(m).mul_(scales)

    def _move(self, state: dict[str, Any], bank: Bank, start: int, stop: int, change: Tensor, origin: int) -> None:
        """Puts the part of `change` that is this bank's into the weights."""
        group, weights = self.param_groups[0], bank.flat
        change = change[start - origin : stop - origin]
        bank.to(weights.device)
        places = None if bank.places is None else bank.places[start - bank.start : stop - bank.start]
        here = slice(start - bank.start, stop - bank.start)  # where a whole parameter moves
        kept = 1 - group["lr"] * group["weight_decay"]
        if "master" in state:
            new = state["master"][start:stop].mul_(kept).add_(change).to(weights.dtype)
        elif kept != 1:  # decayed and rounded first, as torch's AdamW does
            new = (weights[here] if places is None else weights.index_select(0, places)) * kept + change
        elif places is None:
            weights[here] += change
            return
        else:
            weights.index_add_(0, places, change)
            return
        if places is None:
            weights[here] = new
        else:
            weights.index_copy_(0, places.long(), new)

    # ---- on disk

    def state_dict(self) -> dict[str, Any]:
        """As other optimizers', with the selection in the group: what it moves need not be chosen again to go on."""
        found = super().state_dict()
        tensors, words = self.selection.tensors()
        found["param_groups"][0]["selection"] = (tensors, words)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where `state_dict` was made, with the selection that there was then."""
        (group,) = state_dict["param_groups"]
        selection = Selection.from_tensors(*group["selection"])
        if not same(selection, self.selection):
            self.reselect(selection, keep=False)
        self.param_groups[0].update({k: v for k, v in group.items() if k not in ("params", "selection")})
        self.state.pop(self.flat, None)
        for state in state_dict["state"].values():
            if len(state["exp_avg"]) != self.banks[-1].stop:
                raise SurgeryError(
                    f"The state is of {len(state['exp_avg']):,} numbers, the selection of {self.banks[-1].stop:,}.",
                    hint="It was saved with another selection.",
                )
            self.state[self.flat] = copy.deepcopy(on(state, self.flat.device))  # steps write into it

    @property
    def nbytes(self) -> int:
        """Bytes of state and places, as they are now (the moments from the first step on)."""
        held = [t for k, t in self.state.get(self.flat, {}).items() if isinstance(t, Tensor) and k != "step"]
        held += [bank.places for bank in self.banks if bank.places is not None]
        return sum(t.numel() * t.element_size() for t in held)


def _several() -> bool:
    """Whether this is one process of many."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def without_reducer(model: nn.Module) -> nn.Module:
    """A DDP model whose own reducer rests: `SparseAdamW` averages the gathered numbers, 20 times fewer at 5 %.

    It is what `no_sync` does, for good; `accelerate`'s `accumulate` leaves it so. A model without a wrapper does as
    well: the gathered numbers are averaged all the same, and `blocks=True` is then possible too.
    """
    if not hasattr(model, "require_backward_grad_sync"):
        raise SurgeryError(f"{type(model).__name__} is not wrapped by DistributedDataParallel.")
    model.require_backward_grad_sync = False  # type: ignore[assignment]
    return model
