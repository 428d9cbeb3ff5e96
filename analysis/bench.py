"""What a step costs: time, memory and FLOPs, measured side by side, and predicted for 8 B.

    python analysis/bench.py --width=256 --data_dir=path/to/gsm8k     a CPU, a real vocabulary
    python analysis/bench.py --preset=llada-8b --n_layer=4            as much of it as a GPU holds

Seven steps take turns on the same rows, so that all meet the same machine; medians are printed:

    plain            diffusion fine-tuning: logits at masked tokens only
    naive plain      the same with logits at every position
    jepa             ours: one pass with gradient (3F), one without (F)
    two gradients    LLM-JEPA's way: both views through the same model, both with gradient (6F)
    jepa padded      rows padded to `pad_to`, as is common
    jepa packed      rows laid end to end
    straightforward  the JEPA step as first written down: padded to `pad_to`, logits at every
                     position, in the target too, an EMA parameter by parameter

Each is a whole step with AdamW and EMA. FLOPs are counted (FlopCounterMode, matrix products only)
and stand beside the closed form. Tokens are real ones: padding makes no step faster. Peak memory,
on CUDA, includes what all kinds share: one model, its moments and both copies of it.
"""
import copy
import json
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")         # as in train.py
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as model_module
from configurator import run
from jepa import DLLMJEPA, cosine_distance, pool
from model import DLLM, PRESETS, ModelConfig, diffusion_loss, forward_process, row_generators
from pretrained.device import pick_device, pick_dtype, to_device
from pretrained.tokenizer import load_tokenizer
from tasks import gsm8k
from tasks.common import Row, batch_at, collate

PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "4090": 165}    # bf16
MASKED = 0.12                       # share of GSM8K's tokens that t = 0.2 masks: answers are 59 %


@dataclass
class BenchConfig:
    # the shape
    preset: Literal["tiny", "llada-8b", "dream-7b"] = "tiny"  # of the model
    n_layer: int = 0                    # 0: the preset's
    width: int = 0                      # n_embd, with an MLP of 2.75 times that; 0: the preset's
    vocab_size: int = 0                 # 0: the preset's; 32000 for tiny
    batch_size: int = 16                # rows a step
    length: int = 166                   # tokens of every row (GSM8K's mean) when there is no data
    data_dir: str = ""                  # a folder with GSM8K's train.jsonl[.gz]: its real lengths
    tokenizer: str = ""                 # folder of the one that counts; empty: words, digits, signs
    eos_fill: bool = False              # answers as long as the longest of the batch (LLaDA's SFT)
    pad_to: int = 256                   # tokens; longer rows are left out
    # the step
    t_ctx: float = 0.2                  # masking rate of the context view
    t_tgt: float = 0.7                  # masking rate of the target view
    n_pred_layer: int = 2               # blocks of the predictor
    pack: bool = False                  # plain, jepa and two gradients on packed rows
    checkpoint_activations: Literal["none", "selective", "full"] = "none"  # as in train.py
    compile: bool = False               # torch.compile each block, as in train.py
    # the measurement
    steps: int = 7                      # timed of each kind, after one that is not
    mfu: float = 0.4                    # share of a GPU's peak assumed for predicted times
    seed: int = 42                      # of the weights, the batches and the masks
    device: str = "auto"                # cpu, cuda, mps; auto takes a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations
    json: bool = False                  # end with the numbers as one line of JSON

    def __post_init__(self):
        if min(self.batch_size, self.steps) < 1 or not 3 <= self.length <= self.pad_to:
            raise ValueError(f"batch_size={self.batch_size} and steps={self.steps} must be at "
                             f"least 1, and length={self.length} from 3 to pad_to={self.pad_to}")


