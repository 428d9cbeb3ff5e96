"""Answers on file: one JSON line per question, by any number of processes, safe against kills.

    x.jsonl             all answers of a finished run, in the order of the questions
    x.jsonl.part0 ...   what each process has answered since x.jsonl was written, line by line
    x.json              the settings that they were made with; at the end also the scores

Parts are merged into x.jsonl at the start and at the end of a run: the new file is written, renamed
to x.jsonl, and only then the parts are removed. A kill between any two of these steps leaves an
answer in two files at worst and never in none; its id shows that it is the same answer.
"""
import glob
import json
import os
from pathlib import Path

from tasks import stats
from tasks.files import write_json

# where the weights were found; the setting weights_hash says which weights they are
WHERE = "init_from", "revision", "file"


def read_answers(path) -> dict:
    """Read a .jsonl -> {id: line}; a last line that a kill has cut short is left out.

    Raises FileNotFoundError, or ValueError naming a line that is not an answer or repeats an id.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    answers = {}
    lines = Path(path).read_bytes().split(b"\n")    # not splitlines: texts hold other line ends
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if type(line["verdict"]) is not bool or line["id"] in answers:
                raise KeyError
            answers[line["id"]] = line
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, ValueError) and number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is not an answer with an id of its own and a "
                             f"verdict, true or false") from None
    return answers


def check_settings(out: str, settings: dict, rank: int = 0):
    """Raise ValueError if `out` has answers made with other settings; if it has none yet, write
    down the settings.

    Settings in WHERE may differ: a copied folder has the same weights at another place.
    """
    if not os.path.exists(out) and not parts_of(out):
        if rank == 0:
            os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
            write_json(sidecar(out), {"settings": settings})
        return
    try:
        with open(sidecar(out)) as file:
            before = dict(json.load(file)["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out} exists, but {sidecar(out)} does not say how it was made; choose "
                         f"another --out") from None
    for key in {**settings, **before}:
        if key in WHERE or before.get(key) == settings.get(key):
            continue
        was, now = f"{before.get(key)!r}", f"{settings.get(key)!r}"
        if key == "weights_hash":
            was, now = (f"{end} ({of.get('file')})" for end, of in ((was, before), (now, settings)))
        raise ValueError(f"{out} was made with {key}={was}, not {now}; choose another --out, or "
                         f"remove {out}* to start again")


def collect(out: str, ids, rank: int = 0, wait=lambda: None) -> dict:
    """Merge the parts into `out` -> {id: line} of all answers so far.

    Lines are put in the order of ids, then come those that a larger limit has left. Every process
    calls this; rank 0 writes. wait() returns when all processes have come to it.
    """
    wait()                              # until all have written their parts
    parts, done = parts_of(out), {}
    for path in [out] * os.path.exists(out) + parts:
        done = read_answers(path) | done
    wait()                              # until all have read them
    if rank == 0:
        order = [id for id in ids if id in done] + [id for id in done if id not in ids]
        with open(out + ".new", "w") as file:
            file.writelines(json.dumps(done[id]) + "\n" for id in order)
            file.flush()
            os.fsync(file.fileno())     # else a power cut may keep the rename without the lines
        os.replace(out + ".new", out)
        for path in parts:
            os.remove(path)
    wait()                              # until the files are merged
    return done


def count_so_far(out: str) -> tuple[int, int]:
    """Count the answers, and the right ones, in the parts.

    The verdict ends a line; texts in it have their quotes and line ends escaped.
    """
    text = b"".join(Path(path).read_bytes() for path in parts_of(out))
    return text.count(b"\n"), text.count(b'"verdict": true}\n')


def parts_of(out: str) -> list[str]:
    return sorted(glob.glob(glob.escape(out) + ".part*"))


def sidecar(out: str) -> str:
    return out.removesuffix("l") if out.endswith(".jsonl") else out + ".json"


# ----------------------------------------------------------------------------------------------
# several files of answers


def read_common(paths) -> tuple[list[dict], int]:
    """Read files of answers -> [{id: verdict}, ...] of the questions in all of them, and the number
    of other questions.

    Raises ValueError if there is no common question, or if an id stands for two questions.
    """
    if len(set(paths)) < len(paths):
        raise ValueError(f"a file is named twice: {', '.join(paths)}")
    files = [read_answers(path) for path in paths]
    ids = [id for id in files[0] if all(id in file for file in files)]
    if not ids:
        raise ValueError(f"no question is in all of {', '.join(paths)}")
    for id in ids:
        if any(file[id].get("gold") != files[0][id].get("gold") for file in files):
            raise ValueError(f"{id} has different gold answers in {', '.join(paths)}, so it is not "
                             f"the same question")
    verdicts = [{id: file[id]["verdict"] for id in ids} for file in files]
    return verdicts, len(set().union(*files)) - len(ids)


def print_comparison(first: str, second: str):
    """Print how two files of answers differ on the questions that both have."""
    verdicts, n_others = read_common([first, second])
    for name, path, right in zip("AB", (first, second), verdicts):
        print(f"{name}  {100 * sum(right.values()) / len(right):5.1f} %  {path}")
    print(stats.in_words(stats.paired_difference(*verdicts), "A", "B"))
    if n_others:
        print(f"    {n_others} questions are in one file only and left out")


def print_seeds(paths):
    """Print mean and spread of files of answers to the same questions, one file per seed."""
    verdicts, n_others = read_common(paths)
    accuracies = [100 * sum(right.values()) / len(right) for right in verdicts]
    runs = stats.over_seeds(accuracies)
    for path, accuracy in zip(paths, accuracies):
        print(f"{accuracy:5.1f} %  {path}")
    print(f"mean {runs['mean']:.1f} % of n = {runs['n']} runs of {len(verdicts[0])} questions, "
          f"from {runs['min']:.1f} to {runs['max']:.1f}\n"
          f"    standard deviation {runs['sd_ddof1']:.2f} (ddof = 1) or {runs['sd_ddof0']:.2f} "
          f"(ddof = 0), standard error of the mean {runs['stderr']:.2f}")
    if n_others:
        print(f"    {n_others} questions are not in all files and left out")
