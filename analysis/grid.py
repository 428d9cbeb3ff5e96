"""Train and score a grid: seeds x (lambda, depth) x arms of several configs, and print its tables.

    python analysis/grid.py --configs=config/llada8b_gsm8k.py,config/llada8b_nl_rx.py \\
        --lambdas=0.5,1,2 --depths=1,2,3,4,5 --processes=8

Each run is one train.py, then one eval_gsm8k.py for each split and number of shots. Of several
(lambda, depth) the arm jepa takes the best on validation, a slice of train. Only then come test
scores, and the other arms with the same pair. A score is a line of out_dir/results.jsonl. The same
command again does only what is missing, and goes on with a training that was cut short. The output
of a run is in its folder: train.txt, and a .txt beside each .jsonl.
"""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import configure, printable, run  # first: it sets variables that torch reads

from tqdm import tqdm

from analysis.arms import ARMS
from analysis.checks import (base_of_arm, check_alike, check_log_line, records_of_result,
                             split_options)
from analysis.frames import choose, frame_of, key_of, read_lines, read_results
from analysis.tables import render
from eval_gsm8k import EvalConfig
from pretrained.weights import find_weights
from tasks.files import lock, read_json
from train import TrainConfig
from training.log import git_commit

# options that the grid gives to each run, and that would make all runs one
SET_HERE = {"train": {"seed", "out_dir", "resume", "overwrite", "export_dir"},
            "evaluate": {"init_from", "task", "split", "n_shot", "out", "compare", "seeds"}}
MOST_PROCESSES = 1024   # a slip is answered at once, and not by a full machine
SPLITS = "validation", "test"
PAUSE = 0.1             # seconds between two looks at the processes


@dataclass
class GridConfig:
    configs: tuple[str, ...] = ()       # config files of train.py, separated by commas
    arms: tuple[str, ...] = ("plain", "jepa")   # keys of ARMS in analysis/arms.py
    seeds: tuple[int, ...] = (42, 123, 777)     # of training (paper)
    lambdas: tuple[float, ...] = ()     # weights of the JEPA term (paper: 0.5,1,2); empty: config's
    depths: tuple[int, ...] = ()        # of the predictor (paper: 1,2,3,4,5); empty: the config's
    bases: tuple[str, ...] = ()         # init_from of the seeds in turns; empty: the config's
    n_shots: tuple[int, ...] = (0, 4)   # solved examples before a question (paper)
    splits: tuple[str, ...] = SPLITS    # what is scored; a pair is chosen on validation anyway
    train: str = ""                     # more options of every train.py
    evaluate: str = ""                  # more options of every eval_gsm8k.py, such as --limit=200
    processes: int = 1                  # of each run, by torchrun
    jobs: int = 1                       # runs at a time; from 2 on each has one thread of the CPU
    out_dir: str = "out/grid"           # results.jsonl, and a folder for each run

    def __post_init__(self):
        for name in ("configs", "arms", "seeds", "n_shots", "splits"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; it takes one or more, separated by commas")
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"there is no arm {arm!r}; choose from {', '.join(ARMS)}")
        if unknown := [split for split in self.splits if split not in SPLITS]:
            raise ValueError(f"splits has {unknown[0]!r}; there are {', '.join(SPLITS)}")
        if len({Path(path).stem for path in self.configs}) < len(self.configs):
            raise ValueError(f"configs={','.join(self.configs)} has the same file name twice, and "
                             f"results go by that name; use two out_dirs")
        if max(len(self.lambdas), len(self.depths)) > 1 and "jepa" not in self.arms:
            raise ValueError("several lambdas or depths are chosen from by the arm jepa, which "
                             "arms lacks; add it, or give one of each")
        if min(self.n_shots) < 0:
            raise ValueError(f"n_shots={','.join(map(str, self.n_shots))} must not be negative")
        if not min(self.lambdas, default=1) > 0:
            raise ValueError(f"lambdas={self.lambdas} must lie above 0, which is plain's")
        for name in ("processes", "jobs"):
            if not 1 <= getattr(self, name) <= MOST_PROCESSES:
                raise ValueError(f"{name}={getattr(self, name)} must lie in 1..{MOST_PROCESSES}")
        if len({base_of_arm(base) for base in self.bases}) > 1:
            raise ValueError(f"bases={','.join(self.bases)} must have one folder and one name "
                             f"but for its seed, such as out/base_seed1,out/base_seed2")
        for name, set_here in SET_HERE.items():
            more = {"init_from"} if name == "train" and self.bases else set()
            split_options(name, getattr(self, name), set_here | more)


