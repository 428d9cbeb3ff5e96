"""Laws of tracking: the numbers of log.jsonl arrive, as one run, or a sentence says what fails."""
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import train
from helpers import lines, run_ranks, sentence, without_clock
from train import TrainConfig, main
from training.track import numbers_of

WANDB = '''
"""A stand-in for wandb that writes all calls to a file."""
import json, os

class Error(Exception):
    pass

def write(*what):
    with open(PATH, "a") as file:
        file.write(json.dumps(what) + "\\n")

class Run:
    def define_metric(self, name, **more):
        write("define_metric", {"name": name, **more})
    def log(self, numbers):
        write("log", numbers)
    def finish(self):
        write("finish", {})

def init(**settings):
    if "WANDB_FAILS" in os.environ:
        raise Error(os.environ["WANDB_FAILS"])
    write("init", settings)
    return Run()
'''


@pytest.fixture
def tracked(monkeypatch, tmp_path):
    """Put a stand-in for wandb on the path -> a function that returns its calls [[name, what]]."""
    (tmp_path / "packages").mkdir()
    # the path is in the file: a fork of an older server has an older environment
    (tmp_path / "packages/wandb.py").write_text(f"PATH = {str(tmp_path / 'calls')!r}\n{WANDB}")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    sys.modules.pop("wandb", None)


def logged(calls) -> list:
    return [what for name, what in calls if name == "log"]


def test_nothing_is_imported_unless_asked_for(cfg, tracked, tmp_path):
    main(cfg)
    assert "wandb" not in sys.modules and not (tmp_path / "calls").exists()
    assert not Path(cfg.out_dir, "wandb_id").exists()


def test_wandb_gets_the_settings_and_the_numbers_of_every_line_and_changes_none(cfg, tracked,
                                                                                tmp_path):
    main(cfg)
    other = replace(cfg, track="wandb", out_dir=str(tmp_path / "other"))
    main(other)
    assert without_clock(cfg.out_dir) == without_clock(other.out_dir)
    calls = tracked()
    assert [name for name, _ in calls if name != "log"] == ["init", "define_metric", "finish"]
    assert calls[-1][0] == "finish"
    assert logged(calls) == [numbers_of(line) for line in lines(other.out_dir)]
    start = calls[0][1]
    assert start["config"]["lr"] == cfg.lr and start["config"]["n_steps"] == 3
    assert start["name"] == "other" and start["dir"] == other.out_dir


def test_a_line_is_flat_and_without_what_is_null():
    line = {"step": 3, "held_out": {"toy": {"0.2": 1.5, "1": 2.5}, "gsm8k": {"1": None}}}
    assert numbers_of(line) == {"step": 3, "held_out/toy/0.2": 1.5, "held_out/toy/1": 2.5}
    assert numbers_of({"step": 1, "loss": None, "ms": 0.0}) == {"step": 1, "ms": 0.0}


def test_a_resumed_run_goes_on_with_its_id_and_a_new_run_has_another(cfg, tracked):
    cfg = replace(cfg, track="wandb", max_steps=2)
    main(cfg)
    main(replace(cfg, max_steps=3, resume=True))
    main(replace(cfg, overwrite=True))
    first, resumed, new = (what for name, what in tracked() if name == "init")
    assert first["id"] == resumed["id"] != new["id"] and len(first["id"]) >= 8
    assert {first["resume"], resumed["resume"]} == {"allow"} and resumed["allow_val_change"]
    # a step may come twice, so the axis is not wandb's own count, which never goes back
    assert ["define_metric", {"name": "*", "step_metric": "step"}] in tracked()
    steps = [what["step"] for what in logged(tracked()) if "loss" in what]
    assert steps == [1, 2, 3, 1, 2]


def test_a_run_may_be_resumed_with_tracking_and_without(cfg, tracked):
    main(replace(cfg, max_steps=2))
    main(replace(cfg, resume=True, track="wandb"))
    assert [what["step"] for what in logged(tracked()) if "loss" in what] == [3]
    main(replace(cfg, max_steps=4, resume=True))
    assert [line["step"] for line in lines(cfg.out_dir) if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.slow
def test_only_rank_0_tracks(cfg, tracked):
    run_ranks(replace(cfg, track="wandb"))
    assert [name for name, _ in tracked()].count("init") == 1
    assert [what["step"] for what in logged(tracked()) if "loss" in what] == [1, 2, 3]


def test_a_run_that_is_stopped_ends_its_tracking(cfg, tracked, monkeypatch):
    log_step = train.Log.step
    monkeypatch.setattr(train.Log, "step", lambda *args: (log_step(*args),
                                                          signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit):
        main(replace(cfg, track="wandb"))
    assert tracked()[-1] == ["finish", {}]
    assert [what["step"] for what in logged(tracked()) if "loss" in what] == [1]


def test_wandb_that_does_not_start_is_one_sentence(cfg, tracked, monkeypatch):
    for message, words in ("no account\nand more", "no account ("), ("", "Error ("):
        monkeypatch.setenv("WANDB_FAILS", message)
        said = sentence(main, replace(cfg, track="wandb", overwrite=True), kind=OSError)
        assert f"track='wandb' does not start: {words}" in said and "WANDB_MODE=offline" in said


@pytest.mark.parametrize("track", ["wandb", "tensorboard"])
@pytest.mark.parametrize("left", ["nothing", "a folder"])
def test_a_missing_package_is_told_before_anything_is_loaded(track, left, monkeypatch, tmp_path):
    """A folder of that name is what wandb leaves where it ran; it can be imported, and is empty."""
    if left == "a folder":
        (tmp_path / track).mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, track, raising=False)
    said = sentence(TrainConfig, track=track, kind=ValueError)
    assert f"track={track!r}" in said and f"pip install {track}" in said


def test_tensorboard_gets_every_number_once(cfg):
    """The steps after a checkpoint come again when a killed run is resumed."""
    pytest.importorskip("tensorboard", reason="needs the tensorboard package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    cfg = replace(cfg, track="tensorboard", max_steps=4, save_every=2, eval_every=2)
    main(replace(cfg, max_steps=2))
    main(replace(cfg, resume=True))
    events = EventAccumulator(cfg.out_dir).Reload()
    found = {(name, event.step): event.value for name in events.Tags()["scalars"]
             for event in events.Scalars(name)}
    wanted = {(name, line["step"]): value for line in lines(cfg.out_dir)
              for name, value in numbers_of(line).items()}
    assert found == pytest.approx(wanted, rel=1e-6)
