"""Word problems in GSM8K's format, small enough to be learnt on a laptop in minutes.

    Question: Anna has 3 boxes with 4 apples in each and eats 2. How many apples are left?
    Answer: 3*4=12
    12-2=10
    #### 10

Half of the problems take one step, half take two. Every number is below 100 and is one token of the
toy vocabulary (tasks/tokenizer.py). A question belongs to train, validation or test by its own hash, so
the three can never share one, whatever is asked for; the arithmetic facts below them are shared.
"""
import random
import zlib

from tasks.common import Example, question_prompt
from tasks.gsm8k import score                  # the answer format is GSM8K's, so is the metric

NAMES = "Anna Ben Carl Dora Emma Finn Gina Hugo Ida Jack Kim Leo".split()
THINGS = "apples books cards coins eggs nuts pens shells stamps stones".split()

# a question, and its steps; a step is (operand, operator, operand), `1` is the result of step one
PROBLEMS_ONE_STEP = [
    ("{n} has {a} {o} and buys {b} more. How many {o} does {n} have?", "a+b"),
    ("{n} has {a} {o} and {m} has {b}. How many {o} do they have together?", "a+b"),
    ("{n} had {a} {o} and gave {b} to {m}. How many {o} are left?", "a-b"),
    ("{n} had {a} {o} and lost {b}. How many {o} does {n} have now?", "a-b"),
    ("{n} has {a} {o} and {m} has {b} fewer. How many {o} does {m} have?", "a-b"),
    ("{n} has {a} boxes with {b} {o} in each. How many {o} does {n} have?", "a*b"),
    ("{n} sells {a} {o} for {b} dollars each. How many dollars does {n} get?", "a*b"),
    ("{n} puts {a} {o} into {b} equal bags. How many {o} are in each bag?", "a/b"),
    ("{n} and {m} share {a} {o} equally. How many {o} does {m} get?", "a/2"),
]
PROBLEMS_TWO_STEPS = [
    ("{n} has {a} {o}, buys {b} more and gives {c} to {m}. How many {o} are left?", "a+b 1-c"),
    ("{n} has {a} boxes with {b} {o} in each and finds {c} more. How many {o} does {n} have?", "a*b 1+c"),
    ("{n} has {a} boxes with {b} {o} in each and eats {c}. How many {o} are left?", "a*b 1-c"),
    ("{n} has {a} {o}, {m} has {b} and they share them equally. How many {o} does {m} get?", "a+b 1/2"),
]
SHARE_OF_SPLIT = {"train": range(0, 90), "validation": range(90, 95), "test": range(95, 100)}


def load(split: str, data_dir: str = "", n: int = 0) -> list[Example]:
    """The first n problems of a split, the same ones at every call; default 40,000 for train, else 1,000."""
    if split not in SHARE_OF_SPLIT:
        raise ValueError(f"toy has no split {split!r}; choose from {', '.join(SHARE_OF_SPLIT)}")
    n = n or (40_000 if split == "train" else 1_000)
    rng = random.Random(f"toy {split}")
    examples, seen = [], set()
    while len(examples) < n:
        question, answer = draw_problem(rng)
        if question not in seen and split_of(question) == split:
            seen.add(question)
            examples.append(Example(question_prompt(question), " " + answer,
                                    {"id": f"toy/{split}/{len(examples)}", "question": question}))
    return examples


def split_of(question: str) -> str:
    bucket = zlib.crc32(question.encode()) % 100
    return next(split for split, share in SHARE_OF_SPLIT.items() if bucket in share)


def draw_problem(rng: random.Random) -> tuple[str, str]:
    """One (question, answer); redraws the numbers until every result is a whole number below 100."""
    template, plan = rng.choice(PROBLEMS_ONE_STEP if rng.random() < 0.5 else PROBLEMS_TWO_STEPS)
    n, m = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    while True:
        numbers = {"a": rng.randint(2, 10), "b": rng.randint(2, 10), "c": rng.randint(2, 10), "2": 2}
        if "a/" in plan:                        # divide what divides: make `a` a multiple
            numbers["a"] *= numbers["b"] if plan == "a/b" else 2
        steps = work_out(plan, numbers)
        if steps:
            break
    answer = "\n".join(steps) + "\n#### " + steps[-1].split("=")[1]
    return template.format(n=n, m=m, o=thing, **numbers), answer


def work_out(plan: str, numbers: dict) -> list[str]:
    """["3*4=12", "12-2=10"], or [] if a result is negative, broken, zero or above 99."""
    steps, results = [], {}
    for left, op, right in plan.split():
        x, y = results.get(left, numbers.get(left)), numbers[right]
        z = {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[op]
        if z != int(z) or not 0 < z < 100:
            return []
        results["1"] = int(z)
        steps.append(f"{x}{op}{y}={int(z)}")
    return steps


def all_texts() -> list[str]:
    """Texts in which every word of every problem occurs: what the toy vocabulary is built from."""
    return [question_prompt(template.format(n=n, m=n, o=thing, a=1, b=1, c=1))
            for template, _ in PROBLEMS_ONE_STEP + PROBLEMS_TWO_STEPS for n in NAMES for thing in THINGS]
