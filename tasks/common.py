"""Tasks in common: the contract of a task, prompts, rows of tokens, batches by step.

A task is a module tasks/NAME.py. There is no base class and no registry: put a file there, and
`--task=NAME` finds it. It has

    load(split, data_dir, variant) -> list[Example]     train and test, mostly validation too
    extract(completion) -> the answer in a text that a model wrote, or None
    score(completion, example) -> bool                  whether that answer is right

and may have

    has_format(completion) -> bool      whether the answer ends in the task's own format. The strict
                                        accuracy counts answers that are right and in format, the
                                        flexible one (the headline) all that are right
    extra_scores(examples, completions) -> {name: share}    printed beside the accuracy
    prompt(text) -> str                 the prompt that a row with this text has. load makes its
                                        prompts with it; sample.py, by --task, those of a user
    PROTOCOL = dict(n_shot, gen_length, block_length, steps)    how it is asked by default

Every Example has a prompt, an answer and meta["id"], which are texts, and meta["gold"], the right
answer, is something that JSON can hold. An id should be no other example's of the split: a repeated
one is not refused, but evaluation calls the second example id#2. A task that
does not use data_dir or variant refuses them (`check_choice`). `load_task` refuses a module whose
functions are missing or take other arguments, and `load_examples`, by which training and evaluation
load rows, refuses rows that are not as said here: before anything is computed, not after.

A row is a prompt and an answer, tokenized apart and joined. Only the answer is masked and scored.
Short answers are filled with end-of-text up to the longest answer of the (global) batch. The fill
is visible, masked and trained like any token, as in LLaDA's SFT: sampling starts from a whole
region of masks, and the model has to learn where to end. The difference in length that is left is
padding, which no token attends to.
"""
import hashlib
import inspect
import json
import os
import random
from collections import Counter
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from tasks.files import read_jsonl

# what a task has, and how many arguments each function takes
NEEDED = {"load": 3, "extract": 1, "score": 2}
OPTIONAL = {"has_format": 1, "extra_scores": 2, "prompt": 1}
PROTOCOL = {"n_shot": 0, "gen_length": 1, "block_length": 1, "steps": 1}     # and the least of each
SPLITS = ("train", "validation", "test")
N_VALIDATION = 256      # train rows held out where a dataset has no validation split of its own


class Example(NamedTuple):
    prompt: str
    answer: str
    meta: dict          # "id", "gold", and what the task's score needs


class Row(NamedTuple):
    example_id: int     # position in the task's list; masks are drawn from (seed, step, example_id)
    prompt: list[int]
    answer: list[int]   # without end-of-text


def load_task(name: str):
    """Return the module tasks/{name}.py. Raises ValueError if it is missing or is not a task."""
    folder = Path(__file__).parent
    if not (name.isidentifier() and (folder / f"{name}.py").is_file()):
        names = sorted(path.stem for path in folder.glob("[a-z]*.py")
                       if "\ndef load(" in path.read_text("utf-8", "replace"))
        raise ValueError(f"there is no task {name!r}; choose from {', '.join(names)}")
    try:
        module = import_module(f"tasks.{name}")
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"tasks/{name}.py cannot be imported: {error}") from error
    missing = [function for function in NEEDED if not callable(getattr(module, function, None))]
    if missing:
        raise ValueError(f"tasks/{name}.py lacks {' and '.join(missing)}; a task has load, extract "
                         f"and score, see tasks/common.py")
    for function, n in {**NEEDED, **OPTIONAL}.items():
        if hasattr(module, function) and not takes(getattr(module, function), n):
            raise ValueError(f"tasks/{name}.py: {function} must take {n} "
                             f"argument{'s' * (n > 1)}, see tasks/common.py")
    protocol = getattr(module, "PROTOCOL", {})
    if not isinstance(protocol, dict) or not all(
            type(n) is int and n >= PROTOCOL.get(key, n + 1) for key, n in protocol.items()):
        raise ValueError(f"tasks/{name}.py: PROTOCOL={protocol!r} must be a dict of whole numbers "
                         f"for {', '.join(PROTOCOL)}")
    return module


