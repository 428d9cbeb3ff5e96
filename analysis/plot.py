"""Figures of a study, from its logs alone, as PNG and SVG: those of the paper, and a few more.

    pip install -r requirements-plots.txt
    python analysis/plot.py --inputs=out/study --out=figures
    python analysis/plot.py --figure=drift --inputs=a/probe.json,b/probe.json --out=figures

Inputs are files, or folders that are searched for log.jsonl (train.py), probe.json (probe.py),
summary.json (preserve.py) and results.jsonl (grid.py). What a figure lacks is said in a sentence,
and the others are drawn. Of a study with many arms, --arms=plain,jepa,shuffled draws some.

    training       losses while training                 sensitivity    accuracy at (t_ctx, t_tgt)
    drift          of states and weights, by depth       front          accuracy against forgetting
    rank           effective rank, diversity, by depth   interpolation  base + a * (tuned - base)
    ratio          drift of JEPA over plain, by cell     forgetting     by masking rate
    scatter        drift against forgetting, with r      density        the same, as a landscape
    ablation       gain over plain fine-tuning, by arm

A dot is a seed. Intervals are 95 %: of a mean over seeds by Student's t from three seeds up, of r
by Fisher's z from four up. The paper's figure 5 is a kernel density of the runs in its figure 4:
`density` is that, a Gaussian kernel with Scott's width and the arm's covariance, as the contours
that hold 50 and 90 % of an arm's mass. Of n points it shows no more than they do.
"""
import json
import math
import os
import shlex
import statistics
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # a script in a folder: the modules lie one above

import numpy as np

from analysis.tables import accuracy, plain_of
from configurator import run
from sampling.view import printable
from tasks.files import read_json
from tasks.stats import Z, half_95

WIDTH = 3.3             # inches: a column of a two-column paper
# Okabe and Ito's colours, which all kinds of colour vision tell apart; in grey the markers do
COLOURS = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
MARKERS, DASHES = "os^Dv*PX<>hpd8", ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
KNOWN = "plain", "jepa", "no_predictor", "symmetric"
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7,
         "ytick.labelsize": 7, "legend.fontsize": 7, "font.family": "DejaVu Sans",
         "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
         "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.4, "axes.axisbelow": True,
         "lines.linewidth": 1.2, "lines.markersize": 4, "legend.frameon": False,
         "legend.handlelength": 2.6,
         "figure.constrained_layout.use": True, "svg.hashsalt": "figure",
         "text.parse_math": False}      # a `$` in a name is a dollar


@dataclass
class PlotConfig:
    inputs: tuple[str, ...] = ()        # files or folders of a study's logs, with commas between
    out: str = "figures"                # a folder; figures are named there as they are here
    arms: tuple[str, ...] = ()          # only these, as grid.py names them; empty: all
    figure: Literal["all", "training", "drift", "rank", "ratio", "scatter", "density", "ablation",
                    "sensitivity", "front", "interpolation", "forgetting"] = "all"


def main(cfg: PlotConfig):
    logs = only(cfg.arms, read_logs(cfg.inputs))
    os.makedirs(cfg.out, exist_ok=True)
    for draw in FIGURES:
        if cfg.figure in ("all", draw.__name__):
            try:
                figure, caption = drawn(draw, logs)
            except ValueError as error:
                if cfg.figure != "all":
                    raise
                print(f"{draw.__name__}: {error}")
                continue
            for kind in ("png", "svg"):
                save(figure, os.path.join(cfg.out, f"{draw.__name__}.{kind}"))
            print(f"{cfg.out}/{draw.__name__}.png, .svg: {caption}")


def drawn(draw, logs):
    """-> figure, caption. Raises ValueError, one sentence, on what the logs lack for it."""
    try:
        import matplotlib  # half a second, and an extra
    except ImportError:
        raise OSError("figures take matplotlib, which is not installed: pip install -r "
                      "requirements-plots.txt") from None
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")     # it draws a box
        return draw(logs)


def save(figure, file, kind: str | None = None):
    """The same bytes for the same figure, whenever it is drawn."""
    import matplotlib
    kind = kind or str(file)[-3:]
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format=kind, dpi=300,
                       metadata={"Date": None} if kind == "svg" else {"Software": None})


# ----------------------------------------------------------------------------------------------
# logs


class Run(NamedTuple):
    """One training: its log, or what a probe found in one checkpoint of it."""
    name: str                   # its folder
    arm: str
    settings: dict              # train.py's, or {}
    found: dict                 # lines of a log, or a model's numbers in probe.json


class Logs(NamedTuple):
    training: list[Run]
    probes: list[dict]          # whole files
    probed: list[Run]           # every tuned model in them
    kept: list[dict]            # whole summary.json
    results: list[dict]


