"""Probe: how far tuning has moved a model inside, and what it has cost: drift, rank, forgetting.

    python analysis/probe.py --base=GSAI-ML/LLaDA-8B-Base --models=out/plain,out/jepa
    python analysis/probe.py --base=out/compare/base --models=out/compare/plain,out/compare/jepa \\
        --text=toy_base --scales=0.25,0.5,0.75,1.5
    python analysis/probe.py --grid=out/wide_t          all runs of a grid, and their base

Base and tuned model read the same held-out text without masks. Measured at every depth: the
embedding, the state after each block, the state after the final norm.

    drift              mean over tokens of |h - h_base| / |h_base|
    cosine distance    mean over tokens of 1 - cos(h, h_base)
    weight drift       |w - w_base| / |w_base| of all weights of that depth
    effective rank     exp(entropy of the normalised singular values) of the centred z
    diversity          1 - mean cosine of the z of two texts
    std                mean over dimensions of the standard deviation of the texts' mean states

z is what JEPA embeds: a text's mean state, layer-normed. Forgetting is the loss on masked tokens
minus the base's, under the same masks. The paper (arXiv 2606.00091) reports all but the cosine
distance, without definitions: these are ours. With `scales` the same is measured of the model
base + a (tuned - base): does forgetting follow if drift alone is turned down or up?

All texts go through one block before the next is read from its file, so two blocks are in memory
and never two models. Everything is fp32: bf16 would round away the steps of a small learning rate.
"""
import math
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import run  # first: it sets variables that torch reads

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from analysis.console import print_table
from analysis.frames import brief_names, with_runs
from analysis.likelihood import (BATCH_TOKENS, check_rates, in_batches, longest_first,
                                 masked_copies, row_losses)
from jepa import pool
from model import DLLM, Padded, rope_table
from pretrained.device import pick_device, to_device
from pretrained.tokenizer import load_tokenizer
from pretrained.weights import (check_names_and_shapes, find_weights, published_name, read_tensors,
                                stored_for, weights_file)
from tasks import wikitext
from tasks.common import load_examples, tokenize
from tasks.files import read_json, write_json
from tasks.stats import half_95
from training.diagnostics import cosines, effective_rank, off_diagonal
from training.log import git_commit


@dataclass
class ProbeConfig:
    base: str = ""                      # before tuning: a checkpoint, an out_dir or a hub name
    models: tuple[str, ...] = ()        # the same after tuning, one or more, with commas between
    grid: str = ""                      # or an out_dir of grid.py: its runs and their base
    text: str = "wikitext"              # or a task, whose validation rows are read, e.g. toy_base
    data_dir: str = ""                  # folder of the text's {split}.jsonl[.gz]; empty: the hub
    out_dir: str = "out/probe"          # probe.json goes here
    n_rows: int = 64                    # windows or rows of the text; 0: all
    window: int = 256                   # tokens of a window; longer rows of a task are left out
    rates: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # masking rates
    scales: tuple[float, ...] = ()      # values of a; each costs one more pass over every model
    device: str = "auto"                # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one

    def __post_init__(self):
        if self.n_rows < 0 or self.n_rows == 1 or self.window < 2:
            raise ValueError(f"n_rows={self.n_rows} must be 0 or at least 2, and window="
                             f"{self.window} at least 2")
        check_rates(self.rates)


def main(cfg: ProbeConfig):
    print_tables(probe(with_runs(cfg)))


