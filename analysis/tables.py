"""The paper's tables with our numbers beside them, in markdown, from what is on file.

    python analysis/tables.py --results=out/grid/results.jsonl --out=tables.md

In %: mean +- standard deviation (ddof = 1) of n seeds. A difference is paired by seed: mean +- its
standard error, p by Student's t with n - 1 degrees of freedom; and within each seed by question, p
by McNemar's exact test. Those are not pooled: seeds answer the same questions. (lambda, k), weight
and depth, are jepa's best on validation, and other arms stand there too; test chooses nothing. What
has not been run says so. Controls (of analysis/grid.py) are compared with plain and with jepa over
the seeds that both have: mean +- half of the 95 % interval, p by Student's t. Losses are held-out.
"""
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # a script in a folder: the modules lie one above

from configurator import run
from tasks.answers import read_common
from tasks.files import read_json
from tasks.stats import half_95, holm, mcnemar, over_seeds, t_test

KEYS = ("config", "arm", "lambda", "depth", "seed", "split", "n_shot")      # name a line
NOT_RUN, NOT_GIVEN = "not run", "not given"
RATES = ("rates_0.1_0.5", "rates_0.2_0.5", "jepa", "rates_0.3_0.9")

# arXiv 2606.00091 as notes and a review quote it, in %: config -> arm -> 0-shot, 4-shot
PUBLISHED = {
    "llada8b_gsm8k": {
        "plain": ("~39.5", "42.61"),            # main table; 0-shot: figure 3's gain, taken off
        "jepa": ("44.88", "61.33"),             # the appendix's table of rates; main table
        "rates_0.1_0.5": ("43.59", "44.05"),    # the same appendix; seed 42
        "rates_0.2_0.5": ("42.00", "46.40"),
        "rates_0.3_0.9": ("40.11", "42.76"),
        "symmetric": ("38.9", "~42.5"),         # figure 3, ~ where it has the gain alone
        "no_predictor": ("~43.2", "44.4")},
    "llada8b_gsm8k_wide_t": {                   # table 3, three seeds, ddof not stated
        "plain": ("65.23 +- 0.93", NOT_GIVEN), "l2": ("65.18 +- 0.87", NOT_GIVEN),
        "jepa": ("67.07 +- 0.41", NOT_GIVEN)},
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
    "base": ("0.0000", "57.40"), "plain": ("-0.0004", "57.93 +- 0.42"),
    "l2": ("-0.0007 +- 0.0002", NOT_GIVEN), "jepa": ("-0.0017", "57.53 +- 0.23")}


@dataclass
class TablesConfig:
    results: tuple[str, ...] = ()       # of grid.py; empty: out/grid/results.jsonl, if it is there
    preserve: tuple[str, ...] = ()      # of preserve.py; empty: out/preserve/summary.json, likewise
    out: str = ""                       # a file to write, such as tables.md; empty: print


def main(cfg: TablesConfig):
    is_there = lambda path: [path] * Path(path).is_file()
    lines = read_results(cfg.results or is_there("out/grid/results.jsonl"))
    summaries = map(read_json, cfg.preserve or is_there("out/preserve/summary.json"))
    text = render(lines, summaries)
    if cfg.out:
        Path(cfg.out).write_text(text + "\n")
    else:
        print(text)


def render(lines: list[dict], summaries=()) -> str:
    """The lines of results.jsonl files and the summary.json files of preserve.py -> markdown."""
    arms = {config: {} for config in PUBLISHED}         # config: arms that have been run
    for line in lines:
        arms.setdefault(line["config"], {})[line["arm"]] = True
    rates = {config: RATES for config, found in arms.items()
             if config == "llada8b_gsm8k" or set(RATES) & {*found} - {"jepa"}}
    known = {"base", "plain", "jepa", *RATES}
    ablated = {config: ["plain", "symmetric", "no_predictor", *sorted(
        {*found} - known - {"symmetric", "no_predictor"}), "jepa"]
        for config, found in arms.items() if config == "llada8b_gsm8k" or {*found} - known}
    shots = dict.fromkeys([4, 0, *sorted({line["n_shot"] for line in lines})])
    legend = __doc__.split("\n\n")[2].strip()
    return "\n\n".join([legend, *(main_table(lines, arms, n_shot) for n_shot in shots),
                        beside(lines, "Sensitivity to the rates (jepa: its config's)", rates),
                        beside(lines, "Ablation (~: the paper has the gain)", ablated),
                        *(controls(lines, config, n_shot) for config in ablated for n_shot in shots
                          if len(tested(lines, config, "jepa", n_shot)) > 1),
                        preservation(lines, summaries), selection(lines, arms, shots)])


