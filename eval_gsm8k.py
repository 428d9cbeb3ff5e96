"""The evaluation: ask every question of a task, score the answers, count. GSM8K by default.

    python eval_gsm8k.py --init_from=out/llada8b_gsm8k
    python eval_gsm8k.py --init_from=out/tiny --task=toy
    python eval_gsm8k.py --init_from=out/tiny_tune --base=out/tiny_base --task=toy --limit=200
    torchrun --nproc_per_node=8 eval_gsm8k.py --init_from=out/llada8b_gsm8k
    python eval_gsm8k.py --compare=A.jsonl,B.jsonl          two models, question by question
    python eval_gsm8k.py --seeds=A.jsonl,B.jsonl,C.jsonl    mean and spread over runs

Shots, lengths and steps are the task's own PROTOCOL (tasks/gsm8k.py: 4 shots, 256 tokens in one
block, 128 passes), unless they are given. Every answer is written as it is made, one JSON line per
question (id, prompt, completion, tokens, prediction, gold, verdict), so a killed run goes on where
it stopped, on any number of processes (tasks/answers.py). The file of the same name with .json has
the settings and the scores.
"""
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Literal

from configurator import run            # before torch: it sets how OpenMP's threads wait

from tqdm import tqdm

from pretrained.device import pick_device
from pretrained.fingerprint import fingerprint
from pretrained.weights import find_weights, weights_file
from sample import complete, load_model
from sampling.cost import Cost
from sampling.prompts import check_prompts
from sampling.graph import check_graphs
from sampling.reveal import Sampling
from tasks import answers, stats
from tasks.common import check_extra, check_verdict, few_shot, load_examples, load_task
from tasks.files import naming, write_json
from training.checkpoint import load_ema
from training.ranks import as_rank, start_ranks, wait_for_all

UNSET = {"n_shot": -1, "gen_length": 0, "block_length": 0, "steps": 0}     # stands for the task's
# settings that no answer depends on
RUN_ONLY = "base", "limit", "out", "compare", "seeds", "batch_tokens", "graphs"
LATER = {"dtype": "auto", "window": 0}          # answers from before these settings count


@dataclass
class EvalConfig(Sampling):
    init_from: str = ""                 # checkpoint, out_dir or hub name (GSAI-ML/LLaDA-8B-Base)
    revision: str = ""                  # branch, tag or commit of a hub name
    weights: Literal["online", "ema"] = "online"  # ema: the target encoder under the online head
    base: str = ""                      # a second model to ask the same: its row, the difference
    chat: bool = False                  # ask in turns of a chat (Instruct models)
    task: str = "gsm8k"                 # a module of tasks/: gsm8k, toy, nl_rx, django, jsonl
    data_dir: str = ""                  # a folder with {split}.jsonl[.gz]; empty: the task's own
    variant: str = ""                   # of the task; gsm8k: marks keeps <<...>> in the shots
    split: str = "test"                 # use validation, not test, to choose settings
    n_shot: int = -1                    # solved train rows before each question; -1: the task's own
    gen_length: int = 0                 # tokens to generate; 0: the task's own (gsm8k: 256)
    block_length: int = 0               # tokens per block; 0: the task's own (gsm8k: 256)
    steps: int = 0                      # forward passes in all; 0: the task's own (gsm8k: 128)
    limit: int = 0                      # ask only this many questions, the first; 0: all
    out: str = ""                       # the .jsonl to write; empty: in init_from, or in out/
    compare: tuple[str, ...] = ()       # compare two files of answers, ask nothing
    seeds: tuple[str, ...] = ()         # average files of answers, one per seed, ask nothing
    batch_tokens: int = 8192            # most tokens of a batch, padding included: set by memory
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights, too; auto: bf16 on GPUs
    device: str = "auto"                # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one

    def __post_init__(self):
        protocol = getattr(load_task(self.task), "PROTOCOL", {})
        for name, unset in UNSET.items():
            if getattr(self, name) == unset:
                if name not in protocol:
                    raise ValueError(f"tasks/{self.task}.py has no PROTOCOL with {name}; give "
                                     f"--{name}")
                setattr(self, name, protocol[name])
        super().__post_init__()
        if self.n_shot < 0 or self.limit < 0 or self.batch_tokens < 1:
            raise ValueError(f"n_shot={self.n_shot} and limit={self.limit} must not be negative, "
                             f"and batch_tokens={self.batch_tokens} must be at least 1")
        if len(self.compare) not in (0, 2):
            raise ValueError(f"compare names {len(self.compare)} files of answers, not two; write "
                             f"--compare=A.jsonl,B.jsonl")


