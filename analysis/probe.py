"""How far tuning has moved a model inside, and what that has cost: drift, rank and forgetting.

    python analysis/probe.py --base=GSAI-ML/LLaDA-8B-Base --models=out/plain,out/jepa
    python analysis/probe.py --base=out/tiny/base --models=out/tiny/plain,out/tiny/jepa \\
        --text=toy_base --scales=0.25,0.5,0.75,1.5

Base and tuned model read the same held-out text, without masks. At every depth, where 0 is the
embedding, l the state after block l, and the last the state after the final norm:

    drift              mean over tokens of |h - h_base| / |h_base|
    cosine distance    mean over tokens of 1 - cos(h, h_base)
    weight drift       |w - w_base| / |w_base| of all weights there, the head's with the norm's
    effective rank     exp(entropy of the singular values, as shares) of the centred pooled states
    diversity          1 - mean cosine of two pooled states of different texts
    std                mean over dimensions of the standard deviation of the texts' mean states

Pooled is what JEPA embeds: a text's mean state behind a bare LayerNorm (jepa.py). Forgetting is the
loss on masked tokens of the text minus the base's, under the same masks, at each rate. The paper
(arXiv 2606.00091) reports all but the second without defining them: these definitions are ours. The
mean drift is over blocks: the state after the final norm has another scale.

`scales` asks what would happen at base + a * (tuned - base): whether forgetting follows when drift
alone is turned down or up. a = 0 is the base and a = 1 the tuned model, bit for bit.

A model larger than a GPU fits: all texts go through one block before the next is read from its
file, base and tuned side by side, so that two blocks are in memory and never two models. States
take texts x tokens x width x 4 bytes, for each masking rate and twice more. All is in fp32, for
in bf16 the small steps of a small learning rate would round away.
"""
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # see train.py; read when torch loads
os.environ.setdefault("GOMP_SPINCOUNT", "0")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # a script in a folder: the modules lie one above

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from analysis.likelihood import BATCH_TOKENS, batches, exact_masks, longest_first, padded
from configurator import run
from jepa import pool
from model import DLLM, Padded, rope_table, row_generators
from pretrained.device import pick_device, to_device
from pretrained.tokenizer import load_tokenizer
from pretrained.weights import (catalogue, check_names_and_shapes, drop_copy, find_weights,
                                published_name, read_tensors, weights_file)
from tasks import wikitext
from tasks.common import load_task, tokenize
from tasks.files import read_json, write_json
from training.log import git_commit


@dataclass
class ProbeConfig:
    base: str = ""                      # before tuning: a checkpoint, an out_dir or a hub name
    models: tuple[str, ...] = ()        # the same after tuning, one or more, with commas between
    text: str = "wikitext"              # or a task, whose validation rows are read, e.g. toy_base
    data_dir: str = ""                  # folder of the text's {split}.jsonl[.gz]; empty: the hub
    out_dir: str = "out/probe"          # probe.json goes here
    n_rows: int = 64                    # windows or rows of the text; 0: all there are
    window: int = 256                   # tokens of a window; rows of a task with more are left out
    rates: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of masking
    scales: tuple[float, ...] = ()      # a, one more pass each, over every model
    seed: int = 0                       # of the masks
    batch_tokens: int = BATCH_TOKENS    # of one pass, padding included
    device: str = "auto"                # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one

    def __post_init__(self):
        if self.n_rows < 0 or self.n_rows == 1 or self.window < 2 or self.batch_tokens < 1:
            raise ValueError(f"n_rows={self.n_rows} must be 0 or at least 2, window={self.window} "
                             f"at least 2 and batch_tokens={self.batch_tokens} at least 1")
        if not self.rates or not all(0 < t <= 1 for t in self.rates):
            raise ValueError(f"rates={self.rates} must be one or more numbers above 0 and up to 1")
        if not all(abs(scale) < 1e6 for scale in self.scales):
            raise ValueError(f"scales={self.scales} must be finite numbers: 0 is the base, 1 the "
                             f"tuned model")


