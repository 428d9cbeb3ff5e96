"""Laws of the controls: each differs from the paper's method where it says so, and only there."""
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from helpers import (CONFIG, IDS, as_batch, assert_resuming_changes_nothing, assert_same_step,
                     eight_rows, flops_of, lines, loss_lines, make_model, run_ranks, seeded,
                     sentence_of, step, tensors, wide_batch, without_clock)
from jepa import DLLMJEPA, cosine_distance, ema_update, pool
from model import DLLM, PRESETS, ModelConfig, diffusion_loss, forward_process, row_generators
from pretrained.tokenizer import load_tokenizer
from tasks import gsm8k
from tasks.common import batch_at, collate, tokenize
from train import TrainConfig, main
from training.controls import PAPER, Anchor, Control, has_control, make_control
from training.study import base_weights

ARMS = [dict(target="online"), dict(target="frozen"), dict(target="shuffled"), dict(target="mean"),
        dict(target="random"), dict(masks="nested"), dict(pool="answer_visible"),
        dict(pool="masked"), dict(pool="all_real"), dict(pool_layer=1), dict(pred_width=8),
        dict(pred_lr=0.0), dict(pred_lr=10.0), dict(ema_dtype="bfloat16"),
        dict(objective="consistency"), dict(objective="two_gradients"), dict(objective="infonce")]
NAMES = ["-".join(f"{k}={v}" for k, v in arm.items()) for arm in ARMS]


def make_arm(model=None, lambda_jepa=1.0, t_ctx=0.2, t_tgt=0.7, n_pred_layer=2, seed=0, **settings):
    """The objective that train.py would make of a TrainConfig with these settings."""
    paper = {name: settings.pop(name) for name in ("diffusion_t", "mask_scope", "loss_form",
                                                   "ema_decay") if name in settings}
    cfg = TrainConfig(lambda_jepa=lambda_jepa, **settings)
    paper = dict(lambda_jepa=lambda_jepa, t_ctx=t_ctx, t_tgt=t_tgt, n_pred_layer=n_pred_layer,
                 seed=seed, **{"ema_decay": cfg.ema_decay, **paper})
    return make_control(model or make_model(), cfg, paper)


def moved_target(objective):
    """A target that is not the model."""
    dtype = objective.target.norm.weight.dtype
    ema_update(objective.target, make_model(seed=9), 0.5, lambda p: p.to(dtype))
    return objective


@pytest.fixture(scope="module")
def base(data_dir, tmp_path_factory):
    """A checkpoint to fine-tune."""
    out_dir = tmp_path_factory.mktemp("base") / "run"
    main(TrainConfig(out_dir=str(out_dir), tokenizer="toy", task="gsm8k", data_dir=str(data_dir),
                     max_length=64, batch_size=8, max_steps=2, lr=1e-3, eval_rows=8, device="cpu",
                     lambda_jepa=0.0))
    return out_dir


def inputs(rows=slice(0, 8), number=0):
    return (*as_batch(eight_rows()[rows]), row_generators(0, number, IDS[rows]))


# ----------------------------------------------------------------------------------------------
# the default


def test_with_the_default_settings_no_control_is_made():
    assert not has_control(TrainConfig()) and not has_control(TrainConfig(lambda_jepa=0.0))
    for arm in ARMS:
        assert has_control(TrainConfig(**arm))
        assert not has_control(TrainConfig(lambda_jepa=0.0, **arm))     # plain is plain
    assert has_control(TrainConfig(lambda_jepa=0.0, objective="blockwise"))     # but for its masks
    assert all(getattr(TrainConfig(), name) == value for name, value in PAPER.items())


@pytest.mark.parametrize("lambda_jepa", [0.0, 0.7])
def test_the_default_is_the_papers_method_written_out_to_the_bit(cfg, lambda_jepa):
    """The loop, masks, objective and EMA by hand: what is new has changed no bit of what it was."""
    cfg = replace(cfg, seed=5, lambda_jepa=lambda_jepa, max_steps=4)
    main(cfg)
    tok = load_tokenizer("toy")
    model = DLLM(ModelConfig(tok.n_vocab, tok.mask_id, tok.eos_id, **PRESETS["tiny"]))
    model.init_weights(seeded(5))
    start = DLLMJEPA(model, seed=5)
    target, predictor = start.target, start.predictor
    ours = dict(model.named_parameters())
    if lambda_jepa:
        ours |= {f"predictor.{name}": p for name, p in predictor.named_parameters()}
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in ours.values() if (p.ndim > 1) == is_matrix]}
         for is_matrix in (True, False)], betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    rows, losses = tokenize(gsm8k.load("train", cfg.data_dir), tok, 64), []
    for i in range(4):
        batch, fill = batch_at(i, rows, 8, 5)
        x0, maskable, is_real = collate(batch, fill, 64, tok.eos_id)
        light = row_generators(5, i, [row.example_id for row in batch])
        heavy = [torch.Generator().manual_seed(g.initial_seed() ^ 1) for g in light]
        t_ctx, t_tgt = torch.full((8,), 0.2), torch.full((8,), 0.7)
        is_content = is_real & (x0 != tok.eos_id)
        xt_ctx, masked_ctx = forward_process(x0, t_ctx, maskable, tok.mask_id, light, True)
        xt_tgt, masked_tgt = forward_process(x0, t_tgt, maskable, tok.mask_id, heavy)
        with torch.no_grad():
            z_tgt = pool(target.encode(xt_tgt, is_real), is_content & ~masked_tgt)
        h = model.encode(xt_ctx, is_real)
        loss = diffusion_loss(model.nll(h, x0, masked_ctx), masked_ctx, maskable, t_ctx)
        if lambda_jepa:
            z_hat = predictor(pool(h, is_content & ~masked_ctx))
            loss = loss + lambda_jepa * cosine_distance(z_hat, z_tgt)
        loss.backward()
        losses.append(float(f"{loss.item():.6g}"))
        torch.nn.utils.clip_grad_norm_(ours.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1.0 if i == 0 else (1 + math.cos(math.pi * (i - 1) / 3)) / 2)
        optimizer.step()
        optimizer.zero_grad()
        ema_update(target, model, 0.996)
    assert [line["loss"] for line in lines(cfg.out_dir) if "loss" in line] == losses
    found = tensors(cfg.out_dir)
    if lambda_jepa:
        ours |= {f"target.{name}": p for name, p in target.named_parameters()}
    assert {name for name in found if not name.startswith("adam.")} == ours.keys()
    for name, p in ours.items():
        assert torch.equal(found[name], p), name


