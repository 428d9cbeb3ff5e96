"""Draw how an answer is revealed out of masks: a moving picture in one SVG file.

    save_svg(recording, "answer.svg", "out/tiny", cost)

It has no script and needs no font or other file, so it moves even where a page shows it as an
image. Every token stands where the final text has it: a grey block until its pass has come, then
text, tinted by the probability that it had. CSS moves it; a browser that is asked for reduced
motion shows the final text.
"""
import math
import re
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from configurator import printable
from sampling.view import columns, shade, spans
from tasks.files import write_text

WIDTH = 72                              # columns of text at most
MOST_FRAMES = 60                        # with more passes, a frame shows several
MOST_PROMPT_LINES = 16                  # of a longer prompt the end is shown
START, PAUSE = 1.2, 4.0                 # seconds before the first frame and after the last one
FRAME, FRAMES = 0.5, 9.0                # seconds of a frame, and of all together, at most
MARGIN, COLUMN, LINE, PROMPT_LINE = 30, 9, 30, 24       # pixels
SMALL, FOOTER = 7.8, 24                 # pixels: a column of the caption, its lowest line
END = "\u00b7"                          # an end of text or of a turn
NEWLINE = '<tspan class="n">\u21b5</tspan>'

# the colours of view.html, light and dark; s0 .. s4 are its shades of probability
STYLE = """
svg{--card:#fff;--ink:#1d1d22;--soft:#5d5d66;--line:#dddad3;--mask:#d9d6cf;--c:var(--mask);
--tint:.32}
@media (prefers-color-scheme:dark){svg{--card:#1c1c23;--ink:#ececf1;--soft:#a3a3ae;--line:#34343e;
--mask:#3a3a45;--tint:.45}}
.s0{--c:#d75f00}.s1{--c:#af875f}.s2{--c:#878787}.s3{--c:#5f87af}.s4{--c:#0087d7}
text{font:15px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre;fill:var(--ink)}
.p text,.c text{fill:var(--soft)}.c text{font-size:13px}
.e text,.n{fill:var(--soft);fill-opacity:.6}.e,.g{--tint:0}
.t rect,.k{fill:var(--c);fill-opacity:var(--tint)}.m rect{fill:var(--mask);fill-opacity:1}
.card{fill:var(--card);stroke:var(--line)}.line{fill:var(--line)}.done{fill:#0087d7}
"""
STILL = "@media (prefers-reduced-motion:reduce){*{animation:none!important}}\n"


class Token(NamedTuple):
    text: str
    reveal: int                         # the pass that revealed it; 0: it was given
    kind: str                           # s0 .. s4: how sure; g: given; e: the end; m: a mask


class Part(NamedTuple):                 # what one line has of one of several texts
    number: int                         # of the text
    line: int
    column: int
    width: int                          # in columns
    text: str


def save_svg(recording, path: str, name: str, cost):
    """Write the picture of a view.Recording. name: the model's; cost: the cost.Cost of the answer.
    """
    folder = Path(name).resolve()
    if re.fullmatch(r"step_\d+", folder.name):      # a checkpoint has the name of its run
        folder = folder.parent
    about = [folder.name, f"{cost.numbers()['tokens_per_pass']:.2f} tokens per pass"]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, picture(recording, cost.passes, about))