def main(cfg: BenchConfig):
    device = pick_device(cfg.device)
    config = shape_of(cfg)
    model = DLLM(config).init_weights(torch.Generator().manual_seed(cfg.seed)).to(device)
    model.compute_dtype = pick_dtype(cfg.dtype, device)
    model.checkpoint_activations = cfg.checkpoint_activations
    rows = make_rows(cfg, config)
    steps = make_steps(cfg, model)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in gpu), None)
    mean = sum(len(row.prompt) + len(row.answer) + 1 for row in rows) / len(rows)
    print(f"{gpu or device.type}, {torch.get_num_threads()} threads, {model.compute_dtype}, "
          f"{sum(parameters(config).values()):,} parameters, {cfg.batch_size} of {len(rows)} rows "
          f"of {mean:.0f} tokens on average, compile {'on' if cfg.compile else 'off'}")

    found = {name: {"flops": count_flops(step, batch_of(cfg, rows, 0))}
             for name, step in steps.items()}
    for name in steps:
        found[name]["closed_form"] = step_flops(name, cfg, config, rows, step=0)
    if cfg.compile:
        for network in (model, steps["jepa"].target, steps["straightforward"].target):
            for block in network.blocks:
                block.compile(dynamic=True)
    ratios = measure(cfg, rows, steps, found, device)
    ratios["flops_jepa_over_two_gradient"] = (found["jepa"]["flops"]
                                              / found["two gradients"]["flops"])
    ratios = {name: round(value, 4) for name, value in ratios.items()}

    print(f"\n{'':<16} {'ms':>9} {'tokens/s':>9} {'peak GB':>8} {'GFLOP':>9} {'closed form':>11} "
          f"{'MFU':>6}")
    for name, of in found.items():
        gb = f"{of['peak_gb']:.2f}" if of["peak_gb"] else "n/a"
        of["mfu"] = of["closed_form"] / of["ms"] / 1e9 / peak if peak else None
        mfu = f"{of['mfu']:.1%}" if peak else "n/a"
        print(f"{name:<16} {of['ms']:9.1f} {of['tokens_per_s']:9.0f} {gb:>8} "
              f"{of['flops'] / 1e9:9.2f} {of['closed_form'] / 1e9:11.2f} {mfu:>6}")
    print("\n" + "\n".join(f"{name:<30} {value:.3f}" for name, value in ratios.items()))
    print("\n" + prediction(cfg.mfu))
    if cfg.json:
        print(json.dumps({"ratios": ratios, "steps": found, "device": gpu or device.type,
                          "dtype": str(model.compute_dtype), "settings": vars(cfg)}))


