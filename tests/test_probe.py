"""Laws of probe.py: no change no drift, a change is seen from its depth on, streaming is exact."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from analysis import probe
from analysis.likelihood import held_out_losses, masked_copies
from analysis.probe import (Blend, Checkpoint, ProbeConfig, distances, held_out_rows, names_at,
                            states)
from model import DLLM, ModelConfig
from pretrained.tokenizer import byte_tokenizer, toy_tokenizer
from tasks.stats import half_95

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
KINDS = {"ours": {}, "shift": dict(shift=True, qkv_bias=True),
         "tied": dict(tied_head=True, qk_norm=True, n_kv_head=1, head_dim=12)}


@pytest.fixture(autouse=True)
def one_thread():
    """For matrices as small as these a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_model(seed, tok=byte_tokenizer(), **kind):
    config = ModelConfig(**{**dict(
        vocab_size=tok.n_vocab, mask_id=tok.mask_id, eos_id=tok.eos_id, n_layer=3, block_size=64,
        n_head=2, n_kv_head=2, n_embd=16, n_hidden=32), **kind})
    model = DLLM(config).init_weights(torch.Generator().manual_seed(seed))
    return model


def write(model, folder, tok=byte_tokenizer()):
    folder.mkdir()
    model.save(folder)
    tok.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """base, its copy `same`, another model `tuned`, and a small wikitext."""
    root = tmp_path_factory.mktemp("probe")
    base, other = new_model(0), new_model(1)
    write(base, root / "base")
    shutil.copytree(root / "base", root / "same")
    write(other, root / "tuned")
    (root / "text").mkdir()
    (root / "text" / "test.jsonl").write_text("\n".join(
        json.dumps({"text": f" line {i} , of them @-@ {i * i} \n"}) for i in range(40)))
    return root


@pytest.fixture
def cfg(root, tmp_path):
    return ProbeConfig(base=str(root / "base"), models=(str(root / "tuned"),), n_rows=6, window=20,
                       data_dir=str(root / "text"), out_dir=str(tmp_path / "out"), device="cpu",
                       rates=(0.3, 1.0))


# ---- drift ----


def test_a_model_has_not_drifted_from_itself(cfg, root):
    cfg.models = (str(root / "same"),)
    found = probe.probe(cfg)
    for name in (cfg.base, *cfg.models):
        scores = found["models"][name]
        for key in ("drift", "cosine_distance", "weight_drift"):
            assert scores[key] == [0.0] * 5, key
        assert scores["mean_drift"] == scores["forgetting"] == scores["half_95"] == 0
        assert scores["forgetting_by_rate"] == [0, 0]


@pytest.mark.parametrize("depth", range(5))
def test_a_change_at_one_depth_is_seen_from_there_on_and_nowhere_below(cfg, root, tmp_path, depth):
    model, generator = DLLM.from_checkpoint(root / "base"), torch.Generator().manual_seed(99)
    with torch.no_grad():
        for name in names_at(model, depth):
            p = model.get_parameter(name)
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    cfg.models = (write(model, tmp_path / "changed"),)
    scores = probe.probe(cfg)["models"][cfg.models[0]]
    for key in ("drift", "cosine_distance"):
        assert scores[key][:depth] == [0.0] * depth
        assert min(scores[key][depth:]) > 1e-6
    assert [value > 0 for value in scores["weight_drift"]] == [n == depth for n in range(5)]
    assert scores["mean_drift"] == pytest.approx(sum(scores["drift"][1:4]) / 3)


def test_drift_is_relative_to_the_base_and_of_real_tokens_only():
    h0 = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [5.0, 5.0]]])
    h = torch.tensor([[[6.0, 8.0], [0.0, 2.0], [float("nan"), 0.0]]])
    found = distances([h], [h0], [torch.tensor([[True, True, False]])])
    assert found["drift"] == pytest.approx((1 + math.sqrt(5)) / 2)
    assert found["cosine_distance"] == pytest.approx((0 + 1) / 2, abs=1e-7)


