"""Laws of revealing: both published samplers token by token, infilling, caches, what is sure."""
import itertools
import math
from dataclasses import replace

import pytest
import torch

from helpers import answer, seeded, tiny_model, write_checkpoint
from model import DLLM
from pretrained.tokenizer import byte_tokenizer, load_tokenizer
from sample import SampleConfig, complete, complete_gaps, infill, load_model
from sampling.cost import Cost
from sampling.prompts import ends_of, never_of
from sampling.reader import DelayedFlag, Reader
from sampling.reveal import Sampling, Schedule, dream_schedule, keep_likeliest, propose

VOCAB, EOT, EOS, MASK = 40, 37, 38, 39
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
PROMPTS = [[1], [2, 3, 4, 5, 6], [7] * 11, [8, 9]]


def tiny(bias=None, **config):
    return tiny_model(bias, **{"block_size": 96, **config})


def reader_at(start, model, is_real, slots, s):
    reader = Reader(model, s)
    reader.begin(is_real, slots, start)
    return reader


# ---- LLaDA's sampler, whole batches, as published ----


@torch.no_grad()
def llada(model, prompt, is_real, gen_length, block_length, steps, temperature, cfg_scale,
          remasking, generator, end_tokens):
    """LLaDA's algorithm over a batch padded at the left, every number for every token, in fp64.

    The mask id is forbidden, as in ours; end tokens are suppressed at temperature > 0 too.
    """
    B, P = prompt.shape
    x = torch.cat([prompt, torch.full((B, gen_length), MASK)], dim=1)
    is_real = torch.cat([is_real, torch.ones(B, gen_length, dtype=torch.bool)], dim=1)
    given = x != MASK
    per_block = steps // (gen_length // block_length)
    for start in range(P, P + gen_length, block_length):
        end = start + block_length
        n_masks = (x[:, start:end] == MASK).sum(dim=1)
        for step in range(per_block):
            if cfg_scale:
                free = model(torch.where(given, MASK, x), is_real)
                logits = free + (cfg_scale + 1) * (model(x, is_real) - free)
            else:
                logits = model(x, is_real)
            logits = logits.double()
            logits[..., MASK] = -math.inf
            if end_tokens == "never":
                logits[..., EOS] = -math.inf
            noisy = logits
            if temperature:
                u = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
                noisy = logits.exp() / (-u.log()) ** temperature
            proposal = noisy.argmax(dim=-1)
            if end_tokens == "last":
                logits[..., [EOS, EOT]] = -math.inf
            if remasking == "random":
                confidence = torch.rand(B, x.shape[1], generator=generator).double()
            else:
                confidence = logits.softmax(dim=-1).gather(-1, proposal[..., None])[..., 0]
            confidence[:, end:] = -math.inf
            confidence[x != MASK] = -math.inf
            for b in range(B):
                n = int(n_masks[b]) // per_block + (step < int(n_masks[b]) % per_block)
                best = confidence[b].argsort(descending=True, stable=True)[:n]
                x[b, best] = proposal[b, best]
    return x[:, P:]


def left_padded(prompts):
    P = max(map(len, prompts))
    ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts])
    return ids, torch.arange(P) >= torch.tensor([[P - len(p)] for p in prompts])


CASES = [dict(), dict(block_length=4), dict(block_length=8, steps=4), dict(cfg_scale=0.5),
         dict(cfg_scale=2.0, block_length=4), dict(end_tokens="last"), dict(end_tokens="never"),
         dict(end_tokens="last", cfg_scale=1.0), dict(temperature=0.7), dict(remasking="random"),
         dict(temperature=1.0, remasking="random", block_length=4), dict(steps=5),
         dict(temperature=1.0, cfg_scale=1.0), dict(temperature=0.7, end_tokens="last")]
BATCHES = [[PROMPT], [PROMPT, PROMPT[::-1], PROMPT[2:] + [0, 0]], PROMPTS]


