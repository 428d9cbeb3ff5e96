"""Laws of several processes: what the others hold, and how each of them ends.

This file is also the program that two processes run under torchrun.
"""
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from helpers import ROOT, fork, output_of, sentence, torchrun, wait_until, write_output_to
from training import ranks
from training.ranks import (agree, as_rank, first_reason, gather_batch, gather_from_ranks,
                            on_all_ranks, ranks_of_srun, scatter_batch, start_ranks,
                            sum_over_ranks, wait_for_all)

# ---- collectives ----


def test_with_one_process_each_collective_is_the_identity():
    x = torch.arange(6.0).view(3, 2)
    assert start_ranks("cpu") == (0, 1, torch.device("cpu"))
    assert agree([3, 1], "cpu") == [3, 1] and wait_for_all() is None
    assert sum_over_ranks(x) is x and first_reason("why", "cpu") == "why"
    assert len(gather_from_ranks(x)) == 1 and gather_from_ranks(x)[0] is x


@pytest.mark.parametrize("n_micro", [1, 2, 4])
def test_a_batch_that_is_scattered_and_gathered_is_the_batch(n_micro):
    whole = torch.arange(24.0).view(8, 3)
    parts = scatter_batch(whole, n_micro)
    assert [len(part) for part in parts] == [8 // n_micro] * n_micro
    for i, part in enumerate(parts):                # row i is dealt to part i % n_micro
        assert torch.equal(part, whole[i::n_micro])
    assert torch.equal(gather_batch(parts), whole)


@pytest.mark.parametrize("error", [OSError("full\nof trouble"), ValueError("full"),
                                   SafetensorError("full"), FileNotFoundError(2, "full", "x")])
def test_an_error_in_a_file_or_a_value_is_one_line(error):
    with pytest.raises(OSError, match="full") as caught, on_all_ranks("cpu"):
        raise error
    assert "\n" not in str(caught.value)
    with pytest.raises(KeyError), on_all_ranks("cpu"):  # a bug is none of them
        raise KeyError("full")


def on_two_ranks(_):
    """Check every collective with what both ranks hold."""
    rank, world, device = start_ranks("cpu")
    assert (rank, world) == (int(os.environ["RANK"]), 2)
    assert agree([rank, 5 - rank], device) == [1, 5]
    assert sum_over_ranks(torch.tensor([1.0, rank])).tolist() == [2.0, 1.0]
    assert [x.tolist() for x in gather_from_ranks(torch.tensor([rank, 7]))] == [[0, 7], [1, 7]]
    whole = torch.arange(24.0).view(8, 3)
    parts = scatter_batch(whole, 2)
    for i, part in enumerate(parts):                # rank 1 has parts 2 and 3 of four
        assert torch.equal(part, whole[2 * rank + i::4])
    assert torch.equal(gather_batch(parts), whole)
    for reasons, first in (("", ""), ""), (("", "b"), "b"), (("ä" * 600, "b"), "ä" * 500):
        assert first_reason(reasons[rank], device) == first
    for who in (0, 1):                              # one has an error, both raise it
        try:
            with on_all_ranks(device):
                if rank == who:
                    raise ValueError(f"of rank {who}")
        except OSError as error:
            assert str(error) == f"of rank {who}"
        else:
            raise AssertionError(f"rank {rank} has not heard of the error of rank {who}")
    if rank:
        time.sleep(0.5)                             # rank 0 must not leave before
    came = time.time()
    wait_for_all()
    print(f"rank {rank} {came} {time.time()}\n", end="")    # in one piece, and not flushed
    print(f"rank {rank} is done\n", end="", file=sys.stderr)
    globals()["kept"] = whole, parts                # tensors that gloo has seen outlive main
    first, _ = gather_from_ranks(torch.tensor([os.getpid()]))
    if rank:
        time.sleep(1)
        os.kill(int(first), 0)                      # rank 0 is still there, although it is done


@pytest.mark.slow
def test_two_ranks_under_torchrun_agree_and_end_with_code_0_and_all_that_they_said():
    done = torchrun(Path(__file__), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    _, numbers, came, left = zip(*map(str.split, sorted(done.stdout.splitlines())))
    assert numbers == ("0", "1")
    assert max(map(float, came)) <= min(map(float, left))       # rank 0 has waited for rank 1
    assert done.stderr.count("rank 0 is done") == done.stderr.count("rank 1 is done") == 1


# ---- how processes become ranks ----

TASK = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70012"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}


def test_a_task_of_srun_is_a_rank():
    env = TASK | {"SLURM_STEP_NUM_TASKS": "16"}
    ranks_of_srun(env)
    assert {name: env[name] for name in TORCHRUN} == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_PORT": "20012"}
    env = TASK | {"MASTER_PORT": "5"}
    ranks_of_srun(env)
    assert (env["WORLD_SIZE"], env["MASTER_PORT"]) == ("16", "5")


@pytest.mark.parametrize("env", [
    {}, TASK | TORCHRUN, {"SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"},
    TASK | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
    TASK | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}],
    ids=["no Slurm", "torchrun in a job", "salloc", "one task", "one task of a larger job"])
def test_torchruns_word_counts_and_a_single_task_is_no_rank(env):
    before = dict(env)
    ranks_of_srun(env)
    assert env == before


@pytest.fixture
def two_ranks(monkeypatch):
    """Be rank 1 of two with two GPUs that are not there; what was called is in the list."""
    calls = []
    for name, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="x").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: calls.append(i))
    monkeypatch.setattr(ranks, "pick_device", lambda name: torch.device(
        "cpu" if name == "cpu" else "cuda:1"))
    monkeypatch.setattr(ranks.dist, "init_process_group",
                        lambda backend, timeout, device_id: calls.append((backend, device_id)))
    return calls


