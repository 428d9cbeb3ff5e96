"""Laws of evaluation: every answer is on file, interruption is harmless, shots come from train."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import evaluate
from evaluate import EvalConfig
from model import DLLM, ModelConfig
from tasks import gsm8k, toy, toy_base
from tasks.tokenizer import byte_tokenizer, toy_tokenizer

ROOT = Path(evaluate.__file__).parent
REAL = ROOT.parent / "shared" / "data" / "gsm8k"
FIELDS = ["id", "prompt", "completion", "tokens", "prediction", "gold", "verdict"]


@pytest.fixture(autouse=True)
def one_thread():
    """For matrices as small as these a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_checkpoint(folder, tok, seed=0, block_size=512):
    """A random model and its tokenizer, as train.py leaves them."""
    config = ModelConfig(vocab_size=tok.n_vocab, mask_id=tok.mask_id, eos_id=tok.eos_id, n_layer=1,
                         block_size=block_size, n_head=2, n_kv_head=2, n_embd=32, n_hidden=64)
    DLLM(config).init_weights(torch.Generator().manual_seed(seed)).save(folder)
    tok.save(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), toy_tokenizer())


@pytest.fixture
def cfg(checkpoint, tmp_path):
    """10 questions of the toy in batches of a few, every answer its own random text."""
    return EvalConfig(init_from=str(checkpoint), task="toy", limit=10, batch_tokens=160, gen_length=8,
                      block_length=8, steps=4, temperature=1.0, device="cpu",
                      out=str(tmp_path / "answers.jsonl"))


def lines_of(cfg):
    return [json.loads(line) for line in Path(cfg.out).read_text().split("\n")[:-1]]


def scores_of(cfg):
    return json.loads(Path(cfg.out.replace(".jsonl", ".json")).read_text())


def without_clock(scores):
    return {key: value for key, value in scores.items() if key not in ("seconds", "out")}


def answer_with(monkeypatch, answer):
    """The model answers a prompt with answer(prompt) -> the prompts it is asked, as they come."""
    asked = []

    def complete(model, tok, prompts, cfg, on_step):
        asked.extend(prompts)
        on_step(torch.full((len(prompts), cfg.gen_length), tok.eos_id))
        return [answer(prompt) for prompt in prompts]
    monkeypatch.setattr(evaluate, "complete", complete)
    return asked


def scored(cfg):
    return evaluate.evaluate(cfg)[0]


def refusal(cfg):
    """The one sentence of evaluate(cfg), which leaves every file as it is."""
    folder = Path(cfg.out).parent
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError) as error:
        scored(cfg)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# ---- what is written ----


def test_every_question_has_one_line_with_exactly_these_fields(cfg):
    scored(cfg)
    lines = lines_of(cfg)
    assert all(list(line) == FIELDS for line in lines)
    asked = {example.meta["id"]: example for example in toy.load("test")[:10]}
    assert len(lines) == len({line["id"] for line in lines}) == 10
    assert {line["id"] for line in lines} == set(asked)
    for line in lines:
        example = asked[line["id"]]
        assert (line["prompt"], line["gold"]) == (example.prompt, example.meta["gold"])
        assert line["prediction"] == toy.extract(line["completion"])
        assert line["verdict"] is toy.score(line["completion"], example)


