"""Draw the figures of a study from its logs, as PNG and SVG: the paper's, and a few more.

    pip install -r requirements-plots.txt
    python analysis/plot.py --inputs=out/study --out=figures
    python analysis/plot.py --figure=drift --inputs=a/probe.json,b/probe.json --out=figures

Inputs are files, or folders that are searched for log.jsonl (train.py), probe.json (probe.py) and
results.jsonl (grid.py). A figure whose logs are missing says what it takes; the others are drawn.

    training    losses while training               scatter     drift against forgetting, with r
    drift       of states and weights, by depth     ablation    gain over plain, by arm
    ratio       drift of JEPA over plain            front       accuracy against forgetting

n counts seeds. Bands and lines over seeds are 95 % intervals by Student's t, from three seeds up;
that of r is Fisher's, from four up.
"""
import io
import math
import os
import statistics
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import printable, run  # first: it sets variables that torch reads

import numpy as np
import pandas as pd

from analysis.arms import ARMS, AT_RATES, label, plain_of, rank_of
from analysis.frames import Study, by_arm, last_of_each, read_study
from tasks.files import write_bytes
from tasks.stats import half_95, pearson

WIDTH = 3.3             # inches: a column of a two-column paper
FEW = 4                 # up to this number of arms a curve shows its seeds and its interval
# Okabe and Ito's colours, which all kinds of colour vision tell apart, a grey, and three of Tol's
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#777777", "#332288",
           "#882255", "#999933")
MARKERS = "os^Dv<P*X>hpd"
DASHES = "-", "--", ":", "-."
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7,
         "ytick.labelsize": 7, "legend.fontsize": 6.5, "font.family": "DejaVu Sans",
         "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
         "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.4, "axes.axisbelow": True,
         "lines.linewidth": 1.2, "lines.markersize": 4, "legend.frameon": False,
         "legend.handlelength": 2.4, "legend.columnspacing": 1,
         "figure.constrained_layout.use": True, "svg.hashsalt": "figure",
         "text.parse_math": False}      # a `$` in a name is a dollar


@dataclass
class PlotConfig:
    inputs: tuple[str, ...] = ()        # files or folders of a study's logs, separated by commas
    out: str = "figures"                # a folder for {figure}.png and {figure}.svg
    arms: tuple[str, ...] = ()          # only these, as grid.py names them; empty: all
    figure: Literal["all", "training", "drift", "ratio", "scatter", "ablation",
                    "front"] = "all"    # which one to draw


def main(cfg: PlotConfig):
    study = read_study(cfg.inputs, cfg.arms)
    if not cfg.out or os.path.lexists(cfg.out) and not os.path.isdir(cfg.out):
        raise OSError(f"out={cfg.out!r} is not a folder; name a new one or one that is there")
    os.makedirs(cfg.out, exist_ok=True)
    for name in FIGURES if cfg.figure == "all" else [cfg.figure]:
        try:
            figure, caption = draw(name, study)
        except ValueError as error:
            if cfg.figure != "all":
                raise
            print(printable(f"{name}: {error}"))
            continue
        for kind in ("png", "svg"):
            drawn = io.BytesIO()
            save(figure, drawn, kind)
            write_bytes(f"{cfg.out}/{name}.{kind}", drawn.getvalue())
        print(printable(f"{cfg.out}/{name}.png, .svg: {caption}"))


def draw(name: str, study):
    """Return the figure of FIGURES and its caption. Raises ValueError on what the logs lack."""
    try:
        import matplotlib  # half a second, and an extra
    except ImportError:
        raise OSError("figures take matplotlib, which is not installed: pip install -r "
                      "requirements-plots.txt") from None
    matplotlib.rcParams.update(STYLE)
    warnings.filterwarnings("ignore", "Glyph .* missing from font")     # it draws a box
    return FIGURES[name](study)


def save(figure, file, kind: str):
    """Write a figure; the same figure gives the same bytes at any time."""
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(file, format=kind, dpi=300, metadata=metadata)


# ----------------------------------------------------------------------------------------------
# what is compared, and how it is drawn


def most_runs(frame: pd.DataFrame, lacking: str):
    """Return the rows of the folder with most runs, arm by arm, and a sentence on the others."""
    if frame.empty:
        raise ValueError(lacking)
    sizes = frame.groupby("config", sort=False)["run"].nunique()
    config, left_out = sizes.idxmax(), sizes.sum() - sizes.max()
    said = f" {left_out} runs of other folders are left out." if left_out else ""
    return by_arm(frame[frame["config"] == config]), f"{short(config, 80)}.{said}"