def read_logs(inputs) -> Logs:
    """Raises ValueError or FileNotFoundError, one sentence, if nothing is there or it is broken."""
    paths = {}                          # in order, each once
    for given in map(Path, inputs):
        if not given.exists():
            raise FileNotFoundError(f"there is no file or folder {given}")
        names = ("log.jsonl", "probe.json", "summary.json", "results.jsonl")
        found = sorted(path for name in names for path in given.rglob(name))
        paths |= dict.fromkeys(found if given.is_dir() else [given])
    training, probes, kept, results = [], [], [], []
    for path in paths:
        if path.suffix == ".jsonl":
            lines = read_lines(path)
            if any("metrics" in line for line in lines):
                results += [line for line in lines if isinstance(line.get("metrics"), dict)]
            elif any("step" in line for line in lines):
                beside = path.with_name("settings.json")
                training.append((path, lines, read_json(beside) if beside.is_file() else {}))
        else:
            whole = read_json(path)
            if isinstance(whole.get("models"), dict):
                (probes if "depths" in whole else kept).append(whole)
    if not (training or probes or kept or results):
        raise ValueError(f"there are no logs in {', '.join(inputs) or 'no inputs'}; --inputs takes "
                         f"folders of runs, or log.jsonl, probe.json, summary.json, results.jsonl")

    def arm(name, settings):
        named = [line["arm"] for line in results if line.get("arm")
                 and is_of(line, name, settings)]
        if named and named[0] != "jepa":
            return str(named[0])
        return arm_of(settings) or (named or [Path(name).name])[0]     # with its rates, if unusual
    probed = [Run(name, arm(name, scores.get("trained") or {}), scores.get("trained") or {}, scores)
              for whole in probes for name, scores in whole["models"].items()
              if name != whole["settings"]["base"]]
    training = [Run(str(path.parent), arm(str(path.parent), settings), settings, lines)
                for path, lines, settings in training]
    return Logs(training, probes, probed, kept, results)


def read_lines(path) -> list[dict]:
    """JSON objects, a line each; a last line that is still being written is left out."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines(True)
                 if line.endswith("\n") and line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} is not lines of JSON: {error}") from None
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError(f"{path} has a line that is no JSON object")
    return lines


def only(arms, logs: Logs) -> Logs:
    """Raises ValueError, one sentence, for an arm that the logs do not have."""
    there = {one.arm for one in logs.training + logs.probed}
    there |= {str(line.get("arm")) for line in logs.results}
    for arm in arms:
        if arm not in there:
            raise ValueError(f"there is no arm {arm!r} in the inputs, which have "
                             f"{', '.join(sorted(there))}")
    return logs if not arms else logs._replace(
        training=[one for one in logs.training if one.arm in arms],
        probed=[one for one in logs.probed if one.arm in arms],
        results=[line for line in logs.results if line.get("arm") in arms])


def is_of(line: dict, name: str, settings: dict) -> bool:
    """Whether a score is this model's, by the --init_from of its command."""
    try:
        words = shlex.split(line.get("command") or "")
    except ValueError:
        return False
    asked = [word.partition("=")[2].rstrip("/") for word in words
             if word.startswith("--init_from=")]
    return asked[:1] in ([name], [settings.get("out_dir")])


def arm_of(settings: dict) -> str:
    """As grid.py names it: plain, jepa (with its rates if not the paper's), shuffled, ... or ""."""
    if settings.get("lambda_jepa") is None:
        return ""
    if settings.get("init_from") == "":
        return "from scratch"
    t = settings.get("t_ctx"), settings.get("t_tgt")
    if not settings["lambda_jepa"]:
        return "l2" if settings.get("anchor") else "plain"
    if settings.get("objective", "jepa") != "jepa":
        return settings["objective"]
    if settings.get("target", "ema") != "ema":
        return settings["target"] + "_no_predictor" * (settings.get("n_pred_layer") == 0)
    if settings.get("n_pred_layer") == 0:
        return "no_predictor"
    if t[0] == t[1]:
        return "symmetric"
    return "jepa" if t in ((0.2, 0.7), (0.1, 0.9)) else f"jepa at {t[0]}, {t[1]}"


def cell_of(settings: dict) -> tuple:
    """What arms have to share to be compared: base, task, length, learning rate, context's rate."""
    base = Path(settings.get("init_from") or settings.get("preset") or "?").name
    steps, epochs = settings.get("max_steps"), settings.get("epochs", "?")
    return (base, settings.get("task", "?"), f"{steps} steps" if steps else f"{epochs} epochs",
            settings.get("lr", "?"), settings.get("t_ctx", "?"))


def in_words(cell: tuple) -> str:
    base, task, length, lr, t_ctx = cell
    return short(f"{task} from {base}, {length}, lr {lr}, t_ctx {t_ctx}", 80)


def largest_cell(runs: list[Run], lacking: str):
    """-> runs of the cell that has most, by arm in their order, and a sentence on the others."""
    cells = defaultdict(list)
    for one in runs:
        cells[cell_of(one.settings)].append(one)
    if not cells:
        raise ValueError(lacking)
    best = max(cells, key=lambda cell: len(cells[cell]))
    left_out = len(runs) - len(cells[best])
    said = f"{in_words(best)}." + f" {left_out} runs of other cells are left out." * bool(left_out)
    return by_arm(cells[best]), said


