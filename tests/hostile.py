"""A grammar of what should never be: values of settings, contents of files, mistakes of typing."""
import copy
import gzip
import json
import os
import struct
from typing import Literal, get_args, get_origin

ESCAPE = "\x1b[2J\x1b]0;owned\x07"      # clears a terminal and names its window
LONG = "x" * 5000
NOT_NUMBERS = ["", " ", "x", "nan", "inf", "-inf", "1e400", "1,2", "--1", "0x10", "1/2", "True",
               "9" * 5000, ESCAPE, "\udcff", LONG, "(1)", "1 2", "None"]
INTS = [*NOT_NUMBERS, "1.5", "1e3", "-1", "0", "-0", "\u0663", "1_0", str(2 ** 31), str(2 ** 63),
        str(-2 ** 63), str(10 ** 400)]
FLOATS = [*NOT_NUMBERS, "-1", "0", "-0.0", "\u0663", "1e308", "-1e308", "1e-320", str(10 ** 400)]
BOOLS = ["", " ", "yes", "2", "None", "nan", "tru", "-1", ESCAPE, "\udcff", "True,False"]
CHOICES = ["", " ", "x", "none_", "0", ESCAPE, "\udcff", LONG, "JEPA", "a,b"]
PATHS = ["", " ", "nope", "../nope", "/proc/nope", "null", "full", "endless", "pipe", "loop", "empty",
         "binary", "binary/x", "pipe/x", ESCAPE, "\udcff", LONG, "a\nb", "~", "$HOME", "%s{0}",
         "\u202egnp.exe", "-", ".", "..", "https://example.com"]   # nothing outside: tests are root
ITEMS = ["", ",", " ", ",,", "x", "x,x", "nope,", ESCAPE, "\udcff", LONG, "pipe", "endless",
         "empty", "binary", "[1]", "()", "(", "'", "1" + ",1" * 9999]
BAD = {bool: BOOLS, int: INTS, float: FLOATS, str: PATHS}


def values_of(kind) -> list[str]:
    """Return words that do not fit a setting of this kind, or only just."""
    if get_origin(kind) is Literal:
        return CHOICES
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        few = [f"{good},{bad}" for good in ("0.5", "1") for bad in BAD[item][3:13]]
        return [*ITEMS, *BAD[item], *few]
    return BAD[kind]


# ---- files ----


def place(name):
    """Return a function that puts something else where a file was."""
    def spoil(path):
        path.unlink()
        if name == "a folder":
            path.mkdir()
        elif name == "a pipe":
            os.mkfifo(path)
        elif name != "missing":
            path.symlink_to({"a loop": path.name, "endless": "/dev/zero"}.get(name, "gone"))
    return spoil


PLACES = {f"is {name}": place(name) for name in
          ("missing", "a folder", "a pipe", "a loop", "endless", "a dangling link")}
if os.getuid():             # root can read everything
    PLACES["is unreadable"] = lambda path: path.chmod(0)
