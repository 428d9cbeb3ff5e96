"""Laws of autoregressive checkpoints that are read as diffusion models, against transformers'."""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from helpers import (assert_resuming_changes_nothing, lines, seeded, sentence, sentence_of,
                     write_gsm8k)
from model import DLLM, Padded, rope_table
from pretrained.a2d import adapt
from pretrained.config import read_config
from pretrained.tokenizer import load_tokenizer
from pretrained.weights import read_model
from published import LLADA_PATTERN, generate, learn
from train import TrainConfig
from train import main as train

transformers = pytest.importorskip("transformers", reason="the independent reference; installed "
                                   "by tests/requirements.txt")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty>"]
V = 700 + len(SPECIAL)
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
CLASSES = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
           "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
           "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)}
every_kind = pytest.mark.parametrize("kind", CLASSES)


class Causal(Padded):
    """The attention that the weights were trained with."""

    def attention(self, q, k, v, is_gqa):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_gqa)


def causal_logits(model, ids):
    with torch.no_grad():
        return model.unembed(model.encode(ids, layout=Causal(None, ids.device)))


@pytest.fixture(scope="session")
def vocabulary():
    return learn(LLADA_PATTERN, SPECIAL)


@pytest.fixture
def write(tmp_path, vocabulary):
    def write(kind="llama", special=(), **changes):
        """Write a random model as transformers saves it -> the folder, transformers' model."""
        config, model = CLASSES[kind]
        torch.manual_seed(0)
        changes = {"tie_word_embeddings": True, **SIZES, **changes}
        model = model(config(**changes)).eval()
        for p in model.parameters():                # its own are near zero
            p.data.normal_(0, 0.3)
        folder = tmp_path / kind
        model.save_pretrained(folder)
        tokenizer = json.loads(vocabulary.to_str())
        for i, text in enumerate(special):          # names for the last tokens of the vocabulary
            tokenizer["added_tokens"][-1 - i]["content"] = text
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        return folder, model
    return write


# ---- the network ----


@every_kind
@pytest.mark.parametrize("changes", [
    {}, dict(tie_word_embeddings=False), dict(rope_parameters=LLAMA3)], ids=str)