def test_a_control_with_the_papers_settings_is_the_papers_method_to_the_bit():
    results = []
    for objective in (DLLMJEPA(make_model()), make_arm()):
        moved_target(objective)
        results.append(step(objective, as_batch(eight_rows())))
    assert type(objective) is Control
    for one, two in zip(*[({"loss": loss}, parts, grads) for loss, parts, grads in results]):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ----------------------------------------------------------------------------------------------
# every arm


@pytest.mark.parametrize("arm", ARMS, ids=NAMES)
def test_every_arm_has_the_papers_context_view_and_another_gradient(arm):
    batch, results = as_batch(eight_rows()), []
    for objective in (DLLMJEPA(make_model()), make_arm(**arm)):
        if hasattr(objective, "target"):
            moved_target(objective).update_target()
        results.append(step(objective, batch))
    assert torch.equal(results[0][1]["diffusion"], results[1][1]["diffusion"])
    ours, theirs = ({name: grads[name] for name in grads if name.startswith("model.")}
                    for _, _, grads in results)
    same = all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert same == ("pred_lr" in arm)           # which is the predictor's alone


@pytest.mark.parametrize("arm", ARMS, ids=NAMES)
def test_no_gradient_reaches_a_target_and_all_that_is_trained_gets_one(arm):
    objective = make_arm(**arm)
    _, _, grads = step(objective, as_batch(eight_rows()))
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert grads.keys() == trained and not any(name.startswith("target.") for name in trained)
    assert all(grad.isfinite().all() for grad in grads.values())
    z_tgt = objective.embed_targets([inputs()])[0]
    assert z_tgt is None or not z_tgt.requires_grad


@pytest.mark.parametrize("arm", ARMS, ids=NAMES)
def test_every_arm_trains_resumes_and_its_log_has_its_numbers(cfg, tmp_path, arm):
    cfg = replace(cfg, max_steps=4, save_every=2, micro_batch_size=4, t_tgt=0.5, **arm)
    main(replace(cfg, keep=9))
    found = loss_lines(cfg.out_dir)
    assert {"skill", "rank", "diversity", "retrieval", "online_moved"} <= found[-1].keys()
    assert ("consistency" in found[-1]) == (arm.get("objective") == "consistency")
    assert ("ema_moved" in found[-1]) == (arm.get("objective") != "two_gradients")
    other = replace(cfg, out_dir=str(tmp_path / "other"))
    Path(other.out_dir).mkdir()
    (Path(cfg.out_dir) / "step_0000002").rename(Path(other.out_dir) / "step_0000002")
    (Path(other.out_dir) / "log.jsonl").write_text((Path(cfg.out_dir) / "log.jsonl").read_text())
    main(replace(other, resume=True))
    whole, resumed = tensors(cfg.out_dir), tensors(other.out_dir)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert without_clock(cfg.out_dir) == without_clock(other.out_dir)


@pytest.mark.parametrize("arm", [dict(target="shuffled"), dict(target="mean"),
                                 dict(target="random"), dict(masks="nested"),
                                 dict(pool_layer=1), dict(objective="two_gradients"),
                                 dict(objective="infonce"), dict(objective="consistency"),
                                 dict(objective="blockwise", active_block=3, lambda_jepa=0.0,
                                      mask_scope="response")],
                         ids=str)
def test_accumulation_changes_no_arm(cfg, tmp_path, arm):
    """The row before a row is that of the batch, whatever micro-batch it lies in."""
    arm = dict(lambda_jepa=2.0, mask_scope="all", t_ctx=0.5) | arm
    cfg = replace(cfg, max_steps=1, **arm)
    main(cfg)
    small = replace(cfg, micro_batch_size=2, out_dir=str(tmp_path / "small"))
    main(small)
    if cfg.objective != "consistency":
        return assert_same_step(cfg, small)
    [one], [two] = (loss_lines(c.out_dir) for c in (cfg, small))
    assert one["diffusion"] == pytest.approx(two["diffusion"], rel=1e-5)
    # the other term is a mean over the tokens of a micro-batch, whose number differs a little
    assert 0 < one["consistency"] == pytest.approx(two["consistency"], rel=0.1)
    assert one["consistency"] != pytest.approx(two["consistency"], rel=1e-5)


@pytest.mark.parametrize("tuning", [dict(lora_rank=2), dict(optimizer="lean"),
                                    dict(pack=True, eos_fill=False)], ids=str)
