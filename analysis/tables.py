"""The paper's tables with our numbers beside them, in markdown, from the results on file.

    python analysis/tables.py --results=out/grid/results.jsonl

Scores are in %, as mean (sd) over n seeds, ddof = 1. A +- is half of a 95 % interval by Student's
t, from three seeds up. Differences are paired by seed, their p is Student's t; Holm's is adjusted
for all arms of a table. "p, questions" is McNemar's exact test within each seed: seeds answer the
same questions, so they are not pooled. An arm is compared with the plain arm of its own diffusion
rate. (lambda, k), weight and depth, are JEPA's best on validation, and the other arms are shown
there too: nothing is chosen on test. Losses are of held-out rows.
"""
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules are one folder up

from configurator import printable, run  # first: it sets variables that torch reads

import pandas as pd

from analysis.arms import AT_RATES, label, plain_of, rank_of
from analysis.frames import (at_chosen, frame_of, pairs_of, read_results, read_summaries,
                             run_of)
from tasks.answers import read_common
from tasks.stats import half_95, holm, mcnemar, t_test

NOT_RUN, NOT_GIVEN = "not run", "not given"

# arXiv 2606.00091 as notes and a review quote it, in %: config -> arm -> 0-shot, 4-shot
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


@dataclass
class TablesConfig:
    results: tuple[str, ...] = ("out/grid/results.jsonl",)  # of grid.py, separated by commas
    preserve: tuple[str, ...] = ()      # summary.json files of preserve.py

    def __post_init__(self):
        if not self.results and not self.preserve:
            raise ValueError("results is empty; name results.jsonl files of grid.py, separated by "
                             "commas")


class Table(NamedTuple):
    name: str
    cells: pd.DataFrame                 # of text, without an index
    note: str = ""                      # a line below it


def main(cfg: TablesConfig):
    print(render(read_results(cfg.results), read_summaries(cfg.preserve)))


def render(lines: list[dict], summaries=()) -> str:
    """Write all tables as markdown, below what their numbers mean."""
    parts = [__doc__.split("\n\n")[2].strip()]
    for table in tables_of(frame_of(lines), summaries):
        header = list(table.cells.columns)
        rows = [header, ["---"] * len(header), *table.cells.map(as_cell).values.tolist()]
        parts.append(f"## {as_cell(table.name)}")
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
        parts += [table.note] * bool(table.note)
    return "\n\n".join(parts)


def as_cell(text: str) -> str:
    """Return a text as it can stand in a cell: in one line, without a bar of its own."""
    return printable(text).replace("\n", " ").replace("|", "\\|")


def tables_of(results: pd.DataFrame, summaries=()) -> list[Table]:
    """Make all tables of a frame of results and of the summary.json files of preserve.py.

    Configs that have been run come first, then those that the paper alone has.
    """
    best = at_chosen(results)
    ours = list(dict.fromkeys(best["config"]))
    configs = [*ours, *(config for config in PUBLISHED if config not in ours)]
    shots = list(dict.fromkeys([4, 0, *sorted(best["n_shot"])]))
    tables = [main_table(best, configs, n_shot) for n_shot in shots]

    rates, ablated = {}, {}             # {config: arms}
    for config in configs:
        arms = {*best["arm"][best["config"] == config], *PUBLISHED.get(config, ())}
        rates[config] = [arm for arm in AT_RATES if arm in arms]
        others = arms.difference(AT_RATES, ("base", "plain", "jepa"))
        ablated[config] = sorted(others, key=rank_of)
    rates = {config: [*arms, "jepa"] for config, arms in rates.items() if arms}
    ablated = {config: ["plain", *arms, "jepa"] for config, arms in ablated.items() if arms}
    tables += [beside(best, "Sensitivity to the rates (JEPA: its config's)", rates),
               beside(best, "Ablation (~: the paper has the gain)", ablated)]
    tables += [controls(best, config, n_shot) for config in ablated for n_shot in shots
               if len(tested(best, config, "jepa", n_shot)) > 1]
    tables.append(preservation(best, summaries))
    return [table for table in tables if len(table.cells)]


