"""A fake GPU: CPU tensors are real, "cuda" tensors have shapes but no numbers and no memory.

On it train.py and the sampler run unedited at 8 B on a laptop. It shows where the host waits for
the GPU, copies that are not pinned, CPU tensors that get into operations on the GPU, which kernel
torch would choose for attention, and how many bytes live at the peak. It cannot show numbers,
times, fragmentation of memory, the buffers of NCCL and cuBLAS, the order of streams, or CUDA
graphs. What is read back says that all is well: `any` is False, `all` True, a float 0, an integer
-1.

    python tests/fake_cuda.py GUARD.so FOLDER CASE ...      prints a line of JSON for each case

test_fake_cuda.py builds GUARD.so from fake_cuda.cpp, and states the laws. The modules of torch are
patched for good, so this runs in a process of its own.
"""
import ctypes
import importlib.util
import json
import os
import struct
import sys
import time
import traceback
import weakref
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":              # before torch, which looks for the guard when it is loaded
    libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for path in (libraries / "libc10.so", libraries / "libtorch_cpu.so", sys.argv[1]):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)

from configurator import configure      # noqa: E402

import torch                            # noqa: E402
import torch.distributed as dist        # noqa: E402
import torch.distributed._tools.fake_collectives    # noqa: E402, F401
import torch.nn.functional as F         # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode    # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore       # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode              # noqa: E402
from torch.utils._pytree import tree_leaves                             # noqa: E402


import sample                           # noqa: E402
import train                            # noqa: E402
import training.setup                   # noqa: E402
from model import DLLM, PRESETS, ModelConfig        # noqa: E402
from sampling.reveal import Sampling    # noqa: E402
from tasks.common import Row            # noqa: E402
from training.checkpoint import training_state      # noqa: E402

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
SMALL = 4096        # elements of a tensor from the CPU that can be read back as they were
CARDS = {"A100": (8, 0), "H200": (9, 0), "4090": (8, 9)}    # compute capability
# these return as many elements as the numbers say: the host waits to learn how many
SIZED_BY_NUMBERS = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
                    "bincount", "equal", "is_nonzero"}


# ----------------------------------------------------------------------------------------------
# the GPU


