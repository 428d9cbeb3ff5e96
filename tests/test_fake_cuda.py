"""Laws of the steps at 8 B and of the sampler on a fake GPU (fake_cuda.py): waits, kernels, bytes.

docs/cost.md states what is held here: the host waits nowhere in a step without a log line, or once
with `lean`. Two layers are enough where waits are counted. Where bytes are, there are more: a
sharded model of few layers has its peak at the end of the backward pass, at 8 B at the beginning.
"""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from analysis import predict
from analysis.predict import FP32, shape_of
from configurator import configure
from helpers import PATIENCE, ROOT
from train import TrainConfig

HERE = Path(__file__).resolve().parent
LEAN_WAIT = {"item at training/lean.py": 1}         # found_inf, before the update
GSM8K, UNEVEN = [249] * 8, [40, 47, 55, 61, 66, 74, 82, 90]
SPIDER = [975] * 8                                  # the largest pass: 7,800 tokens


@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    """Build the device guard of fake_cuda.cpp -> its path."""
    if sys.platform != "linux" or torch.version.cuda or torch.version.hip:
        pytest.skip("needs a torch for CPUs on Linux: elsewhere the guard is a real GPU's")
    out = tmp_path_factory.mktemp("guard") / "guard.so"
    words = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", str(HERE / "fake_cuda.cpp"), "-o",
             str(out), *(f"-I{path}" for path in include_paths())]
    try:
        built = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        pytest.skip("needs g++, to build a device guard")
    if "No such file" in built.stderr:
        pytest.skip(f"needs torch's headers: {built.stderr.splitlines()[0]}")
    assert built.returncode == 0, built.stderr[-2000:]
    return out


