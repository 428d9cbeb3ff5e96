"""The reverse process: start from masks only and reveal a few tokens at a time, the surest first.

    python sample.py --init_from=out/tiny/jepa --prompt="Anna has 3 pens and buys 4 more. How many?"

shows it happening in the terminal. LLaDA's sampler (arXiv 2502.09992, its public generate.py) goes
through blocks from left to right; in a block every pass reads the whole sequence, proposes a token
for each mask and reveals the few it is surest of. What is revealed stays. Dream's
(arXiv 2508.15487) differs in what sure means and in how many it reveals when.

Both are exact by default. Two shortcuts make them fast, and change what comes out: `cache` does not
read again what precedes or follows the block (cache.py), and `threshold` or `factor` reveal all
that is sure enough in place of a fixed number (Fast-dLLM, arXiv 2505.22618).
"""
import os
import sys
import time
from dataclasses import dataclass, fields
from operator import index

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # idle threads sleep, as in train.py;
os.environ.setdefault("GOMP_SPINCOUNT", "0")            # both are read when torch loads

import torch

from configurator import run
from model import DLLM, row_generators
from pretrained.device import pick_device, pick_dtype, to_device
from pretrained.tokenizer import load_tokenizer
from pretrained.weights import find_weights
from sampling.cache import Cache
from sampling.reveal import Sampling, Schedule, draw_uniform, draws_on, propose
from sampling.view import Film, Screen
from tasks.common import question_prompt

GAP = "[MASK]"                          # how a user writes a token to fill


@dataclass
class SampleConfig(Sampling):
    gen_length: int = 16                # tokens to generate, end-of-text included
    block_length: int = 16              # a block is finished before the next begins
    steps: int = 16                     # passes in all; gen_length of them reveal one token each
    init_from: str = "out/tiny/jepa"    # checkpoint, out_dir or hub name (GSAI-ML/LLaDA-8B-Base)
    revision: str = ""                  # of a hub name: branch, tag or commit
    prompt: str = "Anna has 3 boxes with 4 apples in each. How many apples?"  # a question
    infill: str = ""                    # in place of a prompt: a text, each [MASK] a token to fill
    chat: bool = False                  # ask it as a turn of a chat (Instruct models)
    html: str = ""                      # a page to write, which steps through the answer
    device: str = "auto"                # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one


def main(cfg: SampleConfig):
    model, tok = load_model(cfg.init_from, cfg.device, cfg.revision, cfg.chat)
    prompt = cfg.infill or (cfg.prompt if cfg.chat else question_prompt(cfg.prompt))
    tally, screen, film = Tally(), Screen(tok), Film(tok, prompt)

    def on_step(x, p):
        screen.show(x[0], p[0])
        film.show(x[0], p[0])
    if cfg.html:                        # a path that cannot be written is told at once
        film.save_html(cfg.html)
    if cfg.infill:
        complete_gaps(model, tok, prompt, cfg, on_step, tally)
    else:
        complete(model, tok, [prompt], cfg, on_step, tally)
    screen.end()
    if cfg.html:
        film.save_html(cfg.html, f"{cfg.init_from}: {tally.line()}")
    print(tally.line(), file=sys.stderr)


# ----------------------------------------------------------------------------------------------
# the loop


@torch.no_grad()
def generate(model, prompt, gen_length: int = 128, block_length: int = 128, steps: int = 128,
             temperature: float = 0.0, remasking: str = "low_confidence", generator=None,
             on_step=None, is_real=None, never=(), ends=None, stop: bool = False, tally=None,
             **more):
    """Prompts of any lengths -> (B, gen_length) ids, each row as alone, up to rounding.

    prompt: (B, P) ids or a list of id lists; is_real (B, P): False or 0 on padding, on any side.
    generator: one a row (a list), or one for all, which then draws what LLaDA's code draws after
    torch.manual_seed, of prompts padded at the left; needed for whatever is random.
    never: ids that must not appear, besides the mask id. ends: ids that end a text, by default the
    model's eos_id; with `stop` a row is left alone after the block in which it has one, and
    end-of-text fills the rest.
    on_step(x, p), both (B, gen_length), is called at the start and after every pass; p is the
    probability a token had when it was revealed, else 0. more: the other settings of `Sampling`.
    Raises ValueError for what does not fit together or into the model.
    """
    s = Sampling(gen_length, block_length, steps, temperature, remasking, **more)
    prompt = id_lists(model.config, prompt, is_real)
    check_prompts(model.config, prompt, gen_length)
    texts = [row + [model.config.mask_id] * gen_length for row in prompt]
    gaps = [list(range(len(text) - gen_length, len(text))) for text in texts]
    answer = to_device(torch.tensor(gaps), model.embed.weight.device)       # (B, gen_length)
    watch = on_step and (lambda x, p: on_step(x.gather(1, answer), p.gather(1, answer)))
    return fill(model, texts, gaps, s, generator, watch, never, ends, stop, tally).gather(1, answer)