def probe(cfg: ProbeConfig) -> dict:
    """Measure the base and every model -> a dict, also written to out_dir/probe.json."""
    device = pick_device(cfg.device)
    base, tok = Checkpoint(cfg.base, device), load_tokenizer(find_weights(cfg.base))
    config = base.model.config
    for name in cfg.models:  # report a mistake in the last before measuring the first
        if Checkpoint(name, device).model.config != config:
            raise ValueError(f"{name} and {cfg.base} are not the same network, so their states "
                             f"cannot be compared")
        if load_tokenizer(find_weights(name)) != tok:
            raise ValueError(f"{name} and {cfg.base} have different tokenizers, so they do not "
                             f"read the same tokens")
    rows = held_out_rows(cfg, tok, config.block_size)
    unmasked = ((torch.tensor(ids), torch.zeros(len(ids), dtype=torch.bool)) for ids, _ in rows)
    clean = list(in_batches(unmasked, BATCH_TOKENS, config.eos_id))
    copies = masked_copies(rows, cfg.rates, seed=0)
    masked = list(in_batches(copies, BATCH_TOKENS, config.eos_id))
    base_losses = None

    def score(name, scale=1.0):
        nonlocal base_losses
        tuned = Checkpoint(name, device)
        if scale != 1:
            tuned = Blend(Checkpoint(cfg.base, device), tuned, scale)
        numbers, losses = measure(base, tuned, clean, masked, f"{name} x {scale:g}")
        losses = losses.view(len(rows), len(cfg.rates))
        base_losses = losses if base_losses is None else base_losses  # the base is the first
        mean_drift = statistics.mean(numbers["drift"][1:-1])  # the final norm has another scale
        return {"mean_drift": mean_drift, **numbers, **forgetting(losses, base_losses)}

    blocks = [str(n) for n in range(1, config.n_layer + 1)]
    found = {"settings": asdict(cfg), "commit": git_commit(), "n": len(rows),
             "tokens": sum(len(ids) for ids, _ in rows), "depths": ["embed", *blocks, "norm"],
             "models": {}}
    os.makedirs(cfg.out_dir, exist_ok=True)
    for name in dict.fromkeys((cfg.base, *cfg.models)):
        scores = found["models"][name] = score(name)
        if name != cfg.base:
            scores["trained"] = training_of(find_weights(name))
            scores["scales"] = [{"scale": scale, **score(name, scale)} for scale in cfg.scales]
        write_json(Path(cfg.out_dir) / "probe.json", found)
    return found


def held_out_rows(cfg: ProbeConfig, tok, block_size: int) -> list[tuple[list[int], int]]:
    """Load the texts, longest first -> pairs of ids and how many of them are never masked.

    That is the first token of a window, or the prompt of a task's row, which ends in end-of-text.
    """
    if cfg.text == "wikitext":
        text = wikitext.load_text("test", cfg.data_dir)
        rows = [(ids, 1) for ids in wikitext.windows(text, tok, cfg.window, cfg.n_rows).tolist()]
    else:
        examples = load_examples(cfg.text, "validation", cfg.data_dir)
        rows = [(row.prompt + row.answer + [tok.eos_id], len(row.prompt))
                for row in tokenize(examples, tok, cfg.window, f"{cfg.text} validation")]
        rows = rows[:cfg.n_rows or None]
    rows = [rows[i] for i in longest_first([ids for ids, _ in rows])]
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} text of {cfg.text} is not enough: rank and diversity need "
                         f"two or more")
    if len(rows[0][0]) > block_size:
        raise ValueError(f"a text of {len(rows[0][0])} tokens is longer than "
                         f"block_size={block_size}; choose a smaller --window")
    return rows


# ----------------------------------------------------------------------------------------------
# a model, one depth at a time


class Checkpoint:
    """A model on the meta device; the parameters of one depth are read from its files."""

    def __init__(self, name: str, device):
        folder = find_weights(name)
        self.device, self.model = device, DLLM.on_meta(folder)
        stored, family = stored_for(folder, self.model), self.model.published["model_type"]
        shapes = dict(self.model.named_parameters())
        theirs = {name: published_name(name, family) for name in shapes}
        if self.model.config.tied_head:
            theirs["head.weight"] = theirs["embed.weight"]
        check_names_and_shapes(stored, {theirs[name]: p for name, p in shapes.items()},
                               weights_file(folder))
        self.stored = {name: (key, stored[key]) for name, key in theirs.items()}

    def read(self, depth: int) -> dict:
        """Read the parameters of a depth -> {our name: fp32 tensor on the device}."""
        wanted = {self.stored[name][0]: name for name in names_at(self.model, depth)}
        of_files = {key: self.stored[name][1] for key, name in wanted.items()}
        return {wanted[key]: tensor
                for key, tensor in read_tensors(of_files, torch.float32, self.device)}


