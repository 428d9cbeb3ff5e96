"""Score a model with lm-evaluation-harness (`pip install lm-eval`, which nothing else here needs).

    python analysis/harness.py --init_from=out/tiny --tasks=mine --include_path=folder/of/yaml
    python analysis/harness.py --init_from=GSAI-ML/LLaDA-8B-Base --tasks=gsm8k --n_shot=4

The harness (github.com/EleutherAI/lm-evaluation-harness) makes the prompts and reads the answers.
It asks a model for three things:

    generate_until          sample.py's sampler; a text ends before the first of the task's strings
    loglikelihood           LLaDA's Monte Carlo bound of likelihood.py, exact for answers of a token
    loglikelihood_rolling   refused: perplexity is over next tokens, which this model does not have

Prompt and answer are tokenized apart, as in training. With --chat a prompt, its shots included, is
one user's turn. In docs/tasks.md the harness's verdicts on GSM8K stand beside ours.
"""
import json
import sys
from collections import Counter
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import printable, run  # first: it sets variables that torch reads

from tqdm import tqdm

from analysis.likelihood import log_likelihood
from eval_gsm8k import batches
from pretrained.weights import find_weights
from sample import complete, load_model
from sampling.prompts import check_prompts
from sampling.reveal import Sampling
from tasks.common import Example
from tasks.files import write_text

LENGTHS = "max_gen_toks", "max_new_tokens", "max_tokens"    # in a task, the most tokens to generate


@dataclass
class HarnessConfig(Sampling):
    init_from: str = ""                 # checkpoint, out_dir or hub name (GSAI-ML/LLaDA-8B-Base)
    revision: str = ""                  # branch, tag or commit of a hub name
    chat: bool = False                  # ask in turns of a chat (Instruct models)
    tasks: tuple[str, ...] = ()         # the harness's names: gsm8k, arc_easy, ...
    include_path: str = ""              # a folder with tasks of your own, as YAML
    n_shot: int = -1                    # solved examples before each question; -1: the task's own
    limit: int = 0                      # ask only this many questions of each task; 0: all
    gen_length: int = 0                 # tokens to generate; 0: the task's max_gen_toks, or 256
    block_length: int = 0               # tokens per block; 0: gen_length
    steps: int = 0                      # forward passes in all; 0: gen_length, one token per pass
    n_samples: int = 128                # masks per answer for its likelihood
    batch_tokens: int = 8192            # most tokens of a batch, padding included: set by memory
    out: str = ""                       # also write results and every answer to this path, as JSON
    device: str = "auto"                # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one

    def __post_init__(self):
        if not self.init_from or not self.tasks:
            raise ValueError("give a model as --init_from and the harness's tasks as --tasks, e.g. "
                             "--init_from=out/tiny --tasks=gsm8k")
        if self.n_shot < -1 or self.limit < 0 or min(self.n_samples, self.batch_tokens) < 1:
            raise ValueError(f"n_shot={self.n_shot} must be at least -1, limit={self.limit} at "
                             f"least 0, n_samples={self.n_samples} and "
                             f"batch_tokens={self.batch_tokens} at least 1")
        if self.gen_length:
            self.block_length = self.block_length or self.gen_length
            self.steps = self.steps or self.gen_length
            super().__post_init__()
        else:
            self.of_request({})         # raises for what does not fit

    def of_request(self, kwargs: dict, n_before: int = 0):
        """Return the settings of a request with these generation_kwargs, asked n_before times."""
        drawn = {}
        if kwargs.get("do_sample"):
            drawn = {key: number(key, kwargs[key]) for key in ("temperature", "top_p", "top_k")
                     if kwargs.get(key) is not None}
        if "top_k" in drawn:            # transformers' 0 and vLLM's -1 are off
            drawn["top_k"] = max(0, int(drawn["top_k"]))
        lengths = [int(number(key, kwargs[key])) for key in LENGTHS if kwargs.get(key) is not None]
        length = self.gen_length or [*lengths, 256][0]
        if length < 1:
            raise ValueError(f"a task asks for answers of {length} tokens; give --gen_length")
        return replace(self, gen_length=length, seed=self.seed + n_before, **drawn)


