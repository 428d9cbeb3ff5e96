"""Laws of LoRA: nothing changes at the start, only adapters learn, the EMA is one of adapters."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import (CONFIG, IDS, as_batch, assert_resuming_changes_nothing, assert_same_step,
                     eight_rows, lines, make_model, run_ranks, seeded, sentence, sentence_of)
from jepa import DLLMJEPA, ema_update, make_target
from model import DLLM, PRESETS, ModelConfig, row_generators
from train import TrainConfig, main
from training.lora import LoRALinear, add_lora, check_base, merge

ALL = TrainConfig.lora_targets
GQA = replace(CONFIG, n_kv_head=2, qkv_bias=True, shift=True)


def adapted(config=CONFIG, rank=4, alpha=8.0, targets=ALL, trained=True):
    """A model with adapters; trained: as if they had been, so that they do something."""
    model = make_model(config)
    add_lora(model, rank, alpha, targets, seed=3)
    if trained:
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                p.data.normal_(0, 0.05, generator=seeded(len(name)))
    return model


def ids(B=2, T=12):
    return torch.randint(32, (B, T), generator=seeded(5))


# ---- the model ----


@pytest.mark.parametrize("config", [CONFIG, GQA, replace(CONFIG, tied_head=True)],
                         ids=["plain", "gqa with bias", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_step_0_the_model_is_unchanged_to_the_bit(config, dtype):
    model = make_model(config).to(dtype)
    model.compute_dtype = dtype
    before, names = model(ids()), dict(model.named_parameters())
    add_lora(model, 4, 8.0, ALL, seed=0)
    assert torch.equal(model(ids()), before)
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert p.dtype == torch.float32 and p.requires_grad
            assert p.any() == name.endswith("lora_a")
        else:                                           # the same tensor under the same name
            assert p is names[name] and not p.requires_grad


def test_an_adapter_adds_alpha_over_r_times_b_a_x():
    base = make_model(GQA).blocks[0].v_proj
    linear = LoRALinear(base, 4, 2.5, seeded())
    linear.lora_b.data.normal_(generator=seeded(1))
    x = torch.randn(3, 5, 32, generator=seeded(2))
    expected = base(x) + 2.5 * x @ linear.lora_a.T @ linear.lora_b.T
    torch.testing.assert_close(linear(x), expected)
    assert linear.lora_a.abs().max() <= 32 ** -0.5 and linear.lora_a.std() > 0.4 * 32 ** -0.5


def test_adapters_depend_on_their_seed_alone():
    def first(seed, global_seed):
        torch.manual_seed(global_seed)
        model = make_model()
        add_lora(model, 4, 8.0, ("q_proj",), seed)
        return model.blocks[1].q_proj.lora_a
    assert torch.equal(first(3, 0), first(3, 1)) and not torch.equal(first(3, 0), first(4, 0))


@pytest.mark.parametrize("config", [CONFIG, GQA, replace(CONFIG, tied_head=True)],
                         ids=["plain", "gqa with bias", "tied"])
def test_the_merged_model_computes_the_same_to_round_off(config):
    model = adapted(config)
    untouched = make_model(config)(ids())
    before = {name: p.clone() for name, p in model.named_parameters()}
    plain = merge(model)
    torch.testing.assert_close(plain(ids()), model(ids()), atol=1e-5, rtol=1e-5)
    assert (model(ids()) - untouched).abs().max() > 0.05
    assert plain.state_dict().keys() == make_model(config).state_dict().keys()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    if config.tied_head:
        assert plain.head.weight is plain.embed.weight


def test_merging_into_bf16_rounds_the_fp32_sum_once():
    model = adapted().bfloat16()
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    linear = model.blocks[0].q_proj
    exact = linear.weight.float() + 2.0 * linear.lora_b @ linear.lora_a
    assert torch.equal(merge(model).blocks[0].q_proj.weight, exact.bfloat16())


@pytest.mark.parametrize("rank, targets, n", [
    (16, ALL, 41_943_040), (32, ALL, 83_886_080), (8, ("q_proj", "v_proj"), 4_194_304)])
def test_the_number_of_trained_parameters_of_llada_8b(rank, targets, n):
    with torch.device("meta"):
        model = DLLM(ModelConfig(**PRESETS["llada-8b"]))
    add_lora(model, rank, 16.0, targets, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == n
    C, hidden, layers = 4096, 12288, 32
    if targets == ALL:
        assert n == layers * rank * (4 * (C + C) + 3 * (C + hidden))
    assert all(p.is_meta for p in model.parameters())


# ---- the objective ----


def test_the_target_shares_the_base_and_copies_adapters_only():
    model = adapted()
    target = make_target(model)
    online = dict(model.named_parameters())
    own = {name for name, p in target.named_parameters() if p is not online[name]}
    assert own == {name for name in online if "lora_" in name}
    for name in own:
        p = target.get_parameter(name)
        assert p.data_ptr() != online[name].data_ptr() and torch.equal(p, online[name])
    n_bytes = sum(target.get_parameter(name).nbytes for name in own)
    assert n_bytes == 4 * 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))   # fp32, 2 layers, rank 4
    assert target.head is None and not any(p.requires_grad for p in target.parameters())


@pytest.mark.parametrize("lambda_jepa", [0.0, 1.0])
def test_a_step_moves_adapters_and_predictor_and_the_update_the_targets_adapters(lambda_jepa):
    objective = DLLMJEPA(adapted(), lambda_jepa, ema_decay=0.9)
    before = {name: p.clone() for name, p in objective.state_dict().items()}
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    loss, parts = objective(*as_batch(eight_rows()), row_generators(0, 0, IDS))
    loss.backward()
    optimizer.step()
    objective.update_target()
    assert ("jepa" in parts) == (lambda_jepa > 0)
    for name, p in objective.state_dict().items():
        assert torch.equal(p, before[name]) == ("lora_" not in name
                                                and not name.startswith("predictor.")), name
    for name, p in objective.named_parameters():
        if name.startswith("target.") and "lora_" in name:
            online = objective.model.get_parameter(name.removeprefix("target."))
            torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * online)


def emas(history, decay):
    """History of (a, b) -> EMA of a, of b, of b a; covariance of b and a; spread of a and of b."""
    weights = [decay ** (len(history) - 1)]     # of the start
    weights += [(1 - decay) * decay ** (len(history) - 1 - i) for i in range(1, len(history))]
    assert sum(weights) == pytest.approx(1)
    def mean(values):
        return sum(w * value for w, value in zip(weights, values))
    a, b = (mean([pair[i] for pair in history]) for i in (0, 1))
    return (a, b, mean([bi @ ai for ai, bi in history]),
            mean([(bi - b) @ (ai - a) for ai, bi in history]),
            mean([(ai - a).norm() ** 2 for ai, _ in history]),
            mean([(bi - b).norm() ** 2 for _, bi in history]))


def test_the_ema_of_adapters_is_not_that_of_merged_weights_and_differs_by_their_covariance():
    """Nonzero, at most the product of the spreads of b and a, and below the EMA's own lag."""
    model, decay = adapted(trained=False), 0.9
    target = make_target(model)
    a, b = model.blocks[0].q_proj.lora_a, model.blocks[0].q_proj.lora_b
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    objective = DLLMJEPA(model, 0.0)
    history = [(a.detach().double(), b.detach().double())]
    for step in range(20):
        objective(*as_batch(eight_rows()), row_generators(0, step, IDS))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        ema_update(target, model, decay)
        history.append((a.detach().double(), b.detach().double()))
    ema_a, ema_b, ema_ba, covariance, spread_a, spread_b = emas(history, decay)

    theirs = target.blocks[0].q_proj
    torch.testing.assert_close(theirs.lora_a.double(), ema_a, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(theirs.lora_b.double(), ema_b, atol=1e-6, rtol=1e-5)
    difference = ema_ba - ema_b @ ema_a
    torch.testing.assert_close(difference, covariance)
    lag = (b.double() @ a.double() - ema_ba).norm()
    assert 0 < difference.norm() <= (spread_a * spread_b).sqrt()
    assert difference.norm() < 0.2 * lag


def test_to_first_order_the_two_emas_are_equal():
    """Ten times smaller steps: the lag shrinks ten times, the difference a hundred times."""
    g = seeded(2)
    start = torch.randn(4, 32, generator=g).double(), torch.randn(32, 4, generator=g).double()
    ways = [(torch.randn(4, 32, generator=g).double(), torch.randn(32, 4, generator=g).double())
            for _ in range(20)]
    def run(eps):
        history = [start]
        for way in ways:
            history.append(tuple(x + eps * dx for x, dx in zip(history[-1], way)))
        ema_a, ema_b, ema_ba, *_ = emas(history, 0.9)
        a, b = history[-1]
        return (b @ a - ema_ba).norm(), (ema_ba - ema_b @ ema_a).norm()
    (lag, difference), (small_lag, small_difference) = run(1e-3), run(1e-4)
    assert lag / small_lag == pytest.approx(10, rel=0.05)
    assert difference / small_difference == pytest.approx(100, rel=0.05)


# ---- the loop ----


@pytest.fixture
def lora_cfg(cfg, tmp_path):  # noqa: F811
    main(replace(cfg, out_dir=str(tmp_path / "base"), max_steps=2, lambda_jepa=0.0))
    return replace(cfg, init_from=str(tmp_path / "base"), tokenizer="", lora_rank=4,
                   lora_alpha=8.0, lr=1e-2)


def test_lora_6_steps_equal_3_and_resume_3_bit_for_bit(lora_cfg, tmp_path, monkeypatch):
    assert_resuming_changes_nothing(lora_cfg, tmp_path, monkeypatch)


def test_a_lora_checkpoint_is_the_merged_model_for_use_and_adapters_to_resume(lora_cfg, tmp_path):
    main(replace(lora_cfg, export_dir=str(tmp_path / "export")))
    [folder] = Path(lora_cfg.out_dir).glob("step_*")
    [base_folder] = Path(lora_cfg.init_from).glob("step_*")
    state = load_file(folder / "train_state.safetensors")
    assert all("lora_" in name or "predictor." in name for name in state)
    assert "target.blocks.0.q_proj.lora_b" in state and "model.blocks.0.q_proj.lora_b" in state

    used, base = DLLM.from_checkpoint(folder), DLLM.from_checkpoint(base_folder)
    rebuilt = DLLM.from_checkpoint(base_folder)
    add_lora(rebuilt, 4, 8.0, ALL, seed=0)
    rebuilt.load_state_dict({name.removeprefix("model."): p for name, p in state.items()
                             if name.startswith("model.")}, strict=False)
    x = torch.randint(60, (2, 9), generator=seeded())
    torch.testing.assert_close(used(x), rebuilt(x), atol=1e-4, rtol=1e-4)
    for name, p in base.named_parameters():             # what has no adapter is the base's
        is_adapted = name.split(".")[-2] in ALL
        assert torch.equal(p, used.get_parameter(name)) != is_adapted, name
    exported = DLLM.from_checkpoint(tmp_path / "export", dtype=torch.bfloat16)
    for name, p in used.named_parameters():
        assert torch.equal(exported.get_parameter(name), p.bfloat16()), name
    held_out = [line["held_out"]["gsm8k"]["0.5"] for line in lines(lora_cfg.out_dir)
                if "held_out" in line]
    assert held_out[-1] < held_out[0]                   # and they learn something
    assert json.loads((folder / "config.json").read_text())["n_layer"] == 4


def test_lora_is_resumed_on_its_own_base_and_scale_only(lora_cfg, cfg, monkeypatch,  # noqa: F811
                                                        tmp_path):
    main(lora_cfg)
    main(replace(cfg, out_dir=str(tmp_path / "other"), seed=7, max_steps=1))
    resumed = replace(lora_cfg, resume=True)
    main(resumed)
    other = str(tmp_path / "other")
    for wrong in {"init_from": other}, {"lora_alpha": 9.0}, {"lora_rank": 5}:
        said = sentence_of(monkeypatch, replace(resumed, **wrong))
        [(name, value)] = wrong.items()
        assert f"{name}={value!r}" in said and f"{name}={getattr(resumed, name)!r}" in said
    shutil.rmtree(lora_cfg.init_from)                   # other weights in the folder of the base
    shutil.copytree(other, lora_cfg.init_from)
    assert "init_weights=" in sentence_of(monkeypatch, resumed)


@pytest.mark.slow
def test_lora_on_two_processes_equals_one(lora_cfg, tmp_path):
    one = replace(lora_cfg, max_steps=1, lambda_jepa=2.0)
    two = replace(one, out_dir=str(tmp_path / "two"))
    main(one)
    run_ranks(two)
    assert_same_step(one, two)


@pytest.mark.parametrize("options, words", [
    (["--lora_targets=q_proj,head"], "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj"),
    (["--lora_targets="], "lora_targets is empty"), (["--lora_alpha=0"], "switches the adapters"),
    (["--lora_rank=0", "--lora_targets=endless"], "'endless'; there are q_proj, k_proj"),
    (["--lora_rank=-1"], "must not be negative"),
    (["--optimizer=lean"], "LoRA"),
    (["--init_from=", "--tokenizer=toy"], "init_from")])
def test_a_bad_lora_setting_stops_with_one_sentence(lora_cfg, monkeypatch, options, words):
    assert words in sentence_of(monkeypatch, lora_cfg, *options)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_blocks_change_no_adapters_gradient(recompute):
    """Not in the first block either, whose input has no gradient: the embedding is frozen."""
    grads = []
    for setting in ("none", recompute):
        model = adapted()
        model.checkpoint_activations = setting
        loss, _ = DLLMJEPA(model, 0.0)(*as_batch(eight_rows()), row_generators(0, 0, IDS))
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(grad is not None and grad.any() for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-7, rtol=1e-4, msg=name)


def test_a_base_or_scale_that_is_a_little_off_is_noticed(tmp_path):
    model = adapted()
    merge(model).save(tmp_path)
    check_base(model, tmp_path)
    linear = model.blocks[0].q_proj
    for name, change in (("scale", 1.01), ("weight", 1.001)):
        before = getattr(linear, name)
        after = before * change
        setattr(linear, name, after if name == "scale" else torch.nn.Parameter(after))
        assert "is not this base" in sentence(check_base, model, tmp_path)
        setattr(linear, name, before)
    check_base(model, tmp_path)
