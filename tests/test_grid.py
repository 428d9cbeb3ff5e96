"""Laws of grid.py: nothing is done twice, nothing is chosen on test, one failure stops no other."""
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from helpers import PATIENCE

from analysis import grid
from analysis.arms import ARMS, plain_of
from analysis.grid import Grid, GridConfig, cell_of
from analysis.frames import key_of, read_results
from configurator import configure
from eval_gsm8k import EvalConfig

ROOT = Path(__file__).resolve().parent.parent
TRAIN = "--max_steps=2 --batch_size=4 --eval_rows=4 --device=cpu"
EVALUATE = "--gen_length=4 --block_length=4 --steps=1 --limit=8"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "little.py"
    path.write_text('preset = "tiny"\ntokenizer = "toy"\ntask = "toy"\nmax_length = 64\n')
    return str(path)


@pytest.fixture
def cfg(config, tmp_path):
    return GridConfig(configs=(config,), seeds=(1, 2), n_shots=(0,), train=TRAIN, evaluate=EVALUATE,
                      out_dir=str(tmp_path / "grid"))


@pytest.fixture(autouse=True)
def handlers_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def change(cfg, **settings):
    return GridConfig(**{**vars(cfg), **settings})


def refusal(cfg):
    with pytest.raises((ValueError, OSError)) as error:
        grid.main(cfg)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


class Fake:
    """Stands for train.py and eval_gsm8k.py: notes the command, writes what they would."""
    wait = terminate = lambda self: None
    poll = lambda self: self.returncode

    def __init__(self, accuracy=lambda words: 0.5, fails=lambda words: False):
        self.accuracy, self.fails, self.commands = accuracy, fails, []

    def __call__(self, grid, command, output):
        words = dict(word[2:].split("=", 1) for word in command[1:] if "=" in word)
        self.commands.append((Path(command[0]).stem, words))
        output.write_text("first\nbecause\n")
        self.returncode = int(self.fails(words))
        if not self.returncode and command[0] == "train.py":
            folder = Path(words["out_dir"])
            (folder / "step_0000002").mkdir(exist_ok=True)
            (folder / "step_0000002" / "config.json").write_text("{}")
            cells = [cell for cell in self.cells if cell.folder == folder]
            (folder / "settings.json").write_text(json.dumps(vars(cells[0].settings)))
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [
                {"step": 0, "held_out": {"toy": {"0.2": 9.0, "1": 8.0}}}, {"step": 1, "loss": 7.0},
                {"step": 1, "held_out": {"toy": {"0.2": 6.0, "1": 5.0}}},
                {"step": 2, "held_out": {"toy": {"0.2": 1.0, "1": 2.0}}}]))
        elif not self.returncode:
            scores = {"settings": {}, "accuracy": self.accuracy(words), "n": 8}
            Path(words["out"]).with_suffix(".json").write_text(json.dumps(scores))
        return self

    def use(self, monkeypatch):
        self.cells = []
        monkeypatch.setattr(grid, "PAUSE", 0)
        monkeypatch.setattr(grid, "find_weights", lambda *_: None)
        monkeypatch.setattr(Grid, "launch", lambda *args: self(*args))
        monkeypatch.setattr(grid, "cell_of", lambda *args: self.cells.append(cell_of(*args))
                            or self.cells[-1])
        return self

    def scored(self, split):
        return [words["init_from"].split("/")[-1] for script, words in self.commands
                if script == "eval_gsm8k" and words["split"] == split]


def lines_of(cfg):
    return read_results([Path(cfg.out_dir) / "results.jsonl"])


# ---- what is run ----