@pytest.mark.parametrize("prompts", BATCHES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sampler_is_lladas_token_for_token(case, prompts):
    """With one generator it draws the very numbers that LLaDA's code draws."""
    s = {**dict(gen_length=16, block_length=16, steps=8, temperature=0.0, cfg_scale=0.0,
                remasking="low_confidence", end_tokens="allowed"), **case}
    changed = False
    for seed in range(4):
        model = tiny(seed=seed, peaked=6.0, bias={EOS: 3.0, EOT: 3.0})
        ids, is_real = left_padded(prompts)
        theirs = llada(model, ids, is_real, generator=seeded(seed), **s)
        ours = answer(model, prompts, **s, generator=seeded(seed), ends=(EOS, EOT)
                        if s["end_tokens"] == "last" else (EOS,))
        assert torch.equal(ours, theirs), seed
        plain = answer(model, prompts, 16, s["block_length"], s["steps"])
        changed |= case == {} or not torch.equal(ours, plain) or "block_length" in case or (
            "steps" in case)
    assert changed, "the setting does nothing"


@pytest.mark.parametrize("more", [dict(), dict(temperature=1.0), dict(cache="dual")], ids=str)
def test_prompts_padded_on_any_side_are_those_without_their_padding(more):
    def answers(prompts, **is_real):
        return answer(tiny(), prompts, 12, 4, 6, generator=seeded(), **more, **is_real)
    ids, is_real = left_padded(PROMPTS)
    expected = answers(PROMPTS)
    assert torch.equal(answers(ids, is_real=is_real), expected)
    assert torch.equal(answers(ids.numpy(), is_real=is_real.long()), expected)  # transformers' mask
    assert torch.equal(answers(ids.flip(1), is_real=is_real.flip(1)),
                       answers([prompt[::-1] for prompt in PROMPTS]))


def test_end_tokens_last_means_after_all_others():
    model = tiny(peaked=1.0, bias={EOS: 9.0})
    states = []
    answer(model, [PROMPT], 16, 16, 16, ends=(EOS,), end_tokens="last",
             on_step=lambda x, p: states.append(x[0].clone()))
    ended = [(x == EOS).any().item() for x in states]
    masked = [(x == MASK).sum().item() for x in states]
    others = 16 - (states[-1] == EOS).sum().item()
    assert ended.index(True) == others + 1 if True in ended else others == 16
    assert masked == list(range(16, -1, -1))


@pytest.mark.parametrize("more", [
    dict(), dict(remasking="maskgit_plus"), dict(remasking="topk_margin"),
    dict(remasking="entropy"), dict(remasking="maskgit_plus", alg_temp=0.5)], ids=str)
def test_end_tokens_last_are_less_sure_than_all_others(more):
    s = Sampling(16, 16, 16, end_tokens="last", **more)
    logits = torch.randn(200, 16, VOCAB, generator=seeded())
    logits[..., EOS] += 2.0
    token, confidence, logp = propose(
        logits, s, lambda: torch.rand(200, 16, generator=seeded(1)), torch.tensor([EOS]))
    is_end = token == EOS
    assert 0.2 < is_end.float().mean() < 0.8
    assert (confidence.masked_fill(~is_end, -math.inf).amax(dim=1)
            < confidence.masked_fill(is_end, math.inf).amin(dim=1)).all()
    by_model = logits.log_softmax(dim=-1).gather(-1, token[..., None])[..., 0]
    assert torch.allclose(logp, by_model, atol=1e-5)        # the p that is shown


def test_what_ends_a_text_is_by_default_the_models_end_of_text():
    model, cost = tiny(bias={EOS: 30.0}), Cost()
    assert (answer(model, [PROMPT], 8, 8, 8) == EOS).all()
    assert not (answer(model, [PROMPT], 8, 8, 8, end_tokens="never") == EOS).any()
    answer(model, [PROMPT], 8, 4, 8, stop=True, cost=cost)
    assert (cost.passes, cost.tokens) == (4, 1)


def test_end_tokens_never_holds_for_gaps_too():
    s = Sampling(4, 4, 4, end_tokens="never")
    [text] = infill(tiny(bias={EOS: 90.0, EOT: 80.0}), [[1, MASK, 2]], s, ends=(EOS, EOT))
    assert text[1] not in (EOS, EOT, MASK)


# ---- Dream's ----


@torch.no_grad()
def dream(model, prompt, n, steps, alg, temperature=0.0, top_p=1.0, top_k=0):
    """Dream's algorithm for one prompt, greedy in its choice of positions (alg_temp 0)."""
    x = torch.tensor([prompt + [MASK] * n])
    times = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
    for i in range(steps):
        t, s = times[i].item(), times[i + 1].item()
        is_masked = x[0] == MASK
        raw = model.head(model.encode(x))[0]                                # no shift yet
        logits = torch.cat([raw[:1], raw[:-1]])[is_masked].float()
        logits[:, MASK] = -math.inf
        if temperature:
            logits = logits / temperature
        if top_p < 1:
            ranked, order = logits.sort(descending=True)
            over = ranked.softmax(-1).cumsum(-1) > top_p
            over = torch.cat([torch.zeros(len(over), 1, dtype=torch.bool), over[:, :-1]], dim=1)
            logits = logits.masked_fill(torch.zeros_like(over).scatter(1, order, over), -math.inf)
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
        probs = logits.softmax(-1)
        p, token = probs.max(dim=-1)
        if alg == "topk_margin":
            ranked = probs.sort(descending=True).values
            p = ranked[:, 0] - ranked[:, 1]
        if alg == "entropy":
            p = (probs * probs.clamp(min=1e-10).log()).sum(-1)
        m = int(is_masked.sum())
        k = int(m * (1 - s / t)) if i < steps - 1 else m
        places = is_masked.nonzero()[:, 0]
        best = p.argsort(descending=True, stable=True)[:k]
        x[0, places[best]] = token[best]
    return x[0, len(prompt):].tolist()


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("more", [dict(), dict(top_p=0.6), dict(top_k=3), dict(top_p=0.8, top_k=5)],
                         ids=str)
def test_greedy_dream_is_dreams_token_for_token(alg, more):
    for seed in range(4):
        model = tiny(seed=seed, peaked=5.0, shift=True, qkv_bias=True)
        for steps in (16, 8, 5):
            theirs = dream(model, PROMPT, 16, steps, alg, **more)
            ours = answer(model, [PROMPT], 16, 16, steps, remasking=alg, **more)[0].tolist()
            assert ours == theirs, (seed, steps)


def test_the_orders_differ_from_each_other():
    model = tiny(peaked=5.0)
    when = {}
    for alg in ("low_confidence", "maskgit_plus", "topk_margin", "entropy"):
        states = []
        answer(model, [PROMPT], 16, 16, 16, remasking=alg, top_k=3,
                 on_step=lambda x, p: states.append(x[0] == MASK))
        when[alg] = tuple(torch.stack(states).sum(dim=0).tolist())
    assert len(set(when.values())) == 4


def test_dreams_schedule_reveals_none_first_and_two_last_with_a_pass_a_token():
    assert dream_schedule(256, 256) == [0, *[1] * 254, 2]
    for n, passes in itertools.product(range(1, 40), range(1, 40)):
        assert sum(dream_schedule(n, passes)) == n


def test_origin_reveals_each_mask_with_the_share_of_time_that_passes():
    """1 - s / t of the masks, each by itself: the mean over 800 rows, pass by pass."""
    n_rows, passes, n = 800, 8, 16
    states = []
    generators = [seeded(b) for b in range(n_rows)]
    answer(tiny(), [[1, 2]] * n_rows, n, n, passes, remasking="origin", generator=generators,
             on_step=lambda x, p: states.append((x == MASK).sum(dim=1)))
    left = torch.stack(states).double()
    assert (left[-1] == 0).all()
    assert len(set(left[4].tolist())) > 3                   # chance, not a quota
    for step in range(passes - 1):
        t, s = (1 - (1 - 1e-3) * i / passes for i in (step, step + 1))
        expected = n * s
        assert abs(left[step + 1].mean() - expected) < 4 * math.sqrt(n * s * (1 - s) / n_rows) + .02
    assert sum(dream_schedule(16, 8)) == 16


def test_alg_temp_draws_places_without_replacement_by_their_softmax():
    """Which of three places is first, against softmax(confidence / alg_temp)."""
    logits = torch.zeros(1, 3, 5)
    logits[0, :, 0] = torch.tensor([3.0, 2.0, 0.5])
    s = Sampling(3, 3, 3, remasking="maskgit_plus", alg_temp=0.3)
    p = logits.softmax(dim=-1)[0, :, 0]
    expected = (p / 0.3).softmax(dim=0)
    counts, n, generator = torch.zeros(3), 6000, seeded(1)
    for _ in range(n):
        _, confidence, _ = propose(logits, s, lambda: torch.rand(1, 3, generator=generator),
                                   torch.tensor([], dtype=torch.long))
        counts[confidence[0].argmax()] += 1
    sigma = (n * expected * (1 - expected)).sqrt()
    assert ((counts - n * expected).abs() < 4 * sigma).all()


def test_top_p_keeps_the_token_that_reaches_it_and_top_k_so_many():
    logits = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]]).log()
    def kept(**more):
        return keep_likeliest(logits, Sampling(4, 4, 4, **more)).isfinite()[0, 0].tolist()
    assert kept() == [True] * 4
    assert kept(top_p=0.4) == [True, False, False, False]
    assert kept(top_p=0.7) == [True, True, False, False]
    assert kept(top_p=0.9) == [True, True, True, False]
    assert kept(top_k=1) == [True, False, False, False] and kept(top_k=99) == [True] * 4
    assert kept(top_p=0.9, top_k=2) == [True, True, False, False]
    assert kept(top_p=0.7, temperature=9.0) == [True, True, True, False]    # of flatter numbers


