"""Is a skill that fine-tuning hid still there? Neurons whose removal brings it back, and how soon training does.

    scores = neuron_scores(tuned, lessons(tokenizer, old_rows))      # (batch, layer, neuron)
    order = worst(scores)                                            # those that hurt the old task most
    with pruned(tuned, order[:10]):                                  # the parameters stay as they are
        evaluate(tuned, old_rows, tokenizer=tokenizer)
    prune_curve(tuned, order, [0, 5, 15, 50], {"old": ..., "new": ...}).plot()
    revival({"hidden": tuned, "never had it": control}, tokenizer, old_rows, held_out, lrs=[1e-5, 1e-4], steps=500)

The study of wrappers, Jain et al., "Mechanistically analyzing the effects of fine-tuning on procedurally defined tasks"
(ICLR 2024, arXiv:2311.12786): pruning a few neurons restores the task of pre-training, and tuning back takes far fewer
steps than a model needs that never had it. `analysis.probes` asks the third question: whether it can still be decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from analysis.prompts import by_length
from analysis.results import Result, stack
from analysis.revival import Revival as Revival
from analysis.revival import revival as revival
from surgery.activations import edit
from surgery.activations.interventions import detach, unwrapped
from surgery.anatomy import Anatomy, Site, anatomy_of
from surgery.anatomy.points import attach
from surgery.errors import SurgeryError
from surgery.models import Batch, encode, encoded_prompts, tokenized, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

Neuron = tuple[int, int]
"""Layer and index in its MLP."""
Loss = Callable[[Any, Any], Tensor]
"""The loss of a model on a batch, one number that can be differentiated."""


# ---- the loss of a task


@dataclass(frozen=True, eq=False)
class Lesson:
    """Prompts with their completions, and which tokens are to be predicted."""

    batch: Batch
    scored: Tensor
    """(batch, pos) True on the tokens of the completions and their end marks."""


def lessons(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 32, chat: bool = False
) -> list[Lesson]:
    """Rows with `prompt` and `completion` as batches of similar length. Raises `SurgeryError` for rows without."""
    if not rows:
        raise SurgeryError("No rows.")
    if missing := [i for i, row in enumerate(rows) if not {"prompt", "completion"} <= set(row)]:
        raise SurgeryError(f"Row {missing[0]} has no prompt and completion: {', '.join(rows[missing[0]])}.")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = encoded_prompts(tokenizer, [row["prompt"] for row in rows], chat)
    answers = tokenized(tokenizer, [row["completion"] for row in rows], special=False)
    whole = [p + a + end for p, a in zip(prompts, answers, strict=True)]
    found = []
    for index in by_length(whole, batch_size):
        batch = encode(None, [whole[i] for i in index])
        begins = torch.tensor([len(prompts[i]) for i in index])[:, None]
        found.append(Lesson(batch, batch.mask & (torch.arange(batch.ids.shape[1]) >= begins)))
    return found


def completion_loss(model: Any, lesson: Lesson) -> Tensor:
    """Mean negative log-probability, in nats, of the tokens that a lesson scores."""
    logits = model(**lesson.batch.inputs(model), use_cache=False).logits[:, :-1]
    wanted = lesson.scored[:, 1:].to(logits.device)
    return torch.nn.functional.cross_entropy(logits[wanted].float(), lesson.batch.ids[:, 1:].to(logits.device)[wanted])


# ---- scores


def neuron_scores(
    model: Any, batches: Iterable[Any], loss: Loss = completion_loss, *, weights: Literal["out", "all"] = "out"
) -> Result:
    """Gradient times weight of every neuron of every MLP, (batch, layer, neuron): the most harmful have the largest.

    s_n = sum_w dL/dw * w over the neuron's weights in the second projection ("out"), and with "all" over its rows and
    biases in the first projections too. `loss(model, batch)` is the loss of the task that is wanted back. Removing a
    neuron takes its output away, which to first order changes L by -s_n of "out"; "all" counts each factor of that
    output (twice, with a gate three times, where the activation is linear). The mean over batches is the score.
    Raises `SurgeryError` for mixtures of experts, and for a loss that is no number or does not run the model.
    """
    if weights not in ("out", "all"):
        raise SurgeryError(f"weights={weights!r}: expected 'out' or 'all'.")
    model = unwrapped(model)
    anatomy = anatomy_of(model)
    widths = [anatomy.d_mlp(layer) for layer in range(anatomy.n_layers)]
    rows = []
    for batch in batches:
        each = _scores(model, anatomy, partial(loss, model, batch), weights)
        rows.append(np.stack([np.pad(s, (0, max(widths) - len(s)), constant_values=np.nan) for s in each]))
    if not rows:
        raise SurgeryError("No batches.")
    axes = {"batch": range(len(rows)), "layer": range(anatomy.n_layers), "neuron": range(max(widths))}
    return Result(np.stack(rows), axes, "gradient x weight", meta={"weights": weights, "centre": 0})


def _scores(model: Any, anatomy: Anatomy, loss: Callable[[], Tensor], weights: str) -> list[np.ndarray]:
    """Each neuron's value is multiplied by 1: the gradient of that 1 is the sum of gradient times weight behind it.

    Of the first projections likewise; where there is a gate, what it multiplies scales the output as the second
    projection does, and has the same sum.
    """
    device = anatomy.embed.weight.device
    layers, family = range(anatomy.n_layers), anatomy.family
    names = ["mlp_post"] if weights == "out" else ["mlp_post", "mlp_pre"]
    sites = anatomy.expand(names)
    ones = {s: torch.ones(anatomy.d_mlp(s.layer or 0), device=device, requires_grad=True) for s in sites}
    scaled: dict[Any, Any] = {site: partial(_times, one) for site, one in ones.items()}
    with untouched(model, gradients=True), edit(model, scaled):
        value = loss()
        if not isinstance(value, Tensor) or value.numel() != 1 or value.grad_fn is None:
            raise SurgeryError("The loss is not one number that depends on the model.",
                               hint="loss(model, batch) runs the model and gives a scalar tensor.")  # fmt: skip
        found = dict(zip(ones, torch.autograd.grad(value.reshape(()), list(ones.values())), strict=True))
    gated = family.gate is not None or family.gate_up is not None
    total = {layer: found[Site("mlp_post", layer)] * (2.0 if gated and weights == "all" else 1.0) for layer in layers}
    if weights == "all":
        total = {layer: score + found[Site("mlp_pre", layer)] for layer, score in total.items()}
    return [total[layer].double().cpu().numpy() for layer in layers]


def _times(one: Tensor, value: Tensor) -> Tensor:
    """In float32 at least, so that the gradient is summed over the tokens in it."""
    return value * one if value.dtype.itemsize >= 4 else (value.float() * one).to(value.dtype)


def worst(scores: Result, k: int | None = None) -> list[Neuron]:
    """The k neurons (all) with the largest mean score, the largest first: those to prune."""
    cells = scores.top(scores.mean.size if k is None else k)
    return [(layer, neuron) for layer, neuron, _ in cells]


def random_order(scores: Result, seed: int = 0) -> list[Neuron]:
    """The same neurons in random order: what pruning that many of any kind does."""
    everyone = worst(scores)
    return [everyone[i] for i in np.random.default_rng(seed).permutation(len(everyone))]


# ---- pruning


@contextmanager
def pruned(model: Any, neurons: Iterable[Neuron | str | Site]) -> Iterator[Any]:
    """The model with the outputs of some neurons at zero: (layer, neuron), or sites "mlp_post.3.17".

    As if their weights were zero, in every way the model is run (generation, `evaluate`, training); no parameter is
    touched, and afterwards nothing is left. Contexts nest. Raises `SurgeryError` for a neuron that is none.
    """
    inner = unwrapped(model)
    anatomy = anatomy_of(inner)
    chosen: dict[int, list[int]] = {}
    for neuron in neurons:
        site = Site("mlp_post", *map(int, neuron)) if isinstance(neuron, tuple) else Site.parse(neuron)
        if site.name != "mlp_post" or site.layer is None or site.head is None or site.position is not None:
            raise SurgeryError(f"'{site}' is no neuron.", hint="(layer, neuron), or 'mlp_post.3.17'.")
        anatomy.expand([site])
        if not 0 <= site.head < anatomy.d_mlp(site.layer) or site.layer < 0:
            raise SurgeryError(f"'{site}': layer {site.layer} has neurons 0 to {anatomy.d_mlp(site.layer) - 1}.")
        chosen.setdefault(site.layer, []).append(site.head)
    handles: list[Any] = []
    try:
        for layer, index in chosen.items():
            handles += attach(anatomy, Site("mlp_post", layer), partial(_silenced, torch.tensor(sorted(set(index)))))
        yield model
    finally:
        detach(handles)


def _silenced(index: Tensor, value: Tensor) -> Tensor:
    return value.index_fill(-1, index.to(value.device), 0)


@dataclass(frozen=True, eq=False)
class PruneCurve:
    """What is left of each task when so many neurons are pruned."""

    results: Mapping[str, Result]
    """By task: (example, pruned)."""

    def summary(self) -> list[dict[str, Any]]:
        """One row a task and number of neurons, as plain JSON."""
        rows = []
        for task, result in self.results.items():
            one = result.summary()
            for i, k in enumerate(result.axes["pruned"]):
                rows.append({"task": task, "pruned": k, **{key: one[key][i] for key in ("mean", "low", "high")}})
        return rows

    def plot(self, title: str = "") -> Figure:
        """A curve a task, with intervals."""
        from analysis.plots import curves

        first = next(iter(self.results.values()))
        series = {task: (result.mean, *result.interval()) for task, result in self.results.items()}
        return curves(first.axes["pruned"], series, x_label="neurons pruned", y_label=first.name, title=title)


def prune_curve(
    model: Any, neurons: Sequence[Neuron], ks: Iterable[int], evaluate: Mapping[str, Callable[[Any], Result]]
) -> PruneCurve:
    """Evaluates each task with the first k of `neurons` pruned, for each k; the model stays as it is.

    `evaluate` has a function of the model for each task, giving a result on the same examples every time:
    {"old": lambda m: analysis.evaluate.evaluate(m, old_rows, tokenizer=tokenizer), ...}. Raises `SurgeryError` for a k
    beyond the neurons.
    """
    counts = sorted(set(ks))
    if not counts or not evaluate:
        raise SurgeryError("No number of neurons to prune." if evaluate else "No task to evaluate.")
    if counts[0] < 0 or counts[-1] > len(neurons):
        raise SurgeryError(f"k = {counts[-1] if counts[0] >= 0 else counts[0]}: there are {len(neurons)} neurons.")
    found: dict[str, dict[int, Result]] = {task: {} for task in evaluate}
    for k in counts:
        with pruned(model, neurons[:k]) as less:
            for task, ask in evaluate.items():
                found[task][k] = ask(less)
    return PruneCurve({task: stack(by_k, "pruned") for task, by_k in found.items()})
