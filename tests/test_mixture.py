"""Laws of the mixture of tasks."""
from collections import Counter
from pathlib import Path

import pytest

from helpers import sentence, write_jsonl
from tasks.common import load_examples, load_task
from tasks.mixture import folder_of


@pytest.fixture
def data(tmp_path):
    for name in ("nl_rx_synth", "django"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "nl_rx_synth" / "train.jsonl",
                [{"text": f"lines with {i}", "regex": f".*{i}.*"} for i in range(300)])
    for name in ("train", "dev"):
        write_jsonl(tmp_path / "django" / f"{name}.jsonl",
                    [{"anno": f"{name} {i}", "code": f"x = {i}"} for i in range(30)])
    return str(tmp_path)


def test_each_task_asks_answers_and_scores_as_it_does_alone(data, tmp_path):
    mixed = load_examples("mixture", "train", data, "nl_rx,django")
    alone = {name: load_examples(name, "train", str(tmp_path / folder))
             for name, folder in (("nl_rx", "nl_rx_synth"), ("django", "django"))}
    assert len(mixed) == sum(map(len, alone.values())) == 44 + 30
    for example in mixed:
        name = example.meta["task"]
        assert any(example[:2] == other[:2] for other in alone[name])
        assert load_task("mixture").score(example.answer, example)
        assert not load_task("mixture").score("y = 0", example)


def test_tasks_are_mixed_in_an_order_that_new_rows_do_not_change(data, tmp_path):
    order = [e.meta["id"] for e in load_examples("mixture", "train", data, "nl_rx,django")]
    assert order == [e.meta["id"] for e in load_examples("mixture", "train", data, "django,nl_rx")]
    names = Counter(key.split("/")[0] for key in order[:37])
    assert min(names.values()) >= 10                    # not one after the other
    shorter = [e.meta["id"] for e in load_examples("mixture", "train", data, "django")]
    assert [key for key in order if key in set(shorter)] == shorter


def test_the_accuracy_of_each_task_is_an_extra_score(data):
    task, examples = load_task("mixture"), load_examples("mixture", "train", data, "nl_rx,django")
    said = [e.answer if e.meta["task"] == "django" else "" for e in examples]
    assert task.extra_scores(examples, said) == {"django": 1.0, "nl_rx": 0.0}


def test_mistakes_are_one_sentence(data):
    for variant in ("nl_rx,nl_rx", "mixture"):
        assert variant in sentence(load_examples, "mixture", "train", data, variant)
    assert "gsm8k" in sentence(load_examples, "mixture", "train", data)          # its default
    assert "sql2" in sentence(load_examples, "mixture", "train", data, "sql2")
    assert "/etc" in sentence(folder_of, "/etc", data)
    for name in ("nl_rx_turk", "nl_rx_file"):
        (Path(data) / name).mkdir()
    assert "nl_rx_turk" in sentence(folder_of, "nl_rx", data)
    (Path(data) / "nl_rx").mkdir()
    assert folder_of("nl_rx", data) == f"{data}/nl_rx" and folder_of("toy", "") == ""
