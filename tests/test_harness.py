"""Laws of the model for lm-evaluation-harness: its answers are ours, in order, whoever asks.

The harness is not among the test requirements: a stand-in takes its place, and one test runs the
harness itself where it is installed.
"""
import abc
import json
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

from analysis import harness
from analysis.harness import HarnessConfig, cut, harness_model, main
from analysis.likelihood import log_likelihood
from helpers import DATA, ROOT, sentence, tiny_model, write_checkpoint, write_jsonl
from pretrained.tokenizer import byte_tokenizer
from sample import complete
from sampling.reveal import Sampling
from tasks import gsm8k
from tasks.files import read_jsonl

CASES = DATA.parent / "cases" / "gsm8k_outputs.jsonl"
TOK = byte_tokenizer()
CFG = HarnessConfig(init_from="model", tasks=("any",), gen_length=8, n_samples=4, device="cpu")
CONTEXTS = ["one", "a longer context", "2", "two more", "a longer context"]


class LM(abc.ABC):
    """The part of lm_eval.api.model.LM that a subclass must fill in."""
    generate_until = loglikelihood = loglikelihood_rolling = abc.abstractmethod(lambda self, x: x)


def request(*args):
    return SimpleNamespace(args=args)


def asked(cfg=CFG):
    """Return a model of the harness around a random one of bytes."""
    model = tiny_model(vocab_size=TOK.n_vocab, mask_id=TOK.mask_id, eos_id=TOK.eos_id)
    return harness_model(LM, model, TOK, cfg)


def texts_of(lm, settings) -> list[str]:
    return [complete(lm.model, TOK, [context], settings)[0] for context in CONTEXTS]


# ---- texts ----


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_each_context_gets_the_samplers_text_in_its_place_whatever_the_batch(batch_tokens):
    lm = asked(replace(CFG, batch_tokens=batch_tokens))
    texts = lm.generate_until([request(context, {}) for context in CONTEXTS])
    assert texts == texts_of(lm, Sampling(8, 8, 8)) and len(set(texts)) > 2


def test_a_text_ends_before_the_first_of_the_strings():
    for until, text in (["Q:", "\n"], "a b"), (["\n", "Q:"], "a b"), ("b", "a "), ([""], "a b\nQ:"):
        assert cut("a b\nQ:", until) == text
    lm = asked()
    whole = lm.generate_until([request("one", {})])[0]
    assert lm.generate_until([request("one", {"until": [whole[3]]})]) == [
        whole[:whole.index(whole[3])]]


def test_a_task_says_how_long_an_answer_may_be_unless_a_setting_does():
    lm = asked(replace(CFG, gen_length=0, block_length=0, steps=0))
    requests = [request(context, {"max_gen_toks": 3 + i}) for i, context in enumerate(CONTEXTS)]
    texts = [complete(lm.model, TOK, [context], Sampling(3 + i, 3 + i, 3 + i))[0]
             for i, context in enumerate(CONTEXTS)]
    assert lm.generate_until(requests) == texts
    assert asked().generate_until(requests) == texts_of(lm, Sampling(8, 8, 8))
    of_request = lm.cfg.of_request({})
    assert (of_request.gen_length, of_request.block_length, of_request.steps) == (256, 256, 256)


def test_a_request_that_comes_again_draws_other_numbers_only_if_the_task_samples():
    drawn = {"do_sample": True, "temperature": 1.0}
    for kwargs, same in ({}, True), ({"temperature": 1.0}, True), (drawn, False):
        first, second = asked().generate_until([request("one", kwargs)] * 2)
        assert (first == second) is same
        assert asked().generate_until([request("one", kwargs)]) == [first]


@pytest.mark.parametrize("kwargs, settings", [
    ({"max_new_tokens": 4}, (4, 0.0, 1.0, 0)), ({"max_tokens": "4"}, (4, 0.0, 1.0, 0)),
    ({"max_gen_toks": None, "max_new_tokens": "5"}, (5, 0.0, 1.0, 0)),
    ({"do_sample": True, "temperature": None, "top_p": None, "top_k": None}, (256, 0.0, 1.0, 0)),
    ({"do_sample": True, "temperature": "0.7", "top_p": "0.9", "top_k": "5"}, (256, 0.7, 0.9, 5)),
    ({"do_sample": True, "temperature": 1, "top_k": -1}, (256, 1.0, 1.0, 0))], ids=str)
def test_what_a_task_asks_for_is_read_under_each_name_null_or_as_a_text(kwargs, settings):
    s = replace(CFG, gen_length=0, block_length=0, steps=0).of_request(kwargs)
    assert (s.gen_length, s.temperature, s.top_p, s.top_k) == settings


@pytest.mark.parametrize("kwargs, words", [
    ({"max_gen_toks": "many"}, "max_gen_toks must be a number, not 'many'"),
    ({"max_gen_toks": 0}, "answers of 0 tokens"),
    ({"do_sample": True, "top_p": [1]}, "top_p must be a number")], ids=str)
