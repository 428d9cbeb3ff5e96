"""Read what the runs of a study have left on file, as pandas frames for tables and figures.

results.jsonl (grid.py) has a line a score, log.jsonl (train.py) the losses of a run, probe.json
(probe.py) drift and forgetting of checkpoints, summary.json (preserve.py) Wikitext and MMLU.
"""
import os
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from analysis.arms import rank_of
from analysis.checks import (brief, check_alike, check_log_line, check_probe, check_result,
                             check_summary, records_of_result, settings_of_arm, told)
from tasks.files import check_is_file, parse_line, read_json

KEYS = ["config", "arm", "lambda", "depth", "seed", "split", "n_shot"]      # identify a result
LOGGED = ["diffusion", "jepa", "jepa_floor", "corr_views", "corr_same_rate", "corr_others"]
ABOUT = ["run", "config", "arm", "seed", "step"]    # of a line of a log or of a probe


def key_of(line: dict) -> tuple:
    return tuple(line[key] for key in KEYS)


def whole_lines(path) -> list[bytes]:
    """Return the lines of a file; a last one that is not ended yet, or by a kill, is left out."""
    return Path(path).read_bytes().split(b"\n")[:-1]


def read_lines(path, what: str, check):
    """Yield the objects in a .jsonl, checked, each with `path, line n,`.

    Raises OSError, or ValueError: path, line n, is not `what`, and why.
    """
    check_is_file(path)
    rest = Path(path).read_bytes().rpartition(b"\n")[2]
    if rest.strip() and not rest.startswith(b"{"):
        raise ValueError(f"{path} is not lines of JSON, but ends with {brief(rest)}")
    for number, data in enumerate(whole_lines(path), 1):
        where = f"{path}, line {number},"
        with told(where, what):
            text = data.decode("utf-8-sig")
        line = parse_line(text, where)
        with told(where, what):
            check(line)
        yield line, where


def files_at(path, pattern: str) -> list[Path]:
    """Return the files in a folder and below it whose names fit, in order, or the file itself."""
    return sorted(Path(path).rglob(pattern)) if os.path.isdir(path) else [Path(path)]


def read_results(paths) -> list[dict]:
    """Read results.jsonl files, or all in folders; paths of answers start at the file's folder.

    Raises FileNotFoundError, or ValueError naming a line that is not a result, is there twice, or
    is of a run that differs from the others of its arm.
    """
    lines, records, files = {}, [], []
    for given in paths:
        found = files_at(given, "results.jsonl")
        if not found or not os.path.exists(given):
            raise FileNotFoundError(f"there is no file {given}{'/results.jsonl' * (not found)}; "
                                    f"analysis/grid.py writes one")
        files += found
    for path in files:
        for line, where in read_lines(path, "a result", check_result):
            if key_of(line) in lines:
                raise ValueError(f"{where} is a result for the second time")
            line["answers"] = str(path.parent / line["answers"])
            lines[key_of(line)] = line
            records += records_of_result(line, where.rstrip(","))
    check_alike(records)
    return list(lines.values())


def read_summaries(paths) -> list[dict]:
    """Read summary.json files of preserve.py. Raises ValueError for one that is none, and if two
    say different things of one model."""
    summaries, records = [], []
    for path in paths:
        summary = read_json(path)
        with told(path, "a summary of preserve.py"):
            check_summary(summary)
        summaries.append(summary)
        asked = ("window", "n_windows", "rates", "n_questions", "n_shot")
        settings = summary["settings"]
        records.append(("summaries of preserve.py",
                        {name: settings[name] for name in asked if name in settings}, path))
        records += [(f"numbers of {model!r}", {"its scores": scores}, path)
                    for model, scores in summary["models"].items()]
    check_alike(records)
    return summaries


def frame_of(lines: list[dict]) -> pd.DataFrame:
    """Make one row a result: accuracy in %, and held-out losses after training.

    The task's losses are columns named after their masking rate, `t = 0.2`, and `mean over t`. On
    the other corpus (forget_task) `forgetting` is how much the mean over rates has grown.
    """
    names = [*KEYS, "task", "t_ctx", "t_tgt", "init_from", "answers", "command", "revision"]
    rows, rates = [], set()
    for line in lines:
        row = {name: line.get(name) for name in names}
        row["n"], row["accuracy"] = line["metrics"]["n"], 100 * line["metrics"]["accuracy"]
        row["run"] = run_of(Path(line["answers"]).parent)
        own, other, *_ = *(line.get("held_out") or {}).values(), {}, {}
        losses = {float(t): after for t, (_, after) in own.items()}
        rates |= losses.keys()
        row |= {rate_name(t): loss for t, loss in losses.items()}
        if own:
            row["mean over t"] = statistics.mean(losses.values())
        if other:
            row["forgetting"] = statistics.mean(after - before for before, after in other.values())
        rows.append(row)
    numbers = ["accuracy", *map(rate_name, sorted(rates)), "mean over t", "forgetting"]
    frame = pd.DataFrame(rows, columns=[*names, "run", "n", *numbers], dtype=object)
    return frame.astype(dict.fromkeys(numbers, float))


