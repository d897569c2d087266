"""Signs that a run learns nothing, or the wrong thing; each is told once, with its cause and what to do about it.

| sign | when (means of the last steps) |
|---|---|
| truncated | over half of the completions hit the length limit |
| zero_variance | over 90 % of the groups have equal rewards: no gradient |
| reward/<name> | a reward gave no value at all |
| entropy | the completions of a group are nearly the same text |
| kl | the policy is over a nat a token away from its reference |
| skipped | a step's gradient was not finite |
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.training.recipe import Recipe

RECENT = 5
"""Steps that a sign is read from."""
ENOUGH = 3
"""Steps without which nothing is said, unless the run is shorter."""
TRUNCATED, ZERO_VARIANCE, KL = 0.5, 0.9, 1.0
FLAT, COLLAPSED = 0.01, 0.1
"""Entropy in nats a token that is none at all; share of its first value that makes a collapse."""


class TrainingWarning(UserWarning):
    """Something about a run that its owner should know while it runs."""


class Watch:
    """Remembers the last steps of a run and says what is new to say."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.enough = min(ENOUGH, recipe.steps)
        self.first: dict[str, list[float]] = {}
        self.recent: dict[str, deque[float]] = {}
        self.told: set[str] = set()

    def see(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The sentences that this step's metrics are reason for; none that was said before."""
        for name, value in metrics.items():
            self.recent.setdefault(name, deque(maxlen=RECENT)).append(value)
            first = self.first.setdefault(name, [])
            if len(first) < self.enough:
                first.append(value)
        known = {name for name, values in self.recent.items() if len(values) >= self.enough}
        now = {name: _mean(values) for name, values in self.recent.items() if name in known}
        began = {name: _mean(values) for name, values in self.first.items() if name in known}
        found = signs(now, began, self.recipe)
        if metrics.get("skipped"):
            found["skipped"] = (
                f"step {step} was skipped: its gradient is not finite. A few in a long run do no harm; if there are "
                "more, lower optimizer.lr, or set nonfinite: raise to see the rows."
            )
        new = {name: text for name, text in found.items() if name not in self.told}
        self.told |= new.keys()
        return [f"Step {step}: {text}" if name != "skipped" else text[0].upper() + text[1:]
                for name, text in new.items()]  # fmt: skip


def signs(now: Mapping[str, float], began: Mapping[str, float], recipe: Recipe) -> dict[str, str]:
    """What is wrong by means of the last steps (`now`) and of the first ones (`began`): sentences by sign."""
    found = {}
    limit = recipe.rollouts.max_new_tokens
    if now.get("truncated", 0.0) > TRUNCATED:
        found["truncated"] = (
            f"{now['truncated']:.0%} of the completions were cut off at max_new_tokens={limit}; a completion without "
            "its end rarely earns a reward. Raise rollouts.max_new_tokens, or teach the model to end: SFT first, "
            "rollouts.stop, the reward soft_overlong."
        )
    if now.get("zero_variance", 0.0) > ZERO_VARIANCE and recipe.rollouts.group > 1:  # PPO may draw one a prompt
        found["zero_variance"] = _no_variance(now)
    for name, value in now.items():
        if name.startswith("reward/") and math.isnan(value):
            found[name] = (
                f"the reward '{name.removeprefix('reward/')}' gave None for every completion: it takes no part in "
                "training. Does it read a column that these rows have, and can their answers be parsed?"
            )
    entropy, before = now.get("entropy", math.inf), began.get("entropy", 0.0)
    if entropy < FLAT or entropy < COLLAPSED * before:
        fell = f"fell from {before:.2g} to {entropy:.2g}" if entropy < COLLAPSED * before else f"is {entropy:.2g}"
        found["entropy"] = (
            f"the entropy {fell} nats a token: the completions of a group are nearly the same, and nothing new is "
            "tried. Lower optimizer.lr, raise clip_high or rollouts.temperature, or add an entropy bonus."
        )
    if now.get("kl", 0.0) > KL:
        found["kl"] = (
            f"the KL to the reference is {now['kl']:.2g} nats a token: the policy runs away from the model it was. "
            "Lower optimizer.lr, or raise the objective's beta."
        )
    return found


def _no_variance(now: Mapping[str, float]) -> str:
    """All rewards of a group equal: are the rows too hard, too easy, or is the reward blind?"""
    name = "reward/accuracy" if "reward/accuracy" in now else "reward"
    mean = now.get(name, math.nan)
    what = f"mean {'accuracy' if name != 'reward' else 'reward'} {mean:.2f}"
    if mean < 0.1:
        why = "the rows look too hard: take easier ones, larger groups, or demonstrations (SFT first, prefix_rft)"
    elif mean > 0.9:
        why = "the rows look too easy: take harder ones, or end the run here"
    else:
        why = "each group is all right or all wrong, or the reward tells its completions not apart"
    return f"in {now['zero_variance']:.0%} of the groups all rewards are equal, so they teach nothing; {what}, {why}."


def _mean(values: deque[float] | list[float]) -> float:
    """Over the numbers; NaN when there is none."""
    there = [value for value in values if not math.isnan(value)]
    return fmean(there) if there else math.nan