def key_of(line: dict) -> tuple:
    return tuple(line[key] for key in KEYS)


def read_results(paths) -> list[dict]:
    """The lines of results.jsonl files, with the paths of their answers; a last one that a kill has
    cut short is left out. Raises FileNotFoundError, or ValueError naming a line that is no result
    or is there twice."""
    lines = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}; analysis/grid.py writes one")
        for number, text in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
            try:
                line = json.loads(text)
                answers, key = str(Path(path).parent / line["answers"]), key_of(line)
                share, n, _ = line["metrics"]["accuracy"], line["metrics"]["n"], line["init_from"]
                if key in lines or not 0 <= share <= 1 or min(n, line["lambda"], line["depth"]) < 0:
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path}, line {number}, is no result, or is one for the second "
                                 f"time") from None
            lines[key] = line | {"answers": answers}
    return list(lines.values())


def choose(lines: list[dict], config: str):
    """(lambda, depth) of jepa with the best mean accuracy on validation, or None without any.

    Over the seeds and numbers of shots that all pairs have; of equals the smallest.
    """
    scores = {}
    for line in lines:
        if (line["config"], line["arm"], line["split"]) == (config, "jepa", "validation"):
            pair = scores.setdefault((line["lambda"], line["depth"]), {})
            pair[line["seed"], line["n_shot"]] = line["metrics"]["accuracy"]
    common = set.intersection(*map(set, scores.values())) if scores else ()
    means = {pair: math.fsum(by[key] for key in common) for pair, by in scores.items()}
    return min(means, key=lambda pair: (-round(means[pair], 9), pair)) if common else None


def tested(lines, config: str, arm: str, n_shot: int, pair=None) -> dict:
    """{seed: line} of an arm on test, at `pair`; by default at jepa's (lambda, depth), or where an
    arm has a (lambda, depth) of its own at what is nearest to that."""
    chosen, pairs = choose(lines, config), pairs_of(lines, config, arm)
    if not pair and (chosen or len(pairs) == 1) and pairs:
        nearest = lambda own: sum(a == b for a, b in zip(own, chosen or own))
        pair = chosen if arm == "jepa" and chosen else max(pairs, key=nearest)
    return {line["seed"]: line for line in lines if (line["lambda"], line["depth"]) == pair and
            (line["config"], line["arm"], line["n_shot"]) == (config, arm, n_shot)
            and line["split"] == "test"}


def pairs_of(lines, config: str, arm: str) -> list[tuple]:
    return sorted({(line["lambda"], line["depth"]) for line in lines
                   if (line["config"], line["arm"]) == (config, arm)})


def main_table(lines, configs, n_shot: int) -> str:
    rows = []
    for config in configs:
        base, plain, jepa = (tested(lines, config, arm, n_shot)
                             for arm in ("base", "plain", "jepa"))
        n = {line["metrics"]["n"] for runs in (base, plain, jepa) for line in runs.values()}
        starts = {line["init_from"] for line in lines if line["config"] == config}
        before = "from scratch" if starts == {""} else "".join(
            f"{score:.2f}" for score in percent(base)) or NOT_RUN
        rows.append([config, " / ".join(map(str, sorted(n))) or NOT_RUN, before,
                     spread(percent(plain)), spread(percent(jepa)), pair_of(jepa),
                     *difference(plain, jepa), by_question(plain, jepa),
                     *(published(config, arm, n_shot) for arm in ("plain", "jepa"))])
    return table(f"{'Main table, ' * (n_shot == 4)}{n_shot}-shot",
                 "config | questions | base | plain | jepa | lambda, k | jepa - plain | p, seeds | "
                 "p, questions | paper: plain | paper: jepa", rows)


def beside(lines, name: str, arms: dict) -> str:
    """arms: {config: its arms, one a row}."""
    rows = []
    for config, arm in ((config, arm) for config in arms for arm in arms[config]):
        rows.append([config, arm, pair_of(tested(lines, config, arm, 4)
                                          or tested(lines, config, arm, 0))])
        for n_shot in (0, 4):
            plain, runs = (tested(lines, config, which, n_shot) for which in ("plain", arm))
            gain = "-" if arm == "plain" else difference(plain, runs)[0]
            rows[-1] += [spread(percent(runs)), gain, published(config, arm, n_shot)]
    return table(name, "config | arm | lambda, k | 0-shot | minus plain | paper | "
                 "4-shot | minus plain | paper", rows)