def rate_name(t: float) -> str:
    return f"t = {t:g}"


def losses_in(results: pd.DataFrame) -> list[str]:
    """Return the columns of the task's losses that have values: by rate, then their mean."""
    return [name for name in results if name.startswith(("t = ", "mean over t"))
            and results[name].notna().any()]


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


def with_runs(cfg):
    """Return settings whose base and models are those of cfg.grid, an out_dir of grid.py, or as
    they are without a grid.

    The models are the runs at the chosen (lambda, depth) that began at that base. Raises OSError or
    ValueError, one sentence, if they cannot be found, or if there is no base or no model.
    """
    if not cfg.grid:
        if not cfg.base or not cfg.models:
            raise ValueError("name a base and models to compare with it: --base=... --models=..., "
                             "or the runs of a grid: --grid=...")
        return cfg
    if cfg.models:
        raise ValueError(f"grid={cfg.grid!r} brings its own models; leave out --models or --grid")
    results = at_chosen(frame_of(read_results([Path(cfg.grid) / "results.jsonl"])))
    tuned = results[(results["arm"] != "base") & results["init_from"].astype(bool)]
    bases = list(dict.fromkeys(tuned["init_from"]))
    base = cfg.base or (bases[0] if len(bases) == 1 else "")
    if base not in bases:
        have = f"the bases {', '.join(bases)}; choose one" if bases else "no base"
        raise ValueError(f"base={cfg.base!r} does not fit grid={cfg.grid!r}: its runs have {have}")
    answers = tuned["answers"][tuned["init_from"] == base]
    folders = dict.fromkeys(str(Path(path).parent) for path in answers)
    return replace(cfg, base=base, models=tuple(folders))


# ----------------------------------------------------------------------------------------------
# all logs of a study


class Study(NamedTuple):
    """All logs. A `run` is one training, `config` the folder that has it and its like."""
    log: pd.DataFrame           # a row a line of a log.jsonl: its run, its losses
    probed: pd.DataFrame        # a row a tuned checkpoint in a probe.json, with its numbers
    results: pd.DataFrame       # a row a score at the chosen (lambda, depth), see frame_of
    trials: pd.DataFrame        # a row a score on validation of JEPA, at any (lambda, depth)
    summaries: list[dict]       # of preserve.py


def read_study(inputs, arms=()) -> Study:
    """Read the logs of these arms and of the base, or of all, from files or folders.

    Of runs that differ in (lambda, depth) those that validation has not chosen are left out, as in
    the results. Raises ValueError or FileNotFoundError, one sentence, if there are none, if one is
    broken, or if runs of one arm have other settings.
    """
    found = []
    if not all(inputs):
        raise ValueError("inputs has an empty name; write files or folders, separated by commas")
    for given in map(Path, inputs):
        if not given.exists():
            raise FileNotFoundError(f"there is no file or folder {given}")
        found += files_at(given, "*.json*")
    found = {os.path.realpath(path): path for path in found}.values()       # each file once
    paths = {name: [path for path in found if path.name == name]
             for name in ("log.jsonl", "probe.json", "summary.json", "results.jsonl")}

    every_result = frame_of(read_results(paths["results.jsonl"]))
    results = at_chosen(every_result)
    left_out = set(every_result["run"]) - set(results["run"])
    log, settings_of_logs = read_logs(paths["log.jsonl"])
    probed, settings_of_probes = read_probes(paths["probe.json"])
    log, probed = ([row for row in rows if row["run"] not in left_out] for rows in (log, probed))
    check_arms(log + probed, settings_of_logs + settings_of_probes)
    rates = {run: settings.get("lr") for run, settings, _ in settings_of_logs + settings_of_probes}
    results, every_result = (frame.assign(lr=frame["run"].map(rates).astype(object))
                             for frame in (results, every_result))
    trials = every_result[(every_result["arm"] == "jepa")
                          & (every_result["split"] == "validation")]
    summaries = read_summaries(path for path in paths["summary.json"]
                               if "models" in read_json(path))          # compare.py's has none
    frames = [pd.DataFrame(rows, columns=None if rows else [*ABOUT, *LOGGED])
              for rows in (log, probed)]
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
        frames = [frame[frame["arm"].isin([*arms, "base"])] for frame in frames]
    return Study(*frames, trials, summaries)