def test_what_a_task_asks_for_and_cannot_be_done_is_named(kwargs, words):
    cfg = replace(CFG, gen_length=0, block_length=0, steps=0)
    assert words in sentence(cfg.of_request, kwargs, kind=ValueError)


# ---- likelihoods ----


def test_a_likelihood_is_the_bound_and_says_whether_the_text_is_the_greedy_one():
    lm = asked()
    greedy = complete(lm.model, TOK, ["one"], Sampling(3, 3, 3))[0]
    assert len(TOK.encode(greedy)) == 3, "choose another seed"
    pairs = [("one", greedy), ("one", "xyz"), ("a longer context", "q")]
    found = lm.loglikelihood([request(*pair) for pair in pairs])
    bound = log_likelihood(lm.model, [TOK.encode(context) for context, _ in pairs],
                           [TOK.encode(text) for _, text in pairs], 4, CFG.seed)
    assert [log_p for log_p, _ in found] == bound.tolist()
    assert [is_greedy for _, is_greedy in found][:2] == [True, False]


def test_the_likelihood_of_a_whole_text_is_refused():
    assert "perplexity" in sentence(asked().loglikelihood_rolling, [request("text")])


# ---- GSM8K: the harness's verdicts beside ours ----

# of its gsm8k.yaml: the pattern, which match counts, and what is dropped before texts are compared
FILTERS = {"flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
           "strict": (r"#### (\-?[0-9\.\,]+)", 0)}
DROPPED = ",", r"\$", "(?s).*#### ", r"\.$"
UNTIL = "Question:", "</s>", "<|im_end|>"
REWRITTEN = {       # a row of the page -> the end of a gold answer, from its number
    "gold answers, with": "#### {n}", "gold answers plus": "#### {plus}",
    "... ended by": "The answer is {n}.", "... followed by another `Q":
    "#### {n}\n\nQuestion: Bob has 5 nuts.\nAnswer: 5+2=7\n#### 7",
    "... followed by another p": "#### {n}\n\nQ: Bob has 5 nuts.\nA: 5+2=7\n#### 7",
    "... followed by \"a": "#### {n} apples in 3 bags", "... as `#### $18`": "#### ${n}",
    "... as `#### 15": "#### {minus}+3={n}", "... as `#### 18.00": "#### {n}.00",
    "... without": "",
}


def plain(text: str) -> str:
    for pattern in DROPPED:
        text = re.sub(pattern, "", text)
    return text.lower()


def harness_says(completion: str, answer: str, how: str) -> bool:
    """Return the harness's verdict by its published rule, written down here once more."""
    pattern, which = FILTERS[how]
    found = re.findall(pattern, cut(completion, UNTIL))
    one = found[which] if found else "[invalid]"
    one = next(filter(None, one)) if isinstance(one, tuple) else one
    return plain(one.strip()) == plain(answer)


def count(completions, answers) -> str:
    """Return what a row of the page says: ours, theirs, flexible and strict."""
    ours = [gsm8k.extract(text) == gsm8k.gold({"answer": answer})
            for text, answer in zip(completions, answers)]
    strict = [right and gsm8k.has_format(text) for right, text in zip(ours, completions)]
    theirs = {how: sum(harness_says(text, answer, how)
                       for text, answer in zip(completions, answers)) for how in FILTERS}
    cells = [len(ours)]
    for mine, how in (ours, "flexible"), (strict, "strict"):
        cells.append(f"{sum(mine)}, {theirs[how]}")
    return "| {} | {} | {} |".format(*cells)


def row_of_page(start: str) -> str:
    [row] = [line for line in (ROOT / "docs/tasks.md").read_text().splitlines()
             if line.startswith(f"| {start}")]
    return row.replace("**", "")


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="the GSM8K rows are not here")
@pytest.mark.parametrize("start", REWRITTEN)
def test_the_page_counts_the_verdicts_of_both_on_rewritten_gold_answers(start):
    answers = [row["answer"] for row in read_jsonl(DATA / "gsm8k/test.jsonl.gz")]
    completions = []
    for answer in answers:
        n = int(gsm8k.gold({"answer": answer}))
        head = gsm8k.MARKS.sub("", answer).split("####")[0]
        end = REWRITTEN[start].format(n=n, plus=n + 1, minus=n - 3)
        completions.append(f" {head}{end}".rstrip())
    assert row_of_page(start).endswith(count(completions, answers))


@pytest.mark.skipif(not CASES.is_file(), reason="the collected outputs are not here")
def test_the_page_counts_the_verdicts_of_both_on_outputs_that_are_hard_to_read():
    rows = [row for row in read_jsonl(CASES) if row["right"] is not None]
    counted = count([row["completion"] for row in rows], [f"#### {row['right']}" for row in rows])
    assert row_of_page("outputs of models").endswith(counted)


