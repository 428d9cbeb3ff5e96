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

FLOPs are counted (FlopCounterMode: matrix products only) and printed beside the closed form. Tokens
are real ones. Peak memory, on CUDA, includes what all kinds share: model, moments, two copies.
"""
import copy
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import run  # first: it sets variables that torch reads

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from analysis.predict import gpu_of, head_flops, parameters, shape_of, trunk_flops
from jepa import DLLMJEPA, cosine_distance, pool
from model import NLL_CHUNK, DLLM, ModelConfig, diffusion_loss, forward_process, row_generators
from pretrained.device import pick_device, pick_dtype, to_device
from tasks import gsm8k
from tasks.common import Row, batch_at, collate

PAD_TO = 256                # tokens: max_length of train.py; longer rows are left out
T_CTX, T_TGT = 0.2, 0.7     # the paper's masking rates
N_PRED_LAYER = 2            # blocks of the predictor, as in train.py


@dataclass
class BenchConfig:
    preset: Literal["tiny", "llada-8b", "dream-7b"] = "tiny"  # of the model's shape
    n_layer: int = 0                    # 0: the preset's
    width: int = 0                      # n_embd, with an MLP of 2.75 times that; 0: the preset's
    vocab_size: int = 0                 # 0: the preset's; 32000 for tiny
    batch_size: int = 16                # rows of a step
    length: int = 166                   # tokens of every row without data_dir; GSM8K's mean
    data_dir: str = ""                  # folder with GSM8K's train.jsonl[.gz], for its real lengths
    pack: bool = False                  # plain, jepa and two gradients on packed rows, too
    checkpoint_activations: Literal["none", "selective", "full"] = "none"  # as in train.py
    compile: bool = False               # torch.compile each block, as in train.py
    steps: int = 7                      # timed steps of each kind, after one for warm-up
    seed: int = 42                      # of the weights, the batches and the masks
    device: str = "auto"                # cpu, cuda, mps; auto takes a GPU if there is one
    json: bool = False                  # print all numbers as one line of JSON at the end

    def __post_init__(self):
        if min(self.batch_size, self.steps) < 1 or not 3 <= self.length <= PAD_TO:
            raise ValueError(f"batch_size={self.batch_size} and steps={self.steps} must be at "
                             f"least 1, and length={self.length} from 3 to {PAD_TO}")


def main(cfg: BenchConfig):
    device = pick_device(cfg.device)
    config = shape_of(cfg.preset, cfg.n_layer, cfg.width, cfg.vocab_size)
    model = DLLM(config).init_weights(torch.Generator().manual_seed(cfg.seed)).to(device)
    model.compute_dtype = pick_dtype("auto", device)
    model.checkpoint_activations = cfg.checkpoint_activations
    rows = make_rows(cfg, config)
    steps = make_steps(cfg, model)
    name, peak = gpu_of(device)
    mean = sum(len(row.prompt) + len(row.answer) + 1 for row in rows) / len(rows)
    print(f"{name}, {torch.get_num_threads()} threads, {model.compute_dtype}, "
          f"{sum(parameters(config).values()):,} parameters, {cfg.batch_size} of {len(rows)} rows "
          f"of {mean:.0f} tokens on average, compile {'on' if cfg.compile else 'off'}")

    found = {}
    for kind, step in steps.items():
        found[kind] = {"flops": count_flops(step, batch_of(cfg, rows, 0)),
                       "closed_form": step_flops(kind, cfg, config, rows)}
    if cfg.compile:
        for network in (model, steps["jepa"].target, steps["straightforward"].target):
            for block in network.blocks:
                block.compile(dynamic=True)
    ratios = measure(cfg, rows, steps, found, device)
    ratios["flops_jepa_over_two_gradient"] = round(
        found["jepa"]["flops"] / found["two gradients"]["flops"], 4)

    print(f"\n{'':<16} {'ms':>9} {'tokens/s':>9} {'peak GB':>8} {'GFLOP':>9} {'closed form':>11} "
          f"{'MFU':>6}")
    for kind, of in found.items():
        of["mfu"] = of["closed_form"] / of["ms"] * 1000 / peak[0] if peak else None
        gb = f"{of['peak_gb']:.2f}" if of["peak_gb"] else "n/a"
        mfu = f"{of['mfu']:.1%}" if peak else "n/a"
        print(f"{kind:<16} {of['ms']:9.1f} {of['tokens_per_s']:9.0f} {gb:>8} "
              f"{of['flops'] / 1e9:9.2f} {of['closed_form'] / 1e9:11.2f} {mfu:>6}")
    print("\n" + "\n".join(f"{name:<30} {value:.3f}" for name, value in ratios.items()))
    if cfg.json:
        print(json.dumps({"ratios": ratios, "steps": found, "device": name,
                          "dtype": str(model.compute_dtype), "settings": vars(cfg)}))


# ----------------------------------------------------------------------------------------------
# rows and steps


def make_rows(cfg: BenchConfig, config: ModelConfig) -> list[Row]:
    """Make rows of random tokens: of the lengths of GSM8K's training rows, or all of one length.

    A word, a digit or a sign counts as a token.
    """
    if cfg.data_dir:
        count = re.compile(r"[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]|\n").findall
        lengths = [(len(count(row.prompt)), len(count(row.answer)))
                   for row in gsm8k.load("train", cfg.data_dir)]
    else:
        lengths = [(cfg.length // 3, cfg.length - cfg.length // 3 - 1)] * 256
    ids = torch.randint(2, config.vocab_size - 1, (PAD_TO,),
                        generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    ids = [i + (i >= config.mask_id) for i in ids]  # never the mask
    return [Row(i, ids[:p], ids[p:p + a]) for i, (p, a) in enumerate(lengths) if p + a < PAD_TO]


def batch_of(cfg: BenchConfig, rows, step: int):
    """Make the arguments of a step, the same for all kinds: a batch and its masks' generators."""
    some, _ = batch_at(step, rows, cfg.batch_size, cfg.seed)
    batch = collate(some, 0, PAD_TO, eos_id=0)
    return *batch, row_generators(cfg.seed, step, [row.example_id for row in some])


