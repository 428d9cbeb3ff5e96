"""Laws of the moving picture: its end is the answer, its frames are the passes, it is safe."""
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import printable
from pretrained.tokenizer import byte_tokenizer, toy_tokenizer
from sampling import svg, view
from sampling.cost import Cost
from sampling.svg import MOST_FRAMES, WIDTH, parts_of, picture, save_svg
from sampling.view import Recording
from test_view import (HOSTILE, MASK, TOK, browser, frames, lines_of_text, luminance, recording_of,
                       visit)

NS = "{http://www.w3.org/2000/svg}"
EOS = TOK.eos_id


def drawn(recording, n_passes=None, about=()):
    """The picture of a recording: one pass a step, unless told otherwise."""
    return picture(recording, len(recording.steps) - 1 if n_passes is None else n_passes, about)


def groups(text):
    """The parts of the answer, from first to last: (text, classes, number of line breaks)."""
    found = []
    for group in ElementTree.fromstring(text.encode()).iter(f"{NS}g"):
        classes = group.get("class", "").split()
        if classes[:1] == ["t"]:
            breaks = list(group.iter(f"{NS}tspan"))
            words = "".join("".join(element.itertext()) for element in group.iter(f"{NS}text"))
            found.append((words.replace("\u21b5", "") if breaks else words, classes, len(breaks)))
    return found


def final_text(text):
    """What stands before the end, without line breaks, and how many of these there are."""
    seen = [part for part in groups(text) if part[1][1] != "e"]
    return "".join(words for words, _, _ in seen), sum(n for _, _, n in seen)


# ---- the text ----


@settings(deadline=None, max_examples=60)
@given(lines_of_text, st.randoms(), st.integers(0, 4))
def test_the_end_is_the_answer_whatever_the_order(text, random, n_ends):
    ids = TOK.encode(text) + [EOS] * n_ends + list(b"after") * bool(n_ends)
    recording = Recording(TOK, text)
    for x, p in frames(ids, random.sample(range(len(ids)), len(ids))):
        recording.show(x, p)
    answer = printable(TOK.decode(ids))
    assert final_text(drawn(recording)) == (answer.replace("\n", ""), answer.count("\n"))


@settings(deadline=None)
@given(st.lists(lines_of_text.filter(bool) | st.sampled_from(["word", " and", " " * 90, "x" * 99])))
def test_parts_are_the_texts_in_order_and_fit_into_lines_that_nothing_overlaps(texts):
    parts = parts_of(texts)
    for number, text in enumerate(texts):
        own = [part for part in parts if part.number == number]
        assert "".join(part.text for part in own) == text
        assert sum(part.width for part in own) >= 1
    for before, part in zip(parts, parts[1:]):
        assert part.number >= before.number
        if part.line == before.line:
            assert part.column == before.column + before.width
        else:                           # a break in the text, or a line that is full
            assert (part.line, part.column) == (before.line + 1, 0)
    for part in parts:
        hangs = part.text[-1] in " \n"
        assert part.column + part.width <= WIDTH + hangs
        assert "\n" not in part.text[:-1]


def test_a_line_is_broken_before_a_word_of_several_tokens_and_a_word_that_is_too_long_within():
    head = "x" * (WIDTH - 3)
    places = [(part.line, part.column, part.text) for part in parts_of([head, " re", "vea", "led"])]
    assert places == [(0, 0, head), (0, WIDTH - 3, " "), (1, 0, "re"), (1, 2, "vea"), (1, 5, "led")]
    assert [part.width for part in parts_of(["y" * (WIDTH + 5)])] == [WIDTH, 5]


def test_a_character_of_several_tokens_is_shown_once_all_of_them_are_there():
    recording = recording_of("a\u20ac", order=[1, 0, 3, 2], p=[1.0, 0.9, 0.05, 0.9])
    assert [(text, classes[1:]) for text, classes, _ in groups(drawn(recording))] == [
        ("a", ["s4", "f2"]), ("\u20ac", ["s0", "f4"])]
    half = Recording(TOK)               # the character has no end, and its parts come from behind
    for x, p in frames([0xe2, 0x82], [1, 0]):
        half.show(x, p)
    assert [(text, classes[2]) for text, classes, _ in groups(drawn(half))] == [("\ufffd", "f2")]