# ---- settings and mistakes ----


@pytest.mark.parametrize("settings, words", [
    ({"init_from": ""}, "--init_from"), ({"tasks": ()}, "--tasks"), ({"limit": -1}, "limit=-1"),
    ({"n_shot": -2}, "n_shot=-2"), ({"n_samples": 0}, "n_samples=0"), ({"top_p": 2.0}, "top_p=2"),
    ({"gen_length": -8}, "gen_length=-8"), ({"block_length": 3}, "block_length=3"),
    ({"gen_length": 0, "steps": 300}, "steps=300")])
def test_a_setting_that_does_not_fit_is_named(settings, words):
    keys = {"init_from": "model", "tasks": ("any",), "gen_length": 8, **settings}
    assert words in sentence(HarnessConfig, **keys, kind=ValueError)


def test_a_context_that_is_too_long_is_named_not_cut():
    said = sentence(asked().generate_until, [request("x" * 60, {})])
    assert "prompts of up to 56 tokens fit" in said


def test_all_contexts_are_checked_before_the_first_is_generated(monkeypatch):
    monkeypatch.setattr(harness, "complete", None)
    lm = asked(replace(CFG, gen_length=0, block_length=0, steps=0))
    said = sentence(lm.generate_until, [request("one", {"max_gen_toks": 4}),
                                        request("x" * 60, {"max_gen_toks": 8})])
    assert "prompts of up to 56 tokens fit" in said


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "model", TOK, 0)
    return tmp_path


def test_without_the_harness_one_sentence_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = sentence(main, replace(CFG, init_from=str(folder / "model")))
    assert "pip install lm-eval" in said
    assert "no_such_model" in sentence(main, replace(CFG, init_from="no_such_model"))


@pytest.fixture
def stand_in(monkeypatch):
    """A module lm_eval with one task, which asks for one text -> what it was called with."""
    called = {}

    def simple_evaluate(model, **kwargs):
        assert isinstance(model, LM)
        called.update(kwargs, texts=model.generate_until([request("one", {})]))
        return {"results": {"known": {"score": 0.5}}, "texts": called["texts"]}
    modules = {"lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.model": {"LM": LM},
               "lm_eval.evaluator": {"simple_evaluate": simple_evaluate},
               "lm_eval.utils": {"make_table": lambda results: f"table of {results['results']}"},
               "lm_eval.tasks": {"TaskManager": lambda include_path: SimpleNamespace(
                   all_tasks=["known"], path=include_path)}}
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, _, child = name.rpartition(".")
            monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    return called


@pytest.mark.parametrize("settings, n_shot, limit", [({}, None, None), ({"n_shot": 0}, 0, None),
                                                     ({"n_shot": 4, "limit": 3}, 4, 3)])
def test_the_script_asks_the_harness_and_prints_its_table(settings, n_shot, limit, folder, stand_in,
                                                          capsys):
    out = folder / "results.json"
    main(replace(CFG, init_from=str(folder / "model"), tasks=("known",), out=str(out), **settings))
    assert stand_in["tasks"] == ["known"]
    assert (stand_in["num_fewshot"], stand_in["limit"]) == (n_shot, limit)
    assert "table of {'known': {'score': 0.5}}" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["texts"] == stand_in["texts"] and written["settings"]["gen_length"] == 8


def test_an_unknown_task_and_a_path_that_cannot_be_written_are_told_first(folder, stand_in):
    cfg = replace(CFG, init_from=str(folder / "model"))
    assert "no task 'any'" in sentence(main, cfg)
    said = sentence(main, replace(cfg, tasks=("known",), out=str(folder)), kind=OSError)
    assert str(folder) in said and "texts" not in stand_in


@pytest.mark.skipif(not find_spec("lm_eval"), reason="pip install lm-eval to ask it")
def test_the_harness_itself_gets_our_texts(folder, capsys):
    write_jsonl(folder / "rows.jsonl", [{"q": f"{i}?", "a": f"{i}"} for i in range(3)])
    (folder / "mine.yaml").write_text(f"""
task: mine
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder / "rows.jsonl"}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["?"]}}
metric_list: [{{metric: exact_match}}]
""")
    cfg = replace(CFG, init_from=str(folder / "model"), tasks=("mine",), out=str(folder / "out"),
                  include_path=str(folder))
    main(cfg)
    assert "exact_match" in capsys.readouterr().out
    samples = json.loads((folder / "out").read_text())["samples"]["mine"]
    model, tok = harness.load_model(cfg.init_from, "cpu")
    for i, sample in enumerate(sorted(samples, key=lambda sample: sample["doc_id"])):
        assert sample["resps"] == [[cut(complete(model, tok, [f"{i}?"], cfg)[0], "?")]]