def main(cfg: ProbeConfig):
    if not cfg.base or not cfg.models:
        raise ValueError("it takes --base=... and --models=... to compare with it")
    print_tables(probe(cfg))


def probe(cfg: ProbeConfig) -> dict:
    """Measures the base and every model -> what out_dir/probe.json holds, model after model."""
    device = pick_device(cfg.device)
    base, tok = Checkpoint(cfg.base, device), load_tokenizer(find_weights(cfg.base))
    config = base.model.config
    for name in cfg.models:             # a mistake in the last is told before the first begins
        if Checkpoint(name, device).model.config != config:
            raise ValueError(f"{name} and {cfg.base} are not the same network, so their states "
                             f"cannot be compared")
        if load_tokenizer(find_weights(name)) != tok:
            raise ValueError(f"{name} and {cfg.base} do not read the same tokens, for their "
                             f"tokenizers differ")
    rows = held_out_rows(cfg, tok, config.block_size)
    clean = in_batches(((torch.tensor(ids), torch.zeros(len(ids)) > 0) for ids, _ in rows),
                       cfg.batch_tokens, config.eos_id)
    masked = in_batches(masked_copies(rows, cfg.rates, cfg.seed), cfg.batch_tokens, config.eos_id)

    blocks = [str(n) for n in range(1, config.n_layer + 1)]
    found = {"settings": asdict(cfg), "commit": git_commit(), "n": len(rows),
             "tokens": sum(len(ids) for ids, _ in rows), "depths": ["embed", *blocks, "norm"],
             "models": {}}
    os.makedirs(cfg.out_dir, exist_ok=True)
    base_losses = None
    for name in dict.fromkeys((cfg.base, *cfg.models)):
        def measure(scale):
            tuned = Checkpoint(name, device)
            if scale != 1:
                tuned = Blend(Checkpoint(cfg.base, device), tuned, scale)
            numbers, losses = compare(base, tuned, clean, masked, f"{name} x {scale:g}")
            losses = losses.view(len(rows), len(cfg.rates))
            if not losses.isfinite().all():
                raise ValueError(f"{name} x {scale:g} gives losses that are no numbers: the "
                                 f"weights are broken, or too far from the base")
            against = losses if base_losses is None else base_losses
            return {**numbers, **forgetting(losses, against)}, losses
        scores, losses = measure(1.0)
        base_losses = losses if base_losses is None else base_losses
        if name != cfg.base:
            scores["trained"] = trained(find_weights(name))
            kept = ("mean_drift", "drift", "forgetting", "half_95", "forgetting_by_rate")
            blends = {scale: measure(scale)[0] for scale in dict.fromkeys(cfg.scales)}
            scores["scales"] = [{"scale": scale, **{key: blend[key] for key in kept}}
                                for scale, blend in blends.items()]
        found["models"][name] = scores
        write_json(Path(cfg.out_dir) / "probe.json", found)
    return found


# ----------------------------------------------------------------------------------------------
# text


def held_out_rows(cfg: ProbeConfig, tok, block_size: int) -> list[tuple[list[int], int]]:
    """The longest first: ids, and how many of them are given; the others may be masked.

    Of a window the first token is given, of a task's row the prompt; its end-of-text is one more.
    """
    if cfg.text == "wikitext":
        windows = wikitext.windows(wikitext.load_text("test", cfg.data_dir), tok, cfg.window,
                                   cfg.n_rows)
        rows = [(ids, 1) for ids in windows.tolist()]
    else:
        examples = load_task(cfg.text).load("validation", cfg.data_dir)
        rows = [(row.prompt + row.answer + [tok.eos_id], len(row.prompt))
                for row in tokenize(examples, tok, cfg.window, f"{cfg.text} validation")]
        rows = rows[:cfg.n_rows or None]
    rows = [rows[i] for i in longest_first([ids for ids, _ in rows])]
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} text of {cfg.text} is not enough: rank and diversity are of "
                         f"two or more")
    if len(rows[0][0]) > block_size:
        raise ValueError(f"a text of {len(rows[0][0])} tokens is longer than "
                         f"block_size={block_size}; a smaller --window would fit")
    return rows


