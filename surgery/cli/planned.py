"""What `surgery merge --plan` shows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.cli import frame

if TYPE_CHECKING:
    from rich.table import Table

    from surgery.weights.plan import Plan
    from surgery.weights.recipe import Recipe


def show(recipes: list[Recipe], out: Path | None, threads: int, force: bool, allow_pickle: bool) -> None:
    """Prints what each stage would read, write and leave out; a stage that needs another's output is only named."""
    from surgery.weights.plan import plan

    shown: list[dict[str, Any]] = []
    lines: list[Any] = []
    for recipe in recipes:
        if recipe.needs:  # their folders are not there yet
            told = f"stage of {recipe.method} uses the result of {', '.join(recipe.needs)}: it is planned after that"
            shown.append({"method": recipe.method, "stage": recipe.name, "needs": list(recipe.needs)})
            lines.append(f"The {told}.")
            continue
        last = recipe is recipes[-1]
        ready = plan(recipe, out=out if last else None, force=force, allow_pickle=allow_pickle)
        shown.append(ready.to_dict() | {"stage": recipe.name, "memory": ready.memory(threads)})
        lines += [_plan_table(ready, threads, out), *(f"note: {text}" for text in [*ready.notes, *ready.dropped])]
    frame.result(shown[0] if len(shown) == 1 else shown, *lines)


def _plan_table(ready: Plan, threads: int, out: Path | None) -> Table:
    from rich.table import Table

    recipe = ready.recipe
    merged = sum(job.merge for job in ready.jobs)
    title = f"Plan: {recipe.method}" + (f" ({recipe.name})" if recipe.name else "")
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for ref, source in zip(ready.refs, ready.sources, strict=True):
        role = "base" if recipe.base is not None and ref.identity == recipe.base.identity else "model"
        nbytes = sum(info.nbytes for info in source.tensors.values())
        table.add_row(role, f"{ref} ({len(source.tensors)} tensors, {frame.size(nbytes)})")
    copied = [job.out.name for job in ready.jobs if not job.merge]
    table.add_row("merged", f"{frame.count(merged, 'tensor')}, {ready.parameters:,} numbers in all")
    if copied:
        more = f" and {len(copied) - 8} more" if len(copied) > 8 else ""
        table.add_row("copied", f"{frame.count(len(copied), 'tensor')}: {', '.join(copied[:8])}{more}")
    if ready.config_changes:
        table.add_row("config", ", ".join(f"{k} becomes {v}" for k, v in ready.config_changes.items()))
    types = sorted({job.out.dtype for job in ready.jobs})
    table.add_row("read", frame.size(ready.in_bytes))
    table.add_row("written", f"{frame.size(ready.out_bytes)} of {', '.join(types)}" + (f" into {out}" if out else ""))
    if out is not None:
        parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
        table.add_row("disk", f"{frame.size(shutil.disk_usage(parent).free)} are free there")
    table.add_row("memory", f"at most {frame.size(ready.memory(threads))} on {frame.count(threads, 'thread')}, "
                            "beside the program itself")  # fmt: skip
    return table
