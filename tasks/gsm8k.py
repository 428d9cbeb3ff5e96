r"""GSM8K: grade-school word problems with worked answers that end in `#### 42` (arXiv 2110.14168).

Rows come from a local folder (train.jsonl[.gz], test.jsonl[.gz] with `question` and `answer`) or,
without one, from the hub's `openai/gsm8k`. There is no official validation split: ours is the last
256 train rows, which are never trained on. A row without a number behind `####` is an error, for
it would be a question that no answer gets right.

The choice of extraction rule is worth several points on the same texts, so the two in common use
are spelled out in `extract`. Both read

    1,234   1{,}234   1\,234   1 234 (any blank)   $1,234   -$5   1.8e3   18%   full-width digits
    #### 3*6=18   as 18, what a sum comes to          #### 3/4   as 0.75; nothing else is worked out
    #### 6:30     as 6, the first; without #### the last: 3,4 is 4, and 10-3 is 3

A plain blank groups too: "5 100 dollar bills" is 5100. A minus sign may be a hyphen, an en dash or
U+2212. The first `####` counts: what follows its number is another problem, whatever its heading.
The text ends at the heading of a second problem, such as `Q:`, also before any `####`.
"""
import re
from decimal import Decimal

from tasks.common import (Example, check_choice, hash_of, hold_out, load_rows, question_prompt,
                          rows_name)

MARKS = re.compile(r"<<[^<>\n]*>>")     # calculator annotations: 3*4=<<3*4=12>>12
# Of these texts each takes time in proportion to its length, whatever a model has written.
HEADING = re.compile(r"""Question:
    | ^[ \t#*>]* (?: (?i:question|problem) [ \t*]* (?:\#?[0-9]+[ \t*]*)? | Q[ \t*]* ) :
    | ^[ \t*>]* \#+ [ \t*]* (?i:question|problem|exercise|instruction)\b""", re.M | re.X)
# digits with separators between them, which join_thousands cuts into numbers
GROUPED = re.compile(r"""(?<![0-9.])
    [0-9]+ (?: (?: , | \{\\?,\} | \\[,:; ] | ,\\! | [ \u00a0\u2007\u2009\u202f]) [0-9]+ )+""",
                     re.X)
# `3*6=`: from its first number to its last equals sign
SUM = re.compile(r"""(?<![-+*/×÷0-9.,$()\ ])
    [ ($]* -? [0-9] [0-9.,]* [) ]* [-+*/×÷] [-+*/×÷0-9.,$() ]* =""", re.X)
# A sign belongs to its number unless it stands between two numbers: `10-3` ends in 3.
NUMBER = re.compile(r"(?:(?<![0-9.)])-)?(?:[$€£¥] ?-?)?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
                    r"(?:[eE][-+]?[0-9]{1,2}(?![0-9A-Za-z]))?")
BOX = re.compile(r"\\boxed\{([^}\n]*)")
DIVISOR = re.compile("/(0*[1-9][0-9]*)")
SAME = str.maketrans("０１２３４５６７８９．，＄＃－\u2212\u2010\u2011\u2013",
                     "0123456789.,$#-----")
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
    name = rows_name(source, data_dir, "openai/gsm8k")
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(key), str) for key in ("question", "answer")):
            raise ValueError(f"{name}, row {number}: 'question' and 'answer' must be texts")
    bad = [n for n, row in enumerate(rows, 1) if gold(row) is None]
    if bad:
        raise ValueError(f"{name}, row {bad[0]}: the answer must end in `#### ` and a number; in "
                         f"{len(bad)} of {len(rows)} rows it does not")
    if source == "train":
        rows = hold_out("gsm8k", rows, split)
    return [to_example(row, variant == "marks") for row in rows]


def gold(row: dict) -> str | None:
    return final_number(unmarked(row["answer"]), strict=True)


def to_example(row: dict, keep_marks: bool = False) -> Example:
    """Make the Example of a row; its id is a hash of the question."""
    answer = row["answer"] if keep_marks else MARKS.sub("", row["answer"])
    meta = {"id": f"gsm8k/{hash_of(row['question'])}", "gold": gold(row)}
    return Example(prompt(row["question"]), " " + answer.strip(), meta)


def prompt(text: str) -> str:
    return question_prompt(text.strip())


def extract(completion: str, strict: bool = False) -> str | None:
    """Return the final number as plain digits ("1234", "-3", "5"), or None.

    strict: the number right behind the first `####`. Flexible, the headline: that number, or else
    the first on its line, in a \\boxed{...}, or else the last before `####`, or else the last.
    """
    text = unmarked(completion)
    number = re.search("[0-9]", text)
    heading = number and HEADING.search(text, number.end())     # of a second problem
    return final_number(text[:heading.start()] if heading else text, strict)


def unmarked(text: str) -> str:
    """Drop calculator marks and write digits, signs and grouped thousands in one way."""
    text = MARKS.sub("", text).translate(SAME).replace("\\$", "$")
    return GROUPED.sub(join_thousands, text)


def join_thousands(run: re.Match) -> str:
    """Join each number of a run: groups of 2 or 3 digits after commas, or of 3 after blanks and the
    like, as far as the last one of 3."""
    parts = re.split("([^0-9]+)", run[0])       # group, separator, group, ...
    joined, i = [], 0
    while i < len(parts):
        by_comma, end, last = parts[i + 1:i + 2] == [","], i, i
        sizes = (2, 3) if by_comma else (3,) if len(parts[i]) <= 3 else ()
        while (end + 2 < len(parts) and (parts[end + 1] == ",") == by_comma
               and len(parts[end + 2]) in sizes):
            end += 2
            last = end if len(parts[end]) == 3 else last
        if last > i:
            joined += [*parts[i:last + 1:2], *parts[last + 1:last + 2]]
            i = last + 2
        else:                           # no start within this stretch has more luck
            joined += parts[i:max(end, i + 2)]
            i = max(end, i + 2)
    return "".join(joined)


def final_number(text: str, strict: bool) -> str | None:
    """Return the final number of an unmarked text, which `extract` describes."""
    head, _, tail = text.partition("####")
    found = NUMBER.match(SUM.sub("", tail.lstrip("# \t\r\n").partition("\n")[0]).lstrip())
    if found is None and not strict:
        line = SUM.sub("", tail.partition("\n")[0])
        box = "".join(BOX.findall(text)[:1])
        found = (NUMBER.search(line) or NUMBER.search(SUM.sub("", box)) or last_number(head)
                 or last_number(tail))
    if found is None:
        return None
    number = Decimal(re.sub("[$€£¥ ]", "", found[0]))
    divisor = DIVISOR.match(found.string, found.end())
    return plain(number / Decimal(divisor[1]) if divisor else number)


def last_number(text: str):
    found = None
    for found in NUMBER.finditer(text):
        pass
    return found


def plain(number: Decimal) -> str:
    """18.0 -> "18", -0 -> "0"; exact for any number of digits."""
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def score(completion: str, example: Example) -> bool:
    """Return whether the final number (flexible) equals the gold one: `#### 18.0` is 18."""
    return extract(completion) == example.meta["gold"]


def has_format(completion: str) -> bool:
    """Return whether the answer ends as GSM8K's do, which fine-tuning mostly teaches."""
    return extract(completion, strict=True) is not None