def picture(recording, n_passes: int, about=()) -> str:
    """Return the SVG. about: texts of the caption. What is shown after the last pass joins it."""
    tokens = tokens_of(recording, n_passes)
    answer = parts_of([token.text for token in tokens])
    prompt = parts_of([printable(recording.prompt).rstrip()])
    n_hidden = max(0, n_lines(prompt) - MOST_PROMPT_LINES)
    prompt = [trimmed(part._replace(line=part.line - n_hidden), " \n")
              for part in prompt if part.line >= n_hidden]

    title = " ".join("".join(token.text for token in tokens if token.kind not in "em").split())
    title = title or "Text condensing out of masks"

    n_frames = min(n_passes, MOST_FRAMES)
    frames = [math.ceil(token.reveal * n_frames / max(1, n_passes)) for token in tokens]
    labels = [f"pass {frame * n_passes // max(1, n_frames):{len(str(n_passes))}} of {n_passes}"
              for frame in range(n_frames + 1)]
    caption = "".join(f" \u00b7 {printable(text)[:40]}" for text in about)

    shown = []
    for part in answer:
        kind, frame = tokens[part.number].kind, frames[part.number]
        text = words(part, LINE) if kind != "m" else ""
        shown.append(f'<g class="t {kind} f{frame}">{block(part)}{text}</g>')
    width = max([math.ceil(SMALL * len(labels[0] + caption)) + 200]
                + [COLUMN * (part.column + part.width) for part in prompt + answer])
    top = PROMPT_LINE * n_lines(prompt) + 12 * bool(prompt)
    bottom = top + LINE * n_lines(answer) + 12
    outer_width, height = width + 2 * MARGIN, bottom + FOOTER + 2 * MARGIN
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{outer_width}" height="{height}" '
        f'viewBox="0 0 {outer_width} {height}" role="img" xml:space="preserve">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}{motion(n_frames, sorted({*frames} - {0}))}{STILL}</style>",
        f'<rect class="card" x=".5" y=".5" width="{outer_width - 1}" height="{height - 1}" '
        f'rx="12"/>',
        f'<g transform="translate({MARGIN} {MARGIN})">',
        '<g class="p">', *(words(part, PROMPT_LINE) for part in prompt), "</g>",
        f'<g transform="translate(0 {top})">', *shown, "</g>",
        f'<g class="c" transform="translate(0 {bottom})">', *footer(labels, caption, width), "</g>",
        "</g>", "</svg>", ""])


def block(part: Part) -> str:
    """Return the block behind a part, without the blanks around its text."""
    part = trimmed(part) if part.text.strip(" ") else part
    return (f'<rect x="{COLUMN * part.column + 0.5}" y="{LINE * part.line + 3}" '
            f'width="{COLUMN * part.width - 1}" height="24" rx="3"/>')


def words(part: Part, line: int) -> str:
    """Return the text of a part, as wide as planned in any font. line: pixels from line to line."""
    length = f' textLength="{COLUMN * part.width}"' if len(part.text) > 1 else ""
    return (f'<text x="{COLUMN * part.column}" y="{line * part.line + 20}"{length}>'
            f'{escape(part.text).replace(chr(10), NEWLINE)}</text>')


def footer(labels: list[str], caption: str, width: int) -> list[str]:
    """Return a bar that fills, the label of each frame, the caption, and what the colours mean."""
    length = f"{SMALL * len(labels[0]):g}"
    return [
        f'<rect class="line" width="{width}" height="2" rx="1"/>',
        f'<rect class="done" width="{width}" height="2" rx="1"/>',
        # a column of labels, moved behind a window that shows one of them
        f'<svg y="8" width="{length}" height="20"><g class="labels">',
        *(f'<text y="{16 + 20 * n}" textLength="{length}">{label}</text>'
          for n, label in enumerate(labels)),
        "</g></svg>",
        f'<text x="{length}" y="24">{escape(caption)}</text>',
        f'<text x="{width - 100}" y="24" text-anchor="end">unsure</text>',
        *(f'<rect class="k s{n}" x="{width - 94 + 11 * n}" y="14" width="10" height="10" rx="2"/>'
          for n in range(5)),
        f'<text x="{width}" y="24" text-anchor="end">sure</text>']