def read_logs(paths) -> tuple[list[dict], list]:
    """Read logs -> a row of each line: its step, its losses, held-out ones as means over t; and
    (run, settings, path) of each log."""
    rows, of_runs, folder_of = [], [], {}
    for path in paths:
        folder, settings = Path(os.path.realpath(path)).parent, path.with_name("settings.json")
        about = about_run(folder)
        if about["run"] in folder_of:
            raise ValueError(f"{path.parent} and {folder_of[about['run']]} are both the run "
                             f"{about['run']}; read one of them, or rename a folder")
        folder_of[about["run"]] = path.parent
        if settings.exists():
            of_runs.append((about["run"], read_json(settings), settings))
        for line, _ in read_lines(path, "a line of train.py's log", check_log_line):
            row = {**about, "step": line["step"]}
            row |= {key: line.get(key) for key in LOGGED}
            for task, by_t in line.get("held_out", {}).items():
                row[f"held-out {task}"] = statistics.mean(by_t.values())
            rows.append(row)
    return rows, of_runs


def read_probes(paths) -> tuple[list[dict], list]:
    """Read probes -> a row of each tuned checkpoint: its numbers, its run, and which texts were
    read; and (run, settings, path) of each. Raises ValueError if a config was probed in two ways.
    """
    rows, of_runs, records, path_of = [], [], [], {}
    for path in paths:
        probe = read_json(path)
        with told(path, "a probe of probe.py"):
            check_probe(probe)
        settings = probe["settings"]
        texts = f"{probe['n']} texts of {settings['text']}, {probe['tokens']:,} tokens"
        for name, numbers in probe["models"].items():
            if name == settings["base"]:
                continue
            about, trained = about_run(name), numbers.get("trained") or {}
            row = {**numbers, **about, "step": trained.get("step", 0), "depths": probe["depths"],
                   "texts": texts}
            checkpoint = row["run"], row["step"]
            if checkpoint in path_of:
                raise ValueError(f"{path} has step {row['step']} of the run {row['run']}, and so "
                                 f"has {path_of[checkpoint]}; read one of them")
            path_of[checkpoint] = path
            rows.append(row)
            of_runs.append((row["run"], trained, path))
            read = {"texts": texts, "rates": settings.get("rates"), "depths": probe["depths"]}
            records.append((f"probes of {about['config']!r}", read, path))
    check_alike(records)
    return rows, of_runs


def check_arms(rows: list[dict], of_runs):
    """Put (lambda, depth) into the name of an arm that has several in one folder.

    of_runs: (run, settings, path). Raises ValueError if runs of an arm have other settings.
    """
    pairs, arm_of = {}, {}
    for row in rows:
        pairs.setdefault((row["config"], row["arm"]), set()).add(row["pair"])
    for row in rows:
        if len(pairs[row["config"], row["arm"]] - {""}) > 1:
            row["arm"] += row["pair"]
        arm_of[row["run"]] = f"runs of {row['arm']!r} in {row['config']!r}"
    check_alike((arm_of[run], settings_of_arm(settings), path)
                for run, settings, path in of_runs if run in arm_of)


def about_run(path) -> dict:
    """Identify a run by its folder, such as tiny_study/jepa_lambda1.0_depth2_seed42 of grid.py."""
    config, _, name = run_of(path).rpartition("/")
    named = re.fullmatch(r"(.*?)(_lambda[^_]+_depth\d+)?(?:_seed(\d+))?", name, re.S)
    arm, pair, seed = named.groups()
    return {"run": run_of(path), "config": config, "arm": arm, "pair": pair or "", "seed": seed}


def run_of(path) -> str:
    """Return the last two folders of a run or of a checkpoint in it."""
    path = Path(path)
    path = path.parent if re.fullmatch(r"step_\d+", path.name) else path
    return "/".join(path.parts[-2:])


def brief_names(paths, width: int) -> dict[str, str]:
    """Return {path: arm and seed} of runs, with config and (lambda, depth) where they have several;
    of another model the end of its path, `width` characters."""
    runs = {path: about_run(path) for path in paths}
    several = {key: len({about[key] for about in runs.values() if about["seed"]} - {""}) > 1
               for key in ("config", "pair")}
    return {path: f"{about['config'] + ' ' if several['config'] else ''}{about['arm']}"
                  f"{about['pair'] if several['pair'] else ''} {about['seed']}"
            if about["seed"] else str(path)[-width:] for path, about in runs.items()}


def by_arm(frame: pd.DataFrame) -> pd.DataFrame:
    """Sort the rows by arm, in the order of ARMS."""
    return frame.sort_values("arm", key=lambda arms: arms.map(rank_of), kind="stable")


def last_of_each(probed: pd.DataFrame) -> pd.DataFrame:
    """Keep the last checkpoint of each run: several of one training are not independent."""
    last = probed.sort_values("step", kind="stable").drop_duplicates("run", keep="last")
    return last.sort_index()
