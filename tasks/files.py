"""Files: JSON in and out, one object a file or one a line, and files fetched from the network."""
import fcntl
import gzip
import http.client
import json
import os
import urllib.request
import uuid
import zlib
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


def read_json(path) -> dict:
    """Return the object in a .json file. Raises ValueError if there is something else in it."""
    check_is_file(path)
    try:
        what = json.loads(Path(path).read_text("utf-8-sig"))        # editors may write a BOM
        if not isinstance(what, dict):
            raise ValueError(f"it is a {type(what).__name__}")
    except (ValueError, RecursionError) as error:
        check_is_content(path)
        raise ValueError(f"{path} is not a JSON object: {error}") from None
    return what


def write_json(path, what: dict):
    """Write an object, as write_text does."""
    write_text(path, json.dumps(what, indent=2, ensure_ascii=False))


def write_text(path, text: str):
    """Write a file as write_bytes does; half characters, as in names of files, are escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path, data: bytes):
    """Write a file aside, then rename: a kill leaves the old file or the new one, never half.

    What is no regular file, such as /dev/stdout, is written as it is. Raises OSError for a folder
    or an empty path.
    """
    if not os.path.basename(path) or os.path.isdir(path):
        what = f"{path} is a folder" if str(path) else "the path of a file is empty"
        raise OSError(f"{what}; give the name of a file")
    with naming(path):
        if os.path.exists(path) and not os.path.isfile(path):
            # without O_NONBLOCK a pipe that nobody reads would wait for ever
            number = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(number, True)
            with open(number, "wb") as file:
                file.write(data)
            return
        path = os.path.realpath(path)   # a link stays one
        aside = Path(f"{path}.new")
        try:
            aside.write_bytes(data)
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


@contextmanager
def naming(path):
    """Name the path in an OSError that does not: a full disk does not say which file it met."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def read_jsonl(path) -> list[dict]:
    """Return the rows of a .jsonl[.gz] file. Raises ValueError that names the file and the line."""
    return [row for _, row in read_lines(path)]


def read_lines(path) -> list[tuple[int, dict]]:
    """Return the rows of a .jsonl[.gz] file as read_jsonl does, each with its line, from 1 on."""
    path = Path(path)
    check_is_file(path)
    rows = []
    try:
        open_file = gzip.open if path.suffix == ".gz" else open
        with open_file(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append((number, parse_line(line, f"{path}, line {number},")))
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as "
                         f"{'gzipped ' * (path.suffix == '.gz')}UTF-8: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def parse_line(line: str, where: str) -> dict:
    """Return the object in a line of JSON. Raises ValueError that begins with `where`."""
    try:
        row = json.loads(line)
        if "\\u" in line:               # half a character may come in, and no file can hold it
            json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object")
    return row


def check_is_file(path):
    """Raise an OSError unless there is a regular file: reading a pipe would never end."""
    if not os.path.isfile(path):
        if os.path.lexists(path):
            raise OSError(f"{path} is not a file: it is a folder, a pipe or a broken link")
        raise FileNotFoundError(f"there is no file {path}")


def check_is_content(path):
    """Raise ValueError if git has left a pointer of git-lfs in place of a large file."""
    with open(path, "rb") as file:
        if file.read(100).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a pointer of git-lfs, not the file itself; "
                             f"run `git lfs pull` in its folder")


def lock(folder):
    """Take folder/lock until the file that this returns is closed, or this process ends.

    A child that inherits the file holds the lock as well. Raises ValueError if it is taken.
    """
    path = Path(folder) / "lock"        # never emptied, followed or waited for: it may be another's
    file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "rb+",
                buffering=0)
    if not os.path.isfile(path):
        file.close()
        raise OSError(f"{path} is not a file, and cannot be locked; choose another folder")
    if not lock_file(file):
        file.close()
        raise ValueError(f"another process is at work in {folder}; wait for it, end it, or choose "
                         f"another folder")
    return file


def lock_file(file, kind=fcntl.LOCK_EX) -> bool:
    """Lock an open file until it is closed, or this process ends; False if it is taken."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:                     # a file system without locks: do without
        pass
    return True


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
