"""Likelihood of texts under a masked-diffusion model, measured without generating.

Mask l of a text's L tokens, chosen uniformly, with l uniform in 1..L. Then

    log p(text)  >=  -L * E[ mean cross-entropy of the masked tokens ]

LLaDA is evaluated this way (arXiv 2502.09992, its public get_log_likelihood.py). An exact number of
masks has less variance than one coin per token; for one token the estimate is exact. Four uses:

    log_likelihood      of answers given prompts, by Monte Carlo
    held_out_losses     of windows of a text, at fixed rates, under the same masks for every model
    losses_of_rows      the same of answers, whose prompts stay visible
    choose              among answers of one token, all scored in one pass

If state i scores token i + 1 (Dream), nothing scores the first token: it always stays visible.
"""
from itertools import islice

import torch
from tqdm import tqdm

from model import row_generators, uniform

BATCH_TOKENS = 8192  # of one pass, padding included; our choice


def log_likelihood(model, prompts: list[list[int]], answers: list[list[int]], n_samples: int = 128,
                   seed: int = 0, batch_tokens: int = BATCH_TOKENS):
    """Estimate log p(answer | prompt) as LLaDA does: N prompts, N answers -> (N,) fp64, in nats.

    Unbiased for the bound above, exact for answers of one token. The prompt is never masked. Masks
    depend on (seed, prompt): not on the batch, and all choices of a question get the same ones.
    Raises ValueError for an empty answer, and for an empty prompt in a model that shifts.
    """
    if not all(answers):
        raise ValueError("an answer is empty; each needs at least one token")
    check_first_is_given(model, prompts)
    rows = [prompt + answer for prompt, answer in zip(prompts, answers)]
    order = longest_first(rows)
    n_copies = [n_samples if len(answer) > 1 else 1 for answer in answers]

    def copies():
        for i, generator in zip(order, row_generators(seed, 0, [prompts[i] for i in order])):
            for is_masked in stratified_masks(len(answers[i]), n_copies[i], generator):
                given = is_masked.new_zeros(len(prompts[i]))
                yield torch.tensor(rows[i]), torch.cat([given, is_masked])

    losses = mean_losses(model, copies(), batch_tokens)
    estimate = torch.zeros(len(rows), dtype=torch.float64)
    for i in tqdm(order, "log-likelihood", unit="answer", leave=False, disable=None):
        estimate[i] = -len(answers[i]) * sum(islice(losses, n_copies[i])) / n_copies[i]
    return estimate


def held_out_losses(model, windows, rates, seed: int = 0, batch_tokens: int = BATCH_TOKENS):
    """Mean cross-entropy per masked token of each window at each rate: (N, T), R -> (N, R) fp64.

    The first token, BOS or text, stays visible. masked_copies masks the others, in the same way for
    every model, so that losses can be compared in pairs. Raises ValueError for rates outside (0, 1]
    and for windows of one token.
    """
    check_rates(rates)
    if windows.shape[1] < 2:
        raise ValueError(f"windows of {windows.shape[1]} tokens leave none to mask; two are the "
                         f"least")
    return losses_of_rows(model, [(ids, 1) for ids in windows.tolist()], rates, seed, batch_tokens)


def losses_of_rows(model, rows, rates, seed: int = 0, batch_tokens: int = BATCH_TOKENS):
    """Mean cross-entropy per masked token of N rows at R rates -> (N, R) fp64.

    rows: pairs of ids and the number of them, at the front, that stay visible.
    """
    order = longest_first([ids for ids, _ in rows])
    copies = masked_copies([rows[i] for i in order], rates, seed)
    losses = tqdm(mean_losses(model, copies, batch_tokens), "held-out loss",
                  total=len(rows) * len(rates), leave=False, disable=None)
    losses = torch.tensor(list(losses), dtype=torch.float64).view(len(rows), len(rates))
    return losses[torch.tensor(order).argsort()]


def check_rates(rates):
    """Raise ValueError unless there are masking rates, all in (0, 1], each once."""
    if not rates or not all(0 < t <= 1 for t in rates):
        raise ValueError(f"rates={rates} must be one or more numbers above 0 and up to 1")
    if len({f"{t:g}" for t in rates}) < len(rates):
        raise ValueError(f"rates={','.join(f'{t:g}' for t in rates[:9])}{'...' * (len(rates) > 9)} "
                         f"has a rate twice")


