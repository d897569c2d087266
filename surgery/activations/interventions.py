"""Look at activations and change them: two context managers around any calls of a model.

    with capture(model, ["resid_post.3", "z"]) as seen:      # "z": of all layers
        model(**batch.inputs(model))
    seen["z.3"]                                              # (batch, pos, head, d_head)

    with edit(model, {"z.3.2@-1": 0.0, "resid_pre.5": lambda x: x + vector}):
        model.generate(**batch.inputs(model))

Contexts nest; what is entered later sees what the earlier ones have made of a value. However a context is left, the
model is as it was: no hook stays, no flag is changed. Positions count real tokens, so that padding on either side
changes nothing, and are absolute in generation: `@5` is the sixth token, whether it came with the prompt or was
generated; `@-1` is the newest token of every pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.anatomy.points import Handle, arguments, attach, signature
from surgery.errors import SurgeryError
from surgery.models import untouched
from surgery.registry import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Edit = Callable[..., Tensor | None] | Tensor | float
"""A new value, a number, or a function of the value (and of the `Call`, when it takes two arguments)."""
When = Literal["always", "prefill", "decode"]
NEEDS_SOFTMAX = ("scores", "pattern")


@dataclass
class Call:
    """The forward pass that is running: which tokens it is given."""

    positions: Tensor
    """(batch, pos) the place of each token among the real tokens of its row, -1 for padding."""
    lengths: Tensor
    """(batch,) real tokens so far, those of this pass included."""
    prefill: bool
    """Whether nothing came before: False in the steps of generation."""

    def at(self, position: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of the tokens at `position`; rows that have no such token in this pass are left out."""
        wanted = self.lengths[:, None] + position if position < 0 else position
        rows, columns = ((self.positions == wanted) & (self.positions >= 0)).nonzero(as_tuple=True)
        return rows, columns


class Captured(Mapping[str, Tensor]):
    """What was captured, by site: any spelling of a site's name is understood."""

    def __init__(self, wanted: list[Site]) -> None:
        self._wanted = wanted
        self._values: dict[Site, Tensor] = {}

    def __getitem__(self, site: str | Site) -> Tensor:
        found = Site.parse(site)
        if found in self._values:
            return self._values[found]
        if found.layer is None and any(replace(site, layer=None) == found for site in self._wanted):
            raise SurgeryError(f"'{found}' was captured in several layers, and names none of them.",
                               hint=f"One: '{replace(found, layer=0)}'; all: .stack('{found}').")  # fmt: skip
        if found not in self._wanted:
            raise SurgeryError(f"'{found}' was not captured.", hint=nearest(str(found), map(str, self._wanted)))
        raise SurgeryError(f"'{found}' has no value yet: no forward pass went through it.")

    def __iter__(self) -> Iterator[str]:
        return (str(site) for site in self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Captured({', '.join(f'{site} {tuple(value.shape)}' for site, value in self._values.items())})"

    def __contains__(self, site: object) -> bool:
        return isinstance(site, (str, Site)) and Site.parse(site) in self._values

    def get(self, site: str | Site, default: Any = None) -> Any:
        """The value of a site, or `default` where there is none."""
        return self._values.get(Site.parse(site), default)

    def stack(self, name: str) -> Tensor:
        """The values of a site in all captured layers, (layer, ...): of "z", or of a part of it, "z.*.2@-1"."""
        part = replace(Site.parse(name), layer=None)
        found = [v for site, v in sorted(self._values.items(), key=_by_layer) if replace(site, layer=None) == part]
        if not found:
            raise SurgeryError(f"'{part}' was not captured in any layer.", hint=nearest(name, map(str, self._wanted)))
        return torch.stack(found)

    def clear(self) -> None:
        """Forgets all values."""
        self._values.clear()


def _by_layer(item: tuple[Site, Tensor]) -> int:
    return -1 if item[0].layer is None else item[0].layer


@contextmanager
def capture(
    model: Any, sites: Iterable[str | Site] | str, *, grad: bool = False, steps: bool = False, clone: bool = True
) -> Iterator[Captured]:
    """Keeps the values of `sites` in each forward pass; a site's newest value replaces the one before.

    Only what is named is kept: of `z.3.2@-1` one head at one position, (batch, d_head), is copied and the rest let go.
    `steps`: passes of generation are put together along the positions (whole sites only). `grad`: values stay in the
    graph, so that gradients with respect to them can be taken. Without `clone` a value may share memory with the
    model's own, which some families overwrite. Raises `SurgeryError` for unknown or impossible sites.
    """
    model = _called(model)
    anatomy = anatomy_of(model)
    wanted = anatomy.expand(sites)
    seen = Captured(wanted)

    def visitor(site: Site) -> Callable[[Tensor, Call], Tensor | None]:
        def visit(value: Tensor, call: Call) -> Tensor | None:
            part, passed_on = taken(value, site, call), None
            if grad:  # what is kept must lie on the way to the output: a view beside it has no gradient
                part = part.clone()
                passed_on = put(value, site, call, part)
            else:
                part = part.detach().clone() if clone and site.position is None else part.detach()
            before = seen._values.get(site)
            if steps and before is not None and not call.prefill:
                part = torch.cat([before, part], dim=2 if site.kind == "pattern" else 1)
            seen._values[site] = part
            return passed_on

        return visit

    if steps and (wrong := [s for s in wanted if s.position is not None or s.kind == "pattern"]):
        raise SurgeryError(f"'{wrong[0]}' can't be put together over the steps of generation.",
                           hint="Capture the whole site of a stream, of heads or of neurons.")  # fmt: skip
    with _visiting(model, anatomy, {site: [visitor(site)] for site in wanted}):
        yield seen


@contextmanager
def edit(model: Any, edits: Mapping[str | Site, Edit], *, when: When = "always") -> Iterator[None]:
    """Changes the values of sites in every forward pass, or only in those of the prompt or of generated tokens.

    An edit is a tensor that takes the value's place (broadcast to its shape), a number, or a function
    `value -> new value` (None: unchanged), called as `(value, call)` when it takes two arguments. Of a site with a head
    the value is (batch, pos, d_head), with a position (batch, ...): rows without such a token in this pass are left
    out. Several edits of one place are made in the order given. Raises `SurgeryError` for unknown or impossible sites,
    and when a new value has another shape.
    """
    if when not in ("always", "prefill", "decode"):
        raise SurgeryError(f"when={when!r}: expected 'always', 'prefill' or 'decode'.")
    if not isinstance(edits, Mapping):
        raise SurgeryError(f"Edits are written {{site: what takes its place}}, and this is {type(edits).__name__}.",
                           hint="edit(model, {'z.3.2@-1': 0.0})")  # fmt: skip
    model = _called(model)
    anatomy = anatomy_of(model)
    visits: dict[Site, list[Callable[[Tensor, Call], Tensor | None]]] = {}
    for name, change in edits.items():
        for site in anatomy.expand([name]):
            visits.setdefault(site.whole, []).append(_editor(site, change, when))
    with _visiting(model, anatomy, visits):
        yield


def _editor(site: Site, change: Edit, when: When) -> Callable[[Tensor, Call], Tensor | None]:
    function = change if callable(change) and not isinstance(change, Tensor) else None
    takes_call = function is not None and _takes_two(function)

    def visit(value: Tensor, call: Call) -> Tensor | None:
        if when != "always" and call.prefill != (when == "prefill"):
            return None
        part = taken(value, site, call)
        if part.numel() == 0:
            return None
        if function is not None:
            new = function(part, call) if takes_call else function(part)
        else:
            new = rows_of(change, site, call, value)
        return None if new is None else put(value, site, call, new)

    return visit


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        return False
    parameters = list(inspect.signature(function).parameters.values())
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) > 1