@pytest.mark.parametrize("arm", [dict(target="shuffled"), dict(pool_layer=1),
                                 dict(ema_dtype="bfloat16"), dict(objective="consistency"),
                                 dict(objective="two_gradients")], ids=str)
def test_arms_go_with_adapters_half_weights_and_packed_rows(base, cfg, tmp_path, arm, tuning):
    cfg = replace(cfg, init_from=str(base), tokenizer="", max_steps=2, save_every=1, keep=9, seed=3,
                  **arm, **tuning)
    main(cfg)
    whole = tensors(Path(cfg.out_dir) / "step_0000002")
    shutil.rmtree(Path(cfg.out_dir) / "step_0000002")
    found = without_clock(cfg.out_dir)
    main(replace(cfg, resume=True))
    resumed = tensors(Path(cfg.out_dir) / "step_0000002")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert without_clock(cfg.out_dir) == found


@pytest.mark.slow
@pytest.mark.parametrize("arm", [dict(target="shuffled"), dict(target="mean"),
                                 dict(target="random"), dict(objective="two_gradients"),
                                 dict(objective="infonce"), dict(pool_layer=2),
                                 dict(pred_lr=0.0), dict(masks="nested")], ids=str)
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_change_no_arm_and_nor_does_sharding(cfg, tmp_path, arm, shard):
    cfg = replace(cfg, max_steps=1, lambda_jepa=2.0, micro_batch_size=2, **arm)
    two = replace(cfg, shard=shard, out_dir=str(tmp_path / "two"))
    run_ranks(two)
    main(cfg)
    one, other = (loss_lines(c.out_dir)[0] for c in (cfg, two))
    assert one.keys() == other.keys()
    for name in one.keys() - {"ms", "seconds", "corr_same_rate"}:   # of the first rows of each rank
        sampled = name in ("online_moved", "ema_moved", "pred_norm", "pred_moved")
        rel = 0.05 if sampled else 2e-3         # of other entries, where a rank has a part
        assert one[name] == pytest.approx(other[name], rel=rel, abs=1e-5), name
    if not shard:
        assert_same_step(cfg, two)


# ----------------------------------------------------------------------------------------------
# targets


def test_online_is_the_models_own_embedding_without_gradient_and_the_ema_with_decay_0():
    objective, by_decay = make_arm(target="online"), DLLMJEPA(make_model(), ema_decay=0.0)
    for one in (objective, by_decay):
        for p in one.model.parameters():
            p.data += 0.01 * torch.randn(p.shape, generator=seeded(p.numel()))
        one.update_target()
    xt_tgt, is_masked = objective.target_view(*as_batch(eight_rows())[:2],
                                              row_generators(0, 0, IDS))
    x0, maskable, is_real = as_batch(eight_rows())
    own = pool(objective.model.encode(xt_tgt, is_real), is_real & (x0 != 30) & ~is_masked)
    [z_tgt] = objective.embed_targets([inputs()])
    assert torch.equal(z_tgt, own) and torch.equal(z_tgt, by_decay.embed_targets([inputs()])[0])


def test_a_frozen_target_never_moves(cfg):
    main(replace(cfg, target="frozen"))
    found = tensors(cfg.out_dir)
    model = DLLM(ModelConfig(found["embed.weight"].shape[0], 0, 1, **PRESETS["tiny"]))
    model.init_weights(seeded(42))
    for name, p in model.named_parameters():
        if not name.startswith("head."):
            assert torch.equal(found[f"target.{name}"], p) and not torch.equal(found[name], p)
    assert all(line["ema_moved"] == 0 for line in loss_lines(cfg.out_dir))


def test_shuffled_gives_each_row_the_target_of_the_row_before_it():
    [own] = moved_target(make_arm(target="ema")).embed_targets([inputs()])
    [shuffled] = moved_target(make_arm(target="shuffled")).embed_targets([inputs()])
    assert torch.equal(shuffled, own[[7, 0, 1, 2, 3, 4, 5, 6]])
    # row i of the batch is dealt to micro-batch i % 4
    dealt = moved_target(make_arm(target="shuffled")).embed_targets(
        [inputs(slice(i, None, 4)) for i in range(4)])
    for i in range(4):
        torch.testing.assert_close(dealt[i], shuffled[i::4])


def test_mean_gives_every_row_the_mean():
    [own] = moved_target(make_arm(target="ema")).embed_targets([inputs()])
    [mean] = moved_target(make_arm(target="mean")).embed_targets([inputs()])
    assert all(torch.equal(z, mean[0]) for z in mean)
    torch.testing.assert_close(mean[0], own.mean(dim=0))


def test_random_depends_on_seed_and_example_alone():
    [z] = make_arm(target="random").embed_targets([inputs()])
    assert z.shape == (8, 32) and z.unique(dim=0).shape == (8, 32)
    torch.testing.assert_close(z, F.layer_norm(z, (32,)), atol=1e-4, rtol=1e-4)
    [same] = make_arm(make_model(seed=3), target="random", mask_scope="all").embed_targets(
        [inputs(number=7)])
    assert torch.equal(z, same)                 # another model, step, scope: the same
    for i in range(8):                          # other neighbours, another padding: the same
        assert torch.equal(make_arm(target="random").embed_targets([inputs(slice(i, i + 1))])[0],
                           z[i:i + 1])
    [other] = make_arm(target="random", seed=1).embed_targets([inputs()])
    assert not torch.isclose(z, other).all(dim=1).any()


# ----------------------------------------------------------------------------------------------
# views