def takes(function, n: int) -> bool:
    """Return whether a function can be called with n arguments."""
    try:
        inspect.signature(function).bind(*range(n))
    except (TypeError, ValueError):
        return False
    return True


def load_examples(name: str, split: str, data_dir: str = "", variant: str = "") -> list[Example]:
    """Load a split of a task. Raises ValueError if the rows are not what the contract says."""
    task = load_task(name)
    examples = task.load(split, data_dir, variant)
    if not isinstance(examples, list) or not examples:
        raise ValueError(f"tasks/{name}.py: load({split!r}) must return a list of Examples, and at "
                         f"least one, not {str(examples)[:60]!r}")
    for number, example in enumerate(examples, 1):
        where = f"tasks/{name}.py: example {number} of {split}"
        if not isinstance(example, Example) or not isinstance(example.meta, dict):
            raise ValueError(f"{where} must be an Example(prompt, answer, meta)")
        texts = {"a prompt": example.prompt, "an answer": example.answer,
                 'a meta["id"]': example.meta.get("id")}
        lacks = [what for what, text in texts.items() if not isinstance(text, str)]
        if lacks:
            raise ValueError(f"{where} must have {lacks[0]} that is a text")
        if example.meta.get("gold") is None or not is_json(example.meta["gold"]):
            raise ValueError(f'{where} must have the right answer as its meta["gold"], a text or '
                             f'something else that JSON can hold')
    for text in ("", examples[0].answer):
        check_verdict(name, task.score(text, examples[0]))
        if not is_json(prediction := task.extract(text)):
            raise ValueError(f"tasks/{name}.py: extract must return None, a text or something else "
                             f"that JSON can hold, not {prediction!r}")
    return examples


def check_verdict(name: str, verdict):
    if type(verdict) is not bool:
        raise ValueError(f"tasks/{name}.py: score must return True or False, not {verdict!r}")


def check_extra(name: str, extra):
    """Raise ValueError unless extra_scores has returned {text: number}."""
    if not isinstance(extra, dict) or not all(
            isinstance(key, str) and type(value) in (int, float) for key, value in extra.items()):
        raise ValueError(f"tasks/{name}.py: extra_scores must return a dict of texts and numbers, "
                         f"not {str(extra)[:60]}")


def is_json(value) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


# ----------------------------------------------------------------------------------------------
# loading: what the modules of tasks use


def check_choice(task: str, split: str, variant: str = "", splits=SPLITS, variants=None,
                 data_dir: str = ""):
    """Raise ValueError if the task lacks the split or the variant. variants: {name: its effect}.

    data_dir: given by a task that makes its rows and has no use for a folder.
    """
    if split not in splits:
        raise ValueError(f"{task} has no split {split!r}; choose from {', '.join(splits)}")
    if variant and variant not in (variants or {}):
        known = ", ".join(f"{name!r} {effect}" for name, effect in (variants or {}).items())
        raise ValueError(f"{task} has no variant {variant!r}; {known or 'leave it empty'}")
    if data_dir:
        raise ValueError(f"{task} makes its own rows and does not read data_dir={data_dir!r}; "
                         f"leave it empty")


def load_rows(split: str, data_dir: str, hub_name: str,
              hub_config: str | None = None) -> list[dict]:
    """Return the rows of {data_dir}/{split}.jsonl[.gz]; without a folder, the hub dataset's.

    Raises OSError or ValueError in one sentence.
    """
    if data_dir:
        if not (path := rows_file(split, data_dir)):
            raise FileNotFoundError(f"there is no file {Path(data_dir) / split}.jsonl or .jsonl.gz;"
                                    f" data_dir={data_dir!r} must name a folder that has it")
        return read_jsonl(path)
    import datasets  # takes seconds, and is needed only here
    try:
        return list(datasets.load_dataset(hub_name, hub_config, split=split))
    except Exception as error:  # no network, no such file, a proxy: many classes, one meaning
        raise ValueError(f"{hub_name} cannot be loaded from the hub ({type(error).__name__}); give "
                         f"a folder with {split}.jsonl.gz as --data_dir") from error