def tested(results: pd.DataFrame, config: str, arm: str, n_shot: int) -> pd.DataFrame:
    """Select an arm's results on test, one a seed, with the seeds as index."""
    found = results[(results["config"] == config) & (results["arm"] == arm)
                    & (results["n_shot"] == n_shot) & (results["split"] == "test")]
    return found.set_index("seed").sort_index()


def table(name: str, header: str, rows: list[list[str]], note: str = "") -> Table:
    return Table(name, pd.DataFrame(rows, columns=header.split(" | "), dtype=object), note)


def main_table(best, configs: list[str], n_shot: int) -> Table:
    rows, at_shot = [], best[best["n_shot"] == n_shot]
    for config in configs:
        paper = [published(config, arm, n_shot) for arm in ("plain", "jepa")]
        if config not in set(at_shot["config"]) and paper[1] == NOT_GIVEN:
            continue
        base, plain, jepa = (tested(best, config, arm, n_shot) for arm in ("base", "plain", "jepa"))
        n = sorted({*base["n"], *plain["n"], *jepa["n"]})
        starts = set(best["init_from"][best["config"] == config])
        before = "".join(f"{score:.2f}" for score in base["accuracy"]) or NOT_RUN
        gain = gain_of(best, config, "jepa", n_shot)
        rows.append([config, " / ".join(map(str, n)) or NOT_RUN,
                     "from scratch" if starts == {""} else before,
                     spread(plain["accuracy"]), spread(jepa["accuracy"]), pair_in_words(jepa),
                     interval(gain), p_in_words(p_of(gain)), by_question(plain, jepa), *paper])
    return table(f"{'Main table, ' * (n_shot == 4)}{n_shot}-shot",
                 "config | questions | base | plain | JEPA | lambda, k | JEPA - plain | p, seeds | "
                 "p, questions | paper: plain | paper: JEPA", rows)


def beside(best, name: str, arms: dict) -> Table:
    """Set arms beside the paper's; arms is {config: its arms, one a row}."""
    rows = []
    for config, arm in ((config, arm) for config in arms for arm in arms[config]):
        runs = {n_shot: tested(best, config, arm, n_shot) for n_shot in (0, 4)}
        rows.append([config, label(arm), pair_in_words(pd.concat(runs.values()))])
        for n_shot, own in runs.items():
            rows[-1] += [spread(own["accuracy"]), interval(gain_of(best, config, arm, n_shot)),
                         published(config, arm, n_shot)]
    return table(name, "config | arm | lambda, k | 0-shot | - plain | paper | 4-shot | - plain | "
                 "paper", rows)


def controls(best, config: str, n_shot: int) -> Table:
    """Compare each arm with its plain, and JEPA with each arm; Holm's p is over all the latter."""
    found = best[(best["config"] == config) & (best["n_shot"] == n_shot)
                 & (best["split"] == "test") & (best["arm"] != "base")]
    means = found.groupby("arm")["accuracy"].mean().sort_values(ascending=False, kind="stable")
    lead = {arm: gain_of(best, config, "jepa", n_shot, over=arm) for arm in means.index}
    p = {arm: p_of(values) for arm, values in lead.items()}
    adjusted = holm({arm: value for arm, value in p.items() if not math.isnan(value)})
    rows = []
    for arm in means.index:
        own = tested(best, config, arm, n_shot)
        gain = gain_of(best, config, arm, n_shot)
        grown = gain_of(best, config, arm, n_shot, column="other")
        rows.append([label(arm), spread(own["accuracy"]), interval(gain), p_in_words(p_of(gain)),
                     interval(lead[arm]), p_in_words(p[arm]),
                     p_in_words(adjusted.get(arm, math.nan)),
                     *(spread(own[loss], ".3f") for loss in ("low_t", "high_t", "other")),
                     interval(grown, "+.3f")])
    note, effects = "", [gain_of(best, config, arm, n_shot) for arm in ("jepa", "jepa_uniform")]
    values = (effects[0] - effects[1]).dropna()
    if len(values):
        note = (f"(JEPA - plain) - (JEPA - plain, both with t ~ U(0, 1)) = {interval(values)}, p = "
                f"{p_in_words(p_of(values))}")
    return table(f"Controls: {config}, {n_shot}-shot",
                 "arm | score | - plain | p | JEPA - arm | p | p, Holm | loss at least t | "
                 "at greatest t | other corpus | - plain", rows, note)


