"""Laws of published tokenizers: what the `tokenizers` library says, token for token, or an error.

The vocabularies are learnt here, in the pipelines of LLaDA, Dream, GPT-2, SmolLM2 and Llama 3; the
published files of SmolLM2 are compared where its package is installed, others where the environment
says where they are.
"""
import base64
import json
import os
import random
import shutil
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jinja2                           # torch needs it
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sample
from helpers import DATA, SPLITS, sentence
from pretrained import bpe
from pretrained.chat_format import chat_ids
from pretrained.tokenizer import (Tokenizer, byte_tokenizer, load_tokenizer, toy_tokenizer,
                                  word_tokenizer)
from published import ADDED, HEADERS, TEACHING, UGLY, WHOLE, learn_family
from tasks.common import Example, load_examples, tokenize

tokenizers = pytest.importorskip(
    "tokenizers", reason="the library to compare with: pip install -r tests/requirements.txt")

THINK = ("<think>", "</think>")
CHATS = [family for family in ADDED if family != "gpt2"]
MASK = {"llada": "<|mdm_mask|>", "base": "<|mdm_mask|>", "smol": "<empty_output>",
        "llama3": "<|MASK|>"}
BOS = {"dream": ["<|beginoftext|>"], "llama3": ["<|begin_of_text|>"]}


def later_than_unicode_9():
    """Characters that the library, whose NFC has the tables of Unicode 9, leaves as they come.

    Python composes and orders these too. The smallest example is 'a\\u07fd\\u0323': it only matters
    where such a mark follows another one, so both are let be.
    """
    nfc = tokenizers.normalizers.NFC().normalize_str
    strange = set()
    for c in map(chr, range(0x80, 0x110000)):
        if unicodedata.combining(c) and any(
                nfc(text) != unicodedata.normalize("NFC", text)
                for text in (f"a{c}\u0323", f"a\u0301{c}", f"a{c}\u0301\u0327")):
            strange.add(c)
        parts = unicodedata.decomposition(c)
        if parts and parts[0] != "<":
            parts = unicodedata.normalize("NFD", c)
            if nfc(parts) != unicodedata.normalize("NFC", parts):
                strange |= {c, *parts}
    return strange


def numerals(family):
    """The characters that the family's first step takes for numbers: each is a piece of its own."""
    every = [chr(i) for i in range(0x80, 0x110000) if not 0xd800 <= i < 0xe000]
    if family == "smol":
        step = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        pieces = [piece for piece, _ in step.pre_tokenize_str("".join(f"{c}aa" for c in every))]
        return {piece for piece in pieces if len(piece) == 1}
    numbers = tiktoken.Encoding("", pat_str=r"\p{N}", special_tokens={},
                                mergeable_ranks={bytes([i]): i for i in range(256)})
    return set(bytes(numbers.encode_ordinary("".join(every))).decode())


# the library may know numerals of a newer Unicode than tiktoken, or the other way round
STRANGE = later_than_unicode_9() | (numerals("smol") ^ numerals("tiktoken"))
SPELLS = sorted({*sum(ADDED.values(), []), *UGLY} - {" " * 300}) + [
    "<|", "|>", "'", "'s", "'LL", "\u2019", "\u0301", "\u0338", "\u200d", " ", "  ", "\n", "\r\n",
    "12", " 3", "   4", "\n5", "\u0663", " \u00bd", "\t\u2160", "\u00b2", "\u3007", *WHOLE]
texts = st.lists(st.text().map(lambda text: "".join(c for c in text if c not in STRANGE))
                 | st.text("ab '\n1.\u00e9\u0301\u4e2d") | st.sampled_from(SPELLS)).map("".join)


@pytest.fixture(scope="session")
def tok(folders):
    """{family: our tokenizer}"""
    return {family: load_tokenizer(str(folders / family)) for family in ADDED}


@pytest.fixture(scope="session")
def chatting(folders):
    """{family: our tokenizer, whose prompts are turns of a chat}"""
    return {family: load_tokenizer(str(folders / family), chat=True) for family in CHATS}


@pytest.fixture(scope="session")
def lib(folders):
    """{family: the library's, which finds added tokens}"""
    return {family: library(folders, family) for family in ADDED}


@pytest.fixture(scope="session")
def plain_lib(folders):
    """{family: the library's, to which the names of added tokens are text}"""
    libs = {family: library(folders, family) for family in ADDED}
    for one in libs.values():
        one.encode_special_tokens = True
    return libs


def library(folders, family):
    path = folders / ("dream.json" if family == "dream" else f"{family}/tokenizer.json")
    return tokenizers.Tokenizer.from_file(str(path))


def write(path, content):
    path.write_text(json.dumps(content))
    return path.parent


def ids_of(one, text):
    return one.encode(text, add_special_tokens=False).ids


each_family = pytest.mark.parametrize("family", ADDED)
each_chat = pytest.mark.parametrize("family", CHATS)


# ---- equal to the library ----


@each_family
def test_ugly_texts_become_the_very_tokens_of_the_library(family, tok, lib, plain_lib):
    for text in UGLY + TEACHING:
        assert tok[family].encode(text) == ids_of(plain_lib[family], text), repr(text)
        assert tok[family].encode(text, specials=True) == ids_of(lib[family], text), repr(text)


@each_family
@settings(deadline=None, max_examples=150)
@given(text=texts)
def test_any_text_becomes_the_very_tokens_of_the_library(family, tok, lib, plain_lib, text):
    assert tok[family].encode(text) == ids_of(plain_lib[family], text)
    assert tok[family].encode(text, specials=True) == ids_of(lib[family], text)


@each_family
@settings(deadline=None, max_examples=150)
@given(text=texts)
def test_text_is_only_text_and_comes_back_composed(family, tok, text):
    ids = tok[family].encode(text)
    assert not set(ids) & set(tok[family].added.values())
    composed = family in ("llada", "base", "dream", "qwen")
    assert tok[family].decode(ids) == (unicodedata.normalize("NFC", text) if composed else text)


@each_family
def test_the_256_bytes_are_tokens_and_any_bytes_decode_as_in_the_library(family, tok, lib):
    one = tok[family]
    ids = [one.pieces.index(bytes([byte])) for byte in range(256)]
    assert len(set(ids)) == 256
    assert [one.decode([i]) for i in ids] == [
        bytes([byte]).decode(errors="replace") for byte in range(256)]
    rng = random.Random(0)
    for _ in range(300):
        some = rng.choices(one.ranked, k=12)
        assert one.decode(some) == lib[family].decode(some)


@pytest.mark.parametrize("regex", [r"\p{L}+", r"'s|\s", r"[^\n]+"])
def test_what_the_pattern_leaves_out_is_a_word_as_in_the_library(regex, folders, tmp_path):
    spec = spec_of(folders)
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = regex
    ours, theirs = both(spec, tmp_path)
    for text in UGLY + TEACHING:
        assert ours.encode(text) == ids_of(theirs, text), repr(text)


