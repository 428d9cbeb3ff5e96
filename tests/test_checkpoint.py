"""Laws of accidents: kills, signals, full disks, NaN; and of runs sharded over processes."""
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import train
from helpers import (PATIENCE, ROOT, Ranks, assert_same, fingerprint, lines, loss_lines, make_model,
                     options_of, run_ranks, seeded, sentence, sentence_of, tensors,
                     torchrun_command, wait_until)
from jepa import DLLMJEPA
from model import DLLM, ModelConfig, row_generators
from pretrained import weights
from pretrained.tokenizer import load_tokenizer
from pretrained.weights import newest_checkpoint, read_safetensors
from tasks.common import batch_at, load_task, tokenize
from tasks.files import read_json
from train import main
from training import checkpoint, setup
from training.ranks import gather_from_ranks, local_part, start_ranks
from training.sharding import shard


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------
# one process


def test_the_newest_checkpoints_are_kept(cfg):
    main(replace(cfg, save_every=1, keep=2))
    names = [path.name for path in sorted(Path(cfg.out_dir).iterdir())]
    assert names == ["lock", "log.jsonl", "settings.json", "step_0000002", "step_0000003"]
    main(replace(cfg, save_every=1, keep=2, resume=True, max_steps=4))
    assert len(list(Path(cfg.out_dir).glob("step_*"))) == 2


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])
@pytest.mark.parametrize("where", ["save_tensors", "flush"])
def test_a_full_disk_ends_in_one_sentence_and_older_checkpoints_stay(cfg, monkeypatch, error,
                                                                     where):
    real, calls = getattr(checkpoint, where), []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) > 2:
            raise error
        return real(*args, **kwargs)
    monkeypatch.setattr(checkpoint, where, fails)
    said = sentence_of(monkeypatch, cfg, "--save_every=2", "--max_steps=6")
    assert "no older one was removed" in said and cfg.out_dir in said
    assert not (Path(cfg.out_dir) / "saving").exists()
    kept = fingerprint(newest_checkpoint(cfg.out_dir))
    assert kept and json.loads((Path(newest_checkpoint(cfg.out_dir)) / "train_state.json")
                               .read_text())["step"] in (2, 4)
    DLLM.from_pretrained(cfg.out_dir)
    monkeypatch.undo()
    main(replace(cfg, resume=True, max_steps=6))        # and is good


def test_a_folder_that_cannot_be_written_ends_in_one_sentence(cfg, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file/run" in sentence_of(monkeypatch, cfg, f"--out_dir={tmp_path}/file/run")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops_and_the_run_goes_on_as_if_nothing_had_been(
        cfg, monkeypatch, tmp_path, capsys, number, code):
    cfg, step = replace(cfg, max_steps=5), train.Log.step
    stopped = replace(cfg, out_dir=str(tmp_path / "stopped"), export_dir=str(tmp_path / "export"))

    def interrupt(self, n, *rest):
        step(self, n, *rest)
        if n == 2:
            os.kill(os.getpid(), number)
    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "step", interrupt)
        with pytest.raises(SystemExit) as stop:
            main(stopped)
    assert stop.value.code == code
    assert f"{number.name} after step 2 of 5" in capsys.readouterr().out
    assert Path(newest_checkpoint(stopped.out_dir)).name == "step_0000002"
    assert not list((tmp_path / "export").iterdir())    # it is not the model that was asked for
    main(replace(stopped, resume=True))
    main(cfg)
    assert_same(cfg, stopped)


def poison(seeds, forward=setup.DLLMJEPA.forward):
    """Make the loss NaN of each batch with an example whose generator has one of these seeds."""
    def poisoned(self, x0, maskable, is_real, generator, *rest):
        loss, parts = forward(self, x0, maskable, is_real, generator, *rest)
        is_bad = seeds & {g.initial_seed() for g in generator}
        return (loss * torch.nan if is_bad else loss), parts
    setup.DLLMJEPA.forward = poisoned


def two_examples(cfg, data_dir, step=1):
    """Return the ids of two neighbours in the batch of a step, and the seeds of their masks."""
    rows = tokenize(load_task("gsm8k").load("train", str(data_dir)), load_tokenizer("toy"), 64)
    batch, _ = batch_at(step, rows, cfg.batch_size, cfg.seed)
    ids = sorted(row.example_id for row in batch[2:4])
    return ids, {g.initial_seed() for g in row_generators(cfg.seed, step, ids)}


def test_a_nan_stops_the_run_and_names_the_examples(cfg, monkeypatch, data_dir):
    ids, seeds = two_examples(cfg, data_dir)
    monkeypatch.setattr(setup.DLLMJEPA, "forward", setup.DLLMJEPA.forward)      # undone at the end
    poison(seeds)
    said = sentence_of(monkeypatch, cfg, "--save_every=1", "--micro_batch_size=2")
    assert "at step 2 the gradient is not finite" in said and f"id {ids[0]}, {ids[1]};" in said
    assert Path(newest_checkpoint(cfg.out_dir)).name == "step_0000001"


