"""Write a study as one page: figures, tables, and the commands behind them.

    python analysis/report.py --inputs=out/study --out=out/study/report.html

Inputs are those of plot.py, whose figures are in the page as SVG. The page opens from a disk, in a
mail or on a phone, light or dark. Whatever a log may hold is text there: an image runs no script,
and the page's own policy lets nothing be fetched.
"""
import base64
import html
import io
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # a script in a folder: the modules lie one above

from analysis.arms import label
from analysis.plot import FIGURES, draw, save
from analysis.frames import Study, by_arm, last_of_each, read_study
from analysis.tables import Table, spread, table, tables_of
from configurator import run
from sampling.view import printable

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }}
  body {{ margin: 0 auto; max-width: 70rem; padding: 2rem; overflow-wrap: anywhere }}
  .figures {{ columns: 20rem; font-size: .85rem }}
  figure {{ margin: 0 0 1.5rem; break-inside: avoid }}
  img {{ width: 100%; background: #fff }}
  .table {{ overflow-x: auto; margin-bottom: 1.5rem; font-size: .85rem; white-space: nowrap }}
  th, td, caption {{ padding: .2rem .8rem .2rem 0; text-align: left }}
</style>
<body>
<h1>{title}</h1>
<p>{about}</p>
{short}
<div class="figures">{figures}</div>
<details><summary>All tables</summary>{tables}</details>
<details><summary>Figures that the logs do not allow</summary><ul>{lacking}</ul></details>
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
    Path(cfg.out).write_text(page, "utf-8")
    print(f"{cfg.out}: {len(page.encode()):,} bytes")


def report(study: Study, title: str) -> str:
    """Return the page: a short table, the figures, and folded below them all the rest."""
    figures, lacking = [], []
    for name in FIGURES:
        try:
            figure, caption = draw(name, study)
        except ValueError as error:
            lacking.append(f"{name}: {error}")
            continue
        file = io.BytesIO()
        save(figure, file, "svg")
        data = base64.b64encode(file.getvalue()).decode()
        figures.append(f'<figure id="{name}"><img alt="{name}" src="data:image/svg+xml;base64,'
                       f'{data}"><figcaption>{as_text(caption)}</figcaption></figure>')
    tables = [*tables_of(study.results, study.summaries), probe_table(study)]
    short = [Table(one.name, one.cells.iloc[:, :4]) for one in tables
             if one.name.startswith("Controls")]
    revisions = {*study.results["revision"], *(probe.get("commit") for probe in study.probes)}
    about = (f"{study.log['run'].nunique()} trainings, {len(study.probed)} probed checkpoints, "
             f"{len(study.results)} scores. Git revision: "
             f"{', '.join(sorted(map(str, revisions - {None}))) or 'unknown'}. Scores are in %, as "
             f"mean (sd) over n seeds; a +- is half of a 95 % interval by Student's t.")
    return PAGE.format(
        title=as_text(title), about=as_text(about), short=html_of(short or tables[:1]),
        figures="".join(figures), tables=html_of(tables), lacking=items(lacking),
        commands=items(dict.fromkeys(study.results["command"])))


def probe_table(study: Study) -> Table:
    rows = [[label(arm), spread(own["mean_drift"], ".3f"), spread(own["forgetting"], "+.3f")]
            for arm, own in by_arm(last_of_each(study.probed)).groupby("arm", sort=False)]
    return table("Probes: drift as mean over blocks, forgetting as loss minus the base's",
                 "arm | drift | forgetting", rows)


def as_text(what) -> str:
    """Make anything text of a page: no tag, no control character, no half of a character."""
    return html.escape(printable(str(what)).encode("utf-8", "replace").decode())


def html_of(tables: list[Table]) -> str:
    parts = []
    for one in tables:
        cells = one.cells.map(printable).to_html(index=False, border=0)     # escapes the text
        caption = f"<caption>{as_text(one.name)} {as_text(one.note)}</caption>"
        parts.append(f'<div class="table">{cells.replace("<thead>", caption + "<thead>", 1)}</div>')
    return "".join(parts)


def items(lines) -> str:
    return "".join(f"<li>{as_text(line)}</li>" for line in lines)


if __name__ == "__main__":
    run(main, ReportConfig)