def make_steps(cfg: BenchConfig, model) -> dict:
    """Make all kinds of step by name. They share one model and one optimizer, to save memory."""
    device = model.embed.weight.device
    jepa = DLLMJEPA(model, 1.0, T_CTX, T_TGT, N_PRED_LAYER).to(device)
    plain = DLLMJEPA(model, 0.0, T_CTX)
    optimizer = torch.optim.AdamW([p for p in jepa.parameters() if p.requires_grad], lr=1e-5,
                                  fused=device.type != "mps")
    return {
        "plain": Step(plain, plain, optimizer, cfg.pack),
        "naive plain": Step(plain, lambda *batch: naive_plain(jepa, *batch), optimizer),
        "jepa": Step(jepa, jepa, optimizer, cfg.pack),
        "two gradients": Step(plain, lambda *batch: two_gradients(jepa, *batch), optimizer,
                              cfg.pack),
        "jepa padded": Step(jepa, jepa, optimizer, pad_to=PAD_TO),
        "jepa packed": Step(jepa, jepa, optimizer, pack=True),
        "straightforward": Straightforward(jepa, optimizer),
    }


class Step:
    """One kind of training step: loss, gradient, AdamW, EMA."""

    def __init__(self, objective, loss, optimizer, pack: bool = False, pad_to: int = 0):
        self.objective, self.loss, self.optimizer = objective, loss, optimizer
        self.pack, self.pad_to, self.target = pack, pad_to, getattr(objective, "target", None)

    def forward_backward(self, x0, maskable, is_real, generator):
        for network in (self.objective.model, self.target):
            if network is not None:
                network.pack = self.pack
        more = max(0, self.pad_to - x0.shape[1])
        padded = [F.pad(x, (0, more)) for x in (x0, maskable, is_real)]
        self.loss(*padded, generator)[0].backward()

    def __call__(self, *batch):
        self.forward_backward(*batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_target()

    def update_target(self):
        self.objective.update_target()


class Straightforward(Step):
    """The JEPA step without any of the savings."""

    def __init__(self, jepa, optimizer):
        super().__init__(jepa, self.all_logits, optimizer, pad_to=PAD_TO)
        self.target = copy.deepcopy(jepa.model).float().requires_grad_(False)  # with its head
        self.online = jepa.model

    def all_logits(self, x0, maskable, is_real, generator):
        is_content = is_real & (x0 != self.online.config.eos_id)
        diffusion, h, is_masked = every_logit(self.objective, x0, maskable, is_real, generator)
        xt, is_masked_tgt = view(self.objective, x0, maskable, generator, T_TGT)
        with torch.no_grad():
            h_tgt = self.target.encode(xt, is_real)
            self.target.unembed(h_tgt)  # a published model's forward computes logits, too
            z_tgt = pool(h_tgt, is_content & ~is_masked_tgt)
        z_hat = self.objective.predictor(pool(h, is_content & ~is_masked))
        return diffusion + cosine_distance(z_hat, z_tgt), {}

    @torch.no_grad()
    def update_target(self):
        for p, online in zip(self.target.parameters(), self.online.parameters()):
            p.mul_(0.996).add_(online.float() * (1 - 0.996))


def view(objective, x0, maskable, generator, t: float):
    """Mask at rate t, at least one token -> xt, is_masked."""
    return forward_process(x0, torch.full((len(x0),), t), maskable, objective.model.config.mask_id,
                           generator, at_least_one=True)


def every_logit(objective, x0, maskable, is_real, generator):
    """Compute the diffusion loss from all (B, T, V) logits -> loss, h, is_masked."""
    model = objective.model
    xt, is_masked = view(objective, x0, maskable, generator, T_CTX)
    h = model.encode(xt, is_real)
    nll = F.cross_entropy(model.unembed(h).transpose(1, 2), to_device(x0, h.device),
                          reduction="none")  # (B, T)
    where = to_device(is_masked, h.device)
    return ((nll * where).sum(dim=1) / where.sum(dim=1)).mean(), h, is_masked


def naive_plain(objective, x0, maskable, is_real, generator):
    return every_logit(objective, x0, maskable, is_real, generator)[:1]


def two_gradients(objective, x0, maskable, is_real, generator):
    """LLM-JEPA's objective on our views: no EMA copy, the target view has a gradient as well."""
    model, is_content = objective.model, is_real & (x0 != objective.model.config.eos_id)
    xt, is_masked = view(objective, x0, maskable, generator, T_CTX)
    xt_tgt, is_masked_tgt = view(objective, x0, maskable, generator, T_TGT)
    h, h_tgt = model.encode(xt, is_real), model.encode(xt_tgt, is_real)
    t = torch.full((len(x0),), T_CTX)
    diffusion = diffusion_loss(model.nll(h, x0, is_masked), is_masked, maskable, t)
    z_hat = objective.predictor(pool(h, is_content & ~is_masked))
    return diffusion + cosine_distance(z_hat, pool(h_tgt, is_content & ~is_masked_tgt)), {}


# ----------------------------------------------------------------------------------------------
# measured


def measure(cfg: BenchConfig, rows, steps: dict, found: dict, device) -> dict:
    """Time the kinds in turns; add ms, tokens_per_s and peak_gb to `found` -> ratios of times."""
    is_cuda = device.type == "cuda"
    synchronize = getattr(torch, device.type).synchronize  # torch.cpu has one, too
    ms, n_tokens = {kind: [] for kind in steps}, []
    for i in range(cfg.steps + 1):
        for kind, step in steps.items():
            batch = batch_of(cfg, rows, i)
            if is_cuda:
                torch.cuda.reset_peak_memory_stats(device)
            synchronize()
            began = time.perf_counter()
            step(*batch)
            synchronize()
            ms[kind].append(1000 * (time.perf_counter() - began))
            found[kind]["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if is_cuda else 0
        n_tokens.append(batch[2].sum().item())
    for kind in steps:  # without the first, the warm-up
        speeds = [1000 * n / each for n, each in zip(n_tokens[1:], ms[kind][1:])]
        found[kind]["ms"] = round(statistics.median(ms[kind][1:]), 2)
        found[kind]["tokens_per_s"] = round(statistics.median(speeds), 1)

    def over(one, other):  # on the same rows, one right after the other
        return round(statistics.median(a / b for a, b in zip(ms[one][1:], ms[other][1:])), 4)
    return {"jepa_over_plain": over("jepa", "plain"),
            "jepa_over_naive_plain": over("jepa", "naive plain"),
            "packed_over_padded": over("jepa padded", "jepa packed"),  # of tokens per second
            "over_straightforward": over("straightforward", "jepa packed")}


def count_flops(step: Step, batch) -> int:
    """Count forward and backward, with attention as matrix products, which every counter knows."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step.forward_backward(*batch)
    step.optimizer.zero_grad()
    return counter.get_total_flops()


def step_flops(kind: str, cfg: BenchConfig, config: ModelConfig, rows, step: int = 0) -> int:
    """FLOPs of forward and backward of a step; a backward costs two forwards."""
    x0, maskable, is_real, generator = batch_of(cfg, rows, step)
    t = torch.full((len(x0),), T_CTX)
    n_masked = forward_process(x0, t, maskable, config.mask_id, generator, True)[1].sum().item()
    is_packed = kind == "jepa packed" or cfg.pack and kind in ("plain", "jepa", "two gradients")
    T = PAD_TO if kind in ("jepa padded", "straightforward") else x0.shape[1]
    lengths = is_real.sum(dim=1).tolist() if is_packed else [T] * len(x0)
    trunk = trunk_flops(config, lengths)
    n_again = {"none": 0, "selective": (config.n_layer + 1) // 2, "full": config.n_layer}[
        cfg.checkpoint_activations]  # blocks that are computed twice, but for their last product
    again = n_again * (trunk / config.n_layer - 2 * config.n_embd * config.n_hidden * sum(lengths))
    predictor = 3 * 20 * config.n_embd ** 2 * N_PRED_LAYER * len(x0)
    if kind in ("naive plain", "straightforward"):
        head = 3 * head_flops(config, len(x0) * T)
    else:  # logits in chunks are computed twice
        head = (3 + (n_masked > NLL_CHUNK)) * head_flops(config, n_masked)
    with_gradient = 3 * trunk + again
    return round({
        "plain": with_gradient + head, "naive plain": with_gradient + head,
        "jepa": with_gradient + trunk + head + predictor,
        "two gradients": 2 * with_gradient + head + predictor,
        "straightforward": with_gradient + trunk + head + head / 3 + predictor,
    }["jepa" if kind in ("jepa padded", "jepa packed") else kind])


if __name__ == "__main__":
    run(main, BenchConfig)
