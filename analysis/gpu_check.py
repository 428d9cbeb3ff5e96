"""The first minutes on a GPU: run there what tests on a CPU cannot see, and write it on one page.

    python analysis/gpu_check.py                            one GPU, about four minutes
    python analysis/gpu_check.py --parts=memory,sampler     these alone; others on file stay
    python analysis/gpu_check.py --device=cpu --dry         seconds: does the check itself run?

    environment   versions; the GPU's own matrix products and copies, the floors of what follows
    parity        fp32 on the CPU against fp32 and bf16 on the GPU: logits, loss, gradients, training
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
"""
import contextlib
import copy
import gc
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import configure, printable, run  # first: it sets variables that torch reads

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import train
from analysis import bench, bench_sampling, predict
from analysis.bench import PAD_TO, BenchConfig, random_model, random_rows
from analysis.bench_sampling import SamplingBenchConfig
from jepa import DLLMJEPA
from model import DLLM, Packed, Padded, row_generators
from pretrained.device import index_of, pick_device, pick_dtype
from sample import complete, generate, load_model
from sampling.reveal import Sampling
from tasks import toy
from tasks.common import collate
from tasks.files import write_json, write_text
from train import TrainConfig
from training.log import git_commit
from training.lora import add_lora
from training.setup import clip_gradients, make_objective, make_optimizer
from training.sharding import shard

SEED = 42
# Tokens of prompt and answer of 16 of GSM8K's training rows, evenly spaced when sorted by length;
# a word, a digit or a sign counts as a token, as in bench.py.
LENGTHS = [(32, 41), (39, 47), (42, 52), (55, 47), (48, 61), (49, 67), (55, 68), (61, 68), (49, 88),
           (66, 79), (55, 99), (63, 101), (74, 101), (47, 140), (82, 123), (85, 148)]
LEAVE = 0.85                # share of the GPU's memory that a part may be predicted to use
SECONDS = {"environment": 5, "parity": 15, "attention": 12, "bench": 30, "memory": 60,
           "sampler": 30, "waits": 20, "loop": 25, "compile": 70, "tests": 45}  # on an H100, about


@dataclass
class GPUCheckConfig:
    out_dir: str = "out/gpu_check"      # page.md and figures.json go here
    parts: tuple[str, ...] = tuple(SECONDS)  # which to run, in this order
    minutes: float = 4.0                # a part that would end later is left out, and named
    n_layer: int = 4                    # of the bench; fewer if the GPU's memory asks for it
    device: str = "auto"                # cpu, cuda, mps; auto takes a GPU if there is one
    dry: bool = False                   # tiny shapes everywhere: does the check itself run?

    def __post_init__(self):
        predict.check_ranges(self, minutes=(0, 1e6), n_layer=(1, 1000))
        if unknown := [part for part in self.parts if part not in SECONDS]:
            raise ValueError(f"parts has {unknown[0]!r}; there are {', '.join(SECONDS)}")
        if not self.parts:
            raise ValueError(f"parts is empty; choose of {', '.join(SECONDS)}")


@dataclass
class Figure:
    """A number or a text on the page, and what it is to be compared with."""
    what: str
    value: float | str
    unit: str = ""
    beside: float | None = None
    of: str = ""                        # what `beside` is


def main(cfg: GPUCheckConfig):
    began = time.perf_counter()
    check = Check(cfg, pick_device(cfg.device))
    page = Page(cfg, check)
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
            page.left_out(part, "the GPU's context was lost; a new process goes on")
            rest = cfg.parts[cfg.parts.index(part) + 1:]
            left = 60 * cfg.minutes - (time.perf_counter() - began)
            if rest and left > 0:
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


def free():
    """Give back the memory of a part that has ended."""
    gc.collect()
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# ----------------------------------------------------------------------------------------------
# the page


