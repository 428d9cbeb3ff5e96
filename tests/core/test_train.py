"""Laws of the loop: batch split, world size, restarts change nothing; errors end in a sentence."""
import json
import math
import os
import shutil
import signal
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

import train
from configurator import configure
from helpers import (DATA, assert_resuming_changes_nothing, assert_same, assert_same_step,
                     fingerprint, lines, loss_lines, options_of, python, run_ranks, script,
                     sentence_of, tensors, torchrun, write_checkpoint, write_jsonl)
from jepa import DLLMJEPA
from model import DLLM, PRESETS, ModelConfig, forward_process, row_generators
from pretrained.tokenizer import load_tokenizer
from tasks import gsm8k, toy
from tasks.common import batch_at, collate, tokenize
from train import TrainConfig, held_out_loss, lr_at, main
from training import checkpoint, setup

# ----------------------------------------------------------------------------------------------
# what changes nothing


def test_one_batch_of_8_equals_2_times_4_accumulated(cfg, tmp_path):
    cfg = replace(cfg, max_steps=1, lambda_jepa=2.0)
    halves = replace(cfg, micro_batch_size=4, out_dir=str(tmp_path / "halves"))
    main(cfg)
    main(halves)
    assert_same_step(cfg, halves)


@pytest.mark.parametrize("pack", [False, True])
def test_accumulation_changes_neither_the_step_nor_the_target(cfg, tmp_path, monkeypatch, pack):
    passes, encode = [], DLLM.encode

    def counted(self, xt, is_real=None):
        passes.extend([len(xt)] * (self.head is None))          # only the target has no head
        return encode(self, xt, is_real)
    monkeypatch.setattr(DLLM, "encode", counted)
    cfg = replace(cfg, max_steps=1, lambda_jepa=2.0, ema_decay=0.5, pack=pack, eos_fill=False)
    tok = load_tokenizer("toy")
    start = DLLM(ModelConfig(tok.n_vocab, tok.mask_id, tok.eos_id, **PRESETS["tiny"]))
    start.init_weights(torch.Generator().manual_seed(cfg.seed))
    main(cfg)
    whole = tensors(cfg.out_dir)
    floors = [line["jepa_floor"] for line in lines(cfg.out_dir) if "jepa_floor" in line]
    assert passes == [8, 2]                 # and two rows for the diagnostics of a log line
    for size in (4, 2):
        passes.clear()
        other = replace(cfg, micro_batch_size=size, out_dir=str(tmp_path / str(size)))
        main(other)
        assert passes == [size] * (8 // size) + [2]
        assert_same_step(cfg, other)
        ema = tensors(other.out_dir)
        for name in (name for name in ema if name.startswith("target.")):
            moved = whole[name] - start.get_parameter(name.removeprefix("target.")).detach()
            assert 0 < moved.norm() and (ema[name] - whole[name]).norm() < 0.01 * moved.norm(), name
        floors += [line["jepa_floor"] for line in lines(other.out_dir) if "jepa_floor" in line]
    assert floors == pytest.approx([floors[0]] * 3, rel=1e-4)   # of the whole batch, in any split


@pytest.mark.slow
def test_one_batch_of_8_equals_two_processes_with_4(cfg, tmp_path):
    cfg = replace(cfg, max_steps=1, lambda_jepa=2.0)
    main(cfg)
    two = replace(cfg, micro_batch_size=4, out_dir=str(tmp_path / "two"))
    done = torchrun("train.py", "config/tiny.py", *options_of(two))     # the command as it is
    assert done.returncode == 0, done.stderr
    assert_same_step(cfg, two)
    two_times_two = replace(cfg, micro_batch_size=2, out_dir=str(tmp_path / "two_times_two"))
    run_ranks(two_times_two)
    assert_same_step(cfg, two_times_two)


@pytest.mark.slow
def test_packed_steps_are_the_same_in_two_processes(cfg, tmp_path):
    cfg = replace(cfg, max_steps=4, seed=1, pack=True, eos_fill=False,
                  checkpoint_activations="full")
    two = replace(cfg, out_dir=str(tmp_path / "two"))
    run_ranks(two)
    main(cfg)
    one, other = (loss_lines(c.out_dir) for c in (cfg, two))
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() and a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_the_masks_are_the_same_for_any_world_size(cfg, data_dir, monkeypatch):
    """What the objective is called with, row by row, in one part or in four, is the same."""
    tok = load_tokenizer("toy")
    rows = tokenize(gsm8k.load("train", str(data_dir)), tok, 64)

    def masked_texts(n_parts):
        found = set()
        for part in range(n_parts):
            batch, fill = batch_at(5, rows, 8, seed=1, part=part, n_parts=n_parts)
            x0, maskable, is_real = collate(batch, fill, 64, tok.eos_id)
            generators = row_generators(1, 5, [row.example_id for row in batch])
            xt, _ = forward_process(x0, torch.full((len(batch),), 0.5), maskable, tok.mask_id,
                                    generators)
            found |= {tuple(ids[real].tolist()) for ids, real in zip(xt, is_real)}
        return found

    assert len(masked_texts(1)) == 8
    assert masked_texts(1) == masked_texts(2) == masked_texts(4) == masked_texts(8)


def test_train_6_equals_train_3_and_resume_3_bit_for_bit(cfg, tmp_path, monkeypatch):
    assert_resuming_changes_nothing(cfg, tmp_path, monkeypatch)


def test_lambda_0_leaves_no_trace_of_jepa(cfg):
    main(replace(cfg, lambda_jepa=0.0))
    assert not any("target" in name or "predictor" in name for name in tensors(cfg.out_dir))
    assert all("jepa" not in line for line in lines(cfg.out_dir))


def test_the_predictor_and_the_target_move_and_every_parameter_is_trained(cfg):
    main(replace(cfg, max_steps=1, weight_decay=0.0))
    before = tensors(cfg.out_dir)
    main(replace(cfg, overwrite=True))
    after = tensors(cfg.out_dir)
    trained = {name.removeprefix("adam.exp_avg.") for name in after
               if name.startswith("adam.exp_avg.")}
    assert {f"model.{name}" for name in after
            if not name.startswith(("adam", "predictor", "target"))} <= trained
    for name in ("predictor.blocks.0.up_proj.weight", "predictor.blocks.1.o_proj.weight",
                 "target.blocks.0.q_proj.weight", "blocks.0.q_proj.weight", "head.weight"):
        assert not torch.equal(before[name], after[name]), name


def test_compile_is_asked_of_every_block_of_model_and_target(cfg, monkeypatch):
    blocks = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: blocks.append(self))
    main(replace(cfg, compile=True))
    assert len(blocks) == 8                 # each block of the model and of the target


