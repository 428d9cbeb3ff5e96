"""MMLU: 14,042 questions of 57 subjects with four choices each (arXiv 2009.03300).

Rows come from a local folder (test.jsonl[.gz] and dev.jsonl[.gz], which has five solved questions a
subject, with `question`, `subject`, `choices` and `answer` 0..3) or from the hub's `cais/mmlu`.
The prompt is lm-eval's. A base model is not asked to write: it gives each letter a probability, and
the highest is its answer. The letter is one token, so that for a masked-diffusion model one mask
behind `Answer:` says it all (likelihood.choose). Always D would score 26.9 %.
"""
import hashlib
import random
import re
from collections import Counter, defaultdict

from tasks.common import Example, load_rows

LETTERS = "ABCD"


def load(split: str, data_dir: str = "", variant: str = "") -> list[Example]:
    """Questions of test, or the solved ones of dev, in file order, each without its shots.

    Raises ValueError or FileNotFoundError in one sentence if rows cannot be had or do not fit.
    """
    if split not in ("dev", "test"):
        raise ValueError(f"mmlu has no split {split!r}; choose from dev, test")
    if variant:
        raise ValueError(f"mmlu has no variant {variant!r}")
    examples, seen = [], Counter()
    for number, row in enumerate(load_rows(split, data_dir, "cais/mmlu", "all"), 1):
        texts = [row.get("question"), row.get("subject"), *list_of(row.get("choices"))]
        answer = row.get("answer")
        if (len(texts) != 6 or not all(isinstance(text, str) for text in texts)
                or type(answer) is not int or not 0 <= answer < 4):
            raise ValueError(f"mmlu {split}, row {number}: 'question' and 'subject' must be texts, "
                             f"'choices' four texts, and 'answer' 0, 1, 2 or 3")
        examples.append(to_example(row, seen))
    return examples


def list_of(choices) -> list:
    return choices if isinstance(choices, list) else []


def to_example(row: dict, seen: Counter) -> Example:
    """The id is a hash of the row; `seen` counts them, for 27 of the test rows occur before."""
    question, subject, choices = row["question"].strip(), row["subject"], row["choices"]
    key = hashlib.blake2b(repr((subject, question, choices)).encode(), digest_size=6).hexdigest()
    seen[key] += 1
    lines = [question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))]
    letter = LETTERS[row["answer"]]
    return Example("\n".join(lines) + "\nAnswer:", " " + letter,
                   {"id": f"mmlu/{key}" + f"-{seen[key]}" * (seen[key] > 1), "gold": letter,
                    "subject": subject, "choices": choices})


def subset(examples: list[Example], n: int = 500) -> list[Example]:
    """n of them, always the same, in file order. The paper's 500 are not known; these are ours."""
    if n > len(examples):
        raise ValueError(f"mmlu has {len(examples)} questions here, and {n} are wanted")
    return [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), n))]


def prompts(examples: list[Example], shots: list[Example], n_shot: int) -> list[str]:
    """The subject's heading, its first n_shot solved questions, the question.

    Raises ValueError if a subject has fewer.
    """
    by_subject = defaultdict(list)
    for shot in shots:
        by_subject[shot.meta["subject"]].append(f"{shot.prompt}{shot.answer}\n\n")
    texts = []
    for example in examples:
        subject = example.meta["subject"]
        solved = by_subject[subject][:n_shot]
        if n_shot < 0 or len(solved) < n_shot:
            raise ValueError(f"n_shot={n_shot} is not to be had: mmlu has "
                             f"{len(by_subject[subject])} solved questions of {subject!r}")
        texts.append(f"The following are multiple choice questions (with answers) about "
                     f"{subject.replace('_', ' ')}.\n\n{''.join(solved)}{example.prompt}")
    return texts


def letter_ids(tok, prompt: str) -> tuple[list[int], list[int]]:
    """-> the ids before the letter, and for each of A, B, C, D the one id that it is there.

    All of prompt + " A" is encoded at once, as it was learnt: the letter mostly has its blank in
    it, but for tokenizers where the blank is a token by itself, and so stands before. Raises
    ValueError where the four do not have all but their last token in common.
    """
    rows = [tok.encode(f"{prompt} {letter}") for letter in LETTERS]
    before, ids = rows[0][:-1], [row[-1] for row in rows]
    if any(row[:-1] != before for row in rows):
        raise ValueError(f"the letters A to D are not one token each behind 'Answer:' for the "
                         f"tokenizer {tok.name!r}")
    return tok.bos + before, ids


def extract(completion: str) -> str | None:
    """The letter that a generated answer begins with, or None."""
    found = re.match(r"\W*([A-D])\b", completion)
    return found and found[1]


def score(completion: str, example: Example) -> bool:
    return extract(completion) == example.meta["gold"]
