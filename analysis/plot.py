"""Draw the figures of a study from its logs, as PNG and SVG: the paper's, and a few more.

    pip install -r requirements-plots.txt
    python analysis/plot.py --inputs=out/study --out=figures
    python analysis/plot.py --figure=drift --inputs=a/probe.json,b/probe.json --out=figures

Inputs are files, or folders that are searched for log.jsonl (train.py), probe.json (probe.py) and
results.jsonl (grid.py). A figure whose logs are missing says what it takes; the others are drawn.

    ablation    gain over plain, by arm             training    losses while training
    accuracy    of base and arms, by config         drift       of states and weights, by depth
    loss        held out, where all is masked       ratio       drift of JEPA over plain
    kept        of what plain loses of its base     scatter     drift against forgetting, with r
    sensitivity to lambda and depth                 front       accuracy against forgetting

n counts seeds. Bands and lines over seeds are 95 % intervals by Student's t, from three seeds up;
that of r is Fisher's, from four up, that of a share Fieller's.
"""
import io
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import printable, run  # first: it sets variables that torch reads

import numpy as np
import pandas as pd

from analysis.arms import AT_RATES, label, plain_of
from analysis.drawing import (FEW, GREY, STYLE, axes, clouds, dots, legend_above, line_at,
                              log_axis, name_axes, panels_of, save, short, style_of)
from analysis.effects import (arms_of, drift_ratios, effect_of, gain_of, kept_by, loses,
                              scores_of_bases, tested)
from analysis.frames import Study, by_arm, choose, last_of_each, losses_in, read_study
from analysis.paper import published_share
from tasks.files import write_bytes
from tasks.stats import half_95, pearson, t_95


SHARES = -150, 200      # in %: where the axes of `kept` end


@dataclass
class PlotConfig:
    inputs: tuple[str, ...] = ()        # files or folders of a study's logs, separated by commas
    out: str = "figures"                # a folder for {figure}.png and {figure}.svg
    arms: tuple[str, ...] = ()          # only these, as grid.py names them; empty: all
    figure: Literal["all", "ablation", "accuracy", "loss", "kept", "sensitivity", "training",
                    "drift", "ratio", "scatter", "front"] = "all"   # which one to draw


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


# ----------------------------------------------------------------------------------------------
# what is compared


def most_runs(frame: pd.DataFrame, lacking: str):
    """Return the rows of the folder with most runs, arm by arm, and a sentence on the others."""
    if frame.empty:
        raise ValueError(lacking)
    sizes = frame.groupby("config", sort=False)["run"].nunique()
    config, left_out = sizes.idxmax(), sizes.sum() - sizes.max()
    said = f" {left_out} runs of other folders are left out." if left_out else ""
    return by_arm(frame[frame["config"] == config]), f"{short(config, 80)}.{said}"


def scored(results: pd.DataFrame) -> pd.DataFrame:
    """Select the scores on test; without any those on validation stand in their place. `asked` is
    where they are from."""
    results = results.assign(asked=results["split"])
    on_test = results[results["split"] == "test"]
    return on_test if len(on_test) else results.assign(split="test")


def panels_in(results: pd.DataFrame) -> dict[tuple, str]:
    """Return {(config, n_shot): its title}, by learning rate where the logs tell it."""
    titles = {}
    for key, own in results.groupby(["config", "n_shot"], sort=False):
        rates = set(own["lr"].dropna()) if "lr" in own else set()
        rate = rates.pop() if len(rates) == 1 else None
        title = f"{short(key[0])}, {key[1]}-shot"
        if isinstance(rate, (int, float)):
            title += f"\nlr {rate:g}"
        titles[key] = (rate if isinstance(rate, (int, float)) else math.inf, title)
    return {key: titles[key][1] for key in sorted(titles, key=lambda key: titles[key][0])}


def questions_of(results: pd.DataFrame) -> str:
    """Say how many questions of which tasks the scores are of."""
    n = " or ".join(f"{n:,}" for n in sorted(set(results["n"])))
    tasks = short(", ".join(map(str, dict.fromkeys(results["task"]))))
    return f"{n} questions, {tasks} {results['asked'].iloc[0]}"


# ----------------------------------------------------------------------------------------------
# figures of scores: study -> figure, caption; ValueError on what is lacking


