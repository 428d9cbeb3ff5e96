"""Sweep: bad invocations of every script, sampled from the grammar of hostile.py by a fixed seed.

    python tests/sweep.py --n=800 --seed=0          all scripts, about a quarter of an hour
    python tests/sweep.py --n=99999 --only=sample.py what has this text in its command or its name
    python tests/sweep.py --right                   the commands as they are, which must succeed

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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import helpers
from configurator import printable, run
from hostile import (CLASHES, COMMANDS, CONFIG, ESCAPE, EVAL, LINKS, LONG, PRESERVE, SETTINGS,
                     TRAIN, ruins_of, values_of)
from pretrained.tokenizer import byte_tokenizer
from published import write_tokenizers
from test_plot import write_study

ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
         "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}   # no network
CPU_SECONDS, WALL_SECONDS, MEMORY = 30, 600, 3 * 2 ** 30    # MEMORY: beyond what imports take

BAR = re.compile(r"(?:^|(?<=[\r\n]))[^\r\n]*?\b\d{1,3}%\|[^\r\n]*?\[[^\r\n\]]*\]")  # tqdm's
# not tried with large counts, which are no mistake: they would only take long
ENDLESS = "train.py --max_steps", "analysis/bench.py --steps", "analysis/bench_sampling.py --runs"
TURNS = "setting", "file", "clash", "setting", "file", "typing"
# what may be accepted: a pattern of "kind script: what is bad", and why
ALLOWED = {
    r"tables.py: --results=$": "of --results and --preserve one is enough",
    r"grid.py: --(arms|seeds|n_shots|bases|splits)=(.+),\2$": "what is named twice is run once",
    r"=(\u0663|1_0)$": "Python reads it as a number",
    r"=1e-320$": "a tiny number is a number",
    r"--(?!length|batch|max_l|keep|\w+_every|eval_|t_|rates|top_p|window$|blocks|runs|prompt_|proc)"
    r"\w+=-?0(\.0)?$": "0 turns it off, or stands for the default",
    r"--(keep|\w+_every|eval_rows|max_length|limit|top_k|n_rows|n_windows|n_questions)=\d{5,19}$":
        "more than there are is all, or never",
    r"(sample|eval_gsm8k|bench_sampling).py: --window=\d{5,19}$": "more than there are is all",
    r"--(factor|lr|epochs|lora_alpha)=1e308$": "a large number is a number",
    r"--seeds?=2147483648$|(sample|eval_gsm8k).py: --seed=-": "generators take any number",
    r"--(lora_targets|lora_alpha)=": "unused without lora_rank",
    r"sample.py: --(infill|task)=$|pr\w+.py: --(grid|data_dir)=$": "it is the default",
    r"--revision=": "a folder has no revisions",
    r"^setting.*--(title|prompt)=": "any text will do",
    r"^setting.*--(out|out_dir|export_dir|html|svg)=": "what can be written may have any name",
    r"--(scales|lambdas|depths|arms|bases|preserve|compare|seeds|lora_targets)=[,() ]*$":
        "none, or all",
    r"--scales=0,0|--models=model2,model2": "what is named twice is measured twice",
    r"data/\S+ (without )?/(question|text|choices)": "any text is a question",
    r" [AB]\.jsonl (without )?/(?!verdict)": "ids, golds and verdicts are compared",
    r"eval_gsm8k.py: --n_shot=-1": "it is the default: as many as the task says",
    r"published/\S+ without /(padding|truncation)": "what is not read may be missing",
    r"mmlu/dev\.jsonl half": "there are shots enough",
    r"mmlu/\S+ /answer is [0-3], line": "0 to 3 are its answers",
    r" A\.jsonl empty": "no answer is given yet",
    r"(results|log)\.jsonl half": "a last line without its end is one that is being written",
    r"--inputs=\.\.$": "the folder above holds the study, too",
    r" A\.json (without )?/(?!settings)": "scores are computed and written anew",
    r"run/log\.jsonl": "what cannot be read of a log is dropped, with a word",
    r"study/\S+ (is missing|empty|blank)": "there are others to draw",
    r"log\.jsonl (without )?/(?!step|held_out|diffusion|jepa)": "other numbers are not drawn",
    r"/trained|/(commit|revision|command|name|version|task|split|stderr)\b": "it is only shown",
    r"study/.* is 0, line|/answers is \"|/settings/(base|rates) is": "another number, another name",
    r"--(html|svg|out)=full$": "it is a link, and gives way to a file",
    r"config\.json without /|kept/\S+ without /tasks": "what is not stated has a default",
    r"kept/\S+ is (a loop|missing)": "what is not there is measured",
    r"tokenizer\.json UTF-16": "JSON may be in UTF-16",
    r"eval\S+ run/\S+/train_state.safetensors": "of the EMA's file only the EMA is read",
    r"weights.py: model/tokenizer\.json": "it is copied, not read",
}


@dataclasses.dataclass
class SweepConfig:
    n: int = 800                        # invocations
    seed: int = 0                       # of the choice
    only: str = ""                      # only those with this text in their command or their name
    right: bool = False                 # run the commands unspoilt
    jobs: int = 2                       # at a time
    accepted: bool = False              # list what was accepted, too


class Case(NamedTuple):
    kind: str                           # setting, file, clash, typing; or right
    script: str
    subject: str                        # the setting or the file
    what: str                           # is bad: the setting with its value, or how the file is
    words: list[str]
    names: list[str]                    # one of these must be in the sentence; empty: anything
    spoil: Callable = lambda folder: None

    def __str__(self):
        return f"{self.script}: {self.what}"


def main(cfg: SweepConfig):
    os.environ.update(ALONE)            # before torch and the hub's library are imported there
    helpers.FORKS.set_forkserver_preload([
        "helpers", "eval_gsm8k", "torch.distributed.fsdp", "torch._dynamo", "analysis.report",
        "analysis.grid", "analysis.compare", "test_plot"])
    began, before = time.time(), state_of(ROOT)
    faults, done, scripts = Counter(), Counter(), set()
    with tempfile.TemporaryDirectory(prefix="sweep_") as home:
        stage = make_stage(Path(home, "stage"))
        bad = [] if cfg.right else choose(all_cases(stage, cfg.seed), cfg.seed)
        right = [Case("right", words[0], "", "as it is", words, [])
                 for words in map(shlex.split, COMMANDS)] * cfg.right
        cases = [case for case in right + bad
                 if cfg.only in f"{case} {shlex.join(case.words)}"][:cfg.n]
        for case, end in ends_of(cases, stage, cfg.jobs):
            found = faults_of(case, *end)
            scripts.add(case.script)
            done[f"{case.kind}: {'refused' if end.code else 'accepted'}"] += 1
            faults.update(found)
            if found or cfg.accepted and not end.code:
                print(f"{', '.join(found) or 'accepted'}: {printable(str(case))}\n    "
                      f"{printable(shlex.join(case.words))[:400]}\n    exit code {end.code}: "
                      f"{gist(end.said)}", flush=True)
    after = state_of(ROOT)
    for path in before.keys() | after.keys():
        if before.get(path) != after.get(path):
            faults[f"changed {path} of the project"] += 1
    print(f"{sum(done.values())} invocations of {len(scripts)} scripts in "
          f"{time.time() - began:.0f} s. {dict(sorted(done.items()))}. Faults: {dict(faults)}")
    sys.exit(int(bool(faults)))


# ----------------------------------------------------------------------------------------------
# the cases


def all_cases(stage: Path, seed: int) -> list[Case]:
    """Every bad setting, file, clash and mistake of typing; the seed chooses within files."""
    cases, seen, rng = [], set(), random.Random(seed)
    for command, files in COMMANDS.items():
        script, *words = shlex.split(command)
        for name in [str(path.relative_to(stage)) for pattern in files.split()
                     for path in stage.glob(pattern)]:
            for how, spoil in ruins_of(stage / name, rng):
                path, in_config = Path(name), re.findall(r"\w+", how)[:1] * name.endswith(".py")
                cases.append(Case("file", script, name, f"{name} {how}", [script, *words],
                                  [path.name, *map(str, path.parents[:-1]), "row ", *in_config],
                                  lambda folder, name=name, spoil=spoil: spoil(folder / name)))
        if script in seen:
            continue
        seen.add(script)
        module = import_module(script.removesuffix(".py").replace("/", "."))
        hints = get_type_hints(getattr(module, SETTINGS[script]))
        for setting, kind in hints.items():
            for value in values_of(kind):
                bad = f"--{setting}={value}"
                if f"{script} --{setting}" in ENDLESS and re.fullmatch(r"\d{9,}", value):
                    continue
                names = [setting, "out of memory", "not finite", repr(value)[1:60],
                         *filter(str.strip, re.split("[,/]", printable(value)[:60]))]
                cases.append(Case("setting", script, setting, bad,
                                  with_settings(words, [bad], script),
                                  names if value.strip() else []))
        for text in filter(None, re.split(r"\s+/\s+|^\s+", CLASHES[script])):
            more = shlex.split(text)
            cases.append(Case("clash", script, "", text, with_settings(words, more, script), []))
        first = next(name for name, kind in hints.items() if kind is not bool)
        for more in (f"{first}=1 -{first}=1 ---{first}=1 --{first.upper()}=1 --nope=1 --=1 -- - -x "
                     f"nope.py data pipe loop binary endless --{first}x=1").split():
            cases.append(Case("typing", script, "", f"{more}", [script, *words, more], []))
        for more in ([f"--{first}"], [f"--{first}", "1"], [""], [" "], [LONG], ["\udcff"], [ESCAPE],
                     [f"--{ESCAPE}=1"], [f"--{LONG}=1"], ["--\udcff=1"], [f"--{first} =1"]):
            cases.append(Case("typing", script, "", f"{more}", [script, *words, *more], []))
    return cases


def with_settings(words, settings, script) -> list[str]:
    """Return a command with these settings in place of its own of the same names."""
    names = {setting.partition("=")[0] for setting in settings}
    return [script, *(word for word in words if word.partition("=")[0] not in names), *settings]


def choose(cases: list[Case], seed: int) -> list[Case]:
    """Order the cases: first one of each script and kind, then the kinds of TURNS in turns, and
    within a kind the settings, files or scripts in turns."""
    cases = random.Random(seed).sample(cases, len(cases))
    first, subjects = {}, {kind: {} for kind in TURNS}
    for case in cases:
        if first.setdefault((case.script, case.kind), case) is not case:
            subjects[case.kind].setdefault((case.script, case.subject), []).append(case)
    kinds = {kind: [case for turn in zip_longest(*groups.values()) for case in turn if case]
             for kind, groups in subjects.items()}
    chosen = list(first.values())
    while any(kinds.values()):
        chosen += [kinds[kind].pop(0) for kind in TURNS if kinds[kind]]
    return chosen


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
    (stage / "base.py").write_text(f'tokenizer = "bytes"\n{CONFIG}')
    (stage / "mine.py").write_text(f'"""A run."""\ninit_from = "model"\n{CONFIG}')
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
    for step in (1, 3):                 # as if killed at the third
        shutil.rmtree(stage / "run" / f"step_000000{step}")
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
        folders[:] = [name for name in folders if name not in (".git", ".venv", "__pycache__",
                                                               ".hypothesis")]
        for name in names:
            one = os.path.join(path, name)
            found[os.path.relpath(one, folder)] = (
                zlib.crc32(Path(one).read_bytes()) if S_ISREG(os.lstat(one).st_mode)
                else os.lstat(one).st_mode)
    return found


# ----------------------------------------------------------------------------------------------
# a run of one


class End(NamedTuple):
    code: int                           # exit code; below 0: the signal
    out: str                            # stdout
    said: str                           # stderr
    changed: list[str]                  # files that were there before and are not as they were


def ends_of(cases: list[Case], stage: Path, jobs: int):
    """Run several cases at a time, each in its own copy of the stage -> (case, its end)."""
    waiting, running = list(enumerate(cases)), []
    while waiting or running:
        while waiting and len(running) < jobs:
            number, case = waiting.pop(0)
            folder = stage.parent / str(number)
            copy_of(stage, folder)
            case.spoil(folder / "work")
            before = state_of(folder)
            process = helpers.fork(be_script, case.words, folder / "work", folder, True)
            running.append((case, folder, before, process, time.time()))
        for one in list(running):
            case, folder, before, process, began = one
            if process.is_alive() and time.time() - began < WALL_SECONDS:
                continue
            helpers.kill(process.pid)   # and what it has started
            process.join()
            out, said = (Path(f"{folder}{end}").read_bytes().decode("utf-8", "backslashreplace")
                         for end in (".out", ".err"))
            after = state_of(folder)
            changed = [path for path in before if after.get(path) != before[path]]
            shutil.rmtree(folder)
            running.remove(one)
            yield case, End(process.exitcode, out, said, changed)
        time.sleep(0.02)


def faults_of(case: Case, code: int, out: str, said: str, changed: list) -> list[str]:
    """Return what is wrong with how a case ended."""
    lines = [line for line in re.split("[\r\n]", BAR.sub("\n", said)) if line.strip()]
    if code == -9:                      # its time was over
        return ["no end"]
    if re.search("Traceback|panicked", said) or code < 0:
        return ["a traceback" if code > 0 else f"signal {-code}"]
    if case.kind == "right":
        return ["refused"] if code else []
    if code == 0:
        is_allowed = any(re.search(pattern, f"{case.kind} {case}") for pattern in ALLOWED)
        return [] if is_allowed else ["accepted"]
    raw = printable(said.replace("\r", "")) != said.replace("\r", "") or printable(out) != out
    found = {"silent": not lines, "long": len(lines) > 3, "control characters": raw,
             f"changed {' '.join(changed)}": changed,
             "names nothing": case.names and not any(name in said for name in case.names)}
    return [fault for fault, is_so in found.items() if is_so]


def gist(said: str) -> str:
    """Return the end of what a script said, of a traceback also the last line in the project."""
    where = re.findall(rf'File "{ROOT}/(.*?)", line (\d+)', said)
    return f"{':'.join(where[-1]) if where else ''} {said[-300:]!r}"


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
            resource.setrlimit(kind, (most, most))
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    helpers.runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    run(main, SweepConfig)
