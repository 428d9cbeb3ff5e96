"""The guard of a run: signals that ask it to stop, and gradients that are not finite.

Ctrl-C and SIGTERM are noted, and the loop saves and ends between two steps. More signals change
nothing (torchrun passes on a signal that its processes have got already); kill -9 and Ctrl-\\ end
at once. torchrun itself kills after 30 s (newer versions have --shutdown_timeout).

A gradient that is not finite leaves the weights as they are, without a synchronisation: the
optimizer reads the flag `found_inf` on the device. The guard looks when a log line is due, for then
host and device have synchronised anyway.
"""
import signal

import torch

from training.ranks import agree, gather_from_ranks
from training.sharding import release


class Guard:
    """Two calls: `skip_if_not_finite` in every step, `check` after it.

    on_nan: "stop" raises ValueError, "skip" goes on without the update. micro_batches(step) ->
    [(rows, fill)] of this rank; inputs(step, rows, fill) -> the inputs of the objective.
    """

    def __init__(self, objective, device, on_nan: str, micro_batches, inputs):
        self.objective, self.device, self.on_nan = objective, device, on_nan
        self.micro_batches, self.inputs = micro_batches, inputs
        self.signal_seen = 0            # by this process, at any time
        self.stop_signal = 0            # by any rank, known to all; the loop ends
        self.first_bad = torch.tensor(-1, device=device)
        self.handlers = {number: signal.signal(number, self.on_signal)
                         for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(self, number, frame):
        self.signal_seen = int(number)

    def skip_if_not_finite(self, step: int, grad_norm, optimizer):
        """Set the optimizer's `found_inf` if grad_norm () is not finite: it then does nothing."""
        optimizer.found_inf = 1 - grad_norm.isfinite().float()
        is_first = optimizer.found_inf.bool() & (self.first_bad < 0)
        self.first_bad = torch.where(is_first, step, self.first_bad)

    def check(self, is_due: bool, world: int) -> str:
        """Look, if a line is due or the only process has a signal -> a sentence to print, or "".

        Raises ValueError at a gradient that is not finite, unless on_nan is "skip".
        """
        if not is_due and not (world == 1 and self.signal_seen):
            return ""
        self.stop_signal, bad = agree([self.signal_seen, int(self.first_bad)], self.device)
        if bad < 0:
            return ""
        self.first_bad.fill_(-1)
        sentence = self.explain(bad)
        if self.on_nan == "stop":
            raise ValueError(f"{sentence}; --on_nan=skip would go on, the last checkpoint is kept")
        return f"{sentence}; that update is left out"

    @torch.no_grad()
    def explain(self, step: int) -> str:
        """Say which examples of a step have a loss that is not finite, each taken alone."""
        rows = [(row, fill) for some, fill in self.micro_batches(step) for row in some]
        bad = [-1 if self.objective(*self.inputs(step, [row], fill))[0].isfinite()
               else row.example_id for row, fill in rows]
        release(self.objective.model)
        bad = torch.cat(gather_from_ranks(torch.tensor(bad, device=self.device))).tolist()
        ids = sorted(i for i in bad if i >= 0)
        who = f"because of the examples with id {', '.join(map(str, ids))}"
        if not ids:
            who = "though the loss of each example alone is finite"
        elif len(ids) == len(bad):
            who = f"and so for each of the {len(bad)} examples alone; a lower lr may help"
        return f"at step {step + 1} the gradient is not finite, {who}"

    def close(self):
        """Give the signals back to their handlers of before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
