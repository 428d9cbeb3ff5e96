"""Laws of the task of one's own rows: forms, splits, what is right, and mistakes as a sentence."""
import gzip
import json

import pytest

from eval_gsm8k import EvalConfig, evaluate, questions
from helpers import sentence, write_checkpoint, write_jsonl
from pretrained.tokenizer import byte_tokenizer
from tasks import gsm8k, jsonl
from tasks.common import load_examples, task_prompt

Q, A = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "It is 5."}
# a row, the prompt and the answer that are made of it
FORMS = {
    "prompt": ({"prompt": " 2+3? ", "answer": "5\n"}, " 2+3? ", "5\n"),
    "completion": ({"prompt": "2+3? ", "completion": " 5"}, "2+3? ", " 5"),
    "question": ({"question": "2+3? ", "answer": " 5\n"}, "Question: 2+3?\nAnswer:", " 5"),
    "instruction": ({"instruction": "Add.", "input": "2, 3", "output": "5"}, "Add.\n\n2, 3", "5"),
    "no input": ({"instruction": "Add.", "input": "", "output": "5"}, "Add.", "5"),
    "blank input": ({"instruction": "Add.", "input": " \n", "output": "5"}, "Add.", "5"),
    "null input": ({"instruction": "Add.", "input": None, "output": "5"}, "Add.", "5"),
    "null form": ({"prompt": "2+3?", "completion": None, "answer": "5", "messages": None}, "2+3?",
                  "5"),
    "messages": ({"messages": [Q, A]}, "2+3?", "It is 5."),
    "more keys": ({"question": "2+3?", "answer": "5", "id": 7, "input": 1},
                  "Question: 2+3?\nAnswer:", " 5"),
}


def rows(n: int) -> list[dict]:
    return [{"prompt": f"{i}+1=", "answer": f"{i + 1}"} for i in range(n)]


def prompts(folder, split: str) -> list[str]:
    return [example.prompt for example in load_examples("jsonl", split, str(folder))]


@pytest.mark.parametrize("row, prompt, answer", FORMS.values(), ids=FORMS)
def test_each_form_of_row_becomes_its_prompt_and_answer(row, prompt, answer, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [row])
    [example] = load_examples("jsonl", "test", str(tmp_path))
    assert (example.prompt, example.answer) == (prompt, answer)
    assert example.meta["gold"] == " ".join(answer.split())
    assert jsonl.score(answer, example) and not jsonl.score(answer + " more", example)


def test_what_a_user_writes_is_not_wrapped_because_the_form_of_the_rows_is_not_known():
    said = sentence(task_prompt, "jsonl", "2+3?", kind=ValueError)
    assert "name a task that does as --task" in said and "--raw" in said


# ---- splits ----


@pytest.mark.parametrize("n, held_out", [(2, 1), (9, 1), (19, 1), (20, 2), (100, 10)])
def test_the_last_tenth_of_train_is_validation_and_is_not_trained_on(n, held_out, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(n))
    train, validation = (prompts(tmp_path, split) for split in ("train", "validation"))
    assert train + validation == [row["prompt"] for row in rows(n)]
    assert len(validation) == held_out


def test_a_validation_file_is_validation_and_train_is_whole(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(20))
    write_jsonl(tmp_path / "validation.jsonl.gz", [{"prompt": "x", "completion": "y"}])
    assert (len(prompts(tmp_path, "train")), prompts(tmp_path, "validation")) == (20, ["x"])


