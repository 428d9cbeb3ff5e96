"""Execution match: does a query that a model wrote give the result of the gold query?

    judge("concert_singer.sqlite", "SELECT count(*) FROM singer", gold) -> Verdict("", "", True)

The rule is that of taoyds/test-suite-sql-eval (exec_eval.py) on one database. A query that fails is
wrong. Two results without rows are equal. Otherwise the numbers of rows and columns must be equal,
and there must be one order of the columns in which all rows agree: in sequence if the gold query
has an ORDER BY, else as a multiset. Values are equal as in Python: 1 == 1.0 and NULL == NULL, but
'1' != 1. By default the official code drops every DISTINCT first and allows 60 s. We keep DISTINCT,
and allow MAX_STEPS and SECONDS.

A model may write anything, so its queries run in a process of their own: this file as a script.
There SQLite may read the one database and nothing else. The file is opened as immutable (or
unpacked into memory), an authorizer refuses everything but reading, and steps, memory and result
are bounded. SQLite does not bound a single step, such as a LIKE that takes hours; the process is
killed instead.
"""
import atexit
import gzip
import json
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from itertools import count
from pathlib import Path
from threading import Timer
from typing import NamedTuple

SECONDS = 10                # for a pair of queries; then the process is killed
MAX_STEPS = 100_000_000     # SQLite's instructions: a second or two, and the same on every machine
STEPS_AT_ONCE = 100_000     # between two checks of their number
MAX_RESULT = 64_000_000     # bytes of all rows of a result, roughly
MAX_VALUE = 1_000_000       # bytes of a text, a blob or a row
MAX_SQL = 100_000           # bytes of a query
MAX_HEAP = 256_000_000      # bytes for SQLite, temporary tables included
MAX_MEMORY = 1_000_000_000  # bytes for the whole process

ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION,
           sqlite3.SQLITE_RECURSIVE}
# functions that load code, show addresses or touch files; some builds of SQLite have them
FORBIDDEN = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit", "sqlite_log"}


class Verdict(NamedTuple):
    gold_error: str     # why the gold query failed on this database, "" if it ran
    error: str          # the same for the prediction
    is_equal: bool      # both ran and their results are equal


@lru_cache(maxsize=8192)
def judge(database: str, prediction: str, gold: str) -> Verdict:
    """Compare two queries on a SQLite file (or .sqlite.gz), given by its absolute path.

    Raises OSError in one sentence if this Python's SQLite cannot run queries safely.
    """
    reply = ask([SECONDS, database, prediction, gold])
    if reply is None:
        return Verdict("", f"no result within {SECONDS} s and {MAX_MEMORY:,} bytes", False)
    return Verdict(*reply)


# ----------------------------------------------------------------------------------------------
# comparing results


def same_result(predicted: list[tuple], gold: list[tuple], is_ordered: bool) -> bool:
    """Return whether the rows agree in some order of the predicted columns (see the top)."""
    if not predicted and not gold:
        return True
    if len(predicted) != len(gold) or len(predicted[0]) != len(gold[0]):
        return False
    view = list if is_ordered else Counter
    theirs, ours = list(zip(*predicted)), list(zip(*gold))      # by column
    heads = [view(zip(*ours[:n])) for n in range(1, len(ours) + 1)]

    def can_be_completed(chosen: list[int]) -> bool:
        """Return whether this choice of their columns, equal to our first ones, can be finished."""
        if len(chosen) == len(ours):
            return True
        tried = set()
        for i in set(range(len(theirs))) - set(chosen):
            if theirs[i] in tried:          # two equal columns are one choice
                continue
            tried.add(theirs[i])
            if view(zip(*(theirs[j] for j in [*chosen, i]))) == heads[len(chosen)]:
                if can_be_completed([*chosen, i]):
                    return True
        return False

    return can_be_completed([])


def has_order(gold: str) -> bool:
    return "order by" in " ".join(gold.lower().split())


# ----------------------------------------------------------------------------------------------
# in our process: ask the worker


def ask(request: list):
    """Return the worker's reply, or None if it was killed or died of the request."""
    if worker().poll() is not None:
        worker.cache_clear()
    process, reply = worker(), ""
    timer = Timer(SECONDS, process.kill)
    timer.start()
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
    except BrokenPipeError:
        pass
    finally:    # after Ctrl-C too: a late reply would be taken for that to the next request
        timer.cancel()
        if not reply.endswith("\n"):
            stop(process)
            worker.cache_clear()
    return json.loads(reply) if reply.endswith("\n") else None


