"""The reverse process: start from masks only and reveal a few tokens at a time, the surest first.

    python sample.py --init_from=out/tiny/jepa --prompt="Anna has 3 pens and buys 4 more. How many?"

shows it happening in the terminal. This is LLaDA's sampler in its exact form (arXiv 2502.09992, its
public generate.py): blocks from left to right; in a block every step reads the whole sequence,
proposes a token for each mask and keeps the few it is surest of. What is revealed stays.
"""
import os
import shutil
import sys
import time
from dataclasses import dataclass
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # idle threads sleep, as in train.py;
os.environ.setdefault("GOMP_SPINCOUNT", "0")            # both are read when torch loads

import torch

from configurator import run
from model import DLLM, pick_device, pick_dtype, row_generators, uniform
from tasks.common import question_prompt
from tasks.tokenizer import load_tokenizer
from weights import find_weights


@dataclass
class SampleConfig:
    init_from: str = "out/tiny/jepa"    # checkpoint, out_dir or hub name (GSAI-ML/LLaDA-8B-Base)
    revision: str = ""                  # of a hub name: branch, tag or commit
    prompt: str = "Anna has 3 boxes with 4 apples in each. How many apples?"  # a question
    chat: bool = False                  # ask it as a turn of a chat (Instruct models)
    gen_length: int = 16                # tokens to generate, end-of-text included
    block_length: int = 16              # a block is finished before the next begins
    steps: int = 16                     # forward passes; gen_length of them reveal one token each
    temperature: float = 0.0            # 0: the likeliest token; 1: sampled as the model says
    remasking: Literal["low_confidence", "random"] = "low_confidence"  # what returns to [MASK]
    seed: int = 42                      # for temperature > 0 or random remasking
    device: str = "auto"                # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one


def main(cfg: SampleConfig):
    model, tok = load_model(cfg.init_from, cfg.device, cfg.revision, cfg.chat)
    screen = Screen(tok, in_place=sys.stdout.isatty())
    prompt = cfg.prompt if cfg.chat else question_prompt(cfg.prompt)
    complete(model, tok, [prompt], cfg, on_step=lambda x: screen.show(x[0]))