@pytest.mark.parametrize("diffusion_t", ["context", "uniform"])
@pytest.mark.parametrize("loss_form", ["masked_mean", "unweighted"])
@pytest.mark.parametrize("t_ctx, t_tgt", [(0.2, 0.7), (0.7, 0.2), (0.3, 0.3), (0.01, 0.02)])
def test_nested_masks_are_subsets_and_at_equal_rates_the_same(t_ctx, t_tgt, loss_form, diffusion_t):
    x0, maskable, _ = wide_batch(B=60, answer=12)
    objective = make_arm(masks="nested", t_ctx=t_ctx, t_tgt=t_tgt, loss_form=loss_form,
                         diffusion_t=diffusion_t)
    generators = row_generators(0, 0, range(60))
    again = row_generators(0, 0, range(60))
    t, _, context = objective.context_view(x0, maskable, generators)
    _, target = objective.target_view(x0, maskable, generators)
    assert torch.equal(context, DLLMJEPA(make_model(), t_ctx=t_ctx, diffusion_t=diffusion_t,
                                         loss_form=loss_form).context_view(x0, maskable, again)[2])
    lighter, heavier = torch.where((t <= t_tgt)[:, None], context, target), torch.where(
        (t <= t_tgt)[:, None], target, context)
    assert not (lighter & ~heavier).any()
    same = torch.equal(lighter, heavier)
    assert same == (t_ctx == t_tgt and diffusion_t == "context" or (heavier.sum(1) == 1).all())
    independent = make_arm(t_ctx=t_ctx, t_tgt=t_tgt).target_view(x0, maskable, generators)[1]
    assert t_tgt < 0.1 or not torch.equal(independent, target)


def test_rates_may_be_the_same_or_reversed():
    x0, maskable, _ = wide_batch(B=200)
    for t_ctx, t_tgt in ((0.7, 0.2), (0.4, 0.4)):
        objective = DLLMJEPA(make_model(), t_ctx=t_ctx, t_tgt=t_tgt)
        generators = row_generators(0, 0, range(200))
        for t, is_masked in ((t_ctx, objective.context_view(x0, maskable, generators)[2]),
                             (t_tgt, objective.target_view(x0, maskable, generators)[1])):
            n = maskable.sum()
            assert (is_masked.sum() / n - t).abs() < 4 * (t * (1 - t) / n) ** 0.5


def test_the_pool_sets_are_what_they_are_called():
    #                          prompt    answer     fill  padding
    maskable = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 0]]).bool()
    is_content = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]]).bool()
    is_masked = torch.tensor([[0, 0, 0, 1, 0, 1, 1, 0, 0]]).bool()
    for kind, expected in {"visible": [1, 1, 1, 0, 1, 0, 0, 0, 0],
                           "answer_visible": [0, 0, 0, 0, 1, 0, 0, 0, 0],
                           "masked": [0, 0, 0, 1, 0, 1, 0, 0, 0],
                           "all_real": [1, 1, 1, 1, 1, 1, 0, 0, 0]}.items():
        one_hot = torch.eye(9)[None]                            # (B, T, C): their mean shows which
        mean = make_arm(pool=kind).summary(one_hot, is_masked, maskable, is_content)
        assert (mean > 0).tolist() == [[bool(x) for x in expected]], kind


@pytest.mark.parametrize("kind", ["answer_visible", "masked", "all_real"])
def test_both_views_are_pooled_over_the_set(kind):
    x0, maskable, is_real = as_batch(eight_rows())
    objective = moved_target(make_arm(pool=kind))
    _, xt_ctx, masked_ctx = objective.context_view(x0, maskable, row_generators(0, 0, IDS))
    xt_tgt, masked_tgt = objective.target_view(x0, maskable, row_generators(0, 0, IDS))
    objective(*inputs())
    for network, xt, is_masked, found in (
            (objective.model, xt_ctx, masked_ctx, F.layer_norm(objective.trace["mean"], (32,))),
            (objective.target, xt_tgt, masked_tgt, objective.trace["z_tgt"])):
        where = is_real & (x0 != 30) & {"answer_visible": maskable & ~is_masked,
                                        "masked": is_masked, "all_real": is_real}[kind]
        torch.testing.assert_close(found, pool(network.encode(xt, is_real), where).detach())


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_pool_layer_l_embeds_what_a_model_of_l_blocks_would_give(pack, recompute):
    for layer in (1, 2):
        model = make_model()
        model.pack, model.checkpoint_activations = pack, recompute
        objective, short = make_arm(model, pool_layer=layer), make_model()
        moved_target(objective)
        short.blocks = short.blocks[:layer]
        x0, maskable, is_real = as_batch(eight_rows())
        _, xt_ctx, masked_ctx = objective.context_view(x0, maskable, row_generators(0, 0, IDS))
        loss, parts, grads = step(objective, as_batch(eight_rows()))
        expected = pool(short.encode(xt_ctx, is_real), is_real & (x0 != 30) & ~masked_ctx)
        torch.testing.assert_close(F.layer_norm(objective.trace["mean"], (32,)), expected.detach())
        assert len(objective.target.blocks) == layer
        own = pool(objective.target.encode(*(objective.target_view(
            x0, maskable, row_generators(0, 0, IDS))[0], is_real)), is_real & (x0 != 30)
            & ~objective.target_view(x0, maskable, row_generators(0, 0, IDS))[1])
        torch.testing.assert_close(objective.trace["z_tgt"], own)
        # and it is the gradient of that: a direct computation without hooks agrees
        direct = make_model()
        direct.blocks, every = direct.blocks[:layer], direct.blocks
        z_hat = objective.predictor(pool(direct.encode(xt_ctx, is_real),
                                         is_real & (x0 != 30) & ~masked_ctx))
        direct.blocks = every
        h = direct.encode(xt_ctx, is_real)
        diffusion = diffusion_loss(direct.nll(h, x0, masked_ctx), masked_ctx, maskable,
                                   torch.full((8,), 0.2))
        (diffusion + cosine_distance(z_hat, own)).backward()
        for name, p in direct.named_parameters():
            torch.testing.assert_close(grads[f"model.{name}"], p.grad, atol=1e-6, rtol=1e-4)


