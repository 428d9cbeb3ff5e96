"""The paper's tables with our numbers beside them, in markdown, from what is on file.

    python analysis/tables.py --results=out/grid/results.jsonl --out=tables.md

Numbers in %, mean +- standard deviation (ddof = 1) of n seeds. A difference is paired: seed by seed,
+- its standard error, p by Student's t with n - 1 degrees of freedom; question by question within a
seed, p by McNemar's exact test. Seeds are not pooled for the latter: they answer the same questions.
What has not been run says so.
"""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # a script in a folder: the modules lie one above

from answers import read_common
from configurator import run
from stats import mcnemar, over_seeds
from weights import read_json

KEYS = ("config", "arm", "lambda", "depth", "seed", "split", "n_shot")      # name a line
NOT_RUN, NOT_GIVEN = "not run", "not given"

# arXiv 2606.00091, as notes and a review quote it: (n_shot, config, arm) -> accuracy in %
PUBLISHED = {
    # main table: the best (lambda, depth) of 15 for each row
    (4, "llada8b_gsm8k", "plain"): "42.61", (4, "llada8b_gsm8k", "jepa"): "61.33",
    (4, "llada8b_nl_rx", "plain"): "47.50", (4, "llada8b_nl_rx", "jepa"): "58.20",
    (4, "llada8b_spider", "plain"): "35.40", (4, "llada8b_spider", "jepa"): "39.36",
    (4, "llada8b_django", "plain"): "74.40", (4, "llada8b_django", "jepa"): "75.40",
    (4, "dream7b_gsm8k", "plain"): "34.87", (4, "dream7b_gsm8k", "jepa"): "46.25",
    (4, "dream7b_nl_rx", "plain"): "42.00", (4, "dream7b_nl_rx", "jepa"): "46.80",
    (4, "dream7b_spider", "plain"): "20.89", (4, "dream7b_spider", "jepa"): "25.15",
    (4, "dream7b_django", "plain"): "69.58", (4, "dream7b_django", "jepa"): "72.35",
    # appendix, (t_ctx, t_tgt), seed 42
    (0, "llada8b_gsm8k", "rates_0.1_0.5"): "43.59", (4, "llada8b_gsm8k", "rates_0.1_0.5"): "44.05",
    (0, "llada8b_gsm8k", "rates_0.2_0.5"): "42.00", (4, "llada8b_gsm8k", "rates_0.2_0.5"): "46.40",
    (0, "llada8b_gsm8k", "jepa"): "44.88",
    (0, "llada8b_gsm8k", "rates_0.3_0.9"): "40.11", (4, "llada8b_gsm8k", "rates_0.3_0.9"): "42.76",
    # figure 3; with ~ from its gains: 5.4 (0-shot) and 18.7 (4-shot) of jepa, 3.7, -0.1
    (0, "llada8b_gsm8k", "plain"): "~39.5",
    (0, "llada8b_gsm8k", "symmetric"): "38.9", (4, "llada8b_gsm8k", "symmetric"): "~42.5",
    (0, "llada8b_gsm8k", "no_predictor"): "~43.2", (4, "llada8b_gsm8k", "no_predictor"): "44.4",
    # table 3, three seeds; it mixes ddof 0 and 1
    (0, "llada8b_gsm8k_wide_t", "plain"): "65.23 +- 0.93",
    (0, "llada8b_gsm8k_wide_t", "jepa"): "67.07 +- 0.41",
}
PRESERVED = {       # table 3: Wikitext loss minus the base's, MMLU of 500 questions in %
    "base": ("0.0000", "57.40"), "plain": ("-0.0004", "57.93 +- 0.42"),
    "l2": ("-0.0007 +- 0.0002", NOT_GIVEN), "jepa": ("-0.0017", "57.53 +- 0.23"),
}


@dataclass
class TablesConfig:
    results: tuple[str, ...] = ()       # of grid.py; empty: out/grid/results.jsonl, if it is there
    preserve: tuple[str, ...] = ()      # of preserve.py; empty: out/preserve/summary.json, if ...
    out: str = ""                       # a file to write, such as tables.md; empty: print


