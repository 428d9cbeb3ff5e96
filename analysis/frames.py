"""Read what the runs of a study have left on file, as pandas frames for tables and figures.

results.jsonl (grid.py) has a line a score, log.jsonl (train.py) the losses of a run, probe.json
(probe.py) drift, rank and forgetting of checkpoints, summary.json (preserve.py) Wikitext and MMLU.
"""
import json
import math
import re
import shlex
import statistics
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from analysis.arms import arm_of, rank_of
from tasks.files import read_json

KEYS = ["config", "arm", "lambda", "depth", "seed", "split", "n_shot"]      # name a result


def key_of(line: dict) -> tuple:
    return tuple(line[key] for key in KEYS)


def read_results(paths) -> list[dict]:
    """Read the lines of results.jsonl files; the paths of their answers start at the file's folder.

    A last line that a kill has cut short is left out. Raises FileNotFoundError, or ValueError
    naming a line that is no result or is there twice.
    """
    lines = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}; analysis/grid.py writes one")
        for number, text in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
            try:
                line = as_utf8(json.loads(text))
                answers, key = str(Path(path).parent / line["answers"]), key_of(line)
                share, n, _ = line["metrics"]["accuracy"], line["metrics"]["n"], line["init_from"]
                if key in lines or not 0 <= share <= 1 or min(n, line["lambda"], line["depth"]) < 0:
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path}, line {number}, is no result, or is one for the second "
                                 f"time") from None
            lines[key] = line | {"answers": answers}
    return list(lines.values())


def as_utf8(what):
    """Replace halves of surrogate pairs in JSON data: pandas and files cannot hold them."""
    return json.loads(json.dumps(what, ensure_ascii=False).encode("utf-8", "replace"))


def frame_of(lines: list[dict]) -> pd.DataFrame:
    """Make one row a result: accuracy in %, and the held-out losses after training.

    The task's losses are those at the least and the greatest masking rate; of the other corpus
    (forget_task) it is the mean over rates, and by how much that has grown.
    """
    names = [*KEYS, "task", "t_ctx", "t_tgt", "init_from", "answers", "command", "revision"]
    rows = []
    for line in lines:
        metrics, losses = line["metrics"], [*line.get("held_out", {}).values(), {}, {}]
        own, other = [[by_t[t] for t in sorted(by_t, key=float)] for by_t in losses[:2]]
        rows.append({
            **{name: line.get(name) for name in names}, "n": metrics["n"],
            "accuracy": 100 * metrics["accuracy"], "stderr": 100 * (metrics.get("stderr") or 0),
            "low_t": own[0][1] if own else math.nan, "high_t": own[-1][1] if own else math.nan,
            "other": mean_of([after for _, after in other]),
            "forgetting": mean_of([after - before for before, after in other])})
    numbers = ["accuracy", "stderr", "low_t", "high_t", "other", "forgetting"]
    frame = pd.DataFrame(rows, columns=[*names, "n", *numbers], dtype=object)
    return frame.astype(dict.fromkeys(numbers, float))


def mean_of(values) -> float:
    return statistics.mean(values) if values else math.nan


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
    """Keep of every arm the results at JEPA's chosen (lambda, depth), or at the nearest it has."""
    kept = []
    for (config, arm), own in results.groupby(["config", "arm"], sort=False):
        chosen, pairs = choose(results, config), pairs_of(own)
        if arm == "jepa" and chosen:
            pairs = [chosen]
        elif chosen:
            pairs.sort(key=lambda pair: sum(a != b for a, b in zip(pair, chosen)))
        elif len(pairs) > 1:
            continue                    # nothing says which
        kept.append(own[(own["lambda"] == pairs[0][0]) & (own["depth"] == pairs[0][1])])
    return pd.concat(kept) if kept else results.head(0)


def pairs_of(results: pd.DataFrame) -> list[tuple]:
    return sorted(set(zip(results["lambda"], results["depth"])))


def tested(results: pd.DataFrame, config: str, arm: str, n_shot: int) -> pd.DataFrame:
    """Select an arm's results on test, one a seed, with the seeds as index."""
    found = results[(results["config"] == config) & (results["arm"] == arm)
                    & (results["n_shot"] == n_shot) & (results["split"] == "test")]
    return found.set_index("seed").sort_index()


class Study(NamedTuple):
    """All logs. A `run` is an out_dir of train.py; only runs of one `cell` can be compared."""
    log: pd.DataFrame           # a row a line of a log.jsonl: run, arm, cell, step, losses
    probed: pd.DataFrame        # a row a tuned checkpoint in a probe.json
    probes: list[dict]          # those files: text, n, depths, the base's numbers
    results: pd.DataFrame       # a row a score, see frame_of
    chosen: pd.DataFrame        # those at the (lambda, depth) that validation has chosen
    summaries: list[dict]       # of preserve.py


