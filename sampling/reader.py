"""The forward passes of one block, with or without a cache, and when to stop making them."""
import torch

from sampling.cache import Cache
from sampling.reveal import Sampling


class Reader:
    """Runs the model over all tokens or, with a cache, after the first pass over a few of them."""

    def __init__(self, model, is_real, slots, start: int, s: Sampling):
        """is_real (B, T) on the CPU; slots (B, N) columns to fill; the block begins at `start`."""
        self.model, self.slots, self.s, self.cache = model, slots, s, None
        self.copies = 2 if s.cfg_scale else 1   # guidance needs each text without its prompt, too
        self.is_real = None if is_real.all() else is_real.repeat(self.copies, 1)
        end = start + s.block_length if s.cache == "dual" else slots.shape[1]
        self.computed = slots[:, start:end]     # the columns that a pass with a cache computes
        if model.config.shift:                  # Dream scores a token by the state before it
            self.computed = torch.cat([self.computed[:, :1] - 1, self.computed], dim=1)

    def logits(self, x, columns, places):
        """x (B, T) -> logits (B, n, V) at n columns of each row; places (B, n) are the same
        positions, counted from the start of the block."""
        if self.s.cfg_scale:
            is_gap = torch.zeros_like(x, dtype=torch.bool).scatter(1, self.slots, True)
            x = torch.cat([x, x.masked_fill(~is_gap, self.model.config.mask_id)])
        if self.s.cache != "none" and self.cache is None:
            self.cache = Cache(self.is_real, x.device)
        elif self.s.cache != "none":
            self.cache.compute(self.computed.repeat(self.copies, 1))
            columns = places + int(self.model.config.shift)
        h = self.model.encode(x, self.is_real, self.cache)
        rows = torch.arange(len(x), device=x.device)[:, None]
        logits = self.model.unembed(h, (rows, columns.repeat(self.copies, 1)))
        if self.s.cfg_scale:
            prompted, unprompted = logits.chunk(2)
            logits = unprompted + (self.s.cfg_scale + 1) * (prompted - unprompted)
        return logits


class DelayedFlag:
    """A bool on the GPU that the CPU reads one pass late, without synchronising with this pass.

    The one pass too many that this may cost changes nothing. On a CPU it is read at once.
    """

    def __init__(self):
        self.sent = None

    def read(self, flag) -> bool:
        """Return the flag of the call before, True at first."""
        if flag.device.type != "cuda":
            return bool(flag)
        arrived, event = self.sent or (torch.tensor(True), None)
        self.sent = flag.to("cpu", non_blocking=True), torch.cuda.Event()
        self.sent[1].record()
        if event:
            event.synchronize()
        return bool(arrived)
