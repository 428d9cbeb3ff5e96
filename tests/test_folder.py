"""Laws of a run's folder: one run at a time, what a resumed run may change, what is told early."""
import errno
import json
import os
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

import train
from helpers import (assert_same, fingerprint, lines, run_ranks, sentence, sentence_of,
                     without_clock, write_gsm8k)
from pretrained.weights import newest_checkpoint
from tasks.files import lock, read_json
from train import TrainConfig, main
from training import folder
from training.folder import FIXED, FREE, SAID, changes, read_state, resumed_line


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Fail if the run comes so far that it loads a model."""
    def load(*_):
        raise AssertionError("the model is loaded")
    monkeypatch.setattr(train, "load", load)


# ----------------------------------------------------------------------------------------------
# told before anything is loaded or written


@pytest.mark.parametrize("export", ["run", "run/export", "run/a/b", ".", "run/../run", "link",
                                    "link/export", "relative"])
def test_an_export_in_or_around_out_dir_is_refused_and_nothing_is_written(
        cfg, monkeypatch, tmp_path, nothing_is_loaded, export):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    path = os.path.relpath(cfg.out_dir) if export == "relative" else tmp_path / export
    said = sentence_of(monkeypatch, cfg, f"--export_dir={path}")
    assert f"export_dir='{path}'" in said and f"out_dir={cfg.out_dir!r}" in said
    assert not Path(cfg.out_dir).exists() and [*tmp_path.iterdir()] == [tmp_path / "link"]


def test_an_export_beside_out_dir_is_good(cfg, tmp_path):
    main(replace(cfg, max_steps=1, export_dir=cfg.out_dir + "_export"))
    assert (tmp_path / "run_export/config.json").is_file()


@pytest.mark.parametrize("out_dir", ["", "  ", "file", "file/run", "dangling", "locked"])
def test_an_out_dir_that_cannot_be_written_is_told_first(cfg, monkeypatch, tmp_path,
                                                         nothing_is_loaded, out_dir):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "file/gone")
    (tmp_path / "locked/lock").mkdir(parents=True)
    path = tmp_path / out_dir if out_dir.strip() else out_dir
    said = sentence_of(monkeypatch, cfg, f"--out_dir={path}")
    assert "out_dir=" in said and str(path) in said


def test_a_folder_without_permission_is_told_first(cfg, monkeypatch, nothing_is_loaded):
    def lock(path):
        raise PermissionError(13, "Permission denied", f"{path}/lock")
    monkeypatch.setattr(folder, "lock", lock)
    said = sentence_of(monkeypatch, cfg)
    assert f"out_dir={cfg.out_dir!r} cannot be written" in said and "Permission denied" in said


def test_test_questions_that_are_not_there_are_told_before_the_training(cfg, monkeypatch):
    """The folder has a train.jsonl and nothing else."""
    said = sentence_of(monkeypatch, cfg, "--test_questions=3")
    assert "test.jsonl" in said and not Path(cfg.out_dir, "log.jsonl").exists()


@pytest.mark.parametrize("option", ["--overwrite=True", "--resume=True", "--resume=auto",
                                    "--keep=2"])
def test_no_run_is_written_around_a_models_own_folder(cfg, monkeypatch, tmp_path, option,
                                                      nothing_is_loaded):
    Path(cfg.out_dir).mkdir()
    Path(cfg.out_dir, "config.json").write_text("{}")
    before = fingerprint(cfg.out_dir)
    assert "a model's own folder" in sentence_of(monkeypatch, cfg, option)
    assert fingerprint(cfg.out_dir) == before


# ----------------------------------------------------------------------------------------------
# one run at a time


def test_a_run_holds_its_out_dir_to_the_end_and_then_gives_it_back(cfg, monkeypatch,
                                                                   nothing_is_loaded):
    Path(cfg.out_dir).mkdir()
    with lock(cfg.out_dir):
        said = sentence_of(monkeypatch, cfg)
    assert "another process" in said and cfg.out_dir in said
    assert [path.name for path in Path(cfg.out_dir).iterdir()] == ["lock"]
    monkeypatch.undo()

    moments, step, answer = [], train.Log.step, train.answer_questions

    def is_held(*_):
        moments.append(sentence(lock, cfg.out_dir))
    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "step", lambda *args: is_held() or step(*args))
        patch.setattr(train, "answer_questions", is_held)
        main(replace(cfg, max_steps=2, test_questions=1, task="toy", data_dir=""))
    assert len(moments) == 3 and train.answer_questions is answer
    lock(cfg.out_dir).close()


def test_a_run_that_fails_gives_its_out_dir_back(cfg, monkeypatch):
    assert "nowhere" in sentence_of(monkeypatch, cfg, "--init_from=nowhere")
    main(replace(cfg, max_steps=1))


@pytest.mark.slow
def test_all_ranks_end_when_the_folder_is_taken(cfg):
    Path(cfg.out_dir).mkdir()
    with lock(cfg.out_dir):
        _, err = run_ranks(cfg, code=1)
    assert err.count("another process is at work") == 1 and "Traceback" not in err


@pytest.mark.parametrize("log_every", [1, 99], ids=["log", "save"])
def test_a_folder_that_is_removed_under_a_run_ends_it_in_a_sentence(cfg, monkeypatch, log_every):
    held_out = train.Log.held_out

    def remove(self, step, losses):
        held_out(self, step, losses)
        shutil.rmtree(cfg.out_dir)
    monkeypatch.setattr(train.Log, "held_out", remove)
    said = sentence_of(monkeypatch, cfg, f"--log_every={log_every}", "--max_steps=2")
    assert "was removed" in said and cfg.out_dir in said


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_log_that_an_editor_replaces_is_followed_and_the_run_goes_on(cfg, monkeypatch, capsys,
                                                                       is_replaced):
    held_out, path = train.Log.held_out, Path(cfg.out_dir, "log.jsonl")

    def replace_it(self, step, losses):
        held_out(self, step, losses)
        if step == 0:
            text = path.read_text()
            path.unlink()
            if is_replaced:
                path.write_text(text)
    monkeypatch.setattr(train.Log, "held_out", replace_it)
    main(replace(cfg, max_steps=2))
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [0] * is_replaced + [1, 2, 2]
    assert "was removed or replaced" in capsys.readouterr().out


def test_files_that_no_run_has_made_are_left_alone(cfg):
    for name in ("saving", "removing", "step_0000004"):
        path = Path(cfg.out_dir, name)
        path.mkdir(parents=True)
        (path / "mine").write_text("precious")
        with pytest.raises(ValueError, match=f"{name} was not made by a run"):
            main(replace(cfg, max_steps=1))
        assert (path / "mine").read_text() == "precious"
        shutil.rmtree(path)
    Path(cfg.out_dir, "lock").write_text("mine")
    main(replace(cfg, max_steps=1))
    assert Path(cfg.out_dir, "lock").read_text() == "mine"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("precious", path)],
                         ids=["folder", "pipe", "link"])
def test_a_lock_that_is_not_a_file_is_refused_at_once(tmp_path, make):
    (tmp_path / "precious").write_text("x")
    make(tmp_path / "lock")
    with pytest.raises(OSError, match="lock"):
        lock(tmp_path)
    assert (tmp_path / "precious").read_text() == "x"


def test_a_base_that_has_moved_on_is_another_base(cfg, tmp_path):
    base = replace(cfg, out_dir=str(tmp_path / "base"), max_steps=1)
    main(base)
    tuned = replace(cfg, init_from=base.out_dir, tokenizer="", max_steps=1)
    main(tuned)
    spelled = replace(tuned, resume=True, max_steps=2,
                      init_from=newest_checkpoint(base.out_dir))
    main(spelled)                                               # the same weights by another name
    main(replace(base, resume=True, max_steps=2))
    with pytest.raises(ValueError, match="init_weights="):
        main(replace(tuned, resume=True, max_steps=3))


def test_an_export_is_made_once_and_a_resumed_run_leaves_it(cfg, tmp_path, capsys):
    cfg = replace(cfg, export_dir=str(tmp_path / "export"))
    main(cfg)
    before = fingerprint(cfg.export_dir)
    main(replace(cfg, resume=True))                             # the same command goes on
    assert "which stays as it is" in capsys.readouterr().out
    assert fingerprint(cfg.export_dir) == before
    assert not list(tmp_path.glob("*.exporting"))


def test_a_folder_that_is_removed_before_a_save_ends_in_a_sentence(cfg, monkeypatch):
    monkeypatch.setattr(train.Log, "write", lambda *_: shutil.rmtree(cfg.out_dir, True))
    assert f"{cfg.out_dir} was removed" in sentence_of(monkeypatch, cfg)
    assert not Path(cfg.out_dir).exists()


def test_a_name_of_a_folder_commands_no_terminal(cfg, tmp_path, capsys):
    main(replace(cfg, out_dir=str(tmp_path / "a\x1b[2Jb\r"), max_steps=1, test_questions=2,
                 lambda_jepa=0.0, task="toy", data_dir=""))
    said = capsys.readouterr().out
    assert "a\\x1b[2Jb\\r answers" in said and "\x1b[2J" not in said


def test_a_full_disk_under_the_log_names_the_log(cfg, monkeypatch):
    held_out = train.Log.held_out

    class Full:
        def __init__(self, file):
            self.fileno = file.fileno

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    def fill(self, *args):
        self.file = Full(self.file)
        held_out(self, *args)
    monkeypatch.setattr(train.Log, "held_out", fill)
    said = sentence_of(monkeypatch, cfg)
    assert "No space left" in said and f"{cfg.out_dir}/log.jsonl" in said


# ----------------------------------------------------------------------------------------------
# what a resumed run may change


OTHER = dict(seed=7, task="toy", variant="marks", chat=True, max_length=63, eos_fill=False,
             batch_size=4, init_weights="x", preset="llada-8b", lambda_jepa=0.5,
             t_ctx=0.3, t_tgt=0.8, n_pred_layer=1, ema_decay=0.5, mask_scope="all",
             diffusion_t="uniform", loss_form="llada_sft", objective="consistency",
             target="random", masks="nested", pool="masked", pool_layer=1, pred_width=8,
             pred_lr=0.0, ema_dtype="bfloat16", tau=0.5, active_block=8, anchor=1e-4, lora_rank=2,
             lora_alpha=9.0,
             lora_targets=("q_proj",), optimizer="lean", beta2=0.9, rows="1 with hash 0",
             n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_hidden=64, block_size=99,
             mask_token="<x>", shift=True)


def test_each_setting_is_fixed_said_or_free():
    names = {field.name for field in fields(TrainConfig)} | {"rows", "n_steps", "init_weights"}
    assert FIXED | SAID | FREE == names and len(FIXED) + len(SAID) + len(FREE) == len(names)
    assert OTHER.keys() == FIXED


@pytest.fixture
def begun(cfg):
    """A checkpoint of no weights, and the settings that it was made with."""
    settings = asdict(cfg) | {"rows": "64 with hash 1", "n_steps": 3, "init_weights": "a1"}
    path = Path(cfg.out_dir, "step_0000003")
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "train_state.json").write_text(json.dumps({"step": 3, "settings": settings}))
    return path, settings


@pytest.mark.parametrize("name", sorted(FIXED))
def test_what_makes_the_batches_or_the_objective_is_refused_with_both_values(begun, name):
    path, settings = begun
    said = sentence(changes, path, settings | {name: OTHER[name], "seed": 9})
    for value, seed in ((settings[name], 42), (OTHER[name], 9)):
        value = list(value) if isinstance(value, tuple) else value
        assert name == "seed" or f"{name}={value!r}" in said
        assert f"seed={seed}" in said


def test_all_else_may_change_and_so_may_what_the_checkpoint_does_not_know(begun):
    path, settings = begun
    assert changes(path, settings) == {} == changes(path, settings | {"resume": True})
    now = settings | dict(lr=0.5, n_steps=9, device="cuda", keep=7, new_setting=3)
    assert changes(path, now) == {"lr": [1e-3, 0.5], "n_steps": [3, 9], "device": ["cpu", "cuda"],
                                  "keep": [1, 7]}
    line = resumed_line(now | {"resumed": [{"step": 3, "changed": changes(path, now)}]})
    assert line.startswith("resumed after step 3 with lr 0.5 (was 0.001), n_steps 9 (was 3)")
    assert "jumps up" in line and "keep" not in line and "device" not in line
    steady = now | {"min_lr_ratio": 1.0, "resumed": [{"step": 3, "changed": {"n_steps": [3, 9]}}]}
    assert "jumps" not in resumed_line(steady)
    assert resumed_line(settings) == "" == resumed_line(
        settings | {"resumed": [{"step": 3, "changed": {"keep": [1, 7]}}]})


def test_another_name_of_the_same_base_is_the_same_base(begun):
    path, settings = begun
    other = settings | {"init_from": "elsewhere"}
    assert changes(path, other) == {"init_from": ["", "elsewhere"]}
    said = sentence(changes, path, other | {"init_weights": "b2"})
    assert "init_weights='b2', init_from='elsewhere'" in said


@pytest.mark.parametrize("name, value", [("init_from", 5), ("n_steps", "x"), ("n_steps", None),
                                         ("lr", [1]), ("eos_fill", "x")])
def test_a_recorded_setting_of_another_kind_is_told_with_the_file(begun, name, value):
    path, settings = begun
    state = read_json(path / "train_state.json")
    state["settings"][name] = value
    (path / "train_state.json").write_text(json.dumps(state))
    said = sentence(changes, path, settings)
    assert "train_state.json" in said and name in said


@pytest.mark.parametrize("content, words", [
    ('{"step": -1}', "step = -1"), ('{"step": 1000000000}', "step 1000000000"),
    ('{"step": true}', "step = true"), ('{"step": 3.0}', "step = 3.0"), ('{"step": 2}', "step 2"),
    ('{"step": "3"}', 'step = "3"'), ('{"step": null}', "step = null"), ("{}", "step = null"),
    ('{"step": [' + "[" * 99 + "]" * 99 + "]}", "step = [["), ('{"step": 1' + "0" * 5000 + "}", ""),
    ('{"step": 3, "settings": 3}', "another form"), ('{"step": 3, "settings": []}', "another form"),
    ('{"step": 3, "settings": {"resumed": 3}}', "another form"), ("", ""), ('{"step": 3', ""),
    ("[" * 100_000, ""), ("3", ""), ("\xff", ""), ('{"step": NaN}', "step = NaN")])
def test_a_train_state_that_says_nonsense_is_one_sentence(cfg, monkeypatch, begun, content, words,
                                                          nothing_is_loaded):
    path = begun[0] / "train_state.json"
    path.write_bytes(content.encode("latin-1"))
    before = fingerprint(begun[0])
    said = sentence_of(monkeypatch, cfg, "--resume=True")
    assert str(path) in said and words in said and fingerprint(begun[0]) == before


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "half a checkpoint"])
def test_one_command_with_resume_auto_begins_and_goes_on_and_equals_one_run(
        cfg, tmp_path, monkeypatch, left):
    cfg = replace(cfg, save_every=2)
    main(cfg)
    auto, log_step = replace(cfg, resume="auto", out_dir=str(tmp_path / "auto")), train.Log.step
    if left != "nothing":
        Path(auto.out_dir).mkdir()
    if left == "half a checkpoint":
        Path(auto.out_dir, "settings.json").write_text("{}")
        Path(auto.out_dir, "log.jsonl").write_text('{"step": 1}\n')
        Path(auto.out_dir, "saving").mkdir()
    for at in (1, 3):                   # before the checkpoint of step 2, and after it
        def interrupt(self, n, *rest, at=at):
            log_step(self, n, *rest)
            if n == at:
                raise KeyboardInterrupt
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train.Log, "step", interrupt)
            main(auto)
    main(auto)
    main(auto)                          # is complete
    assert_same(cfg, auto)
    assert without_clock(cfg.out_dir) == without_clock(auto.out_dir)


def test_resume_auto_neither_leaves_another_run_nor_fills_a_strange_folder(
        cfg, begun, monkeypatch, tmp_path, nothing_is_loaded):
    before = fingerprint(cfg.out_dir)
    said = sentence_of(monkeypatch, cfg, "--resume=auto", "--seed=1")
    assert "seed=42" in said and "seed=1" in said
    assert "overwrite" in sentence_of(monkeypatch, cfg, "--resume=auto", "--overwrite=True")
    (tmp_path / "mine/step_7").mkdir(parents=True)
    said = sentence_of(monkeypatch, cfg, "--resume=auto", f"--out_dir={tmp_path / 'mine'}")
    assert "not made by a run" in said
    export = tmp_path / "full"
    export.mkdir()
    (export / "x").touch()
    said = sentence_of(monkeypatch, cfg, "--resume=auto", f"--out_dir={tmp_path / 'new'}",
                       f"--export_dir={export}")
    assert "not empty" in said
    assert {name: text for name, text in fingerprint(cfg.out_dir).items()
            if "lock" not in str(name)} == before


@pytest.mark.parametrize("other", [-1, 2, 7])
def test_ranks_that_see_other_checkpoints_all_stop(cfg, begun, monkeypatch, nothing_is_loaded,
                                                   other):
    monkeypatch.setattr(folder, "agree", lambda numbers, _: [max(numbers[0], other),
                                                             max(numbers[1], -other)])
    said = sentence_of(monkeypatch, cfg, "--resume=auto")
    assert f"out_dir={cfg.out_dir!r}" in said and "share" in said


def test_resume_with_overwrite_is_refused(cfg, monkeypatch):
    said = sentence_of(monkeypatch, cfg, "--resume=True", "--overwrite=True")
    assert "leave out one of the two" in said and not Path(cfg.out_dir).exists()


def test_a_resumed_run_is_refused_early_for_its_settings_and_later_for_its_rows(
        cfg, monkeypatch, tmp_path):
    main(cfg)
    before = fingerprint(cfg.out_dir)
    with monkeypatch.context() as patch:
        patch.setattr(train, "load", None)
        said = sentence_of(patch, cfg, "--resume=True", "--seed=1", "--batch_size=4", "--lr=1")
        assert "batch_size=8, seed=42" in said and "batch_size=4, seed=1" in said
    # other rows in a folder of the same name; one word of one of them is enough
    other = tmp_path / "data"
    other.mkdir()
    path = write_gsm8k(other) / "train.jsonl"
    same = replace(cfg, data_dir=str(other), max_steps=5, resume=True)
    text = path.read_text()
    path.write_text(text.replace("1", "2", 1))
    assert "rows='64 with hash" in sentence_of(monkeypatch, same)
    path.write_text(text[text.index("\n") + 1:])
    assert "rows='63 with hash" in sentence_of(monkeypatch, same)
    assert fingerprint(cfg.out_dir) == before
    path.write_text(text)               # another folder with the same rows is none
    main(same)


def test_what_may_change_is_said_and_kept(cfg, capsys):
    main(cfg)
    main(replace(cfg, resume=True, max_steps=4, lr=0.5, keep=2))
    assert ("resumed after step 3 with lr 0.5 (was 0.001), max_steps 4 (was 3), "
            "the cosine of lr is longer") in capsys.readouterr().out
    main(replace(cfg, resume=True, max_steps=5, lr=0.5, keep=2))
    for settings in (read_json(Path(cfg.out_dir, "settings.json")),
                     read_state(newest_checkpoint(cfg.out_dir))[1]):
        one, two = settings["resumed"]
        assert one == {"step": 3, "changed": {"lr": [0.001, 0.5], "keep": [1, 2],
                                              "max_steps": [3, 4], "n_steps": [3, 4]}}
        assert two == {"step": 4, "changed": {"max_steps": [4, 5], "n_steps": [4, 5]}}
        assert settings["lr"] == 0.5 and settings["n_steps"] == 5


def test_a_resumed_run_keeps_its_checkpoint_until_the_next_is_written(cfg, monkeypatch):
    main(cfg)
    before, step = fingerprint(newest_checkpoint(cfg.out_dir)), train.Log.step

    def look(*args):
        assert fingerprint(newest_checkpoint(cfg.out_dir)) == before
        step(*args)
    monkeypatch.setattr(train.Log, "step", look)
    main(replace(cfg, resume=True, max_steps=5))
    assert Path(newest_checkpoint(cfg.out_dir)).name == "step_0000005"


def test_a_checkpoint_that_does_not_know_its_settings_goes_on(cfg):
    """As those of older versions, which lack some, and one that was moved by hand."""
    main(cfg)
    for settings in ({"lr": 1e-3, "unknown": 1}, {}):
        path = Path(newest_checkpoint(cfg.out_dir), "train_state.json")
        step = read_json(path)["step"]
        path.write_text(json.dumps({"step": step, "settings": settings}))
        main(replace(cfg, resume=True, max_steps=step + 1))
    assert Path(newest_checkpoint(cfg.out_dir)).name == "step_0000005"


def test_a_run_beyond_its_end_is_an_error_and_one_at_its_end_does_the_rest(cfg, monkeypatch,
                                                                           tmp_path):
    main(cfg)
    before = fingerprint(cfg.out_dir)
    export = tmp_path / "export"
    said = sentence_of(monkeypatch, cfg, "--resume=True", "--max_steps=2", f"--export_dir={export}")
    assert "has trained 3 steps" in said and "max_steps" in said
    assert fingerprint(cfg.out_dir) == before and not [*export.iterdir()]
    kept = without_clock(cfg.out_dir)
    main(replace(cfg, resume=True, export_dir=str(export)))     # killed before its export
    assert (export / "config.json").is_file() and without_clock(cfg.out_dir) == kept


# ----------------------------------------------------------------------------------------------
# the log of a resumed run


@pytest.mark.parametrize("bad", [
    b"not json\n", b"\xff\xfe\x00\n", b"{}\n", b'{"step": "2"}\n', b'{"step": true}\n', b"[1]\n",
    b"3\n", b"[" * 100_000 + b"\n", b'{"step": 1' + b"0" * 5000 + b"}\n", b'{"step": 1, "lo',
    b'{"step": 1}'], ids=range(11))
def test_broken_lines_of_the_log_are_left_out_and_counted(cfg, capsys, bad):
    main(cfg)
    path = Path(cfg.out_dir, "log.jsonl")
    good, found = without_clock(cfg.out_dir), path.read_bytes().splitlines(True)
    path.write_bytes(b"".join([found[0], bad * bad.endswith(b"\n"), *found[1:], bad]))
    main(replace(cfg, resume=True))
    n = 1 + bad.endswith(b"\n")
    assert f"{path}: {n} broken line" in capsys.readouterr().out
    assert without_clock(cfg.out_dir) == good


def test_a_log_that_is_whole_is_kept_without_a_word(cfg, capsys):
    main(cfg)
    Path(cfg.out_dir, "settings.json").write_text("broken")     # it is only written, never read
    main(replace(cfg, resume=True, max_steps=4))
    assert "broken" not in capsys.readouterr().out
    assert [line["step"] for line in lines(cfg.out_dir) if "ms" in line] == [1, 2, 3, 4]


def test_a_log_that_is_a_folder_or_a_pipe_is_one_sentence(cfg, monkeypatch):
    main(cfg)
    path = Path(cfg.out_dir, "log.jsonl")
    path.unlink()
    os.mkfifo(path)
    assert "not a file" in sentence_of(monkeypatch, cfg, "--resume=True", "--max_steps=4")
    path.unlink()
    path.mkdir()
    assert "not a file" in sentence_of(monkeypatch, cfg, "--resume=True", "--max_steps=4")


def test_a_run_beyond_an_end_that_its_epochs_set_is_an_error_too(cfg):
    main(cfg)                                                   # 3 steps; an epoch is 8
    with pytest.raises(ValueError, match="has trained 3 steps, and this run ends after 2"):
        main(replace(cfg, resume=True, max_steps=0, epochs=0.25))
