"""Weights: read and write the folders in which LLaDA, Dream, Llama and Qwen are published.

Such a folder has a config.json, one model.safetensors or numbered parts with an index, and the
small files of its tokenizer. The families call the same tensors and sizes by different names, and
the tables below and in config.py are the only place that knows these names. Our own checkpoints are
one more family, whose names need no change. Nothing is unpickled, and no code that comes with
weights is run.

    python pretrained/weights.py --init_from=out/llada8b_gsm8k --out_dir=export --dtype=bfloat16

converts a checkpoint to the form that its family publishes, for transformers, dllm or llama.cpp.
Memory holds one part at a time.
"""
import math
import os
import re
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # a script in a folder

from configurator import printable, run    # before torch, see there

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from pretrained.a2d import adapt, is_autoregressive
from pretrained.config import CONFIG, KEYS, MODEL_TYPE, config_fields, read_config
from pretrained.tokenizer import load_tokenizer
from tasks.files import check_is_content, check_is_file, naming, read_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PART_BYTES = 5_000_000_000      # at most in one file, as on the hub
DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.py", "*.jinja", "*.md", "LICENSE*")
SMALL_FILES = ("tokenizer*", "vocab*", "added_tokens.json", "special_tokens_map.json", "*.txt",
               "generation_config.json", "*.py", "*.jinja", "*.md", "LICENSE*")
FOREIGN = {     # endings of files that hold weights in a form that is not read here
    (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        "a pickle, which can run code and is never read; convert it to safetensors",
    (".gguf", ".ggml"): "made for llama.cpp; give the safetensors that it was made from, or try "
                        "pretrained/from_gguf.py",
    (".h5", ".msgpack", ".onnx"): "of another framework; convert it to safetensors",
}
TRAINERS = r"training_args|optimizer|scheduler|rng_state"   # pickles beside weights, not weights
SOME = 8                        # of many files, as many are named

# Published names -> ours. {} is the layer's number; .weight or .bias follows.
QWEN = {
    "model.embed_tokens": "embed",
    "model.layers.{}.input_layernorm": "blocks.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blocks.{}.q_proj",
    "model.layers.{}.self_attn.k_proj": "blocks.{}.k_proj",
    "model.layers.{}.self_attn.v_proj": "blocks.{}.v_proj",
    "model.layers.{}.self_attn.q_norm": "blocks.{}.q_norm",
    "model.layers.{}.self_attn.k_norm": "blocks.{}.k_norm",
    "model.layers.{}.self_attn.o_proj": "blocks.{}.o_proj",
    "model.layers.{}.post_attention_layernorm": "blocks.{}.mlp_norm",
    "model.layers.{}.mlp.gate_proj": "blocks.{}.gate_proj",
    "model.layers.{}.mlp.up_proj": "blocks.{}.up_proj",
    "model.layers.{}.mlp.down_proj": "blocks.{}.down_proj",
    "model.norm": "norm",
    "lm_head": "head",
}
RENAME = {
    "llada": {
        "model.transformer.wte": "embed",
        "model.transformer.blocks.{}.attn_norm": "blocks.{}.attn_norm",
        "model.transformer.blocks.{}.q_proj": "blocks.{}.q_proj",
        "model.transformer.blocks.{}.k_proj": "blocks.{}.k_proj",
        "model.transformer.blocks.{}.v_proj": "blocks.{}.v_proj",
        "model.transformer.blocks.{}.attn_out": "blocks.{}.o_proj",
        "model.transformer.blocks.{}.ff_norm": "blocks.{}.mlp_norm",
        "model.transformer.blocks.{}.ff_proj": "blocks.{}.gate_proj",
        "model.transformer.blocks.{}.up_proj": "blocks.{}.up_proj",
        "model.transformer.blocks.{}.ff_out": "blocks.{}.down_proj",
        "model.transformer.ln_f": "norm",
        "model.transformer.ff_out": "head",
    },
    "Dream": QWEN,
    **dict.fromkeys(("a2d-llama", "a2d-qwen2", "a2d-qwen3", "illada"), QWEN),
    MODEL_TYPE: {ours: ours for ours in QWEN.values()},
}
IGNORED = r".*\.rotary_emb\.inv_freq"   # old versions of transformers stored it beside rope_theta


@dataclass
class ConvertConfig:
    init_from: str = ""                 # a checkpoint, an out_dir, or a name on the hub
    revision: str = ""                  # of a name on the hub: branch, tag or commit
    out_dir: str = ""                   # a new or empty folder to write to
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the written weights


def main(cfg: ConvertConfig):
    if not cfg.init_from or not cfg.out_dir:
        raise ValueError("give --init_from=... to read and --out_dir=... to write")
    source, dtype = find_weights(cfg.init_from, cfg.revision), getattr(torch, cfg.dtype)
    published, stored = read_config(source), catalogue(source)
    if not is_autoregressive(published):        # those are written as they are
        config_fields(source, published)        # raises for an unknown family
    if os.path.isfile(os.path.join(source, "tokenizer.json")):  # raises if it is damaged
        load_tokenizer(source)
    new_folder(cfg.out_dir)
    sizes = {name: math.prod(tensor.shape) * dtype.itemsize for name, tensor in stored.items()}
    write_weights(cfg.out_dir, published, small_files(source), sizes, read_tensors(stored, dtype),
                  dtype)
    print(f"{cfg.out_dir}: {len(sizes)} tensors of a {published['model_type']} model in "
          f"{cfg.dtype}, {sum(sizes.values()):,} bytes")


# ----------------------------------------------------------------------------------------------
# folders


def find_weights(name_or_dir, revision: str = "") -> str:
    """Return a checkpoint's folder: given, the newest in an out_dir, or downloaded from the hub.

    Raises FileNotFoundError or ValueError in one sentence. HF_HOME and HF_HUB_OFFLINE are obeyed.
    """
    name = str(name_or_dir)
    if os.path.isdir(name) and revision:
        raise ValueError(f"revision={revision!r} is for names on the hub; {name} is a folder")
    folder = newest_checkpoint(name if os.path.isdir(name) else download(name, revision))
    weights_file(folder)                # raises if there are none, before a tokenizer is looked for
    return folder


def download(name: str, revision: str) -> str:
    """Return the folder of the hub's cache that holds a model. Raises FileNotFoundError."""
    if os.path.isfile(name):
        raise FileNotFoundError(f"{name} is a file; give the folder that holds it")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"there are no weights at {name!r}: it is neither a folder here "
                                f"nor a name on the hub such as GSAI-ML/LLaDA-8B-Base")
    import huggingface_hub  # takes half a second, and is needed only here
    try:
        return huggingface_hub.snapshot_download(name, revision=revision or None,
                                                 allow_patterns=list(DOWNLOADED),    # no pickles
                                                 ignore_patterns=["*/*"])
    except Exception as error:  # from the hub, httpx or the disk: many classes, one sentence
        reason = textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(f"there are no weights at {name!r}: it is not a folder here, and "
                                f"the hub does not give it{at}: {reason}") from None