def test_three_steps_are_three_steps_of_adamw_by_hand(cfg, tmp_path):
    """Masks by (seed, step, id), the lr of the schedule, clipping, decay of matrices alone."""
    cfg = replace(cfg, seed=5, lr=1e-2, weight_decay=0.1, grad_clip=0.1, beta2=0.9,
                  warmup_ratio=0.5)
    main(cfg)
    tok = load_tokenizer("toy")
    model = DLLM(ModelConfig(tok.n_vocab, tok.mask_id, tok.eos_id, **PRESETS["tiny"]))
    model.init_weights(torch.Generator().manual_seed(5))
    objective = DLLMJEPA(model, seed=5)
    params = [p for p in objective.parameters() if p.requires_grad]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    rows = tokenize(gsm8k.load("train", cfg.data_dir), tok, 64)
    for step in range(3):
        batch, fill = batch_at(step, rows, 8, 5)
        generators = row_generators(5, step, [row.example_id for row in batch])
        objective(*collate(batch, fill, 64, tok.eos_id), generators)[0].backward()
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        assert norm > 0.1                               # so that clipping is seen
        lr = 1e-2 * [0.5, 1.0, 1.0][step]       # two steps of warm-up, then the cosine's top
        for p, (m, v) in zip(params, moments):
            g = p.grad * (0.1 / norm)
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.1)
            with torch.no_grad():
                p.mul_(1 - lr * 0.1 * (p.ndim > 1))
                p -= lr * (m / (1 - 0.9 ** (step + 1))) / (
                    (v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
            p.grad = None
        objective.update_target()
    trained = tensors(cfg.out_dir)
    for name, p in {**dict(model.named_parameters()), **{
            name: p for name, p in objective.named_parameters() if "model." not in name}}.items():
        torch.testing.assert_close(trained[name], p.detach(), rtol=1e-3, atol=2e-5, msg=name)


def test_another_seed_is_another_start_and_other_batches(cfg, tmp_path):
    other = replace(cfg, seed=7, out_dir=str(tmp_path / "other"))
    main(cfg)
    main(other)
    held_out = [lines(c.out_dir)[0]["held_out"] for c in (cfg, other)]
    assert held_out[0] != held_out[1]                   # at step 0: the same masks, other weights


# ----------------------------------------------------------------------------------------------
# the schedule and the log


@pytest.mark.parametrize("n_steps, ratio, n_warm", [(100, 0.1, 10), (7, 0.3, 2), (9, 0.3, 3),
                                                    (50, 0.0, 1), (3, 0.03, 1), (4, 1.0, 4)])
def test_the_learning_rate_warms_up_and_falls_to_its_floor(n_steps, ratio, n_warm):
    """In a straight line from lr / n to lr, then by half a cosine, to the floor after the end."""
    cfg = TrainConfig(lr=3.0, warmup_ratio=ratio, min_lr_ratio=0.02)
    rates = [lr_at(step, n_steps, cfg) for step in range(n_steps + 1)]
    assert rates[:n_warm] == pytest.approx([3 * (k + 1) / n_warm for k in range(n_warm)])
    turns = [math.pi * k / max(1, n_steps - n_warm) for k in range(n_steps + 1 - n_warm)]
    assert rates[n_warm:] == pytest.approx([3 * (0.51 + 0.49 * math.cos(turn)) for turn in turns])
    assert rates[n_steps] == pytest.approx(0.06 if n_steps > n_warm else 3.0)


def test_the_schedule_alone_decides_the_rate_of_each_step(cfg):
    cfg = replace(cfg, max_steps=4, warmup_ratio=0.5, min_lr_ratio=0.1, lr=0.01)
    main(cfg)
    assert [line["lr"] for line in loss_lines(cfg.out_dir)] == pytest.approx(
        [lr_at(step, 4, cfg) for step in range(4)])


@pytest.mark.parametrize("epochs, n_steps", [(0.01, 1), (0.18, 1), (0.19, 2), (0.31, 2), (0.32, 3)])
def test_epochs_are_rounded_to_whole_steps(cfg, epochs, n_steps):
    """Of 64 rows in batches of 8: an epoch is eight steps; one at least."""
    main(replace(cfg, max_steps=0, epochs=epochs, lambda_jepa=0.0))
    assert [line["step"] for line in loss_lines(cfg.out_dir)] == [*range(1, n_steps + 1)]
    assert json.loads(Path(cfg.out_dir, "settings.json").read_text())["n_steps"] == n_steps


# ----------------------------------------------------------------------------------------------
# what is trained on, and what is held out


@pytest.mark.parametrize("eos_fill", [False, True])
def test_answers_are_filled_with_end_of_text_if_asked_for_in_training_and_held_out(
        cfg, monkeypatch, eos_fill):
    """Without the fill each answer has one end-of-text; with it all answers are of one length."""
    seen, forward, process = [], DLLMJEPA.forward, train.forward_process

    def objective(self, x0, maskable, is_real, *rest):
        seen.append(("train", x0, maskable, is_real))
        return forward(self, x0, maskable, is_real, *rest)

    def held_out(x0, t, maskable, *rest, **kwargs):
        seen.append(("held out", x0, maskable, maskable))
        return process(x0, t, maskable, *rest, **kwargs)
    monkeypatch.setattr(DLLMJEPA, "forward", objective)
    monkeypatch.setattr(train, "forward_process", held_out)
    main(replace(cfg, eos_fill=eos_fill))
    eos_id = load_tokenizer("toy").eos_id
    assert {kind for kind, *_ in seen} == {"train", "held out"}
    for _, x0, maskable, is_real in seen:
        n_eos = (maskable & (x0 == eos_id)).sum(dim=1)
        lengths = maskable.sum(dim=1)
        assert (n_eos == 1).all() != eos_fill and (lengths == lengths[0]).all() == eos_fill
        assert not (maskable & ~is_real).any()


def test_the_held_out_loss_is_that_of_the_validation_rows_under_fixed_masks(cfg, tmp_path):
    """By hand: rows that are not trained on, masks of (0, 0, example), at each rate; of both tasks.
    The run's seed moves neither."""
    cfg = replace(cfg, max_steps=1, eval_t=(0.3, 0.9), forget_task="gsm8k", eval_rows=5)
    main(cfg)
    model, tok = DLLM.from_pretrained(cfg.out_dir), load_tokenizer("toy")
    rows = tokenize(gsm8k.load("validation", cfg.data_dir), tok, 64)[:5]
    trained_on = {(*row.prompt, *row.answer)
                  for row in tokenize(gsm8k.load("train", cfg.data_dir), tok, 64)}
    assert not trained_on & {(*row.prompt, *row.answer) for row in rows}
    fill = max(len(row.answer) for row in rows) + 1
    x0, maskable, is_real = collate(rows, fill, 64, tok.eos_id)
    by_hand = {}
    for rate in cfg.eval_t:
        t, total = torch.full((5,), rate), 0.0
        generators = row_generators(0, 0, [row.example_id for row in rows])
        xt, is_masked = forward_process(x0, t, maskable, tok.mask_id, generators, True)
        with torch.no_grad():
            log_p = model(xt, is_real).log_softmax(dim=-1)
        for b in range(5):
            where = is_masked[b].nonzero()[:, 0]
            total += -log_p[b, where, x0[b, where]].mean().item() / 5
        by_hand[f"{rate:g}"] = total
    assert lines(cfg.out_dir)[-1]["held_out"]["gsm8k"] == pytest.approx(by_hand, abs=2e-5)
    for other in (replace(cfg, seed=7), replace(cfg, batch_size=2)):
        assert train.held_out_loss(model, rows, other, 64) == pytest.approx(by_hand, abs=2e-5)


def test_the_rows_of_both_held_out_losses_are_their_tasks_validation_rows(cfg, monkeypatch):
    asked, real = [], train.load_rows
    monkeypatch.setattr(train, "load_rows", lambda *args: asked.append(args[:2]) or real(*args))
    main(replace(cfg, max_steps=1, forget_task="toy", data_dir=cfg.data_dir))
    assert asked == [("gsm8k", "train"), ("gsm8k", "validation"), ("toy", "validation")]
    for line in lines(cfg.out_dir):
        assert "held_out" not in line or list(line["held_out"]) == ["gsm8k", "toy"]


def test_the_log_has_the_numbers_that_matter(cfg):
    main(cfg)
    steps = loss_lines(cfg.out_dir)
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert {"loss", "diffusion", "jepa", "jepa_floor", "lr", "grad_norm", "ms",
                "seconds"} <= line.keys()
        assert line["loss"] == pytest.approx(line["diffusion"] + line["jepa"], rel=1e-4)
    assert [line["step"] for line in lines(cfg.out_dir) if "held_out" in line] == [0, 3]
    settings = json.loads((Path(cfg.out_dir) / "settings.json").read_text())
    assert settings["lr"] == cfg.lr and settings["torch"] == torch.__version__
    assert settings["commit"]


def test_rows_that_do_not_fit_are_counted_aloud(cfg, capsys):
    main(replace(cfg, max_length=28, max_steps=1))
    assert "longer than max_length=28 tokens and are left out" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------
# accidents


def kill_in_second_save():
    """Let this process kill itself when half of its second checkpoint is written."""
    real, calls = checkpoint.save_tensors, []

    def save_tensors(tensors, path):
        real(tensors, path)
        calls.append(path)
        if len(calls) == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save_tensors = save_tensors


def test_kill_9_in_the_middle_of_a_save_leaves_the_older_checkpoint_usable(cfg, tmp_path):
    cfg = replace(cfg, max_steps=6, save_every=3)
    run_ranks(cfg, 1, kill_in_second_save, code=-signal.SIGKILL)
    assert [path.name for path in Path(cfg.out_dir).glob("step_*")] == ["step_0000003"]
    main(replace(cfg, resume=True))         # goes on from step 3 and finishes
    uninterrupted = replace(cfg, out_dir=str(tmp_path / "whole"))
    main(uninterrupted)
    assert_same(uninterrupted, cfg)


@pytest.mark.parametrize("option, words", [
    ("--lrr=1", "did you mean 'lr'"),
    ("--lr=fast", "is not a finite float"),
    ("--batch_size=0", "at least 1"),
    ("--keep=0", "at least 1"),
    ("--shard=True", "torchrun"),
    ("--shard_over=2", "add --shard"),
    ("--gather_once", "add --shard"),
    ("--shard_over=-1", "must not be negative"),
    ("--resume=perhaps", "False, True, auto"),
    ("--on_nan=ignore", "stop, skip"),
    ("--t_ctx=1.5", "masking rate"),
    ("--t_tgt=0", "masking rate"),
    ("--ema_decay=2", "[0, 1]"),
    ("--mask_scope=answer", "response, all"),
    ("--eval_t=2", "masking rates"), ("--eval_t=-1", "masking rates"),
    ("--eval_t=0.5,0", "masking rates"), ("--eval_t=", "masking rates"),
    ("--eval_t=nan", "eval_t='nan'"), ("--eval_t=0.2,inf", "e.g. --eval_t=0.2"),
    ("--min_lr_ratio=1.5", "[0, 1]"), ("--warmup_ratio=1e308", "[0, 1]"),
    ("--beta2=1", "[0, 1)"), ("--epochs=1e308", "epochs=1e+308 is too large"),
    ("--lr=inf", "finite float"), ("--lr=-1", "must not be negative"),
    ("--max_steps=2147483649", "2**31"), ("--test_questions=1" + 99 * "0", "2**31"),
    ("--device=meta", "device='meta'"), ("--device=cuda:99", "device='cuda:99'"),
    ("--device=toaster", "device='toaster'"), ("--device=", "device=''"),
    ("--task=gsm9k", "choose from"),
    ("--tokenizer=letters", "bytes, toy"), ("--tokenizer=", "--tokenizer=bytes, toy or words"),
    ("--data_dir=nowhere", "data_dir='nowhere'"),
    ("--init_from=nowhere", "nowhere"),
    ("--micro_batch_size=3", "multiple of micro_batch_size=3"),
    ("--max_length=4", "fits max_length=4"),
    ("--device=cuda:77", "cuda:77"),
    ("--resume=True", "no checkpoint"),
    ("config/none.py", "config/tiny.py"),
])
def test_a_bad_setting_stops_with_one_sentence(cfg, monkeypatch, option, words):
    assert words in sentence_of(monkeypatch, cfg, option)


FLOATS = sorted(field.name for field in fields(TrainConfig) if field.type is float)


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_that_is_not_finite_is_refused_in_code_too(name):
    for value in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"^{name}={value} "):
            TrainConfig(**{name: value})
    with pytest.raises(ValueError, match=f"^{name}="):
        TrainConfig(**{name: -1e308})


@pytest.mark.parametrize("rates", [(), (math.nan,), (math.inf,), (0.5, 0.0), (1.5,), (-0.1,)])
def test_rates_that_are_none_are_refused_in_code_too(rates):
    with pytest.raises(ValueError, match="eval_t.* masking rates"):
        TrainConfig(eval_t=rates)


@pytest.mark.parametrize("size", [10 ** 9, 2 ** 31, 10 ** 18, 10 ** 100],
                         ids=["billion", "int32", "int64", "huge"])
@pytest.mark.parametrize("name", ["batch_size", "micro_batch_size", "n_pred_layer", "lora_rank",
                                  "pred_width", "eval_rows", "max_length"])
def test_absurd_sizes_are_answered_at_once(cfg, monkeypatch, name, size):
    """In a sentence, or, where a size is only a bound, by an ordinary run."""
    began = time.process_time()
    if name in ("eval_rows", "max_length") and size <= 2 ** 31:
        main(replace(cfg, **{name: size}, max_steps=1, lambda_jepa=0.0))
    else:
        said = sentence_of(monkeypatch, cfg, f"--{name}={size}", "--init_from=x")
        assert said.startswith(f"{name}={str(size)[:9]}") and "too large" in said
    assert time.process_time() - began < 60


@pytest.mark.parametrize("content, words", [
    ("", "no rows"), ('{"question": "a", "answer": "b"}\n{"question": ', "line 2"),
    ('{"q": 1}\n', "row 1"), ("[1, 2]\n", "line 1"), ("\xff", "UTF-8")])
def test_bad_data_stops_with_one_sentence(cfg, monkeypatch, tmp_path, content, words):
    (tmp_path / "train.jsonl").write_bytes(content.encode("latin-1"))
    assert words in sentence_of(monkeypatch, cfg, f"--data_dir={tmp_path}")


def test_a_run_is_never_started_over_by_accident(cfg, monkeypatch):
    main(cfg)
    before = fingerprint(cfg.out_dir)
    assert "--resume" in sentence_of(monkeypatch, cfg)
    assert fingerprint(cfg.out_dir) == before
    main(replace(cfg, overwrite=True))      # but may be, on purpose


@pytest.mark.parametrize("damage, words", [
    ("truncate", "truncated"), ("foreign", "gpt2"), ("no config", "no checkpoint"),
    ("other shape", "shape"), ("no tokenizer", "tokenizer")])
def test_a_damaged_checkpoint_stops_with_one_sentence(cfg, monkeypatch, damage, words):
    main(cfg)
    folder = Path(cfg.out_dir) / "step_0000003"
    config = json.loads((folder / "config.json").read_text())
    if damage == "truncate":
        with open(folder / "model.safetensors", "r+b") as file:
            file.truncate(1000)
    elif damage == "foreign":
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    elif damage == "no config":
        folder.rename(folder.with_name("elsewhere"))
    elif damage == "other shape":
        (folder / "config.json").write_text(json.dumps({**config, "n_hidden": 64}))
    else:
        (folder / "tokenizer.json").unlink()
    before = fingerprint(cfg.out_dir)
    other = replace(cfg, out_dir=cfg.out_dir + "2", init_from=cfg.out_dir, tokenizer="")
    assert words in sentence_of(monkeypatch, other)
    assert words in sentence_of(monkeypatch, cfg, "--resume")
    assert fingerprint(cfg.out_dir) == before


def test_another_vocabulary_than_the_checkpoints_stops_with_one_sentence(cfg, monkeypatch,
                                                                         tmp_path):
    main(cfg)
    other = replace(cfg, out_dir=str(tmp_path / "other"), init_from=cfg.out_dir, tokenizer="bytes")
    assert "vocabulary" in sentence_of(monkeypatch, other)


def test_weights_that_are_not_there_are_named(monkeypatch, tmp_path):
    def snapshot_download(*args, **kwargs):
        raise ConnectionError("no network")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name in ("llada8b_gsm8k", "llada8b_gsm8k_wide_t"):
        said = sentence_of(monkeypatch, None, f"config/{name}.py", f"--out_dir={tmp_path}",
                           "--shard=False")
        assert "GSAI-ML/LLaDA-8B-Base" in said and "weights" in said


def test_a_gradient_that_is_not_finite_leaves_the_checkpoint_as_it_was(cfg, monkeypatch):
    main(cfg)
    before = tensors(cfg.out_dir)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="at step 4 the gradient is not finite"):
        main(replace(cfg, resume=True, max_steps=4))
    after = tensors(cfg.out_dir)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_checkpoints_are_ever_removed(cfg):
    for name in ("step_notes", "step_0000009_copy", "other"):
        (Path(cfg.out_dir) / name).mkdir(parents=True)
        (Path(cfg.out_dir) / name / "precious").write_text("x")
    main(cfg)
    main(replace(cfg, overwrite=True))
    assert len(list(Path(cfg.out_dir).glob("*/precious"))) == 3


