r"""The reverse process: start from all [MASK] and reveal a few tokens per pass, the surest first.

    python sample.py                                        answers a question of the toy
    Q="Finn has 7 pens, Carl has 5 and they share equally. How many pens does Carl get?"
    python sample.py --prompt="$Q" --html=out/answer.html   and a page that steps through the answer
    python sample.py --svg=out/answer.svg                   and a moving picture of it
    python sample.py --infill="Question: $Q\nAnswer: 7+5=[MASK]\n12/2=6\n#### [MASK]"
    python sample.py --init_from=GSAI-ML/LLaDA-8B-Instruct --chat       a conversation

LLaDA's sampler (arXiv 2502.09992, its public generate.py) fills the answer block by block, from
left to right. Each pass reads the whole text and proposes a token for every mask of the block; the
proposals with the highest confidence are revealed, and what is revealed stays. Dream's sampler
(arXiv 2508.15487) measures confidence otherwise and reveals other numbers per pass: see
sampling/reveal.py. Both are reproduced token for token, except that [MASK] is never revealed.

Shortcuts are faster and change the answer: `cache` reuses keys and values outside the block,
`window` reads few masks after it, `threshold` or `factor` reveal all tokens that are sure enough.
"""
import time
from dataclasses import dataclass

from configurator import run            # before torch: it sets how OpenMP's threads wait

import torch

from model import DLLM, row_generators
from pretrained.device import pick_device, pick_dtype, to_device
from pretrained.tokenizer import load_tokenizer
from pretrained.weights import find_weights
from sampling.asked import as_sent, check_asked
from sampling.canvas import Canvas
from sampling.chat import note, talk
from sampling.cost import Cost
from sampling.prompts import check_gaps, check_generator, check_prompts, ends_of, id_lists, never_of
from sampling.reader import DelayedFlag, Reader
from sampling.reveal import Sampling, Schedule, draw_uniform, draws_on, generator_of_block, propose
from sampling.svg import save_svg
from sampling.view import Recording, Screen

GAP = "[MASK]"                          # how a user writes a token to fill


@dataclass
class SampleConfig(Sampling):
    init_from: str = "out/tiny"         # checkpoint, out_dir or hub name (GSAI-ML/LLaDA-8B-Base)
    revision: str = ""                  # branch, tag or commit of a hub name
    prompt: str = ""                    # empty: a question of the toy; with --chat, a conversation
    task: str = ""                      # wrap the prompt as this task does; empty: as the run's
    raw: bool = False                   # send the prompt as it is
    infill: str = ""                    # a text to complete: [MASK] is one token, \n a line break
    chat: bool = False                  # ask in turns of a chat (Instruct models)
    html: str = ""                      # write a page that steps through the answer to this path
    svg: str = ""                       # write a moving picture of the answer to this path
    gen_length: int = 0                 # tokens to generate; 0: 16, or 256 with --chat
    block_length: int = 0               # tokens per block; 0: 16, or 32 with --chat
    steps: int = 0                      # forward passes in all; 0: gen_length, one token per pass
    device: str = "auto"                # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one

    def __post_init__(self):
        longest, block = (256, 32) if self.chat else (16, 16)
        self.gen_length = self.gen_length or longest
        self.block_length = self.block_length or min(block, self.gen_length)
        self.steps = self.steps or self.gen_length
        super().__post_init__()
        check_asked(self)

    @property
    def is_conversation(self) -> bool:
        return self.chat and not (self.prompt or self.infill)


# ----------------------------------------------------------------------------------------------
# the reverse process


