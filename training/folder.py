"""The folder of a run: one run at a time, what a new run clears, what a resumed run may change.

A resumed run equals an uninterrupted one only if (seed, step) still means the same batches, masks
and loss. So the settings that the checkpoint was made with are compared with those of the command:

    FIXED   make the batches, the objective or the optimizer: another value is refused
    SAID    one may want another value halfway: it holds from now on, and the run says so
    FREE    where and how it runs, and how one watches it: may change without a word
"""
import hashlib
import json
import os
import re
import shutil
from array import array
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from pretrained.fingerprint import fingerprint
from pretrained.weights import find_weights, new_folder, newest_checkpoint
from tasks.files import lock, read_json
from training.ranks import agree, on_all_ranks, rank_and_world

STATE = "train_state"
FIXED = set("""seed task variant chat rows max_length eos_fill batch_size init_weights preset
    lambda_jepa t_ctx t_tgt n_pred_layer ema_decay mask_scope diffusion_t loss_form objective target
    masks pool pool_layer pred_width pred_lr ema_dtype tau active_block anchor lora_rank lora_alpha
    lora_targets optimizer beta2 mask_token shift n_layer n_head n_kv_head n_embd n_hidden
    block_size""".split())
SAID = set("lr min_lr_ratio warmup_ratio epochs max_steps n_steps weight_decay grad_clip dtype"
           .split())
# the rows of data_dir, the vocabulary of tokenizer and the weights of init_from are compared
# themselves, not their names
FREE = set("""out_dir resume overwrite export_dir device data_dir tokenizer init_from revision
    micro_batch_size shard shard_over gather_once compile pack checkpoint_activations on_nan
    log_every eval_every eval_rows eval_t forget_task save_every keep test_questions track"""
           .split())


@contextmanager
def claim(cfg, device):
    """Hold out_dir for one run -> the folder to resume from, or None for a new run.

    All ranks call it, before anything is loaded. Raises OSError or ValueError, one sentence, if
    another process holds out_dir, if it cannot be written or does not fit export_dir, and as
    find_checkpoint and changes.
    """
    out, export = (Path(os.path.realpath(path)) for path in (cfg.out_dir, cfg.export_dir))
    if cfg.export_dir and (out == export or out in export.parents or export in out.parents):
        raise ValueError(f"one of export_dir={cfg.export_dir!r} and out_dir={cfg.out_dir!r} lies "
                         f"in the other; an exported model needs a folder apart from the run's")
    found = find_checkpoint(cfg.out_dir, cfg.resume, cfg.overwrite)     # a mistake makes no folder
    if cfg.export_dir and not (found and os.path.isdir(cfg.export_dir)):
        new_folder(cfg.export_dir)      # one that is in use is an error now, not at the end
    with ExitStack() as held:
        with on_all_ranks(device):
            if rank_and_world()[0] == 0:
                held.enter_context(lock_out_dir(cfg.out_dir))
        folder = find_checkpoint(cfg.out_dir, cfg.resume, cfg.overwrite)    # now nobody changes it
        check_all_see(cfg.out_dir, folder, device)
        if folder:
            changes(folder, vars(cfg))
            check_not_ended(folder, cfg.max_steps)
        yield folder


def lock_out_dir(out_dir: str):
    """Make the folder, and return its lock. Raises OSError if it cannot be written."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        return lock(out_dir)
    except OSError as error:
        raise OSError(f"out_dir={out_dir!r} cannot be written: {error}") from None


def check_all_see(out_dir: str, folder, device):
    """Raise ValueError on all ranks if one would begin and another go on, or from another step."""
    step = read_state(folder)[0] if folder else -1
    most, least = agree([step, -step], device)
    if most != -least:
        raise ValueError(f"out_dir={out_dir!r} has not the same checkpoint for all processes; on "
                         f"several nodes it must lie on a disk that they share")


def find_checkpoint(out_dir: str, resume, overwrite: bool):
    """Return the folder to resume from, or None for a new run.

    resume: True, False, or "auto", which resumes if there is a checkpoint. Raises ValueError where
    a new run would write over another by accident or beside a model, FileNotFoundError where there
    is nothing to resume.
    """
    try:
        found = newest_checkpoint(out_dir)
    except FileNotFoundError:
        if resume is True:
            raise
        check_is_ours(out_dir)
        return None
    if found == str(out_dir):           # every script would load it, and not what the run leaves
        raise ValueError(f"{out_dir} is a model's own folder, it has a config.json; choose another "
                         f"--out_dir for a run")
    if not resume and not overwrite:
        raise ValueError(f"{out_dir} holds a run already; add --resume to go on with it, "
                         f"--overwrite to start anew, or choose another --out_dir")
    return found if resume else None


def check_is_ours(out_dir: str):
    """Raise ValueError for a folder that a run would remove, and that no run has made."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    found = sorted(name for name in names if re.fullmatch(r"saving|removing|step_\d+", name))
    if found and "settings.json" not in names:
        raise ValueError(f"{os.path.join(out_dir, found[0])} was not made by a run, which would "
                         f"remove it; choose another --out_dir")


