"""Fine-tune a masked-diffusion language model, with or without JEPA; or train one from scratch.

    python train.py                                     config/tiny.py, minutes on a laptop
    python train.py config/gsm8k_bytes.py --lr=1e-3     any setting can be changed so
    torchrun --nproc_per_node=8 train.py config/llada8b_gsm8k.py

One run reads from top to bottom: settings, device, model, data, optimizer, loop. A step is
1 forward, 2 optimizer, 3 EMA. Batches and masks depend on (seed, step, example id) only, so the
number of processes, accumulation and restarts change nothing but the order of additions.
"""
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

# Idle threads sleep instead of spinning: 9x faster on a busy machine; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import run
from jepa import DLLMJEPA, TARGET_TOKENS
from model import DLLM, PRESETS, ModelConfig, diffusion_loss, forward_process, row_generators
from pretrained.device import pick_device, pick_dtype
from pretrained.tokenizer import load_tokenizer
from pretrained.weights import find_weights, new_folder, newest_checkpoint
from tasks.common import batch_at, collate, load_task, tokenize
from training.checkpoint import (StopSignal, load_train_state, not_finite, remove_checkpoints,
                                 save_checkpoint)
from training.controls import Anchor, base_weights, check_controls, has_control, make_control
from training.diagnostics import (bucket_numbers, embedding_numbers, movement_numbers,
                                  same_rate_number, sample)
from training.lean import Lean
from training.log import Log
from training.lora import add_lora, check_base, merge
from training.sharding import agree, shard


