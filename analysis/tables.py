"""The paper's tables with our numbers beside them, in markdown, from the results on file.

    python analysis/tables.py --results=out/grid/results.jsonl --logs=out/grid

Scores are in %, as mean (sd) over n seeds, ddof = 1. A +- is half of a 95 % interval by Student's
t, from three seeds up. Differences are paired by seed, their p is Student's t and two-sided; Holm's
is adjusted for the numbers in its column, and a dash where there is one. "pooled" is of arms x
blocks, a block being a seed: one sd of the noise for all arms, estimated from all of their runs
(analysis/effects.py); where arms have different seeds its difference is not the paired one beside
it. "p, questions" is McNemar's exact test within each seed: seeds answer the same questions, so
they are not pooled. An arm is compared with the plain arm of its own diffusion rate. (lambda, k),
weight and depth, are JEPA's best on validation, and the other arms are shown there too: nothing is
chosen on test. Losses are of held-out rows.
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
from analysis.effects import (Effect, arms_of, cells_of, drift_ratios, effect_of, effects, gain_of,
                              holm_of, kept_by, loses, of_jepas_gain, pooled, scores_of_bases,
                              starts_of, tested, views_of)
from analysis.frames import (at_chosen, frame_of, last_of_each, losses_in, pairs_of, read_results,
                             read_study, read_summaries, run_of)
from analysis.keep import VERDICTS, differ, read_verdicts
from analysis.paper import (DRIFT_R, DRIFT_RATIO, LESS_FORGETTING, NOT_GIVEN, PRESERVED, PUBLISHED,
                            SD_OF_SEEDS, published, published_gain, published_share)
from analysis.words import (NOT_BOUNDED, NOT_RUN, ends_of, in_words, interval, minus, p_in_words,
                            p_is, pooled_in_words, share_in_words, spread, with_ends)
from tasks.answers import read_common
from tasks.stats import mcnemar, pearson, sd_ratio

MEANING = __doc__.split("\n\n")[2].strip()


@dataclass
class TablesConfig:
    results: tuple[str, ...] = ("out/grid/results.jsonl",)  # files of grid.py, or folders of them
    preserve: tuple[str, ...] = ()      # summary.json files of preserve.py
    logs: tuple[str, ...] = ()          # folders with log.jsonl and probe.json: drift, views
    arms: tuple[str, ...] = ()          # only these, as grid.py names them; empty: all
    configs: tuple[str, ...] = ()       # only these, by the names of their files; empty: all

    def __post_init__(self):
        if not self.results and not self.preserve:
            raise ValueError("results is empty; name results.jsonl files of grid.py, separated by "
                             "commas")


class Table(NamedTuple):
    name: str
    cells: pd.DataFrame                 # of text, without an index
    note: str = ""                      # a line below it


def main(cfg: TablesConfig):
    lines, summaries = read_results(cfg.results), read_summaries(cfg.preserve)
    for name, wanted in (("arm", cfg.arms), ("config", cfg.configs)):
        there = {line[name] for line in lines}
        for one in wanted:
            if one not in there:
                raise ValueError(f"there is no {name} {one!r} in the results, which have "
                                 f"{', '.join(sorted(there))}")
    arms = {*cfg.arms, "base"} if cfg.arms else {line["arm"] for line in lines}
    configs = cfg.configs or {line["config"] for line in lines}
    lines = [line for line in lines if line["arm"] in arms and line["config"] in configs]
    print(render(lines, summaries, read_study(cfg.logs) if cfg.logs else None))


def render(lines: list[dict], summaries=(), study=None) -> str:
    """Write the answer and all tables as markdown, below what their numbers mean."""
    results = frame_of(lines)
    parts = [MEANING, *answers(results)]
    for table in tables_of(results, summaries, study):
        header = list(table.cells.columns)
        rows = [header, ["---"] * len(header), *table.cells.map(as_cell).values.tolist()]
        parts.append(f"## {as_cell(table.name)}")
        parts.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
        parts += [as_cell(table.note)] * bool(table.note)
    return "\n\n".join(parts)


def as_cell(text: str) -> str:
    """Return a text as it can stand in a cell: in one line, without a bar of its own."""
    return printable(text).replace("\n", " ").replace("|", "\\|")


def tables_of(results: pd.DataFrame, summaries=(), study=None, paper: bool = True) -> list[Table]:
    """Make all tables of a frame of results, of the summary.json files of preserve.py, and of the
    logs and probes of a frames.Study.

    Configs that have been run come first, then, with `paper`, those that the paper alone has; and
    tables with a config of ours before those without.
    """
    best = at_chosen(results)
    ours = list(dict.fromkeys(best["config"]))
    configs = [*ours, *(config for config in PUBLISHED if paper and config not in ours)]
    shots = list(dict.fromkeys([4, 0, *sorted(best["n_shot"])]))
    tables = [main_table(best, configs, n_shot) for n_shot in shots]
    tables += [excluded(best, ours, shots), kept(best, configs, shots)]

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
    for config in ours:
        at_shots = []
        for n_shot in shots:
            arms = arms_of(best, config, n_shot)
            seeds = [len(tested(best, config, arm, n_shot)) for arm in arms]
            at_shots += [n_shot] * (len(seeds) > 1 and max(seeds) > 1)
        tables += [controls(best, config, n_shot) for n_shot in at_shots]
        tables += [controls(best, config, n_shot, outcome)
                   for n_shot in with_most_seeds(best, config, at_shots)
                   for outcome in (*losses_in(best[best["config"] == config]), "forgetting")]
    tables += [mechanism(best, ours, shots, study), preservation(best, summaries, configs)]
    tables = [table for table in tables if len(table.cells)]
    theirs = set(PUBLISHED).difference(ours)
    tables.sort(key=lambda table: theirs.issuperset(table.cells.iloc[:, 0]))    # stable
    return tables


def with_most_seeds(best, config: str, shots) -> list[int]:
    """Return the number of shots with most test scores, the first of equals: losses know no shots,
    so that one table has them. Empty if there are no shots."""
    on_test = best[(best["config"] == config) & (best["split"] == "test")]
    n_scores = on_test["n_shot"].value_counts()
    return [max(shots, key=lambda n_shot: n_scores.get(n_shot, 0))] if shots else []


def table(name: str, header: str, rows: list[list[str]], note: str = "") -> Table:
    return Table(name, pd.DataFrame(rows, columns=header.split(" | "), dtype=object), note)


# ----------------------------------------------------------------------------------------------
# the answer


def answers(results: pd.DataFrame) -> list[str]:
    """Say in a few sentences for each config and number of shots what JEPA does on test."""
    best, said = at_chosen(results), []
    for config in dict.fromkeys(best["config"]):
        for n_shot in sorted(set(best["n_shot"][best["config"] == config])):
            gain = effect_of(gain_of(best, config, "jepa", n_shot))
            if not gain.n:
                continue
            said.append(" ".join([f"{config}, {n_shot}-shot.", in_points(gain),
                                  *others_in_words(best, config, n_shot)]))
    return said


def in_points(gain: Effect) -> str:
    """Say a difference JEPA - plain, and what its interval excludes."""
    text = f"JEPA - plain = {in_words(gain)} points of accuracy"
    if math.isnan(gain.half):
        return f"{text}, from too few seeds for an interval."
    low, high = gain.mean - gain.half, gain.mean + gain.half
    told = "told" if low > 0 or high < 0 else "not told"
    return (f"{text}, {told} from zero at 95 % ({p_is(gain.p)}, not corrected): excluded are less "
            f"than {low:+.1f} and more than {high:+.1f}.")


def others_in_words(best, config: str, n_shot: int):
    """Yield sentences on the same FLOPs, on held-out loss, and on what is kept of the base."""
    same = effect_of(gain_of(best, config, "jepa", n_shot, over="equal_flop"))
    if same.n:
        yield (f"{minus('jepa', 'equal_flop')}, the same FLOPs, = {in_words(same)} points "
               f"({p_is(same.p)}).")
    rates = losses_in(best[best["config"] == config])[-2:]      # the greatest t, the mean over t
    for over in ("plain", "equal_flop"):
        losses = [(rate, effect_of(gain_of(best, config, "jepa", n_shot, over, rate)))
                  for rate in rates]
        said = [f"{in_words(loss, '+.3f')} ({rate}, {p_is(loss.p)})"
                for rate, loss in losses if loss.n]
        if said:
            yield (f"By held-out loss {minus('jepa', over)} = {' and '.join(said)}; less is "
                   f"better.")
    if loses(best, config, n_shot):
        share = share_in_words(kept_by(best, config, "jepa", n_shot))
        yield (f"Which share JEPA keeps of what plain loses of its base's score is {share}."
               if share == NOT_BOUNDED else
               f"Of what plain loses of its base's score JEPA keeps {share}.")


# ----------------------------------------------------------------------------------------------
# one row a config


def main_table(best, configs: list[str], n_shot: int) -> Table:
    rows, at_shot = [], best[best["n_shot"] == n_shot]
    for config in configs:
        paper = [published(config, arm, n_shot) for arm in ("plain", "jepa")]
        if config not in set(at_shot["config"]) and paper[1] == NOT_GIVEN:
            continue
        base, plain, jepa = (tested(best, config, arm, n_shot) for arm in ("base", "plain", "jepa"))
        n = sorted({*base["n"], *plain["n"], *jepa["n"]})
        starts = set(best["init_from"][best["config"] == config])
        before = base_in_words(best, config, n_shot)
        gain = gain_of(best, config, "jepa", n_shot)
        rows.append([config, " / ".join(map(str, n)) or NOT_RUN,
                     "from scratch" if starts == {""} else before,
                     spread(plain["accuracy"]), spread(jepa["accuracy"]), pair_in_words(jepa),
                     interval(gain), p_in_words(effect_of(gain).p), by_question(plain, jepa),
                     *paper])
    return table(f"{'Main table, ' * (n_shot == 4)}{n_shot}-shot",
                 "config | questions | base | plain | JEPA | lambda, k | JEPA - plain | p, seeds | "
                 "p, questions | paper: plain | paper: JEPA", rows)


def excluded(best, configs: list[str], shots) -> Table:
    """Write both ends of JEPA's intervals, paired and pooled, beside the paper's gain."""
    found, rows = {}, []                # {(difference, outcome): {(config, n_shot): Effect}}
    for config in configs:
        own = best[best["config"] == config]
        at_shots = [n_shot for n_shot in shots if len(tested(best, config, "jepa", n_shot)) > 2]
        losses = losses_in(own)
        losses = dict.fromkeys(losses[:1] + losses[-2:])        # at the least and the greatest t
        of_losses = with_most_seeds(best, config, at_shots)
        for outcome in ("accuracy", *losses):
            for n_shot in at_shots if outcome == "accuracy" else of_losses:
                for over in ("plain", "equal_flop"):
                    gain = effect_of(gain_of(best, config, "jepa", n_shot, over, outcome))
                    if gain.n > 2:
                        found.setdefault((over, outcome), {})[config, n_shot] = gain
    adjusted = {family: holm_of(gains) for family, gains in found.items()}
    for (over, outcome), gains in found.items():
        for (config, n_shot), gain in gains.items():
            is_score = outcome == "accuracy"
            of_all = pooled_of(pooled(cells_of(best, config, n_shot, outcome)), "jepa", over)
            form = "+.1f" if is_score else "+.3f"
            paper = published_gain(config, n_shot) if is_score and over == "plain" else math.nan
            rows.append([
                config, f"{n_shot}-shot" if is_score else f"loss, {outcome}",
                minus("jepa", over), interval(gain, form), p_in_words(gain.p),
                holm_in_words(adjusted[over, outcome], (config, n_shot)), ends_of(gain, form),
                f"{of_all.mean:{form}} {ends_of(of_all, form)}" if of_all else "-",
                NOT_GIVEN if math.isnan(paper) else f"{paper:+.2f}"])
    rows.sort(key=lambda row: configs.index(row[0]))            # stable
    gains = [published_gain(config, 4) for config in PUBLISHED]
    gains = [gain for gain in gains if not math.isnan(gain)]
    return table("What the 95 % intervals hold; what is outside is excluded",
                 "config | outcome | difference | mean | p | p, Holm | paired | pooled | paper",
                 rows, "Holm over the configs (and shots) only, not over outcomes. Scores in "
                 f"points. The paper's gains on its {len(gains)} cells, 4-shot, are "
                 f"{min(gains):+.2f} to {max(gains):+.2f}.")


def kept(best, configs: list[str], shots) -> Table:
    """Write how much of what plain tuning loses each arm keeps."""
    rows = []
    for config, n_shot in ((config, n_shot) for config in configs for n_shot in shots):
        paper = published_share(config, "jepa", n_shot, "base")
        ours = loses(best, config, n_shot)
        if math.isnan(paper) and not ours:
            continue
        arms = arms_of(best, config, n_shot) if ours else ["jepa"]
        for arm in arms:
            own = tested(best, config, arm, n_shot)
            rows.append([
                config, str(n_shot), label(arm), base_in_words(best, config, n_shot),
                spread(own["accuracy"]),
                interval(own["accuracy"] - starts_of(best, config, arm, n_shot)),
                "-" if arm == "plain" else share_in_words(kept_by(best, config, arm, n_shot)),
                f"{100 * paper:.0f} %" if arm == "jepa" and not math.isnan(paper) else NOT_GIVEN])
    return table("What is kept of the base's score",
                 "config | shots | arm | base | score | - base | share kept | paper", rows,
                 "Share kept: (arm - plain) / (base - plain), pairs by seed, with Fieller's 95 % "
                 "interval. Configs whose plain is no worse than its base are left out. The paper "
                 "has no score of the base: its share takes the 70.3 % that LLaDA's authors report "
                 "by another protocol.")


# ----------------------------------------------------------------------------------------------
# one row an arm


def beside(best, name: str, arms: dict) -> Table:
    """Set arms beside the paper's; arms is {config: its arms, one a row}."""
    rows = []
    for config, arm in ((config, arm) for config in arms for arm in arms[config]):
        runs = {n_shot: tested(best, config, arm, n_shot) for n_shot in (0, 4)}
        rows.append([config, label(arm), pair_in_words(pd.concat(runs.values()))])
        for n_shot, own in runs.items():
            paper = published(config, arm, n_shot)
            share = published_share(config, arm, n_shot, "jepa")
            if arm not in ("plain", "jepa") and not math.isnan(share):
                paper += f" ({100 * share:.0f} %)"
            ours = of_jepas_gain(best, config, arm, n_shot)
            rows[-1] += [spread(own["accuracy"]), interval(gain_of(best, config, arm, n_shot)),
                         "-" if arm == "jepa" else share_in_words(ours), paper]
    return table(name, "config | arm | lambda, k | 0-shot | - plain | of JEPA's gain | paper | "
                 "4-shot | - plain | of JEPA's gain | paper", rows,
                 "Of JEPA's gain: (arm - plain) / (JEPA - plain), with Fieller's 95 % interval. It "
                 "says nothing where JEPA's own gain is not told from zero.")


