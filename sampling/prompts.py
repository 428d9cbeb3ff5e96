"""Check what goes into the sampler: prompts, generators, and the ids that may come out."""
from operator import index

import torch

from sampling.reveal import Sampling


def id_lists(config, rows, is_real=None) -> list[list[int]]:
    """Turn rows of ids, tensors or lists, into lists; drop the ids where is_real is False.

    Raises ValueError unless they are rows of ids that the model has.
    """
    try:
        rows = [to_list(row) for row in rows]
    except TypeError:
        raise ValueError("prompts must be rows of ids: a (B, P) tensor of integers, or a list of "
                         "lists") from None
    if is_real is not None:
        is_real = torch.as_tensor(is_real).tolist()
        if [len(row) for row in rows] != [len(row) for row in is_real]:
            raise ValueError("is_real must have the shape of the prompts, (B, P)")
        rows = [[i for i, real in zip(*pair) if real] for pair in zip(rows, is_real)]
    for row in rows:
        for i in row:
            if not 0 <= i < config.vocab_size:
                raise ValueError(f"a prompt has the id {i}; ids must lie in "
                                 f"0..{config.vocab_size - 1}, below vocab_size")
    return rows


def to_list(row) -> list[int]:
    """Raise TypeError unless the row is a sequence of integers."""
    if hasattr(row, "tolist"):
        row = row.tolist()
    return [index(i) for i in row]


def check_prompts(config, prompts, gen_length: int):
    """Raise ValueError if there is no prompt, or if one leaves no room for an answer."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths:
        raise ValueError("there is no prompt; give at least one")
    if config.shift and not min(lengths):
        raise ValueError("the prompt is empty, and a model that scores the next token cannot begin "
                         "a text; give at least one token")
    if max(lengths) + gen_length > config.block_size:
        raise ValueError(f"a prompt of {max(lengths)} tokens and gen_length={gen_length} exceed "
                         f"block_size={config.block_size}; prompts of up to "
                         f"{max(0, config.block_size - gen_length)} tokens fit")


def check_text(text: str):
    """Raise ValueError if it has half characters, which bytes that are no UTF-8 become in argv."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt or infill is not text: its character {error.start + 1} is a byte "
                         f"that is not UTF-8") from None


def check_gaps(config, gaps, s: Sampling):
    """Raise ValueError if texts have no gaps to fill, or if the settings cannot fill them."""
    if s.cache != "none" or s.window:
        raise ValueError(f"cache={s.cache} and window={s.window} need one run of masks at the end "
                         f"of a text; gaps anywhere need cache=none and window=0")
    if s.block_length > config.block_size:
        raise ValueError(f"block_length={s.block_length} exceeds block_size={config.block_size}, "
                         f"the most tokens that the model reads")
    if not all(gaps) or config.shift and any(gap[0] == 0 for gap in gaps):
        raise ValueError("a text to infill needs a mask, written [MASK], and not as its first "
                         "token if the model scores the next one")


def check_generator(s: Sampling, generator, n_rows: int):
    """Raise ValueError if random settings have no generator, or a list is not one per row."""
    if s.is_random and generator is None:
        raise ValueError(f"temperature={s.temperature}, alg_temp={s.alg_temp} and "
                         f"remasking={s.remasking} draw at random and need a generator")
    if isinstance(generator, list) and len(generator) != n_rows:
        raise ValueError(f"{len(generator)} generators for {n_rows} rows; give a list with one "
                         f"per row, or a single generator")


def never_of(model, tok) -> list[int]:
    """Return the ids that are not text: markers, and embedding rows beyond the vocabulary."""
    return [*tok.never, *range(tok.n_vocab, model.config.vocab_size)]


def ends_of(tok) -> list[int]:
    """Return the ids that end an answer: end of text and, with a chat format, of the turn."""
    return [i for i in (tok.eos_id, tok.eot_id) if i is not None]
