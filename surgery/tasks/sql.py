"""Questions about small tables, answered in SQL and checked by what the query returns on an in-memory database."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from surgery.errors import SurgeryError
from surgery.tasks.base import Example, Size, draw, task

STEPS, ROWS, LENGTH, PATTERN = 200_000, 1000, 10_000, 50
"""What a query may use: virtual machine instructions, rows, and characters of a value or query, and of a pattern.

Instructions rather than seconds, so that what is right doesn't depend on how busy the machine is.
"""


def run_sql(database: str, query: str) -> list[tuple] | None:
    """Rows that `query` returns on the SQLite database that the script `database` makes; None when it fails.

    The query may only read, one statement, within `STEPS`, `ROWS` and `LENGTH`. Floats are rounded to 9 decimals.
    """
    import sqlite3

    reading = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(database)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LENGTH)
        connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, LENGTH)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, PATTERN)
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in reading else sqlite3.SQLITE_DENY)
        ticks = iter(range(STEPS // 1000))
        connection.set_progress_handler(lambda: next(ticks, None) is None, 1000)
        rows = connection.execute(query).fetchmany(ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None
    finally:
        connection.close()
    if len(rows) > ROWS:
        return None
    return [tuple(round(value, 9) if isinstance(value, float) else value for value in row) for row in rows]


def query_in(completion: str) -> str:
    """The last ```sql block of a completion, or all of it, without the final semicolon."""
    fenced = re.findall(r"```(?:sql)?\s*\n(.*?)```", completion, re.DOTALL | re.IGNORECASE)
    return (fenced[-1] if fenced else completion).strip().rstrip(";").strip()


def returns_the_same(completion: str, row: Mapping[str, Any]) -> bool | None:
    """Whether the query returns the rows of the row's answer, in its order where the answer has ORDER BY.

    Both the row's `database` and, against coincidence, its `second_database` (when it has one) are asked. None when
    the answer itself fails.
    """
    answer, query = query_in(row["answer"]), query_in(completion)
    ordered = re.search(r"\border\s+by\b", answer, re.IGNORECASE)
    for database in filter(None, (row["database"], row.get("second_database"))):
        right, found = run_sql(database, answer), run_sql(database, query)
        if right is None:
            return None
        if found is None or (found != right if ordered else Counter(found) != Counter(right)):
            return False
    return True


TABLES = """\
CREATE TABLE person (id INTEGER PRIMARY KEY, name TEXT, city TEXT, age INTEGER);
CREATE TABLE purchase (id INTEGER PRIMARY KEY, person_id INTEGER REFERENCES person(id), item TEXT, price INTEGER);"""
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jill", "Kai", "Lea", "Max", "Nora")
_CITIES, _ITEMS = ("Oslo", "Lima", "Cairo", "Turin"), ("book", "lamp", "chair", "pen", "rug")


def _database(rng: Random, people: int) -> str:
    """The script that makes and fills both tables."""
    lines = [TABLES]
    for i, name in enumerate(rng.sample(_NAMES, people), 1):
        lines.append(f"INSERT INTO person VALUES ({i}, '{name}', '{rng.choice(_CITIES)}', {rng.randint(18, 80)});")
    for i in range(1, 2 * people + 1):
        values = f"{i}, {rng.randint(1, people)}, '{rng.choice(_ITEMS)}', {rng.randint(1, 99)}"
        lines.append(f"INSERT INTO purchase VALUES ({values});")
    return "\n".join(lines)


def _filter(rng: Random) -> tuple[str, str]:
    age, (word, sign) = rng.randint(25, 70), rng.choice((("older", ">"), ("younger", "<")))
    return f"Which people are {word} than {age}? Give their names.", f"SELECT name FROM person WHERE age {sign} {age}"


def _aggregate(rng: Random) -> tuple[str, str]:
    word, function = rng.choice((("average", "AVG"), ("highest", "MAX"), ("lowest", "MIN"), ("total", "SUM")))
    item = rng.choice(_ITEMS)
    return f"What is the {word} price of a {item}?", f"SELECT {function}(price) FROM purchase WHERE item = '{item}'"


def _order(rng: Random) -> tuple[str, str]:
    n, (word, way) = rng.randint(2, 4), rng.choice((("oldest", "DESC"), ("youngest", "ASC")))
    return (f"Who are the {n} {word} people, the {word} first, those of one age by name?",
            f"SELECT name FROM person ORDER BY age {way}, name LIMIT {n}")  # fmt: skip


def _group(rng: Random) -> tuple[str, str]:
    n = rng.randint(1, 3)
    return (f"Which items were bought more than {n} times, and how often?",
            f"SELECT item, COUNT(*) FROM purchase GROUP BY item HAVING COUNT(*) > {n}")  # fmt: skip


def _join(rng: Random) -> tuple[str, str]:
    city = rng.choice(_CITIES)
    return (f"How much did each person from {city} who bought something spend in total? Give name and amount.",
            "SELECT name, SUM(price) FROM person JOIN purchase ON person.id = person_id "
            f"WHERE city = '{city}' GROUP BY person.id")  # fmt: skip


KINDS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "filter": _filter, "aggregate": _aggregate, "order": _order, "group": _group, "join": _join,
}  # fmt: skip
"""Kinds of question, the easiest first: question and query."""


@task("sql", "a question about two tables, to be answered by a query on them", returns_the_same)
def sql(rng: Random, *, people: Size = (6, 12), kinds: Sequence[str] = tuple(KINDS)) -> Example:
    """`people` rows in one table and twice as many in the other; the difficulty is the place of the kind in `KINDS`.

    The prompt shows the tables and the first row of each; the columns `database` and `second_database` are scripts.
    """
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise SurgeryError(f"Option 'kinds' is {kinds!r}, expected a list of some of {', '.join(KINDS)}.")
    kind = rng.choice(list(kinds))
    while True:
        database, second = (_database(rng, draw(rng, "people", people, 4, len(_NAMES))) for _ in range(2))
        question, query = KINDS[kind](rng)
        if run_sql(database, query) not in ([], [(None,)]):  # which many a wrong query returns too
            break
    first_rows = [
        next(line for line in database.splitlines() if f"INTO {table} " in line) for table in ("person", "purchase")
    ]
    prompt = "\n".join([TABLES, *first_rows, "-- ...", f"Question: {question}", "SQL: "])
    columns = {"database": database, "second_database": second}
    return Example(prompt, query, query, list(KINDS).index(kind) + 1, kind, columns)
