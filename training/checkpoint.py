"""What survives accidents: what is saved, how it is read again, signals to stop, bad gradients.

A checkpoint is a folder out_dir/step_*: the model as its family publishes it, its tokenizer, and
beside them what only training needs. No random state: batches and masks are functions of (seed,
step). Nothing is pickled.

    config.json, model.safetensors, tokenizer.json ...      DLLM.from_pretrained reads these
    train_state.safetensors                                 predictor, EMA target, optimizer
    train_state/                                            the same of a sharded run, by ranks
    train_state.json                                        step and settings
"""
import json
import os
import re
import shutil
import signal
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from pretrained.weights import (Stored, catalogue, check_names_and_shapes, find_weights,
                                open_safetensors, read_model, read_safetensors, read_tensors)
from tasks.files import read_json
from training.lora import add_lora, check_base, merge
from training.sharding import agree, is_sharded, read_shards, write_shards

STATE = "train_state"


def save_checkpoint(cfg, step: int, objective, optimizer, named: dict, tok, rank: int, device):
    """Every rank calls it. Raises OSError, one sentence, on all of them if one cannot write.

    Written aside and renamed when complete, and only then is an older one removed: a process
    killed at any moment leaves a checkpoint that works.
    """
    aside, sharded = os.path.join(cfg.out_dir, "saving"), is_sharded(objective)
    state = besides_model(objective) | moments(optimizer, named)

    @contextmanager
    def all_or_none():      # ends on every rank at once, so that none waits for one that has failed
        reason = ""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
        if agree([int(bool(reason))], device) != [0]:
            if rank == 0:
                shutil.rmtree(aside, ignore_errors=True)        # makes room on a full disk
            raise OSError(f"the checkpoint of step {step} cannot be written to {cfg.out_dir}, "
                          f"older ones are kept: {reason or 'another process failed'}")

    with all_or_none():
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.makedirs(aside)
            tok.save(aside)
            with open(os.path.join(aside, f"{STATE}.json"), "w") as file:
                json.dump({"step": step, "settings": asdict(cfg)}, file, indent=1)
    with all_or_none():
        if rank == 0 or sharded:
            model = merge(objective.model) if cfg.lora_rank else objective.model
            model.save(aside if rank == 0 else None)
    with all_or_none():
        if sharded:
            write_shards(state, os.path.join(aside, STATE))
        elif rank == 0:
            save_file({name: value.contiguous() for name, value in state.items()},
                      os.path.join(aside, f"{STATE}.safetensors"))
    with all_or_none():
        if rank == 0:
            flush(aside)
            new = os.path.join(cfg.out_dir, f"step_{step:07d}")
            shutil.rmtree(new, ignore_errors=True)
            os.replace(aside, new)
            flush(cfg.out_dir, deep=False)
            remove_checkpoints(cfg.out_dir, keep=cfg.keep)


def besides_model(objective) -> dict:
    """Predictor and target; with LoRA predictor and adapters, for their base is init_from's."""
    state = objective.state_dict()
    has_lora = any("lora_" in name for name in state)
    return {name: value for name, value in state.items() if name.startswith("predictor.")
            or ("lora_" in name if has_lora else name.startswith("target."))}


def moments(optimizer, named: dict) -> dict:
    """What the optimizer keeps of each parameter; Lean has it from the start, AdamW from a first
    step on, and until then it is made here."""
    for p in named.values():
        if not optimizer.state[p]:
            optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                                  "exp_avg": torch.zeros_like(p.detach()),
                                  "exp_avg_sq": torch.zeros_like(p.detach())}
    return {f"adam.{key}.{name}": value.detach()
            for name, p in named.items() for key, value in optimizer.state[p].items()}


def flush(folder: str, deep: bool = True):
    """Waits until the disk holds it: a rename may else outlive, in a power cut, what it renamed."""
    for path, _, names in os.walk(folder) if deep else [(folder, [], [])]:
        for name in [*(os.path.join(path, name) for name in names), path]:
            file = os.open(name, os.O_RDONLY)
            os.fsync(file)
            os.close(file)


def remove_checkpoints(out_dir: str, keep: int):
    """All but the newest; they are renamed first, so that half of one is never taken for one."""
    names = sorted((name for name in os.listdir(out_dir) if re.fullmatch(r"step_\d+", name)
                    and os.path.isfile(os.path.join(out_dir, name, "config.json"))),
                   key=lambda name: int(name[5:]))
    removing = os.path.join(out_dir, "removing")
    shutil.rmtree(removing, ignore_errors=True)
    for name in names[:max(0, len(names) - keep)]:
        os.replace(os.path.join(out_dir, name), removing)
        shutil.rmtree(removing)


