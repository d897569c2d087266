"""TuCo, the tuning contribution: how much of what a fine-tuned model does to a prompt is its fine-tuning.

Nuti, Franzmeyer and Henriques (ICML 2025). On the tuned model's own stream each block's update falls into what the base
would have added and the rest, x_{l+1} = x_l + PTC_l + FTC_l; at the last token of a prompt

    I_P = sum_l PTC_l      I_F = sum_l FTC_l      TuCo = ||I_F||_1 / (||I_P||_1 + ||I_F||_1)      PreCo = 1 - TuCo

    found = tuco(pair, prompts)                     # 1.2 forward passes of the tuned model
    print(found)                                    # TuCo 0.281 [0.274, 0.288] n=64
    found.plot()                                    # beta_l, the cumulative share behind each block
    auc_between(found, tuco(pair, other_prompts))   # do the two sets differ?

The prompt must be the same for both models, chat template and all. Embeddings are the tuned model's; how far the base's
are from them is reported apart. The last norm and the head play no part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analysis import plots
from analysis.prompts import Progress, by_length
from analysis.results import Result
from analysis.similarity import Auc, auc
from surgery.activations.decomposition import decompose, read
from surgery.activations.pairs import Granularity, equal_layers, pair_of
from surgery.activations.passes import run
from surgery.anatomy import Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, Pair, encode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.html import Html

# ---- pure functions


def share(pretraining: Float[Tensor, "... d"], finetuning: Float[Tensor, "... d"]) -> Tensor:
    """||finetuning||_1 / (||pretraining||_1 + ||finetuning||_1) over the last axis; 0 where both are 0."""
    p, f = pretraining.abs().sum(-1), finetuning.abs().sum(-1)
    return torch.where(p + f == 0, 0.0, f / (p + f))


def contribution(ptc: Float[Tensor, "layer ... d"], ftc: Float[Tensor, "layer ... d"]) -> Tensor:
    """TuCo: sums over layers first, then the norms, so that the order of the layers plays no part."""
    return share(ptc.sum(0), ftc.sum(0))


def cumulative(ptc: Float[Tensor, "layer ... d"], ftc: Float[Tensor, "layer ... d"]) -> Float[Tensor, "layer ..."]:
    """beta_l, the share of fine-tuning in the sums over layers 0 to l. The last one is TuCo.

    Its maximum bounds how far the two models' outputs are apart (proposition 4.2 of the paper).
    """
    return share(ptc.cumsum(0), ftc.cumsum(0))


# ---- results


@dataclass(frozen=True)
class TuCo:
    """TuCo of a set of prompts, and where it comes from. Every part is a `Result` over the same examples."""

    value: Result
    """TuCo, one number an example."""
    beta: Result
    """(example, layer) the cumulative share behind each layer."""
    pretraining: Result
    """(example, layer) ||PTC_l||_1."""
    finetuning: Result
    """(example, layer) ||FTC_l||_1."""
    embedding: Result
    """Share of the tuned model's own x_0: ||d||_1 / (||x_0 of the base||_1 + ||d||_1), d the difference of both x_0.
    In neither contribution. NaN where the last token is not in the base's vocabulary."""
    tokens: Result | None = None
    """(example, position) TuCo of every token; NaN on padding. Only when asked for."""

    @property
    def pre(self) -> Result:
        """PreCo = 1 - TuCo."""
        value = self.value
        return Result(1 - value.values, value.axes, "PreCo", value.columns, value.meta)

    @property
    def largest_beta(self) -> Result:
        """max_l beta_l, one number an example."""
        return self.beta.reduce("layer", "max")

    def __len__(self) -> int:
        return len(self.value)

    def __str__(self) -> str:
        return str(self.value)

    def plot(self, by: str | None = None, *, title: str = "Tuning contribution by layer") -> Figure:
        """beta_l with 95 % intervals over the layers, a curve for each group of column `by`."""
        groups = {str(name): part for name, part in self.beta.by(by).items()} if by else {"beta": self.beta}
        series = {name: (part.mean, *part.interval()) for name, part in groups.items()}
        return _over_layers(self.beta.axes["layer"], series, "cumulative share of fine-tuning", title)

    def plot_norms(self, *, title: str = "What a layer adds at the last token") -> Figure:
        """||PTC_l||_1 and ||FTC_l||_1 with 95 % intervals over the layers."""
        parts = {"PTC (base)": self.pretraining, "FTC (fine-tuning)": self.finetuning}
        series = {name: (part.mean, *part.interval()) for name, part in parts.items()}
        return _over_layers(self.beta.axes["layer"], series, "L1 norm", title)

    def html(self, examples: Sequence[int] | None = None, *, title: str = "TuCo by token") -> Html:
        """The prompts with each token coloured by its TuCo, as a page for a notebook or a file.

        Raises `SurgeryError` when tokens were not measured.
        """
        from analysis.html import coloured_many

        if self.tokens is None:
            raise SurgeryError("TuCo of single tokens was not measured.", hint="tuco(..., per_token=True)")
        chosen = range(len(self)) if examples is None else examples
        lengths, texts = self.tokens.columns["length"], self.tokens.columns["tokens"]
        parts = [(texts[i], self.tokens.values[i, : lengths[i]].tolist()) for i in chosen]
        captions = [f"example {self.value.labels[i]}: TuCo {self.value.values[i]:.3f}" for i in chosen]
        return coloured_many(parts, captions=captions, title=title, unit="TuCo")


