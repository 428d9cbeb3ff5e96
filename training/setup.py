"""Set-up: how train.py gets its model, objective, optimizer and rows, by what the settings say.

    load              weights or a fresh model, and the tokenizer; with LoRA, if asked for
    make_objective    the paper's (jepa.py) or a control's; on its device, compiled, sharded
    make_optimizer    AdamW or lean.py; every trainable parameter in exactly one group
    wrap              data parallelism
    export            the model as its family publishes it
"""
import math
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from jepa import DLLMJEPA
from model import DLLM, PRESETS, ModelConfig, Packed
from pretrained.device import pick_dtype
from pretrained.tokenizer import load_tokenizer
from pretrained.weights import find_weights
from tasks.common import load_examples, tokenize
from training.checkpoint import check_finite, trainable
from training.controls import ControlConfig, check_controls, has_control, make_control
from training.lean import Lean
from training.lora import add_lora, merge
from training.ranks import on_all_ranks
from training.sharding import is_sharded, shard
from training.track import check_installed


@dataclass
class ScaleConfig(ControlConfig):
    """Settings of a model's shape, and for models that are large for their machine."""
    # the shape of a model from scratch; 0: the preset's
    n_layer: int = 0                    # blocks
    n_head: int = 0                     # heads; the width of one is n_embd / n_head
    n_kv_head: int = 0                  # heads of keys and values; 0: the preset's share of n_head
    n_embd: int = 0                     # width
    n_hidden: int = 0                   # width of the MLP; 0: the preset's multiple of n_embd
    block_size: int = 0                 # longest sequence, in tokens
    # autoregressive weights (Llama, Qwen) as a diffusion model: see pretrained/a2d.py
    mask_token: str = ""                # the added token that masks; empty: a reserved or a new one
    shift: bool = False                 # as in the base, state i scores token i+1, as Dream does
    # LoRA: see training/lora.py
    lora_rank: int = 0                  # width of the adapters; 0: all weights are trained
    lora_alpha: float = 64.0            # the adapters' output is scaled by alpha / rank
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                     "up_proj", "down_proj")  # which matrices of a block get one
    optimizer: Literal["adamw", "lean"] = "adamw"  # lean: exact fp32 weights at half the memory
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto: bf16 on GPUs
    shard: bool = False                 # each process keeps a part of all state (FSDP2)
    shard_over: int = 0                 # processes that share one copy, such as a node's; 0: all
    gather_once: bool = False           # with shard: faster, for 2 bytes a parameter more
    compile: bool = False               # torch.compile each block; pays on long runs
    pack: bool = False                  # no computation on padding; the same loss
    checkpoint_activations: Literal["none", "selective", "full"] = "none"  # recompute every 2nd/all
    on_nan: Literal["stop", "skip"] = "stop"  # at a gradient that is not finite

    def check_scale(self):
        """Raise ValueError, one sentence, where settings exclude each other."""
        if self.init_from and (given := shape_settings(self)):
            name, value = next(iter(given.items()))
            raise ValueError(f"{name}={value} shapes a model from scratch, and the weights of "
                             f"init_from={self.init_from!r} have a shape; leave out one of the two")
        if self.lora_rank and not self.lora_alpha:
            raise ValueError("lora_alpha=0 switches the adapters off; the paper's public "
                             "reproduction has 64")
        if (self.mask_token or self.shift) and not self.init_from:
            raise ValueError("mask_token and shift are for autoregressive weights; name them with "
                             "init_from")
        if self.lora_rank and not self.lora_targets:
            raise ValueError("lora_targets is empty; name what gets an adapter, such as q_proj")
        if self.lora_rank and not self.init_from:
            raise ValueError(f"lora_rank={self.lora_rank} adapts weights that exist; name them "
                             f"with init_from, or leave it at 0 to train all")
        known = ScaleConfig.lora_targets
        if unknown := [name for name in self.lora_targets if name not in known]:
            raise ValueError(f"lora_targets has {unknown[0]!r}; there are {', '.join(known)}")
        if self.lora_rank and self.optimizer == "lean":
            raise ValueError("optimizer='lean' splits what is fine-tuned in full; LoRA's few "
                             "weights need optimizer='adamw'")
        if self.shard and (self.lora_rank or self.optimizer == "lean"):
            raise ValueError("shard=True spreads a full fine-tuning with optimizer='adamw'; LoRA "
                             "and lean are for one GPU: leave out one of the two")
        if not self.shard and (self.shard_over or self.gather_once):
            raise ValueError(f"shard_over={self.shard_over} and gather_once={self.gather_once} say "
                             f"how to shard; add --shard, or leave them out")
        if self.shard_over == 1:
            raise ValueError("shard_over=1 would give each process a whole copy; the processes of "
                             "a node would fit, such as 8")
        check_controls(self)


