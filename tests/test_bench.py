"""Laws of bench.py and predict.py: the closed forms are what is counted, and ratios are printed."""
import ast
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import train
from analysis import bench, predict
from analysis.bench import BenchConfig
from analysis.predict import PredictConfig, Setup, shape_of
from configurator import configure, run
from jepa import DLLMJEPA, Predictor
from model import DLLM, NLL_CHUNK, PRESETS, ModelConfig
from tests.test_packing import DREAM, LLADA, QWEN, kept_bytes, make_model
from train import TrainConfig

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
SMALL = BenchConfig(width=32, n_layer=2, batch_size=3, steps=1, device="cpu")
KINDS = ["plain", "naive plain", "jepa", "two gradients", "jepa padded", "jepa packed",
         "straightforward"]


@pytest.mark.parametrize("preset", ["llada-8b", "dream-7b"])
def test_parameters_are_counted_as_the_meta_device_has_them(preset):
    config = ModelConfig(**PRESETS[preset])
    with torch.device("meta"):
        model = DLLM(config)
    counted = predict.parameters(config)
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())
    assert counted["layers"] == sum(p.numel() for p in model.blocks.parameters())
    assert counted["head"] == model.head.weight.numel()


def test_parameters_of_other_shapes_and_of_the_predictor_are_counted_too():
    for config in (LLADA, DREAM, QWEN):
        assert sum(predict.parameters(config).values()) == sum(
            p.numel() for p in DLLM(config).parameters())
        for k in (0, 1, 3):
            assert predict.predictor_parameters(config, k) == sum(
                p.numel() for p in Predictor(config.n_embd, k).parameters())


def uneven_rows(config):
    return [bench.Row(i, [2] * (4 + 3 * i), [3] * (9 + 5 * i)) for i in range(3)]


@pytest.mark.parametrize("checkpoint_activations", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [LLADA, DREAM, QWEN], ids=["llada", "dream", "qwen"])
def test_the_closed_form_of_a_step_is_what_is_counted(shape, kind, checkpoint_activations):
    cfg = replace(SMALL, checkpoint_activations=checkpoint_activations, pack=shape is QWEN)
    model = make_model(replace(shape, eos_id=0, block_size=bench.PAD_TO))
    model.checkpoint_activations = checkpoint_activations
    step, rows = bench.make_steps(cfg, model)[kind], uneven_rows(shape)
    counted = bench.count_flops(step, bench.batch_of(cfg, rows, 0))
    assert counted == bench.step_flops(kind, cfg, model.config, rows)
    assert all(p.grad is None for p in model.parameters())


def test_the_closed_form_holds_at_the_width_of_8_b_and_in_chunks(monkeypatch):
    monkeypatch.setattr(bench, "N_PRED_LAYER", 0)               # whose weights would take a while
    cfg = BenchConfig(preset="llada-8b", n_layer=2, batch_size=60)
    config = shape_of("llada-8b", n_layer=2)
    with torch.device("meta"):
        model = DLLM(config)
    model.compute_dtype = torch.bfloat16
    steps, rows = bench.make_steps(cfg, model), bench.make_rows(cfg, config)
    flops = {name: bench.count_flops(steps[name], bench.batch_of(cfg, rows, 0))
             for name in ("plain", "jepa", "two gradients")}
    for name, counted in flops.items():
        assert counted == bench.step_flops(name, cfg, config, rows)
    head = flops["plain"] - 3 * predict.trunk_flops(config, [166] * 60)
    n_masked, rest = divmod(head, 4 * predict.head_flops(config, 1))
    assert n_masked > NLL_CHUNK and rest == 0                    # in chunks: forward once more