# ---- infilling ----


def texts_with_gaps():
    return [[1, 2, MASK, 4, MASK, MASK, 7, 8, 9, MASK], [MASK, 5, MASK], [3, *[MASK] * 4]]


def test_gaps_are_filled_and_what_was_given_stays():
    for block_length, steps in ((4, 4), (2, 2), (1, 1), (4, 2)):
        texts = texts_with_gaps()
        filled = infill(tiny(), texts, Sampling(block_length, block_length, steps))
        for text, after in zip(texts, filled):
            assert len(text) == len(after) and MASK not in after
            assert all(a == b for a, b in zip(text, after) if a != MASK)


def test_texts_with_gaps_come_out_as_they_would_alone():
    for more in (dict(), dict(temperature=1.0), dict(cfg_scale=1.0), dict(remasking="origin")):
        for length in (3, 4):
            s = Sampling(length, length, length, **more)
            texts = texts_with_gaps()
            together = infill(tiny(peaked=4.0), texts, s, [seeded(b) for b in range(3)])
            alone = [infill(tiny(peaked=4.0), [text], s, [seeded(b)])[0]
                     for b, text in enumerate(texts)]
            assert together == alone


def test_a_gap_at_the_end_is_what_generate_fills():
    model = tiny()
    for prompt in (PROMPT, [1]):
        [text] = infill(model, [prompt + [MASK] * 12], Sampling(12, 4, 6))
        assert text[len(prompt):] == answer(model, [prompt], 12, 4, 6)[0].tolist()


def test_a_text_may_fill_the_model_to_its_last_token():
    texts = [[MASK] * 96, [1] * 95 + [MASK]]
    filled = infill(tiny(), texts, Sampling(40, 40, 4))
    assert [len(text) for text in filled] == [96, 96] and MASK not in filled[0] + filled[1]


@pytest.mark.parametrize("text, shift", [([1, 2, 3], False), ([], False), ([MASK, 1], True)])
def test_a_text_that_cannot_be_filled_is_one_sentence(text, shift):
    with pytest.raises(ValueError, match="needs a mask"):
        infill(tiny(shift=shift), [[1, MASK], text], Sampling(4, 4, 4))


@pytest.mark.parametrize("block_length, steps", [(97, 97), (2 ** 31, 1), (2 ** 62, 2 ** 62)])
def test_a_block_that_no_text_can_have_is_told_at_once(block_length, steps):
    with pytest.raises(ValueError, match=f"block_length={block_length} exceeds block_size=96"):
        infill(tiny(), [[1, MASK]], Sampling(block_length, block_length, steps))


def test_a_written_text_is_filled_at_its_masks():
    tok = byte_tokenizer()
    model = tiny(vocab_size=tok.n_vocab, mask_id=tok.mask_id, eos_id=tok.eos_id)
    cfg = SampleConfig(gen_length=4, block_length=4, steps=4, device="cpu")
    text = complete_gaps(model, tok, "ab[MASK]c[MASK][MASK]", cfg)
    plain = tok.show(infill(model, [[*b"ab", tok.mask_id, *b"c", tok.mask_id, tok.mask_id]], cfg,
                            never=never_of(model, tok))[0])
    assert text == plain and text.startswith("ab") and "\u2591" not in text


# ---- caches ----


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("shift", [False, True])
def test_with_one_pass_a_block_a_cache_changes_nothing(cache, shift):
    """The pass that fills the cache is a full one."""
    model = tiny(shift=shift)
    for block in (1, 2, 4, 12):
        args = model, PROMPTS, 12, block, 12 // block
        assert torch.equal(answer(*args, cache=cache), answer(*args))


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("more", [dict(), dict(cfg_scale=1.5), dict(shift=True, qkv_bias=True),
                                  dict(n_kv_head=4, qk_norm=True), dict(shift=True, cfg_scale=1.0),
                                  dict(window=3), dict(shift=True, cfg_scale=1.0, window=1)],
                         ids=str)
def test_right_after_a_refresh_a_cached_pass_gives_the_same_logits(cache, more):
    settings = {key: more[key] for key in ("cfg_scale", "window") if key in more}
    model = tiny(peaked=1.0, **{key: more[key] for key in more.keys() - settings.keys()})
    s = Sampling(12, 4, 12, cache=cache, **settings)
    texts = [prompt + [MASK] * 12 for prompt in PROMPTS]
    T = max(map(len, texts))
    x = torch.tensor([text + [MASK] * (T - len(text)) for text in texts])
    x[:, 0] = 7
    is_real = torch.arange(T) < torch.tensor([[len(text)] for text in texts])
    slots = torch.tensor([[len(prompt) + i for i in range(12)] for prompt in PROMPTS])
    for start in (0, 4, 8):
        where, places = slots[:, start:start + 4], torch.arange(4).expand(4, 4)
        with torch.no_grad():
            reader = reader_at(start, model, is_real, slots, s)
            full = reader.logits(x, where, places)
            again = reader.logits(x, where, places)
            some = reader.logits(x, where[:, [2, 0]], places[:, [2, 0]])
        assert torch.allclose(full, again, atol=1e-5), (full - again).abs().max()
        assert torch.allclose(full[:, [2, 0]], some, atol=1e-5)


