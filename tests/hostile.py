"""A grammar of what should never be: values of settings, contents of files, contradictions."""
import copy
import gzip
import json
import os
import struct
from typing import Literal, get_args, get_origin

# ----------------------------------------------------------------------------------------------
# values of settings


ESCAPE = "\x1b[2J\x1b]0;owned\x07"      # clears a terminal and names its window
LONG = "x" * 5000
NOT_NUMBERS = ["", " ", "x", "nan", "inf", "-inf", "1e400", "1,2", "--1", "0x10", "1/2", "True",
               "9" * 5000, ESCAPE, "\udcff", LONG, "(1)", "1 2", "None"]
INTS = [*NOT_NUMBERS, "1.5", "1e3", "-1", "0", "-0", "\u0663", "1_0", str(2 ** 31), str(2 ** 63),
        str(-2 ** 63), str(10 ** 400)]
FLOATS = [*NOT_NUMBERS, "-1", "0", "-0.0", "\u0663", "1e308", "-1e308", "1e-320", str(10 ** 400)]
BOOLS = ["", " ", "yes", "2", "None", "nan", "tru", "-1", ESCAPE, "\udcff", "True,False"]
CHOICES = ["", " ", "x", "none_", "0", ESCAPE, "\udcff", LONG, "JEPA", "a,b"]
PATHS = ["", " ", "nope", "../nope", "/proc/nope", "null", "full", "endless", "pipe", "loop",
         "empty", "binary", "binary/x", "pipe/x", ESCAPE, "\udcff", LONG, "a\nb", "~", "%s{0}",
         "\u202egnp.exe", "-", ".", "..", "https://example.com"]   # nothing outside: tests are root
ITEMS = ["", ",", " ", ",,", "x", "x,x", "nope,", ESCAPE, "\udcff", LONG, "pipe", "endless",
         "empty", "binary", "[1]", "()", "(", "'", "1" + ",1" * 9999]
BAD = {bool: BOOLS, int: INTS, float: FLOATS, str: PATHS}


def values_of(kind) -> list[str]:
    """Return words that do not fit a setting of this kind, or only just."""
    if get_origin(kind) is Literal:
        return CHOICES
    if get_origin(kind) is tuple:
        items = values_of(get_args(kind)[0])
        few = [f"{good},{bad}" for good in ("0.5", "1") for bad in items[3:13]]
        return [*ITEMS, *items, *few]
    return BAD[kind]


# ----------------------------------------------------------------------------------------------
# files


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
LEAVES = [None, True, -1, 0, 2 ** 63, 10 ** 400, 1e308, -1e308, float("nan"), float("inf"), "",
          LONG, ESCAPE, "\ud800", [], {}, [[]], {"a": {}}, [None], "1"]


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
    "lr = nan", "lr = 1e400", "lr = -1e400", "lr =", "lr == 1", "lr: float = 1.0", "lr = a = 1.0",
    "import os", "print(1)", "__import__('os').system('id')", "lr = 1.0;import os", "lr += 1.0",
    "lrr = 1.0", "LR = 1.0", "lr = '1e-3'", "seed = 1.5", "seed = True", "seed = 10 ** 9",
    "seed = " + "9" * 5000, "seed = -1", "out_dir = 1", "out_dir = b'x'", "out_dir = f'{1}'",
    "lr = " + "(" * 9000 + "1.0" + ")" * 9000, "lr = " + "-" * 9000 + "1.0",
    "lr = 1.0" + " + 1.0" * 50_000, "shard = 1", "shard = 'True'", "shard = None", "lr, b = 1, 1",
    "[lr] = [1.0]", "lr = [1.0]", "def lr(): pass", "if True:\n    lr = 1.0", "  lr = 1.0", "\0",
    "# coding: nonsense\nlr = 1.0", "lr = '" + ESCAPE + "'", ESCAPE + " = 1", "lr = '\xe9",
    "lambda_jepa = float('nan')", "t_ctx = 0", "t_ctx = 1.5", "lr = 1j", "lr = ...", "\ufefflr = x"]


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


# ----------------------------------------------------------------------------------------------
# commands: in a folder with small models, rows, a run that was killed, answers and a study


LINKS = {"loop": "loop", "null": "/dev/null", "full": "/dev/full", "endless": "/dev/zero"}

