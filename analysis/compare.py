"""Comparison: train a base, tune it with and without JEPA, score all three, print one table.

    python analysis/compare.py
    python analysis/compare.py --seed=123 --train="--lambda_jepa=0.5"
    python analysis/compare.py --tune=config/tiny_paper.py --out_dir=out/compare_paper

Both arms share base, batches and masks; only lambda_jepa differs. Each run is a process of its own:
train.py, then eval_gsm8k.py. On a CPU the arms run side by side, each with half of the cores, so
that their step times are comparable; on a GPU they take turns. Only this script writes to the
terminal: it reads what the runs print, puts the arm's name before each line and draws their bars.
The table's numbers are also in out_dir/summary.json.
"""
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import configure, run  # first: it sets variables that torch reads

from tqdm import tqdm

from pretrained.device import pick_device
from tasks.answers import read_common
from tasks.common import load_task
from tasks.files import read_json, read_jsonl, write_json
from tasks.stats import paired_difference
from train import TrainConfig

ARMS = ("base", "plain", "jepa")
MARKER = "made_by_compare"  # a file in each folder that this script made, and may write over
SET_HERE = {"seed", "device", "out_dir", "init_from", "overwrite", "resume", "export_dir"}


@dataclass
class CompareConfig:
    base: str = "config/tiny_base.py"   # config file of the base
    tune: str = "config/tiny_tune.py"   # config file of both arms
    train: str = ""                     # more settings of both arms: "--max_steps=600 --lr=1e-3"
    seed: int = 42                      # of the batches, the masks and every initial weight
    device: str = "auto"                # cpu, cuda, mps; auto takes a GPU if there is one
    out_dir: str = "out/compare"        # base/, plain/, jepa/ and summary.json go here


def main(cfg: CompareConfig):
    began, out, options = time.perf_counter(), Path(cfg.out_dir), shlex.split(cfg.train)
    base, tune = configure(TrainConfig, [cfg.base]), configure(TrainConfig, [cfg.tune, *options])
    check(tune, options)
    questions = len(load_task(tune.task).load("test", tune.data_dir, tune.variant))
    prepare_folders(out)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # `together` ends its runs

    def train(name, *settings):
        return name, ["train.py", *settings, f"--seed={cfg.seed}", f"--device={cfg.device}",
                      "--overwrite", f"--out_dir={out / name}"]

    def score(name):
        return name, ["eval_gsm8k.py", f"--init_from={out / name}", f"--task={tune.task}",
                      f"--data_dir={tune.data_dir}", f"--chat={tune.chat}",
                      f"--device={cfg.device}", "--n_shot=0"]

    arm = [cfg.tune, *options, f"--init_from={out / 'base'}"]
    arms = [train("plain", *arm, "--lambda_jepa=0"), train("jepa", *arm)]
    n_at_once = 2 if pick_device(cfg.device).type == "cpu" else 1
    run_all([train("base", cfg.base)], 1, out, base.max_steps)
    run_all(arms, n_at_once, out, tune.max_steps)
    print(f"scoring {', '.join(ARMS)} on {questions:,} unseen questions", flush=True)
    run_all([score(name) for name in ARMS], n_at_once, out, questions)

    summary = {**summarize(out, tune), "seed": cfg.seed, "lambda_jepa": tune.lambda_jepa,
               "diffusion_t": tune.diffusion_t, "seconds": round(time.perf_counter() - began, 1)}
    write_json(out / "summary.json", summary)
    print_table(summary)


def check(tune: TrainConfig, options: list[str]):
    """Raise ValueError for settings under which there would be no fair comparison."""
    taken = SET_HERE & {option.lstrip("-").partition("=")[0] for option in options}
    if taken:
        raise ValueError(f"--train must leave out {', '.join(sorted(taken))}: compare.py sets them")
    if not tune.lambda_jepa:
        raise ValueError("lambda_jepa=0 makes both arms the same; choose one above 0")
    if "RANK" in os.environ:
        raise ValueError("compare.py starts its own processes: run it without torchrun")


def prepare_folders(out: Path):
    """Make the arms' folders, or clear those that an earlier comparison made.

    Raises ValueError if there is one that this script did not make.
    """
    folders = [out / name for name in ARMS]
    for folder in folders:
        if folder.exists() and not (folder / MARKER).is_file():
            raise ValueError(f"{folder} was not made by compare.py; choose another --out_dir")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
        for old in [*folder.glob("eval_*"), *folder.glob("log.jsonl")]:
            old.unlink()  # train.py --overwrite replaces the rest


# ----------------------------------------------------------------------------------------------
# processes