CONTENTS = {
    "empty": lambda data: b"",
    "blank": lambda data: b" \n\n \t\n",
    "half of it": lambda data: data[:len(data) // 2],
    "binary": lambda data: bytes(range(256)) * 9,
    "zeros": lambda data: bytes(1000),
    "not UTF-8": lambda data: data.replace(b"e", b"\xe9"),
    "UTF-16": lambda data: data.decode("latin-1").encode("utf-16"),
    "gzipped": gzip.compress,
    "a deep list": lambda data: b"[" * 200_000 + b"\n",
    "a deep object": lambda data: b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"\n",
    "deep in a known key": lambda data: b'{"step":' + b"[" * 90_000 + b"]" * 90_000 + b"}\n",
    "a number of 5,000 digits": lambda data: b'{"step": ' + b"9" * 5000 + b"}\n",
    "half a character": lambda data: rb'{"question": "\ud800", "answer": "1 #### 1"}' + b"\n",
    "an escape sequence": lambda data: json.dumps({ESCAPE: ESCAPE}).encode() + b"\n",
    "an escape sequence, raw": lambda data: ESCAPE.encode() + b"\n",
    **{f"only {text}": lambda data, text=text: text.encode() + b"\n" for text in
       ("[]", "{}", "null", "1", "NaN", '"text"', "[[]]", '{"a": 1, "a": 2}', "{'a': 1}")},
}
LEAVES = [None, True, -1, 0, 2 ** 63, 10 ** 400, 1e308, -1e308, float("nan"), float("inf"), "", LONG,
          ESCAPE, "\ud800", [], {}, [[]], {"a": {}}, [None], "1"]
SIZES = ["n_layer", "n_embd", "n_head", "n_hidden", "block_size", "vocab_size"]


def spoilt_json(data: bytes, rng, n=30):
    """Change one place in a JSON file, or in a line of JSON lines, n times -> {how: bytes}."""
    lines = data.decode().splitlines() if data.count(b"\n{") else [data.decode()]
    for _ in range(n):
        number, bad = rng.randrange(len(lines)), rng.choice(LEAVES)
        whole = json.loads(lines[number])
        at, key, where = whole, rng.choice(list(whole)), ""
        while isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.8:
            at, where = at[key], f"{where}/{key}"
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        how = f"{where}/{key} is {str(json.dumps(bad))[:20]}, line {number + 1}"
        at[key] = bad
        if rng.random() < 0.2:
            how = f"without {where}/{key}, line {number + 1}"
            del at[key]
        changed = [*lines[:number], json.dumps(whole), *lines[number + 1:]]
        yield how, "\n".join(changed).encode() + b"\n"


def spoilt_tensors(data: bytes):
    """Change the header or the numbers of a safetensors file -> {how: bytes}."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    names = [name for name in header if name != "__metadata__"]

    def packed(change, body=body):
        new = copy.deepcopy(header)
        change(new, new[names[0]])
        text = json.dumps(new).encode()
        return struct.pack("<Q", len(text)) + text + body
    yield "a header of 2^63 bytes", struct.pack("<Q", 2 ** 63) + data[8:]
    yield "no header", struct.pack("<Q", 0) + data[8:]
    yield "a header that is a list", struct.pack("<Q", 2) + b"[]" + body
    yield "a deep header", struct.pack("<Q", 90_000) + b"[" * 90_000 + body
    yield "a byte less", data[:-1]
    yield "a byte more", data + b"\0"
    yield "NaN", data[:8 + size] + b"\xff" * len(body)
    yield "infinite", data[:8 + size] + struct.pack("<f", float("inf")) * (len(body) // 4)
    for key, values in {"dtype": ["X9", "I64", "BOOL", "F8_E5M2", None, 7],
                        "shape": [[], [-1], [0], [2 ** 40, 2 ** 40], [1.5], "x", None],
                        "data_offsets": [[0, 0], [8, 4], [-8, 0], [0, 2 ** 62], [4], None]}.items():
        for value in values:
            yield f"{key} {value}", packed(lambda new, one: one.update({key: value}))
    yield "a tensor less", packed(lambda new, one: new.pop(names[0]))
    yield "an escape sequence for a name", packed(
        lambda new, one: new.update({ESCAPE: new.pop(names[0])}))
    yield "another name", packed(lambda new, one: new.update({"x.weight": new.pop(names[0])}))
    yield "metadata that is no object", packed(lambda new, one: new.update(__metadata__=[1]))


CONFIGS = [
    "lr = nan", "lr = 1e400", "lr = -1e400", "lr =", "lr == 1", "lr: float = 1.0", "lr = min_lr = 1.0",
    "import os", "print(1)", "__import__('os').system('id')", "lr = 1.0;import os", "lr += 1.0",
    "lrr = 1.0", "LR = 1.0", "lr = '1e-3'", "seed = 1.5", "seed = True", "seed = 10 ** 9",
    "seed = " + "9" * 5000, "seed = -1", "out_dir = 1", "out_dir = b'x'", "out_dir = f'{1}'",
    "lr = " + "(" * 9000 + "1.0" + ")" * 9000, "lr = " + "-" * 9000 + "1.0",
    "lr = 1.0" + " + 1.0" * 50_000, "shard = 1", "shard = 'True'", "shard = None", "lr, seed = 1.0, 1",
    "[lr] = [1.0]", "lr = [1.0]", "def lr(): pass", "if True:\n    lr = 1.0", "  lr = 1.0", "\0",
    "# coding: nonsense\nlr = 1.0", "lr = '" + ESCAPE + "'", ESCAPE + " = 1", "lr = 1.0 # \xe9\nx = '",
    "lambda_jepa = float('nan')", "t_ctx = 0", "t_ctx = 1.5", "lr = 1j", "lr = ...", "\ufefflr = nan"]


def ruins_of(path, rng):
    """Yield (how, function) for each way to spoil this file; the function spoils it at a path."""
    data = path.read_bytes()

    def content(new):
        return lambda path: path.write_bytes(new)
    yield from PLACES.items()
    if path.suffix == ".py":
        yield from ((text[:40], content(text.encode("utf-8", "surrogateescape")))
                    for text in CONFIGS)
        return
    yield from ((how, content(change(data))) for how, change in CONTENTS.items())
    if path.suffix == ".safetensors":
        yield from ((how, content(new)) for how, new in spoilt_tensors(data))
    else:
        yield from ((how, content(new)) for how, new in spoilt_json(data, rng))