# Each script's settings, and commands that are right. A setting goes to the first.
SETTINGS = {"train.py": "TrainConfig", "sample.py": "SampleConfig", "eval_gsm8k.py": "EvalConfig",
            "pretrained/weights.py": "ConvertConfig", "analysis/grid.py": "GridConfig",
            "analysis/tables.py": "TablesConfig", "analysis/plot.py": "PlotConfig",
            "analysis/report.py": "ReportConfig", "analysis/compare.py": "CompareConfig",
            "analysis/probe.py": "ProbeConfig", "analysis/preserve.py": "PreserveConfig",
            "analysis/bench.py": "BenchConfig", "analysis/predict.py": "PredictConfig",
            "analysis/bench_sampling.py": "SamplingBenchConfig",
            "analysis/gpu_check.py": "GPUCheckConfig"}
CONFIG = """lr = 1e-3
task = "gsm8k"
data_dir = "data"
max_steps = 1
batch_size = 2
max_length = 64
eval_every = 100
eval_rows = 2
"""
TRAIN = ("train.py mine.py --out_dir=new --max_steps=3 --save_every=1 --keep=3 --device=cpu "
         "--task=gsm8k --data_dir=data --batch_size=2 --eval_rows=2 --max_length=64 --eval_t=0.5 "
         "--log_every=1 --init_from=model")
SAMPLE = "sample.py --init_from=model --prompt=2+2 --gen_length=4 --block_length=2 --device=cpu"
EVAL = ("eval_gsm8k.py --init_from=model --data_dir=data --limit=2 --n_shot=1 --gen_length=4 "
        "--block_length=4 --steps=2 --device=cpu --out=new.jsonl")
GRID = ("analysis/grid.py --configs=mine.py --arms=plain --seeds=1 --n_shots=0 --out_dir=new "
        "'--evaluate=--limit=1 --gen_length=4 --block_length=4 --steps=2'")
PRESERVE = ("analysis/preserve.py --base=model --models=model2 --data_dir=data --window=16 "
            "--n_windows=2 --n_questions=2 --n_shot=1 --rates=0.5 --device=cpu --out=kept")
PROBE = ("analysis/probe.py --base=model --models=model2 --data_dir=data/wikitext --n_rows=2 "
         "--window=16 --rates=0.5 --device=cpu --out_dir=new")
BENCH = ("analysis/bench.py --n_layer=1 --width=32 --batch_size=1 --steps=1 --device=cpu "
         "--data_dir=data")
