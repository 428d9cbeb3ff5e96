"""Spider: questions about a database, answered in SQL (arXiv 1809.08887); scored by running it.

    CREATE TABLE singer (Singer_ID number PRIMARY KEY, Name text, ...)
    CREATE TABLE singer_in_concert (concert_ID number REFERENCES concert(concert_ID), ...)

    Question: How many singers do we have?
    SQL: SELECT count(*) FROM singer

The frame and the form of the schema are our choice. Rows, schemas and databases come from a folder,
which is either the official spider_data.zip, unpacked, or

    train.jsonl[.gz] dev.jsonl[.gz]         db_id, question, query
    tables.jsonl[.gz]                       schemas, see `ddl`
    databases/{db_id}.sqlite[.gz]

test is the official dev set of 1,034 questions, which is what papers score. Like it, our validation
shares no database with train: it is the train rows whose database has a name with crc32 % 10 == 0,
957 rows of 20 databases. 6,043 rows of 120 databases are left to train on.
"""
import json
import re
import zlib
from pathlib import Path

from tasks.common import Example, load_rows
from tasks.files import read_jsonl
from tasks.sql import judge

SOURCE = "the official spider_data.zip is at https://yale-lily.github.io/spider"
VARIANTS = "", "none", "raw", "none,raw"
RESERVED = set("""all and as between by case else exists from group having in index is join limit
not null on or order select set table then to union using values when where""".split())
NO_ROWS = "SELECT 1 WHERE 0"                # a constant answer: right wherever the gold has no rows

# the paper states 4 shots; the lengths are ours: 99 % of the gold queries have at most 100 tokens
# (LLM-JEPA, arXiv 2509.14252, also generates 128), and each pass reveals one
PROTOCOL = dict(n_shot=4, gen_length=128, block_length=128, steps=128)

END = re.compile(r"<\|[^<>|]*\|>|</s>|<eos>")                   # end-of-text tokens as text
LABELS = re.compile(r"\A(?:\s*(?:SQL|Answer)\s*:)*", re.I)
LANGUAGE = re.compile(r"\A\w*sql\w*\s", re.I)                 # behind a code fence
QUERY = re.compile(r"\s*(?:SELECT|WITH|VALUES)\b", re.I)
PIECE = re.compile(r"""
    (?P<quoted> '[^']*(?:'|\Z) | "[^"]*(?:"|\Z) | `[^`]*(?:`|\Z) | \[[^]]*(?:\]|\Z))
  | (?P<comment> --[^\n]* | /\*.*?(?:\*/|\Z))
  | (?P<end> ;) | (?P<space> \s+) | (?P<comparison> [<>!]\s+=) | (?P<other> \w+ | .)
""", re.X | re.S)


