"""The toy's base corpus: the tiny base model learns to read a short story and to calculate.

    Story: Anna has 3 apples and buys 4 more.      Sums: 12-2=10
    Sum: 3+4                                       5*7=35
                                                   48/2=24

The corpus has no question, no result after a story, no second step and no answer line. Fine-tuning
on tasks/toy.py has to teach these. The held-out loss on this corpus afterwards shows what tuning
forgot.
"""
import random

from tasks import toy
from tasks.common import Example, check_choice

PROTOCOL = dict(n_shot=0, gen_length=24, block_length=24, steps=24)     # ours; answers fit


def load(split: str, data_dir: str = "", variant: str = "", n: int = 0) -> list[Example]:
    """Return n rows of a split, half stories and half sums, from the split's own toy problems."""
    check_choice("toy_base", split, variant, data_dir=data_dir)
    n = n or (20_000 if split == "train" else 1_000)
    rng = random.Random(f"toy_base {split}")
    problems = toy.problems(split, n)
    sums = [rng.choice(steps) for _, _, steps in problems]
    examples = []
    for i, (story, _, steps) in enumerate(problems):
        if len(steps) == 1:
            text, answer = story, steps[0].split("=")[0]
        else:
            text, answer = "", "\n".join(rng.sample(sums, 3))
        meta = {"id": f"toy_base/{split}/{i}", "gold": answer}
        examples.append(Example(prompt(text), " " + answer, meta))
    return examples


def prompt(text: str) -> str:
    """Return the prompt of a story; of no text, that of sums alone."""
    return f"Story: {text.strip()}\nSum:" if text else "Sums:"


def extract(completion: str) -> str:
    return completion.strip()


def score(completion: str, example: Example) -> bool:
    """Return whether it is the very sum. Only after a story is there one right answer."""
    return extract(completion) == example.meta["gold"]