def number(key: str, value) -> float:
    """Return a number of a task's generation_kwargs, which YAML may have as a text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"a task's {key} must be a number, not {value!r:.60}") from None


def main(cfg: HarnessConfig):
    find_weights(cfg.init_from, cfg.revision)       # a wrong path is told at once
    try:
        from lm_eval import evaluator, utils
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"analysis/harness.py needs lm-evaluation-harness, which `pip install "
                         f"lm-eval` brings: {error}") from None
    manager = TaskManager(include_path=cfg.include_path or None)
    for name in cfg.tasks:
        if name not in manager.all_tasks:
            raise ValueError(f"the harness has no task {name!r}; `lm-eval ls tasks` lists its own, "
                             f"and --include_path names a folder with yours")
    model, tok = load_model(cfg.init_from, cfg.device, cfg.revision, cfg.chat)
    if cfg.out:
        write_text(cfg.out, "")                     # so is one that cannot be written
    results = evaluator.simple_evaluate(
        harness_model(LM, model, tok, cfg), tasks=list(cfg.tasks), limit=cfg.limit or None,
        num_fewshot=None if cfg.n_shot < 0 else cfg.n_shot, task_manager=manager,
        log_samples=bool(cfg.out))
    if cfg.out:
        results["settings"] = asdict(cfg)
        write_text(cfg.out, json.dumps(results, indent=2, default=str, ensure_ascii=False))
    print(printable(utils.make_table(results)))


def harness_model(LM, model, tok, cfg: HarnessConfig):
    """Return a model for the harness, of its class LM, which only `main` imports."""
    class HarnessModel(Answers, LM):
        pass
    made = HarnessModel()
    made.model, made.tok, made.cfg = model, tok, cfg
    return made


class Answers:
    """What the harness asks of a model: lists of requests in, lists of answers out."""

    def generate_until(self, requests) -> list[str]:
        """args (context, generation_kwargs) -> texts up to the first of the strings `until`."""
        contexts, kwargs = zip(*[request.args for request in requests])
        n_before, settings = Counter(), []
        for context, some in zip(contexts, kwargs):     # asked again: with another seed
            settings.append(self.cfg.of_request(some, n_before[context]))
            n_before[context] += 1
        texts = self.complete(contexts, settings)
        return [cut(text, some.get("until") or []) for text, some in zip(texts, kwargs)]

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """args (context, continuation) -> log p in nats, and whether it is what is sampled at
        temperature 0 in as many tokens."""
        contexts = [request.args[0] for request in requests]
        prompts = [self.tok.prompt_ids(context) for context in contexts]
        answers = [self.tok.encode(request.args[1]) for request in requests]
        log_p = log_likelihood(self.model, prompts, answers, self.cfg.n_samples, self.cfg.seed,
                               self.cfg.batch_tokens)
        greedy = [replace(self.cfg, gen_length=len(answer), block_length=0, steps=0,
                          temperature=0.0) for answer in answers]
        texts = self.complete(contexts, greedy)
        return [(p, text == self.tok.decode(answer))
                for p, text, answer in zip(log_p.tolist(), texts, answers)]

    def complete(self, contexts, settings: list[HarnessConfig]) -> list[str]:
        """Complete each context by its settings, in batches of equal ones -> texts."""
        lengths = {i: len(self.tok.prompt_ids(context)) for i, context in enumerate(contexts)}
        groups, texts = {}, {}
        for i, context in enumerate(contexts):
            example = Example(context, "", {"id": i})
            groups.setdefault(astuple(settings[i]), []).append(example)
        for i, s in enumerate(settings):        # all of them, before the first is generated
            check_prompts(self.model.config, [range(lengths[i])], s.gen_length)
        bar = tqdm(total=len(contexts), desc="generate", unit="answer", disable=None)
        for examples in groups.values():
            s = settings[examples[0].meta["id"]]
            for batch in batches(examples, lengths, s):
                made = complete(self.model, self.tok, [example.prompt for example in batch], s)
                texts |= {example.meta["id"]: text for example, text in zip(batch, made)}
                bar.update(len(batch))
        bar.close()
        return [texts[i] for i in range(len(contexts))]

    def loglikelihood_rolling(self, requests):
        raise ValueError("a task asks for the perplexity of whole texts (loglikelihood_rolling), "
                         "which a masked-diffusion model does not have: it gives no probability to "
                         "a next token alone; analysis/preserve.py measures held-out losses")


def cut(text: str, until) -> str:
    """Return the text before the first of these strings."""
    for end in [until] if isinstance(until, str) else until:
        text = text.split(end)[0] if end else text
    return text


if __name__ == "__main__":
    run(main, HarnessConfig)