def test_scores_follow_from_the_lines_and_lie_beside_them(cfg, monkeypatch):
    gold = {example.prompt: example.meta["gold"] for example in toy.load("test")}
    odd = {example.prompt for example in toy.load("test")[1:10:2]}
    few = {example.prompt for example in toy.load("test")[:3]}
    # of 10 answers 5 are right, and of the other 5 there are 2 empty ones
    answer_with(monkeypatch, lambda p: gold[p] if p in odd else "" if p in few else "#### 1000")
    scores = scored(cfg)
    lines = lines_of(cfg)
    accuracy = sum(line["verdict"] for line in lines) / len(lines)
    assert (scores["accuracy"], scores["n"]) == (accuracy, len(lines)) == (0.5, 10)
    assert scores["stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / len(lines)))
    assert scores["no_answer"] == sum(line["prediction"] is None for line in lines) / 10 == 0.2
    assert scores["format"] == 0.3
    saved = scores_of(cfg)
    assert saved.pop("settings")["n_shot"] == 0
    assert saved == scores


def test_the_answers_lie_in_the_checkpoint_unless_out_says_otherwise(tmp_path):
    write_checkpoint(tmp_path, toy_tokenizer())
    scores = scored(EvalConfig(init_from=str(tmp_path), limit=2, gen_length=4,
                                          block_length=4, steps=1, device="cpu"))
    assert scores["out"] == str(tmp_path / "eval_toy_0shot.jsonl")
    assert (tmp_path / "eval_toy_0shot.json").is_file()
    assert (tmp_path / "eval_toy_0shot.jsonl").is_file()


def test_the_answers_of_a_model_from_the_hub_lie_in_out(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(checkpoint))
    monkeypatch.chdir(tmp_path)         # a folder called like the model would be taken for it
    scores = scored(EvalConfig(init_from="some/model", limit=2, gen_length=4,
                                          block_length=4, steps=1, device="cpu"))
    assert scores["out"] == "out/some/model/eval_toy_0shot.jsonl"
    assert Path(scores["out"]).is_file() and not Path("some").exists()


def test_a_new_folder_is_made_for_the_answers(cfg, tmp_path):
    scored(replace(cfg, limit=1, out=str(tmp_path / "new" / "folder" / "answers.jsonl")))
    assert len((tmp_path / "new" / "folder" / "answers.jsonl").read_text().splitlines()) == 1


def test_without_a_limit_every_question_is_asked(cfg, monkeypatch):
    asked = answer_with(monkeypatch, lambda prompt: "")
    assert scored(replace(cfg, limit=0, batch_tokens=8192))["n"] == 1000
    assert sorted(asked) == sorted(example.prompt for example in toy.load("test"))


def test_the_split_is_the_one_that_was_asked_for(cfg, monkeypatch):
    asked = answer_with(monkeypatch, lambda prompt: "")
    scored(replace(cfg, split="validation"))
    assert sorted(asked) == sorted(example.prompt for example in toy.load("validation")[:10])


def test_the_same_settings_give_the_same_answers_whatever_the_batches(cfg, tmp_path):
    scored(cfg)
    other = replace(cfg, batch_tokens=100, out=str(tmp_path / "other.jsonl"))
    scored(other)
    assert lines_of(other) == lines_of(cfg)
    assert len({line["completion"] for line in lines_of(cfg)}) > 5       # and not all the same


# ---- models that know everything, or nothing ----


@pytest.mark.parametrize("task", [toy, toy_base])
def test_an_oracle_scores_100_percent(cfg, monkeypatch, task, capsys):
    answers = {example.prompt: example.answer for example in task.load("test")[:40]
               if example.prompt.startswith(("Question", "Story"))}       # sums have no prompt
    assert len(answers) > 9
    monkeypatch.setattr(task, "load", lambda *args: [
        example for example in TOY_LOADS[task]("test") if example.prompt in answers])
    answer_with(monkeypatch, answers.get)
    evaluate.main(replace(cfg, task=task.__name__.split(".")[1], limit=0))
    scores = scores_of(cfg)
    assert (scores["accuracy"], scores["stderr"], scores["no_answer"]) == (1, 0, 0)
    assert scores["n"] == len(answers)
    assert "accuracy 100.0 +- 0.0 %" in capsys.readouterr().out


TOY_LOADS = {toy: toy.load, toy_base: toy_base.load}


def test_a_model_that_says_nothing_scores_0_percent_without_an_answer(cfg, monkeypatch, capsys):
    answer_with(monkeypatch, lambda prompt: "")
    evaluate.main(cfg)
    scores = scores_of(cfg)
    assert (scores["accuracy"], scores["no_answer"], scores["format"]) == (0, 1, 0)
    printed = capsys.readouterr().out
    assert "accuracy 0.0 +- 0.0 %" in printed and "no answer 100.0 %" in printed


def test_a_number_without_the_format_is_right_and_out_of_format(cfg, monkeypatch):
    gold = {example.prompt: example.meta["gold"] for example in toy.load("test")}
    answer_with(monkeypatch, lambda prompt: f"it is {gold[prompt]}")
    scores = scored(cfg)
    assert (scores["accuracy"], scores["format"], scores["no_answer"]) == (1, 0, 0)


# ---- going on ----


@pytest.mark.parametrize("n_whole", [0, 1, 5, 9])
def test_an_interrupted_run_goes_on_to_the_same_result(cfg, n_whole, monkeypatch):
    scores = scored(cfg)
    out = Path(cfg.out)
    text = out.read_text()
    whole = text.splitlines(keepends=True)
    out.write_text("".join(whole[:n_whole]) + whole[n_whole][:30])  # cut in the middle of a line

    complete, asked = evaluate.complete, []
    monkeypatch.setattr(evaluate, "complete",
                        lambda model, tok, prompts, cfg: (asked.extend(prompts)
                                                          or complete(model, tok, prompts, cfg)))
    assert without_clock(scored(cfg)) == without_clock(scores)
    assert out.read_text() == text
    assert asked == [json.loads(line)["prompt"] for line in whole[n_whole:]]


def test_answers_on_file_are_kept_as_they_are_and_count(cfg):
    scored(cfg)
    lines = lines_of(cfg)
    lines[2].update(completion="a mark", verdict=True)
    Path(cfg.out).write_text("".join(json.dumps(line) + "\n" for line in lines[:6]))
    scores = scored(cfg)
    after = lines_of(cfg)
    assert after[2] == lines[2] and len(after) == 10
    assert scores["accuracy"] == sum(line["verdict"] for line in after) / 10 > 0


def test_a_finished_run_is_read_and_not_computed_again(cfg, monkeypatch):
    scores = scored(cfg)
    asked = answer_with(monkeypatch, lambda prompt: "")
    assert without_clock(scored(cfg)) == without_clock(scores)
    assert asked == []


def test_answers_are_on_file_while_the_run_goes_on(cfg, monkeypatch):
    """Also after a kill, which closes no file: what has been answered can be read from outside."""
    on_file = []

    def complete(model, tok, prompts, cfg):
        on_file.append(len(lines_of(cfg)))
        if len(on_file) == 3:
            raise KeyboardInterrupt
        return [""] * len(prompts)
    monkeypatch.setattr(evaluate, "complete", complete)
    with pytest.raises(KeyboardInterrupt):
        scored(cfg)
    assert on_file == [0, 4, 8]
    assert "accuracy" not in scores_of(cfg)         # it is known how they were made, not how good
    answer_with(monkeypatch, lambda prompt: "")
    assert scored(cfg)["n"] == 10


def test_a_larger_limit_goes_on_and_a_smaller_one_counts_its_own_questions(cfg, monkeypatch):
    scored(replace(cfg, limit=4))
    gold = {example.prompt: example.meta["gold"] for example in toy.load("test")}
    asked = answer_with(monkeypatch, gold.get)
    scores = scored(cfg)
    assert sorted(asked) == sorted(example.prompt for example in toy.load("test")[4:10])
    assert (scores["n"], scores["accuracy"]) == (10, 0.6)
    scores = scored(replace(cfg, limit=4))
    assert (scores["n"], scores["accuracy"]) == (4, 0.0)


def test_completions_with_strange_line_ends_survive_an_interruption(cfg, monkeypatch):
    """Some characters end a line for Python, but not in this file."""
    strange = "a\u2028b\x85c\x0bd\x1ce\rf\ng\U0001f469\ufffd\"\\"
    answer_with(monkeypatch, lambda prompt: strange)
    scored(replace(cfg, limit=5))
    scored(cfg)
    assert [line["completion"] for line in lines_of(cfg)] == [strange] * 10


@pytest.mark.parametrize("change", [{"n_shot": 1}, {"split": "validation"}, {"gen_length": 16},
                                    {"steps": 8}, {"temperature": 0.5}, {"remasking": "random"},
                                    {"seed": 1}])
def test_other_settings_refuse_to_go_on_with_the_same_file(cfg, change):
    scored(replace(cfg, limit=2))
    [[name, value]] = change.items()
    sentence = refusal(replace(cfg, **change))
    assert cfg.out in sentence and name in sentence and str(value) in sentence


def test_another_checkpoint_refuses_to_go_on_with_the_same_file(cfg, tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        folder.mkdir()
        write_checkpoint(folder, toy_tokenizer())
    cfg = replace(cfg, init_from=str(mine), limit=2, out=str(tmp_path / "out" / "answers.jsonl"))
    scored(cfg)
    assert cfg.out in refusal(replace(cfg, init_from=str(other)))
    write_checkpoint(mine, toy_tokenizer(), seed=1)      # trained further, in the same place
    assert cfg.out in refusal(cfg)


def test_a_newer_checkpoint_of_the_same_run_refuses_to_go_on(cfg, tmp_path):
    cfg = replace(cfg, init_from=str(tmp_path), limit=2,
                  out=str(tmp_path / "out" / "answers.jsonl"))
    for step in (10, 20):
        folder = tmp_path / f"step_{step:06d}"
        folder.mkdir()
        write_checkpoint(folder, toy_tokenizer(), seed=step)
        if step == 10:
            scored(cfg)
    assert "step_000020" in refusal(cfg)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"settings": 5}',
                                     '{"settings": {}}', '{"accuracy": 1}'])
