"""Rows of your own: a folder with train.jsonl and, better, test.jsonl. docs/own_data.md shows it.

    {"prompt": "24 May 1976 is ", "answer": "1976-05-24"}           one JSON object a line

A row has the keys of one of FORMS, and all rows of a file those of the same one; null is no second
form. A question is asked as `Question: ...\\nAnswer:`, with a blank before its answer. Everything
else is sent as it is: nothing is put between prompt and answer. `messages` are a chat of one user's
and one assistant's turn; a conversation of several turns, or with a system message, is refused,
because a prompt here is one text.

An answer is right if its text, whole or up to a second `Question:`, equals the gold one, however
blanks and line ends are written; `--variant=number` compares final numbers as GSM8K does. The gold
answer is the row's answer, or its `gold`, if it has one. validation.jsonl is validation; without it
that is the last tenth of train.
"""
from collections import Counter
from pathlib import Path

from tasks import gsm8k
from tasks.common import Example, check_choice, hold_out, ids_of, question_prompt, rows_file
from tasks.files import read_lines

# keys of a row: what is asked, what is answered; beside an instruction there may be an `input`
FORMS = (("prompt", "answer"), ("prompt", "completion"), ("question", "answer"),
         ("instruction", "output"), ("messages",))
VARIANTS = {"number": "compares final numbers"}

# ours: the rows are unknown. An answer must fit gen_length tokens with its end-of-text
PROTOCOL = dict(n_shot=0, gen_length=64, block_length=64, steps=64)


def load(split: str, data_dir: str = "", variant: str = "") -> list[Example]:
    """Return train, validation or test in file order; variant "number" compares final numbers.

    Raises ValueError or FileNotFoundError in one sentence if rows are missing or do not fit.
    """
    check_choice("jsonl", split, variant, variants=VARIANTS)
    if not data_dir:
        raise ValueError("jsonl reads rows of yours: name the folder of train.jsonl as --data_dir")
    is_cut = split != "test" and not rows_file("validation", data_dir)      # out of train
    pairs = read_pairs("train" if is_cut else split, data_dir, variant == "number")
    if is_cut:
        pairs = hold_out("jsonl", pairs, split, max(1, len(pairs) // 10))
    ids = ids_of([prompt for prompt, *_ in pairs])
    return [Example(prompt, answer, {"id": f"jsonl/{split}/{key}", "gold": gold,
                                     "by_number": variant == "number"})
            for (prompt, answer, gold), key in zip(pairs, ids)]


def read_pairs(source: str, data_dir: str, by_number: bool) -> list[tuple[str, str, str]]:
    """Return the prompt, the answer and the gold answer, as it is compared, of each row."""
    path = rows_file(source, data_dir)
    if not path:
        rest = ("; without one, --test_questions=0 in train.py, and eval_gsm8k.py "
                "--split=validation scores rows held out of train" if source == "test" else "")
        raise FileNotFoundError(f"there is no file {Path(data_dir) / source}.jsonl or .jsonl.gz"
                                f"{rest}")
    pairs, form = [], None
    for number, row in read_lines(path):
        where = f"{path}, line {number}:"
        found = form_of(row, where)
        form = form or found
        if found != form:
            raise ValueError(f"{where} the row has {' and '.join(found)}, those above "
                             f"{' and '.join(form)}; a file has rows of one form")
        prompt, answer = texts_of(row, form, where)
        gold = read(text_of(row, "gold", where) if "gold" in row else answer, by_number)
        if gold is None:
            raise ValueError(f"{where} the gold answer has no number to compare")
        pairs.append((prompt, answer, gold))
    return pairs


def form_of(row: dict, where: str) -> tuple[str, ...]:
    """Return the one form whose keys a row has."""
    found = [form for form in FORMS if row.keys() >= set(form)]
    found = [form for form in found if all(row[key] is not None for key in form)] or found
    if len(found) != 1:
        known = "; ".join(" and ".join(form) for form in found or FORMS)
        raise ValueError(f"{where} a row must have the keys of one form, "
                         f"{'not of several' if found else 'which are'}: {known}")
    return found[0]


def texts_of(row: dict, form: tuple, where: str) -> tuple[str, str]:
    """Return the prompt and the answer of a row."""
    if form == ("messages",):
        return turns_of(row["messages"], where)
    first, answer = (text_of(row, key, where) for key in form)
    if form[0] == "question":
        return question_prompt(first.strip()), f" {answer.strip()}"
    if form[0] == "instruction" and str(row.get("input") or "").strip():    # often empty in Alpaca
        first += f"\n\n{text_of(row, 'input', where)}"
    return first, answer


def turns_of(messages, where: str) -> tuple[str, str]:
    """Return the contents of the user's and the assistant's turn, the only two."""
    turns = [turn if isinstance(turn, dict) else {} for turn in
             (messages if isinstance(messages, list) else [])]
    if [turn.get("role") for turn in turns] != ["user", "assistant"]:
        raise ValueError(f"{where} messages must be one turn of the role user and one of the role "
                         f"assistant; write a longer conversation as a row of prompt and answer")
    return tuple(text_of(turn, "content", where) for turn in turns)


def text_of(row: dict, key: str, where: str) -> str:
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} {key} must be a text that is not empty, not {repr(text)[:60]}")
    return text


def read(text: str, by_number: bool) -> str | None:
    """Return what is compared of a gold answer: all of it, or its final number."""
    return gsm8k.extract(text) if by_number else " ".join(text.split())


def extract(completion: str) -> str | None:
    """Return the answer, every run of blanks and line ends as one blank; None if it is empty.

    It ends at a second `Question:`, with which a model that is shown solved ones may go on.
    """
    return " ".join(completion.split("\nQuestion:")[0].split()) or None


def score(completion: str, example: Example) -> bool:
    """Return whether the answer is the gold one, which may itself go on with `Question:`."""
    if example.meta["by_number"]:
        return gsm8k.extract(completion) == example.meta["gold"]
    return example.meta["gold"] in (read(completion, False), extract(completion))


def extra_scores(examples: list[Example], completions: list[str]) -> dict[str, float]:
    """Return the score of the commonest gold answer, if it were given to every question."""
    golds = Counter(example.meta["gold"] for example in examples)
    return {"always_the_commonest": golds.most_common(1)[0][1] / len(examples)}
