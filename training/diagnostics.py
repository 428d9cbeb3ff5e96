"""What a JEPA loss does not say: whether anything is predicted, and whether anything is left.

A cosine loss can be small because all embeddings are alike. So each line of the log also has, over
the whole batch of its step (B rows, of all ranks and micro-batches):

    jepa_floor      the loss of the best prediction that is the same for every row
    skill           1 - jepa / jepa_floor: the share of it that the prediction takes away; 0: none
    retrieval       share of the rows whose z_hat is nearest to its own z_tgt; chance: 1 / B
    rank            effective rank of z_ctx: e^entropy of the normalised singular values, centred
    diversity       1 - mean cosine of two rows' z_ctx; 0 when all are alike
    std_mean        standard deviation over rows, mean over dimensions, of the pooled states,
    std_z           and the same behind the LayerNorm
    corr_views      correlation of the two views of a row, z_ctx and z_tgt, as the loss pairs them
    corr_others     the same of two different rows
    corr_same_rate  of two target views of one row, both at t_tgt, in other masks than the step's:
                    if corr_views is as high, two rates are not two views (of a few rows)
    nll_t0.25 ...   mean loss of masked tokens, in rows with t in (0, 0.25], (0.25, 0.5], ...
    online_moved    |online - base| / |base|, over what is trained
    ema_moved       |target - base| / |online - base|
    pred_norm       |predictor| / |its start|
    pred_moved      |predictor - its start| / |its start|

On rows that are few or much alike rank and floor are low whatever the model does: compare runs of
one batch size. The last four are told by a sample of entries. The paper has rank and diversity as
numbers of a table, without formulas; these are ours, and so is all the rest.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F

COLLAPSE = 0.5                  # rank or diversity below this share of the base's: a warning
SAMPLE = 1 << 12                # entries of each parameter that tell how far all of it has moved
BUCKETS = (0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def embedding_numbers(seen: list) -> dict:
    """`DLLMJEPA.seen` of each micro-batch of this rank -> numbers on the whole batch's embeddings.

    On the CPU in fp64: B vectors are little, and a log line waits for the device anyway.
    """
    if "z_hat" not in seen[0]:
        return {}
    mean, z_hat, z_tgt = (whole_batch([one[name].float() for one in seen]).cpu().double()
                          for name in ("mean", "z_hat", "z_tgt"))           # (B, C)
    z_ctx = F.layer_norm(mean, mean.shape[-1:])
    jepa = (1 - F.cosine_similarity(z_hat, z_tgt, dim=-1)).mean()
    floor = constant_floor(z_tgt)
    across = cosines(z_ctx, z_tgt)                                          # (B, B)
    own = torch.arange(len(z_hat))
    return {"jepa_floor": floor, "skill": 1 - jepa / floor.clamp(min=1e-12),
            "retrieval": (cosines(z_hat, z_tgt).argmax(dim=1) == own).double().mean(),
            "rank": effective_rank(z_ctx), "diversity": 1 - off_diagonal(cosines(z_ctx, z_ctx)),
            "std_mean": mean.std(dim=0, correction=0).mean(),
            "std_z": z_ctx.std(dim=0, correction=0).mean(),
            "corr_views": across.diagonal().mean(), "corr_others": off_diagonal(across)}


def constant_floor(z_tgt):
    """The loss of the best predictor that ignores its input: 1 - |mean unit target|."""
    return 1 - F.normalize(z_tgt, dim=-1).mean(dim=0).norm()


def effective_rank(z):
    """(B, C) -> e^entropy of the singular values, normalised to sum 1, of the centred z: 1 to
    B - 1, and 0 where all rows are the same."""
    if not z.isfinite().all():
        return z.new_tensor(torch.nan)
    s = torch.linalg.svdvals(z - z.mean(dim=0))
    p = s / s.sum()
    return torch.special.entr(p).sum().exp() if s.sum() > 1e-5 * z.norm() else s.new_tensor(0.0)


def cosines(a, b):
    """(A, C), (B, C) -> (A, B). Behind a LayerNorm without weights they are correlations."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def off_diagonal(square):
    """The mean of what is off the diagonal; 1 for a single row, which has no other to differ."""
    B = len(square)
    return (square.sum() - square.trace()) / (B * (B - 1)) if B > 1 else square.new_tensor(1.0)


