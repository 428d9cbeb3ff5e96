"""Bench of sampling: tokens per second of each way to sample, side by side in one run.

    python analysis/bench_sampling.py                                a CPU, a random mid-size model
    python analysis/bench_sampling.py --preset=llada-8b              its shape, on a GPU

    straightforward  the published loop as usually written: logits of every token, a softmax over
                     the vocabulary in fp64, a Python loop over the rows
    exact            sample.py without shortcuts: the same tokens
    prefix, dual     with a cache, as many tokens per pass as exact
    dual, n a pass   the same with `per_pass` tokens per pass, as many as a threshold may reveal: a
                     random model is never sure, so here a fixed number is revealed

`as exact` is the share of tokens equal to the exact sampler's. A random model has many near-ties,
so it is far lower here than for a trained model. On a GPU `floor` is the least possible time as a
share of the measured: each pass reads all weights once and does all products, at the peak rates.
"""
import json
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
from tqdm import tqdm

from analysis.predict import gpu_of, head_dim, head_flops, layer_matrices, shape_of
from model import DLLM, ModelConfig
from pretrained.device import pick_device, pick_dtype
from sample import generate
from sampling.prompts import check_prompts
from sampling.reveal import Sampling, check_lengths


@dataclass
class SamplingBenchConfig:
    preset: Literal["tiny", "llada-8b", "dream-7b"] = "tiny"  # of the model's shape
    n_layer: int = 0                    # 0: the preset's
    width: int = 512                    # n_embd of tiny, with an MLP of 2.75 times that
    vocab_size: int = 32000             # of tiny
    batch_size: int = 1                 # prompts at a time
    prompt_length: int = 800            # tokens of each prompt
    gen_length: int = 256               # tokens to generate
    block_length: int = 32              # a block is finished before the next begins
    blocks: int = 2                     # time only the first blocks; all cost the same
    per_pass: float = 2.77              # tokens per pass of the last way (Fast-dLLM's on GSM8K)
    runs: int = 1                       # runs of each way, in turns; medians are printed
    seed: int = 42                      # of the weights and the prompts
    device: str = "auto"                # cpu, cuda, mps; auto takes a GPU if there is one
    json: bool = False                  # print all numbers as one line of JSON at the end

    def __post_init__(self):
        most = self.gen_length // max(1, self.block_length)
        if not 1 <= self.blocks <= most or min(self.batch_size, self.prompt_length, self.runs) < 1:
            raise ValueError(f"blocks={self.blocks} must lie in 1..{most}, the blocks of "
                             f"gen_length={self.gen_length}, and batch_size, prompt_length and "
                             f"runs must be at least 1")
        if not 1 <= self.per_pass <= self.block_length:
            raise ValueError(f"per_pass={self.per_pass} must lie in 1..{self.block_length}, the "
                             f"tokens of a block")
        check_lengths(self.gen_length, self.block_length, self.gen_length)
        if self.width < 1 or self.vocab_size < 3:
            raise ValueError(f"width={self.width} must be at least 1, and vocab_size="
                             f"{self.vocab_size} at least 3: a token besides mask and end of text")