# ---- parts of a value ----------------------------------------------------------------------------------------------


def _index(site: Site, call: Call) -> tuple[Any, ...]:
    """The index of a site's part in its whole value."""
    head: Any = slice(None) if site.head is None else site.head
    if site.position is None:
        if site.kind == "pattern":
            return (slice(None), head)
        return (slice(None),) if site.head is None else (slice(None), slice(None), head)
    rows, columns = call.at(site.position)
    if site.kind == "pattern":
        return (rows, head, columns)
    return (rows, columns) if site.head is None else (rows, columns, head)


def taken(value: Tensor, site: Site, call: Call) -> Tensor:
    """The part of a whole value that a site names; a view where no position is named."""
    return value[_index(site, call)]


def put(value: Tensor, site: Site, call: Call, new: Tensor) -> Tensor:
    """The whole value with a new part in it, of the value's type and device; value and part themselves are left alone.

    Some families write into what their modules hand on.
    """
    new = _as_tensor(new, site).to(value.device, value.dtype)
    index = _index(site, call)
    shape = value[index].shape
    try:
        new = new.expand(shape)
    except RuntimeError:
        problem = f"'{site}': the new value has shape {tuple(new.shape)}, and {tuple(shape)} is expected."
        raise SurgeryError(problem) from None
    if site.head is None and site.position is None:
        return new.clone()
    value = value.clone()
    value[index] = new
    return value


def _as_tensor(new: Any, site: Site) -> Tensor:
    try:
        return torch.as_tensor(new)
    except (TypeError, ValueError, RuntimeError):
        kind = type(new).__name__
        raise SurgeryError(f"'{site}': the new value is {kind}, and a tensor or a number is needed.") from None


def rows_of(change: Any, site: Site, call: Call, value: Tensor) -> Tensor:
    """A given value for the rows that have the position in this pass, when it has one for every row."""
    change = _as_tensor(change, site)
    if site.position is None or change.dim() == 0:
        return change
    rows, _ = call.at(site.position)
    per_row = change.dim() == taken(value, site, call).dim() and change.shape[0] == value.shape[0]
    return change[rows.to(change.device)] if per_row else change


