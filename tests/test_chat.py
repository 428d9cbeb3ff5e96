"""Laws of the chat: what the model is asked, what is kept of an answer, how it all ends."""
import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest
import torch

import sample
from helpers import PATIENCE, ROOT
from model import DLLM, ModelConfig
from pretrained.bpe import BYTE_OF
from pretrained.chat_format import chat_ids
from pretrained.tokenizer import byte_tokenizer, load_tokenizer
from sample import SampleConfig
from sampling.chat import Answer, newest, turn
from sampling.reveal import Sampling
from tasks.common import tokenize
from tasks.toy import load

ADDED = {"llada": ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>",
                   "<|end_header_id|>", "<|eot_id|>"),
         "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")}
SMALL = {"device": "cpu", "gen_length": 8, "block_length": 4, "steps": 8, "temperature": 1.0}
# one token a pass and never an end: an answer that is still under way when it is interrupted
ENDLESS = ("--device=cpu", "--gen_length=3000", "--block_length=1", "--steps=3000",
           "--temperature=1", "--end_tokens=never")


def write_tokenizer(folder, family):
    """A published tokenizer with a token for each byte, no merges and the tokens of a chat."""
    added = [{"content": text, "id": 256 + n} for n, text in enumerate(ADDED[family])]
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    spec = {"normalizer": None, "post_processor": None, "decoder": {"type": "ByteLevel"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "model": {"type": "BPE", "vocab": BYTE_OF, "merges": []}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return load_tokenizer(str(folder), chat=True)


def write_checkpoint(folder, tok, block_size):
    config = ModelConfig(vocab_size=tok.n_vocab, mask_id=tok.mask_id, eos_id=tok.eos_id,
                         block_size=block_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=16,
                         n_hidden=32)
    DLLM(config).init_weights(torch.Generator().manual_seed(0)).save(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: a checkpoint}"""
    made = {family: tmp_path_factory.mktemp(family) for family in ADDED}
    for family, folder in made.items():
        write_checkpoint(folder, write_tokenizer(folder, family), 4096)
    return made


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model of 100 tokens of context."""
    folder = tmp_path_factory.mktemp("short")
    return write_checkpoint(folder, write_tokenizer(folder, "llada"), 100)


@pytest.fixture
def tok(tmp_path):
    return write_tokenizer(tmp_path, "llada")


def start(folder, *options, **how):
    """The chat in a process of its own, which Ctrl-C reaches even where ours ignores it."""
    env = {**os.environ, "PYTHONUTF8": "1", "TERM": "xterm"}
    for name in ("COLUMNS", "LINES"):                   # pytest -n sets them, above a terminal
        env.pop(name, None)
    prepare = how.pop("prepare", lambda: None)

    def before():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        prepare()
    how = {**dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE), **how}
    return subprocess.Popen([sys.executable, "sample.py", "--chat", f"--init_from={folder}",
                             *options], cwd=ROOT, env=env, preexec_fn=before, **how)


@pytest.fixture
def talk(monkeypatch, capsys):
    """All of the input at once: a folder, what is said -> stdout, stderr."""
    def talk(folder, said, **settings):
        data = said if isinstance(said, bytes) else said.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        sample.main(SampleConfig(chat=True, **{**SMALL, "init_from": str(folder), **settings}))
        return capsys.readouterr()
    return talk


def read_until(file, sign):
    """What comes out of a pipe or terminal, up to where the sign has come."""
    os.set_blocking(file, False)
    out, end = b"", time.monotonic() + PATIENCE
    while not re.search(sign, out):
        assert time.monotonic() < end, out
        try:
            out += os.read(file, 4096)
        except BlockingIOError:
            time.sleep(0.02)
    return out


# ---- one turn, without a model ----


class Model:
    """Says what it is told to, token by token from the left, and keeps what it was asked."""

    def __init__(self, tok):
        self.tok, self.asked, self.says, self.stop_after = tok, [], "Yes.", None

    def __call__(self, ids, on_step, cost):
        self.asked.append(ids)
        end = [self.tok.eot_id] + [self.tok.eos_id] * 12
        said = ([*self.says] if isinstance(self.says, bytes) else self.tok.encode(self.says)) + end
        x = torch.full((1, 12), self.tok.mask_id)
        for n in range(13):
            on_step(x.clone(), torch.ones(x.shape))
            if n == self.stop_after:
                raise KeyboardInterrupt
            if n < 12:
                x[0, n] = said[n]


@pytest.fixture
def model(tok):
    return Model(tok)


def messages(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text}
            for n, text in enumerate(texts)]


