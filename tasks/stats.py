"""Statistics of answers and of runs: intervals, paired differences, means over seeds.

An accuracy p of n questions has the standard error sqrt(p (1 - p) / n): how far another draw of
questions would move it. Two models that were asked the same questions are compared question by
question. That is sharper than two intervals side by side, because what both get right or both get
wrong cancels. Neither says anything about another seed of training: only more runs can.
"""
import math
import statistics
from functools import lru_cache

import numpy as np

Z = 1.959963984540054       # a normal distribution has 95 % within this many standard deviations


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return Wilson's (1927) 95 % interval of a share right / n.

    It holds all shares from which right / n is at most Z of *their* standard errors away. At 0 of n
    it still has a width, unlike p +- Z stderr. Raises ValueError if right / n is no share.
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} of {n} is not a share")
    p, spread = right / n, Z * Z / n
    half = Z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    low, high = ((p + spread / 2 + side) / (1 + spread) for side in (-half, half))
    return low if right else 0.0, high if right < n else 1.0


def mcnemar(only_first: int, only_second: int) -> float:
    """Return McNemar's exact two-sided p of two models on the same questions.

    Of the questions that one model alone gets right: how likely a fair coin would divide them
    between the two models as unevenly as this, or more so.
    """
    n, term, tail = only_first + only_second, 1, 1
    for i in range(min(only_first, only_second)):
        term = term * (n - i) // (i + 1)            # n over i + 1
        tail += term
    return min(1.0, 2 * tail / 2 ** n)              # integers: exact for any n


