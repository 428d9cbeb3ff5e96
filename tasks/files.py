"""JSON in and out of files: one object a file, or one a line."""
import gzip
import json
import os
import zlib
from pathlib import Path


def read_json(path) -> dict:
    """The object in a .json file. Raises ValueError naming the file if it does not hold one."""
    try:
        return dict(json.loads(Path(path).read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None


def write_json(path, what: dict):
    """Write it aside, then rename: a kill leaves the old file or the new one, never half of one."""
    Path(f"{path}.new").write_text(json.dumps(what, indent=2, ensure_ascii=False), "utf-8")
    os.replace(f"{path}.new", path)


def read_jsonl(path) -> list[dict]:
    """The rows of a .jsonl[.gz] file. Raises ValueError naming the file and the bad line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    rows = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise ValueError(f"{path}, line {number}, is not a JSON object")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}, is not JSON: {error.msg}") from None
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as "
                         f"{'gzipped ' * (path.suffix == '.gz')}UTF-8: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows
