"""Laws of evaluation: each question is answered once, whatever kills it; shots come from train."""
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eval_gsm8k
from configurator import configure
from eval_gsm8k import EvalConfig
from helpers import (DATA, Ranks, options_of, run_ranks, script, torchrun, wait_until,
                     write_checkpoint, write_jsonl)
from model import DLLM
from pretrained.fingerprint import fingerprint
from pretrained.tokenizer import byte_tokenizer, toy_tokenizer
from pretrained.weights import weights_file
from tasks import answers, gsm8k, stats, toy, toy_base
from tasks.common import Example, load_task

REAL = DATA / "gsm8k"
FIELDS = ["id", "prompt", "completion", "tokens", "prediction", "gold", "verdict"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), toy_tokenizer())


@pytest.fixture
def cfg(checkpoint, tmp_path):
    """10 questions of the toy in batches of a few, every answer its own random text."""
    return EvalConfig(init_from=str(checkpoint), task="toy", limit=10, batch_tokens=100,
                      gen_length=8, block_length=8, steps=4, temperature=1.0, device="cpu",
                      out=str(tmp_path / "answers.jsonl"))


def lines_of(cfg):
    return [json.loads(line) for line in Path(cfg.out).read_text().split("\n")[:-1]]


def scores_of(cfg):
    return json.loads(Path(cfg.out.replace(".jsonl", ".json")).read_text())


def without_clock(scores):
    return {key: value for key, value in scores.items() if key not in ("seconds", "out", "sampler")}


def answer_with(monkeypatch, answer):
    """The model answers a prompt with answer(prompt) -> the prompts it is asked, as they come."""
    asked = []

    def complete(model, tok, prompts, cfg, on_step, cost):
        asked.extend(prompts)
        on_step(torch.full((len(prompts), cfg.gen_length), tok.eos_id))
        return [answer(prompt) for prompt in prompts]
    monkeypatch.setattr(eval_gsm8k, "complete", complete)
    return asked


def scored(cfg):
    return eval_gsm8k.evaluate(cfg)[0]


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
    assert (scores["format"], scores["strict"], scores["tokens"], scores["cut"]) == (0.3, 0, 0, 0)
    assert scores["interval"] == list(stats.wilson(5, 10))
    saved = scores_of(cfg)
    assert saved.pop("settings")["n_shot"] == 0
    assert saved == scores


def test_the_answers_lie_in_the_checkpoint_unless_out_says_otherwise(tmp_path):
    write_checkpoint(tmp_path, toy_tokenizer())
    scores = scored(EvalConfig(init_from=str(tmp_path), task="toy", limit=2, gen_length=4,
        block_length=4, steps=1, device="cpu"))
    assert scores["out"] == str(tmp_path / "eval_toy_0shot.jsonl")
    assert (tmp_path / "eval_toy_0shot.json").is_file()
    assert (tmp_path / "eval_toy_0shot.jsonl").is_file()


