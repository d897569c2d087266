"""What do the rewards reward? A table for hand-made completions, and one for the rollout log of a run.

print(audit({"accuracy": 1, "cosine_length": {"max_len": 50}}, ["#7", "", "#8 " * 40], row).render())
print(audit_log("runs/grpo/rollouts.jsonl").render())
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.training.rewards.base import Row, text_of
from surgery.training.rewards.build import build_rewards

if TYPE_CHECKING:
    from rich.table import Table

TOTAL = "total"


@dataclass(frozen=True)
class Line:
    """One completion and what it earned."""

    prompt: str
    completion: str
    length: int
    values: dict[str, float | None]
    """By component, and the weighted `total`."""
    step: int = 0
    group: int = 0
    truncated: bool = False


@dataclass(frozen=True)
class Component:
    """One component over all completions."""

    scored: int
    """Completions that it gave a number."""
    mean: float | None
    std: float | None
    least: float | None
    most: float | None
    constant_groups: float | None
    """Share of the groups with two or more scored completions in which all values are equal."""
    correlations: dict[str, float | None]
    """Pearson's r with `length` and with every other component; None where either is constant."""
    top: list[Line]
    bottom: list[Line]


@dataclass(frozen=True)
class Audit:
    """Completions with their rewards, and each component's statistics."""

    lines: list[Line]
    components: dict[str, Component]
    groups: int
    truncated: float
    """Share of the completions that were cut off."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def render(self, *, examples: int = 3, width: int = 120, few: int = 20) -> str:
        """Statistics, correlations, and the best and worst `examples` of each component as text tables.

        Up to `few` completions are shown one by one instead of examples.
        """
        from rich.console import Console

        console = Console(file=io.StringIO(), width=width, color_system=None)
        short = len(self.lines) <= few
        for table in [self._statistics(), self._correlations(), *(self._examples(examples) if not short else [])]:
            console.print(table)
        if short:
            console.print(self._table("Completions", self.lines, list(self.components)))
        console.print(
            f"{len(self.lines)} completions in {self.groups} groups, {self.truncated:.0%} truncated", highlight=False
        )
        return console.file.getvalue()  # type: ignore[attr-defined]

    def _statistics(self) -> Table:
        from rich.table import Table

        table = Table("component", "scored", "mean", "std", "min", "max", "constant groups", title="Rewards")
        for name, c in self.components.items():
            share = "-" if c.constant_groups is None else f"{c.constant_groups:.0%}"
            table.add_row(name, str(c.scored), *map(_shown, (c.mean, c.std, c.least, c.most)), share)
        return table

    def _correlations(self) -> Table:
        from rich.table import Table

        others = ["length", *self.components]
        table = Table("r", *others, title="Correlations")
        for name, c in self.components.items():
            table.add_row(name, *(_shown(c.correlations.get(other)) for other in others))
        return table

    def _examples(self, n: int) -> Iterable[Table]:
        for name, c in self.components.items():
            for which, lines in (("highest", c.top[:n]), ("lowest", c.bottom[:n])):
                if lines:
                    yield self._table(f"{name}: {which}", lines, [name])

    def _table(self, title: str, lines: Sequence[Line], names: Sequence[str]) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table("prompt", "completion", "length", *names, title=title)
        for line in lines:
            prompt = line.prompt if len(line.prompt) <= 60 else "..." + line.prompt[-57:]
            completion = line.completion if len(line.completion) <= 200 else line.completion[:197] + "..."
            cells = [_shown(line.values.get(name)) for name in names]
            table.add_row(Text(prompt), Text(completion), str(line.length), *cells)  # Text: brackets are no markup
        return table


def audit(
    rewards: Any, completions: Sequence[str], row: Row | Sequence[Row], *, tokenizer: Any = None, step: int = 0
) -> Audit:
    """Score hand-made completions of one row (one group), or of a row each.

    `rewards` is a spec or `Rewards`. Lengths are in tokens of `tokenizer`, without one in characters.
    Raises `SurgeryError` as `Rewards.score` does.
    """
    ids = [[ord(c) for c in text] for text in completions]
    if tokenizer is not None:
        ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in completions]
    rows = [row] if isinstance(row, Mapping) else list(row)
    group = len(completions) if isinstance(row, Mapping) else 1
    said = [_Said(text, tokens) for text, tokens in zip(completions, ids, strict=True)]
    scored = build_rewards(rewards).score(rows, said, step=step, group=max(1, group))
    values = {**scored.components, TOTAL: scored.total}
    lines = []
    for i, text in enumerate(completions):
        earned = {name: v[i] for name, v in values.items()}
        lines.append(Line(text_of(rows[i // group]["prompt"]), text, len(ids[i]), earned, step, i // group))
    return summarise(lines)


def audit_log(log: str | Path | Iterable[Mapping[str, Any]], *, examples: int = 10) -> Audit:
    """The audit of a run's rollout log: a JSONL file, a folder with `rollouts*.jsonl`, or its rows.

    A last line that a killed run left half written is passed over. Raises `SurgeryError` for a missing or empty log
    and for lines that are no rollouts.
    """
    rows = list(_read(Path(log))) if isinstance(log, str | Path) else list(log)
    if not rows:
        raise SurgeryError(f"There are no rollouts in {log if isinstance(log, str | Path) else 'the log'}.")
    return summarise((_line(row, i) for i, row in enumerate(rows)), examples=examples)


def summarise(lines: Iterable[Line], *, examples: int = 10) -> Audit:
    """Statistics of every component of `lines`."""
    lines = list(lines)
    names = list(dict.fromkeys(name for line in lines for name in line.values if name != TOTAL))
    names += [TOTAL] if any(TOTAL in line.values for line in lines) else []
    columns = {name: np.array([_nan(line.values.get(name)) for line in lines]) for name in names}
    lengths = {"length": np.array([float(line.length) for line in lines])}
    keys = [(line.step, line.group) for line in lines]
    members: dict[tuple[int, int], list[int]] = {}
    for i, key in enumerate(keys):
        members.setdefault(key, []).append(i)
    components = {}
    for name, values in columns.items():
        scored = values[~np.isnan(values)]
        order = [i for i in np.argsort(values, kind="stable") if not math.isnan(values[i])]
        mean, std, least, most = (
            (scored.mean(), scored.std(), scored.min(), scored.max()) if len(scored) else (math.nan,) * 4
        )
        components[name] = Component(
            scored=len(scored),
            mean=_none(mean),
            std=_none(std),
            least=_none(least),
            most=_none(most),
            constant_groups=_constant([values[i] for i in members.values()]),
            correlations={k: correlation(values, v) for k, v in {**lengths, **columns}.items() if k != name},
            top=[lines[i] for i in order[::-1][:examples]],
            bottom=[lines[i] for i in order[:examples]],
        )
    cut = sum(line.truncated for line in lines) / len(lines) if lines else 0.0
    return Audit(lines, components, len(members), cut)


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's r over the rows where both are numbers; None when either is constant there."""
    both = ~np.isnan(a) & ~np.isnan(b)
    a, b = a[both], b[both]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))


