"""Laws of Django: blanks never matter, a prefix is enough, and train's own pairs are told apart."""
import gzip
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import DATA, SPLITS, sentence, write_jsonl
from tasks import django
from tasks.common import Example, few_shot

REAL = DATA / "django"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason=f"the Django rows are not at {REAL}")


def example_of(gold, in_train=None):
    return Example("", "", {"gold": gold, "in_train": in_train})


# ---- the metric, row by row: prediction, gold, prefix match, exact match ----

ROWS = [
    ("x = 1", "x = 1", True, True),
    ("x = 2", "x = 1", False, False),
    ("x=1", "x = 1", True, True),
    ("  x  =\t1  ", "x = 1", True, True),
    ("x = 1", "x=1", True, True),
    ("x\u00a0=\u30001", "x = 1", True, True),
    ("from django.conf import settings", "from django . conf import settings", True, True),
    ("if sys.platform.startswith('java'):", "if sys . platform . startswith ( 'java' ) :", True,
     True),
    ("foo(\n    a,\n    b)", "foo ( a , b )", True, True),
    # a prefix is enough, of the prediction and not of the gold
    ("x = 10", "x = 1", True, False),
    ("x = 1", "x = 10", False, False),
    ("x = 1\nx = 2", "x = 1", True, False),
    ("x = 1 # one", "x = 1", True, False),
    ("else: pass", "else :", True, False),
    ("passed = 1", "pass", True, False),
    ("y; x = 1", "x = 1", False, False),
    ("elif x:", "if x :", False, False),
    # letters, case, quotes and punctuation count
    ("X = 1", "x = 1", False, False),
    ("x = '1'", 'x = "1"', False, False),
    ("x = 1,", "x = 1", True, False),
    ("x = (1)", "x = 1", False, False),
    ("if x", "if x :", False, False),
    ("x = '\u00e9'", "x = 'e\u0301'", False, False),
    ("x\u200b = 1", "x = 1", False, False),
    ("x = 'a b'", "x = 'ab'", True, True),               # in literals too, as documented
    # nothing is never right
    ("", "x = 1", False, False),
    (" \n\t", "x = 1", False, False),
    ("", "", False, False),
    ("x", "", False, False),
    ("x", " \n ", False, False),
    # what a model writes around it
    ("x = 1\n\nDescription: y is 2.\nCode: y = 2", "x = 1", True, True),
    ("x = 1\nDescription: y is 2.\nCode: y = 2", "x = 1", True, True),
    ("x = 1\n\nThis sets x.", "x = 1", True, True),
    ("\n\nx = 1", "x = 1", True, True),
    ("Code: x = 1", "x = 1", True, True),
    ("```python\nx = 1\n```", "x = 1", True, True),
    ("Here is the code:\n\n```python\nx = 1\n```\nIt sets x.", "x = 1", True, True),
    ("```\nx = 1\n\ny = 2\n```", "x = 1", True, True),
    ("Sure! x = 1", "x = 1", False, False),
    ("warn ( '`a` is old' )", "warn ( '`a` is old' )", True, True),
    ("code : 1", "code : 1", True, True),
]


@pytest.mark.parametrize("prediction, gold, prefix, exact", ROWS,
                         ids=[repr(row)[:60] for row in ROWS])
def test_the_verdicts_on_an_ugly_row(prediction, gold, prefix, exact):
    assert django.score(prediction, example_of(gold)) is prefix
    assert django.exact(prediction, example_of(gold)) is exact


@pytest.mark.parametrize("completion, prediction", [
    ("", None), (" \n ", None), ("x", "x"), (" x \n", "x"), ("x\ny", "x\ny"), ("x\n \ny", "x"),
    ("x\r\n\r\ny", "x"), ("code:", None), ("Code:\nx", "x"), ("```\nx\n```", "x"),
    ("```\n```", None), ("a\n```\nx\n```\n```\ny\n```", "x"), ("x\n```", "x"),
    ("```python\nx", "x"), ("`x`", "x"), ("```x```", "x"), ("x '`'", "x '`'"), ("Code: `x`", "x"),
    ("Description: x", "Description: x"), ("x\nDescription: y", "x"), ("\nDescription: y", None)])
