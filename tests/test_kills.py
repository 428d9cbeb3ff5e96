"""Laws of kills: a short part of kills.py, and what it takes for a loss."""
from dataclasses import replace
from pathlib import Path

import pytest

import kills
import train
from helpers import write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the base that all have in common."""
    return tmp_path_factory.mktemp("kills")


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_equals_one_left_in_peace(folder):
    """The others are for `python tests/kills.py`: test_checkpoint and test_eval_gsm8k have some."""
    met, wrong = kills.check("lora", n=1, seed=0, folder=folder)
    assert len(met) == 1 and wrong == ""


def test_runs_that_differ_in_a_bit_or_in_a_line_are_told_apart(cfg, tmp_path):
    other = replace(cfg, out_dir=str(tmp_path / "other"))
    for each in (cfg, other):
        train.main(replace(each, max_steps=1))
    assert kills.compare_runs(cfg.out_dir, other.out_dir) == ""
    log = Path(other.out_dir, "log.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert "log" in kills.compare_runs(cfg.out_dir, other.out_dir)
    train.main(replace(other, max_steps=1, lr=1.1e-3, overwrite=True))
    assert "tensors differ" in kills.compare_runs(cfg.out_dir, other.out_dir)


def test_an_answer_that_is_lost_there_twice_or_another_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "N_QUESTIONS", 3)
    lines = [{"id": f"toy/{i}", "completion": "", "verdict": False} for i in range(3)]
    write_jsonl(tmp_path / "peace.jsonl", lines)

    def wrong(found):
        write_jsonl(tmp_path / "killed.jsonl", found)
        return kills.compare_answers(tmp_path / "peace", tmp_path / "killed")
    assert wrong(lines) == ""
    assert "2 of 3" in wrong(lines[1:])
    assert wrong([lines[1], lines[0], lines[2]])
    assert "other answers" in wrong([*lines[:2], {**lines[2], "completion": "4"}])
    with pytest.raises(ValueError, match="id of its own"):
        wrong([*lines, lines[0]])
