"""Checkpoints: atomic save, and resume on any number of processes, sharded or not.

A checkpoint is a folder out_dir/step_*: the model as its family publishes it, its tokenizer, and
beside them the state that only training needs. There is no random state: batches and masks are
functions of (seed, step). Nothing is pickled.

    config.json, model.safetensors, tokenizer.json ...      DLLM.from_pretrained reads these
    train_state.safetensors                                 predictor, EMA target, optimizer
    train_state/                                            the same of a sharded run, by ranks
    train_state.json                                        step and settings
"""
import json
import os
import re
import shutil
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pretrained.weights import (Stored, catalogue, check_names_and_shapes, find_weights,
                                newest_checkpoint, open_safetensors, read_model, read_safetensors,
                                read_tensors)
from tasks.files import read_json
from training.lora import add_lora, check_base, merge
from training.ranks import agree, rank_and_world
from training.sharding import is_sharded, read_shards, write_shards

STATE = "train_state"


def find_checkpoint(out_dir: str, resume: bool, overwrite: bool):
    """Return the folder to resume from, or None for a new run.

    Raises ValueError where a new run would write over another by accident, FileNotFoundError where
    there is nothing to resume.
    """
    try:
        found = newest_checkpoint(out_dir)
    except FileNotFoundError:
        if resume:
            raise
        return None
    if not resume and not overwrite:
        raise ValueError(f"{out_dir} holds a run already; add --resume to go on with it, "
                         f"--overwrite to start anew, or choose another --out_dir")
    return found if resume else None


def start_out_dir(out_dir: str, is_new: bool):
    """Make the folder of a run; a new run removes the checkpoints and answers of an older one."""
    rank, _ = rank_and_world()
    if rank == 0:
        os.makedirs(out_dir, exist_ok=True)
        if is_new:
            remove_checkpoints(out_dir, keep=0)
            for name in os.listdir(out_dir):
                if re.fullmatch(r"test\.jsonl?(\.part\d+)?|summary\.json", name):
                    os.remove(os.path.join(out_dir, name))


def save_checkpoint(out_dir: str, step: int, objective, optimizer, tok, settings: dict, keep: int):
    """Write out_dir/step_*, then remove all but the `keep` newest. Every rank calls it.

    It is written aside and renamed when complete: a process killed at any moment leaves a
    checkpoint that works. Raises OSError, one sentence, on all ranks if one cannot write.
    """
    rank, _ = rank_and_world()
    aside, sharded = os.path.join(out_dir, "saving"), is_sharded(objective)
    state = training_state(objective, optimizer)

    @contextmanager
    def all_or_none():      # ends on every rank at once, so that none waits for one that failed
        reason = ""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
        if agree([int(bool(reason))], objective.model.embed.weight.device) != [0]:
            if rank == 0:
                shutil.rmtree(aside, ignore_errors=True)        # makes room on a full disk
            raise OSError(f"the checkpoint of step {step} cannot be written to {out_dir}, "
                          f"older ones are kept: {reason or 'another process failed'}")

    with all_or_none():
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.makedirs(aside)
            tok.save(aside)
            with open(os.path.join(aside, f"{STATE}.json"), "w") as file:
                json.dump({"step": step, "settings": settings}, file, indent=1)
    with all_or_none():
        if rank == 0 or sharded:
            merge(objective.model).save(aside if rank == 0 else None)
    with all_or_none():
        if sharded:
            write_shards(state, os.path.join(aside, STATE))
        elif rank == 0:
            save_file({name: value.contiguous() for name, value in state.items()},
                      os.path.join(aside, f"{STATE}.safetensors"))
    with all_or_none():
        if rank == 0:
            flush(aside)
            new = os.path.join(out_dir, f"step_{step:07d}")
            shutil.rmtree(new, ignore_errors=True)
            os.replace(aside, new)
            flush(out_dir, deep=False)
            remove_checkpoints(out_dir, keep)


def trainable(objective) -> dict:
    """{name: parameter} of everything that the optimizer moves."""
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


def training_state(objective, optimizer) -> dict:
    """{name: tensor} of predictor, target and moments; with LoRA of predictor and adapters, whose
    base is init_from's. AdamW makes its moments at the first step: until then they are made here.
    """
    whole, named = objective.state_dict(), trainable(objective)
    has_lora = any("lora_" in name for name in whole)
    state = {name: value for name, value in whole.items() if name.startswith("predictor.")
             or ("lora_" in name if has_lora else name.startswith("target."))}
    for name, p in named.items():
        if not optimizer.state[p]:
            optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                                  "exp_avg": torch.zeros_like(p.detach()),
                                  "exp_avg_sq": torch.zeros_like(p.detach())}
        for key, value in optimizer.state[p].items():
            state[f"adam.{key}.{name}"] = value.detach()
    return state


def flush(folder: str, deep: bool = True):
    """Wait until the disk holds the folder: a power cut could keep a rename and lose the data."""
    for path, _, names in os.walk(folder) if deep else [(folder, [], [])]:
        for name in [*(os.path.join(path, name) for name in names), path]:
            file = os.open(name, os.O_RDONLY)
            os.fsync(file)
            os.close(file)


def remove_checkpoints(out_dir: str, keep: int):
    """Remove all but the newest `keep`. Each is renamed first: half of one must not look whole."""
    names = sorted((name for name in os.listdir(out_dir) if re.fullmatch(r"step_\d+", name)
                    and os.path.isfile(os.path.join(out_dir, name, "config.json"))),
                   key=lambda name: int(name[5:]))
    removing = os.path.join(out_dir, "removing")
    shutil.rmtree(removing, ignore_errors=True)
    for name in names[:max(0, len(names) - keep)]:
        os.replace(os.path.join(out_dir, name), removing)
        shutil.rmtree(removing)


def load_train_state(folder: str, objective, optimizer) -> int:
    """Fill predictor, target and optimizer -> the step to go on from.

    Raises ValueError naming a tensor that does not fit.
    """
    state = training_state(objective, optimizer)
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
    if any("lora_" in name for name in state):
        check_base(objective.model, folder)
    return step


@torch.no_grad()
def load_ema(folder: str, model):
    """Turn a model that was loaded from the folder into the EMA target of its training.

    An untied head has no EMA and stays. With LoRA the base is read again, and gets the EMA's
    adapters. Raises ValueError or FileNotFoundError, one sentence, if there is no EMA or it does
    not fit.
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