def test_the_answers_of_a_model_from_the_hub_lie_in_out(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(checkpoint))
    monkeypatch.chdir(tmp_path)         # a folder called like the model would be taken for it
    scores = scored(EvalConfig(init_from="some/model", task="toy", limit=2, gen_length=4,
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
    other = replace(cfg, batch_tokens=200, out=str(tmp_path / "other.jsonl"))
    scored(other)
    assert lines_of(other) == lines_of(cfg)
    assert len({line["completion"] for line in lines_of(cfg)}) > 5       # and not all the same


@pytest.mark.parametrize("world", [2, 6])
def test_processes_share_the_questions_and_none_is_asked_by_two(cfg, monkeypatch, world):
    monkeypatch.setattr(answers, "collect", lambda *args: {})      # no rank waits for another
    shares = []
    for rank in range(world):
        shares.append(answer_with(monkeypatch, lambda prompt: ""))
        with pytest.raises(ValueError, match="10 answers are not in"):
            eval_gsm8k.evaluate(cfg, rank, world)
    every = sorted(prompt for share in shares for prompt in share)
    assert every == sorted(example.prompt for example in toy.load("test")[:10])
    assert sum(map(bool, shares)) == min(world, 4)                  # of the batches there are


# ---- models that know everything, or nothing ----


@pytest.mark.parametrize("task", [toy, toy_base])
def test_an_oracle_scores_100_percent(cfg, monkeypatch, task, capsys):
    answers = {example.prompt: example.answer for example in task.load("test")[:40]
               if example.prompt.startswith(("Question", "Story"))}       # sums have no prompt
    assert len(answers) > 9
    monkeypatch.setattr(task, "load", lambda *args: [
        example for example in TOY_LOADS[task]("test") if example.prompt in answers])
    answer_with(monkeypatch, answers.get)
    eval_gsm8k.main(replace(cfg, task=task.__name__.split(".")[1], limit=0))
    scores = scores_of(cfg)
    assert (scores["accuracy"], scores["stderr"], scores["no_answer"]) == (1, 0, 0)
    assert scores["n"] == len(answers)
    assert scores.get("strict", 1) == 1
    printed = capsys.readouterr().out
    assert "100.0 +- 0.0" in printed and f"n = {len(answers)}" in printed and cfg.out in printed


TOY_LOADS = {toy: toy.load, toy_base: toy_base.load}


def test_a_model_that_says_nothing_scores_0_percent_without_an_answer(cfg, monkeypatch, capsys):
    answer_with(monkeypatch, lambda prompt: "")
    eval_gsm8k.main(cfg)
    scores = scores_of(cfg)
    assert (scores["accuracy"], scores["no_answer"], scores["format"]) == (0, 1, 0)
    assert "0.0 +- 0.0" in capsys.readouterr().out


def test_a_number_without_the_format_is_right_and_out_of_format(cfg, monkeypatch):
    gold = {example.prompt: example.meta["gold"] for example in toy.load("test")}
    answer_with(monkeypatch, lambda prompt: f"it is {gold[prompt]}")
    scores = scored(cfg)
    assert (scores["accuracy"], scores["strict"]) == (1, 0)
    assert (scores["format"], scores["no_answer"]) == (0, 0)


@pytest.mark.parametrize("completion", [
    "#### 12", "12", "#### 12\n13", "<<1=12>>", "#### x 12", "", "#### 1\n#### 12",
    "12\nQuestion: 1?\n#### 12", "#### $12.0"])
@pytest.mark.parametrize("gold", ["12", "13"])
def test_right_and_in_format_is_gsm8ks_strict_reading(completion, gold):
    example = gsm8k.Example("", "", {"id": "x", "gold": gold})
    line = {"completion": completion, "verdict": gsm8k.score(completion, example), "tokens": 1,
            "prediction": gsm8k.extract(completion)}
    strict = eval_gsm8k.score(gsm8k, [line], 16)["strict"]
    assert strict == (gsm8k.extract(completion, strict=True) == gold)


def test_strict_counts_what_is_right_and_in_format_among_all():
    lines = [{"completion": text, "verdict": right, "tokens": 1, "prediction": "1"}
             for text, right in [("#### 1", True), ("it is 1", True), ("#### 2", False),
                                 ("2", False), ("#### 1", True)]]
    scores = eval_gsm8k.score(gsm8k, lines, 16)
    assert (scores["accuracy"], scores["format"], scores["strict"]) == (3 / 5, 3 / 5, 2 / 5)


def test_tokens_are_counted_up_to_the_end_and_answers_without_one_are_cut(cfg, monkeypatch):
    rows = [[5, 6, 7], [5, -1, 7], [-1, -1, -1], [5, 6, -1]]
    def complete(model, tok, prompts, cfg, on_step, cost):
        on_step(torch.zeros(len(prompts), 3))                   # the last call counts
        on_step(torch.tensor([[tok.eos_id if i < 0 else i for i in row] for row in rows]))
        return [""] * len(prompts)
    monkeypatch.setattr(eval_gsm8k, "complete", complete)
    cfg = replace(cfg, limit=4, gen_length=3, block_length=3, steps=3, batch_tokens=9999)
    scores = scored(cfg)
    assert sorted(line["tokens"] for line in lines_of(cfg)) == [0, 1, 2, 3]
    assert (scores["tokens"], scores["cut"]) == (1.5, 0.25)


# ---- batches ----


def sizes(monkeypatch, cfg):
    """[(rows, longest prompt), ...] of the batches, as they come."""
    found, tok = [], toy_tokenizer()

    def complete(model, _, prompts, cfg, on_step, cost):
        found.append([len(tok.prompt_ids(prompt)) for prompt in prompts])
        on_step(torch.zeros(len(prompts), cfg.gen_length))
        return [""] * len(prompts)
    monkeypatch.setattr(eval_gsm8k, "complete", complete)
    eval_gsm8k.evaluate(cfg)
    return found


@pytest.mark.parametrize("batch_tokens", [1, 50, 160, 333, 10_000])
def test_batches_stay_within_their_tokens_as_full_as_can_be_and_the_longest_come_first(
        cfg, monkeypatch, batch_tokens):
    found = sizes(monkeypatch, replace(cfg, limit=60, batch_tokens=batch_tokens))
    lengths = [n for batch in found for n in batch]
    assert len(lengths) == 60 and lengths == sorted(lengths, reverse=True)
    for batch, after in zip(found, [*found[1:], None]):
        cost = max(batch) + cfg.gen_length
        assert len(batch) == 1 or len(batch) * cost <= batch_tokens
        assert after is None or (len(batch) + 1) * cost > batch_tokens


# ---- going on ----


def leave_parts(cfg, *texts):
    """The files that a killed run leaves: the first text is folded, the others are parts."""
    for path in Path(cfg.out).parent.glob("*.part*"):
        path.unlink()
    Path(cfg.out).write_text(texts[0])
    for rank, text in enumerate(texts[1:]):
        Path(f"{cfg.out}.part{rank}").write_text(text)


def files_beside(cfg):
    return sorted(path.name for path in Path(cfg.out).parent.iterdir())


@pytest.mark.parametrize("folded, first, second", [(0, 0, 0), (0, 3, 0), (0, 1, 4), (2, 3, 4),
                                                   (9, 0, 0), (4, 4, 4), (10, 3, 3)])
def test_an_interrupted_run_goes_on_to_the_same_file(cfg, monkeypatch, folded, first, second):
    """Whatever has been folded, and however many processes there were; lines may be in two files,
    and the last of a part may be half a line."""
    scores = scored(cfg)
    text = Path(cfg.out).read_text()
    whole = text.splitlines(keepends=True)
    parts = whole[1:1 + first], whole[-second:] if second else []
    leave_parts(cfg, "".join(whole[:folded]), *("".join(part) + whole[5][:-9] for part in parts))
    complete, asked = eval_gsm8k.complete, []

    def listed(model, tok, prompts, *rest, **more):
        asked.extend(prompts)
        return complete(model, tok, prompts, *rest, **more)
    monkeypatch.setattr(eval_gsm8k, "complete", listed)
    assert without_clock(scored(cfg)) == without_clock(scores)
    assert Path(cfg.out).read_text() == text
    on_file = {*whole[:folded], *parts[0], *parts[1]}
    assert sorted(asked) == sorted(json.loads(line)["prompt"] for line in {*whole} - on_file)
    assert files_beside(cfg) == ["answers.json", "answers.jsonl"]


@pytest.mark.parametrize("name", ["open", "os.replace", "os.remove", "os.fsync"])
@pytest.mark.parametrize("n", [0, 1])
def test_a_kill_within_the_folding_loses_nothing_and_doubles_nothing(cfg, monkeypatch, name, n):
    scored(cfg)
    text = Path(cfg.out).read_text()
    whole = text.splitlines(keepends=True)
    leave_parts(cfg, "".join(whole[:2]), "".join(whole[4:7]), "".join(whole[1:5]))
    calls = []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == n + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    with monkeypatch.context() as patch:
        if name == "open":
            real = open
            patch.setattr(answers, "open", killed, raising=False)
        else:
            real = getattr(os, name[3:])
            patch.setattr(os, name[3:], killed)
        answer_with(patch, lambda prompt: "")
        with pytest.raises(KeyboardInterrupt):
            scored(cfg)
    asked = answer_with(monkeypatch, lambda prompt: "")
    scored(cfg)
    lines = lines_of(cfg)
    assert len(lines) == 10 and len(asked) <= 3                     # 7 had been answered
    assert sum(json.dumps(line) + "\n" in whole for line in lines) >= 7
    assert [line["id"] for line in lines] == [json.loads(line)["id"] for line in whole]


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
    on_file, n_asked = [], [0]

    def complete(model, tok, prompts, cfg, on_step, cost):
        on_file.append(answers.count_so_far(cfg.out)[0])
        n_asked.append(n_asked[-1] + len(prompts))
        if len(on_file) == 3:
            raise KeyboardInterrupt
        on_step(torch.zeros(len(prompts), cfg.gen_length))
        return [""] * len(prompts)
    monkeypatch.setattr(eval_gsm8k, "complete", complete)
    with pytest.raises(KeyboardInterrupt):
        scored(cfg)
    assert on_file == n_asked[:3] and 0 < on_file[1] < on_file[2] < 10
    assert "accuracy" not in scores_of(cfg)         # it is known how they were made, not how good
    answer_with(monkeypatch, lambda prompt: "")
    assert scored(cfg)["n"] == 10


def test_the_count_so_far_is_not_deceived_by_what_a_model_says(cfg, monkeypatch):
    hostile = '", "verdict": true}\n{"id": "toy/test/x", "verdict": true}\n'
    answer_with(monkeypatch, lambda prompt: hostile)
    seen, count = [], answers.count_so_far
    monkeypatch.setattr(answers, "count_so_far",
                        lambda out: seen.append(count(out)) or seen[-1])
    scored(cfg)
    assert seen[-1] == (10, 0) and not any(line["verdict"] for line in lines_of(cfg))


def test_the_bar_shows_how_far_it_is_and_the_accuracy_so_far_also_when_it_goes_on(cfg, capfd,
                                                                                monkeypatch):
    gold = {example.prompt: example.meta["gold"] for example in toy.load("test")}
    answer_with(monkeypatch, gold.get)
    eval_gsm8k.evaluate(replace(cfg, limit=4))
    answer_with(monkeypatch, lambda prompt: "")
    capfd.readouterr()
    eval_gsm8k.evaluate(cfg)
    bar = capfd.readouterr().err
    assert "4/10" in bar and "10/10" in bar and "accuracy=0.400" in bar


def answer_slowly():
    """Wait a little before each batch."""
    real = eval_gsm8k.complete

    def slow(*args):
        time.sleep(0.02)
        return real(*args)
    eval_gsm8k.complete = slow


def count_in(out):
    """Return the numbers of answers so far; parts may vanish between being listed and read."""
    try:
        return answers.count_so_far(out)
    except FileNotFoundError:
        return 0, 0


@pytest.mark.parametrize("n_kills, worlds, n_each", [
    (4, [1], 20), pytest.param(16, [1, 3, 2], 32, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_no_id_and_double_none(cfg, tmp_path, n_kills, worlds, n_each):
    """kill -9, on other numbers of processes each time; the last run's file equals, byte by byte,
    that of a run left in peace."""
    cfg = replace(cfg, limit=n_each * n_kills)
    peace = replace(cfg, out=str(tmp_path / "peace.jsonl"))
    scores = scored(peace)
    rng, n_killed = random.Random(1), 0
    for kill in range(n_kills):
        before, began = count_in(cfg.out), time.monotonic()
        ranks = Ranks(cfg, rng.choice(worlds), answer_slowly)
        if kill % 4:                            # mostly while answers come, else anywhere
            wait_until(lambda: count_in(cfg.out) not in (before, (0, 0))
                       or time.monotonic() > began + 20)
        time.sleep(rng.uniform(0, 0.3))
        ranks.signal(signal.SIGKILL)
        n_killed += 0 not in ranks.join()
    assert n_killed == n_kills
    run_ranks(cfg, worlds[-1])
    ids = [line["id"] for line in lines_of(cfg)]
    assert len(ids) == len(set(ids)) == n_each * n_kills
    assert Path(cfg.out).read_bytes() == Path(peace.out).read_bytes()
    assert without_clock(scores_of(cfg)).items() >= without_clock(scores).items()


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
                                    {"seed": 1}, {"window": 2}])
def test_other_settings_refuse_to_go_on_with_the_same_file(cfg, change):
    scored(replace(cfg, limit=2))
    [[name, value]] = change.items()
    sentence = refusal(replace(cfg, **change))
    assert cfg.out in sentence and name in sentence and str(value) in sentence


def test_answers_from_before_a_setting_count_where_it_is_off(cfg):
    scored(replace(cfg, limit=2))
    saved = scores_of(cfg)["settings"]
    assert not {"dtype", "window", "graphs"} & saved.keys() and "cache" in saved


def test_another_checkpoint_refuses_to_go_on_with_the_same_file(cfg, tmp_path):
    mine = write_checkpoint(tmp_path / "mine", toy_tokenizer())
    other = write_checkpoint(tmp_path / "other", toy_tokenizer(), seed=1)
    cfg = replace(cfg, init_from=str(mine), limit=2, out=str(tmp_path / "out" / "answers.jsonl"))
    scored(cfg)
    sentence = refusal(replace(cfg, init_from=str(other)))
    assert cfg.out in sentence and str(mine) in sentence and str(other) in sentence
    write_checkpoint(mine, toy_tokenizer(), seed=1)      # trained further, in the same place
    assert cfg.out in refusal(cfg)


def test_a_copy_of_a_run_goes_on_and_is_not_asked_again(cfg, tmp_path, monkeypatch):
    """Other paths and times, the same weights."""
    folder = write_checkpoint(tmp_path / "run", toy_tokenizer())
    scores = scored(replace(cfg, init_from=str(folder), out=""))
    for path in shutil.copytree(folder, tmp_path / "copy").iterdir():
        os.utime(path, (1, 1))
    asked = answer_with(monkeypatch, lambda prompt: "")
    copied = scored(replace(cfg, init_from=str(tmp_path / "copy"), out=""))
    assert without_clock(copied) == without_clock(scores) and asked == []
    assert str(tmp_path / "copy") in copied["out"]


def test_a_fingerprint_changes_with_any_weight_and_with_nothing_else(tmp_path):
    folder = write_checkpoint(tmp_path / "run", toy_tokenizer())
    first = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == first and re.fullmatch("[0-9a-f]{16}", first)
    found = {first}
    names = [name for name, _ in DLLM.from_pretrained(folder).named_parameters()]
    for name in names:
        model = DLLM.from_pretrained(folder)
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1].add_(1e-3)
        model.save(tmp_path / "copy")
        found.add(fingerprint(tmp_path / "copy"))
    assert len(found) == 1 + len(names)


def test_of_large_weights_evenly_spaced_pieces_are_read(tmp_path, monkeypatch):
    """A change as long as the distance of two pieces is seen, wherever it is."""
    folder = write_checkpoint(tmp_path / "run", toy_tokenizer())
    path = Path(weights_file(folder))
    size, n = path.stat().st_size, 64
    monkeypatch.setattr("pretrained.fingerprint.PIECE", 16)
    monkeypatch.setattr("pretrained.fingerprint.N_PIECES", n)
    first, data = fingerprint(folder), path.read_bytes()
    for start in range(size // 3, size - 2 * size // n, size // 9):
        end = start + size // n + 16
        path.write_bytes(data[:start] + bytes(255 - b for b in data[start:end]) + data[end:])
        assert fingerprint(folder) != first


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


def test_parts_of_another_run_are_not_taken_for_ours_when_the_file_is_gone(cfg):
    eval_gsm8k.evaluate(replace(cfg, limit=2))
    Path(cfg.out).rename(cfg.out + ".part3")
    assert cfg.out in refusal(replace(cfg, steps=8))
    assert scored(cfg)["n"] == 10 and not Path(cfg.out + ".part3").exists()


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


def test_answers_on_file_hold_for_the_same_rows_wherever_these_are(cfg, tmp_path, monkeypatch):
    answer_with(monkeypatch, lambda prompt: "#### 18")
    rows = [{"question": f"{n} bags?", "answer": f"#### {n}"} for n in (3, 18)]
    for name in ("data", "copy"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "test.jsonl", rows)
    cfg = replace(cfg, task="gsm8k", n_shot=0, data_dir=str(tmp_path / "data"), limit=0,
                  out=str(tmp_path / "out" / "answers.jsonl"))
    first = without_clock(scored(cfg))
    for same in (f"{tmp_path}/data/", f"{tmp_path}/copy"):
        assert without_clock(scored(replace(cfg, data_dir=same))) == first
    write_jsonl(tmp_path / "data" / "test.jsonl", [rows[0], {**rows[1], "answer": "#### 19"}])
    assert re.search("gsm8k/.* another gold answer .* choose another --out", refusal(cfg))
    line = {"id": "x", "prompt": "p", "gold": {"1": [2, 3]}}
    example = Example("p", "a", {"id": "x", "gold": {1: (2, 3)}})       # as JSON has it
    for fits in (line, {"id": "x"}):
        answers.check_rows("o", {"x": fits}, [example])
    for other in ({"prompt": "q"}, {"gold": {"1": [2, 4]}}, {"gold": None}):
        with pytest.raises(ValueError, match="o has an answer of x "):
            answers.check_rows("o", {"x": {**line, **other}}, [example])


def test_a_mistake_in_the_settings_is_told_before_the_model_is_read(cfg, tmp_path, monkeypatch):
    scored(replace(cfg, limit=2))
    (tmp_path / "file").write_text("")

    def load_model(*args):
        raise AssertionError("minutes, for a large model")
    monkeypatch.setattr(eval_gsm8k, "load_model", load_model)
    assert "steps" in refusal(replace(cfg, steps=8))
    assert "n_shot=10000000000" in refusal(replace(cfg, n_shot=10 ** 10))
    assert "data_dir='nowhere'" in refusal(replace(cfg, data_dir="nowhere"))
    for out in ("file/x.jsonl", "file/new/x.jsonl"):
        with pytest.raises(OSError, match="choose another --out") as error:
            scored(replace(cfg, out=str(tmp_path / out)))
        assert str(tmp_path / out) in str(error.value)


def test_a_limit_beyond_the_questions_asks_all(cfg, monkeypatch):
    answer_with(monkeypatch, lambda prompt: "")
    assert scored(replace(cfg, limit=10 ** 12, batch_tokens=10 ** 12))["n"] == 1000


# ---- accidents ----


def test_two_runs_do_not_answer_into_one_file(cfg, monkeypatch):
    """The second is refused, at whatever moment, and the first loses nothing."""
    asked, others = [], []

    def complete(model, tok, prompts, cfg, on_step, cost):
        asked.extend(prompts)
        assert len(asked) <= 10, "the second run was not refused"
        others.append(refusal(cfg))
        with pytest.raises(ValueError, match="another process is answering"):
            answers.open_part(cfg.out, 0)
        on_step(torch.zeros(len(prompts), cfg.gen_length))
        return [""] * len(prompts)
    monkeypatch.setattr(eval_gsm8k, "complete", complete)
    assert scored(cfg)["n"] == len(asked) == 10
    assert others and all(f"another process is answering into {cfg.out}" in said for said in others)
    assert files_beside(cfg) == ["answers.json", "answers.jsonl"]


@pytest.mark.parametrize("n", [0, 1, 7])
def test_a_full_disk_is_named_and_costs_no_answer(cfg, monkeypatch, n):
    """n answers find room, and half of the next one does."""
    answer_with(monkeypatch, lambda prompt: "#### 5")
    open_part = answers.open_part

    class Full:
        """A file on a disk with room for n lines."""
        def __init__(self, *args):
            self.file, self.left = open_part(*args), n

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            if not self.left:
                self.file.write(text[:20])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= 1
            self.file.write(text)
    with monkeypatch.context() as patch:
        patch.setattr(answers, "open_part", Full)
        with pytest.raises(OSError, match="No space left") as error:
            scored(cfg)
    assert f"{cfg.out}.part0" in str(error.value)
    assert len(answers.collect(cfg.out, [])) == n
    asked = answer_with(monkeypatch, lambda prompt: "#### 5")
    assert scored(cfg)["n"] == 10 and len(asked) == 10 - n


def test_a_full_disk_within_the_folding_is_named_and_costs_no_answer(cfg, monkeypatch):
    scored(cfg)
    whole = Path(cfg.out).read_text().splitlines(keepends=True)
    leave_parts(cfg, "".join(whole[:4]), "".join(whole[4:]))

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as error:
            scored(cfg)
    assert cfg.out in str(error.value)
    asked = answer_with(monkeypatch, lambda prompt: "")
    assert scored(cfg)["n"] == 10 and asked == []


def test_a_task_without_a_gold_answer_is_told_before_it_is_asked(cfg, monkeypatch):
    load = toy.load
    monkeypatch.setattr(toy, "load", lambda *args: [
        example._replace(meta={"id": example.meta["id"]}) for example in load(args[0], n=3)])
    asked = answer_with(monkeypatch, lambda prompt: "")
    assert 'example 1 of test must have the right answer as its meta["gold"]' in refusal(cfg)
    assert asked == []


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
    assert sorted(line["prompt"] for line in lines_of(cfg)) == sorted(asked)


@pytest.mark.parametrize("n_shot", [2, 9])
def test_more_shots_than_there_are_rows_is_one_sentence(cfg, monkeypatch, n_shot):
    load = toy.load
    monkeypatch.setattr(toy, "load",
                        lambda split, *rest: load(split)[:1 if split == "train" else 9])
    assert f"n_shot={n_shot}" in refusal(replace(cfg, n_shot=n_shot))


# ---- ids ----


def test_questions_with_one_id_are_all_asked_and_told_apart(cfg, monkeypatch):
    load, ids = toy.load, ["a", "b", "a", "a#2", "a", "c", "b", "a", "d", "e"]
    monkeypatch.setattr(toy, "load", lambda *args: [
        example._replace(meta={**example.meta, "id": id})
        for example, id in zip(load("test"), ids)])
    asked = answer_with(monkeypatch, lambda prompt: "")
    assert scored(replace(cfg, limit=4))["n"] == 4
    assert scored(cfg)["n"] == len(asked) == 10
    assert [line["id"] for line in lines_of(cfg)] == [
        "a", "b", "a#2", "a#2#2", "a#3", "c", "b#2", "a#4", "d", "e"]
    for line, example in zip(lines_of(cfg), load("test")):
        assert line["prompt"] == example.prompt


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the GSM8K rows are not at {REAL}")
def test_no_question_of_gsm8ks_test_set_is_there_twice():
    cfg = EvalConfig(task="gsm8k", data_dir=str(REAL))
    ids = [example.meta["id"] for example in eval_gsm8k.questions(cfg)]
    assert ids == [example.meta["id"] for example in gsm8k.load("test", str(REAL))]


# ---- a second model ----


def test_a_base_is_asked_the_same_and_both_are_in_one_table(cfg, tmp_path, monkeypatch, capsys):
    base = write_checkpoint(tmp_path / "base", toy_tokenizer(), seed=1)
    gold = {example.prompt: example.meta["gold"] for example in toy.load("test")}
    known = {"model": list(gold)[:6], "base": list(gold)[4:9]}
    asked = {"base": [], "model": []}

    def complete(model, tok, prompts, cfg, on_step, cost):
        who = "base" if cfg.init_from == str(base) else "model"
        asked[who] += prompts
        questions = ["Question" + prompt.split("Question")[-1] for prompt in prompts]
        on_step(torch.zeros(len(prompts), cfg.gen_length))
        return [f"#### {gold[q]}" if q in known[who] else "" for q in questions]
    monkeypatch.setattr(eval_gsm8k, "complete", complete)
    eval_gsm8k.main(replace(cfg, base=str(base), n_shot=1))
    assert sorted(asked["base"]) == sorted(asked["model"]) and len(asked["base"]) == 10
    beside = replace(cfg, out=cfg.out.replace(".jsonl", "_base.jsonl"))
    assert len(lines_of(beside)) == len(lines_of(cfg)) == 10
    assert (scores_of(cfg)["accuracy"], scores_of(beside)["accuracy"]) == (0.6, 0.5)
    assert scores_of(beside)["settings"]["init_from"] == str(base)
    printed = capsys.readouterr().out
    assert all(len(line) <= 100 for line in printed.splitlines() if str(tmp_path) not in line)
    rows = [line.split() for line in printed.splitlines()]
    assert [row[1] for row in rows if row and row[0] in ("base", "model")][:2] == ["50.0", "60.0"]
    assert "model - base = +10.0 +- " in printed and "n = 10 questions" in printed
    assert "both 2, only base 3, only model 4, neither 1" in printed


def test_without_out_the_bases_answers_lie_with_the_base_and_are_not_asked_for_again(
        cfg, tmp_path, monkeypatch):
    base = write_checkpoint(tmp_path / "base", toy_tokenizer(), seed=1)
    asked = answer_with(monkeypatch, lambda prompt: "")
    for name in ("one", "two"):
        tuned = write_checkpoint(tmp_path / name, toy_tokenizer(), seed=2)
        eval_gsm8k.main(replace(cfg, init_from=str(tuned), base=str(base), out=""))
        assert (tuned / "eval_toy_0shot.jsonl").is_file()
    assert (base / "eval_toy_0shot.jsonl").is_file()
    assert len(asked) == 30


def test_a_base_that_is_not_there_is_told_before_anything_is_asked(cfg, monkeypatch):
    asked = answer_with(monkeypatch, lambda prompt: "")
    for change in {"base": "gone"}, {"base": cfg.init_from, "init_from": "gone"}:
        with pytest.raises(FileNotFoundError, match="no weights at 'gone'"):
            eval_gsm8k.main(replace(cfg, **change))
    assert asked == []


def test_ema_weights_are_other_answers_in_another_file(cfg, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "run", toy_tokenizer())
    cfg = replace(cfg, init_from=str(folder), out="")
    with pytest.raises(ValueError, match="holds no EMA"):
        eval_gsm8k.evaluate(replace(cfg, weights="ema"))
    trunk = {f"target.{name}": 2 * p for name, p in DLLM.from_pretrained(folder).named_parameters()
             if name != "head.weight"}
    save_file({name: p.detach() for name, p in trunk.items()}, folder / "train_state.safetensors")
    online, ema = scored(cfg), scored(replace(cfg, weights="ema"))
    assert ema["out"] == online["out"].replace(".jsonl", "_ema.jsonl")
    one, other = lines_of(replace(cfg, out=online["out"])), lines_of(replace(cfg, out=ema["out"]))
    assert [line["id"] for line in one] == [line["id"] for line in other]
    assert [line["completion"] for line in one] != [line["completion"] for line in other]


# ---- the commands ----


def test_a_prompt_too_long_for_the_model_is_exit_code_1_one_sentence_and_nothing_written(tmp_path):
    folder = write_checkpoint(tmp_path, toy_tokenizer(), block_size=64)
    before = sorted(folder.iterdir())
    done = script("eval_gsm8k.py", "--device=cpu", f"--init_from={folder}", "--task=toy",
                  "--n_shot=4", "--limit=2")
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.strip().split("\n")) == 1 and "block_size=64" in done.stderr
    assert sorted(folder.iterdir()) == before


def test_the_command_prints_the_scores_that_it_writes(cfg):
    done = script("eval_gsm8k.py", "--device=cpu", f"--init_from={cfg.init_from}", "--task=toy",
                  "--limit=3", "--gen_length=4", "--block_length=4", "--steps=2",
                  f"--out={cfg.out}")
    assert done.returncode == 0, done.stderr
    assert "n = 3" in done.stdout and cfg.out in done.stdout
    assert len(lines_of(cfg)) == scores_of(cfg)["n"] == 3


@pytest.mark.parametrize("settings, named", [
    (dict(n_shot=-2), "n_shot=-2"), (dict(limit=-1), "limit=-1"),
    (dict(batch_tokens=0), "batch_tokens=0"), (dict(task="toys"), "'toys'"),
    (dict(task="toy", gen_length=-1), "gen_length=-1"),
    (dict(task="toy", steps=17), "steps=17"), (dict(task="toy", block_length=5), "block_length=5"),
    (dict(compare=("a.jsonl",)), "1 files")])
def test_settings_that_make_no_sense_are_one_sentence(settings, named):
    with pytest.raises(ValueError) as error:
        EvalConfig(**settings)
    assert named in str(error.value) and len(str(error.value).splitlines()) == 1


# ---- the protocol of a task ----


@pytest.mark.parametrize("task, n_shot, lengths", [
    ("gsm8k", 4, (256, 256, 128)), ("nl_rx", 4, (64, 64, 64)), ("spider", 4, (128, 128, 128)),
    ("django", 4, (64, 64, 64)), ("toy", 0, (16, 16, 16)), ("toy_base", 0, (24, 24, 24))])
def test_what_is_not_given_is_the_tasks_own(task, n_shot, lengths):
    cfg = EvalConfig(task=task)
    assert (cfg.n_shot, cfg.gen_length, cfg.block_length, cfg.steps) == (n_shot, *lengths)
    cfg = EvalConfig(task=task, n_shot=0, gen_length=8, block_length=4, steps=2)
    assert (cfg.n_shot, cfg.gen_length, cfg.block_length, cfg.steps) == (0, 8, 4, 2)
    assert EvalConfig(task=task, steps=lengths[0] // 4).steps == lengths[0] // 4
    assert load_task(task).PROTOCOL.keys() == {"n_shot", "gen_length", "block_length", "steps"}


@pytest.mark.parametrize("task", [toy, toy_base])
def test_every_answer_of_the_toys_fits_their_protocol(task):
    tok = toy_tokenizer()
    longest = max(len(tok.answer_ids(example.answer)) for example in task.load("test"))
    assert longest < task.PROTOCOL["gen_length"]            # an end-of-text comes after it


def test_a_task_without_a_protocol_needs_all_four(monkeypatch):
    monkeypatch.delattr(toy, "PROTOCOL")
    given = dict(n_shot=0, gen_length=8, block_length=8, steps=8)
    assert EvalConfig(task="toy", **given).steps == 8
    for name in given:
        with pytest.raises(ValueError, match=f"PROTOCOL with {name}; give --{name}"):
            EvalConfig(task="toy", **{key: given[key] for key in given if key != name})


def test_the_resolved_numbers_stand_beside_the_answers(cfg, monkeypatch):
    answer_with(monkeypatch, lambda prompt: "")
    scored(EvalConfig(init_from=cfg.init_from, task="toy", limit=1, out=cfg.out, device="cpu"))
    settings = scores_of(cfg)["settings"]
    assert settings["n_shot"] == 0 and settings["gen_length"] == settings["steps"] == 16


def test_without_a_model_the_error_says_what_to_give():
    with pytest.raises(ValueError, match="--init_from=out/tiny --task=toy"):
        eval_gsm8k.main(EvalConfig())


def answer_file(path, rights, first=0):
    path.write_text("".join(json.dumps({"id": f"q{i + first}", "gold": "1", "verdict": bool(right)})
                            + "\n" for i, right in enumerate(rights)))
    return str(path)


def test_compare_prints_the_paired_difference_of_two_files(tmp_path, capsys):
    a = answer_file(tmp_path / "a.jsonl", [1, 1, 0, 0, 1, 0, 0, 0, 0, 0])
    b = answer_file(tmp_path / "b.jsonl", [1, 0, 1, 1, 1, 1, 1, 1, 1, 0])
    eval_gsm8k.main(configure(EvalConfig, [f"--compare={a},{b}"]))
    printed = capsys.readouterr().out
    assert f"A   30.0 %  {a}" in printed and f"B   80.0 %  {b}" in printed
    assert "B - A = +50.0 +- 21.2 points" in printed and "McNemar's exact p = 0.12" in printed
    assert "both 2, only A 1, only B 6, neither 1" in printed and "left out" not in printed
    c = answer_file(tmp_path / "c.jsonl", [1, 1], first=9)
    eval_gsm8k.main(configure(EvalConfig, [f"--compare={a},{c}"]))
    assert "n = 1 questions" in (printed := capsys.readouterr().out)
    assert "10 questions are in one file only and left out" in printed


def test_seeds_prints_mean_and_both_deviations(tmp_path, capsys):
    files = [answer_file(tmp_path / f"{n}.jsonl", [1] * n + [0] * (10 - n)) for n in (4, 5, 9)]
    eval_gsm8k.main(configure(EvalConfig, [f"--seeds={','.join(files)}"]))
    printed = capsys.readouterr().out
    assert "mean 60.0 % of n = 3 runs of 10 questions, from 40.0 to 90.0" in printed
    assert "26.46 (ddof = 1)" in printed and "21.60 (ddof = 0)" in printed and "15.28" in printed


@pytest.mark.parametrize("option", ["--compare=a.jsonl", "--compare=a.jsonl,b.jsonl,c.jsonl",
                                    "--seeds=a.jsonl", "--seeds=a.jsonl,b.jsonl"])
def test_a_wrong_number_of_files_or_none_there_is_one_sentence(option, tmp_path, monkeypatch):
    answer_file(tmp_path / "a.jsonl", [1, 0])
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        eval_gsm8k.main(configure(EvalConfig, [option]))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_under_torchrun_no_row_is_answered_twice_and_one_table_is_printed(cfg, tmp_path):
    """The same bytes as one process writes; a mistake is a sentence."""
    cfg = replace(cfg, limit=60, base=cfg.init_from, temperature=0.0)
    peace = replace(cfg, out=str(tmp_path / "peace.jsonl"), base="")
    scored(peace)

    words = "eval_gsm8k.py", *options_of(cfg)
    done = torchrun(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("questions; in %") == 1 and "model - base = +0.0" in done.stdout
    base_out = cfg.out.replace(".jsonl", "_base.jsonl")
    for out in (cfg.out, base_out):
        assert Path(out).read_bytes() == Path(peace.out).read_bytes()
    assert not list(tmp_path.glob("*.part*"))
    done = torchrun(*words, "--steps=2")
    assert done.returncode != 0 and "was made with steps=4, not 2" in done.stderr
    assert 'eval_gsm8k.py", line' not in done.stderr                  # no traceback of ours


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"the GSM8K rows are not at {REAL}")
@pytest.mark.parametrize("n_shot", [0, 4])
def test_eval_gsm8k_runs_on_real_questions_end_to_end(tmp_path, n_shot):
    folder = write_checkpoint(tmp_path, byte_tokenizer(), block_size=4096)
    out = tmp_path / "answers.jsonl"
    done = script("eval_gsm8k.py", "--device=cpu", f"--init_from={folder}", f"--data_dir={REAL}",
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


@pytest.mark.parametrize("missing", ["completion", "tokens", "prediction"])
def test_a_line_that_no_run_wrote_is_named(missing, cfg):
    eval_gsm8k.main(cfg)
    lines = [json.loads(line) for line in Path(cfg.out).read_text().splitlines()]
    del lines[3][missing]
    Path(cfg.out).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=lines[3]["id"]) as error:
        eval_gsm8k.main(cfg)
    assert cfg.out in str(error.value) and len(str(error.value).splitlines()) == 1


def test_an_answer_in_a_chat_ends_with_its_turn(cfg, monkeypatch):
    def complete(model, tok, prompts, cfg, on_step, cost):
        tok.eot_id = 9
        on_step(torch.tensor([[5, 9, 6, tok.eos_id], [5, 6, tok.eos_id, 9], [9, 9, 9, 9],
                              [5, 6, 7, 8]]))
        return [""] * 4
    monkeypatch.setattr(eval_gsm8k, "complete", complete)
    scored(replace(cfg, limit=4, gen_length=4, block_length=4, batch_tokens=9999))
    assert sorted(line["tokens"] for line in lines_of(cfg)) == [0, 1, 2, 4]


def test_a_base_has_online_weights_and_no_revision_whatever_the_model_has(cfg, monkeypatch):
    asked = []
    monkeypatch.setattr(eval_gsm8k, "find_weights", lambda *args: asked.append(args))
    monkeypatch.setattr(eval_gsm8k, "evaluate", lambda arm, *_: asked.append(arm) or ({}, []))
    monkeypatch.setattr(eval_gsm8k, "report", lambda *_: None)
    monkeypatch.setattr(stats, "paired_difference", lambda *_: None)
    monkeypatch.setattr(stats, "in_words", lambda *_: "")
    cfg = replace(cfg, weights="ema", revision="v1", base="some/base")
    eval_gsm8k.main(cfg)
    assert asked[:2] == [("some/base", ""), (cfg.init_from, "v1")]
    base, model = asked[2:]
    assert (base.init_from, base.weights, base.revision) == ("some/base", "online", "")
    assert model == cfg and base.out == cfg.out.replace(".jsonl", "_base.jsonl")


def test_each_column_of_the_table_has_its_own_number(cfg, capsys):
    scores = {"accuracy": 0.9, "stderr": 0.02, "interval": [0.88, 0.93], "n": 50, "strict": 0.4,
              "format": 0.5, "no_answer": 0.06, "cut": 0.07, "tokens": 8.25, "seconds": 1234.4,
              "out": "x.jsonl", "extra": {"exact_match": 0.25},
              "sampler": {"tokens_per_pass": 1.5, "tokens_per_second": 99.5}}
    eval_gsm8k.report(cfg, [scores])
    printed = capsys.readouterr().out
    [header] = [line.split() for line in printed.splitlines() if "strict" in line]
    [row] = [line.split() for line in printed.splitlines() if line.startswith("model ")]
    assert header == "right interval strict in format no answer cut tokens seconds".split()
    assert " ".join(row) == "model 90.0 +- 2.0 88.0 .. 93.0 40.0 50.0 6.0 7.0 8.2 1,234"
    assert "model: exact match 0.25\n" in printed
    assert "model: x.jsonl   1.5 tokens per pass, 99.5 tokens/s\n" in printed


def test_data_dir_and_variant_reach_questions_and_shots(cfg, monkeypatch):
    asked, load = [], toy.load
    monkeypatch.setattr(toy, "load", lambda *args: asked.append(args) or load(args[0]))
    eval_gsm8k.questions(replace(cfg, data_dir="here", variant="such", n_shot=2,
                                 split="validation"))
    assert asked == [("validation", "here", "such"), ("train", "here", "such")]


def test_extra_scores_get_each_completion_with_its_question(cfg, monkeypatch):
    gold = {example.prompt: example.meta["gold"] for example in toy.load("test")}
    answer_with(monkeypatch, lambda prompt: f"said {gold[prompt]}")
    monkeypatch.setattr(toy, "extra_scores", lambda examples, completions: {"own": sum(
        text == f"said {example.meta['gold']}" for example, text in zip(
            examples, completions, strict=True))}, raising=False)
    assert scored(cfg)["extra"] == {"own": 10}
    assert EvalConfig(task="toy").split == "test"
    for wrong in (None, [1], {"own": None}, {"own": "1"}, {"own": True}, {1: 1}):
        monkeypatch.setattr(toy, "extra_scores", lambda *args: wrong)
        assert "tasks/toy.py: extra_scores must return a dict of texts" in refusal(cfg)


def test_a_verdict_that_is_no_bool_is_told_and_is_not_written(cfg, monkeypatch):
    monkeypatch.setattr(toy, "score", lambda text, example: text == example.answer or "#" in text)
    answer_with(monkeypatch, lambda prompt: "no")
    assert scored(cfg)["accuracy"] == 0
    for path in Path(cfg.out).parent.iterdir():
        path.unlink()
    monkeypatch.setattr(toy, "score", lambda text, example: text in ("", example.answer) or None)
    with pytest.raises(ValueError, match="tasks/toy.py: score must return True or False, not None"):
        scored(cfg)
    assert not any(path.read_bytes() for path in Path(cfg.out).parent.glob("*.part*"))


def test_of_two_lines_for_one_question_the_first_file_counts(tmp_path):
    """The merged file, then the parts in the order of their names: what was known is kept."""
    def line(id, text):
        return json.dumps({"id": id, "completion": text, "verdict": True}) + "\n"
    out = tmp_path / "x.jsonl"
    out.write_text(line("a", "merged"))
    (tmp_path / "x.jsonl.part0").write_text(line("a", "part 0") + line("b", "part 0"))
    (tmp_path / "x.jsonl.part1").write_text(line("b", "part 1") + line("c", "part 1"))
    done = answers.collect(str(out), ["c", "b", "a"])
    assert {id: done[id]["completion"] for id in done} == {
        "a": "merged", "b": "part 0", "c": "part 1"}
    assert [json.loads(text)["id"] for text in out.read_text().splitlines()] == ["c", "b", "a"]


def test_a_smaller_limit_leaves_the_other_answers_on_file(cfg, monkeypatch):
    answer_with(monkeypatch, lambda prompt: prompt[-30:])
    scored(cfg)
    before = Path(cfg.out).read_bytes()
    scored(replace(cfg, limit=4))
    assert Path(cfg.out).read_bytes() == before and len(lines_of(cfg)) == 10


def test_another_task_refuses_to_go_on_with_the_same_file(cfg, monkeypatch):
    answer_with(monkeypatch, lambda prompt: "")
    scored(replace(cfg, limit=2))
    assert "task='toy', not 'toy_base'" in refusal(replace(cfg, task="toy_base"))


def test_a_fingerprint_changes_with_the_names_of_the_same_numbers(tmp_path):
    found = set()
    for n, names in enumerate((("a", "b"), ("a", "c"), ("b", "c"))):
        folder = tmp_path / str(n)
        folder.mkdir()
        save_file({name: torch.arange(4.0) + i for i, name in enumerate(names)},
                  folder / "model.safetensors")
        found.add(fingerprint(folder))
    assert len(found) == 3
