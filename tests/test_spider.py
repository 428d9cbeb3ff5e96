"""Laws of Spider: a query is right if its result is, however it looks; it can only read."""
import gzip
import hashlib
import itertools
import json
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from helpers import DATA, PATIENCE, python, sentence, wait_until, write_jsonl
from tasks import spider, sql
from tasks.common import few_shot
from tasks.files import read_jsonl

REAL = DATA / "spider"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason=f"Spider's files are not at {REAL}")

TABLE = """
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL, stock INTEGER, maker TEXT);
INSERT INTO item VALUES (1, 'pen', 1.0, 10, 'acme'), (2, 'ink', 2.5, 0, 'acme'),
                        (3, 'cup', 1.0, NULL, 'zed'), (4, 'pen', 3.0, 10, NULL);
CREATE TABLE "edit" ("edit" TEXT, "odd name" BLOB);
INSERT INTO "edit" VALUES (CAST(x'61ff62' AS TEXT), x'61ff62');"""
COLUMNS = [{"name": name, "type": kind, "primary_key": name == "id"}
           for name, kind in zip(("id", "name", "price", "stock", "maker"),
                                 ("number", "text", "number", "number", "text"))]
SCHEMA = {"tables": [{"name": "item", "columns": COLUMNS},
                     {"name": "edit", "columns": [
                         {"name": "edit", "type": "text", "primary_key": False},
                         {"name": "odd name", "type": "others", "primary_key": False}]}],
          "foreign_keys": [{"table": "edit", "column": "odd name", "ref_table": "item",
                            "ref_column": "id"}]}
# the same as in the official tables.json: columns are counted through all tables, 0 is *
OFFICIAL = {"table_names_original": ["item", "edit"], "primary_keys": [1],
            "foreign_keys": [[7, 1]],
            "column_types": "text number text number number text text others".split(),
            "column_names_original": [[-1, "*"], [0, "id"], [0, "name"], [0, "price"], [0, "stock"],
                                      [0, "maker"], [1, "edit"], [1, "odd name"]]}
HELD_OUT, KEPT = "bike_1", "shop"       # crc32 says so


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """The machine may be busy: only where a test is about the clock does it end a query."""
    monkeypatch.setattr(sql, "SECONDS", PATIENCE)


