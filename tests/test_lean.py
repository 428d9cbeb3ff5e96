"""Laws of lean.py: split weights are fp32 to the bit, follow the fp32 run, and need half of it."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import (CONFIG, IDS, as_batch, assert_resuming_changes_nothing, eight_rows, lines,
                     make_model, run_ranks, seeded, sentence_of)
from jepa import DLLMJEPA, ema_update, make_target
from model import DLLM, row_generators
from train import main
from training import lean
from training.lean import Lean, join, round_at_random, split
from training.setup import make_optimizer

SMALL = replace(CONFIG, n_layer=1)


# ---- two halves ----


def all_sorts_of_fp32():
    """Random bits (so every size, sign, NaN and infinity), ordinary weights, ties and ends."""
    bits = torch.randint(-2 ** 31, 2 ** 31, (200_000,), generator=seeded(), dtype=torch.int64)
    ends = torch.tensor([0, -2 ** 31, 0x8000, 0x7fff, 0x18000, 0x7f7fffff, 0x7f800000, 0x7fffffff,
                         -1, 0x3f808000, 0x3f818000, 0x3f807fff])
    normal = torch.randn(200_000, generator=seeded()) * 0.02
    return torch.cat([torch.cat([bits, ends]).to(torch.int32).view(torch.float32), normal])


def test_a_split_weight_is_the_fp32_weight_bit_for_bit():
    full = all_sorts_of_fp32()
    high, low = split(full)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(high, low).view(torch.int32), full.view(torch.int32))


def test_the_half_that_computes_is_the_nearest_bf16():
    """As an fp32 weight is rounded in each pass, but for exact ties, which go away from zero."""
    full = all_sorts_of_fp32()
    full = full[full.abs() < 1e38]
    high, _ = split(full)
    is_tie = full.view(torch.int32) & 0xffff == 0x8000
    assert torch.equal(high[~is_tie], full[~is_tie].bfloat16()) and is_tie.any()
    assert (high[is_tie].float().abs() >= full[is_tie].abs()).all()
    ulp = 2.0 ** -7 * full.abs() + 1e-38
    assert ((high.float() - full).abs() <= ulp / 2).all()


def test_rounding_at_random_goes_to_a_neighbour_and_is_right_on_average():
    x = torch.rand(50, generator=seeded()) + 1e-3
    drawn = torch.stack([round_at_random(x, seeded(k)).float() for k in range(2000)])
    ulp = 2.0 ** (x.log2().floor() - 7)
    assert ((drawn - x).abs() < ulp).all()
    assert ((drawn.mean(dim=0) - x).abs() < 5 * 0.5 * ulp / 2000 ** 0.5).all()
    exact = x.bfloat16().float()                        # what fits stays as it is
    assert torch.equal(round_at_random(exact, seeded()).float(), exact)


# ---- one optimizer ----


def two_parameters(seed=0):
    g = seeded(seed)
    return [torch.nn.Parameter(torch.randn(40, 30, generator=g) * 0.02),
            torch.nn.Parameter(torch.randn(30, generator=g))]


def steps(optimizer, params, n=20):
    g = seeded(9)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        optimizer.step()


def test_without_halves_it_is_adamw():
    ours, theirs = two_parameters(), two_parameters()
    steps(Lean(ours, halve=(), lr=1e-3, weight_decay=0.1), ours)
    steps(torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.1), theirs)
    for p, q in zip(ours, theirs):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-6)


def test_with_halves_its_weights_are_adamws_to_the_error_of_the_moments():
    ours, theirs = two_parameters(), two_parameters()
    start = two_parameters()
    optimizer = Lean(ours, halve=ours, lr=1e-6, weight_decay=0.1)
    for p, q in zip(ours, start):
        assert p.dtype == torch.bfloat16 and torch.equal(optimizer.fp32_of(p), q)
    steps(optimizer, ours)
    steps(torch.optim.AdamW(theirs, lr=1e-6, weight_decay=0.1), theirs)
    for p, q, s in zip(ours, theirs, start):
        assert (optimizer.fp32_of(p) - q).norm() < 0.02 * (q - s).norm()
        assert torch.equal(p, split(optimizer.fp32_of(p))[0])


def test_the_second_moment_forgets_where_rounding_to_nearest_would_not():
    p = torch.nn.Parameter(torch.ones(4000))
    optimizer = Lean([p], halve=[p], lr=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    v = optimizer.state[p]["exp_avg_sq"].float().mean().item()
    assert v == pytest.approx(1e-3, rel=2e-3)
    nearest = torch.full((1,), v).bfloat16()
    p.grad.zero_()
    for _ in range(300):
        optimizer.step()
        nearest = (nearest.float() * 0.999).bfloat16()
    left = optimizer.state[p]["exp_avg_sq"].float().mean().item() / v
    assert left == pytest.approx(0.999 ** 300, rel=0.01) and left < 0.75
    assert nearest.item() > 0.99 * v


def test_the_size_of_a_slice_changes_no_weight(monkeypatch):
    results = []
    for chunk in (1 << 24, 100):
        monkeypatch.setattr(lean, "CHUNK", chunk)
        params = two_parameters()
        optimizer = Lean(params, halve=params, lr=1e-3)
        steps(optimizer, params, n=1)               # later ones see other random second moments
        results.append([optimizer.fp32_of(p) for p in params])
    assert all(torch.equal(one, two) for one, two in zip(*results))


def test_a_gradient_that_does_not_lie_in_order_is_used_in_order():
    results = []
    for transposed in (False, True):
        params = two_parameters()[:1]
        optimizer = Lean(params, halve=params, lr=1e-3)
        grad = torch.randn(40, 30, generator=seeded(4)).bfloat16()
        params[0].grad = grad.T.contiguous().T if transposed else grad
        optimizer.step()
        results.append(optimizer.fp32_of(params[0]))
    assert torch.equal(*results)


def test_gradients_of_both_dtypes_are_clipped_together():
    params = two_parameters()
    Lean(params, halve=params[:1], lr=1e-3)
    for p in params:
        p.grad = torch.ones_like(p)
    norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
    assert norm.item() == pytest.approx((1200 + 30) ** 0.5, rel=4e-3)      # bf16 has three digits
    assert sum(p.grad.float().square().sum() for p in params).item() == pytest.approx(1, rel=2e-2)


def test_memory_is_8_bytes_a_parameter_10_with_gradients_14_with_the_ema():
    """And 16 for the predictor, which stays fp32. The head, which the EMA lacks, needs no 4."""
    objective = DLLMJEPA(make_model(), lambda_jepa=1.0)
    params = [p for p in objective.parameters() if p.requires_grad]
    optimizer = Lean(params, halve=objective.model.parameters(), lr=1e-3)
    objective(*as_batch(eight_rows()), row_generators(0, 0, IDS))[0].backward()

    def held(network):
        return sum(p.nbytes + sum(value.nbytes for key, value in optimizer.state[p].items()
                                  if key != "step") for p in network.parameters())
    def grads(network):
        return sum(p.grad.nbytes for p in network.parameters())
    n, n_pred = (sum(p.numel() for p in network.parameters())
                 for network in (objective.model, objective.predictor))
    n_head = objective.model.head.weight.numel()
    target = sum(p.nbytes for p in objective.target.parameters())
    assert held(objective.model) == 8 * n
    assert held(objective.model) + grads(objective.model) == 10 * n
    assert held(objective.model) + grads(objective.model) + target == 14 * n - 4 * n_head
    assert held(objective.predictor) + grads(objective.predictor) == 16 * n_pred
    optimizer.step()                                    # and a step adds nothing that stays
    assert held(objective.model) == 8 * n and held(objective.predictor) == 12 * n_pred


# ---- against the fp32 run ----


def distance_travelled(kind, lr, n=100, decay=0.996):
    """How far weights and EMA went, as vectors, from the same bf16 weights on the same batches."""
    model = make_model(SMALL).bfloat16().float()        # such as are published
    model.compute_dtype = torch.bfloat16
    if kind == "bf16":
        model.bfloat16()
    objective = DLLMJEPA(model, 1.0, ema_decay=decay)
    bf16_ema = make_target(model).bfloat16()
    start = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    params = [p for p in objective.parameters() if p.requires_grad]
    if kind == "lean":
        optimizer = Lean(params, halve=model.parameters(), lr=lr)
    else:
        optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    full = optimizer.fp32_of if kind == "lean" else torch.Tensor.float
    batch = as_batch(eight_rows())
    for step in range(n):
        objective(*batch, row_generators(0, step, IDS))[0].backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        objective.fp32_of = full
        objective.update_target()
        ema_update(bf16_ema, model, decay, lambda p: full(p).bfloat16())

    def from_start(named, full):
        return torch.cat([(full(p).detach() - start[name]).flatten() for name, p in named])
    return (from_start(model.named_parameters(), full),
            from_start(objective.target.named_parameters(), full=torch.Tensor.float),
            from_start(bf16_ema.named_parameters(), full=torch.Tensor.float))


@pytest.fixture(scope="module", params=[1.4e-6, 1e-5], ids=["wide-t", "aggressive"])
def travelled(request):
    return {kind: distance_travelled(kind, request.param) for kind in ("fp32", "lean", "bf16")}


def test_it_follows_the_fp32_run_and_so_does_the_ema(travelled):
    for ours, fp32 in zip(travelled["lean"][:2], travelled["fp32"][:2]):
        assert (ours - fp32).norm() < 0.01 * fp32.norm()        # 0.005 when this was written
        assert (ours != 0).float().mean() > 0.99


def test_plain_bf16_weights_do_not_follow_it(travelled):
    ours, fp32 = travelled["bf16"][0], travelled["fp32"][0]
    assert (ours - fp32).norm() > 0.95 * fp32.norm()
    assert (ours != 0).float().mean() < 0.1                     # nine of ten never moved
    assert (fp32 != 0).float().mean() > 0.99


def test_a_bf16_ema_does_not_follow_even_fp32_weights(travelled):
    _, fp32, bf16 = travelled["fp32"]
    assert (bf16 - fp32).norm() > 0.9 * fp32.norm()
    assert (bf16 != 0).float().mean() < 0.05 < 0.99 < (fp32 != 0).float().mean()


# ---- the loop ----


@pytest.fixture
def lean_cfg(cfg):  # noqa: F811
    return replace(cfg, optimizer="lean")


def test_lean_6_steps_equal_3_and_resume_3_bit_for_bit(lean_cfg, tmp_path, monkeypatch):
    assert_resuming_changes_nothing(lean_cfg, tmp_path, monkeypatch)


def test_checkpoint_and_export_hold_the_bf16_half_and_the_train_state_the_rest(lean_cfg, tmp_path):
    main(replace(lean_cfg, export_dir=str(tmp_path / "export"), weight_decay=0.1))
    [folder] = Path(lean_cfg.out_dir).glob("step_*")
    state = load_file(folder / "train_state.safetensors")
    model = DLLM.from_checkpoint(folder, dtype=torch.bfloat16)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    for name, p in model.named_parameters():
        full = join(p.detach(), state[f"adam.low.model.{name}"])
        assert torch.equal(split(full)[0], p) and torch.equal(exported[name], p)
    assert any(state[f"adam.low.model.{name}"].any() for name, _ in model.named_parameters())
    assert state["predictor.norm.weight"].dtype == torch.float32
    assert state["target.embed.weight"].dtype == torch.float32


def test_a_lean_run_has_the_losses_of_an_adamw_run(lean_cfg, cfg, tmp_path):  # noqa: F811
    ours = replace(lean_cfg, max_steps=10, micro_batch_size=4)
    theirs = replace(cfg, max_steps=10, micro_batch_size=4, out_dir=str(tmp_path / "adamw"))
    main(ours)
    main(theirs)
    for one, two in zip(lines(ours.out_dir), lines(theirs.out_dir)):
        if "held_out" in one:
            assert one["held_out"]["gsm8k"] == pytest.approx(two["held_out"]["gsm8k"], rel=5e-3)
        else:
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-2)


def test_a_run_is_not_resumed_with_the_other_optimizer(lean_cfg, cfg, monkeypatch):  # noqa: F811
    main(replace(cfg, max_steps=1))
    said = sentence_of(monkeypatch, replace(lean_cfg, resume=True))
    assert "optimizer='adamw'" in said and "optimizer='lean'" in said


@pytest.mark.slow
def test_lean_on_two_processes_is_near_to_one(lean_cfg, tmp_path):
    """Near only: each rank's gradient is rounded to bf16 before they are summed."""
    two = replace(lean_cfg, out_dir=str(tmp_path / "two"))
    main(lean_cfg)
    run_ranks(two)
    for ours, theirs in zip(lines(lean_cfg.out_dir), lines(two.out_dir)):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