def test_pool_layer_of_the_last_block_is_the_default_to_the_bit():
    results = [step(moved_target(objective), as_batch(eight_rows()))
               for objective in (DLLMJEPA(make_model()), make_arm(pool_layer=2))]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][2][name], grad) for name, grad in results[1][2].items())


# ----------------------------------------------------------------------------------------------
# the predictor


def test_a_frozen_predictor_keeps_its_weights_and_a_rate_scales_its_steps_alone(cfg, tmp_path):
    found, cfg = {}, replace(cfg, max_steps=1, weight_decay=0.1)
    for rate in (0.0, 1.0, 3.0):
        main(replace(cfg, pred_lr=rate, out_dir=str(tmp_path / str(rate))))
        found[rate] = tensors(tmp_path / str(rate))
    name = "predictor.blocks.0.up_proj.weight"
    start = DLLMJEPA(DLLM(ModelConfig(found[1.0]["embed.weight"].shape[0], 0, 1,
                                      **PRESETS["tiny"])), seed=42).predictor
    for key, p in start.named_parameters():
        assert torch.equal(found[0.0][f"predictor.{key}"], p)
    assert not any(key.startswith("adam.") and "predictor" in key for key in found[0.0])
    moved = [found[rate][name] - found[0.0][name] for rate in (1.0, 3.0)]
    torch.testing.assert_close(moved[1], 3 * moved[0], atol=1e-6, rtol=1e-3)
    assert torch.equal(found[1.0]["blocks.0.q_proj.weight"], found[3.0]["blocks.0.q_proj.weight"])


def test_the_bottleneck_is_as_wide_as_it_says():
    objective = make_arm(pred_width=8, n_pred_layer=3)
    shapes = {name: tuple(p.shape) for name, p in objective.predictor.named_parameters()}
    assert shapes["down.weight"] == (8, 32) and shapes["up.weight"] == (32, 8)
    assert shapes["inner.blocks.2.up_proj.weight"] == (32, 8) and "inner.blocks.3" not in shapes
    z = torch.randn(5, 32, generator=seeded())
    assert objective.predictor(z).shape == (5, 32)
    assert torch.linalg.matrix_rank(objective.predictor(torch.randn(99, 32)) -
                                    objective.predictor.up.bias) <= 8
    again = make_arm(make_model(seed=4), pred_width=8, n_pred_layer=3).predictor.state_dict()
    assert all(torch.equal(p, again[name])
               for name, p in objective.predictor.state_dict().items())     # of its seed alone


# ----------------------------------------------------------------------------------------------
# the EMA in bf16


def test_an_ema_in_bf16_stalls_where_one_in_fp32_moves():
    moved = {}
    for dtype in ("float32", "bfloat16"):
        model = make_model()
        for p in model.parameters():
            p.data = p.data.bfloat16().float()
        objective = make_arm(model, ema_dtype=dtype)
        before = {name: p.clone() for name, p in objective.target.named_parameters()}
        assert all(p.dtype == getattr(torch, dtype) for p in before.values())
        for _ in range(50):                     # steps of lr 1e-5 in one direction
            for p in model.parameters():
                p.data += 1e-5
            objective.update_target()
        assert all(p.dtype == getattr(torch, dtype) for p in objective.target.parameters())
        moved[dtype] = sum((p.float() - before[name].float()).square().sum()
                           for name, p in objective.target.named_parameters()).sqrt()
    assert moved["bfloat16"] < moved["float32"] / 4


# ----------------------------------------------------------------------------------------------
# other objectives


def test_consistency_is_the_divergence_of_two_predictions_and_has_no_predictor():
    objective = moved_target(make_arm(objective="consistency", lambda_jepa=0.7, t_ctx=0.5))
    assert not list(objective.predictor.parameters())
    x0, maskable, is_real = as_batch(eight_rows())
    t, xt_ctx, masked_ctx = objective.context_view(x0, maskable, row_generators(0, 0, IDS))
    xt_tgt, masked_tgt = objective.target_view(x0, maskable, row_generators(0, 0, IDS))
    loss, parts, grads = step(objective, as_batch(eight_rows()))
    model, target = make_model(), objective.target
    h = model.encode(xt_ctx, is_real)
    logits = model.unembed(h)
    with torch.no_grad():
        p_tgt = model.unembed(target.encode(xt_tgt, is_real)).softmax(-1)
    kl = (p_tgt * (p_tgt.log() - logits.log_softmax(-1))).sum(-1)           # (B, T)
    kl = kl[masked_ctx & masked_tgt].mean()
    diffusion = diffusion_loss(model.nll(h, x0, masked_ctx), masked_ctx, maskable, t)
    (diffusion + 0.7 * kl).backward()
    torch.testing.assert_close(loss, diffusion + 0.7 * kl)
    torch.testing.assert_close(parts["consistency"], kl.detach())
    assert kl > 1e-3                            # large enough to be compared
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[f"model.{name}"], p.grad, atol=1e-6, rtol=1e-4)