def test_a_loss_that_is_not_finite_stops_the_run(cfg, monkeypatch):
    sentence = sentence_of(monkeypatch, cfg, "--lr=1e30", "--grad_clip=0", "--max_steps=20")
    assert "at step" in sentence and "the last checkpoint is kept" in sentence


# ----------------------------------------------------------------------------------------------
# the whole path


@pytest.mark.slow
def test_the_bare_command_trains_one_model_and_says_how_many_questions_it_answers(tmp_path):
    """With fewer steps and questions: a summary, and the answers of this run alone."""
    command = ["train.py", "config/tiny.py", f"--out_dir={tmp_path}/out", "--eval_rows=32"]
    for run, steps, n, more in ((python, 3, 40, []), (script, 5, 50, ["--overwrite"])):
        done = run(*command, f"--max_steps={steps}", f"--test_questions={n}", *more)
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / "out/summary.json").read_text())
        assert summary.keys() == {"accuracy", "stderr", "n", "seconds"} and summary["n"] == n
        assert done.stdout.splitlines()[-1].startswith(f"{tmp_path}/out answers ")
        assert f"of {n} unseen questions" in done.stdout
        answers = (tmp_path / "out/test.jsonl").read_text().splitlines()
        right = [json.loads(line)["verdict"] for line in answers]
        assert len(right) == n and summary["accuracy"] == sum(right) / n


