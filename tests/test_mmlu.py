"""Laws of MMLU: lm-eval's text, unique ids, the same 500 questions always, one token a letter."""
import hashlib
import random
from collections import Counter

import pytest
import torch

from analysis.likelihood import choose
from helpers import DATA, sentence, write_jsonl
from model import ModelConfig
from pretrained.tokenizer import byte_tokenizer, our_tokenizer, toy_tokenizer
from tasks import mmlu

REAL = DATA / "mmlu"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason=f"the MMLU rows are not at {REAL}")
SUBSET = "8b8eef95312f0ef23e26a4073d8744abaebe553afa616f6bbd6a5d1dc3b3c23f"
GOOD = {"question": "Is it?", "subject": "a_b", "choices": ["1", "2", "3", "4"], "answer": 2}

# written by hand from the rows of the files and lm-eval's template
ABSTRACT_ALGEBRA = """\
The following are multiple choice questions (with answers) about abstract algebra.

Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.
A. 0
B. 1
C. 2
D. 3
Answer: B

Statement 1 | If aH is an element of a factor group, then |aH| divides |a|. Statement 2 | If H \
and K are subgroups of G then HK is a subgroup of G.
A. True, True
B. False, False
C. True, False
D. False, True
Answer: B

Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.
A. 0
B. 4
C. 2
D. 6
Answer:"""


def load(folder, rows):
    """The examples of a test file with these rows."""
    return mmlu.load("test", write_jsonl(folder / "test.jsonl", rows))


def wordy(*words):
    """A tokenizer for which a word with its blank is a token, as it is for LLaDA."""
    pieces = [bytes([i]) for i in range(256)] + [word.encode() for word in words]
    return our_tokenizer("wordy", r" ?[A-Za-z]+|[\s\S]", pieces)


@pytest.fixture(scope="module")
def real():
    return mmlu.load("test", str(REAL)), mmlu.load("dev", str(REAL))


# ---- rows ----


@needs_real_rows
def test_the_files_hold_14042_questions_of_57_subjects_with_five_shots_each(real):
    test, dev = real
    assert Counter(e.meta["gold"] for e in test) == dict(A=3222, B=3462, C=3582, D=3776)
    assert {*Counter(e.meta["subject"] for e in dev).values()} == {5}
    assert {e.meta["subject"] for e in test} == {e.meta["subject"] for e in dev}
    assert len({e.meta["subject"] for e in test}) == 57


@needs_real_rows
def test_ids_are_unique_though_27_rows_occur_before(real):
    test, dev = real
    ids = [e.meta["id"] for e in test]
    assert len(set(ids)) == 14042 and len({e.meta["id"] for e in dev}) == 285
    assert sum("-" in i for i in ids) == 27
    assert all(i.startswith("mmlu/") for i in ids)


@needs_real_rows
def test_a_real_prompt_is_lm_evals_to_the_letter(real):
    test, dev = real
    assert mmlu.prompts(test[:1], dev, 2) == [ABSTRACT_ALGEBRA]
    history = [e for e in test if e.meta["subject"] == "high_school_us_history"][:1]
    assert mmlu.prompts(history, dev, 0)[0] == (
        "The following are multiple choice questions (with answers) about high school us history."
        "\n\n" + history[0].prompt)


@needs_real_rows
def test_five_shots_are_the_five_solved_questions_of_the_subject_in_order(real):
    test, dev = real
    for example, text in zip(test[::500], mmlu.prompts(test[::500], dev, 5)):
        shots = [e for e in dev if e.meta["subject"] == example.meta["subject"]]
        parts = text.split("\n\n", 1)[1]
        for shot in shots:
            assert parts.startswith(f"{shot.prompt} {shot.meta['gold']}\n\n")
            parts = parts[len(shot.prompt) + 4:]
        assert parts == example.prompt and parts.endswith("\nAnswer:")


@needs_real_rows
def test_the_500_questions_are_always_the_same(real):
    test, _ = real
    some = mmlu.subset(test)
    assert some == [test[i] for i in sorted(random.Random(0).sample(range(14042), 500))]
    ids = " ".join(e.meta["id"] for e in some)
    assert hashlib.sha256(ids.encode()).hexdigest() == SUBSET


def test_blanks_around_a_question_go_and_those_of_choices_stay(tmp_path):
    row = {**GOOD, "question": " \n Is it?\n", "choices": [" a ", "b\nc", "", "\u2603"]}
    [example] = load(tmp_path, [row])
    assert example.prompt == "Is it?\nA.  a \nB. b\nc\nC. \nD. \u2603\nAnswer:"
    assert (example.answer, example.meta["gold"]) == (" C", "C")
    assert example.meta["choices"] == row["choices"] and example.meta["subject"] == "a_b"


def test_equal_rows_have_two_ids_and_a_row_keeps_its_id_in_other_company(tmp_path):
    other = {**GOOD, "subject": "b_a"}
    rows = load(tmp_path, [GOOD, other, GOOD])
    ids = [e.meta["id"] for e in rows]
    assert len(set(ids)) == 3 and ids[2] == ids[0] + "-2"
    assert [e.meta["id"] for e in load(tmp_path, [other])] == ids[1:2]


