"""Seeds x (lambda, depth) x arms of a list of configs: trained, chosen, scored, set in tables.

    python analysis/grid.py --configs=config/llada8b_gsm8k.py,config/llada8b_nl_rx.py \\
        --lambdas=0.5,1,2 --depths=1,2,3,4,5 --processes=8 \\
        --evaluate="--gen_length=256 --block_length=256 --steps=128"

Each run is a train.py, then an evaluate.py for each split and number of shots. Of several (lambda,
depth) the arm jepa takes the best on validation, a slice of train; only then come test scores, and
the other arms with the same pair. A score is a line of out_dir/results.jsonl. The same command
again does what is missing: a line that is there is not made anew, a training cut short goes on from
its checkpoint. What a run says is in its folder: train.txt, and a .txt beside each .jsonl.
"""
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # a script in a folder: the modules lie one above

import torch
from tqdm import tqdm

from analysis.tables import choose, key_of, read_results, render
from configurator import configure, run
from evaluate import EvalConfig
from tasks.files import read_json
from train import TrainConfig
from training.log import git_commit

ARMS = {            # what an arm changes of its config; in braces a setting of that
    "plain": "--lambda_jepa=0 --anchor=0",
    "jepa": "",
    "symmetric": "--t_tgt={t_ctx}",     # figure 3; which of the two rates it has is not stated
    "no_predictor": "--n_pred_layer=0",
    "rates_0.1_0.5": "--t_ctx=0.1 --t_tgt=0.5",     # the appendix's, beside (0.2, 0.7)
    "rates_0.2_0.5": "--t_ctx=0.2 --t_tgt=0.5",
    "rates_0.3_0.9": "--t_ctx=0.3 --t_tgt=0.9",
    # controls.py: what does the work?
    "same_mask": "--masks=nested --t_tgt={t_ctx}",
    "nested": "--masks=nested",
    "reversed": "--t_ctx={t_tgt} --t_tgt={t_ctx}",
    "online": "--target=online",
    "frozen": "--target=frozen",
    "shuffled": "--target=shuffled",
    "shuffled_no_predictor": "--target=shuffled --n_pred_layer=0",  # none that could ignore z_ctx
    "mean": "--target=mean",
    "random": "--target=random",
    "frozen_predictor": "--pred_lr=0",
    "consistency": "--objective=consistency",
    "two_gradients": "--objective=two_gradients",
    "plain_uniform": "--lambda_jepa=0 --anchor=0 --diffusion_t=uniform",
    "jepa_uniform": "--diffusion_t=uniform",
    "l2": "--lambda_jepa=0 --anchor=1e-4",
    "equal_flop": "--lambda_jepa=0 --anchor=0 --max_steps={a_third_more_steps} "
                  "--epochs={a_third_more_epochs}",
}


@dataclass
class GridConfig:
    configs: tuple[str, ...] = ()       # config files of train.py, with commas between
    arms: tuple[str, ...] = ("plain", "jepa")   # names from ARMS, in analysis/grid.py
    seeds: tuple[int, ...] = (42, 123, 777)     # of training (paper)
    lambdas: tuple[float, ...] = ()     # of JEPA's term (paper: 0.5,1,2); empty: the config's
    depths: tuple[int, ...] = ()        # of its predictor (paper: 1,2,3,4,5); empty: the config's
    n_shots: tuple[int, ...] = (0, 4)   # solved examples before a question (paper)
    all_on_test: bool = False           # test scores of every (lambda, depth), not the chosen alone
    train: str = ""                     # more options of every train.py
    evaluate: str = ""                  # more options of every evaluate.py: lengths, limit ...
    workers: int = 1                    # runs at a time; each has its GPUs, or share of the cores
    processes: int = 1                  # of each run, by torchrun
    out_dir: str = "out/grid"           # results.jsonl, and a folder a run

    def __post_init__(self):
        for name in ("configs", "arms", "seeds", "n_shots"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; it takes one or more, with commas between")
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"there is no arm {arm!r}; choose from {', '.join(ARMS)}")
        if len({Path(path).stem for path in self.configs}) < len(self.configs):
            raise ValueError(f"configs={','.join(self.configs)} has a name twice, and so would "
                             f"have its results; use two out_dirs")
        if max(len(self.lambdas), len(self.depths)) > 1 and "jepa" not in self.arms:
            raise ValueError("several lambdas or depths are chosen from by the arm jepa, which "
                             "arms lacks; add it, or give one of each")
        if min(self.workers, self.processes) < 1 or not min(self.lambdas, default=1) > 0:
            raise ValueError(f"workers={self.workers} and processes={self.processes} must be at "
                             f"least 1, and lambdas={self.lambdas} above 0, which is plain's")