def check_settings(cfg):
    """Raise ValueError, one sentence, for the first setting of TrainConfig that does not fit."""
    for name, value in vars(cfg).items():
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite")
        if type(value) is int and value > 2 ** 31 and name != "seed":
            raise ValueError(f"{name}={value} is too large; at most 2**31 would fit")
    for names, fits, words in [
        ("out_dir", lambda text: text.strip() and "\0" not in text, "is not the name of a folder"),
        ("t_ctx t_tgt", is_rate, "is not a masking rate: those lie in (0, 1]"),
        ("eval_t", lambda rates: rates and all(map(is_rate, rates)),
         "must be masking rates, such as 0.2,0.5; those lie in (0, 1]"),
        ("ema_decay", lambda x: 0 <= x <= 1, "must lie in [0, 1]; the paper has 0.996"),
        ("beta2", lambda x: 0 <= x < 1, "must lie in [0, 1); AdamW's own is 0.999"),
        ("min_lr_ratio warmup_ratio", lambda x: 0 <= x <= 1, "must lie in [0, 1]"),
        ("batch_size max_length log_every eval_every eval_rows save_every keep active_block",
         lambda n: n >= 1, "must be at least 1"),
        ("tau", lambda x: x > 0, "must be above 0; SimCLR has 0.1"),
        ("lambda_jepa n_pred_layer micro_batch_size max_steps epochs lr weight_decay grad_clip "
         "seed test_questions pool_layer pred_width pred_lr anchor lora_rank lora_alpha n_layer "
         "n_head n_kv_head n_embd n_hidden block_size shard_over",
         lambda x: x >= 0, "must not be negative"),
        ("seed", lambda n: n < 2 ** 63, "must lie below 2**63"),
        # generous bounds, so that a slip is answered at once and not by a full memory
        ("batch_size micro_batch_size lora_rank pred_width n_head n_kv_head n_embd",
         lambda n: n <= 1 << 16, "is too large; at most 65536 would fit"),
        ("n_layer", lambda n: n <= 1000, "is too large; at most 1000 would fit"),
        ("n_hidden block_size", lambda n: n <= 1 << 20, "is too large; at most 2**20 would fit"),
        ("n_pred_layer", lambda n: n <= 64, "is too large; the paper has up to 5"),
        ("epochs", lambda x: x <= 1e6, "is too large; at most a million would fit"),
    ]:
        for name in names.split():
            if not fits(getattr(cfg, name)):
                raise ValueError(f"{name}={getattr(cfg, name)!r} {words}")
    if not cfg.epochs and not cfg.max_steps:
        raise ValueError("epochs=0 and max_steps=0 train nothing; one of them must be above 0")
    if len({f"{t:g}" for t in cfg.eval_t}) < len(cfg.eval_t):
        raise ValueError(f"eval_t={cfg.eval_t} has a rate twice")
    if cfg.resume and cfg.overwrite:
        raise ValueError("resume goes on with the run in out_dir, and overwrite removes it; leave "
                         "out one of the two")
    cfg.check_scale()
    check_installed(cfg.track)


def is_rate(t) -> bool:
    return 0 < t <= 1


