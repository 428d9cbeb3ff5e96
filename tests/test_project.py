"""Laws of the whole project: all configs load, all README commands parse, imports point down."""
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from analysis.grid import GridConfig
from analysis.plot import PlotConfig
from analysis.preserve import PreserveConfig
from analysis.probe import ProbeConfig
from analysis.report import ReportConfig
from analysis.tables import TablesConfig
from configurator import configure
from eval_gsm8k import GSM8KConfig
from evaluate import EvalConfig
from pretrained.weights import ConvertConfig
from sample import SampleConfig
from sampling.chat import ChatConfig
from tasks.common import load_task
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"train.py": TrainConfig, "analysis/compare.py": TrainConfig, "sample.py": SampleConfig,
            "evaluate.py": EvalConfig, "eval_gsm8k.py": GSM8KConfig, "weights.py": ConvertConfig,
            "chat.py": ChatConfig, "analysis/preserve.py": PreserveConfig,
            "analysis/grid.py": GridConfig, "analysis/tables.py": TablesConfig,
            "analysis/probe.py": ProbeConfig, "analysis/plot.py": PlotConfig,
            "analysis/report.py": ReportConfig}
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("config/*.py"))

# what a file may import of the project; the arrows all point down
LEVELS = {
    "configurator.py": set(), "weights.py": {"configurator"}, "model.py": {"weights"},
    "jepa.py": {"model"}, "diagnostics.py": set(), "log.py": {"diagnostics"},
    "controls.py": {"jepa", "model", "diagnostics", "sharding", "weights"},
    "lora.py": {"model", "weights"}, "lean.py": set(),
    "sharding.py": {"weights"}, "checkpoint.py": {"weights", "sharding", "lora"},
    "cache.py": {"model"}, "reveal.py": {"model"}, "likelihood.py": {"model"},
    "sample.py": {"model", "weights", "tasks", "configurator", "cache", "reveal", "view"},
    "train.py": {"model", "weights", "jepa", "controls", "diagnostics", "log", "lora", "lean",
                 "sharding", "checkpoint", "tasks", "configurator"},
    "stats.py": set(), "answers.py": set(),
    "evaluate.py": {"stats", "answers", "sample", "reveal", "checkpoint", "weights", "tasks",
                    "configurator"},
    "eval_gsm8k.py": {"evaluate", "configurator"},
    "view.py": set(), "chat.py": {"sample", "view", "tasks", "configurator"},
    "tasks/*.py": {"tasks"},
    "analysis/*.py": {"model", "weights", "jepa", "reveal", "sample", "likelihood", "train",
                      "stats", "answers", "evaluate", "view", "log", "tasks", "configurator",
                      "analysis"},      # report.py shows what plot.py draws
}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_point_down():
    ours = {path.stem for path in ROOT.glob("*.py")} | {"tasks", "analysis"}
    seen = set()
    for pattern, allowed in LEVELS.items():
        for path in ROOT.glob(pattern):
            seen.add(path)
            assert set(imports_of(path)) & ours <= allowed, path.name
    every = {path for folder in ("", "tasks/", "analysis/") for path in ROOT.glob(f"{folder}*.py")}
    assert seen == every, "a file without a level"