def newest_checkpoint(folder) -> str:
    """Return the folder itself if it is a checkpoint, else its `step_*` with the highest number."""
    folder = str(folder)
    if os.path.lexists(config := os.path.join(folder, CONFIG)):
        check_is_file(config)           # a link into a cache may be broken
        return folder
    steps = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        if re.fullmatch(r"step_\d+", name) and os.path.isfile(os.path.join(path, CONFIG)):
            steps[int(name[5:])] = path
    if not steps:
        raise FileNotFoundError(f"there is no checkpoint in {folder}{instead(folder)}")
    return steps[max(steps)]


def instead(folder) -> str:
    """Say what a folder without readable weights holds instead, and what to do about it."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = sorted(name for name in names if not name.startswith("."))
    if "adapter_config.json" in names:
        base = read_json(os.path.join(folder, "adapter_config.json")).get("base_model_name_or_path")
        of = f" of {base!r}" if base else ""
        return f": it is an adapter{of}; merge it into its base and save the whole model"
    if parts := [name for name in names if re.fullmatch(r"model-.*\.safetensors", name)]:
        return f": {INDEX} is missing, which says what is in {', '.join(parts[:SOME])}"
    for endings, what in FOREIGN.items():
        for name in names:
            if name.endswith(endings) and not re.match(TRAINERS, name):
                return f": {name} is {what}"
    if saved := [int(name[11:]) for name in names if re.fullmatch(r"checkpoint-\d+", name)]:
        return f": give its folder checkpoint-{max(saved)}"
    held = [name for name in names if name.endswith(".safetensors")]
    lacks = next((name for name in (CONFIG, SINGLE) if name not in names), "")
    return f": it holds {', '.join(held[:SOME])}, but no {lacks}" if held and lacks else ""


def new_folder(path: str):
    """Make the folder. Raises ValueError if it has something in it already."""
    if os.path.isfile(path):
        raise ValueError(f"{path} is a file; a model is written to a new folder")
    os.makedirs(path, exist_ok=True)
    if os.listdir(path):
        raise ValueError(f"{path} is not empty; a model is written to a new folder")


def small_files(folder) -> dict:
    """Return {name: bytes} of the tokenizer, licence, code (copied, never run) and the like."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())
            if path.is_file() and any(path.match(pattern) for pattern in SMALL_FILES)
            and not path.name.startswith(".")}          # macOS writes ._x beside each x