def count_micro_batches(cfg, world: int) -> int:
    """Return how many micro-batches each rank runs in a step. Raises ValueError if the batch or
    the shards do not fit the number of processes."""
    if cfg.shard and world == 1:
        raise ValueError("shard=True needs two processes or more: torchrun --nproc_per_node=8 "
                         "train.py ...")
    if cfg.shard_over and world % cfg.shard_over:
        raise ValueError(f"shard_over={cfg.shard_over} does not divide the {world} processes")
    size = cfg.micro_batch_size or max(1, cfg.batch_size // world)
    n_micro, remainder = divmod(cfg.batch_size, size * world)
    if remainder:
        raise ValueError(f"batch_size={cfg.batch_size} must be a multiple of "
                         f"micro_batch_size={size} x {world} processes")
    return n_micro


def load(cfg, resume_dir, device):
    """Load or initialise the model -> model, tokenizer, the folder of the weights or None.

    A sharded model comes as shapes only: each rank will read the rows that it keeps. Raises
    ValueError or FileNotFoundError, one sentence.
    """
    dtype, folder = pick_dtype(cfg.dtype, device), None
    if cfg.init_from or resume_dir:
        # a checkpoint of LoRA has merged weights, for use; its training goes on from the base
        folder = resume_dir
        if cfg.lora_rank or not resume_dir:
            folder = find_weights(cfg.init_from, cfg.revision)
        place = Path(os.path.realpath(folder))
        if not resume_dir and place.parent == Path(os.path.realpath(cfg.out_dir)) and (
                re.fullmatch(r"step_\d+", place.name)):
            raise ValueError(f"init_from={cfg.init_from!r} is a checkpoint in out_dir, which a new "
                             f"run removes; choose another --out_dir")
        # a checkpoint that the run has written is a diffusion model already
        a2d = dict(mask_token=cfg.mask_token, shift=cfg.shift) if folder != resume_dir else {}
        tok = load_tokenizer(folder, cfg.chat, mask_token=a2d.get("mask_token", ""))
        if cfg.shard:
            model = DLLM.on_meta(folder, **a2d)
        else:
            stored_dtype = dtype if cfg.lora_rank else torch.float32
            model = DLLM.from_checkpoint(folder, stored_dtype, device, **a2d)
        if cfg.tokenizer and named_tokenizer(cfg) != tok:
            raise ValueError(f"tokenizer={cfg.tokenizer!r} is not the vocabulary that {folder} was "
                             f"trained with ({tok.name!r}, {tok.n_vocab} tokens); leave it out")
        tok.check_fits(model.config)
    else:
        tok = named_tokenizer(cfg)
        config = shape_from_scratch(cfg, tok)
        tok.check_fits(config)
        model = DLLM(config).init_weights(torch.Generator().manual_seed(cfg.seed))
    model.compute_dtype = dtype
    model.pack, model.checkpoint_activations = cfg.pack, cfg.checkpoint_activations
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
    return model, tok, folder


def shape_settings(cfg) -> dict:
    """Return the settings of the shape that are given: {a field of ModelConfig: its value}."""
    names = "n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden", "block_size"
    return {name: getattr(cfg, name) for name in names if getattr(cfg, name)}


def shape_from_scratch(cfg, tok) -> ModelConfig:
    """Return the preset's shape with the settings in place of its numbers, for this vocabulary.

    n_kv_head follows n_head, and n_hidden follows n_embd, in the preset's proportion (tiny: every
    head has its own keys, and the MLP is 2.75 wide), unless they are given. Raises ValueError, one
    sentence, where the numbers do not fit each other.
    """
    of_tokenizer = dict(vocab_size=tok.n_vocab, mask_id=tok.mask_id, eos_id=tok.eos_id)
    preset, given = ModelConfig(**of_tokenizer | PRESETS[cfg.preset]), shape_settings(cfg)
    for name, leader in (("n_kv_head", "n_head"), ("n_hidden", "n_embd")):
        if leader in given:
            follows = given[leader] * getattr(preset, name) // getattr(preset, leader)
            given.setdefault(name, max(1, follows))
    return replace(preset, **given)


def named_tokenizer(cfg):
    """Make the tokenizer that the settings name; `words` are those of the task's training rows."""
    if not cfg.tokenizer:
        raise ValueError("a model from scratch needs a vocabulary: add --tokenizer=bytes, toy or "
                         "words, name weights with --init_from, or start from a config such as "
                         "config/tiny.py")
    is_words = cfg.tokenizer == "words"
    rows = load_examples(cfg.task, "train", cfg.data_dir, cfg.variant) if is_words else ()
    return load_tokenizer(cfg.tokenizer, cfg.chat, rows, cfg.mask_token)


def load_rows(task: str, split: str, cfg, tok, max_length: int, rank: int) -> list:
    """Tokenize a split of a task -> [Row]; rows that are too long are left out. Rank 0 counts.

    data_dir and variant are those of cfg.task; another task has its own rows.
    """
    where = (cfg.data_dir, cfg.variant) if task == cfg.task else ()
    examples = load_examples(task, split, *where)
    rows = tokenize(examples, tok, max_length, f"{task} {split}")
    if rank == 0:
        lengths = sorted(len(row.prompt) + len(row.answer) + 1 for row in rows)
        print(f"{task} {split}: {len(rows):,} rows of {lengths[0]} to {lengths[-1]} tokens, half "
              f"of them up to {lengths[len(rows) // 2]}, 95 % up to "
              f"{lengths[len(rows) * 95 // 100]}")
        if len(rows) < len(examples):
            print(f"{task} {split}: {len(examples) - len(rows)} of {len(examples)} rows are "
                  f"longer than max_length={max_length} tokens and are left out")
    return rows


def make_objective(model, cfg, folder, device):
    """Make the joint objective around the model, where and how it will run."""
    paper = dict(lambda_jepa=cfg.lambda_jepa, t_ctx=cfg.t_ctx, t_tgt=cfg.t_tgt,
                 n_pred_layer=cfg.n_pred_layer, ema_decay=cfg.ema_decay, mask_scope=cfg.mask_scope,
                 diffusion_t=cfg.diffusion_t, loss_form=cfg.loss_form, seed=cfg.seed)
    objective = make_control(model, cfg, paper) if has_control(cfg) else DLLMJEPA(model, **paper)
    if not cfg.shard:
        objective.to(device)
    if cfg.compile:
        compile_blocks(*filter(None, (model, getattr(objective, "target", None))))
    if cfg.shard:
        shard(objective, device, folder, cfg.shard_over, cfg.gather_once)
    return objective


def compile_blocks(*encoders, **options):
    """Compile each block, for batches of any shape. options: torch.compile's."""
    # the lengths of rows would be compiled in; a decorator would import the compiler with model.py
    Packed.row_by_row = torch.compiler.disable(Packed.row_by_row)
    for encoder in encoders:
        for block in encoder.blocks:
            block.compile(dynamic=True, **options)


def make_optimizer(objective, cfg):
    """AdamW with weight decay on matrices only, and the predictor's own learning rate."""
    named = trainable(objective)
    groups = []
    for is_predictor in (False, True):
        for is_matrix in (True, False):
            params = [p for name, p in named.items() if (p.ndim > 1) == is_matrix
                      and name.startswith("predictor.") == is_predictor]
            groups.append({"params": params, "weight_decay": cfg.weight_decay * is_matrix,
                           "lr_scale": cfg.pred_lr if is_predictor else 1.0})
    assert sum(len(group["params"]) for group in groups) == len(named)      # each in exactly one
    settings = dict(lr=cfg.lr, betas=(0.9, cfg.beta2))
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=True)
    # the model becomes bf16 with remainders; the predictor stays fp32
    optimizer = Lean(groups, halve=objective.model.parameters(), seed=cfg.seed, **settings)
    objective.fp32_of = optimizer.fp32_of
    return optimizer


