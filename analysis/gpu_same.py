"""The parts of gpu_check.py on sameness: does a GPU compute what a CPU does, without waiting?"""
import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import torch

import train
from analysis import predict
from analysis.bench import random_model, random_rows
from analysis.gpu_machine import (ROOT, SEED, Check, Figure, as_text, batch_of, count_waits,
                                  difference, make_training, place_of, profiled, training_step)
from configurator import configure
from jepa import DLLMJEPA
from pretrained.device import index_of
from sample import complete, load_model
from sampling import graph
from sampling.reveal import Sampling
from tasks import toy
from train import TrainConfig
from training.ranks import group_of_one
from training.setup import make_optimizer
from training.sharding import shard


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
        is_sharded = name.endswith("sharded")
        with reported(name) as problem, (
                group_of_one(check.device) if is_sharded else contextlib.nullcontext()):
            if is_sharded:
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
            if check.is_cuda:
                names, _ = profiled(check, step)
                kept = {key: n for key, n in names.items()
                        if "Synchronize" in key or "Pageable" in key}
                yield Figure(f"{name}: waits and pageable copies by the profiler, its own last two "
                             f"included", as_text(kept))
        yield from problem


def loop(check: Check):
    """Train the toy by train.py itself, in all ways that a GPU changes; then sample from it."""
    with tempfile.TemporaryDirectory() as folder:
        yield from runs_of_the_toy(check, Path(folder), check.device.type)


def runs_of_the_toy(check: Check, folder: Path, here: str):
    """Compare runs on the device with one on the CPU of the same objective, then answers."""
    two = "--objective=two_gradients"
    bases = {two: toy_run(check, folder / "cpu_two", "--device=cpu", "--dtype=float32", two),
             "": toy_run(check, folder / "cpu", "--device=cpu", "--dtype=float32")}
    runs = {"fp32": ["--dtype=float32"], "bf16": [], "fp32, packed": ["--dtype=float32", "--pack"],
            "bf16, packed": ["--pack"], "bf16, lean": ["--optimizer=lean"],
            "bf16, activations recomputed": ["--checkpoint_activations=full"],
            "bf16, two gradients": [two]}
    for name, options in runs.items():
        with reported(name) as problem:
            found = toy_run(check, folder / name.replace(", ", "_"), f"--device={here}", *options)
            base = bases[two if two in options else ""]
            away = max(abs(a - b) for a, b in zip(found["loss"], base["loss"]))
            limit = 1e-3 if "fp32" in name else 0.1
            yield Figure(f"{name}: largest difference of the loss from fp32 on the CPU, "
                         f"{len(found['loss'])} steps", away, "", limit, "limit")
            yield Figure(f"{name}: held-out loss at the end", found["held_out"], "",
                         base["held_out"], "on the CPU")
        yield from problem
    with reported("LoRA") as problem:
        toy_run(check, folder / "lora", f"--device={here}", f"--init_from={folder / 'fp32'}",
                "--tokenizer=", "--preset=tiny", "--lora_rank=4", "--lr=1e-4")
        yield Figure("LoRA on the GPU's own checkpoint", "ran")
    yield from problem

    prompts = [example.prompt for example in toy.load("test")[:8]]
    answers = {}
    for name, where, dtype in (("CPU", "cpu", "float32"), ("fp32", here, "float32"),
                               ("bf16", here, "bfloat16")):
        with reported(f"answers of {name}") as problem:
            model, tok = load_model(str(folder / "fp32"), where, dtype=dtype)
            for cache in ("none", "dual"):
                s = Sampling(32, 16, 32, cache=cache)
                answers[name, cache] = complete(model, tok, prompts, s)
                same = sum(a == b for a, b in zip(answers[name, cache], answers["CPU", cache]))
                yield Figure(f"answers of {name}, cache {cache}: equal to the CPU's", same, "",
                             len(prompts), "questions")
                if graph.has_graphs(model.embed.weight.device):
                    replayed = complete(model, tok, prompts, replace(s, graphs=True))
                    same = sum(a == b for a, b in zip(replayed, answers[name, cache]))
                    yield Figure(f"answers of {name}, cache {cache}, with graphs: equal to those "
                                 f"without", same, "", len(prompts), "questions")
        yield from problem


@contextlib.contextmanager
def reported(what: str):
    """Turn an error of a block into one Figure, in the list that the block is given."""
    found = []
    try:
        yield found
    except (TimeoutError, GeneratorExit, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:
        text = (str(error).strip() or "no message").splitlines()[0][:200]
        found.append(Figure(f"{what}: error", f"{type(error).__name__}: {text}",
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
