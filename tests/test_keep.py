"""Laws of keep.py: what is kept of a grid is enough to test two of its runs against each other."""
import gzip
import json

import pytest

from analysis import keep
from analysis.frames import frame_of, read_results
from analysis.keep import VERDICTS, KeepConfig, compare
from analysis.tables import by_question, render
from tasks.answers import read_common
from tasks.stats import mcnemar


@pytest.fixture
def grid(tmp_path):
    """An out_dir of analysis/grid.py: a base and two runs with eight answers each."""
    folder, lines = tmp_path / "grid", []
    rights = {"base": [], "plain_seed1": [0, 1, 2, 5], "jepa_seed1": [1, 2, 3, 4, 6, 7]}
    for name, right in rights.items():
        run = folder / "little" / name
        run.mkdir(parents=True)
        answers = [{"id": f"toy/{i}", "verdict": i in right} for i in range(8)]
        (run / "test_0shot.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
        (run / "test_0shot.json").write_text('{"settings": {}}')
        if name != "base":
            (run / "log.jsonl").write_text('{"step": 1}\n')
            (run / "settings.json").write_text("{}")
            (run / "model.safetensors").write_text("weights")
        lines.append({"config": "little", "arm": name.split("_")[0], "lambda": 0.0, "depth": 0,
                      "seed": None if name == "base" else 1, "split": "test", "n_shot": 0,
                      "task": "toy", "t_ctx": 0.2, "t_tgt": 0.7, "held_out": {},
                      "train": "" if name == "base" else "python train.py", "command": "python",
                      "metrics": {"accuracy": len(right) / 8, "n": 8},
                      "answers": f"little/{name}/test_0shot.jsonl"})
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_scores_logs_and_verdicts_are_kept_and_weights_are_not(grid, tmp_path):
    out = tmp_path / "kept"
    keep.main(KeepConfig(grid=str(grid), out=str(out)))
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert found == sorted(["results.jsonl", VERDICTS] + [
        f"little/{run}/{name}" for run in ("plain_seed1", "jepa_seed1")
        for name in ("log.jsonl", "settings.json")])
    assert (out / "results.jsonl").read_bytes() == (grid / "results.jsonl").read_bytes()
    lines = [json.loads(line) for line in gzip.open(out / VERDICTS, "rt")]
    assert [(line["run"], line["n"], len(line["right"])) for line in lines] == [
        ("little/base", 8, 0), ("little/plain_seed1", 8, 4), ("little/jepa_seed1", 8, 6)]


def test_the_verdicts_give_the_test_that_the_answers_give(grid, tmp_path):
    runs = ("little/plain_seed1", "little/jepa_seed1")
    both, _ = read_common([str(grid / run / "test_0shot.jsonl") for run in runs])
    first, second = ([answers[id] for id in sorted(answers)] for answers in both)
    lost = sum(b and not a for a, b in zip(first, second))
    gained = sum(a and not b for a, b in zip(first, second))
    keep.keep(grid, tmp_path / "kept")
    text = compare(tmp_path / "kept", runs, "test", 0)
    assert f"{gained} only the first, {lost} only the second" in text and (gained, lost) == (2, 4)
    assert f"p = {mcnemar(gained, lost):.2g}" in text


def test_tables_have_the_tests_of_the_answers_from_the_verdicts_alone(grid, tmp_path):
    """A table of kept scores is that of the grid, whose answers are gone."""
    from_answers = render(read_results([grid / "results.jsonl"]))
    keep.keep(grid, tmp_path / "kept")
    from_verdicts = render(read_results([tmp_path / "kept" / "results.jsonl"]))
    assert from_verdicts == from_answers and f"1: {mcnemar(2, 4):.2g}" in from_answers
    (tmp_path / "kept" / VERDICTS).unlink()
    assert "no answers on file" in render(read_results([tmp_path / "kept" / "results.jsonl"]))


def test_of_more_than_three_seeds_the_tables_have_the_number_below_one_in_twenty(grid, tmp_path):
    [base, plain, jepa] = read_results([grid / "results.jsonl"])
    rows = [frame_of([one | {"seed": seed} for seed in range(4)]).set_index("seed")
            for one in (base, plain, jepa)]
    assert by_question(rows[1], rows[2]) == "0 of 4 seeds below 0.05"
    assert by_question(rows[0], rows[2]) == "4 of 4 seeds below 0.05"
    assert mcnemar(0, 6) < 0.05 < mcnemar(2, 4)


def test_scores_of_another_grid_are_not_written_over_and_those_of_a_longer_one_are(grid, tmp_path):
    results = grid / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:2]))
    keep.keep(grid, tmp_path / "kept")
    results.write_text("".join(lines))
    assert keep.keep(grid, tmp_path / "kept") == (3, 2)
    kept = (tmp_path / "kept" / "results.jsonl").read_bytes()
    results.write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="has scores that .* lacks; keep each grid in a folder"):
        keep.keep(grid, tmp_path / "kept")
    assert (tmp_path / "kept" / "results.jsonl").read_bytes() == kept


@pytest.mark.parametrize("change, said", [
    (lambda answers: answers[:-1], "n=8 and 7"), (lambda answers: answers[1:] + [
        {"id": "toy/9", "verdict": True}], "questions='")])
def test_runs_that_were_asked_other_questions_are_not_compared(grid, tmp_path, change, said):
    path = grid / "little/jepa_seed1/test_0shot.jsonl"
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(answer) + "\n" for answer in change(answers)))
    keep.keep(grid, tmp_path / "kept")
    with pytest.raises(ValueError, match="answered other questions") as error:
        compare(tmp_path / "kept", ("little/plain_seed1", "little/jepa_seed1"), "test", 0)
    assert said in str(error.value)


@pytest.mark.parametrize("data", [b"", b"x", gzip.compress(b"x\n"), gzip.compress(b"{}\n"),
                                  gzip.compress(b"[1]\n"), gzip.compress(b"{}" * 999)[:-9]])
def test_verdicts_that_are_none_are_one_sentence(tmp_path, data):
    (tmp_path / VERDICTS).write_bytes(data)
    with pytest.raises(ValueError, match=VERDICTS if data else "two runs"):
        compare(tmp_path, ("a/b", "a/c"), "test", 0)


def test_keeping_twice_gives_the_same_bytes(grid, tmp_path):
    keep.keep(grid, tmp_path / "one")
    keep.keep(grid, tmp_path / "two")
    assert (tmp_path / "one" / VERDICTS).read_bytes() == (tmp_path / "two" / VERDICTS).read_bytes()


@pytest.mark.parametrize("settings, message", [
    ({}, "--out"), ({"out": "x"}, "--grid"), ({"grid": "nowhere", "out": "x"}, "nowhere"),
    ({"out": "KEPT", "compare": ("little/plain_seed1",)}, "two runs"),
    ({"out": "KEPT", "compare": ("little/plain_seed1", "little/x")}, "little/base")])
def test_what_cannot_be_done_is_told_in_a_sentence(grid, tmp_path, settings, message):
    keep.keep(grid, tmp_path / "kept")
    if settings.get("out") == "KEPT":
        settings = settings | {"out": str(tmp_path / "kept")}
    with pytest.raises((ValueError, OSError)) as error:
        keep.main(KeepConfig(**settings))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