class Blend:
    """base + scale * (tuned - base), read like a Checkpoint."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, scale: float):
        self.base, self.tuned, self.scale = base, tuned, scale
        self.model, self.device = tuned.model, tuned.device

    def read(self, depth: int) -> dict:
        end = self.tuned.read(depth)
        return {name: start.lerp_(end[name], self.scale)
                for name, start in self.base.read(depth).items()}


def names_at(model, depth: int) -> list[str]:
    """Name the parameters of a depth: 0 the embedding, l block l, then the norm with the head.

    A head that is tied to the embedding is named at both depths.
    """
    last = model.config.n_layer + 1
    prefix = {0: "embed.", last: ("norm.", "head.")}.get(depth, f"blocks.{depth - 1}.")
    return [name for name, _ in model.named_parameters(remove_duplicate=False)
            if name.startswith(prefix)]


@torch.no_grad()
def states(source, inputs):
    """Yield at each depth the states (B, T, C) of all batches, as DLLM.encode computes them.

    inputs: pairs xt (B, T), is_real (B, T) or None. It yields one list, updated in place. Between
    two depths source.model holds the weights of the first of them, and no others.
    """
    model, device = source.model, source.device
    longest = max(xt.shape[1] for xt, _ in inputs)
    cos, sin = rope_table(longest, model.config, device)
    h = [to_device(xt, device) for xt, _ in inputs]
    for depth in range(model.config.n_layer + 2):
        for name, tensor in source.read(depth).items():
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
        tensor = None  # or this name would keep the tensor alive
        for i, (xt, is_real) in enumerate(inputs):
            if depth == 0:
                h[i] = model.embed(h[i])
            elif depth <= model.config.n_layer:
                T = xt.shape[1]
                h[i] = model.blocks[depth - 1](h[i], cos[:T], sin[:T], Padded(is_real, device))
            else:
                h[i] = model.norm(h[i])
        yield h
        model.to("meta")


@torch.no_grad()
def measure(base, tuned, clean, masked, name: str):
    """Batches of in_batches -> {number: one per depth}, the mean loss of each masked copy (N,).

    The tuned model reads both kinds, the base only the clean one, block by block side by side.
    """
    def inputs(batches):
        return [(torch.where(is_masked, base.model.config.mask_id, ids), is_real)
                for ids, is_masked, is_real in batches]

    real = [torch.ones_like(ids) > 0 if is_real is None else is_real for ids, _, is_real in clean]
    last, columns, losses = base.model.config.n_layer + 1, [], []
    streams = zip(states(base, inputs(clean)), states(tuned, inputs(clean) + inputs(masked)))
    bar = tqdm(streams, name, total=last + 1, unit="block", leave=False, disable=None)
    for depth, (h_base, h) in enumerate(bar):
        z, means = embeddings(h, real)
        columns.append({**distances(h, h_base, real), "effective_rank": effective_rank(z).item(),
                        "diversity": 1 - off_diagonal(cosines(z, z)).item(),
                        "std": means.std(dim=0).mean().item(),
                        "weight_drift": weight_drift(tuned.model, base.model, depth)})
        if depth == last:
            for x, (ids, is_masked, _) in zip(h[len(clean):], masked):
                losses += row_losses(tuned.model, x, ids, is_masked)
    numbers = {key: [column[key] for column in columns] for key in columns[0]}
    if not all(map(math.isfinite, [*losses, *chain(*numbers.values())])):
        raise ValueError(f"{name} gives numbers that are not finite: the weights are broken, or "
                         f"too far from the base")
    return numbers, torch.tensor(losses, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------
# numbers


def distances(h, h_base, real) -> dict:
    """Lists of (B, T, C), (B, T, C), is_real (B, T) -> the means over all real tokens."""
    drift, cosine = [], []
    for x, x_base, where in zip(h, h_base, real):
        where = to_device(where, x.device)
        x, x_base = x[where], x_base[where]  # (N, C)
        tiny = torch.finfo(x.dtype).tiny
        drift.append((x - x_base).norm(dim=-1) / x_base.norm(dim=-1).clamp(min=tiny))
        # 1 - cos is half the squared distance of the unit vectors, and so exactly 0 for equal ones
        apart = F.normalize(x, dim=-1) - F.normalize(x_base, dim=-1)
        cosine.append(apart.square().sum(dim=-1) / 2)
    return {"drift": torch.cat(drift).double().mean().item(),
            "cosine_distance": torch.cat(cosine).double().mean().item()}


def embeddings(h, real):
    """Pool the states of N texts -> z (N, C) as JEPA's, and mean states (N, C), both fp64."""
    z, means = [], []
    for x, where in zip(h, real):
        z.append(pool(x, where))  # (B, C)
        where = to_device(where[..., None], x.device)
        means.append((x * where).sum(dim=1) / where.sum(dim=1))
    return torch.cat(z).cpu().double(), torch.cat(means).cpu().double()