def best_group(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results of one config, task and split: on test if possible, then by number."""
    groups = [group for _, group in results.groupby(["config", "task", "split"], sort=False)]
    return max(groups, key=lambda group: (group["split"].iloc[0] == "test", len(group)),
               default=results)


def axes(height: float, rows: int = 1, columns: int = 1, **options):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(WIDTH, height))
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


def curves(ax, frame: pd.DataFrame, x: str, y: str, dodge: float = 0.0, gap: tuple = ()):
    """Draw y over x: for each arm the mean of its runs, wherever all of them have a value.

    A few arms also show their runs as thin lines and the interval of the mean as a band. dodge
    moves the arms apart; lines are broken at the x in gap.
    """
    arms = list(frame["arm"].unique())
    for k, arm in enumerate(arms):
        runs = frame[frame["arm"] == arm].pivot_table(index=x, columns="run", values=y).dropna()
        if runs.empty:
            continue
        half = runs.apply(half_95, axis=1)
        xs = sorted([*runs.index, *gap])
        runs, half = runs.reindex(xs), half.reindex(xs)     # nan in the gap
        mean, style = runs.mean(axis=1), style_of(arm)
        at = mean.index + (k - (len(arms) - 1) / 2) * dodge
        ax.plot(at, mean, **style, markevery=max(1, len(mean) // 6),
                label=f"{short(label(arm))}, n = {len(runs.columns)}")
        if len(arms) <= FEW:
            ax.plot(at, runs, color=style["color"], linewidth=0.5, alpha=0.6)
            ax.fill_between(at, mean - half, mean + half, color=style["color"], alpha=0.2,
                            linewidth=0)


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


def line_at(ax, at: float = 0.0, vertical: bool = False):
    (ax.axvline if vertical else ax.axhline)(at, color="#555555", linewidth=0.8, zorder=1)


def log_axis(ax):
    """Make the y axis logarithmic, with a few plain numbers even on less than a decade."""
    from matplotlib.ticker import LogLocator
    ax.set_yscale("log")
    low, high = ax.yaxis.get_view_interval()
    subs = (1,) if high / low > 100 else (1, 3) if high / low > 10 else (1, 1.5, 2, 3, 5, 7)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()


# ----------------------------------------------------------------------------------------------
# figures: study -> figure, caption; ValueError on what is lacking


NO_PROBE = "it takes a probe.json, which analysis/probe.py writes"
MEANS = f"Lines are means over the n seeds, bands (up to {FEW} arms) 95 % intervals."


def training(study: Study):
    log, said = most_runs(study.log, "it takes log.jsonl of runs of train.py")
    held_out = [column for column in log if column.startswith("held-out ")][:2]
    panels = [column for column in ("diffusion", "jepa", *held_out) if log[column].notna().any()]
    if not panels:
        raise ValueError("it takes log.jsonl with losses in it")
    figure, grid = axes(0.4 + 1.05 * len(panels), len(panels), sharex=True)
    for ax, column in zip(grid[:, 0], panels):
        curves(ax, log, "step", column)
        floor = log.dropna(subset=["jepa_floor"])
        if column == "jepa" and len(floor):
            floor = floor[floor["arm"] == floor["arm"].iloc[0]].groupby("step")["jepa_floor"].mean()
            ax.plot(floor, color="black", linewidth=0.8, linestyle=":", label="constant predictor")
        log_axis(ax)
        name = "JEPA" if column == "jepa" else short(column, 20).replace("held-out ", "held-out\n")
        ax.set_ylabel(f"{name} loss")
    grid[-1, 0].set_xlabel("optimizer step")
    legend_above(figure)
    return figure, (f"Losses while training, {said} {MEANS} Held-out losses are means over t; "
                    f"constant predictor: the least JEPA loss that ignores the input.")


def drift(study: Study):
    """Draw drift by depth. The norm's state has a scale of its own, so no line leads there."""
    runs, said = most_runs(last_of_each(study.probed), NO_PROBE)
    panels, depths = ["drift", "weight_drift"], runs["depths"].iloc[0]
    rows = runs[["run", "arm", *panels]].explode(panels).astype(dict.fromkeys(panels, float))
    rows["depth"] = rows.groupby("run").cumcount()
    last = len(depths) - 1              # the norm
    dodge = min(0.12, 0.6 / max(1, rows["arm"].nunique() - 1))
    figure, grid = axes(3.7, 2, sharex=True)
    for ax, key in zip(grid[:, 0], panels):
        curves(ax, rows, "depth", key, dodge, gap=(last - 0.5,))
        ax.set_ylabel(f"drift of {'weights' if key == 'weight_drift' else 'states'}")
        ax.set_ylim(bottom=0)
    every = max(1, -(-last // 8))       # as many blocks as there is room for
    shown = [0, *range(every, last - every // 2, every), last]
    grid[-1, 0].set_xticks(shown, [depths[n] for n in shown])
    grid[-1, 0].set_xlabel("block")
    legend_above(figure)
    return figure, (f"Distance from the base, relative to its length, by depth: "
                    f"{short(runs['texts'].iloc[0], 80)}; {said} {MEANS}")


def ratio(study: Study):
    """Divide JEPA's drift by that of the plain run with the same seed, by config and rates."""
    runs = last_of_each(study.probed)
    plain = runs[runs["arm"] == "plain"]
    jepa = runs[runs["arm"].isin(["jepa", *AT_RATES])]
    both = jepa.merge(plain, on=["config", "seed"], suffixes=("", "_plain"))
    if both.empty:
        raise ValueError("it takes a probe.json with a plain and a JEPA run of one seed")
    if not (both[["mean_drift", "mean_drift_plain"]] > 0).all(axis=None):
        raise ValueError("it takes runs that have moved: a probe.json has a mean drift of 0")
    both["log_ratio"] = np.log(both["mean_drift"] / both["mean_drift_plain"])
    groups = by_arm(both).groupby(["config", "arm"], sort=False)["log_ratio"]
    figure, grid = axes(0.6 + 0.4 * len(groups))
    ax, names = grid[0, 0], []
    for y, ((config, arm), ratios) in enumerate(groups):
        half = half_95(list(ratios))
        ax.plot(np.exp([ratios.mean() - half, ratios.mean() + half]), [y, y], color="#444444")
        ax.plot(np.exp(ratios), [y] * len(ratios), color=style_of("jepa")["color"], marker="o",
                linestyle="none", markersize=3.5, alpha=0.7, markeredgewidth=0)
        ax.plot(np.exp(ratios.mean()), y, color="black", marker="|", markersize=10)
        names.append(f"{short(config)}\n{short(label(arm))}, n = {len(ratios)}")
    line_at(ax, 1, vertical=True)
    ax.set_yticks(range(len(groups)), names)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_xlabel("drift with JEPA / without")
    ax.locator_params(axis="x", nbins=5)
    return figure, ("Mean drift over blocks of a JEPA run over that of the plain run with the same "
                    "seed. Dots are seeds, ticks their geometric mean, lines its 95 % interval.")


def scatter(study: Study):
    every, said = most_runs(study.probed, NO_PROBE)
    figure, grid = axes(2.9)
    ax = grid[0, 0]
    for arm, checkpoints in every.groupby("arm", sort=False):
        style = style_of(arm) | {"linestyle": "none"}
        for _, path in checkpoints.sort_values("step").groupby("run"):
            ax.plot(path["mean_drift"], path["forgetting"], color=style["color"], linewidth=0.5,
                    alpha=0.6, marker=".", markersize=2.5)
        x, y = (list(last_of_each(checkpoints)[key]) for key in ("mean_drift", "forgetting"))
        r, low, high = pearson(x, y)
        words = "" if math.isnan(low) else f", r = {r:+.2f} [{low:+.2f}, {high:+.2f}]"
        ax.plot(x, y, **style, markeredgecolor="white", markeredgewidth=0.5, markersize=5,
                label=f"{short(label(arm))}: n = {len(x)}{words}")
    line_at(ax)
    ax.set_xlabel("mean drift over blocks")
    ax.set_ylabel("forgetting: loss minus base")
    legend_above(figure, handlelength=1)
    return figure, (f"Drift against forgetting, {said} A marker is the end of a run, small dots "
                    f"are its earlier checkpoints. Pearson's r of the n ends, with its 95 % "
                    f"interval.")


def gains_of(results: pd.DataFrame) -> pd.DataFrame:
    """Pair each score with that of the arm's plain run with the same seed and shots: its gain."""
    keys = ["config", "task", "split", "n_shot", "seed", "plain"]
    plain = results[["config", "task", "split", "n_shot", "seed", "accuracy"]].assign(
        plain=results["arm"])
    both = results.assign(plain=results["arm"].map(plain_of)).merge(
        plain, on=keys, suffixes=("", "_plain"))
    both["gain"] = both["accuracy"] - both["accuracy_plain"]
    return both[both["arm"] != both["plain"]]


def ablation(study: Study):
    """Draw a bar for each arm: the mean gain over its plain run, by number of shots."""
    gains = by_arm(best_group(gains_of(study.results)))
    if gains.empty:
        raise ValueError("it takes results.jsonl with scores of the arm `plain` and of another one")
    arms = sorted(gains["arm"].unique(), key=lambda arm: (arm == "jepa", rank_of(arm)))
    shots = sorted(gains["n_shot"].unique())
    figure, grid = axes(0.7 + 0.32 * len(arms), 1, len(shots), sharey=True)
    for ax, n_shot in zip(grid[0], shots):
        at_shot = gains[gains["n_shot"] == n_shot]
        for y, arm in enumerate(arms):
            own, style = at_shot[at_shot["arm"] == arm], style_of(arm)
            half = half_95(list(own["gain"]))
            ax.barh(y, own["gain"].mean(), 0.62, color=style["color"], alpha=0.55, xerr=half,
                    edgecolor=style["color"], ecolor="#333333", error_kw={"linewidth": 0.8})
            ax.plot(own["gain"], [y] * len(own), color="#222222", marker=style["marker"],
                    linestyle="none", markersize=3, markerfacecolor="white", markeredgewidth=0.7)
        plain = at_shot["accuracy_plain"][at_shot["plain"] == "plain"]
        line_at(ax, vertical=True)
        ax.locator_params(axis="x", nbins=6 if len(shots) == 1 else 4)
        ax.set_title(f"{n_shot}-shot\nplain: {plain.mean():.2f} %")
        ax.grid(axis="y", visible=False)
    counts = gains.groupby("arm")["seed"].nunique()
    over = {arm: "" if plain_of(arm) == "plain" else ", over its own plain" for arm in arms}
    grid[0, 0].set_yticks(range(len(arms)), [f"{short(label(arm))}\nn = {counts[arm]}{over[arm]}"
                                             for arm in arms])
    grid[0, 0].set_ylim(len(arms) - 0.5, -0.5)
    figure.supxlabel("gain over plain, points of accuracy", fontsize=8)
    return figure, (f"Accuracy minus that of the plain run with the same seed, {group_of(gains)}. "
                    f"Dots are the n seeds, bars their mean, lines its 95 % interval, not "
                    f"corrected for the number of arms.")


def group_of(results: pd.DataFrame) -> str:
    """Name the questions of a group of results."""
    first, n = results.iloc[0], " or ".join(f"{n:,}" for n in sorted(set(results["n"])))
    return f"{short(first['config'], 40)}: {n} questions, {short(first['task'])} {first['split']}"


def front(study: Study):
    """Set accuracy against forgetting, by the probe, or without one by the runs' held-out loss."""
    found, last = study.results, last_of_each(study.probed)
    if len(last):
        loss = dict(zip(last["run"], last["forgetting"]))
        found = found.assign(forgetting=found["run"].map(loss).astype(float))
    found = best_group(found.dropna(subset=["forgetting"]))
    if found.empty:
        raise ValueError("it takes results.jsonl with losses of another corpus (forget_task), or "
                         "a probe.json of the same runs")
    found = found[found["n_shot"] == found["n_shot"].mode()[0]]
    figure, grid = axes(2.9)
    ax = grid[0, 0]
    for arm, runs in by_arm(found).groupby("arm", sort=False):
        style = style_of(arm) | {"linestyle": "none", "markeredgecolor": "white"}
        ax.plot(runs["forgetting"], runs["accuracy"], **style, markersize=3.5, alpha=0.6,
                markeredgewidth=0.3)
        ax.plot(runs["forgetting"].mean(), runs["accuracy"].mean(), **style, markersize=7,
                markeredgewidth=0.5, alpha=0.8, label=f"{short(label(arm))}, n = {len(runs)}")
    best = pareto(found[["forgetting", "accuracy"]].itertuples(index=False, name=None))
    ax.step(*zip(*best), where="post", color="black", linewidth=0.8, zorder=1)
    ax.set_xlabel("forgetting: loss minus base (less is better)")
    ax.set_ylabel("accuracy, %")
    legend_above(figure, handlelength=1)
    return figure, (f"Accuracy against forgetting, {found['n_shot'].iloc[0]}-shot, "
                    f"{group_of(found)}. Small markers are runs, large ones the means of an arm; "
                    f"no run is better in both than those on the black line.")


def pareto(points) -> list[tuple]:
    """Keep the (forgetting, accuracy) that none beats in both, in order of forgetting."""
    best = []
    for loss, right in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or right > best[-1][1]:
            best.append((loss, right))
    return best


FIGURES = {"training": training, "drift": drift, "ratio": ratio, "scatter": scatter,
           "ablation": ablation, "front": front}


if __name__ == "__main__":
    run(main, PlotConfig)
