"""Check what runs have left on file: every number is one, and runs that are merged are alike.

A log, a result, a probe or a summary may be cut, edited or of another program. What does not fit is
a ValueError, one sentence, that names the file and the line. So is a merge of runs whose settings
differ in more than the seed: their mean would be a number of no experiment.
"""
import re
import shlex
from contextlib import contextmanager
from pathlib import Path

LARGEST = 1e300         # what is beyond is no measurement
# may differ between runs of one arm: whose run it is, on what machine, how it is watched
OF_A_RUN = {"seed", "out_dir", "export_dir", "resume", "resumed", "overwrite", "device", "commit",
            "torch", "python", "step", "init_weights", "shard", "compile", "pack",
            "micro_batch_size", "revision", "checkpoint_activations", "log_every", "eval_every",
            "save_every", "keep", "test_questions"}
OF_A_SCORE = {"init_from", "revision", "device", "out", "split", "n_shot", "batch_tokens",
              "data_dir"}
IN_THE_KEY = {"lambda_jepa", "n_pred_layer"}    # of a result: a pair is chosen, see frames.choose


@contextmanager
def told(where: str, what: str):
    """Turn what reading raises into a ValueError: {where} is not {what}, and why."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{where} is not {what}: it has no {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is not {what}: {error}") from None


def check_number(name: str, value, low: float = -LARGEST, high: float = LARGEST):
    """Raise ValueError unless the value is a finite number in low .. high."""
    if type(value) not in (int, float) or not low <= value <= high:
        fits = f" in {low:g}..{high:g}" * (high < LARGEST) or " from 0 up" * (low == 0)
        raise ValueError(f"{name}={brief(value)} is not a number{fits}")


def check_count(name: str, value, low: int = 0):
    """Raise ValueError unless the value is a whole number from `low` up."""
    if type(value) is not int or not low <= value < 2 ** 63:
        raise ValueError(f"{name}={brief(value)} is not a whole number from {low} up")


def check_text(name: str, value):
    if type(value) is not str:
        raise ValueError(f"{name}={brief(value)} is not a text")


def entries(name: str, value):
    """Return the (key, value) pairs of an object. Raises ValueError for anything else."""
    if type(value) is not dict:
        raise ValueError(f"{name}={brief(value)} is not an object")
    return value.items()


def brief(value) -> str:
    text = repr(value) if type(value) is not int or abs(value) < 1e30 else "a huge number"
    return text if len(text) <= 40 else text[:39] + "\u2026"


# ----------------------------------------------------------------------------------------------
# one record


def check_result(line: dict):
    """Check a line of grid.py's results.jsonl."""
    for name in ("config", "arm", "split", "answers"):
        check_text(name, line[name])
    check_number("lambda", line["lambda"], 0)
    check_count("depth", line["depth"])
    check_count("n_shot", line["n_shot"])
    if line["seed"] is not None or line["arm"] != "base":       # one base for all seeds has none
        check_count("seed", line["seed"])
    metrics = dict(entries("metrics", line["metrics"]))
    check_number("accuracy", metrics["accuracy"], 0, 1)
    check_count("n", metrics["n"], 1)
    given = {name: value for name, value in line.items() if value is not None}
    for name in given.keys() & {"task", "init_from", "train", "command", "revision"}:
        check_text(name, given[name])
    for name in given.keys() & {"t_ctx", "t_tgt"}:
        check_number(name, given[name], 0, 1)
    for task, by_t in entries("held_out", given.get("held_out", {})):
        for t, pair in entries(task, by_t):
            check_rate(t)
            before, after = pair
            check_number(f"loss before training at t = {t}", before)
            check_number(f"loss at t = {t}", after)


def check_rate(t: str):
    try:
        check_number("t", float(t), 0, 1)
    except ValueError:
        raise ValueError(f"{brief(t)} is not a masking rate") from None


def check_log_line(line: dict):
    """Check a line of train.py's log.jsonl. A loss is null where it was not finite."""
    check_count("step", line["step"])
    for name in ("loss", "diffusion", "jepa", "jepa_floor", "corr_views", "corr_same_rate",
                 "corr_others"):
        check_number(name, 0 if line.get(name) is None else line[name])
    for task, by_t in entries("held_out", line.get("held_out", {})):
        if not by_t:
            raise ValueError(f"there is no held-out loss of {task}")
        for t, loss in entries(task, by_t):
            check_number(f"loss at t = {t}", loss)