def test_consistency_without_a_token_masked_in_both_is_0_with_finite_gradients():
    objective = make_arm(objective="consistency", t_ctx=1e-6, t_tgt=1e-6)
    loss, parts, grads = step(objective, as_batch(eight_rows()))
    assert parts["consistency"] == 0 and torch.equal(loss.detach(), parts["diffusion"])
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("n_pred_layer", [0, 2])
def test_two_gradients_are_those_of_prompt_and_answer_each_seen_alone(n_pred_layer):
    objective = make_arm(objective="two_gradients", lambda_jepa=0.7, n_pred_layer=n_pred_layer)
    assert not hasattr(objective, "target")
    x0, maskable, is_real = as_batch(eight_rows())
    t, xt_ctx, masked_ctx = objective.context_view(x0, maskable, row_generators(0, 0, IDS))
    loss, parts, grads = step(objective, as_batch(eight_rows()))
    model, is_content = make_model(), is_real & (x0 != 30)
    h = model.encode(xt_ctx, is_real)
    diffusion = diffusion_loss(model.nll(h, x0, masked_ctx), masked_ctx, maskable, t)
    # each part alone: the other is padding, which nothing attends to
    z_prompt = pool(model.encode(x0, is_real & ~maskable), is_content & ~maskable)
    z_answer = pool(model.encode(x0, is_real & maskable), is_content & maskable)
    distance = 1 - F.cosine_similarity(objective.predictor(z_prompt), z_answer).mean()
    (diffusion + 0.7 * distance).backward()
    torch.testing.assert_close(loss, diffusion + 0.7 * distance)
    torch.testing.assert_close(parts["jepa"], distance.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[f"model.{name}"], p.grad, atol=1e-6, rtol=1e-4)


def test_infonce_is_the_cross_entropy_over_the_rows_of_the_whole_batch():
    objective = moved_target(make_arm(objective="infonce", tau=0.2, lambda_jepa=0.7))
    _, parts, grads = step(objective, as_batch(eight_rows()))
    [z_tgt] = objective.embed_targets([inputs()])
    plain = moved_target(make_arm(lambda_jepa=0.7))
    plain(*inputs())
    cosines = F.normalize(plain.trace["z_hat"]) @ F.normalize(z_tgt).T      # (B, B)
    expected = F.cross_entropy(cosines / 0.2, torch.arange(8))
    torch.testing.assert_close(parts["jepa"], expected)
    # row i is dealt to micro-batch i % 4: each is set against all rows of the step, not its own
    objective.zero_grad()
    batches = [inputs(slice(i, None, 4)) for i in range(4)]
    found = []
    for batch, own in zip(batches, objective.embed_targets(batches)):
        loss, some = objective(*batch, own)
        (loss / 4).backward()
        found.append(some["jepa"])
    torch.testing.assert_close(torch.stack(found).mean(), expected)
    for name, p in objective.predictor.named_parameters():
        torch.testing.assert_close(p.grad, grads[f"predictor.{name}"], atol=1e-6, rtol=1e-4)


def test_infonce_is_at_least_log_b_where_the_input_is_ignored_and_0_where_rows_are_known():
    objective = make_arm(objective="infonce", n_pred_layer=0)
    [z_tgt] = objective.embed_targets([inputs()])
    for constant in (z_tgt.mean(dim=0), z_tgt[0], -z_tgt[3]):
        objective.predictor.forward = lambda z: constant.expand_as(z)
        assert objective(*inputs(), z_tgt)[1]["jepa"] >= math.log(8)
    objective.predictor.forward, objective.tau = (lambda z: z_tgt), 1e-3
    assert objective(*inputs(), z_tgt)[1]["jepa"] < 1e-3


# ----------------------------------------------------------------------------------------------
# blockwise


def blockwise(active_block, **settings):
    return make_arm(objective="blockwise", active_block=active_block, lambda_jepa=0.0, **settings)


@pytest.mark.parametrize("loss_form", ["masked_mean", "llada_sft", "unweighted"])
@pytest.mark.parametrize("diffusion_t", ["context", "uniform"])
def test_blockwise_with_one_block_that_covers_the_answer_is_plain_to_the_bit(loss_form,
                                                                            diffusion_t):
    settings = dict(loss_form=loss_form, diffusion_t=diffusion_t, lambda_jepa=0.0)
    one, two = (step(objective, as_batch(eight_rows())) for objective in (
        DLLMJEPA(make_model(), **settings), blockwise(99, loss_form=loss_form,
                                                      diffusion_t=diffusion_t)))
    assert torch.equal(one[0], two[0]) and one[2].keys() == two[2].keys()
    assert all(torch.equal(one[2][name], grad) for name, grad in two[2].items())


def test_blockwise_is_clean_before_one_block_masked_in_it_and_hidden_after_it():
    x0, maskable, _ = wide_batch(B=400, prompt=3, answer=10)    # answer and fill: blocks of 4, 4, 3
    objective = blockwise(4, t_ctx=0.6)
    xt, is_masked = objective.context_view(x0, maskable, row_generators(0, 0, range(400)))[1:]
    where = torch.arange(x0.shape[1]).expand_as(x0)
    chosen = (where[is_masked].new_tensor([where[b][row].min() for b, row in enumerate(is_masked)])
              - 3) // 4                                         # the block of each row's first mask
    starts = 3 + 4 * chosen[:, None]
    before, after = where < starts, (where >= starts + 4) & maskable
    assert torch.equal(xt[before], x0[before]) and (xt[after] == CONFIG.mask_id).all()
    inside = ~before & ~after & maskable
    assert torch.equal(xt[inside] == CONFIG.mask_id, is_masked[inside])
    assert not (is_masked & ~inside).any() and is_masked.any(dim=1).all()
    assert inside.sum(dim=1).eq(torch.where(chosen == 2, 3, 4)).all()
    rate = is_masked.sum() / inside.sum()
    assert abs(rate - 0.6) < 0.06                               # 1,467 tokens, some row has one
    counts = chosen.bincount(minlength=3)                       # each block is drawn as often
    assert len(counts) == 3 and (counts - 400 / 3).abs().max() < 4 * (400 * 2 / 9) ** 0.5