def spec_of(folders, family="llada"):
    return json.loads((folders / family / "tokenizer.json").read_text())


def both(spec, folder):
    """Ours and the library's from one file; to both, text is text."""
    write(folder / "tokenizer.json", spec)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return load_tokenizer(str(folder)), theirs


def test_ids_need_not_be_in_the_order_of_the_merges(folders, tmp_path, tok):
    spec = spec_of(folders)
    vocab = spec["model"]["vocab"]
    ids = list(vocab.values())
    random.Random(0).shuffle(ids)
    spec["model"]["vocab"] = dict(zip(vocab, ids))
    ours, theirs = both(spec, tmp_path)
    assert not ours.ids_are_ranks and tok["llada"].ids_are_ranks and ours != tok["llada"]
    theirs_all = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in UGLY + TEACHING:
        assert ours.encode(text) == ids_of(theirs, text)
        assert ours.encode(text, specials=True) == ids_of(theirs_all, text)
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)


def test_merges_may_be_written_as_texts_and_a_file_may_ask_for_no_nfc(folders, tmp_path):
    spec = spec_of(folders)
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    spec["normalizer"] = None
    ours, theirs = both(spec, tmp_path)
    for text in UGLY + TEACHING:
        assert ours.encode(text) == ids_of(theirs, text)
        assert ours.decode(ours.encode(text)) == text


def test_a_word_that_no_merge_makes_is_read_but_never_written(folders, tmp_path):
    spec = spec_of(folders)
    free = 5 + max(token["id"] for token in spec["added_tokens"])
    spec["model"]["vocab"] |= {"qzqz": free, "\u4e2d\u6587": free + 1}   # one is not in bytes
    ours = load_tokenizer(str(write(tmp_path / "tokenizer.json", spec)))
    assert ours.decode([free, free + 1]) == "qzqz\u4e2d\u6587"
    assert not {free, free + 1} & set(ours.encode("qzqz \u4e2d\u6587"))
    assert ours.n_vocab == free + 2
    assert set(range(free - 4, free)) <= set(ours.never)        # gaps


def test_a_word_of_llama_3_is_a_token_alone_and_not_within_a_longer_one(tok, lib):
    one = tok["llama3"]
    for word in WHOLE:
        [i] = one.encode(word)
        assert one.pieces[i] == word.encode()
        longer = one.encode(f"x{word.strip()}y")
        assert i not in longer and longer == ids_of(lib["llama3"], f"x{word.strip()}y")


def merges_of(rng):
    """A few merges that nobody learnt, of a, b and c, in any order; several may make one token."""
    known, merges = list("abc"), []
    for _ in range(rng.randrange(1, 16)):
        pair = [rng.choice(known), rng.choice(known)]
        if pair not in merges or rng.random() < 0.1:
            merges.append(pair)
            known.append("".join(pair))
    if rng.random() < 0.5:
        rng.shuffle(merges)
    return merges


@pytest.mark.parametrize("whole_words", [False, True])
def test_merges_that_nobody_learnt_are_the_librarys(whole_words, folders):
    """Pairs that never meet do no harm, nor does a pair whose parts are made by later merges."""
    spec, rng, outcomes = spec_of(folders), random.Random(0), Counter()
    letters = {char: i for i, char in enumerate(bpe.BYTE_OF)}
    spec["model"]["ignore_merges"] = whole_words
    for _ in range(120):
        merges = merges_of(rng)
        made = ["".join(pair) for pair in merges]
        made += ["".join(rng.choices("abc", k=rng.randrange(2, 7))) for _ in range(2)]
        made = list(dict.fromkeys(made))
        words = ["".join(rng.choices("abc", k=rng.randrange(1, 9))) for _ in range(60)] + made
        spec["model"].update(merges=merges, vocab=letters | {
            token: 256 + n for n, token in enumerate(made)})
        spec["added_tokens"] = [{**token, "id": 256 + len(made) + n}
                                for n, token in enumerate(spec["added_tokens"])]
        theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
        try:
            ours = Tokenizer("of no one", bpe.read_tokenizer_json(spec))
        except ValueError as error:
            assert whole_words and "two parts" in str(error)
            outcomes["refused"] += 1
            continue
        outcomes["equal"] += 1
        assert all(ours.encode(word) == ids_of(theirs, word) for word in words), merges
    assert outcomes["equal"] > (30 if whole_words else 119), outcomes


