"""Seeds x (lambda, depth) x arms of a list of configs: trained, scored, chosen and set in tables.

    python analysis/grid.py --configs=config/llada8b_gsm8k.py,config/llada8b_nl_rx.py \\
        --lambdas=0.5,1,2 --depths=1,2,3,4,5 --processes=8 \\
        --evaluate="--gen_length=256 --block_length=256 --steps=128"

Each run is a train.py of its own, then an evaluate.py for each split and number of shots. JEPA's
(lambda, depth) is the pair with the best mean accuracy on validation, which is cut from train; its
test scores, and the other arms at that pair, come after the choice. Each score is a line of
out_dir/results.jsonl. The same command again does what is missing: a line that is there is not made
anew, a training that was cut short goes on from its checkpoint. What each run said lies in its
folder, as train.txt and, beside the answers, as .txt.
"""
import fcntl
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # a script in a folder: the modules lie one above

import torch
from tqdm import tqdm

from analysis.tables import choose, key_of, read_results, render
from configurator import configure, run
from model import pick_device
from train import TrainConfig, git_commit
from weights import newest_checkpoint, read_json

ARMS = {            # what an arm changes of its config, whose own settings stand in braces
    "plain": "--lambda_jepa=0",
    "jepa": "",
    "symmetric": "--t_tgt={t_ctx}",     # figure 3; which of the two rates it has is not stated
    "no_predictor": "--n_pred_layer=0",
    "rates_0.1_0.5": "--t_ctx=0.1 --t_tgt=0.5",     # the appendix's, beside (0.2, 0.7)
    "rates_0.2_0.5": "--t_ctx=0.2 --t_tgt=0.5",
    "rates_0.3_0.9": "--t_ctx=0.3 --t_tgt=0.9",
}


@dataclass
class GridConfig:
    configs: tuple[str, ...] = ()       # of train.py, one or more, with commas between
    arms: tuple[str, ...] = ("plain", "jepa")   # names from ARMS, in analysis/grid.py
    seeds: tuple[int, ...] = (42, 123, 777)     # of training (paper)
    lambdas: tuple[float, ...] = ()     # of JEPA's term (paper: 0.5,1,2); empty: the config's
    depths: tuple[int, ...] = ()        # of its predictor (paper: 1,2,3,4,5); empty: the config's
    n_shots: tuple[int, ...] = (0, 4)   # solved examples before a question (paper)
    all_on_test: bool = False           # test scores of every (lambda, depth), not the chosen alone
    train: str = ""                     # more options for every train.py
    evaluate: str = ""                  # more options for every evaluate.py: lengths, limit ...
    workers: int = 1                    # runs at a time; each has a GPU, or its share of the cores
    processes: int = 1                  # of each run, by torchrun
    out_dir: str = "out/grid"           # a folder a run, and results.jsonl

    def __post_init__(self):
        for name in ("configs", "arms", "seeds", "n_shots"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; it takes one or more, with commas between")
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"there is no arm {arm!r}; choose from {', '.join(ARMS)}")
        if len({Path(path).stem for path in self.configs}) < len(self.configs):
            raise ValueError("two configs have the same name, and so would their results; rename "
                             "one, or run them into two out_dirs")
        if min(self.workers, self.processes) < 1 or not min(self.lambdas, default=1) > 0:
            raise ValueError(f"workers={self.workers} and processes={self.processes} must be at "
                             f"least 1, and lambdas={self.lambdas} above 0: plain is the arm of 0")


class Cell(NamedTuple):
    """A model: what names it in results.jsonl, its folder, how it is trained (base: it is not)."""
    key: dict                           # config, arm, lambda, depth, seed
    folder: Path
    options: list                       # of train.py
    settings: TrainConfig               # what they come to