def load_train_state(folder: str, objective, optimizer, named: dict) -> int:
    """Fills predictor, target and optimizer as they were, on any number of processes, sharded or
    not; -> the step to go on from. Raises ValueError naming a tensor that does not fit."""
    state = besides_model(objective) | moments(optimizer, named)
    shards, whole = os.path.join(folder, STATE), os.path.join(folder, f"{STATE}.safetensors")
    if os.path.isdir(shards):
        read_shards(state, shards)
    elif is_sharded(objective):
        read_shards(state, folder, besides=catalogue(folder))
    else:
        given = read_safetensors(whole)
        check_names_and_shapes(given, state, whole)
        for name, value in state.items():
            value.copy_(given[name])
    where = os.path.join(folder, f"{STATE}.json")
    step = read_json(where).get("step")
    if type(step) is not int:
        raise ValueError(f"{where} does not say after which step it was written")
    return step


@torch.no_grad()
def load_ema(folder: str, model):
    """Makes a model that was loaded from folder the EMA target of its training; an untied head has
    no EMA and stays. With LoRA it is the base, read anew, beside the EMA's adapters.

    Raises ValueError or FileNotFoundError, one sentence, if there is no EMA or it does not fit.
    """
    shards, stored = os.path.join(folder, STATE), {}
    where = shards if os.path.isdir(shards) else folder
    for file in sorted(os.listdir(where)):
        if file.endswith(".safetensors"):
            path = os.path.join(where, file)
            with open_safetensors(path) as tensors:
                stored |= {name: Stored(path, tuple(tensors.get_slice(name).get_shape()))
                           for name in tensors.keys()}
    if not any(name.startswith("target.") for name in stored):
        raise ValueError(f"{folder} holds no EMA weights: only a checkpoint of training with "
                         f"lambda_jepa > 0 does; --weights=online would fit")

    def read(encoder, kind=""):
        state = {f"{encoder}.{name}": p.detach() for name, p in model.named_parameters()
                 if kind in name and not name.startswith("head.")}
        if where == shards:
            return read_shards(state, shards, besides=stored.keys() - state.keys())
        ours = {name: stored[name] for name in state if name in stored}
        check_names_and_shapes(ours, state, f"{shards}.safetensors")
        for name, tensor in read_tensors(ours):
            state[name].copy_(tensor)
    if not any("lora_" in name for name in stored):
        return read("target")
    settings = read_json(os.path.join(folder, f"{STATE}.json")).get("settings", {})
    try:
        base, lora = find_weights(settings["init_from"], settings["revision"]), [
            settings[key] for key in ("lora_rank", "lora_alpha", "lora_targets", "seed")]
    except (KeyError, TypeError):
        raise ValueError(f"{folder}/{STATE}.json does not say on which base its adapters were "
                         f"trained") from None
    named = dict(model.named_parameters())
    for name, tensor in read_model(base, model, None, model.embed.weight.device):
        named[name].copy_(tensor)
    add_lora(model, *lora)
    read("model", "lora_")
    check_base(model, folder)
    read("target", "lora_")


@torch.no_grad()
def not_finite(step: int, batches, objective, inputs, world: int) -> str:
    """A sentence on which examples, taken alone, have a loss that is not finite; on every rank."""
    rows = [(row, fill) for batch, fill in batches for row in batch]
    bad = torch.tensor([-1 if objective(*inputs(step, [row], fill))[0].isfinite()
                        else row.example_id for row, fill in rows],
                       device=objective.model.embed.weight.device)
    if hasattr(objective.model, "reshard"):
        objective.model.reshard()
    if world > 1:
        every = [torch.empty_like(bad) for _ in range(world)]
        dist.all_gather(every, bad)
        bad = torch.cat(every)
    ids = sorted(i for i in bad.tolist() if i >= 0)
    who = f"because of the examples with id {', '.join(map(str, ids))}"
    if not ids:
        who = "though the loss of each example alone is finite"
    elif len(ids) == len(bad):
        who = f"and so for each of the {len(bad)} examples alone; a lower lr may help"
    return f"at step {step + 1} the gradient is not finite, {who}"


class StopSignal:
    """Notes Ctrl-C and SIGTERM, so that the loop can save and end between two steps.

    More of them change nothing (torchrun passes on what its processes have got already); kill -9
    and Ctrl-\\ end at once. torchrun itself kills after 30 s (newer ones have --shutdown_timeout).
    """

    def __init__(self):
        self.number = 0
        self.before = {number: signal.signal(number, self.note)
                       for number in (signal.SIGINT, signal.SIGTERM)}

    def note(self, number, frame):
        self.number = int(number)

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
