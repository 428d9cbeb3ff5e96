"""Laws of sharding that one process can see, as rank 0 of two of which the other does not exist.

This file is also the program that runs on torch's fake process group: collectives do nothing, so
numbers are meaningless there, but shapes, graphs and who moves what are real.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = range(20, 56, 3)          # twelve of them


def sharded(pack: bool = False, compiled: bool = False, gather_once: bool = False):
    """Make a JEPA objective of two layers with grouped heads, sharded over two ranks."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from jepa import DLLMJEPA
    from model import DLLM, ModelConfig
    from training.setup import compile_blocks
    from training.sharding import shard
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    config = ModelConfig(vocab_size=64, mask_id=1, eos_id=0, n_layer=2, n_head=4, n_kv_head=2,
                         n_embd=32, n_hidden=48)
    model = DLLM(config).init_weights(torch.Generator().manual_seed(0))
    model.pack = pack
    objective = DLLMJEPA(model)
    if compiled:
        compile_blocks(model, objective.target, backend="aot_eager")
    shard(objective, torch.device("cpu"), gather_once=gather_once)
    return objective


def batch_of(T: int):
    from model import row_generators
    x0 = torch.randint(2, 64, (4, T))
    is_real = torch.ones(4, T, dtype=torch.bool)
    is_real[1, T // 2:] = False
    return x0, is_real, is_real, row_generators(0, T, range(4))


def graphs(pack: str):
    """Train, or packed embed targets, over twelve lengths, compiled; print graphs and breaks."""
    from torch._dynamo.utils import counters

    from model import Packed
    if pack == "packed":
        give_varlen_a_kernel()
    objective, seen = sharded(pack == "packed", True), []
    if pack == "packed":
        Packed.row_by_row = Packed.varlen           # as on a GPU; after what is not compiled
    for T in LENGTHS:
        if pack == "packed":
            objective.embed_targets([batch_of(T)])
        else:
            objective(*batch_of(T))[0].backward()
        seen.append(counters["stats"]["unique_graphs"])
    print(json.dumps({"graphs": seen, "breaks": list(counters["graph_break"])}))


def give_varlen_a_kernel():
    """Let torch's attention over rows of any length run on a CPU: of the right shapes, no more."""
    from torch.nn.attention import varlen

    @varlen._varlen_attn.register_kernel("cpu")
    def forward(q, k, v, *rest):
        return torch.zeros_like(q), torch.zeros(q.shape[1::-1]), torch.zeros(2, dtype=torch.uint64)


def inputs(pack: str):
    """Train a step; print how many tensors entered FSDP, and how many that nobody had moved."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    import model
    moved, entered = {}, []
    real, pre_forward = model.to_device, FSDPState._root_pre_forward

    def to_device(x, device):
        copy = real(x, device).clone()      # on a CPU the copy would be x itself
        moved[id(copy)] = copy
        return copy

    def spy(state, module, args, kwargs):   # on a GPU this moves what it gets, and waits for it
        entered.extend(x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor))
        return pre_forward(state, module, args, kwargs)
    model.to_device, FSDPState._root_pre_forward = to_device, spy
    sharded(pack == "packed")(*batch_of(20))[0].backward()
    ids = [x for x in entered if x.dtype == torch.int64]
    print(json.dumps({"ids": len(ids), "unmoved": sum(id(x) not in moved for x in ids),
                      "masks": sum(x.dtype == torch.bool for x in entered)}))


def gathers(_):
    """Print how often a step of two micro-batches gathers a block, of the target and of the online
    model, without and with gather_once."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group
    found, real = [], _fsdp_param_group.foreach_all_gather
    for once in (False, True):
        objective, seen = sharded(gather_once=once), []
        group_of = {id(block._get_fsdp_state()._fsdp_param_group.fsdp_params): name
                    for name in ("target", "model") for block in getattr(objective, name).blocks}

        def spy(params, *rest, seen=seen, group_of=group_of):
            seen.append(group_of.get(id(params)))
            return real(params, *rest)
        _fsdp_param_group.foreach_all_gather = spy
        batches = [batch_of(20), batch_of(23)]
        for batch, z_tgt in zip(batches, objective.embed_targets(batches)):
            objective(*batch, z_tgt)[0].backward()
        found.append({name: seen.count(name) / len(objective.model.blocks)
                      for name in ("target", "model")})
    print(json.dumps(found))


def run_here(what: str, pack: str = "padded"):
    done = subprocess.run([sys.executable, __file__, what, pack], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("pack", ["padded", "packed"])
def test_nothing_that_is_still_on_the_cpu_enters_fsdp(pack):
    found = run_here("inputs", pack)
    assert found == {"ids": 2, "unmoved": 0, "masks": 0}    # one pass of each encoder


def test_a_compiled_and_sharded_block_is_one_graph_for_all_lengths():
    found = run_here("graphs", "padded")
    assert found["breaks"] == [] and found["graphs"][1] == found["graphs"][-1] == 2, found


def test_packed_attention_is_within_the_graph():
    found = run_here("graphs", "packed")
    assert found["breaks"] == [] and set(found["graphs"]) == {1}, found


def test_a_pass_gathers_a_block_once_and_gather_once_keeps_it_for_backward():
    """Once forward and once backward for each micro-batch; the target has no backward."""
    assert run_here("gathers") == [{"target": 2, "model": 4}, {"target": 2, "model": 2}]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    programs = {"graphs": graphs, "inputs": inputs, "gathers": gathers}
    programs[sys.argv[1]](sys.argv[2])
