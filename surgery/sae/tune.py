"""SAE-tuning: a LoRA learns to do behind a dictionary's reconstruction what the model does without it.

    tuned = tune(target, dictionary, "resid_post.2", batches)      # an ordinary model; the target is as it was

    teacher   adapters off, nothing replaced                       p
    student   adapters on, the site's x replaced by D(x)           q
    loss = (1 - labels) KL(p || q) + labels CE

Both are sums over real tokens, divided by the rows of a batch. As published (Resa, arXiv:2506.09967; in form that of
arXiv:2501.19406) the teacher is the target itself, there is no label term, and D is a dictionary of a *source*, better
than the target at something: the source enters through D alone. The loss asks for robustness against D's error, so
what a gain is due to needs controls (tune_arms.py).

The reconstruction is taken without gradient. Where all of the residual stream is replaced, nothing below gets one: only
the LoRA above the site learns. `gradient` (stand_in.py) changes that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from surgery.activations.interventions import edit, unwrapped
from surgery.errors import SurgeryError
from surgery.models import Batch, as_batch, untouched
from surgery.sae.dictionary import Dictionary
from surgery.sae.stand_in import GRADIENTS, Stand, check_site, in_float32, stand_in
from surgery.sae.text import Counted, Text

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

AT_ONCE = 1 << 24
"""Logits whose divergence is taken at a time."""
IGNORED = -100
"""The label of a token that is not learned."""


@dataclass(frozen=True)
class Adapter:
    """The LoRA: Resa's on every projection of attention and MLP, or on `modules`."""

    rank: int = 32
    alpha: float = 128.0
    dropout: float = 0.05
    modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise SurgeryError(f"A dropout is from 0 up to 1, found {self.dropout:g}.")


# ---- the loss


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) summed over all tokens, of logits (tokens, vocabulary).

    Many tokens are taken in parts, computed again in the backward pass: log-probabilities are never there as a whole.
    """
    rows = max(1, AT_ONCE // p.shape[-1])
    if len(p) <= rows:
        return _divergence(p, q)
    parts = zip(p.split(rows), q.split(rows), strict=True)
    return torch.stack([checkpoint(_divergence, *part, use_reentrant=False) for part in parts]).sum()


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the log-probability of each next label, summed; (batch, pos, vocabulary) and (batch, pos)."""
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def labels_of(thing: Any, batch: Batch) -> Tensor:
    """(batch, pos) what is learned: the mapping's own "labels", the tokens that count, or all behind the first."""
    own = thing["labels"] if isinstance(thing, Mapping) and "labels" in thing else batch.ids
    there = batch.mask & (batch.positions > 0)
    if isinstance(thing, Counted):
        there &= thing.counts.to(there.device)
    return torch.as_tensor(own).to(batch.ids.device).masked_fill(~there, IGNORED)


# ---- the run


def tune(
    target: Any,
    dictionary: Dictionary | Stand | None,
    site: str | None,
    batches: Iterable[Any],
    *,
    teacher: Literal["self"] | nn.Module = "self",
    labels: float = 0.0,
    gradient: str = "none",
    adapter: Adapter | None = None,
    lr: float = 1e-6,
    epochs: int = 2,
    steps: int | None = None,
    clip: float = 1.0,
    seed: int = 0,
    gradient_checkpointing: bool = False,
    keep: bool = False,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Any:
    """The target with a LoRA trained on `batches` and merged in, in evaluation mode. Defaults are Resa's.

    `dictionary` stands in at `site` in the student's passes; None: nothing does. `teacher` is the target before, or
    another model that reads the same tokens (the source). `labels` is the share of the label loss, 1 without a teacher.
    `batches` is whatever `as_batch` takes, gone through `epochs` times or up to `steps` updates by AdamW; a mapping may
    have "labels" beside "input_ids", -100 where nothing is learned. `on_step(step, {"loss", "kl", "ce", "grad_norm"})`.

    With `keep` the PEFT model is returned, the target inside: `surgery.tuning.decomposed.export` writes its adapter.
    Raises `SurgeryError` for a site or widths that don't fit, another vocabulary, a run in which nothing can learn, and
    a loss that is not finite.
    """
    from surgery.tuning.decomposed import lora, merged

    model, adapter = unwrapped(target), adapter or Adapter()
    _check(model, dictionary, site, teacher, labels, gradient, batches, epochs, steps)
    others = [m for m in (teacher, getattr(dictionary, "dictionary", dictionary)) if isinstance(m, nn.Module)]
    tuned: Any = None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(list(range(torch.cuda.device_count()))))
        stack.enter_context(untouched(model, *others, gradients=True))
        before = dict(vars(model))
        try:
            with _checkpointing(model) if gradient_checkpointing else nullcontext():
                tuned = lora(model, rank=adapter.rank, alpha=adapter.alpha, modules=adapter.modules, seed=seed,
                             dropout=adapter.dropout)  # fmt: skip
                for name, module in model.named_modules():
                    if name.endswith(".lora_dropout"):
                        module.train()
                torch.manual_seed(seed)
                _learn(
                    tuned, in_float32(dictionary, model.device), site, _repeated(batches, epochs, steps),
                    teacher=teacher, labels=labels, gradient=gradient, lr=lr, clip=clip, on_step=on_step,
                )  # fmt: skip
            tuned.eval()
            if not keep:
                found = merged(tuned)
                for name in vars(found).keys() - before.keys():
                    delattr(found, name)
        except BaseException:
            keep = False
            raise
        finally:
            if tuned is not None and not keep:
                tuned.unload()
                for name in vars(model).keys() - before.keys():
                    delattr(model, name)
    if not keep:
        return found.requires_grad_(True)
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return tuned.eval()


