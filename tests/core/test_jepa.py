"""Laws of the joint objective: what it adds, what it leaves alone, where gradients go, its cost."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers import (CONFIG, IDS, as_batch, eight_rows, flops_of, make_model, seeded, step,
                     wide_batch)
from jepa import DLLMJEPA, Predictor, cosine_distance, ema_update, make_target, pool
from model import diffusion_loss, forward_process, row_generators, uniform
from pretrained.device import stream
from tasks.common import Row
from training.diagnostics import embedding_numbers

def views(objective, batch, generator):
    """The masks (B, T) of the context view and of the target view in one forward."""
    seen = {}

    def watch(network):
        def encode(xt, is_real=None):
            seen[network] = xt == CONFIG.mask_id
            return type(network).encode(network, xt, is_real)
        network.encode = encode
    watch(objective.model)
    watch(objective.target)
    objective(*batch, generator)
    return seen[objective.model], seen[objective.target]


# ---- lambda = 0 ----


@pytest.mark.parametrize("diffusion_t", ["context", "uniform"])
@pytest.mark.parametrize("loss_form", ["masked_mean", "llada_sft", "unweighted"])
@pytest.mark.parametrize("shift", [False, True])
def test_lambda_zero_is_plain_diffusion_fine_tuning_to_the_last_bit(loss_form, diffusion_t, shift):
    x0, maskable, is_real = batch = as_batch(eight_rows())
    model = make_model(replace(CONFIG, shift=shift))
    objective = DLLMJEPA(make_model(model.config), 0.0, t_ctx=0.3, loss_form=loss_form,
                         diffusion_t=diffusion_t)
    loss, parts, grads = step(objective, batch, seed=3)

    generators = row_generators(3, 0, IDS)
    t = torch.full((8,), 0.3)
    if diffusion_t == "uniform":
        t = 1e-3 + (1 - 1e-3) * uniform((8, 1), generators, "cpu")[:, 0]
    xt, is_masked = forward_process(x0, t, maskable, 31, generators,
                                    at_least_one=loss_form == "masked_mean")
    nll = model.nll(model.encode(xt, is_real), x0, is_masked)
    by_hand = diffusion_loss(nll, is_masked, maskable, t, loss_form)
    by_hand.backward()

    assert torch.equal(loss, by_hand)
    assert parts.keys() == {"diffusion"} and torch.equal(parts["diffusion"], by_hand)
    assert grads.keys() == {f"model.{name}" for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert torch.equal(grads[f"model.{name}"], p.grad), name


def test_lambda_zero_makes_neither_target_nor_predictor():
    objective = DLLMJEPA(make_model(), lambda_jepa=0.0)
    before = {name: p.clone() for name, p in objective.state_dict().items()}
    assert before.keys() == {f"model.{name}" for name in objective.model.state_dict()}
    assert not hasattr(objective, "target") and not hasattr(objective, "predictor")
    objective.update_target()
    assert all(torch.equal(p, before[name]) for name, p in objective.state_dict().items())


@pytest.mark.parametrize("diffusion_t", ["context", "uniform"])
@pytest.mark.parametrize("mask_scope", ["response", "all"])
@pytest.mark.parametrize("generators", [lambda: seeded(5), lambda: row_generators(0, 0, IDS)],
                         ids=["one", "rows"])
def test_the_context_view_and_the_diffusion_loss_do_not_depend_on_lambda(diffusion_t, mask_scope,
                                                                         generators):
    batch, losses = as_batch(eight_rows()), []
    for lambda_jepa in (0.0, 1.0):
        objective = DLLMJEPA(make_model(), lambda_jepa, diffusion_t=diffusion_t,
                             mask_scope=mask_scope)
        losses.append(objective(*batch, generators())[1]["diffusion"])
    assert torch.equal(*losses)


# ---- the objective ----


@pytest.mark.parametrize("diffusion_t", ["context", "uniform"])
@pytest.mark.parametrize("shift", [False, True])
def test_the_loss_is_diffusion_plus_lambda_times_the_distance_of_the_two_views(shift, diffusion_t):
    x0, maskable, is_real = batch = as_batch(eight_rows())
    config = replace(CONFIG, shift=shift)
    model, other = make_model(config), make_model(config, seed=9)
    objective = DLLMJEPA(make_model(config), 0.7, t_ctx=0.3, t_tgt=0.6, diffusion_t=diffusion_t)
    ema_update(objective.target, other, 0.5)                    # a target that is not the model
    target = make_model(config)
    ema_update(target, other, 0.5)
    context, heavy = views(objective, batch, row_generators(0, 0, IDS))
    loss, parts, grads = step(objective, batch)

    t = torch.full((8,), 0.3)
    if diffusion_t == "uniform":
        t = 1e-3 + (1 - 1e-3) * uniform((8, 1), row_generators(0, 0, IDS), "cpu")[:, 0]
    h = model.encode(torch.where(context, 31, x0), is_real)
    diffusion = diffusion_loss(model.nll(h, x0, context), context, maskable, t)
    is_content = is_real & (x0 != 30)
    z_tgt = pool(target.encode(torch.where(heavy, 31, x0), is_real), is_content & ~heavy).detach()
    z_hat = objective.predictor(pool(h, is_content & ~context))
    distance = 1 - F.cosine_similarity(z_hat, z_tgt).mean()
    (diffusion + 0.7 * distance).backward()

    torch.testing.assert_close(loss, diffusion + 0.7 * distance)
    torch.testing.assert_close(parts["diffusion"], diffusion.detach())
    torch.testing.assert_close(parts["jepa"], distance.detach())
    assert parts.keys() == {"diffusion", "jepa"}
    assert distance > 0.01                                      # large enough to be compared
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[f"model.{name}"], p.grad, atol=1e-6, rtol=1e-4)


def test_no_gradient_reaches_the_target_and_all_else_gets_some():
    objective = DLLMJEPA(make_model(), lambda_jepa=1.0)
    _, _, grads = step(objective, as_batch(eight_rows()))
    assert grads.keys() == {name for name, _ in objective.named_parameters()
                            if not name.startswith("target.")}
    assert all(grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_target_is_a_frozen_fp32_copy_without_head(dtype):
    model = make_model().to(dtype)
    target = make_target(model)
    assert target.head is None and model.head is not None
    ours = {name: p for name, p in model.named_parameters() if not name.startswith("head.")}
    assert dict(target.named_parameters()).keys() == ours.keys()
    for name, p in target.named_parameters():
        assert p.dtype == torch.float32 and not p.requires_grad
        assert torch.equal(p, ours[name].float()) and p.data_ptr() != ours[name].data_ptr()
        assert ours[name].dtype == dtype and ours[name].requires_grad


def test_an_optimizer_step_moves_model_and_predictor_and_the_update_the_target():
    objective = DLLMJEPA(make_model(), lambda_jepa=1.0, ema_decay=0.9)
    before = {name: p.clone() for name, p in objective.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    step(objective, as_batch(eight_rows()))
    optimizer.step()
    for name, p in objective.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("target."), name
    objective.update_target()
    for name, p in objective.target.named_parameters():
        online = objective.model.get_parameter(name)
        expected = 0.9 * before[f"target.{name}"] + 0.1 * online
        torch.testing.assert_close(p, expected, atol=1e-7, rtol=1e-6)
        assert not torch.equal(p, before[f"target.{name}"]) and not torch.equal(p, online)


def test_the_model_and_the_predictor_draw_from_streams_of_their_own():
    model = make_model()                            # from seed 0, like the predictor here
    [*matrices] = [p.flatten() for p in Predictor(CONFIG.n_embd, 2, seed=0).parameters()
                   if p.ndim > 1]
    for theirs in [p.flatten() for p in model.parameters() if p.ndim > 1]:
        for ours in matrices:
            n = min(len(ours), len(theirs))
            assert torch.corrcoef(torch.stack([ours[:n], theirs[:n]]))[0, 1].abs() < 5 / n ** 0.5
    assert len({stream(*key).initial_seed() for key in (
        (0, "predictor"), (1, "predictor"), (0, "lora"), (0, "predictor", 0))}) == 4


@pytest.mark.parametrize("n_layer", [1, 3])
def test_the_predictor_depends_on_its_seed_alone_and_leaves_the_model_as_it_was(n_layer):
    torch.manual_seed(1)
    one = DLLMJEPA(make_model(seed=4), n_pred_layer=n_layer, seed=7)
    torch.manual_seed(2)
    same = DLLMJEPA(make_model(seed=5), n_pred_layer=n_layer, seed=7).predictor.state_dict()
    other = DLLMJEPA(make_model(seed=4), n_pred_layer=n_layer, seed=8).predictor.state_dict()
    for name, p in one.predictor.state_dict().items():
        assert torch.equal(p, same[name])
        assert torch.equal(p, other[name]) == (p.ndim == 1), name   # biases and norms are constant
    for name, p in make_model(seed=4).named_parameters():
        assert torch.equal(p, one.model.get_parameter(name)), name


# ---- the views ----


@pytest.mark.parametrize("mask_scope", ["response", "all"])
def test_both_views_mask_just_what_the_scope_allows(mask_scope):
    """The prompt is never masked in scope "response"; the first token and padding never at all."""
    x0, maskable, is_real = batch = as_batch(eight_rows())
    objective = DLLMJEPA(make_model(replace(CONFIG, n_layer=1)), t_ctx=0.3, mask_scope=mask_scope)
    allowed = maskable if mask_scope == "response" else is_real & (torch.arange(x0.shape[1]) > 0)
    ever = torch.zeros(2, *x0.shape, dtype=torch.bool)
    for seed in range(60):
        ever |= torch.stack(views(objective, batch, seeded(seed)))
    assert torch.equal(ever[0], allowed) and torch.equal(ever[1], allowed)
    assert not torch.equal(maskable, allowed) or mask_scope == "response"
    assert torch.equal(maskable, as_batch(eight_rows())[1])     # the caller's is left as it was


@pytest.mark.parametrize("generators", [lambda: seeded(5),
                                        lambda: row_generators(0, 0, range(200))],
                         ids=["one", "rows"])
def test_the_views_have_the_rates_t_ctx_and_t_tgt_and_independent_masks(generators):
    _, maskable, _ = batch = wide_batch(B=200)
    objective = DLLMJEPA(make_model(replace(CONFIG, n_layer=1)), t_ctx=0.2, t_tgt=0.7)
    context, target = views(objective, batch, generators())
    n = maskable.sum()
    for is_masked, t in (context, 0.2), (target, 0.7), (context & target, 0.2 * 0.7):
        assert (is_masked.sum() / n - t).abs() < 4 * (t * (1 - t) / n) ** 0.5


def test_diffusion_t_uniform_spreads_the_context_rate_over_0_to_1_and_leaves_the_target_rate():
    _, maskable, _ = batch = wide_batch(B=400)
    objective = DLLMJEPA(make_model(replace(CONFIG, n_layer=1)), t_tgt=0.7, diffusion_t="uniform")
    context, target = views(objective, batch, seeded())
    rate = context.sum(dim=1) / maskable.sum(dim=1)
    quarters = torch.histc(rate, 4, 0, 1)
    assert (quarters - 100).abs().max() < 4 * (400 * 0.25 * 0.75) ** 0.5
    n = maskable.sum()
    assert (target.sum() / n - 0.7).abs() < 4 * (0.7 * 0.3 / n) ** 0.5


@pytest.mark.parametrize("diffusion_t", ["context", "uniform"])
def test_both_views_of_a_row_stay_the_same_when_its_batch_is_padded_longer(diffusion_t):
    rows = eight_rows()
    objective = DLLMJEPA(make_model(replace(CONFIG, n_layer=1)), diffusion_t=diffusion_t)
    together = views(objective, as_batch(rows), row_generators(0, 0, IDS))
    for b, row in enumerate(rows):
        batch = as_batch([row])
        alone = views(objective, batch, row_generators(0, 0, IDS[b:b + 1]))
        for whole, part in zip(together, alone):
            assert torch.equal(whole[b, :batch[0].shape[1]], part[0])


def test_a_batch_of_eight_unequal_rows_is_the_mean_of_two_batches_of_four():
    rows, objective = eight_rows(), DLLMJEPA(make_model(), lambda_jepa=1.0)
    loss, parts, whole = step(objective, as_batch(rows))
    halves = [step(objective, as_batch(rows[i:i + 4]), IDS[i:i + 4]) for i in (0, 4)]
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, loss)
    for name in ("diffusion", "jepa"):
        torch.testing.assert_close((halves[0][1][name] + halves[1][1][name]) / 2, parts[name])
    for name, grad in whole.items():
        mean = (halves[0][2][name] + halves[1][2][name]) / 2
        assert (mean - grad).norm() < 1e-5 * grad.norm() + 1e-7, name


# ---- the target's pass ----


def micro_batches():
    """The eight rows as 3, 1, 2 and 2, each batch padded to its own longest; inputs of forward."""
    rows = eight_rows()
    return [(*as_batch(rows[a:b]), row_generators(0, 0, IDS[a:b]))
            for a, b in ((0, 3), (3, 4), (4, 6), (6, 8))]


def count_passes(network):
    """A list that grows with each pass, by the shape of what the network reads."""
    shapes, encode = [], network.encode

    def counted(xt, is_real=None):
        shapes.append(tuple(xt.shape))
        return encode(xt, is_real)
    network.encode = counted
    return shapes


@pytest.mark.parametrize("diffusion_t", ["context", "uniform"])
@pytest.mark.parametrize("mask_scope", ["response", "all"])
@pytest.mark.parametrize("pack", [False, True])
def test_targets_made_before_the_micro_batches_are_those_that_forward_makes(pack, mask_scope,
                                                                            diffusion_t):
    model = make_model()
    model.pack = pack
    objective = DLLMJEPA(model, mask_scope=mask_scope, diffusion_t=diffusion_t)
    ema_update(objective.target, make_model(seed=9), 0.5)       # a target that is not the model
    shapes, results = count_passes(objective.target), []
    for is_before in (False, True):
        objective.zero_grad()
        batches, found = micro_batches(), []
        targets = objective.embed_targets(batches) if is_before else [None] * 4
        for batch, z_tgt in zip(batches, targets):
            loss, parts = objective(*batch, z_tgt)
            (loss / 4).backward()
            found += [loss.detach(), *parts.values()]
        grads = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
        results.append((found, grads))
    assert [B for B, _ in shapes] == 2 * [3, 1, 2, 2]           # one pass each
    assert all(z.shape == (len(batch[0]), 32) and not z.requires_grad
               for batch, z in zip(batches, targets))
    assert all(torch.equal(a, b) for a, b in zip(*(found for found, _ in results), strict=True))
    assert all(torch.equal(grad, results[1][1][name]) for name, grad in results[0][1].items())


def test_without_the_jepa_term_there_is_no_target():
    objective = DLLMJEPA(make_model(), lambda_jepa=0.0)
    batches = micro_batches()
    assert objective.embed_targets(batches) == [None] * 4
    assert objective(*batches[0], None)[1].keys() == {"diffusion"}
    assert not hasattr(objective, "target") and not hasattr(objective, "predictor")


# ---- pooling and distance ----


def test_pool_is_the_layer_normed_mean_over_the_chosen_positions():
    h = torch.randn(4, 6, 16, generator=seeded())
    where = torch.rand(4, 6, generator=seeded()) < 0.5
    where[:, 0] = torch.tensor([True, True, True, False])
    for b in range(4):
        mean = torch.stack([h[b, i] for i in range(6) if where[b, i]]).mean(dim=0)
        expected = (mean - mean.mean()) / (mean.var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(pool(h, where)[b], expected)
    assert where.sum(dim=1).unique().numel() > 1


def test_pool_sums_bf16_in_fp32():
    h = torch.randn(2, 300, 16, generator=seeded()).bfloat16() + 8
    where = torch.ones(2, 300, dtype=torch.bool)
    assert pool(h, where).dtype == torch.float32
    torch.testing.assert_close(pool(h, where), pool(h.float(), where))


def test_an_empty_choice_pools_to_zeros_with_finite_gradients():
    h = torch.randn(2, 5, 16, generator=seeded(), requires_grad=True)
    where = torch.tensor([[False] * 5, [True] * 5])
    z = pool(h, where)
    assert torch.equal(z[0], torch.zeros(16))
    cosine_distance(z, torch.randn(2, 16, generator=seeded())).backward()
    assert h.grad.isfinite().all() and not h.grad[0].any() and h.grad[1].any()


@pytest.mark.parametrize("mask_scope", ["response", "all"])
@pytest.mark.parametrize("side", ["model", "target"])
def test_only_visible_content_enters_the_embeddings(side, mask_scope):
    """States at masks, in the padding and at end-of-text may be anything; all others count."""
    x0, maskable, is_real = batch = as_batch(eight_rows())
    objective = DLLMJEPA(make_model(), mask_scope=mask_scope)
    network, encode = getattr(objective, side), getattr(objective, side).encode

    def jepa_loss(choose):
        def encode_disturbed(xt, is_real):
            ignored = (xt == 31) | (x0 == 30) | ~is_real
            noise = torch.randn(*xt.shape, 32, generator=seeded(2))
            return encode(xt, is_real) + noise * choose(ignored)[..., None]
        network.encode = encode_disturbed
        return objective(*batch, seeded(5))[1]["jepa"]

    undisturbed = jepa_loss(torch.zeros_like)
    assert torch.equal(jepa_loss(lambda ignored: ignored), undisturbed)
    assert not torch.equal(jepa_loss(lambda ignored: ~ignored), undisturbed)


def test_with_parameter_free_layer_norm_the_cosine_is_pearsons_correlation():
    h, where = torch.randn(2, 4, 16, generator=seeded()) + 0.5, torch.ones(2, 4, dtype=torch.bool)
    z = pool(h, where)
    correlation = torch.corrcoef(h.mean(dim=1))[0, 1]
    torch.testing.assert_close(1 - cosine_distance(z[:1], z[1:]), correlation)


def test_cosine_distance_is_0_for_equal_2_for_opposite_and_a_mean_over_rows():
    z, other = torch.randn(2, 5, 16, generator=seeded())
    torch.testing.assert_close(cosine_distance(z, 3 * z), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(cosine_distance(z, -z), torch.tensor(2.0))
    rows = [1 - z[b] @ other[b] / (z[b].norm() * other[b].norm()) for b in range(5)]
    torch.testing.assert_close(cosine_distance(z, other), sum(rows) / 5)


def test_cosine_distance_of_bf16_is_computed_in_fp32():
    z, other = torch.randn(2, 5, 256, generator=seeded()).bfloat16()
    distance = cosine_distance(z, other)
    assert distance.dtype == torch.float32
    assert torch.equal(distance, cosine_distance(z.float(), other.float()))


# ---- the predictor ----


def random_predictor(width, n_layer):
    """All weights random, biases and norms too."""
    predictor, generator = Predictor(width, n_layer), seeded()
    for p in predictor.parameters():
        p.data = p.data + 0.3 * torch.randn(p.shape, generator=generator)
    return predictor


def test_a_predictor_without_layers_is_the_identity():
    z = torch.randn(3, 16, generator=seeded())
    assert torch.equal(Predictor(16, 0)(z), z) and not list(Predictor(16, 0).parameters())


def test_the_predictor_acts_on_each_row_alone():
    predictor, z = random_predictor(16, 3), torch.randn(4, 16, generator=seeded())
    changed = z.clone()
    changed[[0, 1, 3]] += 1
    assert torch.equal(predictor(z)[2], predictor(changed)[2])
    assert not torch.equal(predictor(z)[1], predictor(changed)[1])


def test_the_predictor_is_a_pre_norm_transformer_over_one_position_whatever_its_queries_and_keys():
    C, H = 16, 4
    predictor, generator = random_predictor(C, 2), seeded(1)
    z = torch.randn(5, C, generator=generator)
    x = z[:, None]                                                              # (B, 1, C)
    for block in predictor.blocks:
        y = block["attn_norm"](x)
        q, k = (y @ torch.randn(C, C, generator=generator) for _ in range(2))
        heads = zip(q.split(C // H, -1), k.split(C // H, -1), block["v_proj"](y).split(C // H, -1))
        y = [torch.softmax(q @ k.mT / (C // H) ** 0.5, dim=-1) @ v for q, k, v in heads]
        x = x + block["o_proj"](torch.cat(y, dim=-1))
        y = block["mlp_norm"](x)
        x = x + block["down_proj"](F.gelu(block["up_proj"](y)))
    torch.testing.assert_close(predictor(z), predictor.norm(x)[:, 0])
    assert predictor.blocks[0]["up_proj"].weight.shape == (4 * C, C)
    assert len(predictor.blocks) == 2


# ---- the EMA ----


def test_the_ema_follows_its_closed_form_in_fp32():
    model, generator, n, decay = make_model(), seeded(), 40, 0.9
    target = make_target(model)
    # decay^n theta_0 + (1 - decay) sum_i decay^(n - i) theta_i, in float64
    expected = {name: p.double() * decay ** n for name, p in target.named_parameters()}
    for i in range(1, n + 1):
        for name, p in model.named_parameters():
            p.data += 0.01 * torch.randn(p.shape, generator=generator)
            if name in expected:
                expected[name] += (1 - decay) * decay ** (n - i) * p.data.double()
        ema_update(target, model, decay)
    for name, p in target.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], atol=1e-6, rtol=0)


def test_decay_1_freezes_the_target_and_decay_0_copies_the_model():
    start, model = make_model(seed=1), make_model(seed=2)
    target = make_target(start)
    ema_update(target, model, 1.0)
    assert all(torch.equal(p, start.get_parameter(name)) for name, p in target.named_parameters())
    ema_update(target, model.bfloat16(), 0.0)                   # whatever the model is stored in
    for name, p in target.named_parameters():
        assert torch.equal(p, model.get_parameter(name).float()), name


def test_an_ema_held_in_bf16_would_stall_where_ours_in_fp32_moves():
    # two epochs of GSM8K at batch 64: 234 AdamW steps with a cosine schedule from lr 1e-5
    model, generator, n, decay = make_model(replace(CONFIG, n_layer=1)), seeded(), 234, 0.996
    for p in model.parameters():
        p.data = (0.02 * torch.randn(p.shape, generator=generator)).bfloat16().float()
    direction = {name: torch.randn(p.shape, generator=generator).sign()
                 for name, p in model.named_parameters()}
    start, target = make_target(model), make_target(model)
    in_bf16 = {name: p.bfloat16() for name, p in target.named_parameters()}
    online_moved = target_moved = 0.0                           # the same for each entry
    for i in range(n):
        lr = 1e-5 * (1 + math.cos(math.pi * i / n)) / 2
        for name, p in model.named_parameters():
            p.data += lr * direction[name]
        ema_update(target, model, decay)
        for name, p in in_bf16.items():
            p.lerp_(model.get_parameter(name).data.bfloat16(), 1 - decay)
        online_moved += lr
        target_moved += (1 - decay) * (online_moved - target_moved)

    def rms_moved(params):
        moved = [(p.float() - start.get_parameter(name)).flatten() for name, p in params]
        return torch.cat(moved).square().mean().sqrt().item()
    assert target_moved > 0.4 * online_moved
    assert rms_moved(target.named_parameters()) == pytest.approx(target_moved, rel=0.01)
    assert rms_moved(in_bf16.items()) < target_moved / 4


# ---- what it costs, and that it works ----


def test_a_step_costs_two_thirds_of_a_two_gradient_step_and_four_thirds_of_plain_fine_tuning():
    # a small head and no predictor: what is left are passes, 3F with gradient and F without
    config = replace(CONFIG, n_layer=4, n_embd=64, n_hidden=176)
    x0, maskable, is_real = batch = as_batch(eight_rows())
    model = make_model(config)

    def two_gradients():                                        # as LLM-JEPA: no copy, no no_grad
        t = torch.full((8,), 0.2)
        xt, is_masked = forward_process(x0, t, maskable, 31, seeded(), at_least_one=True)
        h, h_tgt = model.encode(xt, is_real), model.encode(x0, is_real)
        loss = diffusion_loss(model.nll(h, x0, is_masked), is_masked, maskable, t)
        (loss + cosine_distance(pool(h, is_real), pool(h_tgt, is_real))).backward()

    ours = flops_of(lambda: step(DLLMJEPA(model, lambda_jepa=1.0, n_pred_layer=0), batch))
    plain = flops_of(lambda: step(DLLMJEPA(model, lambda_jepa=0.0), batch))
    assert ours / flops_of(two_gradients) == pytest.approx(2 / 3, rel=0.02)
    assert ours / plain == pytest.approx(4 / 3, rel=0.02)


def test_the_predictor_sees_one_vector_a_row_and_costs_next_to_nothing():
    batch, config = as_batch(eight_rows()), replace(CONFIG, n_layer=4, n_embd=64, n_hidden=176)
    with_predictor, without = (
        flops_of(lambda: step(DLLMJEPA(make_model(config), n_pred_layer=k), batch)) for k in (2, 0))
    assert with_predictor < 1.05 * without


def test_the_joint_objective_memorises_eight_examples():
    rows = [Row(row.example_id, row.prompt[:3], row.answer[:2 + b % 3])
            for b, row in enumerate(eight_rows())]
    batch, n = as_batch(rows, fill=0), 300
    objective = DLLMJEPA(make_model(replace(CONFIG, n_embd=64, n_hidden=176)), lambda_jepa=1.0)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad],
                                  betas=(0.9, 0.95), weight_decay=0.0)
    diffusion, skill = torch.zeros(2, n)
    for i in range(n):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - i / n)
        _, parts, _ = step(objective, batch, seed=i)            # other masks at each step
        optimizer.step()
        objective.update_target()
        diffusion[i] = parts["diffusion"]
        skill[i] = embedding_numbers([objective.trace])["skill"]
    assert diffusion[0] > 3                                     # log 32 = 3.5: it knew nothing
    assert diffusion[-20:].mean() < 0.05
    assert skill[-20:].mean() > 0.5                             # and it tells the examples apart


def test_bf16_activations_give_the_loss_of_fp32_within_2_percent():
    batch, parts = as_batch(eight_rows()), []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model()
        model.compute_dtype = dtype
        objective = DLLMJEPA(model, lambda_jepa=1.0)
        assert objective.target.compute_dtype == dtype
        loss, _, grads = step(objective, batch)
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads.values())
        parts.append(loss)
    torch.testing.assert_close(parts[1], parts[0], atol=0, rtol=0.02)


def test_the_predictor_starts_with_unit_gain_matrices_no_biases_and_ends_in_a_layer_norm():
    predictor = Predictor(64, 3, seed=1)
    for block in predictor.blocks:
        for name, linear in block.items():
            if not name.endswith("_norm"):
                n, fan_in = linear.weight.numel(), linear.weight.shape[1]
                assert abs(linear.weight.std().item() * fan_in ** 0.5 - 1) < 4 / (2 * n) ** 0.5
                assert not linear.bias.any()
    z_hat = predictor(10 + 5 * torch.randn(7, 64, generator=seeded()))
    torch.testing.assert_close(z_hat.mean(dim=1), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(z_hat.var(dim=1, correction=0), torch.ones(7), atol=1e-4, rtol=0)


def test_where_chance_masks_nothing_the_context_view_masks_one_token_and_the_target_view_none():
    batch, generators = as_batch(eight_rows()), row_generators(0, 0, IDS)
    for loss_form, n in (("masked_mean", 1), ("llada_sft", 0)):
        objective = DLLMJEPA(make_model(), t_ctx=1e-7, t_tgt=1e-7, loss_form=loss_form)
        context, heavy = views(objective, batch, generators)
        assert (context.sum(dim=1) == n).all() and not heavy.any()


def test_a_context_rate_of_0_to_1_never_comes_near_0():
    objective = DLLMJEPA(make_model(), diffusion_t="uniform")
    t = objective.context_rate(torch.zeros(20_000, 1), seeded())
    assert 1e-3 <= t.min() < 2e-3 and 0.999 < t.max() < 1