class Cell(NamedTuple):
    key: dict                           # config, arm, lambda, depth, seed: of its lines
    folder: Path
    train: list[str]                    # the command; empty: a base is scored as it comes
    settings: TrainConfig               # what that comes to


def main(cfg: GridConfig):
    for number in (signal.SIGINT, signal.SIGTERM):      # so that it ends what it began
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    os.makedirs(cfg.out_dir, exist_ok=True)
    with open(Path(cfg.out_dir) / "lock", "w") as lock:
        try:                            # its processes hold it too: killed, it may leave some
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another grid, or a run that it left behind, is at work in "
                             f"{cfg.out_dir}; wait for it, or end it") from None
        grid = Grid(cfg, lock)
        work_through(cfg, grid)
    print(render(read_results([grid.path] * bool(grid.lines))))
    if grid.failures:
        sys.exit("failed, and tried again by the same command:\n" + "\n".join(grid.failures))


def work_through(cfg: GridConfig, grid):
    """Trains and validates what jepa chooses from, then trains and scores all the rest."""
    trials, rest = {}, []
    for path in cfg.configs:
        own = configure(TrainConfig, [path, *shlex.split(cfg.train)])
        pairs = [(weight, depth) for weight in cfg.lambdas or [own.lambda_jepa]
                 for depth in cfg.depths or [own.n_pred_layer]]
        trials[path] = [cell_of(cfg, path, "jepa", pair, seed) for seed in cfg.seeds
                        for pair in pairs] if len(pairs) > 1 else []
        rest += [(cell_of(cfg, path, "base", pairs[0]), ["test"])] * bool(own.init_from)
        rest += [(cell_of(cfg, path, arm, pairs[0], seed), ["validation", "test"])
                 for seed in cfg.seeds for arm in cfg.arms if arm == "plain" or len(pairs) == 1]
    splits = ["validation", "test"] if cfg.all_on_test else ["validation"]
    grid.check([cell for cells in trials.values() for cell in cells] + [cell for cell, _ in rest])
    grid.work([(cell, splits) for cells in trials.values() for cell in cells], "choosing")

    for path, cells in trials.items():
        pair = choose([line for cell in cells for line in grid.known(cell)
                       if line["n_shot"] in cfg.n_shots], Path(path).stem)
        missing = sum(len(grid.todo(cell, ["validation"])) for cell in cells)
        if missing:
            grid.failures.append(f"{path}: no (lambda, depth) is chosen, for scores on validation "
                                 f"are missing: {missing}")
        elif cells:
            rest += [(cell_of(cfg, path, arm, pair, seed), ["validation", "test"])
                     for seed in cfg.seeds for arm in cfg.arms if arm != "plain"]
    grid.check([cell for cell, _ in rest])
    grid.work(rest, "scoring")