class FakeGPU(TorchDispatchMode):
    """Run what is called under it as if there was a GPU, and keep books by phase.

    waits, mixed, kernels: {phase: Counter of texts}. peak: {phase: bytes}. phase: the name of the
    part that runs now, set from outside.
    """

    def __init__(self, card: str):
        super().__init__()
        self.card, self.fake = card, FakeTensorMode(allow_non_fake_inputs=True)
        self.waits, self.mixed, self.kernels = (defaultdict(Counter) for _ in range(3))
        self.phase, self.bytes, self.peak = "start", 0, defaultdict(int)
        self.size_of = {}               # {a storage: its bytes}

    def __enter__(self):
        global gpu
        gpu = self
        torch._C._set_only_lift_cpu_tensors(True)       # torch.tensor(..., device="cuda") copies
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def wait(self, what: str):
        self.waits[self.phase][f"{what} at {place()}"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(type(x).__name__ == "DTensor" for x in tensors):
            return NotImplemented       # its operations on local parts come here again
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE):
            return function(*args, **kwargs)            # DTensor asks for shapes, in a mode of its
        on_gpu, to = any(map(is_on_gpu, tensors)), kwargs.get("device")
        if not on_gpu and (to is None or torch.device(to).type != "cuda"):
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.wait("item")
            return self.number_of(args[0])
        is_copy = name in ("_to_copy", "copy_")
        if is_copy and (out := self.copy_to_cpu(name, args, kwargs)) is not None:
            return out
        if name == "_varlen_attn":
            self.kernels[self.phase]["varlen"] += 1
        self.look_at(name, args, kwargs, tensors)
        out = self.copy_from_cpu(name, args, kwargs)
        if out is None:
            with self.fake:
                out = function(*args, **kwargs)
        self.pass_on_numbers(name, args)
        if name in ("any", "all"):
            out.made_by = name
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor) and is_on_gpu(x):
                self.count_bytes(x.untyped_storage())
        return out

    def number_of(self, x):
        """Return the number that is read back from a tensor of one element."""
        if hasattr(x, "numbers"):
            return x.numbers.item()
        if x.dtype == torch.bool:
            return getattr(x, "made_by", "") == "all"
        return 0.0 if x.dtype.is_floating_point else -1

    def copy_to_cpu(self, name, args, kwargs):
        """Make the real tensor of a copy from the GPU; None if this is another copy."""
        target = args[0] if name == "copy_" else None
        to = kwargs.get("device")
        to_cpu = to is not None and torch.device(to).type == "cpu" if target is None else (
            not is_on_gpu(target))
        if not to_cpu:
            return None
        is_late = kwargs.get("non_blocking") or name == "copy_" and args[2:3] == (True,)
        if not is_late:
            self.wait("copy to the CPU")
        if target is not None:
            return target
        if hasattr(args[0], "numbers"):
            return args[0].numbers.clone()
        # a flag that is read late says: go on
        fill = 1 if is_late else 0 if args[0].dtype.is_floating_point else -1
        if args[0].dtype == torch.bool and not is_late:
            fill = getattr(args[0], "made_by", "") == "all"
        return torch.full(args[0].shape, fill, dtype=kwargs.get("dtype") or args[0].dtype)

    def copy_from_cpu(self, name, args, kwargs):
        """Make the fake tensor of a copy to the GPU, and look whether it is pinned; None: another
        operation. The source may be a file of 16 GB, which is not read."""
        if name != "_to_copy" or type(args[0]) is FakeTensor:
            return None
        dtype, strides = kwargs.get("dtype"), torch.empty(args[0].shape, device="meta").stride()
        with self.fake:
            out = torch.empty_strided(args[0].shape, strides, dtype=dtype or args[0].dtype,
                                      device=GPU)
        if out.numel() <= SMALL and args[0].device.type == "cpu":
            out.numbers = args[0].to(dtype)
        return out

    def pass_on_numbers(self, name, args):
        """Keep the numbers of small tensors through collectives: all ranks say the same."""
        if name == "allgather_":
            for every, x in zip(*args[:2]):
                for out in every:
                    if hasattr(x, "numbers"):
                        out.numbers = x.numbers
        elif name.endswith("_") and name != "allreduce_" and hasattr(args[0], "numbers"):
            del args[0].numbers

    def look_at(self, name, args, kwargs, tensors):
        """Note waits, and CPU tensors among those of the GPU."""
        if name in SIZED_BY_NUMBERS or name == "repeat_interleave" and len(tensors) > 1:
            self.wait(name)
        if name.startswith("index") and any(is_on_gpu(x) and x.dtype == torch.bool
                                            for x in tree_leaves(args[1:2])):
            self.wait("index by bools")
        cpu = [x for x in tensors if not is_on_gpu(x) and x.device.type == "cpu"]
        if not cpu:
            return
        if name not in ("_to_copy", "copy_"):
            if any(x.dim() for x in cpu):           # a number of the CPU goes along as an argument
                self.mixed[self.phase][f"{name} at {place()}"] += 1
        elif not (getattr(cpu[0], "is_pinned_here", False) and (
                kwargs.get("non_blocking") or args[2:3] == (True,))):
            self.wait("pageable copy")

    # ---- bytes ----

    def count_bytes(self, storage):
        if storage._cdata not in self.size_of:
            self.resize(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self.free, storage._cdata)

    def resize(self, key, n_bytes: int):
        self.bytes += n_bytes - self.size_of.get(key, 0)
        self.size_of[key] = n_bytes
        self.peak[self.phase] = max(self.peak[self.phase], self.bytes)

    def free(self, key):
        self.bytes -= self.size_of.pop(key, 0)


gpu = None          # the one that is in use


def is_on_gpu(x) -> bool:
    return type(x) is FakeTensor and x.fake_device.type == "cuda"


