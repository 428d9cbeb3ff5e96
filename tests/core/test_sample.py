"""Laws of the sampler: no mask stays, nothing revealed changes, a batch and a reference agree."""
import itertools
import json
import math
import re
import shlex
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch

import sample
from configurator import configure, printable
from helpers import answer, script, seeded, sentence, tiny_model, write_checkpoint
from model import uniform
from pretrained.tokenizer import byte_tokenizer, toy_tokenizer
from sample import SampleConfig, complete, complete_gaps, load_model
from sampling import view
from sampling.asked import QUESTION, as_sent
from sampling.reveal import draw, reveal_schedule
from tasks import toy
from tasks.common import question_prompt

VOCAB, EOS, MASK = 40, 38, 39
PROMPTS = [[1], [2, 3, 4, 5, 6], [7] * 11, [8, 9]]
SETTINGS = list(itertools.product((0.0, 1.0), ("low_confidence", "random")))
SCHEDULES = (12, 12), (12, 5), (12, 1), (6, 12), (6, 8), (4, 3), (3, 8), (1, 12)    # of 12 tokens
each_setting = pytest.mark.parametrize("temperature, remasking", SETTINGS)
each_schedule = pytest.mark.parametrize("block_length, steps", SCHEDULES)


def generators(n, seed=0):
    return [seeded(1000 * seed + b) for b in range(n)]


def watch(model, prompt, *args, **kwargs):
    """The answer at the start and after every pass: (steps + 1, B, gen_length)."""
    states = []
    answer(model, prompt, *args, on_step=lambda x, p: states.append(x.clone()), **kwargs)
    return torch.stack(states)


# ---- what comes out ----


@each_setting
def test_no_mask_and_no_forbidden_id_comes_out_though_the_model_loves_them(temperature, remasking):
    model = tiny_model(bias={MASK: 100.0, 3: 50.0, 4: 50.0})
    for steps in (2, 6, 12):
        x = answer(model, PROMPTS, 12, 6, steps, temperature, remasking, generators(4),
                     never=(3, 4))
        assert x.shape == (4, 12)
        assert not torch.isin(x, torch.tensor([MASK, 3, 4])).any()
        assert ((x >= 0) & (x < VOCAB)).all()


@each_setting
def test_the_only_id_that_is_not_forbidden_is_what_comes_out(temperature, remasking):
    model, never = tiny_model(bias={5: -50.0}), [i for i in range(VOCAB) if i not in (5, MASK)]
    x = answer(model, PROMPTS, 8, 4, 4, temperature, remasking, generators(4), never=never)
    assert (x == 5).all()


@each_setting
@each_schedule
def test_blocks_finish_in_order_steps_keep_the_schedule_and_nothing_revealed_changes(
        block_length, steps, temperature, remasking):
    states = watch(tiny_model(), PROMPTS, 12, block_length, steps, temperature, remasking,
                   generators(4))
    assert len(states) == steps + 1
    is_masked = states == MASK
    assert is_masked[0].all() and not is_masked[-1].any()

    per_block = steps // (12 // block_length)
    for step in range(steps):
        before, after = is_masked[step], is_masked[step + 1]
        block, turn = divmod(step, per_block)
        start, end = block * block_length, (block + 1) * block_length
        n_reveal = reveal_schedule(block_length, per_block)[turn]
        assert (before.sum(dim=1) - after.sum(dim=1) == n_reveal).all()       # in every row
        assert not before[:, :start].any() and after[:, end:].all()
        assert torch.equal(states[step][~before], states[step + 1][~before])


