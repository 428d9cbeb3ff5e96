"""The toy: word problems in GSM8K's format that a small model learns on a laptop in minutes.

    Question: Anna has 3 boxes with 4 apples in each and eats 2. How many apples are left?
    Answer: 3*4=12
    12-2=10
    #### 10

About half of the problems take one step, half take two. Every number is below 100 and is one token
of the toy vocabulary (pretrained/tokenizer.py). The hash of a question decides whether it belongs
to train, validation or test, so the three never share a question. They do share the arithmetic.
"""
import random
import zlib

from tasks.common import Example, check_choice
from tasks.gsm8k import extract, has_format, prompt, score  # its formats, its metric

NAMES = "Anna Ben Carl Dora Emma Finn Gina Hugo Ida Jack Kim Leo".split()
LARGEST = 7             # numbers in a story are drawn from 2 .. LARGEST
PROTOCOL = dict(n_shot=0, gen_length=16, block_length=16, steps=16)     # ours; answers fit
THINGS = "apples books cards coins eggs nuts pens shells stamps stones".split()

# (story, question, steps); in the steps, `1` is the result of step one
ONE_STEP = [
    ("{n} has {a} {o} and buys {b} more.", "How many {o} does {n} have?", "a+b"),
    ("{n} has {a} {o} and {m} has {b}.", "How many {o} do they have together?", "a+b"),
    ("{n} had {a} {o} and gave {b} to {m}.", "How many {o} are left?", "a-b"),
    ("{n} had {a} {o} and lost {b}.", "How many {o} does {n} have now?", "a-b"),
    ("{n} has {a} {o} and {m} has {b} fewer.", "How many {o} does {m} have?", "a-b"),
    ("{n} has {a} boxes with {b} {o} in each.", "How many {o} does {n} have?", "a*b"),
    ("{n} sells {a} {o} for {b} dollars each.", "How many dollars does {n} get?", "a*b"),
    ("{n} puts {a} {o} into {b} equal bags.", "How many {o} are in each bag?", "a/b"),
    ("{n} and {m} share {a} {o} equally.", "How many {o} does {m} get?", "a/2"),
]
TWO_STEPS = [
    ("{n} has {a} {o}, buys {b} more and gives {c} to {m}.", "How many {o} are left?", "a+b 1-c"),
    ("{n} has {a} boxes with {b} {o} in each and finds {c} more.", "How many {o} does {n} have?",
     "a*b 1+c"),
    ("{n} has {a} boxes with {b} {o} in each and eats {c}.", "How many {o} are left?", "a*b 1-c"),
    ("{n} has {a} {o}, {m} has {b} and they share equally.", "How many {o} does {m} get?",
     "a+b 1/2"),
]
SHARE_OF_SPLIT = {"train": range(0, 90), "validation": range(90, 95), "test": range(95, 100)}


def load(split: str, data_dir: str = "", variant: str = "", n: int = 0) -> list[Example]:
    """Return the first n problems of a split, always the same; by default 40,000 or 1,000.

    The problems are made here, so data_dir must be empty.
    """
    check_choice("toy", split, variant, data_dir=data_dir)
    examples = []
    for story, question, steps in problems(split, n or (40_000 if split == "train" else 1_000)):
        result = steps[-1].split("=")[1]
        answer = " " + "\n".join(steps) + f"\n#### {result}"
        meta = {"id": f"toy/{split}/{len(examples)}", "gold": result}
        examples.append(Example(prompt(f"{story} {question}"), answer, meta))
    return examples


def problems(split: str, n: int) -> list[tuple[str, str, list[str]]]:
    """Draw n different (story, question, steps) of a split, always the same."""
    rng = random.Random(f"toy {split}")
    found, seen = [], set()
    while len(found) < n:
        story, question, steps = draw_problem(rng)
        bucket = zlib.crc32(f"{story} {question}".encode()) % 100
        if story not in seen and bucket in SHARE_OF_SPLIT[split]:
            seen.add(story)
            found.append((story, question, steps))
    return found


def draw_problem(rng: random.Random) -> tuple[str, str, list[str]]:
    """Draw a problem, and its numbers again until every result is a whole number in 1..99."""
    story, question, plan = rng.choice(ONE_STEP if rng.random() < 0.5 else TWO_STEPS)
    n, m = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    steps = []
    while not steps:
        numbers = {name: rng.randint(2, LARGEST) for name in "abc"} | {"2": 2}
        if plan.startswith("a/"):           # make `a` a multiple of its divisor
            numbers["a"] *= numbers[plan[2]]
        steps = work_out(plan, numbers)
    fill = dict(n=n, m=m, o=thing, **numbers)
    return story.format(**fill), question.format(**fill), steps


def work_out(plan: str, numbers: dict) -> list[str]:
    """Return ["3*4=12", "12-2=10"], or [] if a result is not a whole number in 1..99."""
    steps = []
    for left, op, right in plan.split():
        x, y = z if left == "1" else numbers[left], numbers[right]
        z = {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[op]
        if z != int(z) or not 0 < z < 100:
            return []
        z = int(z)
        steps.append(f"{x}{op}{y}={z}")
    return steps


def all_texts() -> list[str]:
    """Return texts that hold every word of every problem; the toy vocabulary is built from them."""
    return [f"{story} {question}".format(n=n, m=n, o=thing, a=1, b=1, c=1)
            for story, question, _ in ONE_STEP + TWO_STEPS for n in NAMES for thing in THINGS]
