"""Score a checkpoint on a task: generate an answer to every question, compare, count.

    python evaluate.py --init_from=out/tiny/jepa --task=toy
    python evaluate.py --init_from=out/tiny/jepa --base=out/tiny/base --n_shot=2 --limit=200
    torchrun --nproc_per_node=8 evaluate.py --init_from=out/tiny/jepa
    python evaluate.py --compare=A.jsonl,B.jsonl            two models, question by question
    python evaluate.py --seeds=A.jsonl,B.jsonl,C.jsonl      mean and spread over runs

Every answer is written as it is made, one JSON line a question (id, prompt, completion, tokens,
prediction, gold, verdict), so a run that was killed goes on where it stopped, on any number of
processes: see answers.py. Beside it, the same name with .json holds the settings and the scores.
"""
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # see train.py; read when torch loads
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import run
from pretrained.weights import find_weights, weights_file
from sample import Tally, check_prompts, complete, load_model
from sampling.reveal import Sampling
from tasks import stats
from tasks.answers import check_settings, collect, glance, read_common, sidecar
from tasks.common import few_shot, load_task
from tasks.files import write_json
from training.checkpoint import load_ema


@dataclass
class EvalConfig(Sampling):
    gen_length: int = 16                # tokens to generate, end-of-text included
    block_length: int = 16              # a block is finished before the next begins
    steps: int = 16                     # passes in all; gen_length of them reveal one token each
    init_from: str = "out/tiny/jepa"    # checkpoint, out_dir or hub name (GSAI-ML/LLaDA-8B-Base)
    revision: str = ""                  # of a hub name: branch, tag or commit
    weights: Literal["online", "ema"] = "online"  # ema: the target encoder under the online head
    base: str = ""                      # another model, asked the same: its row, and the difference
    chat: bool = False                  # ask in turns of a chat (Instruct models)
    task: str = "toy"                   # a module of tasks/
    data_dir: str = ""                  # a folder with {split}.jsonl[.gz]; empty: the task's own
    variant: str = ""                   # of the task; gsm8k: marks keeps <<...>> in the shots
    split: str = "test"                 # never tune on test: validation is for that
    n_shot: int = 0                     # solved examples before each question: the first of train
    limit: int = 0                      # only so many questions, from the front; 0: all
    out: str = ""                       # the .jsonl to write; empty: in init_from, or in out/
    compare: tuple[str, ...] = ()       # two files of answers: nothing is asked, they are compared
    seeds: tuple[str, ...] = ()         # files of answers, one a seed: their mean and spread
    batch_tokens: int = 8192            # of a batch, with padding: what memory allows (ours)
    device: str = "auto"                # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one

    def __post_init__(self):
        super().__post_init__()
        if self.n_shot < 0 or self.limit < 0 or self.batch_tokens < 1:
            raise ValueError(f"n_shot={self.n_shot} and limit={self.limit} must not be negative, "
                             f"and batch_tokens={self.batch_tokens} must be at least 1")
        if len(self.compare) not in (0, 2):
            raise ValueError(f"compare names {len(self.compare)} files of answers; two would fit: "
                             f"--compare=A.jsonl,B.jsonl")


def main(cfg: EvalConfig):
    if cfg.compare:
        return compare(*cfg.compare)
    if cfg.seeds:
        return aggregate(cfg.seeds)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:                       # torchrun; the processes share files, and wait twice
        if torch.cuda.is_available():
            i = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
            torch.cuda.set_device(i)            # what "cuda" means here; processes may share one
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    arms = [cfg]
    if cfg.base:
        out = cfg.out and cfg.out.removesuffix(".jsonl") + "_base.jsonl"
        arms = [replace(cfg, init_from=cfg.base, revision="", weights="online", out=out), cfg]
    for arm in arms:                    # a mistake in the second is told before the first begins
        find_weights(arm.init_from, arm.revision)
    table, answers = zip(*(evaluate(arm, rank, world) for arm in arms))
    if rank == 0:
        report(cfg, table)
        if cfg.base:
            verdicts = [{line["id"]: line["verdict"] for line in lines} for lines in answers]
            print(stats.in_words(stats.paired_difference(*verdicts), "base", "model"))
    if world > 1:
        dist.destroy_process_group()


