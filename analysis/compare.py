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
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import configure, printable, run  # first: it sets variables that torch reads

from tqdm import tqdm

from analysis.checks import split_options
from analysis.console import print_table
from pretrained.device import pick_device
from tasks.answers import read_common
from tasks.files import lock, read_json, read_jsonl, write_json, write_text
from tasks.stats import in_words, paired_difference
from train import TrainConfig

ARMS = ("base", "plain", "jepa")
MARKER = "made_by_compare"  # in each folder that this script made and may write over: its path
SET_HERE = {"seed", "device", "out_dir", "init_from", "overwrite", "resume", "export_dir"}
BAR = re.compile(r"[^|]*\|[^|]*\| *(\d+)/(\d+) \[[^]]*\]")  # tqdm's: name: 5%|# | 5/99 [...]


@dataclass
class CompareConfig:
    base: str = "config/tiny_base.py"   # config file of the base
    tune: str = "config/tiny_tune.py"   # config file of both arms
    train: str = ""                     # more settings of both arms: "--max_steps=600 --lr=1e-3"
    seed: int = 42                      # of the batches, the masks and every initial weight
    limit: int = 0                      # ask the first test questions only; 0: all
    device: str = "auto"                # cpu, cuda, mps; auto takes a GPU if there is one
    out_dir: str = "out/compare"        # base/, plain/, jepa/ and summary.json go here


def main(cfg: CompareConfig):
    began, out, (tune, options) = time.perf_counter(), Path(cfg.out_dir), settings_of_arms(cfg)
    n_at_once = 2 if pick_device(cfg.device).type == "cpu" else 1
    check_folders(out)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        prepare_folders(out)
        run_arms(cfg, out, tune, options, n_at_once)
        summary = {**summarize(out, tune), "seed": cfg.seed, "lambda_jepa": tune.lambda_jepa,
                   "diffusion_t": tune.diffusion_t,
                   "seconds": round(time.perf_counter() - began, 1)}
        write_json(out / "summary.json", summary)
    print_summary(summary)


def settings_of_arms(cfg: CompareConfig):
    """Return the arms' settings and the options of --train, which they have beside cfg.tune.

    Raises ValueError, one sentence, for a mistake in a config before any run.
    """
    options = split_options("train", cfg.train, SET_HERE)
    configure(TrainConfig, [f"--seed={cfg.seed}"])
    base, tune = (settings_of(path, more) for path, more in ((cfg.base, []), (cfg.tune, options)))
    for path, own in ((cfg.base, base), (cfg.tune, tune)):
        if own.resume or own.export_dir:
            raise ValueError(f"{path} sets resume or export_dir, which is for a run by itself")
    if not tune.lambda_jepa:
        raise ValueError("lambda_jepa=0 makes both arms the same; choose one above 0")
    return tune, options


def settings_of(path: str, options: list[str]) -> TrainConfig:
    """Return the settings of a config file. Raises ValueError that names it."""
    try:
        return configure(TrainConfig, [path, *options])
    except ValueError as error:
        raise ValueError(f"{error} ({' '.join([path, *options])})") from None


def run_arms(cfg: CompareConfig, out: Path, tune: TrainConfig, options: list[str], n_at_once: int):
    """Train the base, then both arms, and score all three."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # run_all ends its runs

    def train(name, *settings):
        return name, ["train.py", *settings, f"--seed={cfg.seed}", f"--device={cfg.device}",
                      "--overwrite", f"--out_dir={out / name}"]

    def score(name):
        return name, ["eval_gsm8k.py", f"--init_from={out / name}", f"--task={tune.task}",
                      f"--data_dir={tune.data_dir}", f"--variant={tune.variant}",
                      f"--chat={tune.chat}",
                      f"--device={cfg.device}", f"--limit={cfg.limit}", "--n_shot=0"]

    arm = [cfg.tune, *options, f"--init_from={out / 'base'}"]
    run_all([train("base", cfg.base)], 1)
    run_all([train("plain", *arm, "--lambda_jepa=0"), train("jepa", *arm)], n_at_once)
    print(f"scoring {', '.join(ARMS)} on unseen questions", flush=True)
    run_all([score(name) for name in ARMS], n_at_once)


def check_folders(out: Path):
    """Raise ValueError unless each arm's folder is new, empty, or this script made it here: a copy
    or a link may be all that is left of another comparison."""
    summary = out / "summary.json"
    if summary.exists() and "jepa_minus_plain" not in read_json(summary):
        raise ValueError(f"{summary} was not made by compare.py; choose another --out_dir")
    for folder in (out / name for name in ARMS):
        if not os.path.lexists(folder):
            continue
        if folder.is_symlink() or not folder.is_dir():
            raise ValueError(f"{folder} is no folder of its own; choose another --out_dir")
        marker = folder / MARKER
        said = marker.read_text(errors="replace") if marker.is_file() else None
        if any(folder.iterdir()) and said not in ("", os.path.realpath(folder)):
            made = f"was made as {said}" if said else "was not made by compare.py"
            raise ValueError(f"{folder} {made}; choose another --out_dir")


def prepare_folders(out: Path):
    """Make the arms' folders, or remove old answers from those that an earlier comparison made."""
    check_folders(out)
    for folder in (out / name for name in ARMS):
        folder.mkdir(exist_ok=True)
        write_text(folder / MARKER, os.path.realpath(folder))
        for old in folder.glob("eval_*.json*"):
            if old.is_file():
                old.unlink()  # train.py --overwrite replaces the rest