MODEL = "model/config.json model/model.safetensors model/tokenizer.json"
STATE = "run/step_0000002/"
# command -> the files that it reads
COMMANDS = {
    TRAIN: f"mine.py data/train.jsonl {MODEL}",
    TRAIN.replace("new", "run") + " --resume": "run/log.jsonl " + " ".join(
        STATE + name for name in ("config.json", "model.safetensors", "tokenizer.json",
                                  "train_state.json", "train_state.safetensors")),
    TRAIN + " --lora_rank=2": MODEL,
    TRAIN + " --init_from= --tokenizer=published/llada": "published/llada/tokenizer.json",
    SAMPLE: MODEL,
    EVAL: f"data/test.jsonl data/train.jsonl {MODEL}",
    EVAL.replace("new", "A"): "A.jsonl A.json",
    EVAL + " --init_from=run --weights=ema": f"{STATE}train_state.safetensors",
    "eval_gsm8k.py --compare=A.jsonl,B.jsonl": "A.jsonl B.jsonl",
    "eval_gsm8k.py --seeds=A.jsonl,B.jsonl": "B.jsonl",
    "pretrained/weights.py --init_from=model --out_dir=new": MODEL,
    GRID: "mine.py",
    GRID.replace("=new", "=study"): "study/results.jsonl",
    "analysis/tables.py --results=study/results.jsonl --preserve=study/kept/summary.json":
        "study/results.jsonl study/kept/summary.json",
    "analysis/plot.py --inputs=study --figure=training --out=new":
        "study/results.jsonl study/plain_seed1/log.jsonl study/probe.json",
    "analysis/report.py --inputs=study --out=new.html":
        "study/results.jsonl study/plain_seed1/log.jsonl study/probe.json study/kept/summary.json",
    "analysis/compare.py --base=base.py --tune=mine.py --out_dir=new --device=cpu":
        "base.py mine.py",
    PRESERVE: f"{MODEL} model2/model.safetensors data/mmlu/test.jsonl data/mmlu/dev.jsonl "
              "data/wikitext/test.jsonl kept/model2_*.json",
    PROBE: f"{MODEL} model2/model.safetensors model2/config.json data/wikitext/test.jsonl",
    BENCH: "data/train.jsonl",
    "analysis/bench_sampling.py --width=32 --prompt_length=4 --gen_length=4 --block_length=4 "
    "--blocks=1 --device=cpu": "",
    "analysis/predict.py --config=config/llada8b_gsm8k.py --data_dir=data": "data/train.jsonl",
    "analysis/gpu_check.py --dry --device=cpu --parts=environment --out_dir=new": "",
}
# settings that exclude each other, or do not fit what is there
CLASHES = {
    "train.py": """--resume --overwrite / --out_dir=run / --out_dir=model
        / --out_dir=data/train.jsonl / --resume / --export_dir=new / --export_dir=new/x
        / --export_dir=model / --export_dir=. / --export_dir=data
        / --resume=auto --overwrite / --shard_over=2 / --gather_once / --shard --shard_over=1
        / --lora_rank=2 --optimizer=lean / --lora_rank=2 --shard / --init_from=
        / --optimizer=lean --shard / --lora_rank=2 --init_from= / --micro_batch_size=3
        / --tokenizer=toy / --task=toy --variant=zz
        / --task=toy_base --data_dir=/proc/nope --variant=x / --forget_task=nope / --chat
        / --device=cuda / --device=meta / --device=cuda:99 / --max_length=1 / --max_length=2
        / --task=mmlu / --task=wikitext / --task=spider / --task=common / --task=files
        / --task=../train / --task=os / --task=jsonl --data_dir= / --task=jsonl --data_dir=empty
        / --task=jsonl --data_dir=data/wikitext / --task=jsonl --variant=x
        / --pool_layer=2 / --pool_layer=-1
        / --n_pred_layer=0 --pred_width=8 / --objective=consistency --pool=masked
        / --objective=two_gradients --target=frozen / --lambda_jepa=0 --target=frozen
        / --objective=blockwise / --objective=blockwise --lambda_jepa=0 --masks=nested
        / --objective=infonce --target=mean / --tau=0.2 / --objective=infonce --batch_size=1
        / --objective=blockwise --lambda_jepa=0 --mask_scope=all
        / --lambda_jepa=0 --anchor=1e30 / --lr=3e38
        / --init_from= --preset=llada-8b --tokenizer=bytes / --n_pred_layer=9999999
        / --n_layer=2 / --init_from= --tokenizer=bytes --n_embd=33
        / --init_from= --tokenizer=bytes --n_head=4 --n_kv_head=3
        / --out_dir=run --resume --init_from= --n_head=2
        / --init_from= --tokenizer=bytes --max_length=99999 / --data_dir=data/wikitext
        / --min_lr_ratio=1e300 / --eval_t=0.5,nan / --eval_t=1.5 / --eval_t=
        / --batch_size=99999 / --out_dir=run --resume --seed=7
        / --out_dir=run --resume --batch_size=4 / --out_dir=run --resume --task=toy
        / --out_dir=run --resume --lambda_jepa=0 / --out_dir=run --resume --n_pred_layer=1
        / --out_dir=run --resume --init_from=model2 / --out_dir=run --resume --max_steps=1
        / --out_dir=run --resume --optimizer=lean / --out_dir=run --resume --ema_decay=0.5
        / --out_dir=run --resume --data_dir=empty / --out_dir=run --resume --lora_rank=2
        / --out_dir=run/step_0000002 --resume""",
    "sample.py": """--raw --chat / --infill=x --prompt=y / --infill=x / --chat
        / --chat --prompt= / --gen_length=10 --block_length=4 / --gen_length=600
        / --steps=1 --block_length=1 / --threshold=0.5 --factor=1 / --alg_temp=1
        / --factor=1 --remasking=random / --graphs / --window=2 --prompt= --infill=x[MASK]
        / --html=full / --html=model / --svg=full / --svg=model
        / --html=same --svg=same / --task=toy --raw / --task=toy --infill=x[MASK] / --task=common
        / --task=nl_rx --prompt= / --task=spider / --task=toy --chat --prompt=
        / --init_from=data / --init_from=mine.py""",
    "eval_gsm8k.py": """--compare=A.jsonl / --compare=A.jsonl,A.jsonl
        / --compare=A.jsonl,B.jsonl,A.jsonl / --compare=A.jsonl,data/train.jsonl
        / --compare=A.jsonl,nope --seeds=B.jsonl / --seeds=A.jsonl / --seeds=A.jsonl,A.jsonl
        / --weights=ema / --graphs / --out=data/test.jsonl / --out=mine.py / --out=model
        / --split=nope / --split=../x / --n_shot=400 / --n_shot=9999999
        / --task=toy --variant=zz / --task=spider / --task=nl_rx / --task=mmlu / --task=wikitext
        / --task=jsonl --data_dir= / --task=jsonl --data_dir=data/mmlu / --task=jsonl --variant=x
        / --task=stats / --base=nope / --chat / --batch_tokens=0
        / --gen_length=512 --block_length=512 / --init_from= / --data_dir=data/wikitext""",
    "pretrained/weights.py": """--out_dir=model / --out_dir=data / --init_from=data
        / --out_dir=mine.py / --init_from= / --out_dir= / --init_from=mine.py
        / --revision=x --init_from=a/b / --out_dir=mine.py/x / --init_from=published/llada""",
    "analysis/grid.py": """--train=--out_dir=x / --train=\\' / --evaluate=\\"
        / --configs=mine.py,mine.py / --arms=nope / --arms=plain,plain
        / --out_dir=data/train.jsonl / --seeds=1,1 / --lambdas=0,1 / --depths=1,2
        / --processes=0 / --train=--nope=1 / --evaluate=--nope=1
        / --train=--lr=nan / --evaluate=--steps=0.5 / --train=--resume / --evaluate=--out=x""",
    "analysis/tables.py": """--results=study/results.jsonl,study/results.jsonl / --results=study
        / --preserve=study / --results= / --preserve=study/probe.json
        / --results=study/probe.json / --arms=nope / --configs=nope / --logs=nope / --logs=data""",
    "analysis/plot.py": """--inputs=data / --inputs= / --arms=nope / --out=mine.py
        / --figure=front,drift / --inputs=study,nope / --out=mine.py/x""",
    "analysis/report.py": """--inputs=data / --inputs= / --arms=nope / --out=data / --out=full
        / --out=mine.py/x.html / --inputs=mine.py""",
    "analysis/compare.py": """--train=--lambda_jepa=0 / --train=\\' / --train=--seed=1
        / --out_dir=mine.py / --tune=data/train.jsonl / --train=lr / --train=--nope=1
        / --seed=-1 / --device=cuda""",
    "analysis/probe.py": """--base= / --models= / --models=nope / --base=data / --text=nope
        / --text=mmlu / --n_rows=1 / --window=9999 / --rates=0 / --rates=1.5 / --out_dir=mine.py
        / --text=toy / --models=model2,model2 / --scales=0,0
        / --n_rows=2 --text=gsm8k --data_dir=nope / --grid=study / --grid=nope --models=""",
    "analysis/preserve.py": """--base= / --models= / --models=nope / --n_shot=99 / --window=0
        / --rates= / --rates=0 / --rates=2 / --models=model2,model2 / --data_dir=data/mmlu
        / --out=mine.py / --window=600 / --n_windows=-1 / --grid=study
        / --grid=study --models= --base=""",
    "analysis/bench.py": """--width=33 / --preset=llada-8b --n_layer=0 / --n_layer=-1
        / --steps=0 / --data_dir=nope / --device=meta / --batch_size=99999 --data_dir=""",
    "analysis/bench_sampling.py": """--width=33 / --blocks=2 / --gen_length=5 / --window=0
        / --preset=llada-8b / --prompt_length=99999999 / --batch_size=99999999 / --device=nope""",
    "analysis/predict.py": """--length=0 / --length=-1 / --config= / --config=config/tiny.py
        / --config=mine.py / --data_dir=data/wikitext / --config=config/llada8b_spider.py""",
    "analysis/gpu_check.py": """--parts=nope / --parts= / --parts=parity,nope / --minutes=0
        / --n_layer=0 / --device=meta / --device=cuda:99 / --out_dir=mine.py / --out_dir=full/x""",
}
