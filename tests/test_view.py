"""Laws of what is seen: the last frame is the answer, no text commands a terminal or a page."""
import html
import json
import os
import re
import resource
import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import printable
from helpers import PATIENCE
from pretrained.tokenizer import BYTES, byte_tokenizer, our_tokenizer, toy_tokenizer
from sampling import view
from sampling.view import SHADES, Recording, Screen, spans

TOK, MASK = byte_tokenizer(), byte_tokenizer().mask_id
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium, chromium-browser or google-chrome")
HOSTILE = ("</script><script>window.pwned = 1</script>", "<img src=x onerror='window.pwned = 1'>",
           "\" onmouseover=\"pwned = 1\" '`${pwned = 1}", "<!--<script>", "&lt;b&gt; &amp;",
           "a\u2028b\u2029c", "nul \x00 bell \x07 \x1b[2J\x1b]0;title\x07 \x9b2J \r over",
           "\u202edrowssap\u202c", "\"RECORDING\"", "\\u003c \\", "one\ntwo\n")
CHARACTERS = ("a", "Z", " ", "\n", "\u00e9", "\u4e2d", "\u3042", "\U0001f642", "e\u0301", "\u2591",
              "\U0001f469\u200d\U0001f680", "\u2764\ufe0f", "\u3000", "\x1b[2J", "\x1b[9A", "\r",
              "\t", "\x9b", "\u202e")
WIDTHS = {**dict.fromkeys("\u4e2d\u3042\u3000\U0001f642\U0001f469\U0001f680", 2),
          **dict.fromkeys("\u0301\u200d", 0)}
lines_of_text = st.lists(st.sampled_from(CHARACTERS), max_size=120).map("".join)


class Terminal:
    """A terminal as far as a screen may use it: what it shows after all that was written.

    Anything else, a line that it would have to break or a cursor above its first row fails.
    """

    def __init__(self, width=40, height=12, encoding="utf-8"):
        self.width, self.height, self.encoding = width, height, encoding
        self.rows, self.y, self.x, self.sent = [""], 0, 0, ""

    def isatty(self):
        return True

    def flush(self):
        pass

    def write(self, text):
        self.sent += text
        text.encode(self.encoding)
        for code, number, letter, c in re.findall(r"(\x1b\[([0-9;]*)([FKJm]))|([\s\S])", text):
            if letter == "F":
                self.y, self.x = self.y - int(number), 0
                assert self.y >= self.top(), "the cursor stops at the first row"
            elif letter == "K":
                self.rows[self.y] = self.rows[self.y][:self.x]
            elif letter == "J":
                del self.rows[self.y + 1:]
                self.rows[self.y] = self.rows[self.y][:self.x]
            elif c == "\n":
                self.y, self.x = self.y + 1, 0
                self.rows += [""] * (self.y == len(self.rows))
            elif c:
                assert c.isprintable() or c in "\u200d\u3000", ascii(c)
                row = self.rows[self.y]
                self.rows[self.y] = row[:self.x] + c + row[self.x + 1:]
                self.x += 1
                assert sum(WIDTHS.get(c, 1) for c in self.rows[self.y][:self.x]) < self.width

    def top(self):
        return max(0, len(self.rows) - self.height)

    def visible(self):
        return self.rows[self.top():]


def frames(ids, order=None, p=None):
    """x, p from masks only to ids, one token at a time in this order."""
    x, seen = torch.full((len(ids),), MASK), torch.zeros(len(ids))
    yield x.clone(), seen.clone()
    for n in order or range(len(ids)):
        x[n], seen[n] = ids[n], 0.9 if p is None else p[n]
        yield x.clone(), seen.clone()


