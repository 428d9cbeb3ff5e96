"""Bench of sampling: tokens per second of each way to sample, side by side in one run.

    python analysis/bench_sampling.py                                a CPU, a random mid-size model
    python analysis/bench_sampling.py --preset=llada-8b              its shape, on a GPU

    straightforward  the published loop as usually written: logits of every token, a softmax over
                     the vocabulary in fp64, a Python loop over the rows
    exact            sample.py without shortcuts: the same tokens
    prefix, dual     with a cache, as many tokens per pass as exact
    ..., window      reading `window` masks after the block, not all
    ..., graphs      replaying the passes as CUDA graphs, where there is a CUDA GPU; capturing them
                     is part of the time
    ..., n a pass    the same with PER_PASS tokens per pass, as many as a threshold may reveal: a
                     random model is never sure, so here a fixed number is revealed

`as exact` is the share of tokens equal to the exact sampler's. A random model has many near-ties,
so it is far lower here than for a trained model.
"""
import json
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import run  # first: it sets variables that torch reads

import torch
from tqdm import tqdm

from analysis.console import print_table
from analysis.predict import check_ranges, name_of, shape_of
from model import DLLM, ModelConfig
from pretrained.device import pick_device, pick_dtype
from sample import generate
from sampling import graph
from sampling.prompts import check_prompts
from sampling.reveal import Sampling, check_lengths


PER_PASS = 2.77     # tokens per pass of the fastest ways: Fast-dLLM's on GSM8K
SEED = 42           # of the weights and the prompts


@dataclass
class SamplingBenchConfig:
    preset: Literal["tiny", "llada-8b", "dream-7b"] = "tiny"  # of the model's shape
    width: int = 512                    # n_embd of tiny, with an MLP of 2.75 times that
    batch_size: int = 1                 # prompts at a time
    prompt_length: int = 800            # tokens of each prompt
    gen_length: int = 256               # tokens to generate
    block_length: int = 32              # a block is finished before the next begins
    window: int = 96                    # masks after the block that the ways with a window read
    blocks: int = 2                     # time only the first blocks, where a window saves most
    runs: int = 1                       # runs of each way, in turns; medians are printed
    device: str = "auto"                # cpu, cuda, mps; auto takes a GPU if there is one
    json: bool = False                  # print all numbers as one line of JSON at the end

    def __post_init__(self):
        check_lengths(self.gen_length, self.block_length, self.gen_length)
        check_ranges(self, width=(1, 1 << 16), batch_size=(1, 1 << 16), runs=(1, 1_000_000),
                     window=(1, 1 << 62), prompt_length=(1, 1 << 62))        # its end is block_size
        most = self.gen_length // self.block_length
        if not 1 <= self.blocks <= most:
            raise ValueError(f"blocks={self.blocks} must lie in 1..{most}, the blocks of "
                             f"gen_length={self.gen_length}")


def main(cfg: SamplingBenchConfig):
    device = pick_device(cfg.device)
    config = shape_of(cfg.preset, width=cfg.width if cfg.preset == "tiny" else 0)
    check_prompts(config, [range(cfg.prompt_length)], cfg.gen_length)  # before 8 B are made
    model = random_model(config, device)
    prompts = torch.randint(2, config.vocab_size, (cfg.batch_size, cfg.prompt_length),
                            generator=torch.Generator().manual_seed(SEED))
    print(f"{name_of(device)}, {torch.get_num_threads()} threads, {model.compute_dtype}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, {cfg.batch_size} x "
          f"{cfg.prompt_length} + {cfg.gen_length} tokens, {cfg.blocks} blocks of "
          f"{cfg.block_length}")

    found = measure(model, prompts, cfg)
    table = [["", "seconds", "passes", "tokens/s", "over exact", "as exact"]]
    for way, of in found.items():
        table.append([way, f"{of['seconds']:.2f}", f"{of['passes']}", f"{of['tokens_per_s']:.1f}",
                      f"{of['over_exact']:.2f}", f"{of['as_exact']:.1%}"])
    print_table(table)
    if cfg.json:
        print(json.dumps({"ways": found, "device": name_of(device), "settings": vars(cfg),
                          "dtype": str(model.compute_dtype)}))


def measure(model, prompts, cfg: SamplingBenchConfig) -> dict:
    """Time all ways in turns -> {way: {passes, seconds, tokens_per_s, over_exact, as_exact}}."""
    L, ways = cfg.block_length, {"straightforward": partial(straightforward, model, prompts, cfg)}
    for way, (passes, settings) in shortcuts(cfg, model.embed.weight.device).items():
        ways[way] = partial(first_blocks, model, prompts, cfg, passes, **settings)
    generate(model, prompts, Sampling(L, L, min(2, L), cache="dual"))  # warm-up
    found, tokens = {way: {"runs": []} for way in ways}, {}
    for way in tqdm([*ways] * cfg.runs, unit="way"):
        began = time.perf_counter()
        answer, found[way]["passes"] = ways[way]()
        tokens[way] = answer.cpu()  # synchronises
        found[way]["runs"].append(time.perf_counter() - began)
    exact = statistics.median(found["exact"]["runs"])
    for way, of in found.items():
        of["seconds"] = statistics.median(of.pop("runs"))
        of["tokens_per_s"] = answer.numel() / of["seconds"]
        of["over_exact"] = exact / of["seconds"]
        of["as_exact"] = (tokens[way] == tokens["exact"]).float().mean().item()
    return found


def shortcuts(cfg: SamplingBenchConfig, device) -> dict:
    """Return {way: (passes of a block, settings of Sampling)} of all ways of sample.py."""
    L, few = cfg.block_length, max(1, round(cfg.block_length / PER_PASS))
    dual, windowed, n_a_pass = dict(cache="dual"), dict(window=cfg.window), f"{L / few:.2f} a pass"
    ways = {"exact": (L, {}), "window": (L, windowed),
            "prefix": (L, dict(cache="prefix")),
            "prefix, window": (L, dict(cache="prefix") | windowed),
            "dual": (L, dual), "dual, window": (L, dual | windowed),
            f"dual, {n_a_pass}": (few, dual), f"dual, window, {n_a_pass}": (few, dual | windowed)}
    if graph.has_graphs(device):
        graphs = dual | dict(graphs=True)
        ways |= {"dual, graphs": (L, graphs), f"dual, graphs, {n_a_pass}": (few, graphs)}
    return ways


def random_model(config: ModelConfig, device) -> DLLM:
    """Make a model with random weights on the device; on a CPU 8 B would take minutes."""
    dtype = pick_dtype("auto", device)
    with torch.device("meta"):
        model = DLLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(SEED)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02, generator=generator)
        else:
            torch.nn.init.ones_(p)
    model.compute_dtype = dtype
    return model


def first_blocks(model, prompts, cfg: SamplingBenchConfig, passes: int, **settings):
    """Generate the first blocks, with this many passes in each -> their tokens (B, blocks *
    block_length), number of passes.

    An exception ends `generate` after them, so that no more is computed.
    """
    seen = []

    def on_step(x, p):
        seen.append(x)
        if len(seen) > cfg.blocks * passes:  # the first call comes before any pass
            raise StopIteration
    steps = passes * (cfg.gen_length // cfg.block_length)
    sampling = Sampling(cfg.gen_length, cfg.block_length, steps, **settings)
    with suppress(StopIteration):
        generate(model, prompts, sampling, on_step=on_step)
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


if __name__ == "__main__":
    run(main, SamplingBenchConfig)