def masked_copies(rows, rates, seed: int):
    """Yields ids (T,), is_masked (T,) of each row at each rate: exactly round(t * L) of its L
    tokens that are not given, at least one. Of windows as likelihood.held_out_losses masks them."""
    for ids, n_given in rows:
        L = len(ids) - n_given
        for t, generator in zip(rates, row_generators(seed, 0, [(t, *ids) for t in rates])):
            is_masked = exact_masks(torch.tensor([max(1, int(t * L + 0.5))]), L, generator)[0]
            yield torch.tensor(ids), torch.cat([is_masked.new_zeros(n_given), is_masked])


def in_batches(copies, batch_tokens: int, eos_id: int):
    """Pairs ids (T,), is_masked (T,) -> [(ids (B, T), is_masked (B, T), is_real (B, T) or None)]"""
    found = []
    for batch in batches(copies, batch_tokens, length=lambda copy: len(copy[0])):
        ids, is_real = padded([ids for ids, _ in batch], eos_id)
        found.append((ids, padded([is_masked for _, is_masked in batch], False)[0], is_real))
    return found


# ----------------------------------------------------------------------------------------------
# a model, one depth at a time


class Checkpoint:
    """A model on the meta device, whose parameters of one depth can be had from its files."""

    def __init__(self, name: str, device):
        folder = find_weights(name)
        self.device, self.model = device, DLLM.on_meta(folder)
        stored, family = catalogue(folder), self.model.published["model_type"]
        shapes = dict(self.model.named_parameters())
        theirs = {name: published_name(name, family) for name in shapes}
        if self.model.config.tied_head:
            theirs["head.weight"] = theirs["embed.weight"]
            drop_copy(stored, published_name("head.weight", family), theirs["embed.weight"])
        check_names_and_shapes(stored, {theirs[name]: p for name, p in shapes.items()},
                               weights_file(folder))
        self.stored = {name: (key, stored[key]) for name, key in theirs.items()}

    def read(self, depth: int) -> dict:
        """{our name: fp32 tensor on the device}"""
        wanted = {self.stored[name][0]: name for name in names_at(self.model, depth)}
        of_files = {key: self.stored[name][1] for key, name in wanted.items()}
        return {wanted[key]: tensor
                for key, tensor in read_tensors(of_files, torch.float32, self.device)}


