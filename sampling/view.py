"""Show how an answer is revealed out of masks, on the terminal and as a web page.

    screen, recording = Screen(tok), Recording(tok, prompt)
    def on_step(x, p):
        screen.show(x[0], p[0])
        recording.show(x[0], p[0])
    complete(model, tok, [prompt], cfg, on_step)
    screen.end()
    recording.save_html("answer.html")

Both take ids, with the mask id where nothing is revealed yet, and p, the probability that each
token had when it was revealed. p sets its colour; 0 marks a token that was given, not generated.
"""
import codecs
import json
import os
import shutil
import sys
import time
import unicodedata
from itertools import groupby
from pathlib import Path

from configurator import printable
from tasks.files import write_text

# For p below 0.2, 0.4, 0.6, 0.8 and up to 1: orange over grey to blue, which all kinds of colour
# vision tell apart. Codes of the 256 colours; each has a contrast above 3 on black and on white.
SHADES = 166, 137, 102, 67, 32
BOLD, FAINT = "1", "2"


class Screen:
    """Shows the answer after every pass: in place on a terminal, else one line per pass.

    pause: the least number of seconds between two frames. NO_COLOR turns colours off.
    """

    def __init__(self, tok, pause: float = 0.05, out=None):
        self.tok, self.pause, self.out = tok, pause, out or sys.stdout
        self.in_place = self.out.isatty() and os.environ.get("TERM") != "dumb"
        self.has_colour = not os.environ.get("NO_COLOR")
        self.ids, self.p, self.height, self.shown_at = [], [], 0, 0.0

    def show(self, x, p):
        """Take ids and probabilities, x and p (N,); what differs from the last call is bold."""
        before, self.ids, self.p = self.ids, x.tolist(), p.tolist()
        if not self.in_place:
            text = self.writable(self.tok.show(self.ids))
            print(text.replace("\n", "\\n"), file=self.out, flush=True)
            return
        before = before or self.ids                         # at the start nothing is new
        is_new = [self.ids[n:n + 1] != before[n:n + 1] for n in range(len(self.ids))]
        lines, limit = self.lines(is_new), max(1, shutil.get_terminal_size().lines - 1)
        # the cursor cannot reach lines that have left the screen: show the part that changes
        new = [n for n, line in enumerate(lines) if has_bold(line)]
        end = max(limit, 1 + max(new, default=0))
        time.sleep(max(0.0, self.shown_at + self.pause - time.monotonic()))
        self.draw(lines[max(0, end - limit):end])
        self.shown_at = time.monotonic()

    def end(self):
        """Draw the last frame again: all of it, with nothing marked as new."""
        if self.in_place and self.ids:
            self.draw(self.lines([False] * len(self.ids)))

    def draw(self, lines):
        up = f"\x1b[{self.height}F" if self.height else ""
        self.height = len(lines)
        text = "".join(f"{painted(line)}\x1b[K\n" for line in lines)
        self.out.write(f"{up}{text}\x1b[J")                 # one write: several would flicker
        self.out.flush()

    def lines(self, is_new):
        """Break the answer into the terminal's lines here, so that their number is known."""
        cells = []
        for text, start, end in spans(self.tok, self.ids):
            style = self.style(min(self.p[start:end]), self.ids[start], any(is_new[start:end]))
            cells += [(c, style) for c in self.writable(text)]
        return wrapped(cells, shutil.get_terminal_size().columns - 1)

    def style(self, p, token, is_new):
        if token == self.tok.mask_id:
            return FAINT
        colour = f"38;5;{SHADES[shade(p)]}" if p > 0 and self.has_colour else ""
        return f"{BOLD};{colour}".strip(";") if is_new else colour

    def writable(self, text):
        encoding = getattr(self.out, "encoding", None) or "utf-8"
        return printable(text).encode(encoding, "backslashreplace").decode(encoding)


class Recording:
    """Records what every pass changes, and saves it as a web page to step through."""

    def __init__(self, tok, prompt: str = ""):
        self.tok, self.prompt = tok, prompt
        self.ids, self.cells, self.steps = [], [], []

    def show(self, x, p):
        """Take ids and probabilities, x and p (N,)."""
        self.ids, p, cells = x.tolist(), p.tolist(), []
        for text, start, end in spans(self.tok, self.ids):
            if self.ids[start] == self.tok.mask_id:
                cells.append([])
            else:                       # of several tokens the last shows the character
                texts = [""] * (end - start - 1) + [printable(text)]
                cells += [[piece, float(f"{p[n]:.4g}")] for n, piece in enumerate(texts, start)]
        before = self.cells or [[]] * len(cells)            # before the start all are masks
        self.steps.append([[n, *cell] for n, cell in enumerate(cells) if cell != before[n]])
        self.cells = cells

    def save_html(self, path: str, about: str = ""):
        """Write one page that needs no other file and no network. about: a line below the title.

        view.html reads {about, prompt, text, length, steps}; a step lists what it changed as
        [position, text, probability], or [position] where a mask comes back.
        """
        recording = {"about": printable(about), "prompt": printable(self.prompt),
                     "text": printable(self.tok.decode(self.ids)), "length": len(self.ids),
                     "steps": self.steps or [[]]}
        # ASCII JSON without <, so that no text in it can end the script that holds it
        data = json.dumps(recording, separators=(",", ":")).replace("<", "\\u003c")
        page = Path(__file__).with_name("view.html").read_text(encoding="utf-8")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page.replace('"RECORDING"', data))


# ----------------------------------------------------------------------------------------------
# from tokens to characters, from characters to lines


def spans(tok, ids: list[int]) -> list[tuple[str, int, int]]:
    """Split ids into (text, start, end), in order: tokens start .. end - 1 show that text.

    Mostly that is one token; several, if they hold the bytes of one character.
    """
    added, found, data, start = set(tok.added.values()), [], b"", 0
    for n, i in enumerate(ids):
        if i not in added:
            data += tok.pieces[i]
            if n + 1 < len(ids) and ids[n + 1] not in added and ends_inside_a_character(data):
                continue
        text = tok.show([i]) if i in added else data.decode(errors="replace")
        found.append((text, start, n + 1))
        data, start = b"", n + 1
    return found


def ends_inside_a_character(data: bytes) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return bool(decoder.getstate()[0])


def shade(p: float) -> int:
    return min(int(5 * p), 4)


def wrapped(cells, width: int):
    """Break (character, style) pairs into lines of at most `width` columns."""
    lines, used = [[]], 0
    for c, style in cells:
        if c == "\n" or used + columns(c) > width:
            lines.append([])
            used = 0
        if c != "\n":
            lines[-1].append((c, style))
            used += columns(c)
    return lines


def columns(c: str) -> int:
    """The most columns that a character takes: terminals differ about joined emoji."""
    if c == "\ufe0f":                   # turns the character before into a wide emoji
        return 1
    if unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def has_bold(line) -> bool:
    return any(style.startswith(BOLD) for _, style in line)


def painted(line) -> str:
    """Join (character, style) pairs into text with escape codes."""
    parts = []
    for style, group in groupby(line, lambda cell: cell[1]):
        text = "".join(c for c, _ in group)
        parts.append(f"\x1b[{style}m{text}\x1b[0m" if style else text)
    return "".join(parts)