def by_arm(runs) -> dict:
    """{arm: runs}, the KNOWN first, then by name."""
    found = defaultdict(list)
    for one in runs:
        found[one.arm].append(one)
    return {arm: found[arm] for arm in sorted(found, key=rank_of_arm)}


def rank_of_arm(arm: str):
    return (KNOWN.index(arm) if arm in KNOWN else len(KNOWN), arm)


def last_of_each(runs: list[Run]) -> list[Run]:
    """Of several checkpoints of one training the last; they are not independent."""
    last = {}
    for one in runs:
        key = one.settings.get("out_dir") or one.name
        if key not in last or (one.settings.get("step") or 0) >= (
                last[key].settings.get("step") or 0):
            last[key] = one
    return list(last.values())


# ----------------------------------------------------------------------------------------------
# numbers


def pearson(x, y) -> tuple[float, float, float]:
    """r and the ends of its 95 % interval by Fisher's z; nan where n < 4 or nothing varies."""
    n = len(x)
    if n < 2 or len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan, math.nan, math.nan
    r = max(-1.0, min(1.0, statistics.correlation(x, y)))
    if n < 4:
        return r, math.nan, math.nan
    if abs(r) == 1:
        return r, r, r
    half = Z / math.sqrt(n - 3)
    return r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def density_of(points, grid):
    """Gaussian kernel density: points (n, 2), grid (m, 2) -> (m,). ValueError if they do not span
    an area. Kernels have the points' covariance times n^(-1/3), which is Scott's width squared."""
    n = len(points)
    covariance = np.cov(points.T) * n ** (-1 / 3) if n > 2 else np.zeros((2, 2))
    if not np.linalg.det(covariance) > 1e-12 * max(1e-300, np.trace(covariance)) ** 2:
        raise ValueError("a density takes three runs of an arm or more that do not lie on one line")
    away = grid[:, None] - points                                           # (m, n, 2)
    distance = np.einsum("mni,ij,mnj->mn", away, np.linalg.inv(covariance), away)
    return np.exp(-distance / 2).mean(axis=1) / (2 * math.pi * math.sqrt(np.linalg.det(covariance)))


def level_of_mass(density, share: float) -> float:
    """The height above which lies this share of what is on the grid."""
    ordered = np.sort(density, axis=None)[::-1]
    return ordered[np.searchsorted(np.cumsum(ordered), share * ordered.sum())]


# ----------------------------------------------------------------------------------------------
# ink


def axes(height: float, rows: int = 1, columns: int = 1, **options):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def look(arm: str, arms) -> dict:
    """Colour, marker and dash of an arm: KNOWN ones have the same in every figure."""
    others = [name for name in arms if name not in KNOWN]
    used = {0, 1, *(KNOWN.index(name) for name in arms if name in KNOWN)}
    free = [n for n in (4, 5, 2, 3, *range(6, len(MARKERS))) if n not in used]
    n = KNOWN.index(arm) if arm in KNOWN else free[others.index(arm) % len(free)]
    return {"color": COLOURS[n % 6], "marker": MARKERS[n], "linestyle": DASHES[n % 6]}


def short(text, length: int = 24) -> str:
    """A name as it can be drawn: one line, no control characters, not longer than there is room.

    matplotlib leaves names with an underscore in front out of legends.
    """
    text = printable(str(text)).replace("\n", " ").encode("utf-8", "replace").decode()
    text = text if len(text) <= length else text[:length - 1] + "\u2026"
    return " " + text if text.startswith("_") else text


def label(arm: str) -> str:
    return {"jepa": "JEPA"}.get(arm, short(arm.replace("_", " ")))