def test_a_token_has_the_colour_of_its_probability_and_what_was_given_has_none():
    ids = torch.tensor([*b"abcdef", EOS, 103, MASK])
    recording = Recording(TOK)
    recording.show(torch.cat([torch.full((5,), MASK), ids[5:6], torch.full((3,), MASK)]),
                   torch.zeros(9))
    recording.show(ids, torch.tensor([0.1, 0.3, 0.5, 0.7, 1, 0, 0.9, 0.9, 0]))
    assert [(text, *classes[1:]) for text, classes, _ in groups(drawn(recording))] == [
        ("a", "s0", "f1"), ("b", "s1", "f1"), ("c", "s2", "f1"), ("d", "s3", "f1"),
        ("e", "s4", "f1"), ("f", "g", "f0"), ("\u00b7", "e", "f1"), ("g", "e", "f1"),
        ("", "m", "f0")]                # a mask that is left stays one


def test_the_shades_are_those_of_the_page():
    page = Path(view.__file__).with_suffix(".html").read_text("utf-8")
    for n in range(5):
        red, green, blue = re.search(rf"\.s{n} {{ --c: (\d+) (\d+) (\d+)", page).groups()
        assert f".s{n}{{--c:#{int(red):02x}{int(green):02x}{int(blue):02x}}}" in svg.STYLE


def test_all_text_can_be_read_in_light_and_in_dark():
    shades = dict(re.findall(r"\.(s\d)\{--c:(#\w+)\}", svg.STYLE))
    for start in ("\nsvg{", ":dark){svg{"):
        _, _, rules = svg.STYLE.partition(start)
        found = dict(re.findall(r"--(\w+):([#\w.]+)", rules.partition("}")[0].replace("\n", "")))
        card, tint = colour(found["card"]), float(found["tint"])
        grounds = [[tint * c + (1 - tint) * below for c, below in zip(colour(shade), card)]
                   for shade in shades.values()]
        assert len(grounds) == 5
        assert all(contrast(colour(found["ink"]), ground) > 4.5 for ground in grounds)
        assert contrast(colour(found["soft"]), card) > 4.5


def colour(text):
    digits = text[1:] if len(text) == 7 else "".join(2 * c for c in text[1:])
    return [int(digits[n:n + 2], 16) for n in (0, 2, 4)]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


# ---- the frames ----


@pytest.mark.parametrize("n", [1, 7, MOST_FRAMES, MOST_FRAMES + 1, 200])
def test_frames_follow_the_passes_and_there_are_not_too_many(n):
    text = drawn(recording_of("".join(chr(97 + k % 26) for k in range(n))))
    numbers = [int(classes[2][1:]) for _, classes, _ in groups(text)]
    labels = [int(k) for k in re.findall(rf">pass +(\d+) of {n}<", text)]
    assert labels[0] == 0 and labels[-1] == n and len(labels) == 1 + min(n, MOST_FRAMES)
    for k, frame in enumerate(numbers, 1):              # token k came in pass k
        assert labels[frame - 1] < k <= labels[frame]
    assert sorted(set(numbers)) == sorted(map(int, re.findall(r"@keyframes t(\d+)\{", text)))


def test_what_is_shown_after_the_last_pass_joins_it():
    """The sampler fills ended texts with end-of-text, without a pass."""
    recording = recording_of("ab")
    recording.show(torch.tensor([*b"ab"]), torch.ones(2))
    text = drawn(recording, 2)
    assert re.findall(r">(pass \d of \d)<", text) == ["pass 0 of 2", "pass 1 of 2", "pass 2 of 2"]
    empty = drawn(Recording(TOK), 0)
    assert ElementTree.fromstring(empty) is not None and ">pass 0 of 0<" in empty


def test_of_a_long_prompt_the_end_is_shown():
    lines = [f"line {n}" for n in range(50)]
    text = drawn(recording_of("a", prompt="\n".join(lines)))
    assert [line for line in lines if f">{line}<" in text] == lines[-svg.MOST_PROMPT_LINES:]


# ---- the file ----


def test_the_same_recording_is_the_same_file_and_names_only_the_models_folder(tmp_path):
    cost = Cost(passes=4, row_passes=4, tokens=3, seconds=1.0)
    for path, seconds in ((tmp_path / "new" / "a.svg", 1.0), (tmp_path / "b.svg", 2.0)):
        cost.seconds = seconds
        save_svg(recording_of("abcd"), str(path), "/home/me/out/tiny", cost)
    text = path.read_text("utf-8")
    assert text == (tmp_path / "new" / "a.svg").read_text("utf-8")
    assert "> \u00b7 tiny \u00b7 0.75 tokens per pass<" in text and "home" not in text
    with pytest.raises(OSError, match="folder"):
        save_svg(recording_of("abcd"), str(tmp_path), "tiny", cost)