def row(db_id: str, query: str = "SELECT count(*) FROM item", question: str = "How many?") -> dict:
    return {"db_id": db_id, "question": question, "query": query}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ours, with the databases shop (a file), packed (gzipped) and lost (none)."""
    path = tmp_path_factory.mktemp("spider")
    (path / "databases").mkdir()
    file = path / "databases" / "shop.sqlite"
    connection = sqlite3.connect(file)
    connection.executescript(TABLE)
    connection.close()
    (path / "databases" / "packed.sqlite.gz").write_bytes(gzip.compress(file.read_bytes()))
    write_jsonl(path / "tables.jsonl", [{"db_id": name, **SCHEMA}
                                       for name in ("shop", "packed", "lost", HELD_OUT)])
    write_jsonl(path / "train.jsonl", [row(KEPT), row(HELD_OUT), row(KEPT, "SELECT 1", "One?")])
    write_jsonl(path / "dev.jsonl", [row("shop"), row("packed"), row("lost"),
                                    row("shop", "SELECT nosuch FROM item")])
    return path


@pytest.fixture
def shop(folder):
    return str(folder / "databases" / "shop.sqlite")


def one(folder, gold: str, variant: str = "", db_id: str = "shop"):
    """An example of ours whose gold query is `gold`."""
    return spider.to_example(row(db_id, gold), "dev/1", None, str(folder), variant)


def by_the_book(predicted: list[tuple], gold: list[tuple], is_ordered: bool) -> bool:
    """The official definition read a second time: every order of the columns is tried."""
    if predicted == gold == []:
        return True
    if len(predicted) != len(gold) or len(predicted[0]) != len(gold[0]):
        return False
    for order in itertools.permutations(range(len(gold[0]))):
        rows = [tuple(row[i] for i in order) for row in predicted]
        if rows == gold or not is_ordered and Counter(rows) == Counter(gold):
            return True
    return False


# ---- verdicts ----

EMPTY = "SELECT name FROM item WHERE id = 9"
VERDICTS = [
    # the same question asked in another way
    ("SELECT name FROM item", "SELECT name FROM item", True),
    ("select NAME from ITEM as T1", "SELECT name FROM item", True),
    ("SELECT name AS anything FROM item", "SELECT name FROM item", True),
    ("SELECT count(id) FROM item", "SELECT count(*) FROM item", True),
    ("SELECT count(stock) FROM item", "SELECT count(*) FROM item", False),          # a NULL
    ("WITH t AS (SELECT name FROM item) SELECT name FROM t", "SELECT name FROM item", True),
    ("VALUES (4)", "SELECT count(*) FROM item", True),
    ('SELECT id FROM item WHERE name = "ink"', "SELECT id FROM item WHERE name = 'ink'", True),
    ("SELECT id FROM item WHERE name = 'INK'", "SELECT id FROM item WHERE name = 'ink'", False),
    ("SELECT sum(id)/count(*) FROM item", "SELECT avg(id) FROM item", False),       # 2, 2.5
    ("SELECT name FROM item LIMIT 3", "SELECT name FROM item", False),
    # the order of rows
    ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item", True),
    ("SELECT name FROM item ORDER BY id DESC", "SELECT name FROM item ORDER BY id", False),
    ("SELECT id FROM item", "SELECT id FROM item ORDER BY id", True),
    ("SELECT id FROM item ORDER BY id DESC", "SELECT id FROM item order  \n by id", False),
    ("SELECT id FROM item ORDER BY id DESC",
     "SELECT id FROM item WHERE id IN (SELECT id FROM item ORDER BY id)", False),   # in any place
    ("SELECT price, id FROM item ORDER BY id", "SELECT id, price FROM item ORDER BY id", True),
    # the order and the number of columns
    ("SELECT price, name FROM item", "SELECT name, price FROM item", True),
    ("SELECT maker, stock, price, name, id FROM item", "SELECT * FROM item", True),
    ("SELECT id, stock FROM item WHERE id = 1 UNION ALL SELECT 0, 2",
     "SELECT id, stock FROM item WHERE id < 3", False),         # each row permuted in its own way
    ("SELECT id, name FROM item", "SELECT name FROM item", False),
    ("SELECT name FROM item", "SELECT id, name FROM item", False),
    ("SELECT id, id FROM item", "SELECT id, stock FROM item", False),
    ("SELECT name, name, id FROM item", "SELECT id, name, name FROM item", True),
    # how often a row is there
    ("SELECT DISTINCT name FROM item", "SELECT name FROM item", False),
    ("SELECT 'a' UNION ALL SELECT 'a' UNION ALL SELECT 'b'",
     "SELECT 'a' UNION ALL SELECT 'b' UNION ALL SELECT 'b'", False),
    ("SELECT 1 UNION SELECT 1", "SELECT 1", True),
    # values
    ("SELECT 1", "SELECT 1.0", True),
    ("SELECT 1, 10", "SELECT 1.0, 10", True),
    ("SELECT '1'", "SELECT 1", False),
    ("SELECT NULL", "SELECT stock FROM item WHERE id = 3", True),
    ("SELECT ''", "SELECT NULL", False),
    ("SELECT 0", "SELECT NULL", False),
    ("SELECT x'6162'", "SELECT 'ab'", False),
    ("SELECT -0.0", "SELECT 0", True),
    ("SELECT 1e999", "SELECT 9e999", True),
    ("SELECT 0.1 + 0.2", "SELECT 0.3", False),                  # exactly, as the official rule
    ("SELECT 9007199254740993", "SELECT 9007199254740992.0", False),
    ("SELECT 9007199254740992", "SELECT 9007199254740992.0", True),
    ("SELECT 'e\u0301'", "SELECT '\u00e9'", False),
    ('SELECT "edit" FROM "edit"', "SELECT 'ab'", True),         # bytes that are no text drop out
    ('SELECT "odd name" FROM "edit"', "SELECT x'61ff62'", True),
    # nothing
    (EMPTY, EMPTY, True),
    ("SELECT 1, 2 WHERE 0", EMPTY, True),
    ("SELECT max(id) FROM item WHERE 0", EMPTY, False),         # a row with a NULL
    ("SELECT name FROM item", EMPTY, False),
    (EMPTY, "SELECT name FROM item", False),
    ("SELECT 0", "SELECT count(*) FROM item WHERE 0", True),
    ("", EMPTY, False),
    (";", EMPTY, False),
    ("-- SELECT 1", EMPTY, False),
    ("SELECT nosuch FROM item", EMPTY, False),
    ("SELECT name FROM items", EMPTY, False),
    ("SELEC name FROM item", EMPTY, False),
    ("The answer is 4.", EMPTY, False),
    ("DELETE FROM item WHERE 0", EMPTY, False),
    ("REINDEX", EMPTY, False),
    ("PRAGMA foreign_keys = 1", EMPTY, False),
    ("EXPLAIN SELECT 1", "SELECT 1", False),
    ("SELECT * FROM item WHERE id = ?", EMPTY, False),
]


@pytest.mark.parametrize("prediction, gold, verdict", VERDICTS)
def test_a_query_is_right_if_its_result_is(folder, prediction, gold, verdict):
    for db_id in ("shop", "packed"):
        assert spider.score(prediction, one(folder, gold, db_id=db_id)) is verdict
    if verdict:
        assert spider.score(prediction, one(folder, gold, "raw")) is True


def test_there_are_enough_verdicts_and_a_second_reading_of_the_rule_agrees(shop):
    assert len(VERDICTS) >= 40
    connection = sqlite3.connect(shop)
    connection.text_factory = lambda text: text.decode(errors="ignore")
    for prediction, gold, verdict in VERDICTS:
        try:
            cursor = connection.execute(prediction)
            rows = cursor.fetchall() if cursor.description else None
        except sqlite3.Error:
            rows = None
        expected = connection.execute(gold).fetchall()
        is_ordered = re.search(r"order\s+by", gold, re.I) is not None
        assert verdict == (rows is not None and by_the_book(rows, expected, is_ordered)), prediction


values = st.sampled_from([0, 1, 1.0, "1", None, b"1"])
tables = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.tuples(*[values] * n), min_size=1, max_size=4))


@settings(deadline=None, max_examples=300)
@given(tables, tables, st.booleans(), st.randoms(use_true_random=False))
def test_results_are_compared_as_if_every_order_of_the_columns_were_tried(a, b, is_ordered, rng):
    assert sql.same_result(a, b, is_ordered) == by_the_book(a, b, is_ordered)
    order = rng.sample(range(len(a[0])), len(a[0]))
    mixed = [tuple(row[i] for i in order) for row in a]
    assert sql.same_result(mixed, a, is_ordered)
    rng.shuffle(mixed)
    assert sql.same_result(mixed, a, False)
    assert sql.same_result(mixed, a, True) == by_the_book(mixed, a, True)


def test_twenty_columns_are_compared_without_trying_every_order():
    gold = [tuple((row * 7 + column * column) % 5 for column in range(20)) for row in range(200)]
    mixed = [row[::-1] for row in reversed(gold)]
    began = time.process_time()
    assert sql.same_result(mixed, gold, False)
    assert sql.same_result(mixed[::-1], gold, True)
    assert not sql.same_result([(9, *row[1:]) for row in mixed], gold, False)
    assert time.process_time() - began < 2


PAIRS = DATA.parent / "cases" / "sql_pairs.jsonl"
STOPS = """
CREATE TABLE stop (id INTEGER PRIMARY KEY, name TEXT, opened TEXT, lines INTEGER, fare REAL);
INSERT INTO stop VALUES (1, 'Elm', '2014', 3, 1.0), (2, 'Oak', '2016', 2, 9.5),
                        (3, 'Cob', '2014', 5, NULL), (4, 'Ash', '2018', 3, 2.0);