def main(cfg: EvalConfig):
    if cfg.compare:
        return answers.print_comparison(*cfg.compare)
    if cfg.seeds:
        return answers.print_seeds(cfg.seeds)
    if not cfg.init_from:
        raise ValueError("init_from is empty; name a model to score, e.g. --init_from=out/tiny "
                         "--task=toy after train.py")
    arms = [cfg]
    if cfg.base:
        out = cfg.out and cfg.out.removesuffix(".jsonl") + "_base.jsonl"
        arms = [replace(cfg, init_from=cfg.base, revision="", weights="online", out=out), cfg]
    for arm in arms:                    # a wrong path of the second is an error before the first
        find_weights(arm.init_from, arm.revision)

    rank, world, _ = start_ranks(cfg.device, backend="gloo", timeout=timedelta(days=7))
    table, lines = zip(*[evaluate(arm, rank, world) for arm in arms])
    if rank == 0:
        report(cfg, table)
        if cfg.base:
            first, second = ({line["id"]: line["verdict"] for line in of} for of in lines)
            print(stats.in_words(stats.paired_difference(first, second), "base", "model"))


# ----------------------------------------------------------------------------------------------
# ask


def evaluate(cfg: EvalConfig, rank: int = 0, world: int = 1) -> tuple[dict, list[dict]]:
    """Answer the questions that have no answer on file -> scores, lines; also written to files.

    With several processes each calls it and answers its share. Raises ValueError, one sentence, if
    the questions do not fit the model or the file has answers made with other settings.
    """
    if cfg.graphs:
        check_graphs(pick_device(cfg.device))
    task, examples = load_task(cfg.task), questions(cfg)
    out, settings = cfg.out or default_out(cfg), identity(cfg)
    answers.check_settings(out, settings)       # a mistake so far is told before the model is read
    model, tok = load_model(cfg.init_from, cfg.device, cfg.revision, cfg.chat, cfg.dtype)
    if cfg.weights == "ema":
        load_ema(find_weights(cfg.init_from, cfg.revision), model)
    began = time.perf_counter()
    lengths = {example.meta["id"]: len(tok.prompt_ids(example.prompt)) for example in examples}
    check_prompts(model.config, [range(n) for n in lengths.values()], cfg.gen_length)
    wait = wait_for_all if world > 1 else lambda: None
    if rank == 0:
        answers.write_settings(out, settings)
    done = answers.collect(out, lengths, rank, wait)
    answers.check_rows(out, done, examples)

    left = [example for example in examples if example.meta["id"] not in done]
    n_done = len(examples) - len(left)
    n_right = sum(done[id]["verdict"] for id in lengths if id in done)
    cost = Cost()
    bar = tqdm(total=len(examples), initial=n_done, unit="question", disable=rank > 0,
               desc=f"{cfg.init_from} on {cfg.task}, {cfg.n_shot}-shot",
               mininterval=0.5 if sys.stderr.isatty() else 15)

    def show(n, n_right):
        bar.set_postfix(accuracy=f"{n_right / max(1, n):.3f}", refresh=False)
        bar.update(n - bar.n)
    with bar:
        with naming(f"{out}.part{rank}"), answers.open_part(out, rank) as file:
            for batch in batches(left, lengths, cfg)[rank::world]:
                for line in answer(model, tok, task, batch, cfg, cost):
                    file.write(json.dumps(line) + "\n")
                if rank == 0:           # also counts what the other processes have answered
                    n_new, n_new_right = answers.count_so_far(out)
                    show(n_done + n_new, n_right + n_new_right)
        done = answers.collect(out, lengths, rank, wait)    # returns when the slowest has ended
        lines = [done[id] for id in lengths if id in done]
        show(len(lines), sum(line["verdict"] for line in lines))

    if len(lines) < len(examples):
        raise ValueError(f"{len(examples) - len(lines)} answers are not in {out}, which another "
                         f"run may have used at the same time; run it again for these")
    for line in lines:
        if not {"completion", "tokens", "prediction"} <= line.keys():
            raise ValueError(f"{out} has a line for {line['id']} without its completion, tokens or "
                             f"prediction; choose another --out")
    scores = score(task, lines, cfg.gen_length)
    scores |= {"seconds": round(time.perf_counter() - began, 1), "out": out}
    if hasattr(task, "extra_scores"):
        scores["extra"] = task.extra_scores(examples, [line["completion"] for line in lines])
        check_extra(cfg.task, scores["extra"])
    if cost.passes:                     # of this process, without the answers found on file
        scores["sampler"] = cost.numbers()
    if rank == 0:
        write_json(answers.sidecar(out), {"settings": settings, **scores})
    return scores, lines


def questions(cfg: EvalConfig) -> list:
    """Load the examples to ask; a repeated id becomes id#2, id#3, ..."""
    rows = cfg.data_dir, cfg.variant
    examples = load_examples(cfg.task, cfg.split, *rows)[:cfg.limit or None]
    if cfg.n_shot:
        shots = load_examples(cfg.task, "train", *rows)[:cfg.n_shot]
        if len(shots) < cfg.n_shot:
            raise ValueError(f"n_shot={cfg.n_shot}, but train has {len(shots)} rows")
        examples = few_shot(examples, shots)
    unique = {}
    for example in examples:
        id, n = example.meta["id"], 1
        while id in unique:
            n += 1
            id = f"{example.meta['id']}#{n}"
        unique[id] = example._replace(meta={**example.meta, "id": id})
    return list(unique.values())


