"""Tasks with an exact verifier, generated without end from a seed, and word problems for real models.

    task = make_task("addition", digits=[2, 4])      # or TASKS["addition"]: its options as they are
    row = task.row(seed=0, index=17)                 # prompt, completion, answer, task, category, difficulty, ...
    verify(row["completion"], row)                   # True

A new task is one function `make(rng, *, option=default) -> Example` under the decorator `task`.
"""

from surgery.tasks import characters, word_problems
from surgery.tasks.base import TASKS, Example, Task, make_task, marked_answer, task, verify
from surgery.tasks.characters import LETTERS
from surgery.tasks.word_problems import gsm8k, math, numeric_answer, same_number, svamp

__all__ = [
    "LETTERS", "TASKS", "Example", "Task", "characters", "gsm8k", "make_task", "marked_answer", "math",
    "numeric_answer", "same_number", "svamp", "task", "verify", "word_problems",
]  # fmt: skip
