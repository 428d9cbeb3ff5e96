"""Sweep: bad invocations of every script, sampled from the grammar of hostile.py by a fixed seed.

    python tests/sweep.py --n=800 --seed=0          all scripts, about a quarter of an hour
    python tests/sweep.py --n=9999 --only=sample.py what has this text in its command or its name

Each runs in a copy of a folder with small models and files, in a process forked from one that has
imported torch. It is at fault if it ends in a traceback or a signal, takes 30 s of a core, accepts
what ALLOWED does not name, says nothing, more than three lines or control characters, names neither
the setting nor the file, or changes files although it refuses. Exit code 1 if one is at fault.
"""
import dataclasses
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from stat import S_ISREG
from typing import Callable, NamedTuple, get_type_hints

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
                  https_proxy="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9")  # no network
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import helpers
from configurator import printable, run
from hostile import ESCAPE, LONG, ruins_of, values_of
from pretrained.tokenizer import byte_tokenizer
from published import write_tokenizers
from test_plot import write_study

CPU_SECONDS, WALL_SECONDS, MEMORY = 30, 240, 3 * 2 ** 30    # MEMORY: beyond what imports take

LINKS = {"loop": "loop", "null": "/dev/null", "full": "/dev/full", "endless": "/dev/zero"}

# Each script's settings, and commands that are right. A setting goes to the first.
SETTINGS = {"train.py": "TrainConfig", "sample.py": "SampleConfig", "eval_gsm8k.py": "EvalConfig",
            "pretrained/weights.py": "ConvertConfig", "analysis/grid.py": "GridConfig",
            "analysis/tables.py": "TablesConfig", "analysis/plot.py": "PlotConfig",
            "analysis/report.py": "ReportConfig", "analysis/compare.py": "CompareConfig",
            "analysis/probe.py": "ProbeConfig", "analysis/preserve.py": "PreserveConfig",
            "analysis/bench.py": "BenchConfig", "analysis/predict.py": "PredictConfig",
            "analysis/bench_sampling.py": "SamplingBenchConfig"}
TRAIN = ("train.py mine.py --out_dir=new --max_steps=3 --save_every=1 --keep=3 --device=cpu "
         "--task=gsm8k --data_dir=data --batch_size=2 --eval_rows=2 --max_length=64 --eval_t=0.5 "
         "--log_every=1 --init_from=model")
SAMPLE = "sample.py --init_from=model --prompt=2+2 --gen_length=4 --block_length=2 --device=cpu"
EVAL = ("eval_gsm8k.py --init_from=model --data_dir=data --limit=2 --n_shot=1 --gen_length=4 "
        "--block_length=4 --steps=2 --device=cpu --out=new.jsonl")