def batches(examples: list, lengths: dict, cfg: EvalConfig) -> list[list]:
    """Cut examples into batches of rows x (longest prompt + gen_length) <= batch_tokens, or one
    row. The longest come first: out of memory shows at once, and the ETA errs on the safe side."""
    examples = sorted(examples, key=lambda example: -lengths[example.meta["id"]])
    cut = []
    while examples:
        longest = lengths[examples[0].meta["id"]] + cfg.gen_length
        n = max(1, cfg.batch_tokens // longest)
        cut.append(examples[:n])
        examples = examples[n:]
    return cut


def answer(model, tok, task, batch: list, cfg: EvalConfig, cost: Cost):
    """Answer a batch -> one line per example. `tokens` counts up to the end of text or turn, and is
    gen_length if there is none. Raises ValueError if a verdict is not True or False."""
    ids = None

    def keep_ids(x, *_):                # (B, gen_length), after every pass
        nonlocal ids
        ids = x
    texts = complete(model, tok, [example.prompt for example in batch], cfg, keep_ids, cost)
    for example, text, row in zip(batch, texts, ids.tolist()):
        ends = [n for n, i in enumerate(row) if i in (tok.eos_id, tok.eot_id)]
        verdict = task.score(text, example)
        check_verdict(cfg.task, verdict)
        yield {"id": example.meta["id"], "prompt": example.prompt, "completion": text,
               "tokens": min(ends, default=cfg.gen_length), "prediction": task.extract(text),
               "gold": example.meta["gold"], "verdict": verdict}


def default_out(cfg: EvalConfig) -> str:
    folder = cfg.init_from if os.path.isdir(cfg.init_from) else os.path.join("out", cfg.init_from)
    ema = "_ema" * (cfg.weights == "ema")
    return os.path.join(folder, f"eval_{cfg.task}_{cfg.n_shot}shot{ema}.jsonl")


def identity(cfg: EvalConfig) -> dict:
    """Return what the answers depend on: settings, and a hash of the weights."""
    folder = find_weights(cfg.init_from, cfg.revision)
    settings = {key: value for key, value in asdict(cfg).items() if key not in RUN_ONLY
                and (key not in LATER or value != LATER[key])}
    return {**settings, "file": weights_file(folder), "weights_hash": fingerprint(folder)}


# ----------------------------------------------------------------------------------------------
# score and count


def score(task, lines: list[dict], gen_length: int) -> dict:
    """Count the lines -> shares of all answers. strict: right, and in the task's format."""
    n, right = len(lines), sum(line["verdict"] for line in lines)
    accuracy = right / n
    scores = {"accuracy": accuracy, "stderr": math.sqrt(accuracy * (1 - accuracy) / n),
              "interval": list(stats.wilson(right, n)), "n": n,
              "no_answer": sum(line["prediction"] is None for line in lines) / n,
              "tokens": sum(line["tokens"] for line in lines) / n,
              "cut": sum(line["tokens"] == gen_length for line in lines) / n}
    if hasattr(task, "has_format"):
        formatted = [line["verdict"] for line in lines if task.has_format(line["completion"])]
        scores |= {"strict": sum(formatted) / n, "format": len(formatted) / n}
    return scores


def report(cfg: EvalConfig, table):
    """Print one row per model, in at most 100 columns, and where the answers are."""
    names = ["base", "model"][-len(table):]
    print(f"\n{cfg.task} {cfg.split}, {cfg.n_shot}-shot, n = {table[0]['n']} questions; in %, +- "
          f"one standard error, interval of 95 % by Wilson\n\n"
          f"{'':6}{'right':>12}{'interval':>14}{'strict':>9}{'in format':>11}{'no answer':>11}"
          f"{'cut':>8}{'tokens':>9}{'seconds':>9}")
    for name, scores in zip(names, table):
        shares = [f"{100 * scores[key]:.1f}" if key in scores else "-"
                  for key in ("strict", "format", "no_answer", "cut")]
        low, high = (100 * end for end in scores["interval"])
        print(f"{name:6}{100 * scores['accuracy']:5.1f} +-{100 * scores['stderr']:4.1f}"
              f"{low:7.1f} ..{high:5.1f}{shares[0]:>9}{shares[1]:>11}{shares[2]:>11}{shares[3]:>8}"
              f"{scores['tokens']:9.1f}{scores['seconds']:9,.0f}")
    print()
    for name, scores in zip(names, table):
        for key, value in scores.get("extra", {}).items():
            print(f"{name}: {key.replace('_', ' ')} {value:g}")
        speed = ""
        if "sampler" in scores:
            speed = ("   {tokens_per_pass} tokens per pass, {tokens_per_second} tokens/s"
                     .format(**scores["sampler"]))
        print(f"{name}: {scores['out']}{speed}")


if __name__ == "__main__":
    run(as_rank(main), EvalConfig)