def bootstrap(differences, n_resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over resampled questions.

    How often each *value* is drawn is multinomial, so questions are not drawn one by one. Raises
    ValueError for no differences, or for one that is not finite.
    """
    check_finite(differences)
    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    n = counts.sum()
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, n_resamples)
    low, high = np.quantile(drawn @ values / n, (0.025, 0.975))
    return float(low), float(high)


def check_finite(values):
    """Raise ValueError if there are no values, or if one is nan or infinite."""
    bad = [value for value in values if not math.isfinite(value)]
    if bad or not len(values):
        raise ValueError(f"{bad[0]} is not a number to average" if bad else "there are no values")


def paired_difference(first: dict, second: dict) -> dict:
    """Compare {id: verdict} of two models: how much more often the second is right.

    stderr is the standard deviation (ddof = 0) of the differences over sqrt(n). Raises ValueError
    unless both have answered the same questions.
    """
    if first.keys() != second.keys() or not first:
        raise ValueError(f"{len(first)} and {len(second)} answers are not to the same questions, "
                         f"so they cannot be compared in pairs")
    differences = [int(second[id]) - int(first[id]) for id in first]
    n, mean = len(differences), sum(differences) / len(differences)
    both = sum(first[id] and second[id] for id in first)
    only_first, only_second = differences.count(-1), differences.count(1)
    return {"mean": mean, "stderr": math.sqrt(((only_first + only_second) / n - mean ** 2) / n),
            "interval": bootstrap(differences), "p": mcnemar(only_first, only_second), "n": n,
            "both": both, "only_first": only_first, "only_second": only_second,
            "neither": n - both - only_first - only_second}


def in_words(difference: dict, first: str, second: str) -> str:
    """Write a paired_difference as three lines of at most 100 columns, if the names are short."""
    low, high = (100 * end for end in difference["interval"])
    p = "< 0.0001" if difference["p"] < 1e-4 else f"= {difference['p']:.2g}"
    return (f"{second} - {first} = {100 * difference['mean']:+.1f} +- "
            f"{100 * difference['stderr']:.1f} points, paired over n = {difference['n']} "
            f"questions\n"
            f"    95 % interval {low:+.1f} .. {high:+.1f} (bootstrap); McNemar's exact p {p}\n"
            f"    right: both {difference['both']}, only {first} {difference['only_first']}, only "
            f"{second} {difference['only_second']}, neither {difference['neither']}")


def over_seeds(accuracies: list[float]) -> dict:
    """Return mean and spread over runs with several seeds. Raises ValueError for fewer than two, or
    for one that is not finite."""
    n = len(accuracies)
    if n < 2:
        raise ValueError(f"{n} run has no spread; give two or more")
    check_finite(accuracies)
    mean = math.fsum(accuracies) / n
    squares = math.fsum((accuracy - mean) ** 2 for accuracy in accuracies)
    sd = math.sqrt(squares / (n - 1))
    return {"n": n, "mean": mean, "sd_ddof1": sd, "sd_ddof0": math.sqrt(squares / n),
            "stderr": sd / math.sqrt(n), "min": min(accuracies), "max": max(accuracies)}


def half_95(values) -> float:
    """Return half of the 95 % interval of a mean, by Student's t; nan for fewer than 3 values, or
    if one is not finite."""
    n = len(values)
    if n < 3 or not all(map(math.isfinite, values)):
        return math.nan
    return t_95(n - 1) * statistics.stdev(values) / math.sqrt(n)


@lru_cache(maxsize=None)
def t_95(df: int) -> float:
    """Return the t at which t_test gives p = 0.05, by bisection."""
    low, high = 0.0, 13.0               # df = 1 has the greatest, 12.706
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_test(middle, 1.0, df) > 0.05 else (low, middle)
    return high


def t_test(mean: float, stderr: float, df: int) -> float:
    """Return the two-sided p of mean / stderr under Student's t; nan without a standard error, or
    if one of the two is nan.

    The formulas are Abramowitz and Stegun's 26.7.3 and 26.7.4. Raises ValueError for df < 1.
    """
    if df < 1:
        raise ValueError(f"Student's t has at least 1 degree of freedom, not {df}")
    if not stderr:
        return math.nan                 # the same difference each time
    angle = math.atan(abs(mean) / stderr / math.sqrt(df))
    term = total = math.cos(angle) if df % 2 else 1.0
    for k in range(2 + df % 2, df, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    inside = 2 / math.pi * (angle + total * (df > 1)) if df % 2 else total
    return max(1 - inside, 0.0)         # rounding; in this order nan stays nan


def f_test(ratio: float, df_above: int, df_below: int) -> float:
    """Return how likely Fisher's F is to exceed a ratio of two variances; nan for a ratio of nan.

    P(F > ratio) = I_x(df_below / 2, df_above / 2) at x = df_below / (df_below + df_above ratio).
    Raises ValueError for fewer than 1 degree of freedom or a negative ratio.
    """
    if min(df_above, df_below) < 1 or ratio < 0:
        raise ValueError(f"F has at least 1 and 1 degrees of freedom and a ratio from 0 up, not "
                         f"{df_above}, {df_below} and {ratio}")
    if math.isnan(ratio):
        return math.nan
    return beta_share(df_below / (df_below + df_above * ratio), df_below / 2, df_above / 2)


def beta_share(x: float, a: float, b: float) -> float:
    """Return I_x(a, b), the share of a beta distribution below x, by its continued fraction
    (DLMF 8.17.22), which converges fast on the left of the mean; the right is 1 - I_(1-x)(b, a)."""
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_share(1 - x, b, a)
    if not x:
        return 0.0
    fraction = 1.0
    for k in range(400, 0, -1):         # from the inside; 400 terms do for thousands of df
        m, is_odd = divmod(k, 2)
        term = -(a + m) * (a + b + m) if is_odd else m * (b - m)
        fraction = 1 + term * x / ((a + k - 1) * (a + k)) / fraction
    log_front = (a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a)
                 - math.lgamma(b))
    return math.exp(log_front) / a / fraction


def sd_ratio(first, second) -> tuple[float, float, float]:
    """Return sd(second) / sd(first) of pairs, and the ends of its 95 % interval, after Pitman and
    Morgan (1939).

    The interval has the ratios R at which second + R first and second - R first are not told to
    correlate: their covariance is var(second) - R^2 var(first). The ends are nan for fewer than
    three pairs, or where second does not vary; all is nan for fewer than two, or where first does
    not. ddof = 1.
    """
    n = len(first)
    if n < 2 or not statistics.stdev(first):
        return math.nan, math.nan, math.nan
    ratio = statistics.stdev(second) / statistics.stdev(first)
    if n < 3 or not ratio:
        return ratio, math.nan, math.nan
    rest = max(0.0, 1 - statistics.correlation(first, second) ** 2)
    k = 1 + 2 * t_95(n - 2) ** 2 * rest / (n - 2)
    factor = math.sqrt(k + math.sqrt(k * k - 1))
    return ratio, ratio / factor, ratio * factor


def share_95(part, whole) -> tuple[float, float, float]:
    """Return mean(part) / mean(whole) of pairs, and the ends of its 95 % interval, after Fieller.

    The interval has the shares r at which the mean of part - r whole is not told from 0. The ends
    are nan for fewer than three pairs, and if whole is not told from 0: then the
    shares that are not excluded have no two ends.
    """
    n, (x, y) = len(part), (np.asarray(values, dtype=float) for values in (part, whole))
    if not n or not y.mean():
        return math.nan, math.nan, math.nan
    share = float(x.mean() / y.mean())
    if n < 3:
        return share, math.nan, math.nan
    (xx, xy), (_, yy) = np.cov(x, y) * t_95(n - 1) ** 2 / n
    a, b, c = y.mean() ** 2 - yy, x.mean() * y.mean() - xy, x.mean() ** 2 - xx
    if a <= 0:
        return share, math.nan, math.nan
    root = math.sqrt(max(0.0, b * b - a * c))
    return share, float((b - root) / a), float((b + root) / a)


def pearson(x, y) -> tuple[float, float, float]:
    """Return r and the ends of its 95 % interval by Fisher's z; nan where they do not exist."""
    n = len(x)
    if n < 2 or len(set(x)) < 2 or len(set(y)) < 2:
        return math.nan, math.nan, math.nan
    r = statistics.correlation(x, y)
    if n < 4 or abs(r) >= 1:
        return r, math.nan, math.nan
    half = Z / math.sqrt(n - 3)
    return r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def holm(p_values: dict) -> dict:
    """Adjust {name: p} for the number of tests, after Holm (1979).

    The smallest p is multiplied by how many there are, the next by one less, and so on, and none
    may fall below the one before it. Raises ValueError for a p outside of 0..1, nan included.
    """
    if not all(0 <= p <= 1 for p in p_values.values()):
        raise ValueError(f"{p_values} are not all between 0 and 1")
    adjusted, at_least = {}, 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.get)):
        at_least = max(at_least, min(1.0, p_values[name] * (len(p_values) - i)))
        adjusted[name] = at_least
    return adjusted