def test_each_arm_is_trained_on_each_seed_and_scored_on_both_splits(cfg, monkeypatch, capsys):
    fake = Fake().use(monkeypatch)
    cfg = change(cfg, arms=("plain", "jepa", "symmetric", "no_predictor"), n_shots=(0, 4))
    grid.main(cfg)
    trained = [words for script, words in fake.commands if script == "train"]
    assert len(trained) == 4 * 2 and len(fake.commands) == 8 + 8 * 2 * 2
    assert all("max_steps" in words for words in trained)
    by_name = {Path(words["out_dir"]).name: cell for words in trained for cell in fake.cells
               if str(cell.folder) == words["out_dir"]}
    assert by_name["plain_seed1"].settings.lambda_jepa == 0
    assert by_name["no_predictor_lambda1.0_depth0_seed2"].settings.n_pred_layer == 0
    symmetric = by_name["symmetric_lambda1.0_depth2_seed1"].settings
    assert symmetric.t_tgt == symmetric.t_ctx == 0.2 and symmetric.seed == 1
    lines = lines_of(cfg)
    assert len(lines) == len({key_of(line) for line in lines}) == 32
    assert {line["init_from"] for line in lines} == {""}            # and so no base row
    assert all(line["held_out"] == {"toy": {"0.2": [9.0, 1.0], "1": [8.0, 2.0]}} for line in lines)
    assert {(line["arm"], line["t_ctx"], line["t_tgt"]) for line in lines} == {
        (arm, 0.2, 0.2 if arm == "symmetric" else 0.7) for arm in cfg.arms}
    assert "Main table, 4-shot" in capsys.readouterr().out


def test_plain_is_one_run_for_all_lambdas_and_depths_whatever_they_are(cfg, monkeypatch):
    fake = Fake().use(monkeypatch)
    grid.main(change(cfg, lambdas=(0.5, 1.0), depths=(1, 2), seeds=(1,)))
    names = [Path(words["out_dir"]).name for script, words in fake.commands if script == "train"]
    assert names.count("plain_seed1") == 1 and len(names) == 5
    fake.commands.clear()
    grid.main(change(cfg, lambdas=(2.0,), depths=(3,), seeds=(1,)))     # one pair more, no more
    assert [Path(words["out_dir"]).name for script, words in fake.commands
            if script == "train"] == ["jepa_lambda2.0_depth3_seed1"]


def test_the_base_row_is_the_start_of_training_under_the_same_protocol(cfg, monkeypatch):
    fake = Fake().use(monkeypatch)
    grid.main(change(cfg, train=TRAIN + " --init_from=some/base --revision=v1", seeds=(1,)))
    [base] = [words for _, words in fake.commands if words.get("init_from") == "some/base"
              and "split" in words]
    other = next(words for _, words in fake.commands if words.get("split") == "test"
                 and words["init_from"] != "some/base")
    assert base["revision"] == "v1" and other["revision"] == ""
    assert {key for key in base if base[key] != other[key]} == {"init_from", "revision", "out"}
    line = next(line for line in lines_of(cfg) if line["arm"] == "base")
    assert (line["seed"], line["split"], line["train"]) == (None, "test", "")


# ---- several bases ----


BASES = ("some/base_seed1", "some/base_seed2")


def test_the_seeds_start_from_the_bases_in_turns_and_each_base_is_scored_once(cfg, monkeypatch):
    fake = Fake().use(monkeypatch)
    cfg = change(cfg, bases=BASES, seeds=(5, 3, 4), splits=("test",))
    grid.main(cfg)
    started = {(words["out_dir"].split("seed")[-1], words["init_from"])
               for script, words in fake.commands if script == "train"}
    assert started == {("5", BASES[0]), ("3", BASES[1]), ("4", BASES[0])}   # plain and jepa alike
    assert len(fake.commands) == 6 * 2 + 2
    lines = lines_of(cfg)
    assert [(line["seed"], line["init_from"]) for line in lines if line["arm"] == "base"] == [
        (5, BASES[0]), (3, BASES[1])]
    # as many blocks as there are seeds: a base, and all arms from it
    assert [line["seed"] for line in lines] == [5, 5, 5, 3, 3, 3, 4, 4]
    assert "not alike" not in refusal_or_nothing(change(cfg, seeds=(5, 3, 4, 6)))
    assert {line["init_from"] for line in lines_of(cfg) if line["seed"] == 6} == {BASES[1]}


def refusal_or_nothing(cfg):
    try:
        return grid.main(cfg) or ""
    except ValueError as error:
        return str(error)


def test_a_seed_has_one_base_in_all_arms(cfg, monkeypatch):
    """Arms are compared seed by seed, and the base is a part of the block."""
    Fake().use(monkeypatch)
    grid.main(change(cfg, bases=BASES, arms=("plain",)))
    other = change(cfg, bases=BASES, arms=("jepa",), seeds=(2, 1), splits=("validation",))
    said = refusal(other)
    assert said.startswith("runs of seed") and "base_seed1" in said and "base_seed2" in said


