"""What pre-training and fine-tuning contribute to each block, on the fine-tuned model's own stream.

With f_l(x) = block_l(x) - x, and x_l the stream of the tuned model (Nuti, Franzmeyer and Henriques, ICML 2025):

    PTC_l = f_l(x_l) of the base      FTC_l = f_l(x_l) of the tuned model - PTC_l      x_{l+1} = x_l + PTC_l + FTC_l

`decompose` gives both at the last token of prompts. Of the base it needs keys and values everywhere, and the rest of a
block at the last token only; the last block of the tuned model likewise, and no head. `scaled` (in scaling.py) runs the
tuned model with FTC_l times a factor. Base blocks are called with what the tuned model's blocks are called with.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.activations import resume
from surgery.activations.interventions import detach
from surgery.activations.pairs import Granularity, check_granularity, equal_layers, pair_of, same_attention
from surgery.activations.recording import _CACHE, Recording
from surgery.activations.scaling import scaled as scaled
from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.anatomy.points import arguments, attach, first_tensor
from surgery.errors import SurgeryError
from surgery.models import Batch, Pair, as_batch, cache_name, untouched


@dataclass
class Decomposition:
    """Contributions to the stream of a batch at each row's last real token, float32."""

    pretraining: Float[Tensor, "step batch d_model"]
    """PTC of each step: what the base would have added."""
    finetuning: Float[Tensor, "step batch d_model"]
    """FTC of each step: what the tuned model adds beyond that."""
    steps: list[str]
    """"0", "1", ...; of sublayers "0.attn", "0.mlp", ..."""
    start: Float[Tensor, "batch d_model"]
    """The tuned model's x_0: start + pretraining.sum(0) + finetuning.sum(0) = end."""
    end: Float[Tensor, "batch d_model"]
    """x_L, before the last norm."""
    base_start: Float[Tensor, "batch d_model"]
    """The base's own x_0, which is in neither contribution; NaN where the token is not in its vocabulary."""
    tokens: tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos d_model"]] | None = None
    """Both contributions summed over the steps at every token; padding means nothing."""


def decompose(
    pair: Pair | tuple[Any, Any] | Any,
    prompts: Batch | Any,
    *,
    tokenizer: Any = None,
    granularity: Granularity = "block",
    per_token: bool = False,
    equal: set[int] | None = None,
) -> Decomposition:
    """PTC and FTC of one batch of prompts, in about 1.2 forward passes; `per_token` takes two.

    `granularity="sublayer"` is an extension of the paper: attention and MLP are decomposed one after the other, so that
    the base's MLP reads the stream behind the tuned model's attention (in parallel blocks both read the same anyway).
    Layers whose weights are equal byte by byte are not run twice: FTC is 0 there; `equal` says which, where it is known
    (see `equal_layers`). For `pair` see `pair_of`.
    Raises `SurgeryError` for models that don't fit together, and for attention without keys and values.
    """
    both = pair_of(pair, tokenizer)
    check_granularity(granularity)
    model: Any = both.tuned
    batch = read(both, prompts).to(model.device).right_padded()
    with untouched(both.tuned, both.base), same_attention(both):
        return _Walk(both, batch, granularity == "sublayer", per_token, equal).run()


def read(pair: Pair, prompts: Any, *, chat: bool = False) -> Batch:
    """Prompts as a batch; texts and chats are read by both tokenizers, which must agree."""
    if isinstance(prompts, (Batch, Tensor, Mapping)):
        return as_batch(prompts)
    return pair.encode(prompts, chat=chat)


class _Stopped(Exception):
    """Raised where nothing more is needed of a forward pass."""


