"""A study as one page: figures, tables with their n, commands and revisions, and nothing to load.

    python analysis/report.py --inputs=out/study --out=out/study/report.html

Inputs are those of plot.py, whose figures are in the page as SVG. It opens from a disk, in a mail
or on a phone, light or dark. Whatever a log may hold is text there: an image runs no script, and
the page's own policy lets nothing be fetched.
"""
import base64
import html
import io
import math
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # a script in a folder: the modules lie one above

from analysis.plot import FIGURES, by_arm, drawn, label, only, rank_of_arm, read_logs, save
from configurator import run
from sampling.view import printable
from tasks.stats import half_95

HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>TITLE</title>
<style>
  :root { color-scheme: light dark; --page: #f6f5f2; --card: #fff; --ink: #1d1d22; --soft: #5d5d66;
          --line: #dddad3 }
  @media (prefers-color-scheme: dark) {
    :root { --page: #131318; --card: #1c1c23; --ink: #ececf1; --soft: #a3a3ae; --line: #34343e } }
  * { box-sizing: border-box }
  body { margin: 0 auto; max-width: 70rem; padding: clamp(1rem, 4vw, 2.5rem);
         background: var(--page); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
  h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.05rem; margin: 2rem 0 .75rem }
  p, figcaption, li { overflow-wrap: anywhere }
  .soft, figcaption, caption { color: var(--soft); font-size: .85rem; text-align: left }
  .figures { display: grid; gap: 1rem;
             grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
  figure, .table { margin: 0; padding: .9rem; background: var(--card);
                   border: 1px solid var(--line); border-radius: .75rem }
  figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: .4rem }
  figcaption { margin-top: .6rem }
  .table { overflow-x: auto; margin-bottom: 1rem }
  table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
  caption { padding-bottom: .5rem }
  th, td { padding: .25rem .7rem .25rem 0; text-align: right; white-space: nowrap;
           border-bottom: 1px solid var(--line) }
  th { color: var(--soft); font-weight: 600 }
  th.text, td.text { text-align: left }
  code { font-size: .8rem }
</style>
<body>
"""


@dataclass
class ReportConfig:
    inputs: tuple[str, ...] = ()        # files or folders of a study's logs, with commas between
    out: str = "report.html"            # the page to write
    arms: tuple[str, ...] = ()          # only these, as grid.py names them; empty: all
    title: str = "A study of DLLM-JEPA"


def main(cfg: ReportConfig):
    page = report(only(cfg.arms, read_logs(cfg.inputs)), cfg.title)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.out).write_text(page, "utf-8")
    print(f"{cfg.out}: {len(page.encode()):,} bytes")


def report(logs, title: str) -> str:
    """The page. A figure for which there is nothing is named, with what it lacks."""
    figures, lacking = [], []
    for draw in FIGURES:
        try:
            figure, caption = drawn(draw, logs)
        except ValueError as error:
            lacking.append(f"{draw.__name__}: {error}")
            continue
        file = io.BytesIO()
        save(figure, file, "svg")
        data = base64.b64encode(file.getvalue()).decode()
        figures.append(f'<figure id="{draw.__name__}"><img alt="{draw.__name__}: '
                       f'{text(caption)}" src="data:image/svg+xml;base64,{data}">'
                       f"<figcaption><b>{draw.__name__}.</b> {text(caption)}</figcaption></figure>")
    revisions = sorted({str(one) for one in (
        *(line.get("revision") for line in logs.results), *(p.get("commit") for p in logs.probes),
        *(one.settings.get("commit") for one in logs.training)) if one})
    commands = list(dict.fromkeys(str(line["command"]) for line in logs.results
                                  if line.get("command")))
    counts = (f"{len(logs.training)} trainings, {len(logs.probed)} probed checkpoints, "
              f"{len(logs.results)} scores. Git revision: {', '.join(revisions) or 'unknown'}.")
    tables = [scores_table(logs), probe_table(logs), kept_table(logs), training_table(logs)]
    return (HEAD.replace("TITLE", text(title)) + f'<h1>{text(title)}</h1>'
            f'<p class="soft">{text(counts)} A +- is half of a 95 % interval: over seeds by '
            f"Student's t, from three up; over texts by the normal approximation.</p>"
            + section("Scores and probes", "".join(tables))
            + section("Figures", f'<div class="figures">{"".join(figures)}</div>'
                      if figures else "")
            + section("What the logs lack for other figures", listing(lacking))
            + section("Commands", listing(commands, "code")) + "</body></html>\n")


def text(what) -> str:
    """Anything as text of a page: no tag, no control character, no half of a character."""
    return html.escape(printable(str(what)).encode("utf-8", "replace").decode())


def section(name: str, content: str) -> str:
    return f"<section><h2>{name}</h2>{content}</section>" if content else ""


def listing(lines, tag: str = "span") -> str:
    items = "".join(f"<li><{tag}>{text(line)}</{tag}></li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def table(caption: str, head: list[str], rows: list[list], n_text: int) -> str:
    """The first n_text columns are words, the others numbers."""
    def line(cells, tag):
        return "<tr>" + "".join(f'<{tag}{" class=text" * (k < n_text)}>{text(cell)}</{tag}>'
                                for k, cell in enumerate(cells)) + "</tr>"
    return (f'<div class="table" tabindex="0"><table><caption>{text(caption)}</caption><thead>'
            f'{line(head, "th")}</thead><tbody>{"".join(line(row, "td") for row in rows)}</tbody>'
            f"</table></div>") if rows else ""


def number(value, form: str = ".4f") -> str:
    return format(value, form) if isinstance(value, (int, float)) and math.isfinite(value) else "-"


def scores_table(logs) -> str:
    keys = ("config", "task", "split", "n_shot", "arm", "lambda", "depth", "t_ctx", "t_tgt")
    groups = defaultdict(list)
    for one in logs.results:
        if isinstance(one["metrics"].get("accuracy"), (int, float)):
            groups[tuple(one.get(key) for key in keys)].append(one)
    rows = []
    order = lambda key: (*map(str, key[:4]), rank_of_arm(str(key[4])), *map(str, key[5:]))
    for key in sorted(groups, key=order):
        values = [100 * one["metrics"]["accuracy"] for one in groups[key]]
        questions = sorted({one["metrics"].get("n") for one in groups[key]} - {None})
        config, task, split, n_shot, arm, *rest = ["-" if part is None else part for part in key]
        rows.append([config, task, split, label(str(arm)), n_shot, *rest, len(values),
                     number(statistics.mean(values), ".1f"), number(half_95(values), ".1f"),
                     number(statistics.stdev(values) if len(values) > 1 else math.nan, ".1f"),
                     " ".join(map(str, sorted(str(one.get("seed")) for one in groups[key]))),
                     " or ".join(map(str, questions)) or "-"])
    return table("Accuracy in %, mean over seeds; sd with ddof = 1",
                 ["config", "task", "split", "arm", "shots", "lambda", "depth", "t_ctx", "t_tgt",
                  "seeds n", "mean", "+-", "sd", "seeds", "questions n"], rows, 4)


def probe_table(logs) -> str:
    rows = []
    for arm, runs in by_arm(logs.probed).items():
        for one in runs:
            found = one.found
            rows.append([label(arm), one.name, number(one.settings.get("seed"), ""),
                         number(one.settings.get("step"), ""), number(found["mean_drift"]),
                         number(statistics.mean(found["weight_drift"][1:-1])),
                         number(found["forgetting"], "+.4f"), number(found["half_95"]),
                         number(found["effective_rank"][-1], ".2f"),
                         number(found["diversity"][-1])])
    sizes = "; ".join(dict.fromkeys(f"{p['settings']['text']}: n = {p['n']} texts, "
                                    f"{p['tokens']:,} tokens" for p in logs.probes))
    return table(f"Probes: drift as means over blocks, forgetting with +- over texts. {sizes}",
                 ["arm", "model", "seed", "step", "drift", "weight drift", "forgetting", "+-",
                  "effective rank", "diversity"], rows, 2)


def kept_table(logs) -> str:
    rows = []
    for whole in logs.kept:
        for name, scores in whole["models"].items():
            wiki, mmlu = scores.get("wikitext") or {}, scores.get("mmlu") or {}
            rows.append([name, wiki.get("n", "-"), number(wiki.get("mean")),
                         number(wiki.get("minus_base"), "+.4f"), number(wiki.get("half_95")),
                         mmlu.get("n", "-"), number(100 * mmlu.get("accuracy", math.nan), ".1f")])
    return table("What is kept: Wikitext loss minus the base's, +- over windows; MMLU in %",
                 ["model", "windows n", "loss", "minus base", "+-", "questions n", "MMLU"], rows, 1)


def training_table(logs) -> str:
    rows = []
    for arm, runs in by_arm(logs.training).items():
        for one in runs:
            steps = [line for line in one.found if "ms" in line]
            if steps:
                rows.append([label(arm), one.name, number(one.settings.get("seed"), ""),
                             steps[-1]["step"], number(steps[-1].get("diffusion")),
                             number(steps[-1].get("jepa")), number(steps[-1].get("jepa_floor")),
                             number(statistics.median(line["ms"] for line in steps), ".1f"),
                             one.settings.get("commit", "-")])
    return table("Trainings: the last line of each log",
                 ["arm", "run", "seed", "step", "diffusion", "JEPA", "floor", "ms/step",
                  "revision"], rows, 2)


if __name__ == "__main__":
    run(main, ReportConfig)
