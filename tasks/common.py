"""What all tasks share: an Example, its prompt, token rows, batches as a pure function of the step.

A row is a prompt and an answer, tokenized apart and joined. Only answers are masked and scored.
Short answers are filled with end-of-text up to the longest of the (global) batch; the fill is
seen, masked and trained like any token, as in LLaDA's SFT, because sampling starts from a whole
region of masks and the model has to know how to end. What then still differs in length is
padding, and padding is invisible.

A task is a module with load(split, data_dir, variant) -> [Example], extract(completion) -> what
counts as the answer in it, or None, and score(completion, example) -> whether that is right. If its
answers end in a format of their own it also has has_format(completion): the strict accuracy counts
what is right *and* in format, the other one (flexible) what is right.
"""
import random
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from tasks.files import read_jsonl


class Example(NamedTuple):
    prompt: str
    answer: str
    meta: dict          # at least "id", unique within the task


class Row(NamedTuple):
    example_id: int     # position in the task's list; masks are drawn from (seed, step, example_id)
    prompt: list[int]
    answer: list[int]   # without end-of-text


def load_task(name: str):
    """The module tasks/{name}.py. Raises ValueError naming the tasks there are."""
    here = Path(__file__).parent
    names = sorted(path.stem for path in here.glob("*.py") if "\ndef load(" in path.read_text())
    if name not in names:
        raise ValueError(f"there is no task {name!r}; choose from {', '.join(names)}")
    return import_module(f"tasks.{name}")


def question_prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def few_shot(examples: list[Example], shots: list[Example]) -> list[Example]:
    """Each prompt preceded by the shots with their answers, separated by blank lines."""
    head = "".join(f"{shot.prompt}{shot.answer}\n\n" for shot in shots)
    return [example._replace(prompt=head + example.prompt) for example in examples]


def load_rows(split: str, data_dir: str, hub_name: str,
              hub_config: str | None = None) -> list[dict]:
    """The rows of {data_dir}/{split}.jsonl[.gz], or without a folder those of the hub's dataset.

    Raises FileNotFoundError or ValueError, one sentence, if they cannot be had.
    """
    if data_dir:
        paths = [Path(data_dir) / f"{split}.jsonl{end}" for end in ("", ".gz")]
        return read_jsonl(next((path for path in paths if path.is_file()), paths[1]))
    import datasets  # takes seconds, and is needed here only
    try:
        return list(datasets.load_dataset(hub_name, hub_config, split=split))
    except Exception as error:      # no network, no such file, a proxy: many classes, one meaning
        raise ValueError(f"{hub_name} could not be had from the hub ({type(error).__name__}); give "
                         f"a folder with {split}.jsonl.gz as --data_dir") from error


def tokenize(examples: list[Example], tok, max_length: int, name: str = "") -> list[Row]:
    """Rows that fit max_length with one end-of-text; others are dropped, for the caller to count.

    Never cut: a row without its end has lost its final answer. Raises ValueError if none is left.
    """
    rows = [Row(i, tok.prompt_ids(example.prompt), tok.answer_ids(example.answer))
            for i, example in enumerate(examples)]
    fitting = [row for row in rows
               if row.prompt and row.answer and len(row.prompt) + len(row.answer) < max_length]
    if not fitting:
        raise ValueError(f"none of {len(rows)} {name} rows has an answer and fits "
                         f"max_length={max_length}; the shortest needs "
                         f"{min(len(r.prompt) + len(r.answer) for r in rows) + 1} tokens")
    return fitting


def batch_at(step: int, rows: list[Row], batch_size: int, seed: int,
             part: int = 0, n_parts: int = 1):
    """The batch of a step, or the part of it that one rank sees in one micro-step -> rows, fill.

    Pure in (seed, step): epochs are shuffled one after the other and cut into batches, so that
    neither the world size, nor accumulation, nor a restart changes what a step sees. `fill` is the
    length of the longest answer of the whole batch, for `collate`.
    """
    batch = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(position, len(rows))
        batch.append(rows[order_of_epoch(len(rows), seed, epoch)[i]])
    return batch[part::n_parts], max(len(row.answer) for row in batch) + 1


@lru_cache(maxsize=2)
def order_of_epoch(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


def collate(rows: list[Row], fill: int, max_length: int, eos_id: int):
    """-> x0 (B, T) ids, maskable (B, T) the answer with its fill, is_real (B, T) all but padding.

    A row is [prompt | answer | end-of-text up to `fill`, as far as max_length allows | padding].
    Packing (`pack`) drops the padding only: with a fill that is what longer prompts leave, without
    one (fill 0: each answer has one end-of-text) all that shorter rows leave.
    """
    lengths = [min(len(row.prompt) + max(fill, len(row.answer) + 1), max_length) for row in rows]
    x0 = torch.full((len(rows), max(lengths)), eos_id)
    position = torch.arange(max(lengths))
    for b, row in enumerate(rows):
        ids = row.prompt + row.answer
        x0[b, :len(ids)] = torch.tensor(ids)
    is_real = position < torch.tensor(lengths)[:, None]
    maskable = is_real & (position >= torch.tensor([len(row.prompt) for row in rows])[:, None])
    return x0, maskable, is_real
