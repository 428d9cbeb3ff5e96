"""Laws of a model's shape from scratch: the settings override the preset, or are refused."""
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from helpers import assert_resuming_changes_nothing, sentence, sentence_of, write_checkpoint
from model import PRESETS, ModelConfig
from pretrained.tokenizer import byte_tokenizer
from pretrained.weights import newest_checkpoint
from train import TrainConfig, main
from training.setup import load, shape_from_scratch

TOK = byte_tokenizer()
ALL = dict(n_layer=3, n_head=6, n_kv_head=2, n_embd=96, n_hidden=160, block_size=48)


def shape(**settings) -> ModelConfig:
    """Return the shape that these settings make."""
    return shape_from_scratch(TrainConfig(tokenizer="bytes", **settings), TOK)


def test_without_settings_the_shape_is_the_presets():
    of_tokenizer = dict(vocab_size=TOK.n_vocab, mask_id=TOK.mask_id, eos_id=TOK.eos_id)
    for name, preset in PRESETS.items():
        assert shape(preset=name) == ModelConfig(**of_tokenizer | preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_given_is_the_models(preset):
    assert ALL.items() <= asdict(shape(preset=preset, **ALL)).items()


@pytest.mark.parametrize("name, value", [("n_layer", 3), ("n_head", 8), ("n_kv_head", 2),
                                         ("n_embd", 96), ("n_hidden", 160), ("block_size", 48)])
def test_each_setting_stands_alone(name, value):
    assert getattr(shape(**{name: value}), name) == value != getattr(shape(), name)


def test_what_is_not_given_stays_or_follows_in_the_presets_proportion():
    for preset in PRESETS:
        base = shape(preset=preset)
        twice = shape(preset=preset, n_head=2 * base.n_head, n_embd=2 * base.n_embd)
        assert twice == replace(base, n_head=2 * base.n_head, n_kv_head=2 * base.n_kv_head,
                                n_embd=2 * base.n_embd, n_hidden=2 * base.n_hidden)
    assert shape(preset="tiny", n_head=2).n_kv_head == 2                    # no GQA
    assert shape(preset="dream-7b", n_head=7).n_kv_head == 1                # 28 to 4
    assert shape(preset="dream-7b", n_head=4).n_kv_head == 1                # none is left over
    assert shape(preset="tiny", n_embd=256).n_hidden == 704
    assert shape(preset="tiny", n_embd=256, n_hidden=32).n_hidden == 32
    assert shape(preset="tiny", n_layer=9) == replace(shape(preset="tiny"), n_layer=9)


def test_a_run_trains_and_leaves_the_model_of_that_shape(cfg):
    main(replace(cfg, max_steps=1, **ALL))
    config = json.loads(Path(newest_checkpoint(cfg.out_dir), "config.json").read_text())
    assert ALL.items() <= config.items()


def test_a_run_of_another_shape_resumes_as_itself(cfg, tmp_path, monkeypatch):
    assert_resuming_changes_nothing(replace(cfg, n_layer=1, n_embd=32), tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_keeps_its_shape(name, cfg, monkeypatch):
    cfg = replace(cfg, max_steps=1, **ALL)
    main(cfg)
    said = sentence_of(monkeypatch, replace(cfg, **{name: 2 * ALL[name]}), "--resume=True")
    assert f"{name}={ALL[name]}" in said and f"{name}={2 * ALL[name]}" in said


@pytest.mark.parametrize("name", ALL)
def test_a_shape_beside_weights_is_refused(name, tmp_path):
    folder = write_checkpoint(tmp_path / "model", TOK)
    said = sentence(TrainConfig, init_from=str(folder), **{name: ALL[name]}, kind=ValueError)
    assert f"{name}={ALL[name]}" in said and f"init_from='{folder}'" in said
    model, *_ = load(TrainConfig(init_from=str(folder)), None, torch.device("cpu"))
    assert model.config.n_layer == 1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [-1, 1 << 24, 1 << 40])
def test_a_number_out_of_range_is_refused_at_once(name, value):
    assert f"{name}={value}" in sentence(TrainConfig, **{name: value}, kind=ValueError)


@pytest.mark.parametrize("given, word", [
    (dict(n_embd=130), "n_embd=130"), (dict(n_head=3), "n_head=3"),
    (dict(n_kv_head=3), "n_kv_head=3"), (dict(n_kv_head=8), "n_kv_head=8"),
    (dict(n_head=64, n_embd=64), "head_dim=1")])
def test_numbers_that_do_not_fit_each_other_are_one_sentence(given, word):
    assert word in sentence(shape, **given, kind=ValueError)
