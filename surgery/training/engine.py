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
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.decoding import Generator, LocalGenerator, Sampling
from surgery.errors import SurgeryError
from surgery.training import checkpoints, distributed
from surgery.training.batch import Batch
from surgery.training.context import Context
from surgery.training.evaluation import evaluate
from surgery.training.log import Log, rollout_metrics
from surgery.training.memory import estimate, lengths
from surgery.training.moving import Joined, Moving, trained_by
from surgery.training.objectives import Loss
from surgery.training.plan import Plan, plan
from surgery.training.policy import Policy, checkpoints_activations, without_dropout
from surgery.training.recipe import Recipe
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

    The model is trained in place, and apart from its weights left as it was found. `generator` stands in for sampling
    from the policy.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        out: str | Path | None = None,
        backbones: list[nn.Module] | None = None,
        generator: Generator | None = None,
        parts: Plan | None = None,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.recipe, self.model, self.tokenizer = recipe, model, tokenizer
        self.parts = parts or plan(recipe)
        self.out = None if out is None else Path(out)
        self.world = distributed.start(recipe.parallel, recipe.trackers, self.out)
        model.to(self.world.device)
        self.policy = Policy(
            model, backbones or (), share_prompts=recipe.batch.share_prompts, packing=recipe.batch.packing
        )
        objective, source = self.parts.objective, self.parts.source
        torch.manual_seed(recipe.seed)  # modules beside the model begin the same everywhere
        self.policy.extras.update(objective.modules(self.policy))
        self.policy.to(self.world.device)
        distributed.alike(self.policy, self.world)
        self.reference = self.policy.snapshot() if objective.uses_reference else None
        self.initial = copy.deepcopy(model.state_dict()) if getattr(source, "restarts", False) else None
        self.moving = Moving(recipe, self.policy, self.parts.selecting)
        self.sharded = recipe.parallel == "fsdp2" and self.world.size > 1
        samples = "rollouts" in source.gives or getattr(source, "samples", False)
        sampling = Sampling(**recipe.rollouts.model_dump(exclude={"prompts", "group"}))
        if generator is None and samples:
            generator = LocalGenerator(self.policy.decoder(), tokenizer, sampling)
        self.context = Context(
            recipe, self.policy, tokenizer, self.world, self.parts.curricula, self.parts.rewards, generator,
            self.reference,
        )  # fmt: skip
        self.step = 0
        self.drawn: list[Update] = []
        self.pieces: list[Piece] = []
        self.on_step = on_step
        self.log = Log(self.out if self.world.main else None, recipe, self.world)
        prompt, completion = lengths(recipe, self.parts, tokenizer)
        self.memory = estimate(
            recipe, model, self.parts, prompt=prompt, completion=completion, backbones=backbones or (),
            processes=self.world.size,
        )  # fmt: skip

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
            if not self.step and (before := self._evaluated()):  # how good it was, to compare with
                self._told(before)
            while self.step < self.recipe.steps:
                began = time.perf_counter()
                piece = self._next()
                if self.moving.due(self.step):
                    self.moving.select(self.step, self._ahead(piece), self._loss, self.world)
                last = self._update(piece)
                self.step += 1
                self.context.step = self.step
                last |= self._evaluated()
                last["seconds"] = time.perf_counter() - began
                self._told(last)
                every = self.recipe.checkpoint.every
                if self.out is not None and every and self.step % every == 0 and self.step < self.recipe.steps:
                    checkpoints.save(self)
            if self.out is not None:
                checkpoints.finish(self)
        return last

    def _told(self, metrics: dict[str, float]) -> None:
        self.log.step(self.step, metrics)
        if self.on_step:
            self.on_step(self.step, metrics)

    def _next(self) -> Piece:
        """The next piece, drawing when nothing is left."""
        while not self.pieces:
            self.drawn = []
            self._draw()
        return self.pieces.pop(0)

    def _draw(self) -> None:
        """The source's next batches, behind those that are there."""
        first = len(self.drawn)
        self.drawn += self.parts.source.draw(self.context)
        for i in range(first, len(self.drawn)):
            self.pieces += self._cut(i)
        for update in self.drawn[first:]:
            for kind, batch in update.batches.items():
                self._prepare(kind, batch)
        self.context.iteration += 1

    def _ahead(self, piece: Piece) -> Callable[[int], list[Batch]]:
        """Micro-batches of this update and of the next ones, drawn ahead; they are trained on in their turn.

        Whole on every process: what is selected by them does not depend on how many there are.
        """

        def micros(updates: int) -> list[Batch]:
            rollouts = any("rollouts" in update.batches for update in self.drawn)
            while len(self.pieces) + 1 < updates and not rollouts:  # samples of a policy that is to move wait for it
                self._draw()
            return [m for one in [piece, *self.pieces][:updates] for m in self._micros(one, everywhere=True)]

        return micros

    def _loss(self, batch: Batch) -> Tensor:
        """The objective's loss of a micro-batch."""
        with self.context.autocast:
            return self.parts.objective.loss(self.policy, batch.to(self.world.device)).value

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
        with self.context.autocast:
            self.parts.objective.prepare(batch, self.context)
        if kind == "rollouts":
            self.context.curricula["main"].update(batch)
            self.context.noted |= rollout_metrics(batch) | self.context.curricula["main"].metrics()
            self.log.rollouts(self.step + 1, batch)

    def _update(self, piece: Piece) -> dict[str, float]:
        """One optimizer step."""
        update = self.drawn[piece.update]
        if update.fresh:
            self._restart()
            update.fresh = False
        began = time.perf_counter()
        optimizer = self.moving.optimizer(update.optimizer)
        micros = self._micros(piece)
        sums, values = self._backward(micros)
        totals = self.world.summed(sums)
        trained = trained_by(optimizer)
        if not self.sharded:
            distributed.add_gradients(trained, self.world)
        norm = distributed.norm(trained, self.recipe.optimizer.clip)
        finite = math.isfinite(norm) and math.isfinite(totals["loss"][0])
        if finite:
            self._step(optimizer)
        elif self.recipe.nonfinite == "raise":
            optimizer.zero_grad(set_to_none=True)
            raise self._not_finite(micros, values, norm)
        optimizer.zero_grad(set_to_none=True)
        found = {name: total / max(count, 1e-12) for name, (total, count) in totals.items()}
        found |= {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "skipped": float(not finite)}
        found |= self.context.noted
        self.context.seconds["update"] = time.perf_counter() - began
        found |= {f"seconds/{what}": spent for what, spent in self.context.seconds.items()}
        tokens = sum(float(b.lengths.sum()) for b in update.batches.values())
        found["tokens_per_second"] = tokens / max(1e-9, sum(self.context.seconds.values()))
        self.context.seconds, self.context.noted = {}, {}
        return found

    def _micros(self, piece: Piece, everywhere: bool = False) -> list[Batch]:
        """This process's micro-batches of an update (`everywhere`: all rows)."""
        batches = self.drawn[piece.update].batches
        return [m for kind, batch in batches.items() for m in self._micro_batches(kind, batch, piece, everywhere)]

    def _micro_batches(self, kind: str, batch: Batch, piece: Piece, everywhere: bool) -> list[Batch]:
        """Micro-batches of one kind, each knowing the whole update's denominators."""
        whole = (batch if piece.rows is None or kind != "rollouts" else batch.select(piece.rows)).with_totals()
        whole = replace(whole, step=self.step, steps=self.recipe.steps)
        alone = everywhere or self.world.size == 1
        mine = whole if alone else whole.select(self.world.share(range(len(whole)), whole.group))
        if not len(mine):  # more processes than groups: take part in the collectives, add nothing
            mine = whole.select(range(whole.group))
            mine.columns["idle"] = torch.ones(len(mine))
        rows = self.recipe.batch.micro_batch or len(mine)
        if self.parts.objective.whole_groups and rows % mine.group:
            rows = max(1, rows // mine.group) * mine.group
        return mine.chunks(rows) if rows < len(mine) else [mine]

    def _backward(self, micros: list[Batch]) -> tuple[dict[str, tuple[float, float]], list[float]]:
        """Gradients of all micro-batches, summed; metrics as (sum, count), and each micro-batch's loss."""
        sums: dict[str, tuple[float, float]] = {"loss": (0.0, 1.0 / self.world.size)}
        values = []
        scale = self.world.size if self.sharded else 1  # FSDP2 takes the mean over processes
        if self.sharded:  # every pass is a collective: all processes make the same number
            rounds = max(self.world.gather(len(micros)))
            idle = replace(micros[0], columns={**micros[0].columns, "idle": torch.ones(len(micros[0]))})
            micros = micros + [idle] * (rounds - len(micros))
        for micro in micros:
            with self.context.autocast:
                loss: Loss = self.parts.objective.loss(self.policy, micro.to(self.world.device))
                value = loss.value * 0.0 if "idle" in micro else loss.value
            (value * scale).backward()
            values.append(float(value.detach()))
            sums["loss"] = (sums["loss"][0] + values[-1], sums["loss"][1])
            for name, (total, count) in ({} if "idle" in micro else loss.metrics).items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + float(total), before[1] + float(count))
        return sums, values

    def _step(self, optimizer: torch.optim.Optimizer | Joined) -> None:
        settings = self.recipe.optimizer
        factor = learning_rate(
            self.step, self.recipe.steps, shape=settings.shape, warmup=settings.warmup, final=settings.final
        )
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * factor
        optimizer.step()

    def _restart(self) -> None:
        assert self.initial is not None, "a source that restarts says so by `restarts`"
        self.policy.model.load_state_dict(self.initial)
        self.moving.forget()

    def _evaluated(self) -> dict[str, float]:
        settings = self.recipe.evaluate
        if self.parts.evaluation is None or (self.step % settings.every and self.step != self.recipe.steps):
            return {}
        with self.context.autocast:
            return {f"eval/{k}": v for k, v in evaluate(self.context, self.parts.evaluation).items()}

    # ---- the model as it was found

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Modes, flags and trainable parameters as the recipe wants them; afterwards as they were."""
        model = self.policy.model
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        modes = [(m, m.training) for m in self.policy.modules()]
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        checkpointed = checkpoints_activations(model)
        hooked = bool(getattr(model, "_require_grads_hooks", None))
        with ExitStack() as stack:
            try:
                self.moving.begin()
                if self.recipe.gradient_checkpointing and not checkpointed:
                    enable: Any = model.gradient_checkpointing_enable
                    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                if self.recipe.dropout:
                    self.policy.train()
                    self.policy.backbones.eval()
                else:
                    stack.enter_context(without_dropout(self.policy))
                for policy in (self.policy, self.reference) if self.sharded else ():
                    if policy is not None:
                        distributed.shard(policy, self.world, half=self.recipe.precision == "bfloat16")
                yield
            finally:
                if self.recipe.gradient_checkpointing and not checkpointed:
                    model.gradient_checkpointing_disable()  # type: ignore[operator]
                    if not hooked:  # transformers leaves a hook on the input embedding
                        model.disable_input_require_grads()  # type: ignore[operator]
                self.moving.release()
                for name, p in model.named_parameters():
                    p.requires_grad_(flags[name])
                    p.grad = None
                stack.close()
                for m, training in modes:
                    m.training = training
                if use_cache is not None:
                    model.config.use_cache = use_cache  # type: ignore[union-attr]

    def _not_finite(self, micros: list[Batch], values: list[float], norm: float) -> SurgeryError:
        """Which rows made the loss infinite or NaN: those of one process are told by all."""
        bad = [_rows_told(m) for m, v in zip(micros, values, strict=False) if not math.isfinite(v)]
        told = next((part[0] for part in self.world.gather(bad) if part), None)
        if told is None:
            return SurgeryError(
                f"Step {self.step + 1}: the gradient is not finite (norm {norm}), though the losses are.",
                hint="Lower the learning rate, or set nonfinite: skip.",
            )
        return SurgeryError(
            f"Step {self.step + 1}: the loss is not finite in a micro-batch of {told}.",
            hint="Smaller batch.micro_batch narrows it down; nonfinite: skip goes on without such steps.",
        )


def _rows_told(batch: Batch) -> str:
    """The rows of a micro-batch, so that a reader can find them."""
    row = batch.rows[0]
    text = str(row.get("completion_text", row.get("completion", row.get("chosen", ""))))[:80]
    rows = f"{len(batch)} row{'s' * (len(batch) > 1)}"
    return f"{rows}, the first with prompt {str(row.get('prompt'))[:80]!r} and completion {text!r}"