def _over_layers(steps: Sequence[Any], series: Mapping[str, Any], y_label: str, title: str) -> Figure:
    """Curves over layers, of which sub-layers lie half a layer apart."""
    halves = any(isinstance(step, str) for step in steps)
    places = [int(s.partition(".")[0]) + 0.5 * s.endswith("mlp") if isinstance(s, str) else s for s in steps]
    x_label = "layer (attention; MLP half a step behind)" if halves else "layer"
    return plots.curves(places, series, x_label=x_label, y_label=y_label, title=title)


def compare(sets: Mapping[str, TuCo | Result], *, title: str = "Tuning contribution of prompt sets") -> Figure:
    """TuCo of several sets of prompts side by side: every prompt a point, with the quartiles of its set."""
    return plots.groups({n: _value(part).values.tolist() for n, part in sets.items()}, unit="TuCo", title=title)


def auc_between(upper: TuCo | Result, lower: TuCo | Result) -> Auc:
    """Probability that a prompt of `upper` has a higher TuCo than one of `lower`, with a 95 % interval (see `auc`)."""
    return auc(_value(upper).values, _value(lower).values)


def _value(found: TuCo | Result) -> Result:
    return found.value if isinstance(found, TuCo) else found


# ---- measuring


def tuco(
    pair: Pair | tuple[Any, Any] | Any,
    prompts: Any,
    *,
    tokenizer: Any = None,
    granularity: Granularity = "block",
    per_token: bool = False,
    chat: bool = False,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> TuCo:
    """TuCo of each prompt at its last token, in about 1.2 forward passes of the tuned model; both models unchanged.

    `pair` is a `Pair`, (base, tuned), or a PEFT model, whose base is itself without the adapter. `prompts` are texts,
    chats, lists of token ids or a `Batch`; padding on either side makes no difference. `per_token` adds every token's
    TuCo, for two passes. `granularity="sublayer"` (not in the paper) decomposes attention and MLP one after the other:
    another decomposition, with other numbers. Arithmetic on contributions is float32; where weights are in 16 bits
    the streams are rounded to these, and so is what is measured (equal weights still give 0).
    Raises `SurgeryError` for models that don't fit together, tokenizers that disagree, and processed weights.
    """
    both = pair_of(pair, tokenizer)
    whole = read(both, prompts, chat=chat)
    rows = [ids[real].tolist() for ids, real in zip(whole.ids, whole.mask, strict=True)]
    if batch_size < 1:
        raise SurgeryError(f"batch_size is at least 1, and not {batch_size}.")
    found: dict[str, list[Any]] = {name: [None] * len(rows) for name in ("value", "beta", "p", "f", "x0", "tokens")}
    steps: list[str] = []
    equal = equal_layers(anatomy_of(both.base), anatomy_of(both.tuned))  # type: ignore[arg-type]
    for part in by_length(rows, batch_size, progress):
        batch = encode(None, [rows[i] for i in part])
        seen = decompose(both, batch, granularity=granularity, per_token=per_token, equal=equal)
        steps, ptc, ftc = seen.steps, seen.pretraining, seen.finetuning
        columns = {
            "value": contribution(ptc, ftc),
            "beta": cumulative(ptc, ftc).T,
            "p": ptc.abs().sum(-1).T,
            "f": ftc.abs().sum(-1).T,
            "x0": share(seen.base_start, seen.start - seen.base_start),
        }
        if seen.tokens is not None:
            columns["tokens"] = share(*seen.tokens)
        for name, values in columns.items():
            for row, i in zip(values.double().cpu().numpy(), part, strict=True):
                found[name][i] = row
    return _results(both, whole, rows, found, steps, granularity, per_token)


def _results(
    pair: Pair, whole: Batch, rows: list[list[int]], found: dict[str, list[Any]], steps: list[str], granularity: str,
    per_token: bool,
) -> TuCo:  # fmt: skip
    columns: dict[str, Any] = {"length": [len(row) for row in rows]}
    meta = {"granularity": granularity, "norm": "L1", "position": "last token"}
    example = {"example": range(len(rows))}
    layer = {**example, "layer": [int(step) for step in steps] if granularity == "block" else steps}

    def result(key: str, name: str, axes: Mapping[str, Any]) -> Result:
        return Result(np.array(found[key]), axes, name, columns, meta)

    tokens = None
    if per_token:
        width = max(map(len, rows))
        values = np.full((len(rows), width), np.nan)
        for i, row in enumerate(rows):
            values[i, : len(row)] = found["tokens"][i][: len(row)]
        texts = [[str(t) for t in row] for row in rows] if pair.tokenizer is None else whole.tokens(pair.tokenizer)
        axes = {**example, "position": range(width)}
        tokens = Result(values, axes, "TuCo", {**columns, "tokens": texts}, meta | {"position": "every token"})
    return TuCo(
        result("value", "TuCo", example), result("beta", "beta", layer), result("p", "||PTC||", layer),
        result("f", "||FTC||", layer), result("x0", "embedding", example), tokens,
    )  # fmt: skip


def output_contribution(
    pair: Pair | tuple[Any, Any] | Any,
    prompts: Any,
    *,
    tokenizer: Any = None,
    chat: bool = False,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Result:
    """OutputCo, to hold beside TuCo: how far the two models' last streams are apart, each model on its own.

    ||x_L of the tuned - x_L of the base||_1 / (||x_L of the base||_1 + the same), at the last token (the paper leaves
    the token open). Two forward passes. Raises `SurgeryError` as `tuco`, and for tokens that the base has not.
    """
    both = pair_of(pair, tokenizer)
    whole = read(both, prompts, chat=chat)
    rows = [ids[real].tolist() for ids, real in zip(whole.ids, whole.mask, strict=True)]
    anatomy = anatomy_of(both.base)  # type: ignore[arg-type]
    size = anatomy.embed.weight.shape[0]
    for i, row in enumerate(rows):
        if max(row) >= size:
            raise SurgeryError(f"Prompt {i} has the token {max(row)}, which is not in the base's vocabulary of {size}.")
    site = Site("resid_post", anatomy.n_layers - 1, position=-1)
    values = np.zeros(len(rows))
    for part in by_length(rows, batch_size, progress):
        batch = encode(None, [rows[i] for i in part])
        base, tuned = (run(m, batch, [site], stop=True)[1][site].float() for m in (both.base, both.tuned))
        values[part] = share(base, tuned - base).double().cpu().numpy()
    return Result.of(values, name="OutputCo", columns={"length": [len(row) for row in rows]})
