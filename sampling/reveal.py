"""Which token a mask becomes, how sure that is, and how many are revealed at once.

A pass over a partly masked text gives logits at every mask. LLaDA and Dream differ in what they
make of them (their generate.py and generation_utils.py):

               how sure (`remasking`)                             how many
    LLaDA      low_confidence: p of the proposed token; random    as many in every pass
    Dream      maskgit_plus: the same p, after temperature,       what falls from time t to s,
               top_p and top_k; topk_margin: p of the first -     in equal steps from 1 to 0
               p of the second; entropy: minus that of p;
               origin: at random
    Fast-dLLM  as either                                          all that are sure enough
"""
import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import torch

from model import uniform
from pretrained.device import to_device


@dataclass
class Sampling:
    """What to generate and how: LLaDA's settings under LLaDA's names, Dream's under Dream's."""
    gen_length: int = 128               # tokens to generate, end-of-text included
    block_length: int = 128             # a block is finished before the next begins
    steps: int = 128                    # passes in all; gen_length of them reveal one token each
    temperature: float = 0.0            # 0: the likeliest token; 1: sampled as the model says
    remasking: Literal["low_confidence", "random", "maskgit_plus", "topk_margin", "entropy",
                       "origin"] = "low_confidence"  # what stays masked; the last four: Dream's
    top_p: float = 1.0                  # only the likeliest tokens that have this much in all
    top_k: int = 0                      # only so many of the likeliest tokens; 0: all
    alg_temp: float = 0.0               # Dream: > 0 reveals not the surest, but draws among them
    cfg_scale: float = 0.0              # classifier-free guidance: away from the unprompted answer
    end_tokens: Literal["allowed", "last", "never"] = "allowed"  # last: the least sure of all
    cache: Literal["none", "prefix", "dual"] = "none"  # what a block's later passes do not compute
    threshold: float = 0.0              # reveal all with this probability, whatever steps; 0: off
    factor: float = 0.0                 # reveal the n surest if n + 1 of their doubts are below it
    seed: int = 42                      # for temperature, alg_temp, random and origin

    def __post_init__(self):
        check_lengths(self.gen_length, self.block_length, self.steps)
        for field in fields(Sampling):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                raise ValueError(f"{field.name}={value!r} is not one of "
                                 f"{', '.join(get_args(field.type))}")
        for name in ("temperature", "top_k", "alg_temp", "cfg_scale", "threshold", "factor"):
            if not 0 <= getattr(self, name) < float("inf"):             # NaN is not, either
                raise ValueError(f"{name}={getattr(self, name)} must be a number from 0 up")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 leaves all tokens")
        if self.threshold > 1:
            raise ValueError(f"threshold={self.threshold} is a probability, at most 1")
        if self.threshold and self.factor:
            raise ValueError(f"threshold={self.threshold} and factor={self.factor} are two rules "
                             f"for the same; leave one at 0")
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
    if gen_length < 1 or block_length < 1 or gen_length % block_length:
        raise ValueError(f"gen_length={gen_length} must be a multiple of "
                         f"block_length={block_length}, and both at least 1")
    n_blocks = gen_length // block_length
    if steps % n_blocks or not n_blocks <= steps <= gen_length:
        raise ValueError(f"steps={steps} must be a multiple of the {n_blocks} blocks and at most "
                         f"gen_length={gen_length}")


def propose(logits, s: Sampling, noise, ends):
    """(B, n, V) -> a token for each place, how sure it is, its log p by the model, each (B, n)."""
    allowed = keep_likeliest(logits, s)
    u = noise(logits.shape[-1], dtype=torch.float64) if s.temperature else None
    proposal = draw(allowed, s.temperature, u)[..., None]                   # (B, n, 1)

    def log_p(logits):
        return logits.gather(-1, proposal)[..., 0] - logits.logsumexp(dim=-1)
    logp = confidence = log_p(logits)                   # LLaDA: by the model, without temperature
    if s.end_tokens == "last":          # they may be proposed, but any other token is surer
        logits = logits.index_fill(-1, ends, -torch.inf)
        confidence = log_p(logits)
    if s.remasking in ("random", "origin"):
        confidence = noise()
    elif s.remasking != "low_confidence":               # Dream: by what was drawn from
        drawn_from = keep_likeliest(logits, s) / (s.temperature or 1)
        log_probs = drawn_from.log_softmax(dim=-1)
        if s.remasking == "maskgit_plus":
            confidence = log_probs.gather(-1, proposal)[..., 0]
        elif s.remasking == "topk_margin":
            first, second = log_probs.exp().topk(2, dim=-1).values.unbind(dim=-1)
            confidence = first - second
        else:                                           # entropy, of which less is surer
            confidence = -torch.special.entr(log_probs.exp()).sum(dim=-1)
    if s.alg_temp:                      # the n first of these are a draw without replacement
        confidence = confidence.exp() if s.remasking == "maskgit_plus" else confidence
        confidence = confidence / s.alg_temp - (-noise().log()).log()
    if s.end_tokens == "last" and s.remasking not in ("random", "origin"):
        confidence = confidence.masked_fill(torch.isin(proposal[..., 0], ends), -torch.inf)
    confidence = confidence.clamp(min=torch.finfo(confidence.dtype).min)    # above what is revealed
    return proposal[..., 0], confidence, logp


