"""Sharded training: FSDP2 for the modules, DCP for their state.

Each of n ranks keeps 1/n of the rows of every tensor: online model, EMA target, predictor,
gradients and moments, all in fp32. A block's weights are gathered, in the dtype of the activations,
just before it runs, and dropped afterwards. So a parameter costs 20 bytes over n GPUs; each also
holds embedding and head (2 GB at 8 B, in bf16) and the block that is running.

On several nodes the ranks of a node can share one copy of everything, so that weights are gathered
within the node and only gradients cross the network (HSDP).
"""
import os

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from pretrained.weights import Stored, check_names_and_shapes, read_model


def shard(objective, device, folder=None, over: int = 0, gather_once: bool = False):
    """Shard the modules of the objective, and read weights on the meta device from the folder.

    over: consecutive ranks that share one copy; 0: all. gather_once: the online blocks stay
    gathered from forward to backward: one gather less, for 2 bytes a parameter on each rank.
    """
    # half a second of imports, which only sharded runs need
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    world = dist.get_world_size()
    shape = (world,) if over in (0, world) else (world // over, over)   # the last one is sharded
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("copies", "parts")[-len(shape):])
    model, target = objective.model, getattr(objective, "target", None)
    # a block's inputs are not cast: the rope tables among them must stay fp32
    policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for encoder in filter(None, (model, target)):
        for block in encoder.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy,
                        reshard_after_forward=encoder is target or not gather_once)
        # Embedding, norm and head are one group, because they may be tied. The model's group stays
        # gathered from run to the end of backward, so that unembed finds the head.
        # unembed gets no hooks: they would reduce the group before the embedding's gradient.
        fully_shard(encoder, mesh=mesh, mp_policy=policy, reshard_after_forward=encoder is target)
        register_fsdp_forward_method(encoder, "run")
    if hasattr(objective, "predictor"):
        fully_shard(objective.predictor, mesh=mesh)     # computes in fp32
    if folder is None:
        return
    for encoder in filter(None, (model, target)):
        encoder.to_empty(device=device)
    model.tie()
    local = {name: p.detach().to_local() for name, p in model.named_parameters()}
    rows = {name: rows_here(p) for name, p in model.named_parameters()}
    for name, tensor in read_model(folder, model, torch.float32, device, rows):
        local[name].copy_(tensor)
    if target is not None:
        for name, p in target.named_parameters():
            p.detach().to_local().copy_(local[name])


def rows_here(p) -> slice:
    """Return the rows of a sharded tensor that this rank keeps: FSDP2 cuts as torch.chunk does."""
    part, n_parts = p.device_mesh.get_coordinate()[-1], p.device_mesh.shape[-1]
    start = min(part * -(-len(p) // n_parts), len(p))
    return slice(start, start + len(p.to_local()))


def is_sharded(module) -> bool:
    return any(hasattr(p, "full_tensor") for p in module.parameters())


def release(model):
    """Drop the weights that a pass without backward has left gathered, if the model is sharded."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


# ----------------------------------------------------------------------------------------------
# Tensors in and out of files, each rank its own rows, in DCP's safetensors format (its other one is
# pickle). DCP takes a second to import, so only sharded runs import it.


def write_shards(state: dict, folder):
    """Write {name: tensor} into files of every rank, to be read on any number of ranks."""
    import torch.distributed.checkpoint as dcp
    # several files a rank, because DCP holds a file in memory, twice, while it writes it
    file_of = {name: 1 + 8 * i // len(state) for i, name in enumerate(state)}
    try:
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(
            folder, fqn_to_index_mapping=file_of, save_distributed=True))
    except dcp.api.CheckpointException as failed:       # the same on every rank, with a traceback
        raise OSError(first_line(failed)) from None


def read_shards(state: dict, folder, besides=()):
    """Fill the tensors, sharded or whole, in place. Raises ValueError, one sentence, unless the
    files hold exactly these, apart from the names in `besides`."""
    import torch.distributed.checkpoint as dcp
    reader = dcp.HuggingFaceStorageReader(str(folder))
    reader.fs.ls = files_of
    try:
        stored = reader.read_metadata().state_dict_metadata
        check_names_and_shapes({name: Stored(folder, tuple(tensor.size))
                                for name, tensor in stored.items() if name not in besides},
                               state, folder)
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except SafetensorError as error:
        raise ValueError(f"a file in {folder} is truncated or not a safetensors file: "
                         f"{error}") from None
    except dcp.api.CheckpointException as failed:
        raise ValueError(f"{folder} cannot be read: {first_line(failed)}") from None


def files_of(folder) -> list[str]:
    """Return the paths of the files of tensors, without the `._*` that macOS puts beside them."""
    return sorted(os.path.join(folder, name) for name in os.listdir(folder)
                  if name.endswith(".safetensors") and not name.startswith("."))


def first_line(failed) -> str:
    """Return the first line of the error on the first rank where DCP met one."""
    error = next(iter(failed.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]
