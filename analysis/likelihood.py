"""How probable a text is to a masked-diffusion model: what it knows, measured without generating.

Hide l of the L tokens of a text and ask for them. With l drawn uniformly from 1..L, and then every
choice of l places as likely as any other,

    log p(text)  >=  -L * E[ mean cross-entropy of the hidden tokens ]

which is how LLaDA is evaluated (arXiv 2502.09992, its public get_log_likelihood.py). Exact numbers
of masks vary less than a coin for each token. With one token to hide no chance is left, and this is
the model's own log p of it. Three uses of one mean:

    log_likelihood      of answers to prompts, by Monte Carlo
    held_out_losses     of windows of a text, at fixed rates and with the same masks for all models
    choose              of one-token answers, all of them in one pass

Where a state scores the next token (Dream) nothing scores the first: it is always given.
"""
import sys
from itertools import islice

import torch
from tqdm import tqdm

from model import row_generators, uniform
from pretrained.device import to_device

BATCH_TOKENS = 8192     # of one pass, padding included; the number is ours


def log_likelihood(model, prompts: list[list[int]], answers: list[list[int]], n_samples: int = 128,
                   seed: int = 0, batch_tokens: int = BATCH_TOKENS):
    """LLaDA's estimate of log p(answer | prompt): N prompts, N answers, ids -> (N,) fp64, in nats.

    Unbiased for the bound above, exact for one token. The prompt is never masked. Masks come from
    (seed, the prompt itself): a batch changes nothing, and answers to one prompt, the choices of a
    question, meet the same chance. Raises ValueError for an empty answer, for lists that differ in
    length, and for an empty prompt where the first token has no scorer.
    """
    if n_samples < 1 or len(prompts) != len(answers) or not all(answers):
        raise ValueError(f"n_samples={n_samples} must be at least 1, and each of {len(prompts)} "
                         f"prompts needs an answer of at least one token; there are "
                         f"{sum(map(bool, answers))} such answers")
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
    for i in progress(order, "log-likelihood", "answer"):
        estimate[i] = -len(answers[i]) * sum(islice(losses, n_copies[i])) / n_copies[i]
    return estimate


def held_out_losses(model, windows, rates, seed: int = 0, batch_tokens: int = BATCH_TOKENS):
    """Mean cross-entropy per masked token of each window at each rate: (N, T), R -> (N, R) fp64.

    A window's first token, BOS or text, is given; of the T - 1 others exactly round(t * (T - 1)),
    at least one, are masked. Which, depends on (seed, rate, the window's own ids) alone: the same
    for every model, batch and choice of windows, so that losses can be compared in pairs. Raises
    ValueError for rates outside (0, 1] and for windows without a second token.
    """
    rates, n_maskable = [float(t) for t in rates], windows.shape[1] - 1
    if not rates or not all(0 < t <= 1 for t in rates):
        raise ValueError(f"rates={tuple(rates)} must be one or more numbers above 0 and up to 1")
    if n_maskable < 1:
        raise ValueError(f"windows of {windows.shape[1]} tokens leave none to mask; two are the "
                         f"least")

    def copies():
        for ids in windows:
            keys = [(t, *ids.tolist()) for t in rates]
            for t, generator in zip(rates, row_generators(seed, 0, keys)):
                count = torch.tensor([max(1, int(t * n_maskable + 0.5))])
                is_masked = exact_masks(count, n_maskable, generator)[0]
                yield ids, torch.cat([is_masked.new_zeros(1), is_masked])

    n_copies = len(windows) * len(rates)
    losses = list(progress(mean_losses(model, copies(), batch_tokens), "held-out loss", "pass",
                           n_copies))
    return torch.tensor(losses, dtype=torch.float64).view(len(windows), len(rates))


@torch.no_grad()
def choose(model, prompts: list[list[int]], choices: list[list[int]],
           batch_tokens: int = BATCH_TOKENS):
    """log p of K tokens at one [MASK] after each prompt: N prompts, (N, K) ids -> (N, K) fp64.

    Its argmax is the answer, and exp().sum(1) the probability that the model leaves to the choices.
    One pass a question: what is masked is the same for all of them, so this is log_likelihood.
    """
    check_first_is_given(model, prompts)
    choices, order = torch.tensor(choices), longest_first(prompts)
    log_p = torch.zeros(choices.shape, dtype=torch.float64)
    bar = progress(None, "choices", "question", len(prompts))
    rows = ((i, torch.tensor(prompts[i] + [model.config.mask_id])) for i in order)
    for batch in batches(rows, batch_tokens, length=lambda row: len(row[1])):
        which, ids = zip(*batch)
        xt, is_real = padded(ids, model.config.eos_id)
        h = model.encode(xt, is_real)
        last = torch.tensor([len(x) - 1 for x in ids])
        logits = model.unembed(h, where=(torch.arange(len(ids)), last))         # (B, V)
        of_choices = to_device(choices[list(which)], h.device)                  # (B, K)
        log_p[list(which)] = logits.log_softmax(dim=-1).gather(1, of_choices).cpu().double()
        bar.update(len(ids))
    bar.close()
    return log_p


# ----------------------------------------------------------------------------------------------
# masks


def stratified_masks(L: int, n: int, generator):
    """(n, L) masks whose numbers 1..L are uniform each and spread evenly together, as LLaDA's: a
    random start and then steps of L / n, around the circle. If L divides n all are met alike."""
    start = torch.randint(L, (1,), generator=generator)
    counts = (start + torch.arange(n) * L // n) % L + 1                     # (n,)
    return exact_masks(counts, L, generator)


def exact_masks(counts, L: int, generator):
    """Masks with exactly so many places, any set of them as likely as another: (n,) -> (n, L)."""
    u = uniform((len(counts), L), generator, "cpu")
    return u.argsort(dim=1) < counts[:, None]       # of each row's random order of 0..L-1


# ----------------------------------------------------------------------------------------------
# passes


@torch.no_grad()
def mean_losses(model, copies, batch_tokens: int):
    """Pairs ids (T,), is_masked (T,), longest first -> the mean loss of each, lazily, in order."""
    for batch in batches(copies, batch_tokens, length=lambda copy: len(copy[0])):
        x0, is_real = padded([ids for ids, _ in batch], model.config.eos_id)
        is_masked, _ = padded([is_masked for _, is_masked in batch], False)
        h = model.encode(torch.where(is_masked, model.config.mask_id, x0), is_real)
        nll = model.nll(h, x0, is_masked).cpu().double()                    # by rows, end to end
        yield from (row.mean().item() for row in nll.split(is_masked.sum(dim=1).tolist()))


def batches(rows, batch_tokens: int, length):
    """Rows, longest first, in lists that take at most batch_tokens when padded, or one row."""
    batch = []
    for row in rows:
        if batch and (len(batch) + 1) * length(batch[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded(rows, fill):
    """Rows of any lengths -> (B, T) filled at the right, is_real (B, T), or None if all are."""
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(row) for row in rows])
    is_real = torch.arange(x.shape[1]) < lengths[:, None]
    return x, None if is_real.all() else is_real


def longest_first(rows) -> list[int]:
    """What is too long for the model or its memory stops the run at its first pass."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i]))


def check_first_is_given(model, prompts):
    if model.config.shift and not all(prompts):
        raise ValueError("an empty prompt leaves the answer's first token without a scorer, for "
                         "in this model state i scores token i + 1; begin with its BOS")


def progress(rows, what: str, unit: str, total: int | None = None):
    return tqdm(rows, total=total, desc=what, unit=unit, leave=False,
                mininterval=0.5 if sys.stderr.isatty() else 15)
