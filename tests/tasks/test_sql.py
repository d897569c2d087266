"""Text-to-SQL: what counts is what the query returns, and a query can do nothing but read."""

import pytest

from surgery.tasks import TASKS, make_task, verify
from surgery.tasks.sql import KINDS, run_sql

DATABASE = "CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'x');"
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"


@pytest.mark.parametrize(
    ("query", "right"),
    [
        ("SELECT a FROM t", True),
        ("select a from t order by a desc;", True),
        ("Here you are:\n```sql\nSELECT a FROM t\n```", True),
        ("SELECT a FROM t WHERE a < 3", False),
        ("SELECT a, b FROM t", False),
        ("SELECT a FROM t UNION ALL SELECT 3", False),
        ("SELECT c FROM t", False),
        ("", False),
    ],
)
def test_results_are_compared_as_bags(query, right):
    assert verify(query, {"task": "sql", "database": DATABASE, "answer": "SELECT a FROM t"}) is right


def test_order_counts_where_the_answer_has_one():
    row = {"task": "sql", "database": DATABASE, "answer": "SELECT a FROM t ORDER BY a"}
    assert verify("SELECT a FROM t ORDER BY 1", row) is True
    assert verify("SELECT a FROM t ORDER BY a DESC", row) is False
    assert verify("SELECT 1", row | {"answer": "SELECT nothing"}) is None


def test_a_second_database_refuses_what_is_right_by_coincidence():
    row = {"task": "sql", "database": DATABASE, "answer": "SELECT a FROM t WHERE b = 'y'"}
    assert verify("SELECT 2", row) is True
    assert verify("SELECT 2", row | {"second_database": DATABASE.replace("2", "5")}) is False


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM t",
        "INSERT INTO t VALUES (4, 'z')",
        "UPDATE t SET a = 0",
        "DROP TABLE t",
        "CREATE TEMP TABLE u (a)",
        "SELECT a FROM t; DROP TABLE t",
        "PRAGMA query_only = 0",
        "BEGIN",
        "SELECT load_extension('x')",
        "SELECT a\x00 FROM t",
        "SELECT '\ud800'",
        f"{ENDLESS} SELECT count(*) FROM c",
        f"{ENDLESS} SELECT x FROM c",
        f"{ENDLESS} SELECT x FROM c LIMIT 5000",
        "SELECT zeroblob(1000000000)",
        "SELECT a FROM t WHERE b LIKE '" + "%x" * 100 + "'",
        "SELECT " + "1+" * 6000 + "1",
    ],
)
def test_writes_injections_and_endless_queries_fail(query):
    assert run_sql(DATABASE, query) is None
    assert verify(query, {"task": "sql", "database": DATABASE, "answer": "SELECT a FROM t"}) is False


def test_nothing_is_written_to_disk(tmp_path):
    for query in (f"ATTACH '{tmp_path}/x.db' AS x", f"VACUUM INTO '{tmp_path}/y.db'"):
        assert run_sql(DATABASE, query) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_question_is_answered_by_rows(kind):
    one = make_task("sql", kinds=[kind])
    for i in range(60):
        row = one.row(0, i)
        assert run_sql(row["database"], row["answer"]) and row["category"] == kind
        assert verify("SELECT name FROM person WHERE id < 0", row) is False


def test_there_are_many_prompts():
    assert len(TASKS["sql"].examples(400)) == 400