def test_the_schedule_reveals_everything_and_the_first_steps_one_more_if_it_is_uneven():
    for n, steps in itertools.product(range(1, 20), range(1, 20)):
        schedule = reveal_schedule(n, steps)
        assert len(schedule) == steps and sum(schedule) == n
        assert schedule == [n // steps + 1] * (n % steps) + [n // steps] * (steps - n % steps)


def test_steps_are_the_forward_passes():
    model, passes = tiny_model(), []
    encode = model.encode
    model.encode = lambda *args: passes.append(1) or encode(*args)
    for steps in (2, 4, 12):
        passes.clear()
        answer(model, PROMPTS, 12, 6, steps)
        assert len(passes) == steps


def test_a_prompt_of_masks_stays_as_it_is():
    """Only the answer is generated; a mask that the user's text brings along is not."""
    seen = []
    model = tiny_model()
    encode = model.encode
    model.encode = lambda x, *more: seen.append(x.clone()) or encode(x, *more)
    answer(model, [[1, MASK, 2]], 4, 4, 4)
    assert all(x[0, :3].tolist() == [1, MASK, 2] for x in seen)


# ---- a batch is its rows ----


@each_setting
@pytest.mark.parametrize("shift", [False, True])
def test_rows_of_a_batch_come_out_as_they_would_alone(shift, temperature, remasking):
    model = tiny_model(shift=shift)
    for seed in range(4):
        x = answer(model, PROMPTS, 12, 6, 8, temperature, remasking, generators(4, seed))
        for b, prompt in enumerate(PROMPTS):
            own = generators(4, seed)[b:b + 1]
            alone = answer(model, [prompt], 12, 6, 8, temperature, remasking, own)
            assert torch.equal(x[b:b + 1], alone), (seed, b)


def test_a_tensor_of_prompts_is_the_list_of_its_rows():
    model, prompt = tiny_model(), [[1, 2, 3], [4, 5, 6]]
    as_tensor = answer(model, torch.tensor(prompt), 8, 4, 4)
    assert torch.equal(as_tensor, answer(model, prompt, 8, 4, 4))


def test_another_generator_is_another_sample_and_the_same_one_is_the_same():
    model = tiny_model()
    first, again, other = (answer(model, PROMPTS, 12, 12, 12, 1.0, generator=generators(4, seed))
                           for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first != other).any(dim=1).all()


# ---- against LLaDA's sampler, slowly ----


@torch.no_grad()
def reference(model, prompt, gen_length, block_length, steps, temperature, remasking, generator):
    """LLaDA's generate.py for one row, token by token; the mask id is forbidden as in ours."""
    x = list(prompt) + [MASK] * gen_length
    per_block = steps // (gen_length // block_length)
    for start in range(len(prompt), len(x), block_length):
        positions = range(start, start + block_length)
        for step in range(per_block):
            logits = model(torch.tensor([x]))[0].double()
            logits[:, MASK] = -math.inf
            weight = logits.exp()
            if temperature:
                u = torch.rand(block_length, VOCAB, generator=generator, dtype=torch.float64)
                weight[start:start + block_length] /= (-u.log()) ** temperature
            proposal = {i: int(weight[i].argmax()) for i in positions}
            confidence = {i: float(logits[i].softmax(dim=0)[proposal[i]]) for i in positions}
            if remasking == "random":
                order = torch.rand(block_length, generator=generator).tolist()
                confidence = dict(zip(positions, order))
            masked = [i for i in positions if x[i] == MASK]
            n_reveal = block_length // per_block + (step < block_length % per_block)
            for i in sorted(masked, key=lambda i: -confidence[i])[:n_reveal]:
                x[i] = proposal[i]
    return x[len(prompt):]


@each_setting
@each_schedule
def test_the_sampler_is_the_reference_of_llada(block_length, steps, temperature, remasking):
    for seed, shift in enumerate((False, True)):
        model = tiny_model(seed=seed, shift=shift)
        for prompt in PROMPTS:
            args = 12, block_length, steps, temperature, remasking
            ours = answer(model, [prompt], *args, generators(1, seed))[0].tolist()
            assert ours == reference(model, prompt, *args, generators(1, seed)[0])


def test_equally_sure_proposals_are_revealed_from_left_to_right():
    model = tiny_model(peaked=0.0, bias={7: 1.0})          # the same logits everywhere
    is_masked = watch(model, [[1], [2, 3]], 48, 48, 24, 0.0, "low_confidence") == MASK
    for step in range(25):
        assert (is_masked[step] == (torch.arange(48) >= 2 * step)).all()


def test_the_order_of_random_remasking_is_uniform_whatever_the_logits_say():
    """All 24 orders of a block of 4, over 2,400 rows that differ in their generator alone."""
    n = 2400
    states = watch(tiny_model(), [[1, 2]] * n, 4, 4, 4, 0.0, "random", generators(n))
    when = (states == MASK).sum(dim=0)               # (n, 4): the pass that revealed a position
    orders = Counter(map(tuple, when.tolist()))
    assert set(orders) == set(itertools.permutations((1, 2, 3, 4)))
    sigma = math.sqrt(n * (1 / 24) * (23 / 24))
    assert all(abs(count - n / 24) < 4.5 * sigma for count in orders.values()), orders
    surest = watch(tiny_model(), [[1, 2]] * 3, 4, 4, 4, 0.0, "low_confidence")
    assert len(set(map(tuple, (surest == MASK).sum(dim=0).tolist()))) == 1


# ---- temperature ----

LOGITS = torch.tensor([4.0, 3.5, 2.0, 0.0, -2.3])    # at temperature 1 the last has 1e-3


def assert_frequencies(tokens, p):
    """Each token of the distribution p (V,) occurs as often as it should, within 4 sigma."""
    n = tokens.numel()
    counts = torch.bincount(tokens.flatten(), minlength=len(p)).double()
    sigma = (n * p * (1 - p)).sqrt()
    assert ((counts - n * p).abs() <= 4 * sigma + 1).all(), (counts / n, p)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_softmax_of_logits_over_temperature(temperature):
    p = (LOGITS.double() / temperature).softmax(dim=0)
    for shape, some in (((1, 20_000, 5), generators(1, 3)),
                        ((2000, 10, 5), generators(2000, 4)),   # a generator each
                        ((20, 1000, 5), generators(1)[0])):     # one for all rows
        tokens = draw(LOGITS.expand(shape), temperature, numbers(shape, some))
        assert tokens.shape == shape[:2]
        assert_frequencies(tokens, p)


def numbers(shape, generator):
    return uniform(shape, generator, torch.device("cpu"), torch.float64)


def test_the_rare_token_is_as_rare_as_it_should_be():
    p = LOGITS.double().softmax(dim=0)
    assert 0.5e-3 < p[-1] < 2e-3
    shape = 1, 300_000, 5
    tokens = draw(LOGITS.expand(shape), 1.0, numbers(shape, generators(1, 5)))
    assert abs((tokens == 4).sum() - 300_000 * p[-1]) < 4 * math.sqrt(300_000 * p[-1])


def test_temperature_zero_takes_the_likeliest_token_and_needs_no_generator():
    logits = torch.randn(3, 7, 40, generator=seeded(0))
    assert torch.equal(draw(logits, 0.0, None), logits.argmax(dim=-1))


def test_an_impossible_token_is_never_drawn():
    logits = LOGITS.clone()
    logits[[0, 3]] = -torch.inf
    shape = 1, 20_000, 5
    tokens = draw(logits.expand(shape), 3.0, numbers(shape, generators(1)))
    assert set(tokens.flatten().tolist()) == {1, 2, 4}


def test_noise_is_in_double_precision(monkeypatch):
    """In single precision both numbers are 1, and the noise is infinite (arXiv 2409.02908)."""
    u = torch.tensor([[[1 - 2.0**-40, 1 - 2.0**-30]]], dtype=torch.float64)
    assert draw(torch.tensor([[[-8.0, 0.0]]]), 1.0, u).item() == 1        # -8 + 40 log 2 < 30 log 2
    assert draw(torch.tensor([[[-6.0, 0.0]]]), 1.0, u).item() == 0        # -6 + 40 log 2 > 30 log 2
    seen, model = [], tiny_model()
    original = sample.draw_uniform
    monkeypatch.setattr(sample, "draw_uniform",
                        lambda *args: seen.append(original(*args)) or seen[-1])
    answer(model, PROMPTS, 4, 4, 4, 1.0, generator=generators(4))
    assert len(seen) == 4 and all(u.dtype == torch.float64 for u in seen)


def test_generated_tokens_follow_the_distribution_without_the_mask_id():
    model = tiny_model(peaked=0.0, bias={MASK: 9.0, 1: 4.0, 2: 3.0}, block_size=8192)
    p = torch.zeros(VOCAB, dtype=torch.float64)
    p[1], p[2], p[MASK] = 4.0, 3.0, -torch.inf
    for temperature in (1.0, 2.0):
        x = answer(model, [[1]] * 20, 100, 100, 1, temperature, generator=generators(20))
        assert_frequencies(x, (p / temperature).softmax(dim=0))


# ---- lengths that do not fit ----


@pytest.mark.parametrize("gen_length, block_length, steps, named", [
    (10, 4, 10, ("gen_length=10", "block_length=4")),
    (4, 8, 4, ("gen_length=4", "block_length=8")),
    (12, 4, 4, ("steps=4", "3 blocks")),
    (12, 4, 2, ("steps=2", "3 blocks")),
    (12, 12, 13, ("steps=13", "gen_length=12")),
    (12, 4, 15, ("steps=15", "gen_length=12")),
    (12, 4, 0, ("steps=0",)),
    (12, 4, -3, ("steps=-3",)),
    (60, 60, 60, ("prompt of 5 tokens", "gen_length=60", "block_size=64", "up to 4 ")),
    (0, 4, 4, ("gen_length=0",)),
    (12, 0, 12, ("block_length=0",)),
    (12, -4, 3, ("block_length=-4",)),
    (-12, -4, 3, ("gen_length=-12",)),
])
def test_lengths_that_do_not_fit_are_one_sentence_with_the_numbers(
        gen_length, block_length, steps, named):
    with pytest.raises(ValueError) as error:
        answer(tiny_model(), [[1, 2], [1, 2, 3, 4, 5]], gen_length, block_length, steps)
    assert len(str(error.value).splitlines()) == 1
    assert all(words in str(error.value) for words in named), str(error.value)


def test_the_longest_prompt_that_fits_is_answered():
    assert answer(tiny_model(), [[1] * 52, [2]], 12, 12, 3).shape == (2, 12)
    with pytest.raises(ValueError):
        answer(tiny_model(), [[1] * 53, [2]], 12, 12, 3)


# ---- complete ----

TEXTS = ["Anna has 3 eggs.", "", "Question: how many?\nAnswer:", "x"]


def text_model(n_vocab_more=0, **more):
    tok = byte_tokenizer()
    return tiny_model(vocab_size=tok.n_vocab + n_vocab_more, mask_id=tok.mask_id, eos_id=tok.eos_id,
                **more), tok


def sampler(**settings):
    return SampleConfig(**{**dict(gen_length=12, block_length=6, steps=8, temperature=1.0,
                                  device="cpu"), **settings})


def test_completions_are_the_text_up_to_end_of_text(monkeypatch):
    model, tok = text_model()
    ids = [[*b"Hi", tok.eos_id, *b"!"], [*b"12#4"], [tok.eos_id] * 4]
    monkeypatch.setattr(sample, "generate", lambda *args, **kwargs: torch.tensor(ids))
    assert complete(model, tok, ["a", "b", "c"], sampler()) == ["Hi", "12#4", ""]


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_does_not_depend_on_its_batch(temperature, remasking):
    model, tok = text_model()
    cfg = sampler(temperature=temperature, remasking=remasking)
    texts = [text for text in TEXTS if text]
    together = complete(model, tok, texts, cfg)
    assert complete(model, tok, texts[::-1], cfg)[::-1] == together
    assert [complete(model, tok, [text], cfg)[0] for text in texts] == together
    assert complete(model, tok, [texts[0]] * 2, cfg) == [together[0]] * 2


def test_a_completion_depends_on_the_seed_the_prompt_and_the_settings():
    model, tok = text_model()
    changes = {}, {"seed": 1}, {"temperature": 0.5}, {"remasking": "random"}, {"steps": 2}
    answers = {complete(model, tok, [text], sampler(**change))[0]
               for text in ("a", "b") for change in changes}
    assert len(answers) == 2 * len(changes)


def test_a_greedy_completion_is_what_generate_gives_with_the_same_settings():
    model, tok = text_model(bias={byte_tokenizer().eos_id: 3.0})
    cfg = sampler(temperature=0.0)
    ids = answer(model, [tok.encode(text) for text in TEXTS], 12, 6, 8)
    assert complete(model, tok, TEXTS, cfg) == [tok.decode(row) for row in ids]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_without_a_token_are_never_generated(temperature):
    """A model's vocabulary may be larger than the tokenizer's: its last rows stand for nothing."""
    n = byte_tokenizer().n_vocab
    model, tok = text_model(50, bias={i: 30.0 for i in range(n, n + 50)})
    seen = []
    complete(model, tok, TEXTS, sampler(temperature=temperature),
             on_step=lambda x, p: seen.append(x.clone()))
    assert len(seen) == 8 + 1 and (seen[-1] != tok.mask_id).all()
    assert all((x < n).all() for x in seen)
    free = answer(model, [tok.encode(text) for text in TEXTS], 12, 6, 8)
    assert (free >= n).all()            # the model loves them


@pytest.mark.parametrize("more", [dict(temperature=0.0), dict(temperature=1.0),
                                  dict(temperature=1.0, threshold=0.5)], ids=str)
def test_a_text_that_has_ended_is_left_alone_while_the_others_go_on(more):
    """A prompt that ends in `x` is answered by end-of-text at once, the others never are."""
    model, tok = text_model()
    encode, sizes, states = model.encode, [], []
    state = {}

    def watched(x, *rest):
        sizes.append(len(x))
        state["ends"] = (x == ord("x")).any(dim=1)
        return encode(x, *rest)
    unembed = model.unembed
    model.encode = watched
    model.unembed = lambda h, where: unembed(h, where).index_fill(
        -1, torch.tensor([ord("x")]), -1e4).index_add(-1, torch.tensor([tok.eos_id]), torch.where(
            state["ends"], 1e4, -1e4)[:, None, None].expand(*where[1].shape, 1))
    texts, cfg = ["ab", "x", "c"], sampler(steps=12, **more)
    found = complete(model, tok, texts, cfg, on_step=lambda x, p: states.append(x.clone()))
    first_block = sizes.index(2)
    assert set(sizes[:first_block]) == {3} and set(sizes[first_block:]) == {2}
    assert found[1] == "" and all(len(found[n].encode("utf-8", "ignore")) for n in (0, 2))
    assert (states[first_block][1] == torch.tensor([tok.eos_id] * 6 + [tok.mask_id] * 6)).all()
    assert all(torch.equal(x[1], states[first_block][1]) for x in states[first_block:-1])
    assert (states[-1][1] == tok.eos_id).all()
    assert [complete(model, tok, [text], cfg)[0] for text in texts] == found


# ---- the command ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), toy_tokenizer())


def test_the_command_shows_masks_first_and_none_in_the_end(checkpoint):
    done = script("sample.py", "--device=cpu", f"--init_from={checkpoint}",
                  "--prompt=Anna has 3 eggs.", "--temperature=1")
    assert done.returncode == 0, done.stderr
    first, *between, last = done.stdout.removesuffix("\n").split("\n")
    assert first == "\u2591" * 16
    assert [line.count("\u2591") for line in between] == list(range(15, 0, -1))
    assert "\u2591" not in last and last
    assert re.fullmatch(r'prompt as "Question: ... Answer:"\n'
                        r"16 passes, [\d.]+ tokens per pass, [\d.]+ tokens/s up to the end\n",
                        done.stderr)


@pytest.mark.parametrize("name", ["html", "svg"])
def test_a_picture_that_cannot_be_written_is_told_before_anything_is_generated(
        name, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "page"):
        done = script("sample.py", "--device=cpu", f"--init_from={checkpoint}", f"--{name}={path}")
        assert done.returncode == 1 and done.stdout == ""
        assert len(done.stderr.strip().split("\n")) == 1 and str(tmp_path) in done.stderr


def test_a_missing_checkpoint_is_exit_code_1_and_one_line(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):      # there, but empty; not there
        done = script("sample.py", "--device=cpu", f"--init_from={folder}")
        assert done.returncode == 1 and done.stdout == ""
        assert len(done.stderr.strip().split("\n")) == 1
        assert str(folder) in done.stderr


def test_the_command_asks_the_question_as_the_tasks_do(checkpoint, capsys):
    cfg = SampleConfig(init_from=str(checkpoint), prompt="Ben has 7 nuts. How many?", device="cpu")
    sample.main(cfg)
    model, tok = load_model(str(checkpoint), "cpu")
    [ids] = answer(model, [tok.encode(question_prompt(cfg.prompt))], 16, 16, 16)
    shown = printable(tok.show(ids.tolist())).replace("\n", "\\n")
    assert capsys.readouterr().out.endswith(shown + "\n")


def test_a_raw_prompt_is_asked_as_it_is_and_an_infill_may_have_line_breaks(checkpoint, capsys):
    model, tok = load_model(str(checkpoint), "cpu")
    sample.main(SampleConfig(init_from=str(checkpoint), prompt="Sums: 3+4", raw=True, device="cpu"))
    [ids] = answer(model, [tok.encode("Sums: 3+4")], 16, 16, 16)
    shown = printable(tok.show(ids.tolist())).replace("\n", "\\n")
    assert capsys.readouterr().out.endswith(shown + "\n")
    cfg = SampleConfig(init_from=str(checkpoint), infill=r"Sums: 3+4\n[MASK]*2=6", device="cpu")
    sample.main(cfg)
    *_, last = capsys.readouterr().out.splitlines()
    text = complete_gaps(model, tok, "Sums: 3+4\n[MASK]*2=6", cfg)
    assert "\n" in text and last == printable(text).replace("\n", "\\n")


def test_the_default_question_is_one_of_the_toys_that_no_training_row_has():
    story, question, _ = toy.TWO_STEPS[-1]
    fill = dict(n="Finn", m="Carl", o="pens", a=7, b=5)
    assert QUESTION == f"{story} {question}".format(**fill)
    assert zlib.crc32(QUESTION.encode()) % 100 in toy.SHARE_OF_SPLIT["test"]


# ---- what is asked ----


def asked(**given):
    return as_sent(SampleConfig(**given))


@pytest.fixture
def run_of(tmp_path):
    """Return a function that makes an out_dir with two checkpoints and this settings.json."""
    def make(text):
        for step in (5, 10):
            write_checkpoint(tmp_path / f"step_{step:07d}", toy_tokenizer())
        (tmp_path / "settings.json").write_text(text)
        return str(tmp_path)
    return make


def test_a_prompt_is_wrapped_as_the_task_says_or_as_a_question_or_not_at_all(tmp_path):
    nowhere = dict(init_from=str(tmp_path / "nowhere"))
    text, said = asked(task="nl_rx", prompt="lines with a vowel")
    assert text == "Description: lines with a vowel\nRegex:"
    assert said == "prompt as the task nl_rx sends it"
    assert asked(prompt="How?", **nowhere) == (
        "Question: How?\nAnswer:", 'prompt as "Question: ... Answer:"')
    assert asked(prompt="How?", raw=True) == ("How?", "prompt as it is (--raw)")
    assert asked(prompt="How?", chat=True) == ("How?", "prompt as it is, as a message of a chat")
    assert asked(infill=r"a\n[MASK]") == ("a\n[MASK]", "text as it is (--infill)")
    text, said = asked(task="django", prompt="return x", chat=True)
    assert text == "Description: return x\nCode:"
    assert said == "prompt as the task django sends it, as a message of a chat"


def test_a_run_asks_as_its_task_does_and_a_setting_goes_before(run_of):
    folder = run_of('{"task": "nl_rx"}')
    for path in (folder, f"{folder}/step_0000005", f"{folder}/step_0000010/"):
        assert asked(init_from=path, prompt="a dog")[0] == "Description: a dog\nRegex:"
    assert asked(init_from=folder, prompt="a dog", task="toy")[0] == "Question: a dog\nAnswer:"
    assert asked(init_from=folder, prompt="a dog", raw=True)[0] == "a dog"
    assert asked(init_from=folder, prompt="a dog", chat=True)[0] == "a dog"


def test_a_run_trained_with_chat_is_asked_with_its_task_in_a_chat_and_says_so_out_of_one(run_of):
    folder = run_of('{"task": "nl_rx", "chat": true}')
    wrapped = "Description: a dog\nRegex:"
    assert asked(init_from=folder, prompt="a dog", chat=True) == (
        wrapped, "prompt as the task nl_rx sends it, as a message of a chat")
    assert asked(init_from=folder, prompt="a dog") == (
        wrapped, "prompt as the task nl_rx sends it; the run was trained with --chat")
    assert asked(init_from=folder, prompt="a dog", chat=True, raw=True)[0] == "a dog"
    assert asked(init_from=folder, chat=True)[0] == ""      # a conversation sends what is typed


def test_the_settings_of_a_folder_that_is_no_run_are_not_read(checkpoint, run_of):
    folder = run_of('{"task": "nl_rx"}')
    write_checkpoint(Path(folder) / "model", toy_tokenizer())
    (Path(folder) / "model" / "settings.json").write_text("{}")
    for path in (f"{folder}/model", str(checkpoint)):
        assert asked(init_from=path, prompt="How?")[0] == question_prompt("How?")
    assert asked(init_from=run_of("{}"), prompt="How?")[0] == question_prompt("How?")


@pytest.mark.parametrize("text, words", [
    ('{"task": "mine"}', "was trained on the task mine: there is no task 'mine'; choose from"),
    ('{"task": "spider"}', "a blank line and the question"),
    ('{"task": ', "settings.json is not a JSON object"), ("[]", "settings.json is not a JSON obj")])
def test_a_run_whose_prompts_cannot_be_made_says_why_and_any_text_may_be_sent_raw(
        text, words, run_of):
    folder = run_of(text)
    assert words in sentence(asked, init_from=folder, prompt="How?")
    assert asked(init_from=folder, prompt="How?", raw=True)[0] == "How?"
    assert asked(init_from=folder, prompt="How?", task="toy")[0] == question_prompt("How?")


def test_the_question_of_the_toy_goes_to_no_task_that_asks_otherwise(run_of):
    for task in ("", "toy", "gsm8k"):
        assert asked(task=task, init_from="nowhere")[0] == question_prompt(QUESTION)
    assert "nl_rx needs a prompt" in sentence(asked, task="nl_rx")
    assert "nl_rx needs a prompt" in sentence(asked, init_from=run_of('{"task": "nl_rx"}'))


@pytest.mark.parametrize("given, words", [
    (dict(task="toy", raw=True, prompt="x"), "raw"), (dict(task="toy", infill="[MASK]"), "infill"),
    (dict(task="toy", chat=True), "conversation"),
    (dict(prompt="x", infill="[MASK]"), "give one of them"),
    (dict(html="page", svg="page", prompt="x"), "both are named page"),
    (dict(html="out/../page", svg="./page", prompt="x"), "both are named ./page")], ids=str)
def test_settings_that_contradict_each_other_are_told(given, words):
    assert words in sentence(SampleConfig, **given)


@pytest.mark.parametrize("task", ["nope", "../train", "wikitext", "common"])
def test_what_is_no_task_is_told_before_a_model_is_loaded(task, monkeypatch):
    monkeypatch.setattr(sample, "load_model", None)
    said = sentence(sample.main, SampleConfig(task=task, prompt="x"), kind=ValueError)
    assert task in said


def test_the_page_and_the_terminal_say_how_a_prompt_was_sent(checkpoint, tmp_path, capsys):
    for given, text, said in (
            (dict(task="nl_rx"), "Description: a dog\nRegex:", "prompt as the task nl_rx sends it"),
            (dict(raw=True), "a dog", "prompt as it is (--raw)")):
        page = tmp_path / "page.html"
        sample.main(SampleConfig(init_from=str(checkpoint), prompt="a dog", html=str(page),
                                 svg=str(tmp_path / "a.svg"), device="cpu", **given))
        first, *_ = capsys.readouterr().err.splitlines()
        assert first == said
        data = json.loads(re.search(r'"recording">(.*?)</script>', page.read_text("utf-8"))[1])
        assert data["about"].endswith(f"up to the end; {said}")
        assert data["prompt"] == text
        assert "16 of 16" in (tmp_path / "a.svg").read_text("utf-8")


@pytest.mark.parametrize("given, lengths", [
    (dict(), (16, 16, 16)), (dict(chat=True), (256, 32, 256)), (dict(steps=4), (16, 16, 4)),
    (dict(gen_length=64), (64, 16, 64)), (dict(gen_length=4), (4, 4, 4)),
    (dict(chat=True, prompt="Hi", gen_length=64), (64, 32, 64)),
    (dict(chat=True, gen_length=9, block_length=3, steps=3), (9, 3, 3))])
def test_lengths_that_are_not_given_are_16_or_those_of_a_chat(given, lengths):
    cfg = SampleConfig(**given)
    assert (cfg.gen_length, cfg.block_length, cfg.steps) == lengths


@pytest.mark.parametrize("given", [dict(prompt="a\udcff"), dict(infill="\ud800[MASK]"),
                                   dict(prompt="\udc80", chat=True),
                                   dict(prompt="\udfff", raw=True)], ids=str)
def test_bytes_that_are_no_utf_8_are_told_before_a_model_is_loaded(given):
    with pytest.raises(ValueError, match="character . is a byte that is not UTF-8") as error:
        SampleConfig(**given)
    assert printable(str(error.value)) == str(error.value)


@pytest.mark.parametrize("infill, named", [
    ("no gap", "needs a mask"), ("[MASK]" * 600, "600 tokens"), ("[mask]", "needs a mask")])
def test_a_text_that_cannot_be_filled_says_what_would_fit(checkpoint, infill, named):
    with pytest.raises(ValueError, match=named):
        sample.main(SampleConfig(init_from=str(checkpoint), infill=infill, device="cpu"))


def test_broken_weights_end_in_a_sentence_and_not_in_an_answer(checkpoint, monkeypatch, capsys):
    model, tok = load_model(str(checkpoint), "cpu")
    with torch.no_grad():
        model.head.weight.mul_(1e38).mul_(1e38)
    monkeypatch.setattr(sample, "load_model", lambda *_: (model, tok))
    with pytest.raises(ValueError, match="logits are not finite"):
        sample.main(SampleConfig(init_from=str(checkpoint), device="cpu"))
    assert "passes" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["html", "svg"])
