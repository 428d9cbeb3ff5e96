"""config.json: what each family calls the sizes of its network, and which networks we implement.

A rope_theta that a file states twice, in two places or in two ways, counts if both agree. If they
do not, one of them is not what the weights were trained with, and nobody can tell which: an error.
Of any other value the first place counts.
"""
import json
import math
import os
from dataclasses import fields
from pathlib import Path

from pretrained.bpe import ENDS, MASKS, settings_of
from tasks.files import read_json

CONFIG, MODEL_TYPE = "config.json", "dllm-jepa"

# Fields of ModelConfig <- entries of config.json, or <|tokens|> of the tokenizer, for their id. The
# first that exists counts. A value that is not a text holds for the whole family. eos_id is the
# token that pads, which may differ from a config's eos: Qwen's may be its end of turn.
QWEN_KEYS = dict(
    vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", head_dim="head_dim",
    n_embd="hidden_size", n_hidden="intermediate_size", norm_eps="rms_norm_eps",
    rope_theta="rope_theta", rope_factor="rope_factor", rope_original="rope_original",
    tied_head="tie_word_embeddings", mask_id=f"mask_token_id mask_token {' '.join(MASKS)}",
    eos_id=f"{' '.join(ENDS)} pad_token_id")
# an autoregressive model that was made a diffusion model (a2d.py), with its names and sizes
A2D_KEYS = dict(QWEN_KEYS, shift="shift")
KEYS = {
    "llada": dict(
        vocab_size="embedding_size vocab_size", block_size="max_sequence_length",
        n_layer="n_layers", n_head="n_heads", n_kv_head="n_kv_heads n_heads", n_embd="d_model",
        n_hidden="mlp_hidden_size", norm_eps="rms_norm_eps", rope_theta="rope_theta",
        rope_factor="rope_factor", rope_original="rope_original",
        tied_head="weight_tying", mask_id="mask_token_id <|mdm_mask|>",
        eos_id="<|endoftext|> pad_token_id eos_token_id"),
    # Dream's config states 131072 positions, inherited from Qwen; its authors say that 2048 work
    "Dream": dict(QWEN_KEYS, block_size=2048, qkv_bias=True, shift=True,
                  eos_id="<|endoftext|> pad_token_id eos_token_id"),
    "a2d-llama": A2D_KEYS,
    "a2d-qwen2": dict(A2D_KEYS, qkv_bias=True),
    "a2d-qwen3": dict(A2D_KEYS, qk_norm=True),
    # from its model card; its config.json has not been seen (arXiv 2606.25331)
    "illada": dict(QWEN_KEYS, eos_id="<|endoftext|> pad_token_id eos_token_id"),
}
FAMILIES = (*KEYS, MODEL_TYPE)
# if absent, ModelConfig's default is also the family's
OPTIONAL = {"head_dim", "tied_head", "shift", "rope_factor", "rope_original"}

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
    **dict.fromkeys(("a2d-llama", "a2d-qwen2", "a2d-qwen3", "illada"),
                    dict(hidden_act="silu", use_sliding_window=False, use_mrope=False,
                         attention_bias=False, mlp_bias=False, quantization_config=None)),
}
LLAMA3 = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
LARGEST = 1 << 24               # of any size; the largest published one is a few hundred thousand


def read_config(folder) -> dict:
    """Return the content of config.json."""
    return read_json(os.path.join(folder, CONFIG))


def config_fields(folder, published: dict) -> dict:
    """Return the fields of ModelConfig that config.json states.

    Raises ValueError that names an entry that is missing, or that asks for another network than
    the one implemented here.
    """
    where, family = os.path.join(folder, CONFIG), published.get("model_type")
    if family not in FAMILIES:
        bases = [known.removeprefix("a2d-") for known in KEYS if known.startswith("a2d-")]
        raise ValueError(f"{folder} holds a model of type {family!r}; known are "
                         f"{', '.join([*FAMILIES, *bases])}")
    if family == MODEL_TYPE:
        needed = {*A2D_KEYS, "qkv_bias"} - (OPTIONAL - {"shift"})   # what the oldest ones state
        for key in sorted(needed - published.keys()):
            raise ValueError(f"{where} lacks {key}")
        found = {key: value for key, value in published.items() if key != "model_type"}
        for key, value in found.items():
            if type(value) not in (int, float, bool) or not 0 <= value < math.inf:
                raise ValueError(f"{where} has {key} = {json.dumps(value)}; a number from 0 up, "
                                 f"true or false would fit")
        return found
    for key, value in IMPLEMENTED[family].items():
        if published.get(key) not in (None, value):
            raise ValueError(f"{where} has {key} = {json.dumps(published[key])}; only "
                             f"{json.dumps(value)} is implemented")
    kinds = published.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"{where} has layer_types = {json.dumps(kinds)}; only full_attention is "
                         f"implemented")
    added = added_tokens(folder)
    given = {**added, **named_mask(folder, added), **published, **rope(where, published)}
    found = {}
    for field, keys in KEYS[family].items():
        if not isinstance(keys, str):
            found[field] = keys
        elif stated := [given[key] for key in keys.split() if given.get(key) is not None]:
            found[field] = stated[0]
        elif field not in OPTIONAL:
            raise ValueError(f"{where} lacks {' or '.join(keys.split())}")
    return found


