"""AdamW at half the memory, with weights that are fp32 to the last bit.

A bf16 weight of size w cannot move by less than w / 256, and a step of fine-tuning is smaller than
that: stored in bf16 alone, most weights never move at all. Here the fp32 weight is kept as two
halves: the nearest bf16 number, which the network computes with (fp32 weights would be rounded to
it in every pass), and a 16-bit remainder, which only the optimizer and the EMA read.

    bytes a parameter    bf16 half 2, remainder 2, first moment 2, second moment 2    8
                         gradient 2                                                  10
                         EMA target in fp32, without head                            14
    AdamW in fp32        weight 4, moments 8, gradient 4                             16, EMA: 20

LLaDA-8B: 80 GB, 110 GB with its EMA, and 5.4 GB for a predictor of two blocks, which stays fp32.

The first moment changes by a tenth each step, so that rounding to bf16 is harmless. The second
changes by a thousandth, which rounding to nearest would lose: it is rounded up or down at random,
with the right mean. The random numbers depend on (seed, step) only, so a resumed run draws the
same. Gradients, and their sums over micro-batches and ranks, are bf16.
"""
import math

import torch

from pretrained.device import stream

CHUNK = 1 << 24                 # weights updated at a time, which bounds the fp32 copies


def split(full, high=None, low=None):
    """Split fp32 into the nearest bf16 (ties away from zero) and its remaining bits, as int16; into
    the tensors that are given, or into new ones."""
    bits = full.view(torch.int32)
    high = torch.empty_like(full, dtype=torch.bfloat16) if high is None else high
    low = torch.empty_like(full, dtype=torch.int16) if low is None else low
    high.view(torch.int16).copy_((bits + 0x8000) >> 16)
    return high, low.copy_(bits)        # the lower 16 bits, read with a sign


def join(high, low):
    """Join bf16 and int16 into the fp32 they were split from, bit for bit."""
    bits = torch.add(low, high.view(torch.int16).to(torch.int32), alpha=1 << 16)
    return bits.view(torch.float32)


def round_at_random(x, generator, out=None):
    """Round fp32 to the bf16 above or below, with probabilities such that the mean is x; into out,
    if it is given."""
    noise = torch.randint(1 << 16, x.shape, generator=generator, device=x.device,
                          dtype=torch.int32)
    out = torch.empty_like(x, dtype=torch.bfloat16) if out is None else out
    out.view(torch.int16).copy_(noise.add_(x.view(torch.int32)) >> 16)
    return out


class Lean(torch.optim.Optimizer):
    """AdamW that turns the fp32 parameters in `halve` into bf16 at once; others stay fp32.

    State of a parameter: step (), exp_avg and exp_avg_sq in its dtype, and low (int16) if halved.
    """

    def __init__(self, params, halve, lr: float, betas=(0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0, seed: int = 0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.seed, halve = seed, set(halve)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if p in halve:
                    p.data, state["low"] = split(p.data)
                # the step stays on the CPU: reading it there needs no synchronisation
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p),
                             exp_avg_sq=torch.zeros_like(p))

    def fp32_of(self, p):
        """Return the parameter in fp32."""
        return join(p.detach(), self.state[p]["low"]) if "low" in self.state[p] else p.float()

    @torch.no_grad()
    def step(self):
        """Update once, or not at all if `found_inf` (as for torch's fused AdamW) is set; reading
        it is the one synchronisation here."""
        if getattr(self, "found_inf", None) is not None and self.found_inf:
            return
        generators = {}                                     # one a device, seeded in each step
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                step = int(state["step"])
                if p.device not in generators:
                    generators[p.device] = stream(self.seed, "lean", step, device=p.device)
                stored = [p, state["exp_avg"], state["exp_avg_sq"]]
                stored += [state["low"]] if "low" in state else []
                for chunks in zip(p.grad.reshape(-1).split(CHUNK),
                                  *(x.view(-1).split(CHUNK) for x in stored)):
                    update(*chunks, step=step, generator=generators[p.device], **{
                        key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})


def update(grad, p, exp_avg, exp_avg_sq, low=None, *, step, generator, lr, betas, eps,
           weight_decay):
    """Do one AdamW step in fp32 on flat slices of equal length, and write them back as stored."""
    full, grad = p if low is None else join(p, low), grad.float()
    m = exp_avg.float().lerp_(grad, 1 - betas[0])
    v = exp_avg_sq.float().mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = v.sqrt().div_(math.sqrt(1 - betas[1] ** step)).add_(eps)
    if weight_decay:                                        # else a pass that changes nothing
        full.mul_(1 - lr * weight_decay)
    full.addcdiv_(m, denominator, value=-lr / (1 - betas[0] ** step))
    if low is None:                                         # m and v are the stored tensors
        return
    exp_avg.copy_(m)
    round_at_random(v, generator, out=exp_avg_sq)
    split(full, p, low)
