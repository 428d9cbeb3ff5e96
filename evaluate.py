"""Score a checkpoint on a task: generate an answer to every question, compare, count.

    python evaluate.py --init_from=out/tiny/jepa --task=toy
    python evaluate.py --init_from=out/tiny/base --task=toy --n_shot=2 --limit=200

Every answer is written as it is made, one JSON line a question (id, prompt, completion, prediction,
gold, verdict), so an interrupted run goes on where it stopped. Beside it, the same name with .json
holds the settings and the scores. An accuracy p of n questions has the standard error
sqrt(p (1 - p) / n): it says how far another draw of questions would move it, and nothing about
another seed of training.
"""
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # see train.py; read when torch loads
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from tqdm import tqdm

from configurator import run
from reveal import Sampling
from sample import check_prompts, complete, load_model
from tasks.common import few_shot, load_task
from weights import find_weights, weights_file


@dataclass
class EvalConfig(Sampling):
    gen_length: int = 16                # tokens to generate, end-of-text included
    block_length: int = 16              # a block is finished before the next begins
    steps: int = 16                     # forward passes per question
    init_from: str = "out/tiny/jepa"    # checkpoint, out_dir or hub name (GSAI-ML/LLaDA-8B-Base)
    revision: str = ""                  # of a hub name: branch, tag or commit
    chat: bool = False                  # ask in turns of a chat (Instruct models)
    task: str = "toy"                   # a module of tasks/
    data_dir: str = ""                  # a folder with {split}.jsonl[.gz]; empty: the task's own
    variant: str = ""                   # of the task; gsm8k: marks keeps <<...>> in the shots
    split: str = "test"                 # never tune on test: validation is for that
    n_shot: int = 0                     # solved examples before each question: the first of train
    limit: int = 0                      # only so many questions, from the front; 0: all
    out: str = ""                       # the .jsonl to write; empty: in init_from, or in out/
    batch_size: int = 32                # questions answered at a time
    device: str = "auto"                # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one

    def __post_init__(self):
        super().__post_init__()
        if self.n_shot < 0 or self.limit < 0 or self.batch_size < 1:
            raise ValueError(f"n_shot={self.n_shot} and limit={self.limit} must not be negative, "
                             f"and batch_size={self.batch_size} must be at least 1")


def main(cfg: EvalConfig):
    report(evaluate(cfg))


def evaluate(cfg: EvalConfig) -> dict:
    """Answers what is not answered yet in cfg.out -> scores, also written beside it as .json."""
    model, tok = load_model(cfg.init_from, cfg.device, cfg.revision, cfg.chat)
    task = load_task(cfg.task)
    examples = task.load(cfg.split, cfg.data_dir, cfg.variant)
    examples = examples[:cfg.limit or None]
    if cfg.n_shot:
        examples = few_shot(examples, task.load("train", cfg.data_dir, cfg.variant)[:cfg.n_shot])
    check_prompts(model.config, [tok.prompt_ids(example.prompt) for example in examples],
                  cfg.gen_length)

    folder = cfg.init_from if os.path.isdir(cfg.init_from) else os.path.join("out", cfg.init_from)
    out = cfg.out or os.path.join(folder, f"eval_{cfg.task}_{cfg.n_shot}shot.jsonl")
    done = answers_so_far(out, cfg)
    left = [example for example in examples if example.meta["id"] not in done]
    left.sort(key=lambda example: len(example.prompt))      # little padding between neighbours
    began = time.perf_counter()
    with open(out, "a", buffering=1) as file, \
            tqdm(total=len(examples), initial=len(examples) - len(left), unit="question",
                 desc=f"{cfg.init_from} on {cfg.task}, {cfg.n_shot}-shot",
                 mininterval=0.5 if sys.stderr.isatty() else 15) as bar:
        for i in range(0, len(left), cfg.batch_size):
            batch = left[i:i + cfg.batch_size]
            for example, text in zip(batch, complete(model, tok, [e.prompt for e in batch], cfg)):
                line = {"id": example.meta["id"], "prompt": example.prompt, "completion": text,
                        "prediction": task.extract(text), "gold": example.meta["gold"],
                        "verdict": task.score(text, example)}
                file.write(json.dumps(line) + "\n")
                done[line["id"]] = line
            bar.update(len(batch))
            right = sum(line["verdict"] for line in done.values())
            bar.set_postfix(accuracy=f"{right / len(done):.3f}")

    lines = [done[example.meta["id"]] for example in examples]
    n, accuracy = len(lines), sum(line["verdict"] for line in lines) / len(lines)
    scores = {"accuracy": accuracy, "stderr": math.sqrt(accuracy * (1 - accuracy) / n), "n": n,
              "no_answer": sum(line["prediction"] is None for line in lines) / n,
              "seconds": round(time.perf_counter() - began, 1), "out": out}
    if hasattr(task, "has_format"):
        scores["format"] = sum(task.has_format(line["completion"]) for line in lines) / n
    write_json(sidecar(out), {"settings": identity(cfg), **scores})
    return scores


def report(scores: dict):
    in_format = f"in format {100 * scores['format']:.1f} %   " if "format" in scores else ""
    print(f"accuracy {100 * scores['accuracy']:.1f} +- {100 * scores['stderr']:.1f} %  "
          f"(n = {scores['n']})   {in_format}no answer {100 * scores['no_answer']:.1f} %   "
          f"{scores['seconds']:.0f} s   {scores['out']}")


# ----------------------------------------------------------------------------------------------
# going on with an interrupted run


def answers_so_far(out: str, cfg: EvalConfig) -> dict:
    """{id: line} of a run that was interrupted; a half-written last line is dropped.

    Raises ValueError if the file was made with other settings or by another checkpoint.
    """
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    if not os.path.exists(out):
        write_json(sidecar(out), {"settings": identity(cfg)})
        return {}
    try:
        with open(sidecar(out)) as file:
            before = dict(json.load(file)["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out} exists, but {sidecar(out)} does not say how it was made; choose "
                         f"another --out") from None
    now = identity(cfg)
    if before != now:
        key = next(key for key in {**now, **before} if before.get(key) != now.get(key))
        raise ValueError(f"{out} was made with {key}={before.get(key)!r}, not {now.get(key)!r}; "
                         f"choose another --out, or remove it to start again")
    with open(out, "rb+") as file:
        written = file.read()
        file.truncate(written.rfind(b"\n") + 1)             # whole lines stay as they are
    try:
        lines = [json.loads(line) for line in written.split(b"\n")[:-1]]
        return {line["id"]: line for line in lines}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{out} has a line that is no answer of ours; choose another "
                         f"--out") from None


def identity(cfg: EvalConfig) -> dict:
    """What an answer depends on: the settings that shape it, and the weights themselves."""
    weights = weights_file(find_weights(cfg.init_from, cfg.revision))
    settings = {key: value for key, value in asdict(cfg).items()
                if key not in ("limit", "out", "batch_size")}
    return {**settings, "weights": f"{weights} of {os.stat(weights).st_mtime_ns}"}


def sidecar(out: str) -> str:
    return out.removesuffix("l") if out.endswith(".jsonl") else out + ".json"


def write_json(path: str, what: dict):
    with open(path + ".new", "w") as file:
        json.dump(what, file, indent=1)
    os.replace(path + ".new", path)


if __name__ == "__main__":
    run(main, EvalConfig)
