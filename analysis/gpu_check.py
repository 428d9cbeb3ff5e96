"""The first minutes on a GPU: run there what tests on a CPU cannot see, and write it on one page.

    python analysis/gpu_check.py                            one GPU, about five minutes
    python analysis/gpu_check.py --parts=memory,sampler     these alone; others on file stay
    python analysis/gpu_check.py --device=cpu --dry         seconds: does the check itself run?

    environment   versions; the GPU's own matrix products and copies, the floors of what follows
    parity        fp32 on the CPU against fp32 and bf16 on the GPU: logits, loss, gradients
    attention     which kernel serves which layout of rows, its time, packed against padded
    bench         a step at LLaDA-8B's width: seven kinds, and the share of the GPU's own peak
    memory        peak and time of the one-GPU configs at 8 B against analysis/predict.py
    sampler       tokens a second at 8 B against the floor of memory bandwidth
    waits         where the host waits for the GPU in a step without a log line
    loop          train.py's settings on the toy: same losses; its checkpoint samples the same
    compile       the bench again, with torch.compile
    tests         tests that use a GPU, and two ranks with NCCL if there are two GPUs

Numbers stand beside the prediction or floor they belong to, in out_dir/page.md and figures.json.
Both are written after each number, so that a kill loses none. An error in a part becomes a line.
The parts are in gpu_speed.py and gpu_same.py, what they share in gpu_machine.py.
"""
import contextlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import printable, run  # first: it sets variables that torch reads

import torch

from analysis import gpu_same, gpu_speed, predict
from analysis.gpu_machine import Check, free
from pretrained.device import pick_device
from tasks.files import write_json, write_text
from training.log import git_commit

SECONDS = {"environment": 5, "parity": 10, "attention": 12, "bench": 25, "memory": 35,
           "sampler": 35, "waits": 15, "loop": 40, "compile": 70, "tests": 45}  # on an H200, about
PARTS = {"environment": gpu_speed.environment, "parity": gpu_same.parity,
         "attention": gpu_speed.attention, "bench": gpu_speed.bench_steps,
         "memory": gpu_speed.memory, "sampler": gpu_speed.sampler,
         "waits": gpu_same.waits_of_a_step, "loop": gpu_same.loop,
         "compile": gpu_speed.compiled_steps, "tests": gpu_same.tests}


@dataclass
class GPUCheckConfig:
    out_dir: str = "out/gpu_check"      # page.md and figures.json go here
    parts: tuple[str, ...] = tuple(SECONDS)  # which to run, in this order
    minutes: float = 6.0                # a part that would end later is left out, and named
    n_layer: int = 4                    # of the bench; fewer if the GPU's memory asks for it
    device: str = "auto"                # cpu, cuda, mps; auto takes a GPU if there is one
    dry: bool = False                   # tiny shapes everywhere: does the check itself run?

    def __post_init__(self):
        predict.check_ranges(self, minutes=(0.01, 1e6), n_layer=(1, 1000))
        if unknown := [part for part in self.parts if part not in SECONDS]:
            raise ValueError(f"parts has {unknown[0]!r}; there are {', '.join(SECONDS)}")
        if not self.parts:
            raise ValueError(f"parts is empty; choose of {', '.join(SECONDS)}")


def main(cfg: GPUCheckConfig):
    began = time.perf_counter()
    device = pick_device(cfg.device)
    page = Page(cfg, device)
    check = Check(device, cfg.n_layer, cfg.dry)
    for part in cfg.parts:
        left = 60 * cfg.minutes - (time.perf_counter() - began)
        if SECONDS[part] > left and not cfg.dry:
            page.left_out(part, f"left out: needs about {SECONDS[part]} s, and {left:.0f} of "
                                f"{60 * cfg.minutes:.0f} are left")
            continue
        print(f"{part} ...", flush=True)
        try:
            with at_most(left):
                page.fill(part, PARTS[part](check))
        except Exception as error:
            page.failed(part, error)
        free()
        if check.is_lost():             # an illegal access: nothing runs in this process any more
            page.left_out(part, f"{page.parts[part]['note']}; the GPU answers no more, a new "
                                "process goes on")
            rest = cfg.parts[cfg.parts.index(part) + 1:]
            left = 60 * cfg.minutes - (time.perf_counter() - began)
            if rest and left > 1:
                options = [f"--parts={','.join(rest)}", f"--minutes={left / 60:.2f}"]
                os.execv(sys.executable, [sys.executable, *sys.argv, *options])
    print("\n" + page.text())