@dataclass
class TrainConfig:
    # the run
    out_dir: str = "out/run"            # checkpoints, log.jsonl and settings.json go here
    seed: int = 42                      # of the batches, the masks and every initial weight
    resume: bool = False                # go on from the newest checkpoint in out_dir
    overwrite: bool = False             # start anew although out_dir holds a run
    export_dir: str = ""                # at the end the model also goes here, in bf16, as published
    compare: str = ""                   # config of a base to train first; then plain and JEPA
    # what is trained
    init_from: str = ""                 # checkpoint, out_dir or hub name; empty: from scratch
    revision: str = ""                  # of a hub name: branch, tag or commit
    preset: Literal["tiny", "llada-8b", "dream-7b"] = "tiny"  # the shape, when from scratch
    tokenizer: str = ""                 # bytes, toy, words (of the task); empty: init_from's
    chat: bool = False                  # prompts and answers are turns of a chat (Instruct models)
    eos_fill: bool = True               # fill short answers with end-of-text (LLaDA's, Dream's SFT)
    # data
    task: str = "toy"                   # a module of tasks/
    data_dir: str = ""                  # a folder with {split}.jsonl[.gz]; empty: the task's own
    variant: str = ""                   # of the task; gsm8k: marks keeps <<...>> in the answers
    max_length: int = 256               # rows of more tokens are dropped whole (as reproduced)
    forget_task: str = ""               # another task, whose held-out loss shows what is forgotten
    batch_size: int = 64                # rows per optimizer step, over all processes (paper silent)
    micro_batch_size: int = 0           # rows per pass, accumulated to batch_size; 0: all in one
    max_steps: int = 0                  # optimizer steps; 0: epochs says
    epochs: float = 2.0                 # passes over the data (paper)
    # LoRA: see lora.py
    lora_rank: int = 0                  # width of the adapters; 0: full fine-tuning
    lora_alpha: float = 64.0            # what they add is scaled by alpha / rank
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                     "up_proj", "down_proj")  # what has one, in every layer
    # objective: see jepa.py
    lambda_jepa: float = 1.0            # weight of the JEPA term (paper: 0.5, 1, 2); 0: plain
    t_ctx: float = 0.2                  # masking rate of the context view (paper)
    t_tgt: float = 0.7                  # masking rate of the target view (paper)
    n_pred_layer: int = 2               # blocks of the predictor (paper: 1..5); 0: none
    ema_decay: float = 0.996            # of the target encoder, per optimizer step (paper)
    jepa_rate: float = 1.0              # share of the steps that have the term, at lambda / share
    mask_scope: Literal["response", "all"] = "response"  # may be masked (paper silent)
    diffusion_t: Literal["context", "uniform"] = "context"  # t_ctx (paper), or U(0,1)
    loss_form: Literal["masked_mean", "llada_sft", "unweighted"] = "masked_mean"  # first: paper
    # what the paper does not do, to find out why it works: see controls.py
    objective: Literal["jepa", "consistency", "two_gradients"] = "jepa"  # last: LLM-JEPA's
    target: Literal["ema", "online", "frozen", "shuffled", "mean", "random"] = "ema"
    masks: Literal["independent", "nested"] = "independent"  # nested: the lighter in the heavier
    pool: Literal["visible", "answer_visible", "masked", "all_real"] = "visible"  # is embedded
    pool_layer: int = 0                 # blocks before the embedding; 0: all
    pred_width: int = 0                 # of a bottleneck around the predictor; 0: none
    pred_lr: float = 1.0                # of the predictor, in units of lr; 0: it stays random
    ema_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 stalls
    anchor: float = 0.0                 # weight of |theta - base|^2 (paper's other baseline: 1e-4)
    # optimizer
    optimizer: Literal["adamw", "lean"] = "adamw"  # lean: fp32 weights at half the memory, lean.py
    lr: float = 1e-5                    # peak learning rate (paper: 1e-5 aggressive, 1.4e-6 Wide-t)
    min_lr_ratio: float = 0.0           # the cosine ends at this share of lr
    warmup_ratio: float = 0.03          # share of the steps with linear warm-up (paper silent)
    beta2: float = 0.999                # second-moment decay; the first is 0.9 (paper silent)
    weight_decay: float = 0.0           # on matrices only (paper silent)
    grad_clip: float = 1.0              # largest norm of the gradient; 0: none (paper silent)
    # machine
    device: str = "auto"                # cpu, cuda, mps; auto takes a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations
    shard: bool = False                 # each process keeps a part of all (FSDP2); with torchrun
    compile: bool = False               # torch.compile each block; pays on long runs
    pack: bool = False                  # no work on padding: rows end to end, the same loss
    checkpoint_activations: Literal["none", "selective", "full"] = "none"  # every 2nd block, or all
    on_nan: Literal["stop", "skip"] = "stop"  # at a loss or gradient that is not finite
    # watching
    log_every: int = 10                 # steps between lines in log.jsonl
    eval_every: int = 200               # steps between held-out losses; also at step 0 and the end
    eval_rows: int = 256                # held-out rows to use
    eval_t: tuple[float, ...] = (0.2, 0.5, 0.8, 1.0)  # masking rates of the held-out losses
    save_every: int = 1000              # steps between checkpoints; one more at the end
    keep: int = 1                       # so many checkpoints are kept, the newest

    def __post_init__(self):
        for name in ("t_ctx", "t_tgt"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is no masking rate: those lie in "
                                 f"(0, 1]")
        if not 0 < self.jepa_rate <= 1:
            raise ValueError(f"jepa_rate={self.jepa_rate} must lie in (0, 1]; without the term it "
                             f"is lambda_jepa that is 0")
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1]; the paper has 0.996")
        for name in ("batch_size", "max_length", "log_every", "eval_every", "eval_rows",
                     "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lambda_jepa", "n_pred_layer", "micro_batch_size", "max_steps", "epochs", "lr",
                     "min_lr_ratio", "warmup_ratio", "weight_decay", "grad_clip", "seed",
                     "lora_rank"):
            if not getattr(self, name) >= 0:                # NaN is not, either
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.seed >= 2 ** 63:
            raise ValueError(f"seed={self.seed} must lie below 2**63")
        if self.lora_rank and not self.lora_targets:
            raise ValueError("lora_targets is empty; name what gets an adapter, such as q_proj")
        if self.lora_rank and not self.init_from and not self.compare:
            raise ValueError(f"lora_rank={self.lora_rank} adapts weights that exist; name them "
                             f"with init_from, or leave it at 0 to train all")
        if self.lora_rank and self.optimizer == "lean":
            raise ValueError("optimizer='lean' splits what is fine-tuned in full; LoRA's few "
                             "weights need optimizer='adamw'")
        if self.shard and (self.lora_rank or self.optimizer == "lean"):
            raise ValueError("shard=True spreads a full fine-tuning with optimizer='adamw'; LoRA "
                             "and lean are what fits one GPU: leave out one of the two")
        check_controls(self)


