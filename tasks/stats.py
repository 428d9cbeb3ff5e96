"""What n answers allow to say: intervals, paired differences, means over seeds.

An accuracy p of n questions has the standard error sqrt(p (1 - p) / n): how far another draw of
questions would move it. Two models that were asked the same questions are compared question by
question, which is sharper than two intervals side by side: what both get right or both get wrong
cancels. Neither says anything about another seed of training, which only more runs can tell.
"""
import math
import statistics

import numpy as np

Z = 1.959963984540054       # a normal distribution has 95 % within so many standard deviations
# two-sided 95 % of Student's t with 1, 2, ... degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
       2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share right / n by Wilson (1927): all shares from which it is at most
    Z of *their* standard errors away. At 0 of n it still has a width, unlike p +- Z stderr."""
    p, spread = right / n, Z * Z / n
    half = Z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    low, high = ((p + spread / 2 + side) / (1 + spread) for side in (-half, half))
    return low if right else 0.0, high if right < n else 1.0


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p: of the questions that one model alone gets right, how likely a
    fair coin would give them to the two as unevenly as this, or more so."""
    n, term, tail = only_first + only_second, 1, 1
    for i in range(min(only_first, only_second)):
        term = term * (n - i) // (i + 1)            # n over i + 1
        tail += term
    return min(1.0, 2 * tail / 2 ** n)              # whole numbers: exact for any n


def bootstrap(differences, n_resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean when the questions are drawn anew, with replacement.

    How often each *value* is drawn is multinomial, so that no question has to be drawn by itself.
    """
    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    n = counts.sum()
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, n_resamples)
    low, high = np.quantile(drawn @ values / n, (0.025, 0.975))
    return float(low), float(high)


def paired_difference(first: dict, second: dict) -> dict:
    """{id: verdict} of two models -> how much more often the second is right, over questions.

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


def over_seeds(accuracies: list[float]) -> dict:
    """Mean and spread of runs that differ in their seed. Raises ValueError for fewer than two."""
    n = len(accuracies)
    if n < 2:
        raise ValueError(f"{n} run has no spread; give two or more")
    mean = math.fsum(accuracies) / n
    squares = math.fsum((accuracy - mean) ** 2 for accuracy in accuracies)
    sd = math.sqrt(squares / (n - 1))
    return {"n": n, "mean": mean, "sd_ddof1": sd, "sd_ddof0": math.sqrt(squares / n),
            "stderr": sd / math.sqrt(n), "min": min(accuracies), "max": max(accuracies)}


def half_95(values) -> float:
    """Half of the 95 % interval of a mean over seeds, by Student's t; nan for fewer than three."""
    n = len(values)
    if n < 3:
        return math.nan
    t = T95[n - 2] if n - 2 < len(T95) else Z + 2.5 / (n - 1)
    return t * statistics.stdev(values) / math.sqrt(n)


def t_test(mean: float, stderr: float, df: int) -> float:
    """Two-sided p of mean / stderr under Student's t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    if not stderr:
        return math.nan                 # the same difference each time, if of few seeds or few rows
    angle = math.atan(abs(mean) / stderr / math.sqrt(df))
    term = total = math.cos(angle) if df % 2 else 1.0
    for k in range(2 + df % 2, df, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    total *= math.sin(angle)
    return 1 - (2 / math.pi * (angle + total * (df > 1)) if df % 2 else total)


def holm(p_values: dict) -> dict:
    """{name: p} -> {name: p as if it were the only one}, after Holm (1979): the smallest is
    multiplied by how many there are, the next by one less, and so on, never below one before."""
    adjusted, at_least = {}, 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.get)):
        at_least = max(at_least, min(1.0, p_values[name] * (len(p_values) - i)))
        adjusted[name] = at_least
    return adjusted


def in_words(difference: dict, first: str, second: str) -> str:
    """A paired_difference as three lines of at most 100 columns, if the two names are short."""
    low, high = (100 * end for end in difference["interval"])
    p = "< 0.0001" if difference["p"] < 1e-4 else f"= {difference['p']:.2g}"
    return (f"{second} - {first} = {100 * difference['mean']:+.1f} +- "
            f"{100 * difference['stderr']:.1f} points, paired over n = {difference['n']} "
            f"questions\n"
            f"    95 % interval {low:+.1f} .. {high:+.1f} (bootstrap); McNemar's exact p {p}\n"
            f"    right: both {difference['both']}, only {first} {difference['only_first']}, only "
            f"{second} {difference['only_second']}, neither {difference['neither']}")
