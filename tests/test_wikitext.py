"""Laws of Wikitext: the raw file byte for byte, windows one after the other, all but the end."""
import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import DATA, sentence, write_jsonl
from pretrained.tokenizer import byte_tokenizer, toy_tokenizer
from tasks import wikitext

REAL = DATA / "wikitext"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason=f"the rows are not at {REAL}")
RAW = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"    # wiki.test.raw


@needs_real_rows
def test_the_rows_join_to_the_raw_file_byte_for_byte():
    text = wikitext.load_text("test", str(REAL)).encode()
    assert len(text) == 1_290_590 and hashlib.sha256(text).hexdigest() == RAW
    assert text.startswith(b" \n = Robert Boulter = \n \n Robert Boulter is an English film , ")


def test_an_empty_row_is_a_blank_line_and_others_stay_as_they_are(tmp_path):
    rows = ["", " = A = \n", "", "  b @-@ c \n", "no end", "\u2603\r\n"]
    folder = write_jsonl(tmp_path / "test.jsonl", [{"text": text} for text in rows])
    assert wikitext.load_text("test", folder) == \
        " \n = A = \n \n  b @-@ c \nno end\u2603\r\n"


@pytest.mark.parametrize("wrong", ({}, {"text": None}, {"text": 3}, {"text": ["a"]}, {"line": "a"}))
def test_an_ugly_row_is_one_sentence_with_its_number(tmp_path, wrong):
    folder = write_jsonl(tmp_path / "test.jsonl", [{"text": "a"}, wrong])
    said = sentence(wikitext.load_text, "test", folder, kind=ValueError)
    assert said == f"{folder}/test.jsonl, row 2: 'text' must be a text"


def test_a_missing_file_is_one_sentence(tmp_path):
    said = sentence(wikitext.load_text, "test", str(tmp_path), kind=FileNotFoundError)
    assert "test.jsonl" in said


@settings(deadline=None, max_examples=50)
@given(text=st.text(min_size=1, max_size=200), length=st.integers(1, 40))
@pytest.mark.parametrize("bos", ([], [5]))
def test_windows_follow_each_other_and_only_a_partial_one_is_lost(bos, text, length):
    tok = byte_tokenizer()
    tok.bos = bos
    ids = tok.encode(text)
    if len(ids) < length:
        assert f"no window of {length}" in sentence(wikitext.windows, text, tok, length)
        return
    windows = wikitext.windows(text, tok, length)
    assert windows.dtype == torch.long and windows.shape == (len(ids) // length, len(bos) + length)
    joined = windows[:, len(bos):].flatten().tolist()
    assert joined == ids[:len(joined)] and len(ids) - len(joined) < length
    assert windows[:, :len(bos)].tolist() == [bos] * len(windows)


@pytest.mark.parametrize("limit", (1, 2, 3, 9, 10))
def test_a_limit_spreads_evenly_over_the_text_and_is_always_the_same(limit):
    tok, text = byte_tokenizer(), "".join(map(chr, range(40, 90)))
    every = wikitext.windows(text, tok, 5).tolist()
    some = wikitext.windows(text, tok, 5, limit).tolist()
    places = [every.index(window) for window in some]
    assert len(set(places)) == limit and places[0] == 0
    gaps = [b - a for a, b in zip(places, places[1:] + [len(every)])]
    assert max(gaps) - min(gaps) <= 1


def test_a_limit_of_zero_or_of_more_than_there_are_takes_all():
    tok, text = toy_tokenizer(), "a" * 40
    for limit in (0, 10, 11, 1000):
        assert wikitext.windows(text, tok, 4, limit).shape == (10, 4)


@pytest.mark.parametrize("text, length", (("", 5), ("abcd", 5), ("abcd", 0), ("abcd", -1)))
def test_no_window_is_one_sentence(text, length):
    said = sentence(wikitext.windows, text, byte_tokenizer(), length, kind=ValueError)
    assert said == f"a text of {len(text)} tokens has no window of {length}"


@needs_real_rows
def test_the_real_text_has_its_windows():
    tok, text = byte_tokenizer(), wikitext.load_text("test", str(REAL))
    assert wikitext.windows(text, tok).shape == (1_290_590 // 512, 512)
    assert wikitext.windows(text, tok, limit=128).shape == (128, 512)