# ---- hooks ---------------------------------------------------------------------------------------------------------


@contextmanager
def _visiting(
    model: PreTrainedModel, anatomy: Anatomy, visits: Mapping[Site, list[Callable[[Tensor, Call], Tensor | None]]]
) -> Iterator[None]:
    """Hooks for the visits of every site, and one on the model that knows which tokens it is given."""
    handles: list[Handle] = []
    calls: list[Call] = []

    def begin(module: Any, args: Any, kwargs: Any) -> Any:
        found, kwargs = _call_of(module, args, kwargs)
        calls[:] = [found]
        return args, kwargs

    def bound(site: Site, visit: Callable[[Tensor, Call], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        def with_call(value: Tensor) -> Tensor | None:
            tokens = (value.shape[0], value.shape[2 if site.kind == "pattern" else 1])
            known = calls and calls[0].positions.shape == tokens
            return visit(value, calls[0] if known else _Unknown())  # type: ignore[arg-type]

        return with_call

    with ExitStack() as stack:
        if any(site.name in NEEDS_SOFTMAX for site in visits):
            stack.enter_context(eager(model))
        stack.callback(detach, handles)
        handles.append(model.register_forward_pre_hook(begin, with_kwargs=True))
        for site, several in visits.items():
            for visit in several:
                handles += attach(anatomy, site, bound(site, visit))
        yield


class _Unknown:
    """Stands for the call where a part of the model runs by itself, on other tokens than the model was given."""

    def __getattr__(self, name: str) -> Any:
        raise SurgeryError("A part of the model was called by itself: which tokens it was given is not known.",
                           hint="Call the model; of sweeps and the like, take whole passes.")  # fmt: skip


def detach(handles: Iterable[Handle]) -> None:
    """Takes hooks away."""
    for handle in handles:
        handle.remove()


def _call_of(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, dict[str, Any]]:
    """What a forward pass is given; position ids are added where left padding would be misread without them."""
    given = arguments(model, args, kwargs)
    tokens: Tensor = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    batch, width = tokens.shape[:2]
    cache = next((v for v in given.values() if hasattr(v, "get_seq_length")), None)
    past = 0 if cache is None else int(cache.get_seq_length())
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == past + width:
        there = mask.to(torch.bool)
    else:
        there = torch.ones(batch, past + width, dtype=torch.bool, device=tokens.device)
    count = there.long().cumsum(1)
    positions = (count - 1)[:, past:].masked_fill(~there[:, past:], -1)
    known = "position_ids" in signature(model).parameters
    if past == 0 and known and given.get("position_ids") is None and not bool(there[:, 0].all()):
        kwargs = {**kwargs, "position_ids": positions.clamp(min=0)}
    return Call(positions, count[:, -1], past == 0), kwargs


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[None]:
    """Attention with a softmax that can be seen; afterwards the implementation is what it was.

    Raises `SurgeryError` when the model's eager code computes something else: what is seen would not be what is done.
    """
    before = model.config._attn_implementation
    if before == "eager":
        yield
        return
    ids = torch.arange(3, 11, device=model.device)[None] % model.config.get_text_config().vocab_size
    with untouched(model):
        wanted = model(ids, use_cache=False).logits
    _set_attention(model, "eager")
    try:
        with untouched(model):
            differs = (model(ids, use_cache=False).logits - wanted).abs().max() / wanted.abs().max()
        if differs > max(1e-3, 64 * torch.finfo(wanted.dtype).eps):
            raise SurgeryError(
                f"Attention with '{before}' and with 'eager' differ in {type(model).__name__}, by {differs:.1g} of the "
                "logits' scale: scores and patterns can't be seen as they are.",
                hint="Load the model with attn_implementation='eager' to study what that code computes.",
            )
        yield
    finally:
        _set_attention(model, before)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """By the model's own way, or in its config where the code looks at that and nowhere else."""
    if getattr(type(model), "_can_set_attn_implementation", lambda: True)():
        model.set_attn_implementation(name)
    else:
        model.config._attn_implementation = name


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model in a TransformerLens bridge, an nnsight model or the like; itself when it is one."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model
    from surgery.interop import unwrap

    return unwrap(model)


def _called(model: Any) -> PreTrainedModel:
    """The transformers model that runs when `model` is called. Raises `SurgeryError` when other modules do."""
    inside = unwrapped(model)
    if isinstance(model, torch.nn.Module) and all(inside is not module for module in model.modules()):
        raise SurgeryError(
            "A TransformerLens bridge runs modules of its own: what is called inside `with` would not be seen.",
            hint="Take plain = surgery.interop.unwrap(bridge) and call that; or let run(bridge, prompts, sites) do it.",
        )
    return inside