@pytest.mark.parametrize("wrong", [
    {"question": None}, {"question": 3}, {"subject": None}, {"choices": ["1", "2", "3"]},
    {"choices": ["1"] * 5}, {"choices": "1234"}, {"choices": None}, {"choices": [1, 2, 3, 4]},
    {"answer": 4}, {"answer": -1}, {"answer": "B"}, {"answer": True}, {"answer": 1.0},
    {"answer": None}])
def test_an_ugly_row_is_one_sentence_with_its_number(tmp_path, wrong):
    assert f"{tmp_path}/test.jsonl, row 2: " in sentence(load, tmp_path, [GOOD, {**GOOD, **wrong}])


def test_an_empty_object_or_a_missing_file_is_one_sentence(tmp_path):
    assert "row 1" in sentence(load, tmp_path, [{}], kind=ValueError)
    assert "dev.jsonl" in sentence(mmlu.load, "dev", str(tmp_path), kind=FileNotFoundError)


def test_more_questions_or_shots_than_there_are_is_one_sentence(tmp_path):
    rows = load(tmp_path, [GOOD] * 3)
    assert mmlu.subset(rows, 3) == rows and mmlu.subset(rows, 0) == []
    assert "has 3 questions here, which is fewer than 4" in sentence(mmlu.subset, rows, 4)
    assert "mmlu has 2 solved questions of 'a_b'" in sentence(mmlu.prompts, rows, rows[:2], 3)
    assert "n_shot=-1" in sentence(mmlu.prompts, rows, rows, -1)
    assert mmlu.prompts([], [], 5) == []


def test_shots_of_another_subject_are_not_used(tmp_path):
    rows = load(tmp_path, [GOOD, {**GOOD, "subject": "other"}])
    assert "0 solved questions of 'a_b'" in sentence(mmlu.prompts, rows[:1], rows[1:], 1)


# ---- letters ----


@pytest.mark.parametrize("tok", (byte_tokenizer(), toy_tokenizer(),
                                 wordy(*(f" {x}" for x in "ABCD"))), ids=lambda tok: tok.name)
@pytest.mark.parametrize("text", ("Answer:", "", "A. \u2603\nAnswer:", "<|mask|>\nAnswer:", "x "))
def test_the_letter_follows_what_is_before_it_as_they_are_encoded_together(tok, text):
    before, letters = mmlu.letter_ids(tok, text)
    assert len(set(letters)) == 4
    for letter, i in zip("ABCD", letters):
        assert before + [i] == tok.encode(f"{text} {letter}")


def test_the_blank_is_in_the_letter_where_that_is_a_token_and_stands_before_it_elsewhere():
    tok = wordy(*(f" {x}" for x in "ABCD"))
    assert mmlu.letter_ids(tok, "Answer:") == (tok.encode("Answer:"), [256, 257, 258, 259])
    tok = byte_tokenizer()
    assert mmlu.letter_ids(tok, "Answer:") == (tok.encode("Answer: "), [65, 66, 67, 68])


def test_a_beginning_of_text_goes_first():
    tok = byte_tokenizer()
    tok.bos = [7]
    assert mmlu.letter_ids(tok, "x")[0] == [7, *tok.encode("x ")]


def test_letters_that_are_not_one_token_each_are_one_sentence():
    for tok in (wordy(" A"), wordy(" A", " B", " C")):      # the others are a blank and a byte
        said = sentence(mmlu.letter_ids, tok, "Answer:", kind=ValueError)
        assert "not one token each" in said and "'wordy'" in said


class Oracle:
    """Looks a prompt up and puts the letter of its answer where the mask is, to whatever degree."""

    def __init__(self, tok, answers):
        self.embed = torch.nn.Embedding(1, 1)
        self.config = ModelConfig(vocab_size=tok.n_vocab, mask_id=tok.mask_id, eos_id=tok.eos_id)
        self.answers = answers                          # {ids before the letter: its id}

    def encode(self, xt, is_real=None):
        return xt

    def unembed(self, xt, where):
        logits = torch.zeros(len(where[0]), self.config.vocab_size)
        for n, (row, place) in enumerate(zip(*where)):
            assert xt[row, place] == self.config.mask_id
            logits[n, self.answers[tuple(xt[row, :place].tolist())]] = 1e-3
        return logits


@needs_real_rows
def test_an_oracle_answers_everything_right_and_its_opposite_nothing(real):
    test, dev = real
    tok, questions = byte_tokenizer(), mmlu.subset(test, 60)
    before, letters = zip(*(mmlu.letter_ids(tok, text)
                            for text in mmlu.prompts(questions, dev, 1)))
    gold = ["ABCD".index(e.meta["gold"]) for e in questions]
    for turn, share in ((0, 1.0), (1, 0.0)):
        oracle = Oracle(tok, {tuple(ids): four[(g + turn) % 4]
                              for ids, four, g in zip(before, letters, gold)})
        best = choose(oracle, before, letters).argmax(dim=1).tolist()
        right = [mmlu.score(" " + "ABCD"[i], e) for i, e in zip(best, questions)]
        assert sum(right) / len(right) == share


def test_a_generated_answer_is_the_letter_it_begins_with():
    for text, letter in ((" B", "B"), ("C.", "C"), ("(D)", "D"), ("\n A\n\nThe", "A"), ("", None),
                         ("Because", None), ("AB", None), ("b", None), ("E", None),
                         ("the A", None)):
        assert mmlu.extract(text) == letter
        example = mmlu.to_example(GOOD, "mmlu/1")
        assert mmlu.score(text, example) is (letter == "C")
