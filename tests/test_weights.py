"""Laws of weights in and out of files, on tiny checkpoints generated with the published names."""
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model

from helpers import ROOT, python, seeded, sentence
from model import DLLM, PRESETS, ModelConfig
from pretrained import weights
from pretrained.config import MODEL_TYPE, config_fields
from pretrained.tokenizer import load_tokenizer, toy_tokenizer
from pretrained.weights import (RENAME, ConvertConfig, catalogue, find_weights, newest_checkpoint,
                                published_name, read_tensors, rename)
from pretrained.weights import main as convert
from published import (CONFIG, INDEX, PUBLISHED, QWEN_TOKENS, TINY, WEIGHTS, generate, shapes,
                       write_weights)
from train import TrainConfig
from train import main as train

FAMILIES = ["llada", "Dream", "a2d-qwen3"]
every_family = pytest.mark.parametrize("family", FAMILIES)



def stored(folder) -> dict:
    return {name: p for file in Path(folder).glob("model*.safetensors")
            for name, p in load_file(file).items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name])
        for name in one)


def small_config(**changes):
    return replace(ModelConfig(vocab_size=40, mask_id=39, eos_id=38, block_size=16, n_layer=2,
                               n_head=4, n_kv_head=4, n_embd=32, n_hidden=48), **changes)


def random_model(seed=0, **changes):
    return DLLM(small_config(**changes)).init_weights(seeded(seed))


# ---- names and sizes ----


@pytest.mark.parametrize("family, tensors, nbytes, parameters", [
    ("llada", 291, 16_031_162_368, 8_015_581_184), ("Dream", 339, 15_231_233_024, 7_615_616_512),
    ("a2d-qwen3", 310, 1_192_099_840, 596_049_920)])
def test_full_size_models_have_the_published_names_and_sizes(family, tensors, nbytes, parameters,
                                                             tmp_path):
    (tmp_path / "added_tokens.json").write_text('{"<|endoftext|>": 151643, "<|mask|>": 151669}')
    published = PUBLISHED[family]
    if family == "llada":
        (tmp_path / "added_tokens.json").unlink()
    with torch.device("meta"):
        model = DLLM(ModelConfig(**config_fields(tmp_path, published))).bfloat16()
    named = {published_name(name, family): p for name, p in model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in named.items()} == shapes(family, published)
    assert len(named) == tensors
    assert sum(p.nbytes for p in named.values()) == nbytes
    assert sum(p.numel() for p in named.values()) == parameters


@pytest.mark.parametrize("family, preset", [("llada", "llada-8b"), ("Dream", "dream-7b")])
def test_the_presets_are_what_the_published_configs_say(family, preset, tmp_path):
    assert ModelConfig(**config_fields(tmp_path, PUBLISHED[family])) == \
        ModelConfig(**PRESETS[preset])


@pytest.mark.parametrize("family, theirs, ours", [
    ("llada", "model.transformer.blocks.17.attn_out.weight", "blocks.17.o_proj.weight"),
    ("llada", "model.transformer.blocks.17.attn_norm.weight", "blocks.17.attn_norm.weight"),
    ("llada", "model.transformer.blocks.17.ff_norm.weight", "blocks.17.mlp_norm.weight"),
    ("llada", "model.transformer.blocks.17.ff_proj.weight", "blocks.17.gate_proj.weight"),
    ("llada", "model.transformer.blocks.17.up_proj.weight", "blocks.17.up_proj.weight"),
    ("llada", "model.transformer.blocks.17.ff_out.weight", "blocks.17.down_proj.weight"),
    ("llada", "model.transformer.ff_out.weight", "head.weight"),
    ("llada", "model.transformer.ln_f.weight", "norm.weight"),
    ("llada", "model.transformer.wte.weight", "embed.weight"),
    ("Dream", "model.layers.9.input_layernorm.weight", "blocks.9.attn_norm.weight"),
    ("Dream", "model.layers.9.post_attention_layernorm.weight", "blocks.9.mlp_norm.weight"),
    ("Dream", "model.layers.9.self_attn.q_proj.weight", "blocks.9.q_proj.weight"),
    ("Dream", "model.layers.9.self_attn.k_proj.bias", "blocks.9.k_proj.bias"),
    ("Dream", "model.layers.9.self_attn.v_proj.weight", "blocks.9.v_proj.weight"),
    ("Dream", "model.layers.9.self_attn.o_proj.weight", "blocks.9.o_proj.weight"),
    ("Dream", "model.layers.9.mlp.gate_proj.weight", "blocks.9.gate_proj.weight"),
    ("Dream", "model.layers.9.mlp.up_proj.weight", "blocks.9.up_proj.weight"),
    ("Dream", "lm_head.weight", "head.weight"),
    ("a2d-qwen3", "model.layers.9.self_attn.q_norm.weight", "blocks.9.q_norm.weight"),
    ("a2d-qwen3", "model.layers.9.self_attn.k_norm.weight", "blocks.9.k_norm.weight"),
    (MODEL_TYPE, "blocks.9.k_norm.weight", "blocks.9.k_norm.weight")])
def test_a_published_tensor_has_the_role_its_name_says(family, theirs, ours):
    # many have the same shape, so that sizes alone would not tell gate from up or key from value
    assert rename(theirs, RENAME[family]) == ours
    assert published_name(ours, family) == theirs


@pytest.mark.parametrize("family", RENAME)
@pytest.mark.parametrize("key", ["score.weight", "model.layers.3.self_attn.rotary_emb.inv_freq",
                                 "model.transformer.blocks.3.ff_out.extra.bias", "weight", ""])
def test_an_unknown_name_is_a_key_error(family, key):
    with pytest.raises(KeyError):
        rename(key, RENAME[family])


# ---- in ----


@every_family
@pytest.mark.parametrize("parts", [1, 5])
def test_every_tensor_arrives_where_it_belongs(family, parts, tmp_path):
    tensors = generate(tmp_path, family, parts)
    model = DLLM.from_pretrained(str(tmp_path))
    params = dict(model.named_parameters())
    assert len(params) == len(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(params[rename(name, RENAME[family])], tensor.float())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in params.values())
    assert not any(p.is_meta for p in model.state_dict().values())


@every_family
def test_sizes_come_from_config_json(family, tmp_path):
    generate(tmp_path, family)
    common = dict(vocab_size=40, mask_id=37, eos_id=36, n_layer=3, n_head=4, n_embd=32, n_hidden=48)
    expected = {
        "llada": ModelConfig(**common, block_size=64, n_kv_head=4),
        "Dream": ModelConfig(**common, block_size=2048, n_kv_head=2, norm_eps=1e-6,
                             rope_theta=1e6, qkv_bias=True, shift=True),
        "a2d-qwen3": ModelConfig(**common, block_size=64, n_kv_head=2, norm_eps=1e-6,
                                 rope_theta=1e6, head_dim=12, qk_norm=True, tied_head=True)}
    assert DLLM.from_pretrained(tmp_path).config == expected[family]