def test_with_causal_attention_the_logits_are_transformers(kind, changes, write):
    folder, theirs = write(kind, **changes)
    ours = DLLM.from_checkpoint(folder)
    ids = torch.randint(V, (3, 200), generator=seeded())
    with torch.no_grad():
        expected = theirs(ids).logits
    logits = causal_logits(ours, ids)
    torch.testing.assert_close(logits[..., :V], expected, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        assert (ours(ids)[..., :V] - expected).abs().max() > 0.01       # both ways


def test_rope_of_llama_3_leaves_fast_rotations_and_slows_slow_ones(write):
    folder, _ = write("llama", rope_parameters=LLAMA3)
    config = DLLM.on_meta(folder).config
    _, sin = rope_table(3, config, "cpu")
    _, plain = rope_table(3, replace(config, rope_factor=1.0), "cpu")
    angle, before = sin[1].asin(), plain[1].asin()          # of position 1
    torch.testing.assert_close(angle[0], before[0])
    torch.testing.assert_close(angle[-1], before[-1] / 8, rtol=1e-2, atol=0)


@pytest.mark.parametrize("change", [dict(high_freq_factor=8.0), dict(factor="8"), dict(factor=None),
                                    dict(original_max_position_embeddings=None)], ids=str)
def test_a_rope_of_llama_3_that_is_not_whole_is_refused(change, write):
    folder, _ = write()
    config = read_config(folder)
    config["rope_parameters"] = LLAMA3 | change
    (folder / "config.json").write_text(json.dumps(config))
    assert "rope_parameters" in sentence(DLLM.on_meta, folder, kind=ValueError)


# ---- the mask ----


@every_kind
def test_the_mask_is_new_and_its_row_is_the_mean(kind, write):
    folder, theirs = write(kind, tie_word_embeddings=False)
    model, tok = DLLM.from_checkpoint(folder), load_tokenizer(str(folder))
    assert model.config.mask_id == tok.mask_id == V == model.config.vocab_size - 1
    for ours, before in ((model.embed, theirs.get_input_embeddings()),
                         (model.head, theirs.get_output_embeddings())):
        assert torch.equal(ours.weight[:-1], before.weight)
        torch.testing.assert_close(ours.weight[-1], before.weight.mean(dim=0))
    assert tok.encode("<|mask|>") != [V] and tok.encode("<|mask|>", specials=True) == [V]


def test_a_new_mask_takes_a_spare_row_of_the_embedding(write):
    folder, theirs = write(vocab_size=V + 8)
    model = DLLM.from_checkpoint(folder)
    assert model.config.mask_id == V and model.config.vocab_size == V + 8
    assert torch.equal(model.embed.weight, theirs.get_input_embeddings().weight)
    load_tokenizer(str(folder)).check_fits(model.config)


@pytest.mark.parametrize("special, setting, mask", [
    (("<empty>",), "<empty>", "<empty>"), (("<|reserved_special_token_0|>",), "",
                                           "<|reserved_special_token_0|>"),
    (("<|MASK|>",), "", "<|MASK|>"), (("<[MASK]>", "<|reserved_1|>"), "", "<[MASK]>"),
    (("<|mask|>", "<|reserved_1|>"), "<|reserved_1|>", "<|reserved_1|>")])
def test_the_mask_is_what_the_setting_or_its_name_says(special, setting, mask, write):
    folder, theirs = write(special=special)
    model, tok = DLLM.from_checkpoint(folder, mask_token=setting), load_tokenizer(
        str(folder), mask_token=setting)
    assert tok.added[mask] == tok.mask_id == model.config.mask_id
    assert torch.equal(model.embed.weight, theirs.get_input_embeddings().weight)    # no new row


def test_what_cannot_be_the_mask_is_refused(write, tmp_path, monkeypatch):
    folder, _ = write()
    for call in (DLLM.on_meta, load_tokenizer):
        said = sentence(call, str(folder), mask_token="the", kind=ValueError)
        assert "'the'" in said and "<|im_start|>" in said
    generate(tmp_path / "llada", "llada")
    for setting in (dict(mask_token="<|im_end|>"), dict(shift=True)):
        assert "llada" in sentence(DLLM.on_meta, tmp_path / "llada", **setting, kind=ValueError)
    for option in ("--mask_token=<x>", "--shift"):
        assert "init_from" in sentence_of(monkeypatch, None, "config/tiny.py", option)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in sentence(DLLM.on_meta, folder)


def test_loading_says_what_was_done(write, capsys):
    folder, _ = write("qwen3", special=["<empty>"])
    capsys.readouterr()                             # what transformers has printed
    DLLM.from_checkpoint(folder, mask_token="<empty>", shift=True)
    [said] = capsys.readouterr().err.splitlines()
    for part in ("qwen3", "a2d-qwen3", "<empty>", str(V - 1), "the next token", "trained"):
        assert part in said


def test_the_shift_is_kept_if_asked_for(write):
    folder, _ = write()
    ids = torch.randint(V, (2, 9), generator=seeded())
    plain, shifted = DLLM.from_checkpoint(folder), DLLM.from_checkpoint(folder, shift=True)
    with torch.no_grad():
        torch.testing.assert_close(shifted(ids)[:, 1:], plain(ids)[:, :-1])


def test_parts_of_a_grown_embedding_join_to_the_whole(write):
    folder, _ = write(tie_word_embeddings=False)
    model = DLLM.on_meta(folder)
    whole = dict(read_model(folder, model, torch.float32, "cpu"))
    parts = []
    for rank in range(3):
        slices = {}
        for name, p in whole.items():
            size = -(-len(p) // 3)
            slices[name] = slice(min(rank * size, len(p)), min((rank + 1) * size, len(p)))
        parts.append(dict(read_model(folder, model, torch.float32, "cpu", slices)))
    assert len(whole["embed.weight"]) == V + 1
    for name, p in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), p), name


# ---- what a run leaves ----


@pytest.fixture
def run(write, tmp_path):
    def run(kind, **changes):
        """Return the settings of two steps with JEPA from an autoregressive model."""
        folder, _ = write(kind)
        data = write_gsm8k(tmp_path)
        cfg = dict(init_from=str(folder), task="gsm8k", data_dir=str(data), batch_size=4,
                   eval_rows=4, max_steps=2, out_dir=str(tmp_path / "out"), device="cpu")
        return TrainConfig(**cfg | changes)
    return run