def transplanted(target: Any, tuned: Any, sibling: Any, scale: float = 1.0) -> PreTrainedModel:
    """A copy of `sibling` with what `tuned` has over `target` (a task vector, of low rank after `tune`) added.

    Raises `SurgeryError` where their tensors do not fit.
    """
    from surgery.weights.vector import TaskVector

    found = copy.deepcopy(unwrapped(sibling))
    models: Any = unwrapped(target), unwrapped(tuned)
    TaskVector.between(*models).unbound().apply_to(found, scale)
    return found


def _learn(
    tuned: PeftModel, dictionary: Dictionary | Stand | None, site: str | None, stream: Iterator[Any], *, teacher: Any,
    labels: float, gradient: str, lr: float, clip: float, on_step: Any,
) -> None:  # fmt: skip
    """The steps, in place."""
    model = unwrapped(tuned)
    moving = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=lr, weight_decay=0.0)
    step = 0
    for step, thing in enumerate(stream, 1):
        batch = as_batch(thing).to(model.device)
        inputs = batch.inputs(model) | {"use_cache": False}
        wanted = _wanted(tuned, teacher, inputs, batch) if labels < 1 else None
        edits: Any = {} if dictionary is None else {site: stand_in(dictionary, gradient, step)}
        with edit(model, edits):  # backward too: checkpointing makes the passes again
            logits = model(**inputs).logits
            parts = {}
            if wanted is not None:
                parts["kl"] = divergence(wanted, logits[batch.mask]) / len(batch)
            if labels:
                parts["ce"] = label_loss(logits, labels_of(thing, batch)) / len(batch)
            weights = {"kl": 1 - labels, "ce": labels}
            loss = torch.stack([weights[name] * value for name, value in parts.items()]).sum()
            if not loss.requires_grad:
                raise SurgeryError(f"Nothing can learn: no adapter lies above '{site}', and no gradient goes below it.",
                                   hint="Take an earlier site, or gradient='straight'.")  # fmt: skip
            if not bool(loss.isfinite()):
                raise SurgeryError(f"Step {step}: the loss is not finite.",
                                   hint="Lower the learning rate, or look at the dictionary's weights.")  # fmt: skip
            loss.backward()
        norm = float(nn.utils.clip_grad_norm_(moving, clip or math.inf))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            told = {name: float(value.detach()) for name, value in parts.items()}
            on_step(step, {"loss": float(loss.detach()), **told, "grad_norm": norm})
    if not step:
        raise SurgeryError("There are no batches to tune on.", hint="surgery.models.encode makes one of texts.")


@torch.no_grad()
def _wanted(tuned: Any, teacher: Any, inputs: Mapping[str, Any], batch: Batch) -> Tensor:
    """The teacher's logits at real tokens, (tokens, vocabulary)."""
    if teacher == "self":
        with tuned.disable_adapter():
            return unwrapped(tuned)(**inputs).logits[batch.mask]
    moved = {k: v.to(teacher.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return teacher(**moved).logits.to(batch.ids.device)[batch.mask]


def _repeated(batches: Iterable[Any], epochs: int, steps: int | None) -> Iterator[Any]:
    taken = 0
    for _ in range(epochs):
        for thing in batches:
            if taken == steps:
                return
            taken += 1
            yield thing


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    """Activations are computed again in the backward pass; the model's own dropout stays out of it."""
    from surgery.training.policy import checkpoints_activations, without_dropout

    on = checkpoints_activations(model)
    hooks = [(module._forward_hooks, set(module._forward_hooks)) for module in model.modules()]
    try:
        if not on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with without_dropout(model):
            yield
    finally:
        if not on:
            model.gradient_checkpointing_disable()
        for now, before in hooks:
            for key in set(now) - before:  # of transformers and of PEFT, for gradients behind input embeddings
                del now[key]


def _check(
    model: Any, by: Any, site: str | None, teacher: Any, labels: float, gradient: str, batches: Any, epochs: int,
    steps: int | None,
) -> None:  # fmt: skip
    """Raises `SurgeryError` for what could not work, before anything is changed."""
    GRADIENTS.lookup(gradient)
    if not 0 <= labels <= 1:
        raise SurgeryError(f"'labels' is the share of the label loss, from 0 to 1, found {labels:g}.")
    if epochs > 1 and iter(batches) is batches:
        raise SurgeryError("These batches can be read once, and two epochs are asked for.",
                           hint="Give a list of them, or epochs=1.")  # fmt: skip
    if isinstance(batches, Text) and steps is None:
        raise SurgeryError("Texts are read without end, and no number of steps is given.", hint="steps=1000")
    if by is None and teacher == "self" and labels == 0:
        raise SurgeryError("Nothing can be learned: without a dictionary the target is its own teacher already.",
                           hint="Give a dictionary, another teacher, or labels.")  # fmt: skip
    if teacher != "self" and labels < 1:
        sizes = [m.get_output_embeddings().weight.shape[0] for m in (model, teacher)]
        if sizes[0] != sizes[1]:
            raise SurgeryError(f"The target's vocabulary has {sizes[0]:,} tokens and the teacher's {sizes[1]:,}.",
                               hint="What one model says can be taught to one that reads the same tokens.")  # fmt: skip
    if by is not None:
        check_site(model, by, site)