def controls(best, config: str, n_shot: int, outcome: str = "accuracy") -> Table:
    """Compare by one outcome each arm with its plain, and JEPA with each arm."""
    is_score = outcome == "accuracy"
    form, name = ("+.2f", f"{n_shot}-shot") if is_score else ("+.3f", f"held-out loss, {outcome}")
    name = "growth of the loss on the other corpus" if outcome == "forgetting" else name
    cells = cells_of(best, config, n_shot, outcome)
    order = cells.mean().sort_values(ascending=not is_score, kind="stable").index   # best first
    over_plain, under_jepa = effects(cells)
    blocks = {plain: pooled(cells, plain) for plain in ("plain", "plain_uniform")}
    both = [(found, holm_of({arm: found[arm] for arm in order}))
            for found in (over_plain, under_jepa)]
    rows = []
    for arm in order:
        rows.append([label(arm), spread(cells[arm], form.strip("+"))])
        pairs = ((arm, plain_of(arm)), ("jepa", arm))
        for (found, adjusted), (first, second) in zip(both, pairs):
            rows[-1] += [interval(found[arm], form), p_in_words(found[arm].p),
                         holm_in_words(adjusted, arm),
                         pooled_in_cell(pooled_of(blocks[plain_of(arm)], first, second), form)]
    notes = [f"Holm over {len(both[0][1])} arms - plain, and over {len(both[1][1])} JEPA - arm."]
    notes += [pooled_in_words(fit, form) for fit in blocks.values() if fit]
    notes += two_effects(best, config, n_shot, outcome, form)
    return table(f"Controls: {config}, {name}",
                 "arm | mean | - plain | p | p, Holm | pooled | JEPA - arm | p | p, Holm | pooled",
                 rows, " ".join(notes))


