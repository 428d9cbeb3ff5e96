"""Keep of a grid what a repository can hold: its scores, the runs' logs, and every verdict.

    python analysis/keep.py --grid=out/tiny_hot --out=results/tiny_hot
    python analysis/keep.py --out=results/tiny_hot --compare=tiny_hot/plain_seed1,tiny_hot/l2_seed1

`out` gets results.jsonl, log.jsonl and settings.json of each run, and verdicts.jsonl.gz: for each
score the ids of the questions that were answered right. That is all that McNemar's test of two runs
needs, which the second command prints. Weights and texts of answers stay where they are.
"""
import gzip
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import run  # first: it sets variables that torch reads

from analysis.frames import read_results
from tasks.answers import read_answers
from tasks.files import write_bytes
from tasks.stats import mcnemar

VERDICTS = "verdicts.jsonl.gz"


@dataclass
class KeepConfig:
    grid: str = ""                      # an out_dir of analysis/grid.py; empty: only compare
    out: str = ""                       # the folder to write to
    compare: tuple[str, ...] = ()       # two runs in `out`, each CONFIG/RUN
    split: str = "test"                 # of the comparison
    n_shot: int = 0                     # of the comparison


def main(cfg: KeepConfig):
    if not cfg.out or not cfg.grid and not cfg.compare:
        raise ValueError("give --out=... and what to do: --grid=... to keep, or --compare=run,run")
    if cfg.grid:
        n_scores, n_runs = keep(Path(cfg.grid), Path(cfg.out))
        print(f"{cfg.out} has {n_scores} scores and {n_runs} runs of {cfg.grid}")
    if cfg.compare:
        print(compare(Path(cfg.out), cfg.compare, cfg.split, cfg.n_shot))


def keep(grid: Path, out: Path) -> tuple[int, int]:
    """Copy scores and logs, and write the verdicts -> the number of scores and of runs."""
    lines = read_results([grid / "results.jsonl"])
    verdicts = []
    for line in lines:
        answers = Path(line["answers"])                 # GRID/CONFIG/RUN/test_0shot.jsonl
        right = [id for id, answer in read_answers(answers).items() if answer["verdict"]]
        verdicts.append({"run": str(answers.parent.relative_to(grid)), "split": line["split"],
                         "n_shot": line["n_shot"], "n": line["metrics"]["n"], "right": right})
    runs = {Path(line["answers"]).parent for line in lines if line["train"]}
    out.mkdir(parents=True, exist_ok=True)
    for folder in runs:
        (out / folder.relative_to(grid)).mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "settings.json"):
            shutil.copyfile(folder / name, out / folder.relative_to(grid) / name)
    shutil.copyfile(grid / "results.jsonl", out / "results.jsonl")
    text = "".join(json.dumps(line) + "\n" for line in verdicts)
    write_bytes(out / VERDICTS, gzip.compress(text.encode(), mtime=0))      # the same each time
    return len(lines), len(runs)


def compare(out: Path, runs, split: str, n_shot: int) -> str:
    """Return McNemar's test of two runs in words. Raises ValueError, one sentence."""
    with gzip.open(out / VERDICTS, "rt") as file:
        found = {line["run"]: line for line in map(json.loads, file)
                 if (line["split"], line["n_shot"]) == (split, n_shot)}
    missing = [name for name in runs if name not in found]
    if len(runs) != 2 or missing:
        raise ValueError(f"compare={','.join(runs)} must name two runs that {out / VERDICTS} has "
                         f"for {split}, {n_shot}-shot, such as {', '.join([*found][:3])}")
    first, second = (set(found[name]["right"]) for name in runs)
    gained, lost = len(first - second), len(second - first)
    p = mcnemar(gained, lost)
    return (f"{runs[0]}: {len(first)} of {found[runs[0]]['n']} right, {runs[1]}: {len(second)}; "
            f"{gained} only the first, {lost} only the second; McNemar p = {p:.2g}")


if __name__ == "__main__":
    run(main, KeepConfig)