CREATE TABLE ride (id INTEGER PRIMARY KEY, who TEXT, stop_id INTEGER);
INSERT INTO ride VALUES (1, 'Ann', 1), (2, 'Ann', 1), (3, 'Bob', 2);
CREATE TABLE "year book" ("order" INTEGER);
INSERT INTO "year book" VALUES (1), (2);"""
# What is not clear is judged by what runs as SQL. Right: no-break spaces, and the number of tables.
DECIDED = {"s38", "s44"}


@pytest.mark.skipif(not PAIRS.is_file(), reason=f"the pairs are not at {PAIRS}")
def test_pairs_of_queries_are_judged_as_a_person_judges_them(tmp_path):
    file = tmp_path / "databases" / "stops.sqlite"
    file.parent.mkdir()
    connection = sqlite3.connect(file)
    connection.executescript(STOPS)
    connection.close()
    for pair in read_jsonl(PAIRS):
        right = pair["id"] in DECIDED if pair["right"] is None else pair["right"]
        example = one(tmp_path, pair["gold"], db_id="stops")
        assert spider.score(pair["pred"], example) is right, pair["id"]


# ---- cleaning ----

CLEANED = [
    ("SELECT 1", "SELECT 1"),
    (" SELECT  a ,\n b\tFROM\r\nt ", "SELECT a , b FROM t"),
    ("SELECT 1; SELECT 2", "SELECT 1"),
    ("SELECT ';' ; SELECT 2", "SELECT ';'"),
    ("SELECT 'it''s; so' , \"a;b\", `c;d`, [e;f] ; x",
     "SELECT 'it''s; so' , \"a;b\", `c;d`, [e;f]"),
    ("SELECT 'a  b\n\nc'\n\nQuestion: more?", "SELECT 'a  b\n\nc'"),
    ("\n\nSELECT 1\n \t\nthat is all", "SELECT 1"),
    ("SELECT 1<|endoftext|>SELECT 2", "SELECT 1"),
    ("SELECT 1</s></s>", "SELECT 1"),
    ("SQL: SELECT 1", "SELECT 1"),
    ("answer :\n\nSQL:SELECT 1", "SELECT 1"),
    ("```sql\nSELECT 1;\n```\nThis counts.", "SELECT 1"),
    ("Here it is:\n```\nSELECT 1\n```", "SELECT 1"),
    ("```SELECT 1```", "SELECT 1"),
    ("```sqlite\nSELECT 1", "SELECT 1"),
    ("SQL: ```SQL\nSELECT 1\n``` ```sql\nSELECT 2\n```", "SELECT 1"),
    ("SELECT 1\n```\nThis counts.", "SELECT 1"),
    ("SELECT a -- the first\nFROM t", "SELECT a FROM t"),
    ("SELECT a--\n,b/* ; \n\n */FROM t", "SELECT a ,b FROM t"),
    ("-- names\nSELECT 1", "SELECT 1"),
    ("SELECT '-- no comment' /* but ' this", "SELECT '-- no comment'"),
    ("SELECT a WHERE a > = 1 AND b <\n= 2 AND c ! = '> ='",
     "SELECT a WHERE a >= 1 AND b <= 2 AND c != '> ='"),
    ("SELECT\u00a01", "SELECT 1"),
    ("SELECT 'never closed; \n\n", "SELECT 'never closed;"),
    # left as they are, and so not SQL
    ("The query is: SELECT 1", "The query is: SELECT 1"),
    ("SELECT 1\nThis counts.", "SELECT 1 This counts."),
    ("`SELECT 1`", "`SELECT 1`"), ("(SELECT 1)", "(SELECT 1)"),
    ("SELECT 1 # all", "SELECT 1 # all"),
    ("~~~sql\nSELECT 1\n~~~", "~~~sql SELECT 1 ~~~"), ("SELECT 1<|im_end", "SELECT 1<|im_end"),
    ("SELECT \u2018a\u2019", "SELECT \u2018a\u2019"),
    ("", ""), (" \n\n ", ""), (";", ""), ("```", ""), ("SQL:", ""), ("<|im_end|>SELECT 1", ""),
]


@pytest.mark.parametrize("text, cleaned", CLEANED)
def test_what_was_meant_is_taken_from_what_was_written(text, cleaned):
    assert spider.clean_sql(text) == cleaned
    assert spider.extract(text) == (cleaned or None)


@given(st.text())
@example("'")
def test_a_quoted_text_survives_cleaning(text):
    assume("```" not in text and not spider.END.search(text))
    quoted = "SELECT '" + text.replace("'", "''") + "'"
    assert spider.clean_sql(f"SQL: {quoted} ; DROP TABLE t") == quoted


@settings(deadline=None)
@given(st.lists(st.sampled_from(["SELECT 1", ";", "'", '"', "`", "[", "--", "/*", "*/", "\n", " ",
                                 "```", "sql\n", "SQL:", "<|", "|>", "</s>", "> =", "\0", "\ud800"])
                | st.text(max_size=3)).map("".join))
def test_cleaning_never_fails_and_leaves_no_blank_line_outside_of_quotes(text):
    cleaned = spider.clean_sql(text)
    assert cleaned == cleaned.strip()
    assert "\n" not in "".join(piece[0] for piece in spider.PIECE.finditer(cleaned)
                               if piece.lastgroup != "quoted")


@pytest.mark.parametrize("text", ["'" * 50_000, "/*" * 50_000, "< " * 50_000, "<" + " " * 100_000,
                                  "SQL:" * 50_000, "<|" * 50_000, "\n" * 100_000, "[" * 100_000,
                                  "```" * 50_000, " " * 100_000 + "x"])
def test_cleaning_takes_no_longer_for_hostile_text(text):
    began = time.process_time()
    spider.clean_sql(text)
    assert time.process_time() - began < 2


def test_without_cleaning_the_text_runs_as_it_was_written(folder):
    gold = "SELECT count(*) FROM item"
    for text in ("```sql\nSELECT 4\n```", "SQL: SELECT 4", "SELECT 4; SELECT 5",
                 "SELECT 4\n\nthat is it", "SELECT 4 WHERE 1 > = 1"):
        assert spider.score(text, one(folder, gold))
        assert not spider.score(text, one(folder, gold, "raw"))
        assert not spider.score(text, one(folder, gold, "none,raw"))
    assert spider.score(" SELECT 4;\n", one(folder, gold, "raw"))


# ---- what a model must not do ----

HOSTILE = [
    "DROP TABLE item", "INSERT INTO item (name) VALUES ('x')", "UPDATE item SET name = 'x'",
    "DELETE FROM item", "REPLACE INTO item (id) VALUES (1)", "ALTER TABLE item RENAME TO t",
    "CREATE TABLE t (a)", "CREATE TEMP TABLE t AS SELECT 1", "CREATE VIEW v AS SELECT 1",
    "CREATE TEMP TRIGGER t DELETE ON item BEGIN SELECT 1; END", "CREATE INDEX i ON item (name)",
    "CREATE VIRTUAL TABLE t USING fts5(a)", "WITH t AS (SELECT 1) DELETE FROM item",
    "ATTACH '{folder}/new.db' AS new", "DETACH main", "VACUUM", "VACUUM INTO '{folder}/new.db'",
    "PRAGMA writable_schema = 1", "PRAGMA query_only = 0", "PRAGMA journal_mode = WAL",
    "PRAGMA user_version = 7", "PRAGMA temp_store_directory = '{folder}'", "PRAGMA hard_heap_limit",
    "SELECT * FROM pragma_table_info('item')", "BEGIN EXCLUSIVE", "SAVEPOINT s", "ANALYZE",
    "SELECT load_extension('{folder}/x.so')", "SELECT LOAD_EXTENSION('x', 'y')",
    "SELECT readfile('/etc/passwd')", "SELECT writefile('{folder}/new', 'x')",
    "SELECT fts3_tokenizer('simple')", "SELECT edit('x', 'sh')", "SELECT sqlite_log(1, 'x')",
    "SELECT 1; DROP TABLE item", "SELECT 1 /* */; -- \nDROP TABLE item",
    ".shell touch {folder}/new", ".output {folder}/new", "SELECT 1\0; DROP TABLE item",
    "SELECT '\ud800'", "\0", "SELECT 1 --\0",
]


def hashes(folder) -> dict:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("query", HOSTILE)
def test_nothing_is_changed_or_written(folder, query, monkeypatch):
    monkeypatch.chdir(folder)
    before = hashes(folder)
    query = query.replace("{folder}", str(folder))
    for db_id in ("shop", "packed"):
        for variant in ("", "raw"):
            spider.score(query, one(folder, EMPTY, variant, db_id))
            assert not spider.score(query, one(folder, EMPTY, variant, db_id))
        verdict = sql.judge(one(folder, "", db_id=db_id).meta["database"], query, EMPTY)
        assert verdict.error and not verdict.gold_error and not verdict.is_equal
        assert spider.score("SELECT count(*) FROM item", one(folder, "SELECT 4", db_id=db_id))
    assert hashes(folder) == before


WALLS = """
import sqlite3
from pathlib import Path
from tasks import sql
connection = sql.connect(SHOP)
connection.set_authorizer(None)                 # only the file is closed to writing now
connection.execute("PRAGMA query_only = 0")
try:
    connection.execute("DELETE FROM item")
