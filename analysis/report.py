"""Write a study as one page: the answer, tables, figures, and the commands behind them.

    python analysis/report.py --inputs=out/study --out=out/study/report.html

Inputs are those of plot.py, whose figures are in the page as SVG. The answer and the main figure
come first, what the logs lack and the commands last, folded. The page has no script and loads
nothing, and every name in it is escaped.
"""
import base64
import html
import io
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import printable, run  # first: it sets variables that torch reads

from analysis.drawing import save
from analysis.frames import Study, read_study
from analysis.plot import FIGURES, draw
from analysis.tables import MEANING, Table, answers, tables_of
from tasks.files import write_text

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }}
  .answer {{ max-width: 44rem; font-size: 1.05rem }}
  .main {{ max-width: 44rem }}
  body {{ margin: 0 auto; max-width: 70rem; padding: 2rem; overflow-wrap: anywhere }}
  .figures {{ columns: 20rem; font-size: .85rem }}
  figure {{ margin: 0 0 1.5rem; break-inside: avoid }}
  img {{ width: 100%; background: #fff }}
  .table {{ overflow-x: auto; margin-bottom: 1.5rem; font-size: .85rem; white-space: nowrap }}
  .table p {{ white-space: normal; max-width: 44rem; margin: .3rem 0 }}
  th, td, caption {{ padding: .2rem .8rem .2rem 0; text-align: left }}
  caption {{ font-weight: bold; white-space: normal }}
</style>
<body>
<h1>{title}</h1>
<div class="answer">{answer}</div>
<div class="main">{main}</div>
{tables}
<details><summary>What the numbers mean</summary><p>{meaning}</p></details>
<h2>More figures</h2>
<div class="figures">{figures}</div>
<details><summary>What the logs lack</summary><ul>{lacking}</ul></details>
<details><summary>Commands of the scores</summary><ul>{commands}</ul></details>
</body></html>
"""


@dataclass
class ReportConfig:
    inputs: tuple[str, ...] = ()        # files or folders of a study's logs, separated by commas
    out: str = "report.html"            # the page to write
    arms: tuple[str, ...] = ()          # only these, as grid.py names them; empty: all
    title: str = "A study of DLLM-JEPA"     # the heading of the page


def main(cfg: ReportConfig):
    page = report(read_study(cfg.inputs, cfg.arms), cfg.title)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    write_text(cfg.out, page)
    print(printable(f"{cfg.out}: {len(page.encode()):,} bytes"))


def report(study: Study, title: str) -> str:
    """Return the page: answer, main figure, tables, more figures; folded below: the commands."""
    drawn, lacking = {}, []
    for name in FIGURES:
        try:
            drawn[name] = figure_of(name, study)
        except ValueError as error:
            lacking.append(f"{name}: {error}")
    first = next(iter(drawn), "")       # FIGURES has what answers most first
    # where plain loses of its base's score, what JEPA keeps of it is the claim
    main_figure = drawn.pop("kept" if "kept" in drawn else first, "")
    answer = answers(study.results) or ["There are no scores of plain and JEPA on test yet."]
    done = zip(study.results["revision"], study.results["command"])
    lines = dict.fromkeys(f"{revision}: {command}" for revision, command in done)
    tables = tables_of(study.results, study.summaries, study, paper=False)
    return PAGE.format(
        title=as_text(title), answer=elements("p", answer), main=main_figure,
        tables="".join(map(table_of, tables)), meaning=as_text(MEANING),
        figures="".join(drawn.values()), lacking=elements("li", lacking),
        commands=elements("li", lines))


def elements(tag: str, texts) -> str:
    return "".join(f"<{tag}>{as_text(text)}</{tag}>" for text in texts)


def figure_of(name: str, study: Study) -> str:
    """Return a figure and its caption. Raises ValueError on what the logs lack for it."""
    figure, caption = draw(name, study)
    file = io.BytesIO()
    save(figure, file, "svg")
    data = base64.b64encode(file.getvalue()).decode()
    return (f'<figure id="{name}"><img alt="{name}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{as_text(caption)}</figcaption></figure>")


def table_of(table: Table) -> str:
    cells = table.cells.map(printable).to_html(index=False, border=0)       # escapes the text
    caption = f"<caption>{as_text(table.name)}</caption>"
    note = f"<p>{as_text(table.note)}</p>" if table.note else ""
    return f'<div class="table">{cells.replace("<thead>", caption + "<thead>", 1)}{note}</div>'


def as_text(what: str) -> str:
    """Return it as text of a page: no tag, no control character."""
    return html.escape(printable(what))


if __name__ == "__main__":
    run(main, ReportConfig)
