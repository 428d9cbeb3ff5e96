"""
Settings: the defaults of a dataclass < config files < the command line.

    python train.py config/tiny.py --lr=3e-5 --compile    (several files apply in order)

A config file holds `name = literal` lines and is read, never executed. A typo stops the run.
"""

import ast
import contextlib
import difflib
import inspect
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from tokenize import COMMENT, generate_tokens
from typing import Literal, get_args, get_origin, get_type_hints

BASES = Path(), Path(__file__).resolve().parent  # a path starts here, or else at the repository
COMMAND_LINE = "on the command line"
WORDS = {bool: "a bool", int: "an int", float: "a float", str: "a string"}


def configure(cls, argv=None, default=None):
    """Return cls with its defaults < the config files (if none, the default one) < --key=value."""
    argv = sys.argv[1:] if argv is None else argv
    files = [arg for arg in argv if not re.match(r"-|\w+=", arg)]
    options = [arg for arg in argv if arg not in files]
    wants_help = "--help" in options or "-h" in options
    # Options come first: in `--lr 3` the mistake is the space, not that there is no file 3.
    overrides = {} if wants_help else dict(read_option(arg, cls) for arg in options)
    settings = {}
    for path in files or filter(None, [default]):
        settings |= read_file(path, cls)
    if wants_help:
        sys.exit(print_help(cls, settings))  # None, so exit code 0
    return cls(**settings | overrides)


def run(main, cls, default=None):
    """Call main on the settings; a mistake in either ends as one sentence, not a traceback."""
    try:
        try:
            main(configure(cls, default=default))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; what is left to be written at exit goes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as error:
        # Under torchrun all processes may say the same: it ends those that wait once one has ended
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10 if int(os.environ.get("RANK", 0)) else 0)
        sys.exit(str(error))  # on stderr, with exit code 1


def read_option(arg, cls):
    """--key=value, or --flag for a bool, as (name, value)."""
    if not arg.startswith("--"):
        raise ValueError(f"{arg!r} {COMMAND_LINE} needs two dashes: --{arg.lstrip('-')}")
    name, equals, text = arg[2:].partition("=")
    if not equals and get_type_hints(cls).get(name, bool) is not bool:
        raise ValueError(f"{arg} {COMMAND_LINE} has no value: write {arg}=value, without a space")
    return name, check(name, text if equals else "True", cls, COMMAND_LINE)


def read_file(path, cls):
    """The `name = literal` lines of a config file as {name: value}."""
    file = next((base / path for base in BASES if (base / path).is_file()), None)
    if file is None:
        dirs = {Path(path).parent, Path("config")} - {Path()}  # in . lie scripts, no configs
        found = sorted({f"{d}/{f.name}" for d in dirs for b in BASES for f in (b / d).glob("*.py")})
        raise FileNotFoundError(f"no config file {path}, there are {', '.join(found) or 'none'}")
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise ValueError(f"syntax error in {path} line {error.lineno}: {error.msg}") from None
    settings = {}
    for node in tree.body[1:] if ast.get_docstring(tree) else tree.body:
        where = f"in {path} line {node.lineno}"
        try:
            [name], value = [target.id for target in node.targets], ast.literal_eval(node.value)
        except (AttributeError, ValueError, TypeError):  # no assignment, no one name, no literal
            line = ast.unparse(node).splitlines()[0]
            raise ValueError(f"`{line}` {where} is not `name = literal`") from None
        settings[name] = check(name, value, cls, where)
    return settings


def check(name, value, cls, where):
    """The value converted to what this setting is, or a sentence about what would fit."""
    kinds, is_text = get_type_hints(cls), where == COMMAND_LINE
    if name not in kinds:
        close = difflib.get_close_matches(name.lower(), kinds, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "--help lists them all"
        raise ValueError(f"unknown setting {name!r} {where} ({hint})")
    try:
        return convert(value, kinds[name], is_text)
    except (ValueError, KeyError, OverflowError):
        kind, good = kinds[name], getattr(cls, name)
        fits = f"--{name}={shlex.quote(str(good))}" if is_text else f"{name} = {good!r}"
        raise ValueError(f"{name}={value!r} {where} is not {describe(kind)}, e.g. {fits}") from None


def convert(value, kind, is_text):
    """The value as this kind: text of the command line is parsed, a literal has to fit already."""
    if get_origin(kind) is tuple:
        if is_text:
            text = re.sub(r"^\((.*)\)$", r"\1", value).removesuffix(",")  # (0.2, 0.5) is 0.2,0.5
            value = [item.strip(" '\"") for item in text.split(",") if text]
        if isinstance(value, (tuple, list)):
            return tuple(convert(item, get_args(kind)[0], is_text) for item in value)
    if kind is bool and is_text:
        return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
    if kind in (int, float) and (is_text or type(value) is int):  # True is no int here
        return kind(value)
    if type(value) is kind or get_origin(kind) is Literal and value in get_args(kind):
        return value
    raise ValueError


def print_help(cls, settings):
    """Print what the script does, and each setting with its value, comment and kind."""
    comments = {}
    for parent in reversed(cls.__mro__[:-1]):  # settings may be inherited
        with contextlib.suppress(OSError, TypeError):  # no source, no comments
            tokens = generate_tokens(iter(inspect.getsourcelines(parent)[0]).__next__)
            found = [token for token in tokens if token.type == COMMENT]
            comments |= {token.line.split(":")[0].strip(): token.string[1:] for token in found}
    print((sys.modules[cls.__module__].__doc__ or "").strip())
    print(f"\nusage: python {sys.argv[0]} [config/x.py ...] [--key=value ...]\n")
    for name, kind in get_type_hints(cls).items():
        setting = f"--{name}={shlex.quote(str(settings.get(name, getattr(cls, name))))}"
        print(f"  {setting:<32} {comments.get(name, '')} ({describe(kind)})")


def describe(kind):
    """The kind in words, as in `3.5 is not an int`."""
    is_choice = get_origin(kind) is Literal
    return f"one of {', '.join(get_args(kind))}" if is_choice else WORDS.get(kind, f"a {kind}")
