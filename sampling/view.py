"""How an answer came about: text condensing out of masks, on the terminal and as a web page.

    screen, recording = Screen(tok), Recording(tok, prompt)
    def on_step(x, p):
        screen.show(x[0], p[0])
        recording.show(x[0], p[0])
    complete(model, tok, [prompt], cfg, on_step)
    screen.end()
    recording.save_html("answer.html")

Both get ids in which masks stand where nothing is revealed yet, and p, the probability that each
token had when it was revealed; it is its colour. A token whose p is 0 was given, not generated.
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

# p below 0.2, 0.4, 0.6, 0.8 and up to 1: from orange over grey to blue, which all kinds of colour
# vision tell apart. Codes of the 256 colours; on black and on white each has a contrast above 3.
SHADES = 166, 137, 102, 67, 32
BOLD, FAINT = "1", "2"


class Screen:
    """Shows the answer after every pass: in place on a terminal, one line a pass elsewhere.

    pause: seconds between two frames, at least. Colours respect NO_COLOR (no-color.org).
    """

    def __init__(self, tok, pause: float = 0.05, out=None):
        self.tok, self.pause, self.out = tok, pause, out or sys.stdout
        self.in_place = self.out.isatty() and os.environ.get("TERM") != "dumb"
        self.has_colour = not os.environ.get("NO_COLOR")
        self.ids, self.p, self.height, self.shown_at = [], [], 0, 0.0

    def show(self, x, p):
        """x, p (N,): ids and probabilities; what differs from the last call is bold."""
        before, self.ids, self.p = self.ids, x.tolist(), p.tolist()
        if not self.in_place:
            text = self.writable(self.tok.show(self.ids))
            print(text.replace("\n", "\\n"), file=self.out, flush=True)
            return
        before = before or self.ids                         # at the start nothing is new
        is_new = [self.ids[n:n + 1] != before[n:n + 1] for n in range(len(self.ids))]
        rows, limit = self.rows(is_new), max(1, shutil.get_terminal_size().lines - 1)
        # no cursor reaches what has left the screen: of a long text show the part that changes
        new = [n for n, row in enumerate(rows) if any(style.startswith(BOLD) for _, style in row)]
        end = max(limit, 1 + max(new, default=0))
        time.sleep(max(0.0, self.shown_at + self.pause - time.monotonic()))
        self.draw(rows[max(0, end - limit):end])
        self.shown_at = time.monotonic()

    def end(self):
        """The last frame again: whole, however long it is, and with nothing marked as new."""
        if self.in_place and self.ids:
            self.draw(self.rows([False] * len(self.ids)))

    def draw(self, rows):
        up = f"\x1b[{self.height}F" if self.height else ""
        self.height = len(rows)
        lines = [f"{painted(row)}\x1b[K\n" for row in rows]
        self.out.write(f"{up}{''.join(lines)}\x1b[J")       # one write, or it would flicker
        self.out.flush()

    def rows(self, is_new):
        """The answer as rows of the terminal, broken here so that their number is known."""
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
    """Keeps what every pass changes, and saves it as a page to watch and to step through."""

    def __init__(self, tok, prompt: str = ""):
        self.tok, self.prompt = tok, prompt
        self.ids, self.cells, self.steps = [], [], []

    def show(self, x, p):
        """x, p (N,): ids and probabilities."""
        self.ids, p, cells = x.tolist(), p.tolist(), []
        for text, start, end in spans(self.tok, self.ids):
            if self.ids[start] == self.tok.mask_id:
                cells.append([])
            else:                       # the last of several tokens has the character they make
                texts = [""] * (end - start - 1) + [printable(text)]
                cells += [[piece, float(f"{p[n]:.4g}")] for n, piece in enumerate(texts, start)]
        before = self.cells or [[]] * len(cells)            # before the start all are masks
        self.steps.append([[n, *cell] for n, cell in enumerate(cells) if cell != before[n]])
        self.cells = cells

    def save_html(self, path: str, about: str = ""):
        """One page that needs nothing else, no network either. about: a line below the title.

        view.html reads {about, prompt, text, length, steps}; a step lists what it changed as
        [position, text, probability], or [position] where a mask comes back.
        """
        film = {"about": printable(about), "prompt": printable(self.prompt),
                "text": printable(self.tok.decode(self.ids)), "length": len(self.ids),
                "steps": self.steps or [[]]}
        # JSON in ASCII; without < no text in it can end the script that holds it
        data = json.dumps(film, separators=(",", ":")).replace("<", "\\u003c")
        page = Path(__file__).with_name("view.html").read_text(encoding="utf-8")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(page.replace('"FILM"', data), encoding="utf-8")


# ----------------------------------------------------------------------------------------------
# from tokens to characters, from characters to rows


def spans(tok, ids: list[int]) -> list[tuple[str, int, int]]:
    """Ids -> (text, start, end): what tokens start ... end - 1 show, in order.

    Mostly one token; several where a character is made of the bytes of several.
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


def printable(text: str) -> str:
    """Text whose control characters, but for newlines, are written out: no escape codes.

    Blanks of other widths stay, as do the joiners (U+200C, U+200D) of Persian, Hindi and emoji.
    """
    return "".join(c if c.isprintable() or c in "\n\u200c\u200d" or unicodedata.category(c) == "Zs"
                   else ascii(c)[1:-1] for c in text)


def wrapped(cells, width: int):
    """(character, style) pairs -> rows of them, none wider than the terminal."""
    rows, used = [[]], 0
    for c, style in cells:
        if c == "\n" or used + columns(c) > width:
            rows.append([])
            used = 0
        if c != "\n":
            rows[-1].append((c, style))
            used += columns(c)
    return rows


def columns(c: str) -> int:
    """Columns that a character takes, at most: terminals differ about joined emoji."""
    if c == "\ufe0f":                   # makes an emoji of the character before, and wide
        return 1
    if unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def painted(row) -> str:
    parts = [(style, "".join(c for c, _ in group)) for style, group in groupby(row, lambda x: x[1])]
    return "".join(f"\x1b[{style}m{text}\x1b[0m" if style else text for style, text in parts)
