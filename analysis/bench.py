"""Bench of training: time, memory and FLOPs of a step, measured side by side.

    python analysis/bench.py --width=256 --data_dir=data/gsm8k      a CPU, a large vocabulary
    python analysis/bench.py --preset=llada-8b --n_layer=4          as many layers as a GPU holds

Seven kinds of step take turns on the same batches, so that all meet the same machine. Each is a
whole step with AdamW and EMA; medians are printed:

    plain            diffusion fine-tuning: logits at masked tokens only
    naive plain      the same with logits at every position
    jepa             ours: one pass with gradient (3F), one without (F)
    two gradients    LLM-JEPA's way: both views through one model, both with gradient (6F)
    jepa padded      rows padded to PAD_TO tokens, as is common
    jepa packed      rows end to end, without padding
    straightforward  JEPA without any savings: padded to PAD_TO, logits at every position and in the
                     target too, EMA parameter by parameter

FLOPs are counted (FlopCounterMode: matrix products only) and printed beside the closed form, and
the share that they are of the machine's own matrix products, measured in the same run. Peak memory
includes what all kinds share: model, moments, two copies.
"""
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import run  # first: it sets variables that torch reads

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from analysis.console import print_table
from analysis.predict import (COUNT, check_ranges, head_flops, name_of, parameters, shape_of,
                              trunk_flops)
from jepa import DLLMJEPA, pool
from model import NLL_CHUNK, DLLM, ModelConfig, RMSNorm, forward_process, row_generators
from pretrained.device import pick_device, pick_dtype, to_device
from tasks import gsm8k
from tasks.common import Row, batch_at, collate
from training.setup import compile_blocks

SEED = 42                   # of the weights, the batches and the masks
LENGTH = 166                # tokens of every row without data_dir: GSM8K's mean
PAD_TO = 256                # tokens: max_length of train.py; longer rows are left out
T_CTX, T_TGT = 0.2, 0.7     # the paper's masking rates
N_PRED_LAYER = 2            # blocks of the predictor, as in train.py


@dataclass
class BenchConfig:
    preset: Literal["tiny", "llada-8b", "dream-7b"] = "tiny"  # of the model's shape
    n_layer: int = 0                    # 0: the preset's
    width: int = 0                      # n_embd, with an MLP of 2.75 times that; 0: the preset's
    batch_size: int = 16                # rows of a step
    data_dir: str = ""                  # folder with GSM8K's train.jsonl[.gz], for its real lengths
    pack: bool = False                  # plain, jepa and two gradients on packed rows, too
    checkpoint_activations: Literal["none", "selective", "full"] = "none"  # as in train.py
    compile: bool = False               # torch.compile each block, as in train.py
    steps: int = 7                      # timed steps of each kind, after one for warm-up
    device: str = "auto"                # cpu, cuda, mps; auto takes a GPU if there is one
    json: bool = False                  # print all numbers as one line of JSON at the end

    def __post_init__(self):
        check_ranges(self, n_layer=(0, 1000), width=(0, 1 << 16), batch_size=(1, 1 << 16),
                     steps=(1, 1_000_000))


def main(cfg: BenchConfig):
    device = pick_device(cfg.device)
    config = shape_of(cfg.preset, cfg.n_layer, cfg.width)
    rows = make_rows(cfg, config)
    model = random_model(config, device)
    model.checkpoint_activations = cfg.checkpoint_activations
    steps = make_steps(cfg, model)
    name, peak = name_of(device), matmul_speed(device, model.compute_dtype)
    print(f"{name}, {torch.get_num_threads()} threads, {model.compute_dtype}, "
          f"{sum(parameters(config).values()):,} parameters, {cfg.batch_size} of {len(rows)} rows, "
          f"compile {'on' if cfg.compile else 'off'}; matrix products: {peak / 1e12:.3g} TFLOP/s\n")

    found = {kind: {"flops": count_flops(step, batch_of(cfg, rows, 0)),
                    "closed_form": step_flops(kind, cfg, config, rows)}
             for kind, step in steps.items()}
    if cfg.compile:
        compile_steps(steps)
    measure(cfg, rows, steps, found, device)

    table = [["", "ms", "/ plain", "tokens/s", "peak GB", "GFLOP", "closed form", "of peak"]]
    for kind, of in found.items():
        of["of_peak"] = of["closed_form"] / of["ms"] * 1000 / peak
        table.append([kind, f"{of['ms']:.1f}", f"{of['over_plain']:.3f}",
                      f"{of['tokens_per_s']:.0f}",
                      f"{of['peak_gb']:.2f}" if of["peak_gb"] else "n/a",
                      f"{of['flops'] / 1e9:.2f}", f"{of['closed_form'] / 1e9:.2f}",
                      f"{of['of_peak']:.1%}"])
    print_table(table)
    if cfg.json:
        print(json.dumps({"steps": found, "device": name, "dtype": str(model.compute_dtype),
                          "matmul_flops_per_s": peak,
                          "settings": vars(cfg)}))


