"""Laws of the check of a GPU: tried on a CPU it fills every part; nothing that it found is lost."""
import contextlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from analysis import gpu_check
from analysis.gpu_check import PARTS, SECONDS, GPUCheckConfig, Page, page_of
from analysis.gpu_machine import Check, Figure, as_text, count_waits
from configurator import configure, run
from helpers import fork, output_of, write_output_to
from training import ranks

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results/gpu_check"
LONG = "loop", "compile", "tests"


def check(tmp_path, *parts, **settings) -> dict:
    """Run the check on tiny shapes -> its parts, as they are on file."""
    settings = dict(device="cpu", dry=True) | settings
    gpu_check.main(GPUCheckConfig(out_dir=str(tmp_path), parts=parts, **settings))
    return on_file(tmp_path)


def on_file(tmp_path) -> dict:
    return json.loads((tmp_path / "figures.json").read_text())["parts"]


def figures_of(part: dict) -> dict:
    return {figure["what"]: figure for figure in part["figures"]}


def check_filled(found: dict):
    """Each part has ended with figures, none of them an error or beyond its limit."""
    for part in found.values():
        assert part["note"] == "" and part["seconds"] >= 0 and part["figures"], part
        for figure in part["figures"]:
            assert "rror" not in f"{figure['what']} {figure['value']}", figure
            assert figure["of"] != "limit" or figure["value"] < figure["beside"], figure


# ----------------------------------------------------------------------------------------------
# the parts


def test_on_a_cpu_the_short_parts_are_filled_in(tmp_path):
    parts = [part for part in SECONDS if part not in LONG]
    found = check(tmp_path, *parts)
    assert list(found) == parts
    check_filled(found)
    assert {figure["of"] for figure in found["parity"]["figures"]} == {"limit"}
    assert figures_of(found["bench"])["jepa / plain"]["of"] == "by FLOPs"
    assert "LoRA, 2 layers, micro-batches of 2: peak" in figures_of(found["memory"])
    assert figures_of(found["sampler"])["exact: as exact"]["value"] == 100
    assert "one rank, sharded: host waits" in figures_of(found["waits"])


@pytest.mark.slow
def test_on_a_cpu_the_long_parts_are_filled_in(tmp_path):
    found = check(tmp_path, *LONG)
    check_filled(found)
    loop = figures_of(found["loop"])
    limits = [figure for figure in loop.values() if figure["of"] == "limit"]
    assert len(limits) == 7             # two gradients is held to a run of two gradients
    assert loop["answers of fp32, cache dual: equal to the CPU's"]["value"] == 8
    assert "compiled plain" in figures_of(found["compile"])
    assert figures_of(found["tests"])["pytest is there"]["value"].startswith("exit code 0")


def test_a_wait_is_counted_where_the_project_causes_it():
    with count_waits(torch.device("cpu")) as waits:
        for message in ("called a synchronizing CUDA operation", "something else"):
            warnings.warn(message)
    [place] = waits
    assert place.startswith("tests/test_gpu_check.py:") and waits[place] == 1
    assert as_text(waits) == f"1 x {place}" and as_text({}) == "none"


def test_a_group_of_one_ends_with_its_block():
    with pytest.raises(KeyError), ranks.group_of_one(torch.device("cpu")):
        assert ranks.agree([3], "cpu") == [3] and ranks.dist.get_world_size() == 1
        raise KeyError
    assert not ranks.dist.is_initialized()


# ----------------------------------------------------------------------------------------------
# the driver


def parts_of(monkeypatch, **functions):
    """Put functions in the place of parts: each yields one figure, then does something."""
    def part(function):
        def run_part(check):
            yield Figure("before", 1.5, "s", 3.0, "known")
            function()
            yield Figure("after", "x|y")
        return run_part
    for name, function in functions.items():
        monkeypatch.setitem(PARTS, name, part(function))


def fail():
    raise RuntimeError("no such kernel\nand more of it")


def test_an_error_in_a_part_is_a_line_and_the_next_part_runs(tmp_path, monkeypatch, capsys):
    parts_of(monkeypatch, parity=fail, waits=lambda: None)
    found = check(tmp_path, "parity", "waits")
    assert found["parity"]["note"].startswith("RuntimeError: no such kernel (test_gpu_check.py:")
    assert list(figures_of(found["parity"])) == ["before"]
    assert list(figures_of(found["waits"])) == ["before", "after"]
    page = (tmp_path / "page.md").read_text()
    assert "| before | 1.5 s | 3 s, known | 0.5 |" in page and "| after | x/y |  |  |" in page
    assert f"**{found['parity']['note']}**" in page
    assert "Traceback" in capsys.readouterr().err


def be_killed(out_dir, log):
    write_output_to(log)
    with pytest.MonkeyPatch.context() as monkeypatch:
        parts_of(monkeypatch, parity=lambda: os.kill(os.getpid(), signal.SIGKILL))
        check(out_dir, "environment", "parity")


def test_a_kill_loses_nothing_and_the_next_run_goes_on(tmp_path, monkeypatch):
    process = fork(be_killed, tmp_path / "out", tmp_path / "log")
    process.join()
    assert process.exitcode == -signal.SIGKILL, output_of([tmp_path / "log"])
    killed = on_file(tmp_path / "out")
    assert killed["environment"]["note"] == "" and len(killed["environment"]["figures"]) > 3
    assert killed["parity"]["note"] == "did not end" and "before" in figures_of(killed["parity"])
    assert "**did not end**" in (tmp_path / "out/page.md").read_text()
    parts_of(monkeypatch, parity=lambda: None)
    found = check(tmp_path / "out", "parity")
    assert found["environment"] == killed["environment"]
    assert list(figures_of(found["parity"])) == ["before", "after"]


