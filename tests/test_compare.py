"""Laws of compare.py: two arms that differ in lambda alone, one writer, and nobody else's files."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import PATIENCE

from analysis import compare
from analysis.compare import CompareConfig
from configurator import configure
from tasks.files import lock
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(tmp_path, *options):
    """A comparison of a few steps, in tmp_path/out."""
    base = tmp_path / "base.py"
    base.write_text((ROOT / "config/tiny_base.py").read_text()
                    + "\nmax_steps = 8\neval_rows = 64\n")
    return [sys.executable, "analysis/compare.py", f"--base={base}", f"--out_dir={tmp_path}/out",
            "--seed=7", "--device=cpu", *options]


def run(tmp_path, *options):
    return subprocess.run(command(tmp_path, *options), cwd=ROOT, env=ENV, text=True,
                          capture_output=True, timeout=PATIENCE)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_base_two_arms_and_a_table(tmp_path):
    other = tmp_path / "out/other/eval_toy_0shot.jsonl"
    old = tmp_path / "out/jepa/eval_toy_4shot.jsonl"            # of the weights that are replaced
    for path in (other, old):
        path.parent.mkdir(parents=True)
        path.write_text("precious")
    (old.parent / compare.MARKER).touch()
    done = run(tmp_path, "--train=--max_steps=10 --eval_rows=64", "--limit=40")
    assert done.returncode == 0, done.stderr
    assert other.read_text() == "precious" and not old.exists()

    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert list(summary) == ["arms", "jepa_minus_plain", "step_time_ratio", "seed", "lambda_jepa",
                             "diffusion_t", "seconds"]
    assert list(summary["arms"]) == ["base", "plain", "jepa"] and summary["seed"] == 7
    for arm in summary["arms"].values():
        assert list(arm) == ["accuracy", "stderr", "n", "held_out_loss", "base_corpus_loss",
                             "seconds", "ms_per_step"]
        assert 0 <= arm["accuracy"] <= 1 and arm["n"] == 40
        assert arm["stderr"] == pytest.approx((arm["accuracy"] * (1 - arm["accuracy"])
                                               / arm["n"]) ** 0.5)
        assert len(arm["held_out_loss"]) == 4 and len(arm["base_corpus_loss"]) == 4
    assert (summary["arms"]["plain"]["held_out_loss"]["1"]
            < summary["arms"]["base"]["held_out_loss"]["1"])
    assert summary["step_time_ratio"] > 1

    # the arms differ in lambda alone, and start from the same base
    folders = [tmp_path / "out" / name for name in ("plain", "jepa")]
    plain, jepa = [json.loads((folder / "settings.json").read_text()) for folder in folders]
    assert {key for key in plain if plain[key] != jepa[key]} == {"lambda_jepa", "out_dir"}
    first = [lines(folder / "log.jsonl")[0] for folder in folders]
    assert first[0] == first[1] and first[0]["step"] == 0

    # every line says whose it is, and no bar is drawn where there is no terminal
    shown, _, table = done.stdout.partition("scoring base, plain, jepa on unseen questions\n")
    assert {line.split("|")[0] for line in shown.splitlines()} == {"base  ", "plain ", "jepa  "}
    assert "plain | step 10: held-out loss" in shown and "\r" not in done.stdout
    assert done.stderr == ""
    assert "jepa - plain = " in table and "seed 7, step time " in table
    assert all(len(line) <= 100 for line in table.splitlines())


def test_the_first_arm_that_fails_ends_the_other_and_is_one_sentence(tmp_path):
    done = run(tmp_path, "--train=--max_steps=100000 --micro_batch_size=31")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "train.py of " in done.stderr and "ended with exit code 1" in done.stderr
    assert "micro_batch_size=31" in done.stderr                 # what that arm said last
    assert "| batch_size=32 must be a multiple" in done.stdout
    assert not (tmp_path / "out/summary.json").exists()


def test_a_line_that_follows_a_bar_is_shown_and_the_bar_is_not(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom tqdm import tqdm\nbar = tqdm(total=3, file=sys.stderr)\n"
                      "bar.update(2)\nbar.refresh()\nsys.exit('no | more 1/2 [room]')\n")
    with pytest.raises(ValueError, match=r"of jepa ended with exit code 1: no \| more 1/2 .room"):
        compare.run_all([("jepa", [str(script)])], 1)
    assert capsys.readouterr().out == "jepa  | no | more 1/2 [room]\n"


def test_a_process_ends_when_the_other_has_failed(tmp_path):
    texts = {"plain": "import time\nprint('here', flush=True)\ntime.sleep(600)", "jepa": "nothing"}
    for arm, text in texts.items():
        (tmp_path / f"{arm}.py").write_text(text)
    began = time.perf_counter()
    with pytest.raises(ValueError, match="NameError: name 'nothing' is not defined"):
        compare.run_all([(arm, [str(tmp_path / f"{arm}.py")]) for arm in texts], 2)
    assert time.perf_counter() - began < 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_runs_too(tmp_path, number):
    parent = subprocess.Popen(command(tmp_path), cwd=ROOT, env=ENV, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              start_new_session=True)
    for line in parent.stdout:                                  # the base is at work
        if "step 0: held-out loss" in line:
            break
    parent.send_signal(number)
    assert parent.wait(timeout=PATIENCE) == 128 + number
    with pytest.raises(ProcessLookupError):                     # none of its group is left
        time.sleep(0.5)
        os.killpg(parent.pid, 0)


def test_a_folder_that_it_did_not_make_stops_it(tmp_path):
    kept = tmp_path / "jepa" / "eval_toy_0shot.jsonl"
    kept.parent.mkdir()
    kept.write_text("precious")
    with pytest.raises(ValueError, match="jepa was not made by compare.py"):
        compare.main(CompareConfig(out_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.rglob("*")] == ["jepa", kept.name]
    assert kept.read_text() == "precious"


def test_only_a_folder_that_it_made_right_there_is_prepared_again(tmp_path):
    """A copy or a link has the marker too, and may be all that is left of a comparison."""
    made = tmp_path / "made"
    made.mkdir()
    compare.prepare_folders(made)
    old, notes = made / "jepa" / "eval_toy_4shot.jsonl", made / "jepa" / "eval_notes.md"
    for path in (old, notes):
        path.write_text("precious")
    shutil.copytree(made, tmp_path / "copy")
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "jepa").symlink_to(made / "jepa")
    for out in ("copy", "moved"):
        with pytest.raises(ValueError, match="choose another --out_dir"):
            compare.prepare_folders(tmp_path / out)
        assert (tmp_path / out / "jepa" / old.name).read_text() == "precious"
    compare.prepare_folders(made)
    assert not old.exists() and notes.exists()


def test_a_comparison_that_ended_before_it_had_marked_its_folder_begins_anew(tmp_path):
    (tmp_path / "plain").mkdir()
    compare.prepare_folders(tmp_path)
    assert all((tmp_path / arm / compare.MARKER).is_file() for arm in compare.ARMS)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "base").write_text("a file")
    with pytest.raises(ValueError, match="no folder of its own"):
        compare.check_folders(tmp_path / "file")


def test_two_comparisons_do_not_work_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "run_all", None)
    with lock(tmp_path), pytest.raises(ValueError, match="another process is at work"):
        compare.main(configure(CompareConfig, [f"--out_dir={tmp_path}", "--device=cpu"]))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_config_that_exports_or_resumes_is_for_one_run(tmp_path):
    path = tmp_path / "mine.py"
    for line in ("export_dir = 'x'", "resume = True"):
        path.write_text((ROOT / "config/tiny_tune.py").read_text() + f"\n{line}\n")
        with pytest.raises(ValueError, match="mine.py sets resume or export_dir"):
            compare.main(configure(CompareConfig, [f"--tune={path}", f"--out_dir={tmp_path}/out"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option, words", [
    ("--train='unended", "cannot be split"), ("--seed=-1", "seed=-1"),
    ("--device=cuda:77", "cuda:77"), ("--train=--t_ctx=2", "t_ctx=2.0.*tiny_tune.py"),
    ("--train=--out_dir=x --seed=3", "leave out out_dir, seed"),
    ("--train=--lambda_jepa=0", "both arms the same"),
    ("--train=--lrr=1", "did you mean 'lr'"),
    ("--base=nothing.py", "no config file nothing.py")])
def test_a_setting_that_does_not_fit_is_one_sentence(option, words, tmp_path):
    with pytest.raises((ValueError, OSError), match=words) as error:
        compare.main(configure(CompareConfig, [f"--out_dir={tmp_path}/out", option]))
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_summary_is_of_the_right_arm_and_step(tmp_path):
    """The base's losses are plain's at step 0, the others' their last; jepa is compared with
    plain, and a step's time is the median."""
    ms = {"base": (5, 5, 5), "plain": (10, 20, 90), "jepa": (30, 26, 27)}
    for n, name in enumerate(compare.ARMS):
        folder = tmp_path / name
        folder.mkdir()
        log = [{"step": 0, "held_out": {"toy": {"1": 9.0 + n}, "toy_base": {"1": 8.0 + n}}}]
        log += [{"step": step, "loss": 1.0, "ms": ms[name][step - 1], "seconds": 10 * step + n}
                for step in (1, 2, 3)]
        log += [{"step": 3, "held_out": {"toy": {"1": 1.0 + n}, "toy_base": {"1": 2.0 + n}}}]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        (folder / "eval_toy_0shot.json").write_text(json.dumps(
            {"accuracy": n / 4, "stderr": 0.1, "n": 4}))
        (folder / "eval_toy_0shot.jsonl").write_text("".join(
            json.dumps({"id": str(i), "gold": "1", "verdict": i < n}) + "\n" for i in range(4)))
    found = compare.summarize(tmp_path, TrainConfig(task="toy", forget_task="toy_base"))
    assert list(found["arms"]) == ["base", "plain", "jepa"] == list(compare.ARMS)
    base, plain, jepa = found["arms"].values()
    assert [arm["held_out_loss"]["1"] for arm in (base, plain, jepa)] == [10.0, 2.0, 3.0]
    assert [arm["base_corpus_loss"]["1"] for arm in (base, plain, jepa)] == [9.0, 3.0, 4.0]
    assert [arm["ms_per_step"] for arm in (base, plain, jepa)] == [5, 20, 27]
    assert [arm["seconds"] for arm in (base, plain, jepa)] == [30, 31, 32]
    assert [arm["accuracy"] for arm in (base, plain, jepa)] == [0, 0.25, 0.5]
    assert found["step_time_ratio"] == 27 / 20 and found["jepa_minus_plain"]["mean"] == 0.25


def test_a_summary_of_another_script_is_left_alone(tmp_path):
    (tmp_path / "summary.json").write_text('{"accuracy": 0.9}')
    with pytest.raises(ValueError, match="summary.json was not made by compare.py"):
        compare.check_folders(tmp_path)
    (tmp_path / "summary.json").write_text('{"jepa_minus_plain": 0.1}')
    compare.check_folders(tmp_path)


def test_arms_are_scored_on_the_variant_that_they_were_trained_on(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(compare, "run_all", lambda found, n: jobs.extend(found))
    monkeypatch.setattr(compare.signal, "signal", lambda *_: None)
    tune = TrainConfig(task="gsm8k", variant="marks")
    compare.run_arms(CompareConfig(), tmp_path, tune, [], 1)
    scored = [words for _, words in jobs if words[0] == "eval_gsm8k.py"]
    assert len(scored) == 3 and all("--variant=marks" in words for words in scored)
