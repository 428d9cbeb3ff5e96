"""What is asked: a prompt that is wrapped as a task's rows are, a text with gaps, a message."""
import os
import re
from pathlib import Path

from pretrained.device import pick_device
from pretrained.weights import newest_checkpoint
from sampling.graph import check_graphs
from sampling.prompts import check_text
from tasks.common import question_prompt, task_prompt
from tasks.files import read_json

QUESTION = "Finn has 7 pens, Carl has 5 and they share equally. How many pens does Carl get?"


def check_asked(s):
    """Raise ValueError unless the settings that say what is asked fit together. s: SampleConfig."""
    check_text(s.prompt + s.infill)
    if s.graphs:
        check_graphs(pick_device(s.device))
    if s.is_conversation and (s.html or s.svg):
        raise ValueError("html and svg show one answer, not a conversation: give a prompt, too")
    if s.html and s.svg and os.path.realpath(s.html) == os.path.realpath(s.svg):
        raise ValueError(f"html and svg are two files; both are named {s.svg}")
    if s.prompt and s.infill:
        raise ValueError("prompt and infill are two texts; give one of them")
    other = ("a conversation, which sends what is typed" if s.is_conversation else
             "infill, which is a whole text" if s.infill else
             "raw, which sends the prompt as it is" if s.raw else "")
    if s.task and other:
        raise ValueError(f"task={s.task!r} wraps a prompt and does not go with {other}; choose one")


def as_sent(s) -> tuple[str, str]:
    """Return the text that is sent, and a line that says what it is.

    A prompt is wrapped as the rows of s.task are; without a task, as those of the run of train.py
    that s.init_from is, or else as a question. A chat without a task sends it as it is, unless the
    run was trained with chat. Without a prompt QUESTION is asked; s.raw then sends none. Raises
    ValueError or FileNotFoundError in one sentence.
    """
    turn = ", as a message of a chat" if s.chat else ""
    if s.infill:
        return s.infill.replace("\\n", "\n"), "text as it is (--infill)"
    if s.raw or s.is_conversation:      # whatever is in a run's settings.json
        return s.prompt, f"prompt as it is{' (--raw)' * s.raw}{turn}"
    run = {} if s.task else settings_of_run(s.init_from)
    if s.chat and not (s.task or run.get("chat")):
        return s.prompt, f"prompt as it is{turn}"
    task, asked = s.task or str(run.get("task", "")), s.prompt or QUESTION
    if not task:
        return question_prompt(asked), 'prompt as "Question: ... Answer:"'
    try:
        text = task_prompt(task, asked)
    except ValueError as error:
        if s.task:
            raise
        raise ValueError(f"{s.init_from} was trained on the task {task}: {error}") from None
    if not s.prompt and text != question_prompt(QUESTION):
        raise ValueError(f"the task {task} needs a prompt, and the default is a question of the "
                         f"toy; give --prompt=...")
    hint = "; the run was trained with --chat" if run.get("chat") and not s.chat else ""
    return text, f"prompt as the task {task} sends it{turn}{hint}"


def settings_of_run(init_from: str) -> dict:
    """Return the settings of the run that left this out_dir or checkpoint; {} if no run did."""
    if not os.path.isdir(init_from):
        return {}
    folder = Path(newest_checkpoint(init_from)).resolve()
    settings = folder.parent / "settings.json"
    is_of_run = re.fullmatch(r"step_\d+", folder.name) and settings.is_file()
    return read_json(settings) if is_of_run else {}
