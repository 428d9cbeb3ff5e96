"""Read what the runs of a study have left on file, as pandas frames for tables and figures.

results.jsonl (grid.py) has a line a score, log.jsonl (train.py) the losses of a run, probe.json
(probe.py) drift and forgetting of checkpoints, summary.json (preserve.py) Wikitext and MMLU.
"""
import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from analysis.arms import rank_of
from tasks.files import read_json

KEYS = ["config", "arm", "lambda", "depth", "seed", "split", "n_shot"]      # identify a result
ABOUT = ["run", "config", "arm", "seed", "step"]    # of a line of a log or of a probe


def key_of(line: dict) -> tuple:
    return tuple(line[key] for key in KEYS)


def whole_lines(path) -> list[bytes]:
    """Return the lines of a file; a last one that is not ended yet, or by a kill, is left out."""
    return Path(path).read_bytes().split(b"\n")[:-1]


def read_results(paths) -> list[dict]:
    """Read results.jsonl files; the paths of answers in them start at the file's folder.

    Raises FileNotFoundError, or ValueError naming a line that is not a result or is there twice.
    """
    lines = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}; analysis/grid.py writes one")
        for number, text in enumerate(whole_lines(path), 1):
            try:
                line = json.loads(text)
                key, accuracy = key_of(line), line["metrics"]["accuracy"]
                line["answers"] = str(Path(path).parent / line["answers"])
                if key in lines or not 0 <= accuracy <= 1:
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}, is not a result, or is one for the "
                                 f"second time") from None
            lines[key] = line
    return list(lines.values())


def frame_of(lines: list[dict]) -> pd.DataFrame:
    """Make one row a result: accuracy in %, and held-out losses after training.

    The task's losses are those at the least and the greatest masking rate. On the other corpus
    (forget_task) it is the mean over rates, and `forgetting` is how much that has grown.
    """
    names = [*KEYS, "task", "t_ctx", "t_tgt", "init_from", "answers", "command", "revision"]
    numbers = ["accuracy", "low_t", "high_t", "other", "forgetting"]
    rows = []
    for line in lines:
        row = {name: line.get(name) for name in names}
        row["n"], row["accuracy"] = line["metrics"]["n"], 100 * line["metrics"]["accuracy"]
        row["run"] = run_of(Path(line["answers"]).parent)
        own, other, *_ = *line.get("held_out", {}).values(), {}, {}
        if own:
            row["low_t"] = own[min(own, key=float)][1]
            row["high_t"] = own[max(own, key=float)][1]
        if other:
            row["other"] = statistics.mean(after for _, after in other.values())
            grown = [after - before for before, after in other.values()]
            row["forgetting"] = statistics.mean(grown)
        rows.append(row)
    frame = pd.DataFrame(rows, columns=[*names, "run", "n", *numbers], dtype=object)
    return frame.astype(dict.fromkeys(numbers, float))


# ----------------------------------------------------------------------------------------------
# which (lambda, depth)


def choose(results: pd.DataFrame, config: str):
    """Return JEPA's (lambda, depth) of the best mean accuracy on validation, or None without any.

    The mean is over the seeds and numbers of shots that all pairs have; of equals the smallest.
    """
    jepa = results[(results["config"] == config) & (results["arm"] == "jepa")
                   & (results["split"] == "validation")]
    scores = jepa.pivot_table(index=["lambda", "depth"], columns=["seed", "n_shot"],
                              values="accuracy").dropna(axis=1)
    return None if scores.empty else scores.mean(axis=1).round(7).idxmax()


def at_chosen(results: pd.DataFrame) -> pd.DataFrame:
    """Keep of every arm the results at JEPA's chosen (lambda, depth), or at the nearest it has.

    An arm with several pairs is left out if none was chosen.
    """
    kept = [results.head(0)]
    for (config, arm), own in results.groupby(["config", "arm"], sort=False):
        chosen, pairs = choose(results, config), pairs_of(own)
        if chosen:
            pairs.sort(key=lambda pair: (pair[0] != chosen[0]) + (pair[1] != chosen[1]))
        if chosen or len(pairs) == 1:
            weight, depth = pairs[0]
            kept.append(own[(own["lambda"] == weight) & (own["depth"] == depth)])
    return pd.concat(kept)


def pairs_of(results: pd.DataFrame) -> list[tuple]:
    return sorted(set(zip(results["lambda"], results["depth"])))


# ----------------------------------------------------------------------------------------------
# all logs of a study


