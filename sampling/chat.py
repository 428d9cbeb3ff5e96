"""Talk with a model: every answer condenses out of masks, block by block.

    python chat.py --init_from=GSAI-ML/LLaDA-8B-Instruct
    echo "What is 3 times 4?" | python chat.py --init_from=GSAI-ML/LLaDA-8B-Instruct

/reset forgets the chat, /help says what there is, /quit or Ctrl-D ends. Ctrl-C stops an answer:
what stands before its first mask stays in the chat, and if nothing does, the question goes too.
Into a pipe go the answers alone, as far as they are finished from the left; notes go to stderr.
"""
import contextlib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # a script in a folder

from configurator import run
from pretrained.chat_format import chat_ids
from sample import Sampling, Tally, complete, load_model
from sampling.view import Screen, printable

COMMANDS = "/reset forgets the chat, /quit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass
class ChatConfig(Sampling):
    init_from: str = "GSAI-ML/LLaDA-8B-Instruct"    # checkpoint, out_dir or hub name
    revision: str = ""                  # of a hub name: branch, tag or commit
    gen_length: int = 256               # longest answer, in tokens
    block_length: int = 32              # a block is finished before the next begins
    steps: int = 256                    # passes in all; gen_length of them reveal one token each
    device: str = "auto"                # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one


def main(cfg: ChatConfig):
    model, tok = load_model(cfg.init_from, cfg.device, cfg.revision, chat=True)
    room = model.config.block_size - cfg.gen_length
    shortest = len(chat_ids(tok, [{"role": "user", "content": "?"}]))
    if room < shortest:
        raise ValueError(f"gen_length={cfg.gen_length} leaves no room for a question in "
                         f"block_size={model.config.block_size}; up to "
                         f"{model.config.block_size - shortest} fit")
    sys.stdin.reconfigure(errors="replace")             # bytes that are no text end no chat
    sys.stdout.reconfigure(errors="backslashreplace")
    is_typed = sys.stdin.isatty()
    if is_typed:
        with contextlib.suppress(ImportError):          # arrow keys, where there is readline
            importlib.import_module("readline")
        note(COMMANDS)
    messages = []
    with contextlib.suppress(EOFError, KeyboardInterrupt):      # Ctrl-D; Ctrl-C at the prompt
        while (text := input("> " if is_typed else "").strip()) != "/quit":
            if text == "/reset":
                messages = []
                note("the chat is forgotten")
            elif text == "/help":
                note(COMMANDS)
            elif text.startswith("/") and len(text.split()) == 1:
                note(f"there is no {text}: {COMMANDS}")
            elif text:
                messages = turn(model, tok, messages, text, room, cfg)


def turn(model, tok, messages: list[dict], text: str, room: int, cfg: ChatConfig) -> list[dict]:
    """Answers text: the chat so far -> the chat from now on. room: tokens that a chat may have."""
    asked = [*messages, {"role": "user", "content": text}]
    kept, ids = newest(tok, asked, room)
    if len(ids) > room:
        note(f"this is too long: {len(ids)} tokens, and up to {room} fit")
        return messages
    if len(kept) < len(asked):
        note(f"the oldest {len(asked) - len(kept)} messages no longer fit and are forgotten")
    answer, tally, is_stopped = Answer(tok), Tally(), False
    try:
        complete(model, tok, [ids], cfg, on_step=answer.show, tally=tally)
    except KeyboardInterrupt:
        is_stopped = True
    answer.end()
    note("stopped" if is_stopped else tally.line())
    if is_stopped and not answer.finished():
        return messages
    return [*kept, {"role": "assistant", "content": answer.finished()}]


def newest(tok, messages: list[dict], room: int):
    """Forgets the oldest question and its answer until the rest fits -> messages, their ids."""
    while len(ids := chat_ids(tok, messages)) > room and len(messages) > 1:
        messages = messages[2:]
    return messages, ids


class Answer:
    """What is revealed of an answer, shown in place on a terminal and else as it is finished."""

    def __init__(self, tok):
        self.tok, self.screen, self.ids, self.written = tok, Screen(tok, pause=0), [], ""

    def show(self, x, p):
        """x, p (1, N); what lies behind an end of text or turn is no part of the answer."""
        ids, ends = x[0].tolist(), (self.tok.eos_id, self.tok.eot_id)
        n = next((n for n, i in enumerate(ids) if i in ends), len(ids))
        self.ids = ids[:n]
        if self.screen.in_place:
            self.screen.show(x[0, :n], p[0, :n])
        else:
            text = printable(self.finished())
            print(text[len(self.written):], end="", flush=True)
            self.written = text

    def finished(self) -> str:
        """The text before the first mask, without a character that still lacks bytes."""
        if self.tok.mask_id not in self.ids:
            return self.tok.decode(self.ids)
        return self.tok.decode(self.ids[:self.ids.index(self.tok.mask_id)]).rstrip("\ufffd")

    def end(self):
        if self.screen.in_place:
            self.screen.end()
        else:
            print(flush=True)


def note(text: str):
    """What is not part of the chat: dim, and on stderr."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{dim}{printable(text)}{plain}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main, ChatConfig)
