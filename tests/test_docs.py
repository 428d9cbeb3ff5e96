"""Laws of the pages: commands parse, files and links exist, every setting is used or explained."""
import ast
import importlib
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from configurator import configure
from helpers import python
from tasks import common

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TODAY = [page for page in PAGES if page.name != "LOG.md"]     # the log is history, as written
PROGRAMS = {"python", "python3", "torchrun", "pip", "source", "tail"}
TORCHRUN = {"nproc_per_node", "nnodes", "standalone", "rdzv_backend", "rdzv_endpoint"}
SLURM = {"signal", "kill-on-bad-exit", "ntasks"}
PIP = {"index-url"}
EXAMPLES = {"tasks/mine.py", "config/mine.py"}      # files that a page tells the reader to write


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language, "" for those without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.S | re.M)
    return [text for name, text in found if name == language]


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", page.read_text(), flags=re.S | re.M)


def split_commands(text: str) -> list[list[str]]:
    """Return the commands of shell text as lists of words, comments and NAME=value left out."""
    text = re.sub(r"(?m)(^|\s)# .*$", "", text.replace("\\\n", " "))
    commands = [[]]
    for line in text.splitlines():
        for word in [*shlex.split(line), "&&"]:
            if word in ("&&", "|"):
                commands.append([])
            elif commands[-1] or not re.fullmatch(r"[A-Z_]+=\w+", word):
                commands[-1].append(word)
    return [command for command in commands if command]


def commands_of_pages() -> list:
    """Those of all blocks of bash; and of sh, which has whole scripts, those that start Python."""
    found = [(page, words) for page in TODAY for block in blocks(page, "bash")
             for words in split_commands(block)]
    found += [(page, split_commands(line)[0]) for page in TODAY for block in blocks(page, "sh")
              for line in re.findall(r"\bpython .*", block.replace("\\\n", ""))]
    return [pytest.param(words, id=f"{page.name}: {shlex.join(words)[:70]}")
            for page, words in found]


def commands_of_docstrings() -> list:
    """The indented lines of a module's docstring that start a script, up to a double blank."""
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]:
        if path.parent.name == "tests":
            continue
        text = (ast.get_docstring(ast.parse(path.read_text())) or "").replace("\\\n", "")
        for line in re.findall(r"^ +((?:python|torchrun)\s.*)$", text, re.M):
            words = split_commands(re.sub(r"(?<=\S)   +--", " --", line).split("   ")[0])[0]
            found.append(pytest.param(words, id=f"{path.relative_to(ROOT)}: {line[:60]}"))
    return found


