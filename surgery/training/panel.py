"""What is seen while a run goes on: a live panel on a terminal, a plain line every few seconds elsewhere.

with watching(recipe) as seen:
    train(recipe=recipe, on_step=seen)
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.panel import Panel as Drawn

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 24
"""Characters of a sparkline."""
EVERY = 5.0
"""Seconds between two plain lines."""
PACE = 20
"""Steps that the remaining time is reckoned from."""

ROWS: list[tuple[str, str, str]] = [
    ("loss", "loss", ".4g"),
    ("grad_norm", "grad norm", ".3g"),
    ("loss/*", "loss: {}", ".4g"),
    ("fvu", "unexplained variance", ".1%"),
    ("fvu/*", "unexplained: {}", ".1%"),
    ("l0", "codes a row", ".1f"),
    ("l0/*", "codes a row: {}", ".1f"),
    ("dead", "dead latents", ".1%"),
    ("dead/*", "dead latents: {}", ".1%"),
    ("nll", "-log p of a token", ".4g"),
    ("reward", "reward", ".3f"),
    ("reward/*", "  {}", ".3f"),
    ("length", "length", ".1f"),
    ("truncated", "truncated", ".0%"),
    ("zero_variance", "groups of equal rewards", ".0%"),
    ("entropy", "entropy", ".3g"),
    ("kl", "KL to the reference", ".3g"),
    ("eval/*", "held out: {}", ".3g"),
    ("tokens_per_second", "tokens/s", ",.0f"),
]
"""Metric, what it is called, and how its numbers are written; `*` is each that begins so."""

ON_POLICY = "loss (about 0 is normal: see grad norm)"
"""In the first update made of a batch of rollouts every ratio is 1, and advantages are centred."""


class Panel:
    """The numbers of a run as a rich panel (`render`) or as a line of text (`line`); call it as `on_step`."""

    def __init__(self, steps: int, title: str = "", *, rollouts: bool = False) -> None:
        self.steps, self.title, self.rollouts = steps, title, rollouts
        self.step = 0
        self.history: dict[str, list[float]] = {}
        self.warnings: list[str] = []
        self.began = time.monotonic()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in a step."""
        self.step = step
        for name, value in metrics.items():
            self.history.setdefault(name, []).append(value)

    def warn(self, text: str) -> None:
        """Shows a warning below the numbers from here on."""
        self.warnings.append(text)

    @property
    def left(self) -> float:
        """Seconds to the end at the pace of the last steps; NaN before the first."""
        pace = self.history.get("seconds", [])[-PACE:]
        return (self.steps - self.step) * sum(pace) / len(pace) if pace else math.nan

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, last value, sparkline) of every number there is."""
        found = []
        for pattern, label, form in ROWS:
            stem = pattern.removesuffix("*")
            names = [n for n in self.history if n == pattern or (stem != pattern and n.startswith(stem))]
            if pattern == "reward/*" and len(names) == 1:
                continue  # a lone component is the reward
            for name in names:
                values = self.history[name]
                told = ON_POLICY if name == "loss" and self.rollouts else label.format(name.removeprefix(stem))
                found.append((told, _number(values[-1], form), sparkline(values)))
        return found

    def line(self) -> str:
        """`step 12/40 · loss 0.01 · reward 0.43 · ... · 2,100 tokens/s · 1.2 min left`."""
        skip = {"tokens/s"} | ({ON_POLICY} if self.rollouts else set())
        parts = [f"{name.strip()} {value}" for name, value, _ in self.rows() if name not in skip]
        speed = [f"{value} tokens/s" for name, value, _ in self.rows() if name == "tokens/s"]
        return " · ".join([f"step {self.step}/{self.steps}", *parts, *speed, *self._left()])

    def render(self) -> Drawn:
        """The panel as it is now."""
        from rich.console import Group
        from rich.panel import Panel as Drawn
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(justify="right", style="bold", min_width=8)
        table.add_column(no_wrap=True)
        for name, value, spark in self.rows():
            table.add_row(Text(name), value, spark)
        spent = [f"{duration(time.monotonic() - self.began)} so far", *self._left()]
        what = f"step {self.step} of {self.steps} · " + " · ".join(spent)
        done = round(60 * min(1.0, self.step / self.steps))
        bar = Text.assemble(("━" * done, "green"), ("─" * (60 - done), "dim"))
        told = [Text(f"note: {text}", style="yellow") for text in self.warnings]
        return Drawn(Group(what, bar, table, *told), title=Text(self.title), title_align="left", expand=False)

    def _left(self) -> list[str]:
        return [] if math.isnan(self.left) or self.step >= self.steps else [f"{duration(self.left)} left"]


class Lines(Panel):
    """The same as plain lines: one every few seconds, and one for the last step."""

    def __init__(self, steps: int, title: str = "", *, rollouts: bool = False, stream: TextIO, every: float) -> None:
        super().__init__(steps, title, rollouts=rollouts)
        self.stream, self.every, self.told = stream, every, self.began

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes in a step, and tells it when it is time."""
        super().__call__(step, metrics)
        if time.monotonic() - self.told >= self.every or step == self.steps:
            self.told = time.monotonic()
            print(self.line(), file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        """Tells a warning at once."""
        super().warn(text)
        print(f"note: {text}", file=self.stream, flush=True)


@contextmanager
def watching(
    recipe: Any, *, stream: TextIO | None = None, title: str = "", rollouts: bool = False, every: float = EVERY
) -> Iterator[Panel]:
    """A panel of a recipe's `steps`, to pass as `on_step`.

    Live where `stream` (default: stderr) is a terminal, else lines every few seconds.

    `rollouts`: the run samples, so that its loss says little. Warnings of the training go to the panel meanwhile.
    """
    stream, title = stream or sys.stderr, title or recipe.name
    if not stream.isatty():
        lines = Lines(recipe.steps, title, rollouts=rollouts, stream=stream, every=every)
        with _warnings_to(lines):
            yield lines
        return
    from rich.console import Console
    from rich.live import Live

    panel = Panel(recipe.steps, title, rollouts=rollouts)
    with _warnings_to(panel), Live(get_renderable=panel.render, console=Console(file=stream), refresh_per_second=2):
        yield panel


@contextmanager
def _warnings_to(panel: Panel) -> Iterator[None]:
    """Inside, `TrainingWarning`s are the panel's to show."""
    from surgery.training.signs import TrainingWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always", TrainingWarning)
        usual = warnings.showwarning

        def show(message: Any, category: Any, *more: Any, **rest: Any) -> None:
            if issubclass(category, TrainingWarning):
                panel.warn(str(message))
            else:
                usual(message, category, *more, **rest)

        warnings.showwarning = show
        yield


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """The course of `values` in at most `width` characters, each a mean over its part; a gap where there is no number.

    >>> sparkline([0, 1, 2, 3])
    '▁▃▆█'
    """
    n = min(width, len(values))
    parts = [values[len(values) * i // n : len(values) * (i + 1) // n] for i in range(n)]
    means = [_mean([v for v in part if math.isfinite(v)]) for part in parts]
    there = [m for m in means if not math.isnan(m)]
    if not there:
        return " " * n
    low, span = min(there), max(there) - min(there)
    return "".join(" " if math.isnan(m) else BARS[round(7 * (m - low) / span) if span else 0] for m in means)


def duration(seconds: float) -> str:
    """75 -> "1:15"; 4000 -> "1:06:40"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"