def test_only_the_stated_packages_are_imported():
    stated = {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().split()}
    stated = {{"automata-lib": "automata"}.get(name, name) for name in stated}
    import sys
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tasks/*.py"), *ROOT.glob("analysis/*.py")]:
        ours = {path.stem for path in ROOT.glob("*.py")} | {"tasks", "analysis"}
        extra = {"matplotlib"} if path.name == "plot.py" else set()     # requirements-plots.txt
        assert set(imports_of(path)) - set(sys.stdlib_module_names) - ours <= stated | extra, \
            path.name


def test_nothing_runs_at_import():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tasks/*.py"), *ROOT.glob("analysis/*.py")]:
        for node in ast.parse(path.read_text()).body:
            works = isinstance(node, (ast.For, ast.While, ast.With, ast.Try)) or (
                isinstance(node, ast.If) and "__name__" not in ast.unparse(node.test))
            assert not works, f"{path.name} line {node.lineno}"


def test_nothing_is_unpickled_or_executed():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tasks/*.py"), *ROOT.glob("analysis/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("exec", "eval", "torch.load", "torch.save", "pickle.load",
                                  "pickle.loads"), path.name


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_loads_and_says_what_it_is(config):
    cfg = configure(TrainConfig, [config])
    assert cfg.out_dir != TrainConfig.out_dir
    load_task(cfg.task)
    assert ast.get_docstring(ast.parse((ROOT / config).read_text()))


def test_every_setting_is_used_by_some_config_or_is_about_the_run():
    """An option that no config uses goes. These are for the command line of the day."""
    about_the_run = {"seed", "resume", "device", "dtype", "compile", "variant", "mask_scope",
                     "micro_batch_size", "grad_clip", "ema_decay", "eval_t", "revision",
                     "export_dir", "eos_fill", "jepa_rate", "pack", "checkpoint_activations",
                     "keep", "on_nan"}
    # each control has its command in README's table
    about_the_run |= {"objective", "target", "masks", "pool", "pool_layer", "pred_width", "pred_lr",
                      "ema_dtype"}
    used = {node.targets[0].id for config in CONFIGS
            for node in ast.parse((ROOT / config).read_text()).body if isinstance(node, ast.Assign)}
    assert set(TrainConfig.__dataclass_fields__) - used <= about_the_run


def test_tiny_paper_is_tiny_but_for_the_papers_single_pass():
    tiny = configure(TrainConfig, ["config/tiny.py"])
    paper = configure(TrainConfig, ["config/tiny_paper.py"])
    differ = {key: getattr(paper, key) for key in vars(tiny)
              if getattr(tiny, key) != getattr(paper, key)}
    assert differ == {"out_dir": "out/tiny_paper", "diffusion_t": "context",
                      "loss_form": "masked_mean"}


def test_the_papers_two_configurations_are_the_papers():
    aggressive = configure(TrainConfig, ["config/llada8b_gsm8k.py"])
    wide = configure(TrainConfig, ["config/llada8b_gsm8k_wide_t.py"])
    assert (aggressive.lr, aggressive.t_ctx, aggressive.t_tgt) == (1e-5, 0.2, 0.7)
    assert (wide.lr, wide.t_ctx, wide.t_tgt) == (1.4e-6, 0.1, 0.9)
    for cfg in (aggressive, wide):
        assert (cfg.epochs, cfg.ema_decay, cfg.max_steps) == (2, 0.996, 0)
        assert (cfg.diffusion_t, cfg.loss_form) == ("context", "masked_mean")
        assert cfg.task == "gsm8k" and cfg.lambda_jepa in (0.5, 1, 2)


def readme_commands():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    return [command.strip() for block in blocks for line in block.splitlines()
            for command in line.split("#")[0].split("&&") if command.strip()]


def test_the_readme_has_its_two_commands_at_the_top():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines()[:60] if "venv" in line]
    assert any(line.rstrip().endswith("python train.py") for line in lines)
    assert any("python -m pytest" in line for line in lines)


@pytest.mark.parametrize("command", readme_commands())
def test_every_readme_command_parses(command):
    words = shlex.split(command)
    scripts = [i for i, word in enumerate(words) if word.endswith(".py") and word in SETTINGS]
    if scripts and "--help" in words:
        with pytest.raises(SystemExit):
            configure(SETTINGS[words[scripts[0]]], words[scripts[0] + 1:])
    elif scripts:
        configure(SETTINGS[words[scripts[0]]], words[scripts[0] + 1:])
    else:                                   # installing, testing: only what is really there
        assert words[0] in ("git", "cd", "python", "python3", "head") or ".venv/bin/" in words[0]
        for word in words:
            if word.endswith(".txt"):
                assert (ROOT / word).is_file(), word
            assert not word.endswith(".py"), f"{word} is no script of this project"


def test_the_modules_import():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tasks/*.py")]:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
