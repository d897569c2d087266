"""Tasks with an exact verifier, generated without end from a seed, and word problems for real models.

    task = make_task("addition", digits=[2, 4])      # or TASKS["addition"], its options as they are
    row = task.row(seed=0, index=17)                 # prompt, completion, answer, task, category, difficulty, ...
    verify(row["completion"], row)                   # True

| task | prompt | response | difficulty | options |
|---|---|---|---|---|
| facts | `m 3+5=` | `#8` (modulo 10) | terms | terms |
| direct | `m 3+5-2=` | `#6` | terms | terms |
| chain | `m 3+5-2=` | `3+5=8;8-2=6;#6` (the prompts of direct, worked out) | terms | terms |
| copy, reverse, sort | `c bad=`, `r bad=`, `s bad=` | `#bad`, `#dab`, `#abd` | letters | length |
| shift, descend, unique, swap, rotate, double, last | `n bad=`, `d bad=`, ... | the changed string | letters | length |
| addition | `a 45+70=` | `5+0=5;4+7=11;#115` | digits + carries | digits, carries |
| countdown | `k 3 4 6;1=` | `#3+4-6` (or any way there) | numbers | numbers, largest, operators |
| boxes | `b a in x;c in y;a to z;where a=` | `#z` | entities + moves | entities, moves, corrupt |
| kv | `q bada=` | `#ku` (by heart) | rank | facts, table, zipf |
| latin | `g 3024;2430;1300;4013=` | `#3124;2431;1342;4213` | blanks | blanks, blocks |
| path | `p sox;oox;xoe=` | `#rddr` (or as short) | steps | size, steps |
| sat | `v b-c;-ab;ab=` | `#ab-c` (or any model), `#no` | variables + clauses | variables, clauses, width |
| pcfg | `t the dogs that` | ` sing sleep;` (or any ending) | embeddings | shown, deepest |
| tools | tools and a request in words | `<tool_call>` JSON lines `</tool_call>` | calls | calls, offered |
| sql | tables and a question | `SELECT ...` (or what returns the same) | kind of query | people, kinds |
| gsm8k, svamp, math | a word problem | its solution | steps, steps, level | split, path |
| satquest | a formula or its story | `0110` | variables + clauses | variables, clauses, problem, question |
| reasoning_gym:NAME | any task of that package | its answer | the package's | that task's |

All but the last five rows keep to the 45 characters of the tiny family (`surgery.zoo`), countdown with its usual
operators. Options are numbers, or [lowest, highest]. `Task.examples` draws different prompts from one stream;
`Task.row(seed, index)` is a pure function. A new task is one function `make(rng, *, option=default) -> Example` under
the decorator `task`, with a verifier where the text after `#` isn't all that counts.
"""

from surgery.tasks import (
    characters,
    grids,
    language,
    logic,
    numbers,
    reasoning_gym,
    sql,
    tools,
    tracking,
    word_problems,
)
from surgery.tasks.base import TASKS, Example, Task, make_task, marked_answer, task, verify
from surgery.tasks.characters import LETTERS
from surgery.tasks.word_problems import gsm8k, math, numeric_answer, same_number, svamp

__all__ = [
    "LETTERS", "TASKS", "Example", "Task", "characters", "grids", "gsm8k", "language", "logic", "make_task",
    "marked_answer", "math", "numbers", "numeric_answer", "reasoning_gym", "same_number", "sql", "svamp", "task",
    "tools", "tracking", "verify", "word_problems",
]  # fmt: skip
