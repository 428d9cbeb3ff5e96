"""How figures look: one colour, marker and name for an arm, panels, curves, dots with intervals.

A few arms share their axes. Many would hide each other: then each has a panel or a row of its own,
with what it is compared with in grey. matplotlib is imported when something is drawn.
"""
import math
import zlib

import pandas as pd

from analysis.arms import ARMS, label, plain_of, rank_of
from configurator import printable
from tasks.stats import half_95

WIDTH, WIDE = 3.3, 6.9  # inches: one and two columns of a two-column paper
FEW = 4                 # up to this number of arms share axes, with their seeds and intervals
# Okabe and Ito's colours, and four that all kinds of colour vision tell from these
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#661100", "#1B1B6B",
           "#000000", "#DDCC77")
MARKERS = "os^Dv<P*X>hpd"
DASHES = "-", "--", ":", "-."
GREY = "#9a9a9a"        # of what an arm is compared with
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7,
         "ytick.labelsize": 7, "legend.fontsize": 6.5, "font.family": "DejaVu Sans",
         "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
         "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.4, "axes.axisbelow": True,
         "lines.linewidth": 1.2, "lines.markersize": 4, "legend.frameon": False,
         "legend.handlelength": 2.4, "legend.columnspacing": 1, "figure.facecolor": "white",
         "figure.constrained_layout.use": True, "svg.hashsalt": "figure",
         "text.parse_math": False}      # a `$` in a name is a dollar