def wrap(objective, world: int):
    """Return what the loop calls: the objective, in DDP if there are ranks and no shards."""
    if world == 1 or is_sharded(objective):
        return objective
    return DDP(objective)       # without device_ids, which would copy the batch and synchronise


def clip_gradients(objective, max_norm: float):
    """Scale the gradients to a norm of at most max_norm; 0: leave them -> the norm before ()."""
    params = trainable(objective).values()
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def opening_line(cfg, objective, n_steps: int, n_rows: int, world: int) -> str:
    """Describe the run in a line."""
    params = list(objective.model.parameters())
    n_trained = sum(p.numel() for p in params if p.requires_grad)
    method = f"JEPA with lambda {cfg.lambda_jepa:g}" if cfg.lambda_jepa else "plain diffusion"
    if hasattr(objective, "target"):
        left = objective.ema_decay ** n_steps
        method += f"; at the end the EMA is still {left:.0%} the start"
    return (f"{cfg.out_dir}: {n_trained:,} of {sum(p.numel() for p in params):,} parameters in "
            f"{objective.model.compute_dtype} on {world} x {params[0].device.type}, {n_steps} "
            f"steps of {cfg.batch_size} out of {n_rows:,} rows, {method}")


def export(model, tok, folder: str, rank: int):
    """Write the model in bf16, adapters merged, as its family publishes it -> a line to print.

    All ranks call it. It is written aside, then renamed; a folder that an earlier part of the run
    has filled stays as it is. Raises OSError on all ranks if bf16 cannot hold a value.
    """
    if os.listdir(folder):
        return f"{folder} holds a model already, which stays as it is"
    aside = f"{folder.rstrip('/')}.exporting"
    with on_all_ranks(model.embed.weight.device):
        merged = merge(model) if rank == 0 or is_sharded(model) else model
        check_finite(dict(merged.named_parameters()), torch.bfloat16)
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)        # half of one, which a kill may have left
        os.makedirs(aside)
    if rank == 0 or is_sharded(model):
        merged.save(aside if rank == 0 else None, torch.bfloat16)
    if rank == 0:
        tok.save(aside)
        os.replace(aside, folder)       # which is empty
    return f"{folder} holds the model in bf16"