def load(split: str, data_dir: str = "", variant: str = "") -> list[Example]:
    """Rows of train, validation or test in file order, with the schema in the prompt.

    variant "none" has the database's name instead, as LLM-JEPA does; "raw" scores what was written
    without cleaning it; "none,raw" does both. Without a folder only train and validation of "none"
    can be had, from the hub's `xlangai/spider`. A row whose database is missing is never right, and
    its meta's "database" is ""; `extra_scores` counts such rows.
    Raises ValueError or FileNotFoundError in one sentence if rows, schemas or all databases of
    the test rows are missing, or a row lacks a field.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"spider has no split {split!r}; choose from train, validation, test")
    if variant not in VARIANTS:
        raise ValueError(f"spider has no variant {variant!r}; 'none' leaves the schema out, 'raw' "
                         f"does not clean the SQL, 'none,raw' does both")
    has_schema = "none" not in variant.split(",")
    if not data_dir and (has_schema or split == "test"):
        what = "schemas" if has_schema else "databases"
        raise ValueError(f"spider's {what} are not on the hub; give a folder with them as "
                         f"--data_dir: {SOURCE}")
    source = "dev" if split == "test" else "train"
    schemas = read_schemas(data_dir) if has_schema else None
    rows = enumerate(read_rows(source, data_dir), 1)
    examples = [to_example(row, f"{source}/{number}", schemas, data_dir, variant)
                for number, row in rows
                if source == "dev" or is_held_out(str(row.get("db_id"))) == (split == "validation")]
    if not examples:
        raise ValueError(f"no row of spider's {source} belongs to {split}")
    if split == "test" and not any(example.meta["database"] for example in examples):
        raise FileNotFoundError(f"{data_dir} has none of spider's databases "
                                f"(databases/{examples[0].meta['db_id']}.sqlite, ...): {SOURCE}")
    return examples


def is_held_out(db_id: str) -> bool:
    return zlib.crc32(db_id.encode(errors="replace")) % 10 == 0


def to_example(row: dict, number: str, schemas: dict | None, data_dir: str, variant: str):
    """The id is the place in the official file, which has a few rows twice."""
    db_id, question, query = (row.get(key) for key in ("db_id", "question", "query"))
    if not all(isinstance(text, str) for text in (db_id, question, query)):
        raise ValueError(f"spider {number}: 'db_id', 'question' and 'query' must be texts")
    if not re.fullmatch(r"\w+", db_id):             # it becomes part of a path
        raise ValueError(f"spider {number}: {db_id!r} is no name of a database")
    if schemas is not None and db_id not in schemas:
        raise ValueError(f"spider {number}: {data_dir} lacks the schema of {db_id!r}: {SOURCE}")
    head = f"For db_id:[{db_id}]" if schemas is None else schemas[db_id]
    return Example(f"{head}\n\nQuestion: {question.strip()}\nSQL:", " " + query.strip(),
                   {"id": f"spider/{number}", "gold": query.strip(), "db_id": db_id,
                    "database": find_database(data_dir, db_id), "is_raw": "raw" in variant})


def score(completion: str, example: Example) -> bool:
    """Whether the query gives what the gold query gives; never if either fails or cannot be run."""
    prediction, database = written(completion, example), example.meta["database"]
    return bool(database and prediction
                and judge(database, prediction, example.meta["gold"]).is_equal)


def extra_scores(examples: list[Example], completions: list[str]) -> dict[str, float]:
    """What to print beside the accuracy, whose n counts every row: shares and two counts.

    exec_match, runs (predictions without an error) and no_rows_baseline (the score of a constant
    query without rows) are shares of the rows that can be judged; exact_string, the same text once
    both are cleaned, is one of all rows. The counts are the rows that cannot be judged.
    """
    rows = list(zip(examples, completions, strict=True))
    there = [row for row in rows if row[0].meta["database"]]
    empty = [judge(e.meta["database"], NO_ROWS, e.meta["gold"]) for e, _ in there]
    judged = [(*row, baseline) for row, baseline in zip(there, empty) if not baseline.gold_error]
    n = max(len(judged), 1)
    verdicts = [judge(e.meta["database"], written(text, e) or "", e.meta["gold"])
                for e, text, _ in judged]
    return {"exec_match": sum(verdict.is_equal for verdict in verdicts) / n,
            "runs": sum(not verdict.error for verdict in verdicts) / n,
            "no_rows_baseline": sum(baseline.is_equal for _, _, baseline in judged) / n,
            "exact_string": sum(clean_sql(text) == clean_sql(e.meta["gold"]) for e, text in rows)
            / max(len(rows), 1),
            "rows_without_database": len(rows) - len(there),
            "rows_whose_gold_fails": len(there) - len(judged)}


# ----------------------------------------------------------------------------------------------
# from what was written to one query


def extract(completion: str) -> str | None:
    """The query to run, or None. The paper does not describe its "SQL cleaning"; this is ours."""
    return clean_sql(completion) or None


def written(completion: str, example: Example) -> str | None:
    return completion.strip() if example.meta["is_raw"] else extract(completion)


def clean_sql(text: str) -> str:
    """One line with the first statement: what a model that knows SQL but no end meant to say.

    Cuts at end-of-text tokens. Drops leading `SQL:` and `Answer:`. Takes the content of the first
    code fence, unless a query stands before it. Drops comments, cuts at the first `;` or blank
    line behind something, folds white space and joins `> =`: all outside of quotes only.
    """
    text = LABELS.sub("", END.split(text)[0].split("\nQuestion:")[0])
    before, fence, behind = text.partition("```")
    text = before if QUERY.match(before) or not fence else LANGUAGE.sub("", behind.split("```")[0])
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


def read_rows(source: str, data_dir: str) -> list[dict]:
    official = Path(data_dir) / {"train": "train_spider.json", "dev": "dev.json"}[source]
    if data_dir and official.is_file():
        return read_json_list(official)
    return load_rows(source, data_dir, "xlangai/spider")


def read_schemas(data_dir: str) -> dict[str, str]:
    """{db_id: DDL}. Raises FileNotFoundError or ValueError."""
    names = ("tables.jsonl", "tables.jsonl.gz", "tables.json")
    path = next((path for name in names if (path := Path(data_dir) / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{data_dir} has no schemas (tables.jsonl.gz or tables.json): "
                                f"{SOURCE}")
    rows = read_json_list(path) if path.suffix == ".json" else read_jsonl(path)
    try:
        return {row["db_id"]: ddl(row if "tables" in row else nested(row)) for row in rows}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path} holds something other than Spider's schemas") from None


def read_json_list(path: Path) -> list[dict]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is not a list of JSON objects")
    return rows


def nested(row: dict) -> dict:
    """A schema of the official tables.json, where columns are numbers, in the form `ddl` takes."""
    columns = [(row["table_names_original"][table], {"name": name, "type": kind,
                                                     "primary_key": i in row["primary_keys"]})
               for i, ((table, name), kind)
               in enumerate(zip(row["column_names_original"], row["column_types"]))]
    return {"tables": [{"name": name, "columns": [column for table, column in columns[1:]
                                                  if table == name]}   # column 0 stands for *
                       for name in row["table_names_original"]],
            "foreign_keys": [{"table": columns[a][0], "column": columns[a][1]["name"],
                              "ref_table": columns[b][0], "ref_column": columns[b][1]["name"]}
                             for a, b in row["foreign_keys"]]}


def ddl(schema: dict) -> str:
    """One CREATE TABLE a line, keys beside their columns; types are Spider's five, names as stored.

    {"tables": [{"name", "columns": [{"name", "type", "primary_key"}]}],
     "foreign_keys": [{"table", "column", "ref_table", "ref_column"}]}
    """
    refers = {}
    for key in schema["foreign_keys"]:
        refers.setdefault((key["table"], key["column"]), "")
        refers[key["table"], key["column"]] += (f" REFERENCES {quoted(key['ref_table'])}"
                                                f"({quoted(key['ref_column'])})")
    return "\n".join(
        f"CREATE TABLE {quoted(table['name'])} (" + ", ".join(
            f"{quoted(column['name'])} {column['type']}{' PRIMARY KEY' * column['primary_key']}"
            f"{refers.get((table['name'], column['name']), '')}" for column in table["columns"])
        + ")" for table in schema["tables"] if not table["name"].startswith("sqlite_"))


def quoted(name: str) -> str:
    """A name as a query has to write it."""
    is_plain = re.fullmatch(r"[A-Za-z_]\w*", name) and name.lower() not in RESERVED
    return name if is_plain else f'"{name}"'


def find_database(data_dir: str, db_id: str) -> str:
    """The SQLite file of a database in one of the two layouts, "" if there is none."""
    names = (f"databases/{db_id}.sqlite", f"databases/{db_id}.sqlite.gz",
             f"database/{db_id}/{db_id}.sqlite")
    paths = [Path(data_dir) / name for name in names if data_dir]
    return next((str(path.resolve()) for path in paths if path.is_file()), "")