@pytest.mark.parametrize("settings, words", [
    (dict(bases=("a/base1", "a/base2")), "but for its seed"),
    (dict(bases=("a/base", "")), "but for its seed"),
    (dict(bases=BASES, train="--init_from=x"), "leave out init_from"),
    (dict(splits=()), "splits is empty"),
    (dict(splits=("train",)), "'train'; there are validation, test"),
    (dict(jobs=0), "jobs=0 must lie in 1..")])
def test_bases_splits_and_jobs_that_do_not_fit_are_refused(cfg, settings, words):
    with pytest.raises(ValueError, match=words):
        change(cfg, **settings)


def test_a_base_that_is_not_there_is_told_before_anything_runs(cfg, monkeypatch):
    monkeypatch.setattr(Grid, "launch", None)
    assert "nowhere/base_seed9" in refusal(change(cfg, bases=("./nowhere/base_seed9",)))


@pytest.mark.parametrize("splits", [("validation",), ("test",)])
def test_only_these_splits_are_scored(cfg, monkeypatch, splits, capsys):
    """Settings are chosen on validation; a long study need not score it."""
    fake = Fake().use(monkeypatch)
    grid.main(change(cfg, splits=splits, train=TRAIN + " --init_from=some/base"))
    assert {line["split"] for line in lines_of(cfg)} == set(splits)
    assert ("some/base" in {words["init_from"] for _, words in fake.commands
                            if "split" in words}) == (splits == ("test",))
    fake.commands.clear()
    Fake().use(monkeypatch)
    grid.main(change(cfg, train=TRAIN + " --init_from=some/base"))      # the other one later
    assert len(lines_of(cfg)) == 4 * 2 + 1


def test_pairs_are_chosen_on_validation_where_test_alone_is_asked_for(cfg, monkeypatch):
    fake = Fake().use(monkeypatch)
    grid.main(change(cfg, depths=(1, 2), seeds=(1,), splits=("test",)))
    assert len(fake.scored("validation")) == 2 and "plain_seed1" not in fake.scored("validation")
    assert set(fake.scored("test")) == {"plain_seed1", "jepa_lambda1.0_depth1_seed1"}


# ---- several runs at a time ----


class Slow(Fake):
    """Processes that end at the third look, and how many there were at a time."""

    def __call__(self, grid, command, output):
        child = type(self)(self.accuracy, self.fails)
        child.cells, child.commands, child.left = self.cells, self.commands, 3
        Fake.__call__(child, grid, command, output)
        self.living = [one for one in getattr(self, "living", []) if one.left] + [child]
        self.at_a_time = max(getattr(self, "at_a_time", 0), len(self.living))
        return child

    def poll(self):
        self.left = max(0, self.left - 1)
        return None if self.left else self.returncode


@pytest.mark.parametrize("jobs", [1, 2, 3, 99])
def test_as_many_runs_as_jobs_go_at_a_time_and_leave_the_same_lines(cfg, monkeypatch, jobs):
    fake = Slow(fails=lambda words: words["seed"] == "2" and "jepa" in words["out_dir"]
                if "seed" in words else False).use(monkeypatch)
    cfg = change(cfg, jobs=jobs, seeds=(3, 1, 2), arms=("plain", "jepa", "frozen"))
    with pytest.raises(SystemExit) as end:
        grid.main(cfg)
    assert str(end.value).count("exit code 1") == 1
    assert fake.at_a_time == min(jobs, 9)
    lines = (Path(cfg.out_dir) / "results.jsonl").read_bytes().splitlines()
    assert len({key_of(json.loads(line)) for line in lines}) == len(lines) == 8 * 2
    begun = [words["seed"] for script, words in fake.commands if script == "train"]
    assert begun == ["3"] * 3 + ["1"] * 3 + ["2"] * 3           # whole blocks first


@pytest.mark.parametrize("jobs, given, seen", [(1, None, None), (2, None, "1"), (2, "3", "3")])
def test_runs_that_share_the_cpu_have_a_thread_each_unless_it_is_set(cfg, monkeypatch, tmp_path,
                                                                     jobs, given, seen):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    found = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **_: found.append(env))
    with open(tmp_path / "lock", "w") as lock:
        Grid(change(cfg, jobs=jobs), lock).launch(["train.py"], tmp_path / "said")
    assert found[0].get("OMP_NUM_THREADS") == seen and found[0]["PATH"] == os.environ["PATH"]