@every_kind
def test_a_run_leaves_a_diffusion_model_that_dllm_names_so(kind, run, tmp_path):
    train(run(kind, export_dir=str(tmp_path / "export"), shift=True))
    for folder in (tmp_path / "export", tmp_path / "out"):
        model, tok = DLLM.from_pretrained(folder), load_tokenizer(
            str(folder if folder.name == "export" else folder / "step_0000002"))
        tok.check_fits(model.config)
        assert model.config.shift and model.config.mask_id == V
    config = read_config(tmp_path / "export")
    assert config["model_type"] == f"a2d-{kind}" and config["mask_token_id"] == V
    assert config["architectures"] == [{"llama": "A2DLlamaLMHeadModel",
                                        "qwen2": "A2DQwen2LMHeadModel",
                                        "qwen3": "A2DQwen3LMHeadModel"}[kind]]
    # the library sees the mask, too, and the tensors are the autoregressive class's
    ours = DLLM.from_pretrained(tmp_path / "export")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "export")
    assert theirs.mask_token_id == V and theirs("a<|mask|>").input_ids[-1] == V
    (tmp_path / "export" / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    network = CLASSES[kind][1].from_pretrained(tmp_path / "export", dtype=torch.float32)
    ids = torch.randint(V, (2, 50), generator=seeded())
    with torch.no_grad():
        expected = network(ids).logits
    logits = causal_logits(ours, ids)                   # shifted: at i + 1 what the class has at i
    torch.testing.assert_close(logits[:, 1:], expected[:, :-1], atol=2e-5, rtol=1e-5)


def test_resuming_from_an_autoregressive_model_changes_nothing(run, tmp_path, monkeypatch):
    assert_resuming_changes_nothing(run("llama", mask_token="<empty>"), tmp_path, monkeypatch)


def test_lora_resumes_from_the_autoregressive_base(run, tmp_path, monkeypatch):
    cfg = run("qwen3", lora_rank=2, lambda_jepa=0.0)
    assert_resuming_changes_nothing(cfg, tmp_path, monkeypatch)
    assert lines(cfg.out_dir)


def test_another_mask_is_another_run(run, monkeypatch):
    cfg = run("llama", mask_token="<empty>")
    train(cfg)
    said = sentence_of(monkeypatch, replace(cfg, mask_token="<|im_start|>", resume=True,
                                            max_steps=3))
    assert "mask_token" in said


def test_a_head_that_differs_from_its_embedding_is_read_as_the_head(write, capsys):
    folder, theirs = write("qwen2")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    model = DLLM.from_checkpoint(folder)
    assert torch.equal(model.head.weight[:-1], head)
    assert torch.equal(model.embed.weight[:-1], tensors["model.embed_tokens.weight"])
    assert not model.config.tied_head and not model.published["tie_word_embeddings"]
    assert "differ" in capsys.readouterr().err


def test_a_diffusion_model_is_adapted_to_nothing(tmp_path):
    generate(tmp_path, "a2d-qwen3")
    assert adapt(tmp_path) == (read_config(tmp_path), {}, "")


# ---- the real SmolLM2-135M-Instruct ----


@pytest.mark.slow
def test_the_real_smollm2_scores_and_writes_as_in_transformers(smollm2, tmp_path):
    """Logits of 1,000 tokens of real text in fp32; greedy text; there and back."""
    ours = DLLM.from_checkpoint(smollm2, mask_token="<empty_output>").eval()
    assert sum(p.numel() for p in ours.parameters()) == 134_515_008
    tok = load_tokenizer(str(smollm2), mask_token="<empty_output>")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = torch.tensor([tok.encode(__doc__ + open(__file__).read())[:1000]])
    with torch.no_grad():
        expected = theirs(ids).logits
    logits = causal_logits(ours, ids)
    difference = (logits - expected).abs().max().item()
    print(f"|difference of logits| at most {difference:.1e} on {ids.shape[1]} tokens")
    assert ids.shape[1] == 1000 and difference <= 1e-3
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))

    prompt = tok.encode("The capital of France is")
    text = greedy(ours, prompt, 24)
    assert " Paris" in tok.decode(text)
    assert text == theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False,
                                   eos_token_id=[])[0, len(prompt):].tolist()

    ours.save(tmp_path, torch.float32)
    tok.save(tmp_path)
    config = read_config(tmp_path)
    assert config["model_type"] == "a2d-llama" and config["mask_token_id"] == 16
    assert greedy(DLLM.from_pretrained(tmp_path), prompt, 24) == text
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert back.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False,
                         eos_token_id=[])[0, len(prompt):].tolist() == text
    with torch.no_grad():
        assert torch.equal(back(ids).logits, expected)


def greedy(model, ids, n: int) -> list[int]:
    """Return n tokens, each the most probable after all before it."""
    ids = list(ids)
    for _ in range(n):
        ids.append(causal_logits(model, torch.tensor([ids]))[0, -1].argmax().item())
    return ids[-n:]


