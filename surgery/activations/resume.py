"""Take up a recorded pass: blocks run by themselves on rows that differ from it, from a position on.

The blocks are the model's own modules. Rows come in groups, one a change: row `g * batch + b` is example b under
change g. A group begins at its layer with what the change makes of the stream (`Entry`), joins the groups already under
way, and all leave the last block together: weights are read once for all changes rather than once for each. Equal to
one whole forward a change up to rounding (1e-6 of the logits' scale in float32 on the same attention kernel).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.activations.recording import _CACHE, Recording, _Cache
from surgery.anatomy import Anatomy, Site
from surgery.anatomy.points import attach

TOKENS = 1024
"""Tokens that a block is called with at a time on CPU: weights are read rarely, activations stay in cache."""


@dataclass
class Entry:
    """Where some groups begin: at block `layer`, from column `start` on.

    `at="pre"`: `value` is the stream entering the block (layer L: leaving the last block); `at="mid"`: the stream is
    the recorded one, and `value` is what attention adds to it. (groups * batch, pos - start, d_model).
    """

    layer: int
    value: Tensor
    at: Literal["pre", "mid"] = "pre"


def finish(recording: Recording, entries: Sequence[Entry], start: int, *, everywhere: bool = False) -> Tensor:
    """What the last block hands on, rows in the order of the entries by layer ("pre" before "mid").

    (rows, d_model) at each row's last real token; with `everywhere` (rows, pos - start, d_model). Rows of prompts that
    end before `start` are what was recorded.
    """
    layers, rows = recording.anatomy.n_layers, None
    for layer in range(min(e.layer for e in entries), layers):
        before = [e.value for e in entries if e.layer == layer and e.at == "pre"]
        inside = [e.value for e in entries if e.layer == layer and e.at == "mid"]
        stream = _joined([*([] if rows is None else [rows]), *before])
        last = layer == layers - 1 and not everywhere
        parts = []
        if stream is not None:
            through = last_token if last else block
            parts += [through(recording, layer, some, start) for some in portions(recording, stream)]
        for added in inside:
            parts += [_from_mid(recording, layer, some, start, last) for some in portions(recording, added)]
        rows = _joined(parts)
    ends = [e.value for e in entries if e.layer == layers]
    if not everywhere:
        ends = [at_last(recording, value, start) for value in ends]
    found = _joined([*([] if rows is None else [rows]), *ends])
    assert found is not None
    if not everywhere and bool((recording.last < start).any()):
        short = (recording.last < start).repeat(len(found) // len(recording.batch))
        found = torch.where(short[:, None], _repeated(at_last(recording, recording.stream[-1], 0), found), found)
    return found


def block(recording: Recording, layer: int, stream: Tensor, start: int = 0) -> Tensor:
    """One block on (rows, pos - start, d_model), attending to the recorded keys and values left of `start`."""
    groups = len(stream) // len(recording.batch)

    def update(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if start == 0:
            return keys, values
        before = recording.keys[layer][:, :, :start], recording.values[layer][:, :, :start]
        return (torch.cat([_groups(before[0], groups), keys], 2), torch.cat([_groups(before[1], groups), values], 2))

    return _call(recording, layer, stream, _Cache(update), groups, slice(start, None))


def last_token(recording: Recording, layer: int, stream: Tensor, start: int = 0) -> Tensor:
    """One block at each row's last real token only, (rows, d_model): other tokens give just their keys and values."""
    groups = len(stream) // len(recording.batch)
    keys, values = keys_values(recording, layer, stream, start)
    if start:
        keys = torch.cat([_groups(recording.keys[layer][:, :, :start], groups), keys], 2)
        values = torch.cat([_groups(recording.values[layer][:, :, :start], groups), values], 2)
    query = at_last(recording, stream, start)[:, None]
    cache = _Cache(lambda *_: (keys, values))
    with _only_queries(recording, layer):
        return _call(recording, layer, query, cache, groups, recording.last)[:, 0]


