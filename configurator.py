"""Settings: the defaults of a dataclass < config files < the command line.

    python train.py config/tiny.py --lr=3e-5 --compile    (several files apply in order)

A config file holds `name = literal` lines. It is parsed, never executed; a typo stops the run. A
script's default config is for the bare command, in which only HOW_TO_RUN settings may stand.
"""
import ast
import contextlib
import difflib
import inspect
import math
import os
import re
import shlex
import signal
import sys
import unicodedata
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

# Idle threads sleep: 9x faster on a busy machine. Read when torch loads, so import this file first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

BASES = Path(), Path(__file__).resolve().parent  # where a path may start: here, the repository
FIELD = re.compile(r"^ +(\w+):(?:.|\n {9,})*?  # (.*)", re.M)  # a value may take several lines
COMMAND_LINE = "on the command line"
WORDS = {bool: "a bool", int: "an int", float: "a finite float", str: "a string"}
OUT_OF_MEMORY = r"out ?of ?memory|MemoryError|can(no|')t allocate memory|bad_alloc|ALLOC_FAILED"
HOW_TO_RUN = {"resume", "overwrite", "device"}  # these leave a bare command its default config
ELSEWHERE = dict(pair.split("=") for pair in """learning_rate=lr num_train_epochs=epochs
    max_iters=max_steps per_device_train_batch_size=micro_batch_size model_name_or_path=init_from
    output_dir=out_dir max_new_tokens=gen_length eval_steps=eval_every""".split())  # = ours


def leave_quietly(kind, error, trace):
    """Ctrl-C while torch is imported, for seconds, has no traceback; the exit code says it."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = leave_quietly


def configure(cls, argv=None, default=None):
    """Return cls with its defaults < config files < --key=value. default: the bare command's."""
    argv = sys.argv[1:] if argv is None else argv
    files = [arg for arg in argv if not re.match(r"-|\w+=", arg)]
    options = [arg for arg in argv if arg not in files]
    wants_help = "--help" in options or "-h" in options
    settings, overrides = {}, {}
    for arg in options if not wants_help else []:  # before the files: 3 in `--lr 3` is not a file
        if not arg.startswith("--"):
            raise ValueError(f"{arg!r} {COMMAND_LINE} needs two dashes: --{arg.lstrip('-')}")
        name, equals, text = arg[2:].partition("=")
        overrides[name] = check(name, text if equals else True, cls, COMMAND_LINE)
    if default and not files and not wants_help and overrides.keys() <= HOW_TO_RUN:
        files = [default]
    for path in files:
        settings |= read_file(path, cls)
    if wants_help:
        sys.exit(print_help(cls, settings))  # None, so exit code 0
    return cls(**settings | overrides)


def run(main, cls, default=None):
    """Call main on the settings. A mistake in either ends as one sentence, not a traceback."""
    try:
        try:
            main(configure(cls, default=default))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has closed the pipe: leave without the flush at exit
        os._exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if not (text := sentence(error)):
            raise
        sys.exit(text if os.environ.get("RANK", "0") == "0" else 1)  # rank 0 says it


def sentence(error) -> str:
    """Return what to tell the user of a mistake, or of a machine's limit; empty: it is a bug."""
    text = f"{type(error).__name__}: {error}"
    if re.search(OUT_OF_MEMORY, text, re.I):
        return ("out of memory: set a micro_batch_size (0 is the whole batch), or lower "
                "batch_tokens, max_length or the size of the model")
    if isinstance(error, RecursionError):
        return "something in the input is nested too deeply"
    if isinstance(error, OverflowError):
        return f"a number in the input is too large: {error}"
    is_mistake = isinstance(error, (ValueError, OSError)) or "Symlink loop" in text     # of pathlib
    return printable(str(error)) if is_mistake else ""


def printable(text: str) -> str:
    """Write out control characters, so that no text commands a terminal. Newlines stay, blanks of
    any width, and the joiners (U+200C, U+200D) of Persian, Hindi and emoji."""
    return "".join(c if c.isprintable() or c in "\n\u200c\u200d" or unicodedata.category(c) == "Zs"
                   else ascii(c)[1:-1] for c in text)


