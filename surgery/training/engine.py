"""The training loop, once for all objectives: draw, prepare, update, remember.

    source.draw -> batches of rollouts, demonstrations or pairs
    objective.prepare -> advantages, reference log-probabilities
    objective.loss on micro-batches -> backward -> one optimizer step
    curriculum.update, log, evaluate, checkpoint

What differs between published methods is in the plug-ins (sources, rewards, advantages, objectives, curricula,
schedules), never here.
"""

from __future__ import annotations

import copy
import fnmatch
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.training import checkpoints, distributed
from surgery.training.batch import Batch
from surgery.training.context import Context
from surgery.training.evaluation import evaluate
from surgery.training.log import Log, rollout_metrics
from surgery.training.objectives import Loss
from surgery.training.plan import Plan, plan
from surgery.training.policy import Policy, checkpoints_activations, without_dropout
from surgery.training.recipe import Recipe
from surgery.training.rollouts import Generator, LocalGenerator, Sampling
from surgery.training.schedules import learning_rate
from surgery.training.sources import Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Piece:
    """What one optimizer step takes of a drawn update: rows of its batches (None: all of them)."""

    update: int
    rows: list[int] | None = None


class Trainer:
    """One run: `Trainer(recipe, model, tokenizer).run()`.

    The model is trained in place, and apart from its weights left as it was found. `masks` maps parameter names to
    boolean tensors: entries where they are False keep their bits. `generator` stands in for sampling from the policy.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        out: str | Path | None = None,
        backbones: list[nn.Module] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        generator: Generator | None = None,
        parts: Plan | None = None,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.recipe, self.model, self.tokenizer = recipe, model, tokenizer
        self.parts = parts or plan(recipe)
        self.out = None if out is None else Path(out)
        self.world = distributed.start(recipe.parallel, recipe.precision, recipe.trackers, self.out)
        model.to(self.world.device)
        self.policy = Policy(
            model, backbones or (), share_prompts=recipe.batch.share_prompts, packing=recipe.batch.packing
        )
        objective, source = self.parts.objective, self.parts.source
        torch.manual_seed(recipe.seed)  # modules beside the model begin the same everywhere
        self.policy.extras.update(objective.modules(self.policy))
        self.policy.to(self.world.device)
        self.reference = self.policy.snapshot() if objective.uses_reference else None
        self.initial = copy.deepcopy(model.state_dict()) if getattr(source, "restarts", False) else None
        self.masks = dict(masks or {})
        self.wrapped = distributed.wrapped(self.policy, recipe.parallel, self.world)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        samples = "rollouts" in source.gives or getattr(source, "samples", False)
        sampling = Sampling(**recipe.rollouts.model_dump(exclude={"prompts", "group"}))
        if generator is None and samples:
            generator = LocalGenerator(self.policy.decoder(), tokenizer, sampling)  # type: ignore[arg-type]
        self.context = Context(
            recipe, self.policy, tokenizer, self.world, self.parts.curricula, self.parts.rewards, generator,
            self.reference,
        )  # fmt: skip
        self.step = 0
        self.drawn: list[Update] = []
        self.pieces: list[Piece] = []
        self.on_step = on_step
        self.log = Log(self.out if self.world.main else None, recipe, self.world)

    # ---- the loop

    def run(self, *, resume: bool = False) -> dict[str, float]:
        """Trains to the recipe's last step; returns the last line of metrics.

        With `out`, the folder holds the model, metrics.jsonl, rollouts.jsonl, curves.png and checkpoints. `resume`
        goes on from the last checkpoint there, bit for bit. Raises `SurgeryError` for bad rewards and for a loss or
        gradient that is not finite.
        """
        last: dict[str, float] = {}
        with self._prepared(), self.log:
            if resume:
                checkpoints.load(self)
            elif self.out is not None:
                checkpoints.begin(self)
            while self.step < self.recipe.steps:
                began = time.perf_counter()
                piece = self._next()
                last = self._update(piece)
                self.step += 1
                self.context.step = self.step
                last |= self._evaluated()
                last["seconds"] = time.perf_counter() - began
                self.log.step(self.step, last)
                if self.on_step:
                    self.on_step(self.step, last)
                every = self.recipe.checkpoint.every
                if self.out is not None and every and self.step % every == 0 and self.step < self.recipe.steps:
                    checkpoints.save(self)
            if self.out is not None:
                checkpoints.finish(self)
        return last

    def _next(self) -> Piece:
        """The next piece, drawing when nothing is left."""
        while not self.pieces:
            self.drawn = self.parts.source.draw(self.context)
            self.pieces = [piece for i in range(len(self.drawn)) for piece in self._cut(i)]
            for update in self.drawn:
                for kind, batch in update.batches.items():
                    self._prepare(kind, batch)
            self.context.iteration += 1
        return self.pieces.pop(0)

    def _cut(self, index: int) -> list[Piece]:
        """A batch of rollouts in `epochs` passes of `minibatches` updates, whole groups shuffled; others whole."""
        settings, batches = self.recipe.batch, self.drawn[index].batches
        if "rollouts" not in batches or settings.epochs * settings.minibatches == 1:
            return [Piece(index)]
        batch = batches["rollouts"]
        if "old_log_probs" not in batch:
            batch["old_log_probs"] = batch["sampled_log_probs"]
        pieces = []
        for epoch in range(settings.epochs):
            groups = list(range(len(batch) // batch.group))
            Random(self.context.seed("minibatches", epoch)).shuffle(groups)
            for m in range(settings.minibatches):
                part = groups[len(groups) * m // settings.minibatches : len(groups) * (m + 1) // settings.minibatches]
                pieces.append(Piece(index, [g * batch.group + i for g in part for i in range(batch.group)]))
        return [piece for piece in pieces if piece.rows]

    def _prepare(self, kind: str, batch: Batch) -> None:
        batch.step, batch.steps = self.step, self.recipe.steps
        with self._autocast():
            self.parts.objective.prepare(batch, self.context)
        if kind == "rollouts":
            self.context.curricula["main"].update(batch)
            self.context.noted |= rollout_metrics(batch)
            self.log.rollouts(self.step + 1, batch)

    def _update(self, piece: Piece) -> dict[str, float]:
        """One optimizer step."""
        update = self.drawn[piece.update]
        if update.fresh:
            self._restart()
            update.fresh = False
        began = time.perf_counter()
        micros = [m for kind, batch in update.batches.items() for m in self._micro_batches(kind, batch, piece)]
        sums, values = self._backward(micros)
        for name, p in self.policy.model.named_parameters():
            if name in self.masks and p.grad is not None:
                p.grad *= self.masks[name].to(p.grad.dtype)
        optimizer = self._optimizer(update.optimizer)
        norm = distributed.norm([p for g in optimizer.param_groups for p in g["params"]], self.recipe.optimizer.clip)
        finite = norm == norm and abs(norm) != float("inf")
        if finite:
            self._step(optimizer)
        elif self.recipe.nonfinite == "raise":
            optimizer.zero_grad(set_to_none=True)
            raise _not_finite(self.step + 1, micros, values, norm)
        optimizer.zero_grad(set_to_none=True)
        found = {name: total / max(count, 1e-12) for name, (total, count) in self.world.summed(sums).items()}
        found |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "skipped": float(not finite)}
        found |= self.context.noted
        self.context.seconds["update"] = time.perf_counter() - began
        found |= {f"seconds/{what}": spent for what, spent in self.context.seconds.items()}
        tokens = sum(float(b.lengths.sum()) for b in update.batches.values())
        found["tokens_per_second"] = tokens / max(1e-9, sum(self.context.seconds.values()))
        self.context.seconds, self.context.noted = {}, {}
        return found

    def _micro_batches(self, kind: str, batch: Batch, piece: Piece) -> list[Batch]:
        """This process's micro-batches of an update, each knowing the whole update's denominators."""
        whole = (batch if piece.rows is None or kind != "rollouts" else batch.select(piece.rows)).with_totals()
        whole = replace(whole, step=self.step, steps=self.recipe.steps)
        mine = whole.select(self.world.share(range(len(whole)), whole.group))
        if not len(mine):  # more processes than groups: take part in the collectives, add nothing
            mine = whole.select(range(whole.group))
            mine.columns["idle"] = torch.ones(len(mine))
        rows = self.recipe.batch.micro_batch or len(mine)
        if self.parts.objective.whole_groups and rows % mine.group:
            rows = max(1, rows // mine.group) * mine.group
        return mine.chunks(rows)

    def _backward(self, micros: list[Batch]) -> tuple[dict[str, tuple[float, float]], list[float]]:
        """Gradients of all micro-batches, summed; metrics as (sum, count), and each micro-batch's loss."""
        sums: dict[str, tuple[float, float]] = {"loss": (0.0, 1.0 / self.world.size)}
        values = []
        if self.recipe.parallel == "fsdp2":  # every pass is a collective: all processes make the same number
            rounds = max(self.world.gather(len(micros)))
            idle = replace(micros[0], columns={**micros[0].columns, "idle": torch.ones(len(micros[0]))})
            micros = micros + [idle] * (rounds - len(micros))
        for i, micro in enumerate(micros):
            with distributed.without_sync(self.wrapped, i + 1 < len(micros)), self._autocast():
                loss: Loss = self.parts.objective.loss(self.wrapped, micro.to(self.world.device))
                value = loss.value * 0.0 if "idle" in micro else loss.value
                (value * self.world.size).backward()
            values.append(float(value.detach()))
            sums["loss"] = (sums["loss"][0] + values[-1], sums["loss"][1])
            for name, (total, count) in ({} if "idle" in micro else loss.metrics).items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + float(total), before[1] + float(count))
        return sums, values

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        settings = self.recipe.optimizer
        factor = learning_rate(
            self.step, self.recipe.steps, shape=settings.shape, warmup=settings.warmup, final=settings.final
        )
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * factor
        parameters = dict(self.policy.model.named_parameters())
        before = {name: parameters[name].detach().clone() for name in self.masks}
        optimizer.step()
        with torch.no_grad():
            for name, mask in self.masks.items():
                parameters[name].copy_(torch.where(mask.to(parameters[name].device), parameters[name], before[name]))

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        """AdamW with moments of its own for each name; matrices decay, vectors do not."""
        if name not in self.optimizers:
            self.optimizers[name] = checkpoints.adamw(self.policy, self.recipe)
        return self.optimizers[name]

    def _restart(self) -> None:
        assert self.initial is not None, "a source that restarts says so by `restarts`"
        self.policy.model.load_state_dict(self.initial)
        self.optimizers.clear()

    def _evaluated(self) -> dict[str, float]:
        settings = self.recipe.evaluate
        if self.parts.evaluation is None or (self.step % settings.every and self.step != self.recipe.steps):
            return {}
        with self._autocast():
            return {f"eval/{k}": v for k, v in evaluate(self.context, self.parts.evaluation).items()}

    # ---- the model as it was found

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Modes, flags and trainable parameters as the recipe wants them; afterwards as they were."""
        model = self.policy.model
        flags = [(p, p.requires_grad) for p in model.parameters()]
        modes = [(m, m.training) for m in model.modules()]
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        checkpointed = checkpoints_activations(model)
        with ExitStack() as stack:
            try:
                self._choose_parameters()
                if self.recipe.gradient_checkpointing and not checkpointed:
                    enable: Any = model.gradient_checkpointing_enable
                    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                if self.recipe.dropout:
                    self.policy.train()
                else:
                    stack.enter_context(without_dropout(self.policy))
                yield
            finally:
                if self.recipe.gradient_checkpointing and not checkpointed:
                    model.gradient_checkpointing_disable()  # type: ignore[operator]
                for p, wanted in flags:
                    p.requires_grad_(wanted)
                    p.grad = None
                stack.close()
                for m, training in modes:
                    m.training = training
                if use_cache is not None:
                    model.config.use_cache = use_cache  # type: ignore[union-attr]

    def _choose_parameters(self) -> None:
        """Only parameters that fit `trainable` and none of `frozen` move."""
        chosen = 0
        for name, p in self.policy.model.named_parameters():
            wanted = self.recipe.trainable is None and p.requires_grad
            wanted |= any(fnmatch.fnmatch(name, pattern) for pattern in self.recipe.trainable or [])
            wanted &= not any(fnmatch.fnmatch(name, pattern) for pattern in self.recipe.frozen)
            p.requires_grad_(wanted)
            chosen += wanted
        if not chosen:
            raise SurgeryError("No parameter of the model may move.", hint="Look at `trainable` and `frozen`.")

    def _autocast(self) -> Any:
        return self.world.accelerator.autocast()


def _not_finite(step: int, micros: list[Batch], values: list[float], norm: float) -> SurgeryError:
    """Which rows made the loss infinite or NaN."""
    bad = [m for m, v in zip(micros, values, strict=False) if v != v or abs(v) == float("inf")]
    if not bad:
        return SurgeryError(
            f"Step {step}: the gradient is not finite (norm {norm}), though the losses are.",
            hint="Lower the learning rate, or set nonfinite: skip.",
        )
    row = bad[0].rows[0]
    text = str(row.get("completion_text", row.get("completion", "")))[:80]
    return SurgeryError(
        f"Step {step}: the loss is not finite in a micro-batch of {len(bad[0])} rows, the first with prompt "
        f"{str(row.get('prompt'))[:80]!r} and completion {text!r}.",
        hint="Smaller batch.micro_batch narrows it down; nonfinite: skip goes on without such steps.",
    )
