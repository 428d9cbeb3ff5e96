"""Closed forms: parameters, FLOPs and memory of a model, without running anything.

    python analysis/predict.py                 LLaDA-8B: FLOPs of a step; memory, time and disk of
    python analysis/predict.py --length=228    four setups; rows padded, or packed end to end
    python analysis/predict.py --config=config/llada8b_gsm8k.py     the sentence of its docstring
    python analysis/predict.py --config=config/llada8b_gsm8k.py --data_dir=data/gsm8k    counts anew

tests/test_bench.py holds parameters and FLOPs to what PyTorch counts, and bytes to what it keeps.
What a GPU has measured beside it: docs/cost.md.
"""
import re
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import read_file, run  # first: it sets variables that torch reads

import torch

from analysis.console import print_table
from model import NLL_CHUNK, PRESETS, ModelConfig
from tasks.common import batch_at, collate, load_examples, tokenize
from train import TrainConfig
from training.setup import count_micro_batches

# bf16 FLOPs per second, from the data sheets
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "4090": 165e12}
ROWS = 64      # of a training step
MARGIN = 1.2   # tokens are an estimate: memory is predicted for a fifth more in the largest pass
MFU = 0.35     # share of that peak in training; measured on an H200: 0.34 lean, 0.39 LoRA
ANSWERS, MASKED = 0.59, 0.12    # shares of GSM8K's tokens: of answers, and masked at t = 0.2
# passes over the rows, with gradient and without, and the share of tokens that get logits
STEPS = {"AR fine-tuning": (1, 0, ANSWERS), "LLM-JEPA, both views packed": (2, 0, ANSWERS),
         "plain diffusion": (1, 0, MASKED), "DLLM-JEPA": (1, 1, MASKED)}


@dataclass
class PredictConfig:
    length: int = 249                   # of a row, in tokens: GSM8K's, filled and padded
    config: str = ""                    # of train.py: say in a sentence what it will take
    data_dir: str = ""                  # folder with its task's rows, to count their tokens anew

    def __post_init__(self):
        check_ranges(self, length=(1, 1_000_000))
        if self.data_dir and not self.config:
            raise ValueError(f"data_dir={self.data_dir!r} is for the rows of a config; name it by "
                             f"--config, such as --config=config/llada8b_gsm8k.py")


def main(cfg: PredictConfig):
    if cfg.config:
        return print(textwrap.fill(describe(cfg.config, cfg.data_dir), 100))
    config = shape_of("llada-8b")
    print(f"A step of LLaDA-8B, {ROWS} rows of {cfg.length} tokens. F: the FLOPs of one forward "
          f"pass\nover the rows; a backward pass costs two. PFLOP: with the logits")
    print_table(step_table(config, cfg.length))

    rows = [["", "states", "predictor", "activations", "GB", "of", "plain", "jepa", "checkpoint"]]
    for setup in SETUPS:
        gb = memory(setup, config, cfg.length * setup.rows)
        states = sum(gb[key] for key in setup.bytes_of)
        kinds = [states, gb["predictor"], gb["in flight"] + gb["activations"], sum(gb.values())]
        times = [f"{seconds(setup, config, cfg.length, with_jepa):.2f} s"
                 for with_jepa in (False, True)]
        rows.append([setup.name, *(f"{value:.1f}" for value in kinds), f"{setup.gigabytes:.0f}",
                     *times, f"{disk(setup, config):.0f} GB"])
    print(f"\nPredicted: GB on a GPU, with 8 rows a pass (LoRA 16); a step at {MFU:.0%} of the "
          f"data\nsheet's FLOPs; a JEPA checkpoint on disk")
    print_table(rows)


# ----------------------------------------------------------------------------------------------
# shapes and FLOPs