@pytest.mark.parametrize("shape", [LLADA, DREAM], ids=["llada", "dream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_have_the_bytes_of_the_closed_form(shape, dtype):
    B, T, kept = 4, 16, []
    for n_layer in (2, 3):
        model = make_model(replace(shape, n_layer=n_layer)).to(dtype)   # no casts of weights
        model.compute_dtype = dtype
        kept.append(kept_bytes(model, lambda: model.encode(torch.zeros(B, T, dtype=torch.long))))
    # a CPU's attention puts heads first, so that its output is copied before o_proj
    copied = shape.n_embd * dtype.itemsize
    assert (kept[1] - kept[0]) / (B * T) == predict.activation_bytes(shape, dtype.itemsize) + copied


def test_states_have_the_bytes_of_the_closed_form():
    objective = DLLMJEPA(make_model(LLADA), n_pred_layer=2)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad])
    for p in objective.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()

    def size(tensors):
        return sum(x.numel() * x.element_size() for x in tensors) / 1e9
    weights = list(objective.model.parameters())
    gb = predict.memory(Setup("here", "", 1, 0, predict.FP32), LLADA, tokens=0)
    assert gb["weights"] == gb["grads"] == pytest.approx(size(weights))
    assert gb["ema"] == pytest.approx(size(objective.target.parameters()))
    assert gb["moments"] == pytest.approx(size(optimizer.state[p][key] for p in weights
                                               for key in ("exp_avg", "exp_avg_sq")))
    assert gb["predictor"] == pytest.approx(4 * size(objective.predictor.parameters()))


def test_what_is_predicted_for_8_b_agrees_with_what_is_known_of_it(capsys):
    config = ModelConfig(**PRESETS["llada-8b"])
    length = PredictConfig().length
    eight, four, lean, lora = (predict.memory(setup, config, length * setup.rows)
                               for setup in predict.SETUPS)
    assert four["weights"] + four["grads"] + four["moments"] == pytest.approx(32.06, abs=0.01)
    assert four["weights"] == 2 * eight["weights"] and lean["in flight"] == 0
    assert eight["grads"] == 0          # of a single pass a step: they come after the peak
    assert lora["grads"] * 1e9 / 4 == 32 * 32 * (4 * 8192 + 3 * 16384)      # of adapters alone
    for setup, gb in zip(predict.SETUPS, (eight, four, lean, lora)):
        assert sum(gb.values()) < 0.96 * setup.gigabytes, setup.name           # it leaves some air
    of_token = predict.trunk_flops(config, [512]) / 512 + predict.head_flops(config, 1)
    assert of_token == pytest.approx(14.995e9 + 0.524e6 * 512, rel=1e-4)
    head = 3 * predict.MASKED * predict.head_flops(config, 1)
    trunk = predict.trunk_flops(config, [166]) / 166              # of one token
    assert (4 * trunk + head) / (6 * trunk + head) == pytest.approx(0.668, abs=5e-4)
    predict.main(PredictConfig())
    names = [line.split("   ")[0] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert names == [setup.name for setup in predict.SETUPS]


def test_the_setups_are_those_of_the_configs():
    eight, four, lean, lora = predict.SETUPS
    for setup, name in ((eight, ""), (lean, "_1gpu"), (lora, "_lora")):
        cfg = configure(TrainConfig, [f"config/llada8b_gsm8k{name}.py"])
        assert predict.setup_of(cfg) == setup and cfg.batch_size == predict.ROWS
    assert four == replace(eight, name=four.name, n_gpu=4)          # by --micro_batch_size=8


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*[78]b_*.py")), ids=lambda p: p.stem)
def test_a_config_states_what_the_tool_predicts(path):
    said = predict.describe(f"config/{path.name}")
    assert said in " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
    gb, card = (int(re.search(pattern, said)[1]) for pattern in (r"GB: (\d+) GB", r"(\d+) GB:"))
    assert gb < 0.96 * card


def test_what_is_predicted_follows_the_settings(tmp_path):
    def said(more="", source="llada8b_gsm8k"):
        path = tmp_path / "mine.py"
        path.write_text((ROOT / f"config/{source}.py").read_text() + more)
        return predict.describe(str(path))
    least, most = ([float(x) for x in re.findall(r"\d[\d.]*", said(f"lambda_jepa = {weight}"))]
                   for weight in (0.0, 1.0))
    gpus, gb, steps, step, minutes, tokens, disk = slice(3), 3, 4, 5, 6, 7, 8
    assert all(least[i] == most[i] for i in (gpus, steps, tokens))
    assert all(least[i] < most[i] for i in (gb, step, minutes, disk))
    assert "100 steps" in said("max_steps = 100")
    for more in ("max_length = 300", "pack = True", "eos_fill = False", "micro_batch_size = 4"):
        with pytest.raises(ValueError, match="task='gsm8k' as --data_dir"):
            said(more)
    for more in ("batch_size = 32", "init_from = 'gpt2'", "gather_once = True", "shard = False",
                 "dtype = 'float32'", "micro_batch_size = 16"):
        with pytest.raises(ValueError, match=more.split()[0]):
            said(more)


@pytest.mark.parametrize("task, max_length, size, pack", [
    pytest.param(*key, marks=[] if key[0] == "nl_rx" else pytest.mark.slow)
    for key in predict.TOKENS])
def test_the_tokens_are_those_of_the_rows(task, max_length, size, pack):
    folder = ROOT.parent / "shared/data" / {"nl_rx": "nl_rx_synth"}.get(task, task)
    if not folder.is_dir():
        pytest.skip("the rows are not here")
    cfg = TrainConfig(task=task, max_length=max_length, pack=pack)
    counted = predict.count_tokens(cfg, size, str(folder))
    assert counted == predict.TOKENS[task, max_length, size, pack]


def test_a_config_can_be_predicted_from_rows_of_ones_own(tmp_path, capsys):
    row = {"question": "Ann has 12 apples.", "answer": "12 + 3 = 15\n#### 15"}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * (256 + 640))
    predict.main(PredictConfig(config="config/llada8b_gsm8k.py", data_dir=str(tmp_path)))
    said = " ".join(capsys.readouterr().out.split())
    text = r"Question : Ann has 1 2 apples . \n Answer : 1 2 + 3 = 1 5 \n # # # # 1 5 <eos>"
    length = len(text.split())
    assert "20 steps" in said and f" {length} tokens a row" in said


