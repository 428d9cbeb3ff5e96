"""Write statistics as text for tables and pages: means, intervals, shares, p."""
import math
import statistics

from analysis.arms import label
from analysis.effects import Effect, Share, effect_of

NOT_RUN, NOT_BOUNDED = "not run", "not bounded"


def minus(first: str, second: str) -> str:
    """Write a difference of two arms; a label with a comma stands in brackets."""
    names = (label(arm) for arm in (first, second))
    return " - ".join(f"({name})" if "," in name else name for name in names)


def spread(values, form: str = ".2f") -> str:
    """Write mean and standard deviation of one number a seed."""
    values = [value for value in values if not math.isnan(value)]
    if len(values) < 2:
        return f"{values[0]:{form}} (n = 1)" if values else NOT_RUN
    sd = statistics.stdev(values)
    return f"{statistics.mean(values):{form}} (sd {sd:{form.strip('+')}}, n = {len(values)})"


def in_words(found: Effect, form: str = "+.1f") -> str:
    """Write a mean, and from three seeds up half of its 95 % interval."""
    half = "" if math.isnan(found.half) else f" +- {found.half:{form.strip('+')}}"
    return f"{found.mean:{form}}{half}"


def interval(values, form: str = "+.2f") -> str:
    """Write the mean of paired differences, or an Effect, with its interval and n."""
    found = values if isinstance(values, Effect) else effect_of(values)
    return f"{in_words(found, form)} (n = {found.n})" if found.n else "-"


def ends_of(found: Effect, form: str = "+.1f") -> str:
    """Write both ends of an interval."""
    return f"[{found.mean - found.half:{form}}, {found.mean + found.half:{form}}]"


def with_ends(found, form: str = ".2f") -> str:
    """Write (value, low, high); the ends are nan where there is no interval."""
    value, low, high = found
    return f"{value:{form}}" + ("" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def share_in_words(share: Share) -> str:
    """Write a share in % with both ends; without ends its value alone would say nothing."""
    value, low, high = (100 * each for each in share)
    if math.isnan(value):
        return "-"
    return NOT_BOUNDED if math.isnan(low) else f"{round(value)} % [{round(low)}, {round(high)}]"


def p_in_words(p: float) -> str:
    """Write a p, nan as a dash."""
    return "-" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def p_is(p: float) -> str:
    """Write a p as part of a sentence."""
    return f"p {p_in_words(p)}" if p < 1e-4 else f"p = {p_in_words(p)}"


def pooled_in_words(fit, form: str) -> str:
    """Say what a pooled analysis finds of all arms together."""
    halves = [fit.difference(a, b).half for a in fit.arms for b in fit.arms if a < b]
    low, high = (f"{end:{form.strip('+')}}" for end in (min(halves), max(halves)))
    return (f"Pooled: {len(fit.arms)} arms x {fit.n_blocks} blocks, residual sd "
            f"{fit.sd:{form.strip('+')}} ({fit.df} df); two arms: +- {low}"
            f"{f' to {high}' * (low != high)}; all arms: F = {fit.ratio:.2f}, "
            f"{p_is(fit.p)}.")