def test_a_checkpoint_of_a_run_is_named_as_the_run(tmp_path):
    save_svg(recording_of("abcd"), str(tmp_path / "a.svg"), "out/tiny/step_0000520/", Cost())
    assert "> \u00b7 tiny \u00b7 " in (tmp_path / "a.svg").read_text("utf-8")


def test_the_title_is_the_text_of_the_answer():
    recording = Recording(TOK)
    for x, p in frames([*b"5 < 7 &\n8", EOS, 103], [*range(11)]):
        recording.show(x, p)
    for n_passes, title in (11, "5 < 7 & 8"), (0, "5 < 7 & 8"):
        root = ElementTree.fromstring(drawn(recording, n_passes).encode())
        assert root.find(f"{NS}title").text == title
    masks = Recording(TOK)
    masks.show(torch.tensor([MASK] * 3), torch.zeros(3))
    assert "<title>Text condensing out of masks</title>" in drawn(masks)


def test_a_long_answer_is_a_small_file():
    recording = Recording(toy_tokenizer(), "How many?" * 20)
    ids = torch.tensor(recording.tok.encode("Anna has 3 boxes with 4 apples in each. " * 40)[:256])
    for k in range(129):
        seen = torch.arange(256) < 2 * k
        recording.show(torch.where(seen, ids, recording.tok.mask_id), seen * 0.9)
    assert len(ids) == 256 and len(drawn(recording).encode()) < 60_000


@pytest.mark.parametrize("text", [*HOSTILE, "]]>", "]]><script>", "\ufffe\uffff\ud800 &#0; \t"])
def test_no_text_can_break_the_picture_or_reach_outside_of_it(text):
    picture = drawn(recording_of(text.replace("\ud800", ""), text), about=[text, "x"])
    root = ElementTree.fromstring(picture.encode())
    assert {element.tag.removeprefix(NS) for element in root.iter()} <= {
        "svg", "title", "style", "g", "rect", "text", "tspan"}
    names = {name for element in root.iter() for name in element.attrib}
    assert not any(name.startswith("on") or "href" in name for name in names)
    assert not re.search(r"url\(|@import|//(?!www\.w3\.org/2000/svg)", root.find(f"{NS}style").text)
    assert all(c.isprintable() or c == "\n" for c in picture)
    assert printable(text)[:40] in "".join(root.itertext())


@browser
def test_every_frame_shows_what_its_pass_has_revealed_and_at_rest_it_is_the_end(tmp_path):
    """Time is set from outside: to the middle of each frame, and to the pause after the last."""
    text, order = "7+5=12\n< & >", [2, 11, 3, 0, 6, 1, 4, 5, 9, 8, 10, 7]
    recording = recording_of(text, order=order)
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><meta charset=utf-8>{drawn(recording)}", "utf-8")
    start, each = svg.START, min(svg.FRAME, svg.FRAMES / 12)
    moments = [0.1] + [start + (k + 0.5) * each for k in range(12)] + [start + 12 * each + 3.9]
    found = visit(page, script=f"""
        const seen = () => [...document.querySelectorAll(".t")].map(g => {{
            const opacity = getComputedStyle(g.querySelector("text")).opacity
            return opacity > .9 ? g.textContent : opacity < .1 ? "\u2591" : "?"}}).join("")
        const label = () => Math.round(-new DOMMatrix(
            getComputedStyle(document.querySelector(".labels")).transform).f / 20)
        const log = []
        for (const seconds of {json.dumps(moments)}) {{
            for (const one of document.getAnimations()) {{
                one.pause(); one.currentTime = 1000 * seconds }}
            log.push([label(), seen()])
        }}
        document.getAnimations().forEach(one => one.cancel())
        return [log, label(), seen()]""")
    states = [TOK.show(x.tolist()).replace("\n", "\u21b5")
              for x, _ in frames(TOK.encode(text), order)]
    assert found == [[[k, state] for k, state in enumerate(states)] + [[12, states[-1]]],
                     12, states[-1]]
