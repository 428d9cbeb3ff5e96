"""A mixture of tasks: the rows of several, in one order that does not depend on their sizes.

    --task=mixture --variant=nl_rx,django --data_dir=folder

Each task is loaded from the folder of its name in data_dir (nl_rx also from nl_rx_synth), or from
its own place without one, which the toys need. It asks, answers and scores as it does alone. A
batch has the tasks in proportion to their rows. `extra_scores` gives the accuracy of each.
"""
from collections import defaultdict
from pathlib import Path

from tasks.common import Example, check_choice, hash_of, load_task

TASKS = "gsm8k,nl_rx,django"        # without a variant
PROTOCOL = dict(n_shot=0, gen_length=64, block_length=64, steps=64)     # ours


def load(split: str, data_dir: str = "", variant: str = "") -> list[Example]:
    """Return the rows of all tasks, ordered by a hash of their ids. meta["task"] names the task.

    Raises ValueError or FileNotFoundError in one sentence.
    """
    check_choice("mixture", split)
    names = (variant or TASKS).split(",")
    if len(set(names)) < len(names) or "mixture" in names:
        raise ValueError(f"variant={variant!r} of a mixture must name different tasks, such as "
                         f"{TASKS}")
    rows = [example._replace(meta={**example.meta, "task": name}) for name in names
            for example in load_task(name).load(split, folder_of(name, data_dir), "")]
    return sorted(rows, key=lambda example: hash_of(example.meta["id"]))


def folder_of(name: str, data_dir: str) -> str:
    """Return data_dir/{name}, or else the one folder data_dir/{name}_*; "" without data_dir."""
    load_task(name)                     # raises for an unknown task
    if not data_dir:
        return ""
    if Path(data_dir, name).is_dir():
        return str(Path(data_dir, name))
    found = [path for path in sorted(Path(data_dir).glob(f"{name}_*")) if path.is_dir()]
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{data_dir} must hold a folder {name}, or one {name}_*; there is "
                                f"{there}")
    return str(found[0])


def extract(completion: str) -> str | None:
    """Return the text; each task has its own way to find the answer in it."""
    return completion.strip() or None


def score(completion: str, example: Example) -> bool:
    return load_task(example.meta["task"]).score(completion, example)


def extra_scores(examples: list[Example], completions: list[str]) -> dict[str, float]:
    """Return the share of right answers of each task."""
    verdicts = defaultdict(list)
    for example, completion in zip(examples, completions, strict=True):
        verdicts[example.meta["task"]].append(score(completion, example))
    return {name: sum(right) / len(right) for name, right in verdicts.items()}
