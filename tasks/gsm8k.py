"""GSM8K: grade-school word problems with worked answers that end in `#### 42` (arXiv 2110.14168).

Rows come from a local folder (train.jsonl[.gz], test.jsonl[.gz] with `question` and `answer`)
or, without one, from the hub's `openai/gsm8k`. There is no official validation split: the
last 256 train rows are ours and are never trained on. The metric stands beside the format it
reads; extraction rules are worth several points on the same text, so the two in use are
spelled out in `extract`.
"""
import hashlib
import re
from decimal import Decimal

from tasks.common import Example, load_rows, question_prompt

N_VALIDATION = 256
MARKS = re.compile(r"<<.*?>>")          # calculator annotations: 3*4=<<3*4=12>>12
# a sign counts unless it stands between two numbers, where it is a minus: `10-3` ends in 3
NUMBER = re.compile(r"(?:(?<![0-9.)])-)?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")

# the paper states 4 shots in its main table and 0 in an appendix; 128 steps and 256 tokens in one
# block are those of the public reproduction
PROTOCOL = dict(n_shot=4, gen_length=256, block_length=256, steps=128)


def load(split: str, data_dir: str = "", variant: str = "") -> list[Example]:
    """Rows of train, validation or test in file order; variant "marks" leaves <<...>> in answers.

    Raises ValueError or FileNotFoundError in one sentence if rows cannot be had or lack a field.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"gsm8k has no split {split!r}; choose from train, validation, test")
    if variant not in ("", "marks"):
        raise ValueError(f"gsm8k has no variant {variant!r}; 'marks' keeps <<...>> in the answers")
    source = "test" if split == "test" else "train"
    rows = load_rows(source, data_dir, "openai/gsm8k", "main")
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(key), str) for key in ("question", "answer")):
            raise ValueError(f"gsm8k {source}, row {number}: 'question' and 'answer' must be texts")
    if source == "train":
        if len(rows) <= N_VALIDATION:
            raise ValueError(f"gsm8k train has {len(rows)} rows; more than {N_VALIDATION} are "
                             f"needed, for that many are held out")
        rows = rows[-N_VALIDATION:] if split == "validation" else rows[:-N_VALIDATION]
    return [to_example(row, variant == "marks") for row in rows]


def to_example(row: dict, keep_marks: bool = False) -> Example:
    """The id is a hash of the question: the same row has the same id in every copy of the data."""
    answer = row["answer"] if keep_marks else MARKS.sub("", row["answer"])
    key = hashlib.blake2b(row["question"].encode(), digest_size=6).hexdigest()
    return Example(question_prompt(row["question"].strip()), " " + answer.strip(),
                   {"id": f"gsm8k/{key}", "gold": extract(answer, strict=True)})


def extract(completion: str, strict: bool = False) -> str | None:
    """The final number as plain digits ("1234", "-3", "5"), or None.

    strict: the number behind the last `####`. Flexible, the headline: that one, or else the last
    number anywhere outside <<...>>. What follows a new `Question:` is not ours.
    """
    text = MARKS.sub("", completion.split("Question:")[0]).replace("\u2212", "-")
    head, hashes, tail = text.rpartition("####")
    found = NUMBER.match(tail.strip()) if hashes else None
    if found is None and not strict:
        found = (NUMBER.findall(head + tail) or [None])[-1]
    else:
        found = found and found[0]
    return found and plain(Decimal(re.sub("[$,]", "", found)))


def plain(number: Decimal) -> str:
    """18.0 -> "18", -0 -> "0"; exact for any number of digits."""
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def score(completion: str, example: Example) -> bool:
    """Whether the final number (flexible) equals the gold one: `#### 18.0` is right for 18."""
    return extract(completion) is not None and extract(completion) == example.meta["gold"]


def has_format(completion: str) -> bool:
    """Whether the answer ends as GSM8K's do; fine-tuning mostly teaches this, so it is reported."""
    return extract(completion, strict=True) is not None
