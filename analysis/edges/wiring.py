"""How the readers and writers of a graph are wired in one model: weights, norms, and the shares of single heads.

Nothing here is an approximation but one thing: where a norm stands between the output projection and the stream (Gemma
2 and 3, OLMo 2) a single head has no write of its own. Its share is what its part of the projection becomes under the
scale that the norm has for all heads together, at the running value; the shares of all heads add up to attn_out.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from analysis.edges.gradients import Passed, passed
from analysis.edges.graph import Block, Graph
from analysis.edges.norms import pulled, statistics
from analysis.metrics import Metric
from surgery.anatomy import Site, anatomy_of
from surgery.anatomy.points import projection
from surgery.errors import SurgeryError
from surgery.models import Batch, untouched

_CHECKED: WeakSet[Any] = WeakSet()


class Wiring:
    """One model's readers and writers. Raises `SurgeryError` when its gradients don't add up to the stream's."""

    def __init__(self, model: Any, split: bool = False) -> None:
        self.model, self.anatomy, self.graph = model, anatomy_of(model), Graph.of(model, split)
        self._linear: dict[int, tuple[Tensor, Tensor]] = {}
        if self.anatomy not in _CHECKED:
            _check(model)
            _CHECKED.add(self.anatomy)

    # ---- readers

    def sites(self, block: Block) -> list[Site]:
        """Where gradients are taken for the readers of a block: behind their projections, or at the stream itself."""
        if block.kind == "attention":
            return [Site(name, block.layer) for name in "qkv"]
        last = Site("resid_post", self.anatomy.n_layers - 1)
        return [last if block.kind == "logits" else Site("mlp_in", block.layer)]

    def stream(self, block: Block) -> Site:
        """The stream that the readers of a block read."""
        if block.kind == "logits":
            return Site("resid_post", self.anatomy.n_layers - 1)
        return Site("resid_pre" if block.kind == "attention" or self.anatomy.parallel else "resid_mid", block.layer)

    def norm(self, block: Block) -> nn.Module | None:
        """The norm between the stream and the readers of a block; the last one is part of the reader `logits`."""
        roles = {"attention": "input_norm", "mlp": "mlp_norm"}
        return None if block.kind == "logits" else self.anatomy.norm(roles[block.kind], block.layer)

    def projected(self, name: str, layer: int) -> tuple[Tensor, Tensor]:
        """Weight (d_model, head, d_head) and bias (head, d_head) of q, k or v: key-value heads for k and v."""
        module, read, _ = projection(self.anatomy, name, layer)
        weight, bias = self._weights(module, self.anatomy.d_model, self.anatomy.embed.weight.dtype)
        return read(weight), read(bias[None])[0]

    def pulled_back(self, block: Block, gradients: list[Tensor], stream: Tensor) -> Tensor:
        """(batch, reader, pos, d_model): gradients at each reader's own copy of the stream (batch, pos, d_model).

        `gradients` are those at `sites(block)`: (batch, pos, head, d_head) each, or (batch, pos, d_model). In float32.
        """
        norm = self.norm(block)
        known = None if norm is None else statistics(norm, stream)
        weight, scale = (1.0, 1.0) if known is None else (known.weight, known.scale)
        if block.kind != "attention":
            behind = (gradients[0].float() * (weight * scale))[:, None]
        else:
            behind = stream.new_empty(len(stream), block.readers.stop - block.readers.start, *stream.shape[1:]).float()
            start = 0
            for name, gradient in zip("qkv", gradients, strict=True):
                stop = start + gradient.shape[2]
                behind[:, start:stop] = self._through(name, block.layer, gradient, weight, scale)
                start = stop
        if norm is None:
            return behind
        return pulled(norm, stream, behind) if known is None else known.pull(behind)

    def _through(self, name: str, layer: int, gradient: Tensor, weight: Any, scale: Any) -> Tensor:
        """Through one projection: (batch, head, pos, d_model), times the norm's weight and scale."""
        into = self.projected(name, layer)[0].float()
        if gradient.shape[2] != into.shape[1]:  # keys and values by the query heads that read them
            into = into.repeat_interleave(gradient.shape[2] // into.shape[1], 1)
        if isinstance(weight, Tensor):
            into, gradient = into * weight[:, None, None], gradient.float() * scale[..., None]
        return torch.einsum("bthe,dhe->bhtd", gradient.float(), into)

    # ---- writers

    def written(self, layer: int, z: Tensor) -> Tensor:
        """(batch, head, pos, d_model) what each head adds to the stream, in float32; z (batch, pos, head, d_head)."""
        anatomy = self.anatomy
        weight, bias = self._weights(anatomy.out(layer), anatomy.n_heads * anatomy.d_head, z.dtype)
        heads = weight.unflatten(0, (anatomy.n_heads, -1)).float()
        made = torch.einsum("bthe,hed->bhtd", z.float(), heads)
        norm = anatomy.norm("attention_norm", layer)
        if norm is None:
            return made
        made = made + bias.float() / anatomy.n_heads
        known = statistics(norm, made.sum(1).to(z.dtype))
        if known is None or known.centred:
            raise SurgeryError(
                f"The norm behind attention in {anatomy.name} does more than scale: single heads write nothing there.",
                hint="Attribute to 'attn_out' with analysis.attribution.",
            )
        return made * (known.weight * known.scale)[:, None]

    def difference(self, layer: int, z: Tensor, other: Tensor) -> Tensor:
        """What heads write with one z less what they write with another."""
        if self.anatomy.norm("attention_norm", layer) is None:
            return self.written(layer, z.float() - other.float())
        return self.written(layer, z) - self.written(layer, other)

    def attention_output(self, layer: int, z: Tensor) -> Tensor:
        """attn_out (batch, pos, d_model) of z."""
        made = self.anatomy.out(layer)(z.flatten(2))
        norm = self.anatomy.norm("attention_norm", layer)
        return made if norm is None else norm(made)

    def _weights(self, module: nn.Module, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if id(module) not in self._linear:
            self._linear[id(module)] = linear(module, width, dtype)
        return self._linear[id(module)]

    def writer_sites(self) -> list[Site]:
        """What a pass must keep so that writers can be told."""
        layers = range(self.anatomy.n_layers)
        return [Site("resid_pre", 0), *(Site(name, layer) for layer in layers for name in ("z", "mlp_out"))]


def linear(module: Any, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight (width, out) and bias (out,) of a projection; views where the module is a plain one.

    Others (adapted, quantised) are asked: the identity goes through them.
    """
    if type(module) is nn.Linear or type(module).__name__ == "Conv1D":
        weight = module.weight.detach()
        weight = weight.t() if type(module) is nn.Linear else weight
        return weight, weight.new_zeros(weight.shape[1]) if module.bias is None else module.bias.detach()
    asked = torch.eye(width + 1, width, dtype=dtype, device=next(module.parameters()).device)  # and zeros at the end
    with torch.no_grad():
        told = module.forward(asked)
    return told[:-1] - told[-1], told[-1]


# ---- the check -----------------------------------------------------------------------------------------------------


def _check(model: Any) -> None:
    """Five tokens: gradients of a layer's readers add up to that of the stream, heads to what attention writes."""
    anatomy = anatomy_of(model)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(3, 8, device=model.device)[None] % vocabulary
    batch = Batch(torch.cat([ids, ids.flip(1)]), torch.ones(2, 5, dtype=torch.bool, device=ids.device))
    tokens = torch.arange(2, device=ids.device)[None].repeat(2, 1)
    metric = Metric("check", lambda logits: logits[..., 0] - 2 * logits[..., 1], "answers", tokens)
    wiring = Wiring.__new__(Wiring)
    wiring.model, wiring.anatomy, wiring.graph, wiring._linear = model, anatomy, Graph.of(model), {}
    blocks, layers = wiring.graph.blocks, range(anatomy.n_layers)
    streams = {wiring.stream(block) for block in blocks} | {Site("resid_pre", layer) for layer in layers}
    kept = [*streams, *(Site(name, layer) for layer in layers for name in ("z", "attn_out"))]
    wanted = list({site: None for block in blocks for site in wiring.sites(block)} | dict.fromkeys(streams))
    with untouched(model):
        found = passed(model, batch, metric, kept, wanted)
        for layer in layers:
            behind = found.gradients[wiring.stream(blocks[2 * layer + 2])]  # what the next block's readers read
            own = sum(_summed(wiring, block, found) for block in blocks[2 * layer : 2 * layer + 2])
            _same(anatomy, f"gradients of layer {layer}", found.gradients[Site("resid_pre", layer)], own + behind)
            heads = wiring.written(layer, found.seen[Site("z", layer)]).sum(1)
            made = found.seen[Site("attn_out", layer)].float()
            _same(anatomy, f"heads of layer {layer}", (made[0] - made[1])[None], (heads[0] - heads[1])[None])


def _summed(wiring: Wiring, block: Block, found: Passed) -> Tensor:
    gradients = [found.gradients[site] for site in wiring.sites(block)]
    return wiring.pulled_back(block, gradients, found.seen[wiring.stream(block)]).sum(1)


def _same(anatomy: Any, what: str, one: Tensor, other: Tensor) -> None:
    precise = torch.finfo(anatomy.embed.weight.dtype).eps if anatomy.embed.weight.is_floating_point() else 1e-2
    scale = float(one.abs().max().clamp(min=1e-6))
    if not float((one.float() - other.float()).abs().max()) <= 256 * precise * scale:
        raise SurgeryError(
            f"The edges of this {anatomy.name} can't be told: the {what} don't add up to those of the stream.",
            hint="Something stands between its stream and its projections that the family does not name. Attribution "
            "of nodes does without: analysis.attribution.",
        )
