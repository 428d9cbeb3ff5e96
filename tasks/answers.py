"""Answers on file: one JSON line per question, by any number of processes, safe against kills.

    x.jsonl             all answers of a finished run, in the order of the questions
    x.jsonl.part0 ...   what each process has answered since x.jsonl was written, line by line
    x.json              the settings that they were made with; at the end also the scores

Parts are merged into x.jsonl at the start and at the end of a run: the new file is written, renamed
to x.jsonl, and only then the parts are removed. A kill between any two of these steps leaves an
answer in two files at worst and never in none; its id shows that it is the same answer.
"""
import fcntl
import glob
import json
import os
from pathlib import Path

from tasks import stats
from tasks.files import check_is_file, lock_file, naming, read_json, write_json

# where weights and rows were found: weights_hash says which weights they are, and `check_rows`
# compares the rows
WHERE = "init_from", "revision", "file", "data_dir"


def read_answers(path) -> dict:
    """Read a .jsonl -> {id: line}; a last line that a kill has cut short is left out.

    Raises OSError, or ValueError naming a line that is not an answer or repeats an id.
    """
    check_is_file(path)
    answers = {}
    lines = Path(path).read_bytes().split(b"\n")    # not splitlines: texts hold other line ends
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            id, verdict = line["id"], line["verdict"]
            if type(verdict) is not bool or type(id) is not str or id in answers:
                raise KeyError
            answers[id] = line
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, ValueError) and number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is not an answer with an id of its own and a "
                             f"verdict, true or false") from None
    return answers


def check_settings(out: str, settings: dict):
    """Raise ValueError if `out` has answers made with other settings, OSError if nothing can be
    written there.

    Settings in WHERE may differ: a copied folder has the same weights or rows at another place.
    """
    if is_new(out):
        folder = os.path.dirname(os.path.abspath(out))
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(f"{out} cannot be written: {folder} is not a folder, or not open to "
                          f"writing; choose another --out")
        return
    before = settings_of(out)
    if before is None:
        raise ValueError(f"{out} exists, but {sidecar(out)} does not say how it was made; choose "
                         f"another --out")
    for key in {**settings, **before}:
        if key in WHERE or before.get(key) == settings.get(key):
            continue
        was, now = f"{before.get(key)!r}", f"{settings.get(key)!r}"
        if key == "weights_hash":
            was, now = (f"{end} ({of.get('file')})" for end, of in ((was, before), (now, settings)))
        raise ValueError(f"{out} was made with {key}={was}, not {now}; choose another --out, or "
                         f"remove {out}* to start again")


def check_rows(out: str, done: dict, examples: list):
    """Raise ValueError if an answer in `out` was given to another prompt, or has another gold one.

    done: {id: line}, as `collect` returns it.
    """
    for example in examples:
        id, gold = example.meta["id"], json.dumps(example.meta["gold"])
        line = done.get(id, {})
        if (line.get("prompt", example.prompt) != example.prompt
                or "gold" in line and json.dumps(line["gold"]) != gold):
            raise ValueError(f"{out} has an answer of {id} with another prompt or another gold "
                             f"answer than the rows have now; choose another --out")


def is_new(out: str) -> bool:
    return not os.path.lexists(out) and not parts_of(out)


def write_settings(out: str, settings: dict):
    """Write down the settings beside `out`, if it has no answers yet."""
    if is_new(out):
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        write_json(sidecar(out), {"settings": settings})


def settings_of(out: str) -> dict | None:
    """Return the settings that answers were made with, None if nothing says so."""
    try:
        return dict(read_json(sidecar(out))["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_part(out: str, rank: int):
    """Open the file for what this process answers; a line is on file as soon as it is written.

    Raises ValueError if another process is writing to it.
    """
    file = open(f"{out}.part{rank}", "a", buffering=1)
    check_lock(out, lock_file(file))
    return file


def check_lock(out: str, is_ours: bool):
    if not is_ours:
        raise ValueError(f"another process is answering into {out}; wait for it, end it, or choose "
                         f"another --out")


def collect(out: str, ids, rank: int = 0, wait=lambda: None) -> dict:
    """Merge the parts into `out` -> {id: line} of all answers so far.

    Lines are put in the order of ids, then come those that a larger limit has left. Every process
    calls this; rank 0 writes. wait() returns when all processes have come to it. Raises ValueError
    if another run is answering into `out`: its parts would be removed under its hands.
    """
    wait()                              # until all have written their parts
    parts, done = parts_of(out), {}
    for path in parts:
        with open(path) as file:        # shared: the processes of this run may all look at once
            check_lock(out, lock_file(file, fcntl.LOCK_SH))
    for path in [out] * os.path.lexists(out) + parts:
        done = read_answers(path) | done
    wait()                              # until all have read them
    if rank == 0:
        order = [id for id in ids if id in done] + [id for id in done if id not in ids]
        with naming(out), open(out + ".new", "w") as file:
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
    if not all(path.strip() for path in paths):
        raise ValueError(f"a file of answers has no name: {', '.join(map(repr, paths))}")
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


def print_settings(paths):
    """Print the settings in which files of answers differ, apart from the model's; those of a file
    without them are not known."""
    made = [settings for path in paths if (settings := settings_of(path)) is not None]
    if len(made) < len(paths):
        print(f"    how {len(paths) - len(made)} of {len(paths)} files were made is not known")
    for key in dict.fromkeys(key for settings in made for key in settings):
        values = [str(settings.get(key)) for settings in made]
        if key not in (*WHERE, "weights_hash", "weights", "device") and len(set(values)) > 1:
            print(f"    made with {key} = {', '.join(values)}")


def print_comparison(first: str, second: str):
    """Print how two files of answers differ on the questions that both have."""
    verdicts, n_others = read_common([first, second])
    print_settings([first, second])
    for name, path, right in zip("AB", (first, second), verdicts):
        print(f"{name}  {100 * sum(right.values()) / len(right):5.1f} %  {path}")
    print(stats.in_words(stats.paired_difference(*verdicts), "A", "B"))
    if n_others:
        print(f"    {n_others} questions are in one file only and left out")


def print_seeds(paths):
    """Print mean and spread of files of answers to the same questions, one file per seed."""
    verdicts, n_others = read_common(paths)
    print_settings(paths)
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