def weight_drift(model, base, depth: int) -> float:
    """|w - w_base| / |w_base| over all parameters of a depth."""
    params = dict(model.named_parameters(remove_duplicate=False))
    base_params = dict(base.named_parameters(remove_duplicate=False))
    moved = length = 0.0
    for name in names_at(base, depth):
        moved += (params[name] - base_params[name]).square().sum(dtype=torch.float64).item()
        length += base_params[name].square().sum(dtype=torch.float64).item()
    return (moved / length) ** 0.5 if length else float(moved > 0)


def forgetting(losses, base_losses) -> dict:
    """Losses (N, R) of a model and of the base -> their means and paired differences."""
    by_row = (losses - base_losses).mean(dim=1)
    return {"loss_by_rate": losses.mean(dim=0).tolist(),
            "forgetting_by_rate": (losses - base_losses).mean(dim=0).tolist(),
            "forgetting": by_row.mean().item(), "half_95": half_95(by_row.tolist())}


def training_of(folder: str) -> dict | None:
    """Read how train.py made a checkpoint: settings and step; None for published weights."""
    path = os.path.join(folder, "train_state.json")
    if not os.path.isfile(path):
        return None
    state = read_json(path)
    return {**state["settings"], "step": state["step"]}


def print_tables(found: dict):
    """Print a line per model, and one per model and scale; probe.json has the numbers by depth."""
    table = [["", "drift", "1 - cos", "weights", "loss", "forgetting", "+-", "rank", "diversity"]]
    blends = [["base + a (tuned - base)", "a", "drift", "forgetting", "+-"]]
    labels = brief_names(found["models"], 24)
    for name, scores in found["models"].items():
        label = labels[name]
        inside = [f"{statistics.mean(scores[key][1:-1]):.4f}"
                  for key in ("drift", "cosine_distance", "weight_drift")]
        table.append([label, *inside, f"{statistics.mean(scores['loss_by_rate']):.4f}",
                      f"{scores['forgetting']:+.4f}", f"{scores['half_95']:.4f}",
                      f"{scores['effective_rank'][-1]:.2f}", f"{scores['diversity'][-1]:.4f}"])
        for blend in scores.get("scales", ()):
            blends.append([label, f"{blend['scale']:g}", f"{blend['mean_drift']:.4f}",
                           f"{blend['forgetting']:+.4f}", f"{blend['half_95']:.4f}"])
    print(f"\n{found['settings']['text']}: n = {found['n']} texts, {found['tokens']:,} tokens; "
          f"means over blocks; forgetting: loss minus base,\nwith its 95 % interval over texts; "
          f"rank and diversity of pooled states after the norm")
    print_table(table)
    if len(blends) > 1:
        print()
        print_table(blends)


if __name__ == "__main__":
    run(main, ProbeConfig)
