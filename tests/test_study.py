"""Laws of docs/study.md: its commands run as they stand, and print what its first table says.

They run in an empty folder, in the order of the page, with two steps of a tiny model in the place
of each config's own: the config's method, files of its name, and models under the names of theirs.
"""
import importlib
import itertools
import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from analysis import compare
from analysis.arms import ARMS, Arm
from analysis.grid import Grid, GridConfig, cell_of
from configurator import configure
from helpers import ROOT, write_checkpoint, write_gsm8k, write_jsonl
from pretrained.tokenizer import toy_tokenizer
from tasks import toy
from tasks.files import read_json
from test_docs import blocks, prose, settings_of, split_commands
from train import TrainConfig

PAGE = ROOT / "docs/study.md"
COMMANDS = [words for block in blocks(PAGE, "bash") for words in split_commands(block)]
HERE = dict(task="gsm8k", data_dir="data/gsm8k", variant="", max_length=64, batch_size=2,
            micro_batch_size=0, max_steps=2, eval_rows=2, eval_t=(0.2, 1.0), log_every=1,
            forget_task="", shard=False, compile=False, dtype="auto", device="cpu")
MADE_BY_PAGE = Path("out/tiny_base"), Path("out/tiny_hot_base_seed1")
DEFAULTS = vars(TrainConfig())
NEW = dict(tokenizer="toy", n_layer=1, n_embd=32, n_head=2)     # a model from scratch
FEW = " --limit=2 --gen_length=2 --block_length=2 --steps=1 --device=cpu"
# settings of each script that only make it shorter
SHORTER = {
    "analysis/compare.py": lambda cfg: dict(limit=2, device="cpu"),
    "analysis/grid.py": lambda cfg: dict(
        processes=1, seeds=cfg.seeds[:1], lambdas=cfg.lambdas[:2], depths=cfg.depths[:1],
        evaluate=cfg.evaluate + FEW),
    "analysis/probe.py": lambda cfg: dict(n_rows=4, window=32, rates=(0.5,), device="cpu", **(
        dict(data_dir="data/wikitext") if cfg.text == "wikitext" else {})),
    "analysis/preserve.py": lambda cfg: dict(n_windows=2, window=16, n_questions=2, n_shot=0,
                                             rates=(0.5,), data_dir="data", device="cpu"),
}


def parts_of_page() -> dict:
    """{number: commands} of the block whose comments number them."""
    [block] = [block for block in blocks(PAGE, "bash") if block.startswith("# 1 ")]
    parts = re.split(r"(?m)^# (\d+)  .*$", block)[1:]
    return {number: split_commands(text) for number, text in zip(parts[::2], parts[1::2])}


def rows_of_page() -> list[list[str]]:
    """The rows of the page's first table: cells as text."""
    table = re.search(r"(?m)^\| item \|.*\n\|[-|]+\n((?:\|.*\n)+)", prose(PAGE))[1]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with stand-ins for configs, models and data; runs are in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Grid, "launch", lambda grid, command, output: Done(command))
    monkeypatch.setattr(compare, "run_all",
                        lambda jobs, n: [run_here(command) for _, command in jobs])
    monkeypatch.setattr("analysis.grid.PAUSE", 0, raising=False)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    # what takes long when it is asked for at each of two hundred runs
    monkeypatch.setattr("configurator.get_type_hints", cache(get_type_hints))
    for module in ("training.log", "analysis.grid"):
        monkeypatch.setattr(f"{module}.git_commit", lambda: "0123abc")
    Path("results").symlink_to(ROOT / "results")
    Path("config").mkdir()
    for path in sorted(ROOT.glob("config/*.py")):
        write_stand_in(f"config/{path.name}")
    for folder in ("gsm8k", "wikitext", "mmlu"):
        Path("data", folder).mkdir(parents=True)
    rows = [{"question": f"{story} {question}", "answer": "\n".join(steps) + "\n#### 1"}
            for story, question, steps in toy.problems("test", 8)]
    write_jsonl(write_gsm8k(Path("data/gsm8k")) / "test.jsonl", rows)
    write_jsonl(Path("data/wikitext/test.jsonl"),
                [{"text": f" line {i} of {i * i} lines \n"} for i in range(40)])
    write_jsonl(Path("data/mmlu/test.jsonl"),
                [{"question": f"{i}?", "subject": "sums", "choices": list("1234"), "answer": 1}
                 for i in range(4)])
    return tmp_path