class Page:
    """Collects figures by part, and writes page.md and figures.json after each.

    Parts that out_dir holds already, of the same machine and commit, stay until they run again.
    """

    def __init__(self, cfg: GPUCheckConfig, check):
        self.folder, self.parts = Path(cfg.out_dir), {}
        self.head = {"device": predict.name_of(check.device), "commit": git_commit(),
                     "torch": torch.__version__, "dry": cfg.dry}
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads((self.folder / "figures.json").read_text())
            if before["head"] == self.head:
                self.parts = before["parts"]

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
        """Return the page as markdown: a table for each part."""
        head = self.head
        lines = [f"# {head['device']}, torch {head['torch']}, commit {head['commit']}"
                 + ", tiny shapes" * head["dry"]]
        for part in sorted(self.parts, key=list(SECONDS).index):
            found = self.parts[part]
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


# ----------------------------------------------------------------------------------------------
# the machine and what runs on it


class Check:
    """The device, its speed, and shapes: LLaDA's and Dream's, or tiny ones if dry."""

    def __init__(self, cfg: GPUCheckConfig, device):
        self.device, self.dry, self.n_layer = device, cfg.dry, cfg.n_layer
        self.is_cuda = device.type == "cuda"
        self.dtype = pick_dtype("auto", device)
        self.lengths = LENGTHS[:4] if cfg.dry else LENGTHS
        self.matmul, self.bandwidth = self.speed()
        self.total = torch.cuda.get_device_properties(device).total_memory if self.is_cuda else 8e9

    def speed(self):
        """Measure FLOPs of a matrix product and bytes of a copy (read and written) per second."""
        n = 256 if self.dry else 8192
        a, b = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in range(2))
        matmul = 2 * n ** 3 / self.seconds(lambda: a @ b)
        x = torch.empty(4 * n * n, device=self.device)
        y = torch.empty_like(x)
        return matmul, 2 * x.nbytes / self.seconds(lambda: y.copy_(x))

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
    """Return the innermost line of the project in a stack, this file left out."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        if ROOT in path.parents and path != Path(__file__).resolve() and ".venv" not in path.parts:
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


# ----------------------------------------------------------------------------------------------
# the parts: each yields Figures


def environment(check: Check):
    """Versions, and the floors."""
    device = check.device
    yield Figure("device", predict.name_of(device))
    yield Figure("torch", f"{torch.__version__}, Python {sys.version.split()[0]}")
    if check.is_cuda:
        of = torch.cuda.get_device_properties(device)
        yield Figure("memory", of.total_memory / 1e9, "GB")
        yield Figure("multiprocessors", of.multi_processor_count)
        yield Figure("compute capability", f"{of.major}.{of.minor}")
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Figure("CUDA, cuDNN, NCCL",
                     f"{torch.version.cuda}, {torch.backends.cudnn.version()}, {nccl}")
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm",
                                   "--format=csv,noheader"], capture_output=True, text=True,
                                  timeout=20)
            yield Figure("driver, highest clock", done.stdout.strip().splitlines()[0])
    for name in ("triton", "numpy", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield Figure(name, importlib.metadata.version(name))
    sheet = next((flops for gpu, flops in predict.PEAKS.items()
                  if gpu in predict.name_of(device)), None)
    yield Figure(f"matrix product, {check.dtype}", check.matmul / 1e12, "TFLOP/s",
                 sheet and sheet / 1e12, "data sheet" if sheet else "")
    yield Figure("copy, bytes read and written", check.bandwidth / 1e12, "TB/s")


def parity(check: Check):
    """The same small models and batches on CPU and device: logits, loss, gradients."""
    tiny = replace(predict.shape_of("tiny"), vocab_size=300)
    dream = replace(tiny, n_layer=2, n_head=8, n_kv_head=2, n_embd=256, n_hidden=512, shift=True,
                    qkv_bias=True)
    for name, config in (("MHA", tiny), ("GQA, shift, bias", dream)):
        model = random_model(config, torch.device("cpu"))
        model.compute_dtype = torch.float32
        rows = random_rows(config, check.lengths)
        expected = numbers_of(model, rows, pack=False)
        for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
            for pack in (False, True):
                ours = copy.deepcopy(model).to(check.device)
                ours.compute_dtype = dtype
                found = numbers_of(ours, rows, pack)
                which = f"{name}, {str(dtype)[6:]}, {'packed' if pack else 'padded'}"
                for what, close in zip(("logits", "loss", "gradient"), zip(found, expected)):
                    yield Figure(f"{which}: {what}, relative difference", difference(*close), "",
                                 limit, "limit")


def numbers_of(model, rows, pack: bool):
    """Compute logits at real tokens, the joint loss, and all gradients as one vector, in fp32."""
    model.pack = pack
    objective = DLLMJEPA(model, n_pred_layer=1, seed=SEED).to(model.embed.weight.device)
    x0, maskable, is_real, generator = batch_of(rows, model.config.eos_id)
    with torch.no_grad():
        logits = model(x0, is_real)[index_of(is_real, model.embed.weight.device)]
    loss, _ = objective(x0, maskable, is_real, generator)
    loss.backward()
    grads = [p.grad.float().flatten() for p in objective.parameters() if p.grad is not None]
    found = [x.detach().cpu() for x in (logits, loss, torch.cat(grads))]
    model.zero_grad()
    return found


def difference(found, expected) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def attention(check: Check):
    """Forward and backward of one layer's attention in each layout: time, kernel, difference."""
    D = 8 if check.dry else 128
    for preset, scale in (("llada-8b", 1), ("dream-7b", 1), ("llada-8b", 4), ("dream-7b", 4)):
        config = check.shape(preset)
        lengths = torch.tensor([scale * sum(pair) for pair in check.lengths])
        if check.dry:
            lengths = lengths // 16 + 1
        is_real = torch.arange(int(lengths.max())) < lengths[:, None]                   # (B, T)
        index = index_of(is_real, check.device)
        generator = torch.Generator(check.device).manual_seed(SEED)

        def draw(n_head):
            return torch.randn(*is_real.shape, n_head, D, generator=generator, device=check.device,
                               dtype=check.dtype)                                   # (B, T, H, D)
        q, k, v = (draw(n) for n in (config.n_head, config.n_kv_head, config.n_kv_head))
        by_row = [x.transpose(1, 2) for x in (q, k, v)]                             # (B, H, T, D)
        end_to_end = [x[index][None].transpose(1, 2) for x in (q, k, v)]            # (1, H, N, D)
        outputs, dense = {}, None
        for name, layout, inputs in (("dense, no mask", Padded(None, check.device), by_row),
                                     ("padded", Padded(is_real, check.device), by_row),
                                     ("packed", Packed(is_real, check.device), end_to_end)):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]

            def both():
                y = layout.attention(*leaves, config.n_kv_head != config.n_head)
                y.backward(torch.ones_like(y))
                return y
            which = f"{preset}, {is_real.shape[0]} rows to {is_real.shape[1]} tokens, {name}"
            try:
                ms = 1000 * check.seconds(both)
                yield Figure(which, ms, "ms", dense, "dense" if dense else "")
                dense = dense or ms
                names, kernels = profiled(check, both)
                ops = [key for key in names if "scaled_dot_product_" in key or "varlen" in key
                       or "flash_attention" in key]
                ops = {key.split("::")[-1] for key in ops if key != "aten::scaled_dot_product_"
                       "attention" and "backward" not in key.lower()}
                yield Figure(f"{which}: operators", " ".join(sorted(ops)),
                             of="MATH" if any("math" in op for op in ops) else "a fused kernel")
                yield Figure(f"{which}: longest kernels", "; ".join(k[:70] for k in kernels[:3]))
                y = both().detach()
                outputs[name] = (y[0].transpose(0, 1) if name == "packed"
                                 else y.transpose(1, 2)[index]).float()             # (N, H, D)
            except RuntimeError as error:
                yield Figure(which, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
        if {"packed", "padded"} <= outputs.keys():
            yield Figure(f"{preset}, scale {scale}: packed - padded, relative",
                         difference(outputs["packed"], outputs["padded"]), "", 0.01, "limit")


def make_bench(check: Check, compiled: bool):
    """Return settings, config, rows and steps of bench.py at LLaDA's width, as many as fit."""
    n_layer = min(check.n_layer, 2) if check.dry else check.n_layer
    config = check.shape("llada-8b", n_layer)
    # weights, gradients, moments, two targets in fp32; the predictor, logits of all positions
    while (24 * sum(predict.parameters(config).values()) + 26e9 > LEAVE * check.total
           and config.n_layer > 1 and not check.dry):
        config = replace(config, n_layer=config.n_layer - 1)
    cfg = BenchConfig(preset="llada-8b", n_layer=config.n_layer, steps=2 if check.dry else 5,
                      batch_size=len(check.lengths), compile=compiled, device=check.device.type)
    rows = random_rows(config, check.lengths)
    model = random_model(config, check.device)
    return cfg, config, rows, bench.make_steps(cfg, model)


def bench_steps(check: Check):
    """All kinds of step at LLaDA's width, without compile."""
    yield from timed_steps(check, *make_bench(check, False))


def compiled_steps(check: Check):
    """The kinds that training uses, with each block compiled."""
    cfg, config, rows, steps = make_bench(check, True)
    steps = {kind: steps[kind] for kind in ("plain", "jepa", "jepa packed")}
    yield from timed_steps(check, cfg, config, rows, steps)     # the same on this machine, eager
    bench.compile_blocks(steps)
    began = time.perf_counter()
    for step in steps.values():
        step(*bench.batch_of(cfg, rows, 0))
    check.synchronize()
    yield Figure("compile: first steps of the three kinds", time.perf_counter() - began, "s")
    yield from timed_steps(check, cfg, config, rows, steps, "compiled ")
    torch.compiler.reset()


def timed_steps(check: Check, cfg, config, rows, steps, prefix: str = ""):
    """Time the steps by bench.measure; each beside its FLOPs at the machine's own peak."""
    found = {kind: {"flops": 0, "closed_form": bench.step_flops(kind, cfg, config, rows)}
             for kind in steps}
    bench.measure(cfg, rows, steps, found, check.device)
    tokens = sum(len(row.prompt) + len(row.answer) + 1 for row in rows)
    yield Figure(f"{prefix}shape", f"{config.n_layer} layers, {len(rows)} rows of "
                                   f"{tokens / len(rows):.0f} tokens on average")
    for kind, of in found.items():
        kind_name = prefix + kind
        at_peak = 1000 * of["closed_form"] / check.matmul
        yield Figure(kind_name, of["ms"], "ms", at_peak, "at the matrix product's speed")
        batch = bench.batch_of(cfg, rows, 0)
        steps[kind].forward_backward(*batch)
        check.synchronize()
        began = time.perf_counter()
        steps[kind].update()
        check.synchronize()
        ms = 1000 * (time.perf_counter() - began)
        yield Figure(f"{kind_name}: of it optimizer and EMA", ms, "ms", of["ms"], "of the step")
        rest = max(1e-9, of["ms"] - ms)
        yield Figure(f"{kind_name}: share of the peak, forward and backward", 100 * at_peak / rest,
                     "%")
        yield Figure(f"{kind_name}: tokens", of["tokens_per_s"], "/s")
        yield Figure(f"{kind_name}: peak memory", of["peak_gb"], "GB")
    for a, b in (("jepa", "plain"), ("two gradients", "plain"), ("jepa packed", "jepa padded"),
                 ("jepa packed", "jepa"), ("naive plain", "plain"), ("straightforward", "jepa")):
        if a in found and b in found:
            yield Figure(f"{prefix}{a} / {b}", found[a]["ms"] / found[b]["ms"], "",
                         found[a]["closed_form"] / found[b]["closed_form"], "by FLOPs")


def memory(check: Check):
    """The steps of the one-GPU configs at LLaDA-8B: peak and time, beside the prediction."""
    lora = configure(TrainConfig, ["config/llada8b_gsm8k_lora.py"])
    lean = configure(TrainConfig, ["config/llada8b_gsm8k_1gpu.py"])
    gb = check.total / 1e9
    setup = predict.Setup("LoRA", "", 1, gb, predict.FP32, lora.n_pred_layer,
                          is_checkpointed=True, lora_rank=lora.lora_rank)
    yield from measured_config(check, lora, setup, check.shape("llada-8b"))
    free()
    yield from measured_config(check, replace(lora, micro_batch_size=16), setup,
                               check.shape("llada-8b"))
    free()
    setup = predict.Setup("lean", "", 1, gb, predict.LEAN, lean.n_pred_layer)
    config = check.shape("llada-8b")
    tokens = lean.micro_batch_size * lean.max_length
    share = 0.93 if gb > 135 else LEAVE     # the config is made for such a card
    while config.n_layer > 1 and not check.dry and (
            sum(predict.memory(setup, config, tokens).values()) > share * gb):
        config = replace(config, n_layer=config.n_layer - 1)
    yield from measured_config(check, lean, setup, config)


def measured_config(check: Check, cfg, setup, config):
    """Run three steps of a config with rows of max_length tokens -> Figures."""
    if check.dry:
        cfg, config = replace(cfg, batch_size=4, micro_batch_size=2), replace(config, n_layer=2)
    free()
    objective, optimizer = make_training(check, cfg, config)
    rows = random_rows(config, (LENGTHS * 4)[:cfg.batch_size])
    size, times = cfg.micro_batch_size, []
    free()
    for _ in range(3):
        batches = [batch_of(rows[i:i + size], config.eos_id, PAD_TO)
                   for i in range(0, len(rows), size)]
        check.synchronize()
        began = time.perf_counter()
        loss = training_step(cfg, objective, optimizer, batches)
        check.synchronize()
        times.append(time.perf_counter() - began)
    at_rest = torch.cuda.memory_allocated(check.device) / 1e9 if check.is_cuda else 0.0
    which = f"{setup.name}, {config.n_layer} layers, micro-batches of {size}"
    tokens = sum(int(batch[2].sum()) for batch in batches)
    per_pass = tokens // len(batches)
    predicted = predict.memory(setup, config, per_pass)
    states = sum(gb for key, gb in predicted.items() if key not in ("activations", "grads"))
    yield Figure(f"{which}: weights and states between two steps", at_rest, "GB",
                 states, "predicted, with moments")
    yield Figure(f"{which}: peak", check.peak_gb(), "GB", sum(predicted.values()), "predicted")
    if check.is_cuda:
        yield Figure(f"{which}: reserved", torch.cuda.max_memory_reserved(check.device) / 1e9, "GB",
                     check.total / 1e9, "the GPU's")
    passes = (2 if cfg.lora_rank else 3) + setup.is_checkpointed + 1
    trunk = predict.trunk_flops(config, [PAD_TO] * cfg.batch_size)
    head = 3 * predict.head_flops(config, round(predict.MASKED * tokens))
    seconds = statistics.median(times[1:])
    yield Figure(f"{which}: a step of {tokens:,} tokens", seconds, "s",
                 (passes * trunk + head) / check.matmul, "at the matrix product's speed")
    yield Figure(f"{which}: share of the peak", 100 * (passes * trunk + head) / check.matmul
                 / seconds, "%", 100 * predict.MFU, "assumed by predict.py")
    yield Figure(f"{which}: tokens", tokens / seconds, "/s")
    yield Figure(f"{which}: first step", times[0], "s")
    yield Figure(f"{which}: loss is finite", str(bool(loss.isfinite())))


def sampler(check: Check):
    """Tokens a second of all ways to sample at LLaDA-8B's shape, beside the floors."""
    config = check.shape("llada-8b")
    cfg = SamplingBenchConfig(preset="llada-8b", blocks=1)
    if check.dry:
        cfg = replace(cfg, prompt_length=16, gen_length=16, block_length=8)
    model = bench_sampling.random_model(config, check.device)
    n_bytes = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes
    prompts = torch.randint(2, config.vocab_size, (1, cfg.prompt_length),
                            generator=torch.Generator().manual_seed(SEED))
    found = bench_sampling.measure(model, prompts, cfg)
    T, L = cfg.prompt_length + cfg.gen_length, cfg.block_length
    whole = max(n_bytes / check.bandwidth, predict.trunk_flops(config, [T]) / check.matmul)
    few = n_bytes / check.bandwidth         # a pass over one block reads all weights
    for way, of in found.items():
        if way in ("straightforward", "exact"):
            floor = of["passes"] * whole
        else:                               # the first pass of a block is over the whole text
            rest = T - cfg.prompt_length if way == "prefix" else L
            a_pass = max(few, predict.trunk_flops(config, [rest]) / check.matmul)
            floor = whole + (of["passes"] - 1) * a_pass
        yield Figure(f"{way}: {of['passes']} passes for {L} tokens", of["seconds"], "s", floor,
                     "floor of bandwidth and matrix products")
        yield Figure(f"{way}: tokens", of["tokens_per_s"], "/s", L / floor, "at the floor")
        yield Figure(f"{way}: as exact", 100 * of["as_exact"], "% of tokens")
    for name, more in (("exact", {}), ("dual cache", {"cache": "dual"}),
                       ("dual cache, threshold", {"cache": "dual", "threshold": 0.9})):
        s = Sampling(2 * L, L, 2 * L, **more)
        with count_waits(check.device) as waits:
            generate(model, prompts, s)
        yield Figure(f"{name}: host waits in two blocks", sum(waits.values()), of=as_text(waits))
    names, _ = profiled(check, lambda: generate(model, prompts, Sampling(L, L, 8, cache="dual")))
    launches = sum(n for key, n in names.items() if "LaunchKernel" in key)
    yield Figure("dual cache: kernels launched a pass", launches / 8)


def waits_of_a_step(check: Check):
    """Host waits of a step without a log line: its cause is a transfer or a size read back."""
    config = check.shape("llada-8b", 2)
    if not check.dry:       # a narrow model waits where a wide one does
        config = replace(config, vocab_size=1024, mask_id=1, eos_id=0, n_embd=512, n_hidden=1024,
                         n_head=4, n_kv_head=4)
    cases = {"plain": "--lambda_jepa=0", "jepa": "", "jepa, packed": "--pack",
             "lean": "--optimizer=lean", "LoRA": "--init_from=none --lora_rank=4",
             "two gradients": "--objective=two_gradients", "one rank, sharded": ""}
    rows = random_rows(config, check.lengths)
    for name, options in cases.items():
        cfg = configure(TrainConfig, options.split())
        try:
            if name.endswith("sharded"):
                backend = "nccl" if check.is_cuda else "gloo"
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
                objective = DLLMJEPA(random_model(config, check.device)).to(check.device)
                shard(objective, check.device)
                optimizer = make_optimizer(objective, cfg)
            else:
                objective, optimizer = make_training(check, cfg, config)

            def step():
                batches = [batch_of(rows[i::2], config.eos_id) for i in (0, 1)]
                return training_step(cfg, objective, optimizer, batches)
            for _ in range(2):
                step()
            check.synchronize()
            with count_waits(check.device) as waits:
                step()
            yield Figure(f"{name}: host waits", sum(waits.values()), of=as_text(waits))
            if not check.is_cuda:
                continue
            names, _ = profiled(check, step)
            kept = {key: n for key, n in names.items() if "Synchronize" in key
                    or key.startswith("Memcpy") or "LaunchKernel" in key}
            yield Figure(f"{name}: by the profiler, its own last wait included", as_text(kept))
        except (RuntimeError, ValueError, AssertionError) as error:
            yield Figure(name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}",
                         of=place_of(traceback.extract_tb(error.__traceback__)))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def loop(check: Check):
    """Train the toy by train.py itself, in all ways that a GPU changes; then sample from it."""
    with tempfile.TemporaryDirectory() as folder:
        yield from runs_of_the_toy(check, Path(folder), check.device.type)