# ----------------------------------------------------------------------------------------------
# model, rows and steps


def random_model(config: ModelConfig, device, dtype=torch.float32) -> DLLM:
    """Make a model with random weights on the device, where 8 B are drawn in seconds."""
    with torch.device("meta"):
        model = DLLM(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie()                                     # to_empty has made two tensors of one
    for module in model.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.ones_(module.weight)
    model.compute_dtype = pick_dtype("auto", device)
    return model.init_weights(torch.Generator(device).manual_seed(SEED))


def compile_steps(steps: dict):
    """Compile each block of all networks, as train.py does."""
    compile_blocks(*{net for step in steps.values() for net in step.networks()})


def make_rows(cfg: BenchConfig, config: ModelConfig) -> list[Row]:
    """Make rows of random tokens: of the lengths of GSM8K's training rows, or all of one length.

    A word, a digit or a sign counts as a token.
    """
    lengths = [(LENGTH // 3, LENGTH - LENGTH // 3 - 1)] * 256
    if cfg.data_dir:
        lengths = [(len(COUNT(row.prompt)), len(COUNT(row.answer)))
                   for row in gsm8k.load("train", cfg.data_dir)]
    rows = random_rows(config, [pair for pair in lengths if sum(pair) < PAD_TO])
    if not rows:
        raise ValueError(f"no row of {cfg.data_dir} has fewer than {PAD_TO} tokens")
    return rows


def random_rows(config: ModelConfig, lengths) -> list[Row]:
    """Make a row of random tokens for each (tokens of the prompt, of the answer)."""
    ids = torch.randint(2, config.vocab_size - 1, (PAD_TO,),
                        generator=torch.Generator().manual_seed(SEED)).tolist()
    ids = [i + (i >= config.mask_id) for i in ids]  # never the mask
    return [Row(i, ids[:p], ids[p:p + a]) for i, (p, a) in enumerate(lengths)]


def batch_of(cfg: BenchConfig, rows, step: int):
    """Make the arguments of a step, the same for all kinds: a batch and its masks' generators."""
    some, _ = batch_at(step, rows, cfg.batch_size, SEED)
    batch = collate(some, 0, PAD_TO, eos_id=0)
    return *batch, row_generators(SEED, step, [row.example_id for row in some])


def make_steps(cfg: BenchConfig, model) -> dict:
    """Make all kinds of step by name. They share one model and one optimizer, to save memory."""
    device = model.embed.weight.device
    jepa = DLLMJEPA(model, 1.0, T_CTX, T_TGT, N_PRED_LAYER).to(device)
    plain, naive_plain = DLLMJEPA(model, 0.0, T_CTX), Naive(model, 0.0, T_CTX)
    naive = Naive(model, 1.0, T_CTX, T_TGT, n_pred_layer=0)
    naive.predictor = jepa.predictor
    naive.target = copy.deepcopy(model).float().requires_grad_(False)  # with its head
    optimizer = torch.optim.AdamW([p for p in jepa.parameters() if p.requires_grad], lr=1e-5,
                                  fused=True)
    both = partial(two_gradients, jepa)
    return {
        "plain": Step(plain, optimizer, plain, cfg.pack),
        "naive plain": Step(naive_plain, optimizer, naive_plain),
        "jepa": Step(jepa, optimizer, jepa, cfg.pack),
        "two gradients": Step(plain, optimizer, both, cfg.pack),  # plain has no EMA to update
        "jepa padded": Step(jepa, optimizer, jepa, pad_to=PAD_TO),
        "jepa packed": Step(jepa, optimizer, jepa, pack=True),
        "straightforward": Step(naive, optimizer, naive, pad_to=PAD_TO),
    }


@dataclass
class Step:
    """One kind of training step: loss, gradient, AdamW, EMA."""
    objective: DLLMJEPA
    optimizer: torch.optim.Optimizer
    loss: Callable
    pack: bool = False
    pad_to: int = 0

    def networks(self) -> list:
        """List the online model and the target, if there is one."""
        return [net for net in self.objective.modules() if isinstance(net, DLLM)]

    def forward_backward(self, x0, maskable, is_real, generator):
        for network in self.networks():
            network.pack = self.pack
        more = max(0, self.pad_to - x0.shape[1])
        padded = [F.pad(x, (0, more)) for x in (x0, maskable, is_real)]
        loss, _ = self.loss(*padded, generator)
        loss.backward()

    def __call__(self, *batch):
        self.forward_backward(*batch)
        self.update()

    def update(self):
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.update_target()


class Naive(DLLMJEPA):
    """The objective without savings: logits at every position of both views, a simple EMA."""

    def diffusion_term(self, h, x0, is_masked, maskable, t):
        x0, where = to_device(x0, h.device), to_device(is_masked, h.device)
        logits = self.model.unembed(h)  # (B, T, V)
        nll = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")  # (B, T)
        return ((nll * where).sum(dim=1) / where.sum(dim=1)).mean()

    @torch.no_grad()
    def embed_target(self, x0, maskable, is_real, generator):
        xt, is_masked = self.target_view(x0, maskable, generator)
        h = self.target.encode(xt, is_real)
        self.target.unembed(h)  # a published model's forward computes logits, too
        return pool(h, is_real & ~is_masked)

    @torch.no_grad()
    def update_target(self):
        pairs = zip(self.target.parameters(), self.model.parameters()) if self.lambda_jepa else ()
        for p, online in pairs:
            p.mul_(self.ema_decay).add_(online.float() * (1 - self.ema_decay))


def two_gradients(jepa, x0, maskable, is_real, generator):
    """LLM-JEPA's objective on our views: no EMA copy, the target view has a gradient as well."""
    xt, is_masked = jepa.target_view(x0, maskable, generator)
    z_tgt = pool(jepa.model.encode(xt, is_real), is_real & ~is_masked)
    return jepa(x0, maskable, is_real, generator, z_tgt)


# ----------------------------------------------------------------------------------------------
# measured


def measure(cfg: BenchConfig, rows, steps: dict, found: dict, device):
    """Time the kinds in turns; add ms, over_plain, tokens_per_s and peak_gb to `found`."""
    is_cuda = device.type == "cuda"
    synchronize = getattr(torch, device.type).synchronize  # torch.cpu has one, too
    ms, n_tokens = {kind: [] for kind in steps}, []
    for i in range(cfg.steps + 1):
        for kind, step in steps.items():
            batch = batch_of(cfg, rows, i)  # new generators, which draw the same masks
            if is_cuda:
                torch.cuda.reset_peak_memory_stats(device)
            synchronize()
            began = time.perf_counter()
            step(*batch)
            synchronize()
            ms[kind].append(1000 * (time.perf_counter() - began))
            found[kind]["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if is_cuda else 0
        n_tokens.append(batch[2].sum().item())
    for kind, of in found.items():  # without the first step, the warm-up
        of["ms"] = statistics.median(ms[kind][1:])
        of["over_plain"] = statistics.median(a / b for a, b in zip(ms[kind][1:], ms["plain"][1:]))
        of["tokens_per_s"] = statistics.median(
            1000 * n / each for n, each in zip(n_tokens[1:], ms[kind][1:]))


def matmul_speed(device, dtype, n: int = 0) -> float:
    """Measure FLOPs per second of products of n x n matrices; 0: of a size that fits the device.

    It is the best of five runs, so that other work on the machine does not count.
    """
    n, calls = (n or 8192, 10) if device.type == "cuda" else (n or 768, 1)
    synchronize = getattr(torch, device.type).synchronize
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):                      # the first is for warm-up
        synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            a @ b
        synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 * calls / min(seconds[1:])


def count_flops(step: Step, batch) -> int:
    """Count forward and backward, with attention as matrix products, which every counter knows."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step.forward_backward(*batch)
    step.optimizer.zero_grad()
    return counter.get_total_flops()


def step_flops(kind: str, cfg: BenchConfig, config: ModelConfig, rows) -> int:
    """FLOPs of forward and backward of the first step; a backward costs two forwards."""
    x0, maskable, is_real, generator = batch_of(cfg, rows, 0)
    t = torch.full((len(x0),), T_CTX)
    n_masked = forward_process(x0, t, maskable, config.mask_id, generator, True)[1].sum().item()
    is_packed = kind == "jepa packed" or cfg.pack and kind in ("plain", "jepa", "two gradients")
    T = PAD_TO if kind in ("jepa padded", "straightforward") else x0.shape[1]
    lengths = is_real.sum(dim=1).tolist() if is_packed else [T] * len(x0)

    trunk = trunk_flops(config, lengths)
    n_again = {"none": 0, "selective": (config.n_layer + 1) // 2, "full": config.n_layer}[
        cfg.checkpoint_activations]  # blocks that are computed twice, but for their last product
    again = n_again * (trunk / config.n_layer - 2 * config.n_embd * config.n_hidden * sum(lengths))
    if kind in ("naive plain", "straightforward"):
        head = 3 * head_flops(config, len(x0) * T)
    else:  # logits in chunks are computed twice
        head = (3 + (n_masked > NLL_CHUNK)) * head_flops(config, n_masked)
    flops = 3 * trunk + again + head
    if "plain" not in kind:
        second_view = 3 * trunk + again if kind == "two gradients" else trunk
        flops += second_view + 3 * 20 * config.n_embd ** 2 * N_PRED_LAYER * len(x0)  # predictor
    if kind == "straightforward":
        flops += head / 3
    return round(flops)


if __name__ == "__main__":
    run(main, BenchConfig)
