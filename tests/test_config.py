"""Laws of config.json: the network is the one that the file states, or the file is refused."""
import json
import time
from dataclasses import asdict, fields, replace

import pytest

from helpers import CONFIG, make_model, sentence
from model import DLLM, ModelConfig
from pretrained.config import config_fields
from published import QWEN3, TINY, generate

every_family = pytest.mark.parametrize("family", TINY)
INNER = ("rope_parameters", "rope_scaling", "rope_parameters.full_attention")


def stating(family, **thetas):
    """Return the tiny config with these values of rope_theta: {place: value}, "top" for the top."""
    config = {key: value for key, value in TINY[family].items() if key != "rope_theta"}
    for place, theta in thetas.items():
        if place == "top":
            config["rope_theta"] = theta
            continue
        entry = config
        for key in place.split("."):
            entry[key] = dict(entry.get(key) or {}, rope_type="default")
            entry = entry[key]
        entry["rope_theta"] = theta
    return config


def theta_of(tmp_path, family, config):
    """Write a whole folder with this config -> the rope_theta of the model that is loaded."""
    generate(tmp_path, family)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return DLLM.from_pretrained(tmp_path).config.rope_theta


# ---- rope ----


@every_family
@pytest.mark.parametrize("place", ["top", *INNER])
def test_rope_theta_is_found_wherever_it_is_stated(family, place, tmp_path):
    assert theta_of(tmp_path, family, stating(family, **{place: 7e5})) == 7e5


@every_family
@pytest.mark.parametrize("place", INNER)
@pytest.mark.parametrize("top", [10000.0, 1])
def test_two_values_of_rope_theta_are_refused_and_both_are_named(family, place, top, tmp_path):
    config = stating(family, top=top, **{place: 1000000})
    said = sentence(theta_of, tmp_path, family, config, kind=ValueError)
    assert f"rope_theta = {top}" in said and f"{place}.rope_theta = 1000000" in said
    assert str(tmp_path / "config.json") in said


@every_family
def test_a_single_value_of_rope_theta_does_not_differ_from_itself(family, tmp_path):
    said = sentence(theta_of, tmp_path, family, stating(family, top=float("nan")), kind=ValueError)
    assert "rope_theta=nan must lie between" in said


@pytest.mark.parametrize("one", INNER)
@pytest.mark.parametrize("other", INNER)
def test_two_inner_places_must_agree_as_well(one, other, tmp_path):
    if one < other:
        config = stating("Dream", **{one: 1e4, other: 1e6})
        said = sentence(config_fields, tmp_path, config, kind=ValueError)
        assert "10000.0" in said and "1000000.0" in said
        config = stating("Dream", **{one: 1e6, other: 1000000})
        assert config_fields(tmp_path, config)["rope_theta"] == 1e6


@every_family
@pytest.mark.parametrize("place", INNER)
def test_equal_values_and_null_beside_a_value_are_one_statement(family, place, tmp_path):
    for top, inner in ((7e5, 700000), (None, 7e5), (7e5, None)):
        assert theta_of(tmp_path, family, stating(family, top=top, **{place: inner})) == 7e5


PLAIN = [{}, {"rope_type": "default"}, {"type": "default", "factor": None},
         {"rope_type": "default", "partial_rotary_factor": 1.0}, {"type": "default", "factor": 1.0}]
