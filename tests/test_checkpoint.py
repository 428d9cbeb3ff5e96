"""Laws of accidents: kills, signals, full disks, NaN; and of runs sharded over processes."""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_train import ROOT, cfg, data_dir, fingerprint, lines, sentence_of  # noqa: F401

import train
from model import DLLM, row_generators
from pretrained.weights import newest_checkpoint
from train import main
from training import checkpoint, setup


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def tensors(out_dir):
    """Everything that a run left, of one process or by ranks (whose rows are joined in order)."""
    folder = Path(newest_checkpoint(out_dir))
    found = load_file(folder / "model.safetensors")
    if (folder / "train_state.safetensors").is_file():
        return found | load_file(folder / "train_state.safetensors")
    for path in sorted((folder / "train_state").iterdir()):     # shard-00001-..., shard-00002-...
        with safe_open(path, "pt") as file:
            for name in file.keys():
                rows = file.get_tensor(name)
                found[name] = torch.cat([found[name], rows]) if name in found else rows
    return found


def assert_same(cfg, other, exactly=True):
    a, b = tensors(cfg.out_dir), tensors(other.out_dir)
    assert a.keys() == b.keys()
    for name in a:
        if exactly:
            assert torch.equal(a[name], b[name]), name
        else:
            scale = a[name].abs().max().item()
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


def patched(tmp_path, cfg, patch="", n=1):
    """The run as a program of its own, on n processes, after some lines of Python."""
    script = tmp_path / f"run_{len(list(tmp_path.glob('run_*.py')))}.py"
    script.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from training import checkpoint, setup
torch.set_num_threads({torch.get_num_threads()})    # sums are added in the same order
{patch}
def main(cfg):
    train.main(train.TrainConfig(**{vars(cfg)!r}))
sys.argv[1:] = []
train.run(train.as_rank(main), train.TrainConfig)
""")
    return launched(script, n)


def launched(script, n):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    launch = launch if n > 1 else []
    return subprocess.Popen([sys.executable, *launch, script], text=True, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def make(folder):
    folder.mkdir()
    return folder


def finished(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return out, err


# ----------------------------------------------------------------------------------------------
# one process


def test_the_newest_checkpoints_are_kept(cfg):
    main(replace(cfg, save_every=1, keep=2))
    names = [path.name for path in sorted(Path(cfg.out_dir).iterdir())]
    assert names == ["log.jsonl", "settings.json", "step_0000002", "step_0000003"]
    main(replace(cfg, save_every=1, keep=2, resume=True, max_steps=4))
    assert len(list(Path(cfg.out_dir).glob("step_*"))) == 2


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])
@pytest.mark.parametrize("where", ["save_file", "flush"])
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
    assert "older ones are kept" in said and cfg.out_dir in said
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


POISON = """
def poisoned(self, x0, maskable, is_real, generator, *rest, forward=setup.DLLMJEPA.forward):
    loss, parts = forward(self, x0, maskable, is_real, generator, *rest)
    seeds = {g.initial_seed() for g in generator}
    return (loss * torch.nan if BAD & seeds else loss), parts
