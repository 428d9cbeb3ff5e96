"""The parts of gpu_check.py on speed and memory: floors, attention, steps, 8 B configs, sampler.

Each number stands beside the prediction or the floor that it belongs to.
"""
import contextlib
import importlib.metadata
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch

from analysis import bench, bench_sampling, predict
from analysis.bench import PAD_TO, BenchConfig, random_model, random_rows
from analysis.bench_sampling import SamplingBenchConfig
from analysis.gpu_machine import (LENGTHS, SEED, Check, Figure, as_text, batch_of, count_waits,
                                  difference, free, make_training, profiled, training_step)
from configurator import configure
from model import Packed, Padded
from pretrained.device import index_of
from sample import generate
from sampling import graph
from sampling.reveal import Sampling
from train import TrainConfig

LEAVE = 0.85                # share of the GPU's memory that a part may be predicted to use


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
    yield Figure(f"matrix product, {check.dtype}", check.matmul / 1e12, "TFLOP/s",
                 check.sheet and check.sheet / 1e12, "data sheet" if check.sheet else "")
    yield Figure("copy, bytes read and written", check.bandwidth / 1e12, "TB/s")


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
    kinds = ("plain",) if check.dry else ("plain", "jepa", "jepa packed")   # a CPU takes long
    steps = {kind: steps[kind] for kind in kinds}
    yield from timed_steps(check, cfg, config, rows, steps)     # the same on this machine, eager
    bench.compile_steps(steps)
    began = time.perf_counter()
    for step in steps.values():
        step(*bench.batch_of(cfg, rows, 0))
    check.synchronize()
    yield Figure(f"compile: first steps of {len(steps)} kinds", time.perf_counter() - began, "s")
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
    share = 100 * (passes * trunk + head) / seconds
    yield Figure(f"{which}: share of the peak", share / check.matmul, "%")
    if check.sheet:
        yield Figure(f"{which}: share of the data sheet's", share / check.sheet, "%",
                     100 * predict.MFU, "assumed by predict.py")
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
    P, L, ways = cfg.prompt_length, cfg.block_length, bench_sampling.shortcuts(cfg, check.device)
    for way, of in found.items():
        _, settings = ways.get(way, (L, {}))        # straightforward has none
        n_read = P + min(cfg.gen_length, L + settings.get("window", cfg.gen_length))
        # with a cache the first pass of a block computes all that is read, the others less
        n_computed = {"prefix": n_read - P, "dual": L}.get(settings.get("cache"), n_read)
        first, other = (max(n_bytes / check.bandwidth,          # each pass reads all weights
                            predict.trunk_flops(config, [n]) / check.matmul)
                        for n in (n_read, n_computed))
        floor = first + (of["passes"] - 1) * other
        yield Figure(f"{way}: {of['passes']} passes for {L} tokens", of["seconds"], "s", floor,
                     "floor of bandwidth and matrix products")
        yield Figure(f"{way}: tokens", of["tokens_per_s"], "/s", L / floor, "at the floor")
        yield Figure(f"{way}: as exact", 100 * of["as_exact"], "% of tokens")
    if graph.has_graphs(check.device):        # the graph of the first block serves the second, too
        one, two = (check.seconds(lambda n=n: bench_sampling.first_blocks(
            model, prompts, replace(cfg, blocks=n), L, cache="dual", graphs=True), 2)
            for n in (1, 2))
        yield Figure("dual, graphs: the second block", two - one, "s", one, "the first, captured")
    for name, more in (("exact", {}), ("dual cache", {"cache": "dual"}),
                       ("dual cache, threshold", {"cache": "dual", "threshold": 0.9})):
        s = Sampling(2 * L, L, 2 * L, **more)
        with count_waits(check.device) as waits:
            generate(model, prompts, s)
        yield Figure(f"{name}: host waits in two blocks", sum(waits.values()), of=as_text(waits))
    names, _ = profiled(check, lambda: generate(model, prompts, Sampling(L, L, 8, cache="dual")))
    launches = sum(n for key, n in names.items() if "LaunchKernel" in key)
    yield Figure("dual cache: kernels launched a pass", launches / 8)