@torch.no_grad()
def generate(model, prompt, s: Sampling, generator=None, on_step=None, is_real=None, never=(),
             ends=None, stop: bool = False, cost=None):
    """Answer prompts of any lengths -> (B, gen_length) ids; rows are independent, up to rounding.

    prompt: (B, P) ids or a list of id lists. is_real (B, P): False or 0 on padding, on any side.
    generator: a list with one per row, or a single one, which draws the numbers that LLaDA's code
    draws for prompts padded on the left. Only random settings need it.
    on_step(x, p), both (B, gen_length): called at the start and after every pass; p is the
    probability that a token had when it was revealed, else 0.
    never: ids that must not be revealed, besides the mask id. ends: ids that end a text, by default
    the model's eos_id; `stop` ends a row after a block that has one, and fills it with eos_id.
    cost: a Cost to add to. Raises ValueError for what does not fit, and logits that are not finite.
    """
    prompt = id_lists(model.config, prompt, is_real)
    check_prompts(model.config, prompt, s.gen_length)
    texts = [row + [model.config.mask_id] * s.gen_length for row in prompt]
    gaps = [list(range(len(row), len(row) + s.gen_length)) for row in prompt]

    def show_answer(x, p):
        on_step(x.gather(1, canvas.slots), p.gather(1, canvas.slots))
    canvas = Canvas(model, texts, gaps, s, never, ends, on_step and show_answer)
    fill(model, canvas, s, generator, stop, cost or Cost())
    return canvas.x.gather(1, canvas.slots)


def fill(model, canvas: Canvas, s: Sampling, generator, stop: bool, cost: Cost):
    """Fill the gaps of a canvas in place, one block of slots after the other."""
    check_generator(s, generator, len(canvas.x))
    reader, began = Reader(model, s), time.perf_counter()
    canvas.show()
    for start in range(0, canvas.slots.shape[1], s.block_length):
        if stop and start:
            canvas.leave_ended(start)
        if not canvas.rows:
            break
        fill_block(reader, canvas, start, s, generator, cost)
    cost.tokens += canvas.finish()
    cost.seconds += time.perf_counter() - began - canvas.seconds_shown


def fill_block(reader: Reader, canvas: Canvas, start: int, s: Sampling, generator, cost: Cost):
    """Fill slots start .. start + block_length of the canvas's rows.

    slots (B, N): the columns of x to fill, over all blocks. places (B, n): the slots of this block
    that may still be masked; columns (B, n): where in x. Synchronises in on_step, any_open.read."""
    L, device = s.block_length, canvas.x.device
    rows = to_device(torch.tensor(canvas.rows), device)
    x, p, slots = canvas.x[rows], canvas.p[rows], canvas.slots[rows]
    is_real, is_open = canvas.is_real[canvas.rows], canvas.is_gap[canvas.rows, start:start + L]

    schedule = Schedule(s, is_open.sum(dim=1).tolist(), device)
    generator, any_open = generator_of_block(generator, canvas.rows, start, s), DelayedFlag()
    reader.begin(is_real, slots, start)
    n_padding = to_device((~is_real).sum(dim=1, keepdim=True), device)
    slots, is_open = slots[:, start:start + L], to_device(is_open, device)                  # (B, L)

    for step in range(schedule.n_passes):
        # 1 run the model: logits at the n places of the block where a mask may be left
        n = L if s.graphs else schedule.most_left[step]             # a graph's shapes are fixed
        places = is_open.int().argsort(dim=1, descending=True, stable=True)[:, :n]          # (B, n)
        columns, is_masked = slots.gather(1, places), is_open.gather(1, places)             # (B, n)
        logits = reader.logits(x, columns, places)                                       # (B, n, V)
        logits = logits.index_fill(-1, canvas.never, -torch.inf)
        cost.add_pass(len(x))

        # 2 propose a token for each place, with a confidence
        def noise(*shape, dtype=torch.float32):
            # with a single generator: the numbers that LLaDA draws for rows padded on the left
            return draw_uniform(generator, x.shape[1], columns + n_padding, L, places, shape, dtype)
        proposal, confidence, logp = propose(logits, s, noise, canvas.ends)                 # (B, n)

        # 3 reveal the surest; of equal ones the leftmost
        confidence = confidence.masked_fill(~is_masked, -torch.inf)
        ranked, order = confidence.sort(dim=1, descending=True, stable=True)
        reveal = is_masked & (order.argsort(dim=1) < schedule.how_many(step, ranked))
        # add, not set: a row with fewer gaps repeats a column, with reveal False
        x.scatter_add_(1, columns, (proposal - canvas.mask_id) * reveal)
        p.scatter_add_(1, columns, logp.exp() * reveal)
        is_open = is_open.scatter(1, places, is_masked & ~reveal)
        canvas.update(rows, x, p)
        if s.is_parallel and not any_open.read(is_open.any()):      # of the pass before
            break