except sqlite3.OperationalError as error:
    print(error)
connection = sqlite3.connect(SHOP)              # only the authorizer
connection.set_authorizer(sql.allow)
try:
    connection.execute("DELETE FROM item")
except sqlite3.DatabaseError as error:
    print(error)
connection.close()
sql.confine()                                   # only the system
try:
    Path(SHOP + ".new").write_text("x")
except OSError as error:
    print(error.strerror)
Path(SHOP + ".new").unlink(missing_ok=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the third wall is the system's")
def test_each_wall_stands_alone(shop):
    done = python("-c", WALLS.replace("SHOP", repr(shop)))
    assert done.stdout.splitlines() == ["attempt to write a readonly database", "not authorized",
                                        "File too large"], done.stderr


def test_a_column_may_have_the_name_of_a_forbidden_function(folder):
    assert spider.score("SELECT edit FROM edit", one(folder, "SELECT 'ab'"))


CTE = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
MANY = ("WITH RECURSIVE c(x) AS (SELECT hex(zeroblob(99999)) UNION ALL SELECT x FROM c) "
        "SELECT x FROM c")
HUGE = "printf('%.999999c', 'a')"
QUICK_BOMBS = [                                 # bounded by sizes; the others by steps and time
    "SELECT zeroblob(1000000000)", "SELECT randomblob(999999999)",
    "SELECT replace(replace(hex(zeroblob(400000)), '0', '00000'), '0', '00000')",
    "WITH RECURSIVE c(x) AS (SELECT 'a' UNION ALL SELECT x || x FROM c) SELECT count(*) FROM c",
    MANY, *("SELECT " + "(" * n + "1" + ")" * n for n in (9_000, 100_000)),
    "SELECT " + "NOT " * 20_000 + "1", "SELECT " + "- " * 40_000 + "1",
    "SELECT 1 WHERE " + " OR ".join(["1=1"] * 1_000_000),
    "SELECT 1 WHERE " + " OR ".join(["1=1"] * 10_000),
    "SELECT " + ",".join("1" * 45_000), "SELECT " + ",".join("1" * 3_000_000),
    " UNION ALL ".join(["SELECT 1"] * 5_000), "SELECT * FROM " + ", ".join(["item"] * 100),
    "SELECT * FROM " + "(SELECT * FROM " * 300 + "item" + ")" * 300, "x" * 10_000_000,
]
BOMBS = [
    CTE + "SELECT count(*) FROM c", CTE + "SELECT x FROM c", CTE + "SELECT x FROM c ORDER BY -x",
    CTE + "SELECT DISTINCT x % 7 FROM c", CTE + "SELECT group_concat(x) FROM c",
    "SELECT count(*) FROM " + ", ".join(f"item c{i}" for i in range(30)),
    "SELECT * FROM " + ", ".join(f"item c{i}" for i in range(30)),
    "SELECT c1.id FROM " + ", ".join(f"item c{i}" for i in range(30)) + " ORDER BY c9.id || c2.id",
    "SELECT count(DISTINCT x || x || x) FROM (" + CTE + "SELECT x FROM c)",
    "SELECT printf('%.*c', 1000000000, 'x')",
    f"SELECT instr({HUGE}, printf('%.499999c', 'a') || 'b')",
    "WITH a0 AS (SELECT 1 x), " + ", ".join(f"a{i} AS (SELECT p.x FROM a{i - 1} p, a{i - 1} q)"
                                            for i in range(1, 40)) + " SELECT * FROM a39",
]


def ends(database: str, query: str) -> str:
    """Judge a query that must not be right, and then one that is -> the error of the first, if any.

    Some of these are refused and some come to an end, as SQLite's version and the machine go.
    """
    verdict = sql.judge(database, query, "SELECT count(*) FROM item")
    assert not verdict.is_equal
    assert sql.judge(database, "SELECT 1", "SELECT 1").is_equal
    return verdict.error


@pytest.mark.parametrize("query", QUICK_BOMBS, ids=range(len(QUICK_BOMBS)))
def test_what_is_too_large_ends_by_its_size_and_not_by_the_clock(shop, query):
    assert "no result within" not in ends(shop, query)


@pytest.mark.parametrize("query", QUICK_BOMBS[:4], ids=range(4))
def test_a_value_has_a_largest_size(shop, query):
    assert "too big" in sql.judge(shop, query, "SELECT 1").error


def test_a_result_has_a_largest_size(shop):
    assert "more than 64,000,000 bytes" in sql.judge(shop, MANY, "SELECT 1").error


@pytest.mark.slow
@pytest.mark.parametrize("query", BOMBS, ids=range(len(BOMBS)))
def test_what_takes_for_ever_ends(shop, query, monkeypatch):
    monkeypatch.setattr(sql, "SECONDS", 10)
    ends(shop, query)


def test_a_query_has_a_largest_number_of_steps(shop, monkeypatch):
    """Whatever the clock says: the same on every machine, and no process has to be killed."""
    query = CTE.replace("FROM c)", "FROM c WHERE x < 200000)") + "SELECT count(*) FROM c"
    assert sql.run_query(shop, query) == [(200_000,)]           # about 3 million steps
    monkeypatch.setattr(sql, "MAX_STEPS", 1_000_000)
    for _ in range(2):                                          # each query has its own count
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            sql.run_query(shop, query)
        assert sql.run_query(shop, "SELECT count(*) FROM item") == [(4,)]


def test_a_query_without_an_end_is_stopped_by_its_steps(shop):
    verdict = sql.judge(shop, CTE + "SELECT count(*) FROM c /* steps */", EMPTY)
    assert verdict.error == "OperationalError: interrupted"


ONE_STEP = f"SELECT instr({HUGE}, printf('%.{{}}c', 'a') || 'b')"       # hours, in a single step


def test_a_step_that_takes_for_ever_is_killed_and_the_next_query_does_not_notice(shop, monkeypatch):
    for n in range(2):
        began = time.perf_counter()
        query, process = ONE_STEP.format(499990 + n), sql.worker()
        with monkeypatch.context() as patch:
            patch.setattr(sql, "SECONDS", 1)
            verdict = sql.judge(shop, query, EMPTY)
        assert time.perf_counter() - began > 0.9
        assert process.returncode == -signal.SIGKILL            # by us, not by its own alarm
        assert verdict == ("", "no result within 1 s and 1,000,000,000 bytes", False)
        assert sql.judge(shop, f"SELECT {n}", f"SELECT {n}") == ("", "", True)


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="this system has no such timer")
def test_a_step_that_takes_for_ever_ends_also_if_nobody_waits_for_it(shop):
    """The process that asked may have been killed."""
    request = json.dumps([1, shop, ONE_STEP.format(499_000), EMPTY]) + "\n"
    done = subprocess.run([sys.executable, "-I", sql.__file__], input=request, text=True,
                          capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (-signal.SIGALRM, "ready\n")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such timer")
def test_after_ctrl_c_no_late_answer_is_taken_for_the_next(shop):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        sql.judge(shop, "SELECT 5", "SELECT 5")
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            sql.judge(shop, CTE + "SELECT count(*) FROM c /* interrupted */", EMPTY)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sql.judge(shop, "SELECT 6", "SELECT 6").is_equal


def is_alive(pid: str) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")
def test_one_process_serves_many_queries_and_ends_with_the_one_who_asks(shop):
    code = ("import os, signal\nfrom tasks import sql\n"
            f"[sql.judge({shop!r}, f'SELECT {{i}}', 'SELECT 1') for i in range(3)]\n"
            "print(sql.worker().pid, sql.worker.cache_info().misses, flush=True)\n")
    for end in ("", "os.kill(os.getpid(), signal.SIGTERM)"):
        done = python("-W", "error", "-c", code + end)
        assert done.stderr == ""
        pid, started = done.stdout.split()
        assert started == "1"
        wait_until(lambda: not is_alive(pid))       # the process that runs SQL


@pytest.mark.skipif(os.name != "posix", reason="needs a program that ends at once")
def test_a_python_that_cannot_run_sql_is_an_error_and_not_a_wrong_answer(shop, monkeypatch):
    sql.worker.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(OSError, match="^/bin/true cannot run .*sql.py$"):
        sql.judge(shop, "SELECT 7", "SELECT 7")
    monkeypatch.undo()
    assert sql.judge(shop, "SELECT 7", "SELECT 7").is_equal


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_broken_database_is_the_golds_error(tmp_path, content):
    for name in ("bad.sqlite", "bad.sqlite.gz"):
        (tmp_path / name).write_bytes(content)
        verdict = sql.judge(str(tmp_path / name), "SELECT 1", "SELECT count(*) FROM item")
        assert verdict.gold_error and not verdict.is_equal
    assert sql.judge(str(tmp_path / "none.sqlite"), "SELECT 1", "SELECT 1").gold_error
    assert not (tmp_path / "none.sqlite").exists()


def test_a_database_may_lie_anywhere_and_be_read_only(tmp_path, shop):
    path = tmp_path / "a b?c#d%20e'f" / "\u00e4.sqlite"
    path.parent.mkdir()
    path.write_bytes(Path(shop).read_bytes())
    path.chmod(0o400)
    path.parent.chmod(0o500)
    assert sql.judge(str(path), "SELECT 4", "SELECT count(*) FROM item").is_equal
    path.parent.chmod(0o700)


# ---- rows, schemas, scores ----


def test_a_prompt_holds_the_schema_and_the_question(folder):
    first = spider.load("test", str(folder))[0]
    assert first.prompt == (
        "CREATE TABLE item (id number PRIMARY KEY, name text, price number, stock number, "
        "maker text)\n"
        'CREATE TABLE edit (edit text, "odd name" others REFERENCES item(id))\n\n'
        "Question: How many?\nSQL:")
    assert first.answer == " SELECT count(*) FROM item"
    assert first.meta == {"id": "spider/dev/1", "gold": "SELECT count(*) FROM item",
                          "db_id": "shop", "database": str(folder / "databases" / "shop.sqlite"),
                          "is_raw": False}
    assert spider.load("test", str(folder), "none")[0].prompt == (
        "For db_id:[shop]\n\nQuestion: How many?\nSQL:")


def test_a_name_is_quoted_where_a_query_would_have_to():
    assert [spider.quoted(name) for name in ("a1", "_a", "1a", "a b", "From", "a(b)", "%")] == [
        "a1", "_a", '"1a"', '"a b"', '"From"', '"a(b)"', '"%"']


def test_the_official_folder_gives_the_same_examples(folder, tmp_path, shop):
    for name, source in (("dev.json", "dev.jsonl"), ("train_spider.json", "train.jsonl")):
        rows = [json.loads(line) for line in (folder / source).read_text().splitlines()]
        (tmp_path / name).write_text(json.dumps(rows))
    (tmp_path / "tables.json").write_text(json.dumps(
        [{"db_id": name, **OFFICIAL} for name in ("shop", "packed", "lost", HELD_OUT)]))
    (tmp_path / "database" / "shop").mkdir(parents=True)
    (tmp_path / "database" / "shop" / "shop.sqlite").write_bytes(Path(shop).read_bytes())
    for split in ("train", "validation", "test"):
        for ours, theirs in zip(spider.load(split, str(folder)), spider.load(split, str(tmp_path)),
                                strict=True):
            assert (ours.prompt, ours.answer, ours.meta["id"]) == (
                theirs.prompt, theirs.answer, theirs.meta["id"])
    assert spider.score("SELECT 4", spider.load("test", str(tmp_path))[0])


def test_validation_and_train_share_no_database(folder):
    train, held_out = (spider.load(split, str(folder)) for split in ("train", "validation"))
    assert [e.meta["id"] for e in train] == ["spider/train/1", "spider/train/3"]
    assert [e.meta["id"] for e in held_out] == ["spider/train/2"]


def test_shots_are_separated_as_extract_cuts(folder):
    shots = spider.load("train", str(folder), "none")
    prompt = few_shot(spider.load("test", str(folder), "none"), shots)[0].prompt
    assert prompt == ("For db_id:[shop]\n\nQuestion: How many?\nSQL: SELECT count(*) FROM item\n\n"
                      "For db_id:[shop]\n\nQuestion: One?\nSQL: SELECT 1\n\n"
                      "For db_id:[shop]\n\nQuestion: How many?\nSQL:")
    first, rest = shots[0].answer, prompt.removeprefix(shots[0].prompt)
    assert spider.extract(rest) == first.strip()


def test_a_row_without_its_database_is_never_right_and_is_counted(folder):
    examples = spider.load("test", str(folder))
    assert [bool(e.meta["database"]) for e in examples] == [True, True, False, True]
    golds = [e.answer for e in examples]
    assert [spider.score(text, e) for text, e in zip(golds, examples)] == [True, True, False, False]
    assert spider.extra_scores(examples, golds) == {
        "exec_match": 1.0, "runs": 1.0, "no_rows_baseline": 0.0, "exact_string": 1.0,
        "rows_without_database": 1, "rows_whose_gold_fails": 1}
    texts = ["SELECT 5", "SELECT", "", "SQL: SELECT  nosuch FROM item;"]
    assert spider.extra_scores(examples, texts) == {
        "exec_match": 0.0, "runs": 0.5, "no_rows_baseline": 0.0, "exact_string": 0.25,
        "rows_without_database": 1, "rows_whose_gold_fails": 1}
    lost = examples[2:3]
    assert spider.extra_scores(lost, [""])["exec_match"] == 0.0
    assert spider.extra_scores([], [])["exact_string"] == 0.0


def test_the_constant_baseline_is_the_share_of_golds_without_rows(folder):
    examples = [one(folder, gold) for gold in (EMPTY, "SELECT 1", "SELECT count(*) FROM item")]
    assert spider.extra_scores(examples, [""] * 3)["no_rows_baseline"] == pytest.approx(1 / 3)


TABLES = {"tables.jsonl": [{"db_id": "shop", **SCHEMA}]}
ACCIDENTS = {   # what the folder has, the split, the kind of error, what its sentence names
    "nothing": ({}, "test", FileNotFoundError, ["has no schemas", "yale-lily.github.io/spider"]),
    **{f"schemas that are {text!r}": ({"tables.json": text}, "test", ValueError, ["tables.json"])
       for text in ("{}", "[1]", '[{"db_id": "shop"}]', '[{"db_id": 1, "tables": 2}]', "\u00ff",
                    "[")},
    "no rows": (TABLES, "test", FileNotFoundError,
                ["dev.jsonl", "dev.json", "yale-lily.github.io/spider"]),
    **{f"a row {bad}": ({**TABLES, "dev.jsonl": [bad]}, "test", ValueError,
                        ["/dev.jsonl: spider dev/1: 'db_id'"])
       for bad in ({"db_id": "shop"}, {**row("shop"), "query": 3}, {**row("shop"), "db_id": None})},
    "a row of train": ({**TABLES, "train.jsonl": [{"question": "?"}]}, "train", ValueError,
                       ["train/1"]),
    **{f"rows that are {text[:20]!r}": ({**TABLES, "dev.json": text}, "test", ValueError,
                                        ["dev.json is not"])
       for text in ("{}", "[1]", "[" * 100_000, '[{"db_id": "\\ud800"}]', "[" + "9" * 5_000 + "]",
                    "\xef\xbb\xbf{}", "", "\0")},
    "a path as name": ({**TABLES, "dev.jsonl": [row("../shop")]}, "test", ValueError,
                       ["'../shop' is not the name of a database"]),
    "a row without its schema": ({**TABLES, "dev.jsonl": [row("shop"), row("other")]}, "test",
                                 ValueError, ["dev/2", "'other'"]),
    "no databases": ({**TABLES, "dev.jsonl": [row("shop")]}, "test", FileNotFoundError,
                     ["none of spider's databases", "yale-lily.github.io/spider"]),
    "no row held out": ({**TABLES, "train.jsonl": [row("shop")]}, "validation", ValueError,
                        ["belongs to validation"]),
}


@pytest.mark.parametrize("files, split, kind, words", ACCIDENTS.values(), ids=ACCIDENTS)
def test_every_accident_is_one_sentence(files, split, kind, words, tmp_path):
    for name, content in files.items():
        if isinstance(content, str):
            (tmp_path / name).write_text(content, encoding="latin-1")
        else:
            write_jsonl(tmp_path / name, content)
    said = sentence(spider.load, split, str(tmp_path), kind=kind)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("args, what", [
    *[((split,), "schemas") for split in ("train", "validation", "test")],
    (("test", "", "none"), "databases"), (("test", "", "none,raw"), "databases")])
def test_what_the_hub_lacks_is_one_sentence_that_says_where_it_is(args, what):
    said = sentence(spider.load, *args, kind=ValueError)
    assert f"spider's {what} are not on the hub" in said
    assert "--data_dir" in said and "https://yale-lily.github.io/spider" in said


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)],
                         ids=["folder", "pipe", "loop"])