def ablation(study: Study):
    """Draw each arm's mean gain over the plain that belongs to it, by config and shots."""
    results, panels, counts = scored(study.results), {}, {}
    titles = panels_in(results)
    for config, n_shot in titles:
        gains = {arm: gain_of(results, config, arm, n_shot)
                 for arm in arms_of(results, config, n_shot)}
        gains = {arm: values for arm, values in gains.items() if len(values)}
        if not gains:
            continue
        plain = tested(results, config, "plain", n_shot)["accuracy"]
        titles[config, n_shot] += f"\nplain: {plain.mean():.1f} %" * bool(len(plain))
        panels[config, n_shot] = {arm: with_interval(values) for arm, values in gains.items()}
        for arm, values in gains.items():
            counts.setdefault(arm, {})[len(values)] = None      # of a row: each n once, in order
    if not panels:
        raise ValueError("it takes results.jsonl with scores of the arm `plain` and of another one")
    names = {arm: f"{short(label(arm))}, n = {' or '.join(map(str, every_n))}" + (
        "" if plain_of(arm) == "plain" else f"\nover {label(plain_of(arm))}")
        for arm, every_n in counts.items()}
    figure, grid = dots(panels, titles, names)
    for ax in grid[0]:
        line_at(ax, vertical=True)
    name_axes(figure, "gain over plain, points")
    return figure, (f"Accuracy minus that of the plain run with the same seed, "
                    f"{questions_of(results)}. An arm is over plain unless it says over which. "
                    f"Small dots are the n seeds, markers their mean, lines its 95 % interval, not "
                    f"corrected for the number of arms.")


def with_interval(values) -> tuple:
    """Return mean, ends of its 95 % interval, and the values."""
    found = effect_of(values)
    return found.mean, found.mean - found.half, found.mean + found.half, list(values)


def accuracy(study: Study):
    """Draw the score of each arm beside that of its base, by config and shots."""
    results = scored(study.results)
    figure, grid, keys = levels(results, "accuracy", "it takes results.jsonl with scores")
    for ax, (config, n_shot) in zip(grid[0], keys):
        bases = list(scores_of_bases(results, config, n_shot).values())
        for score in bases:
            line_at(ax, score, vertical=True, color="black", linestyle="--", linewidth=0.6)
    name_axes(figure, "accuracy, %")
    return figure, (f"Accuracy, {questions_of(results)}. Small dots are seeds, markers their mean, "
                    f"lines its 95 % interval. Grey: the mean of plain. Dashed: the bases before "
                    f"tuning.")


def loss(study: Study):
    """Draw the held-out loss of each arm at the greatest rate, by config."""
    results = scored(study.results)
    lacking = "it takes results.jsonl with held-out losses of the task"
    rates = losses_in(results)
    if not rates:
        raise ValueError(lacking)
    greatest = rates[-2]                # the last is their mean; losses know no shots
    most = results.groupby("config")["n_shot"].transform(lambda shots: shots.mode()[0])
    figure, grid, _ = levels(results[results["n_shot"] == most], greatest, lacking)
    name_axes(figure, f"held-out loss at {greatest}")
    return figure, (f"Held-out loss of the task at {greatest}; less is better. Small dots are "
                    f"seeds, markers their mean, lines its 95 % interval. Grey: the mean of plain.")


def levels(results: pd.DataFrame, outcome: str, lacking: str):
    """Draw an outcome of every arm, a panel a config -> figure, axes, the panels' keys."""
    panels, plain, titles = {}, [], panels_in(results)
    for config, n_shot in titles:
        values = {arm: tested(results, config, arm, n_shot)[outcome].dropna()
                  for arm in arms_of(results, config, n_shot)}
        values = {arm: own for arm, own in values.items() if len(own)}
        if values:
            panels[config, n_shot] = {arm: with_interval(own) for arm, own in values.items()}
            plain.append(values.get("plain", pd.Series(dtype=float)).mean())
    if not panels:
        raise ValueError(lacking)
    figure, grid = dots(panels, titles)
    for ax, at in zip(grid[0], plain):
        line_at(ax, at, vertical=True, color=GREY)
    return figure, grid, list(panels)


