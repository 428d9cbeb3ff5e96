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
from hostile import (CLASHES, COMMANDS, ESCAPE, EVAL, LINKS, LONG, PRESERVE, SETTINGS, TRAIN,
                     ruins_of, values_of)
from pretrained.tokenizer import byte_tokenizer
from published import write_tokenizers
from test_plot import write_study

CPU_SECONDS, WALL_SECONDS, MEMORY = 30, 240, 3 * 2 ** 30    # MEMORY: beyond what imports take

BAR = re.compile(r"[^\r\n]*?\d+%\|[^\r\n]*?\[[^\r\n\]]*\]")     # tqdm's
# who asks for so many gets so many
ENDLESS = "train.py --max_steps", "analysis/bench.py --steps", "analysis/bench_sampling.py --runs"
TURNS = "setting", "file", "clash", "setting", "file", "typing"
# what may be accepted: a pattern of "script: what is bad", and why
ALLOWED = {
    r"=(\u0663|1_0)$": "Python reads it as a number",
    r"=1e-320$": "a tiny number is a number",
    r"--(?!length|batch|max_l|keep|\w+_every|eval_|t_|rates|top_p|window$|blocks|runs|prompt_|proc)"
    r"\w+=-?0(\.0)?$": "0 turns it off, or stands for the default",
    r"--(seeds?|keep|\w+_every|eval_rows|max_length|limit|top_k|n_rows|n_windows|n_questions)"
    r"=\d{10,19}$": "more than there are is all, or never",
    r"--(factor|lr|epochs|lora_alpha)=1e308$": "a large number is a number",
    r"--(lora_targets|lora_alpha)=": "unused without lora_rank",
    r"--(revision)=": "a folder has no revisions",
    r"--(title|prompt)=": "any text will do",
    r"--(out|out_dir|export_dir|html)=": "a path that can be written may have any name",
    r"--(scales|lambdas|depths|arms|preserve|compare|seeds|models|lora_targets)=[,() ]*$":
        "empty: none, or all",
    r"--scales=0,0|--models=model2,model2": "what is named twice is measured twice",
    r"data/\S+ (without )?/(question|text|choices)": "any text is a question",
    r"\b[AB]\.jsonl (without )?/(?!verdict)": "ids, golds and verdicts are compared",
    r"\bA\.json (without )?/(?!settings)": "scores are computed and written anew",
    r"run/log\.jsonl": "of a log, what cannot be read is dropped, with a word",
    r"study/\S+ is missing": "there are others to draw",
    r"log\.jsonl (without )?/(?!step|held_out|diffusion|jepa)": "other numbers are not drawn",
    r"tokenizer\.json /(name|version)": "a name is for people",
    r"weights.py: model/tokenizer\.json": "it is copied, not read",
    r"kept/": "it is written anew",
}


@dataclasses.dataclass
class SweepConfig:
    n: int = 800                        # invocations
    seed: int = 0                       # of the choice
    only: str = ""                      # only those with this text in their command or their name
    jobs: int = 2                       # at a time
    accepted: bool = False              # list what was accepted, too


class Case(NamedTuple):
    kind: str                           # setting, file, clash or typing
    script: str
    subject: str                        # the setting or the file
    what: str                           # is bad: the setting with its value, or how the file is
    words: list[str]
    names: list[str]                    # one of these must be in the sentence; empty: anything
    spoil: Callable = lambda folder: None

    def __str__(self):
        return f"{self.script}: {self.what}"


def main(cfg: SweepConfig):
    began, home = time.time(), Path(tempfile.mkdtemp(prefix="sweep_"))
    helpers.FORKS.set_forkserver_preload([
        "helpers", "eval_gsm8k", "torch.distributed.fsdp", "torch._dynamo", "analysis.report",
        "analysis.grid", "analysis.compare", "test_plot"])
    before = state_of(ROOT)
    stage = make_stage(home / "stage")
    cases = [case for case in choose(all_cases(stage, cfg.seed), cfg.seed)
             if cfg.only in f"{case} {shlex.join(case.words)}"][:cfg.n]
    waiting, running, faults, done = list(enumerate(cases)), {}, Counter(), Counter()
    while waiting or running:
        while waiting and len(running) < cfg.jobs:
            number, case = waiting.pop(0)
            running[number] = Run(case, stage, home / str(number))
        for number, one in list(running.items()):
            if one.is_over():
                found = faults_of(one.case, one.code, one.out, one.said, one.changed)
                done[f"{one.case.kind}: {'refused' if one.code else 'accepted'}"] += 1
                faults.update(found)
                if found or cfg.accepted and not one.code:
                    print(f"{', '.join(found) or 'accepted'}: {printable(str(one.case))}\n    "
                          f"{printable(shlex.join(one.case.words))[:400]}\n    exit code {one.code}"
                          f", {one.seconds:.0f} s: {gist(one.said)}", flush=True)
                shutil.rmtree(one.folder)
                del running[number]
        time.sleep(0.02)
    changed = [path for path in before.keys() | state_of(ROOT).keys()
               if before.get(path) != state_of(ROOT).get(path)]
    faults["a file of the project changed"] += len(changed)
    shutil.rmtree(home)
    n_scripts = len({case.script for case in cases})
    print(f"{len(cases)} invocations of {n_scripts} scripts in {time.time() - began:.0f} s. "
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
                cases.append(Case("file", script, name, f"{name} {how}", [script, *words],
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
                if f"{script} --{setting}" in ENDLESS and re.fullmatch(r"\d{9,}", value):
                    continue
                names = [setting, "out of memory", "not finite", *filter(str.strip, printable(value)[:60].split(",")),
                         repr(value)[1:60]]
                cases.append(Case("setting", script, setting, bad,
                                  with_settings(words, [bad], script), names))
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
        after = state_of(self.folder)
        self.changed = [path for path, was in self.before.items() if after.get(path) != was]
        return True


def faults_of(case: Case, code: int, out: str, said: str, changed=()) -> list[str]:
    """Return what is wrong with how a case ended: exit code, stdout, stderr, files it changed."""
    lines = [line for line in re.split("[\r\n]", BAR.sub("\n", said)) if line.strip()]
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return ["no end"]
    if re.search("Traceback|panicked", said) or code < 0:
        return ["a traceback" if code > 0 else f"signal {-code}"]
    if code == 0:
        is_allowed = any(re.search(pattern, str(case)) for pattern in ALLOWED)
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
            resource.setrlimit(kind, (most, most if most else 0))
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    helpers.runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    run(main, SweepConfig)