def rope(where: str, published: dict) -> dict:
    """Return rope's base and Llama 3's scaling of it, {field: value}, wherever the file states it.

    Old files have `rope_theta`, new ones rope_parameters.rope_theta, perhaps one for each kind of
    layer. transformers 4 writes its default at the top of a new file that it saves again. Raises
    ValueError if two values differ, or if an entry asks for any other kind of rope.
    """
    found, scaled = {}, {}
    left = [(key, value) for key, value in published.items()
            if key.startswith(("rope_", "rotary", "partial_rotary"))]
    plain = {"rope_full_precision": True, "rope_interleaved": False, "partial_rotary_factor": 1,
             "factor": 1}
    for name, value in left:                        # which grows
        leaf = name.rpartition(".")[2]
        if isinstance(value, dict) and "llama3" in (value.get("rope_type"), value.get("type")):
            scaling = llama3_scaling(where, name, value)
            if scaled not in ({}, scaling):
                raise ValueError(f"{where} states two different scalings of rope; remove the one "
                                 f"that the weights were not trained with")
            scaled = scaling
            value = {key: inner for key, inner in value.items()
                     if key not in LLAMA3 and inner != "llama3"}
        if isinstance(value, dict):
            left += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif leaf == "rope_theta" and value is not None:
            found[name] = value
        elif value not in (None, "default", plain.get(leaf)):
            entry = name.partition(".")[0]
            raise ValueError(f"{where} has {entry} = {json.dumps(published[entry])}; only plain "
                             f"rope and Llama 3's are implemented")
    first, theta = next(iter(found.items()), ("", None))
    for name, value in list(found.items())[1:]:
        if value != theta:
            raise ValueError(f"{where} has {first} = {json.dumps(theta)} and {name} = "
                             f"{json.dumps(value)}; remove the one that the weights were not "
                             f"trained with")
    return {"rope_theta": theta, **scaled}


def llama3_scaling(where: str, name: str, entry: dict) -> dict:
    """Return the scaling of a rope entry of type llama3. Raises ValueError unless it is complete,
    with the two bounds that Llama 3.1 to 3.3 have (model.py, rope_table)."""
    factor, original = (entry.get(key) for key in ("factor", "original_max_position_embeddings"))
    if type(factor) not in (int, float) or type(original) is not int or (
            entry.get("low_freq_factor"), entry.get("high_freq_factor")) != (1, 4):
        raise ValueError(f"{where} has {name} = {json.dumps(entry)}; of type llama3 it needs "
                         f"factor, original_max_position_embeddings, low_freq_factor = 1 and "
                         f"high_freq_factor = 4")
    return {"rope_factor": float(factor), "rope_original": original}


def added_tokens(folder) -> dict:
    """Return {text: id} of the tokens that the tokenizer's files add to the learnt vocabulary."""
    paths = [os.path.join(folder, name)
             for name in ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")]
    whole, added, config = (read_json(path) if os.path.lexists(path) else {} for path in paths)
    try:
        found = {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
        found.update(added)
        for i, token in config.get("added_tokens_decoder", {}).items():
            found[token["content"]] = int(i)
        if not all(isinstance(text, str) for text in found):
            raise TypeError
        return found
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"the tokenizer's files in {folder} do not list their added tokens as "
                         f"transformers writes them") from None


def named_mask(folder, added: dict) -> dict:
    """Return {"mask_token": its id} if the tokenizer's settings name one of the added tokens."""
    paths = [Path(folder, name) for name in ("special_tokens_map.json", "tokenizer_config.json")]
    try:
        name = settings_of({path.name: path.read_bytes() for path in paths if path.is_file()})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the tokenizer's settings in {folder} cannot be read: {error}") from None
    return {"mask_token": added[name["mask_token"]]} if name["mask_token"] in added else {}


def check_sizes(config):
    """Raise ValueError, one sentence, unless a network of this ModelConfig can be built."""
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        if type(value) not in ((int, float) if kind is float else (kind,)) or value < 0:
            raise ValueError(f"{field.name}={value!r} must be of type {kind.__name__} and not "
                             f"negative")
        least = 0 if field.name in ("mask_id", "eos_id", "head_dim") else 1
        if kind is int and not least <= value <= LARGEST:
            raise ValueError(f"{field.name}={value!r} must lie between {least} and {LARGEST}")
    # NaN is in neither range; published are 1e-6 and 1e-5, and from 1e4 to 1e7
    if not 1e-20 <= config.norm_eps <= 0.1:
        raise ValueError(f"norm_eps={config.norm_eps!r} must lie between 1e-20 and 0.1")
    if not 1 <= config.rope_theta <= 1e15:
        raise ValueError(f"rope_theta={config.rope_theta!r} must lie between 1 and 1e15")
    if not 1 <= config.rope_factor <= 1e4:
        raise ValueError(f"rope_factor={config.rope_factor!r} must lie between 1 and 10000")
    if config.n_head % config.n_kv_head or not config.head_dim and config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}, "
                         f"and n_head of n_kv_head={config.n_kv_head}")
    width = config.head_dim or config.n_embd // config.n_head
    if width % 2:
        raise ValueError(f"head_dim={width} must be even: rope turns pairs of dimensions")
    if config.mask_id >= config.vocab_size or config.eos_id >= config.vocab_size:
        raise ValueError(f"mask_id={config.mask_id} and eos_id={config.eos_id} must lie below "
                         f"vocab_size={config.vocab_size}")
    if config.mask_id == config.eos_id:
        raise ValueError(f"mask_id={config.mask_id} and eos_id={config.eos_id} must differ")