def kept(study: Study):
    """Draw which share of what plain loses of its base's score each arm keeps."""
    results, panels, left_out = scored(study.results), {}, []
    titles = panels_in(results)
    for config, n_shot in titles:
        arms = arms_of(results, config, n_shot) if loses(results, config, n_shot) else []
        for arm in arms:
            value, low, high = (100 * end for end in kept_by(results, config, arm, n_shot))
            if arm == "plain" or math.isnan(value):
                continue
            if math.isnan(low) or not SHARES[0] <= value <= SHARES[1]:
                left_out.append(f"{short(label(arm))} ({short(config)}, {n_shot}-shot)")
                continue
            panels.setdefault((config, n_shot), {})[arm] = value, low, high, []
    if not panels:
        raise ValueError("it takes results.jsonl with scores of a base, of `plain`, which are told "
                         "to be worse, and of another arm, of three seeds or more")
    paper = 100 * published_share("llada8b_gsm8k", "jepa", 4, "base")
    figure, grid = dots(panels, titles)
    for ax in grid[0]:
        line_at(ax, vertical=True)
        line_at(ax, paper, vertical=True, linestyle=":", color=style_of("jepa")["color"])
    lows, highs = zip(*(ax.get_xlim() for ax in grid[0]))
    for ax in grid[0]:
        ax.set_xlim(max(SHARES[0], min(lows)), min(SHARES[1], max(highs)))
    name_axes(figure, "share kept of what plain loses, %")
    others = (f" Left out, because their interval has no two ends or their share lies beyond: "
              f"{', '.join(left_out)}." if left_out else "")
    return figure, (f"Share kept, (arm - plain) / (base - plain) in accuracy, "
                    f"{questions_of(results)}, with Fieller's 95 % interval. Dotted: JEPA's "
                    f"{paper:.0f} % of the paper, if its base had the score that LLaDA's authors "
                    f"report. Axes end at {SHARES[0]} and {SHARES[1]} %.{others}")


def sensitivity(study: Study):
    """Draw JEPA's accuracy on validation at every (lambda, depth), a panel a config."""
    tables = {}
    for config, own in study.trials.groupby("config", sort=False):
        table = own.pivot_table(index=["lambda", "depth"], columns=["seed", "n_shot"],
                                values="accuracy").dropna(axis=1)
        if len(table) > 1 and len(table.columns):
            tables[config] = table
    if not tables:
        raise ValueError("it takes results.jsonl with JEPA's scores on validation at several "
                         "(lambda, depth)")
    figure, grid = axes(0.9 + 0.3 * max(table.index.get_level_values(0).nunique()
                                        for table in tables.values()), 1, len(tables),
                        width=3.3 if len(tables) < 2 else 6.9)
    noises = [noise_of(table) for table in tables.values()]
    titles = {config: title for (config, _), title in panels_in(study.trials).items()}
    for ax, (config, table), noise in zip(grid[0], tables.items(), noises):
        means = table.mean(axis=1).unstack()
        middle = (means.max(axis=None) + means.min(axis=None)) / 2
        half = max(means.max(axis=None) - middle, 0 if math.isnan(noise) else noise, 0.05)
        ax.imshow(means, cmap="cividis", vmin=middle - half, vmax=middle + half, aspect="auto")
        for row, column in np.ndindex(means.shape):
            value = means.iloc[row, column]
            if not math.isnan(value):
                ax.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7,
                        color="white" if value < middle else "black")
        chosen = choose(study.trials, config)
        ax.plot(list(means.columns).index(chosen[1]) + 0.38, list(means.index).index(chosen[0])
                - 0.3, "*", color="#D55E00", markersize=6, markeredgecolor="white",
                markeredgewidth=0.4)
        ax.set_xticks(range(len(means.columns)), means.columns)
        ax.set_yticks(range(len(means.index)), [f"{weight:g}" for weight in means.index])
        ax.set_title(re.sub(r", \d+-shot", "", titles[config])     # over all shots
                     + ("" if math.isnan(noise) else f"\na cell: +- {noise:.1f}"))
        ax.grid(visible=False)
    name_axes(figure, "depth of the predictor", "lambda")
    seeds = sorted({len(table.columns) for table in tables.values()})
    return figure, (f"JEPA's accuracy on validation, mean over {' or '.join(map(str, seeds))} "
                    f"seeds and shots that all cells have. Colours span at least the 95 % interval "
                    f"of a cell, so that noise does not look like structure. Star: the best.")