def holm_in_words(adjusted: dict, name) -> str:
    """Write Holm's p of one of a family; in a family of one it would be the p beside it."""
    return p_in_words(adjusted.get(name, math.nan)) if len(adjusted) > 1 else "-"


def pooled_of(fit, first: str, second: str) -> Effect | None:
    """Return the difference of two arms in a pooled analysis; None where it has not both."""
    if fit is None or first == second or not {first, second} <= set(fit.arms):
        return None
    return fit.difference(first, second)


def pooled_in_cell(found: Effect | None, form: str) -> str:
    """Write a pooled difference with its p, which is not of the paired difference beside it."""
    return f"{in_words(found, form)}, {p_is(found.p)}" if found else "-"


def two_effects(best, config: str, n_shot: int, outcome: str, form: str) -> list[str]:
    """Compare JEPA's effect at its config's diffusion rate with that at t ~ U(0, 1)."""
    first, second = (gain_of(best, config, arm, n_shot, outcome=outcome)
                     for arm in ("jepa", "jepa_uniform"))
    found = effect_of((first - second).dropna())
    return [f"(JEPA - plain) - (JEPA - plain, both with t ~ U(0, 1)) = {interval(found, form)}, "
            f"{p_is(found.p)}."] * bool(found.n)


# ----------------------------------------------------------------------------------------------
# the mechanism