@pytest.mark.parametrize("name", ["tables.json", "dev.json", "databases/shop.sqlite",
                                  "database/shop/shop.sqlite"])
def test_what_is_there_and_is_no_file_is_named(make, name, tmp_path):
    if name != "tables.json":
        write_jsonl(tmp_path / "tables.jsonl", [{"db_id": "shop", **SCHEMA}])
    write_jsonl(tmp_path / "dev.jsonl", [row("shop")])
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    make(tmp_path / name)
    said = sentence(spider.load, "test", str(tmp_path), kind=OSError)
    assert f"{tmp_path / name} is not a file" in said


def test_training_needs_no_database(tmp_path):
    write_jsonl(tmp_path / "tables.jsonl", [{"db_id": "shop", **SCHEMA}])
    assert len(spider.load("train", write_jsonl(tmp_path / "train.jsonl", [row("shop")]))) == 1


# ---- the real ones ----

REAL_VERDICTS = [   # number of the row in dev, prediction, verdict
    (1, "SELECT count(Singer_ID) FROM singer", True),
    (1, "SELECT sum(1) FROM singer WHERE age > 0", True),
    (1, "SELECT max(Singer_ID) FROM singer", True),             # by chance: the ids are 1 to 6
    (1, "SELECT count(*) FROM singers", False),
    (3, "SELECT age, name, country FROM singer ORDER BY age DESC", True),
    (3, "SELECT name, country, age FROM singer ORDER BY age", False),
    (3, "SELECT name, country, age FROM singer", False),
    (3, "SELECT name, age FROM singer ORDER BY age DESC", False),
    (5, "SELECT min(age), max(age), avg(age) FROM singer WHERE country = \"France\"", True),
    (5, "SELECT avg(age), min(age), max(age) FROM singer WHERE country = 'france'", False),
    (7, "SELECT song_release_year, song_name FROM singer WHERE age = (SELECT min(age) FROM singer)",
     True),
    (9, "SELECT country FROM singer WHERE age > 20 GROUP BY country", True),
    (9, "SELECT country FROM singer WHERE age > 20", False),
    (19, "SELECT name, capacity FROM stadium WHERE average = (SELECT max(average) FROM stadium)",
     True),
    (180, "```sql\nSELECT country\nFROM airlines\nWHERE airline = 'JetBlue Airways';\n```", True),
    (180, "SELECT country FROM airlines WHERE airline LIKE 'jetblue%'", True),
    (378, "SELECT document_id FROM paragraphs GROUP BY 1 HAVING count(*) IN (1, 2)", True),
    (378, "SELECT document_id FROM paragraphs GROUP BY 1 HAVING count(*) < 2", False),
    (394, "SQL: SELECT count(*), hometown FROM teacher GROUP BY hometown\n\nQuestion: so?", True),
    (495, "SELECT min(killed), max(killed) FROM death", True),
    (495, "SELECT max(killed) FROM death UNION SELECT min(killed) FROM death", False),
    (498, "SELECT name, result FROM battle WHERE NOT bulgarian_commander = 'Boril'", True),
    (498, "SELECT name, result FROM battle", False),
    (610, 'SELECT c.series_name FROM tv_channel c, cartoon t WHERE c.id = t.channel AND '
          't.title = "The Rise of the Blue Beetle!"', True),
    (727, "SELECT total(surfacearea) FROM country WHERE continent IN ('Asia', 'Europe')", True),
    (727, "SELECT sum(surfacearea) FROM country GROUP BY continent", False),
    (751, "SELECT count(continent) FROM country JOIN countrylanguage ON code = countrycode "
          "WHERE language = 'Chinese'", False),
    (855, "SELECT orchestra FROM orchestra o WHERE NOT EXISTS (SELECT 1 FROM performance p "
          "WHERE p.orchestra_id = o.orchestra_id)", True),
    (896, "SELECT h.id FROM highschooler h LEFT JOIN friend ON h.id = student_id "
          "WHERE student_id IS NULL", True),
    (896, "SELECT h.id FROM highschooler h JOIN friend ON h.id = student_id", False),
    (1007, "SELECT name FROM singer WHERE citizenship NOT IN ('France')", True),
    (1007, "SELECT name FROM singer WHERE citizenship = 'France'", False),
    (431, "SELECT count(*) FROM players", False),               # wta_1: without a database
]


