"""Devices: which device and dtype a run uses, copies to a GPU without a synchronisation, and the
random streams of a device."""
import hashlib

import torch


def to_device(x, device):
    """Return x on the device. From the CPU to a GPU the copy is asynchronous (pinned memory)."""
    if x.is_cpu and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def index_of(where, device):
    """(B, T) bool, or indices (rows, columns) -> indices on the device.

    A bool mask that is on the GPU already forces a synchronisation, for its number of True.
    """
    if isinstance(where, torch.Tensor):
        where = where.nonzero(as_tuple=True)
    return tuple(to_device(i, device) for i in where)


def pick_device(name: str) -> torch.device:
    """Return the device; `auto` is CUDA, else Apple's MPS, else the CPU. Raises ValueError."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device={name!r} is not usable here: "
                         f"{str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise ValueError(f"device={name!r} holds no numbers; cpu, cuda or mps would fit")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype; `auto` is bf16 on a GPU that computes in it, else fp32.

    On a CPU bf16 pays where the CPU multiplies in it (AMX) and the model is not tiny.
    """
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_bf16 else "float32"
    return getattr(torch, name)


def takes_masked_groups(device) -> bool:
    """Return whether a fused attention kernel for half precision takes a mask and fewer heads of
    keys than of queries.

    Of CUDA's, in torch 2.11 to 2.13, only cuDNN's does, which torch tries first on Hopper and
    Blackwell, from cuDNN 9.15.1 on. Elsewhere torch would form all T x T scores.
    """
    if device.type != "cuda":
        return True
    is_first = torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))
    return is_first and (torch.backends.cudnn.version() or 0) > 91500


def stream(*key, device="cpu") -> torch.Generator:
    """Make a generator seeded by a hash of the key, so that every consumer draws numbers of its
    own: a row's masks by (seed, step, example id), an initial weight by (seed, whose it is)."""
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1            # 63 bits, of which a CPU uses 32
    return torch.Generator(device).manual_seed(seed)