def shape_of(preset: str, n_layer: int = 0, width: int = 0) -> ModelConfig:
    """Make a preset's ModelConfig with another depth or width; 0 keeps the preset's."""
    shape = {"vocab_size": 32000, "mask_id": 1, "eos_id": 0, **PRESETS[preset]}
    if n_layer:
        shape["n_layer"] = n_layer
    if width:
        shape |= {"n_embd": width, "n_hidden": width * 11 // 4}
    return ModelConfig(**shape)


def check_ranges(cfg, **ranges):
    """Raise ValueError for the first setting out of its range: a slip is answered at once, and not
    by a full memory. ranges: name=(least, most)."""
    for name, (least, most) in ranges.items():
        value = getattr(cfg, name)
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
        if value > most:
            raise ValueError(f"{name}={value} is too large; at most {most} would fit")


def name_of(device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def sheet_of(device) -> float | None:
    """Return the FLOPs per second that a known GPU's data sheet states; None for others."""
    return next((flops for gpu, flops in PEAKS.items() if gpu in name_of(device)), None)


def parameters(config: ModelConfig) -> dict:
    """Count parameters: {embed, layers, norm, head}."""
    C, D = config.n_embd, head_dim(config)
    bias = config.qkv_bias * (config.n_head + 2 * config.n_kv_head) * D
    norms = 2 * C + 2 * D * config.qk_norm
    return {"embed": config.vocab_size * C,
            "layers": config.n_layer * (layer_matrices(config) + bias + norms), "norm": C,
            "head": 0 if config.tied_head else config.vocab_size * C}


def head_dim(config: ModelConfig) -> int:
    return config.head_dim or config.n_embd // config.n_head


def layer_matrices(config: ModelConfig) -> int:
    """Count the entries of one layer's matrices: q, k, v, o and three of the MLP."""
    heads = 2 * head_dim(config) * (config.n_head + config.n_kv_head)
    return config.n_embd * (heads + 3 * config.n_hidden)


def predictor_parameters(config: ModelConfig, n_layer: int) -> int:
    """Count v, o, up and down with biases and two norms per block, and the last norm."""
    C = config.n_embd
    return n_layer * (10 * C * C + 7 * C + 4 * C) + 2 * C * (n_layer > 0)


def trunk_flops(config: ModelConfig, lengths) -> int:
    """FLOPs of one forward of all layers over rows of these lengths.

    2 per matrix entry and token, and 4 T^2 H D for the two products of attention.
    """
    linear = 2 * layer_matrices(config)
    square = 4 * config.n_head * head_dim(config)
    return config.n_layer * sum(linear * T + square * T * T for T in lengths)


def step_table(config: ModelConfig, length: int) -> list[list[str]]:
    """Lay out the passes and FLOPs of each kind of step, as the paper's table 1 does."""
    def flops(n_grad, n_other, share):      # logits are computed in one pass with gradient
        head = head_flops(config, round(share * ROWS * length))
        return (3 * n_grad + n_other) * trunk_flops(config, [length] * ROWS) + 3 * head

    plain = flops(*STEPS["plain diffusion"])
    rows = [["", "with gradient", "without", "backward", "sum", "PFLOP", "/ plain"]]
    for kind, (n_grad, n_other, share) in STEPS.items():
        total = flops(n_grad, n_other, share)
        passes = [f"{n}F" for n in (n_grad, n_other, 2 * n_grad, 3 * n_grad + n_other)]
        rows.append([kind, *passes, f"{total / 1e15:.2f}", f"{total / plain:.3f}"])
    return rows


def head_flops(config: ModelConfig, n: int) -> int:
    """FLOPs of the logits of n tokens."""
    return 2 * config.vocab_size * config.n_embd * n


def seconds(setup, config: ModelConfig, length: float, with_jepa: bool) -> float:
    """Seconds of a step of ROWS rows of this many tokens on a Setup's GPUs."""
    # a frozen base needs no gradients of weights: its backward costs one forward
    passes = (2 if setup.lora_rank else 3) + setup.is_checkpointed + with_jepa
    head = 3 * head_flops(config, round(MASKED * ROWS * length))
    flops = passes * ROWS * trunk_flops(config, [length]) + head
    return flops / (setup.n_gpu * PEAKS[setup.gpu] * MFU)


# ----------------------------------------------------------------------------------------------
# memory


@dataclass
class Setup:
    """GPUs, and how a training run uses their memory."""
    name: str
    gpu: str                        # a key of PEAKS
    n_gpu: int
    gigabytes: float                # that each GPU has
    bytes_of: dict                  # per trained parameter: weights, grads, moments, ema
    n_pred_layer: int = 2
    rows: int = 8                   # of a pass on one GPU: micro_batch_size
    is_checkpointed: bool = False   # all activations are recomputed
    lora_rank: int = 0              # of adapters on every matrix of a layer; 0: none
    is_packed: bool = False         # rows end to end


FP32 = {"weights": 4, "grads": 4, "moments": 8, "ema": 4}
LEAN = {"weights": 4, "grads": 2, "moments": 4, "ema": 4}  # training/lean.py
SETUPS = [
    Setup("8 x A100-80, sharded", "A100", 8, 80, FP32),
    Setup("4 x A100-80, sharded", "A100", 4, 80, FP32),
    Setup("1 x H200, lean", "H200", 1, 141, LEAN),
    Setup("1 x 24 GB, LoRA r32", "4090", 1, 24, FP32, 1, 16, is_checkpointed=True, lora_rank=32),
]


def memory(setup: Setup, config: ModelConfig, tokens: int) -> dict:
    """Predict GB per GPU: {weights, grads, moments, ema, predictor, in flight, activations}.

    tokens: of one pass on one GPU. The EMA has no head. The loss holds its logits three times in
    fp32. `in flight` is what a sharded run holds whole at its peak, where the backward pass begins:
    in bf16 two layers, embedding, head and the gradient of the head, in fp32 the predictor, and a
    layer's gradient in both. If it has one pass a step, it holds no other gradients then.
    """
    n, C = parameters(config), config.n_embd
    trained = sum(n.values())
    with_ema = trained - n["head"]
    if setup.lora_rank:
        widths = 7 * C + layer_matrices(config) // C  # in and out of the seven matrices
        trained = with_ema = config.n_layer * setup.lora_rank * widths
    gb = {key: size * (with_ema if key == "ema" else trained) / setup.n_gpu
          for key, size in setup.bytes_of.items()}
    if setup.lora_rank:
        gb["weights"] += 2 * sum(n.values())  # the frozen base, in bf16
    predictor = predictor_parameters(config, setup.n_pred_layer)
    gb["predictor"] = 16 * predictor / setup.n_gpu
    whole = 10 * n["layers"] / config.n_layer + 2 * n["embed"] + 4 * n["head"] + 4 * predictor
    gb["in flight"] = whole if setup.n_gpu > 1 else 0
    if setup.n_gpu > 1 and setup.n_gpu * setup.rows >= ROWS:
        gb["grads"] = 0
    layer = activation_bytes(config, is_packed=setup.is_packed)
    kept = 2 * C * config.n_layer + layer if setup.is_checkpointed else config.n_layer * layer
    logits = 3 * 4 * config.vocab_size * min(round(MASKED * tokens), NLL_CHUNK)
    gb["activations"] = tokens * kept + logits
    return {key: value / 1e9 for key, value in gb.items()}


def disk(setup: Setup, config: ModelConfig, with_jepa: bool = True) -> float:
    """GB of a checkpoint: what memory holds between two steps but gradients, of all GPUs."""
    gb = memory(replace(setup, n_gpu=1), config, 0)
    jepa = gb.get("ema", 0) + 12 / 16 * gb["predictor"]        # without the predictor's gradients
    return gb["weights"] + gb["moments"] + with_jepa * jepa


def activation_bytes(config: ModelConfig, size: int = 2, is_packed: bool = False) -> int:
    """Bytes that autograd keeps per layer and token, with `size` bytes per activation.

    Each of two norms keeps its input in fp32, 1 / rms, the normed and the weighted; attention q, k,
    v, its output and log-sum-exp; the MLP gate, silu(gate), up and their product. Packed rows have
    k and v repeated for all heads of q.
    """
    C = config.n_embd
    norms = 2 * (4 * C + 4 + 2 * size * C)
    n_kv_head = config.n_head if is_packed else config.n_kv_head
    attention = size * head_dim(config) * 2 * (config.n_head + n_kv_head)
    return norms + attention + 4 * config.n_head + 4 * size * config.n_hidden


# ----------------------------------------------------------------------------------------------
# a config of train.py


class Tokens(NamedTuple):
    """The tokens that a run computes on: with the fill of end-of-text; packed, without padding."""
    n_rows: int                     # rows of train that fit max_length
    of_row: int                     # mean tokens of a row
    most: int                       # tokens of the largest pass


# settings that are predicted as they are by default
AS_USUAL = ("gather_once", "shard_over", "pred_width", "chat", "variant", "dtype",
            "lora_targets")
BASES = {"GSAI-ML/LLaDA-8B-Base": "llada-8b", "Dream-org/Dream-v0-Base-7B": "dream-7b"}
# a word, a digit or a sign is a token, where no tokenizer is at hand
COUNT = re.compile(r"[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]|\n").findall
# by task, max_length, rows of a pass, pack; each as `--config=... --data_dir=...` has counted it
TOKENS = {
    ("gsm8k", 256, 8, False): Tokens(6947, 249, 2048),
    ("gsm8k", 256, 16, False): Tokens(6947, 253, 4096),
    ("nl_rx", 128, 8, False): Tokens(7744, 61, 608),
    ("django", 512, 8, True): Tokens(15995, 88, 3329),
    ("spider", 2048, 8, True): Tokens(6043, 364, 6500),
}


def describe(path: str, data_dir: str = "") -> str:
    """Return the sentence that a 7 or 8 B config has in its docstring: memory, time and disk.

    data_dir: the folder with the task's rows; empty: their tokens are those of TOKENS. Raises
    ValueError or OSError, one sentence, if the config or its rows do not fit.
    """
    cfg = TrainConfig(**read_file(path, TrainConfig))
    if cfg.init_from not in BASES or cfg.batch_size != ROWS:
        raise ValueError(f"{path} with init_from={cfg.init_from!r} and batch_size={cfg.batch_size} "
                         f"is not predicted; {' and '.join(BASES)} in batches of {ROWS} rows are")
    usual = TrainConfig()
    for name in AS_USUAL:
        if getattr(cfg, name) != getattr(usual, name):
            raise ValueError(f"{path} with {name}={getattr(cfg, name)!r} is not predicted; "
                             f"{name}={getattr(usual, name)!r} is")
    if not (cfg.shard or cfg.lora_rank or cfg.optimizer == "lean"):
        raise ValueError(f"{path} trains all weights on one GPU; that is predicted with shard=True "
                         f"or optimizer='lean'")
    setup, config = setup_of(cfg), shape_of(BASES[cfg.init_from])
    count_micro_batches(cfg, setup.n_gpu)
    key = cfg.task, cfg.max_length, setup.rows, cfg.pack
    if not data_dir and (key not in TOKENS or not cfg.eos_fill):
        raise ValueError(f"the tokens of {path} are not known; give the folder with the rows of "
                         f"task={cfg.task!r} as --data_dir")
    tokens = count_tokens(cfg, setup.rows, data_dir) if data_dir else TOKENS[key]
    n_steps = cfg.max_steps or max(1, round(cfg.epochs * tokens.n_rows / cfg.batch_size))
    step = seconds(setup, config, tokens.of_row, cfg.lambda_jepa > 0)
    most = min(round(MARGIN * tokens.most), setup.rows * cfg.max_length)
    gb = sum(memory(setup, config, most).values())
    return (f"Predicted for {setup.n_gpu} x {setup.gpu} {setup.gigabytes:.0f} GB: {gb:.0f} GB in "
            f"the largest pass, {n_steps} steps of {step:.2f} s ({n_steps * step / 60:.0f} min) at "
            f"{tokens.of_row} tokens a row, checkpoints of "
            f"{disk(setup, config, cfg.lambda_jepa > 0):.0f} GB.")


def setup_of(cfg: TrainConfig) -> Setup:
    """Return the GPUs that a config of 7 or 8 B is made for, as its settings use them."""
    eight, _, lean, lora = SETUPS
    setup = lora if cfg.lora_rank else lean if cfg.optimizer == "lean" else eight
    bytes_of = dict(setup.bytes_of)
    if not cfg.lambda_jepa:
        del bytes_of["ema"]
    if cfg.anchor:
        bytes_of["anchor"] = 4          # a copy of the base in fp32
    return replace(setup, bytes_of=bytes_of, lora_rank=cfg.lora_rank,
                   n_pred_layer=cfg.n_pred_layer if cfg.lambda_jepa else 0,
                   rows=cfg.micro_batch_size or cfg.batch_size // setup.n_gpu,
                   is_checkpointed=cfg.checkpoint_activations == "full", is_packed=cfg.pack)


def count_tokens(cfg: TrainConfig, size: int, data_dir: str) -> Tokens:
    """Count the tokens of all passes of a run over `size` rows each, batch by batch."""
    def ids(text):
        return [0] * len(COUNT(text))
    examples = load_examples(cfg.task, "train", data_dir, cfg.variant)
    rows = tokenize(examples, SimpleNamespace(prompt_ids=ids, answer_ids=ids), cfg.max_length,
                    f"{cfg.task} train")
    passes, n_parts = [], cfg.batch_size // size
    for step in range(cfg.max_steps or max(1, round(cfg.epochs * len(rows) / cfg.batch_size))):
        for part in range(n_parts):
            some, fill = batch_at(step, rows, cfg.batch_size, cfg.seed, part, n_parts)
            _, _, is_real = collate(some, fill if cfg.eos_fill else 0, cfg.max_length, 0)
            passes.append(int(is_real.sum()) if cfg.pack else is_real.numel())
    return Tokens(len(rows), round(sum(passes) / len(passes) / size), max(passes))


if __name__ == "__main__":
    run(main, PredictConfig)
