"""Diagnostics: whether anything is predicted, and whether the embeddings still differ.

A cosine loss can be small because all embeddings are alike. So each line of the log also has these
numbers, over the whole batch of its step (B rows, of all ranks and micro-batches):

    jepa_floor      the loss of the best prediction that is the same for every row
    skill           1 - jepa / jepa_floor: the share of it that the prediction removes; 0: none
    retrieval       share of the rows whose z_hat is nearest to its own z_tgt; chance: 1 / B
    rank            effective rank of z_ctx: e^entropy of the normalised singular values, centred
    diversity       1 - mean cosine of two rows' z_ctx; 0 when all are alike
    std_mean        standard deviation over rows, mean over dimensions, of the pooled states,
    std_z           and the same after the LayerNorm
    corr_views      correlation of the two views of a row, z_ctx and z_tgt, as the loss pairs them
    corr_others     the same of two different rows
    corr_same_rate  of two target views of one row, both at t_tgt, with new masks: if corr_views is
                    as high, two rates do not make two views (measured on a few rows)
    nll_t0.25 ...   mean loss of masked tokens, in rows with t in (0, 0.25], (0.25, 0.5], ...
    online_moved    |online - base| / |base|, over the trained weights
    ema_moved       |target - base| / |online - base|
    pred_norm       |predictor| / |its start|
    pred_moved      |predictor - its start| / |its start|

With few or similar rows, rank and floor are low for every model: compare runs of one batch size.
The last four are estimated from a sample of entries. The paper has rank and diversity as numbers of
a table, without formulas; these formulas are ours, and so is all the rest.
"""
import torch
import torch.nn.functional as F

from training.ranks import gather_batch, local_part, sum_over_ranks

COLLAPSE = 0.5                  # warn if rank or diversity is below this share of the base's
SAMPLE = 1 << 12                # entries of each parameter that estimate how far it has moved
BUCKETS = (0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def embedding_numbers(traces: list) -> dict:
    """`DLLMJEPA.trace` of each micro-batch of this rank -> numbers on the whole batch's embeddings.

    On the CPU in fp64: B vectors are little, and a log line synchronises anyway.
    """
    if "z_hat" not in traces[0]:
        return {}
    mean, z_hat, z_tgt = (gather_batch([trace[name].float() for trace in traces]).cpu().double()
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
    """Return the loss of the best predictor that ignores its input: 1 - |mean unit target|."""
    return 1 - F.normalize(z_tgt, dim=-1).mean(dim=0).norm()


def effective_rank(z):
    """(B, C) -> e^entropy of the singular values, normalised to sum 1, of the centred z: 1 to
    B - 1, and 0 if all rows are the same."""
    if not z.isfinite().all():
        return z.new_tensor(torch.nan)
    s = torch.linalg.svdvals(z - z.mean(dim=0))
    p = s / s.sum()
    return torch.special.entr(p).sum().exp() if s.sum() > 1e-5 * z.norm() else s.new_tensor(0.0)


def cosines(a, b):
    """(A, C), (B, C) -> (A, B). After a LayerNorm without weights they are correlations."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def off_diagonal(square):
    """Return the mean off the diagonal; 1 for a single row, which differs from no other."""
    B = len(square)
    return (square.sum() - square.trace()) / (B * (B - 1)) if B > 1 else square.new_tensor(1.0)


@torch.no_grad()
def same_rate_number(objective, batch) -> dict:
    """Inputs of `forward` -> the correlation of two target views of a row.

    Only a sixteenth of the rows: one more short pass, less than 1 % of the time at a log line
    every 10 steps.
    """
    x0, maskable, is_real, generators = batch
    if not hasattr(objective, "target"):
        return {}
    k = max(1, len(x0) // 16)

    twice = (torch.cat([x[:k], x[:k]]) for x in (x0, maskable, is_real))    # (2k, T) each
    again = [torch.Generator().manual_seed(g.initial_seed() ^ n)
             for n in (2, 4) for g in generators[:k]]
    views = objective.embed_target(*twice, again).chunk(2)
    a, b = (gather_batch([z.float()]).cpu().double() for z in views)
    return {"corr_same_rate": F.cosine_similarity(a, b, dim=-1).mean()}


@torch.no_grad()
def bucket_numbers(traces: list) -> dict:
    """Average the loss of masked tokens by their row's t; an empty bucket gives no number."""
    device = traces[0]["nll"].device
    sums = torch.zeros(2, len(BUCKETS))
    for trace in traces:
        is_masked = trace["is_masked"]
        t = trace["t"][:, None].expand(is_masked.shape)[is_masked].cpu()    # (N,)
        bucket = torch.bucketize(t, torch.tensor(BUCKETS))
        sums.index_add_(1, bucket, torch.stack([trace["nll"].float().cpu(), torch.ones_like(t)]))
    total, n = sum_over_ranks(sums.to(device)).tolist()
    return {f"nll_t{end:g}": a / b for end, a, b in zip(BUCKETS, total, n) if b}


def sample(p):
    """Take evenly spread entries of a parameter, or of this rank's part -> fp32 (n,), and how many
    entries each stands for. The stride is odd, so that not all come from one column."""
    flat = local_part(p).detach().flatten()
    taken = flat[::max(1, flat.numel() // SAMPLE) | 1].float().clone()
    return taken, flat.numel() / max(1, len(taken))


@torch.no_grad()
def movement_numbers(objective, base: dict, predictor: dict) -> dict:
    """Measure how far the weights have moved. base, predictor: {name: sample} of the model and of
    the predictor at the start of the run."""
    online = {name: sample(objective.fp32_of(p))
              for name, p in objective.model.named_parameters() if p.requires_grad}
    moved, norm, _ = squares(online, base)
    numbers = {"online_moved": (moved / norm).sqrt()}
    if hasattr(objective, "target"):    # it has no head, and perhaps not every block
        target = {name: sample(p) for name, p in objective.target.named_parameters()
                  if name in online}
        behind, *_ = squares(target, base)
        moved, *_ = squares({name: online[name] for name in target}, base)
        numbers["ema_moved"] = (behind / moved.clamp(min=1e-30)).sqrt()     # 0 before any step
    if predictor:
        now = {name: sample(objective.predictor.get_parameter(name)) for name in predictor}
        moved, norm, size = squares(now, predictor)
        numbers |= {"pred_norm": (size / norm).sqrt(), "pred_moved": (moved / norm).sqrt()}
    return numbers


def squares(samples: dict, start: dict):
    """-> |now - start|^2, |start|^2, |now|^2 over everything sampled, and all ranks: (3,). Ranks
    that hold whole parameters count them several times, so only ratios have a meaning."""
    now = torch.cat([entries for entries, _ in samples.values()])
    before, stands_for = zip(*(start[name] for name in samples))
    weight = torch.cat([torch.full_like(x, n) for x, n in zip(before, stands_for)])
    before = torch.cat(before)
    return sum_over_ranks(torch.stack([weight @ x.square() for x in (now - before, before, now)]))


def collapsed(numbers: dict, first: dict) -> str:
    """Return a sentence if rank or diversity is below COLLAPSE of the run's first line, or ""."""
    low = [f"{name} {numbers[name]:.3g} of {first[name]:.3g}" for name in ("rank", "diversity")
           if numbers[name] is not None and first[name]        # None: it was not finite
           and numbers[name] < COLLAPSE * first[name]]
    return low and (f"the embeddings collapse, below {COLLAPSE:.0%} of the base's: "
                    f"{', '.join(low)}") or ""