def evaluate(cfg: EvalConfig, rank: int = 0, world: int = 1) -> tuple[dict, list[dict]]:
    """Answers what cfg.out has no answer to yet -> scores, also beside it as .json, and lines.

    Of several processes each calls it, and answers its share.
    """
    model, tok = load_model(cfg.init_from, cfg.device, cfg.revision, cfg.chat)
    if cfg.weights == "ema":
        load_ema(find_weights(cfg.init_from, cfg.revision), model)
    task, examples, began = load_task(cfg.task), questions(cfg), time.perf_counter()
    lengths = {example.meta["id"]: len(tok.prompt_ids(example.prompt)) for example in examples}
    check_prompts(model.config, [range(n) for n in lengths.values()], cfg.gen_length)
    out = cfg.out or default_out(cfg)
    check_settings(out, identity(cfg), rank)
    done = collect(out, lengths, rank, world)

    left = [example for example in examples if example.meta["id"] not in done]
    n_done = len(examples) - len(left)
    n_right = sum(done[id]["verdict"] for id in lengths if id in done)
    tally = Tally()
    with tqdm(total=len(examples), initial=n_done, unit="question", disable=rank > 0,
              desc=f"{cfg.init_from} on {cfg.task}, {cfg.n_shot}-shot",
              mininterval=0.5 if sys.stderr.isatty() else 15) as bar:
        def show(n, n_right):
            bar.set_postfix(accuracy=f"{n_right / max(1, n):.3f}", refresh=False)
            bar.update(n - bar.n)
        with open(f"{out}.part{rank}", "a", buffering=1) as file:
            for batch in batches(left, lengths, cfg)[rank::world]:
                for line in answer(model, tok, task, batch, cfg, tally):
                    file.write(json.dumps(line) + "\n")
                if rank == 0:           # the others' answers count too
                    n_new, n_new_right = glance(out)
                    show(n_done + n_new, n_right + n_new_right)
        done = collect(out, lengths, rank, world)           # ends when the slowest has
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
    if tally.passes:                    # of this process, and of what was not on file already
        scores["sampler"] = tally.numbers()
    if rank == 0:
        write_json(sidecar(out), {"settings": identity(cfg), **scores})
    return scores, lines