@pytest.mark.slow
def test_held_out_loss_falls_on_the_real_gsm8k_rows(tmp_path):
    if not (DATA / "gsm8k").is_dir():
        pytest.skip(f"the GSM8K rows are not at {DATA / 'gsm8k'}")
    cfg = configure(TrainConfig, ["config/gsm8k_bytes.py", f"--out_dir={tmp_path}/run",
                                  "--max_steps=20", "--eval_rows=8", "--batch_size=4",
                                  "--eval_every=20",
                                  f"--data_dir={DATA}/gsm8k"])
    main(cfg)
    first, last = [line["held_out"]["gsm8k"] for line in lines(cfg.out_dir) if "held_out" in line]
    assert all(last[t] < first[t] - 0.5 for t in first)


# ----------------------------------------------------------------------------------------------
# what each setting reaches


def test_the_defaults_are_the_papers_values_and_ours_where_it_has_none():
    stated = dict(lambda_jepa=1.0, t_ctx=0.2, t_tgt=0.7, n_pred_layer=2, ema_decay=0.996, lr=1e-5,
                  epochs=2.0, diffusion_t="context", loss_form="masked_mean")
    ours = dict(mask_scope="response", beta2=0.999, weight_decay=0.0, grad_clip=1.0, max_steps=0,
                warmup_ratio=0.03, min_lr_ratio=0.0, eos_fill=True, batch_size=64, max_length=256,
                optimizer="adamw", lora_rank=0, lora_alpha=64.0, on_nan="stop", seed=42, keep=1)
    found = vars(TrainConfig())
    assert {name: found[name] for name in stated | ours} == stated | ours


