"""The log of a run: a progress bar, lines of text, and the same numbers in out_dir/log.jsonl.

The numbers of a line are explained in diagnostics.py; `ms` is the time of a step, `seconds` the
time since the start. A line with `held_out` has the held-out losses by task and masking rate.
"""
import json
import math
import os
import subprocess
import sys
import time

import torch
from tqdm import tqdm

from training.diagnostics import collapsed
from training.ranks import rank_and_world, sum_over_ranks


class Log:
    """Writes a line every log_every steps. Rank 0 prints; the others take part in the sums.

    settings: a dict, for settings.json. warns: whether a collapse of the embeddings is worth a
    warning, which it is only if the first embeddings are those of a trained base.
    """

    def __init__(self, out_dir: str, settings: dict, step: int, n_steps: int, warns: bool):
        self.n_steps, self.warns = n_steps, warns
        self.log_every, self.save_every = settings["log_every"], settings["save_every"]
        self.rank, self.world = rank_and_world()
        self.sums, self.seconds, self.steps, self.started = {}, 0.0, 0, time.perf_counter()
        if self.rank > 0:
            return
        path = os.path.join(out_dir, "log.jsonl")
        kept = lines_before(path, step) if step else []
        with open(path + ".new", "w") as file:
            file.writelines(kept)
        os.replace(path + ".new", path)
        self.file = open(path, "a", buffering=1)
        # the first embeddings are the base's: a collapse is measured against them
        self.first = next((json.loads(line) for line in kept if '"rank"' in line), None)
        with open(os.path.join(out_dir, "settings.json"), "w") as file:
            json.dump({**settings, "commit": git_commit(), "torch": torch.__version__,
                       "python": sys.version.split()[0]}, file, indent=1)
        self.bar = tqdm(total=n_steps, initial=step, desc=out_dir, unit="step",
                        mininterval=0.5 if sys.stderr.isatty() else 15)

    def is_due(self, step: int) -> bool:
        """Return whether a line is written after this step; after the first, to show the base."""
        every = (self.log_every, self.save_every, self.n_steps)
        return step == 1 or any(step % n == 0 for n in every)

    def add(self, loss, parts: dict, n_micro: int):
        """Add a micro-batch's share of the step's numbers."""
        for name, value in {"loss": loss.detach(), **parts}.items():
            self.sums[name] = self.sums.get(name, 0) + value / n_micro

    def step(self, step: int, numbers: dict, clock: float):
        """Call after every step. Reads tensors, which synchronises, only when a line is due."""
        numbers, self.sums = self.sums | numbers, {}
        if self.is_due(step):
            values = torch.stack([torch.as_tensor(v, dtype=torch.float32).cpu()
                                  for v in numbers.values()])
            if self.world > 1:                      # each rank has seen its part of the batch
                values = sum_over_ranks(values.to(numbers["loss"].device)) / self.world
            numbers = dict(zip(numbers, values.tolist()))
        self.seconds, self.steps = self.seconds + time.perf_counter() - clock, self.steps + 1
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
                        "seconds": round(time.perf_counter() - self.started, 1)})
            self.warn_of_collapse(step, rounded)

    def warn_of_collapse(self, step: int, numbers: dict):
        """Warn once. Early in a run embeddings often come together and part again: only the last
        quarter counts."""
        if "rank" not in numbers or not self.warns:
            return
        self.first = self.first or numbers
        sentence = collapsed(numbers, self.first)
        if sentence and step >= 0.75 * self.n_steps:
            self.warns = False
            self.say(f"step {step}: {sentence}")

    def held_out(self, step: int, losses: dict):
        if self.rank == 0:
            text = "   ".join(f"{name} " + " ".join(f"{loss:.3f}@{t}" for t, loss in by_t.items())
                              for name, by_t in losses.items())
            self.say(f"step {step}: held-out loss at t   {text}")
            self.write({"step": step, "held_out": losses})

    def write(self, line: dict):
        self.file.write(json.dumps(line) + "\n")

    def say(self, text: str):
        """Print a line above the progress bar, unless it is empty."""
        if text and self.rank == 0:
            tqdm.write(text)

    def close(self):
        if self.rank == 0:
            self.bar.close()
            self.file.close()


def lines_before(path: str, step: int) -> list[str]:
    """The lines of a log up to a checkpoint; the held-out losses of its step will come again."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [line for line in file if line.endswith("\n")
                and json.loads(line)["step"] < step + ('"ms":' in line)]


def git_commit() -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    found = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"],
                           capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
