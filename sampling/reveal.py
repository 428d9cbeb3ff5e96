"""Rules of revealing: the token a mask becomes, its confidence, and how many a pass reveals.

A forward pass over a partly masked text gives logits at every mask. LLaDA and Dream differ in what
they do with them (their generate.py and generation_utils.py):

               confidence of a proposal (`remasking`)              masks revealed per pass
    LLaDA      low_confidence: p of the proposed token             equally many in each
               random: drawn at random
    Dream      maskgit_plus: p after temperature, top_p, top_k     as many as fall when time goes
               topk_margin: p of the first - p of the second       from t to s, in equal steps
               entropy: the negative entropy                       from 1 to 0
               origin: drawn at random
    Fast-dLLM  LLaDA's or Dream's                                  all that are confident enough
"""
import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import torch

from model import row_generators, uniform
from pretrained.device import to_device


Remasking = Literal["low_confidence", "random", "maskgit_plus", "topk_margin", "entropy", "origin"]
EndTokens = Literal["allowed", "last", "never"]
CacheKind = Literal["none", "prefix", "dual"]
LARGEST = 1e9           # of a factor or divisor of logits: fp32 ends at 3e38, logits at some 1e4


@dataclass
class Sampling:
    """Settings of generating. LLaDA's settings have LLaDA's names, Dream's have Dream's."""
    gen_length: int = 128               # tokens to generate, end-of-text included
    block_length: int = 128             # blocks are finished one after the other, left to right
    steps: int = 128                    # forward passes in all; gen_length: one token per pass
    temperature: float = 0.0            # 0: the likeliest token; 1: sampled from the model
    remasking: Remasking = "low_confidence"  # which masks stay: two of LLaDA's, four of Dream's
    top_p: float = 1.0                  # nucleus sampling: the fewest tokens with this sum of p
    top_k: int = 0                      # sample from the k likeliest tokens only; 0: all
    alg_temp: float = 0.0               # Dream: > 0 draws which masks to reveal, by confidence
    cfg_scale: float = 0.0              # classifier-free guidance: away from the unprompted answer
    end_tokens: EndTokens = "allowed"   # last: revealed after all others; never: forbidden
    cache: CacheKind = "none"           # reuse keys and values of the prefix, or around the block
    window: int = 0                     # read only this many masks after the block; 0: all
    graphs: bool = False                # launch the passes as CUDA graphs; needs a CUDA GPU
    threshold: float = 0.0              # reveal every token with this p, whatever steps is; 0: off
    factor: float = 0.0  # Fast-dLLM: reveal the n surest while (n + 1)(1 - p_n) < factor; 0: off
    seed: int = 42                      # for temperature, alg_temp, random and origin

    def __post_init__(self):
        check_lengths(self.gen_length, self.block_length, self.steps)
        for field in fields(Sampling):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                raise ValueError(f"{field.name}={value!r} is not one of "
                                 f"{', '.join(get_args(field.type))}")
        for name in ("temperature", "top_k", "alg_temp", "cfg_scale", "window", "threshold",
                     "factor"):
            if not 0 <= getattr(self, name) < float("inf"):             # also refuses NaN
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number from 0 up")
        for name in ("temperature", "alg_temp", "cfg_scale", "factor"):
            value = getattr(self, name)
            if value and not 1 / LARGEST <= value <= LARGEST:
                raise ValueError(f"{name}={value} must be 0 or lie in "
                                 f"{1 / LARGEST:g}..{LARGEST:g}, or fp32 overflows")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 keeps all tokens")
        if self.threshold > 1:
            raise ValueError(f"threshold={self.threshold} is a probability, at most 1")
        if self.threshold and self.factor:
            raise ValueError(f"threshold={self.threshold} and factor={self.factor} are two rules "
                             f"for the same choice; leave one at 0")
        if self.is_parallel and self.remasking not in ("low_confidence", "maskgit_plus"):
            raise ValueError(f"threshold and factor compare probabilities: they need "
                             f"remasking=low_confidence or maskgit_plus, not {self.remasking}")
        dreams = "maskgit_plus", "topk_margin", "entropy"
        if self.alg_temp and (self.remasking not in dreams or self.is_parallel):
            raise ValueError(f"alg_temp={self.alg_temp} is Dream's: it needs remasking="
                             f"{', '.join(dreams[:2])} or {dreams[2]}, and no threshold or factor")

    @property
    def is_parallel(self) -> bool:
        return bool(self.threshold or self.factor)

    @property
    def is_random(self) -> bool:
        return bool(self.temperature or self.alg_temp) or self.remasking in ("random", "origin")

    @property
    def steps_per_block(self) -> int:
        return self.steps // (self.gen_length // self.block_length)