@pytest.mark.parametrize("eos_fill", [True, False])
def test_the_held_out_loss_is_the_mean_over_rows_each_taken_alone(cfg, eos_fill):
    """In batches of any size, the last one short; a row whose masks are all left out gets one."""
    cfg = replace(cfg, eos_fill=eos_fill, batch_size=3, eval_t=(0.02, 0.5))
    tok = load_tokenizer("toy")
    rows = tokenize(gsm8k.load("validation", cfg.data_dir), tok, 64)[:7]
    model = DLLM(ModelConfig(tok.n_vocab, tok.mask_id, tok.eos_id, **PRESETS["tiny"]))
    model.init_weights(torch.Generator().manual_seed(0))
    model.head.weight.data *= 20
    fill = eos_fill * (1 + max(len(row.answer) for row in rows))
    found = held_out_loss(model, rows, cfg, 64)
    for rate in cfg.eval_t:
        alone = []
        for row in rows:
            x0, maskable, _ = collate([row], fill, 64, tok.eos_id)
            xt, is_masked = forward_process(x0, torch.tensor([rate]), maskable, tok.mask_id,
                                            row_generators(0, 0, [row.example_id]), True)
            log_p = model(xt).log_softmax(dim=-1).gather(-1, x0[..., None])[..., 0]
            alone.append(-log_p[is_masked].mean().item())
        assert found[f"{rate:g}"] == pytest.approx(sum(alone) / 7, abs=2e-5)


