"""Train a masked-diffusion language model, with or without JEPA: fine-tuning, or from scratch.

    python train.py                                     config/tiny.py, minutes on a laptop
    python train.py config/gsm8k_bytes.py --lr=1e-3     any setting can be changed like this
    torchrun --nproc_per_node=8 train.py config/llada8b_gsm8k.py

A run reads from top to bottom: device, model, data, optimizer, loop. A step of the loop is
1 forward and backward, 2 optimizer, 3 EMA. Batches and masks depend on (seed, step, example id)
only, so the number of processes, accumulation and restarts change nothing but the order of sums.
"""
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

from configurator import printable, run     # first: it sets how idle threads wait

import torch

from eval_gsm8k import EvalConfig, evaluate
from model import diffusion_loss, forward_process, row_generators
from tasks.common import batch_at, collate, load_examples
from tasks.files import write_json
from training.checkpoint import load_train_state, save_checkpoint
from training.folder import claim, settings_of, start_out_dir
from training.guard import Guard
from training.log import Log
from training.ranks import as_rank, start_ranks, sum_over_ranks
from training.setup import (ScaleConfig, check_settings, clip_gradients, count_micro_batches,
                            export, load, load_rows, make_objective, make_optimizer, opening_line,
                            wrap)
from training.sharding import release
from training.study import Study


@dataclass
class TrainConfig(ScaleConfig):         # more settings are in training/setup.py
    # the run
    out_dir: str = "out/run"            # checkpoints, log.jsonl and settings.json go here
    seed: int = 42                      # of the batches, the masks and every initial weight
    resume: Literal[False, True, "auto"] = False  # go on from out_dir's newest; auto: or begin
    overwrite: bool = False             # start anew although out_dir holds a run
    export_dir: str = ""                # at the end the model also goes here, in bf16, as published
    device: str = "auto"                # cpu, cuda, mps; auto takes a GPU if there is one
    # the model
    init_from: str = ""                 # checkpoint, out_dir or hub name; empty: from scratch
    revision: str = ""                  # of a hub name: branch, tag or commit
    preset: Literal["tiny", "llada-8b", "dream-7b"] = "tiny"  # the shape, when from scratch
    tokenizer: str = ""                 # bytes, toy, words (of the task); empty: init_from's
    chat: bool = False                  # prompts and answers are turns of a chat (Instruct models)
    # the data
    task: str = "toy"                   # a module of tasks/
    data_dir: str = ""                  # a folder with {split}.jsonl[.gz]; empty: the task's own
    variant: str = ""                   # of the task; gsm8k: marks keeps <<...>> in the answers
    max_length: int = 256               # longer rows are left out (paper silent)
    eos_fill: bool = True               # fill short answers with end-of-text, as in LLaDA's SFT
    batch_size: int = 64                # rows per optimizer step, over all processes (paper silent)
    micro_batch_size: int = 0           # rows per pass, accumulated to batch_size; 0: all in one
    epochs: float = 2.0                 # passes over the data (paper)
    max_steps: int = 0                  # optimizer steps; 0: use `epochs`
    # the objective: see jepa.py
    lambda_jepa: float = 1.0            # weight of the JEPA term (paper: 0.5, 1, 2); 0: plain
    t_ctx: float = 0.2                  # masking rate of the context view (paper)
    t_tgt: float = 0.7                  # masking rate of the target view (paper)
    n_pred_layer: int = 2               # blocks of the predictor (paper: 1..5); 0: none
    ema_decay: float = 0.996            # of the target encoder, per optimizer step (paper)
    mask_scope: Literal["response", "all"] = "response"  # what may be masked (paper silent)
    diffusion_t: Literal["context", "uniform"] = "context"  # context view: t_ctx (paper) or U(0, 1)
    loss_form: Literal["masked_mean", "llada_sft", "unweighted"] = "masked_mean"  # see model.py
    # the optimizer: AdamW, with linear warm-up and then a cosine (ours)
    lr: float = 1e-5                    # peak (paper: 1e-5; 1.4e-6 with the rates 0.1 and 0.9)
    min_lr_ratio: float = 0.0           # the cosine ends at this share of lr
    warmup_ratio: float = 0.03          # share of the steps with linear warm-up (paper silent)
    beta2: float = 0.999                # second-moment decay; the first is 0.9 (paper silent)
    weight_decay: float = 0.0           # on matrices only (paper silent)
    grad_clip: float = 1.0              # largest norm of the gradient; 0: none (paper silent)
    # watching it
    log_every: int = 10                 # steps between lines in log.jsonl
    track: Literal["none", "wandb", "tensorboard"] = "none"  # also send these lines there
    eval_every: int = 200               # steps between held-out losses; also at step 0 and the end
    eval_rows: int = 256                # held-out rows to use
    eval_t: tuple[float, ...] = (0.2, 0.5, 0.8, 1.0)  # masking rates of the held-out losses
    forget_task: str = ""               # another task, whose held-out loss shows what is forgotten
    save_every: int = 1000              # steps between checkpoints; one more at the end
    keep: int = 1                       # how many checkpoints to keep, the newest
    test_questions: int = 0             # at the end, answer this many test questions of the task

    def __post_init__(self):
        check_settings(self)


