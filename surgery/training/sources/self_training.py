"""Fine-tuning on one's own correct completions: expert iteration, rejection sampling, STaR."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.models import encoded_prompts
from surgery.registry import Registry
from surgery.training.data import Row
from surgery.training.signs import TrainingWarning
from surgery.training.sources.base import SOURCES, Source, Update
from surgery.training.sources.on_policy import known_metric

if TYPE_CHECKING:
    from surgery.training.context import Context

SIGNATURES: Registry[Callable[[str], str]] = Registry("way to dedupe")
"""Two completions of a prompt are the same when their signatures are: `dedupe` names one."""
SIGNATURES.register("text")(lambda text: " ".join(text.lower().split()))
SIGNATURES.register("none")(str)


@SIGNATURES.register("equations")
def equations(text: str) -> str:
    """The equations in order of appearance, without spaces (RFT); the text where there is none."""
    found = re.findall(r"[\d+\-*/()%][\d.+\-*/()%]*=\d+(?:\.\d+)?", re.sub(r"[\s,$]", "", text))
    return ";".join(found) or SIGNATURES["text"](text)


@SOURCES.register("expert_iteration")
@dataclass
class ExpertIteration(Source):
    """Rounds of: sample, keep what is right, fine-tune the *current* model on it (Anthony et al. 2017,
    arXiv:1705.08439; for language models Singh et al. 2023, arXiv:2312.06585).

    Each of `prompts` prompts (0: `rollouts.prompts`) is tried `rollouts.group` times; a completion stays when its
    reward (`metric`, by default the sum) is at least `threshold`, no equal one of its prompt is there yet (`dedupe`:
    text, equations or none; with none, copies stay) and fewer than `cap` (0: any number) are. Then come `epochs` passes
    over the kept rows, `batch.rows` a step. `original` adds the prompts' own demonstrations. A round in which nothing
    is kept is left out with a warning; after `patience` of them in a row `SurgeryError` is raised.
    """

    prompts: int = 0
    threshold: float = 1.0
    metric: str = ""
    dedupe: str = "text"
    cap: int = 4
    epochs: int = 1
    original: bool = False
    patience: int = 10
    gives: tuple[str, ...] = field(default=("demonstrations",), init=False)
    samples = True

    def __post_init__(self) -> None:
        SIGNATURES.lookup(self.dedupe)
        if self.epochs < 1 or self.patience < 1 or self.cap < 0 or self.prompts < 0:
            raise SurgeryError("Self-training: epochs and patience must be at least 1, cap and prompts at least 0.")
        self.rounds = 0
        self.kept: list[Row] = []

    def columns(self) -> tuple[str, ...]:
        """Completions are its own, unless it adds the original ones."""
        return ("prompt", "completion") if self.original else ("prompt",)

    def check(self, settings: Mapping[str, Any]) -> None:
        """The metric must be one of the rewards."""
        known_metric(self.metric, settings)

    def draw(self, context: Context) -> list[Update]:
        """The updates of one round."""
        self.kept = self._round(context)
        self.rounds += 1
        return self._updates(self.kept, context, self.epochs * self._batches(context))

    def state_dict(self) -> dict[str, Any]:
        """Rounds so far and the rows that the last one kept."""
        return {"rounds": self.rounds, "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same."""
        self.rounds, self.kept = state["rounds"], state["kept"]

    # ---- parts of a round

    def _round(self, context: Context) -> list[Row]:
        """The rows kept of as many prompts as it takes to keep any."""
        for attempt in range(self.patience):
            rows = context.rows(self.prompts or context.recipe.rollouts.prompts)
            kept = self._correct(rows, context, f"round/{attempt}")
            context.noted["kept"] = float(len(kept))
            if kept:
                original = [dict(row) for row in rows if row.get("completion")] if self.original else []
                return [{**row, "completion": text} for row, text in kept] + original
            warnings.warn(
                f"Round {self.rounds + 1}: no completion of {len(rows)} prompts reached {self.threshold}; skipped.",
                TrainingWarning,
                stacklevel=2,
            )
        raise SurgeryError(
            f"{self.patience} rounds in a row gave no completion to learn from.",
            hint="Easier prompts, a larger rollouts.group, or some supervised fine-tuning first.",
        )

    def _correct(self, rows: Sequence[Row], context: Context, name: str) -> list[tuple[Row, str]]:
        """Rows with completions of theirs that are right."""
        kept = self._tried(rows, [row["prompt"] for row in rows], context, name)
        context.noted["solved"] = len({id(row) for row, _ in kept}) / len(rows)
        return kept

    def _tried(self, rows: Sequence[Row], prompts: Sequence[Any], context: Context, name: str) -> list[tuple[Row, str]]:
        """Completions of `prompts` that are right for `rows`, without doubles."""
        ids = encoded_prompts(context.tokenizer, prompts, context.recipe.chat)
        rollouts = context.generate(ids, name=name)
        group = context.recipe.rollouts.group
        scored = context.score(rows, rollouts, group)
        rewards = scored.components[self.metric] if self.metric else scored.total
        signature, kept = SIGNATURES[self.dedupe], list[tuple[Row, str]]()
        for i, row in enumerate(rows):
            seen = list[str]()
            for rollout, reward in list(zip(rollouts, rewards, strict=True))[i * group : (i + 1) * group]:
                right = reward is not None and reward >= self.threshold and rollout.text.strip()
                new = self.dedupe == "none" or signature(rollout.text) not in seen
                if right and new and (not self.cap or len(seen) < self.cap):
                    seen.append(signature(rollout.text))
                    kept.append((row, rollout.text))
        return kept

    def _batches(self, context: Context) -> int:
        return -(-len(self.kept) // context.recipe.batch.rows)

    def _updates(self, kept: Sequence[Row], context: Context, steps: int) -> list[Update]:
        """`steps` updates: the kept rows in a new order each time they are through."""
        size, updates = context.recipe.batch.rows, list[Update]()
        order: list[Row] = []
        for _ in range(steps):
            if not order:
                order = list(kept)
                context.random(f"epoch/{len(updates)}").shuffle(order)
            rows, order = order[:size], order[size:]
            updates.append(Update({"demonstrations": context.encode(rows)}))
        return updates


@SOURCES.register("rft")
@dataclass
class RejectionSampling(ExpertIteration):
    """Rejection-sampling fine-tuning: *one* round with the model of the start, then epochs over what was kept until the
    run ends (Yuan et al. 2023, arXiv:2308.01825; there k = 100, duplicates by equation list)."""

    dedupe: str = "equations"
    cap: int = 0
    original: bool = True

    def draw(self, context: Context) -> list[Update]:
        """The first time a round; then the same rows again, in another order."""
        if not self.kept:
            self.kept = self._round(context)
        self.rounds += 1
        return self._updates(self.kept, context, self._batches(context))


@SOURCES.register("star")
@dataclass
class STaR(ExpertIteration):
    """Self-taught reasoner (Zelikman et al. 2022, arXiv:2203.14465): each round fine-tunes the model of the *start*.

    What the model fails it may rationalise: it is asked again with the right answer as a hint, and a completion that
    gets there is learned as if there had been none. `hint` is a template over the row's columns; an empty one leaves
    rationalisation out. Round r has `first` * `growth`^r steps (the paper: 40, and 20 % more each round).
    """

    cap: int = 1
    hint: str = "{prompt}\nHint: the answer is {answer}.\n"
    first: int = 40
    growth: float = 1.2
    restarts = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first < 1 or self.growth <= 0:
            raise SurgeryError("Source 'star': first must be at least 1, and growth above 0.")
        if self.hint and "{answer}" not in self.hint:
            raise SurgeryError(f"Source 'star': the hint {self.hint!r} doesn't hold {{answer}}.")

    def columns(self) -> tuple[str, ...]:
        """The hint needs the answer."""
        return ("prompt", "answer") if self.hint else ("prompt",)

    def draw(self, context: Context) -> list[Update]:
        """One outer loop: the first update begins again from the initial weights."""
        self.kept = self._round(context)
        updates = self._updates(self.kept, context, round(self.first * self.growth**self.rounds))
        updates[0].fresh = True
        self.rounds += 1
        return updates

    def _correct(self, rows: Sequence[Row], context: Context, name: str) -> list[tuple[Row, str]]:
        kept = super()._correct(rows, context, name)
        if not self.hint:
            return kept
        solved = {id(row) for row, _ in kept}
        failed = [row for row in rows if id(row) not in solved]
        hinted = [self._hinted(row) for row in failed]
        rationalised = self._tried(failed, hinted, context, f"{name}/hint") if failed else []
        context.noted["rationalised"] = len({id(row) for row, _ in rationalised}) / len(rows)
        return kept + rationalised

    def _hinted(self, row: Row) -> Any:
        """The prompt with its answer: a text, or messages of which the last is changed."""
        prompt = row["prompt"]
        try:
            if isinstance(prompt, str):
                return self.hint.format(**row)
            *before, last = prompt
            return [*before, {**last, "content": self.hint.format(**{**row, "prompt": last["content"]})}]
        except (KeyError, IndexError) as missing:
            raise SurgeryError(
                f"Source 'star': the hint needs column {missing}.", hint=f"Columns: {', '.join(sorted(row))}."
            ) from None