def main(cfg: GridConfig):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that it ends what it began
    own = {path: cell_of(cfg, path, "jepa", None, cfg.seeds[0]).settings for path in cfg.configs}
    pairs = {path: [(weight, depth) for weight in cfg.lambdas or [own[path].lambda_jepa]
                    for depth in cfg.depths or [own[path].n_pred_layer]] for path in cfg.configs}
    os.makedirs(cfg.out_dir, exist_ok=True)
    grid = Grid(cfg, next(iter(own.values())))
    first, second = [], []
    for path in cfg.configs:
        tests = ("validation", "test") if cfg.all_on_test or len(pairs[path]) == 1 else (
            "validation",)
        if own[path].init_from:
            first.append((cell_of(cfg, path, "base"), ("test",)))
        for seed in cfg.seeds:
            if "plain" in cfg.arms:
                first.append((cell_of(cfg, path, "plain", None, seed), ("validation", "test")))
            if "jepa" in cfg.arms:
                first += [(cell_of(cfg, path, "jepa", pair, seed), tests) for pair in pairs[path]]
    grid.work(first, "train, validate")

    for path in cfg.configs:
        asked = [key_of(cell_of(cfg, path, "jepa", pair, seed).key | {
            "split": "validation", "n_shot": n_shot})
            for pair in pairs[path] for seed in cfg.seeds for n_shot in cfg.n_shots]
        found = [grid.lines[key] for key in asked if key in grid.lines]
        others = [arm for arm in cfg.arms if arm != "plain"]
        if len(pairs[path]) > 1 and len(found) < len(asked) and others:
            grid.failures.append(f"{path}: no (lambda, depth) is chosen, for {len(asked) - len(found)}"
                                 f" of {len(asked)} validation scores of jepa are missing")
            continue
        pair = choose(found, Path(path).stem) if len(pairs[path]) > 1 else pairs[path][0]
        second += [(cell_of(cfg, path, arm, pair, seed), ("validation", "test"))
                   for seed in cfg.seeds for arm in others]
    grid.work(second, "test, ablate")

    print(render(list(grid.lines.values()), cfg.out_dir))
    if grid.failures:
        sys.exit(f"{len(grid.failures)} did not end well; the same command tries them again:\n"
                 + "\n".join(grid.failures))


def cell_of(cfg: GridConfig, path: str, arm: str, pair=None, seed=None) -> Cell:
    """pair: (lambda, depth), or None for the config's own; an arm's options have the last word.

    Raises ValueError or FileNotFoundError, one sentence, for what train.py would not take.
    """
    options = [path, *shlex.split(cfg.train)]
    own = configure(TrainConfig, options)
    if own.compare:
        raise ValueError(f"{path} trains a base of its own by `compare`; train that one first, "
                         f"then --train='--compare= --init_from=out/tiny/base' would fit")
    if pair:
        options += [f"--lambda_jepa={pair[0]}", f"--n_pred_layer={pair[1]}"]
    name = arm
    if arm != "base":
        options += [*ARMS[arm].format(**vars(own)).split(), f"--seed={seed}"]
        own = configure(TrainConfig, options)
        name += f"_lambda{own.lambda_jepa}_depth{own.n_pred_layer}" * (own.lambda_jepa > 0)
        name += f"_seed{seed}"
    has_term = arm != "base" and own.lambda_jepa > 0
    key = {"config": Path(path).stem, "arm": arm, "lambda": own.lambda_jepa * has_term,
           "depth": own.n_pred_layer * has_term, "seed": seed}
    folder = Path(cfg.out_dir) / key["config"] / name
    options += [f"--out_dir={folder}"]
    return Cell(key, folder, options, configure(TrainConfig, options))