GRID = ("analysis/grid.py --configs=mine.py --arms=plain --seeds=1 --n_shots=0 --out_dir=new "
        "--evaluate=--limit=1")
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
    TRAIN.replace("new", "run") + " --resume": "run/log.jsonl run/settings.json " + " ".join(
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
              "data/wikitext/test.jsonl kept/summary.json",
    PROBE: f"{MODEL} model2/model.safetensors model2/config.json data/wikitext/test.jsonl",
    BENCH: "data/train.jsonl",
    "analysis/bench_sampling.py --width=32 --prompt_length=4 --gen_length=4 --block_length=4 "
    "--blocks=1 --device=cpu": "",
    "analysis/predict.py --length=9": "",
}
# settings that exclude each other, or do not fit what is there
CLASHES = {
    "train.py": """--resume --overwrite / --out_dir=run / --out_dir=model / --out_dir=data/train.jsonl
        / --resume / --export_dir=new / --export_dir=new/x / --export_dir=model / --export_dir=.
        / --export_dir=data / --lora_rank=2 --optimizer=lean / --lora_rank=2 --shard / --init_from=
        / --optimizer=lean --shard / --lora_rank=2 --init_from= / --micro_batch_size=3
        / --tokenizer=toy / --task=toy --variant=zz / --task=toy_base --data_dir=/proc/nope --variant=x
        / --forget_task=nope / --chat / --device=cuda / --device=meta / --device=cuda:99
        / --max_length=1 / --max_length=2 / --task=mmlu / --task=wikitext / --task=spider
        / --task=common / --task=files / --task=../train / --task=os / --pool_layer=2
        / --pool_layer=-1 / --n_pred_layer=0 --pred_width=8 / --objective=consistency --pool=masked
        / --objective=two_gradients --target=frozen / --lambda_jepa=0 --target=frozen
        / --lambda_jepa=0 --anchor=1e30 / --masks=nested --t_ctx=0.7 --t_tgt=0.2 / --lr=3e38
        / --init_from= --preset=llada-8b --tokenizer=bytes / --n_pred_layer=9999999
        / --init_from= --tokenizer=bytes --max_length=99999 / --data_dir=data/wikitext
        / --min_lr_ratio=1e300 / --eval_t=0.5,nan / --eval_t=1.5 / --eval_t= / --batch_size=99999
        / --out_dir=run --resume --seed=7 / --out_dir=run --resume --batch_size=4
        / --out_dir=run --resume --task=toy / --out_dir=run --resume --lambda_jepa=0
        / --out_dir=run --resume --n_pred_layer=1 / --out_dir=run --resume --init_from=model2
        / --out_dir=run --resume --max_steps=1 / --out_dir=run --resume --optimizer=lean
        / --out_dir=run --resume --ema_decay=0.5 / --out_dir=run --resume --data_dir=empty
        / --out_dir=run --resume --lora_rank=2 / --out_dir=run/step_0000002 --resume""",
    "sample.py": """--raw --chat / --infill=x --prompt=y / --infill=x / --chat / --chat --prompt=
        / --gen_length=10 --block_length=4 / --gen_length=600 / --steps=1 --block_length=1
        / --threshold=0.5 --factor=1 / --alg_temp=1 / --factor=1 --remasking=random / --html=full
        / --html=model / --html=nope/x.html / --init_from=data / --init_from=mine.py
        / --cache=dual --cfg_scale=1 / --steps=3 --block_length=4 / --prompt= --raw""",
    "eval_gsm8k.py": """--compare=A.jsonl / --compare=A.jsonl,A.jsonl / --compare=A.jsonl,B.jsonl,A.jsonl
        / --compare=A.jsonl,data/train.jsonl / --compare=A.jsonl,nope --seeds=B.jsonl
        / --seeds=A.jsonl / --seeds=A.jsonl,A.jsonl / --weights=ema / --out=A.jsonl
        / --out=data/test.jsonl / --out=mine.py / --out=model / --split=nope / --split=../x
        / --n_shot=400 / --n_shot=9999999 / --task=toy --variant=zz / --task=spider / --task=nl_rx
        / --task=mmlu / --task=wikitext / --task=stats / --base=nope / --chat / --batch_tokens=0
        / --gen_length=512 --block_length=512 / --init_from= / --data_dir=data/wikitext""",
    "pretrained/weights.py": """--out_dir=model / --out_dir=data / --init_from=data / --out_dir=mine.py
        / --init_from= / --out_dir= / --init_from=mine.py / --revision=x --init_from=a/b
        / --out_dir=mine.py/x / --init_from=published/llada""",
    "analysis/grid.py": """--train=--out_dir=x / --train=\\' / --evaluate=\\" / --configs=mine.py,mine.py
        / --arms=nope / --arms=plain,plain / --out_dir=data/train.jsonl / --seeds=1,1 / --lambdas=0,1
        / --depths=1,2 / --processes=0 / --train=--nope=1 / --evaluate=--nope=1 / --configs=base.py,
        / --train=--lr=nan / --evaluate=--steps=0.5 / --train=--resume / --evaluate=--out=x""",
    "analysis/tables.py": """--results=study/results.jsonl,study/results.jsonl / --results=study
        / --preserve=study / --results= / --preserve=study/probe.json / --results=study/probe.json""",
    "analysis/plot.py": """--inputs=data / --inputs= / --arms=nope / --out=mine.py / --figure=front,drift
        / --inputs=study,nope / --out=mine.py/x""",
    "analysis/report.py": """--inputs=data / --inputs= / --arms=nope / --out=data / --out=full
        / --out=mine.py/x.html / --inputs=mine.py""",
    "analysis/compare.py": """--train=--lambda_jepa=0 / --train=\\' / --train=--seed=1 / --out_dir=mine.py
        / --tune=data/train.jsonl / --train=lr / --train=--nope=1 / --seed=-1 / --device=cuda""",
    "analysis/probe.py": """--base= / --models= / --models=nope / --base=data / --text=nope / --text=mmlu
        / --n_rows=1 / --window=9999 / --rates=0 / --rates=1.5 / --out_dir=mine.py / --text=toy
        / --models=model2,model2 / --scales=0,0 / --n_rows=2 --text=gsm8k --data_dir=nope""",
    "analysis/preserve.py": """--base= / --models= / --models=nope / --n_shot=99 / --window=0 / --rates=
        / --rates=0 / --rates=2 / --models=model2,model2 / --data_dir=data/mmlu / --out=mine.py
        / --window=600 / --n_windows=-1""",
    "analysis/bench.py": """--width=33 / --preset=llada-8b --n_layer=0 / --n_layer=-1 / --steps=0
        / --data_dir=nope / --device=meta / --batch_size=99999 --data_dir=""",
    "analysis/bench_sampling.py": """--width=33 / --blocks=2 / --gen_length=5 / --preset=llada-8b
        / --prompt_length=99999999 / --batch_size=99999999 / --device=nope""",
    "analysis/predict.py": "--length=0 / --length=-1",
}
# what may be accepted: a pattern of "script: what is bad", and why
ALLOWED = {}