def controls(lines, config: str, n_shot: int) -> str:
    """Each arm minus plain, and jepa minus it; p of the latter after Holm over all of them."""
    arms = sorted({line["arm"] for line in lines if line["config"] == config} - {"base", "jepa"})
    runs = {arm: tested(lines, config, arm, n_shot) for arm in ("jepa", *arms)}
    under_jepa = {arm: paired(runs[arm], runs["jepa"]) for arm in arms}
    p = {arm: p_of(differences) for arm, differences in under_jepa.items()}
    adjusted, rows = holm({arm: value for arm, value in p.items() if not math.isnan(value)}), []
    for arm in sorted(runs, key=lambda arm: -sum(percent(runs[arm])) / max(1, len(runs[arm]))):
        own, plain = runs[arm], {} if arm == plain_of(arm) else runs.get(plain_of(arm), {})
        over_plain = paired(plain, own)
        losses = [[loss for loss in map(which, own.values()) if loss is not None]
                  for which in (loss_at_least_t, loss_at_greatest_t, loss_of_other_corpus)]
        rows.append([arm, spread(percent(own)), interval(over_plain), in_words(p_of(over_plain)),
                     interval(under_jepa.get(arm, [])), in_words(p.get(arm, math.nan)),
                     in_words(adjusted.get(arm, math.nan)), *(spread(of, ".3f") for of in losses),
                     interval(paired(plain, own, loss_of_other_corpus), "+.3f")])
    text = table(f"Controls: {config}, {n_shot}-shot", "arm | score | - plain | p | jepa - arm | p "
                 "| p, Holm | loss at least t | at greatest t | other corpus | - plain", rows)
    four = [runs.get(arm, {}) for arm in ("plain", "jepa", "plain_uniform", "jepa_uniform")]
    effects = []
    for seed in sorted(set.intersection(*map(set, four))):
        plain, jepa, plain_uniform, jepa_uniform = (accuracy(of[seed]) for of in four)
        effects.append((jepa - plain) - (jepa_uniform - plain_uniform))
    if effects:
        text += (f"\n\n(jepa - plain) - (jepa_uniform - plain_uniform) = {interval(effects)}, p = "
                 f"{in_words(p_of(effects))}")
    return text


def plain_of(arm: str) -> str:
    """What an arm of analysis/grid.py is compared with: the one without its JEPA term."""
    return "plain_uniform" if arm.endswith("_uniform") else "plain"


def loss_at_least_t(line: dict):
    return next(iter(losses_after(line, 0)), None)


def loss_at_greatest_t(line: dict):
    return next(reversed(losses_after(line, 0)), None)


def loss_of_other_corpus(line: dict):
    losses = losses_after(line, 1)
    return statistics.mean(losses) if losses else None


def losses_after(line: dict, corpus: int) -> list[float]:
    """Held-out losses after training, from the least masking rate to the greatest."""
    corpora = [*line.get("held_out", {}).values(), {}, {}]
    return [corpora[corpus][t][1] for t in sorted(corpora[corpus], key=float)]


def preservation(lines, summaries) -> str:
    """A model whose path ends like a folder of the grid is that arm of that config."""
    cells = {(line["config"], line["arm"], line["n_shot"]) for line in lines}
    folders = {Path(line["answers"]).parent.parts[-2:]: cell[:2]
               for cell in cells for line in tested(lines, *cell).values()}
    models = {("llada8b_gsm8k_wide_t", arm): {} for arm in PRESERVED}
    for summary in summaries:
        for name, scores in summary["models"].items():
            is_base = name == summary["settings"]["base"]
            starts = {line["config"] for line in lines if line.get("init_from") == name and is_base}
            for config in starts:
                models.setdefault((config, "base"), {})[name] = scores
            if starts:
                continue
            group = folders.get(Path(name).parts[-2:], (name, "base" if is_base else "-"))
            models.setdefault(group, {})[name] = scores
    rows = []
    for (config, arm), found in models.items():
        theirs = PRESERVED.get(arm) if config == "llada8b_gsm8k_wide_t" else None
        loss, mmlu = theirs or (NOT_GIVEN, NOT_GIVEN)
        rows.append([config, arm, spread([scores["wikitext"]["minus_base"]
                                          for scores in found.values()], "+.4f"), loss,
                     spread([100 * scores["mmlu"]["accuracy"] for scores in found.values()]), mmlu])
    return table("Base preservation", "config or model | arm | Wikitext loss minus base | paper | "
                 "MMLU | paper", rows)