def runs_of_the_toy(check: Check, folder: Path, here: str):
    base = toy_run(check, folder / "cpu", "--device=cpu", "--dtype=float32")
    runs = {"fp32": ["--dtype=float32"], "bf16": [], "fp32, packed": ["--dtype=float32", "--pack"],
            "bf16, packed": ["--pack"], "bf16, lean": ["--optimizer=lean"],
            "bf16, activations recomputed": ["--checkpoint_activations=full"],
            "bf16, two gradients": ["--objective=two_gradients"]}
    for name, options in runs.items():
        with reported() as problem:
            found = toy_run(check, folder / name.replace(", ", "_"), f"--device={here}", *options)
            away = max(abs(a - b) for a, b in zip(found["loss"], base["loss"]))
            limit = 1e-3 if "fp32" in name else 0.1
            yield Figure(f"{name}: largest difference of the loss from fp32 on the CPU, "
                         f"{len(found['loss'])} steps", away, "", limit,
                         "another objective" if "two" in name else "limit")
            yield Figure(f"{name}: held-out loss at the end", found["held_out"], "",
                         base["held_out"], "on the CPU")
        yield from problem
    with reported() as problem:
        toy_run(check, folder / "lora", f"--device={here}", f"--init_from={folder / 'fp32'}",
                "--tokenizer=", "--preset=tiny", "--lora_rank=4", "--lr=1e-4")
        yield Figure("LoRA on the GPU's own checkpoint", "ran")
    yield from problem

    prompts = [example.prompt for example in toy.load("test")[:8]]
    answers = {}
    for name, where, dtype in (("CPU", "cpu", "float32"), ("fp32", here, "float32"),
                               ("bf16", here, "bfloat16")):
        with reported() as problem:
            model, tok = load_model(str(folder / "fp32"), where, dtype=dtype)
            for cache in ("none", "dual"):
                s = Sampling(32, 16, 32, cache=cache)
                answers[name, cache] = complete(model, tok, prompts, s)
                same = sum(a == b for a, b in zip(answers[name, cache], answers["CPU", cache]))
                yield Figure(f"answers of {name}, cache {cache}: equal to the CPU's", same, "",
                             len(prompts), "questions")
        yield from problem