@pytest.mark.parametrize("options", [["--lambda_jepa=0"], [], ["--optimizer=lean"]], ids=str)
def test_a_checkpoint_has_the_bytes_of_the_closed_form(options, tmp_path):
    out, depth = tmp_path / "run", 2
    cfg = configure(TrainConfig, ["config/tiny.py", f"--out_dir={out}", "--max_steps=1",
                                  "--eval_rows=1", "--test_questions=0", "--device=cpu",
                                  "--n_layer=2", f"--n_pred_layer={depth}", *options])
    train.main(cfg)
    [folder] = out.glob("step_*")
    config = DLLM.from_pretrained(str(folder)).config
    setup = Setup("here", "", 1, 0, predict.LEAN if cfg.optimizer == "lean" else predict.FP32,
                  depth)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size / 1e9 == pytest.approx(predict.disk(setup, config, cfg.lambda_jepa > 0), rel=0.02)


def test_the_page_of_costs_has_the_tables_of_the_tool(capsys):
    """Each setup's numbers stand in its row of docs/cost.md, those of packed rows too."""
    page = (ROOT / "docs/cost.md").read_text()
    predict.main(PredictConfig())
    padded = capsys.readouterr().out.splitlines()[-4:]
    predict.main(PredictConfig(length=228))
    for line, packed in zip(padded, capsys.readouterr().out.splitlines()[-4:]):
        *_, states, predictor, activations, gb, _, plain, _, jepa, _, disk, _ = line.split()
        times = [packed.split()[-4], jepa, plain]
        [row] = [row for row in page.splitlines() if row.startswith(("| `config", "| the same"))
                 and f"| {states} | {predictor} | {activations} | {gb} |" in row]
        found = [float(cell.split()[0]) for cell in row.strip("| ").split("|")[-3:]]
        assert found == pytest.approx([float(x) for x in reversed(times)], abs=0.051)
        assert f"{disk} GB" in page or f"{disk} and" in page


