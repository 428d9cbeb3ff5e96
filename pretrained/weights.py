"""Weights: read and write the folders in which LLaDA, Dream and Qwen3-diffusion are published.

Such a folder has a config.json, one model.safetensors or numbered parts with an index, and the
small files of its tokenizer. The families call the same tensors and sizes by different names, and
the tables below are the only place that knows these names. Our own checkpoints are one more family,
whose names need no change. Nothing is unpickled, and no code that comes with weights is run.

    python pretrained/weights.py --init_from=out/llada8b_gsm8k --out_dir=export --dtype=bfloat16

converts a checkpoint to the form that its family publishes, for transformers, dllm or llama.cpp.
Memory holds one part at a time.
"""
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # a script in a folder

from configurator import run    # before torch, see there

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from tasks.files import read_json, write_json

MODEL_TYPE = "dllm-jepa"
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PART_BYTES = 5_000_000_000      # at most in one file, as on the hub
DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.py", "*.jinja", "*.md", "LICENSE*")
SMALL_FILES = ("tokenizer*", "vocab*", "added_tokens.json", "special_tokens_map.json", "*.txt",
               "generation_config.json", "*.py", "*.jinja", "*.md", "LICENSE*")

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
    "a2d-qwen3": QWEN,
    MODEL_TYPE: {ours: ours for ours in QWEN.values()},
}
IGNORED = r".*\.rotary_emb\.inv_freq"   # old versions of transformers stored it beside rope_theta

# Fields of ModelConfig <- entries of config.json, or <|tokens|> of the tokenizer, for their id. The
# first that exists counts. A value that is not a text holds for the whole family. eos_id is the
# token that pads, which may differ from a config's eos: Qwen's may be its end of turn.
QWEN_KEYS = dict(
    vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", head_dim="head_dim",
    n_embd="hidden_size", n_hidden="intermediate_size", norm_eps="rms_norm_eps",
    rope_theta="rope_theta", tied_head="tie_word_embeddings", mask_id="mask_token_id <|mask|>",
    eos_id="<|endoftext|> pad_token_id")
KEYS = {
    "llada": dict(
        vocab_size="embedding_size vocab_size", block_size="max_sequence_length",
        n_layer="n_layers", n_head="n_heads", n_kv_head="n_kv_heads n_heads", n_embd="d_model",
        n_hidden="mlp_hidden_size", norm_eps="rms_norm_eps", rope_theta="rope_theta",
        tied_head="weight_tying", mask_id="mask_token_id <|mdm_mask|>",
        eos_id="<|endoftext|> pad_token_id eos_token_id"),
    # Dream's config states 131072 positions, inherited from Qwen; its authors say that 2048 work
    "Dream": dict(QWEN_KEYS, block_size=2048, qkv_bias=True, shift=True,
                  eos_id="<|endoftext|> pad_token_id eos_token_id"),
    "a2d-qwen3": dict(QWEN_KEYS, qk_norm=True),
}
OPTIONAL = {"head_dim", "tied_head"}    # if absent, ModelConfig's default is also the family's

# Entries of config.json that could ask for another network, with the one value implemented here.
IMPLEMENTED = {
    "llada": dict(
        activation_type="silu", block_type="llama", block_group_size=1, layer_norm_type="rms",
        layer_norm_with_affine=True, bias_for_layer_norm=False, attention_layer_norm=False,
        input_emb_norm=False, include_bias=False, include_qkv_bias=False, alibi=False, rope=True,
        rope_full_precision=True, multi_query_attention=False, scale_logits=False,
        quantization_config=None),
    "Dream": dict(hidden_act="silu", use_sliding_window=False, use_mrope=False,
                  quantization_config=None, block_size=None),   # block_size: block diffusion
    "a2d-qwen3": dict(hidden_act="silu", use_sliding_window=False, attention_bias=False,
                      quantization_config=None),
}


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
    config_fields(source, published)                            # raises for an unknown family
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
    if os.path.isdir(name):
        if revision:
            raise ValueError(f"revision={revision!r} is for names on the hub; {name} is a folder")
        return newest_checkpoint(name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(f"there are no weights at {name!r}: it is neither a folder here "
                                f"nor a name on the hub such as GSAI-ML/LLaDA-8B-Base")
    import huggingface_hub  # takes half a second, and is needed only here
    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision or None,
                                                   allow_patterns=list(DOWNLOADED),    # no pickles
                                                   ignore_patterns=["*/*"])
    except Exception as error:  # from the hub, httpx or the disk: many classes, one sentence
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(f"there are no weights at {name!r}: it is not a folder here, and "
                                f"the hub does not give it{at}: {reason}") from None
    return newest_checkpoint(folder)