def noise_of(table: pd.DataFrame) -> float:
    """Return half of the 95 % interval of a row's mean, when rows share the columns' differences;
    nan for one column."""
    rest = table.sub(table.mean(axis=1), axis=0).sub(table.mean() - table.mean(axis=None))
    df = (table.shape[0] - 1) * (table.shape[1] - 1)
    if df < 1:
        return math.nan
    return t_95(df) * math.sqrt((rest ** 2).sum(axis=None) / df / table.shape[1])


# ----------------------------------------------------------------------------------------------
# figures of logs and probes


NO_PROBE = "it takes a probe.json, which analysis/probe.py writes"
MEANS = (f"Lines are means over the n seeds, bands 95 % intervals; with more than {FEW} arms each "
         f"has a row, and grey is the plain that it belongs to.")


def training(study: Study):
    log, said = most_runs(study.log, "it takes log.jsonl of runs of train.py")
    held_out = [column for column in log if column.startswith("held-out ")][:2]
    panels = [column for column in ("diffusion", "jepa", *held_out) if log[column].notna().any()]
    if not panels:
        raise ValueError("it takes log.jsonl with losses in it")
    figure, grid = panels_of(log, "step", panels)
    floor = log.dropna(subset=["jepa_floor"])
    few = log["arm"].nunique() <= FEW
    if few and "jepa" in panels and len(floor):
        floor = floor[floor["arm"] == floor["arm"].iloc[0]].groupby("step")["jepa_floor"].mean()
        grid[panels.index("jepa"), 0].plot(floor, color="black", linewidth=0.8, linestyle=":",
                                           label="constant predictor")
        for legend in list(figure.legends):
            legend.remove()
        legend_above(figure)
    names = ["JEPA loss" if column == "jepa" else
             short(column, 20).replace("held-out ", "held-out\n") + " loss" for column in panels]
    for ax in grid.flat:
        log_axis(ax, small=not few)
    for ax, name in zip(grid[:, 0] if few else grid[0], names):
        ax.set_ylabel(name) if few else ax.set_title(name)
    for ax in grid[-1]:
        ax.set_xlabel("optimizer step")
    floor_said = "; constant predictor: the least JEPA loss that ignores the input" * few
    return figure, (f"Losses while training, {said} {MEANS} Held-out losses are means over "
                    f"t{floor_said}.")