def draw(logits, temperature: float, u):
    """One token per place from softmax(logits / temperature): (B, n, V) -> (B, n).

    u: fp64 numbers of U[0, 1) in the shape of logits, unless temperature is 0. By the Gumbel-max
    trick in fp64: in fp32 the noise has no tail, which lowers the temperature (arXiv 2409.02908).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    noisy = logits.to(u.device).double() - temperature * (-u.log()).log()
    return noisy.argmax(dim=-1).to(logits.device)


def keep_likeliest(logits, s: Sampling):
    """Logits in which all but top_k tokens, and all behind the first that reach top_p, are out."""
    if s.top_p < 1:
        probs, order = (logits / (s.temperature or 1)).softmax(dim=-1).sort(dim=-1, descending=True)
        is_out = probs.cumsum(dim=-1) - probs > s.top_p
        logits = logits.masked_fill(is_out.scatter(-1, order, is_out), -torch.inf)
    if s.top_k:
        least = logits.topk(min(s.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def draw_uniform(generator, T: int, where, L: int, places, V=(), dtype=torch.float32):
    """U[0, 1) for n places of each row: (B, n, *V).

    With a generator a row, each draws for its whole block, so that a batch changes nothing. With
    one generator numbers are drawn for all T tokens, needed or not, as LLaDA's code does.
    """
    device = draws_on(where.device)
    each = isinstance(generator, list)
    u = uniform((len(where), L if each else T, *V), generator, device, dtype)
    rows = torch.arange(len(where), device=device)[:, None]
    return u[rows, (places if each else where).to(device)]


def draws_on(device):
    """The device itself, but for Apple's MPS, which has no fp64."""
    return torch.device("cpu") if device.type == "mps" else device


class Schedule:
    """How many tokens each pass over a block reveals.

    LLaDA: as many in each pass, and one more in the first ones where that is uneven. Dream: time
    goes from 1 to 1e-3 in equal steps, and of m masks m (1 - s / t) fall from t to s, rounded down
    (`origin`: each with that probability), all in the last. threshold, factor: what is sure.
    """

    def __init__(self, s: Sampling, n_masks: list[int], device):
        self.s, most, passes = s, max(n_masks), s.steps_per_block
        if s.is_parallel:                               # one a pass at least
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
        """The surest confidences first (B, n) -> how many of them are revealed, (B, 1)."""
        if self.s.threshold:
            sure = (ranked >= math.log(self.s.threshold)).sum(dim=1, keepdim=True)
            return sure.clamp(min=1)
        if self.s.factor:               # n of them if (n + 1) (1 - p of the n-th) < factor
            n = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
            sure = ((n + 1) * (1 - ranked.exp()) < self.s.factor).int().cumprod(dim=1)
            return sure.sum(dim=1, keepdim=True).clamp(min=1)
        if self.s.remasking == "origin":
            return (ranked >= 1 - falling_share(step, self.n_passes)).sum(dim=1, keepdim=True)
        return self.counts[:, step:step + 1]


def reveal_schedule(n_masks: int, passes: int) -> list[int]:
    """LLaDA's: where it is uneven, the first passes reveal one more."""
    return [n_masks // passes + (step < n_masks % passes) for step in range(passes)]


def dream_schedule(n_masks: int, passes: int) -> list[int]:
    """Dream's: with a pass a token the first reveals none and the last two, as in its code."""
    schedule = []
    for step in range(passes):
        left = n_masks - sum(schedule)
        schedule.append(int(left * falling_share(step, passes)))
    return schedule


def falling_share(step: int, passes: int) -> float:
    """1 - s / t: the share of the masks that falls in a pass; all of them in the last."""
    t, s = (1 + (1e-3 - 1) * i / passes for i in (step, step + 1))
    return 1 - s / t if step < passes - 1 else 1.0
