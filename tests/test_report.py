"""Laws of report.py: the page holds everything, asks for nothing, and shows names as names."""
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE

pytest.importorskip("matplotlib", reason="figures need requirements-plots.txt")

from test_plot import HOSTILE, write, write_study

from analysis import report
from analysis.plot import FIGURES
from analysis.report import ReportConfig
from analysis.frames import read_study
from tasks.stats import half_95

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium, chromium-browser or google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = write_study(tmp_path_factory.mktemp("report") / "study", seeds=3)
    return report.report(read_study([str(root)]), "A study")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page whose title, arm, task, config, text and base are all out to break it."""
    root = write_study(tmp_path_factory.mktemp("hostile") / "study", 3, *HOSTILE[1:6])
    return report.report(read_study([str(root)]), HOSTILE[2] + HOSTILE[5])


def visit(page, folder, script, width=1000):
    """The page in a frame of this width, after a script of ours outside -> what that returns.

    Fails on whatever the page's own policy had to stop.
    """
    source = json.dumps(page).replace("<", "\\u003c")
    (folder / "outside.html").write_text("""<!doctype html><title>outside</title><body><script>
        const errors = [], wait = seconds => new Promise(done => setTimeout(done, 1000 * seconds))
        onerror = (...all) => { errors.push(all.join(" ")) };
        (async () => {
            const frame = document.createElement("iframe")
            frame.style.cssText = "width: WIDTHpx; height: 700px; border: 0"
            frame.srcdoc = SOURCE
            document.body.append(frame); await wait(1)
            const page = frame.contentDocument, root = page.documentElement
            page.addEventListener("securitypolicyviolation", e => errors.push(e.violatedDirective))
            await wait(1)
            const value = await (async () => { SCRIPT })().catch(e => { errors.push(String(e)) })
            document.documentElement.dataset.result = JSON.stringify({errors, value})
        })()</script>""".replace("WIDTH", str(width)).replace("SCRIPT", script)
        .replace("SOURCE", source), "utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000",
         (folder / "outside.html").as_uri()], capture_output=True, timeout=PATIENCE)
    found = re.search(r'data-result="(.*?)"', done.stdout.decode())
    assert found, done.stderr.decode()[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert not result["errors"]
    return result["value"]


def test_a_page_has_every_figure_and_asks_for_nothing_from_anywhere(page):
    others = [name for name in FIGURES if name != "kept"]      # first: plain loses of its base
    assert re.findall(r'<figure id="(\w+)">', page) == ["kept", *others]
    for asked in re.findall(r'(?:src|href)="([^"]{,30})', page):
        assert asked.startswith(("data:image/svg+xml;base64,", "data:,")), asked
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|url\(|@import|<script|<link (?!rel=\"icon\")", page)


def test_a_page_says_by_which_commands_and_revisions_and_on_what(page):
    assert page.count("<li>abc1234: python eval_gsm8k.py") == 4 * 3
    for words in ("64 texts", "500 questions"):
        assert words in page


def test_a_page_has_the_tables_of_its_scores(page):
    gain = f"+5.00 +- {half_95([5, 5, 5]):.2f} (n = 3)"
    [row] = re.findall(r"<td>JEPA</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>",
                       page[page.index("<caption>Controls"):])[:1]
    assert row == ("37.00 (sd 1.00, n = 3)", gain)          # 36, 37, 38; plain 31, 32, 33
    for name in ("0-shot", "Sensitivity", "Ablation", "Controls", "What is kept", "Mechanism",
                 "Base preservation"):
        assert f"<caption>{name}" in page


def test_the_answer_and_the_main_figure_come_first_and_the_commands_last_and_folded(page):
    answer = "JEPA - plain = +5.0 +- 0.0 points of accuracy, told from zero at 95 %"
    places = [page.index(part) for part in (
        "<h1>", answer, '<figure id="kept">', "<table", '<figure id="training">',
        "<details><summary>Commands of the scores", "<li>abc1234: python eval_gsm8k.py")]
    assert places == sorted(places)
    text = html.unescape(page)
    assert "Of what plain loses of its base's score JEPA keeps 12 % [11, 12]." in text
    assert "<details open" not in page
    assert "llada8b" not in page and "not run" not in re.sub("<td>4-shot.*", "", page)


def test_no_name_is_more_than_text_in_the_page(page, hostile):
    assert "<script" not in hostile and "\x1b" not in hostile and "\x00" not in hostile
    assert set(re.findall(r"<(\w+)", hostile)) == set(re.findall(r"<(\w+)", page))
    assert html.escape(HOSTILE[2]) in hostile
    assert all(c.isprintable() or c == "\n" for c in hostile)
    hostile.encode("utf-8")


def test_what_the_logs_lack_is_listed(tmp_path):
    root = write_study(tmp_path / "study", seeds=1)
    (root / "probe.json").unlink()
    found = report.report(read_study([str(root)]), "A study")
    assert "<li>drift: it takes a probe.json" in found and "<li>training" not in found
    assert "<figure id=\"training\">" in found and "<figure id=\"drift\">" not in found


def test_the_command_writes_the_page_and_a_mistake_is_one_line(tmp_path):
    root = write_study(tmp_path / "study", seeds=1)
    (root / "probe.json").unlink()
    out = tmp_path / "new" / "report.html"
    report.main(ReportConfig(inputs=(str(root),), out=str(out)))
    assert out.read_text("utf-8").startswith("<!doctype html>")
    done = subprocess.run([sys.executable, "analysis/report.py", "--inputs=nowhere"], cwd=ROOT,
                          text=True, capture_output=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


@browser
def test_chromium_shows_every_figure_of_a_page(page, tmp_path):
    shown = visit(page, tmp_path, """return {
        title: page.title, images: [...page.images].map(i => [i.complete, i.naturalWidth > 200]),
        tables: page.querySelectorAll("table").length, alt: [...page.images].every(i => i.alt)}""")
    assert shown == {"title": "A study", "images": [[True, True]] * len(FIGURES),
                     "tables": page.count("<table"),
                     "alt": True}


@browser
def test_nothing_of_a_page_is_wider_than_a_phone(hostile, tmp_path):
    assert visit(hostile, tmp_path, "return root.scrollWidth", width=360) <= 360


@browser
def test_chromium_shows_hostile_names_as_text(hostile, tmp_path):
    shown = visit(hostile, tmp_path, """return {
        title: page.title, heading: page.querySelector("h1").textContent,
        scripts: page.scripts.length,
        cells: [...page.querySelectorAll("td")].map(cell => cell.textContent),
        broken: [...page.images].filter(i => !i.naturalWidth).length}""")
    assert shown["title"] == shown["heading"] == HOSTILE[2] + HOSTILE[5]
    assert shown["scripts"] == shown["broken"] == 0
    assert HOSTILE[2] in shown["cells"]