def mechanism(best, configs: list[str], shots, study) -> Table:
    """Set drift, forgetting, the spread of seeds and the views beside the paper's."""
    rows = []
    for config, n_shot in ((config, n_shot) for config in configs for n_shot in shots):
        scores = [tested(best, config, arm, n_shot)["accuracy"] for arm in ("plain", "jepa")]
        both = pd.concat(scores, axis=1, join="inner").dropna()
        plain, jepa = both.to_numpy(float).T.tolist()
        ratio = sd_ratio(plain, jepa)
        if not math.isnan(ratio[0]):
            rows.append([config, f"sd over seeds, {n_shot}-shot: plain, JEPA",
                         f"{statistics.stdev(plain):.1f}, {statistics.stdev(jepa):.1f} (n = "
                         f"{len(plain)}); ratio {with_ends(ratio)}",
                         f"{SD_OF_SEEDS['plain']}, {SD_OF_SEEDS['jepa']}"])
    if study is not None:
        rows += drift_rows(study.probed) + view_rows(study.log)
    return table("Mechanism", "config | quantity | ours | paper", rows,
                 "The interval of a ratio of two sd is Pitman's and Morgan's, which takes the runs "
                 "of a seed as a pair; of drift Student's t over seeds of its logarithm, of r "
                 "Fisher's z. The paper's sd are of LLaDA on GSM8K, 4-shot.")


