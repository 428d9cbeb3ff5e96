"""Laws of the bench of sampling: what agrees where it should, and what does not fit is told."""
import json
import sys
from dataclasses import replace

import pytest
import torch

from analysis import bench_sampling
from analysis.bench_sampling import SamplingBenchConfig
from configurator import run

SMALL = SamplingBenchConfig(width=32, batch_size=2, prompt_length=9, gen_length=24,
                            block_length=8, device="cpu", json=True)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(cfg, capsys):
    bench_sampling.main(cfg)
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_straightforward_loop_has_the_tokens_of_the_exact_sampler(blocks, capsys):
    ways = numbers(replace(SMALL, blocks=blocks), capsys)["ways"]
    assert list(ways) == ["straightforward", "exact", "window", "prefix", "prefix, window", "dual",
                          "dual, window", "dual, 2.67 a pass", "dual, window, 2.67 a pass"]
    assert ways["straightforward"]["as_exact"] == ways["exact"]["as_exact"] == 1
    assert ways["window"]["as_exact"] == 1          # it reads all that follows
    assert [of["passes"] for of in ways.values()] == [8 * blocks] * 7 + [3 * blocks] * 2
    for of in ways.values():            # the same tokens in each way, none of them of the prompt
        assert of["tokens_per_s"] * of["seconds"] == pytest.approx(2 * 8 * blocks)


def test_ratios_are_those_of_the_seconds(capsys):
    ways = numbers(replace(SMALL, runs=2), capsys)["ways"]
    for of in ways.values():
        assert of["over_exact"] == ways["exact"]["seconds"] / of["seconds"]


def test_blocks_of_one_token_are_timed_too(capsys):
    ways = numbers(replace(SMALL, block_length=1), capsys)["ways"]
    assert ways["dual"]["passes"] == 2


@pytest.mark.parametrize("option, words", [
    ("--blocks=4", "1..3"), ("--runs=0", "at least 1"), ("--gen_length=13", "multiple"),
    ("--prompt_length=99999999999", "block_size=4096"), ("--prompt_length=4090", "block_size=4096"),
    ("--device=cuda:77", "cuda:77"), ("--width=33", "n_head=4"), ("--width=-4", "width=-4"),
    ("--width=2147483648", "too large"), ("--batch_size=2147483648", "too large"),
    ("--runs=2147483648", "too large"), ("--gen_length=2147483648", "block_size=4096"),
    ("--block_length=0", "block_length=0"), ("--batch_size=0", "at least 1"),
    ("--window=0", "window=0")])
def test_a_setting_that_does_not_fit_is_one_sentence(option, words, monkeypatch):
    small = [f"--{key}={getattr(SMALL, key)}" for key in (
        "width", "gen_length", "block_length", "device")]
    monkeypatch.setattr(sys, "argv", ["bench_sampling.py", *small, option])
    with pytest.raises(SystemExit) as caught:
        run(bench_sampling.main, SamplingBenchConfig)
    assert words in str(caught.value) and "\n" not in str(caught.value)