class _Walk:
    """One pass of the tuned model, the base's blocks computed beside it; no stream is kept longer than its block."""

    def __init__(self, pair: Pair, batch: Batch, sublayers: bool, per_token: bool, equal: set[int] | None) -> None:
        self.pair, self.batch, self.sublayers, self.per_token = pair, batch, sublayers, per_token
        self.tuned, self.base = anatomy_of(pair.tuned), anatomy_of(pair.base)  # type: ignore[arg-type]
        self.layers = self.tuned.n_layers
        self.equal = equal_layers(self.base, self.tuned) if equal is None else equal
        self.own = Recording(pair.tuned, self.tuned, batch)
        self.others = Recording(pair.base, self.base, batch, calls=self.own.calls)
        self.through = resume.block if per_token else resume.last_token
        self.stream: Tensor | None = None
        self.ends: list[Tensor] = []
        self.pretraining: list[Tensor] = []
        self.finetuning: list[Tensor] = []
        self.sums: list[Tensor] = []

    def run(self) -> Decomposition:
        """The decomposition of the batch."""
        from transformers import DynamicCache

        name = cache_name(self.pair.tuned)
        if name is None:
            raise SurgeryError(f"{type(self.pair.tuned).__name__} takes no cache: its blocks can't be run apart.")
        cache: Any = DynamicCache()
        cache.update = lambda keys, values, *_, **__: (keys, values)  # nothing is kept
        with ExitStack() as stack:
            for layer, block in enumerate(self.tuned.blocks):
                stack.callback(block.register_forward_pre_hook(self._entering(layer, cache), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._leaving(layer)).remove)
                if self.sublayers and (layer < self.layers - 1 or self.per_token):
                    stack.callback(detach, attach(self.tuned, self._middle(layer), self._passing))
            with suppress(_Stopped):
                self.pair.tuned(**self.batch.inputs(self.pair.tuned), **{name: cache}, use_cache=True)
        assert self.stream is not None
        if not self.per_token:  # the last block, at the last token only
            at_end = self._ends(self.own, self.layers - 1, self.stream, None)
            self._add(self.layers - 1, self.stream, at_end)
        kinds = ("attn", "mlp")
        layers = range(self.layers)
        steps = [f"{l}.{k}" for l in layers for k in kinds] if self.sublayers else [str(l) for l in layers]
        return Decomposition(
            torch.stack(self.pretraining), torch.stack(self.finetuning), steps, self.start, self.end,
            _first_stream(self.pair.base, self.base, self.batch), (self.sums[0], self.sums[1]) if self.sums else None,
        )  # fmt: skip

    # ---- the tuned model's pass

    def _entering(self, layer: int, cache: Any) -> Any:
        def hook(block: Any, args: Any, kwargs: Any) -> None:
            call = arguments(block, args, kwargs)
            self.stream = call.pop(next(iter(call)))
            self.own.calls.append({n: _CACHE if v is cache else v for n, v in call.items()})
            if _CACHE not in self.own.calls[-1].values():
                kind = type(self.pair.tuned).__name__
                raise SurgeryError(f"{kind} keeps no keys and values in layer {layer}: its blocks can't be run apart.")
            self.ends = []
            if layer == 0:
                self.start = resume.at_last(self.own, self.stream, 0).float()
            if layer == self.layers - 1 and not self.per_token:
                raise _Stopped

        return hook

    def _passing(self, value: Tensor) -> None:
        self.ends.append(value)

    def _leaving(self, layer: int) -> Any:
        def hook(block: Any, args: Any, output: Any) -> None:
            stream, ends = self.stream, [*self.ends, first_tensor(output)]
            assert stream is not None
            if self.sublayers and self.tuned.parallel:
                ends[0] = stream + ends[0]
            if not self.per_token:
                ends = [self._at_last(end) for end in ends]
            self._add(layer, stream, ends)
            if layer == self.layers - 1:
                raise _Stopped

        return hook

    def _at_last(self, stream: Tensor) -> Tensor:
        return resume.at_last(self.own, stream, 0)

    # ---- a layer's contributions

    def _add(self, layer: int, stream: Tensor, ends: list[Tensor]) -> None:
        """`ends`: the tuned stream behind each sub-layer, at the tokens that are wanted."""
        forced = ends[0] if self.sublayers and not self.tuned.parallel else None
        would = ends if layer in self.equal else self._ends(self.others, layer, stream, forced)
        starts = [stream if self.per_token else self._at_last(stream), *ends]
        if self.sublayers and self.tuned.parallel and layer not in self.equal:
            would[1] = would[1].float() - would[0].float() + ends[0].float()
        for start, end, base in zip(starts, ends, would, strict=False):
            parts = [base.float() - start.float(), end.float() - base.float()]
            if self.per_token:
                self.sums = [a + b for a, b in zip(self.sums, parts, strict=True)] if self.sums else parts
                parts = [self._at_last(part) for part in parts]
            self.pretraining.append(parts[0])
            self.finetuning.append(parts[1])
        self.end = ends[-1].float() if not self.per_token else self._at_last(ends[-1]).float()
        self.own.calls[layer] = {}

    def _ends(self, recording: Recording, layer: int, stream: Tensor, forced: Tensor | None) -> list[Tensor]:
        """What one model's block makes of the stream; of sublayers also behind attention, where `forced` goes on."""
        if not self.sublayers:
            return [self.through(recording, layer, stream)]
        parallel, seen = self.tuned.parallel, []

        def visit(value: Tensor) -> Tensor | None:
            seen.append(value)
            return None if forced is None else forced.view(value.shape)

        handles = attach(recording.anatomy, self._middle(layer), visit)
        try:
            end = self.through(recording, layer, stream)
        finally:
            detach(handles)
        middle = seen[0].view(end.shape)
        return [middle + (stream if self.per_token else self._at_last(stream)) if parallel else middle, end]

    def _middle(self, layer: int) -> Site:
        return Site("attn_out" if self.tuned.parallel else "resid_mid", layer)


def _first_stream(model: Any, anatomy: Anatomy, batch: Batch) -> Tensor:
    """What enters a model's first block at each last token, float32; NaN for tokens that it has not."""
    size = anatomy.embed.weight.shape[0]
    known = Batch(batch.ids.clamp(max=size - 1), batch.mask)
    found: list[Tensor] = []

    def keep(stream: Tensor) -> None:
        found.append(stream)
        raise _Stopped

    handles = attach(anatomy, Site("resid_pre", 0), keep)
    try:
        with suppress(_Stopped):
            model(**known.inputs(model), use_cache=False)
    finally:
        detach(handles)
    rows = torch.arange(len(batch), device=batch.ids.device)
    last = batch.last
    return found[0][rows, last].float().masked_fill((batch.ids[rows, last] >= size)[:, None], torch.nan)
