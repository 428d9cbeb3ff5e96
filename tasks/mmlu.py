"""MMLU: 14,042 questions of 57 subjects with four choices each (arXiv 2009.03300).

Rows come from a local folder (test.jsonl[.gz] and dev.jsonl[.gz], which has five solved questions a
subject, with `question`, `subject`, `choices` and `answer` 0..3) or from the hub's `cais/mmlu`.
The prompt is lm-eval's. A base model is not asked to write: it gives each letter a probability, and
the likeliest letter is its answer. The letter is one token, so a masked-diffusion model needs one
forward pass with one mask after `Answer:` (likelihood.choose). Always D would score 26.9 %.
"""
import random
import re
from collections import defaultdict

from tasks.common import Example, check_choice, ids_of, load_rows, rows_name

LETTERS = "ABCD"


def load(split: str, data_dir: str = "", variant: str = "") -> list[Example]:
    """Return the questions of test, or the solved ones of dev, in file order, without shots.

    Raises ValueError or FileNotFoundError in one sentence if rows are missing or do not fit.
    """
    check_choice("mmlu", split, variant, splits=("dev", "test"))
    rows = load_rows(split, data_dir, "cais/mmlu", "all")
    name = rows_name(split, data_dir, "cais/mmlu")
    for number, row in enumerate(rows, 1):
        choices, answer = row.get("choices"), row.get("answer")
        has_choices = isinstance(choices, list) and len(choices) == 4
        texts = [row.get("question"), row.get("subject"), *(choices if has_choices else [None])]
        if (not all(isinstance(text, str) for text in texts)
                or type(answer) is not int or not 0 <= answer < 4):
            raise ValueError(f"{name}, row {number}: 'question' and 'subject' must be texts, "
                             f"'choices' four texts, and 'answer' 0, 1, 2 or 3")
    # 27 rows of test occur twice
    ids = ids_of([repr((row["subject"], row["question"].strip(), row["choices"])) for row in rows])
    return [to_example(row, f"mmlu/{key}") for row, key in zip(rows, ids)]


def to_example(row: dict, row_id: str) -> Example:
    lines = [row["question"].strip()]
    lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"])]
    letter = LETTERS[row["answer"]]
    meta = {"id": row_id, "gold": letter, "subject": row["subject"], "choices": row["choices"]}
    return Example(prompt("\n".join(lines)), " " + letter, meta)


def prompt(text: str) -> str:
    """Return the prompt of a question and its choices, a line each: `A. ...` to `D. ...`."""
    return f"{text}\nAnswer:"


def subset(examples: list[Example], n: int = 500) -> list[Example]:
    """Return n of them in file order, always the same. Which 500 the paper took is unknown."""
    if n > len(examples):
        raise ValueError(f"mmlu has {len(examples)} questions here, which is fewer than {n}")
    return [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), n))]


def prompts(examples: list[Example], shots: list[Example], n_shot: int) -> list[str]:
    """Return for each example: its subject's heading and first n_shot solved questions, itself.

    Raises ValueError if a subject has fewer.
    """
    by_subject = defaultdict(list)
    for shot in shots:
        by_subject[shot.meta["subject"]].append(f"{shot.prompt}{shot.answer}\n\n")
    texts = []
    for example in examples:
        subject = example.meta["subject"]
        solved = by_subject[subject]
        if not 0 <= n_shot <= len(solved):
            raise ValueError(f"n_shot={n_shot} does not fit: mmlu has {len(solved)} solved "
                             f"questions of {subject!r}")
        heading = (f"The following are multiple choice questions (with answers) about "
                   f"{subject.replace('_', ' ')}.")
        texts.append(f"{heading}\n\n{''.join(solved[:n_shot])}{example.prompt}")
    return texts


def letter_ids(tok, prompt: str) -> tuple[list[int], list[int]]:
    """-> the ids before the letter, and the ids of A, B, C and D in that place.

    prompt + " A" is encoded as one text, as in training. In most tokenizers the letter's token
    includes the blank; in others the blank is a token of its own and belongs to the ids before.
    Raises ValueError unless the four texts differ in their last token only.
    """
    rows = [tok.encode(f"{prompt} {letter}") for letter in LETTERS]
    before, ids = rows[0][:-1], [row[-1] for row in rows]
    if any(row[:-1] != before for row in rows):
        raise ValueError(f"the letters A to D are not one token each after 'Answer:' in the "
                         f"tokenizer {tok.name!r}")
    return tok.bos + before, ids


def extract(completion: str) -> str | None:
    """Return the letter that a generated answer begins with, or None."""
    found = re.match(r"\W*([A-D])\b", completion)
    return found and found[1]


def score(completion: str, example: Example) -> bool:
    return extract(completion) == example.meta["gold"]
