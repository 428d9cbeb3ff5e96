"""What the tiny base model knows before it is tuned: to read a short story, and to calculate.

    Story: Anna has 3 apples and buys 4 more.      Sum: 12-2=10
    Sum: 3+4

It has never seen a question, a result behind a story, two steps, or an answer line; fine-tuning on
tasks/toy.py has to teach these. The held-out loss on this corpus afterwards says what tuning forgot.
"""
import random

from tasks import toy
from tasks.common import Example


def load(split: str, data_dir: str = "", keep_marks: bool = False, n: int = 0) -> list[Example]:
    """n rows of a split, half stories and half sums; the stories are those of the split's own questions."""
    n = n or (20_000 if split == "train" else 1_000)
    rng = random.Random(f"toy_base {split}")
    examples = []
    for story, _, steps in toy.problems(split, n):
        if len(steps) == 1:
            sides = steps[0].split("=")
            examples.append(("Story: " + story + "\nSum:", " " + sides[0]))
        else:
            examples.append(("Sum:", " " + rng.choice(steps)))
    return [Example(prompt, answer, {"id": f"toy_base/{split}/{i}", "gold": answer.strip()})
            for i, (prompt, answer) in enumerate(examples)]


def extract(completion: str) -> str:
    return completion.strip()


def score(completion: str, example: Example) -> bool:
    """The very sum: of use after a story, where there is one right answer."""
    return extract(completion) == example.meta["gold"]