# ---- choosing ----


def by_split(validation, test):
    def accuracy(words):
        name = Path(words["init_from"]).name
        depth = int(name.split("depth")[1].split("_")[0]) if "depth" in name else 0
        return (validation if words["split"] == "validation" else test)[depth]
    return accuracy


def test_the_choice_is_made_on_validation_though_test_disagrees(cfg, monkeypatch):
    fake = Fake(by_split({0: 0, 1: 0.6, 2: 0.9, 3: 0.7}, {0: 0, 1: 0.8, 2: 0.1, 3: 0.3}))
    fake.use(monkeypatch)
    cfg = change(cfg, depths=(1, 2, 3), arms=("plain", "jepa", "symmetric"))
    grid.main(cfg)
    assert {name for name in fake.scored("test")} == {
        f"{arm}_seed{seed}" for seed in (1, 2)
        for arm in ("plain", "jepa_lambda1.0_depth2", "symmetric_lambda1.0_depth2")}
    order = [words["split"] for _, words in fake.commands
             if "jepa_lambda1.0_depth2" in words.get("init_from", "")]
    assert order == ["validation", "validation", "test", "test"]    # test only when it is chosen
    assert len([name for name in fake.scored("validation") if "jepa" in name]) == 6


def test_without_all_validation_scores_nothing_is_chosen_and_plain_is_scored(cfg, monkeypatch):
    bad = lambda words: "depth2_seed2" in words.get("out_dir", "")
    fake = Fake(fails=bad).use(monkeypatch)
    with pytest.raises(SystemExit) as end:
        grid.main(change(cfg, depths=(1, 2)))
    assert "1 of its scores on validation" in str(end.value)
    assert fake.scored("test") == ["plain_seed1", "plain_seed2"]
    Fake().use(monkeypatch)
    grid.main(change(cfg, depths=(1, 2)))           # and now it goes through
    assert len(lines_of(cfg)) == 2 * 2 + 4 + 2


# ---- doing nothing twice ----


