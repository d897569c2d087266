"""What every command shares: the global options, progress, the closing lines, and how errors are told.

Results for people and for programs (`--json`) go to stdout; progress, notes and errors to stderr.
"""

from __future__ import annotations

import functools
import inspect
import json as jsonlib
import os
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer


def option(help: str, *names: str, panel: str | None = None, default: str | None = None, **more: Any) -> Any:
    """A typer option; `default` says in words what holds when it is not given."""
    text = help + (f"  \\[default: {default}]" if default else "")
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=default is None, **more)


_PANEL = "Everywhere"
Json = Annotated[bool, option("Print the result as JSON, and nothing else.", "--json", panel=_PANEL)]
Quiet = Annotated[bool, option("Say nothing but errors.", "--quiet", "-q", panel=_PANEL)]
Debug = Annotated[bool, option("Show the traceback of an error.", "--debug", panel=_PANEL)]
Force = Annotated[bool, option("Replace an output that exists.", "--force")]
Threads = Annotated[int | None, option("Threads to work on.", min=1, default="one a core")]

EVERY = 5.0
"""Seconds between two lines of progress where there is no terminal."""


@dataclass
class State:
    """What was asked of the running command, and what to say when it is stopped."""

    json: bool = False
    quiet: bool = False
    debug: bool = False
    on_stop: str | None = None
    began: float = field(default_factory=time.perf_counter)


STATE = State()


def start(words: Sequence[str]) -> None:
    """Forgets the last command; `--debug` holds from here on, also for errors in the arguments."""
    global STATE
    STATE = State(debug="--debug" in words)


def set_global(json: bool, quiet: bool, debug: bool) -> None:
    """Global options count wherever they stand: before the command or behind it."""
    STATE.json |= json
    STATE.quiet |= quiet
    STATE.debug |= debug


def new_app(**settings: Any) -> typer.Typer:
    """A group of commands that shows its help when called alone."""
    return typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


def command(app: typer.Typer, name: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as a command with the global options added; it returns an exit code, or None for 0."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(function, include_extras=True)
        extra = {"json": Json, "quiet": Quiet, "debug": Debug}

        @functools.wraps(function)
        def run(**given: Any) -> Any:
            set_global(*(given.pop(word) for word in extra))
            try:
                return function(**given)
            except KeyboardInterrupt:  # typer would end without a word
                raise typer.Abort() from None

        parameters = [p.replace(annotation=hints[n]) for n, p in inspect.signature(function).parameters.items()]
        parameters += [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
                       for n, kind in extra.items()]  # fmt: skip
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = unwrapped(inspect.getdoc(function) or "")
        del run.__wrapped__
        app.command(name, **settings)(run)
        return function

    return register


def unwrapped(text: str) -> str:
    """Paragraphs in one line each, for the terminal to break; those that begin with \\b stay as they are."""
    return "\n\n".join(p if p.startswith("\b") else " ".join(p.split("\n")) for p in text.split("\n\n"))


def threads(asked: int | None) -> dict[str, int]:
    """The keyword argument `threads`: as asked, else one a core."""
    return {"threads": asked or os.cpu_count() or 1}


# ---- what is said --------------------------------------------------------------------------------------------------


def result(value: dict[str, Any] | list[Any], *lines: Any) -> None:
    """The outcome: `value` with `--json`, else the `lines` (texts, or rich tables), unless `--quiet`."""
    if STATE.json:
        print(jsonlib.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False))
    elif not STATE.quiet:
        for line in lines:
            if isinstance(line, str):
                print(line)
            else:
                from rich.console import Console

                Console(width=None if sys.stdout.isatty() else 120).print(line)


def note(text: str) -> None:
    """A remark for the reader, on stderr."""
    if not STATE.quiet:
        print(f"note: {text}", file=sys.stderr)


def notes(texts: Sequence[str]) -> None:
    """Several remarks; with `--json` they are in the result already."""
    for text in () if STATE.json else texts:
        note(text)


def failed(error: BaseException, problem: str, hint: str | None, *, code: int) -> int:
    """Tells an error on stderr, in a sentence and what to do next; the traceback only with `--debug`."""
    if STATE.debug:
        traceback.print_exception(error)
    print(f"surgery: {problem}" + (f"\n{hint}" if hint else ""), file=sys.stderr)
    return code


# ---- how far it is -------------------------------------------------------------------------------------------------

Advance = Callable[..., None]
"""Called as (done, total) or (name, done, total), from any thread."""


@contextmanager
def progress(what: str) -> Iterator[Advance]:
    """A bar on a terminal, a line every few seconds elsewhere, nothing with `--quiet`."""
    if STATE.quiet:
        yield lambda *_: None
    elif sys.stderr.isatty():
        with _bar(what) as advance:
            yield advance
    else:
        yield _lines(what)


@contextmanager
def _bar(what: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda *at: bar.update(task, completed=at[-2], total=at[-1])


def _lines(what: str) -> Advance:
    told = time.monotonic()

    def advance(*at: Any) -> None:
        nonlocal told
        if time.monotonic() - told >= EVERY:
            told = time.monotonic()
            print(f"{what}: {at[-2] / max(1, at[-1]):.0%}", file=sys.stderr, flush=True)

    return advance


# ---- numbers for people --------------------------------------------------------------------------------------------


def size(nbytes: float) -> str:
    """1 240 000 000 -> "1.24 GB"."""
    power = min(4, (len(str(int(nbytes))) - 1) // 3)
    value = nbytes / 1000**power
    digits = 0 if power == 0 or value >= 99.5 else 1 if value >= 9.95 else 2
    return f"{value:.{digits}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def count(number: int, what: str) -> str:
    """1 -> "1 model", 3 -> "3 models"."""
    endings = {"ix": "ices", "ry": "ries"}
    plural = what[:-2] + endings[what[-2:]] if what[-2:] in endings else what + "s"
    return f"{number:,} {what if number == 1 else plural}"


def seconds(took: float) -> str:
    """A duration in words."""
    return f"{took:.2g} s" if took < 10 else f"{took:.0f} s" if took < 100 else f"{took / 60:.1f} min"


def _plain(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