# ----------------------------------------------------------------------------------------------
# processes


def run_all(jobs, n_at_once: int):
    """Run (arm, command) jobs, n_at_once at a time, each with its share of the cores.

    Raises ValueError when one fails, after ending the others.
    """
    children, threads = [], max(1, (os.cpu_count() or 1) // n_at_once)
    try:
        for position, (arm, command) in enumerate(jobs[:n_at_once]):
            children.append(Child(arm, command, threads, position))
        while any([child.is_running() for child in children]):
            time.sleep(0.2)
    finally:
        for child in children:
            child.process.terminate()
        for child in reversed(children):  # the first bar last: it puts the cursor back
            child.close()
    if jobs[n_at_once:]:
        run_all(jobs[n_at_once:], n_at_once)


class Child:
    """A process; its lines are shown after the arm's name, above a bar that copies its own."""

    def __init__(self, arm: str, command: list[str], threads: int, position: int):
        self.arm, self.script, self.said = arm, command[0], "it printed nothing"
        self.bar = tqdm(desc=f"{arm:5}", position=position, leave=False,
                        disable=None)  # None: no bar unless stderr is a terminal
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / self.script), *command[1:]], env=env, text=True,
            errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.reader = Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:  # a carriage return ends a line, too
            if drawn := BAR.match(line):
                self.bar.n, self.bar.total = map(int, drawn.groups())
                self.bar.refresh()
                line = line[drawn.end():]
            if line.strip():
                self.said = line.rstrip()
                if self.script != "eval_gsm8k.py":  # all scores come in one table at the end
                    self.show(self.said)

    def show(self, line: str):
        try:
            tqdm.write(printable(f"{self.arm:5} | {line}"))
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has closed the pipe: end the run, and so all
            self.process.terminate()

    def is_running(self) -> bool:
        """Return whether the process runs. Raises ValueError if it has failed."""
        code = self.process.poll()
        if code:
            self.reader.join(timeout=5)
            raise ValueError(f"{self.script} of {self.arm} ended with exit code {code}: "
                             f"{self.said}")
        return code is None

    def close(self):
        try:
            self.process.wait(timeout=60)  # train.py saves a checkpoint before it ends
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.reader.join(timeout=5)
        self.bar.close()


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


def print_summary(summary: dict):
    arms = summary["arms"]
    rates = [f"t = {t}" for t in arms["base"]["held_out_loss"]]
    table = [["", "accuracy %", "+-", *rates, "base corpus", "seconds", "ms/step"]]
    for name, arm in arms.items():
        losses = [f"{loss:.3f}" for loss in arm["held_out_loss"].values()]
        corpus = arm["base_corpus_loss"]
        table.append([name, f"{100 * arm['accuracy']:.1f}", f"{100 * arm['stderr']:.1f}", *losses,
                      f"{statistics.mean(corpus.values()):.3f}" if corpus else "n/a",
                      f"{arm['seconds']:.0f}", f"{arm['ms_per_step']:.1f}"])
    print("\nheld-out losses at masking rate t, and on the base's corpus (mean over t); +- is one\n"
          "standard error over questions")
    print_table(table)
    print(f"\n{in_words(summary['jepa_minus_plain'], 'plain', 'jepa')}\n"
          f"seed {summary['seed']}, step time {summary['step_time_ratio']:.2f} x, "
          f"{summary['seconds']:.0f} s in all; on a CPU each arm has half of the cores")


if __name__ == "__main__":
    run(main, CompareConfig)