def test_the_drift_of_weights_is_of_all_weights_of_a_depth_together(cfg, root, tmp_path):
    model = DLLM.from_checkpoint(root / "base")
    with torch.no_grad():
        model.blocks[1].q_proj.weight.mul_(2)
    params = [p.detach() for p in DLLM.from_checkpoint(root / "base").blocks[1].parameters()]
    length = torch.cat([p.flatten() for p in params]).norm()
    cfg.models = (write(model, tmp_path / "changed"),)
    drift = probe.probe(cfg)["models"][cfg.models[0]]["weight_drift"][2]
    assert drift == pytest.approx(model.blocks[1].q_proj.weight.norm().item() / 2 / length.item())


# ---- streaming ----


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_equals_a_plain_forward_at_every_depth(tmp_path, kind):
    model = new_model(2, **KINDS[kind])
    seen = []
    for module in (model.embed, *model.blocks, model.norm):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    xt = torch.randint(256, (3, 11), generator=torch.Generator().manual_seed(0))
    is_real = torch.arange(11) < torch.tensor([[11], [7], [4]])
    model.encode(xt, is_real)
    whole, seen[:] = list(seen), []
    model.encode(xt[:, :5])
    source = Checkpoint(write(model, tmp_path / kind), CPU)
    depths = 0
    for depth, h in enumerate(states(source, [(xt, is_real), (xt[:, :5], None)])):
        torch.testing.assert_close(h[0], whole[depth].detach())
        torch.testing.assert_close(h[1], seen[depth].detach())
        depths += 1
    assert depths == len(whole) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_its_losses_are_those_of_likelihood(cfg, tmp_path, monkeypatch, kind):
    models = [new_model(seed, **KINDS[kind]) for seed in (0, 1)]
    cfg.base, cfg.models = write(models[0], tmp_path / "a"), (write(models[1], tmp_path / "b"),)
    monkeypatch.setattr(probe, "BATCH_TOKENS", 50)          # more than one batch
    found = probe.probe(cfg)
    rows = held_out_rows(cfg, byte_tokenizer(), 64)
    losses = [held_out_losses(model, torch.tensor([ids for ids, _ in rows]), cfg.rates)
              for model in models]
    a, b = (found["models"][name] for name in (cfg.base, *cfg.models))
    assert a["loss_by_rate"] == pytest.approx(losses[0].mean(dim=0).tolist(), rel=1e-5)
    assert b["loss_by_rate"] == pytest.approx(losses[1].mean(dim=0).tolist(), rel=1e-5)
    by_row = (losses[1] - losses[0]).mean(dim=1)
    assert b["forgetting"] == pytest.approx(by_row.mean().item(), rel=1e-4)
    assert b["half_95"] == pytest.approx(half_95(by_row.tolist()), rel=1e-3)    # Student's t