setup.DLLMJEPA.forward = poisoned
"""


def poison(cfg, data_dir, step=1):
    """Two examples of the batch of a step, and code that makes their loss NaN."""
    from pretrained.tokenizer import load_tokenizer
    from tasks.common import batch_at, load_task, tokenize
    rows = tokenize(load_task("gsm8k").load("train", str(data_dir)), load_tokenizer("toy"), 64)
    batch, _ = batch_at(step, rows, cfg.batch_size, cfg.seed)
    ids = sorted(row.example_id for row in batch[2:4])
    seeds = {g.initial_seed() for g in row_generators(cfg.seed, step, ids)}
    return ids, f"BAD = {seeds}\n{POISON}"


def test_a_nan_stops_the_run_and_names_the_examples(cfg, monkeypatch, data_dir):
    ids, code = poison(cfg, data_dir)
    monkeypatch.setattr(setup.DLLMJEPA, "forward", setup.DLLMJEPA.forward)      # undone at the end
    exec(code, {"setup": setup, "torch": torch})
    said = sentence_of(monkeypatch, cfg, "--save_every=1", "--micro_batch_size=2")
    assert "at step 2 the gradient is not finite" in said and f"id {ids[0]}, {ids[1]};" in said
    assert Path(newest_checkpoint(cfg.out_dir)).name == "step_0000001"


def test_a_nan_may_be_skipped_and_changes_nothing(cfg, monkeypatch, data_dir, capsys):
    ids, code = poison(cfg, data_dir)
    monkeypatch.setattr(setup.DLLMJEPA, "forward", setup.DLLMJEPA.forward)
    exec(code, {"setup": setup, "torch": torch})
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
    ids, code = poison(cfg, data_dir)
    monkeypatch.setattr(setup.DLLMJEPA, "forward", setup.DLLMJEPA.forward)
    exec(code, {"setup": setup, "torch": torch})
    monkeypatch.setattr(train.Log, "is_due", lambda self, step: step == 4)
    main(cfg)
    assert f"at step 2 the gradient is not finite, because of the examples with id {ids[0]}" in (
        capsys.readouterr().out)
    one, two, three = (load_file(Path(cfg.out_dir) / f"step_000000{n}" / "model.safetensors")
                       for n in (1, 2, 3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(two["embed.weight"], three["embed.weight"])
    assert all(p.isfinite().all() for p in three.values())


@pytest.mark.slow
def test_a_disk_that_is_full_in_earnest(cfg, tmp_path):
    patch = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (MAX, MAX))"
    main(replace(cfg, max_steps=1))
    before = fingerprint(newest_checkpoint(cfg.out_dir))
    for limit in (2_000_000, 5_000_000):        # in the midst of the model, and of the moments
        _, err = finished(patched(tmp_path, replace(cfg, resume=True),
                                  patch.replace("MAX", str(limit))), code=1)
        assert "older ones are kept" in err and "Traceback" not in err
        assert fingerprint(newest_checkpoint(cfg.out_dir)) == before


@pytest.mark.slow
def test_thirty_kills_at_random_moments(cfg, tmp_path):
    """A loop that mostly saves is killed 30 times; each checkpoint left is good, and in the end the
    run equals one that was left in peace."""
    script = tmp_path / "sweep.py"
    script.write_text(f"""
import os, random, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch, torch._dynamo, train          # AdamW loads the second, here and not in forks
from training import setup
from dataclasses import replace
from pathlib import Path
from model import DLLM
from tasks.files import read_json
from pretrained.weights import newest_checkpoint, read_safetensors
setup.PRESETS["tiny"] = dict(n_layer=1, n_head=2, n_kv_head=2, n_embd=32, n_hidden=64)
cfg = train.TrainConfig(**{vars(replace(cfg, max_steps=9999, save_every=1, eval_every=9999))!r})
cfg = replace(cfg, warmup_ratio=0.0, min_lr_ratio=1.0)  # the same rates, wherever it is to end

def child(work):        # a fork: torch is loaded once, and nothing has run in the parent
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        os._exit(0)
    return pid

def newest():
    try:
        return newest_checkpoint(cfg.out_dir)
    except FileNotFoundError:
        return None

def check():
    DLLM.from_pretrained(newest())
    read_safetensors(os.path.join(newest(), "train_state.safetensors"))

rng, reached, in_a_save = random.Random(1), 0, 0
for kill in range(30):
    log = Path(cfg.out_dir, "log.jsonl")
    log.unlink(missing_ok=True)
    pid = child(lambda: train.main(replace(cfg, resume=newest() is not None)))
    while not (log.exists() and log.stat().st_size) and newest():       # first: anywhere at all
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.8 if newest() else 2))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the run was over"
    in_a_save += Path(cfg.out_dir, "saving").exists()
    if newest():
        assert os.waitpid(child(check), 0)[1] == 0
        step = read_json(os.path.join(newest(), "train_state.json"))["step"]
        assert step >= reached
        reached = step
print(f"reached {{reached}}, {{in_a_save}} in a save", flush=True)
rest = dict(save_every=9999, max_steps=reached + 5)
assert os.waitpid(child(lambda: train.main(replace(cfg, resume=True, **rest))), 0)[1] == 0
peace = replace(cfg, out_dir=cfg.out_dir + "_in_peace", **rest)
assert os.waitpid(child(lambda: train.main(peace)), 0)[1] == 0
""")
    began = time.time()
    done = subprocess.run([sys.executable, script], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"reached (\d+), (\d+) in a save", done.stdout)
    reached, in_a_save = map(int, found.groups())
    print(f"{in_a_save} of 30 kills met a save, step {reached}, {time.time() - began:.0f} s")
    assert reached and in_a_save
    assert_same(cfg, replace(cfg, out_dir=cfg.out_dir + "_in_peace"))


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
    x = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(0))
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
    for content, words in [('{"step": 3}', "on which base"), ('{"settings": 3}', "on which base"),
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
    finished(patched(Path(cfg.out_dir).parent, replace(cfg, shard=True), n=2))
    model, found = with_ema(cfg.out_dir), tensors(cfg.out_dir)
    for name, p in model.named_parameters():
        assert torch.equal(p, found["head.weight" if name == "head.weight" else f"target.{name}"])


# ----------------------------------------------------------------------------------------------
# several processes


KILL = """
step = train.Log.step
def killed(self, n, *rest):
    step(self, n, *rest)
    if n == 15:
        os.kill(os.getpid(), signal.SIGKILL)