class Cell(NamedTuple):
    """One model of the grid."""
    key: dict                           # config, arm, lambda, depth, seed: of its results
    folder: Path
    train: list[str]                    # the command; empty: a base is scored untrained
    settings: TrainConfig               # the settings that the command gives


def main(cfg: GridConfig):
    for number in (signal.SIGINT, signal.SIGTERM):      # end as an exception, which ends the child
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    os.makedirs(cfg.out_dir, exist_ok=True)
    with lock(cfg.out_dir) as held:     # children inherit the lock: it holds while one is alive
        grid = Grid(cfg, held)
        work_through(cfg, grid)
    print(render(list(grid.lines.values())))
    if grid.failures:
        sys.exit(printable("failed; the same command tries again:\n" + "\n".join(grid.failures)))


def work_through(cfg: GridConfig, grid):
    """Train and validate what the arm jepa chooses from, then train and score all the rest."""
    trials, rest = {}, []               # {config: the cells that it chooses from}, cells to score
    for path in cfg.configs:
        own = configure(TrainConfig, [path, *shlex.split(cfg.train)])
        for base in cfg.bases:          # a mistake is told now, and not after the runs before it
            find_weights(base, own.revision)
        pairs = [(weight, depth) for weight in cfg.lambdas or [own.lambda_jepa]
                 for depth in cfg.depths or [own.n_pred_layer]]
        arms = cfg.arms
        if "test" in cfg.splits and (cfg.bases or own.init_from):
            rest += [cell_of(cfg, path, "base", pairs[0], seed)
                     for seed in cfg.seeds[:len(cfg.bases)] or [None]]
        if len(pairs) > 1:              # all other arms wait for the choice
            trials[path] = [cell_of(cfg, path, "jepa", pair, seed)
                            for seed in cfg.seeds for pair in pairs]
            arms = [arm for arm in cfg.arms if arm == "plain"]
        rest += [cell_of(cfg, path, arm, pairs[0], seed) for seed in cfg.seeds for arm in arms]
    every_trial = sum(trials.values(), [])
    grid.check(every_trial + rest)
    grid.work(every_trial, ["validation"], "choosing")

    for path, cells in trials.items():
        missing = sum(len(grid.todo(cell, ["validation"])) for cell in cells)
        if missing:
            grid.failures.append(f"{path}: no (lambda, depth) is chosen while {missing} of its "
                                 f"scores on validation are missing")
            continue
        known = [line for cell in cells for line in grid.known(cell)
                 if line["n_shot"] in cfg.n_shots]
        pair = choose(frame_of(known), Path(path).stem)
        rest += [cell_of(cfg, path, arm, pair, seed) for seed in cfg.seeds
                 for arm in cfg.arms if arm != "plain"]
    grid.check(rest)
    grid.work(rest, cfg.splits, "scoring")


def cell_of(cfg: GridConfig, path: str, arm: str, pair: tuple, seed=None) -> Cell:
    """Make the cell of an arm at a (lambda, depth), unless the arm sets these itself.

    Of `bases` the seeds take one each, in the order of both lists, and begin again when they are
    through. Raises ValueError, one sentence, for settings that train.py would refuse.
    """
    options = [path, *shlex.split(cfg.train)]
    if cfg.bases:
        options.append(f"--init_from={cfg.bases[cfg.seeds.index(seed) % len(cfg.bases)]}")
    own = configure(TrainConfig, options)
    if own.resume or own.overwrite or own.export_dir:
        raise ValueError(f"{path} sets resume, overwrite or export_dir, which is for a run by "
                         f"itself; leave it out")
    more = {"a_third_more_steps": own.max_steps * 4 // 3,
            "a_third_more_epochs": own.epochs * 4 / 3}
    changes = ARMS[arm].options.format(**vars(own), **more).split() if arm in ARMS else []
    at_pair = [f"--lambda_jepa={pair[0]}", f"--n_pred_layer={pair[1]}"]
    own = configure(TrainConfig, [*options, *at_pair, *changes])
    weight, depth = (own.lambda_jepa, own.n_pred_layer) if own.lambda_jepa else (0.0, 0)
    if arm == "jepa" and not weight:
        raise ValueError(f"{path} has lambda_jepa=0, which is the arm plain; --lambdas=1 would fit")
    if arm == "base":
        weight, depth, name = 0.0, 0, arm + f"_seed{seed}" * bool(cfg.bases)
    else:
        name = arm + f"_lambda{weight}_depth{depth}" * bool(weight) + f"_seed{seed}"
        changes.append(f"--seed={seed}")
    folder = Path(cfg.out_dir) / Path(path).stem / name
    options += [*at_pair * bool(weight), *changes, f"--out_dir={folder}"]
    key = {"config": Path(path).stem, "arm": arm, "lambda": weight, "depth": depth, "seed": seed}
    return Cell(key, folder, ["train.py", *options] * (arm != "base"),
                configure(TrainConfig, options))