def read_study(inputs, arms=()) -> Study:
    """Read the logs of these arms, or of all.

    Raises ValueError or FileNotFoundError, one sentence, if there are none or one is broken.
    """
    found = {"log.jsonl": [], "probe.json": [], "summary.json": [], "results.jsonl": []}
    for given in map(Path, inputs):
        if not given.exists():
            raise FileNotFoundError(f"there is no file or folder {given}")
        for name, paths in found.items():
            inside = sorted(given.rglob(name)) if given.is_dir() else [given]
            paths += [path for path in inside if path.name == name and path not in paths]
    results = frame_of(read_results(found["results.jsonl"]))
    results["run"] = results["command"].map(model_of)
    known = dict(zip(results["run"], results["arm"]))
    log = [row for path in found["log.jsonl"] for row in rows_of_log(path, known)]
    probes = [as_utf8(read_json(path)) for path in found["probe.json"]]
    probed = [row for probe in probes for row in rows_of_probe(probe, known)]
    summaries = [as_utf8(read_json(path)) for path in found["summary.json"]]
    summaries = [summary for summary in summaries if "models" in summary]   # compare.py's has none
    columns = ["run", "arm", "cell", "seed", "step"]        # where there is no row to tell them
    study = Study(pd.DataFrame(log, columns=None if log else columns),
                  pd.DataFrame(probed, columns=None if probed else columns),
                  probes, results, at_chosen(results), summaries)
    if not (log or probed or len(results) or summaries):
        raise ValueError(f"there are no logs in {', '.join(inputs) or 'no inputs'}; --inputs takes "
                         f"folders of runs, or log.jsonl, probe.json, summary.json, results.jsonl")
    there = {*study.log["arm"], *study.probed["arm"], *study.results["arm"]}
    for arm in arms:
        if arm not in there:
            raise ValueError(f"there is no arm {arm!r} in the inputs, which have "
                             f"{', '.join(sorted(there))}")
    if arms:
        for name in ("log", "probed", "results", "chosen"):
            frame = getattr(study, name)
            study = study._replace(**{name: frame[frame["arm"].isin(arms)]})
    return study


def rows_of_log(path, known: dict) -> list[dict]:
    """Make a row of each line of a log; a last line that is still being written is left out."""
    text = Path(path).read_bytes()
    try:
        lines = [as_utf8(json.loads(line)) for line in text[:text.rfind(b"\n") + 1].splitlines()]
        steps = [line["step"] for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not lines of train.py's log: {error}") from None
    beside = Path(path).with_name("settings.json")
    settings = as_utf8(read_json(beside)) if beside.is_file() else {}
    about, rows = about_run(settings, str(Path(path).parent), known), []
    for step, line in zip(steps, lines):
        losses = {key: line.get(key) for key in ("diffusion", "jepa", "jepa_floor")}
        for task, by_t in line.get("held_out", {}).items():
            losses[f"held-out {task}"] = statistics.mean(by_t.values()) if by_t else None
        rows.append({**about, "step": step, **losses})
    return rows


def rows_of_probe(probe: dict, known: dict) -> list[dict]:
    """Make a row of each tuned checkpoint, with its numbers and what identifies its run."""
    rows = []
    for name, numbers in probe["models"].items():
        if name != probe["settings"]["base"]:
            settings = numbers.get("trained") or {}
            about = about_run(settings, name, known)
            rows.append({**numbers, **about, "name": name, "step": settings.get("step") or 0})
    return rows


def about_run(settings: dict, path: str, known: dict) -> dict:
    """Identify a run: known has the arms of scored runs, and settings tell that of the others."""
    run = run_of(settings.get("out_dir") or path)
    base = Path(settings.get("init_from") or settings.get("preset") or "?").name
    steps, epochs = settings.get("max_steps"), settings.get("epochs", "?")
    cell = [f"{settings.get('task', '?')} from {base}", f"{steps} steps" if steps else
            f"{epochs} epochs", f"lr {settings.get('lr', '?')}", f"t_ctx {settings.get('t_ctx')}"]
    return {"run": run, "arm": known.get(run) or arm_of(settings) or Path(run).name,
            "cell": ", ".join(cell), "seed": settings.get("seed"), "t_tgt": settings.get("t_tgt")}


def run_of(path: str) -> str:
    """Return the out_dir of a checkpoint's path."""
    return re.sub(r"/step_\d+$", "", path.rstrip("/"))


def model_of(command) -> str:
    """Return the run that a command has scored, by its --init_from; "" without one."""
    try:
        words = shlex.split(command or "")
    except ValueError:
        return ""
    named = [word.partition("=")[2] for word in words if word.startswith("--init_from=")]
    return run_of(named[0]) if named else ""


def by_arm(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort the rows by arm, in the order of ARMS."""
    ranks = {arm: i for i, arm in enumerate(sorted(set(frame["arm"]), key=rank_of))}
    return frame.sort_values("arm", key=lambda arms: arms.map(ranks), kind="stable")


def last_of_each(probed: pd.DataFrame) -> pd.DataFrame:
    """Keep the last checkpoint of each run: several of one training are not independent."""
    last = probed.sort_values("step", kind="stable").drop_duplicates("run", keep="last")
    return last.sort_index()