def start_out_dir(out_dir: str, is_new: bool):
    """Clear the folder of a new run: the checkpoints and answers of an older one go."""
    rank, _ = rank_and_world()
    if rank == 0 and is_new:
        remove_checkpoints(out_dir, keep=0)
        for name in os.listdir(out_dir):
            if re.fullmatch(r"test\.jsonl?(\.part\d+)?|summary\.json", name):
                os.remove(os.path.join(out_dir, name))


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


# ----------------------------------------------------------------------------------------------
# what a resumed run may change


def read_state(folder) -> tuple[int, dict]:
    """Read train_state.json of a checkpoint -> the step after which it was written, its settings.

    Raises ValueError or OSError, one sentence with the file's name.
    """
    where = os.path.join(folder, f"{STATE}.json")
    state = read_json(where)
    step, settings = state.get("step"), state.get("settings", {})
    if type(step) is not int or step < 0:       # a bool is no int here
        raise ValueError(f"{where} does not say after which step it was written: step = "
                         f"{json.dumps(step)[:50]}")
    name = Path(folder).name
    if re.fullmatch(r"step_\d+", name) and int(name[5:]) != step:
        raise ValueError(f"{where} says step {step}, and its folder says {name}")
    if not isinstance(settings, dict) or not isinstance(settings.get("resumed", []), list):
        raise ValueError(f"{where} has settings of another form: {json.dumps(settings)[:50]}")
    return step, settings


def changes(folder, settings: dict) -> dict:
    """Compare settings with those of a checkpoint -> {name: [was, is]} of all that differ.

    A setting that either of them lacks is left out. Raises ValueError that names every FIXED one.
    """
    _, before = read_state(folder)
    now = json.loads(json.dumps(settings))                      # tuples are lists, as in the file
    names = (now.keys() & before.keys()) - {"resume", "overwrite"}
    changed = {name: [before[name], now[name]] for name in sorted(names)
               if before[name] != now[name]}
    for name, (was, is_now) in changed.items():
        if kind_of(was) is not kind_of(is_now):
            raise ValueError(f"{folder}/{STATE}.json has {name} = {json.dumps(was)[:50]}, which is "
                             f"not of the kind of {is_now!r}")
    wrong = sorted(changed.keys() & FIXED)
    if "init_weights" in wrong and "init_from" in changed:
        wrong.append("init_from")
    if wrong:
        was, is_now = (", ".join(f"{name}={changed[name][i]!r}" for name in wrong) for i in (0, 1))
        raise ValueError(f"{folder} was trained with {was}, and this command has {is_now}: "
                         f"--resume goes on with the same batches and the same objective")
    return changed


def kind_of(value):
    """Return the type of a value in JSON; 1 and 1.0 are both numbers."""
    return float if type(value) is int else type(value)


def check_not_ended(folder, n_steps: int):
    """Raise ValueError if the checkpoint lies beyond the last step; 0: not known yet."""
    step, _ = read_state(folder)
    if n_steps and step > n_steps:
        raise ValueError(f"{folder} has trained {step} steps, and this run ends after {n_steps}; "
                         f"a larger max_steps would fit")


def resumed_line(settings: dict) -> str:
    """Say what a resumed run now does otherwise in training, or "" if nothing, or if it is new."""
    if not settings.get("resumed"):
        return ""
    step, changed = settings["resumed"][-1]["step"], settings["resumed"][-1]["changed"]
    names = changed.keys() & SAID
    if "max_steps" in names:            # which says as much
        names -= {"n_steps"}
    said = [f"{name} {changed[name][1]} (was {changed[name][0]})" for name in sorted(names)]
    was, is_now = changed.get("n_steps", (0, 0))
    if is_now > was and settings["min_lr_ratio"] < 1:           # the cosine had fallen already
        said.append("the cosine of lr is longer, so that lr jumps up again")
    return f"resumed after step {step} with {', '.join(said)}" if said else ""


def settings_of(cfg, rows: list, n_steps: int) -> dict:
    """Return the settings of a run, and what they stand for: its length, its rows, its base."""
    base = fingerprint(find_weights(cfg.init_from, cfg.revision)) if cfg.init_from else ""
    return asdict(cfg) | {"n_steps": n_steps, "rows": hash_of_rows(rows), "init_weights": base}


def hash_of_rows(rows: list) -> str:
    """Identify the rows of tokens and their order."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(array("q", [row.example_id, len(row.prompt), len(row.answer),
                                  *row.prompt, *row.answer]).tobytes())
    return f"{len(rows)} with hash {digest.hexdigest()}"