@pytest.fixture(autouse=True)
def no_terminal_of_ours(monkeypatch):
    for name in ("NO_COLOR", "TERM", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


def screen_on(terminal, monkeypatch, tok=TOK):
    monkeypatch.setenv("COLUMNS", str(terminal.width))
    monkeypatch.setenv("LINES", str(terminal.height))
    return Screen(tok, pause=0, out=terminal)


# ---- characters of several tokens ----


@settings(deadline=None)
@given(st.lists(st.integers(0, 257), max_size=30) | st.text().map(lambda t: list(t.encode())))
def test_spans_are_all_tokens_in_order_and_together_what_the_tokenizer_shows(ids):
    found = spans(TOK, ids)
    assert "".join(text for text, _, _ in found) == TOK.show(ids)
    assert [n for _, start, end in found for n in range(start, end)] == list(range(len(ids)))
    assert all(text for text, _, _ in found)


def test_the_bytes_of_a_character_are_one_span_and_a_lonely_byte_is_one_of_its_own():
    euro = list("\u20ac".encode())
    assert spans(TOK, [65, *euro, 66]) == [("A", 0, 1), ("\u20ac", 1, 4), ("B", 4, 5)]
    assert spans(TOK, [*euro[:2], MASK, euro[2]]) == [
        ("\ufffd", 0, 2), ("\u2591", 2, 3), ("\ufffd", 3, 4)]


# ---- the terminal ----


@settings(deadline=None, max_examples=60)
@given(lines_of_text, st.randoms(), st.integers(8, 60), st.integers(2, 10))
def test_in_place_the_last_frame_is_the_answer_and_nothing_above_it_is_touched(
        text, random, width, height):
    with pytest.MonkeyPatch.context() as patch:
        terminal = Terminal(width, height)
        terminal.write("$ view\n")
        screen = screen_on(terminal, patch)
        ids = TOK.encode(text)
        for x, p in frames(ids, random.sample(range(len(ids)), len(ids))):
            screen.show(x, p)
        screen.end()
    above, *rows, below = terminal.rows
    assert (terminal.x, terminal.y, below) == (0, len(terminal.rows) - 1, "")
    assert above == "$ view"
    assert "".join(rows) == printable(TOK.decode(ids)).replace("\n", "")
    assert len(rows) >= 1 + TOK.decode(ids).count("\n")


def test_every_frame_fits_the_screen_and_shows_what_has_just_been_revealed(monkeypatch):
    """Of a text longer than the screen the part that changes is seen, at the end all of it."""
    terminal = Terminal(10, 5)
    screen = screen_on(terminal, monkeypatch)
    ids = TOK.encode("".join(chr(97 + n // 9) for n in range(9 * 20)))      # a row of a's, of b's
    for n, (x, p) in zip([None, 0, 179, 90], frames(ids, [0, 179, 90])):
        screen.show(x, p)
        assert len(terminal.rows) <= 5
        assert n is None or chr(ids[n]) in "".join(terminal.rows)
    screen.end()
    assert len(terminal.rows) == 21 and terminal.rows[0][0] == "a" and terminal.rows[19][8] == "t"


def test_the_newest_tokens_are_bold_and_no_longer_at_the_end(monkeypatch):
    terminal = Terminal()
    screen = screen_on(terminal, monkeypatch)
    colour = f"38;5;{SHADES[4]}"
    for step, (x, p) in enumerate(frames(TOK.encode("abc"), [1, 0, 2])):
        terminal.sent = ""
        screen.show(x, p)
        assert re.findall(r"\x1b\[1;([\d;]+)m(.)", terminal.sent) == [
            (colour, "bac"[step - 1])] * (step > 0)
    terminal.sent = ""
    screen.end()
    assert f"\x1b[{colour}mabc\x1b[0m" in terminal.sent


def test_a_piece_is_coloured_by_its_probability_and_what_was_given_is_not(monkeypatch):
    terminal = Terminal()
    screen = screen_on(terminal, monkeypatch)
    ids = [97, 98, 99, 100, 101, 102, *"\u20ac".encode(), MASK]
    p = [0.1, 0.3, 0.5, 0.7, 1.0, 0.0, 0.99, 0.01, 0.99, 0.0]
    screen.show(torch.tensor(ids), torch.tensor(p))
    for c, shade in zip("abcde\u20ac", [*SHADES, SHADES[0]]):   # as sure as its least sure byte
        assert f"\x1b[38;5;{shade}m{c}\x1b[0m" in terminal.sent
    assert "\x1b[0mf\x1b[38" in terminal.sent and "\x1b[2m\u2591\x1b[0m" in terminal.sent


def test_no_color_means_no_colour(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    screen = screen_on(terminal, monkeypatch)
    for x, p in frames(TOK.encode("abc")):
        screen.show(x, p)
    assert "38;" not in terminal.sent and terminal.rows[0] == "abc"


@pytest.mark.parametrize("dumb", [False, True])
def test_elsewhere_it_is_one_line_a_pass_without_codes(dumb, monkeypatch, capsys):
    terminal = Terminal() if dumb else None
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen(TOK, pause=9, out=terminal)             # and without a pause
    for x, p in frames(TOK.encode("a\n\x1b[J"), [1, 0, 2, 3, 4]):
        screen.show(x, p)
    screen.end()
    out = terminal.sent if dumb else capsys.readouterr().out
    first, *between, last = out.splitlines()
    assert (first, last) == ("\u2591" * 5, "a\\n\\x1b[J") and len(between) == 4


def test_between_two_frames_lies_a_pause(monkeypatch):
    slept, now = [], [100.0]
    monkeypatch.setattr(view.time, "sleep", slept.append)
    monkeypatch.setattr(view.time, "monotonic", lambda: now[0])
    screen = screen_on(Terminal(), monkeypatch)
    screen.pause = 0.5
    for seconds, (x, p) in zip([9.0, 0.2, 0.9], frames(TOK.encode("ab"))):
        now[0] += seconds                       # that the pass took itself
        screen.show(x, p)
    assert slept == pytest.approx([0, 0.3, 0])


def test_what_the_terminal_cannot_encode_is_written_out(monkeypatch):
    terminal = Terminal(encoding="ascii")
    screen = screen_on(terminal, monkeypatch)
    screen.show(torch.tensor([MASK, *"\u4e2d".encode()]), torch.ones(4))
    assert terminal.rows[0] == "\\u2591\\u4e2d"


def test_what_a_model_writes_cannot_command_the_terminal():
    assert printable("a\x1b[2Jb\rc\x00\nd \u4e2d\u2591\u00b7") == (
        "a\\x1b[2Jb\\rc\\x00\nd \u4e2d\u2591\u00b7")
    assert printable("\x9b\u202e\u2028\ud800\x7f") == "\\x9b\\u202e\\u2028\\ud800\\x7f"
    kept = "\u3000\u00a0 \U0001f469\u200d\U0001f680 \u0646\u200c\u0645 e\u0301"
    assert printable(kept) == kept


def rgb(code):
    """The colour of a code of the 256 colours from 16 to 231, a cube of 6 x 6 x 6."""
    return [(0, 95, 135, 175, 215, 255)[(code - 16) // 6 ** k % 6] for k in (2, 1, 0)]


def luminance(colour):
    """Relative luminance as WCAG 2 defines it."""
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts))


def test_every_shade_is_readable_on_black_and_on_white_and_the_page_has_the_same():
    page = open(view.__file__.replace(".py", ".html"), encoding="utf-8").read()
    for n, code in enumerate(SHADES):
        assert (luminance(rgb(code)) + 0.05) / 0.05 > 3
        assert 1.05 / (luminance(rgb(code)) + 0.05) > 3
        assert f".s{n} {{ --c: {' '.join(map(str, rgb(code)))} }}" in page


# ---- the page ----


def saved(recording, tmp_path, about=""):
    path = tmp_path / "page.html"
    recording.save_html(path, about)
    return path, json.loads(re.search(r'"recording">(.*?)</script>', path.read_text("utf-8"))[1])


def recording_of(text, prompt="How?", order=None, p=None, tok=TOK):
    recording = Recording(tok, prompt)
    for x, seen in frames(tok.encode(text), order, p):
        recording.show(x, seen)
    return recording


def visit(path, fragment="", script="", budget=2000):
    """The page after a script of ours has run in it -> what the script returns.

    Fails on an error of any script in the page, and on anything that its policy had to stop.
    """
    before = """<script>var errors = []
        onerror = (...all) => { errors.push(all.join(" ")) }
        addEventListener("securitypolicyviolation", e => errors.push(e.violatedDirective))
        </script>"""
    after = """<script>(async () => {
        const wait = seconds => new Promise(done => setTimeout(done, 1000 * seconds))
        const answer = () => [...document.querySelectorAll("#answer span")]
        const one = span => span.className === "mask" ? "\u2591" : span.textContent
        const seen = () => answer().map(one).join("")
        const value = await (async () => { SCRIPT })().catch(e => { errors.push(String(e)) })
        document.documentElement.dataset.result = JSON.stringify({errors, value})
        })()</script>""".replace("SCRIPT", script)
    driven = path.with_name("driven.html")
    text = path.read_text("utf-8")
    assert text.count("<title>") == 1
    driven.write_text(text.replace("<title>", before + "<title>") + after, "utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={path.parent / 'profile'}", f"--virtual-time-budget={budget}",
         f"{driven.as_uri()}{fragment}"], capture_output=True, timeout=PATIENCE)
    found = re.search(r'data-result="(.*?)"', done.stdout.decode())
    assert found, done.stderr.decode()[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert not result["errors"]
    return result["value"]


def test_a_step_holds_what_it_changed_and_no_more(tmp_path):
    _, data = saved(recording_of("ab\u20ac", order=[4, 1, 0, 2, 3], p=[0.1, 0.5, 1, 0.25, 2 / 3]),
                    tmp_path, "a model")
    assert data == {
        "about": "a model", "prompt": "How?", "text": "ab\u20ac", "length": 5,
        "steps": [[], [[4, "\ufffd", 0.6667]], [[1, "b", 0.5]], [[0, "a", 0.1]],
                  [[2, "\ufffd", 1.0]],                     # then the character is whole: it moves
                  [[2, "", 1.0], [3, "", 0.25], [4, "\u20ac", 0.6667]]]}


def test_an_unlikely_token_is_still_from_the_model():
    recording = Recording(TOK)
    recording.show(torch.tensor([*b"abc"]), torch.tensor([1e-6, 0.123456, 0.0]))
    assert recording.steps == [[[0, "a", 1e-6], [1, "b", 0.1235], [2, "c", 0.0]]]


def test_the_size_of_a_page_grows_with_the_tokens_not_with_tokens_times_steps(tmp_path):
    size = [saved(recording_of("a" * n), tmp_path)[0].stat().st_size for n in (100, 200, 400)]
    assert size[2] - size[1] < 2.3 * (size[1] - size[0])


def test_the_page_asks_for_nothing_from_anywhere(tmp_path):
    text = saved(recording_of("abc"), tmp_path)[0].read_text("utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import|\bsrc=|fetch\(", text)


def test_the_folder_of_a_page_is_made_and_a_recording_may_be_empty(tmp_path):
    Recording(TOK).save_html(str(tmp_path / "new" / "page.html"))
    assert saved(Recording(TOK), tmp_path)[1]["steps"] == [[]]
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Recording(TOK).save_html(str(tmp_path / "file" / "page.html"))


def test_a_full_disk_leaves_the_page_before_and_is_told_with_its_path(tmp_path):
    path = tmp_path / "page.html"
    recording_of("before").save_html(str(path))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="page.html"):
            recording_of("after").save_html(str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["page.html"]


def test_what_is_no_regular_file_stays_what_it_is(tmp_path):
    """A rename would put a file in the place of a pipe, a device or a link."""
    end, start = os.pipe()
    page = Recording(TOK)
    page.save_html(f"/dev/fd/{start}")
    assert os.read(end, 15) == b"<!doctype html>" and os.readlink(f"/dev/fd/{start}")[:5] == "pipe:"
    for number in (end, start):
        os.close(number)
    os.mkfifo(tmp_path / "nobody.html")                     # reads it: no wait for ever
    with pytest.raises(OSError, match="nobody.html"):
        page.save_html(str(tmp_path / "nobody.html"))
    (tmp_path / "there").mkdir()
    (tmp_path / "link.html").symlink_to("there/page.html")
    page.save_html(str(tmp_path / "link.html"))
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "there/page.html").is_file()
    with pytest.raises(OSError, match="there"):
        page.save_html(str(tmp_path / "there"))
    assert not (tmp_path / "there.new").exists()


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_can_end_the_script_that_holds_it(text, tmp_path):
    path, data = saved(recording_of(text, text, p=None), tmp_path, text)
    assert data["text"] == data["prompt"] == data["about"] == printable(text)
    template = open(view.__file__.replace(".py", ".html"), encoding="utf-8").read()
    page = path.read_text("utf-8")
    assert page.count("<") == template.count("<")           # no tag that the template lacks
    assert all(c.isprintable() or c == "\n" for c in page)


@browser
def test_hostile_text_is_seen_as_text(tmp_path):
    """Where a token is a whole tag, too."""
    text, shown = "\n".join(HOSTILE) + "\ud800", "".join(HOSTILE)
    tok = our_tokenizer("hostile", r"[\s\S]", BYTES + [t.encode() for t in HOSTILE])
    recording = Recording(tok, text)
    recording.show(torch.arange(256, 256 + len(HOSTILE)), torch.ones(len(HOSTILE)))
    path, _ = saved(recording, tmp_path, text)
    page = visit(path, script="""
        const text = id => document.getElementById(id).textContent
        return {pwned: typeof pwned, images: document.images.length, prompt: text("prompt"),
                about: text("about"), text: text("text"), seen: seen().replaceAll("\u21b5", "")}""")
    assert page == {"pwned": "undefined", "images": 0, "prompt": printable(text),
                    "about": printable(text), "text": printable(shown), "seen": printable(shown)}


@browser
def test_the_slider_the_keys_and_the_address_go_through_the_steps(tmp_path):
    ids, order = TOK.encode("Hi \u20ac!"), [6, 0, 4, 2, 3, 1, 5]
    states = [TOK.show(x.tolist()) for x, _ in frames(ids, order)]
    path, _ = saved(recording_of("Hi \u20ac!", order=order), tmp_path)
    page = visit(path, "#step=3", """
        const slider = document.getElementById("slider"), seen_at = {address: seen()}
        const slide = k => { slider.value = k; slider.dispatchEvent(new Event("input")) }
        const press = key => document.body.dispatchEvent(
            new KeyboardEvent("keydown", {key, bubbles: true}))
        seen_at.slider = [0, 1, 2, 3, 4, 5, 6, 7].map(k => (slide(k), seen()))
        press("Home"); press("ArrowLeft"); seen_at.home = seen()
        press("ArrowRight"); press("ArrowRight"); press("ArrowLeft"); seen_at.one = seen()
        seen_at.words = document.getElementById("counters").textContent
        seen_at.aria = slider.getAttribute("aria-valuetext")
        seen_at.fresh = [...document.querySelectorAll("#answer .new")].map(s => answer().indexOf(s))
        press("End"); press("ArrowRight"); seen_at.end = seen()
        location.hash = "#step=2"; await wait(0.1); seen_at.hash = seen()
        return seen_at""")
    assert page["slider"] == states
    assert page["address"] == states[3] and page["hash"] == states[2]
    assert page["home"] == states[0] and page["one"] == states[1] and page["end"] == states[-1]
    assert page["fresh"] == [6]
    assert page["words"] == page["aria"] == "step 1 of 7, 1 of 7 tokens revealed"


@browser
def test_a_page_opens_at_the_end_and_plays_from_the_start_until_it_is_paused(tmp_path):
    path, _ = saved(recording_of("a long way to go"), tmp_path)
    page = visit(path, "#step=nonsense", """
        const play = document.getElementById("play"), log = [seen()]
        play.click(); log.push(seen(), play.textContent)
        await wait(1); play.click(); log.push(play.textContent); const paused = seen()
        await wait(5); log.push(seen() === paused, paused)
        play.click(); await wait(60); log.push(seen(), play.textContent)
        return log""", budget=100_000)
    assert page[:5] == ["a long way to go", "\u2591" * 16, "Pause", "Play", True]
    assert 0 < page[5].count("\u2591") < 16
    assert page[6:] == ["a long way to go", "Play"]


@browser
def test_a_token_says_how_sure_the_model_was_when_it_was_revealed(tmp_path):
    recording = Recording(TOK, "")
    x, p = torch.tensor([97, MASK, *"\u20ac".encode(), 10]), torch.zeros(6)
    x[2:] = MASK                                            # the first token is given
    recording.show(x.clone(), p.clone())
    for n, token, sure in ((5, 10, 0.05), (2, 0xe2, 0.5), (3, 0x82, 0.3), (4, 0xac, 1.0)):
        x[n], p[n] = token, sure
        recording.show(x.clone(), p.clone())
    page = visit(saved(recording, tmp_path)[0], "#step=4", """
        const say = () => document.getElementById("token").textContent, said = [say()]
        const box = document.getElementById("answer")
        for (const n of [1, 5]) { answer()[n].click(); said.push(say()) }
        box.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowUp", bubbles: true}))
        const chosen = answer().findIndex(s => s.classList.contains("chosen"))
        return [answer().map(s => s.className.replace(" chosen", "")),
                answer().map(s => s.title), [...said, say()],
                [...document.querySelectorAll("#order rect:not(#future)")].map(
                    r => ["x", "y", "height", "class"].map(a => r.getAttribute(a))),
                document.getElementById("counters").textContent, chosen]""")
    classes, titles, said, rects, counters, chosen = page
    euro = "\u201c\u20ac\u201d"
    assert classes == ["given", "mask", "known s2", "known s1", "known s1 new", "known s0"]
    assert titles == ["position 1: \u201ca\u201d, not from the model", "position 2: a mask",
                      f"position 3: part of {euro}, probability 50.0 %, revealed at step 2",
                      f"position 4: part of {euro}, probability 30.0 %, revealed at step 3",
                      f"position 5: {euro}, probability 100.00 %, revealed at step 4",
                      "position 6: \u201c\u21b5\u201d, probability 5.00 %, revealed at step 1"]
    assert said[0].startswith("Point at") and said[1:] == [titles[1], titles[5], titles[4]]
    assert sorted(rects) == [["0", "0", "4", "given"], ["2", "1", "3", "s2"],
                             ["3", "2", "2", "s1"], ["4", "3", "1", "s4"], ["5", "0", "4", "s0"]]
    assert counters == "step 4 of 4, 5 of 6 tokens revealed" and chosen == 4


@browser
def test_a_token_may_be_masked_again_and_an_empty_recording_is_a_page(tmp_path):
    recording = Recording(TOK, "")
    for ids in ([MASK, MASK], [97, MASK], [MASK, 98], [99, 98]):
        x = torch.tensor(ids)
        recording.show(x, (x != MASK) * 0.5)
    path, data = saved(recording, tmp_path)
    assert data["steps"][2] == [[0], [1, "b", 0.5]]
    texts, columns = visit(path, script="""
        return [[0, 1, 2, 3].map(k => (show(k), seen())),
            [...document.querySelectorAll("#order rect:not(#future)")].map(
                r => ["x", "y", "height"].map(a => Number(r.getAttribute(a))))]""")
    assert texts == ["\u2591\u2591", "a\u2591", "\u2591b", "cb"]
    assert sorted(columns) == [[0, 0, 1], [0, 2, 1], [1, 1, 2]]     # x, from, how long
    empty, _ = saved(Recording(TOK), tmp_path)
    assert visit(empty, script="return [seen(), document.getElementById('counters').textContent]") \
        == ["", "step 0 of 0, 0 of 0 tokens revealed"]


@browser
def test_nothing_of_a_page_is_wider_than_a_phone(tmp_path):
    path, _ = saved(recording_of("x" * 300 + " y" * 100, "z" * 500, tok=toy_tokenizer()), tmp_path)
    script = """const frame = document.createElement("iframe")
        document.body.innerHTML = ""
        frame.style.cssText = "width: 360px; height: 700px; border: 0"
        frame.srcdoc = page; document.body.append(frame); await wait(1)
        return frame.contentDocument.documentElement.scrollWidth"""
    page = json.dumps(path.read_text("utf-8")).replace("<", "\\u003c")
    outside = path.with_name("outside.html")
    outside.write_text("<title>outside</title><body></body>", "utf-8")
    assert visit(outside, script=f"const page = {page};{script}") <= 360
