"""Keep of a grid what a repository can hold: its scores, the runs' logs, and every verdict.

    python analysis/keep.py --grid=out/tiny_hot --out=results/hot
    python analysis/keep.py --out=results/hot --compare=tiny_hot/plain_seed11,tiny_hot/l2_seed11

`out` gets results.jsonl, log.jsonl and settings.json of each run, and verdicts.jsonl.gz: for each
score the ids of the questions that were answered right, and a hash of all that were asked. That is
all that McNemar's test of two runs needs, which the second command prints. Weights and texts of
answers stay where they are.
"""
import gzip
import hashlib
import json
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import run  # first: it sets variables that torch reads

from analysis.checks import told
from analysis.frames import read_results, whole_lines
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
    """Copy scores and logs, and write the verdicts -> the number of scores and of runs.

    Raises OSError or ValueError, one sentence, also if `out` has scores of another grid.
    """
    results = grid / "results.jsonl"
    lines = read_results([results])
    before = out / results.name
    if before.exists() and not set(whole_lines(before)) <= set(whole_lines(results)):
        raise ValueError(f"{out} has scores that {grid} lacks; keep each grid in a folder of its "
                         f"own")
    verdicts = []
    for line in lines:
        path = Path(line["answers"])                    # GRID/CONFIG/RUN/test_0shot.jsonl
        answers = read_answers(path)
        asked = hashlib.sha256("\n".join(sorted(answers)).encode()).hexdigest()[:16]
        verdicts.append({
            "run": str(path.parent.relative_to(grid)), "split": line["split"],
            "n_shot": line["n_shot"], "task": line.get("task"), "n": len(answers),
            "questions": asked, "right": [id for id in answers if answers[id]["verdict"]]})
    runs = {Path(line["answers"]).parent for line in lines if line.get("train")}
    out.mkdir(parents=True, exist_ok=True)
    for folder in runs:
        (out / folder.relative_to(grid)).mkdir(parents=True, exist_ok=True)
        for name in ("log.jsonl", "settings.json"):
            shutil.copyfile(folder / name, out / folder.relative_to(grid) / name)
    shutil.copyfile(results, before)
    text = "".join(json.dumps(line) + "\n" for line in verdicts)
    write_bytes(out / VERDICTS, gzip.compress(text.encode(), mtime=0))      # the same each time
    return len(lines), len(runs)


def compare(out: Path, runs, split: str, n_shot: int) -> str:
    """Return McNemar's test of two runs in words. Raises ValueError, one sentence."""
    found = read_verdicts(out / VERDICTS, split, n_shot)
    missing = [name for name in runs if name not in found]
    if len(runs) != 2 or missing:
        raise ValueError(f"compare={','.join(runs)} must name two runs that {out / VERDICTS} has "
                         f"for {split}, {n_shot}-shot, such as {', '.join([*found][:3])}")
    a, b = (found[name] for name in runs)
    only_a, only_b = differ(a, b)
    return (f"{runs[0]}: {len(a['right'])} of {a['n']} right, {runs[1]}: {len(b['right'])} of "
            f"{b['n']}; {only_a} only the first, {only_b} only the second; McNemar p = "
            f"{mcnemar(only_a, only_b):.2g}")


def read_verdicts(path, split: str, n_shot: int) -> dict[str, dict]:
    """Return {run: its line} of the verdicts on a split at a number of shots."""
    data = Path(path).read_bytes()
    with told(path, "a file of verdicts of keep.py"):
        try:
            lines = gzip.decompress(data).splitlines()
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(error) from None
        return {line["run"]: line for line in map(json.loads, lines)
                if (line["split"], line["n_shot"]) == (split, n_shot)}


def differ(a: dict, b: dict) -> tuple[int, int]:
    """Return how many questions only the first, and only the second line of verdicts has right.

    Raises ValueError if they were asked other questions.
    """
    for name in ("task", "n", "questions"):
        if a[name] != b[name]:
            raise ValueError(f"{a['run']} and {b['run']} cannot be compared: they answered other "
                             f"questions, {name}={a[name]!r} and {b[name]!r}")
    first, second = set(a["right"]), set(b["right"])
    return len(first - second), len(second - first)


if __name__ == "__main__":
    run(main, KeepConfig)
