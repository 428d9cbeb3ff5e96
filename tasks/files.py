"""Files: JSON in and out, one object a file or one a line, and files fetched from the network."""
import gzip
import http.client
import json
import os
import urllib.request
import uuid
import zlib
from pathlib import Path

from tqdm import tqdm


def read_json(path) -> dict:
    """Return the object in a .json file. Raises ValueError if there is something else in it."""
    try:
        return dict(json.loads(Path(path).read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None


def write_json(path, what: dict):
    """Write an object aside, then rename: a kill leaves the old file or the new one, never half."""
    Path(f"{path}.new").write_text(json.dumps(what, indent=2, ensure_ascii=False), "utf-8")
    os.replace(f"{path}.new", path)


def read_jsonl(path) -> list[dict]:
    """Return the rows of a .jsonl[.gz] file. Raises ValueError that names the file and the line."""
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
        raise ValueError(f"{path} has no rows")
    return rows


def cache_folder(name: str) -> Path:
    """Return the folder for what is fetched: in $DLLM_JEPA_CACHE, or else ~/.cache/dllm-jepa."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("DLLM_JEPA_CACHE") or caches / "dllm-jepa") / name


def fetch(url: str, path: Path, check=lambda path: None):
    """Download url to path, unless path exists.

    The file is downloaded aside, checked, then renamed: several processes may do this at once, and
    a kill leaves no half file. check(path) raises ValueError for a file that will not do.
    Raises OSError if the network or the disk fails.
    """
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as reply, open(part, "wb") as file:
            size = int(reply.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, desc=path.name, unit="B", unit_scale=True, leave=False,
                      disable=os.environ.get("RANK", "0") != "0") as bar:
                while block := reply.read(1 << 16):
                    bar.update(file.write(block))
            if size and bar.n != size:
                raise OSError(f"{bar.n:,} of {size:,} bytes came")
        check(part)
        os.replace(part, path)
    except http.client.HTTPException as error:      # not an OSError: a reply that is not HTTP
        raise OSError(f"{type(error).__name__}: {error}") from None
    finally:
        part.unlink(missing_ok=True)