def check_lengths(gen_length: int, block_length: int, steps: int):
    """Raise ValueError unless blocks divide gen_length and steps, and each pass reveals a token."""
    if gen_length < 1 or block_length < 1 or gen_length % block_length:
        raise ValueError(f"gen_length={gen_length} must be a multiple of "
                         f"block_length={block_length}, and both at least 1")
    n_blocks = gen_length // block_length
    if steps % n_blocks or not n_blocks <= steps <= gen_length:
        raise ValueError(f"steps={steps} must be a multiple of the {n_blocks} blocks and at most "
                         f"gen_length={gen_length}")


# ----------------------------------------------------------------------------------------------
# which token, and how sure


def propose(logits, s: Sampling, noise, ends):
    """logits (B, n, V) -> token, confidence and log p by the model at each place, all (B, n).

    noise(*shape, dtype): U[0, 1) of shape (B, n, *shape). ends: ids that end a text.
    """
    kept = keep_likeliest(logits, s)
    u = noise(logits.shape[-1], dtype=torch.float64) if s.temperature else None
    proposal = draw(kept, s.temperature, u)                                 # (B, n)

    logp = confidence = log_p(logits, proposal)         # LLaDA: by the model, without temperature
    if s.end_tokens == "last":                          # as if no end token were possible
        logits = logits.index_fill(-1, ends, -torch.inf)
        confidence = log_p(logits, proposal)
    if s.remasking in ("random", "origin"):
        confidence = noise()
    elif s.remasking != "low_confidence":               # Dream: by what the token was drawn from
        log_probs = (keep_likeliest(logits, s) / (s.temperature or 1)).log_softmax(dim=-1)
        if s.remasking == "maskgit_plus":
            confidence = log_probs.gather(-1, proposal[..., None])[..., 0]
        elif s.remasking == "topk_margin":
            first, second = log_probs.exp().topk(2, dim=-1).values.unbind(dim=-1)
            confidence = first - second
        else:                                           # the less entropy, the more confidence
            confidence = -torch.special.entr(log_probs.exp()).sum(dim=-1)
    if s.alg_temp:                      # Gumbel noise: the n first are drawn without replacement
        confidence = confidence.exp() if s.remasking == "maskgit_plus" else confidence
        confidence = confidence / s.alg_temp - (-noise().log()).log()
    if s.end_tokens == "last" and s.remasking not in ("random", "origin"):
        confidence = confidence.masked_fill(torch.isin(proposal, ends), -torch.inf)
    # finite, so that it still ranks above revealed places, which have -inf
    confidence = confidence.clamp(min=torch.finfo(confidence.dtype).min)
    return proposal, confidence, logp


def log_p(logits, token):
    """log softmax(logits)[token]: (B, n, V), (B, n) -> (B, n).

    The maximum goes first: near p = 1 the result then resolves doubts 1 - p of 1e-7. The difference
    of two numbers around 40 resolves 4e-6, and smaller doubts would tie.
    """
    logits = logits - logits.amax(dim=-1, keepdim=True)
    return logits.gather(-1, token[..., None])[..., 0] - logits.logsumexp(dim=-1)