def newest_checkpoint(folder) -> str:
    """Return the folder itself if it is a checkpoint, else its `step_*` with the highest number."""
    folder = str(folder)
    if os.path.isfile(os.path.join(folder, CONFIG)):
        return folder
    steps = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        if re.fullmatch(r"step_\d+", name) and os.path.isfile(os.path.join(path, CONFIG)):
            steps[int(name[5:])] = path
    if not steps:
        raise FileNotFoundError(f"there is no checkpoint in {folder}")
    return steps[max(steps)]


def new_folder(path: str):
    """Make the folder. Raises ValueError if it has something in it already."""
    os.makedirs(path, exist_ok=True)
    if os.listdir(path):
        raise ValueError(f"{path} is not empty; a model is written to a new folder")


def small_files(folder) -> dict:
    """Return {name: bytes} of the tokenizer, licence, code (copied, never run) and the like."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())
            if path.is_file() and any(path.match(pattern) for pattern in SMALL_FILES)}


# ----------------------------------------------------------------------------------------------
# config.json


def read_config(folder) -> dict:
    """Return the content of config.json."""
    return read_json(os.path.join(folder, CONFIG))


def config_fields(folder, published: dict) -> dict:
    """Return the fields of ModelConfig that config.json states.

    Raises ValueError that names an entry that is missing, or that asks for another network than
    the one implemented here.
    """
    where, family = os.path.join(folder, CONFIG), published.get("model_type")
    if family not in RENAME:
        raise ValueError(f"{folder} holds a model of type {family!r}; known are "
                         f"{', '.join(RENAME)}")
    if family == MODEL_TYPE:
        return {key: value for key, value in published.items() if key != "model_type"}
    for key, value in IMPLEMENTED[family].items():
        if published.get(key) not in (None, value):
            raise ValueError(f"{where} has {key} = {json.dumps(published[key])}; only "
                             f"{json.dumps(value)} is implemented")
    given = {**added_tokens(folder), **published}
    for key in ("rope_scaling", "rope_parameters"):     # since 2025 the second has rope_theta
        rope = published.get(key) or {}
        if not isinstance(rope, dict) or any(
                rope[name] != "default" for name in rope if name != "rope_theta"):
            raise ValueError(f"{where} has {key} = {json.dumps(rope)}; only plain rope is "
                             f"implemented")
        given = {**rope, **given}
    fields = {}
    for field, keys in KEYS[family].items():
        if not isinstance(keys, str):
            fields[field] = keys
        elif found := [given[key] for key in keys.split() if given.get(key) is not None]:
            fields[field] = found[0]
        elif field not in OPTIONAL:
            raise ValueError(f"{where} lacks {' or '.join(keys.split())}")
    return fields


def added_tokens(folder) -> dict:
    """Return {text: id} of the tokens that the tokenizer's files add to the learnt vocabulary."""
    paths = [os.path.join(folder, name)
             for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")]
    whole, added, config = (read_json(path) if os.path.isfile(path) else {} for path in paths)
    try:
        found = {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
        found.update(added)
        for i, token in config.get("added_tokens_decoder", {}).items():
            found[token["content"]] = int(i)
        return found
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"the tokenizer's files in {folder} do not list their added tokens as "
                         f"transformers writes them") from None


# ----------------------------------------------------------------------------------------------
# tensors


class Stored(NamedTuple):
    file: str                   # path of the file that holds the tensor
    shape: tuple


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
    found = [path for path in paths if os.path.isfile(path)]
    if not found:
        raise FileNotFoundError(f"there is neither {SINGLE} nor {INDEX} in {folder}")
    return found[0]


def open_safetensors(path):
    """Open a file of tensors. Raises FileNotFoundError or ValueError in one sentence."""
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (SafetensorError, OSError) as error:
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
    files = {SINGLE: None}
    if where.endswith(INDEX):
        weight_map = read_json(where).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{where} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
                raise ValueError(f"{where} places {name} in {file!r}, which is not the name of a "
                                 f"safetensors file in this folder")
        files = {file: {name for name in weight_map if weight_map[name] == file}
                 for file in sorted(set(weight_map.values()))}
    stored = {}
    for file, expected in files.items():
        path = os.path.join(folder, file)
        with open_safetensors(path) as tensors:
            held = {name: tensors.get_slice(name) for name in tensors.keys()}
            for name in sorted(held.keys() ^ (held.keys() if expected is None else expected)):
                verb = "also holds" if name in held else "lacks"
                raise ValueError(f"{path} {verb} the tensor {name}, contrary to {where}")
            for name, header in held.items():
                if header.get_dtype() not in ("F32", "F16", "BF16"):
                    raise ValueError(f"{path}: {name} is stored as {header.get_dtype()}; F32, F16 "
                                     f"or BF16 would fit")
                if not re.fullmatch(IGNORED, name):
                    stored[name] = Stored(path, tuple(header.get_shape()))
    return stored


def read_model(folder, model, dtype, device, slices=None):
    """Yield (our name, tensor) for every parameter of a model, which may be on the meta device.

    slices: {our name: slice of its first dimension} to read parts only; None reads everything.
    Raises ValueError that names a tensor that is missing, unknown, of another shape or not finite.
    """
    stored, family = catalogue(folder), model.published["model_type"]
    params = {published_name(name, family): (name, p) for name, p in model.named_parameters()}
    if model.config.tied_head:
        drop_copy(stored, published_name("head.weight", family),
                  published_name("embed.weight", family))
    check_names_and_shapes(stored, {name: p for name, (_, p) in params.items()},
                           weights_file(folder))
    if slices:
        slices = {name: slices[ours] for name, (ours, _) in params.items()}
    for name, tensor in read_tensors(stored, dtype, device, slices):
        yield params[name][0], tensor


def drop_copy(stored: dict, head: str, embed: str):
    """Drop a tied head that is stored nonetheless. Raises ValueError if it differs from embed."""
    if head in stored and embed in stored:
        (_, one), (_, other) = read_tensors({name: stored[name] for name in (head, embed)})
        if not torch.equal(one, other):
            raise ValueError(f"{stored[head].file}: {head} differs from {embed}, to which "
                             f"{CONFIG} says it is tied")
        del stored[head]


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
    everything. Raises ValueError that names a tensor with NaN or infinite values.
    """
    items = tqdm(stored.items(), "weights", unit="tensor", delay=2, leave=False,
                 disable=os.environ.get("RANK", "0") != "0")
    for path, group in groupby(items, key=lambda item: item[1].file):
        with open_safetensors(path) as file:
            for name, _ in group:
                tensor = file.get_slice(name)[slices[name]] if slices else file.get_tensor(name)
                # a copy, because the file is memory-mapped: its changes would be the weights'
                tensor = tensor.to(device, dtype, copy=True)
                low, high = tensor.aminmax() if tensor.numel() else 2 * [torch.zeros(())]
                if not (low.isfinite() and high.isfinite()):    # NaN passes through aminmax
                    raise ValueError(f"{path}: {name} has NaN or infinite values")
                yield name, tensor


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
        try:
            # no variable holds the dict, so a part is freed before the next is read
            save_file({name: tensor.to("cpu", dtype).contiguous()
                       for name, tensor in islice(weights, len(names))},
                      os.path.join(folder, file), metadata={"format": "pt"})
        except SafetensorError as error:                            # for example a full disk
            raise OSError(f"{file} cannot be written to {folder}: {error}") from None
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        write_json(os.path.join(folder, INDEX), {"metadata": {"total_size": sum(sizes.values())},
                                                 "weight_map": dict(sorted(weight_map.items()))})
    for name, content in files.items():
        Path(folder, name).write_bytes(content)
    named = {key: str(dtype).removeprefix("torch.") for key in ("torch_dtype", "dtype")}
    write_json(os.path.join(folder, CONFIG),
               {key: named.get(key, value) for key, value in published.items()})


# ----------------------------------------------------------------------------------------------
# whole models: what DLLM.from_pretrained and DLLM.save do


def describe_model(folder, build):
    """Build the model that config.json describes on the meta device: shapes without memory.

    build(fields) makes a model of ModelConfig's fields. Raises ValueError, one sentence.
    """
    folder = newest_checkpoint(folder)
    published = read_config(folder)
    fields = config_fields(folder, published)
    try:
        with torch.device("meta"):
            model = build(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}/config.json does not describe a model: {error}") from None
    model.published, model.small_files = published, small_files(folder)
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