def axes(height: float, rows: int = 1, columns: int = 1, width: float = WIDTH, **options):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def style_of(arm: str) -> dict:
    """Return colour, marker and dash of an arm, which it has in every figure."""
    i = list(ARMS).index(arm) if arm in ARMS else zlib.crc32(arm.encode())
    return {"color": COLOURS[i % 10], "marker": MARKERS[i % 13], "linestyle": DASHES[i // 10 % 4]}


def short(text, length: int = 24) -> str:
    """Return a name as it can be drawn: one line, no control characters, cut to its room.

    matplotlib leaves names that begin with an underscore out of legends.
    """
    text = printable(str(text)).replace("\n", " ")
    text = text if len(text) <= length else text[:length - 1] + "\u2026"
    return " " + text if text.startswith("_") else text


def save(figure, file, kind: str):
    """Write a figure; the same figure gives the same bytes at any time."""
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(file, format=kind, dpi=300, metadata=metadata)


def legend_above(figure, **options):
    """Put one legend for all axes above them, in as many columns as there is room for."""
    handles = {}
    for ax in figure.axes:
        handles |= {name: handle for handle, name in zip(*ax.get_legend_handles_labels())}
    for columns in range(min(3, len(handles)), 0, -1):
        legend = figure.legend(handles.values(), handles.keys(), loc="outside upper center",
                               ncols=columns, **options)
        if legend.get_window_extent().width <= WIDTH * figure.dpi or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + 0.14 * max(0, len(handles) / columns - 2))


def line_at(ax, at: float = 0.0, vertical: bool = False, **options):
    style = {"color": "#555555", "linewidth": 0.8, "zorder": 1} | options
    (ax.axvline if vertical else ax.axhline)(at, **style)


def log_axis(ax, small: bool = False):
    """Make the y axis logarithmic, with a few plain numbers even on less than a decade; small: with
    fewer."""
    from matplotlib.ticker import LogLocator
    ax.set_yscale("log")
    low, high = ax.yaxis.get_view_interval()
    subs = (1,) if high / low > 100 else (1, 3) if small or high / low > 10 else (
        1, 1.5, 2, 3, 5, 7)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()


# ----------------------------------------------------------------------------------------------
# curves


def panels_of(frame: pd.DataFrame, x: str, columns: list[str], gap: tuple = ()):
    """Draw columns over x -> figure, axes: a row a column where a few arms share the axes, else a
    row an arm and a column a column, with the plain that the arm belongs to in grey."""
    arms = list(frame["arm"].unique())
    if len(arms) <= FEW:
        figure, grid = axes(0.5 + 1.15 * len(columns), len(columns), sharex=True)
        dodge = min(0.12, 0.6 / max(1, len(arms) - 1)) if gap else 0.0
        for ax, column in zip(grid[:, 0], columns):
            curves(ax, frame, x, column, dodge, gap)
        legend_above(figure)
        return figure, grid
    figure, grid = axes(0.7 + 0.55 * len(arms), len(arms), len(columns), sharex=True,
                        sharey="col", width=WIDE)
    for row, arm in zip(grid, arms):
        runs, plain = (frame[frame["arm"] == name] for name in (arm, plain_of(arm)))
        for ax, column in zip(row, columns):
            if plain_of(arm) != arm:
                curves(ax, plain, x, column, gap=gap, color=GREY)
            curves(ax, runs, x, column, gap=gap)
        row[0].set_ylabel(f"{short(label(arm), 30)}\nn = {runs['run'].nunique()}", rotation=0,
                          ha="right", va="center", fontsize=7)
    return figure, grid


def curves(ax, frame: pd.DataFrame, x: str, y: str, dodge: float = 0.0, gap: tuple = (),
           color: str = ""):
    """Draw y over x: for each arm the mean of its runs, wherever all of them have a value.

    Runs are thin lines, the 95 % interval of the mean is a band. dodge moves the arms apart; lines
    are broken at the x in gap; color replaces the arms' own, and then the runs are left out.
    """
    arms = list(frame["arm"].unique())
    for k, arm in enumerate(arms):
        runs = frame[frame["arm"] == arm].pivot_table(index=x, columns="run", values=y).dropna()
        if runs.empty:
            continue
        half = runs.apply(half_95, axis=1)
        xs = sorted([*runs.index, *gap])
        runs, half = runs.reindex(xs), half.reindex(xs)     # nan in the gap
        style = style_of(arm) | ({"color": color, "marker": ""} if color else {})
        mean, at = runs.mean(axis=1), runs.index + (k - (len(arms) - 1) / 2) * dodge
        ax.plot(at, mean, **style, markevery=max(1, len(mean) // 6),
                label=f"{short(label(arm))}, n = {len(runs.columns)}")
        if not color:
            ax.plot(at, runs, color=style["color"], linewidth=0.5, alpha=0.6)
        ax.fill_between(at, mean - half, mean + half, color=style["color"], alpha=0.2, linewidth=0)


# ----------------------------------------------------------------------------------------------
# clouds


def clouds(frame: pd.DataFrame, x: str, y: str, words) -> tuple:
    """Draw the runs as points -> figure, {arm: its axes}: a few arms share one panel, many have one
    each, where the runs of all others are grey. words(rows of an arm) stands beside its name."""
    arms = list(frame["arm"].unique())
    if len(arms) <= FEW:
        figure, grid = axes(2.9)
        for arm in arms:
            own = frame[frame["arm"] == arm]
            cloud(grid[0, 0], own, x, y, label=f"{short(label(arm))}: {words(own)}")
        legend_above(figure, handlelength=1)
        return figure, dict.fromkeys(arms, grid[0, 0])
    rows = -(-len(arms) // 4)
    figure, grid = axes(0.5 + 1.5 * rows, rows, 4, width=WIDE, sharex=True, sharey=True)
    for ax, arm in zip(grid.flat, arms):
        own = frame[frame["arm"] == arm]
        ax.plot(frame[x], frame[y], ".", color=GREY, alpha=0.6, markersize=3, markeredgewidth=0)
        cloud(ax, own, x, y)
        ax.set_title(f"{short(label(arm))}\n{words(own)}", fontsize=7)
    for ax in grid.flat[len(arms):]:
        ax.set_axis_off()
    return figure, dict(zip(arms, grid.flat))


def cloud(ax, own: pd.DataFrame, x: str, y: str, **options):
    style = style_of(own["arm"].iloc[0]) | {"linestyle": "none"}
    ax.plot(own[x], own[y], **style, markeredgecolor="white", markeredgewidth=0.5, markersize=5.5,
            **options)


def name_axes(figure, x: str, y: str = ""):
    """Name both axes once, whatever the number of panels."""
    if len(figure.axes) == 1:
        figure.axes[0].set_xlabel(x)
        figure.axes[0].set_ylabel(y)
    else:
        figure.supxlabel(x, fontsize=8)
        figure.supylabel(y, fontsize=8)


# ----------------------------------------------------------------------------------------------
# dots with intervals


def dots(panels: dict, titles: dict, names=None):
    """Draw a row an arm and a panel beside the other -> figure, axes.

    panels: {key: {arm: (value, low, high, values of the seeds)}}. titles: {key: a panel's title}.
    names: {arm: its words}.
    """
    arms = sorted({arm for panel in panels.values() for arm in panel}, key=rank_of)
    names = names or {arm: short(label(arm)) for arm in arms}
    lines = max(name.count("\n") for name in names.values())
    figure, grid = axes(0.75 + (0.22 + 0.06 * lines) * len(arms), 1, len(panels), sharey=True,
                        width=WIDTH if len(panels) < 2 else WIDE)
    for ax, (key, panel) in zip(grid[0], panels.items()):
        for y, arm in enumerate(arms):
            if arm in panel:
                dot(ax, y, arm, *panel[arm])
        ax.set_title(titles[key])
        ax.locator_params(axis="x", nbins=6 if len(panels) == 1 else 4)
        ax.grid(axis="y", visible=False)
    grid[0, 0].set_yticks(range(len(arms)), [names[arm] for arm in arms])
    grid[0, 0].set_ylim(len(arms) - 0.4, -0.6)
    return figure, grid


def dot(ax, y: int, arm: str, value: float, low: float, high: float, seeds):
    """Draw one arm: its interval as a line, its seeds as dots below it, its mean as its marker."""
    style = style_of(arm)
    if not math.isnan(low):
        ax.plot([low, high], [y, y], color=style["color"], linewidth=1.4, solid_capstyle="butt")
    ax.plot(seeds, [y + 0.28] * len(seeds), ".", color=style["color"], markersize=3.5, alpha=0.6,
            markeredgewidth=0)
    ax.plot(value, y, color=style["color"], marker=style["marker"], markersize=5.5,
            markeredgecolor="white", markeredgewidth=0.5)