def cell_of(cfg: GridConfig, path: str, arm: str, pair: tuple, seed=None) -> Cell:
    """pair: (lambda, depth), unless the arm sets them. Raises ValueError, one sentence."""
    options = [path, *shlex.split(cfg.train)]
    own = configure(TrainConfig, options)
    if own.compare:
        raise ValueError(f"{path} trains a base first; do that with train.py {own.compare}, and "
                         f"give it as --train='--compare= --init_from=out/tiny/base'")
    more = {"a_third_more_steps": own.max_steps * 4 // 3,
            "a_third_more_epochs": own.epochs * 4 / 3}
    changes = ARMS.get(arm, "").format(**vars(own), **more).split()
    at_pair = [f"--lambda_jepa={pair[0]}", f"--n_pred_layer={pair[1]}"]
    own = configure(TrainConfig, [*options, *at_pair, *changes])
    weight, depth = (own.lambda_jepa, own.n_pred_layer) if own.lambda_jepa else (0.0, 0)
    if arm == "jepa" and not weight:
        raise ValueError(f"{path} has lambda_jepa=0, which is the arm plain; --lambdas=1 would fit")
    if arm == "base":
        weight, depth, name = 0.0, 0, arm
    else:
        name = arm + f"_lambda{weight}_depth{depth}" * bool(weight) + f"_seed{seed}"
        changes += [f"--seed={seed}"]
    folder = Path(cfg.out_dir) / Path(path).stem / name
    options += [*at_pair * bool(weight), *changes, f"--out_dir={folder}"]
    key = {"config": Path(path).stem, "arm": arm, "lambda": weight, "depth": depth, "seed": seed}
    return Cell(key, folder, ["train.py", *options] * (arm != "base"),
                configure(TrainConfig, options))


