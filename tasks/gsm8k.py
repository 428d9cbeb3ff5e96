"""GSM8K: grade-school word problems with worked answers that end in `#### 42` (arXiv 2110.14168).

Rows come from a local folder (train.jsonl[.gz], test.jsonl[.gz] with `question` and `answer`) or,
without one, from the hub's `openai/gsm8k`. There is no official validation split: ours is the last
256 train rows, which are never trained on. The choice of extraction rule is worth several points on
the same texts, so the two in common use are spelled out in `extract`.
"""
import re
from decimal import Decimal

from tasks.common import Example, check_choice, hash_of, hold_out, load_rows, question_prompt

MARKS = re.compile(r"<<.*?>>")          # calculator annotations: 3*4=<<3*4=12>>12
# A sign belongs to its number unless it stands between two numbers: `10-3` ends in 3.
NUMBER = re.compile(r"(?:(?<![0-9.)])-)?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
VARIANTS = {"marks": "keeps <<...>> in the answers"}

# the paper states 4 shots in its main table and 0 in an appendix; 128 steps and 256 tokens in one
# block are those of the public reproduction
PROTOCOL = dict(n_shot=4, gen_length=256, block_length=256, steps=128)


def load(split: str, data_dir: str = "", variant: str = "") -> list[Example]:
    """Return train, validation or test in file order; variant "marks" keeps <<...>> in answers.

    Raises ValueError or FileNotFoundError in one sentence if rows or their fields are missing.
    """
    check_choice("gsm8k", split, variant, variants=VARIANTS)
    source = "test" if split == "test" else "train"
    rows = load_rows(source, data_dir, "openai/gsm8k", "main")
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(key), str) for key in ("question", "answer")):
            raise ValueError(f"gsm8k {source}, row {number}: 'question' and 'answer' must be texts")
    if source == "train":
        rows = hold_out("gsm8k", rows, split)
    return [to_example(row, variant == "marks") for row in rows]


def to_example(row: dict, keep_marks: bool = False) -> Example:
    """Make the Example of a row; its id is a hash of the question."""
    answer = row["answer"] if keep_marks else MARKS.sub("", row["answer"])
    meta = {"id": f"gsm8k/{hash_of(row['question'])}", "gold": extract(answer, strict=True)}
    return Example(question_prompt(row["question"].strip()), " " + answer.strip(), meta)


def extract(completion: str, strict: bool = False) -> str | None:
    """Return the final number as plain digits ("1234", "-3", "5"), or None.

    strict: the number after the last `####`. Flexible, the headline: that number, or else the last
    one anywhere outside <<...>>. Text after another `Question:` is ignored.
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
    """Return whether the final number (flexible) equals the gold one: `#### 18.0` is 18."""
    return extract(completion) is not None and extract(completion) == example.meta["gold"]


def has_format(completion: str) -> bool:
    """Return whether the answer ends as GSM8K's do, which fine-tuning mostly teaches."""
    return extract(completion, strict=True) is not None
