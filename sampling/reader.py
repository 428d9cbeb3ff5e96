"""The forward passes of each block: what the model reads, computes and keeps; when to stop."""
import torch

from model import Padded
from sampling.cache import Cache
from sampling.graph import Graph, check_graphs
from sampling.reveal import Sampling


class Reader:
    """Runs the model over the texts of a canvas, in one block after the other.

    Without shortcuts every pass reads and computes all tokens. A window leaves out masks far after
    the block; with a cache only the first pass of a block computes all that is read.
    """

    def __init__(self, model, s: Sampling):
        """Raises ValueError for graphs without a CUDA GPU."""
        if s.graphs:
            check_graphs(model.embed.weight.device)
        self.model, self.s, self.is_real = model, s, None
        self.copies = 2 if s.cfg_scale else 1   # guidance needs each text without its prompt, too
        self.shift = int(model.config.shift)    # Dream scores a token by the state before it

    def begin(self, is_real, slots, start: int):
        """Turn to the block that begins at slot `start`. is_real (B, T) on the CPU; slots (B, N):
        the columns to fill, over all blocks."""
        s, N, end = self.s, slots.shape[1], start + self.s.block_length
        if s.window:                    # a row's slots are its end: all rows lose as many tokens
            slots = slots[:, :min(N, end + s.window)]
            is_real = is_real[:, N - slots.shape[1]:]
        computed = slots[:, start:end if s.cache == "dual" else N]
        self.computed = torch.cat([computed[:, :self.shift] - 1, computed], dim=1)
        self.slots, self.is_first = slots, True
        if self.is_real is None or not torch.equal(is_real, self.is_real):
            self.is_real = is_real
            self.set_up(None if is_real.all() else is_real.repeat(self.copies, 1))

    def set_up(self, attended):
        """Make layout and graph, which stay until the rows or columns that are read change.
        attended (copies * B, T), on the CPU: where tokens are real; None: all."""
        device = self.model.embed.weight.device
        self.attended, self.layout, self.graph = attended, None, None
        if self.s.graphs:
            self.graph = Graph(device)
        if self.s.cache != "none":
            self.layout = Cache(attended, device)
        elif self.s.graphs:
            self.layout = Padded(attended, device)

    def logits(self, x, columns, places):
        """x (B, T) -> logits (B, n, V) at n columns of each row; places (B, n) are the same
        positions, counted from the start of the block."""
        x = x[:, :self.is_real.shape[1]]
        if self.s.cache == "none":
            inputs = x, self.slots, columns
        elif self.is_first:
            self.is_first = False
            return self.read(x, self.slots, columns)
        else:
            inputs = x, self.slots, places + self.shift, self.computed
        return self.graph(self.read, *inputs) if self.graph else self.read(*inputs)

    def read(self, x, slots, where, computed=None):
        """x (B, T), slots (B, N) -> logits (B, n, V) at n of the places that the pass computes,
        `where` (B, n). computed (B, m): their columns, if there is a cache; None: all."""
        if self.s.cfg_scale:
            is_gap = torch.zeros_like(x, dtype=torch.bool).scatter(1, slots, True)
            x = torch.cat([x, x.masked_fill(~is_gap, self.model.config.mask_id)])
        if self.s.cache != "none":
            self.layout.compute(None if computed is None else computed.repeat(self.copies, 1))
        h = self.model.encode(x, self.attended, self.layout)
        rows = torch.arange(len(x), device=x.device)[:, None]
        logits = self.model.unembed(h, (rows, where.repeat(self.copies, 1)))
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
