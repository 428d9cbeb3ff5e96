"""Spider: questions about a database, answered in SQL (arXiv 1809.08887), scored by running it.

    CREATE TABLE singer (Singer_ID number PRIMARY KEY, Name text, ...)
    CREATE TABLE singer_in_concert (concert_ID number REFERENCES concert(concert_ID), ...)

    Question: How many singers do we have?
    SQL: SELECT count(*) FROM singer

The prompt's frame and the form of the schema are our choice. Rows, schemas and databases come from
a folder. It is the official spider_data.zip, unpacked (https://yale-lily.github.io/spider), or has

    train.jsonl[.gz] dev.jsonl[.gz]         db_id, question, query
    tables.jsonl[.gz]                       schemas, see `ddl`
    databases/{db_id}.sqlite[.gz]

test is the official dev set of 1,034 questions, the one that papers score. It shares no database
with train. Nor does our validation: it is the train rows whose database has a name with
crc32 % 10 == 0, which are 957 rows of 20 databases. 6,043 rows of 120 databases remain for train.
"""
import json
import os
import re
import zlib
from collections import defaultdict
from pathlib import Path

from tasks.common import Example, check_choice, load_rows, rows_name
from tasks.files import check_is_file, read_jsonl
from tasks.sql import judge

SOURCE = "spider_data.zip from https://yale-lily.github.io/spider has it all, once unpacked"
VARIANTS = {"none": "leaves the schema out", "raw": "does not clean the SQL",
            "none,raw": "does both"}
RESERVED = set("""all and as between by case else exists from group having in index is join limit
not null on or order select set table then to union using values when where""".split())
NO_ROWS = "SELECT 1 WHERE 0"    # a constant answer, right wherever the gold query gives no rows

# the paper states 4 shots; the lengths are ours: 99 % of the gold queries have at most 100 tokens
# (LLM-JEPA, arXiv 2509.14252, also generates 128), and each pass reveals one
PROTOCOL = dict(n_shot=4, gen_length=128, block_length=128, steps=128)

END = re.compile(r"<\|[^<>|]*\|>|</s>|<eos>")                   # end-of-text tokens as text
LABELS = re.compile(r"\A(?:\s*(?:SQL|Answer)\s*:)*", re.I)
LANGUAGE = re.compile(r"\A\w*sql\w*\s", re.I)                 # after a code fence
QUERY = re.compile(r"\s*(?:SELECT|WITH|VALUES)\b", re.I)
PIECE = re.compile(r"""
    (?P<quoted> '[^']*(?:'|\Z) | "[^"]*(?:"|\Z) | `[^`]*(?:`|\Z) | \[[^]]*(?:\]|\Z))
  | (?P<comment> --[^\n]* | /\*.*?(?:\*/|\Z))
  | (?P<end> ;) | (?P<space> \s+) | (?P<comparison> [<>!]\s+=) | (?P<other> \w+ | .)
""", re.X | re.S)


def load(split: str, data_dir: str = "", variant: str = "") -> list[Example]:
    """Return the rows of train, validation or test in file order, with the schema in the prompt.

    variant "none" puts the database's name in its place, as LLM-JEPA does; "raw" scores the text as
    it was written, without cleaning; "none,raw" does both. Without a folder there are only train
    and validation of "none", from the hub's `xlangai/spider`. A row whose database is missing has
    meta["database"] == "" and is never right; `extra_scores` counts such rows.
    Raises ValueError or FileNotFoundError in one sentence if rows, schemas or all databases of
    the test rows are missing, or a row lacks a field.
    """
    check_choice("spider", split, variant, variants=VARIANTS)
    has_schema = "none" not in variant.split(",")
    if not data_dir and (has_schema or split == "test"):
        what = "schemas" if has_schema else "databases"
        raise ValueError(f"spider's {what} are not on the hub; give a folder as --data_dir: "
                         f"{SOURCE}")
    source = "dev" if split == "test" else "train"
    schemas = read_schemas(data_dir) if has_schema else None
    examples, (rows, name) = [], read_rows(source, data_dir)
    for number, row in enumerate(rows, 1):
        is_validation = source == "train" and is_held_out(str(row.get("db_id")))
        if is_validation == (split == "validation"):
            try:
                examples.append(to_example(row, f"{source}/{number}", schemas, data_dir, variant))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    if not examples:
        raise ValueError(f"no row of spider's {source} belongs to {split}")
    if split == "test" and not any(example.meta["database"] for example in examples):
        raise FileNotFoundError(f"{data_dir} has none of spider's databases "
                                f"(databases/{examples[0].meta['db_id']}.sqlite, ...): {SOURCE}")
    return examples