@torch.no_grad()
def choose(model, prompts: list[list[int]], choices: list[list[int]],
           batch_tokens: int = BATCH_TOKENS):
    """log p of K tokens at one [MASK] after each prompt: N prompts, (N, K) ids -> (N, K) fp64.

    The argmax is the answer; exp().sum(1) is the probability of all choices together. Equal to
    log_likelihood of K answers, but in one pass per question, since all have the same [MASK].
    """
    check_first_is_given(model, prompts)
    order, log_p = longest_first(prompts), []
    asked, wanted = [], iter([choices[i] for i in order])
    for i in order:
        ids = torch.tensor(prompts[i] + [model.config.mask_id])
        asked.append((ids, torch.arange(len(ids)) == len(prompts[i])))
    bar = tqdm(asked, "choices", unit="question", leave=False, disable=None)
    for ids, is_masked, is_real in in_batches(bar, batch_tokens, model.config.eos_id):
        where = is_masked.nonzero(as_tuple=True)
        logits = model.unembed(model.encode(ids, is_real), where)  # (B, V)
        of_choices = torch.tensor([next(wanted) for _ in ids], device=logits.device)  # (B, K)
        log_p.append(logits.log_softmax(dim=-1).gather(1, of_choices).cpu().double())
    return torch.cat(log_p)[torch.tensor(order).argsort()]


# ----------------------------------------------------------------------------------------------
# masks


def stratified_masks(L: int, n: int, generator):
    """Draw n masks of L places as LLaDA does -> (n, L) bool.

    Each number of masks is uniform in 1..L; together they are spread evenly: a random start, then
    steps of L / n modulo L. If L divides n, every number occurs equally often.
    """
    start = torch.randint(L, (1,), generator=generator)
    counts = (start + torch.arange(n) * L // n) % L + 1  # (n,)
    return exact_masks(counts, L, generator)


def exact_masks(counts, L: int, generator):
    """Draw masks with exactly these counts, every set of places equally likely: (n,) -> (n, L)."""
    u = uniform((len(counts), L), generator, "cpu")
    return u.argsort(dim=1) < counts[:, None]  # argsort: a random permutation of 0..L-1 per row


def masked_copies(rows, rates, seed: int):
    """Yield ids (T,), is_masked (T,) of each row at each rate.

    rows: pairs of ids and the number of them, at the front, that stay visible. Of the L others
    exactly round(t * L), at least one, are masked. Masks depend on (seed, rate, ids) alone, not on
    the model, the batch or the other rows.
    """
    for ids, n_given in rows:
        L = len(ids) - n_given
        for t, generator in zip(rates, row_generators(seed, 0, [(t, *ids) for t in rates])):
            count = torch.tensor([max(1, int(t * L + 0.5))])
            is_masked = exact_masks(count, L, generator)[0]
            yield torch.tensor(ids), torch.cat([is_masked.new_zeros(n_given), is_masked])


# ----------------------------------------------------------------------------------------------
# passes


@torch.no_grad()
def mean_losses(model, copies, batch_tokens: int):
    """Pairs ids (T,), is_masked (T,), longest first -> the mean loss of each, lazily, in order."""
    for ids, is_masked, is_real in in_batches(copies, batch_tokens, model.config.eos_id):
        h = model.encode(torch.where(is_masked, model.config.mask_id, ids), is_real)
        yield from row_losses(model, h, ids, is_masked)


def row_losses(model, h, ids, is_masked) -> list[float]:
    """Mean cross-entropy of the masked tokens of each row, from the final states h (B, T, C)."""
    nll = model.nll(h, ids, is_masked).cpu().double()  # of all masked tokens, row by row
    return [row.mean().item() for row in nll.split(is_masked.sum(dim=1).tolist())]


def in_batches(copies, batch_tokens: int, eos_id: int):
    """Pairs ids (T,), is_masked (T,) -> ids (B, T), is_masked (B, T), is_real (B, T) or None."""
    for batch in batches(copies, batch_tokens):
        ids, is_real = padded([ids for ids, _ in batch], eos_id)
        is_masked, _ = padded([is_masked for _, is_masked in batch], False)
        yield ids, is_masked, is_real


def batches(copies, batch_tokens: int):
    """Split pairs, longest first, into lists of at most batch_tokens when padded, or of one."""
    batch = []
    for copy in copies:
        if batch and (len(batch) + 1) * len(batch[0][0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(copy)
    if batch:
        yield batch


def padded(rows, fill):
    """Pad rows at the right -> (B, T), is_real (B, T), or None if there is no padding."""
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(row) for row in rows])
    is_real = torch.arange(x.shape[1]) < lengths[:, None]
    return x, None if is_real.all() else is_real


def longest_first(rows) -> list[int]:
    """Order rows so that one too long for the model or its memory stops the run at once."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i]))


def check_first_is_given(model, prompts):
    """Raise ValueError for an empty prompt in a model that shifts."""
    if model.config.shift and not all(prompts):
        raise ValueError("an empty prompt leaves the answer's first token without a score, since "
                         "in this model state i scores token i + 1; begin with its BOS")