@pytest.mark.parametrize("device, backend, expected", [
    ("auto", "", [1, ("nccl", torch.device("cuda:1"))]),
    ("cuda", "", [1, ("nccl", torch.device("cuda:1"))]),
    ("cuda", "gloo", [1, ("gloo", None)]), ("cpu", "", [("gloo", None)])])
def test_each_rank_takes_the_gpu_of_its_local_rank_and_none_on_cpus(two_ranks, device, backend,
                                                                    expected):
    assert start_ranks(device, backend)[:2] == (1, 2) and two_ranks == expected


def test_one_gpu_for_all_ranks_is_refused(two_ranks):
    assert "device='cuda:0'" in sentence(start_ranks, "cuda:0") and two_ranks == []


def test_tasks_that_do_not_know_where_to_meet_say_what_to_type(two_ranks, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR")
    said = sentence(start_ranks, "cpu")
    assert "export MASTER_ADDR=" in said and two_ranks == []


# ---- how a process ends ----


def raise_after_a_word(error):
    """Print, which leaves the word in a buffer, and raise."""
    print("a word")
    if error is not None:
        raise error


def be_one_of_two(rank, error, log, seconds):
    """Be a rank of two whose main raises this error. seconds: how long it sleeps, if it does."""
    write_output_to(log)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    signal.signal(signal.SIGTERM, lambda *_: None)  # as a training run that is to save first
    sleep = time.sleep

    def say_so_and_sleep(_):
        log.with_suffix(".asleep").touch()
        sleep(seconds)
    ranks.time.sleep = say_so_and_sleep
    as_rank(raise_after_a_word)(error)


def end_of(tmp_path, rank, error, seconds=0):
    """Return a rank's exit code, stdout and stderr."""
    process = fork(be_one_of_two, rank, error, tmp_path / "log", seconds)
    process.join()
    return process.exitcode, *output_of([tmp_path / "log"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error, code", [
    (None, 0), (SystemExit(), 0), (SystemExit(0), 0), (SystemExit(143), 143)], ids=str)
def test_the_exit_code_is_mains_and_output_is_flushed(tmp_path, rank, error, code):
    assert end_of(tmp_path, rank, error) == (code, "a word\n", "")


@pytest.mark.parametrize("error", [ValueError("lr does not fit"), OSError("lr does not fit"),
                                   SystemExit("lr does not fit")], ids=repr)
def test_a_mistake_is_one_sentence_of_rank_0_and_code_1(tmp_path, error):
    assert end_of(tmp_path, 0, error) == (1, "a word\n", "lr does not fit\n")


def test_the_others_are_ended_before_they_say_the_same(tmp_path):
    """By the SIGTERM of torchrun, although main has caught that signal."""
    log = tmp_path / "log"
    process = fork(be_one_of_two, 1, ValueError("lr does not fit"), log, 60)
    wait_until(log.with_suffix(".asleep").exists)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == -signal.SIGTERM and output_of([log]) == ["", ""]


def test_a_mistake_that_rank_0_has_not_made_is_said_by_the_rank_that_has(tmp_path):
    assert end_of(tmp_path, 1, ValueError("disk 1 is full")) == (
        1, "a word\n", "disk 1 is full\n")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug")], ids=repr)
def test_any_other_error_has_its_traceback_and_code_1(tmp_path, rank, error):
    code, out, err = end_of(tmp_path, rank, error)
    assert code == 1 and out == "a word\n"
    assert err.startswith("Traceback") and err.endswith(f"{type(error).__name__}: {error}\n")


def test_with_one_process_results_and_errors_pass_through(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(ranks.os, "_exit", None)
    assert as_rank(lambda cfg: cfg + 1)(2) == 3
    for error in (ValueError("x"), SystemExit(143), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            as_rank(raise_after_a_word)(error)
        assert caught.value is error
    assert as_rank(raise_after_a_word).__name__ == "raise_after_a_word"


def test_ctrl_c_on_a_rank_is_code_130(tmp_path):
    assert end_of(tmp_path, 0, KeyboardInterrupt()) == (130, "a word\n", "")


if __name__ == "__main__":
    as_rank(on_two_ranks)(None)