# ----------------------------------------------------------------------------------------------
# tensors


class Stored(NamedTuple):
    file: str                   # path of the file that holds the tensor
    shape: tuple
    name: str = ""              # its name there, if it is another
    has_new_row: bool = False   # shape counts one row more than the file: a new token's


def rename(key: str, table: dict) -> str:
    """Return a tensor's name in another family by a table. Raises KeyError for an unknown name."""
    module, _, leaf = key.rpartition(".")
    layer = re.search(r"\d+", module)
    return table[re.sub(r"\d+", "{}", module, count=1)].format(layer and layer[0]) + "." + leaf


def published_name(ours: str, family: str) -> str:
    """Return a family's name for our tensor."""
    return rename(ours, {ours: theirs for theirs, ours in RENAME[family].items()})


def weights_file(folder) -> str:
    """Return the path of the one file with weights, or of the index of several."""
    paths = [os.path.join(folder, name) for name in (SINGLE, INDEX)]
    found = [path for path in paths if os.path.lexists(path)]
    if not found:
        raise FileNotFoundError(f"there is neither {SINGLE} nor {INDEX} in {folder}"
                                f"{instead(folder)}")
    return found[0]


def open_safetensors(path):
    """Open a file of tensors. Raises OSError or ValueError in one sentence."""
    check_is_file(path)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        check_is_content(path)
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from None


def read_safetensors(path) -> dict:
    """Return {name: tensor} of a whole file."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def catalogue(folder) -> dict:
    """Return {published name: Stored}, file by file, from the headers alone: no weight is read.

    Raises ValueError or FileNotFoundError if a file is missing, cut short, not as the index says,
    or holds anything but floating-point numbers.
    """
    where = weights_file(folder)
    files = {SINGLE: None}                      # {file: the names that it should hold}
    if where.endswith(INDEX):
        weight_map = read_json(where).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{where} has no weight_map")
        files = {}
        for name, file in sorted(weight_map.items(), key=lambda item: str(item[1])):
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise ValueError(f"{where} places {name} in {file!r}, which is not the name of a "
                                 f"safetensors file in this folder")
            files.setdefault(file, set()).add(name)
        missing = [file for file in files if not os.path.isfile(os.path.join(folder, file))]
        if missing:
            raise FileNotFoundError(f"{folder} lacks {len(missing)} of the {len(files)} files that "
                                    f"{INDEX} names, perhaps of a download that was cut short: "
                                    f"{', '.join(missing[:SOME])}")
    stored = {}
    for file, expected in files.items():
        path = os.path.join(folder, file)
        with open_safetensors(path) as tensors:
            held = {name: tensors.get_slice(name) for name in tensors.keys()}
            for name in sorted(held.keys() ^ (held.keys() if expected is None else expected)):
                verb = "also holds" if name in held else "lacks"
                raise ValueError(f"{path} {verb} the tensor {name}, contrary to {where}")
            for name, header in held.items():
                if re.fullmatch(IGNORED, name):
                    continue
                if header.get_dtype() not in ("F32", "F16", "BF16"):
                    raise ValueError(f"{path}: {name} is stored as {header.get_dtype()}; F32, F16 "
                                     f"or BF16 would fit")
                stored[name] = Stored(path, tuple(header.get_shape()))
    return stored


def read_model(folder, model, dtype, device, slices=None):
    """Yield (our name, tensor) for every parameter of a model, which may be on the meta device.

    slices: {our name: slice of its first dimension} to read parts only; None reads everything.
    Raises ValueError that names a tensor that is missing, unknown, of another shape or not finite.
    """
    family = model.published["model_type"]
    params = {published_name(name, family): (name, p) for name, p in model.named_parameters()}
    stored = stored_for(folder, model)
    check_names_and_shapes(stored, {name: p for name, (_, p) in params.items()},
                           weights_file(folder))
    if slices:
        slices = {name: slices[ours] for name, (ours, _) in params.items()}
    for name, tensor in read_tensors(stored, dtype, device, slices):
        yield params[name][0], tensor


def stored_for(folder, model) -> dict:
    """Return the catalogue as the model uses it: a tied pair once, a new token's row counted."""
    stored, family = catalogue(folder), model.published["model_type"]
    head, embed = (published_name(name, family) for name in ("head.weight", "embed.weight"))
    if model.config.tied_head:
        drop_copy(stored, head, embed)
    base = read_config(folder)
    if is_autoregressive(base) and base["vocab_size"] < model.config.vocab_size:    # by a2d.adapt
        for name in {head, embed} & stored.keys():
            n_rows, *width = stored[name].shape
            stored[name] = stored[name]._replace(shape=(n_rows + 1, *width), has_new_row=True)
    return stored