def place() -> str:
    """Return the innermost line of the project that runs now."""
    for frame, line in traceback.walk_stack(None):
        path = Path(frame.f_code.co_filename)
        if ROOT in path.parents and path != Path(__file__) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{line}"
    return "?"


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              enable_gqa=False):
    """F.scaled_dot_product_attention by the kernel that torch 2.11 to 2.13 choose on the card.

    In their order (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp): on Hopper cuDNN first;
    flash, which takes no mask; the memory-efficient one, which takes no grouped heads; math.
    """
    if not is_on_gpu(q):
        return REAL["attention"](q, k, v, attn_mask, dropout_p, is_causal, scale=scale,
                                 enable_gqa=enable_gqa)
    is_half, is_gqa = q.dtype in (torch.bfloat16, torch.float16), q.shape[1] != k.shape[1]
    assert enable_gqa or not is_gqa
    needs_lse = torch.is_grad_enabled()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
    if CARDS[gpu.card][0] == 9 and is_half:
        kind = "cudnn"
        out = aten._scaled_dot_product_cudnn_attention(q, k, v, attn_mask, needs_lse)[0]
    elif is_half and attn_mask is None:
        kind = "flash"
        out = aten._scaled_dot_product_flash_attention(q, k, v)[0]
    elif not is_gqa:
        kind = "efficient"
        shape = *q.shape[:3], k.shape[2]
        bias = None if attn_mask is None else attn_mask.expand(shape)
        out = aten._scaled_dot_product_efficient_attention(q, k, v, bias, needs_lse)[0]
    else:
        kind = "math"
        out = aten._scaled_dot_product_attention_math(q, k, v, attn_mask, enable_gqa=True)[0]
    gpu.kernels[gpu.phase][kind] += 1
    return out


class Stream:
    """Stands for a stream and its context: all work is done at once."""
    device, device_index, stream_id, cuda_stream, priority = GPU, 0, 0, 0, 0

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def nothing(self, *_):
        pass
    wait_stream = wait_event = nothing

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        gpu.wait("stream.synchronize")


class Event:
    """Stands for an event, which has always happened."""

    def __init__(self, *_, **__):
        pass

    def nothing(self, *_):
        pass
    record = wait = nothing

    def query(self):
        return True

    def synchronize(self):
        gpu.wait("event.synchronize")


def pin(x, *_):
    pinned = x.clone()
    pinned.is_pinned_here = True
    return pinned


def resize_storage(storage, n_bytes: int):
    """FSDP drops gathered weights so."""
    if gpu and storage._cdata in gpu.size_of:
        gpu.resize(storage._cdata, n_bytes)
    return REAL["resize_"](storage, n_bytes)


def move_module(module, *args, **kwargs):
    """nn.Module.to, which cannot put a fake tensor in the place of a real one's data."""
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    if device is None or device.type != "cuda":
        return REAL["to"](module, *args, **kwargs)
    moved = {}                          # a parameter with two uses stays one
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and not is_on_gpu(p):
                if id(p) not in moved:
                    moved[id(p)] = torch.nn.Parameter(p.detach().to(device), p.requires_grad)
                part._parameters[name] = moved[id(p)]
    return module


REAL = {"attention": F.scaled_dot_product_attention, "resize_": torch.UntypedStorage.resize_,
        "to": torch.nn.Module.to, "init": dist.init_process_group, "shard": training.setup.shard}


def shard(objective, device, *args):
    """training.setup's, after the predictor has moved: FSDP moves as nn.Module.to does."""
    if hasattr(objective, "predictor"):
        objective.predictor.to(device)
    REAL["shard"](objective, device, *args)


def install():
    """Put the fake in the place of torch's own functions."""
    for name, value in dict(
            is_available=True, device_count=1, current_device=0, is_initialized=True,
            is_current_stream_capturing=False, set_device=None, _lazy_init=None,
            is_bf16_supported=True).items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.get_device_capability = lambda *_: CARDS[gpu.card]
    torch.cuda.get_device_name = lambda *_: gpu.card
    torch.cuda.synchronize = lambda *_: gpu.wait("synchronize")
    torch.cuda.Stream = torch.cuda.stream = Stream
    torch.cuda.current_stream = torch.cuda.default_stream = Stream
    torch.cuda.Event = Event
    torch.Tensor.pin_memory = pin
    FakeTensor.tolist = lambda x: x.cpu().tolist()
    torch.Tensor.record_stream = lambda *_: None
    torch.UntypedStorage.resize_ = resize_storage
    torch.nn.Module.to = move_module
    for name in ("normal_", "kaiming_uniform_", "uniform_"):    # seconds, for a predictor of 8 B
        setattr(torch.nn.init, name, lambda x, *_, **__: x)
    F.scaled_dot_product_attention = attention
    torch.backends.cudnn.version = lambda: 91900
    torch.Generator = Generator
    training.setup.shard = shard
    dist.init_process_group = lambda backend, **_: REAL["init"](
        "fake", rank=0, world_size=int(os.environ["WORLD_SIZE"]), store=FakeStore())


