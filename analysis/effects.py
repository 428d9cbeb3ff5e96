"""Differences between the arms of a study: paired by seed, and pooled over all arms and seeds.

A block is a seed: all arms of a seed share its base and batches. The paired interval of two arms
uses these two alone, by Student's t over the blocks that both have. The pooled analysis
is that of randomised blocks, outcome = arm + block + noise, by least squares over all arms: where
cells are missing it uses those that are there. It assumes one sd of the noise for all arms, which
it then knows from far more runs: with ten arms and five seeds from 36 degrees of freedom and not 4.

An outcome is a column of frames.frame_of, such as `accuracy` or `t = 0.2`.
"""
import math
import statistics
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.arms import plain_of, rank_of
from analysis.checks import name_of_base
from analysis.frames import last_of_each
from tasks.stats import f_test, half_95, holm, share_95, t_95, t_test


class Share(NamedTuple):
    """A ratio of two means and the ends of its 95 % interval, after Fieller; see share_95."""
    value: float                        # nan where there is no pair, or the whole is 0
    low: float                          # nan where the interval has no two ends
    high: float


class Effect(NamedTuple):
    """A mean difference, half of its 95 % interval, its p (two-sided), and over how many pairs."""
    mean: float
    half: float                         # nan for fewer than three pairs
    p: float                            # nan for fewer than two, or where all are equal
    n: int


def effect_of(values) -> Effect:
    """Return the mean of paired differences with its interval, by Student's t."""
    values = [float(value) for value in values if not math.isnan(value)]
    n, mean = len(values), statistics.mean(values) if len(values) else math.nan
    if n < 2:
        return Effect(mean, math.nan, math.nan, n)
    return Effect(mean, half_95(values),
                  t_test(mean, statistics.stdev(values) / math.sqrt(n), n - 1), n)


def tested(results: pd.DataFrame, config: str, arm: str, n_shot: int) -> pd.DataFrame:
    """Select an arm's results on test, one a seed, with the seeds as index."""
    found = results[(results["config"] == config) & (results["arm"] == arm)
                    & (results["n_shot"] == n_shot) & (results["split"] == "test")]
    return found.set_index("seed").sort_index()


def arms_of(results: pd.DataFrame, config: str, n_shot: int) -> list[str]:
    """Return the arms that have test scores, in the order of ARMS; the base is none."""
    found = results[(results["config"] == config) & (results["n_shot"] == n_shot)
                    & (results["split"] == "test") & (results["arm"] != "base")]
    return sorted(found["arm"].unique(), key=rank_of)


def gain_of(results, config: str, arm: str, n_shot: int, over: str = "",
            outcome: str = "accuracy") -> pd.Series:
    """Subtract another arm, or else its plain, from an arm, for each seed that both have."""
    over = over or plain_of(arm)
    if arm == over:
        return pd.Series(dtype=float)
    own, other = (tested(results, config, name, n_shot)[outcome] for name in (arm, over))
    return (own - other).dropna()


def cells_of(results, config: str, n_shot: int, outcome: str) -> pd.DataFrame:
    """Return an outcome on test as a table: a row a seed, a column an arm in the order of ARMS."""
    found = results[(results["config"] == config) & (results["n_shot"] == n_shot)
                    & (results["split"] == "test") & (results["arm"] != "base")]
    cells = found.pivot(index="seed", columns="arm", values=outcome).dropna(axis=1, how="all")
    return cells[sorted(cells, key=rank_of)].astype(float)


def effects(cells: pd.DataFrame) -> tuple[dict, dict]:
    """Return {arm: Effect} of each arm minus its plain, and of JEPA minus each arm."""
    def difference(first, second):
        known = first != second and {first, second} <= set(cells)
        return effect_of(cells[first] - cells[second] if known else [])
    return ({arm: difference(arm, plain_of(arm)) for arm in cells},
            {arm: difference("jepa", arm) for arm in cells})


def holm_of(found: dict[str, Effect]) -> dict[str, float]:
    """Adjust the p of a family {name: Effect} together; those without a p are not in it."""
    return holm({name: effect.p for name, effect in found.items() if not math.isnan(effect.p)})


# ----------------------------------------------------------------------------------------------
# randomised blocks


@dataclass
class Pooled:
    """One analysis of all arms: value = arm + block + noise."""
    arms: list[str]
    fit: np.ndarray                     # (A,) of each arm, in the first block
    inverse: np.ndarray                 # (A, A) the covariance of fit, over the noise's variance
    sd: float                           # of the noise
    df: int
    ratio: float                        # F of all arms together, and its p
    p: float
    n_blocks: int

    def difference(self, first: str, second: str) -> Effect:
        """Return first - second; n is the number of blocks."""
        contrast = np.zeros(len(self.arms))
        contrast[self.arms.index(first)] += 1
        contrast[self.arms.index(second)] -= 1
        error = self.sd * math.sqrt(contrast @ self.inverse @ contrast)
        mean = float(contrast @ self.fit)
        return Effect(mean, t_95(self.df) * error, t_test(mean, error, self.df), self.n_blocks)