def test_the_prediction_in_a_completion(completion, prediction):
    assert django.extract(completion) == prediction


@settings(deadline=None)
@given(text=st.text() | st.text(alphabet="x=1 \n\t`:") |
       st.lists(st.sampled_from(["```", "\n", "\nDescription:", "Code:", "x", " "])).map("".join))
def test_no_text_breaks_the_metric(text):
    example = example_of("x = 1")
    assert django.score(text, example) in (True, False)
    assert not django.exact(text, example) or django.score(text, example)
    prediction = django.extract(text)
    assert prediction is None or prediction and prediction == prediction.strip()


@settings(deadline=None)
@given(gold=st.text(alphabet="xyz.()='\"", min_size=1),
       blanks=st.lists(st.sampled_from(["", " ", "\t", "\n", "\u2003"]), min_size=1),
       more=st.text(alphabet="xyz "))
def test_blanks_anywhere_and_more_text_after_it_leave_the_verdict_as_it_is(gold, blanks, more):
    spread = "".join(char + blanks[i % len(blanks)] for i, char in enumerate(gold))
    if "\n" not in blanks:                               # a blank line would end the prediction
        assert django.exact(spread, example_of(gold))
        assert django.score(spread + more, example_of(gold))
    assert django.exact(gold, example_of(spread))


@pytest.mark.parametrize("text", ["a" * 10_000_000, " " * 10_000_000, "\n" * 3_000_000,
                                  "`" * 3_000_000, "```\n" * 1_000_000, "\n \t" * 1_000_000,
                                  "```" + "a" * 3_000_000, "code:" * 1_000_000,
                                  "\nDescription:" * 300_000],
                         ids=lambda text: repr(text[:12]))
def test_a_huge_prediction_takes_no_time(text):
    began = time.process_time()
    assert not django.score(text, example_of("x = 1"))
    assert time.process_time() - began < 5


# ---- the shares beside the score ----


def test_extra_scores_tell_seen_pairs_from_unseen_ones():
    examples = [example_of("a", True), example_of("b", False), example_of("c", False),
                example_of("d", False)]
    assert django.extra_scores(examples, ["a", "b", "c c", "x"]) == {
        "exact_match": 2 / 4, "unseen_match": 2 / 3, "seen_match": 1, "in_train": 1 / 4}
    assert django.extra_scores(examples[1:], ["b", "c", "x"]) == {
        "exact_match": 2 / 3, "unseen_match": 2 / 3, "in_train": 0}
    assert django.extra_scores([example_of("a")], ["a"]) == {"exact_match": 1}
    assert django.extra_scores([], []) == {}
    with pytest.raises(ValueError):
        django.extra_scores(examples, ["a"])


@needs_real_rows
def test_the_share_of_test_pairs_in_train_is_found_by_looking_at_the_files():
    pairs = {name: [(row["anno"].strip(), row["code"].strip()) for row in
                    map(json.loads, gzip.open(REAL / f"{name}.jsonl.gz", "rt"))]
             for name in ("train", "test")}
    examples = django.load("test", str(REAL))
    seen = [pair in pairs["train"] for pair in pairs["test"]]
    assert [example.meta["in_train"] for example in examples] == seen and sum(seen) == 145
    code = dict(pairs["train"])                          # answers by copying, or not at all
    copied = [code[anno] if pair_seen else "" for (anno, _), pair_seen in zip(pairs["test"], seen)]
    scores = django.extra_scores(examples, copied)
    assert scores["unseen_match"] == 0 and scores["seen_match"] > 0.9
    assert scores["in_train"] == 145 / 1263


# ---- the rows ----


