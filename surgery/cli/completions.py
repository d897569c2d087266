"""Completions on the command line: as they come, as texts and tables for people, and as rows for programs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.cli import frame

if TYPE_CHECKING:
    from surgery.logits import Ensemble, Generation, Piece


@dataclass
class Told:
    """The completions of `prompts`, `n` of each, as rows."""

    prompts: Sequence[Any]
    ensemble: Ensemble
    n: int = 1
    scores: bool = False
    transform: Any = None
    """What wrote the prompts in other letters, and reads the completions back."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    """Ctrl-C came before all were whole."""
    error: Exception | None = None
    """What came before all were whole; it is raised when what there is has been told."""
    report: Any = None
    """Of speculation."""
    streamed: bool = False
    _open: int | None = None
    """The place of the completion whose line on the screen is not ended."""
    _places: list[int] = field(default_factory=list)
    """Of each row: which prompt it is of; two may be the same text."""
    began: float = field(default_factory=time.perf_counter)

    def add(self, found: Sequence[Generation]) -> None:
        """Completions in the order of the prompts, groups contiguous; those that were never begun are left out."""
        self.report = getattr(found, "report", None)
        for place, one in enumerate(found):
            self._add(place, one)

    def _add(self, place: int, one: Generation) -> None:
        self.stopped |= one.ended == "interrupted"
        if one.completion_ids:
            prompt, sample = divmod(place, self.n)
            self._row(prompt, sample, one.text, one.ended, one.completion_ids, one.log_probs, one.members)

    def failed(self, error: Exception, done: dict[int, Generation]) -> None:
        """Keeps what was done before an error, by place. Raises the error at once where that is nothing."""
        for place in sorted(done):
            self._add(place, done[place])
        if not self.rows:
            raise error
        self.error = error

    def stream(self, said: Sequence[Any], how: dict[str, Any]) -> None:
        """Prints tokens as they come, completion by completion; stopped by Ctrl-C or an error it keeps what came."""
        from surgery.logits import stream

        for place in range(len(said) * self.n):
            i, sample = divmod(place, self.n)
            pieces: list[Any] = []
            error: Exception | None = None
            try:
                for piece in stream(self.ensemble, said[i], index=i, sample=sample, members=self.scores, **how):
                    pieces.append(piece)
                    self.show(place, piece)
            except KeyboardInterrupt:
                self.stopped = True
            except Exception as wrong:
                error = wrong
            self.end_line()
            if pieces:
                members = {name: [piece.members[name] for piece in pieces] for name in pieces[0].members}
                self._row(i, sample, "".join(piece.text for piece in pieces), pieces[-1].ended or "interrupted",
                          [piece.token for piece in pieces], [piece.log_prob for piece in pieces], members)  # fmt: skip
            if error is not None:
                self.failed(error, {})
            if self.stopped or error is not None:
                return

    def show(self, place: int, piece: Piece) -> None:
        """Prints a token of a completion: behind what it is of, when it is the first."""
        self.streamed = True
        if frame.STATE.json or frame.STATE.quiet:
            return
        if place != self._open:
            prompt, sample = divmod(place, self.n)
            self.end_line()
            if sample == 0 and len(self.prompts) > 1:
                print(header(self.prompts[prompt]))
            print(f"[{sample + 1}] " if self.n > 1 else "", end="")
        print(piece.text, end="", flush=True)
        self._open = place

    def end_line(self) -> None:
        """Ends the line of a completion that was shown, whole or not."""
        if self._open is not None:
            print()
        self._open = None

    def _row(
        self, prompt: int, sample: int, text: str, ended: str, ids: list[int], log_probs: list[float],
        members: dict[str, list[float]],
    ) -> None:  # fmt: skip
        row: dict[str, Any] = {"prompt": self.prompts[prompt], "sample": sample, "text": text, "ended": ended,
                               "tokens": len(ids), "log_prob": sum(log_probs)}  # fmt: skip
        if self.transform:
            asked = self.transform.encode(self.prompts[prompt])
            row |= {"text": self.transform.decode(text), "asked": asked, "said": text}
        if self.scores:
            texts = [self.ensemble.tokenizer.decode([token]) for token in ids]
            row |= {"token_ids": ids, "token_texts": texts, "log_probs": log_probs, "members": members}
        self.rows.append(row)
        self._places.append(prompt)

    @property
    def whole(self) -> int:
        """Completions that were not cut short, by Ctrl-C or an error."""
        return sum(row["ended"] != "interrupted" for row in self.rows)

    def tell(self, told: dict[str, Any], out: Path | None) -> None:
        """Prints what there is: `told` and the rows with `--json`, texts and tables for people."""
        took, tokens = time.perf_counter() - self.began, sum(row["tokens"] for row in self.rows)
        names = map(self.ensemble.name_of, self.ensemble.members)
        told |= {
            "weights": dict(zip(names, self.ensemble.weights, strict=True)), "completions": self.rows,
            "seconds": round(took, 3), "tokens_per_second": round(tokens / took, 1),
            "written": [] if out is None else [str(out)],
        }  # fmt: skip
        if cut := sum(row["ended"] == "length" for row in self.rows):
            frame.notes([f"{frame.count(cut, 'completion')} cut off by --max-new-tokens, or by a context's end."])
        closing = f"{frame.count(len(self.rows), 'completion')}, {frame.count(tokens, 'token')} in "
        closing += f"{frame.seconds(took)} ({tokens / took:.0f} tokens/s)."
        if self.report is not None:
            told["speculation"] = self.report.summary()
            closing += f"\nDrafts: {self.report}."
        if out is not None:
            closing += f" Written: {out}"
        shown = [] if frame.STATE.json or frame.STATE.quiet else list(self._shown())
        frame.result(told, *shown, *([""] if shown else []), closing)

    def _shown(self) -> Iterator[Any]:
        before = -1
        for row, place in zip(self.rows, self._places, strict=True):
            if not self.streamed:
                if len(self.prompts) > 1 and place != before:
                    yield header(row["prompt"])
                before = place
                yield (f"[{row['sample'] + 1}] " if self.n > 1 else "") + row["text"]
            if self.scores:
                number = f"[{row['sample'] + 1}] " if self.n > 1 else ""
                several = self.streamed and len(self.prompts) * self.n > 1
                yield table(row, number + header(row["prompt"]) if several else None)

    def write(self, out: Path) -> None:
        """A row a line; whole or not at all."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows]
        temporary = out.with_name(f".{out.name}.{os.getpid()}")
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, out)


def header(prompt: Any) -> str:
    """A prompt in one line, over its completions."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", prompt))
    line = " ".join(text.split())
    return f"> {line if len(line) <= 100 else line[:97] + '...'}"


def table(row: dict[str, Any], title: str | None) -> Any:
    """The tokens of a completion, and what the composition and each member gave them."""
    from rich.markup import escape
    from rich.table import Table

    found = Table(title=None if title is None else escape(title),
                  caption=f"nats; in all {row['log_prob']:.2f}")  # fmt: skip
    found.add_column("token")
    members = row["members"] if len(row["members"]) > 1 else {}
    for name in ["together" if members else "log p", *members]:
        found.add_column(escape(name), justify="right")
    for i, text in enumerate(row["token_texts"]):
        values = [row["log_probs"][i], *(one[i] for one in members.values())]
        found.add_row(escape(repr(text)), *(f"{value:.3f}" for value in values))
    return found