class _Made(Exception):
    """Keys and values are made: the rest of the block is not needed."""


def keys_values(recording: Recording, layer: int, stream: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values (rows, kv_head, pos - start, d_head) of a block, at the price of their projections alone."""
    made: list[Tensor] = []

    def update(keys: Tensor, values: Tensor) -> Any:
        made[:] = [keys, values]
        raise _Made

    groups = len(stream) // len(recording.batch)
    with _without_queries(recording, layer), suppress(_Made):
        _call(recording, layer, stream, _Cache(update), groups, slice(start, None))
    return made[0], made[1]


def at_last(recording: Recording, stream: Tensor, start: int) -> Tensor:
    """(rows, d_model) of (rows, pos - start, d_model) at each row's last real token."""
    columns = (recording.last - start).clamp(min=0).repeat(len(stream) // len(recording.batch))
    return stream[torch.arange(len(stream), device=stream.device), columns]


def grouped(value: Tensor, groups: int) -> Tensor:
    """A recorded (batch, ...) value once for each group, (groups * batch, ...)."""
    return _groups(value, groups)


def portions(recording: Recording, rows: Tensor) -> Sequence[Tensor]:
    """Whole groups of rows, as many as fit the processor's cache together: faster than all at once on CPU."""
    if rows.device.type != "cpu":
        return [rows]
    size = len(recording.batch)
    return rows.split(size * max(1, TOKENS // (size * rows.shape[1])))


# ---- calling a block -----------------------------------------------------------------------------------------------


def _from_mid(recording: Recording, layer: int, added: Tensor, start: int, last: bool) -> Tensor:
    """A block whose attention adds `added` to the recorded stream: only its MLP is computed."""
    groups = len(added) // len(recording.batch)
    stream, offset = recording.stream[layer][:, start:], recording.offset[layer]
    columns: slice | Tensor = slice(start, None)
    if last:
        stream, columns = at_last(recording, stream, start)[:, None], recording.last
        added = at_last(recording, added, start)[:, None]
        offset = None if offset is None else at_last(recording, offset, 0)[:, None]
    elif offset is not None:
        offset = offset[:, start:]
    stream = _groups(stream, groups)
    anatomy, attention = recording.anatomy, recording.anatomy.attention(layer)
    returned = added if offset is None else added + _groups(offset, groups)
    norm = anatomy.norm("attention_norm", layer)
    with replaced(attention, returning(returned, recording.returns)):
        if norm is None:
            found = _call(recording, layer, stream, None, groups, columns)
        else:
            with replaced(norm, lambda *_, **__: added):
                found = _call(recording, layer, stream, None, groups, columns)
    return found[:, 0] if last else found


def returning(value: Tensor, count: int) -> Callable[..., Any]:
    """What stands in for an attention module that returns `count` things, the value first."""
    return lambda *_, **__: value if count == 1 else (value, *[None] * (count - 1))


def _call(recording: Recording, layer: int, stream: Tensor, cache: Any, groups: int, columns: slice | Tensor) -> Tensor:
    """The block on some columns (a slice, or one a row) with what it was called with when recorded, made to fit."""
    recorded = recording.calls[layer]
    words = {name: _fitted(name, value, recording, groups, columns) for name, value in recorded.items()}
    words = {name: cache if value is _CACHE else value for name, value in words.items()}
    partial = isinstance(columns, Tensor) or (columns.start or 0) > 0
    if cache is not None and partial and recorded.get("attention_mask") is None:
        words["attention_mask"] = _causal(recording, groups, columns)
    output = recording.anatomy.blocks[layer](stream, **words)
    return output[0] if isinstance(output, (tuple, list)) else output


def _fitted(name: str, value: Any, recording: Recording, groups: int, columns: slice | Tensor) -> Any:
    """What was recorded for (batch, pos) for the rows and columns at hand: query columns are cut, keys stay whole."""
    if isinstance(value, tuple):
        return tuple(_fitted(name, part, recording, groups, columns) for part in value)
    if not isinstance(value, Tensor):
        return value
    batch = len(recording.batch)
    if name == "alibi":  # (batch * head, 1, pos): one bias for each key
        return value.repeat(groups, *[1] * (value.dim() - 1))
    axis = {"attention_mask": 2, "position_embeddings": 1, "position_ids": 1, "cache_position": 0}.get(name)
    if axis is None or value.dim() <= axis:
        return value
    if isinstance(columns, slice):
        value = value[(slice(None),) * axis + (columns,)]
    elif axis > 0:
        value = value.expand(batch, *value.shape[1:])
        shape = (batch, *value.shape[1:axis], 1, *value.shape[axis + 1 :])
        value = value.gather(axis, columns.view(-1, *[1] * (value.dim() - 1)).expand(shape))
    return _groups(value, groups) if axis > 0 and value.shape[0] == batch > 1 else value


def _causal(recording: Recording, groups: int, columns: slice | Tensor) -> Tensor | None:
    """(1 or rows, 1, query, key) True where a token may look: what the recorded pass left to its kernel."""
    width = recording.batch.ids.shape[1]
    keys = torch.arange(width, device=recording.batch.ids.device)
    if isinstance(columns, slice):
        if width - (columns.start or 0) == 1:
            return None
        return (keys <= keys[columns][:, None])[None, None]
    if bool((columns == width - 1).all()):
        return None
    return _groups((keys <= columns[:, None])[:, None, None], groups)


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module does something else meanwhile."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def _without_queries(recording: Recording, layer: int) -> Iterator[None]:
    """The query projection gives zeros meanwhile, where its weights can be left out."""
    anatomy, at = recording.anatomy, recording.anatomy.blocks[layer]
    if anatomy.family.q is not None:
        wide = _queries(anatomy)
        with replaced(at.get_submodule(anatomy.family.q), lambda x: _zeros(x, wide)):
            yield
        return
    module = at.get_submodule(anatomy.family.qkv)
    kind = type(module).__name__
    if not (isinstance(module, nn.Linear) or kind == "Conv1D") or module.weight.dim() != 2 or module._forward_hooks:
        yield
        return
    weight = module.weight.t() if kind == "Conv1D" else module.weight
    bias = module.bias

    def only(x: Tensor) -> Tensor:
        if anatomy.family.layout == "concat":
            cut = _queries(anatomy)
            made = nn.functional.linear(x, weight[cut:], None if bias is None else bias[cut:])
            return torch.cat([_zeros(x, cut), made], -1)
        few, many = anatomy.n_kv_heads, anatomy.n_heads
        shape = (few, many // few + 2, anatomy.d_head)
        part = weight.unflatten(0, shape)[:, -2:].flatten(0, 2)
        made = nn.functional.linear(x, part, None if bias is None else bias.view(shape)[:, -2:].flatten())
        zeros = x.new_zeros(1).expand(*x.shape[:-1], few, many // few, anatomy.d_head)
        return torch.cat([zeros, made.unflatten(-1, (few, 2, anatomy.d_head))], -2).flatten(-3)

    with replaced(module, only):
        yield


@contextmanager
def _only_queries(recording: Recording, layer: int) -> Iterator[None]:
    """The key and value projections give zeros meanwhile: for few rows, reading their weights is what they cost."""
    anatomy, at = recording.anatomy, recording.anatomy.blocks[layer]

    with ExitStack() as stack:
        if anatomy.family.k is not None and anatomy.family.v is not None:
            wide = anatomy.n_kv_heads * anatomy.d_head
            for path in (anatomy.family.k, anatomy.family.v):
                stack.enter_context(replaced(at.get_submodule(path), lambda x: _zeros(x, wide)))
        elif anatomy.family.layout == "concat":  # grouped rows can't be left out without a copy of the weights
            module = at.get_submodule(anatomy.family.qkv)
            kind, cut = type(module).__name__, _queries(anatomy)
            if (isinstance(module, nn.Linear) or kind == "Conv1D") and module.weight.dim() == 2:
                weight = module.weight.t() if kind == "Conv1D" else module.weight
                bias = None if module.bias is None else module.bias[:cut]
                rest = len(weight) - cut

                def made(x: Tensor) -> Tensor:
                    return torch.cat([nn.functional.linear(x, weight[:cut], bias), _zeros(x, rest)], -1)

                stack.enter_context(replaced(module, made))
        yield


def _zeros(x: Tensor, wide: int) -> Tensor:
    """(..., wide) zeros in place of what is made of x (..., d_model), of which one row is there in memory."""
    return x.new_zeros(wide).expand(*x.shape[:-1], wide)


def _queries(anatomy: Any) -> int:
    return anatomy.n_heads * anatomy.d_head


def _groups(value: Tensor, groups: int) -> Tensor:
    return value if groups == 1 else value.repeat(groups, *[1] * (value.dim() - 1))


def _repeated(value: Tensor, like: Tensor) -> Tensor:
    return _groups(value, len(like) // len(value))


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(list(parts))


# ---- what heads and neurons write ----------------------------------------------------------------------------------


def attended(recording: Recording, layer: int, site: str, value: Tensor, start: int = 0) -> Tensor:
    """z (batch, pos - start, head, d_head) of the recorded stream with other q, k, v or pattern in one layer.

    `value` is the site's whole value from column `start` on. A head's z depends on no other head's: one pass serves
    the changes of all heads of a layer.
    """
    anatomy = recording.anatomy
    made: list[Tensor] = []

    def keep(z: Tensor) -> None:
        made.append(z)
        raise _Made

    handles = attach(anatomy, Site(site, layer), lambda old: value.to(old.dtype).expand(old.shape))
    handles += attach(anatomy, Site("z", layer), keep)
    try:
        with suppress(_Made):
            block(recording, layer, recording.stream[layer][:, start:], start)
    finally:
        for handle in handles:
            handle.remove()
    return made[0]


def written_by_heads(anatomy: Anatomy, layer: int, dz: Tensor, heads: Sequence[int]) -> Tensor:
    """What differences of z (batch, pos, head, d_head) add to the output projection: (heads, batch, pos, d_model).

    A group of heads can count as one: dz (batch, pos, group, heads of the group * d_head).
    """
    return _written(anatomy.out(layer), dz, heads)


def written_by_neurons(anatomy: Anatomy, layer: int, difference: Tensor, neurons: Sequence[int]) -> Tensor:
    """What differences of mlp_post (batch, pos, d_mlp) add to the second projection: (neurons, batch, pos, d_model)."""
    return _written(anatomy.down(layer), difference[..., None], neurons)


def _written(module: Any, difference: Tensor, parts: Sequence[int]) -> Tensor:
    """(parts, batch, pos, d_model) of inputs (batch, pos, part, width), each part by itself."""
    index, rows = list(parts), _rows_of(module)
    if rows is not None:
        weight = rows.unflatten(0, difference.shape[2:])[index]
        return torch.einsum("bspw,pwe->pbse", difference[:, :, index], weight)
    alone = difference.new_zeros(len(index), *difference.shape)
    for i, part in enumerate(index):
        alone[i, :, :, part] = difference[:, :, part]
    return module(alone.flatten(-2)) - module(torch.zeros_like(alone[:1]).flatten(-2))


def _rows_of(module: Any) -> Tensor | None:
    """(in, out) weights of a plain projection; None where only the module itself knows (quantised, adapted)."""
    if type(module).__name__ == "Conv1D":
        return module.weight
    plain = isinstance(module, nn.Linear) and type(module).__module__.startswith(("torch.nn", "transformers.models"))
    return module.weight.t() if plain and module.weight.dim() == 2 else None