@dataclass(frozen=True)
class _Said:
    text: str
    completion_ids: list[int]
    truncated: bool = False


def _constant(groups: Iterable[np.ndarray]) -> float | None:
    scored = [values[~np.isnan(values)] for values in groups]
    comparable = [values for values in scored if len(values) > 1]
    return sum(np.ptp(v) == 0 for v in comparable) / len(comparable) if comparable else None


def _nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _read(path: Path) -> Iterable[Mapping[str, Any]]:
    files = sorted(path.glob("rollouts*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise SurgeryError(f"There is no rollout log at {path}.", hint="Give a JSONL file, or a folder that has one.")
    for file in files:
        lines = file.read_text(encoding="utf-8").split("\n")
        for i, line in enumerate(lines):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError:
                if i < len(lines) - 1:  # a whole line ends in a newline: only the last one can be half written
                    raise SurgeryError(f"{file}, line {i + 1}: no JSON.") from None


def _line(row: Mapping[str, Any], i: int) -> Line:
    try:
        length = row.get("length")
        return Line(
            text_of(row["prompt"]),
            text_of(row["completion"]),
            len(row["completion_ids"]) if length is None else int(length),
            {**row["rewards"], TOTAL: row.get("reward")},
            int(row.get("step", 0)),
            int(row.get("group", 0)),
            bool(row.get("truncated", False)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SurgeryError(f"Row {i} of the rollout log is no rollout: {type(error).__name__} {error}.") from None