@dataclasses.dataclass
class SweepConfig:
    n: int = 800                        # invocations
    seed: int = 0                       # of the choice
    only: str = ""                      # only those with this text in their command or their name
    jobs: int = 2                       # at a time
    accepted: bool = False              # list what was accepted, too


class Case(NamedTuple):
    kind: str                           # setting, file, clash or typing
    what: str                           # is bad: script, setting or file, and how
    words: list[str]
    names: list[str]                    # one of these must be in the sentence; empty: anything
    spoil: Callable = lambda folder: None


def main(cfg: SweepConfig):
    began, home = time.time(), Path(tempfile.mkdtemp(prefix="sweep_"))
    helpers.FORKS.set_forkserver_preload([
        "helpers", "eval_gsm8k", "torch.distributed.fsdp", "torch._dynamo", "analysis.report",
        "analysis.grid", "analysis.compare", "test_plot"])
    before = state_of(ROOT)
    stage = make_stage(home / "stage")
    cases = [case for case in choose(all_cases(stage, cfg.seed), cfg.seed)
             if cfg.only in f"{case.what} {shlex.join(case.words)}"][:cfg.n]
    waiting, running, faults, done = list(enumerate(cases)), {}, Counter(), Counter()
    while waiting or running:
        while waiting and len(running) < cfg.jobs:
            number, case = waiting.pop(0)
            running[number] = Run(case, stage, home / str(number))
        for number, one in list(running.items()):
            if one.is_over():
                found, said = one.faults(), one.said
                done[f"{one.case.kind}: {'refused' if one.code else 'accepted'}"] += 1
                faults.update(found)
                if found or cfg.accepted and not one.code:
                    print(f"{', '.join(found) or 'accepted'}: {printable(one.case.what)}\n    "
                          f"{printable(shlex.join(one.case.words))[:400]}\n    exit code {one.code}"
                          f", {one.seconds:.0f} s: {said[-500:]!r}", flush=True)
                shutil.rmtree(one.folder)
                del running[number]
        time.sleep(0.02)
    changed = [path for path in before.keys() | state_of(ROOT).keys()
               if before.get(path) != state_of(ROOT).get(path)]
    faults["a file of the project changed"] += len(changed)
    shutil.rmtree(home)
    print(f"{len(cases)} invocations in {time.time() - began:.0f} s. "
          f"{dict(sorted(done.items()))}. Faults: {dict(+faults)}")
    sys.exit(int(bool(+faults)))


# ----------------------------------------------------------------------------------------------
# the cases


