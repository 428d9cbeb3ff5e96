"""Laws of keep.py: what is kept of a grid is enough to test two of its runs against each other."""
import gzip
import json

import pytest

from analysis import keep
from analysis.keep import VERDICTS, KeepConfig, compare
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
