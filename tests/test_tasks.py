"""Laws of the tasks: text survives its tokens, problems are right, the metric reads any answer."""
import gzip
import hashlib
import json
import os
import random
import re
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import DATA, SPLITS, python, sentence, write_jsonl
from model import row_generators, uniform
from pretrained.tokenizer import FILE_NAME, byte_tokenizer, load_tokenizer, toy_tokenizer
from tasks import common, files, gsm8k, toy, toy_base
from tasks.common import (Example, Row, batch_at, collate, few_shot, ids_of, load_examples,
                          load_task, question_prompt, task_prompt, tokenize)
from tasks.files import read_json, read_jsonl, write_json
from train import TrainConfig
from training.setup import load_rows

REAL = DATA / "gsm8k"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason=f"the GSM8K rows are not at {REAL}")

TOKENIZERS = {"bytes": byte_tokenizer(), "toy": toy_tokenizer()}
each_tokenizer = pytest.mark.parametrize("tok", TOKENIZERS.values(), ids=TOKENIZERS)
# what a user could write to fool a tokenizer, and what the toy's pattern treats in its own way
SPELLS = ["<|mask|>", "<|endoftext|>", "<|", "|>", "\nAnswer:", "Sums:", "\n#### ", " has ", "7",
          "42", "100", "\x00", "\x1b[2J", "\r\n", "e\u0301", "\u200d", "\U0001f469\u200d\U0001f680",
          "\ufeff", "\u0663"]
texts = st.lists(st.text() | st.sampled_from(SPELLS)).map("".join)


@pytest.fixture(scope="module")
def problems():
    """{split: the toy's examples}"""
    return {split: toy.load(split) for split in SPLITS}


@pytest.fixture(scope="module")
def base():
    return [example for split in SPLITS for example in toy_base.load(split)]


# ---- tokenizers ----