@torch.no_grad()
def infill(model, texts, s: Sampling, generator=None, on_step=None, never=(), ends=None,
           tally=None):
    """Lists of ids, some of them the mask id -> the same lists with these filled.

    A block is block_length masks, wherever they stand, with as many passes as s gives to one.
    on_step(x, p), both (B, T): the whole texts. Raises ValueError as generate does.
    """
    texts = id_lists(model.config, texts)
    gaps = [[i for i, token in enumerate(text) if token == model.config.mask_id] for text in texts]
    check_prompts(model.config, texts, 0)
    if s.cache != "none":
        raise ValueError(f"cache={s.cache} keeps what lies around one run of masks; gaps anywhere "
                         f"need cache=none")
    if not all(gaps) or model.config.shift and any(gap[0] == 0 for gap in gaps):
        raise ValueError("a text to fill needs a mask, and not as its first token if the model "
                         "scores the next one")
    x = fill(model, texts, gaps, s, generator, on_step, never, ends, False, tally)
    return [row[:len(text)] for row, text in zip(x.tolist(), texts)]


def fill(model, texts, gaps, s: Sampling, generator, on_step, never, ends, stop, tally):
    """Lists of ids and the places of the masks to fill in each -> x (B, T), padded at the end."""
    config, device, began = model.config, model.embed.weight.device, time.perf_counter()
    if s.is_random and generator is None:
        raise ValueError(f"temperature={s.temperature}, alg_temp={s.alg_temp} and "
                         f"remasking={s.remasking} draw at random and need a generator")
    if isinstance(generator, list) and len(generator) != len(texts):
        raise ValueError(f"{len(generator)} generators for {len(texts)} rows; give one a row, or "
                         f"a single one that is no list")
    ends = [config.eos_id] if ends is None else ends
    L, T = s.block_length, max(map(len, texts))
    N = -(-max(map(len, gaps)) // L) * L                                    # whole blocks
    x = torch.tensor([text + [config.mask_id] * (T - len(text)) for text in texts])
    is_real = torch.arange(T) < torch.tensor([len(text) for text in texts])[:, None]
    is_gap = torch.arange(N) < torch.tensor([len(gap) for gap in gaps])[:, None]
    slots = torch.tensor([gap + gap[:1] * (N - len(gap)) for gap in gaps])  # (B, N) in x
    x, slots = to_device(x, device), to_device(slots, device)
    never = [config.mask_id, *never, *(ends if s.end_tokens == "never" else ())]
    never, ends = (to_device(torch.tensor(ids, dtype=torch.long), device)
                   for ids in (never, list(ends)))
    p, watched, tally = torch.zeros_like(x, dtype=torch.float32), 0.0, tally or Tally()

    def watch():                                            # what watching takes is not counted
        nonlocal watched
        if on_step:
            seen = time.perf_counter()
            on_step(x, p)
            watched += time.perf_counter() - seen
    watch()
    on = list(range(len(x)))                                # rows that are worked on
    for start in range(0, N, L):
        if stop and start:                                  # here the host waits, once a block
            ended = torch.isin(x.gather(1, slots[:, :start]), ends).any(dim=1).tolist()
            on = [b for b in on if not ended[b]]
        if not on:
            break

        some = generator
        if isinstance(generator, list):     # in a batch a sure row has more passes than alone
            some = [of_block(generator[b], start) if s.is_parallel else generator[b] for b in on]
        these = to_device(torch.tensor(on), device)

        def show(x_these, p_these):
            x[these], p[these] = x_these, p_these
            watch()
        fill_block(model, x[these], p[these], is_real[on], slots[these], is_gap[on], start, s, some,
                   never, ends, tally, show)

    is_gap, answer = to_device(is_gap, device), x.gather(1, slots)
    if len(on) < len(x):                                    # what was left alone is filled
        answer = answer.masked_fill(answer == config.mask_id, config.eos_id)
        x.scatter_(1, slots, answer)
        watch()
    n_ends = (torch.isin(answer, ends) & is_gap).int().cumsum(dim=1)
    tally.tokens += int((is_gap & (n_ends - torch.isin(answer, ends).int() < 1)).sum())
    tally.seconds += time.perf_counter() - began - watched
    return x


def fill_block(model, x, p, is_real, slots, is_gap, start, s: Sampling, generator, never, ends,
               tally, show):
    """Fills the gaps among the slots (B, N) start..start + L of x (B, T), without waiting for the
    device. Calls show(x, p) after every pass."""
    L, B = s.block_length, len(x)
    slots_here, is_open = slots[:, start:start + L], is_gap[:, start:start + L]     # (B, L)
    schedule = Schedule(s, is_open.sum(dim=1).tolist(), x.device)
    reader, late = Reader(model, is_real, slots, start, s), Late()
    n_padding = to_device((~is_real).sum(dim=1, keepdim=True), x.device)
    is_open = to_device(is_open, x.device)
    for step in range(schedule.n_passes):
        # 1 one pass, for logits at the n places of the block where a mask may be left
        n = schedule.most_left[step]
        places = is_open.int().argsort(dim=1, descending=True, stable=True)[:, :n]  # (B, n)
        where, was_open = slots_here.gather(1, places), is_open.gather(1, places)
        logits = reader.logits(x, where, places).index_fill(-1, never, -torch.inf)  # (B, n, V)
        tally.passes, tally.row_passes = tally.passes + 1, tally.row_passes + B

        # 2 a token for each, and how sure it is
        def noise(*V, dtype=torch.float32):
            at_the_left = where + n_padding         # LLaDA's code pads there, and draws for it
            return draw_uniform(generator, x.shape[1], at_the_left, L, places, V, dtype)
        proposal, confidence, logp = propose(logits, s, noise, ends)        # (B, n)

        # 3 the surest are revealed
        confidence = confidence.masked_fill(~was_open, -torch.inf)
        ranked, order = confidence.sort(dim=1, descending=True, stable=True)    # ties: by position
        reveal = was_open & (order.argsort(dim=1) < schedule.how_many(step, ranked))
        x.scatter_add_(1, where, (proposal - model.config.mask_id) * reveal)
        p.scatter_add_(1, where, logp.exp() * reveal)
        is_open = is_open.scatter(1, places, was_open & ~reveal)
        show(x, p)
        if s.is_parallel and not late.read(is_open.any()):
            break


def of_block(generator, start: int):
    """A generator for one block: what it has drawn in another does not matter to it."""
    [of_this] = row_generators(generator.initial_seed(), 0, [f"block {start}"], generator.device)
    return of_this


class Reader:
    """The passes of a block: over all tokens or, with a cache, all but the first over a few."""

    def __init__(self, model, is_real, slots, start: int, s: Sampling):
        self.model, self.slots, self.s, self.cache = model, slots, s, None
        self.copies = 2 if s.cfg_scale else 1           # guidance reads a text without its prompt
        self.is_real = None if is_real.all() else is_real.repeat(self.copies, 1)
        end = start + s.block_length if s.cache == "dual" else slots.shape[1]
        self.columns = slots[:, start:end]              # what a pass with a cache computes
        if model.config.shift:                          # Dream scores by the state before
            self.columns = torch.cat([self.columns[:, :1] - 1, self.columns], dim=1)

    def logits(self, x, where, places):
        """x (B, T) -> (B, n, V) at the columns `where` (B, n), which are `places` in the block."""
        if self.s.cfg_scale:
            is_gap = torch.zeros_like(x, dtype=torch.bool).scatter(1, self.slots, True)
            x = torch.cat([x, x.masked_fill(~is_gap, self.model.config.mask_id)])
        if self.s.cache != "none" and self.cache is None:
            self.cache = Cache(self.is_real, x.device)
        elif self.s.cache != "none":
            self.cache.compute(self.columns.repeat(self.copies, 1))
            where = places + int(self.model.config.shift)
        h = self.model.encode(x, self.is_real, self.cache)
        rows = torch.arange(len(x), device=x.device)[:, None]
        logits = self.model.unembed(h, (rows, where.repeat(self.copies, 1)))
        if self.s.cfg_scale:
            prompted, unprompted = logits.chunk(2)
            logits = unprompted + (self.s.cfg_scale + 1) * (prompted - unprompted)
        return logits


class Late:
    """A bool of the device that the host reads one pass later, when it is there: with the next
    pass under way nobody waits, and one pass too many changes nothing. At once on a CPU."""

    def __init__(self):
        self.sent = None

    def read(self, flag) -> bool:
        if flag.device.type != "cuda":
            return bool(flag)
        arrived, event = self.sent or (torch.tensor(True), None)
        self.sent = flag.to("cpu", non_blocking=True), torch.cuda.Event()
        self.sent[1].record()
        if event:
            event.synchronize()
        return bool(arrived)


# ----------------------------------------------------------------------------------------------
# from text to text


@dataclass
class Tally:
    """What generating has cost. A prompt is read, not generated, and does not count."""
    passes: int = 0
    row_passes: int = 0                 # a pass over a batch of 8 is 8 of these
    tokens: int = 0                     # up to the end token and with it
    seconds: float = 0.0

    def numbers(self) -> dict:
        return {"passes": self.passes, "tokens": self.tokens, "seconds": round(self.seconds, 2),
                "tokens_per_pass": round(self.tokens / max(1, self.row_passes), 3),
                "tokens_per_second": round(self.tokens / max(1e-9, self.seconds), 1)}

    def line(self) -> str:
        return ("{passes} passes, {tokens_per_pass} tokens a pass, {tokens_per_second} tokens/s up "
                "to the end".format(**self.numbers()))


def complete(model, tok, prompts, cfg: Sampling, on_step=None, tally=None) -> list[str]:
    """Answers to prompts, texts or lists of ids, in one batch, up to end-of-text or of the turn.

    Row b draws from (seed, the prompt itself), so an answer does not depend on its batch.
    """
    generator = row_generators(cfg.seed, 0, prompts, draws_on(model.embed.weight.device))
    ids = [tok.prompt_ids(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    settings = {field.name: getattr(cfg, field.name) for field in fields(Sampling)}
    del settings["seed"]
    x = generate(model, ids, **settings, generator=generator, on_step=on_step,
                 never=never_of(model, tok), ends=ends_of(tok), stop=True, tally=tally)
    return [tok.decode(row) for row in x.tolist()]


def complete_gaps(model, tok, text: str, cfg: Sampling, on_step=None, tally=None) -> str:
    """A text in which each [MASK] stands for one token -> the same with these filled."""
    first, *others = [tok.encode(part) for part in text.split(GAP)]
    ids = tok.bos + first + [i for part in others for i in (tok.mask_id, *part)]
    generator = row_generators(cfg.seed, 0, [text], draws_on(model.embed.weight.device))
    n = len(tok.bos)
    look = on_step and (lambda x, p: on_step(x[:, n:], p[:, n:]))
    [x] = infill(model, [ids], cfg, generator, look, never_of(model, tok), ends_of(tok),
                 tally)
    return tok.show(x[n:])


def never_of(model, tok) -> list[int]:
    """Ids that are no text: markers, and rows of the embedding beyond the vocabulary."""
    return [*tok.never, *range(tok.n_vocab, model.config.vocab_size)]


def ends_of(tok) -> list[int]:
    return [i for i in (tok.eos_id, tok.eot_id) if i is not None]


def id_lists(config, rows, is_real=None) -> list[list[int]]:
    """Rows of ids, as tensors or lists -> lists without what is_real calls padding.

    Raises ValueError unless they are rows, of ids that the model has."""
    try:
        rows = [[index(i) for i in (row.tolist() if hasattr(row, "tolist") else row)]
                for row in rows]
    except TypeError:
        raise ValueError("prompts must be rows of ids: a (B, P) tensor of integers, or a list of "
                         "lists") from None
    if is_real is not None:
        is_real = torch.as_tensor(is_real).tolist()
        if [len(row) for row in rows] != [len(row) for row in is_real]:
            raise ValueError("is_real must have the shape of the prompts, (B, P)")
        rows = [[i for i, real in zip(*pair) if real] for pair in zip(rows, is_real)]
    for i in {i for row in rows for i in row}:
        if not 0 <= i < config.vocab_size:
            raise ValueError(f"a prompt has the id {i}, which is not below "
                             f"vocab_size={config.vocab_size}")
    return rows


def check_prompts(config, prompts, gen_length: int):
    """Raises ValueError for no prompt at all, or one that leaves no room for an answer."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths:
        raise ValueError("there is no prompt; give one at least")
    if config.shift and not min(lengths):
        raise ValueError("the prompt is empty, and a model that scores the next token cannot begin "
                         "a text; give one token at least")
    if max(lengths) + gen_length > config.block_size:
        raise ValueError(f"a prompt of {max(lengths)} tokens and gen_length={gen_length} exceed "
                         f"block_size={config.block_size}; prompts up to "
                         f"{config.block_size - gen_length} fit")


def load_model(init_from: str, device: str, revision: str = "", chat: bool = False):
    """-> model, tokenizer, for sampling; the weights in bf16 where a GPU computes in it."""
    folder, device = find_weights(init_from, revision), pick_device(device)
    dtype = pick_dtype("auto", device)
    tok = load_tokenizer(folder, chat)              # first: its mistakes are told at once
    model = DLLM.from_pretrained(folder, dtype, device=device)
    tok.check_fits(model.config)
    model.compute_dtype = dtype
    return model.eval(), tok


if __name__ == "__main__":
    run(main, SampleConfig)