def preservation(best, summaries) -> Table:
    """Set what was kept beside the paper's. A model of a grid is an arm of a config."""
    of_run = dict(zip(best["run"], zip(best["config"], best["arm"])))
    wide_t = "llada8b_gsm8k_wide_t"
    models, counted = {(wide_t, arm): [] for arm in PRESERVED}, set()
    for summary in summaries:
        for name, scores in summary["models"].items():
            if name in counted:         # the base of several summaries
                continue
            counted.add(name)
            keys = [of_run.get(run_of(name), (name, "-"))]
            if name == summary["settings"]["base"]:
                starts = set(best["config"][best["init_from"] == name]) or {name}
                keys = [(config, "base") for config in sorted(starts)]
            for key in keys:
                models.setdefault(key, []).append(scores)
    rows = []
    for (config, arm), found in models.items():
        paper = PRESERVED.get(arm) if config == wide_t else None
        loss, mmlu = paper or (NOT_GIVEN, NOT_GIVEN)
        losses = [scores["wikitext"]["minus_base"] for scores in found]
        shares = [100 * scores["mmlu"]["accuracy"] for scores in found]
        rows.append([config, label(arm), spread(losses, "+.4f"), loss, spread(shares), mmlu])
    return table("Base preservation", "config or model | arm | Wikitext loss minus base | paper | "
                 "MMLU | paper", rows)


def published(config: str, arm: str, n_shot: int) -> str:
    both = PUBLISHED.get(config, {}).get(arm, (NOT_GIVEN, NOT_GIVEN))
    return {0: both[0], 4: both[1]}.get(n_shot, NOT_GIVEN)


def pair_in_words(runs: pd.DataFrame) -> str:
    return "{:g}, {}".format(*pairs_of(runs)[0]) if len(runs) else NOT_RUN


def spread(values, form: str = ".2f") -> str:
    """Write mean and standard deviation of one number a seed."""
    values = [value for value in values if not math.isnan(value)]
    if len(values) < 2:
        return f"{values[0]:{form}} (n = 1)" if values else NOT_RUN
    sd = statistics.stdev(values)
    return f"{statistics.mean(values):{form}} (sd {sd:{form.strip('+')}}, n = {len(values)})"


def gain_of(best, config: str, arm: str, n_shot: int, over: str = "", column: str = "accuracy"):
    """Subtract another arm, or else its plain, from an arm, for each seed that both have."""
    over = over or plain_of(arm)
    if arm == over:
        return pd.Series(dtype=float)
    own, other = (tested(best, config, name, n_shot)[column] for name in (arm, over))
    return (own - other).dropna()


def interval(values, form: str = "+.2f") -> str:
    """Write the mean, and from three seeds up half of its 95 % interval."""
    values = list(values)
    half = f" +- {half_95(values):{form.strip('+')}}" if len(values) > 2 else ""
    return f"{statistics.mean(values):{form}}{half} (n = {len(values)})" if values else "-"


def p_of(values) -> float:
    """Return the p of a mean difference, by Student's t; nan for fewer than two values."""
    n, values = len(values), list(values)
    if n < 2:
        return math.nan
    return t_test(statistics.mean(values), statistics.stdev(values) / math.sqrt(n), n - 1)


def p_in_words(p: float) -> str:
    return "-" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def by_question(first, second) -> str:
    """Write McNemar's p in each seed that both have and whose answers are on file."""
    seeds, said = first.index.intersection(second.index), []
    for seed in seeds:
        paths = [runs.loc[seed, "answers"] for runs in (first, second)]
        if all(Path(path).is_file() for path in paths):
            (a, b), _ = read_common(paths)
            p = mcnemar(sum(a[id] > b[id] for id in a), sum(a[id] < b[id] for id in a))
            said.append(f"{seed}: {p_in_words(p)}")
    return ", ".join(said) or ("no answers on file" if len(seeds) else NOT_RUN)


if __name__ == "__main__":
    run(main, TablesConfig)