def test_the_table_of_steps_has_the_papers_flops_and_those_of_the_closed_form():
    config = shape_of("llada-8b")
    rows = {kind: passes for kind, *passes in predict.step_table(config, 240)[1:]}
    assert {kind: passes[3] for kind, passes in rows.items()} == {
        "AR fine-tuning": "3F", "LLM-JEPA, both views packed": "6F", "plain diffusion": "3F",
        "DLLM-JEPA": "4F"}
    trunk = predict.trunk_flops(config, [240])
    head = 3 * 240 * predict.MASKED * predict.head_flops(config, 1)
    assert rows["DLLM-JEPA"][-1] == f"{(4 * trunk + head) / (3 * trunk + head):.3f}"


def test_the_bench_ends_with_one_line_of_json(capsys):
    bench.main(replace(SMALL, json=True))
    *_, last = capsys.readouterr().out.strip().splitlines()
    found = json.loads(last)
    assert found["steps"]["plain"]["over_plain"] == 1
    assert list(found["steps"]) == KINDS and found["settings"] == asdict(replace(SMALL, json=True))
    for of in found["steps"].values():
        assert of["flops"] == of["closed_form"] > 0 and of["ms"] > 0 and of["tokens_per_s"] > 0
        share = 1000 * of["flops"] / of["ms"] / found["matmul_flops_per_s"]
        assert of["of_peak"] == pytest.approx(share) and 0 < share < 1


def test_lengths_are_those_of_the_data(tmp_path):
    row = {"question": "Ann has 12 apples.", "answer": "12 + 3 = 15\n#### 15"}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 257)
    cfg = replace(SMALL, data_dir=str(tmp_path))
    [one] = bench.make_rows(cfg, shape_of("tiny"))
    assert len(one.prompt) == len("Question : Ann has 1 2 apples . \n Answer :".split(" "))
    assert len(one.answer) == len("1 2 + 3 = 1 5 \n # # # # 1 5".split(" "))
    assert 1 not in one.prompt + one.answer                     # the mask's id


@pytest.mark.parametrize("option, words", [
    ("--steps=0", "at least 1"), ("--steps=x", "an int"), ("--device=cuda:77", "cuda:77")])
def test_a_bad_setting_stops_with_one_sentence(option, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", option])
    with pytest.raises(SystemExit) as caught:
        run(bench.main, BenchConfig)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_is_read():
    assert configure(BenchConfig, ["--preset=dream-7b", "--pack"]).pack


@pytest.mark.parametrize("script", ["bench", "bench_sampling", "compare", "gpu_check", "predict"])
def test_the_scripts_start_from_anywhere(script, tmp_path):
    command = [sys.executable, str(ROOT / f"analysis/{script}.py")]
    done = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--" in done.stdout, done.stderr
    done = subprocess.run([*command, "--nothing=1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("unknown setting 'nothing'")


@pytest.mark.parametrize("cls, option", [
    (BenchConfig, "--width=-1"), (BenchConfig, "--width=2147483648"), (BenchConfig, "--steps=0"),
    (BenchConfig, "--n_layer=-1"), (BenchConfig, "--n_layer=1000000000"),
    (BenchConfig, "--batch_size=2147483648"), (BenchConfig, "--steps=2147483648"),
    (PredictConfig, "--length=0"), (PredictConfig, "--length=-1"), (PredictConfig, "--data_dir=x"),
    (PredictConfig, "--length=2147483648")])
def test_sizes_that_no_machine_has_are_told_at_once(cls, option):
    with pytest.raises(ValueError, match=option[2:].partition("=")[0]):
        configure(cls, [option])