def shape_of(cfg: BenchConfig) -> ModelConfig:
    shape = {"vocab_size": 32000, "mask_id": 1, "eos_id": 0, **PRESETS[cfg.preset]}
    if cfg.vocab_size:
        shape |= {"vocab_size": cfg.vocab_size, "mask_id": 1, "eos_id": 0}
    if cfg.width:
        shape |= {"n_embd": cfg.width, "n_hidden": cfg.width * 11 // 4}
    return ModelConfig(**shape | ({"n_layer": cfg.n_layer} if cfg.n_layer else {}))


# ----------------------------------------------------------------------------------------------
# rows and steps


def make_rows(cfg: BenchConfig, config: ModelConfig) -> list[Row]:
    """Rows of random tokens, with the lengths of GSM8K's training rows or all of one length."""
    if cfg.data_dir:
        count = (load_tokenizer(cfg.tokenizer).encode if cfg.tokenizer
                 else re.compile(r"[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]|\n").findall)
        lengths = [(len(count(row.prompt)), len(count(row.answer)))
                   for row in gsm8k.load("train", cfg.data_dir)]
    else:
        lengths = [(cfg.length // 3, cfg.length - cfg.length // 3 - 1)] * 256
    ids = torch.randint(2, config.vocab_size - 1, (cfg.pad_to,),
                        generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    ids = [i + (i >= config.mask_id) for i in ids]              # never the mask itself
    return [Row(i, ids[:p], ids[p:p + a]) for i, (p, a) in enumerate(lengths)
            if p + a < cfg.pad_to]


def batch_of(cfg: BenchConfig, rows, step: int):
    """-> the arguments of a step: rows as for training, and the same masks for all its kinds."""
    some, fill = batch_at(step, rows, cfg.batch_size, cfg.seed)
    batch = collate(some, fill if cfg.eos_fill else 0, cfg.pad_to, eos_id=0)
    return *batch, row_generators(cfg.seed, step, [row.example_id for row in some])


def make_steps(cfg: BenchConfig, model) -> dict:
    """The kinds of step by name; one model and one optimizer serve them all, to save memory."""
    device = model.embed.weight.device
    jepa = DLLMJEPA(model, 1.0, cfg.t_ctx, cfg.t_tgt, cfg.n_pred_layer).to(device)
    plain = DLLMJEPA(model, 0.0, cfg.t_ctx)
    optimizer = torch.optim.AdamW([p for p in jepa.parameters() if p.requires_grad], lr=1e-5,
                                  fused=device.type != "mps")
    own = cfg.pack
    return {
        "plain": Step(plain, plain, optimizer, own),
        "naive plain": Step(plain, lambda *batch: naive_plain(jepa, *batch), optimizer, False),
        "jepa": Step(jepa, jepa, optimizer, own),
        "two gradients": Step(plain, lambda *batch: two_gradients(jepa, *batch), optimizer, own),
        "jepa padded": Step(jepa, jepa, optimizer, False, cfg.pad_to),
        "jepa packed": Step(jepa, jepa, optimizer, True),
        "straightforward": Straightforward(jepa, optimizer, cfg.pad_to),
    }


class Step:
    """One kind of whole step: loss, gradient, AdamW, EMA."""

    def __init__(self, objective, loss, optimizer, pack: bool, pad_to: int = 0):
        self.objective, self.loss, self.optimizer = objective, loss, optimizer
        self.pack, self.pad_to, self.target = pack, pad_to, getattr(objective, "target", None)

    def forward_backward(self, x0, maskable, is_real, generator):
        for network in (self.objective.model, self.target):
            if network is not None:
                network.pack = self.pack
        batch = pad_to(self.pad_to, x0, maskable, is_real)
        self.loss(*batch, generator)[0].backward()

    def __call__(self, *batch):
        self.forward_backward(*batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.update_target()


class Straightforward(Step):
    """The JEPA step without any of the savings."""

    def __init__(self, jepa, optimizer, length: int):
        super().__init__(jepa, self.all_logits, optimizer, False, length)
        self.target = copy.deepcopy(jepa.model).float().requires_grad_(False)   # with its head
        self.online = jepa.model

    def all_logits(self, x0, maskable, is_real, generator):
        is_content = is_real & (x0 != self.online.config.eos_id)
        diffusion, h, is_masked = every_logit(self.objective, x0, maskable, is_real, generator)
        xt, is_masked_tgt = view(self.objective, x0, maskable, generator, self.objective.t_tgt)
        with torch.no_grad():
            h_tgt = self.target.encode(xt, is_real)
            self.target.unembed(h_tgt)                          # comes with any model's forward
            z_tgt = pool(h_tgt, is_content & ~is_masked_tgt)
        z_hat = self.objective.predictor(pool(h, is_content & ~is_masked))
        return diffusion + cosine_distance(z_hat, z_tgt), {}

    def __call__(self, *batch):
        self.forward_backward(*batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for p, online in zip(self.target.parameters(), self.online.parameters()):
                p.mul_(0.996).add_(online.float() * (1 - 0.996))


def pad_to(length: int, *batch):
    """The batch with rows of this many tokens, if that is more; padding is 0 in all of them."""
    return [F.pad(x, (0, max(0, length - x.shape[1]))) for x in batch]


def view(objective, x0, maskable, generator, t: float):
    """-> xt, is_masked at rate t, with at least one token masked."""
    return forward_process(x0, torch.full((len(x0),), t), maskable, objective.model.config.mask_id,
                           generator, at_least_one=True)


def every_logit(objective, x0, maskable, is_real, generator):
    """The diffusion loss by way of (B, T, V) logits -> loss, h, is_masked."""
    model = objective.model
    xt, is_masked = view(objective, x0, maskable, generator, objective.t_ctx)
    h = model.encode(xt, is_real)
    nll = F.cross_entropy(model.unembed(h).transpose(1, 2), to_device(x0, h.device),
                          reduction="none")                     # (B, T)
    where = to_device(is_masked, h.device)
    return ((nll * where).sum(dim=1) / where.sum(dim=1)).mean(), h, is_masked


def naive_plain(objective, x0, maskable, is_real, generator):
    return every_logit(objective, x0, maskable, is_real, generator)[:1]


def two_gradients(objective, x0, maskable, is_real, generator):
    """LLM-JEPA's objective on our views: no copy, so the target view has a gradient as well."""
    model, is_content = objective.model, is_real & (x0 != objective.model.config.eos_id)
    xt, is_masked = view(objective, x0, maskable, generator, objective.t_ctx)
    xt_tgt, is_masked_tgt = view(objective, x0, maskable, generator, objective.t_tgt)
    h, h_tgt = model.encode(xt, is_real), model.encode(xt_tgt, is_real)
    diffusion = diffusion_loss(model.nll(h, x0, is_masked), is_masked, maskable, None)
    z_hat = objective.predictor(pool(h, is_content & ~is_masked))
    return diffusion + cosine_distance(z_hat, pool(h_tgt, is_content & ~is_masked_tgt)), {}


# ----------------------------------------------------------------------------------------------
# measured


def measure(cfg: BenchConfig, rows, steps: dict, found: dict, device) -> dict:
    """Fills in ms, tokens_per_s and peak_gb of each kind -> ratios of times; kinds take turns."""
    is_cuda = device.type == "cuda"
    wait = getattr(torch, device.type).synchronize              # torch.cpu has one too
    ms, n_tokens = {name: [] for name in steps}, []
    for i in range(cfg.steps + 1):
        for name, step in steps.items():
            batch = batch_of(cfg, rows, i)
            if is_cuda:
                torch.cuda.reset_peak_memory_stats(device)
            wait()
            began = time.perf_counter()
            step(*batch)
            wait()
            ms[name].append(1000 * (time.perf_counter() - began))
            found[name]["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if is_cuda else 0
        n_tokens.append(batch[2].sum().item())
    for name in steps:                                          # the first of each warmed up
        found[name]["ms"] = round(statistics.median(ms[name][1:]), 2)
        found[name]["tokens_per_s"] = round(statistics.median(
            1000 * n / each for n, each in zip(n_tokens[1:], ms[name][1:])), 1)

    def over(one, other):                                       # on the same rows, side by side
        return statistics.median(a / b for a, b in zip(ms[one][1:], ms[other][1:]))
    return {"jepa_over_plain": over("jepa", "plain"),
            "jepa_over_naive_plain": over("jepa", "naive plain"),
            "packed_over_padded": over("jepa padded", "jepa packed"),   # throughput
            "over_straightforward": over("straightforward", "jepa packed")}


def count_flops(step: Step, batch) -> int:
    """Of forward and backward. Attention as plain matrix products, which every counter knows."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step.forward_backward(*batch)
    step.optimizer.zero_grad()
    return counter.get_total_flops()


# ----------------------------------------------------------------------------------------------
# closed forms


def parameters(config: ModelConfig) -> dict:
    """How many parameters: {embed, layers, norm, head}."""
    C, D = config.n_embd, config.head_dim or config.n_embd // config.n_head
    bias = config.qkv_bias * (config.n_head + 2 * config.n_kv_head) * D
    norms = 2 * C + 2 * D * config.qk_norm
    return {"embed": config.vocab_size * C,
            "layers": config.n_layer * (layer_matrices(config) + bias + norms), "norm": C,
            "head": 0 if config.tied_head else config.vocab_size * C}


def layer_matrices(config: ModelConfig) -> int:
    """Entries of one layer's matrices: q, o, k, v and the three of the MLP."""
    C, D = config.n_embd, config.head_dim or config.n_embd // config.n_head
    return 2 * C * D * (config.n_head + config.n_kv_head) + 3 * C * config.n_hidden


def predictor_parameters(config: ModelConfig, n_layer: int) -> int:
    C = config.n_embd               # v, o, up and down with biases, two norms; the last norm
    return n_layer * (10 * C * C + 7 * C + 4 * C) + 2 * C * (n_layer > 0)


def trunk_flops(config: ModelConfig, lengths) -> int:
    """One forward of all layers over rows of these lengths: 2 a matrix entry and token, and
    4 T^2 H D for the two products of attention."""
    D = config.head_dim or config.n_embd // config.n_head
    return config.n_layer * sum(2 * layer_matrices(config) * T + 4 * T * T * config.n_head * D
                                for T in lengths)


def head_flops(config: ModelConfig, n: int) -> int:
    return 2 * config.vocab_size * config.n_embd * n


def step_flops(kind: str, cfg: BenchConfig, config: ModelConfig, rows, step: int = 0) -> int:
    """Forward and backward of one step of a kind; a backward costs two forwards."""
    x0, maskable, is_real, generator = batch_of(cfg, rows, step)
    t = torch.full((len(x0),), cfg.t_ctx)
    n_masked = forward_process(x0, t, maskable, config.mask_id, generator, True)[1].sum().item()
    packed = kind == "jepa packed" or cfg.pack and kind in ("plain", "jepa", "two gradients")
    T = max(x0.shape[1], cfg.pad_to) if kind in ("jepa padded", "straightforward") else x0.shape[1]
    lengths = is_real.sum(dim=1).tolist() if packed else [T] * len(x0)
    trunk = trunk_flops(config, lengths)
    again = {"none": 0, "selective": (config.n_layer + 1) // 2, "full": config.n_layer}[
        cfg.checkpoint_activations]         # blocks made again, up to their last product's input
    again *= trunk / config.n_layer - 2 * config.n_embd * config.n_hidden * sum(lengths)
    predictor = 3 * 20 * config.n_embd ** 2 * cfg.n_pred_layer * len(x0)
    if kind in ("naive plain", "straightforward"):
        head = 3 * head_flops(config, len(x0) * T)
    else:                                                       # in chunks: forward once more
        head = (3 + (n_masked > model_module.NLL_ROWS)) * head_flops(config, n_masked)
    with_gradient = 3 * trunk + again
    return round({
        "plain": with_gradient + head, "naive plain": with_gradient + head,
        "jepa": with_gradient + trunk + head + predictor,
        "two gradients": 2 * with_gradient + head + predictor,
        "straightforward": with_gradient + trunk + head + head / 3 + predictor,
    }[kind if kind not in ("jepa padded", "jepa packed") else "jepa"])


def activation_bytes(config: ModelConfig, size: int = 2) -> int:
    """What autograd keeps of one layer and token, with `size` bytes an activation.

    Each of two norms keeps its input in fp32, 1 / rms, the normed and the weighed; attention q, k,
    v, its output and log-sum-exp; the MLP gate, silu(gate), up and their product.
    """
    C, D = config.n_embd, config.head_dim or config.n_embd // config.n_head
    norms = 2 * (4 * C + 4 + 2 * size * C)
    attention = size * D * (2 * config.n_head + 2 * config.n_kv_head) + 4 * config.n_head
    return norms + attention + 4 * size * config.n_hidden


# ----------------------------------------------------------------------------------------------
# what fits where


@dataclass
class Setup:
    name: str
    gpu: str
    n_gpu: int
    memory: float                   # GB a GPU
    bytes_of: dict                  # per trained parameter: weights, grads, moments, ema
    n_pred_layer: int = 2
    checkpointed: bool = False      # activations, fully
    rank: int = 0                   # of LoRA adapters on every matrix of a layer; 0: none


FP32 = {"weights": 4, "grads": 4, "moments": 8, "ema": 4}    # sharded: bf16 in flight
SETUPS = [
    Setup("8 x A100-80, sharded", "A100", 8, 80, FP32),
    Setup("4 x A100-80, sharded", "A100", 4, 80, FP32),
    # weights in two halves, bf16 gradients and moments
    Setup("1 x H200, lean", "H200", 1, 141, {"weights": 4, "grads": 2, "moments": 4, "ema": 4}),
    Setup("1 x 24 GB, LoRA r16", "4090", 1, 24, FP32, n_pred_layer=1, checkpointed=True, rank=16),
]


def memory(setup: Setup, config: ModelConfig, tokens: int) -> dict:
    """GB on each GPU: {weights, grads, moments, ema, predictor, in flight, activations}.

    tokens: of one pass on one GPU. `in flight` is what sharding gathers in bf16: two layers,
    embedding and head. The EMA has no head. Logits exist three times in fp32 where loss is taken.
    """
    n, C = parameters(config), config.n_embd
    trained = sum(n.values())
    if setup.rank:
        D = config.head_dim or C // config.n_head
        ends = [(C, config.n_head * D), (C, config.n_kv_head * D), (C, config.n_kv_head * D),
                (config.n_head * D, C), (C, config.n_hidden), (C, config.n_hidden),
                (config.n_hidden, C)]
        trained = config.n_layer * setup.rank * sum(a + b for a, b in ends)
    without_head = trained - (0 if setup.rank else n["head"])
    of = setup.bytes_of
    gb = {key: of[key] * (without_head if key == "ema" else trained) / setup.n_gpu for key in of}
    if setup.rank:
        gb["weights"] += 2 * sum(n.values())                    # the base, frozen, in bf16
    gb["predictor"] = 16 * predictor_parameters(config, setup.n_pred_layer) / setup.n_gpu
    gb["in flight"] = 2 * (2 * n["layers"] / config.n_layer + n["embed"] + n["head"]) \
        if setup.n_gpu > 1 else 0
    layer = activation_bytes(config)
    kept = 2 * C * config.n_layer + layer if setup.checkpointed else config.n_layer * layer
    logits = 3 * 4 * config.vocab_size * min(round(MASKED * tokens), model_module.NLL_ROWS)
    gb["activations"] = tokens * kept + logits
    return {key: value / 1e9 for key, value in gb.items()}


def prediction(mfu: float, rows: int = 64, length: int = 166) -> str:
    """The table of memory and step time for LLaDA-8B on GSM8K, packed, at this share of peak."""
    config = ModelConfig(**PRESETS["llada-8b"])
    lines = [f"Predicted, not measured: LLaDA-8B, {rows} packed rows of {length} tokens a step, "
             f"at {mfu:.0%} of the GPUs' peak; GB on each GPU:"]
    for i, setup in enumerate(SETUPS):
        # without sharding rows are accumulated, eight at a time
        tokens = length * (rows // setup.n_gpu if setup.n_gpu > 1 else 8)
        gb = memory(setup, config, tokens)
        if i == 0:
            lines.append(f"{'':<20}" + "".join(f"{key:>12}" for key in gb)
                         + f"{'sum':>8}{'has':>5}{'plain':>8}{'jepa':>8}")
        trunk = trunk_flops(config, [length] * rows)
        # a frozen base has no gradients of weights: backward is one forward
        passes = (2 if setup.rank else 3) + setup.checkpointed
        plain = passes * trunk + 3 * head_flops(config, round(MASKED * rows * length))
        seconds = [x / (setup.n_gpu * PEAK_TFLOPS[setup.gpu] * 1e12 * mfu)
                   for x in (plain, plain + trunk)]
        lines.append(f"{setup.name:<20}" + "".join(f"{value:12.2f}" for value in gb.values())
                     + f"{sum(gb.values()):8.1f}{setup.memory:5.0f}"
                     + "".join(f"{s:6.2f} s" for s in seconds))
    trunk = trunk_flops(config, [length]) / length              # of one token
    head, few = 3 * head_flops(config, 1), 3 * MASKED * head_flops(config, 1)
    ratios = {"plain": 3 * trunk + few, "naive plain": 3 * trunk + head,
              "two gradients": 6 * trunk + few}
    lines.append("FLOPs of jepa there: " + ", ".join(
        f"{(4 * trunk + few) / flops:.3f} x {name}" for name, flops in ratios.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, BenchConfig)
