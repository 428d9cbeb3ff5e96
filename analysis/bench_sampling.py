"""What an answer costs: tokens per second of each way to sample, side by side in one run.

    python analysis/bench_sampling.py                                a CPU, a random mid-size model
    python analysis/bench_sampling.py --preset=llada-8b              its shape, on a GPU

    straightforward  the published loop as usually written: logits of every token, a softmax over
                     the vocabulary in fp64, a Python loop over the rows
    exact            sample.py without shortcuts: the same tokens
    prefix, dual     with a cache, as many tokens a pass as exact
    dual, n a pass   the same with `per_pass` tokens a pass, as many as a threshold may reveal: a
                     random model is never sure, so here a quota decides

`as exact` is the share of tokens that are the exact sampler's: on a random model, whose answers
hang on a hair, it is far lower than on a trained one. On a GPU `floor` is the share of the least
possible time: in each pass all weights are read once and all products made, at the peak rates.
"""
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")         # as in train.py
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import run
from model import DLLM, PRESETS, ModelConfig
from pretrained.device import pick_device, pick_dtype
from sample import check_prompts, generate
from sampling.reveal import check_lengths

# bf16 products per second, bytes of memory per second
PEAKS = {"A100": (312e12, 2.04e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}


@dataclass
class BenchConfig:
    preset: Literal["tiny", "llada-8b", "dream-7b"] = "tiny"  # of the model's shape
    n_layer: int = 0                    # 0: the preset's
    width: int = 512                    # n_embd of tiny, with an MLP of 2.75 times that
    vocab_size: int = 32000             # of tiny
    batch_size: int = 1                 # prompts at a time
    prompt_length: int = 800            # tokens of each
    gen_length: int = 256               # tokens to generate
    block_length: int = 32              # a block is finished before the next begins
    blocks: int = 2                     # so many are timed, from the first; all cost the same
    per_pass: float = 2.77              # tokens a pass of the last way (Fast-dLLM's on GSM8K)
    runs: int = 1                       # of each way, in turns; medians are printed
    seed: int = 42                      # of the weights and the prompts
    device: str = "auto"                # cpu, cuda, mps; auto takes a GPU if there is one
    json: bool = False                  # end with the numbers as one line of JSON

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


def main(cfg: BenchConfig):
    device = pick_device(cfg.device)
    config = shape_of(cfg)
    check_prompts(config, [range(cfg.prompt_length)], cfg.gen_length)       # before 8 B are made
    model = random_model(config, device, cfg.seed)
    generator = torch.Generator().manual_seed(cfg.seed)
    prompts = torch.randint(2, config.vocab_size, (cfg.batch_size, cfg.prompt_length),
                            generator=generator)
    passes = max(1, round(cfg.block_length / cfg.per_pass))                 # of a block
    fast = f"dual, {cfg.block_length / passes:.2f} a pass"
    ways = {"straightforward": lambda: straightforward(model, prompts, cfg),
            "exact": lambda: some_blocks(model, prompts, cfg, "none", cfg.block_length),
            "prefix": lambda: some_blocks(model, prompts, cfg, "prefix", cfg.block_length),
            "dual": lambda: some_blocks(model, prompts, cfg, "dual", cfg.block_length),
            fast: lambda: some_blocks(model, prompts, cfg, "dual", passes)}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    print(f"{gpu or device.type}, {torch.get_num_threads()} threads, {model.compute_dtype}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, {cfg.batch_size} x "
          f"{cfg.prompt_length} + {cfg.gen_length} tokens, {cfg.blocks} blocks of "
          f"{cfg.block_length}")

    generate(model, prompts, cfg.block_length, cfg.block_length, min(2, cfg.block_length),
             cache="dual")                                                  # warm
    found = {name: {"seconds": []} for name in ways}
    for name in tqdm([name for _ in range(cfg.runs) for name in ways], unit="way"):
        began = time.perf_counter()
        tokens, found[name]["passes"] = ways[name]()
        found[name]["tokens"] = tokens.cpu()                                # waits for the device
        found[name]["seconds"].append(time.perf_counter() - began)
    exact = found["exact"]["tokens"]
    peaks = next((peaks for name, peaks in PEAKS.items() if name in gpu), None)
    print(f"\n{'':<18} {'seconds':>8} {'passes':>7} {'tokens/s':>9} {'over exact':>11} "
          f"{'as exact':>9} {'floor':>7}")
    for name, of in found.items():
        of["seconds"] = statistics.median(of["seconds"])
        of["tokens_per_s"] = exact.numel() / of["seconds"]
    for name, of in found.items():
        of["over_exact"] = found["exact"]["seconds"] / of["seconds"]
        of["as_exact"] = (of.pop("tokens") == exact).float().mean().item()
        of["floor"] = peaks and floor_seconds(cfg, config, name, of["passes"], *peaks)
        of["floor"] = peaks and of["floor"] / of["seconds"]
        floor = f"{of['floor']:.1%}" if peaks else "n/a"
        print(f"{name:<18} {of['seconds']:8.2f} {of['passes']:7} {of['tokens_per_s']:9.1f} "
              f"{of['over_exact']:11.2f} {of['as_exact']:9.1%} {floor:>7}")
    ratios = {"exact_over_straightforward": 1 / found["straightforward"]["over_exact"],
              "dual_over_exact": found["dual"]["over_exact"],
              "fast_over_exact": found[fast]["over_exact"]}
    ratios = {name: round(value, 3) for name, value in ratios.items()}
    print("\n" + "\n".join(f"{name:<30} {value:.2f}" for name, value in ratios.items()))
    if cfg.json:
        print(json.dumps({"ratios": ratios, "ways": found, "device": gpu or device.type,
                          "dtype": str(model.compute_dtype), "settings": vars(cfg)}))


def shape_of(cfg: BenchConfig) -> ModelConfig:
    shape = dict(PRESETS[cfg.preset])
    if cfg.preset == "tiny":
        shape |= {"vocab_size": cfg.vocab_size, "mask_id": 1, "eos_id": 0, "n_embd": cfg.width,
                  "n_hidden": cfg.width * 11 // 4}
    return ModelConfig(**shape | ({"n_layer": cfg.n_layer} if cfg.n_layer else {}))


def random_model(config: ModelConfig, device, seed: int) -> DLLM:
    """In the dtype it computes in; made on the device: 8 B take minutes on a CPU."""
    dtype = pick_dtype("auto", device)
    with torch.device("meta"):
        model = DLLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02, generator=generator) if p.ndim > 1 else (
            torch.nn.init.ones_(p))
    model.compute_dtype = dtype
    return model


def some_blocks(model, prompts, cfg: BenchConfig, cache: str, passes: int):
    """The first blocks -> their tokens (B, blocks * block_length), passes. No more is worked out:
    what ends the work when they are there is an exception."""
    class Enough(Exception):
        pass
    seen = []

    def look(x, p):
        seen.append(x)
        if len(seen) > cfg.blocks * passes:                                 # the first is no pass
            raise Enough
    try:
        generate(model, prompts, cfg.gen_length, cfg.block_length,
                 passes * (cfg.gen_length // cfg.block_length), cache=cache, on_step=look)
    except Enough:
        pass
    return seen[-1][:, :cfg.blocks * cfg.block_length], len(seen) - 1


@torch.no_grad()
def straightforward(model, prompts, cfg: BenchConfig):
    """A token a pass, greedy: the published algorithm with no thought for its cost."""
    config, P = model.config, prompts.shape[1]
    masks = torch.full((len(prompts), cfg.gen_length), config.mask_id)
    x = torch.cat([prompts, masks], dim=1).to(model.embed.weight.device)
    for block in range(cfg.blocks):
        end = P + (block + 1) * cfg.block_length
        for _ in range(cfg.block_length):
            logits = model(x)                                               # (B, T, V)
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


def floor_seconds(cfg: BenchConfig, config: ModelConfig, way: str, passes: int,
                  flops_per_s: float, bytes_per_s: float) -> float:
    """Each pass reads the weights (bf16) and multiplies; what takes longer, at the peak rates."""
    C, D = config.n_embd, config.head_dim or config.n_embd // config.n_head
    in_blocks = config.n_layer * (C * D * (2 * config.n_head + 2 * config.n_kv_head)
                                  + 3 * C * config.n_hidden)
    head, T = config.vocab_size * C, cfg.prompt_length + cfg.gen_length

    def one_pass(n_tokens):                                 # a row's tokens that are computed
        attention = 4 * config.n_layer * n_tokens * T * config.n_head * D
        flops = 2 * n_tokens * in_blocks + attention + 2 * cfg.block_length * head
        return max(2 * (in_blocks + head) / bytes_per_s, cfg.batch_size * flops / flops_per_s)
    if way.startswith("dual"):
        return cfg.blocks * one_pass(T) + (passes - cfg.blocks) * one_pass(cfg.block_length)
    if way == "prefix":
        after = sum(one_pass(cfg.gen_length - i * cfg.block_length) for i in range(cfg.blocks))
        return cfg.blocks * one_pass(T) + (passes // cfg.blocks - 1) * after
    return passes * one_pass(T)


if __name__ == "__main__":
    run(main, BenchConfig)
