"""Laws of likelihood: unbiased, exact for one token, the same masks for every model and batch."""
import itertools
import math
from collections import Counter

import pytest
import torch

from analysis.likelihood import (choose, held_out_losses, log_likelihood, losses_of_rows,
                                 stratified_masks)
from model import DLLM, ModelConfig

VOCAB, EOS, MASK = 20, 18, 19
RATES = (0.1, 0.5, 0.77, 1.0)
each_wiring = pytest.mark.parametrize("shift", (False, True), ids=("in_place", "shifted"))


@pytest.fixture(autouse=True)
def one_thread():
    """For matrices as small as these a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(seed=0, peaked=40.0, **config):
    """A random model with firm opinions, which depend on what is visible."""
    config = {**dict(vocab_size=VOCAB, mask_id=MASK, eos_id=EOS, block_size=64, n_layer=2, n_head=2,
                     n_kv_head=2, n_embd=16, n_hidden=32), **config}
    model = DLLM(ModelConfig(**config)).init_weights(torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        model.head.weight.mul_(peaked)
    return model


def texts(n, length, seed=0):
    """(n, length) random ids of ordinary tokens."""
    return torch.randint(EOS, (n, length), generator=torch.Generator().manual_seed(seed))


def watch(model):
    """What the model is shown from now on: a list of rows of ids, without their padding."""
    shown, encode = [], model.encode

    def watched(xt, is_real=None):
        for b, row in enumerate(xt.tolist()):
            shown.append(row if is_real is None else row[:int(is_real[b].sum())])
        return encode(xt, is_real)
    model.encode = watched
    return shown


def shown_masks(model, windows, rates=RATES, **settings):
    """{(window, rate): is_masked} of a run of held_out_losses."""
    shown = watch(model)
    held_out_losses(model, windows, rates, **settings)
    pairs = itertools.product(map(tuple, windows.tolist()), rates)
    return {pair: [i == MASK for i in row] for pair, row in zip(pairs, shown, strict=True)}


@torch.no_grad()
def losses_by_hand(model, ids, is_masked):
    """-log p of the tokens at the masked places, from the raw output of the head."""
    xt = torch.tensor([[MASK if m else i for i, m in zip(ids, is_masked)]])
    raw = model.head(model.encode(xt))[0].float().log_softmax(dim=-1)
    return [-raw[i - model.config.shift, ids[i]].item() for i, m in enumerate(is_masked) if m]


def bound_by_hand(model, prompt, answer):
    """The mean over all masks of the answer with their exact weights: 1/L for a number of masks,
    then each choice of places alike; and a mask of l tokens counts L / l times its sum."""
    L, total = len(answer), 0.0
    for mask in itertools.product((False, True), repeat=L):
        if l := sum(mask):
            nll = sum(losses_by_hand(model, prompt + answer, (False,) * len(prompt) + mask))
            total -= nll * L / l / L / math.comb(L, l)
    return total


# ---- log-likelihood of answers ----


@each_wiring
@pytest.mark.parametrize("n_samples", (1, 4, 7))
def test_the_estimate_is_unbiased_for_the_sum_over_all_masks(shift, n_samples):
    model, prompt, answer = tiny(shift=shift), [3, 7], [1, 9, 1, 4]
    exact = bound_by_hand(model, prompt, answer)
    # rows of one call are independent if their prompts differ, so each seed is a call of its own
    found = torch.stack([log_likelihood(model, [prompt], [answer], n_samples, seed)[0]
                         for seed in range(400)])
    stderr = found.std() / len(found) ** 0.5
    assert abs(found.mean() - exact) < 4 * stderr
    assert stderr < 0.05 * abs(exact)                           # or the law would say nothing


def test_more_samples_come_closer():
    model, answer = tiny(), [1, 9, 1, 4, 4]
    exact = bound_by_hand(model, [3], answer)
    errors = [sum((log_likelihood(model, [[3]], [answer], n, seed)[0] - exact).square()
                  for seed in range(30)) for n in (5, 80)]
    assert errors[1] < errors[0] / 8                            # 1/16 on average


@each_wiring
def test_one_token_is_exact_whatever_the_samples_and_costs_one_pass(shift):
    model, prompts = tiny(shift=shift), [[3], [4, 5, 6], [7, 7]]
    exact = [-losses_by_hand(model, prompt + [9], [False] * len(prompt) + [True])[0]
             for prompt in prompts]
    for n, seed in itertools.product((1, 8, 128), (0, 1)):
        shown = watch(model)
        assert log_likelihood(model, prompts, [[9]] * 3, n, seed).tolist() == pytest.approx(exact)
        assert len(shown) == 3


def test_the_bound_is_the_log_likelihood_where_order_does_not_matter():
    """A model that has no opinion gives each of L tokens 1/V, by any masks."""
    model = tiny(peaked=0.0)
    for L in (1, 2, 5):
        found = log_likelihood(model, [[1]], [[2] * L], n_samples=3)
        assert found.item() == pytest.approx(-L * math.log(VOCAB))


def test_numbers_of_masks_are_spread_evenly_and_all_alike_if_the_length_divides_the_samples():
    first = Counter()
    for seed, L, n in itertools.product(range(40), (1, 2, 3, 7), (1, 2, 6, 14, 21)):
        masks = stratified_masks(L, n, torch.Generator().manual_seed(seed))
        assert masks.shape == (n, L) and masks.dtype == torch.bool
        counts = Counter(masks.sum(dim=1).tolist())
        assert set(counts) <= set(range(1, L + 1))
        assert {counts[l] for l in range(1, L + 1)} <= {n // L, -(-n // L)}
        first[L, int(masks[0].sum())] += 1
    assert all(first[7, l] > 0 for l in range(1, 8))            # the start is drawn too


def test_every_choice_of_places_is_as_likely_as_another():
    generator, n = torch.Generator().manual_seed(0), 6000
    masks = Counter(map(tuple, stratified_masks(4, n, generator).tolist()))
    for mask in itertools.product((False, True), repeat=4):
        if any(mask):
            expected = n / 4 / math.comb(4, sum(mask))
            assert abs(masks[mask] - expected) < 5 * expected ** 0.5


@each_wiring
@pytest.mark.parametrize("pack", (False, True))
def test_neither_batch_nor_order_nor_packing_changes_an_estimate(shift, pack):
    model = tiny(shift=shift)
    prompts = [[1], [2, 3, 4, 5, 6], [7] * 11, [8, 9], [2]]
    answers = [[3, 4], [5], [6] * 9, [1, 2, 3], [17] * 20]
    alone = torch.cat([log_likelihood(model, [p], [a], 6) for p, a in zip(prompts, answers)])
    model.pack = pack
    for batch_tokens in (1, 60, 100_000):
        together = log_likelihood(model, prompts, answers, 6, batch_tokens=batch_tokens)
        assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-4)
        back = log_likelihood(model, prompts[::-1], answers[::-1], 6, batch_tokens=batch_tokens)
        assert back.flip(0).tolist() == pytest.approx(alone.tolist(), abs=1e-4)
    assert log_likelihood(model, prompts, answers, 6, seed=1).tolist() != pytest.approx(
        alone.tolist(), abs=1e-4)


def test_the_prompt_is_always_clean_and_the_answer_never_without_a_mask():
    model, prompts, answers = tiny(), [[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]]
    shown = watch(model)
    log_likelihood(model, prompts, answers, 8)
    assert len(shown) == 16
    for row in shown:
        prompt, answer = next((p, a) for p, a in zip(prompts, answers) if row[:len(p)] == p)
        asked = row[len(prompt):]
        assert len(asked) == len(answer) and MASK in asked
        assert all(i in (MASK, j) for i, j in zip(asked, answer))


def test_answers_to_one_prompt_meet_the_same_masks():
    model = tiny()
    shown = watch(model)
    log_likelihood(model, [[1, 2], [1, 2]], [[3, 4, 5], [6, 7, 8]], 12)
    masks = [[i == MASK for i in row] for row in shown]
    assert masks[:12] == masks[12:] and len(set(map(tuple, masks))) > 3


def test_an_empty_answer_is_one_sentence():
    with pytest.raises(ValueError, match="at least one token"):
        log_likelihood(tiny(), [[1], [2]], [[3], []], 4)


def test_an_empty_prompt_is_fine_but_where_nothing_scores_the_first_token():
    assert log_likelihood(tiny(), [[]], [[1, 2]], 4).isfinite().all()
    for ask in (lambda: log_likelihood(tiny(shift=True), [[]], [[1, 2]], 4),
                lambda: choose(tiny(shift=True), [[1], []], [[2, 3]] * 2)):
        with pytest.raises(ValueError, match="begin with its BOS"):
            ask()


def test_a_text_too_long_stops_the_first_pass():
    model = tiny()
    shown = watch(model)
    with pytest.raises(ValueError, match="block_size=64"):
        log_likelihood(model, [[1], [2] * 60], [[1, 2], [3] * 5], 4, batch_tokens=1)
    assert len(shown) == 1


def test_nothing_to_ask_gives_nothing():
    assert log_likelihood(tiny(), [], []).shape == (0,)
    assert held_out_losses(tiny(), texts(0, 5), RATES).shape == (0, 4)


# ---- held-out losses of windows ----


@each_wiring
def test_a_loss_is_the_mean_over_masked_tokens_of_minus_log_p(shift):
    windows = texts(3, 9)
    masks = shown_masks(tiny(shift=shift), windows, batch_tokens=30)
    losses, model = held_out_losses(tiny(shift=shift), windows, RATES), tiny(shift=shift)
    assert losses.shape == (3, 4) and losses.dtype == torch.float64
    for (n, ids), (r, t) in itertools.product(enumerate(windows.tolist()), enumerate(RATES)):
        nll = losses_by_hand(model, ids, masks[tuple(ids), t])
        assert losses[n, r].item() == pytest.approx(sum(nll) / len(nll), rel=1e-5)


@pytest.mark.parametrize("T", (2, 3, 12, 64))
def test_counts_are_exact_and_the_first_token_is_given(T):
    rates = (0.001, 0.1, 0.25, 0.5, 0.9, 1)
    for (_, t), mask in shown_masks(tiny(), texts(5, T), rates).items():
        assert not mask[0]
        assert sum(mask) == max(1, math.floor(t * (T - 1) + 0.5))


def test_masks_are_common_to_models_batches_and_subsets_and_change_with_seed_rate_and_window():
    windows = texts(6, 40)
    masks = shown_masks(tiny(), windows)
    for model, settings in ((tiny(seed=1, n_layer=1), dict(batch_tokens=1)),
                            (tiny(shift=True), dict(batch_tokens=333)), (tiny(), {})):
        assert shown_masks(model, windows, **settings) == masks
    some = shown_masks(tiny(), windows[[4, 1]], RATES[::-1])
    assert len(some) == 8 and all(masks[pair] == mask for pair, mask in some.items())
    assert all(shown_masks(tiny(), windows, (0.5,), seed=1)[pair] != masks[pair]
               for pair in masks if pair[1] == 0.5)
    half = {tuple(mask) for (_, t), mask in masks.items() if t == 0.5}
    assert len(half) == 6
    a, b = (shown_masks(tiny(), windows[:1], (t,)) for t in (0.5, 0.5000001))
    assert [*a.values()] != [*b.values()]


def test_places_are_masked_alike():
    counts = torch.zeros(10)
    for mask in shown_masks(tiny(n_layer=1), texts(900, 10), (1 / 3,)).values():
        counts += torch.tensor(mask)
    assert counts[0] == 0 and counts.sum() == 2700
    assert ((counts[1:] - 300).abs() < 5 * 200 ** 0.5).all()    # binomial: 900 * 1/3 * 2/3


def test_a_model_without_opinion_loses_log_v_at_every_rate():
    losses = held_out_losses(tiny(peaked=0.0), texts(4, 30), RATES)
    assert losses.flatten().tolist() == pytest.approx([math.log(VOCAB)] * 16, rel=1e-6)


@each_wiring
def test_a_window_has_the_same_losses_in_any_company(shift):
    model, windows = tiny(shift=shift), texts(7, 33)
    losses = held_out_losses(model, windows, RATES)
    for batch_tokens, which in ((1, [3]), (100, [5, 3, 0]), (1 << 20, [6, 6, 2])):
        again = held_out_losses(model, windows[which], RATES, batch_tokens=batch_tokens)
        torch.testing.assert_close(again, losses[which], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rates", ((), (0.0,), (0.5, 1.01), (-0.1,), (math.nan,), (math.inf,)))
def test_rates_out_of_range_are_one_sentence(rates):
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        held_out_losses(tiny(), texts(1, 5), rates)


def test_windows_of_one_token_are_one_sentence():
    with pytest.raises(ValueError, match="two are the least"):
        held_out_losses(tiny(), texts(3, 1), RATES)


# ---- choices ----


@each_wiring
def test_choices_have_the_log_likelihood_of_answers_of_one_token(shift):
    model, prompts = tiny(shift=shift), [[1], [2, 3, 4], [5] * 30, [6, 7]]
    choices = [[8, 9, 10, 11], [1, 2, 3, 4], [0, 5, 17, 3], [8, 9, 10, 11]]
    for batch_tokens in (1, 20, 1000):
        log_p = choose(model, prompts, choices, batch_tokens)
        assert log_p.shape == (4, 4) and log_p.dtype == torch.float64
        for i, k in itertools.product(range(4), range(4)):
            answer = log_likelihood(model, [prompts[i]], [[choices[i][k]]], 1)
            assert log_p[i, k].item() == pytest.approx(answer.item(), abs=1e-4)


def test_choices_among_all_tokens_sum_to_one_and_a_question_is_one_pass():
    model = tiny()
    shown = watch(model)
    log_p = choose(model, [[1, 2], [3]], [[*range(VOCAB)]] * 2)
    assert log_p.exp().sum(dim=1).tolist() == pytest.approx([1, 1])
    assert shown == [[1, 2, MASK], [3, MASK]]


# ---- the machine ----


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_half_precision_and_other_devices_are_near(device, dtype):
    windows, prompts, answers = texts(3, 20), [[1, 2], [3] * 9], [[4, 5, 6], [7]]
    model = tiny()
    exact = (held_out_losses(model, windows, RATES), log_likelihood(model, prompts, answers, 9),
             choose(model, prompts, [[1, 2, 3, 4]] * 2))
    model = tiny().to(device, dtype)
    model.compute_dtype = dtype
    near = (held_out_losses(model, windows, RATES), log_likelihood(model, prompts, answers, 9),
            choose(model, prompts, [[1, 2, 3, 4]] * 2))
    for a, b in zip(exact, near):
        assert b.device.type == "cpu" and b.dtype == torch.float64 and not b.requires_grad
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.3 if dtype == torch.bfloat16 else 1e-3)


def test_measuring_leaves_the_model_and_the_random_state_as_they_were():
    model, state = tiny(), torch.get_rng_state()
    before = {name: p.clone() for name, p in model.named_parameters()}
    encode, states = model.encode, []
    model.encode = lambda *args: states.append(encode(*args)) or states[-1]
    held_out_losses(model, texts(2, 9), RATES)
    log_likelihood(model, [[1]], [[2, 3]], 4)
    choose(model, [[1]], [[2, 3]])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) and p.grad is None
               for name, p in model.named_parameters())
    assert len(states) == 3 and not any(h.requires_grad for h in states)
    assert torch.is_grad_enabled()


def test_losses_of_rows_of_any_lengths_do_not_depend_on_their_order_or_batch():
    model = tiny()
    rows = [(ids[:4 + n], n % 3) for n, ids in enumerate(texts(9, 12).tolist())]
    losses = losses_of_rows(model, rows, RATES)
    for order in (range(8, -1, -1), (4, 0, 8, 2, 6, 1, 5, 7, 3)):
        again = losses_of_rows(model, [rows[i] for i in order], RATES, batch_tokens=30)
        torch.testing.assert_close(again, losses[list(order)], atol=1e-6, rtol=1e-5)
    sizes, encode = [], model.encode
    model.encode = lambda xt, *rest: sizes.append(xt.numel()) or encode(xt, *rest)
    losses_of_rows(model, rows, RATES, batch_tokens=30)
    assert max(sizes) <= 30