def main(cfg: TrainConfig):
    if cfg.compare:                     # not one run but three: base, plain arm, JEPA arm
        if cfg.resume or cfg.init_from or "RANK" in os.environ:
            raise ValueError("with `compare`, base and arms are trained anew, each in a process of "
                             "its own: start it without torchrun, --resume and --init_from, or "
                             "train one model with --compare=")
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "analysis", "compare.py")
        os.execv(sys.executable, [sys.executable, script, *sys.argv[1:]])

    # ---- device ----------------------------------------------------------------------------
    # torchrun starts one process per GPU and sets these; without it we are rank 0 of 1
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))                # what "cuda" means here
    device = pick_device(cfg.device)
    if world > 1:
        # the others wait while rank 0 writes a checkpoint, which at 8 B may take a while
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=2))
    elif cfg.shard:
        raise ValueError("shard=True needs two processes or more: torchrun --nproc_per_node=8 "
                         "train.py ...")
    micro_batch_size = cfg.micro_batch_size or max(1, cfg.batch_size // world)
    n_micro, remainder = divmod(cfg.batch_size, micro_batch_size * world)   # micro-steps per rank
    if remainder:
        raise ValueError(f"batch_size={cfg.batch_size} must be a multiple of "
                         f"micro_batch_size={micro_batch_size} x {world} processes")
    start = find_checkpoint(cfg)                                            # a folder, or None
    if cfg.export_dir:
        new_folder(cfg.export_dir)      # in use already? better said now than after the training

    # ---- model and objective ---------------------------------------------------------------
    dtype = pick_dtype(cfg.dtype, device)
    folder = None
    if cfg.init_from or start:
        # a checkpoint of LoRA is merged, for use; its training goes on from the base
        folder = start if start and not cfg.lora_rank else find_weights(cfg.init_from, cfg.revision)
        if not cfg.resume and Path(cfg.out_dir).resolve() in Path(folder).resolve().parents:
            raise ValueError(f"init_from={cfg.init_from!r} lies in out_dir, which a new run "
                             f"clears; choose another --out_dir")
        tok = load_tokenizer(folder, cfg.chat)
        if cfg.shard:                   # shapes only: each rank will read the rows that it keeps
            model = DLLM.on_meta(folder)
        else:
            model = DLLM.from_pretrained(folder, dtype if cfg.lora_rank else torch.float32,
                                         device=device)
        if cfg.tokenizer and named_tokenizer(cfg) != tok:
            raise ValueError(f"tokenizer={cfg.tokenizer!r} is not the vocabulary that {folder} was "
                             f"trained with ({tok.name!r}, {tok.n_vocab} tokens); leave it out")
        tok.check_fits(model.config)
    else:
        tok = named_tokenizer(cfg)
        config = ModelConfig(**{"vocab_size": tok.n_vocab, "mask_id": tok.mask_id,
                                "eos_id": tok.eos_id, **PRESETS[cfg.preset]})
        tok.check_fits(config)
        model = DLLM(config).init_weights(torch.Generator().manual_seed(cfg.seed))
    model.compute_dtype = dtype
    model.pack, model.checkpoint_activations = cfg.pack, cfg.checkpoint_activations
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
    paper = dict(lambda_jepa=cfg.lambda_jepa, t_ctx=cfg.t_ctx, t_tgt=cfg.t_tgt,
                 n_pred_layer=cfg.n_pred_layer, ema_decay=cfg.ema_decay, mask_scope=cfg.mask_scope,
                 diffusion_t=cfg.diffusion_t, loss_form=cfg.loss_form, seed=cfg.seed,
                 jepa_rate=cfg.jepa_rate)
    objective = make_control(model, cfg, paper) if has_control(cfg) else DLLMJEPA(model, **paper)
    if not cfg.shard:
        objective.to(device)
    if cfg.compile:
        for block in [*model.blocks, *getattr(getattr(objective, "target", None), "blocks", ())]:
            block.compile(dynamic=True)
    if cfg.shard:
        shard(objective, device, folder)
    # where the weights began: with LoRA the model is now as it was then, else a resumed one is not
    base = base_weights(model, cfg, anew=bool(start) and not cfg.lora_rank)
    if cfg.anchor:
        base = dict(base)
        anchor = Anchor(dict(model.named_parameters()), base, cfg.anchor)
        base = base.items()
    predictor = getattr(objective, "predictor", torch.nn.Module())
    began = ({name: sample(p) for name, p in base},
             {name: sample(p) for name, p in predictor.named_parameters()})

    # ---- data ------------------------------------------------------------------------------
    max_length = min(cfg.max_length, model.config.block_size)
    def load_rows(task, split):
        examples = load_task(task).load(split, cfg.data_dir, cfg.variant)
        rows = tokenize(examples, tok, max_length, f"{task} {split}")
        if rank == 0:
            lengths = sorted(len(row.prompt) + len(row.answer) + 1 for row in rows)
            print(f"{task} {split}: {len(rows):,} rows of {lengths[0]} to {lengths[-1]} tokens, "
                  f"half of them up to {lengths[len(rows) // 2]}, 95 % up to "
                  f"{lengths[len(rows) * 95 // 100]}")
            if len(rows) < len(examples):
                print(f"{task} {split}: {len(examples) - len(rows)} of {len(examples)} rows are "
                      f"longer than max_length={max_length} tokens and are left out")
        return rows
    rows = load_rows(cfg.task, "train")
    held_out = {task: load_rows(task, "validation")[:cfg.eval_rows]
                for task in (cfg.task, cfg.forget_task) if task}
    def micro_batches(step):            # this rank's share of the batch of a step
        for micro in range(n_micro):
            batch, fill = batch_at(step, rows, cfg.batch_size, cfg.seed,
                                   part=rank * n_micro + micro, n_parts=world * n_micro)
            yield batch, fill if cfg.eos_fill else 0        # 0: one end-of-text ends each answer
    def inputs(step, batch, fill):
        return (*collate(batch, fill, max_length, tok.eos_id),
                row_generators(cfg.seed, step, [row.example_id for row in batch]), step)
    # micro-batches in one pass of the target: a number that ranks, whose lengths differ, agree on
    n_at_once = max(1, TARGET_TOKENS // (micro_batch_size * max_length))
    n_steps = cfg.max_steps or max(1, round(cfg.epochs * len(rows) / cfg.batch_size))

    # ---- optimizer -------------------------------------------------------------------------
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    groups = [{"params": [p for name, p in named.items() if (p.ndim > 1) == is_matrix
                          and name.startswith("predictor.") == is_predictor],
               "weight_decay": cfg.weight_decay * is_matrix,
               "lr_scale": cfg.pred_lr if is_predictor else 1.0}
              for is_predictor in (False, True) for is_matrix in (True, False)]
    assert sum(len(group["params"]) for group in groups) == len(named)      # each in exactly one
    if cfg.optimizer == "lean":         # the model becomes bf16; the predictor computes in fp32
        optimizer = Lean(groups, halve=model.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2),
                         seed=cfg.seed)
    else:
        optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    full = optimizer.full if cfg.optimizer == "lean" else torch.Tensor.float    # fp32 values
    step = resumed_at = load_train_state(start, objective, optimizer, named) if start else 0
    if start and cfg.lora_rank:
        check_base(model, start)
    wrapped = objective
    if world > 1 and not cfg.shard:
        wrapped = DDP(objective)        # no device_ids: it would move the batch, and wait for it

    # ---- loop ------------------------------------------------------------------------------
    if rank == 0:
        os.makedirs(cfg.out_dir, exist_ok=True)
        if not start:
            remove_checkpoints(cfg.out_dir, keep=0)
    log = Log(cfg, step, n_steps, rank, world)
    arm = f"JEPA with lambda {cfg.lambda_jepa:g}" if cfg.lambda_jepa else "plain diffusion"
    if hasattr(objective, "target"):
        arm += f"; at the end the EMA is still {objective.ema_decay ** n_steps:.0%} the start"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.say(f"{cfg.out_dir}: {trained:,} of {sum(p.numel() for p in model.parameters()):,} "
            f"parameters in {model.compute_dtype} on {world} x {device.type}, {n_steps} steps of "
            f"{cfg.batch_size} out of {len(rows):,} rows, {arm}")
    stop, stopping, first_bad = StopSignal(), 0, torch.tensor(-1, device=device)
    while True:
        if not stopping and (step % cfg.eval_every == 0 or step == n_steps):
            losses = {name: held_out_loss(model, some_rows, cfg, max_length, rank, world)
                      for name, some_rows in held_out.items()}
            log.held_out(step, losses)
        if step > resumed_at and (step % cfg.save_every == 0 or step == n_steps or stopping):
            save_checkpoint(cfg, step, objective, optimizer, named, tok, rank, device)
        if step >= n_steps or stopping:
            break

        # 1 forward (and backward of each micro-batch, to free its memory)
        clock = time.perf_counter()
        lr = lr_at(step, n_steps, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        batches = [inputs(step, batch, fill) for batch, fill in micro_batches(step)]
        total, seen, is_due = {}, [], log.is_due(step + 1)
        z_tgt = objective.embed_targets(batches, n_at_once)     # while no gradient takes up memory
        for micro, batch in enumerate(batches):
            # DDP sums once, FSDP each time: unsummed gradients would be as large as the model
            sums = micro == n_micro - 1 or wrapped is objective
            with nullcontext() if sums else wrapped.no_sync():
                loss, parts = wrapped(*batch, z_tgt[micro])
                (loss / n_micro).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                total[name] = total.get(name, 0) + value / n_micro
            seen += [objective.seen] if is_due else []
        if cfg.anchor:
            total |= anchor.pull(measure=is_due)

        # 2 optimizer; where the gradient is not finite it leaves all as it is, and nobody waits
        grad_norm = torch.nn.utils.clip_grad_norm_(named.values(), cfg.grad_clip or math.inf)
        grad_norm = grad_norm.full_tensor() if cfg.shard else grad_norm
        optimizer.found_inf = 1 - grad_norm.isfinite().float()
        is_first = optimizer.found_inf.bool() & (first_bad < 0)
        first_bad = torch.where(is_first, step, first_bad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 3 EMA (which goes on towards the weights as they are if the update was left out)
        objective.update_target(full)
        step += 1
        if is_due:
            total |= (embedding_numbers(seen) | same_rate_number(objective, batches[0])
                      | bucket_numbers(seen) | movement_numbers(objective, *began, full))
        log.step(step, {**total, "grad_norm": grad_norm, "lr": lr}, clock)
        if log.is_due(step) or world == 1 and stop.number:      # the log has waited already
            stopping, bad = agree([stop.number, int(first_bad)], device)
            if bad >= 0:
                said = not_finite(bad, micro_batches(bad), objective, inputs, world)
                if cfg.on_nan == "stop":
                    raise ValueError(f"{said}; --on_nan=skip would go on, the last checkpoint is "
                                     f"kept")
                log.say(f"{said}; that update is left out")
                first_bad.fill_(-1)

    stop.close()
    log.close()
    if cfg.export_dir and step == n_steps and (rank == 0 or cfg.shard):
        whole = merge(model) if cfg.lora_rank else model
        whole.save(cfg.export_dir if rank == 0 else None, torch.bfloat16)
        if rank == 0:
            tok.save(cfg.export_dir)
    if world > 1:
        del wrapped             # first: DDP's end waits, with the GIL, for threads that may want it
        dist.destroy_process_group()
        if cfg.shard:           # gloo's threads live on, and let go of the last tensors here: while
            time.sleep(1)       # Python ends they could not, and would abort a complete run
    if step < n_steps:                      # the exit code says that the run is not complete
        log.say(f"{cfg.out_dir}: {signal.Signals(stopping).name} after step {step} of {n_steps}, "
                f"which is saved; --resume goes on")
        sys.exit(128 + stopping)


def named_tokenizer(cfg: TrainConfig):
    """The one that cfg.tokenizer names; `words` are those of the task's training rows."""
    is_words = cfg.tokenizer == "words"
    rows = load_task(cfg.task).load("train", cfg.data_dir, cfg.variant) if is_words else ()
    return load_tokenizer(cfg.tokenizer, cfg.chat, rows)


def find_checkpoint(cfg: TrainConfig):
    """The folder to resume from, or None for a new run; never writes over a run by accident."""
    try:
        found = newest_checkpoint(cfg.out_dir)
    except FileNotFoundError:
        if cfg.resume:
            raise
        return None
    if not cfg.resume and not cfg.overwrite:
        raise ValueError(f"{cfg.out_dir} holds a run already; add --resume to go on with it, "
                         f"--overwrite to start anew, or choose another --out_dir")
    return found if cfg.resume else None


@torch.no_grad()
def held_out_loss(model, rows, cfg: TrainConfig, max_length: int, rank=0, world=1) -> dict:
    """{t: mean over rows of the cross-entropy at masked answer tokens}; always the same masks.

    As in training, an answer's fill with end-of-text counts as answer: easy tokens, and many."""
    device = model.embed.weight.device
    fill = max(len(row.answer) for row in rows) + 1 if cfg.eos_fill else 0
    totals = torch.zeros(len(cfg.eval_t), dtype=torch.float64)
    size = min(cfg.batch_size, 64)
    for i in range(0, len(rows), world * size):
        some = rows[i + rank * size:][:size]
        weight, some = len(some), some or rows[:1]      # sharded, every rank has to go along
        x0, maskable, is_real = collate(some, fill, max_length, model.config.eos_id)
        for k, rate in enumerate(cfg.eval_t):
            t = torch.full((len(some),), rate)
            generators = row_generators(0, 0, [row.example_id for row in some])
            xt, is_masked = forward_process(x0, t, maskable, model.config.mask_id, generators,
                                            at_least_one=True)
            nll = model.nll(model.encode(xt, is_real), x0, is_masked)
            totals[k] += weight * diffusion_loss(nll, is_masked, maskable, t).item()
    if cfg.shard:
        model.reshard()                                 # what encode has left gathered for nll
    totals = totals.to(device) if device.type != "mps" else totals
    if world > 1:
        dist.all_reduce(totals)
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


if __name__ == "__main__":
    run(main, TrainConfig, default="config/tiny.py")