def questions(cfg: EvalConfig) -> list:
    """The examples to ask, each with an id of its own: a repeated one becomes id#2, id#3, ..."""
    task = load_task(cfg.task)
    examples = task.load(cfg.split, cfg.data_dir, cfg.variant)[:cfg.limit or None]
    if cfg.n_shot:
        shots = task.load("train", cfg.data_dir, cfg.variant)[:cfg.n_shot]
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
    """The longest first, so that too large a batch fails at once and the time left is overrated;
    rows x (longest prompt + gen_length) stay within batch_tokens, if one row does."""
    examples = sorted(examples, key=lambda example: -lengths[example.meta["id"]])
    cut = []
    while examples:
        longest = lengths[examples[0].meta["id"]] + cfg.gen_length
        n = max(1, cfg.batch_tokens // longest)
        cut.append(examples[:n])
        examples = examples[n:]
    return cut


def answer(model, tok, task, batch: list, cfg: EvalConfig, tally):
    """Yields one line an example. `tokens` counts up to the end of text or turn; where the model
    came to none they are gen_length."""
    ids = None
    def look(x, *_):                    # (B, gen_length), after every pass
        nonlocal ids
        ids = x
    texts = complete(model, tok, [example.prompt for example in batch], cfg, look, tally)
    for example, text, row in zip(batch, texts, ids.tolist()):
        ends = [n for n, i in enumerate(row) if i in (tok.eos_id, tok.eot_id)]
        yield {"id": example.meta["id"], "prompt": example.prompt, "completion": text,
               "tokens": min(ends, default=cfg.gen_length), "prediction": task.extract(text),
               "gold": example.meta["gold"], "verdict": task.score(text, example)}


# ----------------------------------------------------------------------------------------------
# scores


def score(task, lines: list[dict], gen_length: int) -> dict:
    """Shares of all answers. strict: right, and in the format that the task asks for."""
    n, right = len(lines), sum(line["verdict"] for line in lines)
    scores = {"accuracy": right / n, "stderr": math.sqrt(right / n * (1 - right / n) / n),
              "interval": list(stats.wilson(right, n)), "n": n,
              "no_answer": sum(line["prediction"] is None for line in lines) / n,
              "tokens": sum(line["tokens"] for line in lines) / n,
              "cut": sum(line["tokens"] == gen_length for line in lines) / n}
    if hasattr(task, "has_format"):
        formatted = [line["verdict"] for line in lines if task.has_format(line["completion"])]
        scores |= {"strict": sum(formatted) / n, "format": len(formatted) / n}
    return scores


def report(cfg: EvalConfig, table):
    """Prints a row for each model, in at most 100 columns, and where the answers are."""
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
        speed = "   {tokens_per_pass} tokens a pass, {tokens_per_second} tokens/s".format(
            **scores["sampler"]) if "sampler" in scores else ""
        print(f"{name}: {scores['out']}{speed}")


# ----------------------------------------------------------------------------------------------
# answers that are on file


def compare(first: str, second: str):
    """Prints how two files of answers differ on the questions that are in both."""
    verdicts, n_others = read_common([first, second])
    for name, path, right in zip("AB", (first, second), verdicts):
        print(f"{name}  {100 * sum(right.values()) / len(right):5.1f} %  {path}")
    print(stats.in_words(stats.paired_difference(*verdicts), "A", "B"))
    if n_others:
        print(f"    {n_others} questions are in one file only and left out")


def aggregate(paths):
    """Prints mean and spread of files of answers to the same questions, one file a seed."""
    verdicts, n_others = read_common(paths)
    accuracies = [100 * sum(right.values()) / len(right) for right in verdicts]
    runs = stats.over_seeds(accuracies)
    for path, accuracy in zip(paths, accuracies):
        print(f"{accuracy:5.1f} %  {path}")
    print(f"mean {runs['mean']:.1f} % of n = {runs['n']} runs of {len(verdicts[0])} questions, "
          f"from {runs['min']:.1f} to {runs['max']:.1f}\n"
          f"    standard deviation {runs['sd_ddof1']:.2f} (ddof = 1) or {runs['sd_ddof0']:.2f} "
          f"(ddof = 0), standard error of the mean {runs['stderr']:.2f}")
    if n_others:
        print(f"    {n_others} questions are not in all files and left out")


def default_out(cfg: EvalConfig) -> str:
    folder = cfg.init_from if os.path.isdir(cfg.init_from) else os.path.join("out", cfg.init_from)
    ema = "_ema" * (cfg.weights == "ema")
    return os.path.join(folder, f"eval_{cfg.task}_{cfg.n_shot}shot{ema}.jsonl")


def identity(cfg: EvalConfig) -> dict:
    """What an answer depends on: the settings that shape it, and the weights themselves."""
    weights = weights_file(find_weights(cfg.init_from, cfg.revision))
    settings = {key: value for key, value in asdict(cfg).items() if key not in (
        "base", "limit", "out", "compare", "seeds", "batch_tokens")}
    return {**settings, "file": f"{weights} of {os.stat(weights).st_mtime_ns}"}


if __name__ == "__main__":
    run(main, EvalConfig)