def check_probe(probe: dict):
    """Check a probe.json of probe.py."""
    settings, depths = dict(entries("settings", probe["settings"])), probe["depths"]
    for name in ("base", "text"):
        check_text(name, settings[name])
    check_count("n", probe["n"])
    check_count("tokens", probe["tokens"])
    if type(depths) is not list or len(depths) < 3 or {type(name) for name in depths} != {str}:
        raise ValueError(f"depths={brief(depths)} is not a list of names: embed, blocks, norm")
    for model, numbers in entries("models", probe["models"]):
        for name in ("drift", "weight_drift"):
            if len(numbers[name]) != len(depths):
                raise ValueError(f"{name} of {model} has not one number for each of its depths")
            for value in numbers[name]:
                check_number(f"{name} of {model}", value, 0)
        check_number(f"mean_drift of {model}", numbers["mean_drift"], 0)
        check_number(f"forgetting of {model}", numbers["forgetting"])
        trained = dict(entries("trained", numbers.get("trained") or {}))
        check_count(f"step of {model}", trained.get("step", 0))


def check_summary(summary: dict):
    """Check a summary.json of preserve.py."""
    check_text("base", dict(entries("settings", summary["settings"]))["base"])
    for model, scores in entries("models", summary["models"]):
        check_number(f"minus_base of {model}", scores["wikitext"]["minus_base"])
        check_count(f"n of {model}", scores["wikitext"].get("n", 0))
        check_number(f"accuracy of {model}", scores["mmlu"]["accuracy"], 0, 1)


# ----------------------------------------------------------------------------------------------
# several records


def check_alike(records):
    """records: (group, {setting: value}, where). Raise ValueError if two of a group differ in a
    setting that both have."""
    known = {}
    for group, settings, where in records:
        for name, value in settings.items():
            before, there = known.setdefault((group, name), (value, where))
            if before == value:
                continue
            if type(value) is frozenset:        # of options: those that one of the two has
                words = [" ".join(sorted(of)) or "nothing" for of in (before - value,
                                                                      value - before)]
            else:
                words = [f"{name}={brief(of)}" for of in (before, value)]
            raise ValueError(f"{group} are not alike: {words[0]} in {there}, {words[1]} in "
                             f"{where}; read them apart, or name their folders after what differs")


def records_of_result(line: dict, where: str):
    """Yield what a line of results.jsonl must share with its arm, and with its config's scores."""
    arm, config = line["arm"], line["config"]
    own = {name: line[name] for name in ("task", "t_ctx", "t_tgt") if line.get(name) is not None}
    if line.get("init_from") is not None:
        own["init_from"] = base_of_arm(line["init_from"])
    if line.get("train"):               # another machine has rows and weights at other places
        elsewhere = {"data_dir", *own.keys() & {"init_from"}}
        own["train"] = options_of(line["train"], OF_A_RUN | IN_THE_KEY | elsewhere)
    yield f"runs of the arm {arm!r} of {config!r}", own, where
    if line.get("init_from") is not None and line.get("seed") is not None:  # a block: compared
        base = {"init_from": name_of_base(line["init_from"])}
        yield f"runs of seed {line['seed']} of {config!r}", base, where
    if line.get("command"):
        kind = f"{line['split']} scores of {config!r} at {line['n_shot']} shots"
        yield kind, {"command": options_of(line["command"], OF_A_SCORE)}, where


def settings_of_arm(settings: dict) -> dict:
    """Select what runs of one arm have in common; for init_from see `base_of_arm`.

    Where the rows themselves are known it does not matter in which folder they were found.
    """
    left_out = OF_A_RUN | {"data_dir"} if "rows" in settings else OF_A_RUN
    return {name: base_of_arm(value) if name == "init_from" else value
            for name, value in settings.items() if name not in left_out}


def split_options(name: str, text: str, set_here: set) -> list[str]:
    """Split a text of options, the setting `name`. Raises ValueError if it has some of set_here."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r} cannot be split into options: {error}") from None
    taken = set_here & {word.lstrip("-").partition("=")[0] for word in words}
    if taken:
        raise ValueError(f"--{name} must leave out {', '.join(sorted(taken))}, which this script "
                         f"sets")
    return words


def name_of_base(path):
    """Return the last two parts of a base's path: machines keep it at different places."""
    return "/".join(Path(path).parts[-2:]) if isinstance(path, str) else path


def base_of_arm(path):
    """Return the name of a base without its seed, which a base for each seed may have."""
    return re.sub(r"seed_?\d+", "seed", name_of_base(path)) if isinstance(path, str) else path


def options_of(command: str, left_out: set) -> frozenset:
    """Return the --name=value words of a command, the last of each name."""
    try:
        words = shlex.split(command)
    except ValueError:                  # a quote without its end
        words = command.split()
    options = {word.partition("=")[0]: word for word in words if word.startswith("--")}
    return frozenset(word for name, word in options.items()
                     if name.removeprefix("--") not in left_out)