@pytest.fixture(scope="module")
def dev():
    return spider.load("test", str(REAL))


@needs_real_rows
def test_the_real_splits_have_the_sizes_that_are_written_down():
    sizes = {split: spider.load(split, str(REAL)) for split in ("train", "validation", "test")}
    names = {split: {e.meta["db_id"] for e in rows} for split, rows in sizes.items()}
    assert {split: (len(rows), len(names[split])) for split, rows in sizes.items()} == {
        "train": (6_043, 120), "validation": (957, 20), "test": (1_034, 20)}
    assert len(set.union(*names.values())) == 160
    assert len({e.meta["id"] for rows in sizes.values() for e in rows}) == 8_034
    assert sum(bool(e.meta["database"]) for e in sizes["test"]) == 972


def cpu_seconds() -> float:
    """Return the CPU time so far, with that of the process that runs SQL, which is ended for it."""
    sql.stop(sql.worker())
    sql.worker.cache_clear()
    return time.process_time() + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


@needs_real_rows
def test_every_gold_query_is_right_and_quickly_so():
    sql.judge.cache_clear()
    began = cpu_seconds()
    for variant in ("", "none", "raw"):
        examples = spider.load("test", str(REAL), variant)
        assert sum(spider.score(e.answer, e) for e in examples) == 972
        assert not any(spider.score("", e) or spider.score("SELECT", e) for e in examples)
    scores = spider.extra_scores(examples, [e.answer for e in examples])
    assert scores == {"exec_match": 1.0, "runs": 1.0, "no_rows_baseline": 49 / 972,
                      "exact_string": 1.0, "rows_without_database": 62, "rows_whose_gold_fails": 0}
    assert cpu_seconds() - began < 10


