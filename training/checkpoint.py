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
import shutil
from contextlib import contextmanager

import torch

from pretrained.weights import (Stored, catalogue, check_names_and_shapes, find_weights,
                                open_safetensors, read_model, read_safetensors, read_tensors,
                                save_tensors)
from training.folder import (STATE, changes, check_not_ended, read_state,
                             remove_checkpoints)
from training.lora import add_lora, check_base, merge
from training.ranks import local_part, on_all_ranks, rank_and_world
from training.sharding import files_of, is_sharded, read_shards, write_shards


def save_checkpoint(out_dir: str, step: int, objective, optimizer, tok, settings: dict, keep: int):
    """Write out_dir/step_*, then remove all but the `keep` newest. Every rank calls it.

    It is written aside and renamed when complete: a process killed at any moment leaves a
    checkpoint that works. Raises OSError, one sentence, on all ranks if one cannot write, or if
    what would be written is not finite: older checkpoints are removed last.
    """
    rank, _ = rank_and_world()
    aside, sharded = os.path.join(out_dir, "saving"), is_sharded(objective)
    device = objective.model.embed.weight.device
    state = training_state(objective, optimizer)

    @contextmanager
    def all_or_none():      # ends on every rank at once, so that none waits for one that failed
        try:
            with on_all_ranks(device):
                yield
        except OSError as error:
            if rank == 0:
                shutil.rmtree(aside, ignore_errors=True)        # makes room on a full disk
            raise OSError(f"the checkpoint of step {step} cannot be written to {out_dir}, "
                          f"no older one was removed: {error}") from None

    with on_all_ranks(device):
        if rank == 0 and not os.path.isdir(out_dir):
            raise OSError(f"{out_dir} was removed while the run was writing to it")
    with all_or_none():
        model = merge(objective.model) if rank == 0 or sharded else objective.model
        check_finite(dict(model.named_parameters()) | state)
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.mkdir(aside)
            tok.save(aside)
            with open(os.path.join(aside, f"{STATE}.json"), "w") as file:
                json.dump({"step": step, "settings": settings}, file, indent=1)
    with all_or_none():
        if rank == 0 or sharded:
            model.save(aside if rank == 0 else None)
    with all_or_none():
        if sharded:
            write_shards(state, os.path.join(aside, STATE))
        elif rank == 0:
            save_tensors(state, os.path.join(aside, f"{STATE}.safetensors"))
    with all_or_none():
        if rank == 0:
            flush(aside)
            new = os.path.join(out_dir, f"step_{step:07d}")
            shutil.rmtree(new, ignore_errors=True)
            os.replace(aside, new)
            flush(out_dir, deep=False)
            remove_checkpoints(out_dir, keep)


def check_finite(tensors: dict, dtype=None):
    """Raise ValueError that names the first tensor, or the part that this rank has of it, with NaN
    or infinite values. dtype: the one in which they will be stored, None: their own."""
    for name, tensor in tensors.items():
        part = local_part(tensor.detach())
        if part.is_floating_point() and part.numel():
            ends = torch.stack(part.aminmax()).to(dtype)        # NaN passes through aminmax
            if not ends.isfinite().all():
                rates = "lr or pred_lr" if "predictor." in name else "lr"
                raise ValueError(f"{name} has NaN or infinite values; a lower {rates} may help")


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


def load_train_state(folder: str, objective, optimizer, settings: dict) -> int:
    """Fill predictor, target and optimizer -> the step to go on from.

    settings: of this run; what they change is added to the list settings["resumed"]. Raises
    ValueError naming a tensor or setting that does not fit, or a run that has ended already.
    """
    changed, (step, before) = changes(folder, settings), read_state(folder)
    check_not_ended(folder, settings["n_steps"])
    settings["resumed"] = [*before.get("resumed", []), {"step": step, "changed": changed}]
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
    shards, whole = os.path.join(folder, STATE), os.path.join(folder, f"{STATE}.safetensors")
    paths, stored = files_of(shards) if os.path.isdir(shards) else [whole], {}
    for path in filter(os.path.isfile, paths):
        with open_safetensors(path) as tensors:
            stored |= {name: Stored(path, tuple(tensors.get_slice(name).get_shape()))
                       for name in tensors.keys()}
    if not any(name.startswith("target.") for name in stored):
        raise ValueError(f"{folder} holds no EMA weights: only a checkpoint of training with "
                         f"lambda_jepa > 0 does; --weights=online would fit")

    def read(encoder, kind=""):
        state = {f"{encoder}.{name}": p.detach() for name, p in model.named_parameters()
                 if kind in name and not name.startswith("head.")}
        if paths != [whole]:
            return read_shards(state, shards, besides=stored.keys() - state.keys())
        ours = {name: stored[name] for name in state if name in stored}
        check_names_and_shapes(ours, state, whole)
        for name, tensor in read_tensors(ours):
            state[name].copy_(tensor)
    if not any("lora_" in name for name in stored):
        return read("target")
    _, settings = read_state(folder)
    try:
        rank, alpha, seed = (kind(settings[key]) for kind, key in (
            (int, "lora_rank"), (float, "lora_alpha"), (int, "seed")))
        targets, base = list(settings["lora_targets"]), str(settings["init_from"])
        revision = str(settings["revision"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{folder}/{STATE}.json does not say on which base its adapters were "
                         f"trained") from None
    base = find_weights(base, revision)
    named = dict(model.named_parameters())
    for name, tensor in read_model(base, model, None, model.embed.weight.device):
        named[name].copy_(tensor)
    add_lora(model, rank, alpha, targets, seed)
    read("model", "lora_")
    check_base(model, folder)
    read("target", "lora_")