def write_stand_in(path: str):
    """Write a config as it is, but for its size and data; and a model under its init_from."""
    own = vars(configure(TrainConfig, [str(ROOT / path)]))
    settings = {**own, **HERE, **({} if own["init_from"] else NEW)}.items() - DEFAULTS.items()
    Path(path).write_text("".join(f"{name} = {value!r}\n" for name, value in settings))
    base = Path(own["init_from"] or "out/smollm2_nl_rx")    # what the front page's commands make
    if not base.is_dir() and base not in MADE_BY_PAGE:
        base.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(base, toy_tokenizer())


class Done:
    """A process of a grid that has run here, and ended well."""
    returncode, poll = 0, lambda self: 0
    wait = terminate = lambda self: None

    def __init__(self, command):
        run_here(command)


def run_here(words: list[str]):
    """Run a script in this process, with the settings that make it shorter."""
    script, *options = words
    cfg = configure(settings_of(script), options)
    if script in SHORTER:
        cfg = replace(cfg, **SHORTER[script](cfg))
    importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(cfg)


def run_command(words: list[str]):
    """Run a command of the page, unless it is one of pip's."""
    if words[0] == "python":
        run_here(words[1:])
    elif words[0] == "tail":
        print(subprocess.run(words, text=True, capture_output=True, check=True).stdout)
    else:
        assert words[0] == "pip"


# ---- the paper's items ----


def test_each_command_for_the_paper_runs_and_prints_what_the_table_says(here, capsys):
    said = {}
    for number, commands in parts_of_page().items():
        for words in commands:
            run_command(words)
        said[number] = capsys.readouterr().out
    rows = rows_of_page()
    assert {row[1] for row in rows} == said.keys()
    for item, number, shown, _ in rows:
        for name in re.findall(r"figure `(\w+)`", shown):
            assert re.search(rf"out/figures/\S*/{name}.png, .svg: ", said[number]), (item, name)
        for name in re.findall(r"(?<!figure )`([^`]+)`", shown):
            assert name in said[number], (item, name)
    cells = {Path(path).stem for path in parts_of_page()["1"][0][2].partition("=")[2].split(",")}
    for number, table, n_rows, configs in (
            ("1", "Main table, 4-shot", 8, cells), ("1", "0-shot", 8, cells),
            ("2", "Sensitivity to the rates", 4, {"llada8b_gsm8k"}),
            ("3", "Ablation", 4, {"llada8b_gsm8k"})):
        text = said[number].partition(f"\n## {table}")[2].partition("\n## ")[0]
        rows = [line for line in text.splitlines() if line.startswith("| ")
                and line.split()[1] in configs]
        assert len(rows) == n_rows and "not run" not in "".join(rows), (table, rows)
    table = said["5"].partition("\nBase preservation\n")[2]
    ours = [line for line in table.splitlines() if "llada8b_gsm8k_wide_t" in line]
    assert len(ours) == 4 and "not run" not in "".join(ours)


def test_the_other_commands_of_the_page_run(here):
    papers = [words for commands in parts_of_page().values() for words in commands]
    for words in COMMANDS:
        if words not in papers:
            run_command(words)
    assert Path("out/study.html").is_file() and Path("out/figures/ablation.png").is_file()


def test_each_run_of_the_pages_grids_is_one_that_train_py_takes():
    """With the configs themselves, all arms, weights and depths; without running."""
    grids = [words[2:] for words in COMMANDS if words[1] == "analysis/grid.py"]
    assert len(grids) > 6
    for options in grids:
        cfg = configure(GridConfig, options)
        for path in cfg.configs:
            for pair in itertools.product(cfg.lambdas or (1.0,), cfg.depths or (2,)):
                names = {cell_of(cfg, path, arm, pair, 1).folder for arm in cfg.arms}
                assert len(names) == len(cfg.arms)


# ---- an arm of one's own ----


def test_the_arm_of_the_page_is_one_line_and_is_trained_by_its_name(here, capsys, monkeypatch):
    [line] = [block for block in blocks(PAGE, "python") if "Arm(" in block]
    assert len(line.splitlines()) == 1
    [(name, arm)] = eval("{" + line + "}", {"Arm": Arm}).items()
    [option] = [text for text in re.findall(r"`--arms=(\S+)`", prose(PAGE)) if name in text]
    monkeypatch.setitem(ARMS, name, arm)
    run_here(["analysis/grid.py", "--configs=config/tiny_study.py", f"--arms={option}",
              "--n_shots=0", "--train=--init_from=GSAI-ML/LLaDA-8B-Base", "--out_dir=out/mine"])
    assert f"| tiny_study | {arm.label} |" in capsys.readouterr().out
    run_here(["analysis/plot.py", "--inputs=out/mine", "--figure=ablation", "--out=out/figures"])
    [run] = Path("out/mine/tiny_study").glob(f"{name}_*")
    assert read_json(run / "settings.json")["t_tgt"] == 0.95