@needs_real_rows
def test_the_answer_to_another_question_is_mostly_wrong(dev):
    examples = [e for e in dev if e.meta["database"]]
    began = cpu_seconds()
    for shift in (1, 7):
        right = sum(spider.score(examples[i - shift].answer, e) for i, e in enumerate(examples))
        assert right < 0.6 * len(examples)      # neighbours are often paraphrases
    assert cpu_seconds() - began < 10


@needs_real_rows
@pytest.mark.parametrize("number, prediction, verdict", REAL_VERDICTS)
def test_a_real_question_answered_in_another_way(dev, number, prediction, verdict):
    example = dev[number - 1]
    assert spider.score(prediction, example) is verdict
    if not example.meta["database"]:
        return
    connection = sqlite3.connect(":memory:")
    connection.deserialize(gzip.decompress(Path(example.meta["database"]).read_bytes()))
    try:
        rows = connection.execute(spider.clean_sql(prediction)).fetchall()
    except sqlite3.OperationalError:
        rows = [("it does not run",)]
    gold = example.meta["gold"]
    expected = connection.execute(gold).fetchall()
    assert verdict == by_the_book(rows, expected, "ORDER BY" in gold)


@needs_real_rows
def test_every_gold_query_compiles_on_the_schema_in_the_prompt():
    """So the schema names every table and column that is needed, in a way SQLite understands."""
    schemas = spider.read_schemas(str(REAL))
    connections, failing = {}, []
    for split in ("test", "validation", "train"):
        for e in spider.load(split, str(REAL)):
            db_id = e.meta["db_id"]
            if db_id not in connections:
                connections[db_id] = sqlite3.connect(":memory:")
                for line in schemas[db_id].splitlines():
                    connections[db_id].execute(line)
            try:
                connections[db_id].execute("EXPLAIN " + spider.clean_sql(e.answer))
            except sqlite3.OperationalError:
                failing.append(db_id)
    # a table that is in no schema, and a question asked twice with ORDER BY before INTERSECT
    assert sorted(failing) == ["assets_maintenance"] + 2 * ["document_management"]