@each_tokenizer
@settings(deadline=None)                # the machine may be busy
@given(text=texts)
def test_every_text_comes_back_and_never_contains_our_own_ids(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(0 <= i < min(tok.eos_id, tok.mask_id) for i in ids)


@each_tokenizer
def test_text_that_looks_like_a_special_token_is_text(tok):
    for text in ("<|mask|>", "<|endoftext|>", "a<|endoftext|>b"):
        assert tok.decode(tok.encode(text)) == text
        assert len(tok.encode(text)) > 1


@each_tokenizer
def test_the_special_ids_are_two_and_the_last_of_the_vocabulary(tok):
    assert {tok.eos_id, tok.mask_id} == {tok.n_vocab - 1, tok.n_vocab - 2}


@each_tokenizer
def test_decode_stops_at_the_first_end_of_text_and_drops_masks(tok):
    a, b = tok.encode("12"), tok.encode("3")
    assert tok.decode(a + [tok.eos_id] + b + [tok.eos_id]) == "12"
    assert tok.decode([tok.eos_id] + a) == ""
    assert tok.decode(a + [tok.mask_id] + b) == "123"
    assert tok.decode(torch.tensor(a + [tok.eos_id])) == "12"


def test_decode_replaces_bytes_that_are_no_text():
    assert TOKENIZERS["bytes"].decode([72, 255, 105]) == "H\ufffdi"


@each_tokenizer
def test_show_draws_each_mask_and_each_end_of_text(tok):
    ids = [tok.mask_id, *tok.encode("5"), tok.mask_id, tok.eos_id, tok.eos_id]
    assert tok.show(ids) == "\u25915\u2591\u00b7\u00b7"


def test_every_number_is_the_same_token_wherever_it_stands_in_a_problem():
    tok = TOKENIZERS["toy"]
    plots = [(story, question) for story, question, _ in toy.ONE_STEP + toy.TWO_STEPS]
    for number in range(100):
        fill = dict(n="Anna", m="Ben", o="eggs", a=number, b=number, c=number)
        rows = [question_prompt(f"{story} {question}".format(**fill)) for story, question in plots]
        rows += [f"Story: {story}\nSum:".format(**fill) for story, _ in plots]
        rows += [f" {number}{op}{number}={number}\n{number}{op}{number}={number}\n#### {number}"
                 for op in "+-*/"]
        for row in rows:
            pieces = [tok.pieces[i] for i in tok.encode(row)]
            n_numbers = len(re.findall(r"\d+", row))
            with_digits = [piece for piece in pieces if re.search(rb"\d", piece)]
            assert with_digits == n_numbers * [str(number).encode()], row


def test_every_word_of_the_problems_and_the_base_rows_is_one_token(problems, base):
    tok = TOKENIZERS["toy"]
    prompts = {e.prompt for split in SPLITS for e in problems[split]} | {e.prompt for e in base}
    answers = {e.answer for split in SPLITS for e in problems[split]} | {e.answer for e in base}
    used = Counter(i for text in prompts | answers for i in tok.encode(text))
    words = [tok.pieces[i].decode() for i in used if re.search(rb"[A-Za-z]", tok.pieces[i])]
    in_texts = {word for text in prompts | answers for word in re.findall(r"[A-Za-z]+", text)}
    assert {re.sub(r"[^A-Za-z]", "", word) for word in words} == in_texts


def test_a_vocabulary_has_no_piece_twice():
    for tok in TOKENIZERS.values():
        assert len(set(tok.pieces)) == len(tok.pieces)


@each_tokenizer
def test_a_saved_tokenizer_comes_back_equal(tok, tmp_path):
    tok.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again == tok
    for name in ("name", "eos_id", "mask_id", "n_vocab"):
        assert getattr(again, name) == getattr(tok, name)
    text = "Anna has 12 eggs.\n#### 7 \u00e9 <|mask|>"
    assert again.encode(text) == tok.encode(text)


def test_the_two_tokenizers_are_known_by_name_and_differ():
    assert load_tokenizer("bytes") == TOKENIZERS["bytes"]
    assert load_tokenizer("toy") == TOKENIZERS["toy"]
    assert TOKENIZERS["bytes"] != TOKENIZERS["toy"]


def test_a_missing_tokenizer_is_named_in_one_sentence(tmp_path):
    said = sentence(load_tokenizer, str(tmp_path / "nowhere"), kind=FileNotFoundError)
    assert "nowhere" in said and "bytes, toy" in said


def truncated(tmp_path):
    TOKENIZERS["toy"].save(tmp_path)
    return (tmp_path / FILE_NAME).read_bytes()[:-100]


FOREIGN = {
    "empty": b"",
    "not JSON": b"tokenizer",
    "not UTF-8": b"\xff\xfe\x00",
    "a list": b"[]",
    "null": b"null",
    "of the hub": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "no base64": b'{"name": "x", "pattern": ".", "pieces": ["a"]}',
    "no pieces": b'{"name": "x", "pattern": ".", "pieces": []}',
    "pieces null": b'{"name": "x", "pattern": ".", "pieces": null}',
    "no pattern": b'{"name": "x", "pattern": "[", "pieces": ["AA=="]}',
}


@pytest.mark.parametrize("content", [*FOREIGN.values(), truncated], ids=[*FOREIGN, "truncated"])
def test_a_file_that_is_no_tokenizer_of_ours_is_named_in_one_sentence(content, tmp_path):
    content = content(tmp_path) if callable(content) else content
    (tmp_path / FILE_NAME).write_bytes(content)
    said = sentence(load_tokenizer, str(tmp_path), kind=ValueError)
    assert str(tmp_path / FILE_NAME) in said


# ---- the toy ----


def test_toy_splits_share_no_question_and_repeat_none(problems):
    prompts = [example.prompt for split in SPLITS for example in problems[split]]
    assert len(set(prompts)) == len(prompts)
    ids = [example.meta["id"] for split in SPLITS for example in problems[split]]
    assert len(set(ids)) == len(ids)
    assert [len(problems[split]) for split in SPLITS] == [40_000, 1_000, 1_000]


def test_the_first_toy_problems_are_the_same_whatever_is_asked_for(problems):
    for split in SPLITS:
        assert toy.load(split, n=50) == problems[split][:50]
        assert toy.load(split, n=300) == problems[split][:300]


def test_a_new_process_draws_the_same_problems_and_batches():
    """Python salts the hashes of texts per process; nothing may depend on them."""
    code = ("from tasks import toy, toy_base; from tasks.common import batch_at, Row\n"
            "for split in ('train', 'validation', 'test'):\n"
            "    print(toy.load(split, n=20), toy_base.load(split, n=20))\n"
            "rows = [Row(i, [1], [2]) for i in range(50)]\n"
            "print([row.example_id for row in batch_at(3, rows, 16, seed=7)[0]])")
    first, second = (python("-c", code, PYTHONHASHSEED=seed) for seed in ("1", "2"))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert str(toy.load("test", n=20)) in first.stdout


STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
# what the words of a story ask for
OPERATION = {r"buys": "+", r"finds": "+", r"has \d+(?=\.| and )": "+", r"gave": "-", r"lost": "-",
             r"fewer": "-", r"gives": "-", r"eats": "-", r"boxes": "*", r"sells": "*", r"bags": "/",
             r"share": "/"}


def is_right(left, op, right, result):
    """Worked out without division, so that 7/2=3 is wrong."""
    return {"+": left + right == result, "-": left - right == result, "*": left * right == result,
            "/": right and result * right == left}[op]


def test_every_toy_answer_is_arithmetically_right_and_ends_in_its_result(problems):
    for example in (e for split in SPLITS for e in problems[split]):
        assert example.answer.startswith(" ")
        *steps, last = example.answer[1:].split("\n")
        steps = [STEP.fullmatch(step).groups() for step in steps]
        assert all(is_right(int(x), op, int(y), int(z)) for x, op, y, z in steps), example
        assert last == f"#### {steps[-1][3]}" and example.meta["gold"] == steps[-1][3]
        assert gsm8k.score(example.answer, example)


def test_every_toy_answer_calculates_with_the_numbers_of_its_story_as_its_words_ask(problems):
    for example in (e for split in SPLITS for e in problems[split]):
        story = example.prompt[:example.prompt.rindex("How many")]
        steps = STEP.findall(example.answer)
        found = re.finditer("|".join(f"({words})" for words in OPERATION), story)
        asked = [list(OPERATION.values())[match.lastindex - 1] for match in found]
        assert [op for _, op, _, _ in steps] == asked, example
        used = [steps[0][0]] + [y for _, _, y, _ in steps]
        halves = ["2"] * ("share" in story)              # between two people
        assert used == re.findall(r"\d+", story) + halves, example
        assert all(after[0] == before[3] for before, after in zip(steps, steps[1:])), example


def test_every_toy_number_is_below_100(problems, base):
    for example in [e for split in SPLITS for e in problems[split]] + base:
        numbers = re.findall(r"\d+", example.prompt + example.answer)
        assert all(int(number) < 100 for number in numbers), example


def test_half_of_the_toy_problems_take_two_steps(problems):
    for split in SPLITS:
        steps = Counter(len(STEP.findall(example.answer)) for example in problems[split])
        assert set(steps) == {1, 2}
        # repeated questions are dropped, and these have more often one step
        assert 0.4 < steps[2] / len(problems[split]) < 0.65, (split, steps)


def test_every_template_name_and_thing_occurs_in_every_split(problems):
    for split in SPLITS:
        prompts = "\n".join(example.prompt for example in problems[split])
        for word in toy.NAMES + toy.THINGS:
            assert re.search(rf"\b{word}\b", prompts), (split, word)
        for story, question, _ in toy.ONE_STEP + toy.TWO_STEPS:
            pattern = re.sub(r"\\{.\\}", r"\\w+", re.escape(f"{story} {question}"))
            assert re.search(f"Question: {pattern}\n", prompts), (split, story)


def test_two_people_of_a_toy_story_have_different_names(problems):
    for example in problems["test"]:
        story = example.prompt[:example.prompt.rindex("How many")]
        names = [word for word in re.findall(r"[A-Z][a-z]+(?!:)\b", story) if word in toy.NAMES]
        assert len(set(names)) == len(names) in (1, 2), example


def test_the_base_corpus_has_no_question_no_answer_line_and_no_result_after_a_story(base):
    kinds = Counter(example.prompt.split(":")[0] for example in base)
    assert set(kinds) == {"Story", "Sums"}
    assert 0.35 < kinds["Story"] / len(base) < 0.6
    for example in base:
        text = example.prompt + example.answer
        assert not any(sign in text for sign in ("?", "Question", "Answer", "####")), example
        if example.prompt.startswith("Story"):
            assert re.fullmatch(r" \d+[-+*/]\d+", example.answer), example
        else:
            assert example.prompt == "Sums:"
            steps = [STEP.fullmatch(step).groups() for step in example.answer[1:].split("\n")]
            assert all(is_right(int(x), op, int(y), int(z)) for x, op, y, z in steps), example


def test_the_base_corpus_tells_only_stories_of_its_own_split(problems):
    """Otherwise the base model has read the stories that test asks about."""
    for split in SPLITS:
        stories = {re.search("Question: (.*) How many", e.prompt)[1] for e in problems[split]}
        for example in toy_base.load(split):
            if example.prompt.startswith("Story"):
                assert example.prompt[len("Story: "):-len("\nSum:")] in stories, example


def test_the_base_corpus_scores_the_very_sum():
    example = Example("Story: ..\nSum:", " 3+4", {"gold": "3+4"})
    assert toy_base.score(" 3+4", example) and toy_base.score("3+4\n", example)
    assert not toy_base.score("4+3", example) and not toy_base.score("3+4=7", example)


# ---- GSM8K: the metric ----

UGLY = [  # completion, flexible, strict
    ("#### 42", "42", "42"),
    (" 3*4=12\n12-2=10\n#### 10", "10", "10"),
    ("#### 1,234.", "1234", "1234"),
    ("#### 192,000,000", "192000000", "192000000"),
    ("#### -3", "-3", "-3"),
    ("#### \u22123", "-3", "-3"),
    ("#### $5.00", "5", "5"),
    ("#### -$5", "-5", "-5"),
    ("#### 18.0", "18", "18"),
    ("#### 18.50", "18.5", "18.5"),
    ("#### .5", "0.5", "0.5"),
    ("#### 0.50", "0.5", "0.5"),
    ("#### 100", "100", "100"),
    ("#### 100.00", "100", "100"),
    ("#### 0", "0", "0"),
    ("#### -0.0", "0", "0"),
    ("#### 007", "7", "7"),
    ("#### 50%", "50", "50"),
    ("#### 5 apples", "5", "5"),
    ("####7", "7", "7"),
    ("####\n7", "7", "7"),
    ("#### 7\nand 8 more", "7", "7"),
    ("#### 1\n#### 2", "1", "1"),
    ("#### abc 7", "7", None),
    ("6 is it #### none", "6", None),
    ("#### 3\n#### none", "3", "3"),
    ("10-3", "3", None),
    ("10 - 3", "3", None),
    ("(10)-3", "3", None),
    ("-3", "-3", None),
    ("\u22123", "-3", None),
    ("x=-3", "-3", None),
    ("it is (-3)", "-3", None),
    ("it is -3.", "-3", None),
    ("1,000 or 2,000.", "2000", None),
    ("the answer is $12.50.", "12.5", None),
    ("3*4=<<3*4=12>>", "4", None),
    ("#### <<6+6=12>>12", "12", "12"),
    ("<<3*4=12>>", None, None),
    ("no number at all", None, None),
    ("", None, None),
    ("####", None, None),
    ("$ , . -", None, None),
    ("\u0663", None, None),
    ("#### 5\n\nQuestion: has 9\nAnswer: 8\n#### 8", "5", "5"),
    ("5\n\nQuestion: has 9\nAnswer: 8\n#### 8", "5", None),
    ("Question: 5\n#### 5", "5", "5"),
    # the first #### counts, whatever follows
    *[(f"3*6=18\n#### 18{run_on}5+2=7\n#### 7", "18", "18") for run_on in (
        "\n\nQuestion: has 5\nAnswer: ", "\nQ: has 5\nA: ", "\n\nProblem 2: has 5\n",
        "\n\nHas 5?\n",
        "\n### Problem\nHas 5?\n", "\n---\n", " ", "\n<|im_end|>\n", "\n\n**Question 2:** ")],
    ("3*6=18\n#### 18\n####", "18", "18"),
    ("3*6=18\n####\n\nHas 5?\n5+2=7\n#### 7", "18", None),
    ("####\n#### 7", "7", "7"),
    ("##### 7", "7", "7"),
    # without one, the text ends where another problem begins
    *[(f"it is 18.{heading} has 5\n5+2=7\n#### 7", "18", None) for heading in (
        "\n\nQuestion:", "\nQ:", "\n**Q:**", "\nProblem:", "\n**Problem 3:**", "\n### Exercise\n",
        "\n## Instruction\n", " Question:")],
    ("Question: Tom has 3 bags of 6.\nAnswer: 3*6=18\n#### 18", "18", "18"),     # an echo
    ("Let me see.\nProblem: 3 bags of 6.\n#### 18", "18", "18"),
    ("it is 18.\n\nQuestion: has 5\n#### 7", "18", None),       # also before ####
    ("Q is 3, so it is 18: a question of\nquality", "18", None),
    *[(f"2 hours a day\n{no_heading} 3\n#### 18", "18", "18") for no_heading in (
        "Exercise:", "exercise 2:", "Q1:", "Q 2:", "q:")],
    # thousands
    *[(f"#### 12{blank}600", "12600", "12600") for blank in (
        ",", " ", "\u00a0", "\u2009", "\u202f", "{,}", "\\,", "\\ ", "{\\,}", "\uff0c")],
    *[(f"is $1{blank}234{blank}567.50 in all", "1234567.5", None) for blank in (
        ",", " ", "\u00a0", "\u2009", "\u202f", "{,}", "\\,")],
    ("\\boxed{9{,}500}", "9500", None),
    ("\\(12\\,600\\) dollars", "12600", None),
    ("#### 1,80,000", "180000", "180000"),
    ("#### 1 2345", "1", "1"),
    ("in 2024 365 days", "365", None),
    ("5 100 dollar bills", "5100", None),
    ("1,23,456,78,9 12 345,678 1,23 456", "23456", None),
    ("3.5 100", "100", None),
    ("3,4", "4", None),
    ("#### 3,4", "3", "3"),
    ("100, 200", "200", None),
    # sums, fractions, times
    ("#### 3*6=18", "18", "18"),
    ("#### 3 * 6 = 9 * 2 = 18 nuts", "18", "18"),
    ("#### ($20 - $2) = $18", "18", "18"),
    ("#### -3*6 = -18", "-18", "-18"),
    ("#### 18 = 3*6", "18", "18"),
    ("#### 18 (3*6=18)", "18", "18"),
    ("#### the sum is 3*6=18 nuts", "18", None),
    ("#### x = 18", "18", None),
    ("#### 10-3", "10", "10"),
    ("#### 3/4", "0.75", "0.75"),
    ("#### 8/2 apples", "4", "4"),
    ("#### 3/0", "3", "3"),
    ("it is 3/4", "4", None),
    ("#### 6:30", "6", "6"),
    # powers of ten
    ("#### 1.8e3", "1800", "1800"),
    ("#### 5E-1", "0.5", "0.5"),
    ("it is 1.8e+3.", "1800", None),
    ("#### 2eggs", "2", "2"),
    ("#### 1e999999999", "1", "1"),
    # signs
    ("#### \u20133", "-3", "-3"),
    ("10\u20133", "3", None),
    ("#### \uff11\uff18", "18", "18"),
    ("#### $-18", "-18", "-18"),
    ("#### -$18", "-18", "-18"),
    ("#### \\$18", "18", "18"),
    ("#### \u20ac18", "18", "18"),
    ("#### +18", "18", None),
    ("#### ~18", "18", None),
    ("#### **18**", "18", None),
    ("#### , 72", "72", None),
    ("#### about 18 nuts in 3 bags", "18", None),
    ("#### 18 nuts in 3 bags", "18", "18"),
    ("#### 18%", "18", "18"),
    ("#### 18...", "18", "18"),
    ("#### \\boxed{18} of 20", "18", None),
    ("so $\\boxed{18}$ nuts after 3 days", "18", None),
    ("so $\\boxed{3*6=18}$ nuts after 3 days", "18", None),
    ("so $\\boxed{x}$ nuts after 3 days", "3", None),
    ("7=<<3+4=7>>7\n#### <<7>>", "7", None),
    ("#### " + "1234567890" * 4, "1234567890" * 4, "1234567890" * 4),
    ("#### " + "9" * 40, "9" * 40, "9" * 40),
    ("#### 0." + "0" * 40 + "1", "0." + "0" * 40 + "1", "0." + "0" * 40 + "1"),
]


@pytest.mark.parametrize("completion, flexible, strict", UGLY, ids=[repr(x)[:30] for x, *_ in UGLY])
def test_the_final_number_of_an_ugly_answer(completion, flexible, strict):
    assert gsm8k.extract(completion) == flexible
    assert gsm8k.extract(completion, strict=True) == strict
    assert gsm8k.has_format(completion) == (strict is not None)


CASES = DATA.parent / "cases" / "gsm8k_outputs.jsonl"
DECIDED = {" #### 6:30": "6", " #### 3/4": "0.75", " The two numbers are 3,4": "4"}     # by us


@pytest.mark.skipif(not CASES.is_file(), reason=f"the outputs are not at {CASES}")
def test_outputs_of_models_are_read_as_a_person_reads_them():
    for line in read_jsonl(CASES):
        right = DECIDED[line["completion"]] if line["right"] is None else line["right"]
        assert gsm8k.extract(line["completion"]) == right, line["id"]


@pytest.mark.parametrize("start", ["", "1 ", "#### ", "1\nQ", "1 #### "])
@pytest.mark.parametrize("piece", [
    "<<", "1", "1,", "1,11", "1 000 ", "{,}000", "(", "-", "$", "Q:\n", "\nQ ", "####", "Question:",
    "\\boxed{", "=", "1+", "1+1=", " ", "\n", "1/", "1e", "1.", "*", "\n#\n", "\n> "])
def test_reading_takes_no_longer_for_hostile_text(start, piece):
    text = start + piece * (40_000 // len(piece))
    began = time.process_time()
    gsm8k.extract(text), gsm8k.has_format(text)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("piece", [",23", ",23,4", " 123", ",23 123", "{,}1"])
def test_grouped_digits_are_read_in_time_in_proportion_to_their_length(piece):
    text = "1" + piece * (60_000 // len(piece))
    began = time.process_time()
    gsm8k.unmarked(text)
    assert time.process_time() - began < 1


THOUSANDS = re.compile(r"""(?<![0-9.])          # the same rule as one expression, which is slow
    (?: [0-9]+ (?:,[0-9]{2,3})* ,[0-9]{3}
      | [0-9]{1,3} (?: (?: \{\\?,\} | \\[,:; ] | ,\\! | [ \u00a0\u2007\u2009\u202f]) [0-9]{3} )+
    ) (?![0-9])""", re.X)


def test_thousands_are_joined_by_the_rule():
    drawn = random.Random(0)
    pieces = ["1", "23", "456", "7890", ",", ",", " ", ".", "{,}", "\\,", ",\\!", "\u00a0"]
    for _ in range(3000):
        text = "".join(drawn.choices(pieces, k=drawn.randint(1, 25)))
        wanted = THOUSANDS.sub(lambda number: re.sub("[^0-9]", "", number[0]), text)
        assert gsm8k.unmarked(text) == wanted, text


@settings(deadline=None)
@given(number=st.integers())
def test_an_integer_comes_back_exactly_however_it_is_written(number):
    blanks = [f"{number:,}".replace(",", blank) for blank in (" ", "\u00a0", "{,}", "\\,")]
    for written in (f"{number}", f"{number:,}", f"{number}.0", f"{number}.", *blanks):
        assert gsm8k.extract(f"so\n#### {written}", strict=True) == str(number)
        assert gsm8k.extract(f"it is {written}") == str(number)


@settings(deadline=None)
@given(text=st.text(alphabet="0123456789.,-$#<>=x/*+e{}:Q \n\u2212\\") | st.text())
def test_no_text_breaks_the_metric_and_a_strict_number_is_the_flexible_one(text):
    strict, flexible = gsm8k.extract(text, strict=True), gsm8k.extract(text)
    assert strict is None or strict == flexible
    assert flexible is None or re.fullmatch(r"-?[0-9]+(\.[0-9]*[1-9])?", flexible)


def test_score_compares_numbers_not_texts():
    def right(completion, gold):
        return gsm8k.score(completion, Example("", "", {"gold": gold}))
    for text in ("#### 18", "#### 18.0", "#### $18.00", "so 18", "1\n#### 18"):
        assert right(text, "18") is True
    for text in ("#### 19", "#### 118", "#### 1", "#### -18", "18\n#### 19", "#### 18.5", "", "no"):
        assert right(text, "18") is False
    assert right("#### 1,234", "1234") and right("#### -3", "-3")
    assert not right("#### 3", "-3")


# ---- GSM8K: the rows ----


@needs_real_rows
def test_gsm8k_splits_have_their_sizes_and_share_no_row():
    train, validation, test = (gsm8k.load(split, str(REAL)) for split in SPLITS)
    assert (len(train), len(validation)) == (7_217, 256)
    ids = [example.meta["id"] for example in train + validation + test]
    assert len(set(ids)) == len(ids)
    rows = read_jsonl(REAL / "train.jsonl.gz")
    for row, example in zip(rows, train + validation, strict=True):     # in file order
        assert example.prompt == f"Question: {row['question'].strip()}\nAnswer:"


@needs_real_rows
@pytest.mark.parametrize("split", SPLITS)
def test_every_gold_answer_scores_as_right_with_and_without_marks(split):
    plain, marked = gsm8k.load(split, str(REAL)), gsm8k.load(split, str(REAL), variant="marks")
    source = read_jsonl(REAL / f"{'test' if split == 'test' else 'train'}.jsonl.gz")
    final = {row["question"].strip(): row["answer"].split("#### ")[1] for row in source}
    for a, b in zip(plain, marked, strict=True):
        assert a.meta == b.meta and a.prompt == b.prompt
        question = a.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        assert a.meta["gold"] == final[question].replace(",", "")
        assert all(gsm8k.score(e.answer, e) and gsm8k.has_format(e.answer) for e in (a, b))
        assert "<<" not in a.answer and ">>" not in a.answer
        assert re.sub("<<[^>]*>>", "", b.answer) == a.answer
    assert sum("<<" in example.answer for example in marked) > 0.9 * len(marked)


@needs_real_rows
def test_a_wrong_number_scores_as_wrong_on_every_gold_row():
    for example in gsm8k.load("test", str(REAL)):
        wrong = int(example.meta["gold"]) + 1
        head, hashes, _ = example.answer.partition("####")
        assert not gsm8k.score(f"{head}{hashes} {wrong}", example)
        assert not gsm8k.score(f"{head}{wrong}", example)
        assert gsm8k.score(example.answer + f"\n#### {wrong}", example)      # the first counts


def some_rows(n):
    return [{"question": f"Has {i}?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1:,}"}
            for i in range(n)]


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_local_folder_gives_its_rows_in_order_the_last_256_held_out(end, tmp_path):
    write_jsonl(tmp_path / f"train.jsonl{end}", some_rows(260))
    write_jsonl(tmp_path / f"test.jsonl{end}", some_rows(1200)[300:])
    train, validation, test = (gsm8k.load(split, str(tmp_path)) for split in SPLITS)
    assert [e.prompt for e in train] == [f"Question: Has {i}?\nAnswer:" for i in range(4)]
    assert train[3].answer == " 3+1=4\n#### 4"
    marked = gsm8k.load("train", str(tmp_path), variant="marks")
    assert marked[3].answer == " 3+1=<<3+1=4>>4\n#### 4"
    assert [e.prompt for e in validation] == [f"Question: Has {i}?\nAnswer:" for i in range(4, 260)]
    assert [e.meta["gold"] for e in test] == [str(i + 1) for i in range(300, 1200)]   # no 1,200


def test_the_id_of_a_row_is_its_question_wherever_the_row_stands():
    def id_of(question, answer):
        return gsm8k.to_example({"question": question, "answer": answer}).meta["id"]
    assert id_of("Has 5?", "#### 5") == id_of("Has 5?", "#### 6")
    assert id_of("Has 5?", "#### 5") != id_of("Has 6?", "#### 5")


def test_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n  \n{"a": 2}')
    assert read_jsonl(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}]


GOOD = "".join(json.dumps(row) + "\n" for row in some_rows(300)).encode()
BROKEN = {  # file, content, what its sentence names
    "empty": ("train.jsonl", b"", "train.jsonl"),
    "blank": ("train.jsonl", b"\n\n", "train.jsonl"),
    "malformed": ("train.jsonl", GOOD + b"{bad\n", "line 301"),
    "cut": ("train.jsonl", GOOD[:-20], "line 300"),
    "a list": ("train.jsonl", b"\n" + GOOD + b"[1, 2]\n", "line 302"),
    "a number": ("train.jsonl", GOOD + b"7\n", "line 301"),
    "no answer": ("train.jsonl", GOOD + b'{"question": "?"}\n', "row 301"),
    "no question": ("train.jsonl", GOOD + b'{"answer": "#### 1"}\n', "row 301"),
    "answer null": ("train.jsonl", GOOD + b'{"question": "?", "answer": null}\n', "row 301"),
    "answer 5": ("train.jsonl", GOOD + b'{"question": "?", "answer": 5}\n', "row 301"),
    "latin-1": ("train.jsonl", GOOD + b'{"question": "caf\xe9"}\n', "train.jsonl"),
    "gzipped": ("train.jsonl", gzip.compress(GOOD), "train.jsonl"),
    "too few": ("train.jsonl", GOOD[:GOOD.index(b"\n")], "256"),        # none is left to train on
    "gz empty": ("train.jsonl.gz", b"", "train.jsonl.gz"),
    "gz not gzipped": ("train.jsonl.gz", GOOD, "train.jsonl.gz"),
    "gz truncated": ("train.jsonl.gz", gzip.compress(GOOD)[:-30], "train.jsonl.gz"),
    "gz checksum": ("train.jsonl.gz", gzip.compress(GOOD)[:-8] + bytes(8), "train.jsonl.gz"),
    "gz garbled": ("train.jsonl.gz", gzip.compress(GOOD)[:10] + b"\xff" * 99, "train.jsonl.gz"),
    "gz malformed": ("train.jsonl.gz", gzip.compress(GOOD + b"{bad\n"), "line 301"),
    "gz latin-1": ("train.jsonl.gz", gzip.compress(GOOD + b"caf\xe9\n"), "train.jsonl.gz"),
}


@pytest.mark.parametrize("name, content, named", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_sentence_that_says_where(name, content, named, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert named in sentence(gsm8k.load, "train", str(tmp_path), kind=ValueError)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("answer", ["", " ", "18", "The answer is: 18", "####", "#### ", "18 ####",
                                    "#### eighteen", "#### <<18>>", "#### ?18"])
def test_a_row_without_a_number_behind_hashes_is_an_error_that_names_it(split, answer, tmp_path):
    """For test it would be a question that no answer gets right."""
    source = "test" if split == "test" else "train"
    rows = some_rows(300)
    rows[16]["answer"] = rows[216]["answer"] = rows[290]["answer"] = answer
    write_jsonl(tmp_path / f"{source}.jsonl", rows)
    said = sentence(gsm8k.load, split, str(tmp_path), kind=ValueError)
    assert said == (f"{tmp_path / source}.jsonl, row 17: the answer must end in `#### ` and a "
                    f"number; in 3 of 300 rows it does not")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_broken_row_is_a_sentence_with_its_file(end, tmp_path):
    rows = some_rows(300)
    for key in ("question", "answer"):
        for value in (None, 5, ["?"], {}, True):
            write_jsonl(tmp_path / f"train.jsonl{end}", [*rows, {**rows[0], key: value}])
            said = sentence(gsm8k.load, "train", str(tmp_path), kind=ValueError)
            assert f"{tmp_path / 'train.jsonl'}{end}, row 301" in said


def test_a_missing_file_is_one_sentence_that_names_it(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / ("x" * 300)):
        said = sentence(gsm8k.load, "test", str(folder), kind=FileNotFoundError)
        assert str(folder / "test.jsonl") in said and f"data_dir={str(folder)!r}" in said


NO_FILES = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a loop": lambda path: path.symlink_to(path),
    "a broken link": lambda path: path.symlink_to("gone"),
}


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
@pytest.mark.parametrize("name, rows", [
    ("gsm8k", "train.jsonl"), ("gsm8k", "train.jsonl.gz"), ("nl_rx", "train.jsonl"),
    ("nl_rx", "synth_train.jsonl"), ("django", "train.jsonl"), ("spider", "train.jsonl"),
    ("spider", "train_spider.json")])
def test_rows_that_are_no_file_are_a_sentence_about_them(make, name, rows, tmp_path):
    """Also beside a good file with the other end."""
    write_jsonl(tmp_path / "tables.jsonl", [])
    (tmp_path / "tables.jsonl").write_text('{"db_id": "x", "tables": [], "foreign_keys": []}')
    if rows == "train.jsonl":
        write_jsonl(tmp_path / "train.jsonl.gz", some_rows(300))
    make(tmp_path / rows)
    said = sentence(load_task(name).load, "train", str(tmp_path), kind=OSError)
    assert f"{tmp_path / rows} is not a file" in said


@pytest.mark.slow
def test_without_a_folder_and_a_network_one_sentence_mentions_data_dir(tmp_path):
    done = python("-c", "import sys; from tasks import gsm8k\n"
                  "try: gsm8k.load('test')\n"
                  "except ValueError as error: sys.exit(str(error))",
                  HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and "--data_dir" in done.stderr, done.stderr


# ---- what all tasks share ----


TASKS = "django", "gsm8k", "mmlu", "nl_rx", "spider", "toy", "toy_base"
FOLDERS = {"nl_rx": "nl_rx_synth"}      # of shared/data, where it is not the task's name
FORMS = {   # of a prompt; the groups, joined, are the text that a user would give
    "django": r"Description: (.+)\nCode:", "gsm8k": r"Question: (.+)\nAnswer:",
    "mmlu": r"(.+\nA\. .*\nB\. .*\nC\. .*\nD\. .*)\nAnswer:",
    "nl_rx": r"Description: (.+)\nRegex:", "toy": r"Question: (.+)\nAnswer:",
    "spider": r"(CREATE TABLE .+\n\n)Question: (.+)\nSQL:",
    "toy_base": r"Story: (.+)\nSum:|Sums:"}


@cache
def rows_of_test(name):
    folder = "" if name.startswith("toy") else DATA / FOLDERS.get(name, name)
    if folder and not folder.is_dir():
        pytest.skip(f"the rows are not at {folder}")
    return load_examples(name, "test", str(folder))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_the_three_functions_and_its_examples_an_id_and_a_gold_answer(name):
    task = load_task(name)
    assert task.__name__ == f"tasks.{name}"
    assert callable(task.extract)
    examples = rows_of_test(name)
    assert len({example.meta["id"] for example in examples}) == len(examples)
    assert all(example.meta["gold"] for example in examples)
    assert all(task.score(example.answer, example) for example in examples[:20])


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_is_that_of_the_row_with_the_same_question(name):
    texts = set()
    for example in rows_of_test(name)[:1000]:
        found = re.fullmatch(FORMS[name], example.prompt, re.S)
        texts.add(text := "".join(filter(None, found.groups())))
        assert task_prompt(name, text) == example.prompt
        assert name == "mmlu" or task_prompt(name, f" {text}\n" * bool(text)) == example.prompt
    assert len(texts) > 100


@pytest.mark.parametrize("text", ["How many?", "", "\n\nHow many?", "CREATE TABLE t (a text)\nHow"])
def test_a_question_of_spider_without_a_schema_is_told_what_fits(text):
    said = sentence(task_prompt, "spider", text, kind=ValueError)
    assert "CREATE TABLE" in said and "blank line" in said


def test_a_task_that_wraps_no_text_is_told_and_so_is_one_that_returns_none(own_task):
    own_task(TASK)
    assert "--raw" in sentence(task_prompt, "own", "x", kind=ValueError)
    own_task(TASK + "\n\ndef prompt(text):\n    return f'{text}='\n")
    sys.modules.pop("tasks.own")
    assert task_prompt("own", "1+1") == load_examples("own", "test")[0].prompt
    own_task(TASK + "\n\ndef prompt(text):\n    return [text]\n")
    sys.modules.pop("tasks.own")
    said = sentence(task_prompt, "own", "x", kind=ValueError)
    assert "tasks/own.py: prompt must return a text, not ['x']" in said


@pytest.mark.parametrize("name, words", [
    ("gsm8", ["'gsm8'", "jsonl", "mixture", *TASKS]), ("", ["''"]), ("../sample", ["'../sample'"]),
    ("common", ["tasks/common.py", "load and extract and score"]), ("wikitext", ["lacks load"]),
    ("half_a_task", ["tasks/half_a_task.py", "lacks score", "tasks/common.py"])])
def test_a_task_that_is_none_is_one_sentence_that_says_why(name, words, tmp_path, monkeypatch):
    (tmp_path / "half_a_task.py").write_text("\ndef load(split): pass\ndef extract(text): pass\n")
    for path in Path(common.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    monkeypatch.setattr("tasks.__path__", [str(tmp_path)])
    said = sentence(load_task, name, kind=ValueError)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("name", TASKS)
def test_a_split_or_variant_that_a_task_lacks_is_one_sentence_that_names_those_it_has(name,
                                                                                    tmp_path):
    load, splits = load_task(name).load, ("dev", "test") if name == "mmlu" else SPLITS
    said = sentence(load, "train_dev", str(tmp_path), kind=ValueError)
    assert said == f"{name} has no split 'train_dev'; choose from {', '.join(splits)}"
    known = {"gsm8k": "'marks' keeps <<...>> in the answers",
             "jsonl": "'number' compares final numbers",
             "spider": "'none' leaves the schema out, 'raw' does not clean the SQL, 'none,raw' "
                       "does both"}
    said = sentence(load, "test", str(tmp_path), "x", kind=ValueError)
    assert said == f"{name} has no variant 'x'; {known.get(name, 'leave it empty')}"


def test_a_folder_and_a_variant_are_the_tasks_and_not_those_of_the_task_beside_it(tmp_path):
    """So the toy's base corpus can be watched while rows from a folder are trained on."""
    write_jsonl(tmp_path / "train.jsonl", some_rows(300))
    cfg = TrainConfig(task="gsm8k", forget_task="toy_base", data_dir=str(tmp_path), variant="marks")
    rows = [load_rows(task, "validation", cfg, TOKENIZERS["bytes"], 256, rank=1)
            for task in (cfg.task, cfg.forget_task)]
    assert [len(some) for some in rows] == [256, 1000]
    assert "<<" in TOKENIZERS["bytes"].decode(rows[0][0].answer)


@pytest.mark.parametrize("name", ["toy", "toy_base"])
def test_a_task_that_makes_its_rows_refuses_a_folder(name, tmp_path):
    said = sentence(load_task(name).load, "test", str(tmp_path), kind=ValueError)
    assert said == (f"{name} makes its own rows and does not read data_dir={str(tmp_path)!r}; "
                    f"leave it empty")


TASK = """
import re

from tasks.common import Example
PROTOCOL = dict(n_shot=0, gen_length=8, block_length=8, steps=8)


def load(split, data_dir="", variant=""):
    return [Example("1+1=", " 2", {"id": "a", "gold": "2"})]


def extract(completion):
    return completion.strip()


def score(completion, example):
    return extract(completion) == example.meta["gold"]
"""
NO_TASKS = {    # what is changed into what, and what the sentence says
    "no gold": (', "gold": "2"', "", 'its meta["gold"]'),
    "gold None": ('"gold": "2"', '"gold": None', 'its meta["gold"]'),
    "gold a set": ('"gold": "2"', '"gold": {2}', 'its meta["gold"]'),
    "no id": ('"id": "a", ', "", 'a meta["id"] that is a text'),
    "id a number": ('"id": "a"', '"id": 1', 'a meta["id"] that is a text'),
    "answer None": ('" 2"', "None", "an answer that is a text"),
    "prompt a list": ('"1+1="', "[1]", "a prompt that is a text"),
    "meta None": ('{"id": "a", "gold": "2"}', "None", "an Example(prompt, answer, meta)"),
    "rows": ('Example("1+1=", " 2", {"id": "a", "gold": "2"})', '{"question": "?"}',
             "example 1 of test must be an Example"),
    "no rows": ("return [Ex", "return [] and [Ex", "at least one"),
    "None": ("return [Ex", "return None and [Ex", "a list of Examples"),
    "load of one": ('split, data_dir="", variant=""', "split", "load must take 3 arguments"),
    "load of four": ('data_dir="", variant=""', "n, data_dir, variant", "load must take 3"),
    "extract of none": ("extract(completion):", "extract():", "extract must take 1 argument,"),
    "score of one": ("score(completion, example)", "score(completion)", "score must take 2"),
    "extra": ("def score", "extra_scores = len\n\n\ndef score", "extra_scores must take 2"),
    "prompt": ("def score", "def prompt(a, b): 0\n\n\ndef score", "prompt must take 1 argument,"),
    "score a number": ('return extract(completion) == example.meta["gold"]', "return 1",
                       "True or False"),
    "score by answer": ('return extract(completion) == example.meta["gold"]',
                        'return re.search("2", completion) or False',
                        "score must return True or False, not <re.Match"),
    "extract bytes": ("return completion.strip()", "return completion.encode()",
                      "extract must return None, a text"),
    "extract by answer": ("return completion.strip()", 'return re.search("2", completion)',
                          "extract must return None, a text"),
    "protocol": ("n_shot=0", "shots=0", "whole numbers for n_shot, gen_length"),
    "protocol 0": ("gen_length=8", "gen_length=0", "whole numbers"),
    "protocol text": ("steps=8", "steps='8'", "whole numbers"),
    "protocol list": ("dict(n_shot=0, gen_length=8, block_length=8, steps=8)", "[0, 8]", "a dict"),
    "syntax": ("def load(", "def load((", "cannot be imported"),
    "import": ("from tasks.common", "import no_such_library\nfrom tasks.common", "no_such_library"),
}


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    """Return a function that makes tasks/own.py of a text."""
    def make(text):
        (tmp_path / "own.py").write_text(text)
    for path in Path(common.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    monkeypatch.setattr("tasks.__path__", [str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "tasks.own", raising=False)
    yield make
    sys.modules.pop("tasks.own", None)


@pytest.mark.parametrize("old, new, words", NO_TASKS.values(), ids=NO_TASKS)
def test_a_task_that_breaks_the_contract_is_told_when_it_is_loaded(old, new, words, own_task):
    assert old in TASK
    own_task(TASK.replace(old, new))
    said = sentence(load_examples, "own", "test", kind=ValueError)
    assert "tasks/own.py" in said and words in said, said


def test_a_task_that_keeps_the_contract_is_loaded(own_task):
    own_task(TASK)
    assert load_examples("own", "test") == [Example("1+1=", " 2", {"id": "a", "gold": "2"})]


def test_a_file_of_the_finder_beside_the_tasks_is_not_one(own_task, tmp_path):
    (tmp_path / "._toy.py").write_bytes(b"\x00\xff\ndef load(")
    said = sentence(load_task, "toys", kind=ValueError)
    assert "choose from django, gsm8k" in said and "._toy" not in said


@pytest.mark.parametrize("text", ["", "\ud800", "\0", "\U0010ffff", "e\u0301"])
def test_any_text_has_an_id(text):
    assert re.fullmatch("[0-9a-f]{12}", ids_of([text])[0])


def test_a_text_that_occurs_again_has_an_id_of_its_own_and_the_others_keep_theirs():
    a, b, again, third = ids_of(["a", "b", "a", "a"])
    assert (again, third) == (f"{a}-2", f"{a}-3") and a != b and re.fullmatch("[0-9a-f]{12}", a)
    assert ids_of(["b", "a"]) == [b, a]


@pytest.mark.parametrize("name, words", [
    ("", "the path of a file is empty; give the name of a file"), ("new/", "new/ is a folder; "),
    (".", ". is a folder; "), ("old", "old is a folder; give the name of a file")])
def test_a_folder_or_nothing_in_place_of_a_file_to_write_is_told(name, words, tmp_path,
                                                                monkeypatch):
    (tmp_path / "here" / "old").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert words in sentence(write_json, name, {}, kind=OSError)
    assert os.listdir(tmp_path) == ["here"] and os.listdir() == ["old"]


def test_a_json_file_holds_one_object_and_a_kill_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": "\u00e9"})
    assert read_json(path) == {"a": "\u00e9"} and os.listdir(tmp_path) == ["x.json"]

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": "\u00e9"}
    for content in ("", "[1]", "3", "{", "\x00"):
        path.write_text(content)
        assert str(path) in sentence(read_json, path, kind=ValueError)


def test_few_shot_prompts_are_solved_examples_between_blank_lines():
    a, b, c, d = [Example(question_prompt(f"{x}?"), f" {x}\n#### 1", {"id": x}) for x in "abcd"]
    head = "Question: a?\nAnswer: a\n#### 1\n\nQuestion: b?\nAnswer: b\n#### 1\n\n"
    shots, examples = [a, b], [c, d]
    assert few_shot(examples, shots) == [
        Example(head + "Question: c?\nAnswer:", " c\n#### 1", {"id": "c"}),
        Example(head + "Question: d?\nAnswer:", " d\n#### 1", {"id": "d"})]
    assert few_shot(examples, []) == examples


def test_tokenize_drops_whole_rows_and_never_cuts():
    tok = TOKENIZERS["bytes"]
    sizes = (3, 4), (3, 5), (9, 1), (1, 6), (0, 3), (3, 0)
    examples = [Example("p" * n, "a" * m, {}) for n, m in sizes]
    rows = tokenize(examples, tok, max_length=8)         # 7 tokens and an end-of-text
    assert [row.example_id for row in rows] == [0, 3]
    for row in rows:
        assert tok.decode(row.prompt) == examples[row.example_id].prompt
        assert tok.decode(row.answer) == examples[row.example_id].answer


def test_tokenize_says_what_would_fit_when_nothing_does():
    examples = [Example("12345", "678", {}), Example("123456", "789", {})]
    said = sentence(tokenize, examples, TOKENIZERS["bytes"], 8, "toy train", kind=ValueError)
    assert all(word in said for word in ("max_length=8", "2 toy train rows", "9 tokens"))
    assert len(tokenize(examples, TOKENIZERS["bytes"], max_length=9)) == 1


def rows_of(n, seed=0):
    """n rows of unequal length; no token occurs twice."""
    rng, token = random.Random(seed), iter(range(100, 100_000))
    return [Row(i, [next(token) for _ in range(rng.randint(1, 9))],
                [next(token) for _ in range(rng.randint(1, 9))]) for i in range(n)]


@pytest.mark.parametrize("n, batch_size", [(12, 4), (7, 3), (10, 7), (5, 12), (6, 1), (1, 4)])
def test_an_epoch_sees_each_row_once_also_when_batches_straddle_epochs(n, batch_size):
    rows = rows_of(n)
    batches = [batch_at(step, rows, batch_size, seed=5)[0] for step in range(4 * n)]
    seen = [row.example_id for batch in batches for row in batch]
    assert len(seen) == 4 * n * batch_size
    for epoch in range(4 * batch_size):
        assert sorted(seen[epoch * n:(epoch + 1) * n]) == list(range(n))


def test_a_batch_depends_on_seed_and_step_alone():
    rows = rows_of(20)
    steps = list(range(12))
    forwards = {step: batch_at(step, rows, 6, seed=1) for step in steps}
    random.Random(0).shuffle(steps)
    random.seed(99)
    for step in steps:
        batch_at(step, rows, 6, seed=2)                  # another run in between
        assert batch_at(step, rows, 6, seed=1) == forwards[step]
    batch_at(3, rows, 6, seed=1)[0].clear()              # what a caller does to it stays there
    assert batch_at(3, rows, 6, seed=1) == forwards[3]


def test_another_seed_and_another_epoch_are_another_order():
    rows = rows_of(30)
    orders = [[row.example_id for row in batch_at(epoch, rows, 30, seed)[0]]
              for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert list(range(30)) not in orders


@pytest.mark.parametrize("n_parts", [1, 2, 3, 4, 8])
def test_parts_are_disjoint_make_up_the_batch_and_agree_on_fill(n_parts):
    rows = rows_of(40)
    for step in range(5):
        whole, fill = batch_at(step, rows, 24, seed=3)
        parts = [batch_at(step, rows, 24, 3, part, n_parts) for part in range(n_parts)]
        ids = [row.example_id for part, _ in parts for row in part]
        assert sorted(ids) == sorted(row.example_id for row in whole)
        assert {len(part) for part, _ in parts} == {24 // n_parts}
        assert {f for _, f in parts} == {fill} == {max(len(row.answer) for row in whole) + 1}


EOS = 2


@pytest.mark.parametrize("max_length", [19, 14, 30])
@pytest.mark.parametrize("seed", range(5))
def test_collate_lays_out_prompt_answer_end_of_text_and_padding(seed, max_length):
    rows = [row for row in rows_of(12, seed) if len(row.prompt) + len(row.answer) < max_length]
    fill = max(len(row.answer) for row in rows) + 1
    x0, maskable, is_real = collate(rows, fill, max_length, EOS)
    assert x0.dtype == torch.int64 and maskable.dtype == is_real.dtype == torch.bool
    ends = []
    for row, ids, in_answer, real in zip(rows, x0.tolist(), maskable.tolist(), is_real.tolist()):
        n_eos = min(fill - len(row.answer), max_length - len(row.prompt) - len(row.answer))
        end = len(row.prompt) + len(row.answer) + n_eos
        assert n_eos >= 1 and ids[end - 1] == EOS        # the last real token of each row
        assert ids[:end] == row.prompt + row.answer + [EOS] * n_eos
        assert real == [i < end for i in range(len(ids))]
        assert in_answer == [len(row.prompt) <= i < end for i in range(len(ids))]
        ends.append(end)
    assert x0.shape[1] == max(ends) <= max_length        # no column of padding only


def test_every_row_gets_the_same_length_of_answer_unless_max_length_forbids():
    rows = [Row(0, [5] * 3, [6]), Row(1, [5] * 6, [6] * 4), Row(2, [5] * 8, [6])]
    _, maskable, is_real = collate(rows, 5, 11, EOS)
    assert maskable.sum(dim=1).tolist() == [5, 5, 3]
    assert is_real.sum(dim=1).tolist() == [8, 11, 11]


def test_a_row_of_a_part_is_laid_out_as_in_the_whole_batch():
    rows = rows_of(40)
    whole, fill = batch_at(2, rows, 12, seed=1)
    x0, maskable, is_real = collate(whole, fill, 19, EOS)
    for part in range(3):
        few, fill = batch_at(2, rows, 12, seed=1, part=part, n_parts=3)
        y0, y_maskable, y_real = collate(few, fill, 19, EOS)
        for b, row in enumerate(few):
            i = whole.index(row)
            assert y0[b][y_real[b]].tolist() == x0[i][is_real[i]].tolist()
            assert y_maskable[b].sum() == maskable[i].sum()


# ---- what must not change, because numbers on file were made with it ----


@pytest.mark.parametrize("task, hashes", [
    (toy, ("d338e27d2f3098d0", "9944e9be65576714", "20ed1323dff92b1b")),
    (toy_base, ("dd09cca694432f79", "eb84366b36fe1455", "6bd7b24c98999bfc"))])
def test_the_first_200_rows_of_each_toy_split_are_those_of_all_results_so_far(task, hashes):
    for split, expected in zip(SPLITS, hashes):
        text = "\n".join(row.prompt + row.answer for row in task.load(split, n=200))
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == expected, split


@pytest.mark.parametrize("task, n_train", [(toy, 40_000), (toy_base, 20_000)])
def test_the_toys_have_as_many_rows_as_their_docstrings_say(task, n_train):
    assert len(task.load("train")) == n_train and len(task.load("test")) == 1_000


def test_the_order_of_an_epoch_is_that_of_all_runs_so_far():
    rows = [Row(i, [1], [2]) for i in range(10)]
    found = [[row.example_id for row in batch_at(step, rows, 10, seed=42)[0]] for step in (0, 1)]
    assert found == [[3, 2, 1, 8, 4, 6, 5, 7, 0, 9], [2, 9, 5, 6, 1, 8, 3, 4, 0, 7]]


def test_the_masks_of_a_row_are_those_of_all_runs_so_far():
    [generator] = row_generators(42, 3, [7])
    assert generator.initial_seed() == 5563417557621859242
    found = uniform((1, 3), [generator], "cpu")
    torch.testing.assert_close(found, torch.tensor([[0.8800, 0.5370, 0.7388]]), atol=1e-4, rtol=0)


# ---- edges of a local folder ----


def test_256_rows_are_all_held_out_and_one_more_is_a_row_to_train_on(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", some_rows(256))
    assert "256 rows" in sentence(gsm8k.load, "train", str(tmp_path), kind=ValueError)
    write_jsonl(tmp_path / "train.jsonl", some_rows(257))
    assert len(gsm8k.load("train", str(tmp_path))) == 1
    assert len(gsm8k.load("validation", str(tmp_path))) == 256


def test_of_a_plain_and_a_gzipped_file_the_plain_one_is_read(tmp_path):
    write_jsonl(tmp_path / "test.jsonl.gz", some_rows(5))
    assert len(gsm8k.load("test", str(tmp_path))) == 5
    write_jsonl(tmp_path / "test.jsonl", some_rows(3))
    assert len(gsm8k.load("test", str(tmp_path))) == 3


def test_questions_that_differ_in_a_capital_have_two_ids():
    assert len({*map(common.hash_of, ["a B", "a b", "A b"])}) == 3
    assert common.hash_of("a\u00e9") == "f093160356ec"         # as in the files of answers so far


def test_the_rows_of_a_batch_are_dealt_to_its_parts_in_turn():
    """As gather_batch takes it, which puts the parts together again."""
    rows = rows_of(40)
    whole, _ = batch_at(1, rows, 24, seed=3)
    for part in range(4):
        dealt = [whole[i] for i in range(24) if i % 4 == part]
        assert batch_at(1, rows, 24, 3, part, 4)[0] == dealt


def test_half_a_character_is_escaped_in_what_is_written(tmp_path):
    files.write_text(tmp_path / "page", "a\udcffb")
    files.write_json(tmp_path / "x.json", {"a\udcff": 1})
    assert (tmp_path / "page").read_text() == "a\\udcffb"
    assert files.read_json(tmp_path / "x.json") == {"a\udcff": 1}