class Blend:
    """base + scale * (tuned - base), read in the same way."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, scale: float):
        self.base, self.tuned, self.scale = base, tuned, scale
        self.model, self.device = tuned.model, tuned.device

    def read(self, depth: int) -> dict:
        if self.scale in (0, 1):                # itself: lerp may turn a -0.0 into 0.0
            return (self.base, self.tuned)[int(self.scale)].read(depth)
        end = self.tuned.read(depth)
        return {name: start.lerp_(end[name], self.scale)
                for name, start in self.base.read(depth).items()}


def names_at(model, depth: int) -> list[str]:
    """Of the parameters: 0 the embedding, l those of block l, then those of the norm and the head.
    A head that is tied to the embedding is met twice."""
    last = model.config.n_layer + 1
    prefix = {0: "embed.", last: ("norm.", "head.")}.get(depth, f"blocks.{depth - 1}.")
    return [name for name, _ in model.named_parameters(remove_duplicate=False)
            if name.startswith(prefix)]


@torch.no_grad()
def states(source, inputs):
    """Yields, depth by depth, the states (B, T, C) of every batch: what DLLM.encode computes.

    inputs: pairs xt (B, T), is_real (B, T) or None. The list that it yields is the same one each
    time. While it waits, source.model has the weights of that depth, and no others.
    """
    model, device = source.model, source.device
    longest = max(xt.shape[1] for xt, _ in inputs)
    cos, sin = rope_table(longest, model.blocks[0].head_dim, model.config.rope_theta, device)
    h = [to_device(xt, device) for xt, _ in inputs]
    for depth in range(model.config.n_layer + 2):
        for name, tensor in source.read(depth).items():
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
        tensor = None
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
def compare(base, tuned, clean, masked, name: str):
    """Batches of in_batches -> {number: one a depth}, and the mean loss of each masked copy.

    The tuned model reads both kinds, the base the clean one, block after block at the same time.
    """
    def inputs(some):
        return [(torch.where(is_masked, base.model.config.mask_id, ids), is_real)
                for ids, is_masked, is_real in some]
    real = [torch.ones_like(ids) > 0 if is_real is None else is_real for ids, _, is_real in clean]
    last, columns, losses = base.model.config.n_layer + 1, [], []
    streams = zip(states(base, inputs(clean)), states(tuned, inputs(clean) + inputs(masked)))
    for depth, (h0, h) in enumerate(tqdm(streams, name, last + 1, unit="block", leave=False,
                                         mininterval=0.5 if sys.stderr.isatty() else 15)):
        z, means = embeddings(h, real)
        if not (z.isfinite().all() and means.isfinite().all()):
            raise ValueError(f"{name} has states that are no numbers after {depth} of {last} "
                             f"steps: the weights are broken, or too far from the base")
        columns.append({**distances(h, h0, real), "effective_rank": effective_rank(z),
                        "diversity": diversity(z), "std": means.std(dim=0).mean().item(),
                        "weight_drift": weight_drift(tuned.model, base.model, depth)})
        if depth == last:
            for x, (ids, is_masked, _) in zip(h[len(clean):], masked):
                nll = tuned.model.nll(x, ids, is_masked).cpu().double()
                losses += [row.mean() for row in nll.split(is_masked.sum(dim=1).tolist())]
    numbers = {key: [column[key] for column in columns] for key in columns[0]}
    return {"mean_drift": statistics.mean(numbers["drift"][1:-1]), **numbers}, torch.stack(losses)


# ----------------------------------------------------------------------------------------------
# numbers


def distances(h, h0, real) -> dict:
    """Lists of (B, T, C), and which tokens count -> mean over these tokens."""
    drift, cosine = [], []
    for x, x0, where in zip(h, h0, real):
        where = to_device(where, x.device)
        x, x0 = x[where], x0[where]                                         # (N, C)
        tiny = torch.finfo(x.dtype).tiny
        drift.append((x - x0).norm(dim=-1) / x0.norm(dim=-1).clamp(min=tiny))
        # half the squared distance of unit vectors is 1 - cos, and exactly 0 for equal ones
        cosine.append((F.normalize(x, dim=-1) - F.normalize(x0, dim=-1)).square().sum(dim=-1) / 2)
    return {"drift": torch.cat(drift).double().mean().item(),
            "cosine_distance": torch.cat(cosine).double().mean().item()}


def embeddings(h, real):
    """-> of N texts the pooled states (N, C), as JEPA's, and the mean states (N, C), in fp64."""
    z, means = [], []
    for x, where in zip(h, real):
        z.append(pool(x, where))                                            # (B, C)
        where = to_device(where[..., None], x.device)
        means.append((x * where).sum(dim=1) / where.sum(dim=1))
    return torch.cat(z).cpu().double(), torch.cat(means).cpu().double()


def effective_rank(z) -> float:
    """(N, C) -> 0 if all rows are equal, else from 1 to N - 1: Roy and Vetterli (2007), centred."""
    values = torch.linalg.svdvals(z - z.mean(dim=0))
    # what rounding leaves of equal rows is not a direction
    values = values[values > z.abs().max() * max(z.shape) * torch.finfo(z.dtype).eps]
    share = values / values.sum()
    return (-(share * share.log()).sum()).exp().item() if len(values) else 0.0


def diversity(z) -> float:
    """(N, C), N > 1 -> 1 - mean over pairs of different rows of their cosine."""
    unit, n = F.normalize(z, dim=-1), len(z)
    own = unit.square().sum()                                               # a row with itself
    return (1 - (unit.sum(dim=0).square().sum() - own) / (n * (n - 1))).item()