@torch.no_grad()
def infill(model, texts, s: Sampling, generator=None, on_step=None, never=(), ends=None, cost=None):
    """Fill the masks in lists of ids, wherever they stand -> the same lists without masks.

    A block is block_length masks, with as many passes as s gives to one. on_step(x, p), both
    (B, T), sees the whole texts. The other arguments and errors are those of generate.
    """
    texts = id_lists(model.config, texts)
    check_prompts(model.config, texts, 0)
    mask_id = model.config.mask_id
    gaps = [[i for i, token in enumerate(text) if token == mask_id] for text in texts]
    check_gaps(model.config, gaps, s)
    canvas = Canvas(model, texts, gaps, s, never, ends, on_step)
    fill(model, canvas, s, generator, False, cost or Cost())
    return [row[:len(text)] for row, text in zip(canvas.x.tolist(), texts)]


# ----------------------------------------------------------------------------------------------
# from text to text


def complete(model, tok, prompts, s: Sampling, on_step=None, cost=None) -> list[str]:
    """Answer prompts, texts or lists of ids, in one batch -> texts up to end-of-text or of a turn.

    Row b draws from (seed, its prompt), so that an answer does not depend on its batch.
    """
    generator = row_generators(s.seed, 0, prompts, draws_on(model.embed.weight.device))
    ids = [tok.prompt_ids(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    x = generate(model, ids, s=s, generator=generator, on_step=on_step, never=never_of(model, tok),
                 ends=ends_of(tok), stop=True, cost=cost)
    return [tok.decode(row) for row in x.tolist()]


def complete_gaps(model, tok, text: str, s: Sampling, on_step=None, cost=None) -> str:
    """Fill a text in which each [MASK] stands for one token -> the whole text."""
    first, *others = [tok.encode(part) for part in text.split(GAP)]
    ids = tok.bos + first
    for part in others:
        ids += [tok.mask_id, *part]
    generator = row_generators(s.seed, 0, [text], draws_on(model.embed.weight.device))
    n = len(tok.bos)

    def show_text(x, p):
        on_step(x[:, n:], p[:, n:])
    [x] = infill(model, [ids], s, generator, on_step and show_text, never_of(model, tok),
                 ends_of(tok), cost)
    return tok.show(x[n:])


def load_model(init_from: str, device: str, revision: str = "", chat=False, dtype: str = "auto"):
    """Load a model for sampling; auto: in bf16 where a GPU computes in it -> model, tokenizer."""
    folder, device = find_weights(init_from, revision), pick_device(device)
    dtype = pick_dtype(dtype, device)
    tok = load_tokenizer(folder, chat)              # before the weights: its errors come at once
    model = DLLM.from_pretrained(folder, dtype, device=device)
    tok.check_fits(model.config)
    model.compute_dtype = dtype
    return model.eval(), tok


def main(cfg: SampleConfig):
    prompt, what = as_sent(cfg)         # a mistake is told before weights are loaded
    model, tok = load_model(cfg.init_from, cfg.device, cfg.revision, cfg.chat)
    if cfg.is_conversation:
        return talk(lambda ids, *how: complete(model, tok, [ids], cfg, *how), tok, cfg.gen_length,
                    model.config.block_size)
    cost, screen, recording = Cost(), Screen(tok), Recording(tok, prompt)

    def on_step(x, p):
        screen.show(x[0], p[0])
        recording.show(x[0], p[0])

    def save():
        if cfg.html:
            recording.save_html(cfg.html, f"{cfg.init_from}: {cost.line()}; {what}")
        if cfg.svg:
            save_svg(recording, cfg.svg, cfg.init_from, cost)
    save()                              # a path that cannot be written is an error at once
    note(what)
    if cfg.infill:
        complete_gaps(model, tok, prompt, cfg, on_step, cost)
    else:
        complete(model, tok, [prompt], cfg, on_step, cost)
    screen.end()
    save()
    note(cost.line())


if __name__ == "__main__":
    run(main, SampleConfig)
