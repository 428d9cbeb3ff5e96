"""Laws of the whole project: where files stand, that imports point down, what configs say."""
import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import configure
from helpers import write_checkpoint
from pretrained.tokenizer import byte_tokenizer
from tasks.common import load_task
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("config/*.py"))

# From the ground to the roof. A file imports, or starts, what lies below it, or in its own folder.
FLOORS = ["configurator", "tasks", "pretrained", "model", "sampling", "sample", "jepa", "training",
          "eval_gsm8k", "train", "analysis"]
FOLDERS = {"tasks", "pretrained", "sampling", "training", "analysis"}
TOP = {"README.md", "LICENSE", "requirements.txt", "requirements-plots.txt", ".gitignore",
       *(f"{name}.py" for name in FLOORS if name not in FOLDERS)}
LINES = {"configurator.py": 190, "model.py": 400, "jepa.py": 200, "train.py": 250,
         "sample.py": 250, "eval_gsm8k.py": 300}
SOURCES = sorted(path for folder in ("", *FOLDERS) for path in (ROOT / folder).glob("*.py"))
STARTS = ("subprocess.", "os.exec", "os.spawn", "os.system", "os.popen", "runpy.", "torchrun")


def room_of(path) -> str:
    """The file itself on the top level, else its folder."""
    return path.parent.name if path.parent != ROOT else path.stem