def test_the_model_is_asked_the_whole_chat_and_its_answer_is_kept(model, tok, capsys):
    talk = turn(model, tok, [], "Is it?", 999)
    model.says = "No."
    talk = turn(model, tok, talk, "Sure?", 999)
    assert talk == messages("Is it?", "Yes.", "Sure?", "No.")
    assert model.asked == [chat_ids(tok, talk[:1]), chat_ids(tok, talk[:3])]
    assert capsys.readouterr().out == "Yes.\nNo.\n"


def test_of_a_stopped_answer_what_stands_before_its_first_mask_is_kept(model, tok, capsys):
    model.stop_after = 2
    assert turn(model, tok, [], "Is it?", 999) == messages("Is it?", "Ye")
    shown = capsys.readouterr()
    assert shown.out == "Ye\n" and shown.err == "stopped\n"
    model.says, model.stop_after = "\u20ac", 2              # two bytes of three
    before = messages("a", "b")
    assert turn(model, tok, before, "Is it?", 999) == before
    assert "\ufffd" not in capsys.readouterr().out


def test_an_answer_of_nothing_is_an_answer(model, tok, capsys):
    model.says = ""
    assert turn(model, tok, [], "Is it?", 999) == messages("Is it?", "")
    assert capsys.readouterr().out == "\n"


def test_the_oldest_turns_go_where_the_context_ends_and_not_before(model, tok, capsys):
    talk = messages("one", "two", "three", "four")
    room = len(chat_ids(tok, talk + messages("five")))
    assert newest(tok, talk + messages("five"), room)[0] == talk + messages("five")
    assert turn(model, tok, talk, "five", room) == talk + messages("five", "Yes.")
    assert "forgotten" not in capsys.readouterr().err
    assert turn(model, tok, talk, "five", room - 1) == messages("three", "four", "five", "Yes.")
    [first, _] = capsys.readouterr().err.splitlines()
    assert first == "the oldest 2 messages no longer fit and are forgotten"
    alone = len(chat_ids(tok, messages("five")))
    assert turn(model, tok, talk, "five", alone) == messages("five", "Yes.")
    asked = len(model.asked)
    assert turn(model, tok, talk, "five", alone - 1) == talk
    assert "too long" in capsys.readouterr().err and len(model.asked) == asked


def test_a_pipe_gets_each_character_once_and_only_when_it_is_whole(model, tok, capsys):
    answer = Answer(tok)
    ids = [*"a\u20ac\x1b[2J".encode(), 0xff, tok.eos_id]
    x = torch.full((1, len(ids)), tok.mask_id)
    seen = []
    for n in [3, 0, 1, 2, 8, 4, 5, 6, 7, 9]:
        x[0, n] = ids[n]
        answer.show(x, torch.ones(x.shape))
        seen.append(capsys.readouterr().out)
    assert "".join(seen) == "a\u20ac\\x1b[2J\ufffd"
    assert seen[:4] == ["", "a", "", "\u20ac"]


def test_what_follows_an_end_does_not_belong_to_the_answer(tok):
    for end in (tok.eos_id, tok.eot_id):
        answer = Answer(tok)
        shown = []
        answer.screen = SimpleNamespace(in_place=True, show=lambda x, p: shown.append((x, p)))
        answer.show(torch.tensor([[97, 0xff, end, 98, tok.mask_id, end]]), torch.ones(1, 6))
        assert answer.finished() == "a\ufffd"              # nothing is still to come
        [(x, p)] = shown
        assert x.tolist() == [97, 0xff] and p.tolist() == [1, 1]


# ---- the program ----


@pytest.mark.parametrize("family", sorted(ADDED))
def test_a_chat_goes_on_with_what_was_said_until_it_is_reset(family, folders, talk):
    once, twice, reset = (talk(folders[family], said, end_tokens="never").out
                          for said in ("Hi\n", "Hi\nHi\n", "Hi\n/reset\nHi\n"))
    assert twice.startswith(once) and twice != 2 * once and reset == 2 * once


def test_commands_are_no_questions_and_nothing_is_no_question(folders, talk):
    said = "\n  \n/help\n/reset\n /nonsense \n/quit\nNot asked\n"
    out, err = talk(folders["llada"], said)
    assert out == ""
    assert [note.split()[0] for note in err.splitlines()] == ["/reset", "the", "there"]
    assert "passes" in talk(folders["llada"], "/etc is a folder?").err       # a question


def test_bytes_that_are_no_text_end_no_chat(folders, talk):
    out, err = talk(folders["llada"], b"\xff\xfe \x00 \x1b[2J \xed\xa0\x80\n/\x1b[2J\n")
    assert "passes" in err and "there is no /\\x1b[2J" in err and "\x1b" not in out + err


def test_a_question_that_is_too_long_is_a_note_and_old_turns_are_forgotten(short, talk):
    err = talk(short, f"{'x' * 200}\n{'a' * 20}\n{'b' * 20}\n").err
    too_long, cost, forgotten, cost_2 = err.splitlines()
    assert "too long" in too_long and "92 fit" in too_long
    assert "oldest 2 messages" in forgotten and "passes" in cost and "passes" in cost_2