def test_held_out_are_the_first_validation_rows_of_the_task_and_of_the_one_to_forget(cfg,
                                                                                    monkeypatch):
    seen = []
    monkeypatch.setattr(train, "held_out_loss",
                        lambda model, rows, *rest: seen.append(rows) or {"0.5": 1.0})
    main(replace(cfg, forget_task="toy", eval_rows=5, max_steps=1))
    tok = load_tokenizer("toy")
    rows = [tokenize(examples, tok, 64)[:5] for examples in (
        gsm8k.load("validation", cfg.data_dir), toy.load("validation"))]
    assert seen == rows + rows              # before the first step and after the last
    assert lines(cfg.out_dir)[0]["held_out"].keys() == {"gsm8k", "toy"}


def test_rows_are_as_long_as_the_model_reads_whatever_max_length_is(cfg, tmp_path, capsys,
                                                                    monkeypatch):
    tok = load_tokenizer("toy")
    rows = tokenize(gsm8k.load("train", cfg.data_dir), tok, 64)
    lengths = sorted(len(row.prompt) + len(row.answer) + 1 for row in rows)
    most = lengths[len(lengths) // 2]
    assert lengths[0] < most < lengths[-1]
    base = write_checkpoint(tmp_path / "short", tok, block_size=most)
    filled = set()
    monkeypatch.setattr(train, "collate", lambda some, fill, max_length, eos_id: filled.add(
        max_length) or collate(some, fill, max_length, eos_id))
    main(replace(cfg, init_from=str(base), tokenizer="", max_length=64, lambda_jepa=0.0))
    assert filled == {most}
    assert f"longer than max_length={most} tokens and are left out" in capsys.readouterr().out


def test_a_checkpoint_is_written_every_save_every_steps_and_at_the_end_and_at_no_other(
        cfg, monkeypatch, tmp_path):
    saved, real = [], train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint",
                        lambda out_dir, step, *rest: saved.append(step) or real(out_dir, step,
                                                                                *rest))
    main(replace(cfg, max_steps=5, save_every=2, keep=9, log_every=100))
    assert saved == [2, 4, 5]
    assert [line["step"] for line in loss_lines(cfg.out_dir)] == [1, 2, 4, 5]
    for step in (4, 5):
        shutil.rmtree(Path(cfg.out_dir) / f"step_000000{step}")
    saved.clear()
    main(replace(cfg, max_steps=5, save_every=2, keep=9, log_every=100, resume=True))
    assert saved == [4, 5]


