"""Laws of the network, the corruption and the loss, on models of a few thousand weights."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers import seeded
from jepa import ema_update, make_target
from model import (DLLM, Linear, ModelConfig, RMSNorm, diffusion_loss, forward_process, rope_table,
                   rotate, row_generators, uniform)
from pretrained.device import pick_device, pick_dtype

LLADA = ModelConfig(vocab_size=40, mask_id=39, eos_id=38, block_size=16, n_layer=2, n_head=4,
                    n_kv_head=4, n_embd=32, n_hidden=48)
DREAM = replace(LLADA, n_kv_head=2, norm_eps=1e-6, rope_theta=1_000_000.0, qkv_bias=True,
                shift=True)
QWEN3 = replace(LLADA, n_kv_head=2, head_dim=12, qk_norm=True, tied_head=True)
every = pytest.mark.parametrize("config", [LLADA, DREAM, QWEN3], ids=["LLaDA", "Dream", "Qwen3"])


def random_model(config, seed=0):
    """All weights random: a norm of ones or a bias of zeros could go unused unseen."""
    model, generator = DLLM(config), seeded(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if "norm" in name else noise * p.shape[-1] ** -0.5)
    return model.requires_grad_(False)


def random_ids(*shape, seed=1):
    return torch.randint(38, shape, generator=seeded(seed))     # below end-of-text and mask


def one_line(caught):
    """The message of an error that a user is to read: a single line."""
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# ---- who sees whom ----


@every
def test_what_stands_in_the_padding_changes_nothing(config):
    model = random_model(config)
    is_real = torch.arange(10) < torch.tensor([[10], [7], [3]])
    one = random_ids(3, 10)
    other = torch.where(is_real, one, config.mask_id)
    assert not torch.equal(one, other)
    assert torch.equal(model.encode(one, is_real)[is_real], model.encode(other, is_real)[is_real])
    assert torch.equal(model(one, is_real)[is_real], model(other, is_real)[is_real])


@every
def test_a_padded_text_has_the_states_and_logits_of_the_text_alone(config):
    model = random_model(config)
    text, padding = random_ids(1, 6), torch.full((1, 4), config.eos_id)
    is_real = torch.arange(10)[None] < 6
    alone, padded = model.encode(text), model.encode(torch.cat([text, padding], dim=1), is_real)
    torch.testing.assert_close(padded[:, :6], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.unembed(padded)[:, :6], model.unembed(alone),
                               atol=1e-5, rtol=0)
    # padding in front moves all positions, but only their differences count
    left = model.encode(torch.cat([padding, text], dim=1), is_real.flip(1))
    torch.testing.assert_close(left[:, 4:], alone, atol=1e-5, rtol=0)


@every
def test_a_row_does_not_depend_on_its_neighbours(config):
    model = random_model(config)
    one, other = random_ids(3, 8), random_ids(3, 8, seed=2)
    other[1] = one[1]
    assert torch.equal(model.encode(one)[1], model.encode(other)[1])


def test_every_position_attends_to_every_position():
    model = random_model(replace(LLADA, n_layer=1))     # one layer: directly, not through others
    text = random_ids(1, 6)
    for i in range(6):
        changed = text.clone()
        changed[0, i] = (text[0, i] + 1) % 38
        moved = (model.encode(changed) - model.encode(text)).abs().amax(dim=-1)
        assert (moved > 1e-4).all(), f"token {i} is not seen everywhere"


def test_a_sequence_longer_than_block_size_is_refused_in_one_line():
    model = random_model(LLADA)
    model.encode(random_ids(1, LLADA.block_size))
    with pytest.raises(ValueError) as caught:
        model.encode(random_ids(1, LLADA.block_size + 1))
    assert "17" in one_line(caught) and "block_size=16" in one_line(caught)


@pytest.mark.parametrize("wrong", [dict(n_embd=33), dict(n_kv_head=3), dict(mask_id=40),
                                   dict(eos_id=-1), dict(n_embd="32"), dict(n_layer=2.0),
                                   dict(n_head=0), dict(shift=1), dict(rope_theta=None)])
def test_sizes_that_do_not_fit_are_refused_in_one_line(wrong):
    with pytest.raises(ValueError) as caught:
        replace(LLADA, **wrong)
    [(name, value)] = wrong.items()
    assert f"{name}={value!r}" in one_line(caught)


# ---- the parts ----


def naive_logits(model, ids):
    """The forward pass of one text, spelled out position by position and head by head."""
    config = model.config
    weights = {name: p.double() for name, p in model.state_dict().items()}
    D = config.head_dim or config.n_embd // config.n_head

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0.0)

    def norm(name, x):
        return x / torch.sqrt(x.square().mean() + config.norm_eps) * weights[f"{name}.weight"]

    def turned(x, position):
        turned = x.clone()
        for j in range(D // 2):
            angle = torch.tensor(position * config.rope_theta ** (-2 * j / D), dtype=torch.float64)
            a, b = x[j], x[j + D // 2]
            turned[j] = a * angle.cos() - b * angle.sin()
            turned[j + D // 2] = b * angle.cos() + a * angle.sin()
        return turned

    def attention(layer, ys):
        q, k, v = ([linear(f"{layer}.{name}", y).view(-1, D) for y in ys]
                   for name in ("q_proj", "k_proj", "v_proj"))
        if config.qk_norm:
            q, k = ([torch.stack([norm(f"{layer}.{name}", head) for head in x]) for x in xs]
                    for name, xs in (("q_norm", q), ("k_norm", k)))
        for i in range(len(ys)):
            heads = []
            for head in range(config.n_head):
                kv = head // (config.n_head // config.n_kv_head)
                p = torch.stack([torch.exp(turned(q[i][head], i) @ turned(k[j][kv], j) / D ** 0.5)
                                 for j in range(len(ys))])
                heads.append(sum(p[j] / p.sum() * v[j][kv] for j in range(len(ys))))
            yield linear(f"{layer}.o_proj", torch.cat(heads))

    def mlp(layer, y):
        gate = linear(f"{layer}.gate_proj", y)
        gate = gate / (1 + torch.exp(-gate))
        return linear(f"{layer}.down_proj", gate * linear(f"{layer}.up_proj", y))

    xs = [weights["embed.weight"][i] for i in ids]
    for n in range(config.n_layer):
        layer = f"blocks.{n}"
        ys = [norm(f"{layer}.attn_norm", x) for x in xs]
        xs = [x + y for x, y in zip(xs, attention(layer, ys))]
        xs = [x + mlp(layer, norm(f"{layer}.mlp_norm", x)) for x in xs]
    logits = [linear("head", norm("norm", x)) for x in xs]
    return torch.stack([logits[0]] + logits[:-1] if config.shift else logits)


@every
def test_logits_match_a_naive_forward_pass_in_float64(config):
    model, text = random_model(config), random_ids(1, 7)
    torch.testing.assert_close(model(text)[0].double(), naive_logits(model, text[0]),
                               atol=1e-5, rtol=0)


def test_grouped_query_attention_repeats_each_kv_head_for_its_group():
    grouped, full = random_model(DREAM), random_model(replace(DREAM, n_kv_head=4), seed=1)
    weights = grouped.state_dict()
    for name, p in weights.items():
        if "k_proj" in name or "v_proj" in name:
            heads = p.unflatten(0, (2, 8))                      # n_kv_head, D
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    text = random_ids(2, 9)
    torch.testing.assert_close(grouped(text), full(text), atol=1e-5, rtol=0)


def test_queries_of_a_group_laid_end_to_end_attend_as_before(monkeypatch):
    """Padded does so on GPUs where no fused kernel takes a mask and grouped heads."""
    model, text = random_model(DREAM).requires_grad_(), random_ids(3, 10)
    is_real = torch.arange(10) < torch.tensor([[10], [7], [3]])

    def states_and_gradient():
        h = model.encode(text, is_real)[is_real]
        h.square().sum().backward()
        return h, *(p.grad for p in model.blocks.parameters())
    before = [x.clone() for x in states_and_gradient()]
    model.zero_grad()
    monkeypatch.setattr("model.takes_masked_groups", lambda device: False)
    seen, attention = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.shape, k.shape, options["enable_gqa"]))
        return attention(q, k, v, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    torch.testing.assert_close(states_and_gradient(), (*before,), atol=1e-5, rtol=1e-5)
    assert seen == [((3, 2, 20, 8), (3, 2, 10, 8), False)] * 2


def test_qkv_bias_adds_a_bias_to_q_k_and_v_alone():
    plain, biased = random_model(LLADA), DLLM(replace(LLADA, qkv_bias=True))
    biases = set(biased.state_dict()) - set(plain.state_dict())
    assert biases == {f"blocks.{n}.{x}_proj.bias" for n in range(2) for x in "qkv"}
    zeros = {name: torch.zeros_like(biased.state_dict()[name]) for name in biases}
    biased.load_state_dict({**plain.state_dict(), **zeros})
    assert torch.equal(biased(random_ids(2, 5)), plain(random_ids(2, 5)))
    q_proj = biased.blocks[0].q_proj
    y = torch.randn(3, 32, generator=seeded())
    unbiased = q_proj(y)
    q_proj.bias.data.fill_(0.25)
    torch.testing.assert_close(q_proj(y), unbiased + 0.25)


def test_a_tied_head_is_one_parameter_with_two_uses_and_a_target_does_without_it():
    model = random_model(QWEN3)
    names = {name for name, _ in model.named_parameters()}
    assert model.head.weight is model.embed.weight
    assert "embed.weight" in names and "head.weight" not in names
    assert model.to(torch.float64).head.weight is model.embed.weight
    h = torch.randn(2, 3, 32, generator=seeded())
    torch.testing.assert_close(model.float().unembed(h), h @ model.embed.weight.T)
    target = make_target(model)
    assert {name for name, _ in target.named_parameters()} == names
    ema_update(target, model, 0.5)
    assert torch.equal(target.encode(random_ids(1, 5)), model.encode(random_ids(1, 5)))


def test_head_dim_is_free_of_the_width():
    model = DLLM(replace(LLADA, head_dim=20))
    assert model.blocks[0].q_proj.weight.shape == (80, 32)
    assert model.blocks[0].o_proj.weight.shape == (32, 80)
    same = replace(LLADA, head_dim=8)               # what 0 stands for
    assert torch.equal(random_model(same)(random_ids(1, 5)), random_model(LLADA)(random_ids(1, 5)))


def test_the_shift_scores_token_i_by_the_state_at_i_minus_1():
    plain, shifted = random_model(LLADA), random_model(replace(LLADA, shift=True))
    h = torch.randn(2, 7, 32, generator=seeded())
    raw = h @ plain.head.weight.T
    torch.testing.assert_close(plain.unembed(h), raw)
    torch.testing.assert_close(shifted.unembed(h)[:, 1:], raw[:, :-1])


@every
@pytest.mark.parametrize("chunk", [1024, 4])
def test_nll_is_minus_log_p_of_the_clean_token_by_the_logits_there(config, chunk, monkeypatch):
    """Against unembed and, for what shifts, against the raw logits of the position before."""
    monkeypatch.setattr("model.NLL_CHUNK", chunk)
    model, x0 = random_model(config), random_ids(3, 6)
    h = torch.randn(3, 6, 32, generator=seeded())
    where = torch.rand(3, 6, generator=seeded()) < 0.7
    where[0, 0] = True
    assert where[:, 1:].sum() > 4
    log_p = (h @ model.head.weight.T).log_softmax(dim=-1)
    if config.shift:
        log_p = torch.cat([log_p[:, :1], log_p[:, :-1]], dim=1)
    by_hand = -log_p.gather(-1, x0[..., None])[..., 0][where]
    torch.testing.assert_close(model.nll(h, x0, where), by_hand)
    by_logits = F.cross_entropy(model.unembed(h, where), x0[where], reduction="none")
    torch.testing.assert_close(model.nll(h, x0, where), by_logits)


def test_a_token_of_a_shifted_model_is_scored_by_what_stands_before_it():
    """Without attention the state at i depends on xt_i alone: changing xt_i moves the loss of token
    i + 1 for Dream, and of token i for the others."""
    for config, moved in ((LLADA, 3), (DREAM, 4)):
        model = random_model(replace(config, n_layer=1))
        for block in model.blocks:
            block.o_proj.weight.zero_()                         # no attention
        text, x0 = random_ids(1, 7), random_ids(1, 7, seed=2)
        changed = text.clone()
        changed[0, 3] = (text[0, 3] + 1) % 38
        everywhere = torch.ones(1, 7, dtype=torch.bool)
        one, other = (model.nll(model.encode(xt), x0, everywhere) for xt in (text, changed))
        assert (one != other).nonzero().flatten().tolist() == [moved]


@every
def test_where_picks_rows_of_the_full_logits(config):
    model = random_model(config)
    h = torch.randn(3, 6, 32, generator=seeded())
    logits = model.unembed(h)
    where = torch.rand(3, 6, generator=seeded()) < 0.4
    where[0, 0] = True
    torch.testing.assert_close(model.unembed(h, where), logits[where])
    rows, columns = torch.arange(3)[:, None], torch.tensor([[5, 0], [1, 2], [3, 3]])
    picked = model.unembed(h, (rows, columns))
    assert picked.shape == (3, 2, 40)
    torch.testing.assert_close(picked, logits[rows, columns])


def test_rope_makes_scores_depend_on_the_distance_alone():
    T, D = 12, 8
    cos, sin = rope_table(T, replace(LLADA, head_dim=D, rope_theta=10_000.0), "cpu")
    q, k = torch.randn(2, D, generator=seeded())
    q, k = (rotate(x.expand(1, 1, T, D), cos, sin)[0, 0] for x in (q, k))
    scores = q @ k.T
    for distance in range(-T + 1, T):
        same = scores.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-5, rtol=0)
    assert scores[0].unique().numel() == T              # and they do depend on it, with its sign
    assert scores[:, 0].unique().numel() == T


def test_rope_turns_the_complex_number_of_dimensions_j_and_j_plus_half():
    T, D, theta = 9, 8, 500_000.0
    x = torch.randn(2, 3, T, D, generator=seeded())
    z = torch.complex(x[..., :4].double(), x[..., 4:].double())
    angle = torch.arange(T)[:, None] * theta ** (-2 * torch.arange(4).double() / D)
    z = z * torch.exp(1j * angle)
    expected = torch.cat([z.real, z.imag], dim=-1).float()
    table = rope_table(T, replace(LLADA, head_dim=D, rope_theta=theta), "cpu")
    torch.testing.assert_close(rotate(x, *table), expected, atol=1e-5, rtol=0)


def test_rope_turns_bf16_in_fp32():
    x = torch.randn(1, 1, 16, 64, generator=seeded()).bfloat16()
    table = rope_table(16, replace(LLADA, head_dim=64), "cpu")
    assert all(part.dtype == torch.float32 for part in table)
    assert torch.equal(rotate(x, *table), rotate(x.float(), *table).bfloat16())


def test_rms_norm_is_x_over_its_root_mean_square_times_the_weight():
    norm = RMSNorm(8, eps=0.1)                                  # an eps that cannot be overlooked
    norm.weight.data = torch.randn(8, generator=seeded())
    x = torch.randn(2, 3, 8, generator=seeded(1))
    expected = x / (x.pow(2).mean(dim=-1, keepdim=True) + 0.1).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_of_bf16_is_computed_in_fp32():
    norm = RMSNorm(4096, eps=1e-5)
    x = torch.randn(4, 4096, generator=seeded()).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).dtype == torch.bfloat16
    # one rounding at the very end: half a unit in the last of 8 bits
    assert ((norm(x).double() - exact).abs() <= 1.01 * 2 ** -8 * exact.abs()).all()


def test_linear_multiplies_in_the_dtype_of_its_input_and_keeps_its_weights_in_fp32():
    linear = Linear(6, 4)
    x = torch.randn(3, 6, generator=seeded()).bfloat16()
    y = linear(x)
    assert torch.equal(y, F.linear(x, linear.weight.bfloat16(), linear.bias.bfloat16()))
    y.sum().backward()
    assert linear.weight.dtype == linear.weight.grad.dtype == torch.float32
    assert linear(x.float()).dtype == torch.float32


@every
def test_bf16_activations_still_give_fp32_logits(config):
    model, text = random_model(config), random_ids(2, 8)
    exact = model(text)
    model.compute_dtype = torch.bfloat16
    assert model.encode(text).dtype == torch.bfloat16
    assert model(text).dtype == torch.float32
    assert (model(text) - exact).norm() < 0.03 * exact.norm()
    assert all(p.dtype == torch.float32 for p in model.parameters())


@every
def test_initial_weights_depend_on_the_generator_alone(config):
    torch.manual_seed(1)
    one = DLLM(config).init_weights(seeded(7)).state_dict()
    torch.manual_seed(2)
    same, other = DLLM(config).init_weights(seeded(7)), DLLM(config).init_weights(seeded(8))
    assert all(torch.equal(one[name], p) for name, p in same.state_dict().items())
    assert not torch.equal(one["embed.weight"], other.embed.weight)


# ---- corruption ----


def a_batch(B=4, T=12, prompt=4, padding=2):
    """-> x0, maskable: rows of [prompt | answer | padding]; row b's answer is b tokens shorter."""
    position = torch.arange(T)
    maskable = (position >= prompt) & (position < T - padding - torch.arange(B)[:, None])
    return random_ids(B, T), maskable