@contextlib.contextmanager
def at_most(seconds: float):
    """Raise TimeoutError in the block when the time is up (between two lines of Python)."""
    def late(*_):
        raise TimeoutError(f"stopped after {seconds:.0f} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ----------------------------------------------------------------------------------------------
# the page


class Page:
    """Collects figures by part, and writes page.md and figures.json after each.

    Parts that out_dir holds already, of the same machine and commit, stay until they run again.
    """

    def __init__(self, cfg: GPUCheckConfig, device):
        self.folder, self.parts = Path(cfg.out_dir), {}
        same = {"device": predict.name_of(device), "commit": git_commit(),
                "torch": torch.__version__, "dry": cfg.dry}
        self.head = same | {"date": f"{datetime.now(UTC):%Y-%m-%d}"}
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            before = json.loads((self.folder / "figures.json").read_text())
            if before["head"] | same == before["head"]:
                page_of(self.head, before["parts"])             # whatever is not a page's raises
                self.parts = before["parts"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass                                                # none, or another program's

    def fill(self, part: str, figures):
        """Add the figures that a part yields, one by one; then its seconds."""
        began = time.perf_counter()
        self.parts[part] = {"figures": [], "note": "did not end"}
        for figure in figures:
            self.parts[part]["figures"].append(asdict(figure))
            print(f"    {line_of(asdict(figure))}", flush=True)
            self.write()
        self.parts[part] |= {"note": "", "seconds": round(time.perf_counter() - began, 1)}
        self.write()

    def failed(self, part: str, error):
        """Keep an error as a line: its kind, its first line, and where it was raised."""
        [*_, last] = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename.startswith(str(ROOT))] or [last]
        text = (str(error).strip() or "no message").splitlines()[0][:300]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours[:-4:-1])
        self.left_out(part, f"{type(error).__name__}: {text} ({where})")
        traceback.print_exception(error)

    def left_out(self, part: str, note: str):
        self.parts.setdefault(part, {"figures": []})["note"] = note
        print(f"    {note}", flush=True)
        self.write()

    def write(self):
        write_json(str(self.folder / "figures.json"), {"head": self.head, "parts": self.parts})
        write_text(str(self.folder / "page.md"), self.text())

    def text(self) -> str:
        return page_of(self.head, self.parts)


def page_of(head: dict, parts: dict) -> str:
    """Write figures.json's two halves as markdown: a table for each part."""
    lines = [f"# {head['device']}, torch {head['torch']}, commit {head['commit']}, {head['date']}"
             + ", tiny shapes" * head["dry"]]
    for part in sorted(parts, key=list(SECONDS).index):
        found = parts[part]
        seconds = f" ({found['seconds']} s)" if "seconds" in found else ""
        lines += ["", f"## {part}{seconds}", ""]
        if found["note"]:
            lines += [f"**{found['note']}**", ""]
        if found["figures"]:
            lines += ["| what | measured | beside | ratio |", "|---|---|---|---|"]
        for figure in found["figures"]:
            lines.append(f"| {line_of(figure, ' | ')} |")
    return printable("\n".join(lines)) + "\n"


def line_of(figure: dict, between: str = "  ") -> str:
    """Write a figure as four cells: what, measured, what it is beside, measured / beside."""
    value, beside = figure["value"], figure["beside"]
    cells = [figure["what"], f"{shown(value)} {figure['unit']}".strip()]
    if beside is None:
        cells += [figure["of"], ""]
    else:
        ratio = f"{value / beside:.3g}" if beside else ""
        cells += [f"{shown(beside)} {figure['unit']}".strip() + f", {figure['of']}", ratio]
    return between.join(cells)


def shown(value) -> str:
    """Write a number with three to five digits, a text as it is."""
    if isinstance(value, str):
        return value.replace("|", "/").replace("\n", " ")
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.4g}"


if __name__ == "__main__":
    run(main, GPUCheckConfig)