@every_family
def test_weights_in_bf16_stay_what_they_were(family, tmp_path):
    generate(tmp_path, family, parts=2)
    half, full = DLLM.from_pretrained(tmp_path, torch.bfloat16), DLLM.from_pretrained(tmp_path)
    for (name, p), q in zip(half.named_parameters(), full.parameters()):
        assert p.dtype == torch.bfloat16 and torch.equal(p.float(), q), name
    assert half.head.weight is half.embed.weight or not half.config.tied_head


def test_weights_do_not_change_with_their_file(tmp_path):
    generate(tmp_path, "llada")
    model = DLLM.from_pretrained(tmp_path, torch.bfloat16)
    before = model.embed.weight.clone()
    with open(tmp_path / WEIGHTS, "r+b") as file:
        file.seek(0, os.SEEK_END)
        size = file.tell()
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert torch.equal(model.embed.weight, before)
    assert model.blocks[2].gate_proj.weight.float().std() > 0.5


TOKENIZER_FILES = {
    "tokenizer.json": {"added_tokens": [{"content": text, "id": i} for text, i
                                        in QWEN_TOKENS.items()], "model": {"type": "BPE"}},
    "added_tokens.json": QWEN_TOKENS,
    "tokenizer_config.json": {"added_tokens_decoder": {str(i): {"content": text} for text, i
                                                       in QWEN_TOKENS.items()}},
}


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_qwen3s_mask_and_padding_come_from_any_of_the_tokenizers_files(name, tmp_path):
    (tmp_path / name).write_text(json.dumps(TOKENIZER_FILES[name]))
    fields = config_fields(tmp_path, TINY["a2d-qwen3"])
    assert (fields["mask_id"], fields["eos_id"]) == (37, 36)
    # a mask in config.json counts; its eos, the end of a turn, never does
    fields = config_fields(tmp_path, dict(TINY["a2d-qwen3"], mask_token_id=30))
    assert (fields["mask_id"], fields["eos_id"]) == (30, 36)


def test_a_tokenizers_file_that_is_no_such_thing_is_named(tmp_path):
    for spoilt in ('{"added_tokens": [1]}', '{"added_tokens": 3}', '[]'):
        (tmp_path / "tokenizer.json").write_text(spoilt)
        said = sentence(config_fields, tmp_path, TINY["a2d-qwen3"], kind=ValueError)
        assert str(tmp_path) in said


def test_the_rope_of_recent_configs_is_found(tmp_path):
    config = {**TINY["Dream"], "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}
    del config["rope_theta"]
    assert config_fields(tmp_path, config)["rope_theta"] == 7e5


@pytest.mark.parametrize("family, change", [
    *[("llada", change) for change in (
        dict(alibi=True), dict(rope=False), dict(layer_norm_type="default"),
        dict(activation_type="gelu"), dict(block_type="sequential"), dict(include_bias=True),
        dict(include_qkv_bias=True), dict(multi_query_attention=True), dict(scale_logits=True),
        dict(input_emb_norm=True), dict(attention_layer_norm=True), dict(block_group_size=2))],
    *[("Dream", change) for change in (
        dict(hidden_act="gelu"), dict(use_sliding_window=True), dict(block_size=32),
        dict(rope_scaling={"type": "yarn", "factor": 4.0}),
        dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), dict(rope_scaling="linear"),
        dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        dict(quantization_config={"bits": 4}))],
    ("a2d-qwen3", dict(attention_bias=True))])
def test_another_network_than_is_implemented_is_refused_by_its_entry(family, change, tmp_path):
    generate(tmp_path, family, **change)
    [key] = change
    said = sentence(DLLM.from_pretrained, tmp_path, kind=ValueError)
    assert f"{tmp_path}/config.json has {key} = " in said


@pytest.mark.parametrize("family, gone", [
    ("llada", "d_model"), ("llada", "rope_theta"), ("llada", "mlp_hidden_size"),
    ("llada", "mask_token_id"), ("Dream", "hidden_size"), ("Dream", "num_key_value_heads"),
    ("Dream", "rms_norm_eps"), ("a2d-qwen3", "max_position_embeddings")])
def test_a_config_without_a_size_is_refused_by_its_name(family, gone, tmp_path):
    generate(tmp_path, family)
    config = {key: value for key, value in TINY[family].items() if key != gone}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    said = sentence(DLLM.from_pretrained, tmp_path, kind=ValueError)
    assert gone in said and CONFIG in said


def test_qwen3_without_its_tokenizer_is_refused(tmp_path):
    generate(tmp_path, "a2d-qwen3")
    (tmp_path / "tokenizer_config.json").unlink()
    said = sentence(DLLM.from_pretrained, tmp_path, kind=ValueError)
    assert "<|mask|>" in said


def test_a_tied_heads_copy_is_accepted_if_it_is_one(tmp_path):
    tensors = generate(tmp_path, "a2d-qwen3")
    embedding = tensors["model.embed_tokens.weight"]
    write_weights(tmp_path, {**tensors, "lm_head.weight": embedding.clone()}, parts=3)
    assert torch.equal(DLLM.from_pretrained(tmp_path).head.weight, embedding.float())


TIE = {"llada": "weight_tying", "Dream": "tie_word_embeddings", "a2d-qwen3": "tie_word_embeddings"}


@every_family
@pytest.mark.parametrize("parts", [1, 3])
def test_a_tied_model_may_be_stored_under_the_heads_name_alone(family, parts, tmp_path):
    """safetensors' save_model keeps one of two equal tensors, and which one is its affair."""
    tensors = generate(tmp_path, family, **{TIE[family]: True})
    tensors.pop(published_name("head.weight", family), None)
    expected = {rename(name, RENAME[family]): p.float() for name, p in tensors.items()}
    head, embed = published_name("head.weight", family), published_name("embed.weight", family)
    renamed = {head if name == embed else name: p for name, p in tensors.items()}
    write_weights(tmp_path, renamed, parts)
    model = DLLM.from_pretrained(tmp_path)
    assert model.head.weight is model.embed.weight
    assert same(dict(model.named_parameters()), expected)
    some = {name: slice(0, 2) for name in expected}             # as a rank of FSDP reads
    sliced = dict(weights.read_model(tmp_path, DLLM.on_meta(tmp_path), None, "cpu", some))
    assert same(sliced, {name: p[:2].bfloat16() for name, p in expected.items()})
    convert(ConvertConfig(init_from=str(tmp_path), out_dir=str(tmp_path / "b")))
    assert same(dict(DLLM.from_pretrained(tmp_path / "b").named_parameters()), expected)
    config = {**json.loads((tmp_path / CONFIG).read_text()), TIE[family]: False}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    said = sentence(DLLM.from_pretrained, tmp_path, kind=ValueError)
    assert f"lacks the tensor {embed}" in said                  # untied, they are two