def test_a_resumed_run_takes_the_held_out_loss_of_its_first_step_once(cfg, tmp_path, monkeypatch):
    assert_resuming_changes_nothing(replace(cfg, eval_every=3), tmp_path, monkeypatch)


def test_overwriting_leaves_nothing_of_the_longer_run_before_it(cfg):
    main(cfg)
    answers = ("test.jsonl", "test.jsonl.part0", "test.jsonl.part11", "test.json", "summary.json")
    for name in (*answers, "test.txt", "other.jsonl", "eval_gsm8k_0shot.jsonl"):
        (Path(cfg.out_dir) / name).write_text("x")
    main(replace(cfg, overwrite=True, max_steps=1))
    names = {path.name for path in Path(cfg.out_dir).iterdir()}
    assert names - {"lock"} == {"log.jsonl", "settings.json", "step_0000001", "test.txt",
                                "other.jsonl", "eval_gsm8k_0shot.jsonl"}
    assert [line["step"] for line in lines(cfg.out_dir)] == [0, 1, 1]


def test_only_a_base_can_be_told_to_collapse(cfg, monkeypatch, capsys):
    monkeypatch.setattr("training.log.collapsed", lambda *_: "the embeddings collapse")
    main(cfg)
    assert "collapse" not in capsys.readouterr().out