class Grid:
    """Runs jobs, so many at a time, and keeps the lines; ends its processes when it ends."""

    def __init__(self, cfg: GridConfig, own: TrainConfig):
        self.cfg, self.path = cfg, Path(cfg.out_dir) / "results.jsonl"
        # children inherit the lock: what a killed grid has left behind keeps a second one out
        self.lock_file = open(Path(cfg.out_dir) / "lock", "w")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another grid, or a run that one has left behind, is at work in "
                             f"{cfg.out_dir}; wait for it, or end it") from None
        self.lines, self.failures = {}, []
        if self.path.exists():
            text = self.path.read_bytes()
            os.truncate(self.path, text.rfind(b"\n") + 1)       # a line that a kill has cut short
            self.lines = {key_of(line): line for line in read_results(self.path)}
        self.mutex, self.children, self.is_stopping = threading.Lock(), set(), False
        self.places = queue.SimpleQueue()
        threads = max(1, (os.cpu_count() or 1) // (cfg.workers * cfg.processes))
        n_gpus = torch.cuda.device_count() if pick_device(own.device).type == "cuda" else 0
        if n_gpus and cfg.processes > 1 and cfg.workers * cfg.processes > n_gpus:
            raise ValueError(f"workers={cfg.workers} of processes={cfg.processes} need as many "
                             f"GPUs, and there are {n_gpus}")
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = gpus if n_gpus and len(gpus) >= n_gpus > 1 else [str(i) for i in range(n_gpus)]
        for worker in range(cfg.workers):
            env = {"OMP_NUM_THREADS": str(threads), **os.environ}
            if len(gpus) > 1:           # more workers than GPUs share them
                mine = [gpus[(worker * cfg.processes + i) % len(gpus)] for i in range(cfg.processes)]
                env["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
            self.places.put(env)

    def work(self, jobs: list, what: str):
        """jobs: (cell, splits to score it on). A failure is noted, and the others go on."""
        jobs = [(cell, todo) for cell, splits in jobs if (todo := self.missing(cell, splits))]
        pool = ThreadPoolExecutor(self.cfg.workers)
        try:
            futures = [pool.submit(self.do, cell, todo) for cell, todo in jobs]
            for future in tqdm(as_completed(futures), what, len(jobs), unit="run", disable=not jobs):
                future.result()
        except BaseException as error:          # Ctrl-C, SIGTERM, or a mistake of ours
            with self.mutex:
                self.is_stopping = True
                for child in self.children:
                    child.terminate()           # train.py saves where it is
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                sys.exit(130)
            raise
        pool.shutdown()

    def missing(self, cell: Cell, splits) -> list:
        """[(split, n_shot), ...]. Raises ValueError if what is there was made in another way."""
        known = self.known(cell)
        other = f"choose another --out_dir, or remove {cell.folder} and its lines in {self.path}"
        if cell.key["arm"] != "base" and (known or has_checkpoint(cell.folder)):
            before = read_json(cell.folder / "settings.json")
            for name, value in json.loads(json.dumps(asdict(cell.settings))).items():
                was = before.get(name, getattr(TrainConfig, name))
                if name != "resume" and was != value:
                    raise ValueError(f"{cell.folder} was trained with {name}={was!r}, not "
                                     f"{value!r}; {other}")
        for line in known:
            command = in_words(self.command(cell, line["split"], line["n_shot"]))
            if line["command"] != command:
                raise ValueError(f"{cell.folder} was scored by `{line['command']}`, not by "
                                 f"`{command}`; {other}")
        done = [(line["split"], line["n_shot"]) for line in known]
        return [(split, n_shot) for split in splits for n_shot in self.cfg.n_shots
                if (split, n_shot) not in done]

    def known(self, cell: Cell) -> list[dict]:
        with self.mutex:
            return [line for line in self.lines.values() if cell.key.items() <= line.items()]

    def command(self, cell: Cell, split: str, n_shot: int) -> list[str]:
        own, is_base = cell.settings, cell.key["arm"] == "base"
        return ["evaluate.py", f"--init_from={own.init_from if is_base else cell.folder}",
                f"--revision={own.revision * is_base}", f"--task={own.task}",
                f"--data_dir={own.data_dir}", f"--variant={own.variant}", f"--chat={own.chat}",
                f"--device={own.device}", *shlex.split(self.cfg.evaluate), f"--split={split}",
                f"--n_shot={n_shot}", f"--out={cell.folder}/{split}_{n_shot}shot.jsonl"]

    def do(self, cell: Cell, todo: list):
        env = self.places.get()
        try:
            cell.folder.mkdir(parents=True, exist_ok=True)
            train = ["train.py", *cell.options]
            if cell.key["arm"] != "base" and not self.known(cell):
                resume = ["--resume"] * has_checkpoint(cell.folder)     # a complete one ends at once
                if not self.ends_well([*train, *resume], cell.folder / "train.txt", env):
                    return
            for split, n_shot in todo:
                answers, began = cell.folder / f"{split}_{n_shot}shot.jsonl", time.perf_counter()
                command = self.command(cell, split, n_shot)
                if self.ends_well(command, answers.with_suffix(".txt"), env):
                    scores = read_json(answers.with_suffix(".json"))
                    self.add({**cell.key, "split": split, "n_shot": n_shot,
                              "task": cell.settings.task, "init_from": cell.settings.init_from,
                              "metrics": {key: scores[key] for key in scores if key != "settings"},
                              "train": in_words(train), "command": in_words(command),
                              "revision": git_commit(),
                              "seconds": round(time.perf_counter() - began, 1),
                              "answers": str(answers.relative_to(self.cfg.out_dir))})
        finally:
            self.places.put(env)

    def ends_well(self, command: list[str], said: Path, env: dict) -> bool:
        """Runs a script, what it says goes to a file; notes its last line if it fails."""
        start = [sys.executable]
        if self.cfg.processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone",
                      f"--nproc_per_node={self.cfg.processes}"]
        with open(said, "a") as file:
            with self.mutex:
                if self.is_stopping:
                    return False
                child = subprocess.Popen([*start, str(ROOT / command[0]), *command[1:]], env=env,
                                         stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                                         pass_fds=[self.lock_file.fileno()])
                self.children.add(child)
        code = child.wait()
        with self.mutex:
            self.children.remove(child)
            if code and not self.is_stopping:
                last = said.read_text(errors="replace").strip().splitlines()[-1:]
                self.failures.append(f"{in_words(command)}\n    exit code {code}; {said} ends with: "
                                     + "".join(last))
        return code == 0

    def add(self, line: dict):
        """One write, so that a kill leaves a line or none; and at once on the disk."""
        with self.mutex:
            with open(self.path, "ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")
                os.fsync(file.fileno())
            self.lines[key_of(line)] = line


def has_checkpoint(folder: Path) -> bool:
    try:
        return bool(newest_checkpoint(folder))
    except FileNotFoundError:
        return False


def in_words(command: list[str]) -> str:
    return shlex.join(["python", *command])


if __name__ == "__main__":
    run(main, GridConfig)
