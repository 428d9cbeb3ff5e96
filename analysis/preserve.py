"""Preservation: what fine-tuning has kept of its base: Wikitext loss and MMLU, compared in pairs.

    python analysis/preserve.py --base=GSAI-ML/LLaDA-8B-Base --models=out/plain,out/jepa
    python analysis/preserve.py --base=... --models=... --tasks=nl_rx,django,gsm8k
    python analysis/preserve.py --grid=out/wide_t       all runs of a grid, and their base

Every model gets the same windows under the same masks and the same questions, so its difference to
the base has a small error. Of a task it gets held-out rows, with masks in the answers. The paper
(arXiv 2606.00091, table 3) reports the mean Wikitext loss minus the base's, and 500 questions of
MMLU. It does not state windows, rates, questions and shots: these are ours. Each model's numbers
are kept in `out`, in a file named after its weights and all it was asked. A second run measures
only what is missing. Of a grid it also prints the paper's table, a line an arm.
"""
import hashlib
import math
import os
import statistics
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import run  # first: it sets variables that torch reads

from analysis.checks import check_count, check_number, check_text, told
from analysis.console import print_table
from analysis.frames import at_chosen, brief_names, frame_of, read_results, with_runs
from analysis.likelihood import check_rates, choose, held_out_losses, losses_of_rows
from analysis.tables import preservation
from model import DLLM
from pretrained.device import pick_device
from pretrained.tokenizer import load_tokenizer
from pretrained.weights import find_weights, weights_file
from sample import load_model
from tasks import mmlu, wikitext
from tasks.common import load_examples, tokenize
from tasks.files import read_json, write_json
from tasks.mixture import folder_of
from tasks.stats import half_95, mcnemar

N_SOLVED = 5    # questions of each subject in MMLU's dev