def settings_of(script: str):
    """Return the dataclass that a script runs with, as its last lines say: run(main, Settings)."""
    for node in ast.walk(ast.parse((ROOT / script).read_text()).body[-1]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "run":
            name = script.removesuffix(".py").replace("/", ".")
            return getattr(importlib.import_module(name), ast.unparse(node.args[1]))
    raise AssertionError(f"{script} is not a script")


def all_settings() -> dict:
    """{script: its settings} of every script of the project."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
    found = [str(path.relative_to(ROOT)) for path in paths if path.parent.name != "tests"
             and re.search(r"^if __name__ == .*\n.*\brun\(", path.read_text(), re.M)]
    return {script: settings_of(script) for script in sorted(found)}


def check_script(words: list[str]):
    """Parse a script's options, and the options for other scripts that it passes on."""
    cls, options = settings_of(words[0]), words[1:]
    if "--help" in options:
        with pytest.raises(SystemExit):
            configure(cls, options)
        return
    cfg = configure(cls, options)
    if getattr(cfg, "train", ""):
        for config in getattr(cfg, "configs", (getattr(cfg, "tune", None),)):
            configure(settings_of("train.py"), [config, *shlex.split(cfg.train)])
    if getattr(cfg, "evaluate", ""):
        configure(settings_of("eval_gsm8k.py"), shlex.split(cfg.evaluate))


def check_command(words: list[str]):
    program = words[0].removeprefix(".venv/bin/")
    assert program in PROGRAMS, f"{program} is not a program that a page may start"
    rest = words[1:]
    while program == "torchrun" and rest[0].startswith("--"):
        assert rest[0][2:].split("=")[0] in TORCHRUN, rest[0]
        rest = rest[1:]
    if rest[0].endswith(".py"):
        return check_script(rest)
    for word in rest:
        assert not word.endswith(".py") or (ROOT / word).is_file(), f"{word} is not there"
        assert not word.endswith(".txt") or (ROOT / word).is_file(), f"{word} is not there"


@pytest.mark.parametrize("words", commands_of_pages())
def test_every_command_of_a_page_parses(words):
    check_command(words)


@pytest.mark.parametrize("words", commands_of_docstrings())
def test_every_command_of_a_docstring_parses(words):
    if "$" not in "".join(words):
        check_command(words)


def test_a_command_that_is_wrong_is_seen():
    wrong = ("python train.py --lrr=1", "python nothing.py", "python train.py config/nothing.py",
             "torchrun --nproc=8 train.py", "pip install -r nothing.txt", "wget x",
             'python analysis/grid.py --configs=config/nl_rx_words.py --train="--lrr=1"')
    for line in wrong:
        with pytest.raises((AssertionError, ValueError, OSError)):
            check_command(*split_commands(line))
    assert split_commands("A=1 python a.py --x='# y'  # z\ncd b && c | d \\\n e") == [
        ["python", "a.py", "--x=# y"], ["cd", "b"], ["c"], ["d", "e"]]


# ----------------------------------------------------------------------------------------------
# the front page


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 200
    for number, line in enumerate(lines, 1):    # one command has to stay on its line: .ci/run
        assert len(line) <= 100 or "python -m pytest" in line, f"line {number}"


def test_the_readme_has_its_two_commands_near_the_top():
    lines = (ROOT / "README.md").read_text().splitlines()[:60]
    commands = [line for line in lines if line.startswith("python3 -m venv ")]
    assert any(line.endswith("python train.py") for line in commands)
    assert any("python -m pytest" in line for line in commands)


def test_the_readme_lists_the_top_level():
    text = (ROOT / "README.md").read_text()
    for path in [*ROOT.glob("*.py"), *(path.parent for path in ROOT.glob("[a-z]*/*.py"))]:
        name = path.name + "/" * path.is_dir()
        assert re.search(rf"^{re.escape(name)}  ", text, re.M), name


# ----------------------------------------------------------------------------------------------
# links, files, settings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_image_is_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.is_relative_to(ROOT) and path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(path), re.M)
            assert anchor in map(slug, headings), target


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_can_be_reached_from_the_readme():
    """In two steps at most: by itself, or by a page that it names."""
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", (ROOT / "README.md").read_text()))
    for name in list(linked):
        linked |= set(re.findall(r"\]\((\w+\.md)", (ROOT / "docs" / name).read_text()))
    assert linked == {page.name for page in PAGES[1:]}


@pytest.mark.parametrize("page", TODAY, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    for name in re.findall(r"`((?:\w+/)*[\w.]+\.(?:py|md|txt))`", prose(page)):
        published = page.name == "sampling.md" and name in ("generate.py", "generation_utils.py")
        assert name in EXAMPLES or published or (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", TODAY, ids=lambda page: page.name)
def test_every_option_that_a_page_names_is_a_setting(page):
    known = {field.name for cls in all_settings().values() for field in fields(cls)}
    for text in re.findall(r"`([^`]*)`", prose(page)):
        for name in re.findall(r"(?:^|\s)--([\w-]+)", text):
            assert name in known | TORCHRUN | SLURM | PIP | {"help"}, name


def test_every_setting_is_in_some_config_or_explained():
    """An option that no config uses and no page explains goes."""
    used = {node.targets[0].id for path in ROOT.glob("config/*.py")
            for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)}
    text = "\n".join(page.read_text() for page in TODAY)
    explained = set(re.findall(r"`(\w+)`", text)) | set(re.findall(r"--(\w+)", text))
    scripts = all_settings()
    assert {"train.py", "sample.py", "eval_gsm8k.py", "analysis/grid.py"} <= set(scripts)
    for script, cls in scripts.items():
        names = {field.name for field in fields(cls)}
        assert names <= explained | (used if script == "train.py" else set()), (
            script, names - explained - used)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_no_private_path(page):
    assert not re.findall(r"\.\./shared|/work/|/tmp/|/root/|/home/", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_no_placeholder(page):
    assert not re.findall(r"\b[A-Z]+_[A-Z]+_(?:OUTPUT|TABLE)\b|\bTODO\b", page.read_text())


def test_every_paragraph_of_a_table_has_as_many_cells():
    for page in PAGES:
        rows = [line for line in prose(page).splitlines()]
        for above, line in zip(rows, rows[1:]):
            if above.startswith("|") and line.startswith("|"):
                assert above.count("|") == line.count("|"), f"{page.name}: {line}"


# ----------------------------------------------------------------------------------------------
# own data: the page's commands and its task


def test_the_commands_for_own_data_lead_from_rows_to_an_exported_model(tmp_path, monkeypatch,
                                                                       capsys):
    """Those of the page, in an empty folder; shorter where only numbers depend on it."""
    monkeypatch.chdir(tmp_path)
    commands = [words for block in blocks(ROOT / "docs/own_data.md", "bash")
                for words in split_commands(block)][:5]
    made = python(*commands[0][1:], cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    shorter = {"train.py": ["--max_steps=2", "--eval_rows=2"], "eval_gsm8k.py": ["--limit=3"]}
    for _, script, *options in commands[1:]:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        module.main(configure(settings_of(script), options + shorter.get(script, [])))
    said, page = capsys.readouterr().out, (ROOT / "docs/own_data.md").read_text()
    for line in said.splitlines():      # what does not depend on the training is pasted
        if line.startswith(("jsonl train", "jsonl validation", "model: always", "out/dates_publ")):
            assert line.split("commonest")[0] in page, line
    assert {path.name for path in (tmp_path / "out/dates_published").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json"}


def test_the_task_of_the_page_keeps_the_contract_in_15_lines(tmp_path, monkeypatch):
    source = next(block for block in blocks(ROOT / "docs/own_data.md", "python")
                  if "def load" in block)
    assert len([line for line in source.splitlines() if line]) == 15
    for path in (ROOT / "tasks").glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    monkeypatch.setattr("tasks.__path__", [str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for split in ("train", "test"):
        (tmp_path / f"{split}.tsv").write_text("".join(f"a{i}\tB{i}\n" for i in range(60)))
    try:
        examples = {split: common.load_examples("mine", split, str(tmp_path))
                    for split in common.SPLITS}
        mine = common.load_task("mine")
    finally:
        sys.modules.pop("tasks.mine", None)
    assert {split: len(some) for split, some in examples.items()} == {
        "train": 10, "validation": 50, "test": 60}
    first, second = examples["test"][:2]
    assert common.few_shot([second], [first])[0].prompt == (
        "English: a0\nFrench: B0\n\nEnglish: a1\nFrench:")
    assert mine.score(first.answer, first) and mine.score(" b0\n\nEnglish: a1", first)
    assert not mine.score(second.answer, first) and mine.extract("  ") is None


@pytest.mark.parametrize("path", [*ROOT.glob("config/llada8b_*"), *ROOT.glob("config/dream7b_*")],
                         ids=lambda path: path.stem)
def test_a_run_of_two_hundred_steps_saves_before_its_end(path):
    assert configure(settings_of("train.py"), [str(path)]).save_every <= 100