train.Log.step = killed
"""


COUNT = """
encode = setup.DLLM.encode
def counted(self, xt, is_real=None):
    if self.head is None:                   # it has none
        print(f"a pass of the target over {len(xt)} rows\\n", end="", flush=True)
    return encode(self, xt, is_real)
setup.DLLM.encode = counted
"""


@pytest.mark.slow
@pytest.mark.parametrize("what, rank", [("write_shards", 1), ("shutil.rmtree", 0)])
def test_a_disk_that_is_full_for_one_rank_ends_all(cfg, tmp_path, what, rank):
    """From the state on for rank 1, or from the start, the model, for rank 0."""
    patch = f"""
import resource
def full(*args, real=checkpoint.{what}, **kwargs):
    if os.environ["RANK"] == "{rank}":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return real(*args, **kwargs)
checkpoint.{what} = full
"""
    cfg = replace(cfg, max_steps=2, shard=True, save_every=1)
    finished(patched(tmp_path, replace(cfg, max_steps=1), n=2))
    before = fingerprint(newest_checkpoint(cfg.out_dir))
    _, err = finished(patched(tmp_path, replace(cfg, resume=True), patch, n=2), code=1)
    assert err.count("older ones are kept") == 1 and "File too large" in err, err
    assert fingerprint(newest_checkpoint(cfg.out_dir)) == before


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_nan_of_one_rank_leaves_out_the_update_of_all(cfg, tmp_path, data_dir, shard):
    ids, code = poison(cfg, data_dir)
    cfg = replace(cfg, max_steps=3, log_every=3, on_nan="skip", shard=shard)
    out, _ = finished(patched(tmp_path, cfg, code, n=2))
    assert f"at step 2 the gradient is not finite, because of the examples with id {ids[0]}" in out
    found = tensors(cfg.out_dir)
    assert all(value.isfinite().all() for value in found.values())
    assert found["adam.step.model.embed.weight"].max() == 2


@pytest.mark.slow
@pytest.mark.parametrize("n, shard", [(1, False), (2, False), (2, True)])
def test_20_steps_are_12_and_kill_9_and_8_to_the_bit(cfg, tmp_path, n, shard):
    cfg = replace(cfg, max_steps=20, save_every=12, shard=shard)
    finished(patched(tmp_path, cfg, n=n))
    broken = replace(cfg, out_dir=str(tmp_path / "broken"))
    process = patched(tmp_path, broken, KILL, n)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert Path(newest_checkpoint(broken.out_dir)).name == "step_0000012"
    finished(patched(tmp_path, replace(broken, resume=True), n=n))
    assert_same(cfg, broken)


@pytest.mark.slow
def test_one_process_two_and_two_sharded_are_one_run_which_any_number_resumes(cfg, tmp_path):
    cfg = replace(cfg, max_steps=6, batch_size=12, lambda_jepa=2.0, eval_rows=9, eval_every=4,
                  warmup_ratio=0.0, min_lr_ratio=1.0)       # the same rates if it ends at 4 first
    alone, ddp, sharded, three, again = (
        replace(cfg, out_dir=str(tmp_path / name), resume=i > 2, shard=i > 1)
        for i, name in enumerate(("alone", "ddp", "sharded", "three", "again")))
    main(alone)
    finished(patched(tmp_path, ddp, n=2))
    assert_same(alone, ddp, exactly=False)
    # four steps sharded, in two micro-batches; then two more on one process, or on three
    out, _ = finished(patched(tmp_path, replace(sharded, max_steps=4, micro_batch_size=3,
                                                export_dir=str(tmp_path / "export")), COUNT, n=2))
    assert out.count("a pass of the target over 3 rows") == 16  # of each micro-batch, step and rank
    shutil.copytree(sharded.out_dir, three.out_dir)
    main(replace(sharded, shard=False, resume=True))
    assert_same(alone, sharded, exactly=False)
    finished(patched(tmp_path, three, n=3))
    assert_same(alone, three, exactly=False)
    # the other way round: first alone, then sharded
    main(replace(again, max_steps=4, shard=False, resume=False))
    finished(patched(tmp_path, again, n=2))
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
def test_sharded_weights_come_row_by_row_from_the_file_and_go_back(cfg, tmp_path):
    """Of a model with a tied head, in bf16, on three ranks that do not divide its sizes."""
    from model import ModelConfig
    config = ModelConfig(vocab_size=50, mask_id=1, eos_id=0, n_layer=2, n_head=2, n_kv_head=1,
                         n_embd=32, n_hidden=50, qk_norm=True, tied_head=True, block_size=64)
    DLLM(config).init_weights(torch.Generator().manual_seed(1)).save(make(tmp_path / "a"))
    make(tmp_path / "b")
    body = f"""
