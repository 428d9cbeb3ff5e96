"""Answers on file: a JSON line a question, by any number of processes, whatever kills them.

    x.jsonl             all answers of a finished run, in the order of the questions
    x.jsonl.part0 ...   what each process has answered since x.jsonl was written, line by line
    x.json              the settings they were made with; at the end also the scores

Parts are folded into x.jsonl when a run begins and when it ends: written aside, renamed, and only
then removed. A kill between any two of these steps leaves an answer in two files at worst, never in
none; the id says that it is one answer.
"""
import glob
import json
import os
from pathlib import Path

import torch.distributed as dist

from tasks.files import write_json


def read_answers(path) -> dict:
    """{id: line} of a .jsonl; a last line that a kill has cut short is left out.

    Raises FileNotFoundError, or ValueError naming a line that is no answer or has an id once more.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    answers, lines = {}, Path(path).read_bytes().split(b"\n")   # \n alone: texts hold other ends
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
            raise ValueError(f"{path}, line {number}, is no answer with an id of its own and a "
                             f"verdict, true or false") from None
    return answers


def read_common(paths) -> tuple[list[dict], int]:
    """[{id: verdict}, ...] of the questions that are in all files, and how many are not.

    Raises ValueError if there are none, or if one id stands for two questions.
    """
    if len(set(paths)) < len(paths):
        raise ValueError(f"a file is named twice: {', '.join(paths)}")
    files = [read_answers(path) for path in paths]
    ids = [id for id in files[0] if all(id in file for file in files)]
    if not ids:
        raise ValueError(f"no question is in all of {', '.join(paths)}")
    for id in ids:
        if any(file[id].get("gold") != files[0][id].get("gold") for file in files):
            raise ValueError(f"{id} has not the same gold answer in {', '.join(paths)}, so it is "
                             f"not the same question")
    return ([{id: file[id]["verdict"] for id in ids} for file in files],
            len(set().union(*files)) - len(ids))


def check_settings(out: str, settings: dict, rank: int = 0):
    """ValueError if `out` has answers that were made in another way; if it has none yet, writes
    down how they will be made."""
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
        if before.get(key) != settings.get(key):
            raise ValueError(f"{out} was made with {key}={before.get(key)!r}, not "
                             f"{settings.get(key)!r}; choose another --out, or remove {out}* to "
                             f"start again")


def collect(out: str, ids, rank: int = 0, world: int = 1) -> dict:
    """{id: line} of all answers so far; every process calls it, and rank 0 folds the parts into
    `out`, in the order of ids (and behind them what a larger limit has left)."""
    wait_for_all(world)                 # until everyone has written
    parts, done = parts_of(out), {}
    for path in [out] * os.path.exists(out) + parts:
        done = read_answers(path) | done
    wait_for_all(world)                 # until everyone has read
    if rank == 0:
        order = [id for id in ids if id in done] + [id for id in done if id not in ids]
        with open(out + ".new", "w") as file:
            file.writelines(json.dumps(done[id]) + "\n" for id in order)
            file.flush()
            os.fsync(file.fileno())     # a power cut may else leave the rename without the lines
        os.replace(out + ".new", out)
        for path in parts:
            os.remove(path)
    wait_for_all(world)                 # until the files are as they shall be
    return done


def glance(out: str) -> tuple[int, int]:
    """How many answers, and right ones, the parts hold by now; verdict is the last entry of a line,
    and text in it has its quotes and line ends escaped."""
    text = b"".join(Path(path).read_bytes() for path in parts_of(out))
    return text.count(b"\n"), text.count(b'"verdict": true}\n')


def parts_of(out: str) -> list[str]:
    return sorted(glob.glob(glob.escape(out) + ".part*"))


def sidecar(out: str) -> str:
    return out.removesuffix("l") if out.endswith(".jsonl") else out + ".json"


def wait_for_all(world: int):
    if world > 1:
        dist.barrier()