def main(cfg: TablesConfig):
    is_there = lambda path: [path] * Path(path).is_file()
    lines = load(cfg.results or is_there("out/grid/results.jsonl"))
    text = render(lines, [read_json(path) for path in
                          cfg.preserve or is_there("out/preserve/summary.json")])
    if cfg.out:
        Path(cfg.out).write_text(text + "\n")
    else:
        print(text)


def render(lines: list[dict], summaries=()) -> str:
    named = dict.fromkeys(config for _, config, _ in PUBLISHED)
    configs = list(named | dict.fromkeys(line["config"] for line in lines))
    has = lambda config, prefix: any(line["config"] == config and line["arm"].startswith(prefix)
                                     for line in lines)
    shots = dict.fromkeys([4, 0, *sorted({line["n_shot"] for line in lines})])
    text = [compared(lines, configs, n_shot) for n_shot in shots]
    text += [sensitivity(lines, [c for c in configs if c == "llada8b_gsm8k" or has(c, "rates_")]),
             ablation(lines, [c for c in configs if c == "llada8b_gsm8k" or any(
                 has(c, line["arm"]) for line in lines
                 if line["arm"] not in ("base", "plain", "jepa") and "rates_" not in line["arm"])]),
             preservation(lines, summaries), selection(lines, configs, shots)]
    return "\n\n".join(text)


def compared(lines, configs, n_shot: int) -> str:
    rows = []
    for config in configs:
        base, plain, jepa = (tested(lines, config, arm, n_shot) for arm in ("base", "plain", "jepa"))
        ours = [line for line in lines if line["config"] == config]
        scratch = bool(ours) and not any(line["init_from"] for line in ours)
        n = {line["metrics"]["n"] for line in [*base.values(), *plain.values(), *jepa.values()]}
        theirs = [PUBLISHED.get((n_shot, config, arm), NOT_GIVEN) for arm in ("plain", "jepa")]
        rows.append([config, " / ".join(map(str, sorted(n))) or NOT_RUN,
                     "from scratch" if scratch else f"{percent(base)[0]:.2f}" if base else NOT_RUN,
                     spread(percent(plain)), spread(percent(jepa)), pair_in_words(jepa),
                     *difference(plain, jepa), by_question(plain, jepa), *theirs])
    name = {4: "Main table, 4-shot", 0: "0-shot"}.get(n_shot, f"{n_shot}-shot")
    return table(name, "config | questions | base | plain | jepa | lambda, k | jepa - plain | "
                 "p, seeds | p, questions | paper: plain | paper: jepa", rows)


def sensitivity(lines, configs) -> str:
    arms = ("rates_0.1_0.5", "rates_0.2_0.5", "jepa", "rates_0.3_0.9")
    rows = [[config, "its own" + " (0.2, 0.7)" * (config == "llada8b_gsm8k") if arm == "jepa" else
             "({}, {})".format(*arm.split("_")[1:]), *beside(lines, config, arm)]
            for config in configs for arm in arms]
    return table("Sensitivity to the rates (t_ctx, t_tgt)", f"config | rates | {BESIDE}", rows)


def ablation(lines, configs) -> str:
    rows = []
    for config in configs:
        found = [line["arm"] for line in lines if line["config"] == config]
        for arm in dict.fromkeys(["plain", "symmetric", "no_predictor", *found, "jepa"]):
            if arm != "base" and "rates_" not in arm:
                runs = tested(lines, config, arm, 4) or tested(lines, config, arm, 0)
                rows.append([config, arm, pair_in_words(runs), *beside(lines, config, arm)])
    return table("Ablation", f"config | arm | lambda, k | {BESIDE}", rows)


BESIDE = "0-shot | minus plain | paper | 4-shot | minus plain | paper"