@needs_real_rows
def test_splits_have_their_sizes_and_every_row_its_own_id():
    splits = {split: django.load(split, str(REAL)) for split in SPLITS}
    assert [len(splits[split]) for split in SPLITS] == [16_000, 1_000, 1_263]
    ids = [example.meta["id"] for examples in splits.values() for example in examples]
    assert len(set(ids)) == len(ids)
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test")):
        rows = map(json.loads, gzip.open(REAL / f"{name}.jsonl.gz", "rt"))
        for row, example in zip(rows, splits[split], strict=True):      # in file order
            assert example.prompt == f"Description: {row['anno'].strip()}\nCode:"
            assert example.answer == f" {row['code'].strip()}"
            assert example.meta["gold"] == row["code"].strip()


@needs_real_rows
@pytest.mark.parametrize("split", SPLITS)
def test_every_gold_answer_is_right_and_exact_and_none_is_without_its_first_character(split):
    for example in django.load(split, str(REAL)):
        assert django.score(example.answer, example) and django.exact(example.answer, example)
        natural = "".join(example.meta["gold"].split())
        assert django.exact(natural, example)
        assert not django.exact(natural[1:], example) and not django.score(natural[:-1], example)


def some_rows(n, anno="anno"):
    return [{anno: f" set x to {i}. ", "code": f"  x = {i} "} for i in range(n)]


@pytest.mark.parametrize("anno", ["anno", "nl"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_local_folder_gives_its_rows_stripped_and_in_order(anno, end, tmp_path):
    for name, rows in (("train", some_rows(4, anno)), ("dev", some_rows(6, anno)[3:]),
                       ("test", some_rows(5, anno)[2:])):
        write_jsonl(tmp_path / f"{name}.jsonl{end}", rows)
    train, validation, test = (django.load(split, str(tmp_path)) for split in SPLITS)
    assert [e.answer for e in train] == [f" x = {i}" for i in range(4)]
    assert [e.meta["gold"] for e in validation] == [f"x = {i}" for i in (3, 4, 5)]
    assert [e.meta["in_train"] for e in test] == [True, True, False]
    assert few_shot(test[:1], train[:1])[0].prompt == (
        "Description: set x to 0.\nCode: x = 0\n\nDescription: set x to 2.\nCode:")


def test_without_train_nobody_claims_to_know_what_is_in_it(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", some_rows(3))
    examples = django.load("test", str(tmp_path))
    assert [example.meta["in_train"] for example in examples] == [None] * 3
    assert set(django.extra_scores(examples, ["x"] * 3)) == {"exact_match"}


def test_the_hub_is_asked_for_its_own_names(monkeypatch):
    asked = []

    def load_rows(split, data_dir, hub_name):
        asked.append((split, data_dir, hub_name))
        return some_rows(2, "nl")
    monkeypatch.setattr(django, "load_rows", load_rows)
    assert len(django.load("validation")) == 2
    assert asked == [(split, "", "AhmedSSoliman/DJANGO") for split in ("validation", "train")]


def test_a_row_keeps_its_id_where_rows_are_missing_and_a_repeated_row_has_one_of_its_own(tmp_path):
    rows = [*some_rows(3), {"anno": "set x to 0.", "code": "x = 1"}, *some_rows(1)]
    write_jsonl(tmp_path / "test.jsonl", rows)
    ids = [example.meta["id"] for example in django.load("test", str(tmp_path))]
    assert len(set(ids)) == 5 and ids[4] == f"{ids[0]}-2"
    write_jsonl(tmp_path / "test.jsonl", rows[:1] + rows[2:])
    assert [e.meta["id"] for e in django.load("test", str(tmp_path))] == ids[:1] + ids[2:]


@pytest.mark.parametrize("row", [{"anno": "a"}, {"code": "c"}, {"anno": "a", "code": None},
                                 {"anno": 1, "code": "c"}, {"anno": " ", "code": "c"},
                                 {"anno": "a", "code": "\n"}], ids=str)
def test_a_broken_row_is_one_sentence_that_names_it(row, tmp_path):
    folder = write_jsonl(tmp_path / "train.jsonl", some_rows(3) + [row])
    assert f"{folder}/train.jsonl, row 4" in sentence(django.load, "train", folder, kind=ValueError)


def test_a_missing_file_is_one_sentence_that_names_it(tmp_path):
    said = sentence(django.load, "validation", str(tmp_path), kind=FileNotFoundError)
    assert "dev.jsonl" in said