@contextlib.contextmanager
def reported():
    """Turn an error of a block into one Figure, in the list that the block is given."""
    found = []
    try:
        yield found
    except (TimeoutError, GeneratorExit, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:
        text = (str(error).strip() or "no message").splitlines()[0][:200]
        found.append(Figure("error", f"{type(error).__name__}: {text}",
                            of=place_of(traceback.extract_tb(error.__traceback__))))


def toy_run(check: Check, out_dir: Path, *options) -> dict:
    """Train the toy for a few steps by train.py -> its losses by step, the last held-out loss."""
    small = ["--n_layer=1", "--n_embd=32"] * check.dry
    if any(option.startswith("--init_from") for option in options):
        small = []
    steps = 3 if check.dry else 20
    cfg = configure(TrainConfig, ["config/tiny.py", f"--out_dir={out_dir}", f"--max_steps={steps}",
                                  "--log_every=1", f"--eval_every={steps}", "--eval_rows=64",
                                  "--test_questions=0", *small, *options])
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), (
            contextlib.redirect_stderr(nowhere)):
        train.main(cfg)
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    held_out = [line["held_out"]["toy"]["0.5"] for line in lines if "held_out" in line]
    return {"loss": [line["loss"] for line in lines if "loss" in line], "held_out": held_out[-1]}


def tests(check: Check):
    """Run the tests that use a GPU, and two ranks with NCCL where there are two GPUs."""
    commands = {"tests that use a GPU": ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                                         "tests/test_likelihood.py", "-k", "cuda"]}
    if check.dry:
        commands = {"pytest is there": ["-m", "pytest", "--version"]}
    if check.is_cuda and torch.cuda.device_count() > 1:
        for name, options in (("two ranks, DDP", []), ("two ranks, sharded", ["--shard"])):
            commands[name] = ["-m", "torch.distributed.run", "--nproc_per_node=2", "train.py",
                              "config/tiny.py", "--max_steps=5", "--test_questions=0",
                              "--out_dir=out/gpu_check_ranks", "--overwrite", *options]
    for name, command in commands.items():
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                              timeout=120)
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or [""]
        yield Figure(name, f"exit code {done.returncode}: {last[0][:200]}")


PARTS = {"environment": environment, "parity": parity, "attention": attention,
         "bench": bench_steps, "memory": memory, "sampler": sampler, "waits": waits_of_a_step,
         "loop": loop, "compile": compiled_steps, "tests": tests}


if __name__ == "__main__":
    run(main, GPUCheckConfig)