SCALED = [{"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0},
          {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "llama3", "factor": 8.0},
          {"type": "longrope", "short_factor": [1.0]}, {"factor": 2.0}, {"rope_type": 3},
          {"rope_type": "default", "mrope_section": [16, 24, 24]},
          {"full_attention": {"rope_type": "yarn"}}, "linear", 2.0, [1]]


@every_family
@pytest.mark.parametrize("entry", ["rope_scaling", "rope_parameters"])
def test_scaled_rope_is_refused_and_plain_rope_in_many_words_is_not(family, entry, tmp_path):
    given = config_fields(tmp_path, dict(TINY[family], mask_token_id=37, pad_token_id=36))
    for scaling in PLAIN:
        config = dict(TINY[family], mask_token_id=37, pad_token_id=36, **{entry: scaling})
        assert config_fields(tmp_path, config) == given
    for scaling in SCALED:
        config = dict(TINY[family], **{entry: scaling})
        said = sentence(config_fields, tmp_path, config, kind=ValueError)
        why = "it needs factor" if "'llama3'" in str(scaling) else "only plain rope"
        assert f"has {entry} = " in said and why in said, scaling


@pytest.mark.parametrize("change", [
    dict(partial_rotary_factor=0.5), dict(rope_local_base_freq=1e4), dict(rotary_pct=0.25),
    dict(rope_type="yarn"), dict(layer_types=["full_attention", "sliding_attention"]),
    dict(layer_types=5)])
def test_other_entries_that_ask_for_another_network_are_refused(change, tmp_path):
    [key] = change
    said = sentence(config_fields, tmp_path, dict(QWEN3, **change), kind=ValueError)
    assert f"config.json has {key} = " in said


# ---- sizes ----

NUMBERS = [float("nan"), float("inf"), -float("inf"), -1, -0.5, 1e300, 10 ** 30, True, "7", None,
           [7], {}]
NONSENSE = [(field.name, value) for field in fields(ModelConfig) for value in NUMBERS
            if (field.type, value) != (bool, True)]
NONSENSE += [(name, 0) for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head",
                                    "n_embd", "n_hidden", "norm_eps", "rope_theta")]
NONSENSE += [(name, value) for name in ("n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden",
                                        "vocab_size", "block_size", "head_dim")
             for value in (10 ** 9, 2 ** 31, 2 ** 63)]
NONSENSE += [("norm_eps", 1e-300), ("norm_eps", 1.0), ("rope_theta", 1e-300), ("rope_theta", 0.5),
             ("rope_theta", 1e16), ("head_dim", 7), ("mask_id", CONFIG.eos_id)]


@pytest.mark.parametrize("name, value", NONSENSE, ids=lambda x: repr(x)[:20])
def test_a_network_that_makes_no_sense_is_refused_by_the_field(name, value):
    assert f"{name}={value!r}" in sentence(replace, CONFIG, **{name: value}, kind=ValueError)


def test_a_file_with_absurd_sizes_is_one_sentence_at_once(tmp_path):
    make_model().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    began = time.process_time()
    for name, value in NONSENSE:
        (tmp_path / "config.json").write_text(json.dumps(dict(config, **{name: value})))
        said = sentence(DLLM.from_pretrained, tmp_path, kind=ValueError)
        assert "config.json" in said and len(said) < 400, said
    assert time.process_time() - began < 0.1 * len(NONSENSE)


@every_family
def test_sizes_that_the_weights_do_not_have_are_told_before_a_network_is_built(family, tmp_path):
    generate(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    n_layer, n_embd = ("n_layers", "d_model") if family == "llada" else ("num_hidden_layers",
                                                                         "hidden_size")
    began = time.process_time()
    for name, value in ((n_layer, 4), (n_layer, 1 << 24), (n_layer, 10 ** 9), (n_layer, 2 ** 63),
                        (n_embd, 10 ** 30), (n_embd, 1 << 24), (n_embd, 64)):
        (tmp_path / "config.json").write_text(json.dumps(dict(config, **{name: value})))
        said = sentence(DLLM.from_pretrained, tmp_path, kind=ValueError)
        assert str(value) in said and str(tmp_path) in said and len(said) < 400
    assert time.process_time() - began < 10


def test_products_of_sizes_that_no_computer_counts_are_one_sentence(tmp_path):
    make_model().save(tmp_path)
    huge = dict(asdict(CONFIG), n_embd=1 << 24, n_hidden=1 << 24, n_head=1 << 24, n_kv_head=1 << 24,
                head_dim=1 << 24, model_type="dllm-jepa")
    (tmp_path / "config.json").write_text(json.dumps(huge))
    assert str(tmp_path) in sentence(DLLM.from_pretrained, tmp_path, kind=ValueError)


@pytest.mark.parametrize("kind", [None, [], ["llada"], {}, {"llada": 1}, 3, True, "", "LLaDA"])
def test_a_model_type_that_is_none_is_named(kind, tmp_path):
    generate(tmp_path, "llada", model_type=kind)
    said = sentence(DLLM.from_pretrained, tmp_path, kind=ValueError)
    assert repr(kind) in said and str(tmp_path) in said and "llada" in said