@torch.no_grad()
def same_rate_number(objective, batch) -> dict:
    """Inputs of `forward` -> the correlation of two target views of a row, of a sixteenth of the
    rows: one more short pass, of which a log line every 10 steps makes less than 1 % of the time.
    """
    x0, maskable, is_real, generators, step = batch
    if not hasattr(objective, "target") or not objective.has_jepa(step):
        return {}
    k = max(1, len(x0) // 16)

    def again(n):
        seeds = [g.initial_seed() ^ n for g in generators[:k]]
        return (x0[:k], maskable[:k], is_real[:k],
                [torch.Generator().manual_seed(seed) for seed in seeds], step)
    pair = objective.target_pass([again(2), again(4)])
    a, b = (whole_batch([z.float()]).cpu().double() for z in pair)
    return {"corr_same_rate": F.cosine_similarity(a, b, dim=-1).mean()}


@torch.no_grad()
def bucket_numbers(seen: list) -> dict:
    """The loss of masked tokens by their row's t; a bucket without tokens has no number."""
    device = seen[0]["nll"].device
    sums = torch.zeros(2, len(BUCKETS))
    for one in seen:
        t = one["t"][:, None].expand(one["is_masked"].shape)[one["is_masked"]].cpu()   # (N,)
        bucket = torch.bucketize(t, torch.tensor(BUCKETS))
        sums.index_add_(1, bucket, torch.stack([one["nll"].float().cpu(), torch.ones_like(t)]))
    total, n = summed(sums.to(device)).tolist()
    return {f"nll_t{end:g}": a / b for end, a, b in zip(BUCKETS, total, n) if b}


def sample(p):
    """Of a parameter, or of this rank's part of it: evenly spread entries as fp32 (n,), and how
    many each stands for. The stride is odd, so that not all are of one column."""
    flat = local(p).detach().flatten()
    taken = flat[::max(1, flat.numel() // SAMPLE) | 1].float().clone()
    return taken, flat.numel() / max(1, len(taken))


@torch.no_grad()
def movement_numbers(objective, base: dict, start: dict, full=torch.Tensor.float) -> dict:
    """How far the weights are. base, start: {name: sample} of the model and of the predictor as
    they began. full: parameter -> its fp32 value, as for `update_target`."""
    online = {name: sample(full(p)) for name, p in objective.model.named_parameters()
              if p.requires_grad}
    moved, norm, _ = squares(online, base)
    numbers = {"online_moved": (moved / norm).sqrt()}
    if hasattr(objective, "target"):    # which has no head, and perhaps not every block
        target = {name: sample(p) for name, p in objective.target.named_parameters()
                  if name in online}
        (lagging, *_), (moved, *_) = squares(target, base), squares(
            {name: online[name] for name in target}, base)
        numbers["ema_moved"] = (lagging / moved.clamp(min=1e-30)).sqrt()    # 0 before any step
    if start:
        moved, norm, now = squares({name: sample(objective.predictor.get_parameter(name))
                                    for name in start}, start)
        numbers |= {"pred_norm": (now / norm).sqrt(), "pred_moved": (moved / norm).sqrt()}
    return numbers


def squares(samples: dict, began: dict):
    """-> |now - began|^2, |began|^2, |now|^2 over all that has a sample, and all ranks: (3,). Ranks
    that each have all of it count it several times, so that only ratios mean something."""
    now = torch.cat([entries for entries, _ in samples.values()])
    start, stands_for = zip(*(began[name] for name in samples))
    weight = torch.cat([torch.full_like(x, n) for x, n in zip(start, stands_for)])
    start = torch.cat(start)
    return summed(torch.stack([weight @ x.square() for x in (now - start, start, now)]))


def collapsed(numbers: dict, first: dict) -> str:
    """A sentence if rank or diversity is below COLLAPSE of what the run's first line had, or ""."""
    low = [f"{name} {numbers[name]:.3g} of {first[name]:.3g}" for name in ("rank", "diversity")
           if numbers[name] is not None and first[name]        # None: it was not finite
           and numbers[name] < COLLAPSE * first[name]]
    return low and (f"the embeddings collapse, below {COLLAPSE:.0%} of the base's: "
                    f"{', '.join(low)}") or ""


# ----------------------------------------------------------------------------------------------
# several ranks


def local(p):
    """A tensor, or the part of it that this rank keeps."""
    return p.to_local() if hasattr(p, "to_local") else p


def summed(x):
    """The sum over the ranks, which all wait for each other here."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def whole_batch(parts: list):
    """[(b, C)] of the micro-batches of this rank -> (B, C) of all ranks, in the order of the batch:
    what `batch_at` has dealt out, row i to part i % n_parts."""
    every = torch.stack(parts)                                              # (n, b, C)
    if dist.is_initialized():
        ranks = [torch.empty_like(every) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, every)
        every = torch.cat(ranks)                                            # (n_parts, b, C)
    return every.transpose(0, 1).flatten(0, 1)


def this_ranks(whole, n: int) -> list:
    """The other way: (B, C) -> the [(b, C)] of this rank's n micro-batches."""
    rank, world = ((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1))
    parts = [whole[i::n * world] for i in range(n * world)]
    return parts[rank * n:(rank + 1) * n]