def selection(lines, configs, shots) -> str:
    """The test mean of the best (lambda, depth) on test, minus that of the best on validation."""
    rows = []
    for config, n_shot in ((config, n_shot) for config in configs for n_shot in shots):
        pairs, chosen = pairs_of(lines, config, "jepa"), choose(lines, config)
        runs = {pair: tested(lines, config, "jepa", n_shot, pair) for pair in pairs}
        seeds = set.intersection(*map(set, runs.values())) if runs else set()
        cells = [NOT_RUN] * 4
        if chosen and seeds and len(pairs) > 1:
            scores = {pair: percent({s: by[s] for s in seeds}) for pair, by in runs.items()}
            means = {pair: sum(scores[pair]) / len(seeds) for pair in pairs}
            best = max(means, key=means.get)
            cells = ["{:.2f} ({:g}, {})".format(means[pair], *pair) for pair in (chosen, best)]
            cells += [f"{means[best] - means[chosen]:+.2f}",
                      f"{max(map(max, scores.values())) - means[chosen]:+.2f}"]
        if pairs or n_shot == 4:
            rows.append([config, str(n_shot), str(len(pairs)), str(len(seeds)), *cells])
    return table("Best of n on test", "config | shots | (lambda, k) | seeds | chosen on "
                 "validation | best on test | gain | gain of the best single run", rows)


def table(name: str, header: str, rows: list[list[str]]) -> str:
    line = " | ".join("---" for _ in header.split(" | "))
    return "\n".join([f"## {name}\n", *(f"| {row} |" for row in [header, line, *map(
        " | ".join, rows)])])


def published(config: str, arm: str, n_shot: int) -> str:
    both = PUBLISHED.get(config, {}).get(arm, (NOT_GIVEN, NOT_GIVEN))
    return dict(zip((0, 4), both)).get(n_shot, NOT_GIVEN)


def percent(runs: dict) -> list[float]:
    return [accuracy(line) for line in runs.values()]


def pair_of(runs: dict) -> str:
    return next((f"{line['lambda']:g}, {line['depth']}" for line in runs.values()), NOT_RUN)


def spread(values: list[float], form: str = ".2f") -> str:
    if len(values) < 2:
        return f"{values[0]:{form}} (n = 1)" if values else NOT_RUN
    all = over_seeds(values)
    return f"{all['mean']:{form}} +- {all['sd_ddof1']:{form.strip('+')}} (n = {all['n']})"


def accuracy(line: dict) -> float:
    return 100 * line["metrics"]["accuracy"]


def paired(first: dict, second: dict, number=accuracy) -> list[float]:
    """Second minus first, for each seed that both have."""
    both = [(number(first[seed]), number(second[seed]))
            for seed in sorted(first.keys() & second.keys())]
    return [b - a for a, b in both if None not in (a, b)]


def interval(values: list[float], form: str = "+.2f") -> str:
    """The mean, and from three seeds up half of its 95 % interval."""
    half = f" +- {half_95(values):{form.strip('+')}}" if len(values) > 2 else ""
    return f"{statistics.mean(values):{form}}{half} (n = {len(values)})" if values else "-"


def p_of(values: list[float]) -> float:
    n = len(values)
    return t_test(statistics.mean(values), statistics.stdev(values) / math.sqrt(n), n - 1) \
        if n > 1 else math.nan


def difference(first: dict, second: dict) -> tuple[str, str]:
    """Second minus first in points over the seeds that both have, and p."""
    values = paired(first, second)
    if len(values) < 2:
        return (f"{values[0]:+.2f} (n = 1)", "n = 1") if values else (NOT_RUN, NOT_RUN)
    all = over_seeds(values)
    return (f"{all['mean']:+.2f} +- {all['stderr']:.2f} (n = {all['n']})",
            in_words(p_of(values)))


def by_question(first: dict, second: dict) -> str:
    """McNemar's p in each seed that both have."""
    said = []
    for seed in sorted(first.keys() & second.keys()):
        paths, p = [runs[seed]["answers"] for runs in (first, second)], "no answers on file"
        if all(Path(path).is_file() for path in paths):
            (a, b), _ = read_common(paths)
            p = in_words(mcnemar(sum(a[id] > b[id] for id in a), sum(a[id] < b[id] for id in a)))
        said.append(f"{seed}: {p}")
    return ", ".join(said) or NOT_RUN


def in_words(p: float) -> str:
    return "-" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


if __name__ == "__main__":
    run(main, TablesConfig)