def all_cases(stage: Path, seed: int) -> list[Case]:
    """Every bad setting, file, clash and mistake of typing; the seed chooses within files."""
    cases, seen, rng = [], set(), random.Random(seed)
    for command, files in COMMANDS.items():
        script, *words = shlex.split(command)
        for name in files.split():
            for how, spoil in ruins_of(stage / name, rng):
                path, in_config = Path(name), re.findall(r"\w+", how)[:1] * name.endswith(".py")
                cases.append(Case("file", f"{script}: {name} {how}", [script, *words],
                                  [path.name, str(path.parent), "row ", *in_config],
                                  lambda folder, name=name, spoil=spoil: spoil(folder / name)))
        if script in seen:
            continue
        seen.add(script)
        module = import_module(script.removesuffix(".py").replace("/", "."))
        hints = get_type_hints(getattr(module, SETTINGS[script]))
        for setting, kind in hints.items():
            for value in values_of(kind):
                bad = f"--{setting}={value}"
                names = [setting, *filter(str.strip, printable(value)[:60].split(",")),
                         repr(value)[1:60]]
                cases.append(Case("setting", f"{script}: {bad}", with_settings(words, [bad], script),
                                  names))
        for text in filter(None, re.split(r"\s+/\s+|^\s+", CLASHES[script])):
            more = shlex.split(text)
            cases.append(Case("clash", f"{script}: {text}", with_settings(words, more, script), []))
        first = next(name for name, kind in hints.items() if kind is not bool)
        for more in (f"{first}=1 -{first}=1 ---{first}=1 --{first.upper()}=1 --nope=1 --=1 -- - -x "
                     f"nope.py data pipe loop binary endless --{first}x=1").split():
            cases.append(Case("typing", f"{script}: {more}", [script, *words, more], []))
        for more in ([f"--{first}"], [f"--{first}", "1"], [""], [" "], [LONG], ["\udcff"], [ESCAPE],
                     [f"--{ESCAPE}=1"], [f"--{LONG}=1"], ["--\udcff=1"], [f"--{first} =1"]):
            cases.append(Case("typing", f"{script}: {more}", [script, *words, *more], []))
    return cases


def with_settings(words, settings, script) -> list[str]:
    """Return a command with these settings in place of its own of the same names."""
    names = {setting.partition("=")[0] for setting in settings}
    return [script, *(word for word in words if word.partition("=")[0] not in names), *settings]


def choose(cases: list[Case], seed: int) -> list[Case]:
    """Order the cases: first one of each script and kind, then setting by setting, file by file."""
    cases = random.Random(seed).sample(cases, len(cases))
    first, subjects = {}, {}
    for case in cases:
        script, _, rest = case.what.partition(": ")
        subject = re.match(r"[\w-]*[\w/.]*", rest)[0] if case.kind in ("setting", "file") else ""
        if first.setdefault((script, case.kind), case) is not case:
            subjects.setdefault((script, case.kind, subject), []).append(case)
    turns = zip_longest(*subjects.values())
    return [*first.values(), *(case for turn in turns for case in turn if case)]


# ----------------------------------------------------------------------------------------------
# the folder that each runs in


def make_stage(stage: Path) -> Path:
    """Make the folder that every invocation gets a copy of -> the folder."""
    stage.mkdir()
    tok = byte_tokenizer()
    for seed, name in enumerate(("model", "model2")):
        helpers.write_checkpoint(stage / name, tok, seed)
    rows = [{"question": f"{i} + {i} = ?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"}
            for i in range(270)]        # 256 of train are held out
    choices = [{"question": f"{i}?", "subject": "sums", "choices": list("1234"), "answer": i % 4}
               for i in range(6)]
    for name, lines in {"train": rows, "test": rows[:4], "mmlu/test": choices[2:],
                        "mmlu/dev": choices[:2],
                        "wikitext/test": [{"text": f" line {i} , of them \n"} for i in range(9)]
                        }.items():
        path = stage / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        helpers.write_jsonl(path, lines)
    (stage / "mine.py").write_text('"""A run."""\nlr = 1e-3\neval_every = 100\n')
    (stage / "base.py").write_text('tokenizer = "bytes"\nmax_steps = 1\n')
    (stage / "published").mkdir()
    write_tokenizers(stage / "published")
    write_study(stage / "study", seeds=1)
    (stage / "empty").mkdir()
    (stage / "binary").write_bytes(bytes(range(256)))
    os.mkfifo(stage / "pipe")
    for name, to in LINKS.items():
        (stage / name).symlink_to(to)
    commands = [TRAIN.replace("=new", "=run"), EVAL.replace("new", "A"), PRESERVE,
                EVAL.replace("new", "B").replace("model", "model2")]
    for number, command in enumerate(commands):
        log = stage.parent / f"make{number}"
        made = helpers.fork(be_script, shlex.split(command), stage, log)
        made.join()
        assert made.exitcode == 0, helpers.output_of([log])
    shutil.rmtree(stage / "run" / "step_0000003")       # as if killed at the third step
    return stage