def is_held_out(db_id: str) -> bool:
    return zlib.crc32(db_id.encode(errors="replace")) % 10 == 0


def to_example(row: dict, number: str, schemas: dict | None, data_dir: str, variant: str):
    """Make the Example of a row; its id is its place in the official file, which repeats some."""
    db_id, question, query = (row.get(key) for key in ("db_id", "question", "query"))
    if not all(isinstance(text, str) for text in (db_id, question, query)):
        raise ValueError(f"spider {number}: 'db_id', 'question' and 'query' must be texts")
    if not re.fullmatch(r"\w+", db_id):             # because it becomes part of a path
        raise ValueError(f"spider {number}: {db_id!r} is not the name of a database")
    if schemas is not None and db_id not in schemas:
        raise ValueError(f"spider {number}: {data_dir} lacks the schema of {db_id!r}: {SOURCE}")
    head = f"For db_id:[{db_id}]" if schemas is None else schemas[db_id]
    meta = {"id": f"spider/{number}", "gold": query.strip(), "db_id": db_id,
            "database": find_database(data_dir, db_id), "is_raw": "raw" in variant}
    return Example(framed(head, question), " " + query.strip(), meta)


def framed(head: str, question: str) -> str:
    return f"{head}\n\nQuestion: {question.strip()}\nSQL:"


def prompt(text: str) -> str:
    """Return the prompt of a schema and a question below it. Raises ValueError without a schema."""
    head, _, question = text.strip().rpartition("\n\n")
    if not head.strip():
        raise ValueError("a prompt of spider is a schema (CREATE TABLE ..., or For db_id:[name]), "
                         "a blank line and the question")
    return framed(head, question)


def score(completion: str, example: Example) -> bool:
    """Return whether the query gives the gold query's result; False if either cannot be run."""
    prediction, database = written(completion, example), example.meta["database"]
    return bool(database and prediction
                and judge(database, prediction, example.meta["gold"]).is_equal)


def extra_scores(examples: list[Example], completions: list[str]) -> dict[str, float]:
    """Return what is printed beside the accuracy, which counts every row: shares and two counts.

    Shares of the rows that can be judged: exec_match, runs (predictions without an error),
    no_rows_baseline (the score of a constant query without rows). Share of all rows: exact_string
    (the same text after cleaning). The counts are the rows that cannot be judged.
    """
    verdicts, baselines, n_same, n_missing = [], [], 0, 0
    for example, text in zip(examples, completions, strict=True):
        database, gold = example.meta["database"], example.meta["gold"]
        n_same += clean_sql(text) == clean_sql(gold)
        n_missing += not database
        baseline = judge(database, NO_ROWS, gold) if database else None
        if baseline and not baseline.gold_error:
            baselines.append(baseline)
            verdicts.append(judge(database, written(text, example) or "", gold))
    n = max(len(verdicts), 1)
    return {
        "exec_match": sum(verdict.is_equal for verdict in verdicts) / n,
        "runs": sum(not verdict.error for verdict in verdicts) / n,
        "no_rows_baseline": sum(verdict.is_equal for verdict in baselines) / n,
        "exact_string": n_same / max(len(examples), 1),
        "rows_without_database": n_missing,
        "rows_whose_gold_fails": len(examples) - n_missing - len(verdicts),
    }


# ----------------------------------------------------------------------------------------------
# from a completion to one query


def extract(completion: str) -> str | None:
    """Return the query to run, or None. The paper does not describe its own "SQL cleaning"."""
    return clean_sql(completion) or None


def written(completion: str, example: Example) -> str | None:
    """Return the query to run; with variant "raw" that is the completion itself."""
    return completion.strip() if example.meta["is_raw"] else extract(completion)


def clean_sql(text: str) -> str:
    """Return the first statement on one line; a model that knows SQL may still not know to stop.

    Cuts at end-of-text tokens. Drops leading `SQL:` and `Answer:`. Takes the content of the first
    code fence, unless a query stands before it. Outside of quotes it drops comments, cuts at the
    first `;` or blank line that follows some text, folds white space and joins `> =`. All else
    stays and fails as SQL: a sentence around the query, quotes or brackets around it, `~~~`, `#`.
    """
    text = LABELS.sub("", END.split(text)[0].split("\nQuestion:")[0])
    before, fence, after = text.partition("```")
    text = before if QUERY.match(before) or not fence else LANGUAGE.sub("", after.split("```")[0])
    pieces = []
    for piece in PIECE.finditer(text):
        kind, token = piece.lastgroup, piece[0]
        if kind == "end" or kind == "space" and token.count("\n") > 1:
            if pieces:
                break
        elif kind in ("space", "comment"):
            if pieces and pieces[-1] != " ":
                pieces.append(" ")
        else:
            pieces.append("".join(token.split()) if kind == "comparison" else token)
    return "".join(pieces).strip()