def test_a_conversation_has_no_page_and_no_picture(name):
    for fits in (dict(chat=True, prompt="Hi"), dict(chat=True, infill="[MASK]")):
        SampleConfig(**{name: "page"}, **fits)
    with pytest.raises(ValueError, match="give a prompt"):
        SampleConfig(**{name: "page"}, chat=True)


@pytest.mark.parametrize("line", [line.strip() for line in sample.__doc__.splitlines()
                                  if line.strip().startswith("python sample.py")])
def test_the_commands_of_the_docstring_parse(line):
    command, *_ = re.split(r"\s{3,}", line)              # what it does stands apart
    configure(SampleConfig, shlex.split(command)[2:])


def test_the_command_works_when_the_model_has_more_ids_than_the_tokenizer(tmp_path, capsys):
    write_checkpoint(tmp_path, toy_tokenizer(), vocab_size=toy_tokenizer().n_vocab + 500)
    sample.main(SampleConfig(init_from=str(tmp_path), temperature=1.0, device="cpu"))
    assert "\u2591" not in capsys.readouterr().out.removesuffix("\n").split("\n")[-1]


def test_an_out_dir_means_the_model_and_the_tokenizer_of_its_newest_checkpoint(tmp_path):
    for step, tok in ((10, toy_tokenizer()), (20, byte_tokenizer())):
        folder = tmp_path / f"step_{step:06d}"
        write_checkpoint(folder, tok, seed=step)
    model, tok = load_model(str(tmp_path), "cpu")
    newest, newest_tok = load_model(str(tmp_path / "step_000020"), "cpu")
    assert tok == newest_tok == byte_tokenizer()
    assert torch.equal(model.embed.weight, newest.embed.weight)


def test_a_tokenizer_that_is_not_the_models_is_one_sentence(tmp_path):
    write_checkpoint(tmp_path, toy_tokenizer())
    byte_tokenizer().save(tmp_path)
    with pytest.raises(ValueError) as error:
        load_model(str(tmp_path), "cpu")
    assert len(str(error.value).splitlines()) == 1 and "tokenizer" in str(error.value)