def test_the_noise_of_a_step_is_of_its_seed_and_number():
    def second_moment(seed, step):
        p = torch.nn.Parameter(torch.zeros(5000))
        optimizer = Lean([p], halve=[p], lr=0.0, seed=seed)
        optimizer.state[p]["step"] += step
        p.grad = torch.full((5000,), 0.3).bfloat16()
        optimizer.step()
        return optimizer.state[p]["exp_avg_sq"]
    one = second_moment(1, 1)
    assert torch.equal(one, second_moment(1, 1)) and one.unique().numel() == 2
    assert not torch.equal(one, second_moment(2, 1)) and not torch.equal(one, second_moment(1, 2))


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-7])
def test_gradients_as_small_as_eps_move_the_weights_as_adamw_does(scale):
    ours, theirs = two_parameters(), two_parameters()
    lean, adamw = Lean(ours, halve=(), lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0)
    for n in range(5):
        for p, q in zip(ours, theirs):
            p.grad = scale * torch.randn(p.shape, generator=seeded(n))
            q.grad = p.grad.clone()
        lean.step()
        adamw.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-6)


def test_a_lean_run_draws_by_the_seed_of_the_run(lean_cfg):
    objective = DLLMJEPA(make_model())
    optimizer = make_optimizer(objective, replace(lean_cfg, seed=5, beta2=0.9, weight_decay=0.1))
    assert optimizer.seed == 5 and objective.fp32_of == optimizer.fp32_of
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.9)
        assert all(group["weight_decay"] == 0.1 * (p.ndim > 1) for p in group["params"])


def test_the_model_is_halved_and_the_predictor_is_not(lean_cfg):
    objective = DLLMJEPA(make_model())
    optimizer = make_optimizer(objective, lean_cfg)
    assert {p.dtype for p in objective.model.parameters()} == {torch.bfloat16}
    for network in (objective.predictor, objective.target):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {"low" in optimizer.state[p] for p in objective.predictor.parameters()} == {False}