def drop_copy(stored: dict, head: str, embed: str):
    """Keep one entry, under embed's name, of a tied pair that is stored as both or as the head."""
    if head in stored and embed in stored:
        del stored[head]
    elif head in stored:                # safetensors' save_model keeps one name of the two
        renamed = {embed if name == head else name: where for name, where in stored.items()}
        renamed[embed] = stored[head]._replace(name=head)
        stored.clear()
        stored.update(renamed)          # in the old order: tensors are read file by file


def is_untied(stored: dict, family: str) -> bool:
    """Return whether head and embedding are both stored and differ: then the head is the head."""
    head, embed = (published_name(name, family) for name in ("head.weight", "embed.weight"))
    if head not in stored or embed not in stored:
        return False
    if stored[head].shape != stored[embed].shape:
        return True                     # then one of the two has a shape that does not fit
    (_, one), (_, other) = read_tensors({name: stored[name] for name in (head, embed)})
    return not torch.equal(one, other)


def check_names_and_shapes(given: dict, wanted: dict, where: str):
    """Raise ValueError for the first tensor that is missing, unknown or of another shape."""
    for name in sorted(wanted.keys() - given.keys()):
        raise ValueError(f"{where} lacks the tensor {name}")
    for name in sorted(given.keys() - wanted.keys()):
        raise ValueError(f"{where} holds an unknown tensor {name}")
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            raise ValueError(f"{where}: {name} has shape {tuple(given[name].shape)}, "
                             f"{tuple(tensor.shape)} would fit")


def read_tensors(stored: dict, dtype=None, device="cpu", slices=None):
    """Yield (published name, tensor) file by file; a file is closed before the next is opened.

    dtype: None is as stored. slices: {published name: slice of its first dimension}; None reads
    everything. Raises ValueError that names a tensor with NaN or infinite values, before the last
    tensor of its file is handed out: each look at a GPU's numbers waits for it.
    """
    last, ends = {where.file: name for name, where in stored.items()}, {}
    items = tqdm(stored.items(), "weights", unit="tensor", delay=2, leave=False,
                 disable=os.environ.get("RANK", "0") != "0")
    for path, group in groupby(items, key=lambda item: item[1].file):
        with open_safetensors(path) as file:
            for name, where in group:
                key = where.name or name
                if where.has_new_row:
                    tensor = with_new_row(file.get_tensor(key))
                    tensor = tensor[slices[name]] if slices else tensor
                else:
                    tensor = file.get_slice(key)[slices[name]] if slices else file.get_tensor(key)
                # a copy, because the file is memory-mapped: its changes would be the weights'
                tensor = tensor.to(device, dtype, copy=True)
                if tensor.numel():
                    ends[name] = torch.stack(tensor.aminmax()).float()  # NaN passes through aminmax
                if name == last[path]:
                    check_ends(path, ends)
                    ends = {}
                yield name, tensor


def check_ends(path, ends: dict):
    """Raise ValueError for the first {name: (2,) least and largest value} that is not finite."""
    if ends and not torch.stack([*ends.values()]).isfinite().all():
        name = next(name for name, pair in ends.items() if not pair.isfinite().all())
        raise ValueError(f"{path}: {name} has NaN or infinite values")


def with_new_row(tensor):
    """(V, C) -> (V + 1, C): the row of a token that is new is the mean of the others."""
    return torch.cat([tensor, tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)])


