"""What the tiny base model knows before it is tuned: to read a short story, and to calculate.

    Story: Anna has 3 apples and buys 4 more.      Sums: 12-2=10
    Sum: 3+4                                       5*7=35
                                                   48/2=24

It has never seen a question, a result behind a story, a second step, or an answer line;
fine-tuning on tasks/toy.py has to teach these. The held-out loss on this corpus afterwards says
what tuning forgot.
"""
import random

from tasks import toy
from tasks.common import Example

PROTOCOL = dict(n_shot=0, gen_length=24, block_length=24, steps=24)     # ours; answers fit


def load(split: str, data_dir: str = "", variant: str = "", n: int = 0) -> list[Example]:
    """n rows of a split, about half stories, half sums, all from the split's own toy problems."""
    n = n or (20_000 if split == "train" else 1_000)
    rng = random.Random(f"toy_base {split}")
    problems = toy.problems(split, n)
    sums = [rng.choice(steps) for _, _, steps in problems]
    examples = []
    for i, (story, _, steps) in enumerate(problems):
        if len(steps) == 1:
            prompt, answer = f"Story: {story}\nSum:", steps[0].split("=")[0]
        else:
            prompt, answer = "Sums:", "\n".join(rng.sample(sums, 3))
        examples.append(Example(prompt, " " + answer,
                                {"id": f"toy_base/{split}/{i}", "gold": answer}))
    return examples


def extract(completion: str) -> str:
    return completion.strip()


def score(completion: str, example: Example) -> bool:
    """The very sum: of use after a story, where there is one right answer."""
    return extract(completion) == example.meta["gold"]