def test_an_answer_that_leaves_no_room_is_one_sentence_before_anything_is_asked(short, talk, tok):
    longest = 100 - len(chat_ids(tok, messages("?")))
    fits, too_long = ({"gen_length": n, "block_length": n, "steps": n}
                      for n in (longest, longest + 1))
    assert "passes" in talk(short, "?\n", **fits).err
    with pytest.raises(ValueError, match=f"gen_length={longest + 1} .* up to {longest} fit"):
        talk(short, "?\n", **too_long)


def test_a_model_without_a_chat_format_is_one_sentence(tmp_path, talk):
    tok = byte_tokenizer()
    write_checkpoint(tmp_path, tok, 64)
    tok.save(tmp_path)
    with pytest.raises(ValueError, match="no chat format"):
        talk(tmp_path, "Hi\n")


@pytest.mark.parametrize("family", ADDED)
def test_a_task_asks_a_chat_as_training_and_evaluation_do(family, folders, monkeypatch):
    """The wrapped prompt is the user's message. Without a task the message is the text."""
    tok, row, seen = load_tokenizer(str(folders[family]), chat=True), load("test", n=1)[0], []
    question = row.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    monkeypatch.setattr(sample, "generate", lambda model, prompt, **_: (
        seen.extend(prompt) or torch.tensor([[tok.eos_id]])))
    for task in ("toy", ""):
        sample.main(SampleConfig(init_from=str(folders[family]), chat=True, task=task,
                                 prompt=question, device="cpu"))
    [trained] = tokenize([row], tok, 1000)
    assert seen == [trained.prompt, chat_ids(tok, [{"role": "user", "content": question}])]


def test_the_defaults_of_a_chat_are_those_of_the_sampler_but_for_the_lengths():
    ours, theirs = vars(SampleConfig(chat=True)), vars(Sampling())
    assert (ours["gen_length"], ours["block_length"], ours["steps"]) == (256, 32, 256)
    assert {name for name in theirs if ours[name] != theirs[name]} <= {
        "gen_length", "block_length", "steps"}


def test_a_pipe_gets_the_answers_alone_and_a_mistake_is_exit_code_1_and_one_line(folders, talk):
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    done = start(folders["llada"], *options, "--end_tokens=never")
    out, err = done.communicate(b"Hi\n/help", timeout=PATIENCE)       # a file may end without /quit
    assert done.returncode == 0 and len(err.decode().splitlines()) == 2
    assert out.decode() == talk(folders["llada"], "Hi", end_tokens="never").out != "\n"
    done = start(folders["llada"], "--gen_length=10", "--block_length=4")
    out, err = done.communicate(b"Hi\n", timeout=PATIENCE)
    assert done.returncode == 1 and out == b"" and len(err.splitlines()) == 1


def test_ctrl_c_stops_the_answer_and_not_the_program_and_at_the_prompt_it_ends(folders):
    process = start(folders["llada"], *ENDLESS)
    process.stdin.write(b"Hi\n")
    process.stdin.flush()
    read_until(process.stdout.fileno(), rb"\S{3}")
    process.send_signal(signal.SIGINT)
    read_until(process.stderr.fileno(), rb"stopped\n")
    assert process.poll() is None
    process.stdin.write(b"/help\nHi again\n")               # it goes on
    process.stdin.flush()
    read_until(process.stderr.fileno(), rb"/reset forgets")
    read_until(process.stdout.fileno(), rb"\n[\s\S]*\S{3}")
    process.send_signal(signal.SIGINT)
    read_until(process.stderr.fileno(), rb"stopped\n")
    time.sleep(0.3)                                         # now it waits for the next line
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    assert b"Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_on_a_terminal_an_answer_condenses_in_place(folders):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x0c\0\x28\0\0\0\0\0")        # 12 rows of 40
    process = start(folders["llada"], *ENDLESS, stdin=theirs, stdout=theirs, stderr=theirs,
                    prepare=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)))
    os.close(theirs)
    read_until(ours, rb"> ")
    os.write(ours, b"Hi\r")
    out = read_until(ours, rb"\x1b\[1;38;5;\d+m")
    assert b"\x1b[2m" + "\u2591".encode() * 39 in out and b"\x1b[11F" in out
    os.write(ours, b"\x03")                                 # the key itself
    read_until(ours, rb"stopped\x1b\[0m\r\n> ")
    os.write(ours, b"/reset\r")
    read_until(ours, rb"forgotten\x1b\[0m\r\n> ")
    os.write(ours, b"\x04")
    assert process.wait(PATIENCE) == 0
    os.close(ours)
