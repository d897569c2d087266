"""How a site's value is read where the model computes it, and how a new value is put in its place.

One primitive: `attach(anatomy, site, visit)` hooks modules so that `visit(value)` is called on the way through, with
the value in the site's shape; what it returns takes the value's place, and None leaves it as it is. Capturing and
editing are both visits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from surgery.anatomy.sites import Site
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.anatomy.model import Anatomy

    Visit = Callable[[Tensor], Tensor | None]


class Handle(Protocol):
    """What takes a hook away again."""

    def remove(self) -> None: ...


def attach(anatomy: Anatomy, site: Site, visit: Visit) -> list[Handle]:
    """Hooks that call `visit` with the whole value of `site`; its head and position are not looked at."""
    layer = site.layer
    if site.name == "embed":
        return [_on_output(anatomy.embed, visit)]
    if site.name == "final":
        return [_on_output(anatomy.final_norm, visit)]
    assert layer is not None, f"{site} names no layer"
    block = anatomy.blocks[layer]
    if site.name == "resid_pre":
        return [_on_input(block, visit)]
    if site.name == "resid_post":
        return [_on_output(block, visit)]
    if site.name == "resid_mid":
        return _mid(anatomy, layer, visit)
    if site.name in ("scores", "pattern"):
        return [_Softmaxes(anatomy.attention(layer), site.name, _by_head(visit, anatomy.n_heads))]
    if site.name == "attn_out":
        return [_on_output(anatomy.attn_writer(layer), visit)]
    if site.name == "z":
        return [_on_input(anatomy.out(layer), _viewed(visit, *heads(anatomy.n_heads)))]
    if site.name in ("q", "k", "v"):
        module, read, write = projection(anatomy, site.name, layer)
        return [_on_output(module, _viewed(visit, read, write))]
    where: Any = {
        "mlp_out": (_on_output, anatomy.mlp_writer),
        "mlp_in": (_on_input, anatomy.mlp_reader),
        "mlp_post": (_on_input, anatomy.down),
        "mlp_pre": (_on_output, anatomy.pre),
    }[site.name]
    hook, module = where[0], where[1](layer)
    if site.name == "mlp_pre" and anatomy.family.gate_up is not None:
        visit = _viewed(visit, *_first_half())
    return _unflattened(anatomy, layer, hook, module, visit)


# ---- reading and writing parts of a module's output ----------------------------------------------------------------

Read = Callable[["Tensor"], "Tensor"]
Write = Callable[["Tensor", "Tensor"], "Tensor"]


def heads(count: int) -> tuple[Read, Write]:
    """(..., heads * d_head) as (..., heads, d_head)."""
    return lambda y: y.unflatten(-1, (count, -1)), lambda y, new: new.reshape(y.shape)


def projection(anatomy: Anatomy, name: str, layer: int) -> tuple[nn.Module, Read, Write]:
    """The module that makes q, k or v, and how its part is read from and written into the module's output."""
    family, many, few = anatomy.family, anatomy.n_heads, anatomy.n_kv_heads
    if family.qkv is None:
        path = getattr(family, name)
        return (anatomy.blocks[layer].get_submodule(path), *heads(many if name == "q" else few))
    module = anatomy.blocks[layer].get_submodule(family.qkv)
    if family.layout == "concat":
        # (..., (H + 2 Hkv) d_head): all queries, all keys, all values.
        start, count = {"q": (0, many), "k": (many, few), "v": (many + few, few)}[name]
        return (module, *_sliced((many + 2 * few,), (..., slice(start, start + count), slice(None))))
    # (..., Hkv, H / Hkv + 2, d_head): the queries of a key-value head, then its key and its value.
    part = {"q": slice(None, -2), "k": slice(-2, -1), "v": slice(-1, None)}[name]
    return (module, *_sliced((few, many // few + 2), (..., part, slice(None)), flat=True))


def _sliced(sizes: tuple[int, ...], index: tuple[Any, ...], flat: bool = False) -> tuple[Read, Write]:
    """Part `index` of (..., *sizes, d_head); `flat` joins the last two sizes into one of heads."""

    def read(y: Tensor) -> Tensor:
        part = y.unflatten(-1, (*sizes, -1))[index]
        return part.flatten(-3, -2) if flat else part

    def write(y: Tensor, new: Tensor) -> Tensor:
        y = y.clone()
        part = y.unflatten(-1, (*sizes, -1))[index]
        part.copy_(new.reshape(part.shape))
        return y

    return read, write


def _first_half() -> tuple[Read, Write]:
    import torch

    def write(y: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new, y[..., y.shape[-1] // 2 :]], -1)

    return lambda y: y[..., : y.shape[-1] // 2], write


def _viewed(visit: Visit, read: Read, write: Write) -> Visit:
    def visit_part(value: Tensor) -> Tensor | None:
        new = visit(read(value))
        return None if new is None else write(value, new)

    return visit_part


# ---- hooks ---------------------------------------------------------------------------------------------------------


def first_tensor(output: Any) -> Tensor:
    """What a module hands on: some families return a tensor, some a tuple that begins with it."""
    return output[0] if isinstance(output, (tuple, list)) else output


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module was called with, by position or by name."""
    return args[0] if args else kwargs["hidden_states"]


@lru_cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def signature(module: nn.Module) -> inspect.Signature:
    """Of the `forward` of its class, `self` included: another may stand in the module. Looked up once."""
    kind: Any = type(module)
    return _signature(kind)


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module was called with, by name."""
    named = dict(signature(module).bind_partial(module, *args, **kwargs).arguments)
    del named[next(iter(named))]  # self
    return {**named, **named.pop("kwargs", {})}


def _on_input(module: nn.Module, visit: Visit) -> Handle:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        new = visit(given(args, kwargs))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _on_output(module: nn.Module, visit: Visit, *, late: bool = False) -> Handle:
    """Visits stand in the order in which they came, but that `late` ones are behind all others."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        new = visit(first_tensor(output))
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, (tuple, list)) else new

    hook.late = late  # type: ignore[attr-defined]
    handle = module.register_forward_hook(hook)
    for key in [key for key, other in module._forward_hooks.items() if getattr(other, "late", False)]:
        module._forward_hooks[key] = module._forward_hooks.pop(key)
    return handle


def _mid(anatomy: Anatomy, layer: int, visit: Visit) -> list[Handle]:
    """The stream between attention and MLP is a sum that no module makes: a new value becomes another attn_out.

    What stands before it (resid_pre, attn_out) may be edited by those who come later: its terms are taken where all of
    that has been done.
    """
    before: list[Tensor] = []

    def remember(stream: Tensor) -> None:
        before[:] = [stream]

    def add(written: Tensor) -> Tensor | None:
        stream = before.pop()
        new = visit(stream + written)
        return None if new is None else new - stream

    reader = anatomy.norm("input_norm", layer) or anatomy.attention(layer)
    return [_on_input(reader, remember), _on_output(anatomy.attn_writer(layer), add, late=True)]


def _unflattened(anatomy: Anatomy, layer: int, hook: Any, module: nn.Module, visit: Visit) -> list[Handle]:
    """Blocks that run their MLP on (batch * pos, d_model) give and take the shape of all others."""
    if anatomy.family.mlp is not None:
        return [hook(module, visit)]
    shape: list[int] = []

    def remember(stream: Tensor) -> None:
        shape[:] = stream.shape[:2]

    def visit_rows(value: Tensor) -> Tensor | None:
        if value.dim() != 2:
            return visit(value)
        new = visit(value.unflatten(0, tuple(shape)))
        return None if new is None else new.flatten(0, 1)

    return [_on_input(anatomy.blocks[layer], remember), hook(module, visit_rows)]


class _Softmaxes:
    """The softmax that the attention modules compute while they run, whichever family's code they have."""

    def __init__(self, module: nn.Module, name: str, visit: Visit) -> None:
        from torch.overrides import TorchFunctionMode

        outer = self

        class Mode(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                kwargs = dict(kwargs or {})
                if getattr(function, "__name__", "") not in ("softmax", "_softmax"):
                    return function(*args, **kwargs)
                scores = args[0] if args else kwargs.pop("input")
                outer.seen = True
                if outer.name == "scores":
                    new = visit(scores)
                    return function(scores if new is None else new, *args[1:], **kwargs)
                pattern = function(scores, *args[1:], **kwargs)
                new = visit(pattern)
                return pattern if new is None else new

        self.name, self.mode, self.seen, self.entered = name, Mode, False, []  # type: ignore[var-annotated]
        # The mode entered last is asked first: pattern passes on from the inside, scores from the outside.
        self.handles = [
            module.register_forward_pre_hook(self.enter, prepend=name == "scores"),
            module.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, args: Any) -> None:
        self.seen = False
        mode = self.mode()
        mode.__enter__()
        self.entered.append(mode)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.entered:
            self.entered.pop().__exit__(None, None, None)
        if not self.seen and output is not None:
            raise SurgeryError(
                f"The site '{self.name}' can't be seen: {type(module).__name__} computes attention without a softmax.",
                hint="Use the eager implementation: model.set_attn_implementation('eager').",
            )

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        while self.entered:  # left behind where the module was left by an interrupt, which calls no hooks
            self.entered.pop().__exit__(None, None, None)


def _by_head(visit: Visit, count: int) -> Visit:
    """Some families run (batch * head, dst, src) through the softmax."""

    def visit_heads(value: Tensor) -> Tensor | None:
        if value.dim() != 3:
            return visit(value)
        new = visit(value.unflatten(0, (-1, count)))
        return None if new is None else new.flatten(0, 1)

    return visit_heads