def test_a_cached_pass_sees_the_tokens_of_its_block_as_they_are_now():
    model = tiny(peaked=1.0, n_layer=1)
    s = Sampling(8, 8, 8, cache="dual")
    x = torch.tensor([PROMPT + [MASK] * 8])
    is_real, slots = torch.ones(1, 16, dtype=torch.bool), torch.arange(8, 16)[None]
    where, places = slots, torch.arange(8)[None]
    with torch.no_grad():
        reader = reader_at(0, model, is_real, slots, s)
        reader.logits(x, where, places)
        x[0, 9] = 5                                     # in one layer keys depend on tokens alone
        assert torch.allclose(reader.logits(x, where, places), model(x)[:, 8:], atol=1e-5)


def test_the_dual_cache_computes_the_block_alone_and_the_prefix_cache_what_follows_too():
    for shift, cache, expected in ((False, "dual", 4), (True, "dual", 5), (False, "prefix", None)):
        model, widths = tiny(shift=shift), []
        block = model.blocks[0].forward
        model.blocks[0].forward = lambda x, *rest: widths.append(x.shape[1]) or block(x, *rest)
        answer(model, [PROMPT], 12, 4, 12, cache=cache)
        assert widths[0] == widths[4] == widths[8] == 20
        if expected:
            assert set(widths[1:4] + widths[5:8] + widths[9:]) == {expected}
        else:
            assert widths[1:4] + widths[5:8] + widths[9:] == [12] * 3 + [8] * 3 + [4] * 3


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_rows_with_a_cache_come_out_as_they_would_alone(cache):
    for more in (dict(), dict(threshold=0.5), dict(cfg_scale=0.5), dict(temperature=1.0)):
        for shift in (False, True):
            model = tiny(shift=shift, peaked=5.0)
            generators = [[seeded(b) for b in range(4)] for _ in range(2)]
            x = answer(model, PROMPTS, 12, 4, 12, cache=cache, generator=generators[0], **more)
            for b, prompt in enumerate(PROMPTS):
                alone = answer(model, [prompt], 12, 4, 12, cache=cache,
                                 generator=[generators[1][b]], **more)
                assert torch.equal(x[b:b + 1], alone)


# ---- a window ----


@torch.no_grad()
def windowed(model, prompt, n, block_length, window):
    """Reveal one token a pass, greedily, from a text cut `window` masks after the block."""
    x = torch.tensor([prompt + [MASK] * n])
    for start in range(len(prompt), len(prompt) + n, block_length):
        end = start + block_length
        for _ in range(block_length):
            logits = model(x[:, :end + window])[0, start:end]
            logits[:, MASK] = -math.inf
            p, token = logits.softmax(dim=-1).max(dim=-1)
            p[x[0, start:end] != MASK] = -1.0
            x[0, start + p.argmax()] = token[p.argmax()]
    return x[0, len(prompt):].tolist()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("window", [1, 3, 4, 7])
def test_a_window_is_a_text_cut_behind_the_block_and_its_masks(window, shift):
    n_differ = 0
    for seed in range(3):
        model = tiny(seed=seed, peaked=2.0, shift=shift)
        x = answer(model, PROMPTS, 12, 4, 12, window=window)
        for b, prompt in enumerate(PROMPTS):
            assert x[b].tolist() == windowed(model, prompt, 12, 4, window)
        n_differ += not torch.equal(x, answer(model, PROMPTS, 12, 4, 12))
    assert n_differ


@pytest.mark.parametrize("more", [dict(), dict(cfg_scale=1.0), dict(temperature=1.0)], ids=str)
def test_a_window_over_all_that_follows_changes_nothing(more):
    model = tiny(peaked=5.0)
    for cache in ("none", "prefix", "dual"):
        for block_length, windows in ((4, (8, 9, 2 ** 63)), (12, (1,))):
            def answers(cache=cache, block_length=block_length, **window):
                return answer(model, PROMPTS, 12, block_length, 12, cache=cache, **more, **window,
                              generator=[seeded(b) for b in range(4)])
            assert all(torch.equal(answers(window=n), answers()) for n in windows)


@pytest.mark.parametrize("more", [
    dict(cache="prefix"), dict(cache="dual", shift=True), dict(cfg_scale=1.0), dict(threshold=0.3),
    dict(cache="dual", cfg_scale=1.0, threshold=0.3, temperature=1.0),
    dict(stop=True, temperature=1.0, ends=(EOS, 6))], ids=str)
def test_rows_with_a_window_come_out_as_they_would_alone(more):
    model, more = tiny(peaked=5.0, shift=more.get("shift", False)), dict(more)
    more.pop("shift", None)
    def answers(prompts, first=0):
        generator = [seeded(first + b) for b in range(len(prompts))]
        return answer(model, prompts, 12, 4, 12, window=2, generator=generator, **more)
    together = answers(PROMPTS)
    for b, prompt in enumerate(PROMPTS):
        assert torch.equal(answers([prompt], first=b)[0], together[b])


@pytest.mark.parametrize("cache, widths", [
    ("none", [14] * 4 + [18] * 4 + [20] * 4), ("dual", [14, 4, 4, 4, 18, 4, 4, 4, 20, 4, 4, 4]),
    ("prefix", [14, 6, 6, 6, 18, 6, 6, 6, 20, 4, 4, 4])])
def test_a_pass_with_a_window_computes_no_more_than_that(cache, widths):
    model, found = tiny(), []
    block = model.blocks[0].forward
    model.blocks[0].forward = lambda x, *rest: found.append(x.shape[1]) or block(x, *rest)
    answer(model, [PROMPT], 12, 4, 12, cache=cache, window=2)
    assert found == widths


@pytest.mark.parametrize("more", [dict(window=2), dict(cache="dual")], ids=str)
def test_gaps_anywhere_go_without_what_needs_one_run_of_masks(more):
    [(name, value)] = more.items()
    with pytest.raises(ValueError, match=f"{name}={value}.* gaps anywhere need cache=none and win"):
        infill(tiny(), [[1, MASK, 2]], Sampling(4, 4, 4, **more))


# ---- what is sure ----


def probabilities(**more):
    """How many tokens each pass reveals in a row, and the least p of them."""
    states, ps = [], []
    model = tiny(peaked=more.pop("peaked", 60.0), seed=more.pop("seed", 0))
    answer(model, [PROMPT], 16, 16, 16, on_step=lambda x, p: (states.append(x[0] == MASK),
                                                               ps.append(p[0].clone())), **more)
    for before, after, p in zip(states, states[1:], ps[1:]):
        yield p[before & ~after].tolist()


