"""The machine that gpu_check.py looks at: its speed, its shapes, a step on it, its waits.

A part of the check (gpu_speed.py, gpu_same.py) takes a Check and yields Figures.
"""
import contextlib
import gc
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from analysis import predict
from analysis.bench import PAD_TO, matmul_speed, random_model
from model import row_generators
from pretrained.device import pick_dtype
from tasks.common import collate
from training.lora import add_lora
from training.setup import clip_gradients, make_objective, make_optimizer

ROOT = Path(__file__).resolve().parent.parent
SEED = 42
# Tokens of prompt and answer of 16 of GSM8K's training rows, evenly spaced when sorted by length;
# a word, a digit or a sign counts as a token, as in bench.py.
LENGTHS = [(32, 41), (39, 47), (42, 52), (55, 47), (48, 61), (49, 67), (55, 68), (61, 68), (49, 88),
           (66, 79), (55, 99), (63, 101), (74, 101), (47, 140), (82, 123), (85, 148)]


@dataclass
class Figure:
    """A number or a text on the page, and what it is to be compared with."""
    what: str
    value: float | str
    unit: str = ""
    beside: float | None = None
    of: str = ""                        # what `beside` is


class Check:
    """The device, its speed, and shapes: LLaDA's and Dream's, or tiny ones if dry."""

    def __init__(self, device, n_layer: int, dry: bool):
        self.device, self.n_layer, self.dry = device, n_layer, dry
        self.is_cuda = device.type == "cuda"
        self.dtype = pick_dtype("auto", device)
        self.lengths = LENGTHS[:4] if dry else LENGTHS
        self.sheet = predict.sheet_of(device)
        self.matmul, self.bandwidth = self.speed()
        self.total = torch.cuda.get_device_properties(device).total_memory if self.is_cuda else 8e9

    def speed(self):
        """Measure FLOPs of a matrix product and bytes of a copy (read and written) per second."""
        x = torch.empty(1 << (18 if self.dry else 28), device=self.device)
        y = torch.empty_like(x)
        copied = 2 * x.nbytes / self.seconds(lambda: y.copy_(x))
        return matmul_speed(self.device, self.dtype, 256 if self.dry else 0), copied

    def seconds(self, function, n: int = 10) -> float:
        """Time a call: the mean of n after 3 for warm-up."""
        for _ in range(3):
            function()
        self.synchronize()
        began = time.perf_counter()
        for _ in range(n):
            function()
        self.synchronize()
        return (time.perf_counter() - began) / n

    def synchronize(self):
        getattr(torch, self.device.type).synchronize()      # torch.cpu has one, too

    def is_lost(self) -> bool:
        """Whether the GPU answers no more."""
        try:
            self.synchronize()
        except RuntimeError:
            return True
        return False

    def shape(self, preset: str, n_layer: int = 0):
        """Return a preset's ModelConfig; dry: a narrow one of two layers and few words."""
        config = predict.shape_of(preset, n_layer)
        if not self.dry:
            return config
        return replace(config, vocab_size=300, mask_id=1, eos_id=0, n_layer=min(config.n_layer, 2),
                       n_head=4, n_kv_head=min(config.n_kv_head, 4), n_embd=32, n_hidden=64)

    def peak_gb(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.is_cuda else 0.0


def batch_of(rows, eos_id: int, fill: int = 0, device="cpu"):
    """Make the arguments of an objective, from rows, with generators of their masks."""
    return *collate(rows, fill, PAD_TO, eos_id), row_generators(SEED, 0, range(len(rows)))


def training_step(cfg, objective, optimizer, batches):
    """Do what a step of train.py does without a log line -> the last loss ()."""
    z_tgts = objective.embed_targets(batches)
    for batch, z_tgt in zip(batches, z_tgts):
        loss, _ = objective(*batch, z_tgt)
        (loss / len(batches)).backward()
    norm = clip_gradients(objective, cfg.grad_clip)
    optimizer.found_inf = 1 - norm.isfinite().float()       # as training/guard.py does
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    objective.update_target()
    return loss.detach()


def make_training(check: Check, cfg, config):
    """Make model, objective and optimizer as train.py does, with random weights on the device."""
    dtype = pick_dtype(cfg.dtype, check.device)
    model = random_model(config, check.device, dtype if cfg.lora_rank else torch.float32)
    model.compute_dtype = dtype
    model.pack, model.checkpoint_activations = cfg.pack, cfg.checkpoint_activations
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
    objective = make_objective(model, cfg, None, check.device)
    return objective, make_optimizer(objective, cfg)


@contextlib.contextmanager
def count_waits(device):
    """Count where the host waits for the GPU: {"file:line of the project": n}."""
    found = Counter()

    def note(message, *_, **__):
        if "synchronizing" in str(message):
            found[place_of(traceback.extract_stack())] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def place_of(stack) -> str:
    """Return the innermost line of the project in a stack, the check itself left out."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        is_ours = ROOT in path.parents and ".venv" not in path.parts
        if is_ours and not path.name.startswith("gpu_"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "here"


def as_text(counts: dict) -> str:
    return ", ".join(f"{n} x {name}" for name, n in sorted(counts.items())) or "none"


def profiled(check: Check, function) -> tuple[dict, list]:
    """Run a function once -> {operator or runtime call: count}, kernels' names, longest first."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * check.is_cuda
    with profile(activities=activities) as found:
        function()
        check.synchronize()
    events = found.key_averages()
    is_kernel = torch.autograd.DeviceType.CUDA
    kernels = [e for e in events if e.device_type == is_kernel and not e.key.startswith("aten::")]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    return {e.key: e.count for e in events}, [e.key for e in kernels]


def difference(found, expected) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def free():
    """Give back the memory of a part that has ended."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