def test_a_file_that_does_not_say_how_it_was_made_is_left_alone(cfg, content):
    Path(cfg.out).write_text("precious\n")
    if content is not None:
        Path(cfg.out.replace(".jsonl", ".json")).write_text(content)
    assert cfg.out in refusal(cfg)


def test_a_setting_that_no_longer_exists_refuses_in_one_sentence(cfg):
    scored(replace(cfg, limit=2))
    beside = Path(cfg.out.replace(".jsonl", ".json"))
    saved = scores_of(cfg)
    saved["settings"]["retired"] = 1
    beside.write_text(json.dumps(saved))
    assert cfg.out in refusal(cfg)


# ---- shots ----


@pytest.mark.parametrize("n_shot", [0, 1, 4])
def test_prompts_have_exactly_the_first_n_rows_of_train_in_front_and_no_test_question(
        cfg, n_shot, monkeypatch):
    asked = answer_with(monkeypatch, lambda prompt: "")
    scored(replace(cfg, n_shot=n_shot))
    shots = toy.load("train")[:n_shot]
    head = "".join(shot.prompt + shot.answer + "\n\n" for shot in shots)
    assert head.count("####") == n_shot
    questions = {example.prompt for example in toy.load("test")}
    assert len(asked) == 10
    for prompt in asked:
        assert prompt.startswith(head) and prompt.removeprefix(head) in questions
        assert prompt.count("Question:") == n_shot + 1 and prompt.count("####") == n_shot
    assert not questions & {shot.prompt for shot in shots}
    assert [line["prompt"] for line in lines_of(replace(cfg, n_shot=n_shot))] == asked