def beside(lines, config: str, arm: str) -> list[str]:
    cells = []
    for n_shot in (0, 4):
        plain, runs = (tested(lines, config, name, n_shot) for name in ("plain", arm))
        gain = difference(plain, runs)[0] if arm != "plain" else "-"
        cells += [spread(percent(runs)), gain, PUBLISHED.get((n_shot, config, arm), NOT_GIVEN)]
    return cells


def preservation(lines, summaries) -> str:
    """A model is an arm of a config if its path ends as its folder in a grid does."""
    folders = {str(Path(line["answers"]).parent): line for line in lines}
    groups = {("llada8b_gsm8k_wide_t", arm): [] for arm in PRESERVED}
    for summary in summaries:
        for name, scores in summary["models"].items():
            line = next((line for folder, line in folders.items()
                         if Path(folder).parts[-2:] == Path(name).parts[-2:]), None)
            is_base = name == summary["settings"]["base"]
            group = (line["config"], line["arm"]) if line else (name, "base" * is_base)
            groups.setdefault(group, []).append(scores)
    rows = []
    for (config, arm), models in groups.items():
        theirs = PRESERVED.get(arm, ()) if config == "llada8b_gsm8k_wide_t" else ()
        loss, mmlu = theirs or (NOT_GIVEN, NOT_GIVEN)
        rows.append([config, arm, spread([m["wikitext"]["minus_base"] for m in models], "+.4f"),
                     loss, spread([100 * m["mmlu"]["accuracy"] for m in models]), mmlu])
    return table("Base preservation", "config or model | arm | Wikitext loss minus base | paper | "
                 "MMLU | paper", rows)


def selection(lines, configs, shots) -> str:
    """What choosing on test would have added: the best pair's mean there minus the chosen one's."""
    rows = []
    for config in configs:
        pairs, chosen = pairs_of(lines, config, "jepa"), choose(lines, config)
        for n_shot in shots:
            runs = {pair: tested(lines, config, "jepa", n_shot, pair) for pair in pairs}
            seeds = set.intersection(*map(set, runs.values())) if runs else set()
            cells = [NOT_RUN] * 4
            if seeds and chosen and len(pairs) > 1:
                means = {pair: sum(percent({s: by[s] for s in seeds})) / len(seeds)
                         for pair, by in runs.items()}
                best = max(means, key=means.get)
                single = max(max(percent(by)) for by in runs.values())
                cells = [f"{means[chosen]:.2f} at {chosen}", f"{means[best]:.2f} at {best}",
                         f"{means[best] - means[chosen]:+.2f}", f"{single - means[chosen]:+.2f}"]
            rows.append([config, str(n_shot), str(len(pairs)), str(len(seeds)), *cells])
    return table("Best of n: what choosing on test would have added", "config | shots | pairs "
                 "(lambda, k) | seeds | chosen on validation | best on test | gain | gain of the "
                 "best single run", rows)


def pair_in_words(runs: dict) -> str:
    return next((f"{line['lambda']:g}, {line['depth']}" for line in runs.values()), NOT_RUN)


def table(name: str, header: str, rows: list[list[str]]) -> str:
    head = [header, " | ".join("---" for _ in header.split(" | "))]
    return "\n".join([f"## {name}", ""] + [f"| {row} |" for row in [
        *head, *(" | ".join(row).replace("\n", " ") for row in rows)]])


# ----------------------------------------------------------------------------------------------
# lines


def key_of(line: dict) -> tuple:
    return tuple(line[key] for key in KEYS)