def read_file(path, cls):
    """Return the `name = literal` lines of a config file as {name: value}."""
    file = next((base / path for base in BASES if (base / path).is_file()), None)
    if file is None:
        dirs = {Path(path).parent, Path("config")} - {Path()}  # not ., which holds the scripts
        found = sorted({f"{d}/{f.name}" for d in dirs for b in BASES for f in (b / d).glob("*.py")})
        raise FileNotFoundError(f"no config file {path}, there are {', '.join(found) or 'none'}")
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise ValueError(f"syntax error in {path} line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as Python: {error or 'too deep'}") from None
    settings = {}
    for node in tree.body[1:] if ast.get_docstring(tree) else tree.body:
        where = f"in {path} line {node.lineno}"
        try:
            [name], value = [target.id for target in node.targets], ast.literal_eval(node.value)
        except (AttributeError, ValueError, TypeError, RecursionError, MemoryError):
            line = file.read_text("utf-8", "replace").split("\n")[node.lineno - 1].strip()[:80]
            raise ValueError(f"`{line}` {where} is not `name = literal`") from None
        settings[name] = check(name, value, cls, where)
    return settings


def check(name, value, cls, where):
    """Return the value as the kind of this setting. Raises ValueError that says what would fit."""
    kinds, is_text = get_type_hints(cls), isinstance(value, str) and where == COMMAND_LINE
    if name not in kinds:
        given = name.lower().replace("-", "_")
        close = difflib.get_close_matches(given, kinds, cutoff=0.75)
        # a slip adds no letter but a plural's s: n_ctx is not t_ctx, beta1 is not beta2
        meant = [ELSEWHERE.get(given), *(k for k in close if set(given) <= {*k, "s"})]
        hint = next((f"did you mean {k!r}?" for k in meant if k in kinds), "--help lists them all")
        raise ValueError(f"unknown setting {name!r} {where} ({hint})")
    try:
        return convert(value, kinds[name], is_text)
    except (ValueError, OverflowError):
        if not is_text and where == COMMAND_LINE:  # a bare --name, which is True
            raise ValueError(f"--{name} {where} needs a value: --{name}=value, without a space")
        kind, good = kinds[name], getattr(cls, name)
        fits = option(name, good) if is_text else f"{name} = {good!r}"
        raise ValueError(f"{name}={value!r} {where} is not {describe(kind)}, e.g. {fits}") from None


def convert(value, kind, is_text):
    """Return the value as this kind. Command-line text is parsed; a literal must fit already."""
    if get_origin(kind) is tuple:
        if is_text:
            text = re.sub(r"^\((.*)\)$", r"\1", value).removesuffix(",")  # (0.2, 0.5) is 0.2,0.5
            value = [item.strip(" '\"") for item in text.split(",") if text]
        if isinstance(value, (tuple, list)):
            return tuple(convert(item, get_args(kind)[0], is_text) for item in value)
    if is_text and (kind is bool or True in get_args(kind)):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    if kind in (int, float) and (is_text or type(value) in (int, kind)):  # a bool is no number
        if math.isfinite(kind(value)):
            return kind(value)
    elif type(value) is kind or repr(value) in map(repr, get_args(kind)):   # 1 is not True
        return value
    raise ValueError


def print_help(cls, settings):
    """Print the script's docstring and its settings, those of cls itself before inherited ones."""
    print((sys.modules[cls.__module__].__doc__ or "").strip())
    print(f"\nusage: python {sys.argv[0]} [config/x.py ...] [--key=value ...]\n")
    kinds, comments = get_type_hints(cls), {}
    for parent in cls.__mro__[:-1]:
        with contextlib.suppress(OSError, TypeError):  # no source, no comments
            comments = dict(FIELD.findall(inspect.getsource(parent))) | comments
    for name in {name: 0 for parent in cls.__mro__ for name in inspect.get_annotations(parent)}:
        text = option(name, settings.get(name, getattr(cls, name)))
        print(f"  {text:<32} {comments.get(name, '')} ({describe(kinds[name])})")


def option(name, value):
    """Return --name=value as one would type it: a,b for a tuple, quotes only where needed."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"--{name}={text and shlex.quote(text)}"


def describe(kind):
    """Return the kind as in `3.5 is not an int`."""
    choices = ", ".join(map(str, get_args(kind)))
    return f"one of {choices}" if get_origin(kind) is Literal else WORDS.get(kind, f"a {kind}")
