"""What is where, and what belongs to what: entities in boxes, and a table of facts to be known by heart."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, product
from random import Random
from typing import Any

from surgery.errors import SurgeryError
from surgery.tasks.base import Example, Size, bounds, counted, draw, task

ENTITIES, BOXES = "abcdefgh", "pqrsuvxyz"


@task("boxes", "which box an entity is in after some moves: one letter")
def boxes(rng: Random, *, entities: Size = (2, 4), moves: Size = (0, 2), corrupt: str = "box") -> Example:
    """`b a in x;c in y;a to z;where a=` has the answer z (entity tracking: Kim & Schuster 2023, arXiv:2305.02363).

    Every entity starts in a box of its own, and moves to a box that is empty. For patching, the columns
    `corrupt_prompt` and `corrupt_answer` hold the same prompt with one letter changed and its different answer: the box
    that decides the answer (`corrupt="box"`), or the entity asked for ("question").
    """
    if corrupt not in ("box", "question"):
        raise SurgeryError(f"Option 'corrupt' is {corrupt!r}, expected 'box' or 'question'.")
    n, m = draw(rng, "entities", entities, 2, 8), draw(rng, "moves", moves, 0, 8)
    names, free = sorted(rng.sample(ENTITIES, n)), rng.sample(BOXES, len(BOXES))
    rng.shuffle(names)
    at = {name: free.pop() for name in names}
    facts = [(name, "in", box) for name, box in at.items()]
    for _ in range(m):
        name = rng.choice(names)
        free.insert(0, at[name])  # left behind, and not taken at once
        at[name] = free.pop()
        facts.append((name, "to", at[name]))
    asked = rng.choice(names)
    last = max(i for i, (name, _, _) in enumerate(facts) if name == asked)
    changed, other = list(facts), asked
    if corrupt == "box":
        wrong = rng.choice([box for box in free if box not in {b for _, _, b in facts}] or free)
        changed[last] = (*facts[last][:2], wrong)
    else:
        other = rng.choice([name for name in names if name != asked])
        wrong = at[other]

    def written(facts: list[tuple[str, str, str]], asked: str) -> str:
        return "b " + "".join(f"{name} {verb} {box};" for name, verb, box in facts) + f"where {asked}="

    columns: dict[str, Any] = {
        "entities": names,
        "boxes": [at[name] for name in names],
        "asked": asked,
        "moved": sum(name == asked for name, _, _ in facts) - 1,
        "corrupt_prompt": written(changed, other),
        "corrupt_answer": wrong,
    }
    label = f"{counted(n, 'entity')}, {counted(m, 'move')}"
    return Example(written(facts, asked), f"#{at[asked]}", at[asked], n + m, label, columns)


@task("kv", "facts of a table that a seed fixes: four letters have two others for a value")
def kv(rng: Random, *, facts: int = 200, table: int = 0, zipf: float = 0.0) -> Example:
    """`q bada=` has the answer `ku`, by heart: for what models know, learn and forget.

    `table` is the seed of the table, `facts` its size. A key of rank r is asked with probability proportional to
    (r+1)^-`zipf`; the difficulty is the rank as a share of the table, the category head (the first tenth), torso or
    tail (from the middle on).
    """
    bounds("facts", facts, 1, 4900)
    if isinstance(zipf, bool) or not isinstance(zipf, int | float) or not 0 <= zipf <= 10:
        raise SurgeryError(f"Option 'zipf' is {zipf!r}, expected a number from 0 to 10.")
    known, weights = _table(facts, table, zipf)
    rank = rng.choices(range(facts), cum_weights=weights)[0]
    key, value = known[rank]
    share = rank / facts
    label = "head" if share < 0.1 else "torso" if share < 0.5 else "tail"
    return Example(f"q {key}=", f"#{value}", value, share, label, {"rank": rank})


@lru_cache(maxsize=16)
def _table(facts: int, seed: int, zipf: float) -> tuple[list[tuple[str, str]], list[float]]:
    """Keys with their values, and the running sum of how often each is asked."""
    syllables = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
    rng = Random(f"kv:{seed}")
    keys = rng.sample(["".join(pair) for pair in product(syllables, repeat=2)], 4900)
    values = [rng.choice(syllables) for _ in keys]
    return list(zip(keys, values, strict=True))[:facts], list(accumulate((r + 1.0) ** -zipf for r in range(facts)))
