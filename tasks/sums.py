"""The tiny base model's corpus: plain arithmetic without a word problem in it.

    Sums: 3*4=12
    12-2=10

A base trained on it can calculate but has never seen a question or an answer line; fine-tuning has to
teach these, and the held-out loss on this corpus afterwards says what fine-tuning forgot.
"""
import random
import zlib

from tasks.common import Example

SHARE_OF_SPLIT = {"train": range(0, 90), "validation": range(90, 95), "test": range(95, 100)}


def load(split: str, data_dir: str = "", n: int = 0) -> list[Example]:
    """The first n rows of a split; a row belongs to one split by its hash. Default 40,000 or 1,000."""
    if split not in SHARE_OF_SPLIT:
        raise ValueError(f"sums has no split {split!r}; choose from {', '.join(SHARE_OF_SPLIT)}")
    n = n or (40_000 if split == "train" else 1_000)
    rng = random.Random(f"sums {split}")
    examples, seen = [], set()
    while len(examples) < n:
        text = draw_sum(rng) + "\n" + draw_sum(rng)
        if text not in seen and zlib.crc32(text.encode()) % 100 in SHARE_OF_SPLIT[split]:
            seen.add(text)
            examples.append(Example("Sums:", " " + text, {"id": f"sums/{split}/{len(examples)}"}))
    return examples


def draw_sum(rng: random.Random) -> str:
    """One equation over whole numbers with a result in 1..99, the kinds equally often."""
    while True:
        a, b, op = rng.randint(1, 99), rng.randint(2, 10), rng.choice("+-*/")
        if op == "/":
            a *= b
        if op == "*":
            a = rng.randint(2, 20)
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]
        if a < 100 and 0 < result < 100:
            return f"{a}{op}{b}={result}"


def score(completion: str, example: Example) -> bool:
    """All equations hold: there is no one right answer to an empty question."""
    lines = completion.strip().split("\n")
    return len(lines) == 2 and all(holds(line) for line in lines)


def holds(equation: str) -> bool:
    for op in "+-*/":
        left, _, right = equation.partition(op)
        b, _, result = right.partition("=")
        if left.isdigit() and b.isdigit() and result.isdigit():
            a, b, result = int(left), int(b), int(result)
            return {"+": a + b == result, "-": a - b == result, "*": a * b == result,
                    "/": a == b * result}[op]
    return False
