"""What the paper reports: arXiv 2606.00091 as notes and a review of its first version quote it.

Scores are texts in %, with ~ where they are derived: config -> arm -> 0-shot, 4-shot.
"""
import math
import re

NOT_GIVEN = "not given"

PUBLISHED = {
    "llada8b_gsm8k": {
        "plain": ("~39.5", "42.61"),            # main table; 0-shot: figure 3's gain, taken off
        "rates_0.1_0.5": ("43.59", "44.05"),    # the appendix's table of rates; seed 42
        "rates_0.2_0.5": ("42.00", "46.40"),
        "rates_0.3_0.9": ("40.11", "42.76"),
        "symmetric": ("38.9", "~42.5"),         # figure 3, ~ where it has the gain alone
        "no_predictor": ("~43.2", "44.4"),
        "jepa": ("44.88", "61.33")},            # the appendix's table of rates; main table
    "llada8b_gsm8k_wide_t": {                   # table 3, three seeds, ddof not stated
        "plain": ("65.23 (sd 0.93)", NOT_GIVEN), "l2": ("65.18 (sd 0.87)", NOT_GIVEN),
        "jepa": ("67.07 (sd 0.41)", NOT_GIVEN)},
    # main table: the best of 15 (lambda, depth)
    "llada8b_nl_rx": {"plain": (NOT_GIVEN, "47.50"), "jepa": (NOT_GIVEN, "58.20")},
    "llada8b_spider": {"plain": (NOT_GIVEN, "35.40"), "jepa": (NOT_GIVEN, "39.36")},
    "llada8b_django": {"plain": (NOT_GIVEN, "74.40"), "jepa": (NOT_GIVEN, "75.40")},
    "dream7b_gsm8k": {"plain": (NOT_GIVEN, "34.87"), "jepa": (NOT_GIVEN, "46.25")},
    "dream7b_nl_rx": {"plain": (NOT_GIVEN, "42.00"), "jepa": (NOT_GIVEN, "46.80")},
    "dream7b_spider": {"plain": (NOT_GIVEN, "20.89"), "jepa": (NOT_GIVEN, "25.15")},
    "dream7b_django": {"plain": (NOT_GIVEN, "69.58"), "jepa": (NOT_GIVEN, "72.35")},
}
PRESERVED = {       # table 3, of llada8b_gsm8k_wide_t: Wikitext loss minus the base's, MMLU in %
    "base": ("0.0000", "57.40"), "plain": ("-0.0004", "57.93 (sd 0.42)"),
    "l2": ("-0.0007 (sd 0.0002)", NOT_GIVEN), "jepa": ("-0.0017", "57.53 (sd 0.23)")}
# the paper has no score of a base: this is LLaDA's own report, by its own protocol
BASES = {"llada8b_gsm8k": (NOT_GIVEN, "70.3")}
# of the mechanism; the five cells of the ratio have no names that survive, r is of 10 runs
DRIFT_RATIO = "1.3 to 3.6"
LESS_FORGETTING = "43 to 58 % less, or down to that (the notes do not say)"
DRIFT_R = {"plain": "+0.94", "jepa": "+0.75"}
SD_OF_SEEDS = {"plain": "8.9", "jepa": "3.9"}       # llada8b_gsm8k, 4-shot


def published(config: str, arm: str, n_shot: int) -> str:
    """Return the paper's score of an arm as it is written there; arm may be the base."""
    scores = PUBLISHED.get(config, {}) | {"base": BASES.get(config, (NOT_GIVEN, NOT_GIVEN))}
    both = scores.get(arm, (NOT_GIVEN, NOT_GIVEN))
    return {0: both[0], 4: both[1]}.get(n_shot, NOT_GIVEN)


def published_number(config: str, arm: str, n_shot: int) -> float:
    """Return the paper's score as a number; nan where none is given."""
    found = re.match(r"~?([\d.]+)", published(config, arm, n_shot))
    return float(found[1]) if found else math.nan


def published_gain(config: str, n_shot: int) -> float:
    """Return the paper's JEPA - plain in points; nan where one of the two is not given."""
    return published_number(config, "jepa", n_shot) - published_number(config, "plain", n_shot)


def published_share(config: str, arm: str, n_shot: int, whole: str) -> float:
    """Return the paper's (arm - plain) / (whole - plain); whole is an arm or the base."""
    plain = published_number(config, "plain", n_shot)
    return (published_number(config, arm, n_shot) - plain) / (
        published_number(config, whole, n_shot) - plain)
