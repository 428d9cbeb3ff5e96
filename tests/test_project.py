"""Laws of the whole project: all configs load, imports point down."""
import ast
import importlib
from pathlib import Path

import pytest

from configurator import configure
from tasks.common import load_task
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
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


def test_the_modules_import():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tasks/*.py")]:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