def merged_slowly(word, pairs, least):
    """BPE as it is defined: look at all pairs, merge the first of lowest rank, and again."""
    parts = [word[i:i + 1] for i in range(len(word))]
    while len(parts) > least:
        found = [(pairs[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in pairs]
        if not found:
            break
        i = min(found)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_words_are_merged_as_bpe_is_defined():
    rng = random.Random(0)
    for _ in range(5000):
        made = [bytes(rng.choices(b"abc", k=rng.randrange(2, 6))) for _ in range(rng.randrange(20))]
        pairs = {(token[:k], token[k:]): rng.randrange(99) for token in made
                 for k in range(1, len(token)) if rng.random() < 0.7}
        word, least = bytes(rng.choices(b"abc", k=rng.randrange(14))), rng.randrange(1, 4)
        assert bpe.merged(word, pairs, least) == merged_slowly(word, pairs, least), (word, pairs)


@pytest.mark.parametrize("unit, lengths", [(b"a", range(2, 17)), (b"ab", (2,)),
                                           (b"ab", range(2, 9))])
def test_merging_takes_nearly_linear_time(unit, lengths):
    ranks = {(unit * (2 ** k))[:2 ** k]: k for k in range(1, 16)} | {
        (unit * k)[:k]: 20 + k for k in lengths}
    pairs = {(token[:k], token[k:]): rank for token, rank in ranks.items() if len(token) < 300
             for k in range(1, len(token))}
    pairs |= {(token[:len(token) // 2],) * 2: rank for token, rank in ranks.items()}
    seconds = []
    for n in (1 << 13, 1 << 15):
        began = time.process_time()
        assert b"".join(bpe.merged((unit * n)[:n], pairs)) == (unit * n)[:n]
        seconds.append(time.process_time() - began)
    assert seconds[1] < 10 * max(seconds[0], 0.02)      # 4 times as long: 16 if it were quadratic


# ---- what a tokenizer knows ----


@each_family
def test_the_ids_that_the_loop_and_the_sampler_need(family, tok, lib):
    one, id_of = tok[family], lib[family].token_to_id
    assert one.eos_id == id_of("<|end_of_text|>" if family == "llama3" else "<|endoftext|>")
    assert one.mask_id == id_of(MASK.get(family, "<|mask|>"))
    assert one.bos == [id_of(text) for text in BOS.get(family, [])]
    assert one.n_vocab == lib[family].get_vocab_size()
    sayable = {id_of(text) for text in ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>",
                                        "<|im_end|>")}
    assert set(one.never) == {id_of(text) for text in ADDED[family]} - sayable
    assert one.mask_id in one.never


@each_family
def test_decode_ends_where_the_text_or_the_turn_does(family, tok):
    one = tok[family]
    a, b = one.encode("twelve"), one.encode("three")
    for end in {one.eos_id, one.eot_id} - {None}:
        assert one.decode(a + [end] + b) == "twelve"
    assert one.decode(a + one.never + b) == "twelvethree"


@each_family
def test_show_draws_masks_and_ends_and_names_other_added_tokens(family, tok):
    one = tok[family]
    name = ADDED[family][4]
    ids = [one.mask_id, *one.encode("\U0001f680x"), one.added[name], one.eos_id]
    assert one.show(ids) == f"\u2591\U0001f680x{name}\u00b7"


@each_family
def test_a_model_of_another_vocabulary_does_not_fit(family, tok):
    one = tok[family]
    fits = dict(mask_id=one.mask_id, eos_id=one.eos_id, vocab_size=one.n_vocab + 50)
    one.check_fits(SimpleNamespace(**fits))
    for change in ({"mask_id": 1}, {"eos_id": 1}, {"vocab_size": one.n_vocab - 1}):
        with pytest.raises(ValueError, match=family):
            one.check_fits(SimpleNamespace(**{**fits, **change}))


@each_family
def test_a_saved_tokenizer_is_the_published_files_byte_for_byte(family, folders, tmp_path):
    source, saved = tmp_path / "source", tmp_path / "saved"
    shutil.copytree(folders / family, source)
    saved.mkdir()
    (source / "special_tokens_map.json").write_text("{ }\n")
    one = load_tokenizer(str(source))
    content = {path.name: path.read_bytes() for path in source.iterdir()}
    shutil.rmtree(source)
    one.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == content
    assert load_tokenizer(str(saved)) == one != byte_tokenizer()


# ---- files that are damaged or ask for more ----


def asks(*path, **to):
    """A change of the file: spec[path...] gets the items of `to`."""
    def change(spec):
        for key in path:
            spec = spec[key]
        spec.update(to)
    return change


def merge_again(spec):
    spec["model"]["merges"].append(spec["model"]["merges"][0])


def vocab_without(token):
    return lambda spec: spec["model"]["vocab"].pop(token)


def vocab_with(token, i):
    return lambda spec: spec["model"]["vocab"].update({token: i})


def merge(*pair):
    return lambda spec: spec["model"]["merges"].append(list(pair))


def split(**to):
    return asks("pre_tokenizer", "pretokenizers", 0, **to)


def byte_level(**to):
    return asks("pre_tokenizer", "pretokenizers", 1, **to)


TEMPLATE = {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}]}
BAD = [
    ("ignore_merges", lambda spec: (asks("model", ignore_merges=True)(spec),
                                    vocab_with("\u00ff\u00ff", 5000)(spec))),
    ("are words", lambda spec: (asks("model", ignore_merges=True)(spec), vocab_with(
        spec["added_tokens"][0]["content"], spec["added_tokens"][0]["id"])(spec))),
    ("byte_fallback", asks("model", byte_fallback=True)),
    ("dropout", asks("model", dropout=0.1)),
    ("end_of_word_suffix", asks("model", end_of_word_suffix="</w>")),
    ("WordPiece", asks("model", type="WordPiece")),
    ("NFKC", asks(normalizer={"type": "NFKC"})),
    ("Lowercase", asks(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"},
                                                                      {"type": "Lowercase"}]})),
    ("Whitespace", asks(pre_tokenizer={"type": "Whitespace"})),
    ("pre_tokenizer", asks(pre_tokenizer=None)),
    ("Removed", split(behavior="Removed")),
    ("invert", split(invert=True)),
    ("String", split(pattern={"String": " "})),
    ("add_prefix_space", byte_level(add_prefix_space=True)),
    ("use_regex", byte_level(use_regex=True)),
    ("TemplateProcessing", asks(post_processor={**TEMPLATE, "single": TEMPLATE["single"][::-1]})),
    ("TemplateProcessing", asks(post_processor={**TEMPLATE, "single": TEMPLATE["single"] * 2})),
    ("TemplateProcessing", asks(post_processor={**TEMPLATE, "single": []})),
    ("which ids '[CLS]' has", asks(post_processor={**TEMPLATE, "special_tokens": {}})),
    ("the ids [5]", asks(post_processor={**TEMPLATE, "special_tokens": {
        "[CLS]": {"id": "[CLS]", "ids": [5], "tokens": ["%"]}}})),
    ("BertProcessing", asks(post_processor={"type": "BertProcessing"})),
    ("individual Digits", asks(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]})),
    ("plain ByteLevel", asks(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True})),
    ("plain ByteLevel", asks(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False,
                                            "use_regex": False})),
    ("decoder", asks(decoder=None)),
    ("lstrip", asks("added_tokens", 0, lstrip=True)),
    ("rstrip", asks("added_tokens", 0, rstrip=True)),
    ("single_word", asks("added_tokens", 0, single_word=True)),
    ("normalized", asks("added_tokens", 0, normalized=True)),
    ("without text", asks("added_tokens", 2, content="")),
    ("two ids", vocab_with("<|endoftext|>", 9999)),
    ("share an id", vocab_with("qzqz", 5)),
    ("whole numbers", vocab_with("qzqz", "5")),
    ("2**24", vocab_with("qzqz", 1 << 40)),
    ("made by merges", asks("added_tokens", 2, content="A", id=32)),
    ("for the bytes [65]", vocab_without("A")),
    ("vocabulary lacks", merge("qzq", "z")), ("vocabulary lacks", merge("", "a")),
    ("stands for a byte", lambda spec: (vocab_with("\u4e2d", 5000)(spec),
                                        vocab_with("\u4e2da", 5001)(spec),
                                        merge("\u4e2d", "a")(spec))),
    ("vocabulary lacks", merge("!", "\u00ff")),
    ("two tokens", merge("a", "b", "c")),
    ("no mask", asks("added_tokens", 6, content="<|mdm_musk|>")),
    ("no <|endoftext|>", asks("added_tokens", 1, content="<|endoftexts|>")),
    ("'merges'", lambda spec: spec["model"].pop("merges")),
    ("no 'model'", lambda spec: spec.pop("model")),
    ("'added_tokens'", lambda spec: spec.pop("added_tokens")),
    ("list", asks("model", vocab=[1, 2])),
    ("Invalid character class", split(pattern={"Regex": "["})),
    ("not a regex", split(pattern={"Regex": None})), ("not a regex", split(pattern={"Regex": 7})),
    *[("empty words", split(pattern={"Regex": regex}))
      for regex in ("", "x*", "a)|(b", "(?=a)", r"\b", "(?:a|b)*?", "$")],
    ("too deeply", split(pattern={"Regex": "(" * 100_000})),
    ("has 8192 bytes; at most 4096", lambda spec: [(vocab_with("q" * 2 ** k, 5000 + k)(spec),
                                   merge(*["q" * 2 ** (k - 1)] * 2)(spec)) for k in range(1, 18)]),
]