def save_tensors(tensors: dict, path, metadata=None):
    """Write {name: tensor} to a safetensors file. Raises OSError, one sentence with the path."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:                                # for example a full disk
        raise OSError(f"{path} cannot be written: {error}") from None
    umask = os.umask(0o077)             # can only be read by setting it
    os.umask(umask)
    with suppress(OSError):             # a file system without modes
        os.chmod(path, 0o666 & ~umask)  # the mode of every new file; safetensors leaves 0600


def write_weights(folder, published: dict, files: dict, sizes: dict, weights, dtype):
    """Write weights, small files, then config.json: a folder with a config.json is complete.

    sizes: {published name: bytes}. weights yields (published name, tensor) in the same order.
    dtype: of the files; an entry of config.json that names a dtype is set to it.
    """
    parts, room = [], 0
    for name, size in sizes.items():
        if not parts or size > room:
            parts, room = [*parts, []], PART_BYTES
        parts[-1].append(name)
        room -= size
    weights, weight_map = iter(weights), {}
    for k, names in enumerate(parts, 1):
        file = f"model-{k:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else SINGLE
        # no variable holds the dict, so a part is freed before the next is read
        save_tensors({name: tensor.to("cpu", dtype)
                      for name, tensor in islice(weights, len(names))},
                     os.path.join(folder, file), {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        write_json(os.path.join(folder, INDEX), {"metadata": {"total_size": sum(sizes.values())},
                                                 "weight_map": dict(sorted(weight_map.items()))})
    for name, content in files.items():
        with naming(os.path.join(folder, name)):
            Path(folder, name).write_bytes(content)
    named = {key: str(dtype).removeprefix("torch.") for key in ("torch_dtype", "dtype")}
    write_json(os.path.join(folder, CONFIG),
               {key: named.get(key, value) for key, value in published.items()})


# ----------------------------------------------------------------------------------------------
# whole models: what DLLM.from_pretrained and DLLM.save do


def describe_model(folder, build, mask_token: str = "", shift: bool = False):
    """Build the model that config.json describes on the meta device: shapes without memory.

    build(fields) makes a model of ModelConfig's fields. mask_token and shift are those of adapt.
    Raises ValueError, one sentence.
    """
    folder = newest_checkpoint(folder)
    published, changed, said = adapt(folder, mask_token, shift)
    fields, stored = config_fields(folder, published), catalogue(folder)
    family = published["model_type"]
    if fields.get("tied_head") is True and is_untied(stored, family):
        entry = "tied_head" if family == MODEL_TYPE else KEYS[family]["tied_head"]
        fields["tied_head"] = published[entry] = False
        said += (f"{said and '; '}{folder}/{CONFIG} ties the head to the embedding, but the two "
                 f"are stored and differ: they are read apart")
    layers = {found[1] for name in stored if (found := re.search(r"\.(\d+)\.", name))}
    n_layer = fields.get("n_layer")
    if type(n_layer) is int and n_layer > len(layers):      # before a billion of them are built
        raise ValueError(f"{folder}/config.json describes {n_layer} layers; the weights have "
                         f"{len(layers)}")
    try:
        with torch.device("meta"):
            model = build(fields)
    except (TypeError, ValueError, RuntimeError) as error:      # the last for n x m beyond int64
        problem = str(error).splitlines()[0]
        raise ValueError(f"{folder}/config.json does not describe a model: {problem}") from None
    model.published, model.small_files = published, small_files(folder) | changed
    if said and os.environ.get("RANK", "0") == "0":
        print(printable(said), file=sys.stderr)
    return model


def load_model(model, folder, dtype, device):
    """Give a model on the meta device the weights of the folder, in this dtype on this device."""
    for name, tensor in read_model(newest_checkpoint(folder), model, dtype, device):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(tensor))
    model.tie()


def save_model(model, folder, dtype=None):
    """Write the model under its family's names. Sharded: every rank calls it, one with a folder."""
    family, dtype = model.published["model_type"], dtype or model.embed.weight.dtype
    named = {published_name(name, family): p.detach() for name, p in model.named_parameters()}
    sizes = {name: p.numel() * dtype.itemsize for name, p in named.items()}
    whole = ((name, p.full_tensor() if hasattr(p, "full_tensor") else p)    # one at a time
             for name, p in named.items())
    try:
        if folder is not None:
            write_weights(folder, model.published, model.small_files, sizes, whole, dtype)
    finally:                # on a full disk too: the other ranks wait for this one to gather
        for _ in whole:
            pass


if __name__ == "__main__":
    run(main, ConvertConfig)