def by_x(ax, x, arms: dict, gap: float = 0.0, joined=None):
    """{arm: curves, each of len(x)}: a dot a seed, the arms side by side if there is a gap; their
    mean as a line over the slice `joined`, elsewhere as a marker; its interval as a band."""
    x, joined = np.asarray(x, dtype=float), joined or slice(None)
    for k, (arm, curves) in enumerate(arms.items()):
        style, curves = look(arm, arms), np.array(curves, dtype=float)       # (n, len(x))
        at, mean = x + (k - (len(arms) - 1) / 2) * gap, curves.mean(axis=0)
        hollow = {**style, "markerfacecolor": "white", "markeredgewidth": 0.8}
        some = range(len(x))[joined][::max(1, len(x) // 8)]
        rest = np.delete(np.arange(len(x)), np.arange(len(x))[joined])
        ax.plot(at[joined], mean[joined], **hollow, markevery=max(1, len(x) // 8),
                label=f"{label(arm)}, n = {len(curves)}")
        ax.plot(at[rest], mean[rest], **{**hollow, "linestyle": "none"})
        for curve in curves:
            shown = [*some, *rest]
            ax.plot(at[shown], curve[shown], color=style["color"], marker=style["marker"],
                    linestyle="none", markersize=2, markeredgewidth=0)
        half = np.array([half_95(column) for column in curves.T])
        ax.fill_between(at[joined], (mean - half)[joined], (mean + half)[joined],
                        color=style["color"], alpha=0.2, linewidth=0)


def legend_above(figure, ax):
    """In as many columns as there is room for: 0.056 inches a letter, 0.43 for line and gap. From
    three rows up the figure grows with it."""
    handles, labels = ax.get_legend_handles_labels()
    room = int(WIDTH / (0.43 + 0.056 * max(map(len, labels))))
    columns = max(1, min(room, len(labels)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, columnspacing=1)
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.15 * max(0, rows - 2))


def depth_axis(ax, depths):
    """Blocks by number, as many as there is room for."""
    last = len(depths) - 1
    every = max(1, -(-last // 8))
    shown = [n for n in range(1, last) if n % every == 0 or every == 1]
    shown = [0, *(n for n in shown if last - n > every / 2), last]
    ax.set_xticks(shown, [depths[n] for n in shown])
    ax.set_xlabel("block")


def zero_line(ax, at: float = 0.0, vertical: bool = False):
    (ax.axvline if vertical else ax.axhline)(at, color="#555555", linewidth=0.8, zorder=1)


# ----------------------------------------------------------------------------------------------
# figures: logs -> figure, caption; ValueError on what is lacking


def training(logs: Logs):
    """Losses of the batches, and of held-out rows of the task and of what may be forgotten."""
    arms, said = largest_cell([one for one in logs.training if one.settings.get("init_from")],
                              "it takes log.jsonl of runs of train.py that began with init_from")
    def curve(one, read):
        points = [(line["step"], read(line)) for line in one.found]
        return [(step, value) for step, value in points if value is not None]
    def held_out(which):
        def read(line):
            losses = list(line.get("held_out", {}).values())[which:][:1]
            return statistics.mean(losses[0].values()) if losses and losses[0] else None
        return read
    names = next((list(line["held_out"]) for runs in arms.values() for one in runs
                  for line in one.found if "held_out" in line), [])
    panels = [("diffusion", lambda line: line.get("diffusion")),
              ("JEPA", lambda line: line.get("jepa")),
              *((f"held-out\n{short(name, 12)}", held_out(k)) for k, name in enumerate(names[:2]))]
    panels = [(name, read) for name, read in panels
              if any(curve(one, read) for runs in arms.values() for one in runs)]
    if not panels:
        raise ValueError("it takes log.jsonl with losses in it")
    figure, grid = axes(0.4 + 1.05 * len(panels), len(panels), sharex=True)
    for ax, (name, read) in zip(grid[:, 0], panels):
        for arm, runs in arms.items():
            style, together = look(arm, arms), defaultdict(list)
            for one in runs:
                points = curve(one, read)
                ax.plot(*zip(*points), color=style["color"], linewidth=0.5, alpha=0.6) \
                    if points else None
                for step, value in points:
                    together[step].append(value)
            mean = [(step, statistics.mean(values)) for step, values in sorted(together.items())
                    if len(values) == len(runs)]
            ax.plot(*(zip(*mean) if mean else ((), ())), **style,
                    markevery=max(1, len(mean) // 6), label=f"{label(arm)}, n = {len(runs)}")
        if name == "JEPA":
            floors = [curve(one, lambda line: line.get("jepa_floor"))
                      for one in arms.get("jepa", ())]
            for floor in filter(None, floors):
                ax.plot(*zip(*floor), color="#000000", linewidth=0.8, linestyle=":")
            if any(floors):
                ax.annotate("constant predictor", floors[0][-1], (0, 3), "data", "offset points",
                            ha="right", fontsize=6)
        ax.set_yscale("log")
        ax.set_ylabel(f"{name} loss")
        ticks_of_log(ax.yaxis)
    grid[-1, 0].set_xlabel("optimizer step")
    legend_above(figure, grid[0, 0])
    return figure, (f"Loss while training, {said} Thin lines are seeds, thick ones their mean; "
                    f"held-out losses are means over t. Dotted: the loss of the best "
                    f"predictor that ignores its input, for the arm JEPA.")


def ticks_of_log(axis):
    """Plain numbers, few of them, also where the axis covers less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter
    low, high = axis.get_view_interval()
    subs = (1,) if high / low > 100 else (1, 3) if high / low > 10 else (1, 1.5, 2, 3, 5, 7)
    axis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def curves_by_depth(logs: Logs, panels, lacking: str):
    """-> figure, what was drawn, in words: a panel for each (key of probe.json, its name)."""
    arms, said = largest_cell(last_of_each(logs.probed), lacking)
    whole = next(p for p in logs.probes if any(run.name in p["models"] for runs in arms.values()
                                               for run in runs))
    depths = whole["depths"]
    arms = {arm: [run for run in runs if len(run.found["drift"]) == len(depths)]
            for arm, runs in arms.items()}
    figure, grid = axes(0.5 + 1.6 * len(panels), len(panels), sharex=True)
    inner = slice(len(depths) - 1)                          # the norm's state has another scale
    for ax, (key, name) in zip(grid[:, 0], panels):
        if key in ("effective_rank", "diversity"):
            base = whole["models"][whole["settings"]["base"]][key]
            ax.plot(base[:-1], color="black", linewidth=0.8, label="base")
            ax.plot(len(base) - 1, base[-1], color="black", marker="_", markersize=9)
        by_x(ax, range(len(depths)), {arm: [run.found[key] for run in runs]
                                      for arm, runs in arms.items()}, 0.12, inner)
        ax.set_ylabel(name)
        ax.set_ylim(bottom=0)
    depth_axis(grid[-1, 0], depths)
    legend_above(figure, grid[0, 0])
    texts = (f"n = {whole['n']} texts of {short(whole['settings']['text'])}, "
             f"{whole['tokens']:,} tokens; {said} embed is the embedding, norm the state after the "
             f"final norm. Dots are seeds, lines their mean")
    return figure, texts + (", bands its 95 % interval." if any(len(runs) > 2 for runs
                                                                in arms.values()) else ".")


def drift(logs: Logs):
    figure, said = curves_by_depth(
        logs, [("drift", "drift of states"), ("weight_drift", "drift of weights")],
        "it takes a probe.json, which analysis/probe.py writes")
    return figure, f"Distance from the base, relative to its length, by depth: {said}"


def rank(logs: Logs):
    figure, said = curves_by_depth(
        logs, [("effective_rank", "effective rank"), ("diversity", "cosine diversity")],
        "it takes a probe.json, which analysis/probe.py writes")
    return figure, f"Pooled states by depth; a rank is at most n - 1: {said}"


def ratio(logs: Logs):
    """JEPA's drift over that of the plain run with the same seed, in each cell that has both."""
    runs, cells = last_of_each(logs.probed), defaultdict(list)
    for jepa in runs:
        if jepa.arm != "jepa" and not jepa.arm.startswith("jepa at"):
            continue
        for plain in runs:
            if (plain.arm == "plain" and cell_of(plain.settings) == cell_of(jepa.settings)
                    and plain.settings.get("seed") == jepa.settings.get("seed")
                    and plain.found["mean_drift"] > 0 and jepa.found["mean_drift"] > 0):
                base, task, length, lr, t_ctx = cell_of(jepa.settings)
                rates = f"({t_ctx}, {jepa.settings.get('t_tgt', '?')})"
                name = f"{short(task, 10)}, {short(base, 12)}\n{length}\nlr {lr}, {rates}"
                cells[name].append(
                    jepa.found["mean_drift"] / plain.found["mean_drift"])
    if not cells:
        raise ValueError("it takes a probe.json with a plain and a JEPA run of one cell and seed")
    figure, grid = axes(0.6 + 0.6 * len(cells))
    ax, style = grid[0, 0], look("jepa", ())
    for y, (name, ratios) in enumerate(cells.items()):
        logs_of = [math.log(value) for value in ratios]
        mean, half = statistics.mean(logs_of), half_95(logs_of)
        if half == half:
            ax.plot(np.exp([mean - half, mean + half]), [y, y], color="#444444", linewidth=1)
        ax.plot(ratios, [y] * len(ratios), color=style["color"], marker="o", linestyle="none",
                markersize=3.5, alpha=0.7, markeredgewidth=0)
        ax.plot(math.exp(mean), y, color="black", marker="|", markersize=10, linestyle="none")
    zero_line(ax, 1, vertical=True)
    ax.set_yticks(range(len(cells)), [f"{name}\nn = {len(found)}" for name, found in cells.items()])
    ax.set_ylim(len(cells) - 0.5, -0.5)
    ax.set_xlabel("drift with JEPA / without")
    ax.locator_params(axis="x", nbins=5)
    return figure, ("Mean drift over blocks of a JEPA run over that of the plain run with the same "
                    "seed; the rates are (t_ctx, t_tgt). Dots are seeds, ticks their geometric "
                    "mean, lines its 95 % interval from three seeds up.")


def of_scatter(logs: Logs):
    """-> {arm: last checkpoints}, {arm: lists of checkpoints of one training}, words."""
    arms, said = largest_cell(logs.probed, "it takes a probe.json, which analysis/probe.py writes")
    paths = {arm: defaultdict(list) for arm in arms}
    for arm, runs in arms.items():
        for one in sorted(runs, key=lambda one: one.settings.get("step") or 0):
            paths[arm][one.settings.get("out_dir") or one.name].append(one)
    return {arm: last_of_each(runs) for arm, runs in arms.items()}, paths, said


def place(one: Run):
    return one.found["mean_drift"], one.found["forgetting"]


def scatter(logs: Logs):
    arms, paths, said = of_scatter(logs)
    figure, grid = axes(2.9)
    ax = grid[0, 0]
    for arm, runs in arms.items():
        style = look(arm, arms)
        x, y = zip(*map(place, runs))
        r, low, high = pearson(x, y)
        words = f"n = {len(runs)}" + (f", r = {r:+.2f} [{low:+.2f}, {high:+.2f}]"
                                      if low == low else "")
        for path in paths[arm].values():
            ax.plot(*zip(*map(place, path)), color=style["color"], linewidth=0.5, alpha=0.6,
                    marker=".", markersize=2.5)
        ax.plot(x, y, **{**style, "linestyle": "none"}, markeredgecolor="white",
                markeredgewidth=0.5, markersize=5, label=f"{label(arm)}: {words}")
    zero_line(ax)
    ax.set_xlabel("mean drift over blocks")
    ax.set_ylabel("forgetting: loss minus base")
    legend_above(figure, ax)
    return figure, (f"Drift against forgetting, {said} A marker is the end of a run, small dots "
                    f"are its earlier checkpoints, which do not enter r. Pearson's r with its 95 % "
                    f"interval by Fisher's z, over the n runs of an arm, from four up.")


def density(logs: Logs):
    arms, _, said = of_scatter(logs)
    every = np.array([place(one) for runs in arms.values() for one in runs])
    low, high = every.min(axis=0), every.max(axis=0)
    pad = 0.6 * np.where(high > low, high - low, 1.0)
    xs, ys = (np.linspace(low[i] - pad[i], high[i] + pad[i], 120) for i in (0, 1))
    grid_points = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    figure, grid = axes(2.9)
    ax, n_drawn = grid[0, 0], 0
    for arm, runs in arms.items():
        style, points = look(arm, arms), np.array([place(one) for one in runs])
        ax.plot(*points.T, **{**style, "linestyle": "none"}, markersize=3,
                label=f"{label(arm)}, n = {len(runs)}")
        try:
            height = density_of(points, grid_points).reshape(len(ys), len(xs))
        except ValueError:
            continue                    # its runs are drawn all the same
        n_drawn += 1
        levels = [level_of_mass(height, share) for share in (0.9, 0.5)]
        ax.contourf(xs, ys, height, [*levels, height.max() * 1.01], colors=[style["color"]] * 2,
                    alpha=0.15)
        ax.contour(xs, ys, height, levels, colors=[style["color"]], linewidths=(0.7, 1.2),
                   linestyles=[style["linestyle"]])
    if not n_drawn:
        raise ValueError("it takes a probe.json with three runs of an arm or more, not on one line")
    zero_line(ax)
    ax.set_xlabel("mean drift over blocks")
    ax.set_ylabel("forgetting: loss minus base")
    legend_above(figure, ax)
    return figure, (f"Density of the runs of the scatter, {said} The inner contour holds 50 %, the "
                    f"outer one 90 % of an arm's Gaussian kernel density (Scott's width). With so "
                    f"few runs it is a way to see them, not an estimate.")


def scores_by(logs: Logs, *keys):
    """{values of keys: lines of results.jsonl that have an accuracy}"""
    found = defaultdict(list)
    for line in logs.results:
        if isinstance(line["metrics"].get("accuracy"), (int, float)):
            found[tuple(line.get(key) for key in keys)].append(line)
    return found


def is_test(lines) -> bool:
    return lines[0].get("split") == "test"


def ablation(logs: Logs):
    """Accuracy of each arm minus that of the plain run with the same seed, by number of shots."""
    groups = scores_by(logs, "config", "task", "split")
    lacking = "it takes results.jsonl with scores of the arm `plain` and of another one"
    def gains(lines):
        plain = {(line["arm"], line.get("n_shot"), line.get("seed")): accuracy(line)
                 for line in lines if line.get("arm") in ("plain", "plain_uniform")}
        found = defaultdict(lambda: defaultdict(list))
        for line in lines:
            key = plain_of(str(line.get("arm"))), line.get("n_shot"), line.get("seed")
            usual = (line.get("t_ctx"), line.get("t_tgt")) in ((0.2, 0.7), (0.1, 0.9), (None, None))
            if line.get("arm") not in (None, key[0]) and key in plain and (
                    usual or line["arm"] != "jepa"):
                found[line["arm"]][key[1]].append(accuracy(line) - plain[key])
        return found
    best = max(groups.values(), key=lambda lines: (is_test(lines), len(gains(lines))), default=[])
    found = gains(best)
    if not found:
        raise ValueError(lacking)
    arms = sorted(found, key=rank_of_arm, reverse=True)     # jepa, the full method, at the bottom
    shots = sorted({n for arm in arms for n in found[arm]}, key=lambda n: (n is None, n))
    figure, grid = axes(0.7 + 0.4 * len(arms), 1, len(shots), sharey=True)
    for ax, n_shot in zip(grid[0], shots):
        for y, arm in enumerate(arms):
            values, style = found[arm][n_shot], look(arm, sorted(arms))
            if not values:
                continue
            mean, half = statistics.mean(values), half_95(values)
            ax.barh(y, mean, 0.62, color=style["color"], alpha=0.55, edgecolor=style["color"],
                    xerr=half if half == half else None, ecolor="#333333",
                    error_kw={"linewidth": 0.8})
            ax.plot(values, [y] * len(values), color="#222222", marker=style["marker"],
                    linestyle="none", markersize=3, markerfacecolor="white", markeredgewidth=0.7)
        zero_line(ax, vertical=True)
        ax.locator_params(axis="x", nbins=6 if len(shots) == 1 else 4)
        plain = [accuracy(line) for line in best if line.get("arm") == "plain"
                 and line.get("n_shot") == n_shot]
        ax.set_title(f"{n_shot}-shot\nplain: {statistics.mean(plain):.1f} %")
        ax.grid(axis="y", visible=False)
    counts = {arm: max(len(values) for values in found[arm].values()) for arm in arms}
    grid[0, 0].set_yticks(range(len(arms)), [f"{label(arm)}\nn = {counts[arm]}" for arm in arms])
    grid[0, 0].set_ylim(len(arms) - 0.5, -0.5)
    figure.supxlabel("gain over plain, points of accuracy", fontsize=8)
    line = best[0]
    return figure, (f"Accuracy minus that of plain fine-tuning with the same seed, "
                    f"{short(line.get('task'))} {short(line.get('split'))}, "
                    f"{short(line.get('config'), 40)}, {questions(best)}. Dots are the n seeds, "
                    f"bars their mean, lines its 95 % interval from three seeds up; all bars share "
                    f"one plain arm, and are not corrected for their number." + " JEPA uniform is "
                    "compared with plain uniform." * ("jepa_uniform" in arms))


def questions(lines) -> str:
    counts = sorted({line["metrics"].get("n") for line in lines} - {None})
    return f"n = {' or '.join(f'{n:,}' for n in counts) or '?'} questions"


def sensitivity(logs: Logs):
    groups = scores_by(logs, "config", "task", "split")
    def pairs(lines):
        found = defaultdict(lambda: defaultdict(list))
        for line in lines:
            t = line.get("t_ctx"), line.get("t_tgt")
            arm = str(line.get("arm"))
            if (arm in ("jepa", "symmetric", "reversed") or arm.startswith("rates_")) and (
                    None not in t):
                found[line.get("n_shot")][t].append(accuracy(line))
        return found
    size = lambda lines: len({t for of in pairs(lines).values() for t in of})
    best = max(groups.values(), key=lambda lines: (is_test(lines), size(lines)), default=[])
    if size(best) < 2:
        raise ValueError("it takes results.jsonl with JEPA at two or more pairs (t_ctx, t_tgt)")
    found = pairs(best)
    shots = sorted(found, key=lambda n: (n is None, n))
    every = [t for of in found.values() for t in of]
    low, high = (sorted({t[i] for t in every}) for i in (0, 1))
    values = {n: {t: statistics.mean(v) for t, v in found[n].items()} for n in shots}
    flat = [value for of in values.values() for value in of.values()]
    figure, grid = axes(0.75 + 0.36 * len(low) * len(shots) + 0.25 * len(shots), len(shots),
                        sharex=True)
    for ax, n_shot in zip(grid[:, 0], shots):
        table = np.full((len(low), len(high)), np.nan)
        for (t_ctx, t_tgt), value in values[n_shot].items():
            table[low.index(t_ctx), high.index(t_tgt)] = value
        image = ax.imshow(table, cmap="cividis", vmin=min(flat), vmax=max(max(flat),
                          min(flat) + 1e-9), aspect="auto")
        for (t_ctx, t_tgt), value in values[n_shot].items():
            bright = image.norm(value) > 0.55
            ax.text(high.index(t_tgt), low.index(t_ctx),
                    f"{value:.1f}\nn = {len(found[n_shot][t_ctx, t_tgt])}", ha="center",
                    va="center", fontsize=6.5, color="black" if bright else "white")
        ax.grid(visible=False)
        ax.set_yticks(range(len(low)), [f"{t:g}" for t in low])
        ax.set_ylabel("t_ctx")
        ax.set_title(f"{n_shot}-shot")
    grid[-1, 0].set_xticks(range(len(high)), [f"{t:g}" for t in high])
    grid[-1, 0].set_xlabel("t_tgt")
    figure.colorbar(image, ax=grid[:, 0].tolist(), pad=0.02).set_label("accuracy, %", labelpad=2)
    line = best[0]
    return figure, (f"Accuracy of JEPA at masking rates (t_ctx, t_tgt), mean over n seeds, "
                    f"{short(line.get('task'))} {short(line.get('split'))}, {questions(best)}; "
                    f"what is blank was not run.")


def front(logs: Logs):
    """Every run with both numbers; no other run is better in both than those on the line."""
    forgotten = {one.name: (one.found["forgetting"], one) for one in last_of_each(logs.probed)}
    of_log = {one.settings.get("out_dir", one.name): one for one in logs.training}
    for whole in logs.kept if not logs.probed else ():      # another text: never on one axis
        for name, scores in whole["models"].items():
            if name in of_log and isinstance(scores.get("wikitext"), dict):
                forgotten.setdefault(name, (scores["wikitext"]["minus_base"], of_log[name]))
    found, groups = defaultdict(list), scores_by(logs, "n_shot", "task", "split", "config")
    for key, lines in groups.items():
        for line in lines:
            for name, (loss, one) in forgotten.items():
                if is_of(line, name, one.settings):
                    found[key].append((loss, line, one))
                    break
    for key, lines in groups.items() if not found else ():      # grid.py has the losses of a log
        for line in lines:
            for losses in list(line.get("held_out", {}).values())[1:]:
                loss = statistics.mean(after - before for before, after in losses.values())
                found[key].append((loss, line, Run("", line["arm"], {}, {})))
    if not any(found.values()):
        raise ValueError("it takes results.jsonl with losses of another corpus (forget_task), or "
                         "probe.json or summary.json of the same runs")
    (n_shot, task, split, _), points = max(found.items(), key=lambda item: (
        item[0][2] == "test", len(item[1])))
    figure, grid = axes(2.9)
    ax, arms = grid[0, 0], by_arm(one._replace(found=(loss, line)) for loss, line, one in points)
    for arm, runs in arms.items():
        x, y = [one.found[0] for one in runs], [accuracy(one.found[1]) for one in runs]
        half = [100 * Z * (one.found[1]["metrics"].get("stderr") or 0) for one in runs]
        ax.errorbar(x, y, half, **{**look(arm, arms), "linestyle": "none"}, elinewidth=0.5,
                    markeredgecolor="white", markeredgewidth=0.5, markersize=5, alpha=0.9,
                    label=f"{label(arm)}, n = {len(runs)}")
    best = pareto([(loss, accuracy(line)) for loss, line, _ in points])
    ax.step(*zip(*best), where="post", color="black", linewidth=0.8, zorder=1)
    ax.set_xlabel("forgetting: loss minus base (less is better)")
    ax.set_ylabel("accuracy, %")
    legend_above(figure, ax)
    return figure, (f"Accuracy on {short(task)} {short(split)}, {n_shot}-shot, against forgetting: "
                    f"{questions([line for _, line, _ in points])}, lines their 95 % interval; a "
                    f"marker is a run. No run is better in both than those on the black line.")


def pareto(points):
    """(forgetting, accuracy) -> those that none beats in both, in order of forgetting."""
    best = []
    for loss, right in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or right > best[-1][1]:
            best.append((loss, right))
    return best


def interpolation(logs: Logs):
    arms, said = largest_cell([one for one in last_of_each(logs.probed) if one.found.get("scales")],
                              "it takes a probe.json that was measured with --scales=...")
    figure, grid = axes(3.4, 2, sharex=True)
    for ax, key, name in zip(grid[:, 0], ("mean_drift", "forgetting"),
                             ("mean drift", "forgetting")):
        for arm, runs in arms.items():
            style = look(arm, arms)
            for one in runs:
                curve = {blend["scale"]: blend[key] for blend in one.found["scales"]}
                curve = sorted({**curve, 0.0: 0.0, 1.0: one.found[key]}.items())
                ax.plot(*zip(*curve), **style, markersize=3, linewidth=0.8, alpha=0.8,
                        label=f"{label(arm)}, n = {len(runs)}" if one is runs[0] else None)
        zero_line(ax)
        ax.axvline(1, color="#555555", linewidth=0.5, linestyle=":")
        ax.set_ylabel(name)
    grid[-1, 0].set_xlabel("a, of base + a (tuned - base)")
    legend_above(figure, grid[0, 0])
    return figure, (f"What drift alone does: the weights are moved by a times the way from the "
                    f"base (a = 0) to the tuned model (a = 1), {said} A line is a run.")


def forgetting(logs: Logs):
    arms, said = largest_cell(last_of_each(logs.probed),
                              "it takes a probe.json, which analysis/probe.py writes")
    whole = next(p for p in logs.probes if any(run.name in p["models"] for runs in arms.values()
                                               for run in runs))
    rates = whole["settings"]["rates"]
    figure, grid = axes(2.4)
    ax = grid[0, 0]
    by_x(ax, rates, {arm: [run.found["forgetting_by_rate"] for run in runs
                           if len(run.found["forgetting_by_rate"]) == len(rates)]
                     for arm, runs in arms.items()}, 0.008)
    zero_line(ax)
    ax.set_xlabel("masking rate t")
    ax.set_ylabel("forgetting: loss minus base")
    legend_above(figure, ax)
    return figure, (f"Loss per masked token minus the base's, the same masks, by masking rate: "
                    f"n = {whole['n']} texts of {short(whole['settings']['text'])}; {said} Dots "
                    f"are seeds, lines their mean, bands its 95 % interval from three seeds up.")


FIGURES = (training, drift, rank, ratio, scatter, density, ablation, sensitivity, front,
           interpolation, forgetting)


if __name__ == "__main__":
    run(main, PlotConfig)