@lru_cache(maxsize=1)
def worker() -> subprocess.Popen:
    """Start the process that runs queries. Raises OSError if it cannot."""
    process = subprocess.Popen([sys.executable, "-I", __file__], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    atexit.register(stop, process)
    hello = process.stdout.readline()
    if hello != "ready\n":
        stop(process)
        raise OSError(hello.strip() or f"{sys.executable} cannot run {__file__}")
    return process


def stop(process: subprocess.Popen):
    process.kill()
    process.communicate()                   # close the pipes and wait for its end
    atexit.unregister(stop)


# ----------------------------------------------------------------------------------------------
# in the worker: run queries


def serve():
    """Answer requests line by line until stdin ends."""
    print(what_is_missing() or "ready", flush=True)
    confine()
    alarm = getattr(signal, "alarm", lambda seconds: None)      # not on Windows
    for line in sys.stdin:
        seconds, *request = json.loads(line)
        alarm(2 * seconds)                  # ends this process if the asking one was killed
        print(json.dumps(compare(*request)), flush=True)
        alarm(0)


def what_is_missing() -> str:
    """Return why this Python cannot run queries, "" if it can."""
    if not hasattr(sqlite3.Connection, "setlimit"):
        return "running SQL safely takes the sqlite3 module of Python 3.11 or later"
    try:                                    # a fifth of Spider's gold queries have "texts"
        allow_double_quotes(sqlite3.connect(":memory:")).execute('SELECT "text"')
    except sqlite3.Error:
        return "this Python's SQLite was built without double-quoted texts, which Spider needs"
    return ""


def allow_double_quotes(connection):
    """Turn double-quoted texts on where Python can (3.12); else SQLite's build decides."""
    if hasattr(connection, "setconfig"):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, True)
    return connection


def confine():
    """Bound this process's memory and forbid it to write files, where the system can."""
    try:
        import resource  # not on Windows
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    except (ImportError, OSError, ValueError):
        pass                                # SQLite's own bounds hold anyway


def compare(database: str, prediction: str, gold: str) -> Verdict:
    """Run both queries and compare their results."""
    try:
        expected = gold_rows(database, gold)
    except Exception as error:              # any error means that the query did not run
        return Verdict(f"{type(error).__name__}: {error}", "", False)
    try:
        rows = run_query(database, prediction)
        return Verdict("", "", same_result(rows, expected, has_order(gold)))
    except Exception as error:
        return Verdict("", f"{type(error).__name__}: {error}", False)


@lru_cache(maxsize=64)
def gold_rows(database: str, gold: str) -> list[tuple]:
    return run_query(database, gold)


def run_query(database: str, sql: str) -> list[tuple]:
    """Return the rows of one statement. Raises sqlite3.Error, ValueError or MemoryError."""
    connection = connect(database)
    checks = count(1)
    connection.set_progress_handler(lambda: next(checks) * STEPS_AT_ONCE > MAX_STEPS, STEPS_AT_ONCE)
    cursor = connection.execute(sql)
    if cursor.description is None:          # an empty text or a comment runs, without a result
        raise sqlite3.ProgrammingError("this is not a query")
    rows, size = [], 0
    for row in cursor:
        rows.append(row)
        size += sum(len(value) if isinstance(value, (str, bytes)) else 8 for value in row) + 64
        if size > MAX_RESULT:
            raise MemoryError(f"the result has more than {MAX_RESULT:,} bytes")
    return rows


@lru_cache(maxsize=8)
def connect(database: str) -> sqlite3.Connection:
    """Open a connection that can only read. Raises OSError or sqlite3.Error."""
    if database.endswith(".gz"):
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.deserialize(gzip.decompress(Path(database).read_bytes()))
    else:
        uri = Path(database).resolve().as_uri() + "?mode=ro&immutable=1"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    allow_double_quotes(connection)
    connection.text_factory = lambda text: text.decode("utf-8", "ignore")   # as the official code
    connection.execute("PRAGMA query_only = 1")
    connection.execute("PRAGMA temp_store = 2")                 # temporary tables in memory
    connection.execute(f"PRAGMA hard_heap_limit = {MAX_HEAP}")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)
    connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_SQL)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.set_authorizer(allow)
    return connection


def allow(action, _, name, *where) -> int:
    """Allow or deny a part of a statement; SQLite asks about each before the statement runs."""
    is_forbidden = action == sqlite3.SQLITE_FUNCTION and name.lower() in FORBIDDEN
    return sqlite3.SQLITE_OK if action in ALLOWED and not is_forbidden else sqlite3.SQLITE_DENY


if __name__ == "__main__":
    serve()
