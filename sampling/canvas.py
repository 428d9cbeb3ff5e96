"""The texts that a sampler fills in: where their gaps are, and what has been revealed so far."""
import math
import time

import torch

from pretrained.device import to_device
from sampling.reveal import Sampling


class Canvas:
    """B texts of up to T tokens, each with gaps to fill. Attributes:

    x (B, T): ids, padded at the end. p (B, T): the probability that a token had when it was
    revealed, else 0. slots (B, N): the columns of x to fill, from left to right, in whole blocks;
    is_gap (B, N): False where a row has fewer gaps. rows: the rows that are still worked on.
    never, ends: ids that must not be revealed, ids that end a text. is_real (B, T) and is_gap stay
    on the CPU.
    """

    def __init__(self, model, texts, gaps, s: Sampling, never=(), ends=None, on_step=None):
        """texts, gaps: per row the ids, and the positions to fill. on_step(x, p): see `show`."""
        config, device = model.config, model.embed.weight.device
        self.mask_id, self.eos_id, self.on_step = config.mask_id, config.eos_id, on_step
        self.s = s
        n_tokens = [len(text) for text in texts]
        n_gaps = [len(gap) for gap in gaps]
        T = max(n_tokens)
        N = math.ceil(max(n_gaps) / s.block_length) * s.block_length

        x = [text + [config.mask_id] * (T - len(text)) for text in texts]
        slots = [gap + gap[:1] * (N - len(gap)) for gap in gaps]
        self.x = to_device(torch.tensor(x), device)                         # (B, T)
        self.p = torch.zeros_like(self.x, dtype=torch.float32)
        self.slots = to_device(torch.tensor(slots), device)                 # (B, N)
        self.is_real = torch.arange(T) < torch.tensor(n_tokens)[:, None]
        self.is_gap = torch.arange(N) < torch.tensor(n_gaps)[:, None]

        ends = [config.eos_id] if ends is None else list(ends)
        never = [config.mask_id, *never, *(ends if s.end_tokens == "never" else [])]
        self.ends = to_device(torch.tensor(ends, dtype=torch.long), device)
        self.never = to_device(torch.tensor(never, dtype=torch.long), device)
        self.rows, self.seconds_shown = list(range(len(texts))), 0.0

    def show(self):
        """Call on_step(x, p), and keep the seconds that this takes apart."""
        if self.on_step:
            began = time.perf_counter()
            self.on_step(self.x, self.p)
            self.seconds_shown += time.perf_counter() - began

    def update(self, rows, x, p):
        """Write back and show the texts of some rows; rows is a tensor on the device."""
        self.x[rows], self.p[rows] = x, p
        self.show()

    def check_p(self):
        """Raise ValueError if logits were not finite: they leave NaN in p.

        This synchronises the GPU, so it is called where that happens anyway.
        """
        if self.p.isnan().any():
            or_scale = f", or cfg_scale={self.s.cfg_scale} is too large" if self.s.cfg_scale else ""
            raise ValueError(f"the model's logits are not finite, or no token may be revealed: its "
                             f"weights are broken{or_scale}")

    def leave_ended(self, start: int):
        """Work no longer on rows with an end token before slot `start`. Synchronises the GPU."""
        self.check_p()
        before = self.x.gather(1, self.slots[:, :start])
        has_ended = torch.isin(before, self.ends).any(dim=1).tolist()
        self.rows = [b for b in self.rows if not has_ended[b]]

    def finish(self) -> int:
        """Fill the masks left in ended rows with end-of-text -> number of generated tokens, each
        row's up to its first end token, included. Raises ValueError as check_p does."""
        self.check_p()
        answer = self.x.gather(1, self.slots)                               # (B, N)
        is_gap = to_device(self.is_gap, self.x.device)
        if len(self.rows) < len(self.x):
            answer = answer.masked_fill(answer == self.mask_id, self.eos_id)
            self.x.scatter_(1, self.slots, answer)
            self.show()
        is_end = torch.isin(answer, self.ends) & is_gap
        n_ends_before = is_end.int().cumsum(dim=1) - is_end.int()
        return int((is_gap & (n_ends_before == 0)).sum())