# ---- folders of dllm and iLLaDA ----


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_the_mask_that_the_tokenizers_settings_name_is_the_models(name, tmp_path):
    generate(tmp_path, "a2d-qwen3")                 # it has <|mask|>, id 37, too
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / name).write_text(json.dumps({**settings, "mask_token": {"content": "<|im_end|>"}}))
    assert DLLM.on_meta(tmp_path).config.mask_id == 35


def test_a_folder_as_illadas_model_card_describes_it_loads(tmp_path):
    tensors = generate(tmp_path, "a2d-qwen3")
    tensors = {name: p for name, p in tensors.items() if "_norm" not in name.split("attn.")[-1]}
    save_file(tensors, tmp_path / "model.safetensors")
    config = dict(read_config(tmp_path), model_type="illada", mask_token_id=5)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = DLLM.from_pretrained(tmp_path)
    assert model.config.mask_id == 5 and model.config.tied_head and not model.config.qk_norm
    (tmp_path / "config.json").write_text(json.dumps(dict(config, hidden_act="gelu")))
    assert "hidden_act" in sentence(DLLM.on_meta, tmp_path)


# SmolLM2-135M's config.json on the hub, apart from its sizes
HUB = {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1,
       "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
       "transformers.js_config": {"dtype": "q4"}}


def test_smollm2s_config_on_the_hub_is_read(write):
    folder, _ = write()
    config = read_config(folder)
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps({**config, **HUB}))
    DLLM.from_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps({**config, **HUB, "rope_interleaved": True}))
    assert "rope_interleaved" in sentence(DLLM.on_meta, folder)


def test_llama_3s_rope_counts_in_every_family_and_hides_nothing(tmp_path):
    generate(tmp_path, "llada")
    config = read_config(tmp_path)
    for entry, words in ((LLAMA3, ""), (dict(LLAMA3, partial_rotary_factor=0.5), "partial"),
                         (dict(LLAMA3, type="yarn"), "yarn")):
        entry = {**entry, "rope_theta": config["rope_theta"]}
        (tmp_path / "config.json").write_text(json.dumps(dict(config, rope_scaling=entry)))
        if words:
            assert words in sentence(DLLM.on_meta, tmp_path)
        else:
            assert DLLM.on_meta(tmp_path).config.rope_factor == 8
    two = dict(config, rope_scaling=LLAMA3 | {"rope_theta": config["rope_theta"]},
               rope_parameters=LLAMA3 | {"rope_theta": config["rope_theta"], "factor": 4.0})
    (tmp_path / "config.json").write_text(json.dumps(two))
    assert "two different scalings" in sentence(DLLM.on_meta, tmp_path)


def test_a_token_of_the_prompt_or_the_end_of_a_turn_is_no_mask(write):
    folder, _ = write()
    assert "--mask_token" in sentence(load_tokenizer, str(folder), mask_token="<|im_end|>")
    assert "--mask_token" in sentence(load_tokenizer, str(folder), chat=True,
                                      mask_token="<|im_start|>")
    assert load_tokenizer(str(folder), mask_token="<|im_start|>").mask_id == 701


def test_no_row_is_made_up_for_a_folder_that_lacks_one(write):
    folder, _ = write()
    config = read_config(folder)
    (folder / "config.json").write_text(json.dumps(dict(config, vocab_size=V + 1)))
    assert "shape" in sentence(DLLM.from_checkpoint, folder, mask_token="<empty>")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(5, 7)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    assert "lm_head" in sentence(DLLM.from_checkpoint, folder, mask_token="<empty>")


@pytest.mark.parametrize("change", [{"model": None}, {"model": [1]}, {"model": {"vocab": 3}},
                                    {"added_tokens": [{"content": 5, "id": 3}]},
                                    {"added_tokens": [{"content": None, "id": 3}]}], ids=str)
def test_a_damaged_tokenizer_is_one_sentence(change, write):
    folder, _ = write()
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, **change}))
    for call in (DLLM.on_meta, load_tokenizer):
        assert str(folder) in sentence(call, str(folder))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"chat_template": [{}]}')
    assert str(folder) in sentence(DLLM.on_meta, folder)


def test_a_mask_that_the_base_already_names_is_taken(write):
    folder, _ = write()
    (folder / "special_tokens_map.json").write_text('{"mask_token": "<empty>"}')
    assert DLLM.on_meta(folder).config.mask_id == load_tokenizer(str(folder)).mask_id == V - 1
