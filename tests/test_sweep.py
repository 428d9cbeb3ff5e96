"""Laws of bad invocations: a short part of sweep.py, and what it takes for a fault."""
import re
import time

import pytest

from helpers import python
from sweep import CLASHES, COMMANDS, SETTINGS, Case, faults_of, with_settings

CASE = Case("setting", "train.py", "lr", "--lr=x", ["train.py", "--lr=x"], ["lr"])


def test_sixty_bad_invocations_of_all_scripts_end_as_a_sentence():
    done = python("tests/sweep.py", "--n=60", "--seed=0")
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"60 invocations of {len(SETTINGS)} scripts")
    assert set(re.findall(r"(\w+): (?:accepted|refused)", last)) == {
        "setting", "file", "clash", "typing"}


@pytest.mark.slow
def test_the_commands_that_are_made_bad_are_good():
    """Those of one script; all of them are for `python tests/sweep.py --right`."""
    done = python("tests/sweep.py", "--right", "--only=tables.py")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("code, said, changed, fault", [
    (1, "Traceback (most recent call last):\n  ...\nKeyError: 'lr'\n", [], "a traceback"),
    (-11, "", [], "signal 11"),
    (-9, "", [], "no end"),
    (0, "", [], "accepted"),
    (1, "", [], "silent"),
    (1, "lr\nis\nno\nnumber\n", [], "long"),
    (1, "lr \x1b[2J is no number\n", [], "control characters"),
    (1, "something is no number\n", [], "names nothing"),
    (1, "lr=x is no number\n", ["work/run/log.jsonl"], "changed work/run/log.jsonl"),
])
def test_what_the_sweep_takes_for_a_fault(code, said, changed, fault):
    assert fault in faults_of(CASE, code, "", said, changed)


def test_a_sentence_below_a_progress_bar_is_no_fault():
    said = "\rnew:   0%|          | 0/3 [00:00<?, ?step/s]\r\nlr=x is not a finite float\n"
    assert faults_of(CASE, 1, "step 0: held-out loss\n", said, []) == []


def test_a_long_number_in_a_message_is_read_at_once():
    began = time.process_time()
    assert faults_of(CASE, 1, "", f"lr={'9' * 5000} is not a finite float\n", []) == []
    assert time.process_time() - began < 5


def test_every_script_has_commands_settings_and_clashes():
    assert SETTINGS.keys() == CLASHES.keys() == {command.split()[0] for command in COMMANDS}


def test_a_setting_takes_the_place_of_the_commands_own():
    words = with_settings(["mine.py", "--lr=1", "--pack"], ["--lr=x", "--pack=2"], "train.py")
    assert words == ["train.py", "mine.py", "--lr=x", "--pack=2"]
