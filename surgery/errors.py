"""What a user sees when something is wrong: what, where, and what to do next."""

from __future__ import annotations


class SurgeryError(Exception):
    """A wrong input, told in a sentence: the command line prints it without a traceback and exits with 2.

    `problem` names the file, tensor or option, what was expected and what was found; `hint` is the next step.
    """

    def __init__(self, problem: str, *, hint: str | None = None) -> None:
        self.problem = problem
        self.hint = hint
        super().__init__(problem if hint is None else f"{problem}\n{hint}")