def test_each_row_is_masked_at_its_own_rate():
    T, t = 20_000, torch.tensor([0.02, 0.2, 0.5, 0.7, 0.98])
    maskable = torch.ones(5, T, dtype=torch.bool)
    _, is_masked = forward_process(random_ids(5, T), t, maskable, 39, seeded())
    four_sigma = 4 * (t * (1 - t) / T).sqrt()
    assert ((is_masked.float().mean(dim=1) - t).abs() < four_sigma).all()


@pytest.mark.parametrize("at_least_one", [False, True])
def test_exactly_the_maskable_positions_are_ever_masked(at_least_one):
    x0, maskable = a_batch()
    generator, ever = seeded(), torch.zeros_like(maskable)
    for _ in range(200):
        xt, is_masked = forward_process(x0, torch.full((4,), 0.1), maskable, 39, generator,
                                        at_least_one)
        ever |= is_masked
        assert torch.equal(xt, torch.where(is_masked, 39, x0))
    assert torch.equal(ever, maskable)


def test_rows_positions_and_calls_have_noise_of_their_own():
    """Half of the pairs of places agree by chance, whichever way the pairs are made."""
    B, T, generator = 64, 128, seeded()
    maskable, t = torch.ones(B, T, dtype=torch.bool), torch.full((B,), 0.5)
    _, one = forward_process(random_ids(B, T), t, maskable, 39, generator)
    _, other = forward_process(random_ids(B, T), t, maskable, 39, generator)
    for a, b in ((one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]),
                 (one[B // 2:], one[:B // 2]), (one[:, T // 2:], one[:, :T // 2])):
        n = a.numel()
        assert abs((a == b).float().mean() - 0.5) < 4 * 0.5 / n ** 0.5


def test_the_noise_is_the_generators_and_no_other():
    x0, maskable = a_batch(B=8, T=40)
    t = torch.full((8,), 0.5)

    def drawn(seed, global_seed):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        _, is_masked = forward_process(x0, t, maskable, 39, seeded(seed), at_least_one=True)
        assert torch.equal(torch.get_rng_state(), state)        # the global one is not touched
        return is_masked
    assert torch.equal(drawn(1, 5), drawn(1, 6)) and not torch.equal(drawn(1, 5), drawn(2, 5))


def test_a_higher_rate_masks_what_a_lower_one_masks_and_more():
    x0, maskable = a_batch(B=50, T=40)
    before = torch.zeros_like(maskable)
    for rate in (0.1, 0.3, 0.6, 0.9):
        _, is_masked = forward_process(x0, torch.full((50,), rate), maskable, 39, seeded(3))
        assert (is_masked | ~before).all() and is_masked.sum() > before.sum()
        before = is_masked


def test_what_is_masked_does_not_depend_on_the_ids():
    x0, maskable = a_batch(B=8, T=40)
    t = torch.full((8,), 0.5)
    _, one = forward_process(x0, t, maskable, 39, seeded(), at_least_one=True)
    _, other = forward_process(x0.flip(0), t, maskable, 39, seeded(), at_least_one=True)
    assert torch.equal(one, other)


def test_t_0_masks_nothing_and_t_1_everything_maskable():
    x0, maskable = a_batch()
    for seed in range(20):
        _, nothing = forward_process(x0, torch.zeros(4), maskable, 39, seeded(seed))
        _, everything = forward_process(x0, torch.ones(4), maskable, 39, seeded(seed))
        assert not nothing.any() and torch.equal(everything, maskable)


def test_at_least_one_masks_one_token_where_chance_masked_none_and_changes_no_other_row():
    x0, maskable = a_batch(B=5, T=10, prompt=3, padding=2)
    x0, maskable = x0.repeat(400, 1), maskable.repeat(400, 1)
    maskable[0] = False                                         # nothing to mask: nothing is masked
    t = torch.full((2000,), 0.1)
    _, by_chance = forward_process(x0, t, maskable, 39, seeded(3))
    _, is_masked = forward_process(x0, t, maskable, 39, seeded(3), at_least_one=True)
    none = ~by_chance.any(dim=1)
    assert none.any() and not none.all()
    assert torch.equal(is_masked[~none], by_chance[~none])
    assert (is_masked[none].sum(dim=1) == maskable[none].any(dim=1)).all()
    assert not (is_masked & ~maskable).any()
    assert torch.equal(is_masked[none].any(dim=0), maskable[none].any(dim=0))   # any may be it


# ---- one generator a row ----


def masks(example_ids, T=12, seed=0, step=0, t=0.5):
    """The masks that rows with these ids get, in this order, when T positions are maskable."""
    B = len(example_ids)
    _, is_masked = forward_process(torch.zeros(B, T, dtype=torch.long), torch.full((B,), t),
                                   torch.ones(B, T, dtype=torch.bool), 39,
                                   row_generators(seed, step, example_ids))
    return is_masked


def test_a_row_meets_the_same_masks_in_any_order_and_split_of_the_batch():
    whole = masks([4, 8, 15, 16, 23, 42], T=40)
    assert torch.equal(masks([42, 23, 16, 15, 8, 4], T=40), whole.flip(0))
    assert torch.equal(torch.cat([masks([4, 8], T=40), masks([15, 16, 23, 42], T=40)]), whole)
    assert torch.equal(masks([16], T=40)[0], whole[3])


def test_seed_step_and_example_id_each_give_other_masks():
    # 1, 11 and 111 side by side: run together, their digits would make different triples equal
    drawn = {tuple(masks([i], T=64, seed=seed, step=step)[0].tolist())
             for seed in (1, 11, 111) for step in (1, 11, 111) for i in (1, 11, 111)}
    assert len(drawn) == 27


def test_the_masks_of_a_row_do_not_change_when_its_batch_is_padded_longer():
    for T in (13, 20, 64):
        assert torch.equal(masks([1, 2, 3], T=T)[:, :12], masks([1, 2, 3], T=12))


def test_a_list_of_generators_draws_row_by_row():
    rows = uniform((3, 20), [seeded(i) for i in range(3)], "cpu")
    for i in range(3):
        assert torch.equal(rows[i:i + 1], uniform((1, 20), seeded(i), "cpu"))
    assert rows.dtype == torch.float32 and 0 <= rows.min() and rows.max() < 1


# ---- the loss ----


def loss_inputs(t=(0.9, 0.5, 0.3)):
    """-> logits (B, T, V), x0, is_masked, maskable, t; answers of unequal length."""
    x0, maskable = a_batch(B=len(t), T=20, prompt=3, padding=2)
    maskable[0, 10:] = False
    t = torch.tensor(t)
    _, is_masked = forward_process(x0, t, maskable, 39, seeded(5), at_least_one=True)
    return torch.randn(*x0.shape, 40, generator=seeded()), x0, is_masked, maskable, t


def nll_of(logits, x0, is_masked):
    return F.cross_entropy(logits[is_masked], x0[is_masked], reduction="none")


@pytest.mark.parametrize("form", ["masked_mean", "llada_sft", "unweighted"])
def test_the_loss_equals_a_naive_loop_over_rows_and_masked_tokens(form):
    logits, x0, is_masked, maskable, t = loss_inputs()
    assert is_masked.sum(dim=1).unique().numel() == maskable.sum(dim=1).unique().numel() == 3
    total = 0.0
    for b in range(3):
        nll = [-logits[b, i].softmax(dim=0)[x0[b, i]].log() for i in range(20) if is_masked[b, i]]
        divisor = {"masked_mean": len(nll), "llada_sft": t[b] * maskable[b].sum(),
                   "unweighted": 0.5 * maskable[b].sum()}[form]
        total += sum(nll) / divisor / 3
    loss = diffusion_loss(nll_of(logits, x0, is_masked), is_masked, maskable, t, form)
    torch.testing.assert_close(loss, total)


@pytest.mark.parametrize("form, rate", [("masked_mean", "fixed"), ("llada_sft", "fixed"),
                                        ("llada_sft", "uniform"), ("unweighted", "uniform")])
def test_all_forms_have_the_mean_over_answer_tokens_as_their_expectation(form, rate):
    logits, x0, _, maskable, t = loss_inputs(t=(0.4, 0.4, 0.4))
    nll = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")
    expected = ((nll * maskable).sum(dim=1) / maskable.sum(dim=1)).mean()
    generator, drawn = seeded(), torch.zeros(1500)
    for i in range(1500):
        if rate == "uniform":
            t = torch.rand(3, generator=generator).clamp(min=1e-3)
        _, is_masked = forward_process(x0, t, maskable, 39, generator,
                                       at_least_one=form == "masked_mean")
        drawn[i] = diffusion_loss(nll_of(logits, x0, is_masked), is_masked, maskable, t, form)
    assert (drawn.mean() - expected).abs() < 4 * drawn.std() / 1500 ** 0.5
    assert drawn.std() / 1500 ** 0.5 < 0.03 * expected          # a test that sharp says something


def test_masked_mean_is_the_default_and_an_unknown_form_is_refused_in_one_line():
    logits, x0, *rest = loss_inputs()
    nll = nll_of(logits, x0, rest[0])
    default = diffusion_loss(nll, *rest)
    assert torch.equal(default, diffusion_loss(nll, *rest, form="masked_mean"))
    with pytest.raises(ValueError) as caught:
        diffusion_loss(nll, *rest, form="mean")
    assert all(word in one_line(caught) for word in ("'mean'", "masked_mean", "llada_sft"))


# ---- the machine ----


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpus", "", "xla", "meta", "hpu"])
def test_a_device_that_is_not_there_is_refused_in_one_line(name):
    with pytest.raises(ValueError) as caught:
        pick_device(name)
    assert repr(name) in one_line(caught)


def test_a_device_that_is_there_is_taken():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


# ----------------------------------------------------------------------------------------------
# from scratch


def test_initial_weights_have_the_widths_that_the_docstring_states():
    config = ModelConfig(200, 1, 0, n_layer=8, n_head=2, n_kv_head=1, n_embd=64, n_hidden=160,
                         qkv_bias=True)
    model = DLLM(config).init_weights(torch.Generator().manual_seed(0))
    block = model.blocks[3]
    for weight, std in ((model.embed.weight, 0.5), (model.head.weight, 0.02),
                        (block.q_proj.weight, 64 ** -0.5), (block.up_proj.weight, 64 ** -0.5),
                        (block.o_proj.weight, (64 * 16) ** -0.5),
                        (block.down_proj.weight, (160 * 16) ** -0.5)):
        n = weight.numel()
        assert abs(weight.std().item() / std - 1) < 4 / (2 * n) ** 0.5
        assert abs(weight.mean().item()) < 4 * std / n ** 0.5
    assert not block.q_proj.bias.any() and (block.attn_norm.weight == 1).all()


def test_a_row_without_a_mask_counts_among_the_rows():
    is_masked = torch.tensor([[False, False, False], [True, True, False]])
    maskable, t = torch.ones(2, 3, dtype=torch.bool), torch.tensor([0.1, 0.5])
    loss = diffusion_loss(torch.tensor([3.0, 6.0]), is_masked, maskable, t, "llada_sft")
    assert loss.item() == pytest.approx((0 + 9 / (0.5 * 3)) / 2)


def test_rms_norm_of_bf16_rounds_before_it_weighs():
    """As in the families' own code: their weights were trained with it."""
    norm = RMSNorm(64, 1e-5)
    norm.weight.data = 1 + torch.randn(64, generator=seeded())
    x = torch.randn(50, 64, generator=seeded(1)).bfloat16()
    x32 = x.float()
    x32 = x32 / (x32.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), x32.bfloat16() * norm.weight.bfloat16())
    assert not torch.equal(norm(x), (x32 * norm.weight).bfloat16())


def test_a_cpu_computes_in_fp32_unless_it_is_told_otherwise():
    for name, dtype in (("auto", torch.float32), ("float32", torch.float32),
                        ("bfloat16", torch.bfloat16)):
        assert pick_dtype(name, torch.device("cpu")) == dtype