def test_a_head_that_takes_the_embeddings_name_keeps_its_place_among_the_files():
    """Tensors are read file by file, so a file is opened once only if its tensors stay together."""
    found = {"a": weights.Stored("1", (2,)), "head": weights.Stored("1", (3,)),
             "b": weights.Stored("2", (4,))}
    weights.drop_copy(found, "head", "embed")
    assert list(found.items()) == [("a", weights.Stored("1", (2,))),
                                   ("embed", weights.Stored("1", (3,), "head")),
                                   ("b", weights.Stored("2", (4,)))]


def test_what_save_model_of_safetensors_writes_is_read(tmp_path):
    model = random_model(tied_head=True)
    model.save(tmp_path)
    for first, second in (("embed", "head"), ("head", "embed")):
        both = torch.nn.Module()
        both.blocks, both.norm = model.blocks, model.norm
        setattr(both, first, getattr(model, first))
        setattr(both, second, getattr(model, second))
        save_model(both, str(tmp_path / WEIGHTS))
        assert same(DLLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.bool])
def test_the_rotation_that_old_versions_stored_is_ignored(dtype, tmp_path):
    tensors = generate(tmp_path, "Dream")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4).to(dtype)
             for i in range(3)}
    write_weights(tmp_path, {**tensors, **extra}, parts=2)
    DLLM.from_pretrained(tmp_path).save(tmp_path, torch.bfloat16)
    assert set(load_file(tmp_path / WEIGHTS)) == set(tensors)


# ---- what editors and file systems add ----


