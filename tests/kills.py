"""Kills: runs are killed at random moments and resumed; in the end nothing is lost.

    python tests/kills.py --n=15                about twenty minutes
    python tests/kills.py --n=15 --only=ddp     one of the six: one, ddp, fsdp, lora, lean, evaluate

Every process of a run gets SIGKILL at once: while it starts, between steps, or while a checkpoint
is being saved, in turns. Then the run is resumed until the next kill, at last to its end. Weights,
predictor, target and moments must equal those of a run left in peace, to the bit, and so must the
log but for its clock. Of an evaluation all answers must be there, each once, in the same file.
"""
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"         # before torch: sums are added in one order

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import helpers
from configurator import run
from pretrained.weights import newest_checkpoint
from tasks.answers import read_answers

N_QUESTIONS = 600
TRAIN = ["train.py", "--tokenizer=toy", "--task=gsm8k", "--data_dir={rows}", "--max_length=64",
         "--batch_size=8", "--lr=1e-3", "--save_every=2", "--keep=2", "--log_every=1",
         "--eval_every=9", "--eval_rows=8", "--eval_t=0.5", "--device=cpu"]
TUNE = ["--tokenizer=", "--init_from={base}"]
EVALUATE = ["eval_gsm8k.py", "--init_from={base}", "--task=toy", f"--limit={N_QUESTIONS}",
            "--batch_tokens=150", "--device=cpu"]
RUNS = {    # name -> processes, command
    "one": (1, TRAIN),
    "ddp": (2, TRAIN),
    "fsdp": (2, [*TRAIN, "--shard"]),
    "lora": (1, [*TRAIN, *TUNE, "--lora_rank=4"]),
    "lean": (1, [*TRAIN, *TUNE, "--optimizer=lean"]),
    "evaluate": (2, EVALUATE),
}
MOMENTS = "save", "step", "start"           # in turns


@dataclass
class KillsConfig:
    n: int = 15                             # kills of each run
    seed: int = 0                           # of the moments
    only: str = ""                          # one of RUNS; empty: all


def main(cfg: KillsConfig):
    folder, rows = Path(tempfile.mkdtemp(prefix="kills_")), []
    for name in [cfg.only] if cfg.only else RUNS:
        began = time.time()
        kills, wrong = check(name, cfg.n, cfg.seed, folder)
        rows.append([name, len(kills), *(kills.count(moment) for moment in MOMENTS),
                     f"{time.time() - began:.0f}", wrong or "equal"])
    shutil.rmtree(folder)
    print(f"| run | kills | in a {' | at a '.join(MOMENTS)} | seconds | in the end |\n"
          "|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    sys.exit(int(any(row[-1] != "equal" for row in rows)))


def check(name: str, n: int, seed: int, folder: Path) -> tuple[list[str], str]:
    """Kill a run n times, resume it to its end, compare -> moments of the kills, what is wrong.

    The folder gets the runs, and a base, which later calls find there. Raises AssertionError if a
    run fails, or ends before it is killed.
    """
    n_processes, command = RUNS[name]
    base, rows, rng = folder / "base", folder / "rows", random.Random(f"{seed} {name}")

    def filled(words):
        return [word.format(base=base, rows=rows) for word in words]
    if not base.exists():
        rows.mkdir()
        helpers.write_gsm8k(rows)
        finish(filled([*TRAIN, "--max_steps=4", "--lambda_jepa=0", f"--out_dir={base}"]))
    is_training = command[0] == "train.py"
    moments = MOMENTS if is_training else MOMENTS[1:]
    command = filled(command)
    command += [f"--max_steps={20 + 16 * n}"] if is_training else []
    peace, killed, met = folder / f"{name}_in_peace", folder / f"{name}_killed", []

    def command_for(out):               # goes on with what it finds there
        if not is_training:
            return [*command, f"--out={out}.jsonl"]
        return [*command, f"--out_dir={out}", f"--resume={has_checkpoint(out)}"]

    finish(command_for(peace), n_processes)
    for number in range(n):
        process, moment = start(command_for(killed), n_processes), moments[number % len(moments)]
        wait_for(moment, process, killed, rng)
        assert process.poll() is None, f"{name} ended before kill {number + 1}"
        helpers.kill(process.pid)
        process.communicate()
        met.append("save" if (killed / "saving").exists() else moment)
    finish(command_for(killed), n_processes)
    return met, (compare_runs if is_training else compare_answers)(peace, killed)


def has_checkpoint(folder) -> bool:
    try:
        return bool(newest_checkpoint(folder))
    except FileNotFoundError:
        return False


# ----------------------------------------------------------------------------------------------
# processes


def start(words, n_processes: int = 1):
    """Start a script on n processes -> the process that has the others as its children."""
    command = [sys.executable, *words]
    if n_processes > 1:
        command = helpers.torchrun_command(*words, n=n_processes)
    return subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def finish(words, n_processes: int = 1):
    """Run a script to its end. Raises AssertionError with what it said if it fails."""
    process = start(words, n_processes)
    _, said = process.communicate(timeout=helpers.PATIENCE)
    assert process.returncode == 0, f"{' '.join(words)}: {said}"


def wait_for(moment: str, process, out: Path, rng):
    """Return at this moment of a run that writes to `out`, or when it ends."""
    began, longest = time.time(), {"start": 4, "step": 0.5, "save": 0.05}[moment]   # seconds

    def has_come():
        if moment == "save":
            return (out / "saving").exists()
        written = [out / "log.jsonl", *out.parent.glob(f"{out.name}.jsonl.part*")]
        return moment == "start" or any(path.exists() and path.stat().st_size
                                        and path.stat().st_mtime > began for path in written)
    helpers.wait_until(lambda: process.poll() is not None or has_come())
    time.sleep(rng.uniform(0, longest))


# ----------------------------------------------------------------------------------------------
# what is left


def compare_runs(peace, killed) -> str:
    """Return how the newest checkpoints and the logs of two runs differ; empty: not at all."""
    a, b = helpers.tensors(peace), helpers.tensors(killed)
    if a.keys() != b.keys():
        return f"other tensors: {sorted(a.keys() ^ b.keys())}"
    if differ := [name for name in a if not torch.equal(a[name], b[name])]:
        return f"{len(differ)} of {len(a)} tensors differ, such as {differ[0]}"
    logs = [helpers.without_clock(out) for out in (peace, killed)]
    return "" if logs[0] == logs[1] else f"{len(logs[0])} and {len(logs[1])} lines of log differ"


def compare_answers(peace, killed) -> str:
    """Return how two files of answers differ; empty: not at all."""
    files = [Path(f"{out}.jsonl") for out in (peace, killed)]
    ids = [list(read_answers(path)) for path in files]      # raises if one is there twice
    if len(ids[0]) != N_QUESTIONS or ids[0] != ids[1]:
        return f"{len(ids[0])} and {len(ids[1])} of {N_QUESTIONS} answers"
    return "" if files[0].read_bytes() == files[1].read_bytes() else "other answers"


if __name__ == "__main__":
    run(main, KillsConfig)