def weight_drift(model, base, depth: int) -> float:
    params, base_params = dict(model.named_parameters(remove_duplicate=False)), dict(
        base.named_parameters(remove_duplicate=False))
    moved = length = 0.0
    for name in names_at(base, depth):
        moved += (params[name] - base_params[name]).square().sum(dtype=torch.float64).item()
        length += base_params[name].square().sum(dtype=torch.float64).item()
    return (moved / length) ** 0.5 if length else float(moved > 0)


def forgetting(losses, base) -> dict:
    """(N, R) losses, the base's -> their means, and differences in pairs; half_95 is half of the
    95 % interval over texts, by the normal approximation."""
    by_row = (losses - base).mean(dim=1)
    return {"loss_by_rate": losses.mean(dim=0).tolist(),
            "forgetting_by_rate": (losses - base).mean(dim=0).tolist(),
            "forgetting": by_row.mean().item(),
            "half_95": 1.96 * by_row.std().item() / len(by_row) ** 0.5}


def trained(folder: str) -> dict | None:
    """How a checkpoint of train.py came about; None for published weights."""
    path = os.path.join(folder, "train_state.json")
    state = read_json(path) if os.path.isfile(path) else {}
    return {**state["settings"], "step": state.get("step")} if isinstance(
        state.get("settings"), dict) else None


# ----------------------------------------------------------------------------------------------
# tables


def print_tables(found: dict):
    """A line a model, then a line a depth with the drift of up to eight models at a time."""
    settings, models = found["settings"], found["models"]
    tuned = {name: scores for name, scores in models.items() if name != settings["base"]}
    common = os.path.commonprefix(list(models)).rpartition("/")     # say only how names differ
    labels = {name: name.removeprefix("".join(common[:2])) for name in models}
    labels = {name: f"{n:3} {label[-20:]}" if n else f"    {label[-20:]}"
              for n, (name, label) in enumerate(labels.items())}
    print(f"\n{settings['text']}: n = {found['n']} texts, {found['tokens']:,} tokens; means over "
          f"blocks; forgetting: loss minus base,\nwith its 95 % interval over texts; rank and "
          f"diversity of pooled states after the norm\n"
          f"{'':24}{'drift':>9}{'1 - cos':>9}{'weights':>9}{'loss':>9}{'forgetting':>20}"
          f"{'rank':>8}{'diversity':>11}")
    for name, scores in models.items():
        inside = [statistics.mean(scores[key][1:-1])
                  for key in ("drift", "cosine_distance", "weight_drift")]
        print(f"{labels[name]:24}" + "".join(f"{value:9.4f}" for value in inside)
              + f"{statistics.mean(scores['loss_by_rate']):9.4f}"
              + (f"{scores['forgetting']:+10.4f} +- {scores['half_95']:.4f}"
                 if name in tuned else "").rjust(20)
              + f"{scores['effective_rank'][-1]:8.2f}{scores['diversity'][-1]:11.4f}")
    names = list(tuned)
    for i in range(0, len(names), 8):
        some = names[i:i + 8]
        print("\ndrift   " + "".join(f"{labels[name][:3]:>11}" for name in some))
        for depth, label in enumerate(found["depths"]):
            print(f"{label:>5}   " + "".join(f"{tuned[name]['drift'][depth]:11.4f}"
                                             for name in some))
    if settings["scales"]:
        print(f"\n{'base + a (tuned - base)':26}{'a':>8}{'drift':>9}{'forgetting':>20}")
        for name in names:
            for blend in tuned[name]["scales"]:
                print(f"{labels[name]:26}{blend['scale']:8g}{blend['mean_drift']:9.4f}"
                      + f"{blend['forgetting']:+10.4f} +- {blend['half_95']:.4f}".rjust(20))


if __name__ == "__main__":
    run(main, ProbeConfig)