@needs_real_rows
@pytest.mark.parametrize("variant, median, longest", [("", 663, 2213), ("none", 105, 210)])
def test_prompts_are_as_long_as_written_down(variant, median, longest):
    lengths = sorted(len(e.prompt.encode()) for e in spider.load("test", str(REAL), variant))
    assert (lengths[516], lengths[-1]) == (median, longest)


@needs_real_rows
def test_scoring_leaves_the_real_databases_as_they_are():
    sums = dict(reversed(line.split()) for line in
                (REAL / "databases" / "SHA256SUMS").read_text().splitlines())
    for path in (REAL / "databases").glob("*.gz"):
        content = path.read_bytes()
        found = {hashlib.sha256(content).hexdigest(),
                 hashlib.sha256(gzip.decompress(content)).hexdigest()}
        known = sums.get(path.name) or sums.get(path.name.removesuffix(".gz"))
        assert known in found, path.name


def test_a_forbidden_function_is_forbidden_in_capitals_too():
    for name in ("load_extension", "LOAD_EXTENSION", "ReadFile"):
        assert sql.allow(sqlite3.SQLITE_FUNCTION, None, name) == sqlite3.SQLITE_DENY
    for name in ("count", "COUNT", "abs"):
        assert sql.allow(sqlite3.SQLITE_FUNCTION, None, name) == sqlite3.SQLITE_OK
    assert sql.allow(sqlite3.SQLITE_READ, None, "edit") == sqlite3.SQLITE_OK        # a column