def drift_rows(probed: pd.DataFrame) -> list[list[str]]:
    rows, last = [], last_of_each(probed)
    for config in dict.fromkeys(last["config"]):
        own = last[last["config"] == config]
        try:
            both = drift_ratios(own, ["jepa"])
        except ValueError:              # a ratio to 0
            both = []
            rows.append([config, "drift of states, JEPA / plain", "not moved", DRIFT_RATIO])
        if len(both):
            found = effect_of(both["log_ratio"])
            ends = [math.exp(found.mean + side * found.half) for side in (0, -1, 1)]
            less = effect_of(both["forgetting"] - both["forgetting_plain"])
            rows += [[config, "drift of states, JEPA / plain", f"{with_ends(ends)} (n = {found.n})",
                      DRIFT_RATIO],
                     [config, "forgetting of the probe, JEPA - plain",
                      f"{interval(less, '+.3f')} of {both['forgetting_plain'].mean():.3f}, "
                      f"{p_is(less.p)}", LESS_FORGETTING]]
        for name, runs in (("plain", own[own["arm"] == "plain"]),
                           ("jepa", own[own["arm"] == "jepa"]), ("all arms", own)):
            r = pearson(list(runs["mean_drift"]), list(runs["forgetting"]))
            if not math.isnan(r[0]):
                rows.append([config, f"r(drift, forgetting), {label(name)}",
                             f"{with_ends(r, '+.2f')} (n = {len(runs)})",
                             DRIFT_R.get(name, NOT_GIVEN)])
    return rows


