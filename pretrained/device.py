"""Where tensors live: the device and dtype that a run uses, and copies that do not wait for it."""
import torch


def to_device(x, device):
    """x on the device. From the CPU to a GPU it travels behind the host, which does not wait."""
    if x.is_cpu and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def index_of(where, device):
    """(B, T) bool, or indices (rows, columns) -> such indices on the device; a bool there waits."""
    if isinstance(where, torch.Tensor):
        where = where.nonzero(as_tuple=True)
    return tuple(to_device(i, device) for i in where)


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises ValueError if there is none."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} is not usable here: "
                         f"{str(error).splitlines()[0]}") from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on a GPU that computes in it, else fp32: on CPUs bf16 is rarely faster."""
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_bf16 else "float32"
    return getattr(torch, name)