def main(cfg: SamplingBenchConfig):
    device = pick_device(cfg.device)
    sizes = (cfg.width, cfg.vocab_size) if cfg.preset == "tiny" else (0, 0)
    config = shape_of(cfg.preset, cfg.n_layer, *sizes)
    check_prompts(config, [range(cfg.prompt_length)], cfg.gen_length)  # before 8 B are made
    model = random_model(config, device, cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    prompts = torch.randint(2, config.vocab_size, (cfg.batch_size, cfg.prompt_length),
                            generator=generator)
    passes = max(1, round(cfg.block_length / cfg.per_pass))  # of a block
    fast = f"dual, {cfg.block_length / passes:.2f} a pass"
    ways = {"straightforward": lambda: straightforward(model, prompts, cfg),
            "exact": lambda: first_blocks(model, prompts, cfg, "none", cfg.block_length),
            "prefix": lambda: first_blocks(model, prompts, cfg, "prefix", cfg.block_length),
            "dual": lambda: first_blocks(model, prompts, cfg, "dual", cfg.block_length),
            fast: lambda: first_blocks(model, prompts, cfg, "dual", passes)}
    device_name, peaks = gpu_of(device)
    print(f"{device_name}, {torch.get_num_threads()} threads, {model.compute_dtype}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, {cfg.batch_size} x "
          f"{cfg.prompt_length} + {cfg.gen_length} tokens, {cfg.blocks} blocks of "
          f"{cfg.block_length}")

    warm_up = Sampling(cfg.block_length, cfg.block_length, min(2, cfg.block_length), cache="dual")
    generate(model, prompts, warm_up)
    found = {name: {"seconds": []} for name in ways}
    for name in tqdm([name for _ in range(cfg.runs) for name in ways], unit="way"):
        began = time.perf_counter()
        tokens, found[name]["passes"] = ways[name]()
        found[name]["tokens"] = tokens.cpu()  # synchronises
        found[name]["seconds"].append(time.perf_counter() - began)
    exact = found["exact"]["tokens"]
    print(f"\n{'':<18} {'seconds':>8} {'passes':>7} {'tokens/s':>9} {'over exact':>11} "
          f"{'as exact':>9} {'floor':>7}")
    for name, of in found.items():
        of["seconds"] = statistics.median(of["seconds"])
        of["tokens_per_s"] = exact.numel() / of["seconds"]
    for name, of in found.items():
        of["over_exact"] = found["exact"]["seconds"] / of["seconds"]
        of["as_exact"] = (of.pop("tokens") == exact).float().mean().item()
        of["floor"] = peaks and (floor_seconds(cfg, config, name, of["passes"], *peaks)
                                 / of["seconds"])
        floor = f"{of['floor']:.1%}" if peaks else "n/a"
        print(f"{name:<18} {of['seconds']:8.2f} {of['passes']:7} {of['tokens_per_s']:9.1f} "
              f"{of['over_exact']:11.2f} {of['as_exact']:9.1%} {floor:>7}")
    ratios = {"exact_over_straightforward": 1 / found["straightforward"]["over_exact"],
              "dual_over_exact": found["dual"]["over_exact"],
              "fast_over_exact": found[fast]["over_exact"]}
    ratios = {name: round(value, 3) for name, value in ratios.items()}
    print("\n" + "\n".join(f"{name:<30} {value:.2f}" for name, value in ratios.items()))
    if cfg.json:
        print(json.dumps({"ratios": ratios, "ways": found, "device": device_name,
                          "dtype": str(model.compute_dtype), "settings": vars(cfg)}))


def random_model(config: ModelConfig, device, seed: int) -> DLLM:
    """Make a model with random weights on the device; on a CPU 8 B would take minutes."""
    dtype = pick_dtype("auto", device)
    with torch.device("meta"):
        model = DLLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02, generator=generator)
        else:
            torch.nn.init.ones_(p)
    model.compute_dtype = dtype
    return model


def first_blocks(model, prompts, cfg: SamplingBenchConfig, cache: str, passes: int):
    """Generate the first blocks -> their tokens (B, blocks * block_length), number of passes.

    An exception ends `generate` after them, so that no more is computed.
    """
    class Enough(Exception):
        pass
    seen = []

    def on_step(x, p):
        seen.append(x)
        if len(seen) > cfg.blocks * passes:  # the first call comes before any pass
            raise Enough
    steps = passes * (cfg.gen_length // cfg.block_length)
    try:
        generate(model, prompts, Sampling(cfg.gen_length, cfg.block_length, steps, cache=cache),
                 on_step=on_step)
    except Enough:
        pass
    return seen[-1][:, :cfg.blocks * cfg.block_length], len(seen) - 1


@torch.no_grad()
def straightforward(model, prompts, cfg: SamplingBenchConfig):
    """Reveal one token per pass, greedily: the published algorithm without any optimisation."""
    config, P = model.config, prompts.shape[1]
    masks = torch.full((len(prompts), cfg.gen_length), config.mask_id)
    x = torch.cat([prompts, masks], dim=1).to(model.embed.weight.device)
    for block in range(cfg.blocks):
        end = P + (block + 1) * cfg.block_length
        for _ in range(cfg.block_length):
            logits = model(x)  # (B, T, V)
            logits[..., config.mask_id] = -torch.inf
            proposal = logits.argmax(dim=-1)
            p = logits.double().softmax(dim=-1)
            confidence = p.gather(-1, proposal[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence[x != config.mask_id] = -torch.inf
            for b in range(len(x)):
                best = confidence[b].topk(1).indices
                x[b, best] = proposal[b, best]
    return x[:, P:end], cfg.blocks * cfg.block_length


def floor_seconds(cfg: SamplingBenchConfig, config: ModelConfig, way: str, passes: int,
                  flops_per_s: float, bytes_per_s: float) -> float:
    """Predict the least time of all passes: reading weights (bf16) or products, the longer one."""
    in_blocks, T = config.n_layer * layer_matrices(config), cfg.prompt_length + cfg.gen_length
    read = 2 * (in_blocks + config.vocab_size * config.n_embd) / bytes_per_s

    def one_pass(n_tokens):  # that are computed of each row
        attention = 4 * config.n_layer * n_tokens * T * config.n_head * head_dim(config)
        flops = 2 * n_tokens * in_blocks + attention + head_flops(config, cfg.block_length)
        return max(read, cfg.batch_size * flops / flops_per_s)
    if way.startswith("dual"):
        return cfg.blocks * one_pass(T) + (passes - cfg.blocks) * one_pass(cfg.block_length)
    if way == "prefix":
        after = sum(one_pass(cfg.gen_length - i * cfg.block_length) for i in range(cfg.blocks))
        return cfg.blocks * one_pass(T) + (passes // cfg.blocks - 1) * after
    return passes * one_pass(T)


if __name__ == "__main__":
    run(main, SamplingBenchConfig)