class Grid:
    """Has the lines of out_dir, and adds to them by running what gives more."""

    def __init__(self, cfg: GridConfig, lock):
        self.cfg, self.lock, self.path = cfg, lock, Path(cfg.out_dir) / "results.jsonl"
        self.lines, self.failures = {}, []
        if self.path.exists():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)     # half a line
            self.lines = {key_of(line): line for line in read_results([self.path])}

    def check(self, cells: list[Cell]):
        """ValueError if what is there of a cell was made in another way, or evaluate.py would
        refuse its options."""
        for cell in cells:
            configure(EvalConfig, self.evaluate(cell, "test", self.cfg.n_shots[0])[1:])
            other = f"choose another --out_dir, or remove {cell.folder} and its lines"
            if cell.train and (self.known(cell) or is_begun(cell)):
                before = asdict(TrainConfig()) | read_json(cell.folder / "settings.json")
                for name, value in asdict(cell.settings).items():
                    was = tuple(before[name]) if type(value) is tuple else before[name]
                    if name != "resume" and was != value:
                        raise ValueError(f"{cell.folder} was trained with {name}={was!r}, not "
                                         f"{value!r}; {other}")
            for line in self.known(cell):
                command = in_words(self.evaluate(cell, line["split"], line["n_shot"]))
                if line["command"] != command:
                    raise ValueError(f"{cell.folder} was scored by `{line['command']}`, not by "
                                     f"`{command}`; {other}")

    def known(self, cell: Cell) -> list[dict]:
        return [line for line in self.lines.values() if cell.key.items() <= line.items()]

    def todo(self, cell: Cell, splits: list[str]) -> list[tuple[str, int]]:
        done = [(line["split"], line["n_shot"]) for line in self.known(cell)]
        return [(split, n_shot) for split in splits for n_shot in self.cfg.n_shots
                if (split, n_shot) not in done]

    def work(self, jobs: list, what: str):
        """jobs: (cell, splits to score it on). A process that fails is noted, the others go on."""
        jobs = {cell.folder: (cell, self.todo(cell, splits)) for cell, splits in jobs}
        jobs = [(cell, todo) for cell, todo in jobs.values() if todo]
        running = {}                    # worker: its job, and the process at work on it
        try:
            with tqdm(total=len(jobs), desc=what, unit="run", disable=not jobs) as bar:
                while jobs or running:
                    for worker in range(self.cfg.workers):
                        job, child = running.get(worker, (None, None))
                        if child and child.poll() is None or not (child or jobs):
                            continue
                        running.pop(worker, None)
                        job = job or self.job(worker, *jobs.pop(0))
                        child = next(job, None)
                        if child:
                            running[worker] = job, child
                        else:
                            bar.update()
                    time.sleep(0.05)
        finally:                        # Ctrl-C too
            for _, child in running.values():
                child.terminate()
            for _, child in running.values():
                child.wait()            # train.py saves where it is

    def job(self, worker: int, cell: Cell, todo: list):
        """Yields processes, each when the one before has ended, and adds a line for each score."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        commands = {}
        if cell.train and not self.known(cell):  # if complete, --resume ends at once
            commands["train"] = [*cell.train, *["--resume"] * is_begun(cell)]
        commands |= {score: self.evaluate(cell, *score) for score in todo}
        for score, command in commands.items():
            name = "train" if score == "train" else "{}_{}shot".format(*score)
            said, began = cell.folder / f"{name}.txt", time.perf_counter()
            yield (child := self.start(worker, command, said))
            if child.returncode:
                last = said.read_text(errors="replace").strip().splitlines()[-1:]
                self.failures.append(f"{in_words(command)}\n    exit code {child.returncode}; "
                                     f"{said} ends with: {''.join(last)}")
                if score == "train":
                    return
            elif score != "train":
                metrics = read_json(cell.folder / f"{name}.json")
                del metrics["settings"]
                own = cell.settings
                line = {**cell.key, "t_ctx": own.t_ctx, "t_tgt": own.t_tgt, "split": score[0],
                        "n_shot": score[1], "task": own.task, "init_from": own.init_from,
                        "metrics": metrics, "held_out": held_out(cell.folder),
                        "train": in_words(cell.train) * bool(cell.train),
                        "command": in_words(command), "revision": git_commit(),
                        "seconds": round(time.perf_counter() - began, 1),
                        "answers": f"{cell.key['config']}/{cell.folder.name}/{name}.jsonl"}
                with open(self.path, "ab", buffering=0) as file:    # one write: all of it or none
                    file.write(json.dumps(line).encode() + b"\n")
                    os.fsync(file.fileno())
                self.lines[key_of(line)] = line

    def evaluate(self, cell: Cell, split: str, n_shot: int) -> list[str]:
        own = cell.settings
        return ["evaluate.py", f"--init_from={cell.folder if cell.train else own.init_from}",
                f"--revision={'' if cell.train else own.revision}", f"--task={own.task}",
                f"--data_dir={own.data_dir}", f"--variant={own.variant}", f"--chat={own.chat}",
                f"--device={own.device}", *shlex.split(self.cfg.evaluate), f"--split={split}",
                f"--n_shot={n_shot}", f"--out={cell.folder}/{split}_{n_shot}shot.jsonl"]

    def start(self, worker: int, command: list[str], said: Path):
        n, start = self.cfg.processes, [sys.executable]
        if n > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        threads = max(1, (os.cpu_count() or 1) // (self.cfg.workers * n))
        env = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if torch.cuda.is_available():   # more workers than GPUs share them
            gpus = range(torch.cuda.device_count())
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, gpus))).split(",")
            mine = [gpus[(worker * n + i) % len(gpus)] for i in range(n)]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
        with open(said, "a") as file:
            return subprocess.Popen([*start, str(ROOT / command[0]), *command[1:]], env=env,
                                    stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                                    pass_fds=[self.lock.fileno()])


def is_begun(cell: Cell) -> bool:
    return any(cell.folder.glob("step_*/config.json"))


def held_out(folder: Path) -> dict:
    """{task: {t: [loss before training, loss after]}}, of the log."""
    path = folder / "log.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()    # a base
    found = [line["held_out"] for line in lines if "held_out" in line]
    return {task: {t: [loss, found[-1][task][t]] for t, loss in losses.items()}
            for task, losses in (found[0].items() if found else ())}


def in_words(command: list[str]) -> str:
    return shlex.join(["python", *command])


if __name__ == "__main__":
    run(main, GridConfig)
