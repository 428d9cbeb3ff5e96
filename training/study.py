"""The study of a run while it trains: the numbers of diagnostics.py, and the anchor to its base."""
import torch

from model import DLLM
from pretrained.weights import find_weights, read_model
from training.controls import Anchor
from training.diagnostics import (bucket_numbers, embedding_numbers, movement_numbers,
                                  same_rate_number, sample)
from training.ranks import local_part
from training.sharding import is_sharded, rows_here


class Study:
    """Three calls in a step: `note` after each micro-batch, `pull` before the optimizer, `numbers`
    after it. `note` and `numbers` do nothing unless a log line is due; the pull runs every step.

    Make it before the optimizer, which may change how weights are stored.
    """

    def __init__(self, objective, cfg, is_resumed: bool):
        model = objective.model
        # with LoRA a resumed model is still as it began: its adapters are read later
        base = base_weights(model, cfg, again=is_resumed and not cfg.lora_rank)
        self.objective, self.anchor, self.traces = objective, None, []
        if cfg.anchor:                      # needs a copy of all of them
            base = {name: p.to(torch.float32, copy=True) for name, p in base}
            self.anchor = Anchor(dict(model.named_parameters()), base, cfg.anchor)
            base = base.items()
        self.base = {name: sample(p) for name, p in base}
        predictor = getattr(objective, "predictor", torch.nn.Module())
        self.predictor = {name: sample(p) for name, p in predictor.named_parameters()}

    def note(self, is_due: bool):
        """Keep what the objective has just seen."""
        if is_due:
            self.traces.append(self.objective.trace)

    def pull(self, is_due: bool) -> dict:
        """Add the anchor's gradient, if there is an anchor -> its number for the log."""
        return self.anchor.pull(measure=is_due) if self.anchor else {}

    def numbers(self, is_due: bool, batch) -> dict:
        """Return the numbers of a step for the log. batch: the inputs of its first micro-batch."""
        if not is_due:
            return {}
        traces, self.traces = self.traces, []
        return (embedding_numbers(traces) | same_rate_number(self.objective, batch)
                | bucket_numbers(traces)
                | movement_numbers(self.objective, self.base, self.predictor))


def base_weights(model, cfg, again: bool):
    """Yield (name, tensor) of each weight, or of this rank's part, at the start of the run.

    again: the model has moved on since (it was resumed), so they are read or drawn once more.
    """
    if not again:
        for name, p in model.named_parameters():
            yield name, local_part(p).detach()
        return
    rows = {name: rows_here(p) if is_sharded(model) else slice(None)
            for name, p in model.named_parameters()}
    device = model.embed.weight.device
    if cfg.init_from:
        folder = find_weights(cfg.init_from, cfg.revision)
        yield from read_model(folder, model, None, device, rows)
    else:
        fresh = DLLM(model.config).init_weights(torch.Generator().manual_seed(cfg.seed))
        for name, p in fresh.named_parameters():
            yield name, p.detach()[rows[name]].to(device)