def test_a_nan_may_be_skipped_and_changes_nothing(cfg, monkeypatch, data_dir, capsys):
    ids, seeds = two_examples(cfg, data_dir)
    monkeypatch.setattr(setup.DLLMJEPA, "forward", setup.DLLMJEPA.forward)
    poison(seeds)
    main(replace(cfg, max_steps=2, lr=0.0, on_nan="skip", log_every=1))
    assert f"id {ids[0]}, {ids[1]}; that update is left out" in capsys.readouterr().out
    found = tensors(cfg.out_dir)
    assert all(value.isfinite().all() for value in found.values())
    assert found["adam.step.model.embed.weight"] == 1
    assert [line["loss"] is None for line in lines(cfg.out_dir) if "ms" in line] == [False, True]


@pytest.mark.parametrize("optimizer", ["adamw", "lean"])
def test_a_nan_between_two_log_lines_is_found_at_the_next_and_has_changed_nothing(
        cfg, monkeypatch, data_dir, capsys, optimizer):
    """The update is left out on the device; the loop asks when it waits for the log line anyway."""
    cfg = replace(cfg, max_steps=4, log_every=4, on_nan="skip", optimizer=optimizer, lr=1e-3,
                  save_every=1, keep=9)
    ids, seeds = two_examples(cfg, data_dir)
    monkeypatch.setattr(setup.DLLMJEPA, "forward", setup.DLLMJEPA.forward)
    poison(seeds)
    monkeypatch.setattr(train.Log, "is_due", lambda self, step: step == 4)
    main(cfg)
    assert f"at step 2 the gradient is not finite, because of the examples with id {ids[0]}" in (
        capsys.readouterr().out)
    one, two, three = (load_file(Path(cfg.out_dir) / f"step_000000{n}" / "model.safetensors")
                       for n in (1, 2, 3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(two["embed.weight"], three["embed.weight"])
    assert all(p.isfinite().all() for p in three.values())


# ----------------------------------------------------------------------------------------------
# what is written


def spoil(name, value=torch.nan, at=2, rank=0):
    """Write a value into a tensor, by its name in the checkpoint, just before the save of a step.

    rank: the one that does, among several."""
    real = train.save_checkpoint

    def spoiled(out_dir, step, objective, optimizer, *rest):
        if step == at and int(os.environ.get("RANK", 0)) == rank:
            live = checkpoint.training_state(objective, optimizer)
            live |= dict(objective.model.named_parameters())
            local_part(live[name].detach()).view(-1)[-1:] = value
        real(out_dir, step, objective, optimizer, *rest)
    train.save_checkpoint = spoiled


def assert_the_older_one_is_kept(cfg, monkeypatch, name, *options, kept="step_0000001"):
    said = sentence_of(monkeypatch, cfg, "--save_every=1", *options)
    assert f"{name} has NaN or infinite values" in said and "no older one was removed" in said
    names = {path.name for path in Path(cfg.out_dir).iterdir()}
    assert names == {"lock", "log.jsonl", "settings.json", kept}
    for file in Path(cfg.out_dir, kept).glob("*.safetensors"):
        for tensor in load_file(file).values():
            assert not tensor.is_floating_point() or tensor.isfinite().all()


@pytest.mark.parametrize("name, value", [
    ("embed.weight", torch.nan), ("head.weight", torch.inf), ("blocks.3.down_proj.weight",
    -torch.inf), ("predictor.blocks.1.up_proj.bias", torch.nan), ("target.norm.weight", torch.inf),
    ("adam.exp_avg.model.embed.weight", torch.nan),
    ("adam.exp_avg_sq.predictor.norm.weight", torch.inf)])
def test_what_is_not_finite_is_never_what_remains(cfg, monkeypatch, name, value):
    monkeypatch.setattr(train, "save_checkpoint", train.save_checkpoint)    # undone at the end
    spoil(name, value)
    assert_the_older_one_is_kept(cfg, monkeypatch, name)


@pytest.mark.parametrize("name", ["embed.weight", "adam.exp_avg_sq.model.norm.weight"])
def test_half_weights_that_are_not_finite_are_never_what_remains(cfg, monkeypatch, name):
    monkeypatch.setattr(train, "save_checkpoint", train.save_checkpoint)
    spoil(name)
    assert_the_older_one_is_kept(cfg, monkeypatch, name, "--optimizer=lean")


@pytest.mark.parametrize("spoiled, said", [
    ("model.blocks.0.q_proj.lora_b", "blocks.0.q_proj.weight"),     # of the merged model
    ("target.blocks.3.up_proj.lora_a", "target.blocks.3.up_proj.lora_a")])
def test_adapters_that_are_not_finite_are_never_what_remains(cfg, monkeypatch, tmp_path, spoiled,
                                                             said):
    base = str(tmp_path / "base")
    main(replace(cfg, out_dir=base, max_steps=1, lambda_jepa=0.0))
    monkeypatch.setattr(train, "save_checkpoint", train.save_checkpoint)
    spoil(spoiled)
    cfg = replace(cfg, init_from=base, tokenizer="")
    assert_the_older_one_is_kept(cfg, monkeypatch, said, "--lora_rank=2")


def test_a_step_too_large_for_the_weights_ends_the_run_at_once(cfg, monkeypatch):
    """The gradient of this step was finite, and the next one's is never computed."""
    main(replace(cfg, max_steps=1))
    assert_the_older_one_is_kept(cfg, monkeypatch, "embed.weight", "--resume=True", "--lr=3e38",
                                 "--weight_decay=1")


@pytest.mark.parametrize("value", [torch.nan, 3.4e38])      # which bf16 rounds to infinity
def test_a_model_that_is_not_finite_is_never_exported(cfg, monkeypatch, tmp_path, value):
    real = train.export

    def spoiled(model, *rest):
        model.head.weight.data[3, 3] = value
        real(model, *rest)
    monkeypatch.setattr(train, "export", spoiled)
    said = sentence_of(monkeypatch, cfg, "--max_steps=1", f"--export_dir={tmp_path}/export")
    assert "head.weight has NaN or infinite values" in said
    assert not [*(tmp_path / "export").iterdir()]


def test_a_save_is_flushed_then_renamed_then_flushed_and_only_then_older_ones_go(cfg, monkeypatch):
    """All files of the new checkpoint and their folder are on the disk before it has its name, and
    the name is before an older one loses its own."""
    main(replace(cfg, max_steps=1))
    out, events = Path(cfg.out_dir), []

    def name_of(inode):
        return next(str(path.relative_to(out.parent)) for path in [out, *out.rglob("*")]
                    if path.stat().st_ino == inode)

    def recorded(module, name, note):
        real = getattr(module, name)

        def call(*args, **kwargs):
            found = note(*args)
            if found and "run" in str(found):
                events.append((name, *found))
            return real(*args, **kwargs)
        monkeypatch.setattr(module, name, call)

    def inside(*paths):
        return [os.path.relpath(path, out.parent) for path in paths]
    recorded(os, "fsync", lambda file: [name_of(os.fstat(file).st_ino)])
    recorded(os, "replace", lambda one, two: inside(one, two) if "step_" in f"{one}{two}" else None)
    recorded(shutil, "rmtree", lambda path, *_: inside(path) if Path(path).exists() else None)
    main(replace(cfg, resume=True, max_steps=2))
    n = next(i for i, event in enumerate(events) if event[0] == "replace")
    files = {f"run/step_0000002/{path.name}" for path in (out / "step_0000002").iterdir()}
    flushed = [event[1].replace("saving", "step_0000002") for event in events[:n]]
    assert {event[0] for event in events[:n]} == {"fsync"} and len(files) >= 5
    assert set(flushed) == files | {"run/step_0000002"} and flushed[-1] == "run/step_0000002"
    assert events[n:] == [("replace", "run/saving", "run/step_0000002"), ("fsync", "run"),
                          ("replace", "run/step_0000001", "run/removing"),
                          ("rmtree", "run/removing")]


@pytest.mark.parametrize("name", ["saving", "removing"])
@pytest.mark.parametrize("what", ["half", "whole", "empty"])
def test_what_a_kill_leaves_half_done_hurts_nothing(cfg, tmp_path, name, what):
    main(replace(cfg, max_steps=2))
    left = Path(cfg.out_dir, name)
    left.mkdir()
    if what != "empty":
        shutil.copytree(newest_checkpoint(cfg.out_dir), left, dirs_exist_ok=True)
    if what == "half":
        (left / "train_state").mkdir()          # of a sharded run, say
        (left / "config.json").unlink()
        (left / "model.safetensors").write_bytes(b"half")
    assert Path(newest_checkpoint(cfg.out_dir)).name == "step_0000002"
    main(replace(cfg, resume=True))
    assert sorted(path.name for path in Path(cfg.out_dir).iterdir()) == [
        "lock", "log.jsonl", "settings.json", "step_0000003"]
    assert not Path(newest_checkpoint(cfg.out_dir), "train_state").exists()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_all_files_of_a_checkpoint_have_the_umasks_mode(cfg, umask, mode):
    before = os.umask(umask)
    try:
        main(replace(cfg, max_steps=1))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path(cfg.out_dir).rglob("*")
             if path.is_file() and path.name != "model.safetensors"}
    assert len(modes) >= 6 and set(modes.values()) == {mode}, modes


APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X"


def litter(folder):
    """Put a `._` file beside each file, as macOS does on foreign disks."""
    for path in [path for path in Path(folder).rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(APPLE)


def test_files_that_macos_puts_beside_a_checkpoint_are_left_alone(cfg):
    main(cfg)
    good = dict(with_ema(cfg.out_dir).named_parameters())
    litter(cfg.out_dir)
    for name, p in with_ema(cfg.out_dir).named_parameters():
        assert torch.equal(p, good[name]), name
    main(replace(cfg, resume=True, max_steps=4))


def limit_files(size):
    """Let this process write no file beyond this size in bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
def test_a_disk_that_is_full_in_earnest(cfg):
    main(replace(cfg, max_steps=1))
    before = fingerprint(newest_checkpoint(cfg.out_dir))
    for limit in (2_000_000, 5_000_000):        # in the midst of the model, and of the moments
        _, err = run_ranks(replace(cfg, resume=True), 1, partial(limit_files, limit), code=1)
        assert "no older one was removed" in err and "Traceback" not in err
        assert fingerprint(newest_checkpoint(cfg.out_dir)) == before


def make_smaller():
    """Train a model so small that most of the time goes into saving it."""
    setup.PRESETS["tiny"] = dict(n_layer=1, n_head=2, n_kv_head=2, n_embd=32, n_hidden=64)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(cfg):
    """A loop that mostly saves is killed 20 times; each checkpoint left is good, and in the end the
    run equals one that was left in peace."""
    cfg = replace(cfg, warmup_ratio=0.0, min_lr_ratio=1.0)  # the same rates, wherever it is to end
    often = replace(cfg, max_steps=9999, save_every=1, eval_every=9999)
    log, saving = Path(cfg.out_dir, "log.jsonl"), Path(cfg.out_dir, "saving")

    def newest():
        with suppress(FileNotFoundError):
            return newest_checkpoint(cfg.out_dir)

    rng, reached, in_a_save = random.Random(1), 0, 0
    for _ in range(20):
        log.unlink(missing_ok=True)
        ranks = Ranks(replace(often, resume=newest() is not None), 1, make_smaller)
        if newest():                                        # the first: anywhere at all
            wait_until(lambda: log.exists() and log.stat().st_size)
        time.sleep(rng.uniform(0, 0.8 if newest() else 2))
        ranks.signal(signal.SIGKILL)
        ranks.wait(code=-signal.SIGKILL)                    # so it was not over
        in_a_save += saving.exists()
        if newest():
            DLLM.from_pretrained(newest())
            read_safetensors(os.path.join(newest(), "train_state.safetensors"))
            last = read_json(os.path.join(newest(), "train_state.json"))["step"]
            assert last >= reached
            reached = last
    print(f"{in_a_save} of 20 kills met a save, step {reached}")
    assert reached and in_a_save
    rest = replace(cfg, save_every=9999, eval_every=9999, max_steps=reached + 5)
    peace = replace(rest, out_dir=cfg.out_dir + "_in_peace")
    run_ranks(replace(rest, resume=True), 1, make_smaller)
    run_ranks(peace, 1, make_smaller)
    assert_same(rest, peace)


# ----------------------------------------------------------------------------------------------
# the EMA, for use


@pytest.fixture
def objectives(monkeypatch):
    """What the runs of this test have trained, as it was at their end."""
    found = []

    def kept(*args, make=setup.DLLMJEPA, **kwargs):
        found.append(make(*args, **kwargs))
        return found[-1]
    monkeypatch.setattr(setup, "DLLMJEPA", kept)
    return found


def with_ema(out_dir):
    folder = newest_checkpoint(out_dir)
    model = DLLM.from_pretrained(folder)
    checkpoint.load_ema(folder, model)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_the_ema_is_the_target_of_the_training_under_the_online_head(cfg, objectives, monkeypatch,
                                                                    tied):
    monkeypatch.setitem(setup.PRESETS, "tiny", {**setup.PRESETS["tiny"], "tied_head": tied})
    main(replace(cfg, ema_decay=0.5))
    model, [objective] = with_ema(cfg.out_dir), objectives
    x = torch.randint(60, (2, 9), generator=seeded())
    h = objective.target.encode(x)
    assert torch.equal(model.encode(x), h)
    head = objective.target.embed if tied else objective.model.head     # a tied one is the EMA's
    assert torch.equal(model(x), h @ head.weight.T)
    assert not torch.allclose(h, objective.model.encode(x), atol=1e-3)  # and it is no other model


def test_the_ema_of_lora_is_the_base_with_the_targets_adapters(cfg, objectives, tmp_path):
    main(replace(cfg, out_dir=str(tmp_path / "base"), max_steps=2, lambda_jepa=0.0))
    cfg = replace(cfg, init_from=str(tmp_path / "base"), tokenizer="", lora_rank=4, lora_alpha=8.0,
                  lora_targets=("q_proj", "up_proj"), lr=1e-2, ema_decay=0.5)
    main(cfg)
    model, x = with_ema(cfg.out_dir), torch.arange(9)[None]
    h = objectives[-1].target.encode(x)
    assert torch.equal(model.encode(x), h)
    assert torch.equal(model(x), objectives[-1].model.unembed(h))
    assert not torch.allclose(h, objectives[-1].model.encode(x), atol=1e-3)

    path = Path(newest_checkpoint(cfg.out_dir), "train_state.json")
    good = path.read_text()
    for content, words in [('{"step": 3}', "on which base"), ('{"settings": 3}', "which step"),
                           (good.replace('"q_proj"', '["q_proj"]'), "lora_targets"),
                           (good.replace('"lora_rank": 4', '"lora_rank": "x"'), "on which base"),
                           (good.replace(cfg.init_from, "gone"), "no weights"),
                           (good.replace("8.0", "9.0"), "is not this base")]:
        path.write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            with_ema(cfg.out_dir)


def test_without_an_ema_there_is_one_sentence(cfg, tmp_path):
    main(replace(cfg, lambda_jepa=0.0, export_dir=str(tmp_path / "export")))
    for folder in (cfg.out_dir, tmp_path / "export"):       # of plain training; published
        with pytest.raises(ValueError, match="holds no EMA weights") as error:
            with_ema(folder)
        assert "\n" not in str(error.value)


def test_an_ema_that_does_not_fit_is_one_sentence(cfg):
    main(cfg)
    path = Path(newest_checkpoint(cfg.out_dir), "train_state.safetensors")
    good, name = load_file(path), "target.blocks.0.q_proj.weight"
    for bad, words in [({**good, name: good[name][:-1].clone()}, "would fit"),
                       ({key: value for key, value in good.items() if key != name}, "lacks"),
                       ({**good, name: good[name] * float("nan")}, "NaN")]:
        save_file(bad, path)
        with pytest.raises(ValueError, match=words) as error:
            with_ema(cfg.out_dir)
        assert name in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated"):
        with_ema(cfg.out_dir)


@pytest.mark.slow
def test_the_ema_of_a_sharded_run_is_joined_from_its_ranks(cfg):
    run_ranks(replace(cfg, shard=True))
    found = tensors(cfg.out_dir)
    files = [path for path in Path(cfg.out_dir).rglob("*.safetensors") if "shard" in path.name]
    assert files and {path.stat().st_mode & 0o777 for path in files} == {0o644}
    litter(cfg.out_dir)
    model = with_ema(cfg.out_dir)
    for name, p in model.named_parameters():
        assert torch.equal(p, found["head.weight" if name == "head.weight" else f"target.{name}"])


# ----------------------------------------------------------------------------------------------
# several processes


def kill_after_8():
    """Let this process kill itself after step 8."""
    log_step = train.Log.step

    def killed(self, n, *rest):
        log_step(self, n, *rest)
        if n == 8:
            os.kill(os.getpid(), signal.SIGKILL)
    train.Log.step = killed


def be_a_task_of_srun():
    """Have the variables of srun, and not those of torchrun."""
    for theirs, ours in (("SLURM_PROCID", "RANK"), ("SLURM_LOCALID", "LOCAL_RANK"),
                         ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE")):
        os.environ[theirs] = os.environ.pop(ours)


def count_target_passes():
    """Print a line for each pass of the target: the only network without a head."""
    encode = DLLM.encode

    def counted(self, xt, is_real=None):
        if self.head is None:
            print(f"a pass of the target over {len(xt)} rows", flush=True)
        return encode(self, xt, is_real)
    DLLM.encode = counted


def limit_files_of(rank, module, name):
    """Fill the disk for one rank when it first calls a function of this module."""
    module = import_module(module)
    real = getattr(module, name)

    def full(*args, **kwargs):
        if os.environ["RANK"] == str(rank):
            limit_files(100_000)
        return real(*args, **kwargs)
    setattr(module, name, full)


@pytest.mark.slow
@pytest.mark.parametrize("rank, where", [(1, ("training.checkpoint", "write_shards")),
                                         (0, ("shutil", "rmtree"))], ids=["state", "model"])
def test_a_disk_that_is_full_for_one_rank_ends_all(cfg, rank, where):
    """From the state on for rank 1, or from the start, the model, for rank 0."""
    cfg = replace(cfg, max_steps=2, shard=True, save_every=1)
    run_ranks(replace(cfg, max_steps=1))
    before = fingerprint(newest_checkpoint(cfg.out_dir))
    _, err = run_ranks(replace(cfg, resume=True), 2, partial(limit_files_of, rank, *where), code=1)
    assert err.count("no older one was removed") == 1 and "File too large" in err, err
    assert fingerprint(newest_checkpoint(cfg.out_dir)) == before


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_nan_of_one_rank_leaves_out_the_update_of_all(cfg, tmp_path, data_dir, shard):
    ids, seeds = two_examples(cfg, data_dir)
    cfg = replace(cfg, max_steps=3, log_every=3, on_nan="skip", shard=shard)
    out, _ = run_ranks(cfg, 2, partial(poison, seeds))
    assert f"at step 2 the gradient is not finite, because of the examples with id {ids[0]}" in out
    found = tensors(cfg.out_dir)
    assert all(value.isfinite().all() for value in found.values())
    assert found["adam.step.model.embed.weight"].max() == 2


@pytest.mark.slow
@pytest.mark.parametrize("n, shard", [(1, False), (2, False), (2, True)])
def test_10_steps_are_6_and_kill_9_and_4_of_the_same_command_to_the_bit(cfg, tmp_path, n, shard):
    cfg = replace(cfg, max_steps=10, save_every=6, shard=shard, resume="auto")
    run_ranks(cfg, n)
    broken = replace(cfg, out_dir=str(tmp_path / "broken"))
    run_ranks(broken, n, kill_after_8, code=-signal.SIGKILL)
    assert Path(newest_checkpoint(broken.out_dir)).name == "step_0000006"
    run_ranks(broken, n)
    assert_same(cfg, broken)


@pytest.mark.slow
def test_one_process_two_and_two_sharded_are_one_run_which_any_number_resumes(cfg, tmp_path):
    cfg = replace(cfg, max_steps=6, batch_size=12, lambda_jepa=2.0, eval_rows=9, eval_every=4,
                  warmup_ratio=0.0, min_lr_ratio=1.0)       # the same rates if it ends at 4 first
    alone, ddp, sharded, three, again = (
        replace(cfg, out_dir=str(tmp_path / name), resume=i > 2, shard=i > 1)
        for i, name in enumerate(("alone", "ddp", "sharded", "three", "again")))
    main(alone)
    run_ranks(ddp, 2, be_a_task_of_srun)
    assert_same(alone, ddp, exactly=False)
    # four steps sharded, in two micro-batches; then two more on one process, or on three
    out, _ = run_ranks(replace(sharded, max_steps=4, micro_batch_size=3,
                               export_dir=str(tmp_path / "export")), 2, count_target_passes)
    assert out.count("a pass of the target over 3 rows") == 16  # of each micro-batch, step and rank
    shutil.copytree(sharded.out_dir, three.out_dir)
    main(replace(sharded, shard=False, resume=True))
    assert_same(alone, sharded, exactly=False)
    run_ranks(three, 3)
    assert_same(alone, three, exactly=False)
    # the other way round: first alone, then sharded
    main(replace(again, max_steps=4, shard=False, resume=False))
    run_ranks(again)
    assert_same(alone, again, exactly=False)
    for other in (ddp, sharded, three, again):
        for one, two in zip(lines(alone.out_dir), lines(other.out_dir), strict=True):
            assert one.keys() == two.keys()
            for key in one.keys() & {"loss", "diffusion", "jepa", "jepa_floor", "grad_norm", "lr"}:
                assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5), key
            if "held_out" in one:
                assert one["held_out"]["gsm8k"] == pytest.approx(two["held_out"]["gsm8k"], rel=1e-3)
    exported = DLLM.from_pretrained(tmp_path / "export")
    assert all(p.isfinite().all() for p in exported.parameters())


@pytest.mark.slow
def test_two_nodes_that_each_share_a_copy_are_one_run_which_one_process_resumes(cfg, tmp_path):
    """And back: a checkpoint of one process goes on there. Blocks stay gathered until backward."""
    cfg = replace(cfg, max_steps=4, warmup_ratio=0.0, min_lr_ratio=1.0)     # the same rates
    alone = replace(cfg, out_dir=str(tmp_path / "alone"))
    nodes = replace(cfg, shard=True, shard_over=2, gather_once=True, resume="auto")
    main(alone)
    run_ranks(replace(nodes, max_steps=2), 4, assert_two_copies)
    main(replace(cfg, max_steps=3, resume=True))
    run_ranks(nodes, 4)
    main(replace(cfg, resume=True))         # reads its last checkpoint, and has nothing to train
    for one, two in zip(loss_lines(alone.out_dir), loss_lines(cfg.out_dir), strict=True):
        for key in ("loss", "jepa", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-3), key
    a, b = (load_file(Path(newest_checkpoint(c.out_dir), "model.safetensors"))
            for c in (alone, cfg))
    assert all((a[name] - b[name]).abs().max() < 1e-4 for name in a)


def test_copies_that_do_not_fit_the_processes_are_refused(cfg):
    cfg = replace(cfg, shard=True, shard_over=2)
    assert setup.count_micro_batches(cfg, 4) == 1
    assert "shard_over=2 does not divide the 3" in sentence(setup.count_micro_batches, cfg, 3)


def assert_two_copies():
    """Fail unless the weights are halves, and two ranks have the same ones as the other two."""
    real = setup.shard

    def checked(objective, *args):
        real(objective, *args)
        weight = objective.model.blocks[0].q_proj.weight
        part = weight.to_local()
        assert 2 * len(part) == len(weight), (len(part), len(weight))
        every = gather_from_ranks(part.contiguous())
        assert torch.equal(every[0], every[2]) and torch.equal(every[1], every[3])
        assert not torch.equal(every[0], every[1])
    setup.shard = checked


@pytest.mark.slow
@pytest.mark.parametrize("name, rank, shard", [("blocks.3.up_proj.weight", 1, True),
                                               ("adam.exp_avg.model.norm.weight", 0, True),
                                               ("target.embed.weight", 1, False)])
def test_rows_that_are_not_finite_on_one_rank_end_all_and_are_named_once(cfg, name, rank, shard):
    cfg = replace(cfg, shard=shard, save_every=1)
    _, err = run_ranks(cfg, 2, partial(spoil, name, rank=rank), code=1)
    assert err.count(f"{name} has NaN or infinite values") == 1 and "Traceback" not in err, err
    assert [path.name for path in Path(cfg.out_dir).glob("s*")] == ["settings.json", "step_0000001"]


def train_a_sharded_and_a_whole_model(folder, _):
    """Compare them on every rank: what is read, three steps, what is saved."""
    start_ranks("cpu")
    read, read_tensors = [], weights.read_tensors

    def counted(*args):
        for name, tensor in read_tensors(*args):
            read.append(tensor.numel())
            yield name, tensor
    weights.read_tensors = counted
    whole, model = DLLM.from_pretrained(folder / "a"), DLLM.on_meta(folder / "a")
    n_read = sum(read)
    read.clear()
    whole.compute_dtype = model.compute_dtype = torch.bfloat16
    joint, plain = DLLMJEPA(model), DLLMJEPA(whole)
    shard(joint, torch.device("cpu"), folder / "a")
    assert sum(read) < 0.4 * n_read, (sum(read), n_read)
    assert model.head.weight is model.embed.weight
    seen = {}

    def look(block, args):
        seen.update(weight=block.q_proj.weight.dtype, cos=args[1].dtype)
    model.blocks[1].register_forward_pre_hook(look)
    x0 = torch.randint(2, 50, (3, 9), generator=seeded())
    real = torch.ones(3, 9, dtype=torch.bool)
    losses = []
    for objective in (joint, plain):
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3, fused=True)
        for n in range(3):
            loss, _ = objective(x0, real, real, seeded(n))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            objective.update_target()
            losses.append(loss.item())
    assert seen == dict(weight=torch.bfloat16, cos=torch.float32), seen
    assert all(abs(a - b) < 0.02 for a, b in zip(losses[:3], losses[3:])), losses
    for objective in (joint.model, joint.target, joint.predictor):
        assert all(p.dtype == torch.float32 for p in objective.parameters())
    for (name, p), q in zip(joint.named_parameters(), plain.parameters()):
        assert (p.full_tensor() - q).abs().max() < 4e-3, name       # a few steps of lr 1e-3
    model.save(folder / "b" if dist.get_rank() == 0 else None)
    dist.barrier()
    again = DLLM.from_pretrained(folder / "b")
    for p, q in zip(again.parameters(), model.parameters()):
        assert torch.equal(p, q.full_tensor())


def run_instead(main):
    """Replace main of train.py."""
    train.main = main


@pytest.mark.slow
def test_sharded_weights_come_row_by_row_from_the_file_and_go_back(cfg, tmp_path):
    """Of a model with a tied head, in bf16, on three ranks that do not divide its sizes."""
    config = ModelConfig(vocab_size=50, mask_id=1, eos_id=0, n_layer=2, n_head=2, n_kv_head=1,
                         n_embd=32, n_hidden=50, qk_norm=True, tied_head=True, block_size=64)
    for name in "ab":
        (tmp_path / name).mkdir()
    make_model(config, seed=1).save(tmp_path / "a")
    main = partial(train_a_sharded_and_a_whole_model, tmp_path)
    run_ranks(cfg, 3, partial(run_instead, main))


@pytest.mark.slow
def test_torchrun_passes_a_sigterm_on_and_leaves_the_time_to_save(cfg):
    cfg = replace(cfg, max_steps=9999, save_every=9999)
    process = subprocess.Popen(torchrun_command("train.py", *options_of(cfg)), cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = Path(cfg.out_dir, "log.jsonl")
    wait_until(lambda: process.poll() is not None or log.exists() and len(lines(cfg.out_dir)) > 3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and "SIGTERM after step" in out, err
    step = int(Path(newest_checkpoint(cfg.out_dir)).name[5:])
    assert f"after step {step} of" in out


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_all_ranks_stop_at_one_step_and_a_mistake_is_said_once(cfg, tmp_path, data_dir, shard):
    cfg = replace(cfg, max_steps=400, shard=shard, save_every=1000, min_lr_ratio=1.0,
                  warmup_ratio=0.0)
    ranks, log = Ranks(cfg), Path(cfg.out_dir) / "log.jsonl"
    wait_until(lambda: any(ranks.poll()) or log.exists() and len(lines(cfg.out_dir)) > 3)
    ranks.signal(signal.SIGTERM)                # as torchrun passes it on
    out, _ = ranks.wait(code=143)
    assert "SIGTERM after step" in out
    step = int(Path(newest_checkpoint(cfg.out_dir)).name[5:])
    assert 3 <= step < 400 and f"after step {step} of" in out
    run_ranks(replace(cfg, resume=True, max_steps=step + 2))
    peace = replace(cfg, out_dir=str(tmp_path / "peace"), max_steps=step + 2)
    run_ranks(peace)
    assert_same(cfg, peace)
    # and what is wrong is said by one rank: a setting, and a NaN with the ids of both ranks' rows
    bad = replace(cfg, out_dir=str(tmp_path / "bad"))
    _, err = run_ranks(replace(bad, task="gsm9k"), code=1)
    assert err.count("there is no task") == 1
    ids, seeds = two_examples(cfg, data_dir)           # neighbours in the batch: one on each rank
    _, err = run_ranks(bad, 2, partial(poison, seeds), code=1)
    assert err.count(f"id {ids[0]}, {ids[1]};") == 1, err


# ----------------------------------------------------------------------------------------------
# which checkpoints, which signal, which step


def test_the_newest_are_the_highest_steps_and_what_is_no_checkpoint_does_not_count(tmp_path):
    for name in ("step_9", "step_0000010", "step_00000011", "step_0000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "step_0000099").mkdir()                 # no config.json
    (tmp_path / "step_0000099" / "precious").write_text("x")
    left = {path.name for path in tmp_path.iterdir()}
    for keep, gone in ((9, {}), (6, {}), (3, {"step_0000002"}), (1, {"step_9", "step_0000010"})):
        checkpoint.remove_checkpoints(str(tmp_path), keep)
        left -= {*gone}
        assert {path.name for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize("is_at_the_end", [False, True])
def test_a_signal_is_heeded_after_its_step_without_a_last_held_out_loss(cfg, monkeypatch, tmp_path,
                                                                        is_at_the_end):
    """Between two log lines, too. A run whose last step it meets is complete."""
    cfg = replace(cfg, max_steps=2 if is_at_the_end else 5, log_every=100, eval_every=1,
                  export_dir=str(tmp_path / "export"))
    before, update = signal.getsignal(signal.SIGTERM), setup.DLLMJEPA.update_target

    def interrupted(self):
        update(self)
        interrupted.calls += 1
        if interrupted.calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    interrupted.calls = 0
    monkeypatch.setattr(setup.DLLMJEPA, "update_target", interrupted)
    if is_at_the_end:
        main(cfg)
        assert [line["step"] for line in lines(cfg.out_dir) if "held_out" in line] == [0, 1, 2]
        DLLM.from_pretrained(cfg.export_dir)
    else:
        with pytest.raises(SystemExit) as stop:
            main(cfg)
        assert stop.value.code == 143 and not list(Path(cfg.export_dir).iterdir())
        assert [line["step"] for line in lines(cfg.out_dir) if "held_out" in line] == [0, 1]
    assert interrupted.calls == 2 and newest_checkpoint(cfg.out_dir).endswith("step_0000002")
    assert signal.getsignal(signal.SIGTERM) is before


def test_of_several_bad_steps_the_first_is_named_and_each_finding_once(cfg, monkeypatch, data_dir,
                                                                       capsys):
    bad = [two_examples(cfg, data_dir, step)[1] for step in (1, 2, 4)]
    monkeypatch.setattr(setup.DLLMJEPA, "forward", setup.DLLMJEPA.forward)
    poison(set.union(*bad))
    monkeypatch.setattr(train.Log, "is_due", lambda self, step: step in (4, 5, 6))
    main(replace(cfg, max_steps=6, on_nan="skip"))
    said = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert [line.split(" the gradient")[0] for line in said] == ["at step 2", "at step 5"]


def test_if_every_example_is_bad_none_is_blamed(cfg, monkeypatch):
    forward = setup.DLLMJEPA.forward

    def all_bad(self, *batch):
        loss, parts = forward(self, *batch)
        return loss * torch.nan, parts
    monkeypatch.setattr(setup.DLLMJEPA, "forward", all_bad)
    assert "and so for each of the 8 examples alone" in sentence_of(monkeypatch, cfg)
    monkeypatch.setattr(setup.DLLMJEPA, "forward", forward)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.inf))
    said = sentence_of(monkeypatch, replace(cfg, out_dir=cfg.out_dir + "2"))
    assert "though the loss of each example alone is finite" in said


def test_what_a_kill_has_left_half_written_or_half_removed_comes_into_no_checkpoint(cfg):
    Path(cfg.out_dir).mkdir()
    Path(cfg.out_dir, "settings.json").write_text("{}")
    for name in ("saving", "removing"):
        (Path(cfg.out_dir) / name / "train_state").mkdir(parents=True)
        (Path(cfg.out_dir) / name / "model.safetensors").write_text("half")
    main(cfg)
    [folder] = Path(cfg.out_dir).glob("step_*")
    assert not (folder / "train_state").exists() and DLLM.from_pretrained(folder)
    assert not (Path(cfg.out_dir) / "saving").exists()
    assert not (Path(cfg.out_dir) / "removing").exists()