@pytest.mark.parametrize("words, change", BAD)
def test_what_we_do_not_do_is_refused_in_one_sentence_that_names_it(words, change, folders,
                                                                     tmp_path):
    spec = spec_of(folders)
    change(spec)
    said = sentence(load_tokenizer, str(write(tmp_path / "tokenizer.json", spec)), kind=ValueError)
    assert str(tmp_path / "tokenizer.json") in said and words in said


@pytest.mark.parametrize("change", [
    asks(truncation={"direction": "Right", "max_length": 512, "stride": 0,
                                  "strategy": "LongestFirst"}),
    byte_level(trim_offsets=False), asks(post_processor=None), asks("model", unk_token="[CLS]"),
    asks("model", ignore_merges=False), lambda spec: spec["model"].pop("type"),
    asks(post_processor={**TEMPLATE, "single": TEMPLATE["single"][1:]}),
    asks(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]})])
def test_what_changes_no_token_is_not_refused(change, folders, tmp_path, tok):
    spec = spec_of(folders)
    change(spec)
    assert load_tokenizer(str(write(tmp_path / "tokenizer.json", spec))) == tok["llada"]


def test_of_a_pair_that_is_listed_twice_the_second_place_counts(folders, tmp_path, tok):
    spec = spec_of(folders)
    merge_again(spec)
    ours, theirs = both(spec, tmp_path)
    assert ours != tok["llada"]
    for text in UGLY + TEACHING:
        assert ours.encode(text) == ids_of(theirs, text), repr(text)


def test_older_files_of_gpt2_say_less(folders, tmp_path, tok):
    """No type of the model, no use_regex, and an end of text that is normalized, by nothing."""
    spec = spec_of(folders, "gpt2")
    del spec["model"]["type"], spec["pre_tokenizer"]["use_regex"]
    for token in spec["added_tokens"]:
        token["normalized"] = True
    assert load_tokenizer(str(write(tmp_path / "tokenizer.json", spec))) == tok["gpt2"]


# ---- which token is the mask ----


@pytest.mark.parametrize("settings, mask", [
    ({"tokenizer_config.json": {"mask_token": "<file_sep>"}}, "<file_sep>"),
    ({"tokenizer_config.json": {"mask_token": {"content": "<file_sep>"}}}, "<file_sep>"),
    ({"special_tokens_map.json": {"mask_token": "<file_sep>"}}, "<file_sep>"),
    ({"special_tokens_map.json": {"mask_token": "<repo_name>"},
      "tokenizer_config.json": {"mask_token": "<file_sep>"}}, "<file_sep>"),
    ({"special_tokens_map.json": {"mask_token": "<file_sep>"},
      "tokenizer_config.json": {"mask_token": None}}, "<file_sep>"),
    ({"tokenizer_config.json": {"mask_token": "<no_token>"}}, None), ({}, None)])
@pytest.mark.parametrize("other", ["<|mdm_mask|>", "<|mask|>", "<|MASK|>", "<[MASK]>"])
def test_the_mask_is_the_named_token_or_one_of_four(settings, mask, other, folders, tmp_path):
    spec = spec_of(folders, "smol")
    spec["added_tokens"][-1]["content"] = other
    folder = write(tmp_path / "tokenizer.json", spec)
    for name, content in settings.items():
        write(folder / name, content)
    one = load_tokenizer(str(folder))
    assert one.mask_id == one.added[mask or other] and one.mask_id in one.never


@pytest.mark.parametrize("content, words", [
    ("[", "tokenizer_config.json is not JSON"), ("[" * 100_000, "config.json is not JSON"),
    ("[]", "tokenizer_config.json is not a JSON object"), ('{"mask_token": 7}', "mask_token is 7"),
    ('{"mask_token": {"content": [1]}}', "mask_token is [1]"),
    ('{"mask_token": "<|endoftext|>"}', "end-of-text too"), ("{}", "no mask"),
    ('{"mask_token": "<|mask|>"}', "no mask"), ('{"chat_template": 7}', "chat_template is 7"),
    ('{"chat_template": [{"name": "x"}]}', "template")])