def test_the_questions_at_the_end_are_asked_as_the_rows_were_trained(cfg, monkeypatch):
    cfg = replace(cfg, chat=True, variant="marks", test_questions=7)
    asked = []
    monkeypatch.setattr(train, "evaluate", lambda ask, *ranks: asked.append((ask, ranks)) or (
        {"accuracy": 0.5, "stderr": 0.1, "n": 7}, []))
    Path(cfg.out_dir).mkdir()
    train.answer_questions(cfg, 0, 1, 0.0)
    [(ask, ranks)] = asked
    assert ranks == (0, 1) and ask.init_from == cfg.out_dir and ask.limit == 7
    for name in ("chat", "task", "data_dir", "variant", "device"):
        assert getattr(ask, name) == getattr(cfg, name), name
    assert ask.split == "test" and Path(ask.out) == Path(cfg.out_dir) / "test.jsonl"


def test_clipping_scales_to_the_norm_and_0_leaves_the_gradient_as_it_is():
    objective = torch.nn.Linear(3, 2)
    for max_norm, left in ((0.5, 0.5), (0.0, 8 ** 0.5), (9.0, 8 ** 0.5)):
        for p in objective.parameters():
            p.grad = torch.ones_like(p)                         # 8 entries
        assert setup.clip_gradients(objective, max_norm).item() == pytest.approx(8 ** 0.5)
        norm = torch.cat([p.grad.flatten() for p in objective.parameters()]).norm()
        assert norm.item() == pytest.approx(left, rel=1e-5)


def test_what_is_loaded_is_as_the_settings_say(cfg, tmp_path):
    """Weights are fp32 whatever computes, but for LoRA's frozen base; adapters have the seed."""
    base = write_checkpoint(tmp_path / "base", load_tokenizer("toy"))
    cfg = replace(cfg, init_from=str(base), tokenizer="", dtype="bfloat16", pack=True,
                  checkpoint_activations="full", seed=3)
    model, *_ = setup.load(cfg, None, torch.device("cpu"))
    assert model.compute_dtype == torch.bfloat16 and model.embed.weight.dtype == torch.float32
    assert model.pack and model.checkpoint_activations == "full"
    adapters = []
    for seed in (3, 4):
        with_lora = replace(cfg, lora_rank=2, lora_alpha=8.0, seed=seed)
        model, *_ = setup.load(with_lora, None, torch.device("cpu"))
        linear = model.blocks[0].q_proj
        assert linear.weight.dtype == torch.bfloat16 and linear.scale == 4.0
        adapters.append(linear.lora_a)
    assert not torch.equal(*adapters)


def test_training_reads_the_variant_of_its_task(cfg, tmp_path):
    rows = [{"question": f"{i}+1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
            for i in range(260)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    cfg, tok = replace(cfg, data_dir=str(tmp_path)), load_tokenizer("bytes")
    for variant in ("", "marks"):
        found = setup.load_rows("gsm8k", "train", replace(cfg, variant=variant), tok, 64, 0)
        assert all((b"<<" in bytes(row.answer)) == bool(variant) for row in found)


def test_weights_of_another_vocabulary_are_refused_before_training(cfg, tmp_path):
    base = write_checkpoint(tmp_path / "base", load_tokenizer("toy"))
    load_tokenizer("bytes").save(base)
    with pytest.raises(ValueError, match="tokenizer 'bytes'"):
        setup.load(replace(cfg, init_from=str(base), tokenizer=""), None, torch.device("cpu"))


def test_a_run_is_not_started_from_a_checkpoint_that_it_would_remove(cfg, monkeypatch):
    main(cfg)
    before = fingerprint(cfg.out_dir)
    said = sentence_of(monkeypatch, replace(cfg, init_from=cfg.out_dir, tokenizer="",
                                            overwrite=True))
    assert "is a checkpoint in out_dir" in said and fingerprint(cfg.out_dir) == before


def test_the_opening_line_says_how_much_of_the_start_the_ema_keeps(cfg, capsys):
    main(replace(cfg, max_steps=2, ema_decay=0.5))
    assert "the EMA is still 25% the start" in capsys.readouterr().out