@every_family
def test_a_byte_order_mark_in_any_json_changes_nothing(family, folders, tmp_path):
    tensors = generate(tmp_path, family, parts=3)
    kinds = {"llada": "llada", "Dream": "dream", "a2d-qwen3": "qwen"}
    tok = load_tokenizer(str(folders / kinds[family]))
    tok.save(tmp_path)
    ids = dict(mask_token_id=30, pad_token_id=31)               # whatever the tokenizer says
    (tmp_path / CONFIG).write_text(json.dumps({**TINY[family], **ids, "vocab_size": 40}))
    for path in tmp_path.iterdir():
        if path.suffix in (".json", ".txt"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_tokenizer(str(tmp_path)) == tok
    (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    (tmp_path / "added_tokens.json").write_bytes(b"\xef\xbb\xbf" + b'{"<|endoftext|>": 31}')
    params = dict(DLLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(params[rename(name, RENAME[family])], p.float())
               for name, p in tensors.items())


@pytest.mark.parametrize("parts", [1, 3])
def test_what_macos_writes_beside_files_is_neither_read_nor_copied(parts, tmp_path):
    tensors = generate(tmp_path / "a", "Dream", parts)
    for name in ("README.md", "merges.txt", "modeling_dream.py"):
        (tmp_path / "a" / name).write_text("x")
    for path in list((tmp_path / "a").iterdir()):
        (tmp_path / "a" / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07 Mac OS X")
    (tmp_path / "a" / ".DS_Store").write_bytes(b"\x00")
    (tmp_path / "b").mkdir()
    DLLM.from_pretrained(tmp_path / "a").save(tmp_path / "b", torch.bfloat16)
    assert same(stored(tmp_path / "b"), tensors)
    assert not [path.name for path in (tmp_path / "b").iterdir() if path.name.startswith(".")]


# ---- what may be wrong with the files ----


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def change_tensor(folder, name, change):
    for file in folder.glob("model*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file({n: p.contiguous() for n, p in tensors.items() if p is not None}, file)


def set_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor
    return change


PART, UP = "model-00002-of-00003.safetensors", "model.layers.1.mlp.up_proj.weight"
SPOILT_PARTS = {     # what happened to the folder, and the words that the message has to hold
    "a part gone": (lambda f: (f / PART).unlink(), [PART]),
    "a part cut short": (lambda f: os.truncate(f / PART, os.path.getsize(f / PART) - 10), [PART]),
    "a part too long": (lambda f: (f / PART).write_bytes((f / PART).read_bytes() + b"0"), [PART]),
    "a part of nothing": (lambda f: (f / PART).write_bytes(b""), [PART]),
    "a part of noise": (lambda f: (f / PART).write_bytes(os.urandom(1000)), [PART]),
    "a part that is a folder": (lambda f: ((f / PART).unlink(), (f / PART).mkdir()), [PART]),
    "NaN": (lambda f: change_tensor(f, UP, set_value(float("nan"))), [UP, "NaN", "safetensors"]),
    "infinite": (lambda f: change_tensor(f, UP, set_value(float("-inf"))), [UP, "infinite"]),
    "integers": (lambda f: change_tensor(f, UP, lambda p: p.int()), [UP, "I32", "BF16"]),
    "a wrong shape": (lambda f: change_tensor(f, UP, lambda p: p[:-1]), [UP, "47", "48"]),
    "a transposed shape": (lambda f: change_tensor(f, UP, lambda p: p.T), [UP, "(32, 48)"]),
    "gone from its part": (lambda f: change_tensor(f, UP, lambda p: None), [UP, "lacks", INDEX]),
    "another part named": (lambda f: change_index(f, lambda m: m.update({UP: next(
        file for file in sorted(set(m.values())) if file != m[UP])})), [UP, INDEX]),
    "not in the index": (lambda f: change_index(f, lambda m: m.pop(UP)), [UP, INDEX]),
    "outside the folder": (lambda f: change_index(f, lambda m: m.update({UP: f"../{PART}"})),
                           [UP, INDEX, f"../{PART}"]),
    "an absolute path": (lambda f: change_index(f, lambda m: m.update({UP: "/etc/passwd"})),
                         [UP, "/etc/passwd"]),
    "a pickle": (lambda f: change_index(f, lambda m: m.update({UP: "pytorch_model.bin"})),
                 [UP, "pytorch_model.bin"]),
    "no text as file": (lambda f: change_index(f, lambda m: m.update({UP: 3})), [UP, "3"]),
    "index empty": (lambda f: (f / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "index no JSON": (lambda f: (f / INDEX).write_text("{"), [INDEX]),
    "index gone": (lambda f: (f / INDEX).unlink(), [WEIGHTS, INDEX]),
}


@pytest.mark.parametrize("spoil, words", SPOILT_PARTS.values(), ids=SPOILT_PARTS)
def test_spoilt_parts_are_one_line_that_names_the_culprit(spoil, words, tmp_path):
    generate(tmp_path, "Dream", parts=3)
    spoil(tmp_path)
    said = sentence(DLLM.from_pretrained, str(tmp_path))
    assert all(word in said for word in [str(tmp_path), *words]), said


@pytest.mark.parametrize("name", ["score.weight", "model.layers.3.mlp.up_proj.weight",
                                  "model.layers.01.mlp.up_proj.weight", "blocks.0.q_proj.weight",
                                  "model.layers.0.mlp.up_proj.bias", "lm_head.bias"])
def test_a_tensor_that_the_model_does_not_have_is_named(name, tmp_path):
    tensors = generate(tmp_path, "Dream")
    write_weights(tmp_path, {**tensors, name: torch.zeros(2)}, parts=2)
    said = sentence(DLLM.from_pretrained, tmp_path, kind=ValueError)
    assert f"unknown tensor {name}" in said


@every_family
def test_a_tensor_that_is_nowhere_is_named_as_published(family, tmp_path):
    tensors = generate(tmp_path, family)
    for name in tensors:
        write_weights(tmp_path, {other: p for other, p in tensors.items() if other != name})
        said = sentence(DLLM.from_pretrained, tmp_path, kind=ValueError)
        assert f"lacks the tensor {name}" in said


ADAPTER = json.dumps({"base_model_name_or_path": "GSAI-ML/LLaDA-8B-Base"})
INSTEAD = [     # what a folder holds instead of weights, and the words that the message has to hold
    (["adapter_config.json", "adapter_model.safetensors"], ["GSAI-ML/LLaDA-8B-Base", "merge"]),
    (["adapter_config.json", "adapter_model.bin"], ["adapter of", "merge"]),
    (["tf_model.h5"], ["tf_model.h5 is of another framework", "convert"]),
    (["flax_model.msgpack", "a.txt"], ["flax_model.msgpack is of another framework"]),
    (["model.onnx"], ["model.onnx is of another framework"]),
    (["checkpoint-90", "checkpoint-500", "trainer_state.json"], ["its folder checkpoint-500"]),
    (["pytorch_model.bin"], ["pytorch_model.bin is a pickle", "convert"]),
    (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"],
     ["pytorch_model-00001-of-00002.bin is a pickle"]),
    (["consolidated.00.pth", "a.txt"], ["consolidated.00.pth is a pickle"]),
    (["model.pt", "optimizer.pt"], ["model.pt is a pickle"]),
    (["last.ckpt"], ["last.ckpt is a pickle"]),
    (["llada-Q4_K_M.gguf"], ["llada-Q4_K_M.gguf is made for llama.cpp"]),
    (["model-00001-of-00004.safetensors"], [INDEX, "model-00001-of-00004.safetensors"]),
    (["diffusion.safetensors"], ["holds diffusion.safetensors, but no "]),
    (["training_args.bin", "optimizer.pt", "._pytorch_model.bin"], []),
]


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("names, words", INSTEAD, ids=[names[0] for names, _ in INSTEAD])
def test_a_folder_without_readable_weights_is_named_for_what_it_holds(names, words, has_config,
                                                                      tmp_path):
    for name in names:
        (tmp_path / name).write_text(ADAPTER)
    if has_config:
        (tmp_path / CONFIG).write_text(json.dumps(TINY["Dream"]))
    for load in (DLLM.from_pretrained, find_weights):       # the latter before any tokenizer
        said = sentence(load, tmp_path, kind=FileNotFoundError)
        assert all(word in said for word in [str(tmp_path), *words]), said
        assert words or "pickle" not in said


def test_an_adapter_that_names_no_base_is_one_all_the_same(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    assert ": it is an adapter; merge it" in sentence(find_weights, tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
def test_a_pipe_in_place_of_a_tokenizers_file_is_named(name, tmp_path):
    generate(tmp_path, "Dream")
    os.mkfifo(tmp_path / name)
    assert f"{tmp_path / name} is not a file" in sentence(DLLM.from_pretrained, tmp_path,
                                                          kind=OSError)


@pytest.mark.parametrize("parts, name", [(1, CONFIG), (1, WEIGHTS), (3, INDEX),
                                         (3, "model-00002-of-00003.safetensors")])
def test_a_link_a_pipe_or_a_pointer_in_place_of_a_file_is_told(parts, name, tmp_path):
    generate(tmp_path, "Dream", parts)
    place = {"link": lambda path: path.symlink_to("gone"), "pipe": os.mkfifo, "folder": os.mkdir,
             "git lfs pull": lambda path: path.write_text("version https://git-lfs.github.com/sp")}
    for word, put in place.items():
        (tmp_path / name).unlink()
        put(tmp_path / name)
        said = sentence(DLLM.from_pretrained, tmp_path, kind=(ValueError, OSError))
        assert name in said and str(tmp_path) in said
        assert word in said or "of the 3 files" in said
        if word == "folder":
            (tmp_path / name).rmdir()
            (tmp_path / name).touch()


def test_weights_without_a_config_are_told_apart_from_no_weights(tmp_path):
    said = sentence(DLLM.from_pretrained, tmp_path, kind=FileNotFoundError)
    assert said == f"there is no checkpoint in {tmp_path}"
    random_model().save(tmp_path)
    (tmp_path / CONFIG).unlink()
    said = sentence(DLLM.from_pretrained, tmp_path, kind=FileNotFoundError)
    assert WEIGHTS in said and f"no {CONFIG}" in said


def test_a_file_in_place_of_its_folder_is_told(tmp_path):
    random_model().save(tmp_path)
    for name in (WEIGHTS, CONFIG):
        said = sentence(find_weights, str(tmp_path / name), kind=FileNotFoundError)
        assert f"{tmp_path / name} is a file" in said and "folder" in said
    cfg = ConvertConfig(init_from=str(tmp_path), out_dir=str(tmp_path / CONFIG))
    assert "is a file" in sentence(convert, cfg, kind=ValueError)


def test_every_part_that_is_missing_is_named(tmp_path):
    generate(tmp_path, "llada", parts=5)
    gone = [f"model-0000{k}-of-00005.safetensors" for k in (2, 4)]
    for name in gone:
        (tmp_path / name).unlink()
    said = sentence(DLLM.from_pretrained, tmp_path, kind=FileNotFoundError)
    assert "2 of the 5" in said and all(name in said for name in gone)
    assert "model-00001-of-00005.safetensors" not in said


def test_a_long_index_is_read_in_linear_time(tmp_path):
    generate(tmp_path, "llada", parts=2)
    weight_map = {f"tensor.{i}": f"part-{i}.safetensors" for i in range(50_000)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    began = time.process_time()
    said = sentence(DLLM.from_pretrained, tmp_path, kind=FileNotFoundError)
    assert time.process_time() - began < 10 and len(said) < 1000


def test_a_damaged_tokenizer_is_not_converted(tmp_path):
    (tmp_path / "a").mkdir()
    random_model().save(tmp_path / "a")
    toy_tokenizer().save(tmp_path / "a")
    spec = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    (tmp_path / "a" / "tokenizer.json").write_text(json.dumps({**spec, "pattern": "xxxx"}))
    cfg = ConvertConfig(init_from=str(tmp_path / "a"), out_dir=str(tmp_path / "b"))
    assert "tokenizer.json" in sentence(convert, cfg, kind=ValueError)
    assert not (tmp_path / "b").exists()


def test_what_fp16_cannot_hold_is_named(tmp_path):
    tensors = generate(tmp_path, "llada", dtype=torch.float32)
    write_weights(tmp_path, {**tensors, "model.transformer.ln_f.weight": torch.full((32,), 1e6)})
    DLLM.from_pretrained(tmp_path, torch.bfloat16)
    said = sentence(DLLM.from_pretrained, tmp_path, torch.float16, kind=ValueError)
    assert "model.transformer.ln_f.weight" in said


# ---- out ----


@every_family
@pytest.mark.parametrize("parts", [1, 3])
def test_there_and_back_in_bf16_is_bit_exact(family, parts, tmp_path, monkeypatch):
    tensors = generate(tmp_path / "a", family, parts)
    others = {"README.md": b"# Of \xc3\xa4ll", "modeling_x.py": b"raise SystemExit\r\n",
              "chat_template.jinja": b"{{ x }}", "generation_config.json": b"{}",
              "merges.txt": b"a b\n", "vocab.json": b"{}", "tokenizer.model": b"\x00\xff"}
    for name, content in others.items():
        (tmp_path / "a" / name).write_bytes(content)
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(b"a pickle")
    (tmp_path / "a" / "train_state.safetensors").write_bytes(b"")
    if parts > 1:
        monkeypatch.setattr(weights, "PART_BYTES", 20_000)
    (tmp_path / "b").mkdir()
    model = DLLM.from_pretrained(tmp_path / "a")        # through fp32
    shutil.move(tmp_path / "a", tmp_path / "moved")     # a checkpoint is removed when it is old
    model.save(tmp_path / "b", torch.bfloat16)
    assert same(stored(tmp_path / "b"), tensors)
    assert json.loads((tmp_path / "b" / CONFIG).read_text()) == TINY[family]
    for name, content in others.items():
        assert (tmp_path / "b" / name).read_bytes() == content
    beside = {path.name for path in (tmp_path / "b").iterdir() if "safetensors" not in path.name}
    assert beside - {"tokenizer_config.json"} == {CONFIG, *others}
    again = DLLM.from_pretrained(tmp_path / "b")
    assert again.config == model.config
    assert same(again.state_dict(), model.state_dict())


@every_family
def test_a_checkpoint_in_fp32_says_so_and_changes_nothing_else(family, tmp_path):
    generate(tmp_path, family)
    model = DLLM.from_pretrained(tmp_path)
    model.save(tmp_path)
    written, before = json.loads((tmp_path / CONFIG).read_text()), TINY[family]
    assert {key for key in before if written[key] != before[key]} == \
        {"torch_dtype" if "torch_dtype" in before else "dtype"}
    assert written.keys() == before.keys() and "float32" in written.values()
    assert all(p.dtype == torch.float32 for p in load_file(tmp_path / WEIGHTS).values())


def test_large_models_are_written_in_parts_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PART_BYTES", 10_000)
    model = random_model()
    model.save(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / INDEX).read_text())
    params = dict(model.named_parameters())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in params.values())
    assert index["weight_map"].keys() == params.keys()
    for file in files:
        names = load_file(tmp_path / file).keys()
        assert {index["weight_map"][name] for name in names} == {file}
        assert len(names) == 1 or sum(params[name].nbytes for name in names) <= 10_000
    assert same(DLLM.from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_a_tied_head_is_stored_once(tmp_path):
    model = random_model(tied_head=True)
    model.save(tmp_path)
    assert "head.weight" not in load_file(tmp_path / WEIGHTS)
    loaded = DLLM.from_pretrained(tmp_path)
    assert loaded.head.weight is loaded.embed.weight
    assert same(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_all_files_have_the_mode_that_the_umask_asks_for(umask, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "PART_BYTES", 20_000)
    before = os.umask(umask)
    try:
        random_model().save(tmp_path)
        toy_tokenizer().save(tmp_path)
        weights.save_tensors({"x": torch.zeros(2)}, tmp_path / "state.safetensors")
        assert os.umask(umask) == umask                 # and the umask is what it was
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o666 & ~umask} and len(modes) > 4, modes


def test_save_tensors_writes_any_tensors_with_their_metadata(tmp_path):
    given = {"a": torch.arange(12.0).view(3, 4).T, "b": torch.zeros(()), "c": torch.ones(2).int()}
    weights.save_tensors(given, tmp_path / "x.safetensors", {"format": "pt"})
    assert same(weights.read_safetensors(tmp_path / "x.safetensors"), given)
    with weights.open_safetensors(tmp_path / "x.safetensors") as file:
        assert file.metadata() == {"format": "pt"}


LIMITED = """
import resource, sys
sys.path.insert(0, "tests")
from test_weights import random_model
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    random_model().save(sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_one_sentence_with_the_file(tmp_path):
    """A limit on the size of files stands for the full disk: the same calls fail."""
    done = python("-c", LIMITED, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and str(tmp_path / WEIGHTS) in done.stdout
    assert not (tmp_path / CONFIG).exists()


@pytest.mark.parametrize("name", [WEIGHTS, "model-00002-of-00003.safetensors", INDEX, CONFIG,
                                  "README.md", "tokenizer.json"])
def test_whichever_file_meets_the_full_disk_is_named(name, tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a" / "README.md").write_text("x")
    random_model().save(tmp_path / "a")
    model = DLLM.from_pretrained(tmp_path / "a")
    if name != WEIGHTS:
        monkeypatch.setattr(weights, "PART_BYTES", 33_000)

    def let_fail(holder, function, where, error):
        write = getattr(holder, function)

        def write_or_fail(*args):
            if name in Path(args[where]).name:
                raise error
            return write(*args)
        monkeypatch.setattr(holder, function, write_or_fail)
    let_fail(weights, "save_file", 1, SafetensorError("I/O error: No space left on device"))
    let_fail(Path, "write_bytes", 0, OSError(28, "No space left on device"))
    let_fail(Path, "write_text", 0, OSError(28, "No space left on device"))
    said = sentence(lambda: (model.save(tmp_path / "b"), toy_tokenizer().save(tmp_path / "b")),
                    kind=OSError)
    assert "No space left" in said and str(tmp_path / "b" / name) in said


def test_transformers_reads_what_is_written(tmp_path):
    transformers = pytest.importorskip("transformers", reason="reads the exported folder")
    tensors = generate(tmp_path / "a", "Dream")
    (tmp_path / "b").mkdir()
    DLLM.from_pretrained(tmp_path / "a").save(tmp_path / "b", torch.bfloat16)
    config = json.loads((tmp_path / "b" / CONFIG).read_text())
    (tmp_path / "b" / CONFIG).write_text(json.dumps({**config, "model_type": "qwen2"}))
    qwen = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    assert qwen.dtype == torch.bfloat16 and same(qwen.state_dict(), tensors)


# ---- a command: convert ----


@every_family
def test_a_checkpoint_is_converted_without_a_network(family, tmp_path, monkeypatch, capsys):
    tensors = generate(tmp_path / "a", family)
    model = DLLM.from_pretrained(tmp_path / "a")
    (tmp_path / "run" / "step_0000010").mkdir(parents=True)
    model.save(tmp_path / "run" / "step_0000010")
    save_file({"adam": torch.zeros(1)}, tmp_path / "run/step_0000010/train_state.safetensors")
    (tmp_path / "run/step_0000010/train_state.json").write_text("{}")
    (tmp_path / "run/step_0000010/README.md").write_text("hello")
    monkeypatch.setattr(weights, "PART_BYTES", 20_000)
    convert(ConvertConfig(init_from=str(tmp_path / "run"), out_dir=str(tmp_path / "new" / "b")))
    assert same(stored(tmp_path / "new" / "b"), tensors)
    assert json.loads((tmp_path / "new" / "b" / CONFIG).read_text()) == TINY[family]
    assert (tmp_path / "new" / "b" / "README.md").read_text() == "hello"
    assert not list((tmp_path / "new" / "b").glob("train_state*"))
    assert family in capsys.readouterr().out
    again = ConvertConfig(init_from=str(tmp_path / "a"), out_dir=str(tmp_path / "new" / "b"))
    assert "not empty" in sentence(convert, again, kind=ValueError)


def test_our_own_family_converts_too_and_the_command_says_what_is_wrong(tmp_path):
    def command(*options):
        return python(ROOT / "pretrained/weights.py", *options, cwd=tmp_path)
    (tmp_path / "a").mkdir()
    model = random_model()
    model.save(tmp_path / "a")
    done = command(f"--init_from={tmp_path}/a", f"--out_dir={tmp_path}/b", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    assert same(DLLM.from_pretrained(tmp_path / "b", torch.bfloat16).state_dict(),
                model.bfloat16().state_dict())
    done = command("--init_from=nowhere", "--out_dir=c")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr


def test_a_failed_conversion_leaves_no_checkpoint(tmp_path):
    generate(tmp_path / "a", "Dream")
    change_tensor(tmp_path / "a", UP, set_value(float("nan")))
    with pytest.raises(ValueError):
        convert(ConvertConfig(init_from=str(tmp_path / "a"), out_dir=str(tmp_path / "b")))
    with pytest.raises(FileNotFoundError):
        find_weights(tmp_path / "b")


# ---- training on them ----


def test_a_training_checkpoint_of_a_llada_is_a_llada_folder(tmp_path):
    tok = toy_tokenizer()
    sizes = dict(embedding_size=tok.n_vocab + 3, vocab_size=tok.n_vocab, mask_token_id=tok.mask_id,
                 eos_token_id=tok.eos_id, pad_token_id=tok.eos_id, max_sequence_length=256)
    published = {**TINY["llada"], **sizes}
    tensors = generate(tmp_path / "a", "llada", parts=2, **sizes)
    tok.save(tmp_path / "a")
    (tmp_path / "a" / "modeling_llada.py").write_text("raise SystemExit")
    cfg = TrainConfig(out_dir=str(tmp_path / "run"), init_from=str(tmp_path / "a"), batch_size=4,
                      max_steps=1, eval_rows=4, device="cpu", lambda_jepa=1.0, n_pred_layer=1)
    train(cfg)
    train(replace(cfg, resume=True, max_steps=2))       # the first checkpoint is removed
    train(replace(cfg, resume=True, max_steps=3, export_dir=str(tmp_path / "out")))
    [step] = (tmp_path / "run").glob("step_*")
    assert step.name == "step_0000003" and (step / "train_state.safetensors").is_file()
    for folder, dtype in ((step, "float32"), (tmp_path / "out", "bfloat16")):
        assert json.loads((folder / CONFIG).read_text()) == {**published, "torch_dtype": dtype}
        assert (folder / "modeling_llada.py").read_text() == "raise SystemExit"
        assert (folder / "tokenizer.json").read_bytes() == \
            (tmp_path / "a" / "tokenizer.json").read_bytes()
        assert stored(folder).keys() == tensors.keys()
        assert {p.dtype for p in stored(folder).values()} == {getattr(torch, dtype)}
    trained = stored(step)
    assert same({name: p.bfloat16() for name, p in trained.items()}, stored(tmp_path / "out"))
    assert not same(trained, {name: p.float() for name, p in tensors.items()})


def test_an_export_dir_in_use_is_refused_before_the_training(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    said = sentence(train, TrainConfig(out_dir=str(tmp_path / "run"), device="cpu",
                                       export_dir=str(tmp_path / "out")), kind=ValueError)
    assert str(tmp_path / "out") in said and not (tmp_path / "run").exists()


# ---- finding ----


def test_a_hub_name_is_downloaded_and_loaded(tmp_path, monkeypatch):
    tensors, calls = generate(tmp_path, "llada", parts=2), []

    def snapshot_download(name, revision=None, allow_patterns=None, ignore_patterns=None):
        calls.append((name, revision))
        assert not any(pattern.endswith(("bin", "pt", ".*")) for pattern in allow_patterns)
        assert ignore_patterns == ["*/*"]               # the model itself, no other one inside
        return str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = DLLM.from_pretrained("GSAI-ML/LLaDA-8B-Base", revision="0f2787f2d87e")
    assert torch.equal(model.embed.weight, tensors["model.transformer.wte.weight"].float())
    assert find_weights("GSAI-ML/LLaDA-8B-Base") == str(tmp_path)
    assert calls == [("GSAI-ML/LLaDA-8B-Base", "0f2787f2d87e"), ("GSAI-ML/LLaDA-8B-Base", None)]


@pytest.mark.parametrize("failure", [OSError("no\nspace"), ValueError(""), RuntimeError("x\ny"),
                                     ConnectionError("unreachable")])
def test_whatever_the_hub_raises_is_one_line_with_name_and_revision(failure, monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise failure
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    said = sentence(find_weights, "GSAI-ML/LLaDA-8B-Bse", "main", kind=FileNotFoundError)
    assert "'GSAI-ML/LLaDA-8B-Bse'" in said and "'main'" in said


@pytest.mark.parametrize("name", ["nowhere", "out/tiny/jepa", "/tmp/x/y", "../x", "./x", "", "~/x",
                                  "https://huggingface.co/GSAI-ML/LLaDA-8B-Base", "a b/c"])
def test_what_cannot_be_a_hub_name_is_not_asked_for(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)         # where train.py has run there is an out/tiny/jepa
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    said = sentence(find_weights, name, kind=FileNotFoundError)
    assert repr(name) in said and "GSAI-ML/LLaDA-8B-Base" in said


def test_a_revision_of_a_folder_is_refused(tmp_path):
    random_model().save(tmp_path)
    said = sentence(DLLM.from_pretrained, tmp_path, revision="main", kind=ValueError)
    assert "revision='main'" in said


def test_offline_without_a_cache_is_one_sentence_and_no_network(tmp_path):
    script = ("import socket\n"
              "def refuse(*args): raise AssertionError('the network was used')\n"
              "socket.socket.connect = refuse\n"
              "from pretrained.weights import find_weights\n"
              "try: find_weights('GSAI-ML/LLaDA-8B-Base')\n"
              "except FileNotFoundError as error: print(error)\n")
    done = python("-c", script, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "'GSAI-ML/LLaDA-8B-Base'" in done.stdout


def test_a_cache_that_holds_only_some_parts_is_named_part_by_part_when_offline(tmp_path):
    """As an interrupted download leaves it: links to blobs, of which some are not there."""
    cache = tmp_path / "hub" / "models--GSAI-ML--LLaDA-8B-Base"
    snapshot = cache / "snapshots" / ("0" * 40)
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    generate(snapshot, "llada", parts=4)
    for path in list(snapshot.iterdir()):
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    gone = [f"model-0000{k}-of-00004.safetensors" for k in (2, 3)]
    (snapshot / gone[0]).unlink()
    (cache / "blobs" / gone[1]).unlink()
    script = ("from configurator import run\n"
              "from pretrained.weights import ConvertConfig, main\n"
              f"run(lambda cfg: main(ConvertConfig('GSAI-ML/LLaDA-8B-Base', '', '{tmp_path}/b')),"
              " ConvertConfig)")
    done = python("-c", script, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "lacks 2 of the 4 files" in done.stderr and all(name in done.stderr for name in gone)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for load in (DLLM.from_checkpoint, DLLM.from_pretrained):
        said = sentence(load, str(tmp_path / "nowhere"), kind=FileNotFoundError)
        assert "nowhere" in said


def save_steps(tmp_path, *names):
    """Checkpoints in folders of these names, each with weights of its own; -> the folders."""
    folders = [tmp_path / name for name in names]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        random_model(seed).save(folder)
    return folders


@pytest.mark.parametrize("names", [("step_0000300", "step_0000100", "step_0000200"),
                                   ("step_100", "step_99")])
def test_the_newest_checkpoint_has_the_highest_step(names, tmp_path):
    newest, *_ = save_steps(tmp_path, *names)
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "saving").mkdir()
    assert newest_checkpoint(tmp_path) == find_weights(tmp_path) == str(newest)
    assert newest_checkpoint(newest) == str(newest)             # a checkpoint is its own newest
    loaded = DLLM.from_checkpoint(tmp_path)
    assert torch.equal(loaded.embed.weight, random_model(seed=0).embed.weight)


def test_a_step_folder_without_a_config_is_no_checkpoint(tmp_path):
    complete, incomplete = save_steps(tmp_path, "step_0000100", "step_0000200")
    (incomplete / "config.json").unlink()
    assert newest_checkpoint(tmp_path) == str(complete)


# ---- our own checkpoints ----


@pytest.mark.parametrize("changes", [
    {}, dict(n_kv_head=2, norm_eps=1e-6, qkv_bias=True, shift=True),
    dict(n_kv_head=2, head_dim=12, qk_norm=True, tied_head=True)], ids=FAMILIES)
def test_a_saved_model_comes_back_to_the_last_bit_and_without_pickle(changes, tmp_path):
    model = random_model(**changes)
    model.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    ids = torch.arange(10).view(2, 5)
    for load in (DLLM.from_checkpoint, DLLM.from_pretrained):
        loaded = load(str(tmp_path))
        assert loaded.config == model.config
        assert same(loaded.state_dict(), model.state_dict())
        assert torch.equal(loaded(ids), model(ids))


def test_a_checkpoint_from_before_the_newest_settings_still_loads(tmp_path):
    random_model().save(tmp_path)
    change_config(tmp_path, head_dim=None, qk_norm=None, tied_head=None)
    assert DLLM.from_pretrained(tmp_path).config == small_config()


def change_weights(folder, **changes):
    """Sets tensors, or removes those that are None; "norm__weight" stands for norm.weight."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = {name: p for name, p in tensors.items() if p is not None}
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **changes):
    """Sets entries, or removes those that are None."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


SPOILT = {   # what happened to the folder, and the words that the message has to hold
    "weights cut short": (lambda f: os.truncate(f / WEIGHTS, os.path.getsize(f / WEIGHTS) - 100),
                          [WEIGHTS]),
    "weights empty": (lambda f: (f / WEIGHTS).write_bytes(b""), [WEIGHTS]),
    "weights gone": (lambda f: (f / WEIGHTS).unlink(), [WEIGHTS]),
    "a tensor missing": (lambda f: change_weights(f, norm__weight=None), [WEIGHTS, "norm.weight"]),
    "a tensor too many": (lambda f: change_weights(f, head__bias=torch.zeros(40)),
                          [WEIGHTS, "head.bias"]),
    "a wrong shape": (lambda f: change_weights(f, norm__weight=torch.zeros(33)),
                      [WEIGHTS, "norm.weight", "33", "32"]),
    "NaN": (lambda f: change_weights(f, norm__weight=torch.full((32,), torch.nan)),
            [WEIGHTS, "norm.weight", "NaN"]),
    "another config": (lambda f: change_config(f, n_hidden=64), [WEIGHTS, "48", "64"]),
    "a foreign model": (lambda f: change_config(f, model_type="gpt2"), ["'gpt2'", "llada"]),
    "a nameless model": (lambda f: change_config(f, model_type=None), []),
    "a size missing": (lambda f: change_config(f, vocab_size=None), [CONFIG, "vocab_size"]),
    "a base of rope missing": (lambda f: change_config(f, rope_theta=None), [CONFIG, "rope_theta"]),
    "the shift missing": (lambda f: change_config(f, shift=None), [CONFIG, "shift"]),
    "a size that is text": (lambda f: change_config(f, n_embd="32"), [CONFIG, 'n_embd = "32"']),
    "sizes that do not fit": (lambda f: change_config(f, n_head=5), [CONFIG, "n_head=5"]),
    "a setting unknown here": (lambda f: change_config(f, n_expert=8), [CONFIG, "n_expert"]),
    "config no JSON": (lambda f: (f / CONFIG).write_text("n_layer = 2"), [CONFIG]),
    "config no object": (lambda f: (f / CONFIG).write_text("[1, 2]"), [CONFIG]),
    "config no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), [CONFIG]),
    "empty folder": (lambda f: [path.unlink() for path in f.iterdir()], []),
}


@pytest.mark.parametrize("spoil, words", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_checkpoint_is_one_line_that_names_the_place(spoil, words, tmp_path):
    random_model().save(tmp_path)
    spoil(tmp_path)
    said = sentence(DLLM.from_checkpoint, str(tmp_path))
    assert all(word in said for word in [str(tmp_path), *words]), said


# ---- memory ----


MEASURE = """
import resource, sys
import torch
from model import DLLM
folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.ones(8, 8) @ torch.ones(8, 8)
before = peak()
model = DLLM.from_pretrained(folder, dtype)
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
def test_loading_takes_the_memory_of_the_weights_and_one_part(tmp_path):
    sizes = dict(d_model=1024, n_heads=16, n_layers=8, mlp_hidden_size=4096, embedding_size=40_000)
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16).normal_()
               for name, shape in shapes("llada", {**TINY["llada"], **sizes}).items()}
    write_weights(tmp_path, tensors, parts=8)
    (tmp_path / CONFIG).write_text(json.dumps({**TINY["llada"], **sizes}))
    part = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    on_disk = sum(p.nbytes for p in tensors.values())
    del tensors
    for dtype, factor in (("bfloat16", 1), ("float32", 2)):
        # through a shell: a process starts with the peak of the one that starts it, which is ours
        done = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", MEASURE,
                               str(tmp_path), dtype], text=True, capture_output=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        peak, size = map(float, done.stdout.split())
        print(f"{on_disk / 1e9:.2f} GB of bf16 in parts of up to {part / 1e9:.2f} GB, loaded as "
              f"{dtype}: peak {peak / 1e9:.2f} GB, {peak / size:.2f} of the weights")
        assert on_disk > 3e8 and size == on_disk * factor
        assert size <= peak < 1.15 * size + part


def test_reading_yields_one_tensor_at_a_time_in_the_files_order(tmp_path):
    tensors = generate(tmp_path, "llada", parts=4)
    found = catalogue(tmp_path)
    assert {name: s.shape for name, s in found.items()} == \
        {name: tuple(p.shape) for name, p in tensors.items()}
    files = [found[name].file for name, _ in read_tensors(found)]
    assert files == sorted(files) and len(set(files)) == 4
    reader = read_tensors(found, torch.float32)
    name, tensor = next(reader)
    assert torch.equal(tensor, tensors[name].float()) and math.prod(tensor.shape) > 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_reading_asks_for_a_truth_value_once_a_file(tmp_path, monkeypatch, dtype):
    """On a GPU each is a wait for the device."""
    asked, is_true = [], torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: asked.append(1) or is_true(x))
    generate(tmp_path, "Dream", parts=3)
    found = dict(read_tensors(catalogue(tmp_path), dtype))
    assert len(asked) == 3 < len(found) / 10


@pytest.mark.parametrize("which", [0, -1])
def test_no_whole_file_is_handed_out_with_a_tensor_that_is_not_finite(tmp_path, which):
    generate(tmp_path, "Dream", parts=3)
    found = catalogue(tmp_path)
    names = [name for name in found if found[name].file.endswith(PART)]
    change_tensor(tmp_path, names[which], set_value(float("nan")))
    reader, seen = read_tensors(found), []
    said = sentence(lambda: seen.extend(name for name, _ in reader))
    assert names[which] in said and PART in said and names[-1] not in seen


OTHER_NETWORKS = {
    "llada": dict(activation_type="gelu", block_type="sequential", block_group_size=2,
                  layer_norm_type="default", layer_norm_with_affine=False,
                  bias_for_layer_norm=True, attention_layer_norm=True, input_emb_norm=True,
                  include_bias=True, include_qkv_bias=True, alibi=True, rope=False,
                  rope_full_precision=False, multi_query_attention=True, scale_logits=True,
                  quantization_config={"bits": 4}),
    "Dream": dict(hidden_act="gelu", use_sliding_window=True, use_mrope=True, block_size=32,
                  quantization_config={"bits": 4}),
    "a2d-qwen3": dict(hidden_act="gelu", use_sliding_window=True, attention_bias=True,
                      quantization_config={"bits": 4})}


@every_family
def test_every_entry_that_asks_for_another_network_is_refused(family, tmp_path):
    generate(tmp_path, family)
    config = json.loads((tmp_path / CONFIG).read_text())
    config_fields(tmp_path, config)
    for key, value in OTHER_NETWORKS[family].items():
        said = sentence(config_fields, tmp_path, {**config, key: value}, kind=ValueError)
        assert f"has {key} = {json.dumps(value)}" in said


def test_a_part_may_be_filled_to_its_last_byte_and_the_index_has_the_size_of_all(tmp_path,
                                                                                monkeypatch):
    monkeypatch.setattr(weights, "PART_BYTES", 64)
    tensors = {name: torch.full((n,), float(n)) for name, n in (("a", 8), ("b", 8), ("c", 1))}
    sizes = {name: 4 * len(p) for name, p in tensors.items()}
    weights.write_weights(tmp_path, {"model_type": "x"}, {}, sizes, tensors.items(), torch.float32)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 68
    assert [index["weight_map"][name][:11] for name in "abc"] == ["model-00001"] * 2 + [
        "model-00002"]
    for file in {*index["weight_map"].values()}:
        with weights.open_safetensors(tmp_path / file) as parts:
            assert parts.metadata() == {"format": "pt"}


@every_family
def test_the_end_of_text_is_what_pads_whatever_ends_a_turn(family, tmp_path):
    config = {**TINY[family], "pad_token_id": 5, "eos_token_id": 6}
    if family != "a2d-qwen3":                           # which names its tokens in other files
        assert config_fields(tmp_path, config)["eos_id"] == 5
    added = [{"content": "<|endoftext|>", "id": 7}, {"content": "<|mask|>", "id": 8}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert config_fields(tmp_path, config)["eos_id"] == 7


def test_what_lies_in_folders_beside_the_weights_is_not_copied(tmp_path):
    generate(tmp_path, "Dream")
    (tmp_path / "README.md").write_text("read me")
    (tmp_path / "more.md").mkdir()
    (tmp_path / "more.md" / "LICENSE").write_text("not this one")
    found = weights.small_files(tmp_path)
    assert found["README.md"] == b"read me" and not {"LICENSE", "more.md"} & found.keys()
