"""Functions that several test modules use: files, processes, small models, runs and ranks."""
import gzip
import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import train
from configurator import run
from model import DLLM, ModelConfig, row_generators
from pretrained.weights import newest_checkpoint
from sample import generate
from sampling.reveal import Sampling
from tasks import toy
from tasks.common import Row, collate
from training.ranks import as_rank

ROOT = Path(train.__file__).parent
DATA = ROOT.parent / "shared" / "data"
PATIENCE = 900          # seconds that a test waits for a process: the machine may be very busy
SPLITS = "train", "validation", "test"


# ---- files and errors ----


def write_jsonl(path, rows) -> str:
    """Write rows to a .jsonl[.gz] file -> its folder."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path.parent)


def write_gsm8k(folder):
    """Write train.jsonl: 320 short rows of unequal length in GSM8K's format -> the folder."""
    rows = [{"question": f"{story} {question}", "answer": "\n".join(steps) + "\n#### 1"}
            for story, question, steps in toy.problems("train", 320)]
    write_jsonl(folder / "train.jsonl", rows)
    return folder


def sentence(call, *args, kind=(ValueError, FileNotFoundError), **kwargs) -> str:
    """Return the message of the error that this call raises; it must be one line."""
    with pytest.raises(kind) as error:
        call(*args, **kwargs)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def fingerprint(folder) -> dict:
    """Return {path: hash} of every file under a folder."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def python(*words, cwd=ROOT, **env):
    """Run python with these words, and env on top of ours -> the finished process."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env={**os.environ, **env},
                          text=True, capture_output=True, timeout=PATIENCE)


def wait_until(condition):
    """Return as soon as condition() is true; fail after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


# ---- a model of two layers, a batch of eight rows, one step of the objective ----

CONFIG = ModelConfig(vocab_size=32, mask_id=31, eos_id=30, block_size=256, n_layer=2, n_head=4,
                     n_kv_head=4, n_embd=32, n_hidden=64)
IDS = range(100, 108)       # of the eight examples


def seeded(seed=0):
    """Return a generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def make_model(config=CONFIG, seed=0):
    """Return a model with random weights of this seed."""
    return DLLM(config).init_weights(seeded(seed))


def eight_rows():
    """Return examples of 3 to 10 prompt and 2 to 9 answer tokens: each of another length."""
    ids = torch.randint(30, (8, 20), generator=seeded(1)).tolist()
    return [Row(IDS[b], ids[b][:3 + b], ids[b][10:12 + b]) for b in range(8)]


def as_batch(rows, fill=6):
    """-> x0, maskable, is_real; answers are filled with end-of-text to 6, then comes padding."""
    return collate(rows, fill, CONFIG.block_size, CONFIG.eos_id)


def wide_batch(B, prompt=3, answer=50):
    """-> x0, maskable, is_real: rows long enough to tell the masking rate of each."""
    return as_batch([Row(b, [1] * prompt, [2] * answer) for b in range(B)])


def step(objective, batch, ids=IDS, seed=0):
    """One forward and backward with generators for the rows -> loss, parts, gradients by name."""
    objective.zero_grad()
    loss, parts = objective(*batch, row_generators(seed, 0, ids))
    loss.backward()
    grads = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return loss, parts, grads


