"""What a check found: single findings, and the report that a command line, a test or a notebook can act on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from rich.table import Table

Level = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `what` in a word or two, `detail` in a sentence, `hint` the next step.

    `tensors` names every tensor concerned, however many.
    """

    level: Level
    what: str
    detail: str
    hint: str | None = None
    tensors: tuple[str, ...] = ()


@dataclass
class CompatibilityReport:
    """All findings of a check; `measures` holds the numbers behind them (JSON)."""

    findings: list[Finding]
    measures: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings are allowed."""
        return not self.failures

    @property
    def exit_code(self) -> int:
        """0 when the models can be used together (warnings included), 1 when they can't."""
        return 0 if self.ok else 1

    @property
    def failures(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "fail"]

    @property
    def warnings(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "warn"]

    def require(self) -> None:
        """Raises `SurgeryError` with every failure at once."""
        if not self.ok:
            hints = dict.fromkeys(f.hint for f in self.failures if f.hint)
            problem = "\n".join(f"{f.what}: {f.detail}" for f in self.failures)
            raise SurgeryError(problem, hint=" ".join(hints) or None)

    def summary(self) -> str:
        """The verdict in one line."""
        verdict = "compatible" if self.ok else "not compatible"
        return f"{verdict}: {len(self.failures)} failed, {len(self.warnings)} warnings, {len(self.findings)} checks"

    def to_dict(self) -> dict[str, Any]:
        findings = [asdict(f) | {"tensors": list(f.tensors)} for f in self.findings]
        return {"ok": self.ok, "exit_code": self.exit_code, "findings": findings, "measures": self.measures}

    def table(self) -> Table:
        """A rich table, one row a finding; marks as well as colours, so that it reads without them."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Compatibility", caption=self.summary(), show_lines=True)
        for column in ("", "check", "finding"):
            table.add_column(column, overflow="fold")
        marks = {"pass": ("✓ pass", "green"), "warn": ("! warn", "yellow"), "fail": ("✗ fail", "bold red")}
        for f in self.findings:
            text = Text(f.detail)
            if f.hint and f.level != "pass":
                text.append(f"\n→ {f.hint}", style="italic")
            table.add_row(Text(*marks[f.level]), Text(f.what), text)
        return table


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first of `names` in order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