def modules_in(tree):
    """The dotted names of all modules that the code imports, at its top or within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def scripts_in(tree):
    """The scripts of the project that code which starts processes names, docstrings left out."""
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if not any(call.startswith(STARTS) for call in calls):
        return
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
             and isinstance(node.value, str)}
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))}
    for path in SOURCES:
        names = {str(path.relative_to(ROOT)), path.name}
        if any(word in names for text in texts - docs for word in text.split()):
            yield path


def arrows_of(tree) -> set:
    """The rooms of the project that the code imports or starts."""
    imported = {name.split(".")[0] for name in modules_in(tree)} & set(FLOORS)
    return imported | {room_of(path) for path in scripts_in(tree)}


# ----------------------------------------------------------------------------------------------
# the house


def test_the_top_level_holds_the_seven_files_and_nothing_more():
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to tell the project's files from the user's")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    found = {tuple(line.split("/")) for line in listed.stdout.splitlines()}
    folders = FOLDERS | {"config", "tests", "docs", "results", ".ci"}
    assert {parts[0] for parts in found if len(parts) == 1} == TOP
    assert {parts[0] for parts in found if len(parts) > 1} == folders
    assert {room_of(path) for path in SOURCES} == set(FLOORS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_and_started_scripts_point_down(path):
    room = room_of(path)
    allowed = set(FLOORS[:FLOORS.index(room)]) | {room}
    assert arrows_of(ast.parse(path.read_text())) <= allowed


def test_no_two_files_of_a_folder_import_each_other_in_a_circle():
    imports = {}
    for path in SOURCES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        imports[name] = set(modules_in(ast.parse(path.read_text())))
    ours, left = set(imports), dict(imports)
    while left:                                 # take away what needs nothing that is left
        free = [name for name in left if not left[name] & (left.keys() - {name})]
        assert free, f"a circle among {', '.join(sorted(left))}"
        for name in free:
            del left[name]
    assert {"train", "tasks.toy", "training.setup"} <= ours


@pytest.mark.parametrize("code, room", [
    ("import subprocess\nsubprocess.run(['python', 'train.py'])", "train"),
    ("import os\nos.execv('python', ['python', 'analysis/compare.py'])", "analysis"),
    ("import os\ndef f():\n    os.execv('x', [f'{ROOT}', 'compare.py'])", "analysis"),
    ("import runpy\nrunpy.run_path('sample.py')", "sample"),
    ("def f():\n    from eval_gsm8k import main", "eval_gsm8k"),
    ("import importlib\nimportlib.import_module('training.log')", "training"),
])
def test_the_law_of_arrows_sees_what_is_started_and_what_is_imported_late(code, room):
    assert arrows_of(ast.parse(code)) == {room}


def test_a_script_starts_and_loads_weights_without_what_few_runs_need(tmp_path):
    """torch.compile takes a second to import, FSDP and the hub half of one."""
    folder = write_checkpoint(tmp_path / "model", byte_tokenizer())
    rare = "torch._dynamo", "torch.distributed.fsdp", "datasets", "huggingface_hub", "pandas"
    code = (f"import sys, train, model\nmodel.DLLM.from_pretrained({str(folder)!r})\n"
            f"print([name for name in {rare} if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_core_stays_short_enough_for_an_evening():
    for name, most in LINES.items():
        n = len((ROOT / name).read_text().splitlines())
        assert n <= most, f"{name} has {n} lines, {most} are planned"


def test_train_knows_nothing_of_what_a_first_reading_skips():
    text = (ROOT / "train.py").read_text().lower()
    for word in ("lora", "lean", "anchor", "control", "diagnostic", "dtensor", "full_tensor"):
        assert word not in text, word


def test_lines_have_at_most_100_columns():
    for path in [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("config/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.relative_to(ROOT)}, line {number}"


# ----------------------------------------------------------------------------------------------
# the code


def bounds(path) -> list:
    """[(name, floor, ceiling)] of a requirements file; versions are tuples of ints."""
    found = re.findall(r"^([\w-]+)>=([\d.]+),<([\d.]+)$", (ROOT / path).read_text(), re.M)
    return [(name, *(tuple(map(int, text.split("."))) for text in pair)) for name, *pair in found]


def test_each_package_has_a_floor_and_a_ceiling_around_the_tested_version():
    pinned = re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests/constraints.txt").read_text(), re.M)
    tested = {name: tuple(map(int, text.split("."))) for name, text in pinned}
    paths = "requirements.txt", "requirements-plots.txt", "tests/requirements.txt"
    for path in paths:
        lines = [line for line in (ROOT / path).read_text().split("\n") if line]
        assert len(bounds(path)) == len(lines) - lines.count("-c constraints.txt"), path
        for name, floor, ceiling in bounds(path):
            assert floor <= tested[name] < ceiling, name
    assert tested.keys() == {name for path in paths for name, *_ in bounds(path)}


def test_only_the_stated_packages_are_imported():
    stated = {name for name, *_ in bounds("requirements.txt")}
    stated = {{"automata-lib": "automata"}.get(name, name) for name in stated}
    for path in SOURCES:
        extra = {"plot.py": {"matplotlib"}, "drawing.py": {"matplotlib"},
                 "harness.py": {"lm_eval"}, "from_gguf.py": {"transformers", "gguf"},
                 "track.py": {"wandb"}}.get(path.name, set())
        used = {name.split(".")[0] for name in modules_in(ast.parse(path.read_text()))}
        assert used - set(sys.stdlib_module_names) - set(FLOORS) <= stated | extra, path.name


def test_nothing_works_at_import():
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            works = isinstance(node, (ast.For, ast.While, ast.With, ast.Try)) or (
                isinstance(node, ast.If) and "__name__" not in ast.unparse(node.test))
            assert not works, f"{path.name} line {node.lineno}"


def test_nothing_is_unpickled_or_executed():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("exec", "eval", "torch.load", "torch.save", "pickle.load",
                                  "pickle.loads"), path.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_imports(path):
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def test_collectives_have_one_home():
    """torch.distributed is used in training/ranks.py, and FSDP and DCP in training/sharding.py."""
    for path in SOURCES:
        names = set(modules_in(ast.parse(path.read_text())))
        if path.name not in ("ranks.py", "sharding.py"):
            assert not any(name.startswith("torch.distributed") for name in names), path.name


# ----------------------------------------------------------------------------------------------
# the configs


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_loads_and_says_what_it_is(config):
    cfg = configure(TrainConfig, [config])
    assert cfg.out_dir != TrainConfig.out_dir and ".." not in cfg.data_dir
    load_task(cfg.task)
    assert ast.get_docstring(ast.parse((ROOT / config).read_text()))


def differing(*configs) -> dict:
    one, other = (vars(configure(TrainConfig, [f"config/{name}.py"])) for name in configs)
    return {key: other[key] for key in one if one[key] != other[key]}


def test_the_tiny_configs_differ_where_they_say_so():
    assert differing("tiny_tune", "tiny_paper") == {
        "out_dir": "out/tiny_paper", "diffusion_t": "context", "loss_form": "masked_mean"}
    assert differing("tiny", "tiny_tune").keys() == {
        "out_dir", "init_from", "tokenizer", "forget_task", "test_questions"}


def test_the_papers_two_configurations_are_the_papers():
    aggressive = configure(TrainConfig, ["config/llada8b_gsm8k.py"])
    wide = configure(TrainConfig, ["config/llada8b_gsm8k_wide_t.py"])
    assert (aggressive.lr, aggressive.t_ctx, aggressive.t_tgt) == (1e-5, 0.2, 0.7)
    assert (wide.lr, wide.t_ctx, wide.t_tgt) == (1.4e-6, 0.1, 0.9)
    for cfg in (aggressive, wide):
        assert (cfg.epochs, cfg.ema_decay, cfg.max_steps) == (2, 0.996, 0)
        assert (cfg.diffusion_t, cfg.loss_form) == ("context", "masked_mean")
        assert cfg.task == "gsm8k" and cfg.lambda_jepa in (0.5, 1, 2)


BIG = {path.stem: configure(TrainConfig, [f"config/{path.name}"])
       for path in sorted((ROOT / "config").glob("*[78]b_*.py"))}


@pytest.mark.parametrize("name", BIG)
def test_the_8b_configs_are_the_papers_but_for_what_they_are_named_after(name):
    cfg, wide = BIG[name], name.endswith(("wide_t", "anchor"))
    assert cfg.init_from == {"llada8b": "GSAI-ML/LLaDA-8B-Base",
                             "dream7b": "Dream-org/Dream-v0-Base-7B"}[name.split("_")[0]]
    assert (cfg.epochs, cfg.batch_size, cfg.ema_decay, cfg.seed) == (2, 64, 0.996, 42)
    assert (cfg.diffusion_t, cfg.loss_form) == ("context", "masked_mean")
    assert cfg.mask_scope == "response"
    assert (cfg.t_ctx, cfg.t_tgt) == ((0.1, 0.9) if wide else (0.2, 0.7))
    assert cfg.lr == (2e-4 if name.endswith("lora") else 1.4e-6 if wide else 1e-5)
    assert (cfg.lambda_jepa, cfg.anchor) == ((0, 1e-4) if name.endswith("anchor") else (1, 0))
    assert cfg.n_pred_layer == (1 if name.endswith("lora") else 2)
    assert name.split("_", 1)[1].startswith(cfg.task) and cfg.out_dir == f"out/{name}"
    assert cfg.shard == (not name.endswith(("lora", "1gpu")))
    assert (cfg.lora_rank, cfg.optimizer) == (32 * name.endswith("lora"),
                                              "lean" if name.endswith("1gpu") else "adamw")


def test_models_from_scratch_have_one_optimizer():
    kept = {tuple(getattr(configure(TrainConfig, [f"config/{name}.py"]), setting) for setting in (
        "lr", "min_lr_ratio", "warmup_ratio", "beta2", "weight_decay"))
        for name in ("tiny", "tiny_base", "tiny_tune", "tiny_paper", "tiny_study", "gsm8k_bytes",
                     "nl_rx_words")}
    assert kept == {(2e-3, 0.02, 0.1, 0.95, 0.01)}