def test_settings_without_a_mask_are_one_sentence(content, words, folders, tmp_path):
    write(tmp_path / "tokenizer.json", spec_of(folders, "smol"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert words in sentence(load_tokenizer, str(tmp_path), kind=ValueError)


# ---- bytes without a token ----

RARE = [*range(4, 7), 0x16, 0x7f, 0xc0, 0xf1, 0xf2, 0xff]


def test_a_byte_without_a_token_is_refused_where_the_library_drops_it(folders, tmp_path):
    spec = spec_of(folders, "smol")
    char_of = {byte: char for char, byte in bpe.BYTE_OF.items()}
    for byte in RARE:
        vocab_without(char_of[byte])(spec)
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"]
                               if "".join(pair) in spec["model"]["vocab"]
                               and not {*"".join(pair)} & {char_of[byte] for byte in RARE}]
    write(tmp_path / "tokenizer_config.json", {"mask_token": "<empty_output>"})
    ours, theirs = both(spec, tmp_path)
    lost = ["\x04", "a\x7fb", "!\x16!", "\U00040000", "x\U0007ffff", "\U00080000", "\U000bffff"]
    for text in lost:
        assert theirs.decode(ids_of(theirs, text), skip_special_tokens=False) != text
        said = sentence(ours.encode, text, kind=ValueError)
        assert "has no token for" in said and repr(text) in said
    for text in ("\x03", "\U0003ffff", "\U000c0000", "\U0010ffff", *UGLY):
        if "\x7f" not in text:
            assert ours.encode(text) == ids_of(theirs, text)
            assert ours.decode(ours.encode(text)) == text


def damaged(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize("damage, words", [
    (damaged("vocab.json", b'{"a": 1'), "vocab.json"), (damaged("vocab.json", b"[]"), "vocab.json"),
    (damaged("vocab.json", b"{}"), "bytes"), (damaged("merges.txt", b"a b\nc\n"), "merge 1"),
    (damaged("merges.txt", b"\xff"), "utf-8"), (damaged("added_tokens.json", b"["), "vocab.json"),
    (damaged("merges.txt", b"a qzqz\n"), "merge 0"),
    (damaged("added_tokens.json", b'{"<|mask|>": 3}'), "<|mask|>"),
    (damaged("tokenizer_config.json", b'{"tokenizer_class": "GPT2Tokenizer"}'), "GPT2Tokenizer"),
    (damaged("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}'), "x")])
def test_damaged_files_of_the_slow_kind_are_one_sentence(damage, words, folders, tmp_path):
    shutil.copytree(folders / "dream", tmp_path / "dream")
    damage(tmp_path / "dream")
    assert words in sentence(load_tokenizer, str(tmp_path / "dream"), kind=ValueError)


def test_a_file_cut_anywhere_is_one_sentence(folders, tmp_path):
    content = (folders / "llada" / "tokenizer.json").read_bytes()
    for k in range(0, len(content), len(content) // 20):
        (tmp_path / "tokenizer.json").write_bytes(content[:k])
        assert str(tmp_path) in sentence(load_tokenizer, str(tmp_path), kind=ValueError)


# ---- our own file ----


def write_ours(folder, **changes):
    """Write the toy's tokenizer with these entries -> its folder."""
    toy_tokenizer().save(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    return str(write(folder / "tokenizer.json", {**spec, **changes}))


def encoded(change=None):
    """Return the toy's pieces in base64, after change(pieces)."""
    pieces = [base64.b64encode(piece).decode() for piece in toy_tokenizer().pieces]
    return (change(pieces) or pieces) if change else pieces


OURS = {
    "a byte missing": dict(pieces=encoded(lambda p: p.pop(97))),
    "the last byte missing": dict(pieces=encoded(lambda p: p[:255])),
    "no piece": dict(pieces=[]),
    "a byte doubled": dict(pieces=encoded(lambda p: p.insert(97, p[97]))),
    "a byte in place of another": dict(pieces=encoded(lambda p: p.__setitem__(97, p[98]))),
    "two bytes swapped": dict(pieces=encoded(lambda p: p[:97] + [p[98], p[97]] + p[99:])),
    "an empty byte": dict(pieces=encoded(lambda p: p.__setitem__(97, ""))),
    "an empty word": dict(pieces=encoded(lambda p: p.__setitem__(300, ""))),
    "two equal words": dict(pieces=encoded(lambda p: p.__setitem__(300, p[301]))),
    "a word that is a byte": dict(pieces=encoded(lambda p: p.append(p[97]))),
    "no base64": dict(pieces=encoded(lambda p: p.__setitem__(97, "!!!"))),
    "base64 with dirt": dict(pieces=encoded(lambda p: p.__setitem__(300, f"*{p[300]}"))),
    "base64 cut": dict(pieces=encoded(lambda p: p.__setitem__(300, "QUI"))),
    "no ASCII": dict(pieces=encoded(lambda p: p.__setitem__(300, "\u00e9"))),
    "a number": dict(pieces=encoded(lambda p: p.__setitem__(300, 7))),
    "no list": dict(pieces="abcd"), "null": dict(pieces=None), "an object": dict(pieces={"a": 1}),
    "a pattern of digits": dict(pattern="[0-9]+"), "a foreign pattern": dict(pattern="xxxx"),
    "a pattern of ASCII": dict(pattern=r"[\x00-\x7f]"), "without z": dict(pattern="[^z]"),
    "without Chinese": dict(pattern=r"[^\p{Han}]"), "without blanks": dict(pattern=r"\S"),
    "without newlines": dict(pattern="."), "without astral": dict(pattern=r"[\x{0}-\x{ffff}]"),
    "an empty pattern": dict(pattern=""), "empty words": dict(pattern=r"a*|[\s\S]"),
    "a broken pattern": dict(pattern="("), "a pattern that is none": dict(pattern=None),
    "a pattern of numbers": dict(pattern=[1]), "a name that is none": dict(name=[1]),
}


@pytest.mark.parametrize("change", OURS.values(), ids=OURS)
def test_our_own_file_is_not_trusted(change, tmp_path, capfd):
    said = sentence(load_tokenizer, write_ours(tmp_path, **change), kind=ValueError)
    assert str(tmp_path / "tokenizer.json") in said and len(said) < 1500
    assert capfd.readouterr().err == ""         # no stack of tiktoken's


def test_our_own_file_as_it_was_written_is_read(tmp_path):
    assert load_tokenizer(write_ours(tmp_path)) == toy_tokenizer()
    assert load_tokenizer(write_ours(tmp_path, pattern=r"[\s\S]")).encode("ab") == [97, 98]


@pytest.mark.parametrize("name", ["llada", "dream", "qwen", "toy", "bytes"])
def test_a_vocabulary_whose_text_does_not_come_back_is_refused(name, folders):
    one = load_tokenizer(name if name in ("toy", "bytes") else str(folders / name))
    pieces = list(one.pieces)
    a, b = one.encode("a") + one.encode("b")
    pieces[a], pieces[b] = pieces[b], pieces[a]
    Tokenizer("swapped", one.vocabulary._replace(pieces=pieces))        # consistent, so it is read
    for change in (dict(ranked=[i for i in one.ranked if i != a]), dict(pattern="[a-z]+")):
        with pytest.raises((ValueError, KeyError)):
            Tokenizer("damaged", one.vocabulary._replace(**change))


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"[1]", b"7", b'"pieces"',
                                     b"null", b"\xff\xfe\x00", b'{"a": %s}' % (b"9" * 5000), b""])
def test_a_file_that_is_no_object_or_too_deep_is_named(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert str(tmp_path / "tokenizer.json") in sentence(load_tokenizer, str(tmp_path),
                                                        kind=ValueError)


def test_a_file_or_a_pointer_in_place_of_a_tokenizer_is_told(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid x")
    assert "git lfs pull" in sentence(load_tokenizer, str(tmp_path), kind=ValueError)
    said = sentence(load_tokenizer, str(tmp_path / "tokenizer.json"), kind=FileNotFoundError)
    assert "is a file" in said and "folder" in said
    said = sentence(load_tokenizer, str(tmp_path / "none"), kind=FileNotFoundError)
    assert str(tmp_path / "none") in said and "tokenizer.json" in said and "merges.txt" in said
    assert "choose bytes, toy, words" in said
    assert "choose bytes" in sentence(load_tokenizer, "", kind=ValueError)


def test_a_folder_without_a_tokenizer_is_told_and_the_current_folder_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", str(tmp_path)):
        said = sentence(load_tokenizer, name, kind=FileNotFoundError)
        assert f"no tokenizer in {name} " in said and "choose" not in said
    byte_tokenizer().save(tmp_path)
    assert load_tokenizer(".") == byte_tokenizer()


# ---- where tiktoken panics ----


@pytest.mark.parametrize("family, text", [
    ("llada", " " * 1_300_000), ("dream", "\t" * 1_300_000), ("qwen", "a" + "\u3000" * 1_300_000),
    ("toy", "a" * 1_300_000)])
def test_a_word_of_a_million_characters_is_one_sentence(family, text, folders, capfd):
    one = load_tokenizer("toy" if family == "toy" else str(folders / family))
    for _ in range(2):
        said = sentence(one.encode, text, kind=ValueError)
        assert f"{len(text):,} characters" in said
    assert one.decode(one.encode("all is well")) == "all is well"
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "after\n"          # no stack, and stderr is what it was


@pytest.mark.parametrize("family", ["llada", "dream", "toy", "bytes"])
def test_long_texts_of_shorter_words_are_encoded(family, folders):
    one = load_tokenizer(family if family in ("toy", "bytes") else str(folders / family))
    text = " " * 300_000 + "7 apples \n" * 50_000
    assert one.decode(one.encode(text)) == text


def test_half_of_the_slow_kind_is_no_tokenizer(folders, tmp_path):
    shutil.copy(folders / "dream" / "vocab.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        load_tokenizer(str(tmp_path))


def test_either_file_of_added_tokens_is_enough(folders, tmp_path, tok):
    for name in ("added_tokens.json", "tokenizer_config.json"):
        folder = tmp_path / name
        shutil.copytree(folders / "dream", folder)
        (folder / name).unlink()
        assert load_tokenizer(str(folder)) == tok["dream"]


# ---- chats ----

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
ONE = [{"role": "user", "content": "How many?"}]
MANY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it 3\n\nor 4?"},
        {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]


def llada_text(messages, opening="<|startoftext|>"):
    turns = "".join(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>"
                    for m in messages)
    return f"{opening}{turns}<|start_header_id|>assistant<|end_header_id|>\n\n"


def chatml_text(messages):
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return f"{turns}<|im_start|>assistant\n"


@pytest.mark.parametrize("messages", [ONE, MANY])
def test_chats_are_the_published_texts(messages, tok, lib):
    system = SYSTEM if messages is ONE else ""
    assert chat_ids(tok["llada"], messages) == ids_of(lib["llada"], llada_text(messages))
    assert chat_ids(tok["dream"], messages) == ids_of(lib["dream"], system + chatml_text(messages))
    for family in ("qwen", "smol"):
        assert chat_ids(tok[family], messages) == ids_of(lib[family], chatml_text(messages))
    text = llada_text(messages, "<|begin_of_text|>")
    assert chat_ids(tok["llama3"], messages) == ids_of(lib["llama3"], text)


# Templates in the ways of the published ones; Jinja reads \n within a constant as a line end
LOOP = (r"{% for m in rest %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        r"{% endfor %}{{ '<|im_start|>assistant\n' }}")
OWN = (r"{% set rest = messages %}{% if rest[0].role == 'system' %}"
       r"{{ '<|im_start|>system\n' + rest[0].content + '<|im_end|>\n' }}{% set rest = rest[1:] %}")
CHATML = {
    "no default": OWN + "{% endif %}" + LOOP,
    "double quotes": OWN + r"""{% else %}{{- "<|im_start|>system\nI'm Q.<|im_end|>\n" }}"""
                     + "{% endif %}" + LOOP,
    "escapes": OWN + r"{% else %}{{ '<|im_start|>system\nI\'m in \\boxed{}.\n\u4e2d<|im_end|>\n' }}"
               + "{% endif %}" + LOOP,
    "line ends": "{% set rest = messages %}{% if rest[0]['role'] != 'system' %}"
                 "{{ '<|im_start|>system\nA \u4e2d\nB<|im_end|>\n' }}{% endif %}" + LOOP,
    "thoughts": OWN + "{% endif %}" + LOOP
                + r"{% if not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{% endif %}",
}
TURNS = (r"{% for m in rest %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
         r" + m.content | trim + '<|eot_id|>' }}{% endfor %}"
         r"{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}")
DATES = (r"{% set told = '' %}{% set rest = messages %}{% if rest[0].role == 'system' %}"
         r"{% set told = rest[0].content | trim %}{% set rest = rest[1:] %}{% endif %}"
         r"{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
         r"{{ 'Cutting Knowledge Date: December 2023\n' }}"
         r"{{ 'Today Date: ' + (date_string or '26 Jul 2024') + '\n\n' + told + '<|eot_id|>' }}")
HEADED = {"Llama 3": "{{ bos_token }}{% set rest = messages %}" + TURNS,
          "Llama 3.1": "{{ bos_token }}" + DATES + TURNS}
TEMPLATES = [("qwen", name, text) for name, text in CHATML.items()] + [
    ("llama3", name, text) for name, text in HEADED.items()]


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "a list"])
@pytest.mark.parametrize("family, name, template", TEMPLATES, ids=[each[1] for each in TEMPLATES])
def test_a_chat_is_what_jinja_makes_of_the_template(family, name, template, place, folders,
                                                     tmp_path):
    spec = spec_of(folders, family)
    if family == "qwen":                # which may think, but only as the template does
        last = spec["added_tokens"][-1]
        spec["added_tokens"] += [{**last, "content": text, "id": last["id"] + 1 + n}
                                 for n, text in enumerate(THINK)]
    write(tmp_path / "tokenizer.json", spec)
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(template)
    else:
        several = [{"name": "tool_use", "template": "?"}, {"name": "default", "template": template}]
        content = {"chat_template": several if place == "a list" else template}
        write(tmp_path / "tokenizer_config.json", content)
    one = load_tokenizer(str(tmp_path), chat=True)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rendered = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    blanks = [{"role": "system", "content": " x \n"}, {"role": "user", "content": "\n y "}]
    for messages in (ONE, MANY, blanks, blanks[1:]):
        text = rendered.render(messages=messages, bos_token="<|begin_of_text|>")
        assert chat_ids(one, messages) == ids_of(theirs, text), text


def test_a_model_that_can_think_is_told_that_it_has(folders, tmp_path, tok):
    """Qwen3's template with enable_thinking=False, as its diffusion twin was tuned."""
    spec = spec_of(folders, "qwen")
    spec["added_tokens"] += [{**spec["added_tokens"][0], "content": text, "id": 5000 + i,
                              "special": False} for i, text in enumerate(THINK)]
    write(tmp_path / "tokenizer.json", spec)
    one = load_tokenizer(str(tmp_path), chat=True)
    said = one.show(chat_ids(one, ONE))
    assert said.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert said.count("<think>") == 1


def test_the_published_texts_to_the_letter(tok):
    def shown(family, content):
        return tok[family].show(chat_ids(tok[family], [{"role": "user", "content": content}]))
    assert shown("llada", " Hi\n") == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert shown("dream", "Hi") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert shown("qwen", "Hi") == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("answer", ["Yes.", "3*4=12\n#### 12", "\u4f60\u597d", "'s"])
def test_prompt_and_answer_tokenized_apart_are_the_whole_chat(answer, chatting, lib):
    for family, text in (("llada", llada_text(ONE)), ("dream", SYSTEM + chatml_text(ONE)),
                         ("qwen", chatml_text(ONE)), ("smol", chatml_text(ONE)),
                         ("llama3", llada_text(ONE, "<|begin_of_text|>"))):
        one = chatting[family]
        end = "<|eot_id|>" if family in ("llada", "llama3") else "<|im_end|>"
        ids = one.prompt_ids("How many?") + one.answer_ids(f" {answer}\n")
        assert ids == ids_of(lib[family], text + answer + end)


@each_family
def test_a_plain_prompt_is_its_text_after_what_has_to_come_first(family, tok):
    one = tok[family]
    assert one.prompt_ids("How many?") == one.bos + one.encode("How many?")
    assert one.answer_ids(" 12\n") == one.encode(" 12\n")


def test_base_gets_the_header_tokens_that_instruct_has(chatting, tok):
    base, chatting, instruct = tok["base"], chatting["base"], tok["llada"]
    assert not set(HEADERS) & set(base.added) and base.eot_id is None
    assert chatting == instruct and chatting.n_vocab == instruct.n_vocab == base.n_vocab + 3
    assert chat_ids(chatting, MANY) == chat_ids(instruct, MANY)
    assert chatting.eot_id not in chatting.never
    assert chatting.decode(chatting.answer_ids("12")) == "12"


def test_base_keeps_its_files_though_it_chats(folders, tmp_path):
    load_tokenizer(str(folders / "base"), chat=True).save(tmp_path)
    assert load_tokenizer(str(tmp_path)) == load_tokenizer(str(folders / "base"))
    assert load_tokenizer(str(tmp_path), chat=True).n_vocab


@each_chat
@settings(deadline=None, max_examples=100)
@given(contents=st.lists(texts, min_size=1, max_size=4))
def test_nothing_a_user_writes_in_a_chat_is_an_added_token(family, chatting, contents):
    one = chatting[family]
    added = set(one.added.values())
    def added_in(contents):
        messages = [{"role": "user", "content": content} for content in contents]
        return [i for i in chat_ids(one, messages) if i in added]
    assert added_in(contents) == added_in(["x"] * len(contents))
    assert [i for i in one.answer_ids(contents[0]) if i in added] == [one.eot_id]


def test_a_tokenizer_without_a_chat_format_says_so(tok, folders):
    for name in ("bytes", "toy", str(folders / "gpt2")):
        said = sentence(load_tokenizer, name, chat=True, kind=ValueError)
        assert "no chat format" in said and "LLaDA (loaded with --chat)" in said
    for one in (tok["base"], byte_tokenizer()):
        with pytest.raises(ValueError, match="no chat format"):
            chat_ids(one, ONE)


def test_a_chat_ends_with_the_user(tok):
    for messages in ([], MANY[:3]):
        with pytest.raises(ValueError, match="user"):
            chat_ids(tok["llada"], messages)


def test_training_rows_and_sampling_share_one_way_from_prompt_to_ids(chatting, monkeypatch):
    one = chatting["llada"]
    [row] = tokenize([Example("How many?", " 12", {"id": 0})], one, max_length=64)
    assert row.prompt == chat_ids(one, ONE) and row.answer == [*one.encode("12"), one.eot_id]
    asked = {}
    def generate(model, prompt, **settings):
        asked.update(prompt=prompt, never=settings["never"])
        return SimpleNamespace(tolist=lambda: [row.answer + [one.eos_id] * 3])
    monkeypatch.setattr(sample, "generate", generate)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=one.n_vocab + 5),
                            embed=SimpleNamespace(weight=torch.empty(0)))
    assert sample.complete(model, one, ["How many?"], sample.SampleConfig()) == ["12"]
    assert asked["prompt"] == [row.prompt]
    assert asked["never"] == one.never + list(range(one.n_vocab, one.n_vocab + 5))


# ---- the published files ----

GOLDEN = {
    "LLADA_TOKENIZER": {
        "hello world": [25752, 1931], "A": [32], "A B": [32, 413],
        " \t\n\r  x": [220, 197, 198, 201, 220, 1529],
        "caf\u00e9 \u03a9 \u4e2d\u6587": [66, 2610, 2900, 47037, 79911],
        "cafe\u0301 A\u030a": [66, 2610, 2900, 66425],
        "\U0001f469\U0001f3fd\u200d\U0001f4bb\U0001f642":
            [47681, 102, 55741, 121, 56848, 53440, 119, 5901, 15356]},
    "DREAM_TOKENIZER": {"Hello world": [9707, 1879], " Hello world": [21927, 1879]},
}
IDS = {"LLADA_TOKENIZER": (126081, 126336, []), "DREAM_TOKENIZER": (151643, 151666, [151665])}


@pytest.mark.parametrize("variable", GOLDEN)
def test_the_published_files_give_the_recorded_tokens(variable):
    if not os.environ.get(variable):
        pytest.skip(f"{variable} does not name a folder with the published files")
    one = load_tokenizer(os.environ[variable])
    assert (one.eos_id, one.mask_id, one.bos) == IDS[variable]
    for text, ids in GOLDEN[variable].items():
        assert one.encode(text) == ids, text
    path = Path(os.environ[variable]) / "tokenizer.json"
    if path.is_file():
        theirs = tokenizers.Tokenizer.from_file(str(path))
        for text in UGLY + TEACHING:
            assert one.encode(text, specials=True) == ids_of(theirs, text)
    if variable == "LLADA_TOKENIZER":
        one = load_tokenizer(os.environ[variable], chat=True)
        assert [one.added[text] for text in HEADERS] == [126346, 126347, 126348]


def any_text(rng):
    """A text of up to 40 pieces: those that have been hard, and any characters."""
    pieces = []
    for _ in range(rng.randrange(1, 40)):
        if rng.random() < 0.8:
            pieces.append(rng.choice(SPELLS))
        else:                           # of ASCII, of the first plane, of the second, of any
            first, last = rng.choice([(32, 127)] * 9 + [(128, 0xd800)] * 6
                                     + [(0x10000, 0x20000)] * 4 + [(0xe000, 0x110000)])
            pieces.append(chr(rng.randrange(first, last)))
    return "".join(c for c in "".join(pieces) if c not in STRANGE)


@pytest.mark.slow
def test_the_real_smollm2_gives_the_very_tokens_of_the_library(smollm2):
    """20,000 texts of random pieces, beside those from which the library leaves something out."""
    ours, theirs = load_tokenizer(str(smollm2), mask_token="<empty_output>"), real_library(smollm2)
    assert (ours.eos_id, ours.mask_id, ours.eot_id, ours.bos) == (0, 16, 2, [])
    rng, equal, refused = random.Random(0), 0, 0
    while equal < 20_000:
        text = any_text(rng)
        ids = ids_of(theirs, text)
        try:
            ours_ids = ours.encode(text)
        except ValueError as error:
            assert "has no token for" in str(error)
            assert theirs.decode(ids, skip_special_tokens=False) != text, repr(text)
            refused += 1
            continue
        assert ours_ids == ids and ours.decode(ids) == text, repr(text)
        equal += 1
    print(f"\n{equal:,} texts are equal, {refused:,} refused")
    assert 0 < refused < equal


@pytest.mark.slow
@pytest.mark.parametrize("task, folder", [("gsm8k", "gsm8k"), ("nl_rx", "nl_rx_synth"),
                                          ("django", "django")])
def test_the_real_smollm2_gives_the_very_tokens_of_all_rows(task, folder, smollm2):
    ours, theirs = load_tokenizer(str(smollm2), mask_token="<empty_output>"), real_library(smollm2)
    if not (DATA / folder).is_dir():
        pytest.skip(f"there are no rows of {task} in {DATA / folder}")
    rows = [row for split in SPLITS for row in load_examples(task, split, str(DATA / folder))]
    print(f"\n{len(rows):,} rows of {task}")
    assert len(rows) > 1000
    for row in rows:
        for text in (row.prompt, row.answer):
            assert ours.encode(text) == ids_of(theirs, text), repr(text)


def real_library(folder):
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return theirs


@pytest.mark.slow
def test_the_real_smollm2_is_asked_as_its_template_says(smollm2):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2)
    ours = load_tokenizer(str(smollm2), chat=True)
    assert "named SmolLM, trained by Hugging Face" in ours.show(chat_ids(ours, ONE))
    for messages in (ONE, MANY):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert chat_ids(ours, messages) == theirs.encode(text, add_special_tokens=False), text


# ---- speed ----


@pytest.mark.slow
def test_a_megabyte_is_encoded_no_slower_than_by_the_library(tmp_path):
    """One text is one thread to both; CPU time, the best of three."""
    learn_family("llada", 5000).save(str(tmp_path / "tokenizer.json"))
    ours, theirs = both(spec_of(tmp_path.parent, tmp_path.name), tmp_path)
    text = "".join(TEACHING)
    text *= 1 + 1_000_000 // len(text)
    seconds = {}
    for name, encode in (("ours", ours.encode), ("theirs", lambda text: ids_of(theirs, text))):
        for _ in range(3):
            began = time.process_time()
            encode(text)
            spent = time.process_time() - began
            seconds[name] = min(spent, seconds.get(name, spent))
    print(f"\n{len(text.encode()) / 1e6:.1f} MB: ours {seconds['ours']:.2f} s, tokenizers "
          f"{seconds['theirs']:.2f} s, ratio {seconds['theirs'] / seconds['ours']:.1f}")
    assert seconds["ours"] < seconds["theirs"]


@pytest.mark.slow
def test_a_vocabulary_of_full_size_is_read_within_seconds(folders, tmp_path):
    """126,080 tokens of up to eight bytes, each of which can only be made in one way."""
    spec, rng = spec_of(folders), random.Random(0)
    low, high = list(bpe.BYTE_OF)[:128], list(bpe.BYTE_OF)[128:]
    pairs = [(a, b) for a in low for b in high]
    first = [a + b for a, b in pairs if low.index(a) % 2 == 0]
    second = [a + b for a, b in pairs if low.index(a) % 2]
    fours = rng.sample([(a, b) for a in first for b in rng.sample(second, 12)], 60_000)
    first = [a + b for a, b in fours if high.index(a[1]) % 2 == 0]
    second = [a + b for a, b in fours if high.index(a[1]) % 2]
    eights = [(a, b) for a in first for b in rng.sample(second, 2)]
    merges = (pairs + fours + eights)[:126_080 - 256]
    tokens = list(bpe.BYTE_OF) + [a + b for a, b in merges]
    spec["model"].update(merges=merges, vocab={token: i for i, token in enumerate(tokens)})
    spec["added_tokens"] = [{**token, "id": len(tokens) + n}
                            for n, token in enumerate(spec["added_tokens"])]
    write(tmp_path / "tokenizer.json", spec)
    began = time.process_time()
    one = load_tokenizer(str(tmp_path))
    seconds = time.process_time() - began
    print(f"\n{one.n_vocab} tokens read in {seconds:.1f} s")
    assert one.ids_are_ranks and seconds < 10


def test_words_are_the_commonest_of_a_task_and_the_rest_falls_to_bytes():
    rows = [Example("Question: a cat sat\nAnswer:", " [a-z](cat)", {})] * 2
    rows += [Example("Question: a dog\nAnswer:", " [0-9]", {})]
    tok = word_tokenizer(rows)
    assert [tok.decode([i]) for i in tok.encode(" [a-z](cat)")] == [" ", "[a-z]", "(", "cat", ")"]
    few = word_tokenizer(rows, n_words=3)
    assert few.n_vocab == tok.n_vocab - len(set(tok.pieces) - set(few.pieces)) < tok.n_vocab
    for text in (" [a-z](cat)", "Question: a dog\nAnswer:", "\u00fcber [", ""):
        assert tok.decode(tok.encode(text)) == few.decode(few.encode(text)) == text
    assert word_tokenizer(rows[::-1]) == tok


def test_a_checkpoint_keeps_its_words(tmp_path):
    tok = word_tokenizer([Example("Description: dog\nRegex:", " (dog).*", {})])
    tok.save(tmp_path)
    assert load_tokenizer(str(tmp_path)) == tok


def test_the_2000_commonest_words_are_tokens_and_a_model_may_have_just_as_many():
    names = ["".join(chr(97 + int(digit)) for digit in f"{n:04}") for n in range(2100)]
    rows = [Example(" " + name, " " + name, {}) for name in names]      # twice each
    rows += [Example(" zz yy", " zz", {})] * 9                          # 18 and 9 times
    tok = word_tokenizer(rows)
    assert tok.n_vocab == 256 + 2000 + 2
    assert tok.pieces[256:259] == [b" zz", b" yy", b" aaaa"]            # of equals by name
    assert word_tokenizer(rows, n_words=1).pieces[256:] == [b" zz"]
    config = SimpleNamespace(mask_id=tok.mask_id, eos_id=tok.eos_id, vocab_size=tok.n_vocab)
    tok.check_fits(config)