def test_ids_are_those_of_the_prompts_also_where_one_comes_again(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", rows(3) + rows(1))
    ids = [example.meta["id"] for example in load_examples("jsonl", "test", str(tmp_path))]
    assert len(set(ids)) == 4 and ids[3] == ids[0] + "-2"


# ---- what is right ----


def made(gold: str, variant: str, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": "?", "answer": "a 1", "gold": gold}])
    return load_examples("jsonl", "test", str(tmp_path), variant)[0]


@pytest.mark.parametrize("gold, text, is_right", [
    ("New York", " New\n  York \n", True), ("New York", "new york", False),
    ("New York", "NewYork", False), ("5", "5.0", False), ("5", "", False), ("5", "4\n5", False),
    ("5", " 5\n\nQuestion: 3+4?\nAnswer: 7", True), ("Question: why?", "Question: why?", True),
    ("a\nQuestion: b", "a\nQuestion:  b\n", True), ("a\nQuestion: b", "a", False),
    ("a\nQuestion: b", "a\nQuestion: c", False), ("\nQuestion: b", "\nQuestion: b", True),
])
def test_a_text_is_right_if_it_is_the_gold_one_apart_from_blanks(gold, text, is_right, tmp_path):
    assert jsonl.score(text, made(gold, "", tmp_path)) is is_right


@pytest.mark.parametrize("gold, text, is_right", [
    ("5", "2+3=5, so 5.0", True), ("1,200 $", "#### 1200", True), ("1200", "It is $1,200.", True),
    ("5", "6", False), ("5", "none", False), ("-3", "\u22123", True), ("5", "5, no, 4", False),
    ("5", "#### 5\n\nQuestion: 3+4?\nAnswer: 7", True)])
def test_with_the_variant_the_final_numbers_are_compared_as_gsm8k_reads_them(gold, text, is_right,
                                                                            tmp_path):
    example = made(gold, "number", tmp_path)
    assert jsonl.score(text, example) is is_right
    assert example.meta["gold"] == gsm8k.extract(gold)


def test_no_text_is_no_answer():
    assert [jsonl.extract(text) for text in ("", " \n", " a\n b ")] == [None, None, "a b"]


def test_the_commonest_answer_is_the_score_to_beat(tmp_path):
    labels = [{"prompt": f"{i}", "answer": answer} for i, answer in enumerate("yes no yes  maybe "
                                                                            "yes".split())]
    write_jsonl(tmp_path / "test.jsonl", labels)
    examples = load_examples("jsonl", "test", str(tmp_path))
    always = jsonl.extra_scores(examples, [""] * 5)["always_the_commonest"]
    assert always == sum(jsonl.score("yes", example) for example in examples) / 5


# ---- asked ----


def test_rows_are_asked_with_solved_ones_before_them_and_all_are_scored(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows(20))
    write_jsonl(tmp_path / "test.jsonl", rows(3))
    write_checkpoint(tmp_path / "model", byte_tokenizer(), 0)
    cfg = EvalConfig(init_from=str(tmp_path / "model"), task="jsonl", data_dir=str(tmp_path),
                     n_shot=2, gen_length=4, block_length=4, steps=2, device="cpu",
                     out=str(tmp_path / "answers.jsonl"))
    assert questions(cfg)[2].prompt == "0+1=1\n\n1+1=2\n\n2+1="
    scores, lines = evaluate(cfg)
    assert scores["n"] == 3 and "strict" not in scores
    assert scores["extra"] == {"always_the_commonest": 1 / 3}
    assert [line["gold"] for line in lines] == ["1", "2", "3"]


# ---- mistakes ----


def chat(*turns) -> dict:
    return {"messages": list(turns)}


BAD = {     # a second row, and what the sentence says of it
    "another form": ({"question": "?", "answer": "5"}, "question and answer"),
    "no form": ({"text": "?", "label": "5"}, "instruction and output"),
    "two forms": ({"prompt": "?", "answer": "5", "completion": "6"}, "not of several"),
    "no prompt": ({"prompt": "", "answer": "5"}, "prompt must be a text that is not empty"),
    "no answer": ({"prompt": "?", "answer": " \n"}, "answer must be a text that is not empty"),
    "a number": ({"prompt": "?", "answer": 5}, "not 5"),
    "null": ({"prompt": "?", "answer": None}, "not None"),
    "a list": ({"prompt": [Q], "answer": "5"}, "prompt must be a text"),
    "gold": ({"prompt": "?", "answer": "5", "gold": 5}, "gold must be a text"),
    "gold of blanks": ({"prompt": "?", "answer": "5", "gold": " "}, "gold must be a text"),
    "two forms of null": ({"prompt": "?", "answer": None, "completion": None}, "not of several"),
}
BAD_CHATS = {
    "system": chat({"role": "system", "content": "Add."}, Q, A), "long": chat(Q, A, Q, A),
    "no answer": chat(Q), "order": chat(A, Q), "none": chat(), "a text": {"messages": "2+3?"},
    "texts": chat("2+3?", "5"), "no content": chat(Q, {"role": "assistant"}),
    "parts": chat({"role": "user", "content": [{"type": "text", "text": "2+3?"}]}, A),
}


@pytest.mark.parametrize("row, words", BAD.values(), ids=BAD)
def test_a_row_that_does_not_fit_is_named_with_file_and_line(row, words, tmp_path):
    text = f"{json.dumps(rows(1)[0])}\n\n{json.dumps(row)}\n"       # an empty line is a line
    (tmp_path / "train.jsonl").write_text(text)
    said = sentence(load_examples, "jsonl", "train", str(tmp_path))
    assert said.startswith(f"{tmp_path / 'train.jsonl'}, line 3: ") and words in said


@pytest.mark.parametrize("row", BAD_CHATS.values(), ids=BAD_CHATS)
def test_a_chat_that_is_not_one_question_and_its_answer_is_named(row, tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [chat(Q, A), row])
    said = sentence(load_examples, "jsonl", "test", str(tmp_path))
    assert "test.jsonl, line 2: " in said and ("user" in said or "content" in said)


def test_a_gold_answer_without_a_number_is_named_if_numbers_are_compared(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": "?", "answer": "five"}])
    assert load_examples("jsonl", "test", str(tmp_path))
    said = sentence(load_examples, "jsonl", "test", str(tmp_path), "number")
    assert said == f"{tmp_path / 'test.jsonl'}, line 1: the gold answer has no number to compare"


@pytest.mark.parametrize("write", [
    lambda path, text: path.write_text(text, "utf-8-sig"),
    lambda path, text: path.write_bytes(text.replace("\n", "\r\n").encode()),
    lambda path, text: path.write_text(text.replace("\n", "\n\n") + " \n"),
    lambda path, text: path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(text.encode()))],
    ids=["BOM", "Windows", "empty lines", "gzip"])
def test_files_as_editors_write_them_are_read(write, tmp_path):
    write(tmp_path / "test.jsonl", "".join(json.dumps(row) + "\n" for row in rows(2)))
    assert prompts(tmp_path, "test") == ["0+1=", "1+1="]


def test_what_is_missing_is_said(tmp_path):
    said = sentence(load_examples, "jsonl", "train")
    assert "--data_dir" in said
    write_jsonl(tmp_path / "train.jsonl", rows(1))
    assert "1 rows; more than 1" in sentence(load_examples, "jsonl", "train", str(tmp_path))
    said = sentence(load_examples, "jsonl", "test", str(tmp_path))
    assert f"{tmp_path / 'test.jsonl'}" in said and "--split=validation" in said
    assert "--test_questions=0" in said
    (tmp_path / "train.jsonl").unlink()
    for split in ("train", "validation"):
        assert str(tmp_path / "train.jsonl") in sentence(load_examples, "jsonl", split,
                                                         str(tmp_path))
