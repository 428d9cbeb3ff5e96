"""Several processes as one: who is who, what the others hold, and how each of them ends.

torchrun starts one process per GPU and gives each its rank, and so does Slurm's srun; without them
we are rank 0 of 1. Every collective of the project is in this file. All ranks have to call it, in
the same order.
"""
import functools
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from configurator import sentence
from pretrained.device import pick_device


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are: as torchrun says, else 0 of 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def ranks_of_srun(env):
    """Say in torchrun's words what srun says in its own, if it has started several processes.

    A batch script or a shell may know the tasks of the whole job, while it is itself a single one:
    the tasks of the step count, where they are given.
    """
    n_tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if "RANK" not in env and "SLURM_PROCID" in env and n_tasks != "1":
        port = 20000 + int(env.get("SLURM_JOB_ID", 0)) % 10000  # jobs on one node need two
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=n_tasks,
                   LOCAL_RANK=env.get("SLURM_LOCALID", env["SLURM_PROCID"]),
                   MASTER_PORT=env.get("MASTER_PORT", str(port)))


def start_ranks(device: str, backend: str = "", timeout: timedelta = timedelta(hours=2)):
    """Join the group that torchrun or srun started, if one did -> rank, world, torch.device.

    backend: empty is nccl on GPUs and gloo on CPUs. timeout: longest wait of one rank for another;
    at 8 B the others wait while rank 0 writes a checkpoint. Raises ValueError for a bad device.
    """
    rank, world = rank_and_world()
    if world == 1:
        return rank, world, pick_device(device)
    if "MASTER_ADDR" not in os.environ:
        raise ValueError(f"srun has started {world} processes and MASTER_ADDR does not say where "
                         f"they meet: put `export MASTER_ADDR=$(scontrol show hostnames | head -1)`"
                         f" before srun, or start one process by srun --ntasks=1")
    if device.startswith("cuda:"):
        raise ValueError(f"device={device!r} is one GPU for {world} processes; device=cuda gives "
                         f"each its own")
    if device in ("auto", "cuda") and torch.cuda.is_available():
        local_rank = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
        torch.cuda.set_device(local_rank)                       # what "cuda" means in this process
    device = pick_device(device)
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    dist.init_process_group(backend, timeout=timeout,
                            device_id=device if backend == "nccl" else None)
    return rank, world, device


@contextmanager
def group_of_one(device):
    """Have a process group of this process alone, which is what sharding asks for."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def as_rank(main):
    """Wrap a script's main(cfg): with several processes, each leaves by os._exit when it is done.

    The threads of gloo outlive the process group. If they drop their last tensor while the
    interpreter shuts down they need a GIL that is gone, and abort a run that was complete. So
    output is flushed and the process ends without a shutdown. A mistake ends as one sentence.
    """
    ranks_of_srun(os.environ)               # before the settings are read: rank 0 says a mistake

    @functools.wraps(main)
    def wrapped(cfg):
        rank, world = rank_and_world()
        if world == 1:
            return main(cfg)
        code = 0
        try:
            main(cfg)
            wait_for_all()                  # nobody leaves while another still needs the group
        except SystemExit as stop:
            code = stop.code or 0
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except BaseException as error:
            code = sentence(error) or traceback.format_exc().rstrip()
        if isinstance(code, str):
            if rank:                # all ranks may have the same to say, or miss one that has left:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)   # when rank 0 has said its sentence
                time.sleep(10)                                  # torchrun ends the others
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return wrapped


# ----------------------------------------------------------------------------------------------
# collectives: each is the identity when there is one process


def wait_for_all():
    """Return when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def agree(numbers: list[int], device) -> list[int]:
    """The largest of each number over the ranks."""
    if not dist.is_initialized():
        return numbers
    largest = torch.tensor(numbers, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def first_reason(reason: str, device) -> str:
    """The first rank's reason that is not empty, up to 1000 bytes of it; empty if all are."""
    if not dist.is_initialized():
        return reason
    text = torch.tensor(list(reason.encode("utf-8", "replace")[:1000].ljust(1000)), device=device)
    texts = [bytes(x.tolist()).decode("utf-8", "ignore").strip() for x in gather_from_ranks(text)]
    return next(filter(None, texts), "")


@contextmanager
def on_all_ranks(device):
    """End a block on all ranks if it fails on one: the others would hang in the next collective.

    An error in files or values on any rank becomes an OSError of one line on all of them.
    """
    reason = ""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if reason := first_reason(reason, device):
        raise OSError(reason)


def sum_over_ranks(x):
    """The sum of a tensor over the ranks; in place where there are several."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather_from_ranks(x) -> list:
    """[x of rank 0, x of rank 1, ...], all of one shape."""
    if not dist.is_initialized():
        return [x]
    every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(every, x)
    return every


def gather_batch(parts: list):
    """[(b, C)] of the micro-batches of this rank -> (B, C) of the whole batch, in its order:
    `batch_at` deals row i to part i % n_parts."""
    every = torch.cat(gather_from_ranks(torch.stack(parts)))                # (n_parts, b, C)
    return every.transpose(0, 1).flatten(0, 1)


def scatter_batch(whole, n_micro: int) -> list:
    """The inverse: (B, C) of the whole batch -> [(b, C)] of this rank's micro-batches."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = [whole[i::n_micro * world] for i in range(n_micro * world)]
    return parts[rank * n_micro:(rank + 1) * n_micro]


def local_part(p):
    """A tensor, or the part of a sharded one that this rank holds."""
    return p.to_local() if hasattr(p, "to_local") else p