def test_a_threshold_reveals_all_that_is_sure_and_the_surest_if_nothing_is():
    seen = []
    for seed in range(6):
        for tau in (0.3, 0.6, 0.9):
            for revealed in probabilities(threshold=tau, seed=seed):
                assert len(revealed) >= 1
                assert len(revealed) == 1 or min(revealed) >= tau - 1e-6
                seen.append(len(revealed))
    assert max(seen) > 2 and min(seen) == 1
    assert all(len(revealed) == 1 for revealed in probabilities(threshold=1.0, peaked=1.0))


def test_a_factor_reveals_n_if_n_plus_1_doubts_are_below_it():
    seen = []
    for seed in range(6):
        for f in (0.5, 1.0, 2.0):
            for revealed in probabilities(factor=f, seed=seed):
                ranked = sorted(revealed, reverse=True)
                assert len(ranked) == 1 or all((n + 1) * (1 - p) < f + 1e-5
                                               for n, p in enumerate(ranked, 1))
                seen.append(len(revealed))
    assert max(seen) > 2


def passes_at_p(p, **more):
    """The passes over 8 tokens that all have this probability: 1 / p tokens are equally likely."""
    cost, model = Cost(), tiny(peaked=0.0, bias={i: 1e4 for i in range(round(1 / p))})
    answer(model, [PROMPT], 8, 8, 8, cost=cost, **more)
    return cost.passes


@pytest.mark.parametrize("p", [1.0, 0.5, 0.25, 0.125])
def test_a_threshold_that_is_met_exactly_reveals(p):
    assert passes_at_p(p, threshold=p) == 1
    assert passes_at_p(p, threshold=p - 1e-6) == 1
    if p < 1:
        assert passes_at_p(p, threshold=p + 1e-6) == 8


def test_a_factor_that_is_met_exactly_reveals_one_less():
    """At p = 1/2 n tokens have (n + 1) / 2: 1, 3/2, 2 ..."""
    assert passes_at_p(0.5, factor=1.5) == 8
    assert passes_at_p(0.5, factor=1.5 + 1e-6) == 4
    assert passes_at_p(0.5, factor=4.5) == 2 and passes_at_p(0.5, factor=4.5 + 1e-6) == 1


@pytest.mark.parametrize("more", [dict(), dict(threshold=0.9), dict(factor=0.1), dict(steps=4),
                                  dict(remasking="origin"), dict(cache="dual", threshold=1.0)],
                         ids=str)
def test_noise_differs_between_blocks_places_and_seeds_and_comes_again_with_the_seed(more):
    """Twenty tokens are equally likely everywhere: all that differs is drawn."""
    model = tiny(peaked=0.0, bias={i: 1e4 for i in range(20)})
    x = answer(model, [[1]] * 4, **{**dict(gen_length=32, block_length=8, steps=32), **more},
               temperature=1.0, generator=[seeded(n) for n in (0, 0, 1, 2)])
    assert torch.equal(x[0], x[1])
    blocks = x[1:].reshape(12, 8).tolist()
    assert len(set(map(tuple, blocks))) == 12
    assert all(len(set(block)) > 2 for block in blocks)


def test_a_threshold_no_token_reaches_is_the_exact_sampler_with_a_pass_a_token():
    model = tiny(peaked=2.0)
    for cache in ("none", "dual", "prefix"):
        x = answer(model, PROMPTS, 12, 4, 12, threshold=1.0, cache=cache)
        assert torch.equal(x, answer(model, PROMPTS, 12, 4, 12, cache=cache))


def test_steps_do_not_matter_to_a_threshold():
    model = tiny(peaked=60.0)
    some = [answer(model, PROMPTS, 12, 4, steps, threshold=0.5) for steps in (3, 6, 12)]
    assert torch.equal(some[0], some[1]) and torch.equal(some[0], some[2])


@pytest.mark.parametrize("shift", [False, True])
def test_rows_with_a_threshold_come_out_as_they_would_alone(shift):
    for more in (dict(threshold=0.4), dict(factor=1.0), dict(threshold=0.4, temperature=0.5)):
        model = tiny(shift=shift, peaked=60.0)
        x = answer(model, PROMPTS, 12, 6, 12, generator=[seeded(b) for b in range(4)], **more)
        assert not (x == MASK).any()
        for b, prompt in enumerate(PROMPTS):
            alone = answer(model, [prompt], 12, 6, 12, generator=[seeded(b)], **more)
            assert torch.equal(x[b:b + 1], alone)


def logits_of_doubts(doubts, top=40.0):
    """(1, n, VOCAB): place n gives token n the probability 1 - doubts[n], at a logit of `top`."""
    logits = torch.full((1, len(doubts), VOCAB), top - 60)
    for n, doubt in enumerate(doubts):
        logits[0, n, n] = top
        logits[0, n, n + 10] = top + math.log(doubt) - math.log1p(-doubt)
    return logits


DOUBTS = (2.65e-6, 2.1e-6), (1.09e-6, 6e-9), (2.1e-6, 2.65e-6), (4e-7, 1e-6), (1e-5, 9e-6)


TOPS = 0.0, 40.0, 1e3, -1e3         # offsets of the logits


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("doubts", DOUBTS, ids=str)
def test_of_two_places_the_one_with_the_smaller_doubt_is_revealed_first(doubts, top):
    model, states = tiny(), []
    model.unembed = lambda h, where: logits_of_doubts(doubts, top)[:, where[1][0] - len(PROMPT)]
    answer(model, [PROMPT], 2, 2, 2, on_step=lambda x, p: states.append(x[0] == MASK))
    assert states[1].tolist() == [doubts[0] < doubts[1], doubts[0] > doubts[1]][::-1]


@pytest.mark.parametrize("end_tokens", ["allowed", "last"])
@pytest.mark.parametrize("remasking", ["low_confidence", "maskgit_plus"])
def test_the_smaller_doubt_is_the_higher_confidence_at_any_offset(remasking, end_tokens):
    s = Sampling(2, 2, 2, remasking=remasking, end_tokens=end_tokens)
    for doubts, top in itertools.product(DOUBTS, TOPS):
        logits = logits_of_doubts(doubts, top)
        token, confidence, logp = propose(logits, s, None, torch.tensor([EOS]))
        assert token.tolist() == [[0, 1]]
        for scores in (confidence, logp):
            assert (scores[0, 0] > scores[0, 1]) == (doubts[0] < doubts[1])


# ---- the end ----