start_ranks("cpu")
read, tensors = [], weights.read_tensors
def counted(*args):
    for name, tensor in tensors(*args):
        read.append(tensor.numel())
        yield name, tensor
weights.read_tensors = counted
whole, model = DLLM.from_pretrained({str(tmp_path / "a")!r}), DLLM.on_meta({str(tmp_path / "a")!r})
n_read = sum(read)
read.clear()
whole.compute_dtype = model.compute_dtype = torch.bfloat16
joint, plain = DLLMJEPA(model), DLLMJEPA(whole)
shard(joint, torch.device("cpu"), {str(tmp_path / "a")!r})
assert sum(read) < 0.4 * n_read, (sum(read), n_read)
assert model.head.weight is model.embed.weight
seen = {{}}
def look(block, args):
    seen.update(weight=block.q_proj.weight.dtype, cos=args[1].dtype)
model.blocks[1].register_forward_pre_hook(look)
x0 = torch.randint(2, 50, (3, 9), generator=torch.Generator().manual_seed(0))
real = torch.ones(3, 9, dtype=torch.bool)
losses = []
for objective in (joint, plain):
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3, fused=True)
    for step in range(3):
        loss, _ = objective(x0, real, real, torch.Generator().manual_seed(step))
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
model.save({str(tmp_path / "b")!r} if dist.get_rank() == 0 else None)
dist.barrier()
again = DLLM.from_pretrained({str(tmp_path / "b")!r})
for p, q in zip(again.parameters(), model.parameters()):
    assert torch.equal(p, q.full_tensor())
"""
    script = tmp_path / "rows.py"
    script.write_text(f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
from jepa import DLLMJEPA
from model import DLLM
from pretrained import weights
from training.ranks import as_rank, start_ranks
from training.sharding import shard
def main(cfg):
{textwrap.indent(body, "    ")}
as_rank(main)(None)
""")
    finished(launched(script, 3))


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_under_torchrun_all_ranks_stop_at_one_step_and_a_mistake_is_said_once(cfg, tmp_path,
                                                                              data_dir, shard):
    cfg = replace(cfg, max_steps=400, shard=shard, save_every=1000, min_lr_ratio=1.0,
                  warmup_ratio=0.0)
    process = patched(tmp_path, cfg, n=2)
    log = Path(cfg.out_dir) / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(lines(cfg.out_dir)) > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)         # torchrun passes it on
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "SIGTERM after step" in out, err
    step = int(Path(newest_checkpoint(cfg.out_dir)).name[5:])
    assert 3 <= step < 400 and f"after step {step} of" in out
    finished(patched(tmp_path, replace(cfg, resume=True, max_steps=step + 2), n=2))
    peace = replace(cfg, out_dir=str(tmp_path / "peace"), max_steps=step + 2)
    finished(patched(tmp_path, peace, n=2))
    assert_same(cfg, peace)
    # and what is wrong is said by one rank: a setting, and a NaN with the ids of both ranks' rows
    bad = replace(cfg, out_dir=str(tmp_path / "bad"))
    _, err = finished(patched(tmp_path, replace(bad, task="gsm9k"), n=2), code=1)
    assert err.count("there is no task") == 1
    ids, code = poison(cfg, data_dir)           # neighbours in the batch: one on each rank
    _, err = finished(patched(tmp_path, bad, code, n=2), code=1)
    assert err.count(f"id {ids[0]}, {ids[1]};") == 1, err