def test_the_loss_of_a_block_is_divided_by_its_own_length():
    x0, maskable, is_real = wide_batch(B=8, answer=12)
    for form, power in (("llada_sft", 0), ("unweighted", 1)):
        objective = blockwise(4, loss_form=form, t_ctx=0.5)
        loss, _ = objective(x0, maskable, is_real, row_generators(0, 0, IDS))
        _, xt, is_masked = objective.context_view(x0, maskable, row_generators(0, 0, IDS))
        model, n_active = make_model(), objective.is_active.sum(dim=1)
        nll = model.nll(model.encode(xt, is_real), x0, is_masked)
        rows = torch.arange(8)[:, None].expand_as(is_masked)[is_masked]
        expected = (nll / (0.5 * n_active[rows])).sum() / 8
        torch.testing.assert_close(loss, expected)


def test_blockwise_trains_and_resumes(cfg, tmp_path, monkeypatch):
    cfg = replace(cfg, objective="blockwise", active_block=4, lambda_jepa=0.0, log_every=1)
    assert_resuming_changes_nothing(cfg, tmp_path, monkeypatch)


def test_two_gradients_cost_6_where_the_papers_method_costs_4_and_plain_3():
    config = replace(CONFIG, n_layer=4, n_embd=64, n_hidden=176)
    batch, model = as_batch(eight_rows()), make_model(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(batch[0], batch[2])
    F1 = counter.get_total_flops()
    for expected, objective in ((3, DLLMJEPA(model, 0.0)), (4, DLLMJEPA(model, n_pred_layer=0)),
                                (6, make_arm(model, objective="two_gradients", n_pred_layer=0))):
        assert flops_of(lambda: step(objective, batch)) / F1 == pytest.approx(expected, rel=0.03)


def test_equal_flops_are_4_plain_steps_for_3_with_jepa():
    """The command for a baseline of equal cost: --lambda_jepa=0 and 4/3 of the steps."""
    config, batch = replace(CONFIG, n_layer=4, n_embd=64, n_hidden=176), as_batch(eight_rows())
    jepa = flops_of(lambda: step(DLLMJEPA(make_model(config), n_pred_layer=0), batch))
    plain = flops_of(lambda: step(DLLMJEPA(make_model(config), 0.0), batch))
    assert 3 * jepa == pytest.approx(4 * plain, rel=0.02)


# ----------------------------------------------------------------------------------------------
# the anchor


def test_the_anchor_is_the_gradient_of_the_summed_square_of_the_way_from_the_base():
    model, base = make_model(seed=1), dict(make_model(seed=2).named_parameters())
    base = {name: p.detach() for name, p in base.items()}
    params = dict(model.named_parameters())
    task = {name: torch.randn(p.shape, generator=seeded()) for name, p in params.items()}
    for name, p in params.items():
        p.grad = task[name].clone()
    said = Anchor(params, base, 0.3).pull(measure=True)
    found = {name: p.grad for name, p in params.items()}
    pull = torch.autograd.grad(0.3 * sum((p - base[name]).square().sum()
                                         for name, p in params.items()), list(params.values()))
    for (name, p), by_hand in zip(params.items(), pull):
        torch.testing.assert_close(found[name], task[name] + by_hand)
    squares = [sum(g.square().sum() for g in grads) for grads in (pull, task.values())]
    ratio = (squares[0] / squares[1]).sqrt()
    torch.testing.assert_close(said["anchor_ratio"], ratio)
    assert Anchor(params, base, 0.3).pull(measure=False) == {}


def test_an_anchored_step_of_sgd_is_weight_decay_towards_the_base():
    model, strength, lr = make_model(seed=1), 0.2, 0.1
    base = {name: p.detach().clone() for name, p in make_model(seed=2).named_parameters()}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    anchor = Anchor(dict(model.named_parameters()), base, strength)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(20):                         # without a task: (1 - 2 lr lambda)^n of the way
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        anchor.pull(measure=False)
        optimizer.step()
    for name, p in model.named_parameters():
        left = (1 - 2 * lr * strength) ** 20
        torch.testing.assert_close(p.detach(), base[name] + left * (start[name] - base[name]))


def test_an_anchored_run_stays_nearer_and_resumes_bit_for_bit(base, cfg, tmp_path):
    cfg = replace(cfg, init_from=str(base), tokenizer="", lambda_jepa=0.0, max_steps=6,
                  save_every=3, keep=9, seed=1)
    moved = []
    for strength in (0.0, 10.0):
        main(replace(cfg, anchor=strength, overwrite=True))
        line = loss_lines(cfg.out_dir)[-1]
        moved.append(line["online_moved"])
        assert ("anchor_ratio" in line) == (strength > 0)
    assert moved[1] < 0.8 * moved[0]
    other = replace(cfg, anchor=10.0, out_dir=str(tmp_path / "other"))
    Path(other.out_dir).mkdir()
    (Path(cfg.out_dir) / "step_0000003").rename(Path(other.out_dir) / "step_0000003")
    (Path(other.out_dir) / "log.jsonl").write_text((Path(cfg.out_dir) / "log.jsonl").read_text())
    main(replace(other, resume=True))
    whole, resumed = ({name: p for folder in [sorted(Path(c.out_dir).glob("step_*"))[-1]]
                       for name, p in tensors(folder).items()} for c in (cfg, other))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert without_clock(cfg.out_dir) == without_clock(other.out_dir)


@pytest.mark.slow
def test_a_sharded_anchor_is_the_anchor(base, cfg, tmp_path):
    cfg = replace(cfg, init_from=str(base), tokenizer="", anchor=1.0, max_steps=3, save_every=2,
                  micro_batch_size=4, seed=1)
    main(cfg)
    two = replace(cfg, shard=True, out_dir=str(tmp_path / "two"), max_steps=2)
    for settings in (two, replace(two, max_steps=3, resume=True)):
        run_ranks(settings)
    one, other = (loss_lines(c.out_dir) for c in (cfg, two))
    assert len(one) == 3
    for name in ("loss", "grad_norm", "anchor_ratio", "online_moved", "ema_moved", "pred_moved"):
        for a, b in zip(one[:1] + one[2:], other[:1] + other[2:]):
            assert a[name] == pytest.approx(b[name], rel=5e-2, abs=1e-6), name


def test_the_base_is_had_anew_where_the_model_has_gone_on(tmp_path):
    model = make_model(seed=3)
    cfg = TrainConfig(seed=3)
    now = dict(base_weights(model, cfg, again=False))
    for name, p in model.named_parameters():    # without a copy: a sample is all that is kept
        assert now[name].data_ptr() == p.data_ptr()
        now[name] = p.detach().clone()
    for p in model.parameters():
        p.data += 1                             # a resumed one
    drawn = dict(base_weights(model, cfg, again=True))
    model.save(tmp_path)
    from_file = dict(base_weights(model, replace(cfg, init_from=str(tmp_path)), again=True))
    for name, p in make_model(seed=3).named_parameters():
        assert torch.equal(now[name], p) and torch.equal(drawn[name], p)
        assert torch.equal(from_file[name], p + 1)


# ----------------------------------------------------------------------------------------------
# settings


@pytest.mark.parametrize("options, words", [
    (["--target=ema2"], "ema, online, frozen, shuffled, mean, random"),
    (["--pool_layer=-1"], "must not be negative"),
    (["--pool_layer=9"], "more than the model's 4 blocks"),
    (["--pred_lr=nan"], "finite float"),
    (["--pred_width=8", "--n_pred_layer=0"], "n_pred_layer=0 builds none"),
    (["--pred_lr=0", "--n_pred_layer=0"], "pred_lr=0 needs a predictor"),
    (["--target=random", "--masks=nested"], "does not use masks='nested'"),
    (["--objective=two_gradients", "--target=mean"], "does not use target"),
    (["--objective=consistency", "--pool=masked"], "does not use pool"),
    (["--objective=consistency", "--target=shuffled"], "compares tokens"),
    (["--target=shuffled", "--batch_size=1"], "at least 2"),
    (["--objective=infonce", "--batch_size=1"], "at least 2"),
    (["--objective=infonce", "--target=mean"], "choose another target"),
    (["--objective=infonce", "--tau=0"], "must be above 0"),
    (["--objective=blockwise"], "lambda_jepa=0 would fit"),
    (["--objective=blockwise", "--lambda_jepa=0", "--target=mean"], "does not use target"),
    (["--objective=blockwise", "--lambda_jepa=0", "--active_block=0"], "at least 1"),
    (["--anchor=1e-4"], "init_from"),
    (["--anchor=1e-4", "--optimizer=lean"], "adamw"),
])
def test_settings_that_exclude_each_other_stop_with_one_sentence(cfg, monkeypatch, options, words):
    assert words in sentence_of(monkeypatch, cfg, *options)


def test_the_anchor_pulls_in_every_step_whatever_is_logged(base, cfg, tmp_path):
    cfg = replace(cfg, init_from=str(base), tokenizer="", lambda_jepa=0.0, anchor=10.0, max_steps=5)
    often, seldom = (replace(cfg, log_every=n, out_dir=str(tmp_path / str(n))) for n in (1, 99))
    main(often)
    main(seldom)
    one, other = tensors(often.out_dir), tensors(seldom.out_dir)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_bottlenecks_matrices_have_unit_gain_and_the_seed_of_the_run():
    one, other = (make_arm(pred_width=16, seed=seed).predictor for seed in (0, 1))
    for linear in (one.down, one.up):
        n, fan_in = linear.weight.numel(), linear.weight.shape[1]
        assert abs(linear.weight.std().item() * fan_in ** 0.5 - 1) < 4 / (2 * n) ** 0.5
        assert not linear.bias.any()
    for name, p in one.named_parameters():
        assert torch.equal(p, other.get_parameter(name)) == (p.ndim == 1), name


def test_the_ema_of_an_arm_follows_the_fp32_weights_behind_a_half():
    """Not the bf16 half that computes: its steps would be too coarse."""
    objective = make_arm(pool="all_real", ema_decay=0.0)
    full = {name: torch.randn(p.shape, generator=seeded(1))
            for name, p in objective.model.named_parameters()}
    names = {id(p): name for name, p in objective.model.named_parameters()}
    objective.fp32_of = lambda p: full[names[id(p)]]
    for _ in range(2):
        objective.update_target()
        for name, p in objective.target.named_parameters():
            assert torch.equal(p, full[name]), name
