"""Laws of preserve.py: pairs are pairs, a base equals itself, no measurement is made twice."""
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from analysis import preserve
from analysis.frames import read_summaries, with_runs
from analysis.likelihood import held_out_losses, losses_of_rows
from analysis.preserve import PreserveConfig, score_choices, score_losses
from helpers import sentence, write_jsonl
from model import DLLM, ModelConfig
from pretrained.tokenizer import byte_tokenizer, toy_tokenizer
from tasks import wikitext
from tasks.common import load_examples
from tasks.stats import half_95, mcnemar

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def one_thread():
    """For matrices as small as these a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_checkpoint(folder, seed, tok=byte_tokenizer(), block_size=512):
    config = ModelConfig(vocab_size=tok.n_vocab, mask_id=tok.mask_id, eos_id=tok.eos_id, n_layer=1,
                         block_size=block_size, n_head=2, n_kv_head=2, n_embd=16, n_hidden=32)
    model = DLLM(config).init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.head.weight.mul_(20)                      # opinions firm enough to be told apart
    folder.mkdir()
    model.save(folder)
    tok.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """base, its copy `same`, another model `tuned`, and small mmlu and wikitext files in data."""
    root = tmp_path_factory.mktemp("preserve")
    write_checkpoint(root / "base", 0)
    shutil.copytree(root / "base", root / "same")
    write_checkpoint(root / "tuned", 1)
    rows = [{"question": f"{i}?", "subject": "sums", "choices": list("1234"), "answer": i % 4}
            for i in range(12)]
    files = {"mmlu/test": rows[4:], "mmlu/dev": rows[:2],
             "nl_rx_rows/train": [{"text": f"a line with {i}", "regex": f".*{i}.*"}
                                  for i in range(260)],
             "wikitext/test": [{"text": f" line {i} , of them @-@ {i * i} \n"} for i in range(40)]}
    for name, lines in files.items():
        path = root / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture
def cfg(root, tmp_path):
    return PreserveConfig(base=str(root / "base"), data_dir=str(root / "data"), window=24, n_shot=1,
                          models=(str(root / "same"), str(root / "tuned")), n_windows=10,
                          n_questions=6, rates=(0.3, 0.9), device="cpu", out=str(tmp_path / "out"))


def files_of(cfg):
    return {path.name: path.read_bytes() for path in Path(cfg.out).iterdir()}


# ---- what comes out ----


def test_a_model_with_the_weights_of_the_base_has_kept_everything(cfg):
    base, same, tuned = preserve.preserve(cfg).values()
    for scores in (base, same):
        assert scores["wikitext"]["minus_base"] == scores["wikitext"]["half_95"] == 0
        assert (scores["mmlu"]["gained"], scores["mmlu"]["lost"], scores["mmlu"]["p"]) == (0, 0, 1)
    assert same == base
    assert tuned["wikitext"]["minus_base"] != 0 and tuned["wikitext"]["half_95"] > 0


def test_the_losses_of_a_task_are_those_of_its_held_out_answers(cfg, root, capsys):
    cfg = replace(cfg, tasks=("nl_rx",), n_rows=7)
    preserve.main(cfg)
    assert "7 held-out rows" in capsys.readouterr().out
    summary = preserve.preserve(cfg)                                    # now from the files
    examples = load_examples("nl_rx", "validation", str(root / "data" / "nl_rx_rows"))[:7]
    model, tok = DLLM.from_checkpoint(root / "tuned"), byte_tokenizer()
    rows = [(tok.encode(e.prompt) + tok.encode(e.answer) + [tok.eos_id], len(tok.encode(e.prompt)))
            for e in examples]
    scores = summary[str(root / "tuned")]["tasks"]["nl_rx"]
    assert scores["by_rate"] == losses_of_rows(model, rows, cfg.rates).mean(dim=0).tolist()
    assert scores["n"] == 7 and scores["minus_base"] != 0
    assert summary[str(root / "same")]["tasks"]["nl_rx"]["minus_base"] == 0
    assert "gsm8k" in sentence(preserve.preserve, replace(cfg, tasks=("gsm8k",)))


def test_the_summary_is_what_likelihood_measures(cfg, root):
    summary = preserve.preserve(cfg)
    windows = wikitext.windows(wikitext.load_text("test", str(root / "data" / "wikitext")),
                               byte_tokenizer(), 24, 10)
    losses = [held_out_losses(DLLM.from_checkpoint(root / name), windows, (0.3, 0.9))
              for name in ("base", "tuned")]
    scores = summary[str(root / "tuned")]["wikitext"]
    assert scores["n"] == 10
    assert scores["by_rate"] == pytest.approx(losses[1].mean(dim=0).tolist())
    assert scores["mean"] == pytest.approx(losses[1].mean().item())
    difference = (losses[1] - losses[0]).mean(dim=1)
    assert scores["minus_base"] == pytest.approx(difference.mean().item())
    assert scores["half_95"] == pytest.approx(half_95(difference.tolist()))     # Student's t
    saved = json.loads((Path(cfg.out) / "summary.json").read_text())
    assert saved["models"] == summary and saved["settings"]["rates"] == [0.3, 0.9]


def test_zero_windows_or_questions_mean_all(cfg, root):
    cfg.n_windows = cfg.n_questions = cfg.n_shot = 0
    scores = preserve.preserve(cfg)[cfg.base]
    text = wikitext.load_text("test", str(root / "data" / "wikitext"))
    assert scores["wikitext"]["n"] == len(text.encode()) // 24 and scores["mmlu"]["n"] == 8


def test_a_table_has_a_line_a_model_and_fits_100_columns(cfg, capsys):
    cfg.rates = tuple(n / 10 for n in range(1, 10))
    preserve.main(cfg)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    for name in (cfg.base, *cfg.models):
        assert sum(line.startswith(name[-17:]) for line in lines) == 2
    assert sum("+0.0000  0.0000" in line for line in lines) == 1        # `same`


def test_a_model_reads_as_many_shots_as_it_has_room_for(cfg, tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(preserve, "choose", lambda model, before, *rest:
                        shown.extend(before) or torch.zeros(len(before), 4).double())
    cfg.n_shot, cfg.models = 2, (cfg.base,)
    assert preserve.preserve(cfg)[cfg.base]["fewer_shots"] == 0
    lengths = sorted({len(ids) for ids in shown})
    one_shot = len("0?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\n")
    # a question of one digit just fits, its letter included, one of two digits loses a shot
    cfg.base = write_checkpoint(tmp_path / "short", 0, block_size=lengths[0] + 1)
    cfg.n_questions, cfg.models, shown[:] = 8, (cfg.base,), []
    preserve.main(cfg)
    assert {len(ids) for ids in shown} == {lengths[0], lengths[0] + 1 - one_shot}
    assert "(fewer for 2 long questions)" in capsys.readouterr().out


# ---- the runs of a grid ----


@pytest.fixture
def study(root, tmp_path):
    """A grid of two seeds from root's base, whose plain runs are that base unchanged; and a run
    from another base."""
    grid, lines = tmp_path / "grid", []
    scores = {"split": "test", "n_shot": 0, "metrics": {"accuracy": 0.5, "n": 8}}
    for n, (arm, weight, depth) in enumerate([("plain", 0, 0), ("jepa", 1.0, 2)] * 2):
        name = arm + f"_lambda{weight}_depth{depth}" * (arm == "jepa") + f"_seed{n // 2}"
        shutil.copytree(root / ("tuned" if arm == "jepa" else "base"), grid / "small" / name)
        lines.append({"config": "small", "arm": arm, "lambda": weight, "depth": depth, **scores,
                      "seed": n // 2, "answers": f"small/{name}/test_0shot.jsonl",
                      "init_from": str(root / "base")})
    lines.append({**lines[0], "config": "other", "init_from": "another/base",
                  "answers": "other/plain_seed0/test_0shot.jsonl"})
    write_jsonl(grid / "results.jsonl", lines)
    return grid


def test_of_a_grid_the_runs_of_one_base_are_measured_and_averaged_by_arm(cfg, study, capsys):
    cfg = replace(cfg, models=(), grid=str(study))
    named = with_runs(cfg)
    assert named.base == cfg.base
    assert [Path(model).name for model in named.models] == [
        "plain_seed0", "plain_seed1", "jepa_lambda1.0_depth2_seed0", "jepa_lambda1.0_depth2_seed1"]
    preserve.main(cfg)
    said, _, table = capsys.readouterr().out.partition("\nBase preservation\n")
    assert all(line in said for line in ("\nplain 0 ", "\nplain 1 ", "\njepa 0 ", "\njepa 1 "))
    summary = read_summaries([Path(cfg.out) / "summary.json"])
    assert summary[0]["settings"]["base"] == cfg.base
    shift = [summary[0]["models"][model]["wikitext"]["minus_base"] for model in named.models]
    assert shift[0] == shift[1] == 0 and shift[2] == shift[3] != 0
    ours = {line.split()[1]: line for line in table.splitlines() if line.startswith("small ")}
    assert list(ours) == ["base", "plain", "JEPA"]
    assert f"{shift[2]:+.4f} (sd 0.0000, n = 2)" in ours["JEPA"]


def test_a_grid_that_does_not_fit_is_one_sentence(cfg, study, tmp_path):
    change = lambda **settings: replace(cfg, **{"models": (), "grid": str(study), **settings})
    several = refusal(change(base=""))
    assert "another/base" in several and cfg.base in several and "choose one" in several
    assert "base='nowhere' does not fit" in refusal(change(base="nowhere"))
    assert "brings its own models" in refusal(change(models=("some/run",)))
    assert "there is no file" in refusal(change(grid=str(tmp_path)))
    lines = [json.loads(line) | {"init_from": ""}
             for line in (study / "results.jsonl").read_text().splitlines()]
    write_jsonl(study / "results.jsonl", lines)
    assert "have no base" in refusal(change())


# ---- going on ----


def test_what_was_measured_is_not_measured_again(cfg, monkeypatch):
    first, loaded = preserve.preserve(cfg), []
    load_model = preserve.load_model
    monkeypatch.setattr(preserve, "load_model",
                        lambda name, device, **how: loaded.append(name) or load_model(name, device,
                                                                                      **how))
    before = files_of(cfg)
    assert preserve.preserve(cfg) == first and loaded == [] and files_of(cfg) == before
    (Path(cfg.out) / next(name for name in before if name.startswith("tuned"))).unlink()
    assert preserve.preserve(cfg) == first and loaded == [cfg.models[1]]
    assert files_of(cfg) == before


@pytest.mark.parametrize("change", [dict(rates=(0.3, 0.8)), dict(window=25), dict(n_windows=9),
                                    dict(n_questions=5), dict(n_shot=0)])
def test_another_question_is_asked_anew_and_the_old_answers_stay(cfg, change):
    preserve.preserve(cfg)
    before = files_of(cfg)
    for key, value in change.items():
        setattr(cfg, key, value)
    preserve.preserve(cfg)
    after = files_of(cfg)
    assert len(after) == len(before) + 3
    assert all(after[name] == before[name] for name in before if name != "summary.json")


def test_new_weights_in_an_old_folder_are_measured(cfg, tmp_path):
    folder = Path(write_checkpoint(tmp_path / "run", 2))
    cfg.models = (str(folder),)
    old = preserve.preserve(cfg)[str(folder)]
    shutil.rmtree(folder)
    write_checkpoint(folder, 3)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert preserve.preserve(cfg)[str(folder)] != old


def test_numbers_of_another_kind_of_device_are_not_mixed_with_these(cfg, monkeypatch):
    preserve.preserve(cfg)
    monkeypatch.setattr(preserve, "pick_device", lambda name: torch.device("cuda"))
    preserve.preserve(cfg)
    assert len(files_of(cfg)) == 3 + 3 + 1


def test_an_interrupted_run_keeps_the_models_that_are_done(cfg, monkeypatch):
    choose = preserve.choose

    def stop(model, *args):
        if stop.after == 0:
            raise KeyboardInterrupt
        stop.after -= 1
        return choose(model, *args)
    stop.after = 1
    monkeypatch.setattr(preserve, "choose", stop)
    with pytest.raises(KeyboardInterrupt):
        preserve.preserve(cfg)
    assert [name.split("_")[0] for name in files_of(cfg)] == ["base"]
    monkeypatch.setattr(preserve, "choose", choose)
    assert len(preserve.preserve(cfg)) == 3


# ---- mistakes ----


def refusal(cfg):
    with pytest.raises((ValueError, OSError)) as error:
        preserve.main(cfg)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_mistakes_are_one_sentence(cfg, tmp_path):
    change = lambda **settings: PreserveConfig(**{**vars(cfg), **settings})
    assert "--base" in refusal(change(base=""))
    assert "--models" in refusal(change(models=()))
    assert "nowhere" in refusal(change(models=("nowhere",)))
    assert "nowhere" in refusal(change(models=("nowhere",), data_dir=""))       # before the hub
    for settings, words in ((dict(n_shot=6), "n_shot=6"), (dict(n_shot=2 ** 31), "at most 5"),
                            (dict(window=0), "window=0"), (dict(window=-1), "window=-1")):
        with pytest.raises(ValueError, match=words):
            change(**settings)
    assert "there is no file" in refusal(change(data_dir=str(tmp_path)))
    assert "2 solved questions" in refusal(change(n_shot=3))
    assert "has 8 questions" in refusal(change(n_questions=9))
    assert "no window of 10000" in refusal(change(window=10_000))
    assert "block_size=512" in refusal(change(window=513))
    assert "above 0 and up to 1" in refusal(change(rates=(0.0,)))
    with pytest.raises(ValueError, match="must not be negative"):
        change(n_windows=-1)
    with pytest.raises(ValueError, match="n_shot=-1"):
        change(n_shot=-1)


@pytest.mark.parametrize("name, value", [
    ("log_p", [["x"] * 4] * 6), ("log_p", [[0.0] * 4]), ("losses", 1), ("losses", [[math.nan] * 9]),
    ("tokens", None), ("fewer_shots", -1), ("losses", "deleted")])
def test_numbers_on_file_that_are_none_are_told_with_the_file(cfg, name, value):
    preserve.preserve(cfg)
    for path in Path(cfg.out).glob("*_*.json"):
        measured = json.loads(path.read_text())
        path.write_text(json.dumps({key: value if key == name else kept
                                    for key, kept in measured.items()
                                    if (key, value) != (name, "deleted")}))
    assert "is not what preserve.py measured" in refusal(cfg)


def test_models_with_other_tokens_cannot_be_compared(cfg, tmp_path):
    cfg.models = (write_checkpoint(tmp_path / "words", 0, toy_tokenizer()),)
    assert "do not read the same tokens" in refusal(cfg)
    cfg.models = (write_checkpoint(tmp_path / "short", 0, block_size=120),)
    assert "do not read the same tokens" in refusal(cfg)


def test_weights_that_overflow_are_told_and_not_kept(cfg, tmp_path):
    folder = tmp_path / "huge"
    write_checkpoint(folder, 0)
    model = DLLM.from_checkpoint(folder)
    with torch.no_grad():
        model.norm.weight.fill_(1e38)                   # finite, so that the file can be read
    model.save(folder)
    cfg.models = (str(folder),)
    assert "not finite: its weights are broken" in refusal(cfg)
    assert not any(name.startswith("huge") for name in files_of(cfg))


# ---- scores ----


def test_choices_are_counted_by_hand():
    letter = lambda i, mass=1.0: [math.log(mass * (0.7 if k == i else 0.1)) for k in range(4)]
    gold = [0, 1, 2, 3, 3]
    base = [letter(0), letter(1), letter(0), letter(0), letter(0)]
    now = [letter(0), letter(2), letter(2), letter(3), letter(0, mass=0.5)]
    scores = score_choices(now, base, gold)
    assert (scores["right"], scores["n"], scores["accuracy"]) == (3, 5, 0.6)
    assert scores["stderr"] == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    assert (scores["gained"], scores["lost"]) == (2, 1) and scores["p"] == mcnemar(2, 1)
    assert scores["mass"] == pytest.approx(0.9)


def test_losses_are_compared_window_by_window():
    losses, base = [[1.0, 3.0], [2.0, 6.0], [2.0, 4.0]], [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    scores = score_losses(losses, base)
    assert scores["by_rate"] == pytest.approx([5 / 3, 13 / 3]) and scores["mean"] == 3
    assert scores["minus_base"] == pytest.approx(4 / 3)
    # differences 1, 2, 1: Student's t of two degrees of freedom is 4.303
    assert scores["half_95"] == pytest.approx(4.303 * math.sqrt(1 / 3) / math.sqrt(3), rel=1e-3)
    assert math.isnan(score_losses(losses[:1], base[:1])["half_95"])


# ---- the whole path ----


def test_the_script_runs_from_the_command_line_and_mistakes_end_as_one_line(cfg):
    command = [sys.executable, "analysis/preserve.py", f"--base={cfg.base}", "--device=cpu",
               f"--data_dir={cfg.data_dir}", f"--out={cfg.out}", "--window=24", "--n_windows=4",
               "--n_questions=4", "--n_shot=0", "--rates=0.5,1"]
    done = subprocess.run([*command, f"--models={','.join(cfg.models)}"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "Wikitext: loss per masked token at t; 4 windows of 24 tokens" in done.stdout
    assert "MMLU, 0-shot" in done.stdout
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "mmlu").is_dir(), reason=f"the real rows are not at {REAL}")
def test_the_real_windows_and_questions_go_through(cfg, tmp_path):
    cfg.data_dir, cfg.window, cfg.n_windows, cfg.n_shot = str(REAL), 512, 128, 5
    cfg.n_questions, cfg.rates = 20, (0.5,)
    cfg.base, cfg.models = (write_checkpoint(tmp_path / name, seed, block_size=16384)
                            for seed, name in enumerate(("a", "b")))
    cfg.models = (cfg.models,)
    scores = preserve.preserve(cfg)[cfg.base]
    assert scores["wikitext"]["n"] == 128 and scores["mmlu"]["n"] == 20