def pooled(cells: pd.DataFrame, plain: str = "plain"):
    """Fit arms and blocks to the runs of the arms that are compared with `plain` -> Pooled.

    None for fewer than three arms, which are a paired comparison, or where the blocks do not link
    all arms, or where nothing is left to estimate the noise from.
    """
    arms = [arm for arm in cells if plain_of(arm) == plain]
    runs = [(block, arm, value) for arm in arms for block, value in cells[arm].dropna().items()]
    blocks, n = sorted({block for block, _, _ in runs}), len(runs)
    df = n - len(arms) - len(blocks) + 1
    if len(arms) < 3 or df < 1:
        return None
    design = np.zeros((n, len(arms) + len(blocks) - 1))     # the first block is the reference
    for row, (block, arm, _) in zip(design, runs):
        row[arms.index(arm)] = 1
        if block != blocks[0]:
            row[len(arms) + blocks.index(block) - 1] = 1
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    y = np.array([value for _, _, value in runs])
    inverse = np.linalg.inv(design.T @ design)
    fit = inverse @ design.T @ y
    noise = float(((y - design @ fit) ** 2).sum())
    means = cells[arms].mean(axis=1)
    by_block = np.array([means[block] for block, _, _ in runs])
    without_arms = float(((y - by_block) ** 2).sum())
    if noise <= 1e-20 * max(1.0, float(y @ y)):             # rounding
        noise = 0.0
    ratio = (without_arms - noise) / (len(arms) - 1) / (noise / df) if noise else math.nan
    p = f_test(max(0.0, ratio), len(arms) - 1, df) if noise else math.nan
    k = len(arms)
    return Pooled(arms, fit[:k], inverse[:k, :k], math.sqrt(noise / df), df, ratio, p, len(blocks))


# ----------------------------------------------------------------------------------------------
# shares: how much of the base's score, or of JEPA's gain, an arm has


def scores_of_bases(results, config: str, n_shot: int) -> dict[str, float]:
    """Return {name of the base: accuracy} of the untrained models of a config."""
    bases = tested(results, config, "base", n_shot)
    return dict(zip(bases["init_from"].map(name_of_base), bases["accuracy"]))


def starts_of(results, config: str, arm: str, n_shot: int) -> pd.Series:
    """Return the score of each run's own base, by seed; nan where that was not scored."""
    runs = tested(results, config, arm, n_shot)
    scores = scores_of_bases(results, config, n_shot)
    return runs["init_from"].map(name_of_base).map(scores).astype(float)


def loses(results, config: str, n_shot: int) -> bool:
    """Return whether plain tuning has a worse score than its bases."""
    return bool(lost_by_plain(results, config, n_shot).mean() > 0)


def lost_by_plain(results, config: str, n_shot: int) -> pd.Series:
    """Return base - plain in accuracy, by seed."""
    plain = tested(results, config, "plain", n_shot)["accuracy"]
    return starts_of(results, config, "plain", n_shot) - plain


def kept_by(results, config: str, arm: str, n_shot: int) -> Share:
    """Return the share of what plain loses of its base's score that an arm keeps: (arm - plain) /
    (base - plain), pairs by seed."""
    return share_of(gain_of(results, config, arm, n_shot, over="plain"),
                    lost_by_plain(results, config, n_shot))


def of_jepas_gain(results, config: str, arm: str, n_shot: int) -> Share:
    """Return an arm's gain over plain as a share of JEPA's."""
    return share_of(*(gain_of(results, config, name, n_shot) for name in (arm, "jepa")))


def share_of(part: pd.Series, whole: pd.Series) -> Share:
    """Divide the mean of part by that of whole, over the seeds that both have."""
    both = pd.concat([part, whole], axis=1, join="inner").dropna()
    return Share(*share_95(*(list(both.iloc[:, column]) for column in (0, 1))))


# ----------------------------------------------------------------------------------------------
# the mechanism: drift, forgetting, views


def drift_ratios(probed: pd.DataFrame, arms) -> pd.DataFrame:
    """Pair each last checkpoint of these arms with the plain one of its config and seed: log_ratio
    of their mean drifts. Raises ValueError where a model has not moved."""
    runs = last_of_each(probed)
    both = runs[runs["arm"].isin(arms)].merge(runs[runs["arm"] == "plain"], on=["config", "seed"],
                                              suffixes=("", "_plain"))
    if both.empty:
        return both
    if not (both[["mean_drift", "mean_drift_plain"]] > 0).all(axis=None):
        raise ValueError("it takes runs that have moved: a probe.json has a mean drift of 0")
    both["log_ratio"] = np.log((both["mean_drift"] / both["mean_drift_plain"]).astype(float))
    return both


def views_of(log: pd.DataFrame, config: str, name: str) -> list[tuple]:
    """Return (step, values over JEPA's runs) of a correlation of views, first and last in the logs.

    corr_views is of the two views of a row, corr_same_rate of two at the target's rate, corr_others
    of different rows.
    """
    runs = log[(log["config"] == config) & (log["arm"] == "jepa")].dropna(subset=[name])
    steps = sorted(runs["step"].unique())
    return [(int(step), list(runs[name][runs["step"] == step].astype(float)))
            for step in dict.fromkeys(steps[:1] + steps[-1:])]