@dataclass
class PreserveConfig:
    base: str = ""                      # before tuning: a checkpoint, an out_dir or a hub name
    models: tuple[str, ...] = ()        # the same after tuning, one or more, with commas between
    grid: str = ""                      # or an out_dir of grid.py: its runs and their base
    data_dir: str = ""                  # a folder with mmlu/, wikitext/ and TASK/; empty: the hub
    out: str = "out/preserve"           # folder of each model's numbers and of summary.json
    window: int = 512                   # tokens of a window of Wikitext
    n_windows: int = 128                # spread evenly over the text; 0: all
    tasks: tuple[str, ...] = ()         # tasks whose held-out losses are compared, too
    n_rows: int = 256                   # of each task, its first validation rows; 0: all
    rates: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # masking rates
    n_questions: int = 500              # of MMLU, a fixed draw; 0: all 14,042
    n_shot: int = 5                     # solved questions of the same subject before each, up to 5
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights, too; auto: bf16 on GPUs
    device: str = "auto"                # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one

    def __post_init__(self):
        for name in ("n_windows", "n_questions", "n_shot", "n_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.n_shot > N_SOLVED:
            raise ValueError(f"n_shot={self.n_shot} must be at most {N_SOLVED}: MMLU has no more "
                             f"solved questions of a subject")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")


def main(cfg: PreserveConfig):
    cfg = with_runs(cfg)
    summary = preserve(cfg)
    print_tables(summary, cfg)
    if cfg.grid:
        print_arms(summary, cfg)


def preserve(cfg: PreserveConfig) -> dict:
    """Measure all models -> {model: scores, differences to the base}, also in summary.json."""
    check_rates(cfg.rates)
    pick_device(cfg.device)
    for name in (cfg.base, *cfg.models):    # a mistake in the last is told before any download
        find_weights(name)
    text_dir, mmlu_dir = (cfg.data_dir and os.path.join(cfg.data_dir, task)
                          for task in ("wikitext", "mmlu"))
    text, questions = wikitext.load_text("test", text_dir), mmlu.load("test", mmlu_dir)
    questions = mmlu.subset(questions, cfg.n_questions or len(questions))
    shots = mmlu.load("dev", mmlu_dir) if cfg.n_shot else []
    asked = [mmlu.prompts(questions, shots, n) for n in range(cfg.n_shot, -1, -1)]
    gold = [mmlu.LETTERS.index(question.meta["gold"]) for question in questions]
    examples = {task: load_examples(task, "validation", folder_of(task, cfg.data_dir))
                for task in cfg.tasks}

    os.makedirs(cfg.out, exist_ok=True)
    summary, base = {}, None
    for name in dict.fromkeys((cfg.base, *cfg.models)):
        measured = measure(cfg, name, text, asked, examples)
        base = base or measured
        if measured["tokens"] != base["tokens"]:
            raise ValueError(f"{name} and {cfg.base} do not read the same tokens: their tokenizers "
                             f"or block sizes differ")
        summary[name] = {"wikitext": score_losses(measured["losses"], base["losses"]),
                         "mmlu": score_choices(measured["log_p"], base["log_p"], gold),
                         "fewer_shots": measured["fewer_shots"],
                         "tasks": {task: score_losses(losses, base["tasks"][task])
                                   for task, losses in measured["tasks"].items()}}
    write_json(Path(cfg.out) / "summary.json", {"settings": vars(cfg), "models": summary})
    return summary


def measure(cfg: PreserveConfig, name: str, text: str, asked: list[list[str]], examples) -> dict:
    """Read a model's numbers from its file in cfg.out, or measure them and write that file.

    asked: the prompts with n_shot shots, with one fewer, ... with none. examples: {task: rows}.
    Returns losses (N, R) and log_p (questions, 4) as lists; tokens, a hash of all that it read;
    fewer_shots, the number of questions that do not fit into its block_size with n_shot shots;
    tasks, {task: losses (N, R)} of each row's answer and its end-of-text.
    """
    folder, device = find_weights(name), pick_device(cfg.device)
    tok, weights = load_tokenizer(folder), weights_file(folder)
    windows = wikitext.windows(text, tok, cfg.window, cfg.n_windows)
    block_size = DLLM.on_meta(folder).config.block_size
    before, letters, left_out = zip(*(shorten(tok, texts, block_size) for texts in zip(*asked)))
    rows = {}
    for task, some in examples.items():             # a row that exceeds block_size is left out
        fitting = tokenize(some, tok, block_size, task)[:cfg.n_rows or None]
        rows[task] = [(row.prompt + row.answer + [tok.eos_id], len(row.prompt)) for row in fitting]
    # device and dtype too: bf16 and fp32 give different numbers, and differences are small
    kind = device.type + cfg.dtype.removeprefix("auto")
    texts = [windows.tolist(), before, *([rows] if rows else [])]
    key = digest(weights, os.stat(weights).st_mtime_ns, kind, cfg.rates, letters, *texts)
    path = Path(cfg.out) / f"{Path(name).name}_{key}.json"
    if path.is_file():
        measured = read_json(path)
        with told(path, "what preserve.py measured"):
            measured.setdefault("tasks", {})        # files from before there were any
            check_measured(measured, len(windows), len(cfg.rates), len(before), rows)
        return measured

    model, _ = load_model(folder, cfg.device, dtype=cfg.dtype)
    print(f"{name}: {len(windows)} windows, {len(before)} questions", file=sys.stderr)
    losses, log_p = held_out_losses(model, windows, cfg.rates), choose(model, before, letters)
    of_tasks = {task: losses_of_rows(model, some, cfg.rates) for task, some in rows.items()}
    if not all(numbers.isfinite().all() for numbers in (losses, log_p, *of_tasks.values())):
        raise ValueError(f"{name} gives probabilities that are not finite: its weights are broken")
    measured = {"model": name, "weights": weights, "tokens": digest(*texts),
                "fewer_shots": sum(map(bool, left_out)), "losses": losses.tolist(),
                "log_p": log_p.tolist(),
                "tasks": {task: numbers.tolist() for task, numbers in of_tasks.items()}}
    write_json(path, measured)
    return measured


def check_measured(measured: dict, n_windows: int, n_rates: int, n_questions: int, rows: dict):
    """Raise an error unless the numbers have these sizes and are numbers."""
    check_text("tokens", measured["tokens"])
    check_count("fewer_shots", measured["fewer_shots"])
    if not isinstance(measured["tasks"], dict) or measured["tasks"].keys() != rows.keys():
        raise ValueError(f"tasks are not {', '.join(rows) or 'none'}")
    tables = [("losses", measured["losses"], n_windows, n_rates),
              ("log_p", measured["log_p"], n_questions, 4),
              *((task, measured["tasks"][task], len(some), n_rates) for task, some in rows.items())]
    for name, table, n, width in tables:
        if [len(row) for row in table] != [width] * n:
            raise ValueError(f"{name} is not {n} x {width} numbers")
        for value in chain(*table):
            check_number(name, value)


def shorten(tok, texts, block_size: int):
    """Take the first text that leaves room for a letter, else the last -> ids, letters, index."""
    for n, text in enumerate(texts):
        before, letters = mmlu.letter_ids(tok, text)
        if len(before) < block_size:
            break
    return before, letters, n


def digest(*what) -> str:
    """Hash anything that has a repr -> 12 hex digits."""
    return hashlib.blake2b(repr(what).encode(), digest_size=6).hexdigest()


def score_losses(losses, base) -> dict:
    """Losses (N, R) of a model and of the base -> their means and paired differences."""
    differences = [statistics.mean(a) - statistics.mean(b) for a, b in zip(losses, base)]
    return {"n": len(losses), "by_rate": [statistics.mean(column) for column in zip(*losses)],
            "mean": statistics.mean(map(statistics.mean, losses)),
            "minus_base": statistics.mean(differences), "half_95": half_95(differences)}


def score_choices(log_p, base, gold) -> dict:
    """log p (N, 4) of a model and of the base, N right answers -> accuracy, changes to the base."""
    right = [row.index(max(row)) == g for row, g in zip(log_p, gold)]
    was_right = [row.index(max(row)) == g for row, g in zip(base, gold)]
    gained = sum(now and not before for now, before in zip(right, was_right))
    lost = sum(before and not now for now, before in zip(right, was_right))
    n, k = len(right), sum(right)
    return {"right": k, "n": n, "accuracy": k / n, "stderr": math.sqrt(k * (n - k) / n) / n,
            "gained": gained, "lost": lost, "p": mcnemar(gained, lost),
            "mass": statistics.mean(sum(map(math.exp, row)) for row in log_p)}


def print_tables(summary: dict, cfg: PreserveConfig):
    """Print a table of Wikitext, of each task and of MMLU, a line per model."""
    answers = [["", "right", "accuracy %", "stderr", "gained", "lost", "McNemar p", "mass"]]
    labels = brief_names(summary, 17)
    for name, scores in summary.items():
        label, is_base = labels[name], name == cfg.base
        s = scores["mmlu"]
        against = [f"{s['gained']}", f"{s['lost']}", f"{s['p']:.3f}"]
        answers.append([label, f"{s['right']}/{s['n']}", f"{100 * s['accuracy']:.1f}",
                        f"{100 * s['stderr']:.1f}", *(["", "", ""] if is_base else against),
                        f"{s['mass']:.3f}"])
    base = summary[cfg.base]
    short = f" (fewer for {base['fewer_shots']} long questions)" * bool(base["fewer_shots"])
    print(f"\nWikitext: loss per masked token at t; {base['wikitext']['n']} windows of "
          f"{cfg.window} tokens, the same masks")
    print_losses({name: scores["wikitext"] for name, scores in summary.items()}, cfg)
    for task, scores in base["tasks"].items():
        print(f"\n{task}: loss per masked token of the answer at t; {scores['n']} held-out rows, "
              f"the same masks")
        print_losses({name: scores["tasks"][task] for name, scores in summary.items()}, cfg)
    print(f"\nMMLU, {cfg.n_shot}-shot{short}, the likeliest letter")
    print_table(answers)


def print_arms(summary: dict, cfg: PreserveConfig):
    """Print the paper's table with the means over a grid's seeds, a line an arm."""
    best = at_chosen(frame_of(read_results([Path(cfg.grid) / "results.jsonl"])))
    table = preservation(best, [{"settings": vars(cfg), "models": summary}],
                         sorted(set(best["config"])))
    print(f"\n{table.name}")
    print_table([list(table.cells.columns), *table.cells.values.tolist()])


def print_losses(scores: dict, cfg: PreserveConfig):
    """Print a line per model: {model: what score_losses returns}."""
    table = [["", *(f"{t:g}" for t in cfg.rates), "mean", "minus base", "95 %"]]
    labels = brief_names(scores, 17)
    for name, s in scores.items():
        against = [f"{s['minus_base']:+.4f}", f"{s['half_95']:.4f}"]
        losses = [f"{loss:.2f}" for loss in s["by_rate"]]
        table.append([labels[name], *losses, f"{s['mean']:.4f}",
                      *(["", ""] if name == cfg.base else against)])
    print_table(table)


if __name__ == "__main__":
    run(main, PreserveConfig)