def copy_of(stage: Path, folder: Path):
    """Copy the stage to folder/work."""
    folder.mkdir()
    shutil.copytree(stage, folder / "work", symlinks=True,
                    ignore=lambda path, names: {"pipe"} & set(names))
    os.mkfifo(folder / "work" / "pipe")


def state_of(folder: Path) -> dict:
    """Return {path: what it holds, or what it is} of all files below a folder."""
    found = {}
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in (".git", ".venv", "__pycache__")]
        for name in names:
            one = os.path.join(path, name)
            found[os.path.relpath(one, folder)] = (
                zlib.crc32(Path(one).read_bytes()) if S_ISREG(os.lstat(one).st_mode)
                else os.lstat(one).st_mode)
    return found


# ----------------------------------------------------------------------------------------------
# a run of one


class Run:
    """The process of a case, in its own copy of the stage."""

    def __init__(self, case: Case, stage: Path, folder: Path):
        self.case, self.folder, self.began = case, folder, time.time()
        copy_of(stage, folder)
        case.spoil(folder / "work")
        self.before = state_of(folder)
        self.log = folder.with_suffix(".log")
        self.process = helpers.fork(be_script, case.words, folder / "work", self.log, True)

    def is_over(self) -> bool:
        if self.process.is_alive() and time.time() - self.began < WALL_SECONDS:
            return False
        try:
            os.killpg(self.process.pid, signal.SIGKILL)     # and what it has started
        except ProcessLookupError:
            pass
        self.process.join()
        self.code, self.seconds = self.process.exitcode, time.time() - self.began
        self.out, self.said = ("".join(open(self.log.with_suffix(end), errors="backslashreplace",
                                            newline="").read()) for end in (".out", ".err"))
        return True

    def faults(self) -> list[str]:
        """Return what is wrong with how it ended."""
        lines = [line for line in re.split("[\r\n]", self.said)
                 if line.strip() and not re.search(r"\d+%\||\d+(it|step|question)", line)]
        if self.code in (-signal.SIGXCPU, -signal.SIGKILL):
            return ["no end"]
        found = {"a traceback": re.search("Traceback|panicked", self.said),
                 "a signal": self.code < 0,
                 "control characters": printable(text := self.said.replace("\r", "")) != text
                                       or self.code and printable(self.out) != self.out}
        if any(found.values()):
            return [fault for fault, is_so in found.items() if is_so]
        if self.code == 0:
            allowed = any(re.search(pattern, self.case.what) for pattern in ALLOWED)
            return [] if allowed else ["accepted"]
        after = state_of(self.folder)
        changed = [path for path, state in self.before.items() if after.get(path) != state]
        found = {"silent": not lines, "long": len(lines) > 3,
                 f"changed {' '.join(changed)}": changed,
                 "names nothing": self.case.names and not any(
                     name in self.said for name in self.case.names)}
        return [fault for fault, is_so in found.items() if is_so]


def be_script(words, folder, log, limited=False):
    """Be the process that runs a script in a folder, with limits if asked to."""
    os.setsid()
    helpers.write_output_to(log)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    (folder.parent / "home").mkdir(exist_ok=True)
    os.environ.update(HOME=str(folder.parent / "home"), TMPDIR=str(folder.parent / "home"))
    if limited:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for kind, most in ((resource.RLIMIT_AS, size + MEMORY), (resource.RLIMIT_CORE, 0),
                           (resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_FSIZE, 2 ** 28)):
            resource.setrlimit(kind, (most, most if most else 0))
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    helpers.runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    run(main, SweepConfig)