def test_after_the_block_of_its_end_a_row_is_left_alone_and_the_text_is_the_same():
    stopped = 0
    for seed in range(6):
        model = tiny(seed=seed, peaked=3.0, bias={EOS: 4.0})
        whole = answer(model, PROMPTS, 24, 4, 24, ends=(EOS,))
        cost = Cost()
        x = answer(model, PROMPTS, 24, 4, 24, ends=(EOS,), stop=True, cost=cost)
        for ours, exact in zip(x.tolist(), whole.tolist()):
            end = exact.index(EOS) if EOS in exact else 24
            assert ours[:end] == exact[:end] and MASK not in ours
            last = (end // 4 + 1) * 4
            assert all(token == EOS for token in ours[last:])
        stopped += cost.row_passes < 4 * 24
        ends = [row.index(EOS) + 1 if EOS in row else 24 for row in whole.tolist()]
        assert cost.tokens == sum(ends)
        assert cost.row_passes == sum(-(-end // 4) * 4 for end in ends)
        assert cost.passes == -(-max(ends) // 4) * 4
    assert stopped


def test_the_cost_counts_passes_and_tokens_and_no_prompt():
    cost, model = Cost(), tiny()
    answer(model, [PROMPT * 5, [1]], 12, 12, 6, cost=cost)
    assert (cost.passes, cost.row_passes, cost.tokens) == (6, 12, 24)
    answer(model, [PROMPT], 12, 12, 6, cost=cost)
    assert (cost.passes, cost.row_passes, cost.tokens) == (12, 18, 36)
    assert cost.numbers()["tokens_per_pass"] == 2.0
    assert "12 passes, 2.0 tokens per pass" in cost.line()


def test_a_flag_on_the_cpu_is_read_at_once():
    flag = DelayedFlag()
    assert flag.read(torch.tensor(True)) is True and flag.read(torch.tensor(False)) is False


# ---- bad input ----


def broken(logits, how):
    """Logits with what broken weights leave: at one token or all, at one place or all."""
    return {"nan": lambda: logits * math.nan, "no token": lambda: logits - math.inf,
            "inf": lambda: logits.index_fill(-1, torch.tensor([3]), math.inf),
            "one nan": lambda: logits.where(logits != logits.max(), math.nan)}[how]()


@pytest.mark.parametrize("how", ["nan", "inf", "no token", "one nan"])
@pytest.mark.parametrize("more", [
    dict(), dict(temperature=1.0), dict(threshold=0.5), dict(factor=1.0), dict(remasking="random"),
    dict(remasking="origin"), dict(remasking="entropy", alg_temp=0.5), dict(cfg_scale=1.0),
    dict(remasking="topk_margin"), dict(cache="dual"), dict(top_p=0.5), dict(end_tokens="last"),
    dict(stop=True)], ids=str)
def test_logits_that_are_not_finite_are_one_sentence(how, more):
    model = tiny()
    unembed = model.unembed
    model.unembed = lambda h, where=None: broken(unembed(h, where), how)
    with pytest.raises(ValueError, match="logits are not finite") as error:
        answer(model, PROMPTS, 8, 4, 4, generator=[seeded(b) for b in range(4)], **more)
    assert len(str(error.value).splitlines()) == 1
    assert ("cfg_scale=1.0 is too large" in str(error.value)) == ("cfg_scale" in more)


def test_a_row_without_a_token_that_may_be_revealed_is_one_sentence():
    with pytest.raises(ValueError, match="no token may be revealed"):
        answer(tiny(), [PROMPT], 4, 4, 4, never=range(VOCAB))


@pytest.mark.parametrize("peaked", [1.0, 2000.0])
@pytest.mark.parametrize("more", [
    dict(temperature=1e9), dict(temperature=1e-9, top_p=0.5), dict(cfg_scale=1e9),
    dict(cfg_scale=1e-9), dict(factor=1e9), dict(factor=1e-9), dict(threshold=5e-324),
    dict(top_k=10 ** 30), dict(top_p=5e-324), dict(top_p=1 - 1e-16),
    dict(remasking="maskgit_plus", alg_temp=1e9), dict(remasking="entropy", alg_temp=1e-9),
    dict(remasking="topk_margin", alg_temp=1e-9, temperature=1e-9)], ids=str)
def test_the_ends_of_what_settings_allow_give_tokens_and_probabilities(more, peaked):
    seen = []
    x = answer(tiny(peaked=peaked), PROMPTS, 8, 4, 4, generator=[seeded(b) for b in range(4)],
               on_step=lambda x, p: seen.append(p.clone()), **more)
    assert not (x == MASK).any()
    assert all(((p >= 0) & (p <= 1)).all() for p in seen)


@pytest.mark.parametrize("settings, named", [
    (dict(temperature=-1.0), "temperature=-1.0"), (dict(top_p=0.0), "top_p=0.0"),
    (dict(window=-1), "window=-1"), (dict(graphs=True), "graphs=True needs a CUDA GPU"),
    (dict(temperature=1e308), "temperature=1e+308"), (dict(cfg_scale=1e308), "cfg_scale=1e+308"),
    (dict(temperature=1e-320), "temperature=1e-320"), (dict(factor=1e20), "factor=1e+20"),
    (dict(alg_temp=1e-10, remasking="entropy"), "alg_temp=1e-10"), (dict(top_p=math.nan), "top_p"),
    (dict(cfg_scale=math.inf), "cfg_scale=inf"), (dict(threshold=math.nan), "threshold=nan"),
    (dict(gen_length=2 ** 31, block_length=2 ** 31, steps=2 ** 31), "gen_length=2147483648"),
    (dict(gen_length=2 ** 62, block_length=1, steps=2 ** 62), "gen_length=4611686018427387904"),
    (dict(top_p=1.5), "top_p=1.5"), (dict(top_k=-1), "top_k=-1"), (dict(alg_temp=-0.1), "alg_temp"),
    (dict(cfg_scale=-1.0), "cfg_scale=-1.0"), (dict(threshold=1.1), "threshold=1.1"),
    (dict(threshold=-0.1), "threshold=-0.1"), (dict(factor=-1.0), "factor=-1.0"),
    (dict(threshold=0.5, factor=1.0), "factor=1.0"),
    (dict(temperature=math.nan), "temperature=nan"),
    (dict(threshold=0.5, remasking="entropy"), "entropy"),
    (dict(factor=0.5, remasking="random"), "random"), (dict(gen_length=10), "block_length=4"),
    (dict(temperature=1.0), "temperature=1.0"), (dict(remasking="random"), "random"),
    (dict(remasking="origin"), "origin"), (dict(alg_temp=0.5), "alg_temp=0.5"),
    (dict(alg_temp=0.5, remasking="entropy"), "alg_temp=0.5"),
    (dict(alg_temp=0.5, remasking="origin", generator=seeded()), "alg_temp=0.5"),
    (dict(alg_temp=0.5, remasking="maskgit_plus", threshold=0.9, generator=seeded()), "threshold"),
    (dict(remasking="low confidence"), "low_confidence, random"), (dict(cache="duel"), "dual"),
    (dict(end_tokens="first"), "never"), (dict(temperature=1.0, generator=[seeded()] * 2), "2 gen"),
    (dict(temperature=1.0, generator=[]), "0 gen"), (dict(is_real=[[1]]), "is_real"),
    (dict(is_real=[[1] * 8] * 2), "is_real")])
def test_settings_that_make_no_sense_are_one_sentence(settings, named):
    with pytest.raises(ValueError) as error:
        answer(tiny(), [PROMPT], **{**dict(gen_length=12, block_length=4, steps=6), **settings})
    assert named in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("shift, prompts, named", [
    (False, [], "no prompt"), (True, [[1], []], "empty"), (False, [[1] * 85], "85 tokens"),
    (False, [1, 2], "rows"), (False, torch.tensor([1, 2]), "rows"), (False, ["text"], "rows"),
    (False, torch.tensor([[1.5]]), "integers"), (False, {"ids": [[1]]}, "rows"),
    (False, [[1, VOCAB]], f"id {VOCAB}"), (False, [[-1]], "id -1"), (False, None, "rows")])
def test_prompts_that_cannot_be_answered_are_one_sentence(shift, prompts, named):
    with pytest.raises(ValueError, match=named) as error:
        answer(tiny(shift=shift), prompts, 12, 12, 12)
    assert len(str(error.value).splitlines()) == 1


def test_an_empty_prompt_is_answered_and_a_batch_of_one_is_too():
    assert answer(tiny(), [[]], 12, 12, 12).shape == (1, 12)
    assert answer(tiny(), torch.empty(1, 0, dtype=torch.long), 12, 12, 12).shape == (1, 12)
    tok = byte_tokenizer()
    model = tiny(vocab_size=tok.n_vocab, mask_id=tok.mask_id, eos_id=tok.eos_id)
    cfg = SampleConfig(gen_length=8, block_length=4, steps=4, cache="dual", device="cpu")
    assert len(complete(model, tok, ["", "a"], cfg)) == 2


# ---- what the confidence is, exactly ----


def test_top_p_met_exactly_keeps_one_token_more_as_dreams_code_does():
    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]).log()
    for top_p, n in ((0.5, 2), (0.75, 3), (0.875, 4)):
        kept = keep_likeliest(logits, Sampling(4, 4, 4, top_p=top_p))
        assert kept.isfinite().sum() == n


@pytest.mark.parametrize("more", [dict(), dict(top_k=5), dict(top_p=0.8)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.5, 3.0])
def test_dreams_confidence_is_that_of_the_distribution_it_draws_from(temperature, more):
    logits = 3 * torch.randn(1, 8, VOCAB, generator=seeded())
    def noise(*shape, dtype=torch.float32):
        return torch.rand(1, 8, *shape, generator=seeded(1), dtype=dtype)
    for remasking in ("maskgit_plus", "topk_margin", "entropy"):
        s = Sampling(8, 8, 8, temperature, remasking, **more)
        token, found, logp = propose(logits, s, noise, torch.tensor([], dtype=torch.long))
        p = (keep_likeliest(logits, s) / (temperature or 1)).double().softmax(dim=-1)
        ranked = p.sort(dim=-1, descending=True).values
        expected = {"maskgit_plus": p.gather(-1, token[..., None])[..., 0].log(),
                    "topk_margin": ranked[..., 0] - ranked[..., 1],
                    "entropy": torch.xlogy(p, p).sum(dim=-1)}[remasking]
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        by_model = logits.log_softmax(dim=-1).gather(-1, token[..., None])[..., 0]
        torch.testing.assert_close(logp, by_model)


@pytest.mark.parametrize("remasking", ["random", "origin"])
def test_in_a_random_order_end_tokens_have_no_place_of_their_own(remasking):
    logits, u = torch.zeros(1, 9, VOCAB), torch.rand(1, 9, generator=seeded())
    logits[..., EOS] = 9.0
    s = Sampling(9, 9, 9, remasking=remasking, end_tokens="last")
    token, confidence, _ = propose(logits, s, lambda: u, torch.tensor([EOS]))
    assert (token == EOS).all() and torch.equal(confidence, u)


@pytest.mark.parametrize("kind", ["threshold", "factor"])
def test_all_that_is_sure_enough_is_revealed_and_the_first_that_is_not_stays(kind):
    p = torch.tensor([0.99, 0.97, 0.95, 0.9, 0.6, 0.3])
    ranked = torch.stack([p, p.flip(0)[:1].expand(6)]).log()        # of the second row nothing is
    for limit in (0.1, 0.18, 0.45, 0.62, 0.93, 0.96, 1.0):
        if kind == "threshold":
            expected = sum(one >= limit for one in p.tolist())
        else:
            sure = [(n + 1) * (1 - one) < limit for n, one in enumerate(p.tolist(), 1)]
            expected = [*sure, False].index(False)
        schedule = Schedule(Sampling(6, 6, 6, **{kind: limit}), [6, 6], torch.device("cpu"))
        assert schedule.how_many(0, ranked)[0].item() == max(1, expected), limit
    assert schedule.how_many(0, ranked)[1] == 1


def test_doubts_that_are_just_the_factor_are_not_below_it():
    schedule = Schedule(Sampling(2, 2, 2, factor=1.5), [2], torch.device("cpu"))
    assert schedule.how_many(0, torch.tensor([[1.0, 0.5]]).log()).item() == 1      # 3 (1 - 0.5)


@pytest.mark.parametrize("remasking", ["low_confidence", "random", "maskgit_plus", "topk_margin",
                                       "entropy", "origin"])
def test_the_p_that_is_shown_is_the_models_whatever_ranks_it_and_stays(remasking):
    model, states, ps = tiny(peaked=5.0), [], []
    generator = [seeded()]
    answer(model, [PROMPT], 8, 4, 8, remasking=remasking, generator=generator, top_k=3,
           on_step=lambda x, p: (states.append(x[0].clone()), ps.append(p[0].clone())))
    assert not ps[0].any()
    for before, after, p, q in zip(states, states[1:], ps, ps[1:]):
        logits = model(torch.cat([torch.tensor(PROMPT), before])[None])[0, len(PROMPT):]
        logits[:, MASK] = -math.inf
        is_new = (before == MASK) & (after != MASK)
        by_model = logits.softmax(dim=-1).gather(-1, after[:, None])[:, 0]
        torch.testing.assert_close(q[is_new], by_model[is_new], atol=1e-5, rtol=1e-4)
        assert torch.equal(q[~is_new], p[~is_new])


def test_the_seconds_of_an_answer_are_without_those_of_showing_it(monkeypatch):
    clock, cost = [0.0], Cost()
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    model, encode = tiny(), DLLM.encode

    def slow_encode(*args):
        clock[0] += 1.0
        return encode(model, *args)
    model.encode = slow_encode

    def slow_show(x, p):
        clock[0] += 100.0
    answer(model, [PROMPT], 4, 4, 4, on_step=slow_show, cost=cost)
    assert cost.seconds == 4.0 and cost.numbers()["tokens_per_second"] == 1.0


# ---- an answer's end, and gaps in a text ----


def byte_model(more=0, **settings):
    tok = byte_tokenizer()
    return tiny(vocab_size=tok.n_vocab + more, mask_id=tok.mask_id, eos_id=tok.eos_id,
                **settings), tok


def test_an_answer_ends_with_its_turn_and_nothing_is_computed_after_that():
    model, tok = byte_model(bias={ord("!"): 90.0})
    cfg = SampleConfig(gen_length=12, block_length=4, steps=12, device="cpu")
    for eot_id, passes, tokens in ((None, 12, 12), (ord("!"), 4, 1)):
        tok.eot_id, cost = eot_id, Cost()
        assert ends_of(tok) == [tok.eos_id, eot_id][:1 + (eot_id is not None)]
        text = complete(model, tok, ["a"], cfg, cost=cost)
        assert (cost.passes, cost.tokens) == (passes, tokens)
        assert text == ["" if eot_id else "!" * 12]


def test_a_filled_text_depends_on_the_seed_and_has_no_id_without_a_token():
    n = byte_tokenizer().n_vocab
    model, tok = byte_model(50, bias={i: 30.0 for i in range(n, n + 50)})
    cfg = SampleConfig(gen_length=8, block_length=8, steps=8, temperature=1.0, device="cpu")
    ids, text = [], "ab" + "[MASK]" * 8
    texts = {complete_gaps(model, tok, text, replace(cfg, seed=seed),
                           lambda x, p: ids.extend(x.flatten().tolist())) for seed in (1, 2, 1)}
    assert len(texts) == 2 and max(ids) < n
    found = []
    complete(model, tok, ["ab"], cfg, lambda x, p: found.extend(x.flatten().tolist()))
    assert max(found) < n


def test_a_filled_text_begins_as_the_vocabulary_wants_and_is_shown_without_that(folders):
    tok, read, shown = load_tokenizer(str(folders / "dream")), [], []
    model = tiny(vocab_size=tok.n_vocab, mask_id=tok.mask_id, eos_id=tok.eos_id, shift=True)
    encode = model.encode
    model.encode = lambda x, *rest: read.append(x[0].tolist()) or encode(x, *rest)
    cfg = SampleConfig(gen_length=1, block_length=1, steps=1, device="cpu")
    text = complete_gaps(model, tok, "ab[MASK]", cfg, lambda x, p: shown.append(x[0].tolist()))
    assert len(tok.bos) == 1 and read[0] == [*tok.bos, *tok.encode("ab"), tok.mask_id]
    assert shown[0] == read[0][1:] and text.startswith("ab")


def test_no_text_at_all_is_one_sentence():
    with pytest.raises(ValueError, match="no prompt"):
        infill(tiny(), [], Sampling(4, 4, 4))


def test_a_model_samples_in_the_dtype_of_its_device(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, byte_tokenizer())
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("sample.pick_dtype", lambda name, device: dtype)
        model, _ = load_model(str(tmp_path), "cpu")
        assert model.compute_dtype == model.embed.weight.dtype == dtype and not model.training


def test_rows_revealed_at_random_times_come_out_as_they_would_alone():
    """One that happens to be done early draws on, or its next block would depend on its batch."""
    model = tiny(peaked=5.0)
    def answers(prompts, first=0):
        generator = [seeded(first + b) for b in range(len(prompts))]
        return answer(model, prompts, 12, 4, 12, 1.0, "origin", generator)
    together = answers(PROMPTS)
    for b, prompt in enumerate(PROMPTS):
        assert torch.equal(answers([prompt], first=b)[0], together[b])


@pytest.mark.parametrize("more", [dict(), dict(threshold=0.3), dict(cache="dual")], ids=str)
def test_when_other_rows_have_ended_a_row_goes_on_as_it_would_alone(more):
    """With its own numbers, padding and slots, though it has another place in the batch."""
    n_moved = 0
    for seed in range(8):
        model = tiny(seed=seed, peaked=2.0, bias={EOS: 1.0})
        def answers(prompts, first, model=model):
            generator = [seeded(first + b) for b in range(len(prompts))]
            return answer(model, prompts, 24, 4, 24, 1.0, generator=generator, stop=True,
                          ends=(EOS,), **more)
        together = answers(PROMPTS, first=10 * seed)
        for b, prompt in enumerate(PROMPTS):
            assert torch.equal(answers([prompt], 10 * seed + b)[0], together[b]), (seed, b)
        blocks = [row.index(EOS) // 4 if EOS in row else 6 for row in together.tolist()]
        n_moved += blocks[0] < max(blocks)
    assert n_moved > 2


def test_a_marker_is_never_sampled_though_the_model_loves_it(folders):
    tok, seen = load_tokenizer(str(folders / "dream")), []
    [marker] = tok.bos
    model = tiny(vocab_size=tok.n_vocab + 3, mask_id=tok.mask_id, eos_id=tok.eos_id, shift=True,
                 bias={marker: 90.0})
    cfg = SampleConfig(gen_length=4, block_length=4, steps=4, device="cpu")
    complete(model, tok, ["ab"], cfg, lambda x, p: seen.extend(x.flatten().tolist()))
    assert marker not in seen and {*range(tok.n_vocab, tok.n_vocab + 3)} <= {*never_of(model, tok)}