class Study(NamedTuple):
    """All logs. A `run` is one training, `config` the folder that has it and its like."""
    log: pd.DataFrame           # a row a line of a log.jsonl: its run, its losses
    probed: pd.DataFrame        # a row a tuned checkpoint in a probe.json, with its numbers
    results: pd.DataFrame       # a row a score at the chosen (lambda, depth), see frame_of
    summaries: list[dict]       # of preserve.py


def read_study(inputs, arms=()) -> Study:
    """Read the logs of these arms, or of all, from files or folders.

    Raises ValueError or FileNotFoundError, one sentence, if there are none or one is broken.
    """
    found = []
    for given in map(Path, inputs):
        if not given.exists():
            raise FileNotFoundError(f"there is no file or folder {given}")
        found += sorted(given.rglob("*.json*")) if given.is_dir() else [given]
    paths = {name: dict.fromkeys(path for path in found if path.name == name)
             for name in ("log.jsonl", "probe.json", "summary.json", "results.jsonl")}

    results = at_chosen(frame_of(read_results(paths["results.jsonl"])))
    log = [row for path in paths["log.jsonl"] for row in rows_of_log(path)]
    probed = [row for path in paths["probe.json"] for row in rows_of_probe(path)]
    summaries = [read_json(path) for path in paths["summary.json"]]
    summaries = [each for each in summaries if "models" in each]    # train.py's has none
    frames = [pd.DataFrame(rows, columns=None if rows else ABOUT) for rows in (log, probed)]
    frames.append(results)
    if all(frame.empty for frame in frames) and not summaries:
        raise ValueError(f"there are no logs in {', '.join(inputs) or 'no inputs'}; --inputs takes "
                         f"folders of runs, or log.jsonl, probe.json, summary.json, results.jsonl")
    there = set().union(*(frame["arm"] for frame in frames))
    for arm in arms:
        if arm not in there:
            raise ValueError(f"there is no arm {arm!r} in the inputs, which have "
                             f"{', '.join(sorted(there))}")
    if arms:
        frames = [frame[frame["arm"].isin(arms)] for frame in frames]
    return Study(*frames, summaries)


def rows_of_log(path: Path) -> list[dict]:
    """Make a row of each line of a log: its step, its losses, held-out ones as means over t."""
    about, rows = about_run(path.resolve().parent), []
    try:
        for line in map(json.loads, whole_lines(path)):
            row = {**about, "step": line["step"]}
            row |= {key: line.get(key) for key in ("diffusion", "jepa", "jepa_floor")}
            for task, by_t in line.get("held_out", {}).items():
                row[f"held-out {task}"] = statistics.mean(by_t.values())
            rows.append(row)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not lines of train.py's log: {error}") from None
    return rows


def rows_of_probe(path: Path) -> list[dict]:
    """Make a row of each tuned checkpoint: its numbers, its run, and which texts were read."""
    probe = read_json(path)
    texts = f"{probe['n']} texts of {probe['settings']['text']}, {probe['tokens']:,} tokens"
    rows = []
    for name, numbers in probe["models"].items():
        if name != probe["settings"]["base"]:
            step = (numbers.get("trained") or {}).get("step", 0)
            rows.append({**numbers, **about_run(name), "step": step, "depths": probe["depths"],
                         "texts": texts})
    return rows


def about_run(path) -> dict:
    """Identify a run by its folder, such as tiny_study/jepa_lambda1.0_depth2_seed42 of grid.py."""
    config, _, name = run_of(path).rpartition("/")
    named = re.fullmatch(r"(.+?)(?:_lambda[^_]+_depth\d+)?(?:_seed(\d+))?", name, re.S)
    arm, seed = named.groups()
    return {"run": run_of(path), "config": config, "arm": arm, "seed": seed}


def run_of(path) -> str:
    """Return the last two folders of a run or of a checkpoint in it."""
    path = Path(path)
    path = path.parent if re.fullmatch(r"step_\d+", path.name) else path
    return "/".join(path.parts[-2:])


def by_arm(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort the rows by arm, in the order of ARMS."""
    return frame.sort_values("arm", key=lambda arms: arms.map(rank_of), kind="stable")


def last_of_each(probed: pd.DataFrame) -> pd.DataFrame:
    """Keep the last checkpoint of each run: several of one training are not independent."""
    last = probed.sort_values("step", kind="stable").drop_duplicates("run", keep="last")
    return last.sort_index()