@torch.no_grad()
def generate(model, prompt, gen_length: int = 128, block_length: int = 128, steps: int = 128,
             temperature: float = 0.0, remasking: str = "low_confidence", generator=None,
             on_step=None, never=()):
    """Prompts of any lengths -> (B, gen_length) ids, each row as it would be alone.

    prompt: (B, P) ids or a list of id lists. generator: one, or a list of one per row, needed when
    temperature > 0 or remasking is random. never: ids that must not appear, besides the mask id.
    on_step(x (B, gen_length)) is called at the start and after every pass. Costs `steps` passes.
    Raises ValueError for lengths that do not fit each other or the model.
    """
    config, device = model.config, model.embed.weight.device
    check_lengths(config.block_size, prompt, gen_length, block_length, steps)
    n_blocks = gen_length // block_length
    B = len(prompt)

    # rows are [prompt | gen_length masks | padding]: each keeps the positions it would have alone
    lengths = torch.tensor([len(p) for p in prompt], device=device)
    x = torch.full((B, int(lengths.max()) + gen_length), config.mask_id, device=device)
    for b, p in enumerate(prompt):
        x[b, :len(p)] = torch.as_tensor(p, device=device)
    is_real = torch.arange(x.shape[1], device=device) < lengths[:, None] + gen_length
    rows = torch.arange(B, device=device)[:, None]                          # (B, 1)
    answer = lengths[:, None] + torch.arange(gen_length, device=device)     # (B, gen_length)

    forbidden = torch.tensor([config.mask_id, *never], device=device)
    if on_step:
        on_step(x[rows, answer])
    for block in range(n_blocks):
        columns = answer[:, block * block_length:][:, :block_length]        # (B, block_length)
        for n_reveal in reveal_schedule(block_length, steps // n_blocks):
            h = model.encode(x, is_real)
            logits = model.unembed(h, where=(rows, columns))                # (B, block_length, V)
            logits[..., forbidden] = -torch.inf
            proposal = draw(logits, temperature, generator)                 # (B, block_length)
            if remasking == "random":
                confidence = uniform(proposal.shape, generator, device)
            else:
                scores = logits.log_softmax(dim=-1)
                confidence = scores.gather(-1, proposal[..., None])[..., 0]
            is_masked = x[rows, columns] == config.mask_id
            confidence = confidence.masked_fill(~is_masked, -torch.inf)
            order = confidence.argsort(dim=-1, descending=True, stable=True)    # ties: by position
            reveal = order.argsort(dim=-1) < n_reveal
            x[rows, columns] = torch.where(reveal, proposal, x[rows, columns])
            if on_step:
                on_step(x[rows, answer])
    return x[rows, answer]


def reveal_schedule(block_length: int, steps: int) -> list[int]:
    """How many tokens each step reveals; where it is uneven, the first steps reveal one more."""
    return [block_length // steps + (step < block_length % steps) for step in range(steps)]


def draw(logits, temperature: float, generator):
    """One token per position from softmax(logits / temperature): (B, L, V) -> (B, L).

    By the Gumbel-max trick in fp64: in fp32 the noise has no tail, which quietly lowers the
    temperature (arXiv 2409.02908). Each row draws from its own generator: a batch changes nothing.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    device = draws_on(logits.device)
    u = uniform(logits.shape, generator, device, torch.float64)
    noisy = logits.to(device).double() - temperature * (-u.log()).log()
    return noisy.argmax(dim=-1).to(logits.device)


def draws_on(device):
    """The device itself, but for Apple's MPS, which has no fp64."""
    return torch.device("cpu") if device.type == "mps" else device


def complete(model, tok, prompts: list[str], cfg, on_step=None) -> list[str]:
    """Answers to prompts as text up to end-of-text, in one batch, by cfg's settings of the sampler.

    Row b draws from (seed, the prompt itself), so an answer does not depend on its batch.
    """
    generator = row_generators(cfg.seed, 0, prompts, draws_on(model.embed.weight.device))
    never = [*tok.never, *range(tok.n_vocab, model.config.vocab_size)]  # rows that are no token
    x = generate(model, [tok.prompt_ids(text) for text in prompts], cfg.gen_length,
                 cfg.block_length, cfg.steps, cfg.temperature, cfg.remasking, generator, on_step,
                 never)
    return [tok.decode(row) for row in x.tolist()]


def check_lengths(block_size: int, prompt, gen_length: int, block_length: int, steps: int):
    if gen_length < 1 or block_length < 1 or gen_length % block_length:
        raise ValueError(f"gen_length={gen_length} must be a multiple of "
                         f"block_length={block_length}, and both at least 1")
    n_blocks = gen_length // block_length
    if steps % n_blocks or not n_blocks <= steps <= gen_length:
        raise ValueError(f"steps={steps} must be a multiple of the {n_blocks} blocks and at most "
                         f"gen_length={gen_length}")
    longest = max(len(p) for p in prompt)
    if longest + gen_length > block_size:
        raise ValueError(f"a prompt of {longest} tokens and gen_length={gen_length} exceed "
                         f"block_size={block_size}; prompts up to {block_size - gen_length} fit")


def load_model(init_from: str, device: str, revision: str = "", chat: bool = False):
    """-> model, tokenizer, for sampling; the weights in bf16 where a GPU computes in it."""
    folder, device = find_weights(init_from, revision), pick_device(device)
    dtype = pick_dtype("auto", device)
    tok = load_tokenizer(folder, chat)              # first: its mistakes are told at once
    model = DLLM.from_pretrained(folder, dtype, device=device)
    tok.check_fits(model.config)
    model.compute_dtype = dtype
    return model.eval(), tok


class Screen:
    """Shows the answer after every pass: in place on a terminal, one line a pass elsewhere."""

    def __init__(self, tok, in_place: bool):
        self.tok, self.in_place, self.height = tok, in_place, 0

    def show(self, x):
        text = printable(self.tok.show(x.tolist()))
        if self.in_place:
            up = f"\x1b[{self.height}F\x1b[0J" if self.height else ""
            width = shutil.get_terminal_size().columns
            self.height = sum(1 + max(0, len(line) - 1) // width for line in text.split("\n"))
            print(f"{up}{text}", flush=True)
            time.sleep(0.05)                    # slow enough to watch
        else:
            print(text.replace("\n", "\\n"))


def printable(text: str) -> str:
    """Text whose control characters, but for newlines, are written out: no escape codes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


if __name__ == "__main__":
    run(main, SampleConfig)