# ----------------------------------------------------------------------------------------------
# files


def read_rows(source: str, data_dir: str) -> tuple[list[dict], str]:
    """Return the questions of train or dev, from either form of the folder or from the hub, and the
    name of where they were."""
    official = Path(data_dir) / {"train": "train_spider.json", "dev": "dev.json"}[source]
    if data_dir and os.path.lexists(official):
        return read_json_list(official), str(official)
    try:
        rows = load_rows(source, data_dir, "xlangai/spider")
        return rows, rows_name(source, data_dir, "xlangai/spider")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, nor {official.name}: {SOURCE}") from None


def read_schemas(data_dir: str) -> dict[str, str]:
    """Return {db_id: DDL}. Raises FileNotFoundError or ValueError in one sentence."""
    names = ("tables.jsonl", "tables.jsonl.gz", "tables.json")
    paths = [Path(data_dir) / name for name in names]
    path = next((path for path in paths if os.path.lexists(path)), None)
    if path is None:
        raise FileNotFoundError(f"{data_dir} has no schemas (tables.jsonl.gz or tables.json): "
                                f"{SOURCE}")
    rows = read_json_list(path) if path.suffix == ".json" else read_jsonl(path)
    try:
        return {row["db_id"]: ddl(row if "tables" in row else nested(row)) for row in rows}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not hold Spider's schemas ({type(error).__name__}: {error})"
                         ) from None


def read_json_list(path: Path) -> list[dict]:
    """Return the rows of a file that holds one JSON list. Raises ValueError if it does not."""
    check_is_file(path)
    try:
        rows = json.loads(text := path.read_text("utf-8-sig"))
        if "\\u" in text:               # half a character may come in, and no file can hold it
            json.dumps(rows, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a list of JSON objects")
    return rows


def nested(row: dict) -> dict:
    """Bring a schema of the official tables.json into the form that `ddl` takes.

    There a column is known by its number: counted over all tables, with number 0 for `*`.
    """
    tables = {name: [] for name in row["table_names_original"]}
    columns = []                                    # by number: (its table's name, its name)
    for i, (table, name) in enumerate(row["column_names_original"]):
        columns.append((row["table_names_original"][table], name))
        if i:
            tables[columns[i][0]].append({"name": name, "type": row["column_types"][i],
                                          "primary_key": i in row["primary_keys"]})
    keys = [dict(zip(("table", "column", "ref_table", "ref_column"), columns[a] + columns[b]))
            for a, b in row["foreign_keys"]]
    return {"tables": [{"name": name, "columns": own} for name, own in tables.items()],
            "foreign_keys": keys}


def ddl(schema: dict) -> str:
    """Write a schema as SQL, one CREATE TABLE a line, with the keys beside their columns.

    Types are Spider's five, names as they are stored. The schema is
    {"tables": [{"name", "columns": [{"name", "type", "primary_key"}]}],
     "foreign_keys": [{"table", "column", "ref_table", "ref_column"}]}
    """
    references = defaultdict(str)
    for key in schema["foreign_keys"]:
        references[key["table"], key["column"]] += (f" REFERENCES {quoted(key['ref_table'])}"
                                                    f"({quoted(key['ref_column'])})")
    lines = []
    for table in schema["tables"]:
        columns = []
        for column in table["columns"]:
            primary = " PRIMARY KEY" * column["primary_key"]
            columns.append(f"{quoted(column['name'])} {column['type']}{primary}"
                           f"{references[table['name'], column['name']]}")
        if not table["name"].startswith("sqlite_"):
            lines.append(f"CREATE TABLE {quoted(table['name'])} ({', '.join(columns)})")
    return "\n".join(lines)


def quoted(name: str) -> str:
    """Return a name as a query has to write it."""
    is_plain = re.fullmatch(r"[A-Za-z_]\w*", name) and name.lower() not in RESERVED
    return name if is_plain else f'"{name}"'


def find_database(data_dir: str, db_id: str) -> str:
    """Return the path of a database's SQLite file in either form of the folder, "" if none.

    Raises OSError if there is something else in its place.
    """
    names = (f"databases/{db_id}.sqlite", f"databases/{db_id}.sqlite.gz",
             f"database/{db_id}/{db_id}.sqlite")
    paths = [Path(data_dir) / name for name in names if data_dir]
    path = next((path for path in paths if os.path.lexists(path)), None)
    if path is None:
        return ""
    check_is_file(path)
    return str(path.resolve())