def rows_file(split: str, data_dir: str) -> Path | None:
    """Return {data_dir}/{split}.jsonl, or else .jsonl.gz, whatever it is; None if there is none."""
    paths = [Path(data_dir) / f"{split}.jsonl{end}" for end in ("", ".gz")]
    return next((path for path in paths if os.path.lexists(path)), None)


def rows_name(split: str, data_dir: str, hub_name: str) -> str:
    """Return where load_rows finds a split, for a sentence about one of its rows."""
    return str(rows_file(split, data_dir)) if data_dir else f"{hub_name} {split}"


def hold_out(task: str, rows: list, split: str, n: int = N_VALIDATION) -> list:
    """Return the rows of train, or of validation: the file's last n, never trained on."""
    if len(rows) <= n:
        raise ValueError(f"{task} train has {len(rows)} rows; more than {n} are needed, because "
                         f"that many are held out")
    return rows[-n:] if split == "validation" else rows[:-n]


def hash_of(text: str) -> str:
    """Return 12 hex digits that identify a text, the same in every copy of the data."""
    data = text.encode("utf-8", "surrogatepass")        # half a character must not stop a run
    return hashlib.blake2b(data, digest_size=6).hexdigest()


def ids_of(texts: list[str]) -> list[str]:
    """Return the hash of each text; where a text occurs again, with its count: `5f0c...-2`."""
    ids, seen = [], Counter()
    for text in texts:
        key = hash_of(text)
        seen[key] += 1
        ids.append(f"{key}-{seen[key]}" if seen[key] > 1 else key)
    return ids


# ----------------------------------------------------------------------------------------------
# prompts


def task_prompt(name: str, text: str) -> str:
    """Wrap a text as a task's rows are. Raises ValueError if the task or the text does not fit."""
    task = load_task(name)
    if not hasattr(task, "prompt"):
        raise ValueError(f"tasks/{name}.py has no prompt(text) that would wrap a text as its rows "
                         f"are; name a task that does as --task, or write the prompt out and send "
                         f"it with --raw")
    prompt = task.prompt(text)
    if not isinstance(prompt, str):
        raise ValueError(f"tasks/{name}.py: prompt must return a text, not {prompt!r:.60}")
    return prompt


def question_prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def few_shot(examples: list[Example], shots: list[Example]) -> list[Example]:
    """Put the shots with their answers before each prompt, separated by blank lines."""
    head = "".join(f"{shot.prompt}{shot.answer}\n\n" for shot in shots)
    return [example._replace(prompt=head + example.prompt) for example in examples]


# ----------------------------------------------------------------------------------------------
# rows and batches


def tokenize(examples: list[Example], tok, max_length: int, name: str = "") -> list[Row]:
    """Return the rows that fit max_length with one end-of-text; the caller counts the dropped ones.

    A row is never cut, for its end is the final answer. Raises ValueError if no row is left.
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
    """Return the batch of a step, or the part that one rank sees in one micro-step -> rows, fill.

    It is pure in (seed, step). Each epoch is shuffled, the epochs are joined and cut into batches,
    so neither the number of ranks, nor accumulation, nor a restart changes what a step sees. `fill`
    is 1 + the length of the longest answer of the whole batch, for `collate`.
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
    """-> x0 (B, T) ids, maskable (B, T) the answer and its fill, is_real (B, T) all but padding.

    A row is [prompt | answer | end-of-text up to `fill` or max_length | padding]. With fill=0 an
    answer has one end-of-text. Packing (`pack`) drops the padding and nothing else.
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