def read_results(path) -> list[dict]:
    """The lines of a results.jsonl, a last one that a kill has cut short left out.

    Raises FileNotFoundError, or ValueError naming a line that is no result or is there twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; analysis/grid.py writes one")
    lines = {}
    for number, text in enumerate(Path(path).read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            if key_of(line) in lines or not 0 <= line["metrics"]["accuracy"] <= 1:
                raise ValueError
            lines[key_of(line)] = line
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}, line {number}, is no result, or is one for the second "
                             f"time") from None
    return list(lines.values())


def load(paths) -> list[dict]:
    """The lines of several files, with the paths of their answers; ValueError if two have one."""
    lines, seen = [], {}
    for path in paths:
        for line in read_results(path):
            if key_of(line) in seen:
                raise ValueError(f"{path} and {seen[key_of(line)]} both have {key_of(line)}; "
                                 f"leave one of them out")
            seen[key_of(line)] = path
            lines.append(line | {"answers": str(Path(path).parent / line["answers"])})
    return lines


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
    if not common:
        return None
    means = {pair: math.fsum(by[key] for key in common) / len(common)
             for pair, by in scores.items()}
    return min(means, key=lambda pair: (-round(means[pair], 12), pair))


def pairs_of(lines, config: str, arm: str) -> list[tuple]:
    return sorted({(line["lambda"], line["depth"]) for line in lines
                   if (line["config"], line["arm"]) == (config, arm)})


def tested(lines, config: str, arm: str, n_shot: int, pair=None) -> dict:
    """{seed: line} of an arm on test, at `pair`, or at jepa's (lambda, depth) as far as it has it."""
    chosen, pairs = choose(lines, config), pairs_of(lines, config, arm)
    if not pair and arm == "jepa":
        pair = chosen or (pairs[0] if len(pairs) == 1 else None)
    elif not pair and pairs:
        pair = max(pairs, key=lambda own: sum(a == b for a, b in zip(own, chosen or own)))
    return {line["seed"]: line for line in lines if (line["lambda"], line["depth"]) == pair and
            (line["config"], line["arm"], line["n_shot"], line["split"]) ==
            (config, arm, n_shot, "test")}


# ----------------------------------------------------------------------------------------------
# cells


def percent(runs: dict) -> list[float]:
    return [100 * line["metrics"]["accuracy"] for line in runs.values()]


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean +- standard deviation, ddof = 1."""
    if len(values) < 2:
        return f"{values[0]:{form}} (n = 1)" if values else NOT_RUN
    all = over_seeds(values)
    return f"{all['mean']:{form}} +- {all['sd_ddof1']:{form.strip('+')}} (n = {all['n']})"


def difference(first: dict, second: dict) -> tuple[str, str]:
    """Second minus first in points, over the seeds that both have; p by Student's t."""
    values = [100 * (second[seed]["metrics"]["accuracy"] - first[seed]["metrics"]["accuracy"])
              for seed in first if seed in second]
    if len(values) < 2:
        return (f"{values[0]:+.2f} (n = 1)", "n = 1") if values else (NOT_RUN, NOT_RUN)
    all = over_seeds(values)
    return f"{all['mean']:+.2f} +- {all['stderr']:.2f} (n = {all['n']})", in_words(t_test(values))


def t_test(differences: list[float]) -> float:
    """Two-sided p of a mean of 0 (Abramowitz and Stegun 26.7.3, 26.7.4); nan if all are equal."""
    all = over_seeds(differences)
    if all["stderr"] < 1e-12:
        return math.nan if all["mean"] else 1.0
    df = all["n"] - 1
    angle = math.atan(all["mean"] / all["stderr"] / math.sqrt(df))
    term = total = math.cos(angle) if df % 2 else 1.0
    for k in range(3 if df % 2 else 2, df, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    inside = abs(math.sin(angle)) * total
    return 1 - (2 / math.pi * (abs(angle) + inside * (df > 1)) if df % 2 else inside)


def by_question(first: dict, second: dict) -> str:
    """McNemar's p of each seed that both have."""
    said = []
    for seed in (seed for seed in first if seed in second):
        paths = [runs[seed]["answers"] for runs in (first, second)]
        if all(Path(path).is_file() for path in paths):
            (a, b), _ = read_common(paths)
            p = mcnemar(sum(a[id] > b[id] for id in a), sum(a[id] < b[id] for id in a))
            said.append(f"{seed}: {in_words(p)}")
        else:
            said.append(f"{seed}: no answers on file")
    return ", ".join(said) or NOT_RUN


def in_words(p: float) -> str:
    return "undefined" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


if __name__ == "__main__":
    run(main, TablesConfig)
