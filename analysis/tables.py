"""The paper's tables with our numbers beside, from what analysis/grid.py has put on file.

    python analysis/tables.py --results=out/grid/results.jsonl --out=tables.md
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # a script in a folder: the modules lie one above

KEYS = ("config", "arm", "lambda", "depth", "seed", "split", "n_shot")      # name a line


def key_of(line: dict) -> tuple:
    return tuple(line[key] for key in KEYS)


def read_results(path) -> list[dict]:
    """The lines of a results.jsonl, a last one that a kill has cut short left out.

    Raises FileNotFoundError, or ValueError naming a line that is no result or is there twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; analysis/grid.py makes one")
    lines = {}
    for number, text in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            if key_of(line) in lines or not 0 <= line["metrics"]["accuracy"] <= 1:
                raise ValueError
            lines[key_of(line)] = line
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}, line {number}, is no result, or is one for the second "
                             f"time") from None
    return list(lines.values())


def choose(lines: list[dict], config: str):
    """(lambda, depth) of jepa with the best mean accuracy on validation, or None without any.

    Over the seeds and numbers of shots that all pairs have; of equals the smallest.
    """
    scores = {}
    for line in lines:
        if (line["config"], line["arm"], line["split"]) == (config, "jepa", "validation"):
            pair = scores.setdefault((line["lambda"], line["depth"]), {})
            pair[line["seed"], line["n_shot"]] = line["metrics"]["accuracy"]
    common = set.intersection(*map(set, scores.values())) if scores else ()
    if not common:
        return None
    means = {pair: sum(by[key] for key in common) / len(common) for pair, by in scores.items()}
    return min(means, key=lambda pair: (-round(means[pair], 12), pair))


def render(lines: list[dict], folder="") -> str:
    return f"{len(lines)} lines"