def motion(n_frames: int, used: list[int]) -> str:
    """Return the keyframes, in percent of a round. used: the frames that reveal something."""
    each = min(FRAME, FRAMES / max(1, n_frames))
    total = START + n_frames * each + PAUSE

    def at(seconds):
        return f"{100 * seconds / total:.2f}%"
    begin, end, up = at(START), at(START + n_frames * each), f"translateY({-20 * n_frames}px)"
    in_steps = f"animation-timing-function:steps({max(1, n_frames)},start)"
    rules = [f".t rect,.t text,.labels,.done{{animation:{total:.2f}s linear infinite}}",
             f".labels{{transform:{up};animation-name:labels}}.done{{animation-name:done}}",
             f"@keyframes labels{{0%,{begin}{{transform:none;{in_steps}}}{end}{{transform:{up}}}}}",
             f"@keyframes done{{0%,{begin}{{transform:scaleX(0)}}{end}{{transform:none}}}}"]
    for k in used:
        began = START + (k - 1) * each
        a, b, c = at(began), at(began + 0.15), at(began + 1)
        rules.append(f".f{k} rect{{animation-name:r{k}}}.f{k} text{{animation-name:t{k}}}"
                     f"@keyframes r{k}{{0%,{a}{{fill:var(--mask);fill-opacity:1}}"
                     f"{b}{{fill:var(--c);fill-opacity:.8}}{c}{{fill-opacity:var(--tint)}}}}"
                     f"@keyframes t{k}{{0%,{a}{{opacity:0}}{b}{{opacity:1}}}}")
    return "\n".join(rules) + "\n"


# ----------------------------------------------------------------------------------------------
# from a recording to tokens, from texts to lines


def tokens_of(recording, n_passes: int) -> list[Token]:
    """Return the tokens of the final text; those that make one character together are one."""
    tok, ids, changed, has_ended, tokens = recording.tok, recording.ids, {}, False, []
    for k, changes in enumerate(recording.steps):
        changed |= {n: min(k, n_passes) for n, *_ in changes}
    for text, start, end in spans(tok, ids):
        is_end = ids[start] in (tok.eos_id, tok.eot_id)
        has_ended |= is_end
        if ids[start] == tok.mask_id:
            tokens.append(Token(text, 0, "m"))
            continue
        p = min(p for _, p in recording.cells[start:end])
        kind = "e" if has_ended else f"s{shade(p)}" if p > 0 else "g"
        reveal = max(changed[n] for n in range(start, end))
        tokens.append(Token(END if is_end else printable(text), reveal, kind))
    return tokens


def parts_of(texts: list[str]) -> list[Part]:
    """Lay texts out, one behind the other, in lines of WIDTH columns, broken at blanks if possible.

    A line break takes a column of its line. It, or a single blank, may stand behind the last.
    """
    cells = []                          # (character, its columns, the number of its text)
    for number, text in enumerate(texts):
        widths = [columns(c) for c in text]
        if text and not any(widths):    # a lonely accent is seen, too
            widths[0] = 1
        cells += [(c, width, number) for c, width in zip(text, widths)]

    placed, line, column = [], 0, 0
    for kind, word in groupby(cells, lambda cell: cell[0] if cell[0] in " \n" else "word"):
        word = list(word)
        if kind == "word" and 0 < column and column + sum(cell[1] for cell in word) > WIDTH:
            line, column = line + 1, 0
        for c, width, number in word:
            may_hang = c == "\n" or c == " " and len(word) == 1
            if column + width > WIDTH and not may_hang:
                line, column = line + 1, 0
            placed.append((number, line, column, width, c))
            column += width
            if c == "\n":
                line, column = line + 1, 0

    parts = []
    for (number, line), cells in groupby(placed, lambda cell: cell[:2]):
        _, _, starts, widths, text = zip(*cells)
        parts.append(Part(number, line, starts[0], sum(widths), "".join(text)))
    return parts


def trimmed(part: Part, blanks: str = " ") -> Part:
    """Return the part without the blanks, a column each, around its text."""
    text = part.text.strip(blanks)
    return part._replace(column=part.column + part.text.index(text), text=text,
                         width=part.width - len(part.text) + len(text))


def n_lines(parts: list[Part]) -> int:
    return parts[-1].line + 1 if parts else 0