def test_a_part_that_would_end_late_is_left_out_and_named(tmp_path, monkeypatch):
    parts_of(monkeypatch, compile=lambda: None, environment=lambda: None)
    monkeypatch.setattr(gpu_check, "Check", lambda device, n_layer, dry: Check(device, 1, True))
    found = check(tmp_path, "compile", "environment", dry=False, minutes=0.5)
    assert found["compile"] == {"figures": [], "note": "left out: needs about 70 s, and 30 of 30 "
                                                       "are left"}
    assert found["environment"]["note"] == ""


def test_a_part_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    parts_of(monkeypatch, parity=lambda: time.sleep(60))
    began = time.perf_counter()
    found = check(tmp_path, "parity", minutes=0.01)
    assert "TimeoutError: stopped after" in found["parity"]["note"]
    assert time.perf_counter() - began < 30 and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_gpu_that_answers_no_more_is_left_to_a_new_process(tmp_path, monkeypatch):
    started = []
    parts_of(monkeypatch, parity=fail)
    monkeypatch.setattr(Check, "is_lost", lambda check: True)
    monkeypatch.setattr(os, "execv", lambda *words: started.append(words) or sys.exit())
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--parts=parity,loop,tests"])
    with contextlib.suppress(SystemExit):
        check(tmp_path, "parity", "loop", "tests")
    [(program, words)] = started
    cfg = configure(GPUCheckConfig, words[2:])
    assert program == sys.executable and words[1] == "gpu_check.py"
    assert cfg.parts == ("loop", "tests") and 4 < cfg.minutes <= 6
    note = on_file(tmp_path)["parity"]["note"]
    assert "no such kernel" in note and "answers no more" in note


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 90_000, '{"head": {}, "parts": {}}',
                                  "HEAD", '{"head": HEAD, "parts": {"nope": {}}}',
                                  '{"head": HEAD, "parts": {"parity": {"note": 1}}}',
                                  '{"head": HEAD, "parts": {"parity": {"note": "", "figures": 5}}}',
                                  '{"head": OTHER, "parts": {"parity": PART}}'],
                         ids=lambda text: text[:60])
def test_another_machines_figures_and_what_are_none_are_left_aside(text, tmp_path):
    cfg = GPUCheckConfig(out_dir=str(tmp_path), device="cpu", dry=True)
    head, part = Page(cfg, torch.device("cpu")).head, {"note": "", "figures": []}
    for word, value in {"HEAD": head, "OTHER": head | {"commit": "0000000"}, "PART": part}.items():
        text = text.replace(word, json.dumps(value))
    (tmp_path / "figures.json").write_text(text)
    assert Page(cfg, torch.device("cpu")).parts == {}
    (tmp_path / "figures.json").write_text(json.dumps(
        {"head": head | {"date": "2026-01-01"}, "parts": {"parity": part}}))
    assert Page(cfg, torch.device("cpu")).parts == {"parity": part}     # of another day: they stay


@pytest.mark.parametrize("option, words", [
    ("--parts=nope", "parts has 'nope'; there are environment,"), ("--parts=", "parts is empty"),
    ("--minutes=0", "minutes=0.0 must be at least 0.01"), ("--minutes=nan", "finite"),
    ("--n_layer=0", "n_layer=0 must be at least 1"), ("--device=cuda:77", "cuda:77"),
    ("--out_dir=FILE", "FILE"), ("--dry=x", "dry")])
def test_a_setting_that_does_not_fit_is_one_sentence(option, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("kept")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device=cpu", option])
    with pytest.raises(SystemExit) as caught:
        run(gpu_check.main, GPUCheckConfig)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert Path("FILE").read_text() == "kept" and os.listdir() == ["FILE"]


# ----------------------------------------------------------------------------------------------
# the pages on file


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_page_of_results_is_what_its_figures_make(path):
    found = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == page_of(found["head"], found["parts"])


def test_the_page_of_costs_has_what_the_h200_measured():
    parts = json.loads((RESULTS / "h200.json").read_text())["parts"]
    memory, page = figures_of(parts["memory"]), (ROOT / "docs/cost.md").read_text()
    for name, rows in (("lean", 8), ("LoRA", 16), ("LoRA", 2)):
        which = f"{name}, 32 layers, micro-batches of {rows}"
        peak, share = memory[f"{which}: peak"], memory[f"{which}: share of the peak"]["value"]
        [step] = [figure for what, figure in memory.items() if what.startswith(f"{which}: a step")]
        seconds = f"{step['value']:.1f}" if step["value"] > 10 else f"{step['value']:.2f}"
        assert (f"| {rows} | {peak['beside']:.1f} GB | {peak['value']:.1f} GB | {seconds} s | "
                f"{share:.0f} % | {share * 813.2 / 989:.0f} % |") in page
    attention = figures_of(parts["attention"])
    for preset, name in (("llada-8b", "LLaDA-8B"), ("dream-7b", "Dream-7B")):
        for T in (233, 932):
            ms = [attention[f"{preset}, 16 rows to {T} tokens, {layout}"]["value"]
                  for layout in ("dense, no mask", "padded", "packed")]
            assert f"| {name} | {T} | " + " | ".join(f"{x:.2f}" for x in ms) + " |" in page