def drift(study: Study):
    """Draw drift by depth. The norm's state has a scale of its own, so no line leads there."""
    runs, said = most_runs(last_of_each(study.probed), NO_PROBE)
    panels, depths = ["drift", "weight_drift"], runs["depths"].iloc[0]
    rows = runs[["run", "arm", *panels]].explode(panels).astype(dict.fromkeys(panels, float))
    rows["depth"] = rows.groupby("run").cumcount()
    last = len(depths) - 1              # the norm
    figure, grid = panels_of(rows, "depth", panels, gap=(last - 0.5,))
    few = grid.shape[1] == 1
    for ax, name in zip(grid[:, 0] if few else grid[0], ("drift of states", "drift of weights")):
        ax.set_ylabel(name) if few else ax.set_title(name)
    for ax in grid.flat:
        ax.set_ylim(bottom=0)
    every = max(1, -(-last // 8))       # as many blocks as there is room for
    shown = [0, *range(every, last - every // 2, every), last]
    for ax in grid[-1]:
        ax.set_xticks(shown, [depths[n] for n in shown])
        ax.set_xlabel("block")
    return figure, (f"Distance from the base, relative to its length, by depth: "
                    f"{short(runs['texts'].iloc[0], 80)}; {said} {MEANS}")


def ratio(study: Study):
    """Divide JEPA's drift by that of the plain run with the same seed, by config and rates."""
    both = drift_ratios(study.probed, ["jepa", *AT_RATES])
    if both.empty:
        raise ValueError("it takes a probe.json with a plain and a JEPA run of one seed")
    groups = by_arm(both).groupby(["config", "arm"], sort=False)["log_ratio"]
    figure, grid = axes(0.6 + 0.4 * len(groups))
    ax, names = grid[0, 0], []
    for y, ((config, arm), ratios) in enumerate(groups):
        half, style = half_95(list(ratios)), style_of(arm)
        ax.plot(np.exp([ratios.mean() - half, ratios.mean() + half]), [y, y], color=style["color"])
        ax.plot(np.exp(ratios), [y] * len(ratios), ".", color=style["color"], markersize=5,
                alpha=0.55, markeredgewidth=0)
        ax.plot(np.exp(ratios.mean()), y, color=style["color"], marker=style["marker"],
                markersize=5.5, markeredgecolor="white", markeredgewidth=0.5)
        names.append(f"{short(config)}\n{short(label(arm))}, n = {len(ratios)}")
    line_at(ax, 1, vertical=True)
    ax.set_yticks(range(len(groups)), names)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_xlabel("drift with JEPA / without")
    ax.locator_params(axis="x", nbins=5)
    return figure, ("Mean drift over blocks of a JEPA run over that of the plain run with the same "
                    "seed. Dots are seeds, markers their geometric mean, lines its 95 % interval.")


def scatter(study: Study):
    every, said = most_runs(study.probed, NO_PROBE)
    last = by_arm(last_of_each(every))

    def correlation(runs):
        r, low, high = pearson(list(runs["mean_drift"]), list(runs["forgetting"]))
        words = "" if math.isnan(low) else f", r = {r:+.2f} [{low:+.2f}, {high:+.2f}]"
        return f"n = {len(runs)}{words}"
    figure, axes_of = clouds(last, "mean_drift", "forgetting", correlation)
    for (arm, _), path in every.sort_values("step").groupby(["arm", "run"], sort=False):
        axes_of[arm].plot(path["mean_drift"], path["forgetting"], color=style_of(arm)["color"],
                          linewidth=0.5, alpha=0.6, marker=".", markersize=2.5)
    for ax in set(axes_of.values()):
        line_at(ax)
    name_axes(figure, "mean drift over blocks", "forgetting: loss minus base")
    return figure, (f"Drift against forgetting, {said} A marker is the end of a run, small dots "
                    f"are its earlier checkpoints, grey ones the other arms. Pearson's r of the n "
                    f"ends, with its 95 % interval.")


def front(study: Study):
    """Set accuracy against forgetting, by the probe, or without one by the runs' held-out loss."""
    found, last = scored(study.results), last_of_each(study.probed)
    if len(last):
        loss_of = dict(zip(last["run"], last["forgetting"]))
        found = found.assign(forgetting=found["run"].map(loss_of).astype(float))
    found = found.dropna(subset=["forgetting"])
    if found.empty:
        raise ValueError("it takes results.jsonl with losses of another corpus (forget_task), or "
                         "a probe.json of the same runs")
    found = found[found["config"] == found["config"].mode()[0]]
    found = by_arm(found[found["n_shot"] == found["n_shot"].mode()[0]])
    figure, axes_of = clouds(found, "forgetting", "accuracy", lambda runs: f"n = {len(runs)}")
    best = pareto(found[["forgetting", "accuracy"]].itertuples(index=False, name=None))
    for ax in set(axes_of.values()):
        ax.step(*zip(*best), where="post", color="black", linewidth=0.8, zorder=1)
    name_axes(figure, "forgetting: loss minus base (less is better)", "accuracy, %")
    return figure, (f"Accuracy against forgetting, {found['n_shot'].iloc[0]}-shot, "
                    f"{short(found['config'].iloc[0], 40)}: {questions_of(found)}. Markers are "
                    f"runs, grey ones those of the other arms; no run is better in both than those "
                    f"on the black line.")


def pareto(points) -> list[tuple]:
    """Keep the (forgetting, accuracy) that none beats in both, in order of forgetting."""
    best = []
    for loss, right in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or right > best[-1][1]:
            best.append((loss, right))
    return best


FIGURES = {"ablation": ablation, "accuracy": accuracy, "loss": loss, "kept": kept,
           "sensitivity": sensitivity, "training": training, "drift": drift, "ratio": ratio,
           "scatter": scatter, "front": front}


if __name__ == "__main__":
    run(main, PlotConfig)