def flops_of(call):
    """Return the FLOPs of the matrix products in call()."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# ---- the sampler on a small model ----


def tiny_model(bias=None, seed=0, peaked=20.0, **config):
    """A random model; `bias` {id: logit} is added to its logits, `peaked` scales these before."""
    config = {**dict(vocab_size=40, mask_id=39, eos_id=38, block_size=64, n_layer=2, n_head=4,
                     n_kv_head=2, n_embd=32, n_hidden=64), **config}
    model = DLLM(ModelConfig(**config)).init_weights(seeded(seed)).eval()
    with torch.no_grad():
        model.head.weight.mul_(peaked)
    if bias:
        offset = torch.zeros(config["vocab_size"])
        for token, logit in bias.items():
            offset[token] = logit
        unembed = model.unembed
        model.unembed = lambda h, where=None: unembed(h, where) + offset
    return model


def answer(model, prompt, gen_length, block_length, steps, temperature=0.0,
           remasking="low_confidence", generator=None, **more):
    """generate, with every setting of Sampling as an argument."""
    settings = {name: more.pop(name) for name in list(more) if name in vars(Sampling())}
    s = Sampling(gen_length, block_length, steps, temperature, remasking, **settings)
    return generate(model, prompt, s, generator, **more)


def write_checkpoint(folder, tok, seed=0, **config):
    """Save a random model of one layer and its tokenizer, as train.py leaves them -> the folder."""
    folder.mkdir(exist_ok=True)
    sizes = dict(vocab_size=tok.n_vocab, block_size=512, n_layer=1, n_head=2, n_kv_head=2,
                 n_embd=32, n_hidden=64)
    tiny_model(seed=seed, peaked=1.0, mask_id=tok.mask_id, eos_id=tok.eos_id,
               **{**sizes, **config}).save(folder)
    tok.save(folder)
    return folder


# ---- a training run and what it leaves ----


def tensors(out_dir) -> dict:
    """Everything in the newest checkpoint: weights, predictor, target, moments; shards joined."""
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
    """Two runs left the same tensors: to the bit, or nearly."""
    a, b = tensors(cfg.out_dir), tensors(other.out_dir)
    assert a.keys() == b.keys()
    for name in a:
        if exactly:
            assert torch.equal(a[name], b[name]), name
        else:
            scale = a[name].abs().max().item()
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


def lines(out_dir) -> list[dict]:
    """Return the lines of the log of a run."""
    return [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]


def loss_lines(out_dir) -> list[dict]:
    """Return the lines of the log that a training step wrote."""
    return [line for line in lines(out_dir) if "loss" in line]


def without_clock(out_dir) -> list[dict]:
    """Return the lines of the log without the times."""
    return [{k: v for k, v in line.items() if k not in ("ms", "seconds")}
            for line in lines(out_dir)]


def assert_same_step(cfg, other):
    """One step, seen through Adam's first moment, which is then 0.1 x the clipped gradient.

    The weights themselves are no measure: Adam's first step is the sign of the gradient, also
    where that is noise.
    """
    a, b = tensors(cfg.out_dir), tensors(other.out_dir)
    assert a.keys() == b.keys()
    for name in a:
        if name.startswith("adam.exp_avg."):
            scale = a[name].abs().max().item()
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5 * scale, msg=name)
    [one], [two] = loss_lines(cfg.out_dir), loss_lines(other.out_dir)
    terms = {"loss", "diffusion", "jepa", "grad_norm"} & one.keys()
    assert terms >= {"loss", "diffusion", "grad_norm"} and terms == terms & two.keys()
    for key in terms:                   # with two ranks: the mean over them
        assert one[key] == pytest.approx(two[key], rel=1e-5), key
    for one, two in zip(lines(cfg.out_dir), lines(other.out_dir)):
        if "held_out" in one and one["step"] == 0:
            assert one["held_out"]["gsm8k"] == pytest.approx(two["held_out"]["gsm8k"], rel=1e-4)


def assert_resuming_changes_nothing(cfg, tmp_path, monkeypatch):
    """6 steps in one go equal 6 that are broken off after 5 and resumed from the third."""
    cfg = replace(cfg, max_steps=6, save_every=3)
    train.main(cfg)

    broken = replace(cfg, out_dir=str(tmp_path / "broken"))
    log_step = train.Log.step

    def interrupt(self, n, *rest):          # after the checkpoint of step 3, and some steps further
        log_step(self, n, *rest)
        if n == 5:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.main(broken)
    assert [path.name for path in Path(broken.out_dir).glob("step_*")] == ["step_0000003"]
    train.main(replace(broken, resume=True))
    assert_same(cfg, broken)
    assert without_clock(cfg.out_dir) == without_clock(broken.out_dir)


def sentence_of(monkeypatch, cfg=None, *options) -> str:
    """Return what `python train.py ...` says as it stops, run in this process."""
    given = [] if cfg is None else [f"--{key}={value}" for key, value in vars(cfg).items()]
    monkeypatch.setattr(sys, "argv", ["train.py", *given, *options])
    with pytest.raises(SystemExit) as stop:
        run(train.main, train.TrainConfig)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code    # stderr, exit code 1
    return stop.value.code


# ---- several processes ----


def torchrun_command(*words, n=2) -> list[str]:
    """Return the command that runs a script on n processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
            *map(str, words)]