def view_rows(log: pd.DataFrame) -> list[list[str]]:
    rows, names = [], {"corr_views": "the two views of a row",
                       "corr_same_rate": "two views at the target's rate",
                       "corr_others": "views of different rows"}
    for config in dict.fromkeys(log["config"]):
        for name, words in names.items():
            said = [f"{spread(values, '.3f')} at step {step}"
                    for step, values in views_of(log, config, name)]
            if said:
                rows.append([config, f"correlation of embeddings, {words}", "; ".join(said),
                             NOT_GIVEN])
    return rows


def preservation(best, summaries, configs: list[str]) -> Table:
    """Set what was kept beside the paper's. A model of a grid is an arm of a config."""
    of_run = dict(zip(best["run"], zip(best["config"], best["arm"])))
    wide_t = "llada8b_gsm8k_wide_t"
    models, counted = {(wide_t, arm): [] for arm in PRESERVED if wide_t in configs}, set()
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
        scores = (base_in_words(best, config, 0) if arm == "base" else
                  spread(tested(best, config, arm, 0)["accuracy"]))
        rows.append([config, label(arm), spread(losses, "+.4f"), loss, spread(shares), mmlu, scores,
                     published(config, arm, 0)])
    return table("Base preservation", "config or model | arm | Wikitext loss minus base | paper | "
                 "MMLU | paper | task, 0-shot | paper", rows)


def pair_in_words(runs: pd.DataFrame) -> str:
    return "{:g}, {}".format(*pairs_of(runs)[0]) if len(runs) else NOT_RUN


def base_in_words(best, config: str, n_shot: int) -> str:
    scores = list(scores_of_bases(best, config, n_shot).values())
    return f"{scores[0]:.2f}" if len(scores) == 1 else spread(scores)


def by_question(first, second) -> str:
    """Write McNemar's p in each seed that both have and whose answers or verdicts are on file; of
    more than three seeds, in how many it is below 0.05."""
    seeds, found = first.index.intersection(second.index), {}
    kept = {}                           # {a folder of keep.py: its verdicts}, read once
    for seed in seeds:
        paths = [runs.loc[seed, "answers"] for runs in (first, second)]
        if all(Path(path).is_file() for path in paths):
            (a, b), _ = read_common(paths)
            found[seed] = mcnemar(sum(a[id] > b[id] for id in a), sum(a[id] < b[id] for id in a))
            continue
        lines = [verdicts_of(Path(path), *runs.loc[seed, ["split", "n_shot"]], kept)
                 for path, runs in zip(paths, (first, second))]
        if all(lines):
            found[seed] = mcnemar(*differ(*lines))
    if len(found) > 3:
        return f"{sum(p < 0.05 for p in found.values())} of {len(found)} seeds below 0.05"
    said = ", ".join(f"{seed}: {p_in_words(p)}" for seed, p in found.items())
    return said or ("no answers on file" if len(seeds) else NOT_RUN)


def verdicts_of(answers: Path, split: str, n_shot: int, kept: dict) -> dict | None:
    """Return the line of verdicts of a run, FOLDER/CONFIG/RUN/answers, or None without one; kept
    has what was read of each folder."""
    path = answers.parent.parent.parent / VERDICTS
    if path not in kept:
        kept[path] = read_verdicts(path, split, n_shot) if path.is_file() else {}
    return kept[path].get("/".join(answers.parent.parts[-2:]))


if __name__ == "__main__":
    run(main, TablesConfig)
