"""Django: a description of one line of Python to that line (Oda et al., ASE 2015).

    Description: for every i in range of integers from 0 to length of result, not included,
    Code: for i in range ( len ( result ) ) :

The code is stored with blanks between its tokens. Rows come from a local folder (train, dev and
test.jsonl[.gz] with `anno` and `code`) or, without one, from the hub's `AhmedSSoliman/DJANGO`
(`nl` and `code`). The paper names its metric "ws-prefix match" and does not define it. Ours: with
all whitespace removed, the prediction begins with the gold line. So `len(x)` is right for
`len ( x )`, and a prediction that goes on after the line is right too. Exact match, printed beside
it by `extra_scores`, ignores whitespace and nothing else.

About one test pair in eight also occurs in train, word for word, and can be answered by copying.
Hence `extra_scores` splits the accuracy into seen and unseen pairs.
"""
import re

from tasks.common import Example, check_choice, ids_of, load_rows, rows_name

HUB_NAME = "AhmedSSoliman/DJANGO"
# the paper states 4 shots; the lengths are ours: 99 % of the gold lines have at most 60 tokens, and
# each pass reveals one
PROTOCOL = dict(n_shot=4, gen_length=64, block_length=64, steps=64)


def load(split: str, data_dir: str = "", variant: str = "") -> list[Example]:
    """Return the rows of train, validation (dev.jsonl) or test in file order.

    meta["in_train"] says whether train has the same pair; None if there is no train file.
    Raises ValueError or FileNotFoundError in one sentence if rows or their fields are missing.
    """
    check_choice("django", split, variant)
    pairs = read_pairs(split, data_dir)
    try:
        trained_on = set(pairs if split == "train" else read_pairs("train", data_dir))
    except FileNotFoundError:
        trained_on = None
    return to_examples(pairs, split, trained_on)


def read_pairs(split: str, data_dir: str) -> list[tuple[str, str]]:
    """Return (annotation, code) of each row, stripped: many have blanks at their ends."""
    name = "dev" if data_dir and split == "validation" else split
    pairs = []
    for number, row in enumerate(load_rows(name, data_dir, HUB_NAME), 1):
        pair = row.get("anno", row.get("nl")), row.get("code")
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise ValueError(f"{rows_name(name, data_dir, HUB_NAME)}, row {number}: 'anno' (or "
                             f"'nl') and 'code' must be texts")
        pairs.append((pair[0].strip(), pair[1].strip()))
    return pairs


def to_examples(pairs: list[tuple[str, str]], split: str, trained_on: set | None) -> list[Example]:
    examples = []
    ids = ids_of([f"{anno}\n{code}" for anno, code in pairs])
    for (anno, code), key in zip(pairs, ids):
        meta = {"id": f"django/{split}/{key}", "gold": code,
                "in_train": trained_on and (anno, code) in trained_on}
        examples.append(Example(prompt(anno), f" {code}", meta))
    return examples


def prompt(text: str) -> str:
    return f"Description: {text.strip()}\nCode:"


def extract(completion: str) -> str | None:
    """Return the predicted code, or None.

    That is the text before another `Description:`; within it the first code fence, if there is one;
    within that everything before the first blank line, without a leading `Code:` and without
    backticks around it. It may have several lines, as Python within brackets may.
    """
    text = completion.split("\nDescription:")[0]
    fenced = re.search(r"```[^\n`]*\n(.*?)```", text, re.S)
    text = re.sub(r"^```\w*[ \t\r]*$", "", fenced[1] if fenced else text, flags=re.M).strip()
    text = re.sub(r"^code:", "", text, flags=re.I).strip()
    return re.split(r"\n[ \t\r]*\n", text)[0].strip().strip("`").strip() or None


def without_whitespace(text: str) -> str:
    return "".join(text.split())


def score(completion: str, example: Example) -> bool:
    """Return whether the prediction begins with the gold line, whitespace aside."""
    prediction, gold = extract(completion) or "", without_whitespace(example.meta["gold"])
    return gold != "" and without_whitespace(prediction).startswith(gold)


def exact(completion: str, example: Example) -> bool:
    """Return whether the prediction is the gold line, whitespace aside."""
    prediction, gold = extract(completion) or "", without_whitespace(example.meta["gold"])
    return gold != "" and without_whitespace(prediction) == gold


def extra_scores(examples: list[Example], completions: list[str]) -> dict[str, float]:
    """Return the shares that are printed beside prefix match, in 0..1.

    seen_match and unseen_match are prefix match on the pairs that train has and on the others.
    in_train is the share of pairs that train has, which is the score of copying from train.
    """
    pairs = list(zip(completions, examples, strict=True))
    hits = {
        "exact_match": [exact(*pair) for pair in pairs],
        "unseen_match": [score(*pair) for pair in pairs if pair[1].meta["in_train"] is False],
        "seen_match": [score(*pair) for pair in pairs if pair[1].meta["in_train"]],
        "in_train": [e.meta["in_train"] for e in examples if e.meta["in_train"] is not None],
    }
    return {name: sum(rows) / len(rows) for name, rows in hits.items() if rows}