def draw(logits, temperature: float, u):
    """Draw a token per place from softmax(logits / temperature): (B, n, V) -> (B, n).

    u: fp64 numbers of U[0, 1) in the shape of logits, unless temperature is 0. The Gumbel-max trick
    needs fp64: in fp32 the noise has no tail, which lowers the temperature (arXiv 2409.02908).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    noisy = logits.to(u.device).double() - temperature * (-u.log()).log()
    return noisy.argmax(dim=-1).to(logits.device)


def keep_likeliest(logits, s: Sampling):
    """Set to -inf all logits but the top_k, and all after the first tokens that reach top_p."""
    if s.top_p < 1:
        probs, order = (logits / (s.temperature or 1)).softmax(dim=-1).sort(dim=-1, descending=True)
        is_out = probs.cumsum(dim=-1) - probs > s.top_p
        logits = logits.masked_fill(is_out.scatter(-1, order, is_out), -torch.inf)
    if s.top_k:
        least = logits.topk(min(s.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


# ----------------------------------------------------------------------------------------------
# random numbers


def draw_uniform(generator, T: int, columns, L: int, places, shape=(), dtype=torch.float32):
    """Draw U[0, 1) for n places of each row -> (B, n, *shape).

    With a generator per row, each draws for the L places of its block, so that a row does not
    depend on its batch. A single generator draws for all T columns, as LLaDA's code does.
    """
    device = draws_on(places.device)
    per_row = isinstance(generator, list)
    u = uniform((len(places), L if per_row else T, *shape), generator, device, dtype)
    rows = torch.arange(len(places), device=device)[:, None]
    return u[rows, (places if per_row else columns).to(device)]


def draws_on(device):
    """Return the device to draw on: the same, or the CPU for Apple's MPS, which has no fp64."""
    return torch.device("cpu") if device.type == "mps" else device


def generator_of_block(generator, rows: list[int], start: int, s: Sampling):
    """Return what draws for these rows in the block that begins at `start`.

    With a threshold or factor a row's number of passes depends on its batch. So that its draws do
    not, each row then has a new generator in each block, seeded by its own one.
    """
    if not isinstance(generator, list):
        return generator
    own = [generator[b] for b in rows]
    if not s.is_parallel:
        return own
    return [row_generators(g.initial_seed(), 0, [f"block {start}"], g.device)[0] for g in own]


# ----------------------------------------------------------------------------------------------
# how many


class Schedule:
    """The number of tokens that each pass over a block reveals.

    LLaDA: equally many, and one more in the first passes if that is uneven. Dream: time goes from 1
    to 1e-3 in equal steps; from t to s a pass reveals the share 1 - s / t of the masks, rounded
    down (`origin`: each mask with that probability), and the last pass all. threshold, factor: all
    tokens that are sure enough, at least one.
    """

    def __init__(self, s: Sampling, n_masks: list[int], device):
        """n_masks: the masks of each row in this block."""
        self.s, most, passes = s, max(n_masks), s.steps_per_block
        if s.is_parallel:
            self.n_passes, self.most_left = most, list(range(most, 0, -1))
            return
        if s.remasking == "origin":
            self.n_passes, self.most_left = passes, [most] * passes
            return
        of_row = reveal_schedule if s.remasking in ("low_confidence", "random") else dream_schedule
        counts = torch.tensor([of_row(n, passes) for n in n_masks])         # (B, passes)
        left = torch.tensor(n_masks)[:, None] - counts.cumsum(dim=1) + counts   # before each pass
        self.most_left = [n for n in left.amax(dim=0).tolist() if n]
        self.n_passes = len(self.most_left)
        self.counts = to_device(counts, device)

    def how_many(self, step: int, ranked):
        """Confidences in descending order (B, n) -> how many of them to reveal (B, 1)."""
        if self.s.threshold:
            n_sure = (ranked >= math.log(self.s.threshold)).sum(dim=1, keepdim=True)
            return n_sure.clamp(min=1)
        if self.s.factor:               # n of them while (n + 1)(1 - p of the n-th) < factor
            n = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
            is_sure = ((n + 1) * (1 - ranked.exp()) < self.s.factor).int().cumprod(dim=1)
            return is_sure.sum(dim=1, keepdim=True).clamp(min=1)
        if self.s.remasking == "origin":
            return (ranked >= 1 - falling_share(step, self.n_passes)).sum(dim=1, keepdim=True)
        return self.counts[:, step:step + 1]


def reveal_schedule(n_masks: int, passes: int) -> list[int]:
    """LLaDA's: where it is uneven, the first passes reveal one more."""
    return [n_masks // passes + (step < n_masks % passes) for step in range(passes)]


def dream_schedule(n_masks: int, passes: int) -> list[int]:
    """Dream's: with one pass per token the first reveals none and the last two, as in its code."""
    schedule = []
    for step in range(passes):
        left = n_masks - sum(schedule)
        schedule.append(int(left * falling_share(step, passes)))
    return schedule


def falling_share(step: int, passes: int) -> float:
    """The share 1 - s / t of the masks that a pass reveals; all of them in the last."""
    t, s = (1 + (1e-3 - 1) * i / passes for i in (step, step + 1))
    return 1 - s / t if step < passes - 1 else 1.0
