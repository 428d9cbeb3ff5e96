"""Hold a conversation with a model: every answer appears out of masks, block by block.

/reset forgets the conversation, /help lists the commands, /quit or Ctrl-D ends. Ctrl-C stops an
answer: the text before its first mask stays in the conversation; if there is none, the question is
dropped, too. Into a pipe go the answers alone, each part once it is finished from the left; notes
go to stderr.
"""
import contextlib
import importlib
import sys

from configurator import printable
from pretrained.chat_format import chat_ids
from sampling.cost import Cost
from sampling.view import Screen

COMMANDS = "/reset forgets the chat, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def talk(answer, tok, gen_length: int, block_size: int):
    """Read questions from stdin and print answers until the input ends.

    answer(ids, on_step, cost) generates up to gen_length tokens after ids, the conversation so far;
    it calls on_step(x, p) after every pass and adds to cost. block_size: the most tokens that the
    model reads. Raises ValueError if that leaves no room for a question.
    """
    room = block_size - gen_length
    shortest = len(chat_ids(tok, [{"role": "user", "content": "?"}]))
    if room < shortest:
        raise ValueError(f"gen_length={gen_length} leaves no room for a question in "
                         f"block_size={block_size}; up to {block_size - shortest} fit")
    sys.stdin.reconfigure(errors="replace")             # bad bytes must not end the conversation
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
                messages = turn(answer, tok, messages, text, room)


def turn(answer, tok, messages: list[dict], text: str, room: int) -> list[dict]:
    """Answer text -> the messages with the question and its answer.

    room: the most tokens that a conversation may have; the oldest messages are dropped to fit.
    """
    asked = [*messages, {"role": "user", "content": text}]
    kept, ids = newest(tok, asked, room)
    if len(ids) > room:
        note(f"this is too long: {len(ids)} tokens, and up to {room} fit")
        return messages
    if len(kept) < len(asked):
        note(f"the oldest {len(asked) - len(kept)} messages no longer fit and are forgotten")

    shown, cost, is_stopped = Answer(tok), Cost(), False
    try:
        answer(ids, shown.show, cost)
    except KeyboardInterrupt:
        is_stopped = True
    shown.end()
    note("stopped" if is_stopped else cost.line())
    if is_stopped and not shown.finished():
        return messages
    return [*kept, {"role": "assistant", "content": shown.finished()}]


def newest(tok, messages: list[dict], room: int):
    """Drop the oldest question and its answer until the rest fits -> messages, their ids."""
    while len(ids := chat_ids(tok, messages)) > room and len(messages) > 1:
        messages = messages[2:]
    return messages, ids


class Answer:
    """Shows an answer as it is revealed: in place on a terminal, else its finished part."""

    def __init__(self, tok):
        self.tok, self.screen = tok, Screen(tok, pause=0)
        self.ids, self.written = [], ""

    def show(self, x, p):
        """Take x and p (1, N); what follows an end of text or turn does not belong to it."""
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
        """Return the text before the first mask, without a character that still lacks bytes."""
        if self.tok.mask_id not in self.ids:
            return self.tok.decode(self.ids)
        return self.tok.decode(self.ids[:self.ids.index(self.tok.mask_id)]).rstrip("\ufffd")

    def end(self):
        if self.screen.in_place:
            self.screen.end()
        else:
            print(flush=True)


def note(text: str):
    """Print what is not part of the conversation: dim, on stderr."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    print(f"{dim}{printable(text)}{plain}", file=sys.stderr, flush=True)