def test_a_done_grid_starts_no_process(cfg, monkeypatch, capsys):
    Fake().use(monkeypatch)
    grid.main(cfg)
    before, table = (Path(cfg.out_dir) / "results.jsonl").read_bytes(), capsys.readouterr().out
    monkeypatch.setattr(Grid, "launch", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    grid.main(cfg)
    assert (Path(cfg.out_dir) / "results.jsonl").read_bytes() == before
    assert capsys.readouterr().out == table


def test_what_is_named_twice_is_run_once(cfg, monkeypatch):
    fake = Fake().use(monkeypatch)
    grid.main(change(cfg, seeds=(1, 1), arms=("jepa", "jepa")))
    assert len(fake.commands) == 3 and len(lines_of(cfg)) == 2


def test_more_seeds_arms_or_shots_run_only_what_is_new(cfg, monkeypatch):
    fake = Fake().use(monkeypatch)
    grid.main(cfg)
    fake.commands.clear()
    grid.main(change(cfg, seeds=(1, 2, 3), n_shots=(0, 2)))
    assert sum(script == "train" for script, _ in fake.commands) == 2
    assert all("seed3" in words["out_dir"] for script, words in fake.commands
               if script == "train")
    assert sum(script == "eval_gsm8k" for script, _ in fake.commands) == 8 + 8
    assert len(lines_of(cfg)) == 24


def test_half_a_line_is_scored_again_and_a_begun_training_goes_on(cfg, monkeypatch):
    Fake().use(monkeypatch)
    grid.main(cfg)
    path = Path(cfg.out_dir) / "results.jsonl"
    whole = path.read_bytes()
    second = [i for i, byte in enumerate(whole) if byte == 10][1]
    path.write_bytes(whole[:second - 9])
    seen = []
    start = Grid.launch
    monkeypatch.setattr(Grid, "launch", lambda self, command, output: seen.append(command)
                        or start(self, command, output))
    grid.main(cfg)
    assert len(lines_of(cfg)) == 8
    trained = [command for command in seen if command[0] == "train.py"]
    assert len(trained) == 3 and all(command[-1] == "--resume" for command in trained)


@pytest.mark.parametrize("settings, words", [
    (dict(train=TRAIN + " --lr=0.5"), "lr=1e-05, not 0.5"),
    (dict(evaluate=EVALUATE + " --temperature=0.5"), "was scored by"),
    (dict(evaluate=EVALUATE.replace("limit=8", "limit=9")), "was scored by")])
def test_results_of_other_settings_are_refused(cfg, monkeypatch, settings, words):
    Fake().use(monkeypatch)
    grid.main(cfg)
    said = refusal(change(cfg, **settings))
    assert words in said and "--out_dir" in said


def test_a_config_that_has_changed_since_is_refused(cfg, config, monkeypatch):
    Fake(fails=lambda words: "split" in words).use(monkeypatch)
    with pytest.raises(SystemExit):
        grid.main(cfg)                              # trained, and no score
    with open(config, "a") as file:
        file.write("batch_size = 8\nbeta2 = 0.5\n")
    assert "beta2=0.999, not 0.5" in refusal(cfg)


def test_other_seeds_of_an_arm_must_be_made_as_the_first(cfg, monkeypatch):
    """Their mean would be a number of no experiment."""
    Fake().use(monkeypatch)
    grid.main(change(cfg, seeds=(1,)))
    before = (Path(cfg.out_dir) / "results.jsonl").read_bytes()
    for settings, words in ((dict(train=TRAIN + " --lr=0.5"), "--lr=0.5 in this command"),
                            (dict(evaluate=EVALUATE.replace("limit=8", "limit=9")), "--limit=9")):
        assert words in refusal(change(cfg, seeds=(2,), **settings))
    assert (Path(cfg.out_dir) / "results.jsonl").read_bytes() == before
    grid.main(change(cfg, seeds=(2,), train=TRAIN + " --log_every=7"))


@pytest.mark.parametrize("settings", [
    dict(train="--overwrite"), dict(train=TRAIN + " --out_dir=x"), dict(train="--seed=1"),
    dict(train="--resume=True"), dict(train="--export_dir=x"), dict(evaluate="--init_from=x"),
    dict(evaluate="--out=x --limit=3"), dict(evaluate="--task=toy"), dict(evaluate="--split=test"),
    dict(evaluate="--n_shot=1"), dict(evaluate="--compare=a,b"), dict(train="'unended"),
    dict(evaluate='"unended'), dict(processes=2 ** 31), dict(processes=0)])
def test_options_that_would_make_all_runs_one_are_refused(cfg, settings):
    with pytest.raises(ValueError) as error:
        change(cfg, **settings)
    assert next(iter(settings)) in str(error.value)
    assert not Path(cfg.out_dir).exists()


def test_a_config_that_is_for_one_run_is_refused(cfg, config):
    with open(config, "a") as file:
        file.write("overwrite = True\n")
    assert "sets resume, overwrite or export_dir" in refusal(cfg)


@pytest.mark.parametrize("foreign", [b"not mine", b'{"a": 1}\nhalf', b"\0" * 99])
def test_a_foreign_file_is_refused_and_stays_as_it_is(cfg, foreign):
    os.mkdir(cfg.out_dir)
    path = Path(cfg.out_dir) / "results.jsonl"
    path.write_bytes(foreign)
    assert "results.jsonl" in refusal(cfg)
    assert path.read_bytes() == foreign


@pytest.mark.parametrize("text", ["[]", '{"eval_t": 5}', '{"lr": [1]}', "{", ""])
def test_settings_of_another_form_are_one_sentence(cfg, monkeypatch, text):
    Fake(fails=lambda words: "split" in words).use(monkeypatch)
    with pytest.raises(SystemExit):
        grid.main(cfg)
    (Path(cfg.out_dir) / "little" / "plain_seed1" / "settings.json").write_text(text)
    assert "plain_seed1" in refusal(cfg)


def test_two_grids_do_not_work_in_one_folder(cfg):
    os.mkdir(cfg.out_dir)
    with open(Path(cfg.out_dir) / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in refusal(cfg)


def test_a_run_that_a_killed_grid_has_left_behind_keeps_others_out(cfg, monkeypatch, tmp_path):
    os.mkdir(cfg.out_dir)
    (tmp_path / "lasting.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    with open(Path(cfg.out_dir) / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = Grid(cfg, lock).launch(["lasting.py"], tmp_path / "said")
    assert "another process is at work" in refusal(cfg)
    child.kill()
    child.wait()
    monkeypatch.setattr(grid, "work_through", lambda cfg, grid: None)
    grid.main(cfg)


# ---- failures ----


def test_a_failure_is_listed_and_stops_no_other(cfg, monkeypatch):
    fake = Fake(fails=lambda words: "jepa" in words.get("out_dir", "") and words["seed"] == "1"
                or words.get("split") == "validation" and "plain_seed2" in words["init_from"])
    fake.use(monkeypatch)
    with pytest.raises(SystemExit) as end:
        grid.main(cfg)
    said = str(end.value)
    assert said.count("exit code 1") == 2 and said.count("ends with: because") == 2
    assert len(lines_of(cfg)) == 8 - 2 - 1


@pytest.mark.parametrize("n", [1, 2])
def test_several_processes_of_a_run_are_started_by_torchrun(cfg, monkeypatch, tmp_path, n):
    seen = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: seen.append(command))
    with open(tmp_path / "lock", "w") as lock:
        Grid(change(cfg, processes=n), lock).launch(["train.py", "--x=1"], tmp_path / "said")
    [command] = seen
    assert command[-2:] == [str(ROOT / "train.py"), "--x=1"]
    assert (f"--nproc_per_node={n}" in command) == (n > 1)


def test_mistakes_are_one_sentence_before_anything_runs(cfg, config, tmp_path, monkeypatch):
    monkeypatch.setattr(Grid, "launch", None)
    assert "no config file" in refusal(change(cfg, configs=("config/none.py",)))
    assert "max_stepps" in refusal(change(cfg, train="--max_stepps=3"))
    assert "'--train" not in refusal(change(cfg, evaluate="--gen_lenght=3"))
    assert "gen_lenght" in refusal(change(cfg, evaluate="--gen_lenght=3"))
    assert "--lambdas=1" in refusal(change(cfg, train="--lambda_jepa=0"))
    with pytest.raises(ValueError, match="no arm 'jape'.*no_predictor"):
        change(cfg, arms=("jape",))
    with pytest.raises(ValueError, match="configs is empty"):
        GridConfig()
    with pytest.raises(ValueError, match="the arm jepa"):
        change(cfg, arms=("plain",), depths=(1, 2))
    with pytest.raises(ValueError, match="above 0"):
        change(cfg, lambdas=(0.0,))
    with pytest.raises(ValueError, match="same file name twice"):
        change(cfg, configs=(config, str(tmp_path / "x" / "little.py")))


def test_every_arm_is_one_that_train_py_takes(cfg, config):
    cfg = change(cfg, train=f"{cfg.train} --init_from=out/base --tokenizer=")   # for the anchor
    for arm in ARMS:
        assert cell_of(cfg, config, arm, (0.5, 3), 7).settings.seed == 7


def test_an_arm_is_compared_with_plain_tuning_at_its_own_diffusion_rate(cfg, config):
    cfg = change(cfg, train=f"{cfg.train} --init_from=out/base --tokenizer=")
    for arm in ARMS:
        own, plain = (cell_of(cfg, config, name, (0.5, 3), 7).settings
                      for name in (arm, plain_of(arm)))
        assert (plain.lambda_jepa, plain.objective, plain.diffusion_t) == (
            0, "jepa", own.diffusion_t), arm


# ---- the whole path ----


def command_of(cfg):
    return [sys.executable, "analysis/grid.py", *(
        f"--{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in vars(cfg).items())]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_grid_that_was_killed_is_finished_by_the_same_command(cfg):
    cfg = change(cfg, depths=(1, 2), seeds=(1,), train=TRAIN + " --save_every=1")
    path, start = Path(cfg.out_dir) / "results.jsonl", time.time()
    killed = subprocess.Popen(command_of(cfg), cwd=ROOT, env=environment(), start_new_session=True,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not path.exists() and time.time() < start + PATIENCE:
        time.sleep(0.1)
    time.sleep(2)                                   # into the next training
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    before = lines_of(cfg)
    assert 1 <= len(before) < 5
    done = subprocess.run(command_of(cfg), cwd=ROOT, env=environment(), text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = lines_of(cfg)
    assert lines[:len(before)] == before and len(lines) == len({*map(key_of, lines)}) == 5
    assert all(line["metrics"]["n"] == 8 and line["revision"] for line in lines)
    ages = [datetime.now(UTC) - datetime.fromisoformat(line["time"]) for line in lines]
    assert all(timedelta(0) <= age < timedelta(hours=1) for age in ages)
    for line in lines:
        assert len(Path(line["answers"]).read_text().splitlines()) == 8
        assert line["held_out"]["toy"].keys() == {"0.2", "0.5", "0.8", "1"}
    assert "| little | 8 | from scratch |" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number, jobs", [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_stopped_grid_takes_its_processes_with_it(cfg, number, jobs):
    cfg = change(cfg, train=TRAIN.replace("max_steps=2", "max_steps=100000"), jobs=jobs)
    started = time.time()
    stopped = subprocess.Popen(command_of(cfg), cwd=ROOT, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    names = ["plain_seed1", "jepa_lambda1.0_depth2_seed1"][:jobs]
    folders = [Path(cfg.out_dir) / "little" / name for name in names]
    logs = [folder / "log.jsonl" for folder in folders]     # its first line: signals are heard
    while not all(log.exists() and log.read_text() for log in logs):
        assert time.time() < started + PATIENCE
        time.sleep(0.1)
    stopped.send_signal(number)
    _, said = stopped.communicate(timeout=PATIENCE)
    assert stopped.returncode == 128 + number and "Traceback" not in said
    assert all(list(folder.glob("step_*")) for folder in folders)   # train.py saved where it was
    with open(Path(cfg.out_dir) / "lock") as file:  # and nobody holds the folder any more
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_equal_flop_has_a_third_more_of_what_the_config_counts_in(cfg, config):
    for train, expected in (("--max_steps=300 --epochs=3", (400, 4.0)), ("--epochs=1.5", (0, 2.0))):
        settings = cell_of(change(cfg, train=train), config, "equal_flop", (1.0, 2), 7).settings
        assert (settings.max_steps, settings.epochs) == expected
        assert settings.lambda_jepa == 0


def test_a_model_is_scored_on_the_data_that_it_was_trained_on(cfg, config, tmp_path):
    train = f"{TRAIN} --task=gsm8k --data_dir=here --variant=marks --chat=True"
    cell = cell_of(change(cfg, train=train), config, "jepa", (1.0, 2), 7)
    with open(tmp_path / "lock", "w") as lock:
        command = Grid(cfg, lock).eval_command(cell, "validation", 4)
    own = configure(EvalConfig, command[1:])
    assert (own.task, own.data_dir, own.variant, own.chat, own.device) == (
        "gsm8k", "here", "marks", True, "cpu")
    assert (own.init_from, own.split, own.n_shot, own.limit) == (
        str(cell.folder), "validation", 4, 8)


def test_the_choice_takes_the_shots_that_are_asked_for_now(cfg, monkeypatch):
    """Scores with other shots, of an earlier command, are on file and do not count."""
    def accuracy(words):
        name = words["init_from"]
        depth = int(name.split("depth")[-1][0]) if "depth" in name else 0
        return {"0": 0.2 * depth, "4": 0.9 - 0.4 * depth}[words["n_shot"]]
    fake = Fake(accuracy).use(monkeypatch)
    cfg = change(cfg, depths=(1, 2), seeds=(1,))
    grid.main(change(cfg, n_shots=(4,)))
    assert "jepa_lambda1.0_depth1_seed1" in fake.scored("test")
    fake.commands.clear()
    grid.main(cfg)                                          # 0 shots: depth 2 is better
    assert set(fake.scored("test")) == {"plain_seed1", "jepa_lambda1.0_depth2_seed1"}


@pytest.mark.parametrize("text, left", [
    ('{"a": 1}\n{"b": 2}', '{"a": 1}\n{"b": 2}\n'), ('{"a": 1}\n{"b"', '{"a": 1}\n'),
    ('{"a": 1}\n', '{"a": 1}\n'), ("", "")])
def test_half_a_line_is_dropped_and_a_whole_one_is_ended(tmp_path, text, left):
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    grid.end_last_line(path)
    assert path.read_text() == left
