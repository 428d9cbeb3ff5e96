"""Tracking: the lines of log.jsonl also go to Weights & Biases or TensorBoard, if asked to.

    pip install wandb; python train.py --track=wandb                WANDB_MODE=offline: no account
    pip install tensorboard; python train.py --track=tensorboard; tensorboard --logdir=out

Without this setting neither package is needed.
"""
import importlib.util
import json
import os
import secrets
from pathlib import Path

from tasks.files import write_text


def check_installed(track: str):
    """Raise ValueError, one sentence, if the package is missing; a folder of its name is none."""
    if track == "none":
        return
    spec = importlib.util.find_spec(track)
    if not (spec and spec.origin):
        raise ValueError(f"track={track!r} needs a package that is not installed here; "
                         f"`pip install {track}` would help")


def start_tracking(track: str, out_dir: str, settings: dict, step: int):
    """Start, or go on after this step -> send(line), which takes a line of the log, and close().

    Raises OSError, one sentence, where wandb does not start, for example without an account.
    """
    if track == "wandb":
        import wandb
        id_file = Path(out_dir, "wandb_id")         # a resumed run is the same run there
        if not step or not id_file.is_file():
            write_text(id_file, secrets.token_hex(4))
        try:
            run = wandb.init(project="dllm-jepa", name=Path(os.path.abspath(out_dir)).name,
                             id=id_file.read_text(), resume="allow", dir=out_dir, config=settings,
                             allow_val_change=True)
        except wandb.Error as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise OSError(f"track='wandb' does not start: {first} "
                          f"(WANDB_MODE=offline would keep the run on this machine)") from None
        # the steps after the last checkpoint come again, and wandb's own count does not go back
        run.define_metric("*", step_metric="step")
        return lambda line: run.log(numbers_of(line)), run.finish
    if track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(out_dir, purge_step=step + 1)        # hides what will come again
        writer.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```")

        def send(line):
            for name, value in numbers_of(line).items():
                writer.add_scalar(name, value, line["step"])
        return send, writer.close
    return lambda line: None, lambda: None


def numbers_of(line: dict) -> dict:
    """Return the numbers of a line of the log by name; held-out losses are held_out/task/t."""
    numbers = {name: value for name, value in line.items() if name != "held_out"}
    for task, by_t in line.get("held_out", {}).items():
        numbers |= {f"held_out/{task}/{t}": loss for t, loss in by_t.items()}
    return {name: value for name, value in numbers.items() if value is not None}