class Generator(torch.Generator):
    """A generator of the CPU that says which device it was made for."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        generator.made_for = torch.device(device)
        return generator

    device = property(lambda self: self.made_for)


# ----------------------------------------------------------------------------------------------
# what runs on it


def write_hole(folder: Path, config: ModelConfig):
    """Write a checkpoint in bf16 that takes no room: behind the header its file is a hole."""
    with torch.device("meta"):
        model = DLLM(config)
    header, end = {}, 0
    for name, p in model.named_parameters():
        start, end = end, end + 2 * p.numel()
        header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(model.published))


class Enough(Exception):
    """Raised when a run has shown what it is run for."""


@contextmanager
def replaced(place, name: str, value):
    """Have a function or attribute of a module or class be another for a while."""
    real = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, real)


def train_case(folder: Path, card, config, preset, n_layer, lengths, world=1, options=()):
    """Run train.main on a config for one step, without a log line, with AdamW's moments as later
    steps find them. lengths: tokens of each row. Phases: load, then step."""
    shape = ModelConfig(**{**PRESETS[preset], "n_layer": n_layer})
    weights = folder / f"{preset}-{n_layer}"
    if not weights.exists():
        write_hole(weights, shape)
    rows = [Row(i, [5] * (n - round(0.59 * n)), [6] * (round(0.59 * n) - 1))
            for i, n in enumerate(lengths)]
    tok = SimpleNamespace(eos_id=shape.eos_id, check_fits=lambda config: None)

    def with_moments(objective, cfg):
        optimizer = training.setup.make_optimizer(objective, cfg)
        training_state(objective, optimizer)
        return optimizer

    def not_due(*_):
        gpu.phase = "step"
        return False

    def check(guard, is_due, world):
        assert train_check(guard, is_due, world) == ""
        raise Enough
    train_check = train.Guard.check
    cfg = configure(train.TrainConfig, [
        config, f"--init_from={weights}", f"--out_dir={folder / 'run'}", "--overwrite",
        "--data_dir=", *options])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR="nowhere")
    with (FakeGPU(card) as fake, suppress(Enough), replaced(train, "load_rows", lambda *_: rows),
          replaced(training.setup, "load_tokenizer", lambda *_, **__: tok),
          replaced(train, "make_optimizer", with_moments),
          replaced(train, "held_out_loss", lambda *_: {}),
          replaced(train.Log, "is_due", not_due), replaced(train.Guard, "check", check)):
        train.main(cfg)
    if dist.is_initialized():
        dist.destroy_process_group()
    return fake


def sample_case(folder: Path, card, preset, n_layer, settings):
    """Fill two blocks of three prompts' answers. Phases: start, block (inside of one), between."""
    with torch.device("meta"):
        model = DLLM(ModelConfig(**{**PRESETS[preset], "n_layer": n_layer}))
    fill_block = sample.fill_block

    def in_phase(*args):
        gpu.phase = "block"
        fill_block(*args)
        gpu.phase = "between"
    with FakeGPU(card) as fake, replaced(sample, "fill_block", in_phase), torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                module._parameters[name] = torch.empty(p.shape, dtype=torch.bfloat16, device=GPU)
        model.compute_dtype = torch.bfloat16
        prompts = [[5] * n for n in (70, 100, 30)]
        generators = [torch.Generator(GPU) for _ in prompts]
        sample.generate(model, prompts, Sampling(**settings), generators, stop=True)
    return fake


def main(folder: Path, cases):
    install()
    for name, case in cases.items():
        began = time.perf_counter()
        fake = {"train": train_case, "sample": sample_case}[case.pop("kind")](folder, **case)
        print(json.dumps({"case": name, "seconds": round(time.perf_counter() - began, 1),
                          **{book: getattr(fake, book) for book in ("waits", "mixed", "kernels",
                                                                    "peak")}}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[2]), json.loads(sys.argv[3]))