def end_last_line(path: Path):
    """Drop half a line, which a kill may have left; end a whole one, which an editor may have."""
    data = path.read_bytes()
    half = data[data.rfind(b"\n") + 1:]
    if not half:
        return
    try:
        json.loads(half)
        with open(path, "ab") as file:
            file.write(b"\n")
    except ValueError:
        os.truncate(path, len(data) - len(half))


class Grid:
    """Hold the results in out_dir, and add to them by running what is missing."""

    def __init__(self, cfg: GridConfig, lock):
        self.cfg, self.lock, self.path = cfg, lock, Path(cfg.out_dir) / "results.jsonl"
        self.failures = []
        self.lines = {}                 # {key: line} of results.jsonl
        if self.path.exists():
            self.lines = {key_of(line): line for line in read_results([self.path])}

    def check(self, cells: list[Cell]):
        """Raise ValueError if results of a cell were made in another way, or those of its arm with
        other seeds, or if eval_gsm8k.py would refuse its options."""
        records = [record for line in self.lines.values()
                   for record in records_of_result(line, self.path)]
        for cell in cells:
            for n_shot in self.cfg.n_shots:
                configure(EvalConfig, self.eval_command(cell, "test", n_shot)[1:])
                records += [record for split in SPLITS for record
                            in records_of_result(self.about(cell, split, n_shot), "this command")]
            other = f"choose another --out_dir, or remove {cell.folder} and its lines"
            if cell.train and (self.known(cell) or is_begun(cell)):
                before = as_json(TrainConfig()) | read_json(cell.folder / "settings.json")
                for name, value in as_json(cell.settings).items():
                    if name != "resume" and before[name] != value:
                        raise ValueError(f"{cell.folder} was trained with {name}={before[name]!r}, "
                                         f"not {value!r}; {other}")
            for line in self.known(cell):
                command = as_typed(self.eval_command(cell, line["split"], line["n_shot"]))
                if line.get("command") != command:
                    raise ValueError(f"{cell.folder} was scored by `{line.get('command')}`, not by "
                                     f"`{command}`; {other}")
        check_alike(records)
        if self.path.exists():
            end_last_line(self.path)

    def known(self, cell: Cell) -> list[dict]:
        return [line for line in self.lines.values() if cell.key.items() <= line.items()]

    def todo(self, cell: Cell, splits: list[str]) -> list[tuple[str, int]]:
        """Return the (split, n_shot) that have no score yet."""
        splits = ["test"] if cell.key["arm"] == "base" else splits
        done = [(line["split"], line["n_shot"]) for line in self.known(cell)]
        return [(split, n_shot) for split in splits for n_shot in self.cfg.n_shots
                if (split, n_shot) not in done]

    def work(self, cells: list[Cell], splits, title: str):
        """Train cells and score them on splits, as far as that is not done, `jobs` at a time.

        They go seed by seed, so that a study that is broken off has all arms of the first seeds.
        """
        seeds = [None, *self.cfg.seeds]
        cells = sorted(cells, key=lambda cell: seeds.index(cell.key["seed"]))
        cells = {cell.folder: cell for cell in cells if self.todo(cell, splits)}    # each once
        waiting = [self.steps(cell, splits) for cell in cells.values()]
        running = {}                    # {steps of a cell: the process that they wait for}
        with tqdm(total=len(cells), desc=title, unit="run", disable=not cells) as bar:
            try:
                while waiting or running:
                    while waiting and len(running) < self.cfg.jobs:
                        running[waiting.pop(0)] = None
                    for steps, child in list(running.items()):
                        if child and child.poll() is None:
                            continue
                        running[steps] = next(steps, None)
                        if not running[steps]:
                            del running[steps]
                            bar.update()
                    time.sleep(PAUSE)
            finally:                    # after Ctrl-C, too
                children = [child for child in running.values() if child]
                for child in children:
                    child.terminate()
                for child in children:
                    child.wait()        # train.py saves its state first

    def steps(self, cell: Cell, splits):
        """Train a cell and score it on splits. Yields each process; go on when it has ended."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        if cell.train and not self.known(cell):         # --resume ends at once if all is trained
            command = [*cell.train, *["--resume"] * is_begun(cell)]
            if (yield from self.has_failed(command, cell.folder / "train.txt")):
                return
        for split, n_shot in self.todo(cell, splits):
            yield from self.score(cell, split, n_shot)

    def score(self, cell: Cell, split: str, n_shot: int):
        """Run the evaluation and append its result to the file. Yields the process."""
        out, began = cell.folder / f"{split}_{n_shot}shot.jsonl", time.perf_counter()
        command = self.eval_command(cell, split, n_shot)
        if (yield from self.has_failed(command, out.with_suffix(".txt"))):
            return
        scores = read_json(out.with_suffix(".json"))
        line = {**self.about(cell, split, n_shot),
                "metrics": {key: value for key, value in scores.items() if key != "settings"},
                "held_out": held_out(cell.folder), "revision": git_commit(),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - began, 1),
                "answers": str(out.relative_to(self.cfg.out_dir))}
        with open(self.path, "ab", buffering=0) as file:    # one write: the whole line or nothing
            file.write(json.dumps(line).encode() + b"\n")
            os.fsync(file.fileno())
        self.lines[key_of(line)] = line | {"answers": str(out)}     # as read_results has it

    def about(self, cell: Cell, split: str, n_shot: int) -> dict:
        """Return the part of a result that is known before it is made."""
        own = cell.settings
        return {**cell.key, "t_ctx": own.t_ctx, "t_tgt": own.t_tgt, "split": split,
                "n_shot": n_shot, "task": own.task, "init_from": own.init_from,
                "train": as_typed(cell.train) if cell.train else "",
                "command": as_typed(self.eval_command(cell, split, n_shot))}

    def eval_command(self, cell: Cell, split: str, n_shot: int) -> list[str]:
        own = cell.settings
        return ["eval_gsm8k.py", f"--init_from={cell.folder if cell.train else own.init_from}",
                f"--revision={'' if cell.train else own.revision}", f"--task={own.task}",
                f"--data_dir={own.data_dir}", f"--variant={own.variant}", f"--chat={own.chat}",
                f"--device={own.device}", *shlex.split(self.cfg.evaluate), f"--split={split}",
                f"--n_shot={n_shot}", f"--out={cell.folder}/{split}_{n_shot}shot.jsonl"]

    def has_failed(self, command: list[str], output: Path):
        """Start a command and yield its process. When that has ended, note and return a failure."""
        child = self.launch(command, output)
        yield child
        if child.returncode:
            last = output.read_text(errors="replace").strip().splitlines()[-1:]
            self.failures.append(f"{as_typed(command)}\n    exit code {child.returncode}; {output} "
                                 f"ends with: {''.join(last)}")
        return bool(child.returncode)

    def launch(self, command: list[str], output: Path):
        """Start a command; it holds the lock as long as it runs."""
        n, start, environment = self.cfg.processes, [sys.executable], dict(os.environ)
        if self.cfg.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", "1")
        if n > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        with open(output, "a") as file:
            return subprocess.Popen([*start, str(ROOT / command[0]), *command[1:]],
                                    stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                    env=environment,
                                    pass_fds=(self.lock.fileno(),))


def as_json(settings: TrainConfig) -> dict:
    """Return settings as settings.json has them: tuples are lists."""
    return json.loads(json.dumps(asdict(settings)))


def is_begun(cell: Cell) -> bool:
    return any(cell.folder.glob("step_*/config.json"))


def held_out(folder: Path) -> dict:
    """Read {task: {t: [loss before training, loss after]}} from the log; {} for a base."""
    path = folder / "log.jsonl"
    lines = read_lines(path, "a line of train.py's log", check_log_line) if path.exists() else []
    found = [line["held_out"] for line, _ in lines if "held_out" in line]
    first, last = (found[0], found[-1]) if found else ({}, {})
    return {task: {t: [loss, last[task][t]] for t, loss in losses.items()
                   if t in last.get(task, {})} for task, losses in first.items()}


def as_typed(command: list[str]) -> str:
    return shlex.join(["python", *command])


if __name__ == "__main__":
    run(main, GridConfig)
