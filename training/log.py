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

from configurator import printable
from tasks.files import check_is_file, naming, write_text
from training.diagnostics import collapsed
from training.folder import resumed_line
from training.ranks import rank_and_world, sum_over_ranks
from training.track import start_tracking


class Log:
    """Writes a line every log_every steps. Rank 0 prints; the others take part in the sums.

    settings: a dict, for settings.json; its "resumed" says what each resumed part of the run has
    changed. warns: whether a collapse of the embeddings is worth a warning, which it is only if the
    first embeddings are those of a trained base. Raises OSError where a file cannot be written, or
    was removed.
    """

    def __init__(self, out_dir: str, settings: dict, step: int, n_steps: int, warns: bool):
        self.n_steps, self.warns = n_steps, warns
        self.log_every, self.save_every = settings["log_every"], settings["save_every"]
        self.rank, self.world = rank_and_world()
        self.sums, self.started = {}, time.perf_counter()
        self.seconds, self.steps, self.tokens = 0.0, 0, 0       # since the last line
        if self.rank > 0:
            return
        self.path = os.path.join(out_dir, "log.jsonl")
        kept, n_broken = lines_before(self.path, step) if step else ([], 0)
        write_text(self.path, "".join(kept))
        self.file = open(self.path, "a", buffering=1)
        # the first embeddings are the base's: a collapse is measured against them
        self.first = next((json.loads(line) for line in kept if '"rank"' in line), None)
        settings = {**settings, "commit": git_commit(), "torch": torch.__version__,
                    "python": sys.version.split()[0]}
        write_text(os.path.join(out_dir, "settings.json"), json.dumps(settings, indent=1))
        if n_broken:
            self.say(f"{self.path}: {n_broken} broken line{'s' * (n_broken > 1)} left out")
        self.say(resumed_line(settings))
        self.send, self.end_tracking = start_tracking(settings["track"], out_dir, settings, step)
        self.bar = tqdm(total=n_steps, initial=step, desc=printable(out_dir), unit="step")

    def is_due(self, step: int) -> bool:
        """Return whether a line is written after this step; after the first, to show the base."""
        every = (self.log_every, self.save_every, self.n_steps)
        return step == 1 or any(step % n == 0 for n in every)

    def add(self, loss, parts: dict, n_micro: int):
        """Add a micro-batch's share of the step's numbers."""
        for name, value in {"loss": loss.detach(), **parts}.items():
            self.sums[name] = self.sums.get(name, 0) + value / n_micro

    def step(self, step: int, numbers: dict, clock: float, batches=()):
        """Call after every step. Reads numbers, which synchronises, only when a line is due.

        clock: when the step began. batches: this rank's [(x0, maskable, is_real, ...)], on the CPU.
        """
        numbers, self.sums = self.sums | numbers, {}
        if self.is_due(step):
            values = torch.stack([torch.as_tensor(v, dtype=torch.float32).cpu()
                                  for v in numbers.values()])
            if self.world > 1:                      # each rank has seen its part of the batch
                values = sum_over_ranks(values.to(numbers["loss"].device)) / self.world
            numbers = dict(zip(numbers, values.tolist()))
        self.seconds, self.steps = self.seconds + time.perf_counter() - clock, self.steps + 1
        self.tokens += sum(int(is_real.sum()) for _, _, is_real, *_ in batches)
        if not self.is_due(step):
            return
        ms, speed = 1000 * self.seconds / self.steps, self.world * self.tokens / self.seconds
        self.seconds, self.steps, self.tokens = 0.0, 0, 0
        if self.rank == 0:
            shown = [name for name in ("diffusion", "jepa", "lr") if name in numbers]
            self.bar.n = step       # set, not updated: the time left is by the mean since the start
            self.bar.set_postfix({name: f"{numbers[name]:.4g}" for name in shown}
                                 | {"tokens/s": f"{speed:,.0f}"})
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
        self.follow()
        with naming(self.path):
            self.file.write(json.dumps(line) + "\n")
        self.send(line)

    def follow(self):
        """Open the log again if another file is in its place: editors save by renaming.

        Raises OSError if its folder is gone.
        """
        if os.path.exists(self.path) and os.path.samestat(os.stat(self.path),
                                                          os.fstat(self.file.fileno())):
            return
        if not os.path.isdir(os.path.dirname(self.path)):
            raise OSError(f"{os.path.dirname(self.path)} was removed while the run was writing to "
                          f"it")
        self.file.close()
        self.file = open(self.path, "a", buffering=1)
        self.say(f"{self.path} was removed or replaced; the log goes on in the file that is there "
                 f"now")

    def say(self, text: str):
        """Print a line above the progress bar, unless it is empty."""
        if text and self.rank == 0:
            tqdm.write(printable(text))

    def close(self):
        if self.rank == 0:
            self.bar.close()
            self.file.close()
            self.end_tracking()


def lines_before(path: str, step: int) -> tuple[list[str], int]:
    """Return the lines of a log up to a checkpoint, and how many of the log are broken: half, not
    JSON, without a step. The held-out losses of the checkpoint's step will come again."""
    if not os.path.lexists(path):
        return [], 0
    check_is_file(path)
    kept, n_broken = [], 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                at = json.loads(line)["step"]
                if type(at) is not int or not line.endswith("\n") or has_words(line):
                    raise ValueError
                if at < step + ('"ms":' in line):
                    kept.append(line)
            except (ValueError, TypeError, KeyError, RecursionError):
                n_broken += 1
    return kept, n_broken


def has_words(line: str) -> bool:
    """Return whether something in a line of the log is neither a number nor the losses by task."""
    return any(type(value) not in (int, float, dict, type(None)) for value in json.loads(line)
               .values())


def git_commit() -> str:
    """Return the revision, with "-dirty" if a tracked file differs from it."""
    here = os.path.dirname(os.path.abspath(__file__))
    found = subprocess.run(["git", "-C", here, "describe", "--always", "--exclude=*", "--dirty"],
                           capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