# ---- the commands ----


def command(script, *options):
    env = {**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, script, "--device=cpu", *options], cwd=ROOT, env=env,
                          capture_output=True, text=True)


def test_a_prompt_too_long_for_the_model_is_exit_code_1_one_sentence_and_nothing_written(tmp_path):
    folder = write_checkpoint(tmp_path, toy_tokenizer(), block_size=64)
    before = sorted(folder.iterdir())
    done = command("evaluate.py", f"--init_from={folder}", "--task=toy", "--n_shot=4", "--limit=2")
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.strip().split("\n")) == 1 and "block_size=64" in done.stderr
    assert sorted(folder.iterdir()) == before


def test_the_command_prints_the_scores_that_it_writes(cfg):
    done = command("evaluate.py", f"--init_from={cfg.init_from}", "--task=toy", "--limit=3",
                   "--gen_length=4", "--block_length=4", "--steps=2", f"--out={cfg.out}")
    assert done.returncode == 0, done.stderr
    assert "n = 3" in done.stdout and cfg.out in done.stdout
    assert len(lines_of(cfg)) == scores_of(cfg)["n"] == 3


def test_counts_that_make_no_sense_are_one_sentence():
    for change in ({"n_shot": -1}, {"limit": -1}, {"batch_tokens": 0}):
        with pytest.raises(ValueError) as error:
            EvalConfig(**change)
        assert len(str(error.value).splitlines()) == 1
        assert all(f"{name}={value}" in str(error.value) for name, value in change.items())


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"the GSM8K rows are not at {REAL}")
@pytest.mark.parametrize("n_shot", [0, 4])
def test_eval_gsm8k_runs_on_real_questions_end_to_end(tmp_path, n_shot):
    folder = write_checkpoint(tmp_path, byte_tokenizer(), block_size=4096)
    out = tmp_path / "answers.jsonl"
    done = command("eval_gsm8k.py", f"--init_from={folder}", f"--data_dir={REAL}",
                   f"--n_shot={n_shot}", "--limit=2", "--gen_length=16", "--block_length=16",
                   "--steps=2", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "n = 2" in done.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    wanted = gsm8k.load("test", str(REAL))[:2]
    assert ({line["id"]: line["gold"] for line in lines}
            == {e.meta["id"]: e.meta["gold"] for e in wanted})
    shots = gsm8k.load("train", str(REAL))[:n_shot]
    head = "".join(shot.prompt + shot.answer + "\n\n" for shot in shots)
    assert {line["prompt"] for line in lines} == {head + example.prompt for example in wanted}
    assert "<<" not in head