def torchrun(*words, **env):
    """Run a script under torchrun on two processes -> the finished process."""
    return python(*torchrun_command(*words)[1:], **env)


def kill(pid: int):
    """Kill a process and all that descend from it at once, and return when they are gone."""
    family, parents = {pid}, parents_of_all()
    for _ in range(5):                  # torchrun's children have sessions of their own
        family |= {child for child, parent in parents.items() if parent in family}
    for each in family & parents.keys():
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    wait_until(lambda: not family & parents_of_all().keys())


def parents_of_all() -> dict:
    """Return {pid: its parent's} of all processes that run."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found


def options_of(cfg) -> list[str]:
    """Return settings as a command line; empty tuples are left out."""
    return [f"--{key}={value}" for key, value in vars(cfg).items() if value != ()]


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["helpers", "eval_gsm8k", "torch.distributed.fsdp", "torch._dynamo"])


def fork(target, *args):
    """Start a process that calls target(*args): a fork of a server that has imported torch."""
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, path))):
        forkserver.ensure_running()                     # its imports look there
    process = FORKS.Process(target=target, args=args, daemon=True)      # ends with ours
    process.start()
    return process


def write_output_to(log):
    """Let this process write its stdout and stderr to files: log.out, log.err."""
    for number, kind in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(kind), os.O_WRONLY | os.O_CREAT), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)


def output_of(logs):
    """Return what these processes wrote to stdout and to stderr; they may have had no time to."""
    files = [[log.with_suffix(kind) for log in logs] for kind in (".out", ".err")]
    return ["".join(file.read_text("utf-8") for file in some if file.is_file()) for some in files]


def script(*words):
    """Run a script of the project as python() does, but in a fork -> the finished process."""
    log = Path(tempfile.mkdtemp()) / "script"
    process = fork(be_script, [str(word) for word in words], log)
    process.join(PATIENCE)
    return subprocess.CompletedProcess(words, process.exitcode, *output_of([log]))


def be_script(words, log):
    """Be the process of script()."""
    write_output_to(log)
    os.chdir(ROOT)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


class Ranks:
    """A script of the project, the one whose settings are given, on n forked processes.

    As under torchrun, in a fraction of its time: torch is imported once, by the server that forks.
    If one process fails the others get a SIGTERM. patch: a function of a test module, which every
    process calls first.
    """

    def __init__(self, cfg, n=2, patch=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = Path(tempfile.mkdtemp())
        self.logs = [folder / str(rank) for rank in range(n)]
        self.processes = [fork(be_rank, cfg, patch, rank, n, port, log)
                          for rank, log in enumerate(self.logs)]

    def signal(self, number):
        """Send all processes a signal."""
        for process in self.processes:
            os.kill(process.pid, number)

    def poll(self) -> list:
        """Return the exit codes, None for what still runs, and end all where one has failed."""
        codes = [process.exitcode for process in self.processes]
        if any(codes):
            for process in self.processes:
                process.terminate()
        return codes

    def join(self) -> list:
        """Return the exit codes of all."""
        wait_until(lambda: None not in self.poll())
        return self.poll()

    def wait(self, code=0) -> tuple[str, str]:
        """Return what they wrote to stdout and stderr, once all have ended with this code."""
        codes = self.join()
        out, err = output_of(self.logs)
        assert code in codes and (code or not any(codes)), f"{codes}\n{out}\n{err}"
        return out, err


def be_rank(cfg, patch, rank, n, port, log):
    """Be one process of Ranks: run the script's main(cfg)."""
    write_output_to(log)
    if n > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if patch:
        patch()
    module = import_module(type(cfg).__module__)
    sys.argv[1:] = []
    run(as_rank(lambda _: module.main(cfg)), type(cfg))


def run_ranks(cfg, n=2, patch=None, code=0) -> tuple[str, str]:
    """Run Ranks to the end -> stdout, stderr."""
    return Ranks(cfg, n, patch).wait(code)