def main(cfg: TrainConfig):
    started = time.perf_counter()
    rank, world, device = start_ranks(cfg.device)       # 0 of 1, unless torchrun started several
    with claim(cfg, device) as resume_dir:              # out_dir is ours; None: a new run
        train(cfg, resume_dir, rank, world, device)
        if cfg.test_questions:
            answer_questions(cfg, rank, world, started)


def train(cfg: TrainConfig, resume_dir, rank: int, world: int, device):
    """Train, from the checkpoint in resume_dir if there is one; save, and export if asked for."""
    n_micro = count_micro_batches(cfg, world)           # in a step, on each rank

    # ---- model and objective ---------------------------------------------------------------
    model, tok, folder = load(cfg, resume_dir, device)
    objective = make_objective(model, cfg, folder, device)                  # jepa.py
    study = Study(objective, cfg, is_resumed=bool(resume_dir))

    # ---- data ------------------------------------------------------------------------------
    max_length = min(cfg.max_length, model.config.block_size)
    rows = load_rows(cfg.task, "train", cfg, tok, max_length, rank)
    held_out = {task: load_rows(task, "validation", cfg, tok, max_length, rank)[:cfg.eval_rows]
                for task in (cfg.task, cfg.forget_task) if task}
    if cfg.test_questions:
        load_examples(cfg.task, "test", cfg.data_dir, cfg.variant)      # if missing, said now
    n_steps = cfg.max_steps or max(1, round(cfg.epochs * len(rows) / cfg.batch_size))
    settings = settings_of(cfg, rows, n_steps)

    def micro_batches(step):
        """This rank's: [(rows, the length that end-of-text fills answers to; 0: no fill)]."""
        found = [batch_at(step, rows, cfg.batch_size, cfg.seed, part=rank * n_micro + i,
                          n_parts=world * n_micro) for i in range(n_micro)]
        return [(some, fill if cfg.eos_fill else 0) for some, fill in found]

    def inputs(step, some, fill):
        """Rows -> what the objective takes: x0, maskable, is_real (B, T), and generators."""
        generators = row_generators(cfg.seed, step, [row.example_id for row in some])
        return (*collate(some, fill, max_length, tok.eos_id), generators)

    # ---- optimizer -------------------------------------------------------------------------
    optimizer = make_optimizer(objective, cfg)
    step = 0
    if resume_dir:
        step = load_train_state(resume_dir, objective, optimizer, settings)
    first_step = step
    wrapped = wrap(objective, world)

    # ---- loop ------------------------------------------------------------------------------
    start_out_dir(cfg.out_dir, is_new=not resume_dir)
    log = Log(cfg.out_dir, settings, step, n_steps, warns=bool(cfg.init_from))
    log.say(opening_line(cfg, objective, n_steps, len(rows), world))
    guard = Guard(objective, device, cfg.on_nan, micro_batches, inputs)
    while True:
        if step == n_steps or step % cfg.eval_every == 0 and not guard.stop_signal:
            log.held_out(step, {name: held_out_loss(model, some, cfg, max_length, rank, world)
                                for name, some in held_out.items()})
        is_last = step >= n_steps or guard.stop_signal
        if step > first_step and (step % cfg.save_every == 0 or is_last):
            save_checkpoint(cfg.out_dir, step, objective, optimizer, tok, settings, cfg.keep)
        if is_last:
            break

        # 1 forward, and the backward pass of each micro-batch, which frees its activations
        clock, is_due = time.perf_counter(), log.is_due(step + 1)
        batches = [inputs(step, some, fill) for some, fill in micro_batches(step)]
        z_tgts = objective.embed_targets(batches)       # first: no activations are stored yet
        for i, (batch, z_tgt) in enumerate(zip(batches, z_tgts)):
            wrapped.require_backward_grad_sync = i == n_micro - 1   # DDP averages over ranks once
            loss, parts = wrapped(*batch, z_tgt)
            (loss / n_micro).backward()
            log.add(loss, parts, n_micro)
            study.note(is_due)
        numbers = study.pull(is_due)        # adds a gradient, if a setting asks for one

        # 2 optimizer
        lr = lr_at(step, n_steps, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        grad_norm = clip_gradients(objective, cfg.grad_clip)
        guard.skip_if_not_finite(step, grad_norm, optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 3 EMA; after a skipped update it averages in the unchanged weights
        objective.update_target()
        step += 1
        numbers |= study.numbers(is_due, batches[0]) | {"grad_norm": grad_norm, "lr": lr}
        log.step(step, numbers, clock, batches)
        log.say(guard.check(is_due, world))

    # ---- end -------------------------------------------------------------------------------
    guard.close()
    log.close()
    if step < n_steps:                      # the exit code says that the run is not complete
        log.say(f"{cfg.out_dir}: {signal.Signals(guard.stop_signal).name} after step {step} of "
                f"{n_steps}, which is saved; --resume goes on")
        sys.exit(128 + guard.stop_signal)
    if cfg.export_dir:
        log.say(export(model, tok, cfg.export_dir, rank))


@torch.no_grad()
def held_out_loss(model, rows, cfg: TrainConfig, max_length: int, rank=0, world=1) -> dict:
    """{t: mean over rows of the mean cross-entropy of masked answer tokens}; the masks are fixed.

    As in training, end-of-text that fills an answer counts as answer: many easy tokens.
    """
    device = model.embed.weight.device
    fill = max(len(row.answer) for row in rows) + 1 if cfg.eos_fill else 0
    totals = torch.zeros(len(cfg.eval_t), dtype=torch.float64)
    size = min(cfg.batch_size, 64)
    for i in range(0, len(rows), world * size):
        some = rows[i + rank * size:][:size]
        weight, some = len(some), some or rows[:1]      # weight 0: a sharded model needs all ranks
        x0, maskable, is_real = collate(some, fill, max_length, model.config.eos_id)
        for k, rate in enumerate(cfg.eval_t):
            t = torch.full((len(some),), rate)
            generators = row_generators(0, 0, [row.example_id for row in some])
            xt, is_masked = forward_process(x0, t, maskable, model.config.mask_id, generators,
                                            at_least_one=True)
            nll = model.nll(model.encode(xt, is_real), x0, is_masked)
            totals[k] += weight * diffusion_loss(nll, is_masked, maskable, t).item()
    release(model)
    totals = sum_over_ranks(totals.to(device) if device.type != "mps" else totals)
    means = (totals / len(rows)).tolist()
    return {f"{rate:g}": round(mean, 5) for rate, mean in zip(cfg.eval_t, means)}


def lr_at(step: int, n_steps: int, cfg: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to min_lr_ratio * lr at the last step."""
    warmup = max(1, round(cfg.warmup_ratio * n_steps))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * cosine)


def answer_questions(cfg: TrainConfig, rank: int, world: int, started: float):
    """Score the trained model on test questions; writes and prints summary.json's numbers."""
    ask = EvalConfig(init_from=cfg.out_dir, chat=cfg.chat, task=cfg.task, data_dir=cfg.data_dir,
                     variant=cfg.variant, limit=cfg.test_questions, device=cfg.device,
                     out=os.path.join(cfg.out_dir, "test.jsonl"))
    scores, _ = evaluate(ask, rank, world)
    if rank == 0:
        summary = {key: scores[key] for key in ("accuracy", "stderr", "n")}
        summary["seconds"] = round(time.perf_counter() - started, 1)
        write_json(os.path.join(cfg.out_dir, "summary.json"), summary)
        print(printable(f"{cfg.out_dir} answers {100 * summary['accuracy']:.1f} % of "
                        f"{summary['n']:,} unseen questions, +- {100 * summary['stderr']:.1f} "
                        f"(standard error); {summary['seconds']:.0f} s in all"))


if __name__ == "__main__":
    run(as_rank(main), TrainConfig, default="config/tiny.py")
