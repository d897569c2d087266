"""How much of a logit difference each head and MLP writes: direct logit attribution, and how fine-tuning changed it.

With x the last block's output at the last token, LD = (W_U[y] - W_U[y']) LN(x) + b. At the scale that LN has on x (its
"frozen" scale) LN is affine, x is a sum of what embedding, heads, MLPs and biases wrote, and so LD is the sum of what
each of them writes by itself. Nothing is left over: `direct_logit_attribution(...).reduce("component", "sum")` is the
logit difference. Where a norm stands behind attention (Gemma 2 and 3, OLMo 2) its scale is frozen as well. Where the
model caps its logits, LD is before the cap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.metrics import answer_logit, logit_diff
from analysis.results import Result
from surgery.activations import run
from surgery.activations.interventions import unwrapped
from surgery.activations.resume import written_by_heads
from surgery.anatomy import Anatomy, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, Pair, as_batch, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FrozenNorm:
    """A norm at the scale that it has on x: u -> scale * C(u) * weight, C centring where it does, and its bias apart.

    Found by trying the module itself, so that it holds for LayerNorm, RMSNorm and Gemma's (1 + weight) alike.
    """

    weight: Tensor
    """(d_model,)"""
    bias: Tensor
    """(d_model,)"""
    scale: Tensor
    """(batch, 1)"""
    centred: bool

    @classmethod
    def at(cls, norm: nn.Module, x: Tensor) -> FrozenNorm:
        """Of the module at x (batch, d_model). Raises `SurgeryError` when it is no norm of this form."""
        ones = x.new_ones(1, x.shape[-1])
        signs = ones.clone()
        signs[:, 1::2] = -1
        bias = norm(ones * 0).double()[0]
        centred = bool((norm(ones).double() - bias).abs().max() < 1e-3 * (norm(signs).double() - bias).abs().max())
        weight = (norm(signs).double() - bias)[0] / _centred(signs.double(), centred)[0]
        wanted, plain = norm(x).double() - bias, _centred(x.double(), centred) * weight
        scale = (wanted * plain).sum(-1, keepdim=True) / plain.square().sum(-1, keepdim=True).clamp(min=1e-300)
        if (wanted - scale * plain).norm() > (1e-4 if x.dtype == torch.float32 else 3e-2) * wanted.norm():
            raise SurgeryError(f"{type(norm).__name__} is no norm with a scale: its logits can't be attributed.")
        return cls(weight, bias, scale, centred)

    def __call__(self, u: Tensor) -> Tensor:
        """(..., batch, d_model): what is left of a part of x, at the frozen scale and without the bias."""
        return self.scale * _centred(u.double(), self.centred) * self.weight


def _centred(u: Tensor, centred: bool) -> Tensor:
    return u - u.mean(-1, keepdim=True) if centred else u


def direct_logit_attribution(model: Any, prompts: Any, answers: Any, *, tokenizer: Any = None) -> Result:
    """What each component adds to logit[y] - logit[y'] at the last token, (example, component); their sum is all of it.

    `answers` (batch, 2) are token ids, the right one first; (batch,) attributes the logit of one. Components: "embed",
    "z.3.2" (layer, head), "attn_bias.3", "mlp_out.3", and "bias" of the last norm and the head. Column "logit" has what
    the model itself says. Raises `SurgeryError` when prompts and answers differ in number.
    """
    model = unwrapped(model)
    anatomy, batch = anatomy_of(model), as_batch(prompts, tokenizer)
    return _attributed(model, anatomy, batch, _answers(answers, batch))


def direct_logit_attribution_difference(pair: Pair, prompts: Any, answers: Any) -> Result:
    """The attribution of the tuned model minus the base's; the sum is the change of the logit difference.

    Columns "base" and "tuned" have the logit differences of the two. As `direct_logit_attribution`.
    """
    batch = prompts if isinstance(prompts, Batch) else pair.encode(prompts)
    tuned, base = (direct_logit_attribution(model, batch, answers) for model in (pair.tuned, pair.base))
    columns = {"base": base.columns["logit"], "tuned": tuned.columns["logit"]}
    return Result(tuned.values - base.values, tuned.axes, "attribution, tuned - base", columns, {"centre": 0})


def attribution_map(result: Result, title: str = "") -> Figure:
    """The mean attribution by layer, a column a head, and one for the MLP; embeddings and biases in the title."""
    from analysis.plots import diverging_map

    mean = dict(zip(result.axes["component"], result.mean, strict=True))
    heads = [name.split(".") for name in mean if name.startswith("z.")]
    layers, width = 1 + max(int(h[1]) for h in heads), 1 + max(int(h[2]) for h in heads)
    values = np.full((layers, width + 1), np.nan)
    for _, layer, head in heads:
        values[int(layer), int(head)] = mean[f"z.{layer}.{head}"]
    values[:, width] = [mean[f"mlp_out.{layer}"] for layer in range(layers)]
    rest = mean["bias"] + sum(mean[f"attn_bias.{layer}"] for layer in range(layers))
    said = f"embedding {mean['embed']:+.2f}, biases {rest:+.2f}, all {result.values.sum(1).mean():+.2f}"
    return diverging_map(values, range(layers), [*range(width), "MLP"], column_label="head", unit="logits",
                         title=f"{title or result.name}: {said}")  # fmt: skip


def _answers(answers: Any, batch: Batch) -> Tensor:
    """(batch, 1 or 2) token ids."""
    tokens = torch.as_tensor(answers)
    metric = answer_logit(tokens) if tokens.dim() == 1 else logit_diff(tokens)  # which refuse what is no token
    tokens = metric.tokens if metric.tokens is not None else tokens
    if len(tokens) != len(batch):
        raise SurgeryError(f"There are {len(batch)} prompts and {len(tokens)} answers.")
    return tokens


def _attributed(model: Any, anatomy: Anatomy, batch: Batch, tokens: Tensor) -> Result:
    """Everything at the last token, so that the arithmetic is small; float64 behind the modules."""
    layers = range(anatomy.n_layers)
    wanted = ["resid_pre.0@-1", f"resid_post.{anatomy.n_layers - 1}@-1", *(f"z.{i}@-1" for i in layers)]
    _, seen = run(model, batch, [*wanted, *(f"mlp_out.{i}@-1" for i in layers)], stop=True)
    head = anatomy.head
    if type(head) is not nn.Linear:
        raise SurgeryError(f"The head is a {type(head).__name__}: logits are attributed through a plain linear one.")
    with untouched(model):
        last = seen[wanted[1]]
        norm = FrozenNorm.at(anatomy.final_norm, last)
        rows = head.weight[tokens.to(head.weight.device)].double()
        row = (rows[:, 0] - rows[:, 1] if rows.shape[1] == 2 else rows[:, 0]) * anatomy.logit_scale
        found: dict[str, Tensor] = {"embed": (norm(seen[wanted[0]]) * row).sum(-1)}
        for layer in layers:
            z = seen[f"z.{layer}@-1"]
            heads = written_by_heads(anatomy, layer, z[:, None], range(anatomy.n_heads))[:, :, 0]  # (head, batch, d)
            bias = anatomy.out(layer)(torch.zeros_like(z).flatten(-2))
            inner = anatomy.norm("attention_norm", layer)
            if inner is not None:
                behind = FrozenNorm.at(inner, heads.sum(0) + bias)
                heads, bias = behind(heads), behind(bias) + behind.bias
            for i, written in enumerate(heads):
                found[f"z.{layer}.{i}"] = (norm(written) * row).sum(-1)
            found[f"attn_bias.{layer}"] = (norm(bias) * row).sum(-1)
            found[f"mlp_out.{layer}"] = (norm(seen[f"mlp_out.{layer}@-1"]) * row).sum(-1)
        found["bias"] = row @ norm.bias
        measured = (anatomy.final_norm(last).double() * row).sum(-1)
        if head.bias is not None:
            offset = head.bias[tokens.to(head.bias.device)].double()
            offset = (offset[:, 0] - offset[:, 1] if offset.shape[1] == 2 else offset[:, 0]) * anatomy.logit_scale
            found["bias"], measured = found["bias"] + offset, measured + offset
    values = torch.stack(list(found.values()), dim=1).cpu().numpy()
    axes = {"example": range(len(batch)), "component": list(found)}
    return Result(values, axes, "attribution", {"logit": measured.cpu().tolist()}, {"centre": 0})