def run_all(jobs, n_at_once: int, out: Path, total: int):
    """Run (arm, command) jobs, n_at_once at a time, each with its share of the cores.

    total: steps or questions of each, for the bars; 0: unknown.
    """
    threads = max(1, (os.cpu_count() or 1) // n_at_once)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    for i in range(0, len(jobs), n_at_once):
        together([Child(arm, command, env, out / arm, position, total)
                  for position, (arm, command) in enumerate(jobs[i:i + n_at_once])])


def together(children: list):
    """Wait until all have ended. When one fails, end the others and raise ValueError."""
    try:
        while any([child.is_running() for child in children]):
            time.sleep(0.2)
    finally:
        for child in children:
            child.process.terminate()
        for child in reversed(children):  # the first bar last: it puts the cursor back
            child.close()


class Child:
    """A process whose lines are shown after the arm's name, above its progress bar."""

    def __init__(self, arm: str, command, env, folder: Path, position: int, total: int):
        self.arm, self.script, self.folder = arm, command[0], folder
        self.lines, self.last_lines = SimpleQueue(), deque(maxlen=20)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / self.script), *command[1:]], env=env, text=True,
            errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.reader = Thread(target=self.read, daemon=True)
        self.reader.start()
        self.bar = tqdm(total=total or None, desc=f"{arm:5}", position=position, leave=False,
                        unit="step" if self.script == "train.py" else "question",
                        disable=None)  # None: no bar unless stderr is a terminal

    def read(self):
        for line in self.process.stdout:
            if line.strip() and "%|" not in line:  # leave out the process's own progress bar
                self.lines.put(line.rstrip())

    def is_running(self) -> bool:
        """Show what is new -> whether the process runs. Raises ValueError if it has failed."""
        code = self.process.poll()
        if code is not None:
            self.reader.join(timeout=5)
        while not self.lines.empty():
            self.last_lines.append(self.lines.get())
            if self.script == "train.py":  # all scores come in one table at the end
                self.show(self.last_lines[-1])
        self.bar.n = n_done(self.folder, self.script)
        self.bar.refresh()
        if code:
            for line in self.last_lines if self.script != "train.py" else ():
                self.show(line)
            said = self.last_lines[-1] if self.last_lines else "it printed nothing"
            raise ValueError(f"{self.script} of {self.arm} ended with exit code {code}: {said}")
        return code is None

    def show(self, line: str):
        tqdm.write(f"{self.arm:5} | {line}")
        sys.stdout.flush()

    def close(self):
        try:
            self.process.wait(timeout=60)  # train.py saves a checkpoint before it ends
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.reader.join(timeout=5)
        self.bar.close()


def n_done(folder: Path, script: str) -> int:
    """Count the steps that train.py has logged so far, or the answers of eval_gsm8k.py."""
    if script == "train.py":
        log = folder / "log.jsonl"
        steps = re.findall(r'"step": (\d+)', log.read_text()) if log.is_file() else []
        return int(steps[-1]) if steps else 0
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("eval_*.jsonl.part*"))


# ----------------------------------------------------------------------------------------------
# numbers


def summarize(out: Path, tune: TrainConfig) -> dict:
    """Read what the runs wrote. The base's held-out losses are an arm's at step 0."""
    logs = {name: read_jsonl(out / name / "log.jsonl") for name in ARMS}
    answers = {name: str(out / name / f"eval_{tune.task}_0shot.jsonl") for name in ARMS}
    arms = {}
    for name in ARMS:
        scores = read_json(answers[name].removesuffix("l"))
        steps = [line for line in logs[name] if "ms" in line]
        tuned = logs["plain" if name == "base" else name]
        losses = [line["held_out"] for line in tuned if "held_out" in line]
        losses = losses[0 if name == "base" else -1]
        arms[name] = {"accuracy": scores["accuracy"], "stderr": scores["stderr"], "n": scores["n"],
                      "held_out_loss": losses[tune.task],
                      "base_corpus_loss": losses.get(tune.forget_task),
                      "seconds": steps[-1]["seconds"],
                      "ms_per_step": statistics.median(line["ms"] for line in steps)}
    verdicts, _ = read_common([answers["plain"], answers["jepa"]])
    ratio = arms["jepa"]["ms_per_step"] / arms["plain"]["ms_per_step"]
    return {"arms": arms, "jepa_minus_plain": paired_difference(*verdicts),
            "step_time_ratio": ratio}


def print_table(summary: dict):
    arms = summary["arms"]
    rates = "held-out loss at t = " + ", ".join(arms["base"]["held_out_loss"])
    print(f"\n{'':6} {'accuracy %':>12}   {rates:36}   base corpus  seconds  ms/step")
    for name, arm in arms.items():
        losses = "  ".join(f"{loss:.3f}" for loss in arm["held_out_loss"].values())
        base_corpus = arm["base_corpus_loss"] or {"none": float("nan")}
        accuracy = f"{100 * arm['accuracy']:.1f} +- {100 * arm['stderr']:.1f}"
        print(f"{name:6} {accuracy:>12}   {losses:36}   "
              f"{statistics.mean(base_corpus.values()):11.3f} {arm['seconds']:8.0f} "
              f"{arm['ms_per_step']:8.1f}")
    difference = summary["jepa_minus_plain"]
    points = f"{100 * difference['mean']:+.1f} +- {100 * difference['stderr']:.1f} points (paired)"
    print(f"\nn = {arms['jepa']['n']} unseen questions, seed {summary['seed']}: JEPA - plain = "
          f"{points}; step time {summary['step_time_ratio']:.2f} x;\n{summary['seconds']:.0f} s in "
          f"all. Base corpus: mean loss over t. On a CPU each arm has half of the cores.")


if __name__ == "__main__":
    run(main, CompareConfig)