def test_never_more_than_one_depth_of_a_model_is_in_memory(root):
    source = Checkpoint(str(root / "base"), CPU)
    assert all(p.is_meta for p in source.model.parameters())
    for depth, _ in enumerate(states(source, [(torch.zeros(1, 3, dtype=torch.long), None)])):
        real = {name for name, p in source.model.named_parameters() if not p.is_meta}
        assert real == set(names_at(source.model, depth))
    assert all(p.is_meta for p in source.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_depth(kind):
    model = new_model(0, **KINDS[kind])
    names = [name for depth in range(5) for name in names_at(model, depth)]
    assert sorted(names) == sorted(name for name, _ in
                                   model.named_parameters(remove_duplicate=False))


def test_batches_change_nothing(cfg, monkeypatch):
    cfg.text, cfg.data_dir, cfg.window, results = "toy_base", "", 60, []
    for batch_tokens in (1, 100, 10_000):
        monkeypatch.setattr(probe, "BATCH_TOKENS", batch_tokens)
        results.append(probe.probe(cfg)["models"][cfg.models[0]])
    for other in results[1:]:
        for key in ("drift", "effective_rank", "diversity", "std", "loss_by_rate"):
            assert other[key] == pytest.approx(results[0][key], rel=1e-4), key


# ---- interpolation ----


def test_a_blend_is_exactly_the_base_at_0_and_the_tuned_model_at_1(root):
    base, tuned = (Checkpoint(str(root / name), CPU) for name in ("base", "tuned"))
    for depth in range(5):
        for scale, end in ((0, base), (1, tuned)):
            blend = Blend(base, tuned, scale).read(depth)
            for name, tensor in end.read(depth).items():
                assert torch.equal(blend[name], tensor), name
        for name, tensor in Blend(base, tuned, -0.5).read(depth).items():
            a, b = base.read(depth)[name], tuned.read(depth)[name]
            torch.testing.assert_close(tensor, a - 0.5 * (b - a))


def test_the_ends_of_the_interpolation_are_the_two_models(cfg):
    cfg.scales = (0.0, 0.5, 1.0)
    scores = probe.probe(cfg)["models"][cfg.models[0]]
    start, half, end = scores["scales"]
    assert start["drift"] == [0.0] * 5 and start["forgetting"] == 0
    for key in ("mean_drift", "drift", "forgetting", "half_95", "forgetting_by_rate"):
        assert end[key] == scores[key]
    assert 0 < half["mean_drift"] != end["mean_drift"]


# ---- rank and diversity ----


def test_texts_whose_states_are_all_alike_have_rank_0_and_diversity_0(cfg, root, tmp_path):
    model, generator = DLLM.from_checkpoint(root / "base"), torch.Generator().manual_seed(5)
    with torch.no_grad():                                       # every token is nearly the same
        noise = 1 + 1e-6 * torch.randn(model.embed.weight.shape, generator=generator)
        model.embed.weight.copy_(model.embed.weight[:1] * noise)
    cfg.models = (write(model, tmp_path / "collapsed"),)
    base, collapsed = probe.probe(cfg)["models"].values()
    assert collapsed["effective_rank"] == [0.0] * 5
    assert collapsed["diversity"] == pytest.approx([0.0] * 5, abs=1e-6)
    assert min(base["effective_rank"]) > 2 and min(base["diversity"]) > 1e-3


# ---- texts and masks ----


def test_a_prompt_is_never_masked_and_the_number_of_masks_is_exact():
    rows = [([*range(10, 30)], 12), ([*range(40, 45)], 4), ([1, 2], 1)]
    copies = list(masked_copies(rows, (0.01, 0.5, 1.0), 0))
    assert len(copies) == 9
    for n, (ids, is_masked) in enumerate(copies):
        row, n_given = rows[n // 3]
        L, t = len(row) - n_given, (0.01, 0.5, 1.0)[n % 3]
        assert ids.tolist() == row and not is_masked[:n_given].any()
        assert is_masked.sum() == max(1, int(t * L + 0.5))


def test_rows_of_a_task_are_its_validation_rows_the_longest_first(cfg):
    cfg.text, cfg.data_dir, cfg.n_rows, cfg.window = "toy_base", "", 5, 64
    rows = held_out_rows(cfg, toy_tokenizer(), 64)
    lengths = [len(ids) for ids, _ in rows]
    assert len(rows) == 5 and lengths == sorted(lengths, reverse=True)
    for ids, n_given in rows:
        text = toy_tokenizer().decode(ids[:n_given])
        assert text.startswith(("Story:", "Sums:")) and ids[-1] == toy_tokenizer().eos_id


# ---- the file and the tables ----


def test_the_file_holds_what_was_found_and_how_the_models_came_about(cfg, root, tmp_path):
    folder = tmp_path / "run" / "step_0000007"
    shutil.copytree(root / "tuned", folder)
    (folder / "train_state.json").write_text(json.dumps(
        {"step": 7, "settings": {"lambda_jepa": 1.0, "seed": 3}}))
    cfg.models = (str(root / "same"), str(folder.parent))
    found = probe.probe(cfg)
    saved = json.loads((Path(cfg.out_dir) / "probe.json").read_text())
    assert saved["models"] == found["models"] and saved["n"] == 6 and saved["tokens"] == 6 * 20
    assert saved["depths"] == ["embed", "1", "2", "3", "norm"]
    assert found["models"][cfg.models[0]]["trained"] is None
    assert found["models"][cfg.models[1]]["trained"] == {"lambda_jepa": 1.0, "seed": 3, "step": 7}


def test_tables_have_a_line_a_model_and_fit_100_columns(cfg, root, tmp_path, capsys):
    cfg.scales = (0.5,)
    cfg.models = tuple(write(new_model(5 + n), tmp_path / f"a_very_long_name_of_model_{n}")
                       for n in range(2))
    probe.main(cfg)
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 100] == []
    assert sum("name_of_model_" in line for line in out.splitlines()) == 2 + 2


# ---- mistakes ----


def refusal(cfg):
    with pytest.raises((ValueError, OSError)) as error:
        probe.main(cfg)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_mistakes_are_one_sentence(cfg, root, tmp_path):
    change = lambda **settings: ProbeConfig(**{**vars(cfg), **settings})
    assert "--base" in refusal(change(base=""))
    assert "--models" in refusal(change(models=()))
    assert "nowhere" in refusal(change(models=(str(root / "tuned"), "nowhere")))
    assert "there is no file" in refusal(change(data_dir=str(tmp_path)))
    assert "there is no task 'nothing'" in refusal(change(text="nothing"))
    assert "block_size=64" in refusal(change(window=65))
    assert "no window of 100000" in refusal(change(window=100_000))
    for wrong in (dict(n_rows=-1), dict(n_rows=1), dict(window=1), dict(rates=()),
                  dict(rates=(0.0,)), dict(rates=(1.5,))):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            change(**wrong)


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_a_scale_that_is_not_finite_is_one_sentence(cfg, scale):
    cfg.scales = (scale,)
    assert "not finite" in refusal(cfg)


def test_only_models_of_one_shape_and_one_vocabulary_are_compared(cfg, tmp_path):
    cfg.models = (write(new_model(0, n_layer=2), tmp_path / "short"),)
    assert "are not the same network" in refusal(cfg)
    model = new_model(0, vocab_size=toy_tokenizer().n_vocab)
    cfg.base = write(model, tmp_path / "bytes")
    cfg.models = (write(model, tmp_path / "words", toy_tokenizer()),)
    assert "different tokenizers" in refusal(cfg)
    assert not os.path.exists(cfg.out_dir)


def test_weights_that_overflow_are_told_and_the_models_before_are_kept(cfg, root, tmp_path):
    model = DLLM.from_checkpoint(root / "base")
    with torch.no_grad():
        model.norm.weight.fill_(1e38)                       # finite, so that the file can be read
    cfg.models = (str(root / "tuned"), write(model, tmp_path / "huge"))
    assert "not finite" in refusal(cfg)
    saved = json.loads((Path(cfg.out_dir) / "probe.json").read_text())
    assert list(saved["models"]) == [cfg.base, cfg.models[0]]


def test_the_script_runs_from_the_command_line(cfg):
    command = [sys.executable, "analysis/probe.py", f"--base={cfg.base}", "--text=toy_base",
               f"--models={cfg.models[0]}", f"--out_dir={cfg.out_dir}", "--n_rows=4",
               "--window=60", "--rates=0.5", "--device=cpu"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "toy_base: n = 4 texts" in done.stdout
    done = subprocess.run([*command, "--n_rows=1"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


def test_std_is_of_the_mean_states_and_forgetting_grows_with_the_loss(cfg, root):
    scores = probe.probe(cfg)["models"]
    rows = held_out_rows(cfg, byte_tokenizer(), 64)
    for name, found in scores.items():
        model = DLLM.from_checkpoint(name)
        states_of = [model.encode(torch.tensor([ids]))[0] for ids, _ in rows]
        means = torch.stack([h.mean(dim=0) for h in states_of])
        assert found["std"][-1] == pytest.approx(means.std(dim=0).mean().item(), rel=1e-4)
    base, tuned = scores.values()
    for rate, (a, b) in enumerate(zip(base["loss_by_rate"], tuned["loss_by_rate"])):
        assert tuned["forgetting_by_rate"][rate] == pytest.approx(b - a, rel=1e-6)
    assert tuned["mean_drift"] == pytest.approx(sum(tuned["drift"][1:4]) / 3)