def run_cases(guard, folder, cases: dict) -> dict:
    """Run cases on the fake GPU in one process -> {case: {waits, mixed, kernels, peak}}."""
    done = subprocess.run([sys.executable, str(HERE / "fake_cuda.py"), str(guard), str(folder),
                           json.dumps(cases)], capture_output=True, text=True, cwd=ROOT,
                          timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {case.pop("case"): case for case in found}


def training(config, lengths, n_layer=2, card="A100", world=8, options=()):
    preset = "dream-7b" if config.startswith("dream") else "llada-8b"
    return dict(kind="train", config=f"config/{config}.py", preset=preset, lengths=lengths,
                n_layer=n_layer, card=card, world=world, options=list(options))


def without_line_numbers(counts: dict) -> dict:
    found = {}
    for text, n in counts.items():
        place = text.rsplit(":", 1)[0]
        found[place] = found.get(place, 0) + n
    return found


# ----------------------------------------------------------------------------------------------
# where the host waits in a step


ONE = dict(world=1, card="H200")
STEPS = {
    "plain": training("llada8b_gsm8k", UNEVEN, **ONE, options=[
        "--shard=False", "--batch_size=8", "--lambda_jepa=0"]),
    "JEPA": training("llada8b_gsm8k", UNEVEN, **ONE, options=[
        "--shard=False", "--batch_size=16", "--micro_batch_size=8"]),
    "JEPA, packed": training("llada8b_gsm8k", UNEVEN, **ONE, options=[
        "--shard=False", "--batch_size=8", "--pack", "--checkpoint_activations=selective"]),
    "lean": training("llada8b_gsm8k_1gpu", UNEVEN, **ONE, options=["--batch_size=8"]),
    "LoRA": training("llada8b_gsm8k_lora", UNEVEN, world=1, card="4090", options=[
        "--batch_size=16"]),
    "sharded": training("llada8b_gsm8k", UNEVEN),
    "sharded, packed": training("llada8b_spider", UNEVEN),
    "sharded, gathered once, two copies": training("llada8b_gsm8k", UNEVEN, options=[
        "--gather_once", "--shard_over=4"]),
    "anchor": training("llada8b_gsm8k_anchor", UNEVEN),
    "Dream on A100": training("dream7b_gsm8k", UNEVEN),
    "Dream on H200": training("dream7b_gsm8k", UNEVEN, card="H200"),
    "Dream, packed": training("dream7b_spider", UNEVEN),
}


@pytest.fixture(scope="module")
def steps(guard, tmp_path_factory):
    return run_cases(guard, tmp_path_factory.mktemp("steps"), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_a_step_without_a_log_line_waits_for_the_gpu_nowhere_or_once_with_lean(steps, case):
    waits = without_line_numbers(steps[case]["waits"].get("step", {}))
    assert waits == (LEAN_WAIT if case == "lean" else {})


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_no_tensor_of_the_cpu_gets_into_an_operation_on_the_gpu(steps, case):
    assert steps[case]["mixed"] == {} and steps[case]["peak"]["step"] > 1e9


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_attention_has_a_fused_kernel(steps, case):
    kernels = steps[case]["kernels"]["step"]
    fused = ("varlen" if "packed" in case else "cudnn" if STEPS[case]["card"] == "H200" else
             "efficient")
    assert kernels.keys() == {fused}
    assert kernels[fused] >= (2 if case in ("plain", "anchor") else 4)      # layers, and the EMA's


# ----------------------------------------------------------------------------------------------
# bytes at the peak of a step


EIGHT, FOUR, H200, SMALL = predict.SETUPS
BYTES = {
    "8 GPUs": (EIGHT, training("llada8b_gsm8k", GSM8K, 12)),
    "4 GPUs": (FOUR, training("llada8b_gsm8k", GSM8K, 12, world=4, options=[
        "--micro_batch_size=8"])),
    "anchor": (replace(EIGHT, n_pred_layer=0, bytes_of={**FP32, "ema": 0, "anchor": 4}),
               training("llada8b_gsm8k_anchor", GSM8K, 12)),
    "lean": (H200, training("llada8b_gsm8k_1gpu", GSM8K, 12, world=1, card="H200", options=[
        "--batch_size=16"])),
    "LoRA": (SMALL, training("llada8b_gsm8k_lora", GSM8K, 8, world=1, card="4090", options=[
        "--batch_size=32"])),
    "long rows, packed": (replace(EIGHT, is_packed=True), training("llada8b_spider", SPIDER, 8)),
    "Dream": (EIGHT, training("dream7b_gsm8k", GSM8K, 12)),
    "Dream, long rows, packed": (replace(EIGHT, is_packed=True),
                                 training("dream7b_spider", SPIDER, 8)),
}


@pytest.fixture(scope="module")
def peaks(guard, tmp_path_factory):
    found = run_cases(guard, tmp_path_factory.mktemp("peaks"),
                      {name: case for name, (_, case) in BYTES.items()})
    return {name: case["peak"] for name, case in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", BYTES)
def test_the_peak_of_a_step_is_within_5_percent_of_the_prediction_and_under_the_card(peaks, name):
    setup, case = BYTES[name]
    tokens = sum(case["lengths"]) * setup.rows // len(case["lengths"])
    here, whole = (sum(predict.memory(setup, shape_of(case["preset"], n_layer), tokens).values())
                   for n_layer in (case["n_layer"], 0))
    assert max(peaks[name].values()) / 1e9 == pytest.approx(here, rel=0.05)
    assert whole < 0.96 * setup.gigabytes


def test_every_config_of_7_or_8_b_has_a_case_with_its_way_to_use_memory():
    def way(config):
        cfg = configure(TrainConfig, [config])
        return (cfg.init_from, cfg.shard, cfg.optimizer, cfg.lora_rank, cfg.lambda_jepa > 0,
                cfg.anchor, cfg.checkpoint_activations, cfg.n_pred_layer, cfg.pack)
    ways = {way(case["config"]) for _, case in BYTES.values()}
    for path in sorted(ROOT.glob("config/*[78]b_*.py")):
        assert way(f"config/{path.name}") in ways, path.name


# ----------------------------------------------------------------------------------------------
# where the host waits in the sampler


def sampling(preset, card="A100", **settings):
    settings = dict(gen_length=16, block_length=8, steps=8) | settings
    return dict(kind="sample", card=card, preset=preset, n_layer=2, settings=settings)


SAMPLES = {
    "exact": sampling("llada-8b"),
    "threshold, dual cache": sampling("llada-8b", threshold=0.9, cache="dual"),
    "window, prefix cache": sampling("llada-8b", window=4, cache="prefix"),
    "guided, random": sampling("llada-8b", cfg_scale=1.0, temperature=0.5),
    "Dream's entropy, prefix cache": sampling("dream-7b", remasking="entropy", cache="prefix"),
    "Dream's entropy, dual cache, H200": sampling("dream-7b", "H200", remasking="entropy",
                                                  cache="dual"),
}


@pytest.fixture(scope="module")
def samples(guard, tmp_path_factory):
    return run_cases(guard, tmp_path_factory.mktemp("samples"), SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLES)
def test_the_sampler_waits_within_a_block_for_nothing_but_the_flag_of_the_pass_before(
        samples, case):
    found = samples[case]
    waits = without_line_numbers(found["waits"].get("block", {}))
    is_parallel = "threshold" in SAMPLES[case]["settings"]
    assert waits.keys() == ({"event.synchronize at sampling/reader.py"} if is_parallel else set())
    assert found["mixed"] == {}
    assert found["kernels"]["block"].keys() == {"cudnn" if "H200" in case else "efficient"}


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLES)
def test_between_blocks_it_waits_for_what_decides_whether_to_go_on(samples, case):
    places = {place.split(" at ")[1] for place in without_line_numbers(
        samples[case]["waits"]["between"])}
    assert places == {"sampling/canvas.py"}
