"""What a run says while it trains: a progress bar, lines of text, and numbers in out_dir/log.jsonl.

What the keys of a line mean is in diagnostics.py; `ms` is the time of a step, `seconds` since the
start. A line with `held_out` has the held-out losses by task and masking rate.
"""
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from tqdm import tqdm

from training.diagnostics import collapsed


class Log:
    """A progress bar with the numbers that matter; the same as JSON lines in out_dir/log.jsonl."""

    def __init__(self, cfg, step: int, n_steps: int, rank: int, world: int):
        self.cfg, self.n_steps, self.rank, self.world = cfg, n_steps, rank, world
        self.seconds, self.steps, self.began = 0.0, 0, time.perf_counter()
        if rank > 0:
            return
        path = os.path.join(cfg.out_dir, "log.jsonl")
        kept = []
        if step and os.path.exists(path):           # resumed: drop what came after the checkpoint
            with open(path) as file:                # (this step's held-out loss will come again)
                kept = [line for line in file if line.endswith("\n")
                        and json.loads(line)["step"] < step + ('"ms":' in line)]
        with open(path + ".new", "w") as file:
            file.writelines(kept)
        os.replace(path + ".new", path)
        self.file = open(path, "a", buffering=1)
        # the first embeddings are the base's: what a collapse is measured by
        self.first, self.warned = next((json.loads(line) for line in kept if '"rank"' in line),
                                       None), False
        with open(os.path.join(cfg.out_dir, "settings.json"), "w") as file:
            json.dump({**asdict(cfg), "commit": git_commit(), "torch": torch.__version__,
                       "python": sys.version.split()[0]}, file, indent=1)
        self.bar = tqdm(total=n_steps, initial=step, desc=cfg.out_dir, unit="step",
                        mininterval=0.5 if sys.stderr.isatty() else 15)

    def is_due(self, step: int) -> bool:
        """Whether a line is, after so many steps; the first is, for it shows the base."""
        every = (self.cfg.log_every, self.cfg.save_every, self.n_steps)
        return step == 1 or any(step % n == 0 for n in every)

    def step(self, step: int, numbers: dict, began: float):
        """After every step; reads tensors, and so waits for the device, only when a line is due."""
        if self.is_due(step):
            values = torch.stack([torch.as_tensor(v, dtype=torch.float32).cpu()
                                  for v in numbers.values()])
            if self.world > 1:                      # every rank's share of the batch counts
                values = values.to(numbers["loss"].device)
                dist.all_reduce(values)
                values = values / self.world
            numbers = dict(zip(numbers, values.tolist()))
        self.seconds, self.steps = self.seconds + time.perf_counter() - began, self.steps + 1
        if not self.is_due(step):
            return
        ms, self.seconds, self.steps = 1000 * self.seconds / self.steps, 0.0, 0
        if self.rank == 0:
            shown = [name for name in ("diffusion", "jepa", "lr") if name in numbers]
            self.bar.set_postfix({name: f"{numbers[name]:.4g}" for name in shown})
            self.bar.update(step - self.bar.n)
            rounded = {name: float(f"{value:.6g}") if math.isfinite(value) else None
                       for name, value in numbers.items()}     # JSON has no NaN
            self.write({"step": step, **rounded, "ms": round(ms, 2),
                        "seconds": round(time.perf_counter() - self.began, 1)})
            self.watch(step, rounded)

    def watch(self, step: int, numbers: dict):
        """Warns of a collapse, once a run; from scratch there is nothing yet that could."""
        if "rank" in numbers and self.cfg.init_from:
            self.first = self.first or numbers
            said = collapsed(numbers, self.first)
            if said and not self.warned:
                self.warned = True
                self.say(f"step {step}: {said}")

    def held_out(self, step: int, losses: dict):
        if self.rank == 0:
            text = "   ".join(f"{name} " + " ".join(f"{loss:.3f}@{t}" for t, loss in by_t.items())
                              for name, by_t in losses.items())
            self.say(f"step {step}: held-out loss at t   {text}")
            self.write({"step": step, "held_out": losses})

    def write(self, line: dict):
        self.file.write(json.dumps(line) + "\n")

    def say(self, text: str):
        if self.rank == 0:
            tqdm.write(text)

    def close(self):
        if self.rank == 0:
            self.bar.close()
            self.file.close()


def git_commit() -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    found = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"],
                           capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
